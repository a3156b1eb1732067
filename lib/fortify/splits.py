"""Train, validation and test: at random, or with near-duplicate slices kept on one side.

A *split* is a dict ``{"train": index, "val": index, "test": index}`` of sorted int64 arrays that together
hold every slice once. Slices of one patient are near-copies of each other, so a random split asks a model
to recognise patients it has seen; :func:`grouped_split` does not. Its seeds are folds of a cross-validation.
"""

import re

import numpy as np
import pandas as pd
import scipy  # loads its parts when they are first used: reading a split waits for none
from PIL import Image

from fortify import files

PARTS = ("train", "val", "test")
FOLDS = 5  # of the cross-validation by groups
_BLOCK = 1024  # rows of the correlation matrix held at a time
_TRIES = 256  # assignments drawn to part groups, of which the best-balanced is kept


def near_duplicate_groups(slices, *, threshold=0.93, neighbour_threshold=0.80, side=56):
    """Group ids 0..G-1, int64 (N,), of slices that are likely to show one patient.

    Two slices are linked when the correlation r of their thumbnails (box-averaged to ``side`` pixels or the
    slices' own size if that is smaller) exceeds ``threshold``; when they have consecutive file numbers in one
    class, as neighbours of a scan do, and r exceeds ``neighbour_threshold``; and when their pixels are
    identical. Groups are the connected components and may span classes: the data hold such pairs.
    They stand in for unknown patients; report how the result depends on the thresholds.
    """
    exact = exact_duplicates(slices.images)
    first = np.unique(exact, return_index=True)[1][exact]
    links = [np.stack([np.arange(len(slices)), first])]
    thumbnails = unit_thumbnails(slices.images, side)
    links += [np.stack(pair[:2]) for pair in _correlated(thumbnails, threshold)]
    before, after = _neighbours(slices)
    near = (thumbnails[before] * thumbnails[after]).sum(1) > neighbour_threshold
    links.append(np.stack([before[near], after[near]]))
    row, column = np.concatenate(links, axis=1)
    graph = scipy.sparse.coo_array((np.ones(len(row), bool), (row, column)), shape=(len(slices), len(slices)))
    return scipy.sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)


def exact_duplicates(images):
    """Ids 0..K-1, int64 (N,), in order of appearance; images share one when their pixels are identical."""
    seen = {}
    return np.array([seen.setdefault(image.tobytes(), len(seen)) for image in images], dtype=np.int64)


def label_conflicts(slices, *, threshold=0.99, side=56):
    """Pairs of nearly identical slices in different classes, most alike first, as a DataFrame.

    Columns: name, class_name, twin, twin_class_name and r, the correlation of their thumbnails (> threshold).
    """
    pairs = list(_correlated(unit_thumbnails(slices.images, side), threshold))
    i, j, r = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    across = slices.labels[i] != slices.labels[j]
    names, classes = np.array(slices.names, object), np.array(slices.class_names, object)[slices.labels]
    columns = {"name": names[i], "class_name": classes[i], "twin": names[j], "twin_class_name": classes[j]}
    table = pd.DataFrame(columns | {"r": r.astype(float)})[across]
    return table.sort_values(["r", "name", "twin"], ascending=[False, True, True], ignore_index=True)


def pairwise_agreement(groups, patients):
    """(precision, recall) of "these two slices are of one patient", over all pairs of slices.

    ``groups`` and ``patients`` (N,) are ids. A recall below 1 is a patient torn apart, which can leak; a
    precision below 1 is patients merged, which only makes a grouped split stricter.
    """
    upper = np.triu_indices(len(groups), 1)
    same_group = (groups[:, None] == groups)[upper]
    same_patient = (patients[:, None] == patients)[upper]
    both = (same_group & same_patient).sum()
    return float(both / same_group.sum()), float(both / same_patient.sum())


def twin_share(slices, split, *, threshold=0.99, side=56):
    """Share of test slices with a training slice whose thumbnail correlates above ``threshold``."""
    thumbnails = unit_thumbnails(slices.images, side)
    return float(
        np.mean((thumbnails[split["test"]] @ thumbnails[split["train"]].T).max(1, initial=-1) > threshold)
    )


def random_split(labels, *, seed, fractions=(0.7, 0.15, 0.15)):
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


def grouped_split(labels, groups, *, seed, folds=FOLDS, val=0.1):
    """Fold ``seed % folds`` of a cross-validation by groups: whole groups into train, val and test.

    Seeds 0 to ``folds - 1`` are the folds of one division, which together test every slice once; the next
    ``folds`` seeds are those of another. Of the rest, a share of about ``val`` of all slices is for
    validation. Each class is divided as evenly as the groups allow. With the defaults 1,097 slices become
    about 768, 110 and 219: as many to train on as :func:`random_split` gives.
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


def split_table(slices, split):
    """One row a slice, in the slices' order: name, label, class_name, group, part."""
    _check_complete(split, len(slices))
    part = np.empty(len(slices), object)
    for name, index in split.items():
        part[index] = name
    names = [slices.class_names[label] for label in slices.labels]
    columns = {"name": slices.names, "label": slices.labels, "class_name": names, "group": slices.groups}
    return pd.DataFrame(columns | {"part": part})


def write_split(path, slices, split):
    """Write :func:`split_table` as CSV, atomically."""
    files.write_csv(path, split_table(slices, split))


def read_split(path, slices, *, grouped=False):
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


def unit_thumbnails(images, side):
    """Box-averaged, zero-mean, unit-length thumbnails, float32 (N, side * side): dot products are r."""
    side = min(side, *images.shape[1:])
    small = [Image.fromarray(i.astype(np.float32)).resize((side, side), Image.Resampling.BOX) for i in images]
    flat = np.array([np.asarray(i).ravel() for i in small], dtype=np.float32).reshape(len(images), -1)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _correlated(thumbnails, threshold):
    """Yield (i, j, r) arrays of the pairs i < j with r above ``threshold``, block by block."""
    for start in range(0, len(thumbnails), _BLOCK):
        r = thumbnails[start : start + _BLOCK] @ thumbnails[start:].T
        i, j = np.nonzero(np.triu(r > threshold, k=1))
        yield i + start, j + start, r[i, j]


def file_number(name):
    """(series, number) of a file name: its last number, None without one, and what stands around it.

    p1_01 and p1_02 follow each other in one series, p2_02 is of another.
    """
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    last = re.fullmatch(r"(.*?)(\d+)(\D*)", stem, re.DOTALL)
    return ((last[1], last[3]), int(last[2])) if last else ((stem,), None)


def _neighbours(slices):
    """Index arrays (before, after) of slices with consecutive file numbers in one class and series."""
    numbered = {}
    for index, (name, label) in enumerate(zip(slices.names, slices.labels, strict=True)):
        series, number = file_number(name)
        if number is not None:
            numbered[(label, *series), number] = index
    pairs = [(i, numbered[s, n + 1]) for (s, n), i in numbered.items() if (s, n + 1) in numbered]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).T


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
