"""Kernels: what ONNX Runtime spends on each operator of a model, by its own profiler."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.hooks.onnxruntime import Runner

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from calibration.hooks.onnxruntime import Source

RUNS, WARM_UPS = 20, 3


@dataclass(frozen=True)
class Kernel:
    """What the nodes of one operator take, in the graph that the runtime has optimized.

    Attributes:
        operator: The operator, such as QLinearConv.
        nodes: How many nodes.
        seconds: What they take together, per run.
    """

    operator: str
    nodes: int
    seconds: float


def kernels(
    model: Source | Callable[[], Any], feeds: dict[str, NDArray[Any]], threads: int, runs: int = RUNS
) -> tuple[Kernel, ...]:
    """Return the time of every operator, the most first, by the medians over runs of one batch.

    Raises:
        RunError: If ONNX Runtime refuses the model, or fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(model, threads, profile=Path(folder) / "profile")
        for _ in range(runs + WARM_UPS):
            runner.run(feeds)
        events = json.loads(Path(runner.session.end_profiling()).read_text())
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            times[str(event["args"].get("op_name", "?")), str(event["name"])].append(event["dur"] * 1e-6)
    spent: dict[str, float] = defaultdict(float)
    nodes: Counter[str] = Counter()
    for (operator, _), seconds in times.items():
        # A node in a loop's body runs several times to a run.
        per_run = len(seconds) / (runs + WARM_UPS)
        spent[operator] += statistics.median(seconds[int(per_run * WARM_UPS) :]) * per_run
        nodes[operator] += 1
    found = [Kernel(operator, nodes[operator], seconds) for operator, seconds in spent.items()]
    return tuple(sorted(found, key=lambda kernel: (-kernel.seconds, kernel.operator)))
