"""Operators whose bodies are graphs of their own: what is in those stays float."""

from __future__ import annotations

import onnx_ir as ir

# Operators whose bodies are graphs of their own, and how what is in those may get out of them.
BODIES = {
    "If": "export the model for one of its branches",
    "Loop": "export recurrent layers as LSTM, GRU or RNN, or the loop unrolled",
    "Scan": "export recurrent layers as LSTM, GRU or RNN, or the loop unrolled",
}
# What computes with weights, in bodies as well.
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")


def why_whole(node: ir.Node) -> str:
    """Return why an operator with bodies stays float: what is in them, and how that may get out of them."""
    bodies = [one.as_graph() for one in node.attributes.values() if one.type is ir.AttributeType.GRAPH]
    inner = [item.op_type for body in bodies for item in body.all_nodes()]
    held = [f"{operator} ({inner.count(operator)})" for operator in HEAVY if operator in inner]
    if not held:
        return "its bodies stay float"
    return f"its bodies stay float, with what is in them: {', '.join(held)}; {BODIES[node.op_type]}"
