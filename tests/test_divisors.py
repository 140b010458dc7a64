"""What is divided by stays off the grids, on which small divisors would be zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, Recipe, convert, verify
from quantcli.divisors import DIVISOR
from quantcli.recipe import Layers, Tune
from tests.graphs import Array, node, normal, save

WIDTH = 6
KEPT = ["z_node", "low_node"]


def samples() -> Array:
    """Return vectors of lengths that differ 128 times."""
    return normal(64, WIDTH, seed=1) / np.repeat(2.0 ** np.arange(8, dtype=np.float32), 8)[:, None]


def attention(folder: Path, target: str, include: tuple[str, ...] = ()) -> tuple[Conversion, Array, Array]:
    """Convert a product whose last column divides the others, as attention without a softmax; return what is found and expected."""
    nodes = [
        node("Gemm", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["h"]),
        node("MatMul", ["h", "v"], ["z"]),
        node("Slice", ["z", "zero", "last", "one"], ["top"]),
        node("Slice", ["z", "last", "end", "one"], ["divisor"]),
        node("Add", ["divisor", "epsilon"], ["low"]),
        node("Div", ["top", "low"], ["ratio"]),
        node("Gemm", ["ratio", "u"], ["y"]),
    ]
    constants: dict[str, Array] = {
        "w": normal(WIDTH, 8, seed=2),
        "v": np.abs(normal(8, 5, seed=3)),
        "u": normal(4, 3, seed=4),
        "epsilon": np.array(1e-15, np.float32),
        **{name: np.array([number]) for name, number in (("zero", 0), ("one", 1), ("last", 4), ("end", 5))},
    }
    x = samples()
    model = save(folder / "m.onnx", nodes, {"x": ["N", WIDTH]}, {"y": None, "ratio": None}, constants)
    np.savez(folder / "d.npz", x=x)
    recipe = Recipe(target=target, tune=Tune(effort="fast"), layers=Layers(include=include))
    done = convert(model, folder / "q.onnx", data=folder / "d.npz", recipe=recipe)
    return done, Runner(done.model).run({"x": x}, ["ratio"])["ratio"], Runner(model).run({"x": x}, ["ratio"])["ratio"]


def test_a_divisor_is_not_rounded(tmp_path: Path) -> None:
    done, found, expected = attention(tmp_path, "npu-int8")
    assert {layer.name for layer in done.plan.floats if layer.reason == DIVISOR} == set(KEPT)
    assert [layer.name for layer in done.plan.layers] == ["a_node", "y_node"]
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []
    assert np.isfinite(found).all()
    assert np.abs(found).max() <= np.abs(expected).max() * 1.5
    asked = ("op:Gemm", "op:MatMul", "op:Slice", "op:Add")
    _, named, _ = attention(tmp_path, "npu-int8", asked)  # the recipe may ask for it all the same
    assert np.isnan(named).any()


@pytest.mark.parametrize("target", ["ort-x86", "ort-arm"])
def test_a_product_of_integers_that_gives_reals_is_none(tmp_path: Path, target: str) -> None:
    done, found, _ = attention(tmp_path, target)
    assert [layer.name for layer in done.plan.layers] == ["a_node", "z_node", "y_node"]
    assert np.isfinite(found).all()
