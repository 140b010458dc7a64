"""Arrays that stay on disk: rows are read where they are asked for, so that memory does not grow with their number.

They are read, not mapped: pages of a mapped file count as memory of the process.
"""

from __future__ import annotations

import json
import math
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
        rows = np.empty((len(indices), *self.shape[1:]), dtype=self.dtype)
        try:
            with self.path.open("rb") as stream:
                for first, count, place in runs(indices):
                    stream.seek(self.offset + first * self.row_bytes)
                    data = stream.read(count * self.row_bytes)
                    rows[place : place + count] = np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} cannot be read any more ({error})", "leave it where it is") from error
        return native(rows, self.widened)

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
    folder = tempfile.TemporaryDirectory(prefix="quantcli-")
    file = Path(folder.name) / "array.npy"
    with file.open("wb") as target:
        while piece := stream.read(CHUNK):
            target.write(piece)
    return npy_at(file, 0, size, folder)


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
        if stop - start != dtype.itemsize * math.prod(shape) or 8 + length + stop > size:
            raise ValueError("it is cut short")
        found[name] = StoredArray(path, 8 + length + start, dtype, shape, kind == "BF16")
    return found


class Spool:
    """Samples that are written to a temporary file one after the other, and read back by number."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="quantcli-")
        self.file = Path(self.folder.name) / "samples"
        self.writing: IO[bytes] | None = self.file.open("wb")
        self.offsets: list[int] = []
        self.shapes: list[tuple[int, ...]] = []
        self.kind: np.dtype[Any] | None = None
        self.end = 0

    def append(self, sample: NDArray[Any]) -> None:
        """Add a sample.

        Raises:
            ValueError: If its dtype is not that of the samples before.
        """
        if self.kind is None:
            self.kind = sample.dtype
        if sample.dtype != self.kind:
            raise ValueError(f"a sample is {sample.dtype} and those before are {self.kind}")
        assert self.writing is not None  # noqa: S101 - nothing is added once it is read
        data = np.ascontiguousarray(sample).tobytes()
        self.writing.write(data)
        self.offsets.append(self.end)
        self.shapes.append(sample.shape)
        self.end += len(data)

    def finish(self) -> None:
        """Close the file for writing."""
        if self.writing is not None:
            self.writing.close()
            self.writing = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The samples' dtype."""
        return self.kind if self.kind is not None else np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """How many samples there are, and the shape of the first."""
        return (len(self.shapes), *(self.shapes[0] if self.shapes else ()))

    @property
    def ndim(self) -> int:
        """How many axes a batch has."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, indices: Sequence[int] | NDArray[np.intp]) -> NDArray[Any]:
        rows = []
        with self.file.open("rb") as stream:
            for index in indices:
                shape = self.shapes[index]
                stream.seek(self.offsets[index])
                rows.append(
                    np.frombuffer(stream.read(self.dtype.itemsize * math.prod(shape)), self.dtype).reshape(shape)
                )
        return np.stack(rows)

    def chunks(self) -> Iterator[bytes]:
        """Yield the stored bytes in pieces, after the shapes where they differ."""
        if len(set(self.shapes)) > 1:
            yield json.dumps(self.shapes).encode()
        with self.file.open("rb") as stream:
            while piece := stream.read(CHUNK):
                yield piece
