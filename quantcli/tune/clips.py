"""What a Clip cuts where its channels have factors: more of a channel that grows, less of one that shrinks.

A Clip to [0, B] has one bound for all channels. Of a channel that was divided by f it cuts what surpasses f·B of the former values,
not B. Nagel et al. 2019 (arXiv 1906.04721), section 5.1.1, replace ReLU6 by ReLU where that is safe; here what a factor costs is
told from how the channel's values are spread:

    D(f) = E[(min(y, f·B) − min(y, B))²]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The factors that are looked at: as far apart as float32 numbers are with three bits of mantissa, from 2^-3 to below 2^2.
OCTAVES, MANTISSA = (-3, 2), 3
FACTORS = np.array(
    [2.0**octave * (1 + part / 2**MANTISSA) for octave in range(*OCTAVES) for part in range(2**MANTISSA)]
)
# About so many values of a channel are counted in each batch, at equal distances.
COUNTED = 2048


@dataclass(frozen=True, eq=False)
class Spread:
    """How the values of each channel that a Clip gets are spread, as parts of its bound.

    Attributes:
        highest: The highest value of each channel, 0 where that is higher.
        counts: How many values lie below the first of `FACTORS`, and from each of them to the next, the last one without an end:
            (channels, factors + 1).
    """

    highest: NDArray[np.float64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, batch: NDArray[Any], bound: float) -> Spread:
        """Look at a batch, whose second axis are channels."""
        rows = np.moveaxis(batch, 1, 0).reshape(batch.shape[1], -1)
        highest = np.maximum(rows.max(axis=1), 0).astype(np.float64)
        some = rows[:, :: -(-rows.shape[1] // COUNTED)]
        parts = np.ascontiguousarray(np.maximum(some, 0), dtype=np.float32) * np.float32(1 / bound)
        # A number's exponent and the first bits of its mantissa, which number the factors.
        places = (parts.view(np.int32) >> (23 - MANTISSA)) - (((127 + OCTAVES[0]) << MANTISSA) - 1)
        np.clip(places, 0, len(FACTORS), out=places)
        width = len(FACTORS) + 1
        places += np.arange(len(places), dtype=np.int32)[:, None] * width
        return cls(highest, np.bincount(places.reshape(-1), minlength=len(places) * width).reshape(len(places), width))

    def with_more(self, other: Spread) -> Spread:
        """Return what was seen in two batches."""
        return Spread(np.maximum(self.highest, other.highest), self.counts + other.counts)

    def changes(self, bound: float) -> NDArray[np.float64]:
        """Return D of each channel at each of `FACTORS`, (channels, factors); values count as what lies amid what counts them."""
        ends = np.append(FACTORS, 2.0 ** OCTAVES[1])
        middles = np.append(0.0, np.sqrt(ends[:-1] * ends[1:]))
        change = (np.minimum(middles, FACTORS[:, None]) - np.minimum(middles, 1.0)) * bound
        share = self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)
        found: NDArray[np.float64] = share @ np.square(change).T
        return found
