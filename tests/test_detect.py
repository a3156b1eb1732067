"""Detectors: calibrated as they say, and told apart: one that sees nothing, one that nothing passes."""

import dataclasses
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from fortify.attacks import FGSM, PGD, craft
from fortify.baselines import headless
from fortify.detect import (
    DETECTORS,
    STRATEGIES,
    calibrate,
    choose,
    evade,
    examine,
    false_alarms,
    figures,
    implied,
    latency,
    load_detectors,
    measures,
    save_detectors,
    score_rows,
    summary,
)
from fortify.detect.detectors import (
    Autoencoder,
    Detector,
    FeatureSqueezing,
    Mahalanobis,
    NearestNeighbours,
    fewer_bits,
    look,
    median_smoothed,
    threshold_at,
)
from fortify.detect.measures import answer, auroc_interval, layout, other_slices
from fortify.models import build_model, predict_logits

EPS = 4
SHORT = {"autoencoder": {"steps": 5}}


def made(name):
    return DETECTORS[name](**SHORT.get(name, {}))


@pytest.fixture(scope="module")
def right(model, images, labels):
    """Positions of images that the model classifies correctly."""
    return (predict_logits(model, images).argmax(1) == labels).nonzero()[:, 0]


@pytest.fixture(scope="module")
def attacked(model, images, labels):
    """PGD on the classifier alone."""
    return craft(model, images, labels, PGD(EPS, steps=10)).images


@pytest.fixture(scope="module")
def calibrated(model, images, phantoms):
    found = {}
    for name in DETECTORS:
        found[name] = calibrate(made(name), model, images[::2], phantoms.patients[::2], false_alarms=0.1)
    return found


def test_features_are_what_the_last_linear_layer_is_given(model, images):
    seen = look(model, images[:5])
    assert torch.allclose(seen.features, headless(model.eval())(images[:5]), atol=1e-5)
    assert torch.equal(seen.logits, model(images[:5]))
    with pytest.raises(ValueError, match="no linear layer"):
        look(torch.nn.Conv2d(1, 3, 3), images[:5])


def test_a_threshold_counts_each_group_alike():
    """One long scan of high scores is a single group of eleven, however many slices it has."""
    scores = np.concatenate([np.full(90, 5.0), np.arange(10) / 10])
    groups = np.concatenate([np.zeros(90, int), np.arange(1, 11)])
    assert threshold_at(scores, groups, 0.09) == 5.0 and threshold_at(scores, groups, 1 / 11) == 0.9
    assert threshold_at(scores, groups, 2 / 11) == pytest.approx(0.8)


@pytest.mark.parametrize("name", DETECTORS)
def test_false_alarms_on_unseen_patients_are_near_what_was_asked_for(calibrated, phantoms, images, name):
    """The calibration half asked for a tenth; phantoms of the other half have other noise, not more of it."""
    seen = calibrated[name].score(images[::2])
    other = false_alarms({name: calibrated[name]}, images[1::2], phantoms.patients[1::2], "the rest").iloc[0]
    assert torch.isfinite(seen).all() and 0 <= other.alarms <= 0.35
    assert other.alarms_low <= other.alarms <= other.alarms_high and other.n == 60


@pytest.mark.parametrize("name", [name for name, kind in DETECTORS.items() if kind.learns])
def test_the_threshold_is_set_on_images_that_the_detector_was_not_fitted_on(model, images, phantoms, name):
    """Fitted on all of them it would find each image to be its own neighbour, and alarm on all others."""
    detector = calibrate(made(name), model, images[::2], phantoms.patients[::2], false_alarms=0.1)
    own = threshold_at(detector.score(images[::2]).numpy(), phantoms.patients[::2], 0.1)
    assert detector.threshold >= own


def test_a_detector_is_fitted_twice_to_the_same(model, images, phantoms):
    one, two = (calibrate(made("autoencoder"), model, images[::2], phantoms.patients[::2]) for _ in range(2))
    assert torch.equal(one.score(images), two.score(images)) and one.threshold == two.threshold


def test_mahalanobis_is_the_distance_by_the_whole_covariance(model, images):
    """The spanned directions and the rest are together the inverse of the shrunk covariance."""
    from sklearn.covariance import LedoitWolf

    seen = look(model.eval(), images[:40])
    detector = Mahalanobis().fit(model, images[:40])
    features, predicted = seen.features.detach().double().numpy(), seen.logits.argmax(1).numpy()
    means = np.stack([features[predicted == c].mean(0) for c in np.unique(predicted)])
    centred = features - means[np.searchsorted(np.unique(predicted), predicted)]
    inverse = LedoitWolf(assume_centered=True).fit(centred).precision_
    apart = look(model, images[40:50]).features.detach().double().numpy()[:, None] - means
    wanted = np.einsum("bcf,fg,bcg->bc", apart, inverse, apart).min(1)
    assert detector.score(images[40:50]).numpy() == pytest.approx(wanted, rel=1e-3)


def test_nearest_neighbours_of_itself_are_others_at_k_2(model, images):
    assert NearestNeighbours(k=1).fit(model, images[:20]).score(images[:20]).max() < 1e-2
    two = NearestNeighbours(k=2).fit(model, images[:20]).score(images[:20])
    assert (two > 0).all()


def test_a_median_is_the_median(images):
    from scipy.ndimage import median_filter

    wanted = median_filter(images[:3].numpy(), size=(1, 1, 3, 3), mode="mirror")
    assert np.array_equal(median_smoothed(images[:3], 3).numpy(), wanted)


def test_a_conformal_p_value_is_the_share_of_clean_images_that_conform_no_better(model, images):
    """Counted image by image."""
    with torch.no_grad():
        known, new = (look(model.eval(), x) for x in (images[:30], images[30:36]))

    def nonconformity(seen, i, left_out=None):
        near = {True: np.inf, False: np.inf}
        for j in range(30):
            alike = bool(known.logits[j].argmax() == seen.logits[i].argmax())
            if j != left_out:
                near[alike] = min(near[alike], float((known.features[j] - seen.features[i]).norm()))
        return near[True] / near[False]

    own = [nonconformity(known, i, left_out=i) for i in range(30)]
    wanted = [(1 + sum(a >= nonconformity(new, i) for a in own)) / 31 for i in range(6)]
    detector = made("conformal").fit(model, images[:30])
    assert 1 - detector.score(images[30:36]).numpy() == pytest.approx(wanted, abs=1.01 / 31)


def test_auroc_is_that_of_scikit_learn_ties_included():
    rng = np.random.default_rng(0)
    clean, attacked = rng.integers(0, 5, 40), rng.integers(1, 6, 30)
    area, low, high = auroc_interval(clean, attacked, np.arange(40) // 4, np.arange(30) // 3)
    wanted = roc_auc_score(np.repeat([0, 1], [40, 30]), np.concatenate([clean, attacked]))
    assert area == pytest.approx(wanted) and low < area < high
    assert np.isnan(auroc_interval(clean, attacked[:0], np.arange(40), np.arange(0))).all()


# Planted detectors: what an evaluation must tell apart.


@dataclasses.dataclass
class Blind(Detector):
    """Scores by noise that no image changes: it can only alarm at random."""

    name: ClassVar[str] = "blind"
    learns: ClassVar[bool] = False

    def suspicion(self, x, seen):
        return torch.rand(len(x), generator=torch.Generator().manual_seed(len(x)))


@dataclasses.dataclass
class OffLattice(Detector):
    """Clean images are quantised to 16 levels; what is between two of them was changed."""

    name: ClassVar[str] = "off lattice"
    learns: ClassVar[bool] = False

    def suspicion(self, x, seen):
        return (x - quantised(x)).abs().flatten(1).amax(1)

    def followed(self, x, seen):
        return (x - quantised(x).detach()).square().flatten(1).sum(1)


def quantised(x):
    return (x * 15).round() / 15


def against(detector, x, y, guides, *, steps=15, restarts=1, crafted=()):
    """(rows of clean, PGD and adaptive, what evade returned) of images that are classified correctly."""
    found = evade(
        detector,
        x,
        y,
        eps_255=EPS,
        steps=steps,
        restarts=restarts,
        weights=(1.0,),
        guides=guides,
        crafted=crafted,
    )
    rows = [score_rows(detector, x, y, attack="clean", index=range(len(x)))]
    shown = {"pgd": (crafted[-1], None)} if crafted else {}
    shown["adaptive"] = (found.images, found.by)
    for attack, (images, by) in shown.items():
        rows.append(score_rows(detector, x, y, attack=attack, index=range(len(x)), attacked=images, by=by))
    return pd.concat(rows, ignore_index=True), found


def test_a_blind_detector_and_a_perfect_one_are_told_apart(model, images, labels):
    x = quantised(images)
    chosen = (predict_logits(model, x).argmax(1) == labels).nonzero()[:, 0][:40]
    x, y, groups = x[chosen], labels[chosen], np.arange(len(chosen))
    pgd = craft(model, x, y, PGD(EPS, steps=10)).images
    tables = {}
    for detector in (Blind(), OffLattice()):
        calibrate(detector, model, quantised(images), np.arange(len(images)), false_alarms=0.05)
        rows, found = against(detector, x, y, x, crafted=[pgd])
        tables[detector.name] = (
            summary(rows, groups).set_index("attack"),
            implied(summary(rows, groups), rows, groups, eps_255=EPS),
        )
        assert (found.images - x).abs().max() <= EPS / 255 + 1e-6
    (blind, of_blind), (perfect, of_perfect) = tables.values()
    assert blind.loc["pgd", "broken"] >= 20, "there is something to detect"
    assert blind.loc["adaptive", "detection"] <= 0.1 and 0.3 < blind.loc["pgd", "auroc"] < 0.7
    assert of_blind.adaptive[0] < 0.35 and of_blind.half_255[0] == EPS / 2
    assert perfect.loc["pgd", ["auroc", "detection"]].tolist() == [1, 1]
    assert perfect.loc["clean", "alarms"] == 0 and perfect.loc["adaptive", "accuracy"] == 1
    assert of_perfect.adaptive[0] == of_perfect.claimed[0] == 1


def test_the_one_that_nothing_passes_is_chosen_wherever_it_stands(model, images, labels):
    x, groups = quantised(images), np.arange(len(images)) // 4
    made = {kind.name: calibrate(kind(), model, x, groups) for kind in (Blind, OffLattice)}
    kept = {name: detector.threshold for name, detector in made.items()}
    options = dict(eps_255=EPS, steps=5, most=12)
    for names in (("blind", "off lattice"), ("off lattice", "blind")):
        assert choose({name: made[name] for name in names}, x, labels, groups, **options) == "off lattice"
    assert {name: detector.threshold for name, detector in made.items()} == kept, "copies were fitted"
    two = {"first": made["blind"], "second": made["blind"]}
    assert choose(two, x, labels, groups, **options) == "first"
    with pytest.raises(ValueError, match="at least two of them, and there are 3"):
        choose(two, x[:9], labels[:9], np.arange(9) // 3, **options)


@dataclasses.dataclass
class Masked(FeatureSqueezing):
    """A squeezer as its authors' attackers met it: the rounding has no gradient that they could follow."""

    name: ClassVar[str] = "masked"

    def squeezed(self, x):
        return [(x * 7).round() / 7]


@dataclasses.dataclass
class Unmasked(FeatureSqueezing):
    name: ClassVar[str] = "unmasked"

    def squeezed(self, x):
        return [fewer_bits(x, 3)]


def test_masked_gradients_protect_no_squeezer(model, images, labels, right):
    """The same detector, its rounding taken for the identity by who attacks it: it breaks."""
    x, y, evaded = images[right[:20]], labels[right[:20]], {}
    for kind in (Masked, Unmasked):
        detector = calibrate(kind(), model, images, np.arange(len(images)), false_alarms=0.2)
        found = evade(detector, x, y, eps_255=8, steps=30, restarts=1, weights=(1.0,), guides=images)
        rows = score_rows(detector, x, y, attack="adaptive", index=range(len(x)), attacked=found.images)
        evaded[kind] = int(rows.evaded.sum())
        assert rows.evaded.to_numpy().tolist() == found.evaded.tolist()
    assert evaded[Unmasked] > evaded[Masked] and evaded[Unmasked] >= 16


@pytest.mark.parametrize("name", DETECTORS)
def test_an_attacker_who_knows_the_detector_does_better_than_one_who_does_not(
    calibrated, attacked, images, labels, right, name
):
    x, y, pgd = images[right[:20]], labels[right[:20]], attacked[right[:20]]
    rows, found = against(calibrated[name], x, y, images, crafted=[pgd])
    table = summary(rows, np.arange(len(x))).set_index("attack")
    assert table.loc["adaptive", "accuracy"] <= table.loc["pgd", "accuracy"]
    own = rows[rows.attack.eq("adaptive")]
    assert own.linf_255.max() <= EPS + 1e-3 and found.images.min() >= 0 and found.images.max() <= 1
    assert (own.by.ne("") == own.evaded).all()
    assert found.evaded.sum() >= 5 and found.evaded.sum() >= rows[rows.attack.eq("pgd")].evaded.sum()
    strategies = {by.split(",")[0] for by in found.by} - {"", "static"}
    assert strategies <= {"joint", *STRATEGIES}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_alone_evades(calibrated, images, labels, right, strategy, monkeypatch):
    monkeypatch.setattr("fortify.detect.adaptive.STRATEGIES", {strategy: STRATEGIES[strategy]})
    x, y = images[right[:15]], labels[right[:15]]
    # Confidence and class pull along one line, which leaves an orthogonal step nothing.
    detector = calibrated["k-NN" if strategy == "orthogonal" else "max softmax"]
    found = evade(detector, x, y, eps_255=8, steps=30, restarts=1, weights=(), guides=images)
    assert found.evaded.sum() >= 8 and {*found.by} <= {"", strategy}


def test_no_budget_no_evasion_and_lost_images_are_not_attacked(calibrated, images, labels, right):
    detector, y = calibrated["max softmax"], labels.clone()
    y[right[0]] = (y[right[0]] + 1) % 3  # as if it were misclassified
    few = right[:4]
    still = evade(detector, images[few], labels[few], eps_255=0, steps=2, restarts=1, guides=images)
    assert torch.equal(still.images, images[few]) and not still.evaded.any()
    found = evade(detector, images[few], y[few], eps_255=EPS, steps=2, restarts=1, guides=images)
    assert torch.equal(found.images[0], images[few[0]]) and not found.evaded[0]
    for wrong in ({"steps": 0}, {"restarts": 0}, {"eps_255": -1}, {"crafted": [images[few] * 0]}):
        options = {"eps_255": EPS, "steps": 1, "restarts": 1, "guides": images} | wrong
        with pytest.raises(ValueError):
            evade(detector, images[few], labels[few], **options)


def test_detectors_travel_in_a_file_and_know_their_network(calibrated, model, images, tmp_path):
    path = tmp_path / "detectors.safetensors"
    save_detectors(path, calibrated, size=32, default="mahalanobis")
    found, about = load_detectors(path, model)
    assert about["size"] == 32 and about["about"] == {"default": "mahalanobis"} and [*found] == [*calibrated]
    for name, detector in found.items():
        assert torch.allclose(detector.score(images[:9]), calibrated[name].score(images[:9])), name
        assert (detector.threshold, detector.scale) == (calibrated[name].threshold, calibrated[name].scale)
    before = path.read_bytes()
    save_detectors(path, calibrated, size=32, default="mahalanobis")
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="another network"):
        load_detectors(path, build_model("resnet_small", num_classes=3, seed=1))
    model_file = tmp_path / "model.safetensors"
    from fortify.models import save_model

    save_model(model_file, model)
    with pytest.raises(ValueError, match="no detectors"):
        load_detectors(model_file, model)


def test_the_model_is_as_it_was(model, images, labels, calibrated):
    before = [p.clone() for p in model.state_dict().values()], [m.training for m in model.modules()]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    evade(calibrated["mahalanobis"], images[:3], labels[:3], eps_255=EPS, steps=2, restarts=1, guides=images)
    calibrate(Autoencoder(steps=2), model, images[:12], np.arange(12))
    assert all(map(torch.equal, before[0], model.state_dict().values()))
    assert before[1] == [m.training for m in model.modules()]
    assert all(map(torch.equal, grads, (p.grad for p in model.parameters() if p.grad is not None)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"false_alarms": 0}, "share between 0 and 1"),
        ({"groups": np.zeros(6)}, "at least 2 groups"),
        ({"groups": np.arange(5)}, "one group each"),
    ],
)
def test_what_cannot_be_calibrated(model, images, change, message):
    options = {"groups": np.arange(6), "false_alarms": 0.1} | change
    with pytest.raises(ValueError, match=message):
        calibrate(made("max softmax"), model, images[:6], options.pop("groups"), **options)
    with pytest.raises(ValueError, match="must be float"):
        made("max softmax").fit(model, images[0])


def test_latency_is_of_one_slice_and_says_of_what(calibrated, images):
    table = latency({"max softmax": calibrated["max softmax"]}, images[:6], warm_up=1)
    assert table.detector.tolist() == ["none", "max softmax"] and table.n.eq(6).all()
    assert (0 < table.p50_ms).all() and (table.p50_ms <= table.p99_ms).all()
    assert table.threads.eq(torch.get_num_threads()).all() and table.processor.str.len().gt(0).all()


def test_detectors_are_timed_in_turn_so_that_the_machines_load_falls_on_all(calibrated, images, monkeypatch):
    """A machine that slows down all the time: what is timed last in each turn is hardly slower."""
    now, clock = [0.0], [0]

    def ticking():
        clock[0] += 1
        now[0] += clock[0]  # each look at the clock finds it further on than the last
        return now[0]

    monkeypatch.setattr(measures.time, "perf_counter", ticking)
    table = latency({"max softmax": calibrated["max softmax"]}, images[:6], warm_up=0)
    assert (table.p50_ms.diff().abs().dropna() <= 2000).all(), "two ticks apart, not twelve"


def test_false_alarms_are_shown_a_line_a_detector_and_a_column_a_source(calibrated, images, phantoms):
    name = "max softmax"
    parts = [
        false_alarms({name: calibrated[name]}, images[i::2], phantoms.patients[i::2], source)
        for i, source in enumerate(("some", "the rest"))
    ]
    shown = measures.alarms_layout(pd.concat(parts))
    assert shown.columns.tolist() == ["detector", "some (60)", "the rest (60)"]
    row = parts[1].iloc[0]
    low, high = 100 * row.alarms_low, 100 * row.alarms_high
    assert shown.loc[0, "the rest (60)"] == f"{100 * row.alarms:.0f} ({low:.0f}–{high:.0f})"


def test_the_figure_is_of_printed_size_with_letters_of_8_points(calibrated, images, labels, right, attacked):
    x, y = images[right[:8]], labels[right[:8]]
    fgsm = craft(calibrated["max softmax"].model, x, y, FGSM(EPS)).images
    rows, _ = against(calibrated["max softmax"], x, y, images, steps=2, crafted=[fgsm, attacked[right[:8]]])
    table = summary(rows, np.arange(8))
    fig = figures.detector_dots(table, implied(table, rows, np.arange(8), eps_255=EPS), trained=(0.3, 0.6))
    assert fig.get_figwidth() == 7.0
    texts = [t for t in fig.findobj(lambda o: hasattr(o, "get_fontsize")) if t.get_text().strip()]
    assert len(texts) > 8 and min(t.get_fontsize() for t in texts) >= 8


def test_another_dataset_is_a_folder_or_lidc_where_it_is_there(phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("FORTIFY_LIDC", str(tmp_path / "none"))
    assert other_slices("", size=32, most=5) is None and other_slices("lidc", size=32, most=5) is None
    for i in range(12):
        (tmp_path / f"own/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(phantoms.images[i]).save(tmp_path / f"own/{i % 2}/{i}.png")
    found = other_slices(str(tmp_path / "own"), size=32, most=5)
    assert len(found) == 5 and found.names == other_slices(str(tmp_path / "own"), size=32, most=5).names
    assert {*map(bytes, found.images)} <= {*map(bytes, phantoms.images[:12])}


def test_the_answer_holds_the_numbers(calibrated):
    """Of a detector that catches three of four of PGD's successes and none of the others'."""
    names = {"detector": "d", "n": 8, "broken": 4, "auroc": 0.9, "auroc_low": 0.8, "auroc_high": 1.0}
    share = {
        f"{name}{end}": 0.25 for name in ("alarms", "detection", "accuracy") for end in ("", "_low", "_high")
    }
    table = pd.DataFrame([names | share | {"attack": attack} for attack in ("clean", "pgd", "adaptive")])
    table["detection"] = [np.nan, 0.75, 0.0]
    claim = {
        f"{name}{end}": value
        for name, value in (("claimed", 0.5), ("adaptive", 0.1))
        for end in ("", "_low", "_high")
    }
    claims = pd.DataFrame([{"detector": "d", "n": 8} | claim])
    times = pd.DataFrame({"detector": ["none", "d"], "p50_ms": [1.21, 3.44]})
    said = answer(table, claims, [0.6, np.nan], 0.2, times)
    assert "which the interval includes" not in said
    assert "classifies 10 % correctly, which the interval includes." in answer(
        table, claims, [0.6, np.nan], 0.1, times
    )
    for number in ("75 % of the slices that PGD", "0 % of the slices that attackers", "10 (10–10) % of 8"):
        assert number in said, said
    for number in (
        "suggest 50 %",
        "network classifies 20 %",
        "training classifies 60 %",
        "about 3 ms",
        "alone about 1 ms",
    ):
        assert number in said, said
    assert "training" not in answer(table, claims, [np.nan, np.nan], 0.2, times)
    line = layout(table, claims).iloc[0]
    assert line["AUROC, PGD"] == "0.90 (0.80–1.00)" and line["alarms, PGD (%)"].startswith("75 ")


def test_an_examination_that_was_done_is_read_and_says_the_same(
    calibrated, attacked, images, labels, right, tmp_path
):
    few, detector = right[:6], calibrated["conformal"]
    fgsm = craft(detector.model, images[few], labels[few], FGSM(EPS)).images
    static, index = {"cw": images[few], "pgd": attacked[few], "fgsm": fgsm}, few.numpy() + 100
    about = {"index": index, "eps_255": EPS, "file": tmp_path / "rows.csv", "steps": 3, "restarts": 1}
    rows = examine(detector, images[few], labels[few], static, guides=images, **about)
    assert rows.attack.unique().tolist() == ["clean", "cw", "pgd", "fgsm", "adaptive"] and len(rows) == 30
    assert rows["index"].tolist() == 5 * index.tolist() and rows.evaded.dtype == bool
    again = examine(None, None, None, {}, index=[], eps_255=EPS, file=about["file"])  # it asks for nothing
    pd.testing.assert_frame_equal(rows, again)
    own, unaware = rows[rows.attack.eq("adaptive")], rows[rows.attack.isin(["pgd", "fgsm"])]
    assert own.evaded.sum() >= unaware.groupby("index").evaded.any().sum(), "what they found counts too"
