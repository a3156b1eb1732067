r"""How fast is PGD here, against the libraries a user would pick instead, each as its documentation shows it?

    python benchmarks/crafting.py                   CPU: ResNet-18, 64 px, batch 32, PGD-5
    python benchmarks/crafting.py --device cuda     GPU: ResNet-50, 224 px, batch 128, PGD-10

Same model, images, budget, steps and step size; every library once a round, the order turning, so that a slow
moment of the machine meets all. Read the ratio, taken within a round; images/s belong to one machine. Writes
benchmarks/crafting_<device>.csv. torchattacks and ART are not of this environment; what is missing is left
out and named. They come without their pinned dependencies, into a folder of their own:

    .venv/bin/pip install --no-deps --target build/benchmark-packages \
        torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1
"""

import argparse
import importlib.metadata
import statistics
import sys
import time

import foolbox as fb
import numpy as np
import pandas as pd
import torch

from fortify.attacks import PGD, craft, perturbation_norms
from fortify.models import build_model
from fortify.runs import describe_device, find_root, write_csv

SHAPES = {  # device: arch, side in px, batch, PGD steps
    "cpu": ("resnet18", 64, 32, 5),
    "cuda": ("resnet50", 224, 128, 10),
}
EPS_255 = 4.0
OURS = "fortify"


def fortify_pgd(model, x, y, steps):
    attack = PGD(EPS_255, steps=steps)
    return lambda: craft(model, x, y, attack, batch_size=len(x)).images


def foolbox_pgd(model, x, y, steps):
    fmodel = fb.PyTorchModel(model, bounds=(0, 1))
    attack = fb.attacks.LinfPGD(steps=steps, rel_stepsize=2.5 / steps)
    return lambda: attack(fmodel, x, y, epsilons=EPS_255 / 255)[1]


def torchattacks_pgd(model, x, y, steps):
    import torchattacks

    eps = EPS_255 / 255
    attack = torchattacks.PGD(model, eps=eps, alpha=2.5 / steps * eps, steps=steps, random_start=True)
    return lambda: attack(x, y)


def art_pgd(model, x, y, steps):
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    eps = EPS_255 / 255
    classifier = PyTorchClassifier(
        model=model,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=tuple(x.shape[1:]),
        nb_classes=model.num_classes,
        clip_values=(0, 1),
        device_type="gpu" if x.is_cuda else "cpu",
    )
    attack = ProjectedGradientDescent(
        classifier,
        norm=np.inf,
        eps=eps,
        eps_step=2.5 / steps * eps,
        max_iter=steps,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    images, labels = x.cpu().numpy(), y.cpu().numpy()
    return lambda: torch.from_numpy(attack.generate(images, labels))


LIBRARIES = {
    OURS: fortify_pgd,
    "foolbox": foolbox_pgd,
    "torchattacks": torchattacks_pgd,
    "adversarial-robustness-toolbox": art_pgd,
}


def timed(run, device):
    """(seconds, result) of one call, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = run()
    wait()
    return time.perf_counter() - start, result


def measure(device, rounds):
    """One row a library: what it ran at, and how much faster this project is in the same round."""
    arch, side, batch, steps = SHAPES[device]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch, 1, side, side), generator=generator).to(device)
    model = build_model(arch, num_classes=3, seed=0).to(device).eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    runs = {}
    for name, make in LIBRARIES.items():
        try:
            runs[name] = make(model, x, y, steps)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    seconds, memory = {name: [] for name in runs}, {}
    for name, run in runs.items():  # the first call pays for set-up; here the results are looked at
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found = timed(run, device)[1].cpu().float()
        memory[name] = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else np.nan
        largest = perturbation_norms(x.cpu(), found)[0].max().item()
        if not 0.9 * EPS_255 <= largest <= EPS_255 * 1.001:
            raise RuntimeError(f"{name} moved greys by up to {largest:.3g}, not by the budget of {EPS_255:g}")
    names = list(runs)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(timed(runs[name], device)[0])
    rows = []
    for name in names:
        ratios = [other / own for other, own in zip(seconds[name], seconds[OURS], strict=True)]
        rows.append(
            {
                "library": name,
                "version": importlib.metadata.version(name),
                "images_per_s": batch / statistics.median(seconds[name]),
                "slowest": batch / max(seconds[name]),
                "fastest": batch / min(seconds[name]),
                "fortify_is_faster": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "peak_mib": memory[name],
            }
        )
    about = {"arch": arch, "side": side, "batch": batch, "steps": steps, "rounds": rounds}
    about |= {"device": describe_device(torch.device(device)), "torch": torch.__version__}
    return pd.DataFrame(rows).assign(**about)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    sys.path.append(str(find_root() / "build" / "benchmark-packages"))
    table = measure(arguments.device, arguments.rounds)
    path = find_root() / "benchmarks" / f"crafting_{arguments.device}.csv"
    write_csv(path, table)
    print(table.iloc[:, :9].round(2).to_string(index=False))
    print(path.relative_to(find_root()))


if __name__ == "__main__":
    main()
