"""Figures: what they show is what they were given, at printed size, with units, the same bytes every time."""

import subprocess
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from fortify import figures
from fortify.evaluation import TRAININGS

NAMES = ("benign", "malignant", "normal")
RNG = np.random.default_rng(0)
IMAGES = RNG.random((9, 32, 32)) * 0.8 + 0.1
LABELS = np.repeat([0, 1, 2], 3)
FILES = [f"n{i}" for i in range(9)]
MAJORITY = {"random": 0.5, "grouped": 0.4}


def example(attack="pgd", eps_255=1.0, *, prediction=2, size=1.0):
    sign = np.where(np.random.default_rng(1).random((32, 32)) < 0.5, -1, 1)
    attacked = IMAGES[4] + size / 255 * sign
    return figures.Example(IMAGES[4], 1, 1, 0.98, NAMES, attacked, prediction, 0.93, attack, eps_255)


def clean(prediction=1):
    return figures.Example(IMAGES[4], 1, prediction, 0.98, NAMES)


def curve(splits=("random",)):
    rows = []
    for split in splits:
        for model, scale in (("normal", 0.5), ("adversarial", 4)):
            for attack in ("pgd", "fgsm"):
                for eps in (0, 0.5, 1, 4):
                    accuracy = 0.9 * np.exp(-eps / scale)
                    ends = (max(accuracy - 0.05, 0), accuracy + 0.05)
                    rows.append((split, model, "adaptive", attack, eps, accuracy, *ends))
    return pd.DataFrame(rows, columns="split model protocol attack eps_255 accuracy low high".split())


def matrices():
    counts = np.array([[18, 2, 0], [0, 70, 4], [3, 1, 66]])
    attacks = ("clean", "pgd", "fgsm", "cw")
    models = ("normal", "adversarial")
    return {("random", m, "adaptive", a): counts + i for i, a in enumerate(attacks) for m in models}


def history(epochs=12, *, robust=True):
    e = np.arange(1, epochs + 1)
    return pd.DataFrame(
        {
            "epoch": e, "lr": 0.002 / e, "train_loss": 1 / e, "train_accuracy": 1 - 0.5 / e,
            "val_accuracy": 0.8 - 0.3 / e, "val_robust_accuracy": (0.7 - 0.3 / e) if robust else np.nan,
            "selected": e == max(1, epochs - 1),
        }
    )  # fmt: skip


def histories(seeds=(0, 1)):
    parts = [
        history(robust=model == "adversarial").assign(split=split, model=model, seed=seed)
        for split in ("grouped", "random")
        for model in TRAININGS
        if TRAININGS[model].table1
        for seed in seeds
    ]
    return pd.concat(parts, ignore_index=True)


def failures():
    """Of one class none is broken, of another none is misclassified."""
    wrong, broken = clean(0), example()
    return {
        "benign": {"clean": (wrong, 3, 3), "pgd": (None, 0, 0)},
        "malignant": {"clean": (None, 0, 4), "pgd": (broken, 2, 4)},
        "normal": {"clean": (wrong, 1, 5), "pgd": (broken, 4, 4)},
    }


ALL = {
    "fig1": lambda: figures.fig1_system(),
    "fig2": lambda: figures.fig2_samples(IMAGES, LABELS, NAMES, per_class=3, names=FILES),
    "fig3": lambda: figures.prediction_panel([clean()]),
    "fig4": lambda: figures.prediction_panel([example()]),
    "fig6": lambda: figures.prediction_panel([example(), example("cw", None)]),
    "closeups": lambda: figures.perturbation_closeups([example("fgsm"), example(), example("cw", None)]),
    "confusion": lambda: figures.confusion_matrices(matrices(), split="random", class_names=NAMES),
    "curves": lambda: figures.robustness_curves(curve(("random", "grouped")), majority=MAJORITY),
    "training": lambda: figures.training_curves(history()),
    "grid": lambda: figures.training_grid(histories()),
    "failures": lambda: figures.failure_panel(failures(), budget="4/255"),
}  # fmt: skip


def texts(fig):
    """The texts that are drawn: a tick beyond the end of its axis is not."""
    hidden = set()
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            hidden |= {t.label1 for t in axis.get_major_ticks() if not low <= t.get_loc() <= high}
    return [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in hidden]


def said(fig):
    return "\n".join(t.get_text() for t in texts(fig))


@pytest.mark.parametrize("name", ALL)
def test_every_figure_is_of_printed_size_and_saves_to_the_same_bytes(name, tmp_path):
    fig = ALL[name]()
    assert type(fig) is Figure
    assert fig.get_figwidth() in (figures.SINGLE, figures.DOUBLE)
    smallest = min(t.get_fontsize() for t in texts(fig))
    assert smallest >= (6.5 if name == "fig2" else 8)  # Figure 2's file names stand under small images
    path = figures.save(fig, tmp_path / "a", name)
    assert path == tmp_path / "a" / f"{name}.png"
    figures.save(fig if name == "curves" else ALL[name](), tmp_path / "b", name)
    for suffix in ("png", "pdf"):
        first, again = ((tmp_path / d / f"{name}.{suffix}").read_bytes() for d in "ab")
        assert first == again
    # Rarely would two builds in one process show what the layout's solver leaves to chance.
    placed = np.array([ax.get_position(original=True).bounds for ax in fig.axes])
    assert np.abs(placed - np.round(placed, 9)).max() < 1e-13
    assert b"CreationDate" not in (tmp_path / "a" / f"{name}.pdf").read_bytes()
    with Image.open(path) as image:
        assert image.width == round(300 * fig.get_figwidth())
        assert round(image.info["dpi"][0]) == 300


@pytest.mark.parametrize("name", ALL)
def test_no_text_is_cut_off_or_overlaps_another(name):
    fig = ALL[name]()
    with mpl.style.context(figures.STYLE):  # as it is saved
        fig.draw_without_rendering()
    page = fig.bbox
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts(fig)]
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1, text
    for i, (text, box) in enumerate(boxes):
        for other, its in boxes[i + 1 :]:
            width = min(box.x1, its.x1) - max(box.x0, its.x0)
            height = min(box.y1, its.y1) - max(box.y0, its.y0)
            assert width < 1 or height < 1 or "rotated" in _turned(fig, text, other), (text, other)


def _turned(fig, *labels):
    """Slanted labels' bounding boxes overlap although the words do not."""
    return ["rotated" for t in texts(fig) if t.get_text() in labels and t.get_rotation() % 90]


def test_figures_leave_neither_pyplot_nor_settings_behind():
    # Reading rcParams["backend"] would itself choose one and import pyplot.
    code = (
        "import sys, matplotlib as mpl; from fortify import figures; "
        "now = lambda: {k: mpl.rcParams[k] for k in mpl.rcParams if k != 'backend'}; "
        "before = now(); figures.fig1_system(); assert now() == before; "
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_system_diagram_names_every_stage():
    words = said(figures.fig1_system())
    for stage in ("Normal training", "Adversarial training", "Craft FGSM, PGD, CW", "on the\ncurrent model",
                  "PGD on its margin",
                  "adaptive", "static", "clean, FGSM, PGD, CW, combined", "k/n"):  # fmt: skip
        assert stage in words


def test_samples_are_of_their_class_and_spread_over_it():
    fig = figures.fig2_samples(IMAGES, LABELS, NAMES, per_class=2, names=FILES)
    axes = np.array(fig.axes).reshape(3, 2)
    assert [row[0].get_ylabel() for row in axes] == list(NAMES)
    assert [[ax.get_xlabel() for ax in row] for row in axes] == [["n0", "n2"], ["n3", "n5"], ["n6", "n8"]]
    assert np.array_equal(axes[1, 1].images[0].get_array(), IMAGES[5])
    assert axes[0, 0].images[0].get_clim() == (0, 1)
    integers = figures.fig2_samples((IMAGES * 255).astype(np.uint8), LABELS, NAMES, per_class=1)
    assert integers.axes[0].images[0].get_clim() == (0, 255)
    with pytest.raises(ValueError, match="'benign' has 3 slices, fewer than 4"):
        figures.fig2_samples(IMAGES, LABELS, NAMES)


def test_samples_are_of_different_groups_as_long_as_there_are_enough():
    def shown(groups):
        fig = figures.fig2_samples(IMAGES, LABELS, NAMES, per_class=2, names=FILES, groups=groups)
        return [ax.get_xlabel() for ax in fig.axes]

    assert shown([0, 0, 0, 1, 2, 2, 3, 3, 4])[2:] == ["n3", "n5", "n7", "n8"], "the middle one of each group"
    assert shown([0, 0, 0, 1, 2, 2, 3, 3, 4])[:2] == ["n0", "n2"], "one group alone: spread over the class"
    assert shown([0, 1, 1, 1, 5, 6, 6, 7, 8])[2:] == ["n4", "n5", "n7", "n8"], "none twice in the figure"


def test_a_panel_shows_true_and_predicted_class_and_probability():
    (ax,) = figures.prediction_panel([clean()]).axes
    assert ax.get_xlabel() == "true class: malignant\n✓ predicted: malignant (0.98)"
    assert np.array_equal(ax.images[0].get_array(), IMAGES[4])


def test_a_wrong_prediction_is_marked_by_more_than_colour():
    (right,), (wrong,) = (figures.prediction_panel([clean(p)]).axes for p in (1, 0))
    assert wrong.get_xlabel() == "true class: malignant\n✗ predicted: benign (0.98)"
    assert [t.get_text() for t in wrong.texts] == ["✗"] and not right.texts
    assert wrong.spines["left"].get_linewidth() > 2 * right.spines["left"].get_linewidth()


def test_an_attacked_panel_shows_the_perturbation_at_the_stated_factor():
    left, middle, right = figures.prediction_panel([example()]).axes
    assert [ax.get_title() for ax in (left, middle, right)] == [
        "clean image",
        "change, magnified ×64",
        "attacked image",
    ]
    assert np.allclose(middle.images[0].get_array(), 64 * (example().attacked - IMAGES[4]))
    assert middle.images[0].get_clim() == (-0.5, 0.5)  # zero is mid-grey
    assert "PGD" in middle.get_xlabel() and "at most 1/255" in middle.get_xlabel()
    assert "largest change 1.00/255" in middle.get_xlabel() and "$L_2$ 0.13" in middle.get_xlabel()
    assert left.get_xlabel().endswith("✓ predicted: malignant (0.98)")
    assert right.get_xlabel().endswith("✗ predicted: normal (0.93)")


def test_a_panels_rows_share_their_factor_and_have_letters():
    axes = np.array(figures.prediction_panel([example(), example("cw", None, size=9)]).axes).reshape(2, 3)
    assert axes[0, 1].get_title() == "change, magnified ×8"
    assert [row[0].get_ylabel() for row in axes] == ["(a)", "(b)"]
    assert axes[1, 1].get_xlabel().startswith("CW, minimum norm\n")


def test_a_failed_attack_shows_a_perturbation_of_zero():
    failed = replace(example("cw", None, prediction=1), attacked=IMAGES[4])
    middle = figures.prediction_panel([failed]).axes[1]
    assert middle.get_title() == "change, magnified ×1"
    assert not middle.images[0].get_array().any()
    assert figures.perturbation_closeups([failed]).axes[3].images[0].get_clim() == (-1, 1)


def test_a_panel_does_not_mix_clean_and_attacked_examples():
    with pytest.raises(ValueError, match="not both"):
        figures.prediction_panel([clean(), example()])


def test_closeups_share_one_scale_and_enlarge_the_asked_square():
    fig = figures.perturbation_closeups([example("fgsm"), example("cw", None, size=9)], crop=(4, 8, 10))
    axes = np.array(fig.axes[:9]).reshape(3, 3)
    assert [ax.get_title() for ax in axes[0]] == ["clean, malignant", "FGSM, 1/255", "CW, no budget"]
    limits = {tuple(np.round(ax.images[0].get_clim(), 9)) for ax in axes[1:, 1:].flat}
    assert limits == {(-3, 3)}  # three times FGSM's; CW's 9 grey levels exceed it, and the bar says so
    assert fig.axes[9].get_ylabel() == "change (grey levels of 255)"
    assert np.array_equal(axes[2, 0].images[0].get_array(), IMAGES[4][4:14, 8:18])
    assert np.allclose(
        axes[2, 2].images[0].get_array(), 255 * (example("cw", size=9).attacked - IMAGES[4])[4:14, 8:18]
    )


def test_closeups_show_the_attacked_image_with_its_prediction_and_the_size_of_the_change():
    held = example("cw", None, size=9, prediction=1)
    fig = figures.perturbation_closeups([example("fgsm"), held])
    axes = np.array(fig.axes[:9]).reshape(3, 3)
    assert [ax.get_xlabel() for ax in axes[0]] == [
        "✓ malignant (0.98)",
        "✗ normal (0.93)",
        "✓ malignant (0.93)",
    ]
    for ax, shown in zip(axes[0, 1:], (example("fgsm"), held), strict=True):
        assert np.array_equal(ax.images[0].get_array(), shown.attacked)
    assert [ax.get_xlabel() for ax in axes[1, 1:]] == [
        "largest 1/255\n$L_2$ 0.13",
        "largest 9/255\n$L_2$ 1.13",
    ]
    assert [row[0].get_ylabel() for row in axes] == ["predicted as", "change, magnified", "square, enlarged"]


def test_closeups_find_where_the_perturbations_are():
    local = IMAGES[4].copy()
    local[20:26, 3:9] += 0.05
    shown = figures.perturbation_closeups([replace(example(), attacked=local)]).axes[5].images[0].get_array()
    assert shown.shape == (8, 8)
    assert (shown > 0).sum() == 36


def test_confusion_matrices_show_counts_on_row_shares():
    fig = figures.confusion_matrices(matrices(), split="random", class_names=NAMES)
    axes = np.array(fig.axes[:8]).reshape(2, 4)
    assert [ax.get_title() for ax in axes[0]] == ["clean", "PGD", "FGSM", "CW"]
    assert [row[0].get_ylabel() for row in axes] == [
        "normal training\ntrue class",
        "adversarial training\ntrue class",
    ]
    assert {ax.get_xlabel() for ax in axes[1]} == {"predicted class"}
    assert fig.axes[8].get_ylabel() == "share of the true class"
    counts = matrices()["random", "adversarial", "adaptive", "pgd"]
    assert [t.get_text() for t in axes[1, 1].texts] == [str(c) for c in counts.flat]
    assert np.allclose(axes[1, 1].images[0].get_array(), counts / counts.sum(axis=1, keepdims=True))


def test_curves_are_in_percent_against_grey_levels_and_differ_without_colour():
    table = curve()
    (ax,) = figures.robustness_curves(table).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$L_\\infty$ budget (grey levels of 255)", "accuracy (%)")
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines) == ["normal, PGD", "normal, FGSM", "adversarial, PGD", "adversarial, FGSM"]
    expected = table[table.model.eq("normal") & table.attack.eq("fgsm")]
    assert np.allclose(lines["normal, FGSM"].get_xydata(), np.c_[expected.eps_255, 100 * expected.accuracy])
    looks = {
        (li.get_linestyle(), li.get_marker(), li.get_markerfacecolor() == "white") for li in lines.values()
    }
    assert len(looks) == 4
    band = ax.collections[1].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(100 * expected.low.min())
    assert band[:, 1].max() == pytest.approx(100 * expected.high.max())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "0.5", "1", "4"]


def test_bands_are_intervals_by_groups_where_there_are_any():
    table = curve().assign(group_low=0.1, group_high=0.6)
    for shown, (low, high), words in (
        (table, (10, 60), "95 % interval, by groups"),
        (curve(), (100 * curve().low.min(), 100 * curve().high.max()), "95 % interval"),
    ):
        fig = figures.robustness_curves(shown)
        bands = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in fig.axes[0].collections])
        assert (bands.min(), bands.max()) == (pytest.approx(low), pytest.approx(high))
        assert [t.get_text() for t in fig.legends[0].get_texts()][-1] == words


def test_training_curves_of_all_runs_have_a_panel_per_training_and_split():
    shown = histories()
    later = shown.seed.eq(1) & shown.split.eq("random")
    shown.loc[later, "val_accuracy"] += 0.1
    fig = figures.training_grid(shown)
    titles = ["normal training, random split", "normal training, grouped split"]
    titles += [title.replace("normal", "adversarial") for title in titles]
    assert [ax.get_title() for ax in fig.axes] == titles
    thick = {line.get_linestyle(): line for line in fig.axes[0].lines if line.get_linewidth() == 1.8}
    thin = [line for line in fig.axes[0].lines if line.get_linewidth() == 0.5]
    assert len(thin) == 6 and np.allclose(thick["--"].get_ydata(), 100 * (history().val_accuracy + 0.05))
    kept = [line for line in fig.axes[0].lines if line.get_marker() == "|"]
    assert [*kept[0].get_xdata()] == [11, 11]
    words = [t.get_text() for t in fig.legends[0].get_texts()]
    assert "thin: one seed; thick: their mean" in words and "epoch that was kept" in words
    alone = figures.training_grid(histories(seeds=(0,)))
    assert "thin" not in said(alone) and all(line.get_linewidth() != 0.5 for line in alone.axes[0].lines)


def test_failures_are_counted_and_an_empty_place_says_so():
    axes = np.array(figures.failure_panel(failures(), budget="4/255").axes).reshape(2, 3)
    assert axes[0, 0].get_title() == "benign: 3 of 3\nmisclassified without attack"
    assert axes[1, 1].get_title() == "malignant: 2 of 4 correct ones\nbroken by PGD at 4/255"
    assert [bool(ax.images) for ax in axes.flat] == [True, False, True, False, True, True]
    assert [t.get_text() for t in axes[1, 0].texts] == ["none"]
    assert np.array_equal(axes[0, 0].images[0].get_array(), IMAGES[4])
    assert np.array_equal(axes[1, 1].images[0].get_array(), example().attacked)
    assert axes[1, 1].get_xlabel() == "true class: malignant\n✗ predicted: normal (0.93)"


def test_a_confusion_matrix_says_what_it_counts():
    fig = figures.confusion_matrices(matrices(), split="random", class_names=NAMES, counted="9 slices")
    assert fig.get_suptitle() == "random split, counts of 9 slices"
    one = {key: counts for key, counts in matrices().items() if key[1] == "normal" and key[3] == "clean"}
    assert figures.confusion_matrices(one, split="random", class_names=NAMES).get_figwidth() == figures.SINGLE


def test_a_notebook_shows_a_figure_as_wide_as_its_text_was_set_for(tmp_path):
    for fig in (ALL["fig3"](), ALL["fig4"]()):
        shown = figures.show(fig, tmp_path, "a", alt="A figure")
        assert shown.width == round(108 * fig.get_figwidth()) and shown.alt == "A figure"
        assert shown.data == (tmp_path / "a.png").read_bytes()


def test_curves_have_a_panel_per_split_and_the_largest_class():
    fig = figures.robustness_curves(curve(("random", "grouped")), majority=MAJORITY)
    assert [ax.get_title() for ax in fig.axes] == ["random split", "grouped split"]
    assert [ax.lines[-1].get_ydata()[0] for ax in fig.axes] == [50, 40]
    with pytest.raises(ValueError, match="no static rows"):
        figures.robustness_curves(curve(), protocol="static")


def test_the_two_models_differ_in_grey():
    def luminance(colour):
        return np.dot(mpl.colors.to_rgb(colour), (0.2126, 0.7152, 0.0722))

    assert luminance(TRAININGS["normal"].colour) - luminance(TRAININGS["adversarial"].colour) > 0.25


def test_training_curves_are_in_percent_and_mark_the_kept_epoch():
    fig = figures.training_curves(history())
    assert [ax.get_ylabel() for ax in fig.axes] == ["training loss (nats)", "accuracy (%)", "learning rate"]
    assert {ax.get_xlabel() for ax in fig.axes} == {"epoch"}
    labels = [line.get_label() for line in fig.axes[1].lines]
    assert labels == ["training", "validation, clean", "validation, attacked", "kept: epoch 11"]
    assert np.allclose(fig.axes[1].lines[1].get_ydata(), 100 * history().val_accuracy)
    assert [ax.lines[-1].get_xdata()[0] for ax in fig.axes] == [11, 11, 11]


def test_normal_training_has_no_attacked_curve_and_one_epoch_is_visible():
    fig = figures.training_curves(history(1, robust=False))
    assert [line.get_label() for line in fig.axes[1].lines] == [
        "training",
        "validation, clean",
        "kept: epoch 1",
    ]
    assert all(line.get_marker() not in ("", "None") for line in fig.axes[1].lines[:2])


def test_colour_images_are_shown_with_their_mean_change():
    rng = np.random.default_rng(0)
    clean = rng.random((32, 32, 3)) * 0.5 + 0.2
    change = np.zeros((32, 32, 3))
    change[8:16, 8:16, 0] = 0.09
    seen = {"label": 0, "clean_prediction": 0, "clean_probability": 0.9, "class_names": ("a", "b")}
    attacked = {
        "attacked": clean + change,
        "prediction": 1,
        "probability": 0.8,
        "attack": "pgd",
        "eps_255": 24,
    }
    example = figures.Example(clean=clean, **seen, **attacked)
    panel, closeups = figures.prediction_panel([example]), figures.perturbation_closeups([example])
    drawn = panel.axes[1].images[0].get_array()
    assert drawn.shape == (32, 32) and drawn[10, 10] == pytest.approx(0.03 * 4, rel=1e-3)
    assert "largest change 22.95/255" in panel.axes[1].get_xlabel()
    assert max(ax.images[0].get_array().max() for ax in closeups.axes[3:6:2] if ax.images) <= 0.03 * 255 + 1
