"""Masks in front of a softmax: what stands for minus infinity there, and the tensors that no integer grid resolves because of it.

Attention adds a mask to its scores, or fills them with one: 0 where a token may be looked at, and −10⁴, the lowest float32 or
−infinity where not. A grid of 8 bits that reaches down to it has hardly an integer for the scores, and one that does not lets what
was masked through. So the sum stays float, and what comes of it, up to the softmax. What a Clip leaves hardly anything of is not
resolved either, nor is what a detector gives out as one tensor: boxes in hundreds of pixels, and scores that end at 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.fold import constant
from quantcli.recipe import resolve_target
from quantcli.rules import FILLING, RULES
from quantcli.scores import MOVING, TOGETHER, operands_of, scores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir as ir

    from calibration.observers import TensorStatistics
    from quantcli.recipe import Recipe

# Below this a step of any grid swallows whatever data shares the tensor: float32 data of networks lies tens of orders above.
LOWEST_DATA = -1e20
# Above this the products of scales and integers leave float32.
HIGHEST_DATA = 1e35
# A mask reaches so many times as far as the scores that it is added to.
FAR = 32
# Below this part of the largest product an output lies within the rounding of float32 sums (2^-24 of their magnitudes), and one
# step of an accumulator of products of 8 bits is 2^15 times the whole output.
LEAST_OUTPUT = 2.0**-30
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def unresolvable(model: ir.Model, statistics: Mapping[str, TensorStatistics], recipe: Recipe) -> frozenset[str]:
    """Return the tensors whose range is that of a mask, not of data, or is nothing beside the products that make it.

    Args:
        model: The folded model.
        statistics: What is known of its tensors by now, by name.
        recipe: What the user wants: wider grids resolve more.
    """
    barred = {name for name, seen in statistics.items() if seen.minimum < LOWEST_DATA or seen.maximum > HIGHEST_DATA}
    width = resolve_target(recipe).activation.width
    barred |= crushed(model, statistics) | drowned(model, statistics, FAR * 2.0 ** (width - 8))
    lowest = -FILLING * max(1.0, 2.0 ** (width - 11))
    return with_followers(model, barred, lambda node: masks_of(node, statistics, lowest))


def crushed(model: ir.Model, statistics: Mapping[str, TensorStatistics]) -> set[str]:
    """Return the outputs of products that Relu and Clip leave too little of, as far as is known.

    No multiplier would reach from such an accumulator to the grid of what is left.
    """
    found: set[str] = set()
    for node in model.graph:
        if node.op_type not in PRODUCTS or node.domain:
            continue
        made = [node.outputs[0]]
        while made[-1].name not in statistics and len(users := made[-1].uses()) == 1:
            (user, _), *_ = users
            if user.op_type not in {"Relu", "Clip"}:
                break
            made.append(user.outputs[0])
        extents = [
            max(-low, high)
            for low, high in (range_of(value, statistics) for value in (*operands_of(node)[:2], made[-1]))
        ]
        if len(extents) == 3 and 0 < extents[2] < extents[0] * extents[1] * LEAST_OUTPUT:
            found.add(str(made[0].name))  # who reads what is left has a grid of its own for it
    return found


def drowned(model: ir.Model, statistics: Mapping[str, TensorStatistics], far: float) -> set[str]:
    """Return the outputs of Concats that join what reaches so many times as far as another operand, as far as is known.

    Only where no product reads what is joined: its weights could make a small operand count for as much as a large one, and
    training sees to it that rounding it matters little.
    """
    found: set[str] = set()
    for node in model.graph:
        if node.op_type != "Concat" or node.domain:
            continue
        extents = [max(-low, high) for low, high in (range_of(value, statistics) for value in operands_of(node))]
        known = [extent for extent in extents if extent]
        if known and max(known) >= far * min(known) and not multiplied(node):
            found.add(str(node.outputs[0].name))
    return found


def multiplied(node: ir.Node) -> bool:
    """Tell whether a product reads what a node makes, or what is made of it."""
    waiting, seen = list(node.outputs), set(node.outputs)
    while waiting:
        for user in waiting.pop().consumers():
            if user.op_type in PRODUCTS:
                return True
            new = [value for value in user.outputs if value not in seen]
            seen.update(new)
            waiting += new
    return False


def possible(model: ir.Model) -> frozenset[str]:
    """Return the tensors that could turn out to hold a mask, whatever the data: what sums and fills make, up to the softmax."""

    def made(node: ir.Node) -> set[str]:
        held = [array for value in operands_of(node) if (array := constant(value)) is not None]
        known = any(array.size and not array.min() <= -FILLING for array in held)
        return set() if known else {str(value.name) for value in node.outputs}

    return with_followers(model, set(), made)


def with_followers(model: ir.Model, barred: set[str], found: Callable[[ir.Node], set[str]]) -> frozenset[str]:
    """Return some tensors, those that are found at sums and fills of scores, and all that is made of them up to a softmax."""
    within = scores(model)
    for node in model.graph if within else ():
        if not any(value in within for value in node.outputs):
            continue
        if node.op_type in TOGETHER:
            barred |= found(node)
        if any(value.name in barred for value in operands_of(node)):
            barred |= {str(value.name) for value in node.outputs}
    return frozenset(barred)


def masks_of(node: ir.Node, statistics: Mapping[str, TensorStatistics], lowest: float) -> set[str]:
    """Return the operands of a sum or a fill that reach at least so low, and much further than the others, as far as is known."""
    operands = operands_of(node)
    ranges = [range_of(value, statistics) for value in operands]
    if node.op_type == "Sub":
        ranges[1] = -ranges[1][1], -ranges[1][0]
    found = set()
    for place, (value, (low, high)) in enumerate(zip(operands, ranges, strict=True)):
        others = [max(-a, b) for number, (a, b) in enumerate(ranges) if number != place]
        if low <= lowest and -low >= FAR * max(high, *others):
            found.add(str(value.name))
    return found


def range_of(value: ir.Value, statistics: Mapping[str, TensorStatistics]) -> tuple[float, float]:
    """Return the lowest and the highest value of a tensor, or of what was moved to it, with zero; zeros for nothing known."""
    held = constant(value)
    if held is not None and held.size and not np.isnan(held).any():
        return min(float(held.min()), 0.0), max(float(held.max()), 0.0)
    seen, producer = statistics.get(str(value.name)), value.producer()
    if seen is not None:
        return min(seen.minimum, 0.0), max(seen.maximum, 0.0)
    if producer is not None and (rule := RULES.get(producer.op_type)) is not None and rule.fixed is not None:
        return rule.fixed
    source = producer.inputs[0] if producer is not None and producer.op_type in MOVING else None
    return (0.0, 0.0) if source is None else range_of(source, statistics)
