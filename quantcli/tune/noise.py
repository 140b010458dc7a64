"""Predicted noise: what rounding tensors and weights adds to the outputs of a model's layers, and the factors that make it least.

A channel may be divided by a factor f before it is rounded and multiplied by it behind (Nagel et al. 2019, arXiv 1906.04721,
section 4.1): the float model stays what it is but for Clips, the quantized one does not. Every layer's noise is a part of the
variance of what it gives:

- a **tensor** has the step Δ that its furthest channel needs, max(y/f) − min(y/f) over the number of steps. A value that is not
  zero is rounded with an error of Δ²/12 in the mean of squares, but of no more than its own square: together u·p / (u + p), with
  u = f²·Δ²/12 and p the channel's power. Each reader multiplies that by the squares of its weights;
- a **weight** has the step that its largest element needs, or its lowest and its highest where its grid is not symmetric, by row
  or for all of them, once its columns are multiplied by their channels' factors and its rows divided by theirs. Its error is
  multiplied by the variance of what it meets, divided by f².

Nagel et al. (equation 11) make ranges of weights alike, and SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation 4) moves a
chosen part of the difficulty from tensors to weights. Here the sum of both noises is made least, by gradient descent on log f
(Adam, Kingma and Ba 2014, arXiv 1412.6980, algorithm 1); largest values are taken as norms of high order, which have slopes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Array = NDArray[np.float64]
Sets = NDArray[np.intp]

# What rounding by second moments leaves of the noise of rounding to nearest, about.
ROUNDED = 0.5
# A channel counts as one that reaches at least this part of its tensor's end: other samples may reach further than those seen.
LEAST_REACH = 0.3
# So many elements of a row may become its largest.
CONSIDERED = 64
# No factor is further from 1 than e^8.
FURTHEST = 8.0
TINY = 1e-30


@dataclass(frozen=True)
class Descent:
    """How the factors for which noise is least are looked for.

    Attributes:
        steps: How many steps are taken.
        rate: How far the first of them goes, in logarithms of factors; the last goes next to nowhere.
        decays: How slowly the means of slopes and of their squares follow.
    """

    steps: int
    rate: float
    decays: tuple[float, float]


# What a Clip cuts grows steeply: past it, shorter steps lead further. A brief descent tells about how much there is to gain.
WHOLE, STEEP, BRIEF = Descent(150, 0.1, (0.9, 0.99)), Descent(100, 0.05, (0.9, 0.95)), Descent(15, 0.1, (0.9, 0.99))


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor that is rounded.

    Attributes:
        sets: The set of channels that each channel belongs to.
        low: How far each channel reaches below zero, at least 0.
        high: How far above.
        gain: What a unit of noise in each channel adds to the readers' outputs, as a part of their variance.
        power: The mean square of each channel's values that are not zero.
    """

    sets: Sets
    low: Array
    high: Array
    gain: Array
    power: Array


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that is rounded.

    Attributes:
        rows: The set that each row (output) belongs to.
        columns: The sets of the columns (inputs) of the elements of each row that may be its furthest, (rows, elements).
        low: How far each of those elements' taps reach below zero, of the same shape; 0 where the grid is symmetric.
        high: How far above, or on either side where it is symmetric.
        inputs: The sets of all columns, (groups, columns of a group); a group's rows stand together.
        power: The variance of what meets each column times the number of taps, as a part of the outputs' variance.
        steps: How many steps the grid has: from end to end, or from zero to its end where it is symmetric.
    """

    rows: Sets
    columns: Sets
    low: Array
    high: Array
    inputs: Sets
    power: Array
    steps: int

    @classmethod
    def of(cls, rows: Sets, inputs: Sets, low: Array, high: Array, power: Array, steps: int) -> Weight:
        """Return a weight of which only the furthest elements of each row are kept: no other is likely to become the furthest.

        Args:
            rows: The set of each row.
            inputs: The sets of the columns of each group.
            low: How far each element's taps reach below zero, (rows, columns of a group).
            high: How far above.
            power: As above.
            steps: As above.
        """
        columns = np.repeat(inputs, len(rows) // len(inputs), axis=0)
        if low.shape[1] > CONSIDERED:
            furthest = -np.maximum(low, high)
            places = np.sort(np.argpartition(furthest, CONSIDERED - 1, axis=1)[:, :CONSIDERED], axis=1)
            low, high = np.take_along_axis(low, places, axis=1), np.take_along_axis(high, places, axis=1)
            columns = np.take_along_axis(columns, places, axis=1)
        return cls(rows, columns, low, high, inputs, power, steps)


@dataclass(frozen=True, eq=False)
class Cut:
    """What a Clip cuts off a tensor's channels where they have factors (`quantcli.tune.clips`).

    Attributes:
        sets: The set of channels that each channel belongs to.
        logs: The logarithms of some factors, rising.
        noise: What each of them adds to the readers' outputs, as a part of their variance, (channels, factors).
    """

    sets: Sets
    logs: Array
    noise: Array


class Cuts:
    """Clips, their channels one after the other.

    Between two factors the root of the noise is interpolated, since it grows about in proportion to what a bound moves by.

    Args:
        cuts: One or more, of the same factors.
    """

    def __init__(self, cuts: Sequence[Cut]) -> None:
        self.sets = np.concatenate([cut.sets for cut in cuts])
        self.logs, self.roots = cuts[0].logs, np.sqrt(np.concatenate([cut.noise for cut in cuts]))
        self.slopes = np.diff(self.roots, axis=1) / np.diff(self.logs)

    def at(self, factors: Array) -> tuple[float, Array]:
        """Return their noise, and its slope by the logarithm of each set's factor."""
        wanted = np.log(factors[self.sets])
        logs = np.clip(wanted, self.logs[0], self.logs[-1])
        place = np.clip(np.searchsorted(self.logs, logs, side="right") - 1, 0, len(self.logs) - 2)
        rows = np.arange(len(logs))
        slopes = self.slopes[rows, place]
        roots = self.roots[rows, place] + slopes * (logs - self.logs[place])
        slope = np.bincount(self.sets, np.where(logs == wanted, 2 * roots * slopes, 0.0), len(factors))
        return float(np.square(roots).sum()), slope.astype(np.float64, copy=False)


@dataclass(frozen=True, eq=False)
class Parts:
    """Values that stand one after the other, part by part.

    Attributes:
        starts: Where each part begins; none is empty.
        of: The part that each value belongs to.
    """

    starts: Sets
    of: Sets

    @classmethod
    def of_lengths(cls, lengths: Iterable[int]) -> Parts:
        """Return parts of so many values each."""
        each = np.fromiter(lengths, dtype=np.intp)
        return cls(np.cumsum(each) - each, np.repeat(np.arange(len(each)), each))

    def sums(self, values: Array) -> Array:
        """Return the sum of each part."""
        found: Array = np.add.reduceat(values, self.starts)
        return found

    def peaks(self, values: Array) -> tuple[Array, Array]:
        """Return about the largest of each part's values above zero (their norm of order 16), and each one's share in its slope."""
        furthest = np.maximum.reduceat(values, self.starts)
        largest = np.maximum(furthest, TINY)
        powers = np.square(np.square(np.square(np.square(values / largest[self.of]))))
        totals = np.maximum(self.sums(powers), TINY)
        return np.where(furthest > 0, largest * totals ** (1 / 16), 0.0), powers / totals[self.of]


class Tensors:
    """Tensors, their channels one after the other.

    Args:
        tensors: One or more.
        steps: How many steps a grid has: from end to end, or from zero to its end where it is symmetric.
        symmetric: Whether grids are symmetric about zero.
    """

    def __init__(self, tensors: Sequence[Tensor], steps: int, symmetric: bool) -> None:
        self.steps, self.symmetric = steps, symmetric
        self.parts = Parts.of_lengths(len(tensor.sets) for tensor in tensors)
        self.sets = np.concatenate([tensor.sets for tensor in tensors])
        self.low, self.high = (np.concatenate([getattr(one, name) for one in tensors]) for name in ("low", "high"))
        self.gain, self.power = (np.concatenate([getattr(one, name) for one in tensors]) for name in ("gain", "power"))

    def at(self, factors: Array) -> tuple[float, Array]:
        """Return their noise, and its slope by the logarithm of each set's factor."""
        own, of = factors[self.sets], self.parts.of
        if self.symmetric:
            spans, share = self.parts.peaks(np.maximum(self.low, self.high) / own)
            change = -spans[of] * share
        else:
            (high, above), (low, below) = (self.parts.peaks(end / own) for end in (self.high, self.low))
            spans, change = high + low, -high[of] * above - low[of] * below
        rounding = np.square(own * (spans / self.steps)[of]) / 12
        both = rounding + self.power + TINY
        noise = self.gain * rounding * self.power / both
        direct = 2 * noise * self.power / both
        through = self.parts.sums(direct) / np.where(spans > 0, spans, 1.0)
        slope = np.bincount(self.sets, direct + through[of] * change, len(factors)).astype(np.float64, copy=False)
        return float(noise.sum()), slope


class Weights:
    """Weights: their rows, the elements of those, and the columns of their groups, each one after the other.

    Args:
        weights: One or more.
        shared: Whether all rows of a weight have one scale.
    """

    def __init__(self, weights: Sequence[Weight], shared: bool) -> None:
        self.shared = shared
        self.elements_of_rows = Parts.of_lengths(w.columns.shape[1] for w in weights for _ in w.rows)
        self.elements_of_weights = Parts.of_lengths(w.columns.size for w in weights)
        self.rows_of_weights = Parts.of_lengths(len(w.rows) for w in weights)
        self.rows_of_groups = Parts.of_lengths(len(w.rows) // len(w.inputs) for w in weights for _ in w.inputs)
        self.inputs_of_groups = Parts.of_lengths(w.inputs.shape[1] for w in weights for _ in w.inputs)
        self.rows = np.concatenate([w.rows for w in weights])
        self.steps = np.array([w.steps for w in weights], dtype=np.float64)[self.rows_of_weights.of]
        self.columns, self.inputs = (
            np.concatenate([getattr(w, name).reshape(-1) for w in weights]) for name in ("columns", "inputs")
        )
        self.low, self.high, self.power = (
            np.concatenate([getattr(w, name).reshape(-1) for w in weights]) for name in ("low", "high", "power")
        )
        self.symmetric = not self.low.any()

    def at(self, factors: Array) -> tuple[float, Array]:
        """Return their noise, and its slope by the logarithm of each set's factor."""
        count, elements, rows = len(factors), self.elements_of_rows, self.rows_of_groups
        own = factors[self.rows] if self.shared else np.ones(len(self.rows))
        scale, parts = factors[self.columns] / own[elements.of], self.elements_of_weights if self.shared else elements
        span, share = parts.peaks(self.high * scale)
        if not self.symmetric:
            low, below = parts.peaks(self.low * scale)
            both = span + low
            share = (span[parts.of] * share + low[parts.of] * below) / np.where(both > 0, both, 1.0)[parts.of]
            span = both
        if self.shared:
            span = span[self.rows_of_weights.of]
        step = ROUNDED / 12 * np.square(span / self.steps) * np.square(own)
        met = self.power / np.square(factors[self.inputs])
        noise = step * self.inputs_of_groups.sums(met)[rows.of]
        # A larger element means a larger step: of its row, or of all rows.
        if self.shared:
            pulls = 2 * self.rows_of_weights.sums(noise)[self.elements_of_weights.of] * share
        else:
            pulls = 2 * noise[elements.of] * share
        slope = np.bincount(self.columns, pulls, count).astype(np.float64, copy=False)
        slope -= np.bincount(self.inputs, 2 * rows.sums(step)[self.inputs_of_groups.of] * met, count)
        if self.shared:
            slope += np.bincount(self.rows, 2 * noise - elements.sums(pulls), count)
        return float(noise.sum()), slope


class Noise:
    """Everything that is rounded.

    Args:
        tensors: The tensors.
        weights: The weights.
        steps: How many steps a tensor's grid has: from end to end, or from zero to its end where it is symmetric.
        symmetric: Whether tensors' grids are symmetric about zero.
        shared: Whether all rows of a weight have one scale.
        count: How many sets of channels there are.
        cuts: What Clips cut.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        weights: Sequence[Weight],
        steps: int,
        symmetric: bool,
        shared: bool,
        count: int,
        cuts: Sequence[Cut] = (),
    ) -> None:
        self.count = count
        self.parts: list[Tensors | Weights | Cuts] = []
        if some := [tensor for tensor in tensors if tensor.sets.size]:
            self.parts.append(Tensors(some, steps, symmetric))
        if others := [weight for weight in weights if weight.columns.size and weight.inputs.size]:
            self.parts.append(Weights(others, shared))
        if clipping := [cut for cut in cuts if cut.sets.size]:
            self.parts.append(Cuts(clipping))

    def at(self, logs: Array) -> tuple[float, Array]:
        """Return the noise at the logarithms of the sets' factors, and its slope."""
        factors = np.exp(logs)
        total, slope = 0.0, np.zeros(self.count)
        for part in self.parts:
            noise, own = part.at(factors)
            total, slope = total + noise, slope + own
        return total, slope

    def least(self, free: NDArray[np.bool_], lowest: Array, descent: Descent | None = None) -> tuple[Array, float]:
        """Return the logarithms of the factors for which noise is least, and by how many dB that lowers it.

        Args:
            free: Which sets may have a factor other than 1.
            lowest: The lowest logarithm of each set's factor, at most 0.
            descent: How they are looked for; None for the whole way.
        """
        cutting = any(isinstance(part, Cuts) for part in self.parts)
        way = descent or (STEEP if cutting else WHOLE)
        first, second = way.decays
        logs = np.zeros(self.count)
        mean, square = np.zeros(self.count), np.zeros(self.count)
        before, _ = self.at(logs)
        best, least = logs, before
        if not math.isfinite(before):
            return best, 0.0
        for turn in range(1, way.steps + 1):
            noise, slope = self.at(logs)
            if noise < least:
                best, least = logs, noise
            slope = np.where(free, slope, 0.0) / max(noise, TINY)
            mean = first * mean + (1 - first) * slope
            square = second * square + (1 - second) * np.square(slope)
            pace = way.rate * (1 - turn / (way.steps + 1)) / (1 - first**turn)
            moved = logs - pace * mean / (np.sqrt(square / (1 - second**turn)) + 1e-12)
            logs = np.where(free, np.clip(moved, np.maximum(lowest, -FURTHEST), FURTHEST), 0.0)
        return best, 10 * math.log10(before / least) if least > 0 else 0.0


def reaching(low: Array, high: Array) -> tuple[Array, Array]:
    """Return how far channels reach, those that reach hardly anywhere further than was seen of them."""
    own = np.maximum(low, high)
    wanted = np.maximum(own, LEAST_REACH * own.max(initial=0.0))
    more = np.divide(wanted, own, out=np.ones_like(own), where=own > 0)
    return low * more, high * more
