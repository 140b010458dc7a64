"""``quantcli demo``."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantcli.cli.evaluate import as_document, show
from quantcli.cli.terminal import output_options, terminal_of

if TYPE_CHECKING:
    from quantcli.cli.terminal import Terminal

# The demo's promise: what quantization may cost a LeNet at eight bits.
MAX_DROP = 0.1


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("quantcli-demo"),
    show_default=True,
    help="The folder to write to.",
)
@output_options
@click.pass_context
def demo(context: click.Context, /, output: Path) -> None:
    """Quantize an embedded LeNet on embedded MNIST images, and show what became of it.

    Everything that it makes stays in the folder, with the commands that would make it again.
    """
    from quantcli import pipeline
    from quantcli.evaluation.verdict import Thresholds, checked, figures_of
    from quantcli.files import staged
    from quantcli.recipe import read_recipe

    terminal = terminal_of(context)
    lay_out(output)
    model, recipe_file = output / "lenet.onnx", output / "recipe.toml"
    calibration, evaluation = output / "calibration.npz", output / "evaluation.npz"
    statistics, quantized = output / "lenet.stats", output / "lenet.int8.onnx"
    recipe = read_recipe(recipe_file)
    with terminal.progress() as progress:
        pipeline.calibrate(model, calibration, statistics, recipe, progress=progress)
        pipeline.convert(model, quantized, statistics, calibration, recipe, progress=progress)
        found = pipeline.evaluate(quantized, evaluation, model, "top1", recipe, layers=True, progress=progress)
    spelled = ["--recipe", recipe_file]
    commands = [
        shell("calibrate", model, "--data", calibration, *spelled, "-o", statistics),
        shell("convert", model, "--stats", statistics, "--data", calibration, *spelled, "-o", quantized),
        shell("eval", quantized, "--float", model, "--data", evaluation, *spelled, "--layers", "--max-drop", MAX_DROP),
    ]
    checks = checked(figures_of(found), Thresholds(max_drop=MAX_DROP))
    document = {**as_document(found), "verdict": "pass" if checks[0].met else "fail"}
    document |= {"checks": [dataclasses.asdict(check) for check in checks], "commands": commands}
    with staged() as files:
        files.write(output / "evaluation.json", (json.dumps(document, indent=2) + "\n").encode())
    show(terminal, found)
    explain(terminal, output, commands)
    terminal.result(document)
    if document["verdict"] == "fail":
        terminal.warn(checks[0].said)
        context.exit(4)


def shell(*words: object) -> str:
    """Return a quantcli command as a shell reads it."""
    return shlex.join(["quantcli", *(str(word) for word in words)])


def lay_out(output: Path) -> None:
    """Copy the embedded model, data and recipe into the demo's folder.

    Raises:
        OutputError: If the folder cannot be made or written to.
        UsageError: If the folder holds other files of the same names.
    """
    from quantcli import demo as embedded
    from quantcli.errors import OutputError, UsageError
    from quantcli.files import staged

    try:
        output.mkdir(parents=True, exist_ok=True)
        contents = {
            file.name: file.read_bytes() for file in (embedded.MODEL, embedded.CALIBRATION, embedded.EVALUATION)
        }
        contents["recipe.toml"] = embedded.RECIPE.encode()
        for name, content in contents.items():
            place = output / name
            if place.exists() and place.read_bytes() != content:
                raise UsageError(f"{place} is not the demo's own file", "choose another -o: it would be overwritten")
        with staged() as files:
            for name, content in contents.items():
                files.write(output / name, content)
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error.strerror or error})", "choose another -o") from error


def explain(terminal: Terminal, output: Path, commands: list[str]) -> None:
    """Print where everything is and how to make it again."""
    terminal.say(
        f"In {output}: lenet.stats, lenet.int8.onnx, lenet.int8.json (the sidecar), evaluation.json. Made by:\n"
    )
    for command in commands:
        terminal.say(f"  {command}")
