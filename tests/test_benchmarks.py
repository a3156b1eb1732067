"""The benchmarks run: what they compare does what it must. Their timings are no test."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def speed(monkeypatch):
    module = load("speed")
    monkeypatch.setitem(module.SHAPES, "cpu", ("resnet_small", 32, 4, 2))
    monkeypatch.setattr(module, "machine", lambda device: (1e11, 1e10))
    return module


def test_every_library_at_hand_is_measured_and_what_is_missing_is_named(speed, capsys):
    def absent(model, x):
        raise ImportError("No module named 'absent'")

    speed.LIBRARIES = {name: speed.LIBRARIES[name] for name in ("fortify", "foolbox")}
    speed.LIBRARIES["absent"] = absent
    table = speed.measure("cpu", rounds=2)
    assert table.library.tolist() == ["fortify", "foolbox"] * 3 and (table.images_per_s > 0).all()
    assert list(table.task.unique()) == list(speed.TASKS)
    ours = table[table.library.eq("fortify")]
    assert (ours.fortify_is_faster == 1).all() and (table.ratio_min <= table.ratio_max).all()
    assert table.share_of_matrix_peak.notna().sum() == 2, "of crafting alone"
    assert "absent is left out: No module named 'absent'" in capsys.readouterr().err
    assert len(speed.figure(table).axes) == 3


def test_a_library_that_attacks_with_another_budget_is_no_comparison(speed):
    speed.LIBRARIES = {"fortify": lambda model, x: {"pgd": lambda steps: lambda images, labels: images}}
    with pytest.raises(RuntimeError, match="fortify moved greys by up to 0, not by the budget of 4"):
        speed.measure("cpu", rounds=1, tasks=["crafting"])


def test_flops_are_those_of_the_layers(speed):
    """PGD without weight gradients: twice the forward's arithmetic a step."""
    x = torch.rand(2, 1, 32, 32)
    model = speed.build_model("resnet_small", num_classes=3, seed=0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    flops, moved = speed.per_image("resnet_small", x, 3)
    assert flops == pytest.approx(6 * counter.get_total_flops() / 2, rel=0.01) and moved > 0


def test_scaling_covers_what_it_names_and_finds_the_cost_it_is_given(monkeypatch):
    scaling = load("scaling")
    monkeypatch.setitem(scaling.SHAPES, "cpu", ("resnet_small", 32, 2, 1))
    for name, values in (("BATCHES", (1, 2)), ("SIDES", (32,)), ("STEPS", (1, 2)), ("IMAGES", (8, 12))):
        monkeypatch.setattr(scaling, name, values)
    monkeypatch.setattr(scaling, "STEPS", (1, 2, 1))
    table = scaling.measure("cpu", rounds=1)
    assert table.groupby("varied", sort=False).size().tolist() == [2, 1, 3, 2]
    assert np.allclose(table.images_per_s[:2] * table.seconds[:2], [1, 2])
    given = pd.DataFrame({"varied": "training: attack steps", "value": [1, 2, 4]})
    start, slope = scaling.cost(given.assign(images_per_s=1000 / (7 + 2 * given.value)))
    assert (start, slope) == pytest.approx((7, 2))


@pytest.mark.parametrize(("name", "section"), [("speed", "speed"), ("scaling", "cost")])
def test_the_readme_shows_what_was_measured(name, section):
    shown = README.split(f"<!-- generated: {section} -->\n")[1].split(f"<!-- /generated: {section} -->")[0]
    assert shown == load(name).section(ROOT)
