"""Rounding of reals to the integer grid (docs/arithmetic.md, section 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def half_even(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to the nearest integer, ties to the even one (ONNX QuantizeLinear; IEEE 754 roundTiesToEven).

    Args:
        values: Reals of any shape, float64.

    Returns:
        The rounded values, float64.
    """
    return np.rint(np.asarray(values, dtype=np.float64))
