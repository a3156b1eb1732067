"""What must be true of every input, tried on many that hypothesis draws."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fortify.attacks import CW, FGSM, PGD, craft, perturbation_norms
from fortify.augmentation import Augmentation, augment
from fortify.data import Slices, to_tensor
from fortify.evaluation import accuracy_table, at_budget, check_rows, confusion
from fortify.intervals import wilson
from fortify.models import predict
from fortify.scoring import score
from fortify.splits import PARTS, grouped_split, random_split, read_split, write_split
from fortify.tables import layout1, table1, to_latex, to_markdown

# The same draws in every run; the fixtures are never changed by a draw.
QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
seeds = st.integers(0, 2**31 - 1)


@st.composite
def labelled(draw):
    """(labels, groups): two to four classes, each of at least 12 groups of one to four slices."""
    classes = draw(st.integers(2, 4))
    sizes = [draw(st.lists(st.integers(1, 4), min_size=12, max_size=25)) for _ in range(classes)]
    labels = np.concatenate([np.full(sum(own), label) for label, own in enumerate(sizes)])
    groups = np.repeat(np.arange(sum(map(len, sizes))), np.concatenate(sizes))
    order = np.random.default_rng(draw(seeds)).permutation(len(labels))
    return labels[order], groups[order]


def whole(split, labels):
    """Each slice is in one part, each class in every part."""
    assert set(split) == set(PARTS)
    assert sorted(np.concatenate(list(split.values()))) == list(range(len(labels)))
    assert all(set(labels[index]) == set(labels) for index in split.values())


@QUICK
@given(labelled(), seeds)
def test_a_random_split_is_a_partition_and_its_seeds_alone(data, seed):
    labels, _ = data
    split = random_split(labels, seed=seed)
    whole(split, labels)
    again = random_split(labels.copy(), seed=seed)
    assert all(np.array_equal(split[part], again[part]) for part in PARTS)


@QUICK
@given(labelled(), seeds)
def test_a_grouped_split_parts_no_group_whatever_the_groups_are_called(data, seed):
    labels, groups = data
    split = grouped_split(labels, groups, seed=seed)
    whole(split, labels)
    parts = [set(groups[index]) for index in split.values()]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    renamed = grouped_split(labels, groups * 7 + 3, seed=seed)
    assert all(np.array_equal(split[part], renamed[part]) for part in PARTS)


@QUICK
@given(labelled(), seeds)
def test_a_written_split_is_read_as_it_was(tmp_path, data, seed):
    labels, groups = data
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 4, 4), dtype=np.uint8)
    names = [f"{i}.png" for i in range(len(labels))]
    slices = Slices(images, labels, names, tuple("abcd"[: labels.max() + 1]), "drawn", "0" * 64, groups)
    split = grouped_split(labels, groups, seed=seed)
    write_split(tmp_path / "split.csv", slices, split)
    read = read_split(tmp_path / "split.csv", slices, grouped=True)
    assert all(np.array_equal(split[part], read[part]) for part in PARTS)
    slices.save(tmp_path / "slices.npz")
    again = Slices.load(tmp_path / "slices.npz")
    assert np.array_equal(again.images, images) and np.array_equal(again.labels, labels)
    assert again.names == slices.names and np.array_equal(again.groups, groups)


budgets = st.just(0.0) | st.floats(0.1, 64)  # grey levels; less is refused as one in units of [0, 1]

attacks = st.one_of(
    st.builds(FGSM, budgets),
    st.builds(
        PGD,
        budgets,
        steps=st.integers(1, 4),
        rel_stepsize=st.none() | st.floats(0.01, 3),
        random_start=st.booleans(),
        restarts=st.integers(1, 2),
        loss=st.sampled_from(["cross_entropy", "margin"]),
    ),
    st.builds(CW, st.integers(1, 2), st.integers(1, 8), st.floats(0.001, 0.5)),
)


@QUICK
@given(attack=attacks, seed=seeds, count=st.integers(1, 6), extreme=st.sampled_from([None, 0.0, 1.0]))
def test_an_attack_stays_in_its_budget_and_range_and_says_what_it_did(
    model, images, labels, attack, seed, count, extreme
):
    chosen = torch.from_numpy(np.random.default_rng(seed).choice(len(images), count, replace=False))
    x, y = images[chosen].clone(), labels[chosen]
    if extreme is not None:
        x[0] = extreme
    before, weights = x.clone(), [p.clone() for p in model.parameters()]
    found = craft(model, x, y, attack, seed=seed)
    assert found.images.shape == x.shape and found.images.dtype == torch.float32
    assert 0 <= found.images.min() and found.images.max() <= 1
    if not isinstance(attack, CW):
        linf, _ = perturbation_norms(x, found.images)
        assert (linf <= attack.eps_255 * (1 + 1e-6) + 1e-4).all()
    assert torch.equal(found.success, predict(model, found.images).argmax(1) != y)
    if isinstance(attack, CW):  # a failed one is the clean image
        assert torch.equal(found.images[~found.success], x[~found.success])
    assert torch.equal(x, before) and all(map(torch.equal, weights, model.parameters()))
    again = craft(model, x, y, attack, seed=seed)
    assert torch.equal(found.images, again.images)


@QUICK
@given(seed=seeds, batch_size=st.integers(1, 12), steps=st.integers(1, 4), eps=st.floats(0.5, 16))
def test_an_attack_does_not_depend_on_the_batches(model, images, labels, seed, batch_size, steps, eps):
    """Beyond the rounding of the convolutions, which may turn a gradient's sign near zero."""
    x, y = images[:12], labels[:12]
    attack = PGD(eps, steps=steps)
    whole_batch = craft(model, x, y, attack, seed=seed, batch_size=12).images
    parts = craft(model, x, y, attack, seed=seed, batch_size=batch_size).images
    assert ((whole_batch - parts).abs() > 1e-5).float().mean() < 0.02


@QUICK
@given(
    seed=seeds,
    ranges=st.builds(
        Augmentation,
        flip=st.booleans(),
        degrees=st.floats(0, 180),
        zoom=st.floats(0, 0.9),
        translate=st.floats(0, 1),
        gamma=st.floats(0, 3),
        gain=st.floats(0, 2),
        level=st.floats(0, 1),
        noise=st.floats(0, 1),
        blur=st.floats(0, 1),
        cutout=st.floats(0, 1),
    ),
)
def test_every_view_is_an_image(images, seed, ranges):
    views = augment(images[:5], ranges, generator=torch.Generator().manual_seed(seed))
    assert views.shape == images[:5].shape and torch.isfinite(views).all()
    assert 0 <= views.min() and views.max() <= 1
    again = augment(images[:5], ranges, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(views, again)


@given(st.integers(1, 2000), st.data())
def test_an_interval_holds_its_share_and_narrows_with_n(n, data):
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
    wider, narrower = wilson(k, n, confidence=0.99), wilson(10 * k, 10 * n)
    assert wider[0] <= low + 1e-12 and high <= wider[1] + 1e-12
    assert narrower[1] - narrower[0] < high - low


@st.composite
def evaluated(draw):
    """Per-example rows of both trainings under all attacks at two budgets, predictions drawn at random."""
    rng = np.random.default_rng(draw(seeds))
    n, classes = draw(st.integers(3, 30)), draw(st.integers(2, 4))
    label, index, parts = rng.integers(0, classes, n), rng.permutation(1000)[:n], []
    for model in ("normal", "adversarial"):
        about = {"model": model, "split": "random", "seed": 0, "protocol": "adaptive"}
        clean = rng.integers(0, classes, n)
        for attack, eps in [("clean", 0), ("fgsm", 1), ("fgsm", 4), ("pgd", 1), ("pgd", 4), ("cw", np.nan)]:
            prediction, l2 = rng.integers(0, classes, n), rng.random(n)
            if attack == "clean":
                prediction, l2 = clean, np.zeros(n)
            if attack == "cw":
                failed = prediction == label
                prediction, l2 = np.where(failed, clean, prediction), np.where(failed, 0, l2)
                still = prediction != label  # a failed CW on an image that was wrong all along
                l2 = np.where(failed & still, 0, l2)
            part = pd.DataFrame({"index": index, "label": label, "prediction": prediction})
            linf = 0.0 if attack == "clean" else 1.0
            part = part.assign(attack=attack, eps_255=float(eps), linf_255=linf, l2=l2, **about)
            parts.append(part.assign(success=part.prediction != part.label))
    return pd.concat(parts, ignore_index=True), [f"class{i}" for i in range(classes)]


@QUICK
@given(evaluated(), st.floats(0, 1), st.floats(0, 1))
def test_tables_count_the_rows_they_are_made_of(made, less, more):
    rows, names = made
    check_rows(rows)
    less, more = sorted((less, more))
    table = accuracy_table(at_budget(rows, eps_255=4, cw_l2=more), class_names=names)
    at = table.set_index(["model", "attack"])
    matrices = confusion(at_budget(rows, eps_255=4, cw_l2=more), num_classes=len(names))
    for model in ("normal", "adversarial"):
        own = rows[rows.model.eq(model)]
        pgd = own[own.attack.eq("pgd") & own.eps_255.eq(4)]
        assert at.loc[(model, "pgd"), "k"] == (pgd.prediction == pgd.label).sum()
        three = at.loc[model].loc[["fgsm", "pgd", "cw"]]
        assert at.loc[(model, "combined"), "k"] == three.k.sum()
        assert at.loc[(model, "worst"), "k"] <= three.k.min()
        for attack in ("clean", "fgsm", "pgd", "cw"):
            matrix = matrices["random", model, "adaptive", attack]
            assert (matrix.trace(), matrix.sum()) == tuple(at.loc[(model, attack), ["k", "n"]])
        line = at.loc[(model, "pgd")]
        assert 0 <= line.low <= line.accuracy <= line.high <= 1
    shuffled = rows.sample(frac=1, random_state=0)
    again = accuracy_table(at_budget(shuffled, eps_255=4, cw_l2=more), class_names=names)
    pd.testing.assert_frame_equal(table, again)
    shown = layout1(table1(table, split="random"))
    k, n = at.loc[("normal", "pgd"), ["k", "n"]]
    assert f"{k:.0f}/{n:.0f}" in to_markdown(shown) and f"{k:.0f}/{n:.0f}" in to_latex(
        shown, caption="c", label="l"
    )


@QUICK
@given(evaluated(), st.data())
def test_a_row_that_is_lost_repeated_or_altered_is_noticed(made, data):
    rows, _ = made
    at = data.draw(st.integers(0, len(rows) - 1))
    assume(rows.attack[at] != "clean")
    with pytest.raises(ValueError, match="images, not the"):
        check_rows(rows.drop(index=at))
    with pytest.raises(ValueError, match="repeat another row"):
        check_rows(pd.concat([rows, rows.iloc[[at]]]))
    for column, value in (
        ("success", not rows.success[at]),
        ("label", rows.label[at] + 1),
        ("attack", "pdg"),
    ):
        altered = rows.copy()
        altered.loc[at, column] = value
        message = "images, not the" if column == "attack" else "the first is"
        with pytest.raises(ValueError, match=message):
            check_rows(altered)


@QUICK
@given(seed=seeds, count=st.integers(1, 30))
def test_scored_rows_are_the_models_predictions(model, images, labels, seed, count):
    index = np.random.default_rng(seed).choice(len(images), count, replace=False)
    about = {"model_name": "normal", "split": "random", "seed": 0}
    rows = score(model, images[index], labels[index], index=index, attack="clean", eps_255=0, **about)
    assert rows["index"].tolist() == index.tolist()
    assert rows.prediction.tolist() == predict(model, images[index]).argmax(1).tolist()


@given(st.integers(0, 255))
def test_a_grey_level_becomes_its_share_of_255(level):
    assert to_tensor(np.full((1, 2, 3), level, np.uint8)).flatten().tolist() == pytest.approx(
        [level / 255] * 6
    )
