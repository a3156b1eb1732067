"""Attackers who know the detector: they must be misclassified and raise no alarm, inside the Linf budget.

Each strategy says which way to move; one loop does the rest. To add one, write a function like those below
and give it a row in :data:`STRATEGIES`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fortify.attacks import PGD, check_budget, checked, craft, margin
from fortify.detect.detectors import Detector, Seen, _observed, calibrate, look
from fortify.detect.measures import LINF, score_rows
from fortify.files import write_csv
from fortify.runtime import device_of, float32_convolutions, frozen, progress_bar

_SURE = 0.01  # margin of the logits beyond which the classifier counts as fooled


class Point(NamedTuple):
    """Where an attack stands: images (B, C, H, W), their true classes, what network and detector say."""

    z: Tensor
    y: Tensor
    seen: Seen
    followed: Tensor  # (B,) in units of the detector's scale
    guides: Tensor  # (B, F) features of clean images of another class


def joint(weight: float) -> Callable[[Point], Tensor]:
    """The margin of a wrong class, at most 1, minus ``weight`` times what the detector sees; sign steps."""

    def direction(at):
        loss = margin(at.seen.logits, at.y).clamp(max=1) - weight * at.followed
        return torch.autograd.grad(loss.sum(), at.z)[0].sign()

    return direction


def selective(at: Point) -> Tensor:
    """Selective PGD (Bryniarski et al. 2021): against the classifier until fooled, then the detector."""
    fooled = margin(at.seen.logits, at.y)
    loss = torch.where(fooled.detach() > _SURE, -at.followed, fooled)
    return torch.autograd.grad(loss.sum(), at.z)[0].sign()


def orthogonal(at: Point) -> Tensor:
    """Orthogonal PGD (Bryniarski et al. 2021): as selective, without what would undo the other.

    Steps are as long as those of signs, in L2: the sign would turn the direction.
    """
    fooled = margin(at.seen.logits, at.y)
    slopes = [
        torch.autograd.grad(loss.sum(), at.z, retain_graph=keep, allow_unused=True)[0]
        for loss, keep in ((fooled, True), (-at.followed, False))
    ]
    against, hidden = (torch.zeros_like(at.z) if slope is None else slope for slope in slopes)
    first = (fooled.detach() <= _SURE).view(-1, 1, 1, 1)
    wanted, other = (
        torch.where(first, against, hidden).flatten(1),
        torch.where(first, hidden, against).flatten(1),
    )
    share = (wanted * other).sum(1, keepdim=True) / other.square().sum(1, keepdim=True).clamp(min=1e-30)
    straight = wanted - share * other
    length = straight.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (straight / length * math.sqrt(straight.shape[1])).view_as(at.z)


def feature_matching(at: Point) -> Tensor:
    """The features of a clean image of another class (Sabour et al. 2016); sign steps."""
    loss = -(at.seen.features - at.guides).square().sum(1)
    return torch.autograd.grad(loss.sum(), at.z)[0].sign()


# The strategies beside the joint loss, which takes one of several weights.
STRATEGIES: dict[str, Callable[[Point], Tensor]] = {
    "selective": selective,
    "orthogonal": orthogonal,
    "feature matching": feature_matching,
}


class Evasion(NamedTuple):
    """What :func:`evade` returns, on the CPU."""

    images: Tensor  # (N, C, H, W): misclassified with the lowest score; else the clean image
    evaded: Tensor  # (N,) bool: misclassified and no alarm
    by: list[str]  # (N,) the first strategy that did it, "" where none did


def evade(
    detector: Detector,
    images: Tensor,
    labels: Tensor,
    *,
    eps_255: float,
    steps: int = 100,
    restarts: int = 3,
    weights: Sequence[float] = (0.1, 1.0, 10.0),
    guides: Tensor,
    crafted: Sequence[Tensor] = (),
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> Evasion:
    """Attack classifier and detector together: each strategy on what those before it left.

    An image that is misclassified when clean is not attacked, and stays as it is.

    ``images`` (N, C, H, W) float in [0, 1] and ``labels`` (N,). The order: ``crafted`` images (each
    (N, C, H, W), made on the classifier alone, within the budget), a joint loss of each of ``weights``, then
    :data:`STRATEGIES`; each with ``restarts`` starts, of which the first is the last of ``crafted`` where
    there are any, and the others are random. ``guides`` (M, C, H, W) are clean images for feature matching.
    Step lengths fall from a quarter of the budget to nothing (cosine). Of the steps of a start the
    misclassified image with the lowest score is kept.
    ValueError for ``steps`` or ``restarts`` below 1, a budget that is none, and images beyond it.
    """
    check_budget(eps_255)
    images, labels = checked(images, labels)
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    model, device, eps = detector.model, device_of(detector.model), eps_255 / 255
    best, lowest = images.clone(), torch.full((len(images),), torch.inf)
    by, right = [""] * len(images), detector.judge(images)[1].argmax(1) == labels

    def keep(where, found, scores, name):
        better = scores < lowest[where]
        lowest[where[better]], best[where[better]] = scores[better], found[better]
        for i in where[scores <= detector.threshold].tolist():
            by[i] = by[i] or name

    for found in crafted:
        if (largest := (found - images).abs().max().item()) > eps + 1e-6:
            raise ValueError(
                f"crafted images differ by up to {255 * largest:.4g} grey levels, beyond {eps_255:g}"
            )
        scores, probabilities = detector.judge(found, batch_size=batch_size)
        wrong = probabilities.argmax(1) != labels
        keep(torch.arange(len(images)), found, scores.where(wrong & right, torch.inf), "static")
    with frozen(model), float32_convolutions(device):
        known = _observed(model, guides)
        plans = [(f"joint, weight {weight:g}", joint(weight)) for weight in weights] + [*STRATEGIES.items()]
        for name, direction in progress_bar(plans, desc=detector.name, show=progress):
            for restart in range(restarts):
                left = torch.tensor(
                    [i for i in right.nonzero()[:, 0].tolist() if not by[i]], dtype=torch.int64
                )
                if not len(left):
                    break
                generator = torch.Generator().manual_seed(seed + restart)
                noise = torch.rand(images.shape, generator=generator) * 2 - 1  # of all: whatever is left
                for part in left.split(batch_size):
                    start = images[part] + eps * noise[part]
                    if restart == 0 and crafted:
                        start = crafted[-1][part]
                    x, y, start = images[part].to(device), labels[part].to(device), start.to(device)
                    about = {"known": known, "rank": restart, "eps": eps, "steps": steps}
                    found, scores = _pgd(detector, x, y, start, direction, **about)
                    keep(part, found.cpu(), scores.cpu(), name)
    return Evasion(best, torch.tensor([bool(name) for name in by]), by)


def examine(
    detector: Detector,
    images: Tensor,
    labels: Tensor,
    static: Mapping[str, Tensor],
    *,
    index: Sequence[int],
    eps_255: float,
    file: str | Path,
    **settings: Any,
) -> pd.DataFrame:
    """Rows (``measures.COLUMNS``) of a detector: clean, under ``static`` attacks, under :func:`evade`.

    ``static`` maps names of attacks to images (N, C, H, W) that were crafted on the classifier alone, those
    of ``measures.LINF`` within ``eps_255``. ``settings`` are :func:`evade`'s. The rows are read from ``file``
    where it is there, and else written to it, so that an interrupted run goes on: name it after all of these.
    """
    if not Path(file).is_file():
        about = {"index": np.asarray(index)}
        rows = [score_rows(detector, images, labels, attack="clean", **about)]
        for attack, crafted in static.items():
            rows.append(score_rows(detector, images, labels, attack=attack, attacked=crafted, **about))
        crafted = [static[attack] for attack in reversed(LINF) if attack in static]  # the strongest last
        found = evade(detector, images, labels, eps_255=eps_255, crafted=crafted, **settings)
        known = {"attacked": found.images, "by": found.by}
        rows.append(score_rows(detector, images, labels, attack="adaptive", **known, **about))
        write_csv(file, pd.concat(rows, ignore_index=True))
    return pd.read_csv(file, keep_default_na=False)


def choose(
    detectors: Mapping[str, Detector],
    images: Tensor,
    labels: Tensor,
    groups: Sequence,
    *,
    eps_255: float,
    steps: int,
    false_alarms: float = 0.05,
    most: int = 48,
    seed: int = 0,
) -> str:
    """The name of the detector that does best under a short attack on validation slices alone.

    ``images`` (N, C, H, W), ``labels`` and ``groups`` (N,) are the validation slices that ``detectors``, all
    of one network, were calibrated on. Copies of them are fitted and calibrated on half of the groups, and at
    most ``most`` slices of the other half are attacked: by :func:`evade` with one start and one weight.
    The detector wins that leaves most of these slices correct or rejected. A tie goes to the one that raises
    most alarms under PGD on the network alone, then to the first. ValueError for fewer than four groups.
    """
    groups = np.asarray(groups)
    found = np.unique(groups)
    if len(found) < 4:
        raise ValueError(f"half of the groups must be at least two of them, and there are {len(found)}")
    rng = np.random.default_rng(seed)
    fitted = np.isin(groups, rng.permutation(found)[: len(found) // 2])
    held_out = np.sort(rng.permutation(np.flatnonzero(~fitted))[:most])
    x, y, guides = images[held_out], labels[held_out], images[fitted]
    model = next(iter(detectors.values())).model
    attacked = craft(model, x, y, PGD(eps_255, steps=steps), seed=seed).images
    about = {"eps_255": eps_255, "steps": steps, "restarts": 1, "weights": [1.0], "guides": guides}
    told = {}
    for name, detector in detectors.items():
        own = calibrate(
            dataclasses.replace(detector), model, guides, groups[fitted], false_alarms=false_alarms, seed=seed
        )
        scores, probabilities = own.judge(x)
        right = (probabilities.argmax(1) == y) & (scores <= own.threshold)
        evaded = evade(own, x, y, crafted=[attacked], seed=seed, **about).evaded
        alarms = (own.score(attacked) > own.threshold).float().mean()
        told[name] = (right & ~evaded).float().mean().item(), alarms.item()
    return max(told, key=told.get)  # of equal ones the first


def _pgd(detector, x, y, start, direction, *, known, rank, eps, steps):
    """(images, scores) of a start: misclassified with the lowest score, infinite where none was."""
    model, low, high = detector.model, (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    z = start.clamp(0, 1).clamp(low, high)
    best, lowest = x.clone(), torch.full((len(x),), torch.inf, device=x.device)
    guides = _guides(look(model, x).features.detach(), y, known, rank)
    for step in range(steps + 1):
        z = z.detach().requires_grad_()
        seen = look(model, z)
        with torch.no_grad():
            scores = detector.suspicion(z, Seen(seen.logits.detach(), seen.features.detach()))
            better = (margin(seen.logits, y) > 1e-4) & (scores < lowest)
            lowest, best[better] = torch.where(better, scores, lowest), z.detach()[better]
        if step == steps:
            break
        followed = detector.followed(z, seen) / detector.scale + 0 * z.flatten(1).sum(1)  # it may be constant
        move = direction(Point(z, y, seen, followed, guides))
        length = eps * 0.25 * (1 + math.cos(math.pi * step / steps)) / 2
        z = torch.minimum(torch.maximum(z.detach() + length * move, low), high)
    return best, lowest


def _guides(features, y, known, rank):
    """Features of the clean image of another predicted class that is ``rank``-th nearest, from 0; of each."""
    distance = torch.cdist(features, known.features)
    distance = distance.masked_fill(known.logits.argmax(1) == y[:, None], torch.inf)
    nearest = distance.topk(min(rank + 1, distance.shape[1]), largest=False).indices[:, -1]
    return known.features[nearest]
