"""Functions and layer normalisations that a model writes out: found, named, and worth what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert
from quantcli.fold import fold
from quantcli.load import load
from quantcli.load.learned import LEARNED
from quantcli.probe import model_bytes
from tests.graphs import Array, node, normal, real, save

X = normal(3, 4, 5, seed=1, scale=3.0)
NUMBERS: dict[str, Array] = {
    name: real(value)
    for name, value in {
        "zero": 0.0, "half": 0.5, "one": 1.0, "two": 2.0, "three": 3.0, "five": 5.0, "six": 6.0, "sixth": 1 / 6,
        "root": np.sqrt(2.0), "inverse": np.sqrt(0.5), "cubic": 0.044715, "slope": np.sqrt(2 / np.pi), "eps": 1e-5,
    }.items()
}  # fmt: skip
HELD = NUMBERS | {
    "gamma": normal(5, seed=2), "beta": normal(1, 5, seed=3), "sixes": np.full(5, 6.0, np.float32), "rows": normal(4, 1, seed=4),
    "stack": normal(2, 1, 4, 5, seed=5),
    "last": np.array([-1], np.int64), "first": np.array([1], np.int64),
}  # fmt: skip
SHIFTED = [node("Add", ["three", "x"], ["a"]), node("Clip", ["a", "zero", "six"], ["c"])]
ERF = [node("Div", ["x", "root"], ["a"]), node("Erf", ["a"], ["b"]), node("Add", ["b", "one"], ["c"])]
JAX = [
    node("Mul", ["x", "x"], ["s"]), node("Mul", ["s", "x"], ["k"]), node("Mul", ["k", "cubic"], ["q"]),
    node("Add", ["x", "q"], ["a"]), node("Mul", ["a", "slope"], ["r"]), node("Tanh", ["r"], ["t"]),
    node("Add", ["one", "t"], ["p"]), node("Mul", ["half", "p"], ["u"]), node("Mul", ["x", "u"], ["o"]),
]  # fmt: skip

FUNCTIONS: dict[str, tuple[list[onnx.NodeProto], list[str], int]] = {
    # nodes, what they become, and the operator set that it takes
    "HardSwish, divided last": (
        [*SHIFTED, node("Mul", ["x", "c"], ["m"]), node("Div", ["m", "six"], ["o"])],
        ["HardSwish"],
        17,
    ),
    "HardSwish, multiplied first": (
        [*SHIFTED, node("Mul", ["c", "sixth"], ["m"]), node("Mul", ["m", "x"], ["o"])],
        ["HardSwish"],
        17,
    ),
    "HardSwish of Min and Relu": (
        [node("Add", ["x", "three"], ["a"]), node("Relu", ["a"], ["r"]), node("Min", ["r", "six"], ["c"]),
         node("Mul", ["x", "c"], ["m"]), node("Div", ["m", "six"], ["o"])],
        ["HardSwish"],
        17,
    ),
    "HardSwish of HardSigmoid": (
        [node("HardSigmoid", ["x"], ["h"], alpha=0.1666667, beta=0.5), node("Mul", ["h", "x"], ["o"])],
        ["HardSwish"],
        17,
    ),
    "HardSigmoid": ([*SHIFTED, node("Div", ["c", "six"], ["o"])], ["HardSigmoid"], 13),
    "Gelu": ([*ERF, node("Mul", ["x", "c"], ["m"]), node("Mul", ["m", "half"], ["o"])], ["Gelu"], 20),
    "Gelu, half of x": ([*ERF, node("Mul", ["x", "half"], ["m"]), node("Mul", ["m", "c"], ["o"])], ["Gelu"], 20),
    "Gelu by Tanh": (
        [node("Pow", ["x", "three"], ["p"]), node("Mul", ["p", "cubic"], ["q"]), node("Add", ["x", "q"], ["r"]),
         node("Mul", ["r", "slope"], ["s"]), node("Tanh", ["s"], ["t"]), node("Add", ["t", "one"], ["u"]),
         node("Mul", ["x", "half"], ["h"]), node("Mul", ["h", "u"], ["o"])],
        ["Gelu"],
        20,
    ),
    "Gelu by Tanh, the cube as two products": (JAX, ["Gelu"], 20),
    "Mish": (
        [node("Softplus", ["x"], ["s"]), node("Tanh", ["s"], ["t"]), node("Mul", ["x", "t"], ["o"])],
        ["Mish"],
        18,
    ),
    "PRelu, as Keras writes it": (
        [node("Relu", ["x"], ["r"]), node("Neg", ["x"], ["n"]), node("Relu", ["n"], ["s"]), node("Mul", ["s", "gamma"], ["m"]),
         node("Add", ["r", "m"], ["o"])],
        ["PRelu"],
        13,
    ),
    "PRelu behind a sum": (
        [node("Add", ["x", "beta"], ["a"]), node("Relu", ["a"], ["r"]), node("Neg", ["a"], ["n"]), node("Relu", ["n"], ["s"]),
         node("Mul", ["rows", "s"], ["m"]), node("Sub", ["r", "m"], ["o"])],
        ["Add", "PRelu"],
        13,
    ),
    "PRelu of magnitudes": (
        [node("Abs", ["x"], ["b"]), node("Sub", ["x", "b"], ["d"]), node("Mul", ["gamma", "d"], ["m"]),
         node("Mul", ["m", "half"], ["h"]), node("Relu", ["x"], ["r"]), node("Add", ["r", "h"], ["o"])],
        ["PRelu"],
        13,
    ),
    "PRelu of a single slope": (
        [node("Relu", ["x"], ["r"]), node("Neg", ["x"], ["n"]), node("Relu", ["n"], ["s"]), node("Mul", ["s", "half"], ["m"]),
         node("Sub", ["r", "m"], ["o"])],
        ["LeakyRelu"],
        13,
    ),
    "twice what is above zero": (
        [node("Relu", ["x"], ["r"]), node("Neg", ["x"], ["n"]), node("Relu", ["n"], ["s"]), node("Mul", ["r", "two"], ["m"]),
         node("Add", ["s", "m"], ["o"])],
        ["Add", "Mul", "Mul", "Relu", "Relu"],
        13,
    ),
    "slopes that x is broadcast to": (
        [node("Relu", ["x"], ["r"]), node("Neg", ["x"], ["n"]), node("Relu", ["n"], ["s"]), node("Mul", ["s", "stack"], ["m"]),
         node("Add", ["r", "m"], ["o"])],
        ["Add", "Mul", "Mul", "Relu", "Relu"],
        13,
    ),
    "another bound": (
        [node("Add", ["x", "three"], ["a"]), node("Clip", ["a", "zero", "five"], ["c"]), node("Mul", ["x", "c"], ["o"])],
        ["Add", "Clip", "Mul"],
        13,
    ),
    "a vector of constants": (
        [*SHIFTED, node("Mul", ["x", "c"], ["m"]), node("Div", ["m", "sixes"], ["o"])],
        ["Add", "Clip", "Mul", "Mul"],
        13,
    ),
    "of two tensors": (
        [*SHIFTED, node("Abs", ["x"], ["z"]), node("Mul", ["z", "c"], ["m"]), node("Div", ["m", "six"], ["o"])],
        ["Abs", "Add", "Clip", "Mul", "Mul"],
        13,
    ),
}  # fmt: skip


def held_by(nodes: list[onnx.NodeProto]) -> dict[str, Array]:
    """Return the constants that nodes read."""
    used = {value for n in nodes for value in n.input}
    return {key: value for key, value in HELD.items() if key in used}


def folded(path: Path, opset: int, bound: Array) -> list[str]:
    """Fold a model, compare what it computes, and return its operators."""
    model = fold(load(path).graph)
    assert model.opset_imports[""] == opset
    assert {use.node.graph for n in model.graph for value in n.inputs if value for use in value.uses()} == {model.graph}
    found, expected = Runner(model_bytes(model)).run({"x": X}), Runner(path).run({"x": X})
    assert list(found) == list(expected)
    for name, values in found.items():
        assert values.shape == expected[name].shape
        assert (np.abs(values - expected[name]) <= bound).all()
    return sorted(n.op_type for n in model.graph)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_its_name(tmp_path: Path, name: str) -> None:
    nodes, kinds, opset = FUNCTIONS[name]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 4, 5]}, {"o": None}, held_by(nodes), opset=13)
    # Six roundings, and constants of seven digits: see `quantcli.written_out.CLOSE`; twice, for either side.
    assert folded(path, opset, 2 * 2.0**-20 * (1 + np.abs(X))) == sorted(kinds)


def test_what_others_read_stays(tmp_path: Path) -> None:
    nodes = [*SHIFTED, node("Mul", ["x", "c"], ["m"]), node("Div", ["m", "six"], ["o"])]
    for given in ("a", "c", "m"):
        path = save(tmp_path / f"{given}.onnx", nodes, {"x": ["N", 4, 5]}, {"o": None, given: None}, NUMBERS, opset=14)
        assert folded(path, 14, 2 * 2.0**-20 * (1 + np.abs(X))) == ["Add", "Clip", "Mul", "Mul"]


def test_what_was_trained_prepared_stays(tmp_path: Path) -> None:
    nodes = [*SHIFTED, node("Mul", ["x", "c"], ["m"]), node("Div", ["m", "six"], ["o"])]
    model = load(save(tmp_path / "m.onnx", nodes, {"x": ["N", 4, 5]}, {"o": None}, NUMBERS)).graph
    assert [n.op_type for n in fold(model).graph] == ["HardSwish"]
    model.graph[0].meta[LEARNED] = True
    assert [n.op_type for n in fold(model).graph] == ["Add", "Clip", "Mul", "Mul"]


def deviations(opset: int, axes: str, square: str = "Pow", again: bool = False) -> list[onnx.NodeProto]:
    """Return the first operators of a normalisation, which give a deviation ``d`` and its root mean square ``r``."""
    means = {"last": [-1], "first": [1]}

    def mean(x: str, to: str) -> onnx.NodeProto:
        return node("ReduceMean", [x, axes], [to]) if opset >= 18 else node("ReduceMean", [x], [to], axes=means[axes])

    base = "d2" if again else "d"
    return [
        mean("x", "m"),
        node("Sub", ["x", "m"], ["d"]),
        *([node("Sub", ["x", "m"], ["d2"])] if again else []),
        node(square, [base, "two" if square == "Pow" else base], ["s"]),
        mean("s", "v"),
        node("Add", ["v", "eps"], ["e"]),
        node("Sqrt", ["e"], ["r"]),
    ]


SCALED = [node("Div", ["d", "r"], ["n"]), node("Mul", ["n", "gamma"], ["g"]), node("Add", ["g", "beta"], ["o"])]
WHOLE = ["LayerNormalization"]
NORMALISATIONS: dict[str, tuple[list[onnx.NodeProto], list[str] | None, int]] = {
    "as PyTorch exports it": ([*deviations(13, "last"), *SCALED], WHOLE, 13),
    "axes as a constant": ([*deviations(18, "last"), *SCALED], WHOLE, 18),
    "a product, the difference twice": ([*deviations(13, "last", "Mul", again=True), *SCALED], WHOLE, 13),
    "without constants": ([*deviations(17, "last"), node("Div", ["d", "r"], ["o"])], WHOLE, 17),
    "a factor alone": (
        [*deviations(17, "last"), node("Div", ["d", "r"], ["n"]), node("Mul", ["gamma", "n"], ["o"])],
        WHOLE,
        17,
    ),
    "over another axis": ([*deviations(17, "first"), *SCALED], None, 17),
    "a factor per row": (
        [*deviations(17, "last"), node("Div", ["d", "r"], ["n"]), node("Mul", ["n", "rows"], ["o"])],
        ["LayerNormalization", "Mul"],
        17,
    ),
    "the deviation of another tensor": (
        [*deviations(17, "last"), node("Sub", ["r", "m"], ["q"]), node("Div", ["q", "r"], ["o"])],
        None,
        17,
    ),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_a_layer_normalisation_is_one_operator(tmp_path: Path, name: str) -> None:
    nodes, expected, opset = NORMALISATIONS[name]
    used = {value for n in nodes for value in n.input}
    constants = {key: value for key, value in HELD.items() if key in used}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 4, 5]}, {"o": None}, constants, opset=opset)
    # What is normalised is below √5, and factors and addends below 4: some 20 roundings of at most 4·√5 + 4.
    kinds = folded(path, max(opset, 17), np.full_like(X, 20 * 2.0**-24 * 13 * (1 + np.abs(X).max())))
    assert kinds == expected if expected else "LayerNormalization" not in kinds


@pytest.mark.parametrize("target", ["npu-int8", "ort-x86"])
def test_a_gelu_written_out_keeps_what_a_table_keeps(target: str, tmp_path: Path) -> None:
    nodes = [node("Conv", ["i", "w", "b"], ["x"]), *JAX, node("Conv", ["o", "v"], ["y"])]
    constants = {
        "w": normal(8, 3, 3, 3, seed=1),
        "b": normal(8, seed=4),
        "v": normal(4, 8, 1, 1, seed=2),
        **held_by(JAX),
    }
    path = save(tmp_path / "m.onnx", nodes, {"i": ["N", 3, 6, 6]}, {"y": None}, constants, opset=13)
    images = normal(64, 3, 6, 6, seed=3, scale=3)
    np.savez(tmp_path / "d.npz", i=images)
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(target=target), verified=True)
    expected = Runner(path).run({"i": images})["y"]
    error = Runner(done.model).run({"i": images})["y"] - expected
    # Three tensors and two weights of 8 bits over all of their range; operator by operator 18.0 and 21.5 are left.
    assert 10 * np.log10(np.square(expected).sum() / np.square(error).sum()) > 25


@pytest.mark.parametrize("root", [True, False])
def test_squares_under_a_root_stay_float(root: bool, tmp_path: Path) -> None:
    mean = [
        node("Mul", ["c", "c"], ["s"]),
        node("ReduceMean", ["s"], ["m"], axes=[1]),
        node("Add", ["m", "half"], ["a"]),
        node("Sqrt" if root else "Relu", ["a"], ["r"]),
        node("Div" if root else "Mul", ["c", "r"], ["g"]),
    ]
    nodes = [node("Conv", ["i", "w"], ["c"]), *mean, node("Conv", ["g", "v"], ["y"])]
    constants = {"w": normal(8, 3, 3, 3, seed=1), "v": normal(4, 8, 1, 1, seed=2), "half": NUMBERS["half"]}
    path = save(tmp_path / "m.onnx", nodes, {"i": ["N", 3, 6, 6]}, {"y": None}, constants, opset=13)
    np.savez(tmp_path / "d.npz", i=normal(64, 3, 6, 6, seed=3, scale=3))
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(target="npu-int8"))
    reasons = {layer.name: layer.reason for layer in done.plan.floats}
    assert ("s_node" in reasons) == root
    assert not root or reasons["s_node"].startswith("it squares what a root is taken of")
