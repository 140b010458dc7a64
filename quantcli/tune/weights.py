"""The weights of one layer: scales and integers by the second moments of what they meet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantcli.tune.cross_validation import best_damping, best_ridge
from quantcli.tune.rounding import (
    DAMPING,
    HALVES,
    RIDGE,
    Levels,
    best_scales,
    compensated,
    damped,
    errors_by,
    errors_of_scales,
    nearest,
    parts_of_scales,
    rounded,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from quantcli.arithmetic.affine import IntegerType
    from quantcli.tune.moments import Moments
    from quantcli.tune.steps import Steps


# Weights of so few bits have scales that are best once what one integer loses is carried on to others: other scales than are best
# for the nearest integers. Of many fewer rows than inputs they would be best for changes that happen to cost nothing there.
FEW_BITS, ENOUGH_ROWS = 5, 0.5
# What part of a layer's output counts as no error: scales are float32 numbers.
EXACT = 1e-10


@dataclass(frozen=True, eq=False)
class Met:
    """A layer's weights, with the moments of what they meet.

    Attributes:
        weights: (groups, outputs, inputs).
        moments: Of all samples.
        rows: How many rows of inputs they were taken of.
        halves: Of each half of them; none where they were not parted.
    """

    weights: NDArray[np.float64]
    moments: Moments
    rows: int
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
        symmetric: Whether grids lie about zero.
        final: Returns what the plan makes of scales, one or one per output.
    """

    one: bool
    power_of_two: bool
    symmetric: bool
    final: Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Fitted:
    """What was chosen.

    Attributes:
        integers: (groups, outputs, inputs).
        scales: One, or one per output.
        lowest: The lowest integer of each of the scales' grids; None where they lie about zero.
        spread: The scale of each output, (groups, outputs).
        regularization: What they were chosen with.
        gains: By step, the error of the layer's outputs before and after.
    """

    integers: NDArray[np.float64]
    scales: NDArray[np.float32]
    lowest: NDArray[np.int64] | None
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
        widest: The scales of grids about zero that cover the largest weights, one or one per output.
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
    levels = Levels(integer.ends, None if form.symmetric else extent(wanted, form.one))

    errors = errors_by(stable, wanted.size)
    exact = EXACT * float(errors(wanted).sum())

    def error(integers: NDArray[np.float64], scales: NDArray[np.float64]) -> float:
        """Return the error, no less than what counts as none."""
        return max(float(errors(integers * scales[..., None] - wanted).sum()), exact)

    flat = form.final(levels.covering(widest).astype(np.float32))
    scales = spread(flat, wanted)
    before = error(nearest(wanted, scales, levels.at(scales)), scales)
    if moments.cross is not None:
        gains.append(("compensation", error(nearest(met.weights, scales, levels.at(scales)), scales), before))
    if steps.scales:
        best = best_scales(wanted, spread(widest, wanted), stable, levels, form.one, form.power_of_two)
        flat = form.final(best.reshape(-1)[: len(widest)].astype(np.float32))
        scales = spread(flat, wanted)
    integers = nearest(wanted, scales, levels.at(scales))
    middle = error(integers, scales)
    if steps.scales:
        gains.append(("scales", before, middle))
    if steps.rounding:
        found = replace(found, damping=best_damping(wanted, scales, halves, levels)) if halves else found
        held = stable if found.damping == DAMPING else damped(moments.covariance, found.damping)
        if steps.scales and integer.bits <= FEW_BITS and met.rows >= ENOUGH_ROWS * wanted.shape[2]:
            flat = scales_for_rounding(wanted, widest, held, levels, form)
            scales = spread(flat, wanted)
        integers = rounded(wanted, scales, held, levels.at(scales))
        gains.append(("rounding", middle, error(integers, scales)))
    lowest = None if form.symmetric else np.asarray(levels.at(scales)[0]).reshape(-1)[: len(flat)].astype(np.int64)
    return Fitted(integers, flat, lowest, scales, found, tuple(gains))


def extent(weights: NDArray[np.float64], one: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the lowest and the highest weight of each output, (groups, outputs), or of all; with zero between them."""
    axis = (0, 1, 2) if one else 2
    low, high = weights.min(axis=axis, initial=0.0, keepdims=True), weights.max(axis=axis, initial=0.0, keepdims=True)
    shape = weights.shape[:2]
    return np.broadcast_to(low[..., 0], shape), np.broadcast_to(high[..., 0], shape)


def spread(scales: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scale of each output of some weights, (groups, outputs), of one scale or one per output."""
    groups, outputs, _ = weights.shape
    return np.broadcast_to(scales.astype(np.float64), (groups * outputs,)).reshape(groups, outputs)


def scales_for_rounding(
    weights: NDArray[np.float64],
    widest: NDArray[np.float32],
    moments: NDArray[np.float64],
    levels: Levels,
    form: ScaleForm,
) -> NDArray[np.float32]:
    """Return the scales on which weights are rounded best by second moments, out of parts of the widest.

    Args:
        weights: (groups, outputs, inputs).
        widest: The scales of grids about zero that cover the largest weights, one or one per output.
        moments: (groups, inputs, inputs), damped.
        levels: The integers.
        form: What scales have to be.
    """
    shares = HALVES if form.power_of_two else parts_of_scales(weights.size * weights.shape[2])
    parts = [widest * share if form.power_of_two else levels.part(widest, share) for share in shares]
    tried = [form.final(part.astype(np.float32)) for part in parts]
    errors = errors_of_scales(weights, np.stack([spread(scales, weights) for scales in tried]), moments, levels)
    if form.one:
        return tried[int(errors.sum(axis=(1, 2)).argmin())]
    best = errors.argmin(axis=0).reshape(-1)
    chosen: NDArray[np.float32] = np.stack(tried)[best, np.arange(len(best))]
    return chosen
