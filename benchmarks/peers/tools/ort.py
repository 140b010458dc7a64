"""ONNX Runtime's quantize_static, as its documentation has it: after its own preparation, uint8 activations, int8 weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnxruntime
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.peers.tools.task import Batches, Task, serve


def prepared(task: Task) -> Path:
    """Return the model after `quant_pre_process`; as it is where that fails."""
    path = Path("prepared.onnx")
    try:
        quant_pre_process(str(task.model), str(path))
    except Exception:  # noqa: BLE001 - whatever it raises
        return task.model
    return path


def quantize(task: Task, method: CalibrationMethod, per_channel: bool) -> None:
    """Convert."""
    quantize_static(
        str(prepared(task)),
        str(task.output),
        Batches(task),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=per_channel,
        calibrate_method=method,
    )


if __name__ == "__main__":
    onnxruntime.set_default_logger_severity(4)
    serve(
        {
            "minmax": partial(quantize, method=CalibrationMethod.MinMax, per_channel=True),
            "entropy": partial(quantize, method=CalibrationMethod.Entropy, per_channel=True),
            "percentile": partial(quantize, method=CalibrationMethod.Percentile, per_channel=True),
            "minmax per tensor": partial(quantize, method=CalibrationMethod.MinMax, per_channel=False),
        },
        "onnxruntime",
    )
