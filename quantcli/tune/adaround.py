"""Learned rounding: integers, scales and biases moved together by gradient descent, until the network gives what float gave.

After AdaRound (Nagel et al. 2020, arXiv 2004.10568), whose layers are rounded one after the other, what follows being unknown to
them. Here all layers move at once, towards the float model's outputs, from the integers that a sweep has found; a weight is a real
number that is rounded on its way forward and not on its way back (the straight-through estimator, Bengio et al. 2013, arXiv
1308.3432), and stays near the integer it began at. Scales have slopes of their own (LSQ, Esser et al. 2020, arXiv 1902.08153,
section 2.1). A few hundred samples would be learned by heart: so they are mixed with each other, images shifted and mirrored as
well, and the float model says of each mixture what it gives. A spectrogram that is mirrored is no longer one: where a sweep over
such copies has left less, they are mixed alone (a DS-CNN's 2 bits: 9.9 dB, 7.4 with shifts, 10.5 without).
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from quantcli.cost import larger_by, work_of
from quantcli.errors import PlanError
from quantcli.fold import constant
from quantcli.masks import unresolvable
from quantcli.placement import place
from quantcli.plan import make_plan
from quantcli.recipe import resolve_target
from quantcli.rules import Arithmetic, Operand
from quantcli.scores import scored_alone
from quantcli.tune.vary import varied
from quantcli.write.torch_call import Stored
from quantcli.write.torch_operators import computed, operators

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from quantcli.plan import Plan, TensorPlan
    from quantcli.recipe import Recipe
    from quantcli.tune.candidates import Candidate

    Feeds = Mapping[str, NDArray[Any]]

# Samples of a step, and the most and the fewest steps; a step takes the work of so many runs of a sample.
BATCH, STEPS, FEWEST, RUNS = 32, 300, 60, 4
# A batch is computed in parts of so many samples, beside each other.
PART = 8
# How often, and over how many samples, it is seen how far it has come.
EVERY, PROBED = 10, 64
# How many multiply-accumulates may go into all of it.
WORK = 4 * 10**12
# The rates of weights (in integers), of scales' logarithms, and of biases (in sixteenths of the range that they are added to).
RATES = {"weight": 0.01, "scale": 0.002, "bias": 0.001}
# How far an integer may move.
FURTHEST = 1.49
TINY = 1e-12


@dataclass(eq=False)
class Learned:
    """One weight that is learned.

    Attributes:
        ends: The lowest and the highest integer, in the scales' shape.
        start: The integers it begins with.
        real: What is rounded to integers.
        log: The logarithm of its scales, about those it begins with.
        scale: The scales it begins with, in the weight's shape.
    """

    ends: tuple[Any, Any]
    start: Any
    real: Any
    log: Any
    scale: Any

    def integers(self) -> Any:
        """Return the integers, with the slope of what they are rounded from."""
        low = torch.maximum(self.start - FURTHEST, self.ends[0])
        high = torch.minimum(self.start + FURTHEST, self.ends[1])
        near = torch.maximum(torch.minimum(self.real, high), low)
        return near + (torch.round(near) - near).detach()

    def scales(self) -> Any:
        """Return the scales."""
        return self.scale * torch.exp(self.log)

    def value(self) -> Any:
        """Return the weight."""
        return self.integers() * self.scales()


class Twin:
    """A graph in PyTorch, in float or as it is planned.

    Args:
        model: The graph.
        plan: What is rounded; None for nothing.
        learned: The weights that are learned, by name.
        biases: The biases that are learned, by name.
    """

    def __init__(
        self, model: ir.Model, plan: Plan | None, learned: Mapping[str, Learned], biases: Mapping[str, Added]
    ) -> None:
        self.graph, self.plan, self.learned, self.biases = model.graph, plan, learned, biases
        self.rows = operators()
        self.held = {
            value: Stored(array, torch.from_numpy(np.array(array)))
            for value in model.graph.initializers.values()
            if (array := constant(value)) is not None
        }
        self.layers = {layer.name for layer in plan.layers} if plan is not None else set()
        self.made = plan.made if plan is not None else frozenset()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Return the outputs; of a Softmax the logarithms, about their mean, as candidates are judged by."""
        values: dict[ir.Value, Any] = dict(self.held)
        for value in self.graph.inputs:
            values[value] = feeds[str(value.name)]
        for value in self.held:
            name = str(value.name)
            if name in self.learned:
                values[value] = self.learned[name].value()
            elif name in self.biases:
                values[value] = self.biases[name].value()
            elif self.plan is not None and name in self.plan.tensors and self.plan.tensors[name].role == "constant":
                values[value] = rounded(self.held[value].tensor, self.plan.tensors[name])
        on_grid: dict[ir.Value, Any] = {}
        for node in self.graph:
            made = computed(node, [self.read(node, value, values, on_grid) for value in node.inputs], self.rows)
            values.update(zip(node.outputs, made, strict=False))
        return {str(value.name): self.output(value, values, on_grid) for value in self.graph.outputs}

    def output(self, value: ir.Value, values: dict[ir.Value, Any], on_grid: dict[ir.Value, Any]) -> Any:
        """Return an output; of a Softmax the logarithms about their mean, which what it is taken of has about its own."""
        producer = value.producer()
        if producer is not None and producer.op_type in {"Softmax", "LogSoftmax"}:
            axis = producer.attributes.get_int("axis", -1)
            found = self.read(producer, producer.inputs[0], values, on_grid)
            return found - found.mean(dim=axis, keepdim=True)
        return values[value]

    def read(
        self, node: ir.Node, value: ir.Value | None, values: dict[ir.Value, Any], on_grid: dict[ir.Value, Any]
    ) -> Any:
        """Return what a node reads: rounded, where it is for this node."""
        if value is None:
            return None
        name = str(value.name)
        tensor = self.plan.tensors.get(name) if self.plan is not None else None
        if tensor is None or tensor.role != "activation" or value in self.held:
            return values[value]
        if name not in self.made and str(node.name) not in self.layers:
            return values[value]
        if value not in on_grid:
            on_grid[value] = rounded(values[value], tensor)
        return on_grid[value]


def rounded(values: Any, tensor: TensorPlan) -> Any:
    """Return values on a tensor's grid, with the slope of a clamp."""
    scale, zero = float(tensor.scale[0]), int(tensor.zero_point[0])
    low, high = (tensor.integer.qmin - zero) * scale, (tensor.integer.qmax - zero) * scale
    inside = torch.clamp(values, low, high)
    return inside + (torch.round(inside / scale) * scale - inside).detach()


@dataclass(eq=False)
class Added:
    """One bias that is learned: what it was, and how many units are added to it."""

    start: Any
    unit: float
    units: Any

    def value(self) -> Any:
        """Return the bias."""
        return self.start + self.unit * self.units


def learn(
    base: Candidate,
    float_model: ir.Model,
    recipe: Recipe,
    batches: Sequence[Feeds],
    progress: Callable[[int, int], None],
    vary: bool = True,
) -> Candidate:
    """Return a candidate whose weights, scales and biases were learned.

    Args:
        base: What is begun with: a swept candidate.
        float_model: The folded float model, of the same inputs and outputs.
        recipe: What the user wants.
        batches: Samples to learn from.
        progress: Called with the steps done and their total.
        vary: Whether images are shifted and mirrored.

    Raises:
        OutputError: If an operator has no counterpart in PyTorch.
        PlanError: If the model or its samples do not lend themselves to it.
    """
    whole = together(base.model, batches)
    steps = affordable(base.model, whole)
    plan = make_plan(base.model, base.statistics, recipe, base.tuning)
    changed = base.model.clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        learned, biases = begin(changed, plan, base, recipe)
        train(changed, plan, float_model, learned, biases, whole, recipe, steps, progress, vary)
    finally:
        torch.set_num_threads(threads)
    scales = dict(base.tuning.scales)
    for name, one in learned.items():
        flat = one.scales().detach().reshape(-1).numpy().astype(np.float32)
        held = torch.round(one.integers()).detach().numpy() * flat.reshape(one.scale.shape)
        changed.graph.initializers[name].const_value = ir.tensor(held.astype(np.float32), name=name)
        scales[name] = flat
    for name, bias in biases.items():
        changed.graph.initializers[name].const_value = ir.tensor(bias.value().detach().numpy(), name=name)
    return replace(base, model=changed, tuning=replace(base.tuning, scales=scales))


def together(model: ir.Model, batches: Sequence[Feeds]) -> dict[str, NDArray[Any]]:
    """Return all samples in one array per input.

    Raises:
        PlanError: If they have several shapes, or the model takes batches of one size only.
    """
    if any(
        value.shape is not None and (not len(value.shape) or isinstance(value.shape[0], int))
        for value in model.graph.inputs
    ):
        raise PlanError("the model takes batches of one size", "export it with a free batch axis")
    if any(len({feeds[name].shape[1:] for feeds in batches}) > 1 for name in batches[0]):
        raise PlanError("the samples have several shapes", "learn from samples of one shape")
    return {name: np.concatenate([feeds[name] for feeds in batches]) for name in batches[0]}


def affordable(model: ir.Model, whole: Mapping[str, NDArray[Any]]) -> int:
    """Return how many steps can be afforded.

    Raises:
        PlanError: If they are too few to learn anything.
    """
    work = [work_of(node).macs for node in model.graph]
    once = sum(macs or 0 for macs in work) * larger_by(model, whole)
    steps: int = min(WORK // max(once * BATCH * RUNS, 1), STEPS)
    if None in work or steps < FEWEST:
        raise PlanError(f"a step takes too much of {WORK:.0e} multiply-accumulates", "leave it out")
    return steps


def begin(model: ir.Model, plan: Plan, base: Candidate, recipe: Recipe) -> tuple[dict[str, Learned], dict[str, Added]]:
    """Return what is learned: the weights that were rounded on purpose, and the biases, of layers that alone have them."""
    learned: dict[str, Learned] = {}
    biases: dict[str, Added] = {}
    for layer in place(model, recipe, unresolvable(base.model, base.statistics.tensors, recipe)).layers:
        if layer.rule.arithmetic is not Arithmetic.ACCUMULATE:
            continue
        made = plan.tensors.get(str(layer.output.name))
        for _, value, kind in layer.operands():
            name, alone = str(value.name), len(value.uses()) == 1
            if kind is Operand.WEIGHT and name in base.tuning.scales and alone:
                learned[name] = begun(plan.tensors[name], np.asarray(constant(value)))
            elif kind is Operand.BIAS and alone:
                held = np.array(constant(value))
                span = made.hi[0] - made.lo[0] if made is not None else 16 * float(np.abs(held).max())
                biases[name] = Added(
                    torch.from_numpy(held), span / 16, torch.zeros(held.shape, dtype=torch.float32).requires_grad_()
                )
    return learned, biases


def train(
    model: ir.Model,
    plan: Plan,
    float_model: ir.Model,
    learned: Mapping[str, Learned],
    biases: Mapping[str, Added],
    whole: Mapping[str, NDArray[Any]],
    recipe: Recipe,
    steps: int,
    progress: Callable[[int, int], None],
    vary: bool,
) -> None:
    """Move everything that is learned towards the float model's outputs (Adam, at a rate that falls like half a cosine).

    Integers go to and fro, so that it ends anywhere: every few steps some mixtures that are not learned from are run, and where
    they come out best is kept. (The samples as they are would favour the beginning: the sweep has fitted them.)
    """
    generator = np.random.default_rng(recipe.calibration.seed)
    teacher, pupil = Twin(float_model, None, {}, {}), Twin(model, plan, learned, biases)
    aside = np.random.default_rng([recipe.calibration.seed, 1])
    masks = scored_alone(float_model)
    free = not resolve_target(recipe).weight.power_of_two
    groups = [
        {"params": [one.real for one in learned.values()], "lr": RATES["weight"]},
        {"params": [one.log for one in learned.values()] if free else [], "lr": RATES["scale"]},
        {"params": [one.units for one in biases.values()], "lr": RATES["bias"]},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    moved = [one for group in optimizer.param_groups for one in group["params"]]

    def noise(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Any:
        return sum(torch.square(found[name] - values).mean() / signal[name] for name, values in expected.items())

    def expected_of(feeds: Mapping[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            return teacher.run(feeds)

    def left(feeds: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
        with torch.no_grad():
            return float(noise(pupil.run(feeds), expected))

    def slopes(feeds: Mapping[str, Any]) -> Sequence[Any]:
        return torch.autograd.grad(noise(pupil.run(feeds), expected_of(feeds)), moved, materialize_grads=True)

    # Parts are of one size and summed in order, by however many threads, each of which computes with one: the same bytes.
    with ThreadPoolExecutor(min(BATCH // PART, os.cpu_count() or 1), initializer=one_thread) as workers:
        probe = [part for _ in range(PROBED // BATCH) for part in parts_of(drawn(whole, aside, masks, vary))]
        first = list(workers.map(expected_of, probe))
        powers = {name: [torch.square(one[name]).mean() for one in first] for name in first[0]}
        signal = {name: float(torch.stack(parts).mean()) + TINY for name, parts in powers.items()}
        least, best = math.inf, [one.detach().clone() for one in moved]
        for step in range(steps + 1):
            if step % EVERY == 0 or step == steps:
                found = sum(workers.map(left, probe, first))
                if found < least:
                    least, best = found, [one.detach().clone() for one in moved]
            if step == steps:
                break
            found_slopes = list(workers.map(slopes, parts_of(drawn(whole, generator, masks, vary))))
            for one, found_ones in zip(moved, zip(*found_slopes, strict=True), strict=True):
                one.grad = torch.stack(found_ones).mean(dim=0)
            optimizer.step()
            schedule.step()
            progress(step + 1, steps)
    with torch.no_grad():
        for one, values in zip(moved, best, strict=True):
            one.copy_(values)


def one_thread() -> None:
    """Let PyTorch compute with one thread in this one."""
    torch.set_num_threads(1)


def parts_of(feeds: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """Return a batch in parts of one size, as tensors; whole where it has no such parts."""
    count = len(next(iter(feeds.values())))
    size = PART if count % PART == 0 else count
    return [
        {name: torch.from_numpy(values[start : start + size]) for name, values in feeds.items()}
        for start in range(0, count, size)
    ]


def begun(tensor: TensorPlan, weight: NDArray[Any]) -> Learned:
    """Return a weight that begins at its integers."""
    shape = [1] * weight.ndim
    if tensor.axis is not None:
        shape[tensor.axis] = -1
    scale = torch.from_numpy(np.array(tensor.scale, dtype=np.float32).reshape(shape))
    start = torch.round(torch.from_numpy(np.array(weight)) / scale)
    real, log = start.clone().requires_grad_(), torch.zeros_like(scale).requires_grad_()
    lowest = torch.from_numpy(np.array(tensor.lowest or [tensor.integer.qmin], dtype=np.float32))
    low = lowest.reshape(shape if tensor.lowest else [1] * weight.ndim)
    return Learned((low, low + (tensor.integer.qmax - tensor.integer.qmin)), start, real, log, scale)


def drawn(
    whole: Mapping[str, NDArray[Any]],
    generator: np.random.Generator,
    masks: Collection[str] = (),
    vary: bool = True,
) -> dict[str, NDArray[Any]]:
    """Return a batch: samples drawn at random, images shifted and mirrored if they are to be, reals but masks mixed in pairs."""
    count = len(next(iter(whole.values())))
    size = min(BATCH, count)
    ours, others = generator.integers(0, count, size), generator.integers(0, count, size)
    part = generator.uniform(0, 1, size).astype(np.float32)
    part[generator.random(size) < 0.5] = 1.0
    found = {}
    for name, values in whole.items():
        one, other = values[ours], values[others]
        if values.dtype != np.float32 or name in masks:
            found[name] = one
            continue
        shaped = part.reshape(-1, *[1] * (values.ndim - 1))
        mixed: NDArray[np.float32] = one * shaped + other * (np.float32(1) - shaped)
        found[name] = varied(mixed, generator) if vary else mixed
    return found
