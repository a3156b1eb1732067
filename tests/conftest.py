"""What several test files share: tiny phantoms, a model trained on them for a moment, the real slices."""

import shutil

import pytest
import torch
from workflow import BUILD, snakemake


@pytest.fixture(scope="session")
def finished():
    """The folder of the test profile's whole run, each notebook through papermill."""
    shutil.rmtree(BUILD, ignore_errors=True)
    done = snakemake("--forceall", "--quiet", "rules")
    assert done.returncode == 0, done.stderr[-4000:]
    return BUILD


@pytest.fixture(scope="session")
def phantoms():
    """120 phantom slices of 40 patients at 32 px."""
    from fortify.phantom import phantom_slices

    return phantom_slices(patients=40, slices_per_patient=3, size=32, seed=0)


@pytest.fixture(scope="session")
def images(phantoms):
    """The phantoms as the models take them: (120, 1, 32, 32) float32 in [0, 1]."""
    from fortify.data import to_tensor

    return to_tensor(phantoms.images)


@pytest.fixture(scope="session")
def labels(phantoms):
    return torch.from_numpy(phantoms.labels)


@pytest.fixture(scope="session")
def model(phantoms):
    """A small ResNet that learnt 40 of the phantoms by heart, so that attacks have something to break."""
    from fortify.augmentation import Augmentation
    from fortify.models import build_model
    from fortify.training import Recipe, fit

    trained = build_model("resnet_small", num_classes=3, seed=0)
    some = phantoms.subset(range(0, len(phantoms), 3))
    still = Augmentation(flip=False, degrees=0, scale=0, translate=0)
    recipe = Recipe(epochs=12, batch_size=16, lr=3e-3, class_balance=1.0, augmentation=still)
    fit(trained, some, some, recipe, progress=False)
    return trained


@pytest.fixture(scope="session")
def real_folder():
    """The folder of the real slices, or a skip that says how to get them."""
    from fortify.data import find_data

    try:
        return find_data()
    except FileNotFoundError as error:
        pytest.skip(str(error))
