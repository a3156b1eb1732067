"""Figures of notebooks 06 and 09, the published operations on one image and the matrix; and README's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fortify.evaluation import TRAININGS
from fortify.figures import DOUBLE, SINGLE, image_grid, show_image, styled

_SPLITS = {"random": ("random split", "#6b6b6b", "s"), "grouped": ("unseen groups", "#1b7837", "o")}


@dataclass(frozen=True)
class Panel:
    """A changed image (H, W, 3) in units of [0, 1], what the model says of it, and of ``n`` such images."""

    title: str
    image: np.ndarray
    prediction: int
    probability: float
    k: int  # of all test images changed in this way, those classified correctly
    n: int


@styled
def tone_curves(curves: Mapping[str, np.ndarray], images: np.ndarray) -> Figure:
    """What clamp and tanh make of each grey level, as functions, above the share of each in ``images``.

    ``curves`` is :func:`fortify.examined.protocol.curve_values`; ``images`` are uint8.
    """
    fig = Figure(figsize=(SINGLE, 2.9), layout="constrained")
    ax, below = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    looks = {"unchanged": ("0.5", ":"), "clamp": ("#b35806", "-"), "tanh": ("#542788", "--")}
    for name, values in curves.items():
        colour, dashes = looks[name]
        ax.plot(np.arange(256), values, color=colour, ls=dashes, label=name)
    ax.set(ylabel="grey level shown\nto the network", xlim=(0, 255), ylim=(0, 255))
    ticks = (0, 64, 128, 192, 255)
    ax.set(xticks=ticks, yticks=ticks)
    ax.grid()
    ax.legend(loc="upper left")
    shares = 100 * np.bincount(np.asarray(images).ravel(), minlength=256) / np.asarray(images).size
    below.bar(np.arange(0, 256, 8) + 3.5, shares.reshape(32, 8).sum(1), 7, color="0.6")
    below.set(xlabel="grey level of the slice (0 to 255)", ylabel="pixels\n(%)")
    return fig


@styled
def protocol_strip(panels: Sequence[Panel], *, label: int, class_names: Sequence[str]) -> Figure:
    """One image under several operations, above what each changed, on one scale in grey levels of 255.

    ``panels`` are :class:`Panel` objects, the original first. A wrong prediction has a thick frame and a
    cross. A change too small to be seen is multiplied by a power of two, which stands in its picture. The
    last line says how many of all test images the model classifies correctly.
    """
    fig, axes = image_grid(2, len(panels), DOUBLE, below=0.28, top=0.1)
    for column, panel in enumerate(panels):
        top, bottom = axes[:, column]
        change = (panel.image - panels[0].image).mean(2) * 255
        wrong = panel.prediction != label
        show_image(top, np.clip(panel.image, 0, 1), wrong=wrong)
        top.set_title(panel.title)
        mark = "✗" if wrong else "✓"
        top.set_xlabel(f"{mark} {class_names[panel.prediction]} ({panel.probability:.2f})", labelpad=2)
        size = np.abs(panel.image - panels[0].image).max() * 255
        factor = _magnified(size)
        drawn = show_image(bottom, factor * change, vmin=-_CHANGE, vmax=_CHANGE, cmap="RdBu_r")
        if factor > 1:
            badge = {"boxstyle": "square,pad=0.2", "fc": "white", "ec": "black", "lw": 0.6}
            place = {"transform": bottom.transAxes, "ha": "left", "va": "top", "bbox": badge}
            bottom.text(0.04, 0.96, f"×{factor}", **place)
        words = f"at most {size:.{0 if size >= 10 else 1}f} levels" if column else "none"
        bottom.set_xlabel(f"{words}\n{panel.k} of {panel.n} correct", labelpad=2)
    axes[0, 0].set_ylabel(f"true class: {class_names[label]}")
    axes[1, 0].set_ylabel("change")
    bar = fig.colorbar(drawn, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("change (grey levels of 255)")
    return fig


_CHANGE, _SMALL = 128, 16  # grey levels: the end of the scale, and what cannot be seen on it


def _magnified(size):
    """The power of two that makes a change of up to ``size`` grey levels visible; 1 where it is already."""
    return int(2 ** np.floor(np.log2(_CHANGE / size))) if 1e-3 < size < _SMALL else 1


@styled
def matrix_dots(table: pd.DataFrame) -> Figure:
    """Accuracy in % of each training under each evaluation, with 95 % intervals; a panel per split.

    ``table`` is :func:`fortify.examined.matrix.matrix`; titles count the predictions of one evaluation.
    """
    splits = list(table.split.unique())
    names = table.sort_values("order").evaluation.unique()
    fig = Figure(figsize=(DOUBLE, 0.6 + 0.27 * len(names)), layout="constrained")
    axes = fig.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    models = [model for model in TRAININGS if model in set(table.model)]
    for ax, split in zip(axes, splits, strict=True):
        for row, model in enumerate(models):
            own = table[table.split.eq(split) & table.model.eq(model)].set_index("evaluation").loc[names]
            look = TRAININGS[model]
            y = np.arange(len(names)) + (row - (len(models) - 1) / 2) * 0.17
            ax.hlines(y, 100 * own.low, 100 * own.high, color=look.colour, lw=1.6, alpha=0.35)
            face = "white" if model == "tone curves" else look.colour
            ax.plot(
                100 * own.accuracy,
                y,
                look.marker,
                color=look.colour,
                mfc=face,
                label=model,
                ms=4.2,
                clip_on=False,
            )
        for edge in np.arange(len(names) - 1) + 0.5:
            ax.axhline(edge, color="0.9", lw=0.6)
        ax.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.6), xlabel="accuracy (%)")
        clean = table[table.split.eq(split) & table.evaluation.eq(names[0])].iloc[0]
        seeds = f"{clean.seeds} seed" + ("s" if clean.seeds > 1 else "")
        ax.set_title(f"{split} split: {clean.n} predictions, {seeds}")
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
    handles = axes[0].get_legend_handles_labels()
    fig.legend(
        *handles,
        loc="outside lower center",
        ncols=len(models),
        title="training (bars: 95 % Wilson intervals)",
    )
    return fig


@dataclass(frozen=True)
class Picture:
    """A slice (H, W) or (H, W, 3) in [0, 1], its title, what is said below it, and whether that is wrong."""

    title: str
    image: np.ndarray
    words: str
    wrong: bool = False


@styled
def finding_figure(pictures: Sequence[Picture], standings: pd.DataFrame) -> Figure:
    """README's figure: slices above accuracies in percent by split, with 95 % intervals.

    ``standings`` has a row for each classifier, split and panel: classifier, shown (the panel's title),
    split, accuracy, low, high.
    """
    names, panels = list(standings.classifier.unique()), list(standings.shown.unique())
    fig = Figure(figsize=(DOUBLE, 3.1 + 0.28 * len(names)), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(2.3, 0.8 + 0.28 * len(names)))
    text = {"size": 8.5}
    for ax, picture in zip(top.subplots(1, len(pictures)), pictures, strict=True):
        show_image(ax, np.clip(picture.image, 0, 1), wrong=picture.wrong)
        ax.set_title(picture.title, **text)
        ax.set_xlabel(picture.words, labelpad=3, **text)
    axes = bottom.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=False):
        for split, (label, colour, marker) in _SPLITS.items():
            own = standings[standings.split.eq(split) & standings.shown.eq(panel)]
            own = own.set_index("classifier").reindex(names)
            y = np.arange(len(names)) + (-0.15 if split == "random" else 0.15)
            ax.hlines(y, own.low, own.high, color=colour, lw=2, alpha=0.4)
            ax.plot(own.accuracy, y, marker, color=colour, label=label, ms=5, clip_on=False)
        ax.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
        ax.set_title(panel, **text)
        ax.set_xlabel("slices classified correctly (%)", **text)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelsize=8.5)
        ax.grid(axis="x")
    axes[0].set_yticks(range(len(names)), names, **text)
    handles = axes[0].get_legend_handles_labels()
    bottom.legend(*handles, loc="outside lower center", ncols=2, fontsize=8.5)
    return fig
