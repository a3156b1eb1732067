"""Killed anywhere, the workflow ends in the same tables when it is called again.

A few kills on the way to the random split's Table 1, every time. On the way to everything, each kill said:
FORTIFY_KILLS=40 python -m pytest tests/test_survival.py -s
"""

import contextlib
import os
import random
import shutil
import subprocess
import time

import psutil
import pytest
from workflow import ROOT, command

ALL = "FORTIFY_KILLS" in os.environ
KILLS = int(os.environ.get("FORTIFY_KILLS", "3"))
WHAT = ("all",) if ALL else ("results",)
CONFIG = ("profile=test",) if ALL else ("profile=test", "splits=[random]")
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
    wanted = command(*WHAT, "--quiet", "rules", config=CONFIG)
    return subprocess.Popen(wanted, cwd=checkout, stdout=log, stderr=log)


def kill(process, victim):
    """SIGKILL the victim (all, where no kernel is at work). After "workflow" a notebook goes on alone."""
    whole = psutil.Process(process.pid)
    children = whole.children(recursive=True)
    kernels = [p for p in children if "ipykernel_launcher" in _command(p)]
    alone = {"workflow": [whole], "kernel": kernels}.get(victim)
    for one in alone if alone and kernels else [whole, *children]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _command(process):
    """Its command line; none of one that has ended since it was listed."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie too
        return ""


def results(build):
    """{relative path: bytes} of the tables, predictions by image and weights of what was asked for."""
    kinds = ["tables/[!.]*", "*-s0/[!.]*_predictions.csv", "*-s0/*_history.csv", "*-s0/*.safetensors"]
    if not ALL:
        kinds = ["tables/table1_random.*"] + [
            f"random-s0/{model}{kind}"
            for model in ("normal", "adversarial")
            for kind in ("_predictions.csv", "_history.csv", ".safetensors")
        ]
    found = [path for kind in kinds for path in build.glob(kind)]
    assert len(found) >= (50 if ALL else 9)
    return {path.relative_to(build).as_posix(): path.read_bytes() for path in found}


def differing(build, finished):
    """Names of the results that are not the finished run's, byte for byte."""
    own, expected = results(build), results(finished)
    return sorted(name for name in own.keys() | expected.keys() if own.get(name) != expected.get(name))


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
    assert differing(checkout / "build" / "test", finished) == [], killed


def test_two_runs_at_once_wait_for_each_other(finished, checkout):
    """Both start on an unfinished run; each ends well, and the tables are those of one."""
    for name in ("tables", "results", "claims"):
        shutil.rmtree(checkout / "build" / "test" / name, ignore_errors=True)
    first, second = start(checkout), start(checkout)
    assert (first.wait(), second.wait()) == (0, 0), (checkout / "log.txt").read_text()[-3000:]
    assert "waiting for another run in this checkout to end" in (checkout / "log.txt").read_text()
    assert differing(checkout / "build" / "test", finished) == []
