"""What the Snakefile's rules are made of: a step is a notebook with what it reads, writes and depends on."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fortify.data import find_data, hash_files
from fortify.runs import run_order
from fortify.workflow.notebooks import cells_digest, code_of, inherited_parameters

# What the costly steps, those that train or attack, are not redone for: how results are written and drawn.
STYLE = ("fortify.files", "fortify.runs", "fortify.tables", "fortify.answers", "*.figures", "*.answer")
STYLE += ("fortify.runtime.progress_bar", "fortify.runtime.describe_device")
_OF_RUN = ("run", "split", "seed")  # parameters that the workflow sets itself


class Step(NamedTuple):
    """A row of the Snakefile's table: a rule's name, its notebook, its folder, and files, below the build's.

    "{run}" in a path stands for each split and seed. A step that is not ``costly`` is redone when its
    notebook or anything that this imports changes; a costly one is not for prose or ``STYLE``.
    """

    name: str
    notebook: str
    folder: str
    reads: list
    writes: list
    costly: bool = True

    @property
    def source(self) -> str:
        return f"notebooks/{self.notebook}.ipynb"

    @property
    def below(self) -> str:
        """Where in ``notebooks/`` of the build its executed copies lie."""
        return f"{{run}}/{self.notebook}" if "{run}" in self.folder else self.notebook

    def code(self) -> dict[str, str]:
        """{name: digest} of the code that it computes with: the notebook's cells, the library's modules."""
        modules = code_of(self.source, without=STYLE if self.costly else ())
        return {self.notebook: cells_digest(self.source)} | modules

    def values(self, parameters: Mapping[str, dict[str, Any]], build: str | Path) -> Callable[[Any], str]:
        """A function of Snakemake's wildcards: the notebook's parameters as the YAML that papermill takes."""

        def filled(wildcards):
            own = parameters[self.notebook] | {"run": f"{build}/{self.folder.format(**wildcards)}"}
            if "{run}" in self.folder:
                split, seed = split_and_seed(wildcards["run"])
                own |= {"split": split, "seed": seed}
            # YAML's own writer: JSON's 5e-05 would be read back as text. One line, for the shell.
            return yaml.safe_dump(own, default_flow_style=True, sort_keys=False, width=float("inf")).strip()

        return filled

    def gpus(self, parameters: Mapping[str, Mapping[str, Any]]) -> int:
        """How many GPUs to ask a cluster for: one where its parameters say so, or leave it to the machine.

        In the latter case none for the small network, nor for a notebook that has no ``device``.
        """
        device = parameters[self.notebook].get("device", "cpu")
        small = parameters["02_baseline"]["arch"] == "resnet_small"
        return int(device.startswith("cuda") or (device == "auto" and not small))

    def inherited(self, parameters: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Values of the parameters that the notebook reads in other notebooks' manifests.

        They stand for those files, which are no input because of their time stamps.
        """
        return {
            stem: {name: parameters[stem][name] for name in names or parameters[stem] if name not in _OF_RUN}
            for stem, names in inherited_parameters(self.source).items()
        }


def each(runs: Iterable[str], *names: str) -> list[str]:
    """Paths of these files in every run's folder."""
    return [f"{run}/{name}" for run in runs for name in names]


def needed_for(name: str, steps: Iterable[Step]) -> set[str]:
    """Names of the step ``name`` and of those of ``steps`` that it needs, directly or through others."""
    of = {step.name: step for step in steps}
    maker = {_of_any_run(path): step.name for step in of.values() for path in step.writes}
    found, left = {name}, [name]
    while left:
        reads = map(_of_any_run, of[left.pop()].reads)
        new = {maker[path] for path in reads if path in maker} - found
        found |= new
        left += new
    return found


def _of_any_run(path):
    return re.sub(r"[a-z]+-s\d+", "{run}", path)


def split_and_seed(run: str) -> tuple[str, int]:
    """("random", 0) of "random-s0"."""
    split, _, seed = run.rpartition("-s")
    return split, int(seed)


def finished_runs(
    build: str | Path,
    needs: Collection[str],
    *,
    splits: Collection[str],
    seeds: Collection[int] | None = None,
) -> list[str]:
    """Names of the runs below ``build`` that hold every file of ``needs``, by split and seed."""
    found = sorted((p for p in Path(build).glob("*-s[0-9]*") if p.is_dir()), key=run_order)
    found = [p.name for p in found if all((p / name).is_file() for name in needs)]
    of = {run: split_and_seed(run) for run in found}
    return [r for r, (split, seed) in of.items() if split in splits and (seeds is None or seed in seeds)]


def image_files(parameters: Mapping[str, Any]) -> str:
    """Which files notebook 1 reads: other ones make its results stale. Phantoms have none."""
    if parameters["dataset"] == "phantom":
        return ""
    try:
        folder = Path(parameters["data_dir"] or find_data())
    except FileNotFoundError:
        return "not there yet"
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return f"{len(files)} files, {hash_files(files)[:12]}"
