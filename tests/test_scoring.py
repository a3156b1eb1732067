"""From a model to rows: what is crafted is scored, and the rows say what the model said."""

import numpy as np
import pandas as pd
import pytest
import torch

from fortify import attacks, scoring
from fortify.attacks import CW, FGSM, PGD, craft
from fortify.evaluation import COLUMNS, at_budget, check_rows
from fortify.figures import example_of, failures_of, pick_example, pick_failures
from fortify.files import write_arrays, write_csv
from fortify.fused import FusedModel
from fortify.models import build_model, predict
from fortify.runs import Run
from fortify.scoring import evaluate, score, score_static

IDS = {"model_name": "normal", "split": "random", "seed": 0}
ATTACKS = [FGSM(4), PGD(4, steps=3), CW(binary_search_steps=2, steps=15, stepsize=0.05)]


@pytest.fixture(scope="module")
def part(phantoms):
    """Every third position from 5 on: all classes, and a row's index is not its place in the table."""
    return np.arange(5, 90, 3)


@pytest.fixture(scope="module")
def evaluated(model, images, labels, part):
    keep = {"pgd": ATTACKS[1], "cw": ATTACKS[2]}
    return evaluate(model, images[part], labels[part], ATTACKS, index=part, keep=keep, **IDS)


def test_rows_are_complete_and_say_what_the_model_says(model, images, labels, part, evaluated):
    rows, kept = evaluated
    check_rows(rows)
    assert tuple(rows.columns) == COLUMNS and rows.index.tolist() == list(range(4 * len(part)))
    assert (rows.model == "normal").all() and (rows.split == "random").all() and (rows.seed == 0).all()
    assert rows.attack.unique().tolist() == ["clean", "fgsm", "pgd", "cw"]
    for name, adversarial in (("clean", images[part]), *((n, torch.from_numpy(x)) for n, x in kept.items())):
        own = rows[rows.attack == name]
        probability, prediction = predict(model, adversarial).max(1)
        assert own["index"].tolist() == part.tolist()
        assert own.label.tolist() == labels[part].tolist()
        assert own.prediction.tolist() == prediction.tolist()
        assert own.probability.to_numpy() == pytest.approx(probability.numpy())
        assert own.l2.to_numpy() == pytest.approx((adversarial - images[part]).flatten(1).norm(dim=1).numpy())


BUDGETS = (1, 2, 4, 8, 16, 32)


def coarse(eps_255):
    """A PGD that oversteps: crafted anew, its largest budgets break fewer images than those before."""
    return PGD(eps_255, steps=2, rel_stepsize=2.0)


@pytest.fixture(scope="module")
def mislabelled(labels):
    """Labels of which every fifth is another class: images that the model misclassifies when clean."""
    return torch.where(torch.arange(len(labels)) % 5 == 0, (labels + 1) % 3, labels)


@pytest.fixture(scope="module")
def over_budgets(model, images, mislabelled):
    """(attacks, rows, the same attacks each on every image)."""
    labels = mislabelled
    grid = [attack for eps in reversed(BUDGETS) for attack in (coarse(eps), FGSM(eps))]
    grid += [CW(binary_search_steps=2, steps=15, stepsize=0.05)]
    rows, _ = evaluate(model, images, labels, grid, **IDS)
    return grid, rows, {attack: craft(model, images, labels, attack) for attack in grid}


def of_attack(rows, attack):
    return rows[rows.attack.eq(attack.name) & rows.eps_255.eq(getattr(attack, "eps_255", np.nan))]


def test_an_image_is_correct_under_no_attack_that_breaks_it_in_the_full_evaluation(over_budgets):
    """Equal or lower accuracy at every budget, image by image, and nothing else is lost."""
    grid, rows, full = over_budgets
    check_rows(rows)
    lost, more = rows[rows.attack.eq("clean")].success.to_numpy(), 0
    assert 10 < lost.sum() < 110
    for attack in sorted((a for a in grid if not a.minimum_norm), key=lambda a: a.eps_255):
        own, every = of_attack(rows, attack), full[attack].success.numpy()
        assert own["index"].tolist() == list(range(len(every)))
        assert own.success[every].all(), attack
        smaller = [full[a].success.numpy() for a in grid if a.name == "pgd" and a.eps_255 < attack.eps_255]
        before = np.any([lost, *smaller] if attack.name == "pgd" else [lost], axis=0)
        assert np.array_equal(own.success, before | every), attack
        more += (own.success & ~every).sum()
    assert more, "where the full evaluation loses nothing again, this test says little"
    cw = rows[rows.attack.eq("cw")]
    assert np.array_equal(cw.success, lost | full[grid[-1]].success.numpy())


def test_accuracy_under_pgd_never_rises_with_the_budget(over_budgets):
    grid, rows, _ = over_budgets
    broken = [set(of_attack(rows, coarse(eps)).query("success")["index"]) for eps in BUDGETS]
    assert all(less <= more for less, more in zip(broken, broken[1:], strict=False))
    assert len(broken[0]) < len(broken[-1])


def test_what_was_lost_already_is_not_attacked(model, images, mislabelled, over_budgets):
    """The clean image of the misclassified, and from the budget that broke it on the same image."""
    grid, rows, full = over_budgets
    clean = rows[rows.attack.eq("clean")].reset_index(drop=True)
    lost = clean.success
    for attack in grid:
        own = of_attack(rows, attack) if not attack.minimum_norm else rows[rows.attack.eq("cw")]
        own = own.reset_index(drop=True)
        assert own.l2[lost].eq(0).all() and own.prediction[lost].equals(clean.prediction[lost])
        assert own.probability[lost].equals(clean.probability[lost])
    first = of_attack(rows, coarse(2)).reset_index(drop=True)
    broken = first.success & ~lost
    assert broken.any() and first.linf_255[broken].max() <= 2.001
    later = of_attack(rows, coarse(16)).reset_index(drop=True)
    same = ["prediction", "probability", "linf_255", "l2"]
    pd.testing.assert_frame_equal(first.loc[broken, same], later.loc[broken, same])


def test_what_is_kept_is_crafted_on_every_image_and_stays_broken(model, images, mislabelled, over_budgets):
    grid, without, full = over_budgets
    keep = {a.name: a for a in grid if a.minimum_norm or a.eps_255 == 32}
    rows, kept = evaluate(model, images, mislabelled, grid, keep=keep, **IDS)
    assert rows.success.equals(without.success)
    lost = rows[rows.attack.eq("clean")].success.to_numpy()
    assert np.array_equal(kept["fgsm"], full[FGSM(32)].images.numpy())
    assert np.array_equal(kept["cw"][lost], images.numpy()[lost]), "its smallest change is none"
    own, every = of_attack(rows, coarse(32)), full[coarse(32)].success.numpy()
    change = np.abs(kept["pgd"] - images.numpy()).max((1, 2, 3)) * 255
    assert np.allclose(change[every | lost], 32, atol=1e-3), "of its own budget, the misclassified too"
    stays = own.success.to_numpy() & ~every & ~lost
    assert stays.any() and change[stays].max() <= 16.001
    seen = predict(model, torch.from_numpy(kept["pgd"])).argmax(1).numpy()
    assert np.array_equal(seen[~lost], own.prediction[~lost])


def test_attacks_of_other_settings_break_nothing_for_each_other(model, images, labels):
    """A weak PGD after a strong one: only budgets of one attack are nested."""
    strong, weak = PGD(2, steps=10), PGD(8, steps=1, rel_stepsize=0.0, random_start=False)
    rows, _ = evaluate(model, images, labels, [strong, weak], **IDS)
    lost = rows[rows.attack.eq("clean")].success.to_numpy()
    assert np.array_equal(of_attack(rows, weak).success, lost), "it changes nothing"
    assert of_attack(rows, strong).success.sum() > lost.sum()


def test_images_that_are_kept_are_not_of_an_attack_that_stops_early(model, images, labels):
    early = PGD(4, steps=2, stop_early=True)
    with pytest.raises(ValueError, match=r"stop_early is no option for \['shown'\]"):
        evaluate(model, images, labels, [early], keep={"shown": early}, **IDS)


def test_a_model_that_is_always_wrong_is_attacked_by_nothing(model, images, labels, monkeypatch):
    wrong = (predict(model, images).argmax(1) + 1) % 3
    monkeypatch.setattr(scoring, "craft", None)
    rows, kept = evaluate(model, images, wrong, [ATTACKS[1], ATTACKS[2]], keep={"cw": ATTACKS[2]}, **IDS)
    assert rows.success.all() and rows.l2.eq(0).all()
    assert np.array_equal(kept["cw"], images.numpy()) and not np.shares_memory(kept["cw"], images.numpy())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_works_where_gradients_are_off(model, images, labels, part, evaluated, context):
    with context():
        rows, _ = evaluate(model, images[part], labels[part], ATTACKS, index=part, **IDS)
    pd.testing.assert_frame_equal(rows, evaluated[0])


def test_budgets_are_grey_levels_and_cw_has_none(evaluated):
    rows, _ = evaluated
    assert (rows[rows.attack == "clean"].eps_255 == 0).all()
    assert (rows[rows.attack == "pgd"].eps_255 == 4).all()
    assert rows[rows.attack == "cw"].eps_255.isna().all()
    linf = rows[rows.attack.isin(("fgsm", "pgd"))].linf_255
    assert linf.max() == pytest.approx(4, abs=1e-3)


def test_only_what_is_kept_is_returned(images, part, evaluated):
    _, kept = evaluated
    assert kept.keys() == {"pgd", "cw"}
    assert kept["pgd"].shape == images[part].shape and kept["pgd"].dtype == np.float32


def test_static_rows_are_another_model_on_the_same_images(model, images, labels, part):
    crafted_rows, crafted = evaluate(
        model,
        images[part],
        labels[part],
        ATTACKS,
        index=part,
        keep=dict(zip(("fgsm", "pgd", "cw"), ATTACKS, strict=True)),
        **IDS,
    )
    other = build_model("resnet_small", num_classes=3, seed=9).eval()
    ids = IDS | {"model_name": "adversarial"}
    rows = score_static(other, images[part], labels[part], crafted, index=part, eps_255=4, **ids)
    assert set(rows.protocol) == {"static"} and set(rows.attack) == {"fgsm", "pgd", "cw"}
    assert rows.index.tolist() == list(range(3 * len(part)))
    budgets = {name: set(own.eps_255) for name, own in rows.groupby("attack") if name != "cw"}
    assert budgets == {"fgsm": {4}, "pgd": {4}} and rows[rows.attack == "cw"].eps_255.isna().all()
    pgd = rows[rows.attack == "pgd"]
    assert pgd.prediction.tolist() == predict(other, torch.from_numpy(crafted["pgd"])).argmax(1).tolist()
    assert pgd.l2.tolist() == pytest.approx(crafted_rows[crafted_rows.attack == "pgd"].l2.tolist())


def test_static_images_of_another_set_are_refused(model, images, labels, part):
    crafted = {name: images[:5].numpy() for name in ("fgsm", "pgd", "cw")}
    with pytest.raises(ValueError, match="run notebook 03 again"):
        score_static(model, images[part], labels[part], crafted, index=part, eps_255=4, **IDS)


def test_an_attack_without_budget_or_without_static_images_is_named(model, images, labels, part):
    with pytest.raises(ValueError, match="eps_255=0 is no attack"):
        evaluate(model, images[part], labels[part], [FGSM(0)], index=part, **IDS)
    crafted = {"pgd": images[part].numpy()}
    with pytest.raises(ValueError, match="no static fgsm images: notebook 03 must keep them"):
        score_static(model, images[part], labels[part], crafted, index=part, eps_255=0, **IDS)


def test_static_images_of_another_budget_are_refused(model, images, labels, part):
    x, y = images[part].clamp(0.1, 0.9), labels[part]
    crafted = {name: (x + 4 / 255).numpy() for name in ("fgsm", "pgd", "cw")}
    score_static(model, x, y, crafted, index=part, eps_255=4, **IDS)
    with pytest.raises(
        ValueError, match=r"static pgd .* up to 4 grey levels, not eps_255=4\.5: run notebook 03"
    ):
        score_static(model, x, y, crafted, index=part, eps_255=4.5, **IDS)
    wide = {"fgsm": crafted["fgsm"], "pgd": crafted["pgd"], "cw": (x + 20 / 255).numpy()}
    score_static(model, x, y, wide, index=part, eps_255=4, **IDS)  # CW has no budget


def test_crafting_is_by_the_seed_and_the_batch_that_are_given(model, images, mislabelled, part, monkeypatch):
    asked, attack = [], PGD(4, steps=2)

    def asked_for(*arguments, **options):
        asked.append(options)
        return craft(*arguments, **options)

    monkeypatch.setattr(scoring, "craft", asked_for)
    ids, labels = IDS | {"seed": 3}, mislabelled
    keep = {"found": attack}
    _, kept = evaluate(model, images[part], labels[part], [attack], index=part, keep=keep, **ids)
    evaluate(model, images[part], labels[part], [attack], index=part, batch_size=7, **ids)
    nets = [options.pop("fused") for options in asked]
    assert nets[0] is not nets[1] and model not in nets
    attacked = [options.pop("subset").tolist() for options in asked]
    assert attacked[0] == list(range(len(part))), "what is kept is crafted on every image"
    clean = predict(model, images[part]).argmax(1) == labels[part]
    assert attacked[1] == clean.nonzero().squeeze(1).tolist() != attacked[0]
    assert asked == [{"seed": 3, "batch_size": size, "progress": True} for size in (64, 7)]
    assert np.array_equal(
        kept["found"], craft(model, images[part], labels[part], attack, seed=3).images.numpy()
    )


def test_all_attacks_of_an_evaluation_follow_one_fused_model(model, images, labels, part, monkeypatch):
    made, asked = [], []
    monkeypatch.setattr(attacks, "FusedModel", lambda *a, **o: made.append(FusedModel(*a, **o)) or made[-1])
    monkeypatch.setattr(scoring, "craft", lambda *a, **o: asked.append(o["fused"]) or craft(*a, **o))
    rows, _ = evaluate(model, images[part], labels[part], ATTACKS, index=part, **IDS)
    assert len(made) == 1 and all(fused is made[0].net for fused in asked) and len(asked) == len(ATTACKS)
    monkeypatch.undo()
    for attack in ATTACKS:
        alone = craft(model, images[part], labels[part], attack)
        assert np.array_equal(rows.success[rows.attack == attack.name], alone.success)


def test_rows_are_the_predictions_of_the_crafting_and_nothing_is_predicted_twice(
    model, images, labels, part, monkeypatch
):
    """One pass of the model over each attacked image, whose prediction the row holds."""
    asked = []
    hook = model.register_forward_hook(lambda module, *_: asked.append(module is model))
    rows, _ = evaluate(model, images[part], labels[part], ATTACKS[:2], index=part, **IDS)
    hook.remove()
    assert asked.count(True) == 1 + 1 + 2, "a look at the model, the clean images, each attack's images once"
    for attack in ATTACKS[:2]:
        own, found = rows[rows.attack == attack.name], craft(model, images[part], labels[part], attack)
        assert own.prediction.tolist() == found.predictions.tolist()
        assert own.probability.tolist() == found.probabilities.tolist()


def test_a_failed_cw_is_the_clean_image_with_its_prediction_whatever_the_batch(model, images, labels, part):
    few = CW(binary_search_steps=1, steps=3, stepsize=0.02, initial_const=0.1)
    for size in (64, 7):
        rows, kept = evaluate(model, images, labels, [few], keep={"cw": few}, batch_size=size, **IDS)
        check_rows(rows)
        own = rows[rows.attack == "cw"].reset_index(drop=True)
        clean = rows[rows.attack == "clean"].reset_index(drop=True)
        failed = ~own.success
        assert 10 < failed.sum() < 110 and (own.l2[failed] == 0).all()
        assert np.array_equal(kept["cw"][failed], images.numpy()[failed])
        assert own.probability[failed].equals(clean.probability[failed])


def test_an_index_of_another_length_is_named(model, images, labels):
    with pytest.raises(ValueError, match="^3 indices for 4 images$"):
        score(model, images[:4], labels[:4], index=[0, 1, 2], attack="clean", eps_255=0, **IDS)


def test_a_budget_of_nothing_leaves_cw_at_the_clean_prediction(evaluated):
    rows, _ = evaluated
    none, all_ = at_budget(rows, eps_255=4, cw_l2=0), at_budget(rows, eps_255=4, cw_l2=np.inf)
    clean = none[none.attack == "clean"].prediction.tolist()
    found = rows[rows.attack == "cw"]
    stays = np.where(found.l2 > 0, clean, found.prediction)
    assert none[none.attack == "cw"].prediction.tolist() == stays.tolist()
    assert all_[all_.attack == "cw"].prediction.tolist() == found.prediction.tolist()


def test_the_example_shown_is_a_typical_one(model, phantoms, images, labels, part, evaluated):
    rows, kept = evaluated
    label = int(np.bincount(labels[part]).argmax())
    right = (predict(model, images[part]).argmax(1) == labels[part]) & (labels[part] == label)
    after = predict(model, torch.from_numpy(kept["pgd"])).argmax(1)
    broken = (after != label)[right]
    typical = right & ((after != label) == bool(broken.float().mean() >= 0.5))
    position = int(typical.nonzero()[0])
    shown = pick_example(rows, phantoms, label=label, attack="pgd", eps_255=4, attacked=kept["pgd"])
    assert np.array_equal(shown.clean, phantoms.images[part[position]] / 255)
    assert np.array_equal(shown.attacked, kept["pgd"][position, 0])
    assert shown.prediction == after[position]
    assert shown.clean_prediction == shown.label == label
    plain = pick_example(rows, phantoms, label=label)
    assert plain.attacked is None
    assert np.array_equal(plain.clean, phantoms.images[part[int(right.nonzero()[0])]] / 255)


@pytest.mark.parametrize("outcomes", [(1, 1, 0), (0, 1, 0), (0, 0, 1), (0, 1), (1,), (0,)])
def test_what_happens_to_most_happens_to_the_example(phantoms, evaluated, outcomes):
    """Rows by hand: on which of the images read rightly, in their order, the attack succeeds."""
    rows = evaluated[0]
    own = rows[rows.attack.eq("clean") & rows.label.eq(0)].head(1)
    index = np.arange(len(outcomes))
    clean = own.loc[own.index.repeat(len(outcomes))].assign(index=index, prediction=0, success=False)
    pgd = clean.assign(attack="pgd", eps_255=4.0, success=np.bool_(outcomes), prediction=outcomes, l2=1.0)
    images = np.zeros((len(outcomes), 1, 2, 2)) + index.reshape(-1, 1, 1, 1)
    table = pd.concat([clean, pgd], ignore_index=True)
    shown = pick_example(table, phantoms, label=0, attack="pgd", eps_255=4, attacked=images)
    most = int(2 * sum(outcomes) >= len(outcomes))
    assert shown.attacked[0, 0] == outcomes.index(most) and shown.prediction == most


def test_an_example_that_was_misclassified_already_is_shown_as_its_row_says(phantoms, evaluated):
    """Where the model classifies no image of a class correctly, none of them was attacked for the rows."""
    rows = evaluated[0]
    own = rows[rows.attack.eq("clean") & rows.label.eq(0)].head(1)
    clean = own.assign(prediction=1, success=True)
    table = pd.concat([clean, clean.assign(attack="pgd", eps_255=4.0)], ignore_index=True)
    shown = pick_example(table, phantoms, label=0, attack="pgd", eps_255=4, attacked=np.ones((1, 1, 32, 32)))
    assert np.array_equal(shown.attacked, shown.clean) and shown.prediction == 1


@pytest.mark.parametrize(("clean", "pgd"), [((1, 0, 0, 1), (1, 0, 1, 1)), ((0, 0), (0, 0)), ((1,), (1,))])
def test_failures_are_the_first_of_each_kind_with_their_counts(phantoms, evaluated, clean, pgd):
    """Rows by hand of one class: which images are misclassified when clean, and which after PGD."""
    rows = evaluated[0]
    own = rows[rows.attack.eq("clean") & rows.label.eq(0)].head(1)
    index = np.arange(len(clean))
    first = own.loc[own.index.repeat(len(clean))].assign(
        index=index, prediction=clean, success=np.bool_(clean)
    )
    after = first.assign(attack="pgd", eps_255=4.0, success=np.bool_(pgd), prediction=pgd, l2=1.0)
    images = np.zeros((len(clean), 1, 2, 2)) + index.reshape(-1, 1, 1, 1)
    table = pd.concat([first, after, after.assign(eps_255=8.0, success=True)], ignore_index=True)
    found = pick_failures(table, phantoms, label=0, eps_255=4, attacked=images)
    broken = [i for i in index if pgd[i] and not clean[i]]
    assert found["clean"][1:] == (sum(clean), len(clean))
    assert found["pgd"][1:] == (len(broken), len(clean) - sum(clean))
    if sum(clean):
        assert np.array_equal(found["clean"][0].clean, phantoms.images[clean.index(1)] / 255)
        assert found["clean"][0].attacked is None
    if broken:
        assert found["pgd"][0].attacked[0, 0] == broken[0] and found["pgd"][0].prediction == 1
    assert (found["clean"][0] is None) is not any(clean) and (found["pgd"][0] is None) is not bool(broken)


def test_a_runs_examples_are_those_of_its_rows_and_images(phantoms, evaluated, tmp_path):
    rows, kept = evaluated
    write_csv(tmp_path / "normal_predictions.csv", rows)
    write_arrays(tmp_path / "normal_attacked.npz", **kept)
    run, names = Run(tmp_path, tmp_path), phantoms.class_names
    about = {"attack": "pgd", "eps_255": 4}
    label = int(rows.label.max())
    expected = pick_example(rows, phantoms, label=label, attacked=kept["pgd"], **about)
    shown = example_of(run, phantoms, "normal", names[label], **about)
    assert np.array_equal(shown.attacked, expected.attacked) and shown.prediction == expected.prediction
    first = example_of(run, phantoms, "normal", "no such class", eps_255=4)
    assert first.label == 0 and first.attacked is None
    found = failures_of(run, phantoms, "normal", eps_255=4)
    assert [*found] == [names[i] for i in sorted(rows.label.unique())]
    clean = rows[rows.attack.eq("clean")]
    assert sum(of["clean"][1] for of in found.values()) == clean.success.sum()
    assert [*failures_of(run, phantoms, "normal", eps_255=4, most=1)] == [names[int(rows.label.min())]]


def test_an_example_that_is_not_there_is_named(phantoms, evaluated):
    rows, kept = evaluated
    with pytest.raises(ValueError, match="eps_255=3"):
        pick_example(rows, phantoms, label=1, attack="pgd", eps_255=3, attacked=kept["pgd"])
    absent = next(iter({0, 1, 2} - set(rows.label)), None)
    if absent is not None:
        with pytest.raises(ValueError, match="no test image of class"):
            pick_example(rows, phantoms, label=absent)


def test_clean_scoring_needs_no_adversarial(model, images, labels, part):
    rows = score(model, images[part], labels[part], index=part, attack="clean", eps_255=0, **IDS)
    assert (rows.l2 == 0).all() and (rows.linf_255 == 0).all()


def test_static_images_that_no_gradient_changed_are_of_no_other_budget(model, images, labels, part):
    """As FGSM leaves them where all gradients are zero: that is a fact of the model, not a stale file."""
    x, y = images[part], labels[part]
    crafted = {name: x.numpy() for name in ("fgsm", "pgd", "cw")}
    rows = score_static(model, x, y, crafted, index=part, eps_255=4, **IDS)
    assert rows.linf_255.eq(0).all() and set(rows[rows.attack == "fgsm"].eps_255) == {4}


def test_logits_are_the_models_own_of_each_attack(model, images, labels, part, evaluated):
    _, kept = evaluated
    shown = {"clean": images[part], "pgd": kept["pgd"]}
    table = scoring.logits(model, shown, labels[part], index=part, **IDS)
    assert table.attack.tolist() == ["clean"] * len(part) + ["pgd"] * len(part)
    assert table["index"].tolist() == [*part, *part] and table.label.tolist() == 2 * labels[part].tolist()
    for attack, own in table.groupby("attack"):
        logits = torch.tensor(own.filter(like="logit_").to_numpy())
        of_model = predict(model, torch.as_tensor(shown[attack]), batch_size=64)
        assert torch.allclose(logits.softmax(1), of_model, atol=1e-6)
    assert table.columns[:4].tolist() == ["model", "split", "seed", "attack"]
    with pytest.raises(ValueError, match="3 indices for"):
        scoring.logits(model, shown, labels[part], index=[1, 2, 3])
