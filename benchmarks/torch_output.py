"""The .pt2 output in an environment with torch alone: size, accuracy, and compiled latency beside the float program.

QUANTCLI_BED=… python -m benchmarks.torch_output [ENTRY …] [--python PYTHON] [--runs 50] [--threads 1]

PYTHON is the interpreter of an environment that holds torch and nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bed import as_feeds, bed_folder, entries, load_bed, machine
from quantcli import convert

DEFAULT = ["lenet_mnist", "resnet20_cifar10", "dscnn_kws"]

ALONE = """
import json, statistics, sys, time
import torch
import torch.ao.quantization.fx._decomposed
quantized, source, inputs, runs, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
x, labels = torch.load(inputs)
found = {"modules": [n for n in ("quantcli", "calibration", "onnx", "onnxruntime", "numpy") if n in sys.modules]}
programs = {"float": torch.export.load(source).module(), "int8": torch.export.load(quantized).module()}
with torch.no_grad():
    for name, program in programs.items():
        hits = sum((program(a).argmax(1) == b).sum().item() for a, b in zip(x.split(100), labels.split(100)))
        found[name] = 100 * hits / len(labels)
    one = x[:1].contiguous()
    ready = {}
    for name, program in programs.items():
        program(one)
        ready[name], ready["compiled " + name] = program, torch.compile(program)
    times = {name: [] for name in ready}
    for turn in range(int(runs) + 5):
        for name, program in ready.items():
            start = time.perf_counter()
            program(one)
            if turn >= 5:
                times[name].append(time.perf_counter() - start)
found["ms"] = {name: 1e3 * statistics.median(spent) for name, spent in times.items()}
print(json.dumps(found))
"""


def alone(python: str, quantized: Path, source: Path, inputs: Path, runs: int, threads: int) -> dict[str, Any]:
    """Run both programs in another environment, and return what it found."""
    command = [python, "-I", "-c", ALONE, str(quantized), str(source), str(inputs), str(runs), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=inputs.parent)
    if done.returncode:
        sys.exit(f"error: the other environment fails:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Convert, score and time, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ENTRY")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    bed = load_bed()
    print(
        f"{machine()}; torch {torch.__version__}; batch 1, {options.threads} thread(s), medians of {options.runs} runs in turn\n"
    )
    print(
        "| entry | size, % of float | top-1 float | .onnx | .pt2 | float ms | compiled | .pt2 ms | compiled | compiled, × float |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in entries(bed, options.names or DEFAULT):
            source = bed_folder() / "models" / f"{name}.pt2"
            np.savez(folder / "calib.npz", **as_feeds(bed.inputs(name, "calib")[0], "x"))  # type: ignore[arg-type]
            outputs = [folder / f"{name}.{kind}" for kind in ("onnx", "pt2")]
            for output in outputs:
                convert(source, output, data=folder / "calib.npz")
            x, labels = bed.inputs(name, "eval")
            inputs = folder / "inputs.pt"
            torch.save((torch.from_numpy(np.asarray(x)), torch.from_numpy(np.asarray(labels, dtype=np.int64))), inputs)
            found = alone(options.python, outputs[1], source, inputs, options.runs, options.threads)
            if set(found["modules"]) - {"numpy"}:
                sys.exit(f"error: the other environment has {found['modules']}")
            share, score = outputs[1].stat().st_size / source.stat().st_size, float(bed.evaluate(outputs[0], name))
            ms = found["ms"]
            ratio = ms["compiled float"] / ms["compiled int8"]
            cells = [f"{share:.1%}", f"{found['float']:.2f}", f"{score:.2f}", f"{found['int8']:.2f}"]
            cells += [f"{ms[key]:.2f}" for key in ("float", "compiled float", "int8", "compiled int8")]
            print(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
