"""What a model writes out in several operators and ONNX has one for: HardSwish, Gelu, PRelu, layer normalisations.

Exporters of older operator sets write x·Clip(x + 3, 0, 6)/6 for HardSwish. As integer layers its four operators round to a grid
each; the function by its name is one table, which rounds once, or one float kernel. A layer normalisation of nine operators is one
LayerNormalization, which smoothing knows and runtimes have a kernel for. Keras has no operator for a PRelu, and writes
Relu(x) − α·Relu(−x).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantcli.arithmetic import tables
from quantcli.canonical import axes_of, put, rank_of, real_scalar
from quantcli.fold import add_constant, constant, lifted
from quantcli.load.learned import LEARNED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

# The functions by their names: operator, attributes, what `tables` calls them, the operator set that knows them first.
NAMED: tuple[tuple[str, dict[str, float | str], dict[str, float], int], ...] = (
    ("HardSwish", {}, {}, 14),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, {"alpha": 1 / 6, "beta": 0.5}, 6),
    ("Gelu", {"approximate": "none"}, {"tanh": 0.0}, 20),
    ("Gelu", {"approximate": "tanh"}, {"tanh": 1.0}, 20),
    ("Mish", {}, {}, 18),
)
NORMALISATION_OPSET = 17
# The first whose PRelu broadcasts its slopes.
PRELU_OPSET = 7
# Operators of two numbers, and those of one that `tables` has: what functions are written out with.
PAIRS: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Max": np.maximum,
    "Min": np.minimum,
}
SINGLES = frozenset({"Relu", "Clip", "HardSigmoid", "Erf", "Tanh", "Softplus"})
# Of those, what bends: without one of them nothing is a function that has a name.
BENDING = SINGLES | {"Max", "Min"}
# What a PRelu is written out with: what bends, and what is linear.
BENDS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "Relu": lambda x: np.maximum(x, 0.0),
    "Abs": np.abs,
}
LINEAR = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}
# Where it is computed: a PRelu goes through zero, and is linear on both sides.
SIDES = (-16.0, -1.0, -0.125, 0.0, 0.125, 1.0, 16.0)
# The most operators that one of the functions is written out in: Gelu by Tanh, its cube as two products.
LONGEST = 10
# Where functions are compared: finely where they bend, and far out, where their arguments saturate.
FAR = np.geomspace(12.0, 1e4, 32)
POINTS = np.concatenate([-FAR[::-1], np.linspace(-12.0, 12.0, 1201), FAR])
# A model's constants have seven digits or 24 bits: 1/6 and √½ are off by up to 2^-22 of themselves. Such a factor within x·Φ(x) or
# x·Clip(x/6 + ½, 0, 1) is worth up to 3·2^-22·(1 + |x|), below one of 2^-20.
CLOSEST = 2.0**-20
CLOSE = CLOSEST * (1.0 + np.abs(POINTS))


@dataclass(frozen=True, eq=False)
class Written:
    """Something written out.

    Attributes:
        end: The node that gives its result.
        nodes: All its nodes.
        since: The operator set that has one operator for it.
        operator: That operator.
        x: What it reads.
        attributes: Its attributes.
        constants: Names and arrays of the constants that it reads behind its first operand.
    """

    end: ir.Node
    nodes: frozenset[ir.Node]
    since: int
    operator: str
    x: ir.Value
    attributes: dict[str, float | str] = field(default_factory=dict)
    constants: tuple[tuple[str, NDArray[np.float32]], ...] = ()


def by_name(model: ir.Model) -> ir.Model:
    """Return a model whose main graph has one operator for each function and layer normalisation that it wrote out.

    Its operator set is lifted for it where that can be. A model that was prepared and trained stays as it was trained.
    """
    if any(LEARNED in node.meta for node in model.graph):
        return model
    needed = max((written.since for written in written_out(model)), default=0)
    if needed > model.opset_imports.get("", needed):
        model = lifted(model, needed) or model
    opset = model.opset_imports.get("", needed)
    for written in list(written_out(model)):
        if written.since <= opset:
            held = [add_constant(model.graph, name, array) for name, array in written.constants]
            put(model.graph, written.end, ir.node(written.operator, [written.x, *held], written.attributes))
    passes.RemoveUnusedNodesPass()(model)
    return model


def written_out(model: ir.Model) -> Iterator[Written]:
    """Yield what a model's main graph writes out, each node in one of them at most; those that end last come first."""
    places = {node: place for place, node in enumerate(model.graph)}
    taken: set[ir.Node] = set()
    for end in reversed(list(model.graph)):
        if end in taken or end.domain:
            continue
        found = normalisation(end) or function(end, places, operands_of, named)
        if found is None and end.op_type in {"Add", "Sub"}:
            found = function(end, places, linear_operands, parametric)
        if found is not None and taken.isdisjoint(found.nodes):
            taken |= found.nodes
            yield found


def function(
    end: ir.Node,
    places: dict[ir.Node, int],
    operands_of: Callable[[ir.Node], list[ir.Value] | None],
    named: Callable[[ir.Node, list[ir.Node], ir.Value], Written | None],
) -> Written | None:
    """Return the function of one tensor that ends with a node.

    Args:
        end: The node.
        places: The nodes' places in the graph.
        operands_of: Returns the tensors that an operator computes with; None where it is none that functions are written with.
        named: Returns the function that nodes compute of a tensor, if it has a name.
    """
    nodes: list[ir.Node] = []
    operands: set[ir.Value] = set()
    pending: ir.Node | None = end
    while pending is not None and len(nodes) < LONGEST:
        found = operands_of(pending)
        if found is None:
            return None
        nodes.append(pending)
        operands.difference_update(pending.outputs)
        operands.update(found)
        if len(operands) == 1 and len(nodes) > 1:
            (x,) = operands
            if (written := named(end, nodes, x)) is not None:
                return written
        # What stands last in the graph nothing else among the operands depends on.
        pending = max(
            (value.producer() for value in operands if value.producer() is not None),
            key=lambda node: places.get(node, -1),  # type: ignore[arg-type]
            default=None,
        )
        if pending is not None and (
            pending not in places
            or pending.outputs[0].is_graph_output()
            or not set(pending.outputs[0].consumers()) <= set(nodes)
        ):
            return None
    return None


def parametric(end: ir.Node, nodes: list[ir.Node], x: ir.Value) -> Written | None:
    """Return the PRelu that nodes compute of a tensor: x above zero, below it x times a slope, one for all or one per channel."""
    slopes = slopes_of(end, x, nodes) if any(node.op_type in BENDS for node in nodes) else None
    if slopes is None or not broadcasts(slopes, x):
        return None
    held = (f"{end.outputs[0].name}_slopes", slopes if slopes.ndim else slopes.reshape(1))
    return Written(end, frozenset(nodes), PRELU_OPSET, "PRelu", x, constants=(held,))


def linear_operands(node: ir.Node) -> list[ir.Value] | None:
    """Return the tensors that an operator of which PRelu is made computes with; None of any other."""
    if node.domain or node.op_type not in {*BENDS, *LINEAR, "Neg"} or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    return [value for value in node.inputs if value is not None and constant(value) is None] or None


def slopes_of(end: ir.Node, x: ir.Value, nodes: list[ir.Node]) -> NDArray[np.float32] | None:
    """Return the slopes below zero of the PRelu that nodes compute of a tensor; None where they compute something else.

    Args:
        end: The node that gives its result.
        x: The tensor.
        nodes: All the nodes.
    """

    def at(value: ir.Value | None, point: float) -> NDArray[np.float64]:
        held = constant(value)
        node = value.producer() if value is not None else None
        if value is x:
            return np.array(point)
        if held is not None or node not in nodes or node is None:
            return np.asarray(np.nan if held is None else held, dtype=np.float64)
        given = [at(operand, point) for operand in node.inputs]
        if node.op_type in LINEAR:
            return np.asarray(LINEAR[node.op_type](*given))
        return np.asarray(BENDS.get(node.op_type, np.negative)(given[0]))

    with np.errstate(all="ignore"):
        try:
            found = {point: at(end.outputs[0], point) for point in SIDES}
        except ValueError:  # constants that x alone joins
            return None
    slopes = -found[-1.0]
    for point, values in found.items():
        expected = point * (slopes if point < 0 else 1.0)
        if not (np.abs(values - expected) <= CLOSEST * np.maximum(np.abs(expected), abs(point))).all():
            return None
    return slopes.astype(np.float32)


def broadcasts(slopes: NDArray[np.float32], x: ir.Value) -> bool:
    """Tell whether slopes leave a tensor's shape what it is."""
    if x.shape is None or slopes.ndim > len(x.shape) or x.dtype != ir.DataType.FLOAT:
        return False
    return all(size in {1, axis} for size, axis in zip(slopes.shape[::-1], tuple(x.shape)[::-1], strict=False))


def operands_of(node: ir.Node) -> list[ir.Value] | None:
    """Return the tensors that an operator on single values computes with; None of any other, or one with constants of several."""
    if node.domain or len(node.outputs) != 1 or node.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    bounds = node.inputs[1:] if node.op_type == "Clip" else ()
    if node.op_type in SINGLES:
        given: tuple[ir.Value | None, ...] = tuple(node.inputs[:1])
    elif node.op_type in PAIRS and len(node.inputs) == 2:
        given = tuple(node.inputs)
    else:
        return None
    if any(bound is not None and real_scalar(bound) is None for bound in bounds):
        return None
    tensors = [value for value in given if value is not None and constant(value) is None]
    ranks = [rank_of(value) for value in tensors]
    for value in given:
        held = constant(value)
        if held is not None and (real_scalar(value) is None or any(rank is None or held.ndim > rank for rank in ranks)):
            return None
    return tensors or None


def named(end: ir.Node, nodes: list[ir.Node], x: ir.Value) -> Written | None:
    """Return the function by its name that nodes compute of a tensor; None where it has none."""
    if not any(node.op_type in BENDING for node in nodes):
        return None
    with np.errstate(all="ignore"):
        values: dict[ir.Value, NDArray[np.float64]] = {x: POINTS}
        for node in reversed(nodes):
            values[node.outputs[0]] = result(node, values)
    y = values[end.outputs[0]]
    for operator, attributes, parameters, since in NAMED:
        if (np.abs(y - tables.FUNCTIONS[operator](POINTS, parameters)) <= CLOSE).all():
            return Written(end, frozenset(nodes), since, operator, x, attributes)
    return None


def result(node: ir.Node, values: dict[ir.Value, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return what an operator makes of its operands' values, in float64."""

    def number(value: ir.Value | None, absent: float) -> float:
        found = real_scalar(value)
        return absent if found is None else found

    if node.op_type in PAIRS:
        a, b = (values[v] if v in values else np.array(number(v, np.nan)) for v in node.inputs if v is not None)
        return np.asarray(PAIRS[node.op_type](a, b))
    x = values[node.inputs[0]]  # type: ignore[index]
    if node.op_type == "Clip":
        low, high = (*node.inputs[1:], None, None)[:2]
        parameters = {"min": number(low, -np.inf), "max": number(high, np.inf)}
    else:
        defaults = tables.ATTRIBUTES.get(node.op_type, {})
        parameters = {key: node.attributes.get_float(key, default) for key, default in defaults.items()}
    return tables.FUNCTIONS[node.op_type](x, parameters)


def normalisation(end: ir.Node) -> Written | None:
    """Return the layer normalisation over the last axis that ends with a node: (x − μ) / √(σ² + ε), times γ, plus β."""
    beta = gamma = None
    inner: ir.Node | None = end
    nodes = {end}
    if end.op_type == "Add":
        inner, beta = behind(end)
    if inner is not None and inner.op_type == "Mul":
        nodes.add(inner)
        inner, gamma = behind(inner)
    if inner is None or inner.op_type != "Div" or (beta is not None and gamma is None):
        return None
    deviation, root = (made_by(value) for value in inner.inputs)
    total = made_by(root.inputs[0]) if root is not None and root.op_type == "Sqrt" else None
    if deviation is None or deviation.op_type != "Sub" or root is None or total is None or total.op_type != "Add":
        return None
    variance, addend = behind(total)
    epsilon = None if addend is None or addend.size != 1 else float(addend.reshape(()))
    x, average = deviation.inputs[0], made_by(deviation.inputs[1])
    if x is None or epsilon is None or not over_last(average, x) or variance is None or average is None:
        return None
    square = made_by(variance.inputs[0])
    squared = squares(square, deviation) if square is not None else None
    if square is None or squared is None or not over_last(variance, square.outputs[0]):
        return None
    nodes |= {inner, deviation, squared, root, total, variance, average, square}
    size = x.shape[-1] if x.shape is not None else None
    gamma = np.ones(1, np.float32) if gamma is None else gamma
    vectors = [vector(held, size) for held in (gamma, beta) if held is not None]
    inside = {node.outputs[0] for node in nodes} - {end.outputs[0]}
    escapes = any(v.is_graph_output() or not set(v.consumers()) <= nodes for v in inside)
    if any(held is None for held in vectors) or escapes:
        return None
    names = (f"{end.outputs[0].name}_gamma", f"{end.outputs[0].name}_beta")
    constants = tuple((name, held) for name, held in zip(names, vectors, strict=False) if held is not None)
    attributes: dict[str, float | str] = {"axis": -1, "epsilon": epsilon}
    return Written(end, frozenset(nodes), NORMALISATION_OPSET, "LayerNormalization", x, attributes, constants)


def made_by(value: ir.Value | None) -> ir.Node | None:
    """Return the operator of ONNX's own that makes a tensor."""
    node = value.producer() if value is not None else None
    return node if node is not None and not node.domain else None


def behind(node: ir.Node) -> tuple[ir.Node | None, NDArray[np.float32] | None]:
    """Return what makes the computed operand of an operator of two, and the constant one; None and None where there are no such."""
    for x, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        held = constant(other)
        if held is not None and held.dtype == np.float32 and constant(x) is None:
            return made_by(x), held
    return None, None


def over_last(node: ir.Node | None, x: ir.Value) -> bool:
    """Tell whether a node is the mean of a tensor over its last axis, which stays."""
    rank = rank_of(x)
    if node is None or node.op_type != "ReduceMean" or node.inputs[0] is not x or rank is None:
        return False
    return bool(node.attributes.get_int("keepdims", 1)) and [axis % rank for axis in axes_of(node)] == [rank - 1]


def squares(node: ir.Node, deviation: ir.Node) -> ir.Node | None:
    """Return the difference that a node squares, if it is that of another node, or a copy of it; else None."""
    base, exponent = (*node.inputs, None)[:2]
    if node.op_type == "Pow" and real_scalar(exponent) != 2.0:
        return None
    found = made_by(base)
    if found is None or found.op_type != "Sub" or tuple(found.inputs) != tuple(deviation.inputs):
        return None
    return found if node.op_type == "Pow" or (node.op_type == "Mul" and exponent is base) else None


def vector(held: NDArray[np.float32], size: object) -> NDArray[np.float32] | None:
    """Return a constant as one value per element of a last axis of a known length; None where it is not that."""
    if not isinstance(size, int) or held.size not in {1, size} or (held.size > 1 and held.shape[-1] != size):
        return None
    return np.broadcast_to(held.reshape(-1), (size,)).astype(np.float32)
