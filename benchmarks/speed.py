r"""How fast is this project, against the libraries a user would pick instead, each as it documents itself?

    python benchmarks/speed.py                   CPU: ResNet-18, 64 px, batch 32, PGD-5
    python benchmarks/speed.py --device cuda     GPU: ResNet-50, 224 px, batch 128, PGD-10

Four tasks: crafting PGD, whatever the library's call returns; PGD accuracy, the same with the count of what
the model still reads (part of our call and of Foolbox's; one more pass for the others); one adversarial
training step (the batch attacked by PGD, then learnt from with the clean one); and Table 1, the whole
evaluation on one batch (clean, PGD-20, FGSM and CW of one search of 20 steps, L2). Same model, images,
budget, steps and step size; every library once a round, the order turning, so that a slow moment of the
machine meets all. Read the ratio, taken within a round. `fortify` is what the notebooks run; "fortify, not
fused" is the same without the fused copy of the model; "fortify,
bfloat16" is the crafting inside a training of that precision, and that training; "fortify, bfloat16,
compiled" is the same with the attacks on compiled code, on a GPU alone. Memory is the
peak of the first call: the device's; on a CPU what a fresh process grows by.

Writes benchmarks/speed_<device>.csv and .png (with --tasks, only those tasks' rows are new), and the
section from what has been measured. torchattacks and ART are not of this environment; what is missing is left
out and named. They come without their pinned dependencies, into a folder of their own:

    .venv/bin/pip install --no-deps --target build/benchmark-packages \
        torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1
"""

import contextlib
import copy
import functools
import importlib.metadata
import statistics
import sys
import time

import foolbox as fb
import numpy as np
import pandas as pd
import results
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from fortify.attacks import CW, FGSM, PGD, craft, craft_batch, craft_parts, perturbation_norms
from fortify.augmentation import Augmentation
from fortify.checkpoint import TrainingState
from fortify.figures import DOUBLE, save, styled
from fortify.files import find_root
from fortify.fused import FusedModel
from fortify.models import build_model
from fortify.objectives import Mix
from fortify.runtime import describe_device, frozen
from fortify.scoring import evaluate
from fortify.training import Recipe, _autocasts, _epoch

SHAPES = {  # device: arch, side in px, batch, PGD steps
    "cpu": ("resnet18", 64, 32, 5),
    "cuda": ("resnet50", 224, 128, 10),
}
TASKS = {
    "crafting": "crafting, PGD",
    "accuracy": "PGD accuracy",
    "training": "adversarial training step",
    "table1": "Table 1",
}
EPS_255, EPS = 4.0, 4.0 / 255
TABLE1_STEPS = 20  # of PGD, and of CW's one search
OURS, LOW, COMPILED = "fortify", "fortify, bfloat16", "fortify, bfloat16, compiled"
PLAIN = "fortify, not fused"  # the model's own gradients are followed: what fusing is worth
FASTER = {OURS: "fortify_is_faster", LOW: "bfloat16_is_faster", COMPILED: "compiled_is_faster"}
ONLY = dict.fromkeys((LOW, COMPILED), ("crafting", "training"))  # reported evaluation is float32
ONLY[PLAIN] = ("crafting", "accuracy", "training")
COMPILES = ("cuda",)  # devices


def fortify_attacks(model, x):
    def run(attack):
        return lambda images, labels: craft(model, images, labels, attack, batch_size=len(images))

    return {"pgd": lambda steps: run(PGD(EPS_255, steps=steps))}


def plain_attacks(model, x):
    def run(attack):
        options = {"batch_size": len(x), "fused": model}
        return lambda images, labels: craft(model, images, labels, attack, **options)

    return {"pgd": lambda steps: run(PGD(EPS_255, steps=steps))}


def low_attacks(model, x, *, compiled=False):
    fused = FusedModel(model, x[:1], autocast=True, compiled=compiled)

    def pgd(steps):
        attack = PGD(EPS_255, steps=steps)

        def run(images, labels):
            noise = torch.rand_like(images) * 2 - 1
            with frozen(model), torch.autocast(x.device.type, torch.bfloat16):
                return craft_parts(model, [(attack, images, labels, noise)], fused=fused.refresh())[
                    0
                ].detach()

        return run

    return {"pgd": pgd}


def foolbox_attacks(model, x):
    fmodel = fb.PyTorchModel(model, bounds=(0, 1))

    def run(attack, epsilons):
        return lambda images, labels: attack(fmodel, images, labels, epsilons=epsilons)[1:]

    def cw(steps, searches=1, **options):  # as CW: stepsize, initial_const
        # All the steps, as ours and torchattacks' here: by default it stops after 4 of the 20.
        kind = fb.attacks.L2CarliniWagnerAttack
        return run(kind(binary_search_steps=searches, steps=steps, abort_early=False, **options), None)

    return {
        "pgd": lambda steps, eps=EPS: run(fb.attacks.LinfPGD(steps=steps, rel_stepsize=2.5 / steps), eps),
        "fgsm": lambda eps=EPS: run(fb.attacks.LinfFastGradientAttack(), eps),
        "cw": cw,
    }


def torchattacks_attacks(model, x):
    import torchattacks

    def cw(steps, searches=1, stepsize=0.01, initial_const=1.0):
        # It has one constant and no search: a user calls it for each.
        tried = [initial_const * 10**k for k in range(searches)]
        kinds = [torchattacks.CW(model, c=c, steps=steps, lr=stepsize) for c in tried]
        return kinds[0] if searches == 1 else lambda images, labels: [kind(images, labels) for kind in kinds]

    return {
        "pgd": lambda steps, eps=EPS: torchattacks.PGD(model, eps=eps, alpha=2.5 / steps * eps, steps=steps),
        "fgsm": lambda eps=EPS: torchattacks.FGSM(model, eps=eps),
        "cw": cw,
    }


def art_attacks(model, x):
    from art.attacks.evasion import CarliniL2Method, FastGradientMethod, ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=model.num_classes,
        clip_values=(0, 1),
        device_type="gpu" if x.is_cuda else "cpu",
    )

    def run(attack):
        def generate(images, labels):
            found = attack.generate(images.cpu().numpy(), labels.cpu().numpy())
            return torch.from_numpy(found).to(images.device)

        return generate

    def pgd(steps, eps=EPS):
        options = {"eps": eps, "eps_step": 2.5 / steps * eps, "max_iter": steps, "num_random_init": 1}
        return run(
            ProjectedGradientDescent(classifier, norm=np.inf, batch_size=len(x), verbose=False, **options)
        )

    def cw(steps, searches=1, stepsize=0.01, initial_const=0.01):
        options = {"learning_rate": stepsize, "initial_const": initial_const, "binary_search_steps": searches}
        return run(CarliniL2Method(classifier, max_iter=steps, batch_size=len(x), verbose=False, **options))

    return {
        "pgd": pgd,
        "fgsm": lambda eps=EPS: run(FastGradientMethod(classifier, norm=np.inf, eps=eps, batch_size=len(x))),
        "cw": cw,
    }


LIBRARIES = {
    OURS: fortify_attacks,
    PLAIN: plain_attacks,
    LOW: low_attacks,
    COMPILED: functools.partial(low_attacks, compiled=True),
    "foolbox": foolbox_attacks,
    "torchattacks": torchattacks_attacks,
    "adversarial-robustness-toolbox": art_attacks,
}


def crafting(name, attacks, model, x, y, steps):
    pgd = attacks["pgd"](steps)
    return lambda: images_of(pgd(x, y))


def accuracy(name, attacks, model, x, y, steps):
    pgd = attacks["pgd"](steps)
    return lambda: still_read(model, pgd(x, y), y)


def images_of(found):
    """The adversarial images of a result that may come with more, success last."""
    return found[0] if isinstance(found, tuple) else found


def still_read(model, found, y):
    """How many of the attacked images the model classifies correctly: by the library's own count, if any."""
    if isinstance(found, tuple):
        return (~found[-1]).sum().item()
    with torch.no_grad():
        return (model(found).argmax(1) == y).sum().item()


def training(name, attacks, model, x, y, steps):
    """One step of AdamW on the batch and its attacked copy, on a model of the library's own."""
    if name in (*FASTER, PLAIN):  # the step of `fit` itself, with an augmentation that does nothing
        still = Augmentation(flip=False, degrees=0, zoom=0, translate=0)
        precision = "auto" if name in (OURS, PLAIN) else "bfloat16"
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # as `fit` does first
        optimizer = torch.optim.AdamW(model.parameters())
        recipe = Recipe(batch_size=len(x), augmentation=still, label_smoothing=0, precision=precision)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
        state, greys = TrainingState(model, optimizer, schedule), (x * 255).round().byte()
        weight, shares = torch.ones(model.num_classes, device=x.device), {PGD(EPS_255, steps=steps): 1.0}
        fused = FusedModel(model, x[:1], autocast=_autocasts(recipe, x.device), compiled=name == COMPILED)
        if name == PLAIN:
            fused.refresh = lambda: model
        none = torch.zeros(model.num_classes, device=x.device)  # logits are not adjusted
        return lambda: _epoch(state, greys, y, weight, none, recipe, Mix(), shares, fused, 0)
    pgd, optimizer = attacks["pgd"](steps), torch.optim.AdamW(model.parameters())

    def step():
        model.eval()
        adversarial = images_of(pgd(x, y)).detach()
        model.train()
        loss = torch.nn.functional.cross_entropy(model(torch.cat([x, adversarial])), torch.cat([y, y]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def table1(name, attacks, model, x, y, steps):
    if name == OURS:
        kinds = [PGD(EPS_255, steps=TABLE1_STEPS), FGSM(EPS_255), CW(1, TABLE1_STEPS)]
        about = {"index": np.arange(len(x)), "model_name": "normal", "split": "random", "seed": 0}
        return lambda: evaluate(model, x.cpu(), y.cpu(), kinds, batch_size=len(x), **about)
    made = [attacks["pgd"](TABLE1_STEPS), attacks["fgsm"](), attacks["cw"](TABLE1_STEPS)]

    def run():
        with torch.no_grad():
            right = [(model(x).argmax(1) == y).sum().item()]
        return right + [still_read(model, attack(x, y), y) for attack in made]

    return run


def timed(run, device):
    """(seconds, result) of one call, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def ready(task, name, device):
    """(the library's run of a task, its images) on a model and images that are the same for every library."""
    arch, side, batch, steps = SHAPES[device]
    x = torch.rand((batch, 1, side, side), generator=torch.Generator().manual_seed(0)).to(device)
    model = build_model(arch, num_classes=3, seed=0).to(device).eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    return globals()[task](name, LIBRARIES[name](model, x), model, x, y, steps), x


def measure(device, rounds, tasks=tuple(TASKS)):
    """One row a task and library: what it ran at, and how much faster this project is in the same round."""
    arch, side, batch, steps = SHAPES[device]
    peak, bandwidth = machine(device)
    tables = []
    for task in tasks:
        runs, memory = {}, {}
        for name in LIBRARIES:
            if task not in ONLY.get(name, TASKS) or (name == COMPILED and device not in COMPILES):
                continue
            try:
                run, x = ready(task, name, device)
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            runs[name], memory[name] = run, peak_memory(task, name, device, run)
            found = run()
            if task == "crafting":
                check_budget(name, x, found)
        tables.append(compare(task, runs, memory, device, batch, rounds))
        print(tables[-1].iloc[:, :7].round(2).to_string(index=False), flush=True)
    about = {"arch": arch, "side": side, "batch": batch, "steps": steps, "rounds": rounds}
    about |= {"device": describe_device(torch.device(device)), "torch": torch.__version__}
    table = pd.concat(tables, ignore_index=True).assign(**about)
    flops, moved = per_image(arch, x, steps)
    crafted = table.task.eq("crafting")
    table.loc[crafted, "share_of_matrix_peak"] = table.images_per_s * flops / peak
    table.loc[crafted, "share_of_copy_bandwidth"] = table.images_per_s * moved / bandwidth
    return table


def check_budget(name, x, found):
    largest = perturbation_norms(x.cpu(), found.cpu().float())[0].max().item()
    if not 0.9 * EPS_255 <= largest <= EPS_255 * 1.001:
        raise RuntimeError(f"{name} moved greys by up to {largest:.3g}, not by the budget of {EPS_255:g}")


def peak_memory(task, name, device, run):
    """Peak memory in MiB that the first call of a task takes: :func:`grown` says it of a CPU."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()  # models too, of the libraries measured earlier
        torch.cuda.reset_peak_memory_stats()
        timed(run, device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return results.fresh(grown, task, name, device, SHAPES)


def grown(task, name, device, shapes):
    """By how many MiB this process grows at most, in its first call of a task."""
    SHAPES.update(shapes)
    return results.grown(ready(task, name, device)[0])[1]


def compare(task, runs, memory, device, batch, rounds):
    seconds, names = {name: [] for name in runs}, list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(runs[name], device)[0])
    rows = []
    for name in names:
        ratios = {
            base: [other / own for other, own in zip(seconds[name], seconds[base], strict=True)]
            for base in FASTER
            if base in seconds
        }
        others = {column: statistics.median(ratios.get(base, [np.nan])) for base, column in FASTER.items()}
        rows.append(
            {
                "task": task,
                "library": name,
                "images_per_s": batch / statistics.median(seconds[name]),
                "fortify_is_faster": others.pop(FASTER[OURS]),
                "ratio_min": min(ratios[OURS]),
                "ratio_max": max(ratios[OURS]),
                "peak_mib": memory[name],
                "slowest": batch / max(seconds[name]),
                "fastest": batch / min(seconds[name]),
                "version": importlib.metadata.version(name.split(",")[0]),
            }
            | others
        )
    return pd.DataFrame(rows)


def machine(device):
    """(FLOP/s of a large float32 matrix product, bytes/s of a large copy, read and write), the best of 5."""
    n = 8192 if device == "cuda" else 2048
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    big = torch.rand(2**28 if device == "cuda" else 2**26, device=device)
    product = min(timed(lambda: a @ b, device)[0] for _ in range(5))
    copy = min(timed(lambda: big.clone(), device)[0] for _ in range(5))
    return 2 * n**3 / product, 2 * big.nbytes / copy


def per_image(arch, x, steps):
    """(FLOPs, bytes of layers' inputs and outputs) that PGD needs an image: forward, and input gradients."""
    model = build_model(arch, num_classes=3, seed=0).to(x.device).eval()
    moved = 0

    def count(module, inputs, output):
        nonlocal moved
        moved += 2 * (inputs[0].nbytes + output.nbytes)  # once forward, once backward

    layers = [m for m in model.modules() if not list(m.children())]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    y = torch.zeros(len(x), dtype=torch.long, device=x.device)
    with frozen(model), FlopCounterMode(display=False) as counter:
        craft_batch(model, x, y, PGD(EPS_255, steps=steps))
    return counter.get_total_flops() / len(x), steps * moved / len(x)


@styled
def figure(table):
    fig = Figure(figsize=(DOUBLE, 1.9), layout="constrained")
    short = {"adversarial-robustness-toolbox": "ART"}
    tasks = [task for task in TASKS if task in set(table.task)]
    libraries = table.library.unique()[::-1]
    for axis, task in zip(np.atleast_1d(fig.subplots(1, len(tasks))), tasks, strict=True):
        part = table[table.task.eq(task)].set_index("library").reindex(libraries)
        colours = ["#0b4f8a" if name in FASTER else "#9ca3af" for name in libraries]
        spread = [part.images_per_s - part.slowest, part.fastest - part.images_per_s]
        axis.barh([short.get(n, n) for n in libraries], part.images_per_s, xerr=spread, color=colours)
        axis.set(title=TASKS[task], xlabel="images/s (median, range)")
        if task != tasks[0]:
            axis.set_yticklabels([])
    return fig


def section(table, device):
    """The page's text on one device, from the table that :func:`measure` makes; a list of paragraphs."""
    libraries, about = table.library.unique(), table.iloc[0]
    lines = ["| task | " + " | ".join(libraries) + " |", "| --- |" + " ---: |" * len(libraries)]
    for task, part in table.groupby("task", sort=False):
        part, cells = part.set_index("library"), []
        for name in libraries:
            if name not in part.index:
                cells.append("")
                continue
            row = part.loc[name]
            faster = f" ({row.fortify_is_faster:.2f}×, {row.ratio_min:.2f}–{row.ratio_max:.2f})"
            cells.append(f"{row.images_per_s:.3g}{faster * (name not in FASTER)}, {row.peak_mib:,.0f} MiB")
        lines.append(f"| {TASKS[task]} | " + " | ".join(cells) + " |")
    rounds = ", ".join(
        f"{n} ({', '.join(TASKS[t] for t in part.task.unique())})" for n, part in table.groupby("rounds")
    )
    text = "Images/s, in brackets how many times faster `fortify` is (median, range), and peak memory. "
    text += f"Rounds: {rounds}. {about.device}: {about.arch}, {about.side} px, batch {about.batch}, "
    text += f"PGD-{about.steps}."
    crafted = table[table.library.eq(OURS) & table.share_of_matrix_peak.notna()]
    for row in crafted.itertuples():
        text += f" As a yardstick: crafting does arithmetic at {row.share_of_matrix_peak:.1f} times the rate "
        text += "of a matrix product here, and moves data at "
        text += (
            f"{row.share_of_copy_bandwidth:.1f} times that of a copy. Both are counted on the model before "
        )
        text += "it is fused, so they can exceed 1."
    for task, part in table[~table.library.isin(FASTER)].groupby("task", sort=False):
        for how, base in (("In bfloat16", LOW), ("Compiled,", COMPILED)):
            faster = part.get(FASTER[base], pd.Series(dtype=float)).dropna()
            ratios = [f"{faster[i]:.2f}× as fast as {part.library[i]}" for i in faster.index]
            text += f" {how} {task} is {', '.join(ratios)}." if ratios else ""
    picture = f"![Images per second by task and library](../benchmarks/speed_{device}.png)\n"
    missing = [task for task in TASKS if task not in set(table.task)]
    gaps = [f"`--tasks {task}` has not been run to its end on `{device}` yet.\n" for task in missing]
    return [*gaps, "\n".join(lines) + "\n", text + "\n", picture]


def merged(path, table):
    """``table`` with the rows of the tasks that it lacks as they stand in the CSV file at ``path``."""
    if path.exists():
        before = pd.read_csv(path)
        table = pd.concat([table, before[~before.task.isin(table.task)]], ignore_index=True)
    return table.sort_values("task", key=lambda task: task.map(list(TASKS).index), kind="stable")


def main():
    parser = results.parser(__doc__, SHAPES, rounds=9)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    root = find_root()
    sys.path.append(str(root / "build" / "benchmark-packages"))
    with contextlib.redirect_stdout(sys.stderr):
        table = measure(arguments.device, arguments.rounds, arguments.tasks)
    path = results.path(root, "speed", arguments.device)
    table = merged(path, table)
    save(figure(table), path.parent, path.stem)
    path.with_suffix(".pdf").unlink()
    results.publish(root, "speed", arguments.device, table)


if __name__ == "__main__":
    main()
