"""What fortify.data and fortify.workflow.download promise, on small real image files."""

import io
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import types
import warnings
import zipfile
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFile

from fortify import data, splits
from fortify.data import IQ_OTH_NCCD, DataError, Slices, load_folder, load_split_folders
from fortify.workflow import download


def scan(seed=0, *, width=40, height=40):
    """A smooth uint8 image whose greys span 0..255 as those of a CT slice do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write(path, image=None, **options):
    """Write ``image`` (an array, a Pillow image, or by default some scan) and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = scan() if image is None else image
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of three and two lossless 40 x 40 images."""
    for seed, name in enumerate(("cats/1", "cats/2", "cats/3", "dogs/1", "dogs/2")):
        write(tmp_path / "pets" / f"{name}.png", scan(100 + seed))
    return tmp_path / "pets"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A stand-in for IQ-OTH/NCCD: its folders, file names and counts, with 32 x 32 scans. Only read it."""
    root = tmp_path_factory.mktemp("whole")
    for i, (name, count) in enumerate(IQ_OTH_NCCD.counts.items()):
        for k in range(1, count + 1):
            stem = name.removesuffix("s")
            write(root / name / f"{stem} ({k}).jpg", scan(1000 * i + k, width=32, height=32))
    return root


@pytest.fixture
def a_slices():
    return Slices(
        images=np.stack([scan(i) for i in range(4)]),
        labels=np.array([0, 1, 1, 0]),
        names=("a/1.png", "b/1.png", "b/ü.png", "a/2.png"),
        class_names=("a", "b"),
        source="four scans",
        sha256="0" * 64,
        groups=np.array([5, 5, 7, 8]),
        patients=np.array([1, 1, 2, 3]),
        original_sizes=np.full((4, 2), 40),
    )


def same(a, b):
    return all(
        np.array_equal(getattr(a, f), getattr(b, f)) and type(getattr(a, f)) is type(getattr(b, f))
        for f in a.__dataclass_fields__
    )


# --- Slices


def test_groups_default_to_one_a_slice(a_slices):
    slices = Slices(a_slices.images, a_slices.labels, a_slices.names, ("a", "b"), "", "")
    assert slices.groups.dtype == np.int64 and slices.groups.tolist() == [0, 1, 2, 3]
    assert slices.patients is None and slices.original_sizes is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": np.zeros((4, 8, 8))},
            r"Slices.images must be an array of uint8 \(4, H, W\) or \(4, H, W, channels\), not float64",
        ),
        ({"images": np.zeros((3, 8, 8), np.uint8)}, "Slices.images"),
        ({"images": np.zeros((4, 1, 8, 8), np.uint8)}, "Slices.images must have the channels last"),
        ({"images": np.zeros((4, 3, 8, 8), np.uint8)}, "Slices.images must have the channels last"),
        ({"images": np.zeros((4, 8, 8, 3), np.float32)}, "Slices.images"),
        ({"images": [[0]]}, "Slices.images .* not list"),
        ({"labels": np.zeros(4)}, "Slices.labels must be 4 integers, not float64"),
        ({"labels": np.zeros(4, bool)}, "Slices.labels must be 4 integers, not bool"),
        ({"labels": ["a", "b", "a", "b"]}, "Slices.labels must be 4 integers, not 'list'"),
        ({"labels": np.zeros(3, np.int64)}, "Slices.labels must be 4 integers"),
        ({"labels": np.array([0, 1, 2, 0])}, r"Slices.labels span 0\.\.2, but 2 classes have labels 0\.\.1"),
        ({"labels": np.array([0, 1, -1, 0])}, r"span -1\.\.1"),
        ({"names": ("x", "y", "x", "z")}, "Slices.names must be unique; repeated: x"),
        ({"class_names": ("a", "a")}, "Slices.class_names must be unique"),
        ({"groups": np.zeros(3, np.int64)}, "Slices.groups"),
        ({"groups": np.full(4, 2**63, np.uint64)}, "Slices.groups"),
        ({"patients": np.zeros(4)}, "Slices.patients must be 4 integers or non-empty strings, not float64"),
        ({"patients": ["a", "b", "a", ""]}, "Slices.patients must be 4 integers or non-empty strings"),
        ({"patients": ["a", "b", "a", None]}, "Slices.patients"),
        ({"patients": ["a", "b", "a", float("nan")]}, "Slices.patients"),
        ({"patients": [1, 2, "a", 3]}, "Slices.patients"),
        ({"patient_names": ("x", "y", "z")}, "Slices.patient_names must name each"),
        ({"original_sizes": np.zeros((4, 3), np.int64)}, "Slices.original_sizes"),
    ],
)
def test_slices_refuse_fields_that_do_not_fit(a_slices, change, message):
    with pytest.raises(DataError, match=message):
        replace(a_slices, **change)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "int32", "uint64", "int64", object, list])
def test_labels_groups_and_patients_may_be_integers_of_any_kind(a_slices, kind):
    given = {name: getattr(a_slices, name).tolist() for name in ("labels", "groups", "patients")}
    given = {name: ids if kind is list else np.array(ids, kind) for name, ids in given.items()}
    assert same(replace(a_slices, **given), a_slices)


@pytest.mark.parametrize("kind", [list, np.array, lambda ids: np.array(ids, object), pd.Series])
def test_patients_and_groups_may_be_strings(a_slices, tmp_path, kind):
    fields = (a_slices.images, a_slices.labels, a_slices.names, ("a", "b"), "x", "y")
    slices = Slices(*fields, patients=kind(["P10", "P9", "P10", "p"]))
    assert slices.patients.tolist() == [0, 1, 0, 2] == slices.groups.tolist()
    assert slices.patient_names == ("P10", "P9", "p") and slices.patients.dtype == np.int64
    slices.save(tmp_path / "s.npz")
    assert same(Slices.load(tmp_path / "s.npz"), slices)
    part = slices.subset([3, 0])
    assert [part.patient_names[p] for p in part.patients] == ["p", "P10"]
    slices = Slices(*fields, patients=[7, 7, 8, 9], groups=kind(["x", "y", "y", "x"]))
    assert slices.groups.tolist() == [0, 1, 1, 0] and slices.patients.tolist() == [7, 7, 8, 9]
    assert slices.patient_names is None


@pytest.mark.parametrize("index", [[2, 0], np.array([2, 0]), (2, 0), [-2, -4]])
def test_subset_keeps_every_field_in_step(a_slices, index):
    part = a_slices.subset(index)
    assert len(part) == 2 and part.names == ("b/ü.png", "a/1.png")
    assert (
        part.labels.tolist() == [1, 0] and part.groups.tolist() == [7, 5] and part.patients.tolist() == [2, 1]
    )
    assert np.array_equal(part.images, a_slices.images[[2, 0]]) and part.original_sizes.shape == (2, 2)
    assert (part.sha256, part.class_names) == (a_slices.sha256, a_slices.class_names)


def test_subset_by_mask_and_by_nothing(a_slices):
    assert a_slices.subset(a_slices.labels == 1).names == ("b/1.png", "b/ü.png")
    assert len(a_slices.subset(np.zeros(4, dtype=bool))) == 0


def test_subset_refuses_repeats_and_what_is_not_there(a_slices):
    with pytest.raises(DataError, match="unique"):
        a_slices.subset([1, 1])
    with pytest.raises(IndexError):
        a_slices.subset([4])


def test_save_and_load_return_the_same_and_the_same_bytes(a_slices, tmp_path):
    bare = Slices(a_slices.images, a_slices.labels, a_slices.names, ("a", "b"), "x", "y")
    for slices in (a_slices, bare, a_slices.subset(a_slices.labels > 5)):
        slices.save(tmp_path / "deep" / "one.npz")
        slices.save(tmp_path / "deep" / "two.npz")
        assert same(Slices.load(tmp_path / "deep" / "one.npz"), slices)
        assert (tmp_path / "deep" / "one.npz").read_bytes() == (tmp_path / "deep" / "two.npz").read_bytes()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["one.npz", "two.npz"]


def test_load_refuses_every_truncation_and_never_returns_changed_pixels(a_slices, tmp_path):
    path = tmp_path / "s.npz"
    a_slices.save(path)
    whole_file = path.read_bytes()
    for length in range(0, len(whole_file), 97):
        path.write_bytes(whole_file[:length])
        with pytest.raises(DataError, match="not a readable slices file"):
            Slices.load(path)
    refused = 0
    for position in range(0, len(whole_file), 61):
        damaged = bytearray(whole_file)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings(action="ignore"):
                assert same(Slices.load(path), a_slices)  # the flip hit a byte that carries nothing
        except DataError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("kind", ["text", "npy", "other npz", "other version"])
def test_load_refuses_other_files(a_slices, tmp_path, kind):
    path = tmp_path / "s.npz"
    a_slices.save(path)
    with open(path, "r+b" if kind == "other version" else "wb") as file:
        if kind == "text":
            file.write(b"hello")
        elif kind == "npy":
            np.save(file, np.zeros(3))
        elif kind == "other npz":
            np.savez(file, x=np.zeros(3))
        else:
            arrays = dict(np.load(file))
            file.seek(0)
            np.savez(file, **arrays | {"format": np.asarray("fortify-slices-0")})
    with pytest.raises(DataError, match=r"s\.npz is not a readable slices file .*Delete it"):
        Slices.load(path)


class Trap:
    """Unpickling one runs ``mkdir``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_load_runs_no_pickle(a_slices, tmp_path):
    path = tmp_path / "s.npz"
    a_slices.save(path)
    trap = np.array([Trap(tmp_path / "sprung")], dtype=object)
    np.savez(path, **dict(np.load(path)) | {"patients": trap})
    with pytest.raises(DataError, match="not a readable slices file"):
        Slices.load(path)
    assert not (tmp_path / "sprung").exists()


def test_load_of_a_missing_file_says_which_notebook_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="01_data"):
        Slices.load(tmp_path / "none.npz")


# --- loading


def test_one_subfolder_is_one_class(folder):
    slices = load_folder(folder, size=40)
    assert slices.class_names == ("cats", "dogs") and slices.labels.tolist() == [0, 0, 0, 1, 1]
    assert slices.names == ("cats/1.png", "cats/2.png", "cats/3.png", "dogs/1.png", "dogs/2.png")
    assert slices.source == "pets, 5 images at 40 px"
    assert slices.original_sizes.tolist() == [[40, 40]] * 5


def test_classes_name_and_order_the_labels(folder):
    slices = load_folder(folder, size=40, classes={"dogs": "Dog", "cats": "Cat"})
    assert slices.class_names == ("Dog", "Cat") and slices.labels.tolist() == [0, 0, 1, 1, 1]
    assert slices.names[0] == "dogs/1.png"


def test_files_come_in_natural_order(tmp_path):
    for name in ("case (10).png", "case (9).png", "case (2).png", "case (1).PNG", "case (100).jpeg"):
        write(tmp_path / "a" / name)
    names = load_folder(tmp_path, size=40).names
    assert [n.split("(")[1].split(")")[0] for n in names] == ["1", "2", "9", "10", "100"]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
def test_images_of_the_right_size_pass_bit_for_bit(tmp_path, suffix, mode):
    every_grey = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32).astype(np.uint8)
    image = Image.fromarray(every_grey)
    write(tmp_path / "a" / f"1.{suffix}", image.convert(mode))
    for aspect in ("pad", "squash"):
        assert np.array_equal(load_folder(tmp_path, size=32, aspect=aspect).images[0], every_grey)


def test_a_grey_jpeg_loads_as_pillow_decodes_it(tmp_path):
    grey = Image.open(write(tmp_path / "a" / "1.jpg", scan(1)))
    colour = Image.open(write(tmp_path / "a" / "2.jpg", Image.fromarray(scan(1)).convert("RGB")))
    images = load_folder(tmp_path, size=40).images
    assert np.array_equal(images[0], np.asarray(grey)) and np.array_equal(
        images[1], np.asarray(colour)[..., 0]
    )


def test_colour_without_ct_becomes_luminance(tmp_path):
    rgb = np.stack([scan(1), scan(2), scan(3)], axis=2)
    write(tmp_path / "a" / "1.png", rgb)
    expected = rgb @ np.array([0.299, 0.587, 0.114])
    assert np.abs(load_folder(tmp_path, size=40, ct=False).images[0] - expected).max() <= 0.51


def test_colour_is_kept_where_asked(tmp_path):
    rgb = np.stack([scan(1), scan(2), scan(3)], axis=2)
    write(tmp_path / "a" / "1.png", rgb)
    write(tmp_path / "a" / "2.png", scan(4))  # grey among them
    write(tmp_path / "a" / "3.png", np.full((20, 40, 3), (200, 100, 50), np.uint8) + rgb[:20] % 8)
    slices = load_folder(tmp_path, size=40, ct=False, colour=True)
    assert slices.images.shape == (3, 40, 40, 3) and np.array_equal(slices.images[0], rgb)
    assert np.array_equal(slices.images[1], np.stack([scan(4)] * 3, axis=2))
    assert not slices.images[2, :10].any() and (slices.images[2, 10:30] >= (200, 100, 50)).all()
    with pytest.raises(ValueError, match="CT slices have no colour: pass ct=False"):
        load_folder(tmp_path, size=40, colour=True)
    write(tmp_path / "a" / "4.png", np.full((40, 40, 3), (9, 9, 7), np.uint8))
    with pytest.raises(DataError, match=r"a/4.png is constant \(every pixel is \(9, 9, 7\)\)"):
        load_folder(tmp_path, size=40, ct=False, colour=True)


def test_colour_images_go_wherever_grey_ones_go(tmp_path):
    for i in range(6):
        write(tmp_path / "ab"[i % 2] / f"{i}.png", np.stack([scan(i), scan(i + 10), scan(i)], axis=2))
    slices = load_folder(tmp_path, size=40, ct=False, colour=True, cache=tmp_path.parent / "cache")
    assert same(
        load_folder(tmp_path, size=40, ct=False, colour=True, cache=tmp_path.parent / "cache"), slices
    )
    grey = load_folder(tmp_path, size=40, ct=False, cache=tmp_path.parent / "cache")
    assert grey.images.ndim == 3, "a cache of colour images is no cache of grey ones"
    slices.save(tmp_path / "s.npz")
    assert same(Slices.load(tmp_path / "s.npz"), slices)
    assert slices.subset([1, 3]).images.shape == (2, 40, 40, 3)
    assert data.describe(replace(slices, original_sizes=None))["sizes"].tolist() == ["40 x 40 (3)"] * 2
    copied = slices.images.copy()
    copied[3] = copied[0]
    assert data.describe(replace(slices, images=copied))["duplicates"].sum() == 1
    copied[3, 7, 7, 2] ^= 1  # one channel of one pixel
    assert data.describe(replace(slices, images=copied))["duplicates"].sum() == 0


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to see it upright
    lying = scan(1, width=40, height=60)
    write(tmp_path / "a" / "1.png", Image.fromarray(lying), exif=exif)
    slices = load_folder(tmp_path, size=60)
    assert slices.original_sizes.tolist() == [[60, 40]]
    assert np.array_equal(slices.images[0, 10:50], np.rot90(lying, -1))


@pytest.mark.parametrize(("width", "height"), [(80, 40), (40, 80)])
def test_pad_keeps_proportions_between_black_borders(tmp_path, width, height):
    write(tmp_path / "a" / "1.png", np.maximum(scan(1, width=width, height=height), 1))
    image = load_folder(tmp_path, size=80).images[0]
    image = image if width > height else image.T
    assert not image[:20].any() and not image[60:].any() and (image[20:60] > 0).all()
    original = np.maximum(scan(1, width=width, height=height), 1)
    assert np.array_equal(image[20:60], original if width > height else original.T)  # only moved


def test_squash_fills_the_square(tmp_path):
    write(tmp_path / "a" / "1.png", np.maximum(scan(1, width=80, height=40), 1))
    slices = load_folder(tmp_path, size=40, aspect="squash")
    assert slices.images.shape == (1, 40, 40) and (slices.images > 0).all()
    assert slices.original_sizes.tolist() == [[80, 40]]


def test_reducing_averages_areas(tmp_path):
    image = scan(1, width=120, height=120)
    write(tmp_path / "a" / "1.png", image)
    means = image.reshape(40, 3, 40, 3).mean(axis=(1, 3))
    assert np.abs(load_folder(tmp_path, size=40).images[0] - means).max() <= 1  # Pillow rounds once an axis


def test_reducing_does_not_alias(tmp_path):
    stripes = np.tile(np.array([40, 200], dtype=np.uint8), (128, 64))
    write(tmp_path / "a" / "1.png", stripes)
    assert np.abs(load_folder(tmp_path, size=32).images[0].astype(int) - 120).max() <= 1


def test_enlarging_is_smooth(tmp_path):
    ramp = np.tile(np.linspace(0, 248, 32).round().astype(np.uint8), (32, 1))
    write(tmp_path / "a" / "1.png", ramp)
    image = load_folder(tmp_path, size=128).images[0].astype(int)
    assert 0 < np.diff(image, axis=1).max() <= 3  # repeated pixels would step by 8


def test_other_files_and_folders_are_left_out(folder):
    (folder / "cats" / "notes.txt").write_text("not an image")
    (folder / "cats" / "._1.png").write_bytes(b"what macOS leaves")
    (folder / "cats" / "deep.png").mkdir()
    (folder / ".hidden").mkdir()
    with pytest.warns(
        UserWarning, match=r"cats: 2 files or folders beside the images are not read: \.txt; deep\.png/"
    ):
        assert len(load_folder(folder, size=40)) == 5


@pytest.mark.parametrize("wrong", [{"aspect": "crop"}, {"aspect": None}, {"size": 0}, {"size": 5000}])
def test_a_wrong_argument_is_a_value_error(folder, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
        load_folder(folder, **{"size": 40} | wrong)
    assert not isinstance(caught.value, DataError)


# --- classes of several folders


@pytest.fixture
def parts(tmp_path):
    """train, valid and test of three, three and two of the classes."""
    for i, (part, classes) in enumerate({"train": "abc", "valid": "abc", "test": "ac"}.items()):
        for c in classes:
            for k in range(2):
                write(tmp_path / "split" / part / c / f"{k}.png", scan(100 * i + 10 * ord(c) + k))
    return tmp_path / "split"


def test_a_folder_that_lacks_a_class_keeps_the_labels_of_the_others(parts):
    train = load_folder(parts / "train", size=40)
    with pytest.raises(DataError, match="Class folder 'b' is missing in .*missing_ok=True"):
        load_folder(parts / "test", size=40, classes=train.class_names)
    test = load_folder(parts / "test", size=40, classes=train.class_names, missing_ok=True)
    assert test.class_names == train.class_names == ("a", "b", "c") and test.labels.tolist() == [0, 0, 2, 2]
    assert data.describe(test)["count"].tolist() == [2, 0, 2]
    named = load_folder(parts / "test", size=40, classes={"c": "C", "b": "B", "a": "A"}, missing_ok=True)
    assert named.class_names == ("C", "B", "A") and named.labels.tolist() == [0, 0, 2, 2]


def test_a_class_that_is_spelled_otherwise_is_not_a_class_without_images(parts):
    (parts / "test" / "a").rename(parts / "test" / "A ")
    with pytest.raises(DataError, match="lacks the class folders a; b, and of its folders A  are no class"):
        load_folder(parts / "test", size=40, classes="a b c".split(), missing_ok=True)
    with pytest.raises(DataError, match="lacks the class folders x, and of its folders"):
        load_folder(parts / "train", size=40, classes=["x"], missing_ok=True)


@pytest.mark.parametrize("classes", ["ab", [], ["a", "a"]])
def test_a_list_of_classes_is_a_list_of_names(parts, classes):
    with pytest.raises(ValueError, match="classes must list different folder names"):
        load_folder(parts / "train", size=40, classes=classes)


@pytest.mark.parametrize("name", ["masks", "Labels", "annotations", "__MACOSX"])
def test_a_folder_of_masks_is_no_class(folder, name):
    write(folder / name / "1.png")
    hint = rf"holds {name}, which by the name is no class.*classes=\['cats', 'dogs'\]"
    with pytest.raises(DataError, match=hint):
        load_folder(folder, size=40)
    assert load_folder(folder, size=40, classes=["cats", "dogs"]).class_names == ("cats", "dogs")
    assert len(load_folder(folder, size=40, classes=["cats", "dogs", name])) == 6


def test_a_mask_beside_its_image_is_no_image(folder):
    write(folder / "cats" / "with_mask.png")  # no image has the name without it
    assert len(load_folder(folder, size=40)) == 6
    write(folder / "cats" / "2_mask.png", scan(9))
    with pytest.raises(DataError, match="cats holds masks beside their images: 2_mask.png. Move them out"):
        load_folder(folder, size=40)


def test_folders_of_a_split_are_loaded_with_it(parts):
    write(parts / "masks" / "1.png")
    with pytest.raises(DataError, match="Class folder 'b' is missing in .*test.*missing_ok"):
        load_split_folders(parts, size=40)
    slices, split = load_split_folders(parts, size=40, missing_ok=True)
    assert slices.class_names == ("a", "b", "c")
    assert slices.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2 + [0, 0, 2, 2]
    assert slices.names[0] == "train/a/0.png" and slices.names[6] == "valid/a/0.png"
    assert {part: index.tolist() for part, index in split.items()} == {
        "train": list(range(6)),
        "val": list(range(6, 12)),
        "test": list(range(12, 16)),
    }
    assert all(index.dtype == np.int64 for index in split.values())
    splits.write_split(parts / "split.csv", slices, split)
    read = splits.read_split(parts / "split.csv", slices)
    assert all(np.array_equal(read[part], split[part]) for part in split)
    alone = load_folder(parts / "train", size=40)
    assert np.array_equal(slices.images[split["train"]], alone.images)
    assert len(slices.sha256) == 64 and slices.sha256 != alone.sha256


def test_a_given_split_may_have_no_val_and_other_names(parts):
    shutil.rmtree(parts / "valid")
    (parts / "train").rename(parts / "Training")
    write(parts / "extra" / "a" / "1.png")
    with pytest.warns(UserWarning, match="beside the parts are not read: extra"):
        slices, split = load_split_folders(parts, size=40, classes=["c", "a"])
    assert slices.class_names == ("c", "a") and [len(split[p]) for p in splits.PARTS] == [4, 0, 4]
    shutil.rmtree(parts / "extra")
    shutil.copytree(parts / "Training", parts / "train")
    with pytest.raises(DataError, match="two folders for train: train and Training|Training and train"):
        load_split_folders(parts, size=40)


def test_either_function_names_the_other_where_that_fits(folder, parts):
    hint = (
        r"split into test; train; valid: load_split_folders\('.*split', ...\) .*load_folder\('.*/test', ...\)"
    )
    with pytest.raises(DataError, match="has no class folders. It is " + hint):
        load_folder(parts, size=40)
    with pytest.raises(DataError, match="Class folder 'a' is missing .*" + hint):
        load_folder(parts, size=40, classes=["a", "b", "c"])
    with pytest.raises(
        DataError, match=r"has no folders train and test .*\(it has cats; dogs\).*load_folder"
    ):
        load_split_folders(folder, size=40)
    write(parts.parent / "toys" / "train" / "1.png")  # a class of toy trains
    write(parts.parent / "toys" / "test" / "1.png")
    assert load_folder(parts.parent / "toys", size=40).class_names == ("test", "train")


# --- patients


def write_csv(path, text):
    path.write_text(text, encoding="utf-8")
    return path


IDS = ["007", "P2", "007", "P2", "x"]


@pytest.mark.parametrize("way", ["csv", "wide csv", "windows csv", "mapping", "short mapping", "function"])
def test_patients_come_from_a_table_or_a_function(folder, tmp_path, way):
    names = ("cats/1.png", "cats/2.png", "cats/3.png", "dogs/1.png", "dogs/2.png")
    if way == "short mapping":  # file names alone, where each occurs once
        for k in (1, 2):
            (folder / "dogs" / f"{k}.png").rename(folder / "dogs" / f"{k + 3}.png")
        given = {f"{k + 1}.png": patient for k, patient in enumerate(IDS)} | {"9.png": "not there"}
    elif way == "mapping":
        given = dict(zip(names, IDS, strict=True))
    elif way == "function":
        given = dict(zip(names, IDS, strict=True)).get
    else:
        lines = [f"{name},{patient}" for name, patient in zip(names, IDS, strict=True)]
        if way == "windows csv":
            lines = [line.replace("/", "\\") for line in lines]
        if way == "wide csv":
            lines = ["patient,age,name", *(f"{i},50,{n}" for n, i in zip(names, IDS, strict=True))]
        else:
            lines = ["file name,patient id", *lines, "birds/1.png,P9"]
        given = write_csv(tmp_path / "patients.csv", "\n".join(lines) + "\n")
    slices = load_folder(folder, size=40, patients=given, cache=tmp_path / "cache")
    assert [slices.patient_names[p] for p in slices.patients] == IDS
    assert np.array_equal(slices.groups, slices.patients)
    assert same(load_folder(folder, size=40, patients=given, cache=tmp_path / "cache"), slices)
    assert load_folder(folder, size=40, cache=tmp_path / "cache").patients is None, "not from the cache"


def test_patients_may_be_numbers(folder):
    slices = load_folder(folder, size=40, patients=lambda name: np.uint16(int(name[-5]) * 1000))
    assert slices.patients.tolist() == [1000, 2000, 3000, 1000, 2000] and slices.patient_names is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,patient\ncats/1.png,a\n", "4 of 5 images have no patient in .*csv: cats/2.png; cats/3.png"),
        ("name,patient\n1.png,a\n2.png,b\n3.png,\n", "name '1.png', but 2 images end so: write 'cats/1.png'"),
        ("name,patient\ncats/1.png,a\ncats/1.png,b\n", "names two patients for cats/1.png"),
        ("name;patient\ncats/1.png;a\n", "must have two columns.*it has name;patient"),
        ("a,b,c\n1,2,3\n", "must have two columns"),
        ("", "is not a readable CSV file"),
    ],
)
def test_a_wrong_table_of_patients_is_refused(folder, tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_folder(folder, size=40, patients=write_csv(tmp_path / "p.csv", text))


def test_an_image_without_a_patient_is_refused(folder):
    for nothing in (None, "", float("nan")):
        given = {"cats/1.png": "a", "cats/2.png": "a", "cats/3.png": "b", "dogs/1.png": nothing}
        with pytest.raises(
            DataError, match="2 of 5 images have no patient in patients: dogs/1.png; dogs/2.png"
        ):
            load_folder(folder, size=40, patients=given)


def test_a_patient_in_two_parts_of_a_given_split_is_said(parts):
    with pytest.warns(UserWarning, match="2 patients have images in more than one part.*: 0; 1"):
        slices, _ = load_split_folders(parts, size=40, missing_ok=True, patients=lambda name: name[-5])
    assert slices.patient_names == ("0", "1") and np.array_equal(slices.groups, slices.patients)
    with warnings.catch_warnings(action="error"):
        table = {
            f"{part}/{c}/{k}.png": part for part in ("train", "valid", "test") for c in "abc" for k in (0, 1)
        }
        load_split_folders(parts, size=40, missing_ok=True, patients=table)


# --- identity and cache


def test_sha256_does_not_depend_on_size_place_or_class_order(folder, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    hashes = {
        load_folder(folder, size=40).sha256,
        load_folder(folder, size=20, aspect="squash").sha256,
        load_folder(moved, size=40, classes={"dogs": "d", "cats": "c"}).sha256,
    }
    assert len(hashes) == 1 and len(hashes.pop()) == 64


def test_sha256_changes_with_a_byte_a_name_or_a_file(folder):
    hashes = [load_folder(folder, size=40).sha256]
    with open(folder / "dogs" / "2.png", "ab") as file:
        file.write(b"\0")  # after the image's end: the pixels stay
    hashes.append(load_folder(folder, size=40).sha256)
    (folder / "dogs" / "2.png").rename(folder / "dogs" / "4.png")
    hashes.append(load_folder(folder, size=40).sha256)
    shutil.copy(folder / "dogs" / "4.png", folder / "dogs" / "5.png")
    hashes.append(load_folder(folder, size=40).sha256)
    assert len(set(hashes)) == 4


def no_decoding(monkeypatch):
    def refuse(path, **_):
        raise AssertionError(f"{path} was decoded")

    monkeypatch.setattr(data, "read_image", refuse)


def test_a_cache_hit_decodes_nothing_and_returns_the_same(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    fresh = load_folder(folder, size=32, cache=cache)
    no_decoding(monkeypatch)
    assert same(load_folder(folder, size=32, cache=cache), fresh)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "other",
    [{"size": 20}, {"aspect": "squash"}, {"ct": False}, {"classes": {"dogs": "d", "cats": "c"}}, "file"],
)
def test_a_cache_is_not_used_for_anything_else(folder, tmp_path, monkeypatch, other):
    cache = tmp_path / "cache"
    write(folder / "cats" / "wide.png", scan(9, width=60))
    load_folder(folder, size=32, cache=cache)
    if other == "file":
        write(folder / "cats" / "2.png", scan(77))
        other = {}
    expected = load_folder(folder, **{"size": 32} | other)
    assert same(load_folder(folder, cache=cache, **{"size": 32} | other), expected)
    no_decoding(monkeypatch)
    assert same(load_folder(folder, cache=cache, **{"size": 32} | other), expected)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other slices"])
def test_a_damaged_cache_is_rebuilt(folder, tmp_path, monkeypatch, damage):
    fresh = load_folder(folder, size=32, cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    content = bytearray(kept.read_bytes())
    if damage == "truncated":
        kept.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        at = content.index(fresh.images[2].tobytes()) + 100  # one bit of one pixel
        content[at] ^= 1
        kept.write_bytes(content)
    elif damage == "empty":
        kept.write_bytes(b"")
    else:
        replace(fresh, sha256="f" * 64, images=fresh.images[::-1].copy()).save(kept)
    assert same(load_folder(folder, size=32, cache=tmp_path / "cache"), fresh)
    no_decoding(monkeypatch)
    assert same(load_folder(folder, size=32, cache=tmp_path / "cache"), fresh)


def test_bad_files_are_not_cached_and_a_cache_does_not_hide_them(folder, tmp_path):
    load_folder(folder, size=32, cache=tmp_path / "cache")
    (folder / "cats" / "2.png").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(DataError, match="empty"):
            load_folder(folder, size=32, cache=tmp_path / "cache")


def test_what_was_cached_without_the_ct_checks_does_not_pass_them(folder, tmp_path):
    threshold(folder, low=120)
    load_folder(folder, size=32, cache=tmp_path / "cache", ct=False)
    with pytest.raises(DataError, match="thresholded"):
        load_folder(folder, size=32, cache=tmp_path / "cache")


# --- what is refused


def test_a_missing_class_folder_is_named(folder):
    with pytest.raises(DataError, match=r"Class folder 'birds' is missing in .*pets\. Check"):
        load_folder(folder, size=40, classes={"cats": "cat", "birds": "bird"})


def test_an_empty_class_folder_is_named(folder):
    (folder / "birds").mkdir()
    (folder / "birds" / "list.txt").write_text("")
    with pytest.raises(DataError, match="Class folder 'birds' in .* holds no image"):
        load_folder(folder, size=40)


@pytest.mark.parametrize("where", ["missing", "empty"])
def test_a_folder_without_subfolders_is_refused(tmp_path, where):
    if where == "empty":
        (tmp_path / where).mkdir()
    with pytest.raises(DataError, match="has no subfolders"):
        load_folder(tmp_path / where, size=40)


def test_other_counts_than_expected_are_listed(folder):
    assert len(load_folder(folder, size=40, counts={"cats": 3, "dogs": 2})) == 5
    with pytest.raises(DataError, match="'cats' has 3 images, expected 4; 'dogs' has 2 images, expected 1"):
        load_folder(folder, size=40, counts={"cats": 4, "dogs": 1})


def refused(folder, **options):
    with pytest.raises(DataError) as caught:
        load_folder(folder, size=40, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(image, **options):
    return lambda path: write(path, image, **options)


def sixteen_bit_rgb(path):
    """A 16-bit RGB PNG, which Pillow can read but not write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + np.repeat(row.astype(">u2") * 257, 3).tobytes() for row in scan(5))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def huge_header(path):
    """A PNG that claims 100,000 x 100,000 pixels in a few hundred bytes."""
    content = bytearray(write(path).read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(content)


RGB = np.stack([scan(1)] * 3, axis=2)
ARROW = RGB.copy()
ARROW[5:9, 5:9] = (250, 20, 20)
CLEAR = Image.fromarray(np.dstack([RGB, np.full((40, 40), 200, np.uint8)]))

ALWAYS = {
    "empty file": ("x.png", lambda p: p.write_bytes(b""), r"is empty \(0 bytes\)"),
    "web page": ("x.jpg", lambda p: p.write_text("<html>not found</html>"), "is damaged or no image"),
    "gif": ("x.png", lambda p: Image.fromarray(scan(1)).save(p, "GIF"), "is damaged or no image"),
    "16-bit grey": ("x.png", saved(scan(1).astype(np.uint16) * 200), r"is not 8-bit grey or RGB \(mode I;16"),
    "16-bit colour": ("x.png", sixteen_bit_rgb, "is not 8-bit grey or RGB .*RGB;16"),
    "32-bit float": ("x.tif", saved(scan(1).astype(np.float32)), "is not 8-bit .*mode F"),
    "1-bit": ("x.png", saved(Image.fromarray(scan(1)).convert("1")), "is not 8-bit .*mode 1"),
    "CMYK": ("x.jpg", saved(Image.fromarray(RGB).convert("CMYK")), "is not 8-bit .*mode CMYK"),
    "animated": (
        "x.png",
        saved(scan(1), save_all=True, append_images=[Image.fromarray(scan(2))]),
        "has 2 frames",
    ),
    "stack": (
        "x.tif",
        saved(scan(1), save_all=True, append_images=[Image.fromarray(scan(2))] * 2),
        "has 3 frames",
    ),
    "transparent": ("x.png", saved(CLEAR), "is partly transparent"),
    "constant": ("x.png", saved(np.full((40, 40), 77, np.uint8)), r"is constant \(every pixel is 77\)"),
    "too large": ("x.png", saved(scan(1, width=4097)), r"is larger than 4096 px a side \(4097 x 40\)"),
    "bomb": ("x.png", huge_header, "is larger than 4096 px a side"),
}
CT_ONLY = {
    "coloured": ("x.png", saved(ARROW), r"is coloured \(channels differ by up to \d+ grey levels\)"),
    "too small": ("x.png", saved(scan(1, width=31)), r"is smaller than 32 px a side \(31 x 40\)"),
}


@pytest.mark.parametrize("kind", ALWAYS | CT_ONLY)
def test_a_bad_file_is_named_with_its_fault(folder, kind):
    name, make, message = (ALWAYS | CT_ONLY)[kind]
    make(folder / "dogs" / name)
    assert len(list(folder.glob("dogs/x.*"))) == 1
    for ct in (True, False) if kind in ALWAYS else (True,):
        text = refused(folder, ct=ct)
        assert re.match(rf"1 of 6 files in .*/pets cannot be used: dogs/{name} {message}", text), text
        assert ("ct=False" in text) == ct


@pytest.mark.parametrize("kind", CT_ONLY)
def test_without_ct_colour_and_small_images_load(folder, kind):
    name, make, _ = CT_ONLY[kind]
    make(folder / "dogs" / name)
    assert len(load_folder(folder, size=40, ct=False)) == 6


def test_channels_may_differ_as_much_as_jpeg_makes_them(folder):
    near = RGB.astype(int) + np.array([0, 8, 16])
    write(folder / "dogs" / "near.png", np.minimum(near, 255).astype(np.uint8))
    assert len(load_folder(folder, size=40)) == 6
    far = np.minimum(RGB.astype(int) + np.array([0, 8, 17]), 255).astype(np.uint8)
    write(folder / "dogs" / "near.png", far)
    assert "differ by up to 17" in refused(folder)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("jpg", {}), ("jpg", {"progressive": True}), ("png", {}), ("bmp", {}), ("tif", {})],
    ids=["jpg", "progressive", "png", "bmp", "tif"],
)
def test_a_truncated_file_is_refused_or_lost_no_pixel(tmp_path, monkeypatch, suffix, options):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other libraries leave it
    path = write(tmp_path / f"x.{suffix}", scan(1), **options)
    content, pixels = path.read_bytes(), np.asarray(data.read_image(path))
    kept = 0
    for length in {*range(0, len(content), 29), *range(len(content) - 30, len(content))}:
        path.write_bytes(content[:length])
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow mutters about short TIFF tags
                assert np.array_equal(np.asarray(data.read_image(path)), pixels)
            kept += 1
        except DataError:
            pass
    assert kept < 30 and ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_all_bad_files_are_in_one_error_the_first_five_named(folder):
    for k in range(1, 9):
        (folder / "dogs" / f"{k}.png").write_bytes(b"" if k % 2 else b"no image")
    text = refused(folder)
    assert text.startswith("8 of 11 files in ") and "; and 3 more. " in text
    assert [f"dogs/{k}.png" in text for k in range(1, 9)] == [True] * 5 + [False] * 3


def threshold(folder, *, low):
    for path in folder.glob("*/*.png"):
        image = np.asarray(Image.open(path))
        write(path, np.where(image < low, image // 32, image).astype(np.uint8))


def test_a_thresholded_copy_is_refused(folder):
    threshold(folder, low=120)
    text = refused(folder)
    assert (
        "were thresholded: 0.0% of their pixels have an intensity of 10..119" in text and "ct=False" in text
    )
    assert len(load_folder(folder, size=40, ct=False)) == 5


def test_a_thresholded_copy_is_refused_at_any_size(folder):
    threshold(folder, low=120)
    for size in (8, 20, 64):  # resizing would fill the gap again
        with pytest.raises(DataError, match="thresholded"):
            load_folder(folder, size=size)


def test_one_dark_image_among_others_is_no_thresholded_copy(folder):
    write(folder / "cats" / "1.png", np.where(scan(1) > 200, scan(1), 0).astype(np.uint8))
    assert len(load_folder(folder, size=40)) == 5


# --- IQ-OTH/NCCD


def test_the_dataset_loads_whole(whole):
    slices = data.load_iq_oth_nccd(whole, size=32)
    assert slices.class_names == ("benign", "malignant", "normal")
    assert np.bincount(slices.labels).tolist() == [120, 561, 416]
    assert slices.names[1] == "Bengin cases/Bengin case (2).jpg"
    assert slices.names[-1] == "Normal cases/Normal case (416).jpg"
    assert slices.source == "IQ-OTH/NCCD, 1097 slices at 32 px"


@pytest.mark.parametrize(
    "below", ["", "one", "The IQ-OTHNCCD lung cancer dataset/The IQ-OTHNCCD lung cancer dataset"]
)
def test_find_data_looks_two_levels_below(whole, tmp_path, monkeypatch, below):
    (tmp_path / "data" / below).mkdir(parents=True)
    for name in IQ_OTH_NCCD.classes:
        (tmp_path / "data" / below / name).symlink_to(whole / name)
    (tmp_path / "data" / "Test cases").mkdir()
    monkeypatch.setenv("FORTIFY_DATA", str(tmp_path / "data"))
    assert data.find_data() == tmp_path / "data" / below
    assert len(data.load_iq_oth_nccd(size=8)) == len(data.load_iq_oth_nccd(tmp_path / "data", size=8)) == 1097


def test_find_data_defaults_to_the_checkout(whole, tmp_path, monkeypatch):
    monkeypatch.delenv("FORTIFY_DATA", raising=False)
    monkeypatch.setenv("FORTIFY_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        data.find_data()
    for remedy in (
        "make data",
        "10.17632/bhmdr45bh2.4",
        IQ_OTH_NCCD.kaggle,
        "'Bengin cases'",
        "FORTIFY_DATA",
    ):
        assert remedy in str(caught.value)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "iq-oth-nccd").symlink_to(whole)
    assert data.find_data() == tmp_path / "data" / "iq-oth-nccd"


def test_find_data_outside_a_checkout_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("FORTIFY_DATA", raising=False)
    monkeypatch.delenv("FORTIFY_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="not inside a checkout.*FORTIFY_DATA"):
        data.find_data()


def test_an_incomplete_dataset_is_refused(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy", copy_function=os.link)
    (copy / "Normal cases" / "Normal case (7).jpg").unlink()
    with pytest.raises(DataError, match="'Normal cases' has 415 images, expected 416.*make data"):
        data.load_iq_oth_nccd(copy, size=32)
    shutil.rmtree(copy / "Normal cases")
    with pytest.raises(DataError, match="Class folder 'Normal cases' is missing.*make data"):
        data.load_iq_oth_nccd(copy, size=32)


# --- download


@pytest.fixture
def kaggle(whole, tmp_path, monkeypatch):
    """Kaggle's archive in kagglehub's cache, nested as it is; only the network call is replaced."""
    cache = tmp_path / "kagglehub"
    name = "The IQ-OTHNCCD lung cancer dataset"
    shutil.copytree(whole, cache / name / name, copy_function=os.link)
    (cache / "Test cases").mkdir()
    asked = []

    def dataset_download(handle):
        asked.append(handle)
        return str(cache)

    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=dataset_download))
    return types.SimpleNamespace(asked=asked, classes=cache / name / name)


def test_download_copies_what_it_verified_and_does_it_once(kaggle, tmp_path, monkeypatch):
    monkeypatch.delenv("FORTIFY_DATA", raising=False)
    monkeypatch.setenv("FORTIFY_ROOT", str(tmp_path))
    target = download.download()
    assert target == tmp_path / "data" / "iq-oth-nccd" == data.find_data()
    assert sorted(p.name for p in target.iterdir()) == list(IQ_OTH_NCCD.classes)
    assert list(target.parent.iterdir()) == [target]  # nothing temporary is left
    wanted = data.load_iq_oth_nccd(kaggle.classes, size=32)
    assert same(data.load_iq_oth_nccd(size=32), wanted)
    assert download.download() == target and kaggle.asked == [IQ_OTH_NCCD.kaggle]


def test_download_refuses_a_wrong_archive_and_leaves_nothing(kaggle, tmp_path):
    next(kaggle.classes.glob("Malignant cases/*")).unlink()
    with pytest.raises(DataError, match="Kaggle's copy fails the check: delete .*expected 561"):
        download.download(tmp_path / "data" / "target")
    assert not (tmp_path / "data").exists()


def test_download_does_not_touch_what_is_in_the_way(kaggle, tmp_path):
    target = tmp_path / "target"
    write(target / "Bengin cases" / "mine.png")
    with pytest.raises(DataError, match="is in the way"):
        download.download(target)
    assert [p.name for p in target.rglob("*.png")] == ["mine.png"] and not kaggle.asked


def test_an_interrupted_copy_leaves_no_target(kaggle, tmp_path, monkeypatch):
    copied, copyfile = [], shutil.copyfile

    def full_disk(source, target):
        copied.append(copyfile(source, target))
        if len(copied) == 50:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space"):
        download.download(tmp_path / "data" / "target")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_copy_that_differs_is_not_kept(kaggle, tmp_path, monkeypatch):
    def bad_disk(source, target):
        target.write_bytes(source.read_bytes()[:-1])

    monkeypatch.setattr(download.shutil, "copyfile", bad_disk)
    with pytest.raises(DataError, match="differs"):
        download.download(tmp_path / "data" / "target")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_failed_download_says_how_to_place_the_files_by_hand(tmp_path, monkeypatch):
    def offline(handle):
        raise ConnectionError("Max retries exceeded\nwith url")

    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=offline))
    with pytest.raises(
        DataError, match=r"failed \(ConnectionError: Max retries exceeded with url\).*10.17632"
    ):
        download.download(tmp_path / "target")


def unpacking(monkeypatch, archive, out):
    """kagglehub as it is from where it has the archive: its own unpacking, without the network."""
    kagglehub = pytest.importorskip("kagglehub")
    from kagglehub.http_resolver import _extract_archive

    monkeypatch.setattr(
        kagglehub, "dataset_download", lambda _: _extract_archive(str(archive), str(out)) or out
    )


def zip_of(path, name, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def tar_of(path, name, content):
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("pack", [zip_of, tar_of])
@pytest.mark.parametrize("name", ["../../climbed.jpg", "{tmp}/climbed.jpg", "Bengin cases/../../climbed.jpg"])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch, pack, name):
    archive = pack(tmp_path / "archive", name.format(tmp=tmp_path), b"x")
    unpacking(monkeypatch, archive, tmp_path / "cache" / "unpacked")
    with pytest.raises(DataError, match="Kaggle's copy fails the check|The download of .* failed"):
        download.download(tmp_path / "target")
    climbed = [
        path for path in tmp_path.rglob("climbed.jpg") if tmp_path / "cache" / "unpacked" not in path.parents
    ]
    assert climbed == [] and not (tmp_path / "target").exists()


@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch, pack):
    archive = pack(tmp_path / "archive", "Bengin cases/Bengin case (1).jpg", bytes(30_000_000))
    assert archive.stat().st_size < 100_000
    unpacking(monkeypatch, archive, tmp_path / "unpacked")
    monkeypatch.setattr(download, "MAX_FILE", 5_000_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Debian 12's Python 3.11.2 has no tarfile filters: kagglehub unpacks no tar there.
    unpacks = pack is zip_of or hasattr(tarfile, "data_filter")
    with pytest.raises(DataError, match="failed .*" + ("File too large" if unpacks else "argument 'filter'")):
        download.download(tmp_path / "target")
    assert sum(path.stat().st_size for path in (tmp_path / "unpacked").rglob("*")) < 6_000_000
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before and not (tmp_path / "target").exists()


def test_without_kagglehub_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # what an import then raises: ImportError
    with pytest.raises(DataError, match=r"'\.\[data\].*make data"):
        download.download(tmp_path / "target")


def test_the_command_fails_in_one_line(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "Bengin cases" / "mine.png")
    environment = os.environ | {"FORTIFY_DATA": str(tmp_path / "data")}
    command = [sys.executable, "-m", "fortify.workflow.download"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_command_says_where_the_data_are(whole):
    environment = os.environ | {"FORTIFY_DATA": str(whole)}
    command = [sys.executable, "-m", "fortify.workflow.download"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"IQ-OTH/NCCD is complete in {whole}\n")


# --- tables and tensors


def test_describe_counts_sizes_and_duplicates(folder):
    shutil.copy(folder / "cats" / "1.png", folder / "cats" / "4.png")
    shutil.copy(folder / "cats" / "1.png", folder / "dogs" / "4.png")  # counted where it comes second
    write(folder / "dogs" / "5.png", scan(1, width=60))
    table = data.describe(load_folder(folder, size=32)).set_index("class")
    assert table["count"].tolist() == [4, 4] and table["share"].tolist() == [0.5, 0.5]
    assert table["sizes"].tolist() == ["40 x 40 (4)", "40 x 40 (3), 60 x 40 (1)"]
    assert table["non_square"].tolist() == [0, 1] and table["duplicates"].tolist() == [1, 1]


def test_equal_pixels_of_different_original_sizes_are_no_duplicates(a_slices):
    images = a_slices.images[[0, 0, 0, 0]]
    sizes = np.array([[40, 40], [40, 40], [80, 80], [40, 80]])
    assert data.describe(replace(a_slices, images=images, original_sizes=sizes))["duplicates"].sum() == 1


def test_describe_takes_slices_that_were_never_resized(a_slices):
    wide = replace(a_slices, images=a_slices.images[:, :30], original_sizes=None)
    assert data.describe(wide)["sizes"].tolist() == ["40 x 30 (2)"] * 2


def test_to_tensor_is_grey_over_255():
    import torch

    images = np.arange(256, dtype=np.uint8).reshape(2, 8, 16)
    tensor = data.to_tensor(images)
    assert tensor.dtype == torch.float32 and tensor.shape == (2, 1, 8, 16)
    assert np.array_equal(tensor.numpy()[:, 0], images.astype(np.float32) / np.float32(255))
    assert tensor.min() == 0 and tensor.max() == 1
    tensor.zero_()
    assert images[1, 7, 15] == 255  # the tensor is a copy
    with pytest.raises(DataError, match="uint8"):
        data.to_tensor(images / 255)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_to_tensor_puts_the_channels_first(channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 9, channels), dtype=np.uint8)
    tensor = data.to_tensor(images)
    assert tensor.shape == (2, channels, 8, 9) and tensor.is_contiguous()
    for c in range(channels):
        assert np.array_equal(tensor[:, c].numpy(), data.to_tensor(images[..., c].copy())[:, 0].numpy())
    tensor.zero_()
    assert images.any(), "the tensor is a copy"
    with pytest.raises(DataError, match="channels last"):
        data.to_tensor(np.zeros((2, 3, 8, 9), np.uint8))


def test_importing_data_does_not_import_torch():
    code = (
        "import sys, fortify.data, fortify.workflow.download;"
        "sys.exit(bool({'torch', 'kagglehub'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- the real slices


@pytest.fixture
def real():
    try:
        return data.find_data()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.real
def test_the_real_slices_have_the_published_counts(real):
    slices = data.load_iq_oth_nccd(size=56)
    table = data.describe(slices)
    assert table["count"].tolist() == [120, 561, 416]
    copies = table["duplicates"].tolist()
    # 42 in the original, where 61 slices are not square; 43 in the square 224-px copy.
    assert (copies, table["non_square"].tolist()) in [
        ([17, 14, 11], [0, 60, 1]),
        ([18, 14, 11], [0, 0, 0]),
    ]
    pixels = Counter(image.tobytes() for image in slices.images)
    assert sum(n - 1 for n in pixels.values()) == sum(copies)


@pytest.mark.real
def test_a_real_slice_passes_bit_for_bit_at_its_own_size(real):
    path = real / "Malignant cases" / "Malignant case (1).jpg"
    with Image.open(path) as image:
        pixels = np.asarray(image)
    pixels = pixels if pixels.ndim == 2 else pixels[..., 0]
    grey = data.read_image(path)
    assert np.array_equal(np.asarray(data.fit_square(grey, size=grey.width, aspect="pad")), pixels)
