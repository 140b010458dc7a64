"""The stages in order: load → fold → calibrate → plan → quantize → write → check. Read this file first.

`calibrate`, `convert` and `evaluate` are the Python API; the commands of the same names only parse and print.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration import statistics as statistics_file
from calibration.datasets import (
    Selection,
    batches,
    boundaries,
    first_samples,
    fitted_batch,
    fixes_batch,
    open_dataset,
    select,
)
from calibration.errors import DataError, ReportedError, RunError, StatisticsError
from calibration.hooks.onnxruntime import Runner
from calibration.statistics import Statistics
from quantcli import sidecar as sidecar_file
from quantcli.errors import ModelError, PlanError, StrictError, UsageError, VerifyError
from quantcli.evaluation.check import SelfCheck, self_check
from quantcli.evaluation.evaluate import Evaluation, evaluate
from quantcli.explain import Explanation, explain
from quantcli.files import check_output, staged
from quantcli.fold import fold
from quantcli.integer.verify import Verification, random_inputs
from quantcli.integer.verify import verify as compare_integers
from quantcli.integer.weights import verify_weights as compare_weights
from quantcli.load import LoadedModel, Opening, load, shown_name
from quantcli.memory import give_back
from quantcli.modes import plan_without_data
from quantcli.observation import Data, Run, check_counted, observe
from quantcli.plan import Plan, make_plan
from quantcli.probe import model_bytes
from quantcli.progress import Progress, silent
from quantcli.quantize import quantize
from quantcli.recipe import Recipe, keeping, resolve_target
from quantcli.sidecar import FileEntry, Sidecar
from quantcli.tune.data import scorer, tuning_samples
from quantcli.tune.effort import Tuned, tune, untuned, why_untuned
from quantcli.tune.latency import Trial, candidates, timed
from quantcli.tune.search import Attempt, Search
from quantcli.tune.smooth import smooth
from quantcli.write import WRITERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.load import Example
    from quantcli.quantize import QuantizedModel

logger = logging.getLogger(__name__)

# How many samples the self-check runs where nothing was calibrated.
CHECKED = 4
# How many random samples are verified where there is no data.
RANDOM_SAMPLES = 8


@dataclass(frozen=True, eq=False)
class Conversion:
    """What a conversion wrote.

    Attributes:
        model: The quantized model's path.
        sidecar_path: The sidecar's path.
        sidecar: The sidecar.
        plan: The plan that both follow.
        check: The self-check.
        tuned: What tuning came to.
        explained: What was asked about.
        trials: The plans that were timed, where the fastest was asked for.
        attempts: The widths that were tried, where a metric was to be kept.
    """

    model: Path
    sidecar_path: Path
    sidecar: Sidecar
    plan: Plan
    check: SelfCheck
    tuned: Tuned
    explained: tuple[Explanation, ...] = ()
    trials: tuple[Trial, ...] = ()
    attempts: tuple[Attempt, ...] = ()


def calibrate(
    model: Path | str,
    data: Path | str | None = None,
    output: Path | str | None = None,
    recipe: Recipe | None = None,
    labels: Path | str | None = None,
    split: str | None = None,
    function: str | None = None,
    synthetic: int | None = None,
    run: Run | None = None,
    opening: Opening | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Run calibration data through a float model and return (and save) the statistics of the tensors that a plan needs.

    Args:
        model: An ``.onnx`` file, or one that torch wrote (`quantcli.load`).
        data: A file or folder that `calibration.datasets` reads; None where ``function`` or ``synthetic`` takes its place.
        output: Where to save the statistics; None to only return them. Checkpoints stand beside it, as ``NAME.partial``.
        recipe: What the user wants; None for the defaults.
        labels: A CSV that names the image files (its labels are not needed here).
        split: Keep only the CSV's rows of this split.
        function: A callable ``module:function`` that yields batches as dicts by input name.
        synthetic: So many random samples instead of data.
        run: A shard of the samples, how much memory, going on from a checkpoint, the runtime; None for the defaults.
        opening: How a PyTorch model is opened that does not say all of itself.
        progress: Called with the stage, the samples done and their total.

    Raises:
        ReportedError: If anything given cannot be used; nothing is written then.
    """
    recipe, run = recipe or Recipe(), run or Run()
    model, given = Path(model), data_of(data, labels, split, function, synthetic)
    path = Path(output) if output is not None else None
    if path is not None:
        run = replace(run, partial=path.with_name(f"{path.name}.partial"))
    outputs = [path] if path is not None else []
    check_outputs(outputs, [model, recipe.target_file, *given.files])
    target = resolve_target(recipe)
    source = load(model, opening, shown_by(given, recipe))
    check_outputs(outputs, source.files)
    with blamed_on(source):
        folded = fold(source.graph, target.activation.opset, recipe.requantize)
        statistics = observe(source, folded, given, recipe, run, progress)
    if path is not None:
        with staged() as files:
            files.write(path, statistics_file.serialized(statistics))
        if run.partial is not None:
            remove_checkpoints(run.partial)
    return statistics


def shown_by(data: Data | None, recipe: Recipe, statistics: Statistics | Path | str | None = None) -> Example | None:
    """Return what shows a model's inputs: the first samples of the data, or those that statistics keep."""
    if data is not None:
        return lambda names: first_samples(data.path, names, recipe.preprocess, data.function)
    if statistics is None:
        return None
    return lambda _: loaded_statistics(statistics).check_inputs


def loaded_statistics(statistics: Statistics | Path | str) -> Statistics:
    """Return statistics, or those of a file."""
    return statistics if isinstance(statistics, Statistics) else statistics_file.load(Path(str(statistics)))


def remove_checkpoints(partial: Path) -> None:
    """Remove a checkpoint, and what a run that was killed while it wrote one has left beside it."""
    partial.unlink(missing_ok=True)
    for left in partial.parent.glob(f".{glob.escape(partial.stem)}.*{partial.suffix}*"):
        left.unlink(missing_ok=True)


def data_of(
    data: Path | str | None,
    labels: Path | str | None = None,
    split: str | None = None,
    function: str | None = None,
    synthetic: int | None = None,
) -> Data:
    """Return where data comes from.

    Raises:
        UsageError: If it is not exactly one place.
    """
    if sum(given is not None for given in (data, function, synthetic)) != 1:
        raise UsageError("calibration needs data from one place", "give one of --data, --data-function, --synthetic")
    return Data(Path(data) if data is not None else None, Path(labels) if labels else None, split, function, synthetic)


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
    form: str = "qdq",
    function: str | None = None,
    synthetic: int | None = None,
    run: Run | None = None,
    explained: Sequence[str] = (),
    validate: Path | str | None = None,
    validate_split: str | None = None,
    opening: Opening | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Quantize a float model and write the quantized model and its sidecar (same name, ``.json``).

    Args:
        model: An ``.onnx`` file, or one that torch wrote (`quantcli.load`).
        output: The quantized model, ``.onnx``.
        statistics: What `calibrate` returned or saved.
        data: Calibration data, where there are no statistics.
        recipe: What the user wants; None for the defaults.
        labels: A CSV that names the image files of the data.
        split: Keep only the CSV's rows of this split.
        strict: Refuse where an operator stays float or a weight channel is dead.
        verified: Run the integer executor against the runtime before the files get their names.
        form: ``qdq`` (QuantizeLinear/DequantizeLinear) or ``qoperator`` (QLinearConv and its like).
        function: A callable ``module:function`` that yields calibration batches, where there are neither statistics nor data.
        synthetic: So many random samples instead; refused by ``strict``.
        run: How the calibration is run.
        explained: Names of operators (patterns, or ``op:NAME``) to explain.
        validate: Labelled data that ``[tune] max_drop`` is judged on; None for the calibration data.
        validate_split: Keep only those of its CSV's rows.
        opening: How a PyTorch model is opened that does not say all of itself.
        progress: Called with the stage, the samples done and their total.

    Raises:
        ReportedError: If anything given cannot be used, or the written model does not work; nothing is written then.
    """
    recipe, run = recipe or Recipe(), run or Run()
    model, output = Path(model), Path(output)
    check_places(recipe, statistics, data, function, synthetic)
    if output.suffix != ".onnx":
        raise UsageError(f"the output {output} is of no known kind", "name it .onnx")
    if form not in WRITERS:
        raise UsageError(f"there is no format '{form}'", f"known: {', '.join(WRITERS)}")
    writer = WRITERS[form]
    sidecar_path = output.with_suffix(".json")
    files = [data, labels, validate, statistics if isinstance(statistics, (str, Path)) else None]
    sources = [model, recipe.target_file, *(Path(path) if path else None for path in files)]
    check_outputs([output, sidecar_path], sources)
    target = resolve_target(recipe)
    given = any(place is not None for place in (data, function, synthetic)) or recipe.mode != "static"
    places = Data(path_or_none(data), path_or_none(labels), split, function, synthetic) if given else None
    source = load(model, opening, shown_by(places, recipe, statistics))
    check_outputs([output, sidecar_path], source.files)
    with blamed_on(source):
        folded = fold(source.graph, max(target.activation.opset, opset_for(recipe)), recipe.requantize)
        log = output.with_name(f"{output.name}.search") if recipe.tune.max_drop is not None else None
        if log is not None and not run.resume:
            log.unlink(missing_ok=True)
        judged = Data(Path(validate), path_or_none(labels), validate_split) if validate is not None else None
        decision = decided(source, folded, statistics, places, recipe, run, writer, judged, log, progress)
        found, tuned = decision.statistics, decision.tuned
        final, plan = tuned.model, tuned.plan
        explanations = explain(final, plan, explained)
        if strict:
            check_strict(plan, found)
        quantized = quantize(final, plan)
        written = model_bytes(writer(quantized))
    if found.synthetic and recipe.mode == "static":
        logger.warning("the ranges come from random data: the model is for trying out, not for use")
    entry = FileEntry(shown_name(output), hashlib.sha256(written).hexdigest(), len(written))
    sidecar = sidecar_file.describe(quantized, source, entry, found, recipe)
    del quantized  # of a large model, the integers stand in memory once from here on
    give_back(len(written))
    progress("check", 0, 1)
    check = self_check(source, written, sidecar, found)
    if verified:
        stored = recipe.mode != "static"
        require_verified(
            compare_weights(written, sidecar) if stored else compare_integers(written, sidecar, [found.check_inputs])
        )
    with staged() as writing:
        writing.write(output, written)
        writing.write(sidecar_path, sidecar_file.encode(sidecar))
    if log is not None:
        log.unlink(missing_ok=True)
    return Conversion(
        output, sidecar_path, sidecar, plan, check, tuned, explanations, decision.trials, decision.attempts
    )


@contextlib.contextmanager
def blamed_on(source: LoadedModel) -> Iterator[None]:
    """Where something fails in a way that nobody foresaw, ask ONNX Runtime whether the model is a valid one at all.

    Raises:
        RunError: If it is not, with what is wrong with it.
    """
    try:
        yield
    except ReportedError:
        raise
    except Exception:
        Runner(source.runnable, what=source.name)
        raise


@dataclass(frozen=True, eq=False)
class Decision:
    """What was decided before anything is written.

    Attributes:
        statistics: What calibration saw.
        tuned: The tuned model and its plan.
        trials: The plans that were timed.
        attempts: The widths that were tried.
    """

    statistics: Statistics
    tuned: Tuned
    trials: tuple[Trial, ...] = ()
    attempts: tuple[Attempt, ...] = ()


def decided(
    source: LoadedModel,
    folded: ir.Model,
    statistics: Statistics | Path | str | None,
    places: Data | None,
    recipe: Recipe,
    run: Run,
    writer: Callable[[QuantizedModel], ir.Model],
    validation: Data | None,
    log: Path | None,
    progress: Progress,
) -> Decision:
    """Return everything that is decided of a model."""
    if recipe.mode != "static":
        if recipe.tune.max_drop is not None:
            raise UsageError(
                f"--max-drop searches widths of static models, not of --mode {recipe.mode}", "leave one out"
            )
        plan = plan_without_data(folded, recipe)
        return Decision(unobserved(source, places, recipe), Tuned(folded, plan, (), why_not=f"mode {recipe.mode}"))
    found = statistics_of(source, folded, statistics, places, recipe, run, progress)
    trials: tuple[Trial, ...] = ()
    if recipe.tune.optimize == "latency":
        trials = raced(folded, found, recipe, writer, run.threads, progress)
        best = next(trial for trial in trials if trial.kept)
        recipe = keeping(recipe, best.layers)
    tuned, attempts = tuned_by(source, folded, found, places, recipe, run, validation, log, progress)
    if trials:
        tuned = replace(tuned, plan=with_reasons(tuned.plan, trials))
    return Decision(found, tuned, trials, attempts)


def tuned_by(
    source: LoadedModel,
    folded: ir.Model,
    found: Statistics,
    places: Data | None,
    recipe: Recipe,
    run: Run,
    validation: Data | None,
    log: Path | None,
    progress: Progress,
) -> tuple[Tuned, tuple[Attempt, ...]]:
    """Tune a model as far as its recipe and its data allow, at the widths that keep its metric where that is asked."""
    why_not = why_untuned(folded, found, recipe)
    real = places if places is not None and places.synthetic is None else None
    samples = None
    if not why_not and real is None:
        why_not = "there are statistics alone, and tuning runs samples (--data)"
    if not why_not and real is not None:
        samples = tuning_samples(source, folded, real, recipe)
        why_not = "" if samples is not None else "there are too few samples: some tune, and others judge"
    again = replace(run, partial=None, resume=False, shard=(0, 1))

    def observed(changed: ir.Model) -> Statistics:
        assert places is not None  # noqa: S101 - there are samples only where there is data
        return observe(source, changed, places, recipe, again, progress)

    may_observe = observed if run.runtime == "onnxruntime" and samples is not None else None
    if recipe.tune.max_drop is not None:
        judged = validation or real
        if judged is None:
            raise UsageError(
                "--max-drop needs labelled data to judge by", "give --validate DATA, or --data with labels"
            )
        score, digest = scorer(source, judged, recipe)
        key = "\n".join([source.sha256, found.data_sha256, digest, repr(recipe), str(found.samples)])
        search = Search(folded, found, recipe, samples, may_observe, score, progress, log, key)
        widths = search.run(recipe.tune.max_drop)
        return widths.tuned, widths.attempts
    if samples is None:
        return untuned(folded, found, recipe, why_not), ()
    return tune(folded, found, recipe, samples, may_observe, progress), ()


def raced(
    folded: ir.Model,
    found: Statistics,
    recipe: Recipe,
    writer: Callable[[QuantizedModel], ir.Model],
    threads: int,
    progress: Progress,
) -> tuple[Trial, ...]:
    """Write and time every candidate that the statistics suffice for."""
    layers = candidates(folded, recipe)
    written = {}
    for number, (name, floats) in enumerate(layers.items()):
        progress("candidates", number, len(layers))
        try:
            final, seen, _ = smooth(folded, found, keeping(recipe, floats))
            written[name] = model_bytes(writer(quantize(final, make_plan(final, seen, keeping(recipe, floats)))))
        except PlanError as error:
            logger.info("the candidate '%s' is left out: %s", name, error)
    return timed(written, layers, found.check_inputs, threads or 1)


def with_reasons(plan: Plan, trials: tuple[Trial, ...]) -> Plan:
    """Return a plan whose float layers say by how much they run faster, where that is why they stay float."""
    best = next(trial for trial in trials if trial.kept)
    by_rule = next(trial for trial in trials if not trial.layers)
    reason = (
        f"float runs faster here ({best.seconds * 1e3:.3f} ms for the model, {by_rule.seconds * 1e3:.3f} ms otherwise)"
    )
    floats = tuple(replace(layer, reason=reason) if layer.name in best.layers else layer for layer in plan.floats)
    return replace(plan, floats=floats)


def path_or_none(path: Path | str | None) -> Path | None:
    """Return a path of what may be text or nothing."""
    return None if path is None else Path(path)


def check_places(recipe: Recipe, statistics: object, *data: object) -> None:
    """Check that ranges come from one place, and that there is none where there are no ranges.

    Raises:
        UsageError: If not.
    """
    given = sum(place is not None for place in data)
    if recipe.mode == "static" and (given > 1 or (given == 0 and statistics is None)):
        raise UsageError(
            "convert needs either statistics or calibration data",
            "give --stats, or data from one place (--data, --data-function, --synthetic), or both; "
            "or --mode dynamic or weights, which need none",
        )
    if recipe.mode != "static" and (statistics is not None or given > 1):
        raise UsageError(
            f"--mode {recipe.mode} has no use for statistics, nor for data from two places",
            "leave them out; --data is for the self-check alone",
        )


def opset_for(recipe: Recipe) -> int:
    """Return the oldest operator set that holds what a mode writes: 21 for weights in blocks and of 4 bits."""
    return 21 if recipe.mode == "weights" and (recipe.weight.block_size or recipe.weight.bits == 4) else 13


def statistics_of(
    source: LoadedModel,
    folded: ir.Model,
    statistics: Statistics | Path | str | None,
    data: Data | None,
    recipe: Recipe,
    run: Run,
    progress: Progress,
) -> Statistics:
    """Return the statistics that were given, or those of the data.

    Raises:
        ReportedError: If they cannot be used, or belong to another model.
    """
    if statistics is None and data is not None:
        check_counted(recipe)
        return observe(source, folded, data, recipe, run, progress)
    assert statistics is not None  # noqa: S101 - check_places has seen to it
    found = loaded_statistics(statistics)
    check_belongs(found, source)
    return found


def unobserved(source: LoadedModel, data: Data | None, recipe: Recipe) -> Statistics:
    """Return statistics of nothing, with some samples for the self-check: of the data, or random ones."""
    runner = Runner(source.runnable, what=source.name)
    given = data if data is not None and (data.path or data.function) else Data(synthetic=CHECKED)
    dataset = open_dataset(
        given.path,
        runner.inputs,
        recipe.preprocess,
        given.labels,
        given.split,
        function=given.function,
        synthetic=given.synthetic,
    )
    size = fitted_batch(runner.inputs, None) if fixes_batch(runner.inputs) else min(CHECKED, len(dataset))
    spans = boundaries(dataset, np.arange(len(dataset), dtype=np.intp), size, fixes_batch(runner.inputs))
    if not spans:
        raise DataError(f"the model takes batches of {size} and there are {len(dataset)} samples", "give more samples")
    inputs = dataset.read(np.arange(*spans[0], dtype=np.intp))
    if given.synthetic is not None:
        inputs = with_ones(runner, inputs)
    return Statistics(source.sha256, "", {}, 0, "minmax", {}, inputs, synthetic=given.synthetic is not None)


def with_ones(runner: Runner, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return random inputs whose integers are ones (a mask of zeros would hide the model), where the model takes that."""
    ones = {name: values if values.dtype.kind == "f" else np.ones_like(values) for name, values in inputs.items()}
    try:
        runner.run(ones)
    except RunError:
        return inputs
    return ones


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


def check_strict(plan: Plan, statistics: Statistics) -> None:
    """Raise StrictError for ranges of random data, operators that stay float, and weight channels of nothing but zeros."""
    if statistics.synthetic and statistics.tensors:
        raise StrictError("the ranges come from random data (--synthetic)", "calibrate with real data")
    if plan.floats:
        first = plan.floats[0]
        more = f" and {len(plan.floats) - 1} more" if len(plan.floats) > 1 else ""
        raise StrictError(
            f"{first.operator} '{first.name}'{more} would stay float: {first.reason}", "exit code 5 is --strict"
        )
    for name, channels in plan.dead_channels.items():
        raise StrictError(f"the weight '{name}' has dead channels: {', '.join(map(str, channels))}", "prune them")


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
    if document.mode != "static":
        return compare_weights(model.read_bytes(), document)
    runner = Runner(load(model).runnable, what=model.name)
    if data is None:
        size = fitted_batch(runner.inputs, batch or RANDOM_SAMPLES)
        return compare_integers(model.read_bytes(), document, [random_inputs(document, runner, size, seed)])
    dataset = open_dataset(
        Path(data), runner.inputs, (recipe or Recipe()).preprocess, Path(labels) if labels else None, split
    )
    indices = select(len(dataset), selection or Selection())
    size = fitted_batch(runner.inputs, batch)
    whole = indices[: len(indices) - len(indices) % size] if fixes_batch(runner.inputs) else indices
    if not len(whole):
        raise DataError(f"the model takes batches of {size} and there are {len(indices)} samples", "give more samples")

    def drawn() -> Iterable[dict[str, NDArray[Any]]]:
        for number, feeds in enumerate(batches(dataset, whole, size)):
            yield feeds
            progress("verify", min((number + 1) * size, len(whole)), len(whole))

    return compare_integers(model.read_bytes(), document, drawn())


__all__ = [
    "Conversion",
    "Evaluation",
    "Opening",
    "SelfCheck",
    "calibrate",
    "convert",
    "evaluate",
    "verify",
]
