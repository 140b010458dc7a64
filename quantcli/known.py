"""What a model says of its tensors before they are observed: their ends, how large values may be, who else holds them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from calibration.collect import Known
from quantcli.bounds import activation_bounds
from quantcli.fold import constant
from quantcli.rules import Arithmetic, Operand

if TYPE_CHECKING:
    import onnx_ir as ir

    from quantcli.placement import Placement

# Operators whose output holds what their first input holds.
RESHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"})


def holders(value: ir.Value) -> list[ir.Value]:
    """Return the tensors that hold the same elements as one, in another shape or order."""
    found, waiting = [value], [value]
    while waiting:
        one = waiting.pop()
        producer = one.producer()
        around = [producer.inputs[0]] if producer is not None and producer.op_type in RESHAPING else []
        around += [user.outputs[0] for user in one.consumers() if user.op_type in RESHAPING and user.inputs[0] is one]
        new = [other for other in around if other is not None and other not in found]
        found += new
        waiting += new
    return found


def known_of(placement: Placement) -> Known:
    """Return the ends of layers' outputs, where their own or an absorbed Relu or Clip sets a lowest one.

    How large values may be is 0 where an operator that stays float could make a NaN out of any, which no Clip holds back.
    """
    ends = {}
    for layer in placement.layers:
        last = layer.absorbed[-1] if layer.absorbed else layer.node
        shape = layer.output.shape
        if shape is None or len(shape) < 3 or last.op_type not in {"Relu", "Clip"}:
            continue
        low, high = activation_bounds(last)
        if math.isfinite(low):
            ends[str(layer.output.name)] = low, high
    return Known(ends, largest_safe(placement) if made_by_layers(placement) else 0.0)


def poolable(placement: Placement, known: Known) -> frozenset[str]:
    """Return the outputs of a known lowest value that have something to pool over behind sample and a known number of channels.

    Those of a known highest one, too, are not among them: once both were seen, there is nothing to look for. None are where what is
    not finite could be made of values of any size.
    """
    if not known.limit:
        return frozenset()
    shapes = {str(layer.output.name): layer.output.shape for layer in placement.layers}
    lowest_alone = {name for name, (_, high) in known.ends.items() if high == math.inf}
    return frozenset(
        name
        for name, shape in shapes.items()
        if name in lowest_alone and shape is not None and len(shape) > 2 and isinstance(shape[1], int)
    )


def made_by_layers(placement: Placement) -> bool:
    """Tell whether everything that layers read was made by layers: no operator that stays float stands before one."""
    floats = {layer.name for layer in placement.floats}
    waiting = [layer.node for layer in placement.layers]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if str(node.name) in floats:
            return False
        before = {producer for value in node.inputs if value is not None and (producer := value.producer()) is not None}
        waiting += before - seen
        seen |= before
    return True


def largest_safe(placement: Placement) -> float:
    """Return a magnitude that keeps everything finite: as long as no operand exceeds it, no layer's float32 can overflow.

    A layer's output is at most the sum of its weights' magnitudes times its largest operand (and a bias), or a product of two
    operands, or a sum of fewer than 2^24 of them.
    """
    gain = 1.0
    for layer in placement.layers:
        if layer.rule.arithmetic is not Arithmetic.ACCUMULATE:
            continue
        for _, value, kind in layer.operands():
            values = constant(value) if kind is Operand.WEIGHT else None
            if values is not None:
                gain = max(gain, float(np.abs(values.astype(np.float64)).sum()))
    return 1e15 / gain
