"""Figures of notebooks 06 and 09: the published operations on one image, and the matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fortify.evaluation import TRAININGS
from fortify.figures import DOUBLE, image_grid, show_image, styled


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
def protocol_strip(panels: Sequence[Panel], *, label: int, class_names: Sequence[str]) -> Figure:
    """One image under several operations, above what each changed, on one scale in grey levels of 255.

    ``panels`` are :class:`Panel` objects, the original first. A wrong prediction has a thick frame and a
    cross; the last line says how many of all test images the model still reads.
    """
    fig, axes = image_grid(2, len(panels), DOUBLE, below=0.2, top=0.1)
    for column, panel in enumerate(panels):
        top, bottom = axes[:, column]
        change = (panel.image - panels[0].image).mean(2) * 255
        wrong = panel.prediction != label
        show_image(top, np.clip(panel.image, 0, 1), wrong=wrong)
        top.set_title(panel.title)
        mark = "✗" if wrong else "✓"
        top.set_xlabel(f"{mark} {class_names[panel.prediction]} ({panel.probability:.2f})", labelpad=2)
        drawn = show_image(bottom, change, vmin=-128, vmax=128, cmap="RdBu_r")
        size = np.abs(panel.image - panels[0].image).max() * 255
        words = f"at most {size:.1f}/255" if column else "none"
        share = f"reads {panel.k}/{panel.n} ({panel.k / panel.n:.0%})"
        bottom.set_xlabel(f"{words}\n{share}", labelpad=2)
    axes[0, 0].set_ylabel(f"true class: {class_names[label]}")
    axes[1, 0].set_ylabel("change")
    bar = fig.colorbar(drawn, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("change of grey (levels of 255)")
    return fig


@styled
def matrix_dots(table: pd.DataFrame) -> Figure:
    """Accuracy in % of each training under each evaluation, with 95 % intervals; a panel per split.

    ``table`` is :func:`fortify.examined.matrix.matrix`.
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
        ax.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.6), xlabel="accuracy (%)", title=f"{split} split")
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=len(models), title="training")
    return fig
