"""Ranges by what they do to a model's outputs, on models whose outputs can be worked out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibration.errors import RunError
from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, calibrate, convert, verify
from quantcli.arithmetic.affine import IntegerType
from quantcli.fold import fold
from quantcli.load import load
from quantcli.probe import with_outputs
from quantcli.recipe import Activation, Tune
from quantcli.tune.outputs import Ahead, Channels, Expected, range_for_outputs
from quantcli.tune.ranges import Grid
from tests.graphs import data_for, node, normal, residual_net, save

UINT8 = IntegerType("uint8")


def grid_of(low: float, high: float) -> Grid:
    scale = np.float32((high - low) / 255)
    return Grid(scale, round(-low / float(scale)), UINT8)


@pytest.fixture
def unheard(tmp_path: Path) -> Path:
    """A net whose second channel holds values of up to 40, is read like the first one, and is dropped two layers further on."""
    tensors = {
        "w1": np.diag([1, 1]).astype(np.float32).reshape(2, 2, 1, 1),
        "w2": np.array([[1, 0.1], [0.1, 1]], np.float32).reshape(2, 2, 1, 1),
        "w3": np.array([[1, -0.1]], np.float32).reshape(1, 2, 1, 1),
    }
    nodes = [
        node("Conv", ["x", "w1"], ["c"]),
        node("Relu", ["c"], ["a"]),
        node("Conv", ["a", "w2"], ["b"]),
        node("Conv", ["b", "w3"], ["y"]),
    ]
    return save(tmp_path / "unheard.onnx", nodes, {"x": ["N", 2, 6, 6]}, {"y": None}, tensors)


def samples(count: int) -> NDArray[np.float32]:
    x = normal(count, 2, 6, 6, seed=4)
    x[:, 1] *= 10
    return x


class Rest:
    """The rest of a net behind a tensor, with what float gives."""

    def __init__(self, path: Path, name: str, batches: list[NDArray[np.float32]]) -> None:
        self.model = fold(load(path).graph)
        runner = Runner(with_outputs(self.model, [name]))
        found = [runner.run({"x": x}) for x in batches]
        self.expected = [Expected.of({"y": one["y"]}) for one in found]
        self.values = [one[name] for one in found]
        nodes = list(self.model.graph)
        place = next(number for number, one in enumerate(nodes) if any(v.name == name for v in one.outputs))
        self.value = next(v for v in nodes[place].outputs if v.name == name)
        self.done = set(nodes[: place + 1])

    def ahead(self, made: list[NDArray[np.float32]] | None = None) -> Ahead:
        held: dict[ir.Value, list[NDArray[Any]]] = {self.value: made or self.values}
        return Ahead(self.model, self.done, self.value, held, self.expected)


def test_noise_is_that_of_the_outputs_with_the_tensor_on_the_grid(unheard: Path) -> None:
    rest = Rest(unheard, "a", [samples(3), samples(2)])
    grid, mean = grid_of(0.0, 5.0), np.array([0.25, -0.5], np.float32).reshape(1, 2, 1, 1)
    found = rest.ahead().noise(grid, mean)[-1]
    squared = signal = 0.0
    for values, expected in zip(rest.values, rest.expected, strict=True):
        # y = b0 − 0.1·b1 = 0.99·a0 + 0·a1: the second channel is not heard.
        y = 0.99 * (grid.round(values)[:, :1] - 0.25)
        squared += float(np.square(y - expected.values["y"].astype(np.float64)).sum())
        signal += float(np.square(expected.values["y"].astype(np.float64)).sum())
    # Sums of at most four float32 products, each rounded; errors of y are about 1/4, so about 2^-20 of them is what is lost.
    assert found == pytest.approx(squared / signal, rel=1e-5)


def test_names_that_are_taken_stay_theirs(tmp_path: Path) -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Neg", ["a"], ["a_made"]),
        node("Abs", ["a_made"], ["a_scale"]),
        node("Add", ["a", "a_scale"], ["a_step_0"]),
        node("Mul", ["a_step_0", "half"], ["y"]),
    ]
    shapes: tuple[dict[str, list[int | str]], dict[str, None]] = {"x": ["N", 2, 6, 6]}, {"y": None}
    path = save(tmp_path / "m.onnx", nodes, *shapes, {"half": np.array(0.5, np.float32)})
    rest = Rest(path, "a", [samples(3)])
    grid = grid_of(0.0, 3.0)
    # y = (a + |−a|) / 2 = a, of the values on the grid.
    expected = np.square(grid.round(rest.values[0]) - rest.values[0], dtype=np.float64).sum()
    signal = np.square(rest.values[0], dtype=np.float64).sum()
    found = rest.ahead().noise(grid, np.zeros((1, 1, 1, 1), np.float32))[-1]
    assert found == pytest.approx(expected / signal, rel=1e-5)


def test_a_tensor_that_is_not_there_is_an_error_of_running(unheard: Path) -> None:
    rest = Rest(unheard, "a", [samples(3)])
    with pytest.raises(RunError, match="there is no 'a'"):
        Ahead(rest.model, rest.done, rest.value, {}, rest.expected)


def test_a_run_ends_where_a_rival_wins_by_far_over_enough_samples(unheard: Path) -> None:
    ahead = Rest(unheard, "a", [samples(5), samples(4), samples(2)]).ahead()
    grid, nothing = grid_of(0.0, 1.0), np.zeros((1, 1, 1, 1), np.float32)
    whole = ahead.noise(grid, nothing)
    assert len(whole) == 3
    assert whole == sorted(whole)
    assert ahead.noise(grid, nothing, [part / 1.09 for part in whole]) == whole
    assert ahead.noise(grid, nothing, [part / 1.11 for part in whole]) == whole[:2]  # five samples tell nothing yet


def test_an_output_that_is_not_finite_ends_a_run(unheard: Path) -> None:
    values = samples(3)
    rest = Rest(unheard, "a", [values, values])
    ahead = rest.ahead([np.full_like(rest.values[0], np.nan), rest.values[1]])
    assert ahead.noise(grid_of(0.0, 1.0), np.zeros((1, 1, 1, 1), np.float32)) == [math.inf]


def test_what_is_not_heard_is_cut_off_and_what_is_heard_is_not(unheard: Path) -> None:
    rest = Rest(unheard, "a", [samples(16), samples(16)])
    every = np.concatenate([array.reshape(-1) for array in rest.values])
    channels = Channels.of(rest.values, rest.values, 1)
    top, heard = float(every.max()), float(max(array[:, 0].max() for array in rest.values))
    assert top > 5 * heard
    (low, high), before, after = range_for_outputs(rest.ahead(), every, channels, (0.0, top), False, grid_of)
    assert low == 0.0
    assert heard * 0.5 <= high < top * 0.6
    assert after < before / 2
    # With the second channel alone heard, nothing is cut off that matters.
    rest.expected = [Expected.of({"y": array[:, 1:]}) for array in rest.values]
    weight = rest.model.graph.initializers["w3"]
    weight.const_value = ir.tensor(np.array([[-0.1 / 0.99, 1 / 0.99]], np.float32).reshape(1, 2, 1, 1), name="w3")
    (_, kept), _, _ = range_for_outputs(rest.ahead(), every, channels, (0.0, top), False, grid_of)
    assert kept > 0.6 * top


@given(axis=st.integers(0, 3), rows=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_mean_error_of_every_channel(axis: int, rows: int, seed: int) -> None:
    real = [normal(rows, 3, 4, 2, seed=seed), normal(rows, 3, 4, 2, seed=seed + 1)]
    made = [array + np.float32(0.1) for array in real]
    channels, grid = Channels.of(real, made, axis), grid_of(-1.0, 1.0)
    assert channels is not None
    errors = np.concatenate([np.moveaxis(grid.round(m) - r, axis, 0) for m, r in zip(made, real, strict=True)], axis=1)
    mean = errors.reshape(len(errors), -1).mean(axis=1, dtype=np.float64).astype(np.float32)
    found = channels.error(grid)
    assert found.shape == tuple(size if at == axis else 1 for at, size in enumerate(real[0].shape))
    # Sums of at most 160 float64 terms in another order, then rounded to float32 once.
    assert np.allclose(found.reshape(-1), mean, rtol=0, atol=2**-22)


def test_a_tensor_whose_channels_change_has_none() -> None:
    assert Channels.of([normal(2, 3), normal(2, 4)], [normal(2, 3), normal(2, 4)], 1) is None
    assert Channels.of([normal(5)], [normal(5)], 0) is None


def test_convert_judges_ranges_at_the_outputs(unheard: Path, tmp_path: Path) -> None:
    data = tmp_path / "x.npz"
    np.savez(data, x=samples(96))
    highs = {}
    for wish in (True, "outputs"):
        recipe = Recipe(tune=Tune(ranges=wish, equalize=False))
        done = convert(unheard, tmp_path / f"{wish}.onnx", data=data, recipe=recipe)
        assert done.tuned.tries[-1].kept
        assert done.tuned.tries[-1].name.startswith("ranges by outputs" if wish == "outputs" else "ranges,")
        highs[wish] = done.sidecar.tensors["a"].hi[0]
        assert verify(done.sidecar_path, data).findings == []
    assert highs["outputs"] < 0.7 * highs[True]


def test_small_models_are_judged_at_their_outputs_and_the_bytes_are_the_same_twice(tmp_path: Path) -> None:
    model = residual_net(tmp_path / "m.onnx")
    data, written = data_for(tmp_path / "x.npz", 96), []
    for number in range(2):
        done = convert(model, tmp_path / f"{number}.onnx", data=data)
        names = [one.name for one in done.tuned.tries]
        assert names[:2] == ["as calibrated", "ranges by outputs, scales, rounding, bias, gain"]
        written.append((tmp_path / f"{number}.onnx").read_bytes())
    assert written[0] == written[1]


def test_ranges_are_judged_at_their_readers_where_the_rest_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        return b"no model"

    monkeypatch.setattr(Ahead, "written", refuse)
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "x.npz", 96)
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(tune=Tune(ranges="outputs")))
    other = convert(model, tmp_path / "r.onnx", data=data, recipe=Recipe(tune=Tune(ranges=True)))
    assert done.tuned.tries[1].sqnr == other.tuned.tries[1].sqnr
    assert done.tuned.tries[1].gains == other.tuned.tries[1].gains


def test_best_finds_ranges_once_and_keeps_them_for_other_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[str] = []
    real = range_for_outputs

    def counted(ahead: Ahead, *more: Any, **named: Any) -> Any:
        searched.append(ahead.names[0])
        return real(ahead, *more, **named)

    monkeypatch.setattr("quantcli.tune.sweep.range_for_outputs", counted)
    model = residual_net(tmp_path / "m.onnx")
    done = convert(
        model,
        tmp_path / "q.onnx",
        data=data_for(tmp_path / "x.npz", 96),
        recipe=Recipe(tune=Tune(effort="best", ranges="outputs", equalize=False)),
    )
    assert len([one for one in done.tuned.tries if "by outputs" in one.name]) >= 2
    assert searched
    assert len(searched) == len(set(searched))


def test_sizes_that_a_model_leaves_free_count_as_the_samples_have_them(tmp_path: Path) -> None:
    from quantcli.tune.candidates import Candidate
    from quantcli.tune.room import work_ahead

    work = []
    for name, side in (("fixed", 8), ("free", "S")):
        path = save(
            tmp_path / f"{name}.onnx",
            [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["r"]), node("Conv", ["r", "w"], ["y"])],
            {"x": ["N", 4, side, 8]},
            {"y": None},
            {"w": normal(4, 4, 1, 1)},
        )
        model = fold(load(path).graph)
        statistics = calibrate(path, data_for(tmp_path / "x.npz", 8, x=(4, 8, 8)))
        work.append(work_ahead(Candidate(model, statistics, ()), Recipe(), {"x": normal(8, 4, 8, 8)}))
    assert work[0] == work[1] > 0


def test_too_large_a_model_is_not_judged_at_its_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcli.tune import trying

    monkeypatch.setitem(trying.AHEAD, "default", 1000)
    model = residual_net(tmp_path / "m.onnx")
    done = convert(model, tmp_path / "q.onnx", data=data_for(tmp_path / "x.npz", 96))
    assert not any("by outputs" in one.name for one in done.tuned.tries)


def test_few_integers_are_worth_more_work_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantcli.tune import trying

    monkeypatch.setitem(trying.AHEAD, "default", 1000)
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "x.npz", 96)
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(activation=Activation(bits=4)))
    assert done.tuned.tries[1].name.startswith("ranges by outputs")
