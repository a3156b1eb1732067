"""From a model, images and attacks to rows: one prediction for each image under each attack.

The rows are those of :mod:`fortify.evaluation`, which makes tables of them without any model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fortify.attacks import (
    ATTACKS,
    Adversarial,
    Attack,
    check_labels,
    checked,
    craft,
    perturbation_norms,
    prepared,
)
from fortify.evaluation import COLUMNS, typed
from fortify.models import predict, predict_logits


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Any,
    attacks: Sequence[Attack],
    *,
    index: Sequence[int] | None = None,
    model_name: str = "model",
    split: str = "all",
    seed: int = 0,
    keep: Mapping[str, Attack] | None = None,
    batch_size: int = 64,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Craft every attack on ``model`` itself (adaptive) and score it: (rows, kept).

    ``images`` (N, C, H, W) float in [0, 1], ``labels`` (N,), or a Dataset or DataLoader and None, as in
    :func:`fortify.attacks.craft`; ``attacks`` from :mod:`fortify.attacks`. ``index`` are the images'
    positions in a larger set (default: 0 to N - 1). ``rows`` (``evaluation.COLUMNS``) holds the
    clean predictions too.
    Nothing is attacked that is lost already, as in AutoAttack (Croce & Hein 2020). An image that the model
    misclassifies when clean is not attacked: its row is that of the clean image. A nested attack (PGD)
    meets its budgets from the smallest up, and what one breaks stays broken: a larger budget's row is that of
    the same adversarial image. Accuracy under it therefore never rises with the budget. Under FGSM, a
    single step, it may.
    ``keep`` maps names to attacks of the list whose images are wanted: ``kept`` is then {name: float32 array
    (N, C, H, W)}. An attack with a budget that is kept is crafted on every image, the misclassified ones
    too, and only where that fails is it the image of a smaller budget.
    ValueError for a budget of 0, for keeping an attack that stops early, and as ``craft`` raises.
    """
    images, labels = checked(images, labels)
    if any(getattr(attack, "eps_255", None) == 0 for attack in attacks):
        raise ValueError("an attack with eps_255=0 is no attack: the clean rows are there anyway")
    wanted = dict(keep or {})
    if early := [name for name, attack in wanted.items() if getattr(attack, "stop_early", False)]:
        raise ValueError(f"images to keep are the worst, not the first: stop_early is no option for {early}")
    ids = {"index": range(len(labels)) if index is None else index}
    ids |= {"model_name": model_name, "split": split, "seed": seed}
    fused = prepared(model, images, labels)  # once for all the attacks
    options = {"seed": seed, "batch_size": batch_size, "progress": True, "fused": fused}
    clean = _unattacked(model, images, labels, batch_size=batch_size)
    rows, kept, nested = {}, {}, {}
    for attack in sorted(attacks, key=lambda attack: getattr(attack, "eps_255", 0)):
        names = [name for name, other in wanted.items() if other == attack]
        family = _family(attack) if getattr(attack, "nested", False) else None
        before = nested.get(family, clean)  # what each image has come to without this attack
        whole = bool(names) and not attack.minimum_norm
        chosen = (torch.ones_like(before.success) if whole else ~before.success).nonzero().squeeze(1)
        now = before
        if len(chosen):
            found = craft(model, images, labels, attack, subset=chosen, **options)
            # What fails replaces nothing that succeeded, nor the clean image of a minimum-norm attack.
            better = found.success if attack.minimum_norm else found.success | ~before.success[chosen]
            now = Adversarial(*(part.clone() for part in before))
            for part, new in zip(now, found, strict=True):
                part[chosen[better]] = new[better]
        kept |= {name: now.images.clone().numpy() for name in names}  # the next budget goes on from these
        if whole:
            lost = clean.success.view(-1, 1, 1, 1), *[clean.success] * 3
            now = Adversarial(*map(torch.where, lost, clean, now))
        if family:
            nested[family] = now
        about = {"attack": attack.name, "eps_255": np.nan if attack.minimum_norm else attack.eps_255}
        rows[attack] = _rows(images, now, labels, protocol="adaptive", **about, **ids)
    own = {"attack": "clean", "eps_255": 0, "protocol": "adaptive"}
    rows = [_rows(images, clean, labels, **own, **ids), *(rows[attack] for attack in attacks)]
    return pd.concat(rows, ignore_index=True), kept


def _family(attack):
    """What attacks have in common that differ in their budget alone."""
    settings = vars(attack).items()
    return type(attack), tuple(sorted((name, value) for name, value in settings if name != "eps_255"))


def _unattacked(model, images, labels, *, batch_size):
    """The ``images`` themselves as an attack's result, on the CPU."""
    probabilities = predict(model, images, batch_size=batch_size)
    check_labels(labels, classes=probabilities.shape[1])
    probability, prediction = probabilities.max(1)
    return Adversarial(images, prediction, probability, prediction != labels)


def score(
    model: nn.Module,
    clean: Any,
    labels: Any,
    *,
    attack: str,
    eps_255: float,
    index: Sequence[int] | None = None,
    model_name: str = "model",
    split: str = "all",
    seed: int = 0,
    adversarial: Any = None,
    protocol: str = "adaptive",
    batch_size: int = 64,
) -> pd.DataFrame:
    """Rows (``evaluation.COLUMNS``) of what the model predicts on images that were crafted before.

    ``clean`` and ``adversarial`` (N, C, H, W) float in [0, 1]; None scores the clean images themselves.
    ``labels`` and ``index`` (N,) integers, ``index`` being the images' positions in the slices.
    The prediction is float32 and in eval mode, whatever crafted the images.
    Raises ValueError for other shapes, values outside [0, 1] and labels outside the model's classes.
    """
    clean, labels = checked(clean, labels)
    adversarial = clean if adversarial is None else checked(adversarial, labels)[0]
    found = _unattacked(model, adversarial, labels, batch_size=batch_size)
    about = {"model_name": model_name, "split": split, "seed": seed, "attack": attack, "eps_255": eps_255}
    about |= {"index": range(len(labels)) if index is None else index, "protocol": protocol}
    return _rows(clean, found, labels, **about)


def logits(
    model: nn.Module,
    images: Mapping[str, Any],
    labels: Any,
    *,
    index: Sequence[int] | None = None,
    model_name: str = "model",
    split: str = "all",
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Logits of every slice, clean and attacked, for decisions by scan (:func:`evaluation.scan_decisions`).

    ``images`` maps "clean" and names of attacks to images (N, C, H, W) in [0, 1] of the same slices: those
    that :func:`evaluate` kept, of which every one is attacked, misclassified ones too. Columns: model, split,
    seed, attack, index, label and logit_0 to logit_(C-1), one row per (attack, slice). ValueError as
    :func:`score` raises it.
    """
    parts = []
    for attack, own in images.items():
        own, truth = checked(own, labels)
        found = predict_logits(model, own, batch_size=batch_size).numpy()
        check_labels(truth, classes=found.shape[1])
        at = range(len(truth)) if index is None else index
        if len(at) != len(truth):
            raise ValueError(f"{len(at)} indices for {len(truth)} images")
        about = {"model": model_name, "split": split, "seed": seed, "attack": attack}
        part = pd.DataFrame(about | {"index": np.asarray(at), "label": truth.numpy()})
        parts.append(part.assign(**{f"logit_{c}": found[:, c] for c in range(found.shape[1])}))
    return pd.concat(parts, ignore_index=True)


def _rows(
    clean: Tensor,
    found: Adversarial,
    labels: Tensor,
    *,
    index,
    attack,
    eps_255,
    protocol,
    model_name,
    split,
    seed,
):
    linf_255, l2 = perturbation_norms(clean, found.images)
    if len(index) != len(labels):
        raise ValueError(f"{len(index)} indices for {len(labels)} images")
    rows = {
        "model": model_name,
        "split": split,
        "seed": seed,
        "attack": attack,
        "protocol": protocol,
        "eps_255": float(eps_255),
        "index": np.asarray(index),
        "label": labels.numpy(),
        "prediction": found.predictions.numpy(),
        "probability": found.probabilities.numpy(),
        "success": found.success.numpy(),
        "linf_255": linf_255.numpy(),
        "l2": l2.numpy(),
    }
    return typed(pd.DataFrame(rows, columns=list(COLUMNS)))


def score_static(
    model: nn.Module,
    images: Any,
    labels: Any,
    crafted: Mapping[str, np.ndarray],
    *,
    eps_255: float,
    index: Sequence[int] | None = None,
    model_name: str = "model",
    split: str = "all",
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """Rows of attacks that were crafted on another model (protocol ``static``).

    ``crafted`` maps the name of every attack in :data:`fortify.attacks.ATTACKS` to float32 arrays
    (N, C, H, W) made from the same ``images``, those with a budget at ``eps_255``. Raises ValueError when one
    is missing, or they were made from other images or at another budget.
    """
    images, labels = checked(images, labels)
    rows = []
    for attack, kind in ATTACKS.items():
        if attack not in crafted:
            raise ValueError(f"there are no static {attack} images: notebook 03 must keep them")
        adversarial = torch.from_numpy(crafted[attack])
        if adversarial.shape != images.shape:
            raise ValueError(
                f"static {attack} images are {tuple(adversarial.shape)}, the test images "
                f"{tuple(images.shape)}: they come from another split or size; run notebook 03 again."
            )
        largest = perturbation_norms(images, adversarial)[0].max().item()
        # Nothing is changed where the model has no gradient: that is no other budget.
        if not kind.minimum_norm and largest > 0 and abs(largest - eps_255) > 0.01:
            raise ValueError(
                f"static {attack} images differ from the test images by up to {largest:.4g} grey levels, not "
                f"eps_255={eps_255:g}: run notebook 03 with the same eps_255 and split first."
            )
        about = {"attack": attack, "eps_255": np.nan if kind.minimum_norm else eps_255, "protocol": "static"}
        about |= {"index": index, "model_name": model_name, "split": split, "seed": seed}
        rows.append(score(model, images, labels, adversarial=adversarial, batch_size=batch_size, **about))
    return pd.concat(rows, ignore_index=True)
