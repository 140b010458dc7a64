"""Weights in blocks: one scale and zero point for every few values along one axis (ONNX DequantizeLinear with ``block_size``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.arithmetic.affine import SMALLEST_SCALE, IntegerType

if TYPE_CHECKING:
    from numpy.typing import NDArray

# By how much a block's range may shrink: clipping its ends a little can make the steps so much finer that the error is less.
SHRINKS = np.linspace(1.0, 0.7, 16)


@dataclass(frozen=True, eq=False)
class Blocks:
    """The parameters of a weight in blocks: real = scale · (q − zero_point).

    Attributes:
        size: How many values along the axis a block has; the last may have fewer.
        axis: The axis.
        scale: float32, as the weight but with one entry per block along the axis.
        zero_point: As many zero points.
    """

    size: int
    axis: int
    scale: NDArray[np.float32]
    zero_point: NDArray[np.integer]


def in_blocks(values: NDArray[Any], size: int, axis: int) -> NDArray[Any]:
    """Return an array as (…, blocks, size), its axis last and its end filled up with zeros."""
    moved = np.moveaxis(values, axis, -1)
    short = -moved.shape[-1] % size
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, short)])
    return padded.reshape(*moved.shape[:-1], -1, size)


def block_parameters(values: NDArray[np.float32], integer: IntegerType, size: int, axis: int) -> Blocks:
    """Return the parameters of every block: of some ranges that hold zero, the one whose squared error is least.

    Args:
        values: The weight, float32 of any shape.
        integer: The grid, unsigned (affine) or signed and narrow (symmetric).
        size: How many values a block has.
        axis: The axis along which they follow each other.
    """
    blocks = in_blocks(values, size, axis)
    lo, hi = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    best = np.full(lo.shape, np.inf)
    scale, zero_point = np.ones(lo.shape, np.float32), np.zeros(lo.shape, np.int64)
    for shrink in SHRINKS:
        steps, middle = parameters(lo * shrink, hi * shrink, integer)
        q = np.clip(np.rint(blocks / steps[..., None]) + middle[..., None], integer.qmin, integer.qmax)
        error = (((q - middle[..., None]) * steps[..., None] - blocks) ** 2).sum(axis=-1)
        better = error < best
        best = np.where(better, error, best)
        scale, zero_point = np.where(better, steps, scale), np.where(better, middle, zero_point)
    return Blocks(size, axis, np.moveaxis(scale, -1, axis), np.moveaxis(zero_point, -1, axis).astype(integer.dtype))


def parameters(
    lo: NDArray[np.floating], hi: NDArray[np.floating], integer: IntegerType
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scales and zero points of ranges that hold zero (equations 2 to 4); 1 where a range is empty."""
    if integer.signed:
        scale = (np.maximum(-lo, hi) / integer.qmax).astype(np.float32)
    else:
        scale = ((hi - lo) / (integer.qmax - integer.qmin)).astype(np.float32)
    scale = np.where(scale == 0, np.float32(1), np.maximum(scale, SMALLEST_SCALE)).astype(np.float32)
    if integer.signed:
        return scale, np.zeros(scale.shape, dtype=np.int64)
    middle = np.rint(integer.qmin - lo.astype(np.float64) / scale)
    return scale, np.clip(middle, integer.qmin, integer.qmax).astype(np.int64)


def spread(blocks: Blocks, length: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return scales and zero points with one entry per value."""
    scale = np.repeat(blocks.scale, blocks.size, axis=blocks.axis).take(range(length), axis=blocks.axis)
    zero_point = np.repeat(blocks.zero_point.astype(np.int64), blocks.size, axis=blocks.axis)
    return scale, zero_point.take(range(length), axis=blocks.axis)


def quantize_blocks(values: NDArray[np.float32], blocks: Blocks, integer: IntegerType) -> NDArray[Any]:
    """Return a weight's integers: q = clamp(round(real / scale) + zero_point), ties to even, block by block."""
    scale, zero_point = spread(blocks, values.shape[blocks.axis])
    q = np.rint(values.astype(np.float64) / scale.astype(np.float64)) + zero_point
    held: NDArray[Any] = np.clip(q, integer.qmin, integer.qmax).astype(integer.dtype)
    return held


def dequantize_blocks(q: NDArray[Any], blocks: Blocks) -> NDArray[np.float32]:
    """Return real = scale · (q − zero_point) in float32, block by block."""
    scale, zero_point = spread(blocks, q.shape[blocks.axis])
    reals: NDArray[np.float32] = (q.astype(np.int64) - zero_point).astype(np.float32) * scale
    return reals
