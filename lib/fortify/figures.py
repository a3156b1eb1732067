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
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from scipy.ndimage import uniform_filter

from fortify.evaluation import TRAININGS, attacks_in, read_rows
from fortify.files import atomic_path

if TYPE_CHECKING:
    from IPython.display import Image

    from fortify.data import Slices
    from fortify.runs import Run

STYLE = Path(__file__).with_name("paper.mplstyle")
SINGLE, DOUBLE = 3.4, 7.0  # inches: one column of the page, and two
PIXELS = 108  # of a notebook's page, an inch: text of 8 pt is as large as 9 pt on the screen
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


def show(fig: Figure, folder: str | Path, name: str, *, alt: str) -> "Image":
    """:func:`save`, and the PNG as a notebook shows it: at the width that its text was set for."""
    from IPython.display import Image  # here: nothing but a notebook needs it

    return Image(save(fig, folder, name), width=round(PIXELS * fig.get_figwidth()), alt=alt)


@styled
def fig1_system() -> Figure:
    """Figure 1, the system: train normally, craft attacks, train adversarially, evaluate both models."""
    fig = Figure(figsize=(DOUBLE, 3.1), layout=None)
    ax = fig.add_axes((0, 0, 1, 1), xlim=(0, DOUBLE), ylim=(0, 3.1))  # so that coordinates are inches
    ax.axis("off")
    colours = {name: look.colour for name, look in TRAININGS.items()} | {"data": "0.35"}

    def box(x, y, width, title, *lines, lane="data"):
        face, corner = mpl.colors.to_rgba(colours[lane], 0.08), "round,pad=0,rounding_size=0.06"
        top = y + 0.33 + 0.15 * len(lines)
        ax.add_patch(FancyBboxPatch((x, y), width, top - y, corner, fc=face, ec=colours[lane], lw=0.9))
        ax.text(x + width / 2, top - 0.07, title, ha="center", va="top", weight="bold")
        text = {"ha": "center", "va": "top", "linespacing": 1.3}
        ax.text(x + width / 2, top - 0.26, "\n".join(lines), **text)

    def arrow(start, end, text="", at=(0, 0), lane="data", ha="center"):
        shape = {"arrowstyle": "-|>,head_width=0.16,head_length=0.32", "shrinkA": 1, "shrinkB": 1}
        ax.annotate("", end, start, arrowprops=shape | {"color": colours[lane], "lw": 1.0})
        ax.text(*at, text, ha=ha, va="center", linespacing=1.2)

    kinds = ("benign, malignant,", "normal; split into train,", "validation and test:")
    kinds += ("at random, or by groups", "of near-duplicates")
    box(0.06, 1.02, 1.56, "Lung-CT slices", *kinds)
    box(2.1, 2.42, 1.85, "Normal training", "loss on clean slices", lane="normal")
    crafting = ("each batch anew, on the", "current model; for CW,", "PGD on its margin")
    box(2.1, 1.24, 1.85, "Craft FGSM, PGD, CW", *crafting, lane="adversarial")
    training = ("loss on clean and", "attacked slices together")
    box(2.1, 0.08, 1.85, "Adversarial training", *training, lane="adversarial")
    protocols = ("adaptive: on the model tested", "static: on the normal model")
    box(4.76, 2.12, 2.18, "Attack the test slices", "FGSM, PGD and CW, crafted", *protocols)
    measures = ("accuracy k/n, its interval,", "confusion, robustness curves")
    box(4.76, 0.08, 2.18, "Evaluate both models", "clean, FGSM, PGD, CW, combined:", *measures)
    arrow((1.62, 1.78), (2.1, 2.6), lane="normal")
    arrow((1.62, 1.28), (2.1, 0.5), lane="adversarial")
    arrow((2.75, 1.24), (2.75, 0.71), "attacked\nslices", (2.69, 0.98), "adversarial", "right")
    arrow((3.3, 0.71), (3.3, 1.24), "updated\nweights", (3.36, 0.98), "adversarial", "left")
    arrow((3.95, 2.68), (4.76, 2.68), "normal\nmodel", (4.34, 2.86), "normal")
    arrow((3.95, 0.42), (4.76, 2.24), "adversarially\ntrained model", (4.5, 1.4), "adversarial", "left")
    arrow((5.85, 2.12), (5.85, 0.86), "predictions,\none row\nper image", (5.91, 1.5), "data", "left")
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
    groups: Sequence[int] | None = None,
) -> Figure:
    """Figure 2: ``per_class`` slices of each class, spread evenly over its (N, H, W) images.

    ``names`` (N,) are written below the slices. With ``groups`` (N,) each is of another group of
    near-duplicates, the middle one of it, as long as there are as many groups. Images are uint8, or float in
    [0, 1].
    """
    fig, axes = image_grid(len(class_names), per_class, DOUBLE, below=0.16 if names is not None else 0)
    white, shown = 255 if np.asarray(images).dtype == np.uint8 else 1, []
    for row, class_name in enumerate(class_names):
        members = np.flatnonzero(np.asarray(labels) == row)
        if len(members) < per_class:
            raise ValueError(f"class {class_name!r} has {len(members)} slices, fewer than {per_class}.")
        if groups is not None:
            own = pd.Series(members, np.asarray(groups)[members]).drop(index=shown, errors="ignore")
            middle = own.groupby(level=0, sort=False).agg(lambda of: of.iloc[len(of) // 2]).to_numpy()
            members = middle if len(middle) >= per_class else members
        chosen = members[np.linspace(0, len(members) - 1, per_class).round().astype(int)]
        for ax, index in zip(axes[row], chosen, strict=True):
            show_image(ax, images[index], vmax=white)
            if groups is not None:
                shown.append(groups[index])
            if names is not None:
                ax.set_xlabel(names[index], size=8, labelpad=2)
        axes[row, 0].set_ylabel(class_name)
    return fig


def _verdict(ax, image, example, prediction, probability, *, short=False):
    """An image above its true and its predicted class; ``short``: where the true one is said elsewhere."""
    wrong = prediction != example.label
    show_image(ax, image, wrong=wrong)
    true, predicted = example.class_names[example.label], example.class_names[prediction]
    mark = "✗" if wrong else "✓"
    words = f"{predicted} ({probability:.2f})"
    ax.set_xlabel(f"{mark} {words}" if short else f"true class: {true}\n{mark} predicted: {words}")


def _perturbation(example):
    return np.asarray(example.attacked, dtype=float) - np.asarray(example.clean, dtype=float)


def _in_grey(delta):
    """A change (H, W) to show; of a colour image (H, W, C) the mean over its channels."""
    return delta if delta.ndim == 2 else delta.mean(-1)


@styled
def prediction_panel(examples: Sequence[Example]) -> Figure:
    """Figures 3 to 6: images, their true class, and the class predicted with its probability.

    Without attack the examples are side by side. Attacked ones have a row each: clean image, the change
    magnified by a power of two (the same in every row, grey is zero), attacked image. A wrong prediction has
    a thick frame and a cross.
    """
    attacked = [example.attacked is not None for example in examples]
    if len(set(attacked)) != 1:
        raise ValueError("prediction_panel takes clean examples or attacked ones, not both.")
    if not attacked[0]:
        fig, axes = image_grid(1, len(examples), SINGLE if len(examples) < 3 else DOUBLE, below=0.37)
        for ax, example in zip(axes[0], examples, strict=True):
            _verdict(ax, example.clean, example, example.clean_prediction, example.clean_probability)
        return fig
    fig, axes = image_grid(len(examples), 3, DOUBLE, below=0.33, top=0.17)
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
    titles = ("clean image", f"change, magnified ×{factor:g}", "attacked image")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    if len(examples) > 1:
        for letter, row in zip("abcdefgh", axes, strict=False):
            row[0].set_ylabel(f"({letter})", rotation=0, ha="right", va="center")
    return fig


@styled
def perturbation_closeups(examples: Sequence[Example], *, crop: tuple[int, int, int] | None = None) -> Figure:
    """One image under several attacks: attacked images with their predictions, and below them the changes.

    The changes are magnified, on one scale with mid-grey as zero, whole and enlarged. ``crop`` is (row,
    column, size) of the enlarged square; default: a quarter of the side, where the changes are strongest.
    The scale ends at three times the largest change of the least attack, so that this one stays visible;
    where others exceed it, the ends are marked.
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
    fig, axes = image_grid(3, len(examples) + 1, DOUBLE, below=0.2, top=0.25, aspect=0.84)
    first = examples[0]
    _verdict(axes[0, 0], first.clean, first, first.clean_prediction, first.clean_probability, short=True)
    for ax, image in zip(axes[1:, 0], (first.clean, first.clean[window]), strict=True):
        show_image(ax, image)
    for column, (example, delta) in enumerate(zip(examples, deltas, strict=True), start=1):
        budget = f", {example.eps_255:g}/255" if _has_budget(example) else ", no budget"
        axes[0, column].set_title(f"{_title(example.attack)}{budget}")
        predicted = (example.prediction, example.probability)
        _verdict(axes[0, column], example.attacked, example, *predicted, short=True)
        for ax, change in zip(axes[1:, column], (delta, delta[window]), strict=True):
            drawn = show_image(ax, change, vmin=-limit, vmax=limit)
        length = np.linalg.norm(_perturbation(example))
        axes[1, column].set_xlabel(f"largest {np.abs(delta).max():.2g}/255\n$L_2$ {length:.2f}")
    for ax in axes[1]:
        ax.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, lw=1.2, ec="#ffd60a"))
    axes[0, 0].set(title=f"clean, {first.class_names[first.label]}", ylabel="predicted as")
    axes[1, 0].set_ylabel("change, magnified")
    axes[2, 0].set_ylabel("square, enlarged")
    extend = "both" if size.max() > limit else "neither"
    bar = fig.colorbar(drawn, ax=axes, extend=extend, shrink=0.6, aspect=30, pad=0.01)
    bar.set_label("change (grey levels of 255)")
    return fig


@styled
def failure_panel(found: Mapping[str, Mapping[str, tuple]], *, budget: str) -> Figure:
    """Slices that a model gets wrong: a column a class, above without an attack, below under PGD.

    ``found`` is {class: what :func:`pick_failures` returns}; ``budget`` names PGD's, as "4/255". Titles say
    how many such slices there are. Where there is none, the place is empty.
    """
    fig, axes = image_grid(2, max(len(found), 3), DOUBLE, below=0.62)
    words = {
        "clean": "{0}: {1} of {2}\nmisclassified without attack",
        "pgd": f"{{0}}: {{1}} of {{2}} correct ones\nbroken by PGD at {budget}",
    }
    for row, (kind, text) in zip(axes, words.items(), strict=True):
        for ax in row:
            ax.axis("off")
        for ax, (name, of_class) in zip(row, found.items(), strict=False):
            example, k, n = of_class[kind]
            ax.set_title(text.format(name, k, n))
            if example is None:
                ax.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1), aspect="equal")
                ax.text(0.5, 0.5, "none", ha="center", va="center", color="0.4")
                continue
            ax.axis("on")
            shown = (example.clean, example.clean_prediction, example.clean_probability)
            if kind == "pgd":
                shown = (example.attacked, example.prediction, example.probability)
            _verdict(ax, shown[0], example, *shown[1:])
    return fig


@styled
def confusion_matrices(
    matrices: Mapping[tuple, np.ndarray],
    *,
    split: str,
    class_names: Sequence[str],
    protocol: str = "adaptive",
    counted: str = "test slices",
) -> Figure:
    """Confusion matrices of one split: a row per model, a column per attack; counts on row-normalised shade.

    ``matrices`` is what :func:`fortify.evaluation.confusion` returns; ``counted`` says what their numbers
    count, and where they pool several trainings.
    """
    models = [m for m in TRAININGS if (split, m, protocol, "clean") in matrices]
    attacks = [key[3] for key in matrices if key[:3] == (split, models[0], protocol)]
    width = SINGLE if len(attacks) == 1 else DOUBLE
    fig, axes = image_grid(len(models), len(attacks), width, top=0.55, aspect=0.9 if width == DOUBLE else 0.6)
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
    fig.suptitle(f"{split} split, counts of {counted}")
    return fig


@styled
def robustness_curves(
    curve: pd.DataFrame, *, protocol: str = "adaptive", majority: Mapping[str, float] | None = None
) -> Figure:
    """Accuracy in % against the Linf budget in grey levels; a panel per split.

    ``curve`` is :func:`fortify.evaluation.curve`. The bands are its intervals by groups, Wilson's where it
    has none. ``majority`` {split: share of the largest class} draws what
    always answering that class scores.
    """
    curve = curve[curve.protocol.eq(protocol)]
    if curve.empty:
        raise ValueError(f"The curve has no {protocol} rows.")
    splits, dashed = curve.split.unique(), itertools.cycle([(0, (3, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1))])
    looks = {attack: "-" if i == 0 else next(dashed) for i, attack in enumerate(attacks_in(curve))}
    by_groups = "group_low" in curve and curve.group_low.notna().all()
    low, high = ("group_low", "group_high") if by_groups else ("low", "high")
    several = len(splits) > 1
    fig = Figure(figsize=(DOUBLE, 3.0) if several else (SINGLE, 3.3), layout="constrained")
    axes = fig.subplots(1, len(splits), sharey=True, squeeze=False)[0]
    for ax, split in zip(axes, splits, strict=True):
        for (model, attack), line in curve[curve.split.eq(split)].groupby(["model", "attack"], sort=False):
            colour, dashes = TRAININGS[model].colour, looks[attack]
            band = {"color": colour, "alpha": 0.15, "lw": 0}
            ax.fill_between(line.eps_255, 100 * line[low], 100 * line[high], **band)
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
            ax.axhline(100 * majority[split], color="0.4", lw=0.8, ls=":", label="always the largest class")
        budgets = sorted(curve.eps_255[curve.split.eq(split) & curve.eps_255.gt(0)].unique())
        ax.set_xscale("symlog", base=2, linthresh=budgets[0], linscale=0.8)
        ax.xaxis.set(major_locator=FixedLocator([0, *budgets]), minor_locator=NullLocator())
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.set(xlabel="$L_\\infty$ budget (grey levels of 255)", ylim=(0, 100), title=f"{split} split")
        ax.set_xlim(0, budgets[-1])
        ax.grid(axis="y")
    axes[0].set_ylabel("accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    handles.append(Patch(color="0.5", alpha=0.3, lw=0))
    labels.append("95 % interval, by groups" if by_groups else "95 % interval")
    fig.legend(
        handles, labels, loc="outside lower center", ncols=3 if several else 2, title="training, attack"
    )
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


@styled
def training_grid(histories: pd.DataFrame) -> Figure:
    """Accuracy in % against the epoch: a row a training, a column a split.

    ``histories`` is what :func:`fortify.evaluation.training_history` returns, of all runs. Of several seeds
    each is a thin line and their mean a thick one. The ticks below mark the epochs that were kept.
    """
    models = [name for name in TRAININGS if name in set(histories.model)]
    splits = sorted(histories.split.unique(), key=lambda split: split != "random")
    several = histories.seed.nunique() > 1
    fig = Figure(figsize=(DOUBLE, 0.9 + 1.75 * len(models)), layout="constrained")
    axes = fig.subplots(len(models), len(splits), sharex="row", sharey=True, squeeze=False)
    looks = {
        "train_accuracy": ("training batches", "black", "-"),
        "val_accuracy": ("validation, clean", TRAININGS["adversarial"].colour, "--"),
        "val_robust_accuracy": ("validation, attacked", TRAININGS["normal"].colour, ":"),
    }
    mark = {"ls": "", "marker": "|", "color": "0.25", "ms": 8, "mew": 1.2}
    for (row, column), ax in np.ndenumerate(axes):
        own = histories[histories.model.eq(models[row]) & histories.split.eq(splits[column])]
        for name, (_, colour, dashes) in looks.items():
            lines = 100 * own.pivot(index="epoch", columns="seed", values=name)
            if several:
                ax.plot(lines, color=colour, lw=0.5, alpha=0.35)
            mean = lines.mean(axis=1)
            ax.plot(mean, color=colour, ls=dashes, lw=1.8, marker="o" if len(mean) == 1 else "")
        kept = own.epoch[own.selected.astype(bool)]
        ax.plot(kept, np.zeros(len(kept)), transform=ax.get_xaxis_transform(), **mark)
        ax.set(ylim=(0, 100), title=f"{models[row]} training, {splits[column]} split")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
        ax.set_xlabel("epoch" if row == len(models) - 1 else "")
        ax.set_ylabel("accuracy (%)" if column == 0 else "")
    entries = [Line2D([], [], color=c, ls=dashes, lw=1.8, label=text) for text, c, dashes in looks.values()]
    if several:
        entries.append(Line2D([], [], color="0.4", lw=0.5, label="thin: one seed; thick: their mean"))
    entries.append(Line2D([], [], label="epoch that was kept", **mark))
    fig.legend(handles=entries, loc="outside lower center", ncols=3)
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
    after = None if attack is None else found.loc[seen["index"]]
    return _example(slices, seen, after, None if attack is None else attacked[position], eps_255=eps_255)


def pick_failures(
    rows: pd.DataFrame, slices: "Slices", *, label: int, eps_255: float, attacked: np.ndarray
) -> dict[str, tuple[Example | None, int, int]]:
    """The first images of class ``label`` that a model gets wrong: {"clean" or "pgd": (example, k, n)}.

    "clean": of its n test images k are misclassified without an attack. "pgd": PGD breaks k of the n that
    are correct when clean. The example is None where k is 0. ``rows`` and ``attacked``: :func:`pick_example`.
    """
    clean = rows[rows.attack.eq("clean")].reset_index(drop=True)
    own = clean[clean.label.eq(label)]
    is_pgd = rows.attack.eq("pgd") & rows.protocol.eq("adaptive") & np.isclose(rows.eps_255, eps_255)
    after, right = rows[is_pgd].set_index("index"), own[~own.success]
    broken = right[after.success.loc[right["index"]].to_numpy()]
    found = {}
    for kind, failed, count in (("clean", own[own.success], len(own)), ("pgd", broken, len(right))):
        example = None
        if len(failed):
            position, seen = failed.index[0], failed.iloc[0]
            reached = (after.loc[seen["index"]], attacked[position]) if kind == "pgd" else (None, None)
            example = _example(slices, seen, *reached, eps_255=eps_255)
        found[kind] = (example, len(failed), count)
    return found


def example_of(
    run: "Run", slices: "Slices", model: str, class_name: str, *, attack: str | None = None, eps_255: float
) -> Example:
    """:func:`pick_example` of a run's ``model``; a class that the slices do not have is the first one."""
    rows, attacked = _of_run(run, model, attack)
    label = slices.class_names.index(class_name) if class_name in slices.class_names else 0
    return pick_example(rows, slices, label=label, attack=attack, eps_255=eps_255, attacked=attacked)


def failures_of(
    run: "Run", slices: "Slices", model: str, *, eps_255: float, most: int = 4
) -> dict[str, dict[str, tuple[Example | None, int, int]]]:
    """{class: :func:`pick_failures`} of a run's ``model``, for the ``most`` first classes in its test set."""
    rows, attacked = _of_run(run, model, "pgd")
    labels = sorted(rows.label.unique())[:most]
    options = {"eps_255": eps_255, "attacked": attacked}
    return {slices.class_names[i]: pick_failures(rows, slices, label=i, **options) for i in labels}


def _of_run(run, model, attack):
    """A run's rows of ``model`` and, unless None, its images under ``attack``."""
    rows, attacked = read_rows(run.read(f"{model}_predictions.csv")), None
    if attack is not None:
        with np.load(run.read(f"{model}_attacked.npz")) as file:
            attacked = file[attack]
    return rows, attacked


def _example(slices, seen, after, image, *, eps_255):
    """An :class:`Example` of the clean row ``seen`` and, unless None, the row ``after`` an attack."""
    example = Example(
        clean=slices.images[seen["index"]] / 255,
        label=seen.label,
        clean_prediction=seen.prediction,
        clean_probability=seen.probability,
        class_names=slices.class_names,
    )
    if after is None:
        return example
    image = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    return replace(
        example,
        # A row without a change is of the clean image, whatever was kept: it was misclassified already.
        attacked=image if after.l2 else example.clean,
        prediction=after.prediction,
        probability=after.probability,
        attack=after.attack,
        eps_255=None if np.isnan(after.eps_255) else eps_255,
    )
