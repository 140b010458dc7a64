"""Models that take a state beside their data, or a number: a sample is a whole run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.datasets import InputSpec, fitted_batch, fixes_batch, open_dataset, samples_in, whole_runs
from calibration.errors import DataError
from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, evaluate, verify
from quantcli.fold import fold
from quantcli.load import load
from tests.calibration.samples import npz
from tests.graphs import Array, node, normal, save

STEPS, UNITS = 24, 32
# 8-bit layers whose data fills its range keep 30 dB and more.
FLOOR = 30.0


def cell(path: Path, batch: int | str = "batch") -> Path:
    """Write one step of a network with a state of 2 × batch × 32, which also takes a number that it multiplies its state by."""
    nodes = [
        node("Gather", ["state", "one"], ["h"], axis=0),
        node("Cast", ["rate"], ["real"], to=TensorProto.FLOAT),
        node("Mul", ["h", "real"], ["before"]),
        node("Gemm", ["x", "w"], ["a"]),
        node("Gemm", ["before", "u"], ["b"]),
        node("Add", ["a", "b"], ["c"]),
        node("Relu", ["c"], ["d"]),
        node("Gemm", ["d", "v"], ["y"]),
        node("Unsqueeze", ["d", "front"], ["e"]),
        node("Concat", ["e", "e"], ["next"], axis=0),
    ]
    constants: dict[str, Array] = {
        "one": np.array(1),
        "front": np.array([0]),
        "w": normal(5, UNITS, seed=1),
        "u": normal(UNITS, UNITS, seed=2, scale=0.1),
        "v": normal(UNITS, 3, seed=3),
    }
    inputs = {"x": [batch, 5], "state": [2, batch, UNITS], "rate": []}
    outputs = {"y": [batch, 3], "next": [2, batch, UNITS]}
    return save(path, nodes, inputs, outputs, constants, kinds={"rate": TensorProto.INT64})


def stream(path: Path, steps: int = STEPS) -> dict[str, Array]:
    """Return the inputs of a stream's runs, each with the state that the one before has left, along a first axis."""
    runner, runs = Runner(path), []
    state = np.zeros((2, 1, UNITS), dtype=np.float32)
    for x in normal(steps, 1, 5, seed=4):
        runs.append({"x": x, "state": state, "rate": np.array(1)})
        state = runner.run(runs[-1])["next"]
    return {name: np.stack([run[name] for run in runs]) for name in runs[0]}


@pytest.mark.parametrize(
    ("shapes", "whole"),
    [
        ([(None, 5)], False),
        ([(4, 5)], False),
        ([(None, 5), (None, 2)], False),
        ([(None, 3, 8, 8), (1, 2)], False),
        ([(None, 3), (4, 3)], False),
        ([(None, 3), (1, None, 6)], False),
        ([(None, 5), ()], True),
        ([(1, 5), (2, 1, 6)], True),
        ([(None, 5), (2, None, 6)], True),
        ([(None, 3, None, 16), (4, 1, 6)], True),
        ([(None, 5), (4, 2, 6)], False),
        ([(4, 5), (4, 1, 6)], False),
    ],
)
def test_inputs_that_share_no_axis_of_samples_make_whole_runs(
    shapes: list[tuple[int | None, ...]], whole: bool
) -> None:
    inputs = tuple(InputSpec(str(k), np.dtype("float32"), shape) for k, shape in enumerate(shapes))
    assert whole_runs(inputs) == whole
    if whole:
        assert fixes_batch(inputs)
        assert fitted_batch(inputs, None) == 1
        with pytest.raises(DataError, match="batches of 1, not of 2"):
            fitted_batch(inputs, 2)


@pytest.mark.parametrize(
    ("shapes", "samples"), [([(4, 5)], 4), ([(4, 5), (4,)], 4), ([(1, 5), (2, 1)], 1), ([(4, 5), ()], 1), ([()], 1)]
)
def test_samples_of_a_batch_are_counted(shapes: list[tuple[int, ...]], samples: int) -> None:
    assert samples_in({str(k): np.zeros(shape) for k, shape in enumerate(shapes)}) == samples


@pytest.mark.parametrize("kind", ["npz", "function", "sets"])
def test_runs_are_read_as_the_model_takes_them(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cell(tmp_path / "m.onnx")
    runs, inputs = stream(path, 3), Runner(path).inputs
    npz(tmp_path / "d.npz", **runs)
    if kind == "npz":
        dataset = open_dataset(tmp_path / "d.npz", inputs)
    elif kind == "function":
        body = "    d = np.load('d.npz')\n    return ({n: d[n][k] for n in d} for k in range(3))\n"
        (tmp_path / "f.py").write_text(f"import numpy as np\ndef runs():\n{body}")
        monkeypatch.chdir(tmp_path)
        dataset = open_dataset(None, inputs, function="f.py:runs")
    else:
        for k in range(3):
            folder = tmp_path / "sets" / f"test_data_set_{k}"
            folder.mkdir(parents=True)
            for place, spec in enumerate(inputs):
                proto = numpy_helper.from_array(np.asarray(runs[spec.name][k]))
                (folder / f"input_{place}.pb").write_bytes(proto.SerializeToString())
        dataset = open_dataset(tmp_path / "sets", inputs)
    assert len(dataset) == 3
    given = dataset.read(np.array([2]))
    assert given.keys() == runs.keys()
    for name, values in given.items():
        assert values.shape == runs[name][2].shape
        assert (values == runs[name][2]).all()


@pytest.mark.parametrize("batch", ["batch", 1])
def test_a_network_with_a_state_is_quantized_and_goes_on(batch: int | str, tmp_path: Path) -> None:
    path, data = cell(tmp_path / "m.onnx", batch), tmp_path / "d.npz"
    runs = stream(path)
    npz(data, **runs)
    done = convert(path, tmp_path / "q.onnx", data=data, verified=True)
    assert [layer.name for layer in done.plan.layers if layer.name in {"a_node", "b_node", "y_node"}] != []
    assert done.check.samples == 1
    assert min(done.check.sqnr.values()) > FLOOR
    assert not verify(done.sidecar_path, data=data).findings
    judged = evaluate(done.model, data, path)
    assert judged.samples == STEPS
    assert min(judged.sqnr.values()) > FLOOR
    runner, state, given = Runner(done.model), np.zeros((2, 1, UNITS), dtype=np.float32), list[Array]()
    for x in runs["x"]:
        made = runner.run({"x": x, "state": state, "rate": np.array(1)})
        state, given = made["next"], [*given, made["y"]]
    source = Runner(path)
    expected = [source.run({name: values[k, ...] for name, values in runs.items()})["y"] for k in range(STEPS)]
    error = np.square(np.array(given) - expected).sum()
    assert 10 * np.log10(np.square(expected).sum() / error) > FLOOR - 6  # the state's error comes back with each step


def test_without_data_one_run_is_made_up(tmp_path: Path) -> None:
    done = convert(cell(tmp_path / "m.onnx"), tmp_path / "q.onnx", recipe=Recipe(mode="dynamic"))
    assert done.check.samples == 1


def test_a_branch_may_give_out_what_the_graph_around_it_makes(tmp_path: Path) -> None:
    """An Identity within an If, of a value from outside: it stays; one of a value of the branch vanishes."""
    branches = {}
    for name, nodes in {
        "then_branch": [node("Identity", ["a"], ["t"])],
        "else_branch": [node("Neg", ["a"], ["n"]), node("Identity", ["n"], ["e"])],
    }.items():
        out = nodes[-1].output[0]
        given = [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)]
        branches[name] = helper.make_graph(nodes, name, [], given)
    nodes = [
        node("Gemm", ["x", "w"], ["a"]),
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["c"]),
        node("If", ["c"], ["y"], **branches),
    ]
    constants = {"w": normal(5, 6), "zero": np.array(0, dtype=np.float32)}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 5]}, {"y": None}, constants)
    folded = fold(load(path).graph)
    inner = [item.op_type for item in folded.graph.all_nodes() if item.graph is not folded.graph]
    assert sorted(inner) == ["Identity", "Neg"]
    runner = Runner(path)
    for sign in (1.0, -1.0):
        x = np.full((2, 5), sign, dtype=np.float32)
        np.savez(tmp_path / "d.npz", x=normal(64, 5, seed=2))
        done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz")
        made, expected = Runner(done.model).run({"x": x})["y"], runner.run({"x": x})["y"]
        assert np.abs(made - expected).max() < np.abs(expected).max() / 10
