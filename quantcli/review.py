"""Review sidecars: what a target would refuse (lint), and what moved between two of them (diff)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantcli.arithmetic.affine import IntegerType

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from quantcli.sidecar import LayerEntry, Sidecar, TensorEntry
    from quantcli.targets import Target


@dataclass(frozen=True)
class Refusal:
    """Why a target would refuse a layer.

    Attributes:
        layer: The layer's name.
        operator: Its type.
        reason: What the target cannot do.
    """

    layer: str
    operator: str
    reason: str


def lint(sidecar: Sidecar, target: Target, weights: Mapping[str, NDArray[np.integer]]) -> list[Refusal]:
    """Return what a target would refuse of a quantized model, in layer order.

    Args:
        sidecar: The model's sidecar.
        target: The target.
        weights: The integers of the weights by tensor name, for what depends on their values; those that are missing are skipped.
    """
    found: list[Refusal] = []
    for layer in sidecar.layers:
        made_for = sidecar.target.multiplier.bits
        reasons = [*tensor_reasons(layer, sidecar, target, weights), *multiplier_reasons(layer, target, made_for)]
        reasons += pair_reasons(layer, sidecar, target, weights)
        found.extend(Refusal(layer.name, layer.operator, reason) for reason in reasons)
    return found


def tensor_reasons(
    layer: LayerEntry, sidecar: Sidecar, target: Target, weights: Mapping[str, NDArray[np.integer]]
) -> Iterator[str]:
    """Yield what a target cannot do with a layer's operands and outputs."""
    outputs = layer.outputs if layer.accumulator_scale is None else ()
    if layer.arithmetic == "stored":
        if not target.placement.pays:
            yield "its weights alone are stored as integers, and it computes in float"
        return
    if not outputs and layer.arithmetic == "accumulate" and layer.operator not in target.placement.real_outputs:
        yield f"its output '{layer.outputs[0]}' stays real, the target rounds it to a grid"
    for name in dict.fromkeys([*layer.inputs, *outputs]):
        tensor = sidecar.tensors[name]
        if tensor.role == "weight":
            yield from weight_reasons(name, tensor, target, target.weight.bits_of(depthwise(layer, weights.get(name))))
        elif tensor.role != "bias":
            wide = tensor.dtype == "int16" and target.activation.takes_both
            if tensor.dtype != target.activation.dtype and not wide:
                yield f"'{name}' is {tensor.dtype}, the target takes {target.activation.dtype}"
            elif not wide and tensor.role == "activation":
                grid = IntegerType(target.activation.grid)
                if (tensor.qmin, tensor.qmax) != grid.ends:
                    yield f"'{name}' lies in {tensor.qmin} … {tensor.qmax}, the target's grid is {grid.qmin} … {grid.qmax}"
            if target.activation.symmetric and any(tensor.zero_point):
                yield f"'{name}' has zero point {tensor.zero_point[0]}, the target is symmetric"
            if target.activation.power_of_two and not all(is_power_of_two(scale) for scale in tensor.scale):
                yield f"the scale of '{name}' is no power of two"


def depthwise(layer: LayerEntry, values: NDArray[np.integer] | None) -> bool:
    """Tell whether a layer may be a convolution of one filter per channel, as far as its weight tells."""
    return layer.operator == "Conv" and (values is None or values.shape[1] == 1)


def weight_reasons(name: str, tensor: TensorEntry, target: Target, bits: int) -> Iterator[str]:
    """Yield what a target cannot do with a weight, of which it takes so many bits."""
    if len(tensor.scale) > 1 and not target.weight.per_channel:
        yield f"'{name}' has {len(tensor.scale)} scales, the target has one per tensor"
    has_wide = tensor.dtype == "int16" and target.weight.widest == 16
    grids, end = tensor.grids, 1 << (bits - 1)
    shifted = grids is not None and grids.bits <= bits and not target.weight.is_symmetric(grids.bits)
    if not (shifted or has_wide or -end <= tensor.qmin <= tensor.qmax < end):
        reached = tensor.qmax if tensor.qmax >= end else tensor.qmin
        yield f"'{name}' reaches {reached}, the target's weights have {bits} bits"
    if tensor.grids is None and tensor.qmin < -tensor.qmax and target.weight.is_narrow(tensor.qmax.bit_length() + 1):
        yield f"'{name}' reaches {tensor.qmin}, the target's weights {-tensor.qmax}"
    if target.weight.power_of_two and not all(is_power_of_two(scale) for scale in tensor.scale):
        yield f"a scale of '{name}' is no power of two"


def multiplier_reasons(layer: LayerEntry, target: Target, made_for: int) -> Iterator[str]:
    """Yield what a target cannot do with a layer's multipliers, which were made for M0 of so many bits."""
    if layer.multipliers and layer.rounding != target.multiplier.rounding_of(layer.operator):
        yield f"it rounds '{layer.rounding}', the target '{target.multiplier.rounding_of(layer.operator)}'"
    elif layer.multipliers and layer.rounding == "double" and made_for < target.multiplier.bits:
        # Any other rounding gives the same for M0 · 2^k and n + k; the first of two depends on the width.
        yield f"it rounds twice with multipliers of {made_for} bits, the target with {target.multiplier.bits}"
    for entry in layer.multipliers:
        if max(abs(one) for one in entry.multiplier) >= 1 << (target.multiplier.bits - 1):
            yield f"a multiplier needs more than {target.multiplier.bits} bits"
        if target.multiplier.shifts is not None and (outside := target.multiplier.beyond(entry.shift)):
            low, high = target.multiplier.shifts
            yield f"a shift of {outside[0]} lies outside {low} … {high}"


def pair_reasons(
    layer: LayerEntry, sidecar: Sidecar, target: Target, weights: Mapping[str, NDArray[np.integer]]
) -> Iterator[str]:
    """Yield the channels whose products, two at a time, can leave the target's 16 bits.

    Which products meet depends on the kernel's packing, so the two largest of a channel stand for any two.
    """
    if target.weight.pair_bits is None or layer.arithmetic != "accumulate":
        return
    tensor, values = sidecar.tensors[layer.inputs[1]], weights.get(layer.inputs[1])
    if values is None or tensor.dtype == "int16":  # its products are those of floats there
        return
    if target.weight.depthwise_bits is not None and depthwise(layer, values):
        return
    channels = (
        values.reshape(1, -1)
        if tensor.axis is None
        else np.moveaxis(values, tensor.axis, 0).reshape(values.shape[tensor.axis], -1)
    )
    magnitudes = np.sort(np.abs(channels.astype(np.int64)), axis=1)[:, -2:].sum(axis=1)
    x = sidecar.tensors[layer.inputs[0]]
    largest = max(abs(x.qmin), abs(x.qmax))
    risky = np.flatnonzero(magnitudes * largest > (1 << (target.weight.pair_bits - 1)) - 1)
    if risky.size:
        shown = ", ".join(map(str, risky[:8])) + (", …" if risky.size > 8 else "")
        yield f"two products of {risky.size} channels can leave {target.weight.pair_bits} bits: {shown}"


def is_power_of_two(scale: float) -> bool:
    """Tell whether a scale is a power of two."""
    return float(np.frexp(scale)[0]) == 0.5


@dataclass(frozen=True)
class Change:
    """Something that differs between two sidecars.

    Attributes:
        kind: ``tensor``, ``layer`` or ``float``.
        name: Its name.
        what: What changed.
        before: In the first.
        after: In the second.
    """

    kind: str
    name: str
    what: str
    before: str
    after: str


def diff(first: Sidecar, second: Sidecar) -> list[Change]:
    """Return what moved from one sidecar to another: tensors, layers, and what stays float."""
    changes = []
    for name in dict.fromkeys([*first.tensors, *second.tensors]):
        a, b = first.tensors.get(name), second.tensors.get(name)
        if a is None or b is None:
            changes.append(Change("tensor", name, "quantized", presence(a), presence(b)))
            continue
        changes.extend(Change("tensor", name, what, x, y) for what, x, y in tensor_changes(a, b))
    layers = {layer.name: layer for layer in first.layers}, {layer.name: layer for layer in second.layers}
    for name in dict.fromkeys([*layers[0], *layers[1]]):
        one, other = layers[0].get(name), layers[1].get(name)
        if one is None or other is None:
            changes.append(Change("layer", name, "integer", presence(one), presence(other)))
            continue
        pairs = (("clamp", str(one.clamp), str(other.clamp)), ("rounding", one.rounding, other.rounding))
        changes.extend(Change("layer", name, what, before, after) for what, before, after in pairs if before != after)
    floats = {f.name: f.reason for f in first.float_layers}, {f.name: f.reason for f in second.float_layers}
    for name in dict.fromkeys([*floats[0], *floats[1]]):
        reasons = floats[0].get(name, "integer"), floats[1].get(name, "integer")
        if reasons[0] != reasons[1]:
            changes.append(Change("float", name, "stays float", *reasons))
    return changes


def presence(entry: object) -> str:
    """Say whether something is there."""
    return "no" if entry is None else "yes"


def grid_text(entry: TensorEntry) -> str:
    """Return a tensor's grid as text, or within what those of its scales lie."""
    each = "" if entry.grids is None else f", {entry.grids.bits} bits each"
    return f"{entry.dtype} {entry.qmin} … {entry.qmax}{each}"


def tensor_changes(a: TensorEntry, b: TensorEntry) -> Iterator[tuple[str, str, str]]:
    """Yield what changed of a tensor: its type, its scales (by how much at most), its zero point, its constants."""
    forms = grid_text(a), grid_text(b)
    if forms[0] != forms[1]:
        yield "type", *forms
    if len(a.scale) != len(b.scale):
        yield "scales", str(len(a.scale)), str(len(b.scale))
    elif a.scale != b.scale:
        ratio = np.array(b.scale) / np.array(a.scale)
        worst = int(np.abs(np.log(ratio)).argmax())
        yield (
            "scale" if ratio.size == 1 else f"scale, channel {worst}",
            f"{a.scale[worst]:.6g}",
            f"{b.scale[worst]:.6g} ({ratio[worst] - 1:+.1%})",
        )
    if a.zero_point != b.zero_point and len(a.zero_point) == len(b.zero_point) == 1:
        yield "zero point", str(a.zero_point[0]), str(b.zero_point[0])
    if a.sha256 != b.sha256 and a.scale == b.scale:
        yield "integers", str(a.sha256)[:12], str(b.sha256)[:12]
