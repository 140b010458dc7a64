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

    from calibration.observers import Histogram, TensorStatistics

DEFAULT_PERCENTILE = 99.99
# How many clips are tried between the whole range and an eightieth of it.
CANDIDATES = 80
# How much of a relative entropy may come from having counted too few values.
COUNTING_NOISE = 1e-3
# The share that a relative entropy gives to what a range cannot show.
LEAST_SHARE = 1e-10


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
        raise ValueError(f"'{rest}' is no percentile; write percentile:99.99")
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
    return max(lo, seen.minimum), min(hi, seen.maximum)


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
    share = (DEFAULT_PERCENTILE if spec.argument is None else spec.argument) / 100
    if grid.symmetric:
        bound = quantile(magnitudes(histogram), histogram.exponent, share)
        return -bound, bound
    cut = (1 - share) / 2
    filled = histogram.counts
    offset = len(filled) // 2 * math.ldexp(1.0, histogram.exponent)
    return tuple(quantile(filled, histogram.exponent, point) - offset for point in (cut, 1 - cut))  # type: ignore[return-value]


def quantile(counts: NDArray[np.int64], exponent: int, share: float) -> float:
    """Return the value below which a share of the counted values lies, linear within a bin; bins begin at zero."""
    total = np.cumsum(counts)
    wanted = share * total[-1]
    place = min(int(np.searchsorted(total, wanted)), len(counts) - 1)
    before = total[place] - counts[place]
    inside = (wanted - before) / counts[place] if counts[place] else 0.0
    return math.ldexp(place + min(max(float(inside), 0.0), 1.0), exponent)


def mse(spec: RangeSpec, name: str, seen: TensorStatistics, grid: Grid) -> tuple[float, float]:
    """Return the range whose quantization changes the values least, by the mean of the squared differences.

    A value inside is rounded, at a cost of s²/12 (uniform within a step s; zeros cost nothing, they have an integer of their own);
    one outside is clipped, at the square of its distance to the range. After Banner et al., "Post training 4-bit quantization of
    convolutional networks for rapid-deployment" (2019), with the histogram in place of a fitted distribution.
    """
    histogram = histogram_of(spec, name, seen)
    lowest, highest = min(seen.minimum, 0.0), max(seen.maximum, 0.0)
    if grid.symmetric:
        lowest, highest = 0.0, max(-lowest, highest)
    shares = np.linspace(1 / CANDIDATES, 1.0, CANDIDATES)
    low_shares, high_shares = shares, shares
    for _ in range(3):  # each time around the best so far, ten times as fine
        lows = lowest * low_shares if lowest < 0 else np.zeros(1)
        highs = highest * high_shares if highest > 0 else np.zeros(1)
        low_cost = clipping(histogram, -lows, "below") if not grid.symmetric else np.zeros(1)
        high_cost = clipping(histogram, highs, "both" if grid.symmetric else "above")
        widths = highs[None, :] * (2 if grid.symmetric else 1) - lows[:, None]
        cost = low_cost[:, None] + high_cost[None, :] + rounding(histogram, widths / grid.steps)
        low, high = np.unravel_index(lowest_cost(cost.reshape(-1)), cost.shape)
        low_shares, high_shares = around(low_shares, int(low)), around(high_shares, int(high))
    best = float(lows[low]), float(highs[high])
    return (-best[1], best[1]) if grid.symmetric else best


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
    """Return the range whose quantization keeps most of the distribution of the magnitudes, by its relative entropy.

    Migacz, "8-bit inference with TensorRT" (2017): of a distribution P clipped at a bin, and Q, the same spread over the grid's
    levels, the clip with the lowest KL(P‖Q) is taken. Exact zeros are left out, since every grid holds them.

    Few values in many bins make a divergence of their own, (bins − levels) / (2 · values) on average: where that is more than
    0.001, bins go together, and where no more of them are left than there are levels, nothing is clipped.
    """
    histogram = histogram_of(spec, name, seen)
    two_sided = seen.minimum < 0 < seen.maximum
    levels = (grid.steps + 1) // 2 if grid.symmetric or two_sided else grid.steps + 1
    counts = magnitudes(histogram).astype(np.float64)
    counts[0] = max(counts[0] - histogram.zeros, 0.0)
    largest = max(-seen.minimum, seen.maximum)
    used = min(len(counts), math.floor(math.ldexp(largest, -histogram.exponent)) + 1) if largest > 0 else 0
    exponent = histogram.exponent
    while used > levels + 2 * COUNTING_NOISE * counts.sum() / histogram.stride:
        counts, used, exponent = counts.reshape(-1, 2).sum(axis=1), (used + 1) // 2, exponent + 1
    if used <= levels or not counts.any():
        return seen.minimum, seen.maximum
    ends = np.arange(levels, used + 1, max(1, (used - levels) // 128))
    costs = divergences(counts[:used], ends, levels)
    bound = math.ldexp(float(ends[lowest_cost(costs)]), exponent)
    return max(-bound, seen.minimum), min(bound, seen.maximum)


def divergences(counts: NDArray[np.float64], ends: NDArray[np.intp], levels: int) -> NDArray[np.float64]:
    """Return KL(P‖Q) for every bin that counts may be clipped at: of the clipped counts, and of the same spread over levels.

    What is clipped counts in the last bin of P. A level of Q spreads its sum evenly over its bins that hold anything: so Σ p·log q
    needs each level's sum alone, and Σ p·log p is a sum of counts·log(counts). Both are differences of running sums.

    Args:
        counts: One per bin, as float64.
        ends: How many bins are kept, in rising order.
        levels: Over how many levels they are spread; no more than bins.
    """
    total = counts.sum()
    held = (counts > 0).astype(np.float64)
    running, occupied, weighted = (running_sum(v) for v in (counts, held, x_log_x(counts)))
    edges = (np.arange(levels + 1) * ends[:, None]) // levels
    sums, numbers = np.diff(running[edges]), np.diff(occupied[edges])
    kept, last = running[ends], counts[ends - 1]
    clipped = total - kept
    level = np.divide(sums, numbers, out=np.zeros_like(sums), where=numbers > 0)
    q = np.log(np.maximum(level / np.maximum(kept, 1.0)[:, None], LEAST_SHARE))
    own = weighted[ends - 1] + x_log_x(last + clipped) - total * math.log(total)
    cross = (sums * q).sum(axis=1) + clipped * np.where(last > 0, q[:, -1], math.log(LEAST_SHARE))
    found: NDArray[np.float64] = (own - cross) / total
    return found


def running_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the sums of the first 0, 1, 2 … values."""
    return np.concatenate([[0.0], np.cumsum(values)])


def x_log_x(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return v·log(v), 0 for 0."""
    return values * np.log(np.where(values > 0, values, 1.0))


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
