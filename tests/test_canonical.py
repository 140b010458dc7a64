"""Operators in the form that integer kernels know: which are rewritten, and that they compute what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.fold import fold
from quantcli.load import load
from quantcli.probe import model_bytes
from quantcli.recipe import Layers, Tune
from tests.graphs import Array, node, normal, real, save

X = normal(3, 4, 5, 6, seed=1)


SAME: dict[str, tuple[onnx.NodeProto, dict[str, Array], list[str]]] = {
    "Sub, a constant": (node("Sub", ["x", "k"], ["o"]), {"k": normal(4, 1, 1)}, ["Add"]),
    "Sub, a constant first": (node("Sub", ["k", "x"], ["o"]), {"k": normal(4, 1, 1)}, ["Sub"]),
    "Div by a power of two": (node("Div", ["x", "k"], ["o"]), {"k": real(8.0)}, ["Mul"]),
    "Div by zeros": (
        node("Div", ["x", "k"], ["o"]),
        {"k": np.array([[[1]], [[0]], [[1]], [[1]]], np.float32)},
        ["Div"],
    ),
    "Div, a constant first": (node("Div", ["k", "x"], ["o"]), {"k": real(8.0)}, ["Div"]),
    "Div by what has no inverse": (node("Div", ["x", "k"], ["o"]), {"k": real(1e-45)}, ["Div"]),
    "Neg": (node("Neg", ["x"], ["o"]), {}, ["Mul"]),
    "Max": (node("Max", ["x", "k"], ["o"]), {"k": real(0.3)}, ["Clip"]),
    "Min, constant first": (node("Min", ["k", "x"], ["o"]), {"k": normal(1, 1)}, ["Clip"]),
    "Max, one per channel": (node("Max", ["x", "k"], ["o"]), {"k": normal(4, 1, 1)}, ["Max"]),
    "Max, a constant of higher rank": (node("Max", ["x", "k"], ["o"]), {"k": normal(1, 1, 1, 1, 1)}, ["Max"]),
    "Max of three": (node("Max", ["x", "k", "k"], ["o"]), {"k": real(0.1)}, ["Max", "Max"]),
    "PRelu": (node("PRelu", ["x", "k"], ["o"]), {"k": normal(1)}, ["LeakyRelu"]),
    "PRelu, one per channel": (node("PRelu", ["x", "k"], ["o"]), {"k": normal(4, 1, 1)}, ["PRelu"]),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_to_the_bit(tmp_path: Path, name: str) -> None:
    operator, constants, kinds = SAME[name]
    path = save(tmp_path / "m.onnx", [operator], {"x": ["N", 4, 5, 6]}, {"o": None}, constants)
    folded = fold(load(path).graph)
    assert [n.op_type for n in folded.graph] == kinds
    found, expected = Runner(model_bytes(folded)).run({"x": X})["o"], Runner(path).run({"x": X})["o"]
    assert found.shape == expected.shape
    assert (found == expected).all()


def test_divisions_by_constants_are_products(tmp_path: Path) -> None:
    k = normal(4, 1, 1, seed=2)
    path = save(tmp_path / "m.onnx", [node("Div", ["x", "k"], ["o"])], {"x": ["N", 4, 5, 6]}, {"o": None}, {"k": k})
    folded = fold(load(path).graph)
    assert [n.op_type for n in folded.graph] == ["Mul"]
    found, expected = Runner(model_bytes(folded)).run({"x": X})["o"], Runner(path).run({"x": X})["o"]
    # Two roundings in place of one: 1/c and the product.
    assert (np.abs(found - expected) <= 3 * 2.0**-24 * np.abs(expected)).all()


MEANS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "kept": ({"axes": [2, 3]}, ["GlobalAveragePool"]),
    "from behind, dropped": ({"axes": [-1, -2], "keepdims": 0}, ["GlobalAveragePool", "Squeeze"]),
    "one axis": ({"axes": [3]}, ["ReduceMean"]),
    "all": ({}, ["ReduceMean"]),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_over_space_are_global_pools(tmp_path: Path, name: str) -> None:
    attributes, kinds = MEANS[name]
    path = save(
        tmp_path / "m.onnx", [node("ReduceMean", ["x"], ["o"], **attributes)], {"x": ["N", 4, 5, 6]}, {"o": None}, {}
    )
    folded = fold(load(path).graph)
    assert [n.op_type for n in folded.graph] == kinds
    found, expected = Runner(model_bytes(folded)).run({"x": X})["o"], Runner(path).run({"x": X})["o"]
    # Sums of 30 values in any order: 30·2^-24 of the mean of the magnitudes, each way.
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2 * 30 * 2.0**-24 * np.abs(X).max()


def test_rotated_halves_are_integers_throughout(tmp_path: Path) -> None:
    """Positions of transformers (Su et al. 2021, arXiv 2104.09864): x·cos + (−x₂, x₁)·sin."""
    halves = [
        node("Split", ["x"], ["x1", "x2"], axis=2),
        node("Neg", ["x2"], ["n"]),
        node("Concat", ["n", "x1"], ["r"], axis=2),
    ]
    nodes = [
        *halves,
        node("Mul", ["x", "cos"], ["a"]),
        node("Mul", ["r", "sin"], ["b"]),
        node("Add", ["a", "b"], ["s"]),
        node("MatMul", ["s", "w"], ["o"]),
    ]
    angles = np.arange(20, dtype=np.float32).reshape(1, 5, 4) / 7
    constants = {"cos": np.cos(np.tile(angles, 2)), "sin": np.sin(np.tile(angles, 2)), "w": normal(8, 6, seed=3)}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 5, 8]}, {"o": None}, constants)
    np.savez(tmp_path / "d.npz", x=normal(32, 5, 8, seed=4))
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(target="npu-int8"), verified=True)
    assert not done.plan.floats


STACKED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "dropped, the last one first": (
        {"axes": [3], "keepdims": 0},
        {"axes": [2], "keepdims": 0},
        ["GlobalAveragePool", "Squeeze"],
    ),
    "dropped, the last one last": (
        {"axes": [2], "keepdims": 0},
        {"axes": [-1], "keepdims": 0},
        ["GlobalAveragePool", "Squeeze"],
    ),
    "kept": ({"axes": [-1]}, {"axes": [2]}, ["GlobalAveragePool"]),
    "not all": ({"axes": [3]}, {"axes": [1]}, ["ReduceMean", "ReduceMean"]),
    "one kept": ({"axes": [3]}, {"axes": [2], "keepdims": 0}, ["ReduceMean", "ReduceMean"]),
    "everything first": ({}, {"axes": [2, 3]}, ["ReduceMean", "GlobalAveragePool"]),
}


@pytest.mark.parametrize("name", STACKED)
def test_means_of_one_axis_after_the_other_are_global_pools(tmp_path: Path, name: str) -> None:
    first, second, kinds = STACKED[name]
    nodes = [node("ReduceMean", ["x"], ["m"], **first), node("ReduceMean", ["m"], ["o"], **second)]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 4, 5, 6]}, {"o": None}, {})
    folded = fold(load(path).graph)
    assert [n.op_type for n in folded.graph] == kinds
    found, expected = Runner(model_bytes(folded)).run({"x": X})["o"], Runner(path).run({"x": X})["o"]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2 * 30 * 2.0**-24 * np.abs(X).max()


EINSUMS = {
    # equation, shapes, and whether it is a product of matrices
    "bij,bjk->bik": ((3, 4, 5), (3, 5, 6), True),
    "bij,bkj->bik": ((3, 4, 5), (3, 6, 5), True),
    "bqhd,bkhd->bhqk": ((3, 4, 2, 5), (3, 6, 2, 5), True),
    "bhqk,bkhd->bqhd": ((3, 2, 4, 6), (3, 6, 2, 5), True),
    "bid, de -> bie": ((3, 4, 5), (5, 6), True),
    "abid,ed->aibe": ((3, 2, 4, 5), (6, 5), True),
    "ij,jk->ki": ((4, 5), (5, 6), True),
    "byhwc,hkc->byhwk": ((2, 3, 4, 5, 6), (4, 7, 6), True),  # relative positions of vision transformers
    "byhwc,wkc->byhwk": ((2, 3, 4, 5, 6), (5, 7, 6), True),
    "bhwc,wkc->wkhb": ((2, 4, 5, 6), (5, 7, 6), True),
    "bij,bjkl->bikl": ((3, 4, 5), (3, 5, 2, 6), False),  # two letters of the second's own
    "bij,bjk->bi": ((3, 4, 5), (3, 5, 6), False),  # sums over k alone
    "bijk,bjk->bi": ((3, 4, 5, 2), (3, 5, 2), False),  # two letters summed
    "bi,bj->bij": ((3, 4), (3, 5), False),  # nothing summed
    "bii,bij->bj": ((3, 4, 4), (3, 4, 5), False),  # a diagonal
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsums_of_one_shared_letter_are_products(tmp_path: Path, equation: str) -> None:
    first, second, product = EINSUMS[equation]
    a, b = normal(*first, seed=1), normal(*second, seed=2)
    path = save(
        tmp_path / "m.onnx",
        [node("Einsum", ["x", "y"], ["o"], equation=equation)],
        {"x": first, "y": second},
        {"o": None},
        {},
    )
    folded = fold(load(path).graph)
    kinds = [n.op_type for n in folded.graph]
    assert ("MatMul" in kinds, "Einsum" in kinds) == (product, not product)
    found = Runner(model_bytes(folded)).run({"x": a, "y": b})["o"]
    exact = np.einsum(equation.replace(" ", ""), a.astype(np.float64), b.astype(np.float64))
    magnitudes = np.einsum(equation.replace(" ", ""), np.abs(a).astype(np.float64), np.abs(b).astype(np.float64))
    assert found.shape == exact.shape
    assert (np.abs(found - exact) <= magnitudes * 24 * 2.0**-24).all()  # at most 20 terms, and their products


@pytest.mark.parametrize("target", ["ort-x86", "npu-int8"])
def test_a_table_of_relative_positions_is_a_weight(tmp_path: Path, target: str) -> None:
    table, x = normal(4, 7, 6, seed=2), normal(8, 3, 4, 5, 6, seed=1)
    path = save(
        tmp_path / "m.onnx",
        [node("Einsum", ["x", "t"], ["o"], equation="byhwc,hkc->byhwk")],
        {"x": ["N", 3, 4, 5, 6]},
        {"o": None},
        {"t": table},
    )
    np.savez(tmp_path / "d.npz", x=x)
    recipe = Recipe(target=target, tune=Tune(effort="fast"), layers=Layers(everywhere=True))
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe)
    assert [layer.operator for layer in done.sidecar.layers] == ["MatMul"]
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []
    found, expected = (Runner(m).run({"x": x})["o"] for m in (done.model, path))
    # Values and weights are off by half a step each, six products are added up, and the sum is rounded once more.
    steps = 2 * np.abs(x).max() / 254, 2 * np.abs(table).max() / 254, 2 * np.abs(expected).max() / 254
    bound = 3 * (steps[0] * np.abs(table).max() + steps[1] * np.abs(x).max() + steps[0] * steps[1]) + steps[2]
    assert np.abs(found - expected).max() <= bound


def test_padding_is_written_on_integers(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Pad", ["c", "n"], ["p"]),
        node("Add", ["p", "p"], ["a"]),
        node("Conv", ["a", "w"], ["o"]),
    ]
    constants = {"w": normal(4, 4, 1, 1, seed=2), "n": np.array([0, 0, 1, 0, 0, 0, 2, 1])}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 4, 5, 6]}, {"o": None}, constants)
    np.savez(tmp_path / "d.npz", x=X)
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", verified=True)
    pad = next(n for n in onnx.load(done.model).graph.node if n.op_type == "Pad")
    tensor = done.sidecar.tensors["c"]
    assert list(pad.input)[:3:2] == [tensor.integers, "c_zero_point"]
    assert list(pad.output) == [done.sidecar.tensors["p"].integers]
    wide = convert(
        path, tmp_path / "w.onnx", data=tmp_path / "d.npz", recipe=Recipe(layers=Layers(everywhere=True)), verified=True
    )
    x = {"x": X}
    assert (Runner(done.model).run(x)["o"] == Runner(wide.model).run(x)["o"]).all()
