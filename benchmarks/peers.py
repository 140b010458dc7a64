"""quantcli beside ONNX Runtime's own static quantization, on the same models and the same calibration samples.

QUANTCLI_BED=… python -m benchmarks.peers [ENTRY …] [--samples 256] [--json FILE] [--markdown FILE]
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

import quantcli
from benchmarks.bed import as_feeds, bed_folder, entries, load_bed, machine, ratios
from quantcli import convert

BATCH = 8  # samples per run where the model leaves the batch free
BLOCKS = 3  # blocks of interleaved runs, of whose ratios the median is taken

PREFACE = """\
quantcli {} beside ONNX Runtime {}'s `quantize_static` (QDQ, QUInt8/QInt8, per channel, MinMax), {} calibration samples; {}; {}.
Speed: float latency ÷ quantized latency in ONNX Runtime, 1 thread, batch {} (or what the model fixes), medians of interleaved runs.
SQNR: of the first output over the evaluation data."""
HEADER = (
    "| model | float | quantcli | ORT | SQNR, dB | ORT | size, kB: float → quantcli (ORT) | speed | ORT | seconds | ORT |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


@dataclass
class Side:
    """One tool's result on one entry."""

    form: str = ""
    metric: float | None = None
    sqnr: float | None = None
    size: int | None = None
    seconds: float | None = None
    speed: float | None = None
    failure: str = ""


@dataclass
class Row:
    """One entry of the bed."""

    name: str
    metric: str
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


def session(path: Path) -> Any:
    """Return a session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


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


def run_peer(model: Path, output: Path, feeds: dict[str, NDArray[Any]], batch: int) -> Side:
    """Return the peer's conversion: per channel, and per tensor where that gives nothing that runs."""
    failure = ""
    for per_channel in (True, False):
        start = time.perf_counter()
        try:
            peer_quantize(model, output, feeds, batch, per_channel)
        except Exception as error:  # noqa: BLE001 - whatever it raises is its result
            failure = failure or " ".join(str(error).split())[:80]
            continue
        seconds = time.perf_counter() - start
        form = "" if per_channel else "per tensor; per channel does not load"
        return Side(form, size=output.stat().st_size, seconds=seconds)
    return Side(failure=failure)


def measure(bed: Any, name: str, samples: int, runs: int, folder: Path) -> Row:
    """Convert one entry with both tools and measure the results."""
    spec = bed.BED[name]
    model = bed_folder() / "models" / spec["onnx"]
    plain = session(model)
    given = plain.get_inputs()[0]
    stored, _ = bed.inputs(name, "calib")
    feeds = {key: values[:samples] for key, values in as_feeds(stored, given.name).items()}
    data, ours_path, peer_path = folder / f"{name}.npz", folder / f"{name}.onnx", folder / f"{name}.peer.onnx"
    np.savez(data, **feeds)  # type: ignore[arg-type]
    start = time.perf_counter()
    done = convert(model, ours_path, data=data)
    ours = Side(size=done.sidecar.model.bytes, seconds=time.perf_counter() - start)
    fixed = given.shape[0] if isinstance(given.shape[0], int) else None
    peer = run_peer(model, peer_path, feeds, fixed or 32)
    float_metric = spec["float_metric"] if spec["metric"] != "sqnr_db" else float("inf")
    row = Row(name, spec["metric"], float_metric, model.stat().st_size, ours, peer)
    sides = [(side, path) for side, path in ((ours, ours_path), (peer, peer_path)) if not side.failure]
    for side, path in sides:
        side.metric = bed.evaluate(path, name)
        side.sqnr = bed.agreement(path, name)["sqnr_db"]
    one = {key: values[: fixed or BATCH] for key, values in feeds.items()}
    sessions = [plain, *(session(path) for _, path in sides)]
    speeds = ratios(BLOCKS, runs, *(partial(each.run, None, one) for each in sessions))
    for (side, _), speed in zip(sides, speeds[1:], strict=True):
        side.speed = speed
    if ours.speed and peer.speed:
        row.peer_over_ours = ours.speed / peer.speed
    return row


def points(side: Side) -> str:
    """Write a side's metric."""
    return f"no ({side.failure})" if side.failure else f"{side.metric:.2f}"


def number(value: float | None, pattern: str) -> str:
    """Write a number that may be missing."""
    return "" if value is None else pattern.format(value)


def markdown(rows: list[Row], samples: int) -> str:
    """Return the table as Markdown, with what it was measured on."""
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    lines = [
        PREFACE.format(quantcli.__version__, onnxruntime.__version__, samples, machine(), versions, BATCH),
        "",
        *HEADER,
    ]
    for row in rows:
        kilobytes = [f"{size / 1000:,.0f}" if size else "no" for size in (row.float_size, row.ours.size, row.peer.size)]
        cells = [
            row.name,
            "SQNR only" if row.metric == "sqnr_db" else f"{row.float_metric:.2f} %",
            "" if row.metric == "sqnr_db" else points(row.ours),
            ("" if row.metric == "sqnr_db" else points(row.peer)) + (f" ({row.peer.form})" if row.peer.form else ""),
            number(row.ours.sqnr, "{:.1f}"),
            number(row.peer.sqnr, "{:.1f}"),
            f"{kilobytes[0]} → {kilobytes[1]} ({kilobytes[2]})",
            number(row.ours.speed, "{:.2f}×"),
            number(row.peer.speed, "{:.2f}×"),
            number(row.ours.seconds, "{:.1f}"),
            number(row.peer.seconds, "{:.1f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def verdicts(rows: list[Row]) -> tuple[list[str], list[str]]:
    """Return the entries where we lose more than 0.2 points, and those where we are more than 3 % slower."""
    both = [row for row in rows if row.ours.metric is not None and row.peer.metric is not None]
    worse = [row.name for row in both if (row.ours.metric or 0) < (row.peer.metric or 0) - 0.2]
    slower = [row.name for row in rows if row.peer_over_ours is not None and row.peer_over_ours < 0.97]
    return worse, slower


def main() -> int:
    """Measure, print, and return 1 where an entry loses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entries", nargs="*")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--runs", type=int, default=41)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)
    logging.disable(logging.WARNING)
    bed, rows = load_bed(), []
    with tempfile.TemporaryDirectory() as folder:
        for name in entries(bed, options.entries):
            rows.append(measure(bed, name, options.samples, options.runs, Path(folder)))
            print(markdown(rows[-1:], options.samples).splitlines()[-1], file=sys.stderr, flush=True)
    print(markdown(rows, options.samples))
    if options.markdown:
        options.markdown.write_text(markdown(rows, options.samples), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    worse, slower = verdicts(rows)
    print(f"accuracy below ONNX Runtime's by more than 0.2 points: {', '.join(worse) or 'none'}")
    print(f"slower than ONNX Runtime's by more than 3 %: {', '.join(slower) or 'none'}")
    return 1 if worse or slower else 0


if __name__ == "__main__":
    sys.exit(main())
