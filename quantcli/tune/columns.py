"""Where factors of a tensor's columns can come from: the constants that what makes the tensor multiplies or adds.

The columns of a product X·W are scaled by scaling those of W, those of what a Mul makes by its constant operand, and so on
backwards through what passes factors on: one operand of a Mul, both of an Add, and Relu. So gated units (Shazeer 2020,
arXiv 2002.05202) and normalisations that exporters wrote out are smoothed without an operator more (as in OmniQuant, Shao et al.
2023, arXiv 2308.13137, section 3.3). What an attention gives could be, too, by its values; a ViT gained nothing by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.fold import constant

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    # A node, the place of one of its constants, and what that is multiplied by.
    Taken = tuple[ir.Node, int, NDArray[np.float32]]


def taken(value: ir.Value | None, factor: NDArray[np.float32], kept: Collection[ir.Node], uses: int = 1) -> list[Taken]:
    """Return the constants that make a tensor what it is times a factor, and what each is multiplied by; none where none do.

    Args:
        value: The tensor.
        factor: A factor above zero for each of its columns.
        kept: The nodes that take no factor.
        uses: How often the tensor is read by those that are told of the factor; nobody else may read it.
    """
    node = value.producer() if value is not None else None
    if value is None or node is None or node in kept or node.domain or len(node.outputs) != 1:
        return []
    read = sum(user.op_type != "Shape" for user, _ in value.uses())
    if read != uses or value.is_graph_output() or not fits(value, factor):
        return []
    if node.op_type in {"Mul", "Add"}:
        return taken_by_operands(node, factor, kept)
    if node.op_type in {"MatMul", "Gemm"}:
        return taken_by_product(node, factor)
    return taken(node.inputs[0], factor, kept) if node.op_type in {"Relu", "Reshape"} else []


def fits(value: ir.Value, factor: NDArray[np.float32]) -> bool:
    """Tell whether a tensor has a column for every factor."""
    return value.shape is not None and len(value.shape) > 0 and value.shape[-1] == factor.size


def taken_by_product(node: ir.Node, factor: NDArray[np.float32]) -> list[Taken]:
    """Return what takes the factor of a product by a constant matrix, whose columns and bias do."""
    held = [constant(value) for value in node.inputs[1:]]
    if held[0] is None or held[0].ndim != 2 or any(array is None or array.shape != factor.shape for array in held[1:]):
        return []
    turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    return [(node, 1, factor[:, None] if turned else factor), *((node, 2, factor) for _ in held[1:])]


def taken_by_operands(node: ir.Node, factor: NDArray[np.float32], kept: Collection[ir.Node]) -> list[Taken]:
    """Return what takes the factor of a Mul, one of whose operands does, or of an Add, whose operands both do."""
    parts: list[list[Taken]] = []
    for place, operand in enumerate(node.inputs):
        held = constant(operand)
        parts.append([(node, place, factor)] if held is not None else taken(operand, factor, kept))
        if node.op_type == "Mul" and held is not None:
            return parts[-1]
    if node.op_type == "Mul":
        return next((part for part in parts if part), [])
    return [one for part in parts for one in part] if all(parts) else []
