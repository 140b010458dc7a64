"""Pools and moves are lowered here: most moves need no step at all, since a buffer may be read in any order (equation 16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.embedded.axes import check_window, grouped, mean_multiplier, output_fields
from quantcli.embedded.program import Step, Value, channels_last, whole
from quantcli.errors import EmbeddedError
from quantcli.integer.kernels import window_of
from quantcli.integer.moves import MOVES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantcli.embedded.lowering import Lowering
    from quantcli.integer.layer import Layer
    from quantcli.sidecar import LayerEntry

# Stands for an element's number where padding stands for itself, when a move is asked what goes where.
ELEMENTS = 1 << 40


def pooled(low: Lowering, layer: Layer, entry: LayerEntry, kernel: str) -> None:
    """Lower a pool over one or two axes.

    Raises:
        EmbeddedError: If it has three.
    """
    value = low.operand(entry.inputs[0])
    check_window(value, entry)
    value = low.laid(value, channels_last(value.shape), layer=entry.name)
    spatial = value.shape[2:]
    window = window_of(layer.attributes, layer.attributes["kernel_shape"], spatial)
    shape = low.integers[entry.outputs[0]].shape
    pads = bool(layer.attributes.get("count_include_pad", 0))
    per_axis = {
        "in": spatial,
        "out": shape[2:],
        "kernel": window.kernel,
        "step": window.strides,
        "dilation": window.dilations,
        "pad": window.begin,
        "count": tuple(size + (end if pads else 0) for size, end in zip(spatial, window.end, strict=True)),
        "first": tuple(begin if pads else 0 for begin in window.begin),
    }
    flat = {name: (1, *sizes) if len(sizes) == 1 else sizes for name, sizes in per_axis.items()}
    if len(spatial) == 1:
        flat["pad"], flat["first"] = (0, per_axis["pad"][0]), (0, per_axis["first"][0])
    fields: dict[str, Any] = {
        "in_h": flat["in"][0], "in_w": flat["in"][1], "channels": shape[1], "out_h": flat["out"][0], "out_w": flat["out"][1],
        "kernel_h": flat["kernel"][0], "kernel_w": flat["kernel"][1], "step_h": flat["step"][0], "step_w": flat["step"][1],
        "dilation_h": flat["dilation"][0], "dilation_w": flat["dilation"][1], "pad_top": flat["pad"][0], "pad_left": flat["pad"][1],
        "count_h": flat["count"][0], "count_w": flat["count"][1], "count_top": flat["first"][0], "count_left": flat["first"][1],
        "same_grid": int(entry.arithmetic == "mean"), "in_zero": layer.zero_point(entry.inputs[0]),
    }  # fmt: skip
    fields |= output_fields(low, entry)
    count = int(np.prod(window.kernel))
    fields |= mean_multiplier(low, entry, count) if kernel == "average_pool" else {"multiplier": 0, "shift": 0}
    if kernel == "max_pool":
        fields |= {"low": low.grid(entry.outputs[0])[0]}
    made = low.made(entry.outputs[0], channels_last(shape))
    low.emit(Step(kernel, entry.name, entry.operator, ((value.buffer, 0),), (made.buffer, 0), ("pool_t", fields)))


def mean(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a mean of the integers themselves (equation 14b)."""
    pooled(low, layer, entry, "average_pool")


# ---- moves ---------------------------------------------------------------------------------------------------------------------


def move(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower what only moves integers (equation 16): most need no step at all, since a buffer may be read in any order."""
    operator = entry.operator
    if operator == "MaxPool":
        pooled(low, layer, entry, "max_pool")
        return
    if operator in {"ReduceMax", "ReduceMin", "GlobalMaxPool"}:
        extreme(low, layer, entry)
        return
    if operator == "Resize" and layer.attributes.get("mode", "nearest") != "nearest":
        raise EmbeddedError(
            f"C source has no kernel for Resize '{entry.name}', which interpolates", "export it with mode nearest"
        )
    value = low.operand(entry.inputs[0])
    numbers = whole(value.shape) + ELEMENTS
    for name, moved in zip(entry.outputs, MOVES[operator](layer, numbers), strict=False):
        placed(low, layer, entry, name, value, np.asarray(moved).reshape(-1) - ELEMENTS)


def placed(low: Lowering, layer: Layer, entry: LayerEntry, name: str, value: Value, source: NDArray[np.int64]) -> None:
    """Give an output of a move its place: the operand's own, where nothing is dropped, repeated or padded.

    Args:
        low: The lowering.
        layer: The layer.
        entry: Its entry.
        name: The output.
        value: The operand.
        source: Which element of the operand each element of the output is; negative for padding.
    """
    if np.array_equal(np.sort(source), np.arange(value.order.size)):
        where = np.empty_like(source)
        where[source] = np.arange(source.size)
        low.made(name, where[value.order], value.buffer)
        return
    shape = low.integers[name].shape
    last = (
        len(shape) == len(value.shape) > 2
        and not value.canonical
        and np.array_equal(value.order, channels_last(value.shape))
    )
    made = low.made(name, channels_last(shape) if last else None)
    if not source.size:
        return
    wanted = source[made.order]
    places = np.flatnonzero(wanted >= 0)
    if places.size < wanted.size:
        fill = (made.order.size, layer.zero_point(entry.inputs[0]))
        low.emit(Step("fill", entry.name, entry.operator, (), (made.buffer, 0), None, fill))
    if places.size:
        low.moved(value, value.position[wanted[places]], places, made.buffer, entry.name, entry.operator)


def extreme(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower the highest or lowest integers along axes."""
    operand = low.operand(entry.inputs[0])
    rank = len(operand.shape)
    axes = tuple(range(2, rank))
    if entry.operator != "GlobalMaxPool":
        given = layer.plain.get(1)
        chosen = given.reshape(-1).tolist() if given is not None else layer.attributes.get("axes") or ()
        axes = tuple(int(axis) % rank for axis in chosen)
        if not axes and layer.attributes.get("noop_with_empty_axes", 0):
            low.made(entry.outputs[0], operand.order, operand.buffer)
            return
        axes = axes or tuple(range(rank))
    value, fields, order = grouped(low, operand, axes)
    fields |= {"in_zero": 0} | output_fields(low, entry) | {"rounding": "ROUNDING_SINGLE", "multiplier": 0, "shift": 0}
    sign = -1 if entry.operator == "ReduceMin" else 1
    made = low.made(entry.outputs[0], order)
    read, write = ((value.buffer, 0),), (made.buffer, 0)
    low.emit(Step("extreme", entry.name, entry.operator, read, write, ("reduction_t", fields), (sign,)))
