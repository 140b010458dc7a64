"""Alignment: the function stays, and ranges end where grids of powers of two end."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, evaluate, verify
from quantcli.fold import constant, fold
from quantcli.load import load
from quantcli.probe import model_bytes, with_outputs
from quantcli.recipe import Tune
from quantcli.tune.align import align, best_shift, wasted
from tests.graphs import data_for, node, normal, residual_net, save


def tensors(seed: int = 1) -> dict[str, NDArray[np.generic]]:
    return {
        "w1": normal(6, 3, 3, 3, seed=seed, scale=0.3),
        "b1": normal(6, seed=seed + 1),
        "w2": normal(6, 1, 3, 3, seed=seed + 2),
        "w3": normal(6, 6, 1, 1, seed=seed + 3, scale=0.4),
        "b3": normal(6, seed=seed + 4),
        "w4": normal(96, 10, seed=seed + 5, scale=0.2),
        "b4": normal(10, seed=seed + 6),
        "shift": normal(1, 6, 1, 1, seed=seed + 7),
        "low": np.array(0, np.float32),
        "high": np.array(1.1, np.float32),
        "flat": np.array([0, -1], np.int64),
    }


@pytest.fixture
def clipped(tmp_path: Path) -> Path:
    """Return a network of two Clips that share their bounds, a sum, a constant added, and a matrix product."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1]),
        node("Clip", ["a", "low", "high"], ["r"]),
        node("Conv", ["r", "w2"], ["d"], group=6, pads=[1, 1, 1, 1]),
        node("Clip", ["d", "low", "high"], ["e"]),
        node("Conv", ["e", "w3", "b3"], ["f"]),
        node("Add", ["f", "r"], ["g"]),
        node("Add", ["g", "shift"], ["h"]),
        node("AveragePool", ["h"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["p", "flat"], ["v"]),
        node("MatMul", ["v", "w4"], ["m"]),
        node("Add", ["m", "b4"], ["y"]),
    ]
    return save(tmp_path / "clipped.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, tensors())


def loaded(path: Path) -> ir.Model:
    return fold(load(path).graph)


def run(model: ir.Model, x: NDArray[np.float32], *names: str) -> dict[str, NDArray[np.float32]]:
    return Runner(with_outputs(model, list(names)) if names else model_bytes(model)).run({"x": x}, [*names, "y"])


def test_alignment_keeps_the_function_and_scales_what_it_says(clipped: Path) -> None:
    model, x = loaded(clipped), normal(4, 3, 8, 8, seed=9)
    names = [str(value.name) for item in model.graph for value in item.outputs if value.name != "y"]
    before = run(model, x, *names)
    scales = {name: float(np.abs(before[name]).max()) / 127 for name in names}
    changed, done = align(model, scales)
    after = run(changed, x, *names)
    # A factor is rounded to float32 in every constant that it meets, and sums are of at most 96 terms.
    assert np.allclose(after["y"], before["y"], rtol=1e-4, atol=1e-4)
    for name in names:
        expected = before[name] * done.factors.get(name, 1.0)
        assert np.allclose(after[name], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert 0 < done.gained < 1
    assert all(0.7 < factor < 1.42 for factor in done.factors.values())
    # What an Add ties together has one factor; the depthwise convolution's output has its own, and fills its grid.
    assert done.factors["r"] == done.factors["f"] == done.factors["h"] == done.factors["p"]
    level = math.log2(scales["e"] * done.factors["e"])
    assert level <= round(level) < level + 1e-4
    # The first model is as it was, and the Clips no longer share their upper bound.
    assert np.asarray(constant(model.graph.initializers["high"])) == np.float32(1.1)
    highs = [item.inputs[2] for item in changed.graph if item.op_type == "Clip"]
    assert len({value.name for value in highs if value is not None}) == 2


@pytest.mark.parametrize("operator", ["Sigmoid", "Exp", "Softmax"])
def test_what_passes_no_factor_on_keeps_its_tensors(tmp_path: Path, operator: str) -> None:
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"]),
        node(operator, ["a"], ["s"]),
        node("Conv", ["s", "w3", "b3"], ["y"]),
    ]
    model = loaded(save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, tensors()))
    _, done = align(model, dict.fromkeys(["x", "a", "s", "y"], 0.7))
    assert done.factors == {}
    assert done.gained == 0


def test_a_weight_that_two_layers_have_keeps_their_tensors(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"]),
        node("Conv", ["a", "w3", "b3"], ["b"]),
        node("Conv", ["b", "w3", "b3"], ["c"]),
        node("Conv", ["c", "w2"], ["y"], group=6),
    ]
    model = loaded(save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, tensors()))
    _, done = align(model, dict.fromkeys(["x", "a", "b", "c", "y"], 0.7))
    assert done.factors == {}


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=6))
def test_the_best_shift_is_a_small_one_that_wastes_no_more_than_any_other(levels: list[float]) -> None:
    shift = best_shift(levels)
    assert abs(shift) <= 0.5
    found = sum(wasted(level + shift - 1e-9) for level in levels)
    others = [sum(wasted(level + other) for level in levels) for other in np.linspace(-0.5, 0.5, 101)]
    # 1e-9 for each level is what a shift may stay below the place that it aims at, 1e-6 what counts as equal.
    assert found <= min(others) + 1e-8 * len(levels) + 2e-6


def test_shifting_accelerators_lose_less_and_their_integers_verify(tmp_path: Path) -> None:
    stored: dict[str, NDArray[np.generic]] = {"low": np.array(0, np.float32), "high": np.array(1.1, np.float32)}
    nodes, last = [], "x"
    for number in range(6):  # a grid of 1.1 has 70 of 127 integers in use where its scale is 2^-6
        stored[f"w{number}"] = normal(8, 8, 1, 1, seed=number, scale=0.6)
        nodes.append(node("Conv", [last, f"w{number}"], [f"a{number}"]))
        nodes.append(node("Clip", [f"a{number}", "low", "high"], [last := f"r{number}"]))
    stored["w6"] = normal(8, 8, 1, 1, seed=6)
    nodes.append(node("Conv", [last, "w6"], ["y"]))
    model = save(tmp_path / "chain.onnx", nodes, {"x": ["N", 8, 6, 6]}, {"y": None}, stored)
    data = tmp_path / "d.npz"
    np.savez(data, x=np.clip(normal(96, 8, 6, 6, seed=4), -3.9, 3.9))  # the input's grid cannot change; it is full
    done, without = (
        convert(model, tmp_path / name, data=data, recipe=Recipe(target="npu-pow2", tune=tune))
        for name, tune in (("a.onnx", Tune(centre=False)), ("b.onnx", Tune(centre=False, align=False)))
    )
    kept = next(one for one in done.tuned.tries if one.kept)
    assert kept.name.startswith("alignment, ")
    assert kept.gains["alignment"][1] > 1
    assert all("alignment" not in one.name for one in without.tuned.tries)
    assert max(one.sqnr for one in without.tuned.tries) < kept.sqnr - 0.5
    scales = [scale for tensor in done.plan.tensors.values() for scale in tensor.scale]
    assert all(math.frexp(scale)[0] == 0.5 for scale in scales)
    assert verify(done.sidecar_path, data).findings == []
    moved = done.sidecar.tensors["r1"].moved
    assert moved is not None
    assert 0.7 < moved.factor[0] < 1.42
    assert moved.factor[0] != 1
    assert moved.shift == [0.0]
    assert min(layer.sqnr for layer in evaluate(done.model, data, reference=model, layers=True).layers) > 20


def test_best_tries_it_both_ways_and_other_targets_do_without(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=24)
    best = convert(model, tmp_path / "a.onnx", data=data, recipe=Recipe(target="npu-pow2", tune=Tune(effort="best")))
    assert len({"alignment" in one.name for one in best.tuned.tries[1:]}) == 2
    other = convert(model, tmp_path / "b.onnx", data=data, recipe=Recipe(target="npu-int8", tune=Tune(align=True)))
    assert not any("alignment" in one.name for one in other.tuned.tries)
