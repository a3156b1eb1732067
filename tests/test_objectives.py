"""Robust objectives: each loss by hand on small numbers, and what each makes of a network."""

import numpy as np
import pytest
import torch
from torch import nn

from fortify.attacks import FGSM, PGD, ascend, craft, perturbation_norms
from fortify.augmentation import Augmentation
from fortify.models import build_model
from fortify.objectives import OBJECTIVES, GaussianNoise, Mart, NoisyFGSM, Step, Trades, WeightPerturbation
from fortify.training import Recipe, fit

STILL = Augmentation(flip=False, degrees=0, zoom=0, translate=0)


class Linear(nn.Module):
    """Logits of two pixels: their own values times ten."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(10 * torch.eye(2))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


def step(model, images, labels, attacks, **changes):
    def moved(parts):
        return [
            ascend(
                model,
                x,
                PGD(a.eps_255, steps=1, random_start=False),
                lambda z, y=y: -z.gather(1, y[:, None]).squeeze(1),
            )
            for a, x, y in parts
        ]

    given = dict(
        craft=moved,
        ascend=lambda attack, x, loss: ascend(model, x, attack, loss),
        predict=lambda x: model(x).detach(),
        random=torch.zeros_like,
        normal=torch.ones_like,
        loss=nn.functional.cross_entropy,
        mix=None,
    )
    return Step(model, images, labels, attacks, clean_share=0.0, **(given | changes))


X = torch.tensor([[0.6, 0.4], [0.3, 0.5]]).view(2, 1, 1, 2)
Y = torch.tensor([0, 1])
ATTACK = PGD(25.5, steps=1, rel_stepsize=1.0, random_start=False)  # a tenth


def log_p(x):
    return (10 * x.flatten(1)).log_softmax(1)


def test_trades_is_clean_cross_entropy_and_the_divergence_of_what_raises_it():
    loss, logits, labels = Trades(beta=2.0)(step(Linear(), X, Y, {ATTACK: 1.0}))
    away = torch.tensor([[-0.1, 0.1], [0.1, -0.1]]).view(2, 1, 1, 2)
    # At the clean image the divergence has no slope: its gradient is zero and nothing moves but by the start.
    clean = nn.functional.nll_loss(log_p(X), Y)
    assert loss.item() == pytest.approx(clean.item(), abs=1e-6)
    started = step(Linear(), X, Y, {ATTACK: 1.0}, ascend=lambda attack, x, loss: x + away)
    loss, logits, labels = Trades(beta=2.0)(started)
    p, q = log_p(X), log_p(X + away)
    apart = (p.exp() * (p - q)).sum(1).mean()
    assert loss.item() == pytest.approx((clean + 2 * apart).item(), rel=1e-5)
    assert torch.equal(labels, Y) and torch.allclose(logits.log_softmax(1), q, atol=1e-5)


def test_the_images_that_trades_attacks_raise_the_divergence_within_the_budget(model, images):
    clean = model(images[:8]).detach().log_softmax(1)
    noise = torch.rand(images[:8].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def apart(logits):
        return (clean.exp() * (clean - logits.log_softmax(1))).sum(1)

    attack = PGD(8, steps=10)
    found = ascend(model, images[:8], attack, apart, noise=noise)
    with torch.no_grad():
        start = apart(model((images[:8] + noise * 8 / 255).clamp(0, 1)))
        assert (apart(model(found)) > start).all()
    assert perturbation_norms(images[:8], found)[0].max() <= 8.001


def test_mart_weighs_what_is_unsure_when_clean():
    loss, _, _ = Mart(beta=3.0)(step(Linear(), X, Y, {ATTACK: 1.0}))
    moved = X + torch.tensor([[-0.1, 0.0], [0.0, -0.1]]).view(2, 1, 1, 2)
    p, q = log_p(X), log_p(moved)
    boosted = -q.gather(1, Y[:, None]) - (1 - q.exp().gather(1, 1 - Y[:, None])).log()
    apart = (p.exp() * (p - q)).sum(1)
    expected = boosted.mean() + 3 * (apart * (1 - p.exp().gather(1, Y[:, None]).squeeze(1))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_noise_of_n_fgsm_is_not_projected_back():
    seen = []

    def crafted(parts):
        ((attack, x, _),) = parts
        seen.append((attack, x))
        return [x]

    changes = {"craft": crafted, "random": torch.ones_like}
    NoisyFGSM(noise=2.0)(step(Linear(), X, Y, {ATTACK: 1.0}, **changes))
    attack, x = seen[0]
    assert attack == FGSM(25.5) and torch.allclose(x, (X + 0.2).clamp(0, 1))


def test_noise_is_added_as_wide_as_asked_for():
    loss, _, _ = GaussianNoise(sigma=0.5)(step(Linear(), X, Y, {}))
    assert loss.item() == pytest.approx(nn.functional.nll_loss(log_p(X + 0.5), Y).item())


def test_perturbed_weights_raise_the_loss_and_go_back():
    model = Linear()
    before = model.weight.detach().clone()
    own = step(model, X, Y, {})
    own = Step(**(vars(own) | {"clean_share": 1.0}))
    loss, _, _ = WeightPerturbation(gamma=0.1)(own)
    plain = nn.functional.cross_entropy(10 * X.flatten(1), Y)
    moved = model.weight.detach() - before
    assert moved.norm() == pytest.approx(0.1 * before.norm().item(), rel=1e-4) and loss > plain
    loss.backward()
    for call in own.later:
        call()
    assert torch.equal(model.weight, before) and model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["trades", "mart", "n_fgsm"])
def test_without_a_pgd_it_says_what_it_needs(name):
    with pytest.raises(ValueError, match="attacks by PGD"):
        OBJECTIVES[name]()(step(Linear(), X, Y, {FGSM(4): 1.0}))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("mix", "noise")])
def test_each_trains_a_network_that_holds_where_a_normal_one_falls(phantoms, images, labels, name):
    """On the training images themselves: it tests the objective and not what it generalises to."""
    some = phantoms.subset(range(0, 120, 2))
    recipe = Recipe(epochs=14, batch_size=20, lr=3e-3, augmentation=STILL, label_smoothing=0, clean_share=0)
    attack, standing = PGD(8, steps=3), {}
    for objective in (None, OBJECTIVES[name]()):
        net = build_model("resnet_small", num_classes=3, seed=0)
        attacks = {attack: 1.0} if objective else None
        fit(
            net,
            some,
            some,
            recipe if objective else Recipe(**(vars(recipe) | {"clean_share": 1.0})),
            attacks=attacks,
            objective=objective,
            val_attack=attack if objective else None,
            progress=False,
        )
        found = craft(net, images[::2], labels[::2], PGD(8, steps=10))
        standing[objective] = 1 - found.success.float().mean().item()
    normal, robust = standing.values()
    assert robust > normal + 0.2


def test_training_with_noise_holds_under_noise(phantoms, images, labels):
    some = phantoms.subset(range(0, 120, 2))
    noisy = images[::2] + 0.25 * torch.randn(images[::2].shape, generator=torch.Generator().manual_seed(1))
    right = []
    for objective in (None, GaussianNoise(0.25)):
        net = build_model("resnet_small", num_classes=3, seed=0)
        recipe = Recipe(epochs=14, batch_size=20, lr=3e-3, augmentation=STILL, label_smoothing=0)
        fit(net, some, some, recipe, objective=objective, progress=False)
        with torch.no_grad():
            right.append((net(noisy).argmax(1) == labels[::2]).float().mean().item())
    assert right[1] > right[0] + 0.1 and np.isfinite(right).all()
