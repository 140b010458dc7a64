"""Every rounding against Python's unbounded integers and fractions; ``double`` against gemmlowp's published definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantcli.arithmetic import rounding
from quantcli.arithmetic.fixed_point import MULTIPLICATIONS, doubling_high_multiply, multiply


def nearest(value: Fraction, tie: Callable[[int], int]) -> int:
    low = math.floor(value)
    rest = value - low
    return low + (1 if rest > Fraction(1, 2) else 0 if rest < Fraction(1, 2) else tie(low))


EXACT: dict[str, Callable[[Fraction], int]] = {
    "floor": math.floor,
    "half_up": lambda v: nearest(v, lambda _: 1),
    "half_even": lambda v: nearest(v, lambda low: low % 2),
    "half_away": lambda v: nearest(v, lambda low: 1 if low >= 0 else 0),
}
SHIFTS = {
    "floor": rounding.shift_floor,
    "half_up": rounding.shift_half_up,
    "half_even": rounding.shift_half_even,
    "half_away": rounding.shift_half_away,
}


@st.composite
def quotients(draw: st.DrawFn) -> tuple[int, int]:
    """Draw (v, n), |v| < 2^62, ties of v / 2^n often among them."""
    shift = draw(st.integers(0, 70))
    value = draw(st.integers(1 - 2**62, 2**62 - 1))
    if draw(st.booleans()) and 1 <= shift <= 40:
        value = (2 * draw(st.integers(-(2**20), 2**20)) + 1) << (shift - 1)
    return value, shift


@pytest.mark.parametrize("name", sorted(SHIFTS))
@given(quotients())
def test_shifts_round_as_named(name: str, quotient: tuple[int, int]) -> None:
    value, shift = quotient
    found = SHIFTS[name](np.array([value], dtype=np.int64), np.array([shift], dtype=np.int64))
    assert int(found[0]) == EXACT[name](Fraction(value, 2**shift))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("half_even", [-2, -2, 0, 0, 2, 2]),
        ("half_away", [-3, -2, -1, 1, 2, 3]),
        ("floor", [-3, -2, -1, 0, 1, 2]),
    ],
)
def test_reals_round_as_named(name: str, expected: list[int]) -> None:
    values = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert rounding.ROUNDINGS[name](values).tolist() == expected


def test_the_largest_double_below_one_half_rounds_to_zero() -> None:
    below = np.nextafter(0.5, 0.0)
    assert rounding.half_away(np.array([below, -below])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("name", "exact"), [("single", "half_up"), ("half_even", "half_even"), ("floor", "floor")])
@given(st.integers(-(2**31), 2**31 - 1), st.integers(2**30, 2**31 - 1), st.integers(0, 70))
def test_single_multiplications_are_exact_products_rounded_once(
    name: str, exact: str, acc: int, m0: int, n: int
) -> None:
    found = multiply(np.array([acc]), np.array([m0]), np.array([n]), name)
    assert int(found[0]) == EXACT[exact](Fraction(acc * m0, 2**n))


def gemmlowp(acc: int, m0: int, n: int) -> int:
    """gemmlowp's definition, word for word: doubling high multiply with a nudge, then a rounding shift (fixedpoint.h)."""
    left, right = max(31 - n, 0), max(n - 31, 0)
    a = acc << left
    if a == m0 == -(2**31):
        high = 2**31 - 1
    else:
        product = a * m0
        nudge = (1 << 30) if product >= 0 else 1 - (1 << 30)
        high = abs(product + nudge) // (1 << 31) * (1 if product + nudge >= 0 else -1)  # C's division truncates
    mask = (1 << right) - 1
    threshold = (mask >> 1) + (1 if high < 0 else 0)
    return (high >> right) + (1 if (high & mask) > threshold else 0)


def test_double_is_gemmlowps_on_a_million_triples() -> None:
    generator = np.random.default_rng(0)
    count = 1_000_000
    acc = generator.integers(-(2**31), 2**31, count) >> generator.integers(0, 31, count)
    m0, n = generator.integers(2**30, 2**31, count), generator.integers(31, 63, count)
    found = multiply(acc, m0, n, "double").tolist()
    expected = [gemmlowp(*triple) for triple in zip(acc.tolist(), m0.tolist(), n.tolist(), strict=True)]
    assert found == expected


EDGES = [0, 1, -1, 2, -2, 2**30, -(2**30), 2**31 - 1, -(2**31), 2**30 + 1, 3, -3]


def test_double_is_gemmlowps_at_the_edges() -> None:
    for acc in EDGES:
        for m0 in (2**30, 2**30 + 1, 2**31 - 1):
            for n in (31, 32, 33, 47, 61, 62):
                assert int(multiply(np.array([acc]), np.array([m0]), np.array([n]), "double")[0]) == gemmlowp(
                    acc, m0, n
                )
    lowest = np.array([-(2**31)])
    assert doubling_high_multiply(lowest, lowest).tolist() == [2**31 - 1]


@given(st.sampled_from(sorted(MULTIPLICATIONS)), st.integers(-(2**15), 2**15), st.integers(0, 12))
def test_multipliers_above_one_shift_left(name: str, acc: int, left: int) -> None:
    found = multiply(np.array([acc]), np.array([2**30]), np.array([30 - left]), name)
    assert int(found[0]) == acc << left


def test_products_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="63 bits"):
        multiply(np.array([2**31]), np.array([2**31]), np.array([0]), "single")
    with pytest.raises(ValueError, match="no rounding"):
        multiply(np.array([1]), np.array([1]), np.array([0]), "nearest")
