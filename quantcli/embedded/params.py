"""Parameters alone, as a C header, for people with their own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.embedded.source import comment, guarded, numbers, real_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from quantcli.sidecar import LayerEntry, Sidecar, TensorEntry

# What multipliers belong to that belong to no operand.
REST = {"PRelu": "slopes"}


def header(sidecar: Sidecar, biases: Mapping[str, NDArray[np.int64]], name: str) -> str:
    """Return a header with every layer's zero points, clamp, multipliers, shifts, bias and table, and every tensor's scale.

    Scales are macros, so that nothing is a float that does not use them.

    Args:
        sidecar: The sidecar.
        biases: The biases' integers, by tensor.
        name: What every name begins with.
    """
    taken: set[str] = set()
    lines = [
        f"/* {comment(sidecar.float_model.name)} by {comment(sidecar.producer)}, for the target {sidecar.target.name}.",
        " *",
    ]
    lines += [
        " * real = scale * (q - zero_point); an accumulator becomes an output by multiplier * 2^-shift, rounded as stated.",
        " * docs/arithmetic.md and docs/sidecar.md of quantcli say it exactly.",
        " */",
        "#include <stdint.h>",
        "",
    ]
    stems = {tensor: stem(f"{name}_{tensor}", taken) for tensor in sidecar.tensors}
    for tensor, entry in sidecar.tensors.items():
        lines += of_tensor(tensor, entry, stems[tensor])
    for layer in sidecar.layers:
        lines += of_layer(layer, sidecar, stems, stem(f"{name}_layer_{layer.name}", taken))
        if len(layer.inputs) > 2 and layer.inputs[2] in biases:
            lines.append(array("int32_t", f"{stems[layer.inputs[2]]}_integers", biases[layer.inputs[2]]))
    return guarded(f"{name}_parameters_h", "\n".join(lines) + "\n")


def stem(name: str, taken: set[str]) -> str:
    """Return a name that C takes and nothing else has."""
    base = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
    found = next(n for n in (base, *(f"{base}_{i}" for i in range(2, len(taken) + 3))) if n.upper() not in taken)
    taken.add(found.upper())
    return found


def array(ctype: str, name: str, values: NDArray[np.int64]) -> str:
    """Return a constant array."""
    return f"static const {ctype} {name}[{values.size}] = {{\n{numbers(values)}\n}};"


def of_tensor(name: str, entry: TensorEntry, stem_of: str) -> list[str]:
    """Return a tensor's lines."""
    upper, kind = stem_of.upper(), entry.dtype
    lines = ["", f"/* {entry.role} '{comment(name)}', {kind} */"]
    if not entry.scale:
        return [*lines, "/* in blocks: its scales stand in the model */"]
    if len(entry.scale) == 1:
        lines.append(f"#define {upper}_SCALE {real_text(entry.scale[0])}")
    else:
        scales = ", ".join(real_text(scale) for scale in entry.scale)
        lines.append(f"#define {upper}_SCALES {{{scales}}} /* along axis {entry.axis} */")
    if entry.role != "bias" and len(set(entry.zero_point)) == 1:
        ends = f"{upper}_LOWEST = {entry.qmin}, {upper}_HIGHEST = {entry.qmax}"
        lines.append(f"enum {{ {upper}_ZERO_POINT = {entry.zero_point[0]}, {ends} }};")
    elif entry.role != "bias":
        lines.append(array("int32_t", f"{stem_of}_zero_point", np.array(entry.zero_point)))
    return lines


def of_layer(layer: LayerEntry, sidecar: Sidecar, stems: Mapping[str, str], stem_of: str) -> list[str]:
    """Return a layer's lines."""
    del sidecar
    upper = stem_of.upper()
    flow = f"{', '.join(layer.inputs)} -> {', '.join(layer.outputs)}"
    lines = [
        "",
        f"/* {comment(layer.operator)} '{comment(layer.name)}' ({layer.arithmetic}, {layer.rounding}): {comment(flow)} */",
    ]
    if layer.clamp is not None:
        lines.append(f"enum {{ {upper}_CLAMP_LOW = {layer.clamp[0]}, {upper}_CLAMP_HIGH = {layer.clamp[1]} }};")
    for multiplier in layer.multipliers:
        of = (
            ""
            if len(layer.multipliers) == 1
            else f"_of_{stems[multiplier.operand] if multiplier.operand else REST.get(layer.operator, 'sum')}"
        )
        lines.append(array("int32_t", f"{stem_of}_multiplier{of}", np.array(multiplier.multiplier)))
        lines.append(array("int8_t", f"{stem_of}_shift{of}", np.array(multiplier.shift)))
    if layer.table is not None:
        lines.append(array("int32_t", f"{stem_of}_table", np.array(layer.table)))
    return lines
