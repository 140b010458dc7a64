"""Dense layers of three and more axes, written as products of matrices.

A transformer's x·W + b of x[N, T, C] is MatMul and Add, which round twice on a target of integers. Gemm takes the bias into its
accumulator, and two axes alone: Reshape puts the others together before it, and apart again behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_all_uses_with

from quantcli.fold import add_constant, constant
from quantcli.load.learned import LEARNED
from quantcli.transposes import POINTWISE

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What ends the name of a tensor as a matrix, all axes but the last put together, and of the Reshape that takes them apart again.
ROWS, APART = "_rows", "_apart"
# The axes of a matrix.
MATRIX = 2


@dataclass(frozen=True, eq=False)
class Dense:
    """A product and what is added to it.

    Attributes:
        product: The MatMul.
        addition: The Add.
        bias: What it adds, (K,).
    """

    product: ir.Node
    addition: ir.Node
    bias: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor whose axes but the last are put together.

    Attributes:
        matrix: It as a matrix.
        axes: The lengths of the axes that were put together; None where they are not needed, since the shape is known.
    """

    matrix: ir.Value
    axes: ir.Value | None


def as_matrices(model: ir.Model) -> None:
    """Make a Gemm between two Reshapes of every dense layer of three and more axes in a model's main graph.

    What works on single values behind it comes before the second Reshape, which goes where other such layers are all that read it.
    A model that was prepared and trained stays as it was trained.
    """
    if any(LEARNED in node.meta for node in model.graph):
        return
    known: dict[ir.Value, Rows] = {}
    for node in list(model.graph):
        layer = dense_layer(node)
        if layer is not None:
            rewrite(layer, model.graph, known)
    for value, rows in known.items():
        apart = value.producer()
        if apart is not None and apart.inputs[0] is rows.matrix and not value.uses() and not value.is_graph_output():
            model.graph.remove(apart, safe=True)
            rows.matrix.name = value.name  # the tensor has no other form any more


def dense_layer(node: ir.Node) -> Dense | None:
    """Return the dense layer that begins with a node; None where none does, or it reads a matrix."""
    if node.op_type != "MatMul" or node.domain:
        return None
    x, weight, made = node.inputs[0], constant(node.inputs[1]), node.outputs[0]
    addition = follower(made)
    if x is None or x.shape is None or len(x.shape) <= MATRIX or constant(x) is not None or 0 in x.shape:
        return None
    if weight is None or weight.ndim != MATRIX or weight.dtype != np.float32 or not weight.size:
        return None
    if addition is None or addition.op_type != "Add" or addition.domain:
        return None
    columns = weight.shape[1]
    held = next((array for value in addition.inputs if (array := constant(value)) is not None), None)
    if (
        held is None
        or held.ndim > len(x.shape)
        or held.size not in {1, columns}
        or held.shape[-1:] not in {(), (1,), (columns,)}
    ):
        return None
    if held.size > 1 and held.shape[-1] == 1:  # along another axis
        return None
    return Dense(node, addition, np.array(np.broadcast_to(held.reshape(-1), (columns,))))


def follower(value: ir.Value) -> ir.Node | None:
    """Return the only node that reads a value, once; None where there are others, or the model gives it out."""
    uses = value.uses()
    return next(iter(uses))[0] if len(uses) == 1 and not value.is_graph_output() else None


def rewrite(layer: Dense, graph: ir.Graph, known: dict[ir.Value, Rows]) -> None:
    """Put Gemm, what works on single values, and Reshape in the place of a dense layer.

    Args:
        layer: The layer.
        graph: The graph.
        known: The tensors that there are as matrices, to which those that it reads and makes are added.
    """
    (x, weight), columns = layer.product.inputs, layer.bias.size
    assert x is not None  # noqa: S101 - `dense_layer` has looked
    rows, made = rows_of(x, layer.product, graph, known), layer.addition.outputs[0]
    bias = add_constant(graph, f"{made.name}_bias", layer.bias)
    gemm = ir.node("Gemm", [rows.matrix, weight, bias], name=layer.product.name)
    end = gemm.outputs[0]
    end.name, end.type = made.name, made.type
    graph.insert_before(layer.addition, gemm)
    replace_all_uses_with(made, end, replace_graph_outputs=True)
    graph.remove([layer.addition, layer.product], safe=True)
    flat, last = ir.Shape([None, columns]), gemm
    full = ir.Shape([*x.shape[:-1], columns])  # type: ignore[index]
    end.shape = flat
    while (after := follower(end)) is not None and after.op_type in POINTWISE and not after.domain:
        end, last = after.outputs[0], after
        end.shape = flat
    apart = ir.node("Reshape", [end, shape_behind(x, rows, columns, last, graph)], name=f"{end.name}{APART}")
    graph.insert_after(last, apart)
    whole = apart.outputs[0]
    replace_all_uses_with(end, whole, replace_graph_outputs=True)
    apart.replace_input_with(0, end)
    whole.name, whole.type, whole.shape, end.name = end.name, end.type, full, f"{end.name}{ROWS}"
    known[whole] = Rows(end, rows.axes)


def rows_of(x: ir.Value, reader: ir.Node, graph: ir.Graph, known: dict[ir.Value, Rows]) -> Rows:
    """Return a tensor as a matrix, made before its first reader."""
    if x not in known:
        assert x.shape is not None  # noqa: S101 - `dense_layer` has looked
        columns = reader.inputs[1].shape[0]  # type: ignore[union-attr, index]
        shape = add_constant(graph, f"{x.name}{ROWS}_shape", np.array([-1, columns], dtype=np.int64))
        together = ir.node("Reshape", [x, shape], name=f"{x.name}{ROWS}")
        matrix = together.outputs[0]
        matrix.name, matrix.type, matrix.shape = f"{x.name}{ROWS}", x.type, ir.Shape([None, columns])
        graph.insert_before(reader, together)
        open_axes = sum(not isinstance(axis, int) for axis in x.shape[:-1])
        known[x] = Rows(matrix, axes_before(x, reader, graph) if open_axes > 1 else None)
    return known[x]


def axes_before(x: ir.Value, reader: ir.Node, graph: ir.Graph) -> ir.Value:
    """Return the lengths of all axes of a tensor but the last, computed while the model runs."""
    begin, end = (
        add_constant(graph, f"{x.name}_{at}", np.array([n], dtype=np.int64)) for at, n in (("begin", 0), ("end", -1))
    )
    shape = ir.node("Shape", [x], name=f"{x.name}_shape")
    cut = ir.node("Slice", [shape.outputs[0], begin, end], name=f"{x.name}_axes")
    for node in (shape, cut):
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.INT64)
    graph.insert_before(reader, [shape, cut])
    return cut.outputs[0]


def shape_behind(x: ir.Value, rows: Rows, columns: int, after: ir.Node, graph: ir.Graph) -> ir.Value:
    """Return the shape of a layer's output: a constant where at most one axis of its input is unknown, else joined from those."""
    made = after.outputs[0]
    if rows.axes is None:
        assert x.shape is not None  # noqa: S101 - `dense_layer` has looked
        sizes = [axis if isinstance(axis, int) else -1 for axis in x.shape[:-1]]
        return add_constant(graph, f"{made.name}_shape", np.array([*sizes, columns], dtype=np.int64))
    last = add_constant(graph, f"{made.name}_columns", np.array([columns], dtype=np.int64))
    joined = ir.node("Concat", [rows.axes, last], {"axis": 0}, name=f"{made.name}_shape")
    joined.outputs[0].name, joined.outputs[0].type = joined.name, ir.TensorType(ir.DataType.INT64)
    graph.insert_after(after, joined)
    return joined.outputs[0]
