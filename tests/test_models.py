"""Models: grey in, normalisation inside, safe on disk."""

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet, resnet50

from fortify.attacks import PGD, craft
from fortify.files import read_safetensors, write_safetensors
from fortify.models import BasicBlock, build_model, load_model, predict, save_model
from fortify.runtime import float32_convolutions, seeded


@pytest.mark.parametrize("arch", ["resnet_small", "resnet50", "densenet121", "squeezenet1_1", "googlenet"])
def test_any_classifier_takes_grey_images_and_gives_logits(arch):
    model = build_model(arch, num_classes=3, seed=0).train()
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 3)


def test_normalisation_and_channel_repeat_are_the_first_layer():
    x = torch.rand(2, 1, 8, 8)
    normalised = build_model("resnet_small", num_classes=3)[0](x)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (x.expand(-1, 3, -1, -1) - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    assert torch.equal(normalised, expected)


def test_resnet50_is_torchvisions():
    ours = {k[2:]: v.shape for k, v in build_model("resnet50", num_classes=3).state_dict().items()}
    assert ours == {k: v.shape for k, v in resnet50(num_classes=3).state_dict().items()}


@pytest.mark.parametrize(("before", "width", "stride"), [(24, 24, 1), (24, 48, 2)])
def test_the_basic_block_is_torchvisions(before, width, stride):
    """The same weights from the same generator, by the same names, and the same outputs bit for bit."""
    blocks = []
    for kind in (BasicBlock, resnet.BasicBlock):
        torch.manual_seed(0)
        shortcut = nn.Conv2d(before, width, 1, stride=stride) if stride > 1 else None
        blocks.append(kind(before, width, stride, shortcut).eval())
    own, theirs = (block.state_dict() for block in blocks)
    assert list(own) == list(theirs) and all(torch.equal(own[k], theirs[k]) for k in own)
    x = torch.randn(2, before, 16, 16)
    with torch.no_grad():
        assert torch.equal(blocks[0](x.clone()), blocks[1](x.clone()))


def test_seed_fixes_the_weights_and_leaves_the_global_generator():
    state = torch.get_rng_state()
    seeds = (0, np.int64(0), 1)
    a, b, c = (build_model("resnet_small", num_classes=3, seed=s)[1].fc.weight for s in seeds)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())


def test_work_on_the_cpu_leaves_the_generators_of_gpus(monkeypatch):
    def touched(seed):
        raise AssertionError("a GPU's generator was seeded")

    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, touched)
    build_model("resnet_small", num_classes=3, seed=7)
    state = torch.get_rng_state()
    with seeded(7, "cpu"):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(state, torch.get_rng_state())


def _setting(name):
    """A setting of TF32 by its name, as somebody's program may have made it."""
    if name == "rnn":
        torch.backends.cudnn.rnn.fp32_precision = "ieee"
    elif name == "allow not":
        torch.backends.cudnn.allow_tf32 = False
    elif name.startswith("all "):
        torch.backends.fp32_precision = name.removeprefix("all ")
    elif name:
        torch.backends.cudnn.conv.fp32_precision = name


SETTINGS = ["", "ieee", "all tf32", "all ieee", "allow not", "rnn"]


@pytest.fixture(scope="module")
def ended():
    """{setting: exit status of a process that made it and checked the convolutions}.

    Each a fork of one that has imported torch, which takes longer than the check. Torch's newer and older
    settings do not mix, and there is no way back.
    """
    code = f"""import json, os, sys, traceback
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_models
ended = {{}}
for name in test_models.SETTINGS:
    if not (child := os.fork()):
        try:
            test_models._setting(name)
            test_models._check_convolutions(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ended[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(ended))"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SETTINGS)
def test_convolutions_are_in_float32_whatever_was_set_and_as_before_after_it(ended, name):
    assert ended[name] == 0


def _check_convolutions(name):
    cudnn = torch.backends.cudnn

    def settings():
        return cudnn.conv.fp32_precision, cudnn.deterministic

    before = settings()
    with float32_convolutions("cuda"):
        assert settings()[0] != "tf32" and not cudnn.deterministic
    with float32_convolutions("cuda", deterministic=True):
        inside = settings()
        assert inside[0] != "tf32" and cudnn.deterministic
        with float32_convolutions("cuda"):
            assert settings() == inside
            # A convolution asks for these settings on a CPU too: mixed ones would be an error here.
            nn.Conv2d(3, 4, 3)(torch.rand(1, 3, 8, 8)).sum().backward()
        with pytest.raises(KeyError), float32_convolutions("cuda"):
            raise KeyError
        assert settings() == inside
        if name in ("", "allow not"):
            assert not cudnn.allow_tf32, "what a model or the compiler may ask for"
    assert settings() == before
    with float32_convolutions("cpu"):
        assert settings() == before


def test_predict_takes_images_in_the_weights_type(model, images):
    expected = predict(model, images)
    assert torch.equal(predict(model, images.double()), expected)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(images[0].numel(), 3)).double()
    assert predict(net, images).dtype == torch.float32


def test_a_model_without_weights_is_one_of_the_cpu(images):
    class Brightness(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)

    assert predict(Brightness(), images[:4]).shape == (4, 2)
    found = craft(Brightness(), images[:4], torch.zeros(4, dtype=torch.long), PGD(4, steps=2))
    assert found.images.shape == images[:4].shape


def test_imagenet_weights_fill_all_but_the_head(monkeypatch):
    import torchvision

    donor = resnet50(num_classes=1000)
    weights = torchvision.models.ResNet50_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **_: donor.state_dict())
    net = build_model("resnet50", num_classes=3, weights="imagenet", seed=0)[1]
    assert torch.equal(net.layer4[2].conv3.weight, donor.layer4[2].conv3.weight)
    assert net.fc.weight.shape == (3, 2048)


def test_the_classifying_layer_is_fresh_whatever_the_number_of_classes(monkeypatch):
    import torchvision

    donor = torchvision.models.squeezenet1_1(num_classes=1000)
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **_: donor.state_dict())
    scratch, net = (
        build_model("squeezenet1_1", num_classes=1000, weights=w, seed=0)[1] for w in (None, "imagenet")
    )
    assert torch.equal(net.features[0].weight, donor.features[0].weight)
    assert torch.equal(net.classifier[1].weight, scratch.classifier[1].weight)


def test_imagenet_weights_of_a_densenet_are_taken_by_their_older_names(monkeypatch):
    import torchvision

    donor = torchvision.models.densenet121(num_classes=1000).state_dict()
    files = {k: v for k, v in donor.items() if not k.endswith("num_batches_tracked")}
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in files.items()}
    assert older.keys() != files.keys()
    weights = torchvision.models.DenseNet121_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **_: older)
    net = build_model("densenet121", num_classes=3, weights="imagenet", seed=0)[1].state_dict()
    assert all(torch.equal(v, donor[k]) for k, v in net.items() if not k.startswith("classifier"))


def test_no_network_is_one_clear_error(monkeypatch):
    import torchvision

    def refuse(self, **_):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", refuse)
    with pytest.raises(OSError, match="weights=None"):
        build_model("resnet50", num_classes=3, weights="imagenet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "resnet51"}, "unknown arch"),
        ({"arch": "fcn_resnet50"}, "unknown arch"),  # a segmentation net
        ({"arch": "resnet50", "weights": "best"}, "imagenet"),
        ({"arch": "resnet_small", "weights": "best.pth"}, "safetensors"),
        ({"arch": "resnet_small", "weights": "imagenet"}, "no ImageNet"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(num_classes=3, **arguments)


def test_colour_batches_are_refused():
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        build_model("resnet_small", num_classes=3)(torch.rand(2, 3, 8, 8))


def test_round_trip_through_the_file(model, images, tmp_path):
    save_model(tmp_path / "m.safetensors", model, info={"class_names": ["a", "b", "c"]})
    loaded = load_model(tmp_path / "m.safetensors")
    assert torch.equal(predict(loaded, images), predict(model, images))
    assert loaded.arch == "resnet_small" and loaded.info == {"class_names": ["a", "b", "c"]}
    assert not loaded.training


def test_the_same_model_is_the_same_bytes_whichever_process_writes_it(model, tmp_path):
    save_model(tmp_path / "here.safetensors", model, info={"class_names": ["a", "b"], "more": 1})
    again = "import sys; from fortify.models import load_model, save_model; source, target = sys.argv[1:]"
    again += "; model = load_model(source); save_model(target, model, info=model.info)"
    for other in ("1", "2", "3"):  # the order of a hash map changes by process
        done = subprocess.run([sys.executable, "-c", again, tmp_path / "here.safetensors", tmp_path / other])
        assert done.returncode == 0
        assert (tmp_path / other).read_bytes() == (tmp_path / "here.safetensors").read_bytes()


def test_weights_of_something_else_are_refused(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "m.safetensors", metadata={"arch": "resnet_small"})
    with pytest.raises(ValueError, match="no model of this project"):
        load_model(tmp_path / "m.safetensors")
    save_file({}, tmp_path / "m.safetensors", metadata={"fortify": "{"})
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(tmp_path / "m.safetensors")


def test_predict_is_in_eval_mode_and_restores_the_mode(model, images):
    model.train()
    probabilities = predict(model, images, batch_size=7)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert torch.allclose(probabilities, model(images).softmax(1), atol=1e-6)


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b"", lambda b: pickle.dumps({"a": 1})])
def test_a_damaged_or_foreign_file_is_refused(model, tmp_path, damage):
    path = tmp_path / "m.safetensors"
    save_model(path, model)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(path)


def test_weights_of_another_architecture_are_refused(model, tmp_path):
    other = build_model("resnet18", num_classes=3)
    other.arch = "resnet_small"
    save_model(tmp_path / "m.safetensors", other)
    with pytest.raises(ValueError, match="resnet_small"):
        load_model(tmp_path / "m.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="m.safetensors"):
        load_model(tmp_path / "m.safetensors")


def tensors(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("classes", [3, 5])
def test_weights_of_a_saved_model_are_taken_and_its_classes_where_they_are_as_many(model, tmp_path, classes):
    save_model(tmp_path / "m.safetensors", model)
    scratch, warm = (
        tensors(build_model("resnet_small", num_classes=classes, weights=weights, seed=0))
        for weights in (None, tmp_path / "m.safetensors")
    )
    own = tensors(model)
    for name in warm:
        expected = scratch if name.startswith("1.fc.") and classes != 3 else own
        assert torch.equal(warm[name], expected[name]), name


def test_weights_of_a_bare_state_dict_are_taken_with_and_without_its_classifying_layer(tmp_path):
    donor = resnet.resnet18(num_classes=3).state_dict()
    bare = {k: v for k, v in donor.items() if not k.endswith("num_batches_tracked")}
    headless = {k: v for k, v in bare.items() if not k.startswith("fc.")}
    scratch = build_model("resnet18", num_classes=3, seed=0)[1].state_dict()
    for given, of_head in ((bare, donor), (headless, scratch)):
        save_file(given, tmp_path / "m.safetensors")
        path = str(tmp_path / "m.safetensors")
        net = build_model("resnet18", num_classes=3, weights=path, seed=0)[1].state_dict()
        assert all(torch.equal(net[k], bare[k]) for k in headless)
        assert torch.equal(net["fc.weight"], of_head["fc.weight"])


def test_weights_that_do_not_fit_are_refused_and_named(model, tmp_path):
    path = tmp_path / "m.safetensors"

    def refused(arch="resnet_small"):
        with pytest.raises(ValueError) as caught:
            build_model(arch, num_classes=3, weights=path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    with pytest.raises(FileNotFoundError, match="m.safetensors"):
        build_model("resnet_small", num_classes=3, weights=path)
    save_model(path, model)
    assert "resnet_small, not of resnet18" in refused("resnet18")
    bare = {k: v.contiguous() for k, v in tensors(model[1]).items()}
    save_file({f"net.{k}": v for k, v in bare.items()}, path)
    assert "nothing in common" in refused() and "net.fc.bias" in refused()
    save_file({k: v for k, v in bare.items() if k != "stem.0.weight"} | {"more": torch.ones(1)}, path)
    assert "stem.0.weight (1) missing; more (1) not in the net" in refused()
    save_file(bare | {"stem.0.weight": torch.ones(24, 3, 5, 5)}, path)
    assert "stem.0.weight (1) of another shape" in refused()
    path.write_bytes(b"half")
    assert "not a whole safetensors file" in refused()


def test_weights_stored_in_float16_are_loaded_in_float32(model, images, tmp_path):
    save_model(tmp_path / "m.safetensors", model)
    stored, metadata = read_safetensors(tmp_path / "m.safetensors")
    half = {k: v.half() if v.is_floating_point() else v for k, v in stored.items()}
    write_safetensors(tmp_path / "half.safetensors", half, metadata)
    loaded = load_model(tmp_path / "half.safetensors")
    kinds = {v.dtype for v in loaded.state_dict().values()}
    assert kinds == {torch.float32, torch.int64} and len(half) == len(stored)
    assert torch.equal(loaded[1].fc.weight, model[1].fc.weight.half().float())
    assert (predict(loaded, images) - predict(model, images)).abs().max() < 0.05


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "resnet18", "resnet_small"])
def test_batchnorm_follows_its_statistics_fast_enough_for_attacks_in_eval_mode(arch):
    """torchvision's MobileNet has 0.01."""
    norms = [m for m in build_model(arch, num_classes=3).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and {m.momentum for m in norms} == {0.1}
