"""Readers of text: CSV and JSON lines."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.arrays import LABEL_NAMES, Arrays, Reading, first_line, single_input
from calibration.datasets.samples import check_entry, spooled
from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec
    from calibration.datasets.samples import Sample


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


# ---- numbers -------------------------------------------------------------------------------------------------------------------


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
