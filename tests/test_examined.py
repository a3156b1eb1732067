"""The published protocol, re-expressed: it does what the authors' notebook does, faults included."""

import copy
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fortify.examined import matrix as matrix_of
from fortify.examined import protocol as published
from fortify.examined.answer import protocol_answer
from fortify.examined.figures import Panel, matrix_dots, protocol_strip, tone_curves
from fortify.examined.protocol import (
    TONE_CURVES,
    PublishedAttacks,
    PublishedRecipe,
    fit_published,
    score_published,
)
from fortify.models import build_model
from fortify.scoring import evaluate

FEW = PublishedAttacks(cw_steps=12)
NAMES = ("benign", "malignant", "normal")


@pytest.fixture(scope="module")
def batch(model, images, labels):
    """24 normalised images, their labels and the trained model."""
    model.eval()
    return model, model[0](images[:24]), labels[:24]


def test_the_published_pgd_is_one_step_and_a_clamp(batch):
    model, z, y = batch
    changed = published.published_fgsm(model, z, y, 2 / 255)
    step = changed - published.clamp(z)
    assert step.abs().max() <= 2 / 255 + 1e-6, "one step, whatever the 40 iterations say"
    outside = (z < -2 / 255) | (z > 1 + 2 / 255)
    assert torch.equal(changed[outside], published.clamp(z)[outside]), "there the gradient changes nothing"
    assert outside.float().mean() > 0.5, "most intensities lie outside the clamp's range"
    inside = (z > 0.1) & (z < 0.9)
    assert step[inside].abs().min() > 0 and step[inside].abs() == pytest.approx(2 / 255, abs=1e-6)


def test_the_step_climbs_the_loss(batch):
    model, z, y = batch
    middle = z * 0.1 + 0.5  # intensities that the clamp leaves alone
    assert middle.min() > 0 and middle.max() < 1
    up = published.published_fgsm(model, middle, y, 0.003)
    before, after = (nn.functional.cross_entropy(model[1:](x), y) for x in (middle, up))
    assert after > before


def test_without_steps_the_attacks_are_the_tone_curves(batch):
    model, z, y = batch
    made = published.published_images(model, z, y, TONE_CURVES)
    assert torch.equal(made["published_pgd"], z.clamp(0, 1))
    assert torch.equal(made["published_fgsm"], z.clamp(0, 1))
    assert torch.equal(made["published_cw"], torch.tanh(z))


def test_the_published_cw_is_stuck_where_a_class_leads_clearly(batch):
    """In full, without the short cut: where the true class leads by more than 1, or another by more than
    kappa, there is no gradient, and the image stays tanh(z), bit for bit."""
    model, z, y = batch
    y = torch.where(torch.arange(len(y)) < 12, y, (y + 1) % 3)  # the second half is misread
    with torch.no_grad():
        logits = model[1:](torch.tanh(z))
    lead = logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -torch.inf).amax(1)
    attacks = PublishedAttacks(cw_steps=12, cw_kappa=float(-lead[12:].sort().values[5:7].mean()))
    stuck = (lead > 1) | (lead < -attacks.cw_kappa)
    kinds = (lead > 1).sum(), (lead < -attacks.cw_kappa).sum(), (~stuck).sum()
    assert min(kinds) > 0, "the test needs all three kinds"
    assert torch.equal(published.cw_moves(model, z, y, attacks, batch_size=5), ~stuck)
    whole = torch.tanh(z + published._cw_delta(model[1:], z, y, attacks))
    assert torch.equal(whole[stuck], torch.tanh(z)[stuck])
    moved = (whole != torch.tanh(z)).flatten(1).any(1)
    assert moved[~stuck].all()


def test_leaving_stuck_images_out_changes_no_bit_of_them_and_nothing_else_to_speak_of(batch):
    model, z, y = batch
    whole = torch.tanh(z + published._cw_delta(model[1:], z, y, FEW))
    short = published.published_cw(model, z, y, FEW)
    moved = (short != torch.tanh(z)).flatten(1).any(1)
    assert torch.equal(whole[~moved], short[~moved])
    assert (
        whole - short
    ).abs().max() < 1e-2  # another batch size rounds convolutions differently; Adam's sign
    assert ((whole - short).abs() > 1e-4).float().mean() < 0.02


def test_a_zero_step_cw_in_train_mode_needs_no_forward(batch):
    model, z, y = batch
    net = copy.deepcopy(model).train()
    assert torch.equal(published.published_cw(net, z, y, TONE_CURVES), torch.tanh(z))


@pytest.fixture(scope="module")
def parts(phantoms):
    return phantoms.subset(range(0, 120, 2)), phantoms.subset(range(1, 120, 4))


def test_batchnorm_is_frozen_from_the_second_epoch(parts):
    after = {}
    for epochs in (1, 3):
        model = build_model("resnet_small", num_classes=3, seed=0)
        fit_published(model, *parts, PublishedRecipe(epochs=epochs), attacks=TONE_CURVES, progress=False)
        after[epochs] = {k: v.clone() for k, v in model.state_dict().items()}
    running = [k for k in after[1] if "running" in k]
    assert running and all(torch.equal(after[1][k], after[3][k]) for k in running)
    weights = [k for k in after[1] if k.endswith("fc.weight")]
    assert weights and not any(torch.equal(after[1][k], after[3][k]) for k in weights)
    fresh = build_model("resnet_small", num_classes=3, seed=0).state_dict()
    assert not any(torch.equal(fresh[k], after[1][k]) for k in running), "the first epoch did train them"


def test_dropout_is_drawn_from_the_seed(parts):
    found, state = [], torch.get_rng_state()
    for other in (1, 2):
        net = build_model("resnet_small", num_classes=3, seed=0)
        net[1].fc = torch.nn.Sequential(torch.nn.Dropout(0.5), net[1].fc)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(other)
            before = torch.get_rng_state()
            fit_published(net, *parts, PublishedRecipe(epochs=1), attacks=TONE_CURVES, progress=False)
            assert torch.equal(torch.get_rng_state(), before)
        found.append(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_the_last_epoch_is_kept_and_an_interrupted_training_goes_on(parts, tmp_path):
    attacks = PublishedAttacks(cw_steps=1)

    def train(epochs, folder):
        model = build_model("resnet_small", num_classes=3, seed=0)
        recipe = PublishedRecipe(epochs=epochs)
        history = fit_published(model, *parts, recipe, attacks=attacks, checkpoints=folder, progress=False)
        return model, history

    model, history = train(3, tmp_path / "whole")
    assert history.selected.tolist() == [False, False, True] and not model.training
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    file = next((tmp_path / "whole").glob("*.safetensors"))
    broken = tmp_path / "broken" / file.name
    stopped = published.TrainingState.save
    try:
        published.TrainingState.save = lambda self, f: (stopped(self, f), _stop_after(self, 2))
        with pytest.raises(KeyboardInterrupt):
            train(3, broken.parent)
    finally:
        published.TrainingState.save = stopped
    again, _ = train(3, broken.parent)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def _stop_after(state, epoch):
    if state.epoch == epoch:
        raise KeyboardInterrupt


@pytest.mark.parametrize("wrong", [dict(epochs=0), dict(batch_size=1)])
def test_an_impossible_recipe_is_refused(wrong):
    with pytest.raises(ValueError, match="epochs >= 1 and batch_size >= 2"):
        PublishedRecipe(**wrong)


@pytest.fixture(scope="module")
def rows(model, images, labels):
    index = np.arange(0, 60)
    ids = {"index": index, "split": "random", "seed": 0}
    protocol = score_published(
        model, images[index], labels[index], model_name="normal", attacks=FEW, batch_size=17, **ids
    )
    from fortify.attacks import attacks_over

    attacks = attacks_over([1, 4], pgd={"steps": 2}, cw={"binary_search_steps": 1, "steps": 3})
    correct, _ = evaluate(model, images[index], labels[index], attacks, model_name="normal", **ids)
    return protocol, correct


def test_rows_say_what_the_model_says_of_the_changed_tensor(model, images, labels, rows):
    protocol, _ = rows
    assert protocol.attack.unique().tolist() == ["clamp", "tanh", *published.PUBLISHED]
    assert (protocol.groupby("attack").size() == 60).all()
    own = protocol[protocol.attack == "clamp"]
    z = model[0](images[:60])
    with torch.no_grad():
        prediction = model[1:](z.clamp(0, 1)).argmax(1)
    assert own["index"].tolist() == list(range(60)) and own.prediction.tolist() == prediction.tolist()
    assert (own.success == (own.prediction != own.label)).all()
    # Black (-2.118 in the red channel) is raised to 0, the channel's mean: 0.485 of 255.
    black = (images[:60].flatten(1).amin(1) == 0).numpy()
    assert black.any() and own.linf_255[black].min() >= 0.485 * 255 - 0.01
    assert (own.l2 > 1).all()


def test_scoring_works_inside_no_grad_and_leaves_the_mode(model, images, labels, rows):
    ids = {"index": np.arange(60), "split": "random", "seed": 0, "model_name": "normal"}
    model.train()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again = score_published(model, images[:60], labels[:60], attacks=FEW, batch_size=17, **ids)
        pd.testing.assert_frame_equal(again, rows[0])
    assert model.training
    model.eval()


def test_matrix_has_every_evaluation_once_and_counts_the_rows(rows):
    protocol, correct = rows
    table = matrix_of.matrix(protocol, correct, class_names=NAMES, budgets_255=[1, 4], cw_l2=0.5)
    names = ["clean", "clamp alone", "tanh alone", "published PGD", "published FGSM", "published CW"]
    names += ["published combined", "FGSM 1/255", "FGSM 4/255", "PGD 1/255", "PGD 4/255"]
    names += ["CW L2 0.25", "CW L2 0.5", "CW L2 1"]
    assert table.sort_values("order").evaluation.tolist() == names
    cells = table.set_index("evaluation")
    clamp = protocol[protocol.attack == "clamp"]
    assert cells.loc["clamp alone", ["k", "n"]].tolist() == [(~clamp.success).sum(), 60]
    three = protocol[protocol.attack.isin(published.PUBLISHED)]
    assert cells.loc["published combined", ["k", "n"]].tolist() == [(~three.success).sum(), 180]
    pgd = correct[(correct.attack == "pgd") & (correct.eps_255 == 4)]
    assert cells.loc["PGD 4/255", "k"] == (~pgd.success).sum()
    cw = correct[correct.attack == "cw"].set_index("index")
    clean = correct[correct.attack == "clean"].set_index("index")
    stands = (~cw.success & ~clean.success) | (cw.success & (cw.l2 > 1) & ~clean.success)
    assert cells.loc["CW L2 1", "k"] == stands.sum()


def test_the_answer_states_the_counts_of_the_matrix(rows):
    protocol, correct = rows
    every = ("normal", "published", "tone curves", "adversarial")

    def of(rows, model, wrong):
        """The rows as another model's, which misreads the first ``wrong`` images under every attack."""
        first = rows["index"] < wrong
        prediction = (rows.label + first) % 3
        return rows.assign(model=model, prediction=prediction, success=first)

    protocol = pd.concat([of(protocol, m, 3 * i + 2) for i, m in enumerate(every)])
    correct = correct[correct.attack.ne("cw")]
    correct = pd.concat([of(correct, m, 5 * i + 1) for i, m in enumerate(every)])
    moved = protocol.attack.eq("published_cw") & protocol.model.eq("published")
    protocol.loc[moved, "l2"] += 1
    table = matrix_of.matrix(protocol, correct, class_names=NAMES, budgets_255=[1, 4], cw_l2=0.5)
    said = protocol_answer(protocol, table, eps_255=4, class_names=NAMES)
    bullets, rows_of = said.split("\n\n")
    assert bullets.count("(59 of 60)") == 1, "clean"
    assert bullets.count("(58 of 60)") == 2, "after the clamp, and after the published PGD"
    measures = matrix_of.attack_measures(protocol).set_index(["measure", "model"])
    stuck, every_stuck = (measures.loc[("CW equal to tanh", m)] for m in ("normal", "all"))
    assert (stuck.n, every_stuck.n) == (60, 240) and every_stuck.k == 3 * stuck.k > 0
    assert f"on {stuck.k:.0f} of the 60 test slices" in bullets
    of_180 = [3 * (60 - (3 * i + 2)) for i in range(4)]  # normal, published, tone curves, adversarial
    assert re.findall(r"\((\d+) of 180\)", rows_of) == [str(k) for k in of_180]
    assert re.findall(r"\((\d+) of 60\)", rows_of) == [str(60 - (5 * i + 1)) for i in range(4)]
    assert "**" not in said, "nothing is concluded where all trainings do alike"
    matrix_dots(table)


def test_a_last_image_alone_joins_the_batch_before(phantoms):
    sizes = [len(part) for part in published._batches(torch.arange(33), 16)]
    assert sizes == [16, 17] and [len(p) for p in published._batches(torch.arange(34), 16)] == [16, 16, 2]
    assert torch.equal(torch.cat(published._batches(torch.arange(33), 16)), torch.arange(33))
    # At 32 px the last stage is one pixel: BatchNorm refuses to be trained on an image alone.
    net, some = build_model("resnet_small", num_classes=3, seed=0), phantoms.subset(range(17))
    history = fit_published(net, some, some, PublishedRecipe(1, 16), attacks=FEW, progress=False)
    assert np.isfinite(history.train_loss).all()


def test_panels_show_what_the_model_is_given(model, images, labels):
    shown = published.panels(model, images[:1], int(labels[0]), attacks=FEW, correct=images[:1])
    assert list(shown) == ["original", "clamp alone", "tanh alone", "published PGD", "correct PGD"]
    intensities, prediction, probability = shown["original"]
    assert intensities.shape == (32, 32, 3) and intensities[..., 0] == pytest.approx(
        images[0, 0].numpy(), abs=1e-6
    )
    assert prediction == shown["correct PGD"][1] and 1 / 3 <= probability <= 1
    low = shown["clamp alone"][0].reshape(-1, 3).min(0)
    assert low == pytest.approx([0.485, 0.456, 0.406], abs=1e-6), "no grey below the channel's mean is left"
    panels = [Panel(name, *seen, 10 + i, 60) for i, (name, seen) in enumerate(shown.items())]
    fig = protocol_strip(panels, label=int(labels[0]), class_names=NAMES)
    texts = [text.get_text() for ax in fig.axes for text in (ax.title, ax.xaxis.label)]
    assert "clamp alone" in texts and any("11 of 60 correct" in text for text in texts)


def test_a_change_too_small_to_see_is_magnified_and_says_so():
    image = np.full((8, 8, 3), 0.5)
    shown = {"original": 0, "small": 2 / 255, "large": 60 / 255}
    panels = [Panel(name, image + change, 0, 0.9, 1, 2) for name, change in shown.items()]
    axes = np.array(protocol_strip(panels, label=0, class_names=NAMES).axes[:6]).reshape(2, 3)
    drawn = [ax.images[0].get_array().max() for ax in axes[1]]
    assert drawn == pytest.approx([0, 64 * 2, 60])
    assert [[t.get_text() for t in ax.texts] for ax in axes[1]] == [[], ["×64"], []]
    assert axes[1, 1].get_xlabel().startswith("at most 2.0 levels")


def test_the_tone_curves_are_the_functions_that_the_published_code_applies(model, images):
    curves = published.curve_values(model)
    z = model[0](torch.tensor([0.0, 128 / 255, 1.0]).view(1, 1, 1, 3))
    for name, function in (("unchanged", lambda z: z), ("clamp", published.clamp), ("tanh", torch.tanh)):
        expected = 255 * published.to_intensities(model, function(z)).mean(1).flatten()
        assert curves[name][[0, 128, 255]] == pytest.approx(expected.numpy(), abs=1e-3)
        assert (np.diff(curves[name]) >= -1e-4).all()
    assert curves["unchanged"] == pytest.approx(np.arange(256), abs=1e-3)
    pixels = (images[:3] * 255).round().byte().numpy()
    above, below = tone_curves(curves, pixels).axes
    assert [line.get_label() for line in above.lines] == list(curves)
    assert sum(bar.get_height() for bar in below.patches) == pytest.approx(100)


def test_the_answer_concludes_only_what_the_numbers_bear_out(rows):
    protocol, correct = rows
    correct = correct[correct.attack.ne("cw")]
    every = ("normal", "published", "tone curves", "adversarial")
    broken = {m: {"published": 60 * (m == "normal"), "correct": 60 * (m != "adversarial")} for m in every}

    def of(rows, model, kind):
        first = (rows["index"] < broken[model][kind]) & rows.attack.ne("clean")
        return rows.assign(model=model, prediction=(rows.label + first) % 3, success=first)

    protocol = pd.concat([of(protocol, m, "published") for m in every])
    correct = pd.concat([of(correct, m, "correct") for m in every])
    table = matrix_of.matrix(protocol, correct, class_names=NAMES, budgets_255=[1, 4], cw_l2=0.5)
    said = protocol_answer(protocol, table, eps_255=4, class_names=NAMES)
    assert "The clamp, not the attack" in said and "Two tone curves" in said and "Withstanding" in said


def test_a_reader_gets_at_most_eight_lines_of_the_matrix(rows):
    for budgets in ([1, 4], [4]):
        table = matrix_of.matrix(*rows, class_names=NAMES, budgets_255=budgets, cw_l2=0.5)
        names = matrix_of.main_rows(table).sort_values("order").evaluation.tolist()
        assert len(names) <= 8 and len(set(names)) == len(names)
        assert names[:4] == ["clean", "clamp alone", "tanh alone", "published combined"]
        assert {f"PGD {budgets[0]}/255", f"PGD {budgets[-1]}/255", "CW L2 0.5"} <= set(names)


def test_a_step_of_the_published_epsilon_is_under_two_grey_levels(model, images):
    z = model[0](images[:1])
    step = published.to_intensities(model, z + 0.03) - published.to_intensities(model, z)
    assert 1.5 < 255 * step.max() < 2, "as notebook 06 says"
