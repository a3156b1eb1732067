"""README's generated part says what the tables say, and leaves out what is not there."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from fortify.workflow import front
from fortify.workflow.aims import aims

KEYS = ["split", "model", "attack", "accuracy", "balanced_accuracy", "recall_benign"]


@pytest.fixture
def tables(tmp_path):
    """Table 1 of one network: on unseen groups it sees no benign slice."""
    rows = []
    for split, shift in (("random", 0.0), ("grouped", -0.3)):
        rows += [
            (split, "normal", "clean", 0.96 + shift, 0.9, 0.8),
            (split, "normal", "pgd", 0.36 + shift, 0, 0),
        ]
        benign = 0.8 if split == "random" else 0.0
        rows += [(split, "adversarial", attack, 0.95 + shift, 0.5, benign) for attack in ("clean", "pgd")]
    table = pd.DataFrame(rows, columns=KEYS).assign(protocol="adaptive", n=1097, k=1, seeds=5)
    table["group_low"], table["group_high"] = table.accuracy - 0.1, table.accuracy + 0.1
    folder = tmp_path / "laptop"
    (folder / "runs/random-s0").mkdir(parents=True)
    (folder / "runs/random-s0/03_attacks.json").write_text(json.dumps({"parameters": {"eps_255": 2}}))
    table.to_csv(folder / "accuracy.csv", index=False)
    return folder


def sections(*folders, benchmarks="nothing", strips=()):
    networks = [front.Network(f"net {i}", folder) for i, folder in enumerate(folders)]
    return front.sections(networks, Path("figures/laptop"), strips, Path(benchmarks))


def classes(folder, split, forest):
    """The table of classes with a histogram forest of that accuracy."""
    names = ["accuracy", "low", "high", "group_low", "group_high", "balanced_accuracy", "recall_benign"]
    for attack, shift in (("clean", 0), ("black-box", -20)):
        yield dict.fromkeys([f"{name}_percent" for name in names], forest + shift) | {
            "model": "histogram forest", "unit": "slice", "attack": attack, "k": 1, "n": 2,
        }  # fmt: skip


def lines(summary):
    return [
        [cell.strip() for cell in row.strip("|").split("|")] for row in summary.splitlines() if "|" in row
    ][2:]


def test_the_finding_is_what_the_tables_say(tables):
    first, second = re.split(r"(?<=\.) (?=On)", sections(tables)["finding"].strip())
    assert "under attack from 36 % to 95 %, and on unseen groups from 6 % to 65 %." in first
    assert second == "On unseen groups it recognises no benign slice."
    matrix = pd.DataFrame(
        [
            ("random", "normal", "clean", 0.98),
            ("random", "normal", "clamp alone", 0.38),
            ("random", "normal", "published PGD", 0.40),
        ],
        columns=["split", "model", "evaluation", "accuracy"],
    )
    matrix.to_csv(tables / "published_matrix.csv", index=False)
    third = "normal training on one random split from 98 % to 38 %, as far as that code's PGD does.\n"
    assert sections(tables)["finding"].endswith(third)
    matrix.assign(accuracy=[0.98, 0.38, 0.20]).to_csv(tables / "published_matrix.csv", index=False)
    assert sections(tables)["finding"].endswith("to 38 %. That code's PGD lowers it to 20 %.\n")


@pytest.mark.parametrize(
    ("forest", "said"),
    [
        (50, ""),
        (60, "about as many clean slices correctly as"),
        (80, "more clean slices correctly than"),
    ],
)
def test_a_histogram_is_named_where_it_does_as_well(tables, forest, said):
    for split in ("random", "grouped"):
        pd.DataFrame(classes(tables, split, forest)).to_csv(
            tables / f"table1_{split}_classes.csv", index=False
        )
    words = f", and a random forest on grey-level histograms ({forest} %) classifies {said} "
    words += "it does (65 %)."
    assert (words in sections(tables)["finding"]) == bool(said)
    assert ("histogram" in sections(tables)["finding"]) == bool(said)
    (row,) = [
        row for row in lines(sections(tables)["summary"]) if "histogram" in row[1] and row[0] != "random"
    ]
    assert row[2:] == [
        f"{forest} ({forest}–{forest})",
        f"{forest - 20} ({forest - 20}–{forest - 20})",
        *[f"{forest}"] * 2,
    ]


def test_robustness_has_its_price_beside_the_best_network_without_it(tables):
    for split in ("random", "grouped"):
        rows = [*classes(tables, split, 83), *classes(tables, split, 82)]
        for row, name in zip(rows, ["histogram forest"] * 2 + ["frozen features"] * 2, strict=True):
            row["model"] = name
        pd.DataFrame(rows).to_csv(tables / f"table1_{split}_classes.csv", index=False)
    assert (
        "and a random forest on grey-level histograms (83 %) and a linear head on frozen ImageNet "
        "features (82 %) classify more clean slices correctly than it does (65 %)."
    ) in sections(tables)["finding"]
    assert "price" not in sections(tables)["findings"]
    columns = ["split", "attack", "model", "k", "n", "gain_percent", "low_percent", "high_percent"]
    rows = [("grouped", "clean", "frozen features", 82, 100, 13.04, 5.6, 20.8)]
    rows += [("grouped", "pgd", "frozen features", 0, 100, -65, -70, -60)]
    rows += [("grouped", "pgd", "largest class", 51, 100, -13.4, -28.8, 1.5)]
    pd.DataFrame(rows, columns=columns).to_csv(tables / "table1_gains.csv", index=False)
    price = (
        "The price of robustness is that a linear head on frozen ImageNet features, which has none, "
        "classifies 13 points more of the clean slices correctly (95 % interval 6 to 21) "
        "([results](docs/results.md))."
    )
    said = sections(tables)["findings"]
    assert price in said
    one = "One answer for all slices gives 51 %. Adversarial training differs from that by {} points (95 % "
    one += "interval {} to {}{}). "
    assert one.format("+13", "-2", "+29", ", so this may be chance") + price in said
    rows[-1] = ("grouped", "pgd", "largest class", 51, 100, -13.4, -28.8, -4.5)
    pd.DataFrame(rows, columns=columns).to_csv(tables / "table1_gains.csv", index=False)
    assert one.format("+13", "+4", "+29", "") in sections(tables)["findings"]
    rows[-1] = ("grouped", "pgd", "largest class", 51, 100, 7.1, 3.2, 11.6)
    pd.DataFrame(rows, columns=columns).to_csv(tables / "table1_gains.csv", index=False)
    assert one.format("-7", "-12", "-3", "") in sections(tables)["findings"], "one answer is ahead"


def test_one_answer_and_the_frame_stand_beside_the_networks(tables):
    for split in ("random", "grouped"):
        rows = [row | {"model": "largest class"} for row in classes(tables, split, 51)]
        pd.DataFrame(rows).to_csv(tables / f"table1_{split}_classes.csv", index=False)
    assert "from 6 % to 65 %, where one answer for all slices gives 51 %. On" in sections(tables)["finding"]
    rows = [("frame", "random", 0.989, 7), ("frame", "grouped", 0.647, 7)]
    columns = ["classifier", "split", "accuracy", "seeds"]
    pd.DataFrame(rows, columns=columns).to_csv(tables / "leak_summary.csv")
    rows = [row | {"model": "nearest thumbnail"} for row in classes(tables, "random", 90)]
    for split in ("random", "grouped"):
        pd.DataFrame(rows).to_csv(tables / f"table1_{split}_classes.csv", index=False)
    words = "The frame of the slice alone, which shows no lung, gives 99 % and 65 % on 7 other splits"
    assert words in sections(tables)["findings"]
    pd.DataFrame(rows[:1], columns=columns).to_csv(tables / "leak_summary.csv")
    assert "frame" not in sections(tables)["findings"], "of one split nothing can be compared"


def test_an_aim_stands_beside_the_best_network_of_it(tables, tmp_path):
    other = tmp_path / "lungs"
    other.mkdir()
    table = pd.read_csv(tables / "accuracy.csv")
    table.assign(accuracy=table.accuracy + 0.02, balanced_accuracy=0.7).to_csv(other / "accuracy.csv")
    gains = [("grouped", "clean", "frozen features", 13.4), ("random", "clean", "frozen features", 1.0)]
    gains += [("grouped", "clean", "histogram forest", 14.0)]
    columns = ["split", "attack", "model", "gain_percent"]
    pd.DataFrame(gains, columns=columns).to_csv(tables / "table1_gains.csv", index=False)
    found = lines(aims({"laptop": tables, "lungs": other, "nobody": tmp_path}))
    assert [row[2:] for row in found] == [
        ["at least 95", "97", "`lungs`", "yes"],
        ["at least 93.6", "97", "`lungs`", "yes"],
        ["at least 80", "67", "`lungs`", "no"],
        ["at least 72", "67", "`lungs`", "no"],
        ["at least 65", "70", "`lungs`", "yes"],
        ["at least 25", "0", "`laptop`", "no"],
        ["at most 6", "13", "`laptop`", "no"],
    ], "a forest is no network"
    assert aims({"nobody": tmp_path}) == ""


def test_a_network_that_leads_comes_first_in_each_split(tables, tmp_path):
    leading = tmp_path / "resnet50"
    leading.mkdir()
    pd.read_csv(tables / "accuracy.csv").assign(n=492, seeds=3).to_csv(leading / "accuracy.csv", index=False)
    found = lines(sections(leading, tables)["summary"])
    assert [row[0] for row in found] == ["random"] * 4 + ["unseen groups"] * 4
    assert [row[1] for row in found[:4]] == [
        f"net {i}, {t} training" for i in (0, 1) for t in ("normal", "adversarial")
    ]
    assert (
        "random, net 0: 492 predictions, 3 seeds; random, net 1: 1,097 predictions"
        in sections(leading, tables)["summary"]
    )
    assert found[1][2:] == ["95 (85–105)", "95 (85–105)", "50", "80"]


def test_simple_classifiers_are_notebook_7s_until_their_own_table_is_there(tables):
    names = [there for _, there in front.SIMPLE.values() if there]
    rows = [(name, split, 0.9, 0.8, 0.95, 0.7) for name in names for split in ("random", "grouped")]
    columns = ["classifier", "split", "accuracy", "low", "high", "balanced_accuracy"]
    pd.DataFrame(rows, columns=columns).to_csv(tables / "leak_summary.csv", index=False)
    shown = sections(tables)["summary"]
    assert lines(shown)[2] == ["random", "look-up: nearest thumbnail", "90 (80–95)", "–", "70", "–"]
    assert "of ten other splits (notebook 7)" in shown and len(lines(shown)) == 10
    for split in ("random", "grouped"):
        pd.DataFrame(classes(tables, split, 60)).to_csv(tables / f"table1_{split}_classes.csv", index=False)
    assert "other splits" not in sections(tables)["summary"] and len(lines(sections(tables)["summary"])) == 6


def test_of_nothing_nothing_is_said(tmp_path):
    assert {text.strip() for text in sections(tmp_path).values()} == {""}


def test_the_figure_is_the_strip_until_there_is_one_of_its_own(tmp_path):
    strip, own = Path("published_protocol_random-s0.png"), Path("hero.png")
    assert "(figures/laptop/published_protocol_random-s0.png)" in sections(tmp_path, strips=[strip])["hero"]
    assert "(figures/laptop/hero.png)" in sections(tmp_path, strips=[own, strip])["hero"]


def test_findings_are_one_line_each_and_lead_somewhere():
    root = Path(__file__).parents[1]
    tables = root / "paper/tables/laptop"
    found = sections(tables, benchmarks=root / "benchmarks")["findings"].splitlines()
    assert len(found) == 5
    for line in found:
        links = re.findall(r"\]\(([^)]+)\)", line)
        assert line.startswith("- **") and links and all((root / link).is_file() for link in links)


def test_a_network_is_called_by_its_architecture_and_size(tmp_path):
    assert (
        front.Network.of_profile({"arch": "resnet_small", "size": 112}, tmp_path).name
        == "small ResNet, 112 px"
    )
    assert front.Network.of_profile({}, tmp_path).name == "ResNet-50, 224 px"
