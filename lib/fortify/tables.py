"""The paper's Table 1, ours beside the printed one, as CSV, Markdown, LaTeX and plain text.

A *display* table holds strings only, so that its precision is the same wherever it is shown.
"""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fortify.evaluation import BLACK_BOX, TRAININGS, attacks_in, interval_of
from fortify.files import write_csv, write_text
from fortify.intervals import whole_percent

WILSON, BY_GROUPS = "95 % interval", "95 %, by groups"  # the line of intervals, of either kind
_BRIEF = {"clean": "clean", "pgd": "PGD", "worst": "worst"}  # the attacks of a short table, and their titles

PRINTED_SOURCE = (
    "Menasagi et al., Fortifying Deep Learning Models Against Adversarial Threats using "
    "Adversarial Training, Table 1"
)
# Test accuracy in %; the paper states no norm, budget, number of steps, split sizes or seeds.
PRINTED = pd.DataFrame(
    [(93.12, 43.08, 45.9, 40.9, 43.29), (95.0, 93.2, 95.0, 92.8, 93.6)],
    index=pd.Index(("normal", "adversarial"), name="model"),
    columns=pd.Index(("clean", "pgd", "fgsm", "cw", "combined"), name="attack"),
)


def columns1(accuracy: pd.DataFrame) -> dict[str, str]:
    """The columns of Table 1 with their titles: clean, every attack of the table in its order, combined."""
    attacks = {name: name.upper() for name in attacks_in(accuracy)}
    return {"clean": "Clean"} | attacks | {"combined": "Combined"}


def table1(accuracy: pd.DataFrame, *, split: str, protocol: str = "adaptive") -> pd.DataFrame:
    """Table 1 as tidy rows (model, attack): ours in %, k of n and interval, and the ``printed`` value
    (NaN for an attack that the paper has not).

    ``accuracy`` is :func:`fortify.evaluation.accuracy_table`. The rows are the trainings of
    :data:`fortify.evaluation.TRAININGS` that Table 1 shows. Raises ValueError naming what it lacks.
    """
    ours = accuracy[accuracy.split.eq(split) & accuracy.protocol.eq(protocol)].set_index(["model", "attack"])
    models = [name for name, training in TRAININGS.items() if training.table1]
    wanted = pd.MultiIndex.from_product([models, columns1(accuracy)], names=["model", "attack"])
    missing = wanted.difference(ours.index)
    if len(missing):
        raise ValueError(f"Table 1 ({split} split, {protocol}) lacks {', '.join(map('/'.join, missing))}.")
    fractions = ["accuracy", "low", "high", "group_low", "group_high", "sd"]
    table = ours.loc[wanted, ["k", "n", *fractions, "seeds", "minimum_norm"]]
    table[fractions] *= 100
    table["printed"] = PRINTED.stack()
    return table.reset_index().rename(columns={name: f"{name}_percent" for name in fractions})


def layout1(table: pd.DataFrame) -> pd.DataFrame:
    """The display table of :func:`table1`, in the layout of the paper, in whole per cent.

    Each training has the lines accuracy, its 95 % interval (the one by groups where there is one, else
    Wilson's), k/n, where there are several seeds their sd, and printed.
    """
    lines = []
    titles = columns1(table)
    for model in table.model.unique():
        cells = table[table.model.eq(model)].set_index("attack").loc[list(titles)].reset_index()
        shown = {
            "accuracy (%)": (cells.accuracy_percent / 100).map(whole_percent),
            WILSON: [f"{c.low_percent:.0f}–{c.high_percent:.0f}" for c in cells.itertuples()],
            BY_GROUPS: [f"{c.group_low_percent:.0f}–{c.group_high_percent:.0f}" for c in cells.itertuples()],
            "k/n": cells.k.map(str) + "/" + cells.n.map(str),
            "sd over seeds": cells.sd_percent.map("{:.0f}".format),
            "printed (%)": cells.printed.map(str).replace("nan", "–"),  # as many decimals as the paper prints
        }
        if cells.seeds.max() == 1:
            del shown["sd over seeds"]
        del shown[BY_GROUPS if cells.group_low_percent.isna().all() else WILSON]
        for i, (name, values) in enumerate(shown.items()):
            lines.append([model if i == 0 else "", name, *values])
    return pd.DataFrame(lines, columns=["Training", "", *titles.values()])


def brief1(table: pd.DataFrame) -> pd.DataFrame:
    """:func:`layout1` in short, six lines for two trainings: accuracy, one interval, and the printed values.

    The interval is the one by groups, where there is one.
    """
    shown = layout1(table)
    names = shown.Training.where(shown.Training.ne("")).ffill() + ": " + shown[""]
    short = shown.drop(columns=["Training", ""])
    short.insert(0, "Training", names)
    return short[shown[""].isin(["accuracy (%)", WILSON, BY_GROUPS, "printed (%)"])].reset_index(drop=True)


def overview(accuracy: pd.DataFrame) -> pd.DataFrame:
    """A display table of all splits: a line per split and training of Table 1, under adaptive attacks.

    Accuracy in % with the interval by groups (where there is none, Wilson's): clean, under PGD, and *worst*,
    where an image counts only if it is correct under every attack. Balanced accuracy: clean / under PGD.
    """
    models = [name for name, training in TRAININGS.items() if training.table1]
    own = accuracy[accuracy.protocol.eq("adaptive") & accuracy.model.isin(models)]
    lines = []
    for (split, model), part in own.groupby(["split", "model"], sort=False):
        of = {row.attack: row for row in part.itertuples()}
        line = {"Split": split, "Training": model}
        line |= {f"{title} (%)": _with_interval(of[name]) for name, title in _BRIEF.items() if name in of}
        balanced = [of[name].balanced_accuracy for name in ("clean", "pgd") if name in of]
        lines.append(line | {"balanced, clean / PGD": " / ".join(f"{100 * share:.0f}" for share in balanced)})
    return pd.DataFrame(lines)


def counted(accuracy: pd.DataFrame, *, split: str) -> str:
    """What the counts of a split's clean slices pool, in words, from an accuracy table."""
    row = accuracy[accuracy.split.eq(split) & accuracy.attack.eq("clean")].iloc[0]
    images = f"{row.images} test slices"
    images = f"{row.n} predictions of {images}" if row.n != row.images else images
    return images if row.seeds == 1 else f"{images}, {row.seeds} seeds pooled"


def _with_interval(row):
    """An accuracy in % with its interval, by groups where there is one."""
    low, high = interval_of(row)
    return f"{whole_percent(row.accuracy)} ({100 * low:.0f}–{100 * high:.0f})"


def attack_layout(accuracy: pd.DataFrame) -> pd.DataFrame:
    """A display table of one model on one split: a line an attack, in %; *combined* is left out.

    Accuracy with its interval (by groups where there is one), k/n, balanced accuracy and, where the table has
    static attacks, the accuracy under these.
    """
    own = accuracy[accuracy.protocol.eq("adaptive") & accuracy.attack.ne("combined")]
    static = accuracy[accuracy.protocol.eq("static")].set_index("attack").accuracy
    lines = []
    for row in own.itertuples():
        line = {"attack": row.attack if row.attack in ("clean", "worst") else row.attack.upper()}
        line |= {"accuracy (95 % interval)": _with_interval(row), "k/n": f"{row.k}/{row.n}"}
        line |= {"balanced": whole_percent(row.balanced_accuracy)}
        if len(static):
            line["static attack"] = whole_percent(static[row.attack]) if row.attack in static else "–"
        lines.append(line)
    return pd.DataFrame(lines)


def baselines_layout(accuracy: pd.DataFrame) -> pd.DataFrame:
    """A display table of simple classifiers: a line each, clean and under the attack that counts, in %.

    That attack is PGD, for a classifier without a gradient :data:`fortify.evaluation.BLACK_BOX`.
    """
    lines = []
    for model, own in accuracy.groupby("model", sort=False):
        of = {row.attack: row for row in own.itertuples()}
        attack = BLACK_BOX if BLACK_BOX in of else "pgd"
        clean, attacked = of["clean"], of[attack]
        line = {"Classifier": model, "attack": attack if attack == BLACK_BOX else attack.upper()}
        line |= {"clean (%)": _with_interval(clean), "attacked (%)": _with_interval(attacked)}
        pair = (f"{100 * row.balanced_accuracy:.0f}" for row in (clean, attacked))
        lines.append(line | {"balanced, clean / attacked": " / ".join(pair)})
    return pd.DataFrame(lines)


def kept_layout(kept: pd.DataFrame) -> pd.DataFrame:
    """A display table of :func:`fortify.evaluation.kept_epochs`: a line per split and training.

    The accuracies are means over the seeds, at the epochs that were kept.
    """
    lines = []
    for (split, model), own in sorted(kept.groupby(["split", "model"]), key=lambda part: _place(*part[0])):
        first, last = own.epoch.min(), own.epoch.max()
        span = f"{first}" if first == last else f"{first} to {last}"
        robust = own.val_robust_accuracy.mean()
        line = {"Split": split, "Training": model, "trainings": len(own)}
        line |= {"kept epoch": f"{span} of {own.epochs.max()}"}
        line |= {"validation, clean (%)": f"{100 * own.val_accuracy.mean():.0f}"}
        lines.append(line | {"attacked (%)": "–" if pd.isna(robust) else f"{100 * robust:.0f}"})
    return pd.DataFrame(lines)


def _place(split, model):
    """Where a training stands in a table: the paper's split first, then the order of the trainings."""
    return split != "random", list(TRAININGS).index(model)


def scores_layout(scores: pd.DataFrame) -> pd.DataFrame:
    """A display table of :func:`fortify.evaluation.robustness_scores`, six columns."""
    lines = []
    for row in scores.itertuples():
        line = {"Split": row.split, "Training": row.model}
        line["mean over budgets (%)"] = whole_percent(row.mean_robust_accuracy)
        line |= {"sd over seeds": "–" if pd.isna(row.sd) else f"{100 * row.sd:.0f}"}
        line |= {"CW median L2": f"{row.cw_median_l2:.2g}", "CW succeeds": f"{row.cw_k}/{row.cw_n}"}
        lines.append(line)
    return pd.DataFrame(lines)


def matrix_layout(table: pd.DataFrame, *, split: str) -> pd.DataFrame:
    """A display table of :func:`fortify.examined.matrix.matrix`: a line an evaluation, a column a training.

    Each cell is the accuracy in %, its 95 % interval and k/n.
    """
    own = table[table.split.eq(split)].sort_values("order", kind="stable")
    shown = own[["evaluation", "model"]].assign(
        cell=[
            f"{100 * r.accuracy:.1f} ({100 * r.low:.1f}–{100 * r.high:.1f}) {r.k}/{r.n}"
            for r in own.itertuples()
        ]
    )
    pivot = shown.pivot(index="evaluation", columns="model", values="cell")
    return pivot.loc[own.evaluation.unique(), own.model.unique()].rename_axis(columns=None).reset_index()


def caption(
    table: pd.DataFrame,
    *,
    split: str,
    protocol: str = "adaptive",
    eps_255: float,
    cw_l2: float,
    source: str,
    profile: str,
) -> str:
    """The sentences under Table 1: what was measured, on which images (``source``), and how far to trust it.

    ``table`` is :func:`table1`'s. ``eps_255``: Linf budget in grey levels; ``cw_l2``: L2 budget of
    minimum-norm attacks, image in [0, 1].
    """
    crafted = {
        "adaptive": "crafted on the model under test",
        "static": "crafted on the normally trained model",
    }
    by_groups = table.group_low_percent.notna().any()
    drawn = "intervals, a bootstrap of whole groups of near-duplicates"
    drawn = drawn if by_groups else "Wilson intervals, each image counted once"
    kinds, seeds = attacks_in(table), int(table.seeds.max())
    linf, free = (sorted(name.upper() for name in kinds if kinds[name] == kind) for kind in (False, True))
    budgets = [f"{listed(linf)}: Linf budget {eps_255:g}/255."] if linf else []
    budgets += [f"{listed(free)}: L2 budget {cw_l2:g}, image in [0, 1]."] if free else []
    lost = ""
    if protocol == "adaptive":
        lost = "A slice that is misclassified when clean counts as misclassified under every attack. "
        if "pgd" in kinds:
            lost += "A slice that PGD breaks counts as broken at every larger budget. "
    return (
        f"Accuracy on the test set in percent, {split} split, {protocol} attacks ({crafted[protocol]}). "
        f"{' '.join(budgets)} {lost}"
        f"Combined: pooled over the attacks. {seeds} seed{'s' if seeds != 1 else ''}; 95 % {drawn}. "
        f"Images: {source}. Profile: {profile}. Printed: {PRINTED_SOURCE}."
    )


def listed(names: Sequence[str]) -> str:
    """``A, B and C`` of several words."""
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last


def crossed(cells: pd.DataFrame, *, index: str, columns: str, missing: str = "–") -> pd.DataFrame:
    """A display table of the column ``cell``: a line an ``index``, a column each of ``columns``, in order."""
    shown = cells.pivot(index=index, columns=columns, values="cell")
    shown = shown.loc[cells[index].unique(), cells[columns].unique()].fillna(missing)
    return shown.rename_axis(columns=None).reset_index()


def to_markdown(display: pd.DataFrame, *, caption: str | None = None, left: int = 2) -> str:
    """A display table as a GitHub Markdown table, its first ``left`` columns to the left, the rest right."""
    header = list(display.columns)
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    rows = [header, rule, *display.astype(str).to_numpy().tolist()]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, *(["", caption] if caption else [])]) + "\n"


def to_latex(display: pd.DataFrame, *, caption: str | None = None, label: str | None = None) -> str:
    """A display table as a LaTeX table (booktabs), special characters escaped."""
    styler = display.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    text = styler.to_latex(
        column_format="ll" + "r" * (display.shape[1] - 2),
        hrules=True,
        caption=re.sub(r"([%&_#$])", r"\\\1", caption) if caption else None,
        label=label,
        position="t",
        position_float="centering",
    )
    return text.replace("–", "--")


def to_text(display: pd.DataFrame, *, title: str, width: int = 100) -> str:
    """A display table for a terminal, aligned, under its wrapped title; cells wrap to stay in ``width``."""
    rows = [list(map(str, display.columns)), *display.astype(str).to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * len(widths) - 2 > width:
        widths[widths.index(max(widths))] -= 1
    lines = [*textwrap.wrap(title, width), ""]
    for i, row in enumerate(rows):
        cells = [textwrap.wrap(cell, w) for cell, w in zip(row, widths, strict=True)]
        for j in range(max(map(len, cells))):
            parts = [cell[j] if j < len(cell) else "" for cell in cells]
            aligned = [
                p.ljust(w) if k < 2 else p.rjust(w)
                for k, (p, w) in enumerate(zip(parts, widths, strict=True))
            ]
            lines.append("  ".join(aligned).rstrip())
        if i == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines) + "\n"


def write_table1(
    folder: str | Path,
    accuracy: pd.DataFrame,
    *,
    split: str,
    protocol: str = "adaptive",
    **facts: Any,
) -> dict[str, Path]:
    """Write ``table1_<split>`` (static: ``table1_<split>_static``) as .csv, .md and .tex; return their paths.

    The CSV holds :func:`table1`'s numbers; the other two its layout with the :func:`caption`, which takes
    ``facts``: eps_255, cw_l2, source and profile.
    """
    table = table1(accuracy, split=split, protocol=protocol)
    name = f"table1_{split}" + ("" if protocol == "adaptive" else f"_{protocol}")
    paths = {suffix: Path(folder) / f"{name}.{suffix}" for suffix in ("csv", "md", "tex")}
    words = caption(table, split=split, protocol=protocol, **facts)
    write_csv(paths["csv"], table.drop(columns="minimum_norm"))
    write_text(paths["md"], to_markdown(layout1(table), caption=words))
    write_text(paths["tex"], to_latex(layout1(table), caption=words, label=f"tab:{name}"))
    return paths
