"""The GPU path: the same maths on a faster device. Skipped where there is no GPU."""

import numpy as np
import pytest
import torch

from fortify.attacks import CW, FGSM, PGD, craft
from fortify.audit import AuditData, Suite, audit
from fortify.evaluation import at_budget, check_rows
from fortify.models import build_model, load_model, predict, save_model
from fortify.scoring import evaluate
from fortify.training import Recipe, fit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
THIRDS = {FGSM(4): 1 / 3, PGD(4, steps=2): 1 / 3, PGD(4, steps=2, loss="margin"): 1 / 3}


def test_training_evaluation_and_files_on_the_gpu(phantoms, images, labels, tmp_path):
    model = build_model("resnet_small", num_classes=3, seed=0).cuda()
    recipe = Recipe(epochs=3, batch_size=16, lr=3e-3)
    attack = PGD(4, steps=2)
    history = fit(model, phantoms, phantoms, recipe, attacks=THIRDS, val_attack=attack, checkpoints=tmp_path)
    assert len(history) == 3 and np.isfinite(history.train_loss).all()
    resumed = build_model("resnet_small", num_classes=3, seed=0).cuda()
    again = fit(resumed, phantoms, phantoms, recipe, attacks=THIRDS, val_attack=attack, checkpoints=tmp_path)
    assert again.equals(history), "three finished epochs are on disk"
    attacks = [FGSM(4), PGD(4, steps=3), CW(binary_search_steps=2, steps=20, stepsize=0.05)]
    ids = {"index": np.arange(len(images)), "model_name": "normal", "split": "random", "seed": 0}
    rows, _ = evaluate(model, images, labels, attacks, batch_size=50, **ids)
    check_rows(rows)
    at_budget(rows, eps_255=4, cw_l2=1.0)
    save_model(tmp_path / "m.safetensors", model)
    on_cpu = load_model(tmp_path / "m.safetensors")
    assert (predict(on_cpu, images) - predict(model, images)).abs().max() < 1e-3


def test_logits_are_float32_under_autocast(images):
    model = build_model("resnet_small", num_classes=3, seed=0).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        assert model(images[:4].cuda()).dtype == torch.float32


def test_attacks_on_the_gpu_find_what_they_find_on_the_cpu(model, images, labels):
    here = craft(model, images, labels, PGD(4, steps=3))
    there = craft(build_copy(model).cuda(), images, labels, PGD(4, steps=3))
    assert (here.success == there.success).float().mean() > 0.97
    assert there.images.device.type == "cpu"


def test_own_nets_and_tensors_of_the_gpu_are_taken(phantoms, images, labels):
    side = phantoms.images.shape[1]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(side * side, 3)).cuda()
    fit(net, phantoms, phantoms, Recipe(epochs=1, batch_size=16), attacks=THIRDS, progress=False)
    model = build_model("resnet_small", num_classes=3, seed=0).cuda()
    x, y = images.cuda(), torch.as_tensor(labels).cuda()
    ids = {"index": np.arange(len(images)), "model_name": "normal", "split": "random", "seed": 0}
    rows, _ = evaluate(model, x, y, [FGSM(4), CW(binary_search_steps=1, steps=3)], **ids)
    check_rows(rows)
    right = predict(model, x).argmax(1) == y.cpu()
    assert right.any(), "an untrained model names one class at least"
    suite = Suite(eps_255=4, pgd_steps=3, restarts=2, square_queries=20, autoattack_steps=3)
    found = audit(model, AuditData(x, y), suite, only=("T0", "T1", "T3", "T7"))
    assert "one seed" not in found.table.set_index("id").measured["T0"], "the same attack is the same twice"


def test_training_on_compiled_code(phantoms):
    model = build_model("resnet_small", num_classes=3, seed=0).cuda()
    recipe = Recipe(epochs=1, batch_size=16)
    history = fit(model, phantoms, phantoms, recipe, attacks=THIRDS, compiled=True, progress=False)
    assert np.isfinite(history.train_loss).all()


def test_predictions_where_tf32_was_set_by_its_newer_name(images):
    model = build_model("resnet_small", num_classes=3, seed=0).cuda()
    before = torch.backends.cudnn.conv.fp32_precision
    expected = predict(model, images)
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert torch.allclose(predict(model, images), expected, atol=1e-6)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def build_copy(model):
    copy = build_model("resnet_small", num_classes=3)
    copy.load_state_dict(model.state_dict())
    return copy.eval()
