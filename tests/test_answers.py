"""The short answers of notebooks 2 to 5: their numbers are the tables', of any splits and seeds."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from fortify import answers, evaluation

NAMES = ("benign", "malignant", "normal")
LABELS = np.repeat([0, 1, 2], [2, 10, 8])
GROUPS = np.arange(20)  # every slice is a group of its own
SOURCE = "20 slices at 112 px"


def rows_of(wrong, *, model="normal", split="random", seed=0, budgets=(1, 4), static=False):
    """Rows of twenty images; ``wrong``: {"clean" or (attack, budget): how many, from the last image on}."""
    parts = []
    kinds = ["clean", *itertools.product(("pgd", "fgsm"), budgets), ("cw", np.nan)]
    if static:
        kinds += [("static", 4)]
    for kind in kinds:
        attack, eps = ("clean", 0.0) if kind == "clean" else kind
        missed = wrong.get("cw" if attack == "cw" else kind, 0)
        bad = np.arange(20) >= 20 - missed
        part = pd.DataFrame({"index": np.arange(20), "label": LABELS})
        part["prediction"] = np.where(bad, (LABELS + 1) % 3, LABELS)
        part["success"], part["l2"], part["linf_255"] = (
            bad,
            np.where(bad, 0.5, 0.0) * (attack != "clean"),
            0.0,
        )
        where = "static" if attack == "static" else "adaptive"
        attack = "pgd" if attack == "static" else attack
        of = {"model": model, "split": split, "seed": seed, "attack": attack, "protocol": where}
        parts.append(part.assign(**of, eps_255=eps, probability=0.9))
    return evaluation.typed(pd.concat(parts, ignore_index=True)[list(evaluation.COLUMNS)])


NORMAL = {"clean": 4, ("pgd", 1): 9, ("pgd", 4): 18, ("fgsm", 1): 8, ("fgsm", 4): 12, "cw": 20}
ROBUST = {"clean": 5, ("pgd", 1): 5, ("pgd", 4): 7, ("fgsm", 4): 6, ("static", 4): 6, "cw": 20}


def tables(rows, eps_255=4):
    at = evaluation.at_budget(rows, eps_255=eps_255, cw_l2=1.0)
    return at, evaluation.accuracy_table(at, class_names=NAMES, groups=GROUPS)


def row_of(accuracy, model, attack, split="random"):
    own = accuracy[accuracy.model.eq(model) & accuracy.attack.eq(attack) & accuracy.split.eq(split)]
    return own[own.protocol.eq("adaptive")].iloc[0]


def interval(row):
    return f"95 % interval by groups {100 * row.group_low:.0f} to {100 * row.group_high:.0f} %"


def no_phantoms(text):
    return answers.PHANTOMS not in text and text.startswith("**Short answer of this run**\n\n")


def test_the_rarest_and_the_largest_class_are_of_those_that_have_slices():
    assert answers.rarest(LABELS, NAMES) == "benign" and answers.rarest([1, 1, 2], NAMES) == "normal"
    assert answers.largest(LABELS, NAMES) == ("malignant", 0.5)


@pytest.mark.parametrize("source", [SOURCE, "procedural phantoms, 20 slices"])
def test_the_baselines_answer_is_its_table(source):
    _, accuracy = tables(rows_of(NORMAL))
    about = {"rare": "normal", "largest": ("malignant", 0.5), "source": source}
    text = answers.baseline(accuracy, split="random", related=(13, 20), **about)
    row = row_of(accuracy, "normal", "clean")
    assert f"**80 %** of the clean test slices correctly (16 of 20; {interval(row)})" in text
    assert (row.k, row.n) == (16, 20) and row.recall_normal == 0.5
    assert "*Normal* is the rarest class. The network classifies 50 % of its slices correctly." in text
    assert "Always answering *malignant* would be correct for 50 %" in text
    assert "65 % of the test slices belong to a group that also has slices in training" in text
    assert no_phantoms(text) is (source == SOURCE)
    apart = answers.baseline(accuracy, split="grouped", related=(0, 20), **about)
    assert (
        "No test slice belongs to a group that has slices in training" in apart
        and "On the grouped split" in apart
    )


def test_a_class_without_test_slices_is_left_out_of_the_answer():
    _, accuracy = tables(rows_of(NORMAL))
    accuracy = accuracy.assign(recall_benign=np.nan)
    about = {"rare": "benign", "largest": ("malignant", 0.5), "source": SOURCE}
    text = answers.baseline(accuracy, split="random", related=(0, 20), **about)
    assert "rarest" not in text and " nan " not in text


def attacked(wrong, **changes):
    rows = rows_of(wrong, **changes)
    scores = evaluation.robustness_scores(rows)
    about = {"eps_255": 4, "largest": 0.5, "pixels": 100, "source": SOURCE}
    return answers.attacks(tables(rows)[1], evaluation.curve(rows), scores, **about)


def test_the_attacks_answer_is_its_tables():
    text, row = attacked(NORMAL), row_of(tables(rows_of(NORMAL))[1], "normal", "pgd")
    assert f"PGD at 4/255 leaves **10 %** of the test slices correct (2 of 20; {interval(row)})" in text
    assert "Without an attack 80 % are" in text and "FGSM, a single step, leaves 40 %." in text
    assert "the largest class would be correct for 50 %" in text, "PGD leaves less"
    assert "At 4/255 PGD breaks at least half" in text, "11 of 16 are left at 1/255"
    assert "CW breaks 16 of the 16 slices that are correct when clean." in text
    assert "L2 of 0.5, as much as 13 grey levels in every pixel" in text and no_phantoms(text)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({**NORMAL, ("pgd", 1): 12}, "At the smallest budget tried, 1/255, PGD breaks at least half"),
        ({**NORMAL, ("pgd", 4): 5}, "Even at 4/255 PGD breaks fewer than half"),
        (dict.fromkeys(NORMAL, 20), "The network classifies no clean slice correctly"),
    ],
)
def test_where_half_is_broken_depends_on_the_curve(wrong, said):
    text = attacked(wrong)
    assert said in text and " nan " not in text
    assert ("largest class" in text) is (wrong[("pgd", 4)] > 10)


def test_a_cw_that_finds_little_has_no_median():
    text = attacked({**NORMAL, "cw": 6})
    assert "CW breaks 2 of the 16 slices that are correct when clean." in text and "inf" not in text


def both(normal=NORMAL, robust=ROBUST, **where):
    parts = [rows_of(normal, **where), rows_of(robust, model="adversarial", static=True, **where)]
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(
    ("robust", "said"),
    [
        (ROBUST, "is not clear: the difference, **-5 points**, could be chance"),
        ({**ROBUST, "clean": 20}, "The price of robust training is **80 points**"),
        ({**ROBUST, "clean": 0}, "Beside normal training it costs no clean accuracy: it gains **20 points**"),
    ],
)
def test_the_price_of_robust_training_is_the_paired_gain(robust, said):
    at, accuracy = tables(both(robust=robust))
    gains = evaluation.paired_gain(at, GROUPS)
    points = evaluation.curve(rows_of(robust, model="adversarial"))
    about = {"split": "random", "eps_255": 4, "rare": "malignant", "source": SOURCE}
    text = answers.adversarial_training(accuracy, points, gains, **about)
    row = gains[gains.attack.eq("clean")].iloc[0]
    assert f"{said} (95 % interval by groups {row.low_percent:+.0f} to {row.high_percent:+.0f})" in text
    pgd, clean = (row_of(accuracy, "adversarial", attack) for attack in ("pgd", "clean"))
    assert (
        f"**65 %** of the test slices correctly under PGD at 4/255 ({pgd.k} of 20; {interval(pgd)})" in text
    )
    assert "The normally trained one keeps 10 %." in text
    assert (
        f"On clean slices it classifies {100 * clean.accuracy:.0f} % correctly, and normal training 80 %."
        in text
    )
    recalls = [f"{100 * part.recall_malignant:.0f} %" for part in (clean, pgd)]
    words = (
        "*Malignant* is the rarest class. The network classifies {} of its slices correctly when clean, "
        "and {} under PGD."
    )
    assert words.format(*recalls) in text
    assert "the easier test, leaves 70 % correct." in text and "largest budget" not in text
    narrow = answers.adversarial_training(accuracy, points, gains, **about | {"eps_255": 1})
    assert "At 4/255, the largest budget tried, PGD leaves 65 % correct." in narrow


def answer_of(rows, simple=None):
    at, accuracy = tables(rows)
    ahead = pd.DataFrame(columns=["split", "attack", "model", "gain_percent", "low_percent", "high_percent"])
    if simple is not None:
        at = pd.concat([at, tables(simple)[0]], ignore_index=True)
        ahead = evaluation.headline_gains(at[at.model.ne("normal")], GROUPS)
    gains = evaluation.paired_gain(at[at.model.isin(["normal", "adversarial"])], GROUPS)
    return accuracy, gains, ahead, answers.results(
        accuracy, gains, ahead, eps_255=4, rare="benign", source=SOURCE
    )  # fmt: skip


def test_the_results_answer_has_both_splits_and_pools_their_seeds():
    other = {**ROBUST, ("pgd", 4): 11, "clean": 8}
    rows = pd.concat([both(), both(robust=other, seed=1), both(robust=other, split="grouped")])
    accuracy, gains, _, text = answer_of(rows)
    parts = text.split("**Grouped split**")
    assert len(parts) == 2 and "**Random split**" in parts[0]
    assert "; 2 trainings of each kind:" in parts[0] and "; one training of each kind:" in parts[1]
    for split, part in zip(("random", "grouped"), parts, strict=True):
        pgd, normal = (row_of(accuracy, model, "pgd", split) for model in ("adversarial", "normal"))
        words = f"classifies **{100 * pgd.accuracy:.0f} %** of the test slices correctly ({interval(pgd)}), "
        assert words + f"and normal training {100 * normal.accuracy:.0f} %. The difference is " in part
        more = gains[gains.split.eq(split) & gains.attack.eq("pgd")].iloc[0]
        assert (
            f"is {more.gain_percent:+.0f} points (95 % interval by groups {more.low_percent:+.0f} to " in part
        )
        row = gains[gains.split.eq(split) & gains.attack.eq("clean")].iloc[0]
        assert f"{abs(row.gain_percent):.0f} points**" in part
        clean = row_of(accuracy, "adversarial", "clean", split)
        recall = f"{100 * clean.recall_benign:.0f} %"
        assert f"*Benign* is the rarest class. The network classifies {recall} of its slices" in part
    assert "simple classifier" not in text, "none was run"


def test_one_split_is_answered_alone():
    text = answer_of(both(split="grouped"))[-1]
    assert "**Grouped split**" in text and "**Random split**" not in text and no_phantoms(text)


def test_a_simple_classifier_that_is_ahead_is_named_with_its_lead():
    rows = [rows_of({**ROBUST, "clean": k, ("pgd", 4): 12}, model=name) for name, k in (("a", 0), ("b", 3))]
    _, _, ahead, text = answer_of(both(), pd.concat(rows, ignore_index=True))
    best = ahead[ahead.model.eq("a") & ahead.attack.eq("clean")].iloc[0]
    assert best.gain_percent == pytest.approx(25)
    between = f"95 % interval by groups {best.low_percent:+.0f} to {best.high_percent:+.0f}"
    lead = f"The best, *a*, leads by 25 points ({between})."
    assert f"2 simple classifiers are ahead of it on clean slices. {lead}" in text
    assert "No simple classifier is a point or more ahead of it under attack." in text
    _, _, ahead, alone = answer_of(both(), rows[1])
    assert "A simple classifier, *b*, is ahead of it on clean slices by 10 points" in alone
    low = ahead[ahead.attack.eq("clean")].low_percent.iloc[0]
    assert ("which could be chance" in alone) is bool(low <= 0)
    behind = answer_of(both(), rows_of({**ROBUST, "clean": 9, ("pgd", 4): 12}, model="c"))[-1]
    assert "No simple classifier is a point or more ahead of it on clean slices or under attack." in behind


def test_no_answer_shows_a_number_that_is_none():
    for text in (attacked(NORMAL), answer_of(both())[-1]):
        assert not re.search(r"\b(nan|inf|None)\b", text)


def test_a_point_is_one():
    assert [answers._points(gain, "+") for gain in (0.6, -1.2, 3, 0.2)] == [
        "+1 point",
        "-1 point",
        "+3 points",
        "+0 points",
    ]
