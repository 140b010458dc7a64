"""What outputs are joined from: boxes and scores, which a detector gives out as one tensor, are no like quantities.

The SQNR of such an output is that of its largest part, and says nothing of the others. So each is compared by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx_ir.passes import common as passes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

# So many parts of an output are shown: scores of many levels say the same.
SHOWN = 4
# Parts are unlike quantities where one reaches so many times as far as another.
UNLIKE = 32
# What is followed back from an output.
MOVES = frozenset({"Identity", "Reshape", "Transpose"})


@dataclass(frozen=True)
class Parts:
    """The parts of an output.

    Attributes:
        axis: The axis along which they lie.
        ends: Where each begins, and where the last one ends.
    """

    axis: int
    ends: tuple[int, ...]

    def names(self, output: str) -> tuple[str, ...]:
        """Return what the parts of an output are called, as numpy would take them."""
        return tuple(f"{output}[{':, ' * self.axis}{start}:{stop}]" for start, stop in pairwise(self.ends))

    def of(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the parts of an array."""
        return np.split(values, self.ends[1:-1], axis=self.axis)


def parts_of(model: ir.Model) -> dict[str, Parts]:
    """Return the parts of those outputs that are joined from several tensors, by the outputs' names."""
    if not any(map(is_joined, model.graph.outputs)):
        return {}
    if any(value.shape is None for node in model.graph for value in node.outputs):
        model = model.clone()
        passes.ShapeInferencePass()(model)
    found = {str(value.name): joined(value) for value in model.graph.outputs}
    return {name: parts for name, parts in found.items() if parts is not None}


def is_joined(value: ir.Value) -> bool:
    """Tell whether a Concat makes a tensor, moved or not."""
    node = value.producer()
    while node is not None and not node.domain and node.op_type in MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and not node.domain and node.op_type == "Concat"


def joined(value: ir.Value) -> Parts | None:
    """Return the parts of a tensor, moved or not; None where it has none, or that is not known."""
    node, shape = value.producer(), value.shape
    if node is None or node.domain or shape is None or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Concat":
        return joined_by(node, len(shape))
    parts = joined(node.inputs[0]) if node.op_type in MOVES else None
    if parts is None or node.op_type == "Identity":
        return parts
    if node.op_type == "Transpose":
        order = list(node.attributes.get_ints("perm", range(len(shape))[::-1]))
        return Parts(order.index(parts.axis), parts.ends)
    return reshaped(parts, node.inputs[0].shape, shape)


def joined_by(node: ir.Node, rank: int) -> Parts | None:
    """Return the parts of what a Concat makes: its operands, or where all of them have the same parts beside each other, those."""
    operands = [value for value in node.inputs if value is not None]
    axis = node.attributes.get_int("axis", 0) % rank
    within = {joined(value) for value in operands}
    if len(within) == 1 and (same := within.pop()) is not None and same.axis != axis:
        return same
    sizes = [value.shape[axis] if value.shape is not None else None for value in operands]
    known = [size for size in sizes if isinstance(size, int)]
    return Parts(axis, tuple(np.cumsum([0, *known]).tolist())) if 1 < len(known) == len(sizes) else None


def reshaped(parts: Parts, before: ir.Shape | None, after: ir.Shape) -> Parts | None:
    """Return the parts behind a Reshape that leaves all sizes up to their axis, or from it on, as they are."""
    if before is None:
        return None
    upto = parts.axis + 1
    if len(after) >= upto and tuple(before[:upto]) == tuple(after[:upto]):
        return parts
    behind = len(before) - parts.axis
    if len(after) >= behind and tuple(before[-behind:]) == tuple(after[-behind:]):
        return Parts(len(after) - behind, parts.ends)
    return None


def parted(outputs: Mapping[str, NDArray[Any]], parts: Mapping[str, Parts]) -> dict[str, NDArray[Any]]:
    """Return outputs with those that are joined in parts, each by its own name."""
    found: dict[str, NDArray[Any]] = {}
    for name, values in outputs.items():
        if name in parts and values.ndim > parts[name].axis and values.shape[parts[name].axis] == parts[name].ends[-1]:
            found.update(zip(parts[name].names(name), parts[name].of(values), strict=True))
        else:
            found[name] = values
    return found


def unlike(batches: Iterable[Mapping[str, NDArray[Any]]], parts: Mapping[str, Parts]) -> bool:
    """Tell whether some output is joined from unlike quantities, as boxes and scores are, and the scores of several levels are not.

    Args:
        batches: The outputs in parts (`parted`).
        parts: The parts.
    """
    reach = dict.fromkeys((name for output, one in parts.items() for name in one.names(output)), 0.0)
    for values in batches:
        for name in reach.keys() & values.keys():
            reach[name] = max(reach[name], float(np.abs(values[name]).max(initial=0.0)))
    for output, one in parts.items():
        known = [reach[name] for name in one.names(output) if reach[name]]
        if known and max(known) >= UNLIKE * min(known):
            return True
    return False


def parts_within(output: str, found: Mapping[str, float]) -> dict[str, float]:
    """Return those figures of parts that belong to an output: the lowest ones, where there are many."""
    own = {part: value for part, value in found.items() if part.startswith(f"{output}[")}
    shown = sorted(own, key=own.__getitem__)[:SHOWN]
    return {part: value for part, value in own.items() if part in shown}
