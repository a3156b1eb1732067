"""The ledger: every claim points to numbers that are there, and its verdict is what they say."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from fortify.examined.answer import claims_answer, tally
from fortify.examined.claims import (
    OUTCOMES,
    VERDICTS,
    ClaimError,
    MissingNumber,
    layout,
    ledger,
    load_claims,
    read_cell,
)

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "paper" / "claims.yaml"
PROFILE = (
    nbformat.read(ROOT / "notebooks/09_claims.ipynb", as_version=4).metadata.get("fortify", {}).get("profile")
)
PUBLISHED = ROOT / "paper" / "tables" / ("" if PROFILE == "paper" else PROFILE or "laptop")


@pytest.fixture
def tables(tmp_path):
    table = {
        "split": ["random", "grouped"],
        "k": [9, 5],
        "n": 10,
        "accuracy": [0.9, 0.5],
        "low": 0.4,
        "high": 0.95,
    }
    pd.DataFrame(table).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame({"name": ["x"], "p": [0.25], "text": ["none"], "empty": [""]}).to_csv(
        tmp_path / "b.csv", index=False
    )
    return tmp_path


def write(folder, **changes):
    claim = dict(
        id="one",
        claim="It holds.",
        short="it holds",
        where="Table 1",
        verdict="reproduced",
        ours="{r} and {p}",
        command="make demo",
        numbers={"r": "a.csv[split=random]", "p": "b.csv[name=x].p"},
        holds=["r > 80"],
    )
    path = folder / "claims.yaml"
    path.write_text(yaml.safe_dump([{k: v for k, v in (claim | changes).items() if v is not None}]))
    return path


def test_every_published_claim_finds_its_numbers_and_its_verdict_holds():
    claims = load_claims(SOURCE)
    assert len(claims) >= 12
    table = ledger(claims, PUBLISHED)
    table = table[~table.verdict.str.startswith("open: not yet measured")]
    assert len(table) >= 12 and table.holds.all(), table[~table.holds].verdict.tolist()


def test_the_published_ledger_is_the_one_of_the_published_tables():
    again = ledger(load_claims(SOURCE), PUBLISHED)
    kept = pd.read_csv(PUBLISHED / "claims.csv", keep_default_na=False)
    newer = ~again.id.isin(kept.id)  # than the publication: they are to be measured
    assert again[newer].verdict.str.startswith("open: not yet measured").all()
    again = again[~newer]
    for column in ("short", "ours", "verdict", "outcome"):
        assert again[column].tolist() == kept[column].tolist(), column


def test_a_run_of_the_random_split_bears_out_what_is_of_it(tmp_path):
    """Of the published tables without the grouped split: claims on that one are open, the others stand."""
    for path in PUBLISHED.glob("*.csv"):
        table = pd.read_csv(path, keep_default_na=False)
        if "split" in table:
            table = table[table.split.eq("random")]
        if "grouped" not in path.name:
            table.to_csv(tmp_path / path.name, index=False)
    table = ledger(load_claims(SOURCE), tmp_path, partial=True).set_index("id")
    table = table[~table.verdict.str.startswith("open: not yet measured")]
    left = {"clean-normal", "clean-adversarial", "clean-gain", "near-clean", "new-patients"}
    left |= {"robust-optimisation", "architectures-measured"}
    assert set(table.index[~table.holds]) == left
    assert table.verdict[list(left)].str.startswith("open: not measured here").all()


def test_no_number_of_ours_is_typed():
    """Outside {names} a claim's text holds only figures of the paper and its notebook, and names of cells."""
    theirs = {"160", "94.58", "454", "480", "05"}  # test images; their combined accuracy; our notebook's name
    for claim in load_claims(SOURCE):
        text = re.sub(r"\{\w+(:\.\df)?\}", "", claim.ours)
        budgets = [f"{eps}/255" for eps in re.findall(r"at ([\d.]+)/255", text)]
        assert all(any(eps in cell for cell in claim.numbers.values()) for eps in budgets), claim.id
        budgets = [f"CW L2 {l2}]" for l2 in re.findall(r"an L2 of ([\d.]+)", text)]
        assert all(any(l2 in cell for cell in claim.numbers.values()) for l2 in budgets), claim.id
        text = re.sub(r"[\d.]+/255|L2( of [\d.]+)?|our Table 1|Figures? \d( and \d)?", "", text)
        assert set(re.findall(r"\d+(?:\.\d+)?", text)) - theirs == set(), claim.id
        numbers = set(re.findall(r"[\d.,]*\d", claim.short))
        assert numbers <= set(re.findall(r"[\d.,]*\d", claim.claim)), "in short: the paper's numbers alone"


def test_a_verdict_on_numbers_has_a_rule_and_every_rule_names_one():
    for claim in load_claims(SOURCE):
        assert bool(claim.numbers) == bool(claim.holds), claim.id
        assert all(re.search(r"[a-z]\w* ", rule) for rule in claim.holds), claim.id


def test_a_run_of_less_leaves_claims_open(tables):
    for cell in ("c.csv[split=random]", "a.csv[split=odd]", "b.csv[name=x].empty"):
        claims = load_claims(write(tables, numbers={"r": cell, "p": "b.csv[name=x].p"}))
        table = ledger(claims, tables, partial=True)
        assert not table.holds.any() and table.ours.tolist() == [""]
        assert table.verdict[0] == f"open: not measured here ({cell})"
        with pytest.raises(MissingNumber):
            ledger(claims, tables)
    with pytest.raises(ClaimError, match="2 rows"):  # a wrong cell is a mistake, whatever was run
        ledger(
            load_claims(write(tables, numbers={"r": "a.csv[]", "p": "b.csv[name=x].p"})), tables, partial=True
        )


def test_a_claim_may_wait_for_its_notebook_but_not_for_a_number(tables):
    later = {"r": "later.csv[split=random]", "p": "b.csv[name=x].p"}
    for there in (False, True):  # a chapter that finds no data leaves an empty table
        if there:
            pd.DataFrame({"missing": []}).to_csv(tables / "later.csv", index=False)
        waiting = load_claims(write(tables, numbers=later, measured_in="13"))
        (line,) = ledger(waiting, tables, partial=there).itertuples()
        assert line.verdict == "open: not yet measured; notebook 13 will"
        assert line.ours == "" and not line.holds
    with pytest.raises(MissingNumber, match="a.csv"):
        gone = {"r": "a.csv[split=odd]", "p": "b.csv[name=x].p"}
        ledger(load_claims(write(tables, numbers=gone, measured_in="13")), tables)
    with pytest.raises(MissingNumber, match="later.csv"):
        ledger(load_claims(write(tables, numbers=later)), tables)


def test_a_row_reads_as_accuracy_with_counts_and_interval(tables):
    assert read_cell(tables, "a.csv[split=random]") == (90.0, "90 % (9/10, 40–95)")
    assert read_cell(tables, "b.csv[name=x].p") == (0.25, "0.25")
    (tables / "d.csv").write_text('name,split,p\n"net, ImageNet",random,0.5\n')
    assert read_cell(tables, "d.csv[name=net, ImageNet, split=random].p") == (0.5, "0.5")
    assert read_cell(tables, "b.csv[name=x].text") == ("none", "none")
    assert read_cell(tables, "a.csv[split=random].k") == (9, "9")
    (tables / "c.csv").write_text("name,value\nx,99.465\ny,\n")  # read as text, for one cell is empty
    assert read_cell(tables, "c.csv[name=x].value") == (99.465, "99.47")


def test_the_ledger_fills_in_numbers_and_judges(tables):
    table = ledger(load_claims(write(tables)), tables)
    assert table.ours.tolist() == ["90 % (9/10, 40–95) and 0.25"] and table.holds.all()
    assert layout(table).columns.tolist() == ["The paper", "Measured here", "Verdict"]
    rounded = ledger(load_claims(write(tables, ours="{r:.0f} and {p:.1f}, {p}")), tables)
    assert rounded.ours.tolist() == ["90 and 0.2, 0.25"]
    open_ = ledger(load_claims(write(tables, holds=["r > 80", "r < p + 10"])), tables)
    assert not open_.holds.any() and open_.verdict[0].startswith("open:") and "r < p + 10" in open_.verdict[0]


def test_a_verdict_has_one_word_and_a_condition_follows_it(tables):
    found = {}
    for verdict in VERDICTS:
        under = "rain" if verdict == "reproduced only under" else None
        table = ledger(load_claims(write(tables, verdict=verdict, under=under)), tables)
        found[verdict] = (table.outcome[0], layout(table).Verdict[0])
    assert {word for word, _ in found.values()} | {"open"} == set(OUTCOMES)
    assert all(" " not in word for word in OUTCOMES)
    assert found["reproduced only under"] == ("conditional", "**conditional**: only under rain")
    assert found["not reproduced"] == ("contradicted", "**contradicted**")
    open_ = ledger(load_claims(write(tables, holds=["r < 80"])), tables)
    assert open_.outcome[0] == "open"
    assert layout(open_).Verdict[0] == "**open**: these numbers do not bear out “reproduced” (r < 80)"


def test_the_answer_counts_every_claim_once(tables):
    one = ledger(load_claims(write(tables)), tables)
    table = pd.concat(
        [
            one,
            one.assign(short="so does this"),
            one.assign(short="not this", outcome="open", verdict="open: x"),
        ]
    )
    given = one.assign(short="nor this", outcome="conditional", verdict="reproduced only under a condition")
    table = pd.concat([table, given])
    assert tally(table[:3]) == (
        "The paper makes 3 claims: **2 are reproduced** and **1 is left open by this run**."
    )
    assert claims_answer(table).splitlines() == [
        tally(table),
        "",
        "- **Reproduced**",
        "  - it holds",
        "  - so does this",
        "- **Conditional**",
        "  - nor this: only under a condition",
        "- **Open**",
        "  - not this: x",
    ]
    published = ledger(load_claims(SOURCE), PUBLISHED)
    said = claims_answer(published)
    assert sum(map(int, re.findall(r"\*\*(\d+) ", said))) == len(published)
    assert all(said.count(f"\n  - {short}") == 1 for short in published.short)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(numbers={"r": "c.csv[split=random]", "p": "b.csv[name=x].p"}), "c.csv does not exist"),
        (dict(numbers={"r": "a.csv[split=odd]", "p": "b.csv[name=x].p"}), "0 rows of a.csv fit"),
        (dict(numbers={"r": "a.csv[]", "p": "b.csv[name=x].p"}), "2 rows of a.csv fit"),
        (dict(numbers={"r": "a.csv[what=1]", "p": "b.csv[name=x].p"}), "no column 'what'"),
        (dict(numbers={"r": "a.csv[split=random]", "p": "b.csv[name=x].q"}), "no such number"),
        (dict(numbers={"r": "a.csv[split=random]", "p": "b.csv[name=x].empty"}), "no such number"),
        (dict(numbers={"r": "b.csv[name=x]", "p": "b.csv[name=x].p"}), "holds no accuracies"),
        (dict(numbers={"r": "a.csv", "p": "b.csv[name=x].p"}), "no cell like"),
        (dict(ours="{r} and {missing}"), "missing"),
        (dict(holds=["r is large"]), "no rule like"),
        (dict(holds=["r > who"]), "no number"),
    ],
)
def test_a_claim_without_its_number_is_an_error_that_names_it(tables, changes, message):
    with pytest.raises(ClaimError, match="claim one") as caught:
        ledger(load_claims(write(tables, **changes)), tables)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(verdict="true"), "verdict 'true' is none of"),
        (dict(verdict="reproduced only under"), "`under` goes with"),
        (dict(under="rain"), "`under` goes with"),
        (dict(colour="red"), "colour"),
        (dict(command=None), "command"),
        (dict(short=None), "short"),
    ],
)
def test_a_malformed_claim_is_refused(tables, changes, message):
    with pytest.raises(ClaimError, match="claim one") as caught:
        load_claims(write(tables, **changes))
    assert message in str(caught.value)


def test_a_repeated_id_is_refused(tables):
    path = write(tables)
    path.write_text(path.read_text() * 2)
    with pytest.raises(ClaimError, match="appears twice"):
        load_claims(path)
