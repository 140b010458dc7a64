"""Factors and addends per channel: gathered into one of each, and folded into the convolution or dense layer before them.

Networks of some exporters write a normalisation as BatchNormalization, Mul and Add. (x·a + b)·c + d = x·(a·c) + (b·c + d), and
behind a convolution of weights W and bias v it is a convolution of weights W·a·c and bias (v·a + b)·c + d. So it is behind a dense
layer, whose channels are the last axis: there transformers scale what they add (LayerScale), often once axes were put together,
apart or in another order.

What stands behind an activation goes forward instead, into the layers that read it, where it is a single number:
W·(x·a + b) = (W·a)·(x + b/a), and a convolution without padding takes W·b into its bias. A factor per channel stays: it would make
rows of weights differ that share a scale.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant, constant
from quantcli.load.learned import LEARNED

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The axis of a weight's output channels.
CHANNELS = {"Conv": 0, "ConvTranspose": 1}
DENSE = frozenset({"Gemm", "MatMul"})
# Operators that give the values they read to other axes, each one once.
MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# Layers whose result is a multiple of their first operand, but for the bias.
LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def fold_factors(model: ir.Model) -> None:
    """Fold what multiplies and adds constants per channel, as far as the tensors between have no other reader."""
    for node in list(model.graph):
        if node.graph is model.graph and node.domain == "" and node.op_type in {"Mul", "Add"}:
            before_moves(node, model.graph)
            fold(node, model.graph)
    if any(LEARNED in node.meta for node in model.graph):
        return  # what it learned its grids for stays
    for node in list(model.graph):
        if node.graph is model.graph and node.domain == "" and node.op_type in {"Mul", "Add"}:
            forward(node, model.graph)


def forward(node: ir.Node, graph: ir.Graph) -> None:
    """Fold one Mul or Add of a single number into the layers that read what it makes, if nobody else does."""
    x, held = operands(node)
    if x is None or held is None or not is_number(held, x):
        return
    number, made = float(held.reshape(())), node.outputs[0]
    if node.op_type == "Add":
        layers = layers_behind(made)
        if not all(takes_addend(layer) for layer in layers):
            return
        for layer in layers:
            add_to_bias(layer, number, graph)
    else:
        layers = layers_behind(made) or past_addend(made, number, graph)
        for layer in layers:
            weight = layer.inputs[1]
            scaled = (np.asarray(constant(weight), dtype=np.float64) * number).astype(np.float32)
            layer.replace_input_with(1, add_constant(graph, f"{weight.name}_scaled", scaled))  # type: ignore[union-attr]
    if layers:
        ir.convenience.replace_all_uses_with(made, x)
        graph.remove(node, safe=True)


def is_number(held: NDArray[np.float32], x: ir.Value) -> bool:
    """Tell whether a constant is one number, finite and not zero, that leaves a tensor's shape what it is."""
    shaped = x.shape is not None and held.ndim <= len(x.shape)
    return shaped and held.size == 1 and bool(np.isfinite(held).all() and held.all())


def past_addend(scaled: ir.Value, number: float, graph: ir.Graph) -> list[ir.Node]:
    """Divide what is added to a multiple of a tensor by the factor, and return the layers that then take the factor; else none.

    Args:
        scaled: The multiple.
        number: The factor.
        graph: The graph.
    """
    addition = scaled.consumers()[0] if len(scaled.uses()) == 1 and not scaled.is_graph_output() else None
    if addition is None or addition.op_type != "Add" or addition.domain:
        return []
    x, addend = operands(addition)
    layers = layers_behind(addition.outputs[0])
    if x is not scaled or addend is None or not is_number(addend, x) or not layers:
        return []
    with np.errstate(over="ignore"):
        shift = (addend / number).astype(np.float32)
    if not np.isfinite(shift).all():
        return []
    total = addition.outputs[0]
    total.name = f"{total.name}_unscaled"  # it is another tensor now
    place = list(addition.inputs).index(scaled) ^ 1
    addition.replace_input_with(place, add_constant(graph, f"{total.name}_addend", shift))
    return layers


def layers_behind(value: ir.Value) -> list[ir.Node]:
    """Return the linear layers of constant weights that read a tensor; none where anything else does."""
    layers = list(value.consumers())
    for layer in layers:
        weight = constant(layer.inputs[1]) if layer.op_type in LINEAR and not layer.domain else None
        if weight is None or weight.dtype != np.float32 or layer.inputs[0] is not value or value in layer.inputs[1:]:
            return []
    return [] if value.is_graph_output() else layers


def takes_addend(layer: ir.Node) -> bool:
    """Tell whether a number that is added to all of a layer's input is one that is added to each channel of what it makes."""
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    unpadded = not any(layer.attributes.get_ints("pads", ())) and layer.attributes.get_string("auto_pad", "NOTSET") in {
        "NOTSET",
        "VALID",
    }
    return layer.op_type == "Conv" and unpadded and (bias is None or constant(bias) is not None)


def add_to_bias(layer: ir.Node, number: float, graph: ir.Graph) -> None:
    """Put what a number added to a convolution's input adds to its output into the bias."""
    weight = np.asarray(constant(layer.inputs[1]), dtype=np.float64)
    bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    total = weight.sum(axis=tuple(range(1, weight.ndim))) * number + (0.0 if bias is None else bias)
    layer.resize_inputs(3)
    layer.replace_input_with(2, add_constant(graph, f"{layer.outputs[0].name}_bias", total.astype(np.float32)))


def before_moves(node: ir.Node, graph: ir.Graph) -> None:
    """Put one Mul or Add of constants per channel before what moves a layer's values, where it may be folded into the layer."""
    x, held = operands(node)
    if x is None or held is None or x.shape is None or held.ndim > len(x.shape):
        return
    long = [axis for axis, size in enumerate(held.shape, len(x.shape) - held.ndim) if size != 1]
    if len(long) > 1 or held.size != (x.shape[long[0]] if long else 1):
        return
    axis, value, mover = long[0] if long else None, x, None
    while (maker := value.producer()) is not None and maker.op_type in MOVES and not maker.domain and alone(value):
        if axis is not None and (axis := axis_before(maker, axis)) is None:
            return
        value, mover = maker.inputs[0], maker  # type: ignore[assignment]
    channels = channel_axis(value) if alone(value) else None
    if mover is None or channels is None or axis not in {None, channels}:
        return
    output, place = node.outputs[0], list(node.inputs).index(x)
    ir.convenience.replace_all_uses_with(output, x, replace_graph_outputs=True)
    x.name, output.name, output.shape = output.name, f"{value.name}_{node.op_type.lower()}", value.shape
    node.replace_input_with(place, value)
    across = held.reshape([-1 if at == channels else 1 for at in range(len(value.shape or ()))])
    node.replace_input_with(place ^ 1, add_constant(graph, f"{output.name}_channels", across))
    mover.replace_input_with(0, output)
    graph.remove(node)
    graph.insert_before(mover, node)


def alone(value: ir.Value) -> bool:
    """Tell whether a tensor has one reader and is not given out."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def axis_before(mover: ir.Node, axis: int) -> int | None:
    """Return the axis of a mover's input whose values lie along an axis of its output; None where there is none."""
    if mover.op_type == "Transpose":
        order = mover.attributes.get_ints("perm", ())
        return order[axis] if order else None
    source, made = mover.inputs[0], mover.outputs[0]
    if source is None or source.shape is None or made.shape is None:
        return None
    inner = made.shape[axis:]
    for place in range(len(source.shape)):
        sizes = source.shape[place:]
        known = all(isinstance(size, int) for size in (*sizes, *inner))
        if known and sizes[0] == inner[0] and math.prod(sizes) == math.prod(inner):
            return place
    return None


def channel_axis(value: ir.Value) -> int | None:
    """Return the axis along which a tensor has a layer's channels, constants added to it or not; None where no layer makes it."""
    maker = value.producer()
    if maker is None or maker.domain or value.shape is None or LEARNED in maker.meta:
        return None
    if maker.op_type in {"Mul", "Add"}:
        x, _ = operands(maker)
        return channel_axis(x) if x is not None and alone(x) else None
    if maker.op_type not in LINEAR or constant(maker.inputs[1]) is None:
        return None
    return CHANNELS.get(maker.op_type, len(value.shape) - 1)


def fold(node: ir.Node, graph: ir.Graph) -> None:
    """Fold one Mul or Add of a constant into what is before it."""
    x, held = operands(node)
    before = x.producer() if x is not None else None
    if x is None or held is None or before is None or before.domain or len(x.uses()) != 1 or x.is_graph_output():
        return
    if not np.isfinite(held).all():
        return
    rank = len(x.shape) if x.shape is not None else None
    channels = per_channel(held, rank, x.shape[1] if x.shape is not None and rank and rank > 1 else None)
    if before.op_type in CHANNELS and channels is not None:
        into_convolution(node, before, channels, graph)
    elif before.op_type in DENSE and LEARNED not in before.meta:
        into_dense(node, before, held, graph)
    elif before.op_type in {"Mul", "Add"}:
        together(node, before, held, graph)


def operands(node: ir.Node) -> tuple[ir.Value | None, NDArray[np.float32] | None]:
    """Return the computed operand and the constant one; None for what it does not have."""
    for x, other in (tuple(node.inputs[:2]), tuple(node.inputs[:2])[::-1]):
        held = constant(other)
        if held is not None and held.dtype == np.float32 and constant(x) is None:
            return x, held
    return None, None


def per_channel(held: NDArray[np.float32], rank: int | None, channels: object) -> NDArray[np.float64] | None:
    """Return a constant as one value per channel (axis 1) or a single one; None where it is neither."""
    if held.size == 1 and (rank is None or held.ndim <= rank):
        return held.reshape(1).astype(np.float64)
    if rank is None or held.ndim > rank:
        return None
    shape = (1,) * (rank - held.ndim) + held.shape
    only = all(size == 1 for axis, size in enumerate(shape) if axis != 1)
    return held.reshape(-1).astype(np.float64) if only and shape[1] == channels else None


def into_convolution(node: ir.Node, layer: ir.Node, values: NDArray[np.float64], graph: ir.Graph) -> None:
    """Fold values per output channel into a convolution's weight and bias."""
    weight, bias = constant(layer.inputs[1]), constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    grouped = layer.op_type == "ConvTranspose" and layer.attributes.get_int("group", 1) != 1
    if (
        weight is None
        or weight.dtype != np.float32
        or grouped
        or (len(layer.inputs) > 2 and layer.inputs[2] is not None and bias is None)
    ):
        return
    axis = CHANNELS[layer.op_type]
    held = np.zeros(weight.shape[axis]) if bias is None else bias.reshape(-1).astype(np.float64)
    output = node.outputs[0]
    if node.op_type == "Mul":
        shape = [1] * weight.ndim
        shape[axis] = -1
        scaled = weight.astype(np.float64) * values.reshape(shape)
        layer.replace_input_with(1, add_constant(graph, f"{layer.inputs[1].name}_scaled", scaled.astype(np.float32)))  # type: ignore[union-attr]
        held = held * values
    else:
        held = held + values
    if node.op_type == "Add" or bias is not None:
        value = add_constant(graph, f"{output.name}_bias", held.astype(np.float32))
        if len(layer.inputs) > 2:
            layer.replace_input_with(2, value)
        else:
            layer.resize_inputs(3)
            layer.replace_input_with(2, value)
    take_over(node, layer.outputs[0], graph)


def into_dense(node: ir.Node, layer: ir.Node, held: NDArray[np.float32], graph: ir.Graph) -> None:
    """Fold constants per column into a dense layer's weight and bias.

    An addend behind a MatMul of three and more axes stays, which `quantcli.dense` takes into the layer.
    """
    x, weight = layer.outputs[0], constant(layer.inputs[1])
    bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32 or len(layer.inputs[1].uses()) > 1:  # type: ignore[union-attr]
        return
    transposed = layer.attributes.get_int("transB", 0)
    columns = weight.shape[0 if transposed else 1]
    across = held.reshape(-1)
    if x.shape is None or held.ndim > len(x.shape) or across.size not in {1, columns}:
        return
    if across.size > 1 and held.shape[-1] == 1:  # along another axis
        return
    if any(layer.attributes.get_float(factor, 1.0) != 1.0 for factor in ("alpha", "beta")):
        return
    if len(layer.inputs) > 2 and layer.inputs[2] is not None and (bias is None or bias.shape != (columns,)):
        return
    values = np.broadcast_to(across, (columns,)).astype(np.float64)
    total = np.zeros(columns) if bias is None else bias.astype(np.float64)
    if node.op_type == "Mul":
        scaled = weight.astype(np.float64) * values.reshape((-1, 1) if transposed else (1, -1))
        layer.replace_input_with(1, add_constant(graph, f"{layer.inputs[1].name}_scaled", scaled.astype(np.float32)))  # type: ignore[union-attr]
        total = total * values
    elif len(x.shape) == 2:
        layer.op_type = "Gemm"
        total = total + values
    else:
        return
    if node.op_type == "Add" or bias is not None:
        layer.resize_inputs(3)
        layer.replace_input_with(2, add_constant(graph, f"{node.outputs[0].name}_bias", total.astype(np.float32)))
    take_over(node, x, graph)


def together(node: ir.Node, before: ir.Node, held: NDArray[np.float32], graph: ir.Graph) -> None:
    """Put two constants together: of two factors or addends one, and an addend behind the factor that follows it."""
    x, earlier = operands(before)
    if x is None or earlier is None:
        return
    try:
        shape = np.broadcast_shapes(earlier.shape, held.shape)
    except ValueError:
        return
    if len(shape) > (len(x.shape) if x.shape is not None else -1):
        return
    if node.op_type == before.op_type:
        joined = earlier.astype(np.float64) * held if node.op_type == "Mul" else earlier.astype(np.float64) + held
        value = add_constant(graph, f"{node.outputs[0].name}_joined", joined.astype(np.float32))
        before.replace_input_with(list(before.inputs).index(x) ^ 1, value)
        take_over(node, before.outputs[0], graph)
    elif node.op_type == "Mul":
        addend = earlier.astype(np.float64) * held
        before.replace_input_with(list(before.inputs).index(x), node.outputs[0])  # the factor comes first now
        behind, output = before.outputs[0], node.outputs[0]
        before.replace_input_with(
            list(before.inputs).index(output) ^ 1,
            add_constant(graph, f"{output.name}_addend", addend.astype(np.float32)),
        )
        node.replace_input_with(list(node.inputs).index(behind), x)
        graph.remove(before)
        graph.insert_after(node, before)
        swap_names(output, behind)
        others = [(user, position) for user, position in output.uses() if user is not before]
        for user, position in others:
            user.replace_input_with(position, behind)
        if output.is_graph_output():
            ir.convenience.replace_all_uses_with(output, behind, replace_graph_outputs=True)
            before.replace_input_with(next(i for i, v in enumerate(before.inputs) if v is behind), output)
        fold(node, graph)


def swap_names(first: ir.Value, second: ir.Value) -> None:
    """Let two values take each other's names."""
    one, other = first.name, second.name
    first.name, second.name = f"{one}_swapped", one
    first.name = other


def take_over(node: ir.Node, value: ir.Value, graph: ir.Graph) -> None:
    """Remove a node whose work the maker of a value does now, and give the value its output's name."""
    output = node.outputs[0]
    name, shape, kind = output.name, output.shape, output.type
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name, value.shape, value.type = name, shape, kind
