"""Readers of data that is not a plain array in memory: what they give, what they refuse, and that they hold none of it."""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from calibration.datasets import Dataset, InputSpec, Preprocess, batches, boundaries, open_dataset
from calibration.datasets.stored import Spool, StoredArray, npy_at, npz_members, runs
from calibration.errors import DataError

Array = NDArray[Any]
X = InputSpec("x", np.dtype("float32"), (None, 3))
IDS = InputSpec("ids", np.dtype("int64"), (None, None))
ROWS = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)


def everything(dataset: Dataset) -> dict[str, Array]:
    return dataset.read(np.arange(len(dataset), dtype=np.intp))


def tensor(path: Path, values: Array) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(onnx.numpy_helper.from_array(values).SerializeToString())


# ---- rows from files -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 29), max_size=40), st.sampled_from(["<f4", ">f4", "<i8", "|u1", "<f2"]))
def test_stored_rows_are_what_indexing_gives(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int], dtype: str
) -> None:
    values = np.arange(30 * 2 * 3).reshape(30, 2, 3).astype(dtype)
    path = tmp_path_factory.getbasetemp() / f"rows{dtype[1:]}{dtype[0] == '>'}.npy"
    np.save(path, values)
    stored = npy_at(path, 0, path.stat().st_size)
    assert isinstance(stored, StoredArray)
    found = stored[np.array(indices, dtype=np.intp)]
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, values[indices])


def test_runs_are_read_at_once() -> None:
    assert list(runs(np.array([4, 5, 6, 2, 3, 9]))) == [(4, 3, 0), (2, 2, 3), (9, 1, 5)]
    assert list(runs(np.array([], dtype=np.intp))) == []


KINDS: dict[str, Callable[[Path, Array], object]] = {
    "a.npz": lambda path, x: np.savez(path, x=x),
    "b.npz": lambda path, x: np.savez_compressed(path, x=x),
    "a.npy": np.save,
    "fortran.npy": lambda path, x: np.save(path, np.asfortranarray(x)),
    "a.safetensors": lambda path, x: save_file({"x": x}, path),
    "a.pt": lambda path, x: torch.save({"x": torch.from_numpy(x)}, path),
    "b.pth": lambda path, x: torch.save(torch.from_numpy(x), path),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_same_array_is_the_same_data_in_every_file(tmp_path: Path, name: str) -> None:
    KINDS[name](tmp_path / name, ROWS)
    dataset = open_dataset(tmp_path / name, [X])
    np.save(tmp_path / "reference.npy", ROWS)
    assert dataset.digest == open_dataset(tmp_path / "reference.npy", [X]).digest
    assert not dataset.synthetic
    drawn = dataset.read(np.array([5, 0, 1, 5], dtype=np.intp))["x"]
    np.testing.assert_array_equal(drawn, ROWS[[5, 0, 1, 5]], strict=True)


@pytest.mark.parametrize("compressed", [False, True])
def test_reading_holds_a_batch_and_not_the_data(tmp_path: Path, compressed: bool) -> None:
    values = np.random.default_rng(0).normal(size=(4000, 3000)).astype(np.float32)  # 48 MB
    (np.savez_compressed if compressed else np.savez)(tmp_path / "d.npz", x=values)
    del values
    gc.collect()
    tracemalloc.start()
    dataset = open_dataset(tmp_path / "d.npz", [InputSpec("x", np.dtype("float32"), (None, 3000))])
    rows = sum(len(feeds["x"]) for feeds in batches(dataset, np.arange(len(dataset), dtype=np.intp), 50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 4000
    assert peak < 20 << 20


def test_temporary_files_go_with_their_data(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "d.npz", x=ROWS)
    members = npz_members(tmp_path / "d.npz")
    held = members["x"]
    assert isinstance(held, StoredArray)
    path = held.path
    assert path.exists()
    del members, held
    gc.collect()
    assert not path.exists()
    spool = Spool()
    spool.append(ROWS[0])
    spool.finish()
    path = spool.file
    assert path.exists()
    del spool
    gc.collect()
    assert not path.exists()


def test_bfloat16_is_widened(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.25, 3.0]], dtype=torch.bfloat16)
    save_torch_file({"x": values}, tmp_path / "d.safetensors")
    torch.save(values, tmp_path / "d.pt")
    for name in ("d.safetensors", "d.pt"):
        assert everything(open_dataset(tmp_path / name, [X]))["x"].tolist() == [[1.5, -2.25, 3.0]]


def test_labels_stand_beside_tensors(tmp_path: Path) -> None:
    save_file({"x": ROWS, "labels": np.arange(7)}, tmp_path / "d.safetensors")
    labels = open_dataset(tmp_path / "d.safetensors", [X]).labels
    assert labels is not None
    assert labels.tolist() == list(range(7))


# ---- text ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "a,b,c\n", "\ufeffx.0,x.1,x.2\n"])
def test_a_table_has_a_sample_a_row(tmp_path: Path, header: str) -> None:
    (tmp_path / "d.csv").write_text(header + "1,2.5,-3\n\n4,5,6e-3\n", encoding="utf-8")
    dataset = open_dataset(tmp_path / "d.csv", [X])
    assert everything(dataset)["x"].tolist() == np.array([[1, 2.5, -3], [4, 5, 6e-3]], np.float32).tolist()
    assert dataset.labels is None


def test_a_table_names_inputs_and_labels(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("ids.1,label,x.0,ids.0,x.2,x.1\n11,3,0.5,10,2.5,1.5\n21,4,0,20,2,1\n")
    dataset = open_dataset(tmp_path / "d.csv", [X, IDS])
    found = everything(dataset)
    assert found["x"].tolist() == [[0.5, 1.5, 2.5], [0.0, 1.0, 2.0]]
    assert found["ids"].tolist() == [[10, 11], [20, 21]]
    assert found["ids"].dtype == np.int64
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [3, 4]


def test_a_table_fills_an_image(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(",".join(map(str, range(12))) + "\n")
    spec = InputSpec("x", np.dtype("float32"), (None, 3, 2, 2))
    assert (everything(open_dataset(tmp_path / "d.csv", [spec]))["x"] == np.arange(12).reshape(1, 3, 2, 2)).all()


def test_lines_may_differ_in_length(tmp_path: Path) -> None:
    lengths = [2, 2, 3, 3, 3, 2]
    rows = [{"ids": list(range(n)), "label": n} for n in lengths]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    dataset = open_dataset(tmp_path / "d.jsonl", [IDS])
    indices = np.arange(6, dtype=np.intp)
    assert boundaries(dataset, indices, 2) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert boundaries(dataset, indices, 2, fixed=True) == [(0, 2), (2, 4)]
    assert [feeds["ids"].shape for feeds in batches(dataset, indices, 4)] == [(2, 2), (3, 3), (1, 2)]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == lengths


def test_bare_lists_are_the_only_input(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("[1, 2, 3]\n[4, 5, 6.5]\n")
    assert everything(open_dataset(tmp_path / "d.jsonl", [X]))["x"].tolist() == [[1, 2, 3], [4, 5, 6.5]]


# ---- ONNX test data, functions, random samples ---------------------------------------------------------------------------------


def test_test_data_sets_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, rows in ((10, ROWS[4:7]), (2, ROWS[1:4]), (0, ROWS[:1])):
        tensor(tmp_path / f"test_data_set_{number}" / "input_0.pb", rows)
        tensor(tmp_path / f"test_data_set_{number}" / "input_1.pb", np.full((len(rows), number + 1), number))
    dataset = open_dataset(tmp_path, [X, IDS])
    found = [
        dataset.read(np.arange(a, b, dtype=np.intp)) for a, b in boundaries(dataset, np.arange(7, dtype=np.intp), 8)
    ]
    assert (np.concatenate([feeds["x"] for feeds in found]) == ROWS).all()
    assert [feeds["ids"].shape for feeds in found] == [(1, 1), (3, 3), (3, 11)]
    one = open_dataset(tmp_path / "test_data_set_2", [X, IDS])
    assert (everything(one)["x"] == ROWS[1:4]).all()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "drawn_here.py").write_text(
        "import numpy as np\nROWS = np.arange(21, dtype=np.float32).reshape(7, 3)\n"
        "def batches():\n    yield {'x': ROWS[:4]}\n    yield {'x': ROWS[4]}\n    yield ROWS[5:]\n"
        "def fails():\n    yield {'x': ROWS}\n    raise RuntimeError('no more\\nand more')\n"
        "def other():\n    return [{'y': ROWS}]\ndef texts():\n    return [{'x': np.array(['a'])}]\nnumber = 3\n"
        "def doubles():\n    return [{'x': ROWS}, {'x': ROWS.astype(np.float64)}]\ndef nothing():\n    return []\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "drawn_here", raising=False)
    return tmp_path


def test_a_function_yields_batches_and_samples(module: Path) -> None:
    del module
    dataset = open_dataset(None, [X], function="drawn_here:batches")
    assert everything(dataset)["x"].tolist() == np.arange(21).reshape(7, 3).tolist()


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("drawn_here:fails", "RuntimeError: no more"),
        ("drawn_here:other", "holds 'y', which is no input"),
        ("drawn_here:texts", "give numbers"),
        ("drawn_here:number", "cannot be called"),
        ("drawn_here:absent", "cannot be called"),
        ("drawn_here:doubles", "a sample is float64"),
        ("drawn_here:nothing", "holds no samples"),
        ("drawn_here", "names no function"),
        ("not_there_at_all:f", "cannot be called"),
    ],
)
def test_functions_that_do_not_do_it_are_named(module: Path, function: str, told: str) -> None:
    del module
    with pytest.raises(DataError) as caught:
        open_dataset(None, [X], function=function)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_samples_depend_on_seed_and_number_alone() -> None:
    one, two, other = (open_dataset(None, [X, IDS], synthetic=n, seed=s) for n, s in ((9, 1), (9, 1), (9, 2)))
    assert one.synthetic
    assert one.digest == two.digest != other.digest
    whole = everything(one)
    assert whole["ids"].tolist() == [[0]] * 9
    assert (two.read(np.array([4, 2], dtype=np.intp))["x"] == whole["x"][[4, 2]]).all()
    assert (everything(other)["x"] != whole["x"]).any()
    assert len(np.unique(whole["x"])) == 27


@pytest.mark.parametrize("places", [{}, {"function": "a:b", "synthetic": 3}])
def test_data_comes_from_one_place(places: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="exactly one place"):
        open_dataset(None, [X], **places)


# ---- what is refused -----------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, bytes, str]] = {
    "a word in a table": ("d.csv", b"1,2,3\n4,five,6\n", "line 2, column 2: 'five' is no number"),
    "a short row": ("d.csv", b"1,2,3\n4,5\n", "line 2, has 2 columns, not 3"),
    "too few columns": ("d.csv", b"1,2\n3,4\n", "has 2 columns for input 'x'"),
    "an empty table": ("d.csv", b"", "holds no samples"),
    "a header alone": ("d.csv", b"a,b,c\n", "holds no samples"),
    "a table that is no text": ("d.csv", b"\xff\xfe\x00\x01", "cannot be read as CSV"),
    "a label that is a fraction": ("d.csv", b"a,b,c,label\n1,2,3,0.5\n", "the label 0.5 is no integer"),
    "NaN in a table": ("d.csv", b"1,2,nan\n", "1 NaN"),
    "no JSON": ("d.jsonl", b"{'x': 1}\n", "line 1, is no JSON"),
    "a number a line": ("d.jsonl", b"3\n", "neither an object nor a list"),
    "another input": ("d.jsonl", b'{"z": [1, 2, 3]}\n', "holds 'z', which is no input"),
    "rows of unequal length": ("d.jsonl", b'{"x": [[1], [1, 2]]}\n', "line 1, input 'x'"),
    "a text for numbers": ("d.jsonl", b'{"x": ["a", "b", "c"]}\n', "not all of it is numbers"),
    "another shape": ("d.jsonl", b"[1, 2]\n", "takes shape [?, 3]"),
    "labels for some": ("d.jsonl", b'{"x": [1,2,3], "label": 1}\n{"x": [1,2,3]}\n', "labels for 1 of 2"),
    "a label that is a text": ("d.jsonl", b'{"x": [1,2,3], "label": "a"}\n', "is no integer"),
    "nothing": ("d.jsonl", b"\n", "holds no samples"),
    "no safetensors": ("d.safetensors", b"\x00" * 20, "cannot be read as .safetensors"),
    "safetensors cut short": ("d.safetensors", b"\xff" * 8, "cut short"),
    "no tensors": ("d.pt", b"hello", "holds no tensors"),
    "another kind": ("d.xlsx", b"", "not a kind of data"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_used_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, content, told = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        everything(open_dataset(tmp_path / file, [X]))
    assert told in str(caught.value)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_needed_for_indices(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"ids": [1.0, 2.0]}\n')
    assert everything(open_dataset(tmp_path / "d.jsonl", [IDS]))["ids"].tolist() == [[1, 2]]
    (tmp_path / "d.jsonl").write_text('{"ids": [1.5]}\n')
    with pytest.raises(DataError, match="there are fractions"):
        open_dataset(tmp_path / "d.jsonl", [IDS])


def test_torch_files_of_other_things_are_refused(tmp_path: Path) -> None:
    torch.save({"x": 3}, tmp_path / "d.pt")
    with pytest.raises(DataError, match="not tensors"):
        open_dataset(tmp_path / "d.pt", [X])
    torch.save([{"x": torch.ones(2, 3)}, torch.ones(3)], tmp_path / "d.pt")
    assert everything(open_dataset(tmp_path / "d.pt", [X]))["x"].tolist() == [[1, 1, 1]] * 3


def test_test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tensor(tmp_path / "test_data_set_0" / "input_0.pb", ROWS)
    with pytest.raises(DataError, match="holds 1 inputs and the model takes 2"):
        open_dataset(tmp_path, [X, IDS])
    tensor(tmp_path / "test_data_set_0" / "input_1.pb", np.zeros((3, 2), np.int64))
    with pytest.raises(DataError, match="do not share their first axis"):
        open_dataset(tmp_path, [X, IDS])
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match="holds no tensor"):
        open_dataset(tmp_path, [X, IDS])


def test_what_is_not_finite_passes_where_it_may(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,nan,inf\n")
    found = everything(open_dataset(tmp_path / "d.csv", [X], allow_non_finite=True))["x"]
    assert np.isnan(found[0, 1])
    assert np.isinf(found[0, 2])


# ---- the finer points of every kind --------------------------------------------------------------------------------------------

Y = InputSpec("y", np.dtype("float32"), (None, 1))
BYTES = InputSpec("x", np.dtype("uint8"), (None, 3))
FLAGS = InputSpec("x", np.dtype("bool"), (None, 3))
WHOLE = InputSpec("x", np.dtype("int64"), (None, 3))


@pytest.mark.parametrize(
    ("text", "inputs", "told"),
    [
        ("1,two,3\n4,5,6\n", [X], "line 1, column 2: 'two' is no number"),
        ("1,,3\n4,5,6\n", [X], "line 1, column 2: '' is no number"),
        ("1_0,2,3\n", [X], "line 1, column 1: '1_0' is no number"),
        ("a,b,c\n1,2,3\n4,5,\n", [X], "line 3, column 3: '' is no number"),
        ("x.0,x.1,x.3\n1,2,3\n", [X], "lacks the column 'x.2'"),
        ("x.0,x.1,x.1\n1,2,3\n", [X], "column 'x.1', which is no input's, or there twice"),
        ("x.0,x.1,x.2,z\n1,2,3,4\n", [X, Y], "column 'z', which is no input's"),
        ("1,2,3,4\n", [X, Y], "add a header"),
        ("a,b,y\n1,2,3\n", [X], "has 2 columns for input 'x' beside the label, 'y'"),
        ("300,1,2\n", [BYTES], "takes uint8 and there is 300; it holds 0 to 255"),
        ("1,-1,2\n", [BYTES], "there is -1"),
        ("1,0,2\n", [FLAGS], "takes bool and there is 2"),
        ("1,0.5,2\n", [WHOLE], "there are fractions"),
        ("1,inf,2\n", [WHOLE], "there are NaN or infinities"),
        ("1e30,1,2\n", [WHOLE], "takes int64 and there is 1000000000000000019884624838656"),
        ("a,b,c,label\n1,2,3,1e30\n", [X], "is no label"),
        ("a,b,c,label\n1,2,3,inf\n", [X], "the label inf is no integer"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, text: str, inputs: list[InputSpec], told: str) -> None:
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "d.csv", inputs)
    assert told in str(caught.value)
    assert "d.csv" in str(caught.value)


def test_columns_are_put_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("x.2,Label,x.0,x.1\n2,5,0,1\n")
    dataset = open_dataset(tmp_path / "d.csv", [X])
    assert everything(dataset)["x"].tolist() == [[0, 1, 2]]
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [5]


def test_numbered_columns_with_a_label_are_a_header(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("0,1,2,label\n7,8,9,1\n")
    assert everything(open_dataset(tmp_path / "d.csv", [X]))["x"].tolist() == [[7, 8, 9]]


def test_an_input_named_like_a_label_is_an_input(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("x.0,x.1,x.2,y\n1,2,3,4\n")
    (tmp_path / "d.jsonl").write_text('{"x": [1, 2, 3], "y": [4]}\n')
    for name in ("d.csv", "d.jsonl"):
        dataset = open_dataset(tmp_path / name, [X, Y])
        assert dataset.labels is None
        assert everything(dataset)["y"].tolist() == [[4]]


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_integers_lose_no_digit(tmp_path: Path, dtype: str) -> None:
    row = [(1 << 53) + 1, np.iinfo(dtype).max, 0]
    spec = InputSpec("x", np.dtype(dtype), (None, 3))
    (tmp_path / "d.csv").write_text(",".join(map(str, row)) + "\n")
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("d.csv", "d.jsonl"):
        assert everything(open_dataset(tmp_path / name, [spec]))["x"].tolist() == [row]


def test_large_integers_become_floats_where_floats_are_taken(tmp_path: Path) -> None:
    row = [10**30, 1 << 63, -1]
    (tmp_path / "d.csv").write_text(",".join(map(str, row)) + "\n")
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("d.csv", "d.jsonl"):
        found = everything(open_dataset(tmp_path / name, [X]))["x"]
        assert found.tolist() == np.array([row], dtype=np.float64).astype(np.float32).tolist()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"x": [1, 2]}', "takes shape [?, 3] and"),
        ('{"x": [1, 2, 3], "label": 9223372036854775808}', "is no label"),
        ('{"x": [1, 2, 3], "label": true}', "the label True is no integer"),
        ('{"label": 1}', "has nothing for input 'x'"),
        ("[" * 100000, "is no JSON"),
        ('{"x": [1, 2, null]}', "not all of it is numbers"),
        ('{"x": [1, 2, {}]}', "not all of it is numbers"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "d.jsonl").write_text('{"x": [1, 2, 3], "label": 1}\n\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "d.jsonl", [X])
    assert told in str(caught.value)
    assert "line 3" in str(caught.value) or "sample 1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (torch.eye(3).to_sparse(), "'x': "),
        (torch.ones(2, 3).to(torch.float8_e4m3fn), "Float8"),
        ([torch.ones(2, 3).to(torch.float8_e4m3fn)], "entry 0"),
        ((torch.ones(4, 3), torch.arange(4)), "entry 1"),
        ([torch.ones(2, 2, 3)], "entry 0"),
        ([{"x": torch.ones(2, 3)}], "has nothing for input 'y'"),
        ([{"x": torch.ones(2, 3), "y": torch.ones(3, 1)}], "different lengths"),
        ([], "holds no samples"),
        (torch.tensor(3.0), "is empty"),
        ("text", "not tensors"),
        ([torch.ones(2, 3, dtype=torch.complex64)], "complex64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, content: Any, told: str) -> None:
    torch.save(content, tmp_path / "d.pt")
    inputs = [X, Y] if isinstance(content, list) and content and isinstance(content[0], dict) else [X]
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path / "d.pt", inputs)
    assert told in str(caught.value)
    assert "d.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_torch_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torch.ones(2, 3), tmp_path / "d.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DataError, match=r"needs torch.*pip install torch"):
        open_dataset(tmp_path / "d.pt", [X])


def test_labels_stand_beside_lists_functions_and_test_data(tmp_path: Path, module: Path) -> None:
    np.save(tmp_path / "l.npy", np.arange(7) * 2)
    torch.save([torch.from_numpy(ROWS)], tmp_path / "d.pt")
    tensor(tmp_path / "sets" / "test_data_set_0" / "input_0.pb", ROWS)
    labels = tmp_path / "l.npy"
    for dataset in (
        open_dataset(tmp_path / "d.pt", [X], labels=labels),
        open_dataset(tmp_path / "sets", [X], labels=labels),
        open_dataset(None, [X], labels=labels, function="drawn_here:batches"),
    ):
        assert dataset.labels is not None
        assert dataset.labels.tolist() == [0, 2, 4, 6, 8, 10, 12]
    np.save(tmp_path / "l.npy", np.arange(3))
    with pytest.raises(DataError, match=r"7 samples and .*l\.npy has 3 labels"):
        open_dataset(tmp_path / "sets", [X], labels=labels)
    assert module


def test_what_would_be_ignored_is_refused(tmp_path: Path, module: Path) -> None:
    tensor(tmp_path / "sets" / "test_data_set_0" / "input_0.pb", ROWS)
    with pytest.raises(DataError, match="no splits"):
        open_dataset(tmp_path / "sets", [X], split="val")
    with pytest.raises(DataError, match="no splits"):
        open_dataset(None, [X], split="val", function="drawn_here:batches")
    with pytest.raises(DataError, match="neither labels nor splits"):
        open_dataset(None, [X], labels=tmp_path / "l.npy", synthetic=3)
    (tmp_path / "d.csv").write_text("1,2,3\n")
    with pytest.raises(DataError, match="holds its labels itself"):
        open_dataset(tmp_path / "d.csv", [X], labels=tmp_path / "l.npy")
    assert module


def test_functions_may_import_late_leave_and_exit(module: Path) -> None:
    (module / "drawn_too.py").write_text("import numpy as np\nROWS = np.ones((2, 3), dtype=np.float32)\n")
    (module / "drawn_here.py").write_text(
        "import os\ndef late():\n    import drawn_too\n    os.chdir('/')\n    yield {'x': drawn_too.ROWS}\n"
        "def leaves():\n    raise SystemExit(0)\ndef leaves_later():\n    yield from ()\n    raise SystemExit(0)\n"
    )
    before = list(sys.path)
    assert len(open_dataset(None, [X], function="drawn_here:late")) == 2
    assert sys.path == before
    for function in ("drawn_here:leaves", "drawn_here:leaves_later"):
        with pytest.raises(DataError, match="SystemExit"):
            open_dataset(None, [X], function=function)
    del sys.modules["drawn_too"]


def test_test_data_of_different_shapes_and_kinds(tmp_path: Path) -> None:
    free = InputSpec("x", np.dtype("float32"), (None, None))
    for number, length in enumerate((3, 3, 5)):
        tensor(tmp_path / f"test_data_set_{number}" / "input_0.pb", np.full((2, length), number, dtype=np.float32))
    dataset = open_dataset(tmp_path, [free])
    order = np.array([3, 0, 1, 2, 5, 4], dtype=np.intp)
    assert boundaries(dataset, order, 9) == [(0, 4), (4, 6)]
    assert dataset.read(order[:4])["x"].tolist() == [[1] * 3, [0] * 3, [0] * 3, [1] * 3]
    with pytest.raises(DataError, match="do not fit one batch"):
        everything(dataset)
    tensor(tmp_path / "test_data_set_2" / "input_0.pb", np.zeros((1, 5), dtype=np.float32))
    with pytest.raises(DataError, match="has changed"):
        dataset.read(order[4:])


def test_test_data_is_preprocessed_and_widened(tmp_path: Path) -> None:
    proto = onnx.helper.make_tensor("x", onnx.TensorProto.BFLOAT16, [1, 3], [1.5, -2.25, 3.0])
    (tmp_path / "input_0.pb").write_bytes(proto.SerializeToString())
    assert everything(open_dataset(tmp_path, [X]))["x"].tolist() == [[1.5, -2.25, 3.0]]
    tensor(tmp_path / "input_0.pb", np.array([[1, 2, 3]], dtype=np.uint8))
    assert everything(open_dataset(tmp_path, [X], Preprocess(scale=0.5)))["x"].tolist() == [[0.5, 1.0, 1.5]]


def test_test_data_with_gaps_or_values_elsewhere_is_refused(tmp_path: Path) -> None:
    tensor(tmp_path / "input_0.pb", ROWS)
    tensor(tmp_path / "input_2.pb", ROWS[:, :1])
    with pytest.raises(DataError, match=r"has no input_1\.pb"):
        open_dataset(tmp_path, [X, Y])
    (tmp_path / "input_2.pb").unlink()
    proto = onnx.numpy_helper.from_array(ROWS)
    onnx.external_data_helper.set_external_data(proto, "values.bin")
    proto.ClearField("raw_data")
    (tmp_path / "input_0.pb").write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match="stand in another file"):
        open_dataset(tmp_path, [X])


@pytest.mark.parametrize(("count", "seed", "told"), [(0, 0, "at least one"), (-3, 0, "at least one"), (1, -1, "seed")])
def test_random_samples_that_make_no_sense_are_refused(count: int, seed: int, told: str) -> None:
    with pytest.raises(DataError, match=told):
        open_dataset(None, [X], synthetic=count, seed=seed)


def test_random_samples_follow_from_the_names_of_inputs() -> None:
    z = InputSpec("z", np.dtype("float32"), (None, 3))
    alone, both = open_dataset(None, [X], synthetic=5), open_dataset(None, [z, X], synthetic=9)
    assert (everything(both)["x"][:5] == everything(alone)["x"]).all()
    assert (everything(both)["x"] != everything(both)["z"]).all()


def test_no_sample_makes_no_batch() -> None:
    dataset = open_dataset(None, [X], synthetic=3)
    assert boundaries(dataset, np.array([], dtype=np.intp), 4) == []
    assert dataset.read(np.array([], dtype=np.intp))["x"].shape == (0, 3)


def test_suffixes_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "D.CSV").write_text("1,2,3\n")
    assert everything(open_dataset(tmp_path / "D.CSV", [X]))["x"].tolist() == [[1, 2, 3]]
