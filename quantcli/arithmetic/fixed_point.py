"""Fixed-point multipliers: a positive real M as M0 · 2^-n (docs/arithmetic.md, section 4).

Jacob et al. 2018 (arXiv 1712.05877, section 2.2, equation 6) replace the real factor S_x·S_w/S_y of a layer by an integer
multiplication and a shift. Here M0 keeps all its bits: 2^(bits−2) ≤ M0 < 2^(bits−1), so that M0 fits a signed integer of that
width and its relative error is at most 2^-(bits−1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.arithmetic.rounding import shift_floor, shift_half_away, shift_half_even, shift_half_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


def fixed_point(real: NDArray[np.float64], bits: int = 32) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (M0, n) with real ≈ M0 · 2^-n, |M0·2^-n / real − 1| ≤ 2^-(bits−1) (equations 10 and 11).

    Args:
        real: Positive, finite multipliers of any shape, computed in float64 from float32 scales.
        bits: The width of M0 as a signed integer: 8, 16 or 32.

    Returns:
        ``multiplier`` M0 and ``shift`` n, both int64 and of the shape of ``real``. n is negative only where M ≥ 2^(bits−1).

    Raises:
        ValueError: If a multiplier is not positive and finite, or the width is not one of the three.
    """
    if bits not in (8, 16, 32):
        raise ValueError(f"a multiplier has 8, 16 or 32 bits, not {bits}")
    real = np.asarray(real, dtype=np.float64)
    if not (np.isfinite(real).all() and (real > 0).all()):
        raise ValueError("a multiplier must be positive and finite")
    fraction, exponent = np.frexp(real)  # real = fraction · 2^exponent, 0.5 ≤ fraction < 1
    multiplier = np.rint(np.ldexp(fraction, bits - 1)).astype(np.int64)
    carried = multiplier == 1 << (bits - 1)  # the fraction rounded up to 1
    multiplier = np.where(carried, multiplier >> 1, multiplier)
    shift = (bits - 1) - exponent.astype(np.int64) - carried
    return multiplier, shift


def signed_fixed_point(real: NDArray[np.float64], bits: int = 32) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (M0, n) of multipliers of either sign: M0 has the sign, and is 0 (n = bits − 1) where the multiplier is.

    Args:
        real: Finite multipliers of any shape.
        bits: The width of M0 as a signed integer: 8, 16 or 32.

    Raises:
        ValueError: If a multiplier is not finite, or the width is not one of the three.
    """
    real = np.asarray(real, dtype=np.float64)
    multiplier, shift = fixed_point(np.where(real == 0, 1.0, np.abs(real)), bits)
    return np.where(real == 0, 0, np.sign(real).astype(np.int64) * multiplier), np.where(real == 0, bits - 1, shift)


def real_value(multiplier: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return M0 · 2^-n; exact, since M0 has at most 31 bits."""
    return np.ldexp(np.asarray(multiplier, dtype=np.float64), -np.asarray(shift, dtype=np.int64).astype(np.intc))


# How far TFLite shifts the operands of a sum to the left before it rescales them (its add.cc), and operands of 16 bits: it all
# stays within 32 bits.
HEADROOM, WIDE_HEADROOM = 20, 15


def headroom_of(*types: str) -> int:
    """Return how far the operands of a sum are shifted to the left, by the names of their integer types."""
    return WIDE_HEADROOM if any(name.endswith("16") for name in types) else HEADROOM


def summed_fixed_point(
    reals: Sequence[NDArray[np.float64]], bits: int, *types: str
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return (M0, n) of the operands of a sum that is formed exactly, with bounds on how far the n lie apart (equation 14).

    The sum stands at the largest n, to which the other operand is shifted left. With |q − z| < 2^w it stays below 2^62 where no n
    is more than 62 − bits − w above the least. An operand whose n would be gets M0 = round(M · 2^n), half to even, which has
    fewer bits, and is 0 where nothing is left: it misses less than 2^(2w−61) steps of the other operand.

    Args:
        reals: One positive multiplier per operand, each of shape (1,).
        bits: The width of M0: 8, 16 or 32.
        types: The names of the operands' integer types; those of 16 bits are symmetric.
    """
    found = [fixed_point(real, bits) for real in reals]
    width = 15 if any(name.endswith("16") for name in types) else 8
    furthest = min(int(shift.min()) for _, shift in found) + 62 - bits - width
    return [
        (
            np.where(shift > furthest, np.rint(np.ldexp(real, furthest)).astype(np.int64), m0),
            np.minimum(shift, furthest),
        )
        for real, (m0, shift) in zip(reals, found, strict=True)
    ]


def headroom_multipliers(first: float, second: float, output: float, headroom: int) -> tuple[float, float, float]:
    """Return the three real multipliers of a sum as TFLite defines it (equation 14a).

    The operands, shifted left, are rescaled to twice the larger scale, added, and the sum is rescaled to the output.

    Args:
        first: The scale of one operand.
        second: The scale of the other.
        output: The scale of the sum.
        headroom: How far the operands are shifted.
    """
    common = 2.0 * max(first, second)
    return first / common, second / common, common / (2.0**headroom * output)


def multiply(
    acc: NDArray[np.int64], multiplier: NDArray[np.int64], shift: NDArray[np.int64], rounding: str, bits: int = 32
) -> NDArray[np.int64]:
    """Return acc · M0 · 2^-n as an integer, rounded as the recorded choice says (equations 12 to 15).

    Args:
        acc: int32 values (as int64), any shape.
        multiplier: M0, broadcasting against ``acc``.
        shift: n, broadcasting against ``acc``.
        rounding: A key of ``MULTIPLICATIONS``.
        bits: The width of M0; only ``double``, whose first rounding is at bits − 1, depends on it.

    Raises:
        ValueError: If the rounding is unknown, or a product does not fit 63 bits.
    """
    if rounding not in MULTIPLICATIONS:
        raise ValueError(f"there is no rounding '{rounding}'; known: {', '.join(MULTIPLICATIONS)}")
    acc, multiplier, shift = (np.asarray(values, dtype=np.int64) for values in (acc, multiplier, shift))
    left = np.maximum(-shift, 0)
    largest = int(np.abs(acc).max(initial=0)) * int(np.abs(multiplier).max(initial=0)) << int(left.max(initial=0))
    if largest >= 1 << 62:
        raise ValueError("a product of accumulator and multiplier does not fit 63 bits")
    return MULTIPLICATIONS[rounding](acc, multiplier, shift, bits)


def multiply_double(
    acc: NDArray[np.int64], multiplier: NDArray[np.int64], shift: NDArray[np.int64], bits: int
) -> NDArray[np.int64]:
    """Round twice, as gemmlowp does: SaturatingRoundingDoublingHighMul, then RoundingDivideByPOT (equation 13)."""
    point = bits - 1
    high = doubling_high_multiply(acc << np.maximum(point - shift, 0), multiplier, point)
    return shift_half_away(high, np.maximum(shift - point, 0))


def doubling_high_multiply(a: NDArray[np.int64], b: NDArray[np.int64], point: int = 31) -> NDArray[np.int64]:
    """Return a·b / 2^point, rounded to nearest with ties up, saturating where both are −2^point (gemmlowp, fixedpoint.h).

    gemmlowp adds a nudge of the product's sign and divides towards zero; for negative products that rounds −0.5 up to 0, and all
    in all is ⌊a·b / 2^point + 1/2⌋.
    """
    rounded = shift_half_up(a * b, np.asarray(point, dtype=np.int64))
    lowest = -(1 << point)
    return np.where((a == lowest) & (b == lowest), (1 << point) - 1, rounded)


def shifted(
    round_shift: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]],
) -> Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int], NDArray[np.int64]]:
    """Return a multiplication that rounds the exact product once; a negative shift goes to the left first."""

    def multiplication(
        acc: NDArray[np.int64], multiplier: NDArray[np.int64], shift: NDArray[np.int64], bits: int
    ) -> NDArray[np.int64]:
        del bits
        return round_shift((acc * multiplier) << np.maximum(-shift, 0), np.maximum(shift, 0))

    return multiplication


MULTIPLICATIONS = {
    "single": shifted(shift_half_up),
    "double": multiply_double,
    "half_even": shifted(shift_half_even),
    "floor": shifted(shift_floor),
}
