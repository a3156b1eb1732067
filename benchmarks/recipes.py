"""Which recipe classifies slices of unseen groups best under attack? Compared on a wide validation alone.

    python benchmarks/recipes.py                                   hours on two cores
    python benchmarks/recipes.py --variants "lungs" --folds 0 1    minutes a row

Each fold of the grouped split gives a fifth of all slices to validation (20 to 25 groups of near-duplicates)
in place of Table 1's tenth: too few groups of the benign class lie in a tenth to choose by. **No test slice
is looked at.** Trains as notebook 4 does, with a profile's parameters but for those of the variant. The epoch
is chosen, as there, on validation slices under attack, so the figures are a little optimistic, all recipes'
alike. Writes benchmarks/recipes.csv, one row a variant and fold, as each is done, then the
section of docs/recipe.md. Pretraining on LIDC nodules takes their folder (see the README of that data) in
FORTIFY_LIDC.
"""

import argparse
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from ablation import profiled, recipe_of
from torch import nn

from fortify.attacks import PGD, craft
from fortify.data import load_folder, to_tensor
from fortify.files import find_root, write_csv
from fortify.models import build_model, predict, save_model
from fortify.objectives import OBJECTIVES
from fortify.runtime import describe_device, pick_device
from fortify.splits import grouped_split
from fortify.training import fit
from fortify.workflow.locks import wait_for_lock
from fortify.workflow.publish import replace_section

WIDE = 0.2  # of all slices: validation
STEPS = 20  # of the PGD that judges, at the profile's budget
NO_ATTACK = dict(fgsm=0.0, pgd=0.0, margin=0.0)
LITE0 = dict(arch="efficientnet_lite0", weights="imagenet")
LUNGS = dict(epochs=27)
FINE = dict(lr=1e-3, epochs=20, mixup=0.0, eps_warmup=0.6)


@dataclass(frozen=True)
class Variant:
    """What differs from a profile."""

    profile: str = "laptop"
    recipe: dict = field(default_factory=dict)  # parts of notebook 4's
    members: int = 1  # networks of as many seeds, whose logits are averaged, and attacked so
    lidc: bool = False  # first trained under attack on LIDC nodules
    objective: str = ""  # in place of the mix of attacks, a name in OBJECTIVES; attacks by PGD alone
    parameters: dict = field(default_factory=dict)  # others of notebook 4


VARIANTS = {
    "whole slices": Variant(),
    "whole slices, half the epochs": Variant(recipe=dict(epochs=18)),
    "lungs, twice the epochs": Variant("lungs", dict(epochs=54)),
    "lungs": Variant("lungs", LUNGS),
    "lungs, strong turns and shifts": Variant("lungs", LUNGS | dict(degrees=17.0, zoom=0.15, translate=0.15)),
    "lungs, logits adjusted": Variant("lungs", LUNGS | dict(logit_adjustment=1.0)),
    "lungs, balanced loss": Variant("lungs", LUNGS | dict(class_balance=0.5)),
    "lungs, three seeds averaged": Variant("lungs", LUNGS, members=3),
    "lungs, first on LIDC": Variant("lungs", LUNGS, lidc=True),
    "lungs, single-step (N-FGSM)": Variant("lungs", LUNGS, objective="n_fgsm"),
    "Lite0, ImageNet, to 4/255, lungs": Variant("lungs", FINE, parameters=LITE0 | dict(train_eps_255=4.0)),
    "Lite0, ImageNet, to 8/255": Variant(recipe=FINE, parameters=LITE0 | dict(train_eps_255=8.0)),
    "Lite0, ImageNet, to 8/255, layer-wise": Variant(
        recipe=FINE | dict(layer_decay=0.8), parameters=LITE0 | dict(train_eps_255=8.0)
    ),
    "Lite0, ImageNet, to 8/255, frozen statistics": Variant(
        recipe=FINE | dict(freeze_batchnorm=True), parameters=LITE0 | dict(train_eps_255=8.0)
    ),
    "Lite0, ImageNet, to 16/255, lungs": Variant("lungs", FINE, parameters=LITE0),
    "Lite0, from scratch, to 8/255": Variant(
        recipe=FINE | dict(lr=4e-3), parameters=LITE0 | dict(train_eps_255=8.0, weights="")
    ),
    "Lite0, ImageNet, no attack, its last layer": Variant(
        recipe=FINE | dict(layer_decay=0.0, freeze_batchnorm=True, lr=3e-3),
        parameters=LITE0 | dict(train_shares=NO_ATTACK),
    ),
    "Lite0, ImageNet, no attack": Variant(recipe=FINE, parameters=LITE0 | dict(train_shares=NO_ATTACK)),
    "whole slices, no attack": Variant(parameters=dict(train_shares=NO_ATTACK)),
}


class Averaged(nn.Module):
    """The mean of several networks' logits."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return torch.stack([member(x) for member in self.members]).mean(0)


def pretrained_on_lidc(root, parameters, size, device):
    """The weights' file of a network trained under attack to tell LIDC's nodules apart; made where absent."""
    path = root / "build" / "recipes" / f"{parameters['arch']}-lidc.safetensors"
    if path.exists():
        return path
    if not os.environ.get("FORTIFY_LIDC"):
        raise SystemExit("set FORTIFY_LIDC to the folder of LIDC nodules with benign/ and malignant/ in it")
    nodules = load_folder(os.environ["FORTIFY_LIDC"], classes=("benign", "malignant"), size=size)
    patients = np.array([Path(name).name.split("_")[0] for name in nodules.names])
    part = grouped_split(nodules.labels, patients, seed=0)
    recipe, attacks, judge = recipe_of(parameters)
    recipe = replace(recipe, epochs=12)
    model = build_model(parameters["arch"], num_classes=2, seed=0).to(device)
    train, val = (nodules.subset(part[name]) for name in ("train", "val"))
    path.parent.mkdir(parents=True, exist_ok=True)
    history = fit(
        model, train, val, recipe, attacks=attacks, val_attack=judge, checkpoints=path.parent / "lidc"
    )
    print(history.to_string(), flush=True)
    save_model(path, model, info={"class_names": nodules.class_names})
    return path


def measure(variant, fold, root, device, precision):
    """Train and judge once: one row."""
    own = VARIANTS[variant]
    parameters, slices = profiled(own.profile)
    parameters = parameters | own.parameters
    parameters["train_recipe"] = parameters["train_recipe"] | own.recipe | {"precision": precision}
    recipe, attacks, judge = recipe_of(parameters)
    options = {"attacks": attacks, "val_attack": judge if attacks else None}
    if own.objective:
        pgd = next(attack for attack in attacks if isinstance(attack, PGD))
        options |= {"attacks": {pgd: 1.0}, "objective": OBJECTIVES[own.objective]()}
    part = grouped_split(slices.labels, slices.groups, seed=fold, val=WIDE)
    train, val = slices.subset(part["train"]), slices.subset(part["val"])
    weights = parameters["weights"] or None
    if own.lidc:
        weights = str(pretrained_on_lidc(root, parameters, slices.images.shape[1], device))
    start, members, epochs = time.perf_counter(), [], []
    for seed in range(fold, fold + 100 * own.members, 100):
        model = build_model(
            parameters["arch"], num_classes=len(train.class_names), weights=weights, seed=seed
        )
        model = model.to(device)
        history = fit(model, train, val, recipe, **options, seed=seed)
        members.append(model)
        epochs.append(int(history[history.selected].epoch.item()))
    row = {"variant": variant, "fold": fold, "training_s": time.perf_counter() - start}
    row |= {
        "arch": parameters["arch"],
        "precision": precision,
        "epochs": recipe.epochs,
        "kept": " ".join(map(str, epochs)),
    }
    model = members[0] if len(members) == 1 else Averaged(members).eval()
    x, y = to_tensor(val.images), torch.as_tensor(val.labels)
    clean = predict(model, x).argmax(1) == y
    attacked = clean & ~craft(model, x, y, PGD(judge.eps_255, steps=STEPS), seed=fold).success
    row |= {"n": len(y), "groups": len(set(val.groups))}
    for name, right in (("clean", clean), ("pgd", attacked)):
        recalls = [right[y == label].float().mean().item() for label in range(len(val.class_names))]
        row |= {name: int(right.sum()), f"balanced_{name}": np.mean(recalls), f"benign_{name}": recalls[0]}
    return row | {"device": describe_device(device)}


def section(table):
    """The page's text."""
    lines = ["| recipe | folds | clean | PGD 4/255 | balanced, clean | benign, clean |"]
    lines.append("|---|---:|---|---|---|---|")
    for variant in (name for name in VARIANTS if name in set(table.variant)):
        own = table[table.variant.eq(variant)]
        cells = [_shown(own[name] / own.n) for name in ("clean", "pgd")]
        cells += [_shown(own[name]) for name in ("balanced_clean", "benign_clean")]
        lines.append(f"| {variant} | {len(own)} | " + " | ".join(cells) + " |")
    text = (
        "Validation slices alone, a fifth of all in each of the grouped split's folds "
        f"({table.groups.min()} to {table.groups.max()} groups); per cent, mean over the folds (range). "
        f"PGD: {STEPS} steps.\n\n"
    )
    return text + "\n".join(lines) + "\n" + choices(table)


def choices(table):
    """What each fold's own validation slices choose under attack, of the recipes that all folds have."""
    whole = table.groupby("variant").filter(lambda own: len(own) == table.fold.nunique())
    if whole.variant.nunique() < 2:
        return ""
    ahead = whole.assign(share=whole.pgd / whole.n).sort_values("share", kind="stable").groupby("fold").last()
    chosen = [
        f"*{variant}* (fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))})"
        for variant, folds in ahead.reset_index().groupby("variant").fold.apply(list).items()
    ]
    of = f"Of the {whole.variant.nunique()} recipes that all folds have, their own validation slices"
    return f"\n{of} under attack choose {', '.join(chosen)}.\n"


def _shown(values):
    values = 100 * values
    spread = f" ({values.min():.0f}–{values.max():.0f})" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    options.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options.add_argument("--precision", default="float32", help="of training: bfloat16 where it is faster")
    arguments = options.parse_args()
    root, device = find_root(), pick_device()
    path = root / "benchmarks" / "recipes.csv"
    for variant in arguments.variants:
        for fold in arguments.folds:
            row = measure(variant, fold, root, device, arguments.precision)
            print(row, flush=True)
            with wait_for_lock(root / "build" / "recipes" / ".lock", what="another recipe"):
                table = pd.DataFrame([row])
                if path.exists():
                    table = pd.concat([pd.read_csv(path), table])
                table = table.drop_duplicates(["variant", "fold"], keep="last")
                write_csv(path, table.sort_values(["variant", "fold"], ignore_index=True))
    replace_section(root / "docs/recipe.md", "recipes", section(pd.read_csv(path)))


if __name__ == "__main__":
    main()
