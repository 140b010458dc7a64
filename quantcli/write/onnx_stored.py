"""Write stored weights so that ONNX Runtime makes them float once, when it loads a model.

It leaves a DequantizeLinear of constants where it stands, and runs it whenever the model runs; kernels cannot lay such weights out
beforehand either. A Cast and a Mul of constants it computes at loading. They give the same floats: integers of up to 16 bits are
exact in float32, and the product with the scale is rounded once in either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant, constant
from quantcli.rules import Arithmetic
from quantcli.write.onnx_qdq import UNSCALED, free_mark, tensor_names

if TYPE_CHECKING:
    from quantcli.plan import TensorPlan
    from quantcli.quantize import QuantizedModel


def fold_at_load(model: ir.Model, quantized: QuantizedModel) -> None:
    """Put Cast and Mul in place of DequantizeLinear behind the weights of layers that store them.

    Weights in blocks, and MatMul's of 8 bits, keep it: the runtime has a kernel that reads them as they are (MatMulNBits). So do
    those that an integer layer reads as well.

    Args:
        model: The written model, which is changed.
        quantized: What was written.
    """
    plan, names, mark = quantized.plan, tensor_names(quantized), free_mark(quantized)
    stored: dict[str, TensorPlan] = {}
    kinds = {Arithmetic.STORED, Arithmetic.DYNAMIC}  # of the latter only bodies (of If, Loop, Scan) have reals
    integers = {name for layer in plan.layers if layer.arithmetic not in kinds for name in layer.inputs}
    for layer in plan.layers:
        for name in layer.inputs if layer.arithmetic in kinds and integers.isdisjoint(layer.inputs) else ():
            if plan.tensors[name].blocks is None:
                stored[names[name]["reals"]] = plan.tensors[name]
    for node in list(model.graph):
        tensor = stored.get(str(node.outputs[0].name)) if node.op_type == "DequantizeLinear" else None
        if tensor is None:
            continue
        readers = {reader.op_type for reader in node.outputs[0].consumers() if reader.graph is model.graph}
        if tensor.integer.bits > 8 or readers != {"MatMul"}:
            multiplied(node, tensor, model.graph, mark)


def multiplied(node: ir.Node, tensor: TensorPlan, graph: ir.Graph, mark: str) -> None:
    """Put Cast and Mul in place of a DequantizeLinear whose zero points are zero."""
    integers, output = node.inputs[0], node.outputs[0]
    scale, zero_points = node.inputs[1:3]
    rank = np.asarray(constant(integers)).ndim if tensor.axis is not None else 0
    shape = [-1 if axis == tensor.axis else 1 for axis in range(rank)]
    held = np.array(tensor.scale, dtype=np.float32).reshape(shape)
    graph.initializers.pop(str(scale.name))  # type: ignore[union-attr]
    scale = add_constant(graph, str(scale.name), held)  # type: ignore[union-attr]
    cast = ir.node("Cast", [integers], {"to": int(ir.DataType.FLOAT)}, name=f"{tensor.name}{UNSCALED}{mark}")
    cast.outputs[0].name = cast.name
    product = ir.node("Mul", [cast.outputs[0], scale], name=node.name)
    graph.insert_before(node, [cast, product])
    ir.convenience.replace_all_uses_with(output, product.outputs[0])
    graph.remove(node, safe=True)
    product.outputs[0].name = output.name
    if zero_points is not None and not zero_points.uses():
        graph.initializers.pop(str(zero_points.name))
