"""The table under Table 1: recalls, decisions by scan, and simple classifiers, clean and attacked.

It is made of the same rows as Table 1, and of :func:`fortify.scoring.logits`. Its caption says first where a
baseline is ahead of the adversarially trained network.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from fortify.evaluation import (
    BLACK_BOX,
    TRAININGS,
    accuracy_table,
    headline_gains,
    interval_of,
    scan_decisions,
)
from fortify.files import write_csv, write_text
from fortify.intervals import whole_percent
from fortify.tables import listed, to_latex, to_markdown

if TYPE_CHECKING:
    from fortify.data import Slices


def write_classes(
    folder: str | Path,
    predictions: pd.DataFrame,
    logits: pd.DataFrame,
    slices: "Slices",
    *,
    split: str,
    baselines: Sequence[str],
    eps_255: float,
    profile: str,
) -> dict[str, Path]:
    """Write ``table1_<split>_classes`` as .csv, .md and .tex; return their paths.

    ``predictions`` are :func:`fortify.evaluation.at_budget`'s of trainings and ``baselines``, ``logits`` the
    tables of :func:`fortify.scoring.logits` of the same; ``slices`` give groups, names of the classes and the
    source. The CSV holds :func:`classes_table`'s numbers, the other two its layout with its caption. A
    baseline without rows is named there.
    """
    attacks = ("clean", "pgd", BLACK_BOX)
    adaptive = predictions.split.eq(split) & predictions.protocol.eq("adaptive")
    rows = predictions[adaptive & predictions.attack.isin(attacks)]
    scans = scan_decisions(logits[logits.split.eq(split) & logits.attack.isin(attacks)], slices.groups)
    by_slice = accuracy_table(rows, class_names=slices.class_names, groups=slices.groups)
    by_scan = accuracy_table(scans, class_names=slices.class_names)
    table = classes_table(by_slice, by_scan, split=split, baselines=baselines)
    gains = headline_gains(rows[rows.model.isin(["adversarial", *baselines])], slices.groups)
    one = scans[scans.model.eq("adversarial") & scans.attack.eq("clean")]
    facts = {"scans": (int(one.mixed.sum()), len(one)), "eps_255": eps_255, "source": slices.source}
    facts["missing"] = [name for name in baselines if name not in set(rows.model)]
    words = classes_caption(table, gains, split=split, profile=profile, **facts)
    name, shown = f"table1_{split}_classes", classes_layout(table)
    paths = {suffix: Path(folder) / f"{name}.{suffix}" for suffix in ("csv", "md", "tex")}
    write_csv(paths["csv"], table)
    write_text(paths["md"], to_markdown(shown, caption=words))
    write_text(paths["tex"], to_latex(shown, caption=words, label=f"tab:{name}"))
    return paths


def classes_table(
    by_slice: pd.DataFrame, by_scan: pd.DataFrame, *, split: str, baselines: Sequence[str] = ()
) -> pd.DataFrame:
    """What stands under Table 1, as tidy rows (model, unit, attack): accuracy, its balance and recalls in %.

    ``by_slice`` and ``by_scan`` are :func:`fortify.evaluation.accuracy_table`, the latter of
    :func:`fortify.evaluation.scan_decisions`; ``unit`` is "slice" or "scan". The models are the trainings of
    Table 1, then the ``baselines`` that have rows, in the order given; the attacks are clean and PGD, of a
    model without a gradient "black-box". ValueError naming a line that is missing.
    """
    both = pd.concat([by_slice.assign(unit="slice"), by_scan.assign(unit="scan")], ignore_index=True)
    own = both[both.split.eq(split) & both.protocol.eq("adaptive")]
    black_box = set(own.model[own.attack.eq(BLACK_BOX)])
    models = [name for name, training in TRAININGS.items() if training.table1]
    models += [name for name in baselines if name in set(own.model)]
    wanted = [
        (model, unit, attack)
        for model in models
        for unit in ("slice", "scan")
        for attack in ("clean", BLACK_BOX if model in black_box else "pgd")
    ]
    own = own.set_index(["model", "unit", "attack"])
    if missing := [line for line in wanted if line not in own.index]:
        raise ValueError(f"the {split} split's table of classes lacks {', '.join(map('/'.join, missing))}.")
    recalls = [column for column in own if column.startswith("recall_")]
    fractions = ["accuracy", "low", "high", "group_low", "group_high", "balanced_accuracy", *recalls]
    table = own.loc[wanted, ["k", "n", *fractions, "seeds"]]
    table[fractions] *= 100
    return table.reset_index().rename(columns={name: f"{name}_percent" for name in fractions})


def classes_layout(table: pd.DataFrame) -> pd.DataFrame:
    """The display table of :func:`classes_table`: a line per model and unit, clean and attacked side by side.

    Accuracy with its 95 % interval (by groups where there is one) and k/n; balanced accuracy and recalls as
    "clean / attacked".
    """
    lines = []
    for (model, unit), part in table.groupby(["model", "unit"], sort=False):
        clean, attacked = part.itertuples()
        line = {"Classifier": model if unit == "slice" else "", "decides by": unit}
        line |= {"clean (%)": f"{_cell(clean)} {clean.k}/{clean.n}"}
        line |= {"attacked (%)": f"{_cell(attacked)} {attacked.k}/{attacked.n}"}
        for column in table:
            if column == "balanced_accuracy_percent" or column.startswith("recall_"):
                name = column.removesuffix("_percent").replace("_accuracy", "").replace("_", " ")
                shares = ["–" if pd.isna(share) else whole_percent(share / 100) for share in part[column]]
                line[name] = " / ".join(shares)
        lines.append(line)
    return pd.DataFrame(lines)


def classes_brief(table: pd.DataFrame, *, rare: str) -> pd.DataFrame:
    """:func:`classes_layout` in six columns, a line a classifier.

    Accuracy with its interval, clean and attacked, then balanced accuracy, the recall of the class ``rare``
    and the accuracy by scan, as "clean / attacked" in %.
    """
    lines = []
    for model, part in table.groupby("model", sort=False):
        by_slice, by_scan = (part[part.unit.eq(unit)] for unit in ("slice", "scan"))
        clean, attacked = by_slice.itertuples()
        line = {"Classifier": model, "clean (%)": _cell(clean), "attacked (%)": _cell(attacked)}
        pairs = {"balanced": by_slice.balanced_accuracy_percent}
        pairs |= {f"recall {rare}": by_slice[f"recall_{rare}_percent"], "by scan": by_scan.accuracy_percent}
        for name, shares in pairs.items():
            line[name] = " / ".join("–" if pd.isna(share) else f"{share:.0f}" for share in shares)
        lines.append(line)
    return pd.DataFrame(lines)


def _cell(row):
    """An accuracy in % with its interval, by groups where there is one."""
    low, high = interval_of(row, "_percent")
    return f"{whole_percent(row.accuracy_percent / 100)} ({low:.0f}–{high:.0f})"


def classes_caption(
    table: pd.DataFrame,
    gains: pd.DataFrame,
    *,
    split: str,
    eps_255: float,
    scans: tuple[int, int],
    missing: Sequence[str] = (),
    source: str,
    profile: str,
) -> str:
    """The sentences under :func:`classes_table`; which baselines are ahead of adversarial training is first.

    ``gains`` is :func:`fortify.evaluation.headline_gains` of the baselines; ``scans`` how many groups hold
    slices of several classes, and of how many; ``missing`` names baselines that were left out.
    """
    black_box = table.model[table.attack.eq(BLACK_BOX)].unique()
    words = [_ahead(gains[gains.split.eq(split)], attack, eps_255) for attack in ("clean", "pgd")]
    words += [
        f"Test set of the {split} split. Attacked: PGD, Linf budget {eps_255:g}/255, crafted on the "
        "classifier itself. Balanced accuracy and recalls in percent, clean / attacked."
    ]
    if len(black_box):
        words += [
            f"Without a gradient ({listed(sorted(black_box))}): the strongest of images crafted on the "
            "other classifiers and a decision-based attack (RayS), at the same budget."
        ]
    words += [
        "By scan: the class of the highest mean logit over a group's test slices, each attacked on its own. "
        "Groups of near-duplicates stand in for scans, and count once for each seed that tests them. "
        f"Of these {scans[1]}, {scans[0]} hold slices of several classes; the most frequent class counts. "
        "Intervals: 95 %, "
        + ("by groups for slices, " if table.group_low_percent.notna().any() else "Wilson's for slices, ")
        + "Wilson's for scans."
    ]
    if len(set(table.model) - TRAININGS.keys()):
        words += ["Baselines learn from training and validation slices; CW is not run on them."]
    if missing:
        words += [f"Left out, for the extra `pretrained` is not installed: {listed(missing)}."]
    return " ".join([*words, f"Images: {source}. Profile: {profile}."])


def _ahead(gains, attack, eps_255):
    """Which baselines classify more of the same slices correctly than adversarial training, or nearly so."""
    when = "Clean" if attack == "clean" else f"Attacked within {eps_255:g}/255"
    own = gains[gains.attack.eq(attack)]
    more, fewer = own[own.gain_percent.gt(0)], own[own.gain_percent.le(0) & own.high_percent.ge(0)]

    def shown(rows):
        words = []
        for row in rows.itertuples():
            gain, low, high = row.gain_percent, row.low_percent, row.high_percent
            if gain <= 0:  # behind, by so many points
                gain, low, high = abs(gain), -high, -low
            points = f"{gain:.{0 if gain >= 1.5 else 1}f}"
            words.append(f"{row.model} by {points} points ({low:.0f} to {high:.0f})")
        return listed(words)

    beyond = more.low_percent.gt(0)
    parts = []
    if more.empty:
        parts.append(f"{when}, no baseline is ahead of the adversarially trained network.")
    if beyond.any():
        parts.append(f"{when}, ahead of the adversarially trained network: {shown(more[beyond])}.")
    if (~beyond).any():
        than = "it" if parts else "the adversarially trained network"
        parts.append(f"{when}, ahead of {than}, but not beyond chance: {shown(more[~beyond])}.")
    if len(fewer):
        parts.append(f"{when}, behind it, but not beyond chance: {shown(fewer)}.")
    return " ".join(parts)
