"""Masks in front of a softmax: what stands for minus infinity there, and the tensors that no integer grid resolves because of it.

Attention adds a mask to its scores, or fills them with one: 0 where a token may be looked at, and −10⁴, the lowest float32 or
−infinity where not. A grid of 8 bits that reaches down to it has hardly an integer for the scores, and one that does not lets what
was masked through. So the sum stays float, and what comes of it, up to the softmax.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from quantcli.fold import constant
from quantcli.recipe import resolve_target
from quantcli.rules import FILLING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import onnx_ir as ir

    from calibration.datasets import InputSpec
    from calibration.observers import TensorStatistics
    from quantcli.recipe import Recipe

# Below this a step of any grid swallows whatever data shares the tensor: float32 data of networks lies tens of orders above.
LOWEST_DATA = -1e20
# Above this the products of scales and integers leave float32.
HIGHEST_DATA = 1e35
# A mask reaches so many times as far as the scores that it is added to.
FAR = 32
SOFTMAXES = frozenset({"Softmax", "LogSoftmax"})
# Operators that put masks and scores together, those that move values, and the others that both pass through.
TOGETHER = frozenset({"Add", "Sub", "Where"})
MOVING = frozenset(
    {
        "Cast",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
PASSING = MOVING | {"Clip", "Concat", "Div", "Max", "Min", "Mul"}
# Of those, the operators that keep −infinity, or bound it; a product with zero is no number.
KEEPING = PASSING - {"Div", "Mul"}


def scores(model: ir.Model) -> frozenset[ir.Value]:
    """Return what softmaxes read, and what that is put together from by sums, fills, scales and moves: scores and masks."""
    waiting = [node.inputs[0] for node in model.graph if node.op_type in SOFTMAXES]
    found: set[ir.Value] = set()
    while waiting:
        value = waiting.pop()
        if value is None or value in found:
            continue
        found.add(value)
        producer = value.producer()
        if producer is not None and producer.op_type in TOGETHER | PASSING:
            waiting += operands_of(producer)
    return frozenset(found)


def with_masks(inputs: Iterable[InputSpec], model: ir.Model) -> tuple[InputSpec, ...]:
    """Return a model's inputs, those marked that only ever mask scores."""
    within = scores(model)
    masks = {value.name for value in model.graph.inputs if only_masks(value, within)}
    return tuple(replace(spec, masks=spec.name in masks) for spec in inputs)


def only_masks(value: ir.Value, within: frozenset[ir.Value]) -> bool:
    """Tell whether whatever reads a tensor adds it to scores, or fills them with it, however it is moved there."""
    readers = value.consumers()
    return bool(readers) and all(
        any(output in within for output in reader.outputs) and masks_through(value, reader, within)
        for reader in readers
    )


def masks_through(value: ir.Value, reader: ir.Node, within: frozenset[ir.Value]) -> bool:
    """Tell whether −infinity in a tensor masks what one of its readers makes, or what is made of that."""
    if value not in operands_of(reader):
        return False
    if reader.op_type in TOGETHER:
        return reader.op_type != "Sub" or value is not reader.inputs[1]
    return reader.op_type in KEEPING and all(only_masks(output, within) for output in reader.outputs)


def unresolvable(model: ir.Model, statistics: Mapping[str, TensorStatistics], recipe: Recipe) -> frozenset[str]:
    """Return the tensors whose range is that of a mask, not of data.

    Args:
        model: The folded model.
        statistics: What is known of its tensors by now, by name.
        recipe: What the user wants: wider grids resolve more.
    """
    barred = {name for name, seen in statistics.items() if seen.minimum < LOWEST_DATA or seen.maximum > HIGHEST_DATA}
    lowest = -FILLING * max(1.0, 2.0 ** (resolve_target(recipe).activation.width - 11))
    return with_followers(model, barred, lambda node: masks_of(node, statistics, lowest))


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


def operands_of(node: ir.Node) -> list[ir.Value]:
    """Return the data that an operator reads: neither shapes and places, nor bounds, nor where to fill."""
    alone = node.op_type in MOVING or node.op_type == "Clip"
    given = node.inputs[:1] if alone else node.inputs[1:] if node.op_type == "Where" else node.inputs
    return [value for value in given if value is not None]


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
    source = producer.inputs[0] if producer is not None and producer.op_type in MOVING else None
    return (0.0, 0.0) if source is None else range_of(source, statistics)
