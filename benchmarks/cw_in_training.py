"""Which "CW" for the training batch: Foolbox's with few steps, or its margin loss in the Linf ball?

    python benchmarks/cw_in_training.py             phantoms, about six minutes on two cores
    python benchmarks/cw_in_training.py --real      the IQ-OTH/NCCD slices at 112 px

Trains the same network on the same split with thirds of FGSM, PGD and one of the two, and attacks both
alike. Writes benchmarks/cw_in_training.csv, one row per variant and seed, and prints the means.
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import pandas as pd

from fortify.attacks import CW, FGSM, PGD, craft, perturbation_norms
from fortify.augmentation import Augmentation
from fortify.data import load_iq_oth_nccd, to_tensor
from fortify.files import find_root, write_csv
from fortify.models import build_model, predict
from fortify.phantom import phantom_slices
from fortify.runtime import pick_device
from fortify.splits import grouped_split, near_duplicate_groups
from fortify.training import Recipe, fit

VARIANTS = {
    "CW margin in the Linf ball, 4 steps": PGD(4, steps=4, loss="margin"),
    "Foolbox CW, 1 search of 10 steps": CW(binary_search_steps=1, steps=10, stepsize=0.02, initial_const=1.0),
}


def measure(variant, attack, slices, seed, epochs):
    """Train with ``attack`` as the third third; one row of what it cost and what it bought."""
    split = grouped_split(slices.labels, slices.groups, seed=seed)
    train, val, test = (slices.subset(split[part]) for part in ("train", "val", "test"))
    model = build_model("resnet_small", num_classes=3, seed=seed).to(pick_device())
    shares = {FGSM(4): 0.3333, PGD(4, steps=4): 0.3333, attack: 0.3333}
    recipe = Recipe(
        epochs=epochs, batch_size=32, lr=2e-3, augmentation=Augmentation(gamma=0.2, gain=0.1, level=0.04)
    )
    start = time.perf_counter()
    fit(model, train, val, recipe, attacks=shares, val_attack=PGD(4, steps=4), seed=seed)
    seconds = time.perf_counter() - start
    x, y = to_tensor(test.images), test.labels
    crafted = craft(model, x, y, attack).images
    found = craft(model, x, y, CW(binary_search_steps=3, steps=40, stepsize=0.02))
    right = (predict(model, x).argmax(1).numpy() == y) & found.success.numpy()
    return {
        "variant": variant,
        "seed": seed,
        "n": len(y),
        "training_seconds": seconds,
        "crafted_median_linf_255": float(np.median(perturbation_norms(x, crafted)[0])),
        "clean_accuracy": float((predict(model, x).argmax(1).numpy() == y).mean()),
        "pgd20_accuracy_4_255": 1 - craft(model, x, y, PGD(4, steps=20)).success.float().mean().item(),
        "cw_median_l2": float(np.median(perturbation_norms(x, found.images)[1][right])),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", action="store_true", help="the real slices instead of phantoms")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=16)
    arguments = parser.parse_args()
    slices = load_iq_oth_nccd(size=112) if arguments.real else phantom_slices()
    slices = replace(slices, groups=near_duplicate_groups(slices))
    rows = []
    for seed in arguments.seeds:
        for variant, attack in VARIANTS.items():
            rows.append(measure(variant, attack, slices, seed, arguments.epochs))
            print(rows[-1], flush=True)
    path = find_root() / "benchmarks" / "cw_in_training.csv"
    write_csv(path, pd.DataFrame(rows).assign(source=slices.source))
    print(pd.DataFrame(rows).groupby("variant").mean(numeric_only=True).round(3).T.to_string())
    print(path.relative_to(find_root()))


if __name__ == "__main__":
    main()
