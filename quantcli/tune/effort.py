"""Effort: which algorithms are tried on a model, and which outcome is kept.

Every candidate is judged by what is left of the model's outputs (SQNR) on calibration samples that it has not seen; the untuned
plan is always one of them, so that tuning never makes a model worse by that measure.

======== ================================================================================================================
fast     nothing: ranges as calibration gives them, weights rounded to nearest
default  one sweep over 64 samples, 256 for coarse weights: ranges and weight scales by error, rounding by second moments, bias,
         gain; compensation where weights have less than 8 bits or one scale per tensor, and, unless activations have less, what is
         kept swept once more over all samples; on the equalized model where that is predicted to pay, and on both with one
         scale per tensor, unless much is predicted; with scales of powers of two on the centred and aligned one, and there the
         best one with compensation, too; without ranges by error, where that was no better than nothing; without bias correction
         where an output is joined from unlike tensors, as boxes and scores are: a mean error over all places is that of places
         without objects, and moves the scores of those with one. The error of a range
         is that of the model's outputs where the model is small, and that of the tensor's readers elsewhere. Where next to
         nothing is left of the outputs, with 16 bits for the activations that 8 hold worst, on targets that have both
best     sweeps over 256 samples: the above, with the outputs' error of larger models, too; and then each of the two errors,
         compensation, ranges by error, regard to activations, equalization, centring and alignment the other way, kept where
         that is better; where weights have less than 8 bits, the same on shifted and mirrored copies of images, too, and with 8
         bits for the smallest weights, as far as all grow by 3 %; where they have 2 or 3, rounding learned from there
======== ================================================================================================================
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantcli.evaluation.check import LOW_SQNR
from quantcli.masks import unresolvable
from quantcli.placement import place
from quantcli.plan import make_plan
from quantcli.probe import weight_bytes
from quantcli.recipe import resolve_target
from quantcli.rules import Arithmetic, Operand
from quantcli.tune.candidates import Candidate
from quantcli.tune.choices import compensated_both_ways, first_choices, learns, open_steps
from quantcli.tune.judge import Judge
from quantcli.tune.mixed import MIXED_BITS, WORTH_MIXING, may_mix, mixed
from quantcli.tune.smooth import Smoothed, smooth
from quantcli.tune.trying import Try, Trying
from quantcli.tune.wide import WIDE_BITS, may_widen, widened
from quantcli.tuning import UNTUNED, Tuning

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from calibration.statistics import Statistics
    from quantcli.plan import Plan
    from quantcli.progress import Progress
    from quantcli.recipe import Recipe
    from quantcli.tune.candidates import Observe, Samples
    from quantcli.tune.equalize import Equalized

logger = logging.getLogger(__name__)

# Of a model with more weights, a copy to work on would be too much.
LARGEST = 1 << 30
# A candidate is kept only where it is better by so many dB.
MARGIN = 0.05
# Wide activations are for models of which little is left without them, and by default kept where they leave so many dB more.
WORTH_WIDENING = 3.0
UNTOUCHED = "as calibrated"


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
        failures: What could not be tried for a reason that nobody foresaw.
    """

    model: ir.Model
    plan: Plan
    smoothed: tuple[Smoothed, ...]
    equalized: Equalized | None = None
    tries: tuple[Try, ...] = ()
    why_not: str = ""
    failures: tuple[str, ...] = ()


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
    first(trying)
    again = open_steps(recipe, observe is not None, trying.images) if recipe.tune.effort == "best" else []
    if not again and recipe.tune.ranges is None and all(one.sqnr <= found[0][0].sqnr for one, _ in trying.found):
        again = ["ranges"]
    for step in again if trying.found else []:
        trying.attempt(trying.other_way(step))
    others: list[tuple[Try, Candidate]] = []
    vary = trying.varies
    if (mixing := with_mixed(trying)) is not None:
        trying, others = mixing, trying.found
    if trying.found and learns(recipe):
        trying.learn(vary)
    found += [*others, *trying.found]
    found += wide(trying, max(one.sqnr for one, _ in found))
    best = max(range(len(found)), key=lambda place: (round(trying.worth(*found[place]) / MARGIN), -place))
    tries = tuple(replace(one, kept=place == best) for place, (one, _) in enumerate(found))
    kept = trying.refitted(*found[best])
    plan = make_plan(kept.model, kept.statistics, recipe, kept.tuning)
    return Tuned(kept.model, plan, kept.smoothed, kept.equalized, tries, failures=tuple(trying.failures))


def first(trying: Trying) -> None:
    """Try what is tried in any case."""
    recipe = trying.recipe
    for choice in first_choices(recipe, trying.equalizing, trying.batches, trying.images):
        trying.attempt(choice)
        if choice.equalize and not trying.found:  # there was nothing to scale
            trying.attempt(choice.toggled("equalize"))
    if trying.found and recipe.tune.compensation is None and compensated_both_ways(resolve_target(recipe)):
        trying.attempt(trying.best.toggled("compensation"))
    if trying.found and recipe.tune.bias is None and trying.judge.unlike:
        trying.attempt(trying.best.toggled("bias"))


def with_mixed(trying: Trying) -> Trying | None:
    """Return what the best choice makes with small weights of 8 bits; None where that is not wanted, or not worth it."""
    base = mixed(trying.start, trying.recipe) if trying.found and may_mix(trying.recipe) else None
    if base is None:
        return None
    what = f"{len(base.tuning.bits)} weights of {MIXED_BITS} bits"
    again = replace(trying, start=base, found=[], choices=[], equal=None, learned={}, prepared={}, what=what)
    again.attempt(trying.best)
    least = max(one.sqnr for one, _ in trying.found) + WORTH_MIXING
    for one, _ in again.found:
        if one.sqnr >= least:
            return again
        logger.info("%s leave %.2f dB, which is not worth it", what, one.sqnr)
    return None


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


def tunable(model: ir.Model, statistics: Statistics, recipe: Recipe) -> bool:
    """Tell whether a plan has a layer that accumulates with a constant weight."""
    placement = place(model, recipe, unresolvable(model, statistics.tensors, recipe))
    accumulating = [layer for layer in placement.layers if layer.rule.arithmetic is Arithmetic.ACCUMULATE]
    return any(kind is Operand.WEIGHT for layer in accumulating for _, _, kind in layer.operands())
