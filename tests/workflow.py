"""How the tests call the workflow: as the Makefile does, with the test profile."""

import shutil
import subprocess
import sys
from pathlib import Path

from fortify.workflow.locks import wait_for_profile

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "test"
# Of the options in profiles/default other cores, and rules named: tests read them. Two notebooks at once,
# since at this size each is mostly its own start.
OPTIONS = ["--workflow-profile", str(ROOT / "profiles" / "default")]
OPTIONS += ["--quiet", "host", "--cores", "2", "--max-threads", "1"]


def command(*arguments, config=("profile=test",)):
    return [sys.executable, "-m", "snakemake", *OPTIONS, *arguments, "--config", *config]


def snakemake(*arguments, config=("profile=test",), cwd=ROOT):
    """Call it and wait; returns the finished process with its output as text."""
    return subprocess.run(command(*arguments, config=config), cwd=cwd, capture_output=True, text=True)


def clear(build=BUILD):
    """Remove what is in a profile's folder, once no run is at work in it; its locks stay."""
    with wait_for_profile(build):
        for path in build.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (".lock", ".notebook-lock"):
                path.unlink()
