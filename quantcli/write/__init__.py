"""Writers: one file per output, all with the same verb: write(QuantizedModel) → the output's model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.write import onnx_qdq, onnx_qoperator

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from quantcli.quantize import QuantizedModel

WRITERS: dict[str, Callable[[QuantizedModel], ir.Model]] = {"qdq": onnx_qdq.write, "qoperator": onnx_qoperator.write}
