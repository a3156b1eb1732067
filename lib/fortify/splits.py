"""Train, validation and test: at random, or with near-duplicate slices kept on one side.

A *split* is a dict ``{"train": index, "val": index, "test": index}`` of sorted int64 arrays that together
hold every slice once. Slices of one patient are near-copies of each other, so a random split asks a model
to recognise patients it has seen; :func:`grouped_split` does not. Its seeds are folds of a cross-validation.
"""

import hashlib
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from fortify import files

if TYPE_CHECKING:
    from fortify.data import Slices

PARTS = ("train", "val", "test")
THUMBNAIL = 56  # px, of the images that are compared
FOLDS = 5  # of the cross-validation by groups
_BLOCK = 1024  # rows held at a time of what is as long as all slices
_TRIES = 256  # assignments drawn to part groups, of which the best-balanced is kept


def near_duplicate_groups(
    slices: "Slices", *, threshold: float = 0.93, neighbour_threshold: float = 0.80, side: int = THUMBNAIL
) -> np.ndarray:
    """Group ids 0..G-1, int64 (N,), of slices that are likely to show one patient.

    Two slices are linked when the correlation r of their thumbnails (box-averaged to ``side`` pixels or the
    slices' own size if that is smaller) exceeds ``threshold``; when they have consecutive file numbers in one
    class, as neighbours of a scan do, and r exceeds ``neighbour_threshold``; and when their pixels are
    identical. Groups are the connected components and may span classes: the data hold such pairs.
    They take the place of unknown patients; report how the result depends on the thresholds.

    Ids are in order of appearance. Memory is that of the thumbnails and of one block of r, however many
    slices are alike.
    """
    exact = exact_duplicates(slices.images)
    group = np.unique(exact, return_index=True)[1][exact]  # a group is named by its first slice
    thumbnails = unit_thumbnails(slices.images, side)
    for i, j in _close_neighbours(slices, thumbnails, neighbour_threshold):
        _merge(group, np.array([i, j]))
    for start, r in _correlations(thumbnails):
        for i, row in enumerate(r, start):
            near = np.flatnonzero(row[i - start :] > threshold) + i
            _merge(group, np.append(near, i))  # not i alone: r of a flat slice with itself is 0
    return np.unique(group, return_inverse=True)[1].astype(np.int64)


def exact_duplicates(images: np.ndarray) -> np.ndarray:
    """Ids 0..K-1, int64 (N,), in order of appearance; images share one when their pixels are identical."""
    seen = {}  # digests: the pixels themselves would be a second copy of all images
    digests = (hashlib.sha256(image.tobytes()).digest() for image in images)
    return np.array([seen.setdefault(digest, len(seen)) for digest in digests], dtype=np.int64)


def label_conflicts(
    slices: "Slices", *, threshold: float = 0.99, side: int = THUMBNAIL, most: int = 100_000
) -> pd.DataFrame:
    """Pairs of nearly identical slices in different classes, most alike first, as a DataFrame.

    Columns: name, class_name, those of the other slice, twin and twin_class_name, and r, the correlation of
    their thumbnails (> threshold).
    Of more than ``most`` pairs the most alike are kept, and a warning says how many there are.
    """
    names = np.array(slices.names, object)
    rank = np.argsort(np.argsort(names))
    found, waiting, floor = 0, 0, threshold
    held = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]

    def best():
        i, j, r = (np.concatenate(parts) for parts in zip(*held, strict=True))
        order = np.lexsort((rank[j], rank[i], -r))[:most]
        return i[order], j[order], r[order]

    for start, r in _correlations(unit_thumbnails(slices.images, side)):
        for i, row in enumerate(r, start):
            near = np.flatnonzero(row[i - start + 1 :] > threshold) + i + 1
            near = near[slices.labels[near] != slices.labels[i]]
            found += len(near)  # counted, then dropped where enough pairs that are more alike are held
            near = near[row[near - start] > floor]
            held.append((np.full(len(near), i), near, row[near - start]))
            waiting += len(near)
            if waiting > most:
                held, waiting = [best()], 0
                floor = held[0][2][-1]
    i, j, r = best()
    if found > most:
        warnings.warn(
            f"{found} pairs of slices in different classes correlate above {threshold}; the {most} most "
            "alike are listed. Check that the images are not all alike, or raise the threshold.",
            stacklevel=2,
        )
    classes = np.array(slices.class_names, object)[slices.labels]
    # The published tables name the near-duplicate a twin.
    columns = {"name": names[i], "class_name": classes[i], "twin": names[j], "twin_class_name": classes[j]}
    return pd.DataFrame(columns | {"r": r.astype(float)})


def pairwise_agreement(groups: np.ndarray, patients: np.ndarray) -> tuple[float, float]:
    """(precision, recall) of "these two slices are of one patient", over all pairs of slices.

    ``groups`` and ``patients`` (N,) are ids, integers or strings. A recall below 1 is a patient torn apart,
    which can leak; a precision below 1 is patients merged, which only makes a grouped split stricter. NaN
    where no two slices share a group, or a patient.
    """
    group, patient = (np.unique(ids, return_inverse=True)[1] for ids in (groups, patients))
    if group.shape != patient.shape:
        raise ValueError(f"one patient for each group: {patient.shape} patients for {group.shape} groups.")

    def pairs(ids):
        """Pairs of equal ids: of n slices that share one, n (n - 1) / 2."""
        n = np.unique(ids, return_counts=True)[1]
        return int((n * (n - 1) // 2).sum())

    both = pairs(group * (patient.max(initial=0) + 1) + patient)
    return tuple(both / count if (count := pairs(ids)) else np.nan for ids in (group, patient))


def nearest_in_training(
    thumbnails: np.ndarray, test: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(index, r) of the ``train`` slice that correlates most with each ``test`` slice, (len(test),) each.

    ``thumbnails`` (N, F) are :func:`unit_thumbnails`. Of equals the first; -1, twice, without any.
    """
    nearest, r = np.full(len(test), -1, np.int64), np.full(len(test), -1, np.float32)
    for a in range(0, len(test), _BLOCK):
        part = slice(a, a + _BLOCK)
        for b in range(0, len(train), _BLOCK):
            known = np.asarray(train)[b : b + _BLOCK]
            products = thumbnails[test[part]] @ thumbnails[known].T
            best = products.argmax(1)
            most = products[np.arange(len(best)), best]
            better = most > r[part]
            nearest[part][better], r[part][better] = known[best[better]], most[better]
    return nearest, r


def near_duplicate_share(
    slices: "Slices", split: dict[str, np.ndarray], *, threshold: float = 0.99, side: int = THUMBNAIL
) -> float:
    """Share of test slices with a near-duplicate in training: thumbnails with r above ``threshold``."""
    thumbnails = unit_thumbnails(slices.images, side)
    return float(np.mean(nearest_in_training(thumbnails, split["test"], split["train"])[1] > threshold))


def random_split(
    labels: np.ndarray, *, seed: int, fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
) -> dict[str, np.ndarray]:
    """Split slices at random, stratified by ``labels`` (N,), into train, val and test.

    Validation and test are rounded down: 1,097 slices become 769, 164 and 164. Raises ValueError for
    fractions that do not sum to 1 and when a class cannot be in every part.
    """
    labels = np.asarray(labels)
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be three positive shares that sum to 1, not {tuple(fractions)}.")
    _check(labels, np.arange(len(labels)), len(PARTS))
    from sklearn.model_selection import train_test_split  # here: it takes a second

    val, test = (int(len(labels) * fraction + 1e-9) for fraction in fractions[1:])
    everything = np.arange(len(labels), dtype=np.int64)
    if min(val, test) < len(np.unique(labels)):
        raise ValueError(f"{len(labels)} slices leave {val} for validation and {test} for test: use more.")
    rest, test = train_test_split(everything, test_size=test, stratify=labels, random_state=seed)
    train, val = train_test_split(rest, test_size=val, stratify=labels[rest], random_state=seed)
    split = dict(zip(PARTS, map(np.sort, (train, val, test)), strict=True))
    missing = [
        part for part, index in split.items() if len(np.unique(labels[index])) < len(np.unique(labels))
    ]
    if missing:
        raise ValueError(f"a class has no slice in {', '.join(missing)}: use another seed or more slices.")
    return split


def grouped_split(
    labels: np.ndarray, groups: np.ndarray, *, seed: int, folds: int = FOLDS, val: float = 0.1
) -> dict[str, np.ndarray]:
    """Fold ``seed % folds`` of a cross-validation by groups: whole groups into train, val and test.

    ``groups`` (N,) are ids, integers or strings: patients where they are known, else
    :func:`near_duplicate_groups`. Seeds 0 to ``folds - 1`` are the folds of one division, which together
    test every slice once; the next ``folds`` seeds are those of another. Of the rest, a share of about
    ``val`` of all slices is for validation. Each class is divided as evenly as the groups allow. With the
    defaults 1,097 slices become about 768, 110 and 219: as many to train on as :func:`random_split` gives.
    Raises ValueError for fewer than 2 folds, a ``val`` that leaves nothing to train on, a class with fewer
    groups than folds or than the three parts, and where no assignment puts every class into every part.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    if folds < 2 or not 0 < val < 1 - 1 / folds:
        raise ValueError(f"at least 2 folds and a share to train on, not {folds} and val={val}.")
    _check(labels, groups, max(folds, len(PARTS)))
    division, fold = divmod(seed, folds)
    fold_of = _deal(labels, groups, np.full(folds, 1 / folds), np.random.default_rng(division))
    rest, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
    share = val / (1 - 1 / folds)
    rng = np.random.default_rng((division, fold))
    held_out = _deal(labels[rest], groups[rest], np.array([1 - share, share]), rng) == 1
    return dict(zip(PARTS, (rest[~held_out], rest[held_out], test), strict=True))


def _deal(labels, groups, shares, rng):
    """The part 0..P-1, int64 (N,), of each slice: groups whole, of each class about ``shares`` (P,).

    Groups differ much in size, so many assignments are drawn - each takes the groups in a random order
    and puts each where its classes are missed most - and the one nearest to the wanted counts is kept.
    """
    classes, label = np.unique(labels, return_inverse=True)
    ids, group = np.unique(groups, return_inverse=True)
    held = np.zeros((len(ids), len(classes)))  # slices of each class in each group
    np.add.at(held, (group, label), 1)
    held /= held.sum(0)  # a rare class counts as much as a frequent one
    wanted = shares[:, None]
    order = rng.permuted(np.tile(np.arange(len(ids)), (_TRIES, 1)), axis=1)
    filled = np.zeros((_TRIES, len(shares), len(classes)))
    part_of, rows = np.zeros((_TRIES, len(ids)), np.int64), np.arange(_TRIES)
    for picked in order.T:
        share = held[picked]
        part = np.einsum("tpc,tc->tp", 1 - filled / wanted, share).argmax(1)
        filled[rows, part] += share
        part_of[rows, picked] = part
    deviation = (np.abs(filled - wanted) / wanted).sum((1, 2))
    deviation[(filled == 0).any((1, 2))] = np.inf
    best = deviation.argmin()
    if np.isinf(deviation[best]):
        raise ValueError(
            f"none of {_TRIES} assignments of {len(ids)} groups puts every class into every part; "
            "group less strictly (a higher threshold) or use more data."
        )
    return part_of[best][group]


def split_table(slices: "Slices", split: dict[str, np.ndarray]) -> pd.DataFrame:
    """One row a slice, in the slices' order: name, label, class_name, group, part."""
    _check_complete(split, len(slices))
    part = np.empty(len(slices), object)
    for name, index in split.items():
        part[index] = name
    names = [slices.class_names[label] for label in slices.labels]
    columns = {"name": slices.names, "label": slices.labels, "class_name": names, "group": slices.groups}
    return pd.DataFrame(columns | {"part": part})


def write_split(path: str | Path, slices: "Slices", split: dict[str, np.ndarray]) -> None:
    """Write :func:`split_table` as CSV, atomically."""
    files.write_csv(path, split_table(slices, split))


def read_split(path: str | Path, slices: "Slices", *, grouped: bool = False) -> dict[str, np.ndarray]:
    """Read a split that :func:`write_split` wrote for these ``slices``.

    Raises ValueError, naming file and slice, when a name is repeated, missing or unknown, a label differs, a
    part is unknown or empty or, with ``grouped``, a group of the file or of ``slices`` lies in two parts.
    """
    table = pd.read_csv(path, keep_default_na=False, dtype={"name": str})
    remedy = f"{path} does not belong to these slices or was edited: run again the notebook that wrote it."
    absent = [column for column in ("name", "label", "group", "part") if column not in table]
    if absent:
        raise ValueError(f"no column {', '.join(absent)}. {remedy}")
    repeated = table.name[table.name.duplicated()]
    if len(repeated):
        raise ValueError(f"{repeated.iloc[0]} appears more than once. {remedy}")
    odd = sorted(set(table.name) ^ set(slices.names))
    if odd:
        where = "the file" if odd[0] in set(table.name) else "the slices"
        raise ValueError(f"{len(odd)} names differ, for example {odd[0]}, only in {where}. {remedy}")
    table = table.set_index("name").loc[list(slices.names)]
    wrong = np.flatnonzero(table.label.to_numpy() != slices.labels)
    if len(wrong):
        raise ValueError(f"{slices.names[wrong[0]]} has another label in the file. {remedy}")
    strange = set(table.part) ^ set(PARTS)
    if strange:
        raise ValueError(f"unknown or empty parts {sorted(strange)}; they must be {PARTS}. {remedy}")
    if grouped:
        for groups in (table.group.to_numpy(), slices.groups):
            spread = table.part.groupby(groups).nunique()
            if (spread > 1).any():
                group = spread.index[spread > 1][0]
                names = [n for n, g in zip(slices.names, groups, strict=True) if g == group]
                raise ValueError(
                    f"group {group} ({', '.join(names[:3])}, ...) lies in more than one part, so "
                    f"near-copies of training slices are tested. {remedy}"
                )
    return {part: np.flatnonzero(table.part.to_numpy() == part) for part in PARTS}


def box_thumbnail(image: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W) averaged in boxes to float32 (side, side)."""
    small = Image.fromarray(image.astype(np.float32)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small)


def unit_thumbnails(images: np.ndarray, side: int) -> np.ndarray:
    """Box-averaged, zero-mean, unit-length thumbnails, float32 (N, side * side): dot products are r.

    ``images`` uint8 (N, H, W), or (N, H, W, C), of which the mean over the channels is taken: copies that
    differ in hue alone are near-duplicates. A constant image is all zeros.
    """
    side = min(side, *images.shape[1:3])
    flat = np.empty((len(images), side * side), dtype=np.float32)
    for i, image in enumerate(images):
        flat[i] = box_thumbnail(image if image.ndim == 2 else image.mean(2), side).ravel()
    for start in range(0, len(flat), _BLOCK):  # in place, for this is the largest array
        block = flat[start : start + _BLOCK]
        block -= block.mean(1, keepdims=True)
        block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-6)
    return flat


def _correlations(thumbnails):
    """Yield (start, r): r of the rows from ``start``, a block of them, with themselves and all later ones."""
    for start in range(0, len(thumbnails), _BLOCK):
        yield start, thumbnails[start : start + _BLOCK] @ thumbnails[start:].T


def _merge(group, members):
    """Give the groups that hold ``members`` the lowest of their ids, in place."""
    own = group[members]
    if (own != own[0]).any():
        ids = np.unique(own)
        group[np.isin(group, ids)] = ids[0]


def file_number(name: str) -> tuple[tuple[str, ...], int | None]:
    """(series, number) of a file name: its last number, None without one, and what is around it.

    p1_01 and p1_02 follow each other in one series, p2_02 is of another.
    """
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    last = re.fullmatch(r"(.*?)(\d+)(\D*)", stem, re.DOTALL)
    return ((last[1], last[3]), int(last[2])) if last else ((stem,), None)


def _neighbours(slices):
    """Index arrays (before, after) of slices with consecutive file numbers in one class and series."""
    numbered = {}  # to lists: case (1).jpg and case (1).png are two files of one number
    for index, (name, label) in enumerate(zip(slices.names, slices.labels.tolist(), strict=True)):
        series, number = file_number(name)
        if number is not None:
            numbered.setdefault(((label, *series), number), []).append(index)
    follows = ((own, numbered.get((series, number + 1), [])) for (series, number), own in numbered.items())
    pairs = [(i, j) for own, after in follows for i in own for j in after]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).T


def _close_neighbours(slices, thumbnails, threshold):
    """Pairs (i, j) of :func:`_neighbours` with r above ``threshold``, int64 (P, 2)."""
    pairs = _neighbours(slices).T
    close = [pairs[:0]]
    for start in range(0, len(pairs), _BLOCK):
        block = pairs[start : start + _BLOCK]
        i, j = block.T
        close.append(block[(thumbnails[i] * thumbnails[j]).sum(1) > threshold])
    return np.concatenate(close)


def _check(labels, groups, least):
    if labels.shape != groups.shape or labels.ndim != 1:
        raise ValueError(f"one group for each label: {groups.shape} groups for {labels.shape} labels.")
    for label in np.unique(labels):
        count = len(np.unique(groups[labels == label]))
        if count < least:
            why = ", one a fold" if least > len(PARTS) else ""
            raise ValueError(f"class {label} has {count} groups or slices; at least {least} are needed{why}.")


def _check_complete(split, count):
    if set(split) != set(PARTS):
        raise ValueError(f"a split has the parts {PARTS}, not {tuple(split)}.")
    index = np.sort(np.concatenate([split[part] for part in PARTS]))
    if not np.array_equal(index, np.arange(count)):
        raise ValueError(f"the parts hold {len(index)} indices; they must hold each of {count} slices once.")
