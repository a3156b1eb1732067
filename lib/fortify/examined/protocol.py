"""The published attacks, training and evaluation, re-expressed from the authors' notebook to be examined.

Described from ``Fortifying-Adversarial-Robustness/notebooks/mini_final_4.ipynb`` of
https://github.com/sarveshsanikop/Adversarial-Training-for-Robustness at commit 2e789cd (it has no licence:
nothing is copied). Nothing here is a recommended attack or defence; those are in :mod:`fortify.attacks` and
:mod:`fortify.training`. All of it acts on the *normalised* tensor z (B, 3, H, W), what a model's first layer
hands on, and so its lengths are in standard deviations of ImageNet's channels, not in grey levels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fortify.attacks import check_labels, checked
from fortify.checkpoint import TrainingState, fingerprint, stop_if_not_finite
from fortify.data import Slices
from fortify.evaluation import COLUMNS
from fortify.examined.printed import PUBLISHED
from fortify.fused import FusedModel, spread
from fortify.runtime import device_of, float32_convolutions, frozen, progress_bar, seeded
from fortify.training import accuracy, on_device


@dataclass(frozen=True)
class PublishedAttacks:
    """The arguments of the published attacks; lengths in normalised units, defaults as in the notebook.

    Its "PGD" also has an ``epsilon`` of 0.03 and 40 ``iterations``, and uses neither.
    """

    pgd_alpha: float = 2 / 255
    fgsm_eps: float = 0.03
    cw_c: float = 0.01
    cw_kappa: float = 5.0
    cw_lr: float = 0.005
    cw_steps: int = 1000


# What is left of the published attacks without a gradient: clamp, clamp and tanh.
TONE_CURVES = PublishedAttacks(pgd_alpha=0.0, fgsm_eps=0.0, cw_steps=0)


def clamp(z: Tensor) -> Tensor:
    """What ends the published PGD and FGSM: [0, 1], of a tensor whose intensities reach from -2.1 to 2.6.

    It keeps the intensities .485-.714 (red), .456-.680 (green) and .406-.631 (blue) and flattens all others.
    """
    return z.clamp(0, 1)


def tanh(z: Tensor) -> Tensor:
    """The tone curve of the published CW before any step of its optimiser."""
    return torch.tanh(z)


def published_fgsm(model: nn.Sequential, z: Tensor, y: Tensor, eps: float) -> Tensor:
    """clamp(z + eps sign(gradient)); with ``eps`` 2/255 this one step is the published "PGD"."""
    return clamp(z + eps * _gradient(model, z, y).sign() if eps else z)


def published_cw(
    model: nn.Sequential,
    z: Tensor,
    y: Tensor,
    attacks: PublishedAttacks,
    *,
    net: nn.Module | None = None,
    batch_size: int = 64,
) -> Tensor:
    """tanh(z + delta), delta by Adam on ``c * clamp(real - other + kappa, 0) + |delta|^2``.

    ``other`` is the largest of (logits - onehot): it still contains the true class. Where that leads by more
    than 1, ``real - other`` is the constant 1; where another class leads by more than kappa, the clamp is 0.
    Neither has a gradient, and the result is tanh(z) for good. In eval mode images whose gradient is zero in
    the first step are not computed further (:func:`cw_moves`), which changes no bit of theirs; the steps of
    the others are taken together, ``batch_size`` at once, on ``net`` if one is given, a fused ``model[1:]``.
    """
    if not attacks.cw_steps:
        return tanh(z)
    if model.training:  # images see each other in BatchNorm: one batch, all of it
        return tanh(z + _cw_delta(model[1:], z, y, attacks))
    moving = cw_moves(model, z, y, attacks, batch_size=batch_size)
    delta = torch.zeros_like(z)
    if moving.any():
        parts = _in_batches(batch_size, z[moving], y[moving])
        delta[moving] = torch.cat([_cw_delta(net or model[1:], *part, attacks) for part in parts])
    return tanh(z + delta)


def cw_moves(
    model: nn.Sequential, z: Tensor, y: Tensor, attacks: PublishedAttacks, *, batch_size: int = 64
) -> Tensor:
    """(B,) bool: which images the published CW changes at all, beyond the tanh.

    Its loss has a gradient in their delta at the start, where Adam begins; the others' deltas stay at 0.
    """
    slopes = [
        _cw_slope(model[1:], z_part, y_part, torch.zeros_like(z_part, requires_grad=True), attacks)
        for z_part, y_part in _in_batches(batch_size, z, y)
    ]
    return torch.cat(slopes).flatten(1).any(1)


def _in_batches(size, *tensors):
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _cw_delta(net, z, y, attacks):
    delta = torch.zeros_like(z, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=attacks.cw_lr)
    for _ in range(attacks.cw_steps):
        delta.grad = _cw_slope(net, z, y, delta, attacks)
        optimizer.step()
    return delta.detach()


def _cw_slope(net, z, y, delta, attacks):
    """The gradient of the published CW's loss in ``delta``."""
    logits = net(tanh(z + delta))
    real = logits.gather(1, y[:, None]).squeeze(1)
    other = (logits - F.one_hot(y, logits.shape[1])).amax(1)
    hinge = (real - other + attacks.cw_kappa).clamp(min=0)
    loss = attacks.cw_c * hinge.sum() + (delta**2).sum()
    return torch.autograd.grad(loss, delta)[0]


def _gradient(model, z, y):
    """Of the cross-entropy in z, in the model's own mode: the published code attacks in train mode too."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model[1:](z), y), z)[0]


def published_images(
    model: nn.Sequential, z: Tensor, y: Tensor, attacks: PublishedAttacks, *, cw: Tensor | None = None
) -> dict[str, Tensor]:
    """{name: (B, 3, H, W)}: the three published attacks on z, in whatever mode; ``cw`` was made before."""
    return {
        "published_pgd": published_fgsm(model, z, y, attacks.pgd_alpha),
        "published_fgsm": published_fgsm(model, z, y, attacks.fgsm_eps),
        "published_cw": published_cw(model, z, y, attacks) if cw is None else cw,
    }


def to_intensities(model: nn.Sequential, z: Tensor) -> Tensor:
    """Normalised z (B, 3, H, W) -> its intensities in [0, 1], (B, 3, H, W); the channels may differ."""
    return z * model[0].std + model[0].mean


def curve_values(model: nn.Sequential) -> dict[str, np.ndarray]:
    """What clamp and tanh make of each grey level 0..255, {name: (256,)} in grey levels, "unchanged" first.

    Of the network's three channels, which differ a little, the mean.
    """
    greys = torch.arange(256, device=device_of(model)).view(1, 1, 1, 256) / 255
    with torch.no_grad():
        z = model[0](greys)
        made = {"unchanged": z, "clamp": clamp(z), "tanh": tanh(z)}
        made = {
            name: 255 * to_intensities(model, changed).mean(1).flatten() for name, changed in made.items()
        }
    return {name: values.cpu().numpy() for name, values in made.items()}


@dataclass(frozen=True)
class PublishedRecipe:
    """The published training: Adam, batches of 16, plain cross-entropy, no augmentation, last epoch kept.

    The notebook's default is 200 epochs; the call that trained is not in it.
    """

    epochs: int = 200
    batch_size: int = 16
    lr: float = 1e-3

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 2:
            raise ValueError(f"epochs >= 1 and batch_size >= 2, not {self.epochs} and {self.batch_size}")


def fit_published(
    model: nn.Sequential,
    train: Slices,
    val: Slices,
    recipe: PublishedRecipe,
    *,
    attacks: PublishedAttacks,
    seed: int = 0,
    checkpoints: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train ``model`` in place as the published notebook does, on [z, PGD(z), FGSM(z), CW(z)] of every batch.

    Train mode is set once, before the first epoch, and eval mode after it, so BatchNorm's statistics stay as
    they were after epoch 1, crafting included. ``attacks`` is a :class:`PublishedAttacks`;
    :data:`TONE_CURVES` trains on the two tone curves alone. The rest is as in :func:`fortify.training.fit`.
    """
    device = device_of(model)
    (x_train, y_train), (x_val, y_val) = on_device(train, device), on_device(val, "cpu")
    state = TrainingState(model, torch.optim.Adam(model.parameters(), lr=recipe.lr), keep="last")
    file = None
    if checkpoints is not None:
        name = fingerprint(model, train, val, asdict(recipe), asdict(attacks), seed)
        file = Path(checkpoints) / f"{name}.safetensors"
        state.resume(file)
    epochs = range(state.epoch + 1, recipe.epochs + 1)
    for epoch in progress_bar(epochs, desc="published training", show=progress):
        model.train(epoch == 1)
        epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        order = torch.randperm(len(y_train), generator=torch.Generator().manual_seed(epoch_seed)).to(device)
        losses, correct = [], 0
        with seeded(epoch_seed, device):  # for nets with dropout
            for index in _batches(order, recipe.batch_size):
                loss, right = _step(state, x_train[index].float() / 255, y_train[index], attacks)
                losses.append(loss)
                correct += right
        losses = torch.stack(losses).cpu()
        stop_if_not_finite(losses, epoch, file)
        state.record(
            epoch,
            losses.mean().item(),
            int(correct) / (4 * len(y_train)),
            accuracy(model, x_val, y_val),
            np.nan,
        )
        if file is not None:
            state.save(file)
    model.eval()
    return state.table()


def _batches(order, size):
    """Split ``order``; one left over joins the batch before it: BatchNorm cannot train on a single image."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _step(state, x, y, attacks):
    z = state.model[0](x)
    z = torch.cat([z, *published_images(state.model, z, y, attacks).values()])
    y = y.repeat(4)
    logits = state.model[1:](z)
    loss = F.cross_entropy(logits, y)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    return loss.detach(), (logits.detach().argmax(1) == y).sum()


def score_published(
    model: nn.Sequential,
    images: Any,
    labels: Any,
    *,
    index: Sequence[int] | np.ndarray,
    model_name: str,
    split: str,
    seed: int,
    attacks: PublishedAttacks | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Rows (``evaluation.COLUMNS``) of ``model`` under clamp, tanh and the three published attacks.

    ``images`` (N, 1, H, W) float in [0, 1]; ``labels``, ``index`` (N,). ``attack`` is "clamp", "tanh" or one
    of ``PUBLISHED``, ``eps_255`` NaN. ``linf_255`` and ``l2`` are of intensities, the largest of the
    three channels and the root mean square over them.
    """
    attacks, device = attacks or PublishedAttacks(), device_of(model)
    images, labels = checked(images, labels)
    check_labels(labels, classes=model.num_classes)
    x, y = images.to(device), labels.to(device)
    parts = []
    with frozen(model), float32_convolutions(device):
        with torch.no_grad():
            z = model[0](x)
        # The few images that move: first, and together.
        fused = FusedModel(model[1:], z[spread(len(z), 8)]).net
        cw = published_cw(model, z, y, attacks, net=fused, batch_size=batch_size)
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            rows = _score_batch(model, x[part], z[part], y[part], attacks, cw[part])
            parts.append(rows.assign(index=np.tile(np.asarray(index)[part], len(_COLUMNS))))
    about = {"model": model_name, "split": split, "seed": seed, "protocol": "adaptive", "eps_255": np.nan}
    table = pd.concat(parts).assign(**about)[list(COLUMNS)]
    rank = table.attack.map({name: i for i, name in enumerate(_COLUMNS)})
    return table.iloc[rank.argsort(kind="stable")].reset_index(drop=True)


_COLUMNS = ("clamp", "tanh", *PUBLISHED)


def _score_batch(model, x, z, y, attacks, cw):
    made = {"clamp": clamp(z), "tanh": tanh(z), **published_images(model, z, y, attacks, cw=cw)}
    parts = []
    for name, changed in made.items():
        with torch.no_grad():
            probability, prediction = model[1:](changed).softmax(1).max(1)
            change = (to_intensities(model, changed) - x).flatten(2)
        rows = {
            "label": y,
            "prediction": prediction,
            "probability": probability,
            "success": prediction != y,
            "linf_255": change.abs().amax((1, 2)) * 255,
            "l2": change.square().sum(2).mean(1).sqrt(),
        }
        parts.append(pd.DataFrame({k: v.cpu().numpy() for k, v in rows.items()}).assign(attack=name))
    return pd.concat(parts)


def panels(
    model: nn.Sequential, image: Tensor, label: int, *, attacks: PublishedAttacks, correct: Tensor
) -> dict[str, tuple[np.ndarray, int, float]]:
    """One image under the published operations, beside ``correct``, its correctly attacked copy.

    ``image`` and ``correct`` (1, 1, H, W) float in [0, 1], ``label`` an integer. Returns {name: (intensities
    (H, W, 3) in units of [0, 1], prediction, probability)} for original, clamp alone, tanh alone, published
    PGD and correct PGD.
    """
    device = device_of(model)
    model.eval()
    y = torch.tensor([int(label)], device=device)
    z, z_correct = model[0](image.to(device)), model[0](correct.to(device))
    made = {"original": z, "clamp alone": clamp(z), "tanh alone": tanh(z)}
    with float32_convolutions(device):
        published_pgd = published_fgsm(model, z, y, attacks.pgd_alpha)
    made |= {"published PGD": published_pgd, "correct PGD": z_correct}
    shown = {}
    for name, changed in made.items():
        with torch.no_grad(), float32_convolutions(device):
            probability, prediction = model[1:](changed).softmax(1).max(1)
        intensities = to_intensities(model, changed)[0].permute(1, 2, 0).cpu().numpy()
        shown[name] = intensities, prediction.item(), probability.item()
    return shown
