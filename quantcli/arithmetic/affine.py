"""Affine quantization: real = scale · (q − zero_point) (docs/arithmetic.md, section 2).

The scheme is that of Jacob et al. 2018 (arXiv 1712.05877, section 2.1) with the rounding and saturation of ONNX QuantizeLinear.
A scale is float32 from birth, because that is what a model file stores: everything derived from it (zero points,
multipliers, integers) is computed in float64 from the float32 value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.arithmetic.rounding import ROUNDINGS, half_even

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The product of two scales must stay a normal float32 (2^-126), so no scale is smaller than its square root.
SMALLEST_SCALE = np.float32(2.0**-63)
# So many steps a softmax's 1 has at most: float32 tells the reciprocals of whole numbers up to here apart by rounding.
MOST_STEPS = 1 << 22
# |bias| stays below 2^30, so that bias and products together stay inside int32 (docs/arithmetic.md, equation 9).
LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class IntegerType:
    """An integer type on a grid: ``qmin`` … ``qmax``.

    Attributes:
        name: ``int`` or ``uint`` and a width of 2 to 32 bits: ``uint8``, ``int7``, ``int32``.
        narrow: Whether the lowest value is left out, so that the grid is symmetric about zero (int8: −127 … 127).
    """

    name: str
    narrow: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy dtype that stores the values: the narrowest that holds them."""
        width = next(size for size in (8, 16, 32) if size >= self.bits)
        return np.dtype(f"{'' if self.signed else 'u'}int{width}")

    @property
    def signed(self) -> bool:
        """Whether the grid has negative values."""
        return self.name.startswith("int")

    @property
    def bits(self) -> int:
        """The width of the grid.

        Raises:
            ValueError: If it is not 2 to 32 bits.
        """
        digits = self.name.removeprefix("u").removeprefix("int")
        if not digits.isdecimal() or not 2 <= int(digits) <= 32:
            raise ValueError(f"there is no integer type '{self.name}'")
        return int(digits)

    @property
    def qmin(self) -> int:
        """The lowest value of the grid."""
        return (-(1 << (self.bits - 1)) if self.signed else 0) + (1 if self.narrow else 0)

    @property
    def qmax(self) -> int:
        """The highest value of the grid."""
        return (1 << (self.bits - 1 if self.signed else self.bits)) - 1

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest value of the grid."""
        return self.qmin, self.qmax


def affine_parameters(lo: float, hi: float, integer: IntegerType) -> tuple[np.float32, int]:
    """Return scale and zero point that map the range [lo, hi] onto the grid (equations 2 and 3).

    The range is widened to hold zero, so that real zero is always exact; a range of zero width gets scale 1.

    Args:
        lo: The lowest real value.
        hi: The highest real value.
        integer: The grid.

    Raises:
        ValueError: If a bound is not finite or the bounds are the wrong way round.
    """
    lo, hi = with_zero(lo, hi)
    if lo == hi:
        return np.float32(1.0), min(max(0, integer.qmin), integer.qmax)
    scale = float32_scale((hi - lo) / (integer.qmax - integer.qmin))
    zero_point = int(half_even(np.array(integer.qmin - lo / float(scale))))
    return scale, min(max(zero_point, integer.qmin), integer.qmax)


def symmetric_parameters(lo: float, hi: float, integer: IntegerType) -> tuple[np.float32, int]:
    """Return the scale, with zero point 0, that maps [−a, a] onto the grid, a the larger magnitude (equation 4).

    Raises:
        ValueError: If a bound is not finite, the bounds are the wrong way round, or the grid is unsigned.
    """
    if integer.qmin >= 0:
        raise ValueError(f"a symmetric range needs a signed type, not {integer.name}")
    lo, hi = with_zero(lo, hi)
    largest = max(-lo, hi)
    return (float32_scale(largest / integer.qmax) if largest else np.float32(1.0)), 0


def symmetric_scales(largest: NDArray[np.floating], integer: IntegerType) -> NDArray[np.float32]:
    """Return one symmetric scale per channel from the channels' largest magnitudes (equation 4).

    A channel of zeros gets scale 1: any scale represents it, and 1 cannot be mistaken for a measurement.

    Args:
        largest: The largest magnitude of each channel, shape (channels,).
        integer: A signed grid.
    """
    scales = np.maximum((largest.astype(np.float64) / integer.qmax).astype(np.float32), SMALLEST_SCALE)
    return np.where(largest == 0, np.float32(1.0), scales).astype(np.float32)


def asymmetric_scales(lo: NDArray[np.floating], hi: NDArray[np.floating], integer: IntegerType) -> NDArray[np.float32]:
    """Return one scale per channel whose grid covers [lo, hi], zero among it, wherever that lies (equation 4b).

    A channel of zeros gets scale 1.

    Args:
        lo: The lowest weight of each channel, shape (channels,).
        hi: The highest.
        integer: A grid of as many integers as each channel is to have.
    """
    span = np.maximum(hi, 0.0).astype(np.float64) - np.minimum(lo, 0.0)
    scales = np.maximum((span / (integer.qmax - integer.qmin)).astype(np.float32), SMALLEST_SCALE)
    return np.where(span == 0, np.float32(1.0), scales).astype(np.float32)


def lowest_integers(
    lo: NDArray[np.floating], hi: NDArray[np.floating], scales: NDArray[np.floating], steps: int
) -> NDArray[np.float64]:
    """Return the lowest integer of each channel's grid, which lies about the middle of [lo, hi] and holds zero (equation 4b).

    Args:
        lo: The lowest weight of each channel.
        hi: The highest, of the same shape.
        scales: S, of any shape that ends in theirs.
        steps: From the lowest to the highest integer.
    """
    middle = np.minimum(lo, 0.0).astype(np.float64) + np.maximum(hi, 0.0)
    found: NDArray[np.float64] = np.clip(np.rint((middle / scales.astype(np.float64) - steps) / 2), -steps, 0)
    return found


def scales_wide_enough_for_bias(
    scales: NDArray[np.float32], bias: NDArray[np.floating], input_scale: np.float32
) -> NDArray[np.float32]:
    """Widen weight scales until every bias at S_x·S_w stays within ±2^30 (equation 9).

    Args:
        scales: Weight scales, shape (channels,) or (1,).
        bias: The real biases, shape (channels,).
        input_scale: S_x.

    Returns:
        Weight scales of the same shape, each at least what it was.
    """
    needed = np.abs(bias.astype(np.float64)) / (float(input_scale) * LARGEST_BIAS)
    if scales.size == 1:
        needed = needed.max(keepdims=True)
    # One step up, because the rounding to float32 may have gone down.
    needed32 = np.nextafter(needed.astype(np.float32), np.float32(np.inf))
    return np.where(needed > scales, needed32, scales).astype(np.float32)


def with_zero(lo: float, hi: float) -> tuple[float, float]:
    """Widen [lo, hi] to hold zero: the one place where lo ≤ 0 ≤ hi is enforced (equation 1).

    Raises:
        ValueError: If a bound is not finite or the bounds are the wrong way round.
    """
    if not (np.isfinite(lo) and np.isfinite(hi)):
        raise ValueError(f"a range must be finite, not [{lo}, {hi}]")
    if lo > hi:
        raise ValueError(f"the range [{lo}, {hi}] is the wrong way round")
    return min(float(lo), 0.0), max(float(hi), 0.0)


def float32_scale(scale: float) -> np.float32:
    """Return a positive scale as the float32 that is stored, never below ``SMALLEST_SCALE``."""
    with np.errstate(over="ignore"):
        stored = np.float32(scale)
    if not np.isfinite(stored):
        stored = np.finfo(np.float32).max
    return max(stored, SMALLEST_SCALE)


def power_of_two(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the smallest powers of two that are at least the scales, so that no range is clipped (equation 4a)."""
    fraction, exponent = np.frexp(scale.astype(np.float64))
    return np.ldexp(1.0, np.where(fraction == 0.5, exponent - 1, exponent)).astype(np.float32)


def power_of_two_parameters(
    scale: np.float32, lo: float, integer: IntegerType, symmetric: bool
) -> tuple[np.float32, int]:
    """Return the next power of two above a scale, and the zero point that goes with it (equation 4a)."""
    wide = np.float32(power_of_two(np.array(scale, dtype=np.float32)).item())
    if symmetric:
        return wide, 0
    zero_point = round(integer.qmin - min(lo, 0.0) / float(wide))
    return wide, min(max(zero_point, integer.qmin), integer.qmax)


def quantize(
    values: NDArray[Any],
    scale: NDArray[np.float32],
    zero_point: NDArray[Any],
    integer: IntegerType,
    axis: int | None,
    rounding: str = "half_even",
) -> NDArray[Any]:
    """Quantize reals: q = clamp(round(real / scale) + zero_point), ties to even by default (equation 5; ONNX QuantizeLinear).

    Args:
        values: Reals of any shape.
        scale: One scale, or one per channel.
        zero_point: One zero point, or one per channel.
        integer: The grid, whose dtype the result has.
        axis: The channel axis, or None for one scale.
        rounding: ``half_even``, ``half_away`` or ``floor``.
    """
    scale64 = along_axis(np.atleast_1d(scale).astype(np.float64), values.ndim, axis)
    offset = along_axis(np.atleast_1d(zero_point).astype(np.float64), values.ndim, axis)
    q = ROUNDINGS[rounding](values.astype(np.float64) / scale64) + offset
    held: NDArray[Any] = np.clip(q, integer.qmin, integer.qmax).astype(integer.dtype)
    return held


def dequantize(
    q: NDArray[Any], scale: NDArray[np.float32], zero_point: NDArray[Any], axis: int | None
) -> NDArray[np.float32]:
    """Return real = scale · (q − zero_point) in float32 (equation 6; ONNX DequantizeLinear).

    Args:
        q: Integers of any shape.
        scale: One scale, or one per channel.
        zero_point: One zero point, or one per channel.
        axis: The channel axis, or None for one scale.
    """
    offset = along_axis(np.atleast_1d(zero_point).astype(np.int64), q.ndim, axis)
    scale32 = along_axis(np.atleast_1d(scale).astype(np.float32), q.ndim, axis)
    reals: NDArray[np.float32] = (q.astype(np.int64) - offset).astype(np.float32) * scale32
    return reals


def along_axis(per_channel: NDArray[Any], ndim: int, axis: int | None) -> NDArray[Any]:
    """Shape a per-channel vector so that it broadcasts along ``axis`` of an array of ``ndim`` dimensions."""
    if axis is None:
        return per_channel.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return per_channel.reshape(shape)


def whole_reciprocal(scale: np.float32) -> np.float32:
    """Return the scale of a softmax's output within the graph: no finer, and the reciprocal of a whole number (equation 7a).

    It is the largest float32 whose reciprocal in float32 is no less than that number: kernels round it down (ONNX Runtime's
    QLinearSoftmax) or to nearest.

    Args:
        scale: The scale of a range within [0, 1].
    """
    steps = min(max(math.floor((1 + 2.0**-23) / float(scale)), 1), MOST_STEPS)
    found = np.float32(1 / steps)
    return found if np.float32(1) / found >= steps else np.nextafter(found, np.float32(0))


def fixed_parameters(lo: float, hi: float, integer: IntegerType, symmetric: bool) -> tuple[np.float32, int]:
    """Return the parameters of an output whose range its operator fixes (equation 7).

    The scale is a power of two for the ranges [0, 1] and [−1, 1]; ``hi`` itself lies one step above the grid and saturates, as in
    the TFLite quantization specification (softmax and logistic: 1/256; tanh: 1/128).
    """
    steps = integer.qmax - integer.qmin + 1
    if symmetric:
        return float32_scale(2.0 * max(-lo, hi) / steps), 0
    scale = float32_scale((hi - lo) / steps)
    return scale, int(half_even(np.array(integer.qmin - lo / float(scale))))
