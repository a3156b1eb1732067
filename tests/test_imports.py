"""Importing is cheap where nothing heavy is needed."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "foolbox", "matplotlib", "sklearn", "scipy.stats", "pandas", "pyautoattack")


@pytest.mark.parametrize(
    ("statement", "needs"),
    [
        ("import fortify", ()),
        (
            "import fortify.runs, fortify.files, fortify.runtime, fortify.workflow.profiles",
            (),
        ),
        ("import fortify.evaluation, fortify.tables", ("pandas",)),  # no model is needed
        ("import fortify.data", ("pandas",)),
        ("import fortify.models, fortify.training", ("torch", "pandas", "foolbox")),
        ("import fortify.attacks, fortify.fused", ("torch", "foolbox")),
        ("import fortify.splits", ("pandas",)),  # reading one; making one needs more
    ],
)
def test_a_room_loads_only_what_it_uses(statement, needs):
    code = f"{statement}; import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(ran.stdout.split()) <= {*needs}, f"{statement} loads more than {needs}"
