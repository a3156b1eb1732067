"""The grid on a cluster: profiles/slurm, and a real Slurm of this one machine (tests/slurm/cluster)."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from test_survival import differing
from workflow import ROOT

from fortify.workflow.locks import CALL, join_call, wait_for_profile

PROFILE = ROOT / "profiles" / "slurm"
CLUSTER = ROOT / "tests" / "slurm" / "cluster"
CONFIGURATION = Path("/etc/slurm/slurm.conf")
OWN = CONFIGURATION.is_file() and not CONFIGURATION.is_symlink()
PATH = f"{os.environ['PATH']}:/usr/sbin"  # Debian's daemons
PROGRAMS = ("sbatch", "squeue", "scancel", "munged", "slurmctld", "slurmd")
MISSING = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
COSTLY = {"baseline", "attacks", "adversarial_training", "published_protocol", "leakage", "robustness_audit"}
COSTLY |= {"robust_optimisation", "transfer", "explanations", "detection", "explorer"}
# As many threads as in the local run. This Slurm keeps no accounts for sacct to read.
OPTIONS = "--jobs 4 --max-threads 1 --slurm-status-command squeue".split()
OPTIONS += "--slurm-init-seconds-before-status-checks 8".split()


def command(*options, config):
    profile = ["--workflow-profile", str(PROFILE)]
    return [sys.executable, "-m", "snakemake", *profile, *options, "--config", config]


def test_it_keeps_the_options_of_the_default_profile_in_whose_place_it_stands():
    default, own = (
        yaml.safe_load((path / "config.yaml").read_text()) for path in (PROFILE.with_name("default"), PROFILE)
    )
    assert default.pop("cores") == "all", "here of the login node"
    assert default.items() <= own.items()


@pytest.mark.parametrize("profile", ["laptop", "paper"])
def test_a_job_asks_for_what_its_network_wants(profile):
    """A GPU for ResNet-50 and none for the small network; more time and memory where it trains or attacks."""
    shown = subprocess.run(
        command("--dry-run", "--forceall", "--quiet", "host", config=f"profile={profile}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    asked = {}
    for job in re.split(r"^(?:local)?rule ", shown.stdout, flags=re.MULTILINE)[1:]:
        found = dict(re.findall(r"\b(threads: |mem_mb=|runtime=|gpu=)(\d+)", job))
        asked.setdefault(job.split(":")[0], found)
    assert asked.keys() >= COSTLY, shown.stderr[-2000:]
    for rule, resources in asked.items():
        if rule in COSTLY:
            wanted = {"threads: ": "4", "mem_mb=": "8000", "gpu=": str(int(profile == "paper"))}
            assert resources.items() >= wanted.items() and int(resources["runtime="]) >= 120, rule
        elif rule not in ("html", "all"):
            assert resources == {"mem_mb=": "4000", "runtime=": "30", "gpu=": "0"}, rule


def test_a_job_that_a_killed_workflow_left_in_the_queue_is_refused_after_the_next_call(tmp_path, monkeypatch):
    lock = tmp_path / ".notebook-lock"
    monkeypatch.delenv(CALL, raising=False)
    join_call(lock).close()  # nobody called: a notebook by hand
    wait_for_profile(tmp_path).close()
    first = os.environ[CALL]
    join_call(lock).close()
    wait_for_profile(tmp_path).close()
    join_call(lock).close()
    monkeypatch.setenv(CALL, first)
    with pytest.raises(RuntimeError, match="was killed, and called again since"):
        join_call(lock)


def test_a_file_system_without_locks_is_one_clear_error(tmp_path, monkeypatch):
    def none(file, kind):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OSError, match=r"Function not implemented\): put the checkout on.*/\.lock'"):
        wait_for_profile(tmp_path)


@pytest.fixture
def slurm(monkeypatch):
    """A Slurm that is up."""
    folder = tempfile.mkdtemp(prefix="slurm-")
    monkeypatch.setenv("PATH", PATH)
    try:
        subprocess.run([CLUSTER, "start", folder], check=True)
        yield
    finally:
        subprocess.run([CLUSTER, "stop", folder])
        shutil.rmtree(folder)


@pytest.fixture
def call(checkout):
    """Call it to start the workflow of the test profile on the cluster; killed if it outlives the test."""
    called = []

    def begin():
        line = command(*OPTIONS, config="profile=test")
        with open(checkout / "log.txt", "a") as log:
            called.append(subprocess.Popen(line, cwd=checkout, stdout=log, stderr=subprocess.STDOUT))
        return called[-1]

    yield begin
    for process in called:
        process.kill()
        process.wait()


def queued():
    """{job: rule and run} of those that wait or are at work."""
    line = ["squeue", "--noheader", "--format=%i %k"]
    listed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in listed.splitlines())


def wait_for(event, process, log):
    """What ``event()`` returns, once it is true."""
    end = time.monotonic() + 600
    while not (happened := event()):
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.2)
    return happened


@pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: apt-get install slurm-wlm munge")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start Slurm")
@pytest.mark.skipif(
    CONFIGURATION.is_file() and not CONFIGURATION.is_symlink(), reason="a Slurm of its own here"
)
def test_the_whole_grid_through_sbatch_where_a_cancelled_job_is_made_again(finished, checkout, slurm, call):
    """It ends in what the local run wrote, byte for byte.

    Before it a workflow is killed, whose first job is still in the queue: that job does nothing when its
    turn comes.
    """
    log, partition = checkout / "log.txt", ("scontrol", "update", "PartitionName=all")
    subprocess.run([*partition, "State=DOWN"], check=True)
    killed = call()
    (left,) = wait_for(queued, killed, log)
    killed.kill()
    killed.wait()
    whole = call()
    wait_for(lambda: list(queued().values()) == ["rule_data"] * 2, whole, log)
    subprocess.run([*partition, "State=UP"], check=True)

    at_work = checkout / "build/test/notebooks/random-s0/04_adversarial_training.log"
    wait_for(at_work.exists, whole, log)
    training = "rule_adversarial_training_wildcards_random-s0"
    (cancelled,) = (job for job, comment in queued().items() if comment == training)
    subprocess.run(["scancel", cancelled], check=True)
    assert whole.wait() == 0, log.read_text()[-4000:]

    slurm_logs = checkout / ".snakemake/slurm_logs"
    of_cancelled = slurm_logs / f"rule_adversarial_training/random-s0/{cancelled}.log"
    (failed,) = re.findall("^(.*) failed; see (.*)", log.read_text(), re.MULTILINE)
    assert failed[0] == "adversarial training, random" and str(of_cancelled) in failed[1].split(", ")
    assert "CANCELLED" in of_cancelled.read_text()
    assert "called again since" in (slurm_logs / f"rule_data/{left}.log").read_text()
    *_, whole_log = sorted((checkout / ".snakemake/log").glob("*.log"))
    assert whole_log.read_text().count("has been submitted with SLURM jobid") == 21 + 1
    assert differing(checkout, everything=True) == []
