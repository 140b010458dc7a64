"""What ``torch.save`` wrote: small files are loaded; the tensors of large ones stay in the file, and are read row by row."""

from __future__ import annotations

import contextlib
import sys
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.stored import StoredArray

if TYPE_CHECKING:
    from pathlib import Path

LARGE = 1 << 26  # bytes; below it, finding tensors without loading them costs more than loading them
DTYPES = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int64": "<i8", "int32": "<i4", "int16": "<i2",
    "int8": "|i1", "uint8": "|u1", "bool": "|b1",
}  # fmt: skip


def load_tensors(path: Path) -> Any:
    """Return what a file holds: torch tensors, or `StoredArray` in their place, in their nest of lists and dicts.

    Raises:
        ImportError: If torch is missing.
        Exception: Whatever torch raises where the file holds anything but tensors, numbers and texts.
    """
    import torch

    if path.stat().st_size >= LARGE:
        with contextlib.suppress(Exception):  # a file that is not plain is loaded, which tells what is wrong with it
            return found_in(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def found_in(path: Path) -> Any:
    """Return what a file holds, every tensor as the place of its elements.

    torch, loading tensors without elements, notes where those stand in the file.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: If the file is of the old format, was written by a machine of another byte
            order, is damaged, or holds tensors that do not stand in C order.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with zipfile.ZipFile(path) as archive:
        order = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
        if order != [b"little"] or sys.byteorder != "little" or archive.testzip() is not None:
            raise ValueError("its bytes are not as they are needed")
    with FakeTensorMode():
        return placed(path, torch.load(path, map_location="cpu", weights_only=True))


def placed(path: Path, found: Any) -> Any:
    """Return lists, dicts and tensors with the tensors' places in their stead.

    Raises:
        ValueError: If a tensor's elements do not stand together in the file.
    """
    import torch

    if isinstance(found, dict):
        return {name: placed(path, value) for name, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [placed(path, value) for value in found]
    if not isinstance(found, torch.Tensor):
        return found
    storage, kind = found.untyped_storage(), str(found.dtype).removeprefix("torch.")
    offset = getattr(storage, "_checkpoint_offset", None)
    if offset is None or kind not in DTYPES or found.ndim == 0 or not found.is_contiguous() or found.is_conj():
        raise ValueError("its elements do not stand together")
    dtype = np.dtype(DTYPES[kind])
    end = (found.storage_offset() + found.numel()) * dtype.itemsize
    if end > storage.nbytes() or offset + end > path.stat().st_size:
        raise ValueError("it is cut short")
    place = int(offset + found.storage_offset() * dtype.itemsize)
    return StoredArray(path, place, dtype, tuple(found.shape), widened=kind == "bfloat16")
