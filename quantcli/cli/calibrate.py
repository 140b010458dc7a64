"""``quantcli calibrate`` and ``quantcli merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcli.cli.options import (
    EXISTING_FILE,
    OUTPUT,
    Shard,
    counting_options,
    data_options,
    keep_apart,
    label_options,
    opening_of,
    preprocess_options,
    quantization_options,
    recipe_of,
    recipe_option,
    run_of,
    sample_options,
    torch_options,
)
from quantcli.cli.terminal import Terminal, output_options, samples, terminal_of

if TYPE_CHECKING:
    from calibration.statistics import Statistics


@click.command()
@click.argument("model", type=EXISTING_FILE)
@data_options
@click.option("-o", "--output", type=OUTPUT, required=True, help="The statistics file to write.")
@counting_options
@click.option("--channels/--no-channels", default=None, help="Count the extremes of every channel too.")
@click.option("--shard", type=Shard(), help="Run only this part of the samples, to be merged: 0/4 to 3/4.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint (OUTPUT.partial) of a run that was stopped.")
@click.option(
    "--checkpoint", type=click.FloatRange(min=0), metavar="SECONDS", help="How often one is kept.  [default: 30]"
)
@sample_options
@preprocess_options
@label_options
@recipe_option
@quantization_options
@torch_options
@output_options
@click.pass_context
def calibrate(context: click.Context, /, model: Path, output: Path, **options: Any) -> None:
    """Run data through MODEL (.onnx, or what torch wrote) and save the statistics of its activations.

    One statistics file serves any number of conversions of the same model. A run that is stopped, by Ctrl-C or worse, goes on
    with --resume.
    """
    from quantcli import pipeline

    terminal = terminal_of(context)
    keep_apart(options, output)
    recipe, run = recipe_of(options), run_of(options)
    with terminal.progress() as progress:
        found = pipeline.calibrate(
            model,
            options["data"],
            output,
            recipe,
            options["labels"],
            options["split"],
            options["function"],
            options["synthetic"],
            run,
            opening_of(options),
            progress,
        )
    show(terminal, found, output)


def show(terminal: Terminal, found: Statistics, output: Path) -> None:
    """Print what statistics hold."""
    if terminal.verbose:
        rows = [(name, f"{seen.minimum:.6g}", f"{seen.maximum:.6g}") for name, seen in found.tensors.items()]
        terminal.table("Ranges", ("tensor", ">lowest", ">highest"), rows)
    if found.synthetic:
        terminal.warn("the samples were made up: the ranges are for trying out, not for use")
    if not found.tensors:
        terminal.warn("no activation becomes integer: the statistics hold samples for self-checks alone")
    terminal.say(f"{output}: {len(found.tensors)} tensors over {samples(found.samples)}")
    terminal.result(
        {
            "statistics": str(output),
            "samples": found.samples,
            "observer": found.observer,
            "synthetic": found.synthetic,
            "batch": found.selection.get("batch"),
            "parts": [[part.start, part.stop, part.chosen] for part in found.parts],
            "model_sha256": found.model_sha256,
            "data_sha256": found.data_sha256,
            "tensors": {
                name: {"minimum": seen.minimum, "maximum": seen.maximum} for name, seen in found.tensors.items()
            },
        }
    )


@click.command()
@click.argument("statistics", nargs=-1, required=True, type=EXISTING_FILE)
@click.option("-o", "--output", type=OUTPUT, required=True, help="The statistics file to write.")
@output_options
@click.pass_context
def merge(context: click.Context, /, statistics: tuple[Path, ...], output: Path) -> None:
    """Put STATISTICS of the same model together: shards of one calibration, or calibrations on different data.

    The result is what one calibration on all the samples gives.
    """
    from calibration import statistics as statistics_file
    from quantcli.files import check_output, staged

    terminal = terminal_of(context)
    check_output(output, *statistics)
    found = statistics_file.merge([(path.name, statistics_file.load(path)) for path in statistics])
    with staged() as files:
        files.write(output, statistics_file.serialized(found))
    for part in statistics_file.missing(found.parts):
        terminal.warn(f"samples {part.start} to {part.stop - 1} of {part.chosen} are missing: merge all shards")
    show(terminal, found, output)
