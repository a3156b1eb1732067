"""Simple classifiers say what their parts say, and are attacked within the budget like any network."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from fortify import baselines, splits
from fortify.attacks import FGSM, ONE_ULP_255, PGD
from fortify.baselines import (
    BASELINES,
    FrozenFeatures,
    HistogramForest,
    LargestClass,
    NearestThumbnail,
    SoftHistogram,
    black_box,
    evaluate_baselines,
    fit_baselines,
    headless,
    rays,
)
from fortify.data import Slices
from fortify.evaluation import BLACK_BOX, check_rows
from fortify.images import histograms
from fortify.models import build_model, predict, predict_logits

EPS_255 = 4
SIMPLE = [name for name in BASELINES if name != "frozen features"]
TEST = np.arange(0, 120, 3)  # a slice of each patient
TRAIN = np.setdiff1d(np.arange(120), TEST)


@pytest.fixture(scope="module")
def fitted(phantoms):
    models, missing = fit_baselines(SIMPLE, phantoms.subset(TRAIN))
    assert not missing and list(models) == SIMPLE
    return models


@pytest.fixture(scope="module")
def evaluated(fitted, images, labels):
    attacks = [FGSM(EPS_255), PGD(EPS_255, steps=5)]
    options = {"queries": 60, "index": TEST, "split": "random"}
    return evaluate_baselines(fitted, images[TEST], labels[TEST], attacks, **options)


def test_no_attack_leaves_the_budget_and_none_does_nothing(evaluated):
    rows, _ = evaluated
    check_rows(rows)
    attacked = rows[rows.attack.ne("clean")]
    assert attacked.linf_255.max() <= EPS_255 + ONE_ULP_255
    kinds = {name: set(own.attack) for name, own in attacked.groupby("model")}
    assert kinds == {
        "largest class": {BLACK_BOX}, "histogram forest": {BLACK_BOX},
        "nearest thumbnail": {"pgd", "fgsm"}, "soft histogram": {"pgd", "fgsm"},
    }  # fmt: skip
    accuracy = rows.assign(right=~rows.success).groupby(["model", "attack"]).right.mean()
    assert accuracy["histogram forest", BLACK_BOX] < accuracy["histogram forest", "clean"]
    assert accuracy["soft histogram", "pgd"] < accuracy["soft histogram", "clean"]
    assert accuracy["largest class", BLACK_BOX] == accuracy["largest class", "clean"]


def test_what_is_misclassified_when_clean_is_so_under_attack(evaluated):
    rows, _ = evaluated
    clean = rows[rows.attack.eq("clean")].set_index(["model", "index"])
    lost = clean.index[clean.success]
    assert len(lost) > 10
    for _, own in rows[rows.attack.ne("clean")].groupby("attack"):
        own = own.set_index(["model", "index"])
        assert own.loc[lost.intersection(own.index)].success.all()


def test_logits_are_of_every_slice_clean_and_attacked(evaluated, fitted, images):
    """Also of those that are misclassified when clean, whose rows hold the clean image."""
    rows, logits = evaluated
    kinds = [tuple(kind) for kind in rows[["model", "attack"]].drop_duplicates().to_numpy()]
    assert len(logits) == len(kinds) * len(TEST)
    for (name, attack), own in logits.groupby(["model", "attack"]):
        found = own.filter(like="logit_").to_numpy()
        assert own["index"].tolist() == TEST.tolist() and found.shape == (len(TEST), 3)
        if attack == "clean":
            assert np.array_equal(found, predict_logits(fitted[name], images[TEST], batch_size=64).numpy())
            continue
        lost = rows[rows.model.eq(name) & rows.attack.eq("clean")].success.to_numpy()
        said = rows[rows.model.eq(name) & rows.attack.eq(attack)].prediction.to_numpy()
        assert np.array_equal(found.argmax(1)[~lost], said[~lost])
    soft = logits[logits.model.eq("soft histogram")].set_index(["attack", "index"]).filter(like="logit_")
    lost = rows[rows.model.eq("soft histogram") & rows.attack.eq("clean") & rows.success]["index"]
    assert len(lost) and not np.allclose(soft.loc["pgd"].loc[lost], soft.loc["clean"].loc[lost])


def test_the_forest_is_correct_only_where_no_attack_breaks_it(fitted, images, labels):
    """Neither an image that was crafted on another model, nor the one that asks for decisions alone."""
    forest, x, y = fitted["histogram forest"], images[TEST], labels[TEST]
    brighter = (x + EPS_255 / 255).clamp(0, 1)
    options = {"eps_255": EPS_255, "queries": 60}
    alone = [predict(forest, z).argmax(1) != y for z in (brighter, rays(forest, x, y, **options))]
    clean = predict(forest, x).argmax(1) != y
    assert all((own & ~clean).any() for own in alone)
    found = predict(forest, black_box(forest, x, y, [brighter], **options)).argmax(1) != y
    assert torch.equal(found, clean | alone[0] | alone[1])
    with pytest.raises(ValueError, match="8 grey levels away, beyond 4"):
        black_box(forest, x, y, [(x + 8 / 255).clamp(0, 1)], **options)


class Counted(nn.Module):
    """Whether the mean of the image is above a threshold; counts what it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x):
        self.asked.append(len(x))
        above = (x.flatten(1).mean(1) > 0.5).float()
        return torch.stack([1 - above, above], 1)


@pytest.mark.parametrize("queries", [0, 7, 40])
def test_rays_find_a_plain_boundary_within_their_queries(queries):
    x = torch.stack([torch.full((1, 4, 4), value) for value in (0.49, 0.3, 0.53, 0.0)])
    y = (x.flatten(1).mean(1) > 0.5).long()
    model = Counted()
    found = rays(model, x, y, eps_255=10, queries=queries)
    assert len(model.asked) <= queries
    changed = (found - x).abs().flatten(1).amax(1) * 255
    if queries == 40:  # the first is near the boundary, upwards; the third downwards; the others too far away
        assert (Counted()(found).argmax(1) != y).tolist() == [True, False, True, False]
        assert (changed <= 10 + ONE_ULP_255).all() and (changed[[0, 2]] > 2).all()
    assert changed[[1, 3]].tolist() == [0, 0], "where it fails the image is the clean one"


def test_the_largest_class_is_the_trainings_own(images):
    model = LargestClass(np.array([2, 2, 0, 2]), num_classes=4)
    assert predict(model, images[:5]).argmax(1).tolist() == [2] * 5


def test_the_nearest_thumbnail_is_that_of_the_correlation(phantoms, images, fitted):
    """Through the thumbnails of the groups, in numpy."""
    thumbnails = splits.unit_thumbnails(phantoms.images, baselines.THUMBNAIL)
    nearest = TRAIN[(thumbnails[TEST] @ thumbnails[TRAIN].T).argmax(1)]
    model = fitted["nearest thumbnail"]
    assert predict(model, images[TEST]).argmax(1).tolist() == phantoms.labels[nearest].tolist()
    assert predict(model, images[TRAIN]).argmax(1).tolist() == phantoms.labels[TRAIN].tolist()
    few = NearestThumbnail(images[:2], np.array([2, 2]), num_classes=3)
    assert (predict_logits(few, images[:1])[0, :2] == -few.scale).all(), "classes without a slice"


def test_the_forest_takes_images_as_eight_bits(phantoms, images, fitted):
    forest = fitted["histogram forest"]
    own = forest.forest.predict(histograms(phantoms.images[TEST]))
    assert predict(forest, images[TEST]).argmax(1).tolist() == own.tolist()
    nudged = (images[TEST] + 0.4 / 255).clamp(0, 1)
    assert torch.equal(predict_logits(forest, nudged), predict_logits(forest, images[TEST]))
    missing = HistogramForest(phantoms.images[:4], np.array([0, 2, 0, 2]), num_classes=3)
    assert not predict(missing, images).argmax(1).eq(1).any()


def test_a_soft_histogram_is_a_share_of_the_pixels_with_a_gradient(images, labels):
    model = SoftHistogram(images, labels.numpy(), num_classes=3, bins=5, steps=5)
    x = torch.tensor([0.0, 0.25, 0.25, 0.9375]).view(1, 1, 2, 2).requires_grad_()
    found = model.histogram(x)
    assert found[0].tolist() == [0.25, 0.5, 0, 0.0625, 0.1875]
    (slope,) = torch.autograd.grad(found[0, 4], x)
    assert slope.flatten().tolist() == [0, 0, 0, 1]  # 4 bins' widths, a quarter of the pixels
    state = torch.get_rng_state()
    again = SoftHistogram(images, labels.numpy(), num_classes=3, bins=5, steps=5)
    assert torch.equal(model(images), again(images)) and torch.equal(torch.get_rng_state(), state)


def test_a_soft_histogram_stops_where_validation_slices_say(images, labels):
    """At once where these have other classes than training slices of the same grey levels, else later."""
    grey = torch.linspace(0.1, 0.9, 60).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    order = np.random.default_rng(0).permutation(60)
    validation, classes = order[:20], np.arange(60) // 20
    wrong = classes.copy()
    wrong[validation] = (wrong[validation] + 1) % 3
    right, misled = (SoftHistogram(grey, y, num_classes=3, validation=validation) for y in (classes, wrong))
    assert misled.steps == 10 and right.steps >= 40
    fixed = SoftHistogram(grey, classes, num_classes=3, steps=right.steps)
    assert torch.equal(fixed(grey), right(grey)), "then it is trained on all of them"
    known = Slices(
        images=(grey[:, 0].numpy() * 255).astype(np.uint8),
        labels=wrong,
        names=tuple(map(str, range(60))),
        class_names=("a", "b", "c"),
        source="greys",
        sha256="",
        groups=np.arange(60),
    )
    models, _ = fit_baselines(["soft histogram"], known, validation=validation)
    assert models["soft histogram"].steps == 10


@pytest.mark.parametrize("classes", [(0, 1, 2), (0, 2)])
def test_frozen_features_are_a_logistic_regression_on_the_networks_own(images, labels, classes):
    net = build_model("resnet_small", num_classes=3, seed=0)
    backbone = headless(net)
    given = torch.isin(labels, torch.tensor(classes))
    x, y = images[given], labels[given].numpy()
    model = FrozenFeatures(backbone, x, y, num_classes=3, penalty=0.1)
    features = predict_logits(backbone, x).double().numpy()
    assert features.shape == (len(x), 192) and predict(net, x).shape == (len(x), 3), "the net keeps its head"
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(features, y)
    own = predict(model, x)[:, list(classes)]
    assert own.argmax(1).tolist() == pipeline.predict_proba(features).argmax(1).tolist()
    assert (own / own.sum(1, keepdim=True)).numpy() == pytest.approx(
        pipeline.predict_proba(features), abs=1e-3
    )
    rows, _ = evaluate_baselines({"frozen features": model}, x[:20], y[:20], [PGD(EPS_255, steps=3)])
    accuracy = rows.assign(right=~rows.success).groupby("attack").right.mean()
    assert accuracy["pgd"] < accuracy["clean"] and rows.linf_255.max() <= EPS_255 + ONE_ULP_255


def test_frozen_features_choose_their_penalty_on_the_validation_slices(images, labels):
    backbone = headless(build_model("resnet_small", num_classes=3, seed=0))
    x, y = images[:120], labels[:120].numpy()
    val = np.arange(0, 120, 4)
    known = np.setdiff1d(np.arange(120), val)
    features = predict_logits(backbone, x).double().numpy()
    losses = {}
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))
        shares = fitted.fit(features[known], y[known]).predict_proba(features[val])
        losses[penalty] = log_loss(y[val], shares, labels=[0, 1, 2])
    model = FrozenFeatures(backbone, x, y, num_classes=3, validation=val)
    assert model.penalty == min(losses, key=losses.get)
    again = FrozenFeatures(backbone, x, y, num_classes=3, penalty=model.penalty)
    assert torch.equal(model.head.weight, again.head.weight), "fitted at last on all slices"
    other = np.where(np.isin(np.arange(120), val), (y + 1) % 3, y)
    wrong = FrozenFeatures(backbone, x, other, num_classes=3, validation=val)
    assert wrong.penalty == 1e-4, "where training says nothing about validation, the simplest is taken"


def test_the_tables_frozen_features_are_given_the_validation_slices(phantoms, monkeypatch):
    net = build_model("resnet_small", num_classes=3, seed=0)
    monkeypatch.setattr(baselines, "build_model", lambda *args, **options: net)
    val, labels = np.arange(0, 120, 4), phantoms.labels.copy()
    labels[val] = (labels[val] + 1) % 3
    wrong, _ = fit_baselines(["frozen features"], replace(phantoms, labels=labels), validation=val)
    assert wrong["frozen features"].penalty == 1e-4, "training says nothing about validation"


def test_what_needs_an_extra_is_left_out_and_named(phantoms, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    models, missing = fit_baselines(["largest class", "frozen features"], phantoms.subset(TRAIN))
    assert list(models) == ["largest class"] and "'.[pretrained]'" in missing["frozen features"]
    with pytest.raises(ValueError, match="no baseline is called forest; BASELINES has largest class, near"):
        fit_baselines(["forest"], phantoms)


def test_another_baseline_costs_a_row(phantoms, images, labels, monkeypatch):
    monkeypatch.setitem(BASELINES, "mean", lambda known, seed, validation: Mean())
    models, _ = fit_baselines(["mean"], phantoms)
    rows, logits = evaluate_baselines(models, images[:9], labels[:9], [FGSM(EPS_255)])
    assert set(rows.model) == set(logits.model) == {"mean"} and len(rows) == 18


class Mean(nn.Module):
    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([mean, 0.5 - mean, mean * 0], 1)


@pytest.mark.parametrize("attacks", [[], [FGSM(4), PGD(2)]])
def test_baselines_are_compared_at_one_budget(fitted, images, labels, attacks):
    with pytest.raises(ValueError, match="must have one Linf budget"):
        evaluate_baselines(fitted, images, labels, attacks)
