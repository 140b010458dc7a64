"""What a sidecar's fields say of each other: a document whose types are right may still contradict itself."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantcli.sidecar import LayerEntry, Sidecar, TensorEntry

# How many multipliers a layer with an integer output has at least.
LEAST_MULTIPLIERS = {"accumulate": 1, "product": 1, "sum": 2, "rescale": 1}


def contradictions(sidecar: Sidecar) -> Iterator[str]:
    """Yield what cannot be so: fields that do not fit together, or name what is not there."""
    if PurePath(sidecar.model.name).name != sidecar.model.name:
        yield f"the model's name '{sidecar.model.name}' is no file name"
    for name, tensor in sidecar.tensors.items():
        yield from (f"tensor '{name}' {what}" for what in of_tensor(tensor))
    for name, count in Counter(layer.name for layer in sidecar.layers).items():
        if count > 1:
            yield f"{count} layers are named '{name}'"
    for layer in sidecar.layers:
        yield from (f"layer '{layer.name}' {what}" for what in of_layer(layer, sidecar))


def of_tensor(tensor: TensorEntry) -> Iterator[str]:
    """Yield what cannot be so of a tensor; one in blocks has no parameters of its own."""
    if tensor.qmin > tensor.qmax:
        yield f"has a grid from {tensor.qmin} to {tensor.qmax}"
    if tensor.blocks is None and not 1 <= len(tensor.scale) == len(tensor.zero_point):
        yield f"has {len(tensor.scale)} scales and {len(tensor.zero_point)} zero points"
    elif tensor.axis is None and len(tensor.scale) > 1:
        yield f"has {len(tensor.scale)} scales and no axis"


def of_layer(layer: LayerEntry, sidecar: Sidecar) -> Iterator[str]:
    """Yield what cannot be so of a layer."""
    real = layer.accumulator_scale is not None
    named = [*layer.inputs, *([] if real else layer.outputs)]
    if not layer.inputs or not layer.outputs:
        yield "has no inputs or no outputs"
    elif any(name not in sidecar.tensors for name in named):
        yield f"speaks of '{next(name for name in named if name not in sidecar.tensors)}', which is no tensor"
    elif not real:
        yield from of_integers(layer, sidecar.tensors[layer.inputs[0]])


def of_integers(layer: LayerEntry, x: TensorEntry) -> Iterator[str]:
    """Yield what cannot be so of a layer with an integer output."""
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
    count = x.qmax - x.qmin + 1
    if layer.table is None and layer.arithmetic == "table":
        yield "has no table"
    elif layer.table is not None and len(layer.table) != count:
        yield f"has a table of {len(layer.table)} entries for {count} integers"
