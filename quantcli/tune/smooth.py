"""SmoothQuant: move what is hard to quantize from activations into weights (Xiao et al. 2022, arXiv 2211.10438, equation 4).

A product X·W keeps its value when column j of X is divided by s_j and row j of W multiplied by it. With
s_j = max|X_j|^α / max|W_j|^(1−α) the columns of X come to resemble each other, so that one scale serves all of them. What a
normalisation makes is the usual case: a few of its columns are ten and more times larger than the others. So is what a gated
unit multiplies, where the constants behind it take the factors over (`quantcli.tune.columns`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from calibration.observers import TensorStatistics
from quantcli.fold import add_constant, constant
from quantcli.masks import unresolvable
from quantcli.placement import WHY, place
from quantcli.recipe import resolve_target
from quantcli.rules import Arithmetic
from quantcli.tune.columns import taken

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from calibration.statistics import Statistics
    from quantcli.placement import Placement
    from quantcli.recipe import Recipe
    from quantcli.tune.columns import Taken

# Operators whose output's columns are independent of each other but for a factor and an addend of their own.
NORMALISATIONS = frozenset({"LayerNormalization", "RMSNormalization"})
SUFFIX = "_smoothed"
# Rows of weights smaller than this part of the largest one count as this large: what they multiply hardly matters.
SMALLEST = 1e-5
# What the largest column's extreme has to be of the median one's, where evening has a price: a Mul that applies the factors, or few
# rows, so that another sample may need the room that the largest column had left above all others. Less than a bit is to be gained.
WORTH_EVENING, FEW_ROWS = 2.0, 1024


@dataclass(frozen=True)
class Smoothed:
    """A tensor that was smoothed.

    Attributes:
        name: The tensor.
        layers: The layers that read it.
        folded: Whether its normalisation took the factors over; otherwise a Mul applies them.
        spread: The largest column's extreme over the median one's, before.
        left: The same, after.
    """

    name: str
    layers: tuple[str, ...]
    folded: bool
    spread: float
    left: float


def wanted(recipe: Recipe) -> bool:
    """Tell whether a recipe asks for smoothing: by default where integer layers read what float operators make."""
    asked = recipe.tune.smooth
    return resolve_target(recipe).placement.pays if asked is None else asked


def candidates(placement: Placement, per_channel: bool) -> dict[ir.Value, list[ir.Node]]:
    """Return the tensors whose columns can be evened, with the layers that multiply them by constant matrices, and nobody else.

    They are the outputs of normalisations, and of what takes the factors over, which scales columns of weights.

    Args:
        placement: Which operators are integer layers.
        per_channel: Whether each column of a weight has a scale of its own, so that scaling it costs nothing.
    """
    found: dict[ir.Value, list[ir.Node]] = {}
    other: set[ir.Value] = set()
    for layer in placement.layers:
        node = layer.node
        for position, value, _ in layer.operands():
            plain = layer.rule.arithmetic is Arithmetic.ACCUMULATE and node.op_type in {"MatMul", "Gemm"}
            weight = constant(node.inputs[1]) if plain and position == 0 else None
            if weight is not None and weight.ndim == 2 and not node.attributes.get_int("transA", 0):
                found.setdefault(value, []).append(node)
            else:
                other.add(value)
    kept = keeping_grids(placement)
    return {
        value: nodes
        for value, nodes in found.items()
        if value not in other
        and (is_normalised(value) or (per_channel and takers(value, nodes, ones_for(nodes[0]), kept)))
    }


def is_normalised(value: ir.Value) -> bool:
    """Tell whether a normalisation with columns of its own makes a tensor."""
    producer = source_of(value).producer()
    return producer is not None and producer.op_type in NORMALISATIONS and normalises_columns(producer)


def source_of(value: ir.Value) -> ir.Value:
    """Return the tensor whose columns a tensor has: what a Reshape makes it of, if the last axis stays; else itself."""
    producer = value.producer()
    x = producer.inputs[0] if producer is not None and producer.op_type == "Reshape" and not producer.domain else None
    if x is None or not x.shape or not value.shape:
        return value
    return x if isinstance(x.shape[-1], int) and x.shape[-1] == value.shape[-1] else value


def read_by(value: ir.Value, readers: Collection[ir.Node]) -> bool:
    """Tell whether nobody else reads a tensor's values; what asks for its shape alone may."""
    found = {user for user in value.consumers() if user.op_type != "Shape"}
    return found == set(readers) and not value.is_graph_output()


def keeping_grids(placement: Placement) -> frozenset[ir.Node]:
    """Return the integer layers but those that multiply by a constant and give reals: factors would change grids of theirs.

    Of layers that give integers to each other, equalization evens the channels.
    """
    return frozenset(
        layer.node
        for layer in placement.layers
        if not layer.real
        or layer.rule.arithmetic is not Arithmetic.ACCUMULATE
        or constant(layer.node.inputs[1]) is None
    )


def ones_for(node: ir.Node) -> NDArray[np.float32]:
    """Return a factor of 1 for every column that a layer reads."""
    return np.ones(np.asarray(constant(node.inputs[1])).shape[1 if is_transposed(node) else 0], np.float32)


def takers(
    value: ir.Value, readers: list[ir.Node], factor: NDArray[np.float32], kept: frozenset[ir.Node]
) -> list[Taken]:
    """Return what takes factors of columns over, where no one else reads the tensor; nothing of a normalisation's own."""
    return [] if is_normalised(value) else taken(value, factor, kept, len(readers))


def normalises_columns(node: ir.Node) -> bool:
    """Tell whether a normalisation works along the last axis, with constant factors."""
    value = node.inputs[0]
    rank = len(value.shape) if value is not None and value.shape is not None else 0
    last = node.attributes.get_int("axis", -1) in {-1, rank - 1}
    return last and all(constant(value) is not None for value in node.inputs[1:] if value is not None)


def columns_needed(model: ir.Model, recipe: Recipe) -> frozenset[str]:
    """Return the tensors of which smoothing wants to know the extremes of every column."""
    if not wanted(recipe):
        return frozenset()
    per_channel = resolve_target(recipe).weight.per_channel
    return frozenset(str(value.name) for value in candidates(place(model, recipe), per_channel))


def smooth(
    model: ir.Model, statistics: Statistics, recipe: Recipe
) -> tuple[ir.Model, Statistics, tuple[Smoothed, ...]]:
    """Return a smoothed copy of a folded model, and the statistics of its tensors.

    Where the recipe does not ask for it, and it has a price, only tensors whose columns differ much are smoothed.

    Args:
        model: The folded model; it is not changed.
        statistics: What calibration saw of it; tensors without extremes by column are left as they are.
        recipe: What the user wants.
    """
    if not wanted(recipe):
        return model, statistics, ()
    changed = model.clone()
    tensors = dict(statistics.tensors)
    done = []
    placement = place(changed, recipe, unresolvable(changed, statistics.tensors, recipe))
    kept = keeping_grids(placement)
    for value, readers in candidates(placement, resolve_target(recipe).weight.per_channel).items():
        seen = tensors.get(str(value.name))
        if seen is None or seen.columns is None:
            continue
        largest = np.maximum(-seen.columns.minimum, seen.columns.maximum).astype(np.float64)
        scales = factors(largest, [rows_of(node) for node in readers], recipe.tune.smooth_alpha)
        if scales is None:
            continue
        over = taking_over(value, readers, np.float32(1) / scales, kept)
        has_price = not over or seen.elements < FEW_ROWS * len(largest)
        if recipe.tune.smooth is None and has_price and spread(largest) < WORTH_EVENING:
            continue
        names, before = tuple(str(node.name) for node in readers), str(value.name)
        name, folded = apply(changed.graph, value, readers, scales, over), bool(over)
        tensors[name] = divided(seen, scales)
        done.append(Smoothed(before, names, folded, spread(largest), spread(largest / scales)))
    return changed, replace(statistics, tensors=tensors), tuple(done)


def rows_of(node: ir.Node) -> NDArray[np.float64]:
    """Return a weight with the rows that meet the columns of the activation first."""
    weight = np.asarray(constant(node.inputs[1]), dtype=np.float64)
    return weight.T if is_transposed(node) else weight


def is_transposed(node: ir.Node) -> bool:
    """Tell whether a weight holds a row per output: Gemm with transB."""
    return node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))


def factors(
    largest: NDArray[np.float64], weights: list[NDArray[np.float64]], alpha: float
) -> NDArray[np.float32] | None:
    """Return s_j of equation 4, of geometric mean 1; None where the weights do not fit the columns, or are zero."""
    if any(len(weight) != len(largest) for weight in weights):
        return None
    rows = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    if not rows.any() or not largest.any():
        return None
    rows = np.maximum(rows, rows.max() * SMALLEST)
    columns = np.maximum(largest, largest.max() * SMALLEST)
    logarithms = alpha * np.log(columns) - (1 - alpha) * np.log(rows)
    found: NDArray[np.float32] = np.exp(logarithms - logarithms.mean()).astype(np.float32)
    return found


def spread(largest: NDArray[np.floating]) -> float:
    """Return by how much the largest column exceeds the median one."""
    return float(largest.max() / max(float(np.median(largest)), float(np.finfo(np.float32).tiny)))


def divided(seen: TensorStatistics, scales: NDArray[np.float32]) -> TensorStatistics:
    """Return the statistics of a tensor whose columns were multiplied by float32(1/s): products keep the order of values."""
    assert seen.columns is not None  # noqa: S101 - the caller has looked
    inverse = np.float32(1) / scales
    lowest, highest = (seen.columns.minimum * inverse).min(), (seen.columns.maximum * inverse).max()
    return TensorStatistics(float(lowest), float(highest), seen.elements, seen.nan, seen.infinite, derived=True)


def taking_over(
    value: ir.Value, readers: list[ir.Node], inverse: NDArray[np.float32], kept: frozenset[ir.Node]
) -> list[Taken]:
    """Return what takes factors of columns over: a normalisation's own constants, or those behind what makes the tensor.

    Args:
        value: The tensor.
        readers: The layers that read it.
        inverse: What its columns are multiplied by.
        kept: The nodes that take no factor.
    """
    if not is_normalised(value):
        return takers(value, readers, inverse, kept)
    source = source_of(value)
    producer, last = source.producer(), value.producer()
    assert producer is not None and last is not None  # noqa: S101, PT018 - a normalisation made it
    alone = read_by(value, readers) and (source is value or read_by(source, [last])) and len(producer.outputs) == 1
    own = [position for position, held in enumerate(producer.inputs) if position and held is not None]
    return [(producer, position, inverse) for position in own] if alone else []


def apply(
    graph: ir.Graph, value: ir.Value, readers: list[ir.Node], scales: NDArray[np.float32], over: list[Taken]
) -> str:
    """Divide the columns of a value by factors for its integer readers, and multiply their weights' rows by them.

    Args:
        graph: The graph.
        value: The tensor.
        readers: The layers that read it.
        scales: The factors.
        over: What takes them over; where nothing does, a Mul applies them.

    Returns:
        The new tensor's name.
    """
    inverse = np.float32(1) / scales
    for node in readers:
        weight = node.inputs[1]
        assert weight is not None  # noqa: S101 - it is a constant
        values = np.asarray(constant(weight), dtype=np.float32)
        scaled = values * (scales if is_transposed(node) else scales[:, None])
        node.replace_input_with(1, add_constant(graph, f"{weight.name}{SUFFIX}", scaled))
    name, last = free_name(graph, f"{value.name}{SUFFIX}"), value.producer()
    assert last is not None  # noqa: S101 - something made it
    for node, position, factor in over:
        old = node.inputs[position]
        assert old is not None  # noqa: S101 - it is a constant
        array = np.asarray(constant(old), dtype=np.float32) * factor
        node.replace_input_with(position, add_constant(graph, f"{old.name}{SUFFIX}", array))
        made = node.outputs[0]
        if made is not value:  # another tensor than the float model's of this name
            made.name = free_name(graph, f"{made.name}{SUFFIX}")
    if over:
        value.name = name
        return name
    node = ir.node("Mul", [value, add_constant(graph, f"{value.name}_smoothing", inverse)], name=name)
    node.meta[WHY] = "it evens the columns before they are quantized"
    made = node.outputs[0]
    made.name, made.shape, made.type = name, copy.copy(value.shape), value.type
    graph.insert_after(last, node)
    for reader in readers:
        reader.replace_input_with(0, made)
    return name


def free_name(graph: ir.Graph, name: str) -> str:
    """Return a name that no tensor has, with underscores behind it where it is taken."""
    taken = {value.name for node in graph.all_nodes() for value in node.outputs}
    taken |= {*graph.initializers, *(value.name for value in graph.inputs)}
    while name in taken:
        name += "_"
    return name
