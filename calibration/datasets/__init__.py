"""Readers: each kind of data on disk becomes a `Dataset`, from which batches {input name: array} can be drawn again and again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calibration.datasets.dataset import Dataset, InputSpec, Selection, batches, fitted_batch, fixes_batch, select
from calibration.datasets.preprocess import Preprocess
from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Dataset",
    "InputSpec",
    "Preprocess",
    "Selection",
    "batches",
    "fitted_batch",
    "fixes_batch",
    "open_dataset",
    "select",
]


def open_dataset(
    path: Path,
    inputs: Sequence[InputSpec],
    preprocess: Preprocess | None = None,
    labels: Path | None = None,
    split: str | None = None,
) -> Dataset:
    """Open a data set for a model, choosing the reader by what stands at ``path``.

    Args:
        path: An ``.npz`` or ``.npy`` file, or a folder of images.
        inputs: The model's inputs.
        preprocess: How stored values become what the model takes; None leaves arrays as they are and gives images defaults.
        labels: A CSV file (columns ``file`` and ``label``) for images, an ``.npy`` file for arrays.
        split: Keep only those rows of the CSV whose column ``split`` says so.

    Raises:
        DataError: If the data cannot be read or does not fit the model.
    """
    from calibration.datasets import arrays, images

    path = Path(path)
    if not path.exists():
        raise DataError(f"there is no data at {path}", "give an .npz or .npy file, or a folder of images")
    if path.is_dir():
        return images.open_images(path, inputs, preprocess or Preprocess(), labels, split)
    if split is not None:
        raise DataError(f"{path.name} has no splits", "--split chooses rows of a labels CSV beside a folder of images")
    if path.suffix == ".npz":
        return arrays.open_npz(path, inputs, preprocess, labels)
    if path.suffix == ".npy":
        return arrays.open_npy(path, inputs, preprocess, labels)
    raise DataError(
        f"{path} is not a kind of data that can be read", "give an .npz or .npy file, or a folder of images"
    )
