"""The affine equations of docs/arithmetic.md, as laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantcli.arithmetic import affine
from quantcli.arithmetic.affine import IntegerType

GRIDS = [IntegerType(f"{sign}int{bits}") for bits in (2, 4, 7, 8, 16) for sign in ("u", "")]
GRIDS += [IntegerType(f"int{bits}", narrow=True) for bits in (2, 4, 7, 8, 16)]
SIGNED = [grid for grid in GRIDS if grid.signed]
BOUND = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[float, float]:
    """Draw a finite range, of any sign and width, subnormal ones included."""
    return tuple(sorted((draw(BOUND), draw(BOUND))))  # type: ignore[return-value]


def on_grid(values: list[float], scale: np.float32, zero_point: int, grid: IntegerType) -> np.ndarray:
    return affine.quantize(np.array(values), np.array(scale), np.array(zero_point), grid, None).astype(np.int64)


@given(ranges(), st.sampled_from(GRIDS))
def test_real_zero_is_exact(bounds: tuple[float, float], grid: IntegerType) -> None:
    scale, zero_point = affine.affine_parameters(*bounds, grid)
    assert grid.qmin <= zero_point <= grid.qmax
    assert on_grid([0.0], scale, zero_point, grid)[0] == zero_point
    assert affine.dequantize(np.array([zero_point]), np.array(scale), np.array(zero_point), None)[0] == 0.0


@given(ranges(), st.sampled_from(GRIDS), st.floats(0, 1))
def test_round_trip_stays_within_half_a_step(bounds: tuple[float, float], grid: IntegerType, where: float) -> None:
    """|x − x'| ≤ S/2 inside the range; at its ends the rounding of the zero point may cost another half step."""
    lo, hi = min(bounds[0], 0.0), max(bounds[1], 0.0)
    x = lo + where * (hi - lo)
    scale, zero_point = affine.affine_parameters(*bounds, grid)
    q = on_grid([x], scale, zero_point, grid)
    real = float(scale) * (int(q[0]) - zero_point)
    saturated = q[0] in (grid.qmin, grid.qmax)
    steps = 1.0 if saturated else 0.5
    # float32 rounding of the scale moves every grid point by up to 2^-24 relative: at most the grid's steps of it.
    assert abs(real - x) <= float(scale) * (steps + (grid.qmax - grid.qmin) * 2.0**-23)


@given(ranges(), st.sampled_from(GRIDS), st.lists(BOUND, min_size=2, max_size=20))
def test_quantizing_is_monotone(bounds: tuple[float, float], grid: IntegerType, values: list[float]) -> None:
    scale, zero_point = affine.affine_parameters(*bounds, grid)
    assert (np.diff(on_grid(sorted(values), scale, zero_point, grid)) >= 0).all()


@given(ranges(), st.sampled_from(SIGNED))
def test_symmetric_ranges_have_zero_point_zero_and_hold_both_ends(
    bounds: tuple[float, float], grid: IntegerType
) -> None:
    scale, zero_point = affine.symmetric_parameters(*bounds, grid)
    largest = max(abs(bounds[0]), abs(bounds[1]))
    assert zero_point == 0
    assert float(scale) * grid.qmax >= largest * (1 - 2.0**-23)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_range_of_zero_width_has_scale_one(grid: IntegerType) -> None:
    scale, zero_point = affine.affine_parameters(0.0, 0.0, grid)
    assert (float(scale), zero_point) == (1.0, 0)


def test_a_range_that_excludes_zero_is_widened() -> None:
    """{2.1, 8.6} in int8: taken as it is, the zero point would be −210, which int8 does not hold."""
    scale, zero_point = affine.affine_parameters(2.1, 8.6, IntegerType("int8"))
    assert zero_point == -128
    assert scale == np.float32(8.6 / 255)
    assert round(-128 - 2.1 / ((8.6 - 2.1) / 255)) == -210


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (-math.inf, 0.0), (math.nan, 1.0), (1.0, -1.0)])
def test_ranges_that_are_none_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="range"):
        affine.affine_parameters(*bounds, GRIDS[0])


def test_symmetric_needs_a_signed_type() -> None:
    with pytest.raises(ValueError, match="signed"):
        affine.symmetric_parameters(-1.0, 1.0, GRIDS[0])


@pytest.mark.parametrize(
    ("name", "narrow", "limits", "stored"),
    [
        ("uint8", False, (0, 255), "uint8"),
        ("int8", True, (-127, 127), "int8"),
        ("int7", True, (-63, 63), "int8"),
        ("int4", False, (-8, 7), "int8"),
        ("uint2", False, (0, 3), "uint8"),
        ("int12", False, (-2048, 2047), "int16"),
        ("int16", False, (-32768, 32767), "int16"),
        ("int32", False, (-(2**31), 2**31 - 1), "int32"),
    ],
)
def test_grids(name: str, narrow: bool, limits: tuple[int, int], stored: str) -> None:
    grid = IntegerType(name, narrow)
    assert (grid.qmin, grid.qmax) == limits
    assert grid.dtype == np.dtype(stored)


@pytest.mark.parametrize("name", ["int1", "uint33", "float8", "int", "int8x"])
def test_what_is_no_grid_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no integer type"):
        _ = IntegerType(name).bits


@given(st.floats(2.0**-60, 2.0**60, width=32))
def test_powers_of_two_are_the_next_above(scale: float) -> None:
    wide = float(affine.power_of_two(np.array([scale], dtype=np.float32))[0])
    assert wide / 2 < scale <= wide
    assert math.frexp(wide)[0] == 0.5


def test_ties_go_to_the_even_integer() -> None:
    values = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    assert on_grid(values, np.float32(1.0), 0, IntegerType("int8")).tolist() == [-2, -2, 0, 0, 2, 2]


@pytest.mark.parametrize(
    ("rounding", "expected"), [("half_away", [-3, -2, -1, 1, 2, 3]), ("floor", [-3, -2, -1, 0, 1, 2])]
)
def test_other_roundings_have_names(rounding: str, expected: list[int]) -> None:
    values = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    found = affine.quantize(values, np.array(1.0, np.float32), np.array(0), IntegerType("int8"), None, rounding)
    assert found.tolist() == expected


def test_dead_channels_get_scale_one() -> None:
    scales = affine.symmetric_scales(np.array([0.0, 12.7, 1e-38], dtype=np.float32), IntegerType("int8", narrow=True))
    assert scales.tolist() == [1.0, float(np.float32(np.float64(np.float32(12.7)) / 127)), float(affine.SMALLEST_SCALE)]


@given(
    st.lists(st.floats(2.0**-40, 2.0**10, width=32), min_size=1, max_size=6),
    st.floats(2.0**-40, 2.0**10, width=32),
    st.data(),
)
def test_widened_scales_keep_biases_within_their_bound(weights: list[float], x: float, data: st.DataObject) -> None:
    bias = np.array([data.draw(st.floats(-(2.0**20), 2.0**20, width=32)) for _ in weights], dtype=np.float32)
    scales = np.array(weights, dtype=np.float32)
    wide = affine.scales_wide_enough_for_bias(scales, bias, np.float32(x))
    assert (wide >= scales).all()
    assert (np.abs(np.rint(bias.astype(np.float64) / (np.float64(np.float32(x)) * wide))) <= affine.LARGEST_BIAS).all()
    kept = np.abs(bias.astype(np.float64)) <= np.float64(np.float32(x)) * scales * affine.LARGEST_BIAS
    assert (wide[kept] == scales[kept]).all()


@pytest.mark.parametrize(
    ("bounds", "grid", "symmetric", "expected"),
    [
        ((0.0, 1.0), IntegerType("uint8"), False, (2.0**-8, 0)),
        ((0.0, 1.0), IntegerType("int8"), False, (2.0**-8, -128)),
        ((-1.0, 1.0), IntegerType("uint8"), False, (2.0**-7, 128)),
        ((-1.0, 1.0), IntegerType("int8"), True, (2.0**-7, 0)),
        ((0.0, 1.0), IntegerType("int8"), True, (2.0**-7, 0)),
    ],
)
def test_fixed_outputs(
    bounds: tuple[float, float], grid: IntegerType, symmetric: bool, expected: tuple[float, int]
) -> None:
    scale, zero_point = affine.fixed_parameters(*bounds, grid, symmetric)
    assert (float(scale), zero_point) == expected


@given(st.integers(0, 40), st.floats(0.5, 1.0, width=32))
def test_a_softmaxs_steps_are_a_whole_number_of_which_kernels_find_the_same(exponent: int, part: float) -> None:
    scale = np.float32(part * 2.0**-exponent)
    found = affine.whole_reciprocal(scale)
    steps = round(1 / float(found))
    assert steps == math.floor(np.float32(1) / found)  # rounded to nearest, or down in float32
    assert 1 <= steps <= 1 << 22
    assert abs(float(found) * steps - 1) <= 2.0**-23
    if steps < 1 << 22:  # no finer than asked for, and as fine as that allows
        assert 1 / (steps + 1) < float(scale) <= float(found) * (1 + 2.0**-22)


def test_channels_are_independent() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3, 4, 5))
    scales = np.array([0.01, 0.02, 0.03, 0.04], dtype=np.float32)
    grid, order = IntegerType("int8", narrow=True), np.array([2, 0, 3, 1])
    q = affine.quantize(values, scales, np.zeros(4, dtype=np.int8), grid, 1)
    permuted = affine.quantize(values[:, order], scales[order], np.zeros(4, dtype=np.int8), grid, 1)
    assert (permuted == q[:, order]).all()
    for channel in range(4):
        alone = affine.quantize(values[:, channel], scales[channel], np.array(0), grid, None)
        assert (alone == q[:, channel]).all()
