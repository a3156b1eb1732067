"""Published weights: what is loaded is what was published, and the card says what it is."""

import hashlib
import json
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from fortify import published
from fortify.files import read_safetensors, write_json
from fortify.models import build_model, load_model, predict, save_model
from fortify.published import load_published, publish_model, published_sha256
from fortify.splits import random_split, write_split
from fortify.workflow import publish

NAMES = ("normal", "adversarial")
STAMP = {"device": "CPU (x86_64)", "finished": "2026-01-01T00:00:00+00:00"}
STAMP |= {"code": {"commit": "c0ffee"}, "versions": {"torch": "2.14.1"}, "data_sha256": "5" * 64}


def row(training, attack, k):
    percent = {f"{name}_percent": 100 * k / 40 for name in ("accuracy", "group_low", "group_high")}
    return {"model": training, "attack": attack, "k": k, "n": 40, "seeds": 2} | percent


@pytest.fixture
def build(tmp_path, monkeypatch, phantoms, model):
    """A checkout's folder of a finished profile, and its published tables. Its slices are the phantoms."""
    (tmp_path / "lib/fortify").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("FORTIFY_ROOT", str(tmp_path))
    folder, tables = tmp_path / "build/laptop", tmp_path / "paper/tables/laptop"
    run = folder / "random-s0"
    data = {"splits": ["random"], "seeds": [0], "size": 32, "dataset": "iq-oth-nccd", "crop": "none"}
    write_json(folder / "data/01_data.json", {"parameters": data})
    phantoms.save(folder / "data/slices.npz")
    split = random_split(phantoms.labels, seed=0)
    write_split(folder / "data/splits/random-s0.csv", phantoms, split)
    for notebook, parameters in (
        ("02_baseline", {"arch": "resnet_small", "lr": 0.003, "seed": 0}),
        ("03_attacks", {"eps_255": 4, "cw_l2": 0.5}),
        ("04_adversarial_training", {"train_eps_255": 16.0, "train_recipe": {"gamma": 0.4}}),
    ):
        write_json(run / f"{notebook}.json", STAMP | {"parameters": parameters})
        (tables / "runs/random-s0").mkdir(parents=True, exist_ok=True)
        shutil.copy(run / f"{notebook}.json", tables / "runs/random-s0")
    rows = [row(name, "pgd", 10 + i) for i, name in enumerate(NAMES)]
    pd.DataFrame(rows).to_csv(tables / "table1_random.csv", index=False)
    for name in NAMES:
        save_model(run / f"{name}.safetensors", model, info={"class_names": phantoms.class_names})
    return folder


@pytest.fixture
def models(build):
    publish.publish_weights(build)
    return build.parents[1] / "paper/models"


def test_what_is_loaded_predicts_as_what_was_trained(build, models, images, model):
    loaded = load_published("laptop/random-s0/adversarial")
    assert torch.equal(predict(loaded, images).argmax(1), predict(model, images).argmax(1))
    assert loaded.info["class_names"] == ["benign", "malignant", "normal"] and not loaded.training
    path = models / "laptop/random-s0/adversarial.safetensors"
    assert path.stat().st_size < 0.52 * (build / "random-s0/adversarial.safetensors").stat().st_size


def test_the_detectors_of_notebook_13_lie_beside_their_weights_and_fit_them(build, images, model):
    """Also where the weights were rounded to float16."""
    from fortify.detect import calibrate, load_detectors, save_detectors
    from fortify.detect.detectors import MaxSoftmax

    detector = calibrate(MaxSoftmax(), model, images[:30], np.arange(30))
    save_detectors(build / "random-s0/normal_detectors.safetensors", {"max softmax": detector}, size=32)
    publish.publish_weights(build)
    folder = build.parents[1] / "paper/models/laptop/random-s0"
    assert sorted(p.name for p in folder.glob("*_detectors*")) == ["normal_detectors.safetensors"]
    published_model = load_published("laptop/random-s0/normal")
    found, _ = load_detectors(folder / "normal_detectors.safetensors", published_model)
    assert found["max softmax"].threshold == detector.threshold
    assert [*published_sha256(build.parents[1] / "paper/models")] == [
        f"laptop/random-s0/{n}" for n in sorted(NAMES)
    ]


def test_checksums_are_what_sha256sum_checks(models):
    done = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=models, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 2, done.stderr


def test_a_changed_file_is_not_loaded(models):
    path = models / "laptop/random-s0/normal.safetensors"
    model = load_model(path)
    with torch.no_grad():
        model[1].fc.bias += 1
    save_model(path, model, info=model.info)  # a whole model, but another
    with pytest.raises(ValueError, match="not the file that was published"):
        load_published("laptop/random-s0/normal")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="git checkout"):
        load_published("laptop/random-s0/normal")


@pytest.mark.parametrize("name", ["laptop/random-s1/normal", "../../build/laptop/random-s0/normal", ""])
def test_an_unknown_name_lists_those_that_are_there(models, name):
    with pytest.raises(ValueError, match="laptop/random-s0/adversarial, laptop/random-s0/normal"):
        load_published(name)


def test_a_model_of_another_split_or_seed_is_not_tested_on_slices_it_may_have_seen(models):
    assert load_published("laptop/random-s0/normal", of_run="random-s0").arch == "resnet_small"
    for run in ("grouped-s0", "random-s1"):
        with pytest.raises(ValueError, match=f"another split or seed than {run}"):
            load_published("laptop/random-s0/normal", of_run=run)


def test_before_anything_is_published_it_says_how(build):
    with pytest.raises(FileNotFoundError, match="no weights have been published.*make laptop"):
        load_published("laptop/random-s0/normal")


def test_outside_a_checkout_it_says_where_the_weights_are(tmp_path, monkeypatch):
    monkeypatch.delenv("FORTIFY_ROOT", raising=False)
    monkeypatch.setattr(published, "__file__", str(tmp_path / "site-packages/fortify/published.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="in paper/models, not in the installed package"):
        load_published("laptop/random-s0/normal")


def test_an_editable_install_finds_its_checkout_from_anywhere(tmp_path, monkeypatch, models):
    root = tmp_path / "elsewhere"
    shutil.copytree(models.parents[1], root, ignore=shutil.ignore_patterns("build", "elsewhere"))
    monkeypatch.delenv("FORTIFY_ROOT")
    monkeypatch.setattr(published, "__file__", str(root / "lib/fortify/published.py"))
    monkeypatch.chdir("/")
    assert load_published("laptop/random-s0/normal").arch == "resnet_small"


def half_way(model, images):
    """A copy whose two likeliest classes of one image are so close that float16 turns the prediction."""
    copy = build_model("resnet_small", num_classes=3)
    copy.load_state_dict(model.state_dict())
    copy.eval()
    rounded = build_model("resnet_small", num_classes=3).eval()
    rounded.load_state_dict(
        {k: v.half() if v.is_floating_point() else v for k, v in copy.state_dict().items()}
    )
    with torch.no_grad():
        own, other = copy(images), rounded(images)
        gap = (own[:, 0] - own[:, 1]), (other[:, 0] - other[:, 1])
        image = int((gap[0] - gap[1]).abs().argmax())
        # Between the two gaps: one is then below zero, the other above; class 2 out of the way.
        copy[1].fc.bias[0] -= (gap[0][image] + gap[1][image]) / 2
        copy[1].fc.bias[2] -= 100
    return copy, images[image : image + 1]


def test_weights_stay_in_float32_where_float16_predicts_otherwise(model, images, tmp_path):
    close, image = half_way(model, images)
    save_model(tmp_path / "m.safetensors", close)
    half = {k: v.half() if v.is_floating_point() else v for k, v in close.state_dict().items()}
    rounded = build_model("resnet_small", num_classes=3).eval()
    rounded.load_state_dict(half)
    assert predict(rounded, image).argmax(1) != predict(close, image).argmax(1), "or this tests nothing"
    assert publish_model(tmp_path / "m.safetensors", tmp_path / "p.safetensors", image) == "float32"
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_weights_beyond_float16_stay_in_float32(model, images, tmp_path):
    large = build_model("resnet_small", num_classes=3)
    large.load_state_dict(model.state_dict())
    with torch.no_grad():
        large[1].stem[1].running_var[0], large[1].stem[1].weight[0] = 1e6, 0
    save_model(tmp_path / "m.safetensors", large)
    assert publish_model(tmp_path / "m.safetensors", tmp_path / "p.safetensors", images) == "float32"
    with pytest.raises(ValueError, match="no images"):
        publish_model(tmp_path / "m.safetensors", tmp_path / "p.safetensors", images[:0])


def test_float16_keeps_counters_and_metadata_and_is_the_same_bytes(model, images, tmp_path):
    save_model(tmp_path / "m.safetensors", model, info={"class_names": ["a", "b", "c"]})
    for name in ("p", "q"):
        kind = publish_model(tmp_path / "m.safetensors", tmp_path / f"{name}.safetensors", images)
        assert kind == "float16"
    tensors, metadata = read_safetensors(tmp_path / "p.safetensors")
    assert {str(v.dtype) for v in tensors.values()} == {"torch.float16", "torch.int64"}
    assert metadata == read_safetensors(tmp_path / "m.safetensors")[1]
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_the_card_says_what_it_is_and_what_it_is_not_for(models):
    card = (models / "laptop/random-s0/adversarial.md").read_text(encoding="utf-8")
    path = models / "laptop/random-s0/adversarial.safetensors"
    for said in (
        'load_published("laptop/random-s0/adversarial")',
        hashlib.sha256(path.read_bytes()).hexdigest(),
        "in float16",
        "not a medical device",
        "110 cases from two hospitals",
        "seen near-copies of their test slices",
        "CC BY 4.0",
        "10.17632/bhmdr45bh2.4",
        "random split, seed 0",
        "(B, 1, 32, 32)",
        "| PGD | 11/40 | 27.5 |",
        "pools this training's 2 seeds",
        "Linf budget 4/255",
        "| lr | `0.003` |",
        '| train_recipe | `{"gamma": 0.4}` |',
        "c0ffee",
    ):
        assert said in card, said
    assert "10/40" not in card and "| seed |" not in card
    normal = (models / "laptop/random-s0/normal.md").read_text(encoding="utf-8")
    assert "| PGD | 10/40 |" in normal and "train_recipe" not in normal


def test_the_card_counts_what_the_file_classifies_correctly(build, models, phantoms, images, labels):
    split = pd.read_csv(build / "data/splits/random-s0.csv").set_index("name").loc[list(phantoms.names)]
    test = np.flatnonzero(split.part == "test")
    right = predict(load_published("laptop/random-s0/normal"), images[test]).argmax(1) == labels[test]
    card = (models / "laptop/random-s0/normal.md").read_text(encoding="utf-8")
    assert f"classifies {int(right.sum())} of the {len(test)} clean test slices" in card


def test_what_is_larger_than_git_is_given_is_left_out_in_one_sentence(build, capsys):
    save_model(build / "random-s0/normal.safetensors", build_model("resnet18", num_classes=3, seed=0))
    assert publish.main(["weights", str(build)]) == 0
    said = "left out: a resnet18 takes more than 4 MB"
    models = build.parents[1] / "paper/models"
    assert f"laptop/random-s0/normal: {said}" in capsys.readouterr().out
    assert f"- `laptop/random-s0/normal`: {said}" in (models / "README.md").read_text(encoding="utf-8")
    assert not (models / "laptop/random-s0/normal.safetensors").exists()
    assert {*published_sha256(models)} == {"laptop/random-s0/adversarial"}


def test_publishing_again_replaces_the_profile_and_leaves_the_others(build, models):
    first = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}
    publish.publish_weights(build)
    assert {path: path.read_bytes() for path in models.rglob("*") if path.is_file()} == first
    other, of_tables = build.with_name("other"), build.parents[1] / "paper/tables"
    shutil.copytree(build, other)
    shutil.copytree(of_tables / "laptop", of_tables / "other")
    (other / "random-s0/normal.safetensors").unlink()
    publish.publish_weights(other)
    names = {f"laptop/random-s0/{name}" for name in NAMES} | {"other/random-s0/adversarial"}
    assert {*published_sha256(models)} == names
    readme = (models / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n- `") == 4 and "`other/random-s0/normal`: left out: its weights are not" in readme
    (build / "random-s0/normal.safetensors").unlink()
    publish.publish_weights(build)
    assert {*published_sha256(models)} == names - {"laptop/random-s0/normal"}
    assert not (models / "laptop/random-s0/normal.md").exists()


def test_weights_of_another_run_than_the_tables_are_not_published(build, models, capsys):
    path = build / "random-s0/02_baseline.json"
    write_json(path, json.loads(path.read_text()) | {"finished": "later"})
    before = {path: path.read_bytes() for path in models.rglob("*") if path.is_file()}
    assert publish.main(["weights", str(build)]) == 1
    assert "the published tables are not of" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in models.rglob("*") if path.is_file()} == before


def test_phantoms_are_not_published(build):
    write_json(
        build / "data/01_data.json",
        {"parameters": {"splits": ["random"], "seeds": [0], "dataset": "phantom"}},
    )
    assert publish.publish_weights(build) == ["laptop: left out, its images are phantoms"]
    assert not (build.parents[1] / "paper/models").exists()
