"""Figure of notebook 13: what detectors catch, and what is left of the accuracy."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fortify.figures import DOUBLE, styled

_LOOKS = {  # attack: colour, marker, words; apart for the colour-blind and in grey
    "pgd": ("#0b4f8a", "o", "attackers who do not know the detector"),
    "adaptive": ("#e08214", "s", "attackers who know it"),
}


@styled
def detector_dots(
    table: pd.DataFrame, claims: pd.DataFrame, *, trained: tuple[float, float] | None = None
) -> Figure:
    """Left: share of successful attacks that raise an alarm. Right: accuracy with rejection under attack.

    ``table`` is :func:`fortify.detect.summary`, ``claims`` :func:`fortify.detect.implied`; percent, with
    95 % intervals. Who does not know the detector uses PGD on the left, PGD and FGSM on the right.
    ``trained``: accuracy of adversarial training without a detector at the budget and at half of it,
    fractions; its lines are drawn on the right.
    """
    mpl.rcParams.update(dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize"), 8))
    mpl.rcParams.update(dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 8))
    names = list(table.detector.unique())
    fig = Figure(figsize=(DOUBLE, 1.2 + 0.32 * len(names)), layout="constrained")
    left, right = fig.subplots(1, 2, sharey=True)
    for place, (attack, (colour, marker, words)) in enumerate(_LOOKS.items()):
        y = np.arange(len(names)) + (place - 0.5) * 0.3
        own = table[table.attack.eq(attack)].set_index("detector").reindex(names)
        right_of = claims.set_index("detector").loc[names]
        column = "adaptive" if attack == "adaptive" else "claimed"
        for ax, found, name in ((left, own, "detection"), (right, right_of, column)):
            ax.hlines(
                y, 100 * found[f"{name}_low"], 100 * found[f"{name}_high"], color=colour, lw=1.6, alpha=0.4
            )
            ax.plot(100 * found[name], y, marker, color=colour, clip_on=False, label=words)
    left.set_title("successful attacks that raise an alarm")
    right.set_title("correct or rejected, under attack")
    for share, style, words in zip(
        trained or (), ("-", (0, (1, 2))), ("the budget", "half of it"), strict=False
    ):
        if not np.isnan(share):
            right.axvline(
                100 * share,
                color="0.4",
                lw=0.9 if style == "-" else 2.4,
                ls=style,
                zorder=0,
                label=f"adversarial training, at {words}",
            )
    for ax in (left, right):
        ax.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="share (%)")
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
    left.set_yticks(range(len(names)), names)
    fig.suptitle(f"{claims.n.max()} slices; bars: 95 % interval by groups", fontsize=8)
    fig.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig
