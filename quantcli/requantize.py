"""Make a quantized model a float one again, so that it can be quantized anew.

Integers that are constant become the reals that they stand for. An activation's QuantizeLinear and DequantizeLinear become a Clip
to the range of the grid: rounding is undone, saturation is not, since it may have taken the place of a ReLU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from quantcli.errors import ModelError
from quantcli.fold import add_constant, constant
from quantcli.integer.expand import Expansion, quantizer_before

if TYPE_CHECKING:
    from numpy.typing import NDArray

EDGES = ("QuantizeLinear", "DequantizeLinear")


def float_again(model: ir.Model) -> ir.Model:
    """Return a float copy of a model that holds QuantizeLinear, DequantizeLinear and integer operators.

    Raises:
        ModelError: If it holds an integer operator that has no float counterpart here.
    """
    copy = Expansion(model.clone(), SimpleNamespace(tensors={}, layers=[])).run()  # type: ignore[arg-type]
    graph = copy.graph
    for node in list(graph):
        if node.op_type == "DequantizeLinear":
            dequantized(node, graph)
    for node in reversed(list(graph)):  # a Clip of integers before the QuantizeLinear that it stands behind
        unread = not node.outputs[0].uses() and not node.outputs[0].is_graph_output()
        if unread and (node.op_type == "QuantizeLinear" or quantizer_before(node) is not None):
            graph.remove(node, safe=True)
    return copy


def dequantized(node: ir.Node, graph: ir.Graph) -> None:
    """Put reals in the place of a DequantizeLinear.

    Raises:
        ModelError: If its integers come from an operator that is not known.
    """
    source, output = node.inputs[0], node.outputs[0]
    scale = constant(node.inputs[1])
    producer = source.producer() if source is not None else None
    held, within = constant(source), None
    if producer is not None and (quantizer := quantizer_before(producer)) is not None:
        producer, within = quantizer, (constant(producer.inputs[1]), constant(producer.inputs[2]))
    if scale is None:
        raise ModelError(f"the scale of '{node.name}' is not constant", "convert the float model")
    if held is not None and source is not None:
        zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        reals = of_integers(held, scale, zero_point, node)
        replace(node, add_constant(graph, f"{output.name}_reals", reals), graph)
    elif producer is not None and producer.op_type == "QuantizeLinear" and producer.inputs[0] is not None:
        low, high = saturation(producer, source, within)
        bounds = [add_constant(graph, f"{output.name}_{name}", value) for name, value in (("low", low), ("high", high))]
        clip = ir.node("Clip", [producer.inputs[0], *bounds], name=f"{node.name or output.name}_clip")
        graph.insert_before(node, clip)
        replace(node, clip.outputs[0], graph)
    else:
        what = producer.op_type if producer is not None else "a model input"
        raise ModelError(
            f"'{node.name}' dequantizes what {what} gives, which cannot be undone", "convert the float model"
        )


def of_integers(
    held: NDArray[Any], scale: NDArray[Any], zero_point: NDArray[Any] | None, node: ir.Node
) -> NDArray[np.float32]:
    """Return constant integers as reals: (q − z)·s, with one scale, one per channel, or one per block (ONNX DequantizeLinear)."""
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    offset = np.zeros_like(scale, dtype=np.float32) if zero_point is None else zero_point.astype(np.float32)
    factor = scale.astype(np.float32)
    if block:
        size = held.shape[axis]
        factor, offset = (np.repeat(part, block, axis=axis).take(range(size), axis=axis) for part in (factor, offset))
    elif factor.size > 1:
        shape = [1] * held.ndim
        shape[axis] = -1
        factor, offset = factor.reshape(shape), offset.reshape(shape)
    else:
        factor, offset = factor.reshape(()), offset.reshape(())
    return np.asarray((held.astype(np.float32) - offset) * factor, dtype=np.float32)


def saturation(
    quantizer: ir.Node, integers: ir.Value | None, within: tuple[NDArray[Any] | None, NDArray[Any] | None] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the lowest and the highest real that a QuantizeLinear lets through.

    Args:
        quantizer: The QuantizeLinear.
        integers: What it gives.
        within: The lowest and the highest of its integers, where a Clip keeps them within fewer than their type has.

    Raises:
        ModelError: If its parameters are computed, or differ by channel.
    """
    scale = constant(quantizer.inputs[1])
    zero_point = constant(quantizer.inputs[2]) if len(quantizer.inputs) > 2 else np.zeros((), np.uint8)
    if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
        raise ModelError(
            f"the scale of '{quantizer.name}' is computed, or one per channel, which cannot be undone",
            "convert the float model",
        )
    kind = (integers.dtype.numpy() if integers is not None and integers.dtype is not None else None) or zero_point.dtype
    limits = np.iinfo(kind if np.dtype(kind).kind in "iu" else zero_point.dtype)
    ends = [int(limits.min), int(limits.max)]
    if within is not None:
        ends = [end if bound is None else int(bound.item()) for end, bound in zip(ends, within, strict=True)]
    step, middle = np.float32(scale.reshape(())), int(zero_point.reshape(()))
    low, high = (np.asarray(np.float32(end - middle) * step, np.float32) for end in ends)
    return low, high


def replace(node: ir.Node, value: ir.Value, graph: ir.Graph) -> None:
    """Let a value take a node's output's place and, where it is computed, its name."""
    output = node.outputs[0]
    name, shape, kind = output.name, output.shape, output.type
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if value.producer() is not None:
        value.name, value.shape, value.type = name, shape, kind
