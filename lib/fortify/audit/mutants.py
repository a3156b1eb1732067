"""Does the audit see? Broken attacks and fake defences that it must catch, with where they were met if known.

A broken attack has the signature of :func:`fortify.attacks.craft`; a fake defence takes a model and returns
one that looks more robust and is not. To add one, write it and list it in its dictionary: the tests
and notebook 08 then ask the audit to catch it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import foolbox as fb
import pandas as pd
import torch
from torch import Tensor, nn

from fortify.attacks import CW, FGSM, PGD, Adversarial, Attack, craft, craft_batch
from fortify.audit.checks import named
from fortify.audit.context import FAIL, NOT_RUN, PASS, AuditData, Check, Suite
from fortify.audit.report import audit
from fortify.models import predict
from fortify.runtime import device_of, frozen

# What a mutant meets: all but T4, T7 and T14, which cost more than they add, and what tests no attack.
MUTANT_CHECKS = ("T0", "T0b", "T1", "T2", "T3", "T5", "T6", "T8", "T9", "T11")

_MEAN, _STD = 0.485, 0.229  # ImageNet, first channel: the normalisation the audited notebook attacks under


def _finished(model, images, labels):
    """Adversarial with the predictions and the success that the model itself shows."""
    probabilities, predictions = predict(model, images).max(1)
    return Adversarial(images, predictions, probabilities, predictions != labels)


def _steps(model, images, labels, attack, seed, *, direction=1.0, project=True):
    """PGD as a plain loop, with what a mutant breaks as options."""
    eps, device = attack.eps_255 / 255, device_of(model)
    x, y = images.to(device), labels.to(device)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    z = (x + eps * noise.to(device)).clamp(0, 1)
    stepsize = (attack.rel_stepsize or 2.5 / attack.steps) * eps
    with frozen(model):
        for _ in range(attack.steps):
            z = z.requires_grad_()
            (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
            z = (z.detach() + direction * stepsize * slope.sign()).clamp(0, 1)
            z = z.clamp(x - eps, x + eps) if project else z
    return _finished(model, z.detach().cpu(), labels)


def no_projection(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, seed: int = 0, **options: Any
) -> Adversarial:
    """Steps that are never brought back into the ball: a loop copied without its last line."""
    if not isinstance(attack, PGD):
        return craft(model, images, labels, attack, seed=seed, **options)
    return _steps(model, images, labels, attack, seed, project=False)


def wrong_sign(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, seed: int = 0, **options: Any
) -> Adversarial:
    """Descends the loss: "minimise" and "maximise" confused, as when an optimiser is reused for an attack."""
    if not isinstance(attack, PGD):
        return craft(model, images, labels, attack, seed=seed, **options)
    return _steps(model, images, labels, attack, seed, direction=-1.0)


def clamp_normalised(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, **options: Any
) -> Adversarial:
    """Clamps the normalised image to [0, 1], which flattens it: in the audited paper's own notebook."""
    crafted = craft(model, images, labels, attack, **options).images
    return _finished(model, ((crafted - _MEAN) / _STD).clamp(0, 1) * _STD + _MEAN, labels)


def train_mode(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, seed: int = 0, **_: Any
) -> Adversarial:
    """Attacks the model as it finds it: Foolbox never switches to eval mode, so a training loop must."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    x, y = images.to(device_of(model)), labels.to(device_of(model))
    unseen = _Around(model)
    unseen.training = False  # of the wrapper alone: Foolbox does warn, among much else
    crafted = craft_batch(unseen, x, y, attack, noise=noise.to(x.device))
    return _finished(model, crafted.detach().cpu(), labels)


def one_step(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, seed: int = 0, **options: Any
) -> Adversarial:
    """A "PGD" of one short step, 2/255 of the normalised image: in the audited paper's own notebook."""
    if isinstance(attack, PGD):
        attack = FGSM(min(attack.eps_255, 2 * _STD))
    return craft(model, images, labels, attack, seed=seed, **options)


def fgsm_as_pgd(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, seed: int = 0, **options: Any
) -> Adversarial:
    """A "PGD" that returns after its first step, of the whole budget: a return indented too far."""
    if isinstance(attack, PGD):
        attack = FGSM(attack.eps_255)
    return craft(model, images, labels, attack, seed=seed, **options)


def half_budget(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, **options: Any
) -> Adversarial:
    """Half the budget: an eps stated for [-1, 1] used on [0, 1]."""
    if not isinstance(attack, CW):
        attack = replace(attack, eps_255=attack.eps_255 / 2)
    return craft(model, images, labels, attack, **options)


def black_image_cw(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, **options: Any
) -> Adversarial:
    """Foolbox's failed CW, returned as it comes: a black image, which may even count as a success."""
    if not isinstance(attack, CW):
        return craft(model, images, labels, attack, **options)
    x, y = images.to(device_of(model)), labels.to(device_of(model))
    settings = {name: getattr(attack, name) for name in ("binary_search_steps", "steps", "stepsize")}
    with frozen(model):
        fmodel = fb.PyTorchModel(model, bounds=(0, 1), device=x.device)
        found = fb.attacks.L2CarliniWagnerAttack(**settings, abort_early=False).run(
            fmodel, x, fb.criteria.Misclassification(y)
        )
    return _finished(model, found.detach().cpu().clamp(0, 1), labels)


def claimed_success(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, **options: Any
) -> Adversarial:
    """Counts every image it changed as broken, without asking the model again."""
    crafted = craft(model, images, labels, attack, **options)
    return crafted._replace(success=torch.ones(len(images), dtype=torch.bool))


def unseeded(
    model: nn.Module, images: Tensor, labels: Tensor, attack: Attack, *, seed: int = 0, **options: Any
) -> Adversarial:
    """Draws its start from the global generator, whatever the seed: two runs, two results."""
    return craft(model, images, labels, attack, seed=int(torch.randint(2**31, ())), **options)


BROKEN_ATTACKS = {
    "no projection": no_projection,
    "wrong sign": wrong_sign,
    "clamp on normalised data": clamp_normalised,
    "train mode": train_mode,
    "one short step": one_step,
    "one step of eps": fgsm_as_pgd,
    "half the budget": half_budget,
    "black-image CW": black_image_cw,
    "claimed success": claimed_success,
    "no seed": unseeded,
}


class _Around(nn.Module):
    """A model with something done to its input and to its logits."""

    def __init__(self, model, *, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def logit_scaling(model: nn.Module) -> nn.Module:
    """Logits times 10,000: the softmax saturates and the cross-entropy's gradient is zero in float32.

    Defensive distillation did this (Carlini & Wagner 2017).
    """
    return _Around(model, after=lambda z: z * 1e4)


def rounding(model: nn.Module) -> nn.Module:
    """Input in 16 grey levels, whose gradient is zero: feature squeezing (Xu et al. 2018)."""
    return _Around(model, before=lambda x: (x * 15).round() / 15)


def saved_file(model: nn.Module) -> nn.Module:
    """Input rounded to 8 bits, as a file would be: the same predictions, and a gradient of zero."""
    return _Around(model, before=lambda x: (x * 255).round() / 255)


def random_noise(model: nn.Module) -> nn.Module:
    """Another noise of two grey levels at each call: breaks single gradients (Athalye et al. 2018)."""
    return _Around(model, before=lambda x: (x + 2 / 255 * torch.randn_like(x)).clamp(0, 1))


def shattered(model: nn.Module) -> nn.Module:
    """A ripple of one grey level that vanishes on 8-bit images: the same predictions, gradients reversed.

    Its slope there is 1 - 2 pi: "shattered gradients" (Athalye et al. 2018), as thermometer codes have.
    """
    return _Around(model, before=lambda x: x - (2 * torch.pi * 255 * x).sin() / 255)


def label_only(model: nn.Module) -> nn.Module:
    """Logits replaced by the label's one-hot code: the same predictions, no gradient at all."""
    return _Around(model, after=lambda z: z * 0 + nn.functional.one_hot(z.argmax(1), z.shape[1]).float())


def saturated(model: nn.Module) -> nn.Module:
    """Logits through a steep tanh: the same ranking until it saturates, and gradients that underflow.

    The saturating activations of Nayebi & Ganguli 2017, broken by Brendel & Bethge 2017.
    """
    return _Around(model, after=lambda z: (50 * (z - z.mean(1, keepdim=True))).tanh() + z.detach())


FAKE_DEFENCES = {
    "logit scaling": logit_scaling,
    "rounding": rounding,
    "8-bit front end": saved_file,
    "random noise": random_noise,
    "shattered gradient": shattered,
    "label only": label_only,
    "saturation": saturated,
}


def run_mutants(
    model: nn.Module,
    data: AuditData,
    suite: Suite,
    *,
    images: int | None = None,
    seed: int = 0,
    attacks: Mapping[str, Callable[..., Adversarial]] | None = None,
    defences: Mapping[str, Callable[[nn.Module], nn.Module]] | None = None,
) -> pd.DataFrame:
    """Ask the audit to catch every mutant: a table with name, kind, caught and by.

    ``model`` and ``data`` as for :func:`fortify.audit.audit`; used are the first ``images`` (default: all)
    that the model classifies correctly. ``by`` lists the checks that fail for the
    mutant and pass for the honest attack on the honest model, so that none counts which fails anyway. The
    budget is not the suite's but the model's :func:`contested_budget`, where an attack's strength shows.
    Defences are attacked honestly, and from the undefended model too (T8); for a broken attack that would be
    the honest one beside it, which no audit has. ``attacks`` and ``defences`` default to this module's.
    """
    right = (predict(model, data.images).argmax(1) == data.labels).nonzero().squeeze(1)[:images]
    data = AuditData(data.images[right], data.labels[right])
    suite = mutant_suite(model, data, suite, seed=seed)
    attacks = BROKEN_ATTACKS if attacks is None else attacks
    defences = FAKE_DEFENCES if defences is None else defences

    def failures(subject, implementation, others=()):
        found = audit(
            subject, data, suite, craft=implementation, others=others, seed=seed, only=MUTANT_CHECKS
        )
        return found.failed

    anyway = failures(model, craft, (model,))
    table = [(name, "broken attack", failures(model, mutant)) for name, mutant in attacks.items()]
    table += [
        (name, "fake defence", failures(disguise(model), craft, (model,)))
        for name, disguise in defences.items()
    ]
    rows = []
    for name, kind, failed in table:
        by = [check for check in failed if check not in anyway]
        rows.append({"name": name, "kind": kind, "caught": bool(by), "by": ", ".join(by)})
    return pd.DataFrame(rows, columns=["name", "kind", "caught", "by"])


def mutant_suite(model: nn.Module, data: AuditData, suite: Suite, *, seed: int = 0) -> Suite:
    """The suite that mutants meet: at the :func:`contested_budget`, with one start and a short CW.

    A second start would only make up for what a broken attack lacks; what is wrong with a CW shows when it
    fails, which takes no steps.
    """
    short = CW(binary_search_steps=1, steps=5)
    return replace(suite, eps_255=contested_budget(model, data, suite, seed=seed), restarts=1, cw=short)


def contested_budget(model: nn.Module, data: AuditData, suite: Suite, *, seed: int = 0) -> float:
    """The Linf budget (grey levels) at which honest PGD breaks about half of ``data``.

    Where nothing is still correct, or everything is, a weak attack looks like a strong one. Between 1/4 and
    128 grey levels, by bisection, to a tenth.
    """
    low, high, right = 0.25, 128.0, predict(model, data.images).argmax(1) == data.labels
    while high / low > 1.1:
        middle = (low * high) ** 0.5
        attack = PGD(middle, steps=suite.pgd_steps)
        broken = craft(model, data.images[right], data.labels[right], attack, seed=seed).success
        low, high = (low, middle) if broken.float().mean() > 0.5 else (middle, high)
    return float(f"{low:.2g}")


def tally(mutants: pd.DataFrame) -> str:
    """How many were caught, as text: "17/17"."""
    return f"{int(mutants.caught.sum())}/{len(mutants)}"


def mutant_check(mutants: pd.DataFrame | None) -> Check:
    """T10, the test of the audit itself: fails when any mutant survives. None: not run on this model."""
    if mutants is None:
        return named("T10", NOT_RUN, "", "", "the mutants met another model")
    missed = list(mutants.name[~mutants.caught])
    return named(
        "T10",
        FAIL if missed or mutants.empty else PASS,
        f"{tally(mutants)} caught",
        "all",
        f"survive: {', '.join(missed)}" if missed else "",
    )
