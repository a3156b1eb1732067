"""Simple classifiers under the same attacks: what a network must beat, clean and attacked.

Each is a ``torch.nn.Module`` of images (N, 1, H, W) in [0, 1] with logits (N, classes), fitted on training
and validation slices together; what has to be chosen is chosen on the validation slices, as networks choose
their epoch. To add one, write a function (slices, seed, positions of the validation slices) -> module and
give it a row in :data:`BASELINES`; where its logits have no gradient in the
image, its class says ``differentiable = False``.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fortify.attacks import ONE_ULP_255, Attack, checked, margin, perturbation_norms
from fortify.data import Slices, to_tensor
from fortify.evaluation import BLACK_BOX
from fortify.images import histograms
from fortify.models import build_model, predict, predict_logits
from fortify.runtime import seeded
from fortify.scoring import evaluate, logits, score
from fortify.splits import THUMBNAIL

SOFT_BINS = 16
_TREES = 200
_LEAST = 1e-3  # probability of a class that no tree votes for
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C
_MOST_STEPS = 300  # of the soft histogram
_PRECISION = 0.1 / 255  # of RayS's radii


class LargestClass(nn.Module):
    """Always the most frequent class of ``labels`` (N,): logits are the log shares of the classes."""

    differentiable = False

    def __init__(self, labels: np.ndarray, *, num_classes: int) -> None:
        super().__init__()
        shares = np.bincount(labels, minlength=num_classes) / len(labels)
        self.register_buffer("shares", torch.tensor(shares, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.shares.clamp(min=_LEAST).log().expand(len(x), -1)


class NearestThumbnail(nn.Module):
    """The class of the training slice whose thumbnail correlates most with the image's.

    A class's logit is ``scale`` times the highest correlation with its thumbnails, -scale where it has none.
    ``images`` (N, 1, H, W) in [0, 1], ``labels`` (N,). It has a gradient.
    """

    def __init__(
        self,
        images: Tensor,
        labels: np.ndarray,
        *,
        num_classes: int,
        side: int = THUMBNAIL,
        scale: float = 100,
    ) -> None:
        super().__init__()
        self.side, self.scale, self.num_classes = min(side, *images.shape[2:]), scale, num_classes
        order = np.argsort(labels, kind="stable")
        self.sizes = np.bincount(labels, minlength=num_classes).tolist()
        self.register_buffer("thumbnails", self._unit(images[order]))

    def _unit(self, x):
        """Thumbnails (N, side * side) of mean 0 and length 1: dot products are correlations."""
        flat = F.interpolate(x.mean(1, keepdim=True), (self.side, self.side), mode="area").flatten(1)
        return F.normalize(flat - flat.mean(1, keepdim=True), dim=1, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        found = (self._unit(x) @ self.thumbnails.T).split(self.sizes, 1)
        none = torch.full((len(x),), -1.0, device=x.device)
        return self.scale * torch.stack([own.amax(1) if own.shape[1] else none for own in found], 1)


class HistogramForest(nn.Module):
    """A random forest on histograms of 64 ranges of intensity; logits are the log of the trees' shares.

    It has no gradient. Images are rounded to 8 bits first, as in a file. ``images`` uint8 (N, H, W).
    """

    differentiable = False

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        from sklearn.ensemble import RandomForestClassifier  # here: its import takes a second

        forest = RandomForestClassifier(_TREES, random_state=seed)
        self.forest, self.num_classes = forest.fit(histograms(images), labels), num_classes

    def forward(self, x: Tensor) -> Tensor:
        grey = (x.detach().mean(1) * 255).round().clamp(0, 255).cpu().numpy().astype(np.uint8)
        shares = np.zeros((len(x), self.num_classes), dtype=np.float32)
        shares[:, self.forest.classes_] = self.forest.predict_proba(histograms(grey))
        return torch.from_numpy(shares).clamp(min=_LEAST).log().to(x.device)


class SoftHistogram(nn.Module):
    """A differentiable histogram of ``bins`` ranges under a network of one hidden layer.

    A pixel counts in the two bins whose centres it lies between, by its distance to each. ``images``
    (N, 1, H, W) in [0, 1], ``labels`` (N,); ``seed`` draws the initial weights. All slices are one batch.
    ``steps`` is the number of training steps. With None it is chosen: one training leaves out the slices at
    the positions ``validation`` (None: a fifth of all). Of 10, 20 ... 300 steps the number with the lowest
    cross-entropy on them is taken.
    """

    def __init__(
        self,
        images: Tensor,
        labels: np.ndarray,
        *,
        num_classes: int,
        bins: int = SOFT_BINS,
        hidden: int = 32,
        steps: int | None = None,
        validation: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.bins, self.shape = bins, (hidden, num_classes)
        found = torch.cat([self.histogram(x) for x in images.split(64)])
        self.register_buffer("mean", found.mean(0))
        self.register_buffer("sd", found.std(0).clamp(min=1e-4))
        x, y = (found - self.mean) / self.sd, torch.as_tensor(labels)
        validation = _held_out(len(y), validation, seed)
        self.steps = self._chosen_steps(x, y, validation, seed) if steps is None else steps
        for net in self._trained(x, y, self.steps, seed):
            self.net = net
        self.eval()

    def _trained(self, x, y, steps, seed):
        """Yield the network before training and after every ten of the steps, and after the last."""
        hidden, classes = self.shape
        with seeded(seed, "cpu"):
            net = nn.Sequential(nn.Linear(self.bins, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
        yield net
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            if step % 10 == 0 or step == steps:
                yield net

    def _chosen_steps(self, x, y, validation, seed):
        fitted, losses = np.setdiff1d(np.arange(len(y)), validation), []
        for net in self._trained(x[fitted], y[fitted], _MOST_STEPS, seed):
            with torch.no_grad():
                losses.append(F.cross_entropy(net(x[validation]), y[validation]).item())
        return 10 * (1 + int(np.argmin(losses[1:])))

    def histogram(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) in [0, 1] -> shares of the pixels (N, bins), which sum to 1."""
        place = x.flatten(1) * (self.bins - 1)
        shares = [F.relu(1 - (place - centre).abs()).mean(1) for centre in range(self.bins)]
        return torch.stack(shares, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((self.histogram(x) - self.mean) / self.sd)


class FrozenFeatures(nn.Module):
    """A linear classifier, fitted by logistic regression, of what a frozen network makes of the image.

    ``backbone`` takes images (N, 1, H, W) in [0, 1] and returns features (N, F); :func:`headless` makes one
    of a classifier. The features are standardised. ``penalty`` is scikit-learn's C: lower is simpler. With
    None it is chosen: of 0.0001, 0.001 ... 1 the one with the lowest cross-entropy on the slices at the
    positions ``validation`` (None: a fifth of all, drawn by ``seed``), fitted without them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        images: Tensor,
        labels: np.ndarray,
        *,
        num_classes: int,
        penalty: float | None = None,
        validation: np.ndarray | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        found = predict_logits(self.backbone, images).numpy().astype(np.float64)
        self.head = nn.Linear(found.shape[1], num_classes).requires_grad_(False)
        validation = _held_out(len(labels), validation, seed)
        self.penalty = self._chosen_penalty(found, labels, validation) if penalty is None else penalty
        mean, sd, fitted = self._fitted(found, labels, self.penalty)
        weight, bias = fitted.coef_, fitted.intercept_
        if len(fitted.classes_) == 2:  # one logit: of the second class against the first
            weight, bias = np.stack([0 * weight[0], weight[0]]), np.array([0, bias[0]])
        self.head.weight.zero_()
        self.head.bias.fill_(np.log(_LEAST))  # a class without training slices
        self.head.weight[fitted.classes_] = torch.from_numpy(weight / sd).float()
        self.head.bias[fitted.classes_] = torch.from_numpy(bias - (weight / sd) @ mean).float()

    @staticmethod
    def _fitted(found, labels, penalty):
        from sklearn.linear_model import LogisticRegression

        mean, sd = found.mean(0), np.maximum(found.std(0), 1e-6)
        return mean, sd, LogisticRegression(C=penalty, max_iter=2000).fit((found - mean) / sd, labels)

    def _chosen_penalty(self, found, labels, validation):
        known, losses = np.setdiff1d(np.arange(len(labels)), validation), []
        for penalty in _PENALTIES:
            mean, sd, fitted = self._fitted(found[known], labels[known], penalty)
            shares = np.full((len(validation), len(self.head.bias)), np.log(_LEAST))
            shares[:, fitted.classes_] = fitted.predict_log_proba((found[validation] - mean) / sd)
            losses.append(-np.take_along_axis(shares, labels[validation, None], 1).mean())
        return _PENALTIES[int(np.argmin(losses))]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def _held_out(count, validation, seed):
    """The positions ``validation``, or where there are none a fifth of ``count``."""
    if validation is not None:
        return validation
    return np.random.default_rng(seed).permutation(count)[: max(1, count // 5)]


def headless(model: nn.Module) -> nn.Module:
    """A copy of a classifier without its last linear layer: what that layer would have been given."""
    model = copy.deepcopy(model)
    name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model


def _frozen_features(known, seed, validation):
    net = build_model("efficientnet_lite0", num_classes=len(known.class_names), weights="imagenet")
    return FrozenFeatures(headless(net), **_given(known), validation=validation, seed=seed)


def _given(known):
    images, classes = to_tensor(known.images), len(known.class_names)
    return {"images": images, "labels": known.labels, "num_classes": classes}


# What a network is compared with, in the table's order. To add a classifier, give it a row here.
BASELINES: dict[str, Callable[[Slices, int, np.ndarray | None], nn.Module]] = {
    "largest class": lambda known, seed, validation: LargestClass(
        known.labels, num_classes=len(known.class_names)
    ),
    "nearest thumbnail": lambda known, seed, validation: NearestThumbnail(**_given(known)),
    "histogram forest": lambda known, seed, validation: HistogramForest(
        known.images, known.labels, num_classes=len(known.class_names), seed=seed
    ),
    "soft histogram": lambda known, seed, validation: SoftHistogram(
        **_given(known), validation=validation, seed=seed
    ),
    "frozen features": _frozen_features,
}


def fit_baselines(
    names: Collection[str],
    known: Slices,
    *,
    validation: np.ndarray | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """({name: fitted module in eval mode}, {name: why it is missing}) of the ``names`` in :data:`BASELINES`.

    ``known``: training and validation slices, uint8 (N, H, W); ``validation``: positions of the latter in it
    (None: where something is to be chosen, some slices are held out). One that needs a package that is not
    installed is missing. ValueError for an unknown name.
    """
    if unknown := sorted({*names} - {*BASELINES}):
        raise ValueError(f"no baseline is called {', '.join(unknown)}; BASELINES has {', '.join(BASELINES)}")
    fitted, missing = {}, {}
    for name in names:
        try:
            fitted[name] = BASELINES[name](known, seed, validation).to(device).eval()
        except ImportError as error:
            missing[name] = str(error)
    return fitted, missing


def evaluate_baselines(
    models: Mapping[str, nn.Module],
    images: Any,
    labels: Any,
    attacks: Sequence[Attack],
    *,
    transferred: Sequence[np.ndarray] = (),
    queries: int = 500,
    index: Sequence[int] | None = None,
    split: str = "all",
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of every classifier under the ``attacks``, of one Linf budget, and its logits.

    ``images`` (N, C, H, W) float in [0, 1] and ``labels`` (N,). A classifier with a gradient is attacked as
    any network (:func:`fortify.scoring.evaluate`). One that says ``differentiable = False`` meets
    :func:`black_box` (attack :data:`fortify.evaluation.BLACK_BOX`) instead, with the images ``transferred``
    and those crafted on the other classifiers.
    Returns (``evaluation.COLUMNS``, :func:`fortify.scoring.logits` of clean and every attacked slice).
    ValueError where the attacks have several budgets or none.
    """
    images, labels = checked(images, labels)
    budgets = {getattr(attack, "eps_255", None) for attack in attacks}
    if len(budgets) != 1 or None in budgets:
        raise ValueError(f"the attacks must have one Linf budget, not {budgets}")
    (eps_255,), transferred = budgets, list(transferred)
    kept, rows = {}, {}
    for name in sorted(models, key=lambda name: not getattr(models[name], "differentiable", True)):
        model, ids = models[name], {"index": index, "model_name": name, "split": split, "seed": seed}
        if getattr(model, "differentiable", True):
            keep = {attack.name: attack for attack in attacks}
            rows[name], kept[name] = evaluate(
                model, images, labels, attacks, keep=keep, batch_size=batch_size, **ids
            )
            transferred += kept[name].values()
            continue
        asked = 0 if isinstance(model, LargestClass) else queries  # which no image changes
        options = {"eps_255": eps_255, "queries": asked, "batch_size": batch_size}
        found = black_box(model, images, labels, transferred, **options)
        clean = score(model, images, labels, attack="clean", eps_255=0, batch_size=batch_size, **ids)
        lost = torch.tensor(clean.success.to_numpy()).view(-1, 1, 1, 1)
        shown = {"adversarial": torch.where(lost, images, found), "batch_size": batch_size}
        attacked = score(model, images, labels, attack=BLACK_BOX, eps_255=eps_255, **shown, **ids)
        rows[name], kept[name] = pd.concat([clean, attacked], ignore_index=True), {BLACK_BOX: found}
    found = [
        logits(
            model,
            {"clean": images} | kept[name],
            labels,
            index=index,
            model_name=name,
            split=split,
            seed=seed,
        )
        for name, model in models.items()
    ]
    return pd.concat([rows[name] for name in models], ignore_index=True), pd.concat(found, ignore_index=True)


def black_box(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    transferred: Sequence[Any],
    *,
    eps_255: float,
    queries: int,
    batch_size: int = 64,
) -> Tensor:
    """The strongest of several attacks that need no gradient: images (N, C, H, W) within the budget.

    Of each slice: among the clean image and those ``transferred`` (each (N, C, H, W), crafted on other models
    within ``eps_255``), one that is misclassified, else the one of the largest margin loss. What all of them
    leave correct, :func:`rays` attacks. ValueError where a transferred image is beyond the budget.
    """
    best, worst = images, _severity(model, images, labels, batch_size)
    for other in transferred:
        other = torch.as_tensor(other)
        if (largest := perturbation_norms(images, other)[0].max().item()) > eps_255 + ONE_ULP_255:
            raise ValueError(f"a transferred image is {largest:.4g} grey levels away, beyond {eps_255:g}")
        severity = _severity(model, other, labels, batch_size)
        better = severity > worst
        best, worst = torch.where(better.view(-1, 1, 1, 1), other, best), torch.maximum(severity, worst)
    left = (predict(model, best, batch_size=batch_size).argmax(1) == labels).nonzero().squeeze(1)
    if not len(left):
        return best
    found = rays(model, images[left], labels[left], eps_255=eps_255, queries=queries, batch_size=batch_size)
    broken = predict(model, found, batch_size=batch_size).argmax(1) != labels[left]
    best = best.clone()
    best[left[broken]] = found[broken]
    return best


def _severity(model, images, labels, batch_size):
    """The margin loss (N,), with every misclassified image above all others: logits may tie."""
    found = predict_logits(model, images, batch_size=batch_size)
    return margin(found, labels) + 1e6 * (found.argmax(1) != labels)


def rays(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps_255: float,
    queries: int,
    batch_size: int = 64,
) -> Tensor:
    """RayS (Chen & Gu 2020, arXiv:2006.12792), a decision-based attack: (N, C, H, W), clean where it fails.

    It asks for predictions alone, at most ``queries`` an image: along a direction of plus and minus ones,
    whose blocks it turns one after another, ever smaller, it looks for the smallest Linf radius that is
    misclassified, and stops within ``eps_255``. It draws nothing. Not HopSkipJump: in Linf Foolbox's probes
    are far smaller than half a grey level, which rounding to 8 bits removes.
    """
    flat, eps = images.flatten(1), eps_255 / 255
    n, size = flat.shape
    place, first = torch.arange(size), torch.arange(n)
    sign, radius = torch.ones(n, size), torch.full((n,), torch.inf)  # the best direction, what it takes
    trial, low, high = sign.clone(), torch.zeros(n), torch.ones(n)  # the direction that is asked about
    halving = torch.zeros(n, dtype=torch.bool)  # whether its radius is being looked for
    blocks, block = torch.ones(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)

    def moved(chosen, at, along):
        return (flat[chosen] + at[:, None] * along).clamp(0, 1).view(-1, *images.shape[1:])

    for _ in range(queries):  # one of each image that is not within the budget yet
        going = first[radius > eps]
        if not len(going):
            break
        # The budget itself as soon as it lies between: no radius below it is worth a query.
        middle = torch.where(low < eps, torch.full_like(low, eps), (low + high) / 2)
        at = torch.where(halving, middle, radius.clamp(max=1))[going]
        found = predict(model, moved(going, at, trial[going]), batch_size=batch_size).argmax(1)
        wrong = found != labels[going]
        refused = going[~wrong & ~halving[going]]
        low[going[~wrong & halving[going]]] = at[~wrong & halving[going]]
        high[going[wrong]] = at[wrong]
        low[going[wrong & ~halving[going]]] = 0
        halving[going[wrong]] = True
        done = going[halving[going] & ((high - low <= _PRECISION) | (high <= eps))[going]]
        sign[done], radius[done], halving[done] = trial[done], high[done], False
        turned = torch.cat([refused, done])  # on to the next block
        start, end = (size * (block + more) // blocks for more in (0, 1))
        inside = (place >= start[turned, None]) & (place < end[turned, None])
        trial[turned] = torch.where(inside, -sign[turned], sign[turned])
        block[turned] += 1
        full = block >= blocks
        blocks = torch.where(full, torch.where(2 * blocks <= size, 2 * blocks, 1), blocks)
        block[full] = 0
    found = moved(first, radius.clamp(max=1), sign)
    return torch.where((radius <= eps).view(-1, 1, 1, 1), found, images)
