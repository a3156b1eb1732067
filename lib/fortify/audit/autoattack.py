"""AutoAttack (Croce & Hein 2020) for two classes or more, through the optional package pyautoattack.

Its *standard* version needs at least four classes: its targeted losses divide by a difference of logits
that three classes do not have. Here the parts run one by one: APGD on cross-entropy, APGD on the untargeted
DLR loss (three classes or more), FAB targeted at every other class, and Square.
"""

import contextlib
import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fortify.attacks import checked
from fortify.models import Guarded, predict
from fortify.runtime import device_of, float32_convolutions, frozen

WHITE_BOX = ("apgd-ce", "apgd-dlr", "fab-t")


@dataclass(frozen=True, eq=False)
class Broken:
    """Which images one of AutoAttack's parts broke."""

    images: torch.Tensor  # (N,) bool
    warnings: tuple  # AutoAttack's own: a randomised model, zero gradients, ...


def require_autoattack() -> type:
    """The class AutoAttack of pyautoattack; ImportError that says how to get it where it is missing."""
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise ImportError("AutoAttack is not installed: pip install '.[audit]' in the checkout") from error
    return AutoAttack


def autoattack(
    model: nn.Module,
    images: Any,
    labels: Any,
    part: str,
    *,
    eps_255: float,
    steps: int = 100,
    queries: int = 5000,
    seed: int = 0,
    batch_size: int = 64,
) -> Broken:
    """Run one part on every image: :class:`Broken`.

    ``images`` (N, C, H, W) float in [0, 1], ``labels`` (N,), all classified correctly. ``part`` is
    ``"apgd-ce"``, ``"apgd-dlr"``, ``"fab-t"`` (``steps`` each, one start) or ``"square"`` (``queries``).
    An image counts as broken only if the returned one is in [0, 1], within the Linf budget ``eps_255`` (grey
    levels) and misclassified by :func:`fortify.models.predict`. The global random state is as before.
    Raises ImportError without pyautoattack, ValueError for an unknown part or DLR with two classes.
    """
    AutoAttack = require_autoattack()
    if part not in (*WHITE_BOX, "square"):
        raise ValueError(f"unknown part {part!r}; use one of {', '.join((*WHITE_BOX, 'square'))}")
    images, labels = checked(images, labels)
    device, eps = device_of(model), eps_255 / 255
    classes = predict(model, images[:1]).shape[1]
    if part == "apgd-dlr" and classes < 3:
        raise ValueError(f"the DLR loss needs three classes, the model has {classes}; use the other parts")
    # It seeds the generators of all GPUs.
    with frozen(model), float32_convolutions(device), torch.random.fork_rng(), _heard() as warnings:
        adversary = AutoAttack(
            Guarded.of(model),
            norm="Linf",
            eps=eps,
            version="custom",
            attacks=[part],
            device=device,
            seed=seed,
        )
        for attack in (adversary.apgd, adversary.fab):
            attack.n_restarts = 1
        # APGD derives its schedule from its length when it is made: set all of it.
        adversary.apgd.n_iter = adversary.fab.n_iter = steps
        adversary.apgd.n_iter_2, adversary.apgd.n_iter_min, adversary.apgd.size_decr = (
            max(int(share * steps), 1) for share in (0.22, 0.06, 0.03)
        )
        adversary.square.n_queries = queries
        adversary.fab.n_target_classes = classes - 1
        found, _ = adversary.run_standard_evaluation(images, labels, batch_size=batch_size)
    allowed = ((found - images).abs().flatten(1).amax(1) <= eps + 2**-23) & (found >= 0).flatten(1).all(1)
    allowed &= (found <= 1).flatten(1).all(1)
    misclassified = predict(model, found, batch_size=batch_size).argmax(1) != labels
    # With three classes it says that its targeted DLR loss, which no part here uses, cannot be.
    warned = [line for line in dict.fromkeys(warnings) if "targeted DLR" not in line]
    return Broken(allowed & misclassified, tuple(warned))


@contextlib.contextmanager
def _heard():
    """The list of what AutoAttack warns of inside the block, instead of lines on stderr.

    A tracer (a debugger's, coverage's), which its check for dynamic defences removes, is put back.
    """
    warned, logger, tracer = [], logging.getLogger("auto-attack"), sys.gettrace()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield warned
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        sys.settrace(tracer)
