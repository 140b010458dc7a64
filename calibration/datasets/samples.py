"""Readers of single samples: CSV, JSON lines, torch tensors, ONNX test data sets, Python functions, and random ones.

What cannot be read again by number is spooled to a temporary file first, so that every data set can be drawn from again and again.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.arrays import (
    LABEL_NAMES,
    Arrays,
    Reading,
    Stored,
    cast_to,
    check_finite,
    check_shape,
    checked,
    first_line,
    named,
    single_input,
)
from calibration.datasets.stored import Spool
from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec

Sample = dict[str, "NDArray[Any]"]


def spooled(source: str, samples: Iterable[tuple[Sample, int | None]], reading: Reading) -> Arrays:
    """Return a data set of samples (without a batch axis) and their labels, written to a temporary file as they come.

    Raises:
        DataError: If there is none, or one lacks an input, holds another array, or changes its dtype.
    """
    spools = {spec.name: Spool() for spec in reading.inputs}
    labels: list[int] = []
    count = 0
    for count, (sample, label) in enumerate(samples, 1):
        if set(sample) != set(spools):
            there, wanted = ", ".join(sorted(sample)), ", ".join(sorted(spools))
            raise DataError(f"{source}, sample {count - 1}, holds {there}", f"the model's inputs are {wanted}")
        for name, values in sample.items():
            try:
                spools[name].append(values)
            except ValueError as error:
                raise DataError(f"{source}, sample {count - 1}, input '{name}': {error}", "give one dtype") from error
        if label is not None:
            labels.append(label)
    for spool in spools.values():
        spool.finish()
    if count == 0:
        raise DataError(f"{source} holds no samples", "give at least one")
    if labels and len(labels) != count:
        raise DataError(f"{source} has labels for {len(labels)} of {count} samples", "label all of them or none")
    stored: dict[str, Stored] = dict(spools)
    held = np.array(labels, dtype=np.int64) if labels else None
    return checked(source, stored, reading, held)


def fitted(spec: InputSpec, values: Any, source: str) -> NDArray[Any]:
    """Return numbers from a text as an array of an input's dtype; integers must be whole.

    Raises:
        DataError: If they are no numbers, ragged, or not whole where they should be.
    """
    try:
        found = np.asarray(values)
        if found.dtype.kind not in "biuf":
            raise ValueError("not all of it is numbers, or rows differ in length")
    except ValueError as error:
        raise DataError(f"{source}, input '{spec.name}': {error}", "give nested lists of numbers") from error
    if spec.dtype.kind in "iub" and found.dtype.kind == "f" and (found != np.floor(found)).any():
        raise DataError(
            f"{source}, input '{spec.name}' takes {spec.dtype} and there are fractions", "give whole numbers"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        return found.astype(spec.dtype)


# ---- text ----------------------------------------------------------------------------------------------------------------------


def open_csv(path: Path, reading: Reading) -> Arrays:
    """Open a table: a row is a sample, whose columns fill the only input, or those that the header names (``input.k``)."""
    return spooled(str(path), table_rows(path, reading.inputs), reading)


def table_rows(path: Path, inputs: Sequence[InputSpec]) -> Iterator[tuple[Sample, int | None]]:
    """Yield the samples of a table.

    Raises:
        DataError: If it cannot be read, a cell is no number, or the columns do not fill the inputs.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = ((number, row) for number, row in enumerate(csv.reader(stream), 1) if row)
            first = next(rows, None)
            if first is None:
                return
            header = None if all(is_number(cell) for cell in first[1]) else [cell.strip() for cell in first[1]]
            width = len(first[1])
            columns, label = columns_of(path, header, width, inputs)
            for number, row in itertools.chain([] if header else [first], rows):
                if len(row) != width:
                    raise DataError(f"{path}, line {number}, has {len(row)} columns, not {width}", "complete it")
                cells = [number_in(path, number, place, cell) for place, cell in enumerate(row, 1)]
                sample = {
                    spec.name: fitted(spec, [cells[i] for i in columns[spec.name]], f"{path}, line {number}").reshape(
                        sample_shape(spec)
                    )
                    for spec in inputs
                }
                yield sample, None if label is None else whole_label(path, number, cells[label])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV ({first_line(error)})", "write it as UTF-8") from error


def is_number(cell: str) -> bool:
    """Tell whether a cell is a number."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def number_in(path: Path, line: int, column: int, cell: str) -> float:
    """Return a cell's number.

    Raises:
        DataError: If it is none.
    """
    if not is_number(cell):
        raise DataError(f"{path}, line {line}, column {column}: '{cell}' is no number", "mend it")
    return float(cell)


def whole_label(path: Path, line: int, value: float) -> int:
    """Return a label.

    Raises:
        DataError: If it is no integer.
    """
    if not value.is_integer():
        raise DataError(f"{path}, line {line}: the label {value} is no integer", "number the classes from 0")
    return int(value)


def sample_shape(spec: InputSpec) -> tuple[int, ...]:
    """Return the shape of one sample; a single free dimension is what is left."""
    return tuple(-1 if size is None else size for size in spec.shape[1:])


def columns_of(
    path: Path, header: list[str] | None, width: int, inputs: Sequence[InputSpec]
) -> tuple[dict[str, list[int]], int | None]:
    """Return which columns fill each input, and which holds the label.

    Raises:
        DataError: If they do not fit the inputs.
    """
    label = next((i for i, name in enumerate(header or []) if name.lower() in LABEL_NAMES), None)
    others = [i for i in range(width) if i != label]
    columns: dict[str, list[int]] = {spec.name: [] for spec in inputs}
    if len(inputs) == 1:
        columns[inputs[0].name] = others
    elif header is None:
        raise DataError(
            f"{path} names no columns and the model has {len(inputs)} inputs", "add a header: input.0,input.1"
        )
    else:
        places: dict[str, dict[int, int]] = {spec.name: {} for spec in inputs}
        for i in others:
            match = re.fullmatch(r"(.*?)(?:\.(\d+))?", header[i])
            name, number = (
                (header[i], 0) if header[i] in places else (match[1], int(match[2] or 0)) if match else ("", 0)
            )
            if name not in places or number in places[name]:
                raise DataError(f"{path} has a column '{header[i]}', which is no input's", "name columns input.k")
            places[name][number] = i
        columns = {name: [found[k] for k in sorted(found)] for name, found in places.items()}
    for spec in inputs:
        shape = sample_shape(spec)
        known = math.prod(size for size in shape if size > 0)
        free = shape.count(-1)
        have = len(columns[spec.name])
        if free > 1 or have == 0 or (have != known if free == 0 else have % max(known, 1) != 0):
            raise DataError(
                f"{path} has {have} columns for input '{spec.name}', a sample of which is {list(shape)}", "fill it"
            )
    return columns, label


def open_lines(path: Path, reading: Reading) -> Arrays:
    """Open JSON lines: an object {input: nested list} a sample, or the bare list for the only input; perhaps a label."""
    return spooled(str(path), json_rows(path, reading.inputs), reading)


def json_rows(path: Path, inputs: Sequence[InputSpec]) -> Iterator[tuple[Sample, int | None]]:
    """Yield the samples of a file of JSON lines.

    Raises:
        DataError: If a line is no JSON, or does not hold the inputs.
    """
    specs = {spec.name: spec for spec in inputs}
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    found = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{where}, is no JSON ({first_line(error)})", "give one document a line") from error
                if isinstance(found, list):
                    found = {single_input(path, inputs): found}
                if not isinstance(found, dict):
                    raise DataError(f"{where}, is neither an object nor a list", "give {input: values}")
                label = next((found.pop(name) for name in LABEL_NAMES if name in found and name not in specs), None)
                if label is not None and not isinstance(label, int):
                    raise DataError(f"{where}: the label {label!r} is no integer", "number the classes from 0")
                if other := next((name for name in found if name not in specs), None):
                    raise DataError(f"{where}, holds '{other}', which is no input", f"inputs: {', '.join(specs)}")
                yield {name: fitted(specs[name], values, where) for name, values in found.items()}, label
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)})", "write it as UTF-8") from error


# ---- tensors -------------------------------------------------------------------------------------------------------------------


def open_torch(path: Path, reading: Reading) -> Arrays:
    """Open what ``torch.save`` wrote: a tensor, tensors by input name, or a list of samples or batches of either.

    Raises:
        DataError: If torch is missing, or the file holds anything else.
    """
    try:
        import torch
    except ImportError as error:
        raise DataError(f"{path} needs torch to be read", "pip install quantcli[torch]") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{path} holds no tensors ({first_line(error)})", "save tensors with torch.save") from error
    if isinstance(found, (list, tuple)):
        return spooled(str(path), split_batches(str(path), found, reading.inputs), reading)
    if isinstance(found, torch.Tensor):
        found = {single_input(path, reading.inputs): found}
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise DataError(f"{path} holds {type(found).__name__}, not tensors", "save tensors by input name")
    return named(path, {str(name): as_array(value) for name, value in found.items()}, reading)


def as_array(value: Any) -> NDArray[Any]:
    """Return an array, or a torch tensor as one; bfloat16 becomes float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        return np.asarray(value.numpy())
    return np.asarray(value)


def split_batches(
    source: str, entries: Iterable[Any], inputs: Sequence[InputSpec]
) -> Iterator[tuple[Sample, int | None]]:
    """Yield the samples of batches; an entry with one axis less than the model's input is a sample itself.

    Raises:
        DataError: If an entry is neither arrays by input name nor an array for the only input.
    """
    ranks = {spec.name: len(spec.shape) for spec in inputs}
    for number, entry in enumerate(entries):
        found = entry if isinstance(entry, dict) else {single_input(source, inputs): entry}
        try:
            arrays = {str(name): as_array(value) for name, value in found.items()}
        except (TypeError, ValueError) as error:
            raise DataError(f"{source}, entry {number}: {first_line(error)}", "give arrays by input name") from error
        if other := next((name for name in arrays if name not in ranks), None):
            raise DataError(
                f"{source}, entry {number}, holds '{other}', which is no input", f"inputs: {', '.join(ranks)}"
            )
        if other := next((name for name, values in arrays.items() if values.dtype.kind not in "biuf"), None):
            raise DataError(f"{source}, entry {number}, holds {arrays[other].dtype} for '{other}'", "give numbers")
        if all(values.ndim == ranks[name] - 1 for name, values in arrays.items()):
            yield arrays, None
            continue
        counts = {len(values) if values.ndim else -1 for values in arrays.values()}
        if len(counts) != 1 or -1 in counts:
            raise DataError(
                f"{source}, entry {number}, holds arrays of different lengths", "the first axis is the sample"
            )
        for row in range(counts.pop()):
            yield {name: values[row] for name, values in arrays.items()}, None


def open_function(name: str, reading: Reading) -> Arrays:
    """Call a Python function that yields batches, dicts of arrays by input name, and spool them.

    Raises:
        DataError: If there is no such function, or it fails.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise DataError(f"'{name}' names no function", "write module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
        entries = failing_clearly(name, function())
    except Exception as error:
        raise DataError(f"{name} cannot be called ({type(error).__name__}: {first_line(error)})", "mend it") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    return spooled(name, split_batches(name, entries, reading.inputs), reading)


def failing_clearly(name: str, entries: Iterable[Any]) -> Iterator[Any]:
    """Yield what a function yields; what it raises becomes a DataError."""
    iterator = iter(entries)
    while True:
        try:
            entry = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"{name} fails ({type(error).__name__}: {first_line(error)})", "mend it") from error
        yield entry


# ---- ONNX test data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TestSets:
    """Folders of ``input_*.pb``: every set is a batch, every row of it a sample.

    Attributes:
        sets: The files of every set, one per input.
        inputs: The model's inputs.
        rows: The set and the row of every sample.
        shapes: The shapes of every set's rows.
        digest: Over all files.
        allow_non_finite: Whether NaN and infinities pass.
    """

    __test__ = False  # no test case, for all its name

    sets: tuple[tuple[Path, ...], ...]
    inputs: tuple[InputSpec, ...]
    rows: tuple[tuple[int, int], ...]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    digest: str
    allow_non_finite: bool = False
    labels: None = None
    synthetic: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def shape_of(self, index: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of a sample's arrays."""
        return self.shapes[self.rows[index][0]]

    def read(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Return the samples at ``indices``; each set is read once."""
        parts: dict[str, list[NDArray[Any]]] = {spec.name: [] for spec in self.inputs}
        for number, group in itertools.groupby((self.rows[i] for i in indices), key=lambda row: row[0]):
            chosen = [row for _, row in group]
            for spec, file in zip(self.inputs, self.sets[number], strict=True):
                parts[spec.name].append(read_tensor(file)[chosen])
        found = {}
        for spec in self.inputs:
            source = str(self.sets[0][0].parent.parent)
            values = cast_to(spec, np.concatenate(parts[spec.name]), source)
            check_shape(spec, values, source)
            if not self.allow_non_finite:
                check_finite(spec, values, source)
            found[spec.name] = values
        return found


def test_set_folders(path: Path) -> list[Path]:
    """Return the folders of ONNX test data at a path, in the order of their numbers: itself, or those in it."""
    if list(path.glob("input_*.pb")):
        return [path]
    return sorted((p for p in path.glob("test_data_set_*") if list(p.glob("input_*.pb"))), key=numbered)


def numbered(path: Path) -> tuple[int, str]:
    """Return the number that a name ends with, to sort by."""
    digits = re.search(r"(\d+)$", path.stem)
    return (int(digits[1]) if digits else -1), path.name


def open_test_sets(folders: list[Path], reading: Reading) -> TestSets:
    """Open ONNX test data.

    Raises:
        DataError: If a set has another number of inputs than the model, or its inputs differ in length.
    """
    sets, rows, shapes = [], [], []
    digest = hashlib.sha256()
    for number, folder in enumerate(folders):
        files = tuple(sorted(folder.glob("input_*.pb"), key=numbered))
        if len(files) != len(reading.inputs):
            raise DataError(
                f"{folder} holds {len(files)} inputs and the model takes {len(reading.inputs)}", "give one file each"
            )
        arrays = [read_tensor(file) for file in files]
        counts = {len(values) if values.ndim else -1 for values in arrays}
        if len(counts) != 1 or -1 in counts:
            raise DataError(f"the inputs in {folder} do not share their first axis", "the first axis is the sample")
        for file in files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        sets.append(files)
        shapes.append(tuple(values.shape[1:] for values in arrays))
        rows += [(number, row) for row in range(counts.pop())]
    if not rows:
        raise DataError(f"{folders[0].parent} holds no samples", "give at least one")
    return TestSets(
        tuple(sets), reading.inputs, tuple(rows), tuple(shapes), digest.hexdigest(), reading.allow_non_finite
    )


def read_tensor(file: Path) -> NDArray[Any]:
    """Return the array of a serialized TensorProto.

    Raises:
        DataError: If it is none.
    """
    import onnx

    try:
        proto = onnx.TensorProto.FromString(file.read_bytes())
        return np.asarray(onnx.numpy_helper.to_array(proto))
    except Exception as error:
        raise DataError(f"{file} holds no tensor ({first_line(error)})", "it is a serialized TensorProto") from error


# ---- random data ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Random samples, each a function of seed, input and number: normal for floats, zero for everything else.

    Attributes:
        count: How many.
        inputs: The model's inputs; free dimensions behind the batch are 1.
        seed: Of the samples.
    """

    count: int
    inputs: tuple[InputSpec, ...]
    seed: int = 0
    labels: None = None
    synthetic: bool = True

    @property
    def digest(self) -> str:
        """The sha256 of what the samples follow from."""
        described = [(spec.name, spec.dtype.str, [size or 1 for size in spec.shape[1:]]) for spec in self.inputs]
        return hashlib.sha256(json.dumps(["synthetic", self.count, self.seed, described]).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def shape_of(self, index: int) -> int:
        """Return the same for every sample."""
        del index
        return 0

    def read(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Return the samples at ``indices``."""
        found = {}
        for place, spec in enumerate(self.inputs):
            shape = [size or 1 for size in spec.shape[1:]]
            if spec.dtype.kind == "f":
                drawn = [np.random.default_rng([self.seed, place, int(i)]).standard_normal(shape) for i in indices]
                found[spec.name] = np.stack(drawn).astype(spec.dtype)
            else:
                found[spec.name] = np.zeros((len(indices), *shape), dtype=spec.dtype)
        return found
