"""Integer layers that ONNX Runtime computes in float, since it found no integer kernel for what stands there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from quantcli.rules import Arithmetic

if TYPE_CHECKING:
    from pathlib import Path

    from quantcli.sidecar import Sidecar

# The operators of its float kernels, in the graph that it has optimized.
FLOAT_KERNELS = frozenset({
    "Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "NhwcFusedConv",
})  # fmt: skip
# What ends the names of convolutions in its blocked layout.
BLOCKED = "_nchwc"


def unfused(optimized: Path, sidecar: Sidecar) -> tuple[str, ...]:
    """Return the names of the integer layers that multiply and accumulate, all in 8 bits or less, and that are computed in float.

    Args:
        optimized: The file of the graph as ONNX Runtime has optimized it. Fused nodes have the name of the first of them, or of
            what the last of them gave.
        sidecar: The sidecar of the model.
    """
    layers = {}
    for layer in sidecar.layers:
        held = [sidecar.tensors[name] for name in (*layer.inputs, *layer.outputs) if name in sidecar.tensors]
        wide = any(tensor.role != "bias" and tensor.dtype not in {"int8", "uint8"} for tensor in held)
        if layer.arithmetic == Arithmetic.ACCUMULATE.value and not wide:
            layers.update(dict.fromkeys((layer.name, *layer.absorbed, *layer.outputs), layer.name))
    found: dict[str, None] = {}
    for node in ir.load(optimized).graph:
        names = (str(node.name), str(node.name).removesuffix(BLOCKED), *(str(value.name) for value in node.outputs))
        if node.op_type in FLOAT_KERNELS:
            found.update({layers[name]: None for name in names if name in layers})
    return tuple(found)
