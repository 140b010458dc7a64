"""Tuning: what each algorithm promises, on small models whose numbers can be worked out."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, calibrate, convert, verify
from quantcli.arithmetic.affine import IntegerType
from quantcli.fold import fold
from quantcli.load import load
from quantcli.probe import with_outputs
from quantcli.recipe import Activation, Layers, Tune, Weight
from quantcli.tune import rounding
from quantcli.tune import weights as of_weights
from quantcli.tune.bias import channel_means, channel_sums, corrected
from quantcli.tune.moments import Matrix, drawn_rows, matrix_of, moments_of
from quantcli.tune.outputs import is_distribution, logarithms
from quantcli.tune.patches import Patches, rows_in
from quantcli.tune.ranges import PERCENTILES, Grid, best_range, drawn, largest, look, percentiles, places_of
from quantcli.tune.room import wanted_samples
from quantcli.tune.rounding import (
    LARGE,
    Levels,
    best_scales,
    compensated,
    damped,
    descended,
    errors_by,
    errors_of_scales,
    nearest,
    output_error,
    parts_of_scales,
    propagated,
    rounded,
)
from quantcli.tune.steps import Steps
from quantcli.tune.weights import Met, ScaleForm, extent, fitted, scales_for_rounding
from tests.graphs import data_for, node, normal, residual_net, rows, save

small = st.integers(1, 4)
grids = st.builds(IntegerType, st.integers(2, 8).map(lambda bits: f"int{bits}"), st.booleans())


def loaded(path: Path) -> ir.Model:
    return fold(load(path).graph)


@given(groups=small, outputs=small, inputs=st.integers(1, 90), integer=grids, seed=st.integers(0, 99))
def test_columns_are_rounded_as_gptq_rounds_them(
    groups: int, outputs: int, inputs: int, integer: IntegerType, seed: int
) -> None:
    moments = damped(moments_of(None, rows(groups, 40, inputs, seed), centred=False).covariance)
    weights = np.random.default_rng(seed).normal(size=(groups, outputs, inputs))
    scales = np.abs(weights).max(axis=2) / integer.qmax
    found = propagated(weights, scales, moments, integer.ends)
    order = np.argsort(-np.einsum("gii->gi", moments).mean(axis=0), kind="stable")
    for group in range(groups):
        # GPTQ, equations 2 and 3: the error of a column is carried on by H⁻¹, which then loses the column's row and column.
        left, inverse = weights[group].copy(), np.linalg.inv(moments[group])
        for column in order:
            chosen = np.clip(np.rint(left[:, column] / scales[group]), *integer.ends)
            assert (found[group, :, column] == chosen).all()
            error = (left[:, column] - chosen * scales[group]) / inverse[column, column]
            left -= error[:, None] * inverse[column]
            inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]


@given(size=st.integers(1, 5000), count=st.integers(1, 5000), seed=st.integers(0, 9))
def test_elements_are_drawn_evenly(size: int, count: int, seed: int) -> None:
    places = drawn(size, count, np.random.default_rng(seed))
    assert len(places) == min(size, count)
    assert (np.diff(places) > 0).all()
    ends = np.arange(len(places) + 1) * size // len(places)
    assert (places >= ends[:-1]).all()
    assert (places < ends[1:]).all()


def test_coarse_weights_are_tuned_over_more_samples(tmp_path: Path) -> None:
    model = loaded(residual_net(tmp_path / "net.onnx"))
    coarse = [Recipe(weight=Weight(bits=7)), Recipe(weight=Weight(per_channel=False)), Recipe(tune=Tune(effort="best"))]
    assert wanted_samples(model, Recipe()) == 64
    assert [wanted_samples(model, recipe) for recipe in coarse] == [256] * 3
    assert wanted_samples(model, Recipe(weight=Weight(bits=4), tune=Tune(samples=10))) == 10


@given(groups=small, outputs=small, inputs=st.integers(1, 90), integer=grids, seed=st.integers(0, 99))
def test_rounding_is_never_worse_than_nearest(
    groups: int, outputs: int, inputs: int, integer: IntegerType, seed: int
) -> None:
    moments = moments_of(None, rows(groups, 40, inputs, seed), centred=False).covariance
    weights = np.random.default_rng(seed).normal(size=(groups, outputs, inputs))
    scales = np.abs(weights).max(axis=2) / integer.qmax
    stable, step = damped(moments), scales[..., None]
    found = rounded(weights, scales, stable, integer.ends)
    assert (found >= integer.qmin).all()
    assert (found <= integer.qmax).all()
    assert (found == np.rint(found)).all()
    plain = output_error(nearest(weights, scales, integer.ends) * step - weights, stable)
    assert (output_error(found * step - weights, stable) <= plain).all()


@pytest.mark.parametrize(("bits", "large", "descends"), [(4, 45, True), (7, 45, True), (8, 45, False), (8, 46, True)])
def test_large_layers_do_not_descend_on_fine_grids(
    monkeypatch: pytest.MonkeyPatch, bits: int, large: int, descends: bool
) -> None:
    called: list[int] = []

    def noted(*given: NDArray[np.float64]) -> NDArray[np.float64]:
        called.append(bits)
        return given[1]

    monkeypatch.setattr(rounding, "descended", noted)
    monkeypatch.setattr(rounding, "LARGE", large)
    weights, moments = normal(1, 5, 9, seed=1).astype(np.float64), np.eye(9)[None]
    high = 2 ** (bits - 1) - 1
    scales = np.abs(weights).max(axis=2) / high
    ends = [(-high, high), (np.full((1, 5), -float(high)), np.full((1, 5), float(high)))]
    for one in ends:
        found = rounded(weights, scales, moments, one)
        assert np.array_equal(found, nearest(weights, scales, one))  # no input tells of another
    assert bool(called) == descends


@given(inputs=st.integers(1, 5), seed=st.integers(0, 99))
def test_coordinate_descent_ends_where_no_single_integer_can_move(inputs: int, seed: int) -> None:
    moments = damped(moments_of(None, rows(1, 30, inputs, seed), centred=False).covariance)
    weights, ends = np.random.default_rng(seed).normal(size=(1, 1, inputs)), (-4, 3)
    scales = np.abs(weights).max(axis=2) / ends[1]
    found = descended(weights, nearest(weights, scales, ends), scales, moments, ends, passes=100)
    least = output_error(found * scales[..., None] - weights, moments)
    for place in range(inputs):
        for value in range(ends[0], ends[1] + 1):
            other = found.copy()
            other[0, 0, place] = value
            error = output_error(other * scales[..., None] - weights, moments)
            assert (error >= least * (1 - 1e-9) - 1e-15).all()


def test_the_error_of_a_layers_output_is_what_the_moments_say() -> None:
    made = rows(2, 500, 7, 3)
    change = np.random.default_rng(4).normal(size=(2, 3, 7))
    direct = np.square(made.astype(np.float64) @ change.transpose(0, 2, 1)).mean(axis=1)
    moments = moments_of(None, made, centred=False)
    # Sums of 500 products in float32 err by at most 500 roundings of 2^-24 each, relative to sums of magnitudes.
    assert np.allclose(output_error(change, moments.covariance), direct, rtol=500 * 2**-23)


@pytest.mark.parametrize("level", [1e-30, 1.0, 1e30])
def test_the_error_of_large_layers_in_float32(level: float) -> None:
    inputs, outputs = 300, 450  # more weights than float64 is kept for
    assert inputs * outputs >= LARGE
    made = normal(1, 500, inputs, seed=1).astype(np.float64)
    moments = level * made.transpose(0, 2, 1) @ made / 500
    change = 1e-3 * normal(1, outputs, inputs, seed=2).astype(np.float64)
    found, exact = errors_by(moments, change.size)(change), output_error(change, moments)
    # A product of n terms, and then a sum of n of those, each in float32.
    off = (np.abs(change) @ np.abs(moments) * np.abs(change)).sum(axis=2)
    assert (np.abs(found - exact) <= 2 * (inputs + 2) * 2**-24 * off).all()
    assert (found != exact).any()
    small = change[:, :2]
    assert (errors_by(moments, small.size)(small) == output_error(small, moments)).all()


def test_compensation_is_the_least_squares_solution() -> None:
    real = rows(1, 400, 6, 1)
    made = (real + 0.3 * rows(1, 400, 6, 2)).astype(np.float32)
    weights = np.random.default_rng(5).normal(size=(1, 4, 6))
    found = compensated(weights, moments_of(real, made, centred=False), ridge=0.0)
    expected = np.linalg.lstsq(made[0].astype(np.float64), real[0].astype(np.float64) @ weights[0].T, rcond=None)[0]
    assert np.allclose(found[0], expected.T, atol=1e-4)


def test_scales_are_parts_of_the_widest_and_lower_the_error() -> None:
    moments = damped(moments_of(None, rows(1, 200, 12, 7), centred=False).covariance)
    weights = np.random.default_rng(8).standard_t(2, size=(1, 5, 12))  # with outliers, which are worth clipping
    widest = np.abs(weights).max(axis=2) / 7

    def error(scales: NDArray[Any]) -> NDArray[np.float64]:
        return output_error(nearest(weights, scales, (-8, 7)) * scales[..., None] - weights, moments)

    found = best_scales(weights, widest, moments, Levels((-8, 7)), shared=False).astype(np.float64)
    assert (found <= widest.astype(np.float32)).all()
    assert (error(found) <= error(widest.astype(np.float32).astype(np.float64))).all()
    assert (found < widest.astype(np.float32)).any()
    powers = best_scales(weights, np.full((1, 5), 0.5), moments, Levels((-8, 7)), shared=True, power_of_two=True)
    assert np.isin(powers, [0.5, 0.25, 0.125]).all()
    assert len(np.unique(powers)) == 1


@given(
    groups=small,
    outputs=small,
    inputs=st.integers(1, 90),
    integer=grids,
    room=st.integers(0, 5),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_errors_of_scales_are_those_of_what_gptq_rounds(
    groups: int, outputs: int, inputs: int, integer: IntegerType, room: int, symmetric: bool, seed: int
) -> None:
    """However many outputs are rounded at once."""
    moments = damped(moments_of(None, rows(groups, 40, inputs, seed), centred=False).covariance)
    weights = np.random.default_rng(seed).normal(size=(groups, outputs, inputs))
    widest = np.abs(weights).max(axis=2) / integer.qmax
    tried = np.array([widest, 0.7 * widest, 0.4 * widest])
    levels = Levels(integer.ends, None if symmetric else extent(weights, one=False))
    with mock.patch.object(rounding, "ROOM", room * 8 * len(tried) * groups * inputs):
        found = errors_of_scales(weights, tried, moments, levels)
    for errors, scales in zip(found, tried, strict=True):
        change = propagated(weights, scales, moments, levels.at(scales)) * scales[..., None] - weights
        # Sums of 90² products in float64, through a factor of a matrix whose condition the damping holds below 10^4.
        assert np.allclose(errors, output_error(change, moments), rtol=90**2 * 2**-52 * 1e4, atol=1e-12)


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_few_bits_are_rounded_on_the_scales_that_are_best_for_it(
    one: bool, power_of_two: bool, symmetric: bool
) -> None:
    moments = damped(moments_of(None, rows(2, 200, 12, 7), centred=False).covariance)
    weights = np.random.default_rng(8).standard_t(2, size=(2, 5, 12))
    integer = IntegerType("int4")
    widest = (np.abs(weights).max(axis=2).reshape(-1) / 7).astype(np.float32)
    if power_of_two:
        widest = np.exp2(np.ceil(np.log2(widest))).astype(np.float32)
    if one:
        widest = widest.max(keepdims=True)
    levels = Levels(integer.ends, None if symmetric else extent(weights, one))
    form = ScaleForm(one, power_of_two, symmetric, lambda scales: np.maximum(scales, widest / 2))  # as if a bias asked
    found = scales_for_rounding(weights, widest, moments, levels, form)
    shares = np.array([1, 0.5, 0.25]) if power_of_two else parts_of_scales(1)
    assert found.dtype == np.float32
    assert found.shape == widest.shape
    # Every one was tried, and is the best of them for all outputs that have it.
    parts = [widest * share if power_of_two else levels.part(widest, share) for share in shares]
    tried = [np.maximum(part.astype(np.float32), widest / 2) for part in parts]
    errors = np.array([errors_of(weights, scales, moments, levels) for scales in tried])
    total = errors.sum(axis=1, keepdims=True) if one else errors
    places = [int(np.flatnonzero([scales[i] == found[i] for scales in tried])[0]) for i in range(len(found))]
    assert all(total[place, i] == total[:, i].min() for i, place in enumerate(places))
    assert any(place > 0 for place in places)


@pytest.mark.parametrize(
    ("kind", "count", "steps", "again"),
    [
        ("int5", 6, Steps(), True),
        ("int6", 6, Steps(), False),
        ("int4", 5, Steps(), False),  # fewer rows than half of the inputs
        ("int4", 6, Steps(scales=False), False),
        ("int4", 6, Steps(rounding=False), False),
    ],
)
def test_scales_are_chosen_again_for_few_bits_and_enough_rows(kind: str, count: int, steps: Steps, again: bool) -> None:
    made = rows(1, count, 12, 7)
    weights = np.random.default_rng(8).standard_t(2, size=(1, 5, 12))
    met = Met(weights, moments_of(None, made, centred=False), count)
    integer = IntegerType(kind)
    widest = (np.abs(weights).max(axis=2).reshape(-1) / integer.qmax).astype(np.float32)
    chosen = (widest * np.float32(0.75)).astype(np.float32)
    with mock.patch.object(of_weights, "scales_for_rounding", return_value=chosen) as choose:
        found = fitted(met, widest, integer, steps, ScaleForm(False, False, True, lambda scales: scales), None)
    assert choose.called == again
    assert (found.scales == chosen).all() == again
    assert (found.spread.reshape(-1) == found.scales).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_hold_single_weights_exactly_neither_gain_nor_lose(symmetric: bool) -> None:
    weights = np.random.default_rng(9).uniform(0.5, 2.0, size=(20, 1, 1))
    integer = IntegerType("int4")
    widest = (weights.reshape(-1) / integer.qmax).astype(np.float32)
    met = Met(weights, moments_of(None, rows(20, 50, 1, 10), centred=False), 50)
    found = fitted(met, widest, integer, Steps(), ScaleForm(False, False, symmetric, lambda scales: scales), None)
    assert [step for step, _, _ in found.gains] == ["scales", "rounding"]
    assert all(before == after > 0 for _, before, after in found.gains)
    assert np.abs(found.integers * found.spread[..., None] / weights - 1).max() < 1e-6


def errors_of(
    weights: NDArray[np.float64], scales: NDArray[np.float32], moments: NDArray[np.float64], levels: Levels
) -> NDArray[np.float64]:
    """Return what rounding on scales does to each output."""
    each = np.broadcast_to(scales.astype(np.float64), weights.shape[0] * weights.shape[1]).reshape(weights.shape[:2])
    return errors_of_scales(weights, each[None], moments, levels).reshape(-1)


def test_how_many_scales_are_tried_depends_on_what_they_take() -> None:
    assert parts_of_scales(1).tolist() == np.linspace(1, 0.4, 61).tolist()
    assert [len(parts_of_scales(work)) for work in (10**8, 2 * 10**8, 10**12)] == [40, 20, 13]


CONVOLUTIONS: list[dict[str, Any]] = [
    {},
    {"pads": [1, 0, 1, 2]},
    {"strides": [2, 1]},
    {"dilations": [1, 2]},
    {"dilations": [2, 1], "pads": [2, 1, 2, 0]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"group": 2},
    {"group": 4},
]


@pytest.mark.parametrize("attributes", CONVOLUTIONS, ids=str)
def test_rows_are_what_a_convolution_multiplies(tmp_path: Path, attributes: dict[str, Any]) -> None:
    group = attributes.get("group", 1)
    weight = normal(4, 4 // group, 3, 2, seed=1)
    convolution = node("Conv", ["x", "w"], ["y"], **attributes)
    path = save(tmp_path / "c.onnx", [convolution], {"x": ["N", 4, 9, 8]}, {"y": None}, {"w": weight})
    model = loaded(path)
    conv = next(n for n in model.graph if n.op_type == "Conv")
    x = normal(3, 4, 9, 8, seed=2)
    matrix = matrix_of(conv, weight)
    assert matrix is not None
    assert (matrix.join(matrix.split(weight)) == weight).all()
    (found,), _ = drawn_rows(conv, matrix, [[x]], weight[0].size, 0)
    result = Runner(path).run({"x": x})["y"]
    products = (found @ matrix.split(weight).transpose(0, 2, 1)).transpose(1, 0, 2).reshape(found.shape[1], -1)
    assert np.allclose(products, result.transpose(0, 2, 3, 1).reshape(-1, 4), atol=1e-4)


@pytest.mark.parametrize("attributes", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_few_rows_are_those_of_many(attributes: dict[str, Any], channels: int) -> None:
    group = min(attributes.get("group", 1), channels)
    conv = ir.serde.deserialize_node(node("Conv", ["x", "w"], ["y"], **attributes | {"group": group}))
    weight = conv.inputs[1]
    assert weight is not None
    weight.shape = ir.Shape((4, channels // group, 3, 2))
    x = normal(3, channels, 9, 8, seed=2)
    places = np.array([0, 1, 7, rows_in(conv, x) - 1])
    few, many = (np.full((group, len(places), 6 * channels // group), np.nan, dtype=np.float32) for _ in range(2))
    for found, wanted in ((few, 1), (many, 10000)):
        Patches.of(conv, x, wanted).put(places, found)
    assert (few == many).all()


@pytest.mark.parametrize(
    ("inputs", "coarse", "expected"),
    [
        (8, False, 2048),
        (100, False, 8192),
        (3000, False, 12000),
        (8, True, 32768),
        (1024, True, 16384),
        (2048, True, 24576),
    ],
)
def test_coarse_weights_have_more_rows(tmp_path: Path, inputs: int, coarse: bool, expected: int) -> None:
    weight = np.ones((2, inputs), dtype=np.float32)
    gemm = node("Gemm", ["x", "w"], ["y"], transB=1)
    model = loaded(save(tmp_path / "g.onnx", [gemm], {"x": ["N", inputs]}, {"y": None}, {"w": weight}))
    matrix = matrix_of(next(iter(model.graph)), weight)
    assert matrix is not None
    x = np.ones((40000, 1), dtype=np.float32) * np.ones(inputs, dtype=np.float32)
    (found,), _ = drawn_rows(next(iter(model.graph)), matrix, [[x]], inputs, 0, coarse=coarse)
    assert found.shape == (1, expected + 1, inputs)


def test_matrices_of_gemm_and_matmul_are_rows_of_outputs() -> None:
    weight = np.arange(6.0).reshape(2, 3)
    assert (Matrix(1, True, (2, 3)).split(weight)[0] == weight.T).all()
    assert (Matrix(1, True, (2, 3)).join(Matrix(1, True, (2, 3)).split(weight)) == weight).all()


def test_a_corrected_bias_takes_the_mean_error_away() -> None:
    real, made = [normal(4, 3, 5, seed=s) for s in (1, 2)], [normal(4, 3, 5, seed=s) + 0.25 for s in (3, 4)]
    bias = normal(3, seed=5)
    moved = [batch + (corrected(bias, real, made) - bias)[None, :, None] for batch in made]
    assert np.allclose(channel_means(moved), channel_means(real), atol=1e-6)


@given(st.integers(1, 6000), st.sampled_from(["normal", "relu", "zeros", "few"]), st.integers(0, 2**32 - 1))
def test_percentiles_are_numpys(size: int, kind: str, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values = {"normal": values, "relu": np.maximum(values, 0), "zeros": values * 0, "few": np.rint(values)}[kind]
    expected = np.percentile(values.astype(np.float64), [(100 - p, p) for p in PERCENTILES])
    assert np.array(percentiles(values)) == pytest.approx(expected, abs=1e-9)


@given(st.integers(1, 40_000), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_the_largest_values_are_found_in_few_parts(size: int, count: int, seed: int) -> None:
    values = np.rint(np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)  # with many equals
    count = min(count, size)
    assert (largest(values, count) == np.sort(values)[-count:]).all()


def test_places_are_drawn_once_for_batches_of_the_same_shapes() -> None:
    shapes = ((4, 3, 200, 200), (2, 3, 200, 200))
    found = places_of(shapes, 1, 7)
    assert places_of(shapes, 1, 7) is found
    for shape, (places, channels) in zip(shapes, found, strict=True):
        assert (channels == places // 40_000 % 3).all()
        assert (np.diff(places) > 0).all()
        assert places[-1] < math.prod(shape)
    assert (places_of(shapes, 1, 8)[0][0] != found[0][0]).any()


def test_ranges_clip_outliers_and_leave_others_alone() -> None:
    def grid(low: float, high: float) -> Grid:
        scale = np.float32((high - low) / 15)
        return Grid(scale, round(-low / float(scale)), IntegerType("uint4"))

    even = np.linspace(-1, 1, 5000, dtype=np.float32)
    looked = look([even], [even], None, 0, 0)
    assert best_range(looked, -1.0, 1.0, symmetric=False, grid=grid)[0] == (-1.0, 1.0)
    spiked = np.append(normal(200_000, seed=3), np.float32(40.0))
    spikes = look([spiked], [spiked], None, 0, 0)
    (low, high), before, after = best_range(spikes, float(spiked.min()), 40.0, symmetric=False, grid=grid)
    assert high < 40.0
    assert low <= 0
    assert after < before


def sqnr(done: Any) -> float:
    return float(next(iter(done.check.sqnr.values())))


def test_tuning_loses_less_and_its_integers_verify(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=48)
    recipe = Recipe(weight=Weight(bits=4))
    fast = convert(
        model, tmp_path / "fast.onnx", data=data, recipe=Recipe(weight=Weight(bits=4), tune=Tune(effort="fast"))
    )
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=recipe, verified=True)
    # Four bits lose some 20 dB by rounding to nearest; choosing which way to round gets a few of them back.
    assert sqnr(done) > sqnr(fast) + 2
    kept = next(one for one in done.tuned.tries if one.kept)
    assert kept.sqnr > done.tuned.tries[0].sqnr
    assert {"scales", "rounding", "bias"} <= set(kept.gains)
    assert verify(done.sidecar_path, data).findings == []
    assert fast.tuned.why_not == "effort fast"


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=24)
    recipe = Recipe(tune=Tune(effort="best"), weight=Weight(per_channel=False))
    first, second = (convert(model, tmp_path / name, data=data, recipe=recipe) for name in ("a.onnx", "b.onnx"))
    assert first.model.read_bytes() == second.model.read_bytes()
    assert len(first.tuned.tries) > 4


def test_each_step_can_be_left_out(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=24)
    wishes = Tune(ranges=False, scales=False, rounding=False, compensation=False, equalize=False, gain=False)
    done = convert(model, tmp_path / "a.onnx", data=data, recipe=Recipe(tune=wishes))
    assert [one.name for one in done.tuned.tries] == ["as calibrated", "bias"]
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(done.model).graph.initializer}
    fast = convert(model, tmp_path / "b.onnx", data=data, recipe=Recipe(tune=Tune(effort="fast")))
    plain = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(fast.model).graph.initializer}
    assert (stored["w1_quantized"] == plain["w1_quantized"]).all()


def test_weights_are_compensated_where_they_are_coarse_and_tried_both_ways_with_powers_of_two(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=24)

    def tried(weight: Weight, target: str = "ort-x86", **wishes: Any) -> list[bool]:
        # Without ranges, there is no try without them.
        recipe = Recipe(target=target, weight=weight, tune=Tune(ranges=False, widen=False, **wishes))
        done = convert(model, tmp_path / "a.onnx", data=data, recipe=recipe)
        return ["compensation" in one.name for one in done.tuned.tries[1:]]

    shared = Weight(per_channel=False)
    assert tried(shared) == [True, True]  # plain and equalized
    assert tried(shared, compensation=False) == [False, False]
    assert tried(Weight(), "npu-pow2") == [False, True]
    assert tried(Weight(), "npu-pow2", compensation=True) == [True]
    assert tried(shared, "npu-pow2") == [False, False, True]  # the better one again
    assert tried(Weight()) == [False]
    assert tried(Weight(bits=4)) == [True]


def test_statistics_alone_are_not_tuned_and_say_so(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=24)
    seen = calibrate(model, data)
    alone = convert(model, tmp_path / "a.onnx", seen)
    assert "--data" in alone.tuned.why_not
    both, direct = convert(model, tmp_path / "b.onnx", seen, data), convert(model, tmp_path / "c.onnx", data=data)
    assert both.tuned.why_not == ""
    assert both.model.read_bytes() == direct.model.read_bytes()


def test_probabilities_are_judged_by_their_logarithms() -> None:
    scores = normal(4, 5, seed=1)
    exponentials = np.exp(scores)
    rows = exponentials / exponentials.sum(axis=1, keepdims=True)
    ours, theirs = logarithms({"p": rows, "s": scores}, {"p": rows[::-1], "s": scores})
    assert (ours["s"] == scores).all()
    expected = np.log(rows.astype(np.float64) + 1e-4)
    assert np.allclose(ours["p"], expected - expected.mean(axis=1, keepdims=True))
    assert np.allclose(theirs["p"], ours["p"][::-1])
    assert not is_distribution(rows[:, :1])
    assert not is_distribution(rows * 2)


def test_what_is_less_than_a_step_of_the_outputs_grid_counts_for_nothing() -> None:
    expected = np.array([[0.98, 0.0199, 0.0001], [0.5, 0.4999, 0.0001]])
    rounded = np.rint(expected * 128) / 128

    def noise(steps: dict[str, float]) -> float:
        ours, theirs = logarithms({"p": expected}, {"p": rounded}, steps)
        return float(np.square(theirs["p"] - ours["p"]).max())

    # 0.0001 becomes 0. Beside the smallest number that counts, half of the 0.0001 is lost (ln 2, squared, and a part for the mean);
    # beside a step of 1/128, hardly anything is.
    assert noise({}) > 0.2
    assert noise({"p": 1 / 128}) < 0.04
    assert noise({"other": 1.0}) == noise({})


NARROW = [
    (4, Activation(bits=4), (0, 15)),
    (8, Activation(bits=2), (0, 3)),
    (8, Activation(bits=6, dtype="int8", symmetric=True), (-32, 31)),
    (8, Activation(bits=12, dtype="int16", symmetric=True), (-2048, 2047)),
]


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(("bits", "activation", "grid"), NARROW, ids=lambda value: str(getattr(value, "bits", value)))
def test_activations_stay_on_narrow_grids(
    tmp_path: Path, bits: int, activation: Activation, grid: tuple[int, int], everywhere: bool, form: str
) -> None:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=32)
    recipe = Recipe(weight=Weight(bits=bits), activation=activation, layers=Layers(everywhere=everywhere))
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=recipe, form=form, verified=True)
    assert verify(done.sidecar_path, data).findings == []
    tensors = [entry for entry in done.sidecar.tensors.values() if entry.role == "activation"]
    assert {(entry.qmin, entry.qmax) for entry in tensors} == {grid}
    wide = normal(16, 3, 8, 8, seed=4, scale=50.0)  # far beyond what was calibrated
    written = ir.from_proto(onnx.load(done.model))
    found = Runner(with_outputs(written, [entry.integers for entry in tensors])).run({"x": wide})
    for entry in tensors:
        assert found[entry.integers].min() >= grid[0]
        assert found[entry.integers].max() <= grid[1]
    assert any(found[entry.integers].max() == grid[1] for entry in tensors)


def test_the_bytes_do_not_depend_on_how_many_threads_there_are(tmp_path: Path) -> None:
    from quantcli.demo import CALIBRATION, MODEL, RECIPE

    (tmp_path / "recipe.toml").write_text(RECIPE)
    written = []
    for threads in ("1", "2", "3"):
        given = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        options = f"--data {CALIBRATION} --recipe recipe.toml --samples 96 -q -o {threads}.onnx"
        command = [sys.executable, "-m", "quantcli", "convert", str(MODEL), *options.split()]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, **given}, check=True)
        written.append((tmp_path / f"{threads}.onnx").read_bytes())
    assert written[0] == written[1] == written[2]


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_channels_are_summed_one_by_one(shape: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    expected = np.moveaxis(values.astype(np.float64), 1, 0).reshape(shape[1], -1).sum(axis=1)
    # At most 25 values below 8 in float32: each of the additions errs by 2^-24 of at most 25·8.
    assert channel_sums(values) == pytest.approx(expected, abs=25 * 25 * 8 * 2**-24)
