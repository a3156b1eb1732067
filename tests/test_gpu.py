"""The GPU path: the same maths on a faster device. Skipped where there is no GPU."""

import numpy as np
import pytest
import torch

from fortify.attacks import CW, FGSM, PGD, craft
from fortify.evaluation import at_budget, check_rows, evaluate
from fortify.models import build_model, load_model, predict, save_model
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


def build_copy(model):
    copy = build_model("resnet_small", num_classes=3)
    copy.load_state_dict(model.state_dict())
    return copy.eval()
