"""Predicted noise: what rounding tensors and weights adds to the outputs of a model's layers, and the factors that make it least.

A channel may be divided by a factor f before it is rounded and multiplied by it behind (Nagel et al. 2019, arXiv 1906.04721,
section 4.1): the float model stays what it is, the quantized one does not. Every layer's noise is a part of its outputs' variance:

- a **tensor** has the step Δ that its furthest channel needs, max(y/f) − min(y/f) over the number of steps. A value that is not
  zero is rounded with an error of Δ²/12 in the mean of squares, but of no more than its own square: together u·p / (u + p), with
  u = f²·Δ²/12 and p the channel's power. Each reader multiplies that by the squares of its weights;
- a **weight** has the step of its largest element, by row or for all of them, once its columns are multiplied by their channels'
  factors and its rows divided by theirs. Its error is multiplied by the variance of what it meets, divided by f².

Nagel et al. (equation 11) make ranges of weights alike, and SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation 4) moves a
chosen part of the difficulty from tensors to weights. Here the sum of both noises is made least, by gradient descent on log f
(Adam, Kingma and Ba 2014, arXiv 1412.6980, algorithm 1); largest values are taken as norms of high order, which have slopes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Sets = NDArray[np.intp]

# What rounding by second moments leaves of the noise of rounding to nearest, about.
ROUNDED = 0.5
# A channel counts as one that reaches at least this part of its tensor's end: other samples may reach further than those seen.
LEAST_REACH = 0.3
# So many elements of a row may become its largest.
CONSIDERED = 64
STEPS, RATE, DECAYS = 150, 0.1, (0.9, 0.99)
# No factor is further from 1 than e^8.
FURTHEST = 8.0
TINY = 1e-30


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
        columns: The sets of the columns (inputs) of the elements of each row that may be its largest, (rows, elements).
        largest: The largest magnitude of each of those elements' taps, of the same shape.
        inputs: The sets of all columns, (groups, columns of a group); a group's rows stand together.
        power: The variance of what meets each column times the number of taps, as a part of the outputs' variance.
        limit: The largest integer.
    """

    rows: Sets
    columns: Sets
    largest: Array
    inputs: Sets
    power: Array
    limit: int

    @classmethod
    def of(cls, rows: Sets, inputs: Sets, largest: Array, power: Array, limit: int) -> Weight:
        """Return a weight of which only the largest elements of each row are kept: no other is likely to become the largest.

        Args:
            rows: The set of each row.
            inputs: The sets of the columns of each group.
            largest: The largest magnitude of each element's taps, (rows, columns of a group).
            power: As above.
            limit: As above.
        """
        columns = np.repeat(inputs, len(rows) // len(inputs), axis=0)
        if largest.shape[1] > CONSIDERED:
            places = np.sort(np.argpartition(-largest, CONSIDERED - 1, axis=1)[:, :CONSIDERED], axis=1)
            largest = np.take_along_axis(largest, places, axis=1)
            columns = np.take_along_axis(columns, places, axis=1)
        return cls(rows, columns, largest, inputs, power, limit)

    def by_group(self, values: Array) -> Array:
        """Return the sum of the rows' values in each group."""
        sums: Array = values.reshape(len(self.inputs), -1).sum(axis=1)
        return sums

    def by_row(self, values: Array) -> Array:
        """Return each group's value for each of its rows."""
        return np.repeat(values, len(self.rows) // len(self.inputs))


@dataclass(frozen=True, eq=False)
class Noise:
    """Everything that is rounded.

    Attributes:
        tensors: The tensors.
        weights: The weights.
        steps: How many steps a tensor's grid has: from end to end, or from zero to its end where it is symmetric.
        symmetric: Whether tensors' grids are symmetric about zero.
        shared: Whether all rows of a weight have one scale.
        count: How many sets of channels there are.
    """

    tensors: tuple[Tensor, ...]
    weights: tuple[Weight, ...]
    steps: int
    symmetric: bool
    shared: bool
    count: int

    def at(self, logs: Array) -> tuple[float, Array]:
        """Return the noise at the logarithms of the sets' factors, and its slope."""
        factors = np.exp(logs)
        total, slope = 0.0, np.zeros(self.count)
        for tensor in self.tensors:
            total += self.of_tensor(tensor, factors, slope)
        for weight in self.weights:
            total += self.of_weight(weight, factors, slope)
        return total, slope

    def of_tensor(self, tensor: Tensor, factors: Array, slope: Array) -> float:
        """Return a tensor's noise, and add its slope by the logarithm of each set's factor to the others'."""
        own = factors[tensor.sets]
        if self.symmetric:
            end, share = peak(np.maximum(tensor.low, tensor.high) / own, 0)
            span, change = float(end), -end * share
        else:
            (high, above), (low, below) = peak(tensor.high / own, 0), peak(tensor.low / own, 0)
            span, change = float(high + low), -high * above - low * below
        if span <= 0:
            return 0.0
        rounding = np.square(own * (span / self.steps)) / 12
        both = rounding + tensor.power + TINY
        noise = tensor.gain * rounding * tensor.power / both
        direct = 2 * noise * tensor.power / both
        slope += np.bincount(tensor.sets, direct + direct.sum() * change / span, self.count)
        return float(noise.sum())

    def of_weight(self, weight: Weight, factors: Array, slope: Array) -> float:
        """Return a weight's noise, and add its slope by the logarithm of each set's factor to the others'."""
        rows = factors[weight.rows] if self.shared else np.ones(len(weight.rows))
        scaled = weight.largest * factors[weight.columns] / rows[:, None]
        end, share = peak(scaled.reshape(-1), 0) if self.shared else peak(scaled, 1)
        step = ROUNDED / 12 * np.square(end.reshape(-1) / weight.limit) * np.square(rows)
        met = weight.power / np.square(factors[weight.inputs])
        noise = step * weight.by_row(met.sum(axis=1))
        # A larger element means a larger step: of its row, or of all rows.
        pulls = 2 * (noise.sum() * share.reshape(scaled.shape) if self.shared else noise[:, None] * share)
        slope += np.bincount(weight.columns.reshape(-1), pulls.reshape(-1), self.count)
        slope -= np.bincount(
            weight.inputs.reshape(-1), 2 * (weight.by_group(step)[:, None] * met).reshape(-1), self.count
        )
        if self.shared:
            slope += np.bincount(weight.rows, 2 * noise - pulls.sum(axis=1), self.count)
        return float(noise.sum())

    def least(self, free: NDArray[np.bool_], lowest: Array, steps: int = STEPS) -> tuple[Array, float]:
        """Return the logarithms of the factors for which noise is least, and by how many dB that lowers it.

        Args:
            free: Which sets may have a factor other than 1.
            lowest: The lowest logarithm of each set's factor, at most 0.
            steps: Of the descent.
        """
        logs = np.zeros(self.count)
        mean, square = np.zeros(self.count), np.zeros(self.count)
        before, _ = self.at(logs)
        best, least = logs, before
        if not math.isfinite(before):
            return best, 0.0
        for turn in range(1, steps + 1):
            noise, slope = self.at(logs)
            if noise < least:
                best, least = logs, noise
            slope = np.where(free, slope, 0.0) / max(noise, TINY)
            mean = DECAYS[0] * mean + (1 - DECAYS[0]) * slope
            square = DECAYS[1] * square + (1 - DECAYS[1]) * np.square(slope)
            pace = RATE * (1 - turn / (steps + 1)) / (1 - DECAYS[0] ** turn)
            moved = logs - pace * mean / (np.sqrt(square / (1 - DECAYS[1] ** turn)) + 1e-12)
            logs = np.where(free, np.clip(moved, np.maximum(lowest, -FURTHEST), FURTHEST), 0.0)
        return best, 10 * math.log10(before / least) if least > 0 else 0.0


def peak(values: Array, axis: int) -> tuple[Array, Array]:
    """Return about the largest of values above zero along an axis (their norm of order 16), and each one's share in its slope."""
    furthest = values.max(axis=axis, keepdims=True)
    largest = np.maximum(furthest, TINY)
    powers = np.square(np.square(np.square(np.square(values / largest))))
    total = np.maximum(powers.sum(axis=axis, keepdims=True), TINY)
    end: Array = np.where(furthest > 0, largest * total ** (1 / 16), 0.0)
    return end if values.ndim > 1 else end[0], powers / total


def reaching(low: Array, high: Array) -> tuple[Array, Array]:
    """Return how far channels reach, those that reach hardly anywhere further than was seen of them."""
    own = np.maximum(low, high)
    wanted = np.maximum(own, LEAST_REACH * own.max(initial=0.0))
    more = np.divide(wanted, own, out=np.ones_like(own), where=own > 0)
    return low * more, high * more
