"""The stages in order: load → fold → calibrate → plan → quantize → write → check. Read this file first.

`calibrate`, `convert` and `evaluate` are the Python API; the commands of the same names only parse and print.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration import statistics as statistics_file
from calibration.collect import collect
from calibration.datasets import Dataset, Selection, batches, fitted_batch, open_dataset, select
from calibration.errors import DataError, StatisticsError
from calibration.hooks.onnxruntime import Runner
from calibration.statistics import Statistics
from quantcli import sidecar as sidecar_file
from quantcli.errors import ModelError, OutputError, StrictError, UsageError, VerifyError
from quantcli.evaluation.compare import LayerSqnr, layer_sqnrs, worst
from quantcli.evaluation.latency import Latency, measure
from quantcli.evaluation.metrics import LABEL_METRICS, METRICS, Comparison, TopK
from quantcli.files import check_output, staged
from quantcli.fold import fold
from quantcli.integer.verify import Verification, random_inputs
from quantcli.integer.verify import verify as compare_integers
from quantcli.load import LoadedModel, load, shown_name
from quantcli.placement import place
from quantcli.plan import Plan, make_plan
from quantcli.probe import model_bytes, with_outputs
from quantcli.quantize import quantize
from quantcli.recipe import Recipe, resolve_target
from quantcli.sidecar import FileEntry, Sidecar
from quantcli.write import onnx_qdq

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

# Below this a self-check warns: the quantized output is then more noise than most uses bear.
LOW_SQNR = 10.0

# How many random samples are verified where there is no data.
RANDOM_SAMPLES = 8

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""
    del stage, done, total


@dataclass(frozen=True)
class SelfCheck:
    """What the written model did on calibration samples.

    Attributes:
        samples: How many samples were run.
        sqnr: The SQNR of every real output against the float model, in dB.
        suspects: Where an output lies below 10 dB, the layers that lost most.
    """

    samples: int
    sqnr: dict[str, float]
    suspects: tuple[LayerSqnr, ...]

    @property
    def low(self) -> bool:
        """Whether an output is below 10 dB."""
        return any(value < LOW_SQNR for value in self.sqnr.values())


@dataclass(frozen=True, eq=False)
class Conversion:
    """What a conversion wrote.

    Attributes:
        model: The quantized model's path.
        sidecar_path: The sidecar's path.
        sidecar: The sidecar.
        plan: The plan that both follow.
        check: The self-check.
    """

    model: Path
    sidecar_path: Path
    sidecar: Sidecar
    plan: Plan
    check: SelfCheck


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

    @property
    def drop(self) -> float | None:
        """Float minus quantized, in the metric's points; None without a float figure."""
        return None if self.reference is None else self.reference - self.quantized


def calibrate(
    model: Path | str,
    data: Path | str,
    output: Path | str | None = None,
    recipe: Recipe | None = None,
    labels: Path | str | None = None,
    split: str | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Run calibration data through a float model and return (and save) the statistics of the tensors that a plan needs.

    Args:
        model: An ``.onnx`` or ``.pt2`` file.
        data: An ``.npz`` or ``.npy`` file, or a folder of images.
        output: Where to save the statistics; None to only return them.
        recipe: What the user wants; None for the defaults.
        labels: A CSV that names the image files (its labels are not needed here).
        split: Keep only the CSV's rows of this split.
        progress: Called with the stage, the samples done and their total.

    Raises:
        ReportedError: If anything given cannot be used; nothing is written then.
    """
    recipe = recipe or Recipe()
    model, data = Path(model), Path(data)
    outputs = [Path(output)] if output is not None else []
    sources = [data, recipe.target_file, Path(labels) if labels else None]
    check_outputs(outputs, [model, *sources])
    resolve_target(recipe)
    source = load(model)
    check_outputs(outputs, source.files)
    statistics = observe(source, fold(source.graph), data, recipe, labels, split, progress)
    if output is not None:
        with staged() as files:
            files.write(Path(output), statistics_file.serialized(statistics))
    return statistics


def observe(
    source: LoadedModel,
    folded: ir.Model,
    data: Path,
    recipe: Recipe,
    labels: Path | str | None,
    split: str | None,
    progress: Progress,
) -> Statistics:
    """Return the statistics of a folded model's tensors over a data set."""
    tensors = place(folded, recipe).observed()
    runner = Runner(with_outputs(folded, tensors), what=source.name)
    dataset = open_dataset(data, runner.inputs, recipe.preprocess, Path(labels) if labels else None, split)
    indices = select(len(dataset), recipe.calibration.selection)
    batch = fitted_batch(runner.inputs, recipe.calibration.batch)
    seen, kept, samples = collect(
        runner,
        tensors,
        dataset,
        indices,
        batch,
        recipe.calibration.observer,
        lambda done: progress("calibrate", done, len(indices)),
    )
    return Statistics(
        source.sha256,
        dataset.digest,
        asdict(recipe.preprocess) if recipe.preprocess else {},
        samples,
        recipe.calibration.observer,
        seen,
        kept,
    )


def convert(
    model: Path | str,
    output: Path | str,
    statistics: Statistics | Path | str | None = None,
    data: Path | str | None = None,
    recipe: Recipe | None = None,
    labels: Path | str | None = None,
    split: str | None = None,
    strict: bool = False,
    verified: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Quantize a float model and write the quantized model and its sidecar (same name, ``.json``).

    Args:
        model: An ``.onnx`` or ``.pt2`` file.
        output: The quantized model, ``.onnx``.
        statistics: What `calibrate` returned or saved.
        data: Calibration data, where there are no statistics.
        recipe: What the user wants; None for the defaults.
        labels: A CSV that names the image files of the data.
        split: Keep only the CSV's rows of this split.
        strict: Refuse where an operator stays float or a weight channel is dead.
        verified: Run the integer executor against the runtime before the files get their names.
        progress: Called with the stage, the samples done and their total.

    Raises:
        ReportedError: If anything given cannot be used, or the written model does not work; nothing is written then.
    """
    recipe = recipe or Recipe()
    model, output = Path(model), Path(output)
    if (statistics is None) == (data is None):
        raise UsageError("convert needs either statistics or calibration data", "give --stats or --data")
    if output.suffix != ".onnx":
        raise UsageError(f"the output {output} is of no known kind", "name it .onnx")
    sidecar_path = output.with_suffix(".json")
    given = [data, labels, statistics if isinstance(statistics, (str, Path)) else None]
    sources = [model, recipe.target_file, *(Path(path) if path else None for path in given)]
    check_outputs([output, sidecar_path], sources)
    resolve_target(recipe)
    source = load(model)
    check_outputs([output, sidecar_path], source.files)
    folded = fold(source.graph)
    if data is not None:
        found = observe(source, folded, Path(data), recipe, labels, split, progress)
    elif isinstance(statistics, Statistics):
        found = statistics
    else:
        found = statistics_file.load(Path(str(statistics)))
    check_belongs(found, source)
    plan = make_plan(folded, found, recipe)
    if strict:
        check_strict(plan)
    quantized = quantize(folded, plan)
    written = model_bytes(onnx_qdq.write(quantized))
    entry = FileEntry(shown_name(output), hashlib.sha256(written).hexdigest(), len(written))
    sidecar = sidecar_file.describe(quantized, source, entry, found, recipe)
    progress("check", 0, 1)
    check = self_check(source, written, sidecar, found)
    if verified:
        require_verified(compare_integers(written, sidecar, [found.check_inputs]))
    with staged() as files:
        files.write(output, written)
        files.write(sidecar_path, sidecar_file.encode(sidecar))
    return Conversion(output, sidecar_path, sidecar, plan, check)


def check_outputs(outputs: Iterable[Path], sources: Iterable[Path | None]) -> None:
    """Check that no output is one of the sources and that each may take its name."""
    kept = list(sources)
    for output in outputs:
        check_output(output, *kept)


def require_verified(verification: Verification) -> None:
    """Raise VerifyError where something differs without an explanation."""
    if verification.findings:
        more = f" (and {len(verification.findings) - 1} more)" if len(verification.findings) > 1 else ""
        raise VerifyError(
            f"{verification.findings[0]}{more}", "the files do not belong together, or please report this"
        )


def check_belongs(statistics: Statistics, source: LoadedModel) -> None:
    """Raise StatisticsError where the statistics were made from another model."""
    if statistics.model_sha256 != source.sha256:
        raise StatisticsError(
            f"the statistics belong to another model (sha256 {statistics.model_sha256[:12]}…, "
            f"{source.name} has {source.sha256[:12]}…)",
            "calibrate this model",
        )


def check_strict(plan: Plan) -> None:
    """Raise StrictError where an operator stays float or a weight channel holds nothing but zeros."""
    if plan.floats:
        first = plan.floats[0]
        more = f" and {len(plan.floats) - 1} more" if len(plan.floats) > 1 else ""
        raise StrictError(
            f"{first.operator} '{first.name}'{more} would stay float: {first.reason}", "exit code 5 is --strict"
        )
    for name, channels in plan.dead_channels.items():
        raise StrictError(f"the weight '{name}' has dead channels: {', '.join(map(str, channels))}", "prune them")


def self_check(source: LoadedModel, written: bytes, sidecar: Sidecar, statistics: Statistics) -> SelfCheck:
    """Load what was written, run it on calibration samples, and compare it with the float model.

    Raises:
        OutputError: If an output that is finite in float is not finite any more.
        RunError: If the runtime refuses what was written.
    """
    feeds = statistics.check_inputs
    reference = Runner(source.runnable, what=source.name).run(feeds)
    result = Runner(written, what="the quantized model").run(feeds)
    for name, values in result.items():
        real = values.dtype.kind == "f"
        if real and np.isfinite(reference[name]).all() and not np.isfinite(values).all():
            raise OutputError(
                f"output '{name}' of the quantized model is not finite", "please report this, with the model"
            )
    comparison = Comparison()
    comparison.update(reference, result)
    sqnr = {name: difference.sqnr for name, difference in comparison.outputs.items()}
    suspects: tuple[LayerSqnr, ...] = ()
    if any(value < LOW_SQNR for value in sqnr.values()):
        suspects = tuple(worst(layer_sqnrs(source.graph, written, sidecar, [feeds])))
    return SelfCheck(len(next(iter(feeds.values()))), sqnr, suspects)


def verify(
    sidecar: Path | str,
    data: Path | str | None = None,
    recipe: Recipe | None = None,
    labels: Path | str | None = None,
    split: str | None = None,
    selection: Selection | None = None,
    batch: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Verification:
    """Verify a sidecar against the model beside it, on data or on random inputs over the calibrated ranges.

    Args:
        sidecar: The sidecar; the quantized model of the name that it states stands beside it.
        data: Inputs; None for random ones.
        recipe: Where the preprocessing stands; None for the defaults.
        labels: A CSV that names the image files of the data.
        split: Keep only the CSV's rows of this split.
        selection: Which samples; all by default.
        batch: The batch size; None for the model's own, or 32.
        seed: Of the random inputs.
        progress: Called with the stage, the samples done and their total.

    Raises:
        ReportedError: If anything given cannot be used. Differences are no error here: they are in what is returned.
    """
    sidecar = Path(sidecar)
    document = sidecar_file.read(sidecar)
    model = sidecar.with_name(document.model.name)
    if not model.is_file():
        raise ModelError(f"{sidecar} speaks of {document.model.name}, which is not beside it", "put it there")
    runner = Runner(load(model).runnable, what=model.name)
    if data is None:
        size = fitted_batch(runner.inputs, batch or RANDOM_SAMPLES)
        return compare_integers(model.read_bytes(), document, [random_inputs(document, runner, size, seed)])
    dataset = open_dataset(
        Path(data), runner.inputs, (recipe or Recipe()).preprocess, Path(labels) if labels else None, split
    )
    indices = select(len(dataset), selection or Selection())
    size = fitted_batch(runner.inputs, batch)
    whole = (
        indices[: len(indices) - len(indices) % size] if any(s.shape and s.shape[0] for s in runner.inputs) else indices
    )
    if not len(whole):
        raise DataError(f"the model takes batches of {size} and there are {len(indices)} samples", "give more samples")

    def drawn() -> Iterable[dict[str, NDArray[Any]]]:
        for number, feeds in enumerate(batches(dataset, whole, size)):
            yield feeds
            progress("verify", min((number + 1) * size, len(whole)), len(whole))

    return compare_integers(model.read_bytes(), document, drawn())


def evaluate(
    quantized: Path | str,
    data: Path | str,
    reference: Path | str | None = None,
    metric: str | None = None,
    recipe: Recipe | None = None,
    labels: Path | str | None = None,
    split: str | None = None,
    selection: Selection | None = None,
    batch: int | None = None,
    latency: bool = True,
    layers: bool = False,
    threads: int = 1,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate a quantized model on data, beside the float model it came from.

    Args:
        quantized: The quantized model, ``.onnx``.
        data: Evaluation data.
        reference: The float model, ``.onnx`` or ``.pt2``.
        metric: A key of `METRICS`; None for top1 where there are labels, else sqnr.
        recipe: Where the preprocessing stands; None for the defaults.
        labels: Labels, where the data does not carry them.
        split: Keep only the labels' rows of this split.
        selection: Which samples; all by default.
        batch: The batch size; None for the model's own, or 32.
        latency: Whether to measure latency.
        layers: Whether to compare layer by layer (the sidecar must stand beside the model).
        threads: Threads within an operator while latency is measured.
        progress: Called with the stage, the samples done and their total.

    Raises:
        ReportedError: If anything given cannot be used, or the metric needs what is not there.
    """
    recipe = recipe or Recipe()
    quantized, data = Path(quantized), Path(data)
    candidate = load(quantized)
    runner = Runner(candidate.runnable, what=candidate.name)
    source = load(Path(reference)) if reference is not None else None
    float_runner = Runner(source.runnable, what=source.name) if source is not None else None
    dataset = open_dataset(data, runner.inputs, recipe.preprocess, Path(labels) if labels else None, split)
    if source is not None and float_runner is not None and float_runner.outputs != runner.outputs:
        theirs, ours = ", ".join(float_runner.outputs), ", ".join(runner.outputs)
        what = f"{source.name} has the outputs {theirs}, {candidate.name} has {ours}"
        raise ModelError(what, "give the float model that it came from")
    metric = metric or ("top1" if dataset.labels is not None else "sqnr")
    check_metric(metric, dataset, source)
    indices = select(len(dataset), selection or Selection())
    batch = fitted_batch(runner.inputs, batch)
    tops = [TopK(LABEL_METRICS.get(metric, 1)) for _ in range(2)]
    comparison = Comparison()
    first: dict[str, NDArray[Any]] = {}
    for start, feeds in zip(range(0, len(indices), batch), batches(dataset, indices, batch), strict=True):
        rows = indices[start : start + batch]
        first = first or feeds
        result = run_padded(runner, feeds, batch)
        expected = run_padded(float_runner, feeds, batch) if float_runner is not None else {}
        comparison.update(expected, result)
        if metric in LABEL_METRICS and dataset.labels is not None:
            for top, outputs, model in ((tops[0], result, runner), (tops[1], expected, float_runner)):
                if model is not None:
                    top.update(outputs[model.outputs[0]], dataset.labels[rows])
        progress("evaluate", start + len(rows), len(indices))
    if metric in LABEL_METRICS:
        value, reference_value = tops[0].percent, tops[1].percent if source is not None else None
    else:
        value, reference_value = getattr(next(iter(comparison.outputs.values())), metric), None
    timing = None
    if latency and source is not None:
        progress("latency", 0, 1)
        one = (
            first
            if any(spec.shape and spec.shape[0] for spec in runner.inputs)
            else {k: v[:1] for k, v in first.items()}
        )
        timing = measure(Runner(source.runnable, threads), Runner(candidate.runnable, threads), one, threads)
    found: list[LayerSqnr] = []
    if layers and source is not None:
        beside = sidecar_beside(candidate, quantized, source)
        found = layer_sqnrs(source.graph, quantized.read_bytes(), beside, [first])
    return Evaluation(
        metric,
        len(indices),
        value,
        reference_value,
        {name: difference.sqnr for name, difference in comparison.outputs.items()},
        timing,
        candidate.size,
        source.size if source is not None else None,
        tuple(found),
    )


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
    if metric not in METRICS:
        raise UsageError(f"there is no metric '{metric}'", f"known: {', '.join(METRICS)}")
    if metric in LABEL_METRICS and dataset.labels is None:
        raise DataError(
            f"the metric {metric} needs labels and the data has none",
            "put an array 'labels' into the .npz, give --labels, or sort the images into class folders",
        )
    if metric not in LABEL_METRICS and source is None:
        raise UsageError(f"the metric {metric} compares with the float model and none was given", "add --float MODEL")


def run_padded(runner: Runner, feeds: dict[str, NDArray[Any]], batch: int) -> dict[str, NDArray[Any]]:
    """Run a batch; where the model fixes its batch size and the last batch is short, fill it up and cut the outputs again."""
    count = len(next(iter(feeds.values())))
    fixed = any(spec.shape and spec.shape[0] is not None for spec in runner.inputs)
    if not fixed or count == batch:
        return runner.run(feeds)
    filled = {
        name: np.concatenate([values, np.repeat(values[-1:], batch - count, axis=0)]) for name, values in feeds.items()
    }
    return {name: values[:count] if len(values) == batch else values for name, values in runner.run(filled).items()}
