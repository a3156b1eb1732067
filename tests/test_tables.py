"""Table 1: the printed numbers, ours beside them, and the same strings in every format."""

import numpy as np
import pandas as pd
import pytest

from fortify import evaluation, intervals, tables

# The paper's Table 1, typed a second time: normal and adversarial training on clean, PGD, FGSM, CW, combined.
PAPER = {"normal": "93.12 43.08 45.9 40.9 43.29", "adversarial": "95.0 93.2 95.0 92.8 93.6"}
ATTACKS = ("clean", "pgd", "fgsm", "cw", "combined")
CORRECT = {"normal": (149, 72, 75, 67, 214), "adversarial": (152, 150, 152, 149, 451)}


def accuracy(*, splits=("random",), seeds=1, protocols=("adaptive",)):
    """An accuracy table of 160 images, as evaluation makes them."""
    rows = []
    for split in splits:
        for protocol in protocols:
            for model, counts in CORRECT.items():
                for attack, k in zip(ATTACKS, counts, strict=True):
                    n = 480 if attack == "combined" else 160
                    low, high = intervals.wilson(round(k * 160 / n), 160)
                    sd = np.nan if seeds == 1 else 0.0123
                    rows.append((split, model, protocol, attack, k, n, k / n, low, high, 160, seeds, sd))
    names = "split model protocol attack k n accuracy low high images seeds sd"
    table = pd.DataFrame(rows, columns=names.split()).assign(group_low=np.nan, group_high=np.nan)
    return table.assign(minimum_norm=table.attack.eq("cw"))


WORDS = {"split": "random", "eps_255": 1, "cw_l2": 0.5, "source": "100 % phantoms_of & #1", "profile": "test"}


@pytest.mark.parametrize("model", PAPER)
def test_printed_values_are_the_papers(model):
    assert [str(v) for v in tables.PRINTED.loc[model]] == PAPER[model].split()
    assert tuple(tables.PRINTED.columns) == ATTACKS


def test_table1_holds_ours_in_percent_beside_the_printed_value():
    table = tables.table1(accuracy(), split="random")
    assert list(zip(table.model, table.attack, strict=True)) == [(m, a) for m in PAPER for a in ATTACKS]
    assert table.k.tolist() == [*CORRECT["normal"], *CORRECT["adversarial"]]
    assert np.allclose(table.accuracy_percent, 100 * table.k / table.n, rtol=1e-12)
    assert [str(v) for v in table.printed] == " ".join(PAPER.values()).split()
    clean = table.iloc[0]
    assert (clean.low_percent, clean.high_percent) == pytest.approx(
        [100 * v for v in intervals.wilson(149, 160)], rel=1e-12
    )


def test_table1_takes_its_split_and_protocol_only():
    both = accuracy(splits=("grouped", "random"), protocols=("static", "adaptive"))
    both.loc[~(both.split.eq("random") & both.protocol.eq("static")), "k"] = -1
    table = tables.table1(both, split="random", protocol="static")
    assert table.k.tolist() == [*CORRECT["normal"], *CORRECT["adversarial"]]


def test_an_incomplete_table_names_what_is_missing():
    some = accuracy()
    some = some[~(some.model.eq("normal") & some.attack.isin(["cw", "combined"]))]
    with pytest.raises(ValueError, match=r"random split, adaptive.* lacks normal/combined, normal/cw\."):
        tables.table1(some, split="random")
    with pytest.raises(ValueError, match="grouped split"):
        tables.table1(accuracy(), split="grouped")


def test_the_layout_is_the_papers_in_whole_per_cent():
    shown = tables.layout1(tables.table1(accuracy(), split="random"))
    assert list(shown.columns) == ["Training", "", "Clean", "PGD", "FGSM", "CW", "Combined"]
    assert shown.iloc[0].tolist() == ["normal", "accuracy (%)", "93", "45", "47", "42", "45"]
    assert shown.iloc[1].tolist()[:3] == ["", "95 % interval", "88–96"]
    assert shown.iloc[2].tolist() == ["", "k/n", "149/160", "72/160", "75/160", "67/160", "214/480"]
    assert shown.iloc[3].tolist() == ["", "printed (%)", *PAPER["normal"].split()]
    assert shown["Training"].tolist() == ["normal", "", "", "", "adversarial", "", "", ""]


def test_a_spread_is_shown_where_there_are_seeds():
    shown = tables.layout1(tables.table1(accuracy(seeds=3), split="random"))
    assert shown.iloc[3].tolist() == ["", "sd over seeds", *["1"] * 5]
    assert "sd over seeds" not in tables.layout1(tables.table1(accuracy(), split="random")).to_string()


def test_intervals_by_groups_are_shown_where_there_are_any(tmp_path):
    known = accuracy().assign(group_low=0.25, group_high=0.98765)
    shown = tables.layout1(tables.table1(known, split="random"))
    assert shown.iloc[1].tolist() == ["", "95 %, by groups", *["25–99"] * 5]
    assert shown.iloc[2].tolist()[:2] == ["", "k/n"]
    assert "by groups" not in tables.layout1(tables.table1(accuracy(), split="random")).to_string()
    for table, said in ((known, True), (accuracy(), False)):
        text = tables.write_table1(tmp_path, table, **WORDS)["md"].read_text(encoding="utf-8")
        assert ("a bootstrap of whole groups" in text) is said
        assert ("95 % Wilson intervals" in text) is not said


def test_the_caption_says_what_a_reader_must_know():
    def words(protocol, seeds):
        own = accuracy(protocols=(protocol,), seeds=seeds)
        table = tables.table1(own, split="random", protocol=protocol)
        return tables.caption(table, **WORDS, protocol=protocol)

    text = words("adaptive", 1)
    for said in (
        "random split", "adaptive attacks (crafted on the model under test)", "Linf budget 1/255",
        "L2 budget 0.5, image in [0, 1]", "1 seed;", "95 % Wilson", "each image counted once",
        "Images: 100 % phantoms_of & #1.", "Profile: test.", "Menasagi et al.",
    ):  # fmt: skip
        assert said in text
    assert "3 seeds;" in words("static", 3)
    assert "crafted on the normally trained model" in words("static", 3)


def test_the_three_files_hold_the_same_table(tmp_path):
    paths = tables.write_table1(tmp_path, accuracy(), **WORDS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"table1_random.{s}" for s in ("csv", "md", "tex")]
    csv, md, tex = (paths[s].read_text(encoding="utf-8") for s in ("csv", "md", "tex"))
    pd.testing.assert_frame_equal(
        pd.read_csv(paths["csv"]),
        tables.table1(accuracy(), split="random").drop(columns="minimum_norm"),
        rtol=1e-8,
    )
    assert csv.startswith(
        "model,attack,k,n,accuracy_percent,low_percent,high_percent,"
        "group_low_percent,group_high_percent,sd_percent,seeds,printed\n"
    )
    for cell in ("149/160", "451/480", "93", "93.12", "95.0"):
        assert f"| {cell} |" in md
        assert f"& {cell} " in tex
    assert "| 88–96 |" in md and "& 88--96 &" in tex
    assert "100 % phantoms_of & #1" in md and r"100 \% phantoms\_of \& \#1" in tex


def test_a_static_table_does_not_replace_the_adaptive_one(tmp_path):
    table = accuracy(protocols=("adaptive", "static"))
    tables.write_table1(tmp_path, table, **WORDS)
    paths = tables.write_table1(tmp_path, table, protocol="static", **WORDS)
    assert paths["tex"].name == "table1_random_static.tex"
    assert len(list(tmp_path.iterdir())) == 6


def test_markdown_is_a_table_of_equal_rows():
    shown = tables.layout1(tables.table1(accuracy(), split="random"))
    lines = tables.to_markdown(shown).splitlines()
    assert len(lines) == 2 + len(shown)
    assert lines[1] == "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    assert {line.count("|") for line in lines} == {8}
    assert r"a\|b" in tables.to_markdown(pd.DataFrame({"x": ["a|b"], "y": ["c"]}))


def test_latex_uses_booktabs_and_escapes():
    shown = tables.layout1(tables.table1(accuracy(), split="random"))
    text = tables.to_latex(shown, label="tab:one")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{llrrrrr}", r"\label{tab:one}"):
        assert text.count(rule) == 1
    assert r"95 \% interval" in text
    assert "–" not in text
    assert text.count(r" \\") == 1 + len(shown)


def test_text_fits_a_terminal_and_is_aligned():
    shown = tables.layout1(tables.table1(accuracy(seeds=3), split="random"))
    title = tables.caption(tables.table1(accuracy(seeds=3), split="random"), **WORDS)
    text = tables.to_text(shown, title=title)
    assert max(map(len, text.splitlines())) <= 100
    assert " ".join(text.split("\n\n")[0].split()) == title
    body = text.split("\n\n")[1].splitlines()
    assert len(body) == 2 + len(shown)
    assert len({len(line) for line in body}) == 1  # the last column is to the right


def test_text_wraps_cells_rather_than_lose_any():
    wide = pd.DataFrame({"a": ["x" * 50], "b": ["one two three four five"], "c": ["1"]})
    text = tables.to_text(wide, title="t", width=40)
    assert max(map(len, text.splitlines())) <= 40
    assert text.count("x") == 50
    assert all(word in text for word in wide.b[0].split())


def small(**changes):
    """One split and both trainings, under two attacks, with an interval by groups."""
    table = accuracy().assign(balanced_accuracy=0.5, group_low=0.25, group_high=0.98765, **changes)
    worst = table[table.attack.eq("combined")].assign(attack="worst", k=1, n=8, accuracy=0.125)
    return pd.concat([table, worst], ignore_index=True)


def test_table_1_in_short_keeps_accuracy_interval_and_the_printed_value():
    brief = tables.brief1(tables.table1(small(), split="random"))
    assert brief.shape == (6, 6) and list(brief) == ["Training", "Clean", "PGD", "FGSM", "CW", "Combined"]
    kept = ["accuracy (%)", "95 %, by groups", "printed (%)"]
    assert brief.Training.tolist() == [f"{model}: {line}" for model in PAPER for line in kept]
    whole = tables.layout1(tables.table1(small(), split="random"))
    assert (
        brief.drop(columns="Training").values.tolist()
        == whole[whole[""].isin(kept)].iloc[:, 2:].values.tolist()
    )
    plain = tables.brief1(tables.table1(accuracy(), split="random"))
    assert plain.Training.tolist()[1] == "normal: 95 % interval"


def test_the_overview_is_a_line_a_split_and_training():
    both = pd.concat([small(), small(split="grouped").assign(accuracy=0.5)], ignore_index=True)
    both = pd.concat([both, both.assign(protocol="static", accuracy=0.0)], ignore_index=True)
    shown = tables.overview(both)
    assert list(shown) == ["Split", "Training", "clean (%)", "PGD (%)", "worst (%)", "balanced, clean / PGD"]
    assert shown.iloc[0].tolist()[:3] == ["random", "normal", "93 (25–99)"]
    assert shown.iloc[1].tolist()[4:] == ["12 (25–99)", "50 / 50"]
    assert [*zip(shown.Split, shown.Training, strict=True)] == [
        (split, model) for split in ("random", "grouped") for model in PAPER
    ]


def test_the_attacks_of_one_model_are_a_line_each_without_the_pooled_one():
    own = small().query("model == 'normal'")
    shown = tables.attack_layout(own)
    assert shown.attack.tolist() == ["clean", "PGD", "FGSM", "CW", "worst"] and "static attack" not in shown
    assert shown.iloc[0].tolist() == ["clean", "93 (25–99)", "149/160", "50"]
    static = own[own.attack.eq("pgd")].assign(protocol="static", accuracy=0.75)
    with_static = tables.attack_layout(pd.concat([own, static], ignore_index=True))
    assert with_static["static attack"].tolist() == ["–", "75", "–", "–", "–"]
    wilson = tables.attack_layout(own.assign(group_low=np.nan))
    assert wilson.iloc[0, 1] == "93 (88–96)"


def test_a_simple_classifier_counts_under_the_attack_it_can_be_given():
    own = accuracy().query("model == 'normal' and attack in ('clean', 'pgd')").assign(balanced_accuracy=0.5)
    other = own.assign(model="forest", attack=own.attack.replace("pgd", "black-box"), balanced_accuracy=0.4)
    shown = tables.baselines_layout(pd.concat([own, other], ignore_index=True))
    assert shown.Classifier.tolist() == ["normal", "forest"] and shown.attack.tolist() == ["PGD", "black-box"]
    assert shown["clean (%)"].tolist() == ["93 (88–96)"] * 2
    assert shown["balanced, clean / attacked"].tolist() == ["50 / 50", "40 / 40"]


def test_what_is_pooled_is_said_in_words():
    known = accuracy(seeds=2)
    assert tables.counted(known, split="random") == "160 test slices, 2 seeds pooled"
    assert tables.counted(accuracy(), split="random") == "160 test slices"
    several = known.assign(images=known.images.floordiv(2))
    assert tables.counted(several, split="random") == "160 predictions of 80 test slices, 2 seeds pooled"


def test_kept_epochs_are_a_line_a_split_and_training():
    kept = pd.DataFrame(
        [
            ("grouped", "adversarial", 0, 4, 0.5, 0.4, 36),
            ("grouped", "adversarial", 1, 10, 0.7, 0.6, 36),
            ("grouped", "normal", 0, 5, 0.6, np.nan, 36),
            ("random", "normal", 0, 36, 0.9, np.nan, 36),
        ],
        columns="split model seed epoch val_accuracy val_robust_accuracy epochs".split(),
    )
    shown = tables.kept_layout(kept)
    assert shown.values.tolist() == [
        ["random", "normal", 1, "36 of 36", "90", "–"],
        ["grouped", "normal", 1, "5 of 36", "60", "–"],
        ["grouped", "adversarial", 2, "4 to 10 of 36", "60", "50"],
    ]


def test_scores_have_six_columns():
    names = "split model seeds mean_robust_accuracy sd eps_grid cw_median_l2 cw_k cw_n cw_success".split()
    rows = [("random", "normal", 2, 0.504, 0.018, "1, 4", 0.9, 7, 9, 7 / 9)]
    rows += [("random", "adversarial", 1, 0.9, np.nan, "1, 4", np.inf, 0, 9, 0)]
    shown = tables.scores_layout(pd.DataFrame(rows, columns=names))
    assert shown.values.tolist() == [
        ["random", "normal", "50", "2", "0.9", "7/9"],
        ["random", "adversarial", "90", "–", "inf", "0/9"],
    ]


def test_latex_to_the_letter():
    shown = pd.DataFrame({"Tr_aining": ["a & b"], "": ["95 %"], "C#": ["1–2"]})
    text = tables.to_latex(shown, caption="100 % & x_1", label="tab:x")
    assert (
        text
        == r"""\begin{table}[t]
\centering
\caption{100 \% \& x\_1}
\label{tab:x}
\begin{tabular}{llr}
\toprule
Tr\_aining &  & C\# \\
\midrule
a \& b & 95 \% & 1--2 \\
\bottomrule
\end{tabular}
\end{table}
"""
    )
    assert r"\caption" not in tables.to_latex(shown) and r"\label" not in tables.to_latex(shown)


def test_markdown_to_the_letter():
    shown = pd.DataFrame({"x": ["a", "b"], "y": ["c", "d"], "z": [1, 2]})
    body = "| x | y | z |\n| --- | --- | ---: |\n| a | c | 1 |\n| b | d | 2 |\n"
    assert tables.to_markdown(shown) == body
    assert tables.to_markdown(shown, caption="Said.") == body + "\nSaid.\n"
    assert tables.to_markdown(shown, left=1).splitlines()[1] == "| --- | ---: | ---: |"


def test_text_to_the_letter():
    shown = pd.DataFrame({"ab": ["x"], "cd": ["one two three"], "e": ["12345"], "f": ["6"]})
    assert tables.to_text(shown, title="A title of words", width=27).splitlines() == [
        "A title of words",
        "",
        "ab  cd                 e  f",
        "--  -------------  -----  -",
        "x   one two three  12345  6",
    ]
    # One less: the widest column gives way by one, and what does not fit goes to the next line.
    assert tables.to_text(shown, title="A title of words that is long", width=26).splitlines() == [
        "A title of words that is",
        "long",
        "",
        "ab  cd                e  f",
        "--  ------------  -----  -",
        "x   one two       12345  6",
        "    three",
    ]


def test_the_caption_to_the_letter():
    table = tables.table1(accuracy(protocols=("static",), seeds=3), split="random", protocol="static")
    words = tables.caption(table, **WORDS, protocol="static")
    assert words == (
        "Accuracy on the test set in percent, random split, static attacks (crafted on the normally trained "
        "model). FGSM and PGD: Linf budget 1/255. CW: L2 budget 0.5, image in [0, 1]. Combined: pooled over "
        "the attacks. 3 seeds; 95 % Wilson intervals, each image counted once. Images: 100 % "
        "phantoms_of & #1. Profile: test. Printed: Menasagi et al., Fortifying Deep Learning Models Against "
        "Adversarial Threats using Adversarial Training, Table 1."
    )
    by_groups = tables.caption(table.assign(group_low_percent=1.0), **WORDS, protocol="static")
    assert by_groups == words.replace(
        "Wilson intervals, each image counted once.",
        "intervals, a bootstrap of whole groups of near-duplicates.",
    )


def test_a_static_table_of_several_seeds_is_that_in_its_files(tmp_path):
    table = accuracy(protocols=("adaptive", "static"), seeds=3)
    table.loc[table.protocol.eq("static"), "k"] += 1
    paths = tables.write_table1(tmp_path, table, protocol="static", **WORDS)
    md, tex = (paths[s].read_text(encoding="utf-8") for s in ("md", "tex"))
    own = tables.table1(table, split="random", protocol="static")
    words = tables.caption(own, **WORDS, protocol="static")
    assert words in md and r"\label{tab:table1_random_static}" in tex
    assert "150/160" in md and "150/160" in tex and "149/160" not in md
    assert pd.read_csv(paths["csv"]).k[0] == 150


def test_the_matrix_is_laid_out_in_its_order_one_split_alone():
    cells = [
        ("random", "normal", "clean", 0, 3, 4, 0.75, 0.30064, 0.95441),
        ("random", "adversarial", "clean", 0, 4, 4, 1.0, 0.5101, 1.0),
        ("random", "normal", "PGD 4/255", 9, 0, 4, 0.0, 0.0, 0.4899),
        ("random", "adversarial", "PGD 4/255", 9, 2, 4, 0.5, 0.15, 0.85),
        ("grouped", "normal", "clean", 0, 1, 4, 0.25, 0.04559, 0.69936),
    ]
    names = "split model evaluation order k n accuracy low high".split()
    shown = tables.matrix_layout(pd.DataFrame(cells, columns=names)[::-1], split="random")
    assert list(shown) == ["evaluation", "adversarial", "normal"]  # as they come
    assert shown.to_numpy().tolist() == [
        ["clean", "100.0 (51.0–100.0) 4/4", "75.0 (30.1–95.4) 3/4"],
        ["PGD 4/255", "50.0 (15.0–85.0) 2/4", "0.0 (0.0–49.0) 0/4"],
    ]


def test_a_new_attack_has_its_column():
    """It is in the rows: that is all that tables and captions need; the paper prints nothing for it."""
    both = accuracy()
    ours = pd.concat([both, both[both.attack.eq("pgd")].assign(attack="bim")])
    table = tables.table1(ours, split="random")
    shown = tables.layout1(table)
    assert list(shown.columns[2:]) == ["Clean", "PGD", "FGSM", "CW", "BIM", "Combined"]
    assert shown.BIM[shown[""].eq("printed (%)")].tolist() == ["–", "–"]
    assert "BIM, FGSM and PGD: Linf budget" in tables.caption(table, **WORDS)


def test_a_new_training_has_its_row(monkeypatch):
    monkeypatch.setitem(evaluation.TRAININGS, "trades", evaluation.Training("black", "x", table1=True))
    both = accuracy()
    ours = pd.concat([both, both[both.model.eq("adversarial")].assign(model="trades")])
    shown = tables.layout1(tables.table1(ours, split="random"))
    assert [name for name in shown.Training if name] == ["normal", "adversarial", "trades"]
    with pytest.raises(ValueError, match="lacks trades/clean"):
        tables.table1(both, split="random")
