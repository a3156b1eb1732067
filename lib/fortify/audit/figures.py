"""Figure of notebook 08: the verdicts of an audit, and which checks catch which mutant."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fortify.audit.context import FAIL, NOT_RUN, PASS
from fortify.figures import DOUBLE, styled

_LOOKS = {PASS: ("white", "black", ""), FAIL: ("0.15", "white", ""), NOT_RUN: ("0.9", "0.3", "////")}


@styled
def audit_matrix(verdicts: pd.DataFrame, mutants: pd.DataFrame) -> Figure:
    """What the audit said: left each check of each model, right which checks caught which mutant.

    ``verdicts`` has the columns model, id, check, verdict (:attr:`fortify.audit.Audit.table` of each model,
    one below the other); ``mutants`` is what ``run_mutants`` returns. A failure, or a catch, is dark; a check
    that was not run is hatched.
    """
    models, ids = list(verdicts.model.unique()), list(verdicts.id.unique())
    names = verdicts.drop_duplicates("id").set_index("id").check
    caught = [set(filter(None, by.split(", "))) for by in mutants.by]
    columns = [name for name in ids if any(name in by for by in caught)]
    fig = Figure(figsize=(DOUBLE, 1.9 + 0.2 * max(len(ids), len(mutants))), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(2.4 * len(models), max(len(columns), 4)))
    table = verdicts.pivot(index="id", columns="model", values="verdict").loc[ids, models]
    _cells(left, table.shape, [f"{names[name]} ({name})" for name in ids], models)
    for (row, column), verdict in np.ndenumerate(table.to_numpy()):
        face, colour, hatch = _LOOKS[verdict]
        look = {"fc": face, "ec": "0.6" if hatch else face, "hatch": hatch, "lw": 0, "zorder": 0}
        left.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **look))
        back = {"fc": face, "ec": "none", "boxstyle": "square,pad=0.1"} if hatch else None
        left.text(column, row, verdict, ha="center", va="center", color=colour, bbox=back)
    left.set_title("verdict, by training of the model")
    hits = np.array([[name in by for name in columns] for by in caught], float).reshape(len(mutants), -1)
    marks = [
        ("" if found else "MISSED  ") + name for found, name in zip(mutants.caught, mutants.name, strict=True)
    ]
    _cells(right, hits.shape, marks, [f"{names[name]} ({name})" for name in columns], turned=True)
    for row, column in np.argwhere(hits):
        right.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fc=_LOOKS[FAIL][0], lw=0, zorder=0))
        right.text(column, row, "×", ha="center", va="center", color="white")
    for kind in mutants.kind.unique():
        rows = np.flatnonzero(mutants.kind == kind)
        right.axhline(rows[0] - 0.5, color="black", lw=1)
        right.text(len(columns) - 0.4, rows.mean(), kind + "s", rotation=270, va="center")
    right.set_title(f"{int(mutants.caught.sum())} of {len(mutants)} mutants are caught")
    return fig


def _cells(ax, shape, rows, columns, *, turned=False):
    """An empty matrix of cells with thin lines between them, its columns named above."""
    ax.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns, rotation=90 if turned else 0)
    ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    ax.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    ax.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    ax.grid(which="minor")
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(True)
