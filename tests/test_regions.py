"""Regions: masks that hold what they claim, blanking that keeps the rest, attacks that stay inside."""

import numpy as np
import pytest
import torch

from fortify import leakage, regions
from fortify.attacks import CW, FGSM, PGD, craft, perturbation_norms
from fortify.data import load_iq_oth_nccd, to_tensor
from fortify.models import predict


def chest(size=96):
    """A body of grey 200 with two lungs of 60, a nodule of 220 in one, air of 30, and a table below."""
    y, x = (np.indices((size, size)) + 0.5) / size - 0.5
    image = np.full((size, size), 30, dtype=np.uint8)
    body = (x / 0.4) ** 2 + (y / 0.3) ** 2 < 1
    image[body] = 200
    lungs = np.zeros_like(body)
    for side in (-1, 1):
        lungs |= ((x - side * 0.18) / 0.12) ** 2 + (y / 0.18) ** 2 < 1
    image[lungs] = 60
    image[np.hypot(x - 0.18, y) < 0.03] = 220
    image[np.abs(y - 0.4) < 0.01] = 180
    return image, body, lungs


def test_masks_find_a_drawn_chest():
    image, body, lungs = chest()
    found = regions.lung_mask(image[None])[0]
    assert (found & lungs).sum() > 0.97 * lungs.sum() and (found & ~lungs).sum() < 0.03 * lungs.sum()
    assert found[image == 220].all(), "a nodule counts as lung"
    found = regions.body_mask(image[None])[0]
    assert (found ^ body).sum() < 0.03 * body.sum(), "lungs included, table not"


@pytest.mark.parametrize(
    "call",
    [
        regions.body_mask,
        regions.lung_mask,
        lambda images: regions.crop_to_lungs(images, size=32),
        lambda images: regions.blank(images, np.ones(images.shape[:3], bool)),
        lambda images: leakage.views(images, frame_width=4),
    ],
)
def test_colour_images_are_refused(call):
    images = np.stack([chest()[0][None]] * 3, axis=3)
    with pytest.raises(
        ValueError, match=r"masks are made of grey images, uint8 \(N, H, W\), not uint8 \(1, 96"
    ):
        call(images)


def test_brightness_and_contrast_do_not_move_the_masks():
    image, _, _ = chest()
    darker = np.rint(image * 0.6 + 10).astype(np.uint8)
    both = regions.lung_mask(np.stack([image, darker]))
    assert np.array_equal(both[0], both[1])


def test_an_image_without_lungs_is_reported_not_hidden():
    image, _, _ = chest()
    flat = np.full_like(image, 7)
    solid = np.where(image == 30, image, 200).astype(np.uint8)
    masks = regions.lung_mask(np.stack([image, flat, solid]))
    assert regions.implausible(masks).tolist() == [False, True, True]
    assert not masks[1:].any()


@pytest.mark.parametrize("size", [32, 64])
def test_phantom_masks_are_dark_inside_a_bright_body(size):
    from fortify.phantom import phantom_slices

    images = phantom_slices(patients=30, slices_per_patient=2, size=size, seed=1).images
    lungs, body = regions.lung_mask(images), regions.body_mask(images)
    assert regions.implausible(lungs).mean() < 0.1
    whole = ~regions.implausible(lungs)
    inside = np.array([i[m].mean() for i, m in zip(images[whole], lungs[whole], strict=True)])
    around = np.array([i[m].mean() for i, m in zip(images[whole], (body & ~lungs)[whole], strict=True)])
    assert (inside < around).all()
    assert 0.25 < body.mean() < 0.6


def test_real_slices_have_lungs(real_folder):
    slices = load_iq_oth_nccd(real_folder, size=112).subset(range(0, 1097, 8))
    masks = regions.lung_mask(slices.images)
    assert regions.implausible(masks).mean() < 0.03
    assert 0.08 < masks.mean() < 0.15
    normal = slices.labels == slices.class_names.index("normal")
    assert regions.implausible(masks[normal]).mean() < 0.02


def test_a_crop_is_the_square_around_the_lungs():
    image, _, _ = chest(192)
    crops, missing = regions.crop_to_lungs(image[None], size=96)
    assert crops.shape == (1, 96, 96) and crops.dtype == np.uint8 and not missing.any()
    dark = crops[0] < 130  # the lungs are 60, the body 200; air of 30 is out of sight at their sides
    middle = dark[:, 20:76]
    columns = np.flatnonzero(dark[48])
    # The lungs are 0.6 of the side wide and 0.36 high; with 6 % on each side they fill 1 / 1.12 of the crop.
    assert columns[0] == pytest.approx(96 * 0.06 / 1.12, abs=2)
    assert columns[-1] == pytest.approx(96 * 1.06 / 1.12, abs=2)
    rows = np.flatnonzero(middle.any(1) & (crops[0][:, 48] > 130))
    assert (rows[0] + rows[-1]) / 2 == pytest.approx(47.5, abs=2)


def test_a_crop_does_not_depend_on_where_the_patient_lies_or_how_large_the_field_is():
    image, _, _ = chest(192)
    moved = np.roll(image, (10, -12), axis=(0, 1))
    wide = np.full((384, 384), 30, dtype=np.uint8)
    wide[90:282, 100:292] = image
    first, *others = (regions.crop_to_lungs(i[None], size=96)[0][0].astype(int) for i in (image, moved, wide))
    assert all(np.abs(other - first).mean() < 2 for other in others)


def test_without_lungs_the_body_is_shown_or_all_and_it_is_said():
    image, body, _ = chest(96)
    solid = np.where(body, 200, 30).astype(np.uint8)
    flat = np.full_like(image, 7)
    crops, missing = regions.crop_to_lungs(np.stack([image, solid, flat]), size=48)
    assert missing.tolist() == [False, True, True]
    bright = (crops[1] > 115).any(0)
    assert bright.mean() == pytest.approx(1 / 1.12, abs=0.05), "the body is 0.8 of the slice's side"
    assert (crops[2] == 7).all()


def test_beyond_the_image_a_crop_is_black():
    image, _, _ = chest(192)
    cut = image[50:142]  # half as high as the lungs are wide
    crops, _ = regions.crop_to_lungs(cut[None], size=96)
    assert (crops[0][:5] == 0).all() and (crops[0][-5:] == 0).all() and crops[0].any()


def test_real_slices_are_cropped_to_their_lungs(real_folder):
    images = load_iq_oth_nccd(real_folder, size=224).images[::40]
    crops, missing = regions.crop_to_lungs(images, size=112)
    assert missing.mean() < 0.05
    inside = [regions.lung_mask(each).mean() for each in (images, crops)]
    assert inside[1] > 2 * inside[0], "lungs fill more of the picture"


def test_a_frame_is_a_frame():
    mask = regions.frame_mask((10, 8), 2)
    assert mask.sum() == 10 * 8 - 6 * 4 and not mask[2:-2, 2:-2].any()
    for width in (0, 4):
        with pytest.raises(ValueError, match="nothing or everything"):
            regions.frame_mask((10, 8), width)


def test_blanking_keeps_the_rest_and_tells_nothing_of_what_it_hides(phantoms):
    images = phantoms.images[:6]
    mask = regions.body_mask(images)
    blanked = regions.blank(images, mask)
    assert np.array_equal(blanked[~mask], images[~mask])
    assert all(len(np.unique(b[m])) == 1 for b, m in zip(blanked, mask, strict=True))
    hidden = np.where(mask, 255 - images, images)  # another inside, the same outside
    assert np.array_equal(regions.blank(hidden, mask), blanked)
    assert not np.shares_memory(blanked, images)
    with pytest.raises(ValueError, match="covers a whole image"):
        regions.blank(images, np.ones(images.shape, bool))
    half = np.array([[[10, 10], [20, 99]]], np.uint8)  # kept are 10 and 20: no grey between
    assert regions.blank(half, np.array([[0, 1], [0, 1]], bool)).tolist() == [[[10, 10], [20, 10]]]
    given = regions.blank(images, mask, value=128)
    assert (given[mask] == 128).all() and np.array_equal(given[~mask], images[~mask])


def test_views_hide_what_their_names_say(phantoms):
    images = phantoms.images[:8]
    shown = leakage.views(images, frame_width=3)
    lungs, body = regions.lung_mask(images), regions.body_mask(images)
    assert np.array_equal(shown["whole image"], images)
    regions_of = {"lungs blanked": lungs, "lungs at grey 128": lungs, "body blanked": body}
    for name, hidden in regions_of.items():
        assert np.array_equal(shown[name][~hidden], images[~hidden])
        assert (shown[name] != images)[hidden].mean() > 0.8
    frame = regions.frame_mask(images.shape[1:], 3)
    assert np.array_equal(shown["only the frame"][:, frame], images[:, frame])
    assert np.ptp(shown["only the frame"][:, ~frame], axis=1).max() == 0
    changed = shown["same hole elsewhere"] != images
    assert 0 < changed.sum() <= lungs.sum() and (changed & lungs).sum() < 0.1 * lungs.sum()


@pytest.mark.parametrize("attack", [FGSM(8), PGD(8, steps=5), CW(2, 10, stepsize=0.05)], ids=lambda a: a.name)
def test_an_attack_stays_inside_its_mask_and_its_budget(model, phantoms, images, labels, attack):
    x, y = images[:20], labels[:20]
    mask = regions.body_mask(phantoms.images[:20])
    crafted = leakage.craft_within(model, x, y, attack, mask, batch_size=8)
    allowed = torch.from_numpy(mask).unsqueeze(1)
    assert torch.equal(crafted.images[~allowed], x[~allowed])
    assert crafted.images.min() >= 0 and crafted.images.max() <= 1
    if attack.name != "cw":
        assert perturbation_norms(x, crafted.images)[0].max() <= 8 + 1e-4
        assert (crafted.images != x)[allowed].float().mean() > 0.5
    assert torch.equal(crafted.success, predict(model, crafted.images, batch_size=8).argmax(1) != y)


def test_an_attack_on_everything_is_the_attack_and_on_nothing_is_none(model, images, labels):
    x, y = images[:12], labels[:12]
    attack = PGD(4, steps=3)
    everywhere = leakage.craft_within(model, x, y, attack, np.ones((32, 32), bool), seed=5)
    assert torch.equal(everywhere.images, craft(model, x, y, attack, seed=5).images)
    nowhere = leakage.craft_within(model, x, y, attack, np.zeros((32, 32), bool))
    assert torch.equal(nowhere.images, x)


def test_a_restricted_attack_breaks_no_more_than_a_free_one_and_leaves_the_model_alone(model, phantoms):
    x, y = to_tensor(phantoms.images), torch.from_numpy(phantoms.labels)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    body = regions.body_mask(phantoms.images)
    attack = PGD(4, steps=10)
    free = craft(model, x, y, attack).success.sum()
    inside = leakage.craft_within(model, x, y, attack, body).success.sum()
    clean = (predict(model, x).argmax(1) != y).sum()
    assert clean < inside <= free + 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_table_counts_what_the_model_says(model, phantoms):
    images, labels = phantoms.images[:30], phantoms.labels[:30]
    table = leakage.lungs_or_scanner(model, images, labels, attack=PGD(4, steps=2), frame_width=2)
    assert table["view"].tolist()[:6] == list(leakage.views(images, frame_width=2))
    assert table.attacked.tolist() == [False] * 6 + [True] * 4
    right = predict(model, to_tensor(images)).argmax(1).numpy() == labels
    assert table.k[0] == right.sum() and table.area[0] == 0
    assert (table.n == 30).all() and np.allclose(table.accuracy, table.k / table.n)
    assert table.area[6] == 1 and table.area[7:].sum() == pytest.approx(1), "the regions are a partition"
    assert (table.low < table.accuracy + 1e-9).all() and (table.accuracy < table.high + 1e-9).all()
    assert table.k[6] == table.k[6:].min()


def test_wrong_arrays_are_refused(model, images, labels):
    with pytest.raises(ValueError, match="uint8"):
        regions.lung_mask(images.numpy()[:, 0])
    with pytest.raises(ValueError):
        leakage.craft_within(model, images[:2], labels[:2], FGSM(1), np.ones((5, 5), bool))
    with pytest.raises(ValueError, match="attacks of one start"):
        leakage.craft_within(model, images[:2], labels[:2], PGD(1, restarts=2), np.ones((32, 32), bool))
