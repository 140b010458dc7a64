"""Which convolutions at a network's beginning stay float because float is faster there, and what makes integer layers of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from quantcli import convert
from quantcli.cli import run
from quantcli.fold import fold
from quantcli.load import load
from quantcli.placement import place
from quantcli.recipe import Layers, Recipe, Tune
from tests.graphs import Array, Shape, node, normal, save

SIDE = 48
FAST = Recipe(tune=Tune(effort="fast"))


def saved(folder: Path, filters: Sequence[tuple[str, Array]], between: Sequence[str], side: int | None = SIDE) -> Path:
    """Write convolutions one after the other, padded so that maps keep their size, and what stands behind each of them.

    Args:
        folder: Where to.
        filters: Names and weights; those of one input channel are depthwise, but for the first.
        between: The operator behind each, of which Silu is a Mul with a Sigmoid.
        side: Height and width of the input; None leaves them free.
    """
    nodes: list[onnx.NodeProto] = []
    last, constants = "x", dict(filters)
    for (name, weight), behind in zip(filters, between, strict=True):
        depthwise = weight.shape[1] == 1 and name != "first"
        pads = [weight.shape[2] // 2] * 4
        nodes.append(node("Conv", [last, name], [f"{name}_c"], group=len(weight) if depthwise else 1, pads=pads))
        last = f"{name}_c"
        if behind == "Silu":
            nodes += [node("Sigmoid", [last], [f"{name}_s"]), node("Mul", [last, f"{name}_s"], [f"{name}_a"])]
        elif behind == "MaxPool":
            nodes.append(node("MaxPool", [last], [f"{name}_a"], kernel_shape=[2, 2], strides=[2, 2]))
        elif behind:
            nodes.append(node(behind, [last], [f"{name}_a"]))
        last = f"{name}_a" if behind else last
    nodes.append(node("GlobalAveragePool", [last], ["y"]))
    channels = filters[0][1].shape[1]
    shape: Shape = ["N", channels, side or "H", side or "W"]
    outputs: dict[str, Shape | None] = {"y": None}
    return save(folder / "m.onnx", nodes, {"x": shape}, outputs, constants)


def first(filters: int = 8, channels: int = 3, kernel: int = 3) -> tuple[str, Array]:
    return "first", normal(filters, channels, kernel, kernel, seed=1, scale=0.2)


def depthwise(channels: int = 8) -> tuple[str, Array]:
    return "depthwise", normal(channels, 1, 3, 3, seed=2, scale=0.3)


def pointwise(inputs: int = 8, outputs: int = 16) -> tuple[str, Array]:
    return "pointwise", normal(outputs, inputs, 1, 1, seed=3, scale=0.3)


def floats(model: Path, recipe: Recipe = FAST) -> list[str]:
    """Return the convolutions that stay float because it is faster."""
    found = place(fold(load(model).graph), recipe).floats
    return [layer.name.removesuffix("_c_node") for layer in found if "faster in float" in layer.reason]


SEPARABLE = [first(), depthwise(), pointwise()]
TAKEN = {
    "x86": (FAST, ["first", "depthwise"]),
    "without VNNI": (Recipe(target="ort-x86-avx2"), ["first", "depthwise"]),
    "Arm, where it was not measured": (Recipe(target="ort-arm"), []),
    "an accelerator": (Recipe(target="npu-int8"), []),
    "everywhere": (Recipe(layers=Layers(everywhere=True)), []),
    "integers from the start": (Recipe(layers=Layers(integer_start=True)), []),
    "by name": (Recipe(layers=Layers(include=("*",))), []),
}


@pytest.mark.parametrize("case", TAKEN)
def test_the_first_convolution_and_the_depthwise_one_behind_it_are_faster_in_float(tmp_path: Path, case: str) -> None:
    recipe, expected = TAKEN[case]
    assert floats(saved(tmp_path, SEPARABLE, ["Relu", "Relu", "Relu"]), recipe) == expected


def test_a_convolution_that_was_excluded_is_as_good_to_begin_before(tmp_path: Path) -> None:
    model = saved(tmp_path, [*SEPARABLE, ("last", normal(8, 16, 1, 1, seed=4))], ["Relu"] * 4)
    assert floats(model, Recipe(layers=Layers(exclude=("depthwise_c_node",)))) == ["first"]
    assert floats(model, Recipe(layers=Layers(exclude=("pointwise_c_node",)))) == ["first", "depthwise"]


@pytest.mark.parametrize("behind", ["", "Relu", "LeakyRelu", "Silu"])
def test_activations_may_stand_before_the_next_convolution(tmp_path: Path, behind: str) -> None:
    model = saved(tmp_path, [first(), pointwise()], [behind, "Relu"])
    assert floats(model) == ["first"]
    done = convert(model, tmp_path / "q.onnx", synthetic=8, recipe=FAST)
    assert [layer.name for layer in done.plan.layers if layer.operator == "Conv"] == ["pointwise_c_node"]
    assert {"Sigmoid", "Mul"}.isdisjoint(layer.operator for layer in done.plan.layers)


INTEGERS: dict[str, tuple[list[tuple[str, Array]], list[str]]] = {
    "bytes are pooled faster": ([first(), pointwise()], ["MaxPool", "Relu"]),
    "more filters": ([first(40), pointwise(40)], ["Relu", "Relu"]),
    "more terms": ([first(8, 3, 7), pointwise()], ["Relu", "Relu"]),
    "nothing to gather": ([first(8, 3, 1), pointwise()], ["Relu", "Relu"]),
    "no convolution behind it": ([first()], ["Relu"]),
}


@pytest.mark.parametrize("case", INTEGERS)
def test_others_are_integer_layers_from_the_start(tmp_path: Path, case: str) -> None:
    filters, between = INTEGERS[case]
    assert floats(saved(tmp_path, filters, between)) == []


def test_more_filters_are_faster_where_a_depthwise_convolution_follows(tmp_path: Path) -> None:
    model = saved(tmp_path, [first(64), depthwise(64), pointwise(64)], ["Relu"] * 3)
    assert floats(model) == ["first", "depthwise"]


@pytest.mark.parametrize(("side", "expected"), [(16, []), (None, ["first", "depthwise"])])
def test_small_maps_are_not_worth_it_and_those_of_unknown_size_are(
    tmp_path: Path, side: int | None, expected: list[str]
) -> None:
    assert floats(saved(tmp_path, SEPARABLE, ["Relu"] * 3, side)) == expected


def test_what_a_sum_reads_as_well_is_in_integers(tmp_path: Path) -> None:
    """ONNX Runtime would transpose around every sum of a residual network otherwise."""
    constants = dict([first(), pointwise(8, 8)])
    nodes = [
        node("Conv", ["x", "first"], ["a"], pads=[1, 1, 1, 1]),
        node("Conv", ["a", "pointwise"], ["b"]),
        node("Relu", ["b"], ["r"]),
        node("Add", ["a", "r"], ["s"]),
        node("GlobalAveragePool", ["s"], ["y"]),
    ]
    assert floats(save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, SIDE, SIDE]}, {"y": None}, constants)) == []


def test_light_convolutions_behind_integer_layers_are_integer_layers(tmp_path: Path) -> None:
    heavy = "heavy", normal(8, 8, 3, 3, seed=4, scale=0.2)
    model = saved(
        tmp_path, [("first", normal(8, 3, 7, 7, seed=1, scale=0.1)), heavy, depthwise(), pointwise()], ["Relu"] * 4
    )
    assert floats(model) == []


def test_strict_makes_integer_layers_of_them_from_the_same_statistics(tmp_path: Path) -> None:
    model, data, stats = saved(tmp_path, SEPARABLE, ["Relu"] * 3), tmp_path / "d.npz", tmp_path / "s.qstats"
    np.savez(data, x=normal(8, 3, SIDE, SIDE, seed=5))
    assert run(["calibrate", str(model), "--data", str(data), "-o", str(stats), "-q"]) == 0
    given = ["convert", str(model), "--stats", str(stats), "--effort", "fast", "-q", "-o"]
    operators = {}
    for name, more in (("plain", []), ("strict", ["--strict"]), ("start", ["--integer-start"])):
        assert run([*given, str(tmp_path / f"{name}.onnx"), *more]) == 0
        operators[name] = [one.op_type for one in onnx.load(tmp_path / f"{name}.onnx").graph.node]
    assert operators["strict"] == operators["start"]
    assert operators["plain"].count("QuantizeLinear") == operators["strict"].count("QuantizeLinear") - 2
