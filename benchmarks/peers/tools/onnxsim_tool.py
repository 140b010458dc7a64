"""onnxsim's static quantization: the whole graph in integers, as it is, with equalized layers, and with corrected biases."""

from __future__ import annotations

from functools import partial

import onnx
import onnxsim

from benchmarks.peers.tools.task import Task, serve


def quantize(task: Task, equalized: bool = False, corrected: bool = False, method: str = "minmax") -> None:
    """Convert."""
    samples = list(task.batches())
    model = onnxsim.simplify(onnx.load(str(task.model)))[0]
    if equalized:
        model = onnxsim.cross_layer_equalize(model)
    quantized = onnxsim.quantize_static(model, samples, full_graph=True, method=method)
    if corrected:
        quantized = onnxsim.correct_bias(model, quantized, samples)
    onnx.save(quantized, str(task.output))


if __name__ == "__main__":
    serve(
        {
            "static": quantize,
            "mse": partial(quantize, method="mse"),
            "corrected": partial(quantize, corrected=True),
            "equalized, corrected": partial(quantize, equalized=True, corrected=True),
        },
        "onnxsim",
        "onnxruntime",
    )
