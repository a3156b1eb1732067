"""What others add in one place: an attack, a minimum-norm attack, an objective, each registered in one line.

They are defined here, outside the library, and taken through evaluation, Table 1 and a short training.
"""

from dataclasses import dataclass
from typing import ClassVar

import foolbox as fb
import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from fortify import attacks, evaluation, objectives, tables
from fortify.attacks import FGSM, PGD, attacks_over, craft, perturbation_norms
from fortify.audit import AuditData, Suite, audit
from fortify.augmentation import Augmentation
from fortify.evaluation import accuracy_table, at_budget, check_rows, curve
from fortify.figures import robustness_curves
from fortify.models import build_model, predict
from fortify.scoring import evaluate, score_static
from fortify.training import Recipe, fit


@dataclass(frozen=True)
class MIFGSM:
    """Momentum iterative FGSM (Dong et al. 2018)."""

    eps_255: float
    steps: int = 5
    name: ClassVar[str] = "mi-fgsm"
    norm: ClassVar[str] = "linf"
    minimum_norm: ClassVar[bool] = False

    def foolbox(self):
        return fb.attacks.MIFGSM(steps=self.steps, rel_stepsize=1 / self.steps, random_start=True)


@dataclass(frozen=True)
class DDN:
    """Decoupled direction and norm (Rony et al. 2019)."""

    steps: int = 30
    name: ClassVar[str] = "ddn"
    norm: ClassVar[str] = "l2"
    minimum_norm: ClassVar[bool] = True

    def foolbox(self):
        return fb.attacks.DDNAttack(steps=self.steps)


@dataclass(frozen=True)
class Consistent:
    """Clean cross-entropy, plus how far predictions move under attack."""

    weight: float = 2.0
    name: ClassVar[str] = "consistent"

    def __call__(self, step):
        (attack,) = step.attacks
        (attacked,) = step.craft([(attack, step.images, step.labels)])
        clean, moved = step.model(torch.cat([step.images, attacked])).chunk(2)
        distance = F.kl_div(moved.log_softmax(1), clean.softmax(1), reduction="batchmean")
        return step.loss(clean, step.labels) + self.weight * distance, clean, step.labels


SETTINGS = {"pgd": {"steps": 3}, "cw": {"binary_search_steps": 2, "steps": 20, "stepsize": 0.05}}
ONE_ULP = 255 * 2**-23


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(attacks.ATTACKS, "mi-fgsm", MIFGSM)
    monkeypatch.setitem(attacks.ATTACKS, "ddn", DDN)
    monkeypatch.setitem(objectives.OBJECTIVES, "consistent", Consistent)


def test_attacks_go_from_one_row_through_evaluation_table_and_figure(
    registered, model, images, labels, phantoms
):
    all_ = attacks_over([1, 4], **SETTINGS)
    assert [a.name for a in all_] == ["pgd"] * 2 + ["fgsm"] * 2 + ["cw"] + ["mi-fgsm"] * 2 + ["ddn"]
    keep = {name: next(a for a in all_[::-1] if a.name == name) for name in attacks.ATTACKS}
    rows, kept = evaluate(model, images, labels, all_, keep=keep, model_name="normal", split="random")
    other = build_model("resnet_small", num_classes=3, seed=9).eval()
    about = {"model_name": "adversarial", "split": "random"}
    theirs, _ = evaluate(other, images, labels, all_, **about)
    static = score_static(other, images, labels, kept, eps_255=4, **about)
    rows = pd.concat([rows, theirs, static], ignore_index=True)
    check_rows(rows)

    own = rows[rows.model.eq("normal") & rows.protocol.eq("adaptive")].set_index("attack")
    assert own.loc["ddn"].eps_255.isna().all() and set(own.loc["mi-fgsm"].eps_255) == {1, 4}
    strongest = own.loc["mi-fgsm"].query("eps_255 == 4")
    assert strongest.linf_255.max() <= 4 + ONE_ULP and strongest.success.mean() > 0.5
    assert own.loc["ddn"].success.mean() > 0.9
    assert (own.loc["ddn"].l2[own.loc["ddn"].success] > 0).all()

    accuracy = accuracy_table(at_budget(rows, eps_255=4, cw_l2=0.5), class_names=phantoms.class_names)
    table = tables.table1(accuracy, split="random")
    shown = tables.layout1(table)
    assert list(shown.columns[2:]) == ["Clean", "PGD", "FGSM", "CW", "DDN", "MI-FGSM", "Combined"]
    k = table.set_index(["model", "attack"]).k["normal"]
    assert k["mi-fgsm"] == (~strongest.success).sum()
    inside = own.loc["ddn"].success & own.loc["ddn"].l2.le(0.5)
    clean = own.loc["clean"].set_index("index").success
    assert k["ddn"] == (~np.where(inside, True, clean)).sum()
    assert k["combined"] == k[["pgd", "fgsm", "cw", "ddn", "mi-fgsm"]].sum()
    words = {"split": "random", "eps_255": 4, "cw_l2": 0.5, "source": "phantoms", "profile": "test"}
    said = tables.caption(table, **words)
    assert "FGSM, MI-FGSM and PGD: Linf budget 4/255. CW and DDN: L2 budget 0.5" in said
    assert {"mi-fgsm", "pgd", "fgsm"} == set(curve(rows).attack)
    figure = robustness_curves(curve(rows[rows.protocol.eq("adaptive")]))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "normal, MI-FGSM" in names and len(set(names) - {"95 % interval"}) == 6


def test_what_an_attack_draws_by_itself_is_by_the_seed(model, images, labels):
    first, again, other = (
        craft(model, images[:20], labels[:20], MIFGSM(4), seed=s).images for s in (1, 1, 2)
    )
    state = torch.get_rng_state()
    craft(model, images[:20], labels[:20], MIFGSM(4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_attack_that_leaves_its_budget_is_stopped(model, images, labels):
    @dataclass(frozen=True)
    class TooFar(MIFGSM):
        def foolbox(self):
            attack = fb.attacks.LinfFastGradientAttack()
            run = attack.run
            attack.run = lambda m, x, c, epsilon: run(m, x, c, epsilon=2 * epsilon)
            return attack

    with pytest.raises(
        RuntimeError, match=r"TooFar\(eps_255=4.* changed a pixel by 8.* grey levels, beyond its"
    ):
        craft(model, images[:4], labels[:4], TooFar(4))


def test_an_objective_trains_from_one_row(registered, phantoms):
    some = phantoms.subset(range(0, 120, 3))
    still = Augmentation(flip=False, degrees=0, zoom=0, translate=0)
    recipe = Recipe(epochs=10, batch_size=16, lr=3e-3, augmentation=still)
    objective = objectives.OBJECTIVES["consistent"]()
    attack = PGD(4, steps=3)
    history, found = {}, {}
    for name, how in (("mix", None), ("consistent", objective)):
        found[name] = build_model("resnet_small", num_classes=3, seed=0)
        options = {"attacks": {attack: 1.0}, "val_attack": attack, "progress": False}
        history[name] = fit(found[name], some, some, recipe, objective=how, **options)
    assert len(history["consistent"]) == 10 and history["consistent"].train_accuracy.iloc[-1] > 0.8
    x, y = torch.from_numpy(some.images)[:, None] / 255, torch.from_numpy(some.labels)
    normal = build_model("resnet_small", num_classes=3, seed=0)
    fit(normal, some, some, recipe, progress=False)
    robust = {
        m: (~craft(net, x, y, PGD(4, steps=10)).success).sum() for m, net in (found | {"": normal}).items()
    }
    assert robust["consistent"] > robust[""], "it holds more than normal training"
    assert not torch.equal(*(predict(net, x) for net in found.values())), "it is another training"


def test_a_checkpoint_is_of_its_objective(phantoms, tmp_path):
    some, attack = phantoms.subset(range(0, 120, 3)), {FGSM(4): 1.0}
    for objective in (None, Consistent(), Consistent(weight=3.0)):
        model = build_model("resnet_small", num_classes=3, seed=0)
        options = {"attacks": attack, "checkpoints": tmp_path, "progress": False}
        fit(model, some, some, Recipe(epochs=1, batch_size=20), objective=objective, **options)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_audit_takes_any_attack_of_the_registry_as_it_does_ours(model, images, labels):
    """Its own attacks are run by an implementation that is handed over; here one that adds momentum."""

    def with_momentum(model, x, y, attack, **options):
        return craft(model, x, y, MIFGSM(attack.eps_255) if isinstance(attack, PGD) else attack, **options)

    suite = Suite(eps_255=3, eps_grid_255=(1, 16), pgd_steps=5, restarts=1)
    found = audit(model, AuditData(images[:30], labels[:30]), suite, craft=with_momentum, only=["T3", "T14"])
    assert set(found.table.id) == {"T3", "T14"}


def test_settings_of_no_attack_are_named():
    with pytest.raises(ValueError, match="no attack is called pdg; ATTACKS has pgd, fgsm, cw"):
        attacks_over([4], pdg={"steps": 3})


def test_norms_are_of_the_whole_image():
    clean, changed = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)
    linf, l2 = perturbation_norms(clean, changed)
    assert linf.item() == pytest.approx(25.5) and l2.item() == pytest.approx(0.1 * 12**0.5)
    assert evaluation.COLUMNS[-1] == "l2"
