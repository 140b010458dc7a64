"""Integer kernels, in numpy: accumulators, pools, and moves (docs/arithmetic.md, section 5).

Products of integers are summed by float64 matrix multiplication, which is exact below 2^53: with 9-bit by 8-bit factors that is
more than 2^36 terms.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# How many values of windows are laid out at once, as float64 (128 MB): windows of 3×3 hold each value nine times.
AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Window:
    """How a kernel slides: one entry per spatial axis.

    Attributes:
        kernel: Its size.
        strides: Its step.
        dilations: The distance between its taps.
        begin: Padding before.
        end: Padding after.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    def extent(self, axis: int) -> int:
        """Return how many input positions the kernel spans."""
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1


def window_of(attributes: Mapping[str, Any], kernel: Sequence[int], spatial: Sequence[int]) -> Window:
    """Return the window that ONNX attributes describe (``auto_pad`` and ``ceil_mode`` resolved).

    Args:
        attributes: The node's attributes.
        kernel: The kernel's size.
        spatial: The input's spatial size.
    """
    rank = len(kernel)
    strides = tuple(attributes.get("strides") or (1,) * rank)
    dilations = tuple(attributes.get("dilations") or (1,) * rank)
    pads = tuple(attributes.get("pads") or (0,) * 2 * rank)
    begin, end = list(pads[:rank]), list(pads[rank:])
    auto = attributes.get("auto_pad", "NOTSET")
    for axis in range(rank):
        extent = (kernel[axis] - 1) * dilations[axis] + 1
        if auto in {"SAME_UPPER", "SAME_LOWER"}:
            outputs = -(-spatial[axis] // strides[axis])
            total = max((outputs - 1) * strides[axis] + extent - spatial[axis], 0)
            small, large = total // 2, total - total // 2
            begin[axis], end[axis] = (small, large) if auto == "SAME_UPPER" else (large, small)
        elif auto == "VALID":
            begin[axis] = end[axis] = 0
    return Window(tuple(kernel), strides, dilations, tuple(begin), tuple(end))


def windows(x: NDArray[np.int64], window: Window, fill: int, ceil_mode: bool = False) -> NDArray[np.int64]:
    """Return every window of x [N, C, spatial…] as a view [N, C, outputs…, kernel…], padded with ``fill``."""
    rank = len(window.kernel)
    end = list(window.end)
    if ceil_mode:
        for axis in range(rank):
            size = x.shape[2 + axis] + window.begin[axis] + window.end[axis]
            outputs = -(-(size - window.extent(axis)) // window.strides[axis]) + 1
            if (outputs - 1) * window.strides[axis] >= x.shape[2 + axis] + window.begin[axis]:
                outputs -= 1  # a window may not begin in the padding behind
            end[axis] += max((outputs - 1) * window.strides[axis] + window.extent(axis) - size, 0)
    pads = [(0, 0), (0, 0), *zip(window.begin, end, strict=True)]
    padded = np.pad(x, pads, constant_values=fill)
    extents = tuple(window.extent(axis) for axis in range(rank))
    view = sliding_window_view(padded, extents, axis=tuple(range(2, 2 + rank)))
    outputs_step = tuple(slice(None, None, step) for step in window.strides)
    taps = tuple(slice(None, None, step) for step in window.dilations)
    return view[(slice(None), slice(None), *outputs_step, *taps)]


def convolve(x: NDArray[np.int64], w: NDArray[np.int64], attributes: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return Σ x·w of a convolution: x [N, C, spatial…] and w [M, C/group, kernel…] with their zero points taken off."""
    group = int(attributes.get("group", 1))
    window = window_of(attributes, w.shape[2:], x.shape[2:])
    view = windows(x, window, 0)
    rank = len(window.kernel)
    inputs, outputs = x.shape[1] // group, w.shape[0] // group
    y = np.empty((x.shape[0], w.shape[0], *view.shape[2 : 2 + rank]), dtype=np.int64)
    rows = max(1, AT_ONCE * view.shape[2] // max(view.size // group, 1))
    for g, begin in itertools.product(range(group), range(0, view.shape[2], rows)):
        taps = view[:, g * inputs : (g + 1) * inputs, begin : begin + rows]
        weight = w[g * outputs : (g + 1) * outputs].astype(np.float64)
        # [N, outputs…, C/group, kernel…] by [C/group, kernel…, M/group]
        moved = np.moveaxis(taps, 1, 1 + rank).astype(np.float64)
        acc = np.tensordot(moved, weight, axes=(tuple(range(1 + rank, 2 + 2 * rank)), tuple(range(1, 2 + rank))))
        y[:, g * outputs : (g + 1) * outputs, begin : begin + rows] = np.moveaxis(acc, -1, 1)
    return y


def convolve_transposed(x: NDArray[np.int64], w: NDArray[np.int64], attributes: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return Σ x·w of a transposed convolution: x [N, C, spatial…], w [C, M/group, kernel…], zero points taken off."""
    group = int(attributes.get("group", 1))
    rank, kernel, spatial = w.ndim - 2, w.shape[2:], x.shape[2:]
    strides = tuple(attributes.get("strides") or (1,) * rank)
    dilations = tuple(attributes.get("dilations") or (1,) * rank)
    extra = tuple(attributes.get("output_padding") or (0,) * rank)
    full = [(spatial[a] - 1) * strides[a] + (kernel[a] - 1) * dilations[a] + 1 + extra[a] for a in range(rank)]
    inputs, outputs = x.shape[1] // group, w.shape[1]
    y = np.zeros((x.shape[0], group * outputs, *full), dtype=np.int64)
    for g in range(group):
        taken = x[:, g * inputs : (g + 1) * inputs].astype(np.float64)
        for tap in itertools.product(*(range(size) for size in kernel)):
            chosen: tuple[Any, ...] = (slice(g * inputs, (g + 1) * inputs), slice(None), *tap)
            weight = w[chosen].astype(np.float64)
            place = tuple(
                slice(tap[a] * dilations[a], tap[a] * dilations[a] + (spatial[a] - 1) * strides[a] + 1, strides[a])
                for a in range(rank)
            )
            product = np.moveaxis(np.tensordot(taken, weight, axes=(1, 0)), -1, 1)
            y[(slice(None), slice(g * outputs, (g + 1) * outputs), *place)] += product.astype(np.int64)
    begin, end = transposed_pads(attributes, full, spatial, strides, rank)
    return y[(slice(None), slice(None), *(slice(begin[a], full[a] - end[a]) for a in range(rank)))]


def transposed_pads(
    attributes: Mapping[str, Any], full: Sequence[int], spatial: Sequence[int], strides: Sequence[int], rank: int
) -> tuple[list[int], list[int]]:
    """Return what a transposed convolution cuts off before and after (ONNX ConvTranspose: pads, output_shape, auto_pad)."""
    auto = attributes.get("auto_pad", "NOTSET")
    wanted = attributes.get("output_shape")
    if wanted or auto in {"SAME_UPPER", "SAME_LOWER"}:
        shape = list(wanted)[-rank:] if wanted else [spatial[a] * strides[a] for a in range(rank)]
        total = [max(full[a] - shape[a], 0) for a in range(rank)]
        half = [t // 2 for t in total]
        rest = [t - h for t, h in zip(total, half, strict=True)]
        return (half, rest) if auto == "SAME_UPPER" else (rest, half)
    pads = list(attributes.get("pads") or (0,) * 2 * rank)
    return pads[:rank], pads[rank:]


def multiply_matrices(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a @ b, exactly."""
    product: NDArray[np.int64] = np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)
    return product


def pooled_sums(x: NDArray[np.int64], attributes: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the sums of an average pool's windows, and how many values each divides by."""
    kernel = tuple(attributes["kernel_shape"])
    window = window_of(attributes, kernel, x.shape[2:])
    ceil_mode = bool(attributes.get("ceil_mode", 0))
    axes = tuple(range(-len(kernel), 0))
    sums = windows(x, window, 0, ceil_mode).sum(axis=axes)
    inside = np.ones((1, 1, *x.shape[2:]), dtype=np.int64)
    if attributes.get("count_include_pad", 0):
        pads = [(0, 0), (0, 0), *zip(window.begin, window.end, strict=True)]
        bare = Window(window.kernel, window.strides, window.dilations, (0,) * len(kernel), (0,) * len(kernel))
        ones = np.pad(inside, pads, constant_values=1)
        counts = windows(ones, bare, 0, ceil_mode)
    else:
        counts = windows(inside, window, 0, ceil_mode)
    return sums, counts.sum(axis=axes)


def max_pool(q: NDArray[np.int64], attributes: Mapping[str, Any]) -> NDArray[np.int64]:
    """Return the largest integer of every window; padding never wins."""
    kernel = tuple(attributes["kernel_shape"])
    window = window_of(attributes, kernel, q.shape[2:])
    lowest = np.iinfo(np.int64).min
    view = windows(q, window, lowest, bool(attributes.get("ceil_mode", 0)))
    return np.asarray(view.max(axis=tuple(range(-len(kernel), 0))))
