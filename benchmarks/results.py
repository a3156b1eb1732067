"""What benchmarks share: options, peak memory, a CSV file a device, and its section in a page of docs/."""

import argparse
import importlib
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from fortify.files import write_csv

# Benchmark: page of docs/, and the section there.
SECTIONS = {
    "speed": ("speed", "speed"),
    "evaluation": ("speed", "evaluation"),
    "scaling": ("speed", "cost"),
    "spread": ("guarantees", "spread"),
    "grouping": ("groups", "grouping"),
}


def parser(doc, devices, *, rounds=None):
    """The options that every benchmark has; ``rounds`` for those that repeat what they do."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=devices, default="cpu")
    if rounds is not None:
        options.add_argument("--rounds", type=int, default=rounds)
    return options


def fresh(function, *arguments):
    """What a function returns in a process of its own, which nothing has filled before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def grown(run):
    """(seconds, MiB that this process grows by at most) of a call; NaN MiB where there is no /proc."""
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")  # the peak so far, of what was made ready, is forgotten
    before, start = _memory("VmRSS"), time.perf_counter()
    run()
    return time.perf_counter() - start, _memory("VmHWM") - before  # ru_maxrss would start at the parent's


def _memory(field):
    """A field of this process's status in MiB; NaN where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(field)), np.nan)


def path(root, name, device):
    """The CSV file of a benchmark on a device."""
    return root / "benchmarks" / f"{name}_{device}.csv"


def publish(root, name, device, table):
    """Write the CSV file, then the page's section from the files of every device."""
    from fortify.workflow.publish import replace_section  # here: every fresh process would wait for it

    write_csv(path(root, name, device), table)
    page, where = SECTIONS[name]
    replace_section(root / "docs" / f"{page}.md", where, section(root, name))
    print(path(root, name, device).relative_to(root))


def section(root, name):
    """A benchmark's section: its text on each device that it has run on."""
    benchmark, parts = importlib.import_module(name), []
    for device in benchmark.SHAPES:
        file = path(root, name, device)
        if file.exists():
            parts += benchmark.section(pd.read_csv(file), device)
    return "\n".join(parts)
