r"""What other sizes cost: of crafting and training, of the image folder, of seeds on several nodes.

    python benchmarks/scaling.py                   CPU: all parts, with the rule times of `make demo`
    python benchmarks/scaling.py --device cuda     GPU: the first part alone, ResNet-50 as in `make paper`

`sizes`: crafting against batch and image size, training against attack steps and images. Each setting once a
round, so that a slow moment of the machine meets all; medians.

`growth`: grouping and the leakage meter against the number of images, made up. Seconds, and MiB that a fresh
process grows by; one run each.

`nodes`: how long seeds x splits would take on several nodes. Computed, not run: from the seconds that each
rule took in build/<profile>, and the workflow's own graph of jobs.

Writes benchmarks/scaling_<device>.csv and the section of docs/speed.md; with --parts, only those parts'
rows are new.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from graphlib import TopologicalSorter
from heapq import heappop, heappush

import numpy as np
import pandas as pd
import results
import torch

from fortify.attacks import PGD, craft
from fortify.data import Slices
from fortify.files import find_root
from fortify.leakage import draw_splits, duplicates, leak_meter, near_duplicates, shortcut_cues
from fortify.models import build_model
from fortify.runtime import describe_device
from fortify.splits import label_conflicts, near_duplicate_groups
from fortify.training import Recipe, fit

SHAPES = {  # device: arch, side, batch, crafting's PGD steps; then what is varied, one at a time
    "cpu": ("resnet_small", 112, 32, 10),
    "cuda": ("resnet50", 224, 128, 10),
}
BATCHES, SIDES, STEPS, IMAGES = (1, 4, 16, 32, 64), (32, 64, 112, 224), (1, 2, 4, 8), (64, 128, 256)
PARTS = {"cpu": ("sizes", "growth", "nodes"), "cuda": ("sizes",)}
FOLDERS = (1_000, 2_000, 5_000, 10_000, 20_000)  # images
FOLDER_SIDE, SLICES, WARM = 56, 10, 300  # px; slices a patient; images of the call that loads what it needs
SEEDS, NODES, SPLITS = (1, 3, 5), (1, 2, 4), ("random", "grouped")
NODE = "simulated nodes"


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


def made_up(count):
    """Noise-like slices: of each patient ten, alike; patients are as unlike as noise of 8 x 8 fields."""
    generator, z = np.random.default_rng(0), np.linspace(-1, 1, SLICES)[:, None, None]
    patients = np.arange(count) // SLICES
    images = np.empty((count, FOLDER_SIDE, FOLDER_SIDE), np.uint8)
    for start in range(0, count, SLICES):
        fields = generator.normal(size=(2, 8, 8))
        body, along = np.kron(fields, np.ones((1, FOLDER_SIDE // 8, FOLDER_SIDE // 8)))
        noise = generator.normal(size=(SLICES, FOLDER_SIDE, FOLDER_SIDE))
        images[start : start + SLICES] = np.clip(128 + 30 * body + 3 * z * along + 5 * noise, 0, 255)
    names = [f"{patient}_{i % SLICES}.png" for i, patient in enumerate(patients)]
    about = {"class_names": ("a", "b", "c"), "source": "noise", "sha256": "none"}
    return Slices(images, patients % 3, names, groups=patients, patients=patients, **about)


def meter(slices):
    leak_meter(slices, seeds=[0])
    shortcut_cues(slices)


def search(slices):
    near_duplicates(slices, draw_splits(slices, seeds=[0]), (0.93, 0.95, 0.99))
    label_conflicts(slices)
    duplicates(slices)


GROWING = {"grouping": near_duplicate_groups, "leak classifiers": meter, "near-duplicates": search}


def growing(name, count):
    """(seconds, MiB) of one of ``GROWING``; in a fresh process nothing else is counted."""
    GROWING[name](made_up(WARM))
    return results.grown(partial(GROWING[name], made_up(count)))


def measure_growth():
    """One row a number of images and what is done with them: seconds, and the peak in MiB."""
    rows = []
    for name in GROWING:
        for count in FOLDERS:
            seconds, peak = results.fresh(growing, name, count)
            rows.append({"varied": f"{name}: images", "value": count, "seconds": seconds, "peak_mib": peak})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows).assign(side=FOLDER_SIDE, rounds=1, device=describe_device(torch.device("cpu")))


def exponent(values, sizes):
    """What power of the size a value grows with, between the two ends."""
    values, sizes = np.asarray(values, float), np.asarray(sizes, float)
    return np.log(values[-1] / values[0]) / np.log(sizes[-1] / sizes[0])


def planned(root, profile, seeds, *options):
    """What Snakemake prints of a whole run of the profile with so many seeds, which it does not run."""
    config = [f"profile={profile}", f"seeds={list(range(seeds))}", f"splits=[{','.join(SPLITS)}]"]
    command = [sys.executable, "-m", "snakemake", "--forceall", "--dry-run", *options, "--config", *config]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if shown.returncode:
        raise RuntimeError(f"snakemake cannot plan the profile {profile}:\n{shown.stdout}{shown.stderr}")
    return shown.stdout


def workflow_jobs(root, profile, seeds):
    """({job: rule}, {job: jobs that it waits for})."""
    shown = planned(root, profile, seeds, "--d3dag")
    graph = json.loads(shown[shown.index("{") :])
    rules = {node["id"]: node["value"]["rule"] for node in graph["nodes"]}
    return rules, {job: {edge["u"] for edge in graph["edges"] if edge["v"] == job} for job in rules}


def rule_priorities(root, profile):
    """{rule: priority} of those that have one other than 0; the graph does not say it."""
    found, rule = {}, None
    for line in planned(root, profile, 1, "--quiet", "host").splitlines():
        if start := re.match(r"(?:local)?rule (\w+):", line):
            rule = start[1]
        elif priority := re.match(r" +priority: (-?\d+)", line):
            found[rule] = int(priority[1])
    return found


def rule_seconds(root, profile, rules):
    """{rule: seconds that a job of it took, the mean} of those of ``rules`` that run a notebook.

    They are in Snakemake's benchmark files. Raises FileNotFoundError where a notebook has none.
    """
    folder, taken = root / "build" / profile / "benchmarks", {}
    for notebook in sorted(root.glob("notebooks/[0-9]*.ipynb")):
        if (rule := notebook.stem.partition("_")[2]) in rules:  # named as its notebook
            files = sorted(folder.rglob(f"{notebook.stem}.tsv"))
            taken[rule] = [pd.read_csv(file, sep="\t").s.item() for file in files]
    if missing := [rule for rule, seconds in taken.items() if not seconds]:
        raise FileNotFoundError(f"{folder} has no times of {', '.join(missing)}: run make {profile} first.")
    return {rule: statistics.mean(seconds) for rule, seconds in taken.items()}


def chains(seconds, needs):
    """{job: seconds from its start to the end of the longest chain of jobs that begins with it}."""
    longest = {}
    for job in reversed(list(TopologicalSorter(needs).static_order())):
        after = [longest[other] for other, own in needs.items() if job in own]
        longest[job] = seconds[job] + max(after, default=0)
    return longest


def makespan(seconds, needs, nodes, priority):
    """Seconds until every job is done, each node running one at a time.

    A free node takes the ready job of the highest ``priority`` {job: number}, of those the one with the
    longest chain behind it.
    """
    longest, sorter = chains(seconds, needs), TopologicalSorter(needs)
    sorter.prepare()
    ready, running, now = [], [], 0.0
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=lambda job: (priority[job], longest[job], job))
        while ready and len(running) < nodes:
            job = ready.pop()
            heappush(running, (now + seconds[job], job))
        now = running[0][0]
        while running and running[0][0] == now:
            sorter.done(heappop(running)[1])
    return now


def simulate(root, profile):
    """One row a number of seeds and of nodes: seconds, the jobs, and the seconds of their longest chain."""
    rows, of_priority = [], rule_priorities(root, profile)
    for seeds in SEEDS:
        rules, needs = workflow_jobs(root, profile, seeds)
        of_rule = rule_seconds(root, profile, set(rules.values()))
        manifest = next((root / "build" / profile).glob("*/02_baseline.json"))
        device = json.loads(manifest.read_text(encoding="utf-8"))["device"]
        seconds = {job: of_rule.get(rule, 0) for job, rule in rules.items()}  # 0: no notebook's
        priority = {job: of_priority.get(rule, 0) for job, rule in rules.items()}
        about = {"seeds": seeds, "jobs": sum(rule in of_rule for rule in rules.values())}
        about |= {"chain_s": max(chains(seconds, needs).values()), "profile": profile, "device": device}
        for nodes in NODES:
            row = {"varied": NODE, "value": nodes, "seconds": makespan(seconds, needs, nodes, priority)}
            rows.append(row | about)
    return pd.DataFrame(rows)


def cost(table):
    """Milliseconds an image takes in training (without an attack, for each attack step): a line fitted."""
    part = table[table.varied.eq("training: attack steps")]
    slope, start = np.polyfit(part.value, 1000 / part.images_per_s, 1)
    return start, slope


def section(table, device):
    """The page's text on one device, from the table that :func:`main` writes; a list of paragraphs."""
    own, shown = dict(list(table.groupby(parts_of(table)))), []
    texts = {"sizes": size_text, "growth": growth_text, "nodes": node_text}
    for part in PARTS[device]:
        missing = f"`python benchmarks/scaling.py --parts {part}` has not been run yet.\n"
        shown += texts[part](own[part]) if part in own else [missing]
    return shown


def rows_text(what, part, lines):
    """A table with a column for each value of what is varied, and a row for each of {unit: cells}."""
    text = [f"| {what} | " + " | ".join(f"{value:,}" for value in part.value) + " |"]
    text.append("| --- |" + " ---: |" * len(part))
    text += [f"| {unit} | " + " | ".join(cells) + " |" for unit, cells in lines.items()]
    return "\n".join(text) + "\n"


def size_text(table):
    parts, about, (start, slope) = [], table.iloc[0], cost(table)
    for what, part in table.groupby("varied", sort=False):
        unit = "s an epoch" if what == "training: images" else "images/s"
        shown = part.seconds if what == "training: images" else part.images_per_s
        parts.append(rows_text(what, part, {unit: [f"{v:.3g}" for v in shown]}))
    text = f"{about.device}: {about.arch}, {about.side:g} px, batch {about.batch:g} and "
    text += f"PGD-{about.steps:g} in crafting, batch 32 in training, unless varied. An image takes "
    text += f"{start:.2g} ms an epoch and {slope:.2g} ms more for each attack step; images, epochs, splits "
    text += "and seeds multiply it.\n"
    return [*parts, text]


def growth_text(table):
    about, sizes, lines = table.iloc[0], sorted(table.value.unique()), {}
    for what, part in table.groupby("varied", sort=False):
        for unit, values in (("s", part.seconds), ("MiB", part.peak_mib)):
            if values.notna().all():  # no MiB where there is no /proc
                power = f"{what.partition(':')[0]}: {unit}, as N^{exponent(values, sizes):.1f}"
                lines[power] = [f"{v:.2g}" if v < 9.5 else f"{v:,.0f}" for v in values]
    last = table.iloc[len(sizes) - 1]
    text = f"Grouping {last.value:,} images takes {last.seconds:.0f} s. N^p is how a row grows from "
    text += f"{sizes[0]:,} to {sizes[-1]:,} images. The images are made up: {about.side:g} px, {SLICES} "
    text += f"alike of each patient. Each figure is one run in a fresh process ({about.device}), and MiB "
    text += "is what that process grows by beyond the images. The leak classifiers are fitted on one "
    text += "random and one grouped split. Notebook 7 fits them on `leak_seeds` of each, and groups "
    text += "once for each pair of its thresholds. Near-duplicates are searched for between training "
    text += "and test images of both splits and between classes, exact copies everywhere. Notebook 7's "
    text += "networks are not measured here.\n"
    return [rows_text("images N", table.drop_duplicates("value"), lines), text]


def node_text(table):
    about, nodes = table.iloc[0], sorted(table.value.unique())
    names = ["seeds × 2 splits", "jobs", "1 node", *(f"{n} nodes" for n in nodes[1:]), "longest chain"]
    lines = ["| " + " | ".join(names) + " |", "|" + " ---: |" * len(names)]
    for seeds, part in table.groupby("seeds"):
        minutes = [*part.sort_values("value").seconds / 60, part.chain_s.iloc[0] / 60]
        cells = [f"{seeds:g} × 2", f"{part.jobs.iloc[0]:g}", *(f"{v:.1f} min" for v in minutes)]
        lines.append("| " + " | ".join(cells) + " |")
    last = table[table.seeds.eq(table.seeds.max())].set_index("value")
    sooner = last.seconds[nodes[0]] / last.seconds[nodes[-1]]
    text = f"{nodes[-1]} nodes finish {last.seeds.iloc[0]:g} seeds {sooner:.1f} times faster "
    text += f"than {nodes[0]}. No number of nodes is faster than the longest chain of jobs that wait for "
    text += "each other. **This is computed, not run**: from the time that each rule took in "
    text += f"`build/{about.profile}` ({about.device}) and Snakemake's own graph of the jobs. Each "
    text += "simulated node is as fast as that machine and runs one job at a time. A free node takes "
    text += "the ready job of the highest priority, and of those the one with the longest chain behind "
    text += "it. A rule takes the mean of its jobs there, however many seeds it reads. Queues, file "
    text += "transfers and the HTML pages take no time.\n"
    return ["\n".join(lines) + "\n", text]


def parts_of(table):
    """The part that each row is of."""
    part = dict.fromkeys(GROWING, "growth") | {NODE: "nodes", "crafting": "sizes", "training": "sizes"}
    return table.varied.str.partition(":")[0].map(part)


def merged(path, table):
    """``table`` with the rows of the parts that it lacks as they stand in the CSV file at ``path``."""
    if path.exists():
        before = pd.read_csv(path)
        table = pd.concat([before[~parts_of(before).isin(parts_of(table))], table], ignore_index=True)
    order = parts_of(table).map(PARTS["cpu"].index).sort_values(kind="stable").index
    return table.loc[order].convert_dtypes()  # whole numbers stay whole beside empty cells


def main():
    parser = results.parser(__doc__, SHAPES, rounds=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS["cpu"], help="default: all that the device has")
    parser.add_argument("--profile", default="demo", help="whose rule times are taken (default: demo)")
    arguments = parser.parse_args()
    device, root = arguments.device, find_root()
    parts = arguments.parts or PARTS[device]
    if odd := set(parts) - set(PARTS[device]):
        parser.error(f"{', '.join(sorted(odd))}: not measured on {device}; leave it out or --device cpu.")
    of = {
        "nodes": lambda: simulate(root, arguments.profile),  # first: it may say that times are missing
        "growth": measure_growth,
        "sizes": lambda: measure(device, arguments.rounds),
    }
    for part in [part for part in of if part in parts]:
        table = merged(results.path(root, "scaling", device), of[part]())
        results.publish(root, "scaling", device, table)


if __name__ == "__main__":
    main()
