"""Operators that draw random numbers: what such a model gives cannot be repeated."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from quantcli.errors import StrictError
from quantcli.fold import constant

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)

# Operators that draw random numbers; Dropout does in training mode alone.
RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
# So many of them are named.
NAMED = 4


def check_repeatable(model: ir.Model, strict: bool = False) -> None:
    """Warn of operators that draw random numbers.

    Raises:
        StrictError: If there are some, where that is forbidden.
    """
    found = [f"{node.op_type} '{node.name}'" for node in model.graph.all_nodes() if draws(node)]
    if not found:
        return
    shown = ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
    if strict:
        raise StrictError(f"random numbers are drawn by {shown}", "make them an input of the model")
    logger.warning(
        "random numbers are drawn by %s: neither calibration nor evaluation can be repeated, and the same command may not "
        "give the same bytes",
        shown,
    )


def repeatable(model: ir.Model) -> bool:
    """Tell whether a model gives the same twice."""
    return not any(draws(node) for node in model.graph.all_nodes())


def draws(node: ir.Node) -> bool:
    """Tell whether an operator draws random numbers."""
    if node.op_type != "Dropout":
        return node.op_type in RANDOM
    training = node.inputs[2] if len(node.inputs) > 2 else None
    held = constant(training)
    return training is not None and (held is None or bool(held.any()))
