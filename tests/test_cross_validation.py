"""How strongly weights follow the samples: found by fitting to one half of them and looking at the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantcli import Recipe, convert
from quantcli.fold import fold
from quantcli.load import load
from quantcli.recipe import Tune, Weight
from quantcli.tune import weights as of_weights
from quantcli.tune.cross_validation import DAMPINGS, RIDGES, best_damping, best_ridge, ways
from quantcli.tune.moments import Moments, drawn_rows, matrix_of, moments_of, together
from quantcli.tune.rounding import Levels, compensated, damped, propagated
from tests.graphs import data_for, node, normal, residual_net, rows, save

ENDS = (-8, 7)
seeds = st.integers(0, 99)


@given(groups=st.integers(1, 3), first=st.integers(1, 40), second=st.integers(1, 40), centred=st.booleans(), seed=seeds)
def test_the_moments_of_the_whole_follow_from_those_of_the_halves(
    groups: int, first: int, second: int, centred: bool, seed: int
) -> None:
    made = rows(groups, first + second, 5, seed) + np.float32(1)
    real = made + np.float32(0.1) * rows(groups, first + second, 5, seed + 1) + np.float32(0.5)
    parts = slice(None, first), slice(first, None)
    found = together([moments_of(real[:, p], made[:, p], centred) for p in parts], [first, second], centred)
    whole = moments_of(real, made, centred)
    # Each sum of n products in float32, of values at most a, errs by at most n·a²·n·2^-23, of which a mean has a part in n.
    largest = float(max(np.abs(made).max(), np.abs(real).max()))
    bound = 8 * (first + second) * 4 * largest**2 * 2**-23
    for name in ("covariance", "mean", "cross"):
        assert np.abs(getattr(found, name) - getattr(whole, name)).max() <= bound
    if centred:
        assert found.missed is not None
        assert np.abs(found.missed - (real.astype(np.float64) - made).mean(axis=1)).max() <= bound
    else:
        assert found.missed is None


@pytest.mark.parametrize(("sizes", "firsts"), [((4, 4, 2), 5), ((5, 3), 3), ((1, 1, 1, 1), 2), ((1,), 0)])
def test_rows_of_the_first_half_of_every_batch_stand_first(tmp_path: Path, sizes: tuple[int, ...], firsts: int) -> None:
    layers = [node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])]
    path = save(tmp_path / "c.onnx", layers, {"x": ["N", 2, 6, 6]}, {"y": None}, {"w": normal(3, 2, 3, 3, seed=1)})
    conv = next(n for n in fold(load(path).graph).graph if n.op_type == "Conv")
    matrix = matrix_of(conv, normal(3, 2, 3, 3, seed=1))
    assert matrix is not None
    numbers = np.split(np.arange(1.0, sum(sizes) + 1, dtype=np.float32), np.cumsum(sizes)[:-1])
    batches = [np.broadcast_to(part[:, None, None, None], (len(part), 2, 6, 6)) for part in numbers]
    (drawn,), middle = drawn_rows(conv, matrix, [batches], 18, 0, apart=True)
    # The sample of each row: the kernel's centre never meets the padding.
    of = drawn[0, :, 4 * 2]
    halves = [(part[: len(part) // 2], part[len(part) // 2 :]) for part in numbers]
    if len(sizes) == sizes.count(1):
        halves = [(part[: number % 2], part[number % 2 :]) for number, part in enumerate(numbers)]
    expected = [value for side in (0, 1) for half in halves for value in half[side]]
    assert middle == firsts * 36
    assert list(dict.fromkeys(of)) == expected
    assert sorted(of) == sorted(np.repeat(np.concatenate(numbers), 36))


def halves_of(
    seed: int, count: int, inputs: int
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]], list[Moments]]:
    """Return the rows of both halves, of the quantized and of the float model, and their moments."""
    made = np.split(rows(1, 2 * count, inputs, seed), 2, axis=1)
    real = [part + np.float32(0.3) * rows(1, count, inputs, seed + 1 + n) for n, part in enumerate(made)]
    return made, real, [moments_of(r, m, centred=False) for r, m in zip(real, made, strict=True)]


@pytest.mark.parametrize(("seed", "count"), [(0, 12), (1, 12), (2, 2000), (3, 30), (4, 6)])
def test_the_ridge_leaves_least_on_the_half_that_it_was_not_fitted_to(seed: int, count: int) -> None:
    made, real, halves = halves_of(seed, count, 8)
    weights = normal(1, 4, 8, seed=seed).astype(np.float64)

    def error(ridge: float) -> float:
        """Return the mean squares of what is missed at the outputs, from the rows themselves."""
        total = 0.0
        for fitted, other in ((0, 1), (1, 0)):
            found = compensated(weights, halves[fitted], ridge)[0]
            missed = real[other][0].astype(np.float64) @ weights[0].T - made[other][0].astype(np.float64) @ found.T
            total += float(np.square(missed).sum()) / count
        return total

    assert best_ridge(weights, halves) == min(RIDGES, key=error)


@pytest.mark.parametrize(("seed", "count"), [(0, 9), (1, 9), (2, 2000), (3, 30), (4, 5)])
def test_the_damping_leaves_least_on_the_half_that_it_was_not_fitted_to(seed: int, count: int) -> None:
    made, _, halves = halves_of(seed, count, 8)
    weights = normal(1, 4, 8, seed=seed).astype(np.float64)
    scales = np.abs(weights).max(axis=2) / ENDS[1]

    # All go through as groups of one layer, which share the order of their columns.
    stable = np.concatenate([damped(half.covariance, damping) for damping in DAMPINGS for half in halves])
    many = len(stable)
    integers = propagated(np.repeat(weights, many, axis=0), np.repeat(scales, many, axis=0), stable, ENDS)
    errors = np.zeros(len(DAMPINGS))
    for place, found in enumerate(integers):
        other = made[1 - place % 2][0].astype(np.float64)
        errors[place // 2] += np.square(other @ (found * scales[0][:, None] - weights[0]).T).sum()
    assert best_damping(weights, scales, halves, Levels(ENDS)) == DAMPINGS[int(errors.argmin())]


def test_one_half_of_a_large_layers_samples_judges_what_is_fitted_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (moments_of(None, rows(1, 12, 8, seed), centred=False) for seed in (1, 2))
    both = ((first, second), (second, first))
    assert [pair == one for pair, one in zip(ways([first, second]), both, strict=True)] == [True, True]
    monkeypatch.setattr("quantcli.tune.cross_validation.BOTH_WAYS", 7)
    (pair,) = ways([first, second])
    assert pair == both[0]
    weights = normal(1, 4, 8, seed=3).astype(np.float64)
    scales = np.abs(weights).max(axis=2) / ENDS[1]
    errors = []
    for damping in DAMPINGS:
        found = propagated(weights, scales, damped(first.covariance, damping), ENDS) * scales[..., None] - weights
        errors.append(float(np.sum((found @ second.covariance) * found)))
    assert best_damping(weights, scales, [first, second], Levels(ENDS)) == DAMPINGS[int(np.argmin(errors))]


def test_a_layer_of_chance_is_held_back_and_one_of_many_samples_is_not() -> None:
    weights = normal(1, 16, 40, seed=5).astype(np.float64)
    scales = np.abs(weights).max(axis=2) / ENDS[1]

    def damping(count: int) -> float:
        both = rows(1, 2 * count, 40, 6)
        halves = [moments_of(None, both[:, part], centred=False) for part in (slice(count), slice(count, None))]
        return best_damping(weights, scales, halves, Levels(ENDS))

    assert damping(10) > damping(4000) == DAMPINGS[0]


@pytest.mark.parametrize(
    ("weight", "wished", "asked"),
    [
        (Weight(bits=4), None, 1),
        (Weight(bits=4), False, 0),
        (Weight(), None, 0),
        (Weight(), True, 1),
        (Weight(bits=3), None, 0),
        (Weight(bits=2), True, 1),
        (Weight(per_channel=False), None, 1),
        (Weight(per_channel=False), False, 0),
        (Weight(per_channel=False, bits=3), None, 0),
    ],
)
def test_it_is_asked_once_of_coarse_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: Weight, wished: bool | None, asked: int
) -> None:
    calls: list[Any] = []

    def counted(*given: Any) -> float:
        calls.append(given)
        return best_damping(*given)

    monkeypatch.setattr(of_weights, "best_damping", counted)
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    recipe = Recipe(weight=weight, tune=Tune(cross_validation=wished, equalize=False, ranges=True, refit=True))
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=recipe)
    weights = [name for name, entry in done.sidecar.tensors.items() if entry.role == "weight"]
    # The sweep over all samples takes what the first one found.
    assert len(calls) == asked * len(weights)
