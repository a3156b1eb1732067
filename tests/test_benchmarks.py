"""The benchmarks run: what they compare does what it must. Their timings are no test."""

import importlib.util
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "benchmarks" / "crafting.py"


@pytest.fixture
def crafting(monkeypatch):
    spec = importlib.util.spec_from_file_location("crafting", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.SHAPES, "cpu", ("resnet_small", 32, 4, 2))
    return module


def test_every_library_at_hand_is_measured_and_what_is_missing_is_named(crafting, capsys):
    def absent(model, x, y, steps):
        raise ImportError("No module named 'absent'")

    crafting.LIBRARIES = {name: crafting.LIBRARIES[name] for name in ("fortify", "foolbox")}
    crafting.LIBRARIES["absent"] = absent
    table = crafting.measure("cpu", rounds=2)
    assert table.library.tolist() == ["fortify", "foolbox"] and (table.images_per_s > 0).all()
    assert table.fortify_is_faster[0] == 1 and (table.ratio_min <= table.ratio_max).all()
    assert "absent is left out: No module named 'absent'" in capsys.readouterr().err


def test_a_library_that_attacks_with_another_budget_is_no_comparison(crafting):
    crafting.LIBRARIES = {"fortify": lambda model, x, y, steps: lambda: x}
    with pytest.raises(RuntimeError, match="fortify moved greys by up to 0, not by the budget of 4"):
        crafting.measure("cpu", rounds=1)
