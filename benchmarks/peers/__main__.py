"""quantcli beside ONNX Runtime's own static quantization, on the same models and the same calibration samples.

QUANTCLI_BED=… python -m benchmarks.peers [ENTRY …] [--samples 256] [--runs 41] [--json FILE] [--markdown FILE]

Returns 1 where quantcli is less accurate by more than 0.2 points, or slower by more than 3 %.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.table import Table

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import quantcli
from benchmarks.bed import as_feeds, bed_folder, entries, load_bed, machine, median_ratio, session, timed_blocks
from quantcli import convert

BATCH = 8  # samples per run where the model leaves the batch free
CALIBRATION_BATCH = 32
BLOCKS = 3  # blocks of interleaved runs, of whose ratios the median is taken
POINTS = 0.2  # how much less accurate is a loss; dB where the metric is the SQNR
SLOWER = 1.03  # how much slower is a loss
NARROWEST = 180  # columns that the table on the terminal has at least

HEADER = (
    "entry", "metric float", "quantcli", "ORT", "SQNR quantcli, dB", "SQNR ORT, dB", "size float → quantcli (ORT), kB",
    "float/quantcli", "float/ORT", "ORT/quantcli", "seconds quantcli", "seconds ORT",
)  # fmt: skip


@dataclass
class Side:
    """One tool's result on one entry.

    Attributes:
        form: What had to be left out for it to work; empty where nothing had.
        failure: Why there is no result, or none in the full form; empty where there is.
        metric: The entry's metric on the evaluation data.
        sqnr: The SQNR of the first output against the float model, in dB.
        size: The file's bytes.
        seconds: What the conversion took, calibration and a first load included.
        speed: Float latency over this one's.
    """

    form: str = ""
    failure: str = ""
    metric: float | None = None
    sqnr: float | None = None
    size: int | None = None
    seconds: float | None = None
    speed: float | None = None


@dataclass
class Row:
    """One entry of the bed."""

    name: str
    metric: str
    samples: int
    float_metric: float
    float_size: int
    ours: Side
    peer: Side
    peer_over_ours: float | None = None


class Reader:
    """Calibration data as ONNX Runtime's tools want it."""

    def __init__(self, feeds: dict[str, NDArray[Any]], batch: int) -> None:
        self.batches: Iterator[dict[str, NDArray[Any]]] = (
            {name: values[start : start + batch] for name, values in feeds.items()}
            for start in range(0, len(next(iter(feeds.values()))), batch)
        )

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next batch, or None."""
        return next(self.batches, None)


def peer_quantize(model: Path, output: Path, feeds: dict[str, NDArray[Any]], batch: int, per_channel: bool) -> None:
    """Quantize with ONNX Runtime's quantize_static, and load what it wrote."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        str(model),
        str(output),
        Reader(feeds, batch),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=per_channel,
        calibrate_method=CalibrationMethod.MinMax,
    )
    session(output)


def reason(error: Exception) -> str:
    """Return the telling words of an error: behind the last "Error", without the paths and names before it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rsplit(", Error ", 1)[-1].rsplit("failed:", 1)[-1][:80]


def run_peer(model: Path, output: Path, feeds: dict[str, NDArray[Any]], batch: int) -> Side:
    """Return the peer's conversion: per channel, and per tensor where that gives nothing that loads."""
    failure = ""
    for form, per_channel in (("", True), ("per tensor", False)):
        start = time.perf_counter()
        try:
            peer_quantize(model, output, feeds, batch, per_channel)
        except Exception as error:  # noqa: BLE001 - whatever it raises is its result
            failure = failure or reason(error)
            continue
        return Side(form, failure, size=output.stat().st_size, seconds=time.perf_counter() - start)
    return Side(failure=failure)


def run_ours(model: Path, output: Path, data: Path) -> Side:
    """Return quantcli's conversion with the default recipe."""
    start = time.perf_counter()
    convert(model, output, data=data)
    return Side(seconds=time.perf_counter() - start, size=output.stat().st_size)


def measure(bed: Any, name: str, samples: int, runs: int, folder: Path) -> Row:
    """Convert one entry with both tools and measure the results."""
    model = bed_folder() / "models" / bed.BED[name]["onnx"]
    plain = session(model)
    given = plain.get_inputs()[0]
    fixed = given.shape[0] if isinstance(given.shape[0], int) else None
    feeds = {key: values[:samples] for key, values in as_feeds(bed.inputs(name, "calib")[0], given.name).items()}
    data, ours_path, peer_path = folder / f"{name}.npz", folder / f"{name}.onnx", folder / f"{name}.peer.onnx"
    np.savez(data, **feeds)  # type: ignore[arg-type]
    row = Row(
        name,
        bed.BED[name]["metric"],
        len(next(iter(feeds.values()))),
        bed.evaluate(model, name),
        model.stat().st_size,
        run_ours(model, ours_path, data),
        run_peer(model, peer_path, feeds, fixed or CALIBRATION_BATCH),
    )
    sides = [(side, path) for side, path in ((row.ours, ours_path), (row.peer, peer_path)) if side.size is not None]
    for side, path in sides:
        side.metric, side.sqnr = bed.evaluate(path, name), bed.agreement(path, name)["sqnr_db"]
    one = {key: values[: fixed or BATCH] for key, values in feeds.items()}
    sessions = [plain, *(session(path) for _, path in sides)]
    blocks = timed_blocks(BLOCKS, runs, *(partial(each.run, None, one) for each in sessions))
    for position, (side, _) in enumerate(sides, 1):
        side.speed = median_ratio(blocks, 0, position)
    if len(sides) == 2:
        row.peer_over_ours = median_ratio(blocks, 2, 1)
    return row


def metric_cell(row: Row, side: Side) -> str:
    """Write a side's metric, and what it could not do."""
    failed = f"no ({side.failure})" if side.failure else ""
    if side.metric is None:
        return failed
    value = f"{side.metric:.1f} dB" if row.metric == "sqnr_db" else f"{side.metric:.2f}"
    return f"{failed}; {side.form}: {value}" if side.form else value


def number(value: float | None, pattern: str) -> str:
    """Write a number that may be missing."""
    return "no" if value is None else pattern.format(value)


def cells(row: Row) -> list[str]:
    """Write an entry's row of the table."""
    sizes = [number(None if size is None else size / 1000, "{:,.0f}") for size in (row.ours.size, row.peer.size)]
    return [
        row.name,
        "—" if row.metric == "sqnr_db" else f"{row.float_metric:.2f}",
        metric_cell(row, row.ours),
        metric_cell(row, row.peer),
        number(row.ours.sqnr, "{:.1f}"),
        number(row.peer.sqnr, "{:.1f}"),
        f"{row.float_size / 1000:,.0f} → {sizes[0]} ({sizes[1]})",
        number(row.ours.speed, "{:.2f}×"),
        number(row.peer.speed, "{:.2f}×"),
        number(row.peer_over_ours, "{:.2f}×"),
        number(row.ours.seconds, "{:.2f}"),
        number(row.peer.seconds, "{:.2f}"),
    ]


def table(rows: list[Row]) -> Table:
    """Return entries as a table for the terminal."""
    shown = Table()
    for title in HEADER:
        shown.add_column(title, overflow="fold", no_wrap=title == HEADER[0], max_width=32)
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def about() -> dict[str, str]:
    """Return what everything was measured with and on."""
    return {
        "quantcli": quantcli.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": machine(),
    }


def preface(samples: int, runs: int) -> str:
    """Write what was measured and how."""
    on = about()
    return (
        f"quantcli {on['quantcli']} beside ONNX Runtime {on['onnxruntime']}'s `quantize_static` (QDQ, QUInt8/QInt8, per "
        f"channel, MinMax), up to {samples} calibration samples; {on['machine']}; Python {on['python']}, numpy {on['numpy']}.\n"
        f"Ratios: of latencies in ONNX Runtime, 1 thread, batch {BATCH} (or what the model fixes); {runs} interleaved runs, "
        f"the median of {BLOCKS} blocks.\nSQNR: of the first output over the evaluation data.\n"
    )


def markdown(rows: list[Row], samples: int, runs: int) -> str:
    """Return the table as Markdown, with what it was measured on and what follows from it."""
    lines = [HEADER, ["---"] * len(HEADER), *(cells(row) for row in rows)]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    verdict = "  \n".join(f"{check}: {', '.join(lost) or 'none'}" for check, lost in checks(rows).items())
    return f"{preface(samples, runs)}\n{body}\n\n{verdict}\n"


def checks(rows: list[Row]) -> dict[str, list[str]]:
    """Return by check the entries that lose; an entry without a peer's result cannot.

    A metric of ours that is not a number counts as a loss.
    """
    worse, slower = [], []
    for row in rows:
        if row.ours.metric is None or row.peer.metric is None or row.peer_over_ours is None:
            continue
        if not row.ours.metric >= row.peer.metric - POINTS:
            worse.append(row.name)
        if not row.peer_over_ours >= 1 / SLOWER:
            slower.append(row.name)
    return {
        f"accuracy below ONNX Runtime's by more than {POINTS} points": worse,
        f"slower than ONNX Runtime's by more than {SLOWER - 1:.0%}".replace("%", " %"): slower,
    }


def main() -> int:
    """Measure, print, and return 1 where an entry loses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", metavar="ENTRY")
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--runs", type=int, default=41, help="runs of each session per block")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)
    logging.disable(logging.WARNING)
    bed, console = load_bed(), Console(width=max(Console().width, NARROWEST))
    rows: list[Row] = []
    names = entries(bed, options.entries)
    print(preface(options.samples, options.runs))
    with tempfile.TemporaryDirectory() as folder, Live(table(rows), console=console, auto_refresh=False) as live:
        for name in names:
            rows.append(measure(bed, name, options.samples, options.runs, Path(folder)))
            live.update(table(rows), refresh=True)
    console.print()
    if options.markdown:
        options.markdown.write_text(markdown(rows, options.samples, options.runs), encoding="utf-8")
    found = checks(rows)
    if options.json:
        report = {"about": about(), "samples": options.samples, "runs": options.runs, "checks": found}
        report["entries"] = [asdict(row) for row in rows]
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for check, lost in found.items():
        print(f"{check}: {', '.join(lost) or 'none'}")
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
