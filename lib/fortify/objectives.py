"""What a training step minimises: the paper's mix of clean and attacked images, and other robust objectives.

An objective is handed a :class:`Step` and returns the loss, with the logits and labels it is of. To add one,
write a class like :class:`Mix` and give it a row in :data:`OBJECTIVES`; ``fit(..., objective=Mine())`` or
notebook 4's ``objective = "mine"`` trains with it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fortify.attacks import FGSM, PGD


@dataclass(frozen=True)
class Step:
    """One training step: a batch, and how to attack it and to measure the loss on it."""

    model: nn.Module  # in train mode: images (B, C, H, W) -> float32 logits (B, classes)
    images: Tensor  # (B, C, H, W) in [0, 1], augmented
    labels: Tensor  # (B,)
    attacks: Mapping[Any, float]  # attack at this epoch's budget -> share of the batch that it attacks
    clean_share: float  # of the batch, which enters as it is
    craft: Callable[[Sequence[tuple[Any, Tensor, Tensor]]], list[Tensor]]
    # craft([(attack, images, labels), ...]): the attacked images of each, crafted on the model in eval mode
    ascend: Callable[[Any, Tensor, Callable[[Tensor], Tensor]], Tensor]
    # ascend(attack, images, loss): the images that PGD's steps find where loss(logits) (B,) is what rises
    predict: Callable[[Tensor], Tensor]  # logits in eval mode, without a gradient
    random: Callable[[Tensor], Tensor]  # images -> uniform noise in [-1, 1] of their shape
    normal: Callable[[Tensor], Tensor]  # images -> standard normal noise of their shape
    loss: Callable[[Tensor, Tensor], Tensor]  # cross-entropy of (logits, labels), weighted and smoothed
    mix: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None
    # where images are mixed (mixup): images -> (mixed ones, with which others, share that is not theirs)
    later: list[Callable[[], None]] = field(
        default_factory=list
    )  # called once the loss has been backpropagated


class Objective(Protocol):
    """What an objective must have. A frozen dataclass does: its settings name the checkpoint."""

    name: ClassVar[str]

    def __call__(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logits (M, classes), labels (M,)) of one step; training accuracy is counted on them."""


@dataclass(frozen=True)
class Mix:
    """Cross-entropy on one batch of clean and attacked images, as in the paper; without attacks: normal.

    The first ``clean_share`` of the batch enters as it is, and each attack's share of it attacked.
    """

    name: ClassVar[str] = "mix"

    def __call__(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = joined(step)
        if step.mix is None:
            logits = step.model(images)
            return step.loss(logits, labels), logits, labels
        images, others, share = step.mix(images)
        logits = step.model(images)
        loss = torch.lerp(step.loss(logits, labels[others]), step.loss(logits, labels), share)
        return loss, logits, labels


def joined(step: Step) -> tuple[Tensor, Tensor]:
    """(images, labels) of the batch's clean share, then of each attack's share of it, attacked."""
    x, y = step.images, step.labels
    clean = slice(0, round(step.clean_share * len(x)))
    if not step.attacks:
        return x[clean], y[clean]
    parts, reached = [], 0.0
    for attack, share in step.attacks.items():
        # Cumulative rounding: thirds of 32 images are 11, 10 and 11.
        part = slice(round(reached * len(x)), round((reached + share) * len(x)))
        reached += share
        if part.stop > part.start:
            parts.append((attack, x[part], y[part]))
    return (
        torch.cat([x[clean], *step.craft(parts)]),
        torch.cat([y[clean], *(labels for _, _, labels in parts)]),
    )


@dataclass(frozen=True)
class Trades:
    """TRADES (Zhang et al. 2019): cross-entropy of clean images, plus ``beta`` times what an attack changes.

    The attack raises the Kullback-Leibler divergence of the attacked image's class probabilities from the
    clean one's; so does the second term. Every image is attacked, whatever the attack's share.
    """

    beta: float = 6.0
    name: ClassVar[str] = "trades"

    def __call__(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        attack, x, y = _pgd(step), step.images, step.labels
        clean = step.predict(x).log_softmax(1)
        moved = step.ascend(attack, x, lambda logits: _divergence(clean, logits.log_softmax(1)))
        logits = step.model(torch.cat([x, moved]))
        ours, theirs = logits.split(len(x))
        apart = _divergence(ours.log_softmax(1), theirs.log_softmax(1)).mean()
        return step.loss(ours, y) + self.beta * apart, theirs, y


@dataclass(frozen=True)
class Mart:
    """MART (Wang et al. 2020): attacked images, those most that the network is unsure of when clean.

    Boosted cross-entropy of the attacked image, which lowers the best wrong class too, and ``beta`` times the
    divergence of its probabilities from the clean image's, weighted by 1 - p(true class | clean image).
    """

    beta: float = 5.0
    name: ClassVar[str] = "mart"

    def __call__(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        attack, x, y = _pgd(step), step.images, step.labels
        (moved,) = step.craft([(attack, x, y)])
        logits = step.model(torch.cat([x, moved]))
        ours, theirs = (part.log_softmax(1) for part in logits.split(len(x)))
        true = y[:, None]
        wrong = theirs.exp().scatter(1, true, 0).amax(1)
        boosted = step.loss(theirs, y) - torch.log1p(-wrong + _LEAST).mean()
        unsure = 1 - ours.exp().gather(1, true).squeeze(1)
        return boosted + self.beta * (_divergence(ours, theirs) * unsure).mean(), theirs, y


@dataclass(frozen=True)
class NoisyFGSM:
    """N-FGSM (de Jorge et al. 2022): one step from an image with uniform noise of ``noise`` times the budget.

    The noise is not projected back, which keeps a single step from being learnt by heart (catastrophic
    overfitting), so an image may be changed by 1 + ``noise`` budgets; here it stays in [0, 1].
    """

    noise: float = 2.0
    name: ClassVar[str] = "n_fgsm"

    def __call__(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        eps_255, x, y = _pgd(step).eps_255, step.images, step.labels
        noisy = (x + self.noise * eps_255 / 255 * step.random(x)).clamp(0, 1)
        (moved,) = step.craft([(FGSM(eps_255), noisy, y)])
        logits = step.model(moved)
        return step.loss(logits, y), logits, y


@dataclass(frozen=True)
class WeightPerturbation:
    """AWP (Wu et al. 2020) on the paper's mix: the loss where the weights, too, are moved to raise it.

    Each weight tensor of two or more dimensions is moved along its gradient, by ``gamma`` of its own norm,
    for this step; the step that the optimiser takes starts at the weights as they were.
    """

    gamma: float = 0.005
    name: ClassVar[str] = "awp"

    def __call__(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        images, labels = joined(step)
        weights = [p for p in step.model.parameters() if p.requires_grad and p.ndim > 1]
        slopes = torch.autograd.grad(step.loss(step.model(images), labels), weights)
        with torch.no_grad():
            before = [p.clone() for p in weights]
            for p, slope in zip(weights, slopes, strict=True):
                p.add_(slope, alpha=(self.gamma * p.norm() / slope.norm().clamp(min=_LEAST)).item())

        @torch.no_grad()
        def back():
            for p, old in zip(weights, before, strict=True):
                p.copy_(old)

        step.later.append(back)
        logits = step.model(images)
        return step.loss(logits, labels), logits, labels


@dataclass(frozen=True)
class GaussianNoise:
    """Cross-entropy of images with Gaussian noise (Cohen et al. 2019), for :mod:`fortify.smoothing`.

    ``sigma`` is the noise's standard deviation, image in [0, 1]; the noisy image is not clipped. No attack.
    """

    sigma: float = 0.25
    name: ClassVar[str] = "noise"

    def __call__(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        logits = step.model(step.images + self.sigma * step.normal(step.images))
        return step.loss(logits, step.labels), logits, step.labels


_LEAST = 1e-12


def _pgd(step):
    """The attack whose budget and steps an objective uses: the PGD on cross-entropy among the step's."""
    for attack in step.attacks:
        if isinstance(attack, PGD) and attack.loss == "cross_entropy":
            return attack
    raise ValueError("this objective attacks by PGD: give fit(attacks={PGD(...): 1.0})")


def _divergence(clean, moved):
    """Kullback-Leibler divergence (B,) of log probabilities ``moved`` (B, classes) from ``clean``."""
    return F.kl_div(moved, clean, reduction="none", log_target=True).sum(1)


# The objectives by name. To add one, write its class and give it a row here.
OBJECTIVES: dict[str, type] = {
    "mix": Mix,
    "trades": Trades,
    "mart": Mart,
    "n_fgsm": NoisyFGSM,
    "awp": WeightPerturbation,
    "noise": GaussianNoise,
}
