"""NNCF's post-training quantization of an ONNX model, with fast and with accurate bias correction."""

from __future__ import annotations

from functools import partial

import nncf
import onnx

from benchmarks.peers.tools.task import Task, serve


def quantize(task: Task, fast: bool) -> None:
    """Convert."""
    model = onnx.load(str(task.model))
    fed = {graph_input.name for graph_input in model.graph.input} - {weight.name for weight in model.graph.initializer}
    batches = [{name: values for name, values in batch.items() if name in fed} for batch in task.batches()]
    quantized = nncf.quantize(
        model,
        nncf.Dataset(batches),
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=fast,
        subset_size=len(batches),
    )
    onnx.save(quantized, str(task.output))


if __name__ == "__main__":
    serve({"fast": partial(quantize, fast=True), "accurate": partial(quantize, fast=False)}, "nncf", "onnxruntime")
