"""``quantcli lint`` and ``quantcli diff``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from quantcli.cli.options import EXISTING_FILE
from quantcli.cli.terminal import output_options, terminal_of


@click.command()
@click.argument("sidecar", type=EXISTING_FILE)
@click.option("--target", required=True, help="A target's name or TOML file.")
@output_options
@click.pass_context
def lint(context: click.Context, /, sidecar: Path, target: str) -> None:
    """Name every layer of a SIDECAR that a target would refuse, and why.

    Where the quantized model stands beside it, its weights are looked at too. Exit code 5 where a layer would be refused.
    """
    from quantcli import review
    from quantcli import sidecar as sidecar_file
    from quantcli.targets import load_target

    terminal = terminal_of(context)
    document, wanted = sidecar_file.read(sidecar), load_target(target)
    model = sidecar.with_name(document.model.name)
    found = review.lint(document, wanted, sidecar_file.stored_weights(document, model) if model.is_file() else {})
    if found:
        terminal.table("Refused", ("layer", "operator", "reason"), [(f.layer, f.operator, f.reason) for f in found])
    terminal.say(f"{wanted.name} would refuse {len({f.layer for f in found})} of {len(document.layers)} layers")
    terminal.result({"target": wanted.name, "layers": len(document.layers), "refusals": [asdict(f) for f in found]})
    if found:
        context.exit(5)


@click.command()
@click.argument("first", type=EXISTING_FILE)
@click.argument("second", type=EXISTING_FILE)
@output_options
@click.pass_context
def diff(context: click.Context, /, first: Path, second: Path) -> None:
    """Show what moved from the sidecar FIRST to SECOND: scales, zero points, clamps, and what stays float."""
    from quantcli import review
    from quantcli import sidecar as sidecar_file

    terminal = terminal_of(context)
    found = review.diff(sidecar_file.read(first), sidecar_file.read(second))
    rows = [(c.kind, c.name, c.what, c.before, c.after) for c in found]
    if rows:
        names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
        terminal.table("Changes", ("", "name", "what", *names), rows)
    terminal.say(f"{len(found)} changes")
    terminal.result({"changes": [asdict(change) for change in found]})
