"""Every operator of the rule table in small models: what becomes an integer layer, and how far from float it may end.

Three runs of each model are compared: the float model, and the quantized one in ONNX Runtime with all its fusions and with none.
How far they may lie apart is derived, element by element, and follows the model from its input on (`Deviation`):

* from float: half a step wherever a tensor, a weight or a bias is rounded, carried through every operator that follows;
* between the two runs: nothing but rounding can differ, since integers are exact and the reals before rounding differ only in
  float32 noise: one step where a layer rounds (a tie may go either way), carried on in the same way, and nothing where integers
  only move. A tie needs an exact value within float32 noise of one, so few elements may differ at all.

The bounds are worst cases: a mean over 64 values hides a step of its own in them, which the comparison with the integer executor
(tests/integer) does not let pass. They follow from the plan's own scales, so they cannot see a scale that is too wide; a floor for
the SQNR does that: a tensor of 8 bits that is uniform over its range has 6.02·8 = 48 dB, a normal one that fills its range at 3 to
4 sigma about 10 dB less, and the roundings of up to four tensors and a weight on the way to the output cost up to 7 dB more. 25 dB
leave 6 dB for data that fills its range badly; one bit too few in any place costs 6 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from quantcli import Conversion, convert
from quantcli.fold import fold
from quantcli.plan import Plan
from quantcli.probe import with_outputs
from quantcli.recipe import Layers, Recipe, Tune
from quantcli.rules import RULES, Arithmetic, Operand
from tests.graphs import Array, node, normal, save
from tests.integer import test_layers

Feeds = dict[str, Array]
Constants = dict[str, Any]  # arrays

SAMPLES = 6
SQNR_FLOOR = 25.0
# Float32 noise where a real is rounded: of up to 256 steps, after some hundred additions, each off by 2^-24 of the sum of
# magnitudes (up to eight times the result here): 2^8 · 2^7 · 2^-24 · 2^3 = 2^-6 of a step at the very worst.
NOISE = 2.0**-6
# How many elements may lie on a tie: noise is typically 2^-12 of a step (the square roots of the figures above), a tie can be
# missed from both sides, and up to four layers round: 4 · 2 · 2^-12, two in a thousand. One element may always, of small outputs.
TIES = 0.002
# The mean bound, as a part of the span of the values that it bounds: above, nothing would be tested.
LOOSEST = 0.1


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


def ints(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


def real(value: float) -> Array:
    return np.array(value, dtype=np.float32)


def weight(*shape: int) -> Array:
    return normal(*shape, seed=1, scale=0.3)


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
        f"{op}, Relu": case(CONV, node(op, ["c", "x"], ["t"]), node("Relu", ["t"], ["o"]), layers=f"Conv {op}", **W0)
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

# What an error in the input becomes at most: the largest slope; of softmax, half the largest error (its Jacobian diag(p) − p·pᵀ has
# row sums of magnitudes of 2p(1−p) ≤ 1/2); of x·clip(x/6 + 1/2, 0, 1), 3/2, at x = 3.
SLOPES: dict[str, Callable[[dict[str, float]], float]] = {
    "Relu": lambda _: 1.0,
    "Clip": lambda _: 1.0,
    "LeakyRelu": lambda a: max(1.0, abs(a.get("alpha", 0.01))),
    "HardSwish": lambda _: 1.5,
    "HardSigmoid": lambda a: a.get("alpha", 0.2),
    "Sigmoid": lambda _: 0.25,
    "Tanh": lambda _: 1.0,
    "Softmax": lambda _: 0.5,
}
BILINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Mul"}


class Deviation:
    """How far every tensor of a folded model can lie from what it should be, element by element.

    Args:
        folded: The float model as it was planned.
        plan: Its plan.
        feeds: The inputs.
        around: None to compare with the float model. To compare two runs of the quantized model, how far those lie from float:
            constants are the same then, and a layer's rounding may go either way, a whole step instead of half of one.
    """

    def __init__(self, folded: ir.Model, plan: Plan, feeds: Feeds, around: Feeds | None = None) -> None:
        self.plan, self.ties = plan, around is not None
        proto = ir.to_proto(folded)
        self.opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
        constants = {entry.name: np.array(numpy_helper.to_array(entry)) for entry in proto.graph.initializer}
        names = [name for n in proto.graph.node for name in n.output]
        self.values = {**feeds, **constants, **ran(only_bytes(with_outputs(folded, names)), feeds, names)}
        self.magnitudes = {n: np.asarray(np.abs(v) + (around or {}).get(n, 0), v.dtype) for n, v in self.values.items()}
        self.bounds = {
            name: self.rounding(name, np.zeros_like(values)) for name, values in (*feeds.items(), *constants.items())
        }
        operators = {name: layer for layer in plan.layers for name in layer.outputs}
        for n in proto.graph.node:
            if n.op_type not in RULES:  # indices: the same in every run
                continue
            carried = dict(zip(n.output, self.carried(n), strict=True))
            for name, bound in carried.items():
                exact = name in operators and operators[name].arithmetic is Arithmetic.MOVE and not interpolates(n)
                self.bounds[name] = bound if exact else self.rounding(name, bound, output=True)

    def rounding(self, name: str, carried: Array, *, output: bool = False) -> Array:
        """Return a bound with what rounding adds to it: half a step (a whole one at the end of a fixed range), or a tie."""
        tensor = self.plan.tensors.get(name)
        if tensor is None or carried.dtype != np.float32 or (self.ties and not output):
            return carried
        shape = [1] * carried.ndim
        if tensor.axis is not None:
            shape[tensor.axis] = -1
        step = np.array(tensor.scale, dtype=np.float64).reshape(shape)
        rule = next((RULES[layer.operator] for layer in self.plan.layers if name in layer.outputs), None)
        steps = 1.0 if self.ties or (rule is not None and rule.output is Operand.FIXED) else 0.5
        return np.asarray(carried + step * (steps + NOISE * output), dtype=np.float32)

    def carried(self, n: onnx.NodeProto) -> list[Array]:
        """Return what the deviations of an operator's operands become in its outputs."""
        exact, off, plain = ([of.get(name) for name in n.input] for of in (self.magnitudes, self.bounds, self.values))
        attributes = {a.name: helper.get_attribute_value(a) for a in n.attribute}
        if n.op_type in BILINEAR:
            rest = [np.zeros_like(v) for v in exact[2:] if v is not None]
            wider = np.asarray(exact[1] + off[1], dtype=np.float32)  # type: ignore[operator]
            return [self.run(n, [exact[0], *off[1:]])[0] + self.run(n, [off[0], wider, *rest])[0]]
        if n.op_type in {"Add", "Sub"}:
            return [np.asarray(off[0] + off[1])]  # type: ignore[operator]
        if n.op_type in SLOPES:
            bound = np.asarray(off[0])
            worst = np.full_like(bound, bound.max()) if n.op_type == "Softmax" else bound
            return [worst * np.float32(SLOPES[n.op_type](attributes))]
        if n.op_type in {"Max", "Min"}:
            return [np.maximum(off[0], off[1])]  # type: ignore[arg-type]
        if n.op_type == "PRelu":
            return [np.asarray(off[0] * np.maximum(1, np.abs(exact[1])))]  # type: ignore[arg-type,operator]
        # What is left moves values, or takes means, sums or maxima: with no weight below zero an operator bounds itself.
        data = len(n.input) if RULES[n.op_type].variadic else 1
        return self.run(n, off[:data] + plain[data:])

    def run(self, n: onnx.NodeProto, operands: Sequence[Array | None]) -> list[Array]:
        """Run one operator by itself."""
        feeds = {
            name: v for name, v in zip([f"i{k}" for k in range(len(operands))], operands, strict=True) if v is not None
        }
        copy = onnx.NodeProto()
        copy.CopyFrom(n)
        del copy.input[:]
        copy.input.extend(f"i{k}" if v is not None else "" for k, v in enumerate(operands))
        graph = helper.make_graph(
            [copy],
            "one",
            [
                helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                for k, v in feeds.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in n.output],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return list(ran(model.SerializeToString(), feeds, list(n.output)).values())


def interpolates(n: onnx.NodeProto) -> bool:
    return n.op_type == "Resize" and any(a.name == "mode" and a.s == b"linear" for a in n.attribute)


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


def only_bytes(model: object) -> bytes:
    """What is below 2 GB is bytes."""
    assert isinstance(model, bytes)
    return model


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


RANGES = {"around zero": 0.0, "above zero": 4.0, "below zero": -4.0}


@pytest.mark.parametrize("side", RANGES)
@pytest.mark.parametrize("name", CASES)
def test_operator(tmp_path: Path, name: str, side: str) -> None:
    wanted = CASES[name]
    opset = wanted.opsets[list(RANGES).index(side) % len(wanted.opsets)]
    feeds = data(wanted.inputs, RANGES[side])
    model, done = converted(tmp_path, wanted, opset, feeds)
    assert tuple(layer.operator for layer in done.plan.layers) == wanted.layers
    assert [entry.operator for entry in done.plan.floats] == []

    written = done.model.read_bytes()
    given = session(written, fused=True)
    assert [v.name for v in given.get_inputs()] == list(feeds)
    assert [v.name for v in given.get_outputs()] == list(wanted.outputs)

    expected = ran(model.read_bytes(), feeds, wanted.outputs)
    fused, plain = (ran(written, feeds, wanted.outputs, fused=how) for how in (True, False))
    folded = fold(ir.load(model))
    from_float = Deviation(folded, done.plan, feeds).bounds
    between = Deviation(folded, done.plan, feeds, from_float).bounds
    for output in wanted.outputs:
        reals, allowed = expected[output].astype(np.float64), from_float[output]
        if side == "around zero" and np.ptp(reals):
            assert allowed.mean() <= LOOSEST * np.ptp(reals)
        for found in (plain[output], fused[output]):
            assert found.shape == reals.shape
            assert (np.abs(found - reals) <= allowed).all()
            assert sqnr(reals, found) >= SQNR_FLOOR
        apart = np.abs(fused[output].astype(np.float64) - plain[output])
        assert (apart <= between[output]).all()
        assert (apart > 0).sum() <= max(1, TIES * apart.size)


def test_every_operator_of_the_table_has_a_case() -> None:
    elsewhere = {n.op_type for nodes, _, _ in test_layers.CASES.values() for n in nodes}
    assert {operator for wanted in CASES.values() for operator in wanted.layers} | elsewhere >= set(RULES)


@pytest.mark.parametrize(
    ("name", "constant", "by"),
    [
        ("Relu, of the input", "x_zero_point", 1),
        ("Conv", "w_quantized", 16),
        ("Conv", "b_quantized", 2000),
        ("Pad, constant", "c_zero_point", 1),
        ("Add, two inputs", "y_zero_point", 1),
        ("GlobalAveragePool", "o_zero_point", 16),
    ],
)
def test_the_bound_catches_a_wrong_number(tmp_path: Path, name: str, constant: str, by: int) -> None:
    wanted = CASES[name]
    feeds = data(wanted.inputs, 0.0)
    model, done = converted(tmp_path, wanted, 17, feeds)
    changed = onnx.load(done.model)
    values = np.array(next(numpy_helper.to_array(t) for t in changed.graph.initializer if t.name == constant))
    first = int(values.flat[0])
    values.flat[0] = first - by if first > 0 else first + by
    changed.graph.initializer.append(numpy_helper.from_array(values, "wrong"))
    reader = next(n for n in changed.graph.node if constant in n.input)
    reader.input[list(reader.input).index(constant)] = "wrong"
    allowed = Deviation(fold(ir.load(model)), done.plan, feeds).bounds["o"]
    found = ran(changed.SerializeToString(), feeds, ["o"])["o"]
    assert (np.abs(found - ran(model.read_bytes(), feeds, ["o"])["o"]) > allowed).any()


def refused(*nodes: onnx.NodeProto, layers: str = "Conv", **constants: Any) -> Case:
    """A case behind a convolution, where something stays float."""
    return case(CONV, *nodes, layers=layers, **W0, **constants)


TWICE = np.array([1, 1, 2, 2], dtype=np.float32)
RING = ints(0, 0, 1, 1, 0, 0, 1, 1)
SHAPED = node("Reshape", ["c", "n"], ["t"])

# A case, the operator in it that is refused, and how its reason begins.
REFUSED: dict[str, tuple[Case, str, str]] = {
    "Pad, another value": (
        refused(node("Pad", ["c", "n", "v"], ["o"]), n=RING, v=real(1.0)),
        "Pad",
        "it pads with a value other than zero",
    ),
    "Pad, a computed value": (
        refused(node("ReduceMax", ["x"], ["v"], keepdims=0), node("Pad", ["c", "n", "v"], ["o"]), n=RING),
        "Pad",
        "it pads with a value other than zero",
    ),
    "Resize, cubic": (
        refused(node("Resize", ["c", "", "f"], ["o"], mode="cubic"), f=TWICE),
        "Resize",
        "cubic interpolation leaves the range of its input",
    ),
    "Resize, tf_crop_and_resize": (
        refused(
            node(
                "Resize", ["c", "roi", "f"], ["o"], mode="linear", coordinate_transformation_mode="tf_crop_and_resize"
            ),
            roi=np.array([0, 0, 0, 0, 1, 1, 1.5, 1], dtype=np.float32),
            f=TWICE,
        ),
        "Resize",
        "it fills what lies outside with a value of its own",
    ),
    "Clip, computed bounds": (
        refused(node("ReduceMin", ["x"], ["v"], keepdims=0), node("Clip", ["c", "v"], ["o"])),
        "Clip",
        "its bounds are not constant",
    ),
    "Gemm, transA": (
        refused(
            SHAPED, node("Gemm", ["t", "w"], ["o"], transA=1), layers="Conv Reshape", n=ints(8, -1), w=weight(8, 5)
        ),
        "Gemm",
        "its first operand is transposed",
    ),
    "Gemm, a computed B": (
        refused(
            SHAPED,
            node("ReduceMax", ["x"], ["m"], keepdims=0),
            node("Div", ["w", "m"], ["v"]),
            node("Gemm", ["t", "v"], ["o"], alpha=0.5),
            layers="Conv Reshape",
            n=ints(-1, 8),
            w=weight(8, 5),
        ),
        "Gemm",
        "its weight is not constant",
    ),
    "Gemm, a computed C, beta": (
        refused(
            SHAPED,
            node("Slice", ["t", "zero", "five", "one"], ["s"]),
            node("Gemm", ["t", "w", "s"], ["o"], beta=2.0),
            layers="Conv Reshape Slice",
            n=ints(-1, 8),
            zero=ints(0),
            five=ints(5),
            one=ints(1),
            w=weight(8, 5),
        ),
        "Gemm",
        "its bias is not constant",
    ),
    "PRelu, computed slopes": (
        refused(node("ReduceMax", ["x"], ["m"], axes=[0, 2, 3]), node("PRelu", ["c", "m"], ["o"])),
        "PRelu",
        "its slopes are not constant",
    ),
    "PRelu, slopes along the width": (
        refused(node("PRelu", ["c", "k"], ["o"]), k=weight(8)),
        "PRelu",
        "its slopes are not one per channel",
    ),
    "Max, of one": (refused(node("Max", ["c"], ["o"])), "Max", "it has one operand"),
    "Conv, a computed weight": (
        refused(
            node("ReduceMax", ["x"], ["m"], keepdims=0),
            node("Div", ["w", "m"], ["v"]),
            node("Conv", ["c", "v"], ["o"]),
            w=weight(5, 4, 1, 1),
        ),
        "Conv",
        "its weight is not constant",
    ),
    "Conv, a computed bias": (
        refused(
            node("ReduceMax", ["x"], ["m"], axes=[0, 2, 3], keepdims=0),
            node("Conv", ["c", "w", "m"], ["o"]),
            w=weight(4, 4, 1, 1),
        ),
        "Conv",
        "its bias is not constant",
    ),
    "MaxPool, with Indices": (
        refused(
            node("MaxPool", ["c"], ["o", "i"], kernel_shape=[2, 2]), node("Cast", ["i"], ["p"], to=TensorProto.FLOAT)
        ),
        "MaxPool",
        "its second output is used",
    ),
    "AveragePool, pads counted, ceil": (
        refused(
            node(
                "AveragePool",
                ["c"],
                ["o"],
                kernel_shape=[3, 3],
                strides=[2, 2],
                pads=[1, 1, 1, 1],
                count_include_pad=1,
                ceil_mode=1,
            )
        ),
        "AveragePool",
        "ONNX Runtime's kernels disagree",
    ),
    "AveragePool, dilations": (
        refused(node("AveragePool", ["c"], ["o"], kernel_shape=[3, 3], dilations=[2, 2]), opsets=(19,)),
        "AveragePool",
        "its windows are dilated",
    ),
    "an operator without a rule": (refused(node("Exp", ["c"], ["o"])), "Exp", "no rule for this operator"),
    "an island": (refused(node("Exp", ["c"], ["e"]), node("LeakyRelu", ["e"], ["o"])), "LeakyRelu", "an island"),
    "a move of floats": (
        refused(node("Exp", ["c"], ["e"]), node("Flatten", ["e"], ["o"])),
        "Flatten",
        "its data is float",
    ),
    "a move of the input to an output": (
        refused(node("Add", ["c", "x"], ["o"]), node("Transpose", ["x"], ["p"]), layers="Conv Add"),
        "Transpose",
        "its data is float",
    ),
}


def plain_opset(wanted: Case) -> int:
    """Return 17, or the oldest operator set that a case needs."""
    return 17 if 17 in wanted.opsets else wanted.opsets[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_stays_float_and_works(tmp_path: Path, name: str) -> None:
    wanted, operator, reason = REFUSED[name]
    feeds = data(wanted.inputs, 0.0)
    model, done = converted(tmp_path, wanted, plain_opset(wanted), feeds)
    assert tuple(layer.operator for layer in done.plan.layers) == wanted.layers
    found = [entry.reason for entry in done.plan.floats if entry.operator == operator]
    assert len(found) == 1
    assert found[0].startswith(reason)
    written = done.model.read_bytes()
    expected = ran(model.read_bytes(), feeds, ["o"])["o"]
    for how in (True, False):
        assert sqnr(expected, ran(written, feeds, ["o"], fused=how)["o"]) >= SQNR_FLOOR


def followed(wanted: Case, columns: int) -> Case:
    """Return a case with an integer layer behind its output."""
    last = node("MatMul", ["inner", "w8"], ["o"])
    nodes = []
    for n in wanted.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(n)
        copy.output[:] = ["inner" if name == "o" else name for name in n.output]
        copy.name = f"{copy.output[0]}_node"
        nodes.append(copy)
    return case(*nodes, last, opsets=wanted.opsets, **wanted.constants, w8=weight(columns, 5))


EXCLUDED: dict[str, Case] = {
    "Conv": behind("Conv", ["c", "w"], constants={"w": weight(5, 4, 3, 3)}),
    "Conv, bias": behind("Conv", ["c", "w", "b"], constants={"w": weight(5, 4, 3, 3), "b": weight(5)}),
    "ConvTranspose": behind("ConvTranspose", ["c", "w"], constants={"w": weight(4, 5, 3, 3)}),
    "Gemm": refused(SHAPED, node("Gemm", ["t", "w", "b"], ["o"]), n=ints(-1, 8), w=weight(8, 5), b=weight(5)),
    "MatMul": behind("MatMul", ["c", "w"], constants={"w": weight(8, 5)}),
    "Mul": behind("Mul", ["c", "x"]),
    "Softmax": behind("Softmax"),
    "AveragePool": behind("AveragePool", **PADDED),
}


@pytest.mark.parametrize("name", [*REFUSED, *(f"{name}, excluded" for name in EXCLUDED)])
def test_what_stays_float_between_integer_layers_is_float_in_onnx_runtime(tmp_path: Path, name: str) -> None:
    """ONNX Runtime makes an integer layer of whatever stands between DequantizeLinear and QuantizeLinear, if we let it."""
    wanted = REFUSED[name][0] if name in REFUSED else EXCLUDED[name.removesuffix(", excluded")]
    feeds = data(wanted.inputs, 0.0)
    save(
        tmp_path / "m.onnx",
        wanted.nodes,
        {"x": ["N", 4, 8, 8]},
        {"o": None},
        wanted.constants,
        opset=plain_opset(wanted),
    )
    columns = ran((tmp_path / "m.onnx").read_bytes(), feeds, ["o"])["o"].shape[-1]
    recipe = Recipe(layers=Layers(exclude=() if name in REFUSED else ("inner_node",)))
    model, done = converted(tmp_path, followed(wanted, columns), plain_opset(wanted), feeds, recipe)
    assert done.plan.layers[-1].operator == "MatMul"
    assert name in REFUSED or [entry.name for entry in done.plan.floats] == ["inner_node"]
    expected = ran(model.read_bytes(), feeds, ["o"])["o"]
    plain, fused = (ran(done.model.read_bytes(), feeds, ["o"], fused=how)["o"] for how in (False, True))
    assert sqnr(expected, plain) >= SQNR_FLOOR
    assert sqnr(expected, fused) >= SQNR_FLOOR
    assert (plain != fused).sum() <= max(1, TIES * plain.size)
