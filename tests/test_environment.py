"""One list of versions, hashed, whichever tool makes the environment."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED_FOR = "jupyterlab torch torchvision foolbox papermill nbconvert matplotlib pytest nbmake".split()


MACHINES = [
    {"python_version": "3.11", "python_full_version": "3.11.2"},  # Debian 12's
    {"python_version": "3.12", "python_full_version": "3.12.3"},
    {"python_version": "3.13", "python_full_version": "3.13.1"},
    {"sys_platform": "linux", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
]


def entries(name="requirements.lock"):
    """[(Requirement, [hashes])] of the list, in its order."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        wanted, *hashes = re.split(r"\s+--hash=", line)
        found.append((Requirement(wanted), hashes))
    return found


def applies(requirement, machine):
    return requirement.marker is None or requirement.marker.evaluate({"extra": "", **machine})


def locked(machine):
    """{canonical name: version} that pip would install there."""
    chosen = [entry for entry, _ in entries() if applies(entry, machine)]
    versions = {canonicalize_name(entry.name): next(iter(entry.specifier)).version for entry in chosen}
    assert len(versions) == len(chosen), "a package is locked twice for one machine"
    return versions


def test_every_version_is_pinned_and_hashed():
    assert len(entries()) > 150 and set(ASKED_FOR) <= set(locked({}))
    assert [requirement.name for requirement, _ in entries("requirements-uv.lock")] == ["uv"]
    for requirement, hashes in [*entries(), *entries("requirements-uv.lock")]:
        assert re.fullmatch(r"==[\w.+]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), requirement


def test_what_is_installed_is_what_is_locked():
    for name, pinned in locked({}).items():
        assert version(name) == pinned, f"{name} {version(name)}, locked {pinned}: run make again"


@pytest.mark.parametrize("machine", [{}, *MACHINES], ids=lambda machine: "-".join(machine.values()) or "here")
def test_whatever_a_locked_package_needs_is_locked(machine):
    """An interpreter that happens to come with setuptools must not hide that it is missing from the list."""
    lock = locked(machine)
    for name in lock.keys() & locked({}).keys():  # what is not installed here cannot be asked
        for need in map(Requirement, requires(name) or []):
            if applies(need, machine):
                assert canonicalize_name(need.name) in lock, f"{name} needs {need.name}, which is not locked"


def test_extras_are_named_in_the_lock():
    """pip before 23.3, which Python 3.11.7 still brings, takes `coverage[toml]` for a package of its own.

    Not named in the lock, its newest release is chosen: refused the day it is no longer the one locked.
    """
    extras = {canonicalize_name(entry.name): entry.extras for entry, _ in entries()}
    for name in locked({}):
        for need in filter(lambda need: applies(need, {}), map(Requirement, requires(name) or [])):
            missing = need.extras - extras[canonicalize_name(need.name)]
            assert not missing, (
                f"{name} needs {need.name}[{','.join(missing)}]: uv pip compile --no-strip-extras"
            )


def test_the_lock_satisfies_what_the_project_says_it_needs():
    lock = locked({})
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(line for own in extras.values() for line in own)]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)]), f"{text}: another is locked"


def test_the_project_itself_is_built_by_what_is_locked():
    """pip would else fetch the newest setuptools, without a hash, into a folder of its own, and run it."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    for wanted in map(Requirement, build):
        assert wanted.specifier.contains(locked({})[canonicalize_name(wanted.name)])
    (line,) = re.findall(r"pip install .*--no-deps.*", (ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert "--no-build-isolation" in line
    assert "python install.py" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("fails", "status", "installed_by"),
    [
        ("nothing", 0, ["uv"]),
        ("requirements-uv.lock", 0, ["pip"]),  # uv cannot be had
        ("-m uv", 0, ["uv", "pip"]),
        ("-m pip install --quiet --require-hashes --requirement requirements.lock", 0, ["uv"]),
        ("requirements", 1, ["pip"]),
        ("--editable", 1, ["uv"]),
    ],
)
def test_pip_installs_the_same_list_where_uv_does_not(monkeypatch, fails, status, installed_by):
    called = []

    def call(command, **options):
        called.append(" ".join(command[1:]))
        failed = fails in called[-1]
        return subprocess.CompletedProcess(command, failed, stdout="global.index-url='https://a.example'")

    monkeypatch.setattr(subprocess, "run", call)
    assert runpy.run_path(str(ROOT / "install.py"))["main"]() == status
    locked = [line for line in called if "--require-hashes --requirement requirements.lock" in line]
    assert [line.split()[1] for line in locked] == installed_by
    own = "-m pip install --quiet --no-deps --no-build-isolation --editable ."
    assert called.count(own) == (fails != "requirements")


def test_uv_is_told_where_pip_finds_packages():
    """A command's settings before the global ones, the environment's before both, as with pip."""
    settings = runpy.run_path(str(ROOT / "install.py"))["uv_settings"]
    assert settings("") == {}
    assert settings(
        """:env:.find-links='/wheels /more'
:env:.index-url='https://env.example/simple'
global.constraint='/etc/constraints.txt'
global.extra-index-url='\\nhttps://a.example/simple\\nfile:///b/simple'
global.index-url='https://global.example/simple?a=1'
install.cert='/etc/own.pem'
global.cert='/etc/all.pem'
global.trusted-host='a.example'"""
    ) == {
        "UV_DEFAULT_INDEX": "https://env.example/simple",
        "UV_INDEX": "https://a.example/simple file:///b/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INSECURE_HOST": "a.example",
        "SSL_CERT_FILE": "/etc/own.pem",
    }


def test_pips_settings_are_printed_as_they_are_read():
    """Of this machine's pip, whatever it is told: each line is a name and a Python literal."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        env=os.environ | {"PIP_INDEX_URL": "https://a.example/simple", "PIP_EXTRA_INDEX_URL": "b c"},
    ).stdout
    settings = runpy.run_path(str(ROOT / "install.py"))["uv_settings"](listed)
    assert settings["UV_DEFAULT_INDEX"] == "https://a.example/simple" and settings["UV_INDEX"] == "b c"


def test_the_slow_tests_are_there():
    """conftest.py names them: a test that was renamed would be taken for a fast one."""
    from conftest import SLOW, SLOW_FIXTURES

    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    defined = {name for text in texts for name in re.findall(r"^def (\w+)\(", text, re.MULTILINE)}
    assert {*SLOW, *SLOW_FIXTURES} - defined == set()


def test_environment_yml_names_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock"]
    (python,) = [e for e in environment["dependencies"] if isinstance(e, str) and e.startswith("python")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.split("=")[1])
