"""Layer by layer: how much of the signal each quantized tensor still carries, and where it was lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.hooks.onnxruntime import Runner
from quantcli.arithmetic.affine import dequantize
from quantcli.bounds import cut, felt
from quantcli.evaluation.metrics import Difference
from quantcli.fold import fold
from quantcli.probe import with_outputs

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.sidecar import MovedEntry, Sidecar


@dataclass(frozen=True)
class LayerSqnr:
    """One layer's output against the float model's.

    Attributes:
        name: The layer's name.
        operator: Its type.
        output: The tensor.
        sqnr: Its SQNR in dB.
        lost: By how many dB it lies below the worst of the layer's inputs; 0 where it does not.
    """

    name: str
    operator: str
    output: str
    sqnr: float
    lost: float


def layer_sqnrs(
    model: ir.Model, quantized: ir.Model, sidecar: Sidecar, batches: Iterable[dict[str, NDArray[Any]]]
) -> list[LayerSqnr]:
    """Return the SQNR of every layer's first output, in graph order; not of those that tuning has put in the place of others.

    Args:
        model: The float model as it was loaded.
        quantized: The quantized model.
        sidecar: Its sidecar.
        batches: Inputs by name.
    """
    activations = {name: tensor for name, tensor in sidecar.tensors.items() if tensor.role == "activation"}
    reals = [n for layer in sidecar.layers if layer.accumulator_scale is not None for n in layer.outputs]
    integers = [tensor.integers for tensor in activations.values()]  # which stand in every form of the model
    folded = fold(model, requantize=True, matrices=sidecar.mode == "static")
    held = {value.name for node in folded.graph for value in node.outputs} | {v.name for v in folded.graph.inputs}
    names = [name for name in dict.fromkeys([*activations, *reals]) if name in held]  # not what tuning has put there
    float_runner = Runner(with_outputs(folded, names))
    quantized_runner = Runner(with_outputs(quantized, [*integers, *reals]), exact=True)
    inputs = {spec.name for spec in float_runner.inputs}
    differences = {name: Difference() for name in names}
    ends = {str(v.name): felt(v) for v in [*folded.graph.inputs, *(v for n in folded.graph for v in n.outputs)]}
    for feeds in batches:
        expected = {**feeds, **float_runner.run(feeds, [name for name in names if name not in inputs])}
        found = quantized_runner.run(feeds, [*integers, *reals])
        for name in set(reals) & held:
            differences[name].update(expected[name], found[name])
        for name, tensor in activations.items():
            if name in reals or name not in held:
                continue
            scale, zero_point = np.array(tensor.scale, dtype=np.float32), np.array(tensor.zero_point)
            given = dequantize(found[tensor.integers], scale, zero_point, None)
            # What readers do not tell apart is not lost where a grid cuts it off.
            seen = cut(expected[name], ends[name])
            if tensor.moved is not None:
                lowest, highest = (moved(np.full_like(seen, end), tensor.moved) for end in ends[name])
                differences[name].update(moved(seen, tensor.moved), np.clip(given, lowest, highest))
            else:
                differences[name].update(seen, cut(given, ends[name]))
    layers = []
    for layer in sidecar.layers:
        if layer.outputs[0] not in differences:
            continue
        sqnr = differences[layer.outputs[0]].sqnr
        before = min((differences[name].sqnr for name in layer.inputs if name in differences), default=sqnr)
        layers.append(LayerSqnr(layer.name, layer.operator, layer.outputs[0], sqnr, max(0.0, before - sqnr)))
    return layers


def moved(values: NDArray[Any], entry: MovedEntry) -> NDArray[Any]:
    """Return what a float tensor is in a model that equalization, centring or alignment have changed."""
    shape = [-1 if axis == 1 else 1 for axis in range(values.ndim)] if len(entry.factor) > 1 else [1] * values.ndim
    factor, shift = (np.array(held, dtype=np.float32).reshape(shape) for held in (entry.factor, entry.shift))
    return np.asarray(values * factor + shift)


def worst(layers: list[LayerSqnr], count: int = 3) -> list[LayerSqnr]:
    """Return the layers that lost most, most first; of one that gives nothing but zeros in float, that cannot be told."""
    told = [layer for layer in layers if math.isfinite(layer.lost) and math.isfinite(layer.sqnr)]
    return sorted(told, key=lambda layer: (-layer.lost, layer.sqnr))[:count]
