"""Experiments kept as rows: whose they are, what is shown of them, and where the paper takes them from."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from fortify.experiments import QUESTIONS, experiment_files, origins, read_experiments, short_tables

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def experiments():
    return read_experiments(ROOT, "laptop")


def test_every_experiment_has_its_rows_and_the_script_that_made_them():
    table = origins(ROOT, "demo")
    assert table.experiment.tolist() == [*QUESTIONS] and (table.rows > 0).all()
    for row in table.itertuples(index=False):
        script = (ROOT / row[2]).read_text(encoding="utf-8")
        assert re.match(r"[a-z]+", row.experiment)[0] in script


def test_a_profile_takes_its_own_rows_where_they_were_measured(tmp_path):
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    folder = tmp_path / "benchmarks"
    pd.read_csv(folder / "ablation_laptop.csv").head(3).to_csv(folder / "ablation_paper.csv", index=False)
    shutil.copy(folder / "chosen_laptop.csv", folder / "chosen_paper.csv")
    shutil.copy(folder / "grouping_cpu.csv", folder / "grouping_cuda.csv")
    own, other = (experiment_files(tmp_path, profile) for profile in ("paper", "demo"))
    assert own["ablation"].name == "ablation_paper.csv" and own["grouping"].name == "grouping_cuda.csv"
    assert other["ablation"].name == "ablation_laptop.csv" and other["grouping"].name == "grouping_cpu.csv"
    found = read_experiments(tmp_path, "paper")
    assert len(found["ablation"]) == 3 and set(found["ablation"].profile) == {"paper"}
    assert set(read_experiments(tmp_path, "by hand")["chosen"].profile) == {"laptop"}


def test_what_is_shown_fits_a_page_and_is_of_the_rows(experiments):
    shown = short_tables(experiments)
    assert len(shown) == 5 and all(table.shape[0] <= 8 and table.shape[1] <= 6 for table in shown.values())
    parts, grouping, *_ = shown.values()
    own = experiments["ablation"].query("split == 'grouped'")
    best = own.groupby("variant").val_pgd.mean().idxmax()
    row, mine = parts.iloc[0], own[own.variant.eq(best)]
    shares = 100 * mine.pgd_4 / mine.n
    assert row.recipe == best
    assert row["PGD 4/255"] == f"{shares.mean():.0f} ({shares.min():.0f}–{shares.max():.0f})"
    assert parts.recipe.iloc[-1] == "each fold's own choice"
    rows = experiments["grouping"].query("groups == 100")
    line = grouping.set_index("groups").loc[100]
    assert line.clean.startswith(f"{100 * rows.clean.sum() / rows.n.sum():.0f} (")


def test_the_paper_reads_nothing_of_benchmarks_but_speed_and_cost():
    source = (ROOT / "paper/paper.typ").read_text(encoding="utf-8")
    assert set(re.findall(r"benchmarks/([a-z_]+)_", source)) == {"speed", "scaling"}
    asked = set(re.findall(r'"experiment_([a-z_]+)\.csv"', source))
    assert asked == {"ablation", "chosen", "grouping", "cropped"} <= set(QUESTIONS)
