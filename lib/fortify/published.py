"""Trained weights that come with the paper, in ``paper/models``: load them, or write them with their cards.

A name is ``<profile>/<split>-s<seed>/<training>``, the path below that folder without ``.safetensors``.
``SHA256SUMS`` there lists the files as ``sha256sum`` does. ``make publish`` writes all of it.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fortify.data import IQ_OTH_NCCD
from fortify.files import find_root, read_safetensors, write_safetensors
from fortify.models import load_model, predict

if TYPE_CHECKING:
    import pandas as pd

MODELS = Path("paper", "models")  # in the checkout
MAX_BYTES = 4_000_000  # what a file of weights may take in git

_NOT_SHOWN = (
    "run",
    "split",
    "seed",
    "device",
)  # parameters that the card states elsewhere, or of the machine
_ATTACKS = {"clean": "none", "pgd": "PGD", "fgsm": "FGSM", "cw": "CW", "combined": "all three, pooled"}


def load_published(
    name: str, *, of_run: str | None = None, device: str | torch.device = "cpu"
) -> nn.Sequential:
    """The published model ``name``, such as ``"laptop/random-s0/adversarial"``, in eval mode on ``device``.

    It takes (B, 1, H, W) float in [0, 1], at the size that its card beside the file says, and returns logits
    (B, classes); ``.info["class_names"]`` names them. Weights are float32, whatever they are stored in.
    ``of_run``, such as ``"random-s0"``, is the split and seed that it is to be tested on.
    Raises ValueError for a name that is not published, a model of another split or seed than ``of_run``,
    whose training slices may be among the test slices, and a file that is not the one in ``SHA256SUMS``;
    FileNotFoundError outside a checkout (the weights are not in the installed package) and where nothing has
    been published.
    """
    folder = _checkout() / MODELS
    known = published_sha256(folder)
    if not known:
        raise FileNotFoundError(
            f"no weights have been published in {folder} yet. Make them: `make laptop`, then `make publish`"
        )
    if name not in known:
        raise ValueError(f"no published model is called {name!r}; these are: {', '.join(sorted(known))}")
    if of_run is not None and name.split("/")[1] != of_run:
        raise ValueError(
            f"{name} was trained on another split or seed than {of_run}: it may have seen these test slices"
        )
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: `git checkout {MODELS.as_posix()}` brings it back")
    if sha256_of(path) != known[name]:
        raise ValueError(
            f"{path} is not the file that was published (SHA256SUMS): `git checkout {MODELS.as_posix()}`"
        )
    return load_model(path, device=device)


def published_sha256(folder: str | Path) -> dict[str, str]:
    """{name: SHA-256 in hex} of ``SHA256SUMS`` in ``folder``; {} where there is none."""
    path = Path(folder) / "SHA256SUMS"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ()
    pairs = (line.split(maxsplit=1) for line in lines if line.strip())
    return {name.lstrip("*").removesuffix(".safetensors"): sha256 for sha256, name in pairs}


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def publish_model(
    source: str | Path, target: str | Path, images: Tensor, *, max_bytes: int = MAX_BYTES
) -> str | None:
    """Write the model that ``save_model`` wrote to ``source`` to ``target``, in float16 where that is safe.

    ``images`` (N, C, H, W), float in [0, 1], are test images. Weights are stored in float16 if all stay
    finite and every prediction stays the same, else as they are. Returns what they are stored in, "float16"
    or "float32"; None, and writes nothing, where they take more than ``max_bytes``. The same model and images
    are the same bytes. Raises ValueError for no images, or a file that holds no model.
    """
    if not len(images):
        raise ValueError("no images were given: nothing says whether float16 predicts the same")
    tensors, metadata = read_safetensors(source)
    model = load_model(source)
    half = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(half)
    finite = all(v.isfinite().all() for v in half.values())
    same = finite and torch.equal(predict(model, images).argmax(1), predict(rounded, images).argmax(1))
    stored = half if same else tensors
    if sum(tensor.nbytes for tensor in stored.values()) > max_bytes:
        return None
    write_safetensors(target, stored, metadata)
    return "float16" if same else "float32"


def model_card(
    path: str | Path,
    *,
    stored: str,
    manifests: Mapping[str, Mapping[str, Any]],
    table: "pd.DataFrame",
    clean: tuple[int, int],
) -> str:
    """The card of the published model at ``path``, ``.../<profile>/<split>-s<seed>/<training>.safetensors``.

    ``stored`` is what :func:`publish_model` returned. ``manifests`` are those of the run, by notebook:
    ``01_data``, ``02_baseline``, ``03_attacks`` and, of another training than the normal one,
    ``04_adversarial_training``. ``table`` is Table 1 of the split as CSV. ``clean`` is (k, n): of n test
    slices of its own run, the file classifies k correctly, unattacked. Markdown.
    Raises ValueError where the table has no row of this training.
    """
    path = Path(path)
    profile, run, training = path.parts[-3], path.parts[-2], path.stem
    split, _, seed = run.rpartition("-s")
    model, (k, n) = load_model(path), clean
    data, attacks = (manifests[notebook]["parameters"] for notebook in ("01_data", "03_attacks"))
    baseline = manifests["02_baseline"]
    last = baseline if training == "normal" else manifests["04_adversarial_training"]
    rows = table[table.model == training]
    if rows.empty:
        raise ValueError(f"Table 1 has no row of {training} training: {path} is not of its run")
    size, classes = data["size"], model.info.get("class_names", [])
    shown = "whole slices" if data.get("crop", "none") == "none" else f"slices cropped to the {data['crop']}"
    seen = (
        "**These weights have seen near-copies of their test slices**, which the random split leaves in "
        "training: the accuracy below is not that on unseen patients."
        if split == "random"
        else "Near-duplicates are kept on one side of the split. Their groups stand in for patients, whom "
        "the dataset does not identify."
    )
    name = f"{profile}/{run}/{training}"
    parts = [
        f"# {name}",
        f"A {model.arch} for lung-CT slices ({', '.join(classes)}): {training} training, {split} split, seed "
        f"{seed}, `{profile}` profile. `{path.name}` takes {path.stat().st_size / 1e6:.1f} MB, in {stored}; "
        f"SHA-256 `{sha256_of(path)}`.",
        f'```python\nfrom fortify.published import load_published\n\nmodel = load_published("{name}")\n```',
        f"It takes grey images (B, {model.channels}, {size}, {size}), float in [0, 1], {shown}, normalises "
        f"them itself and returns logits (B, {model.num_classes}).",
        "## What it must not be used for",
        "It is **not a medical device**: not for diagnosis, triage or screening. It was trained on slices of "
        "about 110 cases from two hospitals and tested on no others. It is for research on attacks and on "
        "their evaluation.",
        seen,
        "## Data",
        f"{IQ_OTH_NCCD.title} lung cancer dataset, {IQ_OTH_NCCD.licence}, "
        f"[doi:{IQ_OTH_NCCD.doi}](https://doi.org/{IQ_OTH_NCCD.doi}), resized to {size} px; `data_sha256` "
        f"{baseline['data_sha256']}.",
        "## Accuracy",
        f"This file classifies {k} of the {n} clean test slices of its own run correctly.",
        f"Table 1 pools this training's {rows.seeds.max()} seeds, each with its own split; this file is seed "
        f"{seed}. FGSM and PGD: Linf budget {attacks['eps_255']:g}/255. CW: L2 budget {attacks['cw_l2']:g}. "
        "Attacks are crafted on the model under test.",
        _accuracy(rows),
        "## Recipe",
        f"Trained on {last['device']} with torch {last['versions']['torch']}, finished {last['finished']}, "
        f"commit {last['code']['commit']}.",
        _parameters("02_baseline", baseline),
    ]
    if last is not baseline:
        parts.append(_parameters("04_adversarial_training", last))
    return "\n\n".join(parts) + "\n"


def _accuracy(rows):
    lines = ["| attack | correct | accuracy (%) | 95 % interval, by groups |", "| --- | ---: | ---: | ---: |"]
    for row in rows.itertuples():
        interval = f"{row.group_low_percent:.1f}–{row.group_high_percent:.1f}"
        attack = _ATTACKS.get(row.attack, row.attack)
        lines.append(f"| {attack} | {row.k}/{row.n} | {row.accuracy_percent:.1f} | {interval} |")
    return "\n".join(lines)


def _parameters(notebook, manifest):
    own = {name: value for name, value in manifest["parameters"].items() if name not in _NOT_SHOWN}
    lines = [f"| parameter of `{notebook}` | value |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | `{json.dumps(value)}` |" for name, value in own.items())])


def _checkout():
    """The checkout of the working directory, or else the one that this module is imported from."""
    for start in (None, Path(__file__).parent):
        try:
            return find_root(start)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(
        f"the published weights are in the repository, in {MODELS.as_posix()}, not in the installed "
        "package. Run from a checkout, or set FORTIFY_ROOT to its folder."
    )
