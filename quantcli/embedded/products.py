"""What sums products is lowered here: convolutions, fully connected layers, products of matrices (equation 13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.embedded.axes import check_window, output_fields, scalar
from quantcli.embedded.program import Array, Step, Value, channels_last
from quantcli.errors import EmbeddedError
from quantcli.integer.kernels import transposed_pads, window_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quantcli.embedded.lowering import Lowering
    from quantcli.integer.layer import Layer
    from quantcli.sidecar import LayerEntry

# Columns that a convolution multiplies with one row of weights (kernels/products.c).
COLUMNS = 4
# The grid of weights that lie two to a byte.
NIBBLE = (-8, 7)


@dataclass(frozen=True, eq=False)
class Weights:
    """A layer's weights as C has them: signed bytes, or two to a byte.

    Attributes:
        array: The constant.
        zero: Their zero point there.
        packed: Whether two share a byte.
        centres: What the halves of each output's bytes lie about; None for zero.
    """

    array: Array
    zero: int
    packed: bool
    centres: Array | None = None


def accumulate(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a layer that sums products."""
    if len(entry.inputs) < 2 or low.tensor(entry.inputs[1]).role != "weight":
        if entry.operator in {"MatMul", "Gemm"} and len(entry.inputs) == 2:
            matrices(low, layer, entry)
            return
        raise EmbeddedError(
            f"C source has no kernel for {entry.operator} '{entry.name}' without stored weights", "store its weights"
        )
    if entry.operator in {"Conv", "ConvTranspose"}:
        convolution(low, layer, entry)
    else:
        fully_connected(low, layer, entry)


def stored_weights(low: Lowering, name: str, rows: NDArray[np.int64], outputs_axis: int = 0) -> Weights:
    """Return weights as rows of signed bytes, or packed where their grid allows.

    Args:
        low: The lowering.
        name: The weight.
        rows: Its integers as rows, each of which begins at a byte.
        outputs_axis: The axis of the rows along which outputs lie.

    Raises:
        EmbeddedError: If its channels have several zero points.
    """
    entry = low.tensor(name)
    if len(set(entry.zero_point)) != 1:
        raise EmbeddedError(f"the channels of the weight '{name}' have several zero points", "use symmetric weights")
    if entry.grids is not None and 1 << entry.grids.bits <= NIBBLE[1] - NIBBLE[0] + 1:
        outputs = rows.shape[outputs_axis]
        centres = np.broadcast_to(np.array(entry.grids.lowest) - NIBBLE[0], (outputs,))
        shape = [-1 if axis == outputs_axis else 1 for axis in range(2)]
        held = low.array(name, two_to_a_byte(rows - centres.reshape(shape)))
        return Weights(held, 0, packed=True, centres=low.array(f"{name}_centres", centres.astype(np.int8)))
    narrow = entry.qmax - entry.qmin <= NIBBLE[1] - NIBBLE[0]
    # Unsigned weights are moved to signed ones, grid and all.
    centre = 0 if entry.dtype == "int8" else 8 if narrow else 128
    if entry.dtype not in {"int8", "uint8"}:
        raise EmbeddedError(f"the weight '{name}' is {entry.dtype}", "C source has weights of at most 8 bits")
    signed = rows - centre
    packed = narrow and NIBBLE[0] <= entry.qmin - centre and entry.qmax - centre <= NIBBLE[1]
    values = two_to_a_byte(signed) if packed else np.ascontiguousarray(signed.astype(np.int8)).reshape(-1)
    return Weights(low.array(name, values), entry.zero_point[0] - centre, packed)


def two_to_a_byte(rows: NDArray[np.int64]) -> NDArray[np.int8]:
    """Return rows of integers of 4 bits as bytes, the lower half first, each row from a byte on."""
    padded = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2))) & 0xF
    halves = (padded[:, 0::2] | (padded[:, 1::2] << 4)).astype(np.uint8)
    return np.ascontiguousarray(halves.view(np.int8)).reshape(-1)


def channel_fields(
    low: Lowering, entry: LayerEntry, matrix: NDArray[np.int64], weights: Weights, outputs: int
) -> dict[str, Any]:
    """Return the bias, the multipliers and the end of a layer as fields, once its accumulators are known to fit.

    Args:
        low: The lowering.
        entry: The layer.
        matrix: Its weights, one row per output, zero point and all.
        weights: The same as C has them.
        outputs: How many output channels there are.
    """
    bias = low.stored(entry.inputs[2]).reshape(-1) if len(entry.inputs) > 2 else np.zeros(outputs, dtype=np.int64)
    zero = low.tensor(entry.inputs[1]).zero_point[0]
    furthest = low.furthest(entry.inputs[0])
    centred = np.abs(matrix - zero).sum(axis=1)
    largest = int((centred * furthest + np.abs(bias)).max(initial=0))
    between = (np.abs(matrix - zero + weights.zero).sum(axis=1) + abs(weights.zero) * matrix.shape[1]) * furthest
    low.wide = low.wide or int((between + np.abs(bias)).max(initial=0)) >= 1 << 31
    one = entry.multipliers[0]
    shift = low.rescaling(one.multiplier, one.shift, entry.rounding, largest, entry.name)
    return {
        "in_zero": low.tensor(entry.inputs[0]).zero_point[0],
        "weight_zero": weights.zero,
        **output_fields(low, entry),
        "packed": int(weights.packed),
        "weights": weights.array,
        "centres": 0 if weights.centres is None else weights.centres,
        "bias": low.array(entry.inputs[2] if len(entry.inputs) > 2 else f"{entry.name}_bias", bias.astype(np.int32)),
        "per_channel": int(len(one.multiplier) > 1),
        "multiplier": low.array(f"{entry.name}_multiplier", np.array(one.multiplier, dtype=np.int32)),
        "shift": low.array(f"{entry.name}_shift", np.array(shift, dtype=np.int8)),
    }


def convolution(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a convolution, or a transposed one, over one or two axes.

    Raises:
        EmbeddedError: If it has three, or more than one sample.
    """
    value, transposed = low.operand(entry.inputs[0]), entry.operator == "ConvTranspose"
    shape = low.integers[entry.outputs[0]].shape
    check_window(value, entry)
    w = low.stored(entry.inputs[1])
    groups = int(layer.attributes.get("group", 1))
    kernel, spatial = w.shape[2:], value.shape[2:]
    if transposed:  # [C, M/groups, …] to [M, C/groups, …]
        parts = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        w = np.moveaxis(parts, 2, 1).reshape(-1, w.shape[0] // groups, *kernel)
        begin, strides, dilations = transposed_window(layer, kernel, spatial)
    else:
        window = window_of(layer.attributes, kernel, spatial)
        begin, strides, dilations = window.begin, window.strides, window.dilations
    channels, outputs = value.shape[1], shape[1]
    depthwise = not transposed and groups == channels == outputs and channels > 1
    strided = None if depthwise and value.order.size > 1 and not channel_is_last(value) else steps_of(value)
    if strided is None:
        value = low.laid(value, channels_last(value.shape), layer=entry.name)
        strided = steps_of(value)
    assert strided is not None  # noqa: S101 - channels last have steps
    rows = np.moveaxis(w, 1, -1).reshape(w.shape[0], -1)  # [out_c][kernel…][in_c / groups]
    weights = stored_weights(low, entry.inputs[1], rows.T if depthwise else rows, 1 if depthwise else 0)
    flat = 4 - len(value.shape)
    fields: dict[str, Any] = {}
    for name, sizes, empty in (
        ("in", spatial, 1), ("stride", strided[1:], 0), ("out", shape[2:], 1), ("kernel", kernel, 1), ("step", strides, 1),
        ("dilation", dilations, 1), ("pad", begin, 0),
    ):  # fmt: skip
        ends = {"stride": ("y", "x"), "pad": ("top", "left")}.get(name, ("h", "w"))
        both = [empty] * flat + list(sizes)
        fields |= {f"{name}_{end}": int(size) for end, size in zip(ends, both, strict=True)}
        if name in {"in", "out"}:
            fields[f"{name}_c"] = channels if name == "in" else outputs
        elif name == "stride":
            fields["stride_c"] = strided[0]
    fields["groups"] = groups
    fields |= channel_fields(low, entry, rows, weights, outputs)
    made = low.made(entry.outputs[0], channels_last(shape))
    length = rows.shape[1]
    reach = int(np.prod(spatial if transposed else shape[2:], dtype=np.int64))
    macs = reach * length * outputs
    name = "conv_transpose" if transposed else "depthwise" if depthwise else "conv"
    scratch = 0 if depthwise else COLUMNS * length
    read, write = ((value.buffer, 0),), (made.buffer, 0)
    low.emit(Step(name, entry.name, entry.operator, read, write, ("convolution_t", fields), scratch=scratch, macs=macs))


def transposed_window(
    layer: Layer, kernel: Sequence[int], spatial: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return what a transposed convolution cuts off before, its strides and its dilations."""
    rank = len(kernel)
    strides = tuple(layer.attributes.get("strides") or (1,) * rank)
    dilations = tuple(layer.attributes.get("dilations") or (1,) * rank)
    extra = tuple(layer.attributes.get("output_padding") or (0,) * rank)
    full = [(spatial[a] - 1) * strides[a] + (kernel[a] - 1) * dilations[a] + 1 + extra[a] for a in range(rank)]
    begin, _ = transposed_pads(layer.attributes, full, spatial, strides, rank)
    return tuple(begin), strides, dilations


def steps_of(value: Value) -> tuple[int, ...] | None:
    """Return how far neighbours along channels and each spatial axis lie apart; None where that is not the same everywhere."""
    places = value.position.reshape(value.shape)[0]
    steps, expected = [], np.zeros((1,) * places.ndim, dtype=np.int64)
    for axis, size in enumerate(places.shape):
        at = [0] * places.ndim
        at[axis] = min(1, size - 1)
        step = int(places[tuple(at)] - places[(0,) * places.ndim])
        shape = [1] * places.ndim
        shape[axis] = size
        expected = expected + (np.arange(size) * step).reshape(shape)
        steps.append(step)
    return tuple(steps) if np.array_equal(expected, places) else None


def channel_is_last(value: Value) -> bool:
    """Tell whether neighbouring channels are neighbours in the buffer."""
    steps = steps_of(value)
    return steps is not None and (steps[0] == 1 or value.shape[1] == 1)


def fully_connected(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a product with a stored matrix, whose columns follow the order in which its input lies."""
    w = low.stored(entry.inputs[1])
    if w.ndim != 2:
        raise EmbeddedError(
            f"C source has no kernel for {entry.operator} '{entry.name}', whose weight has {w.ndim} axes",
            "split the product, one for each matrix",
        )
    matrix = w if entry.operator == "Gemm" and layer.attributes.get("transB", 0) else w.T  # [outputs, inputs]
    value = low.operand(entry.inputs[0])
    inputs = matrix.shape[1]
    order = value.order.reshape(-1, inputs)
    first = order[0]
    straight = np.arange(order.shape[0])[:, None] * inputs
    if not np.array_equal(np.sort(first), np.arange(inputs)) or not np.array_equal(order, first + straight):
        value = low.laid(value, np.arange(value.order.size), layer=entry.name)
        first = np.arange(inputs)
    rows = matrix[:, first]
    weights = stored_weights(low, entry.inputs[1], rows)
    fields = {"rows": order.shape[0], "inputs": inputs, "outputs": matrix.shape[0]}
    fields |= channel_fields(low, entry, rows, weights, matrix.shape[0])
    made = low.made(entry.outputs[0])
    macs = order.shape[0] * inputs * matrix.shape[0]
    read, write = ((value.buffer, 0),), (made.buffer, 0)
    low.emit(Step("fully_connected", entry.name, entry.operator, read, write, ("fully_connected_t", fields), macs=macs))


def matrices(low: Lowering, layer: Layer, entry: LayerEntry) -> None:
    """Lower a product of two matrices of activations, or of as many pairs.

    Raises:
        EmbeddedError: If pairs are made in a way that is neither one to one nor all to one.
    """
    if layer.attributes.get("transB", 0) or layer.attributes.get("transA", 0):
        raise EmbeddedError(f"C source has no kernel for Gemm '{entry.name}', which transposes", "write a Transpose")
    values = [low.operand(name) for name in entry.inputs]
    values = [low.laid(value, np.arange(value.order.size), layer=entry.name) for value in values]
    (a, b), shape = values, low.integers[entry.outputs[0]].shape
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise EmbeddedError(f"C source has no kernel for MatMul '{entry.name}' of a vector", "reshape it to a matrix")
    rows, inputs, outputs = a.shape[-2], a.shape[-1], b.shape[-1]
    count = int(np.prod(shape[:-2], dtype=np.int64))
    steps = {}
    for key, value, size in (("a_step", a, rows * inputs), ("b_step", b, inputs * outputs)):
        held = value.order.size // max(size, 1)
        if held not in (1, count):
            raise EmbeddedError(
                f"C source has no kernel for MatMul '{entry.name}', which repeats operands", "Expand them"
            )
        steps[key] = size if held == count else 0
    largest = inputs * low.furthest(entry.inputs[0]) * low.furthest(entry.inputs[1])
    low.wide = low.wide or largest >= 1 << 31
    fields: dict[str, Any] = {"count": count, "rows": rows, "inputs": inputs, "outputs": outputs, **steps}
    fields |= {"a_zero": low.tensor(entry.inputs[0]).zero_point[0], "b_zero": low.tensor(entry.inputs[1]).zero_point[0]}
    fields |= output_fields(low, entry) | scalar(low, entry, entry.multipliers[0], largest)
    made = low.made(entry.outputs[0])
    reads, write = ((a.buffer, 0), (b.buffer, 0)), (made.buffer, 0)
    macs = count * rows * inputs * outputs
    low.emit(Step("matrix_product", entry.name, entry.operator, reads, write, ("matrix_product_t", fields), macs=macs))
