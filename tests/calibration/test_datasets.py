"""The readers of arrays: what they give and what they refuse."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.datasets import InputSpec, Preprocess, open_dataset
from calibration.errors import DataError
from tests.calibration.samples import (
    IMAGES,
    ROWS,
    Array,
    Canary,
    U,
    damaged,
    everything,
    normalized_exactly,
    npy,
    npz,
    numbers,
    pixels,
    spec,
)


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


def test_labels_alone_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data but 'y', which are the labels"):
        open_dataset(npz(tmp_path / "d.npz", y=numbers(4, 3)), [ROWS])


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
