r"""How fast is this project, against the libraries a user would pick instead, each as it documents itself?

    python benchmarks/speed.py                   CPU: ResNet-18, 64 px, batch 32, PGD-5
    python benchmarks/speed.py --device cuda     GPU: ResNet-50, 224 px, batch 128, PGD-10

Three tasks: crafting PGD; one adversarial training step (the batch attacked by PGD, then learnt from with the
clean one); and Table 1, the whole evaluation on one batch (clean, PGD-20, FGSM and CW of one search of 20
steps, L2). Same model, images, budget, steps and step size; every library once a round, the order turning, so
that a slow moment of the machine meets all. Read the ratio, taken within a round.

Writes benchmarks/speed_<device>.csv and .png, and README's section from what has been measured. torchattacks
and ART are not of this environment; what is missing is left out and named. They come without their pinned
dependencies, into a folder of their own:

    .venv/bin/pip install --no-deps --target build/benchmark-packages \
        torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1
"""

import argparse
import contextlib
import importlib.metadata
import statistics
import sys
import time

import foolbox as fb
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from fortify.attacks import CW, FGSM, PGD, craft, craft_batch, frozen, perturbation_norms
from fortify.augmentation import Augmentation
from fortify.evaluation import evaluate
from fortify.figures import DOUBLE, save, styled
from fortify.models import build_model
from fortify.publish import replace_section
from fortify.runs import describe_device, find_root, write_csv
from fortify.training import Recipe, TrainingState, _epoch, crafting_twin

SHAPES = {  # device: arch, side in px, batch, PGD steps
    "cpu": ("resnet18", 64, 32, 5),
    "cuda": ("resnet50", 224, 128, 10),
}
TASKS = {"crafting": "crafting, PGD", "training": "adversarial training step", "table1": "Table 1"}
EPS_255, EPS = 4.0, 4.0 / 255
TABLE1_STEPS = 20  # of PGD, and of CW's one search
OURS = "fortify"


def fortify_attacks(model, x):
    def attack(kind):
        return lambda images, labels: craft(model, images, labels, kind, batch_size=len(images)).images

    return {"pgd": lambda steps: attack(PGD(EPS_255, steps=steps))}


def foolbox_attacks(model, x):
    fmodel = fb.PyTorchModel(model, bounds=(0, 1))

    def run(attack, epsilons=EPS):
        return lambda images, labels: attack(fmodel, images, labels, epsilons=epsilons)[1]

    return {
        "pgd": lambda steps: run(fb.attacks.LinfPGD(steps=steps, rel_stepsize=2.5 / steps)),
        "fgsm": lambda: run(fb.attacks.LinfFastGradientAttack()),
        "cw": lambda steps: run(fb.attacks.L2CarliniWagnerAttack(binary_search_steps=1, steps=steps), None),
    }


def torchattacks_attacks(model, x):
    import torchattacks

    return {
        "pgd": lambda steps: torchattacks.PGD(model, eps=EPS, alpha=2.5 / steps * EPS, steps=steps),
        "fgsm": lambda: torchattacks.FGSM(model, eps=EPS),
        "cw": lambda steps: torchattacks.CW(model, steps=steps),
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

    def pgd(steps):
        options = {"eps": EPS, "eps_step": 2.5 / steps * EPS, "max_iter": steps, "num_random_init": 1}
        return run(
            ProjectedGradientDescent(classifier, norm=np.inf, batch_size=len(x), verbose=False, **options)
        )

    def cw(steps):
        return run(
            CarliniL2Method(
                classifier, binary_search_steps=1, max_iter=steps, batch_size=len(x), verbose=False
            )
        )

    return {
        "pgd": pgd,
        "fgsm": lambda: run(FastGradientMethod(classifier, norm=np.inf, eps=EPS, batch_size=len(x))),
        "cw": cw,
    }


LIBRARIES = {
    OURS: fortify_attacks,
    "foolbox": foolbox_attacks,
    "torchattacks": torchattacks_attacks,
    "adversarial-robustness-toolbox": art_attacks,
}


def crafting(name, attacks, model, x, y, steps):
    pgd = attacks["pgd"](steps)
    return lambda: pgd(x, y)


def training(name, attacks, model, x, y, steps):
    """One step of AdamW on the batch and its attacked copy, on a model of the library's own."""
    optimizer = torch.optim.AdamW(model.parameters())
    if name == OURS:  # the step of `fit` itself, with an augmentation that does nothing
        still = Augmentation(flip=False, degrees=0, scale=0, translate=0)
        recipe = Recipe(batch_size=len(x), augmentation=still, label_smoothing=0)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1)
        state, greys = TrainingState(model, optimizer, schedule), (x * 255).round().byte()
        weight, shares = torch.ones(model.num_classes, device=x.device), {PGD(EPS_255, steps=steps): 1.0}
        twin = crafting_twin(model, x[:1])
        return lambda: _epoch(state, greys, y, weight, recipe, shares, twin, 0)
    pgd = attacks["pgd"](steps)

    def step():
        model.eval()
        adversarial = pgd(x, y).detach()
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
        for attack in made:
            found = attack(x, y)
            with torch.no_grad():
                right.append((model(found).argmax(1) == y).sum().item())
        return right

    return run


def timed(run, device):
    """(seconds, result) of one call, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def measure(device, rounds, tasks=tuple(TASKS)):
    """One row a task and library: what it ran at, and how much faster this project is in the same round."""
    arch, side, batch, steps = SHAPES[device]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch, 1, side, side), generator=generator).to(device)
    peak, bandwidth = machine(device)
    tables = []
    for task in tasks:
        runs = {}
        for name, make in LIBRARIES.items():
            model = build_model(arch, num_classes=3, seed=0).to(device).eval()
            with torch.no_grad():
                y = model(x).argmax(1)
            try:
                runs[name] = globals()[task](name, make(model, x), model, x, y, steps)
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
        memory = {name: first_call(name, task, run, x, device) for name, run in runs.items()}
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


def first_call(name, task, run, x, device):
    """Peak device memory (MiB; NaN on a CPU) of the call that pays for set-up. Looks at what was crafted."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = timed(run, device)[1]
    if task == "crafting":
        largest = perturbation_norms(x.cpu(), found.cpu().float())[0].max().item()
        if not 0.9 * EPS_255 <= largest <= EPS_255 * 1.001:
            raise RuntimeError(f"{name} moved greys by up to {largest:.3g}, not by the budget of {EPS_255:g}")
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else np.nan


def compare(task, runs, memory, device, batch, rounds):
    seconds, names = {name: [] for name in runs}, list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(runs[name], device)[0])
    rows = []
    for name in names:
        ratios = [other / own for other, own in zip(seconds[name], seconds[OURS], strict=True)]
        rows.append(
            {
                "task": task,
                "library": name,
                "images_per_s": batch / statistics.median(seconds[name]),
                "fortify_is_faster": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "peak_mib": memory[name],
                "slowest": batch / max(seconds[name]),
                "fastest": batch / min(seconds[name]),
                "version": importlib.metadata.version(name),
            }
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
    for axis, task in zip(np.atleast_1d(fig.subplots(1, len(tasks))), tasks, strict=True):
        part = table[table.task.eq(task)].iloc[::-1]
        colours = ["#0b4f8a" if name == OURS else "#9ca3af" for name in part.library]
        spread = [part.images_per_s - part.slowest, part.fastest - part.images_per_s]
        axis.barh([short.get(n, n) for n in part.library], part.images_per_s, xerr=spread, color=colours)
        axis.set(title=TASKS[task], xlabel="images/s (median, range)")
        if task != tasks[0]:
            axis.set_yticklabels([])
    return fig


def section(root):
    """README's section on speed: one table a device, from the CSV files that are there."""
    parts = []
    for device in SHAPES:
        path = root / "benchmarks" / f"speed_{device}.csv"
        if not path.exists():
            parts.append(f"`python benchmarks/speed.py --device {device}` has not been run yet.\n")
            continue
        table = pd.read_csv(path)
        about = table.iloc[0]
        for task in [task for task in TASKS if task not in set(table.task)]:
            parts.append(f"`--tasks {task}` has not been run to its end on `{device}` yet.\n")
        lines = ["| task | " + " | ".join(table.library.unique()) + " |"]
        lines.append("| --- |" + " ---: |" * table.library.nunique())
        for task in table.task.unique():
            part = table[table.task.eq(task)]
            cells = [
                f"{r.images_per_s:.3g}"
                + (
                    f" ({r.fortify_is_faster:.2f}×, {r.ratio_min:.2f}–{r.ratio_max:.2f})"
                    * (r.library != OURS)
                )
                for r in part.itertuples()
            ]
            lines.append(f"| {TASKS[task]} | " + " | ".join(cells) + " |")
        ours = table[table.library.eq(OURS) & table.task.eq("crafting")].iloc[0]
        text = (
            f"Images/s, median of {about.rounds} rounds, and in brackets how many times faster `fortify` is, "
        )
        text += f"median and range. {about.device}: {about.arch}, {about.side} px, batch {about.batch}, "
        text += f"PGD-{about.steps}. Crafting does {ours.share_of_matrix_peak:.0%} of the arithmetic and "
        text += (
            f"{ours.share_of_copy_bandwidth:.0%} of the traffic that a matrix product and a copy reach here, "
        )
        text += "counted on the unfolded model.\n"
        picture = f"![Images per second by task and library](benchmarks/speed_{device}.png)\n"
        parts += ["\n".join(lines) + "\n", text, picture]
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    arguments = parser.parse_args()
    root = find_root()
    sys.path.append(str(root / "build" / "benchmark-packages"))
    with contextlib.redirect_stdout(sys.stderr):
        table = measure(arguments.device, arguments.rounds, arguments.tasks)
    path = root / "benchmarks" / f"speed_{arguments.device}.csv"
    write_csv(path, table)
    save(figure(table), path.parent, path.stem)
    path.with_suffix(".pdf").unlink()
    replace_section(root / "README.md", "speed", section(root))
    print(path.relative_to(root))


if __name__ == "__main__":
    main()
