"""The readers: arrays and image folders, what they give and what they refuse."""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from calibration.datasets import InputSpec, Preprocess, Selection, batches, fitted_batch, open_dataset, select
from calibration.datasets.dataset import Dataset
from calibration.errors import DataError

Array = NDArray[Any]

# The unit roundoff of float32: one operation is off by at most this, relatively.
U = 2.0**-24


def spec(*shape: int | None, name: str = "x", dtype: str = "float32") -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


ROWS = spec(None, 3)
IMAGES = spec(None, 3, 4, 5)


def numbers(*shape: int, dtype: str = "float32") -> Array:
    values = np.random.default_rng(1).normal(size=shape) * 10
    return values.astype(dtype)


def pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def npy(path: Path, values: Any) -> Path:
    np.save(path, values)
    return path


def everything(dataset: Dataset) -> dict[str, Array]:
    return dataset.read(np.arange(len(dataset), dtype=np.intp))


def normalized_exactly(stored: Array, scale: float, mean: list[float], std: list[float]) -> Array:
    """Return (pixel · scale − mean) / std, every operation in float32, channels last."""
    scaled = stored.astype(np.float32) * np.float32(scale)
    return np.asarray((scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32))


class Canary:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, nest: Path) -> None:
        self.nest = nest

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.nest,)


# ---- arrays: what they give ----------------------------------------------------------------------------------------------------


def test_npz_gives_every_input_its_array(tmp_path: Path) -> None:
    a, b = numbers(5, 3), np.arange(10).reshape(5, 2)
    inputs = [spec(None, 2, name="ids", dtype="int64"), spec(None, 3, name="rows")]
    dataset = open_dataset(npz(tmp_path / "d.npz", rows=a, ids=b), inputs)
    assert len(dataset) == 5
    assert dataset.labels is None
    given = dataset.read(np.array([3, 0, 3]))
    assert set(given) == {"ids", "rows"}
    np.testing.assert_array_equal(given["rows"], a[[3, 0, 3]], strict=True)
    np.testing.assert_array_equal(given["ids"], b[[3, 0, 3]], strict=True)


@pytest.mark.parametrize("name", ["x", "arr_0", "images", "some name"])
def test_a_single_array_may_have_any_name(tmp_path: Path, name: str) -> None:
    x = numbers(4, 3)
    from_npz = open_dataset(npz(tmp_path / "d.npz", **{name: x}), [ROWS])
    from_npy = open_dataset(npy(tmp_path / "d.npy", x), [ROWS])
    for dataset in (from_npz, from_npy):
        assert list(everything(dataset)) == ["x"]
        np.testing.assert_array_equal(everything(dataset)["x"], x, strict=True)


@pytest.mark.parametrize("name", ["labels", "label", "targets", "target", "y"])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_labels_are_found_under_every_known_name(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    dataset = open_dataset(
        npz(tmp_path / "d.npz", **{"x": numbers(4, 3), name: np.array([3, 1, 0, 2]).reshape(shape)}), [ROWS]
    )
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [3, 1, 0, 2]


def test_an_input_named_like_labels_is_an_input(tmp_path: Path) -> None:
    y = numbers(4, 3)
    dataset = open_dataset(npz(tmp_path / "d.npz", y=y), [spec(None, 3, name="y")])
    assert dataset.labels is None
    np.testing.assert_array_equal(everything(dataset)["y"], y, strict=True)


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_a_labels_file_goes_before_stored_labels(tmp_path: Path, kind: str) -> None:
    data = npz(tmp_path / "d.npz", x=numbers(2, 3), labels=[0, 0]) if kind == "npz" else tmp_path / "d.npy"
    if kind == "npy":
        npy(data, numbers(2, 3))
    dataset = open_dataset(data, [ROWS], labels=npy(tmp_path / "l.npy", np.array([5, 6])))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("float64", "float32"),
        ("float16", "float32"),
        ("float32", "float16"),
        ("float32", "float32"),
        (">f4", "float32"),
        ("int32", "int64"),
        ("uint8", "int64"),
        ("uint8", "uint8"),
        ("int8", "int16"),
        ("bool", "int64"),
        ("bool", "bool"),
    ],
)
def test_floats_are_converted_and_integers_widened(tmp_path: Path, stored: str, wanted: str) -> None:
    values = np.array([[0, 1, 100]]).astype(stored)
    given = everything(open_dataset(npz(tmp_path / "d.npz", x=values), [spec(None, 3, dtype=wanted)]))["x"]
    np.testing.assert_array_equal(given, np.array([[0, 1, 1 if stored == "bool" else 100]], dtype=wanted), strict=True)


def test_float64_is_rounded_to_the_nearest_float32(tmp_path: Path) -> None:
    values = numbers(50, 3, dtype="float64")
    given = everything(open_dataset(npz(tmp_path / "d.npz", x=values), [ROWS]))["x"]
    assert (np.abs(given - values) <= U * np.abs(values)).all()  # half a unit in the last place


@pytest.mark.parametrize(
    ("shape", "layout", "channels_last"),
    [
        ((6, 4, 5), "NCHW", (6, 4, 5, 1)),
        ((6, 4, 5), "NHWC", (6, 4, 5, 1)),
        ((6, 4, 5, 3), "NCHW", (6, 4, 5, 3)),
        ((6, 4, 5, 3), "NHWC", (6, 4, 5, 3)),
    ],
)
def test_stored_pixels_are_normalized_exactly(
    tmp_path: Path, shape: tuple[int, ...], layout: Any, channels_last: tuple[int, ...]
) -> None:
    stored, channels = pixels(*shape), channels_last[-1]
    scale, mean, std = 1 / 255, [0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels]
    wanted = spec(None, channels, 4, 5) if layout == "NCHW" else spec(None, 4, 5, channels)
    how = Preprocess(scale=scale, mean=tuple(mean), std=tuple(std), layout=layout)
    given = everything(open_dataset(npz(tmp_path / "d.npz", images=stored), [wanted], how))["x"]
    x = normalized_exactly(stored.reshape(channels_last), scale, mean, std)
    np.testing.assert_array_equal(given, x.transpose(0, 3, 1, 2) if layout == "NCHW" else x, strict=True)
    # Against the reals: scale, mean and std are rounded once each, and so are product, difference and quotient. The product is
    # off by 2u relatively, the mean by u, and the last two roundings and std's by 3u of the result; 1.01 covers the products of u.
    scaled = stored.reshape(channels_last).astype(np.float64) * scale
    real = (scaled - mean) / std
    bound = 1.01 * U * ((2 * scaled + np.abs(mean)) / np.array(std) + 3 * np.abs(real))
    assert (np.abs(x.astype(np.float64) - real) <= bound).all()


def test_preprocessing_leaves_integer_inputs_and_a_missing_layout_alone(tmp_path: Path) -> None:
    stored, ids = pixels(4, 3), np.arange(4).reshape(4, 1)
    inputs = [ROWS, spec(None, 1, name="ids", dtype="int64")]
    given = everything(open_dataset(npz(tmp_path / "d.npz", x=stored, ids=ids), inputs, Preprocess(scale=0.5)))
    np.testing.assert_array_equal(given["x"], stored.astype(np.float32) / 2, strict=True)
    np.testing.assert_array_equal(given["ids"], ids, strict=True)


def test_the_digest_follows_names_dtypes_shapes_and_values(tmp_path: Path) -> None:
    x = numbers(4, 6)
    changed = x.copy()
    changed[3, 5] = np.nextafter(changed[3, 5], np.float32(np.inf))
    free = [spec(None, None), spec(None, None, name="z")]

    def digest(**arrays: Array) -> str:
        return open_dataset(npz(tmp_path / "d.npz", **arrays), free).digest

    digests = [
        digest(x=x, z=x),
        digest(x=changed, z=x),
        digest(x=x, z=changed),
        digest(x=x.view(np.int32), z=x),  # the same bytes
        digest(x=x.reshape(4, 2, 3), z=x),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(z=x, x=x) == digests[0]


# ---- arrays: what they refuse --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "inputs", "told"),
    [
        pytest.param({"z": numbers(2, 3), "w": numbers(2, 3)}, [ROWS], "no array for input 'x'", id="missing name"),
        pytest.param({"z": numbers(2, 3)}, [ROWS, spec(None, 3, name="z")], "'x'", id="one of two is missing"),
        pytest.param({"x": numbers(2, 3), "extra": numbers(2, 3)}, [ROWS], "'extra'", id="extra array"),
        pytest.param(
            {"x": numbers(2, 3), "z": numbers(3, 3)},
            [ROWS, spec(None, 3, name="z")],
            "different lengths",
            id="different lengths",
        ),
        pytest.param({"x": numbers(0, 3)}, [ROWS], "is empty", id="no sample"),
        pytest.param({"x": np.float32(1)}, [ROWS], "is empty", id="a scalar"),
        pytest.param({}, [ROWS], "no data", id="no array"),
        pytest.param({"labels": [1, 2]}, [ROWS], "no data", id="labels alone"),
        pytest.param({"x": numbers(2, 4)}, [ROWS], "takes shape [?, 3]", id="wrong length"),
        pytest.param({"x": numbers(2, 3, 1)}, [ROWS], "takes shape [?, 3]", id="wrong rank"),
        pytest.param({"x": numbers(3)}, [ROWS], "takes shape [?, 3]", id="no sample axis"),
        pytest.param({"x": numbers(2, 1, 3)}, [ROWS], "an axis too many: join what lies", id="batches of one"),
        pytest.param({"x": np.ones((2, 3), dtype=np.int64)}, [ROWS], "takes float32 and", id="integers for floats"),
        pytest.param({"x": np.ones((2, 3), dtype=np.uint8)}, [ROWS], "--scale", id="pixels without preprocessing"),
        pytest.param({"x": np.ones((2, 3), dtype=np.complex64)}, [ROWS], "complex64", id="complex"),
        pytest.param({"x": np.full((2, 3), "a")}, [ROWS], "<U1", id="text"),
        pytest.param({"x": np.full((2, 3), np.datetime64("2024-01-01"))}, [ROWS], "datetime64", id="dates"),
        pytest.param({"x": numbers(2, 3)}, [spec(None, 3, dtype="int64")], "takes int64", id="floats for integers"),
        pytest.param(
            {"x": np.ones((2, 3), dtype=np.int64)}, [spec(None, 3, dtype="int32")], "int64", id="narrowing integers"
        ),
        pytest.param(
            {"x": np.ones((2, 3), dtype=np.uint64)}, [spec(None, 3, dtype="int64")], "uint64", id="unsigned to signed"
        ),
        pytest.param({"x": [[np.nan, 1, np.nan]]}, [ROWS], "2 NaN and 0 infinite", id="NaN"),
        pytest.param({"x": np.array([[np.inf, 1, -np.inf]], dtype="f4")}, [ROWS], "0 NaN and 2 infinite", id="inf"),
        pytest.param({"x": [[1e300, 1.0, 0.0]]}, [ROWS], "1 infinite", id="too large for float32"),
        pytest.param({"x": numbers(2, 3), "y": [1]}, [ROWS], "2 samples and 1 labels", id="too few labels"),
        pytest.param({"x": numbers(2, 3), "y": np.eye(2, dtype=int)}, [ROWS], "labels", id="one-hot labels"),
        pytest.param({"x": numbers(2, 3), "y": 1}, [ROWS], "labels", id="scalar labels"),
        pytest.param({"x": numbers(2, 3), "y": ["a", "b"]}, [ROWS], "labels", id="text labels"),
        pytest.param({"x": numbers(2, 3), "y": [0.0, 1.0]}, [ROWS], "labels", id="float labels"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, Any], inputs: list[InputSpec], told: str
) -> None:
    path = npz(tmp_path / "d.npz", **arrays)
    with warnings.catch_warnings(record=True) as warned, pytest.raises(DataError) as caught:
        everything(open_dataset(path, inputs))
    assert not warned  # each would be one more line on the user's terminal
    assert told in str(caught.value)
    assert "d.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "how"),
    [
        pytest.param(numbers(2, 4, 5, 3), Preprocess(mean=(1.0, 2.0), layout="NCHW"), id="two means, three channels"),
        pytest.param(numbers(2, 3, 4, 5), Preprocess(mean=(1.0, 2.0, 3.0)), id="a mean per channel, axes unknown"),
        pytest.param(numbers(2, 3, 4, 5), Preprocess(std=(1.0, 2.0)), id="two deviations"),
        pytest.param(numbers(2, 60), Preprocess(layout="NCHW"), id="a layout for rows"),
        pytest.param(np.full((2, 3, 4, 5), "a"), Preprocess(scale=2.0), id="text"),
        pytest.param(numbers(2, 3, 4, 5), Preprocess(scale=1e300), id="a scale that is too large"),
        pytest.param(numbers(2, 3, 4, 5), Preprocess(layout="NCHW"), id="channels already first"),
    ],
)
def test_preprocessing_that_does_not_fit_the_arrays_is_refused(tmp_path: Path, stored: Array, how: Preprocess) -> None:
    with pytest.raises(DataError):
        everything(open_dataset(npz(tmp_path / "d.npz", x=stored), [IMAGES], how))


@pytest.mark.parametrize("kind", ["npz", "npy", "labels"])
def test_pickles_are_never_loaded(tmp_path: Path, kind: str) -> None:
    hatched, data, labels = tmp_path / "hatched", tmp_path / f"d.{'npy' if kind == 'npy' else 'npz'}", None
    objects = np.array([Canary(hatched), None], dtype=object)
    if kind == "npz":
        npz(data, x=objects)
    elif kind == "npy":
        npy(data, objects)
    else:
        npz(data, x=numbers(2, 3))
        labels = npy(tmp_path / "l.npy", objects)
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(data, [ROWS], labels=labels)
    assert not hatched.exists()


def as_npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def as_npy(values: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def with_an_unknown_compression() -> bytes:
    data = bytearray(as_npz(x=numbers(2, 3)))
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        data[data.index(signature) + offset] = 77
    return bytes(data)


def damaged(data: bytes, first: int, last: int) -> bytes:
    return data[:first] + bytes(byte ^ 0x5A for byte in data[first:last]) + data[last:]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.npz", b"hello\n"),
        ("text.npy", b"hello\n"),
        ("empty.npz", b""),
        ("empty.npy", b""),
        ("npy.npz", as_npy(numbers(2, 3))),
        ("npz.npy", as_npz(x=numbers(2, 3))),
        ("compression.npz", with_an_unknown_compression()),
        ("header.npy", as_npy(numbers(2, 3)).replace(b")", b" ")),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        everything(open_dataset(tmp_path / name, [ROWS]))
    assert name in str(caught.value)


def test_members_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x", b"hello")
    with pytest.raises(DataError, match=r"d\.npz"):
        everything(open_dataset(tmp_path / "d.npz", [ROWS]))


@pytest.mark.parametrize(("kind", "content"), [("npz", as_npz(x=numbers(8, 3))), ("npy", as_npy(numbers(8, 3)))])
def test_files_cut_anywhere_are_refused(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"cut.{kind}"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError):
            open_dataset(path, [ROWS])


def test_damaged_archives_are_read_or_refused(tmp_path: Path) -> None:
    content, path = as_npz(x=numbers(8, 3)), tmp_path / "d.npz"
    refused = 0
    for position in range(len(content)):
        path.write_bytes(damaged(content, position, position + 1))
        try:
            everything(open_dataset(path, [ROWS]))
        except DataError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("d.npy", as_npy(numbers(2, 3)), "inputs x, z"),
        ("d.parquet", b"1,2,3\n", "not a kind of data"),
        ("d", b"", "not a kind of data"),
        ("d.npz", None, "no data at"),
        ("folder.npz/d", None, "no data at"),
    ],
)
def test_paths_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        open_dataset(tmp_path / name, [ROWS, spec(None, 3, name="z")])


def test_arrays_have_no_splits_and_no_csv(tmp_path: Path) -> None:
    data, table = npz(tmp_path / "d.npz", x=numbers(1, 3)), tmp_path / "l.csv"
    table.write_text("file,label\nx,1\n")
    with pytest.raises(DataError, match="no splits"):
        open_dataset(data, [ROWS], split="val")
    with pytest.raises(DataError, match=r"not an \.npy file"):
        open_dataset(data, [ROWS], labels=table)


# ---- folders of images ---------------------------------------------------------------------------------------------------------


def photo(path: Path, values: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def photos(folder: Path, *names: str, shape: tuple[int, ...] = (4, 5, 3)) -> list[NDArray[np.uint8]]:
    """Write one image per name and return their pixels in the order of the names given."""
    values = pixels(len(names), *shape)
    for name, image in zip(names, values, strict=True):
        photo(folder / name, image)
    return list(values)


def channels_first(*images: Array, scale: float = 1 / 255) -> Array:
    return np.stack([normalized_exactly(image, scale, [0.0], [1.0]).transpose(2, 0, 1) for image in images])


def test_class_folders_are_labels(tmp_path: Path) -> None:
    cat, dog, fox = photos(tmp_path / "d", "b/2.png", "a/deep/3.PNG", "b/1.bmp")
    (tmp_path / "d" / "b" / "notes.txt").write_text("no image")
    dataset = open_dataset(tmp_path / "d", [IMAGES])
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1]  # a/deep/3.PNG, b/1.bmp, b/2.png
    given = everything(dataset)["x"]
    np.testing.assert_array_equal(given, channels_first(dog, fox, cat), strict=True)
    np.testing.assert_array_equal(dataset.read(np.array([2, 0]))["x"], given[[2, 0]], strict=True)


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("1.png", "a/2.png")])
def test_without_class_folders_there_are_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    photos(tmp_path, *names)
    dataset = open_dataset(tmp_path, [IMAGES])
    assert len(dataset) == 2
    assert dataset.labels is None


TABLE = "file,label,split\nb.png,7,val\nsub/c.png,2,train\na.png,5,val\n"


@pytest.mark.parametrize(
    ("split", "labels", "order"), [(None, [7, 2, 5], [1, 2, 0]), ("val", [7, 5], [1, 0]), ("train", [2], [2])]
)
def test_a_csv_names_files_and_labels(tmp_path: Path, split: str | None, labels: list[int], order: list[int]) -> None:
    images = photos(tmp_path / "d", "a.png", "b.png", "sub/c.png", "unnamed.png")
    (tmp_path / "l.csv").write_text(TABLE)
    dataset = open_dataset(tmp_path / "d", [IMAGES], labels=tmp_path / "l.csv", split=split)
    assert dataset.labels is not None
    assert dataset.labels.tolist() == labels
    np.testing.assert_array_equal(everything(dataset)["x"], channels_first(*(images[i] for i in order)), strict=True)


@pytest.mark.parametrize(
    ("table", "split", "told"),
    [
        pytest.param("file,label\n../x.png,1\n", None, "not under", id="outside"),
        pytest.param("file,label\nlink.png,1\n", None, "not under", id="outside by a link"),
        pytest.param("file,label\n/etc/passwd,1\n", None, "not under", id="absolute"),
        pytest.param("file,label\nmissing.png,1\n", None, "missing.png", id="no such file"),
        pytest.param("file,label\n.,1\n", None, "not under", id="the folder itself"),
        pytest.param("file,label\na.png,cat\n", None, "not an integer", id="a name for a label"),
        pytest.param("file,label\na.png,1.0\n", None, "not an integer", id="a real label"),
        pytest.param("file,label\na.png\n", None, "l.csv", id="a row cut short"),
        pytest.param("label,file\n1\n", None, "l.csv", id="a row without its file"),
        pytest.param("file,label\na.png,99999999999999999999\n", None, "l.csv", id="a label beyond int64"),
        pytest.param("name,label\na.png,1\n", None, "file, label", id="no column file"),
        pytest.param("file,class\na.png,1\n", None, "file, label", id="no column label"),
        pytest.param("file,label\na.png,1\n", "val", "split", id="no column split"),
        pytest.param("file,label,split\na.png,1,train\n", "val", "'val'", id="no row of the split"),
        pytest.param("file,label\n", None, "lacks rows", id="no rows"),
        pytest.param("", None, "lacks rows", id="nothing"),
        pytest.param("file,label\n\xff.png,1\n", None, "l.csv", id="not UTF-8"),
    ],
)
def test_a_csv_that_does_not_fit_the_folder_is_refused(
    tmp_path: Path, table: str, split: str | None, told: str
) -> None:
    photos(tmp_path, "d/a.png", "x.png")
    (tmp_path / "d" / "link.png").symlink_to(tmp_path / "x.png")
    (tmp_path / "l.csv").write_bytes(table.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "d", [IMAGES], labels=tmp_path / "l.csv", split=split)
    assert told in str(caught.value)


def test_a_csv_may_name_files_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (image,) = photos(tmp_path / "d", "a.png")
    (tmp_path / "l.csv").write_text(f"file,label\n{tmp_path / 'd' / 'a.png'},1\n")
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset(Path("d"), [IMAGES], labels=Path("l.csv"))
    np.testing.assert_array_equal(everything(dataset)["x"], channels_first(image), strict=True)


@pytest.mark.parametrize(
    ("inputs", "how", "split", "told"),
    [
        pytest.param([spec(None, 5, 4, 6)], Preprocess(), None, "does not show", id="no channels to be seen"),
        pytest.param([spec(None, 3, 4, 3)], Preprocess(), None, "does not show", id="channels on both sides"),
        pytest.param([spec(None, None, None, None)], Preprocess(), None, "does not show", id="all free"),
        pytest.param([spec(None, 60)], Preprocess(), None, "not a batch of images", id="rows"),
        pytest.param([spec(None, 60)], Preprocess(layout="NCHW"), None, "'x'", id="rows with a layout"),
        pytest.param(
            [IMAGES, spec(None, 3, 4, 5, name="z")], Preprocess(), None, "single float input", id="two inputs"
        ),
        pytest.param([spec(None, 3, 4, 5, dtype="uint8")], Preprocess(), None, "single float input", id="integers"),
        pytest.param([IMAGES], Preprocess(), "val", "--labels", id="a split without labels"),
        pytest.param(
            [spec(None, 4, 4, 5)], Preprocess(layout="NCHW"), None, "takes shape [?, 4, 4, 5]", id="four channels"
        ),
        pytest.param([IMAGES], Preprocess(color="L"), None, "takes shape", id="gray for a model of colors"),
        pytest.param([IMAGES], Preprocess(size=2), None, "takes shape", id="another size than the model's"),
        pytest.param([IMAGES], Preprocess(crop=9), None, "crop of 9x9", id="a crop larger than the image"),
        pytest.param([IMAGES], Preprocess(mean=(1.0, 2.0)), None, "", id="two means for three channels"),
    ],
)
def test_a_folder_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, inputs: list[InputSpec], how: Preprocess, split: str | None, told: str
) -> None:
    photos(tmp_path, "a.png")
    with pytest.raises(DataError) as caught:
        everything(open_dataset(tmp_path, inputs, how, split=split))
    assert told in str(caught.value)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_dataset(tmp_path, [IMAGES])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tif", "ppm", "webp"])
def test_images_cut_short_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = photo(tmp_path / f"a.{suffix}", pixels(4, 5, 3))
    content = path.read_bytes()
    refused = []
    for length in range(0, len(content), max(1, len(content) // 60)):
        path.write_bytes(content[:length])
        try:
            everything(open_dataset(tmp_path, [IMAGES]))
        except DataError as error:
            refused.append(str(error))
    assert refused
    assert all(path.name in line for line in refused)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["png", "gif", "tif"])
def test_damaged_images_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = photo(tmp_path / f"a.{suffix}", pixels(4, 5, 3))
    content = path.read_bytes()
    refused = 0
    for position in range(min(len(content), 400)):
        path.write_bytes(damaged(content, position, position + 1))
        try:
            everything(open_dataset(tmp_path, [IMAGES]))
        except DataError:
            refused += 1
    assert refused > 0


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path, "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)  # 20 pixels are more than twice as many
    with pytest.raises(DataError, match=r"bomb\.png"):
        everything(open_dataset(tmp_path, [IMAGES]))


def bilinear(image: Array, height: int, width: int) -> Array:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        pytest.param(Preprocess(), lambda p: bilinear(p, 4, 5), id="the model's size"),
        pytest.param(Preprocess(size=(4, 5)), lambda p: bilinear(p, 4, 5), id="height and width"),
        pytest.param(Preprocess(crop=(4, 5)), lambda p: p[3:7, 7:12], id="a crop alone"),
        pytest.param(Preprocess(size=5, crop=(4, 5)), lambda p: bilinear(p, 5, 10)[:4, 2:7], id="shorter side"),
        pytest.param(Preprocess(size=(6, 7), crop=(4, 5)), lambda p: bilinear(p, 6, 7)[1:5, 1:6], id="pair and crop"),
    ],
)
def test_images_are_resized_and_cropped(tmp_path: Path, how: Preprocess, expected: Callable[[Array], Array]) -> None:
    (image,) = photos(tmp_path, "a.png", shape=(10, 20, 3))
    given = everything(open_dataset(tmp_path, [IMAGES], how))["x"]
    np.testing.assert_array_equal(given, channels_first(expected(image)), strict=True)


@pytest.mark.parametrize(("shape", "expected"), [((10, 21), (5, 10)), ((21, 10), (10, 5)), ((10, 10), (5, 5))])
def test_one_number_sizes_the_shorter_side(tmp_path: Path, shape: tuple[int, int], expected: tuple[int, int]) -> None:
    photos(tmp_path, "a.png", shape=(*shape, 3))
    given = everything(open_dataset(tmp_path, [spec(None, 3, None, None)], Preprocess(size=5)))["x"]
    assert given.shape == (1, 3, *expected)


def test_a_square_crop_takes_one_number(tmp_path: Path) -> None:
    (image,) = photos(tmp_path, "a.png", shape=(7, 9, 3))
    given = everything(open_dataset(tmp_path, [spec(None, 3, 5, 5)], Preprocess(crop=5)))["x"]
    np.testing.assert_array_equal(given, channels_first(image[1:6, 2:7]), strict=True)


def test_images_of_different_sizes_need_one(tmp_path: Path) -> None:
    photo(tmp_path / "a.png", pixels(4, 5, 3))
    photo(tmp_path / "b.png", pixels(5, 4, 3))
    free = spec(None, 3, None, None)
    with pytest.raises(DataError, match="differ in size"):
        everything(open_dataset(tmp_path, [free]))
    assert everything(open_dataset(tmp_path, [free], Preprocess(size=(4, 4))))["x"].shape == (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("shape", "layout", "channels_last"),
    [
        ((None, 3, 6, 5), None, False),
        ((None, 6, 5, 3), None, True),
        ((1, 3, None, None), None, False),
        ((None, None, None, 3), None, True),
        ((None, 3, 4, 3), "NCHW", False),
        ((None, 4, 3, 3), "NHWC", True),
        ((None, None, None, None), "NHWC", True),
    ],
)
def test_the_layout_is_seen_or_said(
    tmp_path: Path, shape: tuple[int | None, ...], layout: Any, channels_last: bool
) -> None:
    size = (4, 3) if shape.count(3) == 2 else (6, 5)
    (image,) = photos(tmp_path, "a.png", shape=(*size, 3))
    given = everything(open_dataset(tmp_path, [spec(*shape)], Preprocess(layout=layout)))["x"]
    expected = channels_first(image)
    np.testing.assert_array_equal(given, expected.transpose(0, 2, 3, 1) if channels_last else expected, strict=True)


def test_gray_models_get_gray_images(tmp_path: Path) -> None:
    gray, color = pixels(4, 5), pixels(4, 5, 3)
    photo(tmp_path / "a.png", gray)
    photo(tmp_path / "b.png", color)
    luma = np.asarray(Image.fromarray(color).convert("L"))
    expected = channels_first(gray[..., None], luma[..., None])
    given = everything(open_dataset(tmp_path, [spec(None, 1, 4, 5)]))["x"]
    np.testing.assert_array_equal(given, expected, strict=True)
    said = everything(open_dataset(tmp_path, [spec(None, None, 4, 5)], Preprocess(color="L", layout="NCHW")))["x"]
    np.testing.assert_array_equal(said, expected, strict=True)


def test_color_models_get_gray_images_in_three_channels(tmp_path: Path) -> None:
    gray = pixels(4, 5)
    photo(tmp_path / "a.png", gray)
    given = everything(open_dataset(tmp_path, [IMAGES]))["x"]
    np.testing.assert_array_equal(given, channels_first(np.repeat(gray[..., None], 3, axis=2)), strict=True)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_bgr_turns_the_channels_after_normalizing(tmp_path: Path, layout: Any) -> None:
    (image,) = photos(tmp_path, "a.png")
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)  # of red, green, blue
    wanted = IMAGES if layout == "NCHW" else spec(None, 4, 5, 3)
    how = Preprocess(mean=mean, std=std, color="BGR", layout=layout)
    given = everything(open_dataset(tmp_path, [wanted], how))["x"]
    x = normalized_exactly(image, 1 / 255, list(mean), list(std))[None, ..., ::-1]
    np.testing.assert_array_equal(given, x.transpose(0, 3, 1, 2) if layout == "NCHW" else x, strict=True)


def test_a_given_scale_goes_before_the_default(tmp_path: Path) -> None:
    (image,) = photos(tmp_path, "a.png")
    given = everything(open_dataset(tmp_path, [IMAGES], Preprocess(scale=1.0)))["x"]
    np.testing.assert_array_equal(given, channels_first(image, scale=1.0), strict=True)


def test_sixteen_bit_images_are_not_clipped_in_silence(tmp_path: Path) -> None:
    deep = (np.arange(20, dtype=np.uint16) * 3000).reshape(4, 5)  # 0 … 57000 of 65535
    photo(tmp_path / "a.png", deep)
    try:
        given = everything(open_dataset(tmp_path, [spec(None, 1, 4, 5)]))["x"]
    except DataError:
        return  # refused aloud
    # Eight of the sixteen bits remain: a value is off by one step of 255 at most.
    assert np.abs(given[0, 0] - deep / 65535).max() <= 1 / 255 + U


def test_the_digest_follows_names_and_bytes_of_images(tmp_path: Path) -> None:
    photos(tmp_path, "a.png", "b.png")

    def digest() -> str:
        return open_dataset(tmp_path, [IMAGES]).digest

    first = digest()
    assert digest() == first
    (tmp_path / "note.txt").write_text("no image")
    assert digest() == first
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    second = digest()
    photo(tmp_path / "c.png", np.zeros((4, 5, 3), dtype=np.uint8))
    assert len({first, second, digest()}) == 3


@pytest.mark.parametrize("field", [{"mean": ()}, {"std": ()}, {"std": (1.0, 0.0)}])
def test_preprocessing_without_meaning_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="std"):
        Preprocess(**field)


# ---- which samples, in which batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), list(range(50))),
        (Selection(samples=50), list(range(50))),
        (Selection(samples=5, shuffle=False), list(range(5))),
        (Selection(samples=5, shuffle=False, seed=3), list(range(5))),
    ],
)
def test_samples_come_in_order_unless_a_part_is_drawn(selection: Selection, expected: list[int]) -> None:
    assert select(50, selection).tolist() == expected


def test_a_part_is_drawn_at_random_by_its_seed() -> None:
    drawn = {seed: select(50, Selection(samples=20, seed=seed)).tolist() for seed in range(3)}
    for seed, indices in drawn.items():
        assert len(set(indices)) == 20
        assert set(indices) <= set(range(50))
        assert indices != sorted(indices)
        assert max(indices) >= 20  # from everywhere, not from the front
        assert select(50, Selection(samples=20, shuffle=True, seed=seed)).tolist() == indices
    assert len({tuple(indices) for indices in drawn.values()}) == 3


def test_all_samples_are_shuffled_where_it_is_asked_for() -> None:
    indices = select(50, Selection(shuffle=True)).tolist()
    assert sorted(indices) == list(range(50))
    assert indices != list(range(50))


@pytest.mark.parametrize(
    ("samples", "told"), [(51, "51 samples were asked for and the data holds 50"), (0, "no sample")]
)
def test_more_or_fewer_samples_than_there_are_are_refused(samples: int, told: str) -> None:
    with pytest.raises(DataError, match=told):
        select(50, Selection(samples=samples))


@pytest.mark.parametrize(("size", "expected"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_batches_cover_the_samples_in_order(tmp_path: Path, size: int, expected: list[int]) -> None:
    x, order = numbers(8, 3), np.array([7, 1, 2, 0, 5])
    dataset = open_dataset(npy(tmp_path / "d.npy", x), [ROWS])
    given = [batch["x"] for batch in batches(dataset, order, size)]
    assert [len(values) for values in given] == expected
    np.testing.assert_array_equal(np.concatenate(given), x[order], strict=True)


@pytest.mark.parametrize(
    ("sizes", "wanted", "expected"),
    [
        ([None], None, 32),
        ([None], 7, 7),
        ([4], None, 4),
        ([4], 4, 4),
        ([None, 4], None, 4),
        ([4, 4], None, 4),
    ],
)
def test_the_model_fixes_its_batch(sizes: list[int | None], wanted: int | None, expected: int) -> None:
    assert fitted_batch(tuple(spec(size, 3) for size in sizes), wanted) == expected


def test_another_batch_than_the_models_is_refused() -> None:
    with pytest.raises(DataError, match="batches of 4, not of 5"):
        fitted_batch((spec(4, 3),), 5)


@pytest.mark.parametrize(
    "wishes", [{"scale": math.inf}, {"mean": (0.0, math.nan)}, {"std": (-math.inf,)}, {"std": (1.0, 0.0)}]
)
def test_what_no_pixel_can_be_multiplied_with_is_refused(wishes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"finite numbers|no std is 0"):
        Preprocess(**wishes)
