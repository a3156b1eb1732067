"""How the tests call the workflow: as the Makefile does, with the test profile."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "test"
OPTIONS = ["--cores", "2", "--nolock", "--rerun-incomplete", "--max-checksum-file-size", "1000000000"]
OPTIONS += ["--max-threads", "1"]  # two notebooks at once: at this size each is mostly its own start


def command(*arguments, config=("profile=test",)):
    return [sys.executable, "-m", "snakemake", *OPTIONS, *arguments, "--config", *config]


def snakemake(*arguments, config=("profile=test",)):
    """Call it and wait; returns the finished process with its output as text."""
    return subprocess.run(command(*arguments, config=config), cwd=ROOT, capture_output=True, text=True)
