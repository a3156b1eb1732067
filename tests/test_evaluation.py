"""Properties of the per-example table and of the numbers derived from it, on tables done by hand."""

import itertools
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from fortify import evaluation, intervals
from fortify.files import write_csv

LABELS = (0, 1, 2, 1)
NAMES = ("benign", "malignant", "normal")
# Predictions on four images: 7 of 12 attacked copies are right, and one image under all three attacks.
HAND = {"clean": (0, 1, 2, 0), "pgd": (0, 0, 0, 1), "fgsm": (0, 1, 0, 0), "cw": (0, 1, 2, 0)}


def make_rows(
    predictions=HAND, *, model="normal", split="random", seed=0, protocol="adaptive", eps=1.0, l2=0.5
):
    """Rows of four images, per entry of ``predictions``; a CW that succeeds is at norm ``l2``."""
    rows = []
    for attack, predicted in predictions.items():
        for index, (label, prediction) in enumerate(zip(LABELS, predicted, strict=True)):
            success = prediction != label
            moved = attack != "clean" and (attack != "cw" or success)
            budget = {"clean": 0.0, "cw": np.nan}.get(attack, eps)
            where = "adaptive" if attack == "clean" else protocol
            norms = (1.0, l2) if moved else (0.0, 0.0)
            rows.append(
                (
                    model,
                    split,
                    seed,
                    attack,
                    where,
                    budget,
                    10 + index,
                    label,
                    prediction,
                    0.9,
                    success,
                    *norms,
                )
            )
    return pd.DataFrame(rows, columns=evaluation.COLUMNS)


def summary(rows, *, eps_255=1, cw_l2=1):
    table = evaluation.accuracy_table(
        evaluation.at_budget(rows, eps_255=eps_255, cw_l2=cw_l2), class_names=NAMES
    )
    return table.set_index(["split", "model", "protocol", "attack"]).sort_index(
        level=[0, 1, 2], sort_remaining=False
    )


def test_hand_computed_accuracies():
    table = summary(make_rows()).loc["random", "normal", "adaptive"]
    assert list(table.index) == ["clean", "pgd", "fgsm", "cw", "combined", "worst"]
    counts = {a: (int(r.k), int(r.n)) for a, r in table.iterrows()}
    assert counts == {
        "clean": (3, 4), "pgd": (2, 4), "fgsm": (2, 4), "cw": (3, 4), "combined": (7, 12), "worst": (1, 4),
    }  # fmt: skip
    assert (table.accuracy == table.k / table.n).all()
    assert table.images.tolist() == [4] * 6
    assert table.seeds.tolist() == [1] * 6 and table.sd.isna().all()


def test_cluster_interval_knows_what_belongs_together():
    correct = np.repeat([True, False], 50)
    alone = intervals.cluster_interval(correct, np.arange(100))
    assert alone == pytest.approx(intervals.wilson(50, 100), abs=0.03)
    scans = intervals.cluster_interval(correct, np.repeat(np.arange(10), 10))
    assert scans[1] - scans[0] > 2 * (alone[1] - alone[0]), "ten slices of a scan are not ten scans"
    assert intervals.cluster_interval(correct, np.zeros(100)) == (0.5, 0.5)
    for right, groups in ((np.ones(3, bool), 100), (np.zeros(0, bool), 0)):
        with pytest.raises(ValueError, match="one group an image"):
            intervals.cluster_interval(right, np.arange(groups))
    none, every = (
        intervals.cluster_interval(np.full(20, right), np.arange(20) // 2) for right in (False, True)
    )
    assert intervals.cluster_interval(np.ones(9, bool), np.arange(9), confidence=0.5) == intervals.wilson(
        9, 9, 0.5
    )
    assert none == intervals.wilson(0, 10) and every == intervals.wilson(10, 10), (
        "no spread seen is not no spread"
    )
    assert intervals.cluster_interval(correct, np.arange(100), seed=3) == intervals.cluster_interval(
        correct, np.arange(100), seed=3
    )


@pytest.mark.parametrize(
    ("k", "n", "said"),
    [(0, 9, "0"), (9, 9, "100"), (817, 820, "99.6"), (1, 2, "50"), (1, 1000, "0.1"), (9999, 10000, "99.99")],
)
def test_per_cent_are_whole_but_100_is_all_and_0_none(k, n, said):
    assert intervals.whole_percent(k / n) == said


def test_the_cluster_interval_leaves_out_as_much_on_either_side():
    correct, groups = np.arange(60) % 3 == 0, np.arange(60) // 4
    low, high = intervals.cluster_interval(correct, groups)
    assert intervals.cluster_interval(~correct, groups) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    as_published = {"seed": 0, "draws": 2000, "confidence": 0.95}
    assert intervals.cluster_interval(correct, groups, **as_published) == (low, high)
    narrow = intervals.cluster_interval(correct, groups, confidence=0.5)
    assert low < narrow[0] < correct.mean() < narrow[1] < high


def test_the_interval_of_a_gain_draws_groups_and_knows_its_sign():
    more = np.repeat([1, 0, 0, -1, 1], 20)
    alone = intervals.gain_interval(more, np.arange(100))
    scans = intervals.gain_interval(more, np.repeat(np.arange(5), 20))
    assert alone[0] < 0.2 < alone[1] and scans[1] - scans[0] > 2 * (alone[1] - alone[0])
    less = intervals.gain_interval(-more, np.arange(100))
    assert less == pytest.approx((-alone[1], -alone[0]), abs=1e-12)
    # A share and a gain that have no -1 are one thing.
    assert intervals.gain_interval(more.clip(0), np.arange(100)) == intervals.cluster_interval(
        more == 1, np.arange(100)
    )
    apart = intervals.wilson(0, 10)[1]
    for same, expected in ((0, (-apart, apart)), (1, (1 - apart, 1.0)), (-1, (-1.0, apart - 1))):
        assert intervals.gain_interval(np.full(20, same), np.arange(20) // 2) == pytest.approx(expected)


def test_a_gain_is_of_the_same_images_over_all_seeds():
    other = {"clean": (0, 1, 2, 1), "pgd": (0, 1, 2, 0), "fgsm": (1, 0, 2, 1), "cw": (0, 1, 2, 0)}
    parts = [make_rows(), make_rows(other, model="adversarial")]
    parts += [part.assign(seed=1) for part in parts]
    static = make_rows(other, model="adversarial", protocol="static").query("attack != 'clean'")
    rows = evaluation.at_budget(pd.concat([*parts[::-1], static]), eps_255=1, cw_l2=1)
    table = evaluation.paired_gain(rows, np.arange(99)).set_index(["split", "attack"])
    assert table.index.tolist() == [("random", attack) for attack in ("clean", "pgd", "fgsm", "cw")]
    assert table[["n", "k_normal", "k_adversarial", "gain_percent"]].values.tolist() == [
        [8, 6, 8, 25.0],
        [8, 4, 6, 25.0],
        [8, 4, 4, 0.0],
        [8, 6, 6, 0.0],
    ]
    assert (table.low_percent < table.gain_percent).all() and (table.gain_percent < table.high_percent).all()
    # Clean the last of the four images alone is gained, twice.
    assert (table.low_percent["random", "clean"], table.high_percent["random", "clean"]) == tuple(
        100 * x for x in intervals.gain_interval(np.tile([0, 0, 0, 1], 2), np.tile(np.arange(4), 2))
    )
    back = evaluation.paired_gain(rows, np.arange(99), models=("adversarial", "normal"))
    assert back.gain_percent.tolist() == (-table.gain_percent).tolist()
    with pytest.raises(ValueError, match="same images"):
        evaluation.paired_gain(rows, np.arange(99), models=("a", "b"))
    with pytest.raises(ValueError, match="same images"):
        evaluation.paired_gain(rows[rows.seed.eq(0) | rows.model.eq("normal")], np.arange(99))


def test_the_interval_by_groups_is_the_cluster_interval_of_each_cell():
    rows = evaluation.at_budget(make_rows(), eps_255=1, cw_l2=1)
    groups = np.arange(99) // 3  # images 10 and 11 are of one, 12 to 14 of another
    table = evaluation.accuracy_table(rows, class_names=NAMES, groups=groups)
    plain = evaluation.accuracy_table(rows, class_names=NAMES)
    assert plain.group_low.isna().all() and plain.group_high.isna().all()
    ours = ["group_low", "group_high"]
    pd.testing.assert_frame_equal(table.drop(columns=ours), plain.drop(columns=ours))
    for key, part in rows.groupby(["split", "model", "protocol", "attack"]):
        found = table[(table[["split", "model", "protocol", "attack"]] == list(key)).all(axis=1)]
        right = part.prediction.eq(part.label).to_numpy()
        expected = intervals.cluster_interval(right, groups[part["index"]])
        assert tuple(found[ours].iloc[0]) == expected
    assert (table.group_low <= table.accuracy).all() and (table.accuracy <= table.group_high).all()


def test_recalls_are_per_class_and_their_mean_is_the_balanced_accuracy():
    table = summary(make_rows()).loc["random", "normal", "adaptive"]
    recalls = ["recall_benign", "recall_malignant", "recall_normal"]
    assert table.loc["clean", recalls].tolist() == [1, 0.5, 1]
    assert table.loc["combined", recalls].tolist() == pytest.approx([1, 3 / 6, 1 / 3])
    assert table.loc["worst", recalls].tolist() == [1, 0, 0]
    assert np.allclose(table.balanced_accuracy, table[recalls].mean(axis=1), atol=0)


def test_a_class_without_images_has_no_recall_and_no_weight():
    rows = make_rows()
    line = summary(rows[rows.label.ne(2)]).loc["random", "normal", "adaptive", "clean"]
    assert np.isnan(line.recall_normal)
    assert line.balanced_accuracy == 0.75  # (1 + 1/2) / 2


def test_wilson_is_the_published_interval():
    # Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), Table I, method 3.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (k, n), interval in published.items():
        assert intervals.wilson(k, n) == pytest.approx(interval, abs=5e-5)
    assert intervals.wilson(5, 10, confidence=0.5)[0] > intervals.wilson(5, 10)[0]


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_wilson_is_scipys(confidence):
    for n in (1, 2, 7, 164, 1640):
        for k in {0, 1, n // 3, n - 1, n}:
            theirs = binomtest(k, n).proportion_ci(confidence_level=confidence, method="wilson")
            assert intervals.wilson(k, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-14)


@pytest.mark.parametrize(("k", "n"), [(5, 4), (-1, 4), (0, 0), (1.5, 4), (1, 4.5), (float("nan"), 4)])
def test_wilson_refuses_what_is_no_count(k, n):
    with pytest.raises(ValueError, match="whole numbers with 0 <= k <= n"):
        intervals.wilson(k, n)


def test_intervals_count_an_image_once():
    table = summary(pd.concat([make_rows(), make_rows(seed=1)])).loc["random", "normal", "adaptive"]
    assert table.n.tolist() == [8, 8, 8, 8, 24, 8]
    assert (table.loc["combined", "low"], table.loc["combined", "high"]) == intervals.wilson(
        2, 4
    )  # 14/24 of 4
    assert (table.loc["clean", "low"], table.loc["clean", "high"]) == intervals.wilson(3, 4)


def test_spread_over_seeds_is_the_sample_standard_deviation():
    other = make_rows({**HAND, "clean": (0, 1, 2, 1), "cw": (0, 1, 2, 1)}, seed=1)
    table = summary(pd.concat([make_rows(), other])).loc["random", "normal", "adaptive"]
    assert table.loc["clean", "accuracy"] == 7 / 8
    assert table.loc["clean", "sd"] == pytest.approx(np.std([0.75, 1.0], ddof=1))
    assert table.loc["pgd", "sd"] == 0
    assert table.seeds.tolist() == [2] * 6


def test_combined_and_worst_need_all_attacks_of_the_table():
    both = pd.concat([make_rows(), make_rows().assign(model="adversarial")], ignore_index=True)
    table = summary(both[both.attack.ne("cw") | both.model.eq("normal")]).loc["random"]
    assert list(table.loc["adversarial", "adaptive"].index) == ["clean", "pgd", "fgsm"]
    assert list(table.loc["normal", "adaptive"].index) == ["clean", "pgd", "fgsm", "cw", "combined", "worst"]
    alone = summary(make_rows().query("attack != 'cw'")).loc["random", "normal", "adaptive"]
    assert alone.n["combined"] == 8, "those that are there are all"


def test_cw_at_a_budget_switches_exactly_at_its_norm():
    rows = make_rows({**HAND, "cw": (1, 1, 2, 0)}, l2=0.5)
    for budget, prediction in ((0.5, 1), (np.nextafter(0.5, 0), 0), (0, 0), (9, 1)):
        at = evaluation.at_budget(rows, eps_255=1, cw_l2=budget)
        assert at[at.attack.eq("cw")].prediction.tolist() == [prediction, 1, 2, 0]


def test_a_failed_cw_is_the_clean_prediction_at_every_budget():
    rows = make_rows()
    for budget in (0, 0.4, 100):
        at = evaluation.at_budget(rows, eps_255=1, cw_l2=budget).set_index(["attack", "index"]).prediction
        assert at.loc["cw"].tolist()[:3] == at.loc["clean"].tolist()[:3]
    changed = rows.copy()
    changed.loc[rows.attack.eq("cw") & rows.label.eq(2), "l2"] = 0.1
    with pytest.raises(ValueError, match="1 of 16 rows are of a failed minimum-norm attack"):
        evaluation.check_rows(changed)


def test_a_missing_budget_names_those_there_are():
    rows = pd.concat([make_rows(eps=0.5), make_rows(eps=4.0).query("attack in ('fgsm', 'pgd')")])
    assert len(evaluation.at_budget(rows, eps_255=4, cw_l2=1)) == 16
    with pytest.raises(ValueError, match=r"eps_255=1 for .*'fgsm'.*available: 0\.5, 4\."):
        evaluation.at_budget(rows, eps_255=1, cw_l2=1)


def test_a_budget_that_one_model_lacks_is_missing():
    rows = pd.concat([make_rows(eps=1.0), make_rows(model="adversarial", eps=4.0)])
    with pytest.raises(ValueError, match=r"eps_255=1 for \('adversarial', .*available: 4\."):
        evaluation.at_budget(rows, eps_255=1, cw_l2=1)


def test_only_the_asked_budget_is_kept():
    weaker = make_rows({"pgd": LABELS, "fgsm": LABELS}, eps=0.5)
    rows = pd.concat([weaker, make_rows()])  # indices repeat, as after any concatenation of files
    assert summary(rows).equals(summary(make_rows()))
    assert summary(rows, eps_255=0.5).loc["random", "normal", "adaptive", "pgd"].k == 4


def test_clean_rows_and_the_normal_models_attacks_serve_the_static_protocol():
    adversarial = make_rows({**HAND, "pgd": (1, 1, 1, 1)}, model="adversarial")
    static = make_rows({a: LABELS for a in ("pgd", "fgsm", "cw")}, model="adversarial", protocol="static")
    table = summary(pd.concat([make_rows(), adversarial, static]))
    assert table.loc["random", "normal", "static"].equals(table.loc["random", "normal", "adaptive"])
    assert table.loc["random", "adversarial", "static"].k.tolist() == [3, 4, 4, 4, 12, 4]
    assert table.loc["random", "adversarial", "adaptive", "pgd"].k == 2
    assert "static" not in summary(pd.concat([make_rows(), adversarial])).index.get_level_values("protocol")
    other = summary(pd.concat([make_rows(), adversarial, static, make_rows(split="grouped")]))
    assert "static" not in other.loc["grouped"].index.get_level_values("protocol"), "nothing static there"


def test_confusion_counts_true_rows_and_predicted_columns():
    matrices = evaluation.confusion(evaluation.at_budget(make_rows(), eps_255=1, cw_l2=1), num_classes=3)
    assert list(matrices) == [("random", "normal", "adaptive", a) for a in ("clean", "pgd", "fgsm", "cw")]
    assert matrices["random", "normal", "adaptive", "pgd"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert all(m.sum() == 4 and m.dtype == np.int64 for m in matrices.values())


def test_the_curve_starts_at_the_clean_accuracy():
    stronger = make_rows({"pgd": (1, 0, 0, 0), "fgsm": (0, 0, 0, 0)}, eps=4.0)
    table = evaluation.curve(pd.concat([stronger, make_rows()])).set_index(["attack", "eps_255"])
    assert list(table.index) == list(itertools.product(("pgd", "fgsm"), (0, 1, 4)))
    assert table.k.tolist() == [3, 2, 0, 3, 2, 1]
    assert (table.low["pgd", 1], table.high["pgd", 1]) == intervals.wilson(2, 4)
    small = evaluation.curve(make_rows(eps=0.25)).set_index(["attack", "eps_255"])
    assert list(small.index) == list(itertools.product(("pgd", "fgsm"), (0, 0.25)))


def test_the_curves_intervals_by_groups_are_those_of_its_cells():
    groups = np.array([0] * 10 + [0, 0, 1, 1])
    rows = pd.concat([make_rows(), make_rows(seed=1)], ignore_index=True)
    points = evaluation.curve(rows, groups=groups).set_index(["attack", "eps_255"])
    own = rows[rows.attack.eq("pgd")]
    expected = intervals.cluster_interval(~own.success.to_numpy(), groups[own["index"]])
    assert (points.group_low["pgd", 1], points.group_high["pgd", 1]) == expected
    assert evaluation.curve(rows)[["group_low", "group_high"]].isna().all(axis=None)


def test_a_history_knows_its_budget_and_the_epoch_that_was_kept():
    history = pd.DataFrame(
        {"epoch": [1, 2, 3, 4], "val_accuracy": 0.5, "val_robust_accuracy": [0, 0.1, 0.3, 0.2]}
    )
    history["selected"] = history.epoch.eq(3)
    of = {"split": "random", "seed": 1, "epochs": 10, "train_eps_255": 16.0}
    of["train_recipe"] = {"epochs": 4, "eps_warmup": 0.5}
    robust = evaluation.training_history(history, model="adversarial", **of)
    assert robust.train_eps_255.tolist() == [8, 16, 16, 16] and (robust.epochs == 4).all()
    normal = evaluation.training_history(history, model="normal", **of)
    assert (normal.train_eps_255 == 0).all() and (normal.epochs == 10).all(), "its own recipe"
    at_once = evaluation.training_history(history, model="adversarial", **of | {"train_recipe": {}})
    assert (at_once.train_eps_255 == 16).all()
    kept = evaluation.kept_epochs(pd.concat([robust, normal]))
    assert kept.model.tolist() == ["adversarial", "normal"] and kept.epoch.tolist() == [3, 3]
    assert kept.val_robust_accuracy.tolist() == [0.3, 0.3] and kept.train_eps_255.tolist() == [16, 0]


def test_robustness_scores_by_hand():
    rows = pd.concat(
        [make_rows({**HAND, "cw": (1, 1, 0, 0)}, l2=0.25), make_rows({"pgd": (1, 0, 0, 0)}, eps=4.0)]
    )
    (line,) = evaluation.robustness_scores(rows).to_dict("records")
    assert line["mean_robust_accuracy"] == (2 / 4 + 0 / 4) / 2
    assert line["eps_grid"] == "1, 4"
    assert (line["cw_k"], line["cw_n"], line["cw_median_l2"]) == (
        2,
        3,
        0.25,
    )  # 1/4 is wrong already when clean
    assert line["cw_success"] == 2 / 3
    assert np.isnan(line["sd"])


def test_each_model_on_each_split_has_its_own_scores():
    """Two trainings, two splits, three seeds; right under PGD on 0 to 3 of four images."""
    rows, right = [], {"normal": (0, 1, 3), "adversarial": (2, 3, 3)}
    for split, norm in (("random", 0.25), ("grouped", 0.5)):
        for model, counts in right.items():
            for seed, k in enumerate(counts):
                pgd = [*LABELS[:k], *((label + 1) % 3 for label in LABELS[k:])]
                made = {"clean": LABELS, "pgd": pgd, "fgsm": LABELS, "cw": (1, 0, 0, 1)}
                factor = 1 if model == "normal" else 4
                rows.append(make_rows(made, model=model, split=split, seed=seed, l2=norm * factor))
    scores = evaluation.robustness_scores(pd.concat(rows))
    assert list(scores) == [
        "split", "model", "seeds", "mean_robust_accuracy", "sd",
        "eps_grid", "cw_median_l2", "cw_k", "cw_n", "cw_success",
    ]  # fmt: skip
    assert scores.split.tolist() == ["random", "random", "grouped", "grouped"]
    assert scores.model.tolist() == ["normal", "adversarial"] * 2
    assert scores.seeds.tolist() == [3] * 4 and scores.eps_grid.tolist() == ["1"] * 4
    assert scores.mean_robust_accuracy.tolist() == pytest.approx([4 / 12, 8 / 12] * 2)
    assert scores.sd.tolist() == pytest.approx([np.std(k, ddof=1) / 4 for k in right.values()] * 2)
    assert scores.cw_median_l2.tolist() == [0.25, 1.0, 0.5, 2.0]
    assert scores.cw_k.tolist() == [9] * 4 and scores.cw_n.tolist() == [12] * 4


def test_a_failed_cw_needs_an_infinite_norm():
    (line,) = evaluation.robustness_scores(make_rows({**HAND, "cw": (1, 1, 2, 0)})).to_dict("records")
    assert line["cw_median_l2"] == np.inf
    assert line["cw_k"] == 1


def test_scores_refuse_to_compare_different_budget_grids():
    rows = pd.concat([make_rows(eps=1.0), make_rows(model="adversarial", eps=2.0)])
    with pytest.raises(ValueError, match="one PGD budget grid"):
        evaluation.robustness_scores(rows)


def test_rows_survive_a_csv(tmp_path):
    rows = make_rows(l2=np.float64(np.float32(0.1)))
    write_csv(tmp_path / "rows.csv", rows)
    read = evaluation.read_rows(tmp_path / "rows.csv")
    pd.testing.assert_frame_equal(read, rows.astype(read.dtypes), rtol=1e-8)
    assert tuple(read.columns) == evaluation.COLUMNS
    evaluation.check_rows(read)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop(columns="l2"), r"\['l2'\] are missing"),
        (lambda rows: rows.assign(extra=1), r"\['extra'\] unknown"),
        (lambda rows: rows[list(rows.columns[::-1])], "in this order: model, split, seed, "),
        (
            lambda rows: rows.assign(label=rows.label + 0.5),
            "'label' must hold int64 in every row; .* float64",
        ),
        (lambda rows: rows.assign(success="maybe"), "'success' must hold bool .* reads as str"),
        (lambda rows: rows.assign(l2="far"), "'l2' must hold float64"),
        (lambda rows: rows.assign(split=None), "'split' must hold str"),
        (
            lambda rows: rows.assign(split=rows.split.where(rows.index > 0)),
            "'split' must hold str in every row",
        ),
    ],
)
def test_a_csv_that_is_no_table_is_refused(tmp_path, change, message):
    write_csv(tmp_path / "rows.csv", change(make_rows()))
    with pytest.raises(ValueError, match=message):
        evaluation.read_rows(tmp_path / "rows.csv")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "rows.csv").touch()
    with pytest.raises(ValueError, match="is empty"):
        evaluation.read_rows(tmp_path / "rows.csv")


def _set(rows, where, **values):
    rows = rows.copy()
    for column, value in values.items():
        rows.loc[where(rows), column] = value
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: pd.concat([r, r.tail(1)]), "1 of 17 rows repeat"),
        (lambda r: pd.concat([r, r.tail(1).assign(probability=0.8)]), "1 of 17 rows repeat"),
        (lambda r: r.iloc[:-1], "'cw'.* 3 images, not the 4 clean"),
        (lambda r: r[r.attack.ne("clean")], "not the 0 clean"),
        (
            lambda r: _set(r, lambda r: r.attack.eq("pgd"), attack="worst"),
            "4 of 16 rows name a summary where an attack belongs",
        ),
        (
            lambda r: _set(r, lambda r: r.attack.eq("pgd"), protocol="both"),
            "4 of 16 rows name an unknown protocol",
        ),
        (lambda r: _set(r, lambda r: r.attack.eq("clean"), protocol="static"), "4 of 16 rows are clean but"),
        (
            lambda r: _set(r, lambda r: r.attack.eq("cw") & r["index"].eq(r["index"].min()), eps_255=1.0),
            "1 of 16 rows have an eps_255, where others of their attack, a minimum-norm one, have none",
        ),
        (
            lambda r: _set(r, lambda r: r.attack.eq("pgd"), eps_255=-1.0),
            "4 of 16 rows are of an attack without an eps_255 above 0",
        ),
        (lambda r: r.assign(success=~r.success), "16 of 16 rows have a success"),
        (
            lambda r: _set(r, lambda r: r.index == 4, label=2, success=True),
            "rows give one image several labels",
        ),
    ],
)
def test_an_inconsistent_table_is_refused(change, message):
    evaluation.check_rows(make_rows())
    with pytest.raises(ValueError, match=message):
        evaluation.check_rows(change(make_rows()))


def test_reading_tables_takes_no_torch():
    code = "import sys, fortify.evaluation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_budgets_are_never_pooled_and_every_class_needs_its_name():
    rows = pd.concat([make_rows(), make_rows(eps=2.0).query("attack in ('fgsm', 'pgd')")], ignore_index=True)
    with pytest.raises(ValueError, match="several times under one attack, as at several budgets"):
        evaluation.accuracy_table(rows, class_names=NAMES)
    at = evaluation.at_budget(rows, eps_255=2, cw_l2=1)
    with pytest.raises(ValueError, match="class_names has 2 names, but the rows hold class 2"):
        evaluation.accuracy_table(at, class_names=NAMES[:2])
    assert evaluation.accuracy_table(at, class_names=NAMES).n.max() == 12


def test_a_new_attack_is_pooled_at_its_budget():
    rows = make_rows(HAND | {"bim": (0, 0, 0, 0)})
    larger = make_rows({"bim": (1, 0, 0, 0)}, eps=2.0)
    table = summary(pd.concat([rows, larger], ignore_index=True)).loc["random", "normal", "adaptive"]
    assert (table.k["bim"], table.n["bim"]) == (1, 4) and (table.k["combined"], table.n["combined"]) == (
        8,
        16,
    )
    assert set(evaluation.curve(pd.concat([rows, larger])).attack) == {"pgd", "fgsm", "bim"}


@pytest.mark.parametrize("budget", [{"eps_255": -1}, {"cw_l2": -1}, {"eps_255": float("nan")}])
def test_no_budget_is_below_nothing(budget):
    with pytest.raises(ValueError, match="eps_255 and cw_l2 must be at least 0"):
        summary(make_rows(), **budget)


def test_combined_pools_the_attacks_that_are_named():
    rows = evaluation.at_budget(make_rows(), eps_255=1, cw_l2=1)
    table = evaluation.accuracy_table(rows, class_names=NAMES, pooled=("pgd", "fgsm")).set_index("attack")
    assert (table.k["combined"], table.n["combined"]) == (table.k["pgd"] + table.k["fgsm"], 8)
    assert table.k["cw"] == 3, "counted by itself"


def logits_of(values, labels, *, attack="clean", model="normal", seed=0):
    """Logits of slices 0, 1, ... as :func:`fortify.scoring.logits` has them."""
    table = pd.DataFrame(values, columns=[f"logit_{c}" for c in range(len(values[0]))])
    about = {"model": model, "split": "random", "seed": seed, "attack": attack}
    table = table.assign(**about, index=range(len(table)), label=labels)
    return table[[*about, "index", "label", *table.columns[: len(values[0])]]]


GROUPS = (7, 7, 7, 3, 5, 5, 9)  # of the slices 0 to 6; 6 is not tested
CLEAN = [(0, 4, 0), (3, 0, 0), (0.5, 0, 0), (0, 0, 1), (2, 0, 2), (0, 0, 0)]
# Of group 7 two are class 1 and one is 0; 3 is a single slice; of group 5 either label is as frequent.
OF_SLICES = (1, 0, 1, 2, 2, 0)


def test_a_scan_is_decided_by_its_mean_logit():
    """By slice group 7 is two votes for class 0; its mean is 3.5, 4 and 0, thirds of it, for class 1."""
    table = evaluation.scan_decisions(logits_of(CLEAN, OF_SLICES), GROUPS).set_index("index")
    assert table.index.tolist() == [3, 5, 7], "a group without a slice in the test set is none"
    assert table.prediction.to_dict() == {7: 1, 3: 2, 5: 0}, "5: a tie of 0 and 2 is the first's"
    assert table.label.to_dict() == {7: 1, 3: 2, 5: 0}, "the most frequent, of equals the lowest"
    assert table.mixed.to_dict() == {7: True, 3: False, 5: True}


def test_scans_are_counted_as_slices_are():
    attacked = [(0, 0, 5), *CLEAN[1:]]
    seeds = [logits_of(CLEAN, OF_SLICES, seed=s) for s in (0, 1)]
    seeds.append(logits_of(attacked, OF_SLICES, attack="pgd"))
    seeds.append(logits_of(CLEAN, OF_SLICES, attack="pgd", seed=1))
    table = evaluation.accuracy_table(
        evaluation.scan_decisions(pd.concat(seeds), GROUPS), class_names=NAMES
    ).set_index("attack")
    clean, pgd = table.loc["clean"], table.loc["pgd"]
    assert (clean.k, clean.n, clean.images, clean.seeds) == (6, 6, 3, 2)
    assert (clean.low, clean.high) == intervals.wilson(3, 3), "a scan is counted once, whatever the seeds"
    assert (pgd.k, pgd.n) == (5, 6) and pgd.recall_malignant == 0.5
    assert pgd.balanced_accuracy == pytest.approx((1 + 0.5 + 1) / 3)


def test_gains_are_of_the_headline_attack_whatever_it_is_called():
    adversarial = make_rows({"clean": (0, 1, 2, 0), "pgd": (0, 0, 0, 1)}, model="adversarial")
    forest = make_rows({"clean": (0, 1, 2, 1), evaluation.BLACK_BOX: (1, 0, 0, 0)}, model="forest")
    rows = evaluation.at_budget(pd.concat([adversarial, forest]), eps_255=1, cw_l2=1)
    table = evaluation.headline_gains(rows, range(20)).set_index(["model", "attack"])
    assert table.gain_percent.to_dict() == {("forest", "clean"): 25.0, ("forest", "pgd"): -50.0}
    assert (table.k_adversarial.tolist(), table.k.tolist()) == ([3, 2], [4, 0])


def test_logits_are_read_as_they_were_written(tmp_path):
    table = logits_of(CLEAN, OF_SLICES)
    write_csv(tmp_path / "logits.csv", table)
    pd.testing.assert_frame_equal(evaluation.read_logits(tmp_path / "logits.csv"), table, check_dtype=False)
    for wrong in (table.drop(columns="label"), table.iloc[:, :6], table.assign(more=1)):
        write_csv(tmp_path / "logits.csv", wrong)
        with pytest.raises(ValueError, match="is no table of logits"):
            evaluation.read_logits(tmp_path / "logits.csv")
