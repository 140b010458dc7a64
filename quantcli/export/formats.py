"""One function per format, each from the sidecar alone.

Widths are those of the grids: weights of -7 ... 7 are ``int4`` wherever a format has a name for it.
"""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantcli.sidecar import Sidecar, TensorEntry

# How ONNX Runtime's quantizer calls the types.
QUANT_TYPES = {
    "int8": "QInt8",
    "uint8": "QUInt8",
    "int16": "QInt16",
    "uint16": "QUInt16",
    "int4": "QInt4",
    "uint4": "QUInt4",
}


def width(entry: TensorEntry) -> int:
    """Return the width of a tensor's grid in bits: as many as its steps need."""
    if entry.grids is not None:
        return entry.grids.bits
    return (entry.qmax - entry.qmin).bit_length()


def ends(entry: TensorEntry, channel: int) -> tuple[int, int]:
    """Return the lowest and the highest integer of a channel's grid."""
    if entry.grids is None:
        return entry.qmin, entry.qmax
    lowest = entry.grids.lowest[channel]
    return lowest, lowest + (1 << entry.grids.bits) - 1


def scaled(sidecar: Sidecar) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the float model's tensors with their entries, but biases, whose scale follows from those of their layer's operands.

    Raises:
        ModelError: If a weight is in blocks, whose scales stand in the model, or a tensor is not the float model's any more.
    """
    for name, entry in sidecar.tensors.items():
        if entry.moved is not None:
            raise ModelError(
                f"'{name}' is not the float model's (equalization, centring, alignment or steps have changed it), and this "
                "format speaks of that model",
                "convert with equalize = false, centre = false and align = false in [tune], for a target without steps in "
                "[placement], or choose tflite or csv",
            )
        if entry.blocks is not None:
            raise ModelError(
                f"the weight '{name}' is in blocks, and its scales stand in the model", "export per-channel weights"
            )
        if entry.role != "bias":
            yield name, entry


def as_json(document: Any) -> str:
    """Return a document as text: the shortest numbers that read back exactly."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def aimet_1(sidecar: Sidecar) -> str:
    """Return AIMET encodings 1.0.0: offsets count from the lowest integer of the type, and are negative.

    real = scale · (q + offset) with q unsigned, so offset = −(zero_point − lowest of the type). ``is_sym`` is AIMET's word for a
    signed type; the encodings of a per-channel weight stand in the order of its channels.
    """
    activations: list[dict[str, Any]] = []
    weights: list[dict[str, Any]] = []
    for name, entry in scaled(sidecar):
        signed, bits = entry.dtype.startswith("int") and entry.grids is None, width(entry)
        lowest = -(1 << (bits - 1)) if signed else 0
        offsets = [lowest - zero for zero in entry.zero_point] if entry.grids is None else entry.grids.lowest
        found = {
            "name": name,
            "dtype": "INT",
            "bw": bits,
            "is_sym": signed,
            "enc_type": "PER_TENSOR" if entry.axis is None else "PER_CHANNEL",
            "scale": entry.scale,
            "offset": offsets,
        }
        (weights if entry.role == "weight" else activations).append(found)
    return as_json({"version": "1.0.0", "activation_encodings": activations, "param_encodings": weights})


def aimet_2(sidecar: Sidecar) -> str:
    """Return AIMET encodings 2.0.0, which are ONNX's: y_scale, y_zero_point where it is not 0, axis."""
    found = []
    for name, entry in scaled(sidecar):
        single = entry.axis is None
        signed = entry.dtype.startswith("int") and entry.grids is None
        zero_point = entry.zero_point if entry.grids is None else [-lowest for lowest in entry.grids.lowest]
        encoding: dict[str, Any] = {
            "name": name,
            "output_dtype": f"{'int' if signed else 'uint'}{width(entry)}",
            "y_scale": entry.scale[0] if single else entry.scale,
        }
        if any(zero_point):
            encoding["y_zero_point"] = zero_point[0] if single else zero_point
        if not single:
            encoding["axis"] = entry.axis
        found.append(encoding)
    return as_json({"version": "2.0.0", "encodings": found})


def onnxruntime_overrides(sidecar: Sidecar) -> str:
    """Return ``TensorQuantOverrides`` of ONNX Runtime's quantizer: a list of one dict, or one per channel, for each tensor.

    Types are names (``QUInt8``), which a reader turns into ``QuantType``; scales are float32 values.

    Raises:
        ModelError: If the quantizer has no such type.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for name, entry in scaled(sidecar):
        if entry.dtype not in QUANT_TYPES:
            raise ModelError(f"ONNX Runtime's quantizer has no {entry.dtype} for '{name}'", "choose another format")
        kind: dict[str, Any] = {"quant_type": QUANT_TYPES[entry.dtype]}
        if entry.axis is not None:
            kind["axis"] = entry.axis
        found[name] = [
            {**kind, "scale": scale, "zero_point": zero}
            for scale, zero in zip(entry.scale, entry.zero_point, strict=True)
        ]
    return as_json(found)


def tflite_parameters(sidecar: Sidecar) -> str:
    """Return what TFLite's interpreter tells of a tensor: scales, zero_points, quantized_dimension (0 for a single scale).

    Biases are among them: they are int32 tensors with scales there.
    """
    found = [
        {
            "name": name,
            "dtype": entry.dtype,
            "quantization_parameters": {
                "scales": entry.scale,
                "zero_points": entry.zero_point,
                "quantized_dimension": entry.axis or 0,
            },
        }
        for name, entry in sidecar.tensors.items()
        if entry.blocks is None
    ]
    return as_json(found)


COLUMNS = (
    "kind", "name", "operand", "channel", "dtype", "qmin", "qmax", "scale", "zero_point", "multiplier", "shift", "rounding",
    "clamp_low", "clamp_high",
)  # fmt: skip


def csv_table(sidecar: Sidecar) -> str:
    """Return a table: a row per tensor and channel, then a row per multiplier and channel of every layer."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    for name, entry in sidecar.tensors.items():
        for channel, scale in enumerate(entry.scale):
            row = {
                "kind": entry.role,
                "name": name,
                "channel": "" if entry.axis is None else channel,
                "dtype": entry.dtype,
            }
            zero = entry.zero_point[channel if len(entry.zero_point) > 1 else 0]
            low, high = ends(entry, channel)
            table.writerow(row | {"qmin": low, "qmax": high, "scale": repr(scale), "zero_point": zero})
    for layer in sidecar.layers:
        lowest, highest = layer.clamp if layer.clamp is not None else ("", "")
        whole = {
            "kind": "layer",
            "name": layer.name,
            "rounding": layer.rounding,
            "clamp_low": lowest,
            "clamp_high": highest,
        }
        for one in layer.multipliers:
            for channel, (multiplier, shift) in enumerate(zip(one.multiplier, one.shift, strict=True)):
                at = channel if len(one.multiplier) > 1 else ""
                table.writerow(
                    {**whole, "operand": one.operand or "", "channel": at, "multiplier": multiplier, "shift": shift}
                )
        if not layer.multipliers:
            table.writerow(whole)
    return text.getvalue()
