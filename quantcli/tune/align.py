"""Alignment with powers of two: tensors are scaled so that their ranges end where a grid of a power of two ends.

A scale that must be a power of two is up to twice as coarse as its range needs (Jain et al. 2020, "Trained Quantization
Thresholds", arXiv 1903.08066, section 3). But whole tensors can be scaled without any change of what the model gives: for a
positively homogeneous f, W₂·f(W₁x + b₁) = (W₂/a)·f(a·W₁x + a·b₁), which is cross-layer equalization (Nagel et al. 2019,
arXiv 1906.04721, equation 7) with one factor for all channels. With one for all, everything that only moves values passes it on,
too, and a Clip whose bounds are scaled with it. So the factor a of every tensor is free but where tensors are tied to each other or
to what passes no factors on, and is chosen so that as many of the grid's integers as can be are in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant, constant
from quantcli.island import captured
from quantcli.tune.channels import HOMOGENEOUS, Sets
from quantcli.tune.equalize import store

if TYPE_CHECKING:
    from collections.abc import Mapping

# Operators whose first input alone holds values that pass through.
MOVING = HOMOGENEOUS | {
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "ReduceMean",
    "ReduceMax",
    "ReduceSum",
    "Reshape",
    "Resize",
    "Slice",
    "SpaceToDepth",
    "Split",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
}
# Operators all of whose inputs are alike.
JOINING = frozenset({"Add", "Sub", "Concat", "Max", "Min", "Sum", "Clip"})
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What single precision may round up must not double a scale.
SHORT = 1 - 2**-16


@dataclass(frozen=True)
class Aligned:
    """What was done.

    Attributes:
        factors: What each tensor is multiplied by, by name; those that keep theirs are left out.
        gained: By how many bits grids of powers of two became finer, on average.
    """

    factors: Mapping[str, float]
    gained: float


class Alignment:
    """One model being aligned, in place.

    Args:
        model: The folded model; its weights, biases and bounds change.
        scales: The scale that the range of every quantized activation needs, by name.
    """

    def __init__(self, model: ir.Model, scales: Mapping[str, float]) -> None:
        self.model, self.scales = model, scales
        self.sets = Sets()
        self.numbers: dict[ir.Value, int] = {}
        self.frozen: set[int] = set()
        self.layers: list[ir.Node] = []
        self.joined: list[ir.Node] = []

    def run(self) -> Aligned:
        """Align the model."""
        for node in self.model.graph:
            self.look_at(node)
        for value in (*self.model.graph.inputs, *self.model.graph.outputs):
            self.freeze(value)
        tensors: dict[int, list[ir.Value]] = {}
        for value, number in self.numbers.items():
            tensors.setdefault(self.sets.find(number), []).append(value)
        kept = {self.sets.find(number) for number in self.frozen}
        factors: dict[ir.Value, float] = {}
        levels: list[tuple[float, float]] = []
        for root, values in tensors.items():
            found = [math.log2(scale) for value in values if (scale := self.scales.get(str(value.name), 0.0)) > 0]
            shift = 0.0 if root in kept or not found else best_shift(found)
            levels += [(level, shift) for level in found]
            if shift:
                factors.update(dict.fromkeys(values, 2.0**shift * SHORT))
        for node in self.layers:
            before = factors.get(node.inputs[0], 1.0) if node.inputs[0] is not None else 1.0
            self.scale(node, before, factors.get(node.outputs[0], 1.0))
        for node in self.joined:
            self.scale_constants(node, factors.get(node.outputs[0], 1.0))
        gained = np.mean([wasted(level) - wasted(level + shift) for level, shift in levels]) if levels else 0.0
        return Aligned({str(value.name): factor for value, factor in factors.items()}, float(gained))

    def number(self, value: ir.Value) -> int:
        """Return the number of a tensor."""
        if value not in self.numbers:
            self.numbers[value] = int(self.sets.new(1)[0])
        return self.numbers[value]

    def freeze(self, value: ir.Value) -> None:
        """Let a tensor keep its factor."""
        self.frozen.add(self.number(value))

    def look_at(self, node: ir.Node) -> None:
        """Note what a node ties together."""
        values = [value for value in node.inputs if value is not None and constant(value) is None]
        outputs = [value for value in node.outputs if value.name]
        held = captured(node)
        plain = not node.domain and not held
        if plain and node.op_type in PRODUCTS and len(values) == 1 and node.inputs[0] is values[0] and owns(node, 1):
            self.layers.append(node)
            self.number(values[0])
            self.number(outputs[0])
        elif plain and self.passes(node, values, outputs):
            tied = [self.number(value) for value in (*values, *outputs)]
            for other in tied[1:]:
                self.sets.tie(np.array(tied[:1]), np.array([other]))
            if node.op_type in JOINING:
                self.joined.append(node)
        else:
            for value in (*values, *held, *outputs):
                self.freeze(value)

    def passes(self, node: ir.Node, values: list[ir.Value], outputs: list[ir.Value]) -> bool:
        """Tell whether a node gives a times its result for a times its inputs."""
        if not outputs or any(value.dtype not in {None, ir.DataType.FLOAT} for value in (*values, *outputs)):
            return False
        if node.op_type == "Pad":
            filling = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            given = len(node.inputs) > 2 and node.inputs[2] is not None
            return len(values) == 1 and (not given or (filling is not None and not np.any(filling)))
        if node.attributes.get_string("coordinate_transformation_mode", "") == "tf_crop_and_resize":
            return False  # it fills what lies outside with a value of its own
        if node.op_type in JOINING:
            return len(values) > 0 and (node.op_type != "Clip" or values == [node.inputs[0]])
        return node.op_type in MOVING and values == [node.inputs[0]]

    def scale(self, node: ir.Node, before: float, after: float) -> None:
        """Scale a layer's weight and bias for what its input and its output are multiplied by."""
        multiply(self.model.graph, node, 1, after / before)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            multiply(self.model.graph, node, 2, after)

    def scale_constants(self, node: ir.Node, factor: float) -> None:
        """Scale the constants that a node adds, compares or joins."""
        for position, value in enumerate(node.inputs):
            if value is not None and constant(value) is not None:
                multiply(self.model.graph, node, position, factor)


def align(model: ir.Model, scales: Mapping[str, float]) -> tuple[ir.Model, Aligned]:
    """Return an aligned copy of a folded model, which computes the same, and what was done.

    Args:
        model: The folded model; it is not changed.
        scales: The scale that the range of every quantized activation needs, by name.
    """
    changed = model.clone()
    return changed, Alignment(changed, scales).run()


def wasted(level: float) -> float:
    """Return how many bits a grid is coarser than a range needs whose scale would be 2**level."""
    return math.ceil(level) - level


def best_shift(levels: list[float]) -> float:
    """Return the shift, from -1/2 to 1/2, for which grids of some levels waste the fewest bits together.

    The waste falls as a shift grows, but for the places where one of the levels becomes whole: one of them is the best.
    """
    tries = sorted((wasted(level) for level in levels), key=lambda shift: abs(shift - round(shift)))
    best = min(tries, key=lambda shift: round(sum(wasted(level + shift - 1e-9) for level in levels), 6))
    return best - round(best)


def owns(node: ir.Node, position: int) -> bool:
    """Tell whether an input of a node is a float32 constant that no other node has."""
    value = node.inputs[position] if position < len(node.inputs) else None
    array = constant(value)
    return value is not None and array is not None and array.dtype == np.float32 and len(value.uses()) == 1


def multiply(graph: ir.Graph, node: ir.Node, position: int, factor: float) -> None:
    """Multiply a constant input of a node; one that others have as well is copied."""
    value = node.inputs[position]
    if factor == 1.0 or value is None:
        return
    array = np.asarray(constant(value), dtype=np.float64) * factor
    if len(value.uses()) == 1:
        store(value, array)
    else:
        node.replace_input_with(position, add_constant(graph, f"{value.name}_aligned", array.astype(np.float32)))
