"""Plans that need no data: integer weights alone (``weights``), or activations quantized while the model runs (``dynamic``)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.arithmetic.affine import IntegerType, symmetric_scales
from quantcli.arithmetic.blocks import block_parameters
from quantcli.bodies import BODIES, why_whole
from quantcli.errors import PlanError
from quantcli.fold import add_constant, constant, unmapped
from quantcli.placement import WORTH_STORING, FloatLayer, carries_floats, exclusions
from quantcli.plan import LayerPlan, Plan, TensorPlan
from quantcli.recipe import resolve_target
from quantcli.rules import LOOKUPS, RULES, Arithmetic

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from quantcli.recipe import Recipe

# The operators with weights, and where those stand.
WEIGHTS: dict[str, tuple[int, ...]] = {
    "MatMul": (1,), "Gemm": (1,), "Conv": (1,), "ConvTranspose": (1,), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
}  # fmt: skip
PRODUCTS = frozenset({"MatMul", "Gemm"})
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
# What the runtime can run with activations that are quantized on the way.
DYNAMIC = PRODUCTS | {"Conv", "LSTM"}
# Weights of fewer values are not worth the operator that dequantizes them.
SMALLEST_WEIGHT = 512
DEFAULT_BLOCK = 32


def plan_without_data(model: ir.Model, recipe: Recipe) -> Plan:
    """Decide every number of a model whose activations are not calibrated.

    Args:
        model: The folded model; Gemm's transposed weights are put the other way round in it for ``dynamic``.
        recipe: What the user wants.

    Raises:
        PlanError: If there is nothing to quantize.
    """
    target = resolve_target(recipe)
    nodes = [node for node in model.graph if carries_floats(node)]
    excluded, forced = exclusions(nodes, recipe.layers)
    tensors: dict[str, TensorPlan] = {}
    layers, floats = [], []
    for node in nodes:
        reason = excluded.get(node) or why_float(node, recipe, node in forced)
        if reason is None:
            if recipe.mode == "dynamic" and node.op_type == "Gemm":
                untransposed(node, model.graph)
            layers.append(layer_of(node, recipe, tensors))
        else:
            floats.append(FloatLayer(str(node.name), node.op_type, reason))
    if not layers:
        raise nothing_quantized(floats)
    return Plan(target, tensors, tuple(layers), tuple(floats))


def with_stored(plan: Plan, model: ir.Model, names: Collection[str], bits: int) -> Plan:
    """Return a plan some of whose float operators have their weights stored as integers, one scale per output channel.

    Args:
        plan: The plan.
        model: The model that it speaks of.
        names: The operators, which stay float in it; one without a float matrix of its own stays as it is.
        bits: The width of their weights.
    """
    order = {str(node.name): place for place, node in enumerate(model.graph)}
    tensors, layers = dict(plan.tensors), list(plan.layers)
    why = f"its weights are stored as integers of {bits} bits, and what it computes stays float"
    for node in model.graph:
        if str(node.name) not in names:
            continue
        held = {position: weight_of(node, position) for position in WEIGHTS.get(node.op_type, ())}
        if not held or any(values is None for values in held.values()):
            continue
        stored = []
        for position, values in held.items():
            name = str(node.inputs[position].name)  # type: ignore[union-attr]
            tensors[name] = stored_weight(name, values, axis_of(node), IntegerType(f"int{bits}", narrow=True))  # type: ignore[arg-type]
            stored.append(name)
            unmapped_operand(node, position)
        layers.append(stored_layer(node, stored, why))
    layers.sort(key=lambda layer: order[layer.name])
    done = {layer.name for layer in layers}
    floats = tuple(layer for layer in plan.floats if layer.name not in done)
    return replace(plan, tensors=tensors, layers=tuple(layers), floats=floats)


def float_plan(model: ir.Model, recipe: Recipe, why: str) -> Plan:
    """Return the plan in which every operator stays float, and why."""
    nodes = [node for node in model.graph if carries_floats(node)]
    return Plan(resolve_target(recipe), {}, (), tuple(FloatLayer(str(node.name), node.op_type, why) for node in nodes))


def nothing_quantized(floats: list[FloatLayer]) -> PlanError:
    """Return the error of a model of which nothing becomes integer: why, of the first operator that has weights."""
    known = next((layer for layer in floats if layer.operator in {*WEIGHTS, *LOOKUPS, *BODIES}), None)
    if known is None:
        return PlanError("the model has no weights to quantize", "see docs/operators.md for what can be quantized")
    what = f"no weight of the model becomes integers; of {known.operator} '{known.name}': {known.reason}"
    if known.operator in BODIES:
        return PlanError(what, "see docs/models.md for what is taken")
    return PlanError(
        what, "--include NAME asks for what only does not pay; --mode static quantizes activations as well"
    )


def why_float(node: ir.Node, recipe: Recipe, forced: bool) -> str | None:
    """Return why an operator keeps its weights in float, or has none; None if they become integers."""
    if node.domain not in {"", "ai.onnx"}:
        return f"an operator of the domain {node.domain}"
    if node.op_type in BODIES:
        return why_whole(node)
    if node.op_type in LOOKUPS:
        table = weight_of(node, 0)
        if table is None:
            return "it has no weights"
        return None if table.size >= WORTH_STORING or forced else "its table is small, and looking up costs nothing"
    held = [weight_of(node, position) for position in WEIGHTS.get(node.op_type, ())]
    if not held or any(weight is None for weight in held):
        return "it has no weights" if node.op_type not in WEIGHTS else "its weight is not a float32 constant"
    if node.op_type == "Gemm" and (
        node.attributes.get_int("transA", 0) == 1 or node.attributes.get_float("alpha", 1.0) != 1.0
    ):
        return "its first operand is transposed, or alpha is not 1"
    if recipe.mode == "dynamic":
        if node.op_type not in DYNAMIC:
            return "the runtime has no kernel of dynamic integers for it; --mode weights stores its weights"
        if node.op_type == "LSTM" and node.attributes.get_int("layout", 0) != 0:
            return "its layout has the batch first, which the runtime's kernel of dynamic integers does not"
        if node.op_type == "Conv" and not forced:
            return "convolutions run slower with dynamic integers than in float; include it to have it all the same"
        if node.op_type == "MatMul" and held[0] is not None and held[0].ndim != 2:
            return "its weight is a stack of matrices"
    small = sum(weight.size for weight in held if weight is not None) < SMALLEST_WEIGHT
    del held
    for position in WEIGHTS[node.op_type]:
        unmapped_operand(node, position)
    return "its weight is small" if small and not forced else None


def unmapped_operand(node: ir.Node, position: int) -> None:
    """Let go of the memory map of an operand."""
    value = node.inputs[position]
    if value is not None:
        unmapped(value)


def weight_of(node: ir.Node, position: int) -> NDArray[np.float32] | None:
    """Return a finite float32 constant operand; None where it is none."""
    held = constant(node.inputs[position]) if position < len(node.inputs) else None
    if held is None or held.dtype != np.float32 or held.ndim < 2 or not held.size or not np.isfinite(held).all():
        return None
    return held


def layer_of(node: ir.Node, recipe: Recipe, tensors: dict[str, TensorPlan]) -> LayerPlan:
    """Return an operator's layer, and put its weights among the tensors."""
    positions = (0,) if node.op_type in LOOKUPS else WEIGHTS[node.op_type]
    names = []
    for position in positions:
        value, values = node.inputs[position], weight_of(node, position)
        assert value is not None and values is not None  # noqa: S101, PT018 - why_float has looked
        name = str(value.name)
        names.append(name)
        if name not in tensors:
            tensors[name] = weight_plan(name, values, node, recipe)
        del values
        unmapped(value)
    if node.op_type in LOOKUPS:
        arithmetic, why = Arithmetic.LOOKUP, "its table is stored in a quarter of the bytes"
    elif recipe.mode == "dynamic":
        arithmetic, why = Arithmetic.DYNAMIC, "its operands are multiplied in integers, quantized while the model runs"
        if node.op_type in RECURRENT:
            why = (
                "its weights are integers; what they are multiplied by is quantized at every step while the model runs"
            )
    else:
        return stored_layer(node, names, "its weights are stored as integers")
    scale = tensors[names[0]].scale if len(names) == 1 else ()
    return LayerPlan(
        str(node.name), node.op_type, arithmetic, tuple(names), outputs_of(node), (), (), "single", None, scale, why
    )


def stored_layer(node: ir.Node, names: Sequence[str], why: str) -> LayerPlan:
    """Return the layer of a float operator whose weights, of some names, are stored as integers."""
    return LayerPlan(
        str(node.name),
        node.op_type,
        Arithmetic.STORED,
        tuple(names),
        outputs_of(node),
        (),
        (),
        "single",
        None,
        (),
        why,
    )


def outputs_of(node: ir.Node) -> tuple[str, ...]:
    """Return the names of what a node gives."""
    return tuple(str(value.name) for value in node.outputs if value.name)


def weight_plan(name: str, values: NDArray[np.float32], node: ir.Node, recipe: Recipe) -> TensorPlan:
    """Return a weight's parameters: symmetric int8 per output channel, or in blocks along the inputs of a product."""
    bits, block = recipe.weight.bits or 8, recipe.weight.block_size
    product = node.op_type in PRODUCTS and values.ndim == 2 and recipe.mode == "weights"
    if product and (block or bits == 4):
        integer = IntegerType("uint4" if bits == 4 else "int8", narrow=bits == 8)
        along = 1 if node.attributes.get_int("transB", 0) else 0
        blocks = block_parameters(values, integer, block or DEFAULT_BLOCK, along)
        lowest, highest = (float(values.min()),), (float(values.max()),)
        return TensorPlan(name, "weight", integer, (), (), None, lowest, highest, blocks=blocks)
    return stored_weight(name, values, axis_of(node), IntegerType("int8", narrow=True))


def stored_weight(name: str, values: NDArray[np.float32], axis: int | None, integer: IntegerType) -> TensorPlan:
    """Return a weight's symmetric parameters, one scale per output channel."""
    channels = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    lo, hi = channels.min(axis=1), channels.max(axis=1)
    scales = symmetric_scales(np.maximum(-lo, hi), integer)
    dead = tuple(int(i) for i in np.flatnonzero(np.maximum(-lo, hi) == 0))
    ends = tuple(float(v) for v in lo), tuple(float(v) for v in hi)
    return TensorPlan(
        name, "weight", integer, tuple(float(s) for s in scales), (0,) * len(scales), axis, *ends, dead=dead
    )


def axis_of(node: ir.Node) -> int | None:
    """Return the axis of a weight's output channels."""
    if node.op_type in RECURRENT:
        return 1  # (directions, gates · hidden, inputs): the directions share their scales
    rule = LOOKUPS.get(node.op_type) or RULES[node.op_type]
    return rule.weight_axis(node)


def untransposed(node: ir.Node, graph: ir.Graph) -> None:
    """Put a Gemm's weight the way round in which MatMulInteger takes it."""
    weight = node.inputs[1]
    held = constant(weight)
    if node.attributes.get_int("transB", 0) and held is not None and weight is not None:
        node.replace_input_with(1, add_constant(graph, f"{weight.name}_transposed", held.T))
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
