"""Arrays: ``.npz`` (arrays by input name, or one array for the single input) and ``.npy`` (the single input)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.dataset import usable
from calibration.datasets.preprocess import Preprocess, normalized, shown
from calibration.datasets.stored import Spool, StoredArray, npy_at, npz_members, safetensors_members
from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec

Stored = np.ndarray | StoredArray | Spool

# Arrays under one of these names are labels unless the model has an input of that name.
LABEL_NAMES = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Reading:
    """What a reader is asked for.

    Attributes:
        inputs: The model's inputs.
        preprocess: How stored values become what the model takes; None leaves arrays as they are.
        labels: A file of labels.
        allow_non_finite: Whether NaN and infinities pass.
    """

    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess | None = None
    labels: Path | None = None
    allow_non_finite: bool = False


@dataclass(frozen=True, eq=False)
class Arrays:
    """A data set held as arrays, one per input, first axis the sample."""

    stored: dict[str, Stored]
    inputs: tuple[InputSpec, ...]
    preprocess: Preprocess | None
    labels: NDArray[np.integer] | None
    digest: str
    source: str
    allow_non_finite: bool = False
    synthetic: bool = False

    def shape_of(self, index: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of a sample's arrays."""
        ragged = [values for values in self.stored.values() if isinstance(values, Spool)]
        return tuple(values.shape_at(index) for values in ragged)

    def __len__(self) -> int:
        return len(next(iter(self.stored.values())))

    def read(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Return the samples at ``indices``, checked against the model's inputs."""
        how = Reading(self.inputs, self.preprocess, None, self.allow_non_finite)
        return {spec.name: prepared(spec, self.stored[spec.name][indices], how, self.source) for spec in self.inputs}


def prepared(spec: InputSpec, values: NDArray[Any], reading: Reading, source: str) -> NDArray[Any]:
    """Return stored values as a model's input takes them.

    Raises:
        DataError: If they are of another kind or shape than the input, or not finite where they must be.
    """
    if reading.preprocess is not None and spec.dtype.kind == "f":
        if values.dtype.kind not in "biuf":
            raise DataError(f"{source} holds {values.dtype} for input '{spec.name}'", "give numbers")
        scale = 1.0 if reading.preprocess.scale is None else reading.preprocess.scale
        values = normalized(values, reading.preprocess, scale, reading.preprocess.layout, source)
    values = cast_to(spec, values, source)
    check_shape(spec, values, source)
    if not reading.allow_non_finite:
        check_finite(spec, values, source)
    return values


def open_npz(path: Path, reading: Reading) -> Arrays:
    """Open an ``.npz``: arrays under the inputs' names, or a single array under any name for a model with a single input.

    Raises:
        DataError: If the file cannot be read, an input has no array, or an array is nobody's.
    """
    try:
        found = npz_members(path)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read as .npz ({first_line(error)})", "write it with numpy.savez") from error
    return named(path, found, reading)


def open_safetensors(path: Path, reading: Reading) -> Arrays:
    """Open a ``.safetensors`` file, by the rules of ``.npz``.

    Raises:
        DataError: If the file cannot be read, an input has no array, or an array is nobody's.
    """
    try:
        found = safetensors_members(path)
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as .safetensors ({first_line(error)})", "write it with safetensors"
        ) from error
    return named(path, found, reading)


def named(path: Path, found: Mapping[str, Stored], reading: Reading) -> Arrays:
    """Return arrays by name as the model's inputs, and those under one of the labels' names as labels.

    Raises:
        DataError: If an input has no array, or an array is nobody's.
    """
    found, inputs = dict(found), reading.inputs
    names = {spec.name for spec in inputs}
    label_name = next((name for name in LABEL_NAMES if name in found and name not in names), None)
    stored_labels = found.pop(label_name) if label_name else None
    if not found and stored_labels is not None:
        raise DataError(
            f"{path} holds no data but '{label_name}', which are the labels", "put one array per model input into it"
        )
    if not found:
        raise DataError(f"{path} holds no data", "put one array per model input into it")
    if len(inputs) == 1 and len(found) == 1 and not names & set(found):
        found = {inputs[0].name: next(iter(found.values()))}
    for spec in inputs:
        if spec.name not in found:
            there = ", ".join(f"'{name}'" for name in sorted(found))
            raise DataError(
                f"{path} has no array for input '{spec.name}' (it holds {there})", "name the array after the input"
            )
    if extra := sorted(set(found) - names):
        raise DataError(
            f"{path} holds '{extra[0]}', which is no input of the model (inputs: {', '.join(sorted(names))})",
            f"remove it, or call the labels one of {', '.join(LABEL_NAMES)}",
        )
    if reading.labels is not None:
        return checked(path, found, reading, read_labels(reading.labels))
    return checked(path, found, reading, None if stored_labels is None else whole(stored_labels))


def whole(values: Stored) -> NDArray[Any]:
    """Return all rows."""
    if isinstance(values, np.ndarray) or values.ndim == 0:
        return np.zeros(()) if not isinstance(values, np.ndarray) else values
    return values[np.arange(len(values))]


def read_array(path: Path) -> StoredArray | NDArray[Any]:
    """Return the array of an ``.npy``.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return npy_at(path, 0, path.stat().st_size)
    except Exception as error:
        raise DataError(f"{path} cannot be read as .npy ({first_line(error)})", "write it with numpy.save") from error


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def open_npy(path: Path, reading: Reading) -> Arrays:
    """Open an ``.npy`` for a model with a single input.

    Raises:
        DataError: If the file cannot be read, or the model has several inputs.
    """
    name = single_input(path, reading.inputs)
    given = read_labels(reading.labels) if reading.labels is not None else None
    return checked(path, {name: read_array(path)}, reading, given)


def single_input(path: Path | str, inputs: Sequence[InputSpec]) -> str:
    """Return the name of a model's only input.

    Raises:
        DataError: If it has several.
    """
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DataError(
            f"{path} holds one array and the model has inputs {names}", "give an .npz with one array per input"
        )
    return inputs[0].name


def checked(path: Path | str, stored: dict[str, Stored], reading: Reading, labels: NDArray[Any] | None) -> Arrays:
    """Return the data set after checking that every array has the same, positive number of samples."""
    for name, values in stored.items():
        if values.ndim == 0 or len(values) == 0:
            raise DataError(
                f"{path} is empty: array '{name}' has shape {list(values.shape)}", "give at least one sample"
            )
    counts = {name: len(values) for name, values in stored.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{path} holds arrays of different lengths: {counts}", "the first axis of each is the sample")
    labels = None if labels is None else checked_labels(path, labels, next(iter(counts.values())), reading.labels)
    return Arrays(
        stored, reading.inputs, reading.preprocess, labels, digest_of(stored), str(path), reading.allow_non_finite
    )


def checked_labels(path: Path | str, labels: NDArray[Any], count: int, file: Path | None) -> NDArray[np.integer]:
    """Return the labels of ``count`` samples as a single axis; they stand in the data at ``path``, or in a file of their own.

    Raises:
        DataError: If they are not integers, one a sample.
    """
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        held = f"{labels.dtype} of shape {list(labels.shape)}"
        raise DataError(
            f"the labels of {file or path} are {held}, not one integer per sample", "number the classes from 0"
        )
    if len(labels) != count:
        held = f"{len(labels)} labels" if file is None else f"{file} has {len(labels)} labels"
        raise DataError(f"{path} has {count} samples and {held}", "give one label a sample")
    return labels


def read_labels(path: Path) -> NDArray[Any]:
    """Read labels from an ``.npy`` file."""
    if path.suffix != ".npy":
        raise DataError(f"the labels {path} of array data are not an .npy file", "save them with numpy.save")
    return whole(read_array(path))


def cast_to(spec: InputSpec, values: NDArray[Any], source: str) -> NDArray[Any]:
    """Return values in the input's dtype: floats become the input's float type, integers widen; nothing else is converted.

    Raises:
        DataError: If the stored dtype is of another kind than the input's, or wider than an integer input.
    """
    if values.dtype == spec.dtype:
        return np.ascontiguousarray(values)
    floats = values.dtype.kind == "f" and spec.dtype.kind == "f"
    if floats or (values.dtype.kind in "iub" and spec.dtype.kind in "iu" and np.can_cast(values.dtype, spec.dtype)):
        with np.errstate(over="ignore"):  # what becomes infinite is counted and refused
            return np.ascontiguousarray(values, dtype=spec.dtype)
    remedy = "convert the array"
    if values.dtype == np.uint8 and spec.dtype.kind == "f":
        remedy = "convert the array, or say how its pixels become floats (--scale, --mean, --std, --layout)"
    raise DataError(f"input '{spec.name}' takes {spec.dtype} and {source} holds {values.dtype}", remedy)


def check_shape(spec: InputSpec, values: NDArray[Any], source: str) -> None:
    """Raise DataError where an array's shape (beyond the sample axis) does not fit the input."""
    if not fits(spec.shape[1:], values.shape[1:]):
        have = ["?", *values.shape[1:]]
        remedy = "reshape the data (first axis: the sample), or set --layout, --size or --crop for images"
        if fits(spec.shape, values.shape[1:]):
            remedy = "it has an axis too many: join what lies along the first one (numpy.concatenate)"
        raise DataError(
            f"input '{spec.name}' takes shape {shown(spec)} and {source} gives [{', '.join(map(str, have))}]", remedy
        )


def fits(wanted: Sequence[int | None], given: Sequence[int]) -> bool:
    """Tell whether the axes of an array have the lengths that are wanted; None wants any."""
    return len(wanted) == len(given) and all(size in {None, have} for size, have in zip(wanted, given, strict=True))


def check_finite(spec: InputSpec, values: NDArray[Any], source: str) -> None:
    """Raise DataError where values are not finite, but for what is masked."""
    if values.dtype.kind != "f" or (taken := usable(values, spec.masks)).all():
        return
    nans = int(np.isnan(values).sum())
    infs = int((~taken).sum()) - nans
    raise DataError(f"{source} holds {nans} NaN and {infs} infinite values for input '{spec.name}'", "clean the data")


def digest_of(stored: Mapping[str, Stored]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of the arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(stored):
        values = stored[name]
        digest.update(f"{name}\0{values.dtype.str}\0{values.shape}\0".encode())
        for piece in values.chunks() if not isinstance(values, np.ndarray) else pieces(values):
            digest.update(piece)
    return digest.hexdigest()


def pieces(values: NDArray[Any]) -> Iterator[bytes]:
    """Yield an array's bytes in pieces."""
    for part in np.array_split(values, max(1, values.nbytes >> 26)):
        yield np.ascontiguousarray(part).tobytes()
