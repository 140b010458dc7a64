"""Transpositions that converters of channels-last networks leave: moved behind what knows no order of axes, until they meet.

Between Transpose(0, 2, 3, 1) and Transpose(0, 3, 1, 2) such networks compute with channels last. f(Transpose(x)) = Transpose(f(x))
for whatever f works on single values, once constants and axes are those of x; and what then meets its inverse is gone. An axis of
length 1 may come or go between two that meet, as where a convolution over one axis is written as one over two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from quantcli.canonical import axes_of, rank_of
from quantcli.fold import add_constant, constant

if TYPE_CHECKING:
    from collections.abc import Callable

CHANNELS_LAST = ((0, 2, 1), (0, 2, 3, 1), (0, 2, 3, 4, 1))
# Operators on single values, whose other operands are numbers or absent.
POINTWISE = frozenset(
    {"Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg"}
    | {"Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu"}
)
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
REDUCING = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


def without_transposes(model: ir.Model) -> ir.Model | None:
    """Return a copy of a model with fewer transpositions; None where moving them saves none."""
    if not any(permutation(node) in CHANNELS_LAST for node in model.graph):
        return None
    moved = model.clone()
    for node in list(moved.graph):
        if node.op_type == "Transpose" and node.domain == "":
            cancel(node)
            resize(node, moved.graph)
        else:
            move(node, moved.graph)
    passes.RemoveUnusedNodesPass()(moved)
    return moved if count(moved) < count(model) else None


def count(model: ir.Model) -> int:
    """Return how many transpositions a model's main graph holds."""
    return sum(node.op_type == "Transpose" for node in model.graph)


def permutation(node: ir.Node | None) -> tuple[int, ...] | None:
    """Return how a Transpose orders the axes; None of any other operator."""
    if node is None or node.op_type != "Transpose" or node.domain != "":
        return None
    return tuple(node.attributes.get_ints("perm", ())) or None


def cancel(node: ir.Node) -> None:
    """Let the readers of a Transpose that undoes the one before it read what that one reads."""
    source = node.inputs[0]
    before = source.producer() if source is not None else None
    first, second = permutation(before), permutation(node)
    if before is None or first is None or second is None or node.outputs[0].is_graph_output():
        return
    if [first[axis] for axis in second] == list(range(len(first))):
        ir.convenience.replace_all_uses_with(node.outputs[0], before.inputs[0])  # type: ignore[arg-type]


def resize(node: ir.Node, graph: ir.Graph) -> None:
    """Put one Squeeze or Unsqueeze in the place of it between two transpositions, where they leave the other axes in order."""
    between = node.inputs[0].producer() if node.inputs[0] is not None else None
    if between is None or between.op_type not in {"Squeeze", "Unsqueeze"} or between.domain:
        return
    before = between.inputs[0].producer() if between.inputs[0] is not None else None
    first, second, given = permutation(before), permutation(node), axes_of(between)
    if before is None or first is None or second is None or not given:
        return
    axes = {axis % max(len(first), len(second)) for axis in given}
    if between.op_type == "Squeeze":
        kept = [label for place, label in enumerate(first) if place not in axes]
        order = [kept[axis] for axis in second]
        changed = sorted(first[axis] for axis in axes)
    else:
        left = iter(first)
        labels = [None if place in axes else next(left) for place in range(len(second))]
        order = [label for axis in second if (label := labels[axis]) is not None]
        changed = [place for place, axis in enumerate(second) if axis in axes]
    if order != sorted(order):
        return
    stored = add_constant(graph, f"{node.outputs[0].name}_axes", np.array(changed, dtype=np.int64))
    made = ir.node(between.op_type, [before.inputs[0], stored], name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made], [node.outputs[0]], made.outputs)


def squeeze_later(model: ir.Model) -> None:
    """Move every Squeeze of a convolution's spatial axes behind what works on single values, which the convolution then takes in.

    Converters write a convolution over one axis as one over two, with what is added to it and its activation behind a Squeeze.
    """
    for node in list(model.graph):
        if node.op_type != "Squeeze" or node.domain or node.inputs[0] is None:
            continue
        layer, rank = node.inputs[0].producer(), rank_of(node.inputs[0])
        axes = sorted(axis % rank for axis in axes_of(node)) if rank else []
        if layer is None or layer.domain or layer.op_type not in CONVOLUTIONS or not axes or axes[0] < 2:
            continue
        last: ir.Node | None = node if single_reader(node.inputs[0]) is node else None
        while last is not None and (reader := single_reader(last.outputs[0])) is not None:
            last = swapped(last, reader, axes, model.graph)


def single_reader(value: ir.Value | None) -> ir.Node | None:
    """Return the only node that reads a value, once; None where there are others, or the model gives it out."""
    uses = () if value is None or value.is_graph_output() else value.uses()
    return next(iter(uses)).node if len(uses) == 1 else None


def swapped(node: ir.Node, reader: ir.Node, axes: list[int], graph: ir.Graph) -> ir.Node | None:
    """Let what reads a Squeeze read what that reads, and return a Squeeze of what it makes; None where that cannot be said.

    Args:
        node: The Squeeze.
        reader: The only node that reads what it makes.
        axes: The axes that it takes away, in order.
        graph: The graph.
    """
    x, squeezed, output = node.inputs[0], node.outputs[0], reader.outputs[0]
    rank = rank_of(squeezed)
    form = FORMS.get(reader.op_type) is broadcasting
    if reader.domain or rank is None or not (form or reader.op_type in POINTWISE):
        return None
    inputs: list[ir.Value | None] = []
    for value in reader.inputs:
        held = constant(value)
        if value is squeezed or value is None or (held is not None and (held.size == 1 and held.ndim <= rank)):
            inputs.append(x if value is squeezed else value)
        elif held is not None and held.ndim <= rank and form:
            whole = np.expand_dims(held.reshape((1,) * (rank - held.ndim) + held.shape), axes)
            inputs.append(add_constant(graph, f"{value.name}_unsqueezed", whole))
        else:
            return None
    made = ir.node(reader.op_type, inputs, dict(reader.attributes), name=reader.name)
    made.outputs[0].name, made.outputs[0].type = f"{output.name}_unsqueezed", output.type
    if output.shape is None:  # as of operators that were put in the place of others
        output.shape = squeezed.shape
    shape = list(output.shape or ())
    for axis in axes:
        shape.insert(axis, 1)
    made.outputs[0].shape = ir.Shape(shape)
    later = ir.node("Squeeze", [made.outputs[0], *node.inputs[1:]], dict(node.attributes), name=node.name)
    ir.convenience.replace_nodes_and_values(graph, reader, [node, reader], [made, later], [output], later.outputs)
    return later


def move(node: ir.Node, graph: ir.Graph) -> None:
    """Let an operator read what the transpositions before it read, and transpose what it makes."""
    data = [value for value in node.inputs if value is not None and constant(value) is None]
    orders = {permutation(value.producer()) for value in data}
    order = orders.pop() if len(orders) == 1 else None
    if node.domain != "" or order not in CHANNELS_LAST or order is None or len(node.outputs) != 1:
        return
    made = turned(node, order, graph)
    if made is None:
        return
    output = node.outputs[0]
    made.name, made.outputs[0].type = node.name, output.type
    if reduces_away(node):
        ir.convenience.replace_nodes_and_values(graph, node, [node], [made], [output], made.outputs)
        return
    made.outputs[0].name = f"{output.name}_channels_first"
    if output.shape is not None:
        made.outputs[0].shape = ir.Shape([output.shape[axis] for axis in np.argsort(order).tolist()])
    back = ir.node("Transpose", made.outputs, {"perm": order}, name=f"{node.name or output.name}_channels_last")
    ir.convenience.replace_nodes_and_values(graph, node, [node], [made, back], [output], back.outputs)


def reduces_away(node: ir.Node) -> bool:
    """Tell whether an operator's output lacks the axes over which it reduces."""
    return node.op_type in REDUCING and not node.attributes.get_int("keepdims", 1)


def turned(node: ir.Node, order: tuple[int, ...], graph: ir.Graph) -> ir.Node | None:
    """Return an operator as it reads its data before a transposition; None where that cannot be said."""
    if node.op_type in POINTWISE:
        return pointwise(node)
    if node.op_type == "Concat":
        return concat(node, order)
    form = FORMS.get(node.op_type)
    return form(node, order, graph) if form is not None else None


def source_of(value: ir.Value | None) -> ir.Value | None:
    """Return what a Transpose that makes a value reads; the value itself where none does."""
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and permutation(producer) is not None else value


def pointwise(node: ir.Node) -> ir.Node | None:
    """Of single values nothing changes but where they are read."""
    first, *rest = node.inputs
    if any(value is not None and constant(value) is None for value in rest):
        return None
    return ir.node(node.op_type, [source_of(first), *rest], dict(node.attributes))


def broadcasting(node: ir.Node, order: tuple[int, ...], graph: ir.Graph) -> ir.Node | None:
    """Constants are transposed back, once they have as many axes as the data."""
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        held = constant(value)
        if value is None or (held is not None and held.ndim > len(order)):
            return None
        if held is None or held.size == 1:
            inputs.append(source_of(value))
            continue
        whole = held.reshape((1,) * (len(order) - held.ndim) + held.shape).transpose(np.argsort(order))
        inputs.append(add_constant(graph, f"{value.name}_channels_first", whole))
    return ir.node(node.op_type, inputs, dict(node.attributes))


def concat(node: ir.Node, order: tuple[int, ...]) -> ir.Node | None:
    """Of what is joined the axis is another one."""
    if any(constant(value) is not None for value in node.inputs):
        return None
    axis = order[node.attributes.get_int("axis", 0)]
    return ir.node("Concat", list(map(source_of, node.inputs)), {"axis": axis})


def pad(node: ir.Node, order: tuple[int, ...], graph: ir.Graph) -> ir.Node | None:
    """The widths are those of other axes, at the front and at the end; where axes are named, it is left alone."""
    first, given, *rest = node.inputs
    held = constant(given)
    if given is None or held is None or len(rest) > 1 or any(v is not None and constant(v) is None for v in rest):
        return None
    widths = held.reshape(2, -1)[:, np.argsort(order)].reshape(-1)
    stored = add_constant(graph, f"{given.name}_channels_first", widths)
    return ir.node("Pad", [source_of(first), stored, *rest], dict(node.attributes))


def reducing(node: ir.Node, order: tuple[int, ...], graph: ir.Graph) -> ir.Node | None:
    """The axes are other ones; where they disappear, the order of those that are left has to be the same."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    held = constant(given)
    axes = node.attributes.get_ints("axes", ()) if given is None else () if held is None else held.reshape(-1).tolist()
    if not axes:
        return None
    own = [axis % len(order) for axis in axes]
    left = [order[axis] for axis in range(len(order)) if axis not in own]
    if reduces_away(node) and left != sorted(left):
        return None
    there = sorted(order[axis] for axis in own)
    attributes = {name: value for name, value in node.attributes.items() if name != "axes"}
    if given is None:
        return ir.node(node.op_type, [source_of(node.inputs[0])], {**attributes, "axes": there})
    stored = add_constant(graph, f"{given.name}_channels_first", np.array(there, dtype=np.int64))
    return ir.node(node.op_type, [source_of(node.inputs[0]), stored], attributes)


FORMS: dict[str, Callable[[ir.Node, tuple[int, ...], ir.Graph], ir.Node | None]] = {
    **dict.fromkeys(("Add", "Div", "Max", "Min", "Mul", "PRelu", "Sub", "Sum"), broadcasting),
    **dict.fromkeys(REDUCING, reducing),
    "Pad": pad,
}
