"""Randomised smoothing: no change within a certified L2 radius alters a prediction (Cohen et al. 2019).

The smoothed classifier predicts the class that a network gives most often to the image with Gaussian noise.
It is for networks trained with such noise (:class:`fortify.objectives.GaussianNoise`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from fortify.attacks import check_labels, checked
from fortify.models import Guarded
from fortify.runtime import device_of, eval_mode, float32_convolutions, progress_bar

_BATCH = 128  # noisy copies at a time; another number would draw other noise
ABSTAINED = -1  # prediction where the noise leaves no class the majority, to the confidence asked for


def certify(
    model: nn.Module,
    images: Any,
    labels: Any,
    *,
    sigma: float,
    samples: int = 1000,
    first_samples: int = 100,
    alpha: float = 0.001,
    index: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Certify every image: a DataFrame of index, label, prediction, radius and lowest_share.

    ``images`` (N, C, H, W) float in [0, 1], ``labels`` (N,). ``sigma`` is the noise's standard deviation,
    image in [0, 1]; noisy images are not clipped. The class is the most frequent of ``first_samples``;
    ``samples`` others bound its share from below (``lowest_share``, Clopper and Pearson, wrong in at most
    ``alpha`` of the images). Above one half, no change of an L2 norm below ``radius`` = sigma times its
    normal quantile alters the prediction; else the prediction is ABSTAINED and the radius 0. No radius can be
    larger than :func:`largest_radius`. Noise is drawn for each image from ``seed`` and its place.
    ValueError for shapes, values and labels that do not fit, and for sigma, alpha or samples out of range.
    """
    images, labels = checked(images, labels)
    if not (sigma > 0 and 0 < alpha < 0.5 and samples >= 1 and first_samples >= 1):
        given = f"{sigma}, {alpha}, {samples} and {first_samples}"
        raise ValueError(f"sigma > 0, 0 < alpha < 1/2, samples and first_samples >= 1, not {given}")
    device, guarded = device_of(model), Guarded.of(model)
    rows = []
    with eval_mode(model), torch.no_grad(), float32_convolutions(device):
        check_labels(labels, classes=guarded(images[:1].to(device)).shape[1])
        for place in progress_bar(range(len(images)), desc="certifying", show=progress):
            x = images[place].to(device)
            own_seed = np.random.SeedSequence([seed, place]).generate_state(1)[0]
            noise = {"sigma": sigma, "generator": torch.Generator().manual_seed(int(own_seed))}
            chosen = int(_counts(guarded, x, first_samples, **noise).argmax())
            k = int(_counts(guarded, x, samples, **noise)[chosen])
            bound = binomtest(k, samples, alternative="greater").proportion_ci(1 - alpha, method="exact")
            lowest = bound.low
            held = lowest > 0.5
            rows.append((chosen if held else ABSTAINED, sigma * norm.ppf(lowest) if held else 0.0, lowest))
    found = dict(zip(("prediction", "radius", "lowest_share"), zip(*rows, strict=True), strict=True))
    place = np.arange(len(labels)) if index is None else np.asarray(index)
    return pd.DataFrame({"index": place, "label": labels.numpy()} | found)


def largest_radius(*, sigma: float, samples: int, alpha: float = 0.001) -> float:
    """The L2 radius that :func:`certify` gives where all ``samples`` agree, the largest there is."""
    return float(sigma * norm.ppf(alpha ** (1 / samples)))


def grey_levels(radius: float, pixels: int) -> float:
    """An L2 ``radius``, image in [0, 1], as an equal change of each of ``pixels``, in levels of 255."""
    return 255 * radius / pixels**0.5


def _counts(guarded, x: Tensor, samples, *, sigma, generator):
    """How often each class is predicted of ``samples`` noisy copies of one image (C, H, W): (classes,)."""
    counts = 0
    for start in range(0, samples, _BATCH):
        size = (min(_BATCH, samples - start), *x.shape)
        logits = guarded(x + sigma * torch.randn(size, generator=generator).to(x.device))
        counts = counts + torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return counts
