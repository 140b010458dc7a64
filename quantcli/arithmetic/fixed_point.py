"""Fixed-point multipliers: a positive real M as M0 · 2^-n (docs/arithmetic.md, section 4).

Jacob et al. 2018 (arXiv 1712.05877, section 2.2, equation 6) replace the real factor S_x·S_w/S_y of a layer by an integer
multiplication and a shift. Here M0 keeps all its bits: 2^(bits−2) ≤ M0 < 2^(bits−1), so that M0 fits a signed integer of that
width and its relative error is at most 2^-(bits−1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
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


def real_value(multiplier: NDArray[np.int64], shift: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return M0 · 2^-n; exact, since M0 has at most 31 bits."""
    return np.ldexp(np.asarray(multiplier, dtype=np.float64), -np.asarray(shift, dtype=np.int64).astype(np.intc))
