"""The integer executor beside ONNX Runtime, target by target, and verify on every model of the bed.

QUANTCLI_BED=… python -m benchmarks.targets [--samples 256]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.bed import as_feeds, bed_folder, entries, load_bed
from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.integer.executor import Executor
from quantcli.targets import known

LABELLED = ("lenet_mnist", "dscnn_kws")
BATCH = 100


def top1(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return the share of samples whose highest score is their label, in percent."""
    return 100.0 * float((scores.argmax(axis=1) == labels).mean())


def compare_targets(bed: Any, samples: int, folder: Path) -> None:
    """Print the executor's and the runtime's top-1 on the whole evaluation data, per target."""
    print("| model | target | ONNX Runtime | executor | difference |\n|---|---|---|---|---|")
    for name in LABELLED:
        model = bed_folder() / "models" / bed.BED[name]["onnx"]
        given = Runner(model).inputs[0].name
        data = folder / "calibration.npz"
        np.savez(data, **{given: bed.inputs(name, "calib")[0][:samples]})
        x, labels = bed.inputs(name, "eval")
        for target in known():
            done = convert(model, folder / "q.onnx", data=data, recipe=Recipe(target=target))
            executor, runner = Executor(ir.load(done.model), done.sidecar), Runner(done.model)
            output = runner.outputs[0]
            ours, theirs = [], []
            for start in range(0, len(x), BATCH):
                feeds = {given: x[start : start + BATCH]}
                ours.append(executor.run(feeds)[output])
                theirs.append(runner.run(feeds)[output])
            a, b = top1(np.concatenate(theirs), labels), top1(np.concatenate(ours), labels)
            print(f"| {name} | {target} | {a:.2f} | {b:.2f} | {b - a:+.2f} |", flush=True)


def verify_all(bed: Any, samples: int, folder: Path) -> None:
    """Print what verify finds on every model, on eight calibration samples."""
    print("\n| model | layers | integers compared | ties explained | unexplained |\n|---|---|---|---|---|")
    for name in entries(bed, []):
        model = bed_folder() / "models" / bed.BED[name]["onnx"]
        given = Runner(model).inputs[0].name
        feeds = as_feeds(bed.inputs(name, "calib")[0], given)
        for file, count in (("calibration.npz", samples), ("check.npz", 8)):
            np.savez(folder / file, **{key: values[:count] for key, values in feeds.items()})  # type: ignore[arg-type]
        convert(model, folder / "q.onnx", data=folder / "calibration.npz")
        found = verify(folder / "q.json", folder / "check.npz")
        print(f"| {name} | {found.layers} | {found.elements:,} | {found.ties:,} | {len(found.findings)} |", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()
    bed = load_bed()
    with tempfile.TemporaryDirectory() as folder:
        compare_targets(bed, options.samples, Path(folder))
        verify_all(bed, options.samples, Path(folder))


if __name__ == "__main__":
    main()
