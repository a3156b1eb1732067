"""Figures of the notebooks beyond the paper (06 to 08), in the style of :mod:`fortify.figures`."""

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from fortify.figures import COLOURS, DOUBLE, MARKERS, SINGLE, image_grid, show_image, styled

TRAININGS = {  # colour, marker: apart for the colour-blind and in grey
    "normal": (COLOURS["normal"], MARKERS["normal"]),
    "published": ("#6b6b6b", "^"),
    "tone curves": ("#a569bd", "D"),
    "adversarial": (COLOURS["adversarial"], MARKERS["adversarial"]),
}


@dataclass(frozen=True)
class Panel:
    """A changed image (H, W, 3) in units of [0, 1], what the model says of it, and of ``n`` such images."""

    title: str
    image: np.ndarray
    prediction: int
    probability: float
    k: int  # of all test images changed in this way, those read rightly
    n: int


@styled
def protocol_strip(panels, *, label, class_names):
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
def matrix_dots(table):
    """Accuracy in % of each training under each evaluation, with 95 % intervals; a panel per split.

    ``table`` is :func:`fortify.published.matrix`.
    """
    splits = list(table.split.unique())
    names = table.sort_values("order").evaluation.unique()
    fig = Figure(figsize=(DOUBLE, 0.6 + 0.27 * len(names)), layout="constrained")
    axes = fig.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    models = [model for model in TRAININGS if model in set(table.model)]
    for ax, split in zip(axes, splits, strict=True):
        for row, model in enumerate(models):
            own = table[table.split.eq(split) & table.model.eq(model)].set_index("evaluation").loc[names]
            colour, marker = TRAININGS[model]
            y = np.arange(len(names)) + (row - (len(models) - 1) / 2) * 0.17
            ax.hlines(y, 100 * own.low, 100 * own.high, color=colour, lw=1.6, alpha=0.35)
            face = "white" if model == "tone curves" else colour
            ax.plot(100 * own.accuracy, y, marker, color=colour, mfc=face, label=model, ms=4.2, clip_on=False)
        for edge in np.arange(len(names) - 1) + 0.5:
            ax.axhline(edge, color="0.9", lw=0.6)
        ax.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.6), xlabel="accuracy (%)", title=f"{split} split")
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
    handles = axes[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=len(models), title="training")
    return fig


@styled
def audit_matrix(verdicts, zoo):
    """What the audit said: left each check of each model, right which checks caught which mutant.

    ``verdicts`` has the columns model, id, check, verdict (:attr:`fortify.audit.Audit.table` of each model,
    one below the other); ``zoo`` is :func:`fortify.audit_zoo.run_zoo`. A failure, or a catch, is dark.
    """
    models, ids = list(verdicts.model.unique()), list(verdicts.id.unique())
    names = verdicts.drop_duplicates("id").set_index("id").check
    caught = [set(filter(None, by.split(", "))) for by in zoo.by]
    columns = [name for name in ids if any(name in by for by in caught)]
    fig = Figure(figsize=(DOUBLE, 0.8 + 0.2 * max(len(ids), len(zoo))), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(1.6 * len(models), max(len(columns), 4)))
    table = verdicts.pivot(index="id", columns="model", values="verdict").loc[ids, models]
    failed = table.eq("fail").to_numpy(float)
    _cells(left, failed, [f"{name}  {names[name]}" for name in ids], models)
    for (row, column), verdict in np.ndenumerate(table.to_numpy()):
        look = {"pass": "0.45", "fail": "white", "not run": "0.45"}[verdict]
        left.text(column, row, verdict, ha="center", va="center", color=look, size=6.5)
    left.set_title("checks of each model")
    hits = np.array([[name in by for name in columns] for by in caught], float).reshape(len(zoo), -1)
    marks = [("" if found else "MISSED  ") + name for found, name in zip(zoo.caught, zoo.name, strict=True)]
    _cells(right, hits, marks, columns)
    for row, column in np.argwhere(hits):
        right.text(column, row, "×", ha="center", va="center", color="white")
    for kind in zoo.kind.unique():
        rows = np.flatnonzero(zoo.kind == kind)
        right.axhline(rows[0] - 0.5, color="black", lw=1)
        right.text(len(columns) - 0.4, rows.mean(), kind + "s", rotation=270, va="center")
    right.set_title(f"mutants and the checks that catch them ({int(zoo.caught.sum())}/{len(zoo)})")
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


_SPLITS = {"random": ("#6b6b6b", "s"), "grouped": ("#1b7837", "o")}  # colour, marker


@styled
def leak_meter_dots(table):
    """Accuracy in % of each leak classifier on both splits: a faint mark per seed, a strong one for the mean.

    ``table`` is :func:`fortify.leakage.leak_meter`; the dashed line is its majority class on random splits.
    """
    names = list(table.classifier.unique())
    fig = Figure(figsize=(SINGLE, 0.75 + 0.3 * len(names)), layout="constrained")
    ax = fig.subplots()
    for split, (colour, marker) in _SPLITS.items():
        for row, name in enumerate(names):
            accuracy = 100 * table[table.split.eq(split) & table.classifier.eq(name)].accuracy
            y = row + (-0.16 if split == "random" else 0.16)
            ax.plot(accuracy, [y] * len(accuracy), marker, color=colour, alpha=0.25, ms=3, mew=0)
            ax.plot(accuracy.mean(), y, marker, color=colour, label=f"{split} split" if row == 0 else None)
    baseline = table[table.classifier.eq("majority class") & table.split.eq("random")].accuracy
    if len(baseline):
        ax.axvline(100 * baseline.mean(), color="0.5", ls="--", lw=0.8, zorder=0)
    ax.set(xlim=(0, 101), ylim=(len(names) - 0.5, -0.5), xlabel="test accuracy (%)")
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    fig.legend(loc="outside lower center", ncols=2)
    return fig


@styled
def region_dots(table, *, majority):
    """Accuracy in % of both trainings on each view and under each restricted attack; a panel per split.

    ``table`` holds :func:`fortify.regions.lungs_or_scanner` with ``split`` and ``model``; ``majority`` maps a
    split to the share of its most frequent test class, the dashed line. Bars are 95 % intervals.
    """
    splits, names = list(table.split.unique()), list(table["view"].unique())
    fig = Figure(figsize=(DOUBLE, 0.85 + 0.22 * len(names)), layout="constrained")
    axes = fig.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for ax, split in zip(axes, splits, strict=True):
        for row, model in enumerate(("normal", "adversarial")):
            own = table[table.split.eq(split) & table.model.eq(model)].set_index("view").loc[names]
            colour, marker = TRAININGS[model]
            y = np.arange(len(names)) + (row - 0.5) * 0.32
            ax.hlines(y, 100 * own.low, 100 * own.high, color=colour, lw=1.6, alpha=0.35)
            ax.plot(100 * own.accuracy, y, marker, color=colour, label=f"{model} training", clip_on=False)
        ax.axvline(100 * majority[split], color="0.5", ls="--", lw=0.8, zorder=0)
        ax.axhline((~own.attacked).sum() - 0.5, color="0.7", lw=0.6)
        ax.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5), xlabel="test accuracy (%)")
        ax.set_title(f"{split} split, n = {own.n.iloc[0]}")
        ax.set_yticks(range(len(names)), names)
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


@styled
def region_examples(shown, lungs, *, labels):
    """What a model is shown: a row per image, a column per view, the lung mask outlined on the whole image.

    ``shown`` is :func:`fortify.regions.views` and ``lungs`` the masks, bool (N, H, W), of the same few
    images; ``labels`` are their row labels.
    """
    fig, axes = image_grid(len(lungs), len(shown), DOUBLE, top=0.18)
    for column, (name, images) in enumerate(shown.items()):
        for ax, image in zip(axes[:, column], images, strict=True):
            show_image(ax, image, vmin=0, vmax=255)
        axes[0, column].set_title(name)
    for ax, mask, label in zip(axes[:, 0], lungs, labels, strict=True):
        if mask.any():
            ax.contour(mask, levels=[0.5], colors="#e08214", linewidths=0.8)
        ax.set_ylabel(label)
    return fig
