"""Phantoms: the same bytes everywhere, known patients, and a problem worth learning."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation
from sklearn.ensemble import RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier

from fortify import phantom, splits
from fortify.attacks import PGD, craft
from fortify.models import build_model, predict
from fortify.training import Recipe, fit


def digest(images):
    return hashlib.sha256(images.tobytes()).hexdigest()


def test_shapes_names_and_class_shares_are_those_of_the_real_data():
    drawn = phantom.make(patients=22, slices_per_patient=2, size=32)
    assert drawn.images.shape == (44, 32, 32) and drawn.images.dtype == np.uint8
    assert drawn.labels.dtype == drawn.patients.dtype == np.int64
    assert np.bincount(drawn.labels).tolist() == [6, 16, 22]
    assert drawn.class_names == ("benign", "malignant", "normal")
    assert drawn.names[0] == "Benign cases/Benign case (1).png"
    assert drawn.names[21] == "Malignant cases/Malignant case (16).png"
    assert len(set(drawn.names)) == 44
    label_of = [set(drawn.labels[drawn.patients == p]) for p in range(22)]
    assert all(len(labels) == 1 for labels in label_of) and (np.bincount(drawn.patients) == 2).all()
    full = np.bincount([drawn.labels[drawn.patients == p][0] for p in range(22)])
    assert full.tolist() == [3, 8, 11]  # 15 : 40 : 55 of 110


def test_another_process_draws_the_same_bytes_and_another_seed_does_not():
    arguments = dict(patients=9, slices_per_patient=2, size=32)
    program = (
        "import hashlib; from fortify import phantom;"
        f"print(hashlib.sha256(phantom.make(**{arguments}, seed=5).images.tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(phantom.make(**arguments, seed=5).images)
    assert other.stdout.strip() != digest(phantom.make(**arguments, seed=6).images)


def test_slices_carry_patients_and_a_hash_of_what_was_drawn():
    arguments = dict(patients=9, slices_per_patient=2, size=32)
    slices = phantom.phantom_slices(**arguments)
    assert slices.source == "procedural phantoms, 18 slices of 9 virtual patients at 32 px"
    assert np.array_equal(slices.patients, phantom.make(**arguments).patients)
    assert np.array_equal(slices.groups, np.arange(18))  # nothing is given away to the splits
    assert slices.sha256 == phantom.phantom_slices(**arguments).sha256
    assert slices.sha256 != phantom.phantom_slices(**arguments, seed=1).sha256


@pytest.mark.parametrize("wrong", [dict(patients=8), dict(slices_per_patient=0), dict(size=16)])
def test_too_small_is_refused(wrong):
    with pytest.raises(ValueError, match="phantoms need at least"):
        phantom.make(**wrong)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_a_slice_is_a_chest(size):
    """Dark air around, two dark lungs with brighter tissue between them, a table below, nothing cut off."""
    drawn = phantom.make(patients=9, slices_per_patient=1, size=size)
    middle, rest = size // 2, slice(size // 4, -size // 4)
    for image in drawn.images.astype(float):
        air = image[: size // 16].mean()
        row = image[int(size * 0.40) : int(size * 0.52)].mean(0)
        left, right = row[size // 8 : middle].min(), row[middle : -size // 8].min()
        between = row[middle - size // 12 : middle + size // 12].max()
        assert max(left, right) < between - 40
        assert image[rest, rest].mean() > air + 50
        assert image.min() < 90 and image.max() > 200
        assert image[:, : size // 32 or 1].mean() < between - 40


def test_the_lesion_is_all_that_differs_between_classes():
    """A patient without its lesion: beyond the reach of the spicules nothing changes, inside it is darker."""
    size, heights = 64, np.array([-0.05, 0.05])
    for number in range(6):
        for label in (0, 1):
            rng = np.random.default_rng([0, number])
            anatomy = phantom._anatomy(rng)
            lesion = phantom._lesion(rng, anatomy, label, heights[-1])
            for z in heights:
                added = phantom._render(anatomy, lesion, z, size) - phantom._render(anatomy, None, z, size)
                axis = (np.arange(size) + 0.5) * 2 / size - 1
                at = lesion["at"] + anatomy["centre"] + anatomy["drift"] * z
                distance = np.hypot(axis[None] - at[0], axis[:, None] - at[1])
                assert (added[distance > 2.6 * lesion["radius"]] == 0).all()
                assert added.max() > 300  # in every slice of the stack
    assert phantom._lesion(rng, anatomy, 2, heights[-1]) is None


def test_neighbouring_slices_are_near_duplicates_and_patients_are_not():
    slices = phantom.phantom_slices(patients=20, slices_per_patient=4, size=64)
    thumbnails = splits.unit_thumbnails(slices.images, 56)
    r = thumbnails @ thumbnails.T
    same = slices.patients[:, None] == slices.patients
    adjacent = np.diagonal(r, 1)[np.diagonal(same, 1)]
    assert np.median(adjacent) > 0.95 and adjacent.min() > 0.8
    assert np.quantile(r[~same], 0.99) < 0.9
    assert len(np.unique(splits.exact_duplicates(slices.images))) == len(slices)


def test_a_network_learns_what_shortcuts_do_not_and_an_attack_undoes_it():
    """On new patients a small network beats the nearest neighbour and the grey-level histogram.

    Test accuracy depends much on which 37 patients are held out (five splits: 0.65 to 0.91, shortcuts 0.48 to
    0.65), so the seed is one with a wide margin, for machines that round otherwise.
    On a random split the nearest neighbour is almost perfect: it recognises the patient. That is the leak.
    """
    slices = phantom.phantom_slices()
    split = splits.grouped_split(slices.labels, slices.patients, seed=0, folds=3)
    split["train"] = np.concatenate([split["train"], split["val"]])  # 11 patients are too few to select on
    train, test = slices.subset(split["train"]), slices.subset(split["test"])

    def shortcut(classifier, features, index):
        classifier.fit(features[index["train"]], slices.labels[index["train"]])
        return classifier.score(features[index["test"]], slices.labels[index["test"]])

    thumbnails = splits.unit_thumbnails(slices.images, 56)
    histograms = np.array([np.histogram(image, 32, (0, 256))[0] for image in slices.images])
    nearest = shortcut(KNeighborsClassifier(1), thumbnails, split)
    histogram = shortcut(RandomForestClassifier(200, random_state=0), histograms, split)
    random = splits.random_split(slices.labels, seed=0)
    assert shortcut(KNeighborsClassifier(1), thumbnails, random) > 0.97

    model = build_model("resnet_small", num_classes=3, seed=0)
    seen = train.subset(range(0, len(train), 8))  # no validation, only what training asks for
    fit(model, train, seen, Recipe(epochs=12, batch_size=32, lr=3e-3), seed=0, progress=False)
    images, labels = torch.from_numpy(test.images)[:, None] / 255, torch.from_numpy(test.labels)
    clean = (predict(model, images).argmax(1) == labels).float().mean().item()
    robust = {}
    for eps_255 in (4, 8):
        success = craft(model, images, labels, PGD(eps_255, steps=5), seed=0).success
        robust[eps_255] = 1 - success.float().mean().item()
    figures = dict(clean=clean, robust=robust, nearest=nearest, histogram=histogram)
    assert clean > 0.7, figures
    assert clean > nearest + 0.1 and clean > histogram + 0.1, figures
    assert robust[4] < clean - 0.2 and robust[8] < 0.35, figures


def test_lesions_are_where_the_slices_show_them():
    """On every slice with a nodule and on no normal one, and bright in the lung."""
    arguments = dict(patients=12, slices_per_patient=2, size=48, seed=3)
    drawn, masks = phantom.make(**arguments), phantom.lesion_masks(**arguments)
    assert masks.shape == drawn.images.shape and masks.dtype == bool
    area = masks.mean((1, 2))
    normal = drawn.labels == drawn.class_names.index("normal")
    assert (area[normal] == 0).all() and (area[~normal] > 0.002).all() and area.max() < 0.1
    assert area[drawn.labels == 1].mean() > area[drawn.labels == 0].mean(), "malignant ones are larger"
    brighter = []
    for image, mask in zip(drawn.images[~normal], masks[~normal], strict=True):
        around = binary_dilation(mask, iterations=3) & ~binary_dilation(mask)
        brighter.append(np.median(image[mask]) > np.median(image[around]) + 30)
    assert np.mean(brighter) > 0.7, "not where heart or chest wall is around"
