"""Bias correction: what a quantized layer gives too much on average, channel by channel, is taken from its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), section 4.2 and
appendix D: E[ỹ] = E[y] + E[ε], with the expectations taken over calibration samples; Finkelstein et al. 2019 (arXiv 1906.03193).
Layers are corrected in graph order, each behind the corrected ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.fold import add_constant, constant

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

# How much an error counts that an activation cuts, and how near to the bound, in standard deviations, one is that it may not.
OUTSIDE, ROOM = 0.3, 0.2
# The operators whose bias is an operand of their own.
BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})


def biased(node: ir.Node, channels: int, graph: ir.Graph) -> NDArray[np.float32] | None:
    """Return a layer's bias, one value per output channel; zeros where it has none yet. None where it cannot have one."""
    if node.op_type not in BIASED:
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        held = np.zeros(channels, dtype=np.float32)
        node.resize_inputs(3)
        node.replace_input_with(2, add_constant(graph, f"{node.outputs[0].name}_bias", held))
        return held
    values = constant(node.inputs[2])
    return None if values is None else np.broadcast_to(values.reshape(-1), (channels,)).astype(np.float32)


def corrected(
    bias: NDArray[np.float32],
    real: Sequence[NDArray[np.float32]],
    made: Sequence[NDArray[np.float32]],
    bounds: tuple[float, float] | None = None,
) -> NDArray[np.float32]:
    """Return a bias with the mean error of every channel taken from it.

    Args:
        bias: (channels,).
        real: Batches of the float layer's outputs, before any activation; their second axis are channels.
        made: The same of the quantized layer.
        bounds: What the activation behind cuts: what lies outside counts for less. None for no activation.
    """
    if bounds is None:
        return (bias - (channel_means(made) - channel_means(real))).astype(np.float32)
    weights = [within(values, bounds) for values in real]
    lost = [(a - b) * weight for a, b, weight in zip(real, made, weights, strict=True)]
    return (bias + channel_means(lost) / channel_means(weights)).astype(np.float32)


def within(values: NDArray[np.float32], bounds: tuple[float, float]) -> NDArray[np.float32]:
    """Return how much errors of values, whose second axis are channels, count before an activation that cuts what is out of bounds.

    What is cut anyway counts for a little: it must not come back over the bound.
    """
    others = tuple(axis for axis in range(values.ndim) if axis != 1)
    room = values.std(axis=others, keepdims=True) * np.float32(ROOM)
    inside = (values > np.float32(bounds[0]) - room) & (values < np.float32(bounds[1]) + room)
    return np.where(inside, np.float32(1), np.float32(OUTSIDE))


def channel_means(batches: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Return the mean of every channel over some batches."""
    count = sum(values.size for values in batches) // max(batches[0].shape[1], 1)
    means: NDArray[np.float64] = sum(map(channel_sums, batches), np.zeros(batches[0].shape[1])) / max(count, 1)
    return means


def channel_sums(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the sum of every channel: those of single samples' channels in the values' precision, and of these in float64."""
    rows = values.reshape(*values.shape[:2], -1)
    with np.errstate(over="ignore", invalid="ignore"):
        by_sample = rows @ np.ones(rows.shape[2], dtype=rows.dtype) if rows.shape[2] > 1 else rows[..., 0]
    if not np.isfinite(by_sample).all():  # a mask's lowest values, say
        by_sample = rows.sum(axis=2, dtype=np.float64)
    sums: NDArray[np.float64] = by_sample.sum(axis=0, dtype=np.float64)
    return sums
