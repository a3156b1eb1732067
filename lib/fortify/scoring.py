"""From a model, images and attacks to rows: one prediction for each image under each attack.

The rows are those of :mod:`fortify.evaluation`, which makes tables of them without any model.
"""

import numpy as np
import pandas as pd

from fortify.evaluation import _DTYPES, ATTACKS, COLUMNS


def score(
    model,
    clean,
    labels,
    *,
    index,
    attack,
    eps_255,
    model_name,
    split,
    seed,
    adversarial=None,
    protocol="adaptive",
):
    """Rows (see ``COLUMNS``) of one attack on one model: what it predicts on ``adversarial``.

    ``clean`` and ``adversarial`` (N, 1, H, W) float in [0, 1]; None scores the clean images themselves.
    ``labels`` and ``index`` (N,) integers, ``index`` being the images' positions in the slices.
    The prediction is float32 and in eval mode, whatever crafted the images.
    Raises ValueError for other shapes, values outside [0, 1] and labels outside the model's classes.
    """
    # Here and below, so that tables can be made from rows without loading torch.
    from fortify.attacks import check_labels, checked, perturbation_norms
    from fortify.models import predict

    clean, labels = checked(clean, labels)
    adversarial = clean if adversarial is None else checked(adversarial, labels)[0]
    linf_255, l2 = perturbation_norms(clean, adversarial)
    if len(index) != len(labels):
        raise ValueError(f"{len(index)} indices for {len(labels)} images")
    probabilities = predict(model, adversarial)
    check_labels(labels, classes=probabilities.shape[1])
    probability, prediction = probabilities.max(1)
    rows = {
        "model": model_name,
        "split": split,
        "seed": seed,
        "attack": attack,
        "protocol": protocol,
        "eps_255": float(eps_255),
        "index": np.asarray(index),
        "label": labels.numpy(),
        "prediction": prediction.numpy(),
        "probability": probability.numpy(),
        "success": (prediction != labels).numpy(),
        "linf_255": linf_255.numpy(),
        "l2": l2.numpy(),
    }
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(_DTYPES)


def evaluate(model, images, labels, attacks, *, index, model_name, split, seed, keep=None, batch_size=64):
    """Craft every attack on ``model`` itself (adaptive) and score it: (rows, kept).

    ``images`` (N, 1, H, W) float in [0, 1], ``labels`` (N,); ``attacks`` from :mod:`fortify.attacks`.
    ``rows`` holds the clean predictions too. ``keep`` maps names to attacks of the list whose images
    are wanted: ``kept`` is then {name: float32 array (N, 1, H, W)}. ValueError for a budget of 0.
    """
    import torch

    from fortify.attacks import checked, craft
    from fortify.fused import Twin
    from fortify.runtime import device_of

    images, labels = checked(images, labels)
    if any(getattr(attack, "eps_255", 1) == 0 for attack in attacks):
        raise ValueError("an attack with eps_255=0 is no attack: the clean rows are there anyway")
    ids = {"index": index, "model_name": model_name, "split": split, "seed": seed}
    rows, kept = [score(model, images, labels, attack="clean", eps_255=0, **ids)], {}
    options = {"seed": seed, "batch_size": batch_size, "progress": True}
    options["twin"] = Twin(model, images[:1].to(device_of(model))).net  # one for all the attacks
    for attack in attacks:
        crafted = craft(model, images, labels, attack, **options)
        eps_255 = getattr(attack, "eps_255", np.nan)  # CW has no budget
        adversarial, about = crafted.images, {"attack": attack.name, "eps_255": eps_255}
        scored = score(model, images, labels, adversarial=adversarial, **about, **ids)
        if np.isnan(eps_255):
            # CW stops on the boundary, where another batch size can round it back: that is a failed CW.
            undone = torch.tensor((~scored.success & scored.l2.gt(0)).to_numpy()).view(-1, 1, 1, 1)
            adversarial = torch.where(undone, images, adversarial)
            scored = score(model, images, labels, adversarial=adversarial, **about, **ids)
        rows.append(scored)
        kept |= {name: adversarial.numpy() for name, wanted in (keep or {}).items() if wanted == attack}
    return pd.concat(rows, ignore_index=True), kept


def score_static(model, images, labels, crafted, *, index, eps_255, model_name, split, seed):
    """Rows of attacks that were crafted on another model (protocol ``static``).

    ``crafted`` maps fgsm, pgd and cw to float32 arrays (N, 1, H, W) made from the same ``images``, FGSM and
    PGD at ``eps_255``. Raises ValueError when they were made from other images or at another budget.
    """
    import torch

    from fortify.attacks import checked, perturbation_norms

    images, labels = checked(images, labels)
    rows = []
    for attack in ATTACKS:
        if attack not in crafted:
            raise ValueError(f"there are no static {attack} images: notebook 03 must keep them")
        adversarial = torch.from_numpy(crafted[attack])
        if adversarial.shape != images.shape:
            raise ValueError(
                f"static {attack} images are {tuple(adversarial.shape)}, the test images "
                f"{tuple(images.shape)}: they come from another split or size; run notebook 03 again."
            )
        budget = np.nan if attack == "cw" else eps_255
        largest = perturbation_norms(images, adversarial)[0].max().item()
        if attack != "cw" and abs(largest - eps_255) > 0.01:
            raise ValueError(
                f"static {attack} images differ from the test images by up to {largest:.4g} grey levels, not "
                f"eps_255={eps_255:g}: run notebook 03 with the same eps_255 and split first."
            )
        ids = {"index": index, "model_name": model_name, "split": split, "seed": seed}
        rows.append(
            score(
                model,
                images,
                labels,
                attack=attack,
                eps_255=budget,
                adversarial=adversarial,
                protocol="static",
                **ids,
            )
        )
    return pd.concat(rows, ignore_index=True)
