"""INTEGER_LAYERS: for every arithmetic and operator of the rule table, what its integers do (docs/arithmetic.md, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import ReportedError
from quantcli.arithmetic import gemmlowp
from quantcli.arithmetic.fixed_point import HEADROOM, multiply
from quantcli.arithmetic.rounding import divide, divide_half_away
from quantcli.integer import kernels
from quantcli.integer.resize import resize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from quantcli.sidecar import LayerEntry, MultiplierEntry, TensorEntry


class IntegerError(ReportedError):
    """The integers of a layer cannot be computed as the sidecar states them."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer, ready to run.

    Attributes:
        entry: Its entry in the sidecar.
        attributes: Its node's attributes.
        tensors: The entries of its operands and outputs, by name.
        bits: The width of the multipliers.
        plain: Its operands without parameters (shapes, axes, indices), by position; what is absent is None.
    """

    entry: LayerEntry
    attributes: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    bits: int
    plain: Mapping[int, NDArray[Any] | None]

    def zero_point(self, name: str) -> int:
        """Return the zero point of a tensor with a single one."""
        return self.tensors[name].zero_point[0]

    @property
    def output(self) -> TensorEntry:
        """The entry of the first output."""
        return self.tensors[self.entry.outputs[0]]


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
    """Return an output that stays real (equation 18): float32(S_x·S_w) times the accumulator, or the scale of what is looked up."""
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
    """Raise IntegerError where an accumulator leaves its 32 bits (48 for operands of 16)."""
    width = 32 if layer.tensors[layer.entry.inputs[0]].qmax < 1 << 8 else 48
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
    """Return how many products an accumulator of a matrix product sums, and one more for a bias."""
    transposed = layer.entry.operator == "Gemm" and layer.attributes.get("transB", 0)
    terms: int = operands[1].shape[-1 if transposed or operands[1].ndim == 1 else -2]
    return terms + (len(operands) > 2)


def product(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 13 with a single term: (a − z_a)(b − z_b)."""
    a, b = centred(layer, operands)
    return [rescaled(layer, a * b, layer.entry.multipliers[0], None) + layer.zero_point(layer.entry.outputs[0])]


def total(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 14: the sum of the rescaled operands, formed exactly and rounded once; 14a where the sum has a multiplier too."""
    if layer.entry.multipliers[-1].operand is None:
        return [headroom_sum(layer, operands)]
    shifts = [entry.shift[0] for entry in layer.entry.multipliers]
    common = max(shifts)
    acc: NDArray[np.int64] | None = None
    for position, (q, entry) in enumerate(zip(operands, layer.entry.multipliers, strict=True)):
        sign = -1 if position and layer.entry.operator == "Sub" else 1
        left = common - entry.shift[0]
        if left > 20:
            raise IntegerError("the operands' scales are more than 2^20 apart")
        term = sign * (q - layer.zero_point(str(entry.operand))) * (entry.multiplier[0] << left)
        acc = term if acc is None else acc + term
    if acc is None:
        raise IntegerError("a sum without operands")
    rounded = multiply(acc, np.array(1), np.array(common), layer.entry.rounding, layer.bits)
    return [rounded + layer.zero_point(layer.entry.outputs[0])]


def headroom_sum(layer: Layer, operands: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Equation 14a, TFLite's: operands shifted left by 20, rescaled to a common scale, added, rescaled to the output."""
    *entries, last = layer.entry.multipliers
    a, b = (
        rescaled(layer, q << HEADROOM, entry, None) for q, entry in zip(centred(layer, operands), entries, strict=True)
    )
    together = a - b if layer.entry.operator == "Sub" else a + b
    return rescaled(layer, together, last, None) + layer.zero_point(layer.entry.outputs[0])


def rescale(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 14 for one operand at a time: Concat, and means, which divide by their count in the same rounding."""
    zero_point = layer.zero_point(layer.entry.outputs[0])
    shifted = centred(layer, operands)
    if layer.entry.operator == "Concat":
        parts = [rescaled(layer, q, m, None) for q, m in zip(shifted, layer.entry.multipliers, strict=True)]
        return [np.concatenate(parts, axis=int(layer.attributes["axis"])) + zero_point]
    sums, counts = sums_and_counts(layer, shifted[0])
    entry = layer.entry.multipliers[0]
    denominator = counts << max(entry.shift[0], 0)
    if int(np.abs(sums).max(initial=0)) * entry.multiplier[0] >= 1 << 61 or int(denominator.max()) >= 1 << 61:
        raise IntegerError("a mean leaves 61 bits")
    numerator = sums * (entry.multiplier[0] << max(-entry.shift[0], 0))
    return [divide(numerator, denominator, layer.entry.rounding) + zero_point]


def mean(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Equation 14b, TFLite's average pool: the integers themselves, zero point and all; ties away from zero."""
    sums, counts = sums_and_counts(layer, operands[0])
    return [divide_half_away(sums, counts)]


def sums_and_counts(layer: Layer, x: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the sums of a mean and what each is divided by."""
    if layer.entry.operator == "AveragePool":
        return kernels.pooled_sums(x, layer.attributes)
    axes = mean_axes(layer, x.ndim)
    keep = layer.entry.operator == "GlobalAveragePool" or bool(layer.attributes.get("keepdims", 1))
    count = int(np.prod([x.shape[axis] for axis in axes]))
    return x.sum(axis=axes, keepdims=keep), np.array(count, dtype=np.int64)


def mean_axes(layer: Layer, rank: int) -> tuple[int, ...]:
    """Return the axes of a global mean or a ReduceMean, whose axes were an attribute once and are an operand now."""
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
    """Equation 17: y = table[max − x] / (S_y · Σ table[max − x]), rounded half up; S_y is a power of two.

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


def move(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[Any]]:
    """Equation 16: the same integers elsewhere."""
    return MOVES[layer.entry.operator](layer, operands[0])


def plain_list(layer: Layer, position: int, attribute: str) -> list[int] | None:
    """Return integers that an operator takes as an operand or, in older operator sets, as an attribute."""
    operand = layer.plain.get(position)
    if operand is not None:
        return [int(value) for value in operand.reshape(-1)]
    found = layer.attributes.get(attribute)
    return None if found is None else [int(value) for value in found]


def reshape(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q in its new shape; 0 keeps a size unless ``allowzero``."""
    shape = plain_list(layer, 1, "shape") or []
    if not layer.attributes.get("allowzero", 0):
        shape = [q.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return [q.reshape(shape)]


def flatten(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q as a matrix."""
    axis = int(layer.attributes.get("axis", 1)) % (q.ndim + 1)
    return [q.reshape(int(np.prod(q.shape[:axis])), -1)]


def squeeze(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q without axes of size 1."""
    axes = plain_list(layer, 1, "axes")
    return [np.squeeze(q, None if axes is None else tuple(axes))]


def unsqueeze(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q with new axes of size 1."""
    return [np.expand_dims(q, tuple(plain_list(layer, 1, "axes") or ()))]


def transpose(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q with its axes permuted."""
    return [np.transpose(q, layer.attributes.get("perm"))]


def cut(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return a slice of q."""
    starts, ends = plain_list(layer, 1, "starts") or [], plain_list(layer, 2, "ends") or []
    axes = plain_list(layer, 3, "axes") or list(range(len(starts)))
    steps = plain_list(layer, 4, "steps") or [1] * len(starts)
    chosen = [slice(None)] * q.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = q.shape[axis]
        if step > 0:
            chosen[axis] = slice(*slice(max(start, -size), max(end, -size), step).indices(size))
        else:
            first = min(start + size if start < 0 else start, size - 1)
            last = max(end + size if end < 0 else end, -1)
            chosen[axis] = slice(first, None if last < 0 else last, step)
    return [q[tuple(chosen)]]


def gather(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return the slices of q at the given indices."""
    indices = layer.plain[1]
    if indices is None:
        raise IntegerError("Gather without indices")
    return [np.take(q, indices.astype(np.int64), axis=int(layer.attributes.get("axis", 0)))]


def split(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q in parts, those that are used."""
    axis, sizes = int(layer.attributes.get("axis", 0)), plain_list(layer, 1, "split")
    if sizes is None:
        parts = int(layer.attributes.get("num_outputs") or len(layer.entry.outputs))
        step = -(-q.shape[axis] // parts)
        sizes = [min(step, q.shape[axis] - step * i) for i in range(parts)]
    return np.split(q, np.cumsum(sizes)[:-1].tolist(), axis=axis)


def pad(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q padded: with its zero point, or with its own values."""
    pads = plain_list(layer, 1, "pads") or []
    axes = [axis % q.ndim for axis in (plain_list(layer, 3, "axes") or range(q.ndim))]
    widths = [(0, 0)] * q.ndim
    for i, axis in enumerate(axes):
        widths[axis] = (pads[i], pads[i + len(axes)])
    mode = layer.attributes.get("mode", "constant")
    negative = tuple(
        slice(max(-before, 0), size - max(-after, 0)) for (before, after), size in zip(widths, q.shape, strict=True)
    )
    q, widths = q[negative], [(max(before, 0), max(after, 0)) for before, after in widths]
    if mode == "constant":
        return [np.pad(q, widths, constant_values=layer.zero_point(layer.entry.inputs[0]))]
    return [np.pad(q, widths, mode=mode)]


def depth_to_space(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q with blocks of channels spread over space."""
    n, c, h, w = q.shape
    block = int(layer.attributes["blocksize"])
    if layer.attributes.get("mode", "DCR") == "CRD":
        spread = q.reshape(n, c // block**2, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        spread = q.reshape(n, block, block, c // block**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    return [spread.reshape(n, c // block**2, h * block, w * block)]


def resized(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q resized; linear interpolation is the one move that rounds."""
    zero_point = layer.zero_point(layer.entry.inputs[0])
    reals = resize(q - zero_point, layer.attributes, layer.plain.get(2), layer.plain.get(3))
    return [np.rint(reals).astype(np.int64) + zero_point]


MOVES: dict[str, Callable[[Layer, NDArray[np.int64]], list[NDArray[Any]]]] = {
    "MaxPool": lambda layer, q: [kernels.max_pool(q, layer.attributes)],
    "Split": split,
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Slice": cut,
    "Gather": gather,
    "Pad": pad,
    "DepthToSpace": depth_to_space,
    "Resize": resized,
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
