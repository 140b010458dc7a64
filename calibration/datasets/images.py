"""A folder of images: labels from class folders, or from a CSV file with the columns ``file`` and ``label``."""

from __future__ import annotations

import csv
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.arrays import check_shape, first_line
from calibration.datasets.preprocess import Preprocess, image_geometry, image_layout, normalized, resized
from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True, eq=False)
class Images:
    """Image files that are decoded when they are asked for."""

    files: tuple[Path, ...]
    spec: InputSpec
    preprocess: Preprocess
    layout: str
    mode: str
    model_size: tuple[int, int] | None
    labels: NDArray[np.integer] | None
    digest: str
    synthetic: bool = False

    def shape_of(self, index: int) -> int:
        """Return the same for every image: one of another size is an error."""
        del index
        return 0

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Return the images at ``indices`` as one float32 array."""
        decoded = [self._decoded(self.files[i]) for i in indices]
        if len({image.shape for image in decoded}) > 1:
            raise DataError(
                f"the images under {self.files[0].parent} differ in size", "set --size, or --size and --crop"
            )
        scale = 1.0 / 255.0 if self.preprocess.scale is None else self.preprocess.scale
        values = normalized(np.stack(decoded), self.preprocess, scale, self.layout, str(self.files[0].parent))
        if self.preprocess.color == "BGR":
            values = np.ascontiguousarray(np.flip(values, axis=1 if self.layout == "NCHW" else 3))
        values = values.astype(self.spec.dtype)
        check_shape(self.spec, values, str(self.files[0].parent))
        return {self.spec.name: values}

    def _decoded(self, file: Path) -> NDArray[np.uint8]:
        from PIL import Image

        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError("it has more than 8 bits a channel")
                pixels = image.convert(self.mode)
        except Exception as error:
            raise DataError(
                f"{file} cannot be read as an image ({first_line(error)})", "remove or replace it"
            ) from error
        return np.asarray(resized(pixels, self.preprocess, self.model_size), dtype=np.uint8)


def open_images(
    folder: Path, inputs: Sequence[InputSpec], preprocess: Preprocess, labels: Path | None, split: str | None
) -> Images:
    """Open a folder of images for a model with a single image input.

    Raises:
        DataError: If there are no images, the model does not take images, or the labels do not fit the files.
    """
    if len(inputs) != 1 or inputs[0].dtype.kind != "f":
        raise DataError(
            f"{folder} is a folder of images and the model does not have a single float input", "give an .npz"
        )
    layout = image_layout(inputs[0], preprocess)
    height, width, channels = image_geometry(inputs[0], layout)
    mode = "L" if preprocess.color == "L" or channels == 1 else "RGB"
    classes: NDArray[np.integer] | None
    if labels is not None:
        files, classes = labelled(folder, labels, split)
    elif split is not None:
        raise DataError("--split chooses rows of a labels file and none was given", "add --labels FILE.csv")
    else:
        files = tuple(sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()))
        classes = class_folders(folder, files)
    if not files:
        raise DataError(f"{folder} holds no images", f"known kinds: {', '.join(sorted(SUFFIXES))}")
    model_size = (height, width) if height is not None and width is not None else None
    return Images(files, inputs[0], preprocess, layout, mode, model_size, classes, digest_of(folder, files))


def class_folders(folder: Path, files: tuple[Path, ...]) -> NDArray[np.integer] | None:
    """Return labels 0 … n−1 from the sorted names of the folders that hold the images; None for a flat folder."""
    names = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in files]
    if not names or None in names:
        return None
    classes = {name: i for i, name in enumerate(sorted({name for name in names if name is not None}))}
    return np.array([classes[name] for name in names if name is not None], dtype=np.int64)


def labelled(folder: Path, labels: Path, split: str | None) -> tuple[tuple[Path, ...], NDArray[np.integer]]:
    """Return the files and integer labels that a CSV names (columns ``file``, ``label``, perhaps ``split``).

    Raises:
        DataError: If the CSV lacks a column, names a file that is not there, or holds a label that is no integer.
    """
    try:
        with labels.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{labels} cannot be read as CSV ({error})", "give columns file and label") from error
    needed = {"file", "label"} | ({"split"} if split is not None else set())
    if not rows or not needed <= set(rows[0]):
        raise DataError(
            f"{labels} lacks rows or one of the columns {', '.join(sorted(needed))}", "name them in its first line"
        )
    if split is not None:
        rows = [row for row in rows if row["split"] == split]
        if not rows:
            raise DataError(f"{labels} has no row whose split is '{split}'", "look at its column split")
    root = folder.resolve()
    files = []
    for row in rows:
        if not row["file"] or not row["label"]:
            raise DataError(f"{labels} has a row without file or label", "give both in every row")
        file = folder / row["file"]
        if not file.resolve().is_relative_to(root) or not file.is_file():
            raise DataError(
                f"{labels} names {row['file']}, which is not under {folder}", "paths are relative to the folder"
            )
        files.append(file)
    try:
        return tuple(files), np.array([int(row["label"]) for row in rows], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{labels} holds a label that is not an integer ({error})", "number the classes from 0"
        ) from error


def digest_of(folder: Path, files: tuple[Path, ...]) -> str:
    """Return the sha256 over the relative names and bytes of the files."""
    digest = hashlib.sha256()
    for file in files:
        name = Path(os.path.relpath(file, folder)).as_posix()
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
