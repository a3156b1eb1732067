"""What would the grouped split give if near-duplicates were told more strictly, or less?

    python benchmarks/grouping.py                   CPU: the laptop profile's adversarial training
    python benchmarks/grouping.py --device cuda     GPU: the reference run's

Groups the real slices by several pairs of thresholds of ``fortify.splits.near_duplicate_groups``, the shipped
one among them, and trains and attacks on the five folds of each. Writes benchmarks/grouping_<device>.csv, a
row a fold as it is done, and the section of docs/groups.md. Rows of today's recipe that are there are kept.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import results
import torch
from ablation import BUDGETS_255, STEPS, described, measure, merged, profiled

from fortify.files import find_root, write_csv
from fortify.splits import FOLDS, near_duplicate_groups

SHAPES = {"cpu": "laptop", "cuda": "paper"}  # device: profile
# (threshold, neighbour_threshold), the strictest first; above 1 no correlation links, only identical pixels.
OURS = (0.93, 0.80)  # notebook 1's
KEYS = ("threshold", "neighbour_threshold", "fold")
GROUPINGS = ((0.90, 0.70), OURS, (0.93, 1.0), (0.99, 1.0), (1.1, 1.1))


def missing(table, recipe):
    """[(threshold, neighbour_threshold, fold)] without a row of that recipe."""
    own = table[table.recipe.eq(recipe)]
    done = set(zip(own.threshold, own.neighbour_threshold, own.fold, strict=True))
    return [(*pair, fold) for pair in GROUPINGS for fold in range(FOLDS) if (*pair, fold) not in done]


def row(parameters, slices, device, threshold, neighbour_threshold, fold):
    """One fold of one grouping."""
    groups = near_duplicate_groups(slices, threshold=threshold, neighbour_threshold=neighbour_threshold)
    about = {"threshold": threshold, "neighbour_threshold": neighbour_threshold, "fold": fold}
    about |= {"groups": len(np.unique(groups)), "largest": np.bincount(groups).max()}
    return about | measure(parameters, replace(slices, groups=groups), "grouped", fold, device)


def section(table, device):
    """The page's text on one device, a list of paragraphs."""
    names = ["linked above", "consecutive numbers above", "groups", "largest", "clean"]
    names += [f"PGD {eps}/255" for eps in BUDGETS_255]
    lines = ["| " + " | ".join(names) + " |", "|" + " ---: |" * len(names)]
    for pair in GROUPINGS:
        own = table[table.threshold.eq(pair[0]) & table.neighbour_threshold.eq(pair[1])]
        links = [f"{r:.2f}" if r < 1 else "–" for r in pair]
        shown = [_share(own, column) for column in ("clean", *(f"pgd_{eps}" for eps in BUDGETS_255))]
        groups = f"{own.groups.iloc[0]} (ours)" if pair == OURS else str(own.groups.iloc[0])
        lines.append("| " + " | ".join([*links, groups, str(own.largest.iloc[0]), *shown]) + " |")
    first = table.iloc[0]
    text = (
        f"{first.device}: adversarial training of the `{SHAPES[device]}` profile ({first.arch}, {first.side} "
        f"px), {FOLDS} folds of each grouping: accuracy on the {own.n.sum()} slices in per "
        f"cent. Brackets hold the lowest and the highest fold; they are no interval. PGD: {STEPS} steps. Two "
        "slices share a group if their thumbnails correlate above the first number. For slices of one class "
        "with consecutive file numbers the second, lower number is enough. –: this rule is not used. "
        "Identical slices always share a group.\n"
    )
    return ["\n".join(lines) + "\n", text]


def _share(own, column):
    """Of all folds' slices, with the range of the folds."""
    folds = 100 * own[column] / own.n
    return f"{100 * own[column].sum() / own.n.sum():.1f} ({folds.min():.0f}–{folds.max():.0f})"


def main():
    arguments = results.parser(__doc__, SHAPES).parse_args()
    parameters, slices = profiled(SHAPES[arguments.device])
    device, root = torch.device(arguments.device), find_root()
    path = results.path(root, "grouping", arguments.device)
    about = described(SHAPES[arguments.device], parameters, slices, device)
    there = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*KEYS, "recipe"])
    for fold in missing(there, about["recipe"]):
        new = row(parameters, slices, device, *fold) | about
        print(new, flush=True)
        write_csv(path, merged(path, [new], KEYS))
    results.publish(root, "grouping", arguments.device, pd.read_csv(path))


if __name__ == "__main__":
    main()
