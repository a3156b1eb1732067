"""How long does Table 1's whole evaluation take, against the libraries a user would pick instead?

    python benchmarks/evaluation.py               both models of the laptop profile's seed 0, on either split

Clean accuracy, PGD and FGSM over the profile's budgets, and CW, on the models that `make laptop SEEDS=0` left
in build/laptop and on a part of their test slices. "fortify" is what notebooks 3 and 4 call, with no images
to keep: it attacks nothing that is lost already. "fortify, every image" crafts each attack on each image, as
they did before. The others do what their documentation shows: each attack at each budget on every image, and
a count. Steps and step sizes are the same. torchattacks' CW, which searches for no constant, is called for as
many constants as the others' search tries. Float32, every library once a round, the order turning. Read the
ratio. Rows are kept as they are measured, so a run that was cut off goes on; --again measures all anew.

Writes benchmarks/evaluation_cpu.csv and its section of docs/speed.md. The other libraries come as
benchmarks/speed.py says.
"""

import contextlib
import functools
import importlib.metadata
import json
import sys
import warnings

import numpy as np
import pandas as pd
import results
import torch
from speed import LIBRARIES, still_read, timed

from fortify.attacks import attacks_over, craft, prepared
from fortify.data import Slices, to_tensor
from fortify.files import find_root, write_csv
from fortify.fused import spread
from fortify.models import load_model, predict
from fortify.runtime import describe_device
from fortify.scoring import evaluate
from fortify.splits import read_split

SHAPES = {"cpu": "laptop"}  # device: profile
OURS, BEFORE = "fortify", "fortify, every image"
OTHERS = ("foolbox", "torchattacks", "adversarial-robustness-toolbox")
SHORT = {"adversarial-robustness-toolbox": "ART"}
SPLITS, MODELS = ("random", "grouped"), ("normal", "adversarial")


def attacks_of(parameters):
    """Notebook 3's attacks, from its manifest's parameters."""
    p = parameters
    settings = ("binary_search_steps", "steps", "stepsize", "initial_const")
    return attacks_over(
        sorted({*p["eps_grid_255"], p["eps_255"]}),
        pgd={"steps": p["pgd_steps"], "restarts": p["pgd_restarts"]},
        cw={name: p[f"cw_{name}"] for name in settings},
    )


def fortify_evaluation(model, x, y, grid):
    rows, _ = evaluate(model, x, y, grid)
    rows = rows[rows.attack.ne("clean")]
    return [
        int((~part.success).sum())
        for _, part in rows.groupby(["attack", "eps_255"], dropna=False, sort=False)
    ]


def every_image(model, x, y, grid):
    predict(model, x)
    fused = prepared(model, x, y)
    return [int((~craft(model, x, y, attack, fused=fused).success).sum()) for attack in grid]


def library_evaluation(attacks):
    """A library's own way, from its attacks as benchmarks/speed.py makes them."""

    def run(model, x, y, grid):
        with torch.no_grad():
            model(x)
        counts = []
        for attack in grid:
            if attack.minimum_norm:
                searches = attack.binary_search_steps
                made = attacks["cw"](
                    attack.steps, searches, stepsize=attack.stepsize, initial_const=attack.initial_const
                )
            elif attack.name == "pgd":
                made = attacks["pgd"](attack.steps, eps=attack.eps_255 / 255)
            else:
                made = attacks["fgsm"](eps=attack.eps_255 / 255)
            found = made(x, y)
            several = found if isinstance(found, list) else [found]
            counts.append(min(still_read(model, one, y) for one in several))
        return counts

    return run


def ways(model, x):
    """{library: its evaluation}; what is not installed is left out and named."""
    found = {OURS: fortify_evaluation, BEFORE: every_image}
    for name in OTHERS:
        try:
            found[name] = library_evaluation(LIBRARIES[name](model, x))
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return found


def measure(root, profile, rounds, images, path, libraries=(OURS, BEFORE, *OTHERS)):
    """One row a round, split, model and library; those that ``path`` holds are not measured again."""
    build = root / "build" / profile
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    slices = Slices.load(build / "data/slices.npz")
    for number in range(rounds):
        for split in SPLITS:
            run = build / f"{split}-s0"
            grid = attacks_of(json.loads((run / "03_attacks.json").read_text(encoding="utf-8"))["parameters"])
            parts = read_split(build / f"data/splits/{split}-s0.csv", slices, grouped=split == "grouped")
            test = np.asarray(parts["test"])
            test = test[spread(len(test), images)]
            x, y = to_tensor(slices.images[test]), torch.from_numpy(slices.labels[test]).long()
            for model_name in MODELS:
                model = load_model(run / f"{model_name}.safetensors")
                wrong = int((predict(model, x).argmax(1) != y).sum())
                found = {name: way for name, way in ways(model, x).items() if name in libraries}
                names = list(found)
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    key = {"round": number, "split": split, "model": model_name, "library": name}
                    if any(all(row[k] == v for k, v in key.items()) for row in rows):
                        continue
                    found[name](model, x[:2], y[:2], grid[:1])  # what a library does once
                    seconds, counts = timed(functools.partial(found[name], model, x, y, grid), "cpu")
                    at = [i for i, a in enumerate(grid) if a.name == "pgd" and a.eps_255 == 4]
                    row = key | {"seconds": seconds, "images": len(x), "misclassified": wrong}
                    row |= {"correct_pgd_4": counts[at[0]] if at else np.nan}
                    row |= {"version": importlib.metadata.version(name.split(",")[0])}
                    row |= {"device": describe_device(torch.device("cpu")), "torch": torch.__version__}
                    rows.append(row)
                    print(row, file=sys.stderr, flush=True)
                    write_csv(path, pd.DataFrame(rows))
    return pd.DataFrame(rows)


def section(table, device):
    """The page's text: seconds of both models together and the ratio within a round, by split and library."""
    both = table.groupby(["split", "round", "library"], sort=False).seconds
    whole = both.sum().where(both.size().eq(len(MODELS))).unstack()
    names = [name for name in (OURS, BEFORE, *OTHERS) if name in whole and whole[name].notna().any()]
    partly = [SHORT.get(name, name) for name in OTHERS if name in whole and name not in names]
    lines = ["| split | " + " | ".join(SHORT.get(n, n) for n in names) + " |"]
    lines.append("| --- |" + " ---: |" * len(names))
    for split in SPLITS:
        own, cells = whole.loc[split], []
        for name in names:
            ratio = own[name] / own[OURS]
            shown = f"{own[name].median():.0f} s" + f" ({ratio.median():.1f}×)" * (name != OURS)
            cells.append(shown if own[name].notna().any() else "")
        lines.append(f"| {split} | " + " | ".join(cells) + " |")
    about = table.iloc[0]
    lost = table.drop_duplicates(["split", "model"]).set_index(["split", "model"]).misclassified
    lost = "; ".join(f"{s}: {lost[s, MODELS[0]]} and {lost[s, MODELS[1]]}" for s in SPLITS)
    rounds = table["round"].nunique()
    text = (
        f"Seconds for both models' evaluation over all budgets, in brackets how many times `fortify`'s. "
        f"{about['images']} test slices of a split, {SHAPES[device]} profile, float32, "
        f"{rounds} round{'s' if rounds != 1 else ''}, {about.device}. "
        f"Misclassified when clean by the normal and the adversarial model, {lost}: those need no attack."
        f"{''.join(f' {name} has not been measured to its end yet.' for name in partly)}\n"
    )
    return ["\n".join(lines) + "\n", text]


def main():
    parser = results.parser(__doc__, SHAPES, rounds=1)
    parser.add_argument("--images", type=int, default=32, help="test slices of each split")
    parser.add_argument("--again", action="store_true", help="measure what is there already again")
    parser.add_argument(
        "--libraries", nargs="+", choices=(OURS, BEFORE, *OTHERS), default=(OURS, BEFORE, *OTHERS)
    )
    arguments = parser.parse_args()
    root = find_root()
    sys.path.append(str(root / "build" / "benchmark-packages"))
    path = results.path(root, "evaluation", arguments.device)
    if arguments.again:
        path.unlink(missing_ok=True)
    warnings.simplefilter("ignore", UserWarning)
    with contextlib.redirect_stdout(sys.stderr):
        table = measure(
            root, SHAPES[arguments.device], arguments.rounds, arguments.images, path, arguments.libraries
        )
    results.publish(root, "evaluation", arguments.device, table)


if __name__ == "__main__":
    main()
