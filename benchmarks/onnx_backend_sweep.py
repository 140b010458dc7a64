"""Every case of the ONNX backend suite through `quantcli convert`: what becomes integer, what is refused and why; nothing may fail.

python -m benchmarks.onnx_backend_sweep [PATTERN …] [--json FILE] [--seconds 60] [--everywhere] [--jobs 2]

The cases are those that the installed ``onnx`` package carries: node cases (which it generates), simple ones, those of PyTorch's
exporters, and the light models. Each is converted with its own inputs as calibration data, in a worker process, loaded in ONNX
Runtime, run on the same inputs, and compared with the float model. Returns 1 where a case fails.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import fnmatch
import io
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

LOWEST_SQNR = 20.0
LIGHT_SAMPLES = 4
KINDS = ("quantized", "unchanged", "refused", "failed")


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        name: The case.
        kind: ``quantized``, ``unchanged`` (there is nothing to quantize), ``refused`` or ``failed``.
        reason: Why, where it was not quantized.
        sqnr: The lowest SQNR of its real outputs, in dB; None without any.
        layers: Its integer layers.
        floats: Its operators that stay float.
        runs_in_float: Whether ONNX Runtime runs the float model on these inputs.
    """

    name: str
    kind: str
    reason: str = ""
    sqnr: float | None = None
    layers: int = 0
    floats: int = 0
    runs_in_float: bool = True


def cases(folder: Path, patterns: list[str]) -> list[str]:
    """Write every chosen case below a folder, as the suite lays them out, and return their names."""
    import onnx
    from onnx.backend.test.case import node as node_cases

    data = Path(onnx.__file__).parent / "backend" / "test" / "data"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generated = node_cases.collect_testcases(None)
    names = []

    def wanted(name: str) -> bool:
        return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    for case in generated:
        name = f"node/{case.name}"
        if wanted(name) and case.model is not None:
            write_case(folder / name, case.model, [list(inputs) for inputs, _ in case.data_sets or []])
            names.append(name)
    for kind in ("simple", "pytorch-converted", "pytorch-operator"):
        for source in sorted((data / kind).iterdir()):
            name = f"{kind}/{source.name}"
            if wanted(name):
                shutil.copytree(source, folder / name)
                names.append(name)
    for source in sorted((data / "light").glob("*.onnx")):
        name = f"light/{source.stem}"
        if wanted(name):
            model = onnx.load(source)
            write_case(folder / name, model, [light_inputs(model, seed) for seed in range(LIGHT_SAMPLES)])
            names.append(name)
    return names


def write_case(folder: Path, model: Any, data_sets: list[list[Any]]) -> None:
    """Write a model and its inputs as ``test_data_set_*/input_*.pb``."""
    from onnx import numpy_helper

    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    for number, inputs in enumerate(data_sets):
        place = folder / f"test_data_set_{number}"
        place.mkdir()
        for position, (value, info) in enumerate(zip(inputs, model.graph.input, strict=False)):
            kind = info.type.WhichOneof("value")
            if kind == "tensor_type":
                tensor = (
                    value
                    if hasattr(value, "SerializeToString")
                    else numpy_helper.from_array(np.asarray(value), info.name)
                )
            elif kind == "sequence_type":
                tensor = numpy_helper.from_list(value, info.name)
            else:
                tensor = numpy_helper.from_optional(value, info.name)
            (place / f"input_{position}.pb").write_bytes(tensor.SerializeToString(deterministic=True))


def light_inputs(model: Any, seed: int) -> list[Any]:
    """Return seeded inputs of a light model, whose files carry none."""
    generator = np.random.default_rng(seed)
    held = {tensor.name for tensor in model.graph.initializer}
    return [
        generator.uniform(0, 1, [size.dim_value or 1 for size in info.type.tensor_type.shape.dim]).astype(np.float32)
        for info in model.graph.input
        if info.name not in held
    ]


def convert_case(name: str, folder: Path, everywhere: bool) -> Outcome:
    """Convert one case and compare it with float."""
    from quantcli.cli import run

    model, output = folder / "model.onnx", folder / "out.onnx"
    expected, why_not = float_outputs(model)
    arguments = ["convert", str(model), "--data", str(folder), "-o", str(output), "--json"]
    told, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(complained):
        code = run([*arguments, "--everywhere"] if everywhere else arguments)
    errors = [line for line in complained.getvalue().splitlines() if line.startswith("error: ")]
    outcome = Outcome(name, "refused", errors[-1].removeprefix("error: ") if errors else "", runs_in_float=not why_not)
    if code != 0:
        if code not in {1, 2} or len(errors) != 1 or "internal error" in errors[0] or output.exists():
            outcome.kind, outcome.reason = "failed", f"exit code {code}: {complained.getvalue()[-300:]}"
        elif "nothing to quantize" in errors[0]:
            outcome.kind = "unchanged"
        return outcome
    document = json.loads(told.getvalue())
    outcome.kind, outcome.reason = "quantized", ""
    outcome.layers, outcome.floats = document["integer_layers"], len(document["float_layers"])
    if why_not:
        outcome.kind, outcome.reason = "failed", f"converted, and float does not run: {why_not}"
        return outcome
    found, why_not = float_outputs(output, folder)
    if why_not:
        outcome.kind, outcome.reason = "failed", f"the result does not run: {why_not}"
        return outcome
    outcome.sqnr = compared(expected, found, outcome)
    return outcome


def float_outputs(model: Path, data: Path | None = None) -> tuple[list[list[Any]], str]:
    """Return the outputs for every data set, or why there are none."""
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        results = []
        for place in sorted((data or model.parent).glob("test_data_set_*")):
            feeds: dict[str, Any] = {}
            for position, info in enumerate(session.get_inputs()):
                raw = (place / f"input_{position}.pb").read_bytes()
                if info.type.startswith("tensor"):
                    feeds[info.name] = numpy_helper.to_array(onnx.TensorProto.FromString(raw))
                else:
                    feeds[info.name] = numpy_helper.to_list(onnx.SequenceProto.FromString(raw))
            results.append(session.run(None, feeds))
    except Exception as error:  # noqa: BLE001 - whatever ONNX Runtime raises says that it does not run the model
        return [], f"{type(error).__name__}: {str(error).strip()[:200]}"
    return results, ""


def compared(expected: list[list[Any]], found: list[list[Any]], outcome: Outcome) -> float | None:
    """Return the lowest SQNR of the real outputs; note shapes and types that differ, and reals that are not finite any more."""
    signal: dict[int, float] = collections.defaultdict(float)
    noise: dict[int, float] = collections.defaultdict(float)
    for wanted, got in zip(expected, found, strict=True):
        for number, (one, other) in enumerate(zip(wanted, got, strict=True)):
            if not isinstance(one, np.ndarray):
                continue
            if one.shape != other.shape or one.dtype != other.dtype:
                outcome.kind, outcome.reason = (
                    "failed",
                    f"output {number} is {other.dtype}{other.shape}, not {one.dtype}{one.shape}",
                )
                return None
            if one.dtype.kind != "f":
                continue
            finite = np.isfinite(one)
            if not np.isfinite(other[finite]).all():
                outcome.kind, outcome.reason = "failed", f"output {number} is not finite"
                return None
            a, b = one[finite].astype(np.float64), other[finite].astype(np.float64)
            signal[number] += float((a**2).sum())
            noise[number] += float(((a - b) ** 2).sum())
    ratios = [
        float("inf") if noise[n] == 0 else (10 * np.log10(signal[n] / noise[n]) if signal[n] else -float("inf"))
        for n in signal
    ]
    return min(ratios) if ratios else None


def serve(channel: Connection, everywhere: bool) -> None:
    """Convert the cases whose names and folders come in."""
    import logging

    logging.disable(logging.CRITICAL)
    while True:
        request = channel.recv()
        if request is None:
            return
        name, folder = request
        try:
            channel.send(convert_case(name, Path(folder), everywhere))
        except BaseException as error:  # noqa: BLE001 - whatever happens is a failure of this case alone
            channel.send(Outcome(name, "failed", f"{type(error).__name__}: {str(error)[:300]}"))


class Worker:
    """A process that converts cases, and is started anew where one kills it or hangs it."""

    def __init__(self, everywhere: bool, seconds: float) -> None:
        self.everywhere, self.seconds = everywhere, seconds
        self.start()

    def start(self) -> None:
        """Start the process."""
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.everywhere), daemon=True)
        self.process.start()
        theirs.close()

    def convert(self, name: str, folder: Path) -> Outcome:
        """Convert one case."""
        self.channel.send((name, str(folder)))
        try:
            if self.channel.poll(self.seconds):
                outcome: Outcome = self.channel.recv()
                return outcome
            what = f"no end after {self.seconds:.0f} s"
        except EOFError:
            self.process.join()
            what = f"the process died ({self.process.exitcode})"
        self.process.kill()
        self.process.join()
        self.start()
        return Outcome(name, "failed", what)

    def stop(self) -> None:
        """End the process."""
        self.channel.send(None)
        self.process.join(10)


def swept(names: list[str], folder: Path, everywhere: bool, seconds: float, jobs: int) -> Iterator[Outcome]:
    """Convert every case."""
    workers = [Worker(everywhere, seconds) for _ in range(jobs)]

    def share(number: int) -> list[Outcome]:
        return [workers[number].convert(name, folder / name) for name in names[number::jobs]]

    with ThreadPoolExecutor(jobs) as pool:
        for outcomes in pool.map(share, range(jobs)):
            yield from outcomes
    for worker in workers:
        worker.stop()


def grouped(outcomes: Iterable[Outcome]) -> list[tuple[int, str, str]]:
    """Return reasons, names in them left out, with how many cases have them and one of those."""
    groups: dict[str, list[str]] = {}
    for outcome in outcomes:
        reason = re.sub(r"'[^']*'|/\S+|\d+", "…", outcome.reason)
        groups.setdefault(reason, []).append(outcome.name)
    return sorted(((len(names), reason, names[0]) for reason, names in groups.items()), reverse=True)


def main() -> int:
    """Sweep and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="only cases like light/* or node/test_conv_*")
    parser.add_argument("--json", type=Path, help="write every outcome there")
    parser.add_argument("--seconds", type=float, default=120, help="what a case may take")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--everywhere", action="store_true", help="quantize whatever can be")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        names = cases(Path(place), options.patterns)
        outcomes = sorted(
            swept(names, Path(place), options.everywhere, options.seconds, options.jobs), key=lambda found: found.name
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(found) for found in outcomes], indent=1), encoding="utf-8")
    counts = collections.Counter(found.kind for found in outcomes)
    print(f"{len(outcomes)} cases: " + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    for kind in KINDS[1:]:
        for count, reason, example in grouped(found for found in outcomes if found.kind == kind):
            print(f"  {kind} {count:4d}  {reason}  (such as {example})")
    low = [o for o in outcomes if o.kind == "quantized" and o.sqnr is not None and o.sqnr < LOWEST_SQNR]
    print(f"SQNR below {LOWEST_SQNR:.0f} dB: {len(low)}")
    for found in low:
        print(f"  {found.name}: {found.sqnr:.1f} dB, integer layers {found.layers}, float {found.floats}")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
