"""Placement: which operators become integer layers, which stay float and why. No number is decided here."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.errors import PlanError, UsageError
from quantcli.fold import constant
from quantcli.recipe import resolve_target
from quantcli.rules import RULES, Arithmetic, Operand, Rule, rule_for

if TYPE_CHECKING:
    from quantcli.recipe import Layers, Recipe

ACTIVATIONS = frozenset({"Relu", "Clip"})


@dataclass(frozen=True)
class FloatLayer:
    """An operator that stays float.

    Attributes:
        name: The node's name.
        operator: Its type.
        reason: Why it stays float.
    """

    name: str
    operator: str
    reason: str


@dataclass(frozen=True, eq=False)
class PlacedLayer:
    """An operator that becomes an integer layer.

    Attributes:
        node: Its node in the folded model.
        rule: Its row of the table.
        absorbed: The Relu and Clip nodes behind it that become its clamp.
    """

    node: ir.Node
    rule: Rule
    absorbed: tuple[ir.Node, ...]

    @property
    def output(self) -> ir.Value:
        """The layer's (first) output, behind what it absorbed."""
        return (self.absorbed[-1] if self.absorbed else self.node).outputs[0]

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        """All outputs that are used (Split has several)."""
        rest = [v for v in self.node.outputs[1:] if v.uses() or v.is_graph_output()]
        return (self.output, *rest) if self.rule.arithmetic is Arithmetic.MOVE else (self.output,)

    def operands(self) -> list[tuple[int, ir.Value, Operand]]:
        """Return position, value and kind of every operand that has parameters; a computed weight is an activation."""
        found = []
        for position, value in enumerate(self.node.inputs):
            kind = self.rule.operand(position)
            if value is None or kind is Operand.PLAIN:
                continue
            if kind is Operand.WEIGHT and constant(value) is None:
                kind = Operand.OWN
            found.append((position, value, kind))
        return found


@dataclass(frozen=True, eq=False)
class Placement:
    """What becomes integer and what stays float.

    Attributes:
        layers: The integer layers in graph order.
        floats: The operators on float data that stay float, in graph order.
        owner: For every quantized activation the one whose parameters it has; itself, where it has its own.
        fixed: The outputs whose range their operator fixes.
    """

    layers: tuple[PlacedLayer, ...]
    floats: tuple[FloatLayer, ...]
    owner: dict[str, str]
    fixed: dict[str, tuple[float, float]]

    def observed(self) -> tuple[str, ...]:
        """Return the names of the activations whose ranges have to be observed."""
        names = dict.fromkeys(self.owner.values())
        constants = {v.name for layer in self.layers for _, v, _ in layer.operands() if constant(v) is not None}
        return tuple(name for name in names if name not in self.fixed and name not in constants)


def place(model: ir.Model, recipe: Recipe, barred: frozenset[str] = frozenset()) -> Placement:
    """Decide for every operator of a folded model whether it becomes an integer layer.

    Args:
        model: The folded model.
        recipe: What the user wants.
        barred: Activations that must not be quantized, because no grid of theirs would mean anything.

    Raises:
        UsageError: If a pattern of the recipe matches nothing.
        PlanError: If nothing is left to quantize.
    """
    nodes = [node for node in model.graph if carries_floats(node)]
    excluded = exclusions(nodes, recipe.layers)
    same_scale = resolve_target(recipe).activation.same_scale
    for node in nodes:
        if masked := next((v for v in (*node.inputs, *node.outputs) if v is not None and v.name in barred), None):
            excluded.setdefault(node, f"'{masked.name}' spans a range that no integer grid resolves, as a mask's does")
    reasons = {node: reason for node in nodes if (reason := why_float(node, excluded)) is not None}
    heads = absorptions(nodes, reasons)
    quantized: set[ir.Value] = set()
    layers: list[PlacedLayer] = []
    absorbed_nodes = {node for chain in heads.values() for node in chain}
    for node in nodes:
        if node in reasons or node in absorbed_nodes:
            continue
        layer = PlacedLayer(node, rule_for(node, same_scale), tuple(heads.get(node, ())))
        reason = why_isolated(layer, quantized, reasons)
        if reason is not None:
            reasons[node] = reason
            reasons.update(dict.fromkeys(layer.absorbed, f"it follows {node.op_type}, which stays float"))
            continue
        layers.append(layer)
        quantized.update(layer.outputs)
    if not layers:
        first = next(((n, r) for n, r in reasons.items()), None)
        detail = f" (the first operator, {first[0].op_type} '{first[0].name}', {first[1]})" if first else ""
        raise PlanError(f"the model has nothing to quantize{detail}", "see docs/operators.md for what can be quantized")
    floats = tuple(FloatLayer(str(node.name), node.op_type, reasons[node]) for node in nodes if node in reasons)
    owner, fixed = owners(layers)
    return Placement(tuple(layers), floats, owner, fixed)


def carries_floats(node: ir.Node) -> bool:
    """Tell whether an operator reads or makes real numbers; shape arithmetic on integers is no candidate and no float layer."""
    integers = {
        ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT16, ir.DataType.INT8, ir.DataType.BOOL, ir.DataType.STRING,
        ir.DataType.UINT64, ir.DataType.UINT32, ir.DataType.UINT16, ir.DataType.UINT8,
    }  # fmt: skip
    return any(value.dtype not in integers for value in node.outputs)


def exclusions(nodes: list[ir.Node], layers: Layers) -> dict[ir.Node, str]:
    """Return the nodes that the recipe keeps float, with the reason.

    Raises:
        UsageError: If a pattern matches nothing.
    """

    def matching(pattern: str) -> list[ir.Node]:
        operator = pattern.removeprefix("op:")
        if operator != pattern:
            found = [node for node in nodes if fnmatchcase(node.op_type, operator)]
        else:
            found = [node for node in nodes if fnmatchcase(str(node.name), pattern)]
        if not found:
            raise UsageError(f"the pattern '{pattern}' matches no layer", "quantcli convert -v lists the layers' names")
        return found

    kept: dict[ir.Node, str] = {}
    if layers.include:
        included = {node for pattern in layers.include for node in matching(pattern)}
        kept.update({node: "the recipe does not include it" for node in nodes if node not in included})
    for pattern in layers.exclude:
        kept.update(dict.fromkeys(matching(pattern), f"excluded by '{pattern}'"))
    return kept


def why_float(node: ir.Node, excluded: dict[ir.Node, str]) -> str | None:
    """Return why an operator cannot become an integer layer, as far as it alone can tell; None if it can."""
    rule = RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
    if rule is None:
        return (
            "no rule for this operator"
            if node.domain in {"", "ai.onnx"}
            else f"an operator of the domain {node.domain}"
        )
    if node in excluded:
        return excluded[node]
    if node.inputs[0] is None or len(node.outputs) == 0:
        return "an operand is missing"
    for position, value in enumerate(node.inputs):
        if value is None or rule.operand(position) is Operand.PLAIN:
            continue
        if value.dtype != ir.DataType.FLOAT:
            return f"operand '{value.name}' is {value.dtype or 'of unknown type'}, not float32"
        values = constant(value)
        if values is not None and (values.size == 0 or not np.isfinite(values.astype(np.float64)).all()):
            return f"the constant '{value.name}' is empty or not finite"
    return next((reason for check in rule.refuses if (reason := check(node)) is not None), None)


def absorptions(nodes: list[ir.Node], reasons: dict[ir.Node, str]) -> dict[ir.Node, list[ir.Node]]:
    """Return for every layer the chain of Relu and Clip nodes behind it that its clamp can take over.

    That needs the tensor between them to have no other reader, since it is not computed any more.
    """
    chains: dict[ir.Node, list[ir.Node]] = {}
    head_of: dict[ir.Node, ir.Node] = {}
    for node in nodes:
        between = node.inputs[0] if node.inputs else None
        producer = between.producer() if between is not None else None
        if node.op_type not in ACTIVATIONS or node in reasons or producer is None or producer in reasons:
            continue
        head = head_of.get(producer, producer)
        rule = RULES.get(head.op_type)
        alone = between is not None and len(between.uses()) == 1 and not between.is_graph_output()
        if alone and rule is not None and rule.absorbs and head.domain in {"", "ai.onnx"}:
            chains.setdefault(head, []).append(node)
            head_of[node] = head
    return chains


def why_isolated(layer: PlacedLayer, quantized: set[ir.Value], reasons: dict[ir.Node, str]) -> str | None:
    """Return why an operator that could be an integer layer would gain nothing; None if it stays one.

    Multiply-accumulate layers always pay. Whatever only moves or combines values pays where its data is in integers already, or
    comes from the graph's inputs and goes on to an integer layer.
    """
    if layer.rule.arithmetic is Arithmetic.ACCUMULATE:
        return None
    data = [value for _, value, _ in layer.operands() if constant(value) is None]
    if any(value in quantized for value in data):
        return None
    if layer.rule.arithmetic is Arithmetic.MOVE:
        source = layer.operands()[0][1]
        starts = source.is_graph_input() or constant(source) is not None
        return None if starts and reaches_layer(layer, reasons) else "its data is float, and it only moves it"
    if any(value.is_graph_input() for value in data):
        return None
    return "an island: its operands are float, and it alone is not worth quantizing them"


def reaches_layer(layer: PlacedLayer, reasons: dict[ir.Node, str]) -> bool:
    """Tell whether data that an operator only moves goes on to an operator that computes with integers."""
    pending, seen = list(layer.outputs), set(layer.outputs)
    while pending:
        for user in pending.pop().consumers():
            rule = RULES.get(user.op_type)
            if user in reasons or rule is None:
                continue
            if rule.arithmetic is not Arithmetic.MOVE:
                return True
            fresh = [value for value in user.outputs if value not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return False


def owners(layers: list[PlacedLayer]) -> tuple[dict[str, str], dict[str, tuple[float, float]]]:
    """Return whose parameters every quantized activation has, and the ranges that operators fix."""
    owner: dict[str, str] = {}
    fixed: dict[str, tuple[float, float]] = {}
    for layer in layers:
        for _, value, kind in layer.operands():
            if kind is Operand.OWN:
                owner.setdefault(str(value.name), str(value.name))
        if layer.rule.output is Operand.SAME:
            source = owner[str(layer.operands()[0][1].name)]
            owner.update({str(value.name): source for value in layer.outputs})
            continue
        owner[str(layer.output.name)] = str(layer.output.name)
        if layer.rule.output is Operand.FIXED and layer.rule.fixed is not None:
            fixed[str(layer.output.name)] = layer.rule.fixed
    return owner, fixed
