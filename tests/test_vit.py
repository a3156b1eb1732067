"""The small transformer, and the small networks beside it: any size, any place told apart, trainable."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fortify.attacks import PGD
from fortify.augmentation import Augmentation
from fortify.comparison import size_of
from fortify.fused import FusedModel
from fortify.models import SMALL, build_model, load_model, predict, predict_logits, save_model
from fortify.training import Recipe, fit
from fortify.vit import PATCH, Block, ConvStemViT, places


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("side", [32, 50, 112, 224])
def test_small_networks_take_slices_of_any_size(arch, side):
    model = build_model(arch, num_classes=3, seed=0)
    assert predict_logits(model, torch.rand(2, 1, side, side)).shape == (2, 3)


@pytest.mark.parametrize("arch", ["convnext_atto", "vit_conv_stem"])
def test_they_are_small_enough_for_two_cores(arch):
    """Below a third of ResNet-18's work, which is 485 million multiply-adds."""
    about = size_of(build_model(arch, num_classes=3), 112)
    assert about["parameters"] < 4e6 and 100 < about["multiply_adds"] < 160


@pytest.mark.parametrize("arch", SMALL)
def test_attacks_follow_a_fused_copy_of_them(arch):
    model = build_model(arch, num_classes=3, seed=0).eval()
    x = torch.rand(4, 1, 64, 64)
    assert FusedModel(model, x).net is not model


@pytest.mark.parametrize("arch", SMALL)
def test_they_come_back_from_disk(arch, tmp_path):
    model, x = build_model(arch, num_classes=3, seed=1), torch.rand(2, 1, 32, 32)
    save_model(tmp_path / "m.safetensors", model)
    assert torch.equal(predict(load_model(tmp_path / "m.safetensors"), x), predict(model, x))


@pytest.mark.parametrize("arch", ["convnext_atto", "vit_conv_stem"])
def test_they_have_no_imagenet_weights(arch):
    with pytest.raises(ValueError, match=f"{arch} has no ImageNet weights"):
        build_model(arch, num_classes=3, weights="imagenet")


@pytest.mark.parametrize("arch", ["convnext_atto", "vit_conv_stem"])
def test_they_learn_phantoms_normally_and_under_attack(arch, phantoms):
    """More than the largest class, of slices that they are trained on."""
    still = Augmentation(flip=False, degrees=0, zoom=0, translate=0)
    recipe = Recipe(epochs=16, batch_size=20, lr=2e-3, augmentation=still, label_smoothing=0, layer_decay=0.9)
    some = phantoms.subset(np.arange(0, len(phantoms), 2))
    largest = np.bincount(some.labels).max() / len(some)
    for attacks in ({}, {PGD(1, steps=2): 1.0}):
        model = build_model(arch, num_classes=3, seed=0)
        own = replace(recipe, clean_share=0.0) if attacks else recipe
        history = fit(model, some, some, own, attacks=attacks, progress=False)
        assert history.val_accuracy.max() > largest + 0.1


def test_a_token_is_a_patch_and_its_place_counts():
    net = ConvStemViT(3).eval()
    seen = []
    net.blocks.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.rand(1, 3, 3 * PATCH, 2 * PATCH)
    logits = net(x)
    assert seen[0].shape == (1, 6, 192)
    assert not torch.allclose(net(x.flip(2)), logits, atol=1e-4)


def test_every_place_of_a_grid_is_another_and_rows_are_not_columns():
    found = places(7, 7, 192)
    apart = torch.cdist(found, found) + 1e9 * torch.eye(49)
    assert found.shape == (49, 192) and apart.min() > 0.1
    assert torch.equal(places(7, 5, 192).view(7, 5, -1)[2, 3], found.view(7, 7, -1)[2, 3])


def test_a_block_is_torchs_transformer_block():
    own = Block(8, 2).eval()
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, nn.GELU(), norm_first=True, batch_first=True).eval()
    names = {"norm1": "norm1", "norm2": "norm2", "self_attn.out_proj": "projection"}
    names |= {"linear1": "mlp.0", "linear2": "mlp.2"}
    state = theirs.state_dict()
    given = {f"{own}.{w}": state[f"{of}.{w}"] for of, own in names.items() for w in ("weight", "bias")}
    given |= {f"qkv.{w}": state[f"self_attn.in_proj_{w}"] for w in ("weight", "bias")}
    own.load_state_dict(given)
    x = torch.randn(2, 5, 8)
    assert torch.allclose(own(x), theirs(x), atol=1e-5)
