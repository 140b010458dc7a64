"""What is divided by: a grid holds zero, and where a small divisor becomes that, the quotient is no number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.fold import constant
from quantcli.rules import RULES, Arithmetic

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import onnx_ir as ir

# What changes a divisor by a constant, bounds it, or takes its root: small values stay small ones of their size.
PASSING = frozenset({"Add", "Cast", "Clip", "Div", "Identity", "Max", "Min", "Mul", "Relu", "Sqrt", "Sub"})
DIVISOR = "it makes what something is divided by: on a grid small divisors become zero"


def under_divisions(model: ir.Model, real_outputs: Collection[str]) -> frozenset[ir.Node]:
    """Return the operators that make divisors, back to the first that does more than to change them by constants.

    What that one reads may be on a grid: a sum is as far off as its terms, relative to its size.

    Args:
        model: The folded model.
        real_outputs: Operators that give reals to float readers, and need not be float themselves.
    """
    pending = [value for node in model.graph for value in divisors(node)]
    seen = set(pending)
    found: set[ir.Node] = set()
    while pending:
        producer = pending.pop().producer()
        if producer is None or producer.op_type in real_outputs:
            continue
        rule = RULES.get(producer.op_type)
        moves = rule is not None and rule.arithmetic is Arithmetic.MOVE
        if not moves:
            found.add(producer)
        computed = [value for value in producer.inputs if value is not None and constant(value) is None]
        if moves or (producer.op_type in PASSING and len(computed) == 1):
            fresh = set(computed) - seen
            seen |= fresh
            pending.extend(fresh)
    return frozenset(found)


def divisors(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the computed tensor that an operator divides by, if it does."""
    if node.domain or node.op_type not in {"Div", "Pow", "Reciprocal"}:
        return
    divisor = node.inputs[1 if node.op_type == "Div" else 0]
    exponent = constant(node.inputs[1]) if node.op_type == "Pow" else None
    inverts = node.op_type != "Pow" or (exponent is not None and bool((exponent < 0).any()))
    if divisor is not None and constant(divisor) is None and inverts:
        yield divisor
