"""From files to figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.datasets import fitted_batch, fixes_batch, open_dataset, select
from quantcli import sidecar as sidecar_file
from quantcli.errors import ModelError
from quantcli.evaluation.evaluate import evaluate
from quantcli.load import load
from quantcli.progress import Progress, silent
from quantcli.report.figures import Figures, figures
from quantcli.sources import Data

if TYPE_CHECKING:
    from calibration.datasets import Selection
    from quantcli.load import Opening
    from quantcli.recipe import Recipe

# Samples whose activations are drawn.
DRAWN = 16


def made(
    quantized: Path,
    reference: Path,
    data: Path,
    metric: str | None,
    recipe: Recipe,
    labels: Path | str | None,
    split: str | None,
    selection: Selection,
    batch: int | None = None,
    latency: bool = False,
    threads: int = 1,
    opening: Opening | None = None,
    progress: Progress = silent,
) -> Figures:
    """Evaluate a quantized model, layer by layer, and return what its report shows.

    Args:
        quantized: The quantized model, ``.onnx``, its sidecar beside it.
        reference: The float model.
        data: Evaluation data.
        metric: As `quantcli.evaluate` has it.
        recipe: Where the preprocessing stands.
        labels: Labels, where the data does not carry them.
        split: Keep only the labels' rows of this split.
        selection: Which samples.
        batch: The batch size; None for the model's own.
        latency: Whether to measure latency.
        threads: Threads within an operator while it is measured.
        opening: How a float PyTorch model is opened that does not say all of itself.
        progress: Called with the stage, the samples done and their total.

    Raises:
        ReportedError: If anything given cannot be used.
    """
    if quantized.suffix != ".onnx":
        raise ModelError(f"{quantized} is no ONNX model, and reports look into those", "convert to .onnx")
    source = load(reference, opening, Data(data).example(recipe.preprocess))
    found = evaluate(
        quantized,
        data,
        source,
        metric,
        recipe,
        labels,
        split,
        selection,
        batch,
        latency,
        layers=True,
        threads=threads,
        progress=progress,
    )
    dataset = open_dataset(data, source.inputs, recipe.preprocess, Path(labels) if labels else None, split)
    indices = select(len(dataset), selection)
    size = fitted_batch(source.inputs, batch) if fixes_batch(source.inputs) else min(DRAWN, len(indices))
    first = [index for index in indices if dataset.shape_of(int(index)) == dataset.shape_of(int(indices[0]))][:size]
    feeds = dataset.read(np.array(first, dtype=np.intp))
    return figures(sidecar_file.read(quantized.with_suffix(".json")), found, source, feeds)
