"""Histograms that grow: bins of a power of two around zero, the same whatever the order in which values are counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Bins of a histogram on either side of zero.
BINS = 2048
# The narrowest bin, 2^-126: its inverse is a float32.
SMALLEST_EXPONENT = -126
# The widest: so many of them hold the largest float32.
LARGEST_EXPONENT = 128 - (BINS.bit_length() - 1)
# About how many elements of a tensor's bulk a histogram looks at over a whole calibration.
BULK = 1 << 15
# About which share of a tensor, at either end, is counted to the last element.
TAIL = 1 / 512
# How many elements of the first batches tell where that share begins.
TAIL_SAMPLE = 8192
# How many looked-at elements wait before they are put into bins together.
PENDING = 8192


@dataclass
class Histogram:
    """A histogram over bins of width 2^k around zero; where a value lies outside, k grows by one and bins go together in pairs.

    The final k follows from the extremes alone, and floor(floor(x / 2^k) / 2) = floor(x / 2^(k+1)): whatever the order of the
    values and the parts that they were counted in, the bins and their counts are the same.

    Of a large tensor's bulk only every ``stride``-th element is looked at, and counts ``stride`` times; what lies beyond ``tails``
    is counted to the last element. Both are fixed by the first batches of a calibration.

    Attributes:
        exponent: k.
        counts: int64, 2·BINS; bin i holds [(i − BINS)·2^k, (i − BINS + 1)·2^k).
        zeros: How many of the counted values are exactly zero.
        stride: Of how many elements of the bulk one is looked at; prime to the size of a batch, so that it meets all channels and
            places alike.
        tails: Below and above which every element is counted.
        pending: Room for looked-at elements that wait for their bins.
        waiting: How many wait there.
        beyond: Elements beyond the tails that wait.
        outside: How many.
    """

    exponent: int = SMALLEST_EXPONENT
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * BINS, dtype=np.int64))
    zeros: int = 0
    stride: int = 1
    tails: tuple[float, float] = (-math.inf, math.inf)
    pending: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    waiting: int = field(default=0, compare=False, repr=False)
    beyond: list[NDArray[np.float32]] = field(default_factory=list, compare=False, repr=False)
    outside: int = field(default=0, compare=False, repr=False)

    def prepare(self, size: int, glances: Sequence[NDArray[np.float32]], elements: int, bulk: int = BULK) -> None:
        """Fix stride and tails.

        Args:
            size: How many elements the first batch has.
            glances: Some elements of each of the first batches, finite.
            elements: About how many elements the whole calibration will have.
            bulk: About how many of them are to be looked at.
        """
        self.stride = max(1, elements // bulk) | 1
        while math.gcd(self.stride, size) > 1:
            self.stride += 2
        ends = [ends_of(looked) for looked in glances if looked.size]
        if ends and self.stride > 1:
            lows, highs = zip(*ends, strict=True)
            self.tails = median(lows), median(highs)  # whatever a single batch is like

    def grow(self, lowest: float, highest: float) -> None:
        """Widen the bins until both values lie inside."""
        needed = self.exponent
        largest = max(-lowest, highest)
        if largest > 0:
            # 2^e > largest ≥ 2^(e−1); BINS bins of 2^(e − log2 BINS) reach 2^e. A lowest value of −2^e' just fits.
            needed = max(needed, math.frexp(largest)[1] - (BINS.bit_length() - 1))
        self.widen(needed)

    def widen(self, exponent: int) -> None:
        """Put bins together until they are 2^exponent wide."""
        if exponent <= self.exponent:
            return
        turns = min(exponent - self.exponent, BINS.bit_length()) if self.counts.any() else 0
        for _ in range(turns):
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.zeros(2 * BINS, dtype=np.int64)
            self.counts[BINS // 2 : BINS // 2 + BINS] = pairs
        self.exponent = exponent

    def update(
        self,
        values: NDArray[np.float32],
        start: int,
        tails: list[NDArray[np.float32]],
        finite: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count one batch.

        Args:
            values: The values, one after the other.
            start: The first of them that belongs to the looked-at ones.
            tails: Those that lie beyond the tails, all finite.
            finite: Which values are finite, so that the others are left out; None where all are.
        """
        bulk = values[start :: self.stride]
        if finite is not None:
            bulk = bulk[finite[start :: self.stride]]
        if bulk.size > PENDING // 2:
            self.add_bulk(bulk)
        else:
            if self.pending is None:
                self.pending = np.empty(PENDING, dtype=np.float32)
            elif self.waiting + bulk.size > PENDING:
                self.flush_bulk()
            self.pending[self.waiting : self.waiting + bulk.size] = bulk
            self.waiting += bulk.size
        for beyond in tails:
            if beyond.size:
                self.beyond.append(beyond)
                self.outside += beyond.size
        if self.outside > PENDING:
            self.flush_tails()

    def flush(self) -> None:
        """Put into bins what waits for it."""
        self.flush_bulk()
        self.flush_tails()

    def flush_bulk(self) -> None:
        """Put into bins what waits of the looked-at elements."""
        if self.pending is not None and self.waiting:
            self.add_bulk(self.pending[: self.waiting])
            self.waiting = 0

    def flush_tails(self) -> None:
        """Put into bins what waits of the elements beyond the tails."""
        if self.beyond:
            self.add(np.concatenate(self.beyond), 1)
            self.beyond, self.outside = [], 0

    def add_bulk(self, values: NDArray[np.float32]) -> None:
        """Put looked-at elements into bins, but for those beyond the tails."""
        if self.stride > 1:
            below, above = np.float32(self.tails[0]), np.float32(self.tails[1])
            if values.size and np.maximum.reduce(values) > above:
                values = values[values <= above]
            if values.size and np.minimum.reduce(values) < below:
                values = values[values >= below]
        self.add(values, self.stride)

    def add(self, values: NDArray[np.float32], weight: int) -> None:
        """Put values into bins, each so many times."""
        if not values.size:
            return
        lowest = float(np.minimum.reduce(values))
        self.grow(lowest, float(np.maximum.reduce(values)))
        inverse = np.float32(math.ldexp(1.0, -self.exponent))
        first = math.floor(lowest * float(inverse))
        scaled = values * inverse
        if lowest < 0:
            places = np.floor(scaled).astype(np.int32)
            places -= (scaled == 0) & (values < 0)  # what is so small that its product vanishes lies below zero still
        else:
            places = scaled.astype(np.int32)  # towards zero
        places -= np.int32(first)
        found = np.bincount(places)
        self.counts[BINS + first : BINS + first + len(found)] += weight * found
        self.zeros += weight * int(np.count_nonzero(values == 0))

    def merge(self, other: Histogram) -> None:
        """Count everything that ``other`` counted as well."""
        self.flush()
        other.flush()
        self.widen(other.exponent)
        same = Histogram(other.exponent, other.counts)
        same.widen(self.exponent)
        self.counts = self.counts + same.counts
        self.zeros += other.zeros

    def edges(self) -> NDArray[np.float64]:
        """Return the bins' edges, 2·BINS + 1 values."""
        return np.ldexp(np.arange(-BINS, BINS + 1, dtype=np.float64), self.exponent)


def ends_of(values: NDArray[np.float32]) -> tuple[float, float]:
    """Return between which values the bulk of some others lies."""
    place = min(max(1, int(TAIL * values.size)), values.size - 1)
    ordered = np.partition(values, (place, values.size - 1 - place))
    return float(ordered[place]), float(ordered[values.size - 1 - place])
