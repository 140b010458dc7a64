"""Operators written in the form that integer kernels know, where the values stay what they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant, constant

if TYPE_CHECKING:
    from collections.abc import Callable

# The operator set that HardSwish came with.
HARD_SWISH_OPSET = 14


def writes_hard_swish_out(model: ir.Model) -> bool:
    """Tell whether a model of an operator set without HardSwish computes it by others."""
    older = model.opset_imports.get("", HARD_SWISH_OPSET) < HARD_SWISH_OPSET
    return older and any(
        node.op_type in {"Mul", "Div"} and not node.domain and hard_swish_of(node) is not None for node in model.graph
    )


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


def parametric_relu(node: ir.Node, graph: ir.Graph) -> None:
    """PRelu with a single slope is LeakyRelu."""
    slope = real_scalar(node.inputs[1])
    if slope is not None:
        put(graph, node, ir.node("LeakyRelu", [node.inputs[0]], {"alpha": slope}))


def mean(node: ir.Node, graph: ir.Graph) -> None:
    """ReduceMean over all axes behind the channels' is a global average pool."""
    x = node.inputs[0]
    rank, given = rank_of(x), node.inputs[1] if len(node.inputs) > 1 else None
    held = constant(given)
    axes = node.attributes.get_ints("axes", ()) if given is None else () if held is None else held.reshape(-1).tolist()
    if rank is None or rank < 3 or sorted(axis % rank for axis in axes) != list(range(2, rank)):
        return
    pool = ir.node("GlobalAveragePool", [x])
    if node.attributes.get_int("keepdims", 1):
        put(graph, node, pool)
        return
    spatial = add_constant(graph, f"{node.outputs[0].name}_axes", np.arange(2, rank, dtype=np.int64))
    put(graph, node, pool, ir.node("Squeeze", [pool.outputs[0], spatial]))


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

    With letters that both operands keep (a batch), each may have one letter of its own; without, the first may have any number.
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
    if not kept or len(summed) != 1 or len(columns) != 1 or not rows or (batch and len(rows) != 1):
        return
    nodes: list[ir.Node] = []

    def arranged(value: ir.Value | None, term: str, order: list[str]) -> ir.Value | None:
        if list(term) == order:
            return value
        nodes.append(ir.node("Transpose", [value], {"perm": [term.index(letter) for letter in order]}))
        return nodes[-1].outputs[0]

    first = arranged(node.inputs[0], a, batch + rows + summed)
    second = arranged(node.inputs[1], b, batch + summed + columns)
    nodes.append(ir.node("MatMul", [first, second]))
    made = batch + rows + columns
    if made != list(result):
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [made.index(letter) for letter in result]}))
    put(graph, node, *nodes)


def hard_swish(node: ir.Node, graph: ir.Graph) -> None:
    """x·clip(x + 3, 0, 6)/6, multiplied in any order, is HardSwish, and so is x·HardSigmoid(x) of its slope."""
    x = hard_swish_of(node)
    if x is not None and graph.opset_imports.get("", 0) >= HARD_SWISH_OPSET:
        put(graph, node, ir.node("HardSwish", [x]))


def hard_swish_of(node: ir.Node) -> ir.Value | None:
    """Return what a node makes HardSwish of, where that is written out and nothing else reads what is made on the way."""
    factors: list[ir.Value] = []
    sixth, waiting = 1.0, [node]
    while waiting and len(factors) <= 2:
        step = waiting.pop()
        for place, value in enumerate(step.inputs):
            held, before = real_scalar(value), value.producer() if value is not None else None
            if value is None:
                return None
            if held is not None:
                sixth = sixth * held if step.op_type == "Mul" else sixth / held if place == 1 and held else 0.0
            elif (
                before is not None and before.op_type in {"Mul", "Div"} and not before.domain and only_read_once(value)
            ):
                waiting.append(before)
            elif step.op_type == "Mul" or place == 0:
                factors.append(value)
            else:
                return None
    for x, gate in (tuple(factors), tuple(factors)[::-1]) if len(factors) == 2 else ():
        slope, rank = gate_slope(gate, x), rank_of(x)
        alike = rank is not None and rank == rank_of(node.outputs[0])
        if alike and slope is not None and math.isclose(slope * sixth, 1 / 6, rel_tol=1e-6):
            return x
    return None


def gate_slope(gate: ir.Value, x: ir.Value) -> float | None:
    """Return the slope of a gate that rises from 0 at x = −3 to its end at 3; None for anything else."""
    made = gate.producer()
    if made is None or made.domain or not only_read_once(gate):
        return None
    if made.op_type == "HardSigmoid" and made.inputs[0] is x:
        slope, middle = made.attributes.get_float("alpha", 0.2), made.attributes.get_float("beta", 0.5)
        return slope if math.isclose(slope, 1 / 6, rel_tol=1e-6) and middle == 0.5 else None
    if made.op_type != "Clip" or [real_scalar(bound) for bound in made.inputs[1:]] != [0.0, 6.0]:
        return None
    moved = made.inputs[0].producer() if made.inputs[0] is not None else None
    if moved is None or moved.op_type != "Add" or moved.domain or not only_read_once(made.inputs[0]):
        return None
    return (
        1.0
        if any(one is x and real_scalar(other) == 3.0 for one, other in (moved.inputs, moved.inputs[::-1]))
        else None
    )


def only_read_once(value: ir.Value | None) -> bool:
    """Tell whether a tensor has one reader, and is not given out."""
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


FORMS: dict[str, Callable[[ir.Node, ir.Graph], None]] = {
    "Sub": subtraction,
    "Max": extreme,
    "Min": extreme,
    "PRelu": parametric_relu,
    "ReduceMean": mean,
    "Sum": total,
    "Einsum": einsum,
    "Mul": hard_swish,
    "Div": hard_swish,
}
