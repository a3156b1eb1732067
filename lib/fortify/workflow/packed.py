"""A step's results in one small file, and back into build/. No weights, of images what figures show."""

import contextlib
import gzip
import io
import json
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fortify.data import Slices
from fortify.evaluation import read_rows
from fortify.files import atomic_path, find_root
from fortify.workflow.away import BundleError, Plan
from fortify.workflow.locks import wait_for_profile

REMADE = {"data", "results", "claims", "html"}  # the rules that `make tables` runs
KINDS = {".csv", ".json", ".md", ".tex", ".txt", ".tsv", ".png", ".pdf", ".ipynb", ".log", ".xml", ".js"}
LIMIT = 16 * 2**20  # bytes of the packed file
UNPACKED = 2**30  # bytes; what swells to more is none of ours
_RUN = re.compile(r"(?:^|[/_])([a-z]+-s\d+)(?=[/._]|$)")  # in a file's name: which run it is of
_OF_RUN = ("03_attacks.json", "04_adversarial_training.json")


def stamp(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns; None for a file that is gone."""
    with contextlib.suppress(FileNotFoundError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    return None


def result_files(root: Path) -> Iterator[Path]:
    """Files of the kinds that are packed below build/ and benchmarks/, none that is half written."""
    for path in (p for name in ("build", "benchmarks") for p in sorted((root / name).rglob("*"))):
        hidden = any(part.startswith((".", "checkpoints-")) for part in path.relative_to(root).parts)
        if path.suffix in KINDS and not hidden:
            yield path


def finished_files(root: Path, plan: Plan, before: Mapping[Path, Any]) -> dict[str, bytes]:
    """{name in the archive: content} of what a step has finished.

    Of a profile's seed it is all there is: below ``build/`` what ``make tables`` reads, below ``made-there/``
    what it makes anew, and notebooks that did not end. Of another step it is what has changed since
    ``before``, {file: :func:`stamp`}; what lies in benchmarks/ comes below ``build/benchmarks``.
    """
    found, runs = {}, sorted({of[1] for name in plan.rules if (of := _RUN.match(name))})
    for path in result_files(root):
        name = path.relative_to(root).as_posix()
        if not plan.profile and before.get(path) != stamp(path):
            found[name if name.startswith("build/") else f"build/{name}"] = path
        elif plan.profile and re.match(f"build/{plan.profile}/(?!html/)", name):
            if not (of := _RUN.search(name)) or of[1] in runs:
                found[_place(root, plan, name)] = path
    members = {}
    for name, path in found.items():
        with contextlib.suppress(FileNotFoundError):  # of a job that failed, and removed since
            members[name] = path.read_bytes()
    build = root / "build" / plan.profile
    for run in runs:
        if all((build / run / name).is_file() for name in _OF_RUN):
            for model in ("normal", "adversarial"):
                members[f"build/{plan.profile}/{run}/{model}_attacked.npz"] = shown_images(build, run, model)
    return members


def _place(root, plan, name):
    """Where in the archive a file of a profile lies."""
    below = name.removeprefix(f"build/{plan.profile}/")
    folder, _, rest = below.partition("/")
    rule = plan.rules.get(below)
    if folder in ("notebooks", "benchmarks"):  # of the notebook whose manifest is the last that it writes
        of = rest.rpartition(".")[0]
        manifests = [n for n in plan.rules if n.endswith(f"{of}.json") and ("/" in of) == bool(_RUN.match(n))]
        done = [n for n in manifests if (root / "build" / plan.profile / n).is_file()]
        rule = plan.rules[done[0]] if done else "data"
    # The splits come back too: where those made here differ, the results are of others.
    again = (rule in REMADE or folder == "data") and not below.startswith("data/splits/")
    return f"{'made-there' if again else 'build'}/{plan.profile}/{below}"


def shown_images(build: Path, run: str, model: str) -> bytes:
    """A run's .npz of attacked images with those that notebook 5's figures show alone; all others are NaN."""
    from fortify.figures import pick_example, pick_failures  # they load matplotlib

    rows, slices = read_rows(build / run / f"{model}_predictions.csv"), Slices.load(build / "data/slices.npz")
    made = json.loads((build / run / "03_attacks.json").read_text(encoding="utf-8"))
    about = {"eps_255": made["parameters"]["eps_255"]}
    with np.load(build / run / f"{model}_attacked.npz") as file:
        attacked = file["pgd"]
    kept, places = np.full_like(attacked, np.nan), np.arange(len(attacked)).reshape(-1, 1, 1, 1)
    for label in rows.label.unique():
        about |= {"label": label, "attacked": places}
        shown = [
            pick_example(rows, slices, attack="pgd", **about),
            pick_failures(rows, slices, **about)["pgd"][0],
        ]
        for example in shown:
            if example is not None and example.attacked.size == 1:  # else it is the clean image
                kept[example.attacked.item()] = attacked[example.attacked.item()]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pgd=kept)
    return buffer.getvalue()


def pack(
    target: Path, members: Mapping[str, bytes], about: Mapping[str, Any], *, limit: int = LIMIT
) -> list[str]:
    """Write ``members`` and results.json, which is ``about``, as a .tar.gz of less than ``limit`` bytes.

    Where that is too little the largest stay behind; results.json and the returned list name them. The file
    is written atomically.
    """
    left_out = []
    while True:
        kept = {name: data for name, data in members.items() if name not in left_out}
        listed = json.dumps({**about, "left_out": left_out}, indent=1).encode()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as tar:
            for name, data in {"results.json": listed, **kept}.items():
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(data), int(time.time())
                tar.addfile(entry, io.BytesIO(data))
        over = buffer.tell() - limit + 1
        if over <= 0 or not kept:
            break
        sizes = {name: len(gzip.compress(data, 6)) for name, data in kept.items()}
        for name in sorted(sizes, key=sizes.get, reverse=True):
            if over > 0:
                left_out.append(name)
                over -= sizes[name]
    with atomic_path(target) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return left_out


def unpack(archive: str | Path, *, force: bool = False) -> tuple[list[Path], dict[str, Any]]:
    """Put the results of :func:`pack` below build/ of this checkout; returns what was written, and ``about``.

    What is there already, the same, stays. Nothing is written, and BundleError says why, for a file that is
    no such archive, a path that leaves build/, and where another result is there. With ``force`` a run (a
    split and seed) that differs is replaced whole, its weights too. Figures and timings of no one run stay as
    they are without ``force``.
    """
    members, about = _checked(Path(archive))
    root = find_root().resolve()
    build, written, locks = (root / "build").resolve(), [], contextlib.ExitStack()
    targets = {
        build / name.removeprefix("build/"): data for name, data in members.items() if name[:6] == "build/"
    }
    if away := [path for path in targets if build not in path.resolve().parents]:
        raise BundleError(f"{away[0]} leads out of {build}: remove the link. Nothing was written.")
    with locks:
        for profile in sorted({path.relative_to(build).parts[0] for path in targets}):
            locks.enter_context(wait_for_profile(build / profile))
        other = {path for path, data in targets.items() if path.exists() and path.read_bytes() != data}
        shared = {path for path in other if _of_all_runs(path.relative_to(build))}
        if (differ := sorted(other - shared)) and not force:
            raise BundleError(
                f"{len(differ)} results are there already and differ, like {differ[0].relative_to(build)}. "
                "Nothing was written. FORCE=1 replaces the runs that these are of, with their weights."
            )
        for run in sorted({run for path in differ if (run := _run_folder(build, path))}):
            print(f"replaced: {run.relative_to(build)}")
            shutil.rmtree(run, ignore_errors=True)
        for path, data in targets.items():
            if not path.exists() or (path.read_bytes() != data and (force or path not in shared)):
                with atomic_path(path) as temporary:
                    temporary.write_bytes(data)
                written.append(path)
    return written, about


def _checked(archive):
    """({name: bytes}, results.json) of an archive; nothing of it is written anywhere."""
    members, size = {}, 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for entry in tar:
                path = PurePosixPath(entry.name)
                known = path.parts[:1] in (("build",), ("made-there",)) and len(path.parts) > 2
                known |= entry.name == "results.json"
                hidden = any(part.startswith(".") for part in path.parts)
                if not entry.isfile() or hidden or not known or path.suffix not in KINDS | {".npz"}:
                    raise BundleError(
                        f"{archive} holds {entry.name!r}, which is no result. Nothing was written."
                    )
                size += entry.size
                if size > UNPACKED:
                    raise BundleError(f"{archive} swells beyond {UNPACKED >> 20} MiB. Nothing was written.")
                members[path.as_posix()] = tar.extractfile(entry).read()
        about = json.loads(members.pop("results.json"))
        return members, {name: about[name] for name in ("step", "status", "commit", "profile", "left_out")}
    except (tarfile.TarError, zlib.error, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        raise BundleError(
            f"{archive} is no whole file of results ({type(error).__name__}: {error})."
        ) from error


def _run_folder(build, path):
    """The folder of the run that a file in build/ is of; None of a file of no one run."""
    below = path.relative_to(build)
    of = _RUN.search(below.as_posix())
    return build / below.parts[0] / of[1] if of else None


def _of_all_runs(path):
    return path.parts[1] in ("figures", "benchmarks") and not _RUN.search(path.as_posix())
