"""Functions of one value that exporters write out in several operators, as the one operator that they are.

x·Φ(x) comes as a product of x, Erf and constants, its approximation with the cube of x and Tanh. Operator by operator such a
function is rounded five times and more, and the cube spans three times as many octaves as x: 8 bits leave nothing of small values.
As one operator it is a table.

Which function operators make is found by computing it, not by how they stand: what leads from one tensor to another through
operators of single elements and constants of one value is computed at some points, and compared with what ONNX knows.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.arithmetic.tables import erf, gelu
from quantcli.canonical import put, real_scalar
from quantcli.errors import ModelError
from quantcli.fold import lift_opset

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

# The operator set that has Gelu.
OPSET = 20
# Where functions are compared: around zero, where they bend, and far out.
POINTS = np.concatenate([np.linspace(-12.0, 12.0, 193), [-40.0, 40.0]])
# Constants are float32: a relative error of 2^-24 each in at most four of them, of functions whose slope stays below 1.2. The two
# forms of Gelu are 4·10^-4 apart, where they are farthest.
NEAR = 1e-6
ELEMENTWISE: dict[str, Callable[..., NDArray[np.float64]]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Neg": np.negative,
    "Pow": np.power,
    "Tanh": np.tanh,
    "Erf": lambda x: erf(x, {}),
    "Sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
}
FORMS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "none": lambda x: gelu(x, {"tanh": 0.0}),
    "tanh": lambda x: gelu(x, {"tanh": 1.0}),
}


def composed(model: ir.Model) -> ir.Model | None:
    """Return a copy of a model with every Gelu that is written out as one operator, in an operator set that has it.

    Returns:
        None where there is none, or the model cannot be had in such an operator set.
    """
    if not written_out(model.graph):
        return None
    whole = model.clone()
    try:
        lift_opset(whole, OPSET)
    except ModelError as error:
        logger.info("Gelu stays written out: %s", error)
        return None
    for node, x, form in written_out(whole.graph):
        put(whole.graph, node, ir.node("Gelu", [x], {"approximate": form}))
    return whole


def written_out(graph: ir.Graph) -> list[tuple[ir.Node, ir.Value, str]]:
    """Return the products that end a Gelu written out, what it is a function of, and its form (ONNX's ``approximate``)."""
    source: dict[ir.Value, ir.Value] = {}
    made: dict[ir.Value, NDArray[np.float64]] = {}
    found = []
    for node in graph:
        if node.domain not in {"", "ai.onnx"} or node.op_type not in ELEMENTWISE:
            continue
        operands = [value for value in node.inputs if value is not None]
        reals = [real_scalar(value) for value in operands]
        roots = {source.get(value, value) for value, real in zip(operands, reals, strict=True) if real is None}
        output = node.outputs[0]
        if len(roots) != 1 or output.dtype is not ir.DataType.FLOAT:
            continue
        (root,) = roots
        values = [
            made.get(value, POINTS) if real is None else real for value, real in zip(operands, reals, strict=True)
        ]
        with np.errstate(all="ignore"):
            made[output] = ELEMENTWISE[node.op_type](*values)
        source[output] = root
        form = form_of(made[output]) if node.op_type == "Mul" else None
        if form is not None:
            found.append((node, root, form))
            del source[output], made[output]  # what follows is a function of it
    return found


def form_of(values: NDArray[np.float64]) -> str | None:
    """Return the form of Gelu that has these values at `POINTS`; None where they are another function's."""
    for form, function in FORMS.items():
        if np.all(np.abs(values - function(POINTS)) <= NEAR * (1.0 + np.abs(POINTS))):
            return form
    return None
