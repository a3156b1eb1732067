r"""How far apart are two runs that differ in nothing, or only in how the machine adds up?

    python benchmarks/spread.py                   CPU: the laptop profile's adversarial training, four times
    python benchmarks/spread.py --device cuda     GPU: the reference run's

Trains the adversarial network of the random split and seed 0 several times, on the real slices, and attacks
each on its test set with PGD; then attacks the first one again. Every line is compared with the first.
Writes benchmarks/spread_<device>.csv and the section of docs/guarantees.md.
"""

import contextlib

import pandas as pd
import results
import torch
from ablation import STEPS, described, profiled, sides, trained

from fortify.attacks import PGD, craft
from fortify.data import to_tensor
from fortify.files import find_root
from fortify.models import predict

SHAPES = {"cpu": "laptop", "cuda": "paper"}  # device: profile


def compared(own, first, y):
    """What a run classifies correctly and how far it is from the first; each is (clean, pgd, weights)."""
    row = {"n": len(y)}
    for name, now, then in zip(("clean", "pgd"), own, first, strict=False):
        row |= {name: (now == y).sum().item(), f"{name}_changed": (now != then).sum().item()}
    return row | {"weights_apart": ((own[2] - first[2]).norm() / first[2].norm()).item()}


def measure(device, rounds, parameters, slices):
    """One row a run: what differed from the first, and what came of it."""
    rows, runs = [], []
    train_slices, val, test = sides(slices, "random", 0)
    x, y = to_tensor(test.images), torch.from_numpy(test.labels)

    def add(stage, differs, model, batch_size=64):
        found = craft(model, x, y, PGD(parameters["eps_255"], steps=STEPS), batch_size=batch_size)
        clean, pgd = (predict(model, images).argmax(1) for images in (x, found.images))
        floats = [w for w in model.state_dict().values() if w.is_floating_point()]
        runs.append((clean, pgd, torch.cat([w.detach().cpu().flatten().double() for w in floats])))
        rows.append({"stage": stage, "differs": differs} | compared(runs[-1], runs[0], y))
        print(rows[-1], flush=True)

    def train(differs):
        model, _ = trained(parameters, train_slices, val, 0, device)
        add("training", differs, model)
        return model

    kept = train("")
    for _ in range(1, rounds):
        train("nothing")
    add("attack", "nothing", kept)
    add("attack", "batches of 16, not 64", kept, batch_size=16)
    if device == "cpu":
        with one_thread():
            add("attack", "one thread", kept)
            train("one thread")
    else:
        add("attack", "on a CPU", kept.cpu())
    about = described(SHAPES[device], parameters, slices, device)
    return pd.DataFrame(rows).assign(**about, eps_255=parameters["eps_255"])


@contextlib.contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def section(table, device):
    """The page's text on one device, from the table that :func:`measure` makes; a list of paragraphs."""
    first = table.iloc[0]
    lines = ["| done again | what differs | weights apart | clean | changed | PGD | changed |"]
    lines.append("| --- | --- |" + " ---: |" * 5)
    for row in table.iloc[1:].itertuples():
        apart = "0" if row.weights_apart == 0 else f"{row.weights_apart:.1e}"
        counts = f"{row.clean}/{row.n} | {row.clean_changed} | {row.pgd}/{row.n} | {row.pgd_changed}"
        lines.append(f"| {row.stage} | {row.differs} | {apart} | {counts} |")
    text = f"{first.device}, torch {first.torch}: adversarial training of the `{first.profile}` profile "
    text += (
        f"({first.arch}, {first.side} px, {first.epochs} epochs; random split, seed 0), against a first run "
    )
    text += f"with {first.clean}/{first.n} clean and {first.pgd}/{first.n} under PGD-{STEPS} at "
    text += f"{first.eps_255:g}/255. Apart: the norm of the weights' difference over theirs; changed: test "
    text += "images with another prediction.\n"
    return ["\n".join(lines) + "\n", text]


def main():
    arguments = results.parser(__doc__, SHAPES, rounds=2).parse_args()
    parameters, slices = profiled(SHAPES[arguments.device])
    table = measure(arguments.device, arguments.rounds, parameters, slices)
    results.publish(find_root(), "spread", arguments.device, table)


if __name__ == "__main__":
    main()
