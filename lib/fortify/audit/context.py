"""What the checks of an audit share: the settings, the images, and every attack run so far, run once."""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fortify.attacks import (
    CW,
    ONE_ULP_255,
    PGD,
    Adversarial,
    Attack,
    AttackWarning,
    check_labels,
    checked,
    perturbation_norms,
)
from fortify.models import Guarded, collected, predict
from fortify.runtime import device_of, float32_convolutions, frozen

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"
_STANDARD = 100, 5000  # AutoAttack's own steps and queries


@dataclass(frozen=True)
class Suite:
    """What to audit with. Budgets are in grey levels of 255; the defaults are the paper profile's.

    Up to one image may deviate, or ``points`` per cent of the images attacked, whichever is more; of fewer
    than ten images none may, for one of them is no exception. The audit's own choices are ``loss_share``
    (T2), ``cw_share`` (T16), ``alignment`` and ``overfitting_points`` (T11): when training on one-step
    attacks overfits catastrophically, gradients lose their alignment and PGD accuracy falls to 0
    (Andriushchenko & Flammarion 2020).
    """

    eps_255: float = 4.0
    eps_grid_255: tuple = (0.25, 0.5, 1, 2, 4, 8, 16)  # T4, and the whole range
    pgd_steps: int = 50  # T2 compares with twice as many
    restarts: int = 5  # T2 compares with twice as many
    cw: CW = field(default_factory=lambda: CW(binary_search_steps=5, steps=100, initial_const=1.0))  # T0, T16
    cw_l2: float = 1.0  # T16, budget in [0, 1] units
    cw_images: int = 40  # T16
    contract_images: int = 8  # T0's own attacks
    contract_steps: int = 5  # PGD steps of T0 and T0b
    noise_draws: int = 20  # T6
    square_queries: int = 5000  # T7
    autoattack_steps: int = 100  # T7
    bootstrap_draws: int = 2000  # T15
    points: float = 1.0
    gap_points: float = 2.0  # T0b, T9
    rising_share: float = 0.99  # T1
    cw_share: float = 0.9  # T16, of the median L2 that CW needs: what a longer one must not undercut
    loss_share: float = 0.9  # T2, of the mean loss that an independent loop reaches
    alignment: float = 0.2  # T11
    overfitting_points: float = 20.0  # T11
    batch_size: int = 64

    @property
    def autoattack(self) -> str:
        """What T7's AutoAttack is to be called: shorter than the standard one it is a reduced one."""
        full = self.autoattack_steps >= _STANDARD[0] and self.square_queries >= _STANDARD[1]
        return "AutoAttack" if full else "reduced AutoAttack"

    def tolerated(self, n: int, points: float | None = None) -> int:
        """How many of ``n`` images may deviate: one (from ten on), or ``points`` (default: the suite's) %."""
        return max(int(n >= 10), int((self.points if points is None else points) / 100 * n))


@dataclass(frozen=True, eq=False)
class AuditData:
    """Images to audit on: (N, C, H, W) float in [0, 1], labels (N,), and groups (N,) or None.

    Arrays become tensors. ``images`` may be a Dataset or DataLoader of (image, label) pairs; then ``labels``
    is None. Raises ValueError for another shape or range, or lengths that differ.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    groups: np.ndarray | None = None

    def __post_init__(self):
        images, labels = collected(self.images, self.labels)
        sizes = {len(part) for part in (images, labels, self.groups) if part is not None}
        if len(sizes) != 1:
            raise ValueError(f"one label and one group for each image, not {sorted(sizes)} of them")
        images, labels = checked(images, labels)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels)
        if self.groups is not None:
            object.__setattr__(self, "groups", np.asarray(self.groups))


@dataclass(frozen=True)
class Check:
    """One line of the audit's table."""

    id: str
    check: str
    verdict: str  # "pass", "fail" or "not run"
    measured: str
    limit: str
    note: str = ""


class Context:
    """What the checks share: the images the model classifies correctly, and every attack run so far, once.

    Works on a copy of the model, so that an attack that damages it damages no later check. All masks and
    image tensors are over the ``n`` images classified correctly; ``total`` counts the misclassified ones too.
    """

    def __init__(
        self,
        model: nn.Module,
        data: AuditData,
        suite: Suite,
        *,
        craft: Callable[..., Adversarial],
        others: Iterable[nn.Module],
        seed: int,
    ) -> None:
        self.model, self.suite, self.implementation = Guarded(_copied(model)).eval(), suite, craft
        self.others, self.seed, self.data = tuple(others), seed, data
        logits = self.logits(data.images)
        self.classes = logits.shape[1]
        check_labels(data.labels, self.classes)
        right = self._predicted(data.images) == data.labels
        self.right, self.total, self.n = right, len(right), int(right.sum())
        if self.n == 0:
            raise ValueError(
                f"the model misclassifies all {self.total} images when clean: nothing is left to attack. "
                "Audit a trained model, on images of its own size and classes."
            )
        self.images, self.labels = data.images[right], data.labels[right]
        self.broken = {}  # {attack's name: (n,) bool}: what each whole attack at eps_255 broke
        self.faults = {}  # {breach of the contract: first attack that committed it}, in order of discovery
        self._cache = {}
        # Every later check takes the model's word for what an image is: it must be one word.
        if not torch.equal(logits.nan_to_num(), self.logits(data.images).nan_to_num()):
            self.faults["answers one image differently each time; attack the mean over its randomness"] = (
                "the model, not an attack"
            )

    def everything(self) -> Tensor:
        return torch.ones(self.n, dtype=torch.bool)

    def craft(
        self,
        attack: Attack,
        *,
        where: Tensor | None = None,
        seed: int | None = None,
        model: nn.Module | None = None,
        training: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(broken (n,) bool, images) of ``attack`` on the images of the mask ``where`` (default: all).

        Elsewhere images stay clean and unbroken. ``broken`` is what the model says of the images, in eval
        mode, whatever the attack reports; each breach of the attack's contract is kept in ``faults``.
        ``model`` takes the place of the model for gradients; ``training`` hands it over in train mode.
        """
        where = self.everything() if where is None else where
        seed = self.seed if seed is None else seed
        broken, images = torch.zeros(self.n, dtype=torch.bool), self.images.clone()
        if not where.any():
            return broken, images
        key = (attack, where.numpy().tobytes(), seed, training)
        if model is None and key in self._cache:
            return self._cache[key]
        target = self.model if model is None else model
        x, y = self.images[where], self.labels[where]
        state = copy.deepcopy(self.model.state_dict())
        target.train(training)
        modes = set()
        watch = self.model.register_forward_pre_hook(
            lambda module, _: modes.add(any(part.training for part in module.modules()))
        )
        try:
            with warnings.catch_warnings():  # they send the reader here
                warnings.simplefilter("ignore", AttackWarning)
                options = {"seed": seed, "batch_size": self.suite.batch_size}
                crafted = self.implementation(target, x, y, attack, **options)
        finally:
            watch.remove()
        restored = all(part.training == training for part in target.modules())
        unharmed = all(torch.equal(state[name], value) for name, value in self.model.state_dict().items())
        target.eval()
        self.model.load_state_dict(state)
        adversarial = crafted.images.detach().float().cpu()
        if adversarial.shape != x.shape:
            raise ValueError(f"{attack!r} returned {tuple(adversarial.shape)} for images {tuple(x.shape)}")
        misclassified = self._predicted(adversarial) != y
        self.note(attack, "attacks in train mode", True in modes)
        self.note(attack, "leaves the model in another mode", not restored)
        self.note(attack, "alters the model's statistics or weights", not unharmed)
        self._contract(attack, x, adversarial, misclassified, crafted.success.cpu())
        broken[where], images[where] = misclassified, adversarial
        if model is None:
            self._cache[key] = broken, images
        return broken, images

    def forget(self) -> None:
        """Run attacks again that were run before."""
        self._cache.clear()

    def note(self, attack: Attack, fault: str, happened: bool | Tensor) -> None:
        """Keep a breach of the attacks' contract for T0."""
        if happened:
            self.faults.setdefault(fault, attack.name)

    def _contract(self, attack, x, adversarial, misclassified, reported):
        inside = (adversarial >= 0) & (adversarial <= 1)  # False for NaN
        self.note(attack, "leaves [0, 1]", not inside.all())
        self.note(
            attack, "reports a success the model does not show", not torch.equal(reported, misclassified)
        )
        if not attack.minimum_norm:
            largest = perturbation_norms(x, adversarial)[0].max().item()
            over = not largest <= attack.eps_255 + ONE_ULP_255
            self.note(attack, f"exceeds the budget ({largest:.3g} of {attack.eps_255:g} grey levels)", over)
        else:
            unchanged = (adversarial == x).flatten(1).all(1)
            black = (adversarial == 0).flatten(1).all(1) & ~unchanged
            self.note(attack, "returns a black image", black.any())
            self.note(attack, "fails without returning the clean image", (~misclassified & ~unchanged).any())

    def pgd(
        self,
        eps_255: float | None = None,
        *,
        steps: int | None = None,
        loss: str = "cross_entropy",
        where: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`craft` with PGD at the suite's budget and length, one start."""
        eps_255 = self.suite.eps_255 if eps_255 is None else eps_255
        return self.craft(PGD(eps_255, steps=steps or self.suite.pgd_steps, loss=loss), where=where)

    def white_box(self) -> tuple[Tensor, Tensor]:
        """(broken, images) by the strongest white-box attack: PGD, its restarts, PGD on the margin loss."""
        broken, images = (part.clone() for part in self.pgd())
        self.broken["PGD, cross-entropy"] = broken.clone()
        if self.suite.restarts > 1:
            again = PGD(self.suite.eps_255, steps=self.suite.pgd_steps, restarts=self.suite.restarts - 1)
            self._add(broken, images, self.craft(again, where=~broken, seed=self.seed + 1))
            self.broken[f"PGD, {self.suite.restarts} starts"] = broken.clone()
        margin_loss = self.pgd(loss="margin")
        self.broken["PGD, margin"] = margin_loss[0]
        self._add(broken, images, margin_loss)
        return broken, images

    @staticmethod
    def _add(broken, images, more):
        new = more[0] & ~broken
        images[new] = more[1][new]
        broken |= new

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of the model, in eval mode and float32, on the CPU."""
        device = device_of(self.model)
        with frozen(self.model), float32_convolutions(device), torch.no_grad():
            return torch.cat([self.model(x.to(device)).cpu() for x in images.split(self.suite.batch_size)])

    def _predicted(self, images):
        return predict(self.model, images, batch_size=self.suite.batch_size).argmax(1)

    def misclassified(self, images: Tensor, where: Tensor | None = None) -> Tensor:
        """(n,) bool: which of ``images``, one for each that is attacked, the model misclassifies."""
        broken = torch.zeros(self.n, dtype=torch.bool)
        where = self.everything() if where is None else where
        if where.any():
            broken[where] = self._predicted(images[where]) != self.labels[where]
        return broken

    def ascend(self, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The audit's own PGD, a plain loop that shares no code with the one under audit: (broken, images).

        ``loss`` is of (logits, labels), (B,); the suite's budget and length, steps of 2.5 / length.
        """
        eps, steps, device = self.suite.eps_255 / 255, self.suite.pgd_steps, device_of(self.model)
        generator = torch.Generator().manual_seed(self.seed + 1)
        noise = (torch.rand(self.images.shape, generator=generator) * 2 - 1) * eps
        found = []
        with frozen(self.model), float32_convolutions(device):
            for part in torch.arange(self.n).split(self.suite.batch_size):
                x, y = self.images[part].to(device), self.labels[part].to(device)
                z = (x + noise[part].to(device)).clamp(0, 1)
                for _ in range(steps):
                    z = z.requires_grad_()
                    (slope,) = torch.autograd.grad(loss(self.model(z), y).sum(), z)
                    z = z.detach() + 2.5 / steps * eps * slope.sign()
                    z = z.clamp(x - eps, x + eps).clamp(0, 1)
                found.append(z.cpu())
        images = torch.cat(found)
        return self.misclassified(images), images

    def gradients(self, images: Tensor) -> Tensor:
        """Input gradients of the cross-entropy, flattened (n, H * W), on the CPU."""
        device, found = device_of(self.model), []
        with frozen(self.model), float32_convolutions(device):
            for part in torch.arange(self.n).split(self.suite.batch_size):
                z = images[part].to(device).requires_grad_()
                loss = nn.functional.cross_entropy(
                    self.model(z), self.labels[part].to(device), reduction="sum"
                )
                found.append(torch.autograd.grad(loss, z)[0].flatten(1).cpu())
        return torch.cat(found)

    def random_signs(self, draw: int) -> Tensor:
        """Clean images moved by eps in a random direction, pixel by pixel, clipped to [0, 1]."""
        generator = torch.Generator().manual_seed(self.seed + 1000 + draw)
        signs = torch.randint(0, 2, self.images.shape, generator=generator) * 2.0 - 1
        return (self.images + signs * self.suite.eps_255 / 255).clamp(0, 1)

    def share(self, count: int | Tensor) -> str:
        """``count`` images as text: "3/40"."""
        return f"{int(count)}/{self.n}"


def _copied(model):
    """A copy of the model; itself where it cannot be copied: its weights are put back after each attack."""
    try:
        copied = copy.deepcopy(model)
    except Exception:  # compiled code and the like refuse in many ways
        return model
    # Copied TorchScript has weights that nothing can be done with.
    return copied if all(weight.is_leaf for weight in copied.parameters()) else model
