"""The table under Table 1: recalls, scans and baselines, and what its caption may say."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from fortify import classes, evaluation, intervals, scoring
from fortify.attacks import PGD
from fortify.baselines import evaluate_baselines, fit_baselines
from fortify.scoring import evaluate


def accuracies(*, seeds=1):
    """Accuracy tables by slice and by scan, as evaluation makes them: both trainings and two baselines."""
    attacks = {"normal": "pgd", "adversarial": "pgd", "thumbnail": "pgd", "forest": evaluation.BLACK_BOX}
    found = []
    for n in (160, 40):
        rows = [
            (model, kind, (10 * i + (5 if kind == "clean" else 2)) * n // 40)
            for i, (model, attack) in enumerate(attacks.items())
            for kind in ("clean", attack)
        ]
        table = pd.DataFrame(rows, columns=["model", "attack", "k"])
        table = table.assign(n=n, accuracy=table.k / n, split="random", protocol="adaptive", seeds=seeds)
        bounds = [intervals.wilson(k, n) for k in table.k]
        table[["low", "high"]] = bounds
        table[["group_low", "group_high"]] = [(a / 2, b) for a, b in bounds] if n == 160 else np.nan
        recalls = {"recall_benign": np.nan, "recall_malignant": 0.25}
        found.append(table.assign(balanced_accuracy=table.accuracy / 2, **recalls))
    return found


NAMED = ["forest", "none", "thumbnail"]  # the second has no rows
GAINS = pd.DataFrame(
    [
        ("random", "clean", "forest", 12.34, 5.06, 20.3),
        ("random", "clean", "thumbnail", 1.0, -3.0, 4.0),
        ("random", "pgd", "forest", -40.0, -50.0, -30.0),
        ("random", "pgd", "thumbnail", 0.0, -1.0, 1.0),
        ("grouped", "pgd", "forest", 99.0, 98.0, 100.0),
    ],
    columns=["split", "attack", "model", "gain_percent", "low_percent", "high_percent"],
)
FACTS = {"eps_255": 4, "scans": (3, 40), "source": "phantoms", "profile": "test"}


def test_classes_stand_by_slice_and_by_scan_the_baselines_last():
    by_slice, by_scan = accuracies()
    table = classes.classes_table(by_slice, by_scan, split="random", baselines=NAMED)
    models = ["normal", "adversarial", "forest", "thumbnail"]
    assert table.model.tolist() == [model for model in models for _ in range(4)]
    assert table.unit.tolist() == ["slice", "slice", "scan", "scan"] * 4
    assert set(table.attack[table.model.eq("forest")]) == {"clean", evaluation.BLACK_BOX}
    shown = classes.classes_layout(table)
    assert list(shown) == [
        "Classifier", "decides by", "clean (%)", "attacked (%)", "balanced", "recall benign",
        "recall malignant",
    ]  # fmt: skip
    low, high = (100 * bound for bound in intervals.wilson(20, 160))
    assert shown.iloc[0].tolist() == [
        "normal", "slice", f"12 ({low / 2:.0f}–{high:.0f}) 20/160", shown.iloc[0, 3], "6 / 2", "– / –",
        "25 / 25",
    ]  # fmt: skip
    low, high = (100 * bound for bound in intervals.wilson(12, 40))
    assert shown.iloc[3].tolist()[:4] == [
        "", "scan", shown.iloc[3, 2], f"30 ({low:.0f}–{high:.0f}) 12/40"
    ]  # fmt: skip
    lacking = by_scan[~(by_scan.model.eq("normal") & by_scan.attack.eq("pgd"))]
    with pytest.raises(ValueError, match="random split's table of classes lacks normal/scan/pgd"):
        classes.classes_table(by_slice, lacking, split="random")


def test_the_files_hold_the_table_of_the_rows_and_logits(tmp_path, phantoms, images, labels, model):
    """A network and two baselines, from their rows by image to the files."""
    part = np.arange(0, 120, 4)
    slices = dataclasses.replace(phantoms, groups=phantoms.patients)
    simple, _ = fit_baselines(["largest class", "soft histogram"], slices.subset(part + 1))
    attacks, about = [PGD(4, steps=2)], {"index": part, "split": "random"}
    rows, logits = evaluate_baselines(simple, images[part], labels[part], attacks, queries=5, **about)
    rows, logits = [rows], [logits]
    for name in ("normal", "adversarial"):
        own = {**about, "model_name": name}
        found, kept = evaluate(model, images[part], labels[part], attacks, keep={"pgd": attacks[0]}, **own)
        rows.append(found)
        logits.append(scoring.logits(model, {"clean": images[part], **kept}, labels[part], **own))
    predictions = evaluation.at_budget(pd.concat(rows), eps_255=4, cw_l2=1)
    names = ["soft histogram", "largest class", "frozen features"]
    facts = {"split": "random", "baselines": names, "eps_255": 4, "profile": "test"}
    paths = classes.write_classes(tmp_path, predictions, pd.concat(logits), slices, **facts)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"table1_random_classes.{kind}" for kind in ("csv", "md", "tex")
    ]
    table = pd.read_csv(paths["csv"])
    assert table.model.unique().tolist() == ["normal", "adversarial", "soft histogram", "largest class"]
    own = pd.concat(rows).query("model == 'soft histogram' and attack == 'pgd'")
    line = table.set_index(["model", "unit", "attack"]).loc["soft histogram", "slice", "pgd"]
    assert (line.k, line.n) == ((~own.success).sum(), len(part))
    assert line.recall_normal_percent == pytest.approx(100 * (~own.success)[own.label.eq(2)].mean())
    md, tex = (paths[kind].read_text(encoding="utf-8") for kind in ("md", "tex"))
    for row in table.itertuples():
        assert f"{row.k}/{row.n} |" in md and f"{row.k}/{row.n} &" in tex
    assert "not installed: frozen features." in md and r"\label{tab:table1_random_classes}" in tex


def test_the_caption_says_which_baseline_is_ahead_and_how_surely():
    table = classes.classes_table(*accuracies(), split="random", baselines=["thumbnail", "forest"])

    def words(gains, **more):
        return classes.classes_caption(table, gains, split="random", **FACTS, **more)

    said = words(GAINS)
    assert said.startswith(
        "Clean, ahead of the adversarially trained network: forest by 12 points (5 to 20). "
        "Clean, ahead of it, but not beyond chance: thumbnail by 1.0 points (-3 to 4). "
        "Attacked within 4/255, no baseline is ahead of the adversarially trained network. "
        "Attacked within 4/255, behind it, but not beyond chance: thumbnail by 0.0 points (-1 to 1). "
    )
    assert "Without a gradient (forest): the strongest" in said and "Of these 40, 3 hold slices" in said
    assert "Left out" not in said
    assert "Left out, for the extra `pretrained` is not installed: x and y." in words(
        GAINS, missing=["x", "y"]
    )
    behind = GAINS.assign(gain_percent=-13.4, low_percent=-28.8, high_percent=1.5)
    behind = words(behind[behind.model.eq("thumbnail")])
    assert "behind it, but not beyond chance: thumbnail by 13 points (-2 to 29)." in behind
    none = words(GAINS.assign(gain_percent=-1.0))
    assert none.count("no baseline is ahead of the adversarially trained network") == 2
