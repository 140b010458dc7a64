"""Verify what was written: a quantized model against its sidecar, and C source against the integer executor."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calibration.datasets import batches, fitted_batch, fixes_batch, open_dataset, select
from calibration.errors import DataError, RunError
from calibration.hooks.onnxruntime import Runner
from quantcli import sidecar as sidecar_file
from quantcli.embedded.check import FLAGS
from quantcli.embedded.describe import read_description
from quantcli.embedded.verify import verify_source
from quantcli.errors import ModelError, UsageError, check_count, check_kind, check_progress, check_texts
from quantcli.files import path_of, path_or_none
from quantcli.integer.held import Held
from quantcli.integer.verify import Verification, random_inputs
from quantcli.integer.verify import verify as compare_integers
from quantcli.integer.weights import verify_weights as compare_weights
from quantcli.load import load
from quantcli.progress import Progress, silent
from quantcli.recipe import Recipe, checked_recipe, checked_selection
from quantcli.scores import inputs_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec, Selection
    from quantcli.embedded.deliver import Compared
    from quantcli.embedded.describe import Description
    from quantcli.sidecar import Sidecar

logger = logging.getLogger(__name__)

# How many random samples are verified where there is no data.
RANDOM_SAMPLES = 8
# Sizes of free axes behind the batch, of which the first that the model runs is taken.
FREE_SIZES = (32, 64, 8, 128, 1)


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
    sidecar, selection = path_of(sidecar, "sidecar"), checked_selection(selection)
    check_count(batch, "batch")
    check_count(seed, "seed", 0)
    check_progress(progress)
    document = sidecar_file.read(sidecar)
    model = sidecar.with_name(document.model.name)
    if model.suffix == ".pt2":
        raise UsageError(
            f"{model.name} is a PyTorch program, and verify runs ONNX", "convert to .onnx: the integers are the same"
        )
    if not model.is_file():
        raise ModelError(f"{sidecar} speaks of {document.model.name}, which is not beside it", "put it there")
    if document.mode != "static":
        return compare_weights(Held.of_file(model), document)
    held, runner = Held.of_file(model), Runner(model, what=model.name)
    if data is None:
        return compare_integers(held, document, [random_feeds(document, runner, random_batch(runner, batch), seed)])
    inputs = inputs_of(held.model, model.name)
    drawn = drawn_from(path_of(data, "data"), inputs, recipe, labels, split, selection, batch, progress)
    return compare_integers(held, document, drawn)


def random_batch(runner: Runner, wanted: int | None = None) -> int:
    """Return how many random samples are run: what is wanted, or what the model fixes, or a few.

    Raises:
        DataError: If the model fixes another number than is wanted.
    """
    few = None if fixes_batch(runner.inputs) else RANDOM_SAMPLES
    return fitted_batch(runner.inputs, wanted or few)


def random_feeds(sidecar: Sidecar, runner: Runner, samples: int, seed: int) -> dict[str, NDArray[Any]]:
    """Return random inputs that a model runs.

    Raises:
        DataError: If it has free axes behind the batch, and runs with none of the sizes that are tried.
    """
    if all(size is not None for spec in runner.inputs for size in spec.shape[1:]):
        return random_inputs(sidecar, runner.inputs, samples, seed)
    for free in FREE_SIZES:
        feeds = random_inputs(sidecar, runner.inputs, samples, seed, free)
        try:
            runner.run(feeds)
        except RunError as error:
            logger.info("%s with axes of %d", error.what, free)
        else:
            return feeds
    sizes = ", ".join(map(str, FREE_SIZES))
    raise DataError(
        f"{runner.what} leaves axes of its inputs free, and does not run with sizes of {sizes}", "give --data"
    )


def compiled_inputs(runner: Runner, description: Description) -> list[InputSpec]:
    """Return the inputs of a model in the sizes that its C source was made for."""
    shapes = {port.name: port.shape for port in description.inputs}
    return [replace(spec, shape=(*spec.shape[:1], *shapes.get(spec.name, spec.shape)[1:])) for spec in runner.inputs]


def drawn_from(
    data: Path,
    inputs: tuple[InputSpec, ...],
    recipe: Recipe | None,
    labels: Path | str | None,
    split: str | None,
    selection: Selection,
    batch: int | None,
    progress: Progress,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield inputs to verify with, in batches.

    Raises:
        DataError: If there are too few samples for one.
    """
    dataset = open_dataset(data, inputs, checked_recipe(recipe).preprocess, path_or_none(labels, "labels"), split)
    indices = select(len(dataset), selection)
    size = fitted_batch(inputs, batch)
    whole = indices[: len(indices) - len(indices) % size] if fixes_batch(inputs) else indices
    if not len(whole):
        raise DataError(f"the model takes batches of {size} and there are {len(indices)} samples", "give more samples")
    for number, feeds in enumerate(batches(dataset, whole, size)):
        yield feeds
        progress("verify", min((number + 1) * size, len(whole)), len(whole))


def verify_c(
    folder: Path | str,
    data: Path | str | None = None,
    recipe: Recipe | None = None,
    labels: Path | str | None = None,
    split: str | None = None,
    selection: Selection | None = None,
    seed: int = 0,
    compiler: str | None = None,
    flags: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Compared:
    """Compile the C source in a folder, and compare every output with the integer executor's.

    Args:
        folder: What ``convert --format c`` wrote.
        data: Inputs; None for random ones.
        recipe: Where the preprocessing stands; None for the defaults.
        labels: A CSV that names the image files of the data.
        split: Keep only the CSV's rows of this split.
        selection: Which samples; all by default.
        seed: Of the random inputs.
        compiler: The C compiler; None for ``$CC``, or the first that there is.
        flags: Its flags; None for C99 at -O2.
        progress: Called with the stage, the samples done and their total.

    Raises:
        ReportedError: If anything given cannot be used. Differences are no error here: they are in what is returned.
    """
    folder, selection = path_of(folder, "folder"), checked_selection(selection)
    check_count(seed, "seed", 0)
    check_kind(compiler, str, "compiler", "give its name or path")
    check_texts(FLAGS if flags is None else flags, "flags")
    check_progress(progress)
    description = read_description(folder)
    document = sidecar_file.read(folder / f"{description.name}.json")
    loaded = load(folder / document.model.name)
    runner = Runner(loaded.runnable, what=loaded.name)
    drawn: Iterable[dict[str, NDArray[Any]]]
    if data is None:
        drawn = [random_inputs(document, compiled_inputs(runner, description), random_batch(runner), seed)]
    else:
        drawn = drawn_from(path_of(data, "data"), loaded.inputs, recipe, labels, split, selection, None, progress)
    return verify_source(folder, description, document, drawn, compiler, FLAGS if flags is None else flags)
