"""The calibration loop: run the model batch by batch, count, and let every batch go."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets import usable
from calibration.errors import DataError
from calibration.lanes import ONE_BY_ONE, Lanes, in_line
from calibration.layout import Layout
from calibration.observers import TensorStatistics, glance
from calibration.shortcut import Light, computed
from calibration.together import Frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from calibration.datasets.dataset import Dataset
    from calibration.layout import Frame, Hook
    from calibration.observers import Counting
    from calibration.shortcut import Shortcut

    Batch = tuple["Span", dict[str, NDArray[Any]]]
    Computed = tuple["Light | Frame | None", dict[str, NDArray[Any]]]

# How many samples are kept for self-checks: enough for a number that means something, few enough to be small. Where some are not
# finite, so many are looked at for others.
CHECK_SAMPLES, LOOKED_AT = 4, 32
# So many samples tell where the tails of tensors begin, but no more than this part of all batches: they are run once more.
PILOT_SAMPLES, PILOT_PART = 8, 1 / 16
# Fewer values are counted sooner than another thread would begin to.
LITTLE = 1 << 17

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Work:
    """What is to be run.

    Attributes:
        dataset: The samples.
        indices: The chosen ones, in order.
        spans: The batches of this run, as positions in ``indices``.
        pilot: The first batches of the whole calibration, which fix how histograms look at their tensors.
        counting: What is counted.
        whole: Whether a batch is kept whole for self-checks, since the model fixes its batch size.
        columns: The tensors of which the extremes of every column are counted.
        lanes: How many batches are in work at once.
        checks: How many samples are kept for self-checks otherwise.
        masks: The tensors in which −infinity stands for what is masked: it counts as the lowest value there is.
    """

    dataset: Dataset
    indices: NDArray[np.intp]
    spans: list[Span]
    pilot: tuple[Span, ...]
    counting: Counting
    whole: bool = False
    columns: frozenset[str] = frozenset()
    lanes: Lanes = ONE_BY_ONE
    checks: int = CHECK_SAMPLES
    masks: frozenset[str] = frozenset()

    def feeds(self, span: Span) -> dict[str, NDArray[Any]]:
        """Return a batch."""
        return self.dataset.read(self.indices[span[0] : span[1]])

    def kept(self) -> dict[str, NDArray[Any]]:
        """Return what is kept for self-checks: of the samples that have the first one's shape the first finite ones, or others."""
        if self.whole:
            return self.feeds(self.spans[len(self.spans) // 2])  # what begins a stream says little of it
        left = self.indices[self.spans[0][0] : self.spans[-1][1]][:LOOKED_AT]
        shape = self.dataset.shape_of(int(left[0]))
        alike = np.array([index for index in left.tolist() if self.dataset.shape_of(index) == shape], dtype=left.dtype)
        feeds = self.dataset.read(alike[: self.checks])
        if not finite_rows(feeds, self.masks).all():
            feeds = self.dataset.read(alike)
        finite = finite_rows(feeds, self.masks)
        chosen = np.flatnonzero(finite if finite.any() else ~finite)[: self.checks]
        return {name: values[chosen] for name, values in feeds.items()}


@dataclass(frozen=True)
class Known:
    """What is known of tensors before anything is seen of them.

    Attributes:
        ends: By name, the lowest value that a tensor can have; and the highest, infinity where that is not known.
        limit: As long as no value is larger in magnitude, none of a tensor with a highest value can be NaN.
    """

    ends: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    limit: float = 0.0


@dataclass
class Seen:
    """What was counted so far.

    Attributes:
        tensors: By tensor name.
        kept: Samples for self-checks, by input name; none before the end.
        done: How many batches were run.
        samples: How many samples they held.
    """

    tensors: dict[str, TensorStatistics]
    kept: dict[str, NDArray[Any]] = field(default_factory=dict)
    done: int = 0
    samples: int = 0


@dataclass
class Checkpoint:
    """Keeps what was counted, every so often.

    Attributes:
        seconds: How often.
        save: Keeps it.
    """

    seconds: float = float("inf")
    save: Callable[[Seen], None] = lambda _: None
    last: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self.last >= self.seconds

    def keep(self, seen: Seen) -> None:
        """Keep what was counted."""
        self.save(seen)
        self.last = time.monotonic()


def collect(
    hook: Hook,
    tensors: Sequence[str],
    work: Work,
    seen: Seen | None = None,
    known: Known | None = None,
    shortcut: Shortcut | None = None,
    progress: Callable[[int], None] = lambda _: None,
    checkpoint: Checkpoint | None = None,
) -> Seen:
    """Run the batches and return what the observers counted.

    Args:
        hook: The model.
        tensors: The names of the float tensors to observe.
        work: The batches.
        seen: What an earlier run counted, to go on from.
        known: What is known of the tensors beforehand.
        shortcut: A cheaper way to the extremes, where there is one.
        progress: Called with the number of samples done after every batch.
        checkpoint: Keeps what was counted; also where the user interrupts.

    Raises:
        DataError: If a value is not finite and that is not allowed.
    """
    counting = work.counting
    if seen is None or not seen.done:
        seen = Seen({name: TensorStatistics.for_counting(counting, name in work.columns) for name in tensors})
    known = known or Known()
    for name in seen.tensors.keys() & known.ends.keys():
        seen.tensors[name].floor, ceiling = known.ends[name]
        if not counting.allow_non_finite:  # else what is not finite has to be counted
            seen.tensors[name].ceiling = ceiling
    if not seen.done:
        prepare(hook, seen, work)
    checkpoint = checkpoint or Checkpoint()
    counter, left = Counter(hook, seen, work, known.limit), work.spans[seen.done :]
    with interruptions() as interrupted:

        def batches() -> Iterator[Batch]:
            for span in left:
                feeds = work.feeds(span)
                if shortcut is not None and span is left[0] and not counting.parts:
                    counter.take(shortcut, feeds)
                yield span, feeds

        def counted(batch: Batch) -> None:
            start, stop = batch[0]
            seen.done, seen.samples = seen.done + 1, seen.samples + stop - start
            progress(seen.samples)
            if checkpoint.due or interrupted():
                counter.settle()
                checkpoint.keep(seen)
            if number := interrupted():
                raise interruption(number)

        in_line(work.lanes, batches(), counter.compute, counter.count, counted, is_little)
        counter.settle()
        if number := interrupted():  # while the last batch was counted in another thread
            checkpoint.keep(seen)
            raise interruption(number)
    for held in seen.tensors.values():
        if held.histogram is not None:
            held.histogram.flush()
    if not seen.kept and work.spans:  # at the end, when no batch is held any more
        seen.kept = work.kept()
    return seen


def interruption(number: int) -> KeyboardInterrupt:
    """Return what a signal raises: it says its name where that is not Ctrl-C's."""
    return KeyboardInterrupt(*([] if number == signal.SIGINT else [signal.Signals(number).name]))


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], int]]:
    """Hold back Ctrl-C (and a request to end) until a batch is counted whole; give a function that tells which signal came, or 0.

    A second Ctrl-C is not held back.
    """
    came: list[int] = []

    def remember(number: int, frame: object) -> None:
        del frame
        if came:
            raise interruption(number)
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pilot_of(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return the first of a calibration's batches: those that hold enough samples to tell where tails begin."""
    most = max(1, int(PILOT_PART * len(spans)))
    enough = next((n for n, (_, stop) in enumerate(spans, 1) if stop - spans[0][0] >= PILOT_SAMPLES), len(spans))
    return tuple(spans[: min(enough, most)])


def prepare(hook: Hook, seen: Seen, work: Work) -> None:
    """Let histograms see the first batches of the whole calibration, unless that is the one that this run begins with."""
    if "histogram" not in work.counting.parts or tuple(work.spans[:1]) == work.pilot:
        return
    names, first = list(seen.tensors), work.pilot[0]
    sizes: dict[str, int] = {}
    glances: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}

    def look(span: Span, found: dict[str, NDArray[Any]]) -> None:
        for name in list(found):
            values = found.pop(name)
            if span == first:
                sizes[name] = values.size
            glances[name].append(glance(values, len(work.pilot)))

    in_line(work.lanes, iter(work.pilot), lambda span: computed(hook, names, work.feeds(span)), look, lambda _: None)
    for name in names:
        seen.tensors[name].prepare_from(sizes[name], first[1] - first[0], work.counting, glances[name])


def finite_rows(feeds: dict[str, NDArray[Any]], masks: frozenset[str]) -> NDArray[np.bool_]:
    """Tell of each sample of a batch whether all of it is finite, but for −infinity in what masks."""
    rows = len(next(iter(feeds.values())))
    finite = np.ones(rows, dtype=bool)
    for name, values in feeds.items():
        if values.dtype.kind == "f":
            finite &= usable(values, name in masks).reshape(rows, -1).all(axis=1)
    return finite


def is_little(made: Computed) -> bool:
    """Tell whether what a batch gave is so little that it is counted at once."""
    return sum(values.size for values in made[1].values()) < LITTLE


@dataclass
class Counter:
    """Computes batches and counts them, by the shortcut while there is one, or all tensors together where that can be.

    Attributes:
        hook: The model.
        seen: What was counted so far.
        work: The batches.
        limit: Beyond which a value may make others that are not finite.
        light: The shortcut at work.
        frames: Batches that are counted together; None before the first batch, and where they cannot be.
        begun: Whether a batch was counted.
    """

    hook: Hook
    seen: Seen
    work: Work
    limit: float
    light: Light | None = None
    frames: Frames | None = None
    begun: bool = False

    def take(self, shortcut: Shortcut, feeds: dict[str, NDArray[Any]]) -> None:
        """Take a shortcut, as far as the first sample of a batch shows that it serves."""
        sample = feeds if self.work.whole else {name: values[:1] for name, values in feeds.items()}
        self.light = Light.of(shortcut, self.hook, self.seen.tensors, sample)

    def compute(self, batch: Batch) -> Computed:
        """Run a batch; return the shortcut that was taken or the frame that it is in, and what the model gave."""
        feeds = batch[1]
        light = self.light
        if light is not None:
            return light, light.run(feeds)
        if self.frames is not None and (held := self.frames.run(feeds)) is not None:
            return held
        return None, computed(self.hook, list(self.seen.tensors), feeds)

    def count(self, batch: Batch, made: Computed) -> None:
        """Count a batch; the whole tensors, where a value was too large for the shortcut, which is given up then."""
        (span, feeds), (way, found) = batch, made
        if isinstance(way, Light):
            if way.count(found, span[1] - span[0]):
                return
            self.light, found, way = None, computed(self.hook, list(self.seen.tensors), feeds), None
        if way is not None and self.frames is not None:
            if not self.frames.count(way, span[0]):
                self.count_each(found, span)
            self.frames.free(way)
            return
        alone = self.work.counting.parts == {"histogram"} and not self.work.columns
        layout = Layout.of(found) if alone and not self.begun else None
        self.count_each(found, span)
        self.begun = True
        if layout is not None and Frames.pay(layout, self.seen.tensors):
            self.frames = Frames(layout, feeds, span[1] - span[0], self.seen.tensors, self.hook.frame)

    def count_each(self, found: dict[str, NDArray[Any]], span: Span) -> None:
        """Count one batch, tensor by tensor; each is let go as soon as it was counted.

        Those that are hardly read come last: a value of the others that is too large tells that they have to be.
        """
        tensors = self.seen.tensors
        sealed = [name for name in found if tensors[name].sealed]
        for name in [name for name in found if not tensors[name].sealed]:
            self.count_one(name, found.pop(name), span)
        if sealed and any(max(-held.minimum, held.maximum) > self.limit for held in tensors.values()):
            for held in tensors.values():
                held.ceiling = None
        for name in sealed:
            self.count_one(name, found.pop(name), span)

    def count_one(self, name: str, values: NDArray[Any], span: Span) -> None:
        """Count one tensor of a batch.

        Raises:
            DataError: If a value is not finite and that is not allowed, naming tensor and samples.
        """
        held, rows, counting = self.seen.tensors[name], span[1] - span[0], self.work.counting
        if name in self.work.masks and values.dtype.kind == "f":
            values = np.maximum(values, np.finfo(values.dtype).min)
        if self.work.pilot == (span,):
            held.prepare(values, rows, counting)
        try:
            held.update(values, span[0], rows, counting)
        except DataError as error:
            raise DataError(
                f"tensor '{name}', samples {span[0]} to {span[1] - 1}: {error.what}",
                "look for a division by zero or an overflow in the model, or clean the data, or --allow-non-finite",
            ) from error

    def settle(self) -> None:
        """Put into the statistics what was counted together."""
        if self.frames is not None:
            self.frames.settle()
