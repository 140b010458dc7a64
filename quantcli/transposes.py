"""Transpositions that converters of channels-last networks leave: moved behind what knows no order of axes, until they meet.

Between Transpose(0, 2, 3, 1) and Transpose(0, 3, 1, 2) such networks compute with channels last. f(Transpose(x)) = Transpose(f(x))
for whatever f works on single values, once constants and axes are those of x; and what then meets its inverse is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from quantcli.fold import add_constant, constant

if TYPE_CHECKING:
    from collections.abc import Callable

CHANNELS_LAST = ((0, 2, 3, 1), (0, 2, 3, 4, 1))
# Operators on single values, whose other operands are numbers or absent.
POINTWISE = frozenset(
    {"Abs", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Neg"}
    | {"Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu"}
)
REDUCING = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


def without_transposes(model: ir.Model) -> ir.Model | None:
    """Return a copy of a model with fewer transpositions; None where moving them saves none."""
    if not any(permutation(node) in CHANNELS_LAST for node in model.graph):
        return None
    moved = model.clone()
    for node in list(moved.graph):
        if node.op_type == "Transpose" and node.domain == "":
            cancel(node)
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
