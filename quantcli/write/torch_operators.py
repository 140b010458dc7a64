"""What the operators of a folded ONNX graph are in PyTorch: one row per operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantcli.write.torch_call import Call, Stored
from quantcli.write.torch_functions import (
    batch_norm,
    cast,
    einsum,
    elementwise,
    group_norm,
    instance_norm,
    layer_norm,
    reduced,
)
from quantcli.write.torch_layers import conv, conv_transpose, gemm, pool, recurrent
from quantcli.write.torch_moves import (
    concat,
    depth_to_space,
    expand,
    flatten,
    gather,
    pad,
    reshape,
    resize,
    slices,
    space_to_depth,
    split,
    squeeze,
    transpose,
    unsqueeze,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir


# Operators whose row gives all their outputs.
SEVERAL = frozenset({"GRU", "LSTM", "Split"})


def computed(node: ir.Node, inputs: list[Any], rows: Mapping[str, Callable[[Call], Any]]) -> Sequence[Any]:
    """Return what a node gives, output by output.

    Args:
        node: The operator.
        inputs: Its operands; None where one is left out.
        rows: What operators are in PyTorch (`operators`).

    Raises:
        OutputError: If it has no row.
    """
    call = Call(node, inputs)
    row = rows.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
    if row is None:
        raise call.unknown("it has no counterpart there")
    found = row(call)
    return found if node.op_type in SEVERAL else (found,)


# ---- integers ------------------------------------------------------------------------------------------------------------------


def parameters(call: Call) -> tuple[Any, Any, Any, int, int]:
    """Return the scale, zero point, dtype, and lowest and highest integer of what a node quantizes or dequantizes."""
    scale, zero_point = call.inputs[1], call.inputs[2] if len(call) > 2 else None
    if not isinstance(scale, Stored) or call.integer("block_size"):
        raise call.unknown("scales in blocks, or ones that are computed")
    quantizes = call.node.op_type == "QuantizeLinear"
    stored = zero_point.array.dtype if isinstance(zero_point, Stored) else None
    if stored is None:
        stored = np.dtype(np.uint8) if quantizes else np.dtype(str(call.tensor(0).dtype).removeprefix("torch."))
    bounds = np.iinfo(stored)
    return scale, zero_point, getattr(torch, stored.name), int(bounds.min), int(bounds.max)


def quantize(call: Call) -> Any:
    """QuantizeLinear: one scale."""
    scale, zero_point, dtype, lowest, highest = parameters(call)
    if scale.array.size != 1:
        raise call.unknown("one scale per channel of what is computed")
    zero = int(zero_point.array.reshape(-1)[0]) if zero_point is not None else 0
    real = float(scale.array.reshape(-1)[0])
    return torch.ops.quantized_decomposed.quantize_per_tensor(call.tensor(0), real, zero, lowest, highest, dtype)


def dequantize(call: Call) -> Any:
    """DequantizeLinear: one scale, or one per channel."""
    scale, zero_point, dtype, lowest, highest = parameters(call)
    x = call.tensor(0)
    if scale.array.ndim == 0:
        zero = int(zero_point.array) if zero_point is not None else 0
        real = float(scale.array)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(x, real, zero, lowest, highest, dtype)
    zeros = zero_point.tensor if zero_point is not None else torch.zeros(scale.array.shape, dtype=torch.int64)
    axis = call.integer("axis", 1) % max(x.ndim, 1)
    return torch.ops.quantized_decomposed.dequantize_per_channel(x, scale.tensor, zeros, axis, lowest, highest, dtype)


# ---- the table -----------------------------------------------------------------------------------------------------------------


def operators() -> dict[str, Callable[[Call], Any]]:
    """Return every row, by the operator's name."""
    return {
        **elementwise(),
        "ArgMax": lambda call: torch.argmax(call.tensor(0), call.integer("axis"), bool(call.integer("keepdims", 1))),
        "AveragePool": lambda call: pool(call, highest=False),
        "BatchNormalization": batch_norm,
        "Cast": cast,
        "Concat": concat,
        "Conv": conv,
        "ConvTranspose": conv_transpose,
        "DepthToSpace": depth_to_space,
        "DequantizeLinear": dequantize,
        "Einsum": einsum,
        "Expand": expand,
        "Flatten": flatten,
        "Gather": gather,
        "GatherElements": lambda call: torch.gather(call.tensor(0), call.integer("axis"), call.tensor(1)),
        "Gemm": gemm,
        "GlobalAveragePool": lambda call: call.tensor(0).mean(list(range(2, call.tensor(0).ndim)), keepdim=True),
        "GlobalMaxPool": lambda call: call.tensor(0).amax(list(range(2, call.tensor(0).ndim)), keepdim=True),
        "GRU": recurrent,
        "GroupNormalization": group_norm,
        "InstanceNormalization": instance_norm,
        "LSTM": recurrent,
        "LayerNormalization": layer_norm,
        "LogSoftmax": lambda call: torch.log_softmax(call.tensor(0), call.integer("axis", -1)),
        "MatMul": lambda call: call.tensor(0) @ call.tensor(1),
        "MaxPool": lambda call: pool(call, highest=True),
        "Pad": pad,
        "QuantizeLinear": quantize,
        "ReduceL2": reduced("norm"),
        "ReduceMax": reduced("amax"),
        "ReduceMean": reduced("mean"),
        "ReduceMin": reduced("amin"),
        "ReduceSum": reduced("sum"),
        "Reshape": reshape,
        "Resize": resize,
        "Shape": lambda call: tuple(call.tensor(0).shape)[call.integer("start") : call.integer("end", 2**31)],
        "Slice": slices,
        "Softmax": lambda call: torch.softmax(call.tensor(0), call.integer("axis", -1)),
        "SpaceToDepth": space_to_depth,
        "Split": split,
        "Squeeze": squeeze,
        "Tile": lambda call: call.tensor(0).repeat(call.numbers(1)),
        "Transpose": transpose,
        "Unsqueeze": unsqueeze,
    }
