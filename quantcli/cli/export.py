"""``quantcli export``."""

from __future__ import annotations

from pathlib import Path

import click

from quantcli.cli.options import EXISTING_FILE, OUTPUT
from quantcli.cli.terminal import output_options, terminal_of

FORMATS = ("aimet-1.0.0", "aimet-2.0.0", "ort-overrides", "tflite", "csv", "c-params")


@click.command()
@click.argument("sidecar", type=EXISTING_FILE)
@click.option("--to", "form", type=click.Choice(FORMATS), required=True, help="The format.")
@click.option("-o", "--output", type=OUTPUT, required=True, help="The file to write.")
@click.option("--name", default="model", show_default=True, help="With --to c-params: what names in C begin with.")
@output_options
@click.pass_context
def export(context: click.Context, /, sidecar: Path, form: str, output: Path, name: str) -> None:
    """Write what a SIDECAR (.json) says in another tool's format.

    AIMET encodings, ONNX Runtime's TensorQuantOverrides, TFLite's quantization parameters, a table, or a C header. Numbers are the
    sidecar's as they are; for a C header, biases come from the model beside it.
    """
    from quantcli import sidecar as sidecar_file
    from quantcli.export import EXPORTS
    from quantcli.export.header import c_header
    from quantcli.files import check_output, staged

    terminal = terminal_of(context)
    document = sidecar_file.read(sidecar)
    check_output(output, sidecar, sidecar.with_name(document.model.name))
    text = c_header(document, sidecar, name) if form == "c-params" else EXPORTS[form](document)
    with staged() as files:
        files.write(output, text.encode())
    terminal.result(
        {"format": form, "output": str(output), "tensors": len(document.tensors), "layers": len(document.layers)}
    )
    terminal.say(f"{output}: {len(document.tensors)} tensors, {len(document.layers)} layers")
