"""What a sidecar's fields say of each other: a document whose types are right may still contradict itself."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import PurePath
from typing import TYPE_CHECKING

from quantcli.arithmetic.affine import IntegerType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantcli.sidecar import LayerEntry, Sidecar, TensorEntry

# How many multipliers a layer with an integer output has at least.
LEAST_MULTIPLIERS = {"accumulate": 1, "product": 1, "sum": 2, "rescale": 1}
# What multiplies two operands, or adds them.
PAIRED = {"accumulate", "product", "sum"}
# What looks its outputs up.
TABLED = {"table", "softmax"}
# What may leave its output real, and what always does.
MAY_BE_REAL = {"accumulate", "product", "lookup", "dynamic", "stored"}
REAL = {"lookup", "dynamic", "stored"}


def contradictions(sidecar: Sidecar) -> Iterator[str]:
    """Yield what cannot be so: fields that do not fit together, or name what is not there."""
    if PurePath(sidecar.model.name).name != sidecar.model.name:
        yield f"the model's name '{sidecar.model.name}' is no file name"
    if (sidecar.mode == "static") != (sidecar.calibration is not None):
        yield f"a model of mode {sidecar.mode} has {'a' if sidecar.calibration else 'no'} calibration"
    for name, tensor in sidecar.tensors.items():
        yield from (f"tensor '{name}' {what}" for what in of_tensor(tensor))
        yield from (f"tensor '{name}' {what}" for what in of_sharing(tensor, sidecar))
    for name, count in Counter(layer.name for layer in sidecar.layers).items():
        if count > 1:
            yield f"{count} layers are named '{name}'"
    for layer in sidecar.layers:
        yield from (f"layer '{layer.name}' {what}" for what in of_layer(layer, sidecar))
    yield from of_order(sidecar)


def of_tensor(tensor: TensorEntry) -> Iterator[str]:
    """Yield what cannot be so of a tensor; one in blocks has no parameters of its own."""
    lowest, highest = IntegerType(tensor.dtype).ends
    if tensor.qmin > tensor.qmax:
        yield f"has a grid from {tensor.qmin} to {tensor.qmax}"
    elif tensor.qmin < lowest or tensor.qmax > highest:
        yield f"has a grid from {tensor.qmin} to {tensor.qmax}, and {tensor.dtype} ends at {lowest} and {highest}"
    if tensor.blocks is None and not 1 <= len(tensor.scale) == len(tensor.zero_point):
        yield f"has {len(tensor.scale)} scales and {len(tensor.zero_point)} zero points"
    elif tensor.axis is None and len(tensor.scale) > 1:
        yield f"has {len(tensor.scale)} scales and no axis"
    if tensor.axis is not None and (tensor.axis < 0 or tensor.role in {"activation", "constant"}):
        yield f"has the axis {tensor.axis}, which {'none' if tensor.axis < 0 else f'no {tensor.role}'} has"
    wrong = next((scale for scale in tensor.scale if not (scale > 0 and math.isfinite(scale))), None)
    if wrong is not None:
        yield f"has the scale {wrong}"
    if any(not tensor.qmin <= zero <= tensor.qmax for zero in tensor.zero_point):
        yield "has a zero point beyond its grid"
    if (tensor.role == "activation") != (tensor.sha256 is None):
        yield f"has {'no' if tensor.sha256 is None else 'a'} sha256, unlike others of role {tensor.role}"
    yield from of_channels(tensor)


def of_channels(tensor: TensorEntry) -> Iterator[str]:
    """Yield what cannot be so of a tensor's ranges and of what there is of each channel."""
    channels = len(tensor.scale)
    if len(tensor.lo) != len(tensor.hi) or (not tensor.blocks and len(tensor.lo) not in {1, channels}):
        yield f"has {len(tensor.lo)} lo and {len(tensor.hi)} hi for {channels} scales"
    elif any(not lo <= hi for lo, hi in zip(tensor.lo, tensor.hi, strict=True)):
        yield "has a range whose lo is above its hi"
    if tensor.samples < 0:
        yield f"was seen in {tensor.samples} samples"
    if tensor.role != "weight" and (tensor.dead_channels or tensor.grids or tensor.blocks):
        yield f"has dead channels, grids or blocks, which no {tensor.role} has"
    if any(not 0 <= channel < max(channels, 1) for channel in tensor.dead_channels):
        yield f"has dead channels beyond its {channels}"
    if tensor.grids is not None and len(tensor.grids.lowest) not in {1, channels}:
        yield f"has {len(tensor.grids.lowest)} grids for {channels} scales"
    if tensor.moved is not None:
        counts = {len(tensor.moved.factor), len(tensor.moved.shift)}
        if 0 in counts or len(counts - {1}) > 1:
            yield f"is moved by {len(tensor.moved.factor)} factors and {len(tensor.moved.shift)} shifts"


def of_sharing(tensor: TensorEntry, sidecar: Sidecar) -> Iterator[str]:
    """Yield what cannot be so of a tensor that shares another one's parameters."""
    if tensor.same_as is None:
        return
    other = sidecar.tensors.get(tensor.same_as)
    if other is None:
        yield f"is the same as '{tensor.same_as}', which is no tensor"
    elif (other.scale, other.zero_point, other.dtype) != (tensor.scale, tensor.zero_point, tensor.dtype):
        yield f"is the same as '{tensor.same_as}', and has other parameters"


def of_layer(layer: LayerEntry, sidecar: Sidecar) -> Iterator[str]:
    """Yield what cannot be so of a layer."""
    real = layer.accumulator_scale is not None
    named = [*layer.inputs, *([] if real else layer.outputs)]
    if not layer.inputs or not layer.outputs:
        yield "has no inputs or no outputs"
    elif any(name not in sidecar.tensors for name in named):
        yield f"speaks of '{next(name for name in named if name not in sidecar.tensors)}', which is no tensor"
    elif len(layer.inputs) < 2 and layer.arithmetic in PAIRED:
        yield f"has one input, of which {layer.arithmetic} needs two"
    elif real and layer.arithmetic not in MAY_BE_REAL:
        yield f"has an accumulator_scale, which {layer.arithmetic} has not"
    elif not real and layer.arithmetic in REAL:
        yield f"has no accumulator_scale, which {layer.arithmetic} has"
    elif not real:
        yield from of_integers(layer, sidecar)
    if layer.table is not None and layer.arithmetic not in TABLED:
        yield f"has a table, which {layer.arithmetic} does not read"


def of_integers(layer: LayerEntry, sidecar: Sidecar) -> Iterator[str]:
    """Yield what cannot be so of a layer with an integer output."""
    for name in layer.outputs:
        if sidecar.tensors[name].role != "activation":
            yield f"makes '{name}', whose role is {sidecar.tensors[name].role}"
    least = LEAST_MULTIPLIERS.get(layer.arithmetic, 0)
    if len(layer.multipliers) < least:
        yield f"has {len(layer.multipliers)} multipliers, of which {layer.arithmetic} needs {least}"
    if layer.clamp is None:
        yield "has integers without a clamp"
    for one in layer.multipliers:
        if not 1 <= len(one.multiplier) == len(one.shift) == len(one.real):
            yield f"has {len(one.multiplier)} multipliers, {len(one.shift)} shifts and {len(one.real)} real ones"
        if one.operand is not None and one.operand not in layer.inputs:
            yield f"has a multiplier of '{one.operand}', which is none of its inputs"
    for operand, count in Counter(one.operand for one in layer.multipliers).items():
        if count > max(layer.inputs.count(operand or ""), 1):
            yield f"has {count} multipliers of " + ("its accumulator" if operand is None else f"'{operand}'")
    x = sidecar.tensors[layer.inputs[0]]
    count = x.qmax - x.qmin + 1
    if layer.table is None and layer.arithmetic == "table":
        yield "has no table"
    elif layer.table is not None and len(layer.table) != count:
        yield f"has a table of {len(layer.table)} entries for {count} integers"


def of_order(sidecar: Sidecar) -> Iterator[str]:
    """Yield what cannot be so of the layers' order: none reads what a later one makes, and nothing is made twice."""
    makers: dict[str, str] = {}
    for layer in sidecar.layers:
        for name in layer.outputs:
            if name in makers:
                yield f"layer '{layer.name}' makes '{name}', which layer '{makers[name]}' has made"
            makers[name] = layer.name
    made: set[str] = set()
    for layer in sidecar.layers:
        early = next((name for name in layer.inputs if name in makers and name not in made), None)
        if early is not None:
            yield f"layer '{layer.name}' reads '{early}', which layer '{makers[early]}' makes after it"
        made.update(layer.outputs)
    floats = {layer.name for layer in sidecar.float_layers}
    for layer in sidecar.layers:
        if layer.name in floats:
            yield f"layer '{layer.name}' is said to stay float, too"
