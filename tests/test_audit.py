"""The audit passes honest work, catches broken work, and none of its checks fails anyway."""

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fortify.attacks import CW, FGSM, PGD, Adversarial, craft
from fortify.audit import (
    FAIL,
    NOT_RUN,
    PASS,
    Audit,
    AuditData,
    Suite,
    accuracies_side_by_side,
    audit,
    remarks,
)
from fortify.audit.answer import audit_answer, checks_in_words
from fortify.audit.autoattack import autoattack
from fortify.audit.checks import CHECKS, MEANINGS, FalseGradient, dlr
from fortify.audit.figures import audit_matrix
from fortify.audit.mutants import (
    BROKEN_ATTACKS,
    FAKE_DEFENCES,
    MUTANT_CHECKS,
    _Around,
    clamp_normalised,
    contested_budget,
    mutant_check,
    mutant_suite,
    run_mutants,
    saved_file,
    shattered,
    tally,
    train_mode,
)
from fortify.intervals import wilson
from fortify.models import build_model, predict

SUITE = Suite(
    eps_255=3,
    eps_grid_255=(1, 16),
    pgd_steps=10,
    restarts=2,
    cw=CW(binary_search_steps=2, steps=10, stepsize=0.05),
    noise_draws=5,
    square_queries=100,
    autoattack_steps=10,
    bootstrap_draws=200,
)


@pytest.fixture(scope="module")
def data(phantoms, images):
    """16 of the phantoms that the fixture's model learnt."""
    some = list(range(0, 48, 3))
    return AuditData(images[some], phantoms.labels[some], phantoms.groups[some])


@pytest.fixture(scope="module")
def honest(model, data):
    return audit(model, data, SUITE, others=[model])


# What mutants meet: at so few steps each is caught by the check meant for it, and the honest attack by none.
FEW_STEPS = replace(SUITE, pgd_steps=5)


@pytest.fixture(scope="module")
def mutants(model, data):
    return run_mutants(model, data, FEW_STEPS, images=10)


def verdict(id, model, data, suite=SUITE, **options):
    (line,) = audit(model, data, suite, only=[id], **options).checks
    return line.verdict


def nothing(model, images, labels, attack, **_):
    """An attack that does nothing, and says so truly."""
    probabilities, predictions = predict(model, images).max(1)
    return Adversarial(images, predictions, probabilities, predictions != labels)


def test_every_mutant_is_caught(mutants):
    print(f"caught: {tally(mutants)}")
    assert list(mutants.name) == [*BROKEN_ATTACKS, *FAKE_DEFENCES] and len(mutants) >= 10
    assert mutants.caught.all(), f"the audit does not see {', '.join(mutants.name[~mutants.caught])}"
    assert mutant_check(mutants).verdict == PASS
    attacks = mutants[mutants.kind.eq("broken attack")]
    assert not attacks.by.str.contains("T8").any(), "no audit has the honest attack to compare with"


def test_no_check_that_catches_a_mutant_fails_anyway(model, data):
    suite = mutant_suite(model, data, FEW_STEPS)
    assert audit(model, data, suite, others=[model], only=MUTANT_CHECKS).failed == ()


def test_an_honest_attack_and_an_undefended_model_are_not_caught(model, data):
    honest = {"attacks": {"honest": craft}, "defences": {"none": _Around}}
    same = run_mutants(model, data, FEW_STEPS, images=10, **honest)
    assert not same.caught.any() and list(same.by) == ["", ""]
    assert tally(same) == "0/2"
    missed = mutant_check(same)
    assert missed.verdict == FAIL and "honest, none" in missed.note
    assert mutant_check(same.iloc[:0]).verdict == FAIL, "an empty mutants proves nothing"


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("no projection", "T0"),
        ("wrong sign", "T1"),
        ("clamp on normalised data", "T0"),
        ("train mode", "T0"),
        ("one short step", "T3"),
        ("one step of eps", "T2"),
        ("half the budget", "T2"),
        ("black-image CW", "T0"),
        ("claimed success", "T0"),
        ("no seed", "T0"),
        ("logit scaling", "T9"),
        ("rounding", "T9"),
        ("8-bit front end", "T8"),
        ("random noise", "T0"),  # which names the model, see below
        ("shattered gradient", "T8"),
        ("label only", "T9"),
        ("saturation", "T9"),
    ],
)
def test_a_mutant_is_caught_by_the_check_meant_for_it(mutants, name, id):
    assert id in mutants.set_index("name").by[name].split(", ")


def test_one_table_with_every_check(honest):
    assert list(honest.table.columns) == ["id", "check", "verdict", "measured", "limit", "note"]
    assert list(honest.table.id) == list(CHECKS)
    assert set(honest.table.verdict) <= {PASS, FAIL, NOT_RUN}
    assert honest.passed == (FAIL not in set(honest.table.verdict))
    ran = honest.table[honest.table.verdict.ne(NOT_RUN)]
    assert (ran.measured.str.len() > 0).all() and (ran.limit.str.len() > 0).all()
    assert honest.to_markdown().count("\n") == len(CHECKS) + 2


def test_t10_takes_its_place_and_replaces_itself(honest, mutants):
    more = honest.with_check(mutant_check(mutants)).with_check(mutant_check(mutants))
    assert list(more.table.id[-6:]) == ["T10", "T11", "T13", "T14", "T15", "T16"]
    elsewhere = honest.with_check(mutant_check(None)).table.set_index("id").loc["T10"]
    assert elsewhere.verdict == NOT_RUN and elsewhere.note == "the mutants met another model"


def test_the_worst_case_is_no_better_than_any_attack(honest):
    table = honest.accuracies.set_index("attack")
    assert table.k["worst case"] <= table.k.min() and table.k["clean"] >= table.k.max()
    assert (table.n == 16).all()
    assert (table.low, table.high)[0]["clean"] == pytest.approx(wilson(table.k["clean"], 16)[0])


def test_an_attack_that_does_nothing_is_seen(model, data):
    found = audit(model, data, SUITE, craft=nothing, only=["T0", "T1", "T2", "T3", "T5"])
    assert found.failed == ("T1", "T2", "T5"), "T0 and T3 have nothing to object to"
    right = int((predict(model, data.images).argmax(1) == data.labels).nonzero()[0])
    one = AuditData(data.images[right : right + 1], data.labels[right : right + 1])
    assert "T1" in audit(model, one, SUITE, craft=nothing, only=["T1"]).failed, "one image is no exception"


def test_a_cw_that_is_too_short_is_seen(model, data):
    """By the images it misses within the budget, or, where all of them are within it, by larger changes."""
    enough = replace(SUITE, cw=CW(4, 30, 0.03, initial_const=1.0), cw_l2=0.5)
    (line,) = audit(model, data, enough, only=["T16"]).checks
    assert line.verdict == PASS and "a longer CW 0 more" in line.measured, line
    few = CW(1, 5, 0.05, initial_const=0.01)
    (line,) = audit(model, data, replace(enough, cw=few, cw_share=0.0), only=["T16"]).checks
    missed = int(line.measured.split("a longer CW ")[1].split()[0])
    assert line.verdict == FAIL and missed > 1, line
    hopeless = CW(1, 1, 1e-9)  # moves nothing, and no more in two steps
    (line,) = audit(model, data, replace(enough, cw=hopeless), only=["T16"]).checks
    assert line.verdict == FAIL and "median L2 inf, longer inf" in line.measured, line
    coarse = CW(1, 40, 0.05, initial_const=100.0)  # breaks all of them, by more than it takes
    (line,) = audit(model, data, replace(enough, cw=coarse, cw_l2=100.0, cw_share=0.999), only=["T16"]).checks
    assert line.verdict == FAIL and "within L2 100: 16 of 16, a longer CW 0 more" in line.measured, line
    (line,) = audit(model, data, replace(enough, cw=few, cw_images=5), only=["T16"]).checks
    assert " of 5, " in line.measured


def test_a_model_that_is_random_is_named(model, data):
    found = audit(FAKE_DEFENCES["random noise"](model), data, SUITE, only=["T0"])
    assert "answers one image differently each time" in found.table.measured[0]
    assert "the model, not an attack" in found.table.measured[0]
    assert "differently" not in audit(model, data, SUITE, only=["T0"]).table.measured[0]


def test_t0b_sees_a_pipeline_that_corrupts_images(model, phantoms, images):
    learnt = list(range(0, len(phantoms), 3))
    all_learnt = AuditData(images[learnt], phantoms.labels[learnt])
    assert verdict("T0b", model, all_learnt) == PASS
    assert verdict("T0b", model, all_learnt, craft=clamp_normalised) == FAIL


def test_t3_sees_a_pgd_weaker_than_fgsm(model, data):
    def weak(model, images, labels, attack, **options):
        return (nothing if isinstance(attack, PGD) else craft)(model, images, labels, attack, **options)

    suite = replace(SUITE, eps_255=16)
    assert verdict("T3", model, data, suite) == PASS
    assert verdict("T3", model, data, suite, craft=weak) == FAIL


def test_t4_sees_accuracy_rise(model, data):
    def timid(model, images, labels, attack, **options):
        return (nothing if attack.eps_255 > 20 else craft)(model, images, labels, attack, **options)

    assert verdict("T4", model, data) == PASS
    assert verdict("T4", model, data, craft=timid) == FAIL


def test_t6_sees_noise_that_the_attack_is_no_better_than(model, data):
    suite = replace(SUITE, eps_255=64)
    assert verdict("T6", model, data, suite) == PASS
    assert verdict("T6", model, data, suite, craft=nothing) == FAIL


def test_t11_needs_both_a_gap_and_turning_gradients(model, data):
    def weak_fgsm(model, images, labels, attack, **options):
        return (nothing if isinstance(attack, FGSM) else craft)(model, images, labels, attack, **options)

    suite = replace(SUITE, eps_255=8)
    assert verdict("T11", model, data, suite, craft=weak_fgsm) == PASS, "the gradients are aligned"
    assert verdict("T11", shattered(model), data, suite) == PASS, "no gap"

    def hills(x):
        """Moves greys so that the way up turns within the ball: where FGSM overfits, the loss does that."""
        return x - 8 / 255 * (2 * torch.pi * 255 / 8 * x).sin()

    found = audit(_Around(model, before=hills), data, suite, only=["T11"])
    assert found.failed == ("T11",), "at the suite's own limits"


def test_t14_sees_attacks_that_no_file_can_hold(model, data):
    class BetweenLevels(torch.nn.Module):
        """Answers another class wherever an image is not on the grid of 8-bit levels."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            logits, off = self.model(x), ((x * 255 - (x * 255).round()).abs() > 0.2).flatten(1).any(1)
            return torch.where(off[:, None], logits.roll(1, 1), logits)

    tiny = replace(SUITE, eps_255=0.45)
    assert verdict("T14", model, data, tiny) == PASS
    assert verdict("T14", BetweenLevels(), data, tiny) == FAIL


def test_t7_sees_masked_gradients(model, data):
    pytest.importorskip("pyautoattack", reason="optional: pip install '.[audit]'")
    suite = replace(SUITE, eps_255=16)
    assert verdict("T7", model, data, suite) == PASS
    found = audit(saved_file(model), data, suite, only=["T7"])
    assert found.failed == ("T7",)
    blind = replace(SUITE, square_queries=1)  # Square finds nothing: it is AutoAttack that tells
    (line,) = audit(model, data, blind, craft=nothing, only=["T7"]).checks
    assert line.measured.startswith("of what PGD left, Square (1 queries) breaks 0, reduced AutoAttack (")
    assert line.verdict == FAIL
    assert list(found.accuracies.attack[-5:-1]) == [
        f"reduced AutoAttack to {part}" for part in ("apgd-ce", "apgd-dlr", "fab-t", "square")
    ]


def test_without_autoattack_t7_is_not_run_and_says_how_to_get_it(model, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    found = audit(model, data, SUITE, only=["T7"])
    assert list(found.table.verdict) == [NOT_RUN] and found.passed
    assert "pip install '.[audit]'" in found.table.note[0]
    assert "*not run*" in found.to_markdown()


@pytest.mark.parametrize("part", ["apgd-ce", "apgd-dlr", "fab-t", "square"])
def test_autoattack_breaks_three_classes_and_leaves_no_trace(model, data, part):
    pytest.importorskip("pyautoattack", reason="optional: pip install '.[audit]'")
    right = predict(model, data.images).argmax(1) == data.labels
    x, y = data.images[right], data.labels[right]
    state, tracer = torch.get_rng_state(), sys.gettrace()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    options = {"steps": 10, "queries": 100, "seed": 1}
    whole, again = (autoattack(model, x, y, part, eps_255=255, **options) for _ in range(2))
    assert whole.images.any() and torch.equal(whole.images, again.images)
    assert not autoattack(model, x, y, part, eps_255=1e-4, **options).images.any()
    assert torch.equal(state, torch.get_rng_state()) and sys.gettrace() is tracer
    after = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    assert all(p.requires_grad for p in model.parameters())
    assert all(a is b or torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_autoattack_names_its_parts(model, data):
    pytest.importorskip("pyautoattack", reason="optional: pip install '.[audit]'")
    with pytest.raises(ValueError, match="unknown part 'apgd-t'"):
        autoattack(model, data.images, data.labels, "apgd-t", eps_255=1)


def test_transfer_needs_another_model(model, data):
    assert verdict("T8", model, data) == NOT_RUN
    suite = replace(SUITE, eps_255=16)
    assert verdict("T8", saved_file(model), data, suite, others=[model]) == FAIL
    assert verdict("T8", model, data, suite, others=[saved_file(model)]) == PASS


def test_an_interval_needs_groups(model, data):
    assert verdict("T15", model, data) == PASS
    assert verdict("T15", model, AuditData(data.images, data.labels)) == FAIL
    few = AuditData(data.images, data.labels, np.arange(16) // 4)
    (line,) = audit(model, few, SUITE, only=["T15"]).checks
    assert line.verdict == FAIL and line.note == "4 groups" and line.limit == "5 groups"
    single = AuditData(data.images, data.labels, np.arange(16))
    (line,) = audit(model, single, SUITE, only=["T15"]).checks
    assert "16 groups, each of one image" in line.note


def test_a_damaging_attack_damages_neither_the_model_nor_later_checks(model, data):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        found = audit(model, data, SUITE, craft=train_mode, only=["T0", "T3"])
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert found.failed == ("T0",)
    assert "train mode" in found.table.measured[0] and "statistics" in found.table.measured[0]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_no_attack_is_run_twice(model, data):
    calls = []

    def counted(model, images, labels, attack, *, seed=0, batch_size=64):
        calls.append((attack, images.numpy().tobytes(), seed, type(model)))  # 3 and 3.0 are one budget
        return craft(model, images, labels, attack, seed=seed, batch_size=batch_size)

    for own, among in ((3, 3.0), (3.0, 3), (3, 3)):  # the suite's own budget, and the same among T4's
        calls.clear()
        short = {"cw": CW(binary_search_steps=1, steps=2)}
        suite = replace(SUITE, eps_255=own, eps_grid_255=(1, among, 16), **short)
        audit(model, data, suite, craft=counted, only=[id for id in CHECKS if id not in ("T0", "T0b", "T7")])
        assert len(calls) > 8 and len(set(calls)) == len(calls)


def test_the_same_audit_twice_says_the_same(model, data):
    first, again = (audit(model, data, SUITE, only=["T0b", "T2", "T9", "T15"]) for _ in range(2))
    assert first.table.equals(again.table) and first.accuracies.equals(again.accuracies)


def test_of_what_is_random_too(model, data):
    some, first = {"random noise": FAKE_DEFENCES["random noise"]}, None
    for seed in (1, 2):  # of the global generator, which is as it was afterwards
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        attacks = {"no seed": BROKEN_ATTACKS["no seed"]}
        mutants = run_mutants(model, data, FEW_STEPS, images=6, attacks=attacks, defences=some)
        assert torch.equal(torch.get_rng_state(), state)
        assert first is None or mutants.equals(first)
        first = mutants
    disguised = [audit(some["random noise"](model), data, SUITE, only=["T2", "T9", "T0"]) for _ in range(2)]
    assert disguised[0].table.equals(disguised[1].table)


def test_what_is_drawn_in_an_audit_depends_on_its_seed_alone(model, data):
    drawn = []

    def drawing(*arguments, **options):
        drawn[-1].append(torch.rand(()).item())
        return craft(*arguments, **options)

    for of_the_global_generator, seed in ((1, 0), (2, 0), (2, 3)):
        torch.manual_seed(of_the_global_generator)
        drawn.append([])
        audit(model, data, SUITE, craft=drawing, seed=seed, only=["T3"])
    assert drawn[0] and drawn[0] == drawn[1] != drawn[2]


def test_a_false_gradient_changes_the_gradient_alone(model, images):
    x = images[:4].clone().requires_grad_()
    for seed, slopes in ((None, {0.0}), (7, {-1.0, 1.0})):
        false = FalseGradient(model, seed=seed)
        assert torch.equal(false(x), model(x)) and false.arch == model.arch
        (slope,) = torch.autograd.grad(false(x).sum(), x)
        assert set(slope.unique().tolist()) == slopes


def test_dlr_is_scale_free_and_positive_where_misread():
    logits = torch.tensor([[3.0, 1.0, 0.0], [1.0, 3.0, 0.0]])
    labels = torch.tensor([0, 0])
    assert dlr(logits, labels).tolist() == pytest.approx([-2 / 3, 2 / 3])
    assert torch.allclose(dlr(1e4 * logits, labels), dlr(logits, labels))


def test_the_contested_budget_breaks_about_half(model, data):
    eps_255 = contested_budget(model, data, SUITE)
    right = predict(model, data.images).argmax(1) == data.labels
    attack = PGD(eps_255, steps=SUITE.pgd_steps)
    share = craft(model, data.images[right], data.labels[right], attack).success.float().mean()
    assert 0.2 <= share <= 0.8


def test_display_tables(honest, mutants):
    audits = {name: honest.with_check(mutant_check(mutants)) for name in ("normal", "adversarial")}
    accuracies = accuracies_side_by_side(audits)
    assert accuracies.attack.is_unique and len(accuracies) <= 8, "a table that a reader reads"
    parts = honest.accuracies[honest.accuracies.attack.str.contains("AutoAttack to ")]
    shown = accuracies[accuracies.attack.str.contains("AutoAttack")].normal.tolist()
    assert [cell.split("/")[0] for cell in shown] == [str(k) for k in parts.k.tail(1)]
    assert accuracies.attack[0] == "clean" and accuracies.normal.str.match(r"\d+/16 \(\d+ to \d+ %\)").all()
    assert remarks(honest).startswith("No check fails." if honest.passed else f"{len(honest.failed)} of")
    for id in honest.failed:
        assert f"- **{MEANINGS[id].name}** ({id}) fails: " in remarks(honest)


def test_the_figure_shows_every_verdict_and_names_what_is_missed(honest, mutants):
    verdicts = honest.table.assign(model="normal")
    mutants = mutants.copy()
    mutants.loc[mutants.name.eq("no seed"), ["caught", "by"]] = [False, ""]
    fig = audit_matrix(verdicts, mutants)
    left, right = fig.axes
    assert [text.get_text() for text in left.texts] == list(honest.table.verdict)
    assert [label.get_text() for label in left.get_yticklabels()][0] == "contract of the attacks (T0)"
    marks = [label.get_text() for label in right.get_yticklabels()]
    assert "MISSED  no seed" in marks and sum("MISSED" in mark for mark in marks) == 1
    marked = [text.get_text() for text in right.texts]
    assert marked.count("×") == sum(len(by.split(", ")) for by in mutants.by if by)
    assert {"broken attacks", "fake defences"} <= set(marked)


def test_what_was_not_run_looks_unlike_a_pass(honest, mutants):
    verdicts = honest.with_check(mutant_check(None)).table.assign(model="normal")
    left = audit_matrix(verdicts, mutants).axes[0]
    hatched = [patch.get_hatch() for patch in left.patches]
    assert [bool(hatch) for hatch in hatched] == [verdict == NOT_RUN for verdict in verdicts.verdict]


def test_each_check_has_a_name_and_a_meaning(honest, mutants):
    said = checks_in_words()
    table = honest.with_check(mutant_check(mutants)).table
    assert set(table.id) == set(MEANINGS) == {*CHECKS, "T10"}
    for row in table.itertuples():
        line = re.search(rf"^- \*{re.escape(row.check)}\* \({row.id}\): .+\.$", said, re.MULTILINE)
        assert line and row.check == MEANINGS[row.id].name, row.id


def test_an_autoattack_shorter_than_the_standard_is_called_reduced():
    assert Suite().autoattack == "AutoAttack"
    for less in ({"autoattack_steps": 99}, {"square_queries": 4999}):
        assert replace(Suite(), **less).autoattack == "reduced AutoAttack"


def test_the_answer_counts_what_the_tables_say(honest, mutants):
    caught = mutants.assign(caught=mutants.name.ne("no seed"))
    audits = {
        "normal": honest.with_check(mutant_check(caught)),
        "adversarial": honest.with_check(mutant_check(None)),
    }
    said = audit_answer(audits, caught, SUITE).splitlines()
    assert len(said) == 5
    for name, verdicts, counts in zip(audits, said[::2], said[1::2], strict=False):
        found = audits[name].table.verdict.value_counts()
        ran = found.get(PASS, 0) + found.get(FAIL, 0)
        assert verdicts.startswith(f"- **{name.capitalize()} training**: {found[PASS]} of {ran} checks pass.")
        own = honest.accuracies.set_index("attack")
        assert f"{own.k['clean']} of {own.n['clean']} slices are correct when clean" in counts
        assert f"{own.k['PGD, cross-entropy']} remain correct under PGD" in counts
        assert counts.endswith(f"and {own.k['worst case']} under the worst attack for each slice.")
    assert "*mutants are caught*" in said[0].split("Failed: ")[1] and "Not run" not in said[0]
    assert said[2].endswith("Not run: *mutants are caught*.")
    assert f"catches **{len(mutants) - 1}/{len(mutants)}** attacks and defences" in said[4]
    assert "It misses no seed" in said[4]


def test_the_answer_says_what_a_failed_check_means(honest, mutants):
    def said(id):
        table = [replace(c, verdict=FAIL if c.id == id else PASS) for c in honest.checks]
        return audit_answer({"normal": Audit(tuple(table), honest.accuracies)}, mutants, SUITE)

    assert "lower than reported" in said("T7") and "only looks robust" not in said("T7")
    assert "only looks robust" in said("T11") and "lower than reported" not in said("T11")
    assert "is invalid" in said("T0") and "lower than reported" not in said("T0")
    assert "**So" not in said("T15") and "no sign" not in said("T15")
    assert "no sign that the attacks are weak" in said("none fails")


@pytest.mark.parametrize(("broken", "fails"), [("none", False), ("as many", False), ("all", True)])
def test_t9_fails_only_where_another_loss_breaks_more(model, data, monkeypatch, broken, fails):
    """A weaker loss says nothing against the figure, however weak; a stronger one does."""
    from fortify.audit.context import Context

    def ascended(ctx, loss):
        found = {"none": ctx.pgd()[0] & False, "as many": ctx.pgd()[0], "all": ctx.everything()}[broken]
        return found, ctx.images

    monkeypatch.setattr(Context, "ascend", ascended)
    weak = replace(SUITE, eps_255=0.5)
    (check,) = audit(model, data, weak, only=["T9"]).checks
    correct = int(re.search(r"cross-entropy (\d+)", check.measured)[1])
    assert correct > 4, "or there is nothing to break more"
    assert (check.verdict == FAIL) == fails, check
    assert ("DLR breaks" in check.note) == fails


def test_unusable_input_says_what_to_do(model, data, images):
    with pytest.raises(ValueError, match=r"unknown checks \['T12'\]"):
        audit(model, data, SUITE, only=["T12"])
    wrong = AuditData(data.images, (predict(model, data.images).argmax(1) + 1) % 3)
    with pytest.raises(ValueError, match="misclassifies all 16 images"):
        audit(model, wrong, SUITE)
    with pytest.raises(ValueError, match="one label and one group for each image"):
        AuditData(data.images, data.labels[:3])
    for wrong in (data.images[:, 0], (data.images * 255).byte()):
        with pytest.raises(ValueError, match=r"images must be float \(N, C, H, W\) in \[0, 1\]"):
            AuditData(wrong, data.labels)
    for wrong, reach in ((data.images * 255, "these reach 0 to 255"), (data.images.log(), "reach -inf to")):
        with pytest.raises(ValueError, match=rf"images must lie in \[0, 1\]; .*{reach}"):
            AuditData(wrong, data.labels)
    assert torch.equal(AuditData(data.images.numpy(), data.labels.numpy()).images, data.images)


def test_two_classes_have_no_dlr(images, phantoms):
    two = build_model("resnet_small", num_classes=2, seed=0)
    labels = predict(two, images[:8]).argmax(1)
    (line,) = audit(two, AuditData(images[:8], labels), SUITE, only=["T9"]).checks
    assert "DLR" not in line.measured and "margin" in line.measured
    pytest.importorskip("pyautoattack", reason="optional: pip install '.[audit]'")
    (line,) = audit(two, AuditData(images[:8], labels), SUITE, only=["T7"]).checks
    assert "two classes: without DLR" in line.note and line.verdict in (PASS, FAIL)
    with pytest.raises(ValueError, match="DLR loss needs three classes, the model has 2"):
        autoattack(two, images[:8], labels, "apgd-dlr", eps_255=4)
