"""Let operators work on integers directly, in place of on the reals between DequantizeLinear and QuantizeLinear."""

from __future__ import annotations

import onnx_ir as ir


def quantizer_of(value: ir.Value) -> ir.Node | None:
    """Return the QuantizeLinear that alone reads a value; None where something else stands behind it."""
    users = list(value.consumers())
    alone = len(users) == 1 and users[0].op_type == "QuantizeLinear" and not value.is_graph_output()
    return users[0] if alone else None


def dequantizer_of(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear that makes a value."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def attributes_of(node: ir.Node, without: set[str] = frozenset()) -> list[ir.Attr]:  # type: ignore[assignment]
    """Return a node's attributes but for the named ones."""
    return [attribute for name, attribute in node.attributes.items() if name not in without]


def move_integers(node: ir.Node, targets: list[ir.Node]) -> bool:
    """Let an operator that only moves values move integers; what it pads with is then their zero point.

    Args:
        node: The operator, on reals.
        targets: The QuantizeLinear behind each of its outputs that are used.

    Returns:
        Whether it could.
    """
    source = dequantizer_of(node.inputs[0])
    if source is None:
        return False
    inputs = [source.inputs[0], *node.inputs[1:]]
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        inputs = [*inputs[:2], source.inputs[2], *inputs[3:]]
    put(node, ir.Node("", node.op_type, inputs, attributes_of(node), num_outputs=len(node.outputs)), targets)
    return True


def put(node: ir.Node, new: ir.Node, targets: list[ir.Node]) -> None:
    """Let a new node make what the quantizers behind an old one made, under the same names."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        return
    new.name = node.name
    used = [i for i, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
    graph.insert_before(node, new)
    for i, target in zip(used, targets, strict=True):
        name = target.outputs[0].name
        ir.convenience.replace_all_uses_with(target.outputs[0], new.outputs[i], replace_graph_outputs=True)
        graph.remove(target, safe=True)
        new.outputs[i].name = name
    graph.remove(node, safe=True)
