"""Precision search: the cheapest widths of the layers' weights that keep a metric within a given drop.

Every layer begins at the recipe's width, and can be raised to 8 bits and to float; where the target has weights of 16 bits, to
those in between, first with integers around it, then computing in float from stored weights; where it has activations of 16 bits
beside those of 8, to those around the layer. What a layer's width costs the
outputs is measured layer by layer (as in HAWQ, Dong et al. 2019, arXiv 1905.03696, with the noise at the outputs in
place of the Hessian's eigenvalue): the noise of a model that is wider everywhere else. Noise of different layers adds up, so steps
are ordered by how much noise they take away by what they cost, in bytes or in time (`quantcli.tune.widths`), and the shortest
beginning of that order that keeps the metric is found by bisection. Of many tries the luckiest is found, too: what bisection finds
has to keep the metric on samples as well that were held back from it, and more steps are taken until it does. Each try is a whole
tuned model, and is written down (`quantcli.tune.log`), so that a search that was cut off goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from quantcli.cost import values_of
from quantcli.errors import PlanError
from quantcli.fold import constant, lifted
from quantcli.masks import unresolvable
from quantcli.modes import float_plan, with_stored
from quantcli.placement import place
from quantcli.plan import make_plan
from quantcli.probe import model_bytes
from quantcli.quantize import quantize
from quantcli.recipe import keeping, resolve_target, with_integer_start
from quantcli.rules import Arithmetic, Operand
from quantcli.tune.candidates import Candidate, Observe
from quantcli.tune.effort import Tuned, tune, untuned
from quantcli.tune.judge import Judge
from quantcli.tune.latency import beside
from quantcli.tune.log import Attempt, Log
from quantcli.tune.smooth import smooth
from quantcli.tune.wide import OPSET
from quantcli.tune.widths import (
    AROUND,
    FLOAT,
    STORED,
    WIDE,
    WIDEST,
    Width,
    bytes_between,
    raised_by,
    seconds_between,
    steps_of,
    timed_as,
)
from quantcli.tuning import Tuning
from quantcli.write import WRITERS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.statistics import Statistics
    from quantcli.placement import Placement
    from quantcli.progress import Progress
    from quantcli.recipe import Recipe
    from quantcli.tune.candidates import Samples
    from quantcli.tune.score import Score
    from quantcli.tune.widths import Step

logger = logging.getLogger(__name__)

# A step counts as one that takes at least such a part of a run longer: what takes less is lost in the noise of timing.
LEAST_TIME = 1e-3


@dataclass(frozen=True, eq=False)
class Found:
    """What a search found.

    Attributes:
        tuned: The model and its plan.
        attempts: Everything that was tried, in order.
    """

    tuned: Tuned
    attempts: tuple[Attempt, ...]


@dataclass(eq=False)
class Search:
    """One search.

    Attributes:
        model: The folded model.
        statistics: What calibration saw of it.
        recipe: What the user wants.
        samples: Calibration samples for tuning; None where nothing is tuned.
        observe: Calibrates another model, for equalization.
        score: Says what a written model is worth, on the samples that are searched with and on those that are held back.
        progress: Called with the stage, the tries done and their total.
        log: Where tries are written down.
        key: What the tries depend on besides their widths.
        widths: What layers may be raised to, in ascending order.
        threads: Threads of ONNX Runtime, where runs are timed.
    """

    model: ir.Model
    statistics: Statistics
    recipe: Recipe
    samples: Samples | None
    observe: Observe | None
    score: Callable[[bytes], tuple[Score, Score]]
    progress: Progress
    log: Log = field(default_factory=lambda: Log(None))
    key: str = ""
    widths: tuple[Width, ...] = (WIDE, FLOAT)
    threads: int = 1

    def run(self, max_drop: float) -> Found:
        """Return the cheapest assignment whose metric drops by at most so many points.

        On the samples that are searched with, what others may lose more is allowed for (`Score.worst`).

        Raises:
            PlanError: If none does that still has an integer weight.
        """
        order = self.ordered()
        known = self.log.attempts()
        attempts: dict[int, Attempt] = {}
        last: tuple[int, Tuned] | None = None

        def tried(steps: int) -> bool:
            nonlocal last
            if steps not in attempts:
                digest = self.digest(order[:steps])
                if digest in known:
                    attempts[steps] = replace(known[digest], steps=steps)
                else:
                    tuned = self.tuned(order[:steps])
                    last = steps, tuned
                    attempts[steps] = self.attempted(order[:steps], written(tuned))
                    self.log.add_attempt(digest, attempts[steps])
                found = attempts[steps]
                logger.info(
                    "%d of %d steps: %d bytes of weights, %.2f %% (drop %+.2f ± %.2f)",
                    steps,
                    len(order),
                    found.weight_bytes,
                    found.score.quantized,
                    found.score.drop,
                    found.score.uncertainty,
                )
            self.progress("search", len(attempts), max(len(attempts), 2 + len(order).bit_length()))
            return attempts[steps].score.worst <= max_drop + 1e-9

        best = self.bisected(tried, order)
        while best is not None and attempts[best].held.drop > max_drop + 1e-9:
            found = attempts[best].held
            logger.info("%d steps: the drop is %+.2f on %d samples held back", best, found.drop, found.samples)
            best = self.further(tried, best, len(order))
        if best is None:
            tightest = min(attempts.values(), key=lambda one: max(one.score.worst, one.held.drop))
            raise PlanError(
                f"no widths keep the drop within {max_drop:g} points, with 95 % confidence and on samples held back (at best "
                f"{tightest.score.drop:+.2f} ± {tightest.score.uncertainty:.2f} over {tightest.score.samples} samples, "
                f"{tightest.held.drop:+.2f} over {tightest.held.samples})",
                "allow more, or judge on more samples (--validate)",
            )
        tuned = last[1] if last is not None and last[0] == best else self.tuned(order[:best])
        attempts[best] = replace(attempts[best], kept=True)
        return Found(tuned, tuple(attempts.values()))

    def attempted(self, steps: Sequence[Step], model: bytes) -> Attempt:
        """Return what the metric says of an assignment, and how long it runs where that matters."""
        seconds = beside(model, (), self.statistics.check_inputs, self.threads)[0] if self.timing else None
        return Attempt(len(steps), self.bytes_of(steps), *self.score(model), seconds=seconds)

    @property
    def timing(self) -> bool:
        """Whether it is time that is to be saved, not bytes."""
        return self.recipe.tune.cost == "latency"

    def bisected(self, tried: Callable[[int], bool], order: Sequence[Step]) -> int | None:
        """Return the smallest number of steps that keeps the metric, taking more steps to be no worse; None if none does."""
        count = len(order)
        stored = sum(step.width != FLOAT for step in order)
        least, most = -1, -1
        for steps in sorted({0, count // 4, count // 2, min(stored, self.most(count)), self.most(count)}):
            if tried(steps):
                most = steps
                break
            least = steps
        if most < 0:
            return None
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (least, middle) if tried(middle) else (middle, most)
        return most

    def further(self, tried: Callable[[int], bool], steps: int, count: int) -> int | None:
        """Return the next larger number of steps that keeps the metric, a quarter of what is left further on; None if none does."""
        while steps < self.most(count):
            steps = min(steps + max((count - steps) // 4, 1), self.most(count))
            if tried(steps):
                return steps
        return None

    def most(self, count: int) -> int:
        """Return how many of all steps may be taken: where the last ones make weights float, one has to stay integer."""
        return max(count - 1, 0) if FLOAT in self.widths else count

    @functools.cached_property
    def placement(self) -> Placement:
        """Which operators are integer layers."""
        return place(self.model, self.recipe, unresolvable(self.model, self.statistics.tensors, self.recipe))

    @functools.cached_property
    def begun(self) -> tuple[str, ...]:
        """The layers that stay float at the model's beginning: a model of them alone would have them in integers."""
        tensors = self.statistics.tensors
        start = with_integer_start(self.recipe)
        whole = place(self.model, start, unresolvable(self.model, tensors, start))
        integer = {layer.node for layer in self.placement.layers}
        return tuple(str(layer.node.name) for layer in whole.layers if layer.node not in integer)

    def around(self, layers: Collection[str]) -> dict[str, int]:
        """Return the width of the activations around some layers, by name, where they are wide.

        They are what the layers read and make, and what integer layers without a weight make of that.
        """
        owner, fixed = self.placement.owner, self.placement.fixed
        by_node = {layer.node: layer for layer in self.placement.layers}
        weights = {layer for layer, _, _ in self.weighted}
        pending = [layer for layer in self.placement.layers if layer.node.name in layers]
        values = [value for layer in pending for _, value, kind in layer.operands() if kind is Operand.OWN]
        seen = {layer.node for layer in pending}
        while pending:
            made = pending.pop().outputs
            values += made
            for reader in (reader for value in made for reader in value.consumers() if reader not in seen):
                seen.add(reader)
                if reader in by_node and str(reader.name) not in weights:
                    pending.append(by_node[reader])
        names = [owner[str(value.name)] for value in values if str(value.name) in owner and constant(value) is None]
        return {name: AROUND.around for name in names if name not in fixed}

    @functools.cached_property
    def weighted(self) -> list[tuple[str, str, int]]:
        """Name, weight's name and weight's elements of every layer that accumulates with a weight of its own."""
        found = []
        for layer in self.placement.layers:
            weight = next((value for _, value, kind in layer.operands() if kind is Operand.WEIGHT), None)
            if layer.rule.arithmetic is Arithmetic.ACCUMULATE and weight is not None and len(weight.uses()) == 1:
                size = weight.shape.numpy() if weight.shape is not None else ()
                found.append((str(layer.node.name), str(weight.name), math.prod(size)))
        return found

    def ordered(self) -> list[Step]:
        """Return the steps, those that take away the most noise per byte first; a layer's in the order of their widths.

        Where weights can be stored in 16 bits, those that make weights float come last: beside layers in integers they are nothing.
        So do they where activations can have 16 bits: hardware that has those need not have float.
        """
        layers = self.weighted
        judge = Judge(self.model, self.judging, self.recipe)
        wide = {weight: WIDE.bits for _, weight, _ in layers}
        base = self.candidate(wide, ())
        least, passed, spent = judge.noise(base), self.passed(), self.log.times(self.digest(()))
        steps: list[Step] = []
        for number, (layer, weight, size) in enumerate(layers):
            self.progress("sensitivity", number, len(layers))
            around = self.around([layer])
            tried = {FLOAT: self.candidate(wide, (layer,))} if len(layers) > 1 else {}
            for width in passed:
                if not width.real and width != WIDE:
                    tried[width] = self.candidate({**wide, weight: width.bits}, (), around if width == AROUND else {})
            noises = {WIDE: least, FLOAT: 0.0} | {width: judge.noise(one) for width, one in tried.items()}
            # What rounding to 16 bits leaves is too little to be seen beside the other layers: 2^-16 of that to 8 bits.
            rounded = max(least - noises.get(WIDEST, least), 0.0) / 4.0 ** (WIDEST.bits - WIDE.bits)
            noises |= {STORED: noises[FLOAT], FLOAT: noises[FLOAT] - (rounded if STORED in passed else 0.0)}
            cost = functools.partial(
                bytes_between, weights=size, around=sum(self.sizes.get(name, 0) for name in around)
            )
            if self.timing:
                times = spent.get(layer)
                if times is None or not {timed_as(width) for width in passed} <= times.keys():
                    times = self.timed(base, tried)
                    self.log.add_times(self.digest(()), layer, times)
                cost = functools.partial(seconds_between, spent=times, least=LEAST_TIME * times[WIDE])
            steps += steps_of(layer, weight, cost, passed, noises)
        last = FLOAT if {STORED, AROUND} & {*passed} else None
        return sorted(steps, key=lambda step: (step.width == last, -step.rate, step.layer, passed.index(step.width)))

    def timed(
        self, base: tuple[Candidate, Recipe], tried: Mapping[Width, tuple[Candidate, Recipe]]
    ) -> dict[Width, float]:
        """Return the seconds of a run with a layer at some widths."""
        timed = {width: one for width, one in tried.items() if width == timed_as(width)}
        models = [planned(*one) for one in (base, *timed.values())]
        seconds, more = beside(models[0], models[1:], self.statistics.check_inputs, self.threads)
        found = {width: seconds + one for width, one in zip(timed, more, strict=True)}
        return {WIDE: seconds, FLOAT: seconds, **found}

    def passed(self) -> list[Width]:
        """Return the widths that a layer passes through, from the recipe's on."""
        target = resolve_target(self.recipe).weight.bits
        wider = [width for width in self.widths if width.real or width == AROUND or width.bits > target]
        if self.with_widest is None:
            wider = [width for width in wider if width != AROUND and width.bits != WIDEST.bits]
        return [Width(target), *wider]

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """How many values a tensor has for a sample, as far as is known."""
        values = [*self.model.graph.inputs, *(value for node in self.model.graph for value in node.outputs)]
        return {str(value.name): values_of(value) or 0 for value in values}

    @functools.cached_property
    def with_widest(self) -> ir.Model | None:
        """The model in an operator set that has integers of 16 bits; None where it cannot be had."""
        found = lifted(self.model, OPSET)
        if found is None:
            logger.info("nothing is raised to %d bits", WIDEST.bits)
        return found

    def model_for(self, bits: Collection[int]) -> ir.Model:
        """Return the model that can hold integers of some widths."""
        wide = self.with_widest if WIDEST.bits in bits else None
        return self.model if wide is None else wide

    @property
    def judging(self) -> Sequence[dict[str, NDArray[Any]]]:
        """The samples that say how much noise there is."""
        return self.samples.judging if self.samples is not None else [self.statistics.check_inputs]

    def candidate(
        self, bits: dict[str, int], floats: tuple[str, ...], grids: Mapping[str, int] | None = None
    ) -> tuple[Candidate, Recipe]:
        """Return an untuned candidate of some widths of weights and activations, and the recipe with the layers that stay float."""
        recipe, grids = keeping(self.recipe, floats), grids or {}
        final, seen, evened = smooth(self.model_for({*bits.values(), *grids.values()}), self.statistics, recipe)
        return Candidate(final, seen, evened, Tuning(bits=bits, grids=grids)), recipe

    def tuned(self, steps: Sequence[Step]) -> Tuned:
        """Return the tuned model of an assignment."""
        raised = raised_by(steps)
        reals = tuple(step.layer for step in raised.values() if step.width.real)
        if {layer for layer, _, _ in self.weighted} <= {*reals}:
            reals += self.begun
        stored = [step.layer for step in raised.values() if step.width == STORED]
        bits = {weight: step.width.bits for weight, step in raised.items() if not step.width.real}
        recipe = keeping(self.recipe, reals)
        grids = self.around({step.layer for step in raised.values() if step.width == AROUND})
        model = self.model_for({*grids.values(), *(step.width.bits for step in raised.values())})
        if not self.has_integers(model, recipe):
            found = Tuned(model, float_plan(model, recipe, "the metric needs it"), (), why_not="no layer is integer")
        elif self.samples is None:
            found = untuned(model, self.statistics, recipe, "effort fast", Tuning(bits=bits, grids=grids))
        else:
            found = tune(model, self.statistics, once(recipe), self.samples, self.observe, lambda *_: None, bits, grids)
        return replace(found, plan=with_stored(found.plan, found.model, stored, STORED.bits))

    def has_integers(self, model: ir.Model, recipe: Recipe) -> bool:
        """Tell whether a recipe leaves a model any integer layer."""
        try:
            place(model, recipe, unresolvable(model, self.statistics.tensors, recipe))
        except PlanError:
            return False
        return True

    def bytes_of(self, steps: Sequence[Step]) -> int:
        """Return what the weights take at their widths."""
        raised, target = raised_by(steps), Width(resolve_target(self.recipe).weight.bits)
        widths = [(size, raised[weight].width if weight in raised else target) for _, weight, size in self.weighted]
        return math.ceil(sum(size * width.bits / 8 for size, width in widths))

    def digest(self, steps: Sequence[Step]) -> str:
        """Return what names an assignment among all tries."""
        widths = sorted((weight, *asdict(step.width).values()) for weight, step in raised_by(steps).items())
        return hashlib.sha256(json.dumps([self.key, widths]).encode()).hexdigest()


def planned(candidate: Candidate, recipe: Recipe) -> bytes:
    """Return the bytes of a candidate as it is planned."""
    plan = make_plan(candidate.model, candidate.statistics, recipe, candidate.tuning)
    return model_bytes(WRITERS["qdq"](quantize(candidate.model, plan)))


def written(tuned: Tuned) -> bytes:
    """Return a tuned model's bytes."""
    return model_bytes(WRITERS["qdq"](quantize(tuned.model, tuned.plan)))


def once(recipe: Recipe) -> Recipe:
    """Return a recipe whose tries are not swept once more over all samples unless it says so: the metric judges them."""
    if recipe.tune.refit is not None:
        return recipe
    return msgspec.structs.replace(recipe, tune=msgspec.structs.replace(recipe.tune, refit=False))
