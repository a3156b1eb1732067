"""From a finished profile to what is committed: executed notebooks, figures, tables and the paper.

python -m fortify.workflow.publish commit build/laptop
    notebooks/, figures/, paper/tables, README.md, docs/ and what the attack explorer shows there
python -m fortify.workflow.publish weights build/laptop
    paper/models: the weights of seed 0 of each split with their cards; what is left out is printed
python -m fortify.workflow.publish pdf [laptop]
    paper/paper.pdf, from paper/paper.typ and the published tables of a profile: if none is named, of the
    committed notebooks'
"""

import base64
import functools
import gzip
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from fortify.files import atomic_path, find_root, write_csv, write_text
from fortify.runs import literals, run_order
from fortify.workflow import front
from fortify.workflow.aims import aims
from fortify.workflow.profiles import (
    ProfileError,
    companion_profiles,
    load_profile,
    read_profile,
    with_inherited,
)

_SPLITS = ("random", "grouped")
# Notebooks whose finding is about unseen groups.
SHOWN_ON = {"12_explanations": "grouped", "13_detection": "grouped"}
PARTS1 = {"": "Table 1", "_classes": "Classes, scans and baselines"}  # {end of the file's name: title}


class PublishError(RuntimeError):
    """What was executed is not what would be published; the message says what to rerun."""


def executed_notebooks(build: Path, stems: Iterable[str]) -> dict[str, Path]:
    """{stem: path} of the executed copies: of notebooks run once per split and seed, the first run's.

    The first is the lowest seed of those in the tables on the random split, the paper's, or on that of
    :data:`SHOWN_ON`, where there is one. A stem that has not been executed is left out.
    """
    runs, found = published_runs(build), {}
    for stem in stems:
        split = SHOWN_ON.get(stem, "random")
        own = sorted(runs, key=lambda run, split=split: (not run.startswith(split), run_order(run)))
        places = [build / "notebooks" / f"{stem}.ipynb"]
        places += [build / "notebooks" / run / f"{stem}.ipynb" for run in own]
        if there := [path for path in places if path.is_file()]:
            found[stem] = there[0]
    return found


def published_runs(build: Path) -> list[str]:
    """Names of the runs that the tables are of, by split and seed: those of notebook 1's splits and seeds.

    A folder of runs may hold others, of an earlier call with more seeds.
    """
    found = sorted((path.parent.name for path in build.glob("*/02_baseline.json")), key=run_order)
    made = build / "data" / "01_data.json"
    if not made.is_file():
        raise PublishError(f"{made} is missing; run that profile first")
    own = json.loads(made.read_text(encoding="utf-8"))["parameters"]
    wanted = {f"{split}-s{seed}" for split in own["splits"] for seed in own["seeds"]}
    return [run for run in found if run in wanted]


def source_sha256(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 over a notebook's code cells: what an executed copy must have been made from. Prose is free."""
    digest = hashlib.sha256()
    for cell in code_cells(notebook):
        digest.update(f"{cell.id}\0{cell.source}\0".encode())
    return digest.hexdigest()


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Without the one that papermill injected."""
    own = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in own if "injected-parameters" not in cell.metadata.get("tags", [])]


def with_outputs(
    source: nbformat.NotebookNode, executed: nbformat.NotebookNode, *, profile: str
) -> nbformat.NotebookNode:
    """A copy of the notebook ``source`` with the outputs of ``executed``, papermill's additions left out.

    The parameters cell keeps the source's values and shows, as its output, those that the profile changed.
    Styled tables, whose ids pandas draws, are named by their cells, and objects lose their addresses in
    memory: the same result is the same file. Prose is the source's, which executes nothing. What a cell wrote
    to stderr, as warnings with paths of the machine, stays behind (:func:`warned`).
    Raises PublishError when a code cell's source differs, when one is gone or moved, or when a cell failed.
    """
    made = {cell.id: cell for cell in code_cells(executed)}
    published, count = nbformat.from_dict(source), 0
    cells = code_cells(published)
    if gone := made.keys() - {cell.id for cell in cells}:
        raise PublishError(f"cell {min(gone)} was executed and is gone; run the {profile} profile again")
    if moved := [
        cell.id for cell, name in zip(cells, made, strict=False) if cell.id != name and cell.id in made
    ]:
        raise PublishError(f"cell {moved[0]} moved since it was executed; run the {profile} profile again")
    for cell in cells:
        ran = made.get(cell.id)
        if ran is None or ran.source != cell.source:
            raise PublishError(
                f"cell {cell.id} changed since it was executed; run the {profile} profile again"
            )
        if any(output.output_type == "error" for output in ran.outputs):
            raise PublishError(f"cell {cell.id} failed when it was executed")
        count, tables = count + 1, 0
        cell.execution_count = count
        cell.outputs = [output for output in ran.outputs if output.get("name") != "stderr"]
        for data in (output.get("data", {}) for output in cell.outputs):
            if "image/png" in data:
                data["image/png"] = base64.b64encode(small_png(base64.b64decode(data["image/png"]))).decode()
        if "parameters" in cell.metadata.get("tags", []):
            cell.outputs = [_changed_parameters(cell, executed, profile)]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if "text/plain" in output.get("data", {}):
                output.data["text/plain"] = re.sub(r" at 0x[0-9a-f]+>", ">", output.data["text/plain"])
            html = output.get("data", {}).get("text/html", "")
            for drawn in re.findall(r'<table id="T_([0-9a-f]{5})"', html):
                tables += 1
                # With the cell's id: JupyterLab holds all open notebooks, and their styles, in one page.
                output.data["text/html"] = html = html.replace(f"T_{drawn}", f"T_{cell.id}-{tables}")
    published.metadata["fortify"] = {"profile": profile, "source_sha256": source_sha256(published)}
    return published


@functools.lru_cache
def small_png(data: bytes) -> bytes:
    """A large PNG with 256 colours, for notebooks that GitHub shows; the same always gives the same.

    One that would lose a colour stays as it is: of a thousand pixels one may change by more than 16 levels.
    The PDF beside it has all colours.
    """
    import numpy as np
    from PIL import Image

    if len(data) < 150_000:
        return data
    image, small = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    reduced = image.quantize(256, kmeans=1, dither=Image.Dither.NONE)
    change = np.abs(np.asarray(reduced.convert("RGB"), int) - np.asarray(image, int)).max(2)
    reduced.save(small, "PNG", optimize=True)
    return data if (change > 16).mean() > 0.001 else small.getvalue()


def warned(executed: nbformat.NotebookNode) -> list[str]:
    """What the cells of an executed notebook wrote to stderr, as "cell: text"."""
    return [
        f"{cell.id}: {output.text.strip()}"
        for cell in code_cells(executed)
        for output in cell.outputs
        if output.get("name") == "stderr"
    ]


def _changed_parameters(cell, executed, profile):
    """An output that says which parameters the executed copy ran with, where they are not the cell's own."""
    injected = [c.source for c in executed.cells if "injected-parameters" in c.metadata.get("tags", [])]
    own, used = literals(cell.source), literals("".join(injected))
    changed = [
        f"{name} = {value!r}" for name, value in used.items() if own.get(name) != value and name != "run"
    ]
    words = ", ".join(f"`{change}`" for change in changed) or "the values above"
    text = f"**Executed with the `{profile}` profile**: {words}."
    return nbformat.v4.new_output("display_data", {"text/markdown": text, "text/plain": text})


def published_folders(root: Path, profile: str) -> tuple[Path, Path]:
    """(figures, tables): where what a profile gave is published, the reference run's at the top."""
    below = "" if profile == "paper" else profile
    return root / "figures" / below, root / "paper" / "tables" / below


def awaiting(root: Path) -> dict[str, str]:
    """{stem: why} of the committed notebooks whose outputs are not of the code above them, as they say."""
    notebooks = {
        p.stem: nbformat.read(p, as_version=4) for p in sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    }
    found = {
        stem: notebook.metadata.get("fortify", {}).get("awaiting") for stem, notebook in notebooks.items()
    }
    return {stem: why for stem, why in found.items() if why}


def awaiting_line(root: Path) -> str:
    """README's line on :func:`awaiting`; none where every notebook shows its own outputs. Markdown."""
    stems = awaiting(root)
    if not stems:
        return ""
    total, said = len(list((root / "notebooks").glob("[0-9]*.ipynb"))), []
    for why in dict.fromkeys(stems.values()):
        own = [stem[:2] for stem in stems if stems[stem] == why]
        if len(own) == total > 1:
            said.append(f"All notebooks await {why}.")
        elif len(own) > 1:
            said.append(f"Notebooks {', '.join(own[:-1])} and {own[-1]} await {why}.")
        else:
            said.append(f"Notebook {own[0]} awaits {why}.")
    return " ".join(said) + "\n"


def shown_profile(root: Path) -> str:
    """The profile that the committed notebooks are a run of; PublishError where they are not of one."""
    paths = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    profiles = {nbformat.read(p, as_version=4).metadata.get("fortify", {}).get("profile") for p in paths}
    if len(profiles) != 1 or None in profiles:
        raise PublishError(
            "the committed notebooks are not all of one profile's run; `make publish` makes them so"
        )
    return profiles.pop()


def commit(build: str | Path) -> list[Path]:
    """Put a profile's executed notebooks, figures, tables, the per-example results they are made of and what
    the attack explorer shows where readers look; returns what was written.

    Only the ``paper`` profile writes ``figures/`` and ``paper/tables/`` themselves; any other writes to
    their subfolder of its name, so that nothing smaller passes for the reference run. What an earlier publish
    left there goes. A notebook that awaits a run and was not executed goes on awaiting it (:func:`awaiting`).
    A companion profile leaves the notebooks as they are, and docs/results.md shows its Table 1 below that of
    their profile.
    """
    build, root = Path(build).resolve(), find_root()
    profile = build.name
    figures, tables = published_folders(root, profile)
    companion = profile in companion_profiles(root / "notebooks" / "profiles")
    shown = shown_profile(root) if companion else profile
    sources = {p.stem: p for p in sorted((root / "notebooks").glob("[0-9]*.ipynb"))}
    executed, ready = executed_notebooks(build, sources), {}
    last = "table1.txt" if companion else "claims.md"
    missing = [] if companion else sorted(sources.keys() - executed.keys() - awaiting(root).keys())
    if missing or not executed:
        raise PublishError(
            f"{build}/notebooks holds no executed {', '.join(missing) or 'notebook'}; run that profile first"
        )
    if not (build / "tables" / last).is_file():
        what = "Table 1" if companion else "ledger of claims"
        raise PublishError(f"{build}/tables holds no {what}; run that profile to its end first")
    for stem, path in executed.items():
        source, ran = (nbformat.read(p, as_version=4) for p in (sources[stem], path))
        published = with_outputs(source, ran, profile=profile)
        for warning in warned(ran):
            print(f"publish: {stem}: not published, a warning of cell {warning}", file=sys.stderr)
        ready[sources[stem]] = text = nbformat.writes(published) + "\n"
        home = f"{Path.home()}/"
        if str(root) in text or (home != "//" and home in text):  # a container's user may live in /
            raise PublishError(
                f"the executed {stem} shows a path of this machine; publish from clean outputs"
            )
    written = [] if companion else list(ready)
    for path in written:  # only once all of them have passed
        write_text(path, ready[path])
    others = {path.stem for path in (root / "notebooks" / "profiles").glob("*.yaml")} - {profile}
    runs = published_runs(build)
    beside = published_folders(root, shown)[0] if companion else None
    for kind, folder in (("figures", figures), ("tables", tables)):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
            elif profile != "paper" or path.name not in others:  # whose folders hold the others'
                shutil.rmtree(path)
        for path in _of_first_seed(_whole_files(build / kind), runs):
            data = path.read_bytes()
            data = small_png(data) if path.suffix == ".png" else data
            # What a companion's figures only repeat, as Figure 1, is published once.
            if kind == "tables" or beside is None or not _holds(beside / path.name, data):
                (folder / path.name).write_bytes(data)
                written.append(folder / path.name)
    for path in per_example_results(build, runs):
        packed = tables / "runs" / path.relative_to(build)
        if path.suffix == ".csv":
            packed = packed.with_suffix(".csv.gz")
        with atomic_path(packed) as temporary:
            data = path.read_bytes()
            temporary.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".csv" else data)
        written.append(packed)
    times = run_times(build)
    if len(times):
        write_csv(tables / "run_times.csv", times)
        written.append(tables / "run_times.csv")
    if not companion:
        written += _publish_explorer(build, root)
    update_pages(root, shown)
    return written


def run_times(build: Path) -> pd.DataFrame:
    """What each notebook of a profile took, as Snakemake timed it: notebook, run, seconds, cpu_seconds.

    Of a notebook that was stopped and went on, the last part alone.
    """
    rows = []
    for path in sorted((build / "benchmarks").rglob("[0-9]*.tsv")):
        timed = pd.read_csv(path, sep="\t").iloc[-1]
        run = path.parent.name if path.parent.name != "benchmarks" else ""
        rows.append({"notebook": path.stem, "run": run, "seconds": timed.s, "cpu_seconds": timed.cpu_time})
    return pd.DataFrame(rows, columns=["notebook", "run", "seconds", "cpu_seconds"])


def _publish_explorer(build, root):
    """Put the attack explorer's data.js beside its page; what an earlier publish left there goes."""
    made, shown = build / "explorer" / "data.js", root / "docs" / "explorer" / "data.js"
    shown.unlink(missing_ok=True)
    if not made.is_file():  # made by `make tables`, without the networks: the page says that there is nothing
        return []
    shown.parent.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copy(made, shown))]


def per_example_results(build: Path, runs: Collection[str]) -> list[Path]:
    """The splits, the runs' rows by image, histories and manifests: what the tables are made of."""
    found = [build / "data" / "splits" / f"{run}.csv" for run in runs]
    found = [path for path in found if path.is_file()]
    return found + [p for run in runs for p in _whole_files(build / run) if p.suffix in (".csv", ".json")]


def _of_first_seed(paths, runs):
    """Without the files of single runs, ``<name>_<split>-s<seed>``, but of the first seed of ``runs``."""
    seed_of = {p: found for p in paths if (found := re.search(r"_([a-z]+-s(\d+))$", p.stem))}
    seeds = {p: int(found[2]) for p, found in seed_of.items() if found[1] in runs}
    first = min(seeds.values(), default=None)
    return [p for p in paths if p not in seed_of or seeds.get(p) == first is not None]


def _holds(path, data):
    return path.is_file() and path.read_bytes() == data


def _whole_files(folder):
    """Sorted; without what a killed writer left half-written: see ``files.atomic_path``."""
    return sorted(p for p in folder.glob("[!.]*") if p.is_file())


def publish_weights(build: str | Path) -> list[str]:
    """Put the weights of seed 0 of each split, with a card each, into ``paper/models/<profile>``.

    They must be of the run that the published tables are of (:func:`commit`): the card shows their Table 1.
    What an earlier publish left of the profile goes. Returns a line for each model, published or left out
    because it is larger than 4 MB or because its weights are not on this machine; the folder's README has it
    too. Of phantoms nothing is published. Raises PublishError where the tables are not this run's.
    """
    from fortify.published import MODELS, published_sha256, sha256_of  # here: these load torch

    build, root = Path(build).resolve(), find_root()
    profile, folder = build.name, root / MODELS
    runs = [run for run in published_runs(build) if run.endswith("-s0")]
    data = json.loads((build / "data/01_data.json").read_text(encoding="utf-8"))
    if data["parameters"].get("dataset") == "phantom":
        return [f"{profile}: left out, its images are phantoms"]
    manifests = {run: _manifests(build, root, run) for run in runs}  # all of them before anything changes
    sums = {name: sha for name, sha in published_sha256(folder).items() if not name.startswith(f"{profile}/")}
    if (folder / profile).is_dir():
        shutil.rmtree(folder / profile)
    said = {}
    for run in runs:
        for training in ("normal", "adversarial"):
            name = f"{profile}/{run}/{training}"
            said[name] = _publish_one(build, root, run, training, manifests[run])
            if (path := folder / f"{name}.safetensors").is_file():
                sums[name] = sha256_of(path)
                detectors = build / run / f"{training}_detectors.safetensors"  # notebook 13's, if it was run
                if detectors.is_file():
                    shutil.copy(detectors, path.parent)
    lines = [f"{sha}  {name}.safetensors\n" for name, sha in sorted(sums.items())]
    write_text(folder / "SHA256SUMS", "".join(lines))
    readme = folder / "README.md"
    before = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    others = {m[1]: m[2] for m in re.finditer(r"^- `(.+?)`: (.+)$", before, re.MULTILINE)}
    others = {name: text for name, text in others.items() if not name.startswith(f"{profile}/")}
    bullets = [f"- `{name}`: {text}" for name, text in sorted((others | said).items())]
    write_text(readme, _MODELS_README + "\n".join(bullets) + "\n")
    return [f"{name}: {text}" for name, text in said.items()]


_ENOUGH = 3  # seeds of each split, for a companion's Table 1 to go before the main one's

_MODELS_README = """# Trained weights

Seed 0 of each split, normal and adversarial training. The card beside each file says what it was trained on,
how well it does and what it must not be used for. **Not a medical device.** From a checkout:

```python
from fortify.published import load_published

model = load_published("laptop/grouped-s0/adversarial")
```

`SHA256SUMS` is checked on loading. Weights are MIT, as the code; the slices that they were trained on are
CC BY 4.0.

"""


def _manifests(build, root, run):
    """{notebook: manifest} of the run in ``build``, of which the published tables must be."""
    paths = [build / run / f"{n}.json" for n in ("02_baseline", "03_attacks", "04_adversarial_training")]
    for path in paths:
        published = published_folders(root, build.name)[1] / "runs" / run / path.name
        if not path.is_file():
            raise PublishError(f"{path} is missing; run that profile first")
        if not published.is_file() or published.read_bytes() != path.read_bytes():
            raise PublishError(f"the published tables are not of {path}; publish that profile's tables first")
    paths.append(build / "data/01_data.json")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _publish_one(build, root, run, training, manifests):
    """Publish one training's weights and card; returns what README says of it."""
    from fortify.data import Slices, to_tensor
    from fortify.models import load_model, predict
    from fortify.published import MODELS, model_card, publish_model
    from fortify.splits import read_split

    source, split = build / run / f"{training}.safetensors", run.rpartition("-s")[0]
    if not source.is_file():
        return "left out: its weights are not on the machine that published the tables"
    target = root / MODELS / build.name / run / source.name
    slices = Slices.load(build / "data/slices.npz")
    parts = read_split(build / "data/splits" / f"{run}.csv", slices, grouped=split == "grouped")
    test = slices.subset(parts["test"])
    images = to_tensor(test.images)
    stored = publish_model(source, target, images)
    if stored is None:
        return f"left out: a {load_model(source).arch} takes more than 4 MB"
    k = int((predict(load_model(target), images).argmax(1).numpy() == test.labels).sum())
    table = pd.read_csv(published_folders(root, build.name)[1] / f"table1_{split}.csv")
    card = model_card(target, stored=stored, manifests=manifests, table=table, clean=(k, len(test)))
    write_text(target.with_suffix(".md"), card)
    megabytes = target.stat().st_size / 1e6
    return f"{megabytes:.1f} MB, {stored}; [card]({build.name}/{run}/{training}.md)"


def update_pages(root: Path, profile: str) -> None:
    """Rewrite what is ``generated`` in README.md, docs/results.md, docs/claims.md and docs/recipe.md's aims.

    They are made of the published tables of ``profile``, and of its companions'.
    """
    figures, tables = published_folders(root, profile)
    relative = Path("..") / figures.relative_to(root)
    profiles = root / "notebooks" / "profiles"
    before, after = companions_beside(root)
    parts = _tables1(tables)
    title = read_profile(profiles / f"{profile}.yaml")[1]["title"]
    sentence = f"These are results of the `{profile}` profile ({title})."
    if profile != "paper":
        sentence += " **Not** the reference run (`make paper`), which has yet to be published here."
        if (published_folders(root, "paper")[1] / "table1_random.md").is_file():
            there = "is in [paper/tables](../paper/tables)"
            sentence = sentence.replace("has yet to be published here", there)
    sentence += (
        " The intervals cover the choice of test slices, not the chance in training. The standard "
        "deviation over seeds covers training and split together (grouped: the fold)."
    )
    parts += [sentence + "\n", _audited(tables)]
    parts.append(
        f"![Accuracy against the attack budget, both splits]({relative / 'robustness_curves.png'})\n"
    )
    beside = {
        name: [*_tables1(published_folders(root, name)[1], f", {title} (`{name}` profile)")]
        + [_audited(published_folders(root, name)[1])]
        for name, title in (before | after).items()
    }
    parts = [*chain(*(beside[name] for name in before)), *parts, *chain(*(beside[name] for name in after))]
    results, claims, readme = root / "docs/results.md", root / "docs/claims.md", root / "README.md"
    published = {name: published_folders(root, name)[1] for name in (*before, profile, *after)}
    sections = {results: {"results": "\n".join(parts)}}
    pictures = [front.strip(relative / path.name) for path in protocol_strips(figures)[:1]]
    ledger = (tables / "claims.md").read_text(encoding="utf-8")
    sections[claims] = {"claims": "\n".join([*pictures, ledger])}
    sections[root / "docs/recipe.md"] = {"aims": aims(published)}
    shown = [
        front.Network.of_profile(read_profile(profiles / f"{name}.yaml")[0], published_folders(root, name)[1])
        for name in (*before, profile)
    ]
    pictures = [*figures.glob("hero.png"), *protocol_strips(figures)]
    sections[readme] = front.sections(shown, figures.relative_to(root), pictures, root / "benchmarks")
    sections[readme]["awaiting"] = awaiting_line(root)
    texts = {path: path.read_text(encoding="utf-8") for path in sections}
    for path, own in sections.items():
        for name, content in own.items():
            texts[path] = _replaced(texts[path], name, content, path.name)
    for path, text in texts.items():  # only once all of them have passed
        write_text(path, text)


def companions_beside(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Published companion profiles, {name: title}: those whose Table 1 goes first, and the others."""
    profiles = root / "notebooks" / "profiles"
    before, after = {}, {}
    for name, title in companion_profiles(profiles).items():
        tables = published_folders(root, name)[1]
        if _tables1(tables):
            first = read_profile(profiles / f"{name}.yaml")[1]["first"]
            (before if first and _fewest_seeds(tables) >= _ENOUGH else after)[name] = title
    return before, after


def protocol_strips(figures: Path) -> list[Path]:
    """Published pictures of the published protocol, the random split's first."""
    return sorted(figures.glob("published_protocol_*.png"), key=lambda p: "random" not in p.name)


def _fewest_seeds(tables):
    """Of the published Table 1 of each split; 0 where one of the splits has none."""
    paths = [tables / f"table1_{split}.csv" for split in _SPLITS]
    return min(int(pd.read_csv(path).seeds.min()) if path.is_file() else 0 for path in paths)


def _audited(tables):
    """What notebook 8 says against Table 1: the checks that failed. Markdown."""
    from fortify.audit.checks import MEANINGS  # here: it loads torch

    audits = {split: sorted(tables.glob(f"audit_{split}-s*.csv"), key=_seed_of) for split in _SPLITS}
    audited, failed = [split for split, paths in audits.items() if paths], []
    must_hold = {check.name: check.must_hold for check in MEANINGS.values()}
    for split, paths in audits.items():
        for path in paths:
            where = f"{split} split, seed {path.stem.partition('-s')[2]}"
            for row in pd.read_csv(path).query("verdict == 'fail'").itertuples():
                found = row.measured if pd.isna(row.note) else row.note
                said = f"*{row.check}* ({where}, {row.model} model: {found}). {must_hold.get(row.check, '')}"
                failed.append(said.strip())
    if not audited:
        return "Notebook 08, the audit, has not been run.\n"
    only = "" if len(audited) == len(_SPLITS) else f", {audited[0]} split alone"
    if not failed:
        return f"Checks of the audit (notebook 08{only}) that fail: none.\n"
    said = f"Checks of the audit (notebook 08{only}) that fail: {' '.join(failed)}"
    return f"{said} Where a check of an attack's strength fails, the true accuracy may be lower.\n"


def _seed_of(path):
    return int(path.stem.rpartition("-s")[2])


def _tables1(folder, suffix=""):
    """Table 1 of each split that ``folder`` holds, and under it its classes, where there. Markdown."""
    titles = {f"table1_{split}{end}": (split, title) for split in _SPLITS for end, title in PARTS1.items()}
    return [
        f"**{title}, {split} split{suffix}**\n\n{path.read_text(encoding='utf-8')}"
        for name, (split, title) in titles.items()
        if (path := folder / f"{name}.md").exists()
    ]


def replace_section(path: Path, section: str, content: str) -> None:
    """Replace what lies between the two ``generated`` markers of ``section`` in a text file, atomically."""
    write_text(path, _replaced(path.read_text(encoding="utf-8"), section, content, path.name))


def _replaced(text, section, content, name):
    """``text`` with what lies between the two markers of ``section`` replaced."""
    start, end = f"<!-- generated: {section} -->", f"<!-- /generated: {section} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise PublishError(f"{name} must hold {start} and {end} once each")
    before, rest = text.split(start)
    return f"{before}{start}\n{content}{end}{rest.split(end)[1]}"


def pdf(profile: str, target: str | Path | None = None) -> Path:
    """Set paper/paper.typ from the published tables and figures of ``profile``; returns the PDF's path.

    The same tables give the same bytes. Raises PublishError with what typst says, as where a table lacks a
    row or a sentence is no longer true, and where the profile is no longer what the tables were made with.
    """
    import typst

    root = find_root()
    target = Path(target or root / "paper" / "paper.pdf")
    parameters = published_parameters(root, profile)
    measured = [p.stem.removeprefix("speed_") for p in sorted((root / "benchmarks").glob("speed_*.csv"))]
    inputs = {"profile": profile, "parameters": json.dumps(parameters), "devices": json.dumps(measured)}
    companions = companion_profiles(root / "notebooks" / "profiles")
    companions = [name for name in companions if published_folders(root, name)[1].is_dir()]
    beside = {name: published_parameters(root, name) for name in companions}
    inputs["beside"] = json.dumps(beside)  # the profiles whose tables may stand beside this one's
    tables = root / "paper" / "tables"
    files = sorted(p.relative_to(tables).as_posix() for p in tables.rglob("*.csv") if "runs" not in p.parts)
    inputs["published"] = json.dumps(files)
    inputs["provenance"] = json.dumps(_provenance(published_folders(root, profile)[1]))
    options = {"root": root, "sys_inputs": inputs, "ignore_system_fonts": True, "timestamp": 0}
    try:
        made = typst.compile(root / "paper" / "paper.typ", format="pdf", **options)
    except RuntimeError as error:
        raise PublishError(f"paper/paper.typ: {error}") from error
    with atomic_path(target) as temporary:
        temporary.write_bytes(made)
    return target


def _provenance(tables):
    """Commits, versions and devices of a profile's published runs, and their hours where these are known."""
    manifests = [
        json.loads(p.read_text(encoding="utf-8")) for p in sorted(tables.glob("runs/*-s*/[0-9]*.json"))
    ]
    found = {"commits": sorted({m["code"]["commit"] for m in manifests if m["code"]["commit"]})}
    found["devices"] = sorted({m["device"] for m in manifests})
    found["versions"] = {}
    for name in ("python", "torch", "torchvision", "foolbox"):
        known = sorted({m["versions"][name] for m in manifests if name in m.get("versions", {})})
        found["versions"][name] = " and ".join(known)
    if (tables / "run_times.csv").exists():
        times, compared = pd.read_csv(tables / "run_times.csv"), tables / "comparison_seconds.csv"
        if compared.is_file():  # its trainings are kept, and a later run of the notebook reads them
            times = times[times.notebook.ne("10_robust_optimisation")]
            found["hours"] = pd.read_csv(compared).seconds.sum() / 3600
        found["hours"] = found.get("hours", 0) + times.seconds.sum() / 3600
    return found


def published_parameters(root: Path, profile: str) -> dict[str, dict[str, Any]]:
    """{notebook: parameters} of a profile as its published runs had them; seeds are those that are there.

    Each notebook's are its own and those that it takes from others. Raises PublishError where the manifest of
    a run (of notebooks 02 to 04, 06 and 08) has another value: the tables are of it, not of today's profile.
    A parameter that is newer than a run is not in its manifest.
    """
    notebooks = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    parameters = load_profile(root / "notebooks" / "profiles" / f"{profile}.yaml", notebooks)
    parameters = with_inherited(parameters, notebooks)
    seeds, splits = {}, {}  # of each notebook
    for path in sorted((published_folders(root, profile)[1] / "runs").glob("*-s*/[0-9]*.json")):
        ran, today = json.loads(path.read_text(encoding="utf-8"))["parameters"], parameters[path.stem]
        # The run's own, and not the profile's.
        for name in sorted(ran.keys() & today.keys() - {"run", "split", "seed", "device"}):
            if ran[name] != today[name]:
                raise PublishError(
                    f"{path.relative_to(root)} is of {name} = {ran[name]!r}, the {profile} profile has "
                    f"{today[name]!r}; run it again and publish, or restore the profile"
                )
        seeds.setdefault(path.stem, set()).add(ran["seed"])
        splits.setdefault(path.stem, set()).add(ran["split"])
    if seeds:
        parameters["01_data"]["seeds"] = sorted(seeds["02_baseline"])
        parameters["09_claims"]["published_seeds"] = sorted(seeds.get("06_published_protocol", ()))
        audited = splits.get("08_robustness_audit", ())
        parameters["09_claims"]["audit_splits"] = [split for split in _SPLITS if split in audited]
    return parameters


def main(arguments: Sequence[str]) -> int:
    """``commit FOLDER``, ``weights FOLDER`` or ``pdf [PROFILE]``; returns the exit code."""
    if [*arguments[:1], len(arguments)] not in (["commit", 2], ["weights", 2], ["pdf", 1], ["pdf", 2]):
        print(__doc__, file=sys.stderr)
        return 2
    root = find_root()
    try:
        if arguments[0] == "pdf":
            print(pdf(*arguments[1:] or [shown_profile(root)]).relative_to(root))
        elif arguments[0] == "weights":
            print(*publish_weights(arguments[1]), sep="\n")
        else:
            for path in commit(arguments[1]):
                print(path.relative_to(root))
    except (PublishError, ProfileError, FileNotFoundError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
