"""The samples that tuning runs, and what a metric says of a quantized model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets import boundaries, fitted_batch, fixes_batch, select, usable
from calibration.errors import DataError
from calibration.hooks.onnxruntime import Runner
from quantcli.evaluation.evaluate import run_padded
from quantcli.evaluation.metrics import LABEL_METRICS, TopK, scores_of
from quantcli.recipe import resolve_target
from quantcli.scores import scored_alone
from quantcli.tune.candidates import Samples
from quantcli.tune.outputs import is_distribution
from quantcli.tune.room import JUDGES, wanted_samples
from quantcli.tune.score import LEAST_SAMPLES, compared, margins

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.datasets import Dataset, InputSpec
    from quantcli.load import LoadedModel
    from quantcli.recipe import Recipe
    from quantcli.sources import Data
    from quantcli.tune.score import Score

logger = logging.getLogger(__name__)

# Samples that are run at once.
BATCH = 32

# One in so many labelled samples is held back from a search.
HELD_BACK = 3


def tuning_samples(source: LoadedModel, folded: ir.Model, data: Data, recipe: Recipe) -> Samples | None:
    """Return calibration samples for tuning, drawn evenly: some for sweeps and others to judge; None where there are too few."""
    inputs = source.inputs
    dataset = data.opened(inputs, recipe)
    indices = select(len(dataset), recipe.calibration.selection)
    fixed = fixes_batch(inputs)
    size = fitted_batch(inputs, None) if fixed else min(BATCH, fitted_batch(inputs, recipe.calibration.batch))
    total = min(len(indices), wanted_samples(folded, recipe) + JUDGES)
    drawn = indices[np.linspace(0, len(indices) - 1, total).astype(np.intp)]
    if recipe.calibration.allow_non_finite:
        drawn = finite_of(dataset, drawn, inputs)
        total = len(drawn)
    judging = np.zeros(total, dtype=bool)
    judging[np.linspace(0, max(total - 1, 0), min(JUDGES, total // 3)).astype(np.intp)] = True
    parts = []
    for chosen in (drawn[~judging], drawn[judging]):
        spans = boundaries(dataset, chosen, size, fixed)
        parts.append(tuple(dataset.read(chosen[start:stop]) for start, stop in spans))
    return Samples(parts[0], parts[1], scored_alone(folded)) if all(parts) else None


def finite_of(dataset: Dataset, indices: NDArray[np.intp], inputs: Sequence[InputSpec]) -> NDArray[np.intp]:
    """Return the samples that hold finite numbers alone, but for what is masked."""
    reals = [spec for spec in inputs if spec.dtype.kind == "f"]

    def fits(index: int) -> bool:
        found = dataset.read(np.array([index]))
        return all(usable(found[spec.name], spec.masks).all() for spec in reals)

    kept = [index for index in indices if fits(index)]
    if len(kept) < len(indices):
        logger.warning("%d samples are not finite, and tuning goes without them", len(indices) - len(kept))
    return np.array(kept, dtype=np.intp)


def scorer(source: LoadedModel, data: Data, recipe: Recipe) -> tuple[Callable[[bytes], tuple[Score, Score]], str]:
    """Return what scores a quantized model's bytes on labelled data, and the data's digest.

    Every third sample is held back: there are two scores, of the others and of those.

    Raises:
        DataError: If the data has no labels, or too few samples for the drop that is asked for.
    """
    runner = Runner(source.runnable, what=source.name)
    dataset = data.opened(source.inputs, recipe)
    if dataset.labels is None:
        raise DataError("--max-drop needs labels and the data has none", "give --validate with labelled data")
    held = np.arange(len(dataset)) % HELD_BACK == HELD_BACK - 1
    if int((~held).sum()) < LEAST_SAMPLES:
        raise DataError(
            f"{len(dataset)} samples are too few to judge by: a third is held back, and at least {LEAST_SAMPLES} have to be left",
            f"give at least {-(-LEAST_SAMPLES * HELD_BACK // (HELD_BACK - 1))} (--validate)",
        )
    expected, distance, probabilities = judged(runner, dataset, recipe.tune.metric)

    exact = resolve_target(recipe).weight.pair_bits is None

    def score(written: bytes) -> tuple[Score, Score]:
        model = Runner(written, what="the quantized model", exact=exact)
        found, moved, _ = judged(model, dataset, recipe.tune.metric, probabilities)
        parts = [((found[part], expected[part]), (moved[part], distance[part])) for part in (~held, held)]
        return compared(*parts[0]), compared(*parts[1])

    return score, dataset.digest


def judged(
    runner: Runner, dataset: Dataset, metric: str, probabilities: bool | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.float64], bool]:
    """Return for every sample whether a model has it right, and by what margin; and whether its scores are probabilities.

    Args:
        runner: The model.
        dataset: The samples.
        metric: A key of ``LABEL_METRICS``.
        probabilities: Whether the scores are taken for probabilities; None to look.
    """
    labels = dataset.labels
    assert labels is not None  # noqa: S101 - the caller has looked
    batch = fitted_batch(runner.inputs, None)
    found: list[bool] = []
    distances: list[NDArray[np.float64]] = []
    indices = np.arange(len(dataset), dtype=np.intp)
    for start, stop in boundaries(dataset, indices, batch):
        feeds: dict[str, NDArray[Any]] = dataset.read(indices[start:stop])
        scores = scores_of(run_padded(runner, feeds, batch))
        if probabilities is None:
            probabilities = is_distribution(scores)
        for row, label in zip(scores, labels[start:stop], strict=True):
            top = TopK(LABEL_METRICS[metric])
            top.update(row[None], np.array([label]))
            found.append(top.hits == 1)
        distances.append(margins(scores, labels[start:stop], LABEL_METRICS[metric], probabilities))
    return np.array(found, dtype=bool), np.concatenate(distances), bool(probabilities)
