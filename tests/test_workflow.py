"""The workflow: papermill runs every notebook with the test profile, and redoes no more than it must."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from workflow import BUILD, OPTIONS, ROOT, snakemake

from fortify.data import Slices
from fortify.evaluation import check_rows, read_rows
from fortify.intervals import whole_percent
from fortify.regions import lung_mask
from fortify.workflow.locks import wait_for_profile
from fortify.workflow.notebooks import code_of, inherited_parameters
from fortify.workflow.profiles import load_profile
from fortify.workflow.steps import STYLE, Step

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
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
    per_profile = [name for name in stems if name[:2] in ("01", "05", "07", "09", "10")]
    per_run = [name for name in stems if name not in per_profile]
    expected = [f"grouped-s0/{name}" for name in per_run]  # transfer is looked at there alone
    expected += [f"random-s0/{name}" for name in per_run if name[:2] != "11"]
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
    # None is there twice under two names. (A run on phantoms may keep both splits' first epoch.)
    pictures = [p.read_bytes() for p in (BUILD / "figures").glob("*.png")]
    assert len(set(pictures)) == len(pictures)


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


def test_classes_and_scans_under_table_1_are_what_the_rows_say(finished):
    """From rows and logits of one run to the published table, by another road than the library's."""
    groups = pd.read_csv(BUILD / "data/splits/grouped-s0.csv").group.to_numpy()
    table = pd.read_csv(BUILD / "tables/table1_grouped_classes.csv").set_index(["model", "unit", "attack"])
    run = BUILD / "grouped-s0"
    rows = pd.concat([read_rows(run / f"{name}_predictions.csv") for name in ("adversarial", "baselines")])
    logits = pd.concat([pd.read_csv(run / f"{name}_logits.csv") for name in ("adversarial", "baselines")])
    profile = yaml.safe_load((ROOT / "notebooks/profiles/test.yaml").read_text())
    assert table.index.unique("model").tolist() == ["normal", "adversarial", *profile["baselines"]]
    for model, unit, attack in table.index:
        if model == "normal":
            continue
        own = rows[rows.model.eq(model) & rows.attack.eq(attack) & rows.protocol.eq("adaptive")]
        own = own[own.eps_255.isin([0, 4])]
        right = own.prediction.eq(own.label)
        recall = right[own.label.eq(1)].mean()
        if unit == "scan":
            own = logits[logits.model.eq(model) & logits.attack.eq(attack)]
            right, labels = [], []
            for group in np.unique(groups[own["index"]]):
                slices = own[groups[own["index"]] == group]
                labels.append(slices.label.mode()[0])
                right.append(slices.filter(like="logit_").sum().to_numpy().argmax() == labels[-1])
            recall = np.mean(np.array(right)[np.array(labels) == 1])
        line = table.loc[(model, unit, attack)]
        assert (line.k, line.n) == (sum(right), len(right)), (model, unit, attack)
        assert line.recall_malignant_percent == pytest.approx(100 * recall)
    (shown,) = [c for c in nbformat.read(BUILD / "notebooks/05_results.ipynb", 4).cells if c.id == "05-23"]
    texts = [output.data["text/markdown"] for output in shown.outputs]
    for split in ("grouped", "random"):
        (text,) = [text for text in texts if f"`tables/table1_{split}_classes.md`" in text]
        own = pd.read_csv(BUILD / f"tables/table1_{split}_classes.csv").query("unit == 'slice'")
        for model, part in own.groupby("model"):
            (line,) = [line for line in text.splitlines() if line.startswith(f"| {model} |")]
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            shares = [whole_percent(v / 100) for v in part.accuracy_percent]
            assert [cell.split(" (")[0] for cell in cells[1:3]] == shares
            recalls = [float(share) for share in cells[4].split(" / ")]
            assert recalls == pytest.approx(part.recall_benign_percent.tolist(), abs=0.5)


def test_notebooks_2_to_5_open_with_an_answer_made_of_this_runs_tables(finished):
    """Whose headline number is the one of the per-example rows."""
    for path in sorted((BUILD / "notebooks").glob("**/0[2-5]_*.ipynb")):
        cells = nbformat.read(path, 4).cells
        texts = [o.data.get("text/markdown", "") for c in cells for o in c.get("outputs", [])]
        (answer,) = [text for text in texts if text.startswith("**Short answer of this run**")]
        assert answer.endswith("say nothing about lungs.*") and "nan" not in answer, path
        assert not any("short answer follows" in text for text in texts)
        if path.stem != "05_results":
            rows = read_rows(BUILD / path.parent.name / f"{MODEL_OF[path.stem[:2]]}_predictions.csv")
            attack = "clean" if path.stem == "02_baseline" else "pgd"
            own = rows[rows.attack.eq(attack) & rows.protocol.eq("adaptive") & rows.eps_255.isin([0, 4])]
            right = own.prediction.eq(own.label)
            assert f"**{100 * right.mean():.0f} %**" in answer and f"({right.sum()} of {len(own)};" in answer


MODEL_OF = {"02": "normal", "03": "normal", "04": "adversarial"}


def test_no_table_in_the_text_of_notebooks_2_to_5_is_longer_than_a_reader_reads(finished):
    for path in sorted((BUILD / "notebooks").glob("**/0[2-5]_*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            for text in (o.data.get("text/markdown", "") for o in cell.get("outputs", [])):
                lines = [line for line in text.splitlines() if line.startswith("|")]
                assert len(lines) <= 8 + 2 and all(line.count("|") <= 6 + 1 for line in lines), cell.id
            assert not any("text/html" in o.data for o in cell.get("outputs", []))


def test_each_step_is_named_as_it_starts_and_table_1_is_printed_as_soon_as_it_is_made(called):
    shown = re.findall(r"^(\d+) of (\d+): (.*)$", called.stderr, re.MULTILINE)
    assert [(int(number), int(total)) for number, total, _ in shown] == [(i, 22) for i in range(1, 23)]
    names = [name for _, _, name in shown]
    per_run = ("baseline", "attacks", "adversarial training", "published protocol", "robustness audit")
    per_run += ("explanations", "detection")
    once = {"data", "results", "leakage", "robust optimisation", "transfer, grouped", "claims", "html"}
    once |= {"explorer"}
    assert set(names) == {f"{name}, {split}" for name in per_run for split in ("random", "grouped")} | once
    assert names[0] == "data" and names[-1] == "html"
    assert re.search(
        r"results$(.*\n)+Table 1 is ready\. .*claims, (explorer, )?html\.$(.*\n)+.*claims$",
        called.stderr,
        re.M,
    )
    assert "Select jobs" not in called.stderr and "%" not in called.stderr, "Snakemake's own lines"
    places = f"Figures: {BUILD}/figures   Tables: {BUILD}/tables   Pages: {BUILD}/html/index.html\n"
    places = places.replace(f"{ROOT}/", "")
    assert called.stdout.startswith(f"\n{(BUILD / 'tables/table1.txt').read_text()}\nIts figure: ")
    assert called.stdout.count("Table 1. ") == 2 and called.stdout.endswith(f".ipynb\n{places}")
    for path in re.findall(r": (build/\S+)", called.stdout):
        assert (ROOT / path).exists(), path


def test_a_second_call_does_nothing_but_print_table_1(called):
    """Which is at the end, and not when the slices alone are called for."""
    again = snakemake("--quiet", "rules")
    assert again.stderr.splitlines()[1:] == ["everything is up to date"] and again.stdout == called.stdout


def test_notebook_1_crops_what_networks_are_shown_and_not_what_is_split(finished, tmp_path):
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", "notebooks"]
    command += ["notebooks/01_data.ipynb", "-f"]
    command += ["notebooks/profiles/test.yaml", "-p", "run", str(tmp_path / "data"), "-p", "crop"]
    out = str(tmp_path / "01.ipynb")
    done, refused = (
        subprocess.run([*command[:7], out, *command[7:], crop], cwd=ROOT, capture_output=True, text=True)
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
AFTER_TRAINING |= {"robust_optimisation": 1, "transfer": 1, "explanations": 2, "detection": 2}
AFTER_TRAINING |= {"explorer": 1, "results": 1, "claims": 1, "html": 1, "all": 1}


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ("train_pgd_steps=3", {"adversarial_training": 2, **AFTER_TRAINING}),
        ("cw_steps=6", {"attacks": 2, "adversarial_training": 2, **AFTER_TRAINING}),
        ("published_epochs=1", {"published_protocol": 2, "claims": 1, "explorer": 1, "html": 1, "all": 1}),
        ("second_epochs=2", {"transfer": 1, "explanations": 1, "claims": 1, "html": 1, "all": 1}),
        ("leak_seeds=4", {"leakage": 1, "claims": 1, "html": 1, "all": 1}),
    ],
)
def test_a_changed_parameter_redoes_only_what_depends_on_it(finished, change, redone):
    assert jobs(snakemake("--dry-run", config=("profile=test", change)).stdout) == redone


def test_a_changed_parameter_redoes_those_that_inherit_it(finished):
    """Notebook 4 does not declare ``lr``: by the rule's own parameters, whatever its inputs are."""
    target = "build/test/random-s0/04_adversarial_training.json"
    options = ("--dry-run", "--rerun-triggers", "params", "--allowed-rules", "adversarial_training")
    assert "Nothing to be done" in snakemake(target, *options).stdout
    shown = snakemake(target, *options, config=("profile=test", "lr=0.5")).stdout
    assert jobs(shown) == {"adversarial_training": 1}


def test_a_step_holds_what_it_inherits_and_not_what_it_does_not():
    parameters = load_profile(ROOT / "notebooks/profiles/laptop.yaml", NOTEBOOKS)

    def inherited(notebook):
        return Step("", notebook, "{run}", [], []).inherited(parameters)

    training = inherited("04_adversarial_training")
    assert training["02_baseline"].items() >= {"lr": 0.004, "epochs": 36}.items()
    assert training["03_attacks"].items() >= {"pgd_restarts": 1, "cw_steps": 80}.items()
    # A run's folder, split and seed are the workflow's, and differ by run.
    assert {"run", "split", "seed"}.isdisjoint(training["02_baseline"])
    # The leakage of one seed's models is not redone for a second seed.
    assert inherited("07_leakage") == {
        "01_data": {"splits": ["random", "grouped"]},
        "03_attacks": {"eps_255": 4},
        "02_baseline": {},
    }
    assert inherited("03_attacks") == {}


def test_another_seed_leaves_the_finished_one(finished):
    two = ("profile=test", "seeds=[0,1]")
    try:
        done = snakemake("data", "--quiet", "rules", config=two)
        assert (done.returncode, done.stdout) == (0, "") and done.stderr.splitlines()[-1] == "data"
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
    allowed = ("--allowed-rules", "results", "claims", "html", "tables")
    done = snakemake("tables", "--quiet", "rules", *allowed, config=("profile=test", "finished=true"))
    for path in weights:
        shutil.move(tmp_path / f"{path.parent.name}-{path.name}", path)
    assert snakemake("--quiet", "rules").returncode == 0  # as it was: without weights the pages lack a figure
    assert done.returncode == 0 and len(weights) == 12, done.stderr[-2000:]
    assert table.read_text() == before and done.stdout.startswith(f"\n{before}")


def test_the_reference_run_is_five_seeds_on_both_splits():
    shown = snakemake("--dry-run", "--forceall", config=("profile=paper",)).stdout
    found = jobs(shown)
    per_run = dict.fromkeys(("baseline", "attacks", "adversarial_training", "published_protocol"), 10)
    once = {"data": 1, "results": 1, "leakage": 1, "robustness_audit": 2, "transfer": 1, "claims": 1}
    once |= {"detection": 2}
    assert {rule: found[rule] for rule in (*per_run, *once)} == per_run | once
    # What Table 1 needs comes first.
    first = re.findall(r"^rule (\w+):\n(?:    .*\n)*?    priority: 1$", shown, re.MULTILINE)
    assert set(first) == {"data", "baseline", "attacks", "adversarial_training", "results"}


@pytest.mark.parametrize(
    ("profile", "runs"), [("lungs", 10), ("paper_lungs", 10), ("resnet18", 10), ("resnet50", 8)]
)
def test_a_companion_profile_is_a_table_1_with_its_audit(profile, runs):
    per_run = dict.fromkeys(("baseline", "attacks", "adversarial_training"), runs)
    own = per_run | {"data": 1, "results": 1, "robustness_audit": 2}
    shown = snakemake("--dry-run", "--forceall", config=(f"profile={profile}",)).stdout
    assert jobs(shown) == own | {"all": 1}
    command = ("make", "--no-print-directory", "-o", ".venv/.installed", "--dry-run", profile)
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert re.search(rf"&& snakemake +--config profile={profile} ", made)


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
    ("config", "splits"),
    [
        (("profile=demo",), ["random"]),
        (("profile=demo", "splits=[grouped]"), ["grouped"]),  # its own split is not run: the first that is
        (("profile=test", "audit_splits=[grouped]", "seeds=[0,1]"), ["grouped"]),
    ],
)
def test_the_audit_is_run_on_its_splits_alone(config, splits):
    shown = snakemake("--dry-run", "-p", "--forceall", config=config).stdout
    assert re.findall(r"(\w+)-s0/08_robustness_audit.ipynb --kernel", shown) == splits
    assert jobs(shown)["robustness_audit"] == 1
    assert re.search(r"audit_splits: \[(.*?)\]", shown)[1].split(", ") == splits
    read = re.search(r"^rule claims:\n    input: (.*)", shown, re.MULTILINE)[1]
    assert re.findall(r"audit_(\w+)-s0.csv", read) == splits
    leakage = re.search(r"^rule leakage:\n    input: (.*)", shown, re.MULTILINE)[1]
    both = set(re.findall(r"(\w+)-s0/02_baseline.ipynb --kernel", shown))
    assert set(re.findall(r"(\w+)-s0/normal.safetensors", leakage)) == both, "of all splits, as before"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("profile=test", "esp_255=4"), "no notebook has a parameter esp_255"),
        (("profile=none",), "the profiles are"),
        (
            ("profile=test", "eps_255=8/255"),
            "eps_255 (notebook 03_attacks) must be a number like 4.0, not the",
        ),
        (("profile=test", "seeds=0"), "must be a list like [0, 1, 2, 3, 4], not 0"),
        (("profile=test", "flip=no way"), "must be true or false like True, not the text 'no way'"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(config, message):
    refused = snakemake("--dry-run", config=config)
    assert refused.returncode != 0 and message in refused.stdout + refused.stderr


TABLE1 = ("normal_predictions.csv", "adversarial_predictions.csv", "normal_history.csv")
TABLE1 += ("adversarial_history.csv", "02_baseline.json", "03_attacks.json", "04_adversarial_training.json")
TABLE1 += ("normal_logits.csv", "adversarial_logits.csv", "baselines_predictions.csv", "baselines_logits.csv")
PUBLISHED = ("published_predictions.csv", "published_protocol.csv", "06_published_protocol.json")


@pytest.fixture
def cut(tmp_path):
    """A checkout with runs that were cut between the splits: files of no content, for dry runs."""
    for name in ("notebooks", "paper", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    shutil.copy(ROOT / "Makefile", tmp_path)
    for run in ("random-s2", "random-s10", "grouped-s2"):
        touch(tmp_path, *(f"{run}/{name}" for name in TABLE1))
    touch(tmp_path, "grouped-s10/normal_predictions.csv", "grouped-s10/02_baseline.json")  # unfinished
    touch(tmp_path, "data/slices.npz", "data/01_data.json")
    return tmp_path


def touch(checkout, *names):
    for name in names:
        path = checkout / "build/test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def tables(checkout, *config):
    """What `make tables` would run, and with which inputs, in a dry run."""
    allowed = ("--allowed-rules", "results", "claims", "html", "tables")
    config = ("profile=test", "finished=true", *config)
    done = snakemake("tables", "--dry-run", "-p", *allowed, config=config, cwd=checkout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_make_tables_takes_what_is_whole_of_each_split(cut):
    """A run that was cut after the random split of a seed: its tables need nothing of the grouped one."""
    shown = tables(cut)
    assert jobs(shown) == {"results": 1, "tables": 1}, "without what the claims read: Table 1 alone"
    rows = set(re.findall(r"(\w+-s\d+)/adversarial_predictions.csv", shown))
    assert rows == {"random-s2", "random-s10", "grouped-s2"}
    data = snakemake("data", "--dry-run", "-p", config=("profile=test", "finished=true"), cwd=cut).stdout
    assert re.search(r"seeds: \[(.*?)\]", data)[1] == "2, 10", "as numbers"
    one = tables(cut, "seeds=[10]")
    assert set(re.findall(r"(\w+-s\d+)/adversarial_predictions.csv", one)) == {"random-s10"}
    assert "table1_grouped" not in one


def test_make_tables_makes_the_claims_where_what_they_read_is_there(cut):
    leaks = "leak_meter leak_summary leak_twins leak_tells groups group_sensitivity lungs_or_scanner"
    touch(cut, *(f"tables/{name}.csv" for name in leaks.split()))
    touch(cut, "tables/audit_random-s2.csv", *(f"random-s2/{name}" for name in PUBLISHED))
    shown = tables(cut)
    assert jobs(shown) == {"results": 1, "claims": 1, "html": 1, "tables": 1}
    assert re.search(r"audit_splits: \[(.*?)\]", shown)[1] == "random", "as many as are there"
    assert set(re.findall(r"(\w+-s\d+)/published_protocol.csv", shown)) == {"random-s2"}
    # A companion profile has no claims, whatever is there.
    profile = cut / "notebooks/profiles/test.yaml"
    profile.write_text(profile.read_text() + "beside: true\n")
    assert jobs(tables(cut)) == {"results": 1, "tables": 1}


def test_make_tables_of_nothing_is_one_clear_error(cut):
    shutil.rmtree(cut / "build")
    config = ("profile=test", "finished=true")
    refused = snakemake("tables", "--dry-run", config=config, cwd=cut)
    assert refused.returncode != 0
    assert "build/test holds no finished run; run that profile first" in refused.stdout + refused.stderr
    own = ("make", "--no-print-directory", "-o", ".venv/.installed", "--dry-run", "tables", "PROFILE=test")
    made = subprocess.run((*own, "SEEDS=2"), cwd=cut, capture_output=True, text=True).stdout
    assert made.count("--config profile=test finished=true 'seeds=[2]'") == 2
    assert "snakemake  tables --allowed-rules results claims html tables " in made


def test_ones_own_images_as_the_page_says(cut):
    """Its command has the options of `make` without naming them, and is a Table 1 with its audit."""
    page = (ROOT / "docs/reproducing.md").read_text(encoding="utf-8")
    printed = re.search(r"^\.venv/bin/(snakemake .*profile=mine)$", page, re.MULTILINE)[1]
    (cut / "notebooks/profiles/mine.yaml").write_text(
        "title: my own\nbeside: true\ndataset: folder\ndata_dir: /nowhere\nct: false\nseeds: [0]\n"
    )
    command = [sys.executable, "-m", *printed.split(), "--dry-run"]
    done = subprocess.run(command, cwd=cut, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Using workflow specific profile profiles/default" in done.stderr
    per_run = dict.fromkeys(("baseline", "attacks", "adversarial_training", "robustness_audit"), 2)
    assert jobs(done.stdout) == per_run | {"data": 1, "results": 1, "all": 1}
    # Its notebooks run in its own environment, whatever `python` is to who calls it.
    command = [*command[:3], "data", *command[3:-1]]
    bare = os.environ | {"PATH": os.defpath, "FORTIFY_ROOT": str(cut)}
    ran = subprocess.run(command, cwd=cut, capture_output=True, text=True, env=bare)
    assert "/nowhere" in ran.stderr and "No module named" not in ran.stderr, ran.stderr[-2000:]
    assert (
        "\ndata failed; see build/mine/notebooks/01_data.ipynb, build/mine/notebooks/01_data.log\n"
        in ran.stderr
    )
    options = yaml.safe_load((ROOT / "profiles/default/config.yaml").read_text())
    assert options == {
        "cores": "all",
        "quiet": ["rules", "host"],
        "nolock": True,
        "rerun-incomplete": True,
        "max-checksum-file-size": 1_000_000_000,
    }
    assert f"{ROOT}/profiles/default" in OPTIONS
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert not re.search(r"--nolock|--rerun-incomplete|--max-checksum", makefile + page)


def test_another_notebook_costs_a_file_and_a_row(cut):
    """One that reads an earlier one's parameters and a module of the library."""
    parameters = nbformat.v4.new_code_cell('run = ""\nshine = 3', metadata={"tags": ["parameters"]})
    code = 'from fortify.intervals import wilson\nparts = run.parameters("02_baseline", "epochs")'
    cells = [parameters, nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), cut / "notebooks/10_more.ipynb")
    snakefile = cut / "Snakefile"
    row = (
        'Step("more", "10_more", "{run}", ["{run}/normal.safetensors"], ["{run}/more.csv"]),\n]  # fmt: skip'
    )
    snakefile.write_text(snakefile.read_text().replace("]  # fmt: skip", row))
    config = ("profile=test", "shine=4")
    shown = snakemake("build/test/random-s0/more.csv", "--dry-run", "-p", config=config, cwd=cut)
    assert jobs(shown.stdout) == {"data": 1, "baseline": 1, "more": 1}
    assert "fortify.workflow.papermill notebooks/10_more.ipynb" in shown.stdout and "shine: 4" in shown.stdout


def test_a_folder_is_cleared_but_for_the_locks_and_not_while_a_run_is_at_work(tmp_path):
    build = tmp_path / "test"
    with wait_for_profile(build):
        (build / "tables").mkdir()
        (build / "tables/a.csv").touch()
        (build / "b").touch()
        waiting = subprocess.Popen(
            [sys.executable, "-c", f"from workflow import clear, Path; clear(Path({str(build)!r}))"],
            cwd=ROOT / "tests",
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "waiting for another run in this checkout" in waiting.stderr.readline()
        assert (build / "tables/a.csv").exists()
    assert waiting.wait() == 0
    waiting.stderr.close()
    assert sorted(os.listdir(build)) == [".lock", ".notebook-lock"]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of a few modules, and a notebook that imports one of them."""
    package = tmp_path / "fortify"
    (package / "inner").mkdir(parents=True)
    modules = {
        "__init__": '"""Words."""',
        "work": "import fortify.style\nfrom fortify.inner.deep import depth\nfrom fortify.tools import bar",
        "style": "import fortify.pens",
        "pens": "COLOUR = 1",
        "tools": "from fortify.unused import x\n\n\ndef bar():\n    pass\n\n\ndef seeded():\n    return 1",
        "unused": "x = 1",
        "inner/__init__": "",
        "inner/deep": 'def depth():\n    """How deep."""\n    return 1  # metres',
    }
    for name, source in modules.items():
        (package / f"{name}.py").write_text(source + "\n")
    cells = [
        nbformat.v4.new_code_cell("import numpy as np"),
        nbformat.v4.new_code_cell("import fortify.work"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    monkeypatch.setattr("fortify.workflow.notebooks.PACKAGE", package)
    return package


def test_a_notebook_depends_on_what_it_imports_and_what_that_imports(library):
    found = code_of(library.parent / "n.ipynb")
    names = {"", ".work", ".style", ".pens", ".tools", ".unused", ".inner", ".inner.deep"}
    assert found.keys() == {f"fortify{name}" for name in names}
    left = code_of(library.parent / "n.ipynb", without=("fortify.style", "fortify.tools.bar"))
    assert left.keys() == {f"fortify{name}" for name in ("", ".work", ".inner", ".inner.deep")}


def test_words_about_code_change_nothing_and_code_does(library):
    notebook, deep = library.parent / "n.ipynb", library / "inner/deep.py"
    before = code_of(notebook)
    deep.write_text('def depth():\n    """Deeper words."""\n\n    return 1\n')
    assert code_of(notebook) == before
    deep.write_text("def depth():\n    return 2\n")
    after = code_of(notebook)
    assert {name for name in before if before[name] != after[name]} == {"fortify.inner.deep"}


def test_of_a_module_a_part_may_count_and_another_not(library):
    work, tools = library / "work.py", library / "tools.py"
    work.write_text("from fortify.tools import bar, seeded\n")
    options = {"without": ("fortify.tools.bar",)}
    before = code_of(library.parent / "n.ipynb", **options)
    assert before.keys() >= {"fortify.tools"}
    tools.write_text(tools.read_text().replace("pass", "print()"))
    assert code_of(library.parent / "n.ipynb", **options) == before
    tools.write_text(tools.read_text().replace("return 1", "return 2"))
    assert code_of(library.parent / "n.ipynb", **options) != before


def test_style_makes_no_costly_step_again_and_the_claims_know_their_figures():
    """Of the notebooks as they are: those that train or attack depend on no figure, table or file's form."""
    costly = code_of(ROOT / "notebooks/04_adversarial_training.ipynb", without=STYLE)
    assert costly.keys() >= {"fortify.attacks", "fortify.training", "fortify.runtime", "fortify.objectives"}
    style = {"fortify.figures", "fortify.tables", "fortify.answers", "fortify.files", "fortify.runs"}
    assert not style & costly.keys()
    cheap = code_of(ROOT / "notebooks/09_claims.ipynb")
    assert cheap.keys() >= {"fortify.examined.figures", "fortify.figures", "fortify.examined.claims"}
    for stem in ("06_published_protocol", "07_leakage", "08_robustness_audit", "11_transfer"):
        costly = code_of(ROOT / f"notebooks/{stem}.ipynb", without=STYLE)
        assert not [name for name in costly if name.endswith((".answer", ".figures"))], stem


def test_a_notebooks_prose_trains_nothing_again_and_its_code_does(finished, tmp_path):
    """The results are made again, which is cheap, so that their pages read as the notebook does."""
    shutil.copytree(BUILD, tmp_path / "build/test")
    shutil.copytree(ROOT / ".snakemake/metadata", tmp_path / ".snakemake/metadata")
    for name in ("notebooks", "paper", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy2(ROOT / "Snakefile", tmp_path)
    assert "Nothing to be done" in snakemake("--dry-run", cwd=tmp_path).stdout

    def change(stem, kind):
        path = tmp_path / f"notebooks/{stem}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        next(c for c in notebook.cells if c.cell_type == kind).source += "\n# More."
        nbformat.write(notebook, path)

    change("02_baseline", "markdown")
    change("05_results", "markdown")
    assert jobs(snakemake("--dry-run", cwd=tmp_path).stdout) == {
        "results": 1,
        "claims": 1,
        "html": 1,
        "all": 1,
    }
    change("07_leakage", "code")
    found = jobs(snakemake("--dry-run", cwd=tmp_path).stdout)
    assert found == {"results": 1, "leakage": 1, "claims": 1, "html": 1, "all": 1}


def test_what_a_notebook_inherits_is_read_in_its_source(tmp_path):
    def found(*lines):
        cells = [nbformat.v4.new_code_cell(line) for line in lines]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
        return inherited_parameters(tmp_path / "n.ipynb")

    assert found("x = 1", 'a = run.parameters("01_a", "b")["b"]') == {"01_a": ["b"]}
    assert found('shared_parameters(runs, "01_a", "b", "c")', 'r.parameters("02_d")') == {
        "01_a": ["b", "c"],
        "02_d": [],
    }
    # All of them, whatever else is asked for by name.
    assert found('r.parameters("02_d")', 'r.parameters("02_d", "b")') == {"02_d": []}
    assert found('r.parameters("02_d", "b")', 'r.parameters("02_d")') == {"02_d": []}
    with pytest.raises(ValueError, match="must name notebook and parameters literally"):
        found("run.parameters(name)")


def test_the_manifests_say_what_was_inherited(finished):
    made = json.loads((BUILD / "random-s0/04_adversarial_training.json").read_text())
    assert made["parameters"].keys().isdisjoint({"epochs", "cw_steps"})
    assert (
        made["inherited"]["02_baseline"]["epochs"] == 2 and made["inherited"]["03_attacks"]["cw_steps"] == 5
    )
    claims = json.loads((BUILD / "claims/09_claims.json").read_text())
    assert claims["inherited"]["01_data"] == {"splits": ["random", "grouped"], "seeds": [0]}


def test_an_evaluation_is_timed_on_the_models_of_a_finished_run(finished, tmp_path, monkeypatch):
    """benchmarks/evaluation.py: its ways count alike, and a run that was cut off goes on."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    evaluation, path = importlib.import_module("evaluation"), tmp_path / "evaluation.csv"
    monkeypatch.setattr(evaluation, "OTHERS", ("foolbox",))
    table = evaluation.measure(ROOT, "test", 1, 6, path)
    names = ["fortify", "fortify, every image", "foolbox"]
    assert table.library.tolist() == 4 * names and table.seconds.gt(0).all()
    counts = table.pivot(index=["split", "model"], columns="library", values="correct_pgd_4")
    assert (counts["fortify"] <= counts["fortify, every image"]).all()
    path.write_text("\n".join(path.read_text().splitlines()[:-2]) + "\n")
    again = evaluation.measure(ROOT, "test", 1, 6, path)
    assert again.seconds[:10].tolist() == pytest.approx(table.seconds[:10].tolist()) and len(again) == 12
    lines = "".join(evaluation.section(table, "cpu"))
    assert "| random |" in lines and "| grouped |" in lines and "6 test slices" in lines
