"""Access to the bed (real models and data, named by QUANTCLI_BED), and interleaved timing."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def bed_folder() -> Path:
    """Return the bed's folder, or leave with a word about how to name it."""
    folder = os.environ.get("QUANTCLI_BED")
    if not folder or not (Path(folder) / "eval_bed.py").is_file():
        sys.exit("error: QUANTCLI_BED does not name a bed; set it to the folder that holds eval_bed.py")
    return Path(folder)


def load_bed() -> Any:
    """Return the bed's evaluation module."""
    spec = importlib.util.spec_from_file_location("eval_bed", bed_folder() / "eval_bed.py")
    if spec is None or spec.loader is None:
        sys.exit("error: eval_bed.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(bed: Any, wanted: Sequence[str]) -> list[str]:
    """Return the wanted entries (all by default) whose model is there; say which are not."""
    found = []
    for name in wanted or list(bed.BED):
        if name not in bed.BED:
            sys.exit(f"error: the bed has no entry '{name}'; it has {', '.join(bed.BED)}")
        if (bed_folder() / "models" / bed.BED[name]["onnx"]).is_file():
            found.append(name)
        else:
            print(f"{name}: its model is not there, skipped", file=sys.stderr)
    return found


def interleaved(runs: int, *actions: Callable[[], object], least: float = 0.0, warm: int = 5) -> list[float]:
    """Return the median seconds of each action, run in turn after some warm-ups, in another order each time.

    What ran before an action leaves the caches as it found use for them; so none comes always after the same one.

    Args:
        runs: How many times each is timed.
        actions: What is timed.
        least: About how many seconds an action is repeated for while it is timed. Threads of the action before it, which wait for
            work and turn in circles, would disturb a short one.
        warm: How many times each is run before.
    """
    times: list[list[float]] = [[] for _ in actions]
    repeats = [1 for _ in actions]
    for turn in range(runs + warm):
        for place in random.Random(turn).sample(range(len(actions)), len(actions)):
            start = time.perf_counter()
            for _ in range(repeats[place]):
                actions[place]()
            took = (time.perf_counter() - start) / repeats[place]
            if turn >= warm:
                times[place].append(took)
            else:
                repeats[place] = max(1, math.ceil(least / took))
    return [statistics.median(spent) for spent in times]


def timed_blocks(blocks: int, runs: int, *actions: Callable[[], object]) -> list[list[float]]:
    """Return the median seconds of each action, for several blocks of interleaved runs."""
    return [interleaved(runs, *actions) for _ in range(blocks)]


def median_ratio(blocks: Sequence[Sequence[float]], above: int, below: int) -> float:
    """Return the median over the blocks of one action's time over another's in the same block."""
    return statistics.median(block[above] / block[below] for block in blocks)


def session(path: Path) -> Any:
    """Return a session with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def machine() -> str:
    """Return the processor's name and its cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def as_feeds(values: NDArray[Any] | dict[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    """Return a split's values by input name."""
    return values if isinstance(values, dict) else {name: np.asarray(values)}
