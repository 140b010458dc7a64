"""C source of the bed's models: every byte against the executor's, by every compiler; memory; time beside ONNX Runtime's integers.

QUANTCLI_BED=… python -m benchmarks.embedded [ENTRY …] [--inputs 1000] [--runs 9] [--blocks 5] [--steps bytes,time]

The time is of one inference in one thread, -O3 with and without -march=native; ONNX Runtime runs what `convert` writes by default.
Blocks of C and of ONNX Runtime take turns, and medians are over the blocks.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bed import bed_folder, load_bed, machine
from quantcli import convert
from quantcli import sidecar as sidecar_file
from quantcli.embedded.check import built, outputs_of
from quantcli.embedded.deliver import executor_of, integers_of
from quantcli.embedded.describe import Description, read_description
from quantcli.embedded.program import C_TYPES

DEFAULT = ["lenet_mnist", "dscnn_kws", "resnet8_ic", "mobilenetv1_025_imagenet", "fc_mnist", "fc4_mnist"]
CALIBRATION = 256
# Where a model ends in an operator that stays float, C ends before it.
ENDS = {"lenet_mnist": ("linear_1",)}
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TIMER = """#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "model.h"

static {ctype} in[{inputs}], out[{outputs}];

int main(int count, char **words)
{{
    struct timespec begin, end;
    int runs = atoi(words[count - 1]), run;
    if (fread(in, sizeof in, 1, stdin) != 1) return 1;
    model_run(in, out);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (run = 0; run < runs; run++) model_run(in, out);
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%.1f %d\\n", ((double)(end.tv_sec - begin.tv_sec) * 1e9 + (double)(end.tv_nsec - begin.tv_nsec)) / runs, out[0]);
    return 0;
}}
"""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its data."""

    name: str
    model: Path
    calibration: Path
    inputs: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    entry: str


def dense(folder: Path, bed: Any, layers: tuple[int, ...], name: str) -> Path:
    """Write a fully connected net on MNIST: random features with ReLU, and a last layer by least squares on calibration images."""
    x, labels = bed.inputs("lenet_mnist", "calib")
    generator = np.random.default_rng(0)
    values = np.asarray(x, np.float32).reshape(len(x), -1)
    nodes = [helper.make_node("Flatten", ["x"], ["h0"], axis=1)]
    constants = []
    for number, width in enumerate(layers):
        w = generator.normal(size=(values.shape[1], width)).astype(np.float32) / np.float32(np.sqrt(values.shape[1]))
        b = generator.normal(size=width).astype(np.float32) * np.float32(0.3)
        nodes += [helper.make_node("Gemm", [f"h{number}", f"w{number}", f"b{number}"], [f"g{number}"])]
        nodes += [helper.make_node("Relu", [f"g{number}"], [f"h{number + 1}"])]
        constants += [numpy_helper.from_array(w, f"w{number}"), numpy_helper.from_array(b, f"b{number}")]
        values = np.maximum(values @ w + b, 0)
    wide = np.concatenate([values, np.ones((len(values), 1), np.float32)], axis=1).astype(np.float64)
    wanted = np.eye(10)[np.asarray(labels, np.int64)]
    solved = np.linalg.solve(wide.T @ wide + 10.0 * np.eye(wide.shape[1]), wide.T @ wanted).astype(np.float32)
    nodes.append(helper.make_node("Gemm", [f"h{len(layers)}", "w", "b"], ["y"]))
    constants += [numpy_helper.from_array(solved[:-1], "w"), numpy_helper.from_array(solved[-1], "b")]
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 28, 28])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 10])],
        constants,
    )
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def subject(folder: Path, bed: Any, name: str, count: int) -> Subject:
    """Lay a model and its data out."""
    entry = "lenet_mnist" if name.startswith("fc") else name
    if name.startswith("fc"):
        model = dense(folder, bed, (256,) if name == "fc_mnist" else (256, 128, 64), name)
    else:
        model = bed_folder() / "models" / bed.BED[name]["onnx"]
    given = onnx.load(model, load_external_data=False).graph.input[0].name
    calibration = folder / f"{name}.npz"
    drawn: dict[str, Any] = {given: np.asarray(bed.inputs(entry, "calib")[0][:CALIBRATION], np.float32)}
    np.savez(calibration, **drawn)
    x, labels = bed.inputs(entry, "eval")
    told = None if labels is None else np.asarray(labels[:count], np.int64)
    return Subject(name, model, calibration, np.asarray(x[:count], np.float32), told, entry)


def compared(one: Subject, source: Path, told: Description) -> None:
    """Print whether every output of every compiler and level is the executor's, and the accuracy of C."""
    document = sidecar_file.read(source / "model.json")
    executor = executor_of((source / "model.onnx").read_bytes(), document)
    name = told.inputs[0].name
    pairs = [integers_of(executor, told, {name: one.inputs[i : i + 1]}) for i in range(len(one.inputs))]
    given = [ins for ins, _ in pairs]
    expected = np.array([np.concatenate(outs) for _, outs in pairs])
    for command in (found for found in ("gcc", "clang") if shutil.which(found)):
        for flags in (("-O0",), ("-O3",), SANITIZED):
            with tempfile.TemporaryDirectory() as place:
                program = built(source, told, Path(place), command, (*STRICT, *flags))
                found = np.array([np.concatenate(outs) for outs in outputs_of(program, told, given)])
            wrong = int((found != expected).sum())
            print(
                f"| {one.name} | {command} {' '.join(flags[:2])} | {len(given)} | {expected.size:,} | {wrong} |",
                flush=True,
            )
    if one.labels is not None:
        top1 = 100.0 * float((found.argmax(axis=1) == one.labels).mean())
        size = one.model.stat().st_size
        print(f"  {one.name}: C top-1 {top1:.2f} % of {len(given)}; float file {size:,} bytes", flush=True)


def general(source: Path) -> str:
    """Tell whether model and kernels compile without floating-point registers."""
    if shutil.which("gcc") is None:
        return "no gcc"
    flags = ["gcc", *STRICT, "-O2", "-mgeneral-regs-only", "-c", "model.c", "kernels.c"]
    return "yes" if subprocess.run(flags, cwd=source, check=False).returncode == 0 else "no"


def timed(one: Subject, source: Path, told: Description, folder: Path, runs: int, blocks: int) -> None:
    """Print the time of C beside ONNX Runtime's."""
    standard = folder / f"{one.name}.int8.onnx"
    convert(one.model, standard, data=one.calibration)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(standard), options, providers=["CPUExecutionProvider"])
    feeds = {session.get_inputs()[0].name: one.inputs[:1]}
    document = sidecar_file.read(source / "model.json")
    executor = executor_of((source / "model.onnx").read_bytes(), document)
    ins, _ = integers_of(executor, told, {told.inputs[0].name: one.inputs[:1]})
    sample = ins[0].astype(told.dtype).tobytes()
    text = TIMER.format(
        ctype=C_TYPES[told.dtype], inputs=told.inputs[0].size, outputs=sum(p.size for p in told.outputs)
    )
    (source / "timer.c").write_text(text, encoding="utf-8")
    programs = {}
    for command in (found for found in ("gcc", "clang") if shutil.which(found)):
        for flags in (("-O3",), ("-O3", "-march=native")):
            label = " ".join((command, *flags))
            programs[label] = folder / f"{one.name}-{label.replace(' ', '')}"
            files = [str(source / name) for name in ("timer.c", "model.c", "kernels.c")]
            subprocess.run([command, *flags, "-o", str(programs[label]), *files], check=True)
    seconds: dict[str, list[float]] = {label: [] for label in ("ONNX Runtime", *programs)}
    for _ in range(blocks):
        for _ in range(10):
            session.run(None, feeds)
        begin = time.perf_counter()
        for _ in range(runs * 10):
            session.run(None, feeds)
        seconds["ONNX Runtime"].append((time.perf_counter() - begin) / (runs * 10))
        for label, program in programs.items():
            done = subprocess.run([str(program), str(runs * 10)], input=sample, capture_output=True, check=True)
            seconds[label].append(float(done.stdout.split()[0]) * 1e-9)
    base = seconds["ONNX Runtime"]
    for label, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        print(f"| {one.name} | {label} | {statistics.median(found) * 1e6:.1f} µs | {ratio:.2f} |", flush=True)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("entries", nargs="*", default=DEFAULT)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", default="bytes,time")
    options = parser.parse_args()
    bed, steps = load_bed(), options.steps.split(",")
    print(machine())
    for name in options.entries:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            one = subject(folder, bed, name, options.inputs)
            source = folder / "c"
            convert(one.model, source, data=one.calibration, form="c", until=ENDS.get(name, ()))
            told = read_description(source)
            memory = f"arena {told.arena_bytes:,} (bound {told.bound_bytes:,}), columns {told.scratch_bytes:,}"
            print(
                f"{name}: {memory}, constants {told.constant_bytes:,} bytes, {told.macs:,} multiply-accumulates; "
                f"general registers alone: {general(source)}",
                flush=True,
            )
            if "bytes" in steps:
                compared(one, source, told)
            if "time" in steps:
                timed(one, source, told, folder, options.runs, options.blocks)


if __name__ == "__main__":
    main()
