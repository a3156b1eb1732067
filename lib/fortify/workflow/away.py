"""One step of the paper on a machine without a network: what run.sh of the archive of `make bundle` calls.

python -m fortify.workflow.away --out FOLDER --started TIME [--seconds LIMIT] WORDS...
    seed PROFILE SEED [name=value ...] [snakemake's options]
    benchmark NAME [its options]
    tests [pytest's arguments]
"""

import argparse
import contextlib
import csv
import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# What loads other packages is imported in functions: first `unmet` says which are missing.

GPU_TESTS = "tests/test_gpu.py"
MANIFEST = re.compile(r"\d\d_\w+\.json")
SETTLED = 3  # seconds for which a file must not have changed to be packed as soon as possible


class BundleError(RuntimeError):
    """The archive cannot be made, run or taken back; the message says why and what to do."""


class Plan(NamedTuple):
    """A step's commands. Of a profile's seed ``rules`` names the rule of each file, below its folder."""

    commands: list[list[str]]
    profile: str = ""
    rules: Mapping[str, str] = {}


def installed_needs(name: str) -> list[str]:
    """The requirements of a package that is installed here; none of one that is not."""
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def unmet(needs: Iterable[str], *, brought: Collection[str], unused: Collection[str]) -> list[str]:
    """What this Python lacks of the project's ``needs``, and of those of the packages ``brought``, as lines.

    Packages in ``unused`` are not asked for, nor what the machine's own packages need.
    """
    lines, seen, left = set(), set(), [("fortify", Requirement(line)) for line in needs]
    while left:
        by, one = left.pop()
        name = canonicalize_name(one.name)
        if name in unused or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            found = importlib.metadata.version(name)
            if not one.specifier.contains(found, prereleases=True):
                lines.add(f"{by} needs {name}{one.specifier}, and {found} is here")
        except importlib.metadata.PackageNotFoundError:
            lines.add(f"{by} needs {name}, which is not here")
        if name in brought and name not in seen:
            seen.add(name)
            left += [(name, Requirement(line)) for line in installed_needs(name)]
    return sorted(lines)


def planned(words: Sequence[str], root: Path) -> Plan:
    """The commands of a step that ``words`` name (see above); BundleError where they name none."""
    kind, rest = words[:1], words[1:]
    benchmarks = sorted(p.stem for p in (root / "benchmarks").glob("*.py") if p.stem != "results")
    if kind == ["tests"]:
        options = ["-o", "addopts=-ra", "-p", "no:cacheprovider", "--junitxml=build/tests/tests.xml"]
        return Plan([_python("-m", "pytest", *options, *(rest or [GPU_TESTS]))])
    if kind == ["benchmark"] and rest[:1] and rest[0] in benchmarks:
        return Plan([_python(f"benchmarks/{rest[0]}.py", *rest[1:])])
    if kind == ["seed"] and len(rest) >= 2 and rest[1].isdecimal():
        return _seed(rest[0], int(rest[1]), rest[2:], root)
    raise BundleError(
        f"{' '.join(words) or 'nothing'} is no step. Steps are `seed PROFILE SEED`, `benchmark NAME` and "
        f"`tests`, and the benchmarks are {', '.join(benchmarks)}."
    )


def _python(*arguments):
    return [sys.executable, "-u", *arguments]


def _seed(profile, seed, words, root):
    import yaml

    from fortify.workflow.profiles import load_profile

    given = [word for word in words if re.match(r"\w+=", word)]
    options = [word for word in words if word not in given]
    changes = {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in given)}
    notebooks = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    parameters = load_profile(root / f"notebooks/profiles/{profile}.yaml", notebooks, changes=changes)
    if seed != parameters["01_data"]["seeds"][0] and not options:
        # Leakage and audit are of the first seed alone, and the published training is of some.
        options = ["--until", "results"]
        options += ["published_protocol"] if seed in parameters["09_claims"]["published_seeds"] else []
    snakemake = _python("-m", "snakemake")
    config = ["--config", f"profile={profile}", f"seeds=[{seed}]", *given]
    # Dry: it would wait for a run that is at work.
    command = [*snakemake, "--summary", "--dry-run", *config]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode:
        raise BundleError(f"Snakemake cannot plan this.\n{(listed.stdout + listed.stderr)[-2000:]}")
    table = listed.stdout[listed.stdout.index("output_file\t") :].splitlines()
    below = {
        row["output_file"].removeprefix(f"build/{profile}/"): row["rule"]
        for row in csv.DictReader(table, delimiter="\t")
    }
    return Plan([[*snakemake, "data", *config], [*snakemake, *options, *config]], profile, below)


def step(words: Sequence[str], *, out: Path, started: float, seconds: float = 0) -> int:
    """Run one step, and pack its results into ``out`` each time that more are whole; returns its exit status.

    ``seconds`` after ``started``, a time in seconds since 1970, it is ended (0: never), and the status is
    124, as of ``timeout``. A signal to end does the same. A log beside the results has what is printed.
    Raises BundleError for words that are no step, ProfileError for an unknown profile or parameter.
    """
    from fortify.files import find_root
    from fortify.workflow.packed import finished_files, pack, result_files, stamp

    root, stop = find_root(), threading.Event()
    plan = planned(words, root)
    bundle = root.parent / "bundle.json"
    commit = json.loads(bundle.read_text(encoding="utf-8"))["commit"] if bundle.is_file() else None
    out.mkdir(parents=True, exist_ok=True)
    name = "results-" + re.sub(r"[^A-Za-z0-9._-]+", "-", " ".join(words)).strip("-")
    target, before = out / f"{name}.tar.gz", {path: stamp(path) for path in result_files(root)}
    seen, status, ended = before, 0, ""

    def say(text):
        print(f"[{time.time() - started:5.0f} s] {text}", flush=True)

    def pack_what_is_new(*, last=False):
        nonlocal seen
        # A notebook's manifest is the last file that it writes; of other steps it is any. Snakemake touches
        # it once papermill has ended, and with that the executed copy is whole.
        settled = time.time() - (0 if last else SETTLED)
        wanted = [p for p in result_files(root) if MANIFEST.fullmatch(p.name) or not plan.profile]
        now = {path: of for path in wanted if (of := stamp(path)) and of[1] / 1e9 <= settled}
        new = [path for path in now if now[path] != seen.get(path)]
        if not new and not last:
            return
        seen = now
        for path in new:
            say(f"finished: {path.relative_to(root)}")
        about = {"step": [*words], "status": status if last else "running", "commit": commit}
        about |= {"profile": plan.profile, "seconds": round(time.time() - started)}
        try:
            left_out = pack(target, finished_files(root, plan, before), about)
        except (OSError, ValueError, KeyError) as error:  # the step goes on, and the next time may succeed
            say(f"not packed: {type(error).__name__}: {error}")
            return
        say(f"packed: {target} ({target.stat().st_size / 2**20:.1f} MiB)")
        if left_out:
            say(f"left out, the file would be too large: {', '.join(left_out)}")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with open(out / f"{name}.log", "w", encoding="utf-8") as log:
        for command in plan.commands:
            process = subprocess.Popen(
                command,
                cwd=root,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            )
            reader = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
            reader.start()
            while process.poll() is None and not ended:
                pack_what_is_new()
                if stop.wait(1):
                    ended, status = "a signal came", 128 + signal.SIGTERM
                elif seconds and time.time() - started > seconds:
                    ended, status = f"the limit of {seconds:.0f} s is reached", 124
            if ended:
                say(f"{ended}; ending the step")
                _end(process)
            reader.join(5)
            status = status or process.returncode
            if status:
                break
        pack_what_is_new(last=True)
        say(f"{' '.join(words)}: exit status {status}")
    return status


def _copy(lines, log):
    with contextlib.suppress(ValueError):  # what outlives the step may print after the log was closed
        for line in lines:
            for stream in (sys.stdout, log):
                stream.write(line)
                stream.flush()


def _end(process):
    """End a process and all that it started, kernels too, which have sessions of their own."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for kill in (psutil.Process.terminate, psutil.Process.kill):
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    kill(one)
            _, family = psutil.wait_procs(family, timeout=3)
    process.wait()


def main(arguments: Sequence[str]) -> int:
    """Check what is installed, then run the step; returns the exit status, 2 where there is no such step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--started", type=float, default=time.time())
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    made = json.loads(Path("../bundle.json").read_text(encoding="utf-8"))
    try:
        if lines := unmet(made["needs"], brought=made["brought"], unused=made["unused"]):
            raise BundleError(f"{'; '.join(lines)}. Make the archive again and name these in WITH.")
        return step(given.words, out=given.out.resolve(), started=given.started, seconds=given.seconds)
    except (BundleError, ValueError) as error:  # ProfileError is one
        print(f"run.sh: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
