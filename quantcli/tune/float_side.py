"""The float side of a sweep: what layers give in the float model, each computed in a thread while the one before is tuned.

Nothing that is chosen changes the float side, so it need not wait; it runs one layer ahead and no further, so that it holds little.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.island import captured, single_node
from quantcli.plan import activation_bounds

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.placement import PlacedLayer

    Arrays = list[NDArray[Any] | None]
    Batches = list[NDArray[Any]]


class Node:
    """One node that is run by itself, with a session for each kind of its inputs.

    Args:
        node: The node.
        model: The model that it is part of.
    """

    def __init__(self, node: ir.Node, model: ir.Model) -> None:
        self.node, self.model = node, model
        self.reads = [*node.inputs, *captured(node)]
        self.sessions: dict[tuple[str, ...], Callable[[Arrays], Batches]] = {}

    def run(self, batches: list[Arrays]) -> list[Batches]:
        """Return the batches of every output, given the arrays of each batch in the order of `reads`."""
        return [list(column) for column in zip(*map(self.run_one, batches), strict=True)]

    def run_one(self, arrays: Arrays) -> Batches:
        """Return the outputs for one batch."""
        key = tuple("" if array is None else f"{array.dtype}{array.ndim}" for array in arrays)
        if key not in self.sessions:
            self.sessions[key] = single_node(self.node, arrays, self.model)
        return self.sessions[key](arrays)


@dataclass(frozen=True, eq=False)
class Given:
    """What a layer gives in the float model.

    Attributes:
        node: The layer's node, which can be run again.
        outputs: The batches of every output of the node.
        values: The same by value, and what the activations behind the layer make of them.
    """

    node: Node
    outputs: list[Batches]
    values: dict[ir.Value, Batches]


class FloatSide:
    """The layers of one sweep in float.

    Args:
        model: The folded model.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.thread = ThreadPoolExecutor(1)
        self.begun: dict[ir.Node, Future[Given]] = {}

    def __enter__(self) -> FloatSide:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(cancel_futures=True)

    def begin(
        self, layer: PlacedLayer, given: Callable[[ir.Value | None, int], NDArray[Any] | None], count: int
    ) -> None:
        """Begin to run a layer.

        Args:
            layer: The layer.
            given: Returns what a value is in a batch, in the float model.
            count: How many batches there are.
        """
        if layer.node not in self.begun:
            node = Node(layer.node, self.model)
            batches = [[given(value, batch) for value in node.reads] for batch in range(count)]
            self.begun[layer.node] = self.thread.submit(run, node, layer, batches)

    def take(self, layer: PlacedLayer) -> Given:
        """Return what a layer that was begun gives."""
        return self.begun.pop(layer.node).result()


def run(node: Node, layer: PlacedLayer, batches: list[Arrays]) -> Given:
    """Run a layer, and the activations that it absorbs as far as they are computed in float32."""
    outputs = node.run(batches)
    named = [value for value in layer.node.outputs if value.name]
    values = dict(zip(named, outputs, strict=True))
    for follower in layer.absorbed:
        held = values.get(follower.inputs[0])  # type: ignore[arg-type]
        if held is None or any(array.dtype != np.float32 for array in held):
            break
        low, high = (np.float32(bound) for bound in activation_bounds(follower))
        values[follower.outputs[0]] = [np.clip(array, low, high) for array in held]
    return Given(node, outputs, values)
