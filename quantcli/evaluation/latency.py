"""Latency: float and quantized in turn, so that a machine's moods meet both alike; medians and their ratio."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.datasets import samples_in

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calibration.hooks.onnxruntime import Runner


@dataclass(frozen=True)
class Latency:
    """Median seconds per run of the same batch.

    Attributes:
        float_seconds: The float model's.
        quantized_seconds: The quantized model's.
        batch: Samples per run.
        threads: Threads within an operator.
        runs: Runs of each.
    """

    float_seconds: float
    quantized_seconds: float
    batch: int
    threads: int
    runs: int

    @property
    def ratio(self) -> float:
        """Float over quantized: how many times faster the quantized model is."""
        return self.float_seconds / self.quantized_seconds


def measure(
    float_model: Runner, quantized: Runner, feeds: dict[str, NDArray[Any]], threads: int, runs: int = 31
) -> Latency:
    """Return the medians of interleaved runs, after a warm-up of three."""
    times: dict[int, list[float]] = {0: [], 1: []}
    runners = (float_model, quantized)
    for turn in range(runs + 3):
        for which, runner in enumerate(runners):
            start = time.perf_counter()
            runner.run(feeds)
            if turn >= 3:
                times[which].append(time.perf_counter() - start)
    batch = samples_in(feeds)
    return Latency(statistics.median(times[0]), statistics.median(times[1]), batch, threads, runs)
