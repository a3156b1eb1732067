"""DICOM files: one frame, rescaled and windowed to 8-bit grey. Needs pydicom, the extra ``dicom``.

A window that differs from file to file changes the contrast, and where it differs between classes it tells
the class. Give one window to all files unless that is what you want to study.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from fortify.images import DataError, check_size, check_varied

SUFFIXES = {".dcm", ".dicom"}


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, by its suffix or by the mark behind its preamble. A DICOMDIR is an index."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.name == "DICOMDIR":
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_dicom(path: Path, *, ct: bool = True, window: tuple[float, float] | None = None) -> Image.Image:
    """Decode one DICOM file to a Pillow image of mode ``L`` (8-bit grey).

    Stored values become ``slope * value + intercept`` (HU for CT), and those the intensities 0..255 by the
    ``window`` (centre, width), else by the file's own, the first of several. PS3.3 C.11.2.1 of the standard
    defines the function: LINEAR for ``window``, the file's ``VOILUTFunction`` for its own. MONOCHROME1, where
    the lowest value is white, is inverted.
    DataError says what is wrong with the file: empty, damaged, without pixels, multi-frame, coloured, too
    large, compressed in a way that no installed package decodes, no window; with ``ct``, also too small.
    ImportError where pydicom is missing.
    """
    pydicom = _pydicom()
    dataset = _dataset(pydicom, path)
    _check(dataset, ct=ct)
    try:
        stored = dataset.pixel_array
    except Exception as error:  # each decoder has its own
        raise DataError(_undecoded(dataset, error)) from error
    values = stored * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    intensities = _windowed(values, *((*window, "LINEAR") if window else _own_window(dataset)))
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        intensities = 255 - intensities
    image = Image.fromarray(intensities)
    check_varied(image)
    return image


def patient_id(path: Path) -> str:
    """The ``PatientID`` of a DICOM file, "" where it has none; nothing else of the file is decoded."""
    return str(_dataset(_pydicom(), path, stop_before_pixels=True).get("PatientID", "") or "").strip()


def check_window(window: tuple[float, float]) -> None:
    """ValueError for what is no (centre, width) with a width above 1."""
    centre, width = window
    if not (np.isfinite(centre) and np.isfinite(width) and width > 1):
        raise ValueError(f"window must be (centre, width) with a width above 1, not {window}")


def _pydicom() -> ModuleType:
    try:
        import pydicom  # here: most who load images have no DICOM files
    except ImportError as error:
        raise ImportError("DICOM files need pydicom: pip install '.[dicom]' in the checkout") from error
    return pydicom


def _dataset(pydicom: ModuleType, path: Path, **options: bool) -> Any:
    if path.stat().st_size == 0:
        raise DataError("is empty (0 bytes)")
    try:
        return pydicom.dcmread(path, **options)
    except Exception as error:
        raise DataError(f"is damaged or no DICOM file ({str(error).replace(str(path), 'file')})") from error


def _check(dataset: Any, *, ct: bool) -> None:
    if "PixelData" not in dataset or "Rows" not in dataset or "Columns" not in dataset:
        raise DataError("is a DICOM file without pixels")
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    # An enhanced file of one frame keeps slope and window inside a sequence, where they would be overlooked.
    if frames > 1 or "PerFrameFunctionalGroupsSequence" in dataset:
        raise DataError(
            f"is a multi-frame DICOM file ({frames} frames): write each frame to a file of its own"
        )
    photometric = str(dataset.get("PhotometricInterpretation", "none"))
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(f"is not MONOCHROME1 or MONOCHROME2 ({photometric}): export it to PNG")
    if "ModalityLUTSequence" in dataset:
        raise DataError("has a ModalityLUTSequence in place of slope and intercept, which is not read")
    check_size(dataset.Columns, dataset.Rows, ct=ct)


def _undecoded(dataset: Any, error: Exception) -> str:
    reason = " ".join(str(error).split())
    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is not None and syntax.is_compressed:
        return (
            f"is compressed ({syntax.name}) and was not decoded: install a decoder that pydicom knows, for "
            f"example pylibjpeg or pyjpegls, or decompress the files ({reason})"
        )
    return f"has pixels that cannot be decoded ({reason})"


def _own_window(dataset: Any) -> tuple[float, float, str]:
    """(centre, width, function) of the first window of the file."""
    centre, width = (dataset.get(name) for name in ("WindowCenter", "WindowWidth"))
    if centre in (None, "", []) or width in (None, "", []):
        raise DataError(
            "has no window (WindowCenter, WindowWidth): pass window=(centre, width) in HU, for example "
            "window=(-600, 1500) for lungs"
        )
    centre, width = (float(np.ravel(value)[0]) for value in (centre, width))
    return centre, width, str(dataset.get("VOILUTFunction", "LINEAR"))


def _windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Intensities uint8 0..255 of rescaled ``values``."""
    if function == "LINEAR" and width > 1:
        share = (values - (centre - 0.5)) / (width - 1) + 0.5
    elif function == "LINEAR_EXACT" and width > 0:
        share = (values - centre) / width + 0.5
    elif function == "SIGMOID" and width > 0:
        share = 1 / (1 + np.exp(-4 * (values - centre) / width))
    else:
        raise DataError(
            f"has a window that cannot be used ({function}, centre {centre:g}, width {width:g}): pass "
            "window=(centre, width)"
        )
    return np.rint(255 * share.clip(0, 1)).astype(np.uint8)
