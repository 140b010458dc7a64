"""quantcli: turn a saved float PyTorch or ONNX model into an integer one, with every integer accounted for.

>>> from quantcli import calibrate, convert, evaluate  # doctest: +SKIP
>>> convert("model.onnx", "model.int8.onnx", data="calibration.npz")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantcli.observation import Run
    from quantcli.pipeline import Conversion, Evaluation, calibrate, convert, evaluate, verify, verify_c
    from quantcli.recipe import Recipe, read_recipe

__version__ = "0.1.0"
__all__ = [
    "Conversion",
    "Evaluation",
    "Recipe",
    "Run",
    "__version__",
    "calibrate",
    "convert",
    "evaluate",
    "read_recipe",
    "verify",
    "verify_c",
]


def __getattr__(name: str) -> Any:
    """Import the API when it is asked for, so that ``quantcli --help`` stays light."""
    if name in {"Recipe", "read_recipe"}:
        from quantcli import recipe

        return getattr(recipe, name)
    if name in __all__:
        from quantcli import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'quantcli' has no attribute '{name}'")
