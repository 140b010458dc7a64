"""Observers count; they compute no range and no scale.

Everything that is counted can be merged: what two runs over parts of the data counted is what one run over all of it counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import DataError
from calibration.histogram import BULK, TAIL_SAMPLE, Histogram

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

# The answers of eight values that lie within a limit; and of how many they are looked at eight at a time.
INSIDE, WORTH_EIGHT = np.ones(8, dtype=bool), 1 << 15
# Sums of float32 values are kept as whole multiples of the smallest float32, 2^-149, so that their order does not matter.
UNIT = 149

# What each observer counts besides the lowest and the highest value.
OBSERVERS: dict[str, frozenset[str]] = {
    "minmax": frozenset(),
    "moving-average": frozenset({"samples"}),
    "mean-minmax": frozenset({"samples"}),
    "percentile": frozenset({"histogram"}),
    "mse": frozenset({"histogram"}),
    "entropy": frozenset({"histogram"}),
    "all": frozenset({"samples", "histogram"}),
}


# Where a relative entropy is lowest depends on slopes, which need more elements.
SLOPES, SLOPES_BULK = frozenset({"entropy", "all"}), 1 << 17


@dataclass(frozen=True)
class Counting:
    """What is counted of every tensor.

    Attributes:
        observer: A key of ``OBSERVERS``.
        channels: Whether the extremes of every channel (the second axis) are counted as well.
        momentum: How much of a moving average a new sample leaves as it was, in [0, 1).
        allow_non_finite: Whether values that are not finite are counted and left out rather than refused.
        samples: How many samples the whole calibration has; a histogram looks at fewer elements of each where there are many.
    """

    observer: str = "minmax"
    channels: bool = False
    momentum: float = 0.99
    allow_non_finite: bool = False
    samples: int = 1

    @property
    def parts(self) -> frozenset[str]:
        """What is counted besides the lowest and the highest value."""
        return OBSERVERS[self.observer] | (frozenset({"channels"}) if self.channels else frozenset())


@dataclass
class SampleRanges:
    """The ranges of single samples: their sum, and their exponential moving average.

    The moving average m ← μ·m + (1−μ)·x begins at the first sample. It is kept as what the samples add to an average that begins
    at zero, so that two parts of the data can be put together.

    Attributes:
        count: How many samples.
        low: The sum of their lowest values, in units of 2^-149.
        high: The sum of their highest values.
        first: The range of the first sample.
        average: What the samples add to the moving average of the lowest and highest values.
        momentum: μ.
    """

    count: int = 0
    low: int = 0
    high: int = 0
    first: tuple[float, float] = (0.0, 0.0)
    average: tuple[float, float] = (0.0, 0.0)
    momentum: float = 0.99

    def update(self, lowest: NDArray[np.floating], highest: NDArray[np.floating]) -> None:
        """Count the lowest and highest values of some samples, in order."""
        lows, highs = lowest.astype(np.float64).tolist(), highest.astype(np.float64).tolist()
        if not lows:
            return
        if self.count == 0:
            self.first = lows[0], highs[0]
        self.low += sum(int(math.ldexp(value, UNIT)) for value in lows)
        self.high += sum(int(math.ldexp(value, UNIT)) for value in highs)
        a, b = self.average
        for low, high in zip(lows, highs, strict=True):
            a = self.momentum * a + (1 - self.momentum) * low
            b = self.momentum * b + (1 - self.momentum) * high
        self.average = a, b
        self.count += len(lows)

    def merge(self, later: SampleRanges) -> None:
        """Count everything that a later part of the data counted."""
        if later.count == 0:
            return
        if self.count == 0:
            self.first = later.first
        kept = self.momentum**later.count
        self.average = (
            kept * self.average[0] + later.average[0],
            kept * self.average[1] + later.average[1],
        )
        self.low, self.high, self.count = self.low + later.low, self.high + later.high, self.count + later.count

    @property
    def mean(self) -> tuple[float, float]:
        """The average of the samples' lowest and of their highest values, each rounded once."""
        low, high = (total / self.count for total in (self.low, self.high))  # integers divide correctly rounded
        return math.ldexp(low, -UNIT), math.ldexp(high, -UNIT)

    @property
    def moving(self) -> tuple[float, float]:
        """The moving average of the samples' lowest and highest values."""
        kept = self.momentum**self.count
        return kept * self.first[0] + self.average[0], kept * self.first[1] + self.average[1]


@dataclass
class ChannelRanges:
    """The lowest and the highest value of every channel (the second axis) or column (the last one).

    Attributes:
        minimum: float32, one per channel.
        maximum: float32, one per channel.
    """

    minimum: NDArray[np.float32]
    maximum: NDArray[np.float32]

    def merge(self, other: ChannelRanges) -> None:
        """Count everything that ``other`` saw as well."""
        self.minimum = np.minimum(self.minimum, other.minimum)
        self.maximum = np.maximum(self.maximum, other.maximum)


@dataclass
class TensorStatistics:
    """What was seen of one tensor.

    Attributes:
        minimum: The lowest finite value so far; +inf before the first.
        maximum: The highest; −inf before the first.
        elements: How many finite values were seen.
        nan: How many values were no numbers.
        infinite: How many were infinite.
        samples: The ranges of single samples, where they are counted.
        histogram: The histogram, where it is counted.
        channels: The extremes of every channel, where they are counted.
        columns: The extremes of every column, where they are counted.
        by_column: Whether they are.
        derived: Whether this follows from what was seen of another tensor, of which only the extremes are known.
        floor: The lowest value that the tensor can have, where it is known: once it was seen, the minimum is not looked for.
        ceiling: The highest value that it can have, where that is known, and that none of its values is NaN as things are.
    """

    minimum: float = math.inf
    maximum: float = -math.inf
    elements: int = 0
    nan: int = 0
    infinite: int = 0
    samples: SampleRanges | None = None
    histogram: Histogram | None = None
    channels: ChannelRanges | None = None
    columns: ChannelRanges | None = None
    by_column: bool = False
    derived: bool = False
    floor: float | None = field(default=None, compare=False)
    ceiling: float | None = field(default=None, compare=False)

    @classmethod
    def for_counting(cls, counting: Counting, by_column: bool = False) -> TensorStatistics:
        """Return empty statistics that will count what is asked for."""
        parts = counting.parts
        return cls(
            by_column=by_column,
            samples=SampleRanges(momentum=counting.momentum) if "samples" in parts else None,
            histogram=Histogram() if "histogram" in parts else None,
        )

    def prepare(self, values: NDArray[np.floating], rows: int, counting: Counting) -> None:
        """Fix what the first batch fixes, without counting it.

        Args:
            values: The batch.
            rows: How many samples it has.
            counting: What will be counted.
        """
        self.prepare_from(values.size, rows, counting, [glance(values)])

    def prepare_from(self, size: int, rows: int, counting: Counting, glances: Sequence[NDArray[np.float32]]) -> None:
        """Fix what the first batches fix.

        Args:
            size: How many elements the first batch has.
            rows: How many samples it has.
            counting: What will be counted.
            glances: Glances at each of the first batches.
        """
        if self.histogram is not None:
            elements = size * counting.samples // max(rows, 1)
            self.histogram.prepare(size, glances, elements, SLOPES_BULK if counting.observer in SLOPES else BULK)
            if self.floor is not None:  # no extreme is to be found there, once it was seen
                self.histogram.tails = (-math.inf, self.histogram.tails[1])

    def update(self, values: NDArray[np.floating], first: int, rows: int, counting: Counting) -> None:
        """Count one batch.

        Args:
            values: The tensor, of any shape; an empty one changes nothing.
            first: The number of the batch's first sample in the whole calibration.
            rows: How many samples the batch has.
            counting: What is counted.

        Raises:
            DataError: If a value is not finite and that is not allowed; nothing is counted then.
        """
        if values.size == 0:
            return
        if self.sealed and not counting.channels:
            self.elements += values.size
            if self.histogram is not None:
                self.histogram.update(as_float32(values).reshape(-1), self.start(values, first, rows), [])
            return
        if self.plain and not counting.channels:  # what costs least is called most
            highest = float(np.maximum.reduce(values, axis=None))  # carries a NaN through, as the minimum does
            lowest = self.minimum if self.settled else float(np.minimum.reduce(values, axis=None))
            if math.isfinite(lowest) and math.isfinite(highest):
                self.count_extremes(lowest, highest, values.size)
                return
        whole = rows > 0 and values.size % rows == 0
        tails: list[NDArray[np.float32]] = []
        by_sample: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None
        if self.samples is not None:
            shaped = values.reshape((rows, -1) if whole else (1, -1))
            by_sample = shaped.min(axis=1), shaped.max(axis=1)
            lowest, highest = float(by_sample[0].min()), float(by_sample[1].max())
        if self.histogram is not None:
            values = as_float32(values)
            lowest, highest, tails = self.extremes_and_tails(values.reshape(-1), self.histogram.tails)
        elif by_sample is None:
            highest = float(values.max())  # carries a NaN through, as min does
            lowest = self.minimum if self.settled else float(values.min())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            self.update_finite(values, first, rows, counting)
            return
        self.count_extremes(lowest, highest, values.size)
        if self.samples is not None and by_sample is not None:
            self.samples.update(*by_sample)
        if self.histogram is not None:
            self.histogram.update(values.reshape(-1), self.start(values, first, rows), tails)
        self.count_parts(values, values, counting)

    @property
    def plain(self) -> bool:
        """Whether nothing but extremes is counted."""
        return self.histogram is None and self.samples is None and not self.by_column

    @property
    def settled(self) -> bool:
        """Whether the minimum cannot become lower, since it is the lowest value that the tensor can have."""
        return self.floor is not None and self.minimum == self.floor

    @property
    def sealed(self) -> bool:
        """Whether nothing of a batch is of interest any more but what a histogram looks at.

        No extreme can change, no value can lie beyond the histogram's tails, and nothing else is counted.
        """
        if self.ceiling is None or self.maximum != self.ceiling or not self.settled:
            return False
        alone = self.samples is None and not self.by_column
        return alone and (self.histogram is None or self.histogram.tails[1] >= self.maximum)

    def start(self, values: NDArray[Any], first: int, rows: int) -> int:
        """Return the first element of a batch whose number in the whole calibration is a multiple of the histogram's stride."""
        passed = first * (values.size // rows) if rows > 0 and values.size % rows == 0 else 0
        return -passed % self.histogram.stride if self.histogram is not None else 0

    def extremes_and_tails(
        self, values: NDArray[np.float32], bounds: tuple[float, float]
    ) -> tuple[float, float, list[NDArray[np.float32]]]:
        """Return the lowest and the highest of some values, and those that lie beyond two bounds.

        Most values are read once: what lies within the bounds is no extreme, once something was seen that lies beyond them.
        """
        highest, tails = beyond(values, bounds[1], self.maximum)
        if self.settled or math.isnan(highest):
            return self.minimum, highest, tails
        lowest, others = beyond(values, bounds[0], self.minimum, above=False)
        return lowest, highest, tails + others

    def count_extremes(self, lowest: float, highest: float, elements: int) -> None:
        """Count values of which only the extremes are known."""
        self.minimum, self.maximum = min(self.minimum, lowest), max(self.maximum, highest)
        self.elements += elements

    def count_parts(self, lows: NDArray[np.floating], highs: NDArray[np.floating], counting: Counting) -> None:
        """Count the extremes of every channel and column, where that is asked for."""
        if lows.ndim < 2:
            return
        if counting.channels:
            self.channels = grown(self.channels, lows, highs, 1)
        if self.by_column:
            self.columns = grown(self.columns, lows, highs, lows.ndim - 1)

    def update_finite(self, values: NDArray[np.floating], first: int, rows: int, counting: Counting) -> None:
        """Count a batch without its values that are not finite.

        Raises:
            DataError: If they are not allowed.
        """
        bad = self.non_finite(values, counting)
        if bad.all():
            return
        finite = values[~bad]
        self.count_extremes(float(finite.min()), float(finite.max()), finite.size)
        lows, highs = np.where(bad, np.float32(np.inf), values), np.where(bad, np.float32(-np.inf), values)
        if self.samples is not None:
            shape = (rows, -1) if rows > 0 and values.size % rows == 0 else (1, -1)
            lowest, highest = lows.reshape(shape).min(axis=1), highs.reshape(shape).max(axis=1)
            seen = lowest <= highest
            self.samples.update(lowest[seen], highest[seen])
        if self.histogram is not None:
            numbers, some = as_float32(values).reshape(-1), as_float32(finite)
            below, above = (np.float32(bound) for bound in self.histogram.tails)
            tails = [some[some > above], some[some < below]]
            self.histogram.update(numbers, self.start(values, first, rows), tails, ~bad.reshape(-1))
        self.count_parts(lows, highs, counting)

    def non_finite(self, values: NDArray[np.floating], counting: Counting) -> NDArray[np.bool_]:
        """Count what is not finite and return where it is.

        Raises:
            DataError: If it is not allowed.
        """
        nan, infinite = np.isnan(values), np.isinf(values)
        counts = int(nan.sum()), int(infinite.sum())
        if not counting.allow_non_finite:
            raise DataError(
                f"{sum(counts)} of {values.size} values are not finite ({counts[0]} NaN, {counts[1]} infinite)"
            )
        self.nan, self.infinite = self.nan + counts[0], self.infinite + counts[1]
        both: NDArray[np.bool_] = nan | infinite
        return both

    def merge(self, later: TensorStatistics) -> None:
        """Count everything that a later part of the data counted."""
        self.minimum, self.maximum = min(self.minimum, later.minimum), max(self.maximum, later.maximum)
        self.elements += later.elements
        self.nan, self.infinite = self.nan + later.nan, self.infinite + later.infinite
        for mine, theirs in self.pairs(later):
            mine.merge(theirs)
        self.channels = self.channels or later.channels
        self.columns = self.columns or later.columns

    def pairs(self, other: TensorStatistics) -> Iterator[tuple[Any, Any]]:
        """Yield the parts that both have counted."""
        for part in ("samples", "histogram", "channels", "columns"):
            mine, theirs = getattr(self, part), getattr(other, part)
            if mine is not None and theirs is not None:
                yield mine, theirs


def glance(values: NDArray[np.floating], batches: int = 1) -> NDArray[np.float32]:
    """Return some finite elements of one of the batches that tell where a tensor's tails begin."""
    looked = as_float32(values).reshape(-1)[:: max(1, values.size * batches // TAIL_SAMPLE) | 1]
    return looked[np.isfinite(looked)]


def grown(
    seen: ChannelRanges | None, lows: NDArray[np.floating], highs: NDArray[np.floating], axis: int
) -> ChannelRanges:
    """Return the extremes along an axis with those of a batch counted; one whose number of channels differs is not."""
    axes = tuple(other for other in range(lows.ndim) if other != axis)
    found = ChannelRanges(as_float32(lows.min(axis=axes)), as_float32(highs.max(axis=axes)))
    if seen is None:
        return found
    if len(seen.minimum) == len(found.minimum):
        seen.merge(found)
    return seen


def as_float32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return values as contiguous float32."""
    if values.dtype == np.float32 and values.flags.c_contiguous:
        return values
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)


def beyond(
    values: NDArray[np.float32], bound: float, known: float, above: bool = True
) -> tuple[float, list[NDArray[np.float32]]]:
    """Return the highest (or lowest) of some values, a NaN if there is one, and those above (or below) a bound.

    Args:
        values: The values, one after the other.
        bound: The bound.
        known: The highest (or lowest) so far, which is returned where none of the values changes it and that is plain to see.
        above: Which.
    """
    extreme, reaches = (np.maximum, np.greater_equal) if above else (np.minimum, np.less_equal)
    limit = np.float32(bound)
    if math.isinf(bound):
        return float(extreme.reduce(values)), []
    tail = values_outside(values, limit, above)
    if tail.size:
        return float(extreme.reduce(tail)), [tail]
    # None lies beyond the bound: what was seen there, or beyond it, is not surpassed.
    return (known if reaches(known, bound) else float(extreme.reduce(values))), []


def values_outside(values: NDArray[np.float32], limit: np.float32, above: bool) -> NDArray[np.float32]:
    """Return those of some values that are above (or below) a limit, and what is no number.

    Few are expected: of many values, the answers are looked at eight at a time.
    """
    inside = np.less_equal if above else np.greater_equal
    cut = values.size - values.size % INSIDE.size if values.size >= WORTH_EIGHT else 0
    some = values[cut:]
    if cut:
        within = inside(values[:cut], limit).view(np.uint64)
        rows = (within != INSIDE.view(np.uint64)[0]).nonzero()[0]
        mixed = values[:cut].reshape(-1, INSIDE.size).take(rows, axis=0).reshape(-1)
        some = np.concatenate([mixed, some]) if some.size else mixed
    within = inside(some, limit)
    return some[np.logical_not(within, out=within).nonzero()[0]]
