"""Cross-layer equalization: channels are scaled so that rounding them, and the weights before and behind them, costs least.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), section 4.1: for a
positively homogeneous f, W₂·f(W₁x + b₁) = (W₂S)·f(S⁻¹W₁x + S⁻¹b₁) for any diagonal S above zero. Here every channel of every tensor
belongs to a set of channels that must keep one factor: Relu, pools and Pad tie a channel to itself, Add ties its operands and its
result, Concat ties the places that it copies to. Clip does as Relu does, but its bound moves with the factor, which costs something
where it cuts (`quantcli.tune.clips`). A set has producers (rows of weights) and consumers (columns), and gets the factor for which
the predicted noise of all of them and of the tensors between is least (`quantcli.tune.noise`).

Section 4.1.3: what a channel always exceeds can be absorbed into the next bias: y = W₂·f(x) + b₂ = W₂·f(x − c) + (b₂ + W₂c) where
x ≥ c always.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from calibration.datasets import samples_in
from quantcli.bounds import activation_bounds
from quantcli.fold import constant
from quantcli.tune.bias import biased, channel_sums
from quantcli.tune.channels import Channels, is_layer
from quantcli.tune.clips import FACTORS, Spread
from quantcli.tune.noise import BRIEF, TINY, Cut, Descent, Noise, Tensor, Weight, reaching
from quantcli.tune.values import values_in_parts
from quantcli.tuning import Moved

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from calibration.observers import ChannelRanges

# A factor that is no further from 1 is left out.
ENOUGH = 1e-3
# So many samples tell what is met on average.
MET = 64
# So many of them tell about what factors would be worth.
FEW = 16
# What stays below this part of a Clip's bound counts as what is never cut, and stays there.
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
        gained: By how many dB that lowers the noise, as predicted.
        exact: Whether the model computes what it did: no channel that a Clip cuts has a factor.
    """

    channels: int = 0
    layers: tuple[str, ...] = ()
    absorbed: int = 0
    refused: tuple[tuple[str, str], ...] = ()
    moved: dict[str, Moved] = field(default_factory=dict)
    gained: float = 0.0
    exact: bool = True


@dataclass(frozen=True, eq=False)
class Grids:
    """What is rounded, and to what.

    Attributes:
        tensors: The names of the tensors.
        weights: How many steps each weight's grid has, by name, and whether that is symmetric: from zero to its end, or from end
            to end.
        steps: Of a tensor's grid: from end to end, or from zero to its end where it is symmetric.
        symmetric: Whether tensors' grids are symmetric about zero.
        shared: Whether all rows of a weight have one scale.
    """

    tensors: tuple[str, ...]
    weights: Mapping[str, tuple[int, bool]]
    steps: int
    symmetric: bool
    shared: bool


@dataclass(frozen=True, eq=False)
class Met:
    """What was met in each channel of a tensor.

    Attributes:
        low: How far it reaches below zero.
        high: How far above.
        values: How many values there were.
        active: How many of them were not zero.
        total: Their sum.
        squares: The sum of their squares.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    values: int
    active: NDArray[np.float64]
    total: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, batch: NDArray[Any]) -> Met:
        """Look at a batch, whose second axis are channels."""
        rows = batch.reshape(*batch.shape[:2], -1)
        if rows.shape[2] == 1:
            rows = np.ascontiguousarray(rows[:, :, 0].T)[None]
        low, high = np.maximum(-rows.min(axis=2).min(axis=0), 0), np.maximum(rows.max(axis=2).max(axis=0), 0)
        active = (rows != 0).sum(axis=2, dtype=np.int32).sum(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.matmul(rows[:, :, None], rows[..., None])[..., 0, 0].sum(axis=0, dtype=np.float64)
            if not np.isfinite(squares).all():  # a mask's lowest values, say
                squares = np.square(rows, dtype=np.float64).sum(axis=(0, 2))
            parts = [np.asarray(part, dtype=np.float64) for part in (active, channel_sums(batch), squares)]
        return cls(low.astype(np.float64), high.astype(np.float64), batch.size // batch.shape[1], *parts)

    def with_more(self, other: Met) -> Met:
        """Return what was met in two batches."""
        low, high = np.maximum(self.low, other.low), np.maximum(self.high, other.high)
        sums = self.active + other.active, self.total + other.total, self.squares + other.squares
        return Met(low, high, self.values + other.values, *sums)

    @property
    def variance(self) -> NDArray[np.float64]:
        """The variance of each channel."""
        return np.maximum(self.squares / self.values - np.square(self.total / self.values), 0.0)

    @property
    def power(self) -> NDArray[np.float64]:
        """The mean square of each channel's values that are not zero."""
        return self.squares / np.maximum(self.active, 1.0)


@dataclass(frozen=True, eq=False)
class Clip:
    """A Clip that channels pass through.

    Attributes:
        x: What it gets.
        y: What it gives.
        bound: Its upper bound; the lower one is 0.
    """

    x: ir.Value
    y: ir.Value
    bound: float


@dataclass(eq=False)
class Looked:
    """What was met so far in a model's tensors, kept for who looks at more of the same samples.

    Attributes:
        met: By tensor; what was met in those of ``names`` that hold channels.
        names: The tensors that were looked at.
        samples: Over how many samples.
    """

    met: dict[str, Met] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    samples: int = 0


class Equalization:
    """One model being equalized, in place.

    Args:
        model: The folded model; the weights and biases of its layers change.
        feeds: Samples that tell what tensors hold, and what Clip operators cut.
        grids: What is rounded.
        extremes: The lowest and highest values of tensors' channels, by name, where more samples than those were seen.
        samples: How many samples tell what is met on average.
        looked: What was met in the first of them, if that is known; what is met in all is put there.
    """

    def __init__(
        self,
        model: ir.Model,
        feeds: Sequence[dict[str, NDArray[Any]]],
        grids: Grids,
        extremes: Mapping[str, ChannelRanges] | None = None,
        samples: int = MET,
        looked: Looked | None = None,
    ) -> None:
        self.model, self.feeds, self.grids, self.extremes = model, feeds, grids, extremes or {}
        self.samples, self.looked = samples, looked or Looked()
        self.channels = Channels(model)
        self.clips: list[Clip] = []
        for node in self.channels.clips:
            if node.inputs[0] is not None and np.isfinite(bound := activation_bounds(node)[1]):
                self.clips.append(Clip(node.inputs[0], node.outputs[0], bound))
        self.held: dict[ir.Value, NDArray[np.float64]] = {}

    def run(self) -> Equalized:
        """Equalize, and absorb high biases."""
        spreads = self.spreads()
        factors, gained = self.solve(spreads, self.met(self.looked_at()))
        changed = self.apply(factors)
        absorbed = self.absorb(factors)
        reasons = {(name, reason) for name, reason in self.channels.frozen.values()}
        count = int((factors != 1).sum())
        refused, exact = tuple(sorted(reasons)), self.is_exact(factors, spreads)
        return Equalized(count, tuple(changed), absorbed, refused, self.moved(factors), gained, exact)

    def is_exact(self, factors: NDArray[np.float64], spreads: Mapping[str, Spread]) -> bool:
        """Tell whether no channel that a Clip cuts has a factor."""
        return not any(
            ((factors[self.channels.roots(clip.x)] != 1) & (self.highest(clip, spreads) > 1)).any()
            for clip in self.clips
        )

    def moved(self, factors: NDArray[np.float64]) -> dict[str, Moved]:
        """Return what became of every tensor that is not what it was."""
        found = {}
        for value, channels in self.channels.of.items():
            own, held = 1 / factors[self.channels.roots(value)], self.held.get(value, np.zeros(len(channels)))
            if (own != 1).any() or held.any():
                found[str(value.name)] = Moved(tuple(own.tolist()), tuple((-held).tolist()))
        return found

    def spreads(self, samples: int | None = None) -> dict[str, Spread]:
        """Return how what Clips get is spread, by the tensor that they give, over some of the samples or all."""
        found: dict[str, Spread] = {}
        names = sorted({str(clip.x.name) for clip in self.clips})
        for results in values_in_parts(self.model, self.feeds, names, samples) if names else ():
            for clip in self.clips:
                spread, name = Spread.of(results[str(clip.x.name)], clip.bound), str(clip.y.name)
                found[name] = found[name].with_more(spread) if name in found else spread
        return found

    def highest(self, clip: Clip, spreads: Mapping[str, Spread]) -> NDArray[np.float64]:
        """Return how high each channel that a Clip gets was seen to reach, as a part of where it would count as cut."""
        seen, after = spreads[str(clip.y.name)].highest, self.extremes.get(str(clip.y.name))
        if after is not None and len(after.maximum) == len(seen):
            seen = np.maximum(seen, after.maximum)
        return seen / (SAFE * clip.bound)

    def least_factors(self, spreads: Mapping[str, Spread]) -> dict[int, float]:
        """Return by channel the smallest factor that may be: of what a Clip has not cut, one that leaves it so."""
        least: dict[int, float] = {}
        for clip in self.clips:
            highest = self.highest(clip, spreads)
            own = np.where(highest > 1, FACTORS[0], highest)
            for channel, factor in zip(self.channels.of[clip.x].tolist(), own.tolist(), strict=True):
                root = self.channels.sets.find(channel)
                least[root] = max(least.get(root, 0.0), factor)
        return least

    def foreseen(self) -> float:
        """Return by how many dB factors would lower the noise, about; the model is not changed."""
        return self.solve(self.spreads(self.samples), self.met(self.looked_at()), BRIEF)[1]

    def solve(
        self, spreads: Mapping[str, Spread], met: Mapping[str, Met], descent: Descent | None = None
    ) -> tuple[NDArray[np.float64], float]:
        """Return the factor of every channel's set, by the channel that stands for it, and by how many dB they lower the noise."""
        count = len(self.channels.sets.parent)
        free = np.ones(count, dtype=bool)
        for channel in self.channels.frozen:
            free[self.channels.sets.find(channel)] = False
        lowest = np.full(count, -np.inf)
        for root, factor in self.least_factors(spreads).items():
            lowest[root] = np.log(factor) if factor > 0 else -np.inf
        noise, used = self.noise(met, spreads)
        logs, gained = noise.least(free[used], lowest[used], descent)
        factors = np.ones(count)
        factors[used] = np.where(np.abs(np.expm1(logs)) > ENOUGH, np.exp(logs), 1.0)
        return factors, gained

    def looked_at(self) -> set[str]:
        """Return the tensors that tell how much noise there is: what is rounded, and what layers and sums get and give."""
        values = {str(value.name) for value in self.channels.of}
        layers = [use.node for use in self.channels.uses if use.rows]
        sums = [node for node in self.model.graph if node.op_type == "Add" and node.outputs[0] in self.channels.of]
        wanted = {*self.grids.tensors} & values | {str(node.outputs[0].name) for node in (*layers, *sums)}
        return wanted | {str(node.inputs[0].name) for node in layers if node.inputs[0] is not None}

    def noise(self, met: Mapping[str, Met], spreads: Mapping[str, Spread]) -> tuple[Noise, NDArray[np.intp]]:
        """Return what is rounded, in terms of sets of channels by their place among some, and those sets."""
        values = {str(value.name): value for value in self.channels.of}
        layers = [use.node for use in self.channels.uses if use.rows]
        roots = {(use.node, use.rows): self.channels.sets.roots(use.channels) for use in self.channels.uses}
        own = {name: self.channels.roots(values[name]) for name in self.grids.tensors if name in met}
        used = np.unique(np.concatenate([*roots.values(), *own.values(), np.zeros(0, dtype=np.intp)]))
        tensors, weights = [], []
        for name, sets in own.items():
            low, high = reaching(met[name].low, met[name].high)
            gain = self.gain(values[name], met) * met[name].active / met[name].values
            tensors.append(Tensor(np.searchsorted(used, sets), low, high, gain, met[name].power))
        for node in layers:
            weight, x, y = node.inputs[1], node.inputs[0], met.get(str(node.outputs[0].name))
            before = met.get(str(x.name)) if x is not None else None
            if weight is None or weight.name not in self.grids.weights or before is None or y is None:
                continue
            low, high = reach_of_taps(node)
            grid_steps, symmetric = self.grids.weights[str(weight.name)]
            if symmetric:
                low, high = np.zeros_like(low), np.maximum(low, high)
            taps = np.asarray(constant(weight)).size / max(low.size, 1)
            power = (before.variance * taps / max(y.variance.sum(), TINY)).reshape(-1, low.shape[1])
            rows, columns = (np.searchsorted(used, roots[node, by_row]) for by_row in (True, False))
            inputs = columns.reshape(power.shape)
            weights.append(Weight.of(rows, inputs, low, high, power, grid_steps))
        cuts = []
        for clip in self.clips:
            sets = self.channels.roots(clip.x)
            known = np.isin(sets, used)
            changes = self.gain(clip.y, met)[:, None] * spreads[str(clip.y.name)].changes(clip.bound)
            cuts.append(Cut(np.searchsorted(used, sets[known]), np.log(FACTORS), changes[known]))
        grids = self.grids
        return Noise(tensors, weights, grids.steps, grids.symmetric, grids.shared, len(used), cuts), used

    def met(self, wanted: set[str]) -> dict[str, Met]:
        """Return what is met in the channels of tensors, over some of the samples, and at the ends of all that were seen."""
        self.look_at(wanted)
        # Of what a mask's infinities stand in, nothing is known.
        found = {name: one for name, one in self.looked.met.items() if np.isfinite(one.squares).all()}
        for name, seen in self.extremes.items():
            if name in found and len(found[name].low) == len(seen.minimum):
                low, high = np.maximum(-seen.minimum, 0.0), np.maximum(seen.maximum, 0.0)
                found[name] = replace(found[name], low=low.astype(np.float64), high=high.astype(np.float64))
        return found

    def look_at(self, wanted: set[str]) -> None:
        """Look at some of the samples, as far as that was not done."""
        looked, names = self.looked, frozenset(wanted)
        if looked.names != names:
            looked.met, looked.names, looked.samples = {}, names, 0
        count = min(self.samples, sum(samples_in(feeds) for feeds in self.feeds))
        if looked.samples >= count:
            return
        given = {str(value.name) for value in self.model.graph.inputs}
        made = [name for name in sorted(names) if name not in given]
        for results in values_in_parts(self.model, self.feeds, made, count, looked.samples):
            rows = samples_in({name: results[name] for name in self.feeds[0]})
            for name in sorted(names):
                array = results.pop(name, None)
                if array is not None and array.ndim > 1 and array.size:
                    batch = Met.of(array)
                    looked.met[name] = looked.met[name].with_more(batch) if name in looked.met else batch
            looked.samples += rows

    def gain(self, value: ir.Value, met: Mapping[str, Met]) -> NDArray[np.float64]:
        """Return what noise in each channel of a tensor adds to the layers and sums behind it, as a part of their variance."""
        total = np.zeros(len(self.channels.of[value]))
        for user in value.consumers():
            result = user.outputs[0]
            energy = max(met[str(result.name)].variance.sum(), TINY) if str(result.name) in met else None
            if energy is not None and is_layer(user) and user.inputs[0] is value:
                total += column_energies(user) / energy
            elif energy is not None and user.op_type == "Add":
                total += 1 / energy
            elif result in self.channels.of and len(self.channels.of[result]) == len(total):
                total += self.gain(result, met) / pooled(user, value)
        return total

    def apply(self, factors: NDArray[np.float64]) -> list[str]:
        """Divide rows and biases by their factors, and multiply columns by theirs."""
        changed: dict[str, None] = {}
        for use in self.channels.uses:
            own = factors[self.channels.sets.roots(use.channels)]
            if (own == 1).all():
                continue
            scale_weight(use.node, 1 / own if use.rows else own, use.rows)
            changed[str(use.node.name)] = None
        return list(changed)

    def absorb(self, factors: NDArray[np.float64]) -> int:
        """Move what a Relu never cuts from a layer's bias into the biases behind it, where no padding stands between.

        How low samples that are not run here take the Relu is known by its extremes. A shift below that would change the model, and
        put integers below zero on the Relu's grid, for which ONNX Runtime computes the layer in float.
        """
        pairs = [pair for node in self.model.graph if (pair := self.absorbing(node)) is not None]
        names = [str(relu.inputs[0].name) for _, relu, _ in pairs if relu.inputs[0] is not None]
        if not pairs:
            return 0
        lowest: dict[str, NDArray[np.float32]] = {}
        for results in values_in_parts(self.model, self.feeds, names):
            for name in names:
                values = results[name]
                found = values.min(axis=tuple(axis for axis in range(values.ndim) if axis != 1))
                lowest[name] = np.minimum(lowest[name], found) if name in lowest else found
        total = 0
        for (layer, relu, readers), name in zip(pairs, names, strict=True):
            held, given = np.maximum(lowest[name].astype(np.float64), 0.0), relu.outputs[0]
            if (seen := self.extremes.get(str(given.name))) is not None:
                held = np.minimum(held, np.maximum(seen.minimum / factors[self.channels.roots(given)], 0.0))
            if not held.any():
                continue
            total += int(np.count_nonzero(held))
            self.held |= {layer.outputs[0]: held, given: held}
            move_bias(layer, readers, held, self.model.graph)
        return total

    def absorbing(self, node: ir.Node) -> tuple[ir.Node, ir.Node, list[ir.Node]] | None:
        """Return a layer, the Relu behind it and the layers behind that, where a bias can pass; None where not."""
        if node.op_type != "Relu" or node.inputs[0] is None or node.outputs[0].is_graph_output():
            return None
        layer, readers = node.inputs[0].producer(), list(node.outputs[0].consumers())
        plain = layer is not None and is_layer(layer) and len(node.inputs[0].uses()) == 1
        if layer is None or not plain or node.inputs[0].is_graph_output() or not readers:
            return None
        fits = all(
            is_layer(reader) and not is_padded(reader) and reader.attributes.get_int("group", 1) == 1
            for reader in readers
        )
        return (layer, node, readers) if fits else None


def equalize(
    model: ir.Model,
    feeds: Sequence[dict[str, NDArray[Any]]],
    grids: Grids,
    extremes: Mapping[str, ChannelRanges] | None = None,
    looked: Looked | None = None,
) -> tuple[ir.Model, Equalized]:
    """Return an equalized copy of a folded model, which computes the same but for what Clips cut, and what was done.

    Args:
        model: The folded model; it is not changed.
        feeds: Samples, for what tensors hold, what Clip operators cut and what biases can be absorbed.
        grids: What is rounded.
        extremes: The lowest and highest values of tensors' channels, by name, where more samples than those were seen.
        looked: What was met in the first of the samples, if that is known.
    """
    changed = model.clone()
    return changed, Equalization(changed, feeds, grids, extremes, looked=looked).run()


def is_padded(node: ir.Node) -> bool:
    """Tell whether a convolution or a pool meets zeros that are not its input's."""
    return node.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", "VALID"} or any(
        node.attributes.get_ints("pads", [])
    )


def reach_of_taps(node: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how far a weight's taps reach below zero and above, by row and column within the row's group."""
    weight = np.asarray(constant(node.inputs[1]), dtype=np.float64)
    if node.op_type == "Gemm":
        table = weight if node.attributes.get_int("transB", 0) else weight.T
        return np.maximum(-table, 0.0), np.maximum(table, 0.0)
    table = weight.reshape(weight.shape[0], weight.shape[1], -1)
    return -table.min(axis=2, initial=0.0), table.max(axis=2, initial=0.0)


def columns_of(rows: int, columns: int, group: int) -> NDArray[np.intp]:
    """Return the number among all inputs of each column within a row's group: (rows, columns of a group)."""
    of = np.arange(rows) // (rows // group)
    found: NDArray[np.intp] = of[:, None] * columns + np.arange(columns)[None]
    return found


def column_energies(node: ir.Node) -> NDArray[np.float64]:
    """Return the sum of the squares of a weight's elements that each of its inputs is multiplied with."""
    weight = np.square(np.asarray(constant(node.inputs[1]), dtype=np.float64))
    if node.op_type == "Gemm":
        found: NDArray[np.float64] = weight.sum(axis=0 if node.attributes.get_int("transB", 0) else 1)
        return found
    group = node.attributes.get_int("group", 1)
    by_group = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
    energies: NDArray[np.float64] = by_group.sum(axis=(1, 3)).reshape(-1)
    return energies


def pooled(node: ir.Node, value: ir.Value) -> float:
    """Return of how many values an operator takes the average, as far as that is known."""
    if node.op_type == "AveragePool":
        return float(np.prod(node.attributes.get_ints("kernel_shape", [1])))
    if node.op_type == "GlobalAveragePool" and value.shape is not None:
        return float(np.prod([size if isinstance(size, int) else 1 for size in value.shape[2:]]))
    return 1.0


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
        spread = columns_of(weight.shape[0], weight.shape[1], node.attributes.get_int("group", 1))
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
