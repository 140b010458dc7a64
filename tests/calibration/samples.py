"""What tests of the readers share: inputs, samples, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.datasets import InputSpec
from calibration.datasets.dataset import Dataset

Array = NDArray[Any]

# The unit roundoff of float32: one operation is off by at most this, relatively.
U = 2.0**-24


def spec(*shape: int | None, name: str = "x", dtype: str = "float32") -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


ROWS = spec(None, 3)
IMAGES = spec(None, 3, 4, 5)


def numbers(*shape: int, dtype: str = "float32") -> Array:
    values = np.random.default_rng(1).normal(size=shape) * 10
    return values.astype(dtype)


def pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def npy(path: Path, values: Any) -> Path:
    np.save(path, values)
    return path


def everything(dataset: Dataset) -> dict[str, Array]:
    return dataset.read(np.arange(len(dataset), dtype=np.intp))


def normalized_exactly(stored: Array, scale: float, mean: list[float], std: list[float]) -> Array:
    """Return (pixel · scale − mean) / std, every operation in float32, channels last."""
    scaled = stored.astype(np.float32) * np.float32(scale)
    return np.asarray((scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32))


class Canary:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, nest: Path) -> None:
        self.nest = nest

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.nest,)


def damaged(data: bytes, first: int, last: int) -> bytes:
    return data[:first] + bytes(byte ^ 0x5A for byte in data[first:last]) + data[last:]
