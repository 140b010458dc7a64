"""quantcli: turn a saved float PyTorch or ONNX model into an integer one, with every integer accounted for.

>>> from quantcli import calibrate, convert, evaluate  # doctest: +SKIP
>>> convert("model.onnx", "model.int8.onnx", data="calibration.npz")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.datasets import InputSpec, Preprocess, Selection
    from calibration.errors import ReportedError
    from quantcli.load import Opening
    from quantcli.observation import Run
    from quantcli.pipeline import Conversion, Evaluation, calibrate, convert, evaluate, verify, verify_c
    from quantcli.recipe import Activation, Calibration, Layers, Multiplier, Recipe, Tune, Weight, read_recipe

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "Calibration",
    "Conversion",
    "Evaluation",
    "InputSpec",
    "Layers",
    "Multiplier",
    "Opening",
    "Preprocess",
    "Recipe",
    "ReportedError",
    "Run",
    "Selection",
    "Tune",
    "Weight",
    "__version__",
    "calibrate",
    "convert",
    "evaluate",
    "read_recipe",
    "verify",
    "verify_c",
]

# Where the names are that are no stage's: all others are in `quantcli.pipeline`.
ROOMS = {
    "Activation": "quantcli.recipe",
    "Calibration": "quantcli.recipe",
    "InputSpec": "calibration.datasets",
    "Layers": "quantcli.recipe",
    "Multiplier": "quantcli.recipe",
    "Preprocess": "calibration.datasets",
    "Recipe": "quantcli.recipe",
    "ReportedError": "calibration.errors",
    "Selection": "calibration.datasets",
    "Tune": "quantcli.recipe",
    "Weight": "quantcli.recipe",
    "read_recipe": "quantcli.recipe",
}


def __getattr__(name: str) -> Any:
    """Import the API when it is asked for, so that ``quantcli --help`` stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'quantcli' has no attribute '{name}'")
    return getattr(importlib.import_module(ROOMS.get(name, "quantcli.pipeline")), name)


def __dir__() -> list[str]:
    """Name the API before it is imported, too: what an editor or a notebook offers behind ``quantcli.``."""
    return sorted({*globals(), *__all__})
