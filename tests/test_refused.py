"""Operators that stay float: why, and that they do so in ONNX Runtime as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from quantcli.recipe import Layers, Recipe
from tests.deviation import SQNR_FLOOR, TIES
from tests.graphs import ints, node, real, save, weight
from tests.operators import (
    CONV,
    PADDED,
    W0,
    Case,
    behind,
    case,
    converted,
    data,
    ran,
    sqnr,
)


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
        refused(node("Mul", ["c", "x"], ["o"]), node("Transpose", ["x"], ["p"]), layers="Conv Mul"),
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
