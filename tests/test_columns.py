"""Factors of columns that the constants behind a tensor take over: the model stays what it was, and 8 bits lose less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, calibrate, convert, evaluate, verify
from quantcli.fold import fold
from quantcli.load import load
from quantcli.probe import with_outputs
from quantcli.recipe import Tune
from quantcli.tune.smooth import smooth
from tests.graphs import node, normal, save

WIDTH, ROWS = 16, 6
OUTLIERS = np.ones(WIDTH, np.float32)
OUTLIERS[[3, 11]] = 60


def gated(path: Path, again: bool = False) -> Path:
    """Write a gated unit, whose product another operator may read as well."""
    nodes = [
        node("MatMul", ["x", "gate"], ["g"]),
        node("Sigmoid", ["g"], ["s"]),
        node("MatMul", ["x", "up"], ["u"]),
        node("Mul", ["s", "u"], ["h"]),
        node("MatMul", ["h", "down"], ["y" if not again else "d"]),
        *([node("Add", ["h", "d"], ["y"])] if again else []),
    ]
    constants = {
        "gate": normal(WIDTH, WIDTH, seed=1, scale=0.3),
        "up": normal(WIDTH, WIDTH, seed=2, scale=0.3) * OUTLIERS,
        "down": normal(WIDTH, WIDTH, seed=3, scale=0.3),
    }
    return save(path, nodes, {"x": ["N", ROWS, WIDTH]}, {"y": None}, constants)


def written_out(path: Path) -> Path:
    """Write a normalisation by the root of the mean square, operator by operator, an affine map and a Relu."""
    nodes = [
        node("Mul", ["x", "x"], ["xx"]),
        node("ReduceMean", ["xx"], ["mean"], axes=[-1]),
        node("Sqrt", ["mean"], ["root"]),
        node("Div", ["x", "root"], ["n"]),
        node("Mul", ["scale", "n"], ["m"]),
        node("Add", ["m", "shift"], ["a"]),
        node("Relu", ["a"], ["h"]),
        node("MatMul", ["h", "w"], ["p"]),
        node("Tanh", ["p"], ["y"]),
    ]
    constants = {
        "scale": OUTLIERS,
        "shift": normal(WIDTH, seed=2, scale=0.1),
        "w": normal(WIDTH, WIDTH, seed=3, scale=0.3),
    }
    return save(path, nodes, {"x": ["N", ROWS, WIDTH]}, {"y": None}, constants)


MODELS = {"gated unit": gated, "written out": written_out}


def data(path: Path) -> Path:
    np.savez(path, x=normal(12, ROWS, WIDTH, seed=5))
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_what_makes_the_tensor_takes_the_factors_over(tmp_path: Path, kind: str) -> None:
    path, samples = MODELS[kind](tmp_path / "m.onnx"), data(tmp_path / "d.npz")
    folded, seen = fold(load(path).graph), calibrate(path, samples)
    smoothed, statistics, done = smooth(folded, seen, Recipe())
    assert [(entry.name, entry.folded) for entry in done] == [("h", True)]
    assert done[0].left < done[0].spread / 4
    assert len(smoothed.graph) == len(folded.graph)
    feeds = dict(np.load(samples))
    found = Runner(with_outputs(smoothed, ["h_smoothed", "p" if kind != "gated unit" else "y"])).run(feeds)
    expected = Runner(with_outputs(folded, ["h", "p" if kind != "gated unit" else "y"])).run(feeds)
    name = "p" if kind != "gated unit" else "y"
    # A product of 16 terms, of values that were made of at most 16 terms and two factors each: (2·16 + 4)·2^-24 of the sum of
    # the magnitudes, for either model. The values themselves are sums, whose magnitudes are at most 16 times the largest.
    weight = next(
        np.asarray(folded.graph.initializers[w].const_value) for w in ("down", "w") if w in folded.graph.initializers
    )
    reach = np.abs(expected["h"]).max(axis=(0, 1)).astype(np.float64)
    bound = 2 * 36 * 2.0**-24 * 16 * (reach @ np.abs(weight.astype(np.float64)))
    assert (np.abs(found[name].astype(np.float64) - expected[name]) <= bound).all()
    derived = statistics.tensors["h_smoothed"]
    ends = float(found["h_smoothed"].min()), float(found["h_smoothed"].max())
    assert np.allclose((derived.minimum, derived.maximum), ends, rtol=2.0**-18)


def test_layers_are_compared_under_the_names_that_the_float_model_has(tmp_path: Path) -> None:
    path, samples = gated(tmp_path / "m.onnx"), data(tmp_path / "d.npz")
    done = convert(path, tmp_path / "q.onnx", data=samples)
    assert [layer.outputs for layer in done.plan.layers] == [("g",), ("u_smoothed",), ("y",)]
    found = evaluate(done.model, samples, path, layers=True, latency=False).layers
    assert [layer.output for layer in found] == ["g", "y"]
    assert min(layer.sqnr for layer in found) > 30


def test_integer_layers_behind_each_other_are_left_to_equalization(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "up"], ["u"]), node("Relu", ["u"], ["h"]), node("MatMul", ["h", "down"], ["y"])]
    constants = {"up": normal(WIDTH, WIDTH, seed=2, scale=0.3) * OUTLIERS, "down": normal(WIDTH, WIDTH, seed=3)}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", ROWS, WIDTH]}, {"y": None}, constants)
    assert smooth(fold(load(path).graph), calibrate(path, data(tmp_path / "d.npz")), Recipe())[2] == ()


def test_who_else_reads_the_tensor_keeps_it(tmp_path: Path) -> None:
    path, samples = gated(tmp_path / "m.onnx", again=True), data(tmp_path / "d.npz")
    assert smooth(fold(load(path).graph), calibrate(path, samples), Recipe())[2] == ()


def test_one_scale_for_a_whole_weight_keeps_its_columns(tmp_path: Path) -> None:
    path, samples = gated(tmp_path / "m.onnx"), data(tmp_path / "d.npz")
    recipe = Recipe(weight=Recipe().weight.__class__(per_channel=False))
    assert smooth(fold(load(path).graph), calibrate(path, samples, recipe=recipe), recipe)[2] == ()


@pytest.mark.parametrize("kind", MODELS)
def test_outliers_cost_less(tmp_path: Path, kind: str) -> None:
    path, samples = MODELS[kind](tmp_path / "m.onnx"), data(tmp_path / "d.npz")
    left = {}
    for wanted in (None, False):
        done = convert(
            path, tmp_path / f"{wanted}.onnx", data=samples, recipe=Recipe(tune=Tune(smooth=wanted)), verified=True
        )
        left[wanted] = done.check.sqnr["y"]
        assert verify(done.sidecar_path, samples).findings == []
    assert left[None] > left[False]
