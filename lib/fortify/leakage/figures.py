"""Figures of notebook 07: the leak meter, and what models classify without some regions."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fortify.evaluation import TRAININGS
from fortify.figures import DOUBLE, SINGLE, image_grid, show_image, styled

_SPLITS = {"random": ("#6b6b6b", "s"), "grouped": ("#1b7837", "o")}  # colour, marker


@styled
def leak_meter_dots(table: pd.DataFrame) -> Figure:
    """Accuracy in % of each leak classifier on both splits: a faint mark per seed, a strong one for the mean.

    ``table`` is :func:`fortify.leakage.leak_meter`; the dashed line is its majority class on random splits.
    """
    names, seeds = list(table.classifier.unique()), table.seed.nunique()
    fig = Figure(figsize=(SINGLE, 1.15 + 0.3 * len(names)), layout="constrained")
    ax = fig.subplots()
    for split, (colour, marker) in _SPLITS.items():
        for row, name in enumerate(names):
            accuracy = 100 * table[table.split.eq(split) & table.classifier.eq(name)].accuracy
            y = row + (-0.16 if split == "random" else 0.16)
            ax.plot(accuracy, [y] * len(accuracy), marker, color=colour, alpha=0.25, ms=3, mew=0)
            ax.plot(
                accuracy.mean(), y, marker, color=colour, label=f"{split} split, mean" if row == 0 else None
            )
    ax.plot([], [], "o", color="0.3", alpha=0.35, ms=3, mew=0, label=f"one of {seeds} seeds")
    baseline = table[table.classifier.eq("majority class") & table.split.eq("random")].accuracy
    if len(baseline):
        look = {"color": "0.4", "ls": "--", "lw": 0.8, "zorder": 0}
        ax.axvline(100 * baseline.mean(), label="largest class", **look)
    ax.set(xlim=(0, 101), ylim=(len(names) - 0.5, -0.5), xlabel="test accuracy (%)")
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    fig.legend(loc="outside lower center", ncols=2)
    return fig


@styled
def region_dots(table: pd.DataFrame, *, majority: Mapping[str, float]) -> Figure:
    """Accuracy in % of both trainings on each view and under each restricted attack; a panel per split.

    ``table`` holds :func:`fortify.leakage.lungs_or_scanner` with ``split`` and ``model``; ``majority`` maps a
    split to the share of its most frequent test class, the dashed line. Bars are 95 % intervals.
    """
    splits, names = list(table.split.unique()), list(table["view"].unique())
    fig = Figure(figsize=(DOUBLE, 1.1 + 0.24 * len(names)), layout="constrained")
    axes = fig.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for ax, split in zip(axes, splits, strict=True):
        for row, model in enumerate(("normal", "adversarial")):
            own = table[table.split.eq(split) & table.model.eq(model)].set_index("view").loc[names]
            look, label = TRAININGS[model], f"{model} training"
            y = np.arange(len(names)) + (row - 0.5) * 0.32
            ax.hlines(y, 100 * own.low, 100 * own.high, color=look.colour, lw=1.6, alpha=0.35)
            ax.plot(100 * own.accuracy, y, look.marker, color=look.colour, label=label, clip_on=False)
        ax.plot([], [], "-", color="0.4", lw=1.6, alpha=0.5, label="95 % Wilson interval")
        ax.axvline(100 * majority[split], color="0.4", ls="--", lw=0.8, zorder=0, label="largest class")
        ax.axhline((~own.attacked).sum() - 0.5, color="0.7", lw=0.6)
        ax.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="test accuracy (%)")
        ax.set_title(f"{split} split: {own.n.iloc[0]} test slices")
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


@styled
def region_examples(shown: Mapping[str, np.ndarray], lungs: np.ndarray, *, labels: Sequence[str]) -> Figure:
    """What a model is shown: a row per image, a column per view, the lung mask outlined on the whole image.

    ``shown`` is :func:`fortify.leakage.probes.views` and ``lungs`` the masks, bool (N, H, W), of the same few
    images; ``labels`` are their row labels.
    """
    fig, axes = image_grid(len(lungs), len(shown), DOUBLE, top=0.3)
    for column, (name, images) in enumerate(shown.items()):
        for ax, image in zip(axes[:, column], images, strict=True):
            show_image(ax, image, vmin=0, vmax=255)
        axes[0, column].set_title(name.replace(" at ", "\nat ").replace(" elsewhere", "\nelsewhere"))
    for ax, mask, label in zip(axes[:, 0], lungs, labels, strict=True):
        if mask.any():
            ax.contour(mask, levels=[0.5], colors="#e08214", linewidths=0.8)
        ax.set_ylabel(label)
    return fig
