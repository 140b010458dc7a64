"""AIMET's quantization simulation of an ONNX model, with and without cross-layer equalization, written with integer weights."""

from __future__ import annotations

from functools import partial

import aimet_onnx
import onnx
from aimet_onnx.cross_layer_equalization import equalize_model

from benchmarks.peers.tools.task import Task, serve


def quantize(task: Task, equalized: bool) -> None:
    """Convert."""
    model = onnx.load(str(task.model))
    if equalized:
        equalize_model(model)
    simulation = aimet_onnx.QuantizationSimModel(
        model, param_type=aimet_onnx.int8, activation_type=aimet_onnx.int8, providers=["CPUExecutionProvider"]
    )
    simulation.compute_encodings(task.batches())
    onnx.save(simulation.to_onnx_qdq(export_int32_bias=True, prequantize_constants=True), str(task.output))


if __name__ == "__main__":
    serve(
        {"equalized": partial(quantize, equalized=True), "plain": partial(quantize, equalized=False)},
        "aimet-onnx",
        "onnxruntime",
    )
