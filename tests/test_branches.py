"""Branches that are added up become one convolution: the values stay what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.fold import fold
from quantcli.load import load
from quantcli.load.learned import LEARNED
from quantcli.probe import model_bytes
from quantcli.recipe import Layers, Tune
from tests.graphs import Array, node, normal, save

X = normal(3, 4, 7, 6, seed=1)
PARTS: dict[str, Array] = {
    "w": normal(4, 4, 3, 3, seed=2, scale=0.3),
    "b": normal(4, seed=3),
    "w5": normal(4, 4, 5, 5, seed=4, scale=0.3),
    "w1": normal(4, 4, 1, 1, seed=5, scale=0.5),
    "b1": normal(4, seed=6),
    "across": normal(4, 4, 1, 3, seed=7, scale=0.3),
    "down": normal(4, 4, 3, 1, seed=8, scale=0.3),
    "d": normal(4, 1, 3, 3, seed=9, scale=0.3),
    "d7": normal(4, 1, 7, 7, seed=10, scale=0.3),
    "halves": normal(4, 2, 3, 3, seed=11, scale=0.3),
    "six": normal(6, 4, 3, 3, seed=12, scale=0.3),
    "six1": normal(6, 4, 1, 1, seed=13, scale=0.3),
    "one": normal(1, 4, 3, 3, seed=14, scale=0.3),
    "gamma": normal(4, seed=15),
    "beta": normal(4, seed=16),
    "mean": normal(4, seed=17),
    "variance": np.abs(normal(4, seed=18)) + 0.5,
    "scale": normal(4, 1, 1, seed=19),
}
PADS = [1, 1, 1, 1]
CONV = node("Conv", ["x", "w", "b"], ["c"], pads=PADS)
POINTWISE = node("Conv", ["x", "w1", "b1"], ["p"])
NORM = node("BatchNormalization", ["x", "gamma", "beta", "mean", "variance"], ["n"])
DEPTHWISE = node("Conv", ["x", "d"], ["e"], pads=PADS, group=4)
SUM = node("Add", ["c", "p"], ["o"])


def strided(name: str, output: str, pads: list[int]) -> onnx.NodeProto:
    return node("Conv", ["x", name], [output], pads=pads, strides=[2, 2])


CASES: dict[str, tuple[list[onnx.NodeProto], list[str]]] = {
    "a kernel within another": ([CONV, POINTWISE, SUM], ["Conv"]),
    "the smaller one first": ([CONV, POINTWISE, node("Add", ["p", "c"], ["o"])], ["Conv"]),
    "the tensor itself": ([CONV, node("Add", ["x", "c"], ["o"])], ["Conv"]),
    "taken off the tensor": ([DEPTHWISE, node("Sub", ["x", "e"], ["o"])], ["Conv"]),
    "RepVGG": (
        [CONV, POINTWISE, NORM, node("Add", ["n", "p"], ["a"]), node("Add", ["c", "a"], ["o"])],
        ["Conv"],
    ),
    "RepMixer": (
        [
            DEPTHWISE,
            node("Add", ["e", "x"], ["a"]),
            NORM,
            node("Sub", ["a", "n"], ["s"]),
            node("Mul", ["scale", "s"], ["m"]),
            node("Add", ["x", "m"], ["o"]),
        ],
        ["Conv"],
    ),
    "strides": (
        [strided("six", "c", PADS), strided("six1", "p", [0] * 4), SUM],
        ["Conv"],
    ),
    "kernels that lie elsewhere": (
        [
            node("Conv", ["x", "across"], ["c"], pads=[0, 2, 0, 0]),
            node("Conv", ["x", "w5"], ["p"], pads=[2, 2, 2, 2]),
            SUM,
        ],
        ["Conv"],
    ),
    "dilations": (
        [node("Conv", ["x", "w"], ["c"], pads=[2, 2, 2, 2], dilations=[2, 2]), POINTWISE, SUM],
        ["Conv"],
    ),
    "groups of several widths": (
        [
            node("Conv", ["x", "halves"], ["c"], pads=PADS, group=2),
            node("Conv", ["x", "d"], ["p"], pads=PADS, group=4),
            SUM,
        ],
        ["Conv"],
    ),
    "no more products than both": (
        [
            node("Conv", ["x", "across"], ["c"], pads=[0, 1, 0, 1]),
            node("Conv", ["x", "down"], ["p"], pads=[1, 0, 1, 0]),
            SUM,
        ],
        ["Add", "Conv", "Conv"],
    ),
    "pointwise and depthwise": (
        [POINTWISE, node("Conv", ["x", "d7"], ["c"], pads=[3] * 4, group=4), SUM],
        ["Add", "Conv", "Conv"],
    ),
    "taps between those of the other": (
        [
            node("Conv", ["x", "w"], ["c"], pads=[2, 2, 2, 2], dilations=[2, 2]),
            node("Conv", ["x", "w"], ["p"], pads=PADS),
            SUM,
        ],
        ["Add", "Conv", "Conv"],
    ),
    "an output that is spread": ([CONV, node("Conv", ["x", "one"], ["p"], pads=PADS), SUM], ["Add", "Conv", "Conv"]),
    "an output that is larger": (
        [node("Conv", ["x", "w"], ["c"], strides=[7, 6]), POINTWISE, SUM],
        ["Add", "Conv", "Conv"],
    ),
    "another reader": (
        [CONV, POINTWISE, SUM, node("Relu", ["p"], ["o2"])],
        ["Add", "Conv", "Conv", "Relu"],
    ),
    "a branch that is given out": (
        [CONV, node("Conv", ["x", "w1"], ["o2"]), node("Add", ["c", "o2"], ["o"])],
        ["Add", "Conv", "Conv"],
    ),
    "another tensor": (
        [node("Relu", ["x"], ["r"]), CONV, node("Conv", ["r", "w1"], ["p"]), SUM],
        ["Add", "Conv", "Conv", "Relu"],
    ),
    "a convolution twice": ([CONV, node("Add", ["c", "c"], ["o"])], ["Add", "Conv"]),
}


def written(path: Path, nodes: list[onnx.NodeProto]) -> Path:
    used = {value for n in nodes for value in n.input}
    constants = {key: value for key, value in PARTS.items() if key in used}
    outputs = {name: None for n in nodes for name in n.output if name in {"o", "o2"}}
    return save(path, nodes, {"x": ["N", 4, 7, 6]}, outputs, constants)


@pytest.mark.parametrize("name", CASES)
def test_the_values_stay_what_they_are(tmp_path: Path, name: str) -> None:
    nodes, kinds = CASES[name]
    path = written(tmp_path / "m.onnx", nodes)
    folded = fold(load(path).graph)
    assert sorted(n.op_type for n in folded.graph) == kinds
    expected = Runner(path).run({"x": X})
    for key, found in Runner(model_bytes(folded)).run({"x": X}).items():
        assert found.shape == expected[key].shape
        # Some 200 roundings of 2^-24 each, of terms that together are below 2^5 times the largest value.
        assert np.abs(found - expected[key]).max() <= 200 * 2.0**-24 * 2**5 * np.abs(expected[key]).max()


def test_the_convolution_has_the_name_of_the_largest_and_the_sum_its_own(tmp_path: Path) -> None:
    folded = fold(load(written(tmp_path / "m.onnx", CASES["RepVGG"][0])).graph)
    assert [(n.name, n.outputs[0].name) for n in folded.graph] == [("c_node", "o")]


def test_branches_that_were_trained_prepared_stay(tmp_path: Path) -> None:
    model = load(written(tmp_path / "m.onnx", CASES["a kernel within another"][0])).graph
    model.graph[0].meta[LEARNED] = True
    assert [n.op_type for n in fold(model).graph] == ["Conv", "Conv", "Add"]


@pytest.mark.parametrize(("factor", "kinds"), [(0.1, ["Conv"]), (100.0, ["Add", "Conv", "Conv"])])
def test_branches_stay_where_8_bits_would_lose_one_beside_the_other(
    tmp_path: Path, factor: float, kinds: list[str]
) -> None:
    """One weight of 100 beside 863 small ones: the steps' errors are 864 · (100 ÷ 127)² ÷ 12 of 100², 23.5 dB below it."""
    constants = {
        "w": normal(96, 96, 3, 3, seed=21, scale=0.05),
        "f": np.full((96, 1, 1, 1), factor, np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=PADS),
        node("Conv", ["x", "f"], ["p"], group=96),
        node("Add", ["c", "p"], ["o"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 96, 4, 4]}, {"o": None}, constants)
    assert sorted(n.op_type for n in fold(load(path).graph).graph) == kinds


@pytest.mark.parametrize("target", ["ort-x86", "npu-int8", "tflite"])
def test_branches_are_one_integer_layer(tmp_path: Path, target: str) -> None:
    nodes = [*CASES["RepVGG"][0][:-1], node("Add", ["c", "a"], ["s"]), node("Relu", ["s"], ["o"])]
    path, data = written(tmp_path / "m.onnx", nodes), tmp_path / "d.npz"
    np.savez(data, x=normal(32, 4, 7, 6, seed=20))
    recipe = Recipe(target=target, tune=Tune(effort="fast"), layers=Layers(integer_start=True))
    done = convert(path, tmp_path / "q.onnx", data=data, recipe=recipe, verified=True)
    assert [(layer.name, layer.operator, layer.absorbed) for layer in done.plan.layers] == [
        ("c_node", "Conv", ("o_node",))
    ]
    assert verify(done.sidecar_path, data).findings == []
