"""Cross-validation of a layer's regularization: how strongly its weights may follow the samples that they are fitted to.

Second moments of a few hundred samples hold their chance as well. Integers that follow small variances closely, and weights that
make up for differences along them, lose on other samples what they gain on these. Both solutions (`quantcli.tune.rounding`) have a
term that holds them back: it is chosen for each layer by fitting to one half of the samples and looking at the error on the other,
both ways (Stone 1974, "Cross-validatory choice and assessment of statistical predictions", doi:10.1111/j.2517-6161.1974.tb00994.x).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.tune.rounding import compensated, damped, output_error, propagated

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from quantcli.tune.moments import Moments
    from quantcli.tune.rounding import Levels

# What is tried, as parts of the mean variance. Smaller ridges lower the layers' errors on the other half, too, but not those of
# the outputs: what one layer's weights make up for, those behind it meet as well.
RIDGES = (0.3, 1.0, 3.0)
DAMPINGS = (0.01, 0.1, 0.3)
# Outputs of a group that dampings are judged by.
OUTPUTS = 32
# Bytes of second moments that are worked on at once.
ROOM = 1 << 26
# Of layers with more inputs than these one half is fitted to and the other judges, but not the other way round, since that takes
# time that grows with their cube.
BOTH_WAYS = 1024


def ways(halves: Sequence[Moments]) -> list[tuple[Moments, Moments]]:
    """Return which half is fitted to and which judges."""
    first, second = halves
    both = first.covariance.shape[-1] <= BOTH_WAYS
    return [(first, second), (second, first)] if both else [(first, second)]


def best_ridge(weights: NDArray[np.float64], halves: Sequence[Moments]) -> float:
    """Return the ridge with which weights compensated on one half give the float model's outputs best on the other.

    Of W* = W + D the error is E‖W·x − W*·x̂‖² = tr(D·H·Dᵀ) − 2·tr(D·(W·C)ᵀ) and what does not depend on D, C as in `Moments`.

    Args:
        weights: W, (groups, outputs, inputs).
        halves: The moments of both halves, with what the float model says.
    """
    errors = dict.fromkeys(RIDGES, 0.0)
    for fitted, other in ways(halves):
        assert other.cross is not None  # noqa: S101 - as the arguments say
        wanted = 2 * (weights @ other.cross)
        for ridge in RIDGES:
            change = compensated(weights, fitted, ridge) - weights
            errors[ridge] += float(np.vdot(change, change @ other.covariance - wanted))
    return min(RIDGES, key=errors.__getitem__)


def best_damping(
    weights: NDArray[np.float64], scales: NDArray[np.float64], halves: Sequence[Moments], levels: Levels
) -> float:
    """Return the damping with which integers chosen on one half change the outputs least on the other.

    Args:
        weights: The weights that are to be met, (groups, outputs, inputs).
        scales: (groups, outputs).
        halves: The moments of both halves.
        levels: The integers.
    """
    few = slice(None, None, -(-weights.shape[1] // OUTPUTS))
    pairs = ways(halves)
    given, steps = (np.concatenate([array[:, few]] * len(pairs)) for array in (weights, scales))
    fitted, other = (np.concatenate([pair[place].covariance for pair in pairs]) for place in (0, 1))
    together = max(1, ROOM // max(fitted.nbytes, 1))
    errors = dict.fromkeys(DAMPINGS, 0.0)
    for first in range(0, len(DAMPINGS), together):
        part = DAMPINGS[first : first + together]
        stable = np.concatenate([damped(fitted, damping) for damping in part])
        many = len(part)
        tried = np.tile(steps, (many, 1))
        ends = levels.some(few, (len(pairs) * many, 1)).at(tried)
        found = propagated(np.tile(given, (many, 1, 1)), tried, stable, ends)
        for damping, integers in zip(part, np.split(found, many), strict=True):
            errors[damping] = float(output_error(integers * steps[..., None] - given, other).sum())
    return min(DAMPINGS, key=errors.__getitem__)
