"""How far attribution maps can be believed: where they lie, what they order, and what changes them.

Maps are (N, H, W), at least 0. Arun et al. (2021) find that each of eight methods fails one such test or more
on medical images, so every measure has a control or a floor beside it.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score
from torch import nn

from fortify.attacks import checked
from fortify.explain.attributions import attribute
from fortify.intervals import mean_interval
from fortify.models import Guarded, predict
from fortify.runtime import device_of, float32_convolutions, frozen, seeded
from fortify.training import layers

_TINY = 1e-12
_DEPTHS = 5  # of the cascade


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
    """``|<image, gradient>| / |gradient|``, (N,), of the two highest logits' difference.

    It grows with robustness (Etmann et al. 2019), and is the distance to the boundary exactly for a linear
    model without offset.
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


def measured(
    models: Mapping[str, nn.Module],
    images: Any,
    targets: Any,
    maps: Mapping[tuple[str, str], np.ndarray],
    *,
    regions: Mapping[str, np.ndarray],
    groups: Sequence[Any],
) -> pd.DataFrame:
    """What maps say without another map to compare with: a tidy table.

    ``maps`` {(model, method): (N, H, W)}; a control's model is ``""``; both models delete by it.
    ``regions`` {name: mask}: :func:`concentration`, whose floor is 1. Deletion and insertion with both
    baselines: their floor is a random order's. Columns: measure, map, model, mean, low, high, floor, n; the
    interval draws whole ``groups`` (N,).
    """
    rows, shape = [], next(iter(maps.values())).shape
    random_order = np.random.default_rng(0).random(shape)
    floors = {
        (name, baseline): deletion_insertion(model, images, targets, random_order, baseline=baseline)
        for name, model in models.items()
        for baseline in ("mean", "blur")
    }
    for (name, method), own in maps.items():
        for region, mask in regions.items():
            rows.append(line_of(region, method, name, concentration(own, mask), 1.0, groups))
        for of in [name] if name else models:
            for baseline in ("mean", "blur"):
                found = deletion_insertion(models[of], images, targets, own, baseline=baseline)
                pairs = zip(("deletion", "insertion"), found, floors[of, baseline], strict=True)
                for kind, values, floor in pairs:
                    rows.append(line_of(f"{kind}, {baseline}", method, of, values, floor.mean(), groups))
    return pd.DataFrame(rows)


def located(
    maps: Mapping[tuple[str, str], np.ndarray], masks: np.ndarray, *, groups: Sequence[Any], where: str = ""
) -> pd.DataFrame:
    """How well maps find what the ``masks`` hold, by :func:`hits` and :func:`average_precision`.

    Rows as :func:`measured`'s, of the measures "pointing game" and "AUPRC", each with ``where`` after it. The
    floor of both is the masks' mean share of the area.
    """
    rows, area = [], masks.mean()
    for (name, method), own in maps.items():
        for measure, values in (
            ("pointing game", hits(own, masks)),
            ("AUPRC", average_precision(own, masks)),
        ):
            rows.append(line_of(measure + where, method, name, values.astype(float), area, groups))
    return pd.DataFrame(rows)


def located_layout(table: pd.DataFrame) -> pd.DataFrame:
    """A display table of :func:`located`: a line a map, a column a measure and network, with intervals.

    A control, which no network made, stands in every network's column.
    """
    lines = []
    for name in table["map"].unique():
        line = {"map": name}
        for measure in table.measure.unique():
            own = table[table["map"].eq(name) & table.measure.eq(measure)].set_index("model")
            for model in (name for name in table.model.unique() if name):
                row = own.loc[model if model in own.index else ""]
                line[f"{measure}, {model}"] = f"{row['mean']:.2f} ({row.low:.2f}–{row.high:.2f})"
        lines.append(line)
    return pd.DataFrame(lines)


def sanity(
    model: nn.Module,
    images: Any,
    targets: Any,
    method: str,
    maps: np.ndarray,
    again: Mapping[str, np.ndarray],
    *,
    groups: Sequence[Any],
    name: str,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank correlations of a model's maps with others of the same images: rows as :func:`measured`'s.

    ``again`` {what was changed: maps}, for example under noise and under attack. ``cascade`` is with the last
    ``layers`` drawn anew (:func:`randomised`), at most five depths; ``drawn anew`` is its last row, where the
    first layer alone is kept. The floor is that of each image's map with the next group's.
    """
    other = _of_another_group(groups)
    floor = np.nanmean(rank_correlation(maps, maps[other])) if other is not None else np.nan
    changed, rows, total = dict(again), [], len(layers(model)) - 1
    depths = set(np.linspace(1, total, min(total, _DEPTHS)).round().astype(int).tolist())
    for depth, net in itertools.islice(randomised(model, seed=seed), total):
        if depth in depths:
            changed["drawn anew"] = attribute(net, images, targets, method, seed=seed)
            same = rank_correlation(maps, changed["drawn anew"])
            rows.append(line_of("cascade", method, name, same, floor, groups) | {"layers": depth})
    rows += [
        line_of(what, method, name, rank_correlation(maps, found), floor, groups)
        for what, found in changed.items()
    ]
    return pd.DataFrame(rows)


def _of_another_group(groups):
    """For each image the position of one of another group; None where there is only one group."""
    groups = np.asarray(groups)
    if len(np.unique(groups)) < 2:
        return None
    found = []
    for i in range(len(groups)):
        later = np.roll(np.arange(len(groups)), -i - 1)
        found.append(later[groups[later] != groups[i]][0])
    return np.array(found)


def line_of(
    measure: str, method: str, name: str, values: np.ndarray, floor: float, groups: Sequence[Any]
) -> dict[str, Any]:
    """A row of the tables: mean of ``values`` (N,) without NaN, and its interval by ``groups`` (N,)."""
    known = ~np.isnan(values)
    line = {"measure": measure, "map": method, "model": name, "n": int(known.sum()), "floor": float(floor)}
    if not known.any():
        return line | dict.fromkeys(("mean", "low", "high"), np.nan)
    low, high = mean_interval(np.asarray(values)[known], np.asarray(groups)[known])
    return line | {"mean": float(np.mean(np.asarray(values)[known])), "low": low, "high": high}
