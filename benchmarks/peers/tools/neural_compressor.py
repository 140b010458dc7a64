"""onnx-neural-compressor (what became of Intel Neural Compressor's ONNX half): static quantization, and with SmoothQuant."""

from __future__ import annotations

from functools import partial

from onnx_neural_compressor import data_reader
from onnx_neural_compressor.quantization import QuantFormat, QuantType, config, quantize
from onnxruntime.quantization import CalibrationMethod

from benchmarks.peers.tools.task import Batches, Task, serve


class Reader(Batches, data_reader.CalibrationDataReader):  # type: ignore[misc]
    """The samples as the tool asks for them."""


def convert(task: Task, smooth: bool, method: CalibrationMethod = CalibrationMethod.MinMax) -> None:
    """Convert."""
    wishes = config.StaticQuantConfig(
        calibration_data_reader=Reader(task),
        calibrate_method=method,
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"SmoothQuant": True} if smooth else {},
        execution_provider="CPUExecutionProvider",
        calibration_sampling_size=len(list(task.batches())),
    )
    quantize(str(task.model), str(task.output), wishes)


if __name__ == "__main__":
    serve(
        {"static": partial(convert, smooth=False), "smooth": partial(convert, smooth=True)},
        "onnx-neural-compressor",
        "onnxruntime",
    )
