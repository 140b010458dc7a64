"""EXPORTS: what a sidecar says, in the formats of other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.export.formats import aimet_1, aimet_2, csv_table, onnxruntime_overrides, tflite_parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantcli.sidecar import Sidecar

EXPORTS: dict[str, Callable[[Sidecar], str]] = {
    "aimet-1.0.0": aimet_1,
    "aimet-2.0.0": aimet_2,
    "ort-overrides": onnxruntime_overrides,
    "tflite": tflite_parameters,
    "csv": csv_table,
}
