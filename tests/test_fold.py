"""Folding preserves what a float model computes, and the names of what survives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli.errors import ModelError
from quantcli.fold import fold
from quantcli.probe import model_bytes
from tests.graphs import Array, node, normal, save

# Folding BatchNorm rounds each weight and each bias once more in float32: with the couple of hundred products behind an
# output here, a relative error of 2^-24 each stays well below 100 dB.
FOLDED_SQNR = 100.0


def operators(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def sqnr(path: Path, folded: ir.Model, feeds: dict[str, Array]) -> float:
    before, after = Runner(path).run(feeds), Runner(model_bytes(folded)).run(feeds)
    assert before.keys() == after.keys()
    worst = np.inf
    for name, values in before.items():
        noise = float(np.square(values.astype(np.float64) - after[name]).sum())
        worst = min(
            worst, 10 * np.log10(float(np.square(values.astype(np.float64)).sum()) / noise) if noise else np.inf
        )
    return float(worst)


def batch_norm(channels: int, seed: int) -> dict[str, Array]:
    return {
        "gamma": np.abs(normal(channels, seed=seed)) + 0.5,
        "beta": normal(channels, seed=seed + 1),
        "mean": normal(channels, seed=seed + 2),
        "var": np.abs(normal(channels, seed=seed + 3)) + 0.1,
    }


NORM = ["gamma", "beta", "mean", "var"]


@pytest.mark.parametrize(
    ("layer", "weight", "shape"),
    [
        ("Conv", (6, 4, 3, 3), (2, 4, 7, 7)),
        ("ConvTranspose", (4, 6, 3, 3), (2, 4, 5, 5)),
        ("Gemm", (4, 6), (2, 4)),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_folds_into_the_layer(
    tmp_path: Path, layer: str, weight: tuple[int, ...], shape: tuple[int, ...], bias: bool
) -> None:
    constants = {"w": normal(*weight, seed=1), **batch_norm(6, 2)} | ({"b": normal(6, seed=8)} if bias else {})
    nodes = [
        node(layer, ["x", "w", "b"] if bias else ["x", "w"], ["c"]),
        node("BatchNormalization", ["c", *NORM], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": shape}, {"y": None}, constants)
    folded = fold(ir.load(path))
    assert operators(folded) == [layer]
    assert folded.graph.outputs[0].name == "y"
    assert sqnr(path, folded, {"x": normal(*shape, seed=20)}) > FOLDED_SQNR


@pytest.mark.parametrize(
    ("shape", "expected"), [((3, 4), ["Mul", "Add"]), ((3, 4, 5), ["Conv"]), ((3, 4, 5, 5), ["Conv"])]
)
def test_batch_norm_that_follows_no_layer_is_a_depthwise_convolution_or_mul_and_add(
    tmp_path: Path, shape: tuple[int, ...], expected: list[str]
) -> None:
    nodes = [node("BatchNormalization", ["x", *NORM], ["n"]), node("Relu", ["n"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", *shape[1:]]}, {"y": None}, batch_norm(4, 2))
    folded = fold(ir.load(path))
    assert operators(folded) == [*expected, "Relu"]
    assert "n" in {v.name for n in folded.graph for v in n.outputs}
    assert sqnr(path, folded, {"x": normal(*shape, seed=20)}) > FOLDED_SQNR


def test_batch_norm_that_standardizes_weights_is_evaluated(tmp_path: Path) -> None:
    constants = {"v": normal(1, 6, 36, seed=1), "w_shape": np.array([6, 4, 3, 3]), **batch_norm(6, 2)}
    nodes = [
        node("BatchNormalization", ["v", *NORM], ["s", "mean_after", "var_after"], training_mode=1),
        node("Reshape", ["s", "w_shape"], ["w"]),
        node("Conv", ["x", "w"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 4, 5, 5]}, {"y": None}, constants)
    folded = fold(ir.load(path))
    assert operators(folded) == ["Conv"]
    assert sqnr(path, folded, {"x": normal(3, 4, 5, 5, seed=20)}) > FOLDED_SQNR


def padded(stage: int) -> list[onnx.NodeProto]:
    """Return the nodes that pad c to a multiple of five, as a network of windows does in each of its stages."""
    return [
        node("Shape", [f"c{stage}"], [f"axes{stage}"]),
        node("Gather", [f"axes{stage}", "last"], [f"length{stage}"]),
        node("Mod", [f"length{stage}", "five"], [f"missing{stage}"]),
        node("Unsqueeze", [f"missing{stage}", "first"], [f"right{stage}"]),
        node("Concat", ["seven_zeros", f"right{stage}"], [f"pads{stage}"], axis=0),
        node("Pad", [f"c{stage}", f"pads{stage}"], [f"c{stage + 1}"]),
    ]


LENGTH = [node("Shape", ["c0"], ["axes"]), node("Gather", ["axes", "last"], ["length"])]
# Expressions over the shape of a convolution's output, [N, 6, 5, 5], as exporters write them; and what is left of them.
SETTLED: dict[str, tuple[list[onnx.NodeProto], list[str]]] = {
    "a grid": (
        [
            *LENGTH,
            node("Range", ["zero", "length", "one"], ["steps"]),
            node("Cast", ["steps"], ["anchors"], to=1),
            node("Add", ["c0", "anchors"], ["y"]),
        ],
        ["Conv", "Add"],
    ),
    "paddings of nothing, one behind the other": (
        [one for stage in range(5) for one in padded(stage)] + [node("Relu", ["c5"], ["y"])],
        ["Conv", "Relu"],
    ),
    "a length that depends on the samples": (
        [
            node("Shape", ["c0"], ["axes"], start=0, end=1),
            node("Concat", ["axes", "flat"], ["wanted"], axis=0),
            node("Expand", ["b", "wanted"], ["rows"]),
            node("Flatten", ["c0"], ["f"]),
            node("Add", ["f", "rows"], ["y"]),
        ],
        ["Conv", "Shape", "Concat", "Expand", "Flatten", "Add"],
    ),
}


@pytest.mark.parametrize("name", SETTLED)
def test_numbers_that_shapes_tell_beforehand_are_constants(tmp_path: Path, name: str) -> None:
    nodes, expected = SETTLED[name]
    constants = {
        "w": normal(6, 4, 1, 1, seed=1),
        "b": normal(1, 150, seed=2),
        "flat": np.array([150]),
        "first": np.array([0]),
    }
    scalars = {"last": np.array(3), "zero": np.array(0), "one": np.array(1), "five": np.array(5)}
    held = {**constants, **scalars, "seven_zeros": np.zeros(7, np.int64)}
    path = save(
        tmp_path / "m.onnx", [node("Conv", ["x", "w"], ["c0"]), *nodes], {"x": ["N", 4, 5, 5]}, {"y": None}, held
    )
    folded = fold(ir.load(path))
    assert sorted(operators(folded)) == sorted(expected)
    assert sqnr(path, folded, {"x": normal(3, 4, 5, 5, seed=20)}) > FOLDED_SQNR


def test_batch_norm_behind_a_shared_convolution_is_not_folded_into_it(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("BatchNormalization", ["c", *NORM], ["n"]),
        node("Mul", ["c", "n"], ["y"]),
    ]
    constants = {"w": normal(6, 4, 3, 3), **batch_norm(6, 2)}
    path = save(tmp_path / "m.onnx", nodes, {"x": [1, 4, 7, 7]}, {"y": None}, constants)
    folded = fold(ir.load(path))
    assert operators(folded) == ["Conv", "Conv", "Mul"]
    assert sqnr(path, folded, {"x": normal(1, 4, 7, 7, seed=20)}) > FOLDED_SQNR


def test_an_old_export_is_lifted(tmp_path: Path) -> None:
    """Operator set 9, constants among the inputs, BatchNorm not folded, attributes that later became inputs, two outputs."""
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", *NORM], ["n"]),
        node("Clip", ["n"], ["k"], min=0.0, max=6.0),
        node("Dropout", ["k"], ["d"], ratio=0.5),
        node("Slice", ["d"], ["left"], axes=[3], starts=[0], ends=[4]),
        node("Squeeze", ["g"], ["right"], axes=[2, 3]),
        node("GlobalAveragePool", ["d"], ["g"]),
    ]
    nodes = [*nodes[:5], nodes[6], nodes[5]]
    constants = {"w": normal(6, 4, 3, 3), **batch_norm(6, 2)}
    path = save(
        tmp_path / "old.onnx",
        nodes,
        {"x": [1, 4, 8, 8]},
        {"left": None, "right": None},
        constants,
        opset=9,
        ir_version=4,
        constants_as_inputs=True,
    )
    folded = fold(ir.load(path))
    assert [value.name for value in folded.graph.inputs] == ["x"]
    assert [value.name for value in folded.graph.outputs] == ["left", "right"]
    assert folded.opset_imports[""] == 17
    assert "BatchNormalization" not in operators(folded)
    assert "Dropout" not in operators(folded)
    assert all(n.name for n in folded.graph)
    feeds = {"x": normal(1, 4, 8, 8, seed=20)}
    assert sqnr(path, folded, feeds) > FOLDED_SQNR


def test_constant_expressions_and_identities_vanish(tmp_path: Path) -> None:
    nodes = [
        node("Shape", ["w"], ["s"]),
        node("ConstantOfShape", ["s"], ["zeros"]),
        node("Add", ["w", "zeros"], ["w2"]),
        node("Identity", ["x"], ["i"]),
        node("Conv", ["i", "w2"], ["c"]),
        node("Identity", ["c"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": [1, 4, 7, 7]}, {"y": None}, {"w": normal(6, 4, 3, 3)})
    folded = fold(ir.load(path))
    assert operators(folded) == ["Conv"]
    assert sqnr(path, folded, {"x": normal(1, 4, 7, 7, seed=20)}) == np.inf


@pytest.mark.parametrize(
    ("operator", "number", "expected"),
    [
        ("Add", 0.0, ["Log"]),
        ("Sub", 0.0, ["Log"]),
        ("Mul", 1.0, ["Log"]),
        ("Div", 1.0, ["Log"]),
        ("Add", 1e-9, ["Add", "Log"]),  # without it the logarithm would be one of zero
        ("Sub", -1e-15, ["Add", "Log"]),
        ("Mul", 1.0 + 1e-6, ["Mul", "Log"]),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_what_adds_zero_or_multiplies_by_one_vanishes_and_no_other(
    tmp_path: Path, operator: str, number: float, expected: list[str], shape: tuple[int, ...]
) -> None:
    nodes = [node(operator, ["x", "c"], ["s"]), node("Log", ["s"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"x": [None]}, {"y": None}, {"c": np.full(shape, number, np.float32)})
    folded = fold(ir.load(path))
    assert operators(folded) == expected
    x = np.array([0.0, 0.5, 2.0], dtype=np.float32)[0 if len(expected) == 2 and operator != "Mul" else 1 :]
    assert np.array_equal(Runner(model_bytes(folded)).run({"x": x})["y"], Runner(path).run({"x": x})["y"])


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("bias", [(6,), (1, 6), (1,), ()])
def test_gemm_has_no_factors_and_a_vector_bias(
    tmp_path: Path, alpha: float, beta: float, bias: tuple[int, ...]
) -> None:
    nodes = [node("Gemm", ["x", "w", "b"], ["y"], alpha=alpha, beta=beta)]
    constants = {"w": normal(4, 6), "b": np.asarray(normal(*bias, seed=3))}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 4]}, {"y": None}, constants)
    folded = fold(ir.load(path))
    gemm = folded.graph[0]
    assert (gemm.attributes.get_float("alpha", 1.0), gemm.attributes.get_float("beta", 1.0)) == (1.0, 1.0)
    assert gemm.inputs[2] is not None
    assert gemm.inputs[2].shape == ir.Shape((6,))
    assert sqnr(path, folded, {"x": normal(3, 4, seed=20)}) > FOLDED_SQNR


@pytest.mark.parametrize(("added", "expected"), [("b", ["Gemm"]), ("p", ["MatMul", "Add"])])
def test_a_product_and_another_sum_become_a_gemm(tmp_path: Path, added: str, expected: list[str]) -> None:
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", added], ["y"])]
    constants = {"w": normal(4, 6), "b": normal(6, seed=3)}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 4]}, {"y": None}, constants)
    folded = fold(ir.load(path))
    assert operators(folded) == expected
    assert sqnr(path, folded, {"x": normal(3, 4, seed=20)}) > FOLDED_SQNR


def test_a_shared_bias_is_given_to_each_layer(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w", "b"], ["c"]), node("Conv", ["c", "v", "b"], ["y"])]
    constants = {"w": normal(4, 4, 1, 1), "v": normal(4, 4, 1, 1, seed=1), "b": normal(4, seed=2)}
    path = save(tmp_path / "m.onnx", nodes, {"x": [1, 4, 7, 7]}, {"y": None}, constants)
    folded = fold(ir.load(path))
    biases = [n.inputs[2] for n in folded.graph]
    assert biases[0] is not biases[1]
    assert sqnr(path, folded, {"x": normal(1, 4, 7, 7, seed=20)}) == np.inf


def test_the_loaded_model_is_left_alone_and_nothing_local_leaks(tmp_path: Path) -> None:
    path = save(
        tmp_path / "m.onnx",
        [node("Conv", ["x", "w"], ["y"])],
        {"x": [1, 4, 7, 7]},
        {"y": None},
        {"w": normal(4, 4, 1, 1)},
    )
    model = ir.load(path)
    model.graph[0].metadata_props["stack"] = "/home/someone/model.py"
    model.graph[0].doc_string = "secret"
    before = model_bytes(model)
    folded = model_bytes(fold(model))
    assert model_bytes(model) == before
    assert b"someone" not in folded
    assert b"secret" not in folded


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    nodes = [node("QuantizeLinear", ["x", "s"], ["q"]), node("DequantizeLinear", ["q", "s"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"x": [1, 4]}, {"y": None}, {"s": np.array(0.1, dtype=np.float32)})
    with pytest.raises(ModelError, match="quantized already"):
        fold(ir.load(path))


def channels_last(*between: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Two convolutions as tf2onnx writes them where its optimizer gives up, with what stands between them, from l to z."""
    return [
        node("Transpose", ["x"], ["p"], perm=[0, 3, 1, 2]),
        node("Conv", ["p", "w"], ["c"]),
        node("Transpose", ["c"], ["l"], perm=[0, 2, 3, 1]),
        *between,
        node("Transpose", ["z"], ["f"], perm=[0, 3, 1, 2]),
        node("Conv", ["f", "v"], ["k"]),
        node("Transpose", ["k"], ["y"], perm=[0, 2, 3, 1]),
    ]


BETWEEN: dict[str, tuple[list[onnx.NodeProto], list[str]]] = {
    "a normalisation": (
        [node("Mul", ["l", "s"], ["m"]), node("Add", ["m", "b"], ["a"]), node("Clip", ["a", "low"], ["z"])],
        ["Clip"],
    ),
    "hard swish": (
        [
            node("Add", ["l", "three"], ["a"]),
            node("Clip", ["a", "low", "six"], ["h"]),
            node("Mul", ["l", "h"], ["z"]),
        ],
        ["Add", "Clip", "Mul"],
    ),
    "a gate": (
        [
            node("ReduceMean", ["l"], ["g"], axes=[1, 2]),
            node("Sigmoid", ["g"], ["h"]),
            node("Mul", ["l", "h"], ["m"]),
            node("Concat", ["m", "l"], ["t"], axis=-3),
            node("ReduceMean", ["t"], ["z"], axes=[2]),
        ],
        ["GlobalAveragePool", "Sigmoid", "Mul", "Concat", "ReduceMean"],
    ),
    "padding": ([node("Pad", ["l", "widths", "low"], ["z"])], []),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_transpositions_around_channels_last_arithmetic_vanish(tmp_path: Path, name: str) -> None:
    between, left = BETWEEN[name]
    constants: dict[str, Array] = {
        "w": normal(4, 3, 2, 2, seed=1),
        "v": normal(5, 4, 1, 1, seed=2),
        "s": normal(4, seed=3),
        "b": normal(1, 1, 4, seed=4),
        "low": np.array(0, dtype=np.float32),
        "six": np.array(6, dtype=np.float32),
        "three": np.array(3, dtype=np.float32),
        "widths": np.array([0, 1, 2, 0, 0, 3, 4, 0]),
    }
    path = save(tmp_path / "m.onnx", channels_last(*between), {"x": ["N", 6, 7, 3]}, {"y": None}, constants)
    folded = fold(ir.load(path))
    assert operators(folded) == ["Transpose", "Conv", *left, "Conv", "Transpose"]
    assert sqnr(path, folded, {"x": normal(2, 6, 7, 3, seed=5)}) > FOLDED_SQNR


LINE = [
    node("Conv", ["x", "w"], ["c"]),
    node("Squeeze", ["c"], ["q"], axes=[2]),
    node("Transpose", ["q"], ["t"], perm=[0, 2, 1]),
    node("Mul", ["t", "s"], ["m"]),
    node("Relu", ["m"], ["r"]),
]
# What stands behind a convolution over one axis, written as one over two, and what then is left.
BEHIND_LINE: dict[str, tuple[list[onnx.NodeProto], list[str]]] = {
    "another such": (
        [
            node("Unsqueeze", ["r"], ["u"], axes=[1]),
            node("Transpose", ["u"], ["p"], perm=[0, 3, 1, 2]),
            node("Conv", ["p", "v"], ["y"]),
        ],
        ["Conv", "Relu", "Squeeze", "Unsqueeze", "Conv"],
    ),
    "a pool over the other axis": (
        [
            node("Unsqueeze", ["r"], ["u"], axes=[2]),
            node("Transpose", ["u"], ["p"], perm=[0, 3, 1, 2]),
            node("MaxPool", ["p"], ["k"], kernel_shape=[2, 1]),
            node("Transpose", ["k"], ["n"], perm=[0, 2, 3, 1]),
            node("Squeeze", ["n"], ["d"], axes=[2]),
            node("Transpose", ["d"], ["y"], perm=[0, 2, 1]),
        ],
        ["Conv", "Relu", "Squeeze", "Unsqueeze", "MaxPool", "Squeeze"],
    ),
    "axes in another order": (
        [node("Unsqueeze", ["r"], ["u"], axes=[1]), node("Transpose", ["u"], ["y"], perm=[0, 2, 1, 3])],
        ["Conv", "Squeeze", "Transpose", "Mul", "Relu", "Unsqueeze", "Transpose"],
    ),
}


@pytest.mark.parametrize("name", BEHIND_LINE)
def test_transpositions_around_what_has_one_axis_vanish(tmp_path: Path, name: str) -> None:
    behind, left = BEHIND_LINE[name]
    constants = {"w": normal(4, 3, 1, 2, seed=1), "v": normal(5, 4, 1, 2, seed=2), "s": normal(4, seed=3)}
    nodes = [*LINE, *behind]
    used = {value for n in nodes for value in n.input}
    held = {key: value for key, value in constants.items() if key in used}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 1, 9]}, {"y": None}, held, opset=11)
    folded = fold(ir.load(path))
    assert operators(folded) == left
    assert sqnr(path, folded, {"x": normal(2, 3, 1, 9, seed=5)}) > FOLDED_SQNR


@pytest.mark.parametrize(
    ("last", "left"),
    [
        (node("ReduceMean", ["r"], ["y"], axes=[1, 2], keepdims=0), ["Relu", "GlobalAveragePool", "Squeeze"]),
        (node("ReduceMean", ["r"], ["y"], axes=[3], keepdims=0), ["Relu", "ReduceMean"]),
        (node("ReduceMean", ["r"], ["y"], axes=[1], keepdims=0), ["Transpose", "Relu", "ReduceMean"]),
        (node("Softmax", ["r"], ["y"]), ["Transpose", "Relu", "Softmax"]),
    ],
)
def test_a_transposition_stays_where_it_is_unless_it_vanishes(
    tmp_path: Path, last: onnx.NodeProto, left: list[str]
) -> None:
    nodes = [node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Relu", ["t"], ["r"]), last]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 4, 5]}, {"y": None}, {})
    folded = fold(ir.load(path))
    assert operators(folded) == left
    assert sqnr(path, folded, {"x": normal(2, 3, 4, 5, seed=5)}) > FOLDED_SQNR
