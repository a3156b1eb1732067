"""Random views of grey slices, one draw an image, on the images' device and from an explicit generator."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; each is drawn uniformly and independently for every image.

    Window and level (``gamma``, ``gain``, ``level``) are what scanner and reading station differ in;
    randomising them keeps a network from reading the scanner instead of the lung.
    """

    flip: bool = True  # left-right and up-down, each with probability 1/2
    degrees: float = 7.0  # rotation, either way
    zoom: float = 0.08  # by 1 +- zoom
    translate: float = 0.06  # shift as a share of the side, either way
    gamma: float = 0.0  # grey ** g, g in 1/(1 + gamma) .. 1 + gamma (log-uniform)
    gain: float = 0.0  # grey * (1 +- gain)
    level: float = 0.0  # grey +- level, in [0, 1] units
    noise: float = 0.0  # Gaussian noise, its sd drawn from 0 .. noise, in [0, 1] units
    blur: float = 0.0  # share of the images that are smoothed by a 3 x 3 binomial kernel
    cutout: float = 0.0  # side of a black square put at random, as a share of the image's side


def augment(images: Tensor, augmentation: Augmentation, *, generator: torch.Generator) -> Tensor:
    """(B, 1, H, W) float in [0, 1] -> the same shape and range, every image changed by its own draw.

    ``generator`` lives on the images' device: the same state gives the same views. ValueError for another
    shape or type.
    """
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        kind = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images must be float (B, 1, H, W) in [0, 1], at least one, not {kind}")
    count, device = len(images), images.device

    def uniform(half_width):  # (B,) in +- half_width
        return (torch.rand(count, generator=generator, device=device) * 2 - 1) * half_width

    a = augmentation
    x = _affine(
        images,
        angle=uniform(math.radians(a.degrees)),
        scale=1 + uniform(a.zoom),
        shift=torch.stack([uniform(2 * a.translate), uniform(2 * a.translate)], 1),
        mirror=torch.stack([uniform(1.0), uniform(1.0)], 1).sign() if a.flip else None,
    )
    each = (-1, 1, 1, 1)
    if a.gamma:
        x = x ** torch.exp(uniform(math.log1p(a.gamma))).view(each)
    if a.gain or a.level:
        x = x * (1 + uniform(a.gain)).view(each) + uniform(a.level).view(each)
    if a.noise:
        sd = uniform(a.noise).abs().view(each)
        x = x + sd * torch.randn(x.shape, generator=generator, device=device)
    if a.blur:
        smoothed = torch.rand(count, generator=generator, device=device) < a.blur
        x = torch.where(smoothed.view(each), _smooth(x), x)
    if a.cutout:
        x = x * _outside_squares(x, a.cutout, uniform(1.0), uniform(1.0))
    return x.clamp(0, 1)


def _smooth(x):
    kernel = x.new_tensor([1.0, 2.0, 1.0]) / 4
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), torch.outer(kernel, kernel)[None, None])


def _outside_squares(x, share, row, column):
    """Mask like ``x``: 0 in a square of that share of the side, around centres in -1 .. 1, else 1."""

    def inside(centre, size):
        pixels = (torch.arange(size, device=x.device) + 0.5) / size * 2 - 1
        return (pixels - centre[:, None]).abs() < share

    rows, columns = inside(row, x.shape[2]), inside(column, x.shape[3])
    return (~(rows[:, :, None] & columns[:, None, :])).unsqueeze(1).to(x.dtype)


def _affine(images, *, angle, scale, shift, mirror):
    """Rotate, zoom, shift and mirror, bilinear; what comes from outside is black, as the air in CT."""
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )
    if mirror is not None:
        theta = theta * torch.where(mirror == 0, 1.0, mirror).unsqueeze(2)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
