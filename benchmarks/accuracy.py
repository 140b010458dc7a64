"""What is left of the bed's models: at every width and target, with each algorithm off in turn, and under --max-drop.

QUANTCLI_BED=… python -m benchmarks.accuracy [table] [ablation] [search] [time] [--entries NAME …] [--recipes w8 …]

table     metric, SQNR of the outputs and seconds to convert, for recipes of several widths
ablation  the same with each algorithm off in turn
search    --max-drop 0.1 from 4 bits, judged on every second evaluation sample and checked on the others
time      default and best effort beside calibration, in this process and as commands; memory at 256 and 2,048 calibration samples
"""

from __future__ import annotations

import argparse
import functools
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bed import bed_folder, entries, interleaved, load_bed, machine
from calibration.errors import ReportedError
from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, Recipe, calibrate, convert
from quantcli.load import load
from quantcli.recipe import Activation, Tune, Weight, resolve_target

SAMPLES = 256
RECIPES = {
    "w8": Recipe(),
    "w8-fast": Recipe(tune=Tune(effort="fast")),
    "w8-best": Recipe(tune=Tune(effort="best")),
    "w8-per-tensor": Recipe(weight=Weight(per_channel=False)),
    "w8-per-tensor-best": Recipe(weight=Weight(per_channel=False), tune=Tune(effort="best")),
    "w4": Recipe(weight=Weight(bits=4)),
    "w4-best": Recipe(weight=Weight(bits=4), tune=Tune(effort="best")),
    "w4-fast": Recipe(weight=Weight(bits=4), tune=Tune(effort="fast")),
    "w2": Recipe(weight=Weight(bits=2)),
    "w4a4": Recipe(weight=Weight(bits=4), activation=Activation(bits=4)),
    "w8a4": Recipe(activation=Activation(bits=4)),
    "pow2": Recipe(target="npu-pow2"),
    "pow2-best": Recipe(target="npu-pow2", tune=Tune(effort="best")),
}
STEPS = ("ranges", "compensation", "scales", "rounding", "bias", "gain", "equalize")


@dataclass(frozen=True)
class Outcome:
    """What a conversion left of a model."""

    metric: float
    sqnr: float
    seconds: float
    done: Conversion


class Case:
    """One entry of the bed, with its data written down."""

    def __init__(self, bed: Any, name: str, folder: Path, samples: int = SAMPLES) -> None:
        self.bed, self.name, self.folder = bed, name, folder
        self.model = bed_folder() / "models" / bed.BED[name]["onnx"]
        self.inputs = [spec.name for spec in Runner(load(self.model).runnable).inputs]
        self.data = self.written("calib", "calib", slice(0, samples), labelled=False)

    def written(self, split: str, name: str, part: slice, labelled: bool) -> Path:
        """Write some of a split's samples as an .npz, and return its path."""
        inputs, labels = self.bed.inputs(self.name, split)
        feeds = inputs if isinstance(inputs, dict) else {self.inputs[0]: inputs}
        arrays = {key: values[part] for key, values in feeds.items()}
        if labelled:
            arrays["labels"] = np.asarray(labels)[part]
        path = self.folder / f"{self.name}.{name}.npz"
        np.savez(path, **arrays)
        return path

    def run(self, recipe: Recipe, **more: Any) -> Outcome:
        """Convert, and evaluate what came out."""
        output = self.folder / "q.onnx"
        begun = time.perf_counter()
        done = convert(self.model, output, data=self.data, recipe=recipe, **more)
        seconds = time.perf_counter() - begun
        sqnr = self.bed.agreement(str(output), self.name)["sqnr_db"]
        return Outcome(float(self.bed.evaluate(str(output), self.name)), float(sqnr), seconds, done)

    @property
    def reference(self) -> float | None:
        """The float model's metric; None where the metric compares with float."""
        if self.bed.BED[self.name].get("metric") not in {"top1", "spearman"}:
            return None
        return float(self.bed.evaluate(str(self.model), self.name))


def cell(outcome: Outcome, reference: float | None) -> str:
    """Return a table's cell: drop, SQNR, seconds."""
    drop = "" if reference is None else f"{reference - outcome.metric:+.2f} pt · "
    return f"{drop}{outcome.sqnr:.1f} dB · {outcome.seconds:.1f} s"


def table(cases: list[Case], recipes: list[str]) -> None:
    """Print drop, SQNR and seconds of every entry and recipe."""
    print(f"| model | float | {' | '.join(recipes)} |\n|---|---|{'---|' * len(recipes)}")
    for case in cases:
        reference = case.reference
        cells = [attempted(case, RECIPES[name], reference) for name in recipes]
        print(f"| {case.name} | {'' if reference is None else f'{reference:.2f}'} | {' | '.join(cells)} |", flush=True)


def attempted(case: Case, recipe: Recipe, reference: float | None) -> str:
    """Return a table's cell, or the error that takes its place."""
    try:
        return cell(case.run(recipe), reference)
    except ReportedError as error:
        return f"**no**: {error}"


def ablation(cases: list[Case], recipes: list[str]) -> None:
    """Print every entry with each algorithm off in turn."""
    for name in recipes:
        recipe = RECIPES[name]
        steps = (*STEPS, "centre", "align") if resolve_target(recipe).activation.power_of_two else STEPS
        print(
            f"\n{name}\n\n| model | all | {' | '.join(f'no {step}' for step in steps)} |\n|---|---|{'---|' * len(steps)}"
        )
        for case in cases:
            reference = case.reference
            wishes = [recipe.tune, *(msgspec.structs.replace(recipe.tune, **{step: False}) for step in steps)]
            cells = [attempted(case, msgspec.structs.replace(recipe, tune=wish), reference) for wish in wishes]
            print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


def search(cases: list[Case], max_drop: float) -> None:
    """Print what --max-drop finds from 4 bits, and whether samples that it has not seen bear it out."""
    print(
        "| model | weights, of 4 bits throughout | tries | seen half, two thirds | and held back | unseen half | seconds |\n"
        "|---|---|---|---|---|---|---|"
    )
    for case in cases:
        if case.reference is None or case.bed.BED[case.name]["metric"] != "top1":
            continue
        seen = case.written("eval", "seen", slice(0, None, 2), labelled=True)
        unseen = case.written("eval", "unseen", slice(1, None, 2), labelled=True)
        recipe = Recipe(weight=Weight(bits=4), tune=Tune(max_drop=max_drop))
        begun = time.perf_counter()
        try:
            done = convert(case.model, case.folder / "s.onnx", data=case.data, recipe=recipe, validate=seen)
        except ReportedError as error:
            print(f"| {case.name} | **no**: {error} | | | | | {time.perf_counter() - begun:.0f} |", flush=True)
            continue
        seconds = time.perf_counter() - begun
        kept = next(one for one in done.attempts if one.kept)
        least = min(one.weight_bytes for one in done.attempts)
        drop = top1(case.model, unseen) - top1(done.model, unseen)
        print(
            f"| {case.name} | {kept.weight_bytes / least:.2f}× | {len(done.attempts)} | {kept.score.drop:+.2f} ± "
            f"{kept.score.uncertainty:.2f} | {kept.held.drop:+.2f} | {drop:+.2f} | {seconds:.0f} |",
            flush=True,
        )


def top1(model: Path, data: Path) -> float:
    """Return a model's top-1 accuracy on labelled data, in percent."""
    arrays = dict(np.load(data))
    labels = arrays.pop("labels")
    runner = Runner(model)
    hits = 0
    for start in range(0, len(labels), 32):
        scores = runner.run({name: values[start : start + 32] for name, values in arrays.items()})[runner.outputs[0]]
        hits += int((scores.argmax(axis=1) == labels[start : start + 32]).sum())
    return 100.0 * hits / len(labels)


def times(cases: list[Case]) -> None:
    """Print what an effort takes beside calibration, whole processes' memory included."""
    print(
        "| model | command calibrate | command convert | calibration alone | default alone | best alone "
        "| peak memory default, 256 and 2,048 samples |\n|---|---|---|---|---|---|---|"
    )
    for case in cases:
        given = [str(case.model), "--data", str(case.data), "-q", "-o"]
        commands = [
            ["calibrate", *given, str(case.folder / "t.qstats")],
            ["convert", *given, str(case.folder / "t.onnx")],
        ]
        whole = interleaved(3, *(functools.partial(command_peak, command) for command in commands), warm=0)
        calibration = interleaved(3, functools.partial(calibrate, case.model, case.data), warm=0)[0]
        default, best = (case.run(RECIPES[name]).seconds for name in ("w8", "w8-best"))
        given[2] = str(repeated(case.data, 2048))
        peaks = [command_peak(command) for command in (commands[1], ["convert", *given, str(case.folder / "t.onnx")])]
        print(
            f"| {case.name} | {whole[0]:.2f} s | {whole[1]:.2f} s = {whole[1] / whole[0]:.1f}× | {calibration:.2f} s | "
            f"{default:.2f} s = {default / calibration:.1f}× | {best:.1f} s | {peaks[0]} and {peaks[1]} MB |",
            flush=True,
        )


def repeated(data: Path, count: int) -> Path:
    """Write the samples of an .npz over and over, and return the path."""
    arrays: dict[str, Any] = {name: np.resize(v, (count, *v.shape[1:])) for name, v in np.load(data).items()}
    path = data.with_suffix(".many.npz")
    np.savez(path, **arrays)
    return path


def command_peak(command: list[str]) -> int:
    """Run a command in a process of its own, and return its peak memory in MB."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})\n"
        "from quantcli.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        # Not ru_maxrss, which begins with what the parent process held when it forked.
        "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) >> 10)"
    )
    found = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="*", help="table, ablation, search, time; all by default")
    parser.add_argument("--entries", nargs="*", default=[])
    parser.add_argument("--recipes", nargs="*", default=["w8", "w8-per-tensor", "w4", "w2", "pow2"])
    parser.add_argument("--max-drop", type=float, default=0.1)
    asked = parser.parse_args()
    bed = load_bed()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        cases = [Case(bed, name, Path(folder)) for name in entries(bed, asked.entries)]
        for what in asked.what or ["table", "ablation", "search", "time"]:
            print(f"\n## {what}\n")
            if what == "table":
                table(cases, asked.recipes)
            elif what == "ablation":
                ablation(cases, asked.recipes)
            elif what == "search":
                search(cases, asked.max_drop)
            elif what == "time":
                times(cases)
            else:
                sys.exit(f"error: there is nothing called '{what}'")
    print(f"\npeak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB")


if __name__ == "__main__":
    main()
