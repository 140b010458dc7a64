"""The calibration loop: run the model batch by batch, count, and let every batch go."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from calibration.datasets.dataset import batches, fixes_batch
from calibration.errors import DataError
from calibration.observers import OBSERVERS
from calibration.statistics import TensorStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from calibration.datasets.dataset import Dataset
    from calibration.hooks.onnxruntime import Runner

logger = logging.getLogger(__name__)

# How many samples are kept for self-checks: enough for a number that means something, few enough to be small.
CHECK_SAMPLES = 4


def collect(
    runner: Runner,
    tensors: Sequence[str],
    dataset: Dataset,
    indices: NDArray[np.intp],
    batch: int,
    observer: str = "minmax",
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, TensorStatistics], dict[str, NDArray[Any]], int]:
    """Run the chosen samples and return what the observers counted.

    Args:
        runner: The model, with every asked tensor among its outputs or inputs.
        tensors: The names of the float tensors to observe.
        dataset: The samples.
        indices: Which of them, in which order.
        batch: The batch size.
        observer: A key of ``OBSERVERS``.
        progress: Called with the number of samples done after every batch.

    Returns:
        The statistics by tensor name, the first samples by input name, and the number of samples that were run. Where the
        model fixes its batch size, samples that do not fill a last batch are left out.

    Raises:
        DataError: If a value is not finite, or there are too few samples for one batch.
    """
    seen = {name: OBSERVERS[observer]() for name in tensors}
    inputs = {spec.name for spec in runner.inputs}
    fixed = fixes_batch(runner.inputs)
    usable = len(indices) - len(indices) % batch if fixed else len(indices)
    if not usable:
        raise DataError(f"the model takes batches of {batch} and there are {len(indices)} samples", "give more samples")
    if usable < len(indices):
        logger.warning("the model takes batches of %d: the last %d samples are left out", batch, len(indices) - usable)
    asked = [name for name in tensors if name not in inputs]
    kept: dict[str, NDArray[Any]] = {}
    done = 0
    for feeds in batches(dataset, indices[:usable], batch):
        if not kept:
            kept = {
                name: values[: max(CHECK_SAMPLES, batch) if fixed else CHECK_SAMPLES] for name, values in feeds.items()
            }
        computed = {**feeds, **runner.run(feeds, asked)}
        for name, counter in seen.items():
            try:
                counter.update(computed[name])
            except DataError as error:
                raise DataError(
                    f"tensor '{name}', samples {done} to {done + batch - 1}: {error.what}",
                    "look for a division by zero or an overflow in the model, or clean the data",
                ) from error
        done += len(next(iter(feeds.values())))
        progress(done)
    found = {n: TensorStatistics(c.minimum, c.maximum, c.elements) for n, c in seen.items() if c.elements}
    return found, kept, done
