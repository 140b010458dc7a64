"""``quantcli targets``."""

from __future__ import annotations

import click

from quantcli.cli.terminal import output_options, terminal_of


@click.command()
@output_options
@click.pass_context
def targets(context: click.Context, /) -> None:
    """List the targets that --target knows by name."""
    import msgspec

    from quantcli.targets import known, load_target

    terminal = terminal_of(context)
    found = [load_target(name) for name in known()]
    rows = [
        (
            target.name,
            target.activation.dtype
            + (" or int16" if target.activation.takes_both else "")
            + (" symmetric" if target.activation.symmetric else " affine")
            + (", 2^k" if target.activation.power_of_two else ""),
            f"int{target.weight.bits} {'per channel' if target.weight.per_channel else 'per tensor'}"
            + (f", depthwise int{target.weight.depthwise_bits}" if target.weight.depthwise_bits else "")
            + (", 2^k" if target.weight.power_of_two else ""),
            f"{target.multiplier.bits} bits, {target.multiplier.rounding}",
            target.description,
        )
        for target in found
    ]
    terminal.table("Targets", ("name", "activations", "weights", "multiplier", "for"), rows)
    terminal.result({"targets": [msgspec.to_builtins(target) for target in found]})
