"""Count the histograms of a batch's tensors together: what costs a call per tensor otherwise costs a call per batch."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import RunError
from calibration.histogram import PENDING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from calibration.layout import Frame, Layout
    from calibration.observers import TensorStatistics

    # How a side is compared, where it lies, its bound, and the room for the answers.
    Comparison = tuple[np.ufunc, slice, np.float32, NDArray[np.bool_]]

# Values are compared one by one, and the answers looked at eight at a time: eight of them that are all true.
EIGHT = 8
ALL = np.ones(EIGHT, dtype=bool).view(np.uint64)[0]
NOWHERE, NOTHING = np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.uint64)
# About how many elements beyond tails wait before they are put into bins.
WAITING = 1 << 17
# So many answers are looked at while they are in a core's own cache.
GROUP = 1 << 17
# Where a batch's tensors are larger on average, calls are few, and one tensor after the other leaves more in the caches.
SMALL = 1 << 14
# The places of sides are kept in 16 bits.
MOST_SIDES = 1 << 16


class Together:
    """Counts batches that lie in buffers of one layout, each tensor as `TensorStatistics.update` does with a histogram alone.

    Sides: the low and the high side of each tensor, as long as its extreme can still move. On a side with a bound (the
    histogram's tail) most values lie within it, and those beyond it are found together; on one without, the extreme is computed.

    Args:
        tensors: What was seen so far; every histogram is prepared.
        layout: Where the tensors lie.
        rows: How many samples a batch has.
    """

    def __init__(self, tensors: Mapping[str, TensorStatistics], layout: Layout, rows: int) -> None:
        self.seen = [tensors[name] for name in layout.shapes]
        self.histograms = [seen.histogram for seen in self.seen if seen.histogram is not None]
        self.starts = np.array(list(layout.starts.values()))
        self.sizes = np.array([math.prod(shape) for shape in layout.shapes.values()])
        self.batches = 0
        self.place_sides()
        self.place_bulk(rows)
        self.tails: list[tuple[NDArray[np.uint16], NDArray[np.float32]]] = []
        self.beyond = 0

    def place_sides(self) -> None:
        """List the sides; put those with a bound into groups that are compared one after the other."""
        bounds = [bound for histogram in self.histograms for bound in histogram.tails]
        sides = [side for side in range(2 * len(self.seen)) if side % 2 or not self.seen[side // 2].settled]
        self.bounded = np.array([side for side in sides if math.isfinite(bounds[side])], dtype=np.intp)
        self.free = [side for side in sides if not math.isfinite(bounds[side])]
        self.bounds = np.array(bounds, dtype=np.float32)
        self.extremes = np.array([value for seen in self.seen for value in (seen.minimum, seen.maximum)])
        rows = -(-self.sizes[self.bounded // 2] // EIGHT)
        self.first_rows = np.cumsum(rows) - rows
        self.shift = self.starts[self.bounded // 2] // EIGHT - self.first_rows
        cuts = np.unique((self.first_rows + rows) * EIGHT // GROUP, return_index=True)[1].tolist()
        self.groups = [self.group(first, end, rows) for first, end in itertools.pairwise([*cuts, len(rows)])]

    def group(self, first: int, end: int, rows: NDArray[np.intp]) -> tuple[int, list[Comparison], NDArray[np.bool_]]:
        """Return at which row some sides begin, how they are compared, and the room for the answers."""
        row, answers = int(self.first_rows[first]), np.ones(int(rows[first:end].sum()) * EIGHT, dtype=bool)
        comparisons: list[Comparison] = []
        for side, start in zip(
            self.bounded[first:end].tolist(), (self.first_rows[first:end] - row).tolist(), strict=True
        ):
            room = answers[start * EIGHT :][: int(self.sizes[side // 2])]
            within = np.less_equal if side % 2 else np.greater_equal
            comparisons.append((within, self.part(side), self.bounds[side], room))
        return row, comparisons, answers

    def place_bulk(self, rows: int) -> None:
        """List which elements of a batch are looked at, from the first of each tensor that is."""
        self.strides = np.array([histogram.stride for histogram in self.histograms])
        self.passed = np.where(self.sizes % rows, 0, self.sizes // rows)
        self.looked = -(-self.sizes // self.strides)
        self.owner = np.repeat(np.arange(len(self.seen)), self.looked)
        self.ends = np.cumsum(self.looked)
        within = np.arange(len(self.owner)) - (self.ends - self.looked)[self.owner]
        self.base = self.starts[self.owner] + within * self.strides[self.owner]
        room = max(1, PENDING // 2 * len(self.seen) // len(self.owner))
        self.bulk = np.empty((room, len(self.owner)), dtype=np.float32)
        self.whole = np.empty((room, len(self.seen)), dtype=bool)
        self.waiting = 0

    def part(self, side: int) -> slice:
        """Return where a side's tensor lies."""
        start = int(self.starts[side // 2])
        return slice(start, start + int(self.sizes[side // 2]))

    def count(self, buffer: NDArray[np.float32], first: int) -> bool:
        """Count a batch and return whether everything was finite. If not, nothing is counted.

        Args:
            buffer: The batch.
            first: The number of its first sample in the whole calibration.
        """
        places, values = self.outside(buffer)
        found = self.found(buffer, places, values)
        if found is None:
            return False
        self.extremes = found
        self.free = [side for side in self.free if side % 2 or found[side] != self.seen[side // 2].floor]
        if values.size:
            self.tails.append((places, values))
            self.beyond += values.size
        self.look(buffer, first)
        self.batches += 1
        if self.waiting == len(self.bulk):
            self.flush_bulk()
        if self.beyond > WAITING:
            self.flush_tails()
        return True

    def outside(self, buffer: NDArray[np.float32]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """Return the values beyond bounds, side after side, and by value the place of its side among the bounded ones."""
        found = []
        for first, comparisons, answers in self.groups:
            for within, part, bound, inside in comparisons:
                within(buffer[part], bound, inside)
            words = answers.view(np.uint64)
            mixed = (words != ALL).nonzero()[0]
            found.append((mixed + first, words.take(mixed)))
        rows, words = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else (NOWHERE, NOTHING)
        places = self.first_rows.searchsorted(rows, "right") - 1
        octets = buffer.reshape(-1, EIGHT).take(rows + self.shift[places], axis=0)
        inside = words.view(bool)
        hits = np.logical_not(inside, out=inside).nonzero()[0]
        return places.astype(np.uint16)[hits // EIGHT], octets.reshape(-1)[hits]

    def found(
        self, buffer: NDArray[np.float32], places: NDArray[np.uint16], values: NDArray[np.float32]
    ) -> NDArray[np.float64] | None:
        """Return the extremes with a batch's; None where a value is not finite.

        A side beyond whose bound nothing lies has no new extreme, once something was seen there.
        """
        found = self.extremes.copy()
        counts = np.bincount(places, minlength=len(self.bounded))
        hit = counts.nonzero()[0]
        if hit.size:
            firsts = (np.cumsum(counts) - counts)[hit]
            sides = self.bounded[hit]
            new = np.where(sides % 2, np.maximum.reduceat(values, firsts), np.minimum.reduceat(values, firsts))
            found[sides] = np.where(sides % 2, np.maximum(found[sides], new), np.minimum(found[sides], new))
        blank = self.bounded[counts == 0]
        known, bounds = self.extremes[blank], self.bounds[blank]
        short = blank[np.where(blank % 2, known < bounds, known > bounds)].tolist()
        for side in short + self.free:
            extreme = (np.maximum if side % 2 else np.minimum).reduce(buffer[self.part(side)])
            found[side] = (np.maximum if side % 2 else np.minimum)(found[side], extreme)  # a NaN stays one
        return found if np.isfinite(found).all() else None

    def look(self, buffer: NDArray[np.float32], first: int) -> None:
        """Keep the looked-at elements of a batch until there are enough of them."""
        offsets = -(first * self.passed) % self.strides
        places = self.base + offsets[self.owner]
        lasts = self.ends - 1
        whole = places[lasts] < self.starts + self.sizes
        places[lasts[~whole]] = 0  # a tensor has one less, where the first one stands further on
        buffer.take(places, out=self.bulk[self.waiting], mode="clip")
        self.whole[self.waiting] = whole
        self.waiting += 1

    def flush_bulk(self) -> None:
        """Put into bins what waits of the looked-at elements."""
        for index, histogram in enumerate(self.histograms):
            last = self.ends[index] - 1
            some = self.bulk[: self.waiting, last + 1 - self.looked[index] : last].reshape(-1)
            histogram.add_bulk(
                np.concatenate([some, self.bulk[: self.waiting, last][self.whole[: self.waiting, index]]])
            )
        self.waiting = 0

    def flush_tails(self) -> None:
        """Put into bins what waits of the elements beyond the tails."""
        if self.tails:
            places, values = (np.concatenate(parts) for parts in zip(*self.tails, strict=True))
            counts = np.bincount(places, minlength=len(self.bounded))
            sorted_values = values[places.argsort(kind="stable")]
            for side, part in zip(self.bounded.tolist(), np.split(sorted_values, np.cumsum(counts)[:-1]), strict=True):
                self.histograms[side // 2].add(part, 1)
        self.tails, self.beyond = [], 0

    def settle(self) -> None:
        """Put into the statistics everything that was counted."""
        self.flush_bulk()
        self.flush_tails()
        for index, seen in enumerate(self.seen):
            low, high = self.extremes[2 * index : 2 * index + 2].tolist()
            seen.count_extremes(low, high, self.batches * int(self.sizes[index]))
        self.batches = 0


class Frames:
    """Buffers for batches like one that was counted: they are run into them, and counted together.

    Args:
        layout: Where the tensors lie.
        feeds: The inputs of that batch.
        rows: How many samples it has.
        tensors: What was seen so far.
        make: Makes a buffer; None where there is no such thing.
    """

    def __init__(
        self,
        layout: Layout,
        feeds: Mapping[str, NDArray[Any]],
        rows: int,
        tensors: Mapping[str, TensorStatistics],
        make: Callable[[Layout], Frame | None],
    ) -> None:
        self.layout, self.make = layout, make
        self.shapes = shapes_of(feeds)
        self.together = Together(tensors, layout, rows)
        self.spare: list[Frame] = []
        self.serve = True

    @staticmethod
    def pay(layout: Layout, tensors: Mapping[str, TensorStatistics]) -> bool:
        """Tell whether tensors are small enough for frames to pay, and every extreme is known."""
        small = layout.size <= SMALL * len(layout.shapes) and 2 * len(layout.shapes) <= MOST_SIDES
        return small and all(seen.elements for seen in tensors.values())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> tuple[Frame, dict[str, NDArray[Any]]] | None:
        """Run a batch; return the frame that it is in, and its tensors; None where it has to be run elsewhere.

        So it is where shapes depend on values. Where the model itself fails, it fails there, too.
        """
        if not self.serve or shapes_of(feeds) != self.shapes:
            return None
        frame: Frame | None = None
        with contextlib.suppress(IndexError):
            frame = self.spare.pop()
        frame = frame or self.make(self.layout)
        if frame is not None:
            with contextlib.suppress(RunError):
                return frame, frame.run(dict(feeds))
        self.serve = False
        return None

    def count(self, frame: Frame, first: int) -> bool:
        """Count a batch whose first sample has this number; return whether everything was finite. If not, nothing is counted."""
        return self.together.count(frame.buffer, first)

    def free(self, frame: Frame) -> None:
        """Take a frame back for another batch."""
        self.spare.append(frame)

    def settle(self) -> None:
        """Put into the statistics everything that was counted."""
        self.together.settle()


def shapes_of(feeds: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a batch's inputs."""
    return {name: values.shape for name, values in feeds.items()}
