"""What is decided of a model before anything is written: its statistics, its plan, and how it is tuned."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from calibration import statistics as statistics_file
from calibration.datasets import boundaries, fitted_batch, fixes_batch
from calibration.errors import DataError, RunError, StatisticsError
from calibration.hooks.onnxruntime import Runner
from calibration.statistics import Statistics
from quantcli.arithmetic.affine import IntegerType
from quantcli.errors import PlanError, StrictError, UsageError
from quantcli.fold import OLDEST_OPSET, constant, fold
from quantcli.masks import unresolvable
from quantcli.modes import plan_without_data
from quantcli.observation import Run, check_counted, observe, preprocess_of
from quantcli.placement import place
from quantcli.plan import Plan, make_plan
from quantcli.probe import model_bytes
from quantcli.quantize import quantize
from quantcli.recipe import Recipe, keeping, resolve_target
from quantcli.rules import Arithmetic, Operand
from quantcli.sources import Data
from quantcli.tune.data import scorer, tuning_samples
from quantcli.tune.effort import Tuned, tune, untuned, why_untuned
from quantcli.tune.latency import Trial, candidates, timed
from quantcli.tune.log import Log
from quantcli.tune.search import Search
from quantcli.tune.smooth import smooth
from quantcli.tuning import Tuning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec
    from quantcli.load import LoadedModel
    from quantcli.load.learned import Learned, LearnedWeight
    from quantcli.placement import PlacedLayer
    from quantcli.progress import Progress
    from quantcli.quantize import QuantizedModel
    from quantcli.sidecar import Sidecar
    from quantcli.tune.log import Attempt
    from quantcli.tune.widths import Width

logger = logging.getLogger(__name__)

# How many samples the self-check runs where nothing was calibrated.
CHECKED = 4
# Sizes of free axes that they are tried with where models do not run with those of 1.
LARGER = (32, 64, 8, 128)
# The widest grid of a weight that can be written.
WIDEST_WEIGHT = 8


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


def one_thread() -> Any:
    """Let numpy's products run in one thread: sums over several depend on how many there are, and so would the written bytes."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")


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
    widths: tuple[Width, ...],
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
    with one_thread():
        tuned, attempts = tuned_by(source, folded, found, places, recipe, run, validation, log, widths, progress)
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
    widths: tuple[Width, ...],
    progress: Progress,
) -> tuple[Tuned, tuple[Attempt, ...]]:
    """Tune a model as far as its recipe and its data allow, at the widths that keep its metric where that is asked."""
    if source.learned is not None:
        if recipe.tune.max_drop is not None:
            raise UsageError("--max-drop searches widths, and a prepared model has its own", "leave it out")
        recipe, tuning = as_learned(source.learned, folded, found, recipe)
        return untuned(folded, found, recipe, "the model was prepared: its ranges and weights are learned", tuning), ()
    why_not = why_untuned(folded, found, recipe)
    real = places if places is not None and places.synthetic is None else None
    samples = None
    if not why_not and real is None:
        why_not = "there are statistics alone, and tuning runs samples (--data)"
    if not why_not and real is not None:
        samples = tuning_samples(source, folded, real, recipe)
        why_not = "" if samples is not None else "there are too few samples: some tune, and others judge"
    again = replace(run, partial=None, resume=False, shard=(0, 1))

    whole: list[tuple[ir.Model, Statistics]] = []

    def observed(model: ir.Model, channels: bool = False) -> Statistics:
        assert places is not None  # noqa: S101 - there are samples only where there is data
        if not channels:
            return observe(source, model, places, recipe, again, progress)
        if not whole or whole[0][0] is not model:
            wishes = msgspec.structs.replace(recipe.calibration, observer="minmax", channels=True)
            counting = msgspec.structs.replace(recipe, calibration=wishes)
            whole[:] = [(model, observe(source, model, places, counting, again, progress))]
        return whole[0][1]

    may_observe = observed if run.runtime == "onnxruntime" and samples is not None else None
    if recipe.tune.max_drop is not None:
        judged = validation or real
        if judged is None:
            raise UsageError(
                "--max-drop needs labelled data to judge by", "give --validate DATA, or --data with labels"
            )
        score, digest = scorer(source, judged, recipe)
        key = "\n".join([source.sha256, found.data_sha256, digest, repr(recipe), str(found.samples)])
        search = Search(
            folded, found, recipe, samples, may_observe, score, progress, Log(log), key, widths, run.threads or 1
        )
        kept = search.run(recipe.tune.max_drop)
        return kept.tuned, kept.attempts
    if samples is None:
        return untuned(folded, found, recipe, why_not), ()
    return tune(folded, found, recipe, samples, may_observe, progress), ()


def as_learned(learned: Learned, folded: ir.Model, found: Statistics, recipe: Recipe) -> tuple[Recipe, Tuning]:
    """Return the recipe and the tuning that give a prepared model as it was trained.

    Raises:
        PlanError: If a width does not fit the target's types.
    """
    recipe, target = keeping(recipe, learned.floats), resolve_target(recipe)
    widest = max(learned.grids.values(), default=0)
    if widest > IntegerType(target.activation.dtype).bits:
        raise PlanError(
            f"activations of {widest} bits do not fit {target.activation.dtype}",
            'choose --activation-dtype int16, in Python Recipe(activation=Activation(dtype="int16"))',
        )
    placement = place(folded, recipe, unresolvable(folded, found.tensors, recipe))
    ranges: dict[str, tuple[float, float]] = {}
    grids: dict[str, int] = {}
    for name, (lo, hi) in learned.ranges.items():
        owner = placement.owner.get(name)
        if owner is None:
            logger.info("the learned range of '%s' has no place: nothing is quantized there", name)
            continue
        if name in learned.shared and owner in found.tensors:
            lo, hi = min(lo, found.tensors[owner].minimum), max(hi, found.tensors[owner].maximum)  # noqa: PLW2901
        low, high = ranges.get(owner, (lo, hi))
        ranges[owner] = min(lo, low), max(hi, high)
        grids[owner] = max(grids.get(owner, 2), learned.grids[name])
    scales: dict[str, NDArray[np.float32]] = {}
    bits: dict[str, int] = {}
    for layer in placement.layers:
        weight = next((value for _, value, kind in layer.operands() if kind is Operand.WEIGHT), None)
        taught = learned.weights.get(str(layer.node.name))
        if weight is None or taught is None:
            continue
        if taught.bits > WIDEST_WEIGHT:
            logger.warning(
                "the weight '%s' was trained on %d bits, and is rounded anew to %d",
                weight.name,
                taught.bits,
                WIDEST_WEIGHT,
            )
            continue
        bits[str(weight.name)] = taught.bits
        stretched = stretched_scales(layer, weight, taught, target.weight.per_channel)
        if stretched is None:
            logger.warning("the weight '%s' was trained on other scales than the target has", weight.name)
        else:
            scales[str(weight.name)] = stretched
    return recipe, Tuning(ranges, scales, bits=bits, grids=grids)


def stretched_scales(
    layer: PlacedLayer, weight: ir.Value, taught: LearnedWeight, per_channel: bool
) -> NDArray[np.float32] | None:
    """Return learned scales, stretched as folding has stretched the weight's channels; None where the target has other ones."""
    values = np.asarray(constant(weight), dtype=np.float64)
    axis = layer.rule.weight_axis(layer.node)
    if axis is None or len(taught.largest) != values.shape[axis]:
        return taught.scale.astype(np.float32) if taught.scale.size == 1 else None
    largest = np.abs(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)).max(axis=1)
    stretch = np.divide(largest, taught.largest, out=np.ones_like(largest), where=(taught.largest > 0) & (largest > 0))
    scales: NDArray[np.float32] = (taught.scale * stretch).astype(np.float32)
    if per_channel:
        return scales
    return scales[:1] if np.ptp(scales) <= 1e-6 * scales.max() else None


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
    if data is not None and data.synthetic is None:
        check_preprocessed(found, source, data, recipe)
    return found


def loaded_statistics(statistics: Statistics | Path | str) -> Statistics:
    """Return statistics, or those of a file."""
    return statistics if isinstance(statistics, Statistics) else statistics_file.load(Path(str(statistics)))


def unobserved(source: LoadedModel, data: Data | None, recipe: Recipe) -> Statistics:
    """Return statistics of nothing, with some samples for the self-check: of the data, or random ones."""
    runner = Runner(source.runnable, what=source.name)
    batch = fitted_batch(runner.inputs, None) if fixes_batch(runner.inputs) else 0
    given = data or Data()
    if not given.path and not given.function:
        given = replace(given, synthetic=batch or CHECKED)
    dataset = given.opened(source.inputs, recipe)
    size = batch or min(CHECKED, len(dataset))
    spans = boundaries(dataset, np.arange(len(dataset), dtype=np.intp), size, batch > 0)
    if not spans:
        raise DataError(f"the model takes batches of {size} and there are {len(dataset)} samples", "give more samples")
    rows = np.arange(*spans[0], dtype=np.intp)
    if given.synthetic is None:
        inputs = dataset.read(rows)
    else:
        inputs = running(runner, (given.opened(specs, recipe).read(rows) for specs in sized(runner.inputs)))
    return Statistics(source.sha256, "", {}, 0, "minmax", {}, inputs, synthetic=given.synthetic is not None)


def sized(inputs: tuple[InputSpec, ...]) -> Iterator[tuple[InputSpec, ...]]:
    """Yield a model's inputs with sizes for the axes that it leaves free behind the batch: all of 1, then what else may run.

    The mask of a decoder that has seen tokens before is as long as these and the new ones together.
    """

    def of(spec: InputSpec, free: int) -> InputSpec:
        return replace(spec, shape=(*spec.shape[:1], *(free if size is None else size for size in spec.shape[1:])))

    yield tuple(of(spec, 1) for spec in inputs)
    for longer in inputs:
        if longer.dtype.kind in "iub" and None in longer.shape[1:]:
            yield tuple(of(spec, 2 if spec is longer else 1) for spec in inputs)
    for free in LARGER if any(None in spec.shape[1:] for spec in inputs) else ():
        yield tuple(of(spec, free) for spec in inputs)


def running(runner: Runner, found: Iterable[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Return the first random inputs that a model runs: integers are 1 (a mask of zeros would hide the model), or else as they are.

    Raises:
        DataError: If it runs none of them.
    """
    why = ""
    for inputs in found:
        ones = {name: values if values.dtype.kind == "f" else np.ones_like(values) for name, values in inputs.items()}
        for feeds in (ones, inputs):
            try:
                runner.run(feeds)
            except RunError as error:
                why = why or error.what
            else:
                return feeds
    raise DataError(f"the model does not run random inputs: {why}", "give some of its own with --data")


def check_belongs(statistics: Statistics, source: LoadedModel) -> None:
    """Raise StatisticsError where the statistics were made from another model."""
    if statistics.model_sha256 != source.sha256:
        raise StatisticsError(
            f"the statistics belong to another model (sha256 {statistics.model_sha256[:12]}…, "
            f"{source.name} has {source.sha256[:12]}…)",
            "calibrate this model",
        )


def check_preprocessed(statistics: Statistics, source: LoadedModel, data: Data, recipe: Recipe) -> None:
    """Check that data that statistics were made of is preprocessed as it was then; other data may need something else.

    Raises:
        StatisticsError: If it is not.
    """
    before, now = statistics.preprocess, preprocess_of(recipe)
    if before == now:
        return
    dataset = data.opened(source.inputs, recipe)
    if dataset.digest != statistics.data_sha256:
        return
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    raise StatisticsError(
        f"the statistics were made of this data, preprocessed in another way ({', '.join(differing)})",
        "give the same options for pixels (or one recipe for all commands), or calibrate again",
    )


def check_strict(plan: Plan, statistics: Statistics, mode: str, failures: Sequence[str] = (), alike: str = "") -> None:
    """Raise StrictError for ranges of random data or of samples that are all alike, operators that stay float, and dead channels.

    Args:
        plan: The plan.
        statistics: What it was made from.
        mode: The recipe's mode.
        failures: What of tuning failed.
        alike: What `all_alike` says of the statistics.
    """
    if statistics.synthetic and statistics.tensors:
        raise StrictError("the ranges come from random data (--synthetic)", "calibrate with real data")
    if alike:
        raise StrictError(alike, "calibrate with real data")
    for failure in failures:
        raise StrictError(failure, "please report this; --effort fast goes without tuning")
    floats = [(layer.operator, layer.name, layer.reason) for layer in plan.floats]
    if mode == "static":
        stored = [layer for layer in plan.layers if layer.arithmetic is Arithmetic.STORED]
        floats += [(layer.operator, layer.name, layer.why) for layer in stored]
    if floats:
        operator, name, reason = floats[0]
        more = f" and {len(floats) - 1} more" if len(floats) > 1 else ""
        raise StrictError(f"{operator} '{name}'{more} would stay float: {reason}", "exit code 5 is --strict")
    for name, channels in plan.dead_channels.items():
        raise StrictError(f"the weight '{name}' has dead channels: {', '.join(map(str, channels))}", "prune them")


def check_arithmetic(sidecar: Sidecar, strict: bool) -> None:
    """Warn where the target's arithmetic is not what ONNX Runtime shows, or not what its own integer shift can do.

    Raises:
        StrictError: In place of the second warning, where that is asked for.
    """
    floors = sum(layer.rounding == "floor" and bool(layer.multipliers) for layer in sidecar.layers)
    if floors:
        logger.warning(
            "%d layers drop bits (rounding floor) where ONNX Runtime, of which tuning and the self-check speak, rounds to nearest: "
            "the target keeps less than they say",
            floors,
        )
    form = sidecar.target.multiplier
    beyond = [one.name for one in sidecar.layers if any(form.beyond(entry.shift) for entry in one.multipliers)]
    if form.shifts is None or not beyond:
        return
    low, high = form.shifts
    told = f"{len(beyond)} layers ('{beyond[0]}' first) need a shift outside the target's {low} … {high}"
    if strict:
        raise StrictError(told, "widen [multiplier] shifts, or give M0 other bits")
    logger.warning("%s", told)


def folded_for(recipe: Recipe, model: ir.Model) -> ir.Model:
    """Return a float model folded to what a recipe's mode and target write.

    Weights in blocks and of 4 bits take operator set 21. Where nothing is calibrated, dense layers stay MatMul, for which the
    runtime has a kernel of stored weights.
    """
    blocks = recipe.mode == "weights" and (recipe.weight.block_size or recipe.weight.bits == 4)
    opset = max(resolve_target(recipe).activation.opset, 21 if blocks else OLDEST_OPSET)
    return fold(model, opset, recipe.requantize, matrices=recipe.mode == "static")
