"""Further looks at one contender's network in notebook 10: a stronger attack, a certificate.

Each takes (model, test slices, rows of :func:`fortify.comparison.run_contender`) and returns facts. Its repr,
which holds all its settings, names what it found (:func:`fortify.comparison.compare`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from fortify.audit.autoattack import autoattack
from fortify.data import Slices, to_tensor
from fortify.smoothing import certify


def sample(n: int, of: int, *, seed: int = 0) -> np.ndarray:
    """``n`` of the positions 0 to ``of`` - 1 (all where there are fewer), drawn at random, in order.

    The first ones would do for no dataset that is sorted by class.
    """
    return np.sort(np.random.default_rng(seed).permutation(of)[:n])


@dataclass(frozen=True)
class AutoAttackLeft:
    """A reduced AutoAttack on ``images`` of the slices that PGD left correct: how many it breaks."""

    images: int
    steps: int
    eps_255: float

    def __call__(self, model: nn.Module, test: Slices, rows: pd.DataFrame) -> dict[str, Any]:
        left = np.flatnonzero(rows.attacked)
        left = left[sample(self.images, len(left))]
        broken, images, labels = np.zeros(len(left), bool), to_tensor(test.images[left]), test.labels[left]
        for part in ("apgd-dlr", "fab-t"):
            if not broken.all():
                still = np.flatnonzero(~broken)
                options = {"eps_255": self.eps_255, "steps": self.steps}
                broken[still] = autoattack(model, images[still], labels[still], part, **options).images
        return {"autoattack_n": len(left), "autoattack_broken": int(broken.sum())}


@dataclass(frozen=True)
class Certificates:
    """Where the smoothed network's prediction cannot be altered, on ``images`` of the test slices.

    The facts hold :func:`fortify.smoothing.certify`'s columns, and the slices' groups.
    """

    images: int
    samples: int
    sigma: float

    def __call__(self, model: nn.Module, test: Slices, rows: pd.DataFrame) -> dict[str, Any]:
        some = sample(self.images, len(test))
        x, y = to_tensor(test.images[some]), test.labels[some]
        found = certify(model, x, y, sigma=self.sigma, samples=self.samples)
        return {"certified": found.assign(group=test.groups[some]).to_dict("list")}
