"""What a layer's output would be before any rounding: the real value that executor and runtime both round.

From it follows whether two integers that differ may: both must be a rounding of the same real value, within the distance that the
arithmetic of each can err.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantcli.arithmetic.tables import ATTRIBUTES, FUNCTIONS
from quantcli.integer.layers import JOINS, accumulator, centred, centred_magnitudes, sums_and_counts, terms_of
from quantcli.integer.resize import resize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantcli.integer.layer import Layer

# A float32 kernel forms S_x·S_w/S_y and its product with the accumulator in at most eight roundings of 2^-24 relative each.
FLOAT32_ERROR = 2.0**-21
# λ of the bound of float sums: it fails for one sum in 10^10.
SURE = 8
# Vectorized float32 exponentials and hyperbolic tangents err by some 2^-20 of their largest value, 1.
FUNCTION_ERROR = 2.0**-18


@dataclass(frozen=True, eq=False)
class Exact:
    """The real values of an output, in integer steps, and how far off a rounding may begin.

    Attributes:
        values: y/S_y + z_y before rounding and clamping, float64.
        integer_error: What the executor's multiplier may be off, in steps.
        float_error: What a float32 kernel may be off, in steps.
    """

    values: NDArray[np.float64]
    integer_error: NDArray[np.float64]
    float_error: NDArray[np.float64]


def exact(layer: Layer, operands: list[NDArray[np.int64]]) -> Exact | None:
    """Return a layer's exact output; None where it only moves integers, which leaves nothing to round."""
    kind, operator = layer.entry.arithmetic, layer.entry.operator
    if kind == "accumulate":
        acc, axis = accumulator(layer, operands)
        real = along(layer, 0, acc.ndim, axis)
        magnitudes, _ = accumulator(layer, centred_magnitudes(layer, operands))
        found = of_terms(layer, acc * real) if layer.narrow else with_errors(layer, acc * real, magnitudes * real)
        if layer.tensors[layer.entry.inputs[0]].dtype == "uint8":
            return found  # every product and sum of 8-bit integers is exact in the runtime too
        # Of signed integers the runtime may have no kernel on this machine, and multiplies reals: of K terms the sum is off by at
        # most λ·√K·2^-24 of the magnitudes' sum but with probability 2·K·e^(−λ²/2) (Higham and Mary 2019, theorem 2.4).
        count = terms_of(layer, operands) + 4
        of_sum = magnitudes * real * (min(count, SURE * count**0.5) * 2.0**-24)
        return replace(found, float_error=found.float_error + of_sum)
    if kind == "product":
        a, b = centred(layer, operands)
        return of_terms(layer, a * b * along(layer, 0, 0, None))
    if kind == "sum" or operator in JOINS:
        output = layer.output.scale[0]
        scales = [layer.tensors[name].scale[0] / output for name in layer.entry.inputs]
        centres = [q.astype(np.float64) for q in centred(layer, operands)]
        terms = [q * scale for q, scale in zip(centres, scales, strict=True)]
        if operator in JOINS:
            return of_terms(layer, JOINS[operator](layer, terms))
        found = of_terms(layer, terms[0], -terms[1] if operator == "Sub" else terms[1])
        # QLinearAdd takes zero points off last: its terms are S_a/S_y·q_a, S_b/S_y·q_b and z_y − S_a/S_y·z_a − S_b/S_y·z_b.
        zero_points = [layer.zero_point(name) for name in layer.entry.inputs]
        parts = zip(operands, zero_points, scales, strict=True)
        whole = [(np.abs(q.astype(np.float64)) + abs(z)) * scale for q, z, scale in parts]
        last = abs(layer.zero_point(layer.entry.outputs[0])) + 1
        found = replace(found, float_error=(whole[0] + whole[1] + last) * FLOAT32_ERROR)
        if layer.entry.multipliers[-1].operand is None:
            return found
        # Where n is bounded, M0 is off by half a unit at most, which may be more than its last of all bits (`summed_fixed_point`).
        halves = [0.5 * 2.0 ** -entry.shift[0] for entry in layer.entry.multipliers]
        off = sum(np.abs(q) * half for q, half in zip(centres, halves, strict=True))
        return replace(found, integer_error=found.integer_error + off)
    if operator == "PRelu":
        x = centred(layer, operands)[0]
        return of_terms(layer, np.where(x < 0, x * along(layer, 1, x.ndim, 1), x * along(layer, 0, 0, None)))
    if kind == "rescale":
        sums, counts = sums_and_counts(layer, centred(layer, operands)[0])
        magnitude, _ = sums_and_counts(layer, np.abs(centred(layer, operands)[0]))
        factor = along(layer, 0, 0, None) / counts
        return with_errors(layer, sums * factor, magnitude * factor)
    if kind == "mean":
        sums, counts = sums_and_counts(layer, centred(layer, operands)[0])
        magnitude, _ = sums_and_counts(layer, np.abs(centred(layer, operands)[0]))
        return with_errors(layer, sums / counts, magnitude / counts)
    if kind in {"table", "softmax"}:
        return of_function(layer, operands[0])
    if operator == "Resize" and layer.attributes.get("mode", "nearest") == "linear":
        reals = resize(centred(layer, operands)[0], layer.attributes, layer.plain.get(2), layer.plain.get(3))
        return with_errors(layer, reals, np.full(reals.shape, layer.output.qmax - layer.output.qmin + 1.0))
    return None


def along(layer: Layer, entry: int, ndim: int, axis: int | None) -> NDArray[np.float64]:
    """Return a layer's real multipliers, shaped to broadcast along an axis where there are several."""
    real = np.array(layer.entry.multipliers[entry].real)
    if real.size == 1 or axis is None:
        return real.reshape(-1)[0]  # type: ignore[no-any-return]
    shape = [1] * ndim
    shape[axis] = -1
    return real.reshape(shape)


def of_terms(layer: Layer, *terms: NDArray[np.float64]) -> Exact:
    """Return the sum of terms in steps, whose errors follow their magnitudes."""
    values, magnitude = terms[0], np.abs(terms[0])
    for term in terms[1:]:
        values, magnitude = values + term, magnitude + np.abs(term)
    return with_errors(layer, values, magnitude)


def with_errors(layer: Layer, values: NDArray[np.float64], magnitude: NDArray[np.float64]) -> Exact:
    """Return values with the zero point put on, and the errors that follow from the magnitude of their terms."""
    zero_point = layer.zero_point(layer.entry.outputs[0])
    precision = 2.0 ** -(layer.bits - 1) + 2.0**-50
    return Exact(values + zero_point, magnitude * precision, (magnitude + abs(zero_point) + 1) * FLOAT32_ERROR)


def of_function(layer: Layer, q: NDArray[np.int64]) -> Exact:
    """Return an element-wise function or a softmax of real inputs, in float64."""
    x = layer.tensors[layer.entry.inputs[0]]
    reals = x.scale[0] * (q - x.zero_point[0]).astype(np.float64)
    error: float | NDArray[np.float64] = FUNCTION_ERROR
    integer = 2.0**-12 if layer.entry.table is not None else 2.0**-6
    if layer.entry.arithmetic == "softmax":
        axis = int(layer.attributes.get("axis", -1))
        exponentials = np.exp(reals - reals.max(axis=axis, keepdims=True))
        total = exponentials.sum(axis=axis, keepdims=True)
        values = exponentials / total
        # Of a quotient e / Σe both err: each e by as much as the function, and so Σe by as much per term.
        error = FUNCTION_ERROR * np.minimum((1 + values * reals.shape[axis]) / total, 1.0)
    else:
        values = FUNCTIONS[layer.entry.operator](reals, function_parameters(layer))
    steps = values / layer.output.scale[0]
    # The executor's exponentials are whole multiples of 2^-30, a softmax's 1/S_y is a whole number but for 2^-23 of it, and tables
    # are exact; gemmlowp's softmax rounds some twenty products of 31 bits, and once more to 12 integer bits in its sum. Floats err
    # as their functions do.
    return Exact(
        steps + layer.zero_point(layer.entry.outputs[0]),
        integer + np.abs(steps) * 2.0**-23,
        (np.abs(steps) + 1) * FLOAT32_ERROR + error / layer.output.scale[0],
    )


def function_parameters(layer: Layer) -> dict[str, float]:
    """Return what an element-wise function needs from its node, with ONNX's defaults."""
    if layer.entry.operator == "Clip":
        bounds = [layer.plain.get(position) for position in (1, 2)]
        low, high = (None if bound is None else float(bound.reshape(-1)[0]) for bound in bounds)
        return {"min": -np.inf if low is None else low, "max": np.inf if high is None else high}
    if layer.entry.operator == "Gelu":
        return {"tanh": float(layer.attributes.get("approximate", "none") == "tanh")}
    defaults = ATTRIBUTES.get(layer.entry.operator, {})
    return {key: float(layer.attributes.get(key, default)) for key, default in defaults.items()}
