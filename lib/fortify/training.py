"""One training loop: without attacks it is normal training, with them adversarial training."""

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fortify.attacks import SMALLEST_BUDGET_255, Attack, ascend, check_labels, craft, craft_parts
from fortify.augmentation import Augmentation, augment
from fortify.checkpoint import TrainingState, fingerprint, stop_if_not_finite
from fortify.data import Slices
from fortify.fused import FusedModel, spread
from fortify.models import Guarded, predict
from fortify.objectives import Mix, Objective, Step
from fortify.runtime import device_of, frozen, progress_bar, seeded


@dataclass(frozen=True)
class Recipe:
    """How :func:`fit` trains; the defaults are plain training; notebooks 2 and 4 hold the paper's values.

    AdamW with a one-cycle learning rate. ``clean_share`` of every batch enters as it is; adversarial
    training adds attacked images (see :func:`fit`), at budgets that grow to their whole over the first
    ``eps_warmup`` of the epochs. With ``ema`` the network that is validated and kept is an exponential
    moving average of the trained one: at each step it keeps that share of itself (less in the first steps).
    ``class_balance`` is the power of the inverse class frequency that weights the loss; 0 is no weighting.
    ``logit_adjustment`` adds that many times the log of a class's share to its logit in the loss, so that the
    logits themselves favour rare classes (Menon et al. 2021); 1 aims at balanced accuracy.
    For weights that are trained already: the classifying layer learns at ``lr``, every layer below it at
    ``layer_decay`` times the rate of the one above it (:func:`layers`), so that 0 trains it alone;
    ``freeze_batchnorm`` keeps the statistics that normalise in training, as they do in evaluation.
    In the first ``mixup`` of the epochs every image of a batch, attacked or clean, is mixed with another one
    of it in a share drawn anew for each batch, the loss with it (mixup, Zhang et al. 2018; shares uniform).
    ``precision`` is of the training passes and the attacks in them: ``"float32"`` (on a GPU torch's default,
    whose convolutions round to TF32), ``"bfloat16"`` (autocast; the weights stay float32) or ``"auto"``,
    bfloat16 on a GPU that convolves in it and else float32. A CPU that multiplies bfloat16 (AVX-512 BF16,
    AMX) gains by it, another loses. What validates is float32 whatever it is.
    """

    epochs: int = 60
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    clean_share: float = 1.0
    eps_warmup: float = 0.0
    ema: float = 0.0
    class_balance: float = 0.0
    logit_adjustment: float = 0.0
    layer_decay: float = 1.0
    freeze_batchnorm: bool = False
    mixup: float = 0.0
    precision: str = "auto"
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 2:
            raise ValueError(f"epochs >= 1 and batch_size >= 2, not {self.epochs} and {self.batch_size}")
        if not 0 <= self.clean_share <= 1:
            raise ValueError(f"clean_share is a share of the batch, 0 to 1, not {self.clean_share}")
        if not 0 <= self.eps_warmup <= 1:
            raise ValueError(f"eps_warmup is a share of the epochs, 0 to 1, not {self.eps_warmup}")
        if not 0 <= self.mixup <= 1:
            raise ValueError(f"mixup is a share of the epochs, 0 to 1, not {self.mixup}")
        if not 0 <= self.layer_decay <= 1:
            raise ValueError(f"layer_decay is a share of the learning rate, 0 to 1, not {self.layer_decay}")
        if self.logit_adjustment < 0:
            raise ValueError(f"logit_adjustment must be at least 0, not {self.logit_adjustment}")
        if not 0 <= self.ema < 1:
            raise ValueError(
                f"ema is what the average keeps of itself at a step, 0 to below 1, not {self.ema}"
            )
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f'precision must be "auto", "float32" or "bfloat16", not {self.precision!r}')

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], **changes: Any) -> "Recipe":
        """The recipe that a notebook's parameters describe, then ``changes`` of it.

        Entries named like a field of :class:`Recipe` or :class:`Augmentation` are taken, the others of
        ``parameters`` ignored. ValueError for a change that names no field.
        """
        own, views = ({f.name for f in fields(kind)} for kind in (cls, Augmentation))
        own = own - {"augmentation"}
        if unknown := sorted(changes.keys() - own - views):
            known = ", ".join(sorted(own | views))
            raise ValueError(f"a recipe has no {', '.join(unknown)}; it has {known}")
        values = {k: v for k, v in parameters.items() if k in own | views} | changes
        augmentation = Augmentation(**{k: v for k, v in values.items() if k in views})
        return cls(**{k: v for k, v in values.items() if k in own}, augmentation=augmentation)


def fit(
    model: nn.Module,
    train: Slices,
    val: Slices,
    recipe: Recipe,
    *,
    attacks: Mapping[Attack, float] | None = None,
    objective: Objective | None = None,
    val_attack: Attack | None = None,
    seed: int = 0,
    checkpoints: str | Path | None = None,
    compiled: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Train ``model`` in place on ``train``; it ends in eval mode with the weights that ``val`` chose.

    ``train`` and ``val`` are :class:`fortify.data.Slices` of the same classes. ``attacks`` maps an attack to
    the share of every batch it attacks, for example ``{FGSM(4): 1/3, PGD(4, steps=4): 1/3, PGD(4, steps=4,
    loss="margin"): 1/3}``: they are crafted on the current model, in eval mode with frozen weights (on its
    :class:`fortify.fused.FusedModel`). None is normal training. PGD takes one start here: ``restarts`` above
    1 is a ValueError. ``objective`` says what is made of them (:mod:`fortify.objectives`); None is the
    paper's :class:`fortify.objectives.Mix`, which joins them with the clean images into one forward.

    The epoch with the highest validation accuracy is kept, under ``val_attack`` if one is given
    (ties: the higher clean accuracy, then the later epoch).
    ``checkpoints`` is a folder: every epoch is written there and an interrupted call with the same
    arguments goes on from the last one; on a CPU it ends in the same weights as an uninterrupted one.
    ``compiled`` has the attacks follow compiled code, for a GPU: see :class:`fortify.fused.FusedModel`.

    Returns the history, a DataFrame with one row an epoch: epoch, lr, train_loss, train_accuracy,
    val_accuracy, val_robust_accuracy (NaN without ``val_attack``), selected.
    Raises ValueError for what cannot be trained on, and FloatingPointError when the loss stops being finite,
    naming epoch, batch and checkpoint.
    """
    attacks, objective = dict(attacks or {}), objective or Mix()
    _check(recipe, attacks, train, val, model)
    device, low = device_of(model), _autocasts(recipe, device_of(model))
    with _channels_last(model):
        x_train, y_train = on_device(train, device)
        x_val, y_val = on_device(val, "cpu")
        weight = class_weights(y_train.cpu(), len(train.class_names), power=recipe.class_balance)
        weight = torch.tensor(weight, dtype=torch.float32, device=device)
        shift = _logit_shift(y_train, len(train.class_names), recipe.logit_adjustment)
        groups = _parameter_groups(model, recipe)
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
        batches = _batches(len(y_train), recipe.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=[group["lr"] for group in groups], total_steps=recipe.epochs * batches
        )
        state = TrainingState(model, optimizer, schedule, ema=recipe.ema)
        file = None
        if checkpoints is not None:
            attacked = ([(repr(a), share) for a, share in attacks.items()], repr(val_attack), repr(objective))
            name = fingerprint(model, train, val, asdict(recipe), attacked, seed, low, compiled)
            file = Path(checkpoints) / f"{name}.safetensors"
            state.resume(file)
        some = x_train[spread(len(x_train), 16)].float() / 255
        fused = FusedModel(model, some, autocast=low, compiled=compiled) if attacks else None
        fused_val = FusedModel(state.eval_model, some) if val_attack is not None else None
        remaining = range(state.epoch + 1, recipe.epochs + 1)
        for epoch in progress_bar(remaining, desc="training", show=progress):
            epoch_seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
            with seeded(epoch_seed, device):  # for nets with dropout: a resumed epoch draws the same
                now = _at_epoch(attacks, epoch, recipe)
                mixes = epoch <= recipe.mixup * recipe.epochs
                data = (x_train, y_train, weight, shift)
                losses, correct = _epoch(state, *data, recipe, objective, now, fused, epoch_seed, mixes)
            stop_if_not_finite(losses, epoch, file)
            val_accuracy = accuracy(state.eval_model, x_val, y_val)
            robust = np.nan
            if val_attack is not None:
                options = {"seed": seed, "fused": fused_val.refresh()}
                found = craft(state.eval_model, x_val / 255, y_val, val_attack, **options)
                robust = 1 - found.success.float().mean().item()
            state.record(epoch, losses.mean().item(), correct, val_accuracy, robust)
            if file is not None:
                state.save(file)
        model.load_state_dict(state.best)
        model.eval()
    return state.table()


@contextmanager
def _channels_last(model):
    """The layout that convolutions like; afterwards, whatever happened, that of a model from its file."""
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)


def class_weights(labels: Sequence[int], num_classes: int, *, power: float = 1.0) -> np.ndarray:
    """Weights (num_classes,): inverse class frequencies to a power, mean 1 over the examples.

    Raises ValueError where a class has no example, or a label is no class.
    """
    labels = np.asarray(labels)
    if len(labels):
        check_labels(labels, classes=num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"no training image of class {counts.argmin()}: every class must be present")
    weights = counts.astype(float) ** -power
    return weights * counts.sum() / (weights * counts).sum()


def layers(model: nn.Module) -> list[nn.Module]:
    """The parts of a network that have weights, in order; the last is the classifying layer.

    They are the children of a network that :func:`fortify.models.build_model` made, or of any other module,
    and in place of a sequence its own parts: a ResNet's stem, its blocks and ``fc``.
    """
    children = list(model.children())
    if isinstance(model, nn.Sequential):
        children = [part for child in children for part in (list(child.children()) or [child])]
    parts = []
    for child in children:
        parts += child.children() if isinstance(child, nn.Sequential) else [child]
    return [part for part in parts if next(part.parameters(), None) is not None]


def _parameter_groups(model, recipe):
    """What the optimiser trains, at which rate."""
    if recipe.layer_decay == 1:
        return [{"params": list(model.parameters()), "lr": recipe.lr}]
    groups = []
    for depth, layer in enumerate(reversed(layers(model))):
        groups.append({"params": list(layer.parameters()), "lr": recipe.lr * recipe.layer_decay**depth})
    if sum(len(group["params"]) for group in groups) != len(list(model.parameters())):
        raise ValueError("layer_decay is for networks whose weights all lie in child modules; use 1")
    return groups


def _logit_shift(labels, num_classes, power):
    """What is added to the logits (classes,) in the loss: ``power`` times the log of the classes' shares."""
    shares = torch.bincount(labels, minlength=num_classes) / len(labels)
    return power * shares.log() if power else torch.zeros(num_classes, device=labels.device)


def _epoch(state, x_train, y_train, weight, shift, recipe, objective, attacks, fused, seed, mixes=False):
    """One pass over the training set: (losses (batches,), share of correct training examples).

    With ``mixes`` images are mixed: one is correct where the class of its larger share is predicted.
    """
    model, device = state.model, x_train.device
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(len(y_train), generator=generator, device=device)
    losses, correct, seen = [], torch.zeros((), device=device), 0
    guarded = Guarded(model, dtype=torch.float32)
    model.train()
    if recipe.freeze_batchnorm:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def crafted(parts):
        noise = [uniform(x) for _, x, _ in parts]
        parts = [(*part, drawn) for part, drawn in zip(parts, noise, strict=True)]
        with frozen(model):
            return [x.detach() for x in craft_parts(model, parts, fused=fused.refresh())]

    def ascended(attack, images, loss):
        with frozen(model):
            return ascend(fused.refresh(), images, attack, loss, noise=uniform(images))

    def predicted(images):
        with frozen(model), torch.no_grad():
            return guarded(images)

    def uniform(images):
        return torch.rand(images.shape, generator=generator, device=device) * 2 - 1

    def gaussian(images):
        return torch.randn(images.shape, generator=generator, device=device)

    def loss_of(logits, labels):
        return F.cross_entropy(logits + shift, labels, weight, label_smoothing=recipe.label_smoothing)

    for index in order.tensor_split(_batches(len(y_train), recipe.batch_size)):  # sizes differ by one
        step = Step(
            model=guarded,
            images=augment(x_train[index].float() / 255, recipe.augmentation, generator=generator),
            labels=y_train[index],
            attacks=attacks,
            clean_share=recipe.clean_share,
            craft=crafted,
            ascend=ascended,
            predict=predicted,
            random=uniform,
            normal=gaussian,
            loss=loss_of,
            mix=(lambda images: _mixed(images, generator)) if mixes else None,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=_autocasts(recipe, device)):
            loss, logits, y = objective(step)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for call in step.later:
            call()
        state.optimizer.step()
        state.schedule.step()
        state.average()
        losses.append(loss.detach())  # read once an epoch: reading it here would stall a GPU
        correct += (logits.detach().argmax(1) == y).sum()
        seen += len(y)
    return torch.stack(losses).float().cpu(), correct.item() / seen


def _batches(n, batch_size):
    """Into how many batches ``n`` images go: none is of a single image, which BatchNorm cannot train on."""
    return max(1, min(-(-n // batch_size), n // 2))


def _mixed(x, generator):
    """(Images mixed with others of the batch, which these are, the share that is not theirs: 1/2 to 1)."""
    share = 0.5 + 0.5 * torch.rand((), generator=generator, device=x.device)
    others = torch.randperm(len(x), generator=generator, device=x.device)
    return torch.lerp(x[others], x, share), others, share


def _autocasts(recipe, device):
    """Whether the recipe trains in bfloat16 on that device."""
    if recipe.precision == "auto":
        # GPUs before compute capability 8 have no convolutions in bfloat16, and autocast does not say so.
        return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return recipe.precision == "bfloat16"


def _at_epoch(attacks, epoch, recipe):
    """``attacks`` at this epoch's share of their budgets; a minimum-norm attack has none."""
    share = min(1.0, epoch / max(1.0, recipe.eps_warmup * recipe.epochs))

    def scaled(attack):
        if attack.minimum_norm:
            return attack
        # No smaller than an attack takes, which would refuse it as one in units of [0, 1].
        smallest = min(attack.eps_255, SMALLEST_BUDGET_255)
        return replace(attack, eps_255=max(attack.eps_255 * share, smallest))

    return {scaled(attack): part for attack, part in attacks.items()}


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 ``images`` (N, C, H, W) that the model classifies correctly. ValueError for others."""
    if images.dtype != torch.uint8 or len(images) != len(labels) or len(images) == 0:
        kind = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(
            f"images must be uint8 (N, C, H, W), one a label, not {kind} for {len(labels)} labels"
        )
    return (predict(model, images / 255).argmax(1) == labels).float().mean().item()


def on_device(slices: Slices, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """The whole set of slices on a device: uint8 (N, C, H, W) intensities and int64 (N,) labels."""
    images = torch.from_numpy(np.ascontiguousarray(slices.images))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images.to(device), torch.from_numpy(np.asarray(slices.labels)).long().to(device)


def _check(recipe, attacks, train, val, model):
    if train.class_names != val.class_names:
        raise ValueError(
            f"training and validation images have other classes, {', '.join(train.class_names)} and "
            f"{', '.join(val.class_names)}, so their labels differ. Load both with the same classes: "
            "load_folder(..., classes=train.class_names, missing_ok=True)."
        )
    wanted = {p.dtype for p in model.parameters() if p.requires_grad}
    if wanted - {torch.float32}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in wanted))
        raise ValueError(f"weights are trained in float32, not {names}: call model.float() first")
    if len(train.class_names) < 2:
        raise ValueError(f"the images are all of one class, {train.class_names[0]}: nothing to tell apart")
    if min(len(train), len(val)) == 0:
        raise ValueError(f"{len(train)} training and {len(val)} validation images: neither may be empty")
    if any(not 0 < share <= 1 for share in attacks.values()) or sum(attacks.values()) > 1 + 1e-6:
        raise ValueError(f"attack shares must be positive and sum to at most 1, not {list(attacks.values())}")
    if any(getattr(attack, "restarts", 1) > 1 for attack in attacks):
        raise ValueError("training takes one start of PGD: set restarts=1 in attacks")
    fewest = len(train) // _batches(len(train), recipe.batch_size)  # images of the smaller batches
    if round(recipe.clean_share * fewest) + round(sum(attacks.values()) * fewest) < min(2, fewest):
        raise ValueError(
            f"clean_share={recipe.clean_share} and attack shares {list(attacks.values())} of a batch of "
            f"{fewest} are fewer than two images, which BatchNorm cannot train on"
        )
