"""Read a model in QOperator form as one in QDQ form, so that one executor and one verification serve both.

Nothing is taken from the sidecar but names: every scale and zero point is the one that the model itself holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant, constant
from quantcli.integer_operators import FLOAT_OPERATORS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantcli.integer_operators import IntegerOperator
    from quantcli.sidecar import Sidecar

EDGES = frozenset({"QuantizeLinear", "DequantizeLinear"})


def expanded(model: ir.Model, sidecar: Sidecar) -> ir.Model:
    """Return a copy of a model whose integer operators are float operators between DequantizeLinear and QuantizeLinear.

    An operator that moves integers has the parameters of what makes those integers. The copy is for reading only: a tensor that
    two operators read is dequantized twice under one name, once with the parameters that each of them holds.
    """
    copy = model.clone()
    return Expansion(copy, sidecar).run()


def put_dequantizers(graph: ir.Graph, reals: Mapping[str, str]) -> None:
    """Put DequantizeLinear in place of Cast and Mul behind stored weights (`quantcli.write.onnx_stored`).

    Args:
        graph: The graph, which is changed.
        reals: The names of the weights' reals by those of their integers.
    """
    for node in list(graph):
        cast = node.inputs[0].producer() if node.op_type == "Mul" and node.inputs[0] is not None else None
        if cast is None or cast.op_type != "Cast":
            continue
        integers, output = cast.inputs[0], node.outputs[0]
        scale = constant(node.inputs[1])
        if integers is None or scale is None or reals.get(str(integers.name)) != output.name:
            continue
        attributes = {"axis": int(np.argmax(scale.shape))} if scale.ndim else {}
        flat = add_constant(graph, f"{output.name}_scales", scale.reshape(-1) if scale.ndim else scale)
        new = ir.node("DequantizeLinear", [integers, flat], attributes, name=node.name)
        graph.insert_before(node, new)
        name = output.name
        ir.convenience.replace_all_uses_with(output, new.outputs[0])
        graph.remove([node, cast], safe=True)
        new.outputs[0].name = name


class Expansion:
    """One model being expanded.

    Args:
        model: The model, which is changed.
        sidecar: Its sidecar, for the names of the dequantized tensors.
    """

    def __init__(self, model: ir.Model, sidecar: Sidecar) -> None:
        self.model, self.graph = model, model.graph
        self.reals = {tensor.integers: tensor.reals for tensor in sidecar.tensors.values()}
        self.parameters: dict[str, list[ir.Value | None]] = {}
        self.lookups = {layer.name for layer in sidecar.layers if layer.arithmetic == "lookup"}

    def run(self) -> ir.Model:
        """Expand every node in turn."""
        put_dequantizers(self.graph, self.reals)
        for node in list(self.graph):
            operator = FLOAT_OPERATORS.get((node.domain, node.op_type))
            if str(node.name) in self.lookups:
                continue
            if operator is not None:
                self.expand(node, *operator)
            elif node.op_type == "Clip" and (parameters := self.held(node.inputs[0])) is not None:
                # It keeps a tensor's integers within a narrower grid.
                self.parameters[str(node.outputs[0].name)] = parameters
            elif node.op_type not in EDGES and node.inputs and self.held(node.inputs[0]) is not None:
                self.expand_move(node)
            elif node.op_type == "QuantizeLinear":
                self.parameters[str(node.outputs[0].name)] = list(node.inputs[1:])
        return self.model

    def held(self, value: ir.Value | None) -> list[ir.Value | None] | None:
        """Return the scale and zero point that a value's integers were made with; None where it holds no integers."""
        if value is None:
            return None
        name = str(value.name)
        if name not in self.parameters and name in self.reals and value.is_initializer():
            found = self.read_with(value)
            if found is not None:
                self.parameters[name] = found
        return self.parameters.get(name)

    def read_with(self, value: ir.Value) -> list[ir.Value | None] | None:
        """Return the scale and zero point that the first reader of integers holds, behind operators that only move them."""
        for user, position in value.uses():
            operator = FLOAT_OPERATORS.get((user.domain, user.op_type))
            if operator is not None:
                operands, _, _ = operator[1].taken_apart(list(user.inputs))
                found = next(
                    (operands[i + 1 : i + 3] for i in range(0, len(operands), 3) if operands[i] is value), None
                )
            elif user.op_type == "DequantizeLinear":
                found = list(user.inputs[1:])
            else:
                found = self.read_with(user.outputs[0]) if position == 0 and user.outputs else None
            if found is not None:
                return found
        return None

    def expand(self, node: ir.Node, operator: str, entry: IntegerOperator) -> None:
        """Put a float operator in an integer one's place."""
        operands, bias, output = entry.taken_apart(list(node.inputs))
        triples = [operands[i : i + 3] for i in range(0, len(operands), 3)]
        inputs = [
            self.dequantized(node, integers, parameters, weight_axis(node, operator) if position == 1 else 0)
            for position, (integers, *parameters) in enumerate(triples)
        ]
        if bias is not None:
            inputs.append(self.dequantized(node, bias, [self.bias_scale(node, triples[0][1], triples[1][1])], 0))
        attributes = [attribute for name, attribute in node.attributes.items() if name != "opset"]
        self.put(node, operator, inputs, attributes, output)

    def expand_move(self, node: ir.Node) -> None:
        """Put an operator on real numbers in the place of one on integers."""
        parameters = self.held(node.inputs[0]) or []
        moved = self.dequantized(node, node.inputs[0], parameters, 0)
        plain = list(node.inputs[1:])
        if node.op_type == "Pad" and len(plain) > 1:
            plain[1] = None  # the zero point, which stands for zero
        self.put(node, node.op_type, [moved, *plain], list(node.attributes.values()), parameters)

    def dequantized(
        self, node: ir.Node, integers: ir.Value | None, parameters: list[ir.Value | None], axis: int
    ) -> ir.Value:
        """Return what a new DequantizeLinear before a node makes of integers."""
        scale = parameters[0].const_value if parameters and parameters[0] is not None else None
        attributes = {"axis": axis} if scale is not None and scale.size > 1 else {}
        new = ir.node("DequantizeLinear", [integers, *parameters], attributes)
        name = str(integers.name) if integers is not None else ""
        new.outputs[0].name = self.reals.get(name, f"{name}_real")
        self.graph.insert_before(node, new)
        return new.outputs[0]

    def bias_scale(self, node: ir.Node, x: ir.Value | None, w: ir.Value | None) -> ir.Value:
        """Return the scale that a bias has without saying so: float32(S_x · S_w), equation 8."""
        scales = [np.asarray(value.const_value) for value in (x, w) if value is not None]
        tensor = ir.tensor(np.asarray(scales[0] * scales[1], dtype=np.float32).reshape(-1), name=f"{node.name}_bias")
        value = ir.Value(name=tensor.name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def put(
        self,
        node: ir.Node,
        operator: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        attributes: list[ir.Attr],
        parameters: list[ir.Value | None],
    ) -> None:
        """Put an operator and the QuantizeLinear behind each of its outputs in a node's place, under the same names."""
        new = ir.Node("", operator, inputs, attributes, num_outputs=len(node.outputs), name=node.name)
        self.graph.insert_before(node, new)
        for made, old in zip(new.outputs, node.outputs, strict=True):
            if not parameters:  # the output stays real
                name = old.name
                ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
                old.name, made.name = None, name
                continue
            quantizer = ir.Node("", "QuantizeLinear", [made, *parameters], num_outputs=1)
            self.graph.insert_before(node, quantizer)
            made.name, quantizer.outputs[0].name = f"{old.name}_float", old.name
            self.parameters[str(old.name)] = parameters
            ir.convenience.replace_all_uses_with(old, quantizer.outputs[0], replace_graph_outputs=True)
        self.graph.remove(node, safe=True)


def weight_axis(node: ir.Node, operator: str) -> int:
    """Return the axis of a weight's output channels."""
    if operator == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 0 if operator == "Conv" else 1


def quantizer_before(node: ir.Node) -> ir.Node | None:
    """Return the QuantizeLinear whose integers a Clip keeps within fewer than their type has; None where there is none."""
    producer = node.inputs[0].producer() if node.op_type == "Clip" and node.inputs[0] is not None else None
    return producer if producer is not None and producer.op_type == "QuantizeLinear" else None
