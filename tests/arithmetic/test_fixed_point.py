"""M = M0 · 2^-n, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantcli.arithmetic.fixed_point import fixed_point, real_value, signed_fixed_point, summed_fixed_point

POSITIVE = st.floats(2.0**-126, 2.0**120, allow_subnormal=False)


@given(POSITIVE, st.sampled_from([8, 16, 32]))
def test_the_relative_error_is_bounded_and_no_bit_is_wasted(real: float, bits: int) -> None:
    multiplier, shift = fixed_point(np.array([real]), bits)
    m0, n = int(multiplier[0]), int(shift[0])
    assert 2 ** (bits - 2) <= m0 < 2 ** (bits - 1)
    error = abs(Fraction(m0) * Fraction(2) ** -n / Fraction(real) - 1)
    assert error <= Fraction(1, 2 ** (bits - 1))
    assert Fraction(float(real_value(multiplier, shift)[0])) == Fraction(m0) * Fraction(2) ** -n


def test_a_fraction_that_rounds_up_to_one_is_carried() -> None:
    multiplier, shift = fixed_point(np.array([np.nextafter(1.0, 0.0)]), 32)
    assert (multiplier[0], shift[0]) == (2**30, 30)


@pytest.mark.parametrize("real", [0.25, 1.0, 2.0, 2.0**40])
def test_powers_of_two_are_exact(real: float) -> None:
    assert real_value(*fixed_point(np.array([real]), 8))[0] == real


@pytest.mark.parametrize("real", [0.0, -1.0, np.inf, np.nan])
def test_what_is_no_multiplier_is_refused(real: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        fixed_point(np.array([real]))


@given(
    st.lists(st.one_of(st.just(0.0), POSITIVE, POSITIVE.map(lambda real: -real)), min_size=1),
    st.sampled_from([8, 16, 32]),
)
def test_of_either_sign_the_multiplier_has_it_and_nothing_else_differs(reals: list[float], bits: int) -> None:
    multiplier, shift = signed_fixed_point(np.array(reals), bits)
    for real, m0, n in zip(reals, multiplier.tolist(), shift.tolist(), strict=True):
        if real == 0:
            assert m0 == 0
            continue
        of_magnitude = fixed_point(np.array([abs(real)]), bits)
        assert (abs(m0), n) == (of_magnitude[0][0], of_magnitude[1][0])
        assert (m0 < 0) == (real < 0)
    with pytest.raises(ValueError, match="finite"):
        signed_fixed_point(np.array([np.nan]))


def test_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="8, 16 or 32"):
        fixed_point(np.array([1.0]), 24)


def summed(reals: list[NDArray[np.float64]], bits: int = 32, *types: str) -> list[tuple[int, int]]:
    return [(int(m0[0]), int(n[0])) for m0, n in summed_fixed_point(reals, bits, *types)]


@given(
    st.lists(POSITIVE, min_size=2, max_size=2),
    st.sampled_from([8, 16, 32]),
    st.sampled_from([("int8", "uint8", 8), ("int16", "int8", 15)]),
)
def test_an_exact_sum_fits_62_bits_and_misses_next_to_nothing(
    reals: list[float], bits: int, types: tuple[str, str, int]
) -> None:
    *names, width = types
    pairs = summed([np.array([real]) for real in reals], bits, *names)
    common = max(n for _, n in pairs)
    assert sum(((1 << width) * m0) << (common - n) for m0, n in pairs) < 1 << 62
    for real, (m0, n) in zip(reals, pairs, strict=True):
        if (m0, n) != tuple(int(part[0]) for part in fixed_point(np.array([real]), bits)):
            missed = abs(Fraction(m0) * Fraction(2) ** -n - Fraction(real)) * (1 << width)
            assert missed <= Fraction(max(reals)) * Fraction(2) ** (2 * width - 61)
            assert real == min(reals)


def test_in_a_sum_what_is_dead_beside_the_other_operand_has_no_multiplier() -> None:
    alive, faint, dead = np.array([1.0]), np.array([2.0**-40]), np.array([2.0**-80])
    assert summed([alive, faint]) == [(2**30, 30), (2**12, 52)]
    assert summed([dead, alive]) == [(0, 52), (2**30, 30)]
