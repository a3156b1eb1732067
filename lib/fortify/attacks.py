"""FGSM, PGD and Carlini & Wagner through Foolbox, with what must be true around an attack.

A budget is in grey levels of 255 (``eps_255``) and an image is float in [0, 1]. To change an attack,
change its dataclass or its branch in :func:`craft_batch`. To add one, add a dataclass with a ``name`` and a
branch, that name to :data:`fortify.evaluation.ATTACKS`, and the attack to the lists of notebooks 3 and 4.
"""

import numbers
import os
from dataclasses import dataclass, replace
from typing import NamedTuple

from fortify.runtime import frozen

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which wants a git binary

import eagerpy as ep
import foolbox as fb
import torch

from fortify.fused import Twin
from fortify.runtime import device_of, float32_convolutions, progress_bar


@dataclass(frozen=True)
class FGSM:
    """One step of size eps along the sign of the loss gradient (Goodfellow et al. 2015). Linf."""

    eps_255: float
    name = "fgsm"

    def __post_init__(self):
        _check_budget(self.eps_255)


@dataclass(frozen=True)
class PGD:
    """Projected gradient ascent in the Linf ball (Madry et al. 2018).

    ``rel_stepsize`` is in units of eps; None is 2.5 / steps (Madry's rule: the walk can cross the ball).
    ``loss`` is ``"cross_entropy"`` or ``"margin"`` (Carlini & Wagner's f: best other logit minus true one).
    ``restarts`` > 1 attacks what still stands again, from another random start.
    """

    eps_255: float
    steps: int = 20
    rel_stepsize: float | None = None
    random_start: bool = True
    restarts: int = 1
    loss: str = "cross_entropy"
    name = "pgd"

    def __post_init__(self):
        _check_budget(self.eps_255)
        if self.loss not in ("cross_entropy", "margin"):
            raise ValueError(f'loss must be "cross_entropy" or "margin", not {self.loss!r}')
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, not {self.steps} and {self.restarts}")
        if self.rel_stepsize is not None and not self.rel_stepsize >= 0:
            raise ValueError(f"rel_stepsize must be None or at least 0, not {self.rel_stepsize!r}")


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
    name = "cw"

    def __post_init__(self):
        if self.steps < 1 or self.binary_search_steps < 1:
            counts = f"{self.steps} and {self.binary_search_steps}"
            raise ValueError(f"steps and binary_search_steps must be at least 1, not {counts}")
        if not (self.stepsize > 0 and self.initial_const > 0 and self.confidence >= 0):
            given = f"{self.stepsize!r}, {self.initial_const!r} and {self.confidence!r}"
            raise ValueError(
                f"stepsize and initial_const must be above 0, confidence at least 0, not {given}"
            )


class Adversarial(NamedTuple):
    """What :func:`craft` returns, on the CPU."""

    images: torch.Tensor  # (N, 1, H, W) float32 in [0, 1]
    success: torch.Tensor  # (N,) bool: the model misclassifies the returned image


def craft(model, images, labels, attack, *, seed=0, batch_size=64, progress=False, twin=None):
    """Attack every image: returns :class:`Adversarial` (images, success), in the order given.

    ``images`` (N, 1, H, W) float in [0, 1] and ``labels`` (N,) integers are tensors or numpy arrays; the
    device is the model's.
    FGSM and PGD stay within eps_255 / 255 in Linf. A CW that fails returns the clean image.
    The random start is drawn for the whole set from ``seed``, so results do not depend on
    ``batch_size`` beyond the rounding of the convolutions. The model's mode, its parameters' gradients
    and the global random state are as before on return. ``twin`` is the net to walk on, for a caller with
    several attacks on one model: its :class:`fortify.fused.Twin`'s; None makes one.
    Raises ValueError for wrong shapes, values outside [0, 1] or labels outside the model's classes.
    """
    images, labels = checked(images, labels, device=None)
    if isinstance(attack, PGD) and attack.restarts > 1:
        options = {"batch_size": batch_size, "progress": progress, "twin": twin}
        return _with_restarts(model, images, labels, attack, seed, **options)
    device, noise = device_of(model), None
    if isinstance(attack, PGD) and attack.random_start:
        # Drawn on the CPU: the same start on every device.
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    adversarial, success = [], []
    with frozen(model), float32_convolutions(device):
        first = images[:1].to(device)
        with torch.no_grad():
            logits = model(first)
        check_labels(labels, classes=logits.shape[1])
        twin = Twin(model, first, logits=logits).net if twin is None else twin
        for start in progress_bar(range(0, len(images), batch_size), desc=attack.name, show=progress):
            part = slice(start, start + batch_size)
            # Copies: tensors made in inference mode take no part in gradients.
            x, y = (whole[part].to(device, copy=True) for whole in (images, labels))
            start_noise = None if noise is None else noise[part].to(device)
            x_adv = craft_batch(model, x, y, attack, noise=start_noise, twin=twin)
            with torch.no_grad():
                prediction = model(x_adv).argmax(1)
            adversarial.append(x_adv.cpu())
            success.append((prediction != y).cpu())
    return Adversarial(torch.cat(adversarial), torch.cat(success))


def perturbation_norms(clean, adversarial):
    """(linf in grey levels of 255, l2 in [0, 1] units), each (N,) float32, of two (N, 1, H, W) tensors.

    ValueError unless both are float tensors of one shape.
    """
    if clean.shape != adversarial.shape or not (
        clean.is_floating_point() and adversarial.is_floating_point()
    ):
        kinds = " and ".join(f"{tuple(x.shape)} {x.dtype}" for x in (clean, adversarial))
        raise ValueError(f"clean and adversarial images must be float tensors of one shape, not {kinds}")
    difference = (adversarial - clean).flatten(1)
    return difference.abs().amax(1) * 255, difference.norm(dim=1)


def margin(logits, labels):
    """Carlini & Wagner's f before clipping: the best other class's logit minus the true one's, (N,)."""
    true = labels[:, None]  # by index: a boolean mask would make a GPU wait for its count
    return logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true).squeeze(1)


class _LinfPGD(fb.attacks.LinfPGD):
    """Foolbox's PGD with our random start and a choice of loss; the loop is Foolbox's own."""

    def __init__(self, attack, noise):
        super().__init__(rel_stepsize=_relative(attack), steps=attack.steps, random_start=noise is not None)
        self.noise, self.loss = noise, attack.loss

    def get_random_start(self, x0, epsilon):
        return x0 + epsilon * ep.astensor(self.noise)  # the loop clips it

    def get_loss_fn(self, model, labels):
        if self.loss == "cross_entropy":
            return super().get_loss_fn(model, labels)
        return lambda x: ep.astensor(margin(model(x).raw, labels.raw).sum())


def craft_batch(model, x, y, attack, *, noise=None, twin=None):
    """Attack one batch on its own device, unchecked: for loops that already hold :func:`frozen`.

    ``x`` (B, 1, H, W) in [0, 1], ``y`` (B,); ``noise`` in [-1, 1] times eps is PGD's start (None, or a PGD
    without random start: at x). One start, whatever ``attack.restarts``: those are :func:`craft`'s.
    ``twin`` is a faster net of the same function to walk on (:class:`fortify.fused.Twin`).
    Returns the adversarial batch (B, 1, H, W).
    """
    fmodel = fb.PyTorchModel(model if twin is None else twin, bounds=(0, 1), device=x.device)
    criterion = fb.criteria.Misclassification(y)
    if isinstance(attack, CW):
        return _carlini_wagner(fmodel, x, criterion, attack, judge=model)
    eps = attack.eps_255 / 255
    if eps == 0:
        return x.clone()  # bit for bit; Foolbox's own start would still round
    if isinstance(attack, FGSM):
        foolbox_attack = fb.attacks.LinfFastGradientAttack()
    elif isinstance(attack, PGD):
        foolbox_attack = _LinfPGD(attack, noise if attack.random_start else None)
    else:
        raise TypeError(f"unknown attack {attack!r}; use FGSM, PGD or CW")
    # .run, not the call: the call would spend one more forward a budget to find `success` again.
    return foolbox_attack.run(fmodel, x, criterion, epsilon=eps)


def craft_parts(model, parts, *, twin=None):
    """:func:`craft_batch` on the parts of one training batch, with FGSM and PGD walking together.

    ``parts`` are (attack, x, y, noise), all x of one size; ``noise`` is for PGD with a random start.
    Returns the adversarial images of each part. Foolbox takes one attack at a time; :func:`_walk` makes the
    same steps in fewer and larger passes.
    """
    linf = [part for part in parts if isinstance(part[0], FGSM | PGD)]
    together = iter(_walk(model if twin is None else twin, linf) if linf else ())
    return [
        next(together) if isinstance(attack, FGSM | PGD) else craft_batch(model, x, y, attack, twin=twin)
        for attack, x, y, _ in parts
    ]


def _walk(net, parts):
    """Foolbox's LinfPGD, step by step, for images of several attacks: each its own budget, steps and loss."""
    # FGSM is PGD of one whole step from the image itself.
    pgds = [
        PGD(a.eps_255, steps=1, rel_stepsize=1.0, random_start=False) if isinstance(a, FGSM) else a
        for a, *_ in parts
    ]
    order = sorted(range(len(parts)), key=lambda i: -pgds[i].steps)  # those that still walk come first
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
        logits = net(z).float()
        loss = torch.nn.functional.cross_entropy(logits, y[:n], reduction="none")
        if any(a.loss == "margin" for a in pgds):
            loss = torch.where(by_margin[:n], margin(logits, y[:n]), loss)
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        z = z.detach() + stepsize[:n] * gradient.sign()
        z = x0 + (z - x0).clamp(-eps[:n], eps[:n])
        adversarial = torch.cat([z.clamp(0, 1), adversarial[n:]])
    found = dict(zip(order, adversarial.split([len(part[1]) for part in rows]), strict=True))
    return [found[i] for i in range(len(parts))]


def _relative(attack):
    return 2.5 / attack.steps if attack.rel_stepsize is None else attack.rel_stepsize


def _carlini_wagner(fmodel, x, criterion, attack, judge):
    foolbox_attack = fb.attacks.L2CarliniWagnerAttack(
        binary_search_steps=attack.binary_search_steps,
        steps=attack.steps,
        stepsize=attack.stepsize,
        confidence=attack.confidence,
        initial_const=attack.initial_const,
        abort_early=False,  # with few steps it would stop at the first that does not improve
    )
    x_adv = foolbox_attack.run(fmodel, x, criterion)
    # Where it finds nothing Foolbox returns an all-black image, which may even count as a success.
    failed = (x_adv == 0).flatten(1).all(1)
    with torch.no_grad():
        failed |= judge(x_adv).argmax(1) == criterion.labels.raw  # it stops on the boundary, to rounding
    return torch.where(failed.view(-1, 1, 1, 1), x, x_adv)


def _with_restarts(model, images, labels, attack, seed, **options):
    """Restarts for the images that still stand; restart r draws its start from seed + r."""
    once = replace(attack, restarts=1)
    best, success = craft(model, images, labels, once, seed=seed, **options)
    for restart in range(1, attack.restarts):
        standing = (~success).nonzero().squeeze(1)
        if len(standing) == 0:
            break
        again = craft(model, images[standing], labels[standing], once, seed=seed + restart, **options)
        best[standing[again.success]] = again.images[again.success]
        success[standing] = again.success
    return Adversarial(best, success)


def checked(images, labels, *, device="cpu"):
    """``images`` as float32 (N, 1, H, W) in [0, 1], ``labels`` as int64 (N,); ValueError if they are not.

    They are returned on ``device``, with None on their own. Labels are checked against a model's classes
    where there is one: :func:`check_labels`.
    """
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    if images.ndim != 4 or images.shape[1] != 1 or not images.is_floating_point():
        kind = f"{tuple(images.shape)} {images.dtype}"
        raise ValueError(f"images must be float (N, 1, H, W) in [0, 1], not {kind}; see data.to_tensor")
    if len(images) == 0:
        raise ValueError("no images were given")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        kind = f"{tuple(labels.shape)} {labels.dtype}"
        raise ValueError(f"labels must be {len(images)} integers, one an image, not {kind}")
    if labels.min() < 0:
        raise ValueError(f"labels are classes 0, 1, ..., not {labels.min().item()}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # also when either is NaN
        hint = "divide by 255?" if high > 2 else "clamp them, or look for NaN"
        raise ValueError(f"images must lie in [0, 1]; these reach {low:.9g} to {high:.9g}: {hint}")
    return images.detach().to(device, torch.float32), labels.detach().to(device, torch.int64)


def check_labels(labels, classes):
    """ValueError unless each of ``labels`` is one of 0..classes - 1."""
    if labels.min() < 0 or labels.max() >= classes:
        found = f"{labels.min().item()} to {labels.max().item()}"
        raise ValueError(f"labels must lie in 0..{classes - 1}, the model's classes, not {found}")


def _check_budget(eps_255):
    if not isinstance(eps_255, numbers.Real) or not 0 <= eps_255 <= 255:  # NaN is not
        raise ValueError(f"eps_255 must be a number of grey levels in 0..255, not {eps_255!r}")
