"""Candidates: what each choice makes of a model, judged; one that cannot be made is left out."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets import samples_in
from calibration.hooks.onnxruntime import first_line
from quantcli.errors import OutputError, PlanError
from quantcli.recipe import resolve_target
from quantcli.tune.candidates import Candidate, Gained, Observe, Samples, aligned, centred, equalized, foreseen, swept
from quantcli.tune.choices import Choice, freed, is_coarse
from quantcli.tune.equalize import Looked
from quantcli.tune.room import VARIED_ROOM, room_for, work_ahead
from quantcli.tune.steps import NOTHING
from quantcli.tune.vary import has_images, with_copies

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from calibration.statistics import Statistics
    from quantcli.progress import Progress
    from quantcli.recipe import Recipe
    from quantcli.targets import Target
    from quantcli.tune.judge import Judge
    from quantcli.tune.weights import Regularization

    Feeds = dict[str, NDArray[Any]]

logger = logging.getLogger(__name__)

# How many varied copies of each sample there are at most.
COPIES = 3
# Where each channel of a weight has a scale, equalization is tried by default if it is to lower the noise by so many dB; of weights
# of 3 to 7 bits by less, which was kept on samples that were not seen; of 2 bits not always (LeNet lost 3 dB).
WORTH_EQUALIZING, COARSE_BITS, WORTH_EQUALIZING_COARSE = 0.75, range(3, 8), 0.15
# With one scale for all channels the model is tried both ways, unless so much is predicted.
CLEARLY_WORTH_EQUALIZING = 3.0
# Nothing is predicted of a model with a weight of more elements, which takes much memory to look at.
LARGEST_WEIGHT = 1 << 24
# By so many dB learned weights have to be better where others are still to be swept over all samples, which gains about as much.
WORTH_LEARNING = 0.4
# Where a sweep over varied copies of samples leaves so many dB less than one without, they are no samples of their kind.
LESS_VARIED = 1.0
# How many multiply-accumulates may go into ranges by what they do to the outputs, more where activations have less than 8 bits,
# whose ranges matter most; and the least samples that tell something.
AHEAD, AHEAD_NARROW = {"default": 10**11, "best": 10**13}, 5 * 10**11
FEWEST_AHEAD = 32


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


@dataclass(eq=False)
class Trying:
    """The candidates of one model, as they are made.

    Attributes:
        what: What they all have, in words; empty for nothing of note.
        failures: What could not be tried, and why; of all that were made from these, too.
    """

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
    looked: Looked = field(default_factory=Looked)
    what: str = ""
    failures: list[str] = field(default_factory=list)

    def failed(self, what: str, error: Exception) -> None:
        """Warn that something could not be tried, for a reason that nobody foresaw."""
        told = f"{what} failed and is left out: {first_line(error)}"
        self.failures.append(told)
        logger.warning("%s", told)

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
        rows = np.cumsum([samples_in(feeds) for feeds in self.samples.swept])
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
            gain = foreseen(self.judge.model, self.statistics, self.recipe, self.samples, bits, self.looked)
        except Exception as error:  # noqa: BLE001 - the model as it is is there in any case
            logger.debug("what equalization would bring cannot be told: %s", first_line(error))
            gain = 0.0
        if not target.weight.per_channel:
            return (True,) if gain >= CLEARLY_WORTH_EQUALIZING else (False, True)
        return (gain >= (WORTH_EQUALIZING_COARSE if target.weight.bits in COARSE_BITS else WORTH_EQUALIZING),)

    @property
    def images(self) -> bool:
        """Whether there is something to shift and to mirror."""
        return has_images(self.samples.swept[0], self.samples.masks)

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
                if self.equal is None:
                    self.equal = equalized(model, seen, self.recipe, self.samples, self.observe, tuning, self.looked)
                if self.equal is None:
                    return
            candidate, gains = self.made(choice, self.samples.swept)
            worth = self.judge.sqnr(candidate)
        except Exception as error:  # noqa: BLE001 - the plan as calibrated is there in any case
            self.failed(f"tuning ({choice.name})", error)
            return
        if steps.ranges and steps.outputs and not (choice.centre or choice.align):
            self.learned[choice.equalize] = candidate.tuning.ranges
        self.choices.append(choice)
        name = f"{self.what}, {choice.name}" if self.what else choice.name
        self.found.append((Try(name, worth, time.perf_counter() - begun, gains), candidate))

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
            room = room_for(self.judge.model, VARIED_ROOM)
            batches = with_copies(batches, COPIES, room, steps.seed, self.samples.masks)
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
        rows = sum(samples_in(feeds) for feeds in self.every)
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
            self.failed("sweeping over all samples", error)
            return candidate
        logger.info(
            "'%s' swept over all samples in %.1f s: %.2f dB on those that had judged it, %.2f before",
            kept.name,
            time.perf_counter() - begun,
            worth,
            kept.sqnr,
        )
        return found if worth > kept.sqnr else candidate

    @property
    def varies(self) -> bool:
        """Whether shifted and mirrored images are samples like others, as far as the sweeps over them tell."""
        worth = {choice: one.sqnr for choice, (one, _) in zip(self.choices, self.found, strict=False)}
        pairs = [(sqnr, worth.get(replace(choice, vary=False))) for choice, sqnr in worth.items() if choice.vary]
        return all(plain is None or sqnr >= plain - LESS_VARIED for sqnr, plain in pairs)

    def learn(self, vary: bool) -> None:
        """Let the best candidate's weights be learned, from varied images or not, and judge what comes of it."""
        from quantcli.tune.adaround import learn

        begun = time.perf_counter()
        best = self.choices.index(self.best)
        before, base = self.found[best]
        progress = functools.partial(self.progress, f"tune {len(self.choices) + 1}")
        try:
            candidate = learn(base, self.judge.model, self.recipe, self.samples.swept, progress, vary)
            worth = self.judge.sqnr(candidate)
        except (OutputError, PlanError) as error:
            logger.info("rounding is not learned: %s", error)
            return
        except Exception as error:  # noqa: BLE001 - what was found before is there in any case
            self.failed("learning to round", error)
            return
        name = f"{before.name}, learned"
        self.found.append((Try(name, worth, time.perf_counter() - begun, before.gains), candidate))

    def prepare(
        self, base: Candidate, choice: Choice, target: Target, progress: Callable[[int, int], None]
    ) -> tuple[Candidate, Gained]:
        """Return a model that is centred and aligned with the ranges of a choice, and what that and the ranges have gained.

        The ranges are those of grids of any scale and zero point, which is what the two let others have.
        """
        chosen = choice.steps
        steps = replace(NOTHING, ranges=chosen.ranges, outputs=chosen.outputs, seed=chosen.seed)
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
