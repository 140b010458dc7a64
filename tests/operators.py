"""Small models of every operator of the rule table, and how tests convert and run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime

from quantcli import Conversion, convert
from quantcli.recipe import Recipe, Tune
from tests.graphs import Array, ints, node, normal, real, save, weight

Feeds = dict[str, Array]
Constants = dict[str, Any]  # arrays

SAMPLES = 6
RANGES = {"around zero": 0.0, "above zero": 4.0, "below zero": -4.0}


@dataclass(frozen=True)
class Case:
    """A model: its nodes, its constants, and what should become of it.

    Attributes:
        nodes: The nodes; inputs are named x and y, outputs o (and p).
        constants: The initializers.
        layers: The operators that become integer layers, in order.
        opsets: The operator sets to write it in.
        inputs: The shapes of the inputs, without the batch.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: Constants
    layers: tuple[str, ...]
    opsets: tuple[int, ...] = (13, 17, 20)
    inputs: tuple[tuple[int, ...], ...] = ((4, 8, 8),)

    @property
    def outputs(self) -> tuple[str, ...]:
        made = {name for n in self.nodes for name in n.output}
        return tuple(name for name in ("o", "p") if name in made)


def reals(*shape: int) -> Array:
    return normal(*shape, seed=2)


def case(
    *nodes: onnx.NodeProto,
    layers: str | None = None,
    opsets: tuple[int, ...] = (13, 17, 20),
    inputs: tuple[tuple[int, ...], ...] = ((4, 8, 8),),
    **constants: Array,
) -> Case:
    """Return a case of which every node becomes an integer layer, unless ``layers`` says otherwise."""
    expected = tuple(layers.split()) if layers is not None else tuple(n.op_type for n in nodes)
    return Case(nodes, constants, expected, opsets, inputs)


CONV = node("Conv", ["x", "w0", "b0"], ["c"])
W0: Constants = {"w0": weight(4, 4, 1, 1), "b0": weight(4)}


def behind(
    operator: str,
    inputs: Sequence[str] = ("c",),
    opsets: tuple[int, ...] = (13, 17, 20),
    layers: str | None = None,
    constants: Constants | None = None,
    **attributes: Any,
) -> Case:
    """An operator behind a convolution, whose output c is [N, 4, 8, 8]."""
    last = node(operator, inputs, ["o"], **attributes)
    return case(CONV, last, layers=layers, opsets=opsets, **W0, **(constants or {}))


def alone(operator: str, opsets: tuple[int, ...] = (13, 17, 20), **attributes: Any) -> Case:
    """An operator on the model's input."""
    return case(node(operator, ["x"], ["o"], **attributes), opsets=opsets)


def both(name: str, operator: str, opsets: tuple[int, ...] = (13, 17, 20), **attributes: Any) -> dict[str, Case]:
    """An operator on the model's input, and one between two convolutions."""
    inner = node(operator, ["c"], ["t"], **attributes)
    last = node("Conv", ["t", "w9"], ["o"])
    return {
        name: alone(operator, opsets, **attributes),
        f"{name}, between Convs": case(CONV, inner, last, opsets=opsets, **W0, w9=weight(5, 4, 1, 1)),
    }


def weighted(operator: str, shape: tuple[int, ...], bias: int | None = None, **attributes: Any) -> Case:
    """A layer with a weight on the model's input."""
    constants: Constants = {"w": weight(*shape)} | ({} if bias is None else {"b": weight(bias)})
    return case(node(operator, ["x", *constants], ["o"], **attributes), **constants)


def clamped(activation: onnx.NodeProto, **constants: Any) -> Case:
    """A convolution that absorbs the activation behind it, and a convolution behind that."""
    last = node("Conv", ["r", "w9"], ["o"])
    return case(CONV, activation, last, layers="Conv Conv", **W0, w9=weight(5, 4, 1, 1), **constants)


def gemm(c: Array | None = None, *, transposed: bool = False, **attributes: Any) -> Case:
    """Gemm of x [N, 12] and a constant."""
    constants: Constants = {"w": weight(5, 12) if transposed else weight(12, 5)} | ({} if c is None else {"b": c})
    last = node("Gemm", ["x", *constants], ["o"], transB=int(transposed), **attributes)
    return case(last, inputs=((12,),), **constants)


def two(operator: str, *shapes: tuple[int, ...]) -> Case:
    """An operator on two inputs."""
    return case(node(operator, ["x", "y"], ["o"]), inputs=shapes)


def moved(
    operator: str, constants: Constants | None = None, opsets: tuple[int, ...] = (13, 17, 20), **attributes: Any
) -> Case:
    """An operator that moves the model's input x itself, so with the range of the data, and one that computes with it."""
    constants = constants or {}
    first = node(operator, ["x", *constants], ["t"], **attributes)
    return case(first, node("Mul", ["t", "k"], ["o"]), opsets=opsets, k=real(1.7), **constants)


def paddings(mode: str) -> dict[str, Case]:
    """Pad behind a convolution, on the input, and in front of a pool."""
    pads: Constants = {"n": ints(0, 0, 1, 2, 0, 0, 2, 1)}
    pool = node("AveragePool", ["t"], ["o"], kernel_shape=[3, 3])
    return {
        f"Pad, {mode}": behind("Pad", ["c", "n"], constants=pads, mode=mode),
        f"Pad, {mode}, of the input": moved("Pad", pads, mode=mode),
        f"Pad, {mode}, pool": case(CONV, node("Pad", ["c", "n"], ["t"], mode=mode), pool, **W0, **pads),
    }


def resizes() -> dict[str, Case]:
    """Resize in every mode that stays within the range of its input."""
    found = {}
    for mode in ("nearest", "linear"):
        for how in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
            for scale in (2.0, 0.75):
                constants = {"f": np.array([1, 1, scale, scale], dtype=np.float32)}
                attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": how}
                found[f"Resize, {mode}, {how}, {scale}"] = behind(
                    "Resize", ["c", "", "f"], constants=constants, **attributes
                )
    kinds: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
        "nearest, ceil": ({"mode": "nearest", "nearest_mode": "ceil"}, (13, 17, 20)),
        "nearest, floor, asymmetric": (
            {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"},
            (13, 17, 20),
        ),
        "linear, antialias": ({"mode": "linear", "antialias": 1}, (18, 20)),
        "linear, half_pixel_symmetric": (
            {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"},
            (19, 20),
        ),
    }
    for name, (attributes, opsets) in kinds.items():
        constants = {"f": np.array([1, 1, 0.625, 1.375], dtype=np.float32)}
        found[f"Resize, {name}"] = behind("Resize", ["c", "", "f"], opsets, constants=constants, **attributes)
    for mode in ("nearest", "linear"):
        sized: Constants = {"n": ints(1, 2, 5, 11), "zero": ints(0, 0), "one": ints(1, 2), "axes": ints(0, 1)}
        first = node("Slice", ["x", "zero", "one", "axes"], ["k"])
        inner = node("Resize", ["k", "", "", "n"], ["t"], mode=mode)
        found[f"Resize, {mode}, sizes"] = case(
            first, inner, node("Conv", ["t", "w9"], ["o"]), **sized, w9=weight(3, 2, 1, 1)
        )
    return found


def poolings(operator: str, opsets: tuple[int, ...] = (13, 17, 20)) -> dict[str, Case]:
    """Pools of all kinds that both operators know."""
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "padded": {"pads": [1, 1, 1, 1]},
        "padded on one side": {"pads": [0, 0, 2, 1]},
        "strided": {"strides": [2, 2]},
        "ceil": {"strides": [2, 2], "ceil_mode": 1},
        "padded, ceil": {"strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
        "SAME_UPPER": {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        "SAME_LOWER": {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
    }
    return {
        f"{operator}, {kind}": behind(operator, opsets=opsets, kernel_shape=[3, 3], **attributes)
        for kind, attributes in kinds.items()
    }


PADDED: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
PICKED = {"i": ints(3, -1, 0)}
STEPS = {"s": ints(-1, 1), "e": ints(-100, 7), "a": ints(2, 3), "steps": ints(-2, 2)}

CASES: dict[str, Case] = {
    "Conv": weighted("Conv", (5, 4, 3, 3), 5),
    "Conv, no bias": weighted("Conv", (5, 4, 3, 3)),
    "Conv, strides": weighted("Conv", (5, 4, 3, 3), 5, strides=[2, 2]),
    "Conv, pads": weighted("Conv", (5, 4, 3, 3), 5, pads=[1, 1, 1, 1]),
    "Conv, pads on one side": weighted("Conv", (5, 4, 3, 3), 5, pads=[0, 2, 1, 0]),
    "Conv, groups": weighted("Conv", (6, 2, 3, 3), 6, group=2),
    "Conv, depthwise": weighted("Conv", (4, 1, 3, 3), 4, group=4, pads=[1, 1, 1, 1]),
    "Conv, depthwise, two each": weighted("Conv", (8, 1, 3, 3), 8, group=4),
    "Conv, dilations": weighted("Conv", (5, 4, 3, 3), 5, dilations=[2, 2]),
    "Conv, SAME_UPPER": weighted("Conv", (5, 4, 3, 3), 5, auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv, SAME_LOWER": weighted("Conv", (5, 4, 3, 3), 5, auto_pad="SAME_LOWER", strides=[2, 2]),
    "Conv, VALID": weighted("Conv", (5, 4, 3, 3), 5, auto_pad="VALID"),
    "Conv, 1-D": case(node("Conv", ["x", "w", "b"], ["o"]), inputs=((4, 9),), w=weight(5, 4, 3), b=weight(5)),
    "Conv, 3-D": case(node("Conv", ["x", "w"], ["o"]), inputs=((2, 4, 5, 6),), w=weight(3, 2, 2, 3, 2)),
    "Conv, Relu": clamped(node("Relu", ["c"], ["r"])),
    "Conv, Clip(0, 6)": clamped(node("Clip", ["c", "lo", "hi"], ["r"]), lo=real(0.0), hi=real(6.0)),
    "Conv, Clip within": clamped(node("Clip", ["c", "lo", "hi"], ["r"]), lo=real(-0.4), hi=real(0.5)),
    "Conv, padded by Pad": case(
        node("Pad", ["x", "n"], ["t"]),
        node("Conv", ["t", "w"], ["o"]),
        layers="Conv",
        n=ints(0, 0, 1, 1, 0, 0, 1, 1),
        w=weight(5, 4, 3, 3),
    ),
    "ConvTranspose": weighted("ConvTranspose", (4, 5, 3, 3), 5, strides=[2, 2]),
    "ConvTranspose, no bias": weighted("ConvTranspose", (4, 5, 3, 3), pads=[1, 1, 1, 1]),
    "ConvTranspose, groups": weighted("ConvTranspose", (4, 3, 3, 3), 6, group=2, strides=[2, 2]),
    "ConvTranspose, output_padding": weighted(
        "ConvTranspose", (4, 5, 3, 3), 5, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]
    ),
    "ConvTranspose, output_shape": weighted("ConvTranspose", (4, 5, 3, 3), 5, strides=[2, 2], output_shape=[16, 15]),
    "ConvTranspose, dilations": weighted("ConvTranspose", (4, 5, 3, 3), dilations=[2, 2]),
    "ConvTranspose, SAME_UPPER": weighted("ConvTranspose", (4, 5, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    "Gemm": gemm(),
    "Gemm, transB": gemm(transposed=True),
    "Gemm, C": gemm(reals(5)),
    "Gemm, transB, C": gemm(reals(5), transposed=True),
    "Gemm, C of one row": gemm(reals(1, 5)),
    "Gemm, C of one value": gemm(reals(1)),
    "Gemm, scalar C": gemm(real(0.5)),
    "Gemm, alpha": gemm(alpha=0.5),
    "Gemm, alpha, beta": gemm(reals(5), alpha=0.5, beta=2.0),
    "Gemm, transB, alpha, beta, scalar C": gemm(real(0.5), transposed=True, alpha=2.0, beta=-0.5),
    "Gemm, a computed C": case(
        node("Gemm", ["x", "w", "y"], ["o"]), layers="Gemm Add", inputs=((8,), (5,)), w=weight(8, 5)
    ),
    "Gemm, beta 0": gemm(reals(5), beta=0.0),
    "MatMul": case(node("MatMul", ["x", "w"], ["o"]), inputs=((12,),), w=weight(12, 5)),
    "MatMul and Add": case(
        node("MatMul", ["x", "w"], ["t"]),
        node("Add", ["t", "b"], ["o"]),
        layers="Gemm",
        inputs=((12,),),
        w=weight(12, 5),
        b=weight(5),
    ),
    "MatMul, 3-D": case(node("MatMul", ["x", "w"], ["o"]), inputs=((7, 12),), w=weight(12, 5)),
    "MatMul, 3-D, and Add": case(
        node("MatMul", ["x", "w"], ["t"]),
        node("Add", ["t", "b"], ["o"]),
        layers="Reshape Gemm Reshape",
        inputs=((7, 12),),
        w=weight(12, 5),
        b=weight(5),
    ),
    "MatMul, a stack of constants": case(node("MatMul", ["x", "w"], ["o"]), w=weight(4, 8, 5)),
    "MatMul, a constant first": case(node("MatMul", ["w", "x"], ["o"]), w=weight(5, 8)),
    "MatMul, two activations": two("MatMul", (7, 12), (12, 5)),
    **{
        f"{op}, a constant": behind(
            op, ["c", "k"], layers=f"Conv {op.replace('Sub', 'Add')}", constants={"k": reals(4, 8, 1)}
        )
        for op in ("Add", "Sub", "Mul")
    },
    **{
        f"{op}, a constant per channel": behind(op, ["c", "k"], layers="Conv", constants={"k": reals(4, 1, 1)})
        for op in ("Add", "Sub", "Mul")
    },
    **{f"{op}, a scalar": behind(op, ["k", "c"], layers="Conv", constants={"k": real(1.7)}) for op in ("Add", "Mul")},
    "Sub, from a scalar": behind("Sub", ["k", "c"], constants={"k": real(1.7)}),
    **{f"{op}, two inputs": two(op, (4, 8, 8), (4, 8, 8)) for op in ("Add", "Sub", "Mul")},
    **{f"{op}, broadcast": two(op, (4, 1, 8), (1, 8, 1)) for op in ("Add", "Sub", "Mul")},
    **{f"{op}, with itself": behind(op, ["c", "c"]) for op in ("Add", "Sub", "Mul")},
    **{
        f"{op}, Relu": case(
            CONV,
            node(op, ["c", "y"], ["t"]),
            node("Relu", ["t"], ["o"]),
            layers=f"Conv {op}",
            inputs=((4, 8, 8), (4, 8, 8)),
            **W0,
        )
        for op in ("Add", "Sub", "Mul")
    },
    "Concat": case(CONV, node("Sigmoid", ["c"], ["s"]), node("Concat", ["c", "s", "x"], ["o"], axis=1), **W0),
    "Concat, two inputs": case(node("Concat", ["x", "y"], ["o"], axis=-1), inputs=((4, 8), (4, 3))),
    "Concat, a constant": case(CONV, node("Concat", ["c", "k"], ["o"], axis=0), **W0, k=reals(1, 4, 8, 8)),
    "Split": case(CONV, node("Split", ["c"], ["o", "p"], axis=1), **W0, opsets=(13, 17)),
    "Split, sizes": case(CONV, node("Split", ["c", "n"], ["o", "p"], axis=1), **W0, n=ints(1, 3)),
    "Split, num_outputs": case(CONV, node("Split", ["c"], ["o", "p"], axis=1, num_outputs=2), **W0, opsets=(18, 20)),
    "Split, one output read": case(
        node("Split", ["x", "n"], ["t", "u"], axis=1),
        node("Conv", ["u", "w"], ["o"]),
        n=ints(1, 3),
        w=weight(5, 3, 1, 1),
    ),
    **paddings("constant"),
    **paddings("reflect"),
    **paddings("edge"),
    "Pad, zero given": behind("Pad", ["c", "n", "z"], constants={"n": ints(0, 0, 1, 2, 0, 0, 2, 1), "z": real(0.0)}),
    "Pad, negative": behind("Pad", ["c", "n"], constants={"n": ints(0, 0, -1, 2, 0, 0, 2, -1)}),
    "Pad, axes": behind("Pad", ["c", "n", "", "a"], (18, 20), constants={"n": ints(1, 2), "a": ints(3)}),
    **resizes(),
    **poolings("MaxPool"),
    "MaxPool, dilations": behind("MaxPool", kernel_shape=[2, 2], dilations=[2, 3]),
    "MaxPool, of the input": moved("MaxPool", **PADDED),
    **poolings("AveragePool"),
    "AveragePool, pads counted": behind("AveragePool", count_include_pad=1, **PADDED),
    "AveragePool, pads counted, on one side": behind(
        "AveragePool", count_include_pad=1, kernel_shape=[3, 3], pads=[0, 0, 2, 1]
    ),
    "AveragePool, pads counted, SAME_UPPER": behind(
        "AveragePool", count_include_pad=1, kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"
    ),
    "AveragePool, pads counted, ceil, none": behind(
        "AveragePool", kernel_shape=[3, 3], strides=[2, 2], count_include_pad=1, ceil_mode=1
    ),
    "AveragePool, dilations of 1": behind("AveragePool", opsets=(19, 20), kernel_shape=[3, 3], dilations=[1, 1]),
    "AveragePool, 1-D": case(node("AveragePool", ["x"], ["o"], kernel_shape=[3], pads=[1, 1]), inputs=((4, 9),)),
    "AveragePool, 3-D": case(node("AveragePool", ["x"], ["o"], kernel_shape=[2, 2, 2]), inputs=((2, 4, 5, 6),)),
    "AveragePool, of the input": alone("AveragePool", **PADDED),
    **both("GlobalAveragePool", "GlobalAveragePool"),
    "GlobalAveragePool, 1-D": case(node("GlobalAveragePool", ["x"], ["o"]), inputs=((4, 9),)),
    "ReduceMean": behind("ReduceMean", opsets=(13, 17), axes=[2, 3], keepdims=1, layers="Conv GlobalAveragePool"),
    "ReduceMean, keepdims 0": behind(
        "ReduceMean", opsets=(13, 17), axes=[2, 3], keepdims=0, layers="Conv GlobalAveragePool Squeeze"
    ),
    "ReduceMean, other axes": behind("ReduceMean", opsets=(13, 17), axes=[1, 3], keepdims=0),
    "ReduceMean, axes as operand": behind("ReduceMean", ["c", "a"], (18, 20), constants={"a": ints(1, -1)}, keepdims=1),
    "ReduceMean, axes as operand, keepdims 0": behind(
        "ReduceMean", ["c", "a"], (18, 20), constants={"a": ints(2)}, keepdims=0
    ),
    "ReduceMean, all axes": behind("ReduceMean"),
    "ReduceMean, no axes, nothing to do": behind("ReduceMean", opsets=(18, 20), noop_with_empty_axes=1),
    "ReduceSum, axes as operand": behind("ReduceSum", ["c", "a"], constants={"a": ints(1, -1)}, keepdims=1),
    "ReduceSum, one axis, keepdims 0": behind("ReduceSum", ["c", "a"], constants={"a": ints(1)}, keepdims=0),
    "ReduceSum, of the input": case(node("ReduceSum", ["x", "a"], ["o"]), a=ints(2)),
    **{f"{op}, two inputs": two(op, (4, 8, 8), (4, 8, 8)) for op in ("Max", "Min")},
    **{f"{op}, spread": two(op, (4, 8, 8), (4, 1, 1)) for op in ("Max", "Min")},
    **{
        f"{op}, a constant for each channel": behind(op, ["k", "c"], constants={"k": weight(4, 1, 1)})
        for op in ("Max", "Min")
    },
    **{
        f"{op}, of three": case(
            CONV, node(op, ["c", "x", "k"], ["o"]), layers=f"Conv {op} {op}", **W0, k=weight(4, 1, 1)
        )
        for op in ("Max", "Min")
    },
    "PRelu": behind("PRelu", ["c", "k"], constants={"k": np.abs(weight(4, 1, 1))}),
    "PRelu, with the batch's axis": behind("PRelu", ["c", "k"], constants={"k": np.abs(weight(1, 4, 1, 1))}),
    "PRelu, falling, flat and steep": behind(
        "PRelu", ["c", "k"], constants={"k": np.array([-0.5, 0, 0.1, 1.5], np.float32).reshape(4, 1, 1)}
    ),
    "PRelu, of the input": case(node("PRelu", ["x", "k"], ["o"]), k=np.abs(weight(4, 1, 1))),
    "PRelu, between Convs": case(
        CONV,
        node("PRelu", ["c", "k"], ["t"]),
        node("Conv", ["t", "w9"], ["o"]),
        **W0,
        k=np.abs(weight(4, 1, 1)),
        w9=weight(5, 4, 1, 1),
    ),
    "PRelu, of rows": case(node("PRelu", ["x", "k"], ["o"]), inputs=((5,),), k=np.abs(weight(5))),
    **both("Softmax", "Softmax", axis=1),
    "Softmax, last axis": behind("Softmax"),
    **both("Sigmoid", "Sigmoid"),
    **both("Tanh", "Tanh"),
    **both("HardSigmoid", "HardSigmoid"),
    "HardSigmoid, steeper": behind("HardSigmoid", alpha=0.5, beta=0.3),
    **both("HardSwish", "HardSwish", opsets=(14, 17, 20)),
    **both("LeakyRelu", "LeakyRelu"),
    "LeakyRelu, falling": behind("LeakyRelu", alpha=-0.5),
    "Relu, of the input": alone("Relu"),
    "Relu, of a tensor with two readers": case(CONV, node("Relu", ["c"], ["r"]), node("Sub", ["r", "c"], ["o"]), **W0),
    "Relu, of an output": case(node("Conv", ["x", "w0", "b0"], ["o"]), node("Relu", ["o"], ["p"]), **W0),
    "Clip, only a min": case(node("Clip", ["x", "lo"], ["o"]), lo=real(-0.5)),
    "Clip, only a max": case(node("Clip", ["x", "", "hi"], ["o"]), hi=real(0.5)),
    "Clip, of a tensor with two readers": case(
        CONV, node("Clip", ["c", "lo"], ["r"]), node("Add", ["r", "c"], ["o"]), **W0, lo=real(-0.3)
    ),
    "Gather": behind("Gather", ["c", "i"], constants=PICKED, axis=1),
    "Gather, of the input": moved("Gather", PICKED, axis=2),
    "Gather, one": behind("Gather", ["c", "i"], constants={"i": np.array(2)}, axis=2),
    "Gather, of a constant": case(
        node("ArgMax", ["x"], ["i"], axis=2, keepdims=0),
        node("Gather", ["k", "i"], ["t"]),
        node("MatMul", ["t", "w"], ["o"]),
        layers="Gather MatMul",
        k=reals(8, 8),
        w=weight(8, 5),
    ),
    "Slice": behind("Slice", ["c", *STEPS], constants=STEPS),
    "Slice, of the input": moved("Slice", STEPS),
    "Transpose": behind("Transpose", perm=[0, 2, 3, 1]),
    "Transpose, of the input": moved("Transpose", perm=[0, 3, 1, 2]),
    "Reshape": behind("Reshape", ["c", "n"], constants={"n": ints(0, -1, 16)}),
    "Reshape, of the input": moved("Reshape", {"n": ints(-1, 16)}),
    "Flatten": behind("Flatten"),
    "Flatten, of the input": moved("Flatten", axis=2),
    "Unsqueeze": behind("Unsqueeze", ["c", "a"], constants={"a": ints(1, -1)}),
    "Squeeze": case(
        CONV,
        node("MaxPool", ["c"], ["t"], kernel_shape=[8, 8]),
        node("Squeeze", ["t", "a"], ["u"]),
        node("Gemm", ["u", "w9"], ["o"]),
        **W0,
        a=ints(2, 3),
        w9=weight(4, 5),
    ),
    "DepthToSpace": behind("DepthToSpace", blocksize=2),
    "DepthToSpace, CRD": behind("DepthToSpace", blocksize=2, mode="CRD"),
    "DepthToSpace, of the input": moved("DepthToSpace", blocksize=2),
}


def session(model: bytes, *, fused: bool) -> Any:
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def ran(model: bytes, feeds: Feeds, outputs: Sequence[str], *, fused: bool = False) -> Feeds:
    """Run a model and return the outputs by name."""
    given = session(model, fused=fused)
    return dict(zip(outputs, given.run(list(outputs), feeds), strict=True))


def data(shapes: Sequence[tuple[int, ...]], offset: float) -> Feeds:
    """Seeded samples of x and y; y lies on the other side of zero and is narrower."""
    x = {name: normal(SAMPLES, *shape, seed=5 + i) for i, (name, shape) in enumerate(zip("xy", shapes, strict=False))}
    return {name: (v + real(offset)) * real(1.0 if name == "x" else -0.3) for name, v in x.items()}


def converted(
    folder: Path, case: Case, opset: int, feeds: Feeds, recipe: Recipe | None = None
) -> tuple[Path, Conversion]:
    model = save(
        folder / "m.onnx",
        case.nodes,
        {name: ["N", *shape] for name, shape in zip("xy", case.inputs, strict=False)},
        dict.fromkeys(case.outputs),
        case.constants,
        opset=opset,
    )
    np.savez(folder / "d.npz", **feeds)  # type: ignore[arg-type]
    # Bounds are those of rounding to nearest within what calibration saw; tuning trades both for the error of the outputs.
    recipe = recipe or Recipe(tune=Tune(effort="fast"))
    everywhere = msgspec.structs.replace(recipe, layers=msgspec.structs.replace(recipe.layers, everywhere=True))
    return model, convert(model, folder / "q.onnx", data=folder / "d.npz", recipe=everywhere)


def sqnr(expected: Array, found: Array) -> float:
    noise = np.square(found.astype(np.float64) - expected).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / noise)) if noise else np.inf
