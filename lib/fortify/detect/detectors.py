"""Detectors of attacked images: one class each, fitted and calibrated on clean images, kept in one file.

A detector scores an image: higher is more suspicious. It raises an alarm above its threshold, which
:func:`calibrate` sets on clean validation images. To add one, write a class like those below and give it a
row in :data:`DETECTORS`: the attacks, tables, notebook and command take it from there.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fortify.files import read_safetensors, write_safetensors
from fortify.models import Guarded
from fortify.runtime import device_of, eval_mode, float32_convolutions, seeded

_FAR = 1e6  # distance to a class without reference images
_FORMAT = "fortify-detectors-1"


class Seen(NamedTuple):
    """What a network makes of images: both float32, rows as the images."""

    logits: Tensor  # (B, classes)
    features: Tensor  # (B, F), what its last linear layer is given


def look(model: nn.Module, x: Tensor) -> Seen:
    """Logits and features of images (B, C, H, W) in [0, 1] from one pass, with gradients.

    Features are those of :func:`fortify.baselines.headless`. ValueError for a model without a linear layer.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError("the model has no linear layer, so it has no features that a detector could use")
    given = []
    hook = layers[-1].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        logits = Guarded.of(model)(x)
    finally:
        hook.remove()
    return Seen(logits, given[-1].flatten(1).float())


class Detector(abc.ABC):
    """A detector of one network. ``model``, ``state``, ``threshold`` and ``scale`` are set when it is fitted.

    ``state`` holds what it learnt, tensors on the model's device. ``scale`` is how much :meth:`followed`
    varies over clean images: attackers weigh it against the classifier's loss in this unit.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = True  # False: nothing is fitted but the threshold
    model: nn.Module
    state: Mapping[str, Tensor]
    threshold: float = float("inf")
    scale: float = 1.0

    def fit(self, model: nn.Module, images: Tensor, *, seed: int = 0) -> Self:
        """Fit on clean ``images`` (N, C, H, W) float in [0, 1]; the threshold is :func:`calibrate`'s.

        The network's own predictions serve as labels. ValueError for no images.
        """
        if images.ndim != 4 or not images.is_floating_point() or not len(images):
            raise ValueError(
                f"images must be float (N, C, H, W) in [0, 1], not {tuple(images.shape)} {images.dtype}"
            )
        self.model, device = model, device_of(model)
        with seeded(seed, device):
            learnt = self.learn(images.to(device), _observed(model, images)) if self.learns else {}
        self.state = {name: value.detach().to(device, torch.float32) for name, value in learnt.items()}
        return self

    def learn(self, x: Tensor, seen: Seen) -> dict[str, Tensor]:
        """What is kept of clean images ``x``, as tensors."""
        return {}

    @abc.abstractmethod
    def suspicion(self, x: Tensor, seen: Seen) -> Tensor:
        """Scores (B,) of images and of what the network makes of them, with whatever gradient they have."""

    def followed(self, x: Tensor, seen: Seen) -> Tensor:
        """What an attacker who knows the detector makes small in its place, (B,).

        Another function than the score where that has no useful gradient (BPDA, Athalye et al. 2018).
        """
        return self.suspicion(x, seen)

    def judge(self, images: Tensor, *, batch_size: int = 64) -> tuple[Tensor, Tensor]:
        """(scores (N,), probabilities (N, classes)) of images, float32 on the CPU, without gradients."""
        device, found = device_of(self.model), []
        with eval_mode(self.model), torch.no_grad(), float32_convolutions(device):
            for x in images.split(batch_size):
                x = x.to(device, torch.float32)
                seen = look(self.model, x)
                found.append((self.suspicion(x, seen).cpu(), seen.logits.softmax(1).cpu()))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def score(self, images: Tensor, *, batch_size: int = 64) -> Tensor:
        """Scores (N,), float32 on the CPU, of images (N, C, H, W) in [0, 1]."""
        return self.judge(images, batch_size=batch_size)[0]


@dataclasses.dataclass
class MaxSoftmax(Detector):
    """Low confidence: -log of the predicted class's probability (Hendrycks & Gimpel 2017)."""

    name: ClassVar[str] = "max softmax"
    learns: ClassVar[bool] = False

    def suspicion(self, x: Tensor, seen: Seen) -> Tensor:
        return seen.logits.logsumexp(1) - seen.logits.amax(1)  # the log keeps digits near certainty


@dataclasses.dataclass
class FeatureSqueezing(Detector):
    """Largest L1 distance of the probabilities before and after squeezing (Xu, Evans & Qi 2018).

    Squeezers: ``bits`` a pixel, and the median of ``window`` x ``window`` pixels (odd). An attacker has the
    squeezed images predicted as the image is, and takes rounding, which has no gradient, for the identity.
    """

    bits: int = 5
    window: int = 3
    name: ClassVar[str] = "feature squeezing"
    learns: ClassVar[bool] = False

    def squeezed(self, x: Tensor) -> list[Tensor]:
        return [fewer_bits(x, self.bits), median_smoothed(x, self.window)]

    def suspicion(self, x: Tensor, seen: Seen) -> Tensor:
        views = Guarded.of(self.model)(torch.cat(self.squeezed(x))).softmax(1).view(-1, *seen.logits.shape)
        return (views - seen.logits.softmax(1)).abs().sum(2).amax(0)

    def followed(self, x: Tensor, seen: Seen) -> Tensor:
        views = self.squeezed(x)
        logits, target = Guarded.of(self.model)(torch.cat(views)), seen.logits.argmax(1).repeat(len(views))
        return F.cross_entropy(logits, target, reduction="none").view(len(views), -1).amax(0)


def fewer_bits(x: Tensor, bits: int) -> Tensor:
    """Images in [0, 1] rounded to 2**bits intensities; its gradient is that of the identity."""
    return x + ((x * (2**bits - 1)).round() / (2**bits - 1) - x).detach()


def median_smoothed(x: Tensor, window: int) -> Tensor:
    """Images (B, C, H, W), each pixel the median of the ``window`` x ``window`` around it."""
    padded = F.pad(x, [window // 2] * 4, mode="reflect")
    return padded.unfold(2, window, 1).unfold(3, window, 1).flatten(4).median(-1).values


@dataclasses.dataclass
class Mahalanobis(Detector):
    """Squared Mahalanobis distance of the features to the nearest class mean (Lee et al. 2018), last layer.

    One covariance for all classes, shrunk as Ledoit & Wolf (2004) say: there are fewer images than features.
    It is kept as the directions that the images span; elsewhere the variance is the shrunk one.
    """

    name: ClassVar[str] = "mahalanobis"

    def learn(self, x: Tensor, seen: Seen) -> dict[str, Tensor]:
        from sklearn.covariance import ledoit_wolf_shrinkage  # here: its import takes a second

        features, predicted = seen.features.double(), seen.logits.argmax(1)
        classes = predicted.unique()
        means = torch.stack([features[predicted == c].mean(0) for c in classes])
        centred = features - means[torch.searchsorted(classes, predicted)]
        shrinkage = ledoit_wolf_shrinkage(centred.cpu().numpy(), assume_centered=True)
        _, singular, directions = torch.linalg.svd(centred, full_matrices=False)
        floor = max(shrinkage * float(centred.square().mean()), 1e-9)
        variances = (1 - shrinkage) * singular.square() / len(features) + floor
        return {
            "means": means,
            "directions": directions,
            "gains": 1 / variances - 1 / floor,
            "least": torch.tensor(1 / floor),
        }

    def suspicion(self, x: Tensor, seen: Seen) -> Tensor:
        apart = seen.features[:, None] - self.state["means"]  # (B, classes, F)
        along = apart @ self.state["directions"].T
        return (apart.square().sum(2) * self.state["least"] + along.square() @ self.state["gains"]).amin(1)


@dataclasses.dataclass
class NearestNeighbours(Detector):
    """Distance of the normalised features to the ``k``-th nearest of clean images (Sun et al. 2022)."""

    k: int = 5
    name: ClassVar[str] = "k-NN"

    def learn(self, x: Tensor, seen: Seen) -> dict[str, Tensor]:
        return {"features": F.normalize(seen.features)}

    def suspicion(self, x: Tensor, seen: Seen) -> Tensor:
        known = self.state["features"]
        apart = torch.cdist(F.normalize(seen.features), known)
        return apart.topk(min(self.k, len(known)), largest=False).values[:, -1]


@dataclasses.dataclass
class Autoencoder(Detector):
    """Mean absolute reconstruction error of a small convolutional autoencoder, as MagNet (Meng & Chen 2017).

    It looks at pixels alone. ``steps`` of Adam on batches of 16 clean images.
    """

    steps: int = 150
    width: int = 16
    name: ClassVar[str] = "autoencoder"

    def learn(self, x: Tensor, seen: Seen) -> dict[str, Tensor]:
        net = self._net(x.shape[1]).to(x.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(self.steps):
            batch = x[torch.randint(len(x), (16,)).to(x.device)]
            optimizer.zero_grad()
            (net(batch) - batch).abs().mean().backward()
            optimizer.step()
        return dict(net.state_dict())

    def _net(self, channels):
        w = self.width
        return nn.Sequential(
            nn.Conv2d(channels, w, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * w, w, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(w, 16 * channels, 1),
            nn.PixelShuffle(4),
        )

    def suspicion(self, x: Tensor, seen: Seen) -> Tensor:
        net = self._net(x.shape[1]).to(x.device)
        made = torch.func.functional_call(net, dict(self.state), x)
        return (made[..., : x.shape[2], : x.shape[3]] - x).abs().flatten(1).mean(1)


@dataclasses.dataclass
class ConformalPValue(Detector):
    """1 - p, p the conformal p-value of the features among clean images (Vovk et al. 2005).

    Nonconformity: distance to the nearest clean image that is predicted alike, over that to the nearest of
    another class; that of the clean images leaves each one out. p has steps and no gradient; an attacker
    follows the nonconformity. Slices of a scan are not exchangeable, so that p <= a is no promise of a share
    a of false alarms: the threshold is set as for the others.
    """

    name: ClassVar[str] = "conformal"

    def learn(self, x: Tensor, seen: Seen) -> dict[str, Tensor]:
        known = {"features": seen.features, "classes": seen.logits.argmax(1).float()}
        self.state = known
        own = self._nonconformity(
            seen, apart=torch.eye(len(x), dtype=torch.bool, device=seen.features.device)
        )
        return known | {"nonconformity": own}

    def _nonconformity(self, seen, apart=None):
        distance = torch.cdist(seen.features, self.state["features"])
        alike = self.state["classes"] == seen.logits.argmax(1)[:, None].float()
        near = [distance.masked_fill(mask, _FAR) for mask in (~alike, alike)]
        if apart is not None:  # an image is no neighbour of itself
            near = [one.masked_fill(apart, _FAR) for one in near]
        return near[0].amin(1) / near[1].amin(1).clamp(min=1e-6)

    def suspicion(self, x: Tensor, seen: Seen) -> Tensor:
        known = self.state["nonconformity"]
        at_least = (known >= self._nonconformity(seen)[:, None]).sum(1)
        return 1 - (1 + at_least) / (1 + len(known))

    def followed(self, x: Tensor, seen: Seen) -> Tensor:
        return self._nonconformity(seen)


# To add a detector, write its class and give it a row here.
DETECTORS: dict[str, type[Detector]] = {
    kind.name: kind
    for kind in (MaxSoftmax, FeatureSqueezing, Mahalanobis, NearestNeighbours, Autoencoder, ConformalPValue)
}


def calibrate(
    detector: Detector,
    model: nn.Module,
    images: Tensor,
    groups: Sequence,
    *,
    false_alarms: float = 0.05,
    folds: int = 3,
    seed: int = 0,
) -> Detector:
    """Fit ``detector`` on clean ``images`` (N, C, H, W) and set its threshold; returns it.

    ``groups`` (N,) are patients, or what stands in for them. The threshold is set on images that the detector
    was not fitted on: by a cross-validation of ``folds`` over whole groups, then it is fitted on all of them.
    Its share of ``false_alarms`` is that of :func:`threshold_at`.
    ValueError for a share outside 0 to 1, another number of groups than of images, or a single group.
    """
    groups = np.asarray(groups)
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must be a share between 0 and 1, not {false_alarms!r}")
    if len(groups) != len(images) or len(np.unique(groups)) < 2:
        raise ValueError(
            f"{len(images)} images need one group each and at least 2 groups, not {len(groups)} of "
            f"{len(np.unique(groups))}"
        )
    parts = [(np.arange(len(images)),) * 2]
    if detector.learns:
        from sklearn.model_selection import GroupKFold

        division = GroupKFold(min(folds, len(np.unique(groups))))
        parts = list(division.split(np.empty(len(groups)), groups=groups))
    scores, followed = torch.empty(len(images)), torch.empty(len(images))
    for fitted, held_out in parts:
        detector.fit(model, images[fitted], seed=seed)
        scores[held_out] = detector.score(images[held_out])
        followed[held_out] = _followed(detector, images[held_out])
    if detector.learns:
        detector.fit(model, images, seed=seed)
    detector.threshold = threshold_at(scores.numpy(), groups, false_alarms)
    detector.scale = max(float(followed.std(correction=0)), 1e-6)
    return detector


def _followed(detector, images, batch_size=64):
    """:meth:`Detector.followed` of all images, without gradients, on the CPU."""
    device = device_of(detector.model)
    with eval_mode(detector.model), torch.no_grad(), float32_convolutions(device):
        parts = [x.to(device, torch.float32) for x in images.split(batch_size)]
        return torch.cat([detector.followed(x, look(detector.model, x)).cpu() for x in parts])


def threshold_at(scores: np.ndarray, groups: np.ndarray, share: float) -> float:
    """The smallest of ``scores`` (N,) above which at most ``share`` lie, each group counting alike.

    A slice weighs 1 / (slices of its group): a long scan counts no more than a short one.
    """
    scores, (_, number, sizes) = (
        np.asarray(scores, dtype=np.float64),
        np.unique(groups, return_inverse=True, return_counts=True),
    )
    weights = 1 / sizes[number] / len(sizes)
    order = np.argsort(scores, kind="stable")
    at_most = np.cumsum(weights[order])
    for i in np.flatnonzero(np.append(np.diff(scores[order]) > 0, True)):  # the last of equal scores
        if 1 - at_most[i] <= share + 1e-9:
            return float(scores[order][i])
    raise ValueError("the scores are not all numbers")


def save_detectors(path: str | Path, detectors: Mapping[str, Detector], *, size: int, **about: Any) -> None:
    """Write calibrated detectors of one network as safetensors, atomically: what the command needs.

    ``size`` is the side of the images in pixels, ``about`` JSON-able. The network's weights are no part; its
    answer to a fixed image is, so that :func:`load_detectors` knows it again.
    """
    first = next(iter(detectors.values()))
    channels = getattr(first.model, "channels", 1)
    tensors = {"probe": _probe(first.model, channels, size)}
    kept = {}
    for name, detector in detectors.items():
        tensors |= {f"{name}/{key}": value for key, value in detector.state.items()}
        options = {field.name: getattr(detector, field.name) for field in dataclasses.fields(detector)}
        kept[name] = {"options": options, "threshold": detector.threshold, "scale": detector.scale}
    metadata = {"format": _FORMAT, "detectors": kept, "size": size, "channels": channels, "about": about}
    write_safetensors(path, tensors, metadata)


def load_detectors(path: str | Path, model: nn.Module) -> tuple[dict[str, Detector], dict[str, Any]]:
    """({name: detector of ``model``}, what the file says of itself) as :func:`save_detectors` wrote them.

    Raises ValueError for another file, and for detectors that were calibrated for another network. Weights
    that were rounded to float16 are the same network.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no detectors of this project")
    own = _probe(model, metadata["channels"], metadata["size"])
    known = tensors.pop("probe")
    if own.shape != known.shape or not torch.allclose(own, known, rtol=0.02, atol=0.05):
        raise ValueError(f"{path} was calibrated for another network: calibrate detectors for this one")
    device, found = device_of(model), {}
    for name, kept in metadata["detectors"].items():
        if name not in DETECTORS:
            raise ValueError(f"{path} holds the detector {name!r}; DETECTORS has {', '.join(DETECTORS)}")
        found[name] = detector = DETECTORS[name](**kept["options"])
        state = {k.split("/", 1)[1]: v.to(device) for k, v in tensors.items() if k.startswith(f"{name}/")}
        detector.model, detector.state = model, state
        detector.threshold, detector.scale = kept["threshold"], kept["scale"]
    return found, metadata


def _observed(model, images, batch_size=64):
    """:class:`Seen` of all images, without gradients, on the model's device."""
    device = device_of(model)
    with eval_mode(model), torch.no_grad(), float32_convolutions(device):
        parts = [look(model, x.to(device, torch.float32)) for x in images.split(batch_size)]
    return Seen(*(torch.cat(whole) for whole in zip(*parts, strict=True)))


def _probe(model, channels, size):
    """Logits (2, classes) of a ramp and of its inverse, on the CPU."""
    ramp = torch.linspace(0, 1, size).expand(1, channels, size, size)
    return _observed(model, torch.cat([ramp, 1 - ramp])).logits.cpu()
