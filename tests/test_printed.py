"""The arithmetic of the printed table, checked by other roads than the library's."""

import pytest
from scipy.stats import binomtest

from fortify.examined import printed


def test_clean_columns_are_counts_of_160_and_the_attacked_ones_are_not():
    table = printed.printed_arithmetic().set_index(["model", "attack"])
    assert table.loc[("normal", "clean"), "k_of_160"] == "149/160"
    assert table.loc[("adversarial", "clean"), "k_of_160"] == "152/160"
    assert table.loc[("adversarial", "fgsm"), "k_of_160"] == "152/160"
    rest = table.drop([("normal", "clean"), ("adversarial", "clean"), ("adversarial", "fgsm")])
    assert (rest.k_of_160 == "none").all() and (table.k_of_165 == "none").all()


def test_no_count_comes_within_the_printed_digits_by_brute_force():
    """Independent of as_printed: every k/160 is more than one last digit away from these values."""
    for value, digit in ((43.08, 0.01), (45.9, 0.1), (40.9, 0.1), (92.8, 0.1)):
        assert min(abs(100 * k / 160 - value) for k in range(161)) > digit


def test_combined_is_the_mean_of_the_columns():
    table = printed.printed_arithmetic().set_index(["model", "attack"])
    assert table.loc[("normal", "combined"), "mean_of_columns"] == "43.29"
    assert table.loc[("adversarial", "combined"), "mean_of_columns"] == "93.67"


@pytest.mark.parametrize(
    ("k", "n", "decimals", "texts"),
    [
        (149, 160, 2, {"93.12", "93.13"}),  # 93.125: half to even and cut off, half up
        (152, 160, 1, {"95.0"}),
        (1, 3, 1, {"33.3"}),
        (2, 3, 1, {"66.6", "66.7"}),
    ],
)
def test_every_way_of_printing_is_tried(k, n, decimals, texts):
    assert printed.as_printed(k, n, decimals) == texts


def test_sizes_that_fit_are_found_by_brute_force_too():
    def fits(text, n):
        decimals = len(text.split(".")[1])
        return any(text in printed.as_printed(k, n, decimals) for k in range(n + 1))

    found = printed.fitting_sizes("adversarial", largest=240)
    cells = ("95.0", "93.2", "95.0", "92.8")
    assert found == [n for n in range(1, 241) if all(fits(text, n) for text in cells)] != []
    assert printed.fitting_sizes("normal", largest=900) == []
    assert printed.fitting_sizes("normal")[0] == 917


def test_mcnemar_bounds_cover_every_overlap():
    bounds = printed.mcnemar_bounds(149, 152, 160)
    assert bounds.b.tolist() == list(range(9)), (
        "the second is wrong on 8, so at most 8 are right with the first only"
    )
    assert (bounds.c - bounds.b == 3).all()
    assert bounds.p.min() == pytest.approx(0.25) and bounds.p.idxmin() == 0
    assert bounds.p.max() == pytest.approx(binomtest(8, 19).pvalue)
    with pytest.raises(ValueError, match="161 and 2 of 160"):
        printed.mcnemar_bounds(161, 2, 160)


def test_mcnemar_table_has_the_bounds_of_the_printed_counts():
    table = printed.mcnemar_table().set_index("comparison")
    assert table[["b", "c"]].to_dict("index") == {
        "printed smallest": {"b": 0, "c": 3},
        "printed largest": {"b": 8, "c": 11},
    }
    assert table.p.tolist() == pytest.approx([0.25, binomtest(8, 19).pvalue])


def test_the_table_of_counts_is_a_line_for_each_column():
    arithmetic = printed.printed_arithmetic()
    shown = printed.as_counts(arithmetic)
    assert shown["Table 1"].tolist() == ["clean", "pgd", "fgsm", "cw", "combined"] and shown.shape == (5, 5)
    for row in arithmetic.itertuples():
        line = shown[shown["Table 1"].eq(row.attack)].iloc[0]
        assert [line[f"{row.model} (%)"], line[f"{row.model}, count"]] == [row.printed, row.k_of_160]
