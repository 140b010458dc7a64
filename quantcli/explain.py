"""Why an operator became an integer layer, or stays float, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from quantcli.cost import work_of
from quantcli.errors import UsageError
from quantcli.rules import Arithmetic

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from quantcli.plan import Plan


@dataclass(frozen=True)
class Explanation:
    """What was decided about one operator.

    Attributes:
        name: Its node's name in the folded model.
        operator: Its type.
        integer: Whether it is an integer layer; an activation that a layer absorbed is part of one, a float operator whose weights
            are stored as integers is none.
        why: The reason.
        macs: Multiply-accumulates per run, free dimensions counted as 1; None where shapes are not known.
        read: Values read that are computed while the model runs.
        made: Values made.
        stored: Constant values read.
        tensors: What it reads and makes, each with its integers (``uint8, scale 0.1, zero point 3``) or as ``real``.
    """

    name: str
    operator: str
    integer: bool
    why: str
    macs: int | None
    read: int | None
    made: int | None
    stored: int
    tensors: tuple[tuple[str, str], ...]


def explain(model: ir.Model, plan: Plan, patterns: Sequence[str]) -> tuple[Explanation, ...]:
    """Explain the operators whose names match a pattern of a shell, or whose type one of ``op:NAME``.

    Raises:
        UsageError: If a pattern matches nothing.
    """
    found: dict[ir.Node, None] = {}
    for pattern in patterns:
        kind = pattern.removeprefix("op:")
        matching = [
            node
            for node in model.graph
            if fnmatchcase(node.op_type if kind != pattern else str(node.name), kind if kind != pattern else pattern)
        ]
        if not matching:
            raise UsageError(f"nothing is named '{pattern}'", "quantcli convert -v lists the layers' names")
        found.update(dict.fromkeys(matching))
    return tuple(explanation(node, plan) for node in found)


def explanation(node: ir.Node, plan: Plan) -> Explanation:
    """Explain one operator."""
    name, work = str(node.name), work_of(node)
    layers = {layer.name: layer.why for layer in plan.layers}
    floats = {layer.name: layer.reason for layer in plan.floats}
    absorbing = next((layer.name for layer in plan.layers if name in layer.absorbed), None)
    stored = {layer.name for layer in plan.layers if layer.arithmetic is Arithmetic.STORED}
    integer = name in layers.keys() - stored or absorbing is not None
    why = layers.get(name) or floats.get(name, "it works on shapes and indices, which are integers anyway")
    if absorbing is not None:
        why = f"it is the clamp of '{absorbing}'"
    tensors = tuple(
        (str(value.name), described(str(value.name), plan))
        for value in (*node.inputs, *node.outputs)
        if value is not None
    )
    return Explanation(name, node.op_type, integer, why, work.macs, work.read, work.made, work.stored, tensors)


def described(name: str, plan: Plan) -> str:
    """Return a tensor's parameters as text."""
    tensor = plan.tensors.get(name)
    if tensor is None:
        return "as it is"
    if tensor.blocks is not None:
        blocks = tensor.blocks
        return (
            f"{tensor.integer.name}, {blocks.scale.size} scales, each of {blocks.size} values along axis {blocks.axis}"
        )
    stored = tensor.integer.dtype
    form = stored.name if tensor.integer.bits == 8 * stored.itemsize else f"{tensor.integer.name} in {stored}"
    if len(tensor.scale) > 1:
        low, high = min(tensor.scale), max(tensor.scale)
        return f"{form}, {len(tensor.scale)} scales from {low:.3g} to {high:.3g}"
    return f"{form}, scale {tensor.scale[0]:.6g}, zero point {tensor.zero_point[0]}"
