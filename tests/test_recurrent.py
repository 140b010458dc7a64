"""Recurrent layers lose what exporters write around them, and computed shapes become constants; the results stay, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli.fold import fold
from quantcli.probe import model_bytes
from tests.graphs import Array, node, normal, save

STEPS, FEATURES, HIDDEN = 5, 3, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def integers(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def recurrent(
    path: Path,
    kind: str = "LSTM",
    *,
    index: int = -1,
    state: float = 0.0,
    squeezed: bool = True,
    lengths: bool = False,
    **attributes: Any,
) -> Path:
    """Write a layer of states that are expanded to the batch, whose one step a Gather picks; input x [N, 5, 3], output y [N, 4]."""
    gates = GATES[kind] * HIDDEN
    constants: dict[str, Array] = {
        "w": normal(1, gates, FEATURES, seed=1),
        "r": normal(1, gates, HIDDEN, seed=2),
        "b": normal(1, 2 * gates, seed=3),
        "start": np.full((1, 1, HIDDEN), state, dtype=np.float32),
        "one": integers(1),
        "last": integers(HIDDEN),
        "index": np.array(index, dtype=np.int64),
    }
    nodes = [
        node("Shape", ["x"], ["count"], start=0, end=1),
        node("Concat", ["one", "count", "last"], ["states"], axis=0),
        node("Expand", ["start", "states"], ["h"]),
        node("Transpose", ["x"], ["turned"], perm=[1, 0, 2]),
    ]
    operands = ["turned", "w", "r", "b", "", "h", *(["h"] if kind == "LSTM" else [])]
    if lengths:
        constants["three"] = np.array([3], dtype=np.int32)
        nodes.append(node("Expand", ["three", "count"], ["lengths"]))
        operands[4] = "lengths"
    nodes.append(node(kind, operands, ["every"], hidden_size=HIDDEN, **attributes))
    if squeezed:
        nodes.append(node("Squeeze", ["every", "one"], ["plain"]))
    else:
        constants["steps"] = integers(STEPS)
        nodes += [
            node("Transpose", ["every"], ["apart"], perm=[0, 2, 1, 3]),
            node("Concat", ["steps", "count", "last"], ["flat"], axis=0),
            node("Reshape", ["apart", "flat"], ["plain"]),
        ]
    nodes += [node("Transpose", ["plain"], ["ours"], perm=[1, 0, 2]), node("Gather", ["ours", "index"], ["y"], axis=1)]
    shape = ("N", STEPS, FEATURES)
    return save(path, nodes, {"x": shape}, {"y": ("N", HIDDEN)}, constants, opset=18)


def folded(path: Path) -> ir.Model:
    return fold(ir.load(path))


def operators(model: ir.Model) -> list[str]:
    return [one.op_type for one in model.graph]


def assert_same(path: Path, model: ir.Model, name: str = "x", shape: tuple[int, ...] = (STEPS, FEATURES)) -> None:
    for count in (1, 2, 7):
        feeds = {name: normal(count, *shape, seed=count)}
        before, after = Runner(path).run(feeds), Runner(model_bytes(model)).run(feeds)
        assert before.keys() == after.keys()
        for output, values in before.items():
            np.testing.assert_array_equal(values, after[output])


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("squeezed", [True, False], ids=["squeeze", "reshape"])
@pytest.mark.parametrize("index", [-1, STEPS - 1])
def test_last_step_and_states_of_zeros_are_the_layers_own(
    tmp_path: Path, kind: str, squeezed: bool, index: int
) -> None:
    path = recurrent(tmp_path / "m.onnx", kind, index=index, squeezed=squeezed)
    model = folded(path)
    assert operators(model) == ["Transpose", kind, "Squeeze"]
    assert len(model.graph.node(1).inputs) == 4
    assert model.graph.outputs[0].name == "y"
    assert_same(path, model)


@pytest.mark.parametrize(
    "other",
    [{"index": 2}, {"index": -2}, {"direction": "reverse"}, {"lengths": True}],
    ids=["a step before", "a step from behind", "backwards", "lengths"],
)
def test_what_is_not_the_last_step_stays(tmp_path: Path, other: dict[str, Any]) -> None:
    path = recurrent(tmp_path / "m.onnx", **other)
    model = folded(path)
    assert operators(model)[-1] == "Gather"
    assert_same(path, model)


def test_states_that_are_not_zero_stay(tmp_path: Path) -> None:
    path = recurrent(tmp_path / "m.onnx", state=0.5)
    model = folded(path)
    assert "Expand" in operators(model)
    assert_same(path, model)


def test_both_directions_keep_their_gather(tmp_path: Path) -> None:
    constants: dict[str, Array] = {
        "w": normal(2, 4 * HIDDEN, FEATURES, seed=1),
        "r": normal(2, 4 * HIDDEN, HIDDEN, seed=2),
        "index": np.array(-1, dtype=np.int64),
    }
    nodes = [
        node("LSTM", ["x", "w", "r"], ["every"], hidden_size=HIDDEN, direction="bidirectional"),
        node("Gather", ["every", "index"], ["y"], axis=0),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": (STEPS, "N", FEATURES)}, {"y": None}, constants)
    model = folded(path)
    assert operators(model) == ["LSTM", "Gather"]


def flattening(path: Path) -> Path:
    """Write a Reshape to [batch, product of two axes], its shape computed from the input's."""
    constants = {"first": integers(0), "second": integers(1), "third": integers(2), "fourth": integers(3)}
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Shape", ["r"], ["axes"]),
        node("Slice", ["axes", "first", "second"], ["count"]),
        node("Slice", ["axes", "third", "fourth"], ["rows"]),
        node("Gather", ["axes", "fourth"], ["columns"], axis=0),
        node("Mul", ["rows", "columns"], ["both"]),
        node("Gather", ["axes", "second"], ["channels"], axis=0),
        node("Concat", ["count", "both", "channels"], ["wanted"], axis=0),
        node("Reshape", ["r", "wanted"], ["y"]),
    ]
    return save(path, nodes, {"x": ("N", 3, 4, 6)}, {"y": None}, constants)


def test_a_computed_shape_with_one_free_axis_becomes_a_constant(tmp_path: Path) -> None:
    path = flattening(tmp_path / "m.onnx")
    model = folded(path)
    assert operators(model) == ["Relu", "Reshape"]
    shape = model.graph.node(1).inputs[1]
    assert shape is not None
    assert shape.const_value is not None
    assert shape.const_value.numpy().tolist() == [0, 24, 3]
    assert_same(path, model, shape=(3, 4, 6))


def test_a_computed_shape_may_divide_an_axis(tmp_path: Path) -> None:
    """As attention does, into heads."""
    nodes = [
        node("Shape", ["x"], ["axes"]),
        node("Gather", ["axes", "second"], ["width"], axis=0),
        node("Div", ["width", "heads"], ["each"]),
        node("Slice", ["axes", "first", "second"], ["count"]),
        node("Concat", ["count", "heads", "each"], ["wanted"], axis=0),
        node("Reshape", ["x", "wanted"], ["y"]),
    ]
    constants = {"first": integers(0), "second": integers(1), "heads": integers(3)}
    path = save(tmp_path / "m.onnx", nodes, {"x": ("N", 12)}, {"y": None}, constants)
    model = folded(path)
    shape = model.graph.node(-1).inputs[1]
    assert shape is not None
    assert shape.const_value is not None
    assert shape.const_value.numpy().tolist() == [0, 3, 4]
    assert_same(path, model, shape=(12,))


def test_a_computed_shape_with_two_free_axes_behind_each_other_stays(tmp_path: Path) -> None:
    nodes = [
        node("Shape", ["x"], ["rows"], start=1, end=2),
        node("Shape", ["x"], ["count"], start=0, end=1),
        node("Concat", ["rows", "count"], ["wanted"], axis=0),
        node("Reshape", ["x", "wanted"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ("N", "M")}, {"y": None}, {})
    model = folded(path)
    assert operators(model)[-1] == "Reshape"
    assert operators(model)[0] == "Shape"
    for shape in ((2, 3), (4, 1)):
        feeds = {"x": normal(*shape)}
        np.testing.assert_array_equal(Runner(path).run(feeds)["y"], Runner(model_bytes(model)).run(feeds)["y"])


def test_a_length_of_zero_is_not_taken_for_a_kept_axis(tmp_path: Path) -> None:
    nodes = [
        node("Shape", ["empty"], ["none"], start=1, end=2),
        node("Shape", ["x"], ["count"], start=0, end=1),
        node("Concat", ["count", "none"], ["wanted"], axis=0),
        node("Reshape", ["x", "wanted"], ["y"]),
    ]
    inputs = {"x": ("N", 4), "empty": ("N", 0)}
    path = save(tmp_path / "m.onnx", nodes, inputs, {"y": None}, {})
    model = folded(path)
    feeds = {"x": normal(2, 4), "empty": np.zeros((2, 0), dtype=np.float32)}
    np.testing.assert_array_equal(Runner(path).run(feeds)["y"], Runner(model_bytes(model)).run(feeds)["y"])
