"""What a training step minimises: the paper's mix of clean and attacked images, and where to add another.

An objective is handed a :class:`Step` and returns the loss, with the logits and labels it is of. To add one,
write a class like :class:`Mix` and give it a row in :data:`OBJECTIVES`; ``fit(..., objective=Mine())`` or
notebook 4's ``objective = "mine"`` trains with it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


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
    loss: Callable[[Tensor, Tensor], Tensor]  # cross-entropy of (logits, labels), weighted and smoothed
    mix: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None
    # where images are mixed (mixup): images -> (mixed ones, with which others, share that is not theirs)


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


# The objectives by name. To add one, write its class and give it a row here.
OBJECTIVES: dict[str, type] = {
    "mix": Mix,
}
