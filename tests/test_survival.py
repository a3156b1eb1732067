"""Killed anywhere, the workflow ends in the same tables when it is called again.

FORTIFY_KILLS=40 python -m pytest tests/test_survival.py -s    many kills at random moments, each said
"""

import os
import random
import shutil
import subprocess
import time

import psutil
import pytest
from workflow import ROOT, command

KILLS = int(os.environ.get("FORTIFY_KILLS", "3"))
SEED = int(os.environ.get("FORTIFY_KILLS_SEED", time.time_ns() % 2**32))
VICTIMS = ("everything", "workflow", "kernel")  # as in a power cut; by somebody; as where memory runs out


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("lib", "notebooks", "paper"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "Snakefile", folder)
    return folder


def start(checkout):
    log = open(checkout / "log.txt", "a")
    return subprocess.Popen(command("--quiet", "rules"), cwd=checkout, stdout=log, stderr=log)


def kill(process, victim):
    """SIGKILL the victim (all, where no kernel is at work). After "workflow" a notebook goes on alone."""
    whole = psutil.Process(process.pid)
    children = whole.children(recursive=True)
    kernels = [p for p in children if "ipykernel_launcher" in " ".join(p.cmdline())]
    alone = {"workflow": [whole], "kernel": kernels}.get(victim)
    for one in alone if alone and kernels else [whole, *children]:
        one.kill()
    process.wait()


def tables(build):
    """{relative path: bytes} of every table, and of every image's predictions."""
    found = [
        *build.glob("tables/[!.]*"),
        *build.glob("*/[!.]*_predictions.csv"),
        *build.glob("*/*_history.csv"),
    ]
    return {path.relative_to(build).as_posix(): path.read_bytes() for path in found}


def test_killed_at_random_moments_it_ends_in_the_same_tables(finished, checkout):
    chance, killed = random.Random(SEED), []
    print(f"FORTIFY_KILLS_SEED={SEED}")
    while len(killed) < KILLS:
        process = start(checkout)
        wait, victim = chance.uniform(3, 25), VICTIMS[len(killed) % len(VICTIMS)]
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            kill(process, victim)
            killed.append((victim, round(wait, 1)))
            print("killed", *killed[-1], flush=True)
        else:  # done before it could be killed: once more from the start
            assert process.returncode == 0, (checkout / "log.txt").read_text()[-3000:]
            shutil.rmtree(checkout / "build")
    process = start(checkout)
    assert process.wait() == 0, (killed, (checkout / "log.txt").read_text()[-3000:])
    expected = tables(finished)
    assert len(expected) > 40
    assert tables(checkout / "build" / "test") == expected, killed


def test_two_runs_at_once_wait_for_each_other(finished, checkout):
    """Both start on an unfinished run; each ends well, and the tables are those of one."""
    for name in ("tables", "results", "claims"):
        shutil.rmtree(checkout / "build" / "test" / name, ignore_errors=True)
    first, second = start(checkout), start(checkout)
    assert (first.wait(), second.wait()) == (0, 0), (checkout / "log.txt").read_text()[-3000:]
    assert "waiting for another run in this checkout to end" in (checkout / "log.txt").read_text()
    assert tables(checkout / "build" / "test") == tables(finished)
