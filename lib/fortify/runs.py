"""Where a run's files are, how they are written, and what a run says about itself.

A *run* is one folder below ``build/<profile>/``. A notebook opens it with :func:`open_run`, reads
what the notebooks before it left there, and writes its own files through :func:`atomic_path`.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import platform
import re
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fortify.files import find_root
from fortify.runtime import describe_device

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

BY_HAND = "build/by-hand"  # where a notebook run outside the workflow writes
_MEANINGLESS = ("test", "nbmake")  # profiles whose figures mean nothing: never read by hand

_WRITERS = (  # the first prefix that fits
    ("data/", "01_data"),
    ("normal_predictions", "03_attacks"),
    ("normal_attacked", "03_attacks"),
    ("normal_logits", "03_attacks"),
    ("baselines_", "03_attacks"),
    ("normal", "02_baseline"),
    ("adversarial", "04_adversarial_training"),
    ("published", "06_published_protocol"),
    ("tone_curves", "06_published_protocol"),
    ("nodules_", "11_transfer"),
)
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
_KINDS |= {dict: "a mapping"}
_PLAIN = (*_KINDS, tuple, type(None))
_RUN = r"([a-z]+)-s(\d+)"  # a run's folder: split and seed
_STAMPED = ("fortify", "torch", "torchvision", "foolbox", "pyautoattack")
_STAMPED += ("numpy", "pandas", "scikit-learn", "scipy")


@dataclass(frozen=True)
class Run:
    """A run's folders: ``source`` is read, ``target`` is written. The workflow makes them one.

    Names that start with ``data/``, ``figures`` or ``tables`` belong to the profile, not to one run.
    """

    source: Path
    target: Path
    replaced: set = field(default_factory=set, compare=False)  # names read from what was made by hand instead
    inherited: dict = field(
        default_factory=dict, compare=False
    )  # {notebook: parameters taken from its manifest}

    @property
    def profile(self) -> str:
        """Name of the profile that wrote what is read; ``"by hand"`` outside the workflow.

        Where files made by hand were read in place of the profile's, it names them.
        """
        if self.source.name == Path(BY_HAND).name:
            return "by hand"
        beside = f" with {', '.join(sorted(self.replaced))} made by hand" if self.replaced else ""
        return self.source.parent.name + beside

    def siblings(
        self,
        needs: Collection[str],
        *,
        splits: Collection[str] | None = None,
        seeds: Collection[int] | None = None,
    ) -> list[Run]:
        """The runs of the same profile that hold every file in ``needs``, by split and seed (2 before 10).

        ``splits`` and ``seeds`` leave out other runs, such as those of an earlier call with more seeds.
        """
        if self.source.name == Path(BY_HAND).name:
            folders = [self.source]
        else:
            folders = sorted((p for p in self.source.parent.iterdir() if p.is_dir()), key=run_order)
        found = []
        for folder in (p for p in folders if _holds(p, needs)):
            stamps = {_stamp(folder, n) for n in needs} - {None}
            of = re.fullmatch(_RUN, next((s[1] for s in stamps if s[1]), folder.name))
            known = splits is None or (of and of[1] in splits)
            if known and (seeds is None or (of and int(of[2]) in seeds)):
                found.append(Run(folder, self.target, self.replaced, self.inherited))
        return found

    def parameters(self, notebook: str, *names: str) -> dict[str, Any]:
        """{name: value} of the parameters that ``notebook`` of this run had: all, or just ``names``.

        They are read from its manifest, so that no later notebook declares them again. Name both as literals:
        the workflow reads them in the notebook's source, and redoes it when one changes.
        Raises FileNotFoundError where that notebook has not been run, and ValueError where it was run before
        it had such a parameter; both name it.
        """
        path = self.read(f"data/{notebook}.json" if notebook == "01_data" else f"{notebook}.json")
        made = json.loads(path.read_text(encoding="utf-8"))["parameters"]
        if missing := [name for name in names if name not in made]:
            raise ValueError(f"{path} has no {', '.join(missing)}: run notebook {notebook} again")
        own = {name: made[name] for name in names or made}
        self.inherited.setdefault(notebook, {}).update(own)
        return own

    def read(self, name: str) -> Path:
        """Path of an existing file ``name``.

        Raises FileNotFoundError, saying which notebook writes the file.
        """
        path = _resolve(self.source, name)
        if self.target != self.source and not name.startswith("data/"):
            # What was made by hand, if it was made of the same data, split and seed. Never another split's
            # file: that model may have seen this one's test images.
            own = _stamp(self.target, name)
            if own is not None and own == _stamp(self.source, name) and _resolve(self.target, name).exists():
                path = _resolve(self.target, name)
                self.replaced.add(name)
        if path.exists():
            return path
        raise FileNotFoundError(f"{_resolve(self.source, name)} does not exist. {_remedy(name)}")

    def holds(self, *names: str) -> bool:
        """Whether every one of these files is there for :meth:`read`."""
        try:
            return all(self.read(name) for name in names)
        except FileNotFoundError:
            return False

    def write(self, name: str) -> Path:
        """Path to write ``name`` to; its folder exists on return."""
        path = _resolve(self.target, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def shared_parameters(runs: Sequence[Run], notebook: str, *names: str) -> dict[str, Any]:
    """:meth:`Run.parameters` of several runs, which must agree: their results are in one table.

    Raises ValueError that names two runs which do not, or where there are none.
    """
    if not runs:
        raise ValueError(f"there is no finished run to read {notebook}'s parameters from")
    first = runs[0].parameters(notebook, *names)
    for run in runs[1:]:
        other = run.parameters(notebook, *names)
        for name in first:
            if other.get(name) != first[name]:
                raise ValueError(
                    f"{runs[0].source.name} is of {name} = {first[name]!r} and {run.source.name} of "
                    f"{other.get(name)!r}: run notebook {notebook} again on one of them"
                )
    return first


def first_run(runs: Sequence[Run], split: str) -> Run:
    """The first of ``runs`` that is of ``split``; of a run by hand, which is alone, that one."""
    return next(r for r in runs if re.fullmatch(rf"{split}-s\d+|{Path(BY_HAND).name}", r.source.name))


def run_order(path: str | Path) -> tuple[str, int]:
    """Sorts runs by split, then by seed as a number; other folders by their names."""
    name = Path(path).name
    found = re.fullmatch(_RUN, name)
    return (found[1], int(found[2])) if found else (name, -1)


def open_run(run: str | Run = "", *, needs: Collection[str] = ()) -> Run:
    """Open the run folder ``run`` (absolute, or below the checkout) and return a :class:`Run`.

    ``run=""`` is a notebook run by hand: it writes to ``build/by-hand``, so that no finished run is
    changed, and reads what was made there before; what is not there comes from the newest run below
    ``build/`` that has it. When a split's file is among the ``needs``, only runs of that split and seed
    count: another's model has seen this one's test images.
    Raises FileNotFoundError naming the notebook to run first when a needed file is nowhere.
    """
    if isinstance(run, Run):  # the cell was run twice
        return run
    root = find_root()
    if run:
        folder = root / run
        opened = Run(folder, folder)
        for name in needs:
            opened.read(name)
        return opened
    by_hand = root / BY_HAND
    names = {Path(n).stem for n in needs if n.startswith("data/splits/")}
    if needs and _holds(by_hand, needs) and _belong_together(by_hand, needs, names):
        return Run(by_hand, by_hand)
    runs = [p for p in (root / "build").glob("*/*") if needs and _holds(p, needs)]
    runs = [p for p in runs if (not names or p.name in names) and p.parent.name not in _MEANINGLESS]
    if needs and not runs:
        of = f" of {names.pop()}" if names else ""
        missing = [n for n in needs if not _resolve(by_hand, n).exists()] or list(needs)
        raise FileNotFoundError(
            f"No run{of} below {root / 'build'} holds {', '.join(missing)}. "
            + _remedy(min(missing, key=lambda name: _writer(name) or ""))
        )
    newest = max(runs, key=lambda p: max(_resolve(p, n).stat().st_mtime for n in needs), default=by_hand)
    return Run(newest, by_hand)


def _belong_together(folder, needs, names):
    """Whether the files that notebooks left in one folder are of one data set, and of the named split."""
    stamps = [_stamp(folder, name) for name in needs]
    runs = {stamp[1] for stamp in stamps if stamp} - {None}
    return len({stamp[0] for stamp in stamps if stamp}) == 1 and (not names or runs <= names)


def _stamp(folder, name):
    """(data hash, "<split>-s<seed>" or None) from the manifest of the notebook that wrote ``name``."""
    notebook = _writer(name)
    path = _resolve(folder, f"data/{notebook}.json" if name.startswith("data/") else f"{notebook}.json")
    if not path.exists():
        return None
    made = json.loads(path.read_text(encoding="utf-8"))
    own = made["parameters"]
    return made["data_sha256"], f"{own['split']}-s{own['seed']}" if "split" in own else None


def _resolve(folder, name):
    shared = name.split("/")[0] in ("data", "figures", "tables")
    return (folder.parent if shared and folder.name != Path(BY_HAND).name else folder) / name


def _holds(folder, names):
    return all(_resolve(folder, n).exists() for n in names)


def _writer(name):
    """The notebook that writes the file ``name``; None for a file that none of them is known to write."""
    if re.fullmatch(r"\d\d_\w+\.json", Path(name).name):  # a manifest
        return Path(name).stem
    return next((notebook for prefix, notebook in _WRITERS if name.startswith(prefix)), None)


def _remedy(name):
    if name.startswith("data/splits/"):
        return (
            "Notebook 01_data writes it where the split and the seed are among its `splits` and `seeds`: run "
            "that first, or `make demo` for all of them."
        )
    if _writer(name):
        return f"Notebook {_writer(name)} writes it: run that first, or `make demo` for all of them."
    return "Run the notebooks before this one first, or `make demo` for all of them."


def notebook_parameters(notebook: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    """{name: value} of what the parameters cell of ``notebook`` ("02_baseline") declares now.

    Call it with ``globals()`` right after that cell. Rerun later, when a set-up cell has made of a parameter
    something else (a :class:`Run`, a device), it keeps what was recorded first, the dict ``parameters``.
    Raises ValueError in one sentence where a value is of another type than the declared default.
    """
    earlier, found = namespace.get("parameters", {}), {}
    for name, default in declared_parameters(find_root() / "notebooks" / f"{notebook}.ipynb").items():
        value = namespace.get(name, default)
        if not isinstance(value, _PLAIN) and name in earlier:
            value = earlier[name]
        try:
            found[name] = checked_parameter(value, default, where=name)
        except ValueError as error:
            raise ValueError(f"{error}; to papermill say it as YAML: -y '{{{name}: ...}}'") from None
    return found


def declared_parameters(notebook: str | Path) -> dict[str, Any]:
    """{name: default} of the cell tagged ``parameters``, which must hold plain literals, one a line.

    ValueError for a file without that cell, or where it holds something else.
    """
    for cell in json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            try:
                return literals("".join(cell["source"]))
            except ValueError as error:
                raise ValueError(f"{notebook}: {error}") from None
    raise ValueError(f"{notebook} has no cell tagged parameters")


def literals(source: str) -> dict[str, Any]:
    """{name: value} of lines of ``name = literal`` and comments. ValueError names a line that is not one."""
    found = {}
    for line in ast.parse(source).body:
        try:
            found[line.targets[0].id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError):
            raise ValueError(f"{ast.unparse(line)} is no `name = literal`") from None
    return found


def checked_parameter(value: Any, default: Any, *, where: str) -> Any:
    """``value`` if it is of the default's type; else ValueError in one sentence, which starts with ``where``.

    A whole number passes for a number. Each element of a list is checked, and in a mapping each value whose
    name the default has too.
    """
    wrong = f"{where} must be {_KINDS[type(default)]} like {default!r}, not "
    wrong += f"the text {value!r}" if isinstance(value, str) else repr(value)
    if isinstance(default, float) and type(value) is int:
        return value
    if type(value) is not type(default) or (isinstance(default, list) and not value):
        raise ValueError(wrong)
    if isinstance(default, list):
        return [checked_parameter(v, default[0], where=f"an element of {where}") for v in value]
    if isinstance(default, dict):
        return {
            k: checked_parameter(v, default[k], where=f"{k} in {where}") if k in default else v
            for k, v in value.items()
        }
    return value


def banner(run: Run, source: str, *, device: str | torch.device | None = None, **facts: Any) -> str:
    """Markdown for a notebook's top: profile, data, what was trained, and what it must not pass for."""
    parts = [f"Profile **{run.profile}**", source]
    parts += [f"{name} {value}" for name, value in facts.items()]
    parts += [describe_device(device)] if device is not None else []
    line = "> " + " · ".join(parts) + "."
    if run.profile != "paper":
        line += (
            "<br>These are **not** the reference run's figures, which take the `paper` profile "
            "(ResNet-50, 224 px, five seeds, one GPU)."
        )
    return line


def manifest(
    *,
    parameters: Mapping[str, Any],
    data_sha256: str,
    device: str | torch.device,
    inherited: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What a result needs to be traced: parameters, data hash, code, versions and machine, as a dict.

    ``inherited`` is :attr:`Run.inherited`, what it took of other notebooks' parameters.
    """
    versions = {"python": platform.python_version()}
    for package in _STAMPED:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "parameters": parameters,
        "inherited": inherited or {},
        "data_sha256": data_sha256,
        "device": describe_device(device),
        "versions": versions,
        "code": code_state(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def lib_sha256() -> str:
    """Of the modules of ``lib/fortify``, names and contents."""
    digest, package = hashlib.sha256(), Path(__file__).parent
    for module in sorted(package.rglob("*.py")):
        digest.update(module.relative_to(package).as_posix().encode() + b"\0" + module.read_bytes())
    return digest.hexdigest()


def code_state() -> dict[str, Any]:
    """Commit, dirty flag and the SHA-256 of ``lib/fortify``; commit is None outside a git checkout."""
    package = Path(__file__).parent
    state = {"lib_sha256": lib_sha256(), "commit": None, "dirty": None}
    try:
        git = ["git", "-C", str(package)]
        state["commit"] = subprocess.check_output(
            [*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL
        ).strip()
        state["dirty"] = bool(
            subprocess.check_output([*git, "status", "--porcelain"], stderr=subprocess.DEVNULL).strip()
        )
    except (OSError, subprocess.CalledProcessError):
        return state  # an installed copy, or no git: the hash of the sources still names the code
    return state
