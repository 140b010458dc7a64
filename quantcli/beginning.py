"""The beginning of a network, where integers gain nothing: its first convolutions, with few channels at full size.

Float kernels beat integer ones there, which gather a matrix of patches that few filters share, or filter each channel by itself;
and one rounding behind several convolutions is cheaper, and loses less, than one before and several between them. So those stay
float that a target's runtime was measured to compute faster so, as far as nothing before them is in integers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quantcli.cost import per_value, values_of
from quantcli.load.learned import LEARNED
from quantcli.rules import RULES, Arithmetic

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import onnx_ir as ir

    from quantcli.targets import PlacementFormat

# Convolutions that make fewer values than this per sample take a few microseconds either way.
FEWEST = 1 << 12
# What may stand between a convolution and those that read it: it stays float with it, and is computed as fast there.
BETWEEN = frozenset({"Clip", "LeakyRelu", "Mul", "Relu", "Sigmoid"})
# The axes of the filters of a convolution over images.
IMAGES = 4


def beginning(
    nodes: list[ir.Node], reasons: Collection[ir.Node], placement: PlacementFormat, forced: Collection[ir.Node]
) -> dict[ir.Node, str]:
    """Return the convolutions at a network's beginning that stay float, with the reason.

    Args:
        nodes: The operators on float data, in graph order.
        reasons: Those that stay float anyway.
        placement: What the runtime computes faster.
        forced: Those that the recipe names to be quantized.
    """
    found: dict[ir.Node, str] = {}
    behind: set[ir.Value] = set()  # what integer layers made, however far before
    if not placement.pays:
        return found
    for node in nodes:
        follows = any(value in behind for value in node.inputs if value is not None)
        layer = node not in reasons and multiplies(node)
        if layer and not follows and node.op_type == "Conv" and node not in forced and LEARNED not in node.meta:
            why = few_filters(node, placement, forced) or before_steps(node, placement, forced)
            if why is not None:
                found[node] = why
                continue
        if layer or follows or node in forced:
            behind.update(node.outputs)
    return found


def multiplies(node: ir.Node) -> bool:
    """Tell whether an operator accumulates products, so that integers could gain something."""
    return node.op_type in RULES and RULES[node.op_type].arithmetic is Arithmetic.ACCUMULATE


def few_filters(node: ir.Node, placement: PlacementFormat, forced: Collection[ir.Node]) -> str | None:
    """Return why a convolution over images is faster in float: it has few filters of few terms, or one for each channel.

    Args:
        node: The convolution.
        placement: Up to how many filters, and of how many terms, float is faster.
        forced: Operators that the recipe names to be quantized.
    """
    weight, output = node.inputs[1], node.outputs[0]
    if weight is None or weight.shape is None or len(weight.shape) != IMAGES or makes_little(output):
        return None
    filters, depth, *kernel = weight.shape.numpy()
    terms, readers = depth * math.prod(kernel), list(convolutions_behind(output, forced))
    if not readers or None in readers or terms > placement.first_terms or terms == depth:
        return None  # a pointwise one has nothing to gather
    if node.attributes.get_int("group", 1) > 1:
        return "with one filter per channel it is faster in float" if is_depthwise(node) else None
    separable = all(reader is not None and is_depthwise(reader) for reader in readers)
    if filters > (placement.first_filters_before_depthwise if separable else placement.first_filters):
        return None
    return f"with {filters} filters of {terms} terms it is faster in float than what it reads is quantized and gathered"


def is_depthwise(node: ir.Node) -> bool:
    """Tell whether a convolution has one filter for each channel, and so its own input channel for each filter."""
    shape = node.inputs[1].shape if node.op_type == "Conv" and node.inputs[1] is not None else None
    return shape is not None and shape[:2] == (node.attributes.get_int("group", 1), 1)


def makes_little(value: ir.Value) -> bool:
    """Tell whether a value is known to be small."""
    shape = None if value.shape is None else list(value.shape)[1:]
    return shape is not None and all(isinstance(size, int) for size in shape) and (values_of(value) or 0) < FEWEST


def convolutions_behind(value: ir.Value, forced: Collection[ir.Node]) -> Iterator[ir.Node | None]:
    """Yield the convolutions that read a value, behind what may stand between, and None for any other reader.

    One that stays float for a reason of its own is as good: an integer layer before it would be dequantized for it.

    A sum that reads the same tensor is computed in another order of axes than the convolutions, which ONNX Runtime then transposes
    back and forth around every sum behind it, and maxima of bytes take ten times as long in that order.
    """
    if value.is_graph_output():
        yield None
    for user in set(value.consumers()):
        if user.op_type == "Conv" and user not in forced and user.inputs[0] is value:
            yield user
        elif user.op_type in BETWEEN and user not in forced and (user.op_type != "Mul" or is_silu(user)):
            yield from convolutions_behind(user.outputs[0], forced)
        else:
            yield None


def is_silu(node: ir.Node) -> bool:
    """Tell whether a product is one of a value and of its own sigmoid."""
    for gate, value in (node.inputs, node.inputs[::-1]):
        maker = gate.producer() if gate is not None else None
        if maker is not None and maker.op_type == "Sigmoid" and maker.inputs[0] is value:
            return True
    return False


def before_steps(node: ir.Node, placement: PlacementFormat, forced: Collection[ir.Node]) -> str | None:
    """Return why a convolution gains too little: few multiply-accumulates, for a function that takes steps.

    Float convolutions take such a HardSwish in.

    Args:
        node: The convolution.
        placement: How many multiply-accumulates it must do per value, and what takes steps.
        forced: Operators that the recipe names to be quantized.
    """
    least, found = placement.macs_before_steps, per_value(node)
    readers = list(node.outputs[0].consumers())
    if found is None or found >= least or not readers or node.outputs[0].is_graph_output():
        return None
    if any(user in forced or user.op_type not in placement.steps for user in readers):
        return None
    return (
        f"{found:.0f} multiply-accumulates per value do not outweigh quantizing what it reads, and {readers[0].op_type} in "
        f"steps, which a float convolution takes in; that takes {least}"
    )
