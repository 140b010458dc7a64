"""SmoothQuant: the product stays what it was, the statistics are exact, and what normalisations make is easier to quantize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, Recipe, calibrate, convert, verify
from quantcli.fold import fold
from quantcli.load import load
from quantcli.probe import with_outputs
from quantcli.recipe import Tune
from quantcli.tune.smooth import factors, smooth
from tests.graphs import Shape, node, normal, save

WIDTH = 16
OUTLIERS = np.ones(WIDTH, np.float32)
OUTLIERS[[3, 11]] = 60


def model(path: Path, residual: bool, transposed: bool = False) -> Path:
    constants = {
        "g": OUTLIERS,
        "b": normal(WIDTH, seed=2, scale=0.1),
        "w": normal(WIDTH, WIDTH, seed=3, scale=0.3),
        "v": normal(WIDTH, WIDTH, seed=4, scale=0.3),
    }
    shape: Shape = ["N", 6, WIDTH] if not transposed else ["N", WIDTH]
    last = node("Gemm", ["n", "v"], ["q"], transB=1) if transposed else node("MatMul", ["n", "v"], ["q"])
    nodes = [
        node("LayerNormalization", ["x", "g", "b"], ["n"]),
        node("MatMul", ["n", "w"], ["p"]),
        last,
        node("Add", ["p", "q"], ["s"]),
        *([node("Add", ["s", "n"], ["y"])] if residual else [node("Erf", ["s"], ["y"])]),
    ]
    return save(path, nodes, {"x": shape}, {"y": None}, constants)


def data(path: Path, transposed: bool = False) -> Path:
    x = normal(64, WIDTH, seed=5) if transposed else normal(12, 6, WIDTH, seed=5)
    np.savez(path, x=x)
    return path


@pytest.mark.parametrize("transposed", [False, True], ids=["MatMul", "Gemm, transB"])
@pytest.mark.parametrize("residual", [False, True], ids=["folded", "beside a residual"])
def test_the_model_stays_what_it_was_and_the_statistics_are_exact(
    tmp_path: Path, residual: bool, transposed: bool
) -> None:
    path, samples = model(tmp_path / "m.onnx", residual, transposed), data(tmp_path / "d.npz", transposed)
    folded, seen = fold(load(path).graph), calibrate(path, samples)
    smoothed, statistics, done = smooth(folded, seen, Recipe())
    assert [(entry.name, len(entry.layers), entry.folded) for entry in done] == [("n", 2, not residual)]
    assert done[0].left < done[0].spread / 4
    feeds = {"x": np.load(samples)["x"]}
    names = ["n_smoothed", "y"]
    found = Runner(with_outputs(smoothed, names)).run(feeds, names)
    expected = Runner(with_outputs(folded, ["n", "y"])).run(feeds, ["n", "y"])
    # Sums of 16 float32 products in another order and with factors: (16 + 4)·2^-24 of the sum of the magnitudes, twice over.
    n = np.abs(expected["n"].astype(np.float64))
    magnitudes = sum(
        n @ np.abs(np.asarray(folded.graph.initializers[name].const_value, np.float64)).T
        if transposed and name == "v"
        else n @ np.abs(np.asarray(folded.graph.initializers[name].const_value, np.float64))
        for name in ("w", "v")
    )
    assert (np.abs(found["y"] - expected["y"]) <= (magnitudes + n) * 40 * 2.0**-24).all()
    derived = statistics.tensors["n_smoothed"]
    held = float(found["n_smoothed"].min()), float(found["n_smoothed"].max())
    if residual:
        assert (
            derived.minimum,
            derived.maximum,
        ) == held  # a product with a positive constant keeps the order of values
    else:
        assert np.allclose((derived.minimum, derived.maximum), held, rtol=2.0**-20)


def test_the_factors_are_equation_4() -> None:
    largest, weight = np.array([1.0, 4.0, 16.0]), np.array([[1.0, -2.0], [0.5, 0.25], [-4.0, 1.0]])
    raw = largest**0.5 / np.array([2.0, 0.5, 4.0]) ** 0.5
    found = factors(largest, [weight], 0.5)
    assert found is not None
    assert np.allclose(found, raw / np.prod(raw) ** (1 / 3), rtol=2.0**-22)
    assert factors(largest, [weight[:2]], 0.5) is None
    assert factors(largest, [weight * 0], 0.5) is None


def test_outliers_cost_less(tmp_path: Path) -> None:
    path, samples = model(tmp_path / "m.onnx", residual=True), data(tmp_path / "d.npz")

    def converted(name: str, wanted: bool | None) -> Conversion:
        return convert(path, tmp_path / name, data=samples, recipe=Recipe(tune=Tune(smooth=wanted)), verified=True)

    with_it, without = converted("a.onnx", None), converted("b.onnx", False)
    assert [entry.name for entry in with_it.tuned.smoothed] == ["n"]
    assert without.tuned.smoothed == ()
    # Two columns 60 times the others leave those six bits less. Half of that comes back at least: 3 bits, 18 dB of noise;
    # a third of it shows at the output, where the outliers' own products are as coarse as before.
    assert with_it.check.sqnr["y"] > without.check.sqnr["y"] + 6
    reasons = {found.name: found.reason for found in with_it.plan.floats}
    assert reasons["n_smoothed"] == "it evens the columns before they are quantized"
    assert verify(with_it.sidecar_path, samples).findings == []


def test_statistics_of_another_recipe_serve_without_smoothing(tmp_path: Path) -> None:
    path, samples = model(tmp_path / "m.onnx", residual=True), data(tmp_path / "d.npz")
    calibrate(path, samples, tmp_path / "s.stats", Recipe(tune=Tune(smooth=False)))
    assert convert(path, tmp_path / "q.onnx", tmp_path / "s.stats").tuned.smoothed == ()
    calibrate(path, samples, tmp_path / "t.stats")
    first = convert(path, tmp_path / "q.onnx", tmp_path / "t.stats")
    assert len(first.tuned.smoothed) == 1
    again = convert(path, tmp_path / "r.onnx", data=samples, recipe=Recipe(tune=Tune(effort="fast")))
    assert first.model.read_bytes() == again.model.read_bytes()


def test_what_is_not_normalised_along_its_columns_is_left(tmp_path: Path) -> None:
    nodes = [
        node("LayerNormalization", ["x", "g", "b"], ["n"], axis=1),
        node("MatMul", ["n", "w"], ["y"]),
    ]
    constants = {"g": np.ones((6, WIDTH), np.float32), "b": normal(6, WIDTH, seed=1), "w": normal(WIDTH, 4, seed=2)}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 6, WIDTH]}, {"y": None}, constants)
    statistics = calibrate(path, data(tmp_path / "d.npz"))
    assert statistics.tensors["n"].columns is None
    folded: ir.Model = fold(load(path).graph)
    assert smooth(folded, statistics, Recipe())[2] == ()


@pytest.mark.parametrize(
    ("samples", "residual", "even"),
    [(40, False, 0), (400, False, 1), (400, True, 0)],
    ids=["few rows", "many", "many, beside a residual"],
)
def test_columns_that_are_much_alike_are_left_so_where_evening_has_a_price(
    tmp_path: Path, samples: int, residual: bool, even: int
) -> None:
    """A Mul, or the room of a column that has its largest value in another sample than those that calibrated it."""
    constants = {
        "g": np.linspace(0.7, 1.3, WIDTH, dtype=np.float32),
        "b": np.zeros(WIDTH, np.float32),
        "w": normal(WIDTH, WIDTH, seed=3, scale=0.3),
    }
    nodes = [
        node("LayerNormalization", ["x", "g", "b"], ["n"]),
        node("MatMul", ["n", "w"], ["p"]),
        node("Add", ["p", "n" if residual else "x"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 6, WIDTH]}, {"y": None}, constants)
    np.savez(tmp_path / "d.npz", x=normal(samples, 6, WIDTH, seed=5))
    folded, seen = fold(load(path).graph), calibrate(path, tmp_path / "d.npz")
    assert len(smooth(folded, seen, Recipe())[2]) == even
    assert len(smooth(folded, seen, Recipe(tune=Tune(smooth=True)))[2]) == 1
