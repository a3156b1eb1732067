"""A leak meter for folders of images: how much of the class can be told without recognising a disease.

Classifiers too simple to be evidence of that (:data:`CLASSIFIERS`) are tested on random and on grouped
splits; two of them, frame and background, see no lung of a whole CT slice at all. What they score on a random
split and not on a grouped one is leakage: near-copies of the test images in the training set. What they score
on both above the majority class is a cue of the source (scanner, protocol, preprocessing), leakage that the
groups miss, or, for the two that see the whole image, anatomy and disease. That says what a model *could*
use, not what it uses; for that see :mod:`fortify.regions`.

On any folder with one subfolder a class: ``python -m fortify.leakage my-images``.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import ndimage
from sklearn.base import BaseEstimator
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fortify import splits
from fortify.data import IQ_OTH_NCCD, DataError, Slices, load_folder
from fortify.images import histograms
from fortify.intervals import wilson

FRAME_OF_THUMBNAIL = 4  # px of 56: the 16 outermost pixels of a slice of 224 px, averaged
CORNER_SHARE = 1 / 8  # of the side: the four squares in which the background is measured
SHORTCUT_CUES = ("black corners", "background mean", "background sd", "noise", "sharpness")
_TREES = 200
_ITERATIONS = 500  # of L-BFGS; it converges in fewer


@dataclass(frozen=True)
class LeakClassifier:
    """A feature and a scikit-learn classifier of it, too simple to recognise a disease."""

    features: Callable[[np.ndarray], np.ndarray]  # uint8 (N, H, W) or (N, H, W, C) -> float (N, F)
    build: Callable[[int], BaseEstimator]  # seed -> an unfitted scikit-learn classifier
    sees_lung: bool  # whether the feature is of the whole slice


def thumbnail_features(images: np.ndarray) -> np.ndarray:
    """Standardised thumbnails (N, F): their Euclidean order is the order of correlation.

    Of the mean over the channels, as near-duplicates are told.
    """
    return splits.unit_thumbnails(images, splits.THUMBNAIL)


def frame_features(images: np.ndarray) -> np.ndarray:
    """The frame of the image (N, F) in [0, 1]: the outermost 1/14 of each side, averaged in blocks.

    At 224 px it is 16 pixels wide and averaged over 4 x 4. In a whole CT slice it holds air, table and
    at most some skin, no lung. Of colour images each channel's, one after the other.
    """
    side = min(splits.THUMBNAIL, *images.shape[1:3])
    width = max(1, round(FRAME_OF_THUMBNAIL / splits.THUMBNAIL * side))
    outer = np.ones((side, side), dtype=bool)
    outer[width:-width, width:-width] = False
    channels = images[..., None] if images.ndim == 3 else images
    frames = [
        [splits.box_thumbnail(one, side)[outer] for one in np.moveaxis(image, 2, 0)] for image in channels
    ]
    return np.array(frames).reshape(len(images), -1) / 255


def histogram_features(images: np.ndarray) -> np.ndarray:
    """Share of the pixels in each of 64 equal ranges of intensity: (N, 64), of C channels (N, 64 C)."""
    return histograms(images)


def background_features(images: np.ndarray) -> np.ndarray:
    """Five scalars of the four corner squares, an eighth of the side each: (N, 5).

    In the order of ``SHORTCUT_CUES``: share of pixels of intensity 0 (outside the scan's circle); mean and
    standard deviation of the intensity; noise, the standard deviation of the Laplacian; sharpness, noise over
    the standard deviation of the intensity (0 where that is 0): high where the reconstruction kernel leaves
    the noise fine-grained. The intensity of colour images is the mean over their channels.
    """
    side = max(2, round(CORNER_SHARE * min(images.shape[1:3])))
    ends = (slice(None, side), slice(-side, None))
    scalars = []
    for image in images:
        corners = np.array([image[rows, columns] for rows in ends for columns in ends], dtype=float)
        corners = corners if corners.ndim == 3 else corners.mean(3)
        laplacian = np.array([ndimage.laplace(corner, mode="nearest") for corner in corners])
        sd, noise = corners.std(), laplacian.std()
        scalars.append(((corners == 0).mean(), corners.mean(), sd, noise, noise / sd if sd else 0.0))
    return np.array(scalars)


def _forest(seed):
    return RandomForestClassifier(_TREES, random_state=seed)


CLASSIFIERS = {
    "majority class": LeakClassifier(
        histogram_features, lambda seed: DummyClassifier(strategy="most_frequent"), sees_lung=False
    ),
    "nearest neighbour": LeakClassifier(
        thumbnail_features, lambda seed: KNeighborsClassifier(1), sees_lung=True
    ),
    "frame": LeakClassifier(
        frame_features,
        lambda seed: make_pipeline(
            StandardScaler(), LogisticRegression(max_iter=_ITERATIONS, random_state=seed)
        ),
        sees_lung=False,
    ),
    "histogram": LeakClassifier(histogram_features, _forest, sees_lung=True),
    "background": LeakClassifier(background_features, _forest, sees_lung=False),
}


def draw_splits(
    slices: Slices, *, seeds: Iterable[int], groups: np.ndarray | None = None
) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """{("random" or "grouped", seed): split}.

    ``groups`` (N,), integers or strings, default to the slices' own.
    """
    seeds = list(seeds)
    groups = slices.groups if groups is None else groups
    drawn = {("random", seed): splits.random_split(slices.labels, seed=seed) for seed in seeds}
    return drawn | {("grouped", s): splits.grouped_split(slices.labels, groups, seed=s) for s in seeds}


def leak_meter(
    slices: Slices,
    *,
    seeds: Iterable[int],
    groups: np.ndarray | None = None,
    classifiers: Mapping[str, LeakClassifier] | None = None,
) -> pd.DataFrame:
    """Accuracy of each leak classifier on random and grouped splits: one row per (classifier, split, seed).

    Trained on the training part alone, tested on the test part; ``seed`` draws the split and fixes the
    classifier. ``groups`` (N,), integers or strings, default to the slices' own; without any, a grouped split
    is random too. Images may have channels; :data:`CLASSIFIERS` say at their features what they make of them.
    ``classifiers`` as :data:`CLASSIFIERS`, which is the default. Columns: classifier, split, seed, k, n,
    accuracy, low, high (95 % Wilson interval), balanced_accuracy.
    Raises ValueError as the splits do, for a class with too few slices or groups.
    """
    drawn = draw_splits(slices, seeds=seeds, groups=groups)
    table = []
    for name, classifier in (classifiers or CLASSIFIERS).items():
        features = classifier.features(slices.images)
        for (split, seed), parts in drawn.items():
            train, test = parts["train"], parts["test"]
            fitted = classifier.build(seed).fit(features[train], slices.labels[train])
            truth, prediction = slices.labels[test], fitted.predict(features[test])
            k, n = int((prediction == truth).sum()), len(test)
            low, high = wilson(k, n)
            line = {"classifier": name, "split": split, "seed": seed, "k": k, "n": n, "accuracy": k / n}
            line |= {"low": low, "high": high}
            table.append(line | {"balanced_accuracy": balanced_accuracy_score(truth, prediction)})
    return pd.DataFrame(table)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per (classifier, split) of a :func:`leak_meter` table, seeds pooled, in its order.

    ``k`` of ``n`` predictions; ``low`` and ``high`` are Wilson's for one test set of the mean size, because
    random test sets overlap; ``sd`` (ddof 1), ``min`` and ``max`` are of the seeds' accuracies; ``gap``
    is the random split's accuracy less the grouped one's, of the same classifier.
    """
    lines = []
    for (name, split), part in table.groupby(["classifier", "split"], sort=False):
        k, n, seeds = int(part.k.sum()), int(part.n.sum()), len(part)
        low, high = wilson(round(k / seeds), round(n / seeds))
        line = {"classifier": name, "split": split, "seeds": seeds, "k": k, "n": n, "accuracy": k / n}
        line |= {"low": low, "high": high, "sd": part.accuracy.std(ddof=1)}
        line |= {"min": part.accuracy.min(), "max": part.accuracy.max()}
        lines.append(line | {"balanced_accuracy": part.balanced_accuracy.mean()})
    lines = pd.DataFrame(lines)
    of = lines.set_index(["split", "classifier"]).accuracy
    gap = of.get("random", pd.Series(dtype=float)) - of.get("grouped", pd.Series(dtype=float))
    return lines.assign(gap=lines.classifier.map(gap))


def near_duplicates(
    slices: Slices,
    drawn: Mapping[tuple[str, int], Mapping[str, np.ndarray]],
    thresholds: Iterable[float],
) -> pd.DataFrame:
    """How many test images have a near-duplicate in training: one row per (split, seed, threshold).

    Columns also k of n, their share, low and high (95 % Wilson interval). ``drawn`` is :func:`draw_splits`; a
    near-duplicate correlates above the threshold with the image, as thumbnails.
    """
    thumbnails = thumbnail_features(slices.images)
    table = []
    for (split, seed), parts in drawn.items():
        _, nearest = splits.nearest_in_training(thumbnails, parts["test"], parts["train"])
        for threshold in thresholds:
            k, n = int((nearest > threshold).sum()), len(nearest)
            low, high = wilson(k, n)
            line = {"split": split, "seed": seed, "threshold": threshold, "k": k, "n": n, "share": k / n}
            table.append(line | {"low": low, "high": high})
    return pd.DataFrame(table)


def duplicates(slices: Slices) -> pd.DataFrame:
    """The images whose pixels equal an earlier image's: name, class_name, copy_of, copy_class_name."""
    first = np.unique(ids := splits.exact_duplicates(slices.images), return_index=True)[1][ids]
    copies = np.flatnonzero(first != np.arange(len(slices)))
    names = np.array(slices.names, object)
    classes = np.array(slices.class_names, object)[slices.labels]
    columns = {"name": names[copies], "class_name": classes[copies], "copy_of": names[first[copies]]}
    return pd.DataFrame(columns | {"copy_class_name": classes[first[copies]]})


def shortcut_cues(slices: Slices) -> pd.DataFrame:
    """What background and file size say of the class: one row per (cue, class), median, mean and AUC.

    Columns: tell (the cue), class_name, n, median, mean, auc.

    ``auc`` is of the cue as a score for this class against the others: 0.5 says nothing, 0 as much as 1. The
    cues are those of :func:`background_features` and ``not square``, 1 where the original file was not;
    where all original sizes are one, as in a copy that was resized before, it has NaN throughout. So has a
    class without images.
    """
    values = dict(zip(SHORTCUT_CUES, background_features(slices.images).T, strict=True))
    sizes = slices.original_sizes
    resized = sizes is None or (sizes == sizes[0]).all()
    values["not square"] = np.full(len(slices), np.nan) if resized else (sizes[:, 0] != sizes[:, 1]) * 1.0
    table = []
    for cue, value in values.items():
        for label, name in enumerate(slices.class_names):
            own = slices.labels == label
            line = {"tell": cue, "class_name": name, "n": int(own.sum())}
            line |= {"median": np.nan, "mean": np.nan, "auc": np.nan}
            if own.any():
                line |= {"median": np.median(value[own]), "mean": value[own].mean()}
            if own.any() and not own.all() and not np.isnan(value).any():
                line["auc"] = roc_auc_score(own, value)
            table.append(line)
    return pd.DataFrame(table)


def group_table(slices: Slices) -> pd.DataFrame:
    """The groups as they are published: name, class_name, group, one row a slice.

    They are connected components of alike slices, :func:`fortify.splits.near_duplicate_groups`: stand-ins
    for the patients, whose identity was never released, and no proof of it.
    """
    classes = [slices.class_names[label] for label in slices.labels]
    return pd.DataFrame({"name": slices.names, "class_name": classes, "group": slices.groups})


@dataclass(frozen=True)
class KnownScan:
    """A run of file numbers of one class folder that the size of the original files shows to be one scan."""

    folder: str
    first: int
    last: int
    width: int
    height: int


# Nearly all files of IQ-OTH/NCCD are 512 x 512. These two runs have sizes that no other file has; read from
# the headers of the original files (doi:10.17632/bhmdr45bh2.4).
KNOWN_SCANS = (
    KnownScan("Malignant cases", 200, 227, 801, 512),
    KnownScan("Malignant cases", 228, 258, 623, 512),
)


def scan_recovery(slices: Slices, groups: np.ndarray | None = None) -> pd.DataFrame:
    """How the groups treat each of ``KNOWN_SCANS``: scan, slices, exact, verdict. Empty for other datasets.

    The verdict is ``exact``, ``split into k groups``, ``merged with m others`` (slices) or the latter two.
    """
    groups = slices.groups if groups is None else np.asarray(groups)
    table = []
    for scan in KNOWN_SCANS if _is_iq_oth_nccd(slices) else ():
        numbers = [
            splits.file_number(name)[1] if name.split("/")[0] == scan.folder else None
            for name in slices.names
        ]
        own = np.array([number is not None and scan.first <= number <= scan.last for number in numbers])
        parts, others = len(np.unique(groups[own])), int((np.isin(groups, groups[own]) & ~own).sum())
        words = [f"split into {parts} groups"] * (parts > 1) + [f"merged with {others} others"] * (others > 0)
        line = {"scan": f"{scan.folder} {scan.first}-{scan.last}", "slices": int(own.sum())}
        table.append(line | {"exact": not words, "verdict": " and ".join(words) or "exact"})
    return pd.DataFrame(table, columns=["scan", "slices", "exact", "verdict"])


def group_sensitivity(
    slices: Slices, *, thresholds: Iterable[float], neighbour_thresholds: Iterable[float]
) -> pd.DataFrame:
    """What each pair of thresholds makes of the groups: one row each.

    Columns: threshold, neighbour_threshold (1: no rule for consecutive numbers), groups, largest, singletons;
    precision and recall of pairs of slices against the true patients, NaN where those are not known;
    scans_exact of scans, the :func:`scan_recovery`.
    """
    table = []
    for threshold in thresholds:
        for neighbour in neighbour_thresholds:
            options = {"threshold": threshold, "neighbour_threshold": neighbour}
            groups = splits.near_duplicate_groups(slices, **options)
            sizes, scans = np.bincount(groups), scan_recovery(slices, groups)
            line = options | {"groups": len(sizes), "largest": sizes.max(), "singletons": (sizes == 1).sum()}
            precision = recall = np.nan
            if (
                slices.patients is not None and sizes.max() > 1
            ):  # without a pair there is nothing to be precise on
                precision, recall = splits.pairwise_agreement(groups, slices.patients)
            line |= {"precision": precision, "recall": recall}
            table.append(line | {"scans_exact": int(scans.exact.sum()), "scans": len(scans)})
    return pd.DataFrame(table)


def _is_iq_oth_nccd(slices):
    folders = [name.split("/")[0] for name in slices.names]
    counts = {folder: folders.count(folder) for folder in IQ_OTH_NCCD.counts}
    return slices.patients is None and counts == dict(IQ_OTH_NCCD.counts)


def _require_groups(slices, kind, remedy):
    for label, name in enumerate(slices.class_names):
        own = slices.labels == label
        if (count := len(np.unique(slices.groups[own]))) < splits.FOLDS:
            raise DataError(
                f"the {own.sum()} images of {name} fall into {count} {kind}; a grouped split needs "
                f"{splits.FOLDS}. {remedy}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: print the meter and near-duplicates of a folder; 2 and one line on stderr if it is bad."""
    parser = argparse.ArgumentParser(prog="python -m fortify.leakage", description=main.__doc__)
    parser.add_argument("folder", help="one subfolder of images for each class")
    parser.add_argument("--size", type=int, default=224, help="side in pixels to load the images at")
    parser.add_argument("--seeds", type=int, default=5, help="number of splits of each kind")
    parser.add_argument("--threshold", type=float, default=0.93, help="images alike above it are one group")
    parser.add_argument(
        "--neighbour-threshold", type=float, default=0.80, help="for consecutive file numbers"
    )
    parser.add_argument(
        "--near-duplicates",
        type=float,
        nargs="+",
        default=[0.95, 0.99],
        help="above which of these an image of training is nearly a test image",
    )
    parser.add_argument("--colour", action="store_true", help="keep the colours (default: luminance)")
    parser.add_argument("--window", type=float, nargs=2, help="centre and width in HU, for DICOM files")
    parser.add_argument(
        "--patients",
        help="CSV of file name and patient, or PatientID: groups are the patients, not alike images",
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    try:
        window = options.window and tuple(options.window)
        about = {"colour": options.colour, "window": window, "patients": options.patients, "ct": False}
        slices = load_folder(options.folder, size=options.size, **about)
        if len(slices.class_names) < 2:
            only = slices.class_names[0]
            raise DataError(
                f"{options.folder} has one class only, {only}; put each class into its own subfolder"
            )
        thresholds = {"threshold": options.threshold, "neighbour_threshold": options.neighbour_threshold}
        if options.patients is None:
            slices = replace(slices, groups=splits.near_duplicate_groups(slices, **thresholds))
            remedy = "Raise --threshold and --neighbour-threshold, or add images."
            _require_groups(slices, "groups of alike images", remedy)
        else:
            _require_groups(slices, "patients", "Add patients.")
        seeds = range(options.seeds)
        meter = summary(leak_meter(slices, seeds=seeds))
        found = near_duplicates(slices, draw_splits(slices, seeds=seeds), options.near_duplicates)
    except (ValueError, OSError, ImportError) as error:  # a DataError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    groups = len(np.unique(slices.groups))
    print(f"{slices.source}; {groups} groups; {len(duplicates(slices))} exact copies of another image\n")
    percent = ["accuracy", "low", "high", "sd", "min", "max", "balanced_accuracy", "gap"]
    meter[percent] = (100 * meter[percent]).round(1)
    print("Accuracy in % of classifiers too simple to recognise a disease; gap: what the random split adds")
    print(meter.to_string(index=False, na_rep=""))
    pooled = found.groupby(["split", "threshold"], sort=False)[["k", "n"]].sum().reset_index()
    print("\nTest images with a near-duplicate in the training set:")
    print(pooled.assign(share=(100 * pooled.k / pooled.n).round(1)).to_string(index=False))
    return 0
