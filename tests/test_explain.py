"""Explanations: planted networks whose true explanation is known, and maps whose measures are known."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from fortify.explain import (
    CONTROLS,
    METHODS,
    aligned,
    aligned_layout,
    alignment,
    attribute,
    average_precision,
    clean_and_attacked,
    concentration,
    control,
    deletion_insertion,
    explained,
    hits,
    idle_networks,
    located,
    located_layout,
    measured,
    randomised,
    rank_correlation,
    sanity,
    spoken,
)
from fortify.explain.figures import cascade_lines, map_panel, measure_dots
from fortify.training import layers

SIDE = 16
MASK = np.zeros((SIDE, SIDE), bool)
MASK[4:8, 8:12] = True


class LooksInTheMask(nn.Module):
    """Class 1 by the sum of the pixels in the mask alone, after a convolution that changes nothing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 2, bias=False))
        with torch.no_grad():
            self.conv.weight.fill_(1)
            self.head[1].weight.zero_()
            self.head[1].weight[1] = torch.from_numpy(MASK.ravel().astype(np.float32))

    def forward(self, x):
        return self.head(self.conv(x))


@pytest.fixture(scope="module")
def shown():
    return torch.rand(6, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_network_looks_at_is_found_where_it_looks(shown, method):
    pytest.importorskip("captum", reason="the extra explain is not installed")
    net, ones = LooksInTheMask(), np.ones(len(shown), int)
    maps = attribute(net, shown, ones, method)
    assert maps.shape == (6, SIDE, SIDE) and maps.dtype == np.float32 and (maps >= 0).all()
    if method == "Grad-CAM":  # it weights the channels' maps: here the image itself, wherever it is bright
        assert rank_correlation(maps, shown.squeeze(1).numpy()) == pytest.approx(1)
        return
    assert concentration(maps, MASK) == pytest.approx(1 / MASK.mean(), rel=1e-4)
    assert hits(maps, MASK).all() and average_precision(maps, MASK) == pytest.approx(1)


def test_attributions_leave_the_network_as_it_was(model, images):
    pytest.importorskip("captum", reason="the extra explain is not installed")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    maps = attribute(model, images[:4], [0, 1, 2, 0], "SmoothGrad", seed=1)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert np.array_equal(maps, attribute(model, images[:4], [0, 1, 2, 0], "SmoothGrad", seed=1))
    assert not np.array_equal(maps, attribute(model, images[:4], [0, 1, 2, 0], "SmoothGrad", seed=2))
    model.eval()


def test_an_unknown_method_lists_those_there_are(model, images):
    with pytest.raises(ValueError, match="Grad-CAM"):
        attribute(model, images[:2], [0, 0], "LIME")


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_know_the_image_alone(shown, name):
    maps = control(shown, name)
    assert maps.shape == (6, SIDE, SIDE) and np.isfinite(maps).all() and (maps >= 0).all()
    assert 0.5 < np.nanmean(concentration(maps, MASK)) < 5


def test_concentration_of_chance_is_one_and_of_nothing_is_nan():
    assert concentration(np.ones((2, SIDE, SIDE)), MASK) == pytest.approx(1)
    assert np.isnan(concentration(np.zeros((1, SIDE, SIDE)), MASK)).all()
    assert np.isnan(concentration(np.ones((1, SIDE, SIDE)), np.zeros_like(MASK))).all()
    assert np.isnan(average_precision(np.ones((1, SIDE, SIDE)), np.zeros_like(MASK))).all()


def test_average_precision_of_a_constant_map_is_the_area():
    assert average_precision(np.ones((1, SIDE, SIDE)), MASK) == pytest.approx(MASK.mean())
    assert not hits(np.where(MASK, 0, 1.0)[None], MASK).any()


@pytest.mark.parametrize("baseline", ["mean", "blur"])
def test_a_true_map_deletes_faster_and_inserts_faster_than_a_wrong_one(baseline):
    """A bright square decides: of the true map the square goes first, of the wrong one last."""
    images = torch.full((3, 1, SIDE, SIDE), 0.2)
    images[:, :, 4:8, 8:12] = 1.0
    net = LooksInTheMask()
    with torch.no_grad():
        net.head[1].weight.mul_(2)
        net.head[1].weight[0].fill_(0.375)  # class 1 while the square's pixels sum to more than about 12
    true, wrong = (np.broadcast_to(m, (3, SIDE, SIDE)).astype(float) for m in (MASK, ~MASK))
    ones = np.ones(3, int)
    found = [deletion_insertion(net, images, ones, maps, baseline=baseline) for maps in (true, wrong)]
    assert (found[0][0] < found[1][0]).all() and (found[0][1] > found[1][1]).all()
    with pytest.raises(ValueError, match="mean"):
        deletion_insertion(net, images, ones, true, baseline="black")


def test_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    a, b = np.random.default_rng(0).random((2, 3, 5, 5))
    expected = [spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a, b, strict=True)]
    assert rank_correlation(a, b) == pytest.approx(expected)
    assert np.isnan(rank_correlation(a, np.ones_like(a))).all()


def test_alignment_of_a_linear_network_is_the_distance_to_its_boundary(shown):
    found = alignment(LooksInTheMask(), shown)
    distance = shown.squeeze(1).numpy()[:, MASK].sum(1) / np.sqrt(MASK.sum())
    assert found == pytest.approx(distance, rel=1e-4)


def test_layers_are_drawn_anew_from_the_last_to_the_first(model):
    names = [name for name, _ in model.named_parameters()]
    changed = []
    for _, copied in randomised(model):
        now = dict(copied.named_parameters())
        changed.append({n for n, p in model.named_parameters() if not torch.equal(p, now[n])})
    assert changed[0] == {"1.fc.weight", "1.fc.bias"} and all(a <= b for a, b in itertools.pairwise(changed))
    convolutions = {n for n, p in model.named_parameters() if p.ndim == 4}
    assert convolutions <= changed[-1] and len(names) == len(list(model.parameters()))


def test_the_table_tells_a_network_that_looks_in_the_mask_from_a_control(shown):
    pytest.importorskip("captum", reason="the extra explain is not installed")
    net, ones = LooksInTheMask(), np.ones(len(shown), int)
    maps = {
        ("normal", "gradient"): attribute(net, shown, ones, "gradient"),
        ("", "edges"): control(shown, "edges"),
    }
    groups = [0, 0, 1, 1, 2, 2]
    table = measured({"normal": net}, shown, ones, maps, regions={"lungs": MASK}, groups=groups)
    lungs = table[table.measure.eq("lungs")].set_index("map")
    assert lungs.loc["gradient", "low"] > 15 > lungs.loc["edges", "high"]
    assert set(table.measure) == {
        "lungs",
        *(f"{k}, {b}" for k in ("deletion", "insertion") for b in ("mean", "blur")),
    }
    assert (table.low <= table["mean"]).all() and (table["mean"] <= table.high).all()
    same = maps["normal", "gradient"]
    checks = sanity(net, shown, ones, "gradient", same, {"attack": same}, groups=groups, name="normal")
    assert checks.set_index("measure").loc["attack", "mean"] == pytest.approx(1)
    words = spoken(pd.concat([table, checks]))
    assert "divided by that of the area: 16.0 (normal training, *gradient*; 95 % interval" in words
    assert "The best control, *edges*, which knows no network, has" in words
    assert "with its clean map of 1.00 (normal training)" in words
    no_proof = "**No map lies in the lungs more than the best control does.**"
    assert no_proof not in words, "the network's map is ahead of the control"
    ahead = table["mean"].where(table.model.ne("") | table.measure.ne("lungs"), 17)
    assert no_proof in spoken(pd.concat([table.assign(mean=ahead), checks]))
    figure = measure_dots(table, measures={"lungs": "lungs / area"})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "normal",
        "control",
        "floor",
    ]


def test_every_measure_of_both_networks_clean_and_attacked(shown):
    pytest.importorskip("captum", reason="the extra explain is not installed")
    nets, ones = {"normal": LooksInTheMask(), "adversarial": LooksInTheMask()}, np.ones(len(shown), int)
    black = {
        "normal": torch.zeros_like(shown),
        "adversarial": shown,
    }  # all is gone, or none
    with torch.no_grad():
        nets["normal"].head[1].weight += 0.01  # looks a little elsewhere too
    options = {"regions": {"lungs": MASK}, "groups": [0, 0, 1, 1, 2, 2], "noise_level": 4.0}
    maps, broken, table = explained(nets, shown, black, ones, **options, where=", here")
    assert {name for name, _ in maps} == {"normal", "adversarial", ""} and len(broken) == 2 * len(METHODS)
    assert table.measure.str.endswith(", here").all()
    table = table.assign(measure=table.measure.str.removesuffix(", here"))
    value = table.set_index(["measure", "model", "map"])["mean"]
    assert value["lungs", "adversarial", "gradient"] == pytest.approx(16)
    assert value["lungs, attacked", "adversarial", "gradient"] == pytest.approx(16)
    assert value["lungs", "normal", "gradient"] < 16
    assert value["attack", "adversarial", "gradient"] == pytest.approx(1), "its image is unchanged"
    assert np.isnan(value["lungs, attacked", "normal", "integrated gradients"]), "of black nothing is left"
    line = clean_and_attacked(table, {"lungs": "in the lungs"}).set_index(["training", "map"])
    assert line.loc[("adversarial", "gradient"), "in the lungs"] == "16.00 → 16.00"
    assert line.loc[("adversarial", "gradient"), "slices"] == "6"
    assert line.loc[("normal", "integrated gradients"), "slices"] == "6 → 0", "of black nothing is left"


def test_a_cascade_has_a_row_a_depth_and_ends_where_the_first_layer_is_left(model, images):
    pytest.importorskip("captum", reason="the extra explain is not installed")
    labels, groups = np.zeros(len(images), int), np.arange(len(images)) % 2
    own = attribute(model, images, labels, "gradient")
    table = sanity(model, images, labels, "gradient", own, {}, groups=groups, name="normal")
    cascade = table[table.measure.eq("cascade")]
    total = len(layers(model)) - 1
    assert cascade.layers.tolist() == sorted(set(np.linspace(1, total, min(total, 5)).round().astype(int)))
    last = table[table.measure.eq("drawn anew")].iloc[0]
    assert last["mean"] == cascade["mean"].iloc[-1] < 0.9
    figure = cascade_lines(cascade)
    assert [ax.get_title() for ax in figure.axes] == ["normal training"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "floor: two different slices",
        "gradient",
    ]


def test_a_map_of_the_mask_finds_it_and_one_of_the_rest_does_not():
    masks = np.stack([MASK, MASK.T, np.roll(MASK, 3, axis=0)])
    rest = np.where(masks, 0.0, 1.0)
    maps = {("normal", "a"): masks * 1.0, ("adversarial", "a"): rest, ("", "edges"): rest}
    table = located(maps, masks, groups=[0, 0, 1], where=", attacked")
    assert table.measure.unique().tolist() == ["pointing game, attacked", "AUPRC, attacked"]
    assert table.floor.unique().tolist() == [masks.mean()] and table.n.eq(3).all()
    of = table.groupby("model")["mean"].apply(list)
    assert of["normal"] == [1, 1] and of["adversarial"][0] == 0 and of["adversarial"][1] < masks.mean() + 1e-9
    shown = located_layout(table).set_index("map")
    assert shown.shape == (2, 4) and shown.loc["a", "pointing game, attacked, normal"] == "1.00 (1.00–1.00)"
    words = spoken(located(maps, masks, groups=[0, 0, 1]))
    assert "in 100 % (*a*, normal training; 95 % interval" in words and "of 3 slices" in words
    assert "That of the *edges* does in 0 %." in words
    edges = shown.loc["edges"].to_numpy()
    assert edges[0] == edges[1] == "0.00 (0.00–0.00)", "a control stands beside both networks"


def test_a_panel_shows_the_slice_and_its_maps(shown):
    maps = {"edges": control(shown, "edges")[0], "the image": control(shown, "the image")[0]}
    figure = map_panel([("normal, clean", shown[0, 0].numpy(), maps)])
    assert [ax.get_title() for ax in figure.axes] == ["slice", "edges", "the image"]


def test_alignment_is_in_the_table_with_its_interval(shown):
    pytest.importorskip("captum", reason="the extra explain is not installed")
    net, ones, groups = LooksInTheMask(), np.ones(len(shown), int), [0, 0, 1, 1, 2, 2]
    maps = {("normal", "gradient"): attribute(net, shown, ones, "gradient")}
    maps["", "the image"] = control(shown, "the image")
    table = aligned({"normal": net}, shown, maps, groups=groups, where=", here").set_index("measure")
    assert table.loc["alignment, here", "mean"] == pytest.approx(alignment(net, shown).mean())
    correlation = rank_correlation(maps["normal", "gradient"], maps["", "the image"])
    row = table.loc["correlation with the image, here"]
    assert row["mean"] == pytest.approx(np.nanmean(correlation)) and row.low <= row["mean"] <= row.high
    said = aligned_layout(table.reset_index())
    assert said.columns.tolist() == ["training", *table.index] and said.training.tolist() == ["normal"]


def test_a_network_that_does_not_classify_is_named_beside_its_maps(shown):
    labels = np.arange(len(shown)) % 2

    class Constant(nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).sum(1) * 0, x.flatten(1).sum(1) * 0 + 1], 1)

    assert idle_networks({"adversarial": Constant()}, shown, labels) == ["adversarial"]
    assert idle_networks({"adversarial": Constant()}, shown, np.ones(len(shown), int)) == []
    none = pd.DataFrame(columns=["measure", "model", "map", "mean", "floor"])
    words = spoken(none, idle=["adversarial"])
    assert words.startswith("- Adversarial training hardly learned to classify the nodules")
