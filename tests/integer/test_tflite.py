"""Byte for byte what TFLite's reference kernels compute, on vectors recorded with LiteRT 2.3 from MLPerf Tiny's int8 models
(mlcommons/tiny, Apache-2.0): keyword spotting and anomaly detection; the project carries a cut, one input each.

Where QUANTCLI_GOLDEN names a folder with the whole recordings (NAME.json, NAME.npz), every layer of every sample is compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from quantcli import Recipe, convert
from quantcli.arithmetic import gemmlowp
from quantcli.arithmetic.fixed_point import fixed_point, multiply
from quantcli.arithmetic.rounding import divide_half_away
from quantcli.integer import kernels
from quantcli.integer.executor import Executor
from quantcli.targets import load_target
from tests.graphs import data_for, node, normal, save

CUT = Path(__file__).parent.parent / "golden"
SOFTMAX_SCALE = 0.14469251036643982
TARGET = load_target("tflite").multiplier
ONNX_NAMES = {"CONV_2D": "Conv", "DEPTHWISE_CONV_2D": "Conv", "FULLY_CONNECTED": "Gemm"}

Operator = dict[str, Any]
Arrays = dict[str, NDArray[Any]]


def cut() -> Iterator[tuple[str, Operator, Arrays]]:
    """Yield name, operator and its arrays by tensor number, from the cut that the project carries."""
    operators = json.loads((CUT / "tflite.json").read_text())
    stored = np.load(CUT / "tflite.npz")
    for model, entries in operators.items():
        for operator in entries:
            numbers = [t["tensor"] for t in (*operator["inputs"], *operator["outputs"])]
            yield model, operator, {str(n): stored[f"{model}_t{n}"] for n in numbers}


def whole(folder: Path) -> Iterator[tuple[str, Operator, Arrays]]:
    """Yield the same from a folder of whole recordings, four samples each."""
    for file in sorted(folder.glob("*.json")):
        stored = np.load(file.with_suffix(".npz"))
        for operator in json.loads(file.read_text()):
            for sample in range(4):
                numbers = [t["tensor"] for t in (*operator["inputs"], *operator["outputs"])]
                arrays = {
                    str(n): stored[f"s{sample}_t{n}" if f"s{sample}_t{n}" in stored else f"s0_t{n}"] for n in numbers
                }
                yield file.stem, operator, arrays


def same_pads(size: int, outputs: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def computed(operator: Operator, arrays: Arrays) -> NDArray[np.int64] | None:
    """Return an operator's output by our kernels; None for an operator that is not compared."""
    kind = operator["op"]
    entries = [*operator["inputs"], *operator["outputs"]]
    x, y = (arrays[str(entry["tensor"])].astype(np.int64) for entry in (entries[0], entries[-1]))
    if kind == "AVERAGE_POOL_2D":
        kernel = x.shape[1] // y.shape[1], x.shape[2] // y.shape[2]
        sums, counts = kernels.pooled_sums(
            x.transpose(0, 3, 1, 2), {"kernel_shape": list(kernel), "strides": list(kernel)}
        )
        return divide_half_away(sums, counts).transpose(0, 2, 3, 1)
    if kind == "SOFTMAX":
        return np.minimum(gemmlowp.softmax(x, entries[0]["scales"][0], -1) - 128, 127)
    if kind == "RESHAPE":
        return x.reshape(y.shape)
    if kind not in ONNX_NAMES:
        return None
    w = arrays[str(entries[1]["tensor"])].astype(np.int64)
    bias = arrays[str(entries[2]["tensor"])].astype(np.int64)
    centred = x - entries[0]["zero_points"][0]
    if kind == "FULLY_CONNECTED":
        acc = kernels.multiply_matrices(centred.reshape(-1, w.shape[1]), w.T) + bias
    else:
        depthwise = kind == "DEPTHWISE_CONV_2D"
        weight = w.transpose(3, 0, 1, 2) if depthwise else w.transpose(0, 3, 1, 2)
        strides = [round(x.shape[axis] / y.shape[axis]) for axis in (1, 2)]
        pads = [same_pads(x.shape[a], y.shape[a], weight.shape[a + 1], s) for a, s in zip((1, 2), strides, strict=True)]
        attributes = {
            "strides": strides,
            "pads": [pads[0][0], pads[1][0], pads[0][1], pads[1][1]],
            "group": x.shape[3] if depthwise else 1,
        }
        acc = kernels.convolve(centred.transpose(0, 3, 1, 2), weight, attributes).transpose(0, 2, 3, 1) + bias
    scales = [
        np.array(entry["scales"], dtype=np.float32).astype(np.float64)
        for entry in (entries[0], entries[1], entries[-1])
    ]
    m0, n = fixed_point(scales[0] * scales[1] / scales[2], TARGET.bits)
    out = multiply(acc, m0, n, TARGET.rounding_of(ONNX_NAMES[kind]), TARGET.bits) + entries[-1]["zero_points"][0]
    clamped: NDArray[np.int64] = np.clip(out, -128, 127).reshape(y.shape)
    return clamped


def compare(recordings: Iterator[tuple[str, Operator, Arrays]]) -> dict[str, int]:
    """Compare every layer with == and return how many integers were compared, by operator."""
    counted: dict[str, int] = {}
    for model, operator, arrays in recordings:
        found = computed(operator, arrays)
        if found is None:
            continue
        expected = arrays[str(operator["outputs"][0]["tensor"])]
        assert (found == expected).all(), f"{model}: {operator['op']}, {int((found != expected).sum())} differ"
        counted[operator["op"]] = counted.get(operator["op"], 0) + expected.size
    return counted


def test_our_kernels_compute_what_tflites_do() -> None:
    counted = compare(cut())
    assert set(counted) == {"CONV_2D", "DEPTHWISE_CONV_2D", "AVERAGE_POOL_2D", "FULLY_CONNECTED"}
    assert sum(counted.values()) > 20_000


def test_softmax_spreads_as_tflites_does() -> None:
    """A recorded output with mass on every class (keyword spotting, second input)."""
    x = np.array([[7, 6, 1, 1, 4, 5, -1, 2, 10, -1, 1, 28]])
    expected = [-119, -120, -124, -124, -122, -121, -125, -124, -114, -125, -124, 62]
    assert (gemmlowp.softmax(x, SOFTMAX_SCALE, -1) - 128).tolist() == [expected]


def test_softmax_is_one_where_a_class_stands_alone() -> None:
    assert gemmlowp.softmax(np.array([[5]]), 0.1, -1).tolist() == [[256]]
    assert gemmlowp.softmax(np.array([[127, -128]]), 1.0, -1).tolist() == [[256, 0]]


@pytest.mark.skipif("QUANTCLI_GOLDEN" not in os.environ, reason="QUANTCLI_GOLDEN names no folder of whole recordings")
def test_on_the_whole_recordings() -> None:
    counted = compare(whole(Path(os.environ["QUANTCLI_GOLDEN"])))
    assert sum(counted.values()) > 250_000


def tflite_add(a: int, b: int, sign: int, multipliers: list[tuple[int, int]], zero_points: tuple[int, int, int]) -> int:
    """TFLite's integer Add (reference add.cc), in Python's integers: shift 20 to the left, rescale, add, rescale, clamp."""

    def by_quantized_multiplier(x: int, m0: int, n: int) -> int:
        product = x * m0
        nudge = (1 << 30) if product >= 0 else 1 - (1 << 30)
        high = abs(product + nudge) // (1 << 31) * (1 if product + nudge >= 0 else -1)
        right = n - 31
        mask = (1 << right) - 1
        threshold = (mask >> 1) + (1 if high < 0 else 0)
        return (high >> right) + (1 if (high & mask) > threshold else 0)

    terms = [
        by_quantized_multiplier((q - z) << 20, *m)
        for q, z, m in zip((a, b), zero_points[:2], multipliers[:2], strict=True)
    ]
    total = by_quantized_multiplier(terms[0] + sign * terms[1], *multipliers[2]) + zero_points[2]
    return min(max(total, -128), 127)


@pytest.mark.parametrize("operator", ["Add", "Sub"])
def test_sums_follow_tflites_definition(tmp_path: Path, operator: str) -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Sigmoid", ["c"], ["s"]), node(operator, ["c", "s"], ["o"])]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"o": None}, {"w": normal(4, 3, 3, 3, scale=0.3)})
    data = data_for(tmp_path / "d.npz")
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(target="tflite"), verified=True)
    entry = next(layer for layer in done.sidecar.layers if layer.operator == operator)
    multipliers = [(m.multiplier[0], m.shift[0]) for m in entry.multipliers]
    names = (*entry.inputs, entry.outputs[0])
    zero_points = tuple(done.sidecar.tensors[name].zero_point[0] for name in names)
    executor = Executor(ir.load(done.model), done.sidecar)
    integers, _ = executor.run_all({"x": normal(4, 3, 8, 8, seed=9)})
    a, b, found = (integers[name].reshape(-1).tolist() for name in names)
    sign = -1 if operator == "Sub" else 1
    expected = [tflite_add(p, q, sign, multipliers, zero_points) for p, q in zip(a, b, strict=True)]  # type: ignore[arg-type]
    assert found == expected
