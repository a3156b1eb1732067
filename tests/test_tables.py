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


def test_the_layout_is_the_papers_to_one_decimal():
    shown = tables.layout1(tables.table1(accuracy(), split="random"))
    assert list(shown.columns) == ["Training", "", "Clean", "PGD", "FGSM", "CW", "Combined"]
    assert shown.iloc[0].tolist() == ["normal", "accuracy (%)", "93.1", "45.0", "46.9", "41.9", "44.6"]
    assert shown.iloc[1].tolist()[:3] == ["", "95 % interval", "88.1–96.1"]
    assert shown.iloc[2].tolist() == ["", "k/n", "149/160", "72/160", "75/160", "67/160", "214/480"]
    assert shown.iloc[3].tolist() == ["", "printed (%)", *PAPER["normal"].split()]
    assert shown["Training"].tolist() == ["normal", "", "", "", "adversarial", "", "", ""]


def test_a_spread_is_shown_where_there_are_seeds():
    shown = tables.layout1(tables.table1(accuracy(seeds=3), split="random"))
    assert shown.iloc[3].tolist() == ["", "sd over seeds", *["1.2"] * 5]
    assert "sd over seeds" not in tables.layout1(tables.table1(accuracy(), split="random")).to_string()


def test_intervals_by_groups_are_shown_where_there_are_any(tmp_path):
    known = accuracy().assign(group_low=0.25, group_high=0.98765)
    shown = tables.layout1(tables.table1(known, split="random"))
    assert shown.iloc[2].tolist() == ["", "95 %, by groups", *["25.0–98.8"] * 5]
    assert shown.iloc[3].tolist()[:2] == ["", "k/n"]
    assert "by groups" not in tables.layout1(tables.table1(accuracy(), split="random")).to_string()
    for table, said in ((known, True), (accuracy(), False)):
        text = tables.write_table1(tmp_path, table, **WORDS)["md"].read_text(encoding="utf-8")
        assert ("; by groups: bootstrap of whole groups" in text) is said
    wide = tables.accuracy_layout(known.assign(balanced_accuracy=0.5))
    assert wide["95 %, by groups"].tolist() == ["25.0–98.8"] * 10


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
    for cell in ("149/160", "451/480", "93.1", "93.12", "95.0"):
        assert f"| {cell} |" in md
        assert f"& {cell} " in tex
    assert "| 88.1–96.1 |" in md and "& 88.1--96.1 &" in tex
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


def test_accuracy_layout_shows_every_group_in_percent():
    accuracy = pd.DataFrame(
        {
            "split": ["random"] * 2,
            "model": ["normal", "adversarial"],
            "protocol": ["adaptive", "static"],
            "attack": ["clean", "worst"],
            "k": [9, 1],
            "n": [10, 8],
            "accuracy": [0.9, 0.125],
            "low": [0.596, 0.0224],
            "high": [0.982, 0.4709],
            "group_low": [float("nan")] * 2,
            "group_high": [float("nan")] * 2,
            "seeds": [1, 1],
            "sd": [float("nan")] * 2,
            "balanced_accuracy": [0.5, 0.25],
            "recall_benign": [float("nan"), 0.0],
        }
    )
    shown = tables.accuracy_layout(accuracy)
    assert shown.iloc[0].tolist() == ["normal, adaptive", "clean", "90.0", "59.6–98.2", "9/10", "50.0", "nan"]
    assert shown.iloc[1]["k/n"] == "1/8" and "sd over seeds" not in shown
    assert "sd over seeds" in tables.accuracy_layout(accuracy.assign(seeds=2, sd=0.1))


def test_accuracy_layout_names_its_columns():
    table = accuracy(seeds=2).assign(balanced_accuracy=0.5, recall_benign=0.25)
    shown = tables.accuracy_layout(table)
    names = ["model, protocol", "attack", "accuracy", "95 % interval", "k/n", "sd over seeds", "balanced"]
    assert list(shown) == [*names, "recall benign"]
    assert shown.iloc[0].tolist() == [
        "normal, adaptive", "clean", "93.1", "88.1–96.1", "149/160", "1.2", "50.0", "25.0"
    ]  # fmt: skip


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
        "once.", "once; by groups: bootstrap of whole groups of near-duplicates."
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
