"""Fetch IQ-OTH/NCCD from Kaggle and check it: ``python -m fortify.workflow.download``, or ``make data``."""

import contextlib
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from fortify import data
from fortify.data import BY_HAND, IQ_OTH_NCCD
from fortify.images import MIN_SIDE, DataError

MAX_FILE = 2**30  # bytes; a file that large is no slice, nor an archive of a thousand of them


def download(target: str | Path | None = None) -> Path:
    """Put a verified copy of the dataset into the folder ``target`` and return it as a Path.

    ``target`` defaults to :func:`fortify.data.data_folder`. A verified copy already there is left alone.
    ``target`` appears only when it is complete: the copy is made beside it and renamed.
    Raises DataError when ``target`` holds something else, kagglehub is not installed, the download fails
    or what it brought is not the dataset.
    """
    target = Path(target) if target is not None else data.data_folder()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        try:
            data.load_iq_oth_nccd(target, size=MIN_SIDE)
        except DataError as error:
            raise DataError(f"{target} is in the way: move it elsewhere and run again. {error}") from error
        return target
    fetched = Path(_fetch())
    try:
        slices = data.load_iq_oth_nccd(fetched, size=MIN_SIDE)
    except DataError as error:
        raise DataError(f"Kaggle's copy fails the check: delete {fetched} and run again. {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
        copy = Path(temporary) / target.name
        source = data.class_root(fetched, IQ_OTH_NCCD.classes)
        for name in slices.names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, copy / name)
        if data.hash_files(copy / name for name in slices.names) != slices.sha256:
            raise DataError(f"The copy in {copy} differs from {source}. Check the disk and run again.")
        os.replace(copy, target)
    return target


def _fetch():
    try:
        import kagglehub
    except ImportError as error:
        raise DataError(
            f"kagglehub is not installed: `pip install '.[data]'` in the checkout, or `make data`. {BY_HAND}"
        ) from error
    try:
        # Without an account, and resumed where an earlier attempt stopped. kagglehub keeps what it unpacks
        # inside its own folder, but would unpack any amount.
        with _no_file_larger_than(MAX_FILE):
            return kagglehub.dataset_download(IQ_OTH_NCCD.kaggle)
    except Exception as error:  # kagglehub, requests and urllib3 each raise their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"The download of {IQ_OTH_NCCD.kaggle} failed ({reason}). {BY_HAND}") from error


@contextlib.contextmanager
def _no_file_larger_than(size):
    """Writing a file beyond ``size`` bytes is an OSError in this process while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lowest = min(limit for limit in (size, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def main() -> None:
    """Download the dataset, or say in one line on stderr why not and exit with status 1."""
    try:
        print(f"{IQ_OTH_NCCD.title} is complete in {download()}")
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
