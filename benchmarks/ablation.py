"""What each part of the training recipe is for: changed one at a time, on five folds of the grouped split.

    python benchmarks/ablation.py                    the laptop profile's recipe: minutes a row on two cores
    python benchmarks/ablation.py --profile paper    the reference run's, on a GPU
    python benchmarks/ablation.py --variants "8/255, a quarter clean" --splits random --seeds 0

Trains on the real slices as notebook 4 does, with the profile's parameters but for those of the variant, and
attacks the test set with PGD. Variants are compared by their validation accuracy under attack, which is what
a recipe may be chosen by; the test columns say what that choice was worth. Writes
benchmarks/ablation_<profile>.csv, one row a variant, split and seed, as each is done, then its section of
docs/recipe.md and benchmarks/chosen_<profile>.csv, the rows that each fold would have chosen by itself.
A variant's earlier rows of the same splits and seeds are replaced, all others kept; ``recipe`` is a digest of
what a row was trained with, so that a row of another recipe than today's is found out.
"""

import argparse
import hashlib
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from fortify.attacks import FGSM, PGD, craft
from fortify.data import load_iq_oth_nccd, to_tensor
from fortify.files import find_root, write_csv
from fortify.models import build_model, predict
from fortify.regions import crop_to_lungs
from fortify.runtime import describe_device, pick_device
from fortify.splits import grouped_split, near_duplicate_groups, random_split
from fortify.training import Recipe, fit
from fortify.workflow.profiles import load_profile, with_inherited
from fortify.workflow.publish import replace_section

# Parts of the recipe.
TURNS = dict(degrees=7.0, zoom=0.08, translate=0.06)
LITTLE = dict(degrees=3.0, zoom=0.03, translate=0.02, gamma=0.1, gain=0.05, level=0.02, noise=0.0)
STRONG = dict(gamma=0.6, gain=0.3, level=0.15, noise=0.04, blur=0.5, cutout=0.2)
# The share of the epochs over which the budget grows; at 1 it is whole in the last epoch alone.
EARLY, EARLIER, SLOWLY = dict(eps_warmup=0.3), dict(eps_warmup=0.2), dict(eps_warmup=1.0)
SHORT, LONGER, LONGEST = dict(epochs=1 / 2), dict(epochs=2 / 3), dict(epochs=1.0)  # of the profile's
MIXUP = dict(mixup=0.6667)  # of the epochs
HALF, FASTER = dict(lr=0.5), dict(lr=1.0)  # of the profile's
# In bfloat16, as they train on a GPU: in float32 a row takes hours on two cores.
BFLOAT16 = dict(precision="bfloat16")
# Shares of the batch.
THIRDS = dict(fgsm=0.3333, pgd=0.3333, margin=0.3333)
PGD_ALONE = dict(fgsm=0.0, pgd=1.0, margin=0.0)
NO_ATTACK = dict(fgsm=0.0, pgd=0.0, margin=0.0)


def at(train_eps_255, clean_share, *, shares=THIRDS, arch=None, **more):
    """What a variant sets: all that the names tell apart, so that no default changes their sense."""
    recipe = dict(clean_share=clean_share, class_balance=0.0, mixup=0.0) | EARLY | SHORT | HALF | more
    said = dict(train_eps_255=train_eps_255, train_shares=shares, train_recipe=recipe)
    return said | (dict(arch=arch) if arch else {})


VARIANTS = {  # the rest is the profile's
    "4/255, a quarter clean": at(4.0, 0.25),
    "8/255, a quarter clean": at(8.0, 0.25),
    "12/255, a quarter clean": at(12.0, 0.25),
    "16/255, a quarter clean": at(16.0, 0.25),
    "16/255, a quarter clean, slowly, longer": at(16.0, 0.25, **SLOWLY, **LONGER),
    "8/255, a quarter clean, longer, faster": at(8.0, 0.25, **LONGER, **FASTER),
    "16/255, a quarter clean, longer, faster": at(16.0, 0.25, **LONGER, **FASTER),
    "16/255, a quarter clean, longest, faster": at(16.0, 0.25, **LONGEST, **FASTER, **EARLIER),
    "16/255, a quarter clean, longest, faster, mixup": at(
        16.0, 0.25, **LONGEST, **FASTER, **EARLIER, **MIXUP
    ),
    "24/255, a quarter clean, longer, faster": at(24.0, 0.25, **LONGER, **FASTER),
    "4/255, none clean": at(4.0, 0.0),
    "8/255, none clean": at(8.0, 0.0),
    "4/255, all clean, class weights": at(4.0, 1.0, class_balance=1.0),
    "4/255, PGD alone, none clean, strong window and level": at(4.0, 0.0, shares=PGD_ALONE, **STRONG),
    "8/255, a quarter clean, turns and shifts too": at(8.0, 0.25, **TURNS),
    "8/255, a quarter clean, little augmentation": at(8.0, 0.25, **LITTLE),
    "8/255, a quarter clean, no moving average": at(8.0, 0.25, ema=0.0),
    "8/255, a quarter clean, whole budget at once": at(8.0, 0.25, eps_warmup=0.0),
    "no attack, augmented alike": at(4.0, 1.0, shares=NO_ATTACK),
    "ResNet-18, 16/255, a quarter clean, longest": at(
        16.0, 0.25, arch="resnet18", **LONGEST, **EARLIER, **BFLOAT16
    ),
    "ResNet-50, 16/255, a quarter clean, longest": at(
        16.0, 0.25, arch="resnet50", **LONGEST, **EARLIER, **BFLOAT16
    ),
}
BUDGETS_255 = (2, 4, 8)  # of the attacks on the test set
STEPS = 20


def changed(parameters, variant):
    """A profile's parameters of notebook 4, changed as the variant says, epochs and lr by a factor."""
    own = VARIANTS[variant]
    recipe = own["train_recipe"]
    scaled = {"epochs": max(1, round(recipe["epochs"] * parameters["epochs"]))}
    scaled |= {"lr": recipe["lr"] * parameters["lr"]}
    return parameters | own | {"train_recipe": parameters["train_recipe"] | recipe | scaled}


def recipe_of(p):
    """(Recipe, attacks with their shares, the attack on the validation set) of notebook 4's parameters."""
    recipe = Recipe.from_parameters(p, **p["train_recipe"])
    pgd, judge = (PGD(p[name], steps=p["train_pgd_steps"]) for name in ("train_eps_255", "eps_255"))
    attacks = {"fgsm": FGSM(pgd.eps_255), "pgd": pgd, "margin": replace(pgd, loss="margin")}
    return recipe, {attacks[name]: share for name, share in p["train_shares"].items() if share > 0}, judge


def digest(parameters):
    """12 hex digits of everything a row is trained and chosen by, the library's defaults too.

    A part of the recipe that is 0 is left out, so that a new part leaves the rows without it as they are.
    """
    recipe, attacks, judge = recipe_of(parameters)
    parts = vars(recipe) | {"augmentation": None} | vars(recipe.augmentation)
    parts["scale"] = parts.pop("zoom")  # its name in the first rows
    parts["layer_decay"] %= 1  # 1, every layer alike, is what the first rows have
    attacked = [{_Named(attack): share for attack, share in attacks.items()}, _Named(judge)]
    everything = repr((parameters["arch"], sorted(item for item in parts.items() if item[1]), attacked))
    return hashlib.sha256(everything.encode()).hexdigest()[:12]


class _Named:
    """An attack by the parts that it had in the first rows, and any later one that is not 0."""

    def __init__(self, attack):
        self.attack = attack

    def __repr__(self):
        first = ("eps_255", "steps", "rel_stepsize", "random_start", "restarts", "loss")
        own = {name: value for name, value in vars(self.attack).items() if name in first or value}
        return f"{type(self.attack).__name__}({', '.join(f'{k}={v!r}' for k, v in own.items())})"


def parameters_of(name):
    """The parameters of every notebook in a profile, with those that it takes from others."""
    root = find_root()
    notebooks = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    return with_inherited(
        load_profile(root / "notebooks" / "profiles" / f"{name}.yaml", notebooks), notebooks
    )


def profiled(name):
    """(notebook 4's parameters in a profile, the real slices at its size with their groups)."""
    profile = parameters_of(name)
    data = profile["01_data"]
    slices = load_iq_oth_nccd(size=data["size"])
    groups = near_duplicate_groups(slices)  # of whole slices, as notebook 1 makes them
    if data["crop"] == "lungs":
        larger = load_iq_oth_nccd(size=2 * data["size"])
        slices = replace(slices, images=crop_to_lungs(larger.images, size=data["size"])[0])
    return profile["04_adversarial_training"], replace(slices, groups=groups)


def described(profile, parameters, slices, device):
    """What a row says of the run that it is of, for benchmarks of a profile's own recipe."""
    about = {"profile": profile, "arch": parameters["arch"], "recipe": digest(parameters)}
    about |= {"epochs": recipe_of(parameters)[0].epochs, "side": slices.images.shape[1]}
    return about | {"device": describe_device(torch.device(device)), "torch": torch.__version__}


def sides(slices, split, seed):
    """The training, validation and test slices of a split."""
    parts = (
        random_split(slices.labels, seed=seed)
        if split == "random"
        else grouped_split(slices.labels, slices.groups, seed=seed)
    )
    return [slices.subset(parts[name]) for name in ("train", "val", "test")]


def trained(parameters, train, val, seed, device):
    """(model, history), trained as notebook 4 does; without attacks as notebook 2."""
    recipe, attacks, judge = recipe_of(parameters)
    model = build_model(parameters["arch"], num_classes=len(train.class_names), seed=seed).to(device)
    judge = judge if attacks else None
    return model, fit(model, train, val, recipe, attacks=attacks, val_attack=judge, seed=seed)


def measure(parameters, slices, split, seed, device):
    """Train and attack once: one row."""
    train, val, test = sides(slices, split, seed)
    start = time.perf_counter()
    model, history = trained(parameters, train, val, seed, device)
    row, judge = {"training_s": time.perf_counter() - start}, recipe_of(parameters)[2]
    x, y = to_tensor(val.images), val.labels
    row["val_clean"] = history[history.selected].val_accuracy.item()
    row["val_pgd"] = 1 - craft(model, x, y, judge, seed=seed).success.float().mean().item()
    x, y = to_tensor(test.images), test.labels
    right = predict(model, x).argmax(1).numpy() == y
    row |= {"n": len(y), "clean": int(right.sum())}
    row["balanced_clean"] = np.mean([right[y == label].mean() for label in np.unique(y)])
    for eps in BUDGETS_255:
        row[f"pgd_{eps}"] = int((~craft(model, x, y, PGD(eps, steps=STEPS), seed=seed).success).sum())
    return row


def merged(path, rows, keys=("variant", "split", "seed")):
    """The file's rows and ``rows``, which replace those of the same ``keys``; sorted by these."""
    table, keys = pd.DataFrame(rows), list(keys)
    if path.exists():
        table = pd.concat([pd.read_csv(path), table])
    order = {name: i for i, name in enumerate(VARIANTS)}
    table = table.drop_duplicates(keys, keep="last")
    return table.sort_values(
        keys, key=lambda c: c.map(order) if c.name == "variant" else c, ignore_index=True
    )


def summary(table):
    """Means over the splits' seeds in per cent, with the range of each: one row a split and variant."""
    share = table.assign(
        **{name: table[name] / table.n for name in ("clean", *(f"pgd_{e}" for e in BUDGETS_255))}
    )
    columns = ["val_clean", "val_pgd", "clean", "balanced_clean", *(f"pgd_{e}" for e in BUDGETS_255)]

    def shown(values):
        mean = f"{100 * values.mean():.1f}"
        return mean if len(values) == 1 else f"{mean} ({100 * values.min():.0f}–{100 * values.max():.0f})"

    made = share.groupby(["split", "variant"], sort=False)[columns].agg(shown)
    made.insert(0, "splits", share.groupby(["split", "variant"], sort=False).size())
    return made.reset_index()


def chosen_fold_by_fold(table):
    """The grouped split's row of each seed that its own validation slices choose, attacked; clean at a tie.

    Of the first row's architecture and the variants that all its seeds have; none where there is no choice
    or but one seed. A seed's validation slices and test slices share no group, so that these rows' test
    figures owe nothing to the choice among variants.
    """
    own = table[table.split.eq("grouped") & table.arch.eq(table.arch.iloc[0])]
    everywhere = own.groupby("variant").seed.transform("nunique") == own.seed.nunique()
    own = own[everywhere]
    if own.seed.nunique() < 2 or own.variant.nunique() < 2:
        return own.head(0)
    return own.sort_values(["val_pgd", "val_clean"]).groupby("seed").tail(1).sort_values("seed")


def sections(root):
    """The page's section: of every profile that has been measured."""
    parts = []
    for path in sorted((root / "benchmarks").glob("ablation_*.csv")):
        profile = path.stem.removeprefix("ablation_")
        shipped = digest(parameters_of(profile)["04_adversarial_training"])
        parts.append(section(pd.read_csv(path), profile, shipped))
    return "\n".join(parts)


def section(table, profile, shipped):
    """The page's text on a profile; ``shipped`` is the :func:`digest` of its recipe."""
    names = {"val_clean": "val. clean", "val_pgd": "val. PGD", "balanced_clean": "balanced"}
    names |= {f"pgd_{e}": f"PGD {e}/255" for e in BUDGETS_255}
    first, long = table.iloc[0], table.variant.str.extract("(longer|longest)", expand=False)
    longer = "".join(f", *{name}*: {epochs.iloc[0]}" for name, epochs in table.epochs.groupby(long))
    shown = summary(table).rename(columns=names)
    own = set(table.variant[table.recipe.eq(shipped)])
    shown.variant = [f"**{name}** (shipped)" if name in own else name for name in shown.variant]
    lines = ["| " + " | ".join(shown.columns) + " |", "|" + "---|" * len(shown.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in shown.itertuples(index=False)]
    others = sorted(set(table.arch) - {first.arch})
    networks = f" {' and '.join(others)} in place of {first.arch}: trained in bfloat16." if others else ""
    share = f"{100 * MIXUP['mixup']:.0f} %"
    mixed = table.variant.str.contains("mixup").any()
    mixed = f" *Mixup*: images are mixed in the first {share} of the epochs." if mixed else ""
    text = (
        f"The `{profile}` profile's recipe ({first.arch}, {first.side} px, {first.device}) with parts "
        "changed; accuracy in per cent, mean (range) over the seeds. A seed is other weights and another "
        f"split; the grouped one's seeds 0 to 4 are five folds. {table.epochs.min()} epochs{longer}. "
        f"*Faster*: twice the learning rate.{mixed} The budget grows over the first "
        f"{100 * EARLY['eps_warmup']:.0f} % of the epochs (*longest*: {100 * EARLIER['eps_warmup']:.0f} %), "
        f"*slowly*: to the last. PGD: {STEPS} steps; "
        f"validation: {first.val_attack}.{networks}\n"
    )
    return text + "\n" + "\n".join(lines) + "\n" + _fold_by_fold(table)


def _fold_by_fold(table):
    """The page's paragraph on :func:`chosen_fold_by_fold`; none where that has no rows."""
    rows = chosen_fold_by_fold(table)
    if rows.empty:
        return ""

    def of(column):
        k, n = rows[column].sum(), rows.n.sum()
        return f"{100 * k / n:.1f} % ({k}/{n})"

    attacked = ", ".join(f"{of(f'pgd_{eps}')} at {eps}/255" for eps in BUDGETS_255)
    return (
        "\nHad each fold of the grouped split taken the variant that its own attacked validation slices "
        f"choose ({rows.variant.nunique()} different ones), whatever the other folds prefer, it would "
        f"classify {of('clean')} of the clean test slices correctly and, under PGD, {attacked}. What "
        "variants there are was decided with all folds in view.\n"
    )


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--profile", default="laptop")
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    options.add_argument("--splits", nargs="+", choices=("grouped", "random"), default=["grouped", "random"])
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = options.parse_args()
    root = find_root()
    parameters, slices = profiled(arguments.profile)
    side, device = slices.images.shape[1], pick_device()
    path = root / "benchmarks" / f"ablation_{arguments.profile}.csv"
    for variant in arguments.variants:
        for split in arguments.splits:
            for seed in arguments.seeds:
                own = changed(parameters, variant)
                row = {"variant": variant, "split": split, "seed": seed, "arch": own["arch"], "side": side}
                row |= {
                    "recipe": digest(own),
                    "epochs": recipe_of(own)[0].epochs,
                    "device": describe_device(device),
                }
                row["val_attack"] = f"PGD-{own['train_pgd_steps']} at {own['eps_255']:g}/255"
                row |= measure(own, slices, split, seed, device)
                print(row, flush=True)
                write_csv(path, merged(path, [row]))
    table = pd.read_csv(path)
    write_csv(path.with_name(f"chosen_{arguments.profile}.csv"), chosen_fold_by_fold(table))
    replace_section(root / "docs/recipe.md", "ablation", sections(root))
    print(summary(table).to_string(index=False))
    print(path.relative_to(root))


if __name__ == "__main__":
    main()
