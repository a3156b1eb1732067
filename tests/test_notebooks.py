"""The notebooks as a set: each is run by both runners, agrees with its neighbours, and is not stale."""

import ast
import base64
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from fortify.workflow.profiles import declared_parameters
from fortify.workflow.publish import source_sha256

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
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
    assert f'papermill("{path.stem}")' in (ROOT / "Snakefile").read_text()
    assert "--nbmake notebooks" in (ROOT / "Makefile").read_text()


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
    lines = parameters_cell(path).source.splitlines()
    assert len(lines) == len(declared_parameters(path))


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
    assert any(c.outputs for c in code), "readers find no results: run a profile, then `make publish`"
    assert notebook.metadata["fortify"]["source_sha256"] == source_sha256(notebook), (
        "the source changed after it was executed: run the profile again, then `make publish`"
    )
    outputs = [o for c in code for o in c.outputs]
    assert not any(o.output_type in ("error", "stream") for o in outputs), "no error, no noise"


def test_all_were_executed_with_one_profile():
    assert len({read(path).metadata["fortify"]["profile"] for path in NOTEBOOKS}) == 1


@each
def test_the_figures_shown_are_the_published_ones(path):
    notebook = read(path)
    profile = notebook.metadata["fortify"]["profile"]
    folder = ROOT / "figures" / ("" if profile == "paper" else profile)
    published = {p.read_bytes() for p in folder.glob("*.png")}
    outputs = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert outputs, "every notebook shows a figure"
    assert all(base64.b64decode(o.data["image/png"]) in published for o in outputs)
