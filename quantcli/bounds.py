"""Between which values an activation's readers tell its values apart: so far its grid has to reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.fold import constant
from quantcli.rules import RULES, Arithmetic

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir
    from numpy.typing import NDArray

EVERYTHING = -float("inf"), float("inf")


def activation_bounds(node: ir.Node) -> tuple[float, float]:
    """Return the real bounds that a Relu or Clip enforces; infinite where it has none."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = [constant(value) if value is not None else None for value in (*node.inputs[1:], None, None)][:2]
    low, high = (float(bound.item()) if bound is not None else None for bound in bounds)
    return (-float("inf") if low is None else low), (float("inf") if high is None else high)


# By a hundredth of the golden ratio's fraction, whose multiples come least near whole numbers.
FURTHER = 1.0061803


def hard_sigmoid_bounds(node: ir.Node) -> tuple[float, float]:
    """Return between which values a HardSigmoid rises from 0 to 1, and somewhat further.

    A grid that ends where it bends has one step for each step of what it gives, and a half is added: all values would be ties.
    """
    slope, middle = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    ends = -FURTHER * middle / slope, FURTHER * (1 - middle) / slope
    return ends if slope > 0 else (-float("inf"), float("inf"))


# Between which values a function is not flat. Erf, Tanh and Sigmoid are, as float32 has them, beyond these (e^-16 < 2^-23, say of
# Sigmoid); Gelu and HardSwish are zero far below: −5.5·Φ(−5.5) = −1.0e-7.
BENT: dict[str, Callable[[ir.Node], tuple[float, float]]] = {
    "Relu": activation_bounds,
    "Clip": activation_bounds,
    "HardSigmoid": hard_sigmoid_bounds,
    "HardSwish": lambda _: (-3.0, float("inf")),
    "Gelu": lambda _: (-5.5, float("inf")),
    "Erf": lambda _: (-4.0, 4.0),
    "Tanh": lambda _: (-9.0, 9.0),
    "Sigmoid": lambda _: (-17.0, 17.0),
}


def felt(value: ir.Value) -> tuple[float, float]:
    """Return between which values an activation's readers tell its values apart: its range need not reach further.

    A HardSwish makes zero of all below −3. Readers that move values tell apart what their own readers do; others, and whoever
    gets the model's outputs, tell all apart.
    """
    ends: list[tuple[float, float]] = [EVERYTHING] if value.is_graph_output() else []
    for user in value.consumers():
        rule = RULES.get(user.op_type) if not user.domain else None
        if rule is not None and user.op_type in BENT and not any(check(user) for check in rule.refuses):
            ends.append(BENT[user.op_type](user))
        elif rule is not None and rule.arithmetic is Arithmetic.MOVE and user.inputs[0] is value:
            ends += map(felt, user.outputs)
        elif user.op_type != "Shape":
            return EVERYTHING
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else EVERYTHING


def cut(values: NDArray[np.float32], ends: tuple[float, float]) -> NDArray[np.float32]:
    """Return values cut off where readers tell them apart no more (`felt`): the array itself where they tell all apart."""
    return values if ends == EVERYTHING else np.clip(values, *ends)
