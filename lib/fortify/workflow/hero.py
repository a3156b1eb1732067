"""README's figure: a test slice and its near-duplicate, the clamp, a real attack, and accuracies by split.

python -m fortify.workflow.hero build/laptop random-s0    figures/hero.pdf and .png of that profile and run
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from fortify.data import Slices, to_tensor
from fortify.evaluation import interval_of, read_rows
from fortify.examined.figures import Picture, finding_figure
from fortify.examined.protocol import PublishedAttacks, panels
from fortify.figures import save
from fortify.models import load_model
from fortify.splits import THUMBNAIL, nearest_in_training, read_split, unit_thumbnails
from fortify.workflow import front


def hero(build: Path, run: str) -> Figure:
    """The figure of a finished profile ``build``, its slices of ``run``, a random split's."""
    slices = Slices.load(build / "data/slices.npz")
    parts = read_split(build / f"data/splits/{run}.csv", slices)
    test, train = np.asarray(parts["test"]), np.asarray(parts["train"])
    manifest = json.loads((build / run / "03_attacks.json").read_text(encoding="utf-8"))
    eps_255 = manifest["parameters"]["eps_255"]
    with np.load(build / run / "normal_attacked.npz") as file:
        attacked = file["pgd"]
    rows = read_rows(build / run / "normal_predictions.csv")
    protocol = pd.read_csv(build / run / "published_protocol.csv")
    right = {
        "clean": _right(rows[rows.attack.eq("clean")], test),
        "pgd": _right(rows[rows.attack.eq("pgd") & rows.eps_255.eq(eps_255)], test),
        "clamp": _right(protocol[protocol.model.eq("normal") & protocol.attack.eq("clamp")], test),
    }
    nearest, r = nearest_in_training(unit_thumbnails(slices.images, THUMBNAIL), test, train)
    at = shown_slice(r, **right)
    near = nearest[at]
    label = int(slices.labels[test[at]])
    images = to_tensor(slices.images[test[[at]]])
    made = panels(
        load_model(build / run / "normal.safetensors"),
        images,
        label,
        attacks=PublishedAttacks(),
        correct=torch.from_numpy(attacked[[at]]),
    )
    names = slices.class_names

    def answer(title, of, by):
        image, prediction, _ = made[of]
        share = f"{right[by].sum()} of {len(test)} correct"
        mark = "✓" if prediction == label else "✗"
        return Picture(title, image, f"{mark} {names[prediction]}\n{share}", wrong=prediction != label)

    twin = slices.images[near] / 255
    pictures = [
        answer("a test slice", "original", "clean"),
        Picture(f"its nearest training slice\n(r = {r[at]:.3f})", twin, f"{names[slices.labels[near]]}"),
        answer("the published clamp,\nno attack", "clamp alone", "clamp"),
        answer(f"a real attack:\nPGD at {eps_255:g}/255", "correct PGD", "pgd"),
    ]
    return finding_figure(pictures, standings(build / "tables", f"{eps_255:g}/255"))


def _right(rows, test):
    """Whether each test slice is classified correctly, in their order."""
    return ~rows.set_index("index").success.loc[test].to_numpy(dtype=bool)


def shown_slice(r: np.ndarray, *, clean: np.ndarray, clamp: np.ndarray, pgd: np.ndarray) -> int:
    """The test slice to show: the most ordinary of those that the clamp and PGD alone make wrong.

    That is: its nearest training slice is no exact copy, and as alike (``r``) as the median test slice's. The
    others are whether each test slice is classified correctly. Where no slice is all this, the first count.
    """
    copies = r > 0.9999
    order = np.lexsort((np.abs(r - np.median(r)), copies, pgd, clamp, ~clean))
    return int(order[0])


def standings(tables: Path, eps: str) -> pd.DataFrame:
    """Accuracies in percent with intervals, clean and attacked: both trainings and simple classifiers."""
    rows, shown = [], {"clean": "clean", "pgd": f"attacked: PGD {eps}"}
    for split in ("random", "grouped"):
        table = front.accuracies(tables, split)
        for training in ("normal", "adversarial") if table is not None else ():
            for attack, words in shown.items():
                row = table.loc[(training, attack)]
                shares = (100 * share for share in (row.accuracy, *interval_of(row)))
                rows.append((f"{training} training", words, split, *shares))
        for name, cells in front.simple_classifiers(tables, tables, split).items():
            for attack, kind in (("clean", "clean"), ("pgd", "attacked")):
                if cells[kind] is not None:
                    rows.append((front.SIMPLE[name][0], shown[attack], split, *cells[kind]))
    return pd.DataFrame(rows, columns=["classifier", "shown", "split", "accuracy", "low", "high"])


def main(arguments: Sequence[str]) -> int:
    """FOLDER of a finished profile and RUN; returns the exit code."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    build = Path(arguments[0])
    print(save(hero(build, arguments[1]), build / "figures", "hero"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
