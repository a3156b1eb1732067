"""What notebook 01 shows: training slices that are the nearest, groups that are counted, its answer."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fortify import overview, splits
from fortify.splits import (
    grouped_split,
    near_duplicate_share,
    nearest_in_training,
    random_split,
    unit_thumbnails,
)


@pytest.fixture(scope="module")
def drawn(phantoms):
    seeds = range(3)
    found = {("random", seed): random_split(phantoms.labels, seed=seed) for seed in seeds}
    return found | {("grouped", s): grouped_split(phantoms.labels, phantoms.groups, seed=s) for s in seeds}


@pytest.fixture(scope="module")
def table(phantoms, drawn):
    shares = {key: near_duplicate_share(phantoms, parts, threshold=0.9) for key, parts in drawn.items()}
    rows = [{"split": k, "seed": s, "twins": share} for (k, s), share in shares.items()]
    return pd.DataFrame(rows).assign(train="70", val="10", test="20")


def test_the_nearest_are_those_of_a_full_search(phantoms, drawn, monkeypatch):
    thumbnails, parts = unit_thumbnails(phantoms.images, 56), drawn["random", 0]
    monkeypatch.setattr(splits, "_BLOCK", 5)
    index, r = nearest_in_training(thumbnails, parts["test"], parts["train"])
    assert len(parts["train"]) > 10, "several blocks"
    for test, nearest, found in zip(parts["test"], index, r, strict=True):
        every = thumbnails[parts["train"]] @ thumbnails[test]
        assert nearest in parts["train"] and found == pytest.approx(every.max())
        assert thumbnails[nearest] @ thumbnails[test] == pytest.approx(every.max())


def test_an_example_is_tested_and_its_neighbours_are_in_training(phantoms, drawn):
    examples = overview.leak_examples(phantoms, drawn)
    assert [phantoms.labels[e.index] for e in examples] == [0, 1, 2]
    for example in examples:
        assert list(example.found) == ["random", "grouped"]
        for split, (neighbour, _) in example.found.items():
            parts = [p for (kind, _), p in drawn.items() if kind == split and example.index in p["test"]]
            assert neighbour in parts[0]["train"], "of the first seed that tests it"
        assert phantoms.groups[example.found["grouped"][0]] != phantoms.groups[example.index]


def test_the_example_is_the_median_of_its_class(phantoms, drawn):
    one = {("random", 0): drawn["random", 0]}
    thumbnails, parts = unit_thumbnails(phantoms.images, 56), drawn["random", 0]
    _, r = nearest_in_training(thumbnails, parts["test"], parts["train"])
    for example in overview.leak_examples(phantoms, one):
        own = np.sort(r[phantoms.labels[parts["test"]] == phantoms.labels[example.index]])
        assert example.found["random"][1] == pytest.approx(own[(len(own) - 1) // 2])


def test_without_a_slice_that_is_tested_everywhere_there_is_no_example(phantoms):
    half = np.arange(len(phantoms)) < 60
    parts = [{"test": np.flatnonzero(own), "train": np.flatnonzero(~own)} for own in (half, ~half)]
    assert overview.leak_examples(phantoms, {("random", 0): parts[0], ("grouped", 0): parts[1]}) == []


def test_the_panels_name_the_slices_and_their_r(phantoms, drawn):
    examples = overview.leak_examples(phantoms, drawn)
    axes = np.array(overview.neighbour_panels(phantoms, examples).axes).reshape(3, 3)
    for column, example in zip(axes.T, examples, strict=True):
        assert np.array_equal(column[0].images[0].get_array(), phantoms.images[example.index])
        for ax, (index, r) in zip(column[1:], example.found.values(), strict=True):
            assert np.array_equal(ax.images[0].get_array(), phantoms.images[index])
            assert float(ax.get_xlabel().split("r = ")[1]) == pytest.approx(r, abs=1.1e-3)
    assert [row[0].get_ylabel().split("\n")[-1] for row in axes[1:]] == ["random split", "grouped split"]


def test_r_is_not_rounded_up_to_one():
    assert [overview._floored(r) for r in (0.99996, 1.0, 0.9)] == ["0.999", "1.000", "0.900"]


def test_a_bar_for_every_group_holds_its_slices(phantoms):
    groups = phantoms.groups.copy()
    groups[phantoms.labels == 0] = groups[phantoms.labels == 1][0]  # a group of two classes
    axes = overview.group_sizes(replace(phantoms, groups=groups)).axes
    heights = [bar.get_height() for ax in axes for bar in ax.patches]
    assert sum(heights) == len(phantoms)
    assert sum(int(ax.get_title().split(": ")[1].split()[0]) for ax in axes) == len(np.unique(groups))


def test_the_table_of_the_splits_is_a_line_each(table):
    shown = overview.splits_table(table)
    assert shown.split.tolist() == ["random", "grouped"] and shown.seeds.tolist() == ["3", "3"]
    for line, (_, own) in zip(
        shown["near-duplicate in training"], table.groupby("split", sort=False), strict=True
    ):
        assert line.startswith(f"{100 * own.twins.mean():.0f} %")


def test_the_answer_states_the_tables_numbers(phantoms, table):
    said = overview.data_answer(phantoms, table, conflicts=2, threshold=0.9).splitlines()
    assert said[0].startswith(f"- **{len(phantoms)} slices**: ")
    for label, name in enumerate(phantoms.class_names):
        assert f"{(phantoms.labels == label).sum()} {name}" in said[0]
    sizes = np.unique(phantoms.groups, return_counts=True)[1]
    assert f"**{len(sizes)} groups**" in said[1] and f"each of {sizes.min()} to {sizes.max()}." in said[1]
    assert "come from 40 patients" in said[1]
    random, grouped = (table[table.split.eq(s)].twins.mean() for s in ("random", "grouped"))
    assert f"{100 * random:.0f} %" in said[2] and f"{100 * grouped:.0f} %" in said[3]
    assert ("tests memory" in said[3]) == (random - grouped > 0.1)
    assert said[4].startswith("- 2 pairs of nearly identical slices")
    unnamed = replace(phantoms, patients=None)
    assert "does not identify patients" in overview.data_answer(unnamed, table, conflicts=0, threshold=0.9)


def test_an_answer_of_one_split_and_seed_compares_nothing(phantoms, table):
    said = overview.data_answer(phantoms, table[:1], conflicts=0, threshold=0.9)
    assert "seeds" not in said and "points fewer" not in said and "grouped split" not in said
