"""Centring: what a Relu or Clip gives is moved to both sides of zero, so that symmetric grids are used on both.

A symmetric grid has no zero point, so what is never negative uses half of its integers. But biases can hold what a zero point
would: W₂·f(x) + b₂ = W₂·(f(x) − c) + (b₂ + W₂c). That is bias absorption (Nagel et al. 2019, arXiv 1906.04721, section 4.1.3) for
any c, if what f cuts is moved with it: max(x, 0) − c = max(x − c, −c), a clamp in place of the Relu, on a bias smaller by c. With c
in the middle of the range the scale is half as large. Padding with zeros would have to become padding with −c; so only tensors
whose readers do not pad are centred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.bounds import activation_bounds
from quantcli.fold import add_constant, constant
from quantcli.tune.bias import biased
from quantcli.tune.equalize import is_padded, store
from quantcli.tune.smooth import is_transposed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

# Operators through which a constant passes that is the same everywhere.
PASSING = frozenset(
    {
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Identity",
        "Dropout",
        "Flatten",
        "Reshape",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
# Below this part of the range, the lower end is as good as the middle of a range about zero.
ONE_SIDED = 0.1


@dataclass(frozen=True)
class Place:
    """A tensor that can be centred.

    Attributes:
        layer: The layer before.
        activation: The Relu or Clip that makes it.
        tensors: It, and those that it reaches through operators that a constant passes.
        readers: The layers that read one of them.
    """

    layer: ir.Node
    activation: ir.Node
    tensors: tuple[ir.Value, ...]
    readers: tuple[ir.Node, ...]


def centre(model: ir.Model, ranges: Mapping[str, tuple[float, float]]) -> tuple[ir.Model, dict[str, float]]:
    """Return a copy of a folded model whose one-sided tensors are centred, and what each was moved down by; it computes the same.

    Args:
        model: The folded model; it is not changed.
        ranges: The range (lo, hi) of every quantized activation, by name.
    """
    changed = model.clone()
    shifts: dict[str, float] = {}
    for node in list(changed.graph):
        place = place_of(node)
        ends = ranges.get(str(node.outputs[0].name)) if place is not None else None
        if place is None or ends is None or not -ends[0] <= ONE_SIDED * ends[1] > 0:
            continue
        middle = float(np.float32((min(ends[0], 0.0) + ends[1]) / 2))
        if move(place, middle, changed.graph):
            moved = (place.layer.outputs[0], *place.tensors)
            shifts.update(dict.fromkeys((str(value.name) for value in moved), middle))
    return changed, shifts


def place_of(node: ir.Node) -> Place | None:
    """Return the place that a node's output is, if it is a Relu or Clip behind a layer and readers can take a constant over."""
    if node.domain or node.op_type not in {"Relu", "Clip"} or any(constant(v) is None for v in node.inputs[1:] if v):
        return None
    before = node.inputs[0]
    layer = before.producer() if before is not None else None
    if before is None or layer is None or len(before.uses()) != 1 or before.is_graph_output() or not takes(layer):
        return None
    tensors, readers = [node.outputs[0]], list[ir.Node]()
    for value in tensors:  # it grows on the way
        if value.is_graph_output() or not value.consumers():
            return None
        for reader in value.consumers():
            if reader.inputs[0] is not value or [v for v in reader.inputs if v is value] != [value]:
                return None
            if passes(reader):
                tensors.append(reader.outputs[0])
            elif takes(reader) and not is_padded(reader):
                readers.append(reader)
            else:
                return None
    return Place(layer, node, tuple(tensors), tuple(readers))


def passes(node: ir.Node) -> bool:
    """Tell whether a node gives its result plus c for its input plus c."""
    rest = all(value is None or constant(value) is not None for value in node.inputs[1:])
    one = not any(value.name and (value.uses() or value.is_graph_output()) for value in node.outputs[1:])
    whole = node.op_type != "AveragePool" or not (is_padded(node) or rounds_up(node))
    return not node.domain and node.op_type in PASSING and rest and one and whole


def rounds_up(node: ir.Node) -> bool:
    """Tell whether a pool's last windows may reach over the edge."""
    return node.attributes.get_int("ceil_mode", 0) != 0


def takes(node: ir.Node) -> bool:
    """Tell whether a node multiplies by a constant weight and adds a bias that is its own, or can be."""
    if node.domain or node.op_type not in {"Conv", "Gemm"} or len(node.inputs) < 2:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    plain = node.op_type == "Conv" or node.attributes.get_int("transA", 0) == 0
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")] if node.op_type == "Gemm" else [1.0]
    weight = constant(node.inputs[1])
    own = bias is None or (constant(bias) is not None and len(bias.uses()) == 1)
    return weight is not None and weight.dtype == np.float32 and plain and own and set(factors) == {1.0}


def move(place: Place, shift: float, graph: ir.Graph) -> bool:
    """Move a tensor down by a constant; tell whether that could be done."""
    weights = {reader: np.asarray(constant(reader.inputs[1]), dtype=np.float64) for reader in place.readers}
    sums = {reader: given_by_one(reader, weight) for reader, weight in weights.items()}
    made = np.asarray(constant(place.layer.inputs[1])).shape
    count = made[0] if place.layer.op_type == "Conv" or is_transposed(place.layer) else made[1]
    biases = [(place.layer, np.full(count, -shift)), *((reader, total * shift) for reader, total in sums.items())]
    held = [biased(node, len(change), graph) for node, change in biases]
    if any(bias is None for bias in held):
        return False
    for (node, change), bias in zip(biases, held, strict=True):
        assert node.inputs[2] is not None and bias is not None  # noqa: S101, PT018 - `biased` has seen to it
        store(node.inputs[2], bias + change)
    low, high = activation_bounds(place.activation)
    node = place.activation
    bounds = [
        add_constant(graph, f"{node.outputs[0].name}_{name}", np.array(end - shift, np.float32))
        if np.isfinite(end)
        else None
        for name, end in (("low", low), ("high", high))
    ]
    node.op_type = "Clip"
    node.resize_inputs(3)
    for position, value in enumerate(bounds, start=1):
        node.replace_input_with(position, value)
    return True


def given_by_one(node: ir.Node, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a layer's outputs gain where every input is larger by one."""
    if node.op_type == "Gemm":
        return np.asarray(weight.sum(axis=1 if is_transposed(node) else 0))
    return np.asarray(weight.reshape(len(weight), -1).sum(axis=1))
