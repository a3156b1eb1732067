"""Files that are whole or not there: text, tables, arrays, tensors, all written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import torch

_METADATA = "fortify"  # our entry in the metadata of a safetensors file


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there only if the block ends without an error.

    Readers see the old file or the new one, never half of one, whatever kills the writer. Raises OSError
    that names ``path`` where the disk is full or the folder may not be written to; an error of another file
    inside the block stays as it is.
    """
    path, temporary = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as error:
        own = {str(path), str(path.parent), str(temporary)}
        if temporary is not None and error.filename is not None and str(error.filename) not in own:
            raise  # of another file, which was being read
        why = f"cannot be written ({error.strerror or error}); what was there is as it was"
        raise OSError(error.errno, why, str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_csv(path: str | Path, table: pd.DataFrame) -> None:
    """Write a DataFrame as CSV without its index, floats to nine significant digits, atomically."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: str | Path, **arrays: np.ndarray) -> None:
    """Write numpy arrays as one uncompressed ``.npz``, atomically. Read it with ``np.load(path)``."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def find_root(start: str | Path | None = None) -> Path:
    """The checkout that holds ``start`` (default: the working directory), as an absolute Path.

    ``FORTIFY_ROOT`` overrides the search. Raises FileNotFoundError outside a checkout.
    """
    if os.environ.get("FORTIFY_ROOT"):
        return Path(os.environ["FORTIFY_ROOT"]).resolve()
    start = Path(start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "lib" / "fortify").is_dir() and (folder / "notebooks").is_dir():
            return folder
    raise FileNotFoundError(
        f"{start} is not inside a checkout of this project. Run from the checkout, "
        "or set FORTIFY_ROOT to its folder."
    )


def read_safetensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, metadata) as :func:`write_safetensors` took them; ValueError for a damaged file.

    ``metadata`` is {} for a file that something else wrote. Nothing is unpickled.
    """
    from safetensors import SafetensorError, safe_open  # here and below: it loads torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
            return tensors, json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); delete it and rerun") from error


def write_safetensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write {name: tensor} with JSON-able ``metadata``, atomically; the same content is the same bytes."""
    from safetensors.torch import save_file

    # One memory layout on disk, whatever channels_last made of the model; copies, because safetensors refuses
    # tensors that share memory. One entry, because it writes several in an order that changes by process.
    whole = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(whole, temporary, metadata={_METADATA: json.dumps(metadata)})
