"""Does cropping to the lungs help? Two published profiles compared, slice by slice.

    python benchmarks/cropped.py             seconds, from paper/tables alone
    python benchmarks/cropped.py --profile paper

Compares the profile that the committed notebooks are of, or the one that is named, with the one on crops that
stands beside it; both test the same slices of the same splits (see `make lungs`). Writes
benchmarks/cropped.csv, a row a split, training and budget, with the interval of a bootstrap that draws whole
groups of near-duplicates, and the section of docs/crop.md.
"""

import argparse

import pandas as pd

from fortify.evaluation import read_rows
from fortify.files import find_root, write_csv
from fortify.intervals import gain_interval
from fortify.workflow.publish import published_folders, replace_section, shown_profile

PAIRS = {"laptop": "lungs", "paper": "paper_lungs"}  # profiles: of whole slices, the same on crops
BUDGETS_255 = (0, 4, 8)  # of PGD; 0: clean
SLICE = ["split", "model", "seed", "index", "name"]


def predictions(tables):
    """Whether each test slice is classified correctly: a row each of split, model, seed, slice, eps_255."""
    names = {
        path.name.split(".")[0]: pd.read_csv(path) for path in (tables / "runs/data/splits").glob("*.gz")
    }
    parts = []
    for path in sorted((tables / "runs").glob("*/*_predictions.csv.gz")):
        rows = read_rows(path)
        rows = rows[rows.protocol.eq("adaptive") & rows.model.isin(["normal", "adversarial"])]
        rows = rows[rows.attack.eq("clean") | rows.attack.eq("pgd") & rows.eps_255.isin(BUDGETS_255)]
        parts.append(rows.assign(name=names[path.parent.name].name.to_numpy()[rows["index"]]))
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(right=rows.prediction.eq(rows.label))[[*SLICE, "eps_255", "right"]]


def compared(whole, cropped, groups):
    """One row a split, training and budget; ``groups`` is {slice's name: group}. Differences in per cent.

    Raises ValueError where the two are not of the same slices.
    """
    keys = [*SLICE, "eps_255"]
    both = whole.merge(cropped, on=keys, suffixes=("_whole", "_cropped"), validate="one_to_one")
    if len(both) != len(whole) or len(both) != len(cropped):
        raise ValueError(
            f"{len(whole)} and {len(cropped)} rows, {len(both)} of the same slices: run both again"
        )
    rows = []
    for (split, model, eps), own in both.groupby(["split", "model", "eps_255"], sort=False):
        more = own.right_cropped.astype(int) - own.right_whole.astype(int)
        low, high = gain_interval(more.to_numpy(), own.name.map(groups).to_numpy())
        row = {"split": split, "model": model, "eps_255": eps, "n": len(own), "whole": own.right_whole.sum()}
        row |= {"cropped": own.right_cropped.sum(), "more_percent": 100 * more.mean()}
        rows.append(row | {"low_percent": 100 * low, "high_percent": 100 * high})
    order = ["split", "model", "eps_255"]
    return pd.DataFrame(rows).sort_values(order, ascending=[False, False, True], ignore_index=True)


def measured(root, profile):
    """:func:`compared` of a profile and the one on crops, from their published rows."""
    folders = [published_folders(root, name)[1] for name in (profile, PAIRS[profile])]
    known = pd.read_csv(folders[0] / "groups.csv").set_index("name").group
    return compared(*map(predictions, folders), known).assign(profile=profile, beside=PAIRS[profile])


def section(table):
    """The page's text."""
    names = [
        "split",
        "training",
        "attack",
        "whole slices",
        "cropped to the lungs",
        "more, in points (95 %, by groups)",
    ]
    lines = ["| " + " | ".join(names) + " |", "|---|---|---|" + " ---: |" * 3]
    for r in table.itertuples():
        attack = f"PGD {r.eps_255:g}/255" if r.eps_255 else "clean"
        read = [f"{100 * k / r.n:.1f} % ({k}/{r.n})" for k in (r.whole, r.cropped)]
        more = f"{r.more_percent:+.1f} ({r.low_percent:+.1f} to {r.high_percent:+.1f})"
        lines.append("| " + " | ".join([r.split, r.model, attack, *read, more]) + " |")
    text = (
        f"Profiles `{table.profile[0]}` and `{table.beside[0]}`, the same slices of the same splits, all "
        "seeds; adaptive attacks. The interval draws whole groups of near-duplicates; it knows nothing of "
        "other trainings.\n"
    )
    return "\n".join(lines) + "\n\n" + text


def main():
    root = find_root()
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--profile", choices=PAIRS)
    profile = options.parse_args().profile or shown_profile(root)
    if profile not in PAIRS:
        options.error(
            f"the committed notebooks are of {profile}, of which there is none on crops; "
            f"name one of {', '.join(PAIRS)}"
        )
    folders = [published_folders(root, name)[1] for name in (profile, PAIRS[profile])]
    if unpublished := [str(f.relative_to(root)) for f in folders if not (f / "runs").is_dir()]:
        options.error(
            f"{' and '.join(unpublished)} holds no runs; `make publish` of that profile puts them there"
        )
    table = measured(root, profile)
    write_csv(root / "benchmarks/cropped.csv", table)
    replace_section(root / "docs/crop.md", "cropped", section(table))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
