"""Figures of explanations: maps beside the slice they explain, and what the measures say of them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fortify.figures import DOUBLE, show_image, styled


@styled
def map_panel(rows: Sequence[tuple[str, np.ndarray, dict[str, np.ndarray]]]) -> Figure:
    """One slice under several networks, clean and attacked: a line each, the slice and then its maps.

    ``rows`` are (title, image (H, W) in [0, 1], {method: map (H, W)}), all of the same methods. A map has a
    scale of its own, up to its 99th percentile.
    """
    methods = list(rows[0][2])
    columns = 1 + len(methods)
    fig = Figure(figsize=(DOUBLE, DOUBLE / columns * len(rows) * 1.08 + 0.3), layout="constrained")
    axes = fig.subplots(len(rows), columns, squeeze=False)
    for line, (title, image, maps) in zip(axes, rows, strict=True):
        show_image(line[0], image)
        line[0].set_ylabel(title)
        for ax, method in zip(line[1:], methods, strict=True):
            ax.imshow(maps[method], cmap="magma", vmin=0, vmax=np.percentile(maps[method], 99) or 1)
            ax.set(xticks=[], yticks=[])
    for ax, name in zip(axes[0], ["slice", *methods], strict=True):
        ax.set_title(name)
    return fig


@styled
def measure_dots(table: pd.DataFrame, *, measures: dict[str, str]) -> Figure:
    """Means of the measures with their intervals, a panel a measure and a line a map.

    ``table``: measure, map, model, mean, low, high, floor. ``measures`` {name in the table: axis label}. The
    floor, what a map gets that knows nothing, is dotted.
    """
    looks = {"normal": ("#e08214", "s", -0.15), "adversarial": ("#0b4f8a", "o", 0.15), "": ("0.4", "D", 0.0)}
    maps = list(table["map"].unique())
    fig = Figure(figsize=(DOUBLE, 1.1 + 0.24 * len(maps)), layout="constrained")
    axes = fig.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for ax, (measure, label) in zip(axes, measures.items(), strict=True):
        own = table[table.measure.eq(measure)]
        for model, of_model in own.groupby("model", sort=False):
            colour, marker, shift = looks[model]
            at = np.array([maps.index(name) for name in of_model["map"]]) + shift
            ax.hlines(at, of_model.low, of_model.high, color=colour, lw=1)
            ax.plot(of_model["mean"], at, marker, color=colour, label=model or "control")
        ax.axvline(own.floor.mean(), color="0.4", lw=0.8, ls=":", label="floor")
        ax.set(xlabel=label)
        ax.set_yticks(range(len(maps)), maps)
        ax.grid(axis="x")
    axes[0].invert_yaxis()
    handles, labels = zip(*(ax.get_legend_handles_labels() for ax in axes), strict=True)
    shown = dict(zip(sum(labels, []), sum(handles, []), strict=True))  # each label once
    fig.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown))
    return fig


@styled
def cascade_lines(table: pd.DataFrame) -> Figure:
    """Rank correlation with the network's own maps while layers are drawn anew, a panel a network.

    ``table``: the rows "cascade" of :func:`fortify.explain.sanity`, with intervals as bars. The floor, two
    different slices' correlation, is dotted: a map that stays above it does not depend on what was learnt.
    """
    models, methods = table.model.unique(), list(table["map"].unique())
    fig = Figure(figsize=(DOUBLE, 2.6), layout="constrained")
    axes = fig.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for ax, name in zip(axes, models, strict=True):
        own = table[table.model.eq(name)]
        for i, method in enumerate(methods):
            line = own[own["map"].eq(method)]
            spread = (line["mean"] - line.low, line.high - line["mean"])
            style = {"marker": "osD^v"[i % 5], "ms": 4, "lw": 1, "color": f"C{i}", "label": method}
            ax.errorbar(line.layers + 0.06 * (i - 1.5), line["mean"], spread, elinewidth=0.8, **style)
        ax.axhline(own.floor.mean(), color="0.4", lw=0.8, ls=":", label="floor: two different slices")
        ax.set(
            title=f"{name} training",
            xlabel="last layers drawn anew",
            xticks=sorted(set(own.layers.astype(int))),
        )
    axes[0].set_ylabel("rank correlation")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig
