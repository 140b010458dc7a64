"""The first samples of a data set, before there is a model to say what its inputs are: they show what a model is traced with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.arrays import LABEL_NAMES, first_line, read_array
from calibration.datasets.dataset import InputSpec
from calibration.datasets.images import open_images
from calibration.datasets.preprocess import Preprocess, normalized
from calibration.datasets.samples import as_array, by_name, called, failing_clearly, is_tensor
from calibration.datasets.stored import npz_members, safetensors_members
from calibration.datasets.tensors import load_tensors
from calibration.datasets.testsets import numbered, read_tensor, test_set_folders
from calibration.errors import DataError, ReportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

REMEDY = "describe the model's inputs, as in --input x:1x3x224x224"


def first_samples(
    path: Path | None, names: Sequence[str], preprocess: Preprocess | None = None, function: str | None = None
) -> dict[str, NDArray[Any]]:
    """Return the first one or two samples of a data set, preprocessed, by the names of a model's inputs.

    Args:
        path: A file or folder; None where ``function`` takes its place, or there is nothing to look at.
        names: The model's inputs, in order; one array under another name is the first one's.
        preprocess: How stored values become what the model takes.
        function: A Python callable, ``module:function``, that yields batches.

    Returns:
        Arrays whose first axis is the sample; none for inputs that the data has no array for.

    Raises:
        DataError: If the data cannot be read, or says too little by itself (.csv, .jsonl).
    """
    if path is None and function is None:
        return {}
    if path is not None and path.is_dir() and not test_set_folders(path):
        return {names[0]: image_rows(path, preprocess or Preprocess())}
    try:
        found = stored_rows(path, names) if path is not None else yielded(str(function), names)
    except ReportedError:
        raise
    except Exception as error:
        raise DataError(
            f"{path or function} does not show what the model takes ({first_line(error)})", REMEDY
        ) from error
    if not isinstance(found, dict):
        found = {names[0]: found}
    labels = next((name for name in LABEL_NAMES if name in found and name not in names), None)
    found = {str(name): np.asarray(values) for name, values in found.items() if name != labels}
    if len(found) == 1 and not set(found) & set(names):
        found = {names[0]: next(iter(found.values()))}
    return {name: as_input(found[name], preprocess, str(path or function)) for name in names if name in found}


def stored_rows(path: Path, names: Sequence[str]) -> Any:
    """Return the first rows of what is stored: an array, or arrays by name.

    Raises:
        DataError: If this kind of data does not say what it holds.
    """
    suffix = path.suffix.lower()
    if folders := test_set_folders(path) if path.is_dir() else []:
        files = sorted(folders[0].glob("input_*.pb"), key=numbered)
        return {name: read_tensor(file) for name, file in zip(names, files, strict=False)}
    if suffix in {".npz", ".safetensors"}:
        members = npz_members(path) if suffix == ".npz" else safetensors_members(path)
        return {name: values[np.arange(min(2, len(values)))] for name, values in members.items() if values.shape}
    if suffix == ".npy":
        array = read_array(path)
        return array[np.arange(min(2, len(array)))]
    if suffix in {".pt", ".pth"}:
        held = load_tensors(path)
        entry = by_name(held[0], names) if isinstance(held, (list, tuple)) else held
        if isinstance(entry, dict):
            return {name: as_array(value, str(path))[:2] for name, value in entry.items() if is_tensor(value)}
        return as_array(entry, str(path))[:2]
    raise DataError(f"{path.name} does not say what the model takes: it is text", REMEDY)


def yielded(function: str, names: Sequence[str]) -> Any:
    """Return the first batch that a Python function yields."""
    import sys

    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        entry = next(failing_clearly(function, called(function)), None)
    finally:
        if here in sys.path:
            sys.path.remove(here)
    if entry is None:
        raise DataError(f"{function} yields nothing", "yield batches")
    entry = by_name(entry, names)
    if isinstance(entry, dict):
        return {name: as_array(value, function) for name, value in entry.items()}
    return as_array(entry, function)


def image_rows(folder: Path, preprocess: Preprocess) -> NDArray[Any]:
    """Return the first image of a folder as a model takes it: channels first, unless the layout says otherwise."""
    channels = 1 if preprocess.color == "L" else 3
    last = preprocess.layout == "NHWC"
    shape = (None, None, None, channels) if last else (None, channels, None, None)
    images = open_images(folder, [InputSpec("images", np.dtype("float32"), shape)], preprocess, None, None)
    return images.read(np.zeros(1, dtype=np.intp))["images"]


def as_input(values: NDArray[Any], preprocess: Preprocess | None, source: str) -> NDArray[Any]:
    """Return stored values as a model takes them: reals and bytes (pixels) as float32, normalized where there is preprocessing."""
    pixels = values.dtype.kind == "f" or values.dtype == np.uint8
    if preprocess is not None and pixels:
        scale = 1.0 if preprocess.scale is None else preprocess.scale
        return normalized(values, preprocess, scale, preprocess.layout, source)
    return values.astype(np.float32) if pixels else values
