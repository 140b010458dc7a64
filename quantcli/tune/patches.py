"""Patches: what a convolution's kernel meets at its places, as rows: an im2col of some of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray


def rows_in(node: ir.Node, values: NDArray[Any]) -> int:
    """Return how many rows a layer has in a batch of its data operand."""
    if node.op_type == "Conv":
        return len(values) * math.prod(Window.of(node, values.shape[2:]).places)
    return math.prod(values.shape[:-1])


@dataclass(frozen=True)
class Window:
    """What a convolution's kernel sees at a time, along each spatial axis.

    Attributes:
        kernel: Its lengths.
        strides: Its strides.
        dilations: Its dilations.
        begins: What is padded in front.
        lengths: How long the padded axes are.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, sizes: Sequence[int]) -> Window:
        """Return that of a Conv whose data has these spatial axes."""
        kernel = tuple(node.inputs[1].shape.numpy()[2:])  # type: ignore[union-attr]
        ones = [1] * len(kernel)
        strides, dilations = (
            tuple(map(int, node.attributes.get_ints(name, ones))) for name in ("strides", "dilations")
        )
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        begins, ends = padding(node, sizes, extents, strides)
        lengths = tuple(b + n + e for b, n, e in zip(begins, sizes, ends, strict=True))
        return cls(kernel, strides, dilations, tuple(begins), lengths)

    @property
    def places(self) -> tuple[int, ...]:
        """At how many places it stands along each axis."""
        axes = zip(self.lengths, self.kernel, self.strides, self.dilations, strict=True)
        return tuple((n - (k - 1) * d - 1) // s + 1 for n, k, s, d in axes)


@dataclass(frozen=True, eq=False)
class Patches:
    """What a convolution's kernel meets: a row of inputs at every place of every sample.

    Attributes:
        window: The kernel's.
        values: The data: (samples, channels, spatial axes…).
        moved: The same with its channels last and its padding, where many rows of whole channels are wanted.
    """

    window: Window
    values: NDArray[Any]
    moved: NDArray[Any] | None = None

    @classmethod
    def of(cls, node: ir.Node, values: NDArray[Any], wanted: int) -> Patches:
        """Return those of a Conv and its data operand, of which some rows are wanted."""
        window = Window.of(node, values.shape[2:])
        every = len(values) * math.prod(window.lengths)
        alike = node.attributes.get_int("group", 1) == 1 and window.dilations[-1] == 1
        if not alike or 2 * wanted * math.prod(window.kernel) < every:
            return cls(window, np.ascontiguousarray(values))
        moved = np.zeros((len(values), *window.lengths, values.shape[1]), values.dtype)
        inner = (slice(b, b + n) for b, n in zip(window.begins, values.shape[2:], strict=True))
        moved[:, *inner] = np.moveaxis(values, 1, -1)
        return cls(window, values, moved)

    def put(self, rows: NDArray[np.intp], out: NDArray[Any]) -> None:
        """Write some of the rows, in order, to where they are wanted: (groups, rows, inputs of a group)."""
        if not rows.size:
            return
        samples, *places = np.unravel_index(rows, (len(self.values), *self.window.places))
        if self.moved is not None:
            out[0] = stretches(self.moved, self.window)[samples, *places].reshape(out.shape[1:])
            return
        spots, outside = self.spots(places)
        channels = self.values.shape[1] // len(out)
        wanted = out.reshape(*out.shape[:2], -1, channels)
        for sample, part in parts_of(samples):
            planes = self.values[sample].reshape(self.values.shape[1], -1)
            found = planes.take(spots[part], axis=1, mode="clip")  # every spot is one
            found[:, outside[part]] = 0
            wanted[:, part] = found.reshape(len(out), channels, *found.shape[1:]).transpose(0, 2, 3, 1)

    def spots(self, places: Sequence[NDArray[np.intp]]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return where the taps at some places lie in a channel's data, (places, taps), and which of them lie in the padding."""
        window, count = self.window, len(places[0])
        spots, outside = np.zeros((count, 1), np.intp), np.zeros((count, 1), np.bool_)
        axes = zip(
            places, self.values.shape[2:], window.begins, window.kernel, window.strides, window.dilations, strict=True
        )
        for place, length, begin, kernel, stride, dilation in axes:
            along = (place * stride - begin)[:, None, None] + np.arange(kernel) * dilation
            spots = (spots[:, :, None] * length + along.clip(0, length - 1)).reshape(count, -1)
            outside = (outside[:, :, None] | (along < 0) | (along >= length)).reshape(count, -1)
        return spots, outside


def stretches(moved: NDArray[Any], window: Window) -> NDArray[Any]:
    """Return, at every place of padded data with its channels last, all channels of the taps along the last axis; a view."""
    sample, *spatial, _ = moved.strides
    kernel, channels = window.kernel[:-1], window.kernel[-1] * moved.shape[-1]
    starts = (step * far for step, far in zip(window.strides, spatial, strict=True))
    taps = (dilation * far for dilation, far in zip(window.dilations[:-1], spatial[:-1], strict=True))
    shape, strides = (len(moved), *window.places, *kernel, channels), (sample, *starts, *taps, moved.itemsize)
    return np.lib.stride_tricks.as_strided(moved, shape, strides, writeable=False)


def parts_of(samples: NDArray[np.intp]) -> Iterator[tuple[int, slice]]:
    """Yield each of some ascending numbers, and where it stands."""
    found, firsts = np.unique(samples, return_index=True)
    for sample, (first, end) in zip(found.tolist(), itertools.pairwise([*firsts.tolist(), len(samples)]), strict=True):
        yield sample, slice(first, end)


def padding(
    node: ir.Node, sizes: Sequence[int], extents: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return what a convolution pads at the beginning and at the end of each spatial axis (ONNX Conv, ``auto_pad``)."""
    count = len(sizes)
    how = node.attributes.get_string("auto_pad", "NOTSET")
    if how in {"SAME_UPPER", "SAME_LOWER"}:
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(sizes, extents, strides, strict=True)]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (small, large) if how == "SAME_UPPER" else (large, small)
    pads = [int(p) for p in node.attributes.get_ints("pads", [0] * 2 * count)] if how == "NOTSET" else [0] * 2 * count
    return pads[:count], pads[count:]
