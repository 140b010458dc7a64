"""What calibration costs: time and memory over bare inference, beside ONNX Runtime's calibrators; and what each observer is worth.

QUANTCLI_BED=… python -m benchmarks.calibration [time] [subset] [memory] [merge] [kill] [accuracy] [--runs 7] [--entries NAME …]

time      seconds over bare float inference of the same samples in the same batches, medians of interleaved runs
subset    how far ranges move because histograms look at a part of the elements
memory    peak memory of whole processes, with 256 and 4,096 samples
merge     four shards of a calibration put together, against the whole
kill      kill -9 at ten random moments and --resume, against an unbroken run
accuracy  every observer on the whole bed: metric, SQNR, and seconds of calibration
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bed import as_feeds, bed_folder, entries, interleaved, load_bed, machine
from calibration import statistics as statistics_file
from calibration.collect import Work, collect, pilot_of
from calibration.histogram import Histogram
from calibration.hooks.onnxruntime import Runner
from calibration.lanes import Lanes, in_line
from calibration.observers import Counting, TensorStatistics
from calibration.ranges import Grid, parse_range, range_of
from calibration.shortcut import Shortcut, computed
from quantcli import Recipe, convert
from quantcli.fold import fold
from quantcli.known import known_of, poolable
from quantcli.load import load
from quantcli.observation import batch_for
from quantcli.placement import place
from quantcli.probe import model_bytes, weight_bytes, with_highest, with_outputs
from quantcli.recipe import Activation, Tune, with_integer_start

ENTRIES = ("resnet56_cifar10", "mobilenetv1_025_imagenet", "dscnn_kws")
WHAT = ("time", "subset", "memory", "merge", "kill", "accuracy")
# How many runs are killed.
KILLS = 10
OBSERVERS = ("minmax", "mean-minmax", "percentile", "mse", "entropy")
PEERS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
RANGES = ("minmax", "moving-average", "mean-minmax", "percentile:99.9", "percentile:99.99", "mse", "entropy")


@dataclass(frozen=True)
class Arrays:
    """Arrays by input name, as a data set."""

    stored: dict[str, NDArray[Any]]
    labels: NDArray[np.integer] | None = None
    digest: str = ""
    synthetic: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.stored.values())))

    def shape_of(self, index: int) -> int:
        """Return the same for every sample."""
        del index
        return 0

    def read(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Return samples that stand one after the other."""
        return {name: values[indices[0] : indices[-1] + 1] for name, values in self.stored.items()}


class Case:
    """One model with its calibration samples, ready to be run in every way."""

    def __init__(self, bed: Any, name: str, threads: int) -> None:
        self.path = bed_folder() / "models" / bed.BED[name]["onnx"]
        self.folded = fold(load(self.path).graph)
        self.placement = place(self.folded, with_integer_start(Recipe()))
        self.names = tuple(dict.fromkeys(self.placement.observed() + place(self.folded, Recipe()).observed()))
        self.threads = threads
        self.bare = Runner(model_bytes(self.folded), threads)
        self.hook = Runner(with_outputs(self.folded, self.names), self.lanes.threads, unordered=self.names)
        self.data = Arrays(as_feeds(bed.inputs(name, "calib")[0], self.bare.inputs[0].name))
        self.indices = np.arange(len(self.data), dtype=np.intp)
        first = computed(self.hook, self.names, self.data.read(self.indices[:1]))
        fixed = self.bare.inputs[0].shape[0]
        size = sum(values.nbytes for values in first.values())
        self.batch = fixed or batch_for(size, weight_bytes(self.folded))
        self.spans = [(s, min(s + self.batch, len(self.data))) for s in range(0, len(self.data), self.batch)]
        self.known = known_of(self.placement)
        self.pooled = poolable(self.placement, self.known) & set(self.names)
        self.built: dict[tuple[str, ...], tuple[Runner, dict[str, tuple[str, int]]]] = {}

    @property
    def full(self) -> list[tuple[int, int]]:
        """The batches but for a smaller last one, which ONNX Runtime's histogram calibrators do not take."""
        return [span for span in self.spans if span[1] - span[0] == self.batch]

    @property
    def lanes(self) -> Lanes:
        """How many batches quantcli has in work at once."""
        return Lanes.of(self.threads, os.cpu_count() or 1, beside=True)

    def infer(self, full: bool = False) -> None:
        """Run every batch and look at nothing."""
        for start, stop in self.full if full else self.spans:
            self.bare.run(self.data.read(self.indices[start:stop]))

    def hand_out(self) -> None:
        """Run every batch as quantcli does, have all observed tensors handed out, and count nothing."""

        def compute(span: tuple[int, int]) -> dict[str, NDArray[Any]]:
            return computed(self.hook, self.names, self.data.read(self.indices[span[0] : span[1]]))

        in_line(self.lanes, iter(self.spans), compute, lambda *_: None, lambda _: None)

    def count(self, observer: str) -> dict[str, TensorStatistics]:
        """Calibrate as quantcli does."""
        counting = Counting(observer, samples=len(self.data))
        work = Work(self.data, self.indices, self.spans, pilot_of(self.spans), counting, lanes=self.lanes)
        shortcut = Shortcut(self.pooled, self.known.limit, self.build) if self.pooled and not self.lanes.apart else None
        return collect(self.hook, self.names, work, None, self.known, shortcut).tensors

    def build(self, settled: list[str]) -> tuple[Runner, dict[str, tuple[str, int]]]:
        """Load the shortcut's session, once: the sessions of the others are loaded before they are timed, too."""
        key = tuple(settled)
        if key not in self.built:
            data, pooled = with_highest(self.folded, self.names, settled)
            self.built[key] = Runner(data, self.lanes.threads, unordered=self.names), pooled
        return self.built[key]

    def peer(self, method: str, folder: Path) -> Callable[[], None]:
        """Return a run of one of ONNX Runtime's calibrators over the same batches."""
        import onnxruntime
        from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

        case = self

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            """Gives the batches once."""

            def __init__(self) -> None:
                self.left = iter(case.full)

            def get_next(self) -> dict[str, NDArray[Any]] | None:
                span = next(self.left, None)
                return None if span is None else case.data.read(case.indices[span[0] : span[1]])

        def run() -> None:
            calibrator = create_calibrator(
                str(self.path), None, str(folder / "augmented.onnx"), calibrate_method=CalibrationMethod[method]
            )
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = self.threads, 4
            calibrator.infer_session = onnxruntime.InferenceSession(str(folder / "augmented.onnx"), options)
            with contextlib.redirect_stdout(io.StringIO()):
                calibrator.collect_data(Reader())
                calibrator.compute_data()

        return run


def times(bed: Any, names: list[str], runs: int, others: dict[str, str]) -> None:
    """Print seconds over bare inference."""
    print(f"\n{machine()}\n")
    print(
        f"| model | threads | samples | batch | bare, ms | handed out | {' | '.join(OBSERVERS)} | "
        f"{' | '.join(f'ORT {name}' for name in others)} |"
    )
    print("|---" * (6 + len(OBSERVERS) + len(others)) + "|")
    for name in names:
        for threads in (1, 2):
            case = Case(bed, name, threads)
            counts = [functools.partial(case.count, observer) for observer in OBSERVERS]
            spent = interleaved(runs, case.infer, case.hand_out, *counts, least=0.1)
            with tempfile.TemporaryDirectory() as folder:
                peers = [
                    interleaved_with(functools.partial(case.infer, True), case.peer(method, Path(folder)))
                    for method in others.values()
                ]
            ours = " | ".join(f"{seconds / spent[0]:.2f}" for seconds in spent[1:])
            theirs = " | ".join(f"{ratio:.1f}" for ratio in peers)
            print(
                f"| {name} | {threads} | {len(case.data)} | {case.batch} | {spent[0] * 1e3:.0f} | {ours} | {theirs} |",
                flush=True,
            )


def interleaved_with(bare: Callable[[], object], other: Callable[[], object]) -> float:
    """Return one action's time over another's, the median of three pairs; the other one may be slow."""
    ratios = []
    for _ in range(3):
        marks = [time.perf_counter()]
        for action in (bare, other):
            action()
            marks.append(time.perf_counter())
        ratios.append((marks[2] - marks[1]) / (marks[1] - marks[0]))
    return float(np.median(ratios))


def subset(bed: Any, names: list[str]) -> None:
    """Print how far ranges move because histograms look at a part of the elements."""
    print("\n| model | range | tensors | moved by more than 0.5 % | largest move | median |\n|---|---|---|---|---|---|")
    for name in names:
        case = Case(bed, name, 0)
        with every_element():
            whole = case.count("mse")
        for text in ("percentile:99.9", "percentile:99.99", "mse", "entropy"):
            part = case.count(parse_range(text).name)
            moves = []
            for tensor in case.names:
                (a, b), (c, d) = (range_of(parse_range(text), tensor, seen[tensor], Grid()) for seen in (whole, part))
                moves.append(max(abs(a - c), abs(b - d)) / (max(b, 0.0) - min(a, 0.0)))
            print(
                f"| {name} | {text} | {len(moves)} | {sum(move > 0.005 for move in moves)} "
                f"| {max(moves):.3%} | {np.median(moves):.4%} |",
                flush=True,
            )


@contextlib.contextmanager
def every_element() -> Iterator[None]:
    """Let histograms look at all elements."""
    before = Histogram.prepare

    def prepare(
        self: Histogram, size: int, glances: Sequence[NDArray[np.float32]], elements: int, bulk: int = 0
    ) -> None:
        before(self, size, glances, elements, elements + bulk)

    Histogram.prepare = prepare  # type: ignore[method-assign]
    try:
        yield
    finally:
        Histogram.prepare = before  # type: ignore[method-assign]


def memory(bed: Any, names: list[str]) -> None:
    """Print the peak memory of whole processes."""
    print("\n| model | bare, 256 samples | observer | 256 samples | 4,096 samples | more | over bare |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            files = {count: repeated(bed, name, count, Path(folder)) for count in (256, 4096)}
            model = model_of(bed, name)
            bare = peak("bare", model, files[256])
            for observer in ("minmax", "mse"):
                small, large = peak(observer, model, files[256]), peak(observer, model, files[4096])
                print(
                    f"| {name} | {bare >> 20} MB | {observer} | {small >> 20} MB | {large >> 20} MB "
                    f"| {large / small - 1:+.1%} | {large / bare:.2f} |",
                    flush=True,
                )


def model_of(bed: Any, name: str) -> str:
    """Return where a model lies."""
    return str(bed_folder() / "models" / bed.BED[name]["onnx"])


def repeated(bed: Any, name: str, count: int, folder: Path) -> Path:
    """Write so many calibration samples into a file, the same ones again where there are fewer, and return where it lies."""
    values = next(iter(as_feeds(bed.inputs(name, "calib")[0], "x").values()))
    file = folder / f"{count}.npy"
    held = np.lib.format.open_memmap(file, "w+", values.dtype, (count, *values.shape[1:]))
    for start in range(0, count, len(values)):
        held[start : start + len(values)] = values[: count - start]
    held.flush()
    return file


def calibration(model: str, data: Path, output: Path, *options: str) -> list[str]:
    """Return the command that calibrates."""
    command = [sys.executable, "-m", "quantcli", "calibrate", "-q", model, "--data", str(data)]
    return [*command, "-o", str(output), *options]


def merged(bed: Any, names: list[str]) -> None:
    """Print whether four shards put together are the whole."""
    print("\n| model | observer | samples | tensors | ranges that differ | file |\n|---|---|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            model, data = model_of(bed, name), repeated(bed, name, 256, Path(folder))
            whole, together = Path(folder) / "whole.qstats", Path(folder) / "together.qstats"
            for observer in OBSERVERS:
                subprocess.run(calibration(model, data, whole, "--observer", observer), check=True)
                shards = [Path(folder) / f"{shard}.qstats" for shard in range(4)]
                for shard, path in enumerate(shards):
                    options = ("--observer", observer, "--shard", f"{shard}/4")
                    subprocess.run(calibration(model, data, path, *options), check=True)
                paths = [str(path) for path in shards]
                merging = [sys.executable, "-m", "quantcli", "merge", "-q", *paths, "-o", str(together)]
                subprocess.run(merging, check=True)
                seen, found = (statistics_file.load(path).tensors for path in (whole, together))
                spec = parse_range(observer)
                differ = sum(
                    range_of(spec, tensor, seen[tensor], Grid()) != range_of(spec, tensor, found[tensor], Grid())
                    for tensor in seen
                )
                same = "the same bytes" if whole.read_bytes() == together.read_bytes() else "differs"
                print(f"| {name} | {observer} | 256 | {len(seen)} | {differ} | {same} |", flush=True)


def killed(bed: Any, names: list[str]) -> None:
    """Print what `--resume` makes of runs that were killed at random moments."""
    print("\n| model | observer | killed after, samples | resumed: the file of an unbroken run |\n|---|---|---|---|")
    moments = np.random.default_rng(0)
    for name, observer in itertools.product(names, ("all", "percentile")):
        with tempfile.TemporaryDirectory() as folder:
            model, data = model_of(bed, name), repeated(bed, name, 2048, Path(folder))
            unbroken, broken = Path(folder) / "unbroken.qstats", Path(folder) / "broken.qstats"
            options = ("--observer", observer, "--checkpoint", "0.02")
            begun = time.perf_counter()
            subprocess.run(calibration(model, data, unbroken, *options), check=True)
            whole = time.perf_counter() - begun
            done: list[str] = []
            same = 0
            while len(done) < KILLS:
                broken.unlink(missing_ok=True)
                process = subprocess.Popen(calibration(model, data, broken, *options))
                time.sleep(whole * moments.uniform(0.5, 1))  # the first half goes into loading
                process.kill()
                process.wait()
                partial = broken.with_name(f"{broken.name}.partial")
                held = statistics_file.load_any(partial).unfinished if partial.is_file() else None
                if broken.is_file():
                    continue  # it was over before
                done.append(str(held["samples"]) if held else "0")
                subprocess.run(calibration(model, data, broken, *options, "--resume"), check=True)
                same += broken.read_bytes() == unbroken.read_bytes()
            print(f"| {name} | {observer} | {', '.join(done)} | {same} of {KILLS} |", flush=True)


def peak(what: str, model: str, data: Path) -> int:
    """Return the peak memory of a process of its own, in bytes."""
    command = [sys.executable, "-m", "benchmarks.calibration", "--child", what, model, str(data)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def child(what: str, model: str, data: str) -> None:
    """Infer or calibrate, and print the peak memory."""
    from calibration.datasets import open_dataset
    from quantcli import calibrate
    from quantcli.recipe import Calibration

    if what == "bare":
        runner = Runner(Path(model))
        dataset = open_dataset(Path(data), runner.inputs)
        # The batches that calibration would take, which the arrays of a bare run do not tell.
        case_batch = runner.inputs[0].shape[0] or batch_of(Path(model))
        for start in range(0, len(dataset), case_batch):
            runner.run(dataset.read(np.arange(start, min(start + case_batch, len(dataset)), dtype=np.intp)))
    else:
        calibrate(model, data, recipe=Recipe(calibration=Calibration(observer=what)))  # type: ignore[arg-type]
    # Not ru_maxrss, which begins with what the parent process held when it forked.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    print(json.dumps({"peak": next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10}))


def batch_of(model: Path) -> int:
    """Return the batch that calibration takes, measured in another process so that this one holds a bare model only."""
    code = (
        "import sys, numpy as np; from benchmarks.calibration import *; f = fold(load(Path(sys.argv[1])).graph); "
        "n = place(f, Recipe()).observed(); h = Runner(with_outputs(f, n)); "
        "x = {s.name: np.zeros([d or 1 for d in s.shape], s.dtype) for s in h.inputs}; "
        "print(batch_for(sum(v.nbytes for v in computed(h, n, x).values()), weight_bytes(f)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model)], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def accuracy(bed: Any, names: list[str]) -> None:
    """Print every range's metric and SQNR without tuning, and what the whole conversion takes."""
    print("\n| model | float | " + " | ".join(RANGES) + " |")
    print("|---" * (2 + len(RANGES)) + "|")
    for name in names:
        case = Case(bed, name, 0)
        model = str(case.path)
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "calibration.npz"
            np.savez(data, **case.data.stored)  # type: ignore[arg-type]
            reference = run_bed(model, name).partition(",")[0]
            for text in RANGES:
                start = time.perf_counter()
                done = convert(
                    model,
                    Path(folder) / "q.onnx",
                    data=data,
                    recipe=Recipe(activation=Activation(range=text), tune=Tune(effort="fast")),
                )
                spent = time.perf_counter() - start
                cells.append(f"{run_bed(str(done.model), name)}, {spent:.1f} s")
        print(f"| {name} | {reference} | {' | '.join(cells)} |", flush=True)


def run_bed(model: str, name: str) -> str:
    """Return what the bed's own script says of a model."""
    script = [sys.executable, str(bed_folder() / "eval_bed.py"), model, name]
    done = subprocess.run(script, check=True, capture_output=True, text=True)
    metric, _, agreement = done.stdout.strip().splitlines()[-1].partition(" ")
    return f"{float(metric):.2f}, {ast.literal_eval(agreement)['sqnr_db']:.1f} dB"


def main() -> None:
    """Print the tables that are asked for, all by default."""
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5])
        return
    parser = argparse.ArgumentParser(description="What calibration costs, and what each observer is worth.")
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], default=[])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--no-peers", action="store_true", help="leave ONNX Runtime's calibrators out of the times")
    parser.add_argument("--entries", nargs="*", default=[])
    given = parser.parse_args()
    bed = load_bed()
    three = entries(bed, given.entries or ENTRIES)
    wanted = given.what or WHAT
    if "time" in wanted:
        times(bed, three, given.runs, {} if given.no_peers else PEERS)
    if "subset" in wanted:
        subset(bed, three)
    if "memory" in wanted:
        memory(bed, three)
    if "merge" in wanted:
        merged(bed, three)
    if "kill" in wanted:
        killed(bed, three)
    if "accuracy" in wanted:
        accuracy(bed, entries(bed, given.entries))


if __name__ == "__main__":
    main()
