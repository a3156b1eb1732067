"""The archive for a machine without a network: what it holds, what its run.sh does, how results come back."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import psutil
import pytest
import torch
from packaging.requirements import Requirement
from workflow import ROOT

from fortify.data import IQ_OTH_NCCD
from fortify.workflow.away import BundleError, installed_needs, planned, unmet
from fortify.workflow.bundle import (
    EXTRAS,
    SOLVERS,
    TOP,
    UNUSED,
    closure,
    fetch_wheels,
    locked,
    main,
    make,
    platform_tags,
    project_needs,
    slim,
    target_environment,
)

PYTHON, PLATFORM = "3.12", "manylinux_2_28_x86_64"
THERE = target_environment(PYTHON, PLATFORM)


def git(checkout, *arguments):
    own = ["git", "-C", checkout, "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*own, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small committed checkout, with slices, as the one that is worked in."""
    root, slices = tmp_path / "checkout", tmp_path / "slices"
    for name in ("lib/fortify", "benchmarks", "notebooks/profiles", "figures"):
        own = shutil.ignore_patterns("__pycache__", "*.csv", "laptop", "lungs")
        shutil.copytree(ROOT / name, root / name, ignore=own)
    (root / "figures/a.png").touch()
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, root)
    for number, name in enumerate(IQ_OTH_NCCD.classes):
        (slices / name).mkdir(parents=True)
        (slices / name / f"{number}.jpg").write_bytes(b"not looked into")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "all")
    monkeypatch.setenv("FORTIFY_ROOT", str(root))
    monkeypatch.setenv("FORTIFY_DATA", str(slices))
    return root


@pytest.fixture
def unpacked(checkout, tmp_path):
    """The folder that an archive without packages unpacks to."""
    with tarfile.open(make(wheels=False)) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / TOP


# What is in it.


def test_the_archive_is_what_is_committed_and_the_slices(checkout, capsys):
    (checkout / "notes.txt").touch()
    archive = make(wheels=False)
    assert "left out, git does not track it: notes.txt" in capsys.readouterr().err
    with tarfile.open(archive) as tar:
        held = {entry.name.removeprefix(f"{TOP}/"): entry for entry in tar if entry.isfile()}
        about = json.load(tar.extractfile(f"{TOP}/bundle.json"))
    tracked = subprocess.check_output(["git", "-C", checkout, "ls-files"], text=True).split("\n")[:-1]
    slices = [f"data/{name}/{n}.jpg" for n, name in enumerate(IQ_OTH_NCCD.classes)]
    code = {f"checkout/{name}" for name in tracked if name != "figures/a.png"}
    assert set(held) == {"run.sh", "bundle.json", *slices, *code}
    assert held["run.sh"].mode == 0o755
    head = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    assert about["commit"] == head and head[:7] in archive.name and about["brought"] == []
    before = archive.read_bytes()
    assert make(wheels=False).read_bytes() == before, "the same commit is the same archive"


def test_what_is_not_committed_is_refused(checkout, capsys):
    (checkout / "pyproject.toml").write_text("# changed\n")
    assert main(["make", "--no-wheels"]) == 1
    assert "Commit these first, or undo them:\n M pyproject.toml" in capsys.readouterr().err
    shutil.rmtree(checkout / ".git")
    with pytest.raises(BundleError, match="what git has committed here.*not a git repository"):
        make(wheels=False)


def test_slices_that_are_not_there_are_said_and_may_be_left_out(checkout, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FORTIFY_DATA", str(tmp_path / "nowhere"))
    assert main(["make", "--no-wheels"]) == 1 and "make data" in capsys.readouterr().err
    assert main(["make", "--no-wheels", "--no-data"]) == 0
    assert "There: tar xf fortify-" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("python", "platform"), [("3.12.1", PLATFORM), ("3.12", "macosx_14_0_arm64"), ("", "")]
)
def test_a_machine_that_wheels_cannot_be_chosen_for_is_refused(python, platform):
    with pytest.raises(
        BundleError, match="PYTHON_VERSION is like 3.12. PLATFORM is like manylinux_2_28_x86_64"
    ):
        target_environment(python, platform)


def test_what_the_machine_has_is_left_out_with_what_that_needs():
    needs = {
        "torch": ["numpy", "cuda; platform_machine == 'x86_64'", "old; python_version < '3.12'"],
        "lib": ["numpy", "Other_One[more]"],
        "other-one": ["small", "large; extra == 'more'", "never; extra == 'less'"],
        "large": ["torch"],
    }

    def found(*wanted, without=()):
        return closure(map(Requirement, wanted), lambda n: needs.get(n, []), THERE, without=without)

    had = found("torch")
    assert had == {"torch", "numpy", "cuda"}
    assert found("torch", "lib", without=had) == {"lib", "other-one", "small", "large"}
    assert found("other-one") == {"other-one", "small"}
    assert found("torch", without={"torch"}) == set()


def test_all_that_a_step_needs_is_locked_and_what_is_unused_is_not_asked_for():
    lock = locked(ROOT, THERE)
    wanted = project_needs(ROOT)
    names = closure(wanted, installed_needs, THERE, without={*UNUSED})
    assert names <= lock.keys() and {"ipykernel", "papermill", "pyautoattack", "torch"} <= names
    assert "aiohttp" in names and "aiohttp" not in locked(ROOT, THERE | {"python_full_version": "3.11.0"})
    assert all(line.count("--hash=sha256:") and ";" not in line for line in lock.values())
    assert not names & {*UNUSED}


def test_nothing_that_a_step_runs_imports_what_is_unused():
    modules = "jupyterlab typst debugpy jedi parso widgetsnbextension jupyterlab_widgets".split()
    code = f"import sys; sys.modules |= dict.fromkeys({modules}); "
    code += (
        "import ipykernel.kernelapp, ipywidgets, nbconvert, papermill, snakemake.cli, fortify.workflow.site"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]


def test_wheels_of_an_older_glibc_run_too():
    tags = platform_tags(PLATFORM)
    assert {PLATFORM, "manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64"} <= {*tags}
    assert "manylinux_2_29_x86_64" not in tags
    assert "manylinux2014_aarch64" not in platform_tags("manylinux_2_12_aarch64")


def wheel(folder, name, *, needs=(), tag="py3-none-any", files=()):
    """A wheel of version 1 in ``folder``; returns its line for a list of locked packages."""
    info, made = f"{name}-1.dist-info", io.BytesIO()
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1", *(f"Requires-Dist: {n}" for n in needs)]
    content = {f"{info}/METADATA": "\n".join(lines), f"{info}/WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n"}
    content |= {f"{name}.py": "", **dict.fromkeys(files, "x")}
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        for path, text in content.items():
            file.writestr(path, text)
        file.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"]))
    return add(folder, f"{name}-1-{tag}.whl", made.getvalue())


def add(folder, file, data):
    (folder / file).write_bytes(data)
    return f"{file.split('-')[0]}==1 --hash=sha256:{hashlib.sha256(data).hexdigest()}"


def source(folder, name, *, compiled=False):
    """The same of a package that comes as its source alone."""
    extension = f", ext_modules=[Extension('{name}_c', ['c.c'])]" if compiled else ""
    setup = "from setuptools import Extension, setup\n"
    setup += f"setup(name='{name}', version='1', py_modules=['m']{extension})"
    files = {"setup.py": setup, "m.py": "", "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n"}
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"{name}-1/{path}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return add(folder, f"{name}-1.tar.gz", made.getvalue())


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An empty folder that pip takes packages from, and from nowhere else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def fetch(index, lines, **options):
    root, folder = index.parent, index.parent / "fetched"
    folder.mkdir()
    extras = "\n".join(f"{name} = []" for name in EXTRAS)
    (root / "pyproject.toml").write_text(
        f'[project]\ndependencies = ["alpha[more]"]\n[project.optional-dependencies]\n{extras}\n'
    )
    (root / "requirements.lock").write_text("\n".join(lines) + "\n")
    given = {"have": [], "also": [], "python": PYTHON, "platform": PLATFORM} | options
    return fetch_wheels(root, folder, **given)


def test_wheels_are_those_of_the_machine_by_what_they_say_they_need(index):
    """No network: of a folder. One is of another Python, one is built here, one is needed there alone."""
    needs = ["ring; extra == 'more'", "win; sys_platform == 'win32'", "there; python_version == '3.12'"]
    lines = [
        wheel(index, "alpha", needs=needs),
        wheel(index, "ipykernel"),
        wheel(index, "ring", needs=["plain"], tag="cp312-cp312-manylinux_2_17_x86_64"),
        wheel(index, "there") + " ; python_version == '3.12'",
        source(index, "plain"),
    ]
    lines[3] = (
        lines[3]
        .replace("==1 ", "==1 ; python_full_version == '3.12.*' ")
        .removesuffix(" ; python_version == '3.12'")
    )
    found, had = fetch(index, lines)
    assert set(found) == {"alpha", "ipykernel", "ring", "there", "plain"} and had == set()
    assert found["plain"].name.endswith("-none-any.whl")


def test_a_package_that_cannot_be_had_is_named(index):
    lines = [wheel(index, "alpha", needs=["beta"]), wheel(index, "ipykernel")]
    with pytest.raises(BundleError, match="requirements.lock has no beta for Python 3.12"):
        fetch(index, lines)
    shutil.rmtree(index.parent / "fetched")
    with pytest.raises(BundleError, match="(?s)pip download failed.*beta==1"):
        fetch(index, [*lines, "beta==1 --hash=sha256:" + "0" * 64])
    shutil.rmtree(index.parent / "fetched")
    with pytest.raises(BundleError, match="HAVE and WITH are names of packages"):
        fetch(index, lines, have=["torch,", "torchvision"])


def test_what_no_step_uses_of_a_wheel_stays_behind(tmp_path):
    solvers = [f"{folder}/cbc" for folder in SOLVERS.values()]
    wheel(tmp_path, "pulp", files=[*solvers, "pulp/solverdir/cbc/win/i64/cbc.exe"])
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(io.BytesIO(slim(path, "pulp", "x86_64"))) as file:
        names = file.namelist()
        listed = [line.split(",")[0] for line in file.read("pulp-1.dist-info/RECORD").decode().splitlines()]
    assert sorted(names) == sorted(listed) and [n for n in names if "solverdir" in n] == [solvers[0]]


# What runs there.


def test_a_package_that_is_missing_there_is_named():
    assert unmet(["numpy>=1", "torch"], brought=["numpy"], unused=[]) == []
    assert unmet(["numpy>=99", "no-such; python_version > '3'"], brought=[], unused=[]) == [
        "fortify needs no-such, which is not here",
        f"fortify needs numpy>=99, and {np.__version__} is here",
    ]
    # What was brought is asked for its needs, the machine's own packages are not.
    assert unmet(["foolbox"], brought=["foolbox"], unused=[]) == []
    assert unmet(["no-such"], brought=[], unused=["no-such"]) == []


def run(unpacked, *words):
    environment = os.environ | {"PYTHON": sys.executable}
    del environment["FORTIFY_ROOT"]
    command = ["sh", unpacked / "run.sh", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_run_sh_lists_what_it_can_do_and_refuses_what_it_cannot(unpacked):
    listed = run(unpacked, "list")
    assert "  test         every line of every notebook" in listed.stdout and "  speed  " in listed.stdout
    assert (run(unpacked).returncode, run(unpacked, "train").returncode) == (2, 2)
    for words, said in {
        ("--gpu", "tests"): "there is no option --gpu",
        ("--limit", "ten", "tests"): "--limit is a number of seconds, not 'ten'",
        ("--out",): "--out needs a value",
    }.items():
        refused = run(unpacked, *words)
        assert refused.returncode == 2 and said in refused.stderr
    about = json.loads((unpacked / "bundle.json").read_text())
    (unpacked / "bundle.json").write_text(json.dumps(about | {"python": "2.7"}))
    (unpacked / "wheels").mkdir()
    refused = run(unpacked, "--cpu", "tests")
    assert refused.returncode == 2 and "the wheels are for Python 2.7" in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_run_sh_asks_for_a_gpu_unless_told_otherwise(unpacked):
    refused = run(unpacked, "tests")
    assert refused.returncode == 2 and "torch finds no GPU here" in refused.stderr
    assert "CUDA is available: False" in refused.stdout and not (unpacked / "out").exists()


LASTING = """
import subprocess
from pathlib import Path

child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print("started", child.pid)
Path("benchmarks/lasting_cpu.csv").write_text("a\\n1\\n")
child.wait()
"""


def test_a_step_that_is_ended_by_its_limit_leaves_what_was_whole(unpacked, tmp_path):
    (unpacked / "checkout/benchmarks/lasting.py").write_text(LASTING)
    (unpacked / "checkout/benchmarks/old.csv").touch()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fortify.workflow.away", "--seconds", "3", "--out", out, "benchmark"]
    environment = {k: v for k, v in os.environ.items() if k != "FORTIFY_ROOT"}
    done = subprocess.run(
        [*command, "lasting"], cwd=unpacked / "checkout", capture_output=True, text=True, env=environment
    )
    assert done.returncode == 124 and "the limit of 3 s is reached" in done.stdout, done.stderr
    log = (out / "results-benchmark-lasting.log").read_text()
    assert log.startswith("started ") and log in done.stdout and not psutil.pid_exists(int(log.split()[1]))
    with tarfile.open(out / "results-benchmark-lasting.tar.gz") as tar:
        assert tar.getnames() == ["results.json", "build/benchmarks/lasting_cpu.csv"]
        about = json.load(tar.extractfile("results.json"))
    assert about["status"] == 124 and about["left_out"] == []
    assert about["commit"] == json.loads((unpacked / "bundle.json").read_text())["commit"]


def test_another_seed_than_the_first_is_not_audited():
    plan = planned(["seed", "test", "1", "splits=[random]"], ROOT)
    config = ["--config", "profile=test", "seeds=[1]", "splits=[random]"]
    assert plan.commands[0][-5:] == ["data", *config]
    assert plan.commands[1][4:] == ["--until", "results", "published_protocol", *config]
    assert plan.rules["random-s1/02_baseline.json"] == "baseline" and plan.profile == "test"
    with pytest.raises(BundleError, match="seed test is no step. Steps are `seed PROFILE SEED`"):
        planned(["seed", "test"], ROOT)
    with pytest.raises(
        BundleError, match="benchmark nothing is no step.* the benchmarks are ablation, cropped"
    ):
        planned(["benchmark", "nothing"], ROOT)
    with pytest.raises(ValueError, match="no notebook has a parameter esp_255"):
        planned(["seed", "test", "0", "esp_255=4"], ROOT)


def test_make_says_it_as_the_page_does():
    readme = (ROOT / "docs/reproducing.md").read_text(encoding="utf-8")
    command = ("make", "--no-print-directory", "-o", ".venv/.installed", "--dry-run")

    def made(*words):
        return subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True).stdout

    shown = made("bundle", "HAVE=torch pandas", "PYTHON_VERSION=3.12")
    assert '--have "torch pandas"' in shown and '--python "3.12"' in shown
    assert '--have "torch torchvision"' in made("bundle") and "--no-data" in made("bundle", "DATA=no")
    assert 'unbundle "a.tar.gz" --force' in made("unbundle", "FILE=a.tar.gz", "FORCE=1")
    for word in (
        "make bundle",
        "make unbundle FILE=",
        "HAVE",
        "WITH",
        "PLATFORM",
        "FORCE=1",
        "--cpu",
        "--limit",
    ):
        assert word in readme
