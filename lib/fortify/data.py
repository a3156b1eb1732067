"""The dataset: what it is, where it lies, how it is checked and loaded into :class:`Slices`.

:func:`load_iq_oth_nccd` is for the paper's dataset, :func:`load_folder` for any other folder of images
with one subfolder a class, grey or colour, DICOM too, and :func:`load_split_folders` for folders that were
split into train, val and test by somebody else. All refuse files that would silently change a result.
Fetching the files is :mod:`fortify.workflow.download`.
"""

import contextlib
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fortify import dicom, files
from fortify.images import MAX_SIDE, DataError, fit_square, read_image

if TYPE_CHECKING:  # torch takes seconds to load
    import torch

MID_INTENSITIES = slice(10, 120)  # two thirds of the pixels of the real slices are such, in any one 39 %
MIN_MID_SHARE = 0.1  # thresholded copies have next to none

_EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
_NO_CLASSES = {  # folders that lie beside the classes of public datasets and hold no class
    *("annotation", "annotations", "ground_truth", "groundtruth", "label", "labels", "mask", "masks"),
    *("segmentation", "segmentations", "__macosx"),
}
_PART_FOLDERS = {"train": "train", "training": "train"}
_PART_FOLDERS |= {"val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
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
    """N images of one size with their labels, in a fixed order.

    ``sha256`` names the source files, whatever size they were loaded at. ``patients`` and ``groups`` may be
    given as strings or integers of any kind: strings become their place in sorted order, and those of
    ``patients`` are kept as ``patient_names``. ``groups`` says which images must stay on one side of a split
    (default: the patients, and each image its own group where those are unknown). ``labels`` may be integers
    of any kind. Raises DataError when the fields do not fit each other.
    """

    images: np.ndarray  # uint8 (N, H, W), 8-bit grey, or (N, H, W, C)
    labels: np.ndarray  # int64 (N,), index into class_names
    names: tuple[str, ...]  # 'class folder/file name', unique
    class_names: tuple[str, ...]  # display names
    source: str  # one line for a reader
    sha256: str
    groups: np.ndarray | None = None  # int64 (N,); never None after construction
    patients: np.ndarray | None = None  # int64 (N,)
    original_sizes: np.ndarray | None = None  # int64 (N, 2): width, height in pixels before resizing
    patient_names: tuple[str, ...] | None = None  # of patients 0, 1, ..., where they were strings

    def __post_init__(self):
        n, classes = len(self.names), len(self.class_names)
        for name in ("names", "class_names"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            repeated = [text for text, k in Counter(getattr(self, name)).items() if k > 1]
            if repeated:
                raise DataError(f"Slices.{name} must be unique; repeated: {_few(repeated)}.")
        _check_images("Slices.images", self.images, n)
        object.__setattr__(self, "labels", _integers("Slices.labels", self.labels, n)[0])
        if self.patients is not None:
            patients, known = _integers("Slices.patients", self.patients, n, strings=True)
            object.__setattr__(self, "patients", patients)
            if known is not None:
                object.__setattr__(self, "patient_names", known)
        if self.patient_names is not None:
            object.__setattr__(self, "patient_names", tuple(self.patient_names))
            if self.patients is None or not np.isin(self.patients, np.arange(len(self.patient_names))).all():
                raise DataError("Slices.patient_names must name each of Slices.patients, which count from 0.")
        if self.groups is None:
            groups = np.arange(n, dtype=np.int64) if self.patients is None else self.patients
        else:
            groups = _integers("Slices.groups", self.groups, n, strings=True)[0]
        object.__setattr__(self, "groups", groups)
        if self.original_sizes is not None:
            _check_array("Slices.original_sizes", self.original_sizes, np.int64, (n, 2))
        if n and not 0 <= self.labels.min() <= self.labels.max() < classes:
            span = f"{self.labels.min()}..{self.labels.max()}"
            raise DataError(f"Slices.labels span {span}, but {classes} classes have labels 0..{classes - 1}.")

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, index: Sequence[int] | np.ndarray) -> "Slices":
        """The slices at ``index`` (integers without repeats, or a boolean mask), in that order."""
        index = np.asarray(index)
        index = np.arange(len(self))[index if index.size else index.astype(np.int64)]  # [] is float to numpy
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        picked = {name: v[index] for name, v in values.items() if isinstance(v, np.ndarray)}
        return replace(self, names=tuple(self.names[i] for i in index), **picked)

    def save(self, path: str | Path) -> None:
        """Write all fields to the ``.npz`` file ``path``, atomically and without pickles."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {name: np.asarray(value) for name, value in values.items() if value is not None}
        with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, format=np.asarray(_FORMAT), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Slices":
        """Read what :meth:`save` wrote. DataError when ``path`` is something else, truncated or damaged."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Notebook 01_data writes the slices of a run.")
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {name: file[name] for name in file.files}
            if str(values.pop("format")) != _FORMAT:
                raise DataError("written by another version of the code")
            for name in {"names", "class_names", "patient_names"} & {*values}:
                values[name] = tuple(values[name].tolist())
            return cls(**values | {name: str(values[name]) for name in ("source", "sha256")})
        except Exception as error:  # zip, zlib and numpy each have their own idea of a damaged file
            raise DataError(
                f"{path} is not a readable slices file ({type(error).__name__}: {error}). "
                "Delete it and run again what wrote it."
            ) from error


def data_folder() -> Path:
    """Where the dataset is expected: ``FORTIFY_DATA``, else ``data/iq-oth-nccd`` in the checkout."""
    if os.environ.get("FORTIFY_DATA"):
        return Path(os.environ["FORTIFY_DATA"]).expanduser().resolve()
    return files.find_root() / "data" / "iq-oth-nccd"


def find_data() -> Path:
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


def load_iq_oth_nccd(
    folder: str | Path | None = None, *, size: int, aspect: str = "pad", cache: str | Path | None = None
) -> Slices:
    """Load the 1,097 slices of IQ-OTH/NCCD, verified, as :class:`Slices`.

    ``folder`` (default: :func:`find_data`) holds the class folders, itself or up to two levels below.
    The rest is as in :func:`load_folder`.
    """
    known = IQ_OTH_NCCD
    folder = find_data() if folder is None else Path(folder)
    folder = class_root(folder, known.classes) or folder
    title, remedy = f"{known.title}, {{n}} slices", f"Get the original files. {BY_HAND}"
    listed = _list_files(folder, known.classes, counts=known.counts, remedy=remedy)
    return _load(listed, known.classes, _Decoding(size, aspect, folder, remedy), title=title, cache=cache)


def load_folder(
    folder: str | Path,
    *,
    size: int,
    classes: Mapping[str, str] | Sequence[str] | None = None,
    missing_ok: bool = False,
    patients: str | Path | Mapping[str, str | int] | Callable[[str], str | int] | None = None,
    aspect: str = "pad",
    colour: bool = False,
    window: tuple[float, float] | None = None,
    counts: Mapping[str, int] | None = None,
    cache: str | Path | None = None,
    ct: bool = True,
) -> Slices:
    """Load a folder of images with one subfolder a class as :class:`Slices` of ``size`` x ``size`` pixels.

    ``classes`` lists the subfolders in label order, or maps them to display names (default: all subfolders,
    sorted by name). Labels are places in that order, so folders that are used together need the same one
    (with display names, the same mapping), also where one of them lacks a class::

        train = load_folder("pets/train", size=64)
        val = load_folder("pets/val", size=64, classes=train.class_names, missing_ok=True)

    Without ``missing_ok`` a class without a folder is an error. :func:`load_split_folders` loads all parts
    at once.

    ``patients`` says which images are of one patient, who must not be in two parts of a split; groups are
    then the patients. It is a CSV file (two columns under any heading, file name and patient; of more
    columns, those named ``name`` and ``patient``), a mapping or a function of the file name, or
    ``"PatientID"``, which is read from DICOM files. A file name is 'class folder/file name'; in a CSV or
    mapping 'file name' alone will do where it occurs once.

    Images are grey or RGB files of any size, taken in natural order (``case (2)`` before ``case (10)``);
    those of ``size`` x ``size`` pixels pass through bit for bit, see :func:`fit_square` for the others and
    for ``aspect``. ``colour`` keeps RGB, images uint8 (N, size, size, 3); without it colour becomes
    luminance, (N, size, size). DICOM files (.dcm, .dicom, or by their content) are read with ``window``,
    (centre, width) in HU, or else each with its own, see :mod:`fortify.dicom`.
    ``counts`` maps subfolder to the number of images it must hold. ``cache`` is a folder that keeps the
    decoded arrays. ``ct=False`` skips what only holds for CT slices: that they are at least 32 px wide,
    colourless and full of middle intensities.

    Raises DataError for a missing or empty class folder, a folder such as ``masks`` beside the classes, a
    file ``x_mask`` beside ``x``, folders of a split in place of classes, a wrong count, files that are
    damaged or no 8-bit still images, copies whose intensities were thresholded, and images without a patient;
    ValueError for a bad ``size``, ``aspect`` or ``window`` and for ``colour`` of CT slices; ImportError for
    DICOM files without pydicom.
    """
    folder = Path(folder)
    classes = _class_folders(folder, classes)
    decoding = _Decoding(size, aspect, folder, None, ct=ct, colour=colour, window=window)
    listed = _list_files(folder, classes, counts=counts, missing_ok=missing_ok)
    title = f"{folder.resolve().name}, {{n}} images"
    return _load(listed, classes, decoding, title=title, cache=cache, patients=patients)


def load_split_folders(
    folder: str | Path,
    *,
    size: int,
    classes: Mapping[str, str] | Sequence[str] | None = None,
    missing_ok: bool = False,
    patients: str | Path | Mapping[str, str | int] | Callable[[str], str | int] | None = None,
    aspect: str = "pad",
    colour: bool = False,
    window: tuple[float, float] | None = None,
    cache: str | Path | None = None,
    ct: bool = True,
) -> tuple[Slices, dict[str, np.ndarray]]:
    """Load ``folder/<part>/<class>/<file>`` as (:class:`Slices` of all parts, their split).

    Parts are the subfolders ``train`` (or ``training``), ``val`` (``valid``, ``validation``; may be absent)
    and ``test`` (``testing``). The split is as :mod:`fortify.splits` makes them, {"train", "val", "test"} of
    index arrays; without a folder for it ``val`` is empty, so take some of ``train`` for it. Names are
    'part/class folder/file name'. Classes are those of all parts together, and each part must have each of
    them unless ``missing_ok``. The rest is as in :func:`load_folder`. A warning says where a patient is in
    two parts;
    :func:`fortify.splits.near_duplicate_share` counts test images that training has nearly the same.
    """
    folder = Path(folder)
    roots = _part_roots(folder)
    if not {"train", "test"} <= set(roots):
        raise DataError(
            f"{folder} has no folders train and test with the classes in each (it has "
            f"{_few(_subfolders(folder)) or 'none'}). Where it has one subfolder a class, use load_folder."
        )
    others = [n for n in _subfolders(folder) if not {n.lower()} & ({*_PART_FOLDERS} | _NO_CLASSES)]
    if others:
        warnings.warn(f"{folder}: folders beside the parts are not read: {_few(others)}", stacklevel=2)
    if classes is None:
        found = {name: None for root in roots.values() for name in _class_folders(root, None)}
        classes = sorted(found, key=_natural)
    classes = _class_folders(folder, classes)
    decoding = _Decoding(size, aspect, folder, None, ct=ct, colour=colour, window=window)
    listed, split = [], {"train": [], "val": [], "test": []}
    for part, root in roots.items():
        own = _list_files(root, classes, missing_ok=missing_ok, prefix=f"{root.name}/")
        split[part] = range(len(listed), len(listed) + len(own))
        listed += own
    title = f"{folder.resolve().name}, {{n}} images"
    slices = _load(listed, classes, decoding, title=title, cache=cache, patients=patients)
    split = {part: np.array(index, dtype=np.int64) for part, index in split.items()}
    if slices.patients is not None:
        parts = Counter(p for index in split.values() for p in np.unique(slices.patients[index]).tolist())
        torn = [patient for patient, count in parts.items() if count > 1]
        if torn:
            shown = torn if slices.patient_names is None else [slices.patient_names[p] for p in torn]
            warnings.warn(
                f"{folder}: {len(torn)} patients have images in more than one part, so accuracy on val or "
                f"test is not that on unseen patients: {_few(shown)}",
                stacklevel=2,
            )
    return slices, split


@dataclass(frozen=True)
class _Decoding:
    """How files become arrays; ``folder`` and ``remedy`` are for messages."""

    size: int
    aspect: str
    folder: Path
    remedy: str | None
    ct: bool = True
    colour: bool = False
    window: tuple[float, float] | None = None

    def __post_init__(self):
        if self.aspect not in ("pad", "squash"):
            raise ValueError(f"aspect must be 'pad' or 'squash', not {self.aspect!r}.")
        if not 1 <= self.size <= MAX_SIDE:
            raise ValueError(f"size must be 1..{MAX_SIDE} pixels, not {self.size}.")
        if self.colour and self.ct:
            raise ValueError("CT slices have no colour: pass ct=False with colour=True, for other images.")
        if self.window is not None:
            dicom.check_window(self.window)

    def key(self):
        """What tells cached arrays of the same files apart."""
        parts = [self.size, self.aspect, "ct" if self.ct else "any", *(["rgb"] if self.colour else [])]
        return "-".join(map(str, parts + [f"{v:g}" for v in self.window or ()]))

    def read(self, path):
        """One file as a Pillow image before it is resized."""
        if path.suffix.lower() in _EXTENSIONS:
            return read_image(path, ct=self.ct, colour=self.colour)
        image = dicom.read_dicom(path, ct=self.ct, window=self.window)
        return image.convert("RGB") if self.colour else image


@dataclass(frozen=True)
class _File:
    """A file to load: its name is 'class folder/file name', in a split with the part's folder before it."""

    path: Path
    name: str
    label: int


def _load(listed, classes, decoding, *, title, cache, patients=None):
    names = tuple(file.name for file in listed)
    labels = np.array([file.label for file in listed], dtype=np.int64)
    if decoding.window and all(file.path.suffix.lower() in _EXTENSIONS for file in listed):
        raise ValueError(f"window is for DICOM files, and {decoding.folder} has none.")
    patients = None if patients is None else _patients(patients, listed)
    sha256 = _hash((file.name, file.path) for file in listed)
    source = f"{title.format(n=len(listed))} at {decoding.size} px"

    def known(images, sizes):
        about = {"original_sizes": sizes, "patients": patients}
        return Slices(images, labels, names, tuple(classes.values()), source, sha256, **about)

    if cache is not None:
        cached = Path(cache) / f"{_FORMAT}-{sha256[:16]}-{decoding.key()}.npz"
        # A damaged file is as good as none: the container's checksums cover every pixel.
        with contextlib.suppress(FileNotFoundError, DataError):
            kept = Slices.load(cached)
            if (kept.sha256, kept.names) == (sha256, names):
                return known(kept.images, kept.original_sizes)
    slices = known(*_decode(listed, decoding))
    if cache is not None:
        slices.save(cached)
    return slices


def _subfolders(folder):
    """Names of the subfolders that are not hidden, in natural order."""
    found = (p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ()
    return sorted((name for name in found if not name.startswith(".")), key=_natural)


def _class_folders(folder, given):
    """{class folder: display name} in label order, of ``given`` or else of all subfolders."""
    if isinstance(given, Mapping):
        return dict(given)
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        if isinstance(given, str) or not names or len(set(names)) < len(names):
            raise ValueError(
                f"classes must list different folder names, or map them to display names: {given!r}"
            )
        return dict(zip(names, names, strict=True))
    names = _subfolders(folder)
    if not names:
        raise DataError(f"{folder} has no subfolders. Put the images of each class into one of its own.")
    if odd := [name for name in names if name.lower() in _NO_CLASSES]:
        others = [name for name in names if name not in odd]
        raise DataError(
            f"{folder} holds {_few(odd)}, which by the name is no class. Name the class folders: "
            f"classes={others}, with {_few(odd)} among them if it is one."
        )
    if _split_hint(folder):
        raise DataError(f"{folder} has no class folders. {_split_hint(folder)}")
    return {name: name for name in names}


def _part_roots(folder):
    """{part: its folder} of a folder that somebody split, train before val before test."""
    found = {}
    for name in _subfolders(folder):
        if part := _PART_FOLDERS.get(name.lower()):
            if part in found:
                raise DataError(f"{folder} has two folders for {part}: {found[part].name} and {name}.")
            found[part] = folder / name
    return {part: found[part] for part in ("train", "val", "test") if part in found}


def _split_hint(folder):
    """What to do with a folder of parts that hold class folders; "" for any other folder."""
    names = _subfolders(folder)
    parts = [name for name in names if name.lower() in _PART_FOLDERS]
    if len(parts) < 2 or not all(_subfolders(folder / name) for name in parts):
        return ""
    return (
        f"It is split into {_few(parts)}: load_split_folders({str(folder)!r}, ...) loads them with their "
        f"split, load_folder({str(folder / parts[0])!r}, ...) one of them."
    )


def _list_files(folder, classes, *, counts=None, remedy=None, missing_ok=False, prefix=""):
    hint = remedy or "Check the folder, and the classes and counts you passed."
    listed, wrong, missing = [], [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            if missing_ok:
                missing.append(name)
                continue
            remedies = _split_hint(folder) or "missing_ok=True takes it for a class without images."
            also = "" if remedy else f" {remedies}"
            raise DataError(f"Class folder {name!r} is missing in {folder}. {hint}{also}")
        there = [p for p in (folder / name).iterdir() if not p.name.startswith(".")]  # macOS leaves '._x.jpg'
        found = [p for p in there if p.is_file() and _is_image(p)]
        stems = {p.stem for p in found}
        masks = [p.name for p in found if p.stem.lower().endswith("_mask") and p.stem[:-5] in stems]
        if masks:
            raise DataError(f"{folder / name} holds masks beside their images: {_few(masks)}. Move them out.")
        if len(found) < len(there):
            others = sorted(
                {p.suffix.lower() if p.is_file() else f"{p.name}/" for p in set(there) - set(found)}
            )
            warnings.warn(
                f"{folder / name}: {len(there) - len(found)} files or folders beside the images are not "
                f"read: {_few(others)}",
                stacklevel=3,
            )
        if not found:
            kinds = ", ".join(sorted(_EXTENSIONS))
            raise DataError(f"Class folder {name!r} in {folder} holds no image ({kinds}, DICOM). {hint}")
        expected = (counts or {}).get(name, len(found))
        if len(found) != expected:
            wrong.append(f"{name!r} has {len(found)} images, expected {expected}")
        for path in sorted(found, key=lambda p: _natural(p.name)):
            listed.append(_File(path, f"{prefix}{name}/{path.name}", label))
    if wrong:
        raise DataError(f"{folder}: {'; '.join(wrong)}. {hint}")
    others = [n for n in _subfolders(folder) if n not in classes and n.lower() not in _NO_CLASSES]
    if missing and (others or not listed):  # a name that is spelled otherwise is not a class without images
        raise DataError(
            f"{folder} lacks the class folders {_few(missing)}, and of its folders {_few(others) or 'none'} "
            f"are no class. {hint}"
        )
    return listed


def _is_image(path):
    return path.suffix.lower() in _EXTENSIONS or dicom.is_dicom(path)


def _patients(given, listed):
    """The patient of each file, a string or an integer, of what :func:`load_folder` takes as ``patients``."""
    names = [file.name for file in listed]
    if isinstance(given, str) and given == "PatientID":
        ids = []
        for file in listed:
            try:
                ids.append(dicom.patient_id(file.path))
            except DataError as error:
                raise DataError(f"no PatientID: {file.name} {error}") from error
    elif callable(given):
        ids = [given(name) for name in names]
    else:
        table = given if isinstance(given, Mapping) else _patients_of_csv(Path(given))
        ids = _looked_up(names, table)
    unknown = [name for name, i in zip(names, ids, strict=True) if i is None or i != i or i == ""]
    if unknown:
        where = (
            "the files" if given == "PatientID" else given if isinstance(given, str | Path) else "patients"
        )
        raise DataError(f"{len(unknown)} of {len(names)} images have no patient in {where}: {_few(unknown)}.")
    whole = all(isinstance(i, int | np.integer) for i in ids)
    return [i if whole else str(i) for i in ids]


def _patients_of_csv(path):
    """{file name: patient} of a CSV file, all as text: 007 stays 007."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except ValueError as error:  # pandas' own errors are
        raise DataError(f"{path} is not a readable CSV file ({error}).") from error
    if table.shape[1] != 2 and not {"name", "patient"} <= {*table}:
        raise DataError(
            f"{path} must have two columns, file name and patient, or columns named name and patient; it has "
            f"{_few(list(table))}."
        )
    table = table if table.shape[1] == 2 else table[["name", "patient"]]
    names = table.iloc[:, 0].str.strip().str.replace("\\", "/")  # as Windows writes paths
    pairs = pd.DataFrame({"name": names, "patient": table.iloc[:, 1].str.strip()}).drop_duplicates()
    twice = pairs.name[pairs.name.duplicated()]
    if len(twice):
        raise DataError(f"{path} names two patients for {_few(twice.tolist())}.")
    return dict(zip(pairs.name, pairs.patient, strict=True))


def _looked_up(names, table):
    """The value of each name: of the whole name, or of its end behind a '/' where no other name ends so."""

    def ends(name):
        steps = name.split("/")
        return ["/".join(steps[i:]) for i in range(len(steps))]

    count = Counter(end for name in names for end in ends(name))
    found = []
    for name in names:
        end = next((end for end in ends(name) if end in table), None)
        if end is not None and count[end] > 1:
            raise DataError(f"patients name {end!r}, but {count[end]} images end so: write {name!r} instead.")
        found.append(None if end is None else table[end])
    return found


def hash_files(files: Iterable[Path]) -> str:
    """SHA-256 over the sorted 'class folder/file name' and bytes of ``files``, independent of their order."""
    return _hash((f"{path.parent.name}/{path.name}", path) for path in files)


def _hash(named):
    digest = hashlib.sha256()
    for name, path in sorted(named):
        digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _decode(listed, decoding):
    """(images, original sizes) of the files, or a DataError that names all that cannot be used."""
    size, ct, folder = decoding.size, decoding.ct, decoding.folder
    hint = "; or pass ct=False if they are no CT slices" if ct else ""
    remedy = decoding.remedy or f"Replace or remove them{hint}."
    images = np.empty((len(listed), size, size, 3)[: 4 if decoding.colour else 3], dtype=np.uint8)
    sizes = np.empty((len(listed), 2), dtype=np.int64)
    histogram = np.zeros(256)
    bad = []
    for i, file in enumerate(listed):
        try:
            image = decoding.read(file.path)
        except DataError as error:
            bad.append(f"{file.name} {error}")
            continue
        sizes[i] = image.size
        if ct and file.path.suffix.lower() in _EXTENSIONS:  # in DICOM a window decides what is black
            histogram += image.histogram()
        images[i] = np.asarray(fit_square(image, size=size, aspect=decoding.aspect))
    if bad:
        raise DataError(
            f"{len(bad)} of {len(listed)} files in {folder} cannot be used: {_few(bad)}. {remedy}"
        )
    shares = histogram / max(histogram.sum(), 1)
    middle = shares[MID_INTENSITIES].sum()
    if histogram.any() and middle < MIN_MID_SHARE:
        raise DataError(
            f"The images in {folder} were thresholded: {middle:.1%} of their pixels have an intensity of "
            f"{MID_INTENSITIES.start}..{MID_INTENSITIES.stop - 1} (CT slices: most), {shares[0]:.1%} are 0. "
            f"{remedy}"
        )
    return images, sizes


def describe(slices: Slices) -> pd.DataFrame:
    """A DataFrame with one row a class: ``class, count, share, sizes, non_square, duplicates``.

    ``sizes`` lists width x height before resizing, the most frequent first, each with its count.
    ``duplicates`` counts the images whose pixels, as loaded, and original size equal an earlier image's.
    """
    sizes = slices.original_sizes
    if sizes is None:
        sizes = np.tile(slices.images.shape[2:0:-1], (len(slices), 1))
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


def to_tensor(images: np.ndarray) -> "torch.Tensor":
    """Images uint8 (N, H, W) or (N, H, W, C) as a float32 tensor (N, 1 or C, H, W) in [0, 1]: value / 255."""
    import torch  # here, so that looking at data does not wait for it

    _check_images("images", images, len(images))
    channels_first = images[:, None] if images.ndim == 3 else np.ascontiguousarray(np.moveaxis(images, 3, 1))
    return torch.tensor(channels_first).to(torch.float32) / 255


def class_root(folder: Path, class_folders: Iterable[str]) -> Path | None:
    """The folder that holds most of ``class_folders``: ``folder``, or one or two levels below; else None."""
    for candidates in ([folder], sorted(folder.glob("*")), sorted(folder.glob("*/*"))):
        held = [sum((p / name).is_dir() for name in class_folders) for p in candidates]
        if any(held):
            return candidates[held.index(max(held))]
    return None


def _check_images(name, images, n):
    good = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim in (3, 4)
    if not good or len(images) != n:
        got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{name} must be an array of uint8 ({n}, H, W) or ({n}, H, W, channels), not {got}.")
    if images.ndim == 4 and images.shape[1] <= 4 < images.shape[3]:
        raise DataError(f"{name} must have the channels last, (N, H, W, channels), not {images.shape}.")


def _integers(name, values, n, *, strings=False):
    """(``values`` as int64 (n,), None), or (codes, names in sorted order) of strings where allowed."""
    array = values
    if not isinstance(array, np.ndarray) or array.dtype == object:  # [1, "a", None] must not become text
        array = np.empty(len(values), dtype=object)
        array[:] = values
        for kind, wanted in ((str, str), (int | np.integer, np.int64)):
            if all(isinstance(v, kind) and not isinstance(v, bool) for v in array):
                array = array.astype(wanted)
                break
    if strings and array.dtype.kind == "U" and array.shape == (n,) and (array != "").all():
        names, codes = np.unique(array, return_inverse=True)
        return codes.astype(np.int64), tuple(names.tolist())
    most = np.iinfo(np.int64).max
    if array.dtype.kind not in "iu" or array.shape != (n,) or (n and array.max() > most):
        kinds = "integers or non-empty strings" if strings else "integers"
        got = (
            f"{array.dtype} {array.shape}" if isinstance(values, np.ndarray) else repr(type(values).__name__)
        )
        raise DataError(f"{name} must be {n} {kinds}, not {got}.")
    return array.astype(np.int64, copy=False), None


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
