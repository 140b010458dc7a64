"""Precision search: the cheapest widths of the layers' weights that keep a metric within a given drop.

Every layer begins at the recipe's width, and can be raised to 8 bits and to float; where the target has weights of 16 bits, to
those in between, first with integers around it, then computing in float from stored weights; where it has activations of 16 bits
beside those of 8, to those around the layer. What a layer's width costs the
outputs is measured layer by layer (as in HAWQ, Dong et al. 2019, arXiv 1905.03696, with the noise at the outputs in
place of the Hessian's eigenvalue): the noise of a model that is wider everywhere else. Noise of different layers adds up, so steps
are ordered by how much noise they take away per byte that they cost, and the shortest beginning of that order that keeps the metric
is found by bisection. Of many tries the luckiest is found, too: what bisection finds has to keep the metric on samples as well that
were held back from it, and more steps are taken until it does. Each try is a whole tuned model, and is written down, so that a
search that was cut off goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from quantcli.cost import values_of
from quantcli.errors import PlanError
from quantcli.fold import constant, lifted
from quantcli.modes import float_plan, with_stored
from quantcli.placement import place
from quantcli.plan import unresolvable
from quantcli.probe import model_bytes
from quantcli.quantize import quantize
from quantcli.recipe import keeping, resolve_target
from quantcli.rules import Arithmetic, Operand
from quantcli.tune.candidates import Candidate, Observe
from quantcli.tune.effort import Judge, Tuned, tune, untuned
from quantcli.tune.score import Score  # noqa: TC001 - msgspec reads the types of an Attempt
from quantcli.tune.smooth import smooth
from quantcli.tune.wide import OPSET, WIDE_BITS
from quantcli.tuning import Tuning
from quantcli.write import WRITERS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.statistics import Statistics
    from quantcli.placement import Placement
    from quantcli.progress import Progress
    from quantcli.recipe import Recipe
    from quantcli.tune.candidates import Samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Width:
    """What a layer may be raised to.

    Attributes:
        bits: The bits of its weight; 32 for float32.
        real: Whether it computes in float.
        around: The bits of the activations around it (`Search.around`), where the target has several.
    """

    bits: int
    real: bool = False
    around: int = 8


WIDE, WIDEST, STORED, FLOAT = Width(8), Width(16), Width(16, real=True), Width(32, real=True)
AROUND = Width(8, around=WIDE_BITS)


@dataclass(frozen=True)
class Step:
    """One layer made wider.

    Attributes:
        layer: Its name.
        weight: Its weight's name.
        width: Its width then.
        noise: By how much it lowers the outputs' noise, as a part of their signal.
        cost: By how many bytes its weight grows, and the activations around it for a sample; of a layer that is to compute in
            float, as if its weight became float.
    """

    layer: str
    weight: str
    width: Width
    noise: float
    cost: float


@dataclass(frozen=True)
class Attempt:
    """One assignment that was tried.

    Attributes:
        steps: How many steps of the order it takes.
        weight_bytes: What its weights take, at their widths.
        score: What the metric says of it on the samples that are searched with.
        held: What it says on those that are held back.
        kept: Whether it is what is written.
    """

    steps: int
    weight_bytes: int
    score: Score
    held: Score
    kept: bool = False


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
        log: Where tries are written down; None for nowhere.
        key: What the tries depend on besides their widths.
        widths: What layers may be raised to, in ascending order.
    """

    model: ir.Model
    statistics: Statistics
    recipe: Recipe
    samples: Samples | None
    observe: Observe | None
    score: Callable[[bytes], tuple[Score, Score]]
    progress: Progress
    log: Path | None = None
    key: str = ""
    widths: tuple[Width, ...] = (WIDE, FLOAT)

    def run(self, max_drop: float) -> Found:
        """Return the cheapest assignment whose metric drops by at most so many points.

        On the samples that are searched with, what others may lose more is allowed for (`Score.worst`).

        Raises:
            PlanError: If none does that still has an integer weight.
        """
        order = self.ordered()
        known = self.remembered()
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
                    attempts[steps] = Attempt(steps, self.bytes_of(order[:steps]), *self.score(written(tuned)))
                    self.remember(digest, attempts[steps])
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
        return count - 1 if FLOAT in self.widths else count

    @functools.cached_property
    def placement(self) -> Placement:
        """Which operators are integer layers."""
        return place(self.model, self.recipe, unresolvable(self.statistics.tensors))

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
        base = judge.noise(self.candidate(wide, ()))
        passed = self.passed()
        steps: list[Step] = []
        for number, (layer, weight, size) in enumerate(layers):
            self.progress("sensitivity", number, len(layers))
            noises = {WIDE: base}
            around = self.around([layer])
            for width in passed:
                if not width.real and width not in noises:
                    grids = around if width == AROUND else {}
                    noises[width] = judge.noise(self.candidate({**wide, weight: width.bits}, (), grids))
            real = judge.noise(self.candidate(wide, (layer,))) if len(layers) > 1 else 0.0
            # What rounding to 16 bits leaves is too little to be seen beside the other layers: 2^-16 of that to 8 bits.
            rounded = max(base - noises.get(WIDEST, base), 0.0) / 4.0 ** (WIDEST.bits - WIDE.bits)
            noises |= {STORED: real, FLOAT: real - rounded if STORED in passed else real}
            steps += steps_of(layer, weight, (size, sum(self.sizes.get(name, 0) for name in around)), passed, noises)
        last = FLOAT if {STORED, AROUND} & {*passed} else None
        return sorted(steps, key=lambda step: (step.width == last, -rate(step), step.layer, passed.index(step.width)))

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
            place(model, recipe, unresolvable(self.statistics.tensors))
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

    def remembered(self) -> dict[str, Attempt]:
        """Return the tries that were written down, by digest; a line that was cut off is left out."""
        if self.log is None or not self.log.is_file():
            return {}
        found = {}
        for line in self.log.read_text().splitlines():
            try:
                entry = json.loads(line)
                found[entry["digest"]] = msgspec.convert(entry["attempt"], Attempt)
            except (ValueError, KeyError, msgspec.ValidationError):
                continue
        return found

    def remember(self, digest: str, attempt: Attempt) -> None:
        """Write a try down."""
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps({"digest": digest, "attempt": asdict(attempt)}) + "\n")


def raised_by(steps: Sequence[Step]) -> dict[str, Step]:
    """Return the last step of every layer that steps raise, by its weight's name."""
    return {step.weight: step for step in steps}


def steps_of(
    layer: str, weight: str, sizes: tuple[int, int], passed: Sequence[Width], noises: Mapping[Width, float]
) -> list[Step]:
    """Return one layer's steps from width to width, each with the noise that it takes away and the bytes that it costs.

    Weights of 16 bits are left out where they take away less per byte than what comes behind them.

    Args:
        layer: Its name.
        weight: Its weight's name.
        sizes: How many values the weight has, and the activations around it for a sample.
        passed: The widths.
        noises: What each leaves.
    """
    steps = [
        Step(layer, weight, after, max(noises[before] - noises[after], 0.0), cost_of(before, after, sizes))
        for before, after in itertools.pairwise(passed)
    ]
    for one, other in itertools.pairwise(steps):
        if one.width == WIDEST and rate(one) < rate(other):
            return steps_of(layer, weight, sizes, [width for width in passed if width != WIDEST], noises)
    for number in range(1, len(steps)):  # what comes second must not come first
        second = steps[number]
        steps[number] = replace(second, noise=min(second.noise, rate(steps[number - 1]) * second.cost * 0.999))
    return steps


def cost_of(before: Width, after: Width, sizes: tuple[int, int]) -> float:
    """Return what a layer's weight and the activations around it cost more at a width than at another, in bytes (`Step.cost`)."""
    stored = (FLOAT.bits if after.real else after.bits) - before.bits
    return (sizes[0] * stored + sizes[1] * max(after.around - before.around, 0)) / 8


def rate(step: Step) -> float:
    """Return the noise that a step takes away per byte."""
    return step.noise / max(step.cost, 1.0)


def written(tuned: Tuned) -> bytes:
    """Return a tuned model's bytes."""
    return model_bytes(WRITERS["qdq"](quantize(tuned.model, tuned.plan)))


def once(recipe: Recipe) -> Recipe:
    """Return a recipe whose tries are not swept once more over all samples unless it says so: the metric judges them."""
    if recipe.tune.refit is not None:
        return recipe
    return msgspec.structs.replace(recipe, tune=msgspec.structs.replace(recipe.tune, refit=False))
