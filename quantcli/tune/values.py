"""What a model's tensors hold over some samples, in parts that take little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calibration.datasets import samples_in
from calibration.hooks.onnxruntime import Runner
from quantcli.cost import values_of
from quantcli.probe import with_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

# What the tensors that are looked at may take at once, in bytes.
ROOM = 1 << 26


def values_in_parts(
    model: ir.Model,
    feeds: Sequence[dict[str, NDArray[Any]]],
    names: Sequence[str],
    samples: int | None = None,
    first: int = 0,
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield what was fed and what a model makes of it, part by part.

    Args:
        model: The model.
        feeds: Batches of samples.
        names: The tensors.
        samples: How many samples are enough; None for all.
        first: So many are passed over.
    """
    done = 0
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    size = 4 * sum(values_of(values[name]) or 0 for name in names if name in values)
    inputs = [value for value in model.graph.inputs if value.name in feeds[0]]
    shapes = [value.shape for value in inputs]
    free = all(shape is not None and len(shape) and not isinstance(shape[0], int) for shape in shapes)
    runner = Runner(lambda: with_outputs(model, names))
    for batch in feeds:
        rows = samples_in(batch)
        divisible = free and all(len(array) == rows for array in batch.values())
        part = max(1, ROOM // max(size, 1)) if divisible else rows
        if divisible and samples is not None:
            rows = min(rows, samples - done)
        begin = min(max(first - done, 0), rows) if divisible or first - done >= rows else 0
        for start in range(begin, rows, part):
            stop = min(start + part, rows)
            given = {name: array[start:stop] for name, array in batch.items()} if divisible else batch
            yield {**given, **runner.run(given, names)}
        done += rows
        if samples is not None and done >= samples:
            return
