"""Wrong images, labels and attacks into whatever takes them: one clear ValueError, the model as it was."""

import numpy as np
import pytest
import torch

from fortify.attacks import CW, FGSM, PGD, craft, perturbation_norms
from fortify.audit import AuditData
from fortify.augmentation import Augmentation, augment
from fortify.data import Slices, to_tensor
from fortify.examined.protocol import score_published
from fortify.leakage import craft_within, lungs_or_scanner
from fortify.models import predict
from fortify.scoring import evaluate, score, score_static
from fortify.splits import grouped_split, near_duplicate_groups, random_split
from fortify.training import Recipe, accuracy, class_weights, fit

N = 4
X = torch.rand(N, 1, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0])
IDS = {"index": np.arange(N), "model_name": "normal", "split": "random", "seed": 0}
CLEAN = {"attack": "clean", "eps_255": 0}


def one(value):
    changed = X.clone()
    changed[1, 0, 3, 3] = value
    return changed


IMAGES = {
    "uint8": (X * 255).byte(),
    "integers": (X * 255).long(),
    "no channel": X[:, 0],
    "colour": X.expand(N, 3, 32, 32),
    "one image alone": X[0],
    "none": X[:0],
}
VALUES = {"greys of 255": X * 255, "NaN": one(torch.nan), "infinite": one(torch.inf), "below 0": one(-0.01)}
LABELS = {
    "another class": torch.tensor([0, 1, 2, 3]),
    "below 0": torch.tensor([0, 1, 2, -1]),
    "fractions": torch.tensor([0.0, 1.0, 2.0, 0.0]),
    "too few": torch.tensor([0, 1]),
    "one-hot": torch.eye(3, dtype=torch.long)[Y],
}
STATIC = {name: (X + 4 / 255 * (X < 0.5)).numpy() for name in ("fgsm", "pgd", "cw")}  # crafted elsewhere
# What takes images and labels.
BOTH = {
    "craft": lambda model, x, y: craft(model, x, y, PGD(4, steps=1)),
    "craft, CW": lambda model, x, y: craft(model, x, y, CW(1, 1)),
    "evaluate": lambda model, x, y: evaluate(model, x, y, [FGSM(4)], **IDS),
    "score": lambda model, x, y: score(model, x, y, **CLEAN, **IDS),
    "score_static": lambda model, x, y: score_static(model, x, y, STATIC, eps_255=4, **IDS),
    "score_published": lambda model, x, y: score_published(model, x, y, **IDS),
    "craft_within": lambda model, x, y: craft_within(model, x, y, FGSM(4), np.ones((32, 32), bool)),
    "AuditData": lambda model, x, y: AuditData(x, y),
}
# What takes images alone.
ALONE = {
    "predict": lambda model, x: predict(model, x),
    "perturbation_norms": lambda model, x: perturbation_norms(X, x),
    "augment": lambda model, x: augment(x, Augmentation(), generator=torch.Generator()),
}


@pytest.fixture(autouse=True)
def as_it_was(model):
    def state():
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [*(v.clone() for v in model.state_dict().values()), *grads], modes()

    def modes():
        return [*(m.training for m in model.modules()), *(p.requires_grad for p in model.parameters())]

    (tensors, kinds) = state()
    yield
    after, kinds_after = state()
    assert kinds_after == kinds and len(after) == len(tensors)
    assert all(map(torch.equal, after, tensors))


def refused(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert len(text) > 15 and "\n" not in text, text
    return text


@pytest.mark.parametrize("wrong", IMAGES | VALUES)
@pytest.mark.parametrize("name", BOTH)
def test_images(model, name, wrong):
    if name == "AuditData" and wrong == "colour":
        pytest.skip("no model, so any number of channels, until audit")
    x = (IMAGES | VALUES)[wrong]
    assert "image" in refused(BOTH[name], model, x, Y[: len(x)] if wrong == "none" else Y)


@pytest.mark.parametrize("wrong", LABELS)
@pytest.mark.parametrize("name", BOTH)
def test_labels(model, name, wrong):
    if name == "AuditData" and wrong == "another class":
        pytest.skip("no model, so no classes, until audit")
    assert "label" in refused(BOTH[name], model, X, LABELS[wrong])


@pytest.mark.parametrize("wrong", set(IMAGES) - {"none", "colour"} | {"colour, predict"})
@pytest.mark.parametrize("name", ALONE)
def test_images_alone(model, name, wrong):
    if wrong == "colour, predict" and name == "augment":
        pytest.skip("views of any channels")
    assert "image" in refused(ALONE[name], model, IMAGES[wrong.split(",")[0]])


@pytest.mark.parametrize("wrong", [VALUES["NaN"], X[:2], (X * 255).byte()])
def test_adversarial_images(model, wrong):
    assert "image" in refused(lambda: score(model, X, Y, **CLEAN, adversarial=wrong, **IDS))


@pytest.mark.parametrize(
    "call",
    [
        lambda: FGSM(-1),
        lambda: FGSM(float("nan")),
        lambda: FGSM(float("inf")),
        lambda: FGSM(256),
        lambda: FGSM("4"),
        lambda: PGD(None),
        lambda: PGD(4, steps=0),
        lambda: PGD(4, restarts=0),
        lambda: PGD(4, rel_stepsize=-1),
        lambda: PGD(4, rel_stepsize=float("nan")),
        lambda: PGD(4, loss="hinge"),
        lambda: CW(steps=0),
        lambda: CW(binary_search_steps=0),
        lambda: CW(stepsize=0),
        lambda: CW(initial_const=-1),
        lambda: CW(initial_const=0),
        lambda: CW(confidence=float("nan")),
    ],
)
def test_attacks(call):
    refused(call)


@pytest.mark.parametrize("array", [X.numpy(), np.zeros((2, 8, 8)), np.zeros((8, 8), np.uint8), [[0]]])
def test_to_tensor(array):
    refused(to_tensor, array)


def slices(labels, images=None, **fields):
    n = len(labels)
    images = (
        np.random.default_rng(0).integers(0, 256, (n, 32, 32), dtype=np.uint8) if images is None else images
    )
    names = tuple(f"c/{i}.png" for i in range(n))
    return Slices(
        images, np.asarray(labels, np.int64), names, ("a", "b", "c"), "made here", "0" * 64, **fields
    )


def test_a_class_of_one_image_and_a_class_of_none(model):
    few = slices([0] * 20 + [1] * 20 + [2])
    assert "class" in refused(lambda: random_split(few.labels, seed=0))
    assert "class" in refused(lambda: class_weights(torch.tensor([0, 1, 1]), 3))
    none = slices([0] * 8 + [1] * 8)
    assert "class" in refused(lambda: fit(model, none, none, Recipe(epochs=1, batch_size=8), progress=False))
    whole = np.repeat(np.arange(21), [1] * 20 + [21])  # a class in one group cannot be on three sides
    assert "group" in refused(lambda: grouped_split([0] * 20 + [1] * 21, whole, seed=0))


def test_constant_images_are_all_one_group():
    flat = slices([0, 1, 2], images=np.full((3, 32, 32), 7, np.uint8))
    assert set(near_duplicate_groups(flat)) == {0}


@pytest.mark.parametrize("images", [X, (X * 255).byte(), (X[:0] * 255).byte()])
def test_accuracy_takes_whole_greys(model, images):
    if images.dtype == torch.uint8 and len(images):
        assert 0 <= accuracy(model, images, Y) <= 1
        assert "images" in refused(lambda: accuracy(model, images, Y[:2]))
    else:
        assert "images" in refused(lambda: accuracy(model, images, Y))


def test_regions(model):
    greys = (X[:, 0] * 255).byte().numpy()
    options = {"attack": FGSM(4), "frame_width": 2}
    assert "uint8" in refused(lambda: lungs_or_scanner(model, X[:, 0].numpy(), Y.numpy(), **options))
    assert "frame" in refused(
        lambda: lungs_or_scanner(model, greys, Y.numpy(), attack=FGSM(4), frame_width=16)
    )
    assert "mask" in refused(lambda: craft_within(model, X, Y, FGSM(4), np.ones((7, 7), bool)))
