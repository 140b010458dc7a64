"""Recurrent layers without what their exporters write around them: initial states of zeros, and the last step of all steps.

A state that is left out is zero, and what a layer gives at its last step it gives besides, as Y_h (ONNX, operators LSTM, GRU and
RNN). Both are the same to the bit, and spare the runtime the tensors of all steps.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant, constant
from quantcli.shapes import axes_of

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
# Where the lengths of sequences and the initial states stand among the operands.
LENGTHS, STATES = 4, (5, 6)
# Operators that give zeros of zeros.
ZEROS_OF_ZEROS = frozenset(
    {"Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
# The axes of what a layer gives: steps, directions, samples, features.
STEPS, DIRECTIONS, SAMPLES, FEATURES = range(4)


def plain_recurrent(model: ir.Model) -> None:
    """Rewrite the recurrent layers of a model's main graph."""
    for node in list(model.graph):
        if node.domain == "" and node.op_type in RECURRENT:
            without_zeros(node)
        elif node.domain == "" and node.op_type == "Gather":
            last_step(node, model.graph)


def without_zeros(node: ir.Node) -> None:
    """Leave out initial states that are zero."""
    for place in STATES:
        if place < len(node.inputs) and is_zero(node.inputs[place]):
            node.replace_input_with(place, None)
    used = [place for place, value in enumerate(node.inputs) if value is not None]
    node.resize_inputs(used[-1] + 1)


def is_zero(value: ir.Value | None) -> bool:
    """Tell whether a tensor holds nothing but zeros, whatever comes in."""
    held, producer = constant(value), value.producer() if value is not None else None
    if held is not None:
        return not held.any()
    if producer is None or producer.domain:
        return False
    if producer.op_type == "ConstantOfShape":
        fill = producer.attributes.get_tensor("value", None)
        return fill is None or not fill.numpy().any()
    return producer.op_type in ZEROS_OF_ZEROS and is_zero(producer.inputs[0])


def last_step(node: ir.Node, graph: ir.Graph) -> None:
    """Take what a Gather picks of a layer's last step from where the layer gives that alone."""
    place, source = constant(node.inputs[1]), node.inputs[0]
    axes = layer_axes(source)
    if place is None or place.ndim or source is None or axes is None:
        return
    axis = node.attributes.get_int("axis", 0) % len(axes)
    rest = [one for one in axes if one != STEPS]
    layer = layer_of(source)
    steps = (axes_of(layer.outputs[0]) or [None])[STEPS]
    if (
        axes[axis] != STEPS
        or rest != [SAMPLES, FEATURES]
        or int(place) not in {-1, steps - 1 if isinstance(steps, int) else -1}
    ):
        return
    last = last_of(layer)
    index = add_constant(graph, f"{node.outputs[0].name}_axes", np.array([0], dtype=np.int64))
    squeezed = ir.node("Squeeze", [last, index], name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [squeezed], [node.outputs[0]], [squeezed.outputs[0]])


def last_of(layer: ir.Node) -> ir.Value:
    """Return a layer's second output, named and typed: what it gives at the last step, by direction."""
    every = layer.outputs[0]
    if len(layer.outputs) < 2:
        layer.resize_outputs(2)
    last = layer.outputs[1]
    if not last.name:
        last.name, last.type = f"{every.name}_last", every.type
        last.shape = ir.Shape(list(every.shape)[1:]) if every.shape is not None else None
    return last


def layer_of(value: ir.Value) -> ir.Node:
    """Return the node at the beginning of a chain of operators that only move values."""
    node = value.producer()
    while node is not None and node.op_type not in RECURRENT:
        node = node.inputs[0].producer()  # type: ignore[union-attr]
    assert node is not None  # noqa: S101 - `layer_axes` has been there
    return node


def layer_axes(value: ir.Value | None) -> list[int] | None:
    """Return which axes of a recurrent layer's first output a tensor has, in order; None where it is not known to hold just that.

    The layer goes forward, all its sequences have one length, and it has one direction, whose axis may be gone.
    """
    node = value.producer() if value is not None else None
    if node is None or node.domain or value is None:
        return None
    if node.op_type in RECURRENT:
        lengths = node.inputs[LENGTHS] if len(node.inputs) > LENGTHS else None
        forward = node.attributes.get_string("direction", "forward") == "forward"
        plain = forward and lengths is None and not node.attributes.get_int("layout", 0) and value is node.outputs[0]
        return [STEPS, DIRECTIONS, SAMPLES, FEATURES] if plain else None
    before = layer_axes(node.inputs[0]) if node.op_type in {"Identity", "Transpose", "Squeeze", "Reshape"} else None
    if before is None or node.op_type == "Identity":
        return before
    if node.op_type == "Transpose":
        return [before[axis] for axis in node.attributes.get_ints("perm", tuple(range(len(before)))[::-1])]
    if node.op_type == "Squeeze":
        held = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        gone = [] if held is None else [before[axis] for axis in held.reshape(-1).tolist()]
        return [axis for axis in before if axis != DIRECTIONS] if gone == [DIRECTIONS] else None
    return reshaped_axes(node, before)


def reshaped_axes(node: ir.Node, before: list[int]) -> list[int] | None:
    """Return what a Reshape leaves that takes the axis of directions away; None where it may do something else."""
    lengths, made = axes_of(node.inputs[0]), axes_of(node.outputs[0])
    after = [axis for axis in before if axis != DIRECTIONS]
    if lengths is None or made is None or len(made) != len(after):
        return None
    kept = [length for axis, length in zip(before, lengths, strict=True) if axis != DIRECTIONS]
    other = [one for one, two in zip(kept, made, strict=True) if one is None or one != two]
    return after if len(other) <= 1 else None  # the last one follows from all others
