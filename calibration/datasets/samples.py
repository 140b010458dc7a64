"""Readers of single samples and batches: what ``torch.save`` wrote, and Python functions.

What cannot be read again by number is spooled to a temporary file first, so that every data set can be drawn from again and again.
"""

from __future__ import annotations

import sys
from array import array
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
    first_line,
    named,
    read_labels,
    single_input,
)
from calibration.datasets.stored import Spool, StoredArray
from calibration.datasets.tensors import load_tensors
from calibration.errors import DataError
from calibration.imports import imported

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

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
    """Yield the samples of batches; an entry of one axis less than the input, with one label at most, is a sample itself.

    Raises:
        DataError: If an entry is none of arrays by input name, a tuple of them in their order or an array for the only input, or
            does not fit the inputs.
    """
    ranks = {spec.name: len(spec.shape) for spec in reading.inputs}
    for number, entry in enumerate(entries):
        where = f"{source}, entry {number}"
        found = by_name(entry, list(ranks))
        found = found if isinstance(found, dict) else {single_input(source, reading.inputs): found}
        arrays = {str(name): as_array(value, where) for name, value in found.items()}
        labels = taken_labels(arrays, ranks)
        if other := next((name for name in arrays if name not in ranks), None):
            raise DataError(f"{where}, holds '{other}', which is no input", f"inputs: {', '.join(ranks)}")
        if other := next((name for name, values in arrays.items() if values.dtype.kind not in "biuf"), None):
            raise DataError(f"{where}, holds {arrays[other].dtype} for '{other}'", "give numbers")
        # Several labels are those of a batch: of grey images, which have no axis for their channel.
        alone = labels is None or labels.size == 1
        if alone and all(values.ndim == ranks[name] - 1 for name, values in arrays.items()):
            check_entry(arrays, reading, where)
            yield arrays, None if labels is None else int(labels.item())
            continue
        counts = {len(values) if values.ndim else -1 for values in arrays.values()}
        if labels is not None:
            counts.add(len(labels) if labels.ndim else -1)
        if len(counts) != 1 or -1 in counts:
            raise DataError(f"{where}, holds arrays of different lengths", "the first axis is the sample")
        for row in range(counts.pop()):
            sample = {name: values[row] for name, values in arrays.items()}
            check_entry(sample, reading, where)
            yield sample, None if labels is None else int(labels[row])


def by_name(entry: Any, names: Sequence[str]) -> Any:
    """Return what a loader yields, the inputs in order and perhaps labels behind them, by name; anything else as it is."""
    if not isinstance(entry, (tuple, list)):
        return entry
    ranks = [getattr(value, "ndim", 0) for value in entry]
    labelled = len(entry) == len(names) + 1 and ranks[-1] <= 1 and ranks[-1] < min(ranks[:-1])
    if labelled or (len(entry) == len(names) > 1 and min(ranks) > 0):
        return dict(zip([*names, LABEL_NAMES[0]], entry, strict=False))
    return entry


def taken_labels(arrays: Sample, inputs: Collection[str]) -> NDArray[Any] | None:
    """Take the labels out of arrays, and return them; None where there are none, or they are no classes."""
    name = next((name for name in LABEL_NAMES if name in arrays and name not in inputs), None)
    found = arrays.pop(name) if name is not None and len(arrays) > 1 else None
    return found if found is not None and found.ndim <= 1 and found.dtype.kind in "iu" else None


def open_function(name: str, reading: Reading) -> Arrays:
    """Call a Python function that yields batches, dicts of arrays by input name, and spool them.

    Raises:
        DataError: If there is no such function, or it fails.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise DataError(f"'{name}' names no function", "write module:function or file.py:function")
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
        entries: Iterator[Any] = iter(getattr(imported(module), attribute)())
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
