"""What logarithms are taken of: a spectrum computed by convolutions or products, as front-ends of speech and music have it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.rules import RULES, Arithmetic

if TYPE_CHECKING:
    import onnx_ir as ir

# What a logarithm tells apart, the operators behind which it stands have to tell apart as well: those that keep proportions.
KEEPING = frozenset({
    "Abs", "Add", "AveragePool", "Cast", "Div", "GlobalAveragePool", "Identity", "Mul", "Neg", "Pow", "ReduceL1", "ReduceL2",
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "Sqrt", "Sub",
})  # fmt: skip
# What bounds values from below before a logarithm is taken; in front of a layer that accumulates it is an activation.
BOUNDING = frozenset({"Clip", "Max", "Min", "Relu"})
REASON = "a logarithm is taken of what it makes: no grid holds the small values beside the large ones"


def under_logarithms(model: ir.Model) -> frozenset[ir.Node]:
    """Return the operators whose results a logarithm is taken of, as they are, squared, summed up or weighted.

    From each Log the walk goes back through what keeps proportions, moves values or accumulates. Before a layer that accumulates it
    ends at the first activation, so that of a network that was learned no more is float than its last layer.
    """
    pending = [(node.inputs[0], False) for node in model.graph if node.op_type == "Log"]
    seen = set(pending)
    found: set[ir.Node] = set()
    while pending:
        value, accumulated = pending.pop()
        producer = value.producer() if value is not None else None
        if producer is None:
            continue
        rule = RULES.get(producer.op_type)
        accumulates = rule is not None and rule.arithmetic is Arithmetic.ACCUMULATE
        keeps = producer.op_type in KEEPING or accumulates
        moves = rule is not None and rule.arithmetic is Arithmetic.MOVE
        keeps |= moves or producer.op_type == "Concat"
        if not keeps and accumulated:
            continue
        if not moves:
            found.add(producer)
        if keeps or producer.op_type in BOUNDING:
            fresh = {(source, accumulated or accumulates) for source in producer.inputs} - seen
            seen |= fresh
            pending.extend(fresh)
    return frozenset(found)
