"""Ranges: from the statistics of a tensor to the real range (lo, hi) that quantization is to cover.

A range is written NAME or NAME:ARGUMENT. All of them are computed from stored statistics, so that one calibration serves many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.errors import StatisticsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from calibration.histogram import Histogram
    from calibration.observers import TensorStatistics

    # Lows (a column), highs (a row) and the steps between them; of a symmetric grid the highs alone count.
    Cost = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]

DEFAULT_PERCENTILE = 99.99
# How many clips are tried between the whole range and an eightieth of it.
CANDIDATES = 80
# A distribution's slopes are taken between so many cells, which leave this share out at either end.
CELLS, TAIL = 12, 1 / 1024
# So many clips at equal ratios are looked at where several are nearly as good; the temperature of their softmin, as a part of the
# least cost.
RATIOS, TEMPERATURE = 160, 1 / 12
# A relative entropy, in nats, that is nothing.
NOTHING = 1e-12
# No relative entropy tells how far values are moved: ranges that leave out a larger share are not looked at.
LARGEST_CUT = 1 / 4


@dataclass(frozen=True)
class Grid:
    """The integers that a range is to be spread over.

    Attributes:
        steps: How many steps lie between the lowest and the highest integer (255 for 8 bits).
        symmetric: Whether zero lies in their middle.
    """

    steps: int = 255
    symmetric: bool = False


@dataclass(frozen=True)
class RangeSpec:
    """How ranges are computed.

    Attributes:
        name: A key of ``RANGES``.
        argument: The percentile, in percent; None where there is none.
    """

    name: str
    argument: float | None = None


def parse_range(text: str) -> RangeSpec:
    """Return what a text like ``percentile:99.99`` asks for.

    Raises:
        ValueError: If there is no such range, or its argument is out of place.
    """
    name, colon, rest = text.partition(":")
    if name not in RANGES:
        raise ValueError(f"there is no range '{name}'; known: {', '.join(RANGES)}")
    if not colon:
        return RangeSpec(name, DEFAULT_PERCENTILE if name == "percentile" else None)
    if name != "percentile":
        raise ValueError(f"the range {name} takes no argument")
    try:
        percent = float(rest)
    except ValueError:
        percent = math.nan
    if not 50 < percent <= 100:
        raise ValueError(f"'{rest}' is no percentile above 50 and up to 100; write percentile:99.99")
    return RangeSpec(name, percent)


def observer_for(spec: RangeSpec) -> str:
    """Return the observer that counts what a range needs."""
    return spec.name


def range_of(spec: RangeSpec, name: str, seen: TensorStatistics, grid: Grid) -> tuple[float, float]:
    """Return the real range of a tensor.

    Args:
        spec: How.
        name: The tensor's name, for errors.
        seen: What was seen of it.
        grid: The integers that the range is for.

    Raises:
        StatisticsError: If the statistics do not hold what the range needs.
    """
    lo, hi = (minmax if seen.derived else RANGES[spec.name])(spec, name, seen, grid)
    # A percentile is linear within a bin, of which the values may fill a part, or one place.
    return min(max(lo, seen.minimum), seen.maximum), max(min(hi, seen.maximum), seen.minimum)


def minmax(spec: RangeSpec, name: str, seen: TensorStatistics, grid: Grid) -> tuple[float, float]:
    """Return the lowest and the highest value seen."""
    del spec, name, grid
    return seen.minimum, seen.maximum


def mean_minmax(spec: RangeSpec, name: str, seen: TensorStatistics, grid: Grid) -> tuple[float, float]:
    """Return the average of the samples' ranges."""
    del grid
    if seen.samples is None or not seen.samples.count:
        raise missing(spec, name)
    return as_float32(seen.samples.mean)


def moving_average(spec: RangeSpec, name: str, seen: TensorStatistics, grid: Grid) -> tuple[float, float]:
    """Return the exponential moving average of the samples' ranges."""
    del grid
    if seen.samples is None or not seen.samples.count:
        raise missing(spec, name)
    return as_float32(seen.samples.moving)


def percentile(spec: RangeSpec, name: str, seen: TensorStatistics, grid: Grid) -> tuple[float, float]:
    """Return the range that holds so many percent of the values, with equal shares cut from both ends.

    A symmetric grid cuts by magnitude instead.
    """
    histogram = histogram_of(spec, name, seen)
    left_out = 1 - (DEFAULT_PERCENTILE if spec.argument is None else spec.argument) / 100
    if grid.symmetric:
        bound = highest_but(magnitudes(histogram), histogram.exponent, left_out * seen.elements)
        return -bound, bound
    half, cut = len(histogram.counts) // 2, left_out / 2 * seen.elements
    below, above = (
        highest_but(counts, histogram.exponent, cut) for counts in (histogram.counts[::-1], histogram.counts)
    )
    offset = math.ldexp(half, histogram.exponent)
    return offset - below, above - offset


def highest_but(counts: NDArray[np.int64], exponent: int, cut: float) -> float:
    """Return the value above which so many of the counted values lie, linear within a bin; bins begin at zero.

    They are counted from above, where every element was, however few of the bulk below were looked at.
    """
    above = np.cumsum(counts[::-1])
    place = min(int(np.searchsorted(above, cut)), len(counts) - 1)
    count = counts[len(counts) - 1 - place]
    inside = (cut - (above[place] - count)) / count if count else 0.0
    return math.ldexp(len(counts) - place - min(max(float(inside), 0.0), 1.0), exponent)


def mse(spec: RangeSpec, name: str, seen: TensorStatistics, grid: Grid) -> tuple[float, float]:
    """Return the range whose quantization changes the values least, by the mean of the squared differences.

    A value inside is rounded, at a cost of s²/12 (uniform within a step s; zeros cost nothing, they have an integer of their own);
    one outside is clipped, at the square of its distance to the range. After Banner et al., "Post training 4-bit quantization of
    convolutional networks for rapid-deployment" (2019), with the histogram in place of a fitted distribution.
    """
    histogram = histogram_of(spec, name, seen)

    def cost(lows: NDArray[np.float64], highs: NDArray[np.float64], steps: NDArray[np.float64]) -> NDArray[np.float64]:
        if grid.symmetric:
            return clipping(histogram, highs, "both") + rounding(histogram, steps)
        return clipping(histogram, -lows, "below") + clipping(histogram, highs, "above") + rounding(histogram, steps)

    return cheapest(seen, grid, cost)


def cheapest(seen: TensorStatistics, grid: Grid, cost: Cost) -> tuple[float, float]:
    """Return the range of least cost, among parts of what was seen.

    Args:
        seen: What was seen.
        grid: The integers that the range is for; a symmetric one has symmetric ranges.
        cost: What ranges cost.
    """
    low_shares = high_shares = np.linspace(1 / CANDIDATES, 1.0, CANDIDATES)
    for _ in range(3):  # each time around the best so far, ten times as fine
        lows, highs, steps = candidates(seen, grid, low_shares, high_shares)
        found = cost(lows, highs, steps)
        low, high = np.unravel_index(lowest_cost(found.reshape(-1)), found.shape)
        low_shares, high_shares = around(low_shares, int(low)), around(high_shares, int(high))
    best = float(lows[low, 0]), float(highs[0, high])
    return (-best[1], best[1]) if grid.symmetric else best


def softmin(seen: TensorStatistics, grid: Grid, cost: Cost) -> tuple[float, float]:
    """Return the mean of all ranges, weighed by the softmin of their costs: exp(−(cost / least cost − 1) / TEMPERATURE).

    Where ranges far apart cost nearly the same, which of them costs least is chance; their mean hardly moves with it.

    Args:
        seen: What was seen.
        grid: The integers that the range is for; a symmetric one has symmetric ranges.
        cost: What ranges cost; infinite where they are out of the question.
    """
    lows, highs, steps = candidates(seen, grid, float(CANDIDATES) ** (-np.arange(RATIOS) / (RATIOS - 1)))
    found = np.broadcast_to(cost(lows, highs, steps), np.broadcast_shapes(lows.shape, highs.shape))
    least = float(found.min())
    if not math.isfinite(least):
        return seen.minimum, seen.maximum
    weights = np.exp((least - found) / (TEMPERATURE * max(least, NOTHING)))
    low, high = (float((weights * bounds).sum() / weights.sum()) for bounds in (lows, highs))
    return (-high, high) if grid.symmetric else (low, high)


def candidates(
    seen: TensorStatistics, grid: Grid, low_shares: NDArray[np.float64], high_shares: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return some parts of what was seen: lows (a column), highs (a row), and the steps between them.

    Args:
        seen: What was seen.
        grid: The integers that the ranges are for; of a symmetric one the highs alone count.
        low_shares: Which parts of what was seen below zero.
        high_shares: Which of what was seen above; the same where none are given.
    """
    lowest, highest = min(seen.minimum, 0.0), max(seen.maximum, 0.0)
    if grid.symmetric:
        lowest, highest = 0.0, max(-lowest, highest)
    lows = (lowest * low_shares if lowest < 0 else np.zeros(1))[:, None]
    highs = (highest * (low_shares if high_shares is None else high_shares) if highest > 0 else np.zeros(1))[None, :]
    return lows, highs, (highs * (2 if grid.symmetric else 1) - lows) / grid.steps


def around(shares: NDArray[np.float64], place: int) -> NDArray[np.float64]:
    """Return shares about one of them, as far as its neighbours, ten times as dense."""
    first, last = shares[max(place - 1, 0)], shares[min(place + 1, len(shares) - 1)]
    return np.linspace(first, last, 21)


def lowest_cost(cost: NDArray[np.float64]) -> int:
    """Return where a cost is lowest; the widest of equals."""
    return int(len(cost) - 1 - np.argmin(cost[::-1]))


def rounding(histogram: Histogram, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what rounding costs at each step."""
    inside = float(histogram.counts.sum() - histogram.zeros)
    cost: NDArray[np.float64] = inside * steps**2 / 12
    return cost


def clipping(histogram: Histogram, bounds: NDArray[np.float64], side: str) -> NDArray[np.float64]:
    """Return what clipping costs at each bound (a distance from zero), above, below, or on both sides.

    Args:
        histogram: The values.
        bounds: Where they are clipped, at least 0.
        side: ``above``, ``below`` or ``both``.
    """
    half = len(histogram.counts) // 2
    sides = {"above": histogram.counts[half:], "below": histogram.counts[:half][::-1], "both": magnitudes(histogram)}
    counts = sides[side]
    filled = np.flatnonzero(counts)
    centres = np.ldexp(filled + 0.5, histogram.exponent)
    weights = counts[filled].astype(np.float64)
    # Σ w (c − b)² over c > b, from the sums of w, w·c and w·c² beyond b.
    sums = [np.append(np.cumsum((weights * centres**power)[::-1])[::-1], 0.0) for power in (0, 1, 2)]
    place = np.searchsorted(centres, bounds)
    cost: NDArray[np.float64] = sums[2][place] - 2 * bounds * sums[1][place] + bounds**2 * sums[0][place]
    return np.maximum(cost, 0.0)


def entropy(spec: RangeSpec, name: str, seen: TensorStatistics, grid: Grid) -> tuple[float, float]:
    """Return the range whose quantization keeps most of the distribution, by its relative entropy.

    Migacz, "8-bit inference with TensorRT" (2017): of the distribution P with what lies outside put to the ends, and Q, what lies
    inside, spread evenly over each level's step, the range with the lowest KL(P‖Q) is looked for. Rare values make it waver by some
    percent from range to range, so the mean of all ranges is taken, weighed by how near to the lowest each comes. Exact zeros are
    left out, since every grid holds them. The divergence is not summed over bins, where counting noise would outweigh it
    ((bins − levels) / (2 · values) on average, Miller 1955), but has two parts:

    - within a step s: p is nearly linear there, and ∫ p·ln(p/q) over all steps is s²·J/24 to second order, J = ∫ p'²/p. It is taken
      as ½·ln(1 + s²·J/12), the same for small steps, which for wide ones grows no faster than a step's own entropy;
    - between steps: an end that holds the share m and takes c from outside adds (m + c)·ln((m + c)/m), and all shares of Q are
      larger than those of P by 1/(1 − Σc), which adds ln(1 − Σc).
    """
    histogram = histogram_of(spec, name, seen)
    shares = Shares.of(histogram)
    if shares.running[-1] == 0:
        return seen.minimum, seen.maximum
    slopes = shares.slopes(histogram.stride)
    lowest, highest = min(seen.minimum, 0.0), max(seen.maximum, 0.0)

    def cost(lows: NDArray[np.float64], highs: NDArray[np.float64], steps: NDArray[np.float64]) -> NDArray[np.float64]:
        if grid.symmetric:
            lows = -highs
        above, over = moved(highs, steps, highest, shares.below)
        below, under = moved(-lows, steps, -lowest, shares.above)
        outside = above + below
        costs = np.log1p(steps**2 * slopes / 12) / 2 + over + under + np.log1p(-np.minimum(outside, LARGEST_CUT))
        return np.where(outside > LARGEST_CUT, np.inf, costs)

    return softmin(seen, grid, cost)


def moved(
    bounds: NDArray[np.float64],
    steps: NDArray[np.float64],
    end: float,
    inside: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the share beyond each bound, and what it costs to put it to the bound.

    The level there holds as much as lies within its step, and no less than a step would if what lies beyond were spread evenly up
    to the end: rare values leave gaps.

    Args:
        bounds: Distances from zero, at least 0.
        steps: The steps that go with them.
        end: The largest distance seen, at least 0.
        inside: Returns the share of the values that lie within a distance on this side, or on the other side of zero.
    """
    within = inside(bounds)
    beyond = np.maximum(1 - within, 0.0)
    held = np.maximum(within - inside(bounds - steps), beyond * steps / np.maximum(end - bounds + steps, steps))
    times = np.divide(beyond, held, out=np.zeros(held.shape), where=held > 0)
    return beyond, (held + beyond) * np.log1p(times)


@dataclass(frozen=True, eq=False)
class Shares:
    """How the values that are not zero are distributed.

    Attributes:
        edges: The bins' edges.
        running: How many values lie below each.
    """

    edges: NDArray[np.float64]
    running: NDArray[np.float64]

    @classmethod
    def of(cls, histogram: Histogram) -> Shares:
        """Return a histogram's."""
        counts = histogram.counts.astype(np.float64)
        zero = len(counts) // 2
        counts[zero] = max(counts[zero] - histogram.zeros, 0.0)
        return cls(histogram.edges(), np.concatenate([[0.0], np.cumsum(counts)]))

    def below(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share that lies below some values, linear within a bin."""
        share: NDArray[np.float64] = np.interp(values, self.edges, self.running) / self.running[-1]
        return share

    def above(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share that lies above the negatives of some values."""
        return 1 - self.below(-values)

    def slopes(self, weight: int) -> float:
        """Return ∫ p'²/p of the density p (Fisher's information about its place), from differences between cells.

        A cell of N counted values is off by √N or so, which adds to the square of a difference the sum of both; that is taken off.

        Args:
            weight: How many values each value that was looked at stands for.
        """
        total = self.running[-1]
        first, last = np.interp([TAIL * total, (1 - TAIL) * total], self.running, self.edges)
        if last <= first:
            return 0.0
        cells = np.diff(np.interp(np.linspace(first, last, CELLS + 1), self.edges, self.running))
        sums, differences = cells[1:] + cells[:-1], cells[1:] - cells[:-1]
        some = sums > 0
        squares = (differences[some] ** 2 - weight * sums[some]) / (sums[some] / 2)
        width = (float(last) - float(first)) / CELLS
        return max(float(squares.sum() / total), 0.0) / width**2


def magnitudes(histogram: Histogram) -> NDArray[np.int64]:
    """Return the counts by distance from zero."""
    half = len(histogram.counts) // 2
    return histogram.counts[half:] + histogram.counts[:half][::-1]


def histogram_of(spec: RangeSpec, name: str, seen: TensorStatistics) -> Histogram:
    """Return a tensor's histogram.

    Raises:
        StatisticsError: If there is none.
    """
    if seen.histogram is None or not seen.histogram.counts.any():
        raise missing(spec, name)
    return seen.histogram


def missing(spec: RangeSpec, name: str) -> StatisticsError:
    """Return the error that statistics do not hold what a range needs."""
    return StatisticsError(
        f"the statistics of tensor '{name}' do not hold what the range {spec.name} needs",
        f"calibrate with --observer {observer_for(spec)} (or all)",
    )


def as_float32(values: tuple[float, float]) -> tuple[float, float]:
    """Round both values to float32, far above what their computation errs by."""
    return float(np.float32(values[0])), float(np.float32(values[1]))


RANGES: dict[str, Callable[[RangeSpec, str, TensorStatistics, Grid], tuple[float, float]]] = {
    "minmax": minmax,
    "moving-average": moving_average,
    "mean-minmax": mean_minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
