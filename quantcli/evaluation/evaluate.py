"""Evaluate a quantized model on data, beside the float model it came from."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets import (
    Dataset,
    Selection,
    boundaries,
    fitted_batch,
    fixes_batch,
    open_dataset,
    samples_in,
    select,
    single,
)
from calibration.errors import DataError
from calibration.hooks.onnxruntime import Runner
from calibration.hooks.pairs import SAYS, saturates
from quantcli import sidecar as sidecar_file
from quantcli.errors import ModelError, UsageError, check_count, check_named, check_progress
from quantcli.evaluation.compare import LayerSqnr, layer_sqnrs
from quantcli.evaluation.footprint import footprint
from quantcli.evaluation.kernels import Kernel, kernels
from quantcli.evaluation.latency import Latency, measure
from quantcli.evaluation.metrics import LABEL_METRICS, METRICS, Asked, Comparison, TopK, function_of, scores_of
from quantcli.files import path_of, path_or_none
from quantcli.joined import parts_of
from quantcli.load import LoadedModel, Opening, load
from quantcli.progress import Progress, silent
from quantcli.randomness import check_repeatable, repeatable
from quantcli.recipe import Recipe, checked_recipe, checked_selection
from quantcli.sources import Data
from quantcli.targets import NATIVE

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from calibration.hooks.torch import ProgramRunner
    from quantcli.sidecar import Sidecar

logger = logging.getLogger(__name__)

# Below so many dB of what it gives elsewhere, what a model gives on this machine is worth a warning: as much is left by 8 bits.
SATURATED = 30.0


@dataclass(frozen=True)
class Evaluation:
    """A quantized model's worth.

    Attributes:
        metric: The metric's name.
        samples: How many samples were run.
        quantized: The quantized model's metric.
        reference: The float model's metric; None without a float model, or where the metric compares with it.
        sqnr: The SQNR of every real output against the float model, in dB.
        latency: Float and quantized latency; None where it was not measured.
        size: The quantized model's bytes.
        reference_size: The float model's bytes; None without one.
        layers: Every layer's SQNR, in graph order; empty where it was not asked for.
        kernels: What each operator takes in the quantized model as the runtime runs it; empty where it was not asked for.
        reference_kernels: The same of the float model.
        parts: The SQNR of every part of outputs that are joined from several tensors, in dB.
        memory: By how many bytes running float and quantized model raises a process's peak; None where it was not asked for.
    """

    metric: str
    samples: int
    quantized: float
    reference: float | None
    sqnr: dict[str, float]
    latency: Latency | None
    size: int
    reference_size: int | None
    layers: tuple[LayerSqnr, ...]
    kernels: tuple[Kernel, ...] = ()
    reference_kernels: tuple[Kernel, ...] = ()
    memory: tuple[int, int] | None = None
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def drop(self) -> float | None:
        """Float minus quantized, in the metric's points; None without a float figure."""
        return None if self.reference is None else self.reference - self.quantized


def evaluate(
    quantized: Path | str,
    data: Path | str | None,
    reference: LoadedModel | Path | str | None = None,
    metric: str | None = None,
    recipe: Recipe | None = None,
    labels: Path | str | None = None,
    split: str | None = None,
    selection: Selection | None = None,
    batch: int | None = None,
    latency: bool = True,
    layers: bool = False,
    threads: int = 1,
    profiled: bool = False,
    opening: Opening | None = None,
    memory: bool = False,
    progress: Progress = silent,
    function: str | None = None,
) -> Evaluation:
    """Evaluate a quantized model on data, beside the float model it came from.

    Args:
        quantized: The quantized model: ``.onnx``, or ``.pt2``.
        data: Evaluation data; None where a function gives it.
        reference: The float model, ``.onnx`` or what torch wrote; or one that is loaded already.
        metric: A key of `METRICS`, or ``module:function`` (`quantcli.evaluation.metrics.Asked`); None for top1 where there are
            labels, else sqnr.
        recipe: Where the preprocessing stands; None for the defaults.
        labels: Labels, where the data does not carry them.
        split: Keep only the labels' rows of this split.
        selection: Which samples; all by default.
        batch: The batch size; None for the model's own, or 32.
        latency: Whether to measure latency (of ONNX models).
        layers: Whether to compare layer by layer (the sidecar must stand beside the model).
        threads: Threads within an operator while latency is measured.
        profiled: Whether to measure what each operator takes.
        opening: How a float PyTorch model is opened that does not say all of itself.
        memory: Whether to measure the memory that both models take.
        progress: Called with the stage, the samples done and their total.
        function: A Python callable, ``module:function``, that yields batches, in the place of data.

    Raises:
        ReportedError: If anything given cannot be used, or the metric needs what is not there.
    """
    recipe, selection = checked_recipe(recipe), checked_selection(selection)
    check_named(metric, "metric")
    check_count(batch, "batch")
    check_count(threads, "number of threads")
    check_progress(progress)
    check_named(function, "data function")
    if (data is None) == (function is None):
        raise UsageError("evaluation needs data from one place", "give one of --data, --data-function")
    quantized, data = path_of(quantized, "quantized model"), path_or_none(data, "data")
    source = reference if isinstance(reference, LoadedModel) else None
    if source is None and reference is not None:
        source = load(
            path_of(reference, "float model"), opening, Data(data, function=function).example(recipe.preprocess)
        )
    float_runner = Runner(source.runnable, what=source.name) if source is not None else None
    candidate, runner = opened(quantized, source)
    if candidate is None and (layers or profiled):
        raise UsageError(
            f"{quantized.name} is a PyTorch program, and --layers and --kernels look into ONNX", "leave them out"
        )
    known = candidate or source
    if known is not None:
        check_repeatable(known.graph)
    looked_at = source or candidate or runner  # a program that convert wrote has no graph
    dataset = open_dataset(
        data, looked_at.inputs, recipe.preprocess, path_or_none(labels, "labels"), split, function=function
    )
    if source is not None and float_runner is not None and float_runner.outputs != runner.outputs:
        theirs, ours = ", ".join(float_runner.outputs), ", ".join(runner.outputs)
        what = f"{source.name} has the outputs {theirs}, {quantized.name} has {ours}"
        raise ModelError(what, "give the float model that it came from")
    metric = metric or ("top1" if dataset.labels is not None else "sqnr")
    check_metric(metric, dataset, source)
    indices = select(len(dataset), selection)
    batch = fitted_batch(runner.inputs, batch)
    measuring = Measuring(metric, source)
    first: dict[str, NDArray[Any]] = {}
    for start, stop in boundaries(dataset, indices, batch):
        rows = indices[start:stop]
        feeds = dataset.read(rows)
        first = first or feeds
        expected = run_padded(float_runner, feeds, batch) if float_runner is not None else {}
        labelled = dataset.labels[rows] if dataset.labels is not None else None
        measuring.update(run_padded(runner, feeds, batch), expected, labelled)
        progress("evaluate", stop, len(indices))
    value, reference_value = measuring.values(dataset.labels[indices] if dataset.labels is not None else None)
    warn_of_saturation(candidate, runner, first, batch)
    timing = None
    one = single(runner.inputs, first)
    if latency and source is not None and candidate is not None:
        progress("latency", 0, 1)
        timing = measure(Runner(source.runnable, threads), Runner(candidate.runnable, threads), one, threads)
    found: list[LayerSqnr] = []
    if layers and source is not None and candidate is not None:
        beside = sidecar_beside(candidate, quantized, source)
        found = layer_sqnrs(source.graph, candidate.graph, beside, [first])
    return Evaluation(
        metric,
        len(indices),
        value,
        reference_value,
        {name: difference.sqnr for name, difference in measuring.comparison.outputs.items()},
        timing,
        quantized.stat().st_size if candidate is None else candidate.size,
        source.size if source is not None else None,
        tuple(found),
        kernels(candidate.runnable, one, threads) if profiled and candidate is not None else (),
        kernels(source.runnable, one, threads) if profiled and source is not None else (),
        (footprint(source.runnable, first, threads), footprint(candidate.runnable, first, threads))
        if memory and source is not None and candidate is not None
        else None,
        {name: difference.sqnr for name, difference in measuring.comparison.parts.items()},
    )


class Measuring:
    """One metric of a quantized model and of the float model, batch by batch.

    Args:
        metric: Its name, or ``module:function``.
        source: The float model; None where there is none.
    """

    def __init__(self, metric: str, source: LoadedModel | None) -> None:
        self.metric = metric
        self.function = function_of(metric) if ":" in metric else None
        self.tops = [TopK(LABEL_METRICS.get(metric, 1)) for _ in range(2)]
        self.asked = Asked(metric), Asked(metric)
        self.comparison = Comparison({} if source is None else parts_of(source.graph))

    def update(
        self,
        result: dict[str, NDArray[Any]],
        expected: dict[str, NDArray[Any]],
        labels: NDArray[np.integer] | None,
    ) -> None:
        """Count a batch: the outputs of both models (none of float where there is none) and its labels."""
        self.comparison.update(expected, result)
        for place, outputs in enumerate((result, expected)):
            if self.metric in LABEL_METRICS and labels is not None and outputs:
                self.tops[place].update(scores_of(outputs), labels)
            if self.function is not None:
                self.asked[place].update(outputs)

    def values(self, labels: NDArray[np.integer] | None) -> tuple[float, float | None]:
        """Return the quantized model's metric, and the float model's: None where it has none."""
        if self.metric in LABEL_METRICS:
            return self.tops[0].percent, self.tops[1].percent if self.tops[1].samples else None
        if self.function is not None:
            reference = self.asked[1].value(self.function, labels) if self.asked[1].parts else None
            return self.asked[0].value(self.function, labels), reference
        return getattr(next(iter(self.comparison.outputs.values())), self.metric), None


def warn_of_saturation(
    candidate: LoadedModel | None, runner: Runner | ProgramRunner, feeds: dict[str, NDArray[Any]], batch: int
) -> None:
    """Warn where this machine's kernels give something else than ONNX says (`calibration.hooks.pairs`)."""
    if candidate is None or not saturates() or not repeatable(candidate.graph):
        return
    given = run_padded(runner, feeds, batch)
    exact = run_padded(Runner(candidate.runnable, what=candidate.name, exact=True), feeds, batch)
    comparison = Comparison()
    comparison.update(exact, given)
    least = min((difference.sqnr for difference in comparison.outputs.values()), default=math.inf)
    if least < SATURATED:
        logger.warning(
            "%s: what %s gives here is %.1f dB from what it gives elsewhere; convert --target %s makes a model for this machine",
            SAYS,
            candidate.name,
            least,
            NATIVE,
        )


def opened(quantized: Path, source: LoadedModel | None) -> tuple[LoadedModel | None, Runner | ProgramRunner]:
    """Return a quantized model and what runs it: ONNX Runtime, or torch for a program that convert wrote, which is no ONNX model.

    Raises:
        ReportedError: If it cannot be loaded.
    """
    if quantized.suffix == ".pt2" and quantized.is_file():
        from calibration.hooks.torch import ProgramRunner
        from quantcli.load.torch import is_quantized, program_at
        from quantcli.scores import masks_in

        program = program_at(quantized)
        if is_quantized(program):
            graph = source.graph.graph if source is not None else None
            names = (
                [[str(v.name) for v in values] for values in (graph.inputs, graph.outputs)] if graph else [None, None]
            )
            return None, ProgramRunner(program, quantized.name, names[0], names[1], masks=masks_in(quantized))
    candidate = load(quantized)
    return candidate, Runner(candidate.runnable, what=candidate.name)


def sidecar_beside(candidate: LoadedModel, path: Path, source: LoadedModel) -> Sidecar:
    """Return the sidecar that stands beside a quantized model, after checking that it speaks of these two models.

    Raises:
        ModelError: If there is none, or it speaks of others.
    """
    file = path.with_suffix(".json")
    if not file.is_file():
        raise ModelError(f"there is no sidecar at {file}", "layer by layer needs the sidecar that convert wrote")
    sidecar = sidecar_file.read(file)
    for entry, model in ((sidecar.model, candidate), (sidecar.float_model, source)):
        if entry.sha256 != model.sha256:
            raise ModelError(
                f"{file} belongs to another model than {model.name}", "convert again, or give the right --float"
            )
    return sidecar


def check_metric(metric: str, dataset: Dataset, source: LoadedModel | None) -> None:
    """Raise where a metric is unknown or needs labels or a float model that are not there."""
    if ":" in metric:
        return
    if metric not in METRICS:
        raise UsageError(f"there is no metric '{metric}'", f"known: {', '.join(METRICS)}, or module:function")
    if metric in LABEL_METRICS and dataset.labels is None:
        raise DataError(
            f"the metric {metric} needs labels and the data has none",
            "put an array 'labels' into the .npz, give --labels, or sort the images into class folders",
        )
    if metric not in LABEL_METRICS and source is None:
        raise UsageError(f"the metric {metric} compares with the float model and none was given", "add --float MODEL")


def run_padded(runner: Runner | ProgramRunner, feeds: dict[str, NDArray[Any]], batch: int) -> dict[str, NDArray[Any]]:
    """Run a batch; where the model fixes its batch size and the last batch is short, fill it up and cut the outputs again."""
    count = samples_in(feeds)
    if not fixes_batch(runner.inputs) or count == batch:
        return runner.run(feeds)
    filled = {
        name: np.concatenate([values, np.repeat(values[-1:], batch - count, axis=0)]) for name, values in feeds.items()
    }
    return {name: values[:count] if len(values) == batch else values for name, values in runner.run(filled).items()}
