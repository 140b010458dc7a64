"""Effort: which algorithms are tried on a model, and which outcome is kept.

Every candidate is judged by what is left of the model's outputs (SQNR) on calibration samples that it has not seen; the untuned
plan is always one of them, so that tuning never makes a model worse by that measure.

======== ================================================================================================================
fast     nothing: ranges as calibration gives them, weights rounded to nearest
default  one sweep over 64 samples, 256 for coarse weights: ranges and weight scales by error, rounding by second moments, bias;
         compensation where weights have less than 8 bits or one scale per tensor, and, unless activations have less, what is
         kept swept once more over all samples; on the equalized model where that is predicted to pay, and on both with one
         scale per tensor, unless much is predicted; with scales of powers of two on the centred and aligned one, and there the
         best one with compensation, too; without ranges by error, where that was no better than nothing. The error of a range
         is that of the model's outputs where the model is small, and that of the tensor's readers elsewhere. Where next to
         nothing is left of the outputs, with 16 bits for the activations that 8 hold worst, on targets that have both
best     sweeps over 256 samples: the above, with the outputs' error of larger models, too; and then each of the two errors,
         compensation, ranges by error, regard to activations, equalization, centring and alignment the other way, kept where
         that is better; where weights have less than 8 bits, the same on shifted and mirrored copies of images, too, and rounding
         learned from there
======== ================================================================================================================
"""

from __future__ import annotations

import functools
import logging
import math
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.hooks.onnxruntime import Runner, first_line
from quantcli.cost import larger_by, values_of, work_of
from quantcli.errors import OutputError, PlanError
from quantcli.evaluation.check import LOW_SQNR
from quantcli.evaluation.metrics import Comparison
from quantcli.placement import place
from quantcli.plan import make_plan, unresolvable
from quantcli.probe import model_bytes, runnable, weight_bytes
from quantcli.quantize import quantize
from quantcli.recipe import resolve_target
from quantcli.rules import Arithmetic, Operand
from quantcli.tune.candidates import Candidate, Gained, Observe, Samples, aligned, centred, equalized, foreseen, swept
from quantcli.tune.choices import Choice, compensated_both_ways, first_choices, freed, is_coarse, learns, open_steps
from quantcli.tune.outputs import TRIES, logarithms
from quantcli.tune.smooth import Smoothed, smooth
from quantcli.tune.steps import Steps
from quantcli.tune.vary import has_images, with_copies
from quantcli.tune.wide import WIDE_BITS, may_widen, widened
from quantcli.tuning import UNTUNED, Tuning
from quantcli.write import WRITERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.statistics import Statistics
    from quantcli.evaluation.metrics import Difference
    from quantcli.plan import Plan
    from quantcli.progress import Progress
    from quantcli.recipe import Recipe
    from quantcli.targets import Target
    from quantcli.tune.equalize import Equalized
    from quantcli.tune.weights import Regularization

    Feeds = dict[str, NDArray[Any]]

logger = logging.getLogger(__name__)

# How many samples a sweep runs: more where weights are coarse, which is where it has most to choose; and how many others judge.
SAMPLES, COARSE_SAMPLES = {"default": 64, "best": 256}, 256
JUDGES = 64
# How many varied copies of each sample there are at most.
COPIES = 3
# What the tensors between a sweep's layers may take, in bytes; fewer samples are run where they would take more.
ROOM = 1 << 30
# The same where varied copies of samples are run: of a MobileNet they are worth 0.45 dB of 4 bits, and ROOM holds hardly any.
VARIED_ROOM = 3 << 30
# Of a model with more weights, a copy to work on would be too much.
LARGEST = 1 << 30
# Where each channel of a weight has a scale, equalization is tried by default if it is to lower the noise by so many dB; of weights
# of 3 to 7 bits by less, which was kept on samples that were not seen; of 2 bits not always (LeNet lost 3 dB).
WORTH_EQUALIZING, COARSE_BITS, WORTH_EQUALIZING_COARSE = 0.75, range(3, 8), 0.15
# With one scale for all channels the model is tried both ways, unless so much is predicted.
CLEARLY_WORTH_EQUALIZING = 3.0
# Nothing is predicted of a model with a weight of more elements, which takes much memory to look at.
LARGEST_WEIGHT = 1 << 24
# A candidate is kept only where it is better by so many dB.
MARGIN = 0.05
# By so many dB learned weights have to be better where others are still to be swept over all samples, which gains about as much.
WORTH_LEARNING = 0.4
# How many multiply-accumulates may go into ranges by what they do to the outputs, more where activations have less than 8 bits,
# whose ranges matter most; and the least samples that tell something.
AHEAD, AHEAD_NARROW = {"default": 10**11, "best": 10**13}, 5 * 10**11
FEWEST_AHEAD = 32
# Wide activations are for models of which little is left without them, and by default kept where they leave so many dB more.
WORTH_WIDENING = 3.0
UNTOUCHED = "as calibrated"


@dataclass(frozen=True)
class Try:
    """One candidate.

    Attributes:
        name: What was done.
        sqnr: What is left of the outputs (of probabilities, of their logarithms), in dB, averaged over the outputs, on samples
            that it has not seen.
        seconds: How long it took to make.
        gains: What each step gained.
        kept: Whether this is what is written.
    """

    name: str
    sqnr: float
    seconds: float
    gains: Gained
    kept: bool = False


@dataclass(frozen=True, eq=False)
class Tuned:
    """What tuning came to.

    Attributes:
        model: The model that the plan speaks of.
        plan: The plan.
        smoothed: The tensors whose columns were evened.
        equalized: What equalization did; None where it is not part of what is kept.
        tries: The candidates; empty where nothing was tuned.
        why_not: Why nothing was tuned; empty where something was.
    """

    model: ir.Model
    plan: Plan
    smoothed: tuple[Smoothed, ...]
    equalized: Equalized | None = None
    tries: tuple[Try, ...] = ()
    why_not: str = ""


def untuned(
    model: ir.Model, statistics: Statistics, recipe: Recipe, why_not: str = "", tuning: Tuning = UNTUNED
) -> Tuned:
    """Return the plan as calibration gives it."""
    final, seen, evened = smooth(model, statistics, recipe)
    return Tuned(final, make_plan(final, seen, recipe, tuning), evened, why_not=why_not)


def why_untuned(model: ir.Model, statistics: Statistics, recipe: Recipe) -> str:
    """Return why a model is not tuned; empty where it is."""
    if recipe.tune.effort == "fast":
        return "effort fast"
    if statistics.synthetic:
        return "random data tells nothing about a model"
    if weight_bytes(model) > LARGEST:
        return f"the model holds more than {LARGEST >> 20} MB of weights"
    return ""


def wanted_samples(model: ir.Model, recipe: Recipe) -> int:
    """Return how many samples sweeps are to run: the recipe's, or the effort's as far as there is room."""
    if recipe.tune.samples is not None:
        return recipe.tune.samples
    weight = resolve_target(recipe).weight
    wished = COARSE_SAMPLES if weight.bits < 8 or not weight.per_channel else SAMPLES[recipe.tune.effort]
    return max(4, min(wished, room_for(model)))


def room_for(model: ir.Model, room: int = ROOM) -> int:
    """Return for how many samples so many bytes hold what waits between a sweep's layers."""
    return room // max(8 * most_held(model), 1)


def most_held(model: ir.Model) -> int:
    """Return the most values that wait for readers at once while a model runs node by node, per sample."""
    last = {value: number for number, node in enumerate(model.graph) for value in node.inputs if value is not None}
    held, most = 0, 0
    ends: dict[int, int] = {}
    for number, node in enumerate(model.graph):
        for value in node.outputs:
            size = values_of(value) or 0
            held += size
            ends[last.get(value, number)] = ends.get(last.get(value, number), 0) + size
        most = max(most, held)
        held -= ends.get(number, 0)
    return most


def tune(
    model: ir.Model,
    statistics: Statistics,
    recipe: Recipe,
    samples: Samples,
    observe: Observe | None,
    progress: Progress,
    bits: dict[str, int] | None = None,
    grids: Mapping[str, int] | None = None,
) -> Tuned:
    """Try what the recipe's effort says, and return the best.

    Args:
        model: The folded model; it is not changed.
        statistics: What calibration saw of it.
        recipe: What the user wants.
        samples: Calibration samples.
        observe: Calibrates another folded model on the same data, for equalization; None where that cannot be had.
        progress: Called with the stage, the nodes done and their total.
        bits: The widths of weights that differ from the target's, by name.
        grids: The widths of activations that do.
    """
    bits = bits or {}
    judge = Judge(model, samples.judging, recipe)
    final, seen, evened = smooth(model, statistics, recipe)
    start = Candidate(final, seen, evened, Tuning(bits=bits, grids=grids or {}))
    found: list[tuple[Try, Candidate]] = [(Try(UNTOUCHED, judge.sqnr(start), 0.0, {}), start)]
    if not tunable(final, seen, recipe):
        plan = make_plan(final, seen, recipe, start.tuning)
        return Tuned(final, plan, evened, why_not="no layer has a weight to tune")
    trying = Trying(start, statistics, recipe, samples, observe, progress, judge)
    for choice in first_choices(recipe, trying.equalizing, trying.batches, trying.images):
        trying.attempt(choice)
        if choice.equalize and not trying.found:  # there was nothing to scale
            trying.attempt(choice.toggled("equalize"))
    if trying.found and recipe.tune.compensation is None and compensated_both_ways(resolve_target(recipe)):
        trying.attempt(trying.best.toggled("compensation"))
    again = open_steps(recipe, observe is not None, trying.images) if recipe.tune.effort == "best" else []
    if not again and recipe.tune.ranges is None and all(one.sqnr <= found[0][0].sqnr for one, _ in trying.found):
        again = ["ranges"]
    for step in again if trying.found else []:
        trying.attempt(trying.other_way(step))
    if trying.found and learns(recipe):
        trying.learn()
    found += trying.found
    found += wide(trying, max(one.sqnr for one, _ in found))
    best = max(range(len(found)), key=lambda place: (round(trying.worth(*found[place]) / MARGIN), -place))
    tries = tuple(replace(one, kept=place == best) for place, (one, _) in enumerate(found))
    kept = trying.refitted(*found[best])
    return Tuned(
        kept.model, make_plan(kept.model, kept.statistics, recipe, kept.tuning), kept.smoothed, kept.equalized, tries
    )


def wide(trying: Trying, sqnr: float) -> list[tuple[Try, Candidate]]:
    """Return the candidates with wide activations: rounded to nearest, and swept.

    None where they are not wanted: unless the recipe says so, where the others leave enough, or where these leave hardly more.
    """
    wished = trying.recipe.tune.widen
    if not may_widen(trying.recipe) or (not wished and sqnr >= LOW_SQNR):
        return []
    begun = time.perf_counter()
    base = widened(trying.start, trying.recipe, trying.samples.swept)
    if base is None:
        return []
    name = f"{len(base.tuning.grids)} activations of {WIDE_BITS} bits"
    found = [(Try(name, trying.judge.sqnr(base), time.perf_counter() - begun, {}), base)]
    again = replace(trying, start=base, observe=None, found=[], choices=[], learned={}, prepared={})
    for choice in first_choices(trying.recipe, (False,), again.batches, again.images):
        again.attempt(choice)
    found += [(replace(one, name=f"{name}, {one.name}"), candidate) for one, candidate in again.found]
    most = max(one.sqnr for one, _ in found)
    if not wished and most < sqnr + WORTH_WIDENING:
        logger.info("%s leave %.1f dB, which is not worth it", name, most)
        return []
    return found


@dataclass(eq=False)
class Trying:
    """The candidates of one model, as they are made."""

    start: Candidate
    statistics: Statistics
    recipe: Recipe
    samples: Samples
    observe: Observe | None
    progress: Progress
    judge: Judge
    found: list[tuple[Try, Candidate]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    equal: Candidate | None = None
    learned: dict[bool, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    prepared: dict[Choice, tuple[Candidate, Gained]] = field(default_factory=dict)

    @functools.cached_property
    def batches(self) -> int:
        """Over how many batches ranges can be judged by what they do to the outputs; 0 where that is not wanted or too much."""
        wished, target = self.recipe.tune.ranges, resolve_target(self.recipe)
        if wished == "outputs":
            return len(self.samples.swept)
        if wished is not None or (target.weights_are_coarser and self.recipe.tune.effort != "best"):
            return 0
        most = max(AHEAD[self.recipe.tune.effort], AHEAD_NARROW if target.activation.width < 8 else 0)
        room = most // max(work_ahead(self.start, self.recipe, self.samples.swept[0]), 1)
        rows = np.cumsum([len(next(iter(feeds.values()))) for feeds in self.samples.swept])
        fitting = int(np.searchsorted(rows, room, side="right"))
        return fitting if fitting and (rows[fitting - 1] >= FEWEST_AHEAD or fitting == len(rows)) else 0

    @functools.cached_property
    def equalizing(self) -> tuple[bool, ...]:
        """Whether the model as it is and the equalized one are tried in any case: False for the one, True for the other."""
        wished = self.recipe.tune.equalize
        if wished is False or self.observe is None:
            return (False,)
        if wished:
            return (True,)
        target = resolve_target(self.recipe)
        if target.activation.width < 8:  # the prediction is of ranges that cut nothing, and others are chosen then
            return (False,) if target.weight.per_channel else (False, True)
        held = [value.const_value for value in self.judge.model.graph.initializers.values()]
        if max((array.size for array in held if array is not None), default=0) > LARGEST_WEIGHT:
            return (False,)
        try:
            bits = self.start.tuning.bits
            gain = foreseen(self.judge.model, self.statistics, self.recipe, self.samples, bits)
        except Exception as error:  # noqa: BLE001 - the model as it is is there in any case
            logger.debug("what equalization would bring cannot be told: %s", first_line(error))
            gain = 0.0
        if not target.weight.per_channel:
            return (True,) if gain >= CLEARLY_WORTH_EQUALIZING else (False, True)
        return (gain >= (WORTH_EQUALIZING_COARSE if target.weight.bits in COARSE_BITS else WORTH_EQUALIZING),)

    @property
    def images(self) -> bool:
        """Whether there is something to shift and to mirror."""
        return has_images(self.samples.swept[0])

    @property
    def best(self) -> Choice:
        """The best choice so far."""
        return self.choices[max(range(len(self.found)), key=lambda place: (self.found[place][0].sqnr, -place))]

    def other_way(self, step: str) -> Choice:
        """Return the best choice so far with one step the other way.

        Varied copies, of which there are many, have ranges by their readers' error unless the recipe asks for the outputs'. Where
        weights are coarse, as they are there, noise comes from those, and the outputs' error tells ranges apart by chance.
        """
        choice = self.best.toggled(step)
        if step == "vary" and choice.vary and self.recipe.tune.ranges != "outputs":
            return replace(choice, steps=replace(choice.steps, outputs=0))
        return choice

    def attempt(self, choice: Choice) -> None:
        """Make a candidate and judge it, unless it has been; one that cannot be made is left out, and said so."""
        if choice in self.choices:
            return
        begun = time.perf_counter()
        steps = choice.steps
        try:
            if choice.equalize and self.observe is not None:
                model, seen = self.judge.model, self.statistics
                tuning = self.start.tuning
                self.equal = self.equal or equalized(model, seen, self.recipe, self.samples, self.observe, tuning)
                if self.equal is None:
                    return
            candidate, gains = self.made(choice, self.samples.swept)
            worth = self.judge.sqnr(candidate)
        except Exception as error:  # noqa: BLE001 - the plan as calibrated is there in any case
            logger.warning("tuning (%s) failed and is left out: %s", choice.name, first_line(error))
            return
        if steps.ranges and steps.outputs and not (choice.centre or choice.align):
            self.learned[choice.equalize] = candidate.tuning.ranges
        self.choices.append(choice)
        self.found.append((Try(choice.name, worth, time.perf_counter() - begun, gains), candidate))

    def made(
        self, choice: Choice, batches: Sequence[Feeds], known: Mapping[str, Regularization] | None = None
    ) -> tuple[Candidate, Gained]:
        """Return what a choice makes of some samples, and what its steps have gained.

        Args:
            choice: What is done.
            batches: The samples.
            known: The regularization of weights, by name, where that is known.
        """
        base, steps, target = self.start, choice.steps, resolve_target(self.recipe)
        if choice.equalize and self.equal is not None:
            base = self.equal
        earlier: Gained = {}
        progress = functools.partial(self.progress, f"tune {len(self.choices) + 1}")
        if choice.centre or choice.align:
            base, earlier = self.prepare(base, choice, target, progress)
        elif steps.ranges and steps.outputs and choice.equalize in self.learned:
            # Found once, ranges by what they do to the outputs hold for other choices, too.
            base = replace(base, tuning=replace(base.tuning, ranges=self.learned[choice.equalize]))
            steps = replace(steps, ranges=False)
        if choice.vary:
            batches = with_copies(batches, COPIES, room_for(self.judge.model, VARIED_ROOM), steps.seed)
        candidate, gains = swept(base, self.recipe, target, steps, tuple(batches), progress, known)
        return candidate, {**earlier, **gains}

    @property
    def every(self) -> tuple[Feeds, ...]:
        """All samples, those that judge among them."""
        return (*self.samples.swept, *self.samples.judging)

    @property
    def refits(self) -> bool:
        """Whether what is kept of sweeps is swept over all samples: where that is wanted, and there is room for them."""
        wished, target = self.recipe.tune.refit, resolve_target(self.recipe)
        # Ranges of narrow activations are what matters most there, and more samples make them no better.
        coarse = is_coarse(target) and target.activation.width >= 8
        rows = sum(len(next(iter(feeds.values()))) for feeds in self.every)
        return (coarse if wished is None else wished) and rows <= room_for(self.judge.model)

    def choice_of(self, candidate: Candidate) -> Choice | None:
        """Return what a candidate was swept with; None where that alone did not make it."""
        pairs = zip(self.choices, self.found, strict=False)  # what was learned stands behind
        return next((choice for choice, (_, other) in pairs if other is candidate), None)

    def worth(self, one: Try, candidate: Candidate) -> float:
        """Return what a candidate has left, in dB, less what it misses if it cannot be swept over all samples as others are."""
        learned = self.choice_of(candidate) is None and any(other is candidate for _, other in self.found)
        return one.sqnr - (WORTH_LEARNING if learned and self.refits else 0.0)

    def refitted(self, kept: Try, candidate: Candidate) -> Candidate:
        """Return what the same steps make of all samples, where that is to be; those that judged it tell nothing more of it then.

        What was not swept alone stays as it is, as does what these samples show to be better.
        """
        choice = self.choice_of(candidate)
        if choice is None or not self.refits:
            return candidate
        begun = time.perf_counter()
        try:
            afresh = replace(self, learned={}, prepared={})
            found, _ = afresh.made(choice, self.every, candidate.regularization)
            worth = self.judge.sqnr(found)
        except Exception as error:  # noqa: BLE001 - what was found before is there in any case
            logger.warning("sweeping over all samples failed and is left out: %s", first_line(error))
            return candidate
        logger.info(
            "'%s' swept over all samples in %.1f s: %.2f dB on those that had judged it, %.2f before",
            kept.name,
            time.perf_counter() - begun,
            worth,
            kept.sqnr,
        )
        return found if worth > kept.sqnr else candidate

    def learn(self) -> None:
        """Let the best candidate's weights be learned, and judge what comes of it."""
        from quantcli.tune.adaround import learn

        begun = time.perf_counter()
        best = self.choices.index(self.best)
        before, base = self.found[best]
        progress = functools.partial(self.progress, f"tune {len(self.choices) + 1}")
        try:
            candidate = learn(base, self.judge.model, self.recipe, self.samples.swept, progress)
            worth = self.judge.sqnr(candidate)
        except (OutputError, PlanError) as error:
            logger.info("rounding is not learned: %s", error)
            return
        except Exception as error:  # noqa: BLE001 - what was found before is there in any case
            logger.warning("learning to round failed and is left out: %s", first_line(error))
            return
        name = f"{before.name}, learned"
        self.found.append((Try(name, worth, time.perf_counter() - begun, before.gains), candidate))

    def prepare(
        self, base: Candidate, choice: Choice, target: Target, progress: Callable[[int, int], None]
    ) -> tuple[Candidate, Gained]:
        """Return a model that is centred and aligned with the ranges of a choice, and what that and the ranges have gained.

        The ranges are those of grids of any scale and zero point, which is what the two let others have.
        """
        steps = Steps(choice.steps.ranges, choice.steps.outputs, False, False, False, False, seed=choice.steps.seed)
        key = replace(choice, steps=steps)
        if key not in self.prepared:
            free = freed(target, power_of_two=False, **({"symmetric": False} if choice.centre else {}))
            gains: Gained = {}
            if steps.ranges:
                found, gains = swept(base, self.recipe, free, steps, self.samples.swept, progress)
                base = replace(base, tuning=found.tuning)
            if choice.centre:
                base, gained = centred(base, self.recipe)
                gains |= gained
            if choice.align:
                base, gained = aligned(base, self.recipe, freed(target, power_of_two=False))
                gains |= gained
            self.prepared[key] = base, gains
        return self.prepared[key]


def tunable(model: ir.Model, statistics: Statistics, recipe: Recipe) -> bool:
    """Tell whether a plan has a layer that accumulates with a constant weight."""
    placement = place(model, recipe, unresolvable(statistics.tensors))
    accumulating = [layer for layer in placement.layers if layer.rule.arithmetic is Arithmetic.ACCUMULATE]
    return any(kind is Operand.WEIGHT for layer in accumulating for _, _, kind in layer.operands())


def work_ahead(candidate: Candidate, recipe: Recipe, feeds: Feeds) -> int:
    """Return about how many multiply-accumulates it takes, per sample, to judge ranges by what they do to the outputs.

    Every range takes a run of what is left of the model behind its tensor, which is half of it on average.
    """
    placement = place(candidate.model, recipe, unresolvable(candidate.statistics.tensors))
    work = [work_of(node) for node in candidate.model.graph]
    if any(one.macs is None or one.made is None for one in work):
        return sys.maxsize
    once = sum((one.macs or 0) + (one.made or 0) for one in work) * larger_by(candidate.model, feeds)
    return len(placement.observed()) * TRIES * once // 2


class Judge:
    """Samples, what the float model makes of them, and so what a candidate is worth.

    Args:
        model: The float model, folded.
        batches: Samples that no candidate has seen.
        recipe: What the user wants.
    """

    def __init__(self, model: ir.Model, batches: Sequence[Feeds], recipe: Recipe) -> None:
        self.model, self.batches, self.recipe = model, batches, recipe
        runner = Runner(runnable(model), what="the folded model")
        self.expected = [runner.run(feeds) for feeds in batches]
        self.counted: frozenset[str] = frozenset()

    def sqnr(self, candidate: Candidate) -> float:
        """Return the mean SQNR of a candidate's outputs, in dB; −200 where an output is not finite.

        Outputs that are exact in the first candidate say nothing of those that are not, and count for none.
        """
        found = self.compared(candidate, self.recipe)
        if not self.counted:
            inexact = frozenset(name for name, difference in found.items() if difference.noise != 0)
            self.counted = inexact or frozenset(found)
        values = [min(difference.sqnr, 200.0) for name, difference in found.items() if name in self.counted]
        mean = float(np.mean(values)) if values else 0.0
        return mean if math.isfinite(mean) else -200.0

    def noise(self, candidate: tuple[Candidate, Recipe]) -> float:
        """Return the noise of a candidate's outputs as a part of their signal, averaged over the outputs."""
        values = [10 ** (-min(difference.sqnr, 200.0) / 10) for difference in self.compared(*candidate).values()]
        return float(np.mean(values)) if values else 0.0

    def compared(self, candidate: Candidate, recipe: Recipe) -> dict[str, Difference]:
        """Return how a candidate's outputs differ from float's, by name."""
        plan = make_plan(candidate.model, candidate.statistics, recipe, candidate.tuning)
        runner = Runner(model_bytes(WRITERS["qdq"](quantize(candidate.model, plan))), what="a candidate")
        comparison = Comparison()
        steps = {name: plan.tensors[name].scale[0] for name in runner.outputs if name in plan.tensors}
        for feeds, expected in zip(self.batches, self.expected, strict=True):
            comparison.update(*logarithms(expected, runner.run(feeds), steps))
        return comparison.outputs
