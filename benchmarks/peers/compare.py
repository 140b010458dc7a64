"""quantcli beside every other tool: drop, SQNR, size, latency and seconds, one table for each model and one over all.

QUANTCLI_BED=… python -m benchmarks.peers.compare [ENTRY …] [--tools NAME …] [--samples 256] [--environments FOLDER] [--json FILE]

Every tool runs in an environment of its own, made from the requirements beside its script in benchmarks/peers/tools (the first
time, pip has to reach a package index), and in a process of its own for every conversion. All calibrate on the same samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.bed import as_feeds, bed_folder, entries, load_bed, machine, median_ratio, session, timed_blocks
from quantcli import Recipe, convert
from quantcli.recipe import Tune

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(__file__).resolve().parent / "tools"
OURS = {"default": Recipe(), "best": Recipe(tune=Tune(effort="best")), "fast": Recipe(tune=Tune(effort="fast"))}
BATCH = 8  # samples per run where the model leaves the batch free
CALIBRATION_BATCH = 32  # NNCF averages the extremes of batches: of single samples, they clip much more
BLOCKS = 3  # blocks of interleaved runs, of whose ratios the median is taken
SECONDS = 900  # after which a conversion is given up
SMALLER = 0.95  # an output above this share of the float model's bytes is not counted among the quantized ones
ALLOWED = 0.03  # how much slower than the fastest is not told apart from noise


@dataclass
class Result:
    """One tool's conversion of one entry.

    Attributes:
        tool: Which tool.
        form: How it was used.
        failure: Why there is no result; empty where there is.
        metric: The entry's metric on the evaluation data.
        sqnr: The SQNR of the first output against the float model, in dB.
        size: Bytes of everything that was written.
        seconds: What the conversion took, without loading the tool.
        speed: Float latency over this one's.
        path: Where the model is.
    """

    tool: str
    form: str
    failure: str = ""
    metric: float | None = None
    sqnr: float | None = None
    size: int = 0
    seconds: float = 0.0
    speed: float | None = None
    path: Path | None = None


@dataclass
class Entry:
    """One entry of the bed, with everyone's results.

    Attributes:
        name: The entry.
        metric: The float model's.
        size: The float model's bytes.
        drops: Whether the metric can drop from the float model's; an SQNR cannot.
        results: Everyone's.
    """

    name: str
    metric: float
    size: int
    drops: bool
    results: list[Result] = field(default_factory=list)

    @property
    def others(self) -> list[Result]:
        """The other tools' results that run and are really smaller."""
        smaller = [one for one in self.results if one.sqnr is not None and one.size <= SMALLER * self.size]
        return [one for one in smaller if one.tool != "quantcli"]


@dataclass(frozen=True)
class Tool:
    """Another tool.

    Attributes:
        name: Of its script.
        python: Its environment's interpreter.
        forms: How it can be used.
    """

    name: str
    python: Path
    forms: tuple[str, ...]

    @classmethod
    def installed(cls, name: str, environments: Path) -> Tool:
        """Return a tool, in an environment that is made where it is not there yet."""
        folder = environments / name
        python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        wanted = TOOLS / f"{name}.txt"
        done = folder / "installed.txt"
        if not done.is_file() or done.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
            print(f"{name}: making its environment", file=sys.stderr)
            venv.create(folder, with_pip=True, clear=True)
            subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
            done.write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")
        answer = run(python, name, ["--forms"], Path.cwd())
        return cls(name, python, tuple(json.loads(answer)))

    def convert(self, form: str, model: Path, data: Path, batch: int, folder: Path) -> tuple[Result, dict[str, str]]:
        """Return a conversion, and the versions that made it."""
        output = folder / "q.onnx"
        result = Result(self.name, form)
        try:
            answer = json.loads(run(self.python, self.name, [model, data, output, form, batch], folder))
            session(output)
        except Exception as error:  # noqa: BLE001 - whatever it raises is its result
            result.failure = reason(error)
            return result, {}
        result.path, result.seconds = output, answer["seconds"]
        result.size = sum(path.stat().st_size for path in folder.glob("q.onnx*"))
        return result, answer["versions"]


def run(python: Path, name: str, arguments: list[Any], folder: Path) -> str:
    """Return the last line that a tool's script prints."""
    done = subprocess.run(
        [python, "-m", f"benchmarks.peers.tools.{name}", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1])
    return done.stdout.strip().splitlines()[-1]


def reason(error: Exception) -> str:
    """Return the telling words of an error."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rsplit("failed:", 1)[-1].replace("|", "/")[:100]


def ours(form: str, model: Path, data: Path, folder: Path) -> Result:
    """Return quantcli's conversion."""
    output = folder / "q.onnx"
    begun = time.perf_counter()
    convert(model, output, data=data, recipe=OURS[form])
    return Result("quantcli", form, size=output.stat().st_size, seconds=time.perf_counter() - begun, path=output)


def folders(parent: Path) -> Iterator[Path]:
    """Yield new folders."""
    for number in range(sys.maxsize):
        folder = parent / str(number)
        folder.mkdir()
        yield folder


def compare(
    bed: Any, name: str, tools: list[Tool], samples: int, runs: int, parent: Path
) -> tuple[Entry, dict[str, str]]:
    """Convert one entry with every tool, and measure what comes out."""
    model = bed_folder() / "models" / bed.BED[name]["onnx"]
    plain = session(model)
    given = plain.get_inputs()[0]
    fixed = given.shape[0] if isinstance(given.shape[0], int) else None
    feeds = {key: values[:samples] for key, values in as_feeds(bed.inputs(name, "calib")[0], given.name).items()}
    parent.mkdir()
    data = parent / "data.npz"
    np.savez(data, **feeds)  # type: ignore[arg-type]
    entry = Entry(
        name, bed.evaluate(model, name), model.stat().st_size, bed.BED[name]["metric"] in {"top1", "spearman"}
    )
    versions: dict[str, str] = {}
    fresh = folders(parent)
    for form in OURS:
        entry.results.append(ours(form, model, data, next(fresh)))
    for tool in tools:
        for form in tool.forms:
            result, found = tool.convert(form, model, data, fixed or CALIBRATION_BATCH, next(fresh))
            entry.results.append(result)
            versions.update(found)
            print(f"{name}: {tool.name} {form} {result.failure or 'done'}", file=sys.stderr, flush=True)
    measure(bed, entry, plain, {key: values[: fixed or BATCH] for key, values in feeds.items()}, runs)
    return entry, versions


def measure(bed: Any, entry: Entry, plain: Any, feeds: dict[str, NDArray[Any]], runs: int) -> None:
    """Fill in metrics and speeds."""
    usable: list[tuple[Result, Any]] = []
    for result in entry.results:
        if result.path is None:
            continue
        try:
            result.metric = bed.evaluate(result.path, entry.name)
            result.sqnr = bed.agreement(result.path, entry.name)["sqnr_db"]
            timed = session(result.path)
            timed.run(None, feeds)
        except Exception as error:  # noqa: BLE001 - what it wrote does not run on other samples
            result.failure, result.sqnr = reason(error), None
            continue
        usable.append((result, timed))
    blocks = timed_blocks(BLOCKS, runs, *(partial(one.run, None, feeds) for one in (plain, *(s for _, s in usable))))
    for place, (result, _) in enumerate(usable, 1):
        result.speed = median_ratio(blocks, 0, place)


def rows(entry: Entry) -> Iterator[str]:
    """Yield the lines of an entry's table."""
    yield f"\n### {entry.name}\n" + (
        f"\nFloat: {entry.metric:.2f}, {entry.size / 1000:,.0f} kB.\n" if entry.drops else ""
    )
    yield "| tool | form | drop | SQNR, dB | kB | float's latency over it | seconds |\n|---|---|---|---|---|---|---|"
    for one in entry.results:
        if one.sqnr is None:
            yield f"| {one.tool} | {one.form} | no: {one.failure} | | | | |"
            continue
        drop = f"{entry.metric - (one.metric or 0):+.2f}" if entry.drops else ""
        yield (
            f"| {one.tool} | {one.form} | {drop} | {one.sqnr:.1f} | {one.size / 1000:,.0f} "
            f"| {one.speed or 0:.2f}× | {one.seconds:.1f} |"
        )


def named(one: Result) -> str:
    """Return what a result is called."""
    return f"{one.tool} {one.form}"


def summary(found: list[Entry]) -> Iterator[str]:
    """Yield the lines of the table over all: quantcli's default beside the best and the median of the others."""
    yield (
        "\n| model | drop: quantcli | least of the others | SQNR: quantcli | best of the others | their median "
        "| kept: best, median + 2 dB | speed: quantcli | fastest of the others | kept |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for entry in found:
        default, others = entry.results[0], entry.others
        if not others:
            continue
        best, fastest = max(others, key=lambda one: one.sqnr or 0), max(others, key=lambda one: one.speed or 0)
        least = max(others, key=lambda one: one.metric or 0)
        median = statistics.median(one.sqnr or 0 for one in others)
        sqnr, speed = default.sqnr or 0, default.speed or 0
        drop = f"{entry.metric - (default.metric or 0):+.2f}" if entry.drops else ""
        theirs = f"{entry.metric - (least.metric or 0):+.2f} ({named(least)})" if entry.drops else ""
        yield (
            f"| {entry.name} | {drop} | {theirs} | {sqnr:.1f} | {best.sqnr:.1f} ({named(best)}) | {median:.1f} "
            f"| {verdict(sqnr >= (best.sqnr or 0))}, {verdict(sqnr >= median + 2)} | {speed:.2f}× "
            f"| {fastest.speed:.2f}× ({named(fastest)}) | {verdict(speed >= (1 - ALLOWED) * (fastest.speed or 0))} |"
        )


def verdict(kept: bool) -> str:
    """Return a word for it."""
    return "yes" if kept else "**no**"


def main() -> None:
    """Measure and print."""
    known = sorted(path.stem for path in TOOLS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", metavar="ENTRY")
    parser.add_argument("--tools", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--runs", type=int, default=21, help="runs of each session per block")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "peers", metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)
    logging.disable(logging.WARNING)
    bed = load_bed()
    names = entries(bed, options.entries)
    tools = [Tool.installed(name, options.environments.resolve()) for name in options.tools]
    found: list[Entry] = []
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            entry, seen = compare(bed, name, tools, options.samples, options.runs, Path(folder) / name)
            found.append(entry)
            versions.update(seen)
            print("\n".join(rows(entry)), flush=True)
    print("\n".join(summary(found)))
    print(f"\n{machine()}; " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())))
    if options.json:
        report = {"machine": machine(), "versions": versions, "entries": [asdict(entry) for entry in found]}
        options.json.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
