"""The sweep: a model run node by node, in float and quantized beside it, while each layer's parameters are chosen.

Every choice is made with what the quantized layers before really give, and with what the float model gives at the same place. So
errors are met where they arise and do not add up (Nagel et al. 2019, section 4.2).
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from calibration.errors import RunError
from calibration.hooks.onnxruntime import Runner
from quantcli.arithmetic.affine import IntegerType, fixed_parameters
from quantcli.bounds import activation_bounds, cut, felt
from quantcli.fold import constant
from quantcli.island import captured, single_node
from quantcli.plan import activation_parameters
from quantcli.probe import runnable
from quantcli.rules import Arithmetic, Operand
from quantcli.tune.bias import BIASED, biased, corrected
from quantcli.tune.moments import matrix_of
from quantcli.tune.outputs import OLDEST_OPSET, RANKED, Ahead, Channels, Expected, range_for_outputs
from quantcli.tune.ranges import ENOUGH, ENOUGH_COARSE, Grid, best_range, look
from quantcli.tune.steps import Gains, Steps
from quantcli.tune.sweep_weights import SweepWeights, cut_by
from quantcli.tuning import Tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from quantcli.placement import PlacedLayer, Placement
    from quantcli.targets import Target
    from quantcli.tune.weights import Regularization

    Batches = list[NDArray[Any]]

logger = logging.getLogger(__name__)


class Sweep:
    """One run through a model.

    Args:
        model: The folded model; weights and biases are changed in it.
        placement: What becomes integer.
        target: What the runtime can do.
        ranges: The range of every activation that has one of its own, as calibration gives it.
        bits: The widths of weights that differ from the target's, by name.
        widths: The widths of activations' grids that differ from the target's, by name.
        steps: What to do.
        feeds: Batches of samples.
        known: The regularization of weights, by name, where that is known.
    """

    def __init__(
        self,
        model: ir.Model,
        placement: Placement,
        target: Target,
        ranges: dict[str, tuple[float, float]],
        bits: dict[str, int],
        widths: Mapping[str, int],
        steps: Steps,
        feeds: Sequence[dict[str, NDArray[Any]]],
        known: Mapping[str, Regularization] | None = None,
    ) -> None:
        self.model, self.placement, self.target, self.steps = model, placement, target, steps
        self.ranges, self.bits, self.widths, self.count = ranges, bits, widths, len(feeds)
        self.layers = {layer.node: layer for layer in placement.layers}
        self.absorbed = {node for layer in placement.layers for node in layer.absorbed}
        self.real: dict[ir.Value, Batches] = {}
        self.made: dict[ir.Value, Batches] = {}
        self.grids: dict[str, Grid] = {}
        self.integers: set[str] = set()
        self.chosen: dict[str, tuple[float, float]] = {}
        self.gains = Gains()
        self.weights = SweepWeights(
            placement, target, steps, bits, self.gains, known or {}, lambda name: self.grid(name, None).scale
        )
        self.done: set[ir.Node] = set()
        self.expected: list[Expected] = []
        self.protos: dict[ir.Node, Any] = {}
        if steps.ranges and steps.outputs and model.opset_imports.get("", 0) >= OLDEST_OPSET:
            runner = Runner(runnable(model), what="the folded model")
            self.expected = [Expected.of(runner.run(batch)) for batch in feeds[: steps.outputs]]
        self.left = Counter(v for node in model.graph for v in {*node.inputs, *captured(node)} if v is not None)
        self.left.update(model.graph.outputs)
        for value in model.graph.inputs:
            if value.name in feeds[0]:
                self.real[value] = self.made[value] = [batch[str(value.name)] for batch in feeds]

    def run(self, progress: Callable[[int, int], None] | None = None) -> Tuning:
        """Go through the model once."""
        nodes = list(self.model.graph)
        for number, node in enumerate(nodes):
            if node not in self.absorbed:
                layer = self.layers.get(node)
                if layer is None:
                    self.pass_node(node)
                else:
                    self.pass_layer(layer)
            self.done.add(node)
            for value in {*node.inputs, *captured(node)}:
                if value is not None:
                    self.release(value)
            if progress is not None:
                progress(number + 1, len(nodes))

        return Tuning(self.chosen, self.weights.scales, self.weights.lowest, self.bits, self.widths)

    def release(self, value: ir.Value) -> None:
        """Let a tensor go once its last reader is through."""
        self.left[value] -= 1
        if self.left[value] <= 0:
            self.real.pop(value, None)
            self.made.pop(value, None)

    def given(self, side: dict[ir.Value, Batches], value: ir.Value | None, batch: int) -> NDArray[Any] | None:
        """Return a value's array in a batch."""
        if value is None:
            return None
        if value in side:
            return side[value][batch]
        return constant(value)

    def pass_node(self, node: ir.Node) -> None:
        """Run a node that stays float on both sides; once, where both are alike so far."""
        values = [*node.inputs, *captured(node)]
        runs: dict[tuple[str, ...], Callable[..., list[NDArray[Any]]]] = {}
        same = all(v is None or v not in self.real or self.real[v] is self.made[v] for v in values)
        results: list[list[Batches]] = []
        for side in (self.real,) if same else (self.real, self.made):
            batches: list[Batches] = []
            for batch in range(self.count):
                arrays = [self.given(side, value, batch) for value in values]
                batches.append(run_cached(runs, node, arrays, self.model))
            results.append([list(column) for column in zip(*batches, strict=True)])
        outputs = [value for value in node.outputs if value.name]
        for position, value in enumerate(outputs):
            self.real[value] = results[0][position]
            self.made[value] = results[-1][position]

    @functools.cached_property
    def given_out(self) -> set[str]:
        """The activations whose values the model gives out, in this shape or another: their ends are not cut."""
        names = [str(value.name) for value in self.model.graph.outputs]
        return {*names, *(self.placement.owner[name] for name in names if name in self.placement.owner)}

    def grid(self, name: str, value: ir.Value | None) -> Grid:
        """Return the grid of an activation; its range is chosen where that has not been done."""
        owner = self.placement.owner[name]
        if owner not in self.grids:
            if owner in self.placement.fixed:
                integer, ends = self.integer_of(owner), self.placement.fixed[owner]
                self.grids[owner] = Grid(*fixed_parameters(*ends, integer, self.target.activation.symmetric), integer)
            else:
                ends = self.range_of(owner, value if owner == name else None)
                self.grids[owner] = self.grid_of(owner, *ends)
        return self.grids[owner]

    def range_of(self, name: str, value: ir.Value | None) -> tuple[float, float]:
        """Return an activation's range: the best, where there are values to judge by."""
        held = constant(value)
        if held is not None:
            return float(held.min()), float(held.max())
        lo, hi = self.ranges[name]
        lo, hi = min(lo, 0.0), max(hi, 0.0)
        judged = value is not None and value in self.made and lo != hi and name not in self.given_out
        if not self.steps.ranges or not judged or value is None or not self.accumulated(value):
            return lo, hi
        real, made = self.real[value], self.made[value]
        if made[0].dtype != np.float32 or not all(array.size for array in made):
            return lo, hi
        grid_of = functools.partial(self.grid_of, name)
        found = self.by_outputs(value, (lo, hi), grid_of) if self.expected else None
        if found is None:
            weights, axis = self.importance(value)
            ends = felt(value)
            real, made = ([cut(array, ends) for array in side] for side in (real, made))
            looked = look(real, made, weights, axis, self.steps.seed)
            more = (0.5,) if self.target.activation.power_of_two else ()
            enough = ENOUGH_COARSE if self.target.weights_are_coarser else ENOUGH
            found = best_range(looked, lo, hi, self.target.activation.symmetric, grid_of, more, enough)
        best, before, after = found
        self.gains.count("ranges", before, after)
        if best != (lo, hi):
            self.chosen[name] = best
        return best

    def by_outputs(
        self, value: ir.Value, ends: tuple[float, float], grid_of: Callable[[float, float], Grid]
    ) -> tuple[tuple[float, float], float, float] | None:
        """Return the range that leaves the model's outputs least noise, and the noise of the ends and of it.

        None where the rest of the model does not run by itself.
        """
        count = len(self.expected)
        real, made = self.real[value][:count], self.made[value][:count]
        weights, axis = self.importance(value)
        known = weights is not None or made[0].ndim != 3  # of three axes, the last or the second one are channels
        channels = Channels.of(real, made, axis) if known else None
        stride = max(1, sum(array.size for array in real) // RANKED) | 1
        every = np.concatenate([array.reshape(-1)[::stride] for array in real])
        try:
            ahead = Ahead(self.model, self.done, value, self.made, self.expected, self.protos)
            return range_for_outputs(ahead, every, channels, ends, self.target.activation.symmetric, grid_of)
        except RunError as error:
            logger.debug("the range of '%s' is judged at its readers: %s", value.name, error)
            return None

    def integer_of(self, owner: str) -> IntegerType:
        """Return the integers of an activation."""
        return IntegerType(self.target.activation.grid_of(self.widths.get(owner, self.target.activation.width)))

    def grid_of(self, name: str, low: float, high: float) -> Grid:
        """Return the grid of an activation for a range."""
        integer, share = self.integer_of(name), name in self.placement.shares
        scale, zero_point = activation_parameters(low, high, self.target, integer, share)
        return Grid(scale, zero_point, integer)

    def accumulated(self, value: ir.Value) -> bool:
        """Tell whether some layer behind a tensor accumulates: what the model gives out is not clipped for its mean error."""
        pending, seen = [value], {value}
        while pending:
            for user in pending.pop().consumers():
                layer = self.layers.get(user)
                if layer is not None and layer.rule.arithmetic is Arithmetic.ACCUMULATE:
                    return True
                fresh = [output for output in user.outputs if output not in seen]
                seen.update(fresh)
                pending.extend(fresh)
        return False

    def importance(self, value: ir.Value) -> tuple[NDArray[np.float64] | None, int]:
        """Return how much an error in each channel of a tensor counts for the layers that read it, and the channel axis."""
        total: NDArray[np.float64] | None = None
        axis = 1
        for user in value.consumers():
            layer = self.layers.get(user)
            if layer is None or layer.rule.arithmetic is not Arithmetic.ACCUMULATE or user.inputs[0] is not value:
                return None, 1
            weight = constant(user.inputs[1])
            matrix = matrix_of(user, weight) if weight is not None else None
            if weight is None or matrix is None:
                return None, 1
            energy = np.square(matrix.split(weight)).sum(axis=1)  # groups, inputs
            if user.op_type == "Conv":
                energy = energy.reshape(matrix.groups, -1, weight.shape[1]).sum(axis=1).reshape(-1)
            else:
                energy, axis = energy.reshape(-1), self.made[value][0].ndim - 1
            if len(energy) != self.made[value][0].shape[axis] or (total is not None and len(total) != len(energy)):
                return None, 1
            total = energy if total is None else total + energy
        if total is not None and total.mean() > 0:
            total = total / total.mean()
        return total, axis

    def operand(self, value: ir.Value) -> Batches | NDArray[Any]:
        """Return an activation, or a constant on a grid of its own, as the quantized layer gets it."""
        held = constant(value)
        grid = self.grid(str(value.name), value)
        if held is not None:
            return grid.round(held.astype(np.float32))
        if str(value.name) in self.integers:
            return self.made[value]
        return [grid.round(array) for array in self.made[value]]

    def pass_layer(self, layer: PlacedLayer) -> None:
        """Choose an integer layer's parameters, and run it on both sides."""
        node = layer.node
        kinds = {position: (value, kind) for position, value, kind in layer.operands()}
        operands: dict[int, Batches | NDArray[Any]] = {
            position: self.operand(value) for position, (value, kind) in kinds.items() if kind is Operand.OWN
        }
        fixed = (1,) if node.op_type == "Conv" and constant(node.inputs[1]) is not None else ()
        shared: dict[tuple[str, ...], Callable[..., list[NDArray[Any]]]] = {}

        def run(side: dict[ir.Value, Batches], replaced: dict[int, Batches | NDArray[Any]]) -> list[Batches]:
            batches, runs = [], {} if fixed else shared
            for batch in range(self.count):
                arrays = [self.given(side, value, batch) for value in [*node.inputs, *captured(node)]]
                for position, operand in replaced.items():
                    arrays[position] = operand[batch] if isinstance(operand, list) else operand
                batches.append(run_cached(runs, node, arrays, self.model, fixed))
            return [list(column) for column in zip(*batches, strict=True)]

        real = run(self.real, {})
        weight = next((value for value, kind in kinds.values() if kind is Operand.WEIGHT), None)
        if weight is not None:
            self.weights.choose(layer, weight, self.real, operands)
            operands[1 if node.inputs[1] is weight else 0] = self.weights.rounded[str(weight.name)]
        made = run(self.made, operands)
        if weight is not None and self.steps.gain and self.is_last(layer):
            self.weights.correct_gain(layer, weight, real[0], made[0])
        if weight is not None and self.steps.bias:
            made[0] = self.correct_bias(layer, real[0], made[0])
        outputs = [value for value in node.outputs if value.name]
        for position, value in enumerate(outputs):
            self.real[value], self.made[value] = real[position], made[position]
        for follower in layer.absorbed:
            self.clamp(follower)
        self.done.update((node, *layer.absorbed))
        if layer.real:
            return
        for value in layer.outputs:
            if self.made[value][0].dtype != np.float32:
                continue
            grid = self.grid(str(value.name), value)
            mine = self.made[value] is not self.real[value]
            self.made[value] = [grid.round(array, array if mine else None) for array in self.made[value]]
            self.integers.add(str(value.name))

    def clamp(self, node: ir.Node) -> None:
        """Clamp what a layer gives by the Relu or Clip that it absorbs, in its own arrays: nobody else reads them."""
        before, after = node.inputs[0], node.outputs[0]
        if before is None or before not in self.real or any(a.dtype != np.float32 for a in self.real[before]):
            self.pass_node(node)
            return
        low, high = (np.float32(bound) for bound in activation_bounds(node))
        for side in (self.real, self.made):
            for array in side[before]:
                np.clip(array, low, high, out=array)  # much faster than `numpy.maximum` with one number
            side[after] = side[before]

    def is_last(self, layer: PlacedLayer) -> bool:
        """Tell whether nothing accumulates behind a layer, and no activation cuts what it gives."""
        return not layer.absorbed and not any(self.accumulated(value) for value in layer.outputs)

    def correct_bias(self, layer: PlacedLayer, real: Batches, made: Batches) -> Batches:
        """Correct a layer's bias, and return its outputs with the new one, in the same arrays."""
        node = layer.node
        bias = biased(node, real[0].shape[1], self.model.graph) if node.op_type in BIASED else None
        if bias is None or not all(array.size for array in real):
            return made
        found = corrected(bias, real, made, cut_by(layer, self.steps))
        change = (found - bias).reshape(-1, *[1] * (real[0].ndim - 2))
        before = squared(made[0], real[0])
        for array in made:
            np.add(array, change, out=array)
        self.gains.count("bias", before, squared(made[0], real[0]))
        value = node.inputs[2]
        assert value is not None  # noqa: S101 - `biased` has seen to it
        value.const_value = ir.tensor(found, name=value.name)
        value.shape = ir.Shape(found.shape)
        return made


def squared(made: NDArray[np.float32], real: NDArray[np.float32]) -> float:
    """Return the sum of the squares of a difference: sample by sample, since a sample's may stay in the caches."""
    return sum(float(np.vdot(one, one)) for one in map(np.subtract, made, real))


def run_cached(
    runs: dict[tuple[str, ...], Callable[..., list[NDArray[Any]]]],
    node: ir.Node,
    arrays: list[NDArray[Any] | None],
    model: ir.Model,
    fixed: tuple[int, ...] = (),
) -> list[NDArray[Any]]:
    """Run one node by itself, with a session per kind of its inputs."""
    key = tuple("" if array is None else f"{array.dtype}{array.ndim}" for array in arrays)
    if key not in runs:
        runs[key] = single_node(node, arrays, model, fixed)
    return runs[key](arrays)
