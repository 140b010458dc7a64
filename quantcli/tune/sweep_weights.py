"""The weights of a sweep: layer by layer, scales and integers by what the layer meets, and by what it then gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from quantcli.arithmetic.affine import (
    IntegerType,
    along_axis,
    lowest_integers,
    scales_wide_enough_for_bias,
)
from quantcli.arithmetic.affine import power_of_two as to_power_of_two
from quantcli.bounds import activation_bounds
from quantcli.fold import constant
from quantcli.plan import bias_of, weight_grid, widest_scales
from quantcli.tune.bias import BIASED, within
from quantcli.tune.gain import SCALED, gain_of
from quantcli.tune.moments import drawn_rows, matrix_of, moments_of, together, weighted_moments
from quantcli.tune.weights import Met, ScaleForm, fitted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from quantcli.placement import PlacedLayer, Placement
    from quantcli.targets import Target
    from quantcli.tune.moments import Matrix
    from quantcli.tune.steps import Gains, Steps
    from quantcli.tune.weights import Regularization

    Batches = list[NDArray[Any]]

# Second moments by output are not worth it where they are more than so many numbers together.
MOST_WEIGHTED = 1 << 24


def cut_by(layer: PlacedLayer, steps: Steps) -> tuple[float, float] | None:
    """Return what a layer's activation cuts; None where it has none, or that is to be left out."""
    if not steps.activations or not layer.absorbed:
        return None
    low, high = zip(*(activation_bounds(node) for node in layer.absorbed), strict=True)
    return max(low), min(high)


class SweepWeights:
    """The weights that a sweep has chosen.

    Args:
        placement: What becomes integer.
        target: What the runtime can do.
        steps: What to do.
        bits: The widths of weights that differ from the target's, by name.
        gains: Where what steps gain is counted.
        known: The regularization of weights, by name, where that is known.
        scale_of: Gives the scale of an activation.

    Attributes:
        rounded: What each weight's integers stand for, by name.
        scales: The scales that were chosen, one or one per channel.
        lowest: The lowest integers of grids that do not lie about zero.
        regularization: With what each was chosen.
    """

    def __init__(
        self,
        placement: Placement,
        target: Target,
        steps: Steps,
        bits: Mapping[str, int],
        gains: Gains,
        known: Mapping[str, Regularization],
        scale_of: Callable[[str], np.float32],
    ) -> None:
        self.placement, self.target, self.steps, self.bits = placement, target, steps, bits
        self.gains, self.scale_of = gains, scale_of
        self.rounded: dict[str, NDArray[np.float32]] = {}
        self.scales: dict[str, NDArray[np.float32]] = {}
        self.lowest: dict[str, NDArray[np.int64]] = {}
        self.regularization: dict[str, Regularization] = dict(known)

    def choose(
        self,
        layer: PlacedLayer,
        value: ir.Value,
        real: Mapping[ir.Value, Batches],
        operands: Mapping[int, Batches | NDArray[Any]],
    ) -> None:
        """Choose a weight's scales and integers; the weight in the model becomes what they stand for.

        Args:
            layer: The layer.
            value: The weight.
            real: What the float model gives.
            operands: The layer's quantized operands, by position.
        """
        name = str(value.name)
        if name in self.rounded:  # another layer has it as well
            return
        node, weight = layer.node, np.asarray(constant(value), dtype=np.float32)
        integer = weight_grid(self.target, self.bits.get(name), depthwise=layer.depthwise)
        axes = {other.rule.weight_axis(other.node) for other in self.placement.layers if value in other.node.inputs}
        axis = axes.pop() if len(axes) == 1 and self.target.weight.per_channel else None
        channels = (
            weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        )
        extent = channels.min(axis=1), channels.max(axis=1)
        matrix = matrix_of(node, weight)
        inputs = operands.get(0)
        usable = matrix is not None and isinstance(inputs, list) and all(array.size for array in inputs)
        alone = len(value.uses()) == 1
        if matrix is None or not usable or not alone or matrix.split(weight).shape[2] > self.steps.inputs:
            self.keep(layer, value, weight, extent, axis, integer)
            return
        widest = widest_scales(*extent, integer, symmetric=True)
        if self.target.weight.power_of_two:
            widest = to_power_of_two(widest)
        self.solve(layer, value, weight, widest, integer, matrix, real[node.inputs[0]], inputs)  # type: ignore[index, arg-type]

    def keep(
        self,
        layer: PlacedLayer,
        value: ir.Value,
        weight: NDArray[np.float32],
        extent: tuple[NDArray[np.float32], NDArray[np.float32]],
        axis: int | None,
        integer: IntegerType,
    ) -> None:
        """Round a weight to nearest on its widest scales, as the plan does by itself."""
        symmetric = self.target.weight.is_symmetric(integer.bits)
        scales = self.final_scales(layer, widest_scales(*extent, integer, symmetric))
        ends: tuple[NDArray[Any] | int, NDArray[Any] | int] = integer.ends
        if not symmetric:
            steps = integer.qmax - integer.qmin
            lowest = along_axis(lowest_integers(*extent, scales, steps), weight.ndim, axis)
            ends = lowest, lowest + steps
        shaped = along_axis(scales, weight.ndim, axis)
        self.rounded[str(value.name)] = (np.clip(np.rint(weight / shaped), *ends) * shaped).astype(np.float32)

    def final_scales(self, layer: PlacedLayer, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return weight scales as the plan will have them: wide enough for the bias, and powers of two where asked."""
        bias = bias_of(layer)
        if bias is not None:
            x = str(layer.node.inputs[0].name)  # type: ignore[union-attr]
            scales = scales_wide_enough_for_bias(scales, bias, self.scale_of(x))
        return to_power_of_two(scales) if self.target.weight.power_of_two else scales

    def solve(
        self,
        layer: PlacedLayer,
        value: ir.Value,
        weight: NDArray[np.float32],
        widest: NDArray[np.float32],
        integer: IntegerType,
        matrix: Matrix,
        real: Batches,
        made: Batches,
    ) -> None:
        """Choose scales and integers by second moments."""
        node, steps, name = layer.node, self.steps, str(value.name)
        original = matrix.split(weight)
        differs = steps.compensation and any(a is not b for a, b in zip(real, made, strict=True))
        known = self.regularization.get(name)
        apart = integer.bits in steps.cross_validation and known is None
        versions = [made, real] if differs else [made]
        rows, middle = drawn_rows(node, matrix, versions, original.shape[2], steps.seed, apart, integer.bits < 8)
        met = self.met(layer, original, rows, middle)
        del rows
        form = ScaleForm(
            len(widest) == 1,
            self.target.weight.power_of_two,
            self.target.weight.is_symmetric(integer.bits),
            lambda scales: self.final_scales(layer, scales),
        )
        found = fitted(met, widest, integer, steps, form, known)
        for step, before, after in found.gains:
            self.gains.count(step, before, after)
        held = matrix.join((found.integers * found.spread[..., None]).astype(np.float32))
        value.const_value = ir.tensor(held, name=value.name)
        self.rounded[name] = held
        self.scales[name], self.regularization[name] = found.scales, found.regularization
        if found.lowest is not None:
            self.lowest[name] = found.lowest

    def met(
        self, layer: PlacedLayer, weights: NDArray[np.float64], rows: Sequence[NDArray[np.float32]], middle: int
    ) -> Met:
        """Return a layer's weights with what they meet: rows of the quantized model, and of the float one where that differs.

        Args:
            layer: The layer.
            weights: Its weights, (groups, outputs, inputs).
            rows: As `drawn_rows` gives them.
            middle: Where the second half of the samples begins; at the end where the halves are not apart.
        """
        made, real = rows[0], rows[1] if len(rows) > 1 else None
        centred = self.steps.bias and layer.node.op_type in {"Conv", "Gemm"}
        bounds = cut_by(layer, self.steps)
        if bounds is not None and weights.size * weights.shape[2] <= MOST_WEIGHTED:
            results = (made if real is None else real) @ weights.transpose(0, 2, 1).astype(np.float32)
            bias = bias_of(layer)
            if bias is not None:
                results += bias.reshape(weights.shape[0], 1, -1)
            by_output = results.transpose(1, 0, 2).reshape(results.shape[1], -1)
            counts = within(by_output, bounds).reshape(results.shape[1], *weights.shape[:2]).transpose(1, 0, 2)
            moments = weighted_moments(real, made, counts, centred)
            return Met(weights.reshape(-1, 1, weights.shape[2]), moments, made.shape[1])
        if not 0 < middle < made.shape[1]:
            return Met(weights, moments_of(real, made, centred), made.shape[1])
        parts = slice(None, middle), slice(middle, None)
        halves = tuple(moments_of(None if real is None else real[:, part], made[:, part], centred) for part in parts)
        return Met(weights, together(halves, (middle, made.shape[1] - middle), centred), made.shape[1], halves)

    def correct_gain(self, layer: PlacedLayer, weight: ir.Value, real: Batches, made: Batches) -> None:
        """Correct the gain of a layer, and its outputs in place (`quantcli.tune.gain`)."""
        node, name = layer.node, str(weight.name)
        usable = node.op_type in SCALED and name in self.scales and not self.target.weight.power_of_two
        if not usable or not all(array.size for array in real):
            return
        bias = bias_of(layer)
        gain, before, after = gain_of(real, made, self.steps.bias and node.op_type in BIASED)
        wanted = self.scales[name] * gain
        if gain == 1 or not np.array_equal(self.final_scales(layer, wanted), wanted):
            return
        self.gains.count("gain", before, after)
        self.scales[name] = wanted
        self.rounded[name] = self.rounded[name] * gain
        weight.const_value = ir.tensor(self.rounded[name], name=name)
        fixed = np.float32(0) if bias is None else (1 - gain) * along_axis(bias, real[0].ndim, 1)
        for array in made:
            np.add(np.multiply(array, gain, out=array), fixed, out=array)
