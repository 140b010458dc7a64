"""LOWERED: for every arithmetic of the sidecar, the kernel calls that compute it (docs/arithmetic.md, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.arithmetic.fixed_point import fixed_point
from quantcli.arithmetic.gemmlowp import INPUT_BITS, LARGEST
from quantcli.embedded.lowering import Lowering, loop_fields
from quantcli.embedded.products import accumulate
from quantcli.embedded.program import Buffer, Step, Value, channels_last, loops, whole
from quantcli.errors import EmbeddedError
from quantcli.integer.kernels import window_of
from quantcli.integer.layers import mean_axes
from quantcli.integer.moves import MOVES

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from quantcli.integer.layer import Layer
    from quantcli.sidecar import LayerEntry, MultiplierEntry

# Stands for an element's number where padding stands for itself, when a move is asked what goes where.
ELEMENTS = 1 << 40


def output_fields(low: Lowering, entry: LayerEntry, kind: str = "out_zero") -> dict[str, Any]:
    """Return the fields that end every layer: zero point, clamp and rounding."""
    clamp = entry.clamp or low.grid(entry.outputs[0])
    return {
        kind: low.tensor(entry.outputs[0]).zero_point[0],
        "low": clamp[0],
        "high": clamp[1],
        "rounding": rounding(entry),
    }


def rounding(entry: LayerEntry) -> str:
    """Return what C calls a rounding."""
    return f"ROUNDING_{entry.rounding.upper()}"


def scalar(low: Lowering, entry: LayerEntry, multiplier: MultiplierEntry, largest: int) -> dict[str, Any]:
    """Return one multiplier and its shift as fields."""
    shift = low.rescaling(multiplier.multiplier, multiplier.shift, entry.rounding, largest, entry.name)
    return {"multiplier": multiplier.multiplier[0], "shift": shift[0]}


# ---- element by element --------------------------------------------------------------------------------------------------------


def paired(low: Lowering, entry: LayerEntry) -> tuple[list[Value], NDArray[np.int64], dict[str, Any], tuple[int, ...]]:
    """Return two operands, the order of the output, the loops over both as fields, and which may be written over."""
    shape = low.integers[entry.outputs[0]].shape
    values = [low.operand(name) for name in entry.inputs]
    full = [value for value in values if value.shape == shape and value.buffer.kind != "constant"]
    order = full[0].order if full else whole(shape).reshape(-1)

    def places(value: Value) -> NDArray[np.int64]:
        elements = np.broadcast_to(whole(value.shape), shape).reshape(-1)
        return value.position[elements[order]]

    found = loops(places(values[0]), places(values[1]))
    if found is None:  # what repeats in no regular way is laid out as the output is
        for i, value in enumerate(values):
            elements = np.broadcast_to(whole(value.shape), shape).reshape(-1)[order]
            if not np.array_equal(places(value), np.arange(order.size)):
                buffer = Buffer(value.tensor, order.size)
                low.moved(value, value.position[elements], np.arange(order.size), buffer, entry.name, entry.operator)
                values[i] = Value(value.tensor, tuple(shape), order, buffer)
        found = loops(places(values[0]), places(values[1]))
    if found is None or any(int(places(value)[0]) for value in values):
        raise EmbeddedError(
            f"'{entry.name}' reads its operands in no order that C source has", "leave it out of the model"
        )
    straight = np.arange(order.size)
    over = tuple(i for i, value in enumerate(values) if np.array_equal(places(value), straight))
    return values, order, {"loops": loop_fields(found)}, over


def total(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a sum (equations 14 and 14a)."""
    values, order, fields, over = paired(low, entry)
    zeros = {"a_zero": layer.zero_point(entry.inputs[0]), "b_zero": layer.zero_point(entry.inputs[1])}
    ends = output_fields(low, entry)
    minus = entry.operator == "Sub"
    reads = tuple((value.buffer, 0) for value in values)
    furthest = [low.furthest(name) for name in entry.inputs]
    if entry.multipliers[-1].operand is None:
        parts = [
            scalar(low, entry, one, far << 20)
            for one, far in zip(entry.multipliers, [*furthest, sum(furthest)], strict=True)
        ]
        fields |= zeros | ends | {"minus": int(minus)}
        fields |= {key: [part[key] for part in parts] for key in ("multiplier", "shift")}
        name = "sum_headroom"
    else:
        common = max(one.shift[0] for one in entry.multipliers)
        weights = [one.multiplier[0] << (common - one.shift[0]) for one in entry.multipliers]
        largest = sum(weight * far for weight, far in zip(weights, furthest, strict=True))
        shift = low.rescaling([1], [common], entry.rounding, largest, entry.name)[0]
        signed = {"a_multiplier": weights[0], "b_multiplier": -weights[1] if minus else weights[1]}
        fields |= zeros | ends | {"shift": shift} | signed
        name = "sum"
    made = low.made(entry.outputs[0], order)
    low.emit(Step(name, entry.name, entry.operator, reads, (made.buffer, 0), (f"{name}_t", fields), in_place=over))


def product(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a product (equation 13 with a single term)."""
    values, order, fields, over = paired(low, entry)
    largest = low.furthest(entry.inputs[0]) * low.furthest(entry.inputs[1])
    fields |= {"a_zero": layer.zero_point(entry.inputs[0]), "b_zero": layer.zero_point(entry.inputs[1])}
    fields |= output_fields(low, entry) | scalar(low, entry, entry.multipliers[0], largest)
    reads = tuple((value.buffer, 0) for value in values)
    made = low.made(entry.outputs[0], order)
    low.emit(
        Step(
            "product",
            entry.name,
            entry.operator,
            reads,
            (made.buffer, 0),
            ("product_t", fields),
            in_place=over,
            macs=order.size,
        )
    )


def look_up(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower an element-wise function (equation 15)."""
    value = low.operand(entry.inputs[0])
    table = low.array(f"{entry.name}_table", np.array(entry.table, dtype=low.dtype))
    made = low.made(entry.outputs[0], value.order)
    arguments = (value.order.size, layer.tensors[entry.inputs[0]].qmin, table)
    read, write = ((value.buffer, 0),), (made.buffer, 0)
    low.emit(Step("lookup", entry.name, entry.operator, read, write, None, arguments, in_place=(0,)))


# ---- along axes ----------------------------------------------------------------------------------------------------------------


def grouped(low: Lowering, value: Value, axes: tuple[int, ...]) -> tuple[Value, dict[str, Any], NDArray[np.int64]]:
    """Return a value that lies [outer][length][inner], length what the axes span; those as fields; and the order of the rest.

    The order of the rest names its elements as a model counts them that has dropped the axes.
    """
    found = split_along(value, axes)
    if found is None:
        value = low.laid(value, np.moveaxis(whole(value.shape), axes, range(-len(axes), 0)).reshape(-1))
        found = split_along(value, axes)
    if found is None:
        raise EmbeddedError(f"'{value.tensor}' has no axes {axes}", "this is an error of quantcli")
    return value, *found


def split_along(value: Value, axes: tuple[int, ...]) -> tuple[dict[str, Any], NDArray[np.int64]] | None:
    """Return the sizes and the order of the rest, if a value lies [outer][length][inner] already."""
    kept = [size for axis, size in enumerate(value.shape) if axis not in axes]
    group = np.broadcast_to(np.expand_dims(whole(kept), axes), value.shape).reshape(-1)  # of the rest, by element
    length = int(np.prod([value.shape[axis] for axis in axes], dtype=np.int64))
    keys = group[value.order]
    again = np.flatnonzero(keys == keys[0])
    inner = int(again[1]) if again.size > 1 else keys.size
    if keys.size % (inner * length):
        return None
    cube = keys.reshape(-1, length, inner)
    if not (cube == cube[:, :1]).all():
        return None
    return {"outer": cube.shape[0], "length": length, "inner": inner}, cube[:, 0].reshape(-1)


def softmax(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a softmax (equations 17 and 18)."""
    rank = len(low.integers[entry.inputs[0]].shape)
    axis = int(layer.attributes.get("axis", -1)) % rank
    value, fields, _ = grouped(low, low.operand(entry.inputs[0]), (axis,))
    ends = output_fields(low, entry) | {"rounding": "ROUNDING_SINGLE"}
    fields |= {"in_zero": 0} | ends
    arguments: tuple[Any, ...]
    if entry.table is None:
        scale = layer.tensors[entry.inputs[0]].scale[0]
        multiplier, shift = fixed_point(np.array(min(scale * 2.0 ** (31 - INPUT_BITS), LARGEST)))
        left = 31 - int(shift)
        radius = int(np.floor(((1 << INPUT_BITS) - 1) * 2.0 ** (31 - INPUT_BITS) / 2.0**left))
        fields |= {"multiplier": int(multiplier), "shift": int(shift)}
        name, arguments = "softmax_fixed", (min(radius, (1 << 31) - 1),)
    else:
        fields |= {"multiplier": 0, "shift": 0}
        table = low.array(f"{entry.name}_table", np.array(entry.table, dtype=np.int32))
        name, arguments = "softmax", (table, round(1.0 / layer.output.scale[0]))
    made = low.made(entry.outputs[0], value.order)
    read, write = ((value.buffer, 0),), (made.buffer, 0)
    low.emit(Step(name, entry.name, entry.operator, read, write, ("reduction_t", fields), arguments, in_place=(0,)))


def rescale(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower what rescales its operands: joins and means (equation 14)."""
    if entry.operator == "Concat":
        joined(low, layer, entry)
    elif entry.operator == "AveragePool":
        pooled(low, layer, entry, "average_pool")
    elif entry.operator == "Where":
        raise EmbeddedError(f"C source has no kernel for Where '{entry.name}'", "write it as a product and a sum")
    else:
        averaged(low, layer, entry)


def averaged(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a global mean, or one along axes."""
    operand = low.operand(entry.inputs[0])
    axes = mean_axes(layer, len(operand.shape))
    value, fields, order = grouped(low, operand, axes)
    fields |= {"in_zero": layer.zero_point(entry.inputs[0])} | output_fields(low, entry)
    fields |= mean_multiplier(low, layer, entry, fields["length"])
    made = low.made(entry.outputs[0], order)
    read, write = ((value.buffer, 0),), (made.buffer, 0)
    low.emit(Step("mean", entry.name, entry.operator, read, write, ("reduction_t", fields)))


def mean_multiplier(low: Lowering, layer: Layer, entry: LayerEntry, count: int) -> dict[str, Any]:
    """Return a mean's multiplier: it divides by the count in the same rounding, and the shift is part of what it divides by.

    Raises:
        EmbeddedError: If numerator or denominator may leave 61 bits.
    """
    if not entry.multipliers:
        return {"multiplier": 1, "shift": 0}
    multiplier, shift = entry.multipliers[0].multiplier[0], entry.multipliers[0].shift[0]
    numerator = low.furthest(entry.inputs[0]) * count * (multiplier << max(-shift, 0))
    if numerator >= 1 << 61 or count << max(shift, 0) >= 1 << 61:
        raise EmbeddedError(f"the mean '{entry.name}' may leave 61 bits", "choose --multiplier-bits 16")
    del layer
    return {"multiplier": multiplier, "shift": shift}


def joined(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a Concat: each operand rescaled into its place."""
    shape = low.integers[entry.outputs[0]].shape
    axis = int(layer.attributes["axis"]) % len(shape)
    values = [low.operand(name) for name in entry.inputs]
    last = len(shape) > 2 and any(not value.canonical for value in values)
    made = low.made(entry.outputs[0], channels_last(shape) if last else None)
    elements = np.split(whole(shape), np.cumsum([value.shape[axis] for value in values])[:-1].tolist(), axis=axis)
    for value, part, one, name in zip(values, elements, entry.multipliers, entry.inputs, strict=True):
        places = made.position[part.reshape(-1)]  # of each element of the operand
        sequence = np.argsort(places)
        source, target = value.position[sequence], places[sequence]
        if same_grid(low, layer, entry, one, name):
            low.moved(value, source, target, made.buffer, entry.name, entry.operator)
            continue
        found = loops(source, target)
        read, write = (value.buffer, int(source[0])), (made.buffer, int(target[0]))
        if found is None:
            raise EmbeddedError(
                f"Concat '{entry.name}' writes in no order that C source has", "leave it out of the model"
            )
        fields = {"loops": loop_fields(found), "in_zero": layer.zero_point(name)} | output_fields(low, entry)
        fields |= scalar(low, entry, one, low.furthest(name))
        low.emit(Step("requantize", entry.name, entry.operator, (read,), write, ("requantize_t", fields)))


def same_grid(low: Lowering, layer: Layer, entry: LayerEntry, one: MultiplierEntry, name: str) -> bool:
    """Tell whether rescaling an operand changes nothing: M is exactly 1, and neither zero point nor clamp differ."""
    exact = one.multiplier[0] * 2.0 ** -one.shift[0] == 1.0
    clamp = entry.clamp or low.grid(entry.outputs[0])
    inside = clamp[0] <= low.tensor(name).qmin and low.tensor(name).qmax <= clamp[1]
    return exact and inside and layer.zero_point(name) == layer.zero_point(entry.outputs[0])


# ---- pools ---------------------------------------------------------------------------------------------------------------------


def pooled(low: Lowering, layer: Layer, entry: LayerEntry, kernel: str) -> None:
    """Lower a pool over one or two axes.

    Raises:
        EmbeddedError: If it has three.
    """
    value = low.operand(entry.inputs[0])
    if len(value.shape) not in (3, 4) or value.shape[0] != 1:
        raise EmbeddedError(
            f"C source has no kernel for {entry.operator} '{entry.name}' of shape {list(value.shape)}",
            "it pools one sample, over one or two axes",
        )
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
    fields |= mean_multiplier(low, layer, entry, count) if kernel == "average_pool" else {"multiplier": 0, "shift": 0}
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


def refused(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Refuse a layer that has no kernel."""
    del low, layer
    raise EmbeddedError(
        f"C source has no kernel for {entry.operator} '{entry.name}' ({entry.arithmetic})",
        "use another format for this model",
    )


# Operators with kernels for some of their forms, or none.
PARTLY = {
    "AveragePool": "1-D, 2-D",
    "Conv": "1-D, 2-D",
    "ConvTranspose": "1-D, 2-D",
    "MatMul": "no stacks of stored matrices",
    "MaxPool": "1-D, 2-D",
    "Resize": "nearest",
    "Where": "—",
}

LOWERED: dict[str, Callable[[Lowering, Layer, LayerEntry], None]] = {
    "accumulate": accumulate,
    "product": product,
    "sum": total,
    "mean": mean,
    "rescale": rescale,
    "table": look_up,
    "softmax": softmax,
    "move": move,
    "lookup": refused,
    "dynamic": refused,
    "stored": refused,
}
