"""Weight rounding from second moments: which of the integers next to each weight changes the layer's output least.

The mean squared change of a layer's output is tr(Δ·H·Δᵀ), Δ = Ŵ − W and H = E[x·xᵀ] of its inputs x. Three steps make it small:

1. a scale per channel, tried at parts of the largest weight's: what is left by the nearest integers tells (`best_scales`), or by
   those of step 2 (`errors_of_scales`);
2. OBQ/GPTQ (Frantar et al. 2022, "GPTQ", arXiv 2210.17323, algorithm 1): columns are rounded one after the other, and what each has
   lost is made up for by those still to come. GPTQ takes the Cholesky factor of H⁻¹ for that; a factor of H itself gives the same
   integers without an inverse, as Babai's nearest plane does (Chen et al. 2025, arXiv 2507.18553);
3. coordinate descent from there, but for large layers on fine grids: each integer in turn moves to where the quadratic form is
   smallest, the others held, until none moves, or all had two turns (Behdin et al. 2023, "QuantEase", arXiv 2309.01885).

All weights of a layer may first move to where the float model's output is met best from the quantized inputs (`compensated`):
W* = W + W·E[(x − x̂)·x̂ᵀ]·(H + λI)⁻¹, the least squares solution with a ridge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantcli.arithmetic.affine import lowest_integers

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from quantcli.tune.moments import Moments

    # The lowest and the highest integer, of all outputs or of each: (groups, outputs).
    Ends = tuple[int, int] | tuple[NDArray[np.float64], NDArray[np.float64]]

# The part of the mean variance that is added to every variance (GPTQ's dampening is 1 %).
DAMPING = 0.01
# The ridge of the compensation, as a part of the mean variance.
RIDGE = 0.3
# Parts of the largest weight's scale that are tried.
SHARES = np.linspace(1.0, 0.4, 25)
# Of fine grids, which lose little by covering everything.
FINE, FINE_SHARES = 64, np.linspace(1.0, 0.82, 7)
# From so many weights on, coordinate descent on a fine grid takes longer than it is worth.
LARGE = 1 << 17
# Of powers of two.
HALVES = np.array([1.0, 0.5, 0.25])
# How many parts are tried where what is lost is carried on; no fewer than FEWEST where so many take more multiplications than WORK.
MANY, FEWEST, WORK = 61, 13, 4 * 10**9
PASSES = 2
# Bytes of weights on different scales that are rounded at once.
ROOM = 1 << 24
# Columns whose errors are carried on together.
BLOCK = 64


@dataclass(frozen=True, eq=False)
class Levels:
    """The integers that weights may have.

    Attributes:
        ends: The lowest and the highest.
        extent: The lowest and the highest weight of each output, (groups, outputs), whose integers are as many, but lie about
            the middle between the two; None where all have the same.
    """

    ends: tuple[int, int]
    extent: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None

    def at(self, scales: NDArray[np.floating]) -> Ends:
        """Return the ends on some scales, (…, groups, outputs)."""
        if self.extent is None:
            return self.ends
        steps = self.ends[1] - self.ends[0]
        lowest = lowest_integers(*self.extent, scales, steps)
        return lowest, lowest + steps

    def some(self, outputs: slice, times: tuple[int, int]) -> Levels:
        """Return those of some outputs, so many times along groups and along outputs."""
        if self.extent is None:
            return self
        low, high = (np.tile(end[:, outputs], times) for end in self.extent)
        return Levels(self.ends, (low, high))

    def covering(self, widest: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the least scales that cover all weights, of those that do so about zero (of the same shape)."""
        if self.extent is None:
            return widest
        low, high = (end.reshape(-1)[: widest.size].reshape(widest.shape) for end in self.extent)
        needed = (high - low) / (self.ends[1] - self.ends[0])
        found: NDArray[np.floating] = np.where(needed > 0, np.minimum(needed, widest), widest)
        return found

    def part(self, widest: NDArray[np.floating], share: float) -> NDArray[np.float32]:
        """Return scales between those that cover all weights about zero (1), and a part of those that do (the last of SHARES).

        Of few weights the wider ones may happen to lie closer to all.
        """
        if self.extent is None:
            return (widest * share).astype(np.float32)
        far = (SHARES[0] - share) / (SHARES[0] - SHARES[-1])
        found: NDArray[np.float32] = (widest + far * (SHARES[-1] * self.covering(widest) - widest)).astype(np.float32)
        return found


def damped(covariance: NDArray[np.float64], part: float = DAMPING) -> NDArray[np.float64]:
    """Return second moments with a part of their mean diagonal added to the diagonal."""
    size = covariance.shape[-1]
    level = np.trace(covariance, axis1=1, axis2=2) / size
    level = np.where(level > 0, level, 1.0)
    found = covariance.copy()
    np.einsum("gii->gi", found)[:] += part * level[:, None]
    return found


def compensated(weights: NDArray[np.float64], moments: Moments, ridge: float = RIDGE) -> NDArray[np.float64]:
    """Return the weights that give the float model's outputs best from what the quantized layers before have made.

    Args:
        weights: W, (groups, outputs, inputs).
        moments: Of the layer's inputs.
        ridge: λ as a part of the mean variance.
    """
    if moments.cross is None:
        return weights
    wanted = weights @ moments.cross
    solved = np.linalg.solve(damped(moments.covariance, ridge), wanted.transpose(0, 2, 1))
    found: NDArray[np.float64] = weights + solved.transpose(0, 2, 1)
    return found


def errors_by(moments: NDArray[np.float64], size: int) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Return the function that tells what a change of weights does to each output, in the mean of squares: (groups, outputs).

    Of large layers it multiplies in float32, which takes half as long: a sum of n products is off by no more than n·2⁻²⁴ of
    their magnitudes.

    Args:
        moments: H, (groups, inputs, inputs).
        size: How many weights the layer has.
    """
    if size < LARGE:
        return lambda change: output_error(change, moments)
    level = float(np.abs(moments).max(initial=0.0)) or 1.0
    short = (moments / level).astype(np.float32)

    def errors(change: NDArray[np.float64]) -> NDArray[np.float64]:
        brief = change.astype(np.float32)
        product = brief @ short
        product *= brief
        found: NDArray[np.float64] = np.maximum(product.sum(axis=2, dtype=np.float64) * level, 0.0)
        return found

    return errors


def output_error(change: NDArray[np.float64], moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a change of weights does to each output, in the mean of squares: (groups, outputs)."""
    error: NDArray[np.float64] = np.maximum(((change @ moments) * change).sum(axis=2), 0.0)
    return error


def nearest(weights: NDArray[np.float64], scales: NDArray[np.float64], ends: Ends) -> NDArray[np.float64]:
    """Return the nearest integers, (groups, outputs, inputs), of scales (groups, outputs)."""
    return limited(np.rint(weights / scales[..., None]), along(ends, -1))


def along(ends: Ends, axis: int) -> Ends:
    """Return ends with a new axis, where each output has its own."""
    low, high = ends
    if isinstance(low, int) or isinstance(high, int):
        return ends
    return np.expand_dims(low, axis), np.expand_dims(high, axis)


def limited(values: NDArray[np.float64], ends: Ends) -> NDArray[np.float64]:
    """Return values within the ends of a grid. Of short columns, `numpy.clip` takes as long to begin as these to end."""
    within: NDArray[np.float64] = np.minimum(np.maximum(values, ends[0]), ends[1])
    return within


def best_scales(
    weights: NDArray[np.float64],
    scales: NDArray[np.float64],
    moments: NDArray[np.float64],
    levels: Levels,
    shared: bool,
    power_of_two: bool = False,
) -> NDArray[np.float32]:
    """Return the scale of each output for which rounding to nearest changes it least, out of parts of the widest.

    Args:
        weights: (groups, outputs, inputs).
        scales: What covers the largest weights, (groups, outputs).
        moments: H, (groups, inputs, inputs).
        levels: The integers.
        shared: Whether all outputs share one scale.
        power_of_two: Whether the scales are powers of two, and stay so.
    """
    best = scales.astype(np.float32)
    lowest: NDArray[np.float64] | None = None
    shares = HALVES if power_of_two else FINE_SHARES if levels.ends[1] >= FINE else SHARES
    errors = errors_by(moments, weights.size)
    for share in shares:
        tried = (scales * share).astype(np.float32) if power_of_two else levels.part(scales, share)
        used = tried.astype(np.float64)
        error = errors(nearest(weights, used, levels.at(used)) * used[..., None] - weights)
        if shared:
            error = np.full_like(error, error.sum())
        if lowest is None:
            lowest = error
            continue
        better = error < lowest
        best, lowest = np.where(better, tried, best), np.where(better, error, lowest)
    return best


def rounded(
    weights: NDArray[np.float64], scales: NDArray[np.float64], moments: NDArray[np.float64], ends: Ends
) -> NDArray[np.float64]:
    """Return integers, (groups, outputs, inputs), for which tr(Δ·H·Δᵀ) is small: steps 2 and 3 above.

    Step 3 takes longest, and gained nothing over nine networks of 8 bits (from −1.0 to 0.4 dB): large layers go without it there.

    Args:
        weights: The weights that are to be met.
        scales: (groups, outputs).
        moments: H, damped.
        ends: The lowest and the highest integer.
    """
    plain = nearest(weights, scales, ends)
    found = propagated(weights, scales, moments, ends)
    if weights.size < LARGE or np.min(np.subtract(ends[1], ends[0])) < 2 * FINE:
        found = descended(weights, found, scales, moments, ends)
    step, errors = scales[..., None], errors_by(moments, weights.size)
    worse = errors(found * step - weights) > errors(plain * step - weights)
    return np.where(worse[..., None], plain, found)


def propagated(
    weights: NDArray[np.float64], scales: NDArray[np.float64], moments: NDArray[np.float64], ends: Ends
) -> NDArray[np.float64]:
    """Return integers by GPTQ: columns of large second moments first, each one's error carried on to the others.

    H = Mᵀ·M with M lower triangular, so that the change e of the weights costs Σᵢ (Mᵢᵢ·eᵢ + Σⱼ﹤ᵢ Mᵢⱼ·eⱼ)²: column i is best at
    wᵢ + Σⱼ﹤ᵢ Mᵢⱼ/Mᵢᵢ·eⱼ. What a block of columns adds to those behind it is added all at once (GPTQ, section 3.2, step 2).
    """
    factor = Factor.of(moments)
    found, _ = factor.carried(weights, scales, ends)
    back = np.empty_like(factor.order)
    back[factor.order] = np.arange(len(back))
    return np.ascontiguousarray(found[:, back].transpose(0, 2, 1))


@dataclass(frozen=True, eq=False)
class Factor:
    """Second moments H as L·Lᵀ, as far as what one column loses is carried on by it: L is M of `propagated`, columns backwards.

    Attributes:
        order: The columns, those of small second moments first.
        lower: L, in that order, (groups, inputs, inputs).
        diagonal: Its diagonal, (groups, inputs).
    """

    order: NDArray[np.intp]
    lower: NDArray[np.float64]
    diagonal: NDArray[np.float64]

    @classmethod
    def of(cls, moments: NDArray[np.float64]) -> Factor:
        """Return the factor of second moments, (groups, inputs, inputs)."""
        order = np.argsort(-np.einsum("gii->gi", moments).mean(axis=0), kind="stable")[::-1]
        ordered = moments.take(order, axis=1).take(order, axis=2)
        lower = np.asarray(np.linalg.cholesky(ordered), dtype=np.float64)
        return cls(order, lower, np.einsum("gii->gi", lower).copy())

    def carried(
        self, weights: NDArray[np.float64], scales: NDArray[np.float64], ends: Ends
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return integers, each column's error carried on to those that follow, and how far each is from what was best there.

        The last column is the first one to be rounded. Both are (groups, inputs, outputs), columns in `order`.
        """
        given = np.ascontiguousarray((weights / scales[..., None])[:, :, self.order].transpose(0, 2, 1))
        wanted, found, lost = given.copy(), np.empty_like(given), np.empty_like(given)
        for last in range(len(self.order), 0, -BLOCK):
            first = max(last - BLOCK, 0)
            pivots = self.diagonal[:, first:last]
            if last < len(self.order):
                wanted[:, first:last] += (
                    self.lower[:, last:, first:last].transpose(0, 2, 1) @ lost[:, last:] / pivots[..., None]
                )
            block = self.lower[:, first:last, first:last] / pivots[:, None]
            for column in range(last - 1, first - 1, -1):
                integer = np.rint(wanted[:, column], out=found[:, column])
                np.minimum(np.maximum(integer, ends[0], out=integer), ends[1], out=integer)
                error = np.subtract(given[:, column], integer, out=lost[:, column])
                wanted[:, first:column] += block[:, column - first, : column - first, None] * error[:, None]
        return found, np.subtract(wanted, found, out=wanted)


def parts_of_scales(work: int) -> NDArray[np.float64]:
    """Return the parts of the largest weight's scale that are tried where what is lost is carried on.

    Args:
        work: How many multiplications each takes, about.
    """
    return np.linspace(SHARES[0], SHARES[-1], min(MANY, max(FEWEST, WORK // max(work, 1))))


def errors_of_scales(
    weights: NDArray[np.float64], tried: NDArray[np.float64], moments: NDArray[np.float64], levels: Levels
) -> NDArray[np.float64]:
    """Return what rounding by GPTQ does to each output on each of some scales, in the mean of squares: of the scales' shape.

    Of a column's error all that is not carried on remains, so that the whole is Σᵢ (Mᵢᵢ·sₒ·(wanted − integer))².

    Args:
        weights: (groups, outputs, inputs).
        tried: Scales, (choices, groups, outputs).
        moments: (groups, inputs, inputs), damped.
        levels: The integers.
    """
    factor, (choices, groups, outputs) = Factor.of(moments), tried.shape
    errors = np.empty_like(tried)

    def side_by_side(choices: NDArray[np.float64]) -> NDArray[np.float64]:
        return choices.transpose(1, 0, 2).reshape(groups, -1)

    together = max(1, ROOM // (8 * choices * groups * weights.shape[2]))
    for first in range(0, outputs, together):
        some = weights[:, first : first + together]
        part = slice(first, first + together)
        scales = side_by_side(tried[:, :, part])
        _, far = factor.carried(np.tile(some, (1, choices, 1)), scales, levels.some(part, (1, choices)).at(scales))
        far *= factor.diagonal[:, :, None]
        found = np.einsum("gio,gio->go", far, far) * np.square(scales)
        errors[:, :, first : first + together] = found.reshape(groups, choices, -1).transpose(1, 0, 2)
    return errors


def descended(
    weights: NDArray[np.float64],
    integers: NDArray[np.float64],
    scales: NDArray[np.float64],
    moments: NDArray[np.float64],
    ends: Ends,
    passes: int = PASSES,
) -> NDArray[np.float64]:
    """Return integers after coordinate descent: one column after the other moves to its best place, the others held.

    Args:
        weights: The weights that are to be met, (groups, outputs, inputs).
        integers: What is begun with.
        scales: (groups, outputs).
        moments: H, (groups, inputs, inputs).
        ends: The lowest and the highest integer.
        passes: How often all columns have their turn, unless none moves any more.
    """
    found = integers.transpose(0, 2, 1).copy()  # groups, inputs, outputs
    slope = moments @ (found * scales[:, None] - weights.transpose(0, 2, 1))
    steps = np.einsum("gii->gi", moments)[..., None] * scales[:, None]
    size, spans = found.shape[1], along(ends, 1)

    def changes(first: int, last: int) -> NDArray[np.float64]:
        """Return by how much columns would move, each by itself."""
        held = found[:, first:last]
        return limited(np.rint(held - slope[:, first:last] / steps[:, first:last]), spans) - held

    for _ in range(passes):
        moved = False
        for first in range(0, size, BLOCK):
            last = min(first + BLOCK, size)
            shift = np.zeros_like(found[:, first:last])
            column = first
            while column < last:
                change = changes(column, last)
                moving: NDArray[np.bool_] = np.any(change, axis=(0, 2))
                ahead = int(moving.argmax())
                if not moving[ahead]:
                    break
                column += ahead  # those before it stay: nothing moved that they depend on
                found[:, column] += change[:, ahead]
                shift[:, column - first] = change[:, ahead] * scales
                slope[:, first:last] += moments[:, first:last, column, None] * shift[:, None, column - first]
                column += 1
            if shift.any():
                moved = True
                slope[:, :first] += moments[:, :first, first:last] @ shift
                slope[:, last:] += moments[:, last:, first:last] @ shift
        if not moved:
            break
    return np.ascontiguousarray(found.transpose(0, 2, 1))
