"""The paper's figures: each function takes arrays or tables and returns a matplotlib Figure at printed size.

No function draws on the screen or leaves a pyplot figure open. Images are float (H, W) in [0, 1].
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FixedLocator, NullLocator
from scipy.ndimage import uniform_filter

from fortify.evaluation import TRAININGS, attacks_in
from fortify.files import atomic_path

if TYPE_CHECKING:
    from fortify.data import Slices

STYLE = Path(__file__).with_name("paper.mplstyle")
SINGLE, DOUBLE = 3.4, 7.0  # inches: one column of the page, and two
WRONG = "#b91c1c"


@dataclass(frozen=True)
class Example:
    """An image, what a model predicts of it, and, where ``attacked`` is given, of its attacked copy."""

    clean: np.ndarray
    label: int
    clean_prediction: int
    clean_probability: float  # of the predicted class
    class_names: tuple
    attacked: np.ndarray | None = None
    prediction: int | None = None
    probability: float | None = None
    attack: str | None = None  # its name
    eps_255: float | None = None  # Linf budget in grey levels; None or NaN for a minimum-norm attack


def _title(attack):
    """An attack as tables and figures write it."""
    return attack if attack == "clean" else attack.upper()


def _has_budget(example):
    return example.eps_255 is not None and not np.isnan(example.eps_255)


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the paper's style, and lay the figure out once, for each further pass moves it a little."""

    @functools.wraps(function)
    def drawn(*args, **kwargs):
        with mpl.style.context(STYLE):
            fig = function(*args, **kwargs)
            for _ in range(2):  # the ticks that fit are known after the first
                fig.draw_without_rendering()
            fig.set_layout_engine("none")
            for ax in fig.axes:  # the solver's last digits hang on where objects lie in memory
                ax.set_position(np.round(ax.get_position(original=True).bounds, 9))
            return fig

    return drawn


def save(fig: Figure, folder: str | Path, name: str) -> Path:
    """Write ``name``.pdf and ``name``.png (300 dpi) to ``folder``, atomically; return the PNG's path.

    The files hold no date and no version: the same figure gives the same bytes.
    """
    stamps = {"pdf": {"CreationDate": None, "Producer": None, "Creator": None}, "png": {"Software": None}}
    for suffix, metadata in stamps.items():
        path = Path(folder) / f"{name}.{suffix}"
        with mpl.style.context(STYLE), atomic_path(path) as temporary:
            fig.savefig(temporary, metadata=metadata)
    return path


@styled
def fig1_system() -> Figure:
    """Figure 1, the system: train normally, craft attacks, train adversarially, evaluate both models."""
    fig = Figure(figsize=(DOUBLE, 3.0), layout=None)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, DOUBLE), ylim=(0, 3.0))  # so that coordinates are inches
    ax.axis("off")
    colours = {name: look.colour for name, look in TRAININGS.items()} | {"data": "0.35"}

    def box(x, y, width, title, *lines, lane="data"):
        face, corner = mpl.colors.to_rgba(colours[lane], 0.08), "round,pad=0,rounding_size=0.06"
        top = y + 0.31 + 0.125 * len(lines)
        ax.add_patch(FancyBboxPatch((x, y), width, top - y, corner, fc=face, ec=colours[lane], lw=0.9))
        ax.text(x + width / 2, top - 0.07, title, ha="center", va="top", weight="bold")
        text = {"ha": "center", "va": "top", "size": 6.8, "linespacing": 1.3}
        ax.text(x + width / 2, top - 0.24, "\n".join(lines), **text)

    def arrow(start, end, text="", at=(0, 0), lane="data", ha="center"):
        shape = {"arrowstyle": "-|>,head_width=0.16,head_length=0.32", "shrinkA": 1, "shrinkB": 1}
        ax.annotate("", end, start, arrowprops=shape | {"color": colours[lane], "lw": 1.0})
        ax.text(*at, text, size=6.8, ha=ha, va="center", linespacing=1.2)

    kinds = ("benign, malignant, normal;", "split into train, validation")
    kinds += ("and test: at random, or by", "groups of similar slices")
    box(0.08, 1.08, 1.5, "Lung-CT slices", *kinds)
    box(2.1, 2.33, 1.85, "Normal training", "loss on clean slices", lane="normal")
    crafting = ("each batch anew, on the current", "model; for CW, PGD on its margin")
    box(2.1, 1.22, 1.85, "Craft FGSM, PGD, CW", *crafting, lane="adversarial")
    box(
        2.1,
        0.13,
        1.85,
        "Adversarial training",
        "loss on clean and",
        "attacked slices together",
        lane="adversarial",
    )
    protocols = ("adaptive: on the model under test", "static: on the normal model, reused")
    box(4.7, 2.2, 2.2, "Attack the test slices", "FGSM, PGD and CW, crafted", *protocols)
    measures = ("accuracy k/n with its interval,", "confusion, robustness curves")
    box(4.7, 0.13, 2.2, "Evaluate both models", "clean, FGSM, PGD, CW, combined:", *measures)
    arrow((1.58, 1.7), (2.1, 2.5), lane="normal")
    arrow((1.58, 1.25), (2.1, 0.5), lane="adversarial")
    arrow((2.75, 1.22), (2.75, 0.69), "attacked\nslices", (2.69, 0.96), "adversarial", "right")
    arrow((3.3, 0.69), (3.3, 1.22), "updated\nweights", (3.36, 0.96), "adversarial", "left")
    arrow((3.95, 2.55), (4.7, 2.55), "normal\nmodel", (4.3, 2.72), "normal")
    arrow((3.95, 0.45), (4.7, 2.3), "adversarially\ntrained model", (4.42, 1.4), "adversarial", "left")
    arrow((5.8, 2.2), (5.8, 0.82), "predictions,\none row per image", (5.86, 1.5), "data", "left")
    return fig


def image_grid(
    rows: int, columns: int, width: float, *, below: float = 0.0, top: float = 0.0, aspect: float = 1.0
) -> tuple[Figure, np.ndarray]:
    """A Figure of ``rows`` x ``columns`` square images, with room in inches for text below and on top."""
    height = rows * (width / columns * aspect + below) + top
    fig = Figure(figsize=(width, height), layout="compressed")
    return fig, fig.subplots(rows, columns, squeeze=False)


def show_image(
    ax: Axes,
    image: np.ndarray,
    *,
    vmin: float = 0.0,
    vmax: float = 1.0,
    wrong: bool | None = None,
    **kwargs: Any,
) -> AxesImage:
    """Draw an image without ticks; a wrong prediction has a thick frame and a cross in the corner."""
    drawn = ax.imshow(image, vmin=vmin, vmax=vmax, **kwargs)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=WRONG if wrong else "0.5", linewidth=2 if wrong else 0.6)
    if wrong:
        badge = {"boxstyle": "square,pad=0.2", "fc": WRONG, "ec": "white", "lw": 0.6}
        ax.text(0.96, 0.96, "✗", transform=ax.transAxes, ha="right", va="top", color="white", bbox=badge)
    return drawn


@styled
def fig2_samples(
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    per_class: int = 4,
    names: Sequence[str] | None = None,
) -> Figure:
    """Figure 2: ``per_class`` slices of each class, spread evenly over its (N, H, W) images.

    ``names`` (N,) are written below the slices. Images are uint8, or float in [0, 1].
    """
    fig, axes = image_grid(len(class_names), per_class, DOUBLE, below=0.14 if names is not None else 0)
    white = 255 if np.asarray(images).dtype == np.uint8 else 1
    for row, class_name in enumerate(class_names):
        members = np.flatnonzero(np.asarray(labels) == row)
        if len(members) < per_class:
            raise ValueError(f"class {class_name!r} has {len(members)} slices, fewer than {per_class}.")
        chosen = members[np.linspace(0, len(members) - 1, per_class).round().astype(int)]
        for ax, index in zip(axes[row], chosen, strict=True):
            show_image(ax, images[index], vmax=white)
            if names is not None:
                ax.set_xlabel(names[index], size=6.5, labelpad=2)
        axes[row, 0].set_ylabel(class_name, size=8)
    return fig


def _verdict(ax, image, example, prediction, probability):
    """An image above its true and its predicted class."""
    wrong = prediction != example.label
    show_image(ax, image, wrong=wrong)
    true, predicted = example.class_names[example.label], example.class_names[prediction]
    mark = "✗" if wrong else "✓"
    ax.set_xlabel(f"true class: {true}\n{mark} predicted: {predicted} ({probability:.2f})")


def _perturbation(example):
    return np.asarray(example.attacked, dtype=float) - np.asarray(example.clean, dtype=float)


def _in_grey(delta):
    """A change (H, W) to show; of a colour image (H, W, C) the mean over its channels."""
    return delta if delta.ndim == 2 else delta.mean(-1)


@styled
def prediction_panel(examples: Sequence[Example]) -> Figure:
    """Figures 3 to 6: images, their true class, and the class predicted with its probability.

    Without attack the examples are side by side. Attacked ones have a row each: clean image, perturbation
    times a power of two (the same in every row, grey is zero), attacked image. A wrong prediction has a
    thick frame and a cross.
    """
    attacked = [example.attacked is not None for example in examples]
    if len(set(attacked)) != 1:
        raise ValueError("prediction_panel takes clean examples or attacked ones, not both.")
    if not attacked[0]:
        fig, axes = image_grid(1, len(examples), SINGLE if len(examples) < 3 else DOUBLE, below=0.35)
        for ax, example in zip(axes[0], examples, strict=True):
            _verdict(ax, example.clean, example, example.clean_prediction, example.clean_probability)
        return fig
    fig, axes = image_grid(len(examples), 3, DOUBLE, below=0.3, top=0.15)
    largest = max(np.abs(_perturbation(e)).max() for e in examples)
    factor = 2.0 ** max(0, np.floor(np.log2(0.5 / largest))) if largest > 0 else 1.0
    for row, example in zip(axes, examples, strict=True):
        delta = _perturbation(example)
        _verdict(row[0], example.clean, example, example.clean_prediction, example.clean_probability)
        show_image(row[1], _in_grey(delta) * factor, vmin=-0.5, vmax=0.5)
        size = f"largest change {np.abs(delta).max() * 255:.2f}/255, $L_2$ {np.linalg.norm(delta):.2f}"
        within = f"$L_\\infty$ at most {example.eps_255:g}/255" if _has_budget(example) else "minimum norm"
        row[1].set_xlabel(f"{_title(example.attack)}, {within}\n{size}")
        _verdict(row[2], example.attacked, example, example.prediction, example.probability)
    titles = ("clean image", f"perturbation ×{factor:g}", "attacked image")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    if len(examples) > 1:
        for letter, row in zip("abcdefgh", axes, strict=False):
            row[0].set_ylabel(f"({letter})", rotation=0, ha="right", va="center")
    return fig


@styled
def perturbation_closeups(examples: Sequence[Example], *, crop: tuple[int, int, int] | None = None) -> Figure:
    """One image under several attacks: perturbations, whole and enlarged, on one scale; mid-grey is zero.

    ``crop`` is (row, column, size) of the enlarged square; default: a quarter of the side, where the
    perturbations are strongest. The scale ends at three times the largest change of the least attack, so that
    this one stays visible; where others exceed it, the ends are marked.
    """
    deltas = [_in_grey(_perturbation(example)) * 255 for example in examples]
    size = np.abs(deltas)
    if crop is None:
        side = deltas[0].shape[0] // 4
        strength = uniform_filter(np.mean([d**2 / max((d**2).mean(), 1e-12) for d in deltas], axis=0), side)
        half = side // 2
        inside = strength[half : strength.shape[0] - side + half, half : strength.shape[1] - side + half]
        crop = (*np.unravel_index(inside.argmax(), inside.shape), side)
    top, left, side = crop
    window = (slice(top, top + side), slice(left, left + side))
    limit = min(size.max(), 3 * min((d.max() for d in size if d.any()), default=1 / 3)) or 1.0
    fig, axes = image_grid(2, len(examples) + 1, DOUBLE, top=0.1, aspect=0.88)
    for column, image in enumerate([examples[0].clean, *deltas]):
        scale = {} if column == 0 else {"vmin": -limit, "vmax": limit}
        show_image(axes[0, column], image, **scale)
        drawn = show_image(axes[1, column], image[window], **scale)
        edge = Rectangle((left - 0.5, top - 0.5), side, side, fill=False, lw=1.2, ec="#ffd60a")
        axes[0, column].add_patch(edge)
    for ax, example in zip(axes[0, 1:], examples, strict=True):
        budget = f", {example.eps_255:g}/255" if _has_budget(example) else ""
        ax.set_title(f"{_title(example.attack)}{budget}")
    axes[0, 0].set(title="clean image", ylabel="whole slice")
    axes[1, 0].set_ylabel("the square, enlarged")
    extend = "both" if size.max() > limit else "neither"
    bar = fig.colorbar(drawn, ax=axes, extend=extend, shrink=0.8, aspect=30)
    bar.set_label("perturbation (grey levels of 255)")
    return fig


@styled
def confusion_matrices(
    matrices: Mapping[tuple, np.ndarray],
    *,
    split: str,
    class_names: Sequence[str],
    protocol: str = "adaptive",
) -> Figure:
    """Confusion matrices of one split: a row per model, a column per attack; counts on row-normalised shade.

    ``matrices`` is what :func:`fortify.evaluation.confusion` returns.
    """
    models = [m for m in TRAININGS if (split, m, protocol, "clean") in matrices]
    attacks = [key[3] for key in matrices if key[:3] == (split, models[0], protocol)]
    fig, axes = image_grid(len(models), len(attacks), DOUBLE, top=0.3, aspect=0.9)
    for row, model in zip(axes, models, strict=True):
        for ax, attack in zip(row, attacks, strict=True):
            counts = matrices[split, model, protocol, attack]
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            drawn = show_image(ax, shares, cmap="Blues")
            for (true, predicted), count in np.ndenumerate(counts):
                colour = "white" if shares[true, predicted] > 0.55 else "black"
                ax.text(predicted, true, str(count), ha="center", va="center", color=colour)
        row[0].set_yticks(range(len(class_names)), class_names)
        row[0].set_ylabel(f"{model} training\ntrue class")
    for ax, attack in zip(axes[0], attacks, strict=True):
        ax.set_title(_title(attack))
    for ax in axes[-1]:
        ax.set_xticks(range(len(class_names)), class_names, rotation=35, ha="right", rotation_mode="anchor")
        ax.set_xlabel("predicted class")
    fig.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.8, aspect=30)
    return fig


@styled
def robustness_curves(
    curve: pd.DataFrame, *, protocol: str = "adaptive", majority: Mapping[str, float] | None = None
) -> Figure:
    """Accuracy in % against the Linf budget in grey levels, with Wilson bands; a panel per split.

    ``curve`` is :func:`fortify.evaluation.curve`; ``majority`` {split: share of the largest class} draws what
    always answering that class scores.
    """
    curve = curve[curve.protocol.eq(protocol)]
    if curve.empty:
        raise ValueError(f"The curve has no {protocol} rows.")
    splits, dashed = curve.split.unique(), itertools.cycle([(0, (3, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1))])
    looks = {attack: "-" if i == 0 else next(dashed) for i, attack in enumerate(attacks_in(curve))}
    fig = Figure(figsize=(SINGLE if len(splits) == 1 else DOUBLE, 2.7), layout="constrained")
    axes = fig.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for ax, split in zip(axes, splits, strict=True):
        for (model, attack), line in curve[curve.split.eq(split)].groupby(["model", "attack"], sort=False):
            colour, dashes = TRAININGS[model].colour, looks[attack]
            ax.fill_between(line.eps_255, 100 * line.low, 100 * line.high, color=colour, alpha=0.13, lw=0)
            face = colour if dashes == "-" else "white"
            marks = {
                "color": colour,
                "ls": dashes,
                "marker": TRAININGS[model].marker,
                "mfc": face,
                "clip_on": False,
            }
            ax.plot(line.eps_255, 100 * line.accuracy, label=f"{model}, {_title(attack)}", **marks)
        if majority is not None:
            ax.axhline(100 * majority[split], color="0.4", lw=0.8, ls=":", label="largest class")
        budgets = sorted(curve.eps_255[curve.split.eq(split) & curve.eps_255.gt(0)].unique())
        ax.set_xscale("symlog", base=2, linthresh=budgets[0], linscale=0.8)
        ax.xaxis.set(major_locator=FixedLocator([0, *budgets]), minor_locator=NullLocator())
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.set(xlabel="$L_\\infty$ budget (grey levels of 255)", ylim=(0, 100), title=f"{split} split")
        ax.set_xlim(0, budgets[-1])
        ax.grid(axis="y")
    axes[0].set_ylabel("accuracy (%)")
    entries = axes[0].get_legend_handles_labels()
    columns = 2 if len(splits) == 1 else len(entries[0])
    fig.legend(*entries, loc="outside lower center", ncols=columns, title="training, attack")
    return fig


@styled
def comparison_dots(table: pd.DataFrame, *, majority: Mapping[str, float]) -> Figure:
    """Clean and attacked accuracy of each contender, a panel a split, in the table's order from above.

    ``table`` is :func:`fortify.comparison.standings`'; the lines are its intervals by groups. ``majority``
    {split: share of the largest class} is what always answering that class scores.
    """
    splits, names = table.split.unique(), list(table.contender.unique())
    fig = Figure(figsize=(DOUBLE, 1.1 + 0.25 * len(names)), layout="constrained")
    axes = fig.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    looks = {"correct": ("clean", "normal", -0.15), "attacked": ("attacked", "adversarial", 0.15)}
    for ax, split in zip(axes, splits, strict=True):
        own = table[table.split.eq(split)].set_index("contender").reindex(names)
        for kind, (label, training, shift) in looks.items():
            at, look = np.arange(len(names)) + shift, TRAININGS[training]
            ax.hlines(at, 100 * own[f"{kind}_low"], 100 * own[f"{kind}_high"], color=look.colour, lw=1)
            ax.plot(100 * own[kind], at, look.marker, color=look.colour, label=label)
        ax.axvline(100 * majority[split], color="0.4", lw=0.8, ls=":", label="largest class")
        ax.set(xlabel="accuracy (%)", xlim=(0, 100), title=f"{split} split")
        ax.set_yticks(range(len(names)), names)
        ax.grid(axis="x")
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


@styled
def training_curves(history: pd.DataFrame) -> Figure:
    """Loss, accuracy in % and learning rate against the epoch; a line marks the epoch that was kept.

    ``history`` has the columns epoch, lr, train_loss, train_accuracy, val_accuracy, val_robust_accuracy
    (fractions; NaN where not measured) and selected (bool).
    """
    fig = Figure(figsize=(DOUBLE, 2.3), layout="constrained")
    loss, accuracy, rate = fig.subplots(1, 3, width_ratios=(1, 1.2, 1))
    marks = {"ms": 3, "markevery": max(1, len(history) // 8)}
    loss.plot(history.epoch, history.train_loss, color="black", marker="d", **marks)
    rate.plot(history.epoch, history.lr, color="black", marker="d", **marks)
    for column, label, *look in (
        ("train_accuracy", "training", "black", "-", "d"),
        ("val_accuracy", "validation, clean", TRAININGS["adversarial"].colour, "--", "o"),
        ("val_robust_accuracy", "validation, attacked", TRAININGS["normal"].colour, ":", "s"),
    ):
        if history[column].notna().any():
            look = dict(zip(("color", "ls", "marker"), look, strict=True))
            accuracy.plot(history.epoch, 100 * history[column], label=label, **look, **marks)
    for ax in (loss, accuracy, rate):
        for epoch in history.epoch[history.selected].tail(1):
            ax.axvline(epoch, color="0.5", lw=0.9, ls="-.", label=f"kept: epoch {epoch:g}")
        ax.set_xlabel("epoch")
        ax.grid(axis="y")
    loss.set(ylabel="training loss (nats)", ylim=(0, None))
    accuracy.set(ylabel="accuracy (%)", ylim=(0, 100))
    rate.set(ylabel="learning rate", ylim=(0, None))
    fig.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return fig


def pick_example(
    rows: pd.DataFrame,
    slices: "Slices",
    *,
    label: int,
    attack: str | None = None,
    eps_255: float | None = None,
    attacked: np.ndarray | None = None,
) -> Example:
    """A typical image of class ``label`` as an :class:`Example`, by a rule and not by eye.

    The first that the rows' model classifies correctly when clean and on which the ``attack`` ends as on most
    such images of the class (a tie counts as misclassified). Where it classifies none correctly, the first of
    the class.
    ``rows`` are one model's on one split and seed; ``attacked`` (N, C, H, W) are that attack's images in the
    order of the clean rows (a minimum-norm attack has no ``eps_255``). Raises ValueError when the class is
    not in the rows.
    """
    clean = rows[rows.attack.eq("clean")].reset_index(drop=True)
    own = clean[clean.label.eq(label)]
    if own.empty:
        raise ValueError(f"no test image of class {slices.class_names[label]!r}")
    candidates = own[~own.success] if (~own.success).any() else own.head(1)
    if attack is not None:
        budget = rows.eps_255.isna()  # a minimum-norm attack has none
        budget = budget if eps_255 is None else budget | np.isclose(rows.eps_255, eps_255)
        found = rows[rows.attack.eq(attack) & rows.protocol.eq("adaptive") & budget].set_index("index")
        missing = set(candidates["index"]) - set(found.index)
        if missing or not found.index.is_unique:
            raise ValueError(f"not one row of {attack} at eps_255={eps_255} for each image")
        broken = found.success.loc[candidates["index"]].to_numpy()
        candidates = candidates[broken == (broken.mean() >= 0.5)]
    position, seen = candidates.index[0], candidates.iloc[0]
    example = Example(
        clean=slices.images[seen["index"]] / 255,
        label=label,
        clean_prediction=seen.prediction,
        clean_probability=seen.probability,
        class_names=slices.class_names,
    )
    if attack is None:
        return example
    after, image = found.loc[seen["index"]], attacked[position]
    image = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    return replace(
        example,
        # A row without a change is of the clean image, whatever was kept: it was misclassified already.
        attacked=image if after.l2 else example.clean,
        prediction=after.prediction,
        probability=after.probability,
        attack=attack,
        eps_255=None if np.isnan(after.eps_255) else eps_255,
    )
