"""Ranges by what they do: of some candidates, the range whose grid changes a tensor's readers least.

A candidate is what an observer would give (lowest and highest value, percentiles) or a part of it. Each is judged by the mean
squared difference to the float model's values after quantization, channels weighted by the squared weights that readers multiply
them with: for errors that do not depend on each other, that is the error of the readers' outputs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from quantcli.arithmetic.affine import IntegerType

# Elements that are looked at.
ELEMENTS = 1 << 18
PERCENTILES = (99.99, 99.999)
# How many values make a part, of which the largest values are looked for.
PART = 512
SHARES = (0.97, 0.94, 0.9, 0.85, 0.8)
# What is clipped is rare and large: a range gives way only to one whose error is this part of its own, or less; a smaller part
# where weights are coarser than activations, since what the layers before have made is far from float then.
ENOUGH, ENOUGH_COARSE = 0.9, 0.8
# Of a range that leaves so many times the least error, what is cut is most: narrower ones cut more.
HOPELESS = 2.0


@dataclass(frozen=True)
class Grid:
    """The grid of a quantized activation."""

    scale: np.float32
    zero_point: int
    integer: IntegerType

    def round(self, values: NDArray[Any], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return values on the grid: quantized (ties to even) and dequantized; in place of ``out``, where that is given."""
        q = np.asarray(np.divide(values, self.scale, out=out), dtype=np.float32)
        np.rint(q, out=q)
        np.clip(q, self.integer.qmin - self.zero_point, self.integer.qmax - self.zero_point, out=q)
        q *= self.scale
        return q


@dataclass(frozen=True, eq=False)
class Looked:
    """Elements of a tensor.

    Attributes:
        real: What the float model gives, (elements,).
        made: What the quantized layers before give at the same places.
        weight: How much an error counts at each, or 1.
    """

    real: NDArray[np.float32]
    made: NDArray[np.float32]
    weight: NDArray[np.float32] | np.float32


def look(
    real: Sequence[NDArray[np.float32]],
    made: Sequence[NDArray[np.float32]],
    weights: NDArray[np.float64] | None,
    axis: int,
    seed: int,
) -> Looked:
    """Return elements drawn evenly from a tensor's batches.

    Args:
        real: Batches of the float model's values.
        made: The same of the quantized one.
        weights: How much an error in each channel counts; None for all alike.
        axis: The channel axis.
        seed: Of the draw.
    """
    parts: list[list[NDArray[np.float32]]] = [[], [], []]
    chosen = places_of(tuple(array.shape for array in real), axis, seed)
    for ours, theirs, (places, channels) in zip(real, made, chosen, strict=True):
        parts[0].append(ours.reshape(-1)[places])
        parts[1].append(theirs.reshape(-1)[places])
        if weights is not None:
            parts[2].append(weights.astype(np.float32)[channels])
    return Looked(
        np.concatenate(parts[0]), np.concatenate(parts[1]), np.concatenate(parts[2]) if parts[2] else np.float32(1)
    )


@functools.lru_cache(maxsize=4)
def places_of(
    shapes: tuple[tuple[int, ...], ...], axis: int, seed: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Return places of each batch, drawn evenly, and their channels; layers that follow each other have like shapes."""
    generator = np.random.default_rng(seed)
    each = max(1, ELEMENTS // len(shapes))
    places = [drawn(math.prod(shape), each, generator) for shape in shapes]
    return [
        (found, np.unravel_index(found, shape)[axis if axis < len(shape) else -1])
        for found, shape in zip(places, shapes, strict=True)
    ]


def drawn(size: int, count: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """Return places out of so many, in order: one at random of each of ``count`` even parts, or all."""
    if size <= count:
        return np.arange(size)
    ends = np.arange(count + 1) * size // count
    return ends[:-1] + (generator.random(count) * np.diff(ends)).astype(np.intp)


def percentiles(values: NDArray[np.float32]) -> list[tuple[float, float]]:
    """Return for each percentile the value below which the rest of 100 % lies, and the one below which it lies itself.

    As `numpy.percentile` has them, linear between neighbours. The largest values lie in the parts whose largest are the largest:
    few are looked at.
    """
    found = []
    for percent in PERCENTILES:
        place = percent / 100 * (len(values) - 1)
        below = int(place)
        count = len(values) - below  # so many of the largest are needed
        ends = []
        for side in (-values, values):
            kept = largest(side, count)
            low = float(kept[0])
            high = float(kept[1]) if count > 1 else low
            ends.append(low + (high - low) * (place - below))
        found.append((-ends[0], ends[1]))
    return found


def largest(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Return the largest values, so many, in ascending order."""
    rest = len(values) % PART
    parts = values[rest:].reshape(-1, PART)
    if len(parts) > 2 * count:
        within = np.argpartition(parts.max(axis=1), -count)[-count:]
        values = np.concatenate([values[:rest], parts[within].reshape(-1)])
    return np.sort(np.partition(values, -count)[-count:])


def best_range(
    looked: Looked,
    lo: float,
    hi: float,
    symmetric: bool,
    grid: Callable[[float, float], Grid],
    more: tuple[float, ...] = (),
    enough: float = ENOUGH,
) -> tuple[tuple[float, float], float, float]:
    """Return the best range within [lo, hi], and the errors of [lo, hi] and of it.

    Args:
        looked: Elements of the tensor.
        lo: The lowest value seen, at most 0.
        hi: The highest, at least 0.
        symmetric: Whether only ranges about zero can be had.
        grid: Gives the grid of a range.
        more: Parts of the range that are tried as well.
        enough: The part of the widest range's error that a narrower one may leave at most.
    """

    def error(low: float, high: float) -> float:
        difference = grid(low, high).round(looked.made)
        difference -= looked.real
        difference *= difference
        difference *= looked.weight
        return float(difference.mean())  # float32 sums in pairs

    widest = error(lo, hi)
    best, lowest = (lo, hi), widest
    named = percentiles(looked.real)
    tries = [(max(lo, min(a, 0.0)), min(hi, max(b, 0.0))) for a, b in named]
    for low, high in dict.fromkeys(tries):
        if low < high and (found := error(low, high)) < lowest:
            best, lowest = (low, high), found
    if symmetric:
        ends: tuple[tuple[int, ...], ...] = ((0, 1),)
    else:
        ends = tuple((end,) for end, bound in ((1, hi), (0, lo)) if bound != 0)
    for moved in ends:
        start = best
        for share in (*SHARES, *more):
            low, high = (bound * share if end in moved else bound for end, bound in enumerate(start))
            if (found := error(low, high)) < lowest:
                best, lowest = (low, high), found
            elif found > HOPELESS * lowest:
                break
    return (best, widest, lowest) if lowest <= enough * widest else ((lo, hi), widest, widest)
