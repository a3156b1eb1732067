"""Figure of notebook 08: the verdicts of an audit, and which checks catch which mutant."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fortify.figures import DOUBLE, styled


@styled
def audit_matrix(verdicts: pd.DataFrame, mutants: pd.DataFrame) -> Figure:
    """What the audit said: left each check of each model, right which checks caught which mutant.

    ``verdicts`` has the columns model, id, check, verdict (:attr:`fortify.audit.Audit.table` of each model,
    one below the other); ``mutants`` is what ``run_mutants`` returns. A failure, or a catch, is dark.
    """
    models, ids = list(verdicts.model.unique()), list(verdicts.id.unique())
    names = verdicts.drop_duplicates("id").set_index("id").check
    caught = [set(filter(None, by.split(", "))) for by in mutants.by]
    columns = [name for name in ids if any(name in by for by in caught)]
    fig = Figure(figsize=(DOUBLE, 0.8 + 0.2 * max(len(ids), len(mutants))), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1.6 * len(models), max(len(columns), 4)))
    table = verdicts.pivot(index="id", columns="model", values="verdict").loc[ids, models]
    failed = table.eq("fail").to_numpy(float)
    _cells(left, failed, [f"{name}  {names[name]}" for name in ids], models)
    for (row, column), verdict in np.ndenumerate(table.to_numpy()):
        look = {"pass": "0.45", "fail": "white", "not run": "0.45"}[verdict]
        left.text(column, row, verdict, ha="center", va="center", color=look, size=6.5)
    left.set_title("checks of each model")
    hits = np.array([[name in by for name in columns] for by in caught], float).reshape(len(mutants), -1)
    marks = [
        ("" if found else "MISSED  ") + name for found, name in zip(mutants.caught, mutants.name, strict=True)
    ]
    _cells(right, hits, marks, columns)
    for row, column in np.argwhere(hits):
        right.text(column, row, "×", ha="center", va="center", color="white")
    for kind in mutants.kind.unique():
        rows = np.flatnonzero(mutants.kind == kind)
        right.axhline(rows[0] - 0.5, color="black", lw=1)
        right.text(len(columns) - 0.4, rows.mean(), kind + "s", rotation=270, va="center")
    right.set_title(f"mutants and the checks that catch them ({int(mutants.caught.sum())}/{len(mutants)})")
    return fig


def _cells(ax, dark, rows, columns):
    """A matrix of white and dark cells with thin lines between them, its columns named above."""
    ax.imshow(dark, cmap="Greys", vmin=0, vmax=1.25, aspect="auto")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns)
    ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    ax.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
    ax.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    ax.grid(which="minor")
    ax.tick_params(which="minor", length=0)
    ax.spines[:].set_visible(True)
