"""Figures of notebook 11: who falls for whose attacks, and nodules beside what their size says."""

from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fortify.evaluation import TRAININGS
from fortify.figures import DOUBLE, styled

_TEXT = {
    name: 8
    for name in ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize")
}
_TEXT |= {"legend.fontsize": 8, "legend.title_fontsize": 8}
_UNITS = {"slice": ("#0b4f8a", "o"), "nodule": ("#e08214", "s")}  # colour, marker


def _legible(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Text of 8 pt where the paper's style has 7 and 7.5."""

    def drawn(*args, **kwargs):
        with mpl.rc_context(_TEXT):
            return function(*args, **kwargs)

    drawn.__doc__, drawn.__name__ = function.__doc__, function.__name__
    return drawn


@styled
@_legible
def transfer_matrix(table: pd.DataFrame, *, attack: str) -> Figure:
    """Share in % of each target's images that one ``attack``, crafted on each source, has misclassified.

    ``table`` is :func:`fortify.transfer.transfer_table`; rows of it that are of a single attack (noise, the
    ensemble) are shown whatever it is called. Framed: source and target are one model. Empty: no image that
    both classify correctly.
    """
    single = table.groupby("source").attack.transform("nunique").eq(1)
    own = table[table.attack.eq(attack) | single]
    shares = own.pivot(index="source", columns="target", values="accuracy")
    shares = shares.loc[own.source.unique(), own.target.unique()]
    rows, columns = shares.shape
    fig = Figure(figsize=(DOUBLE, 1.3 + 0.26 * rows), layout="constrained")
    ax = fig.subplots()
    drawn = ax.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(shares.to_numpy()):
        if np.isnan(share):
            continue
        colour = "white" if share > 0.55 else "black"
        ax.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour)
        if shares.index[row] == shares.columns[column]:
            ax.add_patch(
                mpl.patches.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=1.5, ec="black")
            )
    ax.set_xticks(range(columns), shares.columns, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(rows), shares.index)
    ax.set(xlabel="target", ylabel="source of the attack")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    fig.colorbar(drawn, ax=ax, label=f"misclassified (%), {attack}", shrink=0.8, aspect=25)
    return fig


@styled
@_legible
def nodule_dots(table: pd.DataFrame) -> Figure:
    """Accuracy in % by slice and by nodule of every model, a panel for all nodules and one for the middle
    sizes.

    ``table`` is :func:`fortify.transfer.nodule_accuracies`. Bars are 95 % intervals that draw whole patients;
    the band is that of the diameter alone, by nodule: no network is to be praised that stays in it.
    """
    subsets = list(table.nodules.unique())
    names = table[["split", "model"]].drop_duplicates().apply(tuple, axis=1).tolist()
    fig = Figure(figsize=(DOUBLE, 1.0 + 0.34 * len(names)), layout="constrained")
    axes = fig.subplots(1, len(subsets), sharey=True, squeeze=False)[0]
    for ax, subset in zip(axes, subsets, strict=True):
        for shift, (unit, (colour, marker)) in zip((-0.17, 0.17), _UNITS.items(), strict=True):
            own = table[table.nodules.eq(subset) & table.unit.eq(unit)].set_index(["split", "model"])
            own = own.reindex(pd.MultiIndex.from_tuples(names))
            y = np.arange(len(names)) + shift
            ax.hlines(y, 100 * own.group_low, 100 * own.group_high, color=colour, lw=1.6, alpha=0.4)
            ax.plot(100 * own.accuracy, y, marker, color=colour, label=f"by {unit}", clip_on=False)
        size = own[own.index.get_level_values(1).str.startswith("diameter")]
        for row in size.itertuples():
            ax.axvspan(100 * row.group_low, 100 * row.group_high, color="0.9", zorder=0)
        ax.set(
            xlim=(0, 100),
            ylim=(len(names) - 0.5, -0.5),
            xlabel="test accuracy (%)",
            title=f"nodules: {subset}",
        )
        ax.set_yticks(range(len(names)), [f"{model} ({split})" for split, model in names])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


@styled
@_legible
def nodule_attacks(table: pd.DataFrame) -> Figure:
    """Accuracy in % of each model, clean and under each attack, by slice, with intervals that draw patients
    and with the number of slices.

    ``table`` is :func:`fortify.transfer.nodules.attacked_table`.
    """
    own = table[table.unit.eq("slice") & ~table.attack.isin(("combined", "worst"))]
    attacks, models = list(own.attack.unique()), list(own.model.unique())
    fig = Figure(figsize=(DOUBLE, 1.1 + 0.3 * len(models)), layout="constrained")
    fig.suptitle(f"{own.n.max()} slices; bars: 95 % interval by patients", fontsize=8)
    axes = fig.subplots(1, len(attacks), sharey=True, squeeze=False)[0]
    for ax, attack in zip(axes, attacks, strict=True):
        part = own[own.attack.eq(attack)].set_index("model").reindex(models)
        for y, (name, row) in enumerate(part.iterrows()):
            look = next((TRAININGS[t] for t in ("adversarial", "normal") if name.endswith(t)), None)
            colour, marker = (look.colour, look.marker) if look else ("0.35", "^")
            if np.isnan(row.accuracy):
                ax.text(50, y, "not run", ha="center", va="center", color="0.45")
                continue
            ax.hlines(y, 100 * row.group_low, 100 * row.group_high, color=colour, lw=1.6, alpha=0.4)
            ax.plot(100 * row.accuracy, y, marker, color=colour, clip_on=False)
        title = attack if attack == "clean" else attack.upper()
        ax.set(xlim=(0, 100), ylim=(len(models) - 0.5, -0.5), xlabel="accuracy (%)", title=title)
        ax.set_yticks(range(len(models)), models)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
    return fig
