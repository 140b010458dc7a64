"""LOWERED: for every arithmetic of the sidecar, the kernel calls that compute it (docs/arithmetic.md, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.arithmetic.fixed_point import fixed_point, headroom_of
from quantcli.arithmetic.gemmlowp import INPUT_BITS, LARGEST
from quantcli.embedded.axes import grouped, mean_multiplier, output_fields, scalar
from quantcli.embedded.lowering import Lowering, loop_fields
from quantcli.embedded.moves import mean, move, pooled
from quantcli.embedded.products import accumulate
from quantcli.embedded.program import Buffer, Step, Value, channels_last, loops, whole
from quantcli.errors import EmbeddedError
from quantcli.integer.layers import mean_axes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from quantcli.integer.layer import Layer
    from quantcli.sidecar import LayerEntry, MultiplierEntry

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
        headroom = headroom_of(*(layer.tensors[one].dtype for one in entry.inputs))
        parts = [
            scalar(low, entry, one, far << headroom)
            for one, far in zip(entry.multipliers, [*furthest, sum(furthest)], strict=True)
        ]
        fields |= zeros | ends | {"minus": int(minus), "headroom": headroom}
        fields |= {key: [part[key] for part in parts] for key in ("multiplier", "shift")}
        name = "sum_headroom"
    else:
        common = max(one.shift[0] for one in entry.multipliers)
        weights = [one.multiplier[0] << (common - one.shift[0]) for one in entry.multipliers]
        # The kernel takes the zero points off the whole sum, so that what is between is larger than the sum.
        largest = sum(
            weight * (max(abs(end) for end in low.grid(name)) + abs(layer.zero_point(name)))
            for weight, name in zip(weights, entry.inputs, strict=True)
        )
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


def larger(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower the larger or the smaller of two operands (equation 14)."""
    values, order, fields, over = paired(low, entry)
    parts = [
        scalar(low, entry, one, low.furthest(name)) for one, name in zip(entry.multipliers, entry.inputs, strict=True)
    ]
    fields |= {"a_zero": layer.zero_point(entry.inputs[0]), "b_zero": layer.zero_point(entry.inputs[1])}
    fields |= output_fields(low, entry) | {"sign": 1 if entry.operator == "Max" else -1}
    fields |= {key: [part[key] for part in parts] for key in ("multiplier", "shift")}
    reads = tuple((value.buffer, 0) for value in values)
    made = low.made(entry.outputs[0], order)
    low.emit(Step("larger", entry.name, entry.operator, reads, (made.buffer, 0), ("larger_t", fields), in_place=over))


def sloping(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower PRelu (equation 14): the loops go over its operand and, beside it, over the channels."""
    value = low.operand(entry.inputs[0])
    above, below = entry.multipliers
    count = len(below.multiplier)
    channels = (
        np.arange(value.shape[1]).reshape(-1, *[1] * (len(value.shape) - 2)) if count > 1 else np.zeros(1, np.int64)
    )
    channel = np.broadcast_to(channels, value.shape).reshape(-1)
    found = loops(np.arange(value.order.size), channel[value.order])
    if found is None or channel[value.order[0]]:
        value = low.laid(value, whole(value.shape).reshape(-1))
        found = loops(np.arange(value.order.size), channel)
    if found is None:
        raise EmbeddedError(
            f"'{entry.name}' reads its operand in no order that C source has", "leave it out of the model"
        )
    furthest = low.furthest(entry.inputs[0])
    fields = {"loops": loop_fields(found), "in_zero": layer.zero_point(entry.inputs[0])} | output_fields(low, entry)
    fields |= scalar(low, entry, above, furthest)
    shifts = low.rescaling(below.multiplier, below.shift, entry.rounding, furthest, entry.name)
    slopes = low.array(f"{entry.name}_multiplier", np.array(below.multiplier, dtype=np.int32))
    arguments = (slopes, low.array(f"{entry.name}_shift", np.array(shifts, dtype=np.int8)))
    made = low.made(entry.outputs[0], value.order)
    read, write = ((value.buffer, 0),), (made.buffer, 0)
    low.emit(Step("prelu", entry.name, entry.operator, read, write, ("prelu_t", fields), arguments, in_place=(0,)))


def look_up(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower an element-wise function (equation 15)."""
    value = low.operand(entry.inputs[0])
    table = low.array(f"{entry.name}_table", np.array(entry.table, dtype=low.dtype))
    made = low.made(entry.outputs[0], value.order)
    arguments = (value.order.size, layer.tensors[entry.inputs[0]].qmin, table)
    read, write = ((value.buffer, 0),), (made.buffer, 0)
    low.emit(Step("lookup", entry.name, entry.operator, read, write, None, arguments, in_place=(0,)))


# ---- along axes ----------------------------------------------------------------------------------------------------------------


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
    elif entry.operator in {"Max", "Min"}:
        larger(low, layer, entry)
    elif entry.operator == "PRelu":
        sloping(low, layer, entry)
    elif entry.operator == "Where":
        raise EmbeddedError(f"C source has no kernel for Where '{entry.name}'", "write it as a product and a sum")
    else:
        averaged(low, layer, entry)


def averaged(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a global mean, or a mean or a sum along axes."""
    operand = low.operand(entry.inputs[0])
    axes = mean_axes(layer, len(operand.shape))
    value, fields, order = grouped(low, operand, axes)
    fields |= {"in_zero": layer.zero_point(entry.inputs[0])} | output_fields(low, entry)
    fields |= mean_multiplier(low, entry, fields["length"])
    made = low.made(entry.outputs[0], order)
    read, write = ((value.buffer, 0),), (made.buffer, 0)
    divisor = 1 if entry.operator == "ReduceSum" else fields["length"]
    low.emit(Step("mean", entry.name, entry.operator, read, write, ("reduction_t", fields), (divisor,)))


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
