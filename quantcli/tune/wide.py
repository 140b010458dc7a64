"""Wide activations: where rounding activations to 8 bits leaves next to nothing of a model, those that it hurts most get 16.

Transformers have activations of which a few values or channels reach ten times as far as all others: a grid of 8 bits that covers
those has hardly any steps left for the rest, and cutting them off costs as much. Bondarenko et al. 2021 (arXiv 2109.12948,
mixed-precision post-training quantization) give 16 bits to such tensors alone. Here they are told by what part of the power of
their channels, and of their rows, rounding to the narrow grid takes on average: of all power together, loud ones would drown the
others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.bounds import cut, felt
from quantcli.fold import lifted
from quantcli.plan import make_plan
from quantcli.recipe import resolve_target
from quantcli.tune.ranges import Grid
from quantcli.tune.values import values_in_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.plan import Plan
    from quantcli.recipe import Recipe
    from quantcli.tune.candidates import Candidate

# An activation of whose channels or rows the narrow grid leaves less than this, in dB, gets the wide one.
ENOUGH = 20.0
# How wide that is, and the operator set from which QuantizeLinear knows it.
WIDE_BITS, OPSET = 16, 21
# So many samples tell.
SAMPLES = 16
TINY = 1e-30
# Operators whose tensors have channels as their second axis, whatever their rank.
CHANNELS_FIRST = frozenset({
    "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "MaxPool", "AveragePool", "GlobalAveragePool",
})  # fmt: skip


def may_widen(recipe: Recipe) -> bool:
    """Tell whether activations may become wider: the target takes both widths, and the recipe leaves it open."""
    wishes = recipe.activation
    asked = wishes.bits is not None or wishes.dtype is not None
    return resolve_target(recipe).activation.takes_both and not asked and recipe.tune.widen is not False


def widened(base: Candidate, recipe: Recipe, feeds: Sequence[dict[str, NDArray[Any]]]) -> Candidate | None:
    """Return a candidate whose activations have wide grids where narrow ones leave too little; None where none do, or it cannot be.

    Args:
        base: The candidate; its model may be lifted to an operator set that knows the wide type.
        recipe: What the user wants.
        feeds: Batches of samples.
    """
    plan = make_plan(base.model, base.statistics, recipe, base.tuning)
    left = left_of(base.model, plan, feeds)
    poor = {name: WIDE_BITS for name, decibels in left.items() if decibels < ENOUGH}
    model = lifted(base.model, OPSET) if poor else None
    if model is None:
        return None
    return replace(base, model=model, tuning=replace(base.tuning, grids={**base.tuning.grids, **poor}))


@dataclass
class Lost:
    """What rounding a tensor takes.

    Attributes:
        grid: What it is rounded to.
        image: Whether channels are its second axis, and a row is a sample; else they are the last one, and a row is all of them.
        channels: The sums of every channel's squares, and of the squares of what rounding changes, (2, channels).
        parts: The sum of the parts of their power that rows lose.
        rows: How many rows there were.
    """

    grid: Grid
    image: bool
    channels: NDArray[np.float64] | None = None
    parts: float = 0.0
    rows: int = 0

    def add(self, values: NDArray[np.float32]) -> None:
        """Take some samples' values, of rank 1 or more."""
        squares = np.stack([np.square(one, dtype=np.float64) for one in (values, self.grid.round(values) - values)])
        axis = 1 if self.image else values.ndim - 1
        sums = squares.sum(axis=tuple(one + 1 for one in range(values.ndim) if one != axis))
        self.channels = sums if self.channels is None else self.channels + sums
        own = squares.reshape(2, len(values), -1).sum(axis=2) if self.image else squares.sum(axis=-1).reshape(2, -1)
        lost = parts_of(*own)
        self.parts, self.rows = self.parts + float(lost.sum()), self.rows + lost.size

    @property
    def decibels(self) -> float:
        """What is left, of channels or of rows, whichever is less: −10·log₁₀ of the mean part that is lost."""
        by_channel = float(parts_of(*self.channels).mean()) if self.channels is not None and self.channels.size else 0.0
        return -10 * math.log10(max(by_channel, self.parts / max(self.rows, 1)) + TINY)


def parts_of(power: NDArray[np.float64], noise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the part of each power that noise is: no more than all of it, and none of nothing."""
    return np.minimum(np.divide(noise, power, out=np.zeros_like(noise), where=power > 0), 1.0)


def left_of(model: ir.Model, plan: Plan, feeds: Sequence[dict[str, NDArray[Any]]]) -> dict[str, float]:
    """Return what rounding leaves of every activation that has a range of its own, in dB (`Lost.decibels`).

    Args:
        model: The float model.
        plan: Its plan.
        feeds: Batches of samples.
    """
    values = {str(value.name): value for value in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]}
    lost = {
        name: Lost(Grid(np.float32(tensor.scale[0]), tensor.zero_point[0], tensor.integer), is_image(values[name]))
        for name, tensor in plan.tensors.items()
        if tensor.role == "activation" and tensor.same_as is None and tensor.samples and name in values
    }
    ends = {name: felt(values[name]) for name in lost}
    made = sorted(name for name in lost if values[name].producer() is not None)
    for found in values_in_parts(model, feeds, made, SAMPLES):  # what is fed is among it
        for name in lost.keys() & found.keys():
            if found[name].dtype == np.float32 and found[name].ndim:
                lost[name].add(cut(found[name], ends[name]))
    return {name: one.decibels for name, one in lost.items() if one.rows}


def is_image(value: ir.Value) -> bool:
    """Tell whether a convolution or its like makes or reads a tensor, whose second axis then are its channels."""
    near = {node.op_type for node in (value.producer(), *value.consumers()) if node is not None}
    return bool(near & CHANNELS_FIRST)
