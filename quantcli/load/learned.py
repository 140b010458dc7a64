"""What a prepared PyTorch model has learned, by the names of its graph."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError, PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

# Marks a node whose weight was learned: it becomes an integer layer, as it was trained.
LEARNED = "quantcli.learned"
SCOPES = "pkg.torch.onnx.name_scopes"
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
SUMS = frozenset({"Add"})
# A grid of so many bits does for every reader of a tensor.
WHOLE = 8
# Operators whose output, clipped, is what they make of their clipped input.
COMMUTING = frozenset({"MaxPool", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"})


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
        spare: Whether it may have no node: it may do other things than what is quantized.
    """

    name: str
    operands: tuple[LearnedOperand | None, ...]
    scale: NDArray[np.float64] | None = None
    largest: NDArray[np.float64] | None = None
    bits: int | None = None
    prepared: bool = True
    spare: bool = False


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

    A tensor that several layers have learned ranges of gets the widest grid, and the range that holds all of theirs. The graph is
    changed where a quantizer's clamp can stand higher up.

    Raises:
        ModelError: If a module has no node there.
        PlanError: If every module passes its input or its weight through.
    """
    readers: dict[ir.Value, list[LearnedOperand]] = {}
    weights, floats = {}, []
    standing = nodes_by_scope(graph)
    owners = {node: layer.name for layer in layers for node in standing.get(layer.name, ())}
    for layer in layers:
        nodes = nodes_of(graph, layer, standing, owners)
        if not nodes and layer.prepared and not layer.spare:
            raise ModelError(
                f"the exporter left no trace of the prepared layer '{layer.name}'", "exclude it from prepare"
            )
        whole = layer.prepared and all(operand is not None for operand in layer.operands)
        if not whole or (layer.operands and len(layer.operands) == 1 and layer.scale is None):
            floats += [str(node.name) for node in nodes]
            continue
        for node in nodes:
            for value, operand in zip(node.inputs, layer.operands, strict=False):
                if value is not None and operand is not None:
                    readers.setdefault(value, []).append(operand)
            if layer.scale is not None and layer.largest is not None and layer.bits is not None:
                weights[str(node.name)] = LearnedWeight(layer.scale, layer.largest, layer.bits)
                node.meta[LEARNED] = True
    if not readers:
        raise PlanError(
            "no prepared layer rounds both its input and its weight, and a layer that does not stays float",
            "prepare with weight_bits and activation_bits of 2 to 16: 32 passes through",
        )
    ranges: dict[str, tuple[float, float]] = {}
    grids: dict[str, int] = {}
    shared = []
    for value, taught in readers.items():
        name, bounds = str(value.name), [operand.range for operand in taught]
        ranges[name] = min(lo for lo, _ in bounds), max(hi for _, hi in bounds)
        grids[name] = max(operand.bits for operand in taught)
        clip = value.producer()
        if clip is not None and clip.op_type == "Clip":
            hoisted(graph, clip)
            ranges[str(clip.outputs[0].name)], grids[str(clip.outputs[0].name)] = ranges[name], grids[name]
        elif len(value.uses()) > len(taught) or value.is_graph_output():
            shared.append(name)
    return Learned(ranges, grids, weights, tuple(floats), frozenset(shared))


def hoisted(graph: ir.Graph, clip: ir.Node) -> None:
    """Move a Clip up, past operators that commute with it, to where a layer can take it over as its clamp.

    The largest of clipped values is the clipped largest, and what only moves values moves clipped ones.
    """
    value = clip.inputs[0]
    producer = value.producer() if value is not None else None
    while producer is not None and value is not None:
        alone = len(value.uses()) == 1 and not value.is_graph_output()
        if producer.op_type not in COMMUTING or not alone or clip.outputs[0].is_graph_output():
            return
        below, source = clip.outputs[0], producer.inputs[0]
        assert source is not None  # noqa: S101 - what moves values has an operand
        for reader, position in list(below.uses()):
            reader.replace_input_with(position, value)
        clip.replace_input_with(0, source)
        producer.replace_input_with(0, below)
        below.shape, below.type = source.shape, source.type
        graph.remove(clip)
        graph.insert_before(producer, clip)
        value, producer = source, source.producer()


def nodes_of(
    graph: ir.Graph, layer: LearnedLayer, standing: Mapping[str, list[ir.Node]], owners: Mapping[ir.Node, str]
) -> list[ir.Node]:
    """Return the nodes that a module became, one for each of its calls: those that read its weight, or whose scope it is.

    The exporter puts weights together that are equal: who reads one may be another module, whose scope tells it.
    """
    kinds = SUMS if len(layer.operands) == 2 else PRODUCTS
    weight = graph.initializers.get(f"{layer.name}.weight")
    found = [*(weight.consumers() if weight is not None else ()), *standing.get(layer.name, ())]
    return [
        node for node in dict.fromkeys(found) if node.op_type in kinds and owners.get(node, layer.name) == layer.name
    ]


def nodes_by_scope(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """Return the products and sums that stand in each module."""
    found: dict[str, list[ir.Node]] = {}
    for node in graph:
        if node.op_type in PRODUCTS | SUMS:
            for name in scopes(node):
                found.setdefault(name, []).append(node)
    return found


def scopes(node: ir.Node) -> list[Any]:
    """Return the names of the modules that a node stands in, as the exporter notes them."""
    text = node.metadata_props.get(SCOPES)
    try:
        return list(ast.literal_eval(text))[:-1] if text else []  # the last name is the node's own
    except (ValueError, SyntaxError):
        return []
