"""The dataset: what it is, where it lies, how it is checked and loaded into :class:`Slices`.

:func:`load_iq_oth_nccd` is for the paper's dataset, :func:`load_folder` for any other folder of images
with one subfolder a class. Both refuse files that would silently change a result. Fetching the files is
:mod:`fortify.workflow.download`.
"""

import contextlib
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd

from fortify import files
from fortify.images import MAX_SIDE, DataError, fit_square, read_grey

MID_GREYS = slice(10, 120)  # two thirds of the pixels of the real slices have such a grey, in any one 39 %
MIN_MID_SHARE = 0.1  # thresholded copies have next to none

_EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
_FORMAT = "fortify-slices-1"  # raise it when the decoding or the file changes: old caches are then rebuilt


@dataclass(frozen=True)
class Dataset:
    """What identifies a published dataset. ``classes`` and ``counts`` are keyed by class folder."""

    title: str
    classes: Mapping[str, str]
    counts: Mapping[str, int]
    kaggle: str
    doi: str
    licence: str


IQ_OTH_NCCD = Dataset(
    title="IQ-OTH/NCCD",
    classes=MappingProxyType(
        {"Bengin cases": "benign", "Malignant cases": "malignant", "Normal cases": "normal"}  # [sic]
    ),
    counts=MappingProxyType({"Bengin cases": 120, "Malignant cases": 561, "Normal cases": 416}),
    kaggle="hamdallak/the-iqothnccd-lung-cancer-dataset",
    doi="10.17632/bhmdr45bh2.4",
    licence="CC BY 4.0",
)

BY_HAND = (
    f"Run `make data`; or download the dataset from https://doi.org/{IQ_OTH_NCCD.doi} or "
    f"https://www.kaggle.com/datasets/{IQ_OTH_NCCD.kaggle} and put its folders "
    f"{', '.join(map(repr, IQ_OTH_NCCD.classes))} into data/iq-oth-nccd/ of the checkout; "
    "or set FORTIFY_DATA to the folder that holds them."
)


@dataclass(frozen=True, eq=False)
class Slices:
    """N grey images of one size with their labels, in a fixed order.

    ``sha256`` names the source files, whatever size they were loaded at. ``groups`` says which images must
    stay on one side of a split (default: each its own group). ``patients`` is known for phantoms only.
    Raises DataError when the fields do not fit each other.
    """

    images: np.ndarray  # uint8 (N, H, W), 8-bit grey
    labels: np.ndarray  # int64 (N,), index into class_names
    names: tuple[str, ...]  # 'class folder/file name', unique
    class_names: tuple[str, ...]  # display names
    source: str  # one line for a reader
    sha256: str
    groups: np.ndarray | None = None  # int64 (N,); never None after construction
    patients: np.ndarray | None = None  # int64 (N,)
    original_sizes: np.ndarray | None = None  # int64 (N, 2): width, height in pixels before resizing

    def __post_init__(self):
        n, classes = len(self.names), len(self.class_names)
        for name in ("names", "class_names"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            repeated = [text for text, k in Counter(getattr(self, name)).items() if k > 1]
            if repeated:
                raise DataError(f"Slices.{name} must be unique; repeated: {_few(repeated)}.")
        if self.groups is None:
            object.__setattr__(self, "groups", np.arange(n, dtype=np.int64))
        _check_array("Slices.images", self.images, np.uint8, (n, None, None))
        _check_array("Slices.labels", self.labels, np.int64, (n,))
        _check_array("Slices.groups", self.groups, np.int64, (n,))
        if self.patients is not None:
            _check_array("Slices.patients", self.patients, np.int64, (n,))
        if self.original_sizes is not None:
            _check_array("Slices.original_sizes", self.original_sizes, np.int64, (n, 2))
        if n and not 0 <= self.labels.min() <= self.labels.max() < classes:
            span = f"{self.labels.min()}..{self.labels.max()}"
            raise DataError(f"Slices.labels span {span}, but {classes} classes have labels 0..{classes - 1}.")

    def __len__(self):
        return len(self.names)

    def subset(self, index):
        """The slices at ``index`` (integers without repeats, or a boolean mask), in that order."""
        index = np.asarray(index)
        index = np.arange(len(self))[index if index.size else index.astype(np.int64)]  # [] is float to numpy
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        picked = {name: v[index] for name, v in values.items() if isinstance(v, np.ndarray)}
        return replace(self, names=tuple(self.names[i] for i in index), **picked)

    def save(self, path):
        """Write all fields to the ``.npz`` file ``path``, atomically and without pickles."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {name: np.asarray(value) for name, value in values.items() if value is not None}
        with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, format=np.asarray(_FORMAT), **arrays)

    @classmethod
    def load(cls, path):
        """Read what :meth:`save` wrote. DataError when ``path`` is something else, truncated or damaged."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Notebook 01_data writes the slices of a run.")
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
            if str(values.pop("format")) != _FORMAT:
                raise DataError("written by another version of the code")
            for name in ("names", "class_names"):
                values[name] = tuple(values[name].tolist())
            return cls(**values | {name: str(values[name]) for name in ("source", "sha256")})
        except Exception as error:  # zip, zlib and numpy each have their own idea of a damaged file
            raise DataError(
                f"{path} is not a readable slices file ({type(error).__name__}: {error}). "
                "Delete it and run again what wrote it."
            ) from error


def data_folder():
    """Where the dataset is expected: ``FORTIFY_DATA``, else ``data/iq-oth-nccd`` in the checkout."""
    if os.environ.get("FORTIFY_DATA"):
        return Path(os.environ["FORTIFY_DATA"]).expanduser().resolve()
    return files.find_root() / "data" / "iq-oth-nccd"


def find_data():
    """The folder that holds the dataset's class folders: :func:`data_folder`, or up to two levels below.

    Raises FileNotFoundError that says how to get the data.
    """
    try:
        folder = data_folder()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} {BY_HAND}") from error
    found = class_root(folder, IQ_OTH_NCCD.classes)
    if found is None:
        raise FileNotFoundError(f"{IQ_OTH_NCCD.title} is not in {folder}. {BY_HAND}")
    return found


def load_iq_oth_nccd(folder=None, *, size, aspect="pad", cache=None):
    """Load the 1,097 slices of IQ-OTH/NCCD, verified, as :class:`Slices`.

    ``folder`` (default: :func:`find_data`) holds the class folders, itself or up to two levels below.
    The rest is as in :func:`load_folder`.
    """
    known = IQ_OTH_NCCD
    folder = find_data() if folder is None else Path(folder)
    folder = class_root(folder, known.classes) or folder
    title, remedy = f"{known.title}, {{n}} slices", f"Get the original files. {BY_HAND}"
    options = {"size": size, "aspect": aspect, "counts": known.counts, "cache": cache, "ct": True}
    return _load(folder, known.classes, title=title, remedy=remedy, **options)


def load_folder(folder, *, size, classes=None, aspect="pad", counts=None, cache=None, ct=True):
    """Load a folder of images with one subfolder a class as :class:`Slices` of ``size`` x ``size`` pixels.

    ``classes`` maps subfolder to display name, in label order (default: the subfolders' names, sorted).
    ``counts`` maps subfolder to the number of images it must hold. Images are grey or RGB files of any
    size, taken in natural order (``case (2)`` before ``case (10)``); those of ``size`` x ``size`` pixels
    pass through bit for bit, see :func:`fit_square` for the others and for ``aspect``. ``cache`` is a
    folder that keeps the decoded arrays. ``ct=False`` skips what only holds for CT slices: that they are
    at least 32 px wide, colourless and full of mid-greys.

    Raises DataError for a missing or empty class folder, a wrong count, files that are damaged or no 8-bit
    still images, and copies whose greys were thresholded; ValueError for a bad ``size`` or ``aspect``.
    """
    folder = Path(folder)
    if classes is None:
        found = (p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ()
        classes = {name: name for name in sorted(found, key=_natural) if not name.startswith(".")}
        if not classes:
            raise DataError(f"{folder} has no subfolders. Put the images of each class into one of its own.")
    title = f"{folder.resolve().name}, {{n}} images"
    options = {"size": size, "aspect": aspect, "counts": counts, "cache": cache, "ct": ct}
    return _load(folder, classes, title=title, remedy=None, **options)


def _load(folder, classes, *, size, aspect, counts, cache, ct, title, remedy):
    if aspect not in ("pad", "squash"):
        raise ValueError(f"aspect must be 'pad' or 'squash', not {aspect!r}.")
    if not 1 <= size <= MAX_SIDE:
        raise ValueError(f"size must be 1..{MAX_SIDE} pixels, not {size}.")
    files, labels = _list_files(folder, classes, counts, remedy)
    names = tuple(f"{path.parent.name}/{path.name}" for path in files)
    sha256 = hash_files(files)
    source = f"{title.format(n=len(files))} at {size} px"

    def known(images, sizes):
        return Slices(images, labels, names, tuple(classes.values()), source, sha256, original_sizes=sizes)

    if cache is not None:
        kind = "ct" if ct else "any"
        cached = Path(cache) / f"{_FORMAT}-{sha256[:16]}-{size}-{aspect}-{kind}.npz"
        # A damaged file is as good as none: the container's checksums cover every pixel.
        with contextlib.suppress(FileNotFoundError, DataError):
            kept = Slices.load(cached)
            if (kept.sha256, kept.names) == (sha256, names):
                return known(kept.images, kept.original_sizes)
    slices = known(*_decode(files, names, folder, size=size, aspect=aspect, ct=ct, remedy=remedy))
    if cache is not None:
        slices.save(cached)
    return slices


def _list_files(folder, classes, counts, remedy):
    remedy = remedy or "Check the folder, and the classes and counts you passed."
    files, labels, wrong = [], [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise DataError(f"Class folder {name!r} is missing in {folder}. {remedy}")
        there = [p for p in (folder / name).iterdir() if not p.name.startswith(".")]  # macOS leaves '._x.jpg'
        found = [p for p in there if p.suffix.lower() in _EXTENSIONS and p.is_file()]
        if len(found) < len(there):
            others = sorted(
                {p.suffix.lower() if p.is_file() else f"{p.name}/" for p in set(there) - set(found)}
            )
            warnings.warn(
                f"{folder / name}: {len(there) - len(found)} files or folders beside the images are not "
                f"read: {_few(others)}",
                stacklevel=4,
            )
        if not found:
            kinds = ", ".join(sorted(_EXTENSIONS))
            raise DataError(f"Class folder {name!r} in {folder} holds no image ({kinds}). {remedy}")
        expected = (counts or {}).get(name, len(found))
        if len(found) != expected:
            wrong.append(f"{name!r} has {len(found)} images, expected {expected}")
        files += sorted(found, key=lambda p: _natural(p.name))
        labels += [label] * len(found)
    if wrong:
        raise DataError(f"{folder}: {'; '.join(wrong)}. {remedy}")
    return files, np.array(labels, dtype=np.int64)


def hash_files(files):
    """SHA-256 over the sorted 'class folder/file name' and bytes of ``files``, independent of their order."""
    digest = hashlib.sha256()
    for name, path in sorted((f"{path.parent.name}/{path.name}", path) for path in files):
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _decode(files, names, folder, *, size, aspect, ct, remedy):
    hint = "; or pass ct=False if they are no CT slices" if ct else ""
    remedy = remedy or f"Replace or remove them{hint}."
    images = np.empty((len(files), size, size), dtype=np.uint8)
    sizes = np.empty((len(files), 2), dtype=np.int64)
    histogram = np.zeros(256)
    bad = []
    for i, path in enumerate(files):
        try:
            image = read_grey(path, ct=ct)
        except DataError as error:
            bad.append(f"{names[i]} {error}")
            continue
        sizes[i] = image.size
        histogram += image.histogram()
        images[i] = np.asarray(fit_square(image, size=size, aspect=aspect))
    if bad:
        raise DataError(f"{len(bad)} of {len(files)} files in {folder} cannot be used: {_few(bad)}. {remedy}")
    greys = histogram / histogram.sum()
    middle = greys[MID_GREYS].sum()
    if ct and middle < MIN_MID_SHARE:
        raise DataError(
            f"The images in {folder} were thresholded: {middle:.1%} of their pixels have a grey of "
            f"{MID_GREYS.start}..{MID_GREYS.stop - 1} (CT slices: most), {greys[0]:.1%} are 0. {remedy}"
        )
    return images, sizes


def describe(slices):
    """A DataFrame with one row a class: ``class, count, share, sizes, non_square, duplicates``.

    ``sizes`` lists width x height before resizing, the most frequent first, each with its count.
    ``duplicates`` counts the images whose pixels, as loaded, and original size equal an earlier image's.
    """
    sizes = slices.original_sizes
    if sizes is None:
        sizes = np.tile(slices.images.shape[:0:-1], (len(slices), 1))
    seen, duplicate = set(), np.zeros(len(slices), dtype=bool)
    for i, image in enumerate(slices.images):
        key = (*sizes[i].tolist(), hashlib.sha256(image.tobytes()).digest())
        duplicate[i] = key in seen
        seen.add(key)
    rows = []
    for label, name in enumerate(slices.class_names):
        mine = slices.labels == label
        tally = Counter(map(tuple, sizes[mine].tolist())).most_common()
        rows.append(
            {
                "class": name,
                "count": int(mine.sum()),
                "share": float(mine.sum() / max(len(slices), 1)),
                "sizes": ", ".join(f"{w} x {h} ({k})" for (w, h), k in tally),
                "non_square": int((sizes[mine, 0] != sizes[mine, 1]).sum()),
                "duplicates": int(duplicate[mine].sum()),
            }
        )
    return pd.DataFrame(rows)


def to_tensor(images):
    """uint8 (N, H, W) grey images as a float32 tensor (N, 1, H, W) in [0, 1]: grey / 255."""
    import torch  # here, so that looking at data does not wait for it

    _check_array("images", images, np.uint8, (len(images), None, None))
    return torch.tensor(images).unsqueeze(1).to(torch.float32) / 255


def class_root(folder, class_folders):
    """The folder that holds most of ``class_folders``: ``folder``, or one or two levels below; else None."""
    for candidates in ([folder], sorted(folder.glob("*")), sorted(folder.glob("*/*"))):
        held = [sum((p / name).is_dir() for name in class_folders) for p in candidates]
        if any(held):
            return candidates[held.index(max(held))]
    return None


def _check_array(name, array, dtype, shape):
    got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
    fits = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == len(shape)
    if not fits or any(s not in (None, have) for s, have in zip(shape, array.shape, strict=True)):
        want = ", ".join("any" if s is None else str(s) for s in shape)
        raise DataError(f"{name} must be an array of {np.dtype(dtype).name} ({want}), not {got}.")


def _natural(name):
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)], name


def _few(items, most=5):
    more = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(map(str, items[:most])) + more
