"""The calibration loop: run the model batch by batch, count, and let every batch go."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration.errors import DataError
from calibration.observers import TensorStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from calibration.datasets.dataset import Dataset, InputSpec
    from calibration.observers import Counting

# How many samples are kept for self-checks: enough for a number that means something, few enough to be small.
CHECK_SAMPLES = 4

Span = tuple[int, int]


class Hook(Protocol):
    """A float model that runs a batch and hands out the asked tensors."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The model's inputs."""
        ...

    def run(self, feeds: dict[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run one batch and return the asked tensors by name."""
        ...

    def rest(self) -> None:
        """Let go of what can be loaded again when it is needed again."""
        ...


@dataclass(frozen=True, eq=False)
class Shortcut:
    """How the extremes of tensors with a known lowest value can be had without handing the tensors out.

    Attributes:
        pooled: The tensors that it can serve, once their minimum is settled: only the highest value is of interest then.
        limit: As long as no value is larger in magnitude, no operator of the model can make one that is not finite.
        build: Return, for some of the tensors, a hook that gives their highest values (one per channel), and the names of those.
    """

    pooled: frozenset[str]
    limit: float
    build: Callable[[list[str]], tuple[Hook, dict[str, str]]]


@dataclass(frozen=True, eq=False)
class Work:
    """What is to be run.

    Attributes:
        dataset: The samples.
        indices: The chosen ones, in order.
        spans: The batches of this run, as positions in ``indices``.
        pilot: The first batch of the whole calibration, which fixes how histograms look at their tensors.
        counting: What is counted.
        whole: Whether a batch is kept whole for self-checks, since the model fixes its batch size.
        columns: The tensors of which the extremes of every column are counted.
        apart: Whether a batch is counted in a thread of its own while the next one is computed. It pays where a core is free.
    """

    dataset: Dataset
    indices: NDArray[np.intp]
    spans: list[Span]
    pilot: Span
    counting: Counting
    whole: bool = False
    apart: bool = False
    columns: frozenset[str] = frozenset()

    def feeds(self, span: Span) -> dict[str, NDArray[Any]]:
        """Return a batch."""
        return self.dataset.read(self.indices[span[0] : span[1]])

    def kept(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return what is kept of the first batch: samples that are finite, where there are any."""
        if self.whole:
            return feeds
        rows = len(next(iter(feeds.values())))
        finite = np.ones(rows, dtype=bool)
        for values in feeds.values():
            if values.dtype.kind == "f":
                finite &= np.isfinite(values.reshape(rows, -1)).all(axis=1)
        chosen = np.flatnonzero(finite if finite.any() else ~finite)[:CHECK_SAMPLES]
        return {name: values[chosen] for name, values in feeds.items()}


@dataclass
class Seen:
    """What was counted so far.

    Attributes:
        tensors: By tensor name.
        kept: The first samples, by input name.
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

    def offer(self, seen: Seen) -> None:
        """Keep what was counted if it is time."""
        if time.monotonic() - self.last >= self.seconds:
            self.save(seen)
            self.last = time.monotonic()


def collect(
    hook: Hook,
    tensors: Sequence[str],
    work: Work,
    seen: Seen | None = None,
    floors: dict[str, float] | None = None,
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
        floors: The lowest value that a tensor can have, where it is known.
        shortcut: A cheaper way to the extremes, where there is one.
        progress: Called with the number of samples done after every batch.
        checkpoint: Keeps what was counted; also where the user interrupts.

    Raises:
        DataError: If a value is not finite and that is not allowed.
    """
    counting = work.counting
    if seen is None or not seen.done:
        seen = Seen({name: TensorStatistics.for_counting(counting, name in work.columns) for name in tensors})
        prepare(hook, seen, work)
    for name, floor in (floors or {}).items():
        if name in seen.tensors:
            seen.tensors[name].floor = floor
    checkpoint = checkpoint or Checkpoint()
    light: Light | None = None
    with interruptions() as interrupted, Beside(work.apart and bool(counting.parts)) as beside:

        def counted(span: Span) -> None:
            seen.done, seen.samples = seen.done + 1, seen.samples + span[1] - span[0]
            progress(seen.samples)
            checkpoint.offer(seen)
            if interrupted():
                checkpoint.save(seen)
                raise KeyboardInterrupt

        for span in work.spans[seen.done :]:
            feeds = work.feeds(span)
            if not seen.kept:
                seen.kept = work.kept(feeds)
            if light is not None and light.count(feeds, span):
                counted(span)
                continue
            found = computed(hook, list(seen.tensors), feeds)
            beside.wait()
            beside.start(functools.partial(count, found, seen.tensors, span, work), functools.partial(counted, span))
            light = None
            if shortcut is not None and not counting.parts:
                light = Light.of(shortcut, hook, seen, feeds)
                shortcut = None  # built once; given up for good where a value turns out too large
        beside.wait()
    for held in seen.tensors.values():
        if held.histogram is not None:
            held.histogram.flush()
    return seen


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Hold back Ctrl-C (and a request to end) until a batch is counted whole; give a function that tells whether one came.

    A second Ctrl-C is not held back.
    """
    came: list[int] = []

    def remember(number: int, frame: object) -> None:
        del frame
        if came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(hook: Hook, seen: Seen, work: Work) -> None:
    """Let histograms see the first batch of the whole calibration, where this run does not begin with it."""
    if "histogram" not in work.counting.parts or (work.spans and work.spans[0] == work.pilot):
        return
    found = computed(hook, list(seen.tensors), work.feeds(work.pilot))
    for name in list(found):
        seen.tensors[name].prepare(found.pop(name), work.pilot[1] - work.pilot[0], work.counting)


def computed(hook: Hook, names: Sequence[str], feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return tensors of one batch; inputs among them are what was fed."""
    found = hook.run(feeds, [name for name in names if name not in feeds])
    return {name: found[name] if name in found else feeds[name] for name in names}


class Beside:
    """Counts a batch in a thread of its own while the next one is computed; one at a time, in order.

    Args:
        apart: Whether there is a thread; without one, a batch is counted where it was computed.
    """

    def __init__(self, apart: bool) -> None:
        self.executor = ThreadPoolExecutor(1) if apart else None
        self.pending: tuple[Future[None], Callable[[], None]] | None = None

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        if self.executor is not None:
            self.executor.shutdown()

    def start(self, count: Callable[[], None], after: Callable[[], None]) -> None:
        """Begin to count a batch; ``after`` is called here, when it is waited for."""
        if self.executor is None:
            count()
            after()
        else:
            self.pending = self.executor.submit(count), after

    def wait(self) -> None:
        """Wait for the batch that is being counted; what its counting raised is raised here."""
        if self.pending is not None:
            future, after = self.pending
            self.pending = None
            future.result()
            after()


def count(found: dict[str, NDArray[Any]], tensors: dict[str, TensorStatistics], span: Span, work: Work) -> None:
    """Count one batch; every tensor is let go as soon as it was counted.

    Raises:
        DataError: If a value is not finite and that is not allowed, naming tensor and samples.
    """
    rows = span[1] - span[0]
    for name in list(found):
        values = found.pop(name)
        if span == work.pilot:
            tensors[name].prepare(values, rows, work.counting)
        try:
            tensors[name].update(values, span[0], rows, work.counting)
        except DataError as error:
            raise DataError(
                f"tensor '{name}', samples {span[0]} to {span[1] - 1}: {error.what}",
                "look for a division by zero or an overflow in the model, or clean the data, or --allow-non-finite",
            ) from error


@dataclass
class Light:
    """The shortcut at work.

    Attributes:
        hook: Gives the highest values of the settled tensors, and the others whole.
        names: Where the highest values stand, by tensor.
        sizes: How many elements a sample has in each tensor.
        limit: Beyond which a value is too large for the shortcut.
        seen: What was counted so far.
    """

    hook: Hook
    names: dict[str, str]
    sizes: dict[str, int]
    limit: float
    seen: Seen

    @classmethod
    def of(cls, shortcut: Shortcut, whole: Hook, seen: Seen, feeds: dict[str, NDArray[Any]]) -> Light | None:
        """Return the shortcut for the tensors that are settled after a first batch; None where there are none."""
        settled = [name for name, held in seen.tensors.items() if name in shortcut.pooled and held.settled]
        if not settled:
            return None
        whole.rest()
        hook, names = shortcut.build(settled)
        rows = len(next(iter(feeds.values())))
        sizes = {name: held.elements // rows for name, held in seen.tensors.items()}
        return cls(hook, names, sizes, shortcut.limit, seen)

    def count(self, feeds: dict[str, NDArray[Any]], span: Span) -> bool:
        """Run one batch and count it; return whether every value was small enough. If not, nothing is counted."""
        asked = [self.names.get(name, name) for name in self.seen.tensors if name not in feeds]
        found = self.hook.run(feeds, asked)
        rows = span[1] - span[0]
        extremes = {}
        for name in self.seen.tensors:
            values = feeds[name] if name in feeds else found.pop(self.names.get(name, name))
            highest = float(values.max())
            lowest = self.seen.tensors[name].minimum if name in self.names else float(values.min())
            if not (highest <= self.limit and lowest >= -self.limit):  # false for NaN too
                return False
            extremes[name] = lowest, highest
        for name, (lowest, highest) in extremes.items():
            self.seen.tensors[name].count_extremes(lowest, highest, self.sizes[name] * rows)
        return True
