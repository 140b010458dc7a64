"""Arrays that stay on disk: what is read from every kind of file, what is refused, and what is left behind."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import json
import struct
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from calibration.datasets import InputSpec, boundaries, open_dataset, tensors
from calibration.datasets.arrays import digest_of
from calibration.datasets.stored import Scratch, Spool, StoredArray, data_offset, npy_at, npz_members
from calibration.errors import DataError

Array = NDArray[Any]
X = InputSpec("x", np.dtype("float32"), (None, 3))
ROWS = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def filled(*samples: Array) -> Spool:
    spool = Spool()
    for sample in samples:
        spool.append(sample)
    spool.finish()
    return spool


def safetensors(path: Path, header: Any, data: bytes = bytes(64)) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# ---- reading -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<f8", ">f4", ">i2", "|b1", "|u1", "<u8"])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 2, 3), (6, 0), (6, 2, 0)])
@pytest.mark.parametrize("kind", ["npy", "npz", "compressed"])
def test_rows_of_every_dtype_and_shape(tmp_path: Path, dtype: str, shape: tuple[int, ...], kind: str) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    path = tmp_path / "d"
    if kind == "npy":
        with path.open("wb") as stream:
            np.save(stream, values)
        stored = npy_at(path, 0, path.stat().st_size)
    else:
        with path.open("wb") as stream:
            (np.savez if kind == "npz" else np.savez_compressed)(stream, other=np.zeros(3), x=values)
        stored = npz_members(path)["x"]
    assert isinstance(stored, StoredArray)
    assert stored.shape == shape
    for indices in ([], [0], [5, 4, 3], [1, 2, 2, 3], [0, 1, 2, 3, 4, 5]):
        found = stored[np.array(indices, dtype=np.intp)]
        np.testing.assert_array_equal(found, values[indices].astype(values.dtype.newbyteorder("=")), strict=True)
    assert digest_of({"x": stored}) == digest_of({"x": values})


def test_the_digest_is_over_name_dtype_shape_and_bytes(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", b=ROWS, a=np.arange(3, dtype=">i4"))
    digest = hashlib.sha256()
    for name, values in (("a", np.arange(3, dtype=">i4")), ("b", ROWS)):
        digest.update(f"{name}\0{values.dtype.str}\0{values.shape}\0".encode() + values.tobytes())
    assert digest_of(npz_members(tmp_path / "d.npz")) == digest.hexdigest()
    assert digest_of({"a": np.arange(3, dtype=">i4"), "b": filled(*ROWS)}) == digest.hexdigest()


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(40)), st.integers(1, 50))
def test_shuffled_batches_are_what_indexing_gives(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "shuffled.npz"
    if not path.exists():
        np.savez(path, x=ROWS)
    dataset, indices = open_dataset(path, [X]), np.array(order, dtype=np.intp)
    found = [dataset.read(indices[a:b])["x"] for a, b in boundaries(dataset, indices, size)]
    np.testing.assert_array_equal(np.concatenate(found), ROWS[order], strict=True)


def test_an_archive_behind_other_bytes_and_with_extra_fields(tmp_path: Path) -> None:
    member = io.BytesIO()
    np.save(member, ROWS)
    path = tmp_path / "d.npz"
    with path.open("wb") as stream:
        stream.write(b"something else")
        with zipfile.ZipFile(stream, "w") as archive:
            info = zipfile.ZipInfo("x.npy")
            info.extra = struct.pack("<HH6s", 0x7777, 6, b"nobody")
            archive.writestr(info, member.getvalue())
    with zipfile.ZipFile(path) as archive:
        offset = data_offset(path, archive.infolist()[0])
    assert path.read_bytes()[offset : offset + 6] == b"\x93NUMPY"
    assert (open_dataset(path, [X]).read(np.array([7, 3]))["x"] == ROWS[[7, 3]]).all()


def test_sixty_four_bit_sizes_of_streamed_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive, archive.open("x.npy", "w", force_zip64=True) as stream:
        np.save(stream, ROWS)
    assert (open_dataset(tmp_path / "d.npz", [X]).read(np.arange(40))["x"] == ROWS).all()


# ---- refusing ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors"])
def test_every_truncation_is_told(tmp_path: Path, kind: str) -> None:
    whole, path = tmp_path / f"whole.{kind}", tmp_path / f"d.{kind}"
    if kind == "safetensors":
        save_file({"x": ROWS}, whole)
    else:
        (np.save if kind == "npy" else np.savez)(whole, ROWS)
    content = whole.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(DataError) as caught:
            open_dataset(path, [X])
        assert path.name in str(caught.value)


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "jsonl"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, scratch: Path, kind: str) -> None:
    path = tmp_path / f"d.{kind}"
    if kind == "safetensors":
        save_file({"x": ROWS}, path)
    elif kind == "jsonl":
        path.write_text("".join(f"{row.tolist()}\n" for row in ROWS))
    else:
        (np.save if kind == "npy" else np.savez)(path, ROWS)
    dataset = open_dataset(path, [X])
    if kind == "jsonl":
        (path,) = scratch.glob("*/*")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="cut short"):
        dataset.read(np.array([39], dtype=np.intp))
    path.unlink()
    with pytest.raises(DataError, match="cannot be read any more"):
        dataset.read(np.array([0], dtype=np.intp))


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"x": {"dtype": "F8_E4M3", "shape": [2, 3], "data_offsets": [0, 6]}}, "F8_E4M3"),
        ({"x": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}, "[-2, -3]"),
        ({"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [-24, 0]}}, "-24"),
        ({"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]}}, "cut short"),
        ({"x": {"dtype": "F32", "shape": [20, 3], "data_offsets": [0, 240]}}, "cut short"),
        ({"x": {"shape": [2, 3]}}, "dtype"),
        ({"x": 3}, ""),
        ([1, 2], ""),
        ("x", ""),
    ],
)
def test_headers_of_safetensors_that_make_no_sense(tmp_path: Path, header: Any, told: str) -> None:
    with pytest.raises(DataError, match=r"d\.safetensors") as caught:
        open_dataset(safetensors(tmp_path / "d.safetensors", header), [X])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [b"(-5,3)", b"('a',)", b"(5, 9)"])
def test_headers_of_npy_that_make_no_sense(tmp_path: Path, shape: bytes) -> None:
    np.save(tmp_path / "d.npy", np.zeros((5, 3), dtype=np.float32))
    content = (tmp_path / "d.npy").read_bytes()
    (tmp_path / "d.npy").write_bytes(content.replace(b"(5, 3)", shape.ljust(6)))
    with pytest.raises(DataError, match=r"d\.npy cannot be read"):
        open_dataset(tmp_path / "d.npy", [X])


# ---- spools --------------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([(), (1,), (2,), (2, 3), (0,)]), min_size=1, max_size=20))
def test_a_spool_gives_back_what_was_put_in(shapes: list[tuple[int, ...]]) -> None:
    samples = [np.full(shape, i, dtype=np.int16) for i, shape in enumerate(shapes)]
    spool = filled(*samples)
    assert len(spool) == len(samples)
    assert [spool.shape_at(i) for i in range(len(samples))] == shapes
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(spool[np.array([i])], sample[None], strict=True)
    for shape in set(shapes):
        same = np.array([i for i, other in enumerate(shapes) if other == shape])[::-1]
        np.testing.assert_array_equal(spool[same], np.stack([samples[i] for i in same]), strict=True)


def test_samples_of_different_shapes_are_not_read_together() -> None:
    spool = filled(np.zeros(2), np.zeros(3))
    with pytest.raises(DataError, match=r"\[2\], \[3\].*do not fit one batch"):
        spool[np.array([0, 1])]


def test_the_digest_of_a_spool_follows_values_and_shapes() -> None:
    four = np.arange(4.0)
    contents = [
        filled(four[:2], four[2:]),
        filled(four[:1], four[1:]),
        filled(four[:3], four[3:]),
        filled(four[:2], four[:1:-1]),
    ]
    assert len({digest_of({"x": spool}) for spool in contents}) == 4
    shapes = [[2], [2], [3], [2], [1]]
    digest = hashlib.sha256(f"x\0<f8\0(5, 2)\0{json.dumps(shapes)}".encode() + bytes(8 * 10))
    assert digest_of({"x": filled(*(np.zeros(shape) for shape in shapes))}) == digest.hexdigest()


def test_a_spool_holds_nothing_for_each_sample() -> None:
    sample = np.zeros(3, dtype=np.float32)
    spool = filled(*[sample] * 5)
    spool = Spool()
    gc.collect()
    tracemalloc.start()
    for _ in range(20000):
        spool.append(sample)
    spool.finish()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(spool) == 20000
    assert held < 8192  # less than a byte for two samples


def test_temporary_files_are_removed_with_their_data(tmp_path: Path, scratch: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=ROWS)
    (tmp_path / "d.jsonl").write_text("[1, 2, 3]\n")
    (tmp_path / "bad.jsonl").write_text("[1, 2, 3]\n[1, 2]\n")
    for name in ("d.npz", "d.jsonl"):
        dataset = open_dataset(tmp_path / name, [X])
        assert len(list(scratch.iterdir())) == 1
        del dataset
        gc.collect()
        assert not list(scratch.iterdir())
    with contextlib.suppress(DataError):
        open_dataset(tmp_path / "bad.jsonl", [X])
    gc.collect()
    assert not list(scratch.iterdir())


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_temporary_files_go_without_a_warning(scratch: Path) -> None:
    finished, unfinished = filled(ROWS[0]), Spool()
    unfinished.append(ROWS[0])
    del finished, unfinished
    gc.collect()
    assert not list(scratch.iterdir())


def test_no_room_is_told(monkeypatch: pytest.MonkeyPatch, scratch: Path, tmp_path: Path) -> None:
    class Full(io.RawIOBase):
        def write(self, data: object) -> int:
            del data
            raise OSError(28, "No space left on device")

    make = Scratch.__init__

    def small(self: Scratch) -> None:
        make(self)
        self.stream.close()
        self.stream = Full()  # type: ignore[assignment]

    monkeypatch.setattr(Scratch, "__init__", small)
    (tmp_path / "d.csv").write_text("1,2,3\n")
    np.savez_compressed(tmp_path / "d.npz", x=ROWS)
    for name in ("d.csv", "d.npz"):
        with pytest.raises(DataError, match=r"No space left on device.*TMPDIR"):
            open_dataset(tmp_path / name, [X])
    monkeypatch.setattr(Scratch, "__init__", make)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch / "absent"))
    with pytest.raises(DataError, match="no temporary file can be made"):
        open_dataset(tmp_path / "d.csv", [X])


# ---- torch ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "LARGE", 0)


@pytest.mark.usefixtures("all_large")
def test_tensors_of_large_files_are_left_in_them(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(8, 3)
    half = torch.tensor([[1.5, -2.25, 3.0]], dtype=torch.bfloat16)
    torch.save({"x": base[2:6], "h": half, "n": [torch.nn.Parameter(base), 7]}, tmp_path / "d.pt")
    found = tensors.load_tensors(tmp_path / "d.pt")
    assert isinstance(found["x"], StoredArray)
    assert found["x"][np.array([3, 0])].tolist() == base[[5, 2]].tolist()
    assert found["h"][np.array([0])].tolist() == half.tolist()
    assert found["n"][0][np.arange(8)].tolist() == base.tolist()
    assert found["n"][1] == 7


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("old", [False, True])
def test_large_and_small_files_of_tensors_are_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    rows = torch.from_numpy(ROWS)
    contents = [
        rows,
        {"x": rows, "labels": torch.arange(40)},
        [rows[:10], rows[10], rows[11:]],
        {"x": rows.t().contiguous().t()},
    ]
    for content in contents:
        torch.save(content, tmp_path / "d.pt", _use_new_zipfile_serialization=not old)
        monkeypatch.setattr(tensors, "LARGE", 0)
        large = open_dataset(tmp_path / "d.pt", [X])
        monkeypatch.setattr(tensors, "LARGE", 1 << 40)
        small = open_dataset(tmp_path / "d.pt", [X])
        assert large.digest == small.digest
        assert (large.read(np.arange(40))["x"] == ROWS).all()
        assert (large.labels is None) == (small.labels is None) == (not isinstance(content, dict) or len(content) == 1)


@pytest.mark.usefixtures("all_large")
def test_damaged_files_of_tensors_are_refused(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(ROWS), tmp_path / "d.pt")
    content = (tmp_path / "d.pt").read_bytes()
    (tmp_path / "d.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="holds no tensors"):
        open_dataset(tmp_path / "d.pt", [X])
