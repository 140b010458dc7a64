"""Which way to take min and max costs less: reduction nodes inside the graph, or numpy on the graph's outputs.

QUANTCLI_BED=… python -m benchmarks.calibration_probe [ENTRY …]
Prints the time of each over bare float inference of the same samples in the same batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.bed import as_feeds, bed_folder, entries, interleaved, load_bed
from calibration.hooks.onnxruntime import Runner
from calibration.observers import MinMax
from quantcli.fold import add_constant, fold
from quantcli.load import load
from quantcli.placement import place
from quantcli.probe import model_bytes, with_outputs
from quantcli.recipe import Recipe

BATCH = 32
RUNS = 7
ENTRIES = ("resnet56_cifar10", "mobilenetv1_025_imagenet", "dscnn_kws")


def with_reductions(model: ir.Model, names: tuple[str, ...]) -> bytes:
    """Return the bytes of a model that also gives the minimum and maximum of the named tensors."""
    probed = model.clone()
    graph = probed.graph
    values = {value.name: value for value in graph.inputs} | {v.name: v for node in graph for v in node.outputs}
    for name in names:
        shape = add_constant(graph, f"{name}_flat", np.array([-1]))
        flat = ir.node("Reshape", [values[name], shape])
        graph.append(flat)
        for operator in ("ReduceMin", "ReduceMax"):
            reduced = ir.node(operator, [flat.outputs[0]], {"keepdims": 0})
            reduced.outputs[0].name = f"{name}_{operator}"
            reduced.outputs[0].type, reduced.outputs[0].shape = values[name].type, ir.Shape(())
            graph.append(reduced)
            graph.outputs.append(reduced.outputs[0])
    return model_bytes(probed)


def measure(bed: Any, name: str, threads: int) -> list[float]:
    """Return the times of reductions in the graph and of numpy on the outputs, over bare inference."""
    loaded = load(bed_folder() / "models" / bed.BED[name]["onnx"])
    folded = fold(loaded.graph)
    names = place(folded, Recipe()).observed()
    bare, inside, outside = (
        Runner(data, threads)
        for data in (model_bytes(folded), with_reductions(folded, names), with_outputs(folded, names))
    )
    feeds = as_feeds(bed.inputs(name, "calib")[0], bare.inputs[0].name)
    count = len(next(iter(feeds.values())))
    batches = [{k: v[start : start + BATCH] for k, v in feeds.items()} for start in range(0, count, BATCH)]

    def run(runner: Runner, observed: tuple[str, ...] = ()) -> Callable[[], None]:
        def once() -> None:
            counters = {tensor: MinMax() for tensor in observed}
            for batch in batches:
                found = {**batch, **runner.run(batch, [n for n in observed if n not in batch] or None)}
                for tensor, counter in counters.items():
                    counter.update(found[tensor])

        return once

    times = interleaved(RUNS, run(bare), run(inside), run(outside, names), bound(outside, batches, names))
    return [spent / times[0] for spent in times[1:]]


def bound(runner: Runner, batches: list[dict[str, NDArray[Any]]], names: tuple[str, ...]) -> Callable[[], None]:
    """Return a run whose outputs are written into the same arrays batch after batch."""
    computed = [name for name in names if name not in batches[0]]
    buffers = dict(zip(computed, runner.session.run(computed, batches[0]), strict=True))
    binding = runner.session.io_binding()
    for name, array in buffers.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def once() -> None:
        counters = {tensor: MinMax() for tensor in names}
        for batch in batches:
            short = len(next(iter(batch.values()))) < len(next(iter(batches[0].values())))
            for name, values in batch.items():
                binding.bind_cpu_input(name, values)
            if short:
                found = dict(zip(computed, runner.session.run(computed, batch), strict=True))
            else:
                runner.session.run_with_iobinding(binding)
                found = buffers
            for tensor, counter in counters.items():
                counter.update(found[tensor] if tensor in found else batch[tensor])

    return once


def main() -> None:
    """Print the table."""
    bed = load_bed()
    names = entries(bed, sys.argv[1:] or ENTRIES)
    print(
        "| model | threads | reductions in the graph | numpy on outputs | numpy on outputs in place |\n|---|---|---|---|---|"
    )
    for name in names:
        for threads in (1, 0):
            cells = " | ".join(f"{ratio:.2f}" for ratio in measure(bed, name, threads))
            print(f"| {name} | {threads or 'all'} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
