"""Rounding: of reals to the integer grid, and of integers divided by a power of two (docs/arithmetic.md, section 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def half_even(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to the nearest integer, ties to the even one (ONNX QuantizeLinear; IEEE 754 roundTiesToEven).

    Args:
        values: Reals of any shape, float64.

    Returns:
        The rounded values, float64.
    """
    return np.rint(np.asarray(values, dtype=np.float64))


def half_away(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to the nearest integer, ties away from zero (C's ``round``)."""
    reals = np.asarray(values, dtype=np.float64)
    whole = np.trunc(reals)
    return whole + np.copysign(np.abs(reals - whole) >= 0.5, reals)


def floor(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round towards minus infinity."""
    return np.floor(np.asarray(values, dtype=np.float64))


ROUNDINGS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "half_even": half_even,
    "half_away": half_away,
    "floor": floor,
}


def shift_floor(values: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ⌊v / 2^n⌋ for n ≥ 0: a bare arithmetic shift."""
    return values >> np.minimum(shift, 63)


def shift_half_up(values: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return v / 2^n rounded to nearest, ties up (towards +∞), for n ≥ 0 and |v| < 2^62."""
    held = np.minimum(shift, 63)
    half = np.where(held > 0, np.int64(1) << np.maximum(held - 1, 0), 0)
    return (values + half) >> held


def shift_half_even(values: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return v / 2^n rounded to nearest, ties to even, for n ≥ 0 and |v| < 2^62."""
    held = np.minimum(shift, 63)
    low = values >> held
    rest = values - (low << held)  # 0 ≤ rest < 2^n, which wraps only where n = 63 and is then right modulo 2^64
    half = np.where(held > 0, np.int64(1) << np.maximum(held - 1, 0), np.int64(1))
    up = (rest > half) | ((rest == half) & (low % 2 == 1))
    return low + np.where(held > 0, up, False)


def shift_half_away(values: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return v / 2^n rounded to nearest, ties away from zero (gemmlowp's RoundingDivideByPOT), for n ≥ 0 and |v| < 2^62."""
    held = np.minimum(shift, 63)
    return np.sign(values) * shift_half_up(np.abs(values), held)


def divide(numerator: NDArray[np.int64], denominator: NDArray[np.int64], rounding: str) -> NDArray[np.int64]:
    """Return the quotient of integers, rounded: ties up (``single``, ``double``), to even (``half_even``), or down (``floor``).

    Args:
        numerator: Integers, |n| ≤ 2^61.
        denominator: Positive integers ≤ 2^61, broadcasting against the numerator.
        rounding: How a product with a multiplier is rounded too.
    """
    low: NDArray[np.int64] = numerator // denominator
    rest = numerator - low * denominator  # 0 ≤ rest < denominator
    if rounding == "floor":
        return low
    tie = 2 * rest == denominator
    up = (2 * rest > denominator) | (tie & (low % 2 == 1) if rounding == "half_even" else tie)
    quotient: NDArray[np.int64] = low + up
    return quotient


def divide_half_away(numerator: NDArray[np.int64], denominator: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the quotient of integers rounded to nearest, ties away from zero (TFLite's average pool).

    Args:
        numerator: Integers, |n| ≤ 2^61.
        denominator: Positive integers ≤ 2^61.
    """
    return np.sign(numerator) * divide(np.abs(numerator), denominator, "single")
