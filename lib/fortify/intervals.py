"""Confidence intervals of shares: Wilson's, and bootstraps that draw whole groups of images."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def whole_percent(share: float) -> str:
    """A share as whole per cent, without the sign. 100 is said of all and 0 of none: 817 of 820 are 99.6."""
    for digits in range(4):
        text = f"{100 * share:.{digits}f}"
        if float(text) not in (0, 100):
            break
    return text if share not in (0, 1) else f"{100 * share:.0f}"


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval (low, high) of a proportion, ``k`` of ``n``, as fractions.

    Wilson (1927). ValueError unless 0 <= k <= n, both whole, and n > 0.
    """
    if not (0 <= k <= n and n > 0 and k == int(k) and n == int(n)):
        raise ValueError(f"k of n must be whole numbers with 0 <= k <= n and n > 0, not {k} of {n}")
    # Not scipy.stats.binomtest, which gives the same in a second and a half of import.
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = k + z**2 / 2
    spread = z * math.sqrt(k * (n - k) / n + z**2 / 4)
    low = 0.0 if k == 0 else (centre - spread) / (n + z**2)
    high = 1.0 if k == n else (centre + spread) / (n + z**2)
    return float(low), float(high)


def cluster_interval(
    correct: ArrayLike, groups: Sequence, *, seed: int = 0, draws: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a share, whole groups drawn with replacement.

    ``correct`` (N,) bool, ``groups`` (N,); fractions. For slices of one scan are not independent. Where all
    are right, or all wrong, a bootstrap has no spread: then Wilson's interval, as of one image a group. With
    a single group that is mixed it is the share itself: there is nothing to learn of the spread.
    """
    if len(correct) != len(groups) or len(groups) == 0:
        raise ValueError(f"one group an image is needed, not {len(groups)} for {len(correct)} images")
    if np.all(correct) or not np.any(correct):
        count = len(np.unique(groups))
        return wilson(int(np.all(correct)) * count, count, confidence)
    return _by_groups(correct, groups, seed, draws, confidence)


def gain_interval(
    more: ArrayLike, groups: Sequence, *, seed: int = 0, draws: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of ``more`` (N,), each -1, 0 or 1, by groups.

    Of two models on the same images: 1 where the second alone is right, -1 where the first alone is. Where
    all are the same a bootstrap has no spread: then as far either way as Wilson's interval of none in as many
    as there are groups.
    """
    if len(np.unique(more)) > 1:
        return _by_groups(more, groups, seed, draws, confidence)
    same, apart = float(np.mean(more)), wilson(0, len(np.unique(groups)), confidence)[1]
    return max(-1.0, same - apart), min(1.0, same + apart)


def mean_interval(
    values: ArrayLike, groups: Sequence, *, seed: int = 0, draws: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of any ``values`` (N,), whole groups drawn."""
    return _by_groups(values, groups, seed, draws, confidence)


def _by_groups(values, groups, seed, draws, confidence):
    """Percentile bootstrap interval of the mean of ``values``, whole groups drawn with replacement."""
    _, number = np.unique(groups, return_inverse=True)
    total, size = np.bincount(number, weights=values), np.bincount(number)
    drawn = np.random.default_rng(seed).integers(0, len(size), (draws, len(size)))
    means = total[drawn].sum(1) / size[drawn].sum(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
