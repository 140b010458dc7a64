"""Which channels of a model's tensors have to keep one factor, since operators pass it on from one to the other.

Relu, pools and Pad tie a channel to itself, Add ties its operands and its result, Concat ties the places that it copies to. Weights
use such sets: a layer's rows make the channels of its output, its columns meet those of its input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from quantcli.bounds import activation_bounds
from quantcli.fold import constant

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# Operators through which a positive factor of a channel passes.
HOMOGENEOUS = frozenset(
    {
        "Relu",
        "LeakyRelu",
        "PRelu",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Identity",
        "Dropout",
    }
)


@dataclass
class Sets:
    """Sets of channels that share a factor (a forest, as in union-find)."""

    parent: list[int] = field(default_factory=list)

    def new(self, count: int) -> NDArray[np.intp]:
        """Return the numbers of some new channels, each a set of its own."""
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, channel: int) -> int:
        """Return the channel that stands for a channel's set."""
        while self.parent[channel] != channel:
            self.parent[channel] = self.parent[self.parent[channel]]
            channel = self.parent[channel]
        return channel

    def tie(self, one: NDArray[np.intp], other: NDArray[np.intp]) -> None:
        """Put channels together, pair by pair."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            self.parent[self.find(a)] = self.find(b)

    def roots(self, channels: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the sets of some channels."""
        return np.array([self.find(channel) for channel in channels.tolist()], dtype=np.intp)


@dataclass(frozen=True, eq=False)
class Use:
    """A weight whose rows (outputs) or columns (inputs) belong to channels.

    Attributes:
        node: The layer.
        channels: One per row, or one per column.
        rows: Which.
    """

    node: ir.Node
    channels: NDArray[np.intp]
    rows: bool


class Channels:
    """The channels of one model.

    Args:
        model: The folded model.

    Attributes:
        sets: The sets of channels that keep one factor.
        of: The channels of a tensor (its second axis).
        frozen: The tensor and the reason, of channels that keep the factor 1.
        uses: The weights that make and meet channels.
        clips: The Clip operators that channels pass through.
    """

    def __init__(self, model: ir.Model) -> None:
        self.sets = Sets()
        self.of: dict[ir.Value, NDArray[np.intp]] = {}
        self.frozen: dict[int, tuple[str, str]] = {}
        self.uses: list[Use] = []
        self.clips: list[ir.Node] = []
        for node in model.graph:
            self.look_at(node)
        for value in model.graph.inputs:
            self.freeze(value, "it is an input of the model")
        for value in model.graph.outputs:
            self.freeze(value, "it is an output of the model")

    def roots(self, value: ir.Value) -> NDArray[np.intp]:
        """Return the sets of a tensor's channels, by the channel that stands for each."""
        return self.sets.roots(self.of[value])

    def ids(self, value: ir.Value) -> NDArray[np.intp] | None:
        """Return the channels of a tensor (its second axis); None where that is not known."""
        if value not in self.of:
            size = value.shape[1] if value.shape is not None and len(value.shape) > 1 else None
            if not isinstance(size, int):
                return None
            self.of[value] = self.sets.new(size)
        return self.of[value]

    def freeze(self, value: ir.Value | None, reason: str) -> None:
        """Let the channels of a tensor keep their factor."""
        channels = self.ids(value) if value is not None and constant(value) is None else None
        if channels is not None and value is not None:
            self.frozen.update(dict.fromkeys(channels.tolist(), (str(value.name), reason)))

    def look_at(self, node: ir.Node) -> None:
        """Note what a node ties together, produces and consumes."""
        x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
        a, b = (self.ids(x) if x is not None else None), self.ids(y)
        if is_layer(node) and a is not None and b is not None and x is not None:
            weight = np.asarray(constant(node.inputs[1]))
            group = node.attributes.get_int("group", 1)
            rows = (
                weight.shape[0]
                if node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1
                else weight.shape[1]
            )
            columns = weight.shape[1] * group if node.op_type == "Conv" else weight.size // rows
            if rows == len(b) and columns == len(a):
                self.uses += [Use(node, b, True), Use(node, a, False)]
                return
        if self.ties(node, a, b):
            return
        for value in (*node.inputs, *node.outputs):
            self.freeze(value, f"{node.op_type} '{node.name}' does not pass factors on")

    def ties(self, node: ir.Node, a: NDArray[np.intp] | None, b: NDArray[np.intp] | None) -> bool:
        """Tie what a node passes factors through; tell whether it does."""
        if a is None or b is None or node.domain:
            return False
        if node.op_type in HOMOGENEOUS and len(a) == len(b):
            if node.op_type == "PRelu" and len(node.inputs) > 1 and constant(node.inputs[1]) is None:
                return False
            self.sets.tie(a, b)
            return True
        if node.op_type == "Clip" and len(a) == len(b):
            low, high = activation_bounds(node)
            if low == 0 < high:
                self.sets.tie(a, b)
                self.clips.append(node)
                return True
        if node.op_type == "Pad" and len(a) == len(b) and node.attributes.get_string("mode", "constant") == "constant":
            value = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.zeros(1)
            if value is not None and not np.any(value):
                self.sets.tie(a, b)
                return True
        if node.op_type == "Add":
            other = (
                self.ids(node.inputs[1]) if node.inputs[1] is not None and constant(node.inputs[1]) is None else None
            )
            ranks = [None if v is None or v.shape is None else len(v.shape) for v in node.inputs]
            if (
                other is not None
                and constant(node.inputs[0]) is None
                and len(a) == len(other) == len(b)
                and len({*ranks}) == 1
            ):
                self.sets.tie(a, b)
                self.sets.tie(other, b)
                return True
        if node.op_type == "Concat" and node.attributes.get_int("axis", 0) == 1:
            parts = [
                self.ids(value) if value is not None and constant(value) is None else None for value in node.inputs
            ]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts) and sum(len(part) for part in known) == len(b):
                self.sets.tie(np.concatenate(known), b)
                return True
        return False


def is_layer(node: ir.Node) -> bool:
    """Tell whether a node multiplies by a weight that is its own."""
    if node.domain or node.op_type not in {"Conv", "Gemm"} or len(node.inputs) < 2:
        return False
    value = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    own = value is not None and constant(value) is not None and len(value.uses()) == 1
    plain = node.op_type == "Conv" or not node.attributes.get_int("transA", 0)
    return own and plain and (bias is None or (constant(bias) is not None and len(bias.uses()) == 1))
