"""Where benchmarks put what they measured: a CSV file a device, and README's section, made of all of them."""

import argparse
import importlib

import pandas as pd

from fortify.files import write_csv
from fortify.workflow.publish import replace_section

# Benchmark: README's section.
SECTIONS = {"speed": "speed", "scaling": "cost", "spread": "spread", "grouping": "grouping"}
SECTIONS |= {"evaluation": "evaluation"}


def parser(doc, devices, *, rounds=None):
    """The options that every benchmark has; ``rounds`` for those that repeat what they do."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=devices, default="cpu")
    if rounds is not None:
        options.add_argument("--rounds", type=int, default=rounds)
    return options


def path(root, name, device):
    """The CSV file of a benchmark on a device."""
    return root / "benchmarks" / f"{name}_{device}.csv"


def publish(root, name, device, table):
    """Write the CSV file, then README's section from the files of every device."""
    write_csv(path(root, name, device), table)
    replace_section(root / "README.md", SECTIONS[name], section(root, name))
    print(path(root, name, device).relative_to(root))


def section(root, name):
    """README's section of a benchmark: its text on each device, or the command that has yet to run there."""
    benchmark, parts = importlib.import_module(name), []
    for device in benchmark.SHAPES:
        file = path(root, name, device)
        if file.exists():
            parts += benchmark.section(pd.read_csv(file), device)
        else:
            parts.append(f"`python benchmarks/{name}.py --device {device}` has not been run yet.\n")
    return "\n".join(parts)
