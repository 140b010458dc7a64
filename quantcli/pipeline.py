"""The stages in order: load → fold → calibrate → plan → quantize → write → check. Read this file first.

`calibrate`, `convert` and `evaluate` are the Python API; the commands of the same names only parse and print.
"""

from __future__ import annotations

import contextlib
import glob
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from calibration import statistics as statistics_file
from calibration.errors import ReportedError
from calibration.hooks.onnxruntime import Runner
from calibration.memory import give_back
from quantcli import sidecar as sidecar_file
from quantcli.decision import check_arithmetic, check_strict, decided, folded_for, loaded_statistics
from quantcli.delivery import beside, check_search, for_form, places_of, rendered, weights_beside, widths_for
from quantcli.errors import UsageError, check_count, check_kind, check_named, check_progress, check_texts
from quantcli.evaluation.check import SelfCheck
from quantcli.evaluation.evaluate import Evaluation, evaluate
from quantcli.explain import Explanation, explain
from quantcli.files import check_output, path_of, path_or_none, staged
from quantcli.load import LoadedModel, Opening, checked_opening, load, shown_name
from quantcli.observation import Run, check_counted, checked_run, observe
from quantcli.progress import Progress, silent
from quantcli.quantize import quantize
from quantcli.randomness import check_repeatable
from quantcli.recipe import Recipe, checked_recipe, resolve_target
from quantcli.sources import Data
from quantcli.suspicion import all_alike
from quantcli.verification import verify, verify_c
from quantcli.write import WRITERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from calibration.statistics import Statistics
    from quantcli.delivery import Places
    from quantcli.embedded.deliver import Source
    from quantcli.load import Example
    from quantcli.plan import Plan
    from quantcli.sidecar import Sidecar
    from quantcli.tune.effort import Tuned
    from quantcli.tune.latency import Trial
    from quantcli.tune.log import Attempt

logger = logging.getLogger(__name__)


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
        embedded: The C source, where that was written.
    """

    model: Path
    sidecar_path: Path
    sidecar: Sidecar = field(repr=False)
    plan: Plan = field(repr=False)
    check: SelfCheck
    tuned: Tuned = field(repr=False)
    explained: tuple[Explanation, ...] = field(default=(), repr=False)
    trials: tuple[Trial, ...] = field(default=(), repr=False)
    attempts: tuple[Attempt, ...] = field(default=(), repr=False)
    embedded: Source | None = field(default=None, repr=False)


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
    check_progress(progress)
    recipe, run = checked_recipe(recipe), checked_run(run)
    model, given = path_of(model, "model"), data_of(data, labels, split, function, synthetic, opening)
    path = path_or_none(output, "output")
    if path is not None:
        run = replace(run, partial=path.with_name(f"{path.name}.partial"))
    outputs = [place for place in (path, run.partial) if place is not None]
    check_each(outputs, [model, recipe.target_file, *given.files])
    check_counted(recipe)
    resolve_target(recipe)  # one that is not known is refused before anything is loaded
    source = load(model, opening, shown_by(given, recipe))
    check_each(outputs, source.files)
    with blamed_on(source):
        folded = folded_for(recipe, source.graph)
        check_repeatable(folded)
        statistics = observe(source, folded, given, recipe, run, progress)
        if alike := all_alike(folded, statistics):
            logger.warning("%s", alike)
    if path is not None:
        with staged() as files:
            files.write(path, statistics_file.serialized(statistics))
        if run.partial is not None:
            remove_checkpoints(run.partial)
    return statistics


def shown_by(data: Data | None, recipe: Recipe, statistics: Statistics | Path | str | None = None) -> Example | None:
    """Return what shows a model's inputs: the first samples of the data, or those that statistics keep."""
    if data is not None:
        return data.example(recipe.preprocess)
    if statistics is None:
        return None
    return lambda _: loaded_statistics(statistics).check_inputs


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
    opening: Opening | None = None,
) -> Data:
    """Return where data comes from.

    Raises:
        UsageError: If it is not exactly one place.
    """
    if sum(given is not None for given in (data, function, synthetic)) != 1:
        raise UsageError("calibration needs data from one place", "give one of --data, --data-function, --synthetic")
    check_named(function, "data function")
    check_count(synthetic, "number of random samples")
    described = checked_opening(opening).inputs
    return Data(path_or_none(data, "data"), path_or_none(labels, "labels"), split, function, synthetic, described)


def convert(
    model: LoadedModel | Path | str,
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
    name: str = "model",
    until: Sequence[str] = (),
    progress: Progress = silent,
) -> Conversion:
    """Quantize a float model and write the quantized model and its sidecar (same name, ``.json``).

    Args:
        model: An ``.onnx`` file, or one that torch wrote (`quantcli.load`); or a model that is loaded already.
        output: The quantized model: ``.onnx``, or ``.pt2`` for an exported PyTorch program; of C source, its folder; of parameters
            alone, a header.
        statistics: What `calibrate` returned or saved.
        data: Calibration data, where there are no statistics.
        recipe: What the user wants; None for the defaults.
        labels: A CSV that names the image files of the data.
        split: Keep only the CSV's rows of this split.
        strict: Refuse where an operator stays float or a weight channel is dead. The first convolutions are integer layers then
            even where float is faster.
        verified: Run the integer executor against the runtime before the files get their names.
        form: ``qdq`` (QuantizeLinear/DequantizeLinear), ``qoperator`` (QLinearConv and its like), ``c`` (C source) or ``c-params``
            (parameters alone, as a header).
        function: A callable ``module:function`` that yields calibration batches, where there are neither statistics nor data.
        synthetic: So many random samples instead; refused by ``strict``.
        run: How the calibration is run.
        explained: Names of operators (patterns, or ``op:NAME``) to explain.
        validate: Labelled data that ``[tune] max_drop`` is judged on; None for the calibration data.
        validate_split: Keep only those of its CSV's rows.
        opening: How a PyTorch model is opened that does not say all of itself.
        name: The model's name in C.
        until: Integer tensors at which C source ends, in place of the model's outputs.
        progress: Called with the stage, the samples done and their total.

    Raises:
        ReportedError: If anything given cannot be used, or the written model does not work; nothing is written then.
    """
    check_wishes(form, explained, until, function, synthetic, progress)
    recipe, run = for_form(checked_recipe(recipe), form, strict), checked_run(run)
    check_places(recipe, statistics, data, function, synthetic)
    check_search(recipe, form, run.resume, validate is not None)
    outputs = places_of(path_of(output, "output"), form, recipe, name, until)
    writer = WRITERS.get(form, WRITERS["qdq"])
    data, labels, validate = (
        path_or_none(place, what) for place, what in ((data, "data"), (labels, "labels"), (validate, "validation data"))
    )
    sources = [
        None if isinstance(model, LoadedModel) else path_of(model, "model"),
        None if isinstance(statistics, statistics_file.Statistics) else path_or_none(statistics, "statistics file"),
        *(recipe.target_file, data, labels, validate),
    ]
    check_outputs(outputs, sources)
    resolve_target(recipe)  # one that is not known is refused before anything is loaded
    given = any(place is not None for place in (data, function, synthetic)) or recipe.mode != "static"
    described = checked_opening(opening).inputs
    places = Data(data, labels, split, function, synthetic, described) if given else None
    source = (
        model
        if isinstance(model, LoadedModel)
        else load(path_of(model, "model"), opening, shown_by(places, recipe, statistics))
    )
    check_outputs(outputs, source.files)
    with blamed_on(source):
        folded = folded_for(recipe, source.graph)
        check_repeatable(folded, strict)
        log = outputs.search if recipe.tune.max_drop is not None else None
        if log is not None and not run.resume:
            log.unlink(missing_ok=True)
        judged = Data(validate, labels, validate_split) if validate is not None else None
        widths = widths_for(recipe, form, outputs.model)
        decision = decided(source, folded, statistics, places, recipe, run, writer, judged, log, widths, progress)
        found, tuned = decision.statistics, decision.tuned
        final, plan = tuned.model, tuned.plan
        if strict:
            check_strict(plan, found, recipe.mode, tuned.failures, all_alike(folded, found))
        quantized = quantize(final, plan)
        plan, explanations = quantized.plan, explain(final, quantized.plan, explained)
        delivery = rendered(quantized, form, outputs.model, source)
    warn_of_data(folded, found)
    sidecar = sidecar_file.describe(quantized, source, delivery.entry(shown_name(outputs.model)), found, recipe)
    check_arithmetic(sidecar, strict)
    more, embedded = beside(outputs, delivery, sidecar, found, quantized.constants, until)
    del quantized  # of a large model, the integers stand in memory once from here on
    give_back(len(delivery.content))
    progress("check", 0, 1)
    if delivery.weights:
        check_each([weights_beside(outputs.model)], [*sources, *source.files])
    with outputs.made(), staged() as writing:
        laid = delivery.laid(outputs.model, writing)
        check = delivery.check(source, sidecar, found, verified, laid)
        if laid is None:
            writing.write(outputs.model, delivery.content)
        writing.write(outputs.sidecar, sidecar_file.encode(sidecar))
        for path, content in more.items():
            writing.write(path, content)
    if log is not None:
        log.unlink(missing_ok=True)
    return Conversion(
        outputs.model,
        outputs.sidecar,
        sidecar,
        plan,
        check,
        tuned,
        explanations,
        decision.trials,
        decision.attempts,
        embedded,
    )


def warn_of_data(folded: ir.Model, statistics: Statistics) -> None:
    """Warn where ranges come from data that is made up, or says nothing."""
    if statistics.synthetic and statistics.tensors:
        logger.warning("the ranges come from random data: the model is for trying out, not for use")
    if alike := all_alike(folded, statistics):
        logger.warning("%s", alike)


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


def check_wishes(
    form: object, explained: object, until: object, function: object, synthetic: object, progress: object
) -> None:
    """Check that what a conversion is told in passing is of its kind.

    Raises:
        UsageError: If not.
    """
    check_kind(form, str, "format", "give its name")
    check_texts(explained, "operators to explain")
    check_texts(until, "tensors to end at")
    check_named(function, "data function")
    check_count(synthetic, "number of random samples")
    check_progress(progress)


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


def check_each(outputs: Iterable[Path], sources: Iterable[Path | None]) -> None:
    """Check that no output is one of the sources and that each may take its name."""
    kept = list(sources)
    for output in outputs:
        check_output(output, *kept)


def check_outputs(outputs: Places, sources: Iterable[Path | None]) -> None:
    """Check that no output of a conversion is one of the sources, and that each may take its name.

    Raises:
        UsageError: If one is.
        OutputError: If a folder is missing or cannot be written to.
    """
    if outputs.folder is not None and not outputs.folder.exists():
        check_each([outputs.folder], sources)  # nothing in it can be a source
    else:
        check_each(outputs.files, sources)


__all__ = [
    "Conversion",
    "Evaluation",
    "Opening",
    "SelfCheck",
    "calibrate",
    "convert",
    "evaluate",
    "verify",
    "verify_c",
]
