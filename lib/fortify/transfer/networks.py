"""Networks for notebook 11: trained as notebooks 2 and 4 train theirs, on what they or an attacker have."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fortify.attacks import PGD, Attack, attacks_over
from fortify.data import Slices
from fortify.models import build_model, predict
from fortify.objectives import OBJECTIVES
from fortify.training import Recipe, fit

LEAST = 30  # slices of an attacker's own, below which no surrogate is trained
_SLOWER = 4  # how much lower the learning rate is that goes on from trained weights
_JUDGED = 4  # one of so many training slices chooses the epoch


@dataclass(frozen=True)
class Regime:
    """How a network is trained: what :func:`fortify.training.fit` takes beside slices."""

    recipe: Recipe
    attacks: Mapping[Attack, float] = field(default_factory=dict)
    val_attack: Attack | None = None
    objective: str = "mix"


def regimes_of(
    baseline: Mapping[str, Any], testing: Mapping[str, Any], hardening: Mapping[str, Any], *, epochs: int = 0
) -> dict[str, Regime]:
    """{"normal", "adversarial"} as the parameters of notebooks 2, 3 and 4 describe them, unchanged.

    ``epochs`` above 0 takes the place of theirs; the schedule is stretched to it.
    """
    changes = {"epochs": epochs} if epochs else {}
    steps, eps_255 = hardening["train_pgd_steps"], hardening["train_eps_255"]
    attacks = {a.name: a for a in attacks_over([eps_255], pgd={"steps": steps})}
    attacks["margin"] = replace(attacks["pgd"], loss="margin")
    shares = {attacks[name]: share for name, share in hardening["train_shares"].items() if share > 0}
    hard = Recipe.from_parameters(baseline, **(hardening["train_recipe"] | changes))
    val_attack = PGD(testing["eps_255"], steps=steps)
    return {
        "normal": Regime(Recipe.from_parameters(baseline, **changes)),
        "adversarial": Regime(hard, shares, val_attack, hardening["objective"]),
    }


def from_trained(regime: Regime, *, eps_255: float) -> Regime:
    """An adversarial ``regime`` as it goes on from a normally trained network: at the budget ``eps_255``,
    with a quarter of the learning rate.

    From nothing and at a large budget, a network can learn to give one answer for all.
    """
    attacks = {replace(attack, eps_255=eps_255): share for attack, share in regime.attacks.items()}
    return replace(regime, recipe=replace(regime.recipe, lr=regime.recipe.lr / _SLOWER), attacks=attacks)


def pair(arch: str, train: Slices, regimes: Mapping[str, Regime], **options: Any) -> dict[str, nn.Module]:
    """{"normal", "adversarial"}: ``arch`` trained normally, and then on under attack (:func:`from_trained`).

    Both keep the epoch that is best on some of their own training slices. On unseen groups, validation can
    prefer an early epoch that gives one answer for all. ``options`` are :func:`trained`'s.
    """
    own = train.subset(range(0, len(train), _JUDGED))
    normal = trained(arch, train, own, regimes["normal"], **options)
    return {
        "normal": normal,
        "adversarial": trained(arch, train, own, regimes["adversarial"], start=normal, **options),
    }


def without_idle(
    models: Mapping[str, nn.Module], images: torch.Tensor
) -> tuple[dict[str, nn.Module], list[str]]:
    """(``models`` that predict more than one class for ``images`` (N, C, H, W), names of the others).

    An attack on a network that gives one answer for all tells nothing. Where all of them do, all are kept.
    """
    idle = [n for n, model in models.items() if predict(model, images).argmax(1).unique().numel() == 1]
    kept = {name: model for name, model in models.items() if name not in idle}
    return kept or dict(models), idle


def trained(
    arch: str,
    train: Slices,
    val: Slices,
    regime: Regime,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    start: nn.Module | None = None,
    checkpoints: str | Path | None = None,
) -> nn.Module:
    """A network ``arch`` in eval mode, trained as ``regime`` says, from the weights of ``start`` if given.

    With ``checkpoints``, a folder, an interrupted call goes on, and a finished one is not made again.
    """
    model = build_model(arch, num_classes=len(train.class_names), weights=weights, seed=seed).to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    options = {"attacks": regime.attacks, "val_attack": regime.val_attack}
    options |= {"objective": OBJECTIVES[regime.objective](), "checkpoints": checkpoints}
    fit(model, train, val, regime.recipe, seed=seed, **options)
    return model


def attackers_share(
    slices: Slices, split: Mapping[str, np.ndarray], *, images: int, seed: int
) -> dict[str, np.ndarray]:
    """Which test slices are attacked, and which an attacker may train a surrogate on: {name: index}.

    ``attacked``: at most ``images`` of one half of the test groups. ``other groups``: validation and the
    other half, without any group that ``split["train"]`` or the attacked half holds, as an attacker has them
    who never saw the target's data. ``same groups``: as many slices of each class from ``split["train"]``,
    in whole groups as far as they fit, which tells fewer slices from other groups. The last two are left
    out where a class is missing or they are fewer than :data:`LEAST`: on a random split nearly every group
    is in training.
    """
    rng, test, groups = np.random.default_rng(seed), np.asarray(split["test"]), slices.groups
    halves = _half_of_groups(slices.labels[test], groups[test], rng)
    attacked = test[halves]
    taken = np.isin(groups, groups[split["train"]]) | np.isin(groups, groups[attacked])
    own = np.concatenate([split["val"], test[~halves]])
    own = np.sort(own[~taken[own]])
    found = {"attacked": np.sort(rng.permutation(attacked)[:images])}
    counts = np.bincount(slices.labels[own], minlength=len(slices.class_names))
    if len(own) < LEAST or (counts == 0).any():
        return found
    train = np.asarray(split["train"])
    place = {group: i for i, group in enumerate(rng.permutation(np.unique(groups[train])))}
    train = train[np.argsort([place[group] for group in groups[train]], kind="stable")]  # group after group
    same = [train[slices.labels[train] == label][:count] for label, count in enumerate(counts)]
    return found | {"other groups": own, "same groups": np.sort(np.concatenate(same))}


def _half_of_groups(labels, groups, rng):
    """Whether each slice is of the first half: whole groups, each class about halved."""
    chosen, filled = np.zeros(len(labels), bool), np.zeros((2, labels.max() + 1))
    for group in rng.permutation(np.unique(groups)):
        own = groups == group
        counts = np.bincount(labels[own], minlength=filled.shape[1])
        part = int((filled[0] * counts).sum() > (filled[1] * counts).sum())
        filled[part] += counts
        chosen[own] = part == 0
    return chosen
