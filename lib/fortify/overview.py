"""What notebook 01 shows of the data: slices beside their nearest in training, groups, the answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fortify.figures import DOUBLE, image_grid, show_image, styled
from fortify.splits import THUMBNAIL, nearest_in_training, unit_thumbnails

if TYPE_CHECKING:
    from fortify.data import Slices


@dataclass(frozen=True)
class Neighbours:
    """A test slice, and for each kind of split the training slice most like it: {split: (index, r)}."""

    index: int
    found: Mapping[str, tuple[int, float]]


def leak_examples(
    slices: "Slices", drawn: Mapping[tuple[str, int], Mapping[str, np.ndarray]]
) -> list[Neighbours]:
    """One test slice of each class with its nearest training slices, by a rule and not by eye.

    ``drawn`` is {(split, seed): parts}. Of the slices of a class that are tested on every kind of split, the
    one whose r on the first kind is the (lower) median; of several seeds that test a slice, the first
    counts. A class without such a slice is left out.
    """
    thumbnails = unit_thumbnails(slices.images, THUMBNAIL)
    kinds = list(dict.fromkeys(split for split, _ in drawn))
    nearest = {split: np.full(len(slices), -1, np.int64) for split in kinds}
    r = {split: np.full(len(slices), np.nan, np.float32) for split in kinds}
    for (split, _), parts in drawn.items():
        test = np.asarray(parts["test"])
        test = test[nearest[split][test] < 0]
        nearest[split][test], r[split][test] = nearest_in_training(thumbnails, test, parts["train"])
    tested = np.all([nearest[split] >= 0 for split in kinds], axis=0)
    examples = []
    for label in range(len(slices.class_names)):
        own = np.flatnonzero(tested & (slices.labels == label))
        if len(own):
            at = own[np.argsort(r[kinds[0]][own], kind="stable")[(len(own) - 1) // 2]]
            found = {split: (int(nearest[split][at]), float(r[split][at])) for split in kinds}
            examples.append(Neighbours(int(at), found))
    return examples


@styled
def neighbour_panels(slices: "Slices", examples: list[Neighbours]) -> Figure:
    """Each of :func:`leak_examples` above its nearest training slice on each kind of split, with r."""
    kinds, width = list(examples[0].found), min(DOUBLE, DOUBLE / 4 * len(examples))
    fig, axes = image_grid(1 + len(kinds), len(examples), width, below=0.3, top=0.1)
    for column, example in zip(axes.T, examples, strict=True):
        column[0].set_title(slices.class_names[slices.labels[example.index]])
        shown = [(example.index, "")]
        shown += [(index, f"r = {_floored(r)}") for index, r in example.found.values()]
        for ax, (index, words) in zip(column, shown, strict=True):
            show_image(ax, slices.images[index], vmax=255)
            ax.set_xlabel("\n".join(filter(None, (Path(slices.names[index]).stem, words))), labelpad=2)
    axes[0, 0].set_ylabel("test slice")
    for row, split in zip(axes[1:], kinds, strict=True):
        row[0].set_ylabel(f"nearest in training,\n{split} split")
    return fig


def _floored(r):
    """To three digits, cut off: 1.000 is said of identical thumbnails alone."""
    return f"{np.floor(1000 * min(r + 1e-6, 1)) / 1000:.3f}"


@styled
def group_sizes(slices: "Slices") -> Figure:
    """A bar for each group of near-duplicates, largest first, in a panel for each main class."""
    counts = pd.crosstab(slices.groups, slices.labels).reindex(
        columns=range(len(slices.class_names)), fill_value=0
    )
    main = counts.to_numpy().argmax(1)
    shares = [max((main == label).sum(), 4) for label in range(len(slices.class_names))]
    fig = Figure(figsize=(DOUBLE, 2.0), layout="constrained")
    axes = fig.subplots(1, len(shares), sharey=True, squeeze=False, width_ratios=shares)[0]
    for label, ax in enumerate(axes):
        own = counts[main == label]
        own = own.assign(all=own.sum(axis=1)).sort_values("all", ascending=False, kind="stable")
        at = np.arange(len(own))
        ax.bar(at, own[label], 0.8, color="#0b4f8a", label="slices of this class")
        ax.bar(at, own["all"] - own[label], 0.8, bottom=own[label], color="#e08214", label="of another class")
        ax.set_title(f"{slices.class_names[label]}: {len(own)} groups")
        ax.set(xticks=[], xlim=(-0.6, max(len(own), 1) - 0.4))
        ax.grid(axis="y")
    axes[0].set_ylabel("slices in the group")
    fig.supxlabel("groups, largest first", size=8)
    mixed = (counts.gt(0).sum(axis=1) > 1).any()
    if mixed:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def splits_table(table: pd.DataFrame) -> pd.DataFrame:
    """Notebook 01's splits for a reader: a display line a kind of split.

    ``table`` has the columns split, seed, train, val, test and twins, the share of test slices with a
    near-duplicate in training. Counts are those of the first seed.
    """
    lines = []
    for split, own in table.groupby("split", sort=False):
        line = {"split": split, "seeds": str(len(own))} | {
            n: own[n].iloc[0] for n in ("train", "val", "test")
        }
        lines.append(line | {"near-duplicate in training": _share(own.twins)})
    return pd.DataFrame(lines)


def _share(shares):
    """Of the seeds: their mean, and the range where they differ."""
    low, mean, high = (f"{100 * share:.0f}" for share in (shares.min(), shares.mean(), shares.max()))
    return f"{mean} %" if low == high else f"{mean} % ({low} to {high} over {len(shares)} seeds)"


def data_answer(slices: "Slices", table: pd.DataFrame, *, conflicts: int, threshold: float) -> str:
    """The sentences that open notebook 01, as Markdown.

    ``slices`` hold their groups, ``table`` is as in :func:`splits_table`, ``conflicts`` are pairs of nearly
    identical slices in different classes, ``threshold`` is the r above which a slice is a near-duplicate.
    """
    names, sizes = slices.class_names, np.unique(slices.groups, return_counts=True)[1]
    counts = np.bincount(slices.labels, minlength=len(names))
    listed = ", ".join(f"{count} {name}" for count, name in zip(counts, names, strict=True))
    lines = [f"**{len(slices):,} slices**: {listed}."]
    text = f"They form **{len(sizes)} groups** of similar slices, each of {sizes.min()} to {sizes.max()}. "
    if slices.patients is None:
        text += "The dataset does not identify patients. Groups stand in for them."
    else:
        text += f"They come from {len(np.unique(slices.patients))} patients."
    lines.append(text)
    shares = {split: own.twins for split, own in table.groupby("split", sort=False)}
    for split, own in shares.items():
        lines.append(
            f"On the **{split} split** {_share(own)} of the test slices have a near-duplicate in training, a "
            f"slice that correlates above {threshold:g}."
        )
    if len(shares) == 2 and (gap := shares["random"].mean() - shares["grouped"].mean()) > 0.1:
        lines[-1] += f" That is {100 * gap:.0f} points fewer: **a random split also tests memory.**"
    if conflicts:
        lines.append(
            f"{conflicts} pairs of nearly identical slices carry different labels, so not all labels can be "
            "right."
        )
    return "\n".join(f"- {line}" for line in lines)
