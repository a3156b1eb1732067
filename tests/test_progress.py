"""What a run prints, of a small workflow with rules of the same names, and which steps come first."""

import subprocess
import sys

from fortify.workflow.steps import Step, needed_for

SNAKEFILE = """
import sys
from fortify.workflow.progress import show_progress

show_progress(workflow, "build/x", seeds=[0, 2])
RUNS = ["random-s0", "grouped-s2"]

rule all:
    input: expand("{run}.audit", run=RUNS), "build/x/tables/table1.txt"

rule robustness_audit:
    input: "{run}.trained"
    output: "{run}.audit"
    log: "{run}.log"
    threads: workflow.cores
    shell: "test -e sound && touch {output} || {{ echo no sound >&2; exit 1; }}"

rule baseline:
    output: "{run}.trained"
    threads: workflow.cores
    priority: 1
    shell: "touch {output}"

rule results:
    input: expand("{run}.trained", run=RUNS)
    output: "build/x/tables/table1.txt"
    priority: 1
    shell: "echo Table 1. A table >{output}"
"""


def call(folder, *options):
    (folder / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", *options, "--cores", "2", "--quiet", "rules", "host"]
    return subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_a_run_shows_its_steps_and_table_1_as_soon_as_it_is_made(tmp_path):
    first = call(tmp_path)
    lines = first.stdout.splitlines()
    trained, (one, two) = lines[:2], ("random, seed 0", "grouped, seed 2")
    assert sorted(line.partition("baseline, ")[2] for line in trained) == sorted([one, two])
    assert [line[:8] for line in trained] == ["1 of 5: ", "2 of 5: "]
    figure = "Its figure: build/x/figures/robustness_curves.png   "
    figure += "Its notebook: build/x/notebooks/05_results.ipynb"
    table = ["", "Table 1. A table", "", figure]
    rest = "Table 1 is ready. Still to come, and no part of it: robustness audit."
    assert lines[2:8] == ["3 of 5: results", *table, rest]
    assert lines[8] in [f"4 of 5: robustness audit, {run}" for run in (one, two)]
    # A step that fails: what it printed, then Snakemake's errors, and among them which it is and its log.
    which = lines[8].partition(": ")[2]
    name = "random-s0" if one in which else "grouped-s2"
    assert lines[9] == "no sound" and f"{which} failed; see {name}.log" in lines
    assert first.returncode and "Exiting because a job execution failed" in first.stdout
    # Table 1, now up to date, is shown at the end of a run that needs it.
    (tmp_path / "sound").touch()
    again = call(tmp_path).stdout.splitlines()
    assert [line[:24] for line in again[:2]] == [f"{i} of 2: robustness audit"[:24] for i in (1, 2)]
    assert again[2:] == [*table, "Figures: build/x/figures   Tables: build/x/tables"]
    assert call(tmp_path, "random-s0.trained").stdout == "baseline is up to date\n"


def test_a_step_needs_those_that_make_what_it_reads():
    steps = [
        Step("slices", "", "", [], ["slices.npz", "splits/random-s0.csv"]),
        Step("models", "", "{run}", ["splits/{run}.csv"], ["{run}/model"]),
        Step("table", "", "", ["random-s0/model", "own file"], ["table"]),
        Step("audit", "", "{run}", ["{run}/model"], ["audit_{run}.csv"]),
        Step("claims", "", "", ["audit_random-s0.csv", "table"], ["claims"]),
    ]
    assert needed_for("slices", steps) == {"slices"}
    assert needed_for("table", steps) == {"slices", "models", "table"}
    assert needed_for("claims", steps) == {step.name for step in steps}
