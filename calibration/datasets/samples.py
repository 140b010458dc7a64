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
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.arrays import (
    LABEL_NAMES,
    Arrays,
    Reading,
    Stored,
    check_shape,
    checked,
    checked_labels,
    first_line,
    named,
    prepared,
    read_labels,
    single_input,
)
from calibration.datasets.stored import Spool, StoredArray
from calibration.datasets.tensors import load_tensors
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
    labels = array("q")
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
            try:
                labels.append(label)
            except OverflowError as error:
                raise DataError(
                    f"{source}, sample {count - 1}: {label} is no label", "number the classes from 0"
                ) from error
    for spool in spools.values():
        spool.finish()
    if count == 0:
        raise DataError(f"{source} holds no samples", "give at least one")
    if labels and len(labels) != count:
        raise DataError(f"{source} has labels for {len(labels)} of {count} samples", "label all of them or none")
    stored: dict[str, Stored] = dict(spools)
    if reading.labels is not None:
        return checked(source, stored, reading, read_labels(reading.labels))
    held = np.array(labels, dtype=np.int64) if labels else None
    return checked(source, stored, reading, held)


def fitted(spec: InputSpec, values: Any, source: str) -> NDArray[Any]:
    """Return numbers from a text as an array of an input's dtype; integers must be whole, and within its range.

    Raises:
        DataError: If they are no numbers, ragged, or not what an integer input holds.
    """
    try:
        found = np.asarray(values)
        if found.dtype.kind == "O" and spec.dtype.kind == "f" and all(type(value) is int for value in found.flat):
            found = found.astype(np.float64)  # integers that no integer dtype holds
        if found.dtype.kind not in "biuf":
            raise ValueError("not all of it is numbers, or rows differ in length")
    except (ValueError, OverflowError) as error:
        raise DataError(f"{source}, input '{spec.name}': {error}", "give nested lists of numbers") from error
    if spec.dtype.kind in "iub":
        # Floats may stand for integers that a float does not hold: those are looked at one by one.
        found = np.asarray(values, dtype=object) if found.dtype.kind == "f" else found
        check_whole(spec, found, source)
    with np.errstate(over="ignore"):
        return found.astype(spec.dtype)


def check_whole(spec: InputSpec, found: NDArray[Any], source: str) -> None:
    """Raise DataError where numbers are not whole, or out of an integer input's range."""
    if not found.size:
        return
    broken = [v for v in found.flat if isinstance(v, float) and not v.is_integer()] if found.dtype.kind == "O" else []
    if broken:
        there = "fractions" if all(map(math.isfinite, broken)) else "NaN or infinities"
        raise DataError(f"{source}, input '{spec.name}' takes {spec.dtype} and there are {there}", "give whole numbers")
    lowest, highest = (0, 1) if spec.dtype.kind == "b" else (np.iinfo(spec.dtype).min, np.iinfo(spec.dtype).max)
    least, most = int(found.min()), int(found.max())  # as Python's integers, which compare exactly
    if least < lowest or most > highest:
        raise DataError(
            f"{source}, input '{spec.name}' takes {spec.dtype} and there is {least if least < lowest else most}",
            f"it holds {lowest} to {highest}",
        )


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
            header = header_of(path, *first, inputs)
            width = len(first[1])
            columns, label = columns_of(path, header, width, inputs)
            for number, row in itertools.chain([first] if header is None else [], rows):
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
    return "_" not in cell


def number_in(path: Path, line: int, column: int, cell: str) -> float:
    """Return a cell's number: an int where it is written as one that 64 bits hold, so that none of its digits is lost.

    Raises:
        DataError: If it is none.
    """
    if not is_number(cell):
        raise DataError(f"{path}, line {line}, column {column}: '{cell}' is no number", "mend it")
    whole = int(cell) if re.fullmatch(r"\s*[-+]?[0-9]{1,20}\s*", cell) else None
    return whole if whole is not None and -(1 << 63) <= whole < 1 << 64 else float(cell)


def header_of(path: Path, line: int, row: list[str], inputs: Sequence[InputSpec]) -> list[str] | None:
    """Return the names of the columns, where the first row holds names; None where it holds numbers.

    Raises:
        DataError: If it holds numbers beside something that is neither a number nor the name of an input or of the label.
    """
    cells, names = [cell.strip() for cell in row], {spec.name for spec in inputs}
    strange = [place for place, cell in enumerate(cells, 1) if not is_number(cell)]
    if not strange:
        return None
    unknown = [i for i in strange if column_of(cells[i - 1], names) is None and cells[i - 1].lower() not in LABEL_NAMES]
    if unknown and len(strange) < len(cells):
        raise DataError(
            f"{path}, line {line}, column {unknown[0]}: '{cells[unknown[0] - 1]}' is no number",
            "mend it, or give every column a name",
        )
    return cells


def column_of(cell: str, names: Iterable[str]) -> tuple[str, int] | None:
    """Return the input that a column's name speaks of, and the place in it: ``input`` or ``input.k``; None for other names."""
    if cell in names:
        return cell, 0
    match = re.fullmatch(r"(.*)\.([0-9]{1,9})", cell)
    return (match[1], int(match[2])) if match and match[1] in names else None


def whole_label(path: Path, line: int, value: float) -> int:
    """Return a label.

    Raises:
        DataError: If it is no integer.
    """
    if not float(value).is_integer():
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
    names = {spec.name for spec in inputs}
    kept = header or []
    label = next((i for i, name in enumerate(kept) if name.lower() in LABEL_NAMES and name not in names), None)
    others = [i for i in range(width) if i != label]
    meant = {i: column_of(kept[i], names) for i in others} if header is not None else {}
    if len(inputs) == 1 and (not meant or None in meant.values()):
        columns = {inputs[0].name: others}
    elif header is None:
        raise DataError(
            f"{path} names no columns and the model has {len(inputs)} inputs", "add a header: input.0,input.1"
        )
    else:
        columns = columns_by_name(path, header, meant, names)
    for spec in inputs:
        shape = sample_shape(spec)
        known = math.prod(size for size in shape if size > 0)
        free = shape.count(-1)
        have = len(columns[spec.name])
        if free > 1 or have == 0 or (have != known if free == 0 else have % max(known, 1) != 0):
            beside = f" beside the label, '{kept[label]}'" if label is not None else ""
            raise DataError(
                f"{path} has {have} columns for input '{spec.name}'{beside}, and a sample of it is {list(shape)}",
                "give one column per element, in C order",
            )
    return columns, label


def columns_by_name(
    path: Path, header: list[str], meant: dict[int, tuple[str, int] | None], names: Iterable[str]
) -> dict[str, list[int]]:
    """Return the columns of every input in the order of their numbers.

    Raises:
        DataError: If a column is no input's, two have one number, or a number between them is missing.
    """
    places: dict[str, dict[int, int]] = {name: {} for name in names}
    for i, found in meant.items():
        if found is None or found[1] in places[found[0]]:
            raise DataError(
                f"{path} has a column '{header[i]}', which is no input's, or there twice", "name columns input.k"
            )
        places[found[0]][found[1]] = i
    for name, numbers in places.items():
        if gap := next((k for k in range(len(numbers)) if k not in numbers), None):
            raise DataError(f"{path} lacks the column '{name}.{gap}'", "number the columns of an input from 0")
    return {name: [numbers[k] for k in sorted(numbers)] for name, numbers in places.items()}


def open_lines(path: Path, reading: Reading) -> Arrays:
    """Open JSON lines: an object {input: nested list} a sample, or the bare list for the only input; perhaps a label."""
    return spooled(str(path), json_rows(path, reading), reading)


def check_entry(sample: Sample, reading: Reading, where: str) -> None:
    """Raise DataError where a sample lacks an input, holds another array, or an array of another shape than the input's.

    Shapes of what is still to be preprocessed are left to preprocessing.
    """
    wanted = {spec.name for spec in reading.inputs}
    if other := next((name for name in sample if name not in wanted), None):
        raise DataError(f"{where}, holds '{other}', which is no input", f"inputs: {', '.join(sorted(wanted))}")
    for spec in reading.inputs:
        if spec.name not in sample:
            raise DataError(f"{where}, has nothing for input '{spec.name}'", "give every input in every sample")
        if reading.preprocess is None or spec.dtype.kind != "f":
            check_shape(spec, sample[spec.name][None], where)


def json_rows(path: Path, reading: Reading) -> Iterator[tuple[Sample, int | None]]:
    """Yield the samples of a file of JSON lines.

    Raises:
        DataError: If a line is no JSON, or does not hold the inputs.
    """
    specs = {spec.name: spec for spec in reading.inputs}
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where}, is no JSON ({first_line(error)})", "give one document a line") from error
                if isinstance(found, list):
                    found = {single_input(path, reading.inputs): found}
                if not isinstance(found, dict):
                    raise DataError(f"{where}, is neither an object nor a list", "give {input: values}")
                label = next((found.pop(name) for name in LABEL_NAMES if name in found and name not in specs), None)
                if label is not None and type(label) is not int:
                    raise DataError(f"{where}: the label {label!r} is no integer", "number the classes from 0")
                if other := next((name for name in found if name not in specs), None):
                    raise DataError(f"{where}, holds '{other}', which is no input", f"inputs: {', '.join(specs)}")
                sample = {name: fitted(specs[name], values, where) for name, values in found.items()}
                check_entry(sample, reading, where)
                yield sample, label
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({first_line(error)})", "write it as UTF-8") from error


# ---- tensors -------------------------------------------------------------------------------------------------------------------


def open_torch(path: Path, reading: Reading) -> Arrays:
    """Open what ``torch.save`` wrote: a tensor, tensors by input name, or a list of samples or batches of either.

    Raises:
        DataError: If torch is missing, or the file holds anything else.
    """
    try:
        found = load_tensors(path)
    except ImportError as error:
        raise DataError(f"{path} needs torch to be read", "pip install torch") from error
    except Exception as error:
        raise DataError(f"{path} holds no tensors ({first_line(error)})", "save tensors with torch.save") from error
    if isinstance(found, (list, tuple)):
        return spooled(str(path), split_batches(str(path), found, reading), reading)
    if is_tensor(found):
        found = {single_input(path, reading.inputs): found}
    if not isinstance(found, dict) or not all(map(is_tensor, found.values())):
        raise DataError(f"{path} holds {type(found).__name__}, not tensors", "save tensors by input name")
    stored = {
        str(name): value if isinstance(value, StoredArray) else as_array(value, f"{path}, '{name}'")
        for name, value in found.items()
    }
    return named(path, stored, reading)


def is_tensor(value: Any) -> bool:
    """Tell whether a value is a torch tensor, or stands for one."""
    return isinstance(value, StoredArray) or hasattr(value, "detach")


def as_array(value: Any, where: str) -> NDArray[Any]:
    """Return an array, or a torch tensor or stored array as one; bfloat16 becomes float32.

    Raises:
        DataError: If it cannot be an array: a sparse tensor, one of a dtype that numpy lacks, lists of different lengths.
    """
    if isinstance(value, StoredArray):
        return value[np.arange(len(value))]
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
            return np.asarray(value.numpy())
        return np.asarray(value)
    except Exception as error:
        raise DataError(f"{where}: {first_line(error)}", "give dense arrays of numbers, by input name") from error


def split_batches(source: str, entries: Iterable[Any], reading: Reading) -> Iterator[tuple[Sample, int | None]]:
    """Yield the samples of batches; an entry with one axis less than the model's input is a sample itself.

    Raises:
        DataError: If an entry is neither arrays by input name nor an array for the only input, or does not fit the inputs.
    """
    ranks = {spec.name: len(spec.shape) for spec in reading.inputs}
    for number, entry in enumerate(entries):
        where = f"{source}, entry {number}"
        found = entry if isinstance(entry, dict) else {single_input(source, reading.inputs): entry}
        arrays = {str(name): as_array(value, where) for name, value in found.items()}
        if other := next((name for name in arrays if name not in ranks), None):
            raise DataError(f"{where}, holds '{other}', which is no input", f"inputs: {', '.join(ranks)}")
        if other := next((name for name, values in arrays.items() if values.dtype.kind not in "biuf"), None):
            raise DataError(f"{where}, holds {arrays[other].dtype} for '{other}'", "give numbers")
        if all(values.ndim == ranks[name] - 1 for name, values in arrays.items()):
            check_entry(arrays, reading, where)
            yield arrays, None
            continue
        counts = {len(values) if values.ndim else -1 for values in arrays.values()}
        if len(counts) != 1 or -1 in counts:
            raise DataError(f"{where}, holds arrays of different lengths", "the first axis is the sample")
        for row in range(counts.pop()):
            sample = {name: values[row] for name, values in arrays.items()}
            check_entry(sample, reading, where)
            yield sample, None


def open_function(name: str, reading: Reading) -> Arrays:
    """Call a Python function that yields batches, dicts of arrays by input name, and spool them.

    Raises:
        DataError: If there is no such function, or it fails.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise DataError(f"'{name}' names no function", "write module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:  # a generator runs, and imports, while it is drawn from
        return spooled(name, split_batches(name, failing_clearly(name, called(name)), reading), reading)
    finally:
        if here in sys.path:
            sys.path.remove(here)


def called(name: str) -> Iterator[Any]:
    """Return an iterator over what a function, ``module:function``, returns.

    Raises:
        DataError: If there is no such function, or it fails.
    """
    module, _, attribute = name.partition(":")
    try:
        entries: Iterator[Any] = iter(getattr(importlib.import_module(module), attribute)())
        return entries
    except (Exception, SystemExit) as error:
        raise DataError(f"{name} cannot be called ({type(error).__name__}: {first_line(error)})", "mend it") from error


def failing_clearly(name: str, entries: Iterator[Any]) -> Iterator[Any]:
    """Yield what a function yields; what it raises becomes a DataError."""
    while True:
        try:
            entry = next(entries)
        except StopIteration:
            return
        except (Exception, SystemExit) as error:
            raise DataError(f"{name} fails ({type(error).__name__}: {first_line(error)})", "mend it") from error
        yield entry


# ---- ONNX test data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TestSets:
    """Folders of ``input_*.pb``: every set is a batch, every row of it a sample.

    Attributes:
        sets: The files of every set, one per input.
        reading: What was asked for.
        starts: The number of every set's first sample, and of all samples.
        shapes: The shapes of every set's rows.
        labels: The class of every sample.
        digest: Over all files.
        synthetic: That it is not made up.
    """

    __test__ = False  # no test case, for all its name

    sets: tuple[tuple[Path, ...], ...]
    reading: Reading
    starts: NDArray[np.intp]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    labels: NDArray[np.integer] | None
    digest: str
    synthetic: bool = False

    def __len__(self) -> int:
        return int(self.starts[-1])

    def set_of(self, index: int) -> int:
        """Return the number of a sample's set."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def shape_of(self, index: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of a sample's arrays."""
        return self.shapes[self.set_of(index)]

    def read(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Return the samples at ``indices``; a set is read once for those of it that follow each other."""
        source = str(self.sets[0][0].parent.parent)
        inputs = self.reading.inputs
        parts: dict[str, list[NDArray[Any]]] = {spec.name: [] for spec in inputs}
        for number, group in itertools.groupby(indices.tolist(), key=self.set_of):
            chosen = np.fromiter(group, dtype=np.intp) - self.starts[number]
            for spec, file, shape in zip(inputs, self.sets[number], self.shapes[number], strict=True):
                values = read_tensor(file)
                if values.shape != (int(self.starts[number + 1] - self.starts[number]), *shape):
                    raise DataError(f"{file} has changed", "leave it as it is while it is read")
                parts[spec.name].append(values[chosen])
        for part in parts.values():
            if len(shapes := {values.shape[1:] for values in part}) > 1:
                there = ", ".join(str(list(shape)) for shape in sorted(shapes)[:4])
                raise DataError(f"sets of different shapes ({there}) do not fit one batch", "take batches of 1")
        return {spec.name: prepared(spec, np.concatenate(parts[spec.name]), self.reading, source) for spec in inputs}


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
    sets, lengths, shapes = [], [], []
    digest = hashlib.sha256()
    for folder in folders:
        files = tuple(sorted(folder.glob("input_*.pb"), key=numbered))
        if len(files) != len(reading.inputs):
            raise DataError(
                f"{folder} holds {len(files)} inputs and the model takes {len(reading.inputs)}", "give one file each"
            )
        if lacking := next((k for k, file in enumerate(files) if numbered(file)[0] != k), None):
            raise DataError(f"{folder} has no input_{lacking}.pb", "number the files as the model's inputs, from 0")
        arrays = [read_tensor(file) for file in files]
        counts = {len(values) if values.ndim else -1 for values in arrays}
        if len(counts) != 1 or -1 in counts:
            raise DataError(f"the inputs in {folder} do not share their first axis", "the first axis is the sample")
        for file in files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        sets.append(files)
        shapes.append(tuple(values.shape[1:] for values in arrays))
        lengths.append(counts.pop())
    starts = np.cumsum([0, *lengths], dtype=np.intp)
    if not starts[-1]:
        raise DataError(f"{folders[0].parent} holds no samples", "give at least one")
    labels = None
    if reading.labels is not None:
        labels = checked_labels(folders[0].parent, read_labels(reading.labels), int(starts[-1]), reading.labels)
    return TestSets(tuple(sets), reading, starts, tuple(shapes), labels, digest.hexdigest())


def read_tensor(file: Path) -> NDArray[Any]:
    """Return the array of a serialized TensorProto; bfloat16 becomes float32.

    Raises:
        DataError: If it is none, or its values stand in another file.
    """
    import onnx

    try:
        proto = onnx.TensorProto.FromString(file.read_bytes())
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("its values stand in another file")
        values = np.asarray(onnx.numpy_helper.to_array(proto))
        return values.astype(np.float32) if proto.data_type == onnx.TensorProto.BFLOAT16 else values
    except Exception as error:
        raise DataError(f"{file} holds no tensor ({first_line(error)})", "it is a serialized TensorProto") from error


# ---- random data ---------------------------------------------------------------------------------------------------------------


def open_synthetic(count: int, inputs: tuple[InputSpec, ...], seed: int) -> Synthetic:
    """Return random samples.

    Raises:
        DataError: If there is none, or the seed is negative.
    """
    if count < 1:
        raise DataError(f"{count} random samples were asked for", "ask for at least one")
    if seed < 0:
        raise DataError(f"the seed of the random samples is {seed}", "give one of at least 0")
    return Synthetic(count, inputs, seed)


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
        described = [(spec.name, spec.dtype.str, drawn_shape(spec)) for spec in self.inputs]
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
        for spec in self.inputs:
            found[spec.name] = values = np.zeros((len(indices), *drawn_shape(spec)), dtype=spec.dtype)
            if spec.dtype.kind == "f":
                name = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:8], "little")
                for row, index in enumerate(indices.tolist()):
                    values[row] = np.random.default_rng([self.seed, name, index]).standard_normal(values.shape[1:])
        return found


def drawn_shape(spec: InputSpec) -> list[int]:
    """Return the shape of a random sample: free dimensions are 1."""
    return [1 if size is None else size for size in spec.shape[1:]]
