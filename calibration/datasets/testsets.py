"""Reader of ONNX test data: folders ``test_data_set_N`` of serialized tensors."""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.arrays import Reading, checked_labels, first_line, prepared, read_labels
from calibration.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec


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
                values = rows_of(file, spec)
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
        arrays = [rows_of(file, spec) for file, spec in zip(files, reading.inputs, strict=True)]
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


def rows_of(file: Path, spec: InputSpec) -> NDArray[Any]:
    """Return the samples of a file; an array with one axis less than the input is a sample itself.

    Raises:
        DataError: If it holds no tensor.
    """
    values = read_tensor(file)
    return values[None] if values.ndim == len(spec.shape) - 1 else values


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
