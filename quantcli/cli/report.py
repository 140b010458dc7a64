"""``quantcli report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantcli.cli.options import (
    EXISTING,
    EXISTING_FILE,
    KINDS_OF_DATA,
    OUTPUT,
    label_options,
    opening_of,
    preprocess_options,
    recipe_of,
    recipe_option,
    sample_options,
    torch_options,
)
from quantcli.cli.terminal import output_options, terminal_of


@click.command()
@click.argument("quantized", type=EXISTING_FILE)
@click.option("--float", "reference", type=EXISTING_FILE, required=True, help="The float model that it came from.")
@click.option("--data", type=EXISTING, required=True, help=f"{KINDS_OF_DATA}.")
@click.option(
    "--metric", metavar="NAME|MODULE:FUNCTION", help="As of eval.  [default: top1 where there are labels, else sqnr]"
)
@click.option("-o", "--output", type=OUTPUT, required=True, help="The page to write (.html).")
@click.option("--latency/--no-latency", default=True, show_default=True, help="Measure latencies.")
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads while latency is measured."
)
@sample_options
@preprocess_options
@label_options
@torch_options
@recipe_option
@output_options
@click.pass_context
def report(
    context: click.Context, /, quantized: Path, reference: Path, data: Path, output: Path, **options: Any
) -> None:
    """Write a page about a QUANTIZED model (.onnx, its sidecar beside it): accuracy, size, speed, layers, ranges, weights, recipe.

    The page is one HTML file that needs no network, with its numbers in it as JSON.
    """
    from calibration.datasets import Selection
    from quantcli.files import check_output, staged
    from quantcli.report.make import made
    from quantcli.report.page import page

    terminal = terminal_of(context)
    check_output(
        output, quantized, quantized.with_suffix(".json"), reference, data, options["labels"], options["recipe"]
    )
    recipe = recipe_of(
        {key: value for key, value in options.items() if key not in {"samples", "batch", "shuffle", "seed"}}
    )
    selection = Selection(options["samples"], options["shuffle"], options["seed"] or 0)
    with terminal.progress() as progress:
        found = made(
            quantized,
            reference,
            data,
            options["metric"],
            recipe,
            options["labels"],
            options["split"],
            selection,
            options["batch"],
            options["latency"],
            options["threads"],
            opening_of(options),
            progress,
        )
    with staged() as files:
        files.write(output, page(found))
    terminal.result({**found.document(), "report": str(output)})
    terminal.say(f"{output}: {len(found.evaluation.layers)} layers, {len(found.histograms)} activations")
