r"""What other sizes cost: crafting against batch and image size, training against attack steps and images.

    python benchmarks/scaling.py                   CPU: resnet_small, as in `make laptop`
    python benchmarks/scaling.py --device cuda     GPU: ResNet-50, as in `make paper`

Each setting once a round, so that a slow moment of the machine meets all; medians. Writes
benchmarks/scaling_<device>.csv and README's section.
"""

import statistics
import time

import numpy as np
import pandas as pd
import results
import torch

from fortify.attacks import PGD, craft
from fortify.data import Slices
from fortify.files import find_root
from fortify.models import build_model
from fortify.runtime import describe_device
from fortify.training import Recipe, fit

SHAPES = {  # device: arch, side, batch, crafting's PGD steps; then what is varied, one at a time
    "cpu": ("resnet_small", 112, 32, 10),
    "cuda": ("resnet50", 224, 128, 10),
}
BATCHES, SIDES, STEPS, IMAGES = (1, 4, 16, 32, 64), (32, 64, 112, 224), (1, 2, 4, 8), (64, 128, 256)


def crafting(device, arch, side, batch, steps):
    model = build_model(arch, num_classes=3, seed=0).to(device).eval()
    x = torch.rand(batch, 1, side, side, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(batch, dtype=torch.long)
    return lambda: craft(model, x, y, PGD(4, steps=steps), batch_size=batch)


def training(device, arch, side, images, steps):
    """One epoch of :func:`fortify.training.fit`: each image clean and attacked, both learnt from."""
    generator = np.random.default_rng(0)
    greys = generator.integers(0, 256, (images, side, side), dtype=np.uint8)
    labels = np.arange(images) % 3
    names = [f"{i}.png" for i in range(images)]
    data = Slices(greys, labels, names, ("a", "b", "c"), "noise", "none")
    recipe, attack = Recipe(epochs=1, batch_size=32), {PGD(4, steps=steps): 1.0}

    def run():
        model = build_model(arch, num_classes=3, seed=0).to(device)
        fit(model, data, data.subset(range(3)), recipe, attacks=attack, progress=False)

    return run


def settings(device):
    arch, side, batch, steps = SHAPES[device]
    for value in BATCHES:
        yield "crafting: batch size", value, value, crafting(device, arch, side, value, steps)
    for value in SIDES:
        yield "crafting: image size", value, batch, crafting(device, arch, value, batch, steps)
    for value in STEPS:
        yield "training: attack steps", value, IMAGES[0], training(device, arch, side, IMAGES[0], value)
    for value in IMAGES:
        yield "training: images", value, value, training(device, arch, side, value, STEPS[2])


def measure(device, rounds):
    """One row a setting: what is varied, its value, seconds, images/s."""
    made = list(settings(device))
    seconds = [[] for _ in made]
    for number in range(rounds + 1):
        for taken, (_, _, _, run) in zip(seconds, made, strict=True):
            start = time.perf_counter()
            run()  # its results come back to the CPU: nothing is left in a GPU's queue
            if number > 0:  # the first round pays for set-up
                taken.append(time.perf_counter() - start)
    rows = [
        {
            "varied": what,
            "value": value,
            "seconds": statistics.median(t),
            "images_per_s": n / statistics.median(t),
        }
        for (what, value, n, _), t in zip(made, seconds, strict=True)
    ]
    arch, side, batch, steps = SHAPES[device]
    about = {"arch": arch, "side": side, "batch": batch, "steps": steps, "rounds": rounds}
    about |= {"device": describe_device(torch.device(device)), "torch": torch.__version__}
    return pd.DataFrame(rows).assign(**about)


def cost(table):
    """Milliseconds an image takes in training (without an attack, for each attack step): a line fitted."""
    part = table[table.varied.eq("training: attack steps")]
    slope, start = np.polyfit(part.value, 1000 / part.images_per_s, 1)
    return start, slope


def section(table, device):
    """README's text on one device, from the table that :func:`measure` makes; a list of paragraphs."""
    parts, about, (start, slope) = [], table.iloc[0], cost(table)
    for what, part in table.groupby("varied", sort=False):
        unit = "s an epoch" if what == "training: images" else "images/s"
        shown = part.seconds if what == "training: images" else part.images_per_s
        lines = [
            f"| {what} | " + " | ".join(map(str, part.value)) + " |",
            "| --- |" + " ---: |" * len(part),
            f"| {unit} | " + " | ".join(f"{v:.3g}" for v in shown) + " |",
        ]
        parts.append("\n".join(lines) + "\n")
    text = f"{about.device}: {about.arch}, {about.side} px, batch {about.batch} and PGD-{about.steps} in "
    text += f"crafting, batch 32 in training, unless varied. An image takes {start:.2g} ms an epoch and "
    text += f"{slope:.2g} ms more for each attack step; images, epochs, splits and seeds multiply it.\n"
    return [*parts, text]


def main():
    arguments = results.parser(__doc__, SHAPES, rounds=3).parse_args()
    table = measure(arguments.device, arguments.rounds)
    results.publish(find_root(), "scaling", arguments.device, table)


if __name__ == "__main__":
    main()
