"""What must be true of every attack, whatever the model."""

import copy
import re
from dataclasses import replace

import foolbox as fb
import pytest
import torch

from fortify import attacks
from fortify.attacks import CW, FGSM, PGD, craft, craft_batch, margin, perturbation_norms
from fortify.models import predict
from fortify.runtime import frozen

ONE_ULP = 255 * 2**-23  # grey levels: rounding of x + eps near white
LINF = [FGSM(4), PGD(4, steps=3), PGD(4, steps=3, loss="margin"), PGD(4, steps=2, restarts=3)]
CW_FEW = CW(binary_search_steps=2, steps=20, stepsize=0.05)


def known(model, images, labels, count=24):
    """Images that the model reads rightly."""
    right = (predict(model, images).argmax(1) == labels).nonzero().squeeze(1)[:count]
    assert len(right) == count, "the fixture's model must read at least that many images rightly"
    return images[right], labels[right]


@pytest.mark.parametrize("attack", [*LINF, CW_FEW], ids=repr)
def test_stays_in_bounds_and_reports_what_the_model_says(model, images, labels, attack):
    adversarial, predictions, probabilities, success = craft(model, images, labels, attack)
    assert adversarial.shape == images.shape and adversarial.dtype == torch.float32
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    seen = predict(model, adversarial, batch_size=64)
    assert torch.equal(predictions, seen.argmax(1)) and torch.equal(probabilities, seen.amax(1))
    assert torch.equal(success, predictions != labels)
    if not isinstance(attack, CW):
        linf_255, _ = perturbation_norms(images, adversarial)
        assert linf_255.max() <= attack.eps_255 + ONE_ULP
        assert linf_255.max() > attack.eps_255 - 0.01, "a budget that is not used is not attacked with"


@pytest.mark.parametrize("attack", [FGSM(0), PGD(0)], ids=repr)
def test_no_budget_changes_nothing_bit_for_bit(model, images, labels, attack):
    assert torch.equal(craft(model, images, labels, attack).images, images)


@pytest.mark.parametrize("attack", [FGSM(4), PGD(4, steps=5), CW_FEW], ids=repr)
def test_breaks_a_normally_trained_model(model, images, labels, attack):
    x, y = known(model, images, labels)
    assert craft(model, x, y, attack).success.float().mean() > 0.5


def test_stronger_in_the_order_that_it_must_be(model, images, labels):
    x, y = known(model, images, labels)

    def broken(attack):
        return craft(model, x, y, attack).success.sum()

    assert (
        broken(FGSM(1)) <= broken(PGD(1, steps=10)) <= broken(PGD(4, steps=10)) <= broken(PGD(32, steps=10))
    )
    # Random noise of the same size is no attack: one that only matched it would not follow the gradient.
    noise = (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1).sign() * 4 / 255
    assert (predict(model, (x + noise).clamp(0, 1)).argmax(1) != y).sum() < broken(PGD(4, steps=10))


def test_a_restart_is_the_attack_from_the_next_seed_on_what_stands(model, images, labels):
    x, y = known(model, images, labels)
    once = PGD(2, steps=2)
    first = craft(model, x, y, once, seed=5)
    standing = ~first.success
    assert standing.any() and first.success.any()
    again = craft(model, x, y, once, subset=standing.nonzero().squeeze(1), seed=6)
    two = craft(model, x, y, PGD(2, steps=2, restarts=2), seed=5)
    expected, broken = first.images.clone(), first.success.clone()
    taken = standing.nonzero().squeeze(1)[again.success]
    expected[taken], broken[taken] = again.images[again.success], True
    assert torch.equal(two.images, expected) and torch.equal(two.success, broken)


def test_a_subset_is_attacked_from_the_starts_that_it_has_in_the_whole_set(model, images, labels):
    some, attack = [3, 11, 64, 17, 118], PGD(2, steps=3, restarts=2)
    for seed in (0, 1):
        whole = craft(model, images, labels, attack, seed=seed, batch_size=1)  # one by one: the same bits
        found = craft(model, images, labels, attack, subset=some, seed=seed, batch_size=1)
        for part, every in zip(found, whole, strict=True):
            assert torch.equal(part, every[some])
    alone = craft(model, images[some], labels[some], attack, seed=1, batch_size=1)
    assert not torch.equal(alone.images, found.images), "another start"


@pytest.mark.parametrize("subset", [[], [0, 120], [-1], [0.0], [True, False], [[0]]])
def test_a_subset_that_is_none_is_refused(model, images, labels, subset):
    with pytest.raises(ValueError, match=r"positions in 0\.\.119"):
        craft(model, images, labels, FGSM(1), subset=subset)


@pytest.mark.parametrize("settings", [{}, {"loss": "margin"}, {"random_start": False}, {"restarts": 2}])
def test_stopping_early_finds_the_same_successes_in_fewer_passes(model, images, labels, settings):
    attack, passed, found = PGD(4, steps=8, **settings), [], {}
    net = copy.deepcopy(model)  # the net that is followed, told from the model itself
    net.register_forward_pre_hook(lambda module, given: passed.append(len(given[0])))
    for name, kind in (("every step", attack), ("early", replace(attack, stop_early=True))):
        passed.clear()
        found[name] = craft(model, images, labels, kind, batch_size=120, fused=net), sum(passed)
    (whole, many), (early, few) = found["every step"], found["early"]
    assert few < 0.7 * many
    clean = predict(model, images).argmax(1) != labels
    assert whole.success.sum() > clean.sum() and early.success.sum() < len(labels)
    assert early.success[whole.success].all(), "what is broken at the end"
    assert early.success[clean].all() or settings.get("random_start", True)
    assert torch.equal(early.success, predict(model, early.images).argmax(1) != labels)
    assert perturbation_norms(images, early.images)[0].max() <= 4 + ONE_ULP
    correct = ~early.success  # which took every step
    assert perturbation_norms(whole.images[correct], early.images[correct])[0].max() < 4


def test_restarts_take_everything_else_as_it_is_given(model, images, labels):
    x, y, asked = *known(model, images, labels), []
    attack = PGD(4, steps=3, rel_stepsize=0.2, random_start=False, loss="margin")

    def ask(module, args, _):
        if module is model:  # not the fused one
            asked.append(len(args[0]))

    hook = model.register_forward_hook(ask)
    first = craft(model, x, y, attack, batch_size=10)
    alone, again = asked[:], craft(model, x, y, replace(attack, restarts=2), batch_size=10)
    hook.remove()
    assert torch.equal(again.images, first.images), "no random start: nothing new to find"
    standing = (~first.success).sum().item()
    assert alone == [8, 10, 10, 4] and 10 < standing < 20
    assert asked[len(alone) :] == [*alone, 10, standing - 10], "it is looked at once"


def test_restarts_end_where_nothing_stands(model, images, labels):
    x, y = known(model, images, labels)
    strong = PGD(32, steps=10, restarts=3)
    found = craft(model, x, y, strong)
    assert found.success.all() and torch.equal(
        found.images, craft(model, x, y, replace(strong, restarts=1)).images
    )


def test_the_whole_range_is_a_budget(model, images, labels):
    assert craft(model, images[:4], labels[:4], FGSM(255)).success.any()


def test_norms_are_those_of_each_image():
    clean = torch.zeros(2, 1, 2, 2)
    changed = torch.tensor([[[[0.2, 0.0], [0.0, 0.0]]], [[[0.3, -0.4], [0.0, 0.0]]]])
    linf_255, l2 = perturbation_norms(clean, changed)
    assert torch.allclose(linf_255, torch.tensor([51.0, 102.0])) and torch.allclose(
        l2, torch.tensor([0.2, 0.5])
    )
    kinds = re.escape("(2, 1, 2, 2) torch.float32 and (1, 1, 2, 2) torch.float32")
    with pytest.raises(ValueError, match=f"of one shape, not {kinds}"):
        perturbation_norms(clean, changed[:1])


def test_an_unknown_attack_is_named(model, images, labels):
    with pytest.raises(TypeError, match="is no attack: it has no norm, minimum_norm, foolbox"):
        craft(model, images[:2], labels[:2], type("Odd", (), {"name": "odd", "eps_255": 4})())
    nothing = {"name": "odd", "norm": "linf", "minimum_norm": False, "foolbox": None}
    with pytest.raises(TypeError, match="it has no eps_255"):
        craft(model, images[:2], labels[:2], type("Odd", (), nothing)())
    with pytest.raises(TypeError, match="attacks with a budget are of norm linf, not l2"):
        craft(model, images[:2], labels[:2], type("Odd", (), nothing | {"norm": "l2", "eps_255": 4})())


def test_restarts_only_add(model, images, labels):
    one = craft(model, images, labels, PGD(3, steps=2)).success
    three = craft(model, images, labels, PGD(3, steps=2, restarts=3)).success
    assert (three | ~one).all(), "an image that fell to the first start is still fallen"
    assert three.sum() > one.sum()


def test_what_is_not_said_is_seed_0_and_no_bar(model, images, labels, monkeypatch):
    bars = []
    monkeypatch.setattr(attacks, "progress_bar", lambda steps, **options: bars.append(options) or steps)
    attack = PGD(4, steps=2)
    found = craft(model, images, labels, attack)
    assert torch.equal(found.images, craft(model, images, labels, attack, seed=0, progress=True).images)
    assert bars == [{"desc": "pgd", "show": False}, {"desc": "pgd", "show": True}]


def test_cw_goes_beyond_the_boundary_by_its_confidence(model, images, labels):
    x, y = known(model, images, labels)
    few = dict(binary_search_steps=3, steps=60, stepsize=0.05)
    for confidence in (0.0, 1.0):
        found, _, _, success = craft(model, x, y, CW(**few, confidence=confidence))
        with torch.no_grad():
            least = margin(model(found[success]), y[success]).min()
        assert success.any() and confidence <= least + 1e-4 < confidence + 0.5


def test_same_seed_same_bytes_and_another_seed_another_start(model, images, labels):
    attack = PGD(4, steps=2)
    first, again, other = (craft(model, images, labels, attack, seed=s).images for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batch_size_does_not_matter(model, images, labels):
    attack = PGD(4, steps=3)
    whole = craft(model, images, labels, attack, batch_size=120)
    parts = craft(model, images, labels, attack, batch_size=7)
    assert torch.equal(whole.success, parts.success)
    # The start is the same; only the rounding of the convolutions may flip the sign of a gradient near zero.
    assert (whole.images != parts.images).float().mean() < 0.02


def test_failed_cw_returns_the_clean_image(model, images, labels):
    x, y = known(model, images, labels)
    weak = CW(binary_search_steps=1, steps=1, stepsize=1e-6, initial_const=1e-6)
    fmodel = fb.PyTorchModel(model.eval(), bounds=(0, 1))
    raw = fb.attacks.L2CarliniWagnerAttack(
        binary_search_steps=1, steps=1, stepsize=1e-6, initial_const=1e-6
    ).run(fmodel, x, fb.criteria.Misclassification(y))
    assert (raw == 0).all(), "Foolbox returns black images here: the trap that craft is there for"
    adversarial, _, _, success = craft(model, x, y, weak)
    assert torch.equal(adversarial, x)
    assert not success.any()


def test_a_cw_that_fails_on_some_images_keeps_those_clean(model, images, labels):
    """A black image may be read as another class: it looks like a success."""
    x, y = known(model, images, labels, count=96)
    few = dict(binary_search_steps=1, steps=3, stepsize=0.02, initial_const=0.1)
    raw = fb.attacks.L2CarliniWagnerAttack(**few, abort_early=False).run(
        fb.PyTorchModel(model.eval(), bounds=(0, 1)), x, fb.criteria.Misclassification(y)
    )
    black = (raw == 0).flatten(1).all(1)
    assert 10 < black.sum() < 86 and (predict(model, raw).argmax(1) != y)[black].any()
    adversarial, _, _, success = craft(model, x, y, CW(**few), batch_size=96)
    assert torch.equal(adversarial[black], x[black]) and not success[black].any()
    assert success[~black].all()


def test_cw_changes_less_than_the_linf_attacks(model, images, labels):
    x, y = known(model, images, labels)
    found = craft(model, x, y, CW(binary_search_steps=4, steps=60, stepsize=0.02))
    fgsm = craft(model, x, y, FGSM(4))
    both = found.success & fgsm.success
    assert both.sum() > 5
    l2 = perturbation_norms(x, found.images)[1][both]
    assert (l2 < perturbation_norms(x, fgsm.images)[1][both]).all()


def test_leaves_the_model_as_it_was(model, images, labels):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad(set_to_none=True)
    model.train()
    model[1].stem[1].eval()  # a layer that somebody froze
    model[1].fc.weight.requires_grad_(False)
    state = torch.get_rng_state()
    try:
        for attack in (FGSM(4), PGD(4, steps=2), CW(1, 3)):
            craft(model, images[:8], labels[:8], attack)
        assert model.training and model[1].fc.training and not model[1].stem[1].training
        wanted = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert wanted == ["1.fc.weight"]
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "BatchNorm was updated"
    finally:
        model[1].fc.weight.requires_grad_(True)
        model.eval()


def test_works_inside_no_grad(model, images, labels):
    with torch.no_grad(), torch.inference_mode():
        inside = craft(model, images[:8], labels[:8], FGSM(4)).images
    assert torch.equal(inside, craft(model, images[:8], labels[:8], FGSM(4)).images)


def test_pgd_is_foolbox_pgd(model, images, labels):
    """The loop is Foolbox's own: without a random start it gives the library's result bit for bit."""
    x, y = images[:16], labels[:16]
    with frozen(model):
        unmoved = {"noise": torch.ones_like(x)}  # for a random start, which it has not
        ours = craft_batch(model, x, y, PGD(4, steps=5, random_start=False), **unmoved)
    theirs = fb.attacks.LinfPGD(rel_stepsize=0.5, steps=5, random_start=False).run(
        fb.PyTorchModel(model.eval(), bounds=(0, 1)), x, fb.criteria.Misclassification(y), epsilon=4 / 255
    )
    assert (ours - theirs).abs().max() <= 2**-23


def test_margin_is_the_best_other_logit_minus_the_true_one():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 7.0]])
    assert torch.equal(margin(logits, torch.tensor([0, 1])), torch.tensor([-1.0, 2.0]))


def test_start_noise_moves_craft_batch(model, images, labels):
    x, y = images[:4], labels[:4]
    with frozen(model):
        still = craft_batch(model, x, y, PGD(4, steps=1, rel_stepsize=0.0))
        moved = craft_batch(model, x, y, PGD(4, steps=1, rel_stepsize=0.0), noise=torch.ones_like(x))
    assert torch.equal(still, x)
    assert torch.allclose(moved, (x + 4 / 255).clamp(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 255, y), "divide by 255"),
        (lambda x, y: (x - 0.5, y), r"\[0, 1\]"),
        (lambda x, y: (x * 0 + (1 + 2**-23), y), r"these reach 1\.00000012 to 1\.00000012: clamp them"),
        (lambda x, y: (x * 0 + 1.5, y), r"\[0, 1\]; these reach 1\.5 to 1\.5"),
        (lambda x, y: (x.clone().fill_(torch.nan), y), r"\[0, 1\]"),
        (lambda x, y: (x.squeeze(1), y), r"\(N, C, H, W\) in \[0, 1\], not \(4, 32, 32\) torch.float32"),
        (
            lambda x, y: (x.expand(-1, 3, -1, -1), y),
            r"takes grey images of shape \(B, 1, H, W\), not \(4, 3, 32, 32\)",
        ),
        (lambda x, y: ((x * 255).byte(), y), "to_tensor"),
        (lambda x, y: (x, y[:-1]), r"one an image, not \(3,\) torch.int64"),
        (lambda x, y: (x, y.float()), "integers"),
        (lambda x, y: (x, y + 3), r"0\.\.2, the model's classes, not 3 to 3"),
        (lambda x, y: (x[:0], y[:0]), "^no images were given$"),
    ],
)
def test_bad_input_is_named(model, images, labels, change, message):
    x, y = change(images[:4], labels[:4])
    with pytest.raises(ValueError, match=message):
        craft(model, x, y, FGSM(4))


def test_impossible_cw_is_named():
    with pytest.raises(ValueError, match="steps must be at least 1, not 0 and 9"):
        CW(steps=0)
    with pytest.raises(ValueError, match=r"confidence at least 0, not 0\.01, 0 and 0\.0"):
        CW(initial_const=0)


@pytest.mark.parametrize("arguments", [{"loss": "hinge"}, {"steps": 0}, {"restarts": 0}])
def test_impossible_pgd_is_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PGD(4, **arguments)
