"""Scores: what softmaxes read, and which inputs of a model do nothing but mask them."""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from calibration.datasets.dataset import InputSpec
from calibration.errors import RunError
from quantcli.errors import ModelError
from quantcli.load import trust

if TYPE_CHECKING:
    from pathlib import Path

# What an exported program that convert wrote says beside its graph: the numbers of the inputs that mask, as JSON.
MASKS = "masks.json"

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


def operands_of(node: ir.Node) -> list[ir.Value]:
    """Return the data that an operator reads: neither shapes and places, nor bounds, nor where to fill."""
    alone = node.op_type in MOVING or node.op_type == "Clip"
    given = node.inputs[:1] if alone else node.inputs[1:] if node.op_type == "Where" else node.inputs
    return [value for value in given if value is not None]


def inputs_of(model: ir.Model, what: str) -> tuple[InputSpec, ...]:
    """Return what a model is fed with, those inputs marked that only ever mask scores.

    Args:
        model: The model; it is left as it is.
        what: What to call it in errors.

    Raises:
        RunError: If an input is no tensor, or one of texts.
    """
    if model.functions:  # what reads an input may stand in them
        model = model.clone()
        passes.InlinePass()(model)
    within = scores(model)
    return tuple(
        InputSpec(str(value.name), dtype_of(value, what), sizes_of(value), only_masks(value, within))
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
    )


def dtype_of(value: ir.Value, what: str) -> np.dtype[Any]:
    """Return the numpy dtype of an input."""
    if not isinstance(value.type, ir.TensorType) or value.dtype is None or value.dtype == ir.DataType.STRING:
        raise RunError(
            f"input '{value.name}' of {what} has the type {value.type}", "only tensors of numbers can be fed"
        )
    return np.dtype(value.dtype.numpy())


def sizes_of(value: ir.Value) -> tuple[int | None, ...]:
    """Return the sizes of an input; None where one is free."""
    return tuple(size if isinstance(size, int) and size > 0 else None for size in value.shape or ())


def scored_alone(model: ir.Model) -> frozenset[str]:
    """Return the inputs that are read for scores and for nothing else, scaled or not: they are masks, whatever their shape."""
    within = scores(model)
    return frozenset(
        str(value.name)
        for value in model.graph.inputs
        if value in within
        and all(node.op_type in TOGETHER | PASSING and value in operands_of(node) for node in value.consumers())
    )


def masks_in(path: Path) -> frozenset[int]:
    """Return which inputs of a program that convert wrote only ever mask scores, by number; none where the file does not say.

    Raises:
        ModelError: If it says something else.
    """
    with zipfile.ZipFile(path) as archive:
        info = trust.members(path).get(f"extra/{MASKS}")
        try:
            return frozenset(msgspec.json.decode(archive.read(info), type=list[int])) if info else frozenset()
        except msgspec.DecodeError as error:
            raise ModelError(f"{path} does not tell its inputs apart ({error})", "convert again") from error
