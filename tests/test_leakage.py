"""The leak meter: high where a split leaks, at chance where nothing does, and the two told apart."""

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fortify import leakage, regions, splits
from fortify.data import Slices, load_iq_oth_nccd
from fortify.intervals import wilson
from fortify.leakage import figures as leakage_figures
from fortify.leakage.answer import leakage_answer, meter_layout, region_layout
from fortify.leakage.meter import background_features, frame_features, histogram_features, thumbnail_features
from fortify.phantom import phantom_slices


@pytest.fixture(scope="module")
def slices():
    """60 virtual patients of 4 phantom slices, grouped by patient."""
    drawn = phantom_slices(patients=60, slices_per_patient=4, size=48, seed=0)
    return dataclasses.replace(drawn, groups=drawn.patients)


@pytest.fixture(scope="module")
def meter(slices):
    return leakage.leak_meter(slices, seeds=range(4))


@pytest.fixture(scope="module")
def real(real_folder):
    loaded = load_iq_oth_nccd(real_folder, size=112)
    return dataclasses.replace(loaded, groups=splits.near_duplicate_groups(loaded))


def accuracy(summed, classifier, split):
    own = summed[summed.classifier.eq(classifier) & summed.split.eq(split)]
    assert len(own) == 1
    return own.accuracy.iloc[0]


def noise(labels, size=32, seed=0):
    """Images of noise with these labels: nothing to learn, nothing to look up."""
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), size, size), dtype=np.uint8)
    names = tuple(f"c{label}/c{label} ({i}).png" for i, label in enumerate(labels))
    classes = tuple(f"c{i}" for i in range(labels.max() + 1))
    return Slices(images, labels.astype(np.int64), names, classes, source="noise", sha256="")


# --- features ----------------------------------------------------------------------


def test_the_frame_sees_no_pixel_of_the_inside():
    images = np.random.default_rng(0).integers(0, 256, (3, 224, 224), dtype=np.uint8)
    frame = regions.frame_mask((224, 224), 16)
    inside, outside = images.copy(), images.copy()
    inside[:, ~frame], outside[:, frame] = 0, 0
    features = frame_features(images)
    assert features.shape == (3, 56**2 - 48**2) and 0 <= features.min() and features.max() <= 1
    assert np.array_equal(frame_features(inside), features)
    assert (frame_features(outside) == 0).all()


def test_a_histogram_is_shares_by_grey_alone():
    images = np.array([[[0, 7], [8, 255]]], dtype=np.uint8)
    features = histogram_features(images)
    assert features.shape == (1, 64)
    assert features[0, [0, 1, 2, 63]].tolist() == [0.25] * 4 and features.sum() == 1
    assert np.array_equal(histogram_features(images[:, ::-1]), features)


def test_background_scalars_by_hand():
    images = np.full((3, 64, 64), 40, dtype=np.uint8)
    images[1, :8, :8] = 0  # one black corner of four
    rng = np.random.default_rng(0)
    images[2] = rng.integers(30, 50, (64, 64))
    features = background_features(images)
    assert features[0].tolist() == [0, 40, 0, 0, 0]
    assert features[1, :2].tolist() == [0.25, 30] and features[1, 2] == pytest.approx(np.sqrt(300))
    # White noise: the five-point Laplacian has variance 4 * 4 + 4 = 20 times that of the pixels.
    assert features[2, 4] == pytest.approx(np.sqrt(20), rel=0.15)
    changed = images.copy()
    changed[:, 8:-8, 8:-8] = 255
    assert np.array_equal(background_features(changed), features), "corners only"


def test_nearest_neighbour_is_the_one_that_correlates_most(slices):
    features = thumbnail_features(slices.images[:40])
    r = features @ features.T
    np.fill_diagonal(r, -1)
    distance = ((features[:, None] - features) ** 2).sum(2)
    np.fill_diagonal(distance, np.inf)
    assert np.array_equal(r.argmax(1), distance.argmin(1))


def coloured(images, shift=0):
    """The same images in three channels, red a little brighter than blue."""
    steps = np.array([shift, 0, -shift])
    return (images[..., None].clip(shift, 255 - shift) + steps).astype(np.uint8)


def test_equal_channels_give_the_thumbnails_and_groups_of_grey(slices):
    """And so does a tint: near-duplicates are told by the mean over the channels."""
    for shift in (0, 9):
        grey = dataclasses.replace(slices, images=slices.images.clip(shift, 255 - shift))
        colour = dataclasses.replace(slices, images=coloured(slices.images, shift))
        assert np.array_equal(thumbnail_features(colour.images), thumbnail_features(grey.images))
        assert np.array_equal(splits.near_duplicate_groups(colour), splits.near_duplicate_groups(grey))
        assert np.array_equal(background_features(colour.images), background_features(grey.images))
        assert splits.label_conflicts(colour, threshold=0.9).equals(
            splits.label_conflicts(grey, threshold=0.9)
        )
        assert leakage.shortcut_cues(colour).equals(leakage.shortcut_cues(grey))


@pytest.mark.parametrize("features", [frame_features, histogram_features])
def test_frame_and_histogram_are_of_each_channel(features):
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    each = [features(images[..., c].copy()) for c in range(3)]
    assert np.array_equal(features(images), np.concatenate(each, axis=1))


def test_the_meter_sees_a_hue_that_tells_the_class():
    labels = np.repeat([0, 1], 60)
    told = noise(labels, size=16)
    images = coloured(told.images, 4)
    images[labels == 1] = images[labels == 1, :, :, ::-1]  # blue brighter than red: of the same mean
    told = dataclasses.replace(told, images=images // 16 * 16)
    summed = leakage.summary(leakage.leak_meter(told, seeds=[0, 1]))
    assert (
        accuracy(summed, "histogram", "grouped")
        > 0.9
        > 0.7
        > accuracy(summed, "nearest neighbour", "grouped")
    )
    assert leakage.near_duplicates(told, leakage.draw_splits(told, seeds=[0]), [0.9]).k.sum() == 0
    copied = images.copy()
    copied[7] = copied[3]
    found = leakage.duplicates(dataclasses.replace(told, images=copied))
    assert found.name.tolist() == [told.names[7]] and found.copy_of.tolist() == [told.names[3]]


def test_groups_of_the_meter_may_be_strings(slices):
    named = np.array([f"P{group:03}" for group in slices.groups], dtype=object)
    some = {"background": leakage.CLASSIFIERS["background"]}
    tables = [
        leakage.leak_meter(slices, seeds=[1], groups=g, classifiers=some) for g in (named, slices.groups)
    ]
    pd.testing.assert_frame_equal(*tables)


def test_a_class_without_images_has_no_cues(slices):
    none = dataclasses.replace(slices, class_names=(*slices.class_names, "missing"))
    told = leakage.shortcut_cues(none).set_index(["tell", "class_name"])
    assert told.loc["noise"].loc["missing", ["median", "mean", "auc"]].isna().all()
    assert told.loc["noise"].loc["missing"].n == 0 and told.auc["noise", "normal"] > 0
    one = leakage.shortcut_cues(slices.subset(slices.labels == 0))
    assert one.auc.isna().all(), "one class cannot be told from others"


# --- meter ----------------------------------------------------------------------


def test_a_random_split_of_scans_leaks_and_a_grouped_one_does_not(slices, meter):
    summed = leakage.summary(meter)
    majority = np.bincount(slices.labels).max() / len(slices)
    assert accuracy(summed, "nearest neighbour", "random") > 0.95
    assert accuracy(summed, "nearest neighbour", "grouped") < majority + 0.15
    gap = summed.set_index(["classifier", "split"]).gap
    assert gap["nearest neighbour", "random"] == gap["nearest neighbour", "grouped"] > 0.3
    assert abs(gap["majority class", "random"]) < 0.05


def test_images_without_a_signal_give_no_accuracy():
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1], 100))
    summed = leakage.summary(leakage.leak_meter(noise(labels), seeds=range(4)))
    assert (summed.accuracy - 0.5).abs().max() < 0.13, "n = 120, three standard errors"


def test_a_cue_in_the_background_is_seen_on_both_splits():
    labels = np.repeat([0, 1], 60)
    told = noise(labels)
    told.images[labels == 1, :4, :4] = 0  # a black corner in one class
    summed = leakage.summary(leakage.leak_meter(told, seeds=[0, 1]))
    for split in ("random", "grouped"):
        assert accuracy(summed, "background", split) == 1
        assert accuracy(summed, "majority class", split) == 0.5
    auc = leakage.shortcut_cues(told).set_index(["tell", "class_name"]).auc
    assert auc["black corners", "c1"] == 1 and auc["black corners", "c0"] == 0


def test_the_meter_is_tidy_repeats_and_counts(slices, meter):
    assert not meter.duplicated(["classifier", "split", "seed"]).any()
    assert len(meter) == len(leakage.CLASSIFIERS) * 2 * 4
    assert np.allclose(meter.accuracy, meter.k / meter.n)
    assert (meter.low <= meter.accuracy).all() and (meter.accuracy <= meter.high).all()
    trivial = meter[meter.classifier.eq("majority class")]
    assert np.allclose(trivial.balanced_accuracy, 1 / 3)
    some = {name: leakage.CLASSIFIERS[name] for name in ("frame", "background")}
    again = leakage.leak_meter(slices, seeds=[2], classifiers=some)
    own = meter[meter.classifier.isin(some) & meter.seed.eq(2)].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, own)
    other = leakage.leak_meter(slices, seeds=[2], groups=np.arange(len(slices)), classifiers=some)
    assert not other[other.split.eq("grouped")].k.equals(again[again.split.eq("grouped")].k)


def test_the_summary_by_hand():
    rows = [("x", "random", 0, 9, 10), ("x", "random", 1, 7, 10), ("x", "grouped", 0, 3, 12)]
    table = pd.DataFrame(rows, columns=["classifier", "split", "seed", "k", "n"])
    table = table.assign(accuracy=table.k / table.n, balanced_accuracy=0.5)
    random, grouped = leakage.summary(table).to_dict("records")
    assert (random["k"], random["n"], random["seeds"], random["accuracy"]) == (16, 20, 2, 0.8)
    assert (random["low"], random["high"]) == wilson(8, 10)
    assert random["sd"] == pytest.approx(np.sqrt(0.02)) and np.isnan(grouped["sd"])
    assert (random["min"], random["max"]) == (0.7, 0.9)
    assert random["gap"] == grouped["gap"] == pytest.approx(0.55)


# --- near-duplicates, copies, cues, groups ----------------------------------------------------------


def test_near_duplicates_agree_with_the_splits_own_count(slices):
    drawn = leakage.draw_splits(slices, seeds=[0, 3])
    table = leakage.near_duplicates(slices, drawn, [0.9, 0.95])
    assert len(table) == 8
    for row in table.itertuples():
        share = splits.near_duplicate_share(slices, drawn[row.split, row.seed], threshold=row.threshold)
        assert row.share == row.k / row.n == share
    pooled = table.groupby(["split", "threshold"]).share.mean()
    assert pooled["random", 0.9] >= pooled["random", 0.95] > 0.5 > pooled["grouped", 0.9]


def test_copies_name_the_first_of_their_kind(slices):
    images = slices.images.copy()
    images[5] = images[9] = images[2]
    table = leakage.duplicates(dataclasses.replace(slices, images=images))
    assert table.name.tolist() == [slices.names[5], slices.names[9]]
    assert table.copy_of.tolist() == [slices.names[2]] * 2
    assert leakage.duplicates(slices).empty


def test_the_size_of_the_files_is_a_cue_unless_they_were_resized(slices):
    sizes = np.full((len(slices), 2), 512, dtype=np.int64)
    told = leakage.shortcut_cues(dataclasses.replace(slices, original_sizes=sizes)).set_index(
        ["tell", "class_name"]
    )
    assert told.loc["not square", ["median", "mean", "auc"]].isna().to_numpy().all()
    malignant = slices.class_names.index("malignant")
    sizes[slices.labels == malignant, 0] = 801
    told = leakage.shortcut_cues(dataclasses.replace(slices, original_sizes=sizes)).set_index(
        ["tell", "class_name"]
    )
    assert told.auc["not square", "malignant"] == 1 and told["mean"]["not square", "normal"] == 0
    assert told.n.groupby("class_name").first().sum() == len(slices)


def test_sensitivity_against_true_patients(slices):
    table = leakage.group_sensitivity(slices, thresholds=[0.9, 0.96, 1.1], neighbour_thresholds=[0.8, 1.1])
    at = table.set_index(["threshold", "neighbour_threshold"])
    groups = splits.near_duplicate_groups(slices, threshold=0.96, neighbour_threshold=0.8)
    row = at.loc[(0.96, 0.8)]
    assert (row.precision, row.recall) == splits.pairwise_agreement(groups, slices.patients)
    assert row.groups == groups.max() + 1 and row.largest == np.bincount(groups).max()
    alone = at.loc[(1.1, 1.1)]  # no two slices are linked
    assert alone.groups == alone.singletons == len(slices) and np.isnan(alone.precision)
    assert (table.scans == 0).all(), "phantoms have the file names of the dataset, not its scans"
    unknown = leakage.group_sensitivity(
        dataclasses.replace(slices, patients=None), thresholds=[0.9], neighbour_thresholds=[0.8]
    )
    assert unknown[["precision", "recall"]].isna().to_numpy().all()


def test_the_published_groups_are_one_row_a_slice(slices):
    table = leakage.group_table(slices)
    assert list(table) == ["name", "class_name", "group"]
    assert table.name.tolist() == list(slices.names) and table.group.tolist() == slices.groups.tolist()


@pytest.fixture
def named_like_the_dataset():
    """Tiny blank slices with the file names and counts of IQ-OTH/NCCD, each known scan a group."""
    counts = {"Bengin cases": 120, "Malignant cases": 561, "Normal cases": 416}
    names = tuple(f"{c}/{c[:-1]} ({i}).jpg" for c, n in counts.items() for i in range(1, n + 1))
    labels = np.repeat([0, 1, 2], list(counts.values())).astype(np.int64)
    groups = np.zeros(len(names), dtype=np.int64)
    start = names.index("Malignant cases/Malignant case (200).jpg")
    groups[start : start + 28], groups[start + 28 : start + 59] = 1, 2
    images = np.zeros((len(names), 4, 4), dtype=np.uint8)
    return Slices(images, labels, names, ("b", "m", "n"), source="", sha256="", groups=groups), start


def test_verdicts_on_the_known_scans(named_like_the_dataset):
    slices, start = named_like_the_dataset
    table = leakage.scan_recovery(slices)
    assert table.slices.tolist() == [28, 31] and table.exact.all() and set(table.verdict) == {"exact"}
    split = slices.groups.copy()
    split[start : start + 3] = 9
    split[start + 40] = 0
    verdicts = leakage.scan_recovery(slices, split).verdict.tolist()
    others = len(slices) - 59
    assert verdicts == ["split into 2 groups", f"split into 2 groups and merged with {others} others"]
    merged = np.where(slices.groups == 2, 1, slices.groups)
    assert leakage.scan_recovery(slices, merged).verdict.tolist() == [
        "merged with 31 others",
        "merged with 28 others",
    ]


def test_the_real_slices_leak(real):
    summed = leakage.summary(leakage.leak_meter(real, seeds=[0, 1]))
    assert accuracy(summed, "majority class", "random") == pytest.approx(561 / 1097, abs=0.005)
    for name, least in {
        "nearest neighbour": 0.96,
        "frame": 0.96,
        "histogram": 0.88,
        "background": 0.80,
    }.items():
        assert accuracy(summed, name, "random") > least > accuracy(summed, name, "grouped")
    assert leakage.scan_recovery(real).verdict.tolist() == ["exact", "exact"]
    assert len(leakage.duplicates(real)) in (42, 43), "in the original files, and in the copy of 224 px"
    assert (
        leakage.shortcut_cues(real).set_index("tell").auc["not square"].isna().all()
        == (real.original_sizes == real.original_sizes[0]).all()
    )


# --- command and figures ----------------------------------------------------------------------


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fortify.leakage", *map(str, arguments)], capture_output=True, text=True
    )


def test_the_command_measures_any_folder(slices, tmp_path):
    for name, image in zip(slices.names, slices.images, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    done = command(tmp_path, "--size", 48, "--seeds", 1, "--threshold", 0.96, "--neighbour-threshold", 0.96)
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in leakage.CLASSIFIERS)
    assert "240 images at 48 px" in done.stdout and "0.99" in done.stdout


def test_the_command_takes_patients_and_colours(slices, tmp_path):
    colour = coloured(slices.images, 5)
    for name, image in zip(slices.names, colour, strict=True):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(tmp_path / "in" / name)
    table = pd.DataFrame({"name": slices.names, "patient": [f"P{p}" for p in slices.patients]})
    table.to_csv(tmp_path / "p.csv", index=False)
    done = command(tmp_path / "in", "--size", 48, "--seeds", 1, "--colour", "--patients", tmp_path / "p.csv")
    assert done.returncode == 0 and "; 60 groups;" in done.stdout
    done = command(tmp_path / "in", "--size", 48, "--window", 40, 400)
    assert done.returncode == 2 and "window is for DICOM files" in done.stderr
    table.assign(patient="P" + slices.labels.astype(str).astype(object)).to_csv(
        tmp_path / "p.csv", index=False
    )
    done = command(tmp_path / "in", "--size", 48, "--patients", tmp_path / "p.csv")
    assert done.returncode == 2 and "images of Benign cases fall into 1 patients" in done.stderr


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    done = command(tmp_path / "nowhere")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_the_command_names_a_class_that_cannot_be_split(slices, tmp_path):
    for number, image in enumerate(slices.images[:12]):
        for name in ("dogs", "cats"):
            path = tmp_path / name / f"{name}{7 * number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(slices.images[0] if name == "cats" else image).save(path)
    done = command(tmp_path, "--size", 48, "--threshold", 0.999)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "12 images of cats fall into 1 groups" in done.stderr and "--threshold" in done.stderr
    assert "needs 5" in done.stderr, "as many as grouped_split asks for"
    shutil.rmtree(tmp_path / "cats")
    done = command(tmp_path, "--size", 48)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "has one class only, dogs" in done.stderr


def test_the_room_knows_no_model():
    code = "import sys, fortify.leakage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_meter_figure_shows_every_seed_and_the_baseline(meter):
    fig = leakage_figures.leak_meter_dots(meter)
    (ax,) = fig.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == list(leakage.CLASSIFIERS)
    drawn = np.concatenate([line.get_xdata() for line in ax.lines if line.get_alpha() == 0.25])
    assert np.allclose(np.sort(drawn), np.sort(100 * meter.accuracy))
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == ["random split, mean", "grouped split, mean", "one of 4 seeds", "largest class"]


def region_rows(splits=("random", "grouped")):
    """Rows of both trainings whose counts say of which line they are."""
    rows = []
    for split in splits:
        for model in ("normal", "adversarial"):
            for k, view in enumerate(leakage.views(np.zeros((1, 28, 28), np.uint8), frame_width=2)):
                k = 90 - 10 * k + (split == "grouped") + 2 * (model == "normal")
                rows.append(
                    {"split": split, "model": model, "view": view, "attacked": False, "k": k, "n": 100}
                )
    table = pd.DataFrame(rows)
    share = table.k / table.n
    return table.assign(accuracy=share, low=share - 0.1, high=share + 0.1)


def test_the_answer_states_the_numbers_of_the_tables(meter):
    summed, rows = leakage.summary(meter), region_rows()
    said = leakage_answer(summed, rows, majority={"random": 0.5, "grouped": 0.4}).splitlines()
    cells = summed.set_index(["classifier", "split"])
    for line, name in zip(said, ("nearest neighbour", "frame"), strict=False):
        for split in ("random", "grouped"):
            assert f"({cells.k[name, split]} of {cells.n[name, split]})" in line
    gap = 100 * (
        cells.accuracy["nearest neighbour", "random"] - cells.accuracy["nearest neighbour", "grouped"]
    )
    assert (f"worth {gap:.0f} points" in said[0]) == (gap > 10)
    best = cells.xs("grouped", level="split").drop("majority class").accuracy.idxmax()
    assert f"*{best}*" in said[2] and f"({cells.k[best, 'grouped']} of" in said[2]
    assert len(said) == 3 + 4
    assert said[3].startswith("- **Normal training, random split**: 92 % (92 of 100) on whole slices.")
    assert "changes that by -10 points (-20 with another grey)" in said[3]
    assert said[3].endswith("blanking the body leaves 52 % (52 of 100). The largest class has 50 %.")
    assert said[6].startswith("- **Adversarial training, grouped split**: 91 % (91 of 100)")


@pytest.mark.parametrize("split", ["random", "grouped"])
def test_a_run_of_one_split_has_an_answer_and_tables(meter, split):
    summed = leakage.summary(meter[meter.split.eq(split)])
    rows = region_rows((split,))
    said = leakage_answer(summed, rows, majority={split: 0.5})
    assert "Normal training" in said and "nan" not in said
    other = {"random": "grouped", "grouped": "random"}[split]
    assert f"{other} split" not in said
    assert list(meter_layout(summed).columns) == [
        "classifier", "sees the lungs", f"{split} (%)", "gap in points"
    ]  # fmt: skip
    assert (meter_layout(summed)["gap in points"] == "").all()
    assert len(region_layout(rows).columns) == 3


def test_the_tables_shown_are_short_and_hold_the_numbers(meter):
    summed = leakage.summary(meter)
    shown, regions_shown = meter_layout(summed).set_index("classifier"), region_layout(region_rows())
    assert shown.shape[0] <= 8 and shown.shape[1] <= 5 and len(regions_shown) <= 8
    for row in summed.itertuples():
        assert shown[f"{row.split} (%)"][row.classifier].startswith(f"{100 * row.accuracy:.0f} (")
    assert regions_shown["adversarial, grouped (%)"].tolist()[:2] == ["91 (81–101)", "81 (71–91)"]


def test_the_region_figures_show_the_table_and_the_masks(phantoms):
    line = {"k": 5, "n": 10, "accuracy": 0.5, "low": 0.3, "high": 0.7}
    rows = [
        line | {"split": "random", "model": model, "view": view, "attacked": view == "attack", "accuracy": a}
        for model, a in (("normal", 0.4), ("adversarial", 0.6))
        for view in ("whole", "attack")
    ]
    fig = leakage_figures.region_dots(pd.DataFrame(rows), majority={"random": 0.5})
    (ax,) = fig.axes
    points = {round(float(x)) for line in ax.lines if line.get_marker() in "os" for x in line.get_xdata()}
    assert points == {40, 60}
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == ["normal training", "adversarial training", "95 % Wilson interval", "largest class"]
    assert ax.get_title() == "random split: 10 test slices"
    images = phantoms.images[:2]
    shown = leakage.views(images, frame_width=2)
    fig = leakage_figures.region_examples(shown, regions.lung_mask(images), labels=["a", "b"])
    drawn = [np.asarray(ax.images[0].get_array()) for ax in fig.axes]
    for column, image in enumerate(shown.values()):
        assert np.array_equal(drawn[column], image[0]) and np.array_equal(
            drawn[len(shown) + column], image[1]
        )
