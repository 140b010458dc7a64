"""Islands: one node of a graph by itself, run in ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from quantcli.fold import constant

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray


def captured(node: ir.Node) -> list[ir.Value]:
    """Return the values of the outer graph that a node's bodies (of If, Loop, Scan) read, each once."""
    found: dict[ir.Value, None] = {}
    for attribute in node.attributes.values():
        if attribute.type is not ir.AttributeType.GRAPH:
            continue
        body = attribute.value
        inner = {*body.inputs, *body.initializers.values(), *(value for n in body.all_nodes() for value in n.outputs)}
        read = [*(value for n in body.all_nodes() for value in n.inputs), *body.outputs]
        for n in body.all_nodes():  # bodies within the body bring inputs of their own
            inner.update(v for a in n.attributes.values() if a.type is ir.AttributeType.GRAPH for v in a.value.inputs)
            inner.update(
                v
                for a in n.attributes.values()
                if a.type is ir.AttributeType.GRAPH
                for v in a.value.initializers.values()
            )
        found.update(dict.fromkeys(value for value in read if value is not None and value not in inner))
    return list(found)


def declared(node: ir.Node, array: NDArray[Any]) -> list[int | None]:
    """Return the shape that an input is declared with: free, but for the rows of sizes that Resize has to know the length of."""
    return [array.size] if node.op_type == "Resize" and array.ndim == 1 else [None] * array.ndim


def single_node(
    node: ir.Node, given: list[NDArray[Any] | None], model: ir.Model, fixed: Collection[int] = ()
) -> Callable[[list[NDArray[Any] | None]], list[NDArray[Any]]]:
    """Return a function that runs one node in ONNX Runtime, given its inputs and what its bodies read of the graph around it.

    Args:
        node: The node.
        given: The first inputs.
        model: The model that it stands in.
        fixed: Positions of inputs that stay what they are: kernels that know a weight beforehand are up to ten times faster.
    """
    import onnx
    import onnxruntime

    values = [*node.inputs, *captured(node)]
    # Sizes, axes and their like are looked at while a model is loaded; they are given as constants.
    held = {
        str(value.name): stored
        for value in node.inputs
        if value is not None and (stored := constant(value)) is not None and stored.dtype.kind in "iub"
    }
    held |= {str(value.name): given[at] for at in fixed if (value := node.inputs[at]) is not None}  # type: ignore[misc]
    types = {
        str(value.name): onnx.helper.make_tensor_value_info(
            str(value.name), int(ir.DataType.from_numpy(array.dtype)), declared(node, array)
        )
        for value, array in zip(values, given, strict=True)
        if value is not None and array is not None and str(value.name) not in held
    }
    made = [onnx.ValueInfoProto(name=str(value.name)) for value in node.outputs if value.name]
    constants = [onnx.numpy_helper.from_array(stored, name) for name, stored in held.items()]
    proto = onnx.GraphProto(
        name="island", node=[ir.to_proto(node)], input=list(types.values()), output=made, initializer=constants
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    data = onnx.ModelProto(graph=proto, opset_import=opsets, ir_version=model.ir_version).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(arrays: list[NDArray[Any] | None]) -> list[NDArray[Any]]:
        feeds = {
            str(value.name): np.ascontiguousarray(array).reshape(array.shape)
            for value, array in zip(values, arrays, strict=True)
            if value is not None and array is not None and str(value.name) not in held
        }
        results: list[NDArray[Any]] = session.run(None, feeds)
        return results

    return run
