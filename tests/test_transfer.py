"""Transfer: what must hold whatever was trained, on models and numbers whose answer is known beforehand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fortify.attacks import PGD, craft, perturbation_norms
from fortify.augmentation import Augmentation
from fortify.data import Slices, to_tensor
from fortify.intervals import cluster_interval, whole_percent
from fortify.models import build_model, predict
from fortify.splits import grouped_split
from fortify.training import Recipe
from fortify.transfer.answer import nodule_answer, transfer_answer
from fortify.transfer.crafting import (
    NOISE,
    OTHERS,
    Ensemble,
    InputDiverse,
    Momentum,
    pooled_transfer,
    random_signs,
    transfer_table,
    transferred,
)
from fortify.transfer.figures import nodule_attacks, nodule_dots, transfer_matrix
from fortify.transfer.networks import (
    Regime,
    attackers_share,
    from_trained,
    pair,
    regimes_of,
    trained,
    without_idle,
)
from fortify.transfer.nodules import (
    Study,
    attack_layout,
    attacked_nodules,
    attacked_table,
    clean_logits,
    gains_over_size,
    group_agreement,
    nodule_accuracies,
    nodule_folds,
    nodule_layout,
    on_folds,
    open_study,
    size_logits,
    unseen_nodules,
    with_frozen_features,
)

SIDE = 8
EPS = {"eps_255": 8, "steps": 4}
ATTACKS = [PGD(**EPS), Momentum(**EPS), InputDiverse(**EPS)]


class Half(nn.Module):
    """Class 1 where the left half (or the ``top`` one) is brighter than the other by more than ``at`` /
    255."""

    def __init__(self, top=False, at=0.0):
        super().__init__()
        weight = torch.ones(SIDE, SIDE)
        weight[:, SIDE // 2 :] = -1
        weight = (weight.T if top else weight).flatten() / weight.numel() * 2
        self.weight, self.at = nn.Parameter(weight), at / 255

    def forward(self, x):
        z = 100 * (x.flatten(1) @ self.weight - self.at)
        return torch.stack([-z, z], 1)


def sided(n=24, difference=6, seed=0):
    """Images (N, 1, 8, 8) that each half-classifier tells by ``difference`` grey levels; labels 0 and 1."""
    labels = np.arange(n) % 2
    sign = (2 * torch.tensor(labels) - 1).float().view(-1, 1, 1, 1) * difference / 255 / 2
    x = 0.5 + 0.01 * torch.rand(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    left, top = (Half(top=t).weight.detach().view(SIDE, SIDE).sign() for t in (False, True))
    return x + sign * (left + top), labels


def cell(table, **where):
    for name, value in where.items():
        table = table[table[name].eq(value)]
    (row,) = table.itertuples()
    return row


@pytest.fixture(scope="module")
def matrix():
    """Two equal networks, one that looks at something else, and a surrogate that is the first once more."""
    images, labels = sided()
    models = {"one": Half(), "same": Half(), "top": Half(top=True)}
    given = {"surrogates": {"stolen": Half()}, "ensemble_attacks": [Momentum(**EPS)]}
    rows = transferred(models, images, labels, ATTACKS, index=np.arange(100, 124), **given)
    return rows, transfer_table(rows, np.arange(124) // 2)


def test_what_fools_a_network_fools_its_copy_and_not_one_that_looks_elsewhere(matrix):
    _, table = matrix
    for attack in ("pgd", "momentum"):
        for source in ("one", "same", "stolen"):
            for target in ("one", "same"):
                row = cell(table, source=source, attack=attack, target=target)
                assert (row.k, row.n, row.accuracy) == (24, 24, 1.0), row
                assert row.white_box == (source == target)
            # Its gradient is orthogonal to that one's: of the images' own contrast nothing is lost.
            assert cell(table, source=source, attack=attack, target="top").k == 0
    assert cell(table, source=OTHERS, attack="momentum", target="one").k == 24, "the copy is among the others"
    assert not (table.source.eq("stolen") & table.white_box).any() and "stolen" not in set(table.target)


def test_pairs_are_pooled_by_what_the_attack_was_crafted_on(matrix):
    rows, table = matrix
    groups = np.arange(124) // 2
    pooled = pooled_transfer(rows, groups).set_index(["crafted_on", "attack"])
    own = cell(table, source="top", attack="pgd", target="top").k
    assert pooled.loc[("the target itself", "pgd"), ["k", "n"]].tolist() == [48 + own, 72]
    assert pooled.loc[("another network", "pgd"), "n"] == 6 * 24
    of = rows[rows.attack.eq("pgd") & rows.source.isin(rows.target) & rows.source.ne(rows.target) & rows.both]
    assert tuple(pooled.loc[("another network", "pgd"), ["low", "high"]]) == cluster_interval(
        of.fooled.to_numpy(bool), groups[of["index"]]
    )
    row = pooled.loc[("another network", "pgd")]
    assert row.more == row.accuracy and row.more_low <= row.more <= row.more_high, "noise fools nobody here"
    assert np.isnan(pooled.loc[(NOISE, NOISE), "more"])
    broken = rows.assign(fooled=rows.fooled | rows.source.eq(NOISE))
    assert (
        pooled_transfer(broken, groups).set_index("crafted_on").more[[OTHERS, "the target itself"]] <= 0
    ).all()
    assert (
        pooled.loc[("stolen", "pgd"), ["k", "n"]].tolist() == [48, 72]
        and (OTHERS, "momentum") in pooled.index
    )
    assert pooled.loc[("another network", "pgd"), "l2"] == pytest.approx(
        rows.l2[rows.attack.eq("pgd")].median()
    )


def test_noise_of_the_same_size_does_nothing_to_a_mean_and_has_no_less_l2(matrix):
    rows, table = matrix
    noise = table[table.source.eq(NOISE)]
    assert noise.k.eq(0).all() and noise.n.eq(24).all()
    assert rows.linf_255.max() <= 8.001 and noise.linf_255.min() == pytest.approx(8, abs=1e-3)
    assert noise.l2.min() >= rows.l2.max() - 1e-4
    images, _ = sided()
    again = random_signs(images, eps_255=8, seed=0)
    assert torch.equal(again, random_signs(images, eps_255=8, seed=0))
    assert not torch.equal(again, random_signs(images, eps_255=8, seed=1))
    assert perturbation_norms(images, again)[1].min() == pytest.approx(8 / 255 * SIDE, rel=1e-4)


def test_only_what_both_classify_correctly_counts():
    """A biased target misclassifies class 1 before any attack; a biased source does not attack it."""
    images, labels = sided(difference=6)
    models = {"fair": Half(), "biased": Half(at=20)}
    rows = transferred(models, images, labels, ATTACKS[:1])
    table = transfer_table(rows, np.arange(24))
    assert cell(table, source="fair", target="fair").n == 24
    row = cell(table, source="fair", target="biased")
    assert row.n == 12, "of class 0 alone"
    # It needs 26 levels up, the attack has 8: 0 of 12, not the 12 of class 1 that are wrong anyway.
    assert (row.k, row.accuracy) == (0, 0.0) and row.low == 0 and 0 < row.high < 0.4
    counted = rows[rows.source.eq("fair") & rows.target.eq("biased")]
    assert counted.fooled.sum() == 12 and not counted[counted.fooled].both.any()
    assert set(rows[rows.source.eq("biased")].label) == {0}, "it attacks nothing that it has lost already"
    never = transfer_table(
        transferred({"fair": Half(), "never": Half(at=-99)}, images[::2], labels[::2], ATTACKS[:1]),
        np.arange(12),
    )
    row = cell(never, source="fair", target="never", attack="pgd")
    assert row.n == 0 and np.isnan(row.accuracy) and np.isnan(row.low)
    assert "never" not in set(never.source), "a source that is never right crafts nothing"


def test_intervals_draw_whole_groups():
    rows = pd.DataFrame({"source": "a", "attack": "pgd", "target": "b", "index": np.arange(40), "label": 0})
    rows = rows.assign(both=True, fooled=np.arange(40) < 20, linf_255=8.0, l2=1.0)
    single = transfer_table(rows, np.arange(40)).iloc[0]
    grouped = transfer_table(rows, np.arange(40) // 10).iloc[0]
    assert single.accuracy == grouped.accuracy == 0.5
    assert grouped.high - grouped.low > 2 * (single.high - single.low)


def test_sources_need_names_of_their_own_and_attacks_one_budget():
    images, labels = sided()
    with pytest.raises(ValueError, match="a name of its own: one"):
        transferred({"one": Half()}, images, labels, ATTACKS, surrogates={"one": Half()})
    with pytest.raises(ValueError, match="one Linf budget"):
        transferred({"one": Half()}, images, labels, [PGD(8), Momentum(4)])


def test_momentum_accumulates_gradients_of_unit_l1_and_ends_on_the_budget():
    """By hand, three steps on a network whose gradient differs between images by its length alone."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 3), nn.Tanh(), nn.Linear(3, 2))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x = torch.rand(6, 1, SIDE, SIDE, generator=generator)
    y = predict(model, x).argmax(1)
    eps, total, z = 8 / 255, 0, x.clone()
    for _ in range(3):
        z.requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
        total = 0.5 * total + g / g.flatten(1).norm(p=1, dim=1).view(-1, 1, 1, 1)
        z = (x + (z.detach() + eps / 3 * total.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    found = craft(model, x, y, Momentum(8, steps=3, decay=0.5)).images
    assert torch.allclose(found, z, atol=1e-6)
    assert not torch.allclose(craft(model, x, y, Momentum(8, steps=3, decay=0.0)).images, z, atol=1e-3)


def test_input_diversity_moves_the_image_within_its_frame_and_is_fixed_by_the_seed():
    model = build_model("resnet_small", num_classes=2, seed=0).eval()
    x, y = (
        torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0)),
        torch.zeros(6, dtype=torch.int64),
    )
    one, again, other = (craft(model, x, y, InputDiverse(8, steps=3), seed=s).images for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    plain = craft(model, x, y, Momentum(8, steps=3)).images
    same = craft(model, x, y, InputDiverse(8, steps=3, diversity=0.0)).images
    assert torch.equal(plain, same) and not torch.equal(plain, one)
    for wrong in ({"diversity": 1.5}, {"smallest": 0}, {"steps": 0}, {"decay": -1}):
        with pytest.raises(ValueError):
            InputDiverse(8, **wrong)


def test_an_ensemble_is_the_mean_of_the_logits():
    images, _ = sided()
    both = Ensemble([Half(), Half(top=True)])
    assert torch.allclose(both(images), (Half()(images) + Half(top=True)(images)) / 2)


def phantom(n_patients=24, each=4, side=32, classes=2, seed=0):
    """Noise images: those of one patient are near copies of each other; no class is to be seen in them."""
    rng = np.random.default_rng(seed)
    own = rng.integers(0, 256, (n_patients, side, side)).astype(float)
    images = np.repeat(own, each, axis=0) + rng.normal(0, 2, (n_patients * each, side, side))
    patients = np.repeat(np.arange(n_patients), each)
    labels = patients % classes
    names = tuple(
        f"c{label}/{'abc'[label]}{p}-{i}x.png"
        for i, (label, p) in enumerate(zip(labels, patients, strict=True))
    )
    images = np.clip(images, 0, 255).astype(np.uint8)
    classes = ("benign", "malignant", "normal")[:classes]
    return Slices(images, labels, names, classes, "noise", "0" * 64, patients=patients)


def study_of(slices, nodules=None, diameters=None):
    n = len(slices)
    diameters = 10.0 + slices.labels * 0 + np.arange(n) % 3 if diameters is None else diameters
    nodules = [f"n{p}" for p in slices.patients] if nodules is None else nodules
    return Study(
        slices, pd.DataFrame({"nodule": nodules, "diameter_mm": diameters, "area_px": diameters * 2})
    )


def nearest(slices, split):
    """A look-up of the nearest training image, as a model."""
    from fortify.baselines import NearestThumbnail

    train = slices.subset(split["train"])
    return NearestThumbnail(to_tensor(train.images), train.labels, num_classes=len(slices.class_names))


def test_planted_near_copies_leak_through_random_folds_alone():
    """Nothing can be learned of noise, but on random folds the nearest image is the same patient's."""
    study = study_of(phantom())
    folds = nodule_folds(study, folds=3)
    seen = [
        clean_logits(
            study, own, [nearest(study.slices, split) for split in own], model_name="look-up", split=kind
        )
        for kind, own in folds.items()
    ]
    table = nodule_accuracies(study, pd.concat(seen), units=["slice"]).set_index(["split", "nodules"])
    assert table.accuracy["random", "all"] > 0.95
    for kind in ("near-duplicate groups", "patients"):
        assert table.accuracy[kind, "all"] < 0.8, kind
    agreement = group_agreement(study, folds).set_index("folds")
    assert tuple(agreement.loc["near-duplicate groups", ["precision", "recall"]]) == (1, 1)
    assert agreement.patient_in_training.to_dict() == {
        "random": 1.0,
        "near-duplicate groups": 0,
        "patients": 0,
    }
    for own in folds["patients"]:
        patients = study.slices.patients
        assert not set(patients[own["test"]]) & set(patients[np.append(own["train"], own["val"])])


def test_groups_that_miss_a_patient_are_reported_as_such():
    """Each patient has two nodules that look unlike: groups find these, and let the patients through."""
    slices = phantom(n_patients=24, each=4)
    study = study_of(replace(slices, patients=slices.patients // 4 * 2 + slices.labels, groups=None))
    folds = nodule_folds(study, folds=2)
    row = group_agreement(study, folds).set_index("folds").loc["near-duplicate groups"]
    # Of 8 slices of a patient a group holds 4: 6 + 6 of 28 pairs.
    assert row.precision == 1 and row.recall == pytest.approx(12 / 28) and row.patient_in_training > 0.5


def test_a_nodule_is_decided_by_its_mean_logit_and_sizes_are_kept_apart():
    """Four nodules with hand-made logits; two of them are of 7 to 14 mm."""
    slices = phantom(n_patients=4, each=3)  # labels 0, 1, 0, 1
    study = study_of(slices, diameters=np.repeat([5.0, 7.0, 14.0, 30.0], 3))
    z = [-1, -1, 3, 1, 1, -1, -1, 0.5, 0.4, 2, -0.5, -0.6]  # of class 1; its sum: + + - +
    seen = pd.DataFrame({"model": "m", "split": "patients", "seed": 0, "attack": "clean"}, index=range(12))
    seen = seen.assign(index=range(12), label=slices.labels, logit_0=0.0, logit_1=z)
    table = nodule_accuracies(study, seen).set_index(["unit", "nodules"])
    found = {key: (row.k, row.n, row.patients) for key, row in table.iterrows()}
    assert found == {
        ("slice", "all"): (6, 12, 4),
        ("slice", "7 to 14 mm"): (3, 6, 2),
        ("nodule", "all"): (3, 4, 4),
        ("nodule", "7 to 14 mm"): (2, 2, 2),
    }
    assert table.recall_benign["nodule", "all"] == 0.5 and table.recall_malignant["nodule", "all"] == 1
    assert table.balanced_accuracy["nodule", "all"] == 0.75


def test_size_alone_tells_what_size_tells_and_no_more():
    """Diameters that part the classes give all, others give little more than the largest class."""
    slices = phantom(n_patients=30, each=2)
    splits = [grouped_split(slices.labels, slices.patients, seed=fold) for fold in range(3)]
    told = study_of(slices, diameters=np.where(slices.labels == 1, 20.0, 6.0) + np.arange(60) % 3)
    untold = study_of(slices, diameters=9.0 + np.arange(60) % 2)
    for study, least, most in ((told, 1, 1), (untold, 0.2, 0.8)):
        seen = size_logits(study, splits, split="patients")
        right = (seen.logit_1 > 0) == (seen.label == 1)
        shares = right.groupby(seen.model).mean()
        assert (
            set(shares.index) == {"diameter alone", "mask area alone"} and shares.between(least, most).all()
        )
        assert len(seen) == 2 * sum(len(own["test"]) for own in splits)


def test_a_network_is_compared_with_the_diameter_on_the_same_nodules():
    slices = phantom(n_patients=30, each=2)
    splits = [grouped_split(slices.labels, slices.patients, seed=fold) for fold in range(2)]
    study = study_of(slices, diameters=np.where(slices.labels == 1, 20.0, 6.0) + np.arange(60) % 3)
    seen = size_logits(study, splits, split="patients")
    wrong = seen[seen.model.eq("diameter alone")].assign(model="normal", logit_1=lambda t: -t.logit_1)
    gains = gains_over_size(study, pd.concat([seen, wrong])).set_index(["model", "unit", "nodules"])
    row = gains.loc["normal", "nodule", "all"]
    assert row.gain_percent == -100 and row.k == 0 and row.high_percent < 0
    assert gains.loc["mask area alone", "slice", "all"].gain_percent == 0


def test_attacks_take_whole_nodules_and_both_units_are_in_the_table():
    slices = phantom(n_patients=20, each=4)
    study = study_of(slices)
    splits = [grouped_split(slices.labels, slices.patients, seed=fold) for fold in range(2)]
    models = {"fresh": [build_model("resnet_small", num_classes=2, seed=fold).eval() for fold in range(2)]}
    rows, seen = attacked_nodules(study, splits, models, [PGD(4, steps=2)], images=9)
    for _, own in rows[rows.attack.eq("clean")].groupby("seed"):
        assert sorted(own.label) == [0] * 4 + [1] * 4, "both classes"
        assert pd.Series(study.codes[own["index"]]).value_counts().eq(4).all()
    table = attacked_table(study, rows, seen, eps_255=4, cw_l2=0.5)
    counts = table[table.attack.isin(("clean", "pgd"))].set_index(["unit", "attack"]).n
    assert counts.to_dict() == {
        ("slice", "clean"): 16,
        ("slice", "pgd"): 16,
        ("nodule", "clean"): 4,
        ("nodule", "pgd"): 4,
    }
    assert nodule_attacks(table).axes
    line = attack_layout(table).iloc[0]
    row = cell(table, unit="slice", attack="pgd")
    low, high = 100 * row.group_low, 100 * row.group_high
    assert line.pgd == f"{whole_percent(row.accuracy)} ({low:.0f}–{high:.0f}) {row.k}/16"


def test_frozen_features_stay_and_their_linear_head_learns_what_they_show():
    """Images of two brightnesses: an untrained network's features tell them; its weights do not move."""
    slices = phantom(n_patients=20, each=3)
    images = np.where(slices.labels[:, None, None] == 1, slices.images // 2 + 127, slices.images // 2)
    study = study_of(replace(slices, images=images.astype(np.uint8)))
    splits = [grouped_split(slices.labels, slices.patients, seed=fold) for fold in range(2)]
    backbone = build_model("resnet_small", num_classes=3, seed=0).eval()
    before = {name: own.clone() for name, own in backbone.state_dict().items()}
    models = with_frozen_features(study, splits, backbone)
    seen = clean_logits(study, splits, models, model_name="features", split="patients")
    assert ((seen.logit_1 > seen.logit_0) == (seen.label == 1)).all() and len(models) == 2
    assert all(torch.equal(own, before[name]) for name, own in backbone.state_dict().items())
    assert models[0](to_tensor(slices.images[:2])).shape == (2, 2)


def test_every_network_is_on_the_folds_it_should_be_on():
    """Two folds, three kinds: normal training on all of them, all else on the patients' alone."""
    study, regime = study_of(phantom(n_patients=20, each=2)), Regime(Recipe(epochs=1, batch_size=16))
    folds = nodule_folds(study, folds=2)
    eyes = {"normal": build_model("resnet_small", num_classes=3, seed=0).eval()}
    both = {"normal": regime, "adversarial": Regime(regime.recipe, {PGD(4, steps=1): 1.0})}
    seen, networks, frozen = on_folds(study, folds, both, eyes, arch="resnet_small", seed=0)
    patients = {"normal", "adversarial", "features, normal", "diameter alone", "mask area alone"}
    expected = {(kind, "normal") for kind in folds} | {("patients", name) for name in patients}
    assert set(zip(seen.split, seen.model, strict=True)) == expected
    for (kind, _, fold), own in seen.groupby(["split", "model", "seed"]):
        assert sorted(own["index"]) == sorted(folds[kind][fold]["test"])
    assert networks.keys() == {"normal", "adversarial"} and frozen.keys() == {"features, normal"}
    own = networks["normal"][1]
    test = folds["patients"][1]["test"]
    line = seen[seen.split.eq("patients") & seen.model.eq("normal") & seen.seed.eq(1)].set_index("index")
    found = own(to_tensor(study.slices.images[test])).detach().numpy()
    assert np.allclose(line.loc[test, ["logit_0", "logit_1"]], found, atol=1e-4)


def test_an_attackers_patients_are_nobody_elses():
    slices = phantom(n_patients=60, each=4, classes=3)
    split = grouped_split(slices.labels, slices.patients, seed=0)
    share = attackers_share(slices, split, images=20, seed=0)
    of = {name: set(slices.patients[index]) for name, index in share.items()}
    train = set(slices.patients[split["train"]])
    assert not of["other groups"] & (train | of["attacked"]) and of["same groups"] <= train
    assert len(share["attacked"]) == 20 and set(share["attacked"]) <= set(split["test"])
    counts = [
        np.bincount(slices.labels[share[name]], minlength=3) for name in ("other groups", "same groups")
    ]
    assert np.array_equal(*counts) and counts[0].min() > 0
    assert len(of["same groups"]) <= len(of["other groups"]) + 3, "whole groups, not a slice of each"
    # Validation and test of the same patients: those of the attacked half are no longer an attacker's own.
    rest = np.arange(80, 240)
    mixed = {"train": np.arange(80), "val": rest[::2], "test": rest[1::2]}
    share = attackers_share(slices, mixed, images=99, seed=0)
    attacked, others = (set(slices.patients[share[name]]) for name in ("attacked", "other groups"))
    assert attacked and others and not attacked & others
    rng = np.random.default_rng(0)
    random = np.split(rng.permutation(240), [160, 200])
    random = dict(zip(("train", "val", "test"), random, strict=True))
    assert attackers_share(slices, random, images=20, seed=0).keys() == {"attacked"}


def test_a_recipe_is_that_of_the_notebooks_and_a_slow_batchnorm_is_told_to_follow(tmp_path):
    baseline = {"epochs": 7, "lr": 0.003, "batch_size": 16, "arch": "resnet_small", "gamma": 0.1}
    hardening = {"train_recipe": {"gamma": 0.4, "clean_share": 0.25}, "train_eps_255": 16.0}
    hardening |= {
        "train_pgd_steps": 3,
        "train_shares": {"fgsm": 0.5, "margin": 0.5, "pgd": 0.0},
        "objective": "mix",
    }
    both = regimes_of(baseline, {"eps_255": 4.0}, hardening)
    assert both["normal"].recipe == Recipe(
        epochs=7, lr=0.003, batch_size=16, augmentation=Augmentation(gamma=0.1)
    )
    hard = both["adversarial"]
    assert (hard.recipe.augmentation.gamma, hard.recipe.clean_share, hard.recipe.epochs) == (0.4, 0.25, 7)
    assert [(a.name, a.eps_255, getattr(a, "loss", None), s) for a, s in hard.attacks.items()] == [
        ("fgsm", 16, None, 0.5),
        ("pgd", 16, "margin", 0.5),
    ]
    assert hard.val_attack == PGD(4.0, steps=3) and both["normal"].attacks == {}
    assert regimes_of(baseline, {"eps_255": 4.0}, hardening, epochs=2)["adversarial"].recipe.epochs == 2
    slices = phantom(n_patients=8, each=2)
    regime, options = Regime(Recipe(epochs=1, batch_size=8)), {"seed": 0, "checkpoints": tmp_path}
    model = trained("mobilenet_v3_small", slices, slices, regime, **options)
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    again = trained("mobilenet_v3_small", slices, slices, regime, **options)
    assert len(list(tmp_path.iterdir())) == 1, "read from its checkpoint"
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_another_network_goes_on_under_attack_from_its_normal_weights():
    slices, options = phantom(n_patients=8, each=2), {"seed": 0}
    hard = Regime(Recipe(epochs=1, batch_size=8, lr=0.004), {PGD(16, steps=2): 1.0}, PGD(4, steps=2))
    milder = from_trained(hard, eps_255=4)
    assert milder.attacks == {PGD(4, steps=2): 1.0} and milder.recipe == replace(hard.recipe, lr=0.001)
    still = replace(milder, recipe=replace(milder.recipe, lr=1e-12, ema=0))
    regimes = {"normal": Regime(Recipe(epochs=1, batch_size=8)), "adversarial": still}
    both = pair("resnet_small", slices, regimes, **options)
    for name, weight in both["normal"].named_parameters():
        assert torch.allclose(weight, both["adversarial"].get_parameter(name), atol=1e-6), name


def test_a_network_of_one_answer_is_left_out_and_named():
    images, _ = sided()
    models = {"a, normal": Half(), "b, normal": Half(at=200)}
    kept, idle = without_idle(models, images)
    assert list(kept) == ["a, normal"] and idle == ["b, normal"]
    assert without_idle({"b, normal": models["b, normal"]}, images)[1] == ["b, normal"], "kept, and named"
    assert without_idle({}, images) == ({}, [])


def test_a_nodule_is_explained_on_its_largest_slice_of_an_unseen_patient():
    study = open_study("phantom", size=32)
    fold = nodule_folds(study, folds=1)["patients"][0]
    every = unseen_nodules(study, most=1000)
    assert set(every) <= set(fold["test"])
    assert sorted(study.nodules.nodule[every]) == sorted(study.nodules.nodule[fold["test"]].unique())
    largest = study.nodules.iloc[fold["test"]].groupby("nodule").area_px.max()
    assert study.nodules.loc[every].set_index("nodule").area_px.eq(largest).all()
    some = unseen_nodules(study, most=4, seed=1)
    assert len(some) == 4 and set(some) < set(every) and list(some) == sorted(some)
    assert list(some) != list(unseen_nodules(study, most=4, seed=2))


def test_the_answers_and_figures_are_of_the_tables(matrix, monkeypatch, tmp_path):
    monkeypatch.setenv("FORTIFY_LIDC", str(tmp_path))
    assert open_study("lidc", size=32) is None, "not fetched: no error"
    with pytest.raises(ValueError, match='"lidc" or "phantom", not \'lids\''):
        open_study("lids", size=32)
    _, table = matrix
    named = {"one": "a, normal", "same": "b, normal", "top": "a, adversarial", "stolen": "other groups"}
    table = table.assign(source=table.source.replace(named), target=table.target.replace(named))
    text = transfer_answer(table, eps_255=8)
    assert (
        "**normally trained** networks in 100 % (48 of 48)" in text and "same size fools them in 0 %" in text
    )
    assert "100 % (72 of 72) of the cases when" not in text
    study = open_study("phantom", size=32)
    assert study.slices.class_names == ("benign", "malignant") and set(study.slices.labels) == {0, 1}
    assert study.nodules.nodule.nunique() == len(set(study.slices.patients))
    assert (study.masks(np.arange(len(study.slices))).any((1, 2))).all(), "it shows where the lesion is"
    folds = nodule_folds(study, folds=2)
    seen = size_logits(study, folds["patients"], split="patients")
    parts = [
        seen,
        *(seen[seen.model.eq("diameter alone")].assign(model="normal", split=kind) for kind in folds),
    ]
    seen = pd.concat(parts, ignore_index=True)
    found, gains = nodule_accuracies(study, seen), gains_over_size(study, seen)
    own = cell(found, unit="nodule", nodules="all", model="diameter alone")
    attacked = found[found.nodules.eq("all") & found.split.eq("patients")]
    text = nodule_answer(found, group_agreement(study, folds), gains, attacked, source="phantoms")
    assert (
        f"The diameter alone classifies {100 * own.accuracy:.0f} % ({own.k} of {own.n}) of the nodules"
        in text
    )
    assert "Normal training differs from it by +0 points" in text
    assert "by patients by +0 points here. The intervals overlap, so this may be chance." in text
    assert "one answer" not in text and "frozen features" not in text
    lost = attacked.assign(balanced_accuracy=np.where(attacked.model.eq("normal"), 0.51, 0.9))
    lost = pd.concat([lost, lost.assign(attack="pgd")])
    heads = found[found.model.eq("normal") & found.split.eq("patients")]
    heads = pd.concat([found, heads.assign(model="features, untrained")])
    text = nodule_answer(heads, group_agreement(study, folds), gains, lost, source="phantoms")
    assert "the balanced accuracy is 51 %, near that of one answer for all slices" in text
    assert "training on the first dataset: untrained " in text
    assert (
        nodule_layout(found)
        .set_index(["model", "folds"])["all: accuracy, k/n"]["normal", "patients"]
        .endswith(f" {own.k}/{own.n}")
    )
    for figure in (transfer_matrix(table, attack="momentum"), nodule_dots(found)):
        sizes = [
            t.get_fontsize() for ax in figure.axes for t in ax.findobj(lambda o: hasattr(o, "get_fontsize"))
        ]
        assert min(sizes) >= 8 and figure.get_figwidth() == 7
