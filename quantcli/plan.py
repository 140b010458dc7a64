"""The plan: every number of the quantized model, decided before anything is changed, as one frozen, printable value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from calibration.ranges import Grid, RangeSpec, parse_range, range_of
from quantcli.arithmetic.affine import (
    IntegerType,
    affine_parameters,
    asymmetric_scales,
    fixed_parameters,
    lowest_integers,
    power_of_two,
    power_of_two_parameters,
    quantize,
    scales_wide_enough_for_bias,
    symmetric_parameters,
    symmetric_scales,
    whole_reciprocal,
)
from quantcli.arithmetic.fixed_point import headroom_multipliers, headroom_of, signed_fixed_point, summed_fixed_point
from quantcli.bounds import activation_bounds, felt
from quantcli.errors import PlanError
from quantcli.fold import constant, unmapped
from quantcli.masks import unresolvable
from quantcli.placement import FloatLayer, PlacedLayer, Placement, place
from quantcli.recipe import resolve_target
from quantcli.rules import RULES, Arithmetic, Operand
from quantcli.tuning import UNTUNED

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.observers import TensorStatistics
    from calibration.statistics import Statistics
    from quantcli.arithmetic.blocks import Blocks
    from quantcli.recipe import Recipe
    from quantcli.targets import Target
    from quantcli.tuning import Moved, Tuning

INT32 = IntegerType("int32")


@dataclass(frozen=True)
class TensorPlan:
    """The parameters of one quantized tensor: real = scale · (q − zero_point).

    Attributes:
        name: The tensor's name in the float model.
        role: ``activation``, ``constant`` (an operand that does not change), ``weight`` or ``bias``.
        integer: The grid.
        scale: One scale, or one per channel; each is a float32 value.
        zero_point: As many zero points.
        axis: The channel axis; None for one scale.
        lo: The lowest real value of the range that was to be covered, one or per channel.
        hi: The highest.
        samples: From how many calibration samples the range was seen; 0 for constants and for ranges that an operator fixes.
        same_as: The tensor whose parameters this one shares.
        dead: The channels that hold nothing but zeros.
        blocks: The parameters of a weight in blocks, which has no others.
        moved: What the tensor is of the float model's; None for the same.
        lowest: Of a weight whose grids do not lie about zero: the lowest integer of each scale's, which has as many integers as
            `integer`. What is stored has its zero point taken off already.
    """

    name: str
    role: str
    integer: IntegerType
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None
    lo: tuple[float, ...]
    hi: tuple[float, ...]
    samples: int = 0
    same_as: str | None = None
    dead: tuple[int, ...] = ()
    blocks: Blocks | None = None
    moved: Moved | None = None
    lowest: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[int, int]:
        """The lowest and the highest integer that may be stored."""
        if not self.lowest:
            return self.integer.ends
        return min(self.lowest), max(self.lowest) + self.integer.qmax - self.integer.qmin


@dataclass(frozen=True)
class Multiplier:
    """Real multipliers as integers: M = M0 · 2^-n, one or one per output channel.

    Attributes:
        operand: The operand that it rescales; None where it belongs to the whole accumulator.
        real: The real values, computed in float64 from the float32 scales.
        multiplier: M0.
        shift: n.
    """

    operand: str | None
    real: tuple[float, ...]
    multiplier: tuple[int, ...]
    shift: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """One integer layer.

    Attributes:
        name: The node's name.
        operator: Its type.
        arithmetic: What its integers do (`quantcli.rules.Arithmetic`).
        inputs: The operands that have parameters, in order; the bias last.
        outputs: The outputs.
        absorbed: The names of the activation nodes that became the clamp.
        multipliers: How the accumulator or each operand is rescaled.
        rounding: How a product with a multiplier is rounded.
        clamp: The lowest and highest output integer; None where the output stays real.
        accumulator_scale: Where the output stays real, what its accumulator is multiplied by: float32(S_x·S_w), one or one per
            output channel; of a lookup S_w. Else None.
        why: Why it is an integer layer.
    """

    name: str
    operator: str
    arithmetic: Arithmetic
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    absorbed: tuple[str, ...]
    multipliers: tuple[Multiplier, ...]
    rounding: str
    clamp: tuple[int, int] | None
    accumulator_scale: tuple[float, ...] | None = None
    why: str = ""


@dataclass(frozen=True)
class Plan:
    """Everything that was decided.

    Attributes:
        target: The target, with the recipe's wishes laid over it.
        tensors: By name.
        layers: In graph order.
        floats: What stays float and why, in graph order.
    """

    target: Target
    tensors: dict[str, TensorPlan]
    layers: tuple[LayerPlan, ...]
    floats: tuple[FloatLayer, ...]

    @property
    def made(self) -> frozenset[str]:
        """The activations that integer layers make as integers; all others are quantized for the layers that read them."""
        return frozenset(name for layer in self.layers if layer.accumulator_scale is None for name in layer.outputs)

    @property
    def dead_channels(self) -> dict[str, tuple[int, ...]]:
        """The all-zero channels of every weight that has any."""
        return {name: tensor.dead for name, tensor in self.tensors.items() if tensor.dead}


def make_plan(model: ir.Model, statistics: Statistics, recipe: Recipe, tuning: Tuning = UNTUNED) -> Plan:
    """Decide every number.

    Args:
        model: The folded model.
        statistics: What calibration saw of it.
        recipe: What the user wants.
        tuning: What was found better than the defaults.

    Raises:
        PlanError: If nothing can be quantized, or the statistics lack a tensor.
        RecipeError, UsageError: If the recipe's target or patterns have no meaning for the model.
    """
    target = resolve_target(recipe)
    placement = place(model, recipe, unresolvable(model, statistics.tensors, recipe))
    tensors = plan_activations(placement, statistics, recipe, target, tuning)
    tensors.update(plan_weights(placement, tensors, target, tuning, width_of_stored(recipe)))
    tensors.update(plan_biases(placement, tensors))
    layers = {layer.node: plan_layer(layer, tensors, target) for layer in (*placement.layers, *placement.stored)}
    stored = {str(layer.node.name) for layer in placement.stored}
    floats = tuple(layer for layer in placement.floats if layer.name not in stored)
    return Plan(target, tensors, tuple(layers[node] for node in model.graph if node in layers), floats)


def width_of_stored(recipe: Recipe) -> int:
    """Return the width of weights that float operators read: the recipe's, or 8, however few bits a target's integer products take.

    A search widens the weights of integer layers alone, and so these are wide from the start.
    """
    return 8 if recipe.weight.bits is None or recipe.tune.max_drop is not None else recipe.weight.bits


def plan_activations(
    placement: Placement, statistics: Statistics, recipe: Recipe, target: Target, tuning: Tuning = UNTUNED
) -> dict[str, TensorPlan]:
    """Return the parameters of every activation and constant operand."""
    spec = range_spec(statistics, recipe)
    constants = {
        str(value.name): values
        for layer in placement.layers
        for _, value, kind in layer.operands()
        if kind is Operand.OWN and (values := constant(value)) is not None
    }
    by_name = {str(value.name): value for layer in placement.layers for _, value, _ in layer.operands()}
    by_name.update({str(value.name): value for layer in placement.layers for value in layer.outputs})
    tensors: dict[str, TensorPlan] = {}
    for name in dict.fromkeys(placement.owner.values()):
        role, samples = "activation", 0
        integer = IntegerType(target.activation.grid_of(tuning.grids.get(name, target.activation.width)))
        grid = Grid(integer.qmax - integer.qmin, target.activation.symmetric)
        if name in placement.fixed:
            lo, hi = placement.fixed[name]
            scale, zero_point = fixed_parameters(lo, hi, integer, target.activation.symmetric)
        else:
            if name in constants:
                role, lo, hi = "constant", float(constants[name].min()), float(constants[name].max())
            elif (seen := seen_of(by_name.get(name), statistics)) is not None:
                if name in tuning.ranges:
                    lo, hi = tuning.ranges[name]
                else:
                    lo, hi = np.clip(range_of(spec, name, seen, grid), *felt(by_name[name])).tolist()
                samples = statistics.samples
            else:
                raise PlanError(
                    f"the statistics hold nothing about tensor '{name}'",
                    "calibrate again with this recipe (--everywhere for C source), or check that the data reaches that part",
                )
            scale, zero_point = activation_parameters(lo, hi, target, integer, name in placement.shares)
        tensors[name] = TensorPlan(name, role, integer, (float(scale),), (zero_point,), None, (lo,), (hi,), samples)
    for name, source in placement.owner.items():
        if name != source:
            root = tensors[source]
            tensors[name] = TensorPlan(
                name,
                "activation",
                root.integer,
                root.scale,
                root.zero_point,
                None,
                root.lo,
                root.hi,
                root.samples,
                source,
            )
    return {name: replace(tensor, moved=tuning.moved.get(name)) for name, tensor in tensors.items()}


def activation_parameters(
    lo: float, hi: float, target: Target, integer: IntegerType | None = None, share: bool = False
) -> tuple[np.float32, int]:
    """Return scale and zero point of an activation that is to cover [lo, hi].

    Args:
        lo: The lowest value.
        hi: The highest.
        target: What the runtime can do.
        integer: The grid; None for the target's.
        share: Whether a softmax makes it, of which 1/scale is a whole number.
    """
    integer = integer or IntegerType(target.activation.grid)
    parameters = symmetric_parameters if target.activation.symmetric else affine_parameters
    scale, zero_point = parameters(lo, hi, integer)
    if target.activation.power_of_two:
        scale, zero_point = power_of_two_parameters(scale, lo, integer, target.activation.symmetric)
    return whole_reciprocal(scale) if share else scale, zero_point


def seen_of(value: ir.Value | None, statistics: Statistics) -> TensorStatistics | None:
    """Return what was seen of a tensor, or of the one whose values it holds elsewhere: their range is no narrower."""
    while value is not None and value.name not in statistics.tensors:
        producer = value.producer()
        rule = RULES.get(producer.op_type) if producer is not None and producer.domain == "" else None
        if producer is None or rule is None or rule.arithmetic is not Arithmetic.MOVE:
            return None
        value = producer.inputs[0]
    return statistics.tensors[str(value.name)] if value is not None else None


def range_spec(statistics: Statistics, recipe: Recipe) -> RangeSpec:
    """Return how ranges are computed: as the recipe says, or as the observer of the statistics is meant for."""
    meant = "minmax" if statistics.observer == "all" else statistics.observer
    return parse_range(recipe.activation.range or meant)


def plan_weights(
    placement: Placement,
    activations: dict[str, TensorPlan],
    target: Target,
    tuning: Tuning = UNTUNED,
    stored_bits: int | None = None,
) -> dict[str, TensorPlan]:
    """Return the parameters of every weight, per channel where the target and every use of it agree.

    Args:
        placement: The layers.
        activations: The parameters of what they read and make.
        target: What the runtime can do.
        tuning: What was found better than the defaults.
        stored_bits: The width of weights that no integer layer reads; None for the target's.
    """
    uses: dict[str, list[tuple[PlacedLayer, ir.Value]]] = {}
    for layer in (*placement.layers, *placement.stored):
        for _, value, kind in layer.operands():
            if kind is Operand.WEIGHT:
                uses.setdefault(str(value.name), []).append((layer, value))
    tensors = {}
    for name, users in uses.items():
        values = np.asarray(constant(users[0][1]), dtype=np.float32)
        axes = {layer.rule.weight_axis(layer.node) for layer, _ in users}
        axis = axes.pop() if len(axes) == 1 and target.weight.per_channel else None
        channels = (
            values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        )
        lo, hi = channels.min(axis=1), channels.max(axis=1)
        largest = np.maximum(-lo, hi)
        del values, channels
        unmapped(users[0][1])
        stored = all(layer.rule.arithmetic is Arithmetic.STORED for layer, _ in users)
        depthwise = all(layer.depthwise for layer, _ in users)
        integer = weight_grid(target, tuning.bits.get(name, stored_bits if stored else None), depthwise=depthwise)
        symmetric = name not in tuning.lowest if name in tuning.scales else target.weight.is_symmetric(integer.bits)
        scales = tuning.scales[name] if name in tuning.scales else widest_scales(lo, hi, integer, symmetric)
        for layer, _ in users:
            if (bias := bias_of(layer)) is not None:
                input_scale = np.float32(activations[str(layer.node.inputs[0].name)].scale[0])  # type: ignore[union-attr]
                scales = scales_wide_enough_for_bias(scales, bias, input_scale)
        if target.weight.power_of_two:
            scales = power_of_two(scales)
        lowest: Iterable[float] = ()
        if not symmetric:
            lowest = tuning.lowest.get(name, lowest_integers(lo, hi, scales, integer.qmax - integer.qmin))
        tensors[name] = TensorPlan(
            name,
            "weight",
            integer,
            tuple(float(s) for s in scales),
            (0,) * len(scales),
            axis,
            tuple(float(v) for v in lo),
            tuple(float(v) for v in hi),
            dead=tuple(int(i) for i in np.flatnonzero(largest == 0)),
            lowest=tuple(int(one) for one in lowest),
        )
    return tensors


def widest_scales(
    lo: NDArray[np.float32], hi: NDArray[np.float32], integer: IntegerType, symmetric: bool
) -> NDArray[np.float32]:
    """Return the scale of each channel whose grid covers all of its weights, lo to hi (equations 4 and 4b)."""
    return symmetric_scales(np.maximum(-lo, hi), integer) if symmetric else asymmetric_scales(lo, hi, integer)


def weight_grid(target: Target, bits: int | None = None, *, depthwise: bool = False) -> IntegerType:
    """Return the integers of a weight of so many bits; by default of as many as the target's weights have in such a layer."""
    width = target.weight.bits_of(depthwise) if bits is None else bits
    return IntegerType(f"int{width}", narrow=target.weight.is_narrow(width))


def plan_biases(placement: Placement, tensors: dict[str, TensorPlan]) -> dict[str, TensorPlan]:
    """Return the parameters of every bias: int32 at S_x·S_w (equation 8)."""
    biases = {}
    for layer in placement.layers:
        values = bias_of(layer)
        if values is None:
            continue
        x, weight = (tensors[str(value.name)] for value in layer.node.inputs[:2] if value is not None)
        scales = tuple(float(np.float32(np.float32(x.scale[0]) * np.float32(s))) for s in weight.scale)
        name = str(layer.node.inputs[2].name)  # type: ignore[union-attr]
        axis = 0 if weight.axis is not None else None
        bounds = tuple(float(v) for v in values) if axis == 0 else ()
        lo, hi = (bounds, bounds) if bounds else ((float(values.min()),), (float(values.max()),))
        biases[name] = TensorPlan(name, "bias", INT32, scales, (0,) * len(scales), axis, lo, hi)
    return biases


def plan_layer(layer: PlacedLayer, tensors: dict[str, TensorPlan], target: Target) -> LayerPlan:
    """Return a layer's multipliers and clamp."""
    inputs = tuple(str(value.name) for _, value, _ in layer.operands())
    if layer.real:
        return plan_real_layer(layer, inputs, tensors, target)
    output = tensors[str(layer.output.name)]
    rounding = target.multiplier.rounding_of(layer.node.op_type)
    scales = {name: np.array(tensors[name].scale, dtype=np.float64) for name in inputs}
    types = [tensors[name].integer.dtype.name for name in inputs]
    reals: list[tuple[str | None, NDArray[np.float64]]] = []
    if layer.rule.arithmetic in {Arithmetic.ACCUMULATE, Arithmetic.PRODUCT}:
        reals = [(None, scales[inputs[0]] * scales[inputs[1]] / output.scale[0])]
    elif layer.rule.arithmetic is Arithmetic.SUM and rounding == "double":
        a, b = (float(scales[name][0]) for name in inputs)
        first, second, last = headroom_multipliers(a, b, output.scale[0], headroom_of(*types))
        reals = [(inputs[0], np.array([first])), (inputs[1], np.array([second])), (None, np.array([last]))]
    elif layer.rule.arithmetic in {Arithmetic.SUM, Arithmetic.RESCALE}:
        reals = [(name, scales[name] / output.scale[0]) for name in inputs]
    if layer.node.op_type == "PRelu":  # below the zero point, a channel's slope besides
        slopes = np.asarray(constant(layer.node.inputs[1]), dtype=np.float64).reshape(-1)
        reals.append((None, slopes * scales[inputs[0]] / output.scale[0]))
    multiplied = layer.rule.arithmetic in {Arithmetic.ACCUMULATE, Arithmetic.PRODUCT}
    bits = target.multiplier_bits(multiplied and any(tensors[name].integer.bits > 8 for name in inputs[:2]))
    if layer.rule.arithmetic is Arithmetic.SUM and rounding != "double":
        numbers = summed_fixed_point([real for _, real in reals], bits, *types)
    else:
        numbers = [signed_fixed_point(real, bits) for _, real in reals]
    multipliers = [
        Multiplier(operand, tuple(real.tolist()), tuple(multiplier.tolist()), tuple(shift.tolist()))
        for (operand, real), (multiplier, shift) in zip(reals, numbers, strict=True)
    ]
    return LayerPlan(
        str(layer.node.name),
        layer.node.op_type,
        layer.rule.arithmetic,
        inputs,
        tuple(str(value.name) for value in layer.outputs),
        tuple(str(node.name) for node in layer.absorbed),
        tuple(multipliers),
        rounding,
        clamp_of(layer, output),
        why=layer.why,
    )


def plan_real_layer(
    layer: PlacedLayer, inputs: tuple[str, ...], tensors: dict[str, TensorPlan], target: Target
) -> LayerPlan:
    """Return a layer whose output stays real: float32(S_x·S_w) times its accumulator, or what a float operator makes."""
    scale = np.array(tensors[inputs[-1]].scale if layer.rule.arithmetic is Arithmetic.LOOKUP else (), dtype=np.float32)
    if layer.rule.arithmetic is Arithmetic.ACCUMULATE:
        scale = np.float32(tensors[inputs[0]].scale[0]) * np.array(tensors[inputs[1]].scale, dtype=np.float32)
    return LayerPlan(
        str(layer.node.name),
        layer.node.op_type,
        layer.rule.arithmetic,
        inputs,
        tuple(str(value.name) for value in layer.outputs),
        (),
        (),
        target.multiplier.rounding_of(layer.node.op_type),
        None,
        tuple(float(s) for s in scale),
        layer.why,
    )


def clamp_of(layer: PlacedLayer, output: TensorPlan) -> tuple[int, int]:
    """Return the lowest and highest output integer: the grid, narrowed by the absorbed activations (equation 12)."""
    lowest, highest = output.integer.qmin, output.integer.qmax
    for node in layer.absorbed:
        bounds = np.array(activation_bounds(node), dtype=np.float64)
        finite = np.clip(bounds, -3.0e38, 3.0e38)
        low, high = quantize(
            finite, np.array(output.scale, dtype=np.float32), np.array(output.zero_point), output.integer, None
        ).tolist()
        lowest, highest = max(lowest, low), min(highest, high)
    return lowest, highest


def bias_of(layer: PlacedLayer) -> NDArray[np.floating] | None:
    """Return the bias of a layer, one value per output channel; None where it has none."""
    for _, value, kind in layer.operands():
        if kind is Operand.BIAS:
            return np.asarray(constant(value), dtype=np.float32).reshape(-1)
    return None
