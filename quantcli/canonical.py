"""Operators written in the form that integer kernels know, where the values stay what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant, constant

if TYPE_CHECKING:
    from collections.abc import Callable


def canonical(model: ir.Model) -> None:
    """Rewrite the operators of a model's main graph that have a better known form."""
    for node in list(model.graph):
        if node.domain == "" and node.op_type in FORMS and node.outputs:
            FORMS[node.op_type](node, model.graph)


def put(graph: ir.Graph, old: ir.Node, *nodes: ir.Node) -> None:
    """Put nodes in the place of one; the last one's output takes the name of what it replaces."""
    for number, node in enumerate(nodes[:-1]):
        node.name = f"{old.name or old.outputs[0].name}_{number}"
        node.outputs[0].name = f"{old.outputs[0].name}_{number}"
        node.outputs[0].type = old.outputs[0].type
    nodes[-1].name = old.name
    ir.convenience.replace_nodes_and_values(graph, old, [old], list(nodes), [old.outputs[0]], [nodes[-1].outputs[0]])


def real_scalar(value: ir.Value | None) -> float | None:
    """Return a float32 constant of a single element that keeps the shape of what it is combined with; else None."""
    held = constant(value)
    return float(held.reshape(())) if held is not None and held.dtype == np.float32 and held.size == 1 else None


def rank_of(value: ir.Value | None) -> int | None:
    """Return a value's rank, where it is known."""
    return None if value is None or value.shape is None else len(value.shape)


def axes_of(node: ir.Node) -> tuple[int, ...]:
    """Return the axes that a reduction is given, as an attribute or a constant; none where they are computed, or it has all."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    held = constant(given)
    if given is None:
        return tuple(node.attributes.get_ints("axes", ()))
    return () if held is None else tuple(held.reshape(-1).tolist())


def subtraction(node: ir.Node, graph: ir.Graph) -> None:
    """X − c = x + (−c), to the bit."""
    held = constant(node.inputs[1])
    if held is not None and held.dtype == np.float32 and constant(node.inputs[0]) is None:
        negated = add_constant(graph, f"{node.inputs[1].name}_negated", -held)  # type: ignore[union-attr]
        put(graph, node, ir.node("Add", [node.inputs[0], negated]))


def extreme(node: ir.Node, graph: ir.Graph) -> None:
    """Max or Min of a tensor and one constant is a Clip; of more than two operands, a chain."""
    if len(node.inputs) != 2:
        chained(node, graph, node.op_type)
        return
    for x, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        rank, held = rank_of(x), constant(other)
        if real_scalar(other) is None or constant(x) is not None or rank is None or held is None or held.ndim > rank:
            continue
        bound = add_constant(graph, f"{other.name}_bound", held.reshape(()))  # type: ignore[union-attr]
        put(graph, node, ir.node("Clip", [x, bound] if node.op_type == "Max" else [x, None, bound]))
        return


def division(node: ir.Node, graph: ir.Graph) -> None:
    """X / c = x · (1/c), but for the rounding of 1/c where c is no power of two: integers have products with constants."""
    x, divisor = node.inputs[:2]
    held = constant(divisor)
    if held is None or held.dtype != np.float32 or constant(x) is not None or not held.all():
        return
    with np.errstate(over="ignore"):
        inverse = (1.0 / held.astype(np.float64)).astype(np.float32)
    if np.isfinite(inverse).all():
        put(graph, node, ir.node("Mul", [x, add_constant(graph, f"{divisor.name}_inverse", inverse)]))  # type: ignore[union-attr]


def negation(node: ir.Node, graph: ir.Graph) -> None:
    """−x = x · (−1), to the bit."""
    x = node.inputs[0]
    if x is not None and x.dtype == ir.DataType.FLOAT and constant(x) is None:
        minus = add_constant(graph, f"{node.outputs[0].name}_sign", np.array(-1, dtype=np.float32))
        put(graph, node, ir.node("Mul", [x, minus]))


def parametric_relu(node: ir.Node, graph: ir.Graph) -> None:
    """PRelu with a single slope is LeakyRelu."""
    slope = real_scalar(node.inputs[1])
    if slope is not None:
        put(graph, node, ir.node("LeakyRelu", [node.inputs[0]], {"alpha": slope}))


def mean(node: ir.Node, graph: ir.Graph) -> None:
    """ReduceMean over all axes behind the channels' is a global average pool, one after the other as well."""
    x, axes = averaged(node)
    rank, keeps = rank_of(x), node.attributes.get_int("keepdims", 1)
    if rank is None or rank < 3 or sorted(axis % rank for axis in axes) != list(range(2, rank)):
        return
    pool = ir.node("GlobalAveragePool", [x])
    if keeps:
        put(graph, node, pool)
        return
    spatial = add_constant(graph, f"{node.outputs[0].name}_axes", np.arange(2, rank, dtype=np.int64))
    put(graph, node, pool, ir.node("Squeeze", [pool.outputs[0], spatial]))


def averaged(node: ir.Node) -> tuple[ir.Value | None, tuple[int, ...]]:
    """Return what a ReduceMean averages and over which axes of it, with one right before it that nobody else reads."""
    x, axes, keeps = node.inputs[0], axes_of(node), node.attributes.get_int("keepdims", 1)
    inner = None if x is None else x.producer()
    if x is None or inner is None or inner.op_type != "ReduceMean" or len(x.uses()) != 1 or x.is_graph_output():
        return x, axes
    rank, first = rank_of(inner.inputs[0]), axes_of(inner)
    if rank is None or not first or inner.attributes.get_int("keepdims", 1) != keeps:
        return x, axes
    left = [axis for axis in range(rank) if keeps or axis not in {one % rank for one in first}]
    return inner.inputs[0], (*first, *(left[axis % len(left)] for axis in axes))


def total(node: ir.Node, graph: ir.Graph) -> None:
    """Sum is a chain of additions."""
    chained(node, graph, "Add")


def chained(node: ir.Node, graph: ir.Graph, operator: str) -> None:
    """Write an operator of any number of operands as one of two, operand after operand."""
    if len(node.inputs) < 2:
        return
    nodes = [ir.node(operator, node.inputs[:2])]
    for value in node.inputs[2:]:
        nodes.append(ir.node(operator, [nodes[-1].outputs[0], value]))
    put(graph, node, *nodes)


def einsum(node: ir.Node, graph: ir.Graph) -> None:
    """Einsum over one shared letter is a matrix product between transpositions.

    The second operand may have one letter of its own, the first any number: all but the last of them go in front of those that both
    keep (a batch), as positions of images do whose distances are told apart by axis.
    """
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    if len(node.inputs) != 2 or equation.count("->") != 1 or "." in equation or equation.count(",") != 1:
        return
    left, result = equation.split("->")
    a, b = left.split(",")
    if any(len(set(term)) != len(term) for term in (a, b, result)) or not set(result) <= set(a) | set(b):
        return
    batch = [letter for letter in a if letter in b and letter in result]
    summed = [letter for letter in a if letter in b and letter not in result]
    rows, columns = ([letter for letter in term if letter not in other] for term, other in ((a, b), (b, a)))
    kept = set(rows) | set(columns) <= set(result)
    if not kept or len(summed) != 1 or len(columns) != 1 or not rows:
        return
    nodes: list[ir.Node] = []

    def arranged(value: ir.Value | None, term: str, order: list[str]) -> ir.Value | None:
        if list(term) == order:
            return value
        axes, held = [term.index(letter) for letter in order], constant(value)
        if held is not None:
            return add_constant(graph, f"{node.outputs[0].name}_arranged", held.transpose(axes))
        nodes.append(ir.node("Transpose", [value], {"perm": axes}))
        return nodes[-1].outputs[0]

    first = arranged(node.inputs[0], a, rows[:-1] + batch + rows[-1:] + summed)
    second = arranged(node.inputs[1], b, batch + summed + columns)
    nodes.append(ir.node("MatMul", [first, second]))
    made = rows[:-1] + batch + rows[-1:] + columns
    if made != list(result):
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [made.index(letter) for letter in result]}))
    put(graph, node, *nodes)


FORMS: dict[str, Callable[[ir.Node, ir.Graph], None]] = {
    "Sub": subtraction,
    "Div": division,
    "Neg": negation,
    "Max": extreme,
    "Min": extreme,
    "PRelu": parametric_relu,
    "ReduceMean": mean,
    "Sum": total,
    "Einsum": einsum,
}
