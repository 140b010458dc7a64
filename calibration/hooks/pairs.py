"""Where ONNX Runtime's integer kernels saturate, and how to have what ONNX says all the same.

On x86-64 without VNNI they multiply uint8 by int8 with an instruction that adds the products of two neighbours in 16 bits, where
they saturate: 2 · 255 · 127 is 64770 and becomes 32767. So a model gives other integers there than ONNX says
(MatMulInteger and QLinearConv accumulate in 32 bits). Products of uint8 by uint8 are widened first, and so are those of depthwise
convolutions. So a model whose weights are stored as uint8, 128 above what they were, with zero points 128 above theirs, gives what
ONNX says of it, exactly, and somewhat slower.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx
    from numpy.typing import NDArray

# By operator: where its weight stands among its inputs, that one's zero point, and the other operand's.
WEIGHTS = {
    "DequantizeLinear": (0, 2, None),
    "QLinearConv": (3, 5, 2),
    "QLinearMatMul": (3, 5, 2),
    "QGemm": (3, 5, 2),
    "MatMulInteger": (1, 3, 2),
    "ConvInteger": (1, 3, 2),
    "DynamicQuantizeMatMul": (1, 3, None),
    "MatMulIntegerToFloat": (1, 5, 4),
}
# Where a DequantizeLinear's scales stand, whose shape its zero points have.
SCALES = 1
SHIFT = 128
# How many products are added up to try a kernel: more than one vector of them.
TERMS = 64


@functools.cache
def saturates() -> bool:
    """Return whether products of uint8 and int8 are added in pairs of 16 bits here, by the largest ones there are."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights = np.full((TERMS, TERMS), 127, dtype=np.int8)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    given, made = (
        helper.make_tensor_value_info(name, kind, [TERMS, TERMS])
        for name, kind in (("x", TensorProto.UINT8), ("y", TensorProto.INT32))
    )
    graph = helper.make_graph([node], "pairs", [given], [made], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((TERMS, TERMS), 255, dtype=np.uint8)})
    return bool((found != TERMS * 255 * 127).any())


def exact(model: bytes | Path) -> bytes | Path:
    """Return what gives what ONNX says of a quantized model: itself, or where kernels saturate, the same with other integers.

    Args:
        model: Its bytes, or its file; a model of several files is returned as it is.
    """
    if not saturates():
        return model
    return shifted(model.read_bytes() if isinstance(model, Path) else model) or model


def shifted(data: bytes) -> bytes | None:
    """Return a quantized model with its int8 weights stored as uint8, 128 above: the same model, for kernels that do not saturate.

    Args:
        data: The bytes of an ONNX model.

    Returns:
        Its bytes; None where some of its weights lie in another file.
    """
    import onnx

    model = onnx.load_model_from_string(data)
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in held.values()):
        return None
    for node in list(nodes_of(model.graph)):
        if node.op_type in WEIGHTS and not any(one.name == "block_size" and one.i for one in node.attribute):
            shift(node, held, model.graph)
    moved: bytes = model.SerializeToString()
    return moved


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the graphs within them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_of(inner)


def shift(node: onnx.NodeProto, held: dict[str, onnx.TensorProto], graph: onnx.GraphProto) -> None:
    """Let an operator read its int8 weight as uint8, where that is a constant and what it meets is no int8 itself."""
    from onnx import TensorProto

    weight, zero, other = WEIGHTS[node.op_type]
    values = held.get(input_of(node, weight))
    if values is None or values.data_type != TensorProto.INT8:
        return
    beside = held.get(input_of(node, other)) if other is not None else None
    if beside is not None and beside.data_type != TensorProto.UINT8:
        return
    point, scales = held.get(input_of(node, zero)), held.get(input_of(node, SCALES))
    if input_of(node, zero) and point is None:
        return
    shape = tuple(scales.dims) if node.op_type == "DequantizeLinear" and scales is not None else ()
    zeros = array_of(point) if point is not None else np.zeros(shape, dtype=np.int8)
    node.input.extend([""] * (zero + 1 - len(node.input)))
    node.input[weight] = kept(values.name, array_of(values), held, graph)
    node.input[zero] = kept(
        point.name if point is not None else f"{values.name}/{zeros.size}_zeros", zeros, held, graph
    )


def input_of(node: onnx.NodeProto, position: int) -> str:
    """Return the name of a node's input; an empty one where it has none."""
    return node.input[position] if position < len(node.input) else ""


def array_of(tensor: onnx.TensorProto) -> NDArray[np.int8]:
    """Return a constant's integers."""
    from onnx import numpy_helper

    found: NDArray[np.int8] = numpy_helper.to_array(tensor)
    return found


def kept(name: str, values: NDArray[np.int8], held: dict[str, onnx.TensorProto], graph: onnx.GraphProto) -> str:
    """Put int8 values into a graph as uint8, once, and return their name there."""
    from onnx import numpy_helper

    found = f"{name}/uint8"
    if found not in held:
        held[found] = numpy_helper.from_array((values.astype(np.int16) + SHIFT).astype(np.uint8), found)
        graph.initializer.append(held[found])
    return found
