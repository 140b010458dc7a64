"""What a metric says of a quantized model, and what that promises of samples that it was not judged on.

Samples that one model has right and the other wrong are few, and of few a count says little: nothing among 300 may be one in 100.
How far each sample is from changing says more. A sample's margin is the score of its label less the best of the others (of
top-k, the k-th best); it is right where that is above zero. Near zero margins lie evenly, so of samples whose margin is moved by d,
half of E[|d|] times their density at zero change. The density follows from the samples that lie nearest, and d is theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How sure a promise is, and how many standard errors an estimate allows for: the normal distribution has as much below them.
SURE, CONFIDENCE = 0.95, 1.645
# No fewer samples tell how margins lie.
LEAST_SAMPLES = 32
# Probabilities below this are the same.
FAINTEST = 1e-30


@dataclass(frozen=True)
class Score:
    """What a metric says of a quantized model beside the float one.

    Attributes:
        quantized: The quantized model's, in percent.
        reference: The float model's.
        samples: On how many samples.
        changed: How many of them one of the two has right and the other wrong.
        likely: How many may change among as many samples, by how far these are from it.
    """

    quantized: float
    reference: float
    samples: int
    changed: int
    likely: float = 0.0

    @property
    def drop(self) -> float:
        """By how many points the quantized model is below."""
        return self.reference - self.quantized

    @property
    def worst(self) -> float:
        """The most that the drop is on as many other samples, with 95 % confidence: what a promise about them has to allow for.

        A gain is taken to be luck.
        """
        if not self.samples:
            return 0.0
        return max(self.drop, 0.0) + 100.0 * largest_loss(self.changing) / self.samples

    @property
    def changing(self) -> float:
        """How many samples change, as far as one can tell: as many as did, or as may have."""
        return max(float(self.changed), self.likely)

    @property
    def uncertainty(self) -> float:
        """The standard error of the drop, in points: √changing / samples (of paired differences, McNemar)."""
        return 100.0 * math.sqrt(self.changing) / self.samples if self.samples else 0.0


def largest_loss(changing: float) -> int:
    """Return by how many samples losses exceed gains at most, with 95 % confidence, where so many change and either is as likely.

    Both are Poisson variables of half that mean, and their difference is a Skellam variable (Skellam 1946).
    """
    if changing <= 0:
        return 0
    mean = changing / 2
    count = np.arange(math.ceil(mean + 10 * math.sqrt(mean) + 20))
    logarithms = count * math.log(mean) - mean - np.array([math.lgamma(one + 1) for one in count])
    once = np.exp(logarithms)
    difference = np.convolve(once, once[::-1])  # of losses less gains, from -(n - 1) on
    below = np.cumsum(difference)
    return max(int(np.searchsorted(below, SURE)) - (len(count) - 1), 0)


def margins(
    scores: NDArray[np.floating], labels: NDArray[np.integer], k: int, probabilities: bool
) -> NDArray[np.float64]:
    """Return by how much the score of every sample's label is above the k-th best of the others, of shape (samples,).

    Args:
        scores: Of shape (samples, classes).
        labels: Of shape (samples,).
        k: How many scores count.
        probabilities: Whether it is their logarithms that are compared.
    """
    values = scores.astype(np.float64)
    if probabilities:
        values = np.log(np.maximum(values, FAINTEST))
    rows = np.arange(len(values))
    own = values[rows, labels]
    values[rows, labels] = -np.inf
    if k >= values.shape[1]:
        return np.full(len(values), np.inf)
    return np.asarray(own - np.partition(values, -k, axis=1)[:, -k])


def compared(
    right: tuple[NDArray[np.bool_], NDArray[np.bool_]], margin: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> Score:
    """Return what a metric says of a model beside the float one.

    Args:
        right: Which samples the model has right, and which the float one.
        margin: By how much, for either.
    """
    found, expected = right
    if not found.size:
        return Score(0.0, 0.0, 0, 0)
    changed = int((found != expected).sum())
    with np.errstate(invalid="ignore"):  # infinite margins, where every class counts, stay where they are
        moved = np.abs(margin[0] - margin[1])
    likely = len(found) * likely_share(np.abs(margin[1]), moved)
    return Score(100.0 * float(found.mean()), 100.0 * float(expected.mean()), len(found), changed, likely)


def likely_share(distance: NDArray[np.float64], moved: NDArray[np.float64]) -> float:
    """Return the share of samples that change, by those nearest to it: √n of n.

    Of the share k / n of samples within h of zero, spread evenly over both directions, those change that are moved by more than
    their distance and the right way: E[min(d, h)] / 2h. That h is the k-th smallest distance makes it uncertain by 1/√k of itself,
    and the average of k moves by its own standard error; 95 % confidence allows for both. Where moves reach far beyond h it falls
    short, but then enough samples have changed to be counted.

    Args:
        distance: How far each sample's margin is from zero.
        moved: By how much it is moved.
    """
    size = len(distance)
    near = max(math.isqrt(size), 1)
    nearest = np.argsort(distance, kind="stable")[:near]
    reach = float(distance[nearest[-1]])
    if not math.isfinite(reach):
        return 0.0
    if reach == 0:
        return float((moved > 0).mean())
    moves = np.minimum(moved[nearest], reach)
    mean = float(moves.mean())
    if mean == 0:
        return 0.0
    error = math.sqrt((1 + float(moves.var()) / mean**2) / near)
    return min(near / size * mean / (2 * reach) * (1 + CONFIDENCE * error), 1.0)
