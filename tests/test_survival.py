"""Killed anywhere, the workflow ends in the same tables when it is called again.

Every time: a power cut in the middle of a checkpoint, then a kill of the workflow while a notebook goes on.
At random moments on the way to everything, each kill said:
FORTIFY_KILLS=40 python -m pytest tests/test_survival.py -s
"""

import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
import time

import psutil
import pytest
from workflow import BUILD, ROOT, command

KILLS = int(os.environ.get("FORTIFY_KILLS", "0"))
SEED = int(os.environ.get("FORTIFY_KILLS_SEED", time.time_ns() % 2**32))
VICTIMS = ("everything", "workflow", "kernel")  # as in a power cut; by somebody; as where memory runs out
RUN = "build/test/random-s0"
# A kernel that makes a file larger than the limit dies there, in its middle; Python's default is to go on.
HALF_WRITTEN = """
import signal, sys
if "ipykernel_launcher" in sys.orig_argv:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
"""


@pytest.fixture
def untrained(finished, checkout):
    """A checkout with the finished run, but for the random split's adversarial training and what follows."""
    shutil.copytree(BUILD, checkout / "build/test")
    shutil.copytree(ROOT / ".snakemake/metadata", checkout / ".snakemake/metadata")
    for path in [*(checkout / RUN).glob("adversarial*"), checkout / RUN / "04_adversarial_training.json"]:
        path.unlink()
    for name in ("tables", "results"):
        shutil.rmtree(checkout / "build/test" / name)
    return checkout


@pytest.fixture
def start(checkout):
    """Call it to start the workflow on its way to ``what``.

    A notebook dies in the middle of a file of more than ``largest`` bytes.
    What is still at work when the test ends is killed.
    """
    (checkout / "sitecustomize.py").write_text(HALF_WRITTEN)
    started = []

    def begin(what, *, largest=resource.RLIM_INFINITY):
        process = subprocess.Popen(
            command(what, "--quiet", "rules"),
            cwd=checkout,
            stdout=open(checkout / "log.txt", "a"),
            stderr=subprocess.STDOUT,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            kill(process, "everything")


def log(checkout):
    return (checkout / "log.txt").read_text()


def kernels(process):
    return [
        p for p in psutil.Process(process.pid).children(recursive=True) if "ipykernel_launcher" in _command(p)
    ]


def kill(process, victim):
    """SIGKILL the victim (all, where no kernel is at work). After "workflow" a notebook goes on alone."""
    whole = psutil.Process(process.pid)
    working = kernels(process)
    alone = {"workflow": [whole], "kernel": working}.get(victim)
    for one in alone if alone and working else [whole, *whole.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def _command(process):
    """Its command line; none of one that has ended since it was listed."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie too
        return ""


def wait_until(event, *processes, checkout):
    """Return as soon as ``event()`` is true; an error if a process ends before."""
    while not event():
        assert all(p.poll() is None for p in processes), f"ended too early:\n{log(checkout)[-3000:]}"
        time.sleep(0.01)


def results(build, *, everything):
    """{relative path: bytes} of the tables, predictions by image and weights of what was asked for.

    Without what was timed, which is never the same.
    """
    kinds = ["tables/[!.]*", "*-s0/[!.]*_predictions.csv", "*-s0/*_history.csv", "*-s0/*.safetensors"]
    if not everything:
        kinds = ["tables/table1*", *(f"random-s0/adversarial{kind}" for kind in ("_*.csv", ".safetensors"))]
    timed = re.compile("_(seconds|latency)")
    found = [path for kind in kinds for path in build.glob(kind) if not timed.search(path.name)]
    assert len(found) >= (50 if everything else 10)
    return {path.relative_to(build).as_posix(): path.read_bytes() for path in found}


def differing(checkout, *, everything):
    """Names of the results that are not the finished run's, byte for byte."""
    own, expected = (results(b, everything=everything) for b in (checkout / "build/test", BUILD))
    return sorted(name for name in own.keys() | expected.keys() if own.get(name) != expected.get(name))


def test_killed_while_it_writes_and_alone_it_ends_in_the_same_tables(untrained, start):
    """A checkpoint is cut in its middle; then a notebook outlives its workflow, and two more are called."""
    checkpoints = untrained / RUN / "checkpoints-adversarial"
    weights = (BUILD / "random-s0/adversarial.safetensors").stat().st_size  # a checkpoint: several
    cut = start("results", largest=2 * weights)
    wait_until(lambda: any(checkpoints.glob("*")) and not kernels(cut), cut, checkout=untrained)
    kill(cut, "everything")
    whole = "[!.]*.safetensors"  # the name of one that is still being written begins with a point
    assert not any(checkpoints.glob(whole)), "half a checkpoint under the name of a whole one"

    alone = start("results")
    wait_until(lambda: any(checkpoints.glob(whole)), alone, checkout=untrained)
    (kernel,) = kernels(alone)
    kernel.suspend()  # else it might be done before others ask for it
    kill(alone, "workflow")
    try:
        two = start("results"), start("results")
        said = [f"waiting for {what}" for what in ("a notebook whose run was killed", "another run")]
        wait_until(lambda: all(text in log(untrained) for text in said), *two, checkout=untrained)
    finally:
        kernel.resume()
    assert [p.wait() for p in two] == [0, 0], log(untrained)[-3000:]

    assert differing(untrained, everything=False) == []
    kept = "random-s0/normal.safetensors"  # only what was not there is made
    assert (untrained / "build/test" / kept).stat().st_mtime_ns == (BUILD / kept).stat().st_mtime_ns


@pytest.mark.skipif(not KILLS, reason="takes long; FORTIFY_KILLS says how many")
def test_killed_at_random_moments_it_ends_in_the_same_tables(finished, checkout, start):
    chance, killed = random.Random(SEED), []
    print(f"FORTIFY_KILLS_SEED={SEED}")
    while len(killed) < KILLS:
        process = start("all")
        wait, victim = chance.uniform(3, 25), VICTIMS[len(killed) % len(VICTIMS)]
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            kill(process, victim)
            killed.append((victim, round(wait, 1)))
            print("killed", *killed[-1], flush=True)
        else:  # done before it could be killed: once more from the start
            assert process.returncode == 0, log(checkout)[-3000:]
            shutil.rmtree(checkout / "build")
    process = start("all")
    assert process.wait() == 0, (killed, log(checkout)[-3000:])
    assert differing(checkout, everything=True) == [], killed
