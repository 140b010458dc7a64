"""INTEGER_LAYERS: for every arithmetic and operator of the rule table, what its integers do (docs/arithmetic.md, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.arithmetic import gemmlowp
from quantcli.arithmetic.fixed_point import headroom_of, multiply
from quantcli.arithmetic.rounding import divide, divide_half_away
from quantcli.integer import kernels
from quantcli.integer.layer import IntegerError, Layer
from quantcli.integer.moves import move

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from quantcli.sidecar import MultiplierEntry


def run_layer(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[Any]]:
    """Return a layer's outputs, as integers of their stored type, from its operands' integers.

    Raises:
        IntegerError: If an accumulator leaves int32, or a result its clamp's type.
    """
    if layer.entry.accumulator_scale is not None:
        return [real_output(layer, operands)]
    results = INTEGER_LAYERS[layer.entry.arithmetic](layer, operands)
    if layer.entry.clamp is None:
        raise IntegerError(f"layer '{layer.entry.name}' has integers without a clamp")
    low, high = layer.entry.clamp
    dtype = np.dtype(layer.output.dtype)
    if layer.entry.arithmetic in {"move", "table"}:
        return [np.asarray(result).astype(dtype) for result in results]
    return [np.clip(result, low, high).astype(dtype) for result in results]


def real_output(layer: Layer, operands: list[NDArray[np.int64]]) -> NDArray[np.float32]:
    """Return an output that stays real (equation 19): float32(S_x·S_w) times the accumulator, or the scale of what is looked up."""
    scale = np.array(layer.entry.accumulator_scale, dtype=np.float32)
    if layer.entry.arithmetic == "lookup":
        acc, axis = lookup(layer, centred(layer, operands))[0], -1
    else:
        acc, axis = accumulator(layer, operands)
        check_width(layer, acc)
    shape = [1] * acc.ndim
    if scale.size > 1:
        shape[axis] = -1
    return np.asarray(acc.astype(np.float32) * scale.reshape(shape), dtype=np.float32)


def lookup(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Return the rows of a stored table that the indices name."""
    indices = layer.plain.get(1)
    if indices is None:
        raise IntegerError(f"layer '{layer.entry.name}' has nothing to look up")
    return [np.take(operands[0], indices, axis=int(layer.attributes.get("axis", 0)))]


def check_width(layer: Layer, acc: NDArray[np.int64]) -> None:
    """Raise IntegerError where an accumulator leaves its 32 bits (48 where an operand has 16)."""
    width = 32 if layer.narrow else 48
    if np.abs(acc).max(initial=0) >= 1 << (width - 1):
        raise IntegerError(f"the accumulator leaves {width} bits")


def rescaled(layer: Layer, acc: NDArray[np.int64], entry: MultiplierEntry, axis: int | None) -> NDArray[np.int64]:
    """Return acc · M0 · 2^-n, rounded, with one multiplier or one along ``axis``."""
    multiplier, shift = np.array(entry.multiplier, dtype=np.int64), np.array(entry.shift, dtype=np.int64)
    if multiplier.size > 1 and axis is not None:
        shape = [1] * acc.ndim
        shape[axis] = -1
        multiplier, shift = multiplier.reshape(shape), shift.reshape(shape)
    return multiply(acc, multiplier, shift, layer.entry.rounding, layer.bits)


def accumulate(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 13: acc = Σ (q_x − z_x)(q_w − z_w) + q_b in int32, then M and z_y."""
    acc, axis = accumulator(layer, operands)
    check_width(layer, acc)
    return [rescaled(layer, acc, layer.entry.multipliers[0], axis) + layer.zero_point(layer.entry.outputs[0])]


def accumulator(layer: Layer, operands: list[NDArray[np.int64]]) -> tuple[NDArray[np.int64], int]:
    """Return acc of equation 13, and the axis of its output channels."""
    x, w = centred(layer, operands[:2])
    operator, axis = layer.entry.operator, 1
    if operator == "Conv":
        acc = kernels.convolve(x, w, layer.attributes)
    elif operator == "ConvTranspose":
        acc = kernels.convolve_transposed(x, w, layer.attributes)
    else:
        transposed = operator == "Gemm" and layer.attributes.get("transB", 0)
        acc, axis = kernels.multiply_matrices(x, w.T if transposed else w), -1
    if len(operands) > 2:
        shape = [1] * acc.ndim
        shape[axis] = -1
        acc = acc + operands[2].reshape(shape)
    return acc, axis


def centred(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Return the operands with their zero points taken off."""
    return [q - layer.zero_point(name) for q, name in zip(operands, layer.entry.inputs, strict=False)]


def centred_magnitudes(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Return operands whose centred values are the magnitudes of the given ones."""
    return [
        np.abs(q - layer.zero_point(name)) + layer.zero_point(name)
        for q, name in zip(operands, layer.entry.inputs, strict=False)
    ]


def terms_of(layer: Layer, operands: list[NDArray[np.int64]]) -> int:
    """Return how many products an accumulator sums at most, and one more for a bias."""
    operator, weight = layer.entry.operator, operands[1]
    if operator == "Conv":
        terms = int(weight[0].size)
    elif operator == "ConvTranspose":
        terms = int(weight[:, 0].size) // int(layer.attributes.get("group", 1))
    else:
        transposed = operator == "Gemm" and layer.attributes.get("transB", 0)
        terms = int(weight.shape[-1 if transposed or weight.ndim == 1 else -2])
    return terms + (len(operands) > 2)


def product(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 13 with a single term: (a − z_a)(b − z_b)."""
    a, b = centred(layer, operands)
    return [rescaled(layer, a * b, layer.entry.multipliers[0], None) + layer.zero_point(layer.entry.outputs[0])]


def total(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 14: the sum of the rescaled operands, formed exactly and rounded once; 14a where the sum has a multiplier too."""
    if layer.entry.multipliers[-1].operand is None:
        return [headroom_sum(layer, operands)]
    common = max(entry.shift[0] for entry in layer.entry.multipliers)
    left = [min(common - entry.shift[0], 62) for entry in layer.entry.multipliers]
    weights = [entry.multiplier[0] << shift for entry, shift in zip(layer.entry.multipliers, left, strict=True)]
    parts = centred(layer, operands)
    if sum(max(int(np.abs(q).max(initial=0)), 1) * abs(w) for q, w in zip(parts, weights, strict=True)) >= 1 << 62:
        raise ValueError("the operands' shifts are too far apart: their sum leaves 62 bits")
    first, *others = (q * weight for q, weight in zip(parts, weights, strict=True))
    acc = first - sum(others) if layer.entry.operator == "Sub" else first + sum(others)
    rounded = multiply(acc, np.array(1), np.array(common), layer.entry.rounding, layer.bits)
    return [rounded + layer.zero_point(layer.entry.outputs[0])]


def headroom_sum(layer: Layer, operands: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Equation 14a, TFLite's: operands shifted left, rescaled to a common scale, added, rescaled to the output."""
    *entries, last = layer.entry.multipliers
    headroom = headroom_of(*(layer.tensors[name].dtype for name in layer.entry.inputs))
    a, b = (
        rescaled(layer, q << headroom, entry, None) for q, entry in zip(centred(layer, operands), entries, strict=True)
    )
    together = a - b if layer.entry.operator == "Sub" else a + b
    return rescaled(layer, together, last, None) + layer.zero_point(layer.entry.outputs[0])


def rescale(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 14 for one operand at a time: what joins operands, and means, which divide by their count in the same rounding."""
    zero_point = layer.zero_point(layer.entry.outputs[0])
    shifted = centred(layer, operands)
    if layer.entry.operator in JOINS:
        parts = [rescaled(layer, q, m, None) for q, m in zip(shifted, layer.entry.multipliers, strict=True)]
        return [JOINS[layer.entry.operator](layer, parts) + zero_point]
    if layer.entry.operator == "PRelu":
        return [sloping(layer, shifted[0]) + zero_point]
    sums, counts = sums_and_counts(layer, shifted[0])
    entry = layer.entry.multipliers[0]
    denominator = counts << max(entry.shift[0], 0)
    if int(np.abs(sums).max(initial=0)) * entry.multiplier[0] >= 1 << 61 or int(denominator.max()) >= 1 << 61:
        raise IntegerError("a mean leaves 61 bits")
    numerator = sums * (entry.multiplier[0] << max(-entry.shift[0], 0))
    return [divide(numerator, denominator, layer.entry.rounding) + zero_point]


def sloping(layer: Layer, x: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what PRelu gives: below zero, the multiplier is that of the channel's slope."""
    above, below = layer.entry.multipliers
    return np.where(x < 0, rescaled(layer, x, below, 1), rescaled(layer, x, above, None))


def mean(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 14b, TFLite's average pool: the integers themselves, zero point and all; ties away from zero."""
    sums, counts = sums_and_counts(layer, operands[0])
    return [divide_half_away(sums, counts)]


def sums_and_counts(layer: Layer, x: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the sums of a mean and what each is divided by: 1 where the sum is wanted itself."""
    if layer.entry.operator == "AveragePool":
        return kernels.pooled_sums(x, layer.attributes)
    axes = mean_axes(layer, x.ndim)
    keep = layer.entry.operator == "GlobalAveragePool" or bool(layer.attributes.get("keepdims", 1))
    count = 1 if layer.entry.operator == "ReduceSum" else int(np.prod([x.shape[axis] for axis in axes]))
    return x.sum(axis=axes, keepdims=keep), np.array(count, dtype=np.int64)


def mean_axes(layer: Layer, rank: int) -> tuple[int, ...]:
    """Return the axes of a global mean, a ReduceMean or a ReduceSum, whose axes were an attribute once and are an operand now."""
    if layer.entry.operator == "GlobalAveragePool":
        return tuple(range(2, rank))
    operand = layer.plain.get(1)
    axes = operand.tolist() if operand is not None else layer.attributes.get("axes")
    if not axes:
        return () if layer.attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(axis % rank for axis in axes)


def look_up(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[Any]]:
    """Equation 15: y = table[x − qmin]."""
    table = np.array(layer.entry.table, dtype=np.int64)
    return [table[operands[0] - layer.tensors[layer.entry.inputs[0]].qmin]]


def softmax(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 17: y = table[max − x] / (S_y · Σ table[max − x]), rounded half up; 1/S_y is a whole number.

    Without a table, equation 18: gemmlowp's fixed-point softmax, to 8 bits.
    """
    axis = int(layer.attributes.get("axis", -1))
    if layer.entry.table is None:
        found = gemmlowp.softmax(operands[0], layer.tensors[layer.entry.inputs[0]].scale[0], axis)
        return [found + layer.zero_point(layer.entry.outputs[0])]
    table = np.array(layer.entry.table, dtype=np.int64)
    x = operands[0]
    exponentials = table[x.max(axis=axis, keepdims=True) - x]
    steps = round(1.0 / layer.output.scale[0])
    quotient = divide(exponentials * steps, exponentials.sum(axis=axis, keepdims=True), "single")
    return [quotient + layer.zero_point(layer.entry.outputs[0])]


def concatenated(layer: Layer, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return arrays one behind the other."""
    return np.concatenate(parts, axis=int(layer.attributes["axis"]))


def selected(layer: Layer, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return of two arrays what a condition chooses."""
    return np.where(np.asarray(layer.plain[0]), parts[0], parts[1])


# Operators that put rescaled operands together without computing with them. Rounding keeps the order of reals, so Max and Min do.
JOINS: dict[str, Callable[[Layer, Sequence[NDArray[Any]]], NDArray[Any]]] = {
    "Concat": concatenated,
    "Where": selected,
    "Max": lambda _, parts: np.maximum(*parts),
    "Min": lambda _, parts: np.minimum(*parts),
}

INTEGER_LAYERS: dict[str, Callable[[Layer, list[NDArray[np.int64]]], list[NDArray[Any]]]] = {
    "lookup": lookup,
    "accumulate": accumulate,
    "product": product,
    "sum": total,
    "mean": mean,
    "rescale": rescale,
    "table": look_up,
    "softmax": softmax,
    "move": move,
}
