"""What is counted, how it is kept, and the loop that counts it."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from calibration.collect import CHECK_SAMPLES, collect
from calibration.datasets import InputSpec, open_dataset
from calibration.errors import DataError, StatisticsError
from calibration.hooks.onnxruntime import Runner
from calibration.observers import MinMax
from calibration.ranges import minmax
from calibration.statistics import Statistics, TensorStatistics, load, serialized

Array = NDArray[Any]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = arrays(np.float32, st.integers(1, 40), elements=FINITE)


# ---- the observer --------------------------------------------------------------------------------------------------------------


def counted(*batches: Array) -> MinMax:
    observer = MinMax()
    for batch in batches:
        observer.update(batch)
    return observer


@given(VALUES, st.lists(st.integers(0, 40)), st.randoms())
def test_minmax_counts_alike_however_the_values_are_split_and_ordered(
    values: Array, cuts: list[int], order: Any
) -> None:
    edges = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    batches = [values[first:last] for first, last in pairwise(edges)]
    order.shuffle(batches)
    observer = counted(*batches)
    assert (observer.minimum, observer.maximum) == (float(values.min()), float(values.max()))
    assert observer.elements == values.size


@given(st.lists(VALUES, min_size=1, max_size=5), st.randoms())
def test_merging_counts_everything_in_any_order(batches: list[Array], order: Any) -> None:
    observers = [counted(batch) for batch in batches] + [MinMax()]
    order.shuffle(observers)
    merged = MinMax()
    for observer in observers:
        merged.merge(observer)
    values = np.concatenate(batches)
    assert merged == MinMax(float(values.min()), float(values.max()), values.size)


def test_empty_arrays_change_nothing() -> None:
    assert counted(np.zeros((0, 3), dtype=np.float32)) == MinMax(math.inf, -math.inf, 0)
    assert counted(np.ones((2, 2), dtype=np.float32), np.zeros(0, dtype=np.float32)) == MinMax(1.0, 1.0, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 5])
def test_values_that_are_not_finite_are_refused_and_not_counted(bad: float, position: int) -> None:
    observer = counted(np.array([1.0, 2.0], dtype=np.float32))
    values = np.full((2, 3), 7.0, dtype=np.float32)
    values.flat[position] = bad
    with pytest.raises(DataError, match="1 of 6 values are not finite"):
        observer.update(values)
    assert observer == MinMax(1.0, 2.0, 2)


def test_the_range_is_what_was_seen() -> None:
    assert minmax(TensorStatistics(-1.5, 2.25, 7)) == (-1.5, 2.25)


# ---- the file ------------------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
SEEN = st.builds(lambda a, b, n: TensorStatistics(min(a, b), max(a, b), n), FINITE, FINITE, st.integers(0, 2**53))


def statistics(tensors: dict[str, TensorStatistics] | None = None, **inputs: Array) -> Statistics:
    preprocess = {"scale": 1 / 255, "mean": [0.1307], "std": [0.3081], "layout": "NCHW"}
    return Statistics(
        "a" * 64, "b" * 64, preprocess, 12, "minmax", tensors or {"x": TensorStatistics(0.0, 1.0, 3)}, inputs
    )


def fields(held: Statistics) -> tuple[Any, ...]:
    return (held.model_sha256, held.data_sha256, held.preprocess, held.samples, held.observer, held.tensors)


@settings(deadline=None)  # the disk may be slow
@given(tensors=st.dictionaries(NAMES, SEEN, min_size=1, max_size=5))
def test_what_was_seen_is_kept_exactly(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, TensorStatistics]
) -> None:
    path = tmp_path_factory.getbasetemp() / "kept.stats"
    written = statistics(tensors)
    path.write_bytes(serialized(written))
    held = load(path)
    assert fields(held) == fields(written)
    for name, seen in tensors.items():  # == does not tell −0.0 from 0.0
        assert math.copysign(1, held.tensors[name].minimum) == math.copysign(1, seen.minimum)
    turned = dict(reversed(tensors.items()))
    assert serialized(statistics(turned)) == path.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "int8", "bool"])
def test_the_first_samples_are_kept(tmp_path: Path, dtype: str) -> None:
    x = (np.arange(24).reshape(4, 6) % 5).astype(dtype)
    strided = np.repeat(x, 2, axis=1)[:, ::2].T
    written = statistics(None, **{"x": x, "in/put 0:": strided})
    (tmp_path / "s").write_bytes(serialized(written))
    held = load(tmp_path / "s").check_inputs
    assert set(held) == {"x", "in/put 0:"}
    np.testing.assert_array_equal(held["x"], x, strict=True)
    np.testing.assert_array_equal(held["in/put 0:"], strided, strict=True)


def test_the_same_statistics_give_the_same_bytes() -> None:
    x, z = np.ones((2, 3), dtype=np.float32), np.zeros((2, 1), dtype=np.int64)
    assert serialized(statistics(x=x, z=z)) == serialized(statistics(z=z.copy(), x=x.copy()))


def document(**changes: Any) -> dict[str, Any]:
    """Return the document of a sound statistics file, with changes."""
    data = serialized(statistics())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    sound: dict[str, Any] = json.loads(header["__metadata__"]["quantcli"])
    return {**sound, **changes}


def file_with(metadata: Any) -> bytes:
    return bytes(save({"sample/x": np.zeros(3, dtype=np.float32)}, metadata=metadata))


def file_of(content: Any) -> bytes:
    return file_with({"quantcli": json.dumps(content)})


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"minimum": 0.0, "maximum": 1.0, "elements": 3, **changes}}


def test_a_document_written_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(file_of(document()))
    assert fields(load(tmp_path / "s")) == fields(statistics())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(None, "no statistics file at", id="not there"),
        pytest.param(b"", "not a statistics file", id="empty"),
        pytest.param(b"hello\n", "not a statistics file", id="text"),
        pytest.param(serialized(statistics())[:-1], "not a statistics file", id="cut short"),
        pytest.param(serialized(statistics())[:40], "not a statistics file", id="cut in the header"),
        pytest.param(b"\xff" * 8 + b"{}", "not a statistics file", id="a header of 2^64 bytes"),
        pytest.param(file_with(None), "not a statistics file", id="no metadata"),
        pytest.param(file_with({"format": "pt"}), "not a statistics file", id="another's metadata"),
        pytest.param(file_with({"quantcli": "{"}), "not a statistics file", id="no JSON"),
        pytest.param(file_of([1]), "not a statistics file", id="a list"),
        pytest.param(file_of({}), "not a statistics file", id="an empty document"),
        pytest.param(file_of(document(format="other")), "not a statistics file", id="another format"),
        pytest.param(file_of(document(version=2)), "version 2", id="another version"),
        pytest.param(file_of(document(tensors={"x": {"minimum": 0.0}})), "not a statistics file", id="half an entry"),
        pytest.param(file_of(document(tensors=entry(mean=0.5))), "not a statistics file", id="an unknown field"),
        pytest.param(file_of(document(tensors={"x": 1})), "not a statistics file", id="a number for an entry"),
        pytest.param(file_of(document(tensors=[])), "not a statistics file", id="a list of tensors"),
        pytest.param(file_of(document(tensors=entry(minimum="0"))), "not a statistics file", id="text for a number"),
        pytest.param(file_of(document(tensors=entry(maximum=math.nan))), "not a statistics file", id="NaN"),
        pytest.param(file_of(document(tensors=entry(maximum=math.inf))), "not a statistics file", id="infinity"),
        pytest.param(file_of(document(tensors=entry(minimum=2.0))), "not a statistics file", id="the wrong way round"),
        pytest.param(file_of(document(samples="many")), "not a statistics file", id="text for the samples"),
        pytest.param(file_of(document(preprocess=3)), "not a statistics file", id="a number for the preprocessing"),
    ],
)
def test_files_that_hold_no_statistics_are_refused(tmp_path: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / "s.stats").write_bytes(content)
    with pytest.raises(StatisticsError) as caught:
        load(tmp_path / "s.stats")
    assert told in str(caught.value)
    assert "s.stats" in str(caught.value)


def test_a_folder_holds_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="no statistics file"):
        load(tmp_path)


# ---- the loop ------------------------------------------------------------------------------------------------------------------

ROWS = np.random.default_rng(4).normal(size=(10, 3)).astype(np.float32)
ROWS[9] = 1000.0  # what stands last is seen only where the last batch is run
SHIFT = np.array([0.5, -3.0, 7.25], dtype=np.float32)


def model(batch: int | str, *operators: str) -> Runner:
    """Return a running model x → Mul by 2 → Add SHIFT → Relu (→ Log), with every tensor among its outputs."""
    chain = ["x", "doubled", "shifted", "clipped", "logged"]
    steps = [("Mul", "two"), ("Add", "shift"), ("Relu", None), *((operator, None) for operator in operators)]
    nodes = [
        helper.make_node(operator, [before, constant] if constant else [before], [after])
        for (operator, constant), before, after in zip(steps, chain, chain[1:], strict=False)
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3]) for name in chain]
    constants = [numpy_helper.from_array(np.float32(2.0).reshape(1), "two"), numpy_helper.from_array(SHIFT, "shift")]
    graph = helper.make_graph(nodes, "test", infos[:1], infos[1 : len(steps) + 1], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Runner(proto.SerializeToString())


def run(
    path: Path, runner: Runner, tensors: list[str], batch: int, progress: Any = lambda _: None
) -> tuple[dict[str, TensorStatistics], dict[str, Array], int]:
    np.save(path, ROWS)
    dataset = open_dataset(path, runner.inputs)
    return collect(runner, tensors, dataset, np.arange(len(dataset), dtype=np.intp), batch, progress=progress)


def of(values: Array) -> TensorStatistics:
    return TensorStatistics(float(values.min()), float(values.max()), values.size)


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_the_loop_counts_what_numpy_counts(tmp_path: Path, batch: int) -> None:
    done: list[int] = []
    seen, kept, samples = run(tmp_path / "d.npy", model("n"), ["x", "doubled", "shifted"], batch, done.append)
    doubled = ROWS * np.float32(2)
    assert seen == {"x": of(ROWS), "doubled": of(doubled), "shifted": of(doubled + SHIFT)}
    assert samples == 10
    assert done == [*range(batch, 10, batch), 10]
    np.testing.assert_array_equal(kept["x"], ROWS[: min(CHECK_SAMPLES, batch)], strict=True)


@pytest.mark.parametrize(("batch", "used"), [(3, 9), (4, 8), (5, 10), (10, 10)])
def test_a_fixed_batch_leaves_out_the_rest(tmp_path: Path, batch: int, used: int) -> None:
    seen, kept, samples = run(tmp_path / "d.npy", model(batch), ["x", "clipped"], batch)
    clipped = np.maximum(ROWS[:used] * np.float32(2) + SHIFT, np.float32(0))
    assert samples == used
    assert seen == {"x": of(ROWS[:used]), "clipped": of(clipped)}
    np.testing.assert_array_equal(kept["x"], ROWS[:batch], strict=True)


def test_fewer_samples_than_a_fixed_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="batches of 11 and there are 10 samples"):
        run(tmp_path / "d.npy", model(11), ["x"], 11)


def test_a_tensor_that_is_not_finite_is_named(tmp_path: Path) -> None:
    runner = model("n", "Log")  # the logarithm of what Relu made 0 is −inf
    with pytest.raises(DataError) as caught:
        run(tmp_path / "d.npy", runner, ["x", "clipped", "logged"], 4)
    assert "tensor 'logged', samples 0 to 3" in str(caught.value)
    assert run(tmp_path / "d.npy", runner, ["x", "clipped"], 4)[2] == 10  # nobody asked for it


def test_a_logarithm_of_negative_values_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Log", ["x"], ["log"])
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "log")]
    graph = helper.make_graph([node], "test", infos[:1], infos[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    negative = int((ROWS < 0).sum())
    with pytest.raises(DataError, match=rf"tensor 'log', samples 0 to 9: {negative} of 30 values are not finite"):
        run(tmp_path / "d.npy", Runner(proto.SerializeToString()), ["log"], 10)


def test_the_runner_tells_the_models_inputs() -> None:
    assert model("n").inputs == (InputSpec("x", np.dtype("float32"), (None, 3)),)
    assert model(4).inputs == (InputSpec("x", np.dtype("float32"), (4, 3)),)
