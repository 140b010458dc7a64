"""Factors and addends per channel are gathered, and folded into convolutions and dense layers: the values stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli.fold import fold
from quantcli.load import load
from quantcli.probe import model_bytes
from tests.graphs import Array, node, normal, save

X = normal(3, 4, 6, 6, seed=1)
PARTS: dict[str, Array] = {
    "w": normal(5, 4, 3, 3, seed=2, scale=0.3),
    "t": normal(4, 5, 3, 3, seed=3, scale=0.3),
    "b": normal(5, seed=4),
    "gamma": normal(5, seed=5),
    "beta": normal(5, seed=6),
    "mean": normal(5, seed=7),
    "variance": np.abs(normal(5, seed=8)) + 0.5,
    "f": normal(5, 1, 1, seed=9),
    "a": normal(1, 5, 1, 1, seed=10),
    "s": np.array(0.7, np.float32),
    "rows": normal(5, 4, 1, seed=11),
    "rows4": normal(4, 1, 1, seed=25),
    **{f"{k}4": v for k, v in (("f", normal(4, 1, 1, seed=12)), ("a", normal(4, 1, 1, seed=13)))},
    "z": np.array([-0.3], np.float32),
    "wide": normal(6, 4, 1, 1, seed=14),
    "grouped": normal(6, 2, 1, 1, seed=15),
    "d": normal(4, 1, 3, 3, seed=16),
    "e": normal(6, seed=17),
    "u": normal(6, 5, seed=18),
    "line": normal(5, 4, 1, 5, seed=19),
    "column": normal(5, 1, seed=20),
    "flat": np.array([1, 4, 1, -1]),
    "two": np.array([2]),
    "zero": np.array([0]),
    "none": np.array(0.0, np.float32),
    "w4": normal(4, 5, seed=21, scale=0.3),
    "long": normal(5, 6, seed=22, scale=0.3),
    "r5": normal(5, seed=23),
    "rows5": np.array([-1, 5]),
    "rows6": np.array([-1, 6]),
    "back": np.array([-1, 24, 5]),
    "mixed": np.array([-1, 10]),
    "r10": normal(10, seed=24),
    "inf": np.array([1, 1, np.inf, 1, 1], np.float32).reshape(5, 1, 1),
}
NORM = node("BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], ["n"])
CONV = node("Conv", ["x", "w", "b"], ["c"])

# A dense layer of four axes with 5 columns, one of two axes, and one whose columns are channels again behind a Transpose.
WIDE, FLAT = node("MatMul", ["x", "u"], ["c"]), node("Reshape", ["c", "rows5"], ["l"])
LAST = [
    node("Transpose", ["x"], ["t0"], perm=[0, 2, 3, 1]),
    node("MatMul", ["t0", "w4"], ["c"]),
    node("Add", ["c", "r5"], ["b0"]),
]
ROWS = node("Reshape", ["x", "rows6"], ["l6"])
NORM_OF_ROWS = node("BatchNormalization", ["l", "gamma", "beta", "mean", "variance"], ["n"])

CASES: dict[str, tuple[list[onnx.NodeProto], list[str]]] = {
    "normalisation of three operators": (
        [CONV, NORM, node("Mul", ["n", "f"], ["m"]), node("Add", ["a", "m"], ["o"])],
        ["Conv"],
    ),
    "a convolution without bias": (
        [node("Conv", ["x", "w"], ["c"]), node("Mul", ["c", "f"], ["m"]), node("Add", ["m", "s"], ["o"])],
        ["Conv"],
    ),
    "an addend before a factor": ([CONV, node("Add", ["c", "a"], ["m"]), node("Mul", ["s", "m"], ["o"])], ["Conv"]),
    "a transposed convolution": (
        [node("ConvTranspose", ["x", "t"], ["c"]), node("Mul", ["c", "f"], ["m"]), node("Add", ["m", "a"], ["o"])],
        ["ConvTranspose"],
    ),
    "behind a Squeeze, as converters write what has one axis": (
        [
            node("Reshape", ["x", "flat"], ["l"]),
            node("Conv", ["l", "line"], ["c"]),
            node("Squeeze", ["c", "two"], ["q"]),
            node("Add", ["q", "column"], ["m"]),
            node("Mul", ["m", "column"], ["p"]),
            node("Add", ["p", "column"], ["o"]),
        ],
        ["Reshape", "Conv", "Squeeze"],
    ),
    "behind a Squeeze that moves the channels": (
        [
            node("Reshape", ["x", "flat"], ["l"]),
            node("Conv", ["l", "line"], ["c"], strides=[1, 32]),
            node("Squeeze", ["c", "zero"], ["q"]),
            node("Mul", ["q", "column"], ["o"]),
        ],
        ["Reshape", "Conv", "Squeeze", "Mul"],
    ),
    "before an activation, with nothing to fold into": (
        [
            node("Mul", ["x", "f4"], ["p"]),
            node("Add", ["p", "a4"], ["q"]),
            node("Mul", ["q", "s"], ["r"]),
            node("Add", ["r", "f4"], ["t1"]),
            node("Add", ["t1", "s"], ["t2"]),
            node("Relu", ["t2"], ["o"]),
        ],
        ["Mul", "Add", "Relu"],
    ),
    "another reader": (
        [CONV, node("Mul", ["c", "f"], ["m"]), node("Relu", ["c"], ["r"]), node("Add", ["m", "r"], ["o"])],
        ["Conv", "Mul", "Relu", "Add"],
    ),
    "a dense layer that a normalisation of rows follows": (
        [WIDE, FLAT, NORM_OF_ROWS, node("Reshape", ["n", "back"], ["o"])],
        ["Reshape", "Gemm", "Reshape"],
    ),
    "one of two axes": (
        [ROWS, node("MatMul", ["l6", "u"], ["l"]), NORM_OF_ROWS, node("Relu", ["n"], ["o"])],
        ["Reshape", "Gemm", "Relu"],
    ),
    "a transposed weight": (
        [
            ROWS,
            node("Gemm", ["l6", "long", "r5"], ["c"], transB=1),
            node("Mul", ["gamma", "c"], ["m"]),
            node("Mul", ["m", "s"], ["o"]),
        ],
        ["Reshape", "Gemm"],
    ),
    "a scale of what a block adds": (
        [WIDE, node("Add", ["c", "r5"], ["m"]), node("Mul", ["m", "gamma"], ["o"])],
        ["Reshape", "Gemm", "Reshape"],
    ),
    "behind a Transpose": (
        [*LAST, node("Transpose", ["b0"], ["c0"], perm=[0, 3, 1, 2]), node("Mul", ["c0", "a"], ["o"])],
        ["Transpose", "Reshape", "Gemm", "Reshape", "Transpose"],
    ),
    "a number behind axes of which none is the columns'": (
        [WIDE, node("Reshape", ["c", "mixed"], ["m"]), node("Mul", ["m", "s"], ["o"])],
        ["MatMul", "Reshape"],
    ),
    "columns that were mixed": (
        [WIDE, node("Reshape", ["c", "mixed"], ["m"]), node("Mul", ["m", "r10"], ["o"])],
        ["MatMul", "Reshape", "Mul"],
    ),
    "along another axis than the columns": ([WIDE, node("Mul", ["c", "rows4"], ["o"])], ["MatMul", "Mul"]),
    "a move with another reader": (
        [WIDE, FLAT, node("Mul", ["l", "gamma"], ["o"]), node("Relu", ["l"], ["o2"])],
        ["MatMul", "Reshape", "Mul", "Relu"],
    ),
    "not per channel": ([CONV, node("Mul", ["c", "rows"], ["o"])], ["Conv", "Mul"]),
    "not finite": ([CONV, node("Mul", ["c", "inf"], ["o"])], ["Conv", "Mul"]),
}

ACTIVATED = [node("Relu", ["x"], ["r"]), node("Mul", ["s", "r"], ["m"]), node("Add", ["m", "z"], ["n4"])]
PADDED = node("Conv", ["n4", "w", "b"], ["o"], pads=[1, 1, 1, 1])
# What is a single number goes forward, into what reads it.
FORWARD: dict[str, tuple[list[onnx.NodeProto], list[str]]] = {
    "into a convolution without padding": ([*ACTIVATED, node("Conv", ["n4", "wide", "e"], ["o"])], ["Relu", "Conv"]),
    "into one without bias, in groups": (
        [*ACTIVATED, node("Conv", ["n4", "grouped"], ["o"], group=2)],
        ["Relu", "Conv"],
    ),
    "past the addend, which padding keeps": ([*ACTIVATED, PADDED], ["Relu", "Add", "Conv"]),
    "into two readers": (
        [*ACTIVATED, PADDED, node("Conv", ["n4", "d"], ["o2"], group=4)],
        ["Relu", "Add", "Conv", "Conv"],
    ),
    "a factor alone": ([*ACTIVATED[:2], node("MatMul", ["m", "u"], ["o"])], ["Relu", "MatMul"]),
    "another reader": ([*ACTIVATED, PADDED, node("Neg", ["n4"], ["o2"])], ["Relu", "Mul", "Add", "Conv", "Mul"]),
    "another reader of the multiple": (
        [*ACTIVATED, PADDED, node("Neg", ["m"], ["o2"])],
        ["Relu", "Mul", "Add", "Conv", "Mul"],
    ),
    "a factor per channel": (
        [ACTIVATED[0], node("Mul", ["r", "f4"], ["m"]), node("Conv", ["m", "wide"], ["o"])],
        ["Relu", "Mul", "Conv"],
    ),
    "zero": (
        [ACTIVATED[0], node("Mul", ["r", "none"], ["m"]), node("Conv", ["m", "wide"], ["o"])],
        ["Relu", "Mul", "Conv"],
    ),
}


def run(model: bytes | Path, names: Sequence[str] | None = None) -> dict[str, Array]:
    return Runner(model).run({"x": X}, names)


@pytest.mark.parametrize("name", CASES | FORWARD)
def test_the_values_stay_what_they_are(tmp_path: Path, name: str) -> None:
    nodes, kinds = (CASES | FORWARD)[name]
    used = {value for n in nodes for value in n.input}
    constants = {key: value for key, value in PARTS.items() if key in used}
    outputs = {name: None for n in nodes for name in n.output if name in {"o", "o2"}}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 4, 6, 6]}, outputs, constants)
    folded = fold(load(path).graph)
    assert sorted(n.op_type for n in folded.graph) == sorted(kinds)
    for found, expected in zip(run(model_bytes(folded)).values(), run(path).values(), strict=True):
        assert found.shape == expected.shape
        # 36 products, factors and addends below 4 in magnitude: each of 50 roundings is off by 2^-24 of at most 36·4·4·4·4.
        finite = np.isfinite(expected)
        assert (np.isfinite(found) == finite).all()
        assert np.abs(found[finite] - expected[finite]).max() <= 50 * 2.0**-24 * 36 * 4**4
        assert np.abs(found[finite] - expected[finite]).max() <= 2.0**-16 * np.abs(expected[finite]).max()
