"""One archive for a machine without a network, and the way back for what is computed there.

python -m fortify.workflow.bundle make             build/bundle/: checkout, slices, wheels, run.sh
python -m fortify.workflow.bundle unbundle FILE    the results that run.sh packed, into build/
"""

import argparse
import email
import io
import json
import platform as host
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from email.message import Message
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from fortify.data import IQ_OTH_NCCD, find_data
from fortify.files import atomic_path, find_root
from fortify.workflow.away import BundleError, installed_needs
from fortify.workflow.packed import unpack

TOP = "fortify-bundle"  # the archive's one folder
EXTRAS = ("workflow", "test", "audit", "pretrained", "explain")
KERNEL = "ipykernel"  # the notebooks' own, which else comes with JupyterLab
# Nothing that a step runs imports these, whoever asks for them: they serve people at a screen.
UNUSED = ["jupyterlab", "typst", "ruff", "debugpy", "jedi", "widgetsnbextension", "jupyterlab-widgets"]
NOT_CHECKED_OUT = [":!figures", ":!paper/paper.pdf"]
# Folders of wheels that stay behind: 40 MB of example weights, and solvers for other systems.
CBC = "pulp/solverdir/cbc"
SOLVERS = {"x86_64": f"{CBC}/linux/i64", "aarch64": f"{CBC}/linux/arm64"}
SLIMMED = {"pyautoattack": ["pyautoattack/examples"]}
SLIMMED |= {"pulp": [f"{CBC}/win", f"{CBC}/osx", f"{CBC}/linux/i32", *SOLVERS.values()]}
LARGE = 2**26  # bytes, of a wheel that is taken as it is; torch's for GPUs take hours to compress


def make(
    *,
    have: Collection[str] = (),
    also: Collection[str] = (),
    python: str | None = None,
    platform: str | None = None,
    data: bool = True,
    wheels: bool = True,
) -> Path:
    """Write the archive into build/bundle of this checkout; returns its path.

    ``have`` names packages that the other machine has: they are left out with all that they need, but for
    those in ``also``. ``python`` ("3.12") and ``platform`` ("manylinux_2_28_x86_64") are that machine's, by
    default this one's and a glibc of 2.28. ``data=False`` leaves out the slices, ``wheels=False`` packages.
    Raises BundleError where tracked files are not as committed or a wheel cannot be had, FileNotFoundError
    where the slices are not there.
    """
    root = find_root()
    python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    platform = platform or f"manylinux_2_28_{host.machine()}"
    environment = target_environment(python, platform)
    commit, made = _committed(root)
    about = {"commit": commit, "unused": UNUSED, "brought": []}
    about["needs"] = [str(need) for need in project_needs(root)]
    preset, members = 6, {"run.sh": Path(__file__).with_name("run.sh").read_bytes()}
    if data:
        slices = find_data()
        files = [p for name in IQ_OTH_NCCD.classes for p in sorted((slices / name).rglob("*")) if p.is_file()]
        members |= {f"data/{path.relative_to(slices).as_posix()}": path.read_bytes() for path in files}
        print(f"{len(files)} slices of {slices}", flush=True)
    if wheels:
        with tempfile.TemporaryDirectory() as folder:
            found, had = fetch_wheels(
                root, Path(folder), have=have, also=also, python=python, platform=platform
            )
            for name, path in sorted(found.items()):
                members[f"wheels/{path.name}"] = slim(path, name, environment["platform_machine"])
                preset = 0 if path.stat().st_size > LARGE else preset
        about |= {"python": python, "platform": platform, "brought": sorted(found)}
        print(f"{len(found)} wheels for Python {python} on {platform}; left to that machine: ", end="")
        print(", ".join(sorted(had)) or "nothing", flush=True)
    members["bundle.json"] = json.dumps(about, indent=1).encode()
    checkout = subprocess.check_output(["git", "-C", root, "archive", "HEAD", "--", ".", *NOT_CHECKED_OUT])
    of = f"-py{python}-{platform}" if wheels else ""
    target = root / "build" / "bundle" / f"fortify-{commit[:7]}{of}.tar.xz"
    with atomic_path(target) as temporary, tarfile.open(temporary, "w:xz", preset=preset) as tar:
        with tarfile.open(fileobj=io.BytesIO(checkout)) as source:
            for entry in source:
                content = source.extractfile(entry) if entry.isfile() else None
                entry.name = f"{TOP}/checkout/{entry.name}"
                tar.addfile(entry, content)
        for name, content in members.items():
            entry = tarfile.TarInfo(f"{TOP}/{name}")
            entry.size, entry.mtime, entry.mode = len(content), made, 0o755 if name == "run.sh" else 0o644
            tar.addfile(entry, io.BytesIO(content))
    return target


def _committed(root):
    """(commit, its time in s); BundleError where the tracked files are not those of the commit."""

    def git(*arguments):
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise BundleError(f"The archive is made of what git has committed here. {done.stderr.strip()}")
        return done.stdout

    if changed := git("status", "--porcelain", "--untracked-files=no"):
        raise BundleError(
            f"The archive holds what is committed. Commit these first, or undo them:\n{changed}"
        )
    for path in git("ls-files", "--others", "--exclude-standard").splitlines():
        print(f"left out, git does not track it: {path}", file=sys.stderr)
    return git("rev-parse", "HEAD").strip(), int(git("log", "-1", "--format=%ct"))


def target_environment(python: str, platform: str) -> dict[str, str]:
    """What requirements' markers are compared with for Python ``"3.12"`` on ``"manylinux_2_28_x86_64"``."""
    found = re.fullmatch(r"manylinux_2_\d+_(x86_64|aarch64)", platform)
    if not re.fullmatch(r"3\.\d+", python) or not found:
        raise BundleError(
            "PYTHON_VERSION is like 3.12. PLATFORM is like manylinux_2_28_x86_64, a Linux with glibc 2.28 or "
            f"later on x86_64 or aarch64. They are {python!r} and {platform!r}."
        )
    names = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": found[1]}
    names |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    return names | {"implementation_name": "cpython", "platform_python_implementation": "CPython"}


def project_needs(root: Path) -> list[Requirement]:
    """What a step needs, by pyproject.toml: the library, the workflow, the tests and the audit do."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra]), KERNEL]
    return [need for need in map(Requirement, lines) if canonicalize_name(need.name) not in UNUSED]


def locked(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """{canonical name: its line of requirements.lock without the marker}, of what is for ``environment``."""
    text, found = (root / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " "), {}
    for line in filter(None, (line.split("#")[0].strip() for line in text.splitlines())):
        wanted, *hashes = re.split(r"\s+(?=--hash=)", line)
        one = Requirement(wanted)
        if not one.marker or one.marker.evaluate({**environment, "extra": ""}):
            found[canonicalize_name(one.name)] = " ".join([f"{one.name}{one.specifier}", *hashes])
    return found


def closure(
    wanted: Iterable[Requirement],
    needs: Callable[[str], Iterable[str]],
    environment: Mapping[str, str],
    *,
    without: Collection[str] = (),
) -> set[str]:
    """Canonical names of ``wanted`` and of all that these need, by ways through nothing of ``without``.

    ``needs`` gives the requirements of a package by its canonical name, as its metadata has them.
    """
    seen, left = set(), [*wanted]
    while left:
        one = left.pop()
        name = canonicalize_name(one.name)
        for extra in {"", *one.extras} if name not in without else ():
            if (name, extra) not in seen:
                seen.add((name, extra))
                marked = {**environment, "extra": extra}
                left += [
                    r for r in map(Requirement, needs(name)) if not r.marker or r.marker.evaluate(marked)
                ]
    return {name for name, _ in seen}


def fetch_wheels(
    root: Path, folder: Path, *, have: Collection[str], also: Collection[str], python: str, platform: str
) -> tuple[dict[str, Path], set[str]]:
    """Fetch what a step needs into ``folder``: ({canonical name: wheel}, names of what was left out).

    The arguments are those of :func:`make`. Versions and hashes are those of requirements.lock. What has no
    wheel is built here, if it is Python alone. Raises BundleError where a package is not locked for that
    Python, cannot be fetched, or would have to be compiled.
    """
    environment = target_environment(python, platform)
    try:
        had = closure(map(Requirement, have), installed_needs, environment)
        had -= {canonicalize_name(Requirement(name).name) for name in also}
    except InvalidRequirement as error:
        raise BundleError(f"HAVE and WITH are names of packages, with blanks between them: {error}") from None
    lock, found, about = locked(root, environment), {}, {}
    if unknown := [name for name in have if canonicalize_name(name) not in lock]:
        print(f"HAVE: nothing here needs {', '.join(unknown)}", file=sys.stderr)

    def fetched_needs(name):
        return about[name].get_all("Requires-Dist", []) if name in about else []

    # By the metadata of what was fetched before: what a package needs there may not be installed here.
    while missing := (
        closure(project_needs(root), fetched_needs, environment, without=had | {*UNUSED}) - found.keys()
    ):
        if unlocked := sorted(missing - lock.keys()):
            raise BundleError(f"requirements.lock has no {', '.join(unlocked)} for Python {python}.")
        print(f"fetching {len(missing)} wheels", flush=True)
        _download([lock[name] for name in sorted(missing)], folder, python=python, platform=platform)
        for path in folder.glob("*.whl"):
            message = metadata(path)
            name = canonicalize_name(message["Name"])
            found[name], about[name] = path, message
    return found, had


def _download(lines, folder, *, python, platform):
    wanted = folder / "wanted.txt"
    wanted.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ["--no-deps", "--prefer-binary", "--require-hashes", "--implementation=cp"]
    options += [f"--python-version={python}", *(f"--platform={tag}" for tag in platform_tags(platform))]
    _pip("download", *options, "--dest", folder, "--requirement", wanted)
    for source in [*folder.glob("*.tar.gz"), *folder.glob("*.zip")]:
        before = {*folder.glob("*.whl")}
        _pip("wheel", "--no-deps", "--wheel-dir", folder, source)
        (built,) = {*folder.glob("*.whl")} - before
        if not built.name.endswith("-none-any.whl"):
            raise BundleError(
                f"{source.name} has no wheel for Python {python} on {platform}, and the one built here, "
                f"{built.name}, is for this machine. Choose another PYTHON_VERSION or PLATFORM."
            )
        source.unlink()


def _pip(command, *arguments):
    # Built by this environment's setuptools, as in install.py: pip would fetch the newest, without a hash.
    pip = [sys.executable, "-m", "pip", command, "-qq", "--no-build-isolation", *map(str, arguments)]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"pip {command} failed.\n{done.stderr[-2000:]}")


def platform_tags(platform: str) -> list[str]:
    """Tags of the wheels that run on a platform like ``"manylinux_2_28_x86_64"``; pip takes each as named."""
    glibc, arch = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform).groups()
    names = [f"manylinux_2_{n}" for n in range(int(glibc), 4, -1)]
    aliases = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}
    names += [alias for alias, oldest in aliases.items() if oldest <= int(glibc)]
    return [f"{name}_{arch}" for name in [*names, "linux"]]


def metadata(wheel: Path) -> Message:
    """The METADATA of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        return email.message_from_bytes(file.read(name))


def slim(wheel: Path, name: str, arch: str) -> bytes:
    """The wheel of the package ``name`` without what no step there uses (``SLIMMED``).

    It is not compressed, for the archive compresses all of them together. One above ``LARGE`` is as it was.
    """
    if wheel.stat().st_size > LARGE:
        return wheel.read_bytes()
    folders = tuple(f"{folder}/" for folder in SLIMMED.get(name, ()) if folder != SOLVERS[arch])
    made = io.BytesIO()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            if entry.filename.startswith(folders):
                continue
            content = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if not line.startswith(folders)).encode()
            new.writestr(entry, content, compress_type=zipfile.ZIP_STORED)
    return made.getvalue()


def _unbundle(file, *, force):
    if not file:
        raise BundleError("Which results? make unbundle FILE=results-....tar.gz")
    written, about = unpack(file, force=force)
    root = find_root()
    git = ["git", "-C", root, "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    print(f"{' '.join(about['step'])}: exit status {about['status']}")
    if about["commit"] != head:
        print(f"It ran commit {about['commit']}, and this checkout is at {head or 'none'}.")
    if about["left_out"]:
        print(f"Not in the file, which would have been too large: {', '.join(about['left_out'])}")
    print(f"{len(written)} files written below {root / 'build'}")
    if about["profile"]:
        print(f"Next: make tables PROFILE={about['profile']}")


def main(arguments: Sequence[str]) -> int:
    """``make`` with its options, or ``unbundle FILE [--force]``; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    of_make, of_unbundle = commands.add_parser("make"), commands.add_parser("unbundle")
    of_make.add_argument("--have", default="", help="packages that the machine has, with blanks between")
    of_make.add_argument("--with", dest="also", default="", help="packages to bring though these need them")
    of_make.add_argument("--python", help="the machine's Python, like 3.12")
    of_make.add_argument("--platform", help="like manylinux_2_28_x86_64")
    of_make.add_argument("--no-data", dest="data", action="store_false", help="without the slices")
    of_make.add_argument("--no-wheels", dest="wheels", action="store_false", help="without packages")
    of_unbundle.add_argument("file")
    of_unbundle.add_argument("--force", action="store_true", help="replace runs that differ")
    given = vars(parser.parse_args(arguments))
    try:
        if given.pop("command") == "unbundle":
            _unbundle(**given)
        else:
            given |= {"have": given["have"].split(), "also": given["also"].split()}
            target = make(**given)
            print(f"{target.relative_to(find_root())}: {target.stat().st_size / 2**20:.1f} MiB")
            print(f"There: tar xf {target.name} && sh {TOP}/run.sh")
    except (BundleError, FileNotFoundError) as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
