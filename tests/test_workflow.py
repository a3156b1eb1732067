"""The workflow: papermill runs every notebook with the test profile, and redoes no more than it must."""

import re
import shutil
import subprocess

import nbformat
import numpy as np
import pandas as pd
import pytest
from workflow import BUILD, ROOT, snakemake

from fortify.data import Slices
from fortify.evaluation import check_rows, read_rows
from fortify.regions import lung_mask
from fortify.workflow import publish

SEED_ALONE = dict.fromkeys(("baseline", "attacks", "adversarial_training", "published_protocol"), 2)


def jobs(output):
    """{rule: count} of the table that a dry run prints."""
    table = re.search(r"^job +count\n[- ]+\n(.*?)\n\n", output, re.MULTILINE | re.DOTALL)
    found = re.findall(r"^(\w+) +(\d+)$", table.group(1), re.MULTILINE)
    return {rule: int(count) for rule, count in found if rule != "total"}


def test_every_notebook_ran_and_every_result_is_there(finished):
    executed = sorted(
        p.relative_to(BUILD / "notebooks").as_posix() for p in BUILD.glob("notebooks/**/*.ipynb")
    )
    stems = [p.name for p in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    per_profile = [name for name in stems if name[:2] in ("01", "05", "07", "09")]
    per_run = [name for name in stems if name not in per_profile]
    expected = [f"{split}-s0/{name}" for split in ("grouped", "random") for name in per_run]
    assert executed == [*per_profile, *expected]
    for path in executed:
        cells = nbformat.read(BUILD / "notebooks" / path, as_version=4).cells
        outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
        assert outputs and all(o.output_type in ("display_data", "execute_result") for o in outputs), (
            f"{path} prints noise: {[o for o in outputs if o.output_type == 'stream'][:1]}"
        )
    for kind in ("pdf", "png"):
        names = {p.stem.split("_")[0] for p in (BUILD / "figures").glob(f"*.{kind}")}
        assert names >= {f"fig{i}" for i in range(1, 7)}


def test_table_1_is_what_the_rows_say(finished):
    """From the per-example rows to a cell of the printed table, by another road than the library's."""
    rows = read_rows(BUILD / "random-s0" / "normal_predictions.csv")
    check_rows(rows)
    clean = rows[rows.attack == "clean"]
    pgd = rows[(rows.attack == "pgd") & (rows.eps_255 == 4)]
    table = pd.read_csv(BUILD / "tables" / "table1_random.csv").set_index(["model", "attack"])
    for attack, own in (("clean", clean), ("pgd", pgd)):
        k, n = (own.prediction == own.label).sum(), len(own)
        assert (table.loc[("normal", attack), "k"], table.loc[("normal", attack), "n"]) == (k, n)
        assert f"{k}/{n}" in (BUILD / "tables" / "table1.txt").read_text()


def test_a_second_call_does_nothing(finished):
    again = snakemake("--dry-run")
    assert "Nothing to be done" in again.stdout + again.stderr


def test_notebook_1_crops_what_networks_are_shown_and_not_what_is_split(finished, tmp_path):
    command = ["papermill", "--no-progress-bar", "--cwd", "notebooks", "notebooks/01_data.ipynb", "-f"]
    command += ["notebooks/profiles/test.yaml", "-p", "run", str(tmp_path / "data"), "-p", "crop"]
    out = str(tmp_path / "01.ipynb")
    done, refused = (
        subprocess.run([*command[:5], out, *command[5:], crop], cwd=ROOT, capture_output=True, text=True)
        for crop in ("lungs", "lung")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'crop is "none" or "lungs", not' in refused.stderr
    whole, shown = (Slices.load(folder / "data/slices.npz") for folder in (BUILD, tmp_path))
    assert shown.source == f"{whole.source}, cropped to the lungs" and shown.sha256 == whole.sha256
    assert shown.images.shape == whole.images.shape and np.array_equal(shown.groups, whole.groups)
    assert lung_mask(shown.images).mean() > 1.5 * lung_mask(whole.images).mean()
    splits = sorted((BUILD / "data/splits").glob("*.csv"))
    assert len(splits) == 2
    for path in splits:
        assert path.read_bytes() == (tmp_path / "data/splits" / path.name).read_bytes()


AFTER_TRAINING = {"published_protocol": 2, "leakage": 1, "robustness_audit": 2}
AFTER_TRAINING |= {"results": 1, "claims": 1, "html": 1, "all": 1}


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ("train_pgd_steps=3", {"adversarial_training": 2, **AFTER_TRAINING}),
        ("cw_steps=6", {"attacks": 2, "adversarial_training": 2, **AFTER_TRAINING}),
        ("published_epochs=1", {"published_protocol": 2, "claims": 1, "html": 1, "all": 1}),
        ("leak_seeds=4", {"leakage": 1, "claims": 1, "html": 1, "all": 1}),
    ],
)
def test_a_changed_parameter_redoes_only_what_depends_on_it(finished, change, redone):
    assert jobs(snakemake("--dry-run", config=("profile=test", change)).stdout) == redone


def test_another_seed_leaves_the_finished_one(finished):
    two = ("profile=test", "seeds=[0,1]")
    try:
        assert snakemake("data", "--quiet", "rules", config=two).returncode == 0
        found = jobs(snakemake("--dry-run", config=two).stdout)
    finally:  # as it was
        assert snakemake("data", "--quiet", "rules").returncode == 0
    assert found == SEED_ALONE | {"results": 1, "claims": 1, "html": 1, "all": 1}


def test_tables_are_made_without_the_weights(finished, tmp_path):
    table = BUILD / "tables" / "table1.txt"
    before, weights = table.read_text(), sorted(BUILD.glob("*/*.safetensors"))
    table.unlink()
    for path in weights:
        shutil.move(path, tmp_path / f"{path.parent.name}-{path.name}")
    allowed = ("--allowed-rules", "results", "claims", "html", "all")
    done = snakemake("--quiet", "rules", *allowed)
    for path in weights:
        shutil.move(tmp_path / f"{path.parent.name}-{path.name}", path)
    assert done.returncode == 0 and len(weights) == 8, done.stderr[-2000:]
    assert table.read_text() == before


def test_the_reference_run_is_five_seeds_on_both_splits():
    found = jobs(snakemake("--dry-run", "--forceall", config=("profile=paper",)).stdout)
    per_run = dict.fromkeys(("baseline", "attacks", "adversarial_training", "published_protocol"), 10)
    once = {"data": 1, "results": 1, "leakage": 1, "robustness_audit": 2, "claims": 1}
    assert {rule: found[rule] for rule in (*per_run, *once)} == per_run | once


@pytest.mark.parametrize("profile", publish.BESIDE)
def test_what_stands_beside_is_a_table_1_with_its_audit(profile):
    found = jobs(snakemake("audited", "--dry-run", "--forceall", config=(f"profile={profile}",)).stdout)
    per_run = dict.fromkeys(("baseline", "attacks", "adversarial_training"), 10)
    assert found == per_run | {"data": 1, "results": 1, "robustness_audit": 2, "audited": 1}
    command = ("make", "--no-print-directory", "-o", ".venv/.installed", "--dry-run", profile)
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert f" audited --config profile={profile} " in made


@pytest.mark.parametrize(
    ("changes", "seeds"),
    [
        (("seeds=[0,1]", "published_seeds=[0]"), ["0"]),
        (("seeds=[0,1]", "published_seeds=[0,1,2]"), ["0", "1"]),
        (("seeds=[1,2]", "published_seeds=[0]"), ["1"]),  # none of them is run: the first that is
    ],
)
def test_the_published_training_is_run_on_its_seeds_alone(changes, seeds):
    shown = snakemake("--dry-run", "-p", "--forceall", config=("profile=test", *changes)).stdout
    assert jobs(shown)["published_protocol"] == 2 * len(seeds) and jobs(shown)["baseline"] == 4
    assert set(re.findall(r"-s(\d+)/06_published_protocol.ipynb", shown)) == set(seeds)
    assert re.search(r"published_seeds: \[(.*?)\]", shown)[1].split(", ") == seeds
    looked_at = re.search(r"notebooks/07_leakage.ipynb .*?\bseed: (\d+)", shown)[1]
    assert looked_at == re.search(r"seeds=\[(\d)", changes[0])[1], (
        "the first seed's models, which the rule waits for"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("profile=test", "esp_255=4"), "no notebook has a parameter esp_255"),
        (("profile=none",), "the profiles are"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(config, message):
    refused = snakemake("--dry-run", config=config)
    assert refused.returncode != 0 and message in refused.stdout + refused.stderr


def test_make_tables_takes_the_seeds_that_are_there(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for run in ("mine/random-s3", "mine/random-s11", "mine/grouped-s11", "lungs/random-s0"):
        (tmp_path / "build" / run).mkdir(parents=True)
        (tmp_path / "build" / run / "adversarial_predictions.csv").touch()
    (tmp_path / "build/mine/random-s4").mkdir()  # unfinished

    def make(*arguments):
        own = ("make", "--no-print-directory", "-o", ".venv/.installed", "tables", *arguments)
        return subprocess.run(own, cwd=tmp_path, capture_output=True, text=True)

    shown = make("--dry-run", "PROFILE=mine").stdout
    assert re.findall(r"--config profile=mine '(.*?)'", shown) == ["seeds=[3,11]"] * 2
    assert "seeds=[3]" in make("--dry-run", "PROFILE=mine", "SEEDS=3").stdout
    assert " all --allowed-rules" in shown
    assert " results --allowed-rules" in make("--dry-run", "PROFILE=lungs").stdout  # it has no ledger
    refused = make("PROFILE=none")
    assert refused.returncode != 0 and "build/none holds no finished seed" in refused.stderr
