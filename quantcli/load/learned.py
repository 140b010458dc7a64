"""What a prepared PyTorch model has learned, by the names of its graph."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

SCOPES = "pkg.torch.onnx.name_scopes"
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
SUMS = frozenset({"Add"})
# A grid of so many bits does for every reader.
WHOLE = 8


@dataclass(frozen=True)
class LearnedOperand:
    """What was learned of an activation.

    Attributes:
        range: Its lowest and highest real value.
        bits: The width of its grid.
    """

    range: tuple[float, float]
    bits: int


@dataclass(frozen=True, eq=False)
class LearnedLayer:
    """What was learned of a module.

    Attributes:
        name: The module's name.
        operands: What was learned of its inputs; None for one that passes through.
        scale: The weight's scales, one or one per output channel; None without a weight, or one that passes through.
        largest: The largest magnitude of each of the weight's output channels.
        bits: The width of the weight's grid.
        prepared: Whether it was prepared at all; a layer that was not stays float.
    """

    name: str
    operands: tuple[LearnedOperand | None, ...]
    scale: NDArray[np.float64] | None = None
    largest: NDArray[np.float64] | None = None
    bits: int | None = None
    prepared: bool = True


@dataclass(frozen=True, eq=False)
class LearnedWeight:
    """What was learned of a weight.

    Attributes:
        scale: Its scales, one or one per output channel, before anything was folded into it.
        largest: The largest magnitude of each output channel, likewise.
        bits: The width of its grid.
    """

    scale: NDArray[np.float64]
    largest: NDArray[np.float64]
    bits: int


@dataclass(frozen=True, eq=False)
class Learned:
    """What was learned, by the names of a graph.

    Attributes:
        ranges: The real ranges of activations.
        grids: The widths of their grids.
        weights: What was learned of weights, by the names of the nodes that read them.
        floats: The nodes that stay float.
        shared: Activations that others read as well: their range must hold everything that was seen, too.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    grids: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, LearnedWeight] = field(default_factory=dict)
    floats: tuple[str, ...] = ()
    shared: frozenset[str] = frozenset()


def learned_of(graph: ir.Graph, layers: Sequence[LearnedLayer]) -> Learned:
    """Return what modules have learned, by the names of the graph that they became.

    A tensor that several layers have learned ranges of gets the widest grid, and the range that holds all of theirs. One that is
    read elsewhere as well, on a wider grid, is clipped to the learned range for those layers first (the graph is changed): so that
    only they see the narrow grid.

    Raises:
        ModelError: If a module has no node there.
    """
    readers: dict[ir.Value, list[tuple[ir.Node, int, LearnedOperand]]] = {}
    weights, floats = {}, []
    for layer in layers:
        node = node_of(graph, layer)
        if node is None and not layer.prepared:
            continue
        if node is None:
            raise ModelError(
                f"the exporter left no trace of the prepared layer '{layer.name}'", "exclude it from prepare"
            )
        whole = layer.prepared and all(operand is not None for operand in layer.operands)
        if not whole or (layer.operands and len(layer.operands) == 1 and layer.scale is None):
            floats.append(str(node.name))
            continue
        for position, (value, operand) in enumerate(zip(node.inputs, layer.operands, strict=False)):
            if value is not None and operand is not None:
                readers.setdefault(value, []).append((node, position, operand))
        if layer.scale is not None and layer.largest is not None and layer.bits is not None:
            weights[str(node.name)] = LearnedWeight(layer.scale, layer.largest, layer.bits)
    ranges: dict[str, tuple[float, float]] = {}
    grids: dict[str, int] = {}
    shared = []
    for value, taught in readers.items():
        bounds = [operand.range for _, _, operand in taught]
        span, bits = (min(lo for lo, _ in bounds), max(hi for _, hi in bounds)), max(one.bits for _, _, one in taught)
        others = len(value.uses()) > len(taught) or value.is_graph_output()
        name = clipped(graph, value, taught, span) if others and bits < WHOLE else str(value.name)
        if others and bits >= WHOLE:
            shared.append(name)
        ranges[name], grids[name] = span, bits
    return Learned(ranges, grids, weights, tuple(floats), frozenset(shared))


def clipped(
    graph: ir.Graph, value: ir.Value, readers: Sequence[tuple[ir.Node, int, LearnedOperand]], span: tuple[float, float]
) -> str:
    """Clip a tensor for some of its readers, and return the name of what they read then."""
    import numpy as np
    import onnx_ir as ir

    from quantcli.fold import add_constant

    name = f"{value.name}_clipped"
    ends = [
        add_constant(graph, f"{name}_{end}", np.array(bound, dtype=np.float32))
        for end, bound in zip(("lowest", "highest"), span, strict=True)
    ]
    node = ir.node("Clip", [value, *ends], name=name)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, value.type
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    for reader, position, _ in readers:
        reader.replace_input_with(position, node.outputs[0])
    return name


def node_of(graph: ir.Graph, layer: LearnedLayer) -> ir.Node | None:
    """Return the node that a module became: the one that reads its weight, else the one whose scope it is."""
    weight = graph.initializers.get(f"{layer.name}.weight")
    readers = list(weight.consumers()) if weight is not None else []
    if readers and readers[0].op_type in PRODUCTS:
        return readers[0]
    kinds = SUMS if len(layer.operands) == 2 else PRODUCTS
    return next((node for node in graph if node.op_type in kinds and layer.name in scopes(node)), None)


def scopes(node: ir.Node) -> list[Any]:
    """Return the names of the modules that a node stands in, as the exporter notes them."""
    text = node.metadata_props.get(SCOPES)
    try:
        return list(ast.literal_eval(text)) if text else []
    except (ValueError, SyntaxError):
        return []
