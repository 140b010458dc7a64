"""Lookup tables, exhausted: every input integer."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from quantcli.arithmetic.affine import IntegerType
from quantcli.arithmetic.tables import FUNCTIONS, table
from quantcli.rules import RULES, Arithmetic

UINT8, INT8 = IntegerType("uint8"), IntegerType("int8")
EXPECTED: dict[str, tuple[dict[str, float], Callable[[float], float]]] = {
    "Relu": ({}, lambda x: max(x, 0.0)),
    "Clip": ({"min": -1.0, "max": 2.0}, lambda x: min(max(x, -1.0), 2.0)),
    "LeakyRelu": ({"alpha": 0.1}, lambda x: x if x >= 0 else 0.1 * x),
    "Sigmoid": ({}, lambda x: 1 / (1 + math.exp(-x))),
    "Tanh": ({}, math.tanh),
    "HardSigmoid": ({"alpha": 0.2, "beta": 0.5}, lambda x: min(max(0.2 * x + 0.5, 0.0), 1.0)),
    "HardSwish": ({}, lambda x: x * min(max(x / 6 + 0.5, 0.0), 1.0)),
}


def test_every_table_operator_has_a_function() -> None:
    assert set(FUNCTIONS) == {name for name, rule in RULES.items() if rule.arithmetic is Arithmetic.TABLE}


@pytest.mark.parametrize("operator", sorted(EXPECTED))
@pytest.mark.parametrize(("x_grid", "y_grid"), [(UINT8, UINT8), (INT8, INT8)])
def test_all_inputs(operator: str, x_grid: IntegerType, y_grid: IntegerType) -> None:
    parameters, function = EXPECTED[operator]
    scale, zero_point = np.float32(0.037), 20
    out_scale, out_zero_point = np.float32(0.021), 30
    found = table(operator, parameters, (x_grid, scale, zero_point), (y_grid, out_scale, out_zero_point))
    assert found.dtype == y_grid.dtype
    assert len(found) == x_grid.qmax - x_grid.qmin + 1
    for q, y in zip(range(x_grid.qmin, x_grid.qmax + 1), found.tolist(), strict=True):
        exact = function(float(scale) * (q - zero_point)) / float(out_scale) + out_zero_point
        held = min(max(exact, y_grid.qmin), y_grid.qmax)
        # Two float64 evaluations of the same function differ by some 2^-45 steps here: only a tie can fall differently.
        assert abs(y - held) <= 0.5 + 2.0**-40
