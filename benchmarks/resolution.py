"""How much of what pretrained features tell of unseen groups is fine detail? By resolution and noise.

    python benchmarks/resolution.py    about ten minutes on two cores

A linear classifier on the frozen features of EfficientNet-Lite0 (ImageNet, 224 px), on the grouped split's
five folds with the wide validation of recipes.py. The slices are first reduced to fewer pixels and enlarged
again, or given noise, in training and validation alike: what is lost is what the removed detail told.
No test slice is looked at. Writes benchmarks/resolution.csv and its section of docs/recipe.md.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from recipes import WIDE
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from fortify.baselines import headless
from fortify.data import load_iq_oth_nccd, to_tensor
from fortify.files import find_root, write_csv
from fortify.intervals import cluster_interval
from fortify.models import build_model, predict_logits
from fortify.splits import FOLDS, grouped_split, near_duplicate_groups
from fortify.workflow.publish import replace_section

SIDE = 224
PIXELS, NOISE_255 = (224, 112, 56, 28, 14), (4, 8, 16)
PENALTY = 0.001  # C of the logistic regression, the same for all


def shown(images):
    """{what was done: images (N, 1, SIDE, SIDE) in [0, 1]}."""
    views = {}
    for pixels in PIXELS:
        small = F.interpolate(images, pixels, mode="bilinear", antialias=True)
        views[f"{pixels} px"] = F.interpolate(small, SIDE, mode="bilinear")
    generator = torch.Generator().manual_seed(0)
    for level in NOISE_255:
        noise = torch.randn(images.shape, generator=generator) * level / 255
        views[f"noise, sd {level}/255"] = (images + noise).clamp(0, 1)
    return views


def validated(features, slices):
    """Whether each fold's validation slices are classified correctly: (right, labels, groups)."""
    found = []
    for fold in range(FOLDS):
        part = grouped_split(slices.labels, slices.groups, seed=fold, val=WIDE)
        train, val = part["train"], part["val"]
        mean, sd = features[train].mean(0), features[train].std(0) + 1e-6
        model = LogisticRegression(C=PENALTY, max_iter=2000)
        model.fit((features[train] - mean) / sd, slices.labels[train])
        right = model.predict((features[val] - mean) / sd) == slices.labels[val]
        found.append((right, slices.labels[val], slices.groups[val]))
    return [np.concatenate(values) for values in zip(*found, strict=True)]


def section(table):
    """The page's text."""
    lines = ["| slices | accuracy (95 %, by groups) | balanced | benign | malignant | normal |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for r in table.itertuples():
        interval = f"{100 * r.low:.0f}–{100 * r.high:.0f}"
        recalls = [r.recall_benign, r.recall_malignant, r.recall_normal]
        cells = [f"{100 * r.k / r.n:.1f} ({interval})", f"{100 * np.mean(recalls):.1f}"]
        cells += [f"{100 * value:.0f}" for value in recalls]
        lines.append(f"| {r.slices} | " + " | ".join(cells) + " |")
    return (
        f"Validation slices of five folds, {table.n.iloc[0]} in all, of unseen groups; per cent. A linear "
        "classifier on frozen ImageNet features of EfficientNet-Lite0 at 224 px.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main():
    root = find_root()
    slices = load_iq_oth_nccd(size=SIDE)
    slices = replace(slices, groups=near_duplicate_groups(slices))
    backbone = headless(build_model("efficientnet_lite0", num_classes=2, weights="imagenet"))
    rows = []
    for name, images in shown(to_tensor(slices.images)).items():
        features = predict_logits(backbone, images, batch_size=32).numpy().astype(float)
        right, labels, groups = validated(features, slices)
        low, high = cluster_interval(right, groups)
        row = {"slices": name, "k": int(right.sum()), "n": len(right), "low": low, "high": high}
        for label, of in enumerate(slices.class_names):
            row[f"recall_{of}"] = right[labels == label].mean()
        print(row, flush=True)
        rows.append(row)
    table = pd.DataFrame(rows)
    write_csv(root / "benchmarks" / "resolution.csv", table)
    replace_section(root / "docs/recipe.md", "resolution", section(table))


if __name__ == "__main__":
    main()
