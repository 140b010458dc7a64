"""Softmax in 32-bit fixed point, as gemmlowp and TFLite's reference kernel define it (docs/arithmetic.md, equation 18).

A number with k integer bits is raw · 2^-(31−k), raw an int32. Products are rounded doubling high multiplies; integer bits add.
The functions follow gemmlowp's fixedpoint.h (exp_on_negative_values, one_over_one_plus_x_for_x_in_0_1) and TFLite's softmax.h; the
constants are theirs, and each is the rounded value of the expression beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.arithmetic.fixed_point import doubling_high_multiply, fixed_point
from quantcli.arithmetic.rounding import shift_half_away

if TYPE_CHECKING:
    from numpy.typing import NDArray

LARGEST = (1 << 31) - 1
ONE = LARGEST  # with no integer bits, 1 itself does not fit
INPUT_BITS, SUM_BITS = 5, 12
EXP_MINUS_EIGHTH = 1895147668  # e^(−1/8), no integer bits
THIRD = 715827883  # 1/3, no integer bits
# e^(−2^k) for k = −2 … 4, no integer bits.
EXP_MINUS_POWERS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
FORTY_EIGHT_17THS = 1515870810  # 48/17, two integer bits
MINUS_THIRTY_TWO_17THS = -1010580540  # −32/17, two integer bits


def high(a: NDArray[np.int64], b: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Return the product of two fixed-point numbers."""
    return doubling_high_multiply(a, np.asarray(b, dtype=np.int64))


def scaled(a: NDArray[np.int64], exponent: int) -> NDArray[np.int64]:
    """Return a · 2^exponent: to the left saturating, to the right rounded with ties away from zero."""
    if exponent < 0:
        return shift_half_away(a, np.asarray(-exponent, dtype=np.int64))
    saturated: NDArray[np.int64] = np.clip(a << exponent, -(1 << 31), LARGEST)
    return saturated


def exp_near_minus_eighth(a: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return e^a for −1/4 ≤ a < 0, no integer bits: four terms of the Taylor series around −1/8."""
    x = a + (1 << 28)
    x2 = high(x, x)
    x3, x4 = high(x2, x), high(x2, x2)
    tail = scaled(high(scaled(x4, -2) + x3, THIRD) + x2, -1)
    constant = np.asarray(EXP_MINUS_EIGHTH, dtype=np.int64)
    return constant + high(x + tail, constant)


def exp_of_negative(a: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return e^a for a ≤ 0 with five integer bits, as a number with none."""
    fraction = 31 - INPUT_BITS
    quarter = 1 << (fraction - 2)
    within = (a & (quarter - 1)) - quarter
    result = exp_near_minus_eighth(scaled(within, INPUT_BITS))
    remainder = within - a
    for k, factor in zip(range(-2, INPUT_BITS), EXP_MINUS_POWERS, strict=True):
        result = np.where(remainder & (1 << (fraction + k)), high(result, factor), result)
    return np.where(a == 0, ONE, result)


def reciprocal_of_one_plus(a: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 1 / (1 + a) for 0 ≤ a < 1, no integer bits: three steps of Newton and Raphson from 48/17 − 32/17·(1 + a)/2."""
    total = a + ONE
    half = (total + np.where(total >= 0, 1, -1)) // 2
    x = FORTY_EIGHT_17THS + high(half, MINUS_THIRTY_TWO_17THS)
    for _ in range(3):
        rest = (1 << 29) - high(half, x)
        x = x + scaled(high(x, rest), 2)
    return scaled(x, 1)


def softmax(q: NDArray[np.int64], scale: float, axis: int, bits: int = 8) -> NDArray[np.int64]:
    """Return a softmax of integers, of output scale 2^-bits and lowest value as zero point, before that zero point is put on.

    Args:
        q: Input integers.
        scale: Their scale.
        axis: Along which the outputs sum to one.
        bits: The width of the output.
    """
    multiplier, shift = fixed_point(np.array(min(scale * 2.0 ** (31 - INPUT_BITS), LARGEST)))
    left = 31 - int(shift)
    radius = int(np.floor(((1 << INPUT_BITS) - 1) * 2.0 ** (31 - INPUT_BITS) / 2.0**left))
    differences = q - q.max(axis=axis, keepdims=True)
    counted = differences >= -radius
    rescaled = high(np.where(counted, differences, 0) << left, multiplier)
    exponentials = np.where(counted, exp_of_negative(rescaled), 0)
    sums = np.where(counted, scaled(exponentials, -SUM_BITS), 0).sum(axis=axis, keepdims=True)
    leading = 31 - np.floor(np.log2(sums.astype(np.float64))).astype(np.int64)
    inverse = reciprocal_of_one_plus((sums << leading) - (1 << 31))
    right = SUM_BITS - leading + 31 - bits
    return np.where(counted, shift_half_away(high(exponentials, inverse), right), 0)
