"""Element-wise functions as lookup tables: y = table[x − qmin], one entry per input integer (docs/arithmetic.md, section 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.arithmetic.affine import IntegerType, quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray


def relu(x: NDArray[np.float64], _: Mapping[str, float]) -> NDArray[np.float64]:
    """Return max(x, 0)."""
    return np.maximum(x, 0.0)


def clip(x: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return x held between ``min`` and ``max``."""
    return np.clip(x, parameters["min"], parameters["max"])


def leaky_relu(x: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return x where it is positive, ``alpha``·x elsewhere."""
    return np.where(x >= 0, x, parameters["alpha"] * x)


def sigmoid(x: NDArray[np.float64], _: Mapping[str, float]) -> NDArray[np.float64]:
    """Return 1 / (1 + e^−x), in the form that does not overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def tanh(x: NDArray[np.float64], _: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the hyperbolic tangent."""
    return np.tanh(x)


def hard_sigmoid(x: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return ``alpha``·x + ``beta`` held between 0 and 1."""
    return np.clip(parameters["alpha"] * x + parameters["beta"], 0.0, 1.0)


def hard_swish(x: NDArray[np.float64], _: Mapping[str, float]) -> NDArray[np.float64]:
    """Return x · hard_sigmoid(x) with alpha 1/6 and beta 1/2 (ONNX HardSwish)."""
    return x * np.clip(x / 6.0 + 0.5, 0.0, 1.0)


FUNCTIONS: dict[str, Callable[[NDArray[np.float64], Mapping[str, float]], NDArray[np.float64]]] = {
    "Relu": relu,
    "Clip": clip,
    "LeakyRelu": leaky_relu,
    "Sigmoid": sigmoid,
    "Tanh": tanh,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
}

# The unit of softmax's exponentials: they reach from 2^30 down, so that 2^22 of them still sum to less than 2^53.
EXPONENTIAL_UNIT = 2.0**30


def exponentials(x: tuple[IntegerType, np.float32]) -> NDArray[np.int64]:
    """Return e^(−S·d) in units of 2^-30 for every distance d between two integers of a grid (equation 17).

    Args:
        x: Grid and scale of a softmax's input.
    """
    grid, scale = x
    distances = np.arange(grid.qmax - grid.qmin + 1, dtype=np.float64)
    return np.rint(EXPONENTIAL_UNIT * np.exp(-float(scale) * distances)).astype(np.int64)


def table(
    operator: str,
    parameters: Mapping[str, float],
    x: tuple[IntegerType, np.float32, int],
    y: tuple[IntegerType, np.float32, int],
) -> NDArray[Any]:
    """Return the outputs for every input integer from qmin to qmax, computed in float64 and quantized (equation 15).

    Args:
        operator: A key of ``FUNCTIONS``.
        parameters: The operator's attributes (``alpha``, ``beta``, ``min``, ``max``).
        x: Grid, scale and zero point of the input.
        y: Grid, scale and zero point of the output.
    """
    grid, scale, zero_point = x
    integers = np.arange(grid.qmin, grid.qmax + 1, dtype=np.int64)
    reals = float(scale) * (integers - zero_point).astype(np.float64)
    out_grid, out_scale, out_zero_point = y
    return quantize(
        FUNCTIONS[operator](reals, parameters), np.asarray(out_scale), np.asarray(out_zero_point), out_grid, None
    )
