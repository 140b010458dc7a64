"""Batches in work at once: computed beside one another, or one counted while the next is computed; always counted in order."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

Batch = TypeVar("Batch")
Computed = TypeVar("Computed")

# How many batches that gave little may wait to be counted, for each thread that computes.
WAITING = 2


@dataclass(frozen=True)
class Lanes:
    """How many batches are in work at once. They are counted in order whatever their number, so that it changes no statistics.

    Attributes:
        threads: Threads of the runtime.
        computing: How many batches the model computes beside one another.
        workers: How many are in work at once, computed or counted: all that is ever held of the tensors.
    """

    threads: int = 0
    computing: int = 1
    workers: int = 1

    @classmethod
    def of(cls, threads: int, cores: int, beside: bool) -> Lanes:
        """Return what keeps so many threads busy.

        Two batches beside one another lose less to waiting than one batch on twice the threads. A single thread computes batch
        after batch; another core, where there is one, counts the last batch meanwhile.

        Args:
            threads: Threads for computing; 0 for as many as there are cores.
            cores: How many there are.
            beside: Whether the runtime can compute batches beside one another.
        """
        threads = threads or cores
        if threads > 1 and beside:
            return cls(threads - 1, 2, 2)  # the runtime's threads are shared; each batch has its own besides
        return cls(threads, 1, 2 if threads < cores else 1)

    @property
    def apart(self) -> bool:
        """Whether one thread computes batches and another one does nothing but count them."""
        return self.computing == 1 and self.workers > 1


ONE_BY_ONE = Lanes()


def in_line(
    lanes: Lanes,
    batches: Iterator[Batch],
    compute: Callable[[Batch], Computed],
    count: Callable[[Batch, Computed], None],
    after: Callable[[Batch], None],
    soon: Callable[[Computed], bool] = lambda _: False,
) -> None:
    """Compute and count batches, several in work at once where there are lanes for it; they are counted in order.

    Args:
        lanes: How many.
        batches: The batches.
        compute: Computes one; in several threads at once where lanes compute several.
        count: Counts what was computed; one at a time.
        after: Called once a batch was counted, before the next one is; may raise, and then nothing more is counted.
        soon: Whether what was computed is counted sooner than another thread would begin to, or wake.
    """
    if lanes.computing > 1:
        Abreast(batches, compute, count, after, soon).run(lanes.workers)
        return
    with ThreadPoolExecutor(1) if lanes.apart else contextlib.nullcontext() as apart:
        pending: tuple[Future[None], Batch] | None = None
        for batch in batches:
            found = compute(batch)
            finish(pending, after)
            pending = None
            if apart is None or soon(found):
                count(batch, found)
                after(batch)
            else:
                pending = apart.submit(count, batch, found), batch
            del found  # it is let go as it is counted
        finish(pending, after)


def finish(pending: tuple[Future[None], Batch] | None, after: Callable[[Batch], None]) -> None:
    """Wait for a batch that is being counted, where there is one; what its counting raised is raised here."""
    if pending is not None:
        pending[0].result()
        after(pending[1])


class Abreast(Generic[Batch, Computed]):
    """Threads that each take the next batch, compute it, and count it when those before it were counted.

    Where a batch gave little, its thread does not wait for that: whoever counts the one before it counts it, too.

    Args:
        batches: The batches.
        compute: Computes one.
        count: Counts what was computed.
        after: Called once a batch was counted.
        soon: Whether what was computed is little.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        compute: Callable[[Batch], Computed],
        count: Callable[[Batch, Computed], None],
        after: Callable[[Batch], None],
        soon: Callable[[Computed], bool],
    ) -> None:
        self.batches, self.compute, self.count, self.after, self.soon = batches, compute, count, after, soon
        self.taking, self.turn = threading.Lock(), threading.Condition()
        self.taken, self.counted, self.room, self.counting = 0, 0, 0, False
        self.ready: dict[int, tuple[Batch, Computed]] = {}
        self.failure: tuple[int, BaseException] | None = None

    def run(self, workers: int) -> None:
        """Work until no batch is left; what went wrong with the first batch that could not be counted is raised here."""
        self.room = WAITING * workers
        others = [threading.Thread(target=self.work) for _ in range(workers - 1)]
        for thread in others:
            thread.start()
        self.work()
        for thread in others:
            thread.join()
        if self.failure is not None:
            raise self.failure[1]

    def work(self) -> None:
        """Take batches while there are any."""
        number = -1
        try:
            while True:
                with self.taking:
                    number = self.taken
                    batch = None if self.failure is not None else next(self.batches, None)
                    self.taken += 1
                if batch is None:
                    return
                self.hand_in(number, batch, self.compute(batch))
                self.count_ready()
                self.wait(lambda: len(self.ready) < self.room)
        except BaseException as error:  # noqa: BLE001 - raised where the threads are waited for
            self.fail(number, error)

    def hand_in(self, number: int, batch: Batch, found: Computed) -> None:
        """Let a batch be counted, much of it only at its turn, so that no more of it is held than threads compute."""
        if not self.soon(found):
            self.wait(lambda: self.counted == number)
        with self.turn:
            self.ready[number] = batch, found

    def count_ready(self) -> None:
        """Count what is ready and at its turn, unless another thread does."""
        while (ready := self.next_ready()) is not None:
            try:
                self.count(*ready)
                self.after(ready[0])
            except BaseException as error:  # noqa: BLE001 - raised where the threads are waited for
                self.fail(self.counted, error)
            with self.turn:
                self.counted, self.counting = self.counted + 1, False
                self.turn.notify_all()

    def next_ready(self) -> tuple[Batch, Computed] | None:
        """Return what this thread is to count now."""
        with self.turn:
            if self.counting or self.counted not in self.ready or self.stopped:
                return None
            self.counting = True
            return self.ready.pop(self.counted)

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait for something, or for a failure after which it may not come."""
        with self.turn:
            self.turn.wait_for(lambda: until() or self.stopped)

    def fail(self, number: int, error: BaseException) -> None:
        """Keep what went wrong with a batch, unless one before it failed."""
        with self.turn:
            if self.failure is None or number < self.failure[0]:
                self.failure = number, error
            self.turn.notify_all()

    @property
    def stopped(self) -> bool:
        """Whether all batches before one that failed were counted; nothing more is."""
        return self.failure is not None and self.failure[0] <= self.counted
