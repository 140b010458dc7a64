"""Shapes that a model computes while it runs, told beforehand as far as they are known.

Exporters write what a Reshape is to make as an expression over Shape, Slice, Concat and products of axes, although at most one axis
depends on what comes in, and so they write paddings, and the lengths of a detector's grid of anchors, where none does. A constant
says the same, and lets readers, kernels and C source know it.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant, constant

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# A number, the name of an axis whose length is not known, or nothing known at all.
Part = int | str | None
# The longest vector that can be a shape.
LONGEST = 64
# What the names begin with that shape inference gives to lengths it does not know.
MADE_UP = "unk__"
# Operators that give their first operand's values in their order.
SAME = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
TERMS: dict[str, Callable[[int, int], int | None]] = {
    "Add": operator.add,
    "Div": lambda a, b: a // b if a >= 0 and b > 0 else None,
    "Mod": lambda a, b: a % b if a >= 0 and b > 0 else None,
    "Mul": operator.mul,
    "Sub": operator.sub,
}


def settle_shapes(model: ir.Model) -> None:
    """Give what reads computed shapes and lengths in a model's main graph constants that say the same, where there are such."""
    known: dict[ir.Value, list[Part]] = {}
    for node in model.graph:
        if node.domain:
            continue
        parts = parts_of(node, known)
        if parts is not None and len(parts) <= LONGEST:
            known[node.outputs[0]] = parts
        if node.op_type == "Reshape" and constant(node.inputs[1]) is None:
            settled = constant_shape(node, known.get(node.inputs[1]))  # type: ignore[arg-type]
            if settled is not None:
                name = f"{node.outputs[0].name}_shape"
                node.replace_input_with(1, add_constant(model.graph, name, np.array(settled, dtype=np.int64)))
    settle_numbers(model.graph, {value: parts for value, parts in known.items() if all(type(p) is int for p in parts)})


def settle_numbers(graph: ir.Graph, numbers: Mapping[ir.Value, list[Part]]) -> None:
    """Put constants in the place of vectors and scalars that are known whole, where anything but these reads them."""
    for value, parts in numbers.items():
        if value.is_graph_output() or all(user.outputs[0] in numbers for user, _ in value.uses()):
            continue
        held = np.array(parts, dtype=np.int64 if value.dtype is None else value.dtype.numpy())
        scalar = value.shape is not None and len(value.shape) == 0
        settled = add_constant(graph, f"{value.name}_settled", held.reshape(()) if scalar else held)
        ir.convenience.replace_all_uses_with(value, settled)


def constant_shape(node: ir.Node, parts: list[Part] | None) -> list[int] | None:
    """Return a Reshape's shape as a constant: 0 for an axis that stays, −1 for one that follows from the others; else None."""
    x = node.inputs[0]
    if parts is None or x is None or 0 in parts or node.attributes.get_int("allowzero", 0) == 1:
        return None
    before = axes_of(x) or []
    kept = [isinstance(part, str) and before[place : place + 1] == [part] for place, part in enumerate(parts)]
    found = [0 if stays else part if isinstance(part, int) else -1 for part, stays in zip(parts, kept, strict=True)]
    return found if found.count(-1) <= 1 else None


def axes_of(value: ir.Value | None) -> list[Part] | None:
    """Return the lengths of a tensor's axes; None where not even their number is known.

    A name that shape inference has made up says nothing: in another run it may have been given to another length.
    """
    if value is None or value.shape is None:
        return None
    return [axis if isinstance(axis, int) else named(axis.value) for axis in value.shape]


def named(name: str | None) -> str | None:
    """Return the name of an axis's length, where it is the model's own."""
    return None if name is None or name.startswith(MADE_UP) else name


def values_of(value: ir.Value | None, known: Mapping[ir.Value, list[Part]]) -> list[Part] | None:
    """Return a vector's or a scalar's values; None where nothing is known of them."""
    if value is None:
        return None
    held = constant(value)
    if held is None:
        return known.get(value)
    return held.reshape(-1).tolist() if held.ndim <= 1 and held.size <= LONGEST and held.dtype.kind == "i" else None


def parts_of(node: ir.Node, known: Mapping[ir.Value, list[Part]]) -> list[Part] | None:
    """Return what is known of the vector or scalar that a node makes; None for nothing."""
    made = node.outputs[0]
    if node.op_type == "Shape":
        axes = axes_of(node.inputs[0])
        return axes and axes[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(axes))]
    if made.shape is None or len(made.shape) > 1 or made.dtype not in {ir.DataType.INT64, ir.DataType.INT32}:
        return None
    operands = [values_of(value, known) for value in node.inputs]
    first = operands[0] if operands else None
    if node.op_type == "Concat":
        return (
            [part for operand in operands if operand is not None for part in operand] if None not in operands else None
        )
    if first is None:
        return None
    if node.op_type in SAME:
        return first
    if node.op_type in TERMS and operands[1] is not None:
        return combined(TERMS[node.op_type], first, operands[1])
    if node.op_type == "Gather":
        return gathered(first, operands[1])
    return sliced(first, operands[1:]) if node.op_type == "Slice" else None


def combined(term: Callable[[int, int], int | None], first: list[Part], second: list[Part]) -> list[Part] | None:
    """Return a sum, difference, product or quotient, part by part."""
    if not first or not second or (len(first) != len(second) and 1 not in {len(first), len(second)}):
        return None
    count = max(len(first), len(second))
    pairs = zip(first * (count // len(first)), second * (count // len(second)), strict=True)
    return [
        term(a, b) if isinstance(a, int) and isinstance(b, int) else factor_of(a, b) if term is operator.mul else None
        for a, b in pairs
    ]


def factor_of(a: Part, b: Part) -> Part:
    """Return a product of which one factor is no number: the other one where that is 1."""
    return b if a == 1 else a if b == 1 else None


def gathered(values: list[Part], places: list[Part] | None) -> list[Part] | None:
    """Return the values at some places."""
    if places is None or not all(isinstance(place, int) and -len(values) <= place < len(values) for place in places):
        return None
    return [values[place] for place in places if isinstance(place, int)]


def sliced(values: list[Part], rest: list[list[Part] | None]) -> list[Part] | None:
    """Return a Slice of a vector, of its begin and end, and perhaps its axis and its step."""
    numbers = [operand[0] for operand in rest if operand and len(operand) == 1 and isinstance(operand[0], int)]
    if len(numbers) != len(rest):
        return None
    begin, end, _, step = numbers + [0, 1][len(numbers) - 2 :]
    return values[begin:end:step]
