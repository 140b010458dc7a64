"""Equalization: factors of channels that leave the float model as it is and make the noise of rounding least."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibration.hooks.onnxruntime import Runner
from calibration.statistics import Statistics
from quantcli import Recipe, calibrate, convert, verify
from quantcli.evaluation.compare import moved
from quantcli.fold import constant, fold
from quantcli.load import load
from quantcli.probe import model_bytes, with_outputs
from quantcli.recipe import Activation, Calibration, Tune, Weight
from quantcli.sidecar import MovedEntry
from quantcli.tune.bias import channel_sums
from quantcli.tune.candidates import Samples, equalized, grids_of
from quantcli.tune.equalize import Equalization, Grids, Looked, Met, equalize
from quantcli.tune.noise import CONSIDERED, ROUNDED, Cut, Noise, Tensor, reaching
from quantcli.tune.noise import Weight as RoundedWeight
from quantcli.tuning import UNTUNED
from tests.graphs import data_for, node, normal, residual_net, save

Array = NDArray[np.float64]


def loaded(path: Path) -> ir.Model:
    return fold(load(path).graph)


def grids(model: ir.Model, recipe: Recipe | None = None) -> Grids:
    """Return what would be rounded of a model."""
    nothing = Statistics("", "", {}, 0, "minmax", {}, {}, {}, ())
    return grids_of(model, nothing, recipe or Recipe(), {})


# ---- predicted noise -----------------------------------------------------------------------------------------------------------


def drawn_noise(seed: int, symmetric: bool, shared: bool, asymmetric: bool = False) -> Noise:
    """Return the noise of two tensors, two weights and a Clip over six sets of channels."""
    draw = np.random.default_rng(seed)

    def some(*shape: int) -> Array:
        return np.exp(draw.normal(size=shape))

    sets = [draw.permutation(6)[:4] for _ in range(2)]
    tensors = tuple(Tensor(own, some(4) * (draw.random(4) < 0.5), some(4), some(4) * 1e-3, some(4)) for own in sets)
    low = some(3, 4) * (draw.random((3, 4)) < 0.5) * asymmetric, np.zeros((4, 2))
    whole = RoundedWeight.of(draw.permutation(6)[:3], sets[0][None], low[0], some(3, 4), some(1, 4), 7)
    grouped = RoundedWeight.of(sets[0], sets[1].reshape(2, 2), low[1], some(4, 2), some(2, 2), 7)
    # What a Clip costs grows with the distance from a factor of 1, and slopes leap at the factors that are known.
    known = np.linspace(-1.5, 1.0, 11)
    cut = Cut(draw.permutation(6)[:3], known, np.square(known) * some(3, 1))
    return Noise(tensors, (whole, grouped), 15, symmetric, shared, 6, [cut])


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), symmetric=st.booleans(), shared=st.booleans(), asymmetric=st.booleans())
def test_slopes_are_those_of_the_noise(seed: int, symmetric: bool, shared: bool, asymmetric: bool) -> None:
    """Weights' grids may lie about zero or not, or one of them may."""
    noise = drawn_noise(seed, symmetric, shared, asymmetric)
    logs = np.random.default_rng(seed + 1).normal(size=6) * 0.3
    _, slope = noise.at(logs)
    step = 1e-5
    for place in range(6):
        way = np.eye(6)[place] * step
        found = (noise.at(logs + way)[0] - noise.at(logs - way)[0]) / (2 * step)
        # A central difference misses step²/6 of the third derivative, at most 48³ of the noise (norms of order 16), and rounding.
        bound = noise.at(logs)[0] * (step**2 / 6 * 48**3 + 4 * np.finfo(float).eps / step)
        assert found == pytest.approx(slope[place], abs=bound)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), symmetric=st.booleans(), shared=st.booleans())
def test_factors_never_raise_the_noise_and_keep_their_bounds(seed: int, symmetric: bool, shared: bool) -> None:
    noise = drawn_noise(seed, symmetric, shared)
    free = np.array([True, True, True, True, False, True])
    lowest = np.array([-np.inf, -0.2, 0.0, -np.inf, -np.inf, -np.inf])
    logs, gained = noise.least(free, lowest)
    assert noise.at(logs)[0] <= noise.at(np.zeros(6))[0]
    assert gained == pytest.approx(10 * np.log10(noise.at(np.zeros(6))[0] / noise.at(logs)[0]), abs=1e-9)
    assert gained >= 0
    assert logs[4] == 0
    assert (logs >= lowest).all()


def test_a_tensor_alone_is_evened_out() -> None:
    reach = np.array([8.0, 1.0, 0.25, 4.0])
    tensor = Tensor(np.arange(4), np.zeros(4), reach, np.ones(4), np.square(reach) / 3)
    noise = Noise((tensor,), (), 255, False, False, 4)
    logs, gained = noise.least(np.ones(4, dtype=bool), np.full(4, -np.inf))
    even = reach / np.exp(logs)
    assert (
        even.max() / even.min() < 4
    )  # of 32; the furthest are nearly alike, and what reaches less adds little in any case
    assert np.sort(even)[1:].max() / np.sort(even)[1:].min() < 1.5
    # Of channels that all end where the grid does, each one's noise is (reach/255)²/12; before, each had the furthest one's.
    assert gained == pytest.approx(10 * np.log10(4 * 64 / np.square(reach).sum()), abs=0.5)


def test_what_is_predicted_is_what_rounding_does() -> None:
    draw = np.random.default_rng(3)
    spread = np.array([6.0, 1.0, 0.3, 0.004, 2.0])
    values = np.maximum(draw.normal(size=(4000, 5)), 0) * spread
    weight = draw.normal(size=(3, 5))
    scale = values.max() / 255
    error = (np.rint(values / scale) * scale - values) @ weight.T
    result = values @ weight.T
    met = Met.of(values)
    gain = np.square(weight).sum(axis=0) / result.var(axis=0).sum() * met.active / met.values
    found = Noise((Tensor(np.arange(5), met.low, met.high, gain, met.power),), (), 255, False, False, 5)
    measured = np.square(error).sum(axis=1).mean() / result.var(axis=0).sum()
    # Means over 4,000 samples are uncertain by a few percent, and rounding what is hardly a step by more.
    assert found.at(np.zeros(5))[0] == pytest.approx(measured, rel=0.1)


def test_of_long_rows_the_largest_elements_are_kept() -> None:
    draw = np.random.default_rng(4)
    low, high = draw.random((2, 3, 100))
    weight = RoundedWeight.of(np.arange(3), np.arange(100)[None], low, high, np.ones((1, 100)), 7)
    assert weight.low.shape == weight.high.shape == weight.columns.shape == (3, CONSIDERED)
    furthest = np.sort(np.maximum(low, high))[:, -CONSIDERED:]
    assert (np.sort(np.maximum(weight.low, weight.high)) == furthest).all()
    for reach, kept in ((low, weight.low), (high, weight.high)):
        assert (reach[np.arange(3)[:, None], weight.columns] == kept).all()


@pytest.mark.parametrize("shared", [False, True])
def test_the_step_of_a_weight_is_that_of_its_lowest_and_highest(shared: bool) -> None:
    low, high = np.array([[0.0, 3.0], [1.0, 0.0]]), np.array([[5.0, 0.0], [0.0, 2.0]])
    sets, power = np.arange(2), np.array([[0.5, 0.25]])
    weight = RoundedWeight.of(sets, np.arange(2, 4)[None], low, high, power, 15)
    found, _ = Noise((), (weight,), 255, False, shared, 4).at(np.zeros(4))
    spans = np.array([8.0, 8.0]) if shared else np.array([8.0, 3.0])
    # Norms of order 16 of two values overstate the larger one by 2^(1/16) at most, of four by 4^(1/16).
    expected = ROUNDED / 12 * np.square(spans / 15).sum() * power.sum()
    assert expected <= found <= expected * 4 ** (2 / 16)


def test_what_hardly_reaches_anywhere_counts_for_more() -> None:
    low, high = reaching(np.array([0.0, 0.5, 0.0]), np.array([10.0, 0.1, 0.0]))
    assert low.tolist() == [0.0, 3.0, 0.0]
    assert high == pytest.approx([10.0, 0.6, 0.0])


def test_batches_are_met_together() -> None:
    values = normal(6, 3, 4, seed=2).astype(np.float64)
    whole, parts = Met.of(values), Met.of(values[:2]).with_more(Met.of(values[2:]))
    for field in ("low", "high", "values", "active", "variance", "power"):
        assert getattr(parts, field) == pytest.approx(getattr(whole, field))
    flat = np.moveaxis(values, 1, 0).reshape(3, -1)
    assert whole.variance == pytest.approx(flat.var(axis=1))
    assert whole.power == pytest.approx(np.square(flat).mean(axis=1))


# ---- models --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A residual net whose channels differ by factors of up to a thousand, with everything that factors pass."""
    spread = np.exp(np.linspace(-3.4, 3.4, 8)).astype(np.float32)
    tensors = {
        "w1": normal(8, 3, 3, 3, seed=1, scale=0.3) * spread[:, None, None, None],
        "b1": normal(8, seed=2, scale=0.1) * spread,
        "w2": normal(8, 1, 3, 3, seed=3, scale=0.3),
        "w3": normal(8, 8, 1, 1, seed=4, scale=0.3) / spread[None, :, None, None],
        "b3": np.full(8, 3.0, np.float32),
        "w4": normal(4, 16, 1, 1, seed=5, scale=0.3),
        "w5": normal(5, 4, seed=6, scale=0.3),
    }
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "w2"], ["d"], pads=[1, 1, 1, 1], group=8),
        node("Relu", ["d"], ["dr"]),
        node("Add", ["ar", "dr"], ["s"]),
        node("MaxPool", ["s"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "w3", "b3"], ["e"]),
        node("Relu", ["e"], ["er"]),
        node("Concat", ["p", "er"], ["c"], axis=1),
        node("Conv", ["c", "w4"], ["f"]),
        node("GlobalAveragePool", ["f"], ["g"]),
        node("Flatten", ["g"], ["h"]),
        node("Gemm", ["h", "w5"], ["y"], transB=1),
    ]
    return save(tmp_path / "uneven.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, tensors)


def outputs(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = Runner(model_bytes(model)).run({"x": x})["y"]
    return found


def test_equalization_keeps_the_function_and_evens_the_tensors(uneven: Path) -> None:
    model, x = loaded(uneven), normal(6, 3, 8, 8, seed=9)
    changed, done = equalize(model, [{"x": x}], grids(model))
    # Factors are exact in the algebra; each is rounded to float32 once in either weight, and sums are of at most 27 terms.
    assert np.allclose(outputs(changed, x), outputs(model, x), rtol=1e-4, atol=1e-4)

    def spread(of: ir.Model) -> float:
        largest = Runner(with_outputs(of, ["ar"])).run({"x": x}, ["ar"])["ar"].max(axis=(0, 2, 3))
        return float(largest.max() / largest.min())

    assert spread(model) > 300
    assert spread(changed) < 100  # the rest would cost the weights more
    assert done.channels > 0
    assert done.gained > 3
    names = [str(value.name) for item in model.graph for value in item.outputs if value.name != "y"]
    before, after = (Runner(with_outputs(of, names)).run({"x": x}, names) for of in (model, changed))
    for name in names:
        entry = done.moved.get(name)
        expected = (
            before[name] if entry is None else moved(before[name], MovedEntry(list(entry.factor), list(entry.shift)))
        )
        assert np.allclose(after[name], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert len(done.moved) > 2
    assert {name for name, _ in done.refused} >= {"x", "y"}
    assert all(reason for _, reason in done.refused)


def test_samples_are_looked_at_in_parts_where_memory_is_short(uneven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, feeds = loaded(uneven), [{"x": normal(6, 3, 8, 8, seed=9)}, {"x": normal(2, 3, 8, 8, seed=10)}]
    whole = equalize(model, feeds, grids(model))[1]
    runs: list[int] = []
    run = Runner.run

    def counted(self: Runner, given: dict[str, Any], names: Any = None) -> dict[str, Any]:
        runs.append(len(given["x"]))
        return run(self, given, names)

    monkeypatch.setattr(Runner, "run", counted)
    monkeypatch.setattr("quantcli.tune.values.ROOM", 1)
    parts = equalize(model, feeds, grids(model))[1]
    assert set(runs) == {1}
    assert parts.moved.keys() == whole.moved.keys()
    for name, entry in parts.moved.items():
        assert entry.factor == pytest.approx(whole.moved[name].factor, rel=1e-6)  # sums of squares in another order
        assert entry.shift == pytest.approx(whole.moved[name].shift, rel=1e-6)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("first", [1, 3, 4, 7])
def test_what_was_met_already_is_not_looked_at_again(
    uneven: Path, monkeypatch: pytest.MonkeyPatch, first: int, fixed: bool
) -> None:
    model, feeds = loaded(uneven), [{"x": normal(4, 3, 8, 8, seed=9)}, {"x": normal(4, 3, 8, 8, seed=10)}]
    if fixed:
        model.graph.inputs[0].shape = ir.Shape([4, 3, 8, 8])
    whole, looked = equalize(model, feeds, grids(model))[1], Looked()
    rows: list[int] = []
    of = Met.of

    def counting(array: NDArray[np.float32]) -> Met:
        rows.append(len(array))
        return of(array)

    monkeypatch.setattr(Met, "of", counting)
    Equalization(model, feeds, grids(model), samples=first, looked=looked).foreseen()
    found = equalize(model, feeds, grids(model), looked=looked)[1]
    tensors = len(looked.met)
    assert sum(rows) == 8 * tensors
    assert looked.samples == 8
    assert found.moved.keys() == whole.moved.keys()
    for name, entry in found.moved.items():
        assert entry.factor == pytest.approx(whole.moved[name].factor, rel=1e-6)  # sums of squares in another order


def test_equalization_absorbs_what_relu_never_cuts(tmp_path: Path) -> None:
    tensors = {
        "w1": normal(4, 3, 1, 1, seed=1, scale=0.1),
        "b1": np.array([5, 0, 4, 0], np.float32),
        "w2": normal(2, 4, 1, 1, seed=2),
    }
    nodes = [node("Conv", ["x", "w1", "b1"], ["a"]), node("Relu", ["a"], ["r"]), node("Conv", ["r", "w2"], ["y"])]
    model = loaded(save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 4, 4]}, {"y": None}, tensors))
    x = normal(8, 3, 4, 4, seed=3)
    changed, done = equalize(model, [{"x": x}], grids(model))
    assert done.absorbed == 2
    for name, entry in done.moved.items():
        before, after = (Runner(with_outputs(of, [name])).run({"x": x}, [name])[name] for of in (model, changed))
        assert np.allclose(after, moved(before, MovedEntry(list(entry.factor), list(entry.shift))), atol=1e-5)
    assert set(done.moved) == {"a", "r"}
    assert np.allclose(outputs(changed, x), outputs(model, x), atol=1e-5)
    # What was absorbed is out of the bias: 5 and 4 are what a Relu never cut, but for the spread of the products.
    assert (np.asarray(constant(changed.graph.initializers["b1"]))[[0, 2]] < [2, 2]).all()


@pytest.mark.parametrize("off", [0, 40, 99])
def test_what_a_single_sample_takes_a_relu_down_to_is_not_absorbed(tmp_path: Path, off: int) -> None:
    """Whether the sample is swept or not, nothing of the Relu's grid lies below zero, where it would have no integer layer."""
    tensors = {
        "w1": np.eye(3, dtype=np.float32)[:, :, None, None] * np.array([0.1, 1, 10], np.float32)[:, None, None, None],
        "b1": np.array([5, 5, 5], np.float32),
        "w2": normal(2, 3, 1, 1, seed=2),
    }
    nodes = [node("Conv", ["x", "w1", "b1"], ["a"]), node("Relu", ["a"], ["r"]), node("Conv", ["r", "w2"], ["y"])]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 4, 4]}, {"y": None}, tensors)
    x = np.abs(normal(100, 3, 4, 4, seed=3))
    x[off, 1, 0, 0] = -6.0
    np.savez(tmp_path / "d.npz", x=x)
    recipe = Recipe(tune=Tune(equalize=True, samples=16, ranges=False))
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe)
    entry = done.sidecar.tensors["r"]
    assert entry.moved is not None
    assert entry.moved.shift[1] == 0
    assert entry.moved.shift[0] < -3
    assert (entry.lo, entry.zero_point) == ([0.0], [0])
    assert done.plan.layers[0].clamp == (0, 255)


def clipping(path: Path, bound: float, column: float = 1.0) -> Path:
    """A convolution of uneven channels, a Clip, and another convolution, with so large weights of the second channel."""
    spread, columns = np.array([[1, 10, 0.1, 5], [1, column, 1, 1]], np.float32)
    tensors = {
        "w1": normal(4, 3, 1, 1, seed=1) * spread[:, None, None, None],
        "w2": normal(2, 4, 1, 1, seed=2) * columns[None, :, None, None],
        "lo": np.array(0, np.float32),
        "hi": np.array(bound, np.float32),
    }
    nodes = [node("Conv", ["x", "w1"], ["a"]), node("Clip", ["a", "lo", "hi"], ["r"]), node("Conv", ["r", "w2"], ["y"])]
    return save(path, nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, tensors)


@pytest.mark.parametrize("bound", [100.0, 8.0])
def test_what_a_clip_cuts_often_keeps_its_factor_and_what_it_never_cuts_does_not(tmp_path: Path, bound: float) -> None:
    model, x = loaded(clipping(tmp_path / "m.onnx", bound)), normal(64, 3, 8, 8, seed=3)
    changed, done = equalize(model, [{"x": x}], grids(model))
    assert done.layers
    assert done.exact
    assert np.allclose(outputs(changed, x), outputs(model, x), rtol=1e-4, atol=1e-3)
    cut = Runner(with_outputs(model, ["a"])).run({"x": x}, ["a"])["a"].max(axis=(0, 2, 3)) > bound
    assert cut.tolist() == [False, bound == 8.0, False, bound == 8.0]
    moved_by = np.abs(np.array(done.moved["r"].factor) - 1)
    assert (moved_by[cut] == 0).all()
    assert (moved_by[~cut] > 0.1).all()


def test_a_clip_cuts_otherwise_where_weights_gain_more_by_it(tmp_path: Path) -> None:
    """All channels are cut nearly always, so that another bound changes a constant, and 4 bits do not hold uneven columns."""
    model, x = loaded(clipping(tmp_path / "m.onnx", 0.01, 64.0)), normal(64, 3, 8, 8, seed=3)
    changed, done = equalize(model, [{"x": x}], grids(model, Recipe(weight=Weight(bits=4))))
    assert not done.exact
    assert done.gained > 0.2
    before, after = outputs(model, x).astype(np.float64), outputs(changed, x).astype(np.float64)
    assert 0 < np.square(after - before).mean() < 1e-3 * before.var()


def test_clips_of_one_tensor_have_their_own_bounds_and_one_that_gives_nothing_keeps_its_channels(
    tmp_path: Path,
) -> None:
    tensors = {
        "w1": normal(4, 3, 1, 1, seed=1) * np.array([1, 10, 0.1, 5], np.float32)[:, None, None, None],
        "w2": normal(2, 4, 1, 1, seed=2),
        "w3": normal(2, 4, 1, 1, seed=4),
        **{name: np.array(value, np.float32) for name, value in (("lo", 0), ("near", 1), ("far", 100))},
    }
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        node("Clip", ["a", "lo", "near"], ["r"]),
        node("Clip", ["a", "lo", "far"], ["s"]),
        node("Conv", ["r", "w2"], ["b"]),
        node("Conv", ["s", "w3"], ["c"]),
        node("Add", ["b", "c"], ["y"]),
    ]
    x = normal(64, 3, 8, 8, seed=3)
    model = loaded(save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, tensors))
    changed, done = equalize(model, [{"x": x}], grids(model))
    assert done.layers
    before, after = outputs(model, x).astype(np.float64), outputs(changed, x).astype(np.float64)
    # Had the nearer Clip the other's bound, nothing that it cuts would count, and 8 % of the variance would change.
    assert np.square(after - before).mean() < 1e-2 * before.var()

    tensors["near"] = tensors["lo"]
    model = loaded(save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, tensors))
    changed, done = equalize(model, [{"x": x}], grids(model))
    assert any("does not pass factors on" in reason for _, reason in done.refused)
    assert np.allclose(outputs(changed, x), outputs(model, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("bound", "bits", "times"), [(100.0, 8, 1), (0.01, 4, 2)])
def test_a_model_whose_clips_cut_otherwise_is_observed_again(
    tmp_path: Path, bound: float, bits: int, times: int
) -> None:
    path, recipe = clipping(tmp_path / "m.onnx", bound, 64.0), Recipe(weight=Weight(bits=bits))
    x = normal(24, 3, 8, 8, seed=3)
    np.savez(tmp_path / "d.npz", x=x)
    asked: list[bool] = []

    def observe(model: ir.Model, channels: bool = False) -> Statistics:
        asked.append(channels)
        changed = tmp_path / f"{len(asked)}.onnx"
        changed.write_bytes(model_bytes(model))
        return calibrate(changed, tmp_path / "d.npz", recipe=Recipe(calibration=Calibration(channels=channels)))

    seen, samples = calibrate(path, tmp_path / "d.npz"), Samples(({"x": x[:16]},), ({"x": x[16:]},))
    candidate = equalized(loaded(path), seen, recipe, samples, observe, UNTUNED)
    assert candidate is not None
    assert asked == [True, False][:times]
    after = observe(candidate.model)
    for name in candidate.tuning.moved.keys() & after.tensors.keys():
        found, expected = candidate.statistics.tensors[name], after.tensors[name]
        assert (found.minimum, found.maximum) == pytest.approx((expected.minimum, expected.maximum), rel=1e-5)


@pytest.mark.parametrize("observer", [None, "percentile"])
def test_the_equalized_models_statistics_are_what_is_seen_of_it(uneven: Path, tmp_path: Path, observer: Any) -> None:
    data = data_for(tmp_path / "d.npz", samples=24)
    recipe = Recipe(calibration=Calibration(observer=observer))
    counting = Recipe(calibration=Calibration(channels=True))
    seen, model = calibrate(uneven, data, recipe=recipe), loaded(uneven)
    asked: list[bool] = []

    def observe(model: ir.Model, channels: bool = False) -> Statistics:
        asked.append(channels)
        path = tmp_path / f"{len(asked)}.onnx"
        path.write_bytes(model_bytes(model))
        return calibrate(path, data, recipe=counting if channels else recipe)

    samples = Samples(({"x": np.load(data)["x"][:16]},), ({"x": np.load(data)["x"][16:]},))
    candidate = equalized(model, seen, recipe, samples, observe, UNTUNED)
    assert candidate is not None
    assert asked == ([True, False] if observer else [True])  # the extremes of channels tell those of the changed model
    after = observe(candidate.model)
    changed = candidate.tuning.moved.keys() & after.tensors.keys()
    assert len(changed) > 2
    for name in changed:
        found, expected = candidate.statistics.tensors[name], after.tensors[name]
        size = max(abs(expected.minimum), abs(expected.maximum))
        # Weights are rounded to float32 once more, and sums are of at most 27 terms.
        assert (found.minimum, found.maximum) == pytest.approx((expected.minimum, expected.maximum), abs=1e-5 * size)
        assert found.elements == expected.elements


@pytest.mark.parametrize(
    ("weight", "bits", "wishes", "tried"),
    [
        (Weight(), 8, {}, [True]),
        (Weight(), 4, {}, [False]),
        (Weight(), 4, {"equalize": True}, [True]),
        (Weight(), 8, {"equalize": False}, [False]),
        (Weight(per_channel=False), 8, {}, [True]),
        (Weight(per_channel=False), 4, {}, [False, True]),
    ],
)
def test_equalization_is_tried_where_it_pays(
    uneven: Path, tmp_path: Path, weight: Weight, bits: int, wishes: dict[str, Any], tried: list[bool]
) -> None:
    data = data_for(tmp_path / "d.npz", samples=24)
    recipe = Recipe(weight=weight, activation=Activation(bits=bits), tune=Tune(**wishes))
    done = convert(uneven, tmp_path / "q.onnx", data=data, recipe=recipe)
    assert ["equalization" in one.name for one in done.tuned.tries[1:]][: len(tried)] == tried
    assert verify(done.sidecar_path, data).findings == []


@pytest.mark.parametrize(("gain", "tried"), [(0.1, [False, True]), (2.9, [False, True]), (3.1, [True])])
def test_with_one_scale_a_model_is_tried_both_ways_unless_much_is_predicted(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, tried: list[bool]
) -> None:
    monkeypatch.setattr("quantcli.tune.trying.foreseen", lambda *_: gain)
    recipe = Recipe(weight=Weight(per_channel=False))
    done = convert(uneven, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz", samples=24), recipe=recipe)
    assert ["equalization" in one.name for one in done.tuned.tries[1:]][: len(tried)] == tried


@pytest.mark.parametrize(
    ("gain", "bits", "tried"), [(0.3, 8, False), (0.3, 7, True), (0.1, 4, False), (0.3, 2, False), (0.8, 8, True)]
)
def test_coarse_weights_are_equalized_for_less(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, bits: int, tried: bool
) -> None:
    monkeypatch.setattr("quantcli.tune.trying.foreseen", lambda *_: gain)
    data = data_for(tmp_path / "d.npz", samples=24)
    done = convert(uneven, tmp_path / "q.onnx", data=data, recipe=Recipe(weight=Weight(bits=bits)))
    assert any("equalization" in one.name for one in done.tuned.tries) == tried


def test_equalization_loses_less_and_is_left_out_where_it_does_not_pay(uneven: Path, tmp_path: Path) -> None:
    data = data_for(tmp_path / "d.npz", samples=24)
    plain = Recipe(tune=Tune(equalize=False))
    ours, theirs = (convert(uneven, tmp_path / "q.onnx", data=data, recipe=recipe) for recipe in (Recipe(), plain))
    (better,), (worse,) = ([one.sqnr for one in done.tuned.tries if one.kept] for done in (ours, theirs))
    assert better > worse + 1
    assert ours.tuned.equalized is not None
    assert ours.tuned.equalized.gained > 1
    even = convert(residual_net(tmp_path / "net.onnx"), tmp_path / "r.onnx", data=data)
    assert not any("equalization" in one.name for one in even.tuned.tries)


def lost(*_: object) -> float:
    raise ValueError("no such thing")


@pytest.mark.parametrize(("what", "instead"), [("foreseen", lost), ("LARGEST_WEIGHT", 100)])
def test_a_model_of_which_nothing_can_be_foreseen_is_tuned_as_it_is(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, instead: Any
) -> None:
    monkeypatch.setattr(f"quantcli.tune.trying.{what}", instead)
    done = convert(uneven, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz", samples=24))
    assert len(done.tuned.tries) > 1
    assert not any("equalization" in one.name for one in done.tuned.tries)


@pytest.mark.filterwarnings("error")
def test_the_lowest_values_of_a_mask_have_squares_and_sums() -> None:
    batch = np.array([[[1.0, -2.0], [0.0, np.finfo(np.float32).min]]], dtype=np.float32)
    met = Met.of(batch)
    assert met.squares.tolist() == [5.0, float(batch[0, 1, 1]) ** 2]
    low = float(np.finfo(np.float32).min)
    assert channel_sums(np.full((2, 1, 3), low, dtype=np.float32)).tolist() == [6 * low]
    assert np.isfinite(met.variance).all()
