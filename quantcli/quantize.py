"""Quantize: the plan's numbers applied to the model's constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.arithmetic import affine, tables
from quantcli.arithmetic.blocks import quantize_blocks
from quantcli.bounds import activation_bounds
from quantcli.errors import PlanError
from quantcli.fold import constant, unmapped
from quantcli.plan import INT32
from quantcli.rules import Arithmetic
from quantcli.steps import in_steps

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.plan import LayerPlan, Plan, TensorPlan


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A model in integers.

    Attributes:
        model: The folded float model that the plan speaks of, with the target's steps in place of single operators.
        plan: The plan, of those steps as well.
        constants: Weights, biases and constant operands as integers, by the names of the float tensors.
        tables: The lookup table of every table layer, by the layer's name: one entry per input integer, from qmin up; of a
            softmax its exponentials, one per distance from the largest input.
    """

    model: ir.Model
    plan: Plan
    constants: dict[str, NDArray[Any]]
    tables: dict[str, NDArray[Any]]


def quantize(model: ir.Model, plan: Plan) -> QuantizedModel:
    """Return the integers of every constant of the plan, and its tables, where the target has steps for a layer, of those.

    Args:
        model: The folded float model that the plan speaks of; it is not changed.
        plan: The plan.

    Raises:
        PlanError: If a bias does not fit int32 (the plan widens scales so that it does).
    """
    constants = {}
    for name, tensor in plan.tensors.items():
        if tensor.role != "activation":
            value = model.graph.initializers[name]
            constants[name] = quantized_constant(tensor, np.asarray(constant(value)))
            unmapped(value)
    model, plan, added = in_steps(model, plan)
    nodes = {str(node.name): node for node in model.graph}
    found = {layer.name: layer_table(layer, nodes[layer.name], plan) for layer in plan.layers if has_table(layer, plan)}
    return QuantizedModel(model, plan, constants | added, found)


def has_table(layer: LayerPlan, plan: Plan) -> bool:
    """Tell whether a layer looks its outputs up; a softmax that rounds like gemmlowp, on TFLite's grid, computes them instead."""
    if layer.arithmetic is Arithmetic.SOFTMAX:
        y = plan.tensors[layer.outputs[0]]
        return not (layer.rounding == "double" and (y.scale[0], y.zero_point[0]) == (2.0**-8, y.integer.qmin))
    return layer.arithmetic is Arithmetic.TABLE


def quantized_constant(tensor: TensorPlan, values: NDArray[Any]) -> NDArray[Any]:
    """Return a constant as integers of its planned type."""
    if tensor.blocks is not None:
        return quantize_blocks(values, tensor.blocks, tensor.integer)
    if tensor.role == "bias":
        # A bias stands at S_x·S_w; dividing in float64 by the stored float32 product keeps model and sidecar one network.
        scale = affine.along_axis(np.array(tensor.scale, dtype=np.float64), 1, tensor.axis)
        q = np.rint(values.reshape(-1).astype(np.float64) / scale)
        if np.abs(q).max(initial=0) > INT32.qmax:
            raise PlanError(f"the bias '{tensor.name}' does not fit int32 at its scale", "exclude its layer")
        return np.asarray(q, dtype=np.int32)
    scale = np.array(tensor.scale, dtype=np.float32)
    if not tensor.lowest:
        return affine.quantize(values, scale, np.array(tensor.zero_point), tensor.integer, tensor.axis)
    zero_point = tensor.integer.qmin - np.array(tensor.lowest)
    held = affine.quantize(values, scale, zero_point, tensor.integer, tensor.axis)
    return np.asarray(held - affine.along_axis(zero_point, values.ndim, tensor.axis), dtype=tensor.integer.dtype)


def layer_table(layer: LayerPlan, node: ir.Node, plan: Plan) -> NDArray[Any]:
    """Return the lookup table of an element-wise layer, or the exponentials of a softmax."""
    x, y = plan.tensors[layer.inputs[0]], plan.tensors[layer.outputs[0]]
    if layer.arithmetic is Arithmetic.SOFTMAX:
        return tables.exponentials((x.integer, np.float32(x.scale[0])))
    parameters = table_parameters(node)
    return tables.table(
        layer.operator,
        parameters,
        (x.integer, np.float32(x.scale[0]), x.zero_point[0]),
        (y.integer, np.float32(y.scale[0]), y.zero_point[0]),
    )


def table_parameters(node: ir.Node) -> dict[str, float]:
    """Return the attributes that an element-wise function reads, with ONNX's defaults."""
    if node.op_type == "Clip":
        low, high = activation_bounds(node)
        return {"min": low, "max": high}
    if node.op_type == "Gelu":
        return {"tanh": float(node.attributes.get_string("approximate", "none") == "tanh")}
    defaults = tables.ATTRIBUTES.get(node.op_type, {})
    return {key: node.attributes.get_float(key, default) for key, default in defaults.items()}
