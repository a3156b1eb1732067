"""One list of versions, hashed, whichever tool makes the environment."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED_FOR = "jupyterlab torch torchvision foolbox papermill nbconvert matplotlib pytest nbmake".split()


def locked():
    """{canonical name: (Requirement, [hashes])} of requirements.lock."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        wanted, *hashes = re.split(r"\s+--hash=", line)
        requirement = Requirement(wanted)
        found[canonicalize_name(requirement.name)] = (requirement, hashes)
    return found


def test_every_version_is_pinned_and_hashed():
    lock = locked()
    assert len(lock) > 150 and set(ASKED_FOR) <= set(lock)
    for requirement, hashes in lock.values():
        assert re.fullmatch(r"==[\w.+]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), requirement


def test_what_is_installed_is_what_is_locked():
    for name, (requirement, _) in locked().items():
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(name)), f"{name} {version(name)}: run make again"


def test_the_lock_satisfies_what_the_project_says_it_needs():
    lock = locked()
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(line for own in extras.values() for line in own)]:
        wanted = Requirement(text)
        pinned = next(iter(lock[canonicalize_name(wanted.name)][0].specifier)).version
        assert wanted.specifier.contains(pinned), f"{text}: {pinned} is locked"


def test_environment_yml_names_the_same_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock"]
    (python,) = [e for e in environment["dependencies"] if isinstance(e, str) and e.startswith("python")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.split("=")[1])
