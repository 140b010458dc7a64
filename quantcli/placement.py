"""Placement: which operators become integer layers, which stay float and why. No number is decided here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.beginning import beginning, is_depthwise
from quantcli.bodies import BODIES, why_whole
from quantcli.cost import per_value, values_of
from quantcli.divisors import DIVISOR, under_divisions
from quantcli.errors import PlanError, UsageError
from quantcli.fold import constant, unmapped
from quantcli.load.learned import LEARNED
from quantcli.logarithms import REASON, under_logarithms
from quantcli.recipe import resolve_target
from quantcli.rules import LOOKUPS, RULES, STORED, Arithmetic, Operand, Rule, rule_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from quantcli.recipe import Layers, Recipe
    from quantcli.targets import Target

# Where a node keeps the reason for which it stands in the graph as a float operator, if we put it there.
WHY = "quantcli.why"
ACTIVATIONS = frozenset({"Relu", "Clip"})
# Operators that put several tensors on one grid, where the small one loses most.
JOINING = frozenset({"Add", "Sub", "Concat"})
# What other modes do for operators without a rule.
ELSEWHERE = {
    "LSTM": "; --mode dynamic multiplies in integers, --mode weights stores them",
    "GRU": "; --mode weights stores integers",
    "RNN": "; --mode weights stores integers",
}
# A table of fewer values is not worth the operator that dequantizes what is looked up.
WORTH_STORING = 1 << 16
# Why an operator's weights are stored, where a target computes it in float.
FLOAT_KERNEL = "its kernel is a float one here: its weights alone are stored as integers"
# How many input channels a narrow group has at most. But for depthwise convolutions, ONNX Runtime's integer kernel multiplies a
# small matrix per group: of 1, 2, 4, 8 and 24 channels it took 10, 5, 2.5, 1 and 0.4 times float's time (3×3, AVX-512 with VNNI).
NARROW = 4
# How many times fewer the float values must be than the integers they are combined with, to be quantized for it: of n values each,
# quantizing reads 4n bytes and writes n, and dequantizing the others and computing in float moves as much several times.
FEWER = 4


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
        why: Why it is one.
        real: Whether its output stays real: the accumulator is dequantized and not rounded to a grid.
    """

    node: ir.Node
    rule: Rule
    absorbed: tuple[ir.Node, ...]
    why: str = ""
    real: bool = False

    @property
    def output(self) -> ir.Value:
        """The layer's (first) output, behind what it absorbed."""
        return (self.absorbed[-1] if self.absorbed else self.node).outputs[0]

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        """All outputs that are used (Split has several)."""
        rest = [v for v in self.node.outputs[1:] if v.uses() or v.is_graph_output()]
        return (self.output, *rest) if self.rule.arithmetic is Arithmetic.MOVE else (self.output,)

    @property
    def depthwise(self) -> bool:
        """Whether it is a convolution of one filter per channel."""
        return is_depthwise(self.node)

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
        stored: Those of them whose weights are stored as integers, as layers that read nothing else on a grid.
        owner: For every quantized activation the one whose parameters it has; itself, where it has its own.
        fixed: The outputs whose range their operator fixes.
        shares: The outputs of softmaxes that have a range of their own: 1/scale is a whole number.
    """

    layers: tuple[PlacedLayer, ...]
    floats: tuple[FloatLayer, ...]
    stored: tuple[PlacedLayer, ...]
    owner: dict[str, str]
    fixed: dict[str, tuple[float, float]]
    shares: frozenset[str] = frozenset()

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
    excluded, forced = exclusions(nodes, recipe.layers)
    target = resolve_target(recipe)
    for node in nodes:
        if masked := next((v for v in (*node.inputs, *node.outputs) if v is not None and v.name in barred), None):
            excluded.setdefault(
                node,
                f"'{masked.name}' spans a range that no grid of {target.activation.width} bits resolves: a mask's, one far below "
                "what makes it, or that of large and small values joined, as boxes and scores are",
            )
    for node in under_logarithms(model) - forced:
        excluded.setdefault(node, REASON)
    for node in under_divisions(model, target.placement.real_outputs) - forced:
        excluded.setdefault(node, DIVISOR)
    reasons = {node: reason for node in nodes if (reason := why_float(node, excluded)) is not None}
    stored = stored_by(target, [node for node in nodes if node not in reasons and node not in forced], reasons)
    layers, reasons = settled(nodes, reasons, target, forced, bool(stored))
    if not layers and not stored:
        bodies = ((n, r) for n, r in reasons.items() if n.op_type in BODIES)
        first = next(bodies, next(iter(reasons.items()), None))
        detail = f" ({first[0].op_type} '{first[0].name}': {first[1]})" if first else ""
        raise PlanError(f"the model has nothing to quantize{detail}", "see docs/operators.md for what can be quantized")
    floats = tuple(FloatLayer(str(node.name), node.op_type, reasons[node]) for node in nodes if node in reasons)
    owner, fixed = owners(layers)
    shares = frozenset() if "Softmax" in target.activation.fixed else within(layers, owner)
    fixed = {name: ends for name, ends in fixed.items() if name not in shares}
    return Placement(tuple(layers), floats, stored, owner, fixed, shares)


def settled(
    nodes: list[ir.Node], reasons: dict[ir.Node, str], target: Target, forced: frozenset[ir.Node], stored: bool
) -> tuple[list[PlacedLayer], dict[ir.Node, str]]:
    """Return the integer layers, and why the other operators are none; a network that is all beginning has layers there, too.

    Args:
        nodes: The operators on float data, in graph order.
        reasons: Those that cannot be integer layers, with the reason.
        target: What the runtime can do.
        forced: Those that the recipe names to be quantized.
        stored: Whether the weights of some are stored as integers.
    """
    first = beginning(nodes, reasons, target.placement, forced)
    found = {**reasons, **first}
    layers = Placing(nodes, found, target, forced).layers()
    if layers or stored or not first:
        return layers, found
    return Placing(nodes, reasons, target, forced).layers(), reasons


def stored_by(target: Target, nodes: list[ir.Node], reasons: dict[ir.Node, str]) -> tuple[PlacedLayer, ...]:
    """Return the layers that a target computes in float from stored weights.

    Args:
        target: What the runtime can do.
        nodes: The operators that could be integer layers.
        reasons: Why operators are none, to which these are added.
    """
    named = [node for node in nodes if LEARNED not in node.meta and kind_of(node) in target.placement.stored]
    reasons.update(dict.fromkeys(named, FLOAT_KERNEL))
    return tuple(PlacedLayer(node, STORED[node.op_type], (), FLOAT_KERNEL, True) for node in named)


def kind_of(node: ir.Node) -> str:
    """Return an operator's type; Conv3d of a convolution over three spatial axes, NarrowConv of one in narrow groups."""
    weight = node.inputs[1] if node.op_type == "Conv" else None
    if weight is None or weight.const_value is None:
        return node.op_type
    outputs, inputs, *kernel = weight.const_value.shape.numpy()
    groups = node.attributes.get_int("group", 1)
    narrow = groups > 1 and inputs <= NARROW and (inputs, outputs) != (1, groups)
    return "Conv3d" if len(kernel) == 3 else "NarrowConv" if narrow else node.op_type


def carries_floats(node: ir.Node) -> bool:
    """Tell whether an operator reads or makes real numbers; shape arithmetic on integers is no candidate and no float layer."""
    integers = {
        ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT16, ir.DataType.INT8, ir.DataType.BOOL, ir.DataType.STRING,
        ir.DataType.UINT64, ir.DataType.UINT32, ir.DataType.UINT16, ir.DataType.UINT8,
    }  # fmt: skip
    return any(value.dtype not in integers for value in node.outputs)


def exclusions(nodes: list[ir.Node], layers: Layers) -> tuple[dict[ir.Node, str], frozenset[ir.Node]]:
    """Return the nodes that the recipe keeps float, with the reason, and those that it names to be quantized.

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
    included = frozenset(node for pattern in layers.include for node in matching(pattern))
    if layers.include:
        kept.update({node: "the recipe does not include it" for node in nodes if node not in included})
    for pattern in layers.exclude:
        kept.update(dict.fromkeys(matching(pattern), f"excluded by '{pattern}'"))
    return kept, included


def why_float(node: ir.Node, excluded: dict[ir.Node, str]) -> str | None:
    """Return why an operator cannot become an integer layer, as far as it alone can tell; None if it can."""
    rule = RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
    if rule is None:
        if node.domain not in {"", "ai.onnx"}:
            return f"an operator of the domain {node.domain}"
        if node.op_type in BODIES:
            return why_whole(node)
        return f"no rule for this operator{ELSEWHERE.get(node.op_type, '')}"
    if node in excluded:
        return excluded[node]
    if WHY in node.meta:
        return str(node.meta[WHY])
    if node.inputs[0] is None or len(node.outputs) == 0:
        return "an operand is missing"
    for position, value in enumerate(node.inputs):
        if value is None or rule.operand(position) is Operand.PLAIN:
            continue
        if value.dtype != ir.DataType.FLOAT:
            return f"operand '{value.name}' is {value.dtype or 'of unknown type'}, not float32"
        values = constant(value)
        bad = values is not None and (values.size == 0 or not np.isfinite(values).all())
        del values
        unmapped(value)
        if bad:
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


class Placing:
    """The walk through the graph that settles which operators become integer layers.

    Args:
        nodes: The operators on float data, in graph order.
        reasons: Those that cannot be integer layers, with the reason; the walk adds those for which it would gain nothing.
        target: What the runtime can do.
        forced: Those that the recipe names to be quantized: what pays is not asked of them.
    """

    def __init__(
        self, nodes: list[ir.Node], reasons: dict[ir.Node, str], target: Target, forced: frozenset[ir.Node]
    ) -> None:
        self.nodes, self.reasons, self.forced = nodes, reasons, forced
        self.target, self.pays = target, target.placement.pays
        self.chains = absorptions(nodes, reasons)
        self.integers: set[ir.Value] = set()

    def layers(self) -> list[PlacedLayer]:
        """Return the integer layers in graph order."""
        layers: list[PlacedLayer] = []
        taken: set[ir.Node] = set()
        for node in self.nodes:
            if node in self.reasons or node in taken:
                continue
            layer = self.settled(node)
            if layer is None:
                behind = f"it follows {node.op_type}, which stays float"
                self.reasons.update(dict.fromkeys(self.chains.get(node, ()), behind))
                continue
            taken.update(layer.absorbed)
            layers.append(layer)
            if not layer.real:
                self.integers.update(layer.outputs)
        return layers

    def settled(self, node: ir.Node) -> PlacedLayer | None:
        """Return the integer layer that an operator becomes; None, with a reason noted, if it stays float."""
        if self.pays and node.op_type in LOOKUPS and constant(node.inputs[0]) is not None:
            if (values_of(node.inputs[0]) or 0) < WORTH_STORING and node not in self.forced:
                self.reasons[node] = "its table is small, and looking up costs nothing"
                return None
            return PlacedLayer(node, LOOKUPS[node.op_type], (), "its table is stored in a quarter of the bytes", True)
        rule = rule_for(node, self.target.activation.same_scale)
        layer = PlacedLayer(node, rule, tuple(self.chains.get(node, ())))
        why, reason = self.verdict(layer)
        if reason is not None:
            self.reasons[node] = reason
            return None
        if self.stays_real(layer):
            return PlacedLayer(node, rule, (), f"{why}; nothing that computes with integers reads its output", True)
        return replace(layer, why=why)

    def verdict(self, layer: PlacedLayer) -> tuple[str, str | None]:
        """Return why an operator becomes an integer layer, and a reason (else None) for which it would gain nothing."""
        data = [value for _, value, _ in layer.operands() if constant(value) is None]
        floats = [value for value in data if value not in self.integers]
        if layer.rule.arithmetic is Arithmetic.ACCUMULATE:
            return "it multiplies and accumulates", self.too_little(layer, floats)
        if layer.node.op_type in self.target.placement.float_kernels and not any(
            map(self.computed_with, layer.outputs)
        ):
            return "", "its kernel is a float one here, and no integer kernel reads what it makes"
        if layer.node.op_type in self.target.placement.float_kernels and self.rounds_later(layer):
            return (
                "",
                "its kernel is a float one here, and a constant is applied to what it makes: that is rounded once, behind it",
            )
        if layer.rule.arithmetic is Arithmetic.MOVE:
            moves = layer.operands()[0][1] in self.integers or self.starts(layer)
            if not moves and self.pays and layer.node.op_type == "MaxPool" and self.accumulates(layer.output):
                return "the convolution behind it is integer, and bytes are pooled faster than reals", None
            return "it moves integers", None if moves else "its data is float, and it only moves it"
        rounds = bool(floats) or len(data) < len(layer.operands())  # what is no integer yet, or a constant
        rounds |= layer.node.op_type == "Concat"  # which brings all that it joins to one grid
        if rounds and len(floats) < len(data) and self.joins_for_nothing(layer):
            return "", "it would round what only float operators read"
        if not floats and data:
            return "its operands are integers already", None
        if self.pays and len(floats) < len(data):
            return self.mixture(layer, data, floats)
        if not self.pays and (len(floats) < len(data) or any(value.is_graph_input() for value in data)):
            return "its data is in integers, or comes from the model's inputs", None
        return "", "an island: its operands are float, and it alone is not worth quantizing them"

    def joins_for_nothing(self, layer: PlacedLayer) -> bool:
        """Tell whether several tensors would be rounded to one grid and nothing in integers came of it.

        So it is with a ViT's embeddings, and with the boxes and scores that a detector gives out as one tensor.
        """
        joins = self.pays and layer.node.op_type in JOINING and layer.node not in self.forced
        return joins and not any(map(self.goes_on, layer.outputs))

    def goes_on(self, value: ir.Value) -> bool:
        """Tell whether operators that could be integer lead from a value to a layer that accumulates."""
        pending, seen = [value], {value}
        while pending:
            found = pending.pop()
            for user in found.consumers():
                if user in self.reasons or user.op_type not in RULES:
                    continue
                if RULES[user.op_type].arithmetic is not Arithmetic.ACCUMULATE:
                    fresh = [output for output in user.outputs if output not in seen]
                    seen.update(fresh)
                    pending.extend(fresh)
                elif self.wants(user, found, any):
                    return True
        return False

    def too_little(self, layer: PlacedLayer, floats: list[ir.Value]) -> str | None:
        """Return why a layer that accumulates gains too little: products of two float activations over few terms."""
        least = self.target.placement.macs_per_value if self.pays else 0
        found = per_value(layer.node)
        if len(floats) < 2 or found is None or found >= least or layer.node in self.forced:
            return None
        return (
            f"{found:.0f} multiply-accumulates per value do not outweigh quantizing both operands, which takes {least}"
        )

    def mixture(self, layer: PlacedLayer, data: list[ir.Value], floats: list[ir.Value]) -> tuple[str, str | None]:
        """Judge an operator that combines integers with float values: whichever side is cheaper to convert gives way.

        Where they are alike, integers win if a layer that accumulates reads the result, which would be quantized there anyway.
        """
        if layer.node in self.forced:
            return "the recipe names it, and some of its data is in integers", None
        sizes = {value: values_of(value) for value in data}
        real = sum(sizes[value] or 0 for value in floats)
        held = sum(sizes[value] or 0 for value in data if value not in floats)
        if all(size is not None for size in sizes.values()) and real * FEWER <= held:
            return f"most of its data is in integers ({held:,} values beside {real:,} float ones)", None
        if any(self.accumulates(value) for value in layer.outputs):
            return "a layer that accumulates reads what it makes of integers and float values", None
        return "", "it combines integers with float values, and float operators read the result"

    def starts(self, layer: PlacedLayer) -> bool:
        """Tell whether an operator moves the model's inputs, or constants, on to where integers are computed with."""
        source = layer.operands()[0][1]
        if not source.is_graph_input() and constant(source) is None:
            return False
        if self.pays:
            return any(self.accumulates(value) for value in layer.outputs)
        return reaches_layer(layer, self.reasons)

    def computed_with(self, value: ir.Value) -> bool:
        """Tell whether some integer kernel may read a value, perhaps behind operators of float kernels."""
        for user in value.consumers():
            if user in self.reasons or user.op_type not in RULES:
                continue
            passes = RULES[user.op_type].arithmetic is Arithmetic.MOVE
            if passes or user.op_type in self.target.placement.float_kernels:
                if any(map(self.computed_with, user.outputs)):
                    return True
                continue
            return True
        return False

    def rounds_later(self, layer: PlacedLayer) -> bool:
        """Tell whether a layer's output is only multiplied by a constant, or one is added to it: both round if this does."""
        readers = list(layer.output.consumers())
        alone = (
            len(readers) == 1 and not layer.output.is_graph_output() and self.forced.isdisjoint({layer.node, *readers})
        )
        return (
            alone and readers[0].op_type in {"Add", "Mul"} and any(constant(v) is not None for v in readers[0].inputs)
        )

    def accumulates(self, value: ir.Value) -> bool:
        """Tell whether some layer accumulates integers of a value, perhaps behind operators that move them."""
        return any(self.wants(user, value, any) for user in value.consumers())

    def stays_real(self, layer: PlacedLayer) -> bool:
        """Tell whether a layer's output is better not rounded to a grid: unless all that read it accumulate integers."""
        if layer.node.op_type not in self.target.placement.real_outputs or layer.output.is_graph_output():
            return layer.node.op_type in self.target.placement.real_outputs
        readers = list(layer.output.consumers())
        return not (readers and all(self.wants(user, layer.output, all) for user in readers))

    def wants(self, user: ir.Node, value: ir.Value, quantifier: Callable[[Iterable[bool]], bool]) -> bool:
        """Tell whether a reader accumulates integers of a value, or moves them to readers of which any, or all, do."""
        rule = RULES.get(user.op_type)
        if user in self.reasons or rule is None or user.domain not in {"", "ai.onnx"}:
            return False
        if rule.arithmetic is Arithmetic.ACCUMULATE:
            layer = PlacedLayer(user, rule, ())
            return self.too_little(layer, [v for _, v, _ in layer.operands() if constant(v) is None]) is None
        if rule.arithmetic is not Arithmetic.MOVE or user.inputs[0] is not value:
            return False
        given = any(output.is_graph_output() for output in user.outputs)
        ends = [(end, output) for output in user.outputs for end in output.consumers()]
        return bool(ends) and not given and quantifier([self.wants(end, output, quantifier) for end, output in ends])


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
        if layer.real:
            continue
        if layer.rule.output is Operand.SAME:
            source = owner[str(layer.operands()[0][1].name)]
            owner.update({str(value.name): source for value in layer.outputs})
            continue
        owner[str(layer.output.name)] = str(layer.output.name)
        if layer.rule.output is Operand.FIXED and layer.rule.fixed is not None:
            fixed[str(layer.output.name)] = layer.rule.fixed
    return owner, fixed


def within(layers: list[PlacedLayer], owner: dict[str, str]) -> frozenset[str]:
    """Return what softmaxes make that the model does not give out, in this shape or another.

    Attention spreads over many tokens: its probabilities reach a small part of the way to 1, of which 8 bits leave them few steps.
    """
    made = {value for layer in layers if not layer.real for value in layer.outputs}
    given_out = {owner[str(value.name)] for value in made if value.is_graph_output()}
    softmaxes = (layer for layer in layers if layer.rule.arithmetic is Arithmetic.SOFTMAX)
    return frozenset(str(layer.output.name) for layer in softmaxes) - given_out
