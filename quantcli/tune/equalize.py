"""Cross-layer equalization: channels are scaled so that the weights before and behind them have alike ranges.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), section 4.1: for a
positively homogeneous f, W₂·f(W₁x + b₁) = (W₂S)·f(S⁻¹W₁x + S⁻¹b₁), and sᵢ = √(r₁ᵢ / r₂ᵢ) (equation 11) makes the ranges r₁ᵢ and r₂ᵢ
of row i of W₁ and column i of W₂ alike. Here every channel of every tensor belongs to a set of channels that must keep one factor:
Relu, pools and Pad tie a channel to itself, Add ties its operands and its result, Concat ties the places that it copies to. A set
has producers (rows of weights) and consumers (columns), and gets one factor of all their ranges.

Section 4.1.3: what a channel always exceeds can be absorbed into the next bias: y = W₂·f(x) + b₂ = W₂·f(x − c) + (b₂ + W₂c) where
x ≥ c always.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from calibration.hooks.onnxruntime import Runner
from quantcli.fold import constant
from quantcli.probe import with_outputs
from quantcli.tune.bias import biased
from quantcli.tuning import Moved

if TYPE_CHECKING:
    from collections.abc import Sequence

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
ROUNDS, ENOUGH = 40, 1e-3
# No factor is further from 1: beyond, what is scaled has no weight left to speak of.
LARGEST_FACTOR = 1e4
# A clipped channel counts as one that is never clipped where it stays this part below its bound.
SAFE = 0.9


@dataclass(frozen=True)
class Equalized:
    """What was done.

    Attributes:
        channels: How many channels have a factor.
        layers: The layers whose weights changed.
        absorbed: How many channels gave a part of their bias to the layers behind.
        refused: The tensors whose channels keep their factor, with the reason.
        moved: What became of tensors, by name.
    """

    channels: int = 0
    layers: tuple[str, ...] = ()
    absorbed: int = 0
    refused: tuple[tuple[str, str], ...] = ()
    moved: dict[str, Moved] = field(default_factory=dict)


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


class Equalization:
    """One model being equalized, in place.

    Args:
        model: The folded model; the weights and biases of its layers change.
        feeds: Samples that tell what Clip operators really clip; none of them needs be there where there is no Clip.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[dict[str, NDArray[Any]]] = ()) -> None:
        self.model, self.feeds = model, feeds
        self.sets = Sets()
        self.channels: dict[ir.Value, NDArray[np.intp]] = {}
        self.frozen: dict[int, tuple[str, str]] = {}
        self.uses: list[Use] = []
        self.clips: list[ir.Node] = []
        self.held: dict[ir.Value, NDArray[np.float64]] = {}

    def run(self, absorb: bool = True) -> Equalized:
        """Equalize, and absorb high biases."""
        for node in self.model.graph:
            self.look_at(node)
        for value in self.model.graph.inputs:
            self.freeze(value, "it is an input of the model")
        for value in self.model.graph.outputs:
            self.freeze(value, "it is an output of the model")
        bounds = self.clip_bounds()
        factors = self.solve(bounds)
        changed = self.apply(factors)
        absorbed = self.absorb() if absorb and self.feeds else 0
        reasons = {(name, reason) for name, reason in self.frozen.values()}
        count = int((np.abs(factors - 1) > ENOUGH).sum())
        return Equalized(count, tuple(changed), absorbed, tuple(sorted(reasons)), self.moved(factors))

    def moved(self, factors: NDArray[np.float64]) -> dict[str, Moved]:
        """Return what became of every tensor that is not what it was."""
        found = {}
        for value, channels in self.channels.items():
            own, held = 1 / factors[self.sets.roots(channels)], self.held.get(value, np.zeros(len(channels)))
            if np.abs(own - 1).max(initial=0.0) > ENOUGH or held.any():
                found[str(value.name)] = Moved(tuple(own.tolist()), tuple((-held).tolist()))
        return found

    def ids(self, value: ir.Value) -> NDArray[np.intp] | None:
        """Return the channels of a tensor (its second axis); None where that is not known."""
        if value not in self.channels:
            size = value.shape[1] if value.shape is not None and len(value.shape) > 1 else None
            if not isinstance(size, int):
                return None
            self.channels[value] = self.sets.new(size)
        return self.channels[value]

    def freeze(self, value: ir.Value | None, reason: str) -> None:
        """Let the channels of a tensor keep their factor."""
        channels = self.ids(value) if value is not None and constant(value) is None else None
        if channels is not None and value is not None:
            self.frozen.update(dict.fromkeys(channels.tolist(), (str(value.name), reason)))

    def look_at(self, node: ir.Node) -> None:
        """Note what a node ties together, produces and consumes."""
        x, y = node.inputs[0] if node.inputs else None, node.outputs[0]
        a, b = (self.ids(x) if x is not None else None), self.ids(y)
        if self.is_layer(node) and a is not None and b is not None and x is not None:
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

    def is_layer(self, node: ir.Node) -> bool:
        """Tell whether a node multiplies by a weight that is its own."""
        if node.domain or node.op_type not in {"Conv", "Gemm"} or len(node.inputs) < 2:
            return False
        value = node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        own = value is not None and constant(value) is not None and len(value.uses()) == 1
        plain = node.op_type == "Conv" or not node.attributes.get_int("transA", 0)
        return own and plain and (bias is None or (constant(bias) is not None and len(bias.uses()) == 1))

    def ties(self, node: ir.Node, a: NDArray[np.intp] | None, b: NDArray[np.intp] | None) -> bool:
        """Tie what a node passes factors through; tell whether it does."""
        if a is None or b is None or node.domain:
            return False
        if node.op_type in HOMOGENEOUS and len(a) == len(b):
            if node.op_type == "PRelu" and len(node.inputs) > 1 and constant(node.inputs[1]) is None:
                return False
            self.sets.tie(a, b)
            return True
        if node.op_type == "Clip" and len(a) == len(b) and lower_bound(node) == 0:
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

    def clip_bounds(self) -> dict[int, float]:
        """Return by channel the smallest factor that leaves a Clip without effect; channels that it clips are frozen."""
        if not self.clips:
            return {}
        highest: dict[ir.Value, NDArray[np.float64]] = {}
        names = [str(node.inputs[0].name) for node in self.clips if node.inputs[0] is not None]
        runner = Runner(lambda: with_outputs(self.model, names))
        for feeds in self.feeds:
            results = runner.run(feeds, names)
            for node, name in zip(self.clips, names, strict=True):
                values = results[name]
                found = values.max(axis=tuple(axis for axis in range(values.ndim) if axis != 1)).astype(np.float64)
                value = node.inputs[0]
                assert value is not None  # noqa: S101 - a Clip has an operand
                highest[value] = np.maximum(highest[value], found) if value in highest else found
        least: dict[int, float] = {}
        for node in self.clips:
            value = node.inputs[0]
            bound = upper_bound(node)
            if value is None or bound is None:
                continue
            channels = self.ids(value)
            seen = highest.get(value)
            for place, channel in enumerate([] if channels is None else channels.tolist()):
                root = self.sets.find(channel)
                if seen is None or seen[place] > SAFE * bound:
                    self.frozen.setdefault(root, (str(value.name), f"Clip '{node.name}' clips some of its channels"))
                else:
                    least[root] = max(least.get(root, 0.0), seen[place] / (SAFE * bound))
        return least

    def solve(self, least: dict[int, float]) -> NDArray[np.float64]:
        """Return the factor of every channel's set, by the channel that stands for it."""
        count = len(self.sets.parent)
        factors = np.ones(count)
        frozen = np.zeros(count, dtype=bool)
        for channel in self.frozen:
            frozen[self.sets.find(channel)] = True
        floor = np.zeros(count)
        for root, bound in least.items():
            floor[self.sets.find(root)] = max(floor[self.sets.find(root)], bound)
        roots = {id(use): self.sets.roots(use.channels) for use in self.uses}
        weights = {use.node: magnitudes(use.node) for use in self.uses}
        for _ in range(ROUNDS):
            ranges = np.zeros((2, count))
            scaled = {}
            for node, (table, spread) in weights.items():
                row, column = (
                    next(roots[id(u)] for u in self.uses if u.node is node and u.rows is rows) for rows in (True, False)
                )
                scaled[node] = table / factors[row][:, None] * factors[column][spread]
                np.maximum.at(ranges[0], row, scaled[node].max(axis=1))
                np.maximum.at(ranges[1], column[spread].reshape(-1), scaled[node].reshape(-1))
            both = (ranges[0] > 0) & (ranges[1] > 0) & ~frozen
            step = np.ones(count)
            step[both] = np.sqrt(ranges[0][both] / ranges[1][both])
            after = np.clip(factors * step, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
            after = np.where(frozen, 1.0, np.maximum(after, floor))
            change = np.abs(np.log(after / factors)).max(initial=0.0)
            factors = after
            if change < ENOUGH:
                break
        return factors

    def apply(self, factors: NDArray[np.float64]) -> list[str]:
        """Divide rows and biases by their factors, and multiply columns by theirs."""
        changed: dict[str, None] = {}
        for use in self.uses:
            own = factors[self.sets.roots(use.channels)]
            if np.abs(own - 1).max(initial=0.0) <= ENOUGH:
                continue
            scale_weight(use.node, 1 / own if use.rows else own, use.rows)
            changed[str(use.node.name)] = None
        return list(changed)

    def absorb(self) -> int:
        """Move what a Relu never cuts from a layer's bias into the biases behind it, where no padding stands between."""
        pairs = [pair for node in self.model.graph if (pair := self.absorbing(node)) is not None]
        names = [str(relu.inputs[0].name) for _, relu, _ in pairs if relu.inputs[0] is not None]
        if not pairs:
            return 0
        runner = Runner(lambda: with_outputs(self.model, names))
        lowest: dict[str, NDArray[np.float32]] = {}
        for feeds in self.feeds:
            for name, values in runner.run(feeds, names).items():
                found = values.min(axis=tuple(axis for axis in range(values.ndim) if axis != 1))
                lowest[name] = np.minimum(lowest[name], found) if name in lowest else found
        total = 0
        for (layer, relu, readers), name in zip(pairs, names, strict=True):
            held = np.maximum(lowest[name].astype(np.float64), 0.0)
            if not held.any():
                continue
            total += int(np.count_nonzero(held))
            self.held |= {layer.outputs[0]: held, relu.outputs[0]: held}
            move_bias(layer, readers, held, self.model.graph)
        return total

    def absorbing(self, node: ir.Node) -> tuple[ir.Node, ir.Node, list[ir.Node]] | None:
        """Return a layer, the Relu behind it and the layers behind that, where a bias can pass; None where not."""
        if node.op_type != "Relu" or node.inputs[0] is None or node.outputs[0].is_graph_output():
            return None
        layer, readers = node.inputs[0].producer(), list(node.outputs[0].consumers())
        plain = layer is not None and self.is_layer(layer) and len(node.inputs[0].uses()) == 1
        if layer is None or not plain or node.inputs[0].is_graph_output() or not readers:
            return None
        fits = all(
            self.is_layer(reader) and not is_padded(reader) and reader.attributes.get_int("group", 1) == 1
            for reader in readers
        )
        return (layer, node, readers) if fits else None


def equalize(
    model: ir.Model, feeds: Sequence[dict[str, NDArray[Any]]] = (), absorb: bool = True
) -> tuple[ir.Model, Equalized]:
    """Return an equalized copy of a folded model, which computes the same, and what was done.

    Args:
        model: The folded model; it is not changed.
        feeds: Samples, for what Clip operators clip and what biases can be absorbed.
        absorb: Whether to absorb high biases.
    """
    changed = model.clone()
    return changed, Equalization(changed, feeds).run(absorb)


def lower_bound(node: ir.Node) -> float | None:
    """Return the lower bound of a Clip; None where it has none, or a computed one."""
    held = constant(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return float(held.item()) if held is not None else None


def upper_bound(node: ir.Node) -> float | None:
    """Return the upper bound of a Clip; None where it has none."""
    held = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
    return float(held.item()) if held is not None else None


def is_padded(node: ir.Node) -> bool:
    """Tell whether a convolution or a pool meets zeros that are not its input's."""
    return node.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", "VALID"} or any(
        node.attributes.get_ints("pads", [])
    )


def magnitudes(node: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Return the largest magnitudes of a weight by row and column within the row's group, and each one's column.

    Returns:
        (rows, columns of a group), and of the same shape the number of the column among all inputs.
    """
    weight = np.abs(np.asarray(constant(node.inputs[1]), dtype=np.float64))
    if node.op_type == "Gemm":
        table = weight if node.attributes.get_int("transB", 0) else weight.T
        return table, np.broadcast_to(np.arange(table.shape[1]), table.shape)
    table = weight.reshape(weight.shape[0], weight.shape[1], -1).max(axis=2)
    group = node.attributes.get_int("group", 1)
    of = np.arange(len(table)) // (len(table) // group)
    return table, of[:, None] * table.shape[1] + np.arange(table.shape[1])[None]


def scale_weight(node: ir.Node, factors: NDArray[np.float64], rows: bool) -> None:
    """Multiply the rows (and the bias), or the columns, of a layer's weight by factors."""
    value = node.inputs[1]
    assert value is not None  # noqa: S101 - a layer has a weight
    weight = np.asarray(constant(value), dtype=np.float64)
    if node.op_type == "Gemm":
        along = 0 if rows == bool(node.attributes.get_int("transB", 0)) else 1
        scaled = weight * (factors[:, None] if along == 0 else factors[None])
    elif rows:
        scaled = weight * factors.reshape(-1, *[1] * (weight.ndim - 1))
    else:
        spread = magnitudes(node)[1]
        scaled = weight * factors[spread].reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    store(value, scaled)
    bias = node.inputs[2] if rows and len(node.inputs) > 2 else None
    if bias is not None:
        store(bias, np.asarray(constant(bias), dtype=np.float64).reshape(-1) * factors)


def move_bias(layer: ir.Node, readers: list[ir.Node], held: NDArray[np.float64], graph: ir.Graph) -> None:
    """Take constants from a layer's bias, and add what they give behind the next weights to the biases there."""
    bias = biased(layer, len(held), graph)
    if bias is None or layer.inputs[2] is None:
        return
    store(layer.inputs[2], bias - held)
    for reader in readers:
        weight = np.asarray(constant(reader.inputs[1]), dtype=np.float64)
        if reader.op_type == "Gemm":
            matrix = weight if reader.attributes.get_int("transB", 0) else weight.T
        else:
            matrix = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
        found = biased(reader, len(matrix), graph)
        if found is not None and reader.inputs[2] is not None:
            store(reader.inputs[2], found + matrix @ held)


def store(value: ir.Value, array: NDArray[Any]) -> None:
    """Put another array into a constant."""
    held = np.ascontiguousarray(array, dtype=np.float32)
    value.const_value = ir.tensor(held, name=value.name)
    value.shape = ir.Shape(held.shape)
