"""AMD Quark: presets of its documentation, one of them with AdaRound as well, and one made per channel."""

from __future__ import annotations

import copy
from functools import partial

from quark.onnx import ModelQuantizer
from quark.onnx.quantization.config.config import Config
from quark.onnx.quantization.config.custom_config import get_default_config

from benchmarks.peers.tools.task import Batches, Task, serve


def quantize(task: Task, preset: str, per_channel: bool = False) -> None:
    """Convert."""
    wishes = copy.deepcopy(get_default_config(preset))
    if per_channel:
        wishes.per_channel = True
    ModelQuantizer(Config(global_quant_config=wishes)).quantize_model(str(task.model), str(task.output), Batches(task))


if __name__ == "__main__":
    serve(
        {
            "A8W8": partial(quantize, preset="A8W8"),
            "U8S8": partial(quantize, preset="U8S8_AAWS"),
            "U8S8 per channel": partial(quantize, preset="U8S8_AAWS", per_channel=True),
            "XINT8": partial(quantize, preset="XINT8"),
            "INT8_CNN_DEFAULT": partial(quantize, preset="INT8_CNN_DEFAULT"),
            "INT8_CNN_DEFAULT per channel": partial(quantize, preset="INT8_CNN_DEFAULT", per_channel=True),
            "U8S8 AdaRound": partial(quantize, preset="U8S8_AAWS_ADAROUND"),
        },
        "amd-quark",
        "onnxruntime",
    )
