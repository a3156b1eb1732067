"""A second dataset: LIDC-IDRI nodules, benign or malignant by radiologists' rating, with known patients.

4,000 axial CT crops of 796 nodules of 501 patients. :func:`load_lidc_nodules` returns them as
:class:`fortify.data.Slices`, :func:`nodule_table` says what is known of each slice's nodule, and
:func:`load_lidc_masks` reads where the nodule is. All are checked against the tables in ``lidc_tables/``,
whose README says where images and labels come from, under which licence, and what is wrong with them. Above
all: the size of a nodule alone nearly tells its class. Fetching the files is :mod:`fortify.workflow.lidc`.
"""

import functools
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
from PIL import Image

from fortify import files
from fortify.data import Slices, load_folder
from fortify.images import DataError

TABLES = Path(__file__).with_name("lidc_tables")
CLASSES = MappingProxyType({"benign": "benign", "malignant": "malignant"})
SIDE = 128  # px of the crops; masks have the same
GET = "`make lidc` fetches it; or set FORTIFY_LIDC to the folder that holds it."


def lidc_folder() -> Path:
    """Where the dataset is expected: ``FORTIFY_LIDC``, else ``data/lidc-nodules`` in the checkout."""
    if os.environ.get("FORTIFY_LIDC"):
        return Path(os.environ["FORTIFY_LIDC"]).expanduser().resolve()
    return files.find_root() / "data" / "lidc-nodules"


def is_there(folder: str | Path | None = None) -> bool:
    """Whether ``folder`` (default: :func:`lidc_folder`) holds the dataset, unchecked."""
    try:
        folder = lidc_folder() if folder is None else Path(folder)
    except FileNotFoundError:  # outside a checkout
        return False
    return all((folder / name).is_dir() for name in CLASSES)


@functools.cache
def slice_table() -> pd.DataFrame:
    """One row a slice, in the order in which they are loaded.

    Columns: ``file``, ``mask`` (paths below the folder), ``class``, ``patient``, ``nodule`` (the source's
    number, within the patient), ``slice``, ``mask_pixels`` (area in the 128-px crop), ``raters_on_slice``,
    ``sha256`` (of the image file), ``mask_sha256`` (of the mask's 128 x 128 pixels, 0 and 255).
    """
    return pd.read_csv(TABLES / "slices.csv.gz")


@functools.cache
def rating_table() -> pd.DataFrame:
    """One row a nodule, ``nodules.csv`` of the README: ratings, ``diameter_mm``, ``pixel_spacing_mm`` ..."""
    return pd.read_csv(TABLES / "nodules.csv.gz")


def load_lidc_nodules(
    folder: str | Path | None = None, *, size: int, cache: str | Path | None = None
) -> Slices:
    """The 4,000 slices, verified, as :class:`fortify.data.Slices` of classes benign and malignant.

    ``images`` are uint8 (N, size, size), ``patients`` the true ones and ``groups`` the same. ``folder``
    defaults to :func:`lidc_folder`; ``size`` and ``cache`` are as in :func:`fortify.data.load_folder`.
    Raises FileNotFoundError where the folder is not there, and DataError naming files that are missing or
    whose SHA-256 is not the committed one; both say what to do.
    """
    folder = lidc_folder() if folder is None else Path(folder)
    if not is_there(folder):
        raise FileNotFoundError(f"LIDC-IDRI nodules are not in {folder}. {GET}")
    table = slice_table()
    _refuse(table.file, [not (folder / name).is_file() for name in table.file], folder, "are missing")
    found = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in table.file]
    _refuse(table.file, table.sha256 != found, folder, "are damaged")
    patient_of = dict(zip(table.file, table.patient, strict=True))
    counts = table["class"].value_counts().to_dict()
    options = {"classes": CLASSES, "counts": counts, "patients": patient_of, "cache": cache}
    slices = load_folder(folder, size=size, **options)
    title = f"LIDC-IDRI nodules, {len(slices)} slices of {len(slices.patient_names)} patients at {size} px"
    return replace(slices, source=title)


def nodule_table(slices: Slices) -> pd.DataFrame:
    """What is known of the nodule on each of ``slices``, which may be a subset: a DataFrame in their order.

    Columns: ``nodule`` (its name, unique in the dataset), ``diameter_mm`` (the raters' median),
    ``area_px`` (of the consensus mask on this slice, in the 128-px crop) and ``area_mm2``. The diameter is
    one number a nodule, the areas one a slice. DataError for slices of another dataset.
    """
    known = slice_table().merge(rating_table(), on=["patient", "nodule"], validate="many_to_one")
    known = known.set_index("file")
    strange = [name for name in slices.names if name not in known.index]
    if strange:
        raise DataError(f"{len(strange)} slices are not of the LIDC-IDRI nodules, the first is {strange[0]}.")
    own = known.loc[list(slices.names)].reset_index()
    columns = {
        "nodule": own.patient + "_n" + own.nodule.astype(str),
        "diameter_mm": own.diameter_mm.astype(float),
        "area_px": own.mask_pixels.astype(float),
        "area_mm2": own.mask_pixels * own.pixel_spacing_mm**2,
    }
    return pd.DataFrame(columns)


def load_lidc_masks(slices: Slices, folder: str | Path | None = None, *, size: int) -> np.ndarray:
    """Where the nodule is: bool (N, size, size) for ``slices``, which may be a subset.

    A pixel of the 128-px crop is of the nodule where at least half of the raters' masks have it; of a smaller
    one, where at least half of its area is. FileNotFoundError for a missing folder; DataError for missing and
    damaged masks, and slices of another dataset.
    """
    folder = lidc_folder() if folder is None else Path(folder)
    if not (folder / "masks").is_dir():
        raise FileNotFoundError(f"Masks of the LIDC-IDRI nodules are not in {folder / 'masks'}. {GET}")
    nodule_table(slices)  # refuses those of another dataset
    own = slice_table().set_index("file").loc[list(slices.names)]
    pixels = [mask_pixels(folder / name) for name in own["mask"]]
    found = [None if one is None else hashlib.sha256(one.tobytes()).hexdigest() for one in pixels]
    _refuse(own["mask"], own.mask_sha256 != found, folder, "are missing or damaged")
    resized = [Image.fromarray(one).resize((size, size), Image.Resampling.BOX) for one in pixels]
    return np.array([np.asarray(one) >= 128 for one in resized]).reshape(-1, size, size)


def mask_pixels(path: str | Path) -> np.ndarray | None:
    """The pixels of a mask file, uint8 (128, 128); None where it is missing or no grey image of that size."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError):  # Pillow's own for damaged PNG
        return None
    return pixels if pixels.dtype == np.uint8 and pixels.shape == (SIDE, SIDE) else None


def _refuse(names, bad, folder, what):
    """DataError that names the first of the files that are ``bad``."""
    some = [name for name, wrong in zip(names, bad, strict=True) if wrong]
    if some:
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        listed = ", ".join(some[:3]) + more
        raise DataError(
            f"{len(some)} of {len(names)} files in {folder} {what}: {listed}. `make lidc` fetches them again."
        )
