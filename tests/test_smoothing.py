"""Randomised smoothing: certificates of a linear classifier, whose exact radius is known."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from fortify.smoothing import ABSTAINED, certify, grey_levels, largest_radius


class HalfSpace(nn.Module):
    """Class 1 where the mean of four pixels is above one half: the distance to the plane is known."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        z = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-z, z], 1)


LEVELS = torch.tensor([0.9, 0.7, 0.5, 0.2])
IMAGES = LEVELS.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


def test_a_certificate_stays_below_the_true_distance_and_comes_near_it():
    found = certify(HalfSpace(), IMAGES, [1, 1, 1, 0], sigma=0.5, samples=4000, alpha=0.01)
    distance = 2 * (LEVELS - 0.5).abs().numpy()  # L2, of four pixels that move together
    assert (found.radius <= distance + 1e-9).all()
    reachable = np.minimum(distance, largest_radius(sigma=0.5, samples=4000, alpha=0.01))
    assert found.radius[[1, 3]].to_numpy() == pytest.approx(reachable[[1, 3]], rel=0.15)
    assert found.prediction.tolist() == [1, 1, ABSTAINED, 0] and found.radius[2] == 0


def test_no_radius_is_larger_than_all_samples_agreeing_give():
    far = torch.ones(1, 1, 2, 2)
    found = certify(HalfSpace(), far, [1], sigma=0.05, samples=200, alpha=0.001)
    assert found.radius.item() == pytest.approx(largest_radius(sigma=0.05, samples=200))
    assert largest_radius(sigma=0.25, samples=1000) == pytest.approx(0.25 * norm.ppf(0.001 ** (1 / 1000)))
    assert 0.61 < largest_radius(sigma=0.25, samples=1000) < 0.63
    assert grey_levels(0.62, 112 * 112) == pytest.approx(1.41, abs=0.01)


def test_the_noise_is_of_the_seed_and_the_image_alone():
    options = dict(sigma=0.5, samples=300)
    first = certify(HalfSpace(), IMAGES, [1, 1, 1, 0], **options)
    assert first[:2].equals(certify(HalfSpace(), IMAGES[:2], [1, 1], **options))
    assert not first.equals(certify(HalfSpace(), IMAGES, [1, 1, 1, 0], seed=1, **options))


@pytest.mark.parametrize("wrong", [{"sigma": 0}, {"alpha": 0.5}, {"samples": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="sigma > 0"):
        certify(HalfSpace(), IMAGES, [1, 1, 1, 0], **({"sigma": 0.5} | wrong))


def test_labels_of_other_classes_are_refused():
    with pytest.raises(ValueError, match="0..1"):
        certify(HalfSpace(), IMAGES, [1, 1, 2, 0], sigma=0.5)
