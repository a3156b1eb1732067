"""From one row per attacked image to accuracies, confusion matrices and robustness scores.

A *rows* table has the columns ``COLUMNS`` and one row per (model, split, seed, attack, protocol, budget,
image). A row without a budget is of a minimum-norm attack. Every number of the paper is derived from such
tables; that takes no model, and no list of attacks: the rows name them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fortify.intervals import cluster_interval, gain_interval, wilson

_DTYPES = {
    "model": "str",  # how it was trained: "normal" or "adversarial"
    "split": "str",  # "random" or "grouped"
    "seed": "int64",
    "attack": "str",  # "clean" or the attack's name
    "protocol": "str",  # "adaptive": crafted on this model, as clean rows are; "static": on the normal model
    "eps_255": "float64",  # Linf budget in grey levels; 0 for clean, NaN for minimum-norm attacks
    "index": "int64",  # position of the image in the slices, whatever the split
    "label": "int64",
    "prediction": "int64",
    "probability": "float64",  # of the predicted class
    "success": "bool",  # prediction != label
    "linf_255": "float64",  # largest change of a pixel, in grey levels
    "l2": "float64",  # of the change, image in [0, 1]; 0 for a failed minimum-norm attack (clean image)
}
COLUMNS = tuple(_DTYPES)


@dataclass(frozen=True)
class Training:
    """How a trained model looks in every figure, and whether Table 1 has a row for it."""

    colour: str  # the colours differ for the colour-blind and in grey
    marker: str
    table1: bool = False


# Every way of training that tables and figures know, in their order. To add a row to Table 1, add one here.
TRAININGS = {
    "normal": Training("#e08214", "s", table1=True),
    "published": Training("#6b6b6b", "^"),
    "tone curves": Training("#a569bd", "D"),
    "adversarial": Training("#0b4f8a", "o", table1=True),
}
BLACK_BOX = "black-box"  # the attack on a classifier without a gradient: fortify.baselines
_PAPER = ("pgd", "fgsm", "cw")  # the paper's attacks in its order; any other comes after them

_MODEL = ["model", "split", "seed"]
_GROUP = ["split", "model", "protocol", "attack"]
_ORDER = (*TRAININGS, "random", "grouped", "adaptive", "static")
_OTHER = "any other attack"
_RANK = {name: i for i, name in enumerate((*_ORDER, "clean", *_PAPER, _OTHER, "combined", "worst"))}


def typed(rows: pd.DataFrame) -> pd.DataFrame:
    """A rows table with the types of ``COLUMNS``."""
    return rows.astype(_DTYPES)


def attacks_in(rows: pd.DataFrame) -> dict[str, bool]:
    """{attack: whether it is a minimum-norm attack} of the ``attack`` column, the paper's order first.

    ``rows`` is a rows table, or what :func:`at_budget` or :func:`accuracy_table` made of one.
    """
    if "minimum_norm" in rows:
        kinds = rows.groupby("attack", sort=False).minimum_norm.any()
    elif "eps_255" not in rows:
        raise ValueError("the table says of no attack whether it has a budget: no column minimum_norm")
    else:
        kinds = rows.eps_255.isna().groupby(rows.attack, sort=False).any()
    known = {name: i for i, name in enumerate(_PAPER)}
    names = sorted(
        (name for name in kinds.index if name not in ("clean", "combined", "worst")),
        key=lambda name: known.get(name, len(known)),
    )
    return {name: bool(kinds[name]) for name in names}


def read_rows(path: str | Path) -> pd.DataFrame:
    """Read a rows table from CSV; ValueError naming the first column that is not as ``COLUMNS`` has it."""
    try:
        rows = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} is empty: write it again.") from None
    if tuple(rows.columns) != COLUMNS:
        missing, unknown = sorted(set(COLUMNS) - set(rows)), sorted(set(rows) - set(COLUMNS))
        raise ValueError(
            f"{path} is no per-example table: columns {missing} are missing and {unknown} unknown. "
            f"It needs, in this order: {', '.join(COLUMNS)}."
        )
    for column, dtype in _DTYPES.items():
        holds = "str" if pd.api.types.is_string_dtype(rows[column]) else rows[column].dtype.name
        allowed = {"float64": ("float64", "int64")}.get(dtype, (dtype,))
        if holds not in allowed or (dtype == "str" and rows[column].isna().any()):
            raise ValueError(
                f"{path}: column {column!r} must hold {dtype} in every row; it reads as {holds}."
            )
    return typed(rows)


def read_logits(path: str | Path) -> pd.DataFrame:
    """Read a table of :func:`fortify.scoring.logits` from CSV; ValueError where it is no such table."""
    table = pd.read_csv(path)
    columns = [*_MODEL, "attack", "index", "label"]
    rest = list(table.columns)[len(columns) :]
    if list(table)[: len(columns)] != columns or rest != [f"logit_{c}" for c in range(len(rest))] or not rest:
        raise ValueError(
            f"{path} is no table of logits: it needs {', '.join(columns)}, logit_0, logit_1, ..."
        )
    return table


def check_rows(rows: pd.DataFrame) -> None:
    """Raise ValueError unless ``rows`` is complete and consistent; the message shows the first fault.

    Each row is unique; an image has one label; ``success`` is ``prediction != label``; each attack at each
    budget covers the images of the clean rows; an attack has a budget in all rows or in none; one that has
    none (minimum-norm) and fails has, adaptive, the clean prediction and L2 0.
    """

    def refuse(bad, what):
        if bad.any():
            raise ValueError(
                f"{bad.sum()} of {len(rows)} rows {what}; the first is {rows[bad].iloc[0].to_dict()}."
            )

    clean, adaptive = rows.attack.eq("clean"), rows.protocol.eq("adaptive")
    free = rows.eps_255.isna()
    refuse(rows.attack.isin(("combined", "worst", "")), "name a summary where an attack belongs")
    refuse(~adaptive & rows.protocol.ne("static"), "name an unknown protocol")
    refuse(clean & (~adaptive | rows.eps_255.ne(0)), "are clean but not adaptive at eps_255 0")
    mixed = free.groupby(rows.attack).transform("any") & ~free
    refuse(mixed, "have an eps_255, where others of their attack, a minimum-norm one, have none")
    refuse(~clean & ~free & ~rows.eps_255.gt(0), "are of an attack without an eps_255 above 0")
    refuse(rows.duplicated([*_MODEL, "attack", "protocol", "eps_255", "index"]), "repeat another row")
    refuse(rows.groupby("index").label.transform("nunique").gt(1), "give one image several labels")
    refuse(rows.success.ne(rows.prediction.ne(rows.label)), "have a success that is not prediction != label")
    for name, group in rows.groupby(_MODEL):
        reference = set(group["index"][group.attack.eq("clean")])
        for attack, part in group.groupby(["attack", "protocol", "eps_255"], dropna=False):
            if set(part["index"]) != reference:
                raise ValueError(f"{name} {attack}: {len(part)} images, not the {len(reference)} clean ones.")
    failed = free & adaptive & ~rows.success
    altered = rows.l2.ne(0) | rows.prediction.ne(_clean_prediction(rows))
    refuse(failed & altered, "are of a failed minimum-norm attack, altered")


def _clean_prediction(rows):
    """The clean prediction of each row's model for its image, in the rows' order."""
    clean = rows[rows.attack.eq("clean")].set_index([*_MODEL, "index"]).prediction
    return clean.reindex(pd.MultiIndex.from_frame(rows[[*_MODEL, "index"]])).to_numpy()


def _serve_static(rows):
    """Repeat as static what belongs to both protocols: clean rows, and attacks on the normal model itself."""
    static = rows.protocol.eq("static")
    model, run = (pd.MultiIndex.from_frame(rows[c]) for c in (_MODEL, _MODEL[1:]))
    has_static, wanted = model.isin(model[static]), run.isin(run[static])
    normal = wanted & ~has_static & rows.model.eq("normal")
    shared = rows[~static & (normal | (has_static & rows.attack.eq("clean")))]
    return pd.concat([rows, shared.assign(protocol="static")], ignore_index=True)


def at_budget(rows: pd.DataFrame, *, eps_255: float, cw_l2: float) -> pd.DataFrame:
    """One prediction per (model, split, seed, protocol, attack, index), at one budget, with its label.

    Attacks with a budget at exactly ``eps_255`` grey levels. A minimum-norm attack (CW) where its L2 norm is
    at most ``cw_l2``, else the clean prediction: what is left to an adversary with that budget. Clean rows
    serve both protocols, and so do attacks on the normal model, where static ones are crafted. The column
    ``minimum_norm`` says of which kind the attack is.
    Raises ValueError listing the available budgets where an attack lacks this one, and for a negative one.
    """
    if not (eps_255 >= 0 and cw_l2 >= 0):
        raise ValueError(f"eps_255 and cw_l2 must be at least 0, not {eps_255} and {cw_l2}")
    check_rows(rows)
    rows = rows.reset_index(drop=True)
    free = rows.eps_255.isna()
    linf = ~free & rows.attack.ne("clean")
    exact = linf & np.isclose(rows.eps_255, eps_255, rtol=1e-6, atol=0)
    for group, part in rows[linf].groupby([*_MODEL, "protocol", "attack"]):
        if not exact[part.index].any():
            available = ", ".join(f"{eps:g}" for eps in sorted(part.eps_255.unique()))
            raise ValueError(f"No rows at eps_255={eps_255:g} for {group}; available: {available}.")
    beyond = free & rows.l2.gt(cw_l2)
    prediction = np.where(beyond, _clean_prediction(rows), rows.prediction)
    rows = _serve_static(rows.assign(prediction=prediction, minimum_norm=free)[exact | ~linf])
    columns = [*_MODEL, "protocol", "attack", "index", "label", "prediction", "minimum_norm"]
    return _sorted(rows[columns])


def paired_gain(
    rows_at_budget: pd.DataFrame,
    groups: Sequence[Any],
    *,
    models: tuple[str, str] = ("normal", "adversarial"),
) -> pd.DataFrame:
    """How many more of the same images the second of two ``models`` classifies correctly: a tidy table.

    From the adaptive rows of :func:`at_budget`, one row per (split, attack): ``n``, ``k_<model>`` of both and
    their difference in points, ``gain_percent``, with the interval ``low_percent``, ``high_percent`` of a
    bootstrap that draws whole groups (:func:`gain_interval`) of ``groups``, the group (N,) of every slice.
    Seeds are pooled.
    Raises ValueError where the two models were not shown the same images.
    """
    rows = rows_at_budget[rows_at_budget.protocol.eq("adaptive")]
    key = ["split", "attack", "seed", "index"]
    first, second = (rows[rows.model.eq(model)].set_index(key).sort_index() for model in models)
    if first.empty or not first.index.equals(second.index):
        raise ValueError(f"{' and '.join(models)} were not evaluated on the same images, attacks and seeds.")
    right = [rows.prediction.eq(rows.label).astype(int) for rows in (first, second)]
    both = pd.concat(right, axis=1, keys=models)
    table = []
    for (split, attack), own in both.groupby(["split", "attack"]):
        more = own[models[1]] - own[models[0]]
        interval = gain_interval(more, np.asarray(groups)[own.index.get_level_values("index")])
        row = {"split": split, "attack": attack, "n": len(own), **own.sum().add_prefix("k_")}
        shares = zip(("gain", "low", "high"), (more.mean(), *interval), strict=True)
        table.append(row | {f"{name}_percent": 100 * share for name, share in shares})
    return _sorted(pd.DataFrame(table))


def scan_decisions(logits: pd.DataFrame, groups: Sequence[Any]) -> pd.DataFrame:
    """One decision a scan, from the mean logit over its slices: rows for :func:`accuracy_table`.

    ``logits`` is one or more :func:`fortify.scoring.logits`; ``groups`` (N,) the group of every slice, which
    stands in for its scan. Of a group only the slices that ``logits`` holds count, those of the test set. A
    scan's label is the most frequent one among them, of equally frequent ones the lowest; ``mixed`` says
    whether they are of several classes. Of equal mean logits the first class is predicted. One row per
    (model, split, seed, attack, group): ``index`` is the group.
    Each slice was attacked on its own: an adversary who aims at the mean may do better.
    """
    columns = [column for column in logits if column.startswith("logit_")]
    slices = logits.assign(group=np.asarray(groups)[logits["index"]])
    scans = slices.groupby([*_MODEL, "attack", "group"], sort=False)
    table = scans[columns].mean()
    table["prediction"] = table[columns].to_numpy().argmax(1)
    table["label"] = scans.label.agg(lambda own: np.bincount(own).argmax())
    table["mixed"] = scans.label.nunique().gt(1)
    table = table.drop(columns=columns).reset_index().rename(columns={"group": "index"})
    return _sorted(table.assign(protocol="adaptive", minimum_norm=False))


def headline_gains(
    rows_at_budget: pd.DataFrame, groups: Sequence[Any], *, reference: str = "adversarial"
) -> pd.DataFrame:
    """How many more of the same slices each other model classifies correctly than ``reference``.

    :func:`paired_gain` with the column ``model``, clean and under PGD, of a model without a gradient under
    :data:`BLACK_BOX`; ``attack`` is "clean" or "pgd".
    """
    rows = rows_at_budget[rows_at_budget.protocol.eq("adaptive")]
    rows = rows.assign(attack=rows.attack.replace(BLACK_BOX, "pgd"))
    rows = rows[rows.attack.isin(("clean", "pgd"))]
    names = [name for name in rows.model.unique() if name != reference]
    pairs = {name: paired_gain(rows, groups, models=(reference, name)) for name in names}
    table = [own.rename(columns={f"k_{name}": "k"}).assign(model=name) for name, own in pairs.items()]
    return pd.concat(table, ignore_index=True)


def accuracy_table(
    rows_at_budget: pd.DataFrame,
    *,
    class_names: Sequence[str],
    groups: Sequence[Any] | None = None,
    pooled: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Accuracy per (split, model, protocol, attack), as fractions, from the rows of :func:`at_budget`.

    Beside clean and each attack: *combined* pools the attacks ``pooled``, by default all in the table (k of
    3n predictions with three, as the paper's Table 1); *worst* counts an image only if it is classified
    correctly under all of them. Both need all of them.
    Seeds are pooled, ``sd`` is over their accuracies (ddof 1, NaN with one). The interval (``low``,
    ``high``) counts each of the distinct ``images`` once, with k rounded, because three attacked copies of
    an image, or several seeds' predictions of it, are not independent. Nor are the slices of a scan, which
    it takes as if they were: ``group_low`` and ``group_high`` do not (:func:`cluster_interval`); they are NaN
    without ``groups``, the group (N,) of every slice. ``recall_<class>`` is NaN for a class without images,
    which ``balanced_accuracy``, their mean, leaves out. The recall of the malignant class is the sensitivity.
    Raises ValueError where the rows hold an image several times under one attack, as at several budgets, or
    where ``class_names`` lacks a class that they hold.
    """
    rows = rows_at_budget.assign(correct=rows_at_budget.prediction.eq(rows_at_budget.label))
    image = [*_MODEL, "protocol", "index"]
    if rows.duplicated([*image, "attack"]).any():
        raise ValueError(
            "the rows hold an image several times under one attack, as at several budgets, which no accuracy "
            "pools; choose one: at_budget(rows, eps_255=..., cw_l2=...)"
        )
    highest = int(rows[["label", "prediction"]].max().max())
    if highest >= len(class_names):
        raise ValueError(f"class_names has {len(class_names)} names, but the rows hold class {highest}")
    kinds = attacks_in(rows)
    pooled = tuple(kinds) if pooled is None else pooled
    attacked = rows[rows.attack.isin(pooled)]
    attacked = attacked[attacked.groupby(image).attack.transform("nunique").eq(len(pooled))]
    worst = attacked.groupby([*image, "label"], as_index=False).correct.all().assign(attack="worst")
    table = []
    for group, part in pd.concat([rows, attacked.assign(attack="combined"), worst]).groupby(_GROUP):
        recall = part.groupby("label").correct.mean().reindex(range(len(class_names)))
        recalls = {f"recall_{name}": value for name, value in zip(class_names, recall, strict=True)}
        line = _summary(group, part) | _by_groups(part, groups)
        line |= {"balanced_accuracy": recall.mean()} | recalls
        table.append(line | {"minimum_norm": kinds.get(line["attack"], False)})
    return _sorted(pd.DataFrame(table))


def _summary(group, part):
    """The columns that name a group, then its accuracy as :func:`accuracy_table` defines it."""
    k, n, images = int(part.correct.sum()), len(part), part["index"].nunique()
    low, high = wilson(round(k * images / n), images)
    seeds = part.groupby("seed").correct.mean()
    numbers = {"k": k, "n": n, "accuracy": k / n, "low": low, "high": high, "images": images}
    return dict(zip(_GROUP, group, strict=True)) | numbers | {"seeds": len(seeds), "sd": seeds.std(ddof=1)}


def interval_of(row: Any, unit: str = "") -> tuple[float, float]:
    """(low, high) of a row of an accuracy table: the interval by groups, and where there is none Wilson's.

    ``row`` has its columns as attributes; ``unit`` ends their names, as "_percent" does in Table 1.
    """
    low, high = (getattr(row, f"group_{end}{unit}", np.nan) for end in ("low", "high"))
    return (getattr(row, f"low{unit}"), getattr(row, f"high{unit}")) if pd.isna(low) else (low, high)


def _by_groups(part, groups):
    """The interval of these rows' accuracy that draws whole groups; NaN without ``groups``."""
    low = high = np.nan
    if groups is not None:
        own = np.asarray(groups)[part["index"]]
        low, high = cluster_interval(part.correct.to_numpy(bool), own)
    return {"group_low": low, "group_high": high}


def _sorted(table):
    """In the paper's order (normal before adversarial; clean, PGD, FGSM, CW), then by budget and image.

    Other trainings and attacks keep their place among themselves, after those and before their summaries.
    """
    by = [column for column in (*_GROUP, "seed", "eps_255", "index") if column in table]

    def rank(column):
        return column.map(_RANK).fillna(_RANK[_OTHER]) if column.name in _GROUP else column

    return table.sort_values(by, key=rank, kind="stable", ignore_index=True)


def confusion(rows_at_budget: pd.DataFrame, *, num_classes: int) -> dict[tuple, np.ndarray]:
    """Matrices {(split, model, protocol, attack): int64 (true class, predicted class)}, summed over seeds."""
    matrices = {}
    for group, part in rows_at_budget.groupby(_GROUP, sort=False):
        matrices[group] = np.zeros((num_classes, num_classes), dtype=np.int64)
        np.add.at(matrices[group], (part.label, part.prediction), 1)
    return matrices


def curve(rows: pd.DataFrame, *, groups: Sequence[Any] | None = None) -> pd.DataFrame:
    """Accuracy against ``eps_255`` per (split, model, protocol, Linf attack), clean at 0.

    Columns and intervals are those of :func:`accuracy_table`, fractions and grey levels: ``group_low`` and
    ``group_high`` are NaN without ``groups``, the group (N,) of every slice.
    """
    check_rows(rows)
    rows = _serve_static(rows.assign(correct=~rows.success))
    clean = rows[rows.attack.eq("clean")]
    linf = [attack for attack, minimum_norm in attacks_in(rows).items() if not minimum_norm]
    points = pd.concat([*(clean.assign(attack=attack) for attack in linf), rows[rows.attack.isin(linf)]])
    attacked = points.groupby([*_MODEL, "protocol", "attack"]).eps_255.transform("max").gt(0)
    grouped = points[attacked].groupby([*_GROUP, "eps_255"])
    table = [
        _summary(key[:-1], part) | _by_groups(part, groups) | {"eps_255": key[-1]} for key, part in grouped
    ]
    return _sorted(pd.DataFrame(table))


def training_history(
    history: pd.DataFrame,
    *,
    model: str,
    split: str,
    seed: int,
    epochs: int,
    train_recipe: Mapping[str, Any],
    train_eps_255: float,
) -> pd.DataFrame:
    """A training's ``history`` with what names it, its ``epochs``, and the budget that each epoch trained at.

    Normal training has no budget (0) and no changes of its recipe; the adversarial one's budget grows to
    ``train_eps_255`` over the share ``eps_warmup`` of its epochs, and its recipe's ``epochs`` count.
    """
    changes = train_recipe if model == "adversarial" else {}
    epochs = changes.get("epochs", epochs)
    grown = (history.epoch / max(1, changes.get("eps_warmup", 0) * epochs)).clip(upper=1)
    budget = grown * (train_eps_255 if model == "adversarial" else 0.0)
    named = {"split": split, "model": model, "seed": seed}
    rest = history.assign(epochs=epochs, train_eps_255=budget)
    return pd.DataFrame({**{name: [value] * len(rest) for name, value in named.items()}, **rest})


def kept_epochs(histories: pd.DataFrame) -> pd.DataFrame:
    """The epoch that each training kept, one row a (split, model, seed), from :func:`training_history`."""
    columns = ["split", "model", "seed", "epoch", "val_accuracy", "val_robust_accuracy", "epochs"]
    kept = histories[histories.selected.astype(bool)].astype({"epoch": int})
    return kept[[*columns, "train_eps_255"]].sort_values(["split", "model", "seed"], ignore_index=True)


def robustness_scores(rows: pd.DataFrame) -> pd.DataFrame:
    """Robustness in one row per (split, model), under adaptive attacks, seeds pooled.

    ``mean_robust_accuracy``: the PGD accuracies at the budgets ``eps_grid`` (grey levels, without 0),
    averaged with equal weights; ``sd`` over seeds. One grid for all models, else ValueError.
    ``cw_median_l2``: median, over the images classified correctly when clean, of the L2 norm ([0, 1] units)
    that CW needs, infinite where it fails. ``cw_success``: its success on them, ``cw_k`` of ``cw_n``.
    """
    check_rows(rows)
    rows = rows[rows.protocol.eq("adaptive")].reset_index(drop=True)
    pgd, cw = (
        rows[rows.attack.eq("pgd")],
        rows[rows.attack.eq("cw") & (_clean_prediction(rows) == rows.label)],
    )
    grids = {name: ", ".join(f"{e:g}" for e in sorted(p.eps_255.unique())) for name, p in pgd.groupby(_MODEL)}
    if len(set(grids.values())) != 1:
        raise ValueError(f"Robustness scores need one PGD budget grid for all models, not {grids}.")
    table = []
    for (split, model), part in pgd.groupby(["split", "model"]):
        accuracy = 1 - part.groupby(["seed", "eps_255"]).success.mean().groupby("seed").mean()
        mean = 1 - part.groupby("eps_255").success.mean().mean()
        own = cw[cw.split.eq(split) & cw.model.eq(model)]
        line = {"split": split, "model": model, "seeds": len(accuracy), "mean_robust_accuracy": mean}
        line |= {"sd": accuracy.std(ddof=1), "eps_grid": grids[model, split, part.seed.iloc[0]]}
        line |= {"cw_median_l2": own.l2.where(own.success, np.inf).median(), "cw_k": int(own.success.sum())}
        table.append(line | {"cw_n": len(own), "cw_success": own.success.mean()})
    return _sorted(pd.DataFrame(table))
