"""``quantcli eval``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcli.cli.options import (
    EXISTING,
    EXISTING_FILE,
    KINDS_OF_DATA,
    OUTPUT,
    function_option,
    label_options,
    only_finite,
    opening_of,
    preprocess_options,
    recipe_of,
    recipe_option,
    sample_options,
    torch_options,
)
from quantcli.cli.terminal import Terminal, output_options, samples, terminal_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantcli.evaluation.verdict import Check
    from quantcli.pipeline import Evaluation

# From so many dB lost at one layer on, something can be done about it.
MUCH = 6.0


@click.command("eval")
@click.argument("quantized", type=EXISTING_FILE)
@click.option(
    "--float", "reference", type=EXISTING_FILE, help="The float model (.onnx, or what torch wrote) to stand beside it."
)
@click.option("--data", type=EXISTING, help=f"What it is measured on: {KINDS_OF_DATA}.")
@function_option
@click.option(
    "--metric",
    metavar="NAME|MODULE:FUNCTION",
    help="What to measure: top1, top5, sqnr, mse, psnr, cosine, or a function of (outputs, labels), better the higher.  "
    "[default: top1 where there are labels, else sqnr]",
)
@click.option(
    "--max-drop",
    type=float,
    callback=only_finite,
    help="Fail (exit code 4) where float minus quantized is above this, in points.",
)
@click.option(
    "--min-metric",
    type=float,
    callback=only_finite,
    help="Fail (exit code 4) where the quantized model's metric is below this; not for mse, which is better the lower.",
)
@click.option(
    "--min-speedup",
    type=float,
    callback=only_finite,
    help="Fail (exit code 4) where it is not so many times as fast as float.",
)
@click.option("--junit", type=OUTPUT, help="Write the verdict as JUnit XML too.")
@click.option("--layers", is_flag=True, help="Show the SQNR of every layer (over the first batch), the worst first.")
@click.option("--memory", is_flag=True, help="Measure the memory that both models take (over the first batch).")
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
    data: Path | None,
    function: str | None,
    metric: str | None,
    max_drop: float | None,
    min_metric: float | None,
    min_speedup: float | None,
    junit: Path | None,
    **options: Any,
) -> None:
    """Measure a QUANTIZED model on data, beside the float model it came from."""
    from calibration.datasets import Selection
    from quantcli import pipeline
    from quantcli.errors import UsageError
    from quantcli.evaluation.verdict import Thresholds, check_thresholds, checked, figures_of
    from quantcli.files import check_output

    if junit is not None:
        check_output(junit, quantized, reference, data, options["labels"], options["recipe"])
    terminal = terminal_of(context)
    if max_drop is not None and reference is None:
        raise UsageError("--max-drop compares with the float model and none was given", "add --float MODEL")
    asked = Thresholds(max_drop, min_metric, min_speedup)
    if metric is not None:
        check_thresholds(metric, asked)
    if options["memory"] and (
        reference is None or {path.suffix for path in (quantized, reference) if path is not None} != {".onnx"}
    ):
        raise UsageError("--memory compares two ONNX models", "add --float MODEL.onnx")
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
            options["memory"],
            progress,
            function,
        )
    checks = checked(figures_of(found), asked)
    show(terminal, found)
    missed = [check for check in checks if not check.met]
    verdict = ("fail" if missed else "pass") if checks else None
    document = {**as_document(found), "verdict": verdict, "checks": [dataclasses.asdict(check) for check in checks]}
    if junit is not None:
        write_junit(junit, quantized, checks)
    terminal.result(document)
    for check in checks:
        if check.met:
            terminal.say(f"verdict: {check.said}")
        else:
            terminal.warn(check.said)
    if missed:
        context.exit(4)


def write_junit(path: Path, quantized: Path, checks: Sequence[Check]) -> None:
    """Write the verdicts as JUnit XML: a case per threshold, or one that nothing was asked of."""
    from quantcli.evaluation.junit import Case, junit
    from quantcli.files import staged

    cases = [Case(quantized.name, check.name, "" if check.met else check.said) for check in checks]
    with staged() as files:
        files.write(path, junit("quantcli eval", cases or [Case(quantized.name, "evaluated")]))


def show(terminal: Terminal, found: Evaluation) -> None:
    """Print an evaluation."""
    from quantcli.evaluation.metrics import UNITS, written
    from quantcli.joined import parts_within

    unit = UNITS.get(found.metric, "")
    rows: list[tuple[str, str, str, str]] = [
        (
            f"{found.metric} ({unit})" if unit else found.metric,
            written(found.metric, found.reference),
            written(found.metric, found.quantized),
            "" if found.drop is None else f"drop {written(found.metric, found.drop, signed=True)}",
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
    if found.memory is not None:
        before, after = found.memory
        rows.append(
            ("memory (MB, first batch)", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{after / max(before, 1):.0%}")
        )
    for output, sqnr in found.sqnr.items():
        each = {output: sqnr, **parts_within(output, found.parts)}
        rows.extend((f"SQNR of '{name}' (dB)", "", f"{value:.2f}", "") for name, value in each.items())
    terminal.table(samples(found.samples), ("", ">float", ">quantized", ">"), rows)
    show_kernels(terminal, found)
    if found.layers:
        terminal.table(
            "SQNR layer by layer",
            ("layer", "operator", ">dB", ">lost here"),
            [
                (layer.name, layer.operator, f"{layer.sqnr:.1f}", f"{layer.lost:.1f}" if layer.lost else "")
                for layer in sorted(found.layers, key=lambda layer: (-layer.lost, layer.sqnr))
            ],
        )
        advise(terminal, found)


def advise(terminal: Terminal, found: Evaluation) -> None:
    """Say what would win back most where a layer loses much."""
    worst = max(found.layers, key=lambda layer: layer.lost)
    if worst.lost >= MUCH:
        terminal.say(
            f"most is lost at {worst.operator} '{worst.name}': convert --exclude '{worst.name}' keeps it float, --effort best or "
            "--range mse may keep more of it, --activation-dtype int16 (on targets that have it) keeps nearly all"
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
        "parts_db": found.parts,
        "bytes": found.size,
        "memory": None if found.memory is None else {"float_bytes": found.memory[0], "bytes": found.memory[1]},
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
