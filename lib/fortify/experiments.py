"""Experiments that no notebook repeats: hours of training on real slices, kept as rows in ``benchmarks/``.

Each file was made by the script of its name there. Notebook 10 reads them, shows a short table of each and
writes their rows to ``tables/``, from where the paper takes its numbers.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

# What each asks; the script is benchmarks/<name>.py, and ablation.py makes "chosen" too.
QUESTIONS = {
    "ablation": "what is each part of adversarial training's recipe for?",
    "chosen": "which recipe would each fold have chosen by its own validation slices?",
    "grouping": "how much depends on what counts as a group of near-duplicates?",
    "cropped": "what changes when only the lungs are shown?",
    "recipes": "which recipe is best on a wide validation set?",
    "cw_in_training": "what does Foolbox's CW give in training?",
}
_MOST = 8  # lines of a table that is shown


def experiment_files(root: str | Path, profile: str) -> dict[str, Path]:
    """{name of an experiment: its file below ``root``, a checkout}, in the order of :data:`QUESTIONS`.

    Of the recipe's parts those of ``profile``, where they were measured, else the laptop profile's; of
    groupings those measured on a GPU for the ``paper`` profile, where they were, else on a CPU.
    """
    folder = Path(root) / "benchmarks"
    of_profile = profile if (folder / f"ablation_{profile}.csv").exists() else "laptop"
    device = "cuda" if profile == "paper" and (folder / "grouping_cuda.csv").exists() else "cpu"
    ends = {"ablation": f"_{of_profile}", "chosen": f"_{of_profile}", "grouping": f"_{device}"}
    return {name: folder / f"{name}{ends.get(name, '')}.csv" for name in QUESTIONS}


def read_experiments(root: str | Path, profile: str) -> dict[str, pd.DataFrame]:
    """{name: rows} of :func:`experiment_files`; those of a recipe's parts say the ``profile`` they are of."""
    found = {}
    for name, path in experiment_files(root, profile).items():
        found[name] = pd.read_csv(path)
        if name in ("ablation", "chosen"):
            found[name]["profile"] = path.stem.rpartition("_")[2]
    return found


def origins(root: str | Path, profile: str) -> pd.DataFrame:
    """What the files are: a line an experiment with its question, script, file and number of rows."""
    lines = []
    for name, path in experiment_files(root, profile).items():
        script = f"benchmarks/{'ablation' if name == 'chosen' else name}.py"
        about = {"experiment": name, "question": QUESTIONS[name], "made by": script}
        lines.append(about | {"rows of": path.name, "rows": len(pd.read_csv(path))})
    return pd.DataFrame(lines)


def short_tables(experiments: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """{caption: display table} of what :func:`read_experiments` returns, each of at most eight lines."""
    whole = experiments["grouping"].n.groupby(experiments["grouping"].groups).sum().max()
    return {
        "Parts of the recipe: accuracy (%) on unseen groups, mean over the five folds and their range; the "
        "recipes that validation under attack prefers.": _ablation(
            experiments["ablation"], experiments["chosen"]
        ),
        f"Grouping: the same recipe on five folds of other groups; accuracy (%) on {whole} slices, range of "
        "the folds.": _grouping(experiments["grouping"]),
        "Cropped to the lungs, adversarial training: slices classified correctly, and points more with a "
        "95 % interval by groups.": _cropped(experiments["cropped"]),
        "Recipes on wide validation sets, no test slice: accuracy (%), mean over the folds.": _recipes(
            experiments["recipes"]
        ),
        "CW in training, on phantoms: its margin as a loss, or Foolbox's attack.": _cw(
            experiments["cw_in_training"]
        ),
    }


def _ablation(table, chosen):
    own = table[table.split.eq("grouped")]
    own = own[own.groupby("variant").seed.transform("nunique").eq(own.seed.nunique())]
    order = own.groupby("variant").val_pgd.mean().sort_values(ascending=False).index
    parts = [(name, own[own.variant.eq(name)]) for name in order[: _MOST - 1]]
    lines = []
    for name, part in [*parts, ("each fold's own choice", chosen)]:
        line = {"recipe": name, "validation, PGD": _spread(part.val_pgd)}
        for column, words in (("clean", "clean"), ("pgd_4", "PGD 4/255"), ("pgd_8", "PGD 8/255")):
            line[words] = _spread(part[column] / part.n)
        lines.append(line)
    return pd.DataFrame(lines)


def _grouping(table):
    lines = []
    for groups, own in table.groupby("groups"):
        line = {"groups": groups, "slices in the largest": own.largest.iloc[0]}
        for column, words in (("clean", "clean"), ("pgd_4", "PGD 4/255"), ("pgd_8", "PGD 8/255")):
            line[words] = f"{100 * own[column].sum() / own.n.sum():.0f}{_range(own[column] / own.n)}"
        lines.append(line)
    return pd.DataFrame(lines)


def _cropped(table):
    lines = []
    for row in table[table.model.eq("adversarial")].head(_MOST).itertuples():
        attack = f"PGD {row.eps_255:g}/255" if row.eps_255 else "clean"
        more = f"{row.more_percent:+.0f} ({row.low_percent:+.0f} to {row.high_percent:+.0f})"
        line = {"split": row.split, "attack": attack, "slices": row.n, "whole": row.whole}
        lines.append(line | {"cropped": row.cropped, "points more": more})
    return pd.DataFrame(lines)


def _recipes(table):
    lines = []
    for name, own in table.groupby("variant", sort=False):
        line = {"recipe": name, "folds": own.fold.nunique()}
        for column, words in (("clean", "clean"), ("pgd", "PGD 4/255")):
            line[words] = _spread(own[column] / own.n)
        line |= {"balanced, clean": _spread(own.balanced_clean), "benign, clean": _spread(own.benign_clean)}
        lines.append(line)
    return pd.DataFrame(lines[:_MOST])


def _cw(table):
    lines = []
    for name, own in table.groupby("variant", sort=False):
        line = {"in training": name, "clean": _spread(own.clean_accuracy)}
        line |= {"PGD 4/255": _spread(own.pgd20_accuracy_4_255)}
        line["change in training, median grey levels"] = f"{own.crafted_median_linf_255.mean():.1f}"
        lines.append(line | {"seeds": own.seed.nunique(), "test slices": own.n.iloc[0]})
    return pd.DataFrame(lines[:_MOST])


def _spread(shares):
    """The mean of fractions in per cent, with their range where there are several."""
    return f"{100 * shares.mean():.0f}{_range(shares)}"


def _range(shares):
    return f" ({100 * shares.min():.0f}–{100 * shares.max():.0f})" if len(shares) > 1 else ""
