"""The ledger of the paper's claims: what it says, what was measured, and a verdict that the numbers bear out.

``paper/claims.yaml`` holds no number of ours: it names table cells, and :func:`ledger` reads them.
"""

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from fortify.intervals import whole_percent

VERDICTS = {  # and each in one word
    "reproduced": "reproduced",
    "reproduced only under": "conditional",
    "not reproduced": "contradicted",
    "not testable": "untestable",
}
OPEN = "open"  # where a run's numbers do not decide
OUTCOMES = {  # what is said of one claim, and of several
    "reproduced": ("is reproduced", "are reproduced"),
    "conditional": ("holds only under a condition", "hold only under a condition"),
    "contradicted": ("is contradicted", "are contradicted"),
    "untestable": ("cannot be tested", "cannot be tested"),
    OPEN: ("is left open by this run", "are left open by this run"),
}
_CELL = re.compile(r"(?P<table>[\w.-]+\.csv)\[(?P<row>[^\]]*)\](?:\.(?P<column>\w+))?")
_RULE = re.compile(r"(\w+|[\d.]+) (<=|>=|<|>) (\w+|[\d.]+)(?: ([+-]) ([\d.]+))?")
_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


class ClaimError(ValueError):
    """A claim is malformed or points to a number that is not there; the message names claim and cell."""


class MissingNumber(ClaimError):
    """A claim points to a table, row or number that these tables do not hold."""


class MissingTable(MissingNumber):
    """A claim points to a table that is not among these."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper. ``ours`` is text with {names} of ``numbers``, cells such as
    ``table1_random.csv[model=normal, attack=clean]`` (an accuracy, with k/n and interval) or with
    ``.column`` at the end (that number). The ``verdict`` holds while every rule in ``holds`` is true, each
    ``name < name`` or ``name >= name - 10``, numbers in per cent for accuracies.
    """

    id: str
    claim: str
    short: str  # the claim in a few words
    where: str  # in the paper
    verdict: str  # one of VERDICTS
    ours: str
    command: str
    under: str = ""  # the condition, for "reproduced only under"
    measured_in: str = ""  # the notebook that writes the tables, where these may not be published yet
    numbers: dict = field(default_factory=dict)
    holds: list = field(default_factory=list)


def load_claims(path: str | Path) -> list[Claim]:
    """Read the ledger's source; ClaimError names the claim and what is wrong with it."""
    import yaml  # of the workflow's extra

    entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    claims = []
    for entry in entries:
        name = entry.get("id", entry)
        try:
            claim = Claim(**entry)
        except TypeError as error:
            raise ClaimError(f"{path}: claim {name}: {error}") from None
        if claim.verdict not in VERDICTS:
            raise ClaimError(f"{path}: claim {name}: verdict {claim.verdict!r} is none of {tuple(VERDICTS)}")
        if (claim.verdict == "reproduced only under") != bool(claim.under):
            raise ClaimError(f"{path}: claim {name}: `under` goes with 'reproduced only under'")
        claims.append(claim)
    repeated = pd.Series([claim.id for claim in claims]).loc[lambda ids: ids.duplicated()]
    if len(repeated):
        raise ClaimError(f"{path}: claim {repeated.iloc[0]} appears twice")
    return claims


def read_cell(tables: str | Path, cell: str) -> tuple[float | str, str]:
    """(number, text) of a cell such as ``table1_random.csv[model=normal, attack=pgd].k``, below ``tables``.

    Without a column the row is an accuracy: the number is in per cent, the text has k/n and interval, that by
    groups where the row has one.
    Raises MissingTable when the table is missing or empty, MissingNumber when row or number are, ClaimError
    when the cell is wrong.
    """
    parsed = _CELL.fullmatch(cell)
    if not parsed:
        raise ClaimError(f"{cell!r} is no cell like table.csv[column=value, ...].column")
    path = Path(tables) / parsed["table"]
    if not path.is_file():
        raise MissingTable(f"{cell}: {path} does not exist")
    table = pd.read_csv(path, keep_default_na=False)
    if table.empty:  # what it is of was not there
        raise MissingTable(f"{cell}: {path.name} has no rows")
    for condition in filter(None, (part.strip() for part in re.split(r",(?=\s*\w+=)", parsed["row"]))):
        column, _, value = condition.partition("=")
        if column not in table:
            raise ClaimError(f"{cell}: {path.name} has no column {column!r}, only {', '.join(table)}")
        table = table[table[column].astype(str).eq(value)]
    if len(table) != 1:
        error = ClaimError if len(table) else MissingNumber
        raise error(f"{cell}: {len(table)} rows of {path.name} fit, not one")
    row = table.iloc[0]
    if parsed["column"]:
        if parsed["column"] not in row or row[parsed["column"]] == "":
            raise MissingNumber(f"{cell}: no such number in {path.name}")
        value = row[parsed["column"]]
        try:  # a column with empty cells is read as text
            return float(value), f"{float(value):.4g}" if "." in str(value) else str(value)
        except ValueError:
            return value, value
    scale, suffix = (1, "_percent") if "accuracy_percent" in row else (100, "")
    if f"accuracy{suffix}" not in row:
        raise ClaimError(f"{cell}: {path.name} holds no accuracies; name a column")
    grouped = row.get(f"group_low{suffix}", "") != ""
    bounds, words = (("group_low", "group_high"), "by groups ") if grouped else (("low", "high"), "")
    accuracy, low, high = (scale * float(row[f"{name}{suffix}"]) for name in ("accuracy", *bounds))
    return accuracy, f"{whole_percent(accuracy / 100)} % ({row.k}/{row.n}, {words}{low:.0f}–{high:.0f})"


def ledger(claims: Iterable[Claim], tables: str | Path, *, partial: bool = False) -> pd.DataFrame:
    """One row a claim, with our numbers filled in from the CSV files in the folder ``tables``.

    Columns: id, claim, short, where, ours, verdict, outcome (the verdict in one word, of ``OUTCOMES``), holds
    (do these tables bear the verdict out), evidence (the cells), command. A number that is not there raises
    MissingNumber; with ``partial``, for a run of fewer splits, seeds or budgets, its claim is open instead.
    So is one with ``measured_in`` whose table is not there at all. Raises ClaimError for a malformed claim.
    """
    rows = []
    for claim in claims:
        verdict = f"{claim.verdict} {claim.under}".strip()
        try:
            cells = {name: read_cell(tables, cell) for name, cell in claim.numbers.items()}
            ours = claim.ours.format(**{name: _Shown(*cell) for name, cell in cells.items()})
            values = {name: value for name, (value, _) in cells.items()}
            broken = [rule for rule in claim.holds if not _true(rule, values)]
            if broken:
                verdict = f"{OPEN}: these numbers do not bear out “{verdict}” ({'; '.join(broken)})"
        except MissingTable as error:
            if not (partial or claim.measured_in):
                raise MissingNumber(f"claim {claim.id}: {error}") from None
            ours, broken = "", [str(error)]
            verdict = f"{OPEN}: not measured here ({str(error).partition(': ')[0]})"
            if claim.measured_in:
                verdict = f"{OPEN}: not yet measured; notebook {claim.measured_in} will"
        except MissingNumber as error:
            if not partial:
                raise MissingNumber(f"claim {claim.id}: {error}") from None
            ours, broken = "", [str(error)]
            verdict = f"{OPEN}: not measured here ({str(error).partition(': ')[0]})"
        except (ClaimError, KeyError, IndexError) as error:
            raise ClaimError(f"claim {claim.id}: {error}") from None
        rows.append(
            {
                "id": claim.id,
                "claim": claim.claim,
                "short": claim.short,
                "where": claim.where,
                "ours": ours,
                "verdict": verdict,
                "outcome": OPEN if broken else VERDICTS[claim.verdict],
                "holds": not broken,
                "evidence": "; ".join(claim.numbers.values()) or "reading the authors' code",
                "command": claim.command,
            }
        )
    return pd.DataFrame(rows)


class _Shown(str):
    """A cell's text, or with a format, as in ``{name:.2f}``, its number in that format."""

    def __new__(cls, number, text):
        shown = super().__new__(cls, text)
        shown.number = number
        return shown

    def __format__(self, spec):
        return format(self.number, spec) if spec else str(self)


def _true(rule, values):
    parsed = _RULE.fullmatch(rule)
    if not parsed:
        raise ClaimError(f"{rule!r} is no rule like 'a > b' or 'a >= b - 10'")
    left, compare, right, sign, shift = parsed.groups()

    def number(text):
        value = values[text] if text in values else text
        try:
            return float(value)
        except ValueError:
            raise ClaimError(f"{rule!r}: {text} is {value!r}, no number") from None

    shift = float(shift or 0) * (-1 if sign == "-" else 1)
    return _COMPARE[compare](number(left), number(right) + shift)


def conditions(table: pd.DataFrame) -> pd.Series:
    """Of each claim of a :func:`ledger` what follows its verdict: a condition, why it is open, or ""."""
    kinds = "|".join(sorted([*VERDICTS, f"{OPEN}:"], key=len, reverse=True))
    reasons = table.verdict.str.replace(rf"^({kinds}) ?", "", regex=True)
    return table.outcome.map({"conditional": "only under "}).fillna("") + reasons


def layout(table: pd.DataFrame) -> pd.DataFrame:
    """The display table of a :func:`ledger`: what the paper says and where, what we measured, the verdict.

    The verdict in one word leads; a condition, or why it is open, follows.
    """
    claims = table.claim + " (" + table["where"] + ")"
    under = conditions(table)
    verdicts = "**" + table.outcome + "**" + under.where(under.eq(""), ": " + under)
    return pd.DataFrame({"The paper": claims, "Measured here": table.ours, "Verdict": verdicts})
