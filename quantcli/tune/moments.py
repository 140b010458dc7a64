"""Moments: what a layer's weights are multiplied with, as rows, and the second moments of those rows.

A layer that accumulates is a matrix product per group: y = W·x, with x a row of inputs (a patch, for a convolution). Everything
that a choice of weights does to the layer's output, in the mean of squares, follows from E[x·xᵀ] (Frantar et al. 2022, section 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

# Rows beyond so many per input, but so many in all if they are enough for that, change a second moment by little; rows are drawn
# evenly.
ROWS_PER_INPUT, MANY_ROWS, ENOUGH_PER_INPUT = 256, 8192, 4
# Weights of less than 8 bits follow the moments further, and gain by more: by so many where those are no more numbers than that.
COARSE_PER_INPUT, FEWEST_COARSE, COARSE_ROWS, MOST_NUMBERS = 12, 8192, 32768, 1 << 24


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
        wanted = max(FEWEST_COARSE, COARSE_PER_INPUT * inputs, most)
    else:
        wanted = max(min(ROWS_PER_INPUT * inputs, MANY_ROWS), ENOUGH_PER_INPUT * inputs)
    wanted = wanted // max(len(batches[0]), 1) + 1
    found: list[tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]] = [([], []) for _ in batches]
    for number, versions in enumerate(zip(*batches, strict=True)):
        samples, middle = len(versions[0]), 0
        places: NDArray[np.intp] | None = None
        for kept, values in zip(found, versions, strict=True):
            rows = Patches.of(node, values, wanted) if node.op_type == "Conv" else values.reshape(-1, values.shape[-1])
            if places is None:
                count = len(rows)
                places = (
                    np.arange(count) if count <= wanted else np.sort(generator.choice(count, wanted, replace=False))
                )
                first = (samples // 2 if samples > 1 else number % 2) * (count // max(samples, 1))
                middle = int(np.searchsorted(places, first)) if apart else len(places)
            taken = rows.at(places, matrix.groups) if isinstance(rows, Patches) else rows[places][None]
            kept[0].append(taken[:, :middle])
            kept[1].append(taken[:, middle:])
    middles = sum(part.shape[1] for part in found[0][0])
    return [np.asarray(np.concatenate([*a, *b], axis=1), dtype=np.float32) for a, b in found], middles


@dataclass(frozen=True, eq=False)
class Patches:
    """What a convolution's kernel meets: a row of inputs at every place of every sample.

    Attributes:
        padded: The data with its padding, seen with its channels last: (samples, spatial axes…, channels).
        kernel: The kernel's lengths.
        strides: Its strides.
        dilations: Its dilations.
    """

    padded: NDArray[Any]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, values: NDArray[Any], wanted: int) -> Patches:
        """Return those of a Conv and its data operand, which is moved so that channels lie together if many rows are wanted."""
        kernel = tuple(node.inputs[1].shape.numpy()[2:])  # type: ignore[union-attr]
        ones = [1] * len(kernel)
        strides, dilations = (
            tuple(map(int, node.attributes.get_ints(name, ones))) for name in ("strides", "dilations")
        )
        extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        begins, ends = padding(node, values.shape[2:], extents, strides)
        lengths = [b + n + e for b, n, e in zip(begins, values.shape[2:], ends, strict=True)]
        seen = np.moveaxis(np.ascontiguousarray(values), 1, -1)
        many = (
            2 * wanted * math.prod(kernel) >= len(values) * math.prod(lengths)
            and node.attributes.get_int("group", 1) == 1
        )
        if not many and not any((*begins, *ends)):
            return cls(seen, kernel, strides, dilations)
        outer = (len(values), *lengths, values.shape[1]) if many else (len(values), values.shape[1], *lengths)
        zeros = np.zeros(outer, values.dtype)
        padded = zeros if many else np.moveaxis(zeros, 1, -1)
        padded[:, *(slice(b, b + n) for b, n in zip(begins, values.shape[2:], strict=True))] = seen
        return cls(padded, kernel, strides, dilations)

    @property
    def places(self) -> tuple[int, ...]:
        """How many places there are: samples, and along each spatial axis."""
        lengths = zip(self.padded.shape[1:-1], self.kernel, self.strides, self.dilations, strict=True)
        return (len(self.padded), *((n - (k - 1) * d - 1) // s + 1 for n, k, s, d in lengths))

    def __len__(self) -> int:
        return math.prod(self.places)

    def at(self, rows: NDArray[np.intp], groups: int) -> NDArray[Any]:
        """Return some of the rows, (groups, rows, inputs of a group)."""
        places = np.unravel_index(rows, self.places)
        if groups == 1 and self.dilations[-1] == 1 and self.padded.flags.c_contiguous:
            return self.stretches()[places].reshape(1, len(rows), -1)
        *apart, channel = (step // self.padded.itemsize for step in self.padded.strides)
        begin = np.sum([p * s * far for p, s, far in zip(places, (1, *self.strides), apart, strict=True)], axis=0)
        inside = np.zeros((), np.intp)
        for length, dilation, far in zip(self.kernel, self.dilations, apart[1:], strict=True):
            inside = inside[..., None] + np.arange(length) * (dilation * far)
        within = np.arange(self.padded.shape[-1]).reshape(groups, 1, -1) * channel + inside.reshape(1, -1, 1)
        every = self.padded if self.padded.flags.c_contiguous else np.moveaxis(self.padded, -1, 1)
        found: NDArray[Any] = every.reshape(-1).take(begin[:, None] + within.reshape(groups, 1, -1))
        return found

    def stretches(self) -> NDArray[Any]:
        """Return, at every place, what lies together: all channels of the taps along the last axis; a view of the data."""
        sample, *spatial, _ = self.padded.strides
        kernel, channels = self.kernel[:-1], self.kernel[-1] * self.padded.shape[-1]
        starts = (step * far for step, far in zip(self.strides, spatial, strict=True))
        taps = (dilation * far for dilation, far in zip(self.dilations[:-1], spatial[:-1], strict=True))
        shape, strides = (*self.places, *kernel, channels), (sample, *starts, *taps, self.padded.itemsize)
        return np.lib.stride_tricks.as_strided(self.padded, shape, strides, writeable=False)


def padding(
    node: ir.Node, sizes: Sequence[int], extents: Sequence[int], strides: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return what a convolution pads at the beginning and at the end of each spatial axis (ONNX Conv, ``auto_pad``)."""
    count = len(sizes)
    how = node.attributes.get_string("auto_pad", "NOTSET")
    if how in {"SAME_UPPER", "SAME_LOWER"}:
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(sizes, extents, strides, strict=True)]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return (small, large) if how == "SAME_UPPER" else (large, small)
    pads = [int(p) for p in node.attributes.get_ints("pads", [0] * 2 * count)] if how == "NOTSET" else [0] * 2 * count
    return pads[:count], pads[count:]


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
    mean = made.mean(axis=1, dtype=np.float64)
    shift = (mean if centred else np.zeros_like(mean)).astype(np.float32)[:, None]
    rows = made - shift
    count = max(rows.shape[1], 1)
    covariance = (rows.transpose(0, 2, 1) @ rows).astype(np.float64) / count
    cross = missed = None
    if real is not None:
        difference = real - made
        if centred:
            means = difference.mean(axis=1, keepdims=True)
            difference -= means
            missed = means[:, 0].astype(np.float64)
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
