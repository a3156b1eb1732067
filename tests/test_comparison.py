"""Comparing trainings: chosen on validation, judged on the same slices, ranked by what groups allow."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from fortify import comparison
from fortify.attacks import FGSM, PGD, craft
from fortify.augmentation import Augmentation
from fortify.comparison import Contender, certified, cost_in_forwards, rank, run_contender, size_of, standings
from fortify.data import to_tensor
from fortify.models import build_model
from fortify.training import Recipe, fit

STILL = Augmentation(flip=False, degrees=0, zoom=0, translate=0)
RECIPE = Recipe(epochs=2, batch_size=20, lr=3e-3, augmentation=STILL, label_smoothing=0)
PGD2 = {PGD(4, steps=2): 1.0}


@pytest.fixture(scope="module")
def parts(phantoms):
    index = np.arange(len(phantoms))
    return {"train": index[index % 3 == 0], "val": index[index % 3 == 1], "test": index[index % 3 == 2]}


def test_the_learning_rate_is_chosen_on_validation_and_the_test_slices_are_attacked(phantoms, parts):
    contender = Contender("mine", RECIPE, "trades", PGD2)
    options = dict(seed=3, eps_255=4, steps=3)
    model, rows, facts = run_contender(contender, phantoms, parts, lrs=[1e-9, 3e-3], **options)
    alone = {}
    for lr in (1e-9, 3e-3):
        _, _, alone[lr] = run_contender(
            replace(contender, recipe=replace(RECIPE, lr=lr)), phantoms, parts, **options
        )
    best = max(alone, key=lambda lr: (alone[lr]["val_robust_accuracy"], alone[lr]["val_accuracy"], -lr))
    assert facts["lr"] == best and facts["val_robust_accuracy"] == alone[best]["val_robust_accuracy"]
    assert rows["index"].tolist() == parts["test"].tolist()
    test = phantoms.subset(parts["test"])
    x, y = to_tensor(test.images), torch.as_tensor(test.labels)
    broken = torch.zeros(len(y), dtype=torch.bool)
    for loss in ("cross_entropy", "margin"):
        broken |= craft(model, x, y, PGD(4, steps=3, loss=loss), seed=3).success
    assert rows.attacked.tolist() == (~broken).tolist(), "both losses, none of them at a lost slice"
    assert (rows.correct | ~rows.attacked).all() and facts["epochs"] == 2


def test_normal_training_is_that_without_attacks(phantoms, parts):
    model, _, facts = run_contender(
        Contender("n", RECIPE, "normal"), phantoms, parts, seed=0, eps_255=4, steps=2
    )
    plain = build_model("resnet_small", num_classes=3, seed=0)
    fit(plain, phantoms.subset(parts["train"]), phantoms.subset(parts["val"]), RECIPE, progress=False)
    ours, theirs = model.state_dict().values(), plain.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert np.isnan(facts["val_robust_accuracy"]) and facts["forwards"] == 3


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match="mine: no objective is called 'tradse'"):
        Contender("mine", RECIPE, "tradse")


def test_costs_are_counted_as_the_field_counts_them():
    attack = {PGD(4, steps=4): 1.0}
    alone = replace(RECIPE, clean_share=0.0)
    expected = {"normal": 3, "mix": 11, "trades": 15, "mart": 14, "n_fgsm": 5, "awp": 14, "noise": 3}
    for objective, cost in expected.items():
        own = alone if objective in ("mix", "awp") else RECIPE
        assert cost_in_forwards(Contender("x", own, objective, attack)) == cost
    thirds = {FGSM(4): 1 / 3, PGD(4, steps=4): 1 / 3, PGD(4, steps=4, loss="margin"): 1 / 3}
    quarter = replace(RECIPE, clean_share=0.25)
    assert cost_in_forwards(Contender("x", quarter, "mix", thirds)) == pytest.approx(3.75 + 6)


def test_a_step_of_an_attack_is_one_pass_of_the_network(phantoms, parts):
    """And, as it is counted, one backward pass."""
    train, val = phantoms.subset(parts["train"]), phantoms.subset(parts["val"])
    seen = {}
    for steps in (2, 4):
        passed = []
        model = build_model("resnet_small", num_classes=3, seed=0)
        # The fused copy that attacks follow carries the hook too.
        hook = model.register_forward_hook(lambda m, inputs, _, to=passed: to.append(len(inputs[0])))
        attacks = {PGD(4, steps=steps): 1.0}
        fit(model, train, val, replace(RECIPE, epochs=1, clean_share=0.0), attacks=attacks, progress=False)
        hook.remove()
        seen[steps] = sum(passed)
    assert seen[4] - seen[2] == 2 * len(train)
    costs = [cost_in_forwards(Contender("x", RECIPE, "mix", {PGD(4, steps=n): 1.0})) for n in seen]
    assert costs[1] - costs[0] == 2 * 2


def test_multiply_adds_and_weights_of_a_known_layer():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, bias=False), torch.nn.Flatten())
    assert size_of(model, 10) == {"parameters": 18, "multiply_adds": 8 * 8 * 18 / 1e6}


def hand_made():
    """Two groups of two slices; the second contender is right wherever the first is, and on group 1."""
    base = {"split": "grouped", "seed": 0, "index": [0, 1, 2, 3], "label": [0, 0, 1, 1]}
    first = pd.DataFrame(base | {"contender": "a", "correct": [True, False] * 2, "attacked": [False] * 4})
    second = pd.DataFrame(
        base | {"contender": "b", "correct": [True] * 4, "attacked": [False] * 2 + [True] * 2}
    )
    return pd.concat([first, second]).assign(prediction=0)


def test_standings_pool_slices_and_balance_classes():
    table = standings(hand_made(), groups=[0, 0, 1, 1]).set_index("contender")
    assert table.loc["a", ["k_correct", "n", "correct", "balanced_correct"]].tolist() == [2, 4, 0.5, 0.5]
    assert table.loc["b", ["k_attacked", "attacked", "balanced_attacked"]].tolist() == [2, 0.5, 0.5]
    assert table.loc["b", "attacked_low"] == 0 and table.loc["b", "attacked_high"] == 1


def test_a_difference_counts_where_the_groups_bear_it_out():
    table = rank(hand_made(), groups=[0, 0, 1, 1], reference="a").set_index("kind")
    assert table.loc["correct", "gain_percent"] == 50 and table.loc["correct", "differs"]
    assert table.loc["attacked", "gain_percent"] == 50 and not table.loc["attacked", "differs"]
    with pytest.raises(ValueError, match="no 'c' on the grouped split"):
        rank(hand_made(), groups=[0, 0, 1, 1], reference="c")


def test_certified_accuracy_counts_correct_predictions_within_the_radius():
    found = pd.DataFrame({"prediction": [0, 1, -1, 1], "label": [0, 1, 1, 0], "radius": [0.5, 0.1, 0, 0.9]})
    assert certified(found, [0, 0.3, 0.6]).k.tolist() == [2, 1, 0]


def test_the_objectives_with_a_cost_are_all_there_are():
    assert {comparison.NORMAL, *comparison.OBJECTIVES} == {
        name
        for name in ("normal", *comparison.OBJECTIVES)
        if cost_in_forwards(Contender("x", RECIPE, name, PGD2))
    }
