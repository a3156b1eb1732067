"""Attribution maps by captum, and controls that know nothing of the network.

A map says of each pixel how much the prediction hangs on it; a higher value is more. To add a method, write a
function like those below and give it a row in :data:`METHODS`. captum is the extra ``explain``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.ndimage import sobel
from torch import Tensor, nn
from torch.nn import functional as F

from fortify.attacks import checked
from fortify.models import Guarded
from fortify.runtime import device_of, float32_convolutions, frozen, seeded
from fortify.training import layers

NOISE_SD = 0.1  # of SmoothGrad's copies, image in [0, 1]; Smilkov et al. take 10 to 20 % of the range
COPIES, STEPS = 16, 32  # of SmoothGrad, and of integrated gradients from black


def _captum():
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError(
            "explanations need captum: `pip install '.[explain]'` or `make .venv/.installed` in the checkout"
        ) from error
    return captum.attr


def _gradient(model, net, x, targets):
    return _captum().Saliency(net).attribute(x, target=targets)


def _smooth_gradient(model, net, x, targets):
    tunnel = _captum().NoiseTunnel(_captum().Saliency(net))
    options = {"nt_type": "smoothgrad", "nt_samples": COPIES, "stdevs": NOISE_SD, "nt_samples_batch_size": 4}
    return tunnel.attribute(x, target=targets, **options)


def _integrated_gradients(model, net, x, targets):
    method = _captum().IntegratedGradients(net)
    found = method.attribute(x, target=targets, n_steps=STEPS, internal_batch_size=4 * len(x))
    return found.abs()


def _grad_cam(model, net, x, targets):
    layer = layers(model)[-2]  # the last part before the classifying layer
    found = _captum().LayerGradCam(net, layer).attribute(x, target=targets, relu_attributions=True)
    if found.ndim != 4:
        raise ValueError("Grad-CAM needs a convolution before the classifying layer; this network has none")
    return F.interpolate(found.mean(1, keepdim=True), x.shape[2:], mode="bilinear")


# Saliency (Simonyan et al. 2014), SmoothGrad (Smilkov et al. 2017), integrated gradients (Sundararajan et al.
# 2017) and Grad-CAM (Selvaraju et al. 2017). To add a method, give it a row here.
METHODS: dict[str, Callable[..., Tensor]] = {
    "gradient": _gradient,
    "SmoothGrad": _smooth_gradient,
    "integrated gradients": _integrated_gradients,
    "Grad-CAM": _grad_cam,
}


def attribute(
    model: nn.Module, images: Any, targets: Any, method: str, *, seed: int = 0, batch_size: int = 32
) -> np.ndarray:
    """Attribution maps (N, H, W), float32 and at least 0, of the logits of ``targets``.

    ``images`` (N, C, H, W) float in [0, 1]; channels are summed. ``targets`` (N,) are classes, the predicted
    ones for an explanation of the prediction. ``method`` is a name in :data:`METHODS`; Grad-CAM takes the
    last part before the classifying layer (:func:`fortify.training.layers`). The model's mode, its gradients
    and the global random state are as before on return. ImportError without captum, ValueError for an
    unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"no method is called {method!r}; METHODS has {', '.join(METHODS)}")
    images, targets = checked(images, targets)
    device, net, found = device_of(model), Guarded.of(model), []
    with frozen(model), float32_convolutions(device), seeded(seed, device):
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            x = images[part].to(device).requires_grad_()
            maps = METHODS[method](model, net, x, targets[part].to(device))
            found.append(maps.detach().abs().sum(1).cpu())
    return torch.cat(found).float().numpy()


def _centred_gaussian(images):
    rows, columns = (np.linspace(-1, 1, side) for side in images.shape[2:])
    bump = np.exp(-(rows[:, None] ** 2 + columns**2) / (2 * 0.25**2))
    return np.broadcast_to(bump, (len(images), *bump.shape))


def _edges(images):
    grey = images.mean(1)
    return np.hypot(sobel(grey, axis=1), sobel(grey, axis=2))


# Maps that no network made: what a measure gives them is what it gives for nothing.
CONTROLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "centred Gaussian": _centred_gaussian,
    "edges": _edges,
    "the image": lambda images: images.mean(1),
}


def control(images: Any, name: str) -> np.ndarray:
    """The control map ``name`` of :data:`CONTROLS`, (N, H, W) float32, of images (N, C, H, W) in [0, 1]."""
    return np.ascontiguousarray(CONTROLS[name](np.asarray(images)), dtype=np.float32)
