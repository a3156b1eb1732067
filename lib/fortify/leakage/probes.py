"""What a model classifies by: images without some regions, and attacks that may change only some."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fortify.intervals import wilson
from fortify.regions import blank, body_mask, frame_mask, lung_mask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fortify.attacks import Adversarial, Attack


def views(images: np.ndarray, *, frame_width: int) -> dict[str, np.ndarray]:
    """What a model is shown to ask where it looks: {name: uint8 (N, H, W)}, the whole images first.

    Without the lungs, in two intensities, for what a model makes of a hole depends on it; as a control with a
    hole of the same shape half an image up or down; without the body, so that air, table and outline are
    left; and the frame of ``frame_width`` pixels alone. See :func:`blank`.
    """
    lungs, (height, width) = lung_mask(images), images.shape[1:]
    return {
        "whole image": images,
        "lungs blanked": blank(images, lungs),
        f"lungs at grey {_MID_GREY}": blank(images, lungs, value=_MID_GREY),
        "same hole elsewhere": blank(images, np.roll(lungs, height // 2, axis=1)),
        "body blanked": blank(images, body_mask(images)),
        "only the frame": blank(images, ~frame_mask((height, width), frame_width)),
    }


def lungs_or_scanner(
    model: "nn.Module",
    images: np.ndarray,
    labels: np.ndarray,
    *,
    attack: "Attack",
    frame_width: int,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """How a model reads the :func:`views`, and attacks that may change one region: a DataFrame.

    ``images`` uint8 (N, H, W), ``labels`` int64 (N,). One row per view or region: ``view``, ``attacked``, the
    mean ``area`` (share of the image) whose intensity the blanking changed or an attack could change, k, n,
    accuracy, low, high (95 % Wilson interval) and balanced_accuracy, which is 1 / classes for a model that
    always says the same.
    """
    from fortify.data import to_tensor
    from fortify.models import predict

    lungs, body, clean = lung_mask(images), body_mask(images), to_tensor(images)
    regions = {
        "anywhere": np.ones_like(lungs),
        "in the lungs": lungs,
        "in the rest of the body": body & ~lungs,
    }
    regions |= {"outside the body": ~(body | lungs)}
    rows = []
    for name, shown in views(images, frame_width=frame_width).items():
        prediction = predict(model, to_tensor(shown), batch_size=batch_size).argmax(1).numpy()
        rows.append(_line(name, False, (shown != images).mean(), labels, prediction))
    for name, mask in regions.items():
        crafted = craft_within(model, clean, labels, attack, mask, seed=seed, batch_size=batch_size)
        prediction = predict(model, crafted.images, batch_size=batch_size).argmax(1).numpy()
        rows.append(_line(f"attack {name}", True, mask.mean(), labels, prediction))
    return pd.DataFrame(rows)


def craft_within(
    model: "nn.Module",
    images: "Tensor",
    labels: "Tensor",
    attack: "Attack",
    mask: np.ndarray,
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> "Adversarial":
    """Attack ``images`` where ``mask`` allows it: an :class:`fortify.attacks.Adversarial`, in order.

    ``images`` (N, C, H, W) float in [0, 1], ``labels`` (N,) and ``attack`` as in
    :func:`fortify.attacks.craft`; ``mask`` bool (N, H, W) or (H, W), True where a pixel may change. The
    attack runs on f(x0 + mask (x - x0)), so its gradient outside is zero, and the pixels outside are x0's bit
    for bit. PGD's random start is drawn for each batch from ``seed`` and the batch's place.
    Raises ValueError for a mask of another shape, for an attack with restarts (it would bring images back in
    another order than their masks) and as ``craft`` does.
    """
    if getattr(attack, "restarts", 1) > 1:
        raise ValueError("craft_within takes attacks of one start: use restarts=1, and several seeds")
    import torch  # here and below, so that masks can be made without loading torch

    from fortify.attacks import Adversarial, checked, craft
    from fortify.models import predict
    from fortify.runtime import device_of

    images, labels = checked(images, labels)
    if np.shape(mask) not in (tuple(images.shape[2:]), (len(images), *images.shape[2:])):
        raise ValueError(f"a mask of {np.shape(mask)} fits no images of {tuple(images.shape)}")
    mask = torch.as_tensor(np.array(np.broadcast_to(mask, (len(images), *images.shape[2:])))).unsqueeze(1)
    adversarial = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        x, allowed = images[part], mask[part]
        masked = _masked(model, x.to(device_of(model)), allowed.to(device_of(model)))
        crafted = craft(masked, x, labels[part], attack, seed=seed + start, batch_size=batch_size)
        adversarial.append(torch.where(allowed, crafted.images, x))
    adversarial = torch.cat(adversarial)
    probabilities, predictions = predict(model, adversarial, batch_size=batch_size).max(1)
    return Adversarial(adversarial, predictions, probabilities, predictions != labels)


def _masked(model, x0, allowed):
    """The model of x with the pixels that must not change put back to those of ``x0``."""
    import torch

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            n = len(x)  # `craft` first asks for the number of classes with one image
            return self.model(torch.where(allowed[:n], x, x0[:n]))

    return Masked().train(model.training)


def _line(view, attacked, area, labels, prediction):
    k, n = int((prediction == labels).sum()), len(labels)
    low, high = wilson(k, n)
    line = {"view": view, "attacked": attacked, "area": area, "k": k, "n": n, "accuracy": k / n}
    recalls = [(prediction[labels == label] == label).mean() for label in np.unique(labels)]
    return line | {"low": low, "high": high, "balanced_accuracy": np.mean(recalls)}


_MID_GREY = 128  # of 255; far from air and from most tissue
