"""Every operator of the rule table: the integer executor against ONNX Runtime, with its fusions and without, integer by integer.

ONNX Runtime rescales in float32: where the exact value lies on a rounding tie (within 2^-20 of one, relative to 256 steps) the two
may part by one. Everything else is compared with ==.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, Recipe, convert, verify
from quantcli.integer import kernels
from quantcli.integer.executor import Executor
from quantcli.integer.layers import INTEGER_LAYERS
from quantcli.integer.moves import MOVES
from quantcli.recipe import Activation, Layers, Multiplier, Tune
from quantcli.rules import RULES, Arithmetic
from tests.graphs import EVERYWHERE, Array, ints, node, normal, real, save, weight

Case = tuple[list[onnx.NodeProto], dict[str, Array], int]


CONV = node("Conv", ["x", "w0", "b0"], ["c"], pads=[1, 1, 1, 1])
CONSTANTS: dict[str, Array] = {"w0": weight(4, 3, 3, 3), "b0": weight(4)}


def first(operator: str, shape: tuple[int, ...], opset: int = 17, **attributes: Any) -> Case:
    """A layer with a weight on the input x [N, 3, 8, 8]."""
    return [node(operator, ["x", "w"], ["o"], **attributes)], {"w": weight(*shape)}, opset


def behind(
    operator: str,
    inputs: Sequence[str] = ("c",),
    constants: dict[str, Array] | None = None,
    opset: int = 17,
    **attributes: Any,
) -> Case:
    """An operator behind a convolution, whose output c is [N, 4, 8, 8]."""
    return [CONV, node(operator, inputs, ["o"], **attributes)], {**CONSTANTS, **(constants or {})}, opset


def chain(*nodes: onnx.NodeProto, opset: int = 17, **constants: Array) -> Case:
    """Several operators behind a convolution."""
    return [CONV, *nodes], {**CONSTANTS, **constants}, opset


FLAT = node("Flatten", ["x"], ["flat"])
SIGMOID = node("Sigmoid", ["c"], ["s"])
PADS = ints(0, 0, 1, 2, 0, 0, 2, 1)
POOL: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2]}

CASES: dict[str, Case] = {
    "Conv": first("Conv", (4, 3, 3, 3)),
    "Conv, strides and pads": first("Conv", (4, 3, 3, 3), strides=[2, 2], pads=[1, 0, 1, 0]),
    "Conv, dilated": first("Conv", (4, 3, 3, 3), dilations=[2, 2]),
    "Conv, in groups": first("Conv", (6, 1, 3, 3), group=3),
    "Conv, SAME_UPPER": first("Conv", (4, 3, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv, SAME_LOWER": first("Conv", (4, 3, 2, 2), auto_pad="SAME_LOWER", strides=[2, 2]),
    "Conv, Relu": behind("Relu"),
    "Conv, Clip": behind("Clip", ["c", "lo", "hi"], {"lo": real(-0.5), "hi": real(0.7)}),
    "ConvTranspose": (
        [node("ConvTranspose", ["x", "w", "b"], ["o"], strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])],
        {"w": weight(3, 5, 3, 3), "b": weight(5)},
        17,
    ),
    "ConvTranspose, groups": first("ConvTranspose", (3, 2, 3, 3), group=3, dilations=[2, 2]),
    "ConvTranspose, SAME_UPPER": first("ConvTranspose", (3, 2, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
    "Gemm": (
        [FLAT, node("Gemm", ["flat", "w", "b"], ["o"], alpha=0.5, beta=2.0)],
        {"w": weight(192, 5), "b": weight(5)},
        17,
    ),
    "Gemm, transposed": ([FLAT, node("Gemm", ["flat", "w"], ["o"], transB=1)], {"w": weight(5, 192)}, 17),
    "Gemm, scalar bias": ([FLAT, node("Gemm", ["flat", "w", "b"], ["o"])], {"w": weight(192, 5), "b": real(0.5)}, 17),
    "MatMul": behind("MatMul", ["c", "w"], {"w": weight(8, 6)}),
    "MatMul, a stack": behind("MatMul", ["c", "w"], {"w": weight(4, 8, 6)}),
    "MatMul, a constant first": behind("MatMul", ["w", "c"], {"w": weight(6, 8)}),
    "MatMul, two activations": chain(
        node("Transpose", ["c"], ["t"], perm=[0, 1, 3, 2]), node("MatMul", ["c", "t"], ["o"])
    ),
    **{f"{op}, a constant": behind(op, ["c", "k"], {"k": weight(4, 1, 1)}) for op in ("Add", "Sub", "Mul")},
    **{f"{op}, a scalar": behind(op, ["k", "c"], {"k": real(1.7)}) for op in ("Add", "Sub", "Mul")},
    **{f"{op}, two activations": chain(SIGMOID, node(op, ["c", "s"], ["o"])) for op in ("Add", "Sub", "Mul")},
    **{f"{op}, with itself": behind(op, ["c", "c"]) for op in ("Add", "Sub", "Mul")},
    "Concat": chain(SIGMOID, node("Concat", ["c", "s", "x"], ["o"], axis=1)),
    "Split": chain(node("Split", ["c"], ["p", "q"], axis=1), node("Add", ["p", "q"], ["o"])),
    "Split, num_outputs": chain(
        node("Split", ["c"], ["p", "q"], axis=1, num_outputs=2), node("Sub", ["p", "q"], ["o"]), opset=18
    ),
    "Split, sizes": chain(
        node("Split", ["c", "n"], ["p", "q"], axis=1), node("Concat", ["q", "p"], ["o"], axis=1), n=ints(1, 3)
    ),
    "Pad": behind("Pad", ["c", "p"], {"p": PADS}),
    "Pad, zero": behind("Pad", ["c", "p", "z"], {"p": PADS, "z": real(0)}),
    "Pad, reflect": behind("Pad", ["c", "p"], {"p": PADS}, mode="reflect"),
    "Pad, edge": behind("Pad", ["c", "p"], {"p": PADS}, mode="edge"),
    "Pad, negative": behind("Pad", ["c", "p"], {"p": ints(0, 0, -1, 2, 0, 0, 2, -1)}),
    "Pad, axes": behind("Pad", ["c", "p", "", "a"], {"p": ints(1, 2), "a": ints(3)}, 18),
    **{
        f"Resize, {mode}, {how}, {scale}": behind(
            "Resize",
            ["c", "", "f"],
            {"f": np.array([1, 1, scale, scale], np.float32)},
            mode=mode,
            coordinate_transformation_mode=how,
        )
        for mode in ("nearest", "linear")
        for how in ("half_pixel", "asymmetric", "align_corners")
        for scale in (2.0, 0.75)
    },
    "MaxPool": behind("MaxPool", pads=[1, 1, 1, 1], **POOL),
    "MaxPool, ceil": behind("MaxPool", ceil_mode=1, **POOL),
    "MaxPool, dilated": behind("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]),
    "AveragePool": behind("AveragePool", pads=[1, 1, 1, 1], **POOL),
    "AveragePool, pads counted": behind("AveragePool", pads=[1, 1, 1, 1], count_include_pad=1, **POOL),
    "AveragePool, ceil": behind("AveragePool", opset=19, pads=[0, 0, 1, 1], ceil_mode=1, **POOL),
    "GlobalAveragePool": behind("GlobalAveragePool"),
    "ReduceMean": behind("ReduceMean", axes=[2, 3], keepdims=0),
    "ReduceMean, axes as operand": behind("ReduceMean", ["c", "a"], {"a": ints(-1, 1)}, 18),
    "ReduceMean, all": behind("ReduceMean", keepdims=1),
    "ReduceSum": behind("ReduceSum", ["c", "a"], {"a": ints(1, -1)}, keepdims=0),
    **{op: chain(SIGMOID, node(op, ["c", "s"], ["o"])) for op in ("Max", "Min")},
    "PRelu": behind("PRelu", ["c", "k"], {"k": np.array([-0.5, 0, 0.1, 1.5], np.float32).reshape(4, 1, 1)}),
    "Softmax": behind("Softmax", axis=1),
    "Softmax, last": behind("Softmax"),
    "Sigmoid": behind("Sigmoid"),
    "Tanh": behind("Tanh"),
    "HardSigmoid": behind("HardSigmoid", alpha=0.3),
    "HardSwish": behind("HardSwish"),
    "LeakyRelu": behind("LeakyRelu", alpha=0.2),
    "Relu": chain(node("Relu", ["c"], ["r"]), node("Add", ["c", "r"], ["o"])),
    "Clip": chain(node("Clip", ["c", "lo"], ["r"]), node("Add", ["c", "r"], ["o"]), lo=real(-0.3)),
    "Gather": behind("Gather", ["c", "i"], {"i": ints(3, -1, 0)}, axis=1),
    "Gather, one": behind("Gather", ["c", "i"], {"i": np.array(2)}, axis=2),
    "Slice": behind(
        "Slice", ["c", "s", "e", "a", "t"], {"s": ints(-1, 1), "e": ints(-100, 7), "a": ints(2, 3), "t": ints(-2, 2)}
    ),
    "Transpose": behind("Transpose", perm=[0, 2, 3, 1]),
    "Reshape": behind("Reshape", ["c", "s"], {"s": ints(0, -1, 16)}),
    "Flatten": behind("Flatten", axis=2),
    "DepthToSpace": behind("DepthToSpace", blocksize=2),
    "DepthToSpace, CRD": behind("DepthToSpace", blocksize=2, mode="CRD"),
    "SpaceToDepth": behind("SpaceToDepth", blocksize=2),
    "GatherElements": behind(
        "GatherElements", ["c", "i"], {"i": np.arange(3 * 8 * 8).reshape(1, 3, 8, 8) % 5 - 1}, axis=1
    ),
    "Expand": chain(node("GlobalMaxPool", ["c"], ["g"]), node("Expand", ["g", "s"], ["o"]), s=ints(1, 1, 3, 2)),
    "Tile": behind("Tile", ["c", "r"], {"r": ints(1, 2, 1, 3)}),
    "ReduceMax": behind("ReduceMax", axes=[1, -1], keepdims=0),
    "ReduceMax, axes as operand": behind("ReduceMax", ["c", "a"], {"a": ints(2)}, 20),
    "ReduceMin": behind("ReduceMin"),
    "Where": chain(
        node("Less", ["x", "lim"], ["k"]),
        node("Slice", ["k", "a", "z", "one"], ["l"]),
        node("Sigmoid", ["c"], ["t"]),
        node("Where", ["l", "c", "t"], ["o"]),
        lim=real(0.1),
        a=ints(0),
        z=ints(1),
        one=ints(1),
    ),
    "Where, a constant": chain(
        node("Less", ["x", "lim"], ["k"]),
        node("Slice", ["k", "a", "z", "one"], ["l"]),
        node("Where", ["l", "c", "t"], ["o"]),
        lim=real(0.1),
        a=ints(0),
        z=ints(1),
        one=ints(1),
        t=real(0.7),
    ),
    "Gelu": behind("Gelu", opset=20),
    "Gelu, tanh": behind("Gelu", opset=20, approximate="tanh"),
    "Erf": behind("Erf"),
    "Softplus": behind("Softplus"),
    "Softsign": behind("Softsign", opset=22),
    "Mish": behind("Mish", opset=18),
    "Elu": behind("Elu", alpha=0.7),
    "Selu": behind("Selu"),
    "Celu": behind("Celu", alpha=0.8),
    "ThresholdedRelu": behind("ThresholdedRelu", alpha=0.4),
    "Abs": behind("Abs"),
    "Max of a constant": chain(node("Max", ["c", "m"], ["r"]), node("Add", ["c", "r"], ["o"]), m=real(0.2)),
    "PRelu, one slope": behind("PRelu", ["c", "m"], {"m": real(0.2)}),
    "Einsum": chain(
        node("Reshape", ["c", "s"], ["r"]),
        node("Einsum", ["r", "k"], ["o"], equation="bij,kj->bki"),
        s=ints(0, 4, 64),
        k=weight(5, 64),
    ),
    "Squeeze, Unsqueeze": chain(
        node("Unsqueeze", ["c", "a"], ["u"]), node("Squeeze", ["u", "a"], ["o"]), a=ints(1, -1)
    ),
}


UNTUNED = Recipe(layers=Layers(everywhere=True), tune=Tune(effort="fast"))
FORMS = {
    "4 bits": Recipe(layers=Layers(everywhere=True), activation=Activation(bits=4)),
    "5 bits, symmetric": Recipe(
        layers=Layers(everywhere=True), activation=Activation(bits=5), target="npu-int8", tune=Tune(effort="fast")
    ),
    "16 bits, affine, multipliers of 8": Recipe(
        layers=Layers(everywhere=True),
        activation=Activation(symmetric=False),
        multiplier=Multiplier(bits=8, rounding="single"),
        target="npu-int16",
        tune=Tune(effort="fast"),
    ),
    "16 bits, as TFLite adds": Recipe(
        layers=Layers(everywhere=True), activation=Activation(dtype="int16"), target="tflite", tune=Tune(effort="fast")
    ),
}


def converted(folder: Path, case: Case, offset: float, recipe: Recipe = EVERYWHERE) -> tuple[Conversion, Array]:
    nodes, constants, opset = case
    model = save(folder / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"o": None}, constants, opset=opset)
    x = normal(6, 3, 8, 8, seed=5) + np.float32(offset)
    np.savez(folder / "d.npz", x=x)
    return convert(model, folder / "q.onnx", data=folder / "d.npz", recipe=recipe), x


def without_fusion(path: Path, x: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("offset", [0.0, 4.0, -4.0], ids=["around zero", "above zero", "below zero"])
@pytest.mark.parametrize("name", CASES)
def test_the_executor_equals_onnx_runtime(tmp_path: Path, name: str, offset: float) -> None:
    done, x = converted(tmp_path, CASES[name], offset, EVERYWHERE if offset == 0 else UNTUNED)
    assert done.plan.floats == ()
    executor = Executor(ir.load(done.model), done.sidecar)
    found = executor.run({"x": x})["o"]
    assert not executor.islands
    scale = done.sidecar.tensors["o"].scale[0]
    layers = len(done.plan.layers)
    for expected in (Runner(done.model).run({"x": x})["o"], without_fusion(done.model, x)):
        assert found.shape == expected.shape
        steps = np.abs(np.rint((found.astype(np.float64) - expected) / scale))
        # A tie of one layer can move the next one's input by a step: at most one step a layer, for a few elements in a
        # thousand. Interpolation by halves and quarters along two axes puts up to an eighth on a tie.
        assert steps.max() <= layers
        assert (steps > 0).mean() <= (1 / 8 if "linear" in name else 0.002)
    if (
        name.split(",", maxsplit=1)[0] not in {"Tanh", "Softmax"} or offset == 0
    ):  # saturated outputs hold one value: no noise, no ratio
        assert done.check.sqnr["o"] > 20


@pytest.mark.parametrize("name", CASES)
def test_other_grids_are_verified_as_those_of_8_bits_are(tmp_path: Path, name: str) -> None:
    """Of narrow ones, clamps and tables are those of a part of the type's integers; of 16 bits, multipliers round the most."""
    form = list(FORMS)[list(CASES).index(name) % len(FORMS)]  # in turn: each operator has several cases
    done, _ = converted(tmp_path, CASES[name], 1.0, FORMS[form])
    found = verify(done.sidecar_path, tmp_path / "d.npz")
    assert (found.findings, found.layers) == ([], len(done.plan.layers))
    spans = {t.qmax - t.qmin for t in done.sidecar.tensors.values() if t.role == "activation"}
    assert max(spans) == {"4 bits": 15, "5 bits, symmetric": 31}.get(form, 65535)


@pytest.mark.parametrize("operator", ["Tanh", "Sigmoid", "Softmax"])
def test_tables_are_rounded_to_nearest_where_products_are_not(tmp_path: Path, operator: str) -> None:
    """Of integers of 16 bits some lie on a tie for the runtime's float32, whichever way products are rounded."""
    case = CASES[next(name for name in CASES if name.startswith(operator))]
    recipe = Recipe(
        target="ort-arm",
        layers=Layers(everywhere=True),
        activation=Activation(dtype="int16"),
        multiplier=Multiplier(rounding="floor"),
    )
    done, x = converted(tmp_path, case, 0.0, recipe)
    np.savez(tmp_path / "d.npz", x=np.concatenate([x + shift for shift in np.linspace(0, 1, 20, dtype=np.float32)]))
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []


def test_every_operator_of_the_table_is_here() -> None:
    covered = {n.op_type for nodes, _, _ in CASES.values() for n in nodes}
    assert covered - {"Less", "Einsum"} == set(RULES)  # those are rewritten, or on conditions


def test_the_tables_have_the_same_keys() -> None:
    assert {*INTEGER_LAYERS, "dynamic", "stored"} == {arithmetic.value for arithmetic in Arithmetic}
    assert set(MOVES) == {name for name, rule in RULES.items() if rule.arithmetic is Arithmetic.MOVE}


def test_float_islands_are_bridged_and_counted(tmp_path: Path) -> None:
    nodes = [CONV, node("Exp", ["c"], ["e"]), node("Conv", ["e", "w"], ["o"])]
    done, x = converted(tmp_path, (nodes, {**CONSTANTS, "w": weight(4, 4, 1, 1)}, 17), 0.0)
    executor = Executor(ir.load(done.model), done.sidecar)
    found, expected = executor.run({"x": x})["o"], Runner(done.model).run({"x": x})["o"]
    assert executor.islands == {"Exp": 1}
    assert np.abs(np.rint((found - expected) / done.sidecar.tensors["o"].scale[0])).max() <= 1


@pytest.mark.parametrize("group", [1, 4])
def test_convolutions_lay_out_few_windows_at_once(monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    draw = np.random.default_rng(1)
    x, w = draw.integers(-255, 256, (2, 16, 64, 48)), draw.integers(-128, 128, (8, 16 // group, 3, 3))
    attributes = {"group": group, "pads": [1, 1, 1, 1], "strides": [2, 1]}
    whole = kernels.convolve(x, w, attributes)
    monkeypatch.setattr(kernels, "AT_ONCE", 1 << 14)
    tracemalloc.start()
    try:
        parts = kernels.convolve(x, w, attributes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (parts == whole).all()
    windows = 8 * 2 * 32 * 48 * (16 // group) * 9  # bytes of all of a group's
    held = 8 * (2 * 16 * 66 * 50 + whole.size)  # what is padded, and the accumulators
    assert peak < held + windows / 2
