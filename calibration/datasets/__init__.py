"""Readers: each kind of data on disk becomes a `Dataset`, from which batches {input name: array} can be drawn again and again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.datasets.dataset import (
    Dataset,
    InputSpec,
    Runs,
    Selection,
    batches,
    boundaries,
    fitted_batch,
    fixes_batch,
    samples_in,
    select,
    single,
    usable,
    whole_runs,
)
from calibration.datasets.example import first_samples
from calibration.datasets.preprocess import Preprocess
from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calibration.datasets.arrays import Reading

__all__ = [
    "Dataset",
    "InputSpec",
    "Preprocess",
    "Runs",
    "Selection",
    "batches",
    "boundaries",
    "first_samples",
    "fitted_batch",
    "fixes_batch",
    "open_dataset",
    "samples_in",
    "select",
    "single",
    "usable",
    "whole_runs",
]


KINDS = ".npz, .npy, .safetensors, .pt, .csv, .jsonl, a folder of images, or of test_data_set_*/input_*.pb"


def open_dataset(
    path: Path | None,
    inputs: Sequence[InputSpec],
    preprocess: Preprocess | None = None,
    labels: Path | None = None,
    split: str | None = None,
    *,
    function: str | None = None,
    synthetic: int | None = None,
    seed: int = 0,
    allow_non_finite: bool = False,
) -> Dataset:
    """Open a data set for a model, choosing the reader by what stands at ``path``.

    Where a sample is a whole run (`whole_runs`), what is stored has the axis of runs in front of the inputs' own axes.

    Args:
        path: A file or folder; None where ``function`` or ``synthetic`` takes its place.
        inputs: The model's inputs.
        preprocess: How stored values become what the model takes; None leaves arrays as they are and gives images defaults.
        labels: A CSV file (columns ``file`` and ``label``) for images, an ``.npy`` file for arrays.
        split: Keep only those rows of the CSV whose column ``split`` says so.
        function: A Python callable, ``module:function``, that yields batches as dicts by input name.
        synthetic: So many random samples.
        seed: Of the random samples.
        allow_non_finite: Whether NaN and infinities pass.

    Raises:
        DataError: If the data cannot be read or does not fit the model.
    """
    if whole_runs(tuple(inputs)):
        inputs = [replace(spec, shape=(None, *spec.shape)) for spec in inputs]
        how = {"function": function, "synthetic": synthetic, "seed": seed, "allow_non_finite": allow_non_finite}
        return Runs(open_dataset(path, inputs, preprocess, labels, split, **how))  # type: ignore[arg-type]
    from calibration.datasets import arrays, images, samples, testsets
    from calibration.datasets.synthetic import open_synthetic

    if sum(given is not None for given in (path, function, synthetic)) != 1:
        raise DataError("data comes from exactly one place", "give a path, a function, or a number of random samples")
    reading = arrays.Reading(tuple(inputs), preprocess, labels, allow_non_finite)
    if synthetic is not None:
        if labels is not None or split is not None:
            raise DataError("random samples have neither labels nor splits", "leave out --labels and --split")
        return open_synthetic(synthetic, tuple(inputs), seed)
    if function is not None:
        if split is not None:
            raise DataError(f"{function} has no splits", "leave out --split, and yield what it should")
        return samples.open_function(function, reading)
    path = Path(str(path))
    if not path.exists():
        raise DataError(f"there is no data at {path}", f"give {KINDS}")
    if path.is_dir():
        if folders := testsets.test_set_folders(path):
            if split is not None:
                raise DataError(f"the test data in {path} has no splits", "leave out --split")
            return testsets.open_test_sets(folders, reading)
        return images.open_images(path, inputs, preprocess or Preprocess(), labels, split)
    return open_file(path, reading, split)


def open_file(path: Path, reading: Reading, split: str | None) -> Dataset:
    """Open a file, choosing the reader by its ending.

    Raises:
        DataError: If there is none for it, or it holds no such data.
    """
    from calibration.datasets import arrays, samples, text

    if split is not None:
        raise DataError(f"{path.name} has no splits", "--split chooses rows of a labels CSV beside a folder of images")
    readers: dict[str, Callable[[Path, Reading], Dataset]] = {
        ".npz": arrays.open_npz,
        ".npy": arrays.open_npy,
        ".safetensors": arrays.open_safetensors,
        ".pt": samples.open_torch,
        ".pth": samples.open_torch,
        ".csv": text.open_csv,
        ".jsonl": text.open_lines,
    }
    suffix = path.suffix.lower()
    if reading.labels is not None and suffix in {".csv", ".jsonl"}:
        raise DataError(f"{path.name} holds its labels itself", "name a column or key label, and leave out --labels")
    if suffix in readers:
        return readers[suffix](path, reading)
    raise DataError(f"{path} is not a kind of data that can be read", f"give {KINDS}")
