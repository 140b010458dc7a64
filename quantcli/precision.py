"""Half precision becomes float32: float16 models keep the types of their inputs and outputs, bfloat16 ones do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
BRAIN = frozenset({ir.DataType.BFLOAT16})
SINGLE = ir.DataType.FLOAT
# Attributes that name the type of an output.
TYPES = ("to", "dtype", "stash_type")


def in_float32(model: ir.Model) -> None:
    """Rewrite a model so that nothing but its inputs and outputs is of half precision, with a Cast at each such edge.

    Casts to half precision become casts to float32, so what they rounded away is kept: the model computes more exactly than before.
    """
    if not any(value.dtype in HALF for value in every_value(model)):
        return
    edges = [value for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype in HALF]
    types = {value: value.dtype for value in edges}
    widen(model, HALF)
    for value in list(model.graph.inputs):
        if value in types:
            cast_input(model.graph, value, types[value])
    for position, value in enumerate(list(model.graph.outputs)):
        if value in types and not value.is_graph_input():
            cast_output(model.graph, position, value, types[value])


def without_bfloat16(model: ir.Model) -> ir.Model | None:
    """Return a copy of a model that is float32 wherever it is bfloat16, its inputs and outputs as well; None where it is nowhere.

    ONNX Runtime has hardly any kernels for bfloat16 on the CPU, and numpy has no such type.
    """
    functions = [node for function in model.functions.values() for node in function.all_nodes()]
    named = any(speaks_of(node, BRAIN) for node in (*model.graph.all_nodes(), *functions))
    if not named and not any(value.dtype in BRAIN for value in every_value(model)):
        return None
    copy = model.clone()
    passes.InlinePass()(copy)
    widen(copy, BRAIN)
    return copy


def speaks_of(node: ir.Node, kinds: Collection[ir.DataType]) -> bool:
    """Tell whether an operator's attributes name one of some types, or hold a tensor of one."""
    numbers = [node.attributes[name] for name in TYPES if name in node.attributes]
    held = node.attributes.get("value")
    return any(found.type == ir.AttributeType.INT and found.value in kinds for found in numbers) or (
        held is not None and held.type == ir.AttributeType.TENSOR and held.value.dtype in kinds
    )


def widen(model: ir.Model, kinds: Collection[ir.DataType]) -> None:
    """Make everything in a model float32 that is of some narrower types."""
    for value in every_value(model):
        if value.dtype in kinds:
            value.type = ir.TensorType(SINGLE)
        held = value.const_value
        if held is not None and held.dtype in kinds:
            value.const_value = ir.tensor(np.asarray(held.numpy(), dtype=np.float32), name=held.name)
    for node in model.graph.all_nodes():
        for name in TYPES:
            found = node.attributes.get(name)
            if found is not None and found.type == ir.AttributeType.INT and found.value in kinds:
                node.attributes[name] = ir.AttrInt64(name, SINGLE.value)
        found = node.attributes.get("value")
        if found is not None and found.type == ir.AttributeType.TENSOR and found.value.dtype in kinds:
            tensor = ir.tensor(np.asarray(found.value.numpy(), dtype=np.float32), name=found.value.name)
            node.attributes["value"] = ir.AttrTensor("value", tensor)


def every_value(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value of a model, those of the bodies within it too."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def cast_input(graph: ir.Graph, value: ir.Value, kind: ir.DataType | None) -> None:
    """Give an input its type back, and its readers a float32 copy."""
    node = ir.node("Cast", [value], {"to": SINGLE.value}, name=f"{value.name}_to_float32")
    made = node.outputs[0]
    made.name, made.shape, made.type = f"{value.name}_float32", value.shape, ir.TensorType(SINGLE)
    ir.convenience.replace_all_uses_with(value, made)
    node.replace_input_with(0, value)
    value.type = ir.TensorType(kind) if kind is not None else None
    if len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)


def cast_output(graph: ir.Graph, position: int, value: ir.Value, kind: ir.DataType | None) -> None:
    """Give an output its type back, behind a Cast."""
    node = ir.node(
        "Cast", [value], {"to": kind.value if kind is not None else SINGLE.value}, name=f"{value.name}_from_float32"
    )
    made = node.outputs[0]
    made.name, value.name = value.name, f"{value.name}_float32"
    made.shape, made.type = value.shape, ir.TensorType(kind) if kind is not None else None
    graph.append(node)
    graph.outputs[position] = made
