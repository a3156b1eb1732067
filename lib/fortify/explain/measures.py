"""How far attribution maps can be believed: where they lie, what they order, and what changes them.

Maps are (N, H, W), at least 0. Arun et al. (2021) find that each of eight methods fails one such test or more
on medical images, so every measure has a control or a floor beside it.
"""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score
from torch import nn

from fortify.attacks import checked
from fortify.models import Guarded, predict
from fortify.runtime import device_of, float32_convolutions, frozen, seeded
from fortify.training import layers

_TINY = 1e-12


def concentration(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Share of a map inside a mask, divided by the mask's share of the area: (N,); 1 is chance.

    ``masks`` bool (N, H, W) or (H, W). NaN where the map or the mask is empty.
    """
    masks = np.broadcast_to(masks, maps.shape)
    total, area = maps.sum((1, 2)), masks.mean((1, 2))
    inside = np.where(masks, maps, 0).sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((total > 0) & (area > 0), inside / total / area, np.nan)


def hits(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Pointing game (Zhang et al. 2018): whether the highest pixel lies in the mask, bool (N,).

    Chance is the mask's share of the area. Of several highest pixels the first counts.
    """
    masks = np.broadcast_to(masks, maps.shape)
    return np.take_along_axis(_flat(masks), _flat(maps).argmax(1)[:, None], 1).squeeze(1)


def average_precision(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve of a map as a score for the mask's pixels: (N,).

    Chance is the mask's share of the area. NaN where a mask is empty.
    """
    masks = np.broadcast_to(masks, maps.shape)
    pairs = zip(_flat(maps), _flat(masks), strict=True)
    return np.array([average_precision_score(m, s) if m.any() else np.nan for s, m in pairs])


def deletion_insertion(
    model: nn.Module,
    images: Any,
    targets: Any,
    maps: np.ndarray,
    *,
    baseline: str,
    steps: int = 16,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """(deletion, insertion), each (N,): areas under the target's probability (Petsiuk et al. 2018).

    Deletion replaces the highest pixels first by the ``baseline``, ``"mean"`` (of the image) or ``"blur"``;
    insertion puts them into it. A faithful map has a low deletion and a high insertion; both hang on the
    baseline. ``images`` (N, C, H, W) in [0, 1], ``targets`` (N,), ``maps`` (N, H, W).
    """
    images, targets = checked(images, targets)
    if baseline == "mean":
        empty = images.mean((2, 3), keepdim=True).expand_as(images)
    elif baseline == "blur":
        blurred = gaussian_filter(images.numpy(), (0, 0, images.shape[2] / 12, images.shape[3] / 12))
        empty = torch.from_numpy(blurred)
    else:
        raise ValueError(f'baseline must be "mean" or "blur", not {baseline!r}')
    order = np.argsort(np.argsort(-_flat(maps), axis=1, kind="stable"), axis=1)  # 0: the highest pixel
    place = torch.from_numpy(order.reshape(maps.shape)).unsqueeze(1)
    pixels, curves = place[0].numel(), ([], [])
    for step in range(steps + 1):
        chosen = place < round(pixels * step / steps)
        both = (torch.where(chosen, empty, images), torch.where(chosen, images, empty))
        for curve, shown in zip(curves, both, strict=True):
            found = predict(model, shown, batch_size=batch_size)
            curve.append(found.gather(1, targets[:, None]).squeeze(1).numpy())
    return tuple(np.trapezoid(np.stack(curve), dx=1 / steps, axis=0) for curve in curves)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of two maps of each image, (N,); NaN where one of them is constant."""
    a, b = (rankdata(_flat(maps), axis=1) for maps in (first, second))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def alignment(model: nn.Module, images: Any, *, batch_size: int = 64) -> np.ndarray:
    """|<image, gradient>| / |gradient| of the two highest logits' difference, (N,) (Etmann et al. 2019).

    It grows with robustness, and is the distance to the boundary exactly for a linear model without offset.
    ``images`` (N, C, H, W) float in [0, 1].
    """
    images, _ = checked(images, torch.zeros(len(images), dtype=torch.int64))
    device, net, found = device_of(model), Guarded.of(model), []
    with frozen(model), float32_convolutions(device):
        for part in images.split(batch_size):
            x = part.to(device).requires_grad_()
            highest = net(x).topk(2, dim=1).values
            (slope,) = torch.autograd.grad((highest[:, 0] - highest[:, 1]).sum(), x)
            along = (x.detach() * slope).flatten(1).sum(1).abs()
            found.append((along / slope.flatten(1).norm(dim=1).clamp(min=_TINY)).cpu())
    return torch.cat(found).numpy()


def randomised(model: nn.Module, *, seed: int = 0) -> Iterator[tuple[int, nn.Module]]:
    """(n, a copy of the model with its last n layers drawn anew), n = 1, 2, ... (Adebayo et al. 2018).

    A map that does not change is no explanation of what the network has learnt. Layers are those of
    :func:`fortify.training.layers`, from the classifying one down.
    """
    model = copy.deepcopy(model)
    with seeded(seed, "cpu"):
        for n, layer in enumerate(reversed(layers(model)), 1):
            for module in layer.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            yield n, copy.deepcopy(model)


def _flat(maps):
    return np.ascontiguousarray(maps).reshape(len(maps), -1)
