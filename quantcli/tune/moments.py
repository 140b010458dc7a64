"""Moments: what a layer's weights are multiplied with, as rows, and the second moments of those rows.

A layer that accumulates is a matrix product per group: y = W·x, with x a row of inputs (a patch, for a convolution). Everything
that a choice of weights does to the layer's output, in the mean of squares, follows from E[x·xᵀ] (Frantar et al. 2022, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.tune.patches import Patches, rows_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

# Rows beyond so many per input, but so many in all if they are enough for that, change a second moment by little; rows are drawn
# evenly.
ROWS_PER_INPUT, MANY_ROWS, ENOUGH_PER_INPUT = 256, 8192, 4
# Weights of less than 8 bits follow the moments further, and gain by more: by so many where those are no more numbers than that.
COARSE_PER_INPUT, FEWEST_COARSE, COARSE_ROWS, MOST_NUMBERS = 12, 8192, 32768, 1 << 24
# Of many groups there are fewer: no more numbers than that, but so many per input as are enough.
ROOM = 1 << 25


@dataclass(frozen=True)
class Matrix:
    """A layer's weight as matrices, one per group: (groups, outputs of a group, inputs of a group).

    A convolution's inputs are its taps, and of each tap the channels, so that what stands together in rows lies together in data
    whose channels are last.

    Attributes:
        groups: The number of groups; 1 but for grouped convolutions.
        transposed: Whether the stored weight has inputs before outputs.
        shape: The stored shape.
    """

    groups: int
    transposed: bool
    shape: tuple[int, ...]

    def split(self, weight: NDArray[Any]) -> NDArray[np.float64]:
        """Return a stored weight as matrices."""
        rows = weight.T if self.transposed else np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
        return rows.reshape(self.groups, rows.shape[0] // self.groups, -1).astype(np.float64)

    def join(self, matrices: NDArray[Any]) -> NDArray[Any]:
        """Return matrices as a stored weight: the reverse of `split`."""
        rows = matrices.reshape(-1, matrices.shape[2])
        if self.transposed:
            return np.ascontiguousarray(rows.T)
        outputs, channels, *kernel = self.shape
        return np.ascontiguousarray(np.moveaxis(rows.reshape(outputs, *kernel, channels), -1, 1))


def matrix_of(node: ir.Node, weight: NDArray[Any]) -> Matrix | None:
    """Return how a layer's weight is a matrix; None where it is none (transposed convolutions, stacks of matrices)."""
    if node.op_type == "Conv":
        return Matrix(node.attributes.get_int("group", 1), False, weight.shape)
    if node.op_type == "Gemm" and weight.ndim == 2 and not node.attributes.get_int("transA", 0):
        return Matrix(1, not node.attributes.get_int("transB", 0), weight.shape)
    if node.op_type == "MatMul" and weight.ndim == 2:
        return Matrix(1, True, weight.shape)
    return None


def drawn_rows(
    node: ir.Node,
    matrix: Matrix,
    batches: Sequence[Sequence[NDArray[Any]]],
    inputs: int,
    seed: int,
    apart: bool = False,
    coarse: bool = False,
) -> tuple[list[NDArray[np.float32]], int]:
    """Return rows of inputs, (groups, rows, inputs of a group), the same rows of each of some versions of the data.

    Also returned is where the rows of the second half of the samples begin: at the end, where the halves are not to be apart.

    Args:
        node: The layer.
        matrix: Its weight.
        batches: Versions of the layer's data operand, each a list of batches.
        inputs: Inputs of a group.
        seed: Of the draw.
        apart: Whether the first half of every batch stands before all second halves; of batches of one sample, every other.
        coarse: Whether the weight has less than 8 bits.
    """
    generator = np.random.default_rng(seed)
    if coarse:
        most = min(COARSE_ROWS, MOST_NUMBERS // (matrix.groups * inputs))
        enough, wanted = COARSE_PER_INPUT * inputs, max(FEWEST_COARSE, most)
    else:
        enough, wanted = ENOUGH_PER_INPUT * inputs, min(ROWS_PER_INPUT * inputs, MANY_ROWS)
    wanted = max(min(wanted, ROOM // (matrix.groups * inputs)), enough) // max(len(batches[0]), 1) + 1
    chosen: list[tuple[NDArray[np.intp], int]] = []
    for number, values in enumerate(batches[0]):
        count, samples = rows_in(node, values), len(values)
        places = np.arange(count) if count <= wanted else np.sort(generator.choice(count, wanted, replace=False))
        first = (samples // 2 if samples > 1 else number % 2) * (count // max(samples, 1))
        chosen.append((places, int(np.searchsorted(places, first)) if apart else len(places)))
    middles, total = sum(middle for _, middle in chosen), sum(len(places) for places, _ in chosen)
    found = [np.empty((matrix.groups, total, inputs), dtype=np.float32) for _ in batches]
    for rows, version in zip(found, batches, strict=True):
        fronts, backs = 0, middles
        for values, (places, middle) in zip(version, chosen, strict=True):
            front, back = fronts + middle, backs + len(places) - middle
            if node.op_type == "Conv":
                patches = Patches.of(node, values, wanted)
                patches.put(places[:middle], rows[:, fronts:front])
                patches.put(places[middle:], rows[:, backs:back])
            else:
                every = values.reshape(-1, values.shape[-1])
                rows[0, fronts:front], rows[0, backs:back] = every[places[:middle]], every[places[middle:]]
            fronts, backs = front, back
    return found, middles


@dataclass(frozen=True, eq=False)
class Moments:
    """The second moments of a layer's rows about their means, and what those of the float model say that they should give.

    Attributes:
        covariance: E[(x̂ − E x̂)(x̂ − E x̂)ᵀ] of the rows that the quantized layer meets, (groups, inputs, inputs), float64.
        mean: E x̂, (groups, inputs).
        cross: E[(x − E x − x̂ + E x̂)(x̂ − E x̂)ᵀ], x the rows of the float model, of the same shape; None where they are
            the same rows.
        missed: E x − E x̂, (groups, inputs); None where there is no cross, or means are not taken out.
    """

    covariance: NDArray[np.float64]
    mean: NDArray[np.float64]
    cross: NDArray[np.float64] | None
    missed: NDArray[np.float64] | None = None


def moments_of(real: NDArray[np.float32] | None, made: NDArray[np.float32], centred: bool) -> Moments:
    """Return the moments of rows, (groups, rows, inputs).

    Args:
        real: The float model's rows; None where they are those of ``made``.
        made: The rows that the quantized layer meets.
        centred: Whether means are taken out, because the layer's bias makes up for them.
    """
    count = max(made.shape[1], 1)
    ones = np.ones(made.shape[1], dtype=np.float32)
    mean = (ones @ made).astype(np.float64) / count  # much faster than `numpy.mean` of so short rows
    rows = made - mean.astype(np.float32)[:, None] if centred else made
    covariance = (rows.transpose(0, 2, 1) @ rows).astype(np.float64) / count
    cross = missed = None
    if real is not None:
        difference = real - made
        if centred:
            missed = (ones @ difference).astype(np.float64) / count
            difference -= missed.astype(np.float32)[:, None]
        cross = (difference.transpose(0, 2, 1) @ rows).astype(np.float64) / count
    return Moments(covariance, mean, cross, missed)


def together(parts: Sequence[Moments], counts: Sequence[int], centred: bool) -> Moments:
    """Return the moments of rows of which those of some parts are known (Chan, Golub, LeVeque 1979, equation 2.1b).

    Args:
        parts: The moments of the parts.
        counts: How many rows each has.
        centred: Whether means were taken out.
    """
    shares = [count / sum(counts) for count in counts]

    def joined(arrays: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.sum([s * array for s, array in zip(shares, arrays, strict=True)], axis=0)
        return found

    mean, covariance = (joined([getattr(part, name) for part in parts]) for name in ("mean", "covariance"))
    crosses = [part.cross for part in parts if part.cross is not None]
    misses = [part.missed for part in parts if part.missed is not None]
    cross, missed = (joined(arrays) if arrays else None for arrays in (crosses, misses))
    for part, share in zip(parts, shares, strict=True) if centred else ():
        apart = part.mean - mean
        covariance += share * apart[:, :, None] * apart[:, None]
        if cross is not None and missed is not None and part.missed is not None:
            cross += share * (part.missed - missed)[:, :, None] * apart[:, None]
    return Moments(covariance, mean, cross, missed)


def weighted_moments(
    real: NDArray[np.float32] | None, made: NDArray[np.float32], weights: NDArray[np.float32], centred: bool
) -> Moments:
    """Return the moments of rows as each output weighs them: a group per output.

    Args:
        real: The float model's rows, (groups, rows, inputs); None where they are those of ``made``.
        made: The rows that the quantized layer meets.
        weights: How much a row counts for an output, (groups, rows, outputs), above zero.
        centred: Whether (weighted) means are taken out, because the layer's bias makes up for them.
    """
    groups, _, inputs = made.shape
    outputs = weights.shape[2]
    covariance = np.empty((groups * outputs, inputs, inputs))
    cross = np.empty_like(covariance) if real is not None else None
    means = np.empty((groups * outputs, inputs))
    for group in range(groups):
        for output in range(outputs):
            place = group * outputs + output
            weight = weights[group, :, output] / weights[group, :, output].sum(dtype=np.float64).astype(np.float32)
            means[place] = weight @ made[group]
            rows = made[group] - (means[place].astype(np.float32) if centred else np.float32(0))
            scaled = rows * weight[:, None]
            covariance[place] = scaled.T @ rows
            if real is not None and cross is not None:
                difference = real[group] - made[group]
                if centred:
                    difference -= weight @ difference
                cross[place] = difference.T @ scaled
    return Moments(covariance, means, cross)
