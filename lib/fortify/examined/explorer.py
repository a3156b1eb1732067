"""What the attack explorer shows: a few test slices, attacked, and what each network says of them.

python -m fortify.examined.explorer build/laptop random-s0 grouped-s0      build/laptop/explorer

The page, ``docs/explorer``, opens without a server and computes no network. It makes every image anew from
what is stored here: a slice, and PGD's change, rounded to nothing or the whole budget, up or down; of the
published "PGD" the sign of its step in each channel. Every probability is of the image as it is stored.
"""

import base64
import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from fortify.attacks import PGD, craft
from fortify.data import IQ_OTH_NCCD, Slices, to_tensor
from fortify.evaluation import read_rows
from fortify.examined.protocol import PublishedAttacks, clamp, published_fgsm, to_intensities
from fortify.files import find_root, write_text
from fortify.models import load_model, predict
from fortify.runs import Run, open_run
from fortify.runtime import device_of, float32_convolutions, frozen, pick_device
from fortify.splits import read_split

PAGE = ("index.html", "explorer.js", "explorer.css")  # in docs/explorer; data.js is written beside them
LIMIT = 1_990_000  # bytes of data.js; the page itself has ten thousand
_COLUMNS = 16  # tiles in a row of a sprite
_TRAININGS = ("normal", "adversarial", "published")
_ROWS = [f"{name}.csv" for name in (*(f"{t}_predictions" for t in _TRAININGS), "published_protocol")]
_CREDIT = (
    "Hamdalla Alyasriy and Muayed AL-Huseiny, The IQ-OTH/NCCD lung cancer dataset, Mendeley Data, V4 (2023), "
    f"doi:{IQ_OTH_NCCD.doi}, {IQ_OTH_NCCD.licence}; resized, and attacked where the page says so."
)


def chosen(slices: Slices, test: np.ndarray, *, each: int) -> list[int]:
    """Positions in ``test`` of the slices that are shown, by a rule that looks at no image.

    Of each class the first test slice of each of its first ``each`` groups, in the slices' order.
    """
    found = []
    for label in range(len(slices.class_names)):
        own = np.flatnonzero(slices.labels[test] == label)
        _, first = np.unique(slices.groups[test[own]], return_index=True)
        found += [int(at) for at in own[np.sort(first)[:each]]]
    return found


def stored_change(x: Tensor, attacked: Tensor, eps_255: float) -> Tensor:
    """-1, 0 or 1 (N, 1, H, W): what is nearest to the change, in budgets of ``eps_255`` grey levels."""
    return ((attacked - x) * 255 / eps_255).round().clamp(-1, 1)


def with_change(x: Tensor, change: Tensor, eps_255: float) -> Tensor:
    """``x`` (N, 1, H, W) in [0, 1] with a :func:`stored_change` of it, in [0, 1] and within the budget."""
    return (x + change * eps_255 / 255).clamp(0, 1)


def published_signs(model: nn.Sequential, x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """(N, 3, H, W) of -1, 0 and 1: what the published "PGD" adds before its clamp, in steps of ``alpha``.

    It is 0 where the clamp leaves nothing of the step: clamp(z + alpha * signs) is the attacked image.
    """
    with frozen(model), float32_convolutions(device_of(model)):
        z = model[0](x)
        return (published_fgsm(model, z, y, alpha) - clamp(z)).sign()


def seen_by(
    model: nn.Sequential, images: Tensor, labels: Tensor, at: Sequence[int], *, testing: dict[str, Any]
) -> dict[str, list[tuple]]:
    """What one network says of the slices at the positions ``at`` of all test ``images`` (N, 1, H, W).

    ``testing`` are notebook 3's parameters and ``seed``; PGD starts as it does there, where all test slices
    are attacked. Returns {attack: [(changes, probabilities, sizes), ...]}, one for each budget, 0 first: the
    changes as bytes (M, H, W), or None where nothing is stored; probabilities (M, classes); the largest
    change of a pixel in grey levels (M,).
    """
    device, alpha = device_of(model), PublishedAttacks().pgd_alpha
    at = list(at)
    x, y = images[at].to(device), labels[at].to(device)
    found = {"pgd": [(None, predict(model, x), torch.zeros(len(at)))]}
    for eps_255 in budgets(testing):
        attack = PGD(eps_255, steps=testing["pgd_steps"], restarts=testing["pgd_restarts"])
        made = craft(model, images, labels, attack, subset=at, seed=testing["seed"]).images.to(device)
        change = stored_change(x, made, eps_255)
        image = with_change(x, change, eps_255)
        size = (image - x).abs().amax((1, 2, 3)).cpu() * 255
        found["pgd"].append((_bytes(change[:, 0] + 1), predict(model, image), size))
    signs = published_signs(model, x, y, alpha)
    powers = 3 ** torch.arange(3, device=device).view(1, 3, 1, 1)
    for name, step in (("published_pgd", signs), ("clamp", torch.zeros_like(signs))):
        with frozen(model), float32_convolutions(device):
            z = clamp(model[0](x) + alpha * step)
            probabilities = model[1:](z).softmax(1).cpu()
            size = (to_intensities(model, z) - x).abs().amax((1, 2, 3)).cpu() * 255
        codes = _bytes(((step + 1) * powers).sum(1)) if name == "published_pgd" else None
        found[name] = [(codes, probabilities, size)]
    return found


def budgets(testing: dict) -> list[float]:
    """Notebook 3's budgets in grey levels, from the smallest up."""
    return sorted({*testing["eps_grid_255"], testing["eps_255"]})


def shares(rows: pd.DataFrame, training: str, budgets_255: Sequence[float]) -> dict[str, list]:
    """{attack: [[k, n] or None, ...]} of all test slices: how many the network classifies correctly.

    ``rows`` are those of notebooks 3, 4 and 6; None where they hold no such attack.
    """
    own = rows[rows.model.eq(training) & rows.protocol.eq("adaptive")]

    def counted(attack, eps_255=None):
        part = own[own.attack.eq(attack) & (True if eps_255 is None else own.eps_255.eq(eps_255))]
        return [int((~part.success).sum()), len(part)] if len(part) else None

    pgd = [counted("clean"), *(counted("pgd", eps) for eps in budgets_255)]
    return {"pgd": pgd, "published_pgd": [counted("published_pgd")], "clamp": [counted("clamp")]}


def explored(runs: Sequence[Run], *, device: str = "auto") -> dict[str, Any]:
    """What the page is given, of finished ``runs`` of one profile: plain values, images as data: addresses.

    A network whose weights are not there is left out, as the published training on most seeds.
    """
    device, listed, totals = pick_device(device), [], {}
    slices = Slices.load(runs[0].read("data/slices.npz"))
    tiles, changes, normalise = [], [], None
    for run in runs:
        testing = run.parameters("03_attacks")
        split, seed = testing["split"], testing["seed"]
        parts = read_split(run.read(f"data/splits/{split}-s{seed}.csv"), slices, grouped=split == "grouped")
        test = np.asarray(parts["test"])
        # As many as fit: an image of 224 px takes four times the room of one of 112 px.
        at = chosen(slices, test, each=2 if slices.images.shape[1] <= 128 else 1)
        images, labels = to_tensor(slices.images[test]), torch.from_numpy(slices.labels[test])
        own = [
            {"split": split, "index": int(test[i]), "name": slices.names[test[i]], "label": int(labels[i])}
            | {"tile": len(tiles) + j, "seen": {}}
            for j, i in enumerate(at)
        ]
        tiles += list(slices.images[test[at]])
        rows = [read_rows(run.source / name) for name in _ROWS if (run.source / name).is_file()]
        for training in _TRAININGS:
            if not (run.source / f"{training}.safetensors").is_file():
                continue
            model = load_model(run.read(f"{training}.safetensors"), device=device)
            normalise = {k: getattr(model[0], k).flatten().tolist() for k in ("mean", "std")}
            totals.setdefault(split, {})[training] = shares(pd.concat(rows), training, budgets(testing))
            for attack, of_budgets in seen_by(model, images, labels, at, testing=testing).items():
                for change, probabilities, sizes in of_budgets:
                    kept = tiles if attack == "published_pgd" else changes  # of many values; of 3
                    for j, slice_ in enumerate(own):
                        entry = {"p": _rounded(probabilities[j]), "linf_255": _rounded(sizes[j])}
                        if change is not None:
                            entry["tile"] = len(kept)
                            kept.append(change[j])
                        slice_["seen"].setdefault(training, {}).setdefault(attack, []).append(entry)
        listed += own
    known = slices.source.startswith(IQ_OTH_NCCD.title)
    return {
        "profile": runs[0].profile,
        "source": slices.source,
        "credit": _CREDIT if known else "",
        "classes": list(slices.class_names),
        "size": slices.images.shape[1],
        "columns": _COLUMNS,
        "budgets_255": [0, *budgets(testing)],
        "eps_255": testing["eps_255"],
        "pgd_steps": testing["pgd_steps"],
        "alpha": PublishedAttacks().pgd_alpha,
        **normalise,
        "totals": totals,
        "slices": listed,
        "tiles": _sprite(tiles),
        "changes": _sprite(changes),
    }


def write(folder: str | Path, data: dict[str, Any]) -> Path:
    """Write data.js, and the page beside it where the checkout has one; ValueError where it is too large."""
    text = "window.EXPLORER = " + json.dumps(data, separators=(",", ":")) + ";\n"
    if len(text) > LIMIT:
        raise ValueError(f"data.js would have {len(text):,} bytes, and the page may load {LIMIT:,}")
    target, page = Path(folder) / "data.js", find_root() / "docs" / "explorer"
    write_text(target, text)
    for name in PAGE:
        if (page / name).is_file():
            shutil.copy(page / name, target.parent)
    return target


def read(path: str | Path) -> dict[str, Any]:
    """What :func:`write` wrote."""
    text = Path(path).read_text(encoding="utf-8")
    return json.loads(text.removeprefix("window.EXPLORER = ").removesuffix(";\n"))


def _bytes(whole):
    return whole.to(torch.uint8).cpu().numpy()


def _rounded(values):
    return np.asarray(values, dtype=float).round(5).tolist()


def _sprite(tiles):
    """Tiles (H, W) of bytes, ``_COLUMNS`` in a row, as the data: address of a lossless picture."""
    side = tiles[0].shape[0]
    sheet = np.zeros((-(-len(tiles) // _COLUMNS) * side, _COLUMNS * side), dtype=np.uint8)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, _COLUMNS)
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = tile
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "WEBP", lossless=True, quality=100, method=6)  # a third less than PNG
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def main(arguments: Sequence[str]) -> int:
    """BUILD and the names of its runs; returns the exit code."""
    if len(arguments) < 2 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    build = Path(arguments[0])
    needs = ["data/slices.npz", "03_attacks.json", "normal_predictions.csv"]
    needs += ["normal.safetensors", "adversarial.safetensors"]
    try:
        runs = [open_run(str(build / name), needs=needs) for name in arguments[1:]]
        print(write(runs[0].source.parent / "explorer", explored(runs)))
    except (FileNotFoundError, ValueError) as error:
        print(f"explorer: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
