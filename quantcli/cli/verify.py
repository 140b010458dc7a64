"""``quantcli verify``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcli.cli.options import (
    EXISTING,
    EXISTING_FILE,
    KINDS_OF_DATA,
    label_options,
    preprocess_options,
    recipe_of,
    recipe_option,
    sample_options,
)
from quantcli.cli.terminal import output_options, samples, terminal_of

if TYPE_CHECKING:
    from calibration.datasets import Selection
    from quantcli.cli.terminal import Terminal
    from quantcli.integer.verify import Verification
    from quantcli.recipe import Recipe


@click.command()
@click.argument("sidecar", type=EXISTING_FILE, required=False)
@click.option(
    "--c", "folder", type=EXISTING, metavar="DIR", help="Compile this C source, and compare it with the executor."
)
@click.option("--cc", help="With --c: the compiler.  [default: $CC, or the first of cc, gcc, clang]")
@click.option("--cflags", help="With --c: its flags.  [default: -std=c99 -O2]")
@click.option("--data", type=EXISTING, help=f"Inputs: {KINDS_OF_DATA}.  [default: random, over the ranges]")
@sample_options
@preprocess_options
@label_options
@recipe_option
@output_options
@click.pass_context
def verify(
    context: click.Context, /, sidecar: Path | None, folder: Path | None, data: Path | None, **options: Any
) -> None:
    """Verify a SIDECAR (.json) against the quantized model beside it.

    Digests, scales, zero points, constants, multipliers, shifts, clamps and tables are compared with the model; then every layer is
    run in integers from ONNX Runtime's own integers, and must give what ONNX Runtime gives: exactly, or off by one where the real
    value lies on a rounding tie, or where the layer's recorded rounding (floor, double) may give the other integer.
    Exit code 3 on any other difference. With --c, what
    `convert --format c` wrote is compiled, and every output must be the executor's.
    """
    from calibration.datasets import Selection
    from quantcli import pipeline
    from quantcli.delivery import require_verified
    from quantcli.errors import UsageError

    terminal = terminal_of(context)
    recipe = recipe_of(
        {key: value for key, value in options.items() if key not in {"samples", "batch", "shuffle", "seed"}}
    )
    selection = Selection(options["samples"], options["shuffle"], options["seed"] or 0)
    if (sidecar is None) == (folder is None):
        raise UsageError("verify takes either a sidecar or C source", "give SIDECAR, or --c DIR")
    if folder is None and (options["cc"] or options["cflags"] is not None):
        raise UsageError("--cc and --cflags are for C source", "give --c DIR")
    if sidecar is None:
        verify_source(terminal, folder, data, recipe, selection, options)
        return
    with terminal.progress() as progress:
        found = pipeline.verify(
            sidecar,
            data,
            recipe,
            options["labels"],
            options["split"],
            selection,
            options["batch"],
            options["seed"] or 0,
            progress,
        )
    if not found.findings:
        terminal.result(as_document(found))
    elif terminal.verbose:
        terminal.table("Differences", ("layer", "what"), [(finding.layer, finding.what) for finding in found.findings])
    require_verified(found)
    terminal.say(
        f"{found.elements:,} integers of {found.layers} layers are as the sidecar states; "
        f"{found.ties:,} of them off by one in ONNX Runtime, as their rounding explains"
    )
    if found.islands:
        terminal.say(
            "float islands bridged: " + ", ".join(f"{name} ({count})" for name, count in sorted(found.islands.items()))
        )


def as_document(found: Verification) -> dict[str, Any]:
    """Return a verification for machines."""
    return {
        "layers": found.layers,
        "integers": found.elements,
        "ties": found.ties,
        "float_islands": dict(sorted(found.islands.items())),
        "findings": [{"layer": finding.layer, "what": finding.what} for finding in found.findings],
    }


def verify_source(
    terminal: Terminal, folder: Any, data: Path | None, recipe: Recipe, selection: Selection, options: dict[str, Any]
) -> None:
    """Compile C source, and compare it with the executor."""
    from quantcli import pipeline
    from quantcli.embedded.deliver import require_same

    flags = None if options["cflags"] is None else shlex.split(options["cflags"])
    with terminal.progress() as progress:
        found = pipeline.verify_c(
            folder,
            data,
            recipe,
            options["labels"],
            options["split"],
            selection,
            options["seed"] or 0,
            options["cc"],
            flags,
            progress,
        )
    require_same(found)
    terminal.result(
        {"compiler": found.compiler, "samples": found.samples, "outputs": found.values, "differences": found.wrong}
    )
    terminal.say(
        f"{found.values:,} outputs of {samples(found.samples)}, compiled by {found.compiler}, are the executor's"
    )
