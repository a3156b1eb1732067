"""The arithmetic of the printed Table 1: which of its values can be counts, and what its differences mean."""

from collections.abc import Sequence
from fractions import Fraction

import pandas as pd
import scipy

from fortify.intervals import wilson
from fortify.tables import PRINTED

PUBLISHED = ("published_pgd", "published_fgsm", "published_cw")  # names of the published attacks in rows
TEST_SIZE, VALIDATION_SIZE = 160, 165  # of the authors' folders, printed by their notebook
CLEAN_COUNTS = (149, 152, TEST_SIZE)  # 93.12 % and 95.0 %, the only counts that print so


def as_printed(k: int, n: int, decimals: int) -> set[str]:
    """The texts that 100 k/n may be printed as: rounded half up, half to even, or cut off."""
    scaled = Fraction(100 * 10**decimals * k, n)
    floor = scaled.numerator // scaled.denominator
    half_up = (scaled + Fraction(1, 2)).numerator // (scaled + Fraction(1, 2)).denominator
    return {f"{whole / 10**decimals:.{decimals}f}" for whole in (floor, half_up, round(scaled))}


def printed_arithmetic(sizes: Sequence[int] = (TEST_SIZE, VALIDATION_SIZE)) -> pd.DataFrame:
    """Which cells of the printed Table 1 can be k of n images, for test sets of the given ``sizes``.

    One row a cell: model, attack, printed (%), and for every size the k whose percentage is printed so
    (rounded or cut off), with its Wilson interval, or none. *Combined* is tried as k of 3n, and as the mean
    of the three printed columns (``mean_of_columns``).
    """
    rows = []
    for (model, attack), value in PRINTED.stack().items():
        text = str(value)
        row = {"model": model, "attack": attack, "printed": text}
        for size in sizes:
            n = 3 * size if attack == "combined" else size
            ks = [k for k in range(n + 1) if text in as_printed(k, n, len(text.split(".")[1]))]
            row[f"k_of_{size}"] = ", ".join(f"{k}/{n}" for k in ks) or "none"
            if ks:  # a pooled image counts once, as everywhere here
                low, high = wilson(round(ks[0] * size / n), size)
                row[f"interval_{size}"] = f"{100 * low:.1f}–{100 * high:.1f}"
        if attack == "combined":
            mean = PRINTED.loc[model, ["pgd", "fgsm", "cw"]].mean()
            row["mean_of_columns"] = f"{mean:.2f}"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def as_counts(arithmetic: pd.DataFrame) -> pd.DataFrame:
    """The display table of :func:`printed_arithmetic`: a line a column of Table 1, and fitting counts."""
    shown = {"Table 1": list(dict.fromkeys(arithmetic.attack))}
    for model, own in arithmetic.groupby("model", sort=False):
        cells = own.set_index("attack").loc[shown["Table 1"]]
        shown[f"{model} (%)"] = cells.printed.tolist()
        shown[f"{model}, count"] = cells[f"k_of_{TEST_SIZE}"].tolist()
    return pd.DataFrame(shown)


def fitting_sizes(model: str, *, largest: int = 1097) -> list[int]:
    """Test set sizes n, up to ``largest``, on which all four single columns of a printed row can be k/n."""
    cells = [str(PRINTED.loc[model, attack]) for attack in ("clean", "pgd", "fgsm", "cw")]

    def fits(text, n):
        near = round(float(text) * n / 100)  # the only candidates
        decimals = len(text.split(".")[1])
        return any(text in as_printed(k, n, decimals) for k in (near - 1, near, near + 1) if 0 <= k <= n)

    return [n for n in range(1, largest + 1) if all(fits(text, n) for text in cells)]


def mcnemar_table(printed: tuple[int, int, int] = CLEAN_COUNTS) -> pd.DataFrame:
    """McNemar's exact test of the ``printed`` clean counts: comparison, b, c, p, of the overlaps with the
    smallest and the largest p.
    """
    bounds = mcnemar_bounds(*printed)
    rows = {"printed smallest": bounds.p.idxmin(), "printed largest": bounds.p.idxmax()}
    table = bounds.loc[list(rows.values())].reset_index(drop=True)
    return table.assign(comparison=list(rows))[["comparison", "b", "c", "p"]]


def mcnemar_bounds(k_first: int, k_second: int, n: int) -> pd.DataFrame:
    """Smallest and largest p of the exact McNemar test of two classifiers right on k_first and k_second of n.

    The printed totals do not say on which images the two differ. If ``b`` are right with the first only and
    ``c`` with the second only, c - b is k_second - k_first, and b reaches from 0 to what the totals allow.
    Returns a DataFrame with one row a possible b: b, c, p (two-sided binomial on b of b + c).
    """
    if not 0 <= min(k_first, k_second) <= max(k_first, k_second) <= n:
        raise ValueError(f"{k_first} and {k_second} of {n}: counts must lie in 0..n")
    rows = []
    for b in range(n + 1):
        c = b + k_second - k_first
        both = k_first - b
        if min(c, both) < 0 or both + b + c > n:
            continue
        p = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
        rows.append({"b": b, "c": c, "p": float(p)})
    return pd.DataFrame(rows)
