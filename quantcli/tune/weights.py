"""The weights of one layer: scales and integers by the second moments of what they meet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantcli.tune.cross_validation import best_damping, best_ridge
from quantcli.tune.rounding import DAMPING, RIDGE, best_scales, compensated, damped, nearest, output_error, rounded

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from quantcli.arithmetic.affine import IntegerType
    from quantcli.tune.moments import Moments
    from quantcli.tune.steps import Steps


@dataclass(frozen=True, eq=False)
class Met:
    """A layer's weights, with the moments of what they meet.

    Attributes:
        weights: (groups, outputs, inputs).
        moments: Of all samples.
        halves: Of each half of them; none where they were not parted.
    """

    weights: NDArray[np.float64]
    moments: Moments
    halves: tuple[Moments, ...] = ()


@dataclass(frozen=True)
class Regularization:
    """How strongly weights are held back from following the samples, as parts of the mean variance.

    Attributes:
        ridge: Of the compensation.
        damping: Of the rounding.
    """

    ridge: float = RIDGE
    damping: float = DAMPING


@dataclass(frozen=True)
class ScaleForm:
    """What scales have to be.

    Attributes:
        one: Whether all outputs have one.
        power_of_two: Whether they are powers of two.
        final: Returns what the plan makes of scales, one or one per output.
    """

    one: bool
    power_of_two: bool
    final: Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was chosen.

    Attributes:
        integers: (groups, outputs, inputs).
        scales: One, or one per output.
        spread: The scale of each output, (groups, outputs).
        regularization: What they were chosen with.
        gains: By step, the error of the layer's outputs before and after.
    """

    integers: NDArray[np.float64]
    scales: NDArray[np.float32]
    spread: NDArray[np.float64]
    regularization: Regularization
    gains: tuple[tuple[str, float, float], ...]


def fitted(
    met: Met,
    widest: NDArray[np.float32],
    integer: IntegerType,
    steps: Steps,
    form: ScaleForm,
    known: Regularization | None,
) -> Fitted:
    """Choose a layer's scales and integers.

    Args:
        met: The weights, and what they meet.
        widest: The scales that cover the largest weights, one or one per output.
        integer: The grid.
        steps: What to do.
        form: What scales have to be.
        known: The regularization; None to find it out from halves of the samples, where there are some.
    """
    gains: list[tuple[str, float, float]] = []
    moments, halves = met.moments, met.halves
    found = known or Regularization()
    wanted = met.weights
    if moments.cross is not None:
        found = replace(found, ridge=best_ridge(met.weights, halves)) if halves else found
        wanted = compensated(met.weights, moments, found.ridge)
    stable = damped(moments.covariance)

    def spread(scales: NDArray[np.float32]) -> NDArray[np.float64]:
        shape = wanted.shape[:2]
        return np.broadcast_to(scales.astype(np.float64), (shape[0] * shape[1],)).reshape(shape)

    def error(integers: NDArray[np.float64], scales: NDArray[np.float64]) -> float:
        return float(output_error(integers * scales[..., None] - wanted, stable).sum())

    scales = spread(widest)
    before = error(nearest(wanted, scales, integer.ends), scales)
    if moments.cross is not None:
        gains.append(("compensation", error(nearest(met.weights, scales, integer.ends), scales), before))
    flat = widest
    if steps.scales:
        best = best_scales(wanted, scales, stable, integer.ends, form.one, form.power_of_two)
        flat = best.reshape(-1)[: len(widest)].astype(np.float32)
    flat = form.final(flat)
    scales = spread(flat)
    integers = nearest(wanted, scales, integer.ends)
    middle = error(integers, scales)
    if steps.scales:
        gains.append(("scales", before, middle))
    if steps.rounding:
        found = replace(found, damping=best_damping(wanted, scales, halves, integer.ends)) if halves else found
        integers = rounded(wanted, scales, moments.covariance, integer.ends, found.damping)
        gains.append(("rounding", middle, error(integers, scales)))
    return Fitted(integers, flat, scales, found, tuple(gains))
