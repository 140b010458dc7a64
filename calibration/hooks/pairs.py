"""Where ONNX Runtime's integer kernels saturate, and how to have what ONNX says all the same.

On x86-64 without VNNI they multiply uint8 by int8 with an instruction that adds the products of two neighbours in 16 bits, where
they saturate: 2 · 255 · 127 is 64770 and becomes 32767. So a model gives other integers there than ONNX says
(MatMulInteger and QLinearConv accumulate in 32 bits). Products of uint8 by uint8 are widened first, and so are those of depthwise
convolutions. So a model whose weights are stored as uint8, 128 above what they were, with zero points 128 above theirs, gives what
ONNX says of it, exactly, and somewhat slower. Where two int8 operands meet, QuantizeLinear and DequantizeLinear are run as they
stand, around float kernels.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx
    from numpy.typing import NDArray

# By operator: where its weights stand among its inputs, their zero points, and the other operand's.
WEIGHTS = {
    "QLinearConv": ((3, 5, 2),),
    "QLinearMatMul": ((3, 5, 2),),
    "QGemm": ((3, 5, 2),),
    "MatMulInteger": ((1, 3, 2),),
    "ConvInteger": ((1, 3, 2),),
    "MatMulIntegerToFloat": ((1, 5, 4),),
    "DynamicQuantizeMatMul": ((1, 3, None),),
    "DynamicQuantizeLSTM": ((1, 9, None), (2, 11, None)),
}
# What stands in the bytes of every quantized model: its operators' names, or parts of them.
QUANTIZED = (b"DequantizeLinear", b"QLinear", b"QGemm", b"Integer", b"DynamicQuantize")
# A session's setting by which it does not make integer operators of QuantizeLinear and DequantizeLinear.
AS_IT_STANDS = "session.disable_quant_qdq"
# The most bytes that a model can have in one message.
LARGEST = (1 << 31) - (1 << 20)
SHIFT = 128
# How the names of shifted constants end.
SHIFTED = "/uint8"
# What is said of such a machine.
SAYS = "this machine's ONNX Runtime adds 8-bit products in pairs of 16 bits, where they saturate (x86 without VNNI)"
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


def exact(model: bytes | Path, options: Any) -> bytes | Path:
    """Return what gives what ONNX says of a quantized model: itself, or where kernels saturate, the same with other integers.

    Args:
        model: Its bytes, or its file; of more than 2 GB, or of bytes whose weights lie elsewhere, it is returned as it is.
        options: The options of its session, which are changed where that is what it takes.
    """
    if not saturates():
        return model
    import onnx

    data = model if isinstance(model, bytes) else model.read_bytes()
    if not any(name in data for name in QUANTIZED):
        return model
    held = onnx.load_model_from_string(data)
    if makes_signed(held):
        as_it_stands(options)
    if any(map(lies_elsewhere, held.graph.initializer)):
        if isinstance(model, bytes) or sum(map(bytes_elsewhere, held.graph.initializer)) > LARGEST:
            as_it_stands(options)
            return model
        onnx.load_external_data_for_model(held, str(model.parent))
    shift_weights(held)
    moved: bytes = held.SerializeToString()
    return moved


def as_it_stands(options: Any) -> None:
    """Have a session make no integer operators of a model in QDQ form."""
    options.add_session_config_entry(AS_IT_STANDS, "1")


def makes_signed(model: onnx.ModelProto) -> bool:
    """Tell whether a model quantizes something to int8: products of two such operands saturate, too."""
    from onnx import TensorProto

    signed = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8}
    return any(node.op_type == "QuantizeLinear" and input_of(node, 2) in signed for node in nodes_of(model.graph))


def lies_elsewhere(tensor: onnx.TensorProto) -> bool:
    """Tell whether a constant lies in another file."""
    from onnx import TensorProto

    return bool(tensor.data_location == TensorProto.EXTERNAL)


def bytes_elsewhere(tensor: onnx.TensorProto) -> int:
    """Return how many bytes of another file a constant takes."""
    return sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")


def shift_weights(model: onnx.ModelProto) -> None:
    """Store a quantized model's int8 weights as uint8, 128 above, where they meet uint8: it stays the same model."""
    from onnx import TensorProto

    held = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(nodes_of(model.graph))
    makers = {name: node for node in nodes for name in node.output}
    for node in nodes:
        for weight, zero, other in WEIGHTS.get(node.op_type, ()):
            beside = held.get(input_of(node, other)) if other is not None else None
            if beside is None or beside.data_type == TensorProto.UINT8:
                maker = makers.get(input_of(node, weight))
                turned = maker is not None and maker.op_type == "Transpose"
                shift(node, zero, (maker, 0) if maker is not None and turned else (node, weight), held, model.graph)
        operands = [makers.get(name) for name in node.input[:2]]
        for w, x in zip(operands, reversed(operands), strict=True):
            if w is not None and w.op_type == "DequantizeLinear" and of_uint8(x, held):
                shift(w, 2, (w, 0), held, model.graph)
    behind = {name for node in nodes if node.op_type == "Transpose" for name in node.output}
    for stated in [value for value in model.graph.value_info if value.name in behind]:
        model.graph.value_info.remove(stated)
    model.ir_version = max(model.ir_version, 4)  # before, constants are inputs as well


def of_uint8(node: onnx.NodeProto | None, held: dict[str, onnx.TensorProto]) -> bool:
    """Tell whether an operator is a DequantizeLinear of uint8."""
    from onnx import TensorProto

    point = held.get(input_of(node, 2)) if node is not None and node.op_type == "DequantizeLinear" else None
    return point is not None and bool(point.data_type == TensorProto.UINT8)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph and of the graphs within them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_of(inner)


def shift(
    node: onnx.NodeProto,
    zero: int,
    read: tuple[onnx.NodeProto, int],
    held: dict[str, onnx.TensorProto],
    graph: onnx.GraphProto,
) -> None:
    """Let an operator read its int8 weight as uint8, where that and its zero point are constants.

    Args:
        node: The operator.
        zero: Where its weight's zero point stands among its inputs.
        read: What reads the weight, which may be a Transpose before it, and where.
        held: The graph's constants.
        graph: The graph.
    """
    from onnx import TensorProto

    values, point = held.get(input_of(*read)), held.get(input_of(node, zero))
    if values is None or (input_of(node, zero) and (point is None or point.data_type != TensorProto.INT8)):
        return
    if values.data_type == TensorProto.INT8:
        read[0].input[read[1]] = kept(values.name, array_of(values), held, graph)
    elif not values.name.endswith(SHIFTED):
        return
    zeros = array_of(point) if point is not None else np.zeros((), dtype=np.int8)
    node.input.extend([""] * (zero + 1 - len(node.input)))
    node.input[zero] = kept(point.name if point is not None else f"{values.name}/zero", zeros, held, graph)


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

    found = f"{name}{SHIFTED}"
    if found not in held:
        held[found] = numpy_helper.from_array((values.astype(np.int16) + SHIFT).astype(np.uint8), found)
        graph.initializer.append(held[found])
    return found
