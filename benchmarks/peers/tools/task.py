"""What every tool's script is given, and what it answers: one conversion, in a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Task:
    """One conversion.

    Attributes:
        model: The float model, an ONNX file.
        output: Where the integer one goes.
        feeds: Calibration samples by input name, sample after sample along the first axis.
        batch: How many samples the model takes at once while it calibrates.
    """

    model: Path
    output: Path
    feeds: dict[str, np.ndarray[Any, Any]]
    batch: int

    def batches(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        """Yield the samples, batch by batch; an incomplete last one is left out."""
        samples = len(next(iter(self.feeds.values())))
        for start in range(0, samples - self.batch + 1, self.batch):
            yield {name: values[start : start + self.batch] for name, values in self.feeds.items()}


class Batches:
    """The samples as ONNX Runtime's calibrators, and tools that took theirs over, ask for them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.left = task.batches()

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return the next batch, or None."""
        return next(self.left, None)

    def rewind(self) -> None:
        """Begin anew."""
        self.left = self.task.batches()


def serve(forms: Mapping[str, Callable[[Task], None]], *packages: str) -> None:
    """Do what the command line asks for, and print the seconds that it took and the versions of the tool's packages.

    The command line holds the model, the samples (``.npz``), the output, the form, and the batch; or ``--forms`` alone, which
    prints the forms. Loading the tool is not timed.

    Args:
        forms: How the tool can be used, by name.
        packages: The packages whose versions are told.
    """
    if sys.argv[1:] == ["--forms"]:
        print("\n" + json.dumps(list(forms)))
        return
    model, samples, output, form, batch = sys.argv[1:]
    with np.load(samples) as stored:
        feeds = {name: stored[name] for name in stored.files}
    task = Task(Path(model), Path(output), feeds, int(batch))
    begun = time.perf_counter()
    forms[form](task)
    seconds = time.perf_counter() - begun
    versions = {name: importlib.metadata.version(name) for name in packages}
    print("\n" + json.dumps({"seconds": seconds, "versions": versions}))
