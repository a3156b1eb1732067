"""FGSM, PGD and Carlini & Wagner through Foolbox, with what must be true around an attack.

A budget is in grey levels of 255 (``eps_255``) and an image is float in [0, 1], of any number of channels. To
add an attack, write a class like the three below and give it a row in :data:`ATTACKS`: evaluation, tables,
figures and notebooks take it from there.
"""

import numbers
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which wants a git binary

import eagerpy as ep
import foolbox as fb
import numpy as np
import torch
from torch import Tensor, nn

from fortify.fused import FusedModel, same_logits, spread
from fortify.models import Guarded, collected
from fortify.runtime import device_of, float32_convolutions, frozen, progress_bar, seeded

ONE_ULP_255 = 255 * 2**-23  # grey levels: what rounding of x + eps adds near white
SMALLEST_BUDGET_255 = 0.1  # grey levels; a positive budget below it is one in units of [0, 1]
_LOOKED_AT = 8  # images whose gradients and logits are looked at before an attack


class AttackWarning(UserWarning):
    """Attacks on this model may say nothing of its robustness."""


class Attack(Protocol):
    """What an attack must have. A frozen dataclass does: attacks are compared and used as keys.

    One within a budget (``minimum_norm`` False) has a field ``eps_255``, in grey levels, and is of norm
    ``"linf"``. One without is a minimum-norm attack, which looks for the smallest change by itself.
    A class may also say ``nested = True``: what it finds within a small budget it counts as found within a
    larger one, which :func:`fortify.scoring.evaluate` then does not look for again.
    """

    name: ClassVar[str]
    norm: ClassVar[str]
    minimum_norm: ClassVar[bool]

    def foolbox(self) -> fb.attacks.Attack:
        """The Foolbox attack that is run, for one batch."""


@dataclass(frozen=True)
class FGSM:
    """One step of size eps along the sign of the loss gradient (Goodfellow et al. 2015). Linf."""

    eps_255: float
    name: ClassVar[str] = "fgsm"
    norm: ClassVar[str] = "linf"
    minimum_norm: ClassVar[bool] = False

    def __post_init__(self):
        check_budget(self.eps_255)

    def foolbox(self) -> fb.attacks.Attack:
        return fb.attacks.LinfFastGradientAttack()


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent in the Linf ball (Madry et al. 2018).

    ``rel_stepsize`` is in units of eps; None is 2.5 / steps (Madry's rule: the steps can cross the ball).
    ``loss`` is ``"cross_entropy"`` or ``"margin"`` (Carlini & Wagner's f: best other logit minus true one).
    ``restarts`` > 1 attacks what is still correct again, from another random start.
    ``stop_early`` takes an image out of the batch in the step after it is misclassified: the same successes
    in less time, but the image found is the first and not the worst.
    """

    eps_255: float
    steps: int = 20
    rel_stepsize: float | None = None
    random_start: bool = True
    restarts: int = 1
    loss: str = "cross_entropy"
    stop_early: bool = False
    name: ClassVar[str] = "pgd"
    norm: ClassVar[str] = "linf"
    minimum_norm: ClassVar[bool] = False
    nested: ClassVar[bool] = True

    def __post_init__(self):
        check_budget(self.eps_255)
        if self.loss not in ("cross_entropy", "margin"):
            raise ValueError(f'loss must be "cross_entropy" or "margin", not {self.loss!r}')
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, not {self.steps} and {self.restarts}")
        if self.rel_stepsize is not None and not self.rel_stepsize >= 0:
            raise ValueError(f"rel_stepsize must be None or at least 0, not {self.rel_stepsize!r}")

    def foolbox(self) -> fb.attacks.Attack:
        return _UntilBroken(self) if self.stop_early else _LinfPGD(self)


@dataclass(frozen=True)
class CW:
    """Carlini & Wagner 2017, L2: the smallest perturbation found, no budget.

    ``steps`` of Adam for each of ``binary_search_steps`` values of the trade-off constant.
    """

    binary_search_steps: int = 9
    steps: int = 1000
    stepsize: float = 0.01
    confidence: float = 0.0
    initial_const: float = 0.01
    name: ClassVar[str] = "cw"
    norm: ClassVar[str] = "l2"
    minimum_norm: ClassVar[bool] = True

    def __post_init__(self):
        if self.steps < 1 or self.binary_search_steps < 1:
            counts = f"{self.steps} and {self.binary_search_steps}"
            raise ValueError(f"steps and binary_search_steps must be at least 1, not {counts}")
        if not (self.stepsize > 0 and self.initial_const > 0 and self.confidence >= 0):
            given = f"{self.stepsize!r}, {self.initial_const!r} and {self.confidence!r}"
            raise ValueError(
                f"stepsize and initial_const must be above 0, confidence at least 0, not {given}"
            )

    def foolbox(self) -> fb.attacks.Attack:
        return fb.attacks.L2CarliniWagnerAttack(
            binary_search_steps=self.binary_search_steps,
            steps=self.steps,
            stepsize=self.stepsize,
            confidence=self.confidence,
            initial_const=self.initial_const,
            abort_early=False,  # with few steps it would stop at the first that does not improve
        )


# The attacks of Table 1, in the order of its columns. To add one, write its class and give it a row here.
ATTACKS: dict[str, type] = {
    "pgd": PGD,
    "fgsm": FGSM,
    "cw": CW,
}


def attacks_over(budgets_255: Sequence[float], **settings: Mapping[str, Any]) -> list[Attack]:
    """Table 1's attacks: of each class in :data:`ATTACKS` one per Linf budget, or one if it has no budget.

    ``budgets_255`` are in grey levels. ``settings`` maps the name of an attack to its keyword arguments, for
    example ``pgd={"steps": 20}``; one without an entry has its defaults. ValueError for an unknown name.
    """
    if unknown := sorted(settings.keys() - ATTACKS.keys()):
        raise ValueError(f"no attack is called {', '.join(unknown)}; ATTACKS has {', '.join(ATTACKS)}")
    attacks = []
    for name, kind in ATTACKS.items():
        own = settings.get(name, {})
        attacks += [kind(**own)] if kind.minimum_norm else [kind(eps, **own) for eps in budgets_255]
    return attacks


class Adversarial(NamedTuple):
    """What :func:`craft` returns, on the CPU. Predictions are the model's own, of ``images``."""

    images: Tensor  # (N, C, H, W) float32 in [0, 1]
    predictions: Tensor  # (N,) int64
    probabilities: Tensor  # (N,) float32, of the predicted class
    success: Tensor  # (N,) bool: the prediction is not the label


def craft(
    model: nn.Module,
    images: Any,
    labels: Any,
    attack: Attack,
    *,
    subset: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
    fused: nn.Module | None = None,
) -> Adversarial:
    """Attack every image: returns :class:`Adversarial`, in the order given.

    ``images`` (N, C, H, W) float in [0, 1] and ``labels`` (N,) integers are tensors or arrays; or ``images``
    is a Dataset or DataLoader of (image, label) pairs and ``labels`` None. The device is the model's, which
    may be of any floating type and return its logits in a tuple or dict.
    An attack with a budget stays within eps_255 / 255 in Linf. A minimum-norm attack that fails returns the
    clean image. The random start is drawn for the whole set from ``seed``, so results do not depend on
    ``batch_size`` beyond the rounding of the convolutions. The model's mode, its parameters' gradients,
    ``images`` and the global random state are as before on return.
    ``subset`` are positions in ``images``: these alone are attacked, each from the random start that it has
    in the whole set, and returned.
    ``fused`` is the net whose gradients are followed, for a caller with several attacks on one model: its
    :class:`fortify.fused.FusedModel`'s, or the model itself; None makes one, and looks at the model first:
    one warning if its logits or gradients make attacks on it unreliable. A batch on which the two disagree is
    attacked again on the model itself.
    Raises ValueError for wrong shapes, values outside [0, 1], labels outside the model's classes or positions
    outside the images, and RuntimeError where an attack leaves its budget.
    """
    _check_attack(attack)
    images, labels = checked(images, labels, device=None)
    chosen = _positions(subset, len(images))
    device, guarded = device_of(model), Guarded.of(model)
    if fused is None:
        fused = prepared(model, images, labels)
    if getattr(attack, "restarts", 1) > 1:
        options = {"batch_size": batch_size, "progress": progress, "fused": fused}
        return _with_restarts(model, images, labels, attack, chosen, seed, **options)
    noise = None
    if getattr(attack, "random_start", False):
        # Drawn on the CPU: the same start on every device.
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    found = []
    with frozen(model), float32_convolutions(device):
        for start in progress_bar(range(0, len(chosen), batch_size), desc=attack.name, show=progress):
            part = chosen[start : start + batch_size]
            # Copies: tensors made in inference mode take no part in gradients.
            x, y = (whole[part.to(whole.device)].to(device, copy=True) for whole in (images, labels))
            options = {"noise": None if noise is None else noise[part].to(device)}
            for net in (fused, model):  # the model itself where the fused one differs
                with seeded(seed + start, device):  # for an attack that draws more than that start
                    x_adv = _attacked(net, x, y, attack, **options)
                with torch.no_grad():
                    logits = guarded(x_adv)
                    if net is model or same_logits(logits, Guarded.of(net)(x_adv)):
                        break
            if attack.minimum_norm:
                x_adv, logits = _failed_put_back(guarded, x, y, x_adv, logits)
            probabilities, predictions = logits.softmax(1).max(1)
            made = (x_adv, predictions, probabilities, predictions != y)
            found.append([whole.cpu() for whole in made])
    return Adversarial(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _positions(subset, n):
    """``subset`` as positions (M,) int64 on the CPU; all ``n`` for None."""
    if subset is None:
        return torch.arange(n)
    chosen = torch.as_tensor(subset, device="cpu")
    integer = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    if chosen.ndim != 1 or not len(chosen) or not integer or chosen.min() < 0 or chosen.max() >= n:
        raise ValueError(f"subset must be positions in 0..{n - 1}, at least one, not {subset!r}")
    return chosen.to(torch.int64)


def prepared(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    """The net whose gradients attacks on ``model`` follow, after a look at both: :func:`craft`'s ``fused``.

    ``images`` and ``labels`` as :func:`checked` returns them. ValueError for labels outside the model's
    classes. One warning where logits are no numbers or probabilities, or gradients vanish.
    """
    device, guarded, some = device_of(model), Guarded.of(model), spread(len(images), _LOOKED_AT)
    with frozen(model), float32_convolutions(device):
        # Copies: tensors made in inference mode take no part in gradients.
        x, y = images[some].to(device, copy=True), labels[some].to(device, copy=True)
        z = x.clone().requires_grad_()
        logits = guarded(z)
        check_labels(labels, classes=logits.shape[1])
        loss = nn.functional.cross_entropy(logits, y, reduction="sum")
        slope = torch.autograd.grad(loss, z, allow_unused=True)[0] if loss.requires_grad else None
        if slope is None:
            raise ValueError(
                "the model's logits have no gradient in its images, and these attacks follow it: is there a "
                "detach, a no_grad or numpy inside? fortify.audit.autoattack's square needs none."
            )
        logits, still = logits.detach(), (slope == 0).flatten(1).all(1)
    faults = _faults(logits, still)
    if faults:
        warnings.warn(
            f"Attacks on this model may say nothing of its robustness: {'; '.join(faults)}. Check it with "
            "fortify.audit.audit before you believe a figure.",
            AttackWarning,
            stacklevel=3,
        )
    return FusedModel(model, x, logits=logits).net


def _faults(logits, still):
    """What makes attacks unreliable, in words, of some images' ``logits`` and of whose gradient is zero."""
    n, faults = len(logits), []
    strange = int((~torch.isfinite(logits)).any(1).sum())
    if strange:
        faults.append(f"{strange} of {n} images have logits that are NaN or infinite")
    elif (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-3):
        faults.append("it returns probabilities, where attacks expect logits: leave its softmax out")
    if not strange and 2 * int(still.sum()) >= n:
        faults.append(f"the loss has no gradient on {int(still.sum())} of {n} images")
    return faults


def craft_batch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    noise: Tensor | None = None,
    fused: nn.Module | None = None,
) -> Tensor:
    """Attack one batch on its own device, unchecked: for loops that already hold ``frozen``.

    ``x`` (B, C, H, W) in [0, 1], ``y`` (B,); ``noise`` in [-1, 1] times eps is PGD's start (None, or a PGD
    without random start: at x). One start, whatever ``attack.restarts``: those are :func:`craft`'s.
    ``fused`` is a faster net of the same function to follow (:class:`fortify.fused.FusedModel`).
    Returns the adversarial batch (B, C, H, W).
    """
    x_adv = _attacked(model if fused is None else fused, x, y, attack, noise=noise)
    if not attack.minimum_norm:
        return x_adv
    with torch.no_grad():
        guarded = Guarded.of(model)
        return _failed_put_back(guarded, x, y, x_adv, guarded(x_adv))[0]


def _attacked(net, x, y, attack, *, noise):
    """What the Foolbox attack finds; RuntimeError where that leaves [0, 1] or the budget."""
    fmodel = fb.PyTorchModel(Guarded.of(net), bounds=(0, 1), device=x.device)
    criterion = fb.criteria.Misclassification(y)
    if not attack.minimum_norm:
        if attack.norm != "linf":
            raise TypeError(f"{attack!r}: attacks with a budget are of norm linf, not {attack.norm}")
        eps = attack.eps_255 / 255
        if eps == 0:
            return x.clone()  # bit for bit; Foolbox's own start would still round
    runner = attack.foolbox()
    if noise is not None and getattr(attack, "random_start", False):
        runner.noise = noise
    # .run, not the call: the call would spend one more forward a budget to find `success` again.
    if attack.minimum_norm:
        x_adv = runner.run(fmodel, x, criterion).detach()
    else:
        x_adv = runner.run(fmodel, x, criterion, epsilon=eps).detach()
        largest = perturbation_norms(x, x_adv)[0].max().item()
        if not largest <= attack.eps_255 + ONE_ULP_255:
            raise RuntimeError(f"{attack!r} changed a pixel by {largest:.6g} grey levels, beyond its budget")
    if not ((x_adv >= 0) & (x_adv <= 1)).all():
        raise RuntimeError(f"{attack!r} returned pixels outside [0, 1], or NaN")
    return x_adv


def _failed_put_back(guarded, x, y, x_adv, logits):
    """(images, logits): where a minimum-norm attack found nothing, the clean image and its logits."""
    # Where it finds nothing Foolbox returns an all-black image, which may even count as a success.
    failed = (x_adv == 0).flatten(1).all(1) & ~(x == 0).flatten(1).all(1)
    failed |= logits.argmax(1) == y  # it stops on the boundary, to rounding
    if not failed.any():
        return x_adv, logits
    with torch.no_grad():
        clean = guarded(x)  # the whole batch, as the clean images are predicted: the same to the last bit
    x_adv = torch.where(failed.view(-1, *[1] * (x.ndim - 1)), x, x_adv)
    return x_adv, torch.where(failed[:, None], clean, logits)


def craft_parts(
    model: nn.Module,
    parts: Sequence[tuple[Attack, Tensor, Tensor, Tensor | None]],
    *,
    fused: nn.Module | None = None,
) -> list[Tensor]:
    """:func:`craft_batch` on the parts of one training batch, with the steps of FGSM and PGD taken together.

    ``parts`` are (attack, x, y, noise), all x of one size; ``noise`` is for PGD with a random start.
    Returns the adversarial images of each part. Foolbox takes one attack at a time; :func:`_steps` makes the
    same steps in fewer and larger passes.
    """

    def joins(attack):
        return isinstance(attack, FGSM | PGD) and not getattr(attack, "stop_early", False)

    linf = [part for part in parts if joins(part[0])]
    together = iter(_steps(Guarded.of(model if fused is None else fused), linf) if linf else ())
    return [
        next(together) if joins(attack) else craft_batch(model, x, y, attack, noise=noise, fused=fused)
        for attack, x, y, noise in parts
    ]


def ascend(
    net: nn.Module, x: Tensor, attack: PGD, loss: Callable[[Tensor], Tensor], *, noise: Tensor | None = None
) -> Tensor:
    """PGD's steps up another loss: images (B, C, H, W) within the attack's budget of ``x``, for training.

    ``loss`` maps logits (B, classes) to (B,), without the labels, as TRADES' divergence does. ``noise`` as in
    :func:`craft_batch`, on a net that is already frozen.
    """
    runner = _LinfPGD(attack)
    runner.loss, runner.noise = loss, noise if attack.random_start else None
    fmodel = fb.PyTorchModel(Guarded.of(net), bounds=(0, 1), device=x.device)
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # not used, but asked for
    return runner.run(fmodel, x, fb.criteria.Misclassification(labels), epsilon=attack.eps_255 / 255).detach()


def _steps(net, parts):
    """Foolbox's LinfPGD, step by step, for images of several attacks: each its own budget, steps and loss."""
    # FGSM is PGD of one whole step from the image itself.
    pgds = [
        PGD(a.eps_255, steps=1, rel_stepsize=1.0, random_start=False) if isinstance(a, FGSM) else a
        for a, *_ in parts
    ]
    order = sorted(range(len(parts)), key=lambda i: -pgds[i].steps)  # those with steps left come first
    rows = [(pgds[i], *parts[i][1:]) for i in order]
    x, y = torch.cat([part[1] for part in rows]), torch.cat([part[2] for part in rows])

    def of_each(value):  # an attack's value for each of its images
        return torch.cat([torch.full((len(xs),), value(a), device=x.device) for a, xs, *_ in rows])

    eps = of_each(lambda a: a.eps_255 / 255).view(-1, 1, 1, 1)
    stepsize = of_each(lambda a: _relative(a) * (a.eps_255 / 255)).view(-1, 1, 1, 1)
    by_margin = of_each(lambda a: a.loss == "margin")
    starts = [
        noise if a.random_start and noise is not None else torch.zeros_like(xs) for a, xs, _, noise in rows
    ]
    adversarial = (x + eps * torch.cat(starts)).clamp(0, 1)
    for step in range(rows[0][0].steps):
        n = sum(len(xs) for a, xs, *_ in rows if a.steps > step)
        x0, z = x[:n], adversarial[:n].detach().requires_grad_()
        logits = net(z)
        loss = torch.nn.functional.cross_entropy(logits, y[:n], reduction="none")
        if any(a.loss == "margin" for a in pgds):
            loss = torch.where(by_margin[:n], margin(logits, y[:n]), loss)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        z = z.detach() + stepsize[:n] * gradient.sign()
        z = x0 + (z - x0).clamp(-eps[:n], eps[:n])
        adversarial = torch.cat([z.clamp(0, 1), adversarial[n:]])
    found = dict(zip(order, adversarial.split([len(part[1]) for part in rows]), strict=True))
    return [found[i] for i in range(len(parts))]


class _LinfPGD(fb.attacks.LinfPGD):
    """Foolbox's PGD with our random start and a choice of loss; the loop is Foolbox's own."""

    noise = None  # (B, C, H, W) in [-1, 1]; None starts at the image itself

    def __init__(self, attack):
        super().__init__(rel_stepsize=_relative(attack), steps=attack.steps, random_start=True)
        self.loss = attack.loss

    def get_random_start(self, x0, epsilon):
        return x0 if self.noise is None else x0 + epsilon * ep.astensor(self.noise)  # the loop clips it

    def get_loss_fn(self, model, labels):
        if self.loss == "cross_entropy":
            return super().get_loss_fn(model, labels)
        if callable(self.loss):  # of the logits alone: see ascend
            return lambda x: ep.astensor(self.loss(model(x).raw).sum())
        return lambda x: ep.astensor(margin(model(x).raw, labels.raw).sum())


class _UntilBroken(_LinfPGD):
    """The same steps one at a time, each for the images that were still correct before it."""

    def run(self, model, inputs, criterion, *, epsilon, **kwargs):
        x0, y, steps = inputs, criterion.labels.raw, self.steps
        found = (x0 + epsilon * self.noise).clamp(0, 1) if self.noise is not None else x0.clone()
        going, self.steps = torch.arange(len(y), device=y.device), 1
        for _ in range(steps):
            self.at = found[going]
            moved = super().run(
                model, x0[going], fb.criteria.Misclassification(y[going]), epsilon=epsilon, **kwargs
            )
            correct = self.logits.argmax(1) == y[going]
            going = going[correct]
            if not len(going):
                break
            found[going] = moved[correct]
        return found

    def get_random_start(self, x0, epsilon):
        return ep.astensor(self.at)

    def get_loss_fn(self, model, labels):
        def watched(x):  # the step's own pass says which images were broken before it
            logits = model(x)
            self.logits = logits.raw.detach()
            return logits

        return super().get_loss_fn(watched, labels)


def _relative(attack):
    return 2.5 / attack.steps if attack.rel_stepsize is None else attack.rel_stepsize


def _with_restarts(model, images, labels, attack, chosen, seed, **options):
    """Restarts for the images that are still correct; restart r draws its start from seed + r."""
    once = replace(attack, restarts=1)
    best = craft(model, images, labels, once, subset=chosen, seed=seed, **options)
    for restart in range(1, attack.restarts):
        correct = (~best.success).nonzero().squeeze(1)
        if len(correct) == 0:
            break
        again = craft(model, images, labels, once, subset=chosen[correct], seed=seed + restart, **options)
        for whole, new in zip(best, again, strict=True):
            whole[correct[again.success]] = new[again.success]
    return best


def perturbation_norms(clean: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """(linf in grey levels of 255, l2 in [0, 1] units), each (N,) float32, of two (N, C, H, W) tensors.

    ValueError unless both are float tensors of one shape.
    """
    if clean.shape != adversarial.shape or not (
        clean.is_floating_point() and adversarial.is_floating_point()
    ):
        kinds = " and ".join(f"{tuple(x.shape)} {x.dtype}" for x in (clean, adversarial))
        raise ValueError(f"clean and adversarial images must be float tensors of one shape, not {kinds}")
    difference = (adversarial - clean).flatten(1)
    return difference.abs().amax(1) * 255, difference.norm(dim=1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Carlini & Wagner's f before clipping: the best other class's logit minus the true one's, (N,)."""
    true = labels[:, None]  # by index: a boolean mask would make a GPU wait for its count
    return logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true).squeeze(1)


def checked(images: Any, labels: Any = None, *, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """``images`` as float32 (N, C, H, W) in [0, 1], ``labels`` as int64 (N,); ValueError if they are not.

    Tensors, arrays or lists; or ``images`` is a Dataset or DataLoader of (image, label) pairs and ``labels``
    None. They are returned on ``device``, with None on their own. Labels are checked against a model's
    classes where there is one: :func:`check_labels`.
    """
    images, labels = collected(images, labels)
    if labels is None:
        raise ValueError("labels are missing: one integer an image, or a Dataset that yields both")
    if images.ndim != 4 or not images.is_floating_point():
        kind = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images must be float (N, C, H, W) in [0, 1], not {kind}; see data.to_tensor")
    if len(images) == 0:
        raise ValueError("no images were given")
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "ui":
        labels = labels.astype(np.int64)  # torch does little with unsigned types
    labels = torch.as_tensor(labels)
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        kind = f"{tuple(labels.shape)} {labels.dtype}"
        raise ValueError(f"labels must be {len(images)} integers, one an image, not {kind}")
    labels = labels.detach().to(torch.int64)
    if labels.min() < 0:
        raise ValueError(f"labels are classes 0, 1, ..., not {labels.min().item()}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # also when either is NaN
        raise ValueError(
            f"images must lie in [0, 1]; these reach {low:.9g} to {high:.9g}: {_hint(low, high)}"
        )
    # The type first: some devices know no float64.
    images = images.detach().to(torch.float32)
    return images.to(device), labels.to(device)


def _hint(low, high):
    """What images that reach from ``low`` to ``high`` probably are, and what to do."""
    if low != low or high != high:
        return "look for NaN"
    if high > 10:
        return "divide by 255?"
    if low < -1e-3 or high > 1 + 1e-3:
        return (
            "they look normalised. Pass the images before normalisation, and put it into the model: "
            "torch.nn.Sequential(torchvision.transforms.Normalize(mean, std), model)"
        )
    return "clamp them, if that is rounding"


def _check_attack(attack):
    lacking = [name for name in ("name", "norm", "minimum_norm", "foolbox") if not hasattr(attack, name)]
    if not lacking and not attack.minimum_norm and not hasattr(attack, "eps_255"):
        lacking = ["eps_255"]
    if lacking:
        raise TypeError(f"{attack!r} is no attack: it has no {', '.join(lacking)}; see attacks.Attack")


def check_labels(labels: Tensor | np.ndarray, classes: int) -> None:
    """ValueError unless each of ``labels`` is one of 0..classes - 1."""
    if labels.min() < 0 or labels.max() >= classes:
        found = f"{labels.min().item()} to {labels.max().item()}"
        raise ValueError(f"labels must lie in 0..{classes - 1}, the model's classes, not {found}")


def check_budget(eps_255: float) -> None:
    """ValueError unless ``eps_255`` is a Linf budget in grey levels: 0, or 0.1 to 255.

    A positive budget below a tenth of a level is nearly always one in units of [0, 1], such as 8/255.
    """
    if not isinstance(eps_255, numbers.Real) or not 0 <= eps_255 <= 255:  # NaN is not
        raise ValueError(f"eps_255 must be a number of grey levels in 0..255, not {eps_255!r}")
    if 0 < eps_255 < SMALLEST_BUDGET_255:
        raise ValueError(
            f"eps_255 is in grey levels of 255, and {eps_255:.4g} is less than a tenth of one. "
            f"If you mean {eps_255:.4g} of the range [0, 1], write {255 * eps_255:.4g}."
        )
