"""Write products whose activations are quantized while the model runs: DynamicQuantizeLinear and MatMulInteger or ConvInteger.

In this form ONNX Runtime fuses them (DynamicQuantizeMatMul, MatMulIntegerToFloat). For an LSTM it has one operator of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant
from quantcli.integer_operators import MICROSOFT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantcli.plan import TensorPlan


# The inputs of an LSTM; those of DynamicQuantizeLSTM go on with scales and zero points of both weights.
LSTM_INPUTS = 8


class DynamicProducts:
    """The products of one graph that are being rewritten.

    Args:
        graph: The graph.
        mark: What the names that are added end with.
    """

    def __init__(self, graph: ir.Graph, mark: str) -> None:
        self.graph, self.mark = graph, mark
        self.quantizers: dict[ir.Value, ir.Node] = {}
        self.turned: dict[str, list[ir.Value]] = {}

    def rewrite(self, node: ir.Node, stored: ir.Value, tensor: TensorPlan) -> None:
        """Put an integer product in the place of a MatMul, Gemm or Conv.

        Args:
            node: The operator; its weight is (inputs, outputs), or (outputs, inputs, …) of a Conv.
            stored: The weight's integers.
            tensor: Their parameters.
        """
        x, output, name = node.inputs[0], node.outputs[0], str(node.outputs[0].name)
        assert x is not None  # noqa: S101 - a product has a first operand
        conv = node.op_type == "Conv"
        quantizer = self.quantizer(x)
        shape = (-1, *(1,) * (len(stored.shape or ()) - 2)) if conv else (-1,)
        scale = self.constant(f"{tensor.name}_scale", np.array(tensor.scale, np.float32).reshape(shape))
        zeros = np.zeros((), np.int8) if conv or len(tensor.scale) == 1 else np.zeros(len(tensor.scale), np.int8)
        zero_point = self.constant(f"{tensor.name}_zero_point", zeros)
        operands = [quantizer.outputs[0], stored, quantizer.outputs[2], zero_point]
        attributes = list(node.attributes.values()) if conv else []
        product = ir.Node("", "ConvInteger" if conv else "MatMulInteger", operands, attributes, num_outputs=1)
        cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT.value})
        factor = ir.node("Mul", [quantizer.outputs[1], scale])
        nodes = [product, cast, factor, ir.node("Mul", [cast.outputs[0], factor.outputs[0]])]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], self.shaped(bias, conv, shape)]))
        for new, part in zip(nodes, ("integers", "reals", "factor", "scaled", "sum"), strict=False):
            new.name = f"{node.name}_{part}{self.mark}"
            new.outputs[0].name = f"{name}_{part}{self.mark}"
        product.name = node.name
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], nodes, [output], [nodes[-1].outputs[0]])

    def recur(self, node: ir.Node, weights: list[tuple[ir.Value, TensorPlan]]) -> None:
        """Put DynamicQuantizeLSTM (of ONNX Runtime's own operators) in the place of an LSTM.

        Args:
            node: The operator; its weights W and R are (directions, gates · hidden, inputs).
            weights: The integers of W and R, with their parameters; the directions share their scales.
        """
        inputs = [*node.inputs, *[None] * (LSTM_INPUTS - len(node.inputs))]
        for position, (stored, tensor) in enumerate(weights, 1):
            if tensor.name not in self.turned:  # LSTMs may share a weight
                self.turned[tensor.name] = self.turn(node, stored, tensor)
            inputs[position], *parameters = self.turned[tensor.name]
            inputs += parameters
        attributes = [attribute for name, attribute in node.attributes.items() if name != "layout"]
        made = ir.Node(
            MICROSOFT, "DynamicQuantizeLSTM", inputs, attributes, num_outputs=len(node.outputs), name=node.name
        )
        for old, new in zip(node.outputs, made.outputs, strict=True):
            new.name = old.name
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], [made], node.outputs, made.outputs)

    def turn(self, reader: ir.Node, stored: ir.Value, tensor: TensorPlan) -> list[ir.Value]:
        """Return a recurrent weight with the inputs before the gates, as the kernel wants it, its scales and its zero points.

        ONNX Runtime transposes it once, as it loads the model.
        """
        turned = ir.node("Transpose", [stored], {"perm": [0, 2, 1]}, name=f"{tensor.name}_transposed{self.mark}")
        turned.outputs[0].name = f"{tensor.name}_transposed{self.mark}"
        turned.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        self.graph.insert_before(reader, turned)
        scale = np.tile(np.array(tensor.scale, np.float32), (np.asarray(stored.const_value).shape[0], 1))
        zeros = np.zeros(scale.shape, np.int8)
        constants = (("scale", scale), ("zero_point", zeros))
        return [turned.outputs[0], *(self.constant(f"{tensor.name}_{part}", array) for part, array in constants)]

    def quantizer(self, value: ir.Value) -> ir.Node:
        """Return the DynamicQuantizeLinear of an activation, made once for all its readers."""
        if value not in self.quantizers:
            node = ir.node("DynamicQuantizeLinear", [value], num_outputs=3, name=f"{value.name}_quantizer{self.mark}")
            for made, part in zip(node.outputs, ("quantized", "scale", "zero_point"), strict=True):
                made.name = f"{value.name}_{part}{self.mark}"
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(producer, node)
            self.quantizers[value] = node
        return self.quantizers[value]

    def shaped(self, bias: ir.Value, conv: bool, shape: tuple[int, ...]) -> ir.Value:
        """Return a bias that can be added: one value per channel of a convolution stands before its spatial axes."""
        if not conv or bias.const_value is None:
            return bias
        return self.constant(f"{bias.name}_addend", bias.const_value.numpy().reshape(shape))

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Register a constant."""
        return add_constant(self.graph, f"{name}{self.mark}", array)
