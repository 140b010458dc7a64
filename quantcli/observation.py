"""Calibration of a folded model: which tensors, which samples in which batches, and going on after an interruption."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from calibration import statistics as statistics_file
from calibration.collect import CHECK_SAMPLES, Checkpoint, Seen, Work, collect, pilot_of
from calibration.datasets import boundaries, fitted_batch, fixes_batch, select
from calibration.errors import DataError, StatisticsError
from calibration.hooks.onnxruntime import Runner
from calibration.lanes import Lanes
from calibration.observers import OBSERVERS, Counting, TensorStatistics
from calibration.ranges import observer_for, parse_range
from calibration.shortcut import Shortcut, computed
from calibration.statistics import Part, Statistics
from quantcli.errors import PlanError, UsageError, check_kind
from quantcli.files import path_or_none, staged
from quantcli.known import holders, known_of, poolable
from quantcli.masks import possible, unresolvable
from quantcli.placement import place
from quantcli.probe import weight_bytes, with_highest, with_outputs
from quantcli.recipe import with_integer_start
from quantcli.scores import scores
from quantcli.suspicion import blamed_on_weights
from quantcli.tune.smooth import columns_needed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.datasets import Dataset
    from calibration.layout import Hook
    from quantcli.load import LoadedModel
    from quantcli.progress import Progress
    from quantcli.recipe import Recipe
    from quantcli.sources import Data

logger = logging.getLogger(__name__)

# What the activations of a batch may take: enough that what a run costs once is little beside it, and little memory beside the
# process; or a part of the weights, which each run reads once, where they are many.
BATCH_BYTES = 9 << 20
PART_OF_WEIGHTS = 6
LARGEST_BATCH = 64
# What the activations of the samples for self-checks may take, where a batch does not take more.
CHECK_BYTES = 64 << 20
# A run below so many batches is over before a second session is loaded.
WORTH_A_SHORTCUT = 4
CHECKPOINT_SECONDS = 30.0
# What counting itself takes about, however large the samples are: bins, and elements that wait for them.
COUNTED_BYTES = 10 << 20


@dataclass(frozen=True)
class Run:
    """How a calibration is run; none of it changes what is counted.

    Attributes:
        shard: Which of how many parts of the samples: (i, n), i from 0.
        max_memory: Bytes that the process may take.
        partial: Where a checkpoint is kept; None for none.
        seconds: How often.
        resume: Whether to go on from a checkpoint.
        runtime: ``onnxruntime`` or ``torch``.
        device: ``cpu`` or ``cuda``.
        threads: Threads that compute; 0 for as many as there are cores.
    """

    shard: tuple[int, int] = (0, 1)
    max_memory: int | None = None
    partial: Path | None = None
    seconds: float = CHECKPOINT_SECONDS
    resume: bool = False
    runtime: Literal["onnxruntime", "torch"] = "onnxruntime"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0

    @property
    def lanes(self) -> Lanes:
        """How many batches are in work at once."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return Lanes.of(self.threads, cores, self.runtime == "onnxruntime")


def checked_run(run: Run | None) -> Run:
    """Return how a calibration is run, or the defaults.

    Raises:
        UsageError: If it is no run, or an entry is of the wrong kind.
    """
    check_kind(run, Run, "run", "give a quantcli.Run")
    if run is None:
        return Run()
    try:
        msgspec.convert(asdict(replace(run, partial=None)), Run)
    except msgspec.ValidationError as error:
        raise UsageError(f"the run asks for something unknown ({error})", "see quantcli.Run") from error
    shard, shards = run.shard
    if not 0 <= shard < shards:
        raise UsageError(f"there is no shard {shard} of {shards}", "count the shards from 0")
    return replace(run, partial=path_or_none(run.partial, "place of checkpoints"))


def observer_of(recipe: Recipe) -> str:
    """Return the observer that a recipe asks for, or that its range needs."""
    if recipe.calibration.observer is not None:
        return recipe.calibration.observer
    return observer_for(parse_range(recipe.activation.range)) if recipe.activation.range is not None else "minmax"


def preprocess_of(recipe: Recipe) -> dict[str, Any]:
    """Return how a recipe preprocesses data, as statistics spell it (in JSON's types); nothing where it does not say."""
    spelled: dict[str, Any] = json.loads(json.dumps(asdict(recipe.preprocess))) if recipe.preprocess else {}
    return spelled


def check_counted(recipe: Recipe) -> None:
    """Check that the observer that a recipe asks for counts what its range needs.

    Raises:
        UsageError: If it does not.
    """
    if recipe.activation.range is None:
        return
    needed, observer = parse_range(recipe.activation.range).name, observer_of(recipe)
    if not OBSERVERS[needed] <= OBSERVERS[observer]:
        raise UsageError(
            f"the observer {observer} does not count what the range {needed} needs",
            f"leave it out, or say {needed} or all",
        )


def observe(
    source: LoadedModel, folded: ir.Model, data: Data, recipe: Recipe, run: Run, progress: Progress
) -> Statistics:
    """Return the statistics of a folded model's tensors over a data set.

    Raises:
        ReportedError: If model, data or checkpoint cannot be used.
    """
    with blamed_on_weights(folded):
        return Observation(source, folded, data, recipe, run, progress).statistics()


@dataclass(eq=False)
class Observation:
    """One calibration."""

    source: LoadedModel
    folded: ir.Model
    data: Data
    recipe: Recipe
    run: Run
    progress: Progress
    finished: dict[str, TensorStatistics] = field(default_factory=dict)
    nothing: dict[str, TensorStatistics] = field(default_factory=dict)

    def statistics(self) -> Statistics:
        """Calibrate, in more than one pass where a first one shows that the plan stands elsewhere."""
        names = self.first_needed()
        hook = self.hook(names)
        dataset = self.data.opened(self.source.inputs, self.recipe)
        indices = select(len(dataset), self.recipe.calibration.selection)
        batch, lanes, checks = self.batch(hook, names, dataset, indices)
        work, part = self.work(hook, dataset, indices, batch, lanes, checks)
        blank = self.blank(dataset, len(indices), batch, part)
        seen = self.resumed(blank)
        if self.finished:
            names = self.still_needed()
            hook = self.hook(names)
        while names:
            checkpoint = Checkpoint(self.run.seconds, lambda found: self.save(blank, found))
            # What begins in float is made by what could be layers, too.
            placement = place(self.folded, with_integer_start(self.recipe))
            known = known_of(placement)
            shortcut = self.shortcut(names, hook, work, poolable(placement, known) & set(names), known.limit)
            seen = collect(
                hook,
                names,
                work,
                seen,
                known,
                shortcut,
                lambda done: self.progress("calibrate", done, part.stop - part.start),
                checkpoint,
            )
            self.finished.update((name, found) for name, found in seen.tensors.items() if found.elements)
            self.nothing.update((name, found) for name, found in seen.tensors.items() if not found.elements)
            # Where a tensor turns out to span a mask's range, the plan stands elsewhere: a second pass sees what it needs there.
            names = tuple(name for name in self.still_needed() if name not in seen.tensors)
            if names:
                hook, seen = self.hook(names), Seen({}, seen.kept)
        if seen is None:  # no activation is quantized
            seen = Seen({}, work.kept())
        self.report_non_finite()
        return replace(blank, samples=part.stop - part.start, tensors=self.finished, check_inputs=seen.kept)

    def first_needed(self) -> tuple[str, ...]:
        """Return the tensors that the plan needs, whether or not it finds masks: other data, or other grids, find others.

        Those of the first convolutions are among them where they stay float, so that ``integer_start`` and ``--strict`` have them.
        """
        names, masked = place(self.folded, with_integer_start(self.recipe)).observed(), possible(self.folded)
        names += place(self.folded, self.recipe).observed()
        with contextlib.suppress(PlanError):  # without those, nothing may be left
            if masked:
                names += place(self.folded, self.recipe, masked).observed()
        return tuple(dict.fromkeys(names))

    def still_needed(self) -> tuple[str, ...]:
        """Return the tensors that the plan needs, as far as is known by now, and that were not observed."""
        needed = place(self.folded, self.recipe, unresolvable(self.folded, self.finished, self.recipe)).observed()
        return tuple(name for name in needed if name not in self.finished)

    def hook(self, names: Sequence[str]) -> Hook:
        """Return the model, ready to hand out tensors."""
        if self.run.runtime == "torch":
            from calibration.hooks.torch import ProgramHook

            return ProgramHook(self.source.program, names, self.run.device, self.source.name, self.aliases(names))
        return Runner(
            lambda: with_outputs(self.folded, names),
            self.run.lanes.threads,
            self.source.name,
            unordered=self.unordered(names),
        )

    def unordered(self, names: Sequence[str]) -> frozenset[str]:
        """Return the tensors whose elements are counted in any order within a sample."""
        return frozenset() if self.recipe.calibration.channels else frozenset(names) - self.columns

    @functools.cached_property
    def columns(self) -> frozenset[str]:
        """The tensors of which the extremes of every column are counted."""
        return columns_needed(self.folded, self.recipe)

    def aliases(self, names: Sequence[str]) -> dict[str, str]:
        """Return what the program calls the tensors: of one that folding made, the one that holds its values in another shape."""
        found = dict(self.source.aliases)
        if self.source.program is None or self.recipe.calibration.channels:
            return found
        known = {node.name for node in self.source.program.graph.nodes}
        values = {str(value.name): value for node in self.folded.graph for value in node.outputs}
        for name in names:
            if name not in known and name not in found and name in values:
                reshaped = [str(value.name) for value in holders(values[name]) if value.name in known]
                found.update({name: reshaped[0]} if reshaped else {})
        return found

    def batch(
        self, hook: Hook, names: Sequence[str], dataset: Dataset, indices: NDArray[np.intp]
    ) -> tuple[int, Lanes, int]:
        """Return the batch size, how many batches are in work at once, and how many samples are kept for self-checks.

        The size is the model's or the user's, or `batch_for`'s; where memory is short, less, and one at a time.

        Raises:
            DataError: If not even one sample fits.
            UsageError: If the user's batch does not fit the model.
        """
        wanted = self.recipe.calibration.batch
        fixed = fixes_batch(hook.inputs)
        batch = fitted_batch(hook.inputs, wanted)
        if fixed and len(indices) < batch:
            raise DataError(
                f"the model takes batches of {batch} and there are {len(indices)} samples", "give more samples"
            )
        feeds = dataset.read(indices[: batch if fixed else 1])
        rows = batch if fixed else 1
        found = computed(hook, names, feeds)
        sample = (sum(v.nbytes for v in feeds.values()) + sum(v.nbytes for v in found.values())) // rows
        if not fixed and wanted is None:
            batch = batch_for(sample, weight_bytes(self.folded))
        held, lanes = resident_bytes(), self.run.lanes
        checks = min(CHECK_SAMPLES, max(batch, CHECK_BYTES // max(sample, 1)))
        if self.run.max_memory is not None:
            # Twice: inputs of operators, and what is counted.
            room = max(self.run.max_memory - held - COUNTED_BYTES, 0) // max(sample * 2, 1)
            if room < (batch if fixed else 1):
                raise DataError(
                    f"{mebibytes(self.run.max_memory)} are not enough: the model takes {mebibytes(held)} "
                    f"and each sample {mebibytes(sample * 2)}",
                    "raise --max-memory",
                )
            batch, checks = batch if fixed else min(batch, room), min(checks, room)
            if room < batch * lanes.workers:
                lanes = Lanes(lanes.threads)
        logger.info(
            "calibrating %d tensors over %d samples in batches of %d: about %s of memory",
            len(names),
            len(indices),
            min(batch, len(indices)),
            mebibytes(held + 2 * sample * min(batch * lanes.workers, len(indices))),
        )
        return batch, lanes, checks

    def work(
        self, hook: Hook, dataset: Dataset, indices: NDArray[np.intp], batch: int, lanes: Lanes, checks: int
    ) -> tuple[Work, Part]:
        """Return the batches of this run, and which samples they hold.

        Raises:
            UsageError: If a shard would be empty.
        """
        fixed = fixes_batch(hook.inputs)
        spans = boundaries(dataset, indices, batch, fixed)
        usable = sum(stop - start for start, stop in spans)
        if usable < len(indices):
            logger.warning(
                "the model takes batches of %d: the last %d samples are left out", batch, len(indices) - usable
            )
        shard, shards = self.run.shard
        mine = spans[len(spans) * shard // shards : len(spans) * (shard + 1) // shards]
        if not mine:
            raise UsageError(
                f"shard {shard} of {shards} is empty: there are {len(spans)} batches of {batch}",
                "make fewer shards, or lower --batch",
            )
        counting = Counting(
            observer_of(self.recipe),
            self.recipe.calibration.channels,
            self.recipe.calibration.momentum,
            self.recipe.calibration.allow_non_finite,
            usable,
        )
        part = Part(dataset.digest, usable, mine[0][0], mine[-1][1])
        masks = frozenset(str(value.name) for value in scores(self.folded))
        return Work(dataset, indices, mine, pilot_of(spans), counting, fixed, self.columns, lanes, checks, masks), part

    def blank(self, dataset: Dataset, chosen: int, batch: int, part: Part) -> Statistics:
        """Return the statistics with everything but what is counted."""
        wishes = self.recipe.calibration
        shuffled = chosen < len(dataset) if wishes.shuffle is None else wishes.shuffle
        selection = {
            "samples": chosen,
            "shuffle": shuffled,
            "seed": wishes.seed if shuffled else 0,
            "batch": batch,
            "channels": wishes.channels,
            "allow_non_finite": wishes.allow_non_finite,
        }
        runtime = self.run.runtime if self.run.device == "cpu" else f"{self.run.runtime} {self.run.device}"
        return Statistics(
            self.source.sha256,
            dataset.digest,
            preprocess_of(self.recipe),
            0,
            observer_of(self.recipe),
            {},
            {},
            selection,
            (part,),
            dataset.synthetic,
            runtime,
            wishes.momentum,
        )

    def shortcut(
        self, names: Sequence[str], hook: Hook, work: Work, pooled: frozenset[str], limit: float
    ) -> Shortcut | None:
        """Return a cheaper way to the extremes, where the model and the run allow one."""
        static = all(all(size is not None for size in spec.shape[1:]) for spec in hook.inputs)
        if not static or len(work.spans) < WORTH_A_SHORTCUT or not isinstance(hook, Runner) or work.counting.parts:
            return None
        if not pooled or work.lanes.apart:  # a thread that only counts is done before the next batch is
            return None

        def build(settled: list[str]) -> tuple[Hook, dict[str, tuple[str, int]]]:
            data, pooled = with_highest(self.folded, names, settled)
            unordered = self.unordered(names)
            return Runner(data, self.run.lanes.threads, self.source.name, unordered=unordered), pooled

        return Shortcut(pooled, limit, build)

    def save(self, blank: Statistics, seen: Seen) -> None:
        """Keep a checkpoint."""
        if self.run.partial is None:
            return
        unfinished = {
            "done": seen.done,
            "samples": seen.samples,
            "finished": sorted(self.finished),
            "shard": list(self.run.shard),
        }
        statistics = replace(
            blank, tensors={**self.finished, **seen.tensors}, check_inputs=seen.kept, unfinished=unfinished
        )
        with staged() as files:
            files.write(self.run.partial, statistics_file.serialized(statistics))

    def resumed(self, blank: Statistics) -> Seen | None:
        """Return what a checkpoint holds, where there is one to go on from.

        Raises:
            StatisticsError: If it belongs to another calibration.
        """
        if not self.run.resume or self.run.partial is None or not self.run.partial.is_file():
            return None
        try:
            held = statistics_file.load_any(self.run.partial)
        except StatisticsError as error:
            raise StatisticsError(f"{self.run.partial} cannot be gone on from: {error.what}", "remove it") from error
        if held.unfinished is None:
            raise StatisticsError(f"{self.run.partial} is no checkpoint", "remove it")
        for what in (
            "model_sha256",
            "data_sha256",
            "preprocess",
            "observer",
            "selection",
            "parts",
            "runtime",
            "momentum",
        ):
            if getattr(held, what) != getattr(blank, what):
                raise StatisticsError(
                    f"{self.run.partial} is the checkpoint of another calibration ({what} differs)",
                    "give the same options, or remove it to begin anew",
                )
        finished = set(held.unfinished["finished"])
        self.finished = {name: seen for name, seen in held.tensors.items() if name in finished}
        current = {name: seen for name, seen in held.tensors.items() if name not in finished}
        logger.info("going on from %s after %d samples", self.run.partial, held.unfinished["samples"])
        return Seen(current, held.check_inputs, held.unfinished["done"], held.unfinished["samples"])

    def report_non_finite(self) -> None:
        """Warn of every tensor in which something was not finite."""
        for name, seen in self.nothing.items():
            if seen.nan or seen.infinite:
                logger.warning(
                    "tensor '%s': none of its %d values is finite, so it has no range", name, seen.nan + seen.infinite
                )
        for name, seen in self.finished.items():
            if seen.nan or seen.infinite:
                logger.warning(
                    "tensor '%s': %d NaN and %d infinite of %d values were left out",
                    name,
                    seen.nan,
                    seen.infinite,
                    seen.elements + seen.nan + seen.infinite,
                )


def batch_for(sample: int, weights: int) -> int:
    """Return how many samples a batch has, where neither the model nor the user says.

    Args:
        sample: The bytes of one sample's inputs and observed tensors.
        weights: The bytes of the model's weights.
    """
    return max(1, min(LARGEST_BATCH, max(BATCH_BYTES, weights // PART_OF_WEIGHTS) // max(sample, 1)))


def resident_bytes() -> int:
    """Return how much memory the process holds; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return 0


def mebibytes(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / (1 << 20):.0f} MB" if count >= 10 << 20 else f"{count / (1 << 20):.2f} MB"
