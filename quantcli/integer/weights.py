"""Verify a model of dynamic or float activations: its integers, scales and zero points are those that the sidecar states."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.integer.expand import put_dequantizers
from quantcli.integer.stated import Finding, differences, digest_findings, reader_of
from quantcli.integer.verify import Verification

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.integer.held import Held
    from quantcli.sidecar import LayerEntry, Sidecar, TensorEntry


# Where DynamicQuantizeLSTM has the scales of its two weights.
LSTM_SCALES = (8, 10)


def verify_weights(quantized: Held, sidecar: Sidecar) -> Verification:
    """Compare everything that a sidecar says of weights with what the model holds; integers and floats with ==.

    Args:
        quantized: The quantized model.
        sidecar: Its sidecar.
    """
    result, graph = Verification(), quantized.model.clone().graph
    put_dequantizers(graph, {tensor.integers: tensor.reals for tensor in sidecar.tensors.values()})
    result.findings.extend(digest_findings(quantized, sidecar))
    stored = {
        name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value is not None
    }
    nodes = {str(node.name): node for node in graph}
    for name, tensor in sidecar.tensors.items():
        result.findings.extend(tensor_findings(name, tensor, stored, reader_of(sidecar, name)))
        held = stored.get(tensor.integers)
        result.elements += 0 if held is None else held.size
    for entry in sidecar.layers:
        node = nodes.get(entry.name)
        if node is None:
            result.findings.append(Finding(entry.name, "the model has no operator of that name"))
            continue
        result.names.add(entry.name)
        for name, scale in scales_of(entry, node, sidecar):
            held = None if scale is None else stored.get(str(scale.name))
            if held is not None and held.ndim == 2 and (held == held[0]).all():
                held = held[0]  # the directions of a recurrent operator share their scales
            result.findings.extend(differences(entry.name, f"scale of '{name}'", held, sidecar.tensors[name].scale))
    return result


def tensor_findings(name: str, tensor: TensorEntry, stored: dict[str, NDArray[Any]], layer: str) -> Iterator[Finding]:
    """Compare a weight's digests: of its integers and, of one in blocks, of its parameters."""
    held = stored.get(tensor.integers)
    if held is None or digest_of(unpacked(held)) != tensor.sha256:
        yield Finding(layer, f"the integers of '{name}' are not those that the sidecar was written for")
    if tensor.blocks is not None:
        parts = [stored.get(part) for part in (tensor.blocks.scale, tensor.blocks.zero_point) if part is not None]
        found = [unpacked(part) for part in parts if part is not None]
        if len(found) != len(parts) or digest_of(*found) != tensor.blocks.sha256:
            yield Finding(layer, f"the scales of '{name}' are not those that the sidecar was written for")


def unpacked(array: NDArray[Any]) -> NDArray[Any]:
    """Return integers of 4 bits one to a byte, others as they are."""
    kind = array.dtype.name
    return array.astype(np.uint8 if kind == "uint4" else np.int8) if kind in {"uint4", "int4"} else array


def digest_of(*arrays: NDArray[Any]) -> str:
    """Return the sha256 over arrays, one behind the other."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def scales_of(entry: LayerEntry, node: ir.Node, sidecar: Sidecar) -> Iterator[tuple[str, ir.Value | None]]:
    """Yield the weights of a layer with the constant that holds their scales in the model; those in blocks have a digest."""
    for name in entry.inputs:
        tensor = sidecar.tensors[name]
        if tensor.blocks is not None:
            continue
        if entry.arithmetic == "dynamic":
            recurrent = node.op_type == "DynamicQuantizeLSTM" and len(node.inputs) > max(LSTM_SCALES)
            yield name, node.inputs[LSTM_SCALES[entry.inputs.index(name)]] if recurrent else dynamic_scale(node)
            continue
        at = node.outputs[0].consumers() if entry.arithmetic == "lookup" else [v.producer() for v in node.inputs if v]
        found = [
            reader
            for reader in at
            if reader is not None
            and reader.op_type == "DequantizeLinear"
            and (entry.arithmetic == "lookup" or str(reader.outputs[0].name) == tensor.reals)
        ]
        yield name, found[0].inputs[1] if found else None


def dynamic_scale(node: ir.Node) -> ir.Value | None:
    """Return the scales of a dynamic product's weight: what its activation's scale is multiplied by, behind the product."""
    cast = next(iter(node.outputs[0].consumers()), None)
    scaled = next(iter(cast.outputs[0].consumers()), None) if cast is not None else None
    factor = scaled.inputs[1].producer() if scaled is not None and scaled.inputs[1] is not None else None
    return factor.inputs[1] if factor is not None and factor.op_type == "Mul" else None
