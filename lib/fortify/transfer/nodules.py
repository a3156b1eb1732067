"""The second dataset of notebook 11: nodules of known patients, beside what their size alone says."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from fortify import lidc
from fortify.attacks import Attack
from fortify.baselines import FrozenFeatures, headless
from fortify.data import Slices, to_tensor
from fortify.evaluation import accuracy_table, at_budget, headline_gains, scan_decisions
from fortify.intervals import whole_percent
from fortify.phantom import lesion_masks, phantom_slices
from fortify.scoring import evaluate, logits
from fortify.splits import grouped_split, near_duplicate_groups, pairwise_agreement
from fortify.tables import crossed
from fortify.transfer.networks import Regime, trained

KINDS = ("random", "near-duplicate groups", "patients")  # how folds keep slices together
FEATURES = {"diameter_mm": "diameter alone", "area_px": "mask area alone"}
MIDDLE_MM = (7.0, 14.0)  # diameters between which size says little
_PENALTY = 1e-3  # C of the linear head on frozen features
_SUBSETS = {"all": (0.0, np.inf), "7 to 14 mm": MIDDLE_MM}


@dataclass(frozen=True, eq=False)
class Study:
    """Slices of nodules with what is known of each slice's nodule (``fortify.lidc.nodule_table``'s
    columns).

    ``masks`` says of slices, by their positions, where the nodule is: bool (M, size, size).
    """

    slices: Slices
    nodules: pd.DataFrame
    masks: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def codes(self) -> np.ndarray:
        """The nodule of every slice as a number, int64 (N,)."""
        return pd.factorize(self.nodules.nodule)[0].astype(np.int64)

    def patient_of(self, *, unit: str) -> np.ndarray:
        """The patient of every slice, or with ``unit="nodule"`` of every nodule's code."""
        if unit == "slice":
            return self.slices.patients
        return self.slices.patients[np.unique(self.codes, return_index=True)[1]]


def open_study(data: str, *, size: int, cache: str | Path | None = None, seed: int = 0) -> Study | None:
    """The second dataset: ``"lidc"``, or ``"phantom"`` as a stand-in; None where LIDC has not been fetched.

    Slices are ``size`` px wide. The stand-in is of other virtual patients than a profile's (``seed`` + 1000),
    benign and malignant alone. Phantoms state no size, so one is drawn for each lesion, 8 mm or 14 mm in the
    median: its figures mean nothing. ValueError for another name.
    """
    if data == "lidc":
        if not lidc.is_there():
            return None
        slices = lidc.load_lidc_nodules(size=size, cache=cache)

        def masks(index):
            return lidc.load_lidc_masks(slices.subset(index), size=size)

        return Study(slices, lidc.nodule_table(slices), masks)
    if data != "phantom":
        raise ValueError(f'the second dataset is "lidc" or "phantom", not {data!r}')
    options = {"patients": 60, "slices_per_patient": 3, "size": size, "seed": seed + 1000}
    drawn = phantom_slices(**options)
    some = drawn.subset(drawn.labels < 2)
    some = replace(some, class_names=some.class_names[:2], groups=some.patients)
    patients, first = np.unique(some.patients, return_index=True)
    rng = np.random.default_rng(seed)
    sizes = np.where(some.labels[first] == 0, 8, 14) * np.exp(rng.normal(0, 0.35, len(patients)))
    diameter = sizes[np.searchsorted(patients, some.patients)]
    area = (diameter * size / 300) ** 2 * rng.uniform(0.5, 1, len(some))
    table = {"nodule": [f"phantom {p}" for p in some.patients], "diameter_mm": diameter, "area_px": area}
    return Study(some, pd.DataFrame(table), lesion_masks(**options)[drawn.labels < 2].__getitem__)


def nodule_folds(
    study: Study, *, folds: int, thresholds: Mapping[str, float] | None = None
) -> dict[str, list[dict[str, np.ndarray]]]:
    """{kind: splits} of the first ``folds`` of five folds, for each of :data:`KINDS`.

    Each kind divides the slices into parts of the same sizes (:func:`fortify.splits.grouped_split`) and keeps
    together nothing, near-duplicates (found with the ``thresholds`` of
    :func:`fortify.splits.near_duplicate_groups`) or patients.
    """
    slices = study.slices
    found = near_duplicate_groups(slices, **(thresholds or {}))
    together = dict(zip(KINDS, (np.arange(len(slices)), found, slices.patients), strict=True))
    return {
        kind: [grouped_split(slices.labels, own, seed=fold) for fold in range(folds)]
        for kind, own in together.items()
    }


def unseen_nodules(study: Study, *, most: int, seed: int = 0) -> np.ndarray:
    """At most ``most`` nodules of the patients' first fold's test set, drawn at random, a slice of each.

    It is the slice with the largest mask. Positions in ``study.slices``, sorted.
    """
    test = grouped_split(study.slices.labels, study.slices.patients, seed=0)["test"]
    largest = study.nodules.iloc[test].sort_values("area_px", kind="stable").groupby("nodule").tail(1).index
    return np.sort(np.random.default_rng(seed).permutation(np.sort(largest))[:most])


def group_agreement(
    study: Study, folds: Mapping[str, Sequence[Mapping[str, np.ndarray]]], **thresholds: float
) -> pd.DataFrame:
    """How well near-duplicate groups stand in for the known patients, and what each kind of fold lets
    through.

    A row a kind: ``precision`` and ``recall`` of "these two slices are of one patient" over all pairs (of the
    groups alone), and the shares of test slices whose patient, and whose nodule, is in training.
    """
    found = near_duplicate_groups(study.slices, **thresholds)
    rows = []
    for kind, splits in folds.items():
        precision, recall = np.nan, np.nan
        if kind == "near-duplicate groups":
            precision, recall = pairwise_agreement(found, study.slices.patients)
        shares = {}
        for name, own in (
            ("patient_in_training", study.slices.patients),
            ("nodule_in_training", study.codes),
        ):
            seen = [np.isin(own[split["test"]], own[split["train"]]) for split in splits]
            shares[name] = np.concatenate(seen).mean()
        rows.append({"folds": kind, "precision": precision, "recall": recall, **shares})
    return pd.DataFrame(rows)


def size_logits(study: Study, splits: Sequence[Mapping[str, np.ndarray]], *, split: str) -> pd.DataFrame:
    """What the size of a nodule says, without its image: logits of a logistic regression of one number.

    One model for each of :data:`FEATURES`, of its logarithm, fitted on training and validation slices.
    Columns as :func:`fortify.scoring.logits`; ``seed`` is the fold.
    """
    from sklearn.linear_model import LogisticRegression  # here: its import takes a second
    from sklearn.preprocessing import StandardScaler

    parts = []
    for feature, name in FEATURES.items():
        x = np.log(study.nodules[[feature]].to_numpy())
        for fold, own in enumerate(splits):
            known, test = np.concatenate([own["train"], own["val"]]), own["test"]
            scaler = StandardScaler().fit(x[known])
            fitted = LogisticRegression().fit(scaler.transform(x[known]), study.slices.labels[known])
            found = fitted.decision_function(scaler.transform(x[test]))
            about = {"model": name, "split": split, "seed": fold, "attack": "clean", "index": test}
            about |= {"label": study.slices.labels[test], "logit_0": np.zeros(len(test)), "logit_1": found}
            parts.append(pd.DataFrame(about))
    return pd.concat(parts, ignore_index=True)


def trained_on_folds(
    study: Study,
    splits: Sequence[Mapping[str, np.ndarray]],
    regime: Regime,
    *,
    arch: str,
    seed: int,
    **options: Any,
) -> list[nn.Module]:
    """A network for each fold; ``options`` are :func:`fortify.transfer.networks.trained`'s."""
    slices = study.slices
    return [
        trained(arch, slices.subset(own["train"]), slices.subset(own["val"]), regime, seed=seed, **options)
        for own in splits
    ]


def with_frozen_features(
    study: Study, splits: Sequence[Mapping[str, np.ndarray]], backbone: nn.Module
) -> list[nn.Module]:
    """For each fold a linear classifier of the features of ``backbone``, which stays as it is.

    ``backbone`` is a classifier of other classes, whose last linear layer is left out; the new one is fitted
    on training and validation slices (:class:`fortify.baselines.FrozenFeatures`), with the same C for all.
    """
    device, features = next(backbone.parameters()).device, headless(backbone)
    models = []
    for own in splits:
        known = study.slices.subset(np.concatenate([own["train"], own["val"]]))
        images, classes = to_tensor(known.images), len(known.class_names)
        fitted = FrozenFeatures(features, images, known.labels, num_classes=classes, penalty=_PENALTY)
        models.append(fitted.to(device).eval())
    return models


def clean_logits(
    study: Study, splits: Sequence[Mapping[str, np.ndarray]], models: Sequence[nn.Module], **ids: str
) -> pd.DataFrame:
    """Logits of each fold's model on all of its test slices (:func:`fortify.scoring.logits`).

    ``ids``: ``model_name`` and ``split``; ``seed`` is the fold.
    """
    parts = []
    for fold, (own, model) in enumerate(zip(splits, models, strict=True)):
        images, labels = to_tensor(study.slices.images[own["test"]]), study.slices.labels[own["test"]]
        parts.append(logits(model, {"clean": images}, labels, index=own["test"], seed=fold, **ids))
    return pd.concat(parts, ignore_index=True)


def on_folds(
    study: Study,
    folds: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
    regimes: Mapping[str, Regime],
    eyes: Mapping[str, nn.Module],
    **options: Any,
) -> tuple[pd.DataFrame, dict[str, list[nn.Module]], dict[str, list[nn.Module]]]:
    """What is tested on the second dataset: (logits, networks, frozen features).

    Networks of ``regimes`` ("normal" and "adversarial") trained from scratch, the normal ones on every kind
    of ``folds`` (:func:`nodule_folds`), the others on the patients' alone. There too a linear classifier of
    what each of ``eyes``, classifiers of other classes, makes of the slices ("features, <name>"), and the
    size alone. ``options`` are :func:`trained_on_folds`'. Logits are of all test slices, clean; the networks
    {name: one a fold} are those of the patients' folds.
    """
    patients = folds["patients"]
    normal = {kind: trained_on_folds(study, own, regimes["normal"], **options) for kind, own in folds.items()}
    networks = {"normal": normal["patients"]}
    for name in [name for name in regimes if name != "normal"]:
        networks[name] = trained_on_folds(study, patients, regimes[name], **options)
    frozen = {f"features, {name}": with_frozen_features(study, patients, eye) for name, eye in eyes.items()}
    tested = [(kind, "normal", own) for kind, own in normal.items()]
    tested += [("patients", name, own) for name, own in (networks | frozen).items() if name != "normal"]
    seen = [clean_logits(study, folds[kind], own, split=kind, model_name=name) for kind, name, own in tested]
    seen.append(size_logits(study, patients, split="patients"))
    return pd.concat(seen, ignore_index=True), networks, frozen


def attacked_nodules(
    study: Study,
    splits: Sequence[Mapping[str, np.ndarray]],
    models: Mapping[str, Sequence[nn.Module]],
    attacks: Sequence[Attack],
    *,
    images: int,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows, logits) of the models of each fold under ``attacks``, crafted on themselves.

    ``models`` {name: one a fold}. Attacked are at most ``images`` test slices of a fold: whole nodules drawn
    at random, of each class about as many slices. Rows are :func:`fortify.scoring.evaluate`'s, logits those
    of the clean slices and of every one attacked with a budget; ``seed`` of both is the fold.
    """
    rows, seen, rng = [], [], np.random.default_rng(seed)
    for fold, own in enumerate(splits):
        index = _whole_nodules(study, own["test"], images, rng)
        x, y = to_tensor(study.slices.images[index]), study.slices.labels[index]
        for name, of_folds in models.items():
            ids = {"index": index, "model_name": name, "split": "patients", "seed": fold}
            keep = {attack.name: attack for attack in attacks if not attack.minimum_norm}
            found, kept = evaluate(of_folds[fold], x, y, attacks, keep=keep, **ids)
            rows.append(found)
            seen.append(logits(of_folds[fold], {"clean": x} | kept, y, **ids))
    return pd.concat(rows, ignore_index=True), pd.concat(seen, ignore_index=True)


def _whole_nodules(study, test, most, rng):
    """At most ``most`` of the ``test`` slices, or one nodule of each class: whole nodules, classes alike."""
    codes, labels, taken = study.codes[test], study.slices.labels[test], []
    for label in np.unique(labels):
        order = rng.permutation(np.unique(codes[labels == label]))
        sizes = np.cumsum([(codes == code).sum() for code in order])
        taken += order[sizes <= max(most / len(np.unique(labels)), sizes[0])].tolist()
    return np.sort(test[np.isin(codes, taken)])


def nodule_accuracies(
    study: Study, seen: pd.DataFrame, *, units: Iterable[str] = ("slice", "nodule")
) -> pd.DataFrame:
    """Accuracy of each model by slice and by nodule, of all and of those of 7 to 14 mm, from logits ``seen``.

    A nodule's decision is that of the mean logit over its slices in the test set
    (:func:`fortify.evaluation.scan_decisions`). Columns: ``unit``, ``nodules`` (which sizes), then
    :func:`fortify.evaluation.accuracy_table`'s, whose intervals by groups draw whole patients. Folds are
    pooled.
    """
    diameters, names = study.nodules.diameter_mm.to_numpy(), study.slices.class_names
    parts = []
    for unit in units:
        groups = np.arange(len(study.slices)) if unit == "slice" else study.codes
        patients = study.patient_of(unit=unit)
        for subset, (low, high) in _SUBSETS.items():
            inside = (diameters >= low) & (diameters <= high)
            own = seen[inside[seen["index"]]]
            if own.empty:
                continue
            decided = scan_decisions(own, groups)
            table = accuracy_table(decided, class_names=names, groups=patients, pooled=())
            parts.append(
                table.assign(unit=unit, nodules=subset, patients=len(np.unique(patients[decided["index"]])))
            )
    table = pd.concat(parts, ignore_index=True)
    first = ["unit", "nodules"]
    return table[~table.attack.isin(("combined", "worst"))][[*first, *table.columns.drop(first)]]


def gains_over_size(study: Study, seen: pd.DataFrame) -> pd.DataFrame:
    """How many more of the same nodules each model of the ``patients`` folds classifies than the diameter
    does.

    In points, by slice and by nodule, all and of 7 to 14 mm, with intervals that draw whole patients
    (:func:`fortify.evaluation.headline_gains`).
    """
    diameters, parts = study.nodules.diameter_mm.to_numpy(), []
    for unit in ("slice", "nodule"):
        groups = np.arange(len(study.slices)) if unit == "slice" else study.codes
        for subset, (low, high) in _SUBSETS.items():
            inside = (diameters >= low) & (diameters <= high)
            own = seen[inside[seen["index"]] & seen.split.eq("patients") & seen.attack.eq("clean")]
            decided = scan_decisions(own, groups)
            table = headline_gains(decided, study.patient_of(unit=unit), reference=FEATURES["diameter_mm"])
            parts.append(table.assign(unit=unit, nodules=subset))
    return pd.concat(parts, ignore_index=True)


def attacked_table(
    study: Study, rows: pd.DataFrame, seen: pd.DataFrame, *, eps_255: float, cw_l2: float
) -> pd.DataFrame:
    """Table 1's columns by slice, and by nodule where every slice was attacked: one row a (unit, model,
    attack).

    ``rows`` and ``seen`` are :func:`attacked_nodules`'.
    """
    names, parts = study.slices.class_names, []
    decided = at_budget(rows, eps_255=eps_255, cw_l2=cw_l2)
    for unit, own in (("slice", decided), ("nodule", scan_decisions(seen, study.codes))):
        table = accuracy_table(own, class_names=names, groups=study.patient_of(unit=unit))
        parts.append(table.assign(unit=unit))
    return pd.concat(parts, ignore_index=True)


def nodule_layout(table: pd.DataFrame) -> pd.DataFrame:
    """A display table of :func:`nodule_accuracies`, by nodule: a line a model, columns for both sizes."""
    own = table[table.unit.eq("nodule")]
    lines = own[["model", "split"]].rename(columns={"split": "folds"}).drop_duplicates()
    for subset in own.nodules.unique():
        part = own[own.nodules.eq(subset)].set_index(["model", "split"])
        part = part.loc[list(lines.itertuples(index=False, name=None))]
        lines[f"{subset}: accuracy, k/n"] = [_cell(row) for row in part.itertuples()]
        lines[f"{subset}: balanced"] = part.balanced_accuracy.map(whole_percent).tolist()
    return lines


def attack_layout(table: pd.DataFrame) -> pd.DataFrame:
    """A display table of :func:`attacked_table`, by slice: a line a model, a column an attack."""
    own = table[table.unit.eq("slice") & table.attack.ne("worst")]
    cells = own.assign(cell=[_cell(row) for row in own.itertuples()])
    return crossed(cells, index="model", columns="attack", missing="not run")


def _cell(row):
    """Accuracy in %, its interval by patients and k/n."""
    interval = f"{100 * row.group_low:.0f}–{100 * row.group_high:.0f}"
    return f"{whole_percent(row.accuracy)} ({interval}) {row.k}/{row.n}"
