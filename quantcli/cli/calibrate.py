"""``quantcli calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantcli.cli.options import (
    EXISTING,
    EXISTING_FILE,
    OUTPUT,
    keep_apart,
    label_options,
    preprocess_options,
    quantization_options,
    recipe_of,
    recipe_option,
    sample_options,
)
from quantcli.cli.terminal import output_options, terminal_of


@click.command()
@click.argument("model", type=EXISTING_FILE)
@click.option("--data", type=EXISTING, required=True, help=".npz, .npy, or a folder of images.")
@click.option("-o", "--output", type=OUTPUT, required=True, help="The statistics file to write.")
@click.option("--observer", type=click.Choice(["minmax"]), help="What is counted.  [default: minmax]")
@sample_options
@preprocess_options
@label_options
@recipe_option
@quantization_options
@output_options
@click.pass_context
def calibrate(context: click.Context, /, model: Path, data: Path, output: Path, **options: Any) -> None:
    """Run data through MODEL (.onnx or .pt2) and save the statistics of its activations.

    One statistics file serves any number of conversions of the same model.
    """
    from quantcli import pipeline

    terminal = terminal_of(context)
    keep_apart(options, output)
    recipe = recipe_of(options)
    with terminal.progress() as progress:
        found = pipeline.calibrate(model, data, output, recipe, options["labels"], options["split"], progress)
    if terminal.verbose:
        rows = [(name, f"{seen.minimum:.6g}", f"{seen.maximum:.6g}") for name, seen in found.tensors.items()]
        terminal.table("Ranges", ("tensor", ">lowest", ">highest"), rows)
    terminal.say(f"{output}: {len(found.tensors)} tensors over {found.samples} samples")
    terminal.result(
        {
            "statistics": str(output),
            "samples": found.samples,
            "observer": found.observer,
            "model_sha256": found.model_sha256,
            "data_sha256": found.data_sha256,
            "tensors": {
                name: {"minimum": seen.minimum, "maximum": seen.maximum} for name, seen in found.tensors.items()
            },
        }
    )
