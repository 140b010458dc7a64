"""Element-wise functions as lookup tables: y = table[x − qmin], one entry per input integer (docs/arithmetic.md, section 6)."""

from __future__ import annotations

import math
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


def erf(x: NDArray[np.float64], _: Mapping[str, float]) -> NDArray[np.float64]:
    """Return the error function."""
    return np.array([math.erf(value) for value in x.reshape(-1).tolist()], dtype=np.float64).reshape(x.shape)


def gelu(x: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return x·Φ(x), or with ``tanh`` the approximation 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))) (ONNX Gelu)."""
    if parameters["tanh"]:
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0), parameters))


def softplus(x: NDArray[np.float64], _: Mapping[str, float]) -> NDArray[np.float64]:
    """Return ln(e^x + 1), in the form that does not overflow."""
    return np.logaddexp(x, 0.0)


def softsign(x: NDArray[np.float64], _: Mapping[str, float]) -> NDArray[np.float64]:
    """Return x / (1 + |x|)."""
    return x / (1.0 + np.abs(x))


def mish(x: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return x · tanh(softplus(x))."""
    return x * np.tanh(softplus(x, parameters))


def elu(x: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return x where it is positive, ``alpha``·(e^x − 1) elsewhere."""
    return np.where(x > 0, x, parameters["alpha"] * np.expm1(np.minimum(x, 0.0)))


def selu(x: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return ``gamma`` times elu(x)."""
    return parameters["gamma"] * elu(x, parameters)


def celu(x: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return max(0, x) + min(0, ``alpha``·(e^(x/``alpha``) − 1))."""
    alpha = parameters["alpha"]
    return np.maximum(x, 0.0) + np.minimum(alpha * np.expm1(np.minimum(x, 0.0) / alpha), 0.0)


def thresholded_relu(x: NDArray[np.float64], parameters: Mapping[str, float]) -> NDArray[np.float64]:
    """Return x where it exceeds ``alpha``, 0 elsewhere."""
    return np.where(x > parameters["alpha"], x, 0.0)


def absolute(x: NDArray[np.float64], _: Mapping[str, float]) -> NDArray[np.float64]:
    """Return |x|."""
    return np.abs(x)


FUNCTIONS: dict[str, Callable[[NDArray[np.float64], Mapping[str, float]], NDArray[np.float64]]] = {
    "Relu": relu,
    "Clip": clip,
    "LeakyRelu": leaky_relu,
    "Sigmoid": sigmoid,
    "Tanh": tanh,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Erf": erf,
    "Gelu": gelu,
    "Softplus": softplus,
    "Softsign": softsign,
    "Mish": mish,
    "Elu": elu,
    "Selu": selu,
    "Celu": celu,
    "ThresholdedRelu": thresholded_relu,
    "Abs": absolute,
}
# The attributes that a function reads, with ONNX's defaults.
ATTRIBUTES: dict[str, dict[str, float]] = {
    "LeakyRelu": {"alpha": 0.01},
    "HardSigmoid": {"alpha": 0.2, "beta": 0.5},
    "Elu": {"alpha": 1.0},
    "Selu": {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875},
    "Celu": {"alpha": 1.0},
    "ThresholdedRelu": {"alpha": 1.0},
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
