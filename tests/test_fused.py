"""The fused is the model's function, or the model itself; the loop for training batches is Foolbox's."""

import importlib.util
import shutil

import pytest
import torch
from torch import nn

from fortify.attacks import CW, FGSM, PGD, craft, craft_batch, craft_parts
from fortify.fused import FusedModel, GreyStem
from fortify.models import Normalise, build_model, predict
from fortify.runtime import frozen

THREE = (FGSM(4), PGD(4, steps=3), PGD(2, steps=5, loss="margin"))


def lived_in(arch, side=64):
    """A model whose BatchNorm statistics are not the initial ones, and images for it."""
    model = build_model(arch, num_classes=3, seed=0)
    x = torch.rand(6, 1, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.train()(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(2))
            nn.init.uniform_(module.bias, -0.3, 0.3, generator=torch.Generator().manual_seed(3))
    return model.eval(), x


def input_gradient(model, x):
    z = x.clone().requires_grad_()
    return torch.autograd.grad(model(z).logsumexp(1).sum(), z)[0]


ARCHS = ("resnet_small", "resnet18", "resnet50", "densenet121", "mobilenet_v2", "vgg11_bn", "googlenet")
no_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
LITE0 = pytest.param("efficientnet_lite0", marks=no_timm)


@pytest.mark.parametrize("arch", [*ARCHS, LITE0])
def test_same_logits_and_same_gradients(arch):
    model, x = lived_in(arch)
    model, x = model[:2].double(), x.double()  # without the layer that rounds logits to float32
    fused = FusedModel(model, x[:1]).net
    assert fused is not model, "nothing was fused"
    assert torch.allclose(fused(x), model(x), rtol=1e-9, atol=1e-12)
    ours, theirs = input_gradient(fused, x), input_gradient(model, x)
    assert (ours - theirs).norm() < 1e-9 * theirs.norm()
    assert not any(p.requires_grad for p in fused.parameters())
    assert not any(module.training for module in fused.modules())


@pytest.mark.parametrize("arch", ["resnet_small", "resnet18", "resnet50", LITE0])
def test_nothing_is_left_to_fuse(arch):
    model, x = lived_in(arch)
    left = list(FusedModel(model, x[:1]).net.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in left)
    assert [type(m) for m in left].count(GreyStem) == 1
    assert sum(isinstance(m, nn.ReLU6) for m in left) == sum(isinstance(m, nn.ReLU6) for m in model.modules())


@no_timm
@pytest.mark.parametrize("side", [32, 33, 48])
@pytest.mark.parametrize("size", [3, 5, 7])
def test_grey_stem_pads_as_tensorflow_where_the_convolution_does(size, side):
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    conv, normalise = Conv2dSame(3, 8, size, stride=2), Normalise(mean=(0.5,) * 3, std=(0.2, 0.3, 0.4))
    assert GreyStem.fits(conv)
    x = torch.rand(2, 1, side, side + 2)
    assert torch.allclose(GreyStem(normalise, conv)(x), conv(normalise(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [32, 33, 48])
@pytest.mark.parametrize(("size", "pad"), [(7, 3), (3, 1), (4, 1), (5, 2), (2, 0), (6, 2)])
def test_grey_stem_is_the_three_channel_convolution(size, pad, side):
    torch.manual_seed(0)
    conv, normalise = nn.Conv2d(3, 8, size, stride=2, padding=pad), Normalise()
    assert GreyStem.fits(conv)
    stem, x = GreyStem(normalise, conv), torch.rand(2, 1, side, side + 2)
    assert torch.allclose(stem(x), conv(normalise(x)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        conv.weight.neg_()
        conv.bias += 1
    stem.refresh()
    assert torch.allclose(stem(x), conv(normalise(x)), rtol=1e-5, atol=1e-5)


def test_refresh_takes_over_what_training_changed():
    model, x = lived_in("resnet_small")
    fused = FusedModel(model, x[:1])
    before = fused.net(x)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    optimizer.step()
    model.eval()
    assert not torch.allclose(before, model(x), atol=1e-3)
    assert torch.allclose(fused.refresh()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet_small", "resnet18", "convnext_tiny", LITE0])
def test_weights_rounded_beforehand_are_those_that_autocast_rounds(arch):
    """Bit for bit, before and after a step of training; what autocast leaves in float32 stays so."""
    model, x = lived_in(arch)
    x, y = x[:2], torch.tensor([0, 1])
    plain, rounded = FusedModel(model, x[:1]), FusedModel(model, x[:1], autocast=True)
    assert rounded.net is not model
    kinds = {
        type(m)
        for m in rounded.net.modules()
        for p in m.parameters(recurse=False)
        if p.dtype != p.float().dtype
    }
    assert kinds and all(issubclass(kind, nn.Conv2d | nn.Linear) for kind in kinds)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) * 2 - 1
    for _ in range(2):
        with frozen(model), torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (
                craft_parts(model, [(PGD(4, steps=2), x, y, noise)], fused=fused.refresh())[0]
                for fused in (rounded, plain)
            )
            assert torch.equal(rounded.net(x), plain.net(x))
            stems = [m for fused in (rounded, plain) for m in fused.net.modules() if isinstance(m, GreyStem)]
            assert all(stem(x).dtype == torch.bfloat16 for stem in stems), "the largest activation of all"
        assert torch.equal(ours, theirs)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_fused_model_crafts_alike_and_is_compiled_once_for_sizes_that_differ_by_an_image():
    model, x = lived_in("resnet_small", 32)
    y, noise = torch.tensor([0, 1, 2, 0, 1, 2]), torch.rand(x.shape) * 2 - 1
    plain, compiled, sizes = FusedModel(model, x[:1]), FusedModel(model, x[:1], compiled=True), []
    plain.net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for n in (6, 5, 6, 3):
        with frozen(model):
            ours, theirs = (
                craft_parts(model, [(PGD(4, steps=2), x[:n], y[:n], noise[:n])], fused=fused.refresh())[0]
                for fused in (compiled, plain)
            )
        assert sizes[-1] == n and ours.shape == theirs.shape and not torch.equal(ours, x[:n])
        same = (ours - theirs).abs() < 1e-6  # a gradient of about nothing may have either sign
        assert same.float().mean() > 0.999
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01  # the next attack is on other weights: refresh reaches the compiled code
    assert counters["unique_graphs"] - before == 1


class Backwards(nn.Module):
    """Lists a convolution before a BatchNorm that it calls first."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.LazyLinear(3)

    def forward(self, x):
        return self.fc(self.conv(self.norm(x).square()).flatten(1))


class Noisy(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + torch.randn(len(x), 3)


def test_what_cannot_be_fused_is_attacked_itself():
    x = torch.rand(4, 1, 32, 32)
    backwards = Backwards()
    backwards(x)
    backwards.norm.running_mean.fill_(0.7)
    noisy = Noisy(lived_in("resnet_small", 32)[0])
    uncopyable, _ = lived_in("resnet_small", 32)
    uncopyable.trace = (x.requires_grad_() * 2).sum()  # deepcopy refuses tensors that have a history
    for model in (backwards.eval(), noisy.eval(), uncopyable):
        assert FusedModel(model, x[:1].detach()).net is model


def test_what_cannot_be_fused_is_found_out_before_training_too():
    """A fresh BatchNorm changes nothing, so that fusing it anywhere gives the same logits at first."""
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    backwards, apart = Backwards().eval(), build_model("resnet_small", num_classes=3, seed=0).eval()
    backwards(x)
    for model, folds in ((backwards, False), (apart, True)):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert (FusedModel(model, x[:1]).net is not model) == folds
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("arch", [*ARCHS, LITE0])
def test_an_untrained_model_is_fused(arch):
    model, x = build_model(arch, num_classes=3, seed=0).eval(), torch.rand(1, 1, 64, 64)
    assert FusedModel(model, x).net is not model


def test_hooked_and_parametrised_layers_stay_as_they_are():
    model, x = lived_in("resnet_small", 32)
    seen = []
    model[1].stem[0].register_forward_hook(lambda *_: seen.append(1))
    nn.utils.parametrizations.spectral_norm(model[1].stages[0].conv1)
    net = FusedModel(model.eval(), x[:1]).net
    kinds = [type(m) for m in net.modules()]
    assert net is not model and kinds.count(nn.BatchNorm2d) == 2 and GreyStem not in kinds
    seen.clear()
    net(x)
    assert seen, "the hook is still called"


def test_attacks_follow_the_fused_model(model, images, labels):
    """The model is asked at first, and about what was found; the fused one is compared at both, no more."""
    asked = []
    hook = model.register_forward_hook(lambda module, *_: asked.append(module is model))
    craft(model, images[:8], labels[:8], PGD(4, steps=3))
    hook.remove()
    assert asked.count(True) == 2 and asked.count(False) == 1 + 3 + 1


def test_the_model_itself_says_what_was_achieved(model, images, labels):
    """Where the two differ, success is what the model says, and a CW that only fools the fused has failed."""
    right = predict(model, images).argmax(1) == labels
    x, y = images[right][:16], labels[right][:16]
    wrong = build_model("resnet_small", num_classes=3, seed=5).eval()
    with frozen(model):
        found = craft_batch(model, x, y, CW(2, 20, 0.05), fused=wrong)
        fooled = model(found).argmax(1) != y
    assert torch.equal(found[~fooled], x[~fooled])
    assert not fooled.all(), "the other net's attacks must not all transfer, or this tests nothing"


@pytest.mark.parametrize(
    "attack", [PGD(4, steps=6), PGD(3, steps=4, rel_stepsize=0.5, loss="margin"), FGSM(4)]
)
def test_perturbations_are_those_of_the_plain_model(model, images, labels, attack):
    """The sign of a gradient near zero may turn with the rounding: a few pixels in a thousand, no verdict."""
    found = craft(model, images, labels, attack)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with frozen(model):
        plain = craft_batch(model, images, labels, attack, noise=noise)
    assert (found.images - plain).abs().gt(1e-6).float().mean() < 0.01
    assert torch.equal(found.success, predict(model, plain).argmax(1) != labels)


@pytest.mark.parametrize("attack", [*THREE, PGD(4, steps=2, random_start=False)], ids=repr)
def test_the_training_loop_is_foolbox_bit_for_bit(model, images, labels, attack):
    x, y = (3 * images[:12] - 1).clamp(0, 1), labels[:12]  # with black and white, where steps are cut short
    assert (x == 0).any() and (x == 1).any()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    used = noise if getattr(attack, "random_start", False) else None
    with frozen(model):
        theirs = craft_batch(model, x, y, attack, noise=used)
        (ours,) = craft_parts(model, [(attack, x, y, noise)])
    assert torch.equal(ours, theirs)


def test_parts_of_a_batch_come_back_each_in_its_place(model, images, labels):
    attacks = (*THREE, CW(1, 5, 0.05), PGD(0, steps=2))
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    cuts = [slice(20 * i, 20 * i + 15 + i) for i in range(len(attacks))]
    parts = [(a, images[c], labels[c], noise[c]) for a, c in zip(attacks, cuts, strict=True)]
    with frozen(model):
        together = craft_parts(model, parts)
        alone = [craft_batch(model, x, y, a, noise=n) for a, x, y, n in parts]
    for ours, theirs in zip(together, alone, strict=True):
        # One pass of another batch size may round another way.
        assert ours.shape == theirs.shape and (ours - theirs).abs().gt(1e-6).float().mean() < 0.01


def test_parts_follow_the_fused_model_and_cw_is_checked_on_the_model(model, images, labels):
    net, asked = FusedModel(model, images[:1]).net, []
    hooks = [m.register_forward_hook(lambda module, *_: asked.append(module is net)) for m in (net, model)]
    cw, x, y = CW(2, 3, 0.05), images[:4], labels[:4]
    for attacks, on_fused, on_model in (
        ((cw,), 6, 1),
        ((FGSM(0.5),), 1, 0),
        ((PGD(4, steps=2), cw), 2 + 6, 1),
    ):
        asked.clear()
        with frozen(model):
            found = craft_parts(model, [(a, x, y, torch.zeros_like(x)) for a in attacks], fused=net)
        assert len(found) == len(attacks)
        assert (asked.count(True), asked.count(False)) == (on_fused, on_model), attacks
    for hook in hooks:
        hook.remove()


class Half(nn.Module):
    """Sees the upper half of an image alone."""

    def __init__(self, model):
        super().__init__()
        self.model, self.num_classes = model, model.num_classes

    def forward(self, x):
        return self.model(x * (torch.arange(x.shape[2]) < x.shape[2] // 2).view(-1, 1))


def test_what_the_network_does_not_see_is_left_as_it_is(model, images, labels):
    half, x, y = Half(model), images[:8], labels[:8]
    still = PGD(4, steps=2, random_start=False)
    with frozen(half):
        (together,) = craft_parts(half, [(still, x, y, torch.ones_like(x))])
    for found in (together, craft(half, x, y, still).images, craft(half, x, y, FGSM(4)).images):
        changed = (found != x).any(1).any(2).any(0)
        assert changed[:16].all() and not changed[16:].any()
