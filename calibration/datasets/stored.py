"""Arrays that stay on disk: rows are read where they are asked for, so that memory does not grow with their number.

They are read, not mapped: pages of a mapped file count as memory of the process.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
import weakref
import zipfile
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

CHUNK = 1 << 22
SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array in a file, in C order.

    Attributes:
        path: The file.
        offset: Where its first element stands.
        dtype: Its dtype, as stored.
        shape: Its shape.
        widened: Whether the stored 16 bits are the upper half of a float32 (bfloat16).
        keeper: What keeps a temporary file alive.
    """

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    widened: bool = False
    keeper: Any = field(default=None, repr=False)

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    @property
    def row_bytes(self) -> int:
        """The bytes of a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: NDArray[np.intp]) -> NDArray[Any]:
        def place(row: int) -> int:
            return self.offset + row * self.row_bytes

        return native(read_rows(self.path, self.dtype, self.shape[1:], indices, place), self.widened)

    def chunks(self) -> Iterator[bytes]:
        """Yield the stored bytes in pieces."""
        left = self.row_bytes * self.shape[0] if self.shape else self.dtype.itemsize
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            while left:
                piece = stream.read(min(CHUNK, left))
                left -= len(piece)
                if not piece:
                    raise DataError(f"{self.path} is cut short", "write it again")
                yield piece


def read_rows(
    path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], indices: NDArray[np.intp], place: Callable[[int], int]
) -> NDArray[Any]:
    """Return rows of one shape from a file; those that follow each other are read at once.

    Args:
        path: The file.
        dtype: Of the rows.
        shape: Of one row.
        indices: The numbers of the rows.
        place: Where the row of a number stands; the next one stands right behind it.

    Raises:
        DataError: If the file is gone, or shorter than it was.
    """
    size = dtype.itemsize * math.prod(shape)
    held = np.empty(len(indices) * size, dtype=np.uint8)
    try:
        with path.open("rb") as stream:
            for first, count, row in runs(indices):
                stream.seek(place(first))
                if stream.readinto(held.data[row * size : (row + count) * size]) != count * size:
                    raise OSError("it is cut short")
    except OSError as error:
        raise DataError(f"{path} cannot be read any more ({error})", "leave it as it is") from error
    return held.view(dtype).reshape(len(indices), *shape)


def native(rows: NDArray[Any], widened: bool) -> NDArray[Any]:
    """Return rows in the machine's byte order, and bfloat16 as float32."""
    if widened:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows if rows.dtype.isnative else rows.astype(rows.dtype.newbyteorder("="))


def runs(indices: NDArray[np.intp]) -> Iterator[tuple[int, int, int]]:
    """Yield the first index, the length and the place of every run of indices that follow each other."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    for place, stop in zip([0, *breaks.tolist()], [*breaks.tolist(), len(indices)], strict=True):
        if stop > place:
            yield int(indices[place]), stop - place, place


def npy_at(path: Path, start: int, size: int, keeper: Any = None) -> StoredArray | NDArray[Any]:
    """Return the array that a file holds in ``.npy`` form from a place on.

    Raises:
        ValueError: If there is none, it holds objects, or it is cut short.
    """
    with path.open("rb") as stream:
        stream.seek(start)
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        if dtype.itemsize == 0 or any(length < 0 for length in shape):
            raise ValueError(f"its header speaks of {dtype} of shape {list(shape)}")
        offset = stream.tell()
        if size - (offset - start) < dtype.itemsize * math.prod(shape):
            raise ValueError("it is cut short")
        if fortran and len(shape) > 1:  # rare: columns stand together, and rows cannot be read apart
            stream.seek(start)
            return np.ascontiguousarray(np.lib.format.read_array(stream, allow_pickle=False))
    return StoredArray(path, offset, dtype, tuple(shape), keeper=keeper)


def npz_members(path: Path) -> dict[str, StoredArray | NDArray[Any]]:
    """Return the arrays of an ``.npz``; compressed ones are unpacked to temporary files.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: If it cannot be read, or holds anything but arrays.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.filename.endswith(".npy"):
                raise ValueError(f"'{member.filename}' is no array")
            name = member.filename.removesuffix(".npy")
            with archive.open(member) as stream:
                if member.compress_type == zipfile.ZIP_STORED:
                    while stream.read(CHUNK):  # to its end, where the check sum is compared
                        pass
                    found[name] = npy_at(path, data_offset(path, member), member.file_size)
                else:
                    found[name] = unpacked(stream, member.file_size)
    return found


def data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin: behind its local header, whose name and extra field have lengths of their own."""
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        header = stream.read(30)
    return member.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def unpacked(stream: IO[bytes], size: int) -> StoredArray | NDArray[Any]:
    """Return the array that a stream gives in ``.npy`` form, from a temporary file."""
    scratch = Scratch()
    while piece := stream.read(CHUNK):
        scratch.write(piece)
    scratch.finish()
    return npy_at(scratch.file, 0, size, scratch)


def safetensors_members(path: Path) -> dict[str, StoredArray | NDArray[Any]]:
    """Return the arrays of a ``.safetensors`` file.

    Raises:
        ValueError, KeyError, OSError: If it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError("it is cut short")
        header = json.loads(stream.read(length))
    found: dict[str, StoredArray | NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        kind, (start, stop) = entry["dtype"], entry["data_offsets"]
        if kind not in SAFETENSORS and kind != "BF16":
            raise ValueError(f"'{name}' is of type {kind}")
        dtype, shape = np.dtype(SAFETENSORS.get(kind, "<u2")), tuple(int(n) for n in entry["shape"])
        if start < 0 or any(length < 0 for length in shape):
            raise ValueError(f"its header speaks of '{name}' of shape {list(shape)} at {start}")
        if stop - start != dtype.itemsize * math.prod(shape) or 8 + length + stop > size:
            raise ValueError("it is cut short")
        found[name] = StoredArray(path, 8 + length + start, dtype, shape, kind == "BF16")
    return found


class Scratch:
    """A temporary file that is written once, and removed with its last user or when the program ends."""

    def __init__(self) -> None:
        try:
            folder = Path(tempfile.mkdtemp(prefix="quantcli-"))
            self.file = folder / "data"
            self.stream = self.file.open("wb")
        except OSError as error:
            raise DataError(f"no temporary file can be made ({error})", "set TMPDIR to a folder with room") from error
        self.removal = weakref.finalize(self, removed, self.stream, folder)

    def write(self, data: bytes) -> None:
        """Add bytes.

        Raises:
            DataError: If there is no room for them.
        """
        try:
            self.stream.write(data)
        except OSError as error:
            raise DataError(f"{self.file} cannot be written ({error})", "set TMPDIR to a folder with room") from error

    def finish(self) -> None:
        """Close the file for writing.

        Raises:
            DataError: If there is no room for what is not yet written.
        """
        try:
            self.stream.close()
        except OSError as error:
            raise DataError(f"{self.file} cannot be written ({error})", "set TMPDIR to a folder with room") from error


def removed(stream: IO[bytes], folder: Path) -> None:
    """Close a temporary file, full disk or not, and remove its folder."""
    with contextlib.suppress(OSError):
        stream.close()
    shutil.rmtree(folder, ignore_errors=True)


class Spool:
    """Samples that are written to a temporary file one after the other, and read back by number.

    Where shapes differ, each stretch of samples of one shape is remembered, not each sample.
    """

    def __init__(self) -> None:
        self.scratch = Scratch()
        self.kind: np.dtype[Any] | None = None
        self.count = 0
        self.end = 0
        self.forms: list[tuple[int, ...]] = []  # the shapes that there are
        self.known: dict[tuple[int, ...], int] = {}  # and the place of each among them
        self.starts = array("q")  # of each stretch: the number of its first sample,
        self.places = array("q")  # where that stands in the file,
        self.shaped = array("q")  # and the place of its shape in forms

    @property
    def file(self) -> Path:
        """The temporary file."""
        return self.scratch.file

    def append(self, sample: NDArray[Any]) -> None:
        """Add a sample.

        Raises:
            ValueError: If its dtype is not that of the samples before.
            DataError: If there is no room for it.
        """
        if self.kind is None:
            self.kind = sample.dtype
        if sample.dtype != self.kind:
            raise ValueError(f"a sample is {sample.dtype} and those before are {self.kind}")
        form = self.known.setdefault(sample.shape, len(self.forms))
        if form == len(self.forms):
            self.forms.append(sample.shape)
        if not self.shaped or self.shaped[-1] != form:
            self.starts.append(self.count)
            self.places.append(self.end)
            self.shaped.append(form)
        self.scratch.write(np.ascontiguousarray(sample).tobytes())
        self.count += 1
        self.end += sample.nbytes

    def finish(self) -> None:
        """Close the file for writing."""
        self.scratch.finish()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The samples' dtype."""
        return self.kind if self.kind is not None else np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """How many samples there are, and the shape of the first."""
        return (self.count, *(self.forms[0] if self.forms else ()))

    @property
    def ndim(self) -> int:
        """How many axes a batch has."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.count

    def shape_at(self, index: int) -> tuple[int, ...]:
        """Return the shape of a sample."""
        return self.forms[self.shaped[bisect_right(self.starts, index) - 1]]

    def place_of(self, index: int) -> int:
        """Return where a sample stands in the file."""
        stretch = bisect_right(self.starts, index) - 1
        size = self.dtype.itemsize * math.prod(self.forms[self.shaped[stretch]])
        return self.places[stretch] + (index - self.starts[stretch]) * size

    def __getitem__(self, indices: NDArray[np.intp]) -> NDArray[Any]:
        shapes = {self.shape_at(int(index)) for index in indices} or {self.shape[1:]}
        if len(shapes) > 1:
            there = ", ".join(str(list(shape)) for shape in sorted(shapes)[:4])
            raise DataError(
                f"samples of different shapes ({there}) do not fit one batch", "pad them, or take batches of 1"
            )
        return native(read_rows(self.file, self.dtype, shapes.pop(), indices, self.place_of), widened=False)

    def chunks(self) -> Iterator[bytes]:
        """Yield the stored bytes in pieces, after the shapes where they differ."""
        if len(self.forms) > 1:
            texts = [json.dumps(form).encode() for form in self.forms]
            for stretch, (start, form) in enumerate(zip(self.starts, self.shaped, strict=True)):
                stop = self.starts[stretch + 1] if stretch + 1 < len(self.starts) else self.count
                yield b", " if stretch else b"["
                yield b", ".join([texts[form]] * (stop - start))
            yield b"]"
        with self.file.open("rb") as stream:
            while piece := stream.read(CHUNK):
                yield piece
