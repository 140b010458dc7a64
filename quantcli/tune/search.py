"""Precision search: the cheapest widths of the layers' weights that keep a metric within a given drop.

Every layer begins at the recipe's width, and can be raised to 8 bits, to 16 where the target has them, and to float. What a layer's
width costs the outputs is measured layer by layer (as in HAWQ, Dong et al. 2019, arXiv 1905.03696, with the noise at the outputs in
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

from quantcli.errors import ModelError, PlanError
from quantcli.fold import lift_opset
from quantcli.placement import place
from quantcli.plan import unresolvable
from quantcli.probe import model_bytes
from quantcli.quantize import quantize
from quantcli.recipe import keeping, resolve_target
from quantcli.rules import Arithmetic, Operand
from quantcli.tune.candidates import Candidate, Observe
from quantcli.tune.effort import Judge, Tuned, tune, untuned
from quantcli.tune.smooth import smooth
from quantcli.tuning import Tuning
from quantcli.write import WRITERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.statistics import Statistics
    from quantcli.progress import Progress
    from quantcli.recipe import Recipe
    from quantcli.tune.candidates import Samples

logger = logging.getLogger(__name__)

WIDE, WIDEST = 8, 16
# How many standard errors a promise allows for: the normal distribution has 95 % of itself below so many.
CONFIDENCE = 1.645
# The bits of a float weight.
FLOAT = 32
# The operator set from which DequantizeLinear knows int16.
WIDEST_OPSET = 21


@dataclass(frozen=True)
class Score:
    """What a metric says of a quantized model beside the float one.

    Attributes:
        quantized: The quantized model's, in percent.
        reference: The float model's.
        samples: On how many samples.
        changed: How many of them one of the two has right and the other wrong.
    """

    quantized: float
    reference: float
    samples: int
    changed: int

    @property
    def drop(self) -> float:
        """By how many points the quantized model is below."""
        return self.reference - self.quantized

    @property
    def worst(self) -> float:
        """The most that the drop is, with 95 % confidence: what a promise about other samples has to allow for.

        A gain is taken to be luck.
        """
        return max(self.drop, 0.0) + CONFIDENCE * self.uncertainty

    @property
    def uncertainty(self) -> float:
        """The standard error of the drop, in points: √changed / samples (of paired differences, McNemar).

        Where nothing changed, the next sample may be the first one that does: no fewer than one counts.
        """
        return 100.0 * math.sqrt(max(self.changed, 1)) / self.samples if self.samples else 0.0


@dataclass(frozen=True)
class Step:
    """One layer made wider.

    Attributes:
        layer: Its name.
        weight: Its weight's name.
        bits: Its width then; 0 for float.
        noise: By how much it lowers the outputs' noise, as a part of their signal.
        cost: By how many bytes the weight grows.
    """

    layer: str
    weight: str
    bits: int
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
        widths: What layers may be raised to, in ascending order; 0 for float, which comes last.
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
    widths: tuple[int, ...] = (WIDE, 0)

    def run(self, max_drop: float) -> Found:
        """Return the cheapest assignment whose metric drops by at most so many points.

        On the samples that are searched with, the drop's standard error is allowed for (`Score.worst`).

        Raises:
            PlanError: If none does that still has an integer layer.
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

        best = self.bisected(tried, len(order))
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

    def bisected(self, tried: Callable[[int], bool], count: int) -> int | None:
        """Return the smallest number of steps that keeps the metric, taking more steps to be no worse; None if none does."""
        if tried(0):
            return 0
        most = next((steps for steps in (count // 4, count // 2, self.most(count)) if steps > 0 and tried(steps)), None)
        if most is None:
            return None
        least = 0
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
        """Return how many of all steps may be taken: where the last ones make layers float, one has to stay integer."""
        return count - 1 if 0 in self.widths else count

    def weighted(self) -> list[tuple[str, str, int]]:
        """Return name, weight's name and weight's elements of every layer that accumulates with a weight of its own."""
        placement = place(self.model, self.recipe, unresolvable(self.statistics.tensors))
        found = []
        for layer in placement.layers:
            weight = next((value for _, value, kind in layer.operands() if kind is Operand.WEIGHT), None)
            if layer.rule.arithmetic is Arithmetic.ACCUMULATE and weight is not None and len(weight.uses()) == 1:
                size = weight.shape.numpy() if weight.shape is not None else ()
                found.append((str(layer.node.name), str(weight.name), math.prod(size)))
        return found

    def ordered(self) -> list[Step]:
        """Return the steps, those that take away the most noise per byte first; a layer's in the order of their widths."""
        layers = self.weighted()
        judge = Judge(self.model, self.judging, self.recipe)
        wide = {weight: WIDE for _, weight, _ in layers}
        base = judge.noise(self.candidate(wide, ()))
        passed = self.passed()
        steps: list[Step] = []
        for number, (layer, weight, size) in enumerate(layers):
            self.progress("sensitivity", number, len(layers))
            noises = {WIDE: base, 0: 0.0}
            for bits in passed:
                if bits == 0 and len(layers) > 1:
                    noises[bits] = judge.noise(self.candidate(wide, (layer,)))
                elif bits not in noises:
                    noises[bits] = judge.noise(self.candidate({**wide, weight: bits}, ()))
            steps += steps_of(layer, weight, size, passed, noises)
        return sorted(steps, key=lambda step: (-rate(step), step.layer, step.bits or FLOAT))

    def passed(self) -> list[int]:
        """Return the widths that a layer passes through, from the recipe's on; 0 for float."""
        target = resolve_target(self.recipe).weight.bits
        wider = [bits for bits in self.widths if bits == 0 or bits > target]
        return [target, *(bits for bits in wider if bits != WIDEST or self.with_widest is not None)]

    @functools.cached_property
    def with_widest(self) -> ir.Model | None:
        """The model in an operator set that has weights of 16 bits; None where it cannot be had."""
        lifted = self.model.clone()
        try:
            lift_opset(lifted, WIDEST_OPSET)
            if names_of(lifted) != names_of(self.model):
                raise ModelError(f"its tensors have other names in operator set {WIDEST_OPSET}")
        except ModelError as error:
            logger.info("no weight is raised to %d bits: %s", WIDEST, error)
            return None
        return lifted

    def model_for(self, bits: Mapping[str, int]) -> ir.Model:
        """Return the model that can hold weights of some widths."""
        wide = self.with_widest if WIDEST in bits.values() else None
        return self.model if wide is None else wide

    @property
    def judging(self) -> Sequence[dict[str, NDArray[Any]]]:
        """The samples that say how much noise there is."""
        return self.samples.judging if self.samples is not None else [self.statistics.check_inputs]

    def candidate(self, bits: dict[str, int], floats: tuple[str, ...]) -> tuple[Candidate, Recipe]:
        """Return an untuned candidate of some widths, and the recipe with the layers that stay float."""
        recipe = keeping(self.recipe, floats)
        final, seen, evened = smooth(self.model_for(bits), self.statistics, recipe)
        return Candidate(final, seen, evened, Tuning(bits=bits)), recipe

    def assigned(self, steps: Sequence[Step]) -> tuple[dict[str, int], tuple[str, ...]]:
        """Return the widths that differ from the recipe's, and the layers that stay float."""
        floats = tuple(step.layer for step in steps if step.bits == 0)
        return {step.weight: step.bits for step in steps if step.bits and step.layer not in floats}, floats

    def tuned(self, steps: Sequence[Step]) -> Tuned:
        """Return the tuned model of an assignment."""
        bits, floats = self.assigned(steps)
        recipe = keeping(self.recipe, floats)
        model = self.model_for(bits)
        if self.samples is None:
            return untuned(model, self.statistics, recipe, "effort fast", Tuning(bits=bits))
        return tune(model, self.statistics, recipe, self.samples, self.observe, lambda *_: None, bits)

    def bytes_of(self, steps: Sequence[Step]) -> int:
        """Return what the weights take at their widths."""
        target = resolve_target(self.recipe).weight.bits
        bits, floats = self.assigned(steps)
        total = 0.0
        for layer, weight, size in self.weighted():
            total += size * (FLOAT if layer in floats else bits.get(weight, target)) / 8
        return math.ceil(total)

    def digest(self, steps: Sequence[Step]) -> str:
        """Return what names an assignment among all tries."""
        bits, floats = self.assigned(steps)
        text = json.dumps([self.key, sorted(bits.items()), sorted(floats)])
        return hashlib.sha256(text.encode()).hexdigest()

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


def steps_of(layer: str, weight: str, size: int, passed: Sequence[int], noises: Mapping[int, float]) -> list[Step]:
    """Return one layer's steps from width to width, each with the noise that it takes away and the bytes that it costs.

    16 bits are left out where they take away less per byte than what comes behind them.
    """
    steps = [
        Step(layer, weight, after, max(noises[before] - noises[after], 0.0), size * ((after or FLOAT) - before) / 8)
        for before, after in itertools.pairwise(passed)
    ]
    for one, other in itertools.pairwise(steps):
        if one.bits == WIDEST and rate(one) < rate(other):
            return steps_of(layer, weight, size, [bits for bits in passed if bits != WIDEST], noises)
    for number in range(1, len(steps)):  # what comes second must not come first
        second = steps[number]
        steps[number] = replace(second, noise=min(second.noise, rate(steps[number - 1]) * second.cost * 0.999))
    return steps


def names_of(model: ir.Model) -> list[tuple[str | None, ...]]:
    """Return the names of a model's nodes and of what they give, by which statistics and recipes speak of them."""
    return [(node.name, *(value.name for value in node.outputs)) for node in model.graph]


def rate(step: Step) -> float:
    """Return the noise that a step takes away per byte."""
    return step.noise / max(step.cost, 1.0)


def written(tuned: Tuned) -> bytes:
    """Return a tuned model's bytes."""
    return model_bytes(WRITERS["qdq"](quantize(tuned.model, tuned.plan)))
