"""``quantcli eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcli.cli.options import (
    EXISTING,
    EXISTING_FILE,
    KINDS_OF_DATA,
    label_options,
    opening_of,
    preprocess_options,
    recipe_of,
    recipe_option,
    sample_options,
    torch_options,
)
from quantcli.cli.terminal import Terminal, output_options, terminal_of

if TYPE_CHECKING:
    from quantcli.pipeline import Evaluation


@click.command("eval")
@click.argument("quantized", type=EXISTING_FILE)
@click.option(
    "--float", "reference", type=EXISTING_FILE, help="The float model (.onnx, or what torch wrote) to stand beside it."
)
@click.option("--data", type=EXISTING, required=True, help=f"{KINDS_OF_DATA}.")
@click.option(
    "--metric",
    type=click.Choice(["top1", "top5", "sqnr", "mse", "psnr", "cosine"]),
    help="What to measure.  [default: top1 where there are labels, else sqnr]",
)
@click.option("--max-drop", type=float, help="Fail (exit code 4) where float minus quantized is above this, in points.")
@click.option("--layers", is_flag=True, help="Show the SQNR of every layer (over the first batch).")
@click.option("--kernels", is_flag=True, help="Show what each operator takes as ONNX Runtime runs the models.")
@click.option(
    "--latency/--no-latency", default=True, show_default=True, help="Measure float and quantized latency in turn."
)
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
def evaluate(
    context: click.Context,
    /,
    quantized: Path,
    reference: Path | None,
    data: Path,
    metric: str | None,
    max_drop: float | None,
    **options: Any,
) -> None:
    """Measure a QUANTIZED model on data, beside the float model it came from."""
    from calibration.datasets import Selection
    from quantcli import pipeline
    from quantcli.errors import UsageError

    terminal = terminal_of(context)
    if max_drop is not None and reference is None:
        raise UsageError("--max-drop compares with the float model and none was given", "add --float MODEL")
    if options["layers"] and reference is None:
        raise UsageError("--layers compares with the float model and none was given", "add --float MODEL")
    recipe = recipe_of(
        {key: value for key, value in options.items() if key not in {"samples", "batch", "shuffle", "seed"}}
    )
    with terminal.progress() as progress:
        found = pipeline.evaluate(
            quantized,
            data,
            reference,
            metric,
            recipe,
            options["labels"],
            options["split"],
            Selection(options["samples"], options["shuffle"], options["seed"] or 0),
            options["batch"],
            options["latency"],
            options["layers"],
            options["threads"],
            options["kernels"],
            opening_of(options),
            progress,
        )
    if max_drop is not None and found.drop is None:
        raise UsageError(f"--max-drop has no meaning for {found.metric}, which has no float figure", "use top1 or top5")
    show(terminal, found)
    verdict = verdict_of(found, max_drop)
    terminal.result({**as_document(found), "verdict": verdict})
    if verdict == "fail":
        terminal.warn(f"{found.metric} dropped by {found.drop:.2f} points, more than {max_drop:g}")
        context.exit(4)
    if verdict == "pass":
        terminal.say(f"verdict: {found.metric} dropped by {found.drop:.2f} points, at most {max_drop:g} allowed")


def verdict_of(found: Evaluation, max_drop: float | None) -> str | None:
    """Return ``pass`` or ``fail``; None where nothing was asked."""
    if max_drop is None or found.drop is None:
        return None
    # The drop is a difference of two percentages: their rounding must not decide.
    return "pass" if found.drop <= max_drop + 1e-9 else "fail"


def show(terminal: Terminal, found: Evaluation) -> None:
    """Print an evaluation."""
    from quantcli.evaluation.metrics import UNITS

    unit = UNITS[found.metric]
    rows: list[tuple[str, str, str, str]] = [
        (
            f"{found.metric} ({unit})" if unit else found.metric,
            "" if found.reference is None else f"{found.reference:.2f}",
            f"{found.quantized:.6g}" if found.reference is None else f"{found.quantized:.2f}",
            "" if found.drop is None else f"drop {found.drop:+.2f}",
        )
    ]
    if found.reference_size is not None:
        share = f"{found.size / found.reference_size:.0%}"
        rows.append(("size (bytes)", f"{found.reference_size:,}", f"{found.size:,}", share))
    if found.latency is not None:
        timing = found.latency
        label = f"latency (ms, batch {timing.batch}, {timing.threads} thread{'s' if timing.threads > 1 else ''})"
        cells = (
            f"{timing.float_seconds * 1e3:.3f}",
            f"{timing.quantized_seconds * 1e3:.3f}",
            pace(timing.ratio),
        )
        rows.append((label, *cells))
    rows.extend((f"SQNR of '{name}' (dB)", "", f"{value:.2f}", "") for name, value in found.sqnr.items())
    terminal.table(f"{found.samples} samples", ("", ">float", ">quantized", ">"), rows)
    show_kernels(terminal, found)
    if found.layers:
        terminal.table(
            "SQNR layer by layer",
            ("layer", "operator", ">dB", ">lost here"),
            [
                (layer.name, layer.operator, f"{layer.sqnr:.1f}", f"{layer.lost:.1f}" if layer.lost else "")
                for layer in found.layers
            ],
        )


def show_kernels(terminal: Terminal, found: Evaluation) -> None:
    """Print what each operator takes in both models."""
    for what, kernels in (("float", found.reference_kernels), ("quantized", found.kernels)):
        total = sum(kernel.seconds for kernel in kernels)
        rows = [
            (
                kernel.operator,
                str(kernel.nodes),
                f"{kernel.seconds * 1e3:.3f}",
                f"{kernel.seconds / max(total, 1e-12):.0%}",
            )
            for kernel in kernels
        ]
        if rows:
            title = f"Kernels of the {what} model ({total * 1e3:.3f} ms, profiled)"
            terminal.table(title, ("operator", ">nodes", ">ms per run", ">share"), rows)


def pace(ratio: float) -> str:
    """Say how fast the quantized model is, from the ratio of float latency to quantized latency."""
    return f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"


def as_document(found: Evaluation) -> dict[str, Any]:
    """Return an evaluation for machines."""
    timing = found.latency
    return {
        "metric": found.metric,
        "samples": found.samples,
        "quantized": found.quantized,
        "float": found.reference,
        "drop": found.drop,
        "sqnr_db": found.sqnr,
        "bytes": found.size,
        "float_bytes": found.reference_size,
        "latency": None
        if timing is None
        else {
            "float_ms": timing.float_seconds * 1e3,
            "quantized_ms": timing.quantized_seconds * 1e3,
            "ratio": timing.ratio,
            "batch": timing.batch,
            "threads": timing.threads,
        },
        "kernels": {
            what: [{"operator": k.operator, "nodes": k.nodes, "ms": k.seconds * 1e3} for k in kernels]
            for what, kernels in (("float", found.reference_kernels), ("quantized", found.kernels))
        },
        "layers": [
            {
                "name": layer.name,
                "operator": layer.operator,
                "output": layer.output,
                "sqnr_db": layer.sqnr,
                "lost_db": layer.lost,
            }
            for layer in found.layers
        ],
    }
