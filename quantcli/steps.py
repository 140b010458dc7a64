"""Layers that a runtime has no integer kernel for, in steps that it has kernels for.

ONNX Runtime has none for HardSwish: between DequantizeLinear and QuantizeLinear it computes it in float, in four passes over four
bytes a value, which take longer than the integer convolutions around them save. It has kernels for sums and products, and

    HardSwish(x) = x · Clip(x/6 + ½, 0, 1) = u · Clip(u + 3/√6, 0, √6)   with u = x/√6:

a sum whose saturation is the Clip, and a product, two passes over single bytes. The layer before gives u as well as x, from the
same integers: the scales of its weights, of its bias and of its output are divided by √6, and its multipliers stay as they are but
for the last bits. The gate is rounded once more than a table would be, to a 255th of its range; where x ≥ 3, it is 1 exactly.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.arithmetic import affine
from quantcli.fold import add_constant
from quantcli.placement import PlacedLayer
from quantcli.plan import LayerPlan, Plan, TensorPlan, activation_parameters, plan_layer
from quantcli.rules import RULES, Arithmetic
from quantcli.tuning import Moved

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = math.sqrt(6.0)
# What is added to u = x/√6, and where the sum ends.
SHIFT, TOP = np.float32(3.0 / ROOT), np.float32(ROOT)
WHY = "a sum and a product have integer kernels here, and it has none"
# What ends the names of the sum, of what is added, of the Clip and of its bounds.
SUM, SHIFTED, GATE, LOWEST, HIGHEST = "_sum", "_shift", "_gate", "_gate_lowest", "_gate_highest"


def in_steps(model: ir.Model, plan: Plan) -> tuple[ir.Model, Plan, dict[str, NDArray[np.integer]]]:
    """Return a model and its plan with the target's steps in place of single layers, and the integers of the constants they add.

    The integers of all other constants stay what they are: weights and biases have other scales, and the model still holds them as
    they were before. What is given is not changed, and is returned where there is nothing to do.

    Args:
        model: The folded model that the plan speaks of.
        plan: The plan.
    """
    wanted = plan.target.placement.steps
    nodes = {str(node.name): node for node in model.graph} if wanted else {}
    before = {name: one for one in plan.layers if one.accumulator_scale is None for name in one.outputs}
    found = [one for one in plan.layers if one.operator in wanted and takes_steps(nodes, one, before, plan)]
    if not found:
        return model, plan, {}
    steps = Steps(model.clone(), plan)
    for layer in found:
        steps.take(layer, before[layer.inputs[0]])
    return steps.model, steps.plan(), steps.constants


def takes_steps(nodes: dict[str, ir.Node], layer: LayerPlan, before: dict[str, LayerPlan], plan: Plan) -> bool:
    """Tell whether what a layer reads is made for it alone, by weights that make nothing else, and everything is in bytes.

    Args:
        nodes: The model's nodes by name.
        layer: The layer.
        before: The layers by what they make.
        plan: The plan.
    """
    x, maker = nodes[layer.name].inputs[0], before.get(layer.inputs[0])
    if x is None or maker is None or maker.arithmetic is not Arithmetic.ACCUMULATE or maker.absorbed:
        return False
    roles = [plan.tensors[name].role for name in maker.inputs]
    alone = [x, *nodes[maker.name].inputs[1:]]
    ends = [plan.tensors[name] for name in (*layer.inputs, *layer.outputs)]
    return (
        roles[1:] in (["weight"], ["weight", "bias"])
        and all(value is None or (len(value.uses()) == 1 and not value.is_graph_output()) for value in alone)
        and all(end.integer.bits == 8 and end.same_as is None for end in ends)
        and not plan.target.activation.symmetric
    )


class Steps:
    """A model and its plan being rewritten.

    Args:
        model: The model, which is changed.
        plan: Its plan.
    """

    def __init__(self, model: ir.Model, plan: Plan) -> None:
        self.model, self.given = model, plan
        self.nodes = {str(node.name): node for node in model.graph}
        self.tensors = dict(plan.tensors)
        self.layers: dict[str, tuple[LayerPlan, ...]] = {layer.name: (layer,) for layer in plan.layers}
        self.constants: dict[str, NDArray[np.integer]] = {}
        self.taken = {str(value.name) for node in model.graph.all_nodes() for value in node.outputs}
        self.taken |= {*self.nodes, *model.graph.initializers, *(str(value.name) for value in model.graph.inputs)}
        self.shift: ir.Value | None = None

    def plan(self) -> Plan:
        """Return the plan of what was rewritten."""
        layers = tuple(layer for found in self.layers.values() for layer in found)
        return replace(self.given, tensors=self.tensors, layers=layers)

    def take(self, layer: LayerPlan, before: LayerPlan) -> None:
        """Put a sum and a product in place of a HardSwish, behind a layer that gives u in place of x."""
        self.divide(before)
        self.shift = self.shift or self.added(layer)
        total, gate, product = self.replaced(self.nodes[layer.name], self.shift)
        self.put_gate(self.tensors[layer.inputs[0]], str(gate.outputs[0].name))
        self.layers[layer.name] = (
            self.planned(PlacedLayer(total, RULES["Add"], (gate,), WHY)),
            self.planned(PlacedLayer(product, RULES["Mul"], (), f"{layer.why}; {WHY}")),
        )

    def divide(self, layer: LayerPlan) -> None:
        """Divide what a layer gives by √6: the scales of its weights, of its bias and of its output."""
        data, weight, *biases = (self.tensors[name] for name in layer.inputs)
        output, weight = divided(self.tensors[layer.outputs[0]]), divided(weight)
        scale, zero_point = activation_parameters(output.lo[0], output.hi[0], self.given.target, output.integer)
        moved = (output.moved or Moved()).then(1.0 / ROOT, 0.0)
        self.tensors[weight.name] = weight
        self.tensors[output.name] = replace(output, scale=(float(scale),), zero_point=(zero_point,), moved=moved)
        for bias in biases:
            scales = tuple(float(np.float32(np.float32(data.scale[0]) * np.float32(one))) for one in weight.scale)
            self.tensors[bias.name] = replace(divided(bias), scale=scales)
        node = self.nodes[layer.name]
        self.layers[layer.name] = (self.planned(PlacedLayer(node, RULES[node.op_type], (), layer.why)),)

    def added(self, layer: LayerPlan) -> ir.Value:
        """Return the constant that all sums add, on a grid of its own."""
        value = add_constant(self.model.graph, self.free(f"{layer.outputs[0]}{SHIFTED}"), np.array(SHIFT))
        held = self.on_grid(str(value.name), "constant", float(SHIFT), self.tensors[layer.inputs[0]])
        scale, zero_point = np.array(held.scale, dtype=np.float32), np.array(held.zero_point)
        self.constants[held.name] = affine.quantize(np.array(SHIFT), scale, zero_point, held.integer, None)
        return value

    def put_gate(self, u: TensorPlan, name: str) -> None:
        """Give the gate its grid, which reaches no further than u does."""
        reached = (u.integer.qmax - u.zero_point[0]) * u.scale[0] + float(SHIFT)
        self.on_grid(name, "activation", min(float(TOP), reached), u)

    def on_grid(self, name: str, role: str, high: float, like: TensorPlan) -> TensorPlan:
        """Give a tensor a grid from zero on, of another's integers, and return its plan."""
        scale, zero_point = activation_parameters(0.0, high, self.given.target, like.integer)
        low = high if role == "constant" else 0.0
        held = TensorPlan(name, role, like.integer, (float(scale),), (zero_point,), None, (low,), (high,))
        self.tensors[name] = held
        return held

    def replaced(self, node: ir.Node, shift: ir.Value) -> tuple[ir.Node, ir.Node, ir.Node]:
        """Put Add, Clip and Mul in place of a node, and return them; the Mul has its name."""
        graph, x, y = self.model.graph, node.inputs[0], node.outputs[0]
        ends = [
            add_constant(graph, self.free(f"{y.name}{what}"), np.array(bound, dtype=np.float32))
            for what, bound in ((LOWEST, 0.0), (HIGHEST, TOP))
        ]
        total = ir.node("Add", [x, shift], name=self.free(f"{node.name}{SUM}"))
        gate = ir.node("Clip", [total.outputs[0], *ends], name=self.free(f"{node.name}{GATE}"))
        product = ir.node("Mul", [x, gate.outputs[0]], name=node.name)
        total.outputs[0].name, gate.outputs[0].name = self.free(f"{y.name}{SUM}"), self.free(f"{y.name}{GATE}")
        for one in (total, gate, product):
            one.outputs[0].shape, one.outputs[0].type = y.shape, y.type
        graph.insert_before(node, [total, gate, product])
        ir.convenience.replace_all_uses_with(y, product.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        product.outputs[0].name = y.name
        return total, gate, product

    def planned(self, layer: PlacedLayer) -> LayerPlan:
        """Return a layer's plan."""
        return plan_layer(layer, self.tensors, self.given.target)

    def free(self, name: str) -> str:
        """Return a name that nothing has yet: this one, or with underscores behind it."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def divided(tensor: TensorPlan) -> TensorPlan:
    """Return the plan of a tensor that is divided by √6: the same integers."""
    scale = tuple(float(np.float32(one / ROOT)) for one in tensor.scale)
    lo, hi = (tuple(one / ROOT for one in ends) for ends in (tensor.lo, tensor.hi))
    return replace(tensor, scale=scale, lo=lo, hi=hi)
