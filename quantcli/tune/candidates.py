"""Candidates: a model as it is, equalized, aligned, and swept, with the statistics and the tuning that go with it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration.observers import OBSERVERS, TensorStatistics
from quantcli.arithmetic.affine import IntegerType
from quantcli.masks import unresolvable
from quantcli.observation import observer_of
from quantcli.placement import place
from quantcli.plan import activation_parameters, make_plan, weight_grid
from quantcli.recipe import resolve_target
from quantcli.rules import Operand
from quantcli.tune.align import align
from quantcli.tune.centre import centre
from quantcli.tune.equalize import FEW, Equalization, Equalized, Grids, Looked, equalize
from quantcli.tune.smooth import Smoothed, smooth
from quantcli.tune.sweep import Sweep
from quantcli.tuning import UNTUNED, Moved, Tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.statistics import Statistics
    from quantcli.plan import Plan
    from quantcli.recipe import Recipe
    from quantcli.targets import Target
    from quantcli.tune.steps import Steps
    from quantcli.tune.weights import Regularization

    Feeds = dict[str, NDArray[Any]]


class Observe(Protocol):
    """Calibrates another folded model on the same data."""

    def __call__(self, model: ir.Model, channels: bool = False) -> Statistics:
        """Return what is seen of a model; of its tensors' channels, too, where that is asked for."""
        ...


# By step: how many layers or tensors it looked at, and by how many dB it lowered their error on average.
Gained = dict[str, tuple[int, float]]
# Noise falls by so much with every bit.
DB_PER_BIT = 20 * math.log10(2)


@dataclass(frozen=True, eq=False)
class Samples:
    """Calibration samples in batches.

    Attributes:
        swept: Those that sweeps run.
        judging: Those that judge.
        masks: The inputs that are masks: no images, whatever their shape.
    """

    swept: tuple[Feeds, ...]
    judging: tuple[Feeds, ...]
    masks: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model, its statistics and its tuning.

    Attributes:
        model: The folded model.
        statistics: What calibration saw of it.
        smoothed: The normalisations that were smoothed.
        tuning: What was chosen.
        equalized: What equalization did; None where it did nothing.
        regularization: With what its weights were chosen, by name.
    """

    model: ir.Model
    statistics: Statistics
    smoothed: tuple[Smoothed, ...]
    tuning: Tuning = UNTUNED
    equalized: Equalized | None = None
    regularization: Mapping[str, Regularization] = field(default_factory=dict)


def grids_of(model: ir.Model, statistics: Statistics, recipe: Recipe, bits: Mapping[str, int]) -> Grids:
    """Return what a plan would round of a model, and to what."""
    target = resolve_target(recipe)
    placement = place(model, recipe, unresolvable(model, statistics.tensors, recipe))
    activation = IntegerType(target.activation.grid)
    weights = {}
    for layer in placement.layers:
        for _, value, kind in layer.operands():
            if kind is Operand.WEIGHT:
                integer = weight_grid(target, bits.get(str(value.name)), depthwise=layer.depthwise)
                symmetric = target.weight.is_symmetric(integer.bits)
                steps = integer.qmax if symmetric else integer.qmax - integer.qmin
                weights[str(value.name)] = steps, symmetric
    symmetric = target.activation.symmetric
    steps = activation.qmax if symmetric else activation.qmax - activation.qmin
    return Grids(placement.observed(), weights, steps, symmetric, not target.weight.per_channel)


def foreseen(
    model: ir.Model,
    statistics: Statistics,
    recipe: Recipe,
    samples: Samples,
    bits: Mapping[str, int],
    looked: Looked,
) -> float:
    """Return by how many dB equalization would lower the noise, as the samples alone predict; what was met is kept."""
    grids = grids_of(model, statistics, recipe, bits)
    return Equalization(model, samples.swept, grids, samples=FEW, looked=looked).foreseen()


def equalized(
    model: ir.Model,
    statistics: Statistics,
    recipe: Recipe,
    samples: Samples,
    observe: Observe,
    tuning: Tuning,
    looked: Looked | None = None,
) -> Candidate | None:
    """Return the equalized model with statistics of its own; None where nothing changed.

    Where ranges begin at the extremes, those of the channels tell what the statistics become, exactly: a channel's factor is above
    zero. Else, and where a Clip cuts otherwise than it did, the changed model is observed.
    """
    whole = observe(model, channels=True)
    extremes = {name: seen.channels for name, seen in whole.tensors.items() if seen.channels is not None}
    grids = grids_of(model, statistics, recipe, tuning.bits)
    changed, done = equalize(model, samples.swept, grids, extremes, looked)
    if not done.layers and not done.absorbed:
        return None
    derived = done.exact and not OBSERVERS[observer_of(recipe)]
    if not derived or not done.moved.keys() & whole.tensors.keys() <= extremes.keys():
        after = observe(changed)
    else:
        tensors = dict(statistics.tensors)
        for name in done.moved.keys() & tensors.keys():
            lows, highs = (
                moved_by(done.moved[name], ends) for ends in (extremes[name].minimum, extremes[name].maximum)
            )
            seen = tensors[name]
            ends = float(lows.min()), float(highs.max())
            tensors[name] = TensorStatistics(*ends, seen.elements, seen.nan, seen.infinite, derived=True)
        after = replace(statistics, tensors=tensors)
    final, seen_after, evened = smooth(changed, after, recipe)
    return Candidate(final, seen_after, evened, replace(tuning, moved=done.moved), done)


def moved_by(what: Moved, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return what becomes of a value of each channel."""
    found: NDArray[np.float64] = values.astype(np.float64) * what.factor + what.shift
    return found


def ranges_of(plan: Plan) -> dict[str, tuple[float, float]]:
    """Return the real ranges of a plan's activations."""
    return {name: (tensor.lo[0], tensor.hi[0]) for name, tensor in plan.tensors.items() if tensor.role == "activation"}


def centred(base: Candidate, recipe: Recipe) -> tuple[Candidate, Gained]:
    """Return a candidate whose one-sided tensors are moved to both sides of zero, and what that gained."""
    ranges = ranges_of(make_plan(base.model, base.statistics, recipe, base.tuning))
    model, shifts = centre(base.model, ranges)
    count = sum(name in ranges for name in shifts)
    return moved(base, model, ranges, shifts={name: -shift for name, shift in shifts.items()}), {
        "centring": (count, DB_PER_BIT * count / max(len(ranges), 1))
    }


def aligned(base: Candidate, recipe: Recipe, free: Target) -> tuple[Candidate, Gained]:
    """Return a candidate whose tensors are scaled so that their ranges end where its grids end, and what that gained.

    Args:
        base: The candidate; its ranges are what its grids are to hold.
        recipe: What the user wants.
        free: The target with activations of any scale.
    """
    ranges = ranges_of(make_plan(base.model, base.statistics, recipe, base.tuning))
    scales = {name: float(activation_parameters(*ends, free)[0]) for name, ends in ranges.items()}
    model, done = align(base.model, scales)
    gained = {"alignment": (len(done.factors), DB_PER_BIT * done.gained)}
    return moved(base, model, ranges, factors=done.factors), gained


def moved(
    base: Candidate,
    model: ir.Model,
    ranges: Mapping[str, tuple[float, float]],
    factors: Mapping[str, float] | None = None,
    shifts: Mapping[str, float] | None = None,
) -> Candidate:
    """Return a candidate with another model, whose tensors are x·factor + shift; statistics and ranges follow."""
    factors, shifts = factors or {}, shifts or {}

    def there(name: str, value: float) -> float:
        return value * factors.get(name, 1.0) + shifts.get(name, 0.0)

    tensors = dict(base.statistics.tensors)
    for name in {*factors, *shifts} & {*tensors}:
        seen = tensors[name]
        ends = there(name, seen.minimum), there(name, seen.maximum)
        tensors[name] = TensorStatistics(*ends, seen.elements, seen.nan, seen.infinite, derived=True)
    changed = {
        name: base.tuning.moved.get(name, Moved()).then(factors.get(name, 1.0), shifts.get(name, 0.0))
        for name in {*factors, *shifts}
    }
    tuning = replace(
        base.tuning,
        ranges={name: (there(name, lo), there(name, hi)) for name, (lo, hi) in ranges.items()},
        moved={**base.tuning.moved, **changed},
    )
    return replace(base, model=model, statistics=replace(base.statistics, tensors=tensors), tuning=tuning)


def swept(
    base: Candidate,
    recipe: Recipe,
    target: Target,
    steps: Steps,
    batches: Sequence[Feeds],
    progress: Callable[[int, int], None],
    known: Mapping[str, Regularization] | None = None,
) -> tuple[Candidate, Gained]:
    """Sweep a copy of a model as for a target, and return it with the steps' gains; the regularization of weights may be known."""
    changed = base.model.clone()
    placement = place(changed, recipe, unresolvable(changed, base.statistics.tensors, recipe))
    plan = make_plan(base.model, base.statistics, recipe, base.tuning)
    ranges = ranges_of(plan)
    bits, widths = dict(base.tuning.bits), base.tuning.grids
    sweep = Sweep(changed, placement, target, ranges, bits, widths, steps, batches, known)
    tuning = sweep.run(progress)
    gains = {step: (sweep.gains.layers[step], sweep.gains.mean(step)) for step in sweep.gains.layers}
    tuning = replace(tuning, ranges={**base.tuning.ranges, **tuning.ranges}, moved=base.tuning.moved)
    return replace(base, model=changed, tuning=tuning, regularization=sweep.weights.regularization), gains
