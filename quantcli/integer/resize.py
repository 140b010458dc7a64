"""Resize, nearest and linear (ONNX Resize), on integers with their zero point taken off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

NEAREST: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}


def resize(
    x: NDArray[np.int64], attributes: Mapping[str, Any], scales: NDArray[Any] | None, sizes: NDArray[Any] | None
) -> NDArray[np.float64]:
    """Return x resized along every axis whose size changes, linear values not rounded yet.

    Args:
        x: Integers.
        attributes: ``mode``, ``coordinate_transformation_mode``, ``nearest_mode``, ``axes``.
        scales: One factor per axis, or None.
        sizes: One size per axis, where there are no scales.
    """
    axes = [axis % x.ndim for axis in attributes.get("axes") or range(x.ndim)]
    linear = attributes.get("mode", "nearest") == "linear"
    values = x.astype(np.float64)
    for position, axis in enumerate(axes):
        before = x.shape[axis]
        if scales is not None and scales.size:
            factor = float(scales[position])
            after = int(np.floor(before * factor))
        else:
            after = int(np.asarray(sizes).reshape(-1)[position])
            factor = after / before
        if after == before and factor == 1.0:
            continue
        where = source_coordinates(
            attributes.get("coordinate_transformation_mode", "half_pixel"), before, after, factor
        )
        if linear:
            values = interpolated(values, axis, np.clip(where, 0, before - 1))
        else:
            choose = NEAREST[attributes.get("nearest_mode", "round_prefer_floor")]
            values = np.take(values, np.clip(choose(where), 0, before - 1).astype(np.int64), axis=axis)
    return values


def source_coordinates(mode: str, before: int, after: int, factor: float) -> NDArray[np.float64]:
    """Return where in the input every output position lies (ONNX Resize, coordinate_transformation_mode)."""
    outputs = np.arange(after, dtype=np.float64)
    if mode == "asymmetric":
        return outputs / factor
    if mode == "align_corners":
        return outputs * (before - 1) / (after - 1) if after > 1 else np.zeros(after)
    if mode == "pytorch_half_pixel" and after == 1:
        return np.zeros(after)
    if mode == "half_pixel_symmetric":
        adjustment = after / (factor * before)
        return before / 2 * (1 - adjustment) + (outputs + 0.5) / factor - 0.5
    return (outputs + 0.5) / factor - 0.5


def interpolated(values: NDArray[np.float64], axis: int, where: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values between their neighbours along an axis."""
    low = np.floor(where).astype(np.int64)
    high = np.minimum(low + 1, values.shape[axis] - 1)
    shape = [1] * values.ndim
    shape[axis] = -1
    share = (where - low).reshape(shape)
    between: NDArray[np.float64] = (
        np.take(values, low, axis=axis) * (1 - share) + np.take(values, high, axis=axis) * share
    )
    return between
