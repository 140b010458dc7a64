"""Write ONNX in QOperator form: QLinearConv, QLinearMatMul, QLinearAdd, … in place of what stands between Q/DQ pairs.

The same plan, the same names and the same integers as the QDQ form, which it starts from. An operator without an integer
counterpart, one with a clamp that saturation does not give, and one of activations of 16 bits, for which there are none, keeps its
QDQ form.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantcli.integer_operators import INTEGER_OPERATORS, MICROSOFT, REAL_OPERATORS
from quantcli.rules import RULES, Arithmetic
from quantcli.write import onnx_qdq
from quantcli.write.integers import attributes_of, dequantizer_of, move_integers, put, quantizer_of

if TYPE_CHECKING:
    from quantcli.plan import LayerPlan, Plan
    from quantcli.quantize import QuantizedModel

logger = logging.getLogger(__name__)

# What only moves values does so with integers as well as with reals, but for interpolation, which makes values of its own, and for
# operators without an integer kernel.
MOVES = frozenset(name for name, rule in RULES.items() if rule.arithmetic is Arithmetic.MOVE) - {
    "Resize",
    "GlobalMaxPool",
    "SpaceToDepth",
}


def write(quantized: QuantizedModel) -> ir.Model:
    """Return the quantized model as ONNX in QOperator form."""
    model = onnx_qdq.write(quantized)
    nodes = {str(node.name): node for node in model.graph}
    wide = {layer.name for layer in quantized.plan.layers if is_wide(layer, quantized.plan)}
    if wide:
        logger.warning(
            "%d of %d layers have activations of 16 bits, for which ONNX has no integer operators: they stay between Q and DQ",
            len(wide),
            len(quantized.plan.layers),
        )
    for layer in quantized.plan.layers:
        if layer.name in wide:
            continue
        node = nodes[layer.name]
        targets = [quantizer_of(value) for value in node.outputs if value.uses() or value.is_graph_output()]
        if layer.accumulator_scale is not None:
            replace_real(model, node)
        elif all(target is not None for target in targets):
            replace(model, node, [target for target in targets if target is not None])
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports[MICROSOFT] = 1
    return model


def is_wide(layer: LayerPlan, plan: Plan) -> bool:
    """Tell whether a layer reads or makes integers of 16 bits."""
    return any(
        plan.tensors[name].integer.dtype.itemsize == 2
        for name in (*layer.inputs, *layer.outputs)
        if name in plan.tensors
    )


def replace(model: ir.Model, node: ir.Node, targets: list[ir.Node]) -> None:
    """Put an integer operator in place of one node between DequantizeLinear and QuantizeLinear, where there is one."""
    if node.op_type in MOVES:
        move_integers(node, targets)
        return
    counterpart = INTEGER_OPERATORS.get(node.op_type)
    sources = [dequantizer_of(value) for value in node.inputs]
    if counterpart is None or any(source is None for source in sources) or len(targets) != 1:
        return
    operands = [source for source in sources if source is not None]
    bias = operands.pop().inputs[0] if counterpart.bias is not None and len(operands) > 2 else None
    output = list(targets[0].inputs[1:3])
    inputs = [value for operand in operands for value in operand.inputs]
    arranged = counterpart.arranged(inputs, bias, output)
    attributes = attributes_of(node, without={"beta"} if counterpart.bias == "inner" else set())
    if counterpart.opset:
        attributes.append(ir.AttrInt64("opset", model.opset_imports[""]))
    put(node, ir.Node(counterpart.domain, counterpart.name, arranged, attributes), targets)


def replace_real(model: ir.Model, node: ir.Node) -> None:
    """Put an integer operator that gives reals in place of one behind DequantizeLinear, where there is one."""
    counterpart, graph = REAL_OPERATORS.get(node.op_type), model.graph
    operands = [dequantizer_of(value) for value in node.inputs]
    found = [operand for operand in operands if operand is not None]
    if counterpart is None or len(found) != len(operands):
        return
    bias = found.pop().inputs[0] if counterpart.bias is not None and len(found) > 2 else None
    arranged = counterpart.arranged([value for operand in found for value in operand.inputs], bias, [])
    attributes = attributes_of(node, without={"beta"} if counterpart.bias == "inner" else set())
    new = ir.Node(counterpart.domain, counterpart.name, arranged, attributes, name=node.name)
    old, made = node.outputs[0], new.outputs[0]
    name, made.shape, made.type = old.name, old.shape, old.type
    graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    made.name = name
