"""Attacks that are crafted on one model and shown to another, and how often the other one falls for them.

The attacks follow :class:`fortify.attacks.Attack`, so that :func:`fortify.attacks.craft` runs them. They are
no part of Table 1: on the model itself PGD is the stronger one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import eagerpy as ep
import foolbox as fb
import numpy as np
import pandas as pd
import torch
from foolbox.attacks.gradient_descent_base import normalize_lp_norms
from torch import Tensor, nn
from torch.nn import functional as F

from fortify.attacks import Attack, check_budget, checked, craft, perturbation_norms
from fortify.intervals import cluster_interval, gain_interval
from fortify.models import predict

OTHERS = "all other models"  # the source that leaves the target out
NOISE = "noise"  # the source that is no model


@dataclass(frozen=True)
class Momentum:
    """Momentum iterative FGSM (Dong et al. 2018, arXiv:1710.06081). Linf, from the image itself.

    ``decay`` is what the accumulated gradient keeps of itself at a step; each step is eps / steps long.
    """

    eps_255: float
    steps: int = 20
    decay: float = 1.0
    name: ClassVar[str] = "momentum"
    norm: ClassVar[str] = "linf"
    minimum_norm: ClassVar[bool] = False

    def __post_init__(self):
        check_budget(self.eps_255)
        if self.steps < 1 or not self.decay >= 0:
            raise ValueError(f"steps >= 1 and decay >= 0, not {self.steps!r} and {self.decay!r}")

    def foolbox(self) -> fb.attacks.Attack:
        return _MIFGSM(self)


@dataclass(frozen=True)
class InputDiverse(Momentum):
    """:class:`Momentum` whose gradients are of resized images (DI-FGSM, Xie et al. 2019, arXiv:1803.06978).

    In a share ``diversity`` of the steps the batch is shrunk to a side of at least ``smallest`` of its own
    and put somewhere on black. The source there was enlarged; here the network keeps its size.
    """

    diversity: float = 0.7
    smallest: float = 0.85
    name: ClassVar[str] = "input diversity"

    def __post_init__(self):
        super().__post_init__()
        if not (0 <= self.diversity <= 1 and 0 < self.smallest <= 1):
            raise ValueError(f"shares in 0..1 are needed, not {self.diversity!r} and {self.smallest!r}")


class _MIFGSM(fb.attacks.LinfMomentumIterativeFastGradientMethod):
    """Foolbox's loop. It accumulates the gradients' signs; Dong et al. accumulate gradients of L1 norm 1."""

    def __init__(self, attack):
        super().__init__(momentum=attack.decay, rel_stepsize=1 / attack.steps, steps=attack.steps)
        self.diversity = getattr(attack, "diversity", 0.0)
        self.smallest = getattr(attack, "smallest", 1.0)

    def normalize(self, gradients, *, x, bounds):
        return normalize_lp_norms(gradients, p=1)

    def get_loss_fn(self, model, labels):
        loss = super().get_loss_fn(model, labels)
        if not self.diversity:
            return loss
        return lambda x: loss(ep.astensor(_diverse(x.raw, self.diversity, self.smallest)))


def _diverse(x, share, smallest):
    """The batch, or in that ``share`` of calls shrunk and put somewhere on black."""
    side = x.shape[-1]
    if torch.rand(()) >= share:
        return x
    own = int(torch.randint(int(np.ceil(smallest * side)), side + 1, ()))
    top, left = (int(torch.randint(0, side - own + 1, ())) for _ in range(2))
    small = F.interpolate(x, (own, own), mode="bilinear", align_corners=False)
    return F.pad(small, (left, side - own - left, top, side - own - top))


class Ensemble(nn.Module):
    """Several classifiers as one: the mean of their logits (Dong et al. 2018, section 3.4)."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in self.models]).mean(0)


def random_signs(images: Tensor, *, eps_255: float, seed: int) -> Tensor:
    """The control: ``images`` (N, C, H, W) with every pixel moved by ``eps_255`` up or down at random.

    No attack of that Linf budget has more L2, but for what stops at black and white.
    """
    check_budget(eps_255)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, images.shape, generator=generator) * 2.0 - 1
    return (images + eps_255 / 255 * signs).clamp(0, 1)


def transferred(
    models: Mapping[str, nn.Module],
    images: Any,
    labels: Any,
    attacks: Sequence[Attack],
    *,
    surrogates: Mapping[str, nn.Module] | None = None,
    ensemble_attacks: Sequence[Attack] = (),
    index: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Each model's predictions on what was crafted on each of them: one row per (source, attack, target,
    image).

    ``models`` {name: classifier} are sources and targets, ``surrogates`` sources alone. ``images`` (N, C, H,
    W) float in [0, 1] and ``labels`` (N,) as in :func:`fortify.attacks.craft`; all attacks are of one Linf
    budget. With ``ensemble_attacks`` the :class:`Ensemble` of all ``models`` but the target is a source too
    (:data:`OTHERS`), and noise of the same Linf is one in any case (:data:`NOISE`).

    Columns: source, attack, target, index, label, ``both`` (source and target classify the clean image
    correctly; of noise the target alone), ``fooled`` (the target misclassifies the attacked one), linf_255,
    l2. What a source misclassifies when clean is not attacked and has no rows.
    ValueError where the attacks have no or several budgets, or a name is both a model and a surrogate.
    """
    images, labels = checked(images, labels)
    index = np.arange(len(labels)) if index is None else np.asarray(index)
    surrogates = dict(surrogates or {})
    budgets = {getattr(attack, "eps_255", None) for attack in (*attacks, *ensemble_attacks)}
    if len(budgets) != 1 or None in budgets:
        raise ValueError(f"the attacks must have one Linf budget, not {budgets}")
    if taken := {*models} & {*surrogates} | {*models, *surrogates} & {OTHERS, NOISE}:
        raise ValueError(f"each source needs a name of its own: {', '.join(sorted(taken))}")
    right = {name: _right(model, images, labels, batch_size) for name, model in models.items()}
    rows = []

    def seen(source, attack, targets, chosen, attacked):
        linf, l2 = perturbation_norms(images[chosen], attacked)
        for name in targets:
            fooled = ~_right(models[name], attacked, labels[chosen], batch_size)
            about = {"source": source, "attack": attack, "target": name, "index": index[chosen]}
            values = {"label": labels[chosen], "both": right[name][chosen], "fooled": fooled}
            values |= {"linf_255": linf, "l2": l2}
            rows.append(pd.DataFrame(about | {name: value.numpy() for name, value in values.items()}))

    def attack_with(source, model, these, targets):
        chosen = _right(model, images, labels, batch_size).nonzero().squeeze(1)
        for attack in these if len(chosen) else ():
            options = {"subset": chosen, "seed": seed, "batch_size": batch_size}
            seen(source, attack.name, targets, chosen, craft(model, images, labels, attack, **options).images)

    for name, model in (dict(models) | surrogates).items():
        attack_with(name, model, attacks, models)
    if len(models) > 1:
        for target in models if ensemble_attacks else ():
            others = Ensemble([model for name, model in models.items() if name != target])
            attack_with(OTHERS, others, ensemble_attacks, [target])
    noisy = random_signs(images, eps_255=budgets.pop(), seed=seed)
    seen(NOISE, NOISE, models, torch.arange(len(labels)), noisy)
    return pd.concat(rows, ignore_index=True)


def _right(model, images, labels, batch_size):
    return predict(model, images, batch_size=batch_size).argmax(1) == labels


def transfer_table(rows: pd.DataFrame, groups: Sequence[Any]) -> pd.DataFrame:
    """How often each target falls for each source: a row per (source, attack, target) of :func:`transferred`.

    Counted on the images that source and target both classify correctly: ``k`` of ``n``, ``accuracy`` k / n,
    the share that fools the target, with the 95 % interval ``low``, ``high`` of a bootstrap that draws whole
    groups of ``groups``, the group (N,) of every slice (:func:`fortify.intervals.cluster_interval`); NaN
    where n is 0. ``linf_255`` and ``l2`` are medians over them. ``white_box``: the source is the target.
    """
    table = []
    for (source, attack, target), own in rows.groupby(["source", "attack", "target"], sort=False):
        own = own[own.both]
        row = {"source": source, "attack": attack, "target": target, "white_box": source == target}
        row |= {"k": int(own.fooled.sum()), "n": len(own), "accuracy": np.nan, "low": np.nan, "high": np.nan}
        if len(own):
            row["accuracy"] = own.fooled.mean()
            interval = cluster_interval(own.fooled.to_numpy(bool), np.asarray(groups)[own["index"]])
            row["low"], row["high"] = interval
        table.append(row | {"linf_255": own.linf_255.median(), "l2": own.l2.median()})
    return pd.DataFrame(table)


def pooled_transfer(rows: pd.DataFrame, groups: Sequence[Any]) -> pd.DataFrame:
    """:func:`transferred`'s rows pooled over targets: a row per attack and what it was crafted on.

    ``crafted_on`` is "the target itself", "another network", or a source that is no target, by its name.
    ``k`` of ``n``, ``accuracy`` (the share that fools the target), ``low`` and ``high`` as in
    :func:`transfer_table`, the interval by groups over all pairs; ``l2`` is the median. ``more``,
    ``more_low`` and ``more_high``: how much larger the share is than noise's on the same targets and images,
    95 % by groups; NaN for noise itself.
    """
    kind = np.where(rows.source.eq(rows.target), "the target itself", "another network")
    kind = np.where(rows.source.isin(rows.target), kind, rows.source)
    pooled = rows.assign(target="", source=kind)
    table = transfer_table(pooled, groups).rename(columns={"source": "crafted_on"})
    table = table[["crafted_on", "attack", "k", "n", "l2", "accuracy", "low", "high"]]
    noise = rows[rows.source.eq(NOISE)].set_index(["target", "index"]).fooled.astype(int)
    more = rows.fooled.astype(int) - noise.loc[list(zip(rows.target, rows["index"], strict=True))].to_numpy()
    gains = []
    for line in table.itertuples():
        own = rows.both & (kind == line.crafted_on) & rows.attack.eq(line.attack)
        if line.crafted_on == NOISE or not own.any():
            gains.append((np.nan,) * 3)
            continue
        ends = gain_interval(more[own].to_numpy(), np.asarray(groups)[rows["index"][own]])
        gains.append((more[own].mean(), *ends))
    return table.assign(**dict(zip(("more", "more_low", "more_high"), zip(*gains, strict=True), strict=True)))
