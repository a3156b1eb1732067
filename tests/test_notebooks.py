"""The notebooks as a set: each is run by both runners, agrees with its neighbours, and is not stale."""

import ast
import base64
import importlib
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from fortify.runs import declared_parameters
from fortify.workflow.notebooks import inherited_parameters
from fortify.workflow.publish import awaiting, awaiting_line, source_sha256

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Whose code changed since they were executed: take them out when `make publish` has run.
AWAITING: set[str] = set()
TEST_PROFILE = yaml.safe_load((ROOT / "notebooks/profiles/test.yaml").read_text())


def read(path):
    return nbformat.read(path, as_version=4)


def parameters_cell(path):
    return next(c for c in read(path).cells if "parameters" in c.metadata.get("tags", []))


each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def test_there_are_notebooks():
    assert [p.stem[:2] for p in NOTEBOOKS] == [f"{i:02d}" for i in range(1, len(NOTEBOOKS) + 1)]


@each
def test_the_workflow_runs_it(path):
    """test_workflow.py runs the Snakefile; ``make test`` runs nbmake over the folder."""
    assert f', "{path.stem}", "' in (ROOT / "Snakefile").read_text()
    assert "--nbmake notebooks" in (ROOT / "Makefile").read_text()


@each
def test_what_it_imports_is_there(path):
    """A notebook is run late: a name that the library no longer has is found here."""
    code = "\n".join(c.source for c in read(path).cells if c.cell_type == "code")
    imports = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom)]
    own = [n for n in imports if n.module.split(".")[0] == "fortify"]
    assert len(own) >= 5
    for node in own:
        module = importlib.import_module(node.module)
        modules = {m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []))}
        missing = [a.name for a in node.names if not hasattr(module, a.name) and a.name not in modules]
        assert missing == [], node.module


@each
def test_no_parameter_repeats_an_earlier_notebooks(path):
    """What an earlier one declares is read from its manifest; a run's own folder, split and seed apart."""
    own = set(declared_parameters(path)) - {"run", "split", "seed", "device"}
    earlier = {p.stem: declared_parameters(p) for p in NOTEBOOKS if p.stem < path.stem}
    assert own & {name for declared in earlier.values() for name in declared} == set()
    for stem, names in inherited_parameters(path).items():
        assert set(names) <= earlier[stem].keys(), stem


def test_tables_are_of_the_runs_that_were_asked_for():
    """Not of what an earlier call with more seeds left in the folder, nor are the captions."""
    calls = [
        node
        for path in NOTEBOOKS
        for cell in read(path).cells
        if cell.cell_type == "code"
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "siblings"
    ]
    assert len(calls) >= 4
    assert all({keyword.arg for keyword in call.keywords} == {"splits", "seeds"} for call in calls)


def test_adversarial_training_has_ten_parameters():
    assert len(declared_parameters(ROOT / "notebooks/04_adversarial_training.ipynb")) <= 10


@each
def test_nbmake_and_papermill_get_the_same_tiny_values(path):
    mock = dict(parameters_cell(path).metadata["nbmake"]["mock"])
    assert mock.pop("run").startswith("build/nbmake/")
    assert mock == {k: v for k, v in TEST_PROFILE.items() if k in declared_parameters(path)}


@each
def test_it_opens_with_a_question_and_what_it_reads_and_writes(path):
    first = read(path).cells[0].source
    assert re.match(r"# \d+ · ", first) and "**Question.**" in first
    assert "**Reads**" in first and "**Writes**" in first


@each
def test_every_parameter_is_a_literal_with_a_line_of_its_own(path):
    """Or, of a mapping and of a list that is too long for one, each entry."""
    source = parameters_cell(path).source
    lines = ast.parse(source).body
    assert len(lines) == len(declared_parameters(path)) == len({line.lineno for line in lines})
    for line in lines:
        entries = line.value.keys if isinstance(line.value, ast.Dict) else []
        if isinstance(line.value, ast.List) and line.end_lineno > line.lineno:
            entries = line.value.elts
        assert [entry.lineno for entry in entries] == [*range(line.lineno + 1, line.end_lineno)], line.lineno


@each
def test_it_is_readable(path):
    code = [c.source for c in read(path).cells if c.cell_type == "code"]
    parameters = parameters_cell(path).source  # a list, one a line
    lines = [line for cell in code if cell != parameters for line in cell.splitlines() if line.strip()]
    assert len(lines) <= 120
    names = [n for cell in code for n in ast.walk(ast.parse(cell)) if isinstance(n, ast.FunctionDef)]
    assert all(n.end_lineno - n.lineno < 15 for n in names), "a longer function lives in lib"
    assert not any("filterwarnings" in cell or "/home/" in cell for cell in code)
    assert path.stat().st_size < 2_000_000, "GitHub shows no larger notebook"


@each
def test_committed_outputs_come_from_the_committed_source(path):
    notebook = read(path)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    shown = any(c.outputs for c in code) or "awaiting" in notebook.metadata["fortify"]
    assert shown, "readers find no results: run a profile, then `make publish`"
    current = notebook.metadata["fortify"]["source_sha256"] == source_sha256(notebook)
    assert current or "awaiting" in notebook.metadata["fortify"], (
        "the source changed after it was executed: run the profile again, then `make publish`"
    )
    outputs = [o for c in code for o in c.outputs]
    assert not any(o.output_type in ("error", "stream") for o in outputs), "no error, no noise"


def test_these_await_a_run_and_say_so():
    """And no other does: what is marked is what its outputs are not of, and README names it."""
    assert awaiting(ROOT).keys() == AWAITING
    stale = {p.stem for p in NOTEBOOKS if read(p).metadata.fortify.source_sha256 != source_sha256(read(p))}
    assert stale == AWAITING
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- generated: awaiting -->\n{awaiting_line(ROOT)}<!-- /generated: awaiting -->" in readme


def test_all_were_executed_with_one_profile():
    assert len({read(path).metadata["fortify"]["profile"] for path in NOTEBOOKS}) == 1


@each
def test_the_figures_shown_are_the_published_ones(path):
    notebook = read(path)
    profile = notebook.metadata["fortify"]["profile"]
    folder = ROOT / "figures" / ("" if profile == "paper" else profile)
    published = {p.read_bytes() for p in folder.glob("*.png")}
    outputs = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    never_run = not any(c.get("outputs") for c in notebook.cells)
    assert outputs or (never_run and "awaiting" in notebook.metadata["fortify"]), (
        "every notebook shows a figure"
    )
    assert all(base64.b64decode(o.data["image/png"]) in published for o in outputs)
