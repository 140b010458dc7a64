"""``quantcli convert``."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcli.cli.options import (
    EXISTING,
    EXISTING_FILE,
    counting_options,
    data_options,
    keep_apart,
    label_options,
    only_finite,
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
    from collections.abc import Mapping

    from quantcli.embedded.deliver import Source
    from quantcli.evaluation.check import SelfCheck
    from quantcli.explain import Explanation
    from quantcli.pipeline import Conversion
    from quantcli.plan import LayerPlan, Plan
    from quantcli.targets import Target
    from quantcli.tune.effort import Tuned
    from quantcli.tune.equalize import Equalized

# Of so many weights it is told one by one which of their channels are dead.
FEW_DEAD = 3


@click.command()
@click.argument("model", type=EXISTING_FILE)
@click.option(
    "--mode",
    type=click.Choice(["static", "dynamic", "weights"]),
    help="Ranges from data; or found while the model runs; or weights alone: the last two need no data.  [default: static]",
)
@click.option(
    "--weight-bits",
    type=click.IntRange(2, 8),
    help="Width of weights; below 8 on int8, or 4 in blocks with --mode weights.",
)
@click.option(
    "--block-size",
    type=click.IntRange(min=16),
    help="With --mode weights: so many weights share a scale.  [default: 32 for 4 bits, else whole channels]",
)
@click.option("--stats", type=EXISTING_FILE, help="Statistics that quantcli calibrate saved.")
@data_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="The quantized model (.onnx, or .pt2 for a PyTorch program; .json beside it); of C source its folder.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["qdq", "qoperator", "c", "c-params"]),
    default="qdq",
    show_default=True,
    help="QuantizeLinear/DequantizeLinear around operators; integer operators; C source; parameters alone, as a C header.",
)
@click.option(
    "--name", default="model", show_default=True, help="With --format c or c-params: what names in C begin with."
)
@click.option(
    "--end-at",
    "until",
    multiple=True,
    metavar="TENSOR",
    help="With --format c: end at this integer tensor, and leave the rest to the caller.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Fail (exit code 5) where an operator stays float, a weight channel is dead, or data is made up.",
)
@click.option(
    "--verify", is_flag=True, help="Run the integer executor against ONNX Runtime before the files get their names."
)
@click.option(
    "--optimize", type=click.Choice(["latency"]), help="Time candidate plans on this machine, and keep the fastest."
)
@click.option(
    "--effort",
    type=click.Choice(["fast", "default", "best"]),
    help="How much is tried to keep the model's accuracy: nothing, one sweep, or every algorithm.  [default: default]",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    callback=only_finite,
    help="Search the cheapest widths that keep the metric within so many points of float's.",
)
@click.option("--validate", type=EXISTING, help="Labelled data that --max-drop is judged on.  [default: --data]")
@click.option("--validate-split", help="Keep only those rows of the labels' CSV for --validate.")
@click.option("--metric", type=click.Choice(["top1", "top5"]), help="The metric of --max-drop.  [default: top1]")
@click.option(
    "--cost",
    type=click.Choice(["bytes", "latency"]),
    help="What --max-drop keeps low: the weights' bytes, or the time of a run on this machine.  [default: bytes]",
)
@click.option("--resume", is_flag=True, help="Go on with a search (--max-drop) that was cut off.")
@click.option("--explain", multiple=True, metavar="PATTERN", help="Say why these operators are integer layers, or not.")
@counting_options
@recipe_option
@quantization_options
@torch_options
@sample_options
@preprocess_options
@label_options
@output_options
@click.pass_context
def convert(context: click.Context, /, model: Path, output: Path, strict: bool, **options: Any) -> None:
    """Quantize MODEL (.onnx, or what torch wrote) and write the quantized model with its sidecar.

    Give either statistics (--stats) or calibration data (--data), or neither with --mode dynamic or weights. The last act is a
    self-check: what was written is loaded, run on calibration samples, and compared with float.
    """
    from calibration.memory import keep_freed
    from quantcli import pipeline

    keep_freed()
    terminal = terminal_of(context)
    if options["form"] != "c":
        keep_apart(options, output, output.with_suffix(".json"))
    elif output.is_dir():
        keep_apart(options, *(output / f"{options['name']}{suffix}" for suffix in (".onnx", ".json")))
    recipe = recipe_of(options)
    with terminal.progress() as progress:
        done = pipeline.convert(
            model,
            output,
            options["stats"],
            options["data"],
            recipe,
            options["labels"],
            options["split"],
            strict,
            options["verify"],
            options["form"],
            options["function"],
            options["synthetic"],
            run_of(options),
            options["explain"],
            options["validate"],
            options["validate_split"],
            opening_of(options),
            options["name"],
            options["until"],
            progress,
        )
    show(terminal, done)
    terminal.result(as_document(done))


def show(terminal: Terminal, done: Conversion) -> None:
    """Print what a conversion did."""
    from quantcli.joined import parts_within

    plan, sidecar = done.plan, done.sidecar
    in_c = done.embedded is not None
    if terminal.verbose:
        rows = [
            (
                layer.name,
                layer.operator,
                layer.outputs[0],
                *output_cells(layer, plan),
            )
            for layer in plan.layers
        ]
        terminal.table("Integer layers", ("layer", "operator", "output", ">scale", ">zero point", "clamp"), rows)
    for found in done.explained:
        explain(terminal, found)
    if plan.floats and terminal.verbose:
        terminal.table(
            "Stays float", ("layer", "operator", "reason"), [(f.name, f.operator, f.reason) for f in plan.floats]
        )
    elif plan.floats:
        terminal.table("Stays float", ("operator", ">layers", "such as", "reason"), grouped(plan))
    for trial in done.trials:
        kept = " (kept)" if trial.kept else ""
        terminal.say(f"timed {trial.name}: {trial.seconds * 1e3:.3f} ms{kept}")
    lost_less(terminal, done)
    warn_of_dead_channels(terminal, plan.dead_channels)
    if done.check.low:
        from quantcli.evaluation.check import LOW_SQNR

        lost = "; ".join(
            f"{s.operator} '{s.name}' lost {s.lost:.1f} dB (at {s.sqnr:.1f} dB)" for s in done.check.suspects
        )
        low = {name: value for name, value in done.check.sqnr.items() if value < LOW_SQNR}
        outputs = ", ".join(f"'{name}' {value:.1f} dB" for name, value in low.items())
        where = f"; lost at: {lost}" if lost else ""
        terminal.warn(f"the quantized model is far from float (SQNR of {outputs}){where}")
        if finer := finer_options(sidecar.target, sidecar.mode):
            terminal.warn(f"where the hardware has it, more is left with {' or '.join(finer)}")
    # Models for other targets run in ONNX Runtime to be checked, not to be used.
    here = sidecar.target.placement.pays and not in_c
    if here:
        warn_of_runtime(terminal, done)
    sizes = sidecar.float_model.bytes, sidecar.model.bytes
    stored = len(stored_layers(done))
    counts = [f"integer layers {len(plan.layers) - stored}"] if stored < len(plan.layers) else []
    counts += [f"float layers with integer weights {stored}"] if stored else []
    counts += [f"operators that stay float {len(plan.floats)}", f"operator set {sidecar.opset}"]
    terminal.say(f"{done.model}: {', '.join(counts)}")
    terminal.say(f"size: {sizes[0]:,} → {sizes[1]:,} bytes ({sizes[1] / sizes[0]:.0%})")
    if done.check.speed is not None and here:
        terminal.say(
            f"speed: about {done.check.speed:.2f} times float's, {samples(done.check.batch)} at once on one thread"
        )
    for name, value in done.check.sqnr.items():
        parts = "".join(f", '{part}' {at:.1f} dB" for part, at in parts_within(name, done.check.parts).items())
        terminal.say(f"self-check: output '{name}' SQNR {value:.1f} dB over {samples(done.check.samples)}{parts}")
    terminal.say(f"{done.sidecar_path}: the sidecar")
    if done.embedded is not None:
        source_in_c(terminal, done.embedded, done.model.parent)


def warn_of_saturation(terminal: Terminal, check: SelfCheck) -> None:
    """Say what this machine's kernels lose of a model that is for others."""
    from calibration.hooks.pairs import SAYS
    from quantcli.targets import NATIVE, native

    told = ", ".join(f"'{name}' {at:.1f} dB in place of {check.sqnr[name]:.1f}" for name, at in check.here.items())
    terminal.warn(
        f"{SAYS}: {told}; --target {NATIVE} makes the model for this machine ({native()}), and for every other x86"
    )


def warn_of_runtime(terminal: Terminal, done: Conversion) -> None:
    """Say what ONNX Runtime loses on this machine: accuracy, integer kernels, time."""
    check = done.check
    if check.here:
        warn_of_saturation(terminal, check)
    if named := check.unfused:
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        terminal.warn(
            f"ONNX Runtime computes {len(named)} of the integer layers in float, no faster than the float model: "
            f"{', '.join(named[:3])}{more}"
        )
    if check.slow:
        may_race = done.sidecar.mode == "static" and not done.trials
        remedy = "; --optimize latency looks for a faster plan" if may_race else ""
        terminal.warn(f"it runs at {check.speed or 0:.2f} times float's speed on one thread of this machine{remedy}")


def finer_options(target: Target, mode: str) -> list[str]:
    """Return the options that give a target's weights and activations finer grids."""
    weight, activation = target.weight, target.activation
    options = ["--weight-bits 8"] if weight.bits < 8 else [] if weight.per_channel else ["--per-channel"]
    if mode == "static" and activation.width < 16:
        options.append("--activation-bits 8" if activation.width < 8 else "--activation-dtype int16")
    return options


def source_in_c(terminal: Terminal, found: Source, folder: Path) -> None:
    """Print what C source takes, and whether it was compiled and compared."""
    told = found.description
    rows = [
        (step.layer, step.kernel, f"{step.macs:,}", f"{step.live_bytes:,}", f"{step.constant_bytes:,}")
        for step in told.steps
    ]
    columns = ("layer", "kernel", ">multiply-accumulates", ">activations, bytes", ">constants, bytes")
    terminal.table("Kernel calls", columns, rows)
    bound = f"the largest live set is {told.bound_bytes:,}"
    terminal.say(
        f"{folder}: C source; RAM {told.arena_bytes + told.scratch_bytes:,} bytes ({told.arena_bytes:,} of activations, {bound}), "
        f"constants {told.constant_bytes:,} bytes, {told.macs:,} multiply-accumulates"
    )
    if found.checked is None:
        terminal.warn("there is no C compiler here: the source was not compiled (quantcli verify --c does it later)")
    else:
        terminal.say(f"compiled and run: {found.checked} samples give what the executor gives, byte for byte")


def lost_less(terminal: Terminal, done: Conversion) -> None:
    """Print what was done to lose less."""
    if done.attempts:
        widths(terminal, done)
    tuning(terminal, done.tuned)
    if wide := wide_activations(done.plan):
        shown = ", ".join(f"'{name}'" for name in wide[:4]) + (", …" if len(wide) > 4 else "")
        terminal.say(
            f"activations of 16 bits: {len(wide)}, of which 8 would leave too little: {shown} "
            "(widen = false in the recipe's [tune] keeps 8)"
        )
    from quantcli.tune.mixed import GROWTH

    raised = mixed_weights(done.plan) if not done.attempts else []
    if raised and done.sidecar.mode == "weights":
        few, all_of = len(raised), sum(one.role == "weight" for one in done.plan.tensors.values())
        terminal.say(
            f"weights of 8 bits: {'all' if few == all_of else few} of {all_of}; ONNX Runtime has products of stored weights of "
            f"{done.plan.target.weight.bits} bits, and no convolution or recurrence"
        )
    elif raised:
        terminal.say(
            f"weights of {max(raised)} bits: the {len(raised)} smallest, for up to {GROWTH:.0%} more bytes "
            f"(mixed = false in the recipe's [tune] keeps {done.plan.target.weight.bits})"
        )
    if done.tuned.smoothed and not terminal.verbose:
        readers = sum(len(even.layers) for even in done.tuned.smoothed)
        terminal.say(f"smoothed: the columns of {len(done.tuned.smoothed)} tensors that {readers} layers read")
    for even in done.tuned.smoothed if terminal.verbose else ():
        how = "the normalisation itself does it" if even.folded else "one Mul does it"
        left = f"{even.left:.1f} times the median one, {even.spread:.1f} before"
        terminal.say(f"smoothed '{even.name}': its largest column is {left}; {how}")


def stored_layers(done: Conversion) -> list[str]:
    """Return the layers that compute in float, from weights that are stored as integers."""
    return [entry.name for entry in done.sidecar.layers if entry.arithmetic == "stored"]


def widths(terminal: Terminal, done: Conversion) -> None:
    """Print the widths that were tried."""
    rows = [
        (
            str(one.steps),
            f"{one.weight_bytes:,}",
            f"{one.score.quantized:.2f}",
            f"{one.score.drop:+.2f} ± {one.score.uncertainty:.2f}",
            f"{one.held.drop:+.2f}",
            *([] if one.seconds is None else [f"{one.seconds * 1e3:.3f}"]),
            "kept" if one.kept else "",
        )
        for one in done.attempts
    ]
    timed = [">a run, ms"] if any(one.seconds is not None for one in done.attempts) else []
    columns = (">steps up", ">weight bytes", ">metric", ">drop", ">held back", *timed, "")
    terminal.table("Widths tried", columns, rows)
    kept = next(one for one in done.attempts if one.kept)
    held = Counter(tensor.integer.bits for tensor in done.plan.tensors.values() if tensor.role == "weight")
    terminal.say(f"weights: {', '.join(f'{held[bits]} of {bits} bits' for bits in sorted(held))}")
    stored = len(stored_layers(done))
    if kept.steps and stored == len(done.plan.layers):
        terminal.warn(
            "the metric is kept only where every layer computes in float, from weights that are stored as integers: allow more "
            "(--max-drop) for integer layers"
        )
    elif stored:
        terminal.say(
            f"{stored} of {len(done.plan.layers)} layers compute in float, from weights that are stored as integers"
        )
    if kept.score.uncertainty > 0:
        terminal.say(
            f"the drop was judged on {kept.score.samples} samples and confirmed on {kept.held.samples} held back: on others it may "
            f"differ by about {kept.score.uncertainty:.2f} points"
        )


def tuning(terminal: Terminal, tuned: Tuned) -> None:
    """Print what was tried to lose less, and what each step gained."""
    if tuned.why_not:
        terminal.say(f"tuned: nothing ({tuned.why_not})")
        return
    kept = next(one for one in tuned.tries if one.kept)
    before = tuned.tries[0]
    steps = ", ".join(f"{step} {gain:+.1f} dB" for step, (count, gain) in kept.gains.items() if count)
    terminal.say(
        f"tuned: SQNR {before.sqnr:.1f} → {kept.sqnr:.1f} dB on samples held back"
        + (f" (error of the layers, on average: {steps})" if steps else "")
        + ("" if kept is not before else ": nothing that was tried does better")
    )
    if tuned.equalized is not None:
        done = tuned.equalized
        terminal.say(
            f"equalized: {done.channels} channels of {len(done.layers)} layers, to save {done.gained:.1f} dB of noise; "
            f"{done.absorbed} biases absorbed"
        )
        for name, reason in done.refused if terminal.verbose else ():
            terminal.say(f"  '{name}' keeps its channels: {reason}")
    if terminal.verbose or len(tuned.tries) > 2:
        rows = [(one.name, f"{one.sqnr:.2f}", f"{one.seconds:.1f}", "kept" if one.kept else "") for one in tuned.tries]
        terminal.table("Tried", ("what", ">SQNR dB", ">seconds", ""), rows)


def mixed_weights(plan: Plan) -> list[int]:
    """Return the bits of the weights that are wider than the recipe wants them."""
    width = plan.target.weight
    bits = [one.integer.bits for one in plan.tensors.values() if one.role == "weight"]
    return [each for each in bits if each > width.bits] if width.depthwise_bits is None else []


def wide_activations(plan: Plan) -> list[str]:
    """Return the activations whose grid is wider than the target's own."""
    width = plan.target.activation.width
    own = {name: one for name, one in plan.tensors.items() if one.role == "activation" and one.same_as is None}
    return [name for name, one in own.items() if one.integer.bits > width]


def equalization(done: Equalized | None) -> dict[str, Any] | None:
    """Return what equalization did for machines; what became of the tensors stands in the sidecar."""
    return None if done is None else {key: value for key, value in dataclasses.asdict(done).items() if key != "moved"}


def warn_of_dead_channels(terminal: Terminal, dead: Mapping[str, tuple[int, ...]]) -> None:
    """Tell which weights have channels of nothing but zeros: each of few weights, and how many there are of more."""
    listed = list(dead.items())
    for name, channels in listed[:FEW_DEAD]:
        shown = ", ".join(map(str, channels[:8])) + (", …" if len(channels) > 8 else "")
        terminal.warn(f"weight '{name}' has {len(channels)} dead (all-zero) channels, given scale 1: {shown}")
    if rest := listed[FEW_DEAD:]:
        count = sum(len(channels) for _, channels in rest)
        terminal.warn(f"{len(rest)} more weights have {count} dead channels; the sidecar lists them (dead_channels)")


def grouped(plan: Plan) -> list[tuple[str, str, str, str]]:
    """Return what stays float by operator and reason: how many layers, and the first one's name."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in plan.floats:
        groups.setdefault((layer.operator, layer.reason), []).append(layer.name)
    return [(operator, str(len(names)), names[0], reason) for (operator, reason), names in groups.items()]


def explain(terminal: Terminal, found: Explanation) -> None:
    """Print why one operator is what it is."""
    kind = "integer layer" if found.integer else "stays float"
    counts = [
        f"{count:,} {what}"
        for count, what in (
            (found.macs, "multiply-accumulates"),
            (found.read, "values read"),
            (found.made, "values made"),
            (found.stored or None, "stored values read"),
        )
        if count is not None
    ]
    terminal.say(f"{found.operator} '{found.name}': {kind}: {found.why}")
    terminal.say(f"  per run (free dimensions as 1): {', '.join(counts)}")
    for name, how in found.tensors:
        terminal.say(f"  '{name}': {how}")


def output_cells(layer: LayerPlan, plan: Plan) -> tuple[str, str, str]:
    """Return the scale, zero point and clamp of a layer's output; none of an output that stays real."""
    if layer.clamp is None:
        return "real", "", ""
    tensor = plan.tensors[layer.outputs[0]]
    return f"{tensor.scale[0]:.6g}", str(tensor.zero_point[0]), str(list(layer.clamp))


def as_document(done: Conversion) -> dict[str, Any]:
    """Return what a conversion did, for machines."""
    sidecar = done.sidecar
    return {
        "model": str(done.model),
        "sidecar": str(done.sidecar_path),
        "sha256": sidecar.model.sha256,
        "float_bytes": sidecar.float_model.bytes,
        "bytes": sidecar.model.bytes,
        "opset": sidecar.opset,
        "integer_layers": len(sidecar.layers) - len(stored_layers(done)),
        "stored_layers": stored_layers(done),
        "float_layers": [{"name": f.name, "operator": f.operator, "reason": f.reason} for f in sidecar.float_layers],
        "smoothed": [
            {"tensor": s.name, "layers": list(s.layers), "folded": s.folded, "spread": s.spread, "left": s.left}
            for s in done.tuned.smoothed
        ],
        "tuning": {
            "why_not": done.tuned.why_not,
            "tries": [dataclasses.asdict(one) for one in done.tuned.tries],
            "equalized": equalization(done.tuned.equalized),
            "wide": wide_activations(done.plan),
        },
        "attempts": [
            {**dataclasses.asdict(one), "drop": one.score.drop, "held_drop": one.held.drop} for one in done.attempts
        ],
        "trials": [dataclasses.asdict(trial) for trial in done.trials],
        "explained": [dataclasses.asdict(found) for found in done.explained],
        "c": None if done.embedded is None else embedded_document(done.embedded),
        "dead_channels": {name: list(channels) for name, channels in done.plan.dead_channels.items()},
        "self_check": {
            "samples": done.check.samples,
            "sqnr_db": done.check.sqnr,
            "parts_db": done.check.parts,
            "low": done.check.low,
            "speed": done.check.speed,
            "here_db": done.check.here,
            "unfused": list(done.check.unfused),
            "suspects": [
                {"name": s.name, "operator": s.operator, "sqnr_db": s.sqnr, "lost_db": s.lost}
                for s in done.check.suspects
            ],
        },
    }


def embedded_document(found: Source) -> dict[str, Any]:
    """Return what C source is, for machines."""
    import msgspec

    told: dict[str, Any] = msgspec.to_builtins(found.description)
    return {**told, "files": sorted(found.files), "checked_samples": found.checked}
