"""What an operator costs: multiply-accumulates and values moved, from the shapes that are known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.datasets import samples_in
from quantcli.fold import constant

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

# How long a sequence is taken to be whose length is not known.
USUAL_LENGTH = 128
# The axes of a tensor of rows.
ROWS = 2


@dataclass(frozen=True)
class Work:
    """What one run of an operator does. Free dimensions, as that of the batch, count as 1; None where nothing is known.

    Attributes:
        macs: Multiply-accumulates; 0 for operators that do not accumulate.
        read: Values read that are computed while the model runs.
        made: Values made.
        stored: Constant values read.
    """

    macs: int | None
    read: int | None
    made: int | None
    stored: int

    @property
    def macs_per_value(self) -> float | None:
        """Multiply-accumulates per value that comes or goes; None where that is not known."""
        if self.macs is None or self.read is None or self.made is None:
            return None
        return self.macs / max(self.read + self.made, 1)


def values_of(value: ir.Value | None) -> int | None:
    """Return how many values a tensor has, free dimensions counted as 1; None where not even its rank is known.

    A free axis of rows counts as what it was put together from: a sample's rows are many, where a dense layer of three axes is a
    Gemm between Reshapes.
    """
    if value is None or value.shape is None:
        return None
    known = math.prod(size for size in value.shape if isinstance(size, int))
    return known * rows_of(value) if len(value.shape) == ROWS and not isinstance(value.shape[0], int) else known


def rows_of(value: ir.Value) -> int:
    """Return how long the free first axis of a tensor of two is per sample: 1, unless a Reshape put several axes together in it."""
    while (producer := value.producer()) is not None and producer.inputs:
        before = producer.inputs[0]
        if before is None or before.shape is None or value.shape is None:
            break
        if producer.op_type == "Reshape" and len(before.shape) > ROWS and before.shape[-1] == value.shape[-1]:
            return math.prod(size for size in before.shape[:-1] if isinstance(size, int))
        if len(before.shape) != ROWS or before.shape[0] != value.shape[0]:
            break
        value = before
    return 1


def work_of(node: ir.Node) -> Work:
    """Return what one run of an operator does."""
    given = [value for value in node.inputs if value is not None]
    read = total(values_of(value) for value in given if constant(value) is None)
    made = total(values_of(value) for value in node.outputs)
    stored = sum(values_of(value) or 0 for value in given if constant(value) is not None)
    return Work(multiply_accumulates(node), read, made, stored)


def per_value(node: ir.Node) -> float | None:
    """Return an operator's multiply-accumulates per value that comes or goes; None where that is not known.

    A product of matrices, M x K and K x N, has 1 / (1/M + 1/K + 1/N). Lengths that are not known, which are those of sequences,
    count as USUAL_LENGTH there: as 1 they would tell nothing.
    """
    if node.op_type != "MatMul":
        return work_of(node).macs_per_value
    shapes = [value.shape for value in node.inputs if value is not None and value.shape is not None]
    if len(shapes) < 2 or min(map(len, shapes)) < 2:
        return work_of(node).macs_per_value
    (rows, depth), (same, columns) = ([shape[-2], shape[-1]] for shape in shapes)
    lengths = (rows, depth if isinstance(depth, int) else same, columns)
    return 1 / sum(1 / max(length, 1) if isinstance(length, int) else 1 / USUAL_LENGTH for length in lengths)


def total(counts: Iterable[int | None]) -> int | None:
    """Return a sum; None where a term is not known."""
    terms = list(counts)
    known = [term for term in terms if term is not None]
    return sum(known) if len(known) == len(terms) else None


def multiply_accumulates(node: ir.Node) -> int | None:
    """Return the multiply-accumulates of an operator; 0 for one that does not accumulate."""
    if node.op_type not in {"Conv", "ConvTranspose", "Gemm", "MatMul"} or len(node.inputs) < 2:
        return 0
    x, w = node.inputs[:2]
    made, read = values_of(node.outputs[0]), values_of(x)
    if made is None or read is None or x is None or w is None or x.shape is None or w.shape is None:
        return None
    if node.op_type in {"Conv", "ConvTranspose"}:
        size, rows = values_of(w), w.shape[0]
        if size is None or not isinstance(rows, int) or rows == 0:
            return None
        return (made if node.op_type == "Conv" else read) * (size // rows)
    axis = 0 if node.op_type == "Gemm" and node.attributes.get_int("transA", 0) == 1 else -1
    depth = x.shape[axis] if len(x.shape) else 1
    return made * depth if isinstance(depth, int) else None


def larger_by(model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> int:
    """Return how many times larger a sample is than the model's shapes say: sizes that those leave free count as 1 in `work_of`.

    Args:
        model: The model.
        feeds: A batch, by input.
    """
    samples = samples_in(feeds)
    larger: list[int] = [
        math.ceil(feeds[str(value.name)].size / samples / max(values_of(value) or 1, 1))
        for value in model.graph.inputs
        if str(value.name) in feeds
    ]
    return max([1, *larger])
