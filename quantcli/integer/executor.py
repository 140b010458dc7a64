"""Run a quantized model with integers alone, from its ONNX file and its sidecar."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.arithmetic.affine import IntegerType, dequantize, quantize
from quantcli.integer.expand import EDGES, expanded, quantizer_before
from quantcli.integer.layer import IntegerError, Layer, multiplier_bits
from quantcli.integer.layers import run_layer
from quantcli.island import captured, single_node

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.sidecar import LayerEntry, Sidecar, TensorEntry


@dataclass(eq=False)
class Executor:
    """A quantized model and its sidecar, ready to run.

    Args:
        model: The quantized model, in QDQ or QOperator form.
        sidecar: Its sidecar.

    Attributes:
        bridged: The operators without a layer that ran on real numbers, by node.
    """

    model: ir.Model
    sidecar: Sidecar
    bridged: dict[str, str] = field(default_factory=dict)

    @property
    def islands(self) -> Counter[str]:
        """How many nodes of each operator without a layer ran on real numbers."""
        return Counter(self.bridged.values())

    def __post_init__(self) -> None:
        self.model = expanded(self.model, self.sidecar)
        self.nodes = {str(node.name): node for node in self.model.graph}
        self.entries = {entry.name: entry for entry in self.sidecar.layers}
        self.stored = {
            name: value.const_value.numpy()
            for name, value in self.model.graph.initializers.items()
            if value.const_value is not None
        }
        self.by_real = {tensor.reals: name for name, tensor in self.sidecar.tensors.items()}
        self.sessions: dict[tuple[str, tuple[str, ...]], Any] = {}
        absorbed = {name for entry in self.sidecar.layers for name in entry.absorbed}
        self.order = [node for node in self.model.graph if node.op_type not in EDGES and str(node.name) not in absorbed]
        self.order = [node for node in self.order if not is_edge(node) and not self.rounds_a_layer(node)]

    def rounds_a_layer(self, node: ir.Node) -> bool:
        """Tell whether a node stands between a layer and its integers: a fence, which keeps the layer's kernel a float one."""
        producer = node.inputs[0].producer() if is_fence(node) and node.inputs[0] is not None else None
        entry = self.entries.get(str(producer.name)) if producer is not None else None
        return entry is not None and entry.accumulator_scale is None

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the model's outputs; see `run_all` for the integers between.

        Raises:
            IntegerError: If a layer cannot be computed as the sidecar states it.
        """
        integers, reals = self.run_all(feeds)
        return {str(value.name): self.real(str(value.name), integers, reals) for value in self.model.graph.outputs}

    def run_all(self, feeds: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Return the integers of every quantized tensor, and the values of everything else, by name."""
        integers: dict[str, NDArray[Any]] = {}
        reals: dict[str, NDArray[Any]] = {**self.stored, **feeds}
        for node in self.order:
            entry = self.entries.get(str(node.name))
            if is_fence(node):
                reals[str(node.outputs[0].name)] = self.real(str(node.inputs[0].name), integers, reals)  # type: ignore[union-attr]
                continue
            if entry is None or entry.arithmetic == "stored":
                self.run_island(node, integers, reals)
                continue
            operands = [self.integer(name, integers, reals) for name in entry.inputs]
            try:
                results = run_layer(self.layer(entry, node, integers, reals), operands)
            except ValueError as error:
                raise IntegerError(
                    f"the integers of layer '{entry.name}' cannot be computed ({error})", "leave it float (--exclude)"
                ) from error
            (integers if entry.accumulator_scale is None else reals).update(zip(entry.outputs, results, strict=False))
        return integers, reals

    def layer(
        self, entry: LayerEntry, node: ir.Node, integers: dict[str, NDArray[Any]], reals: dict[str, NDArray[Any]]
    ) -> Layer:
        """Return a layer with what its node says."""
        plain = {
            position: None if value is None else self.real(str(value.name), integers, reals)
            for position, value in enumerate(node.inputs)
            if value is None or (str(value.name) not in self.by_real and str(value.name) not in self.sidecar.tensors)
        }
        attributes = {name: attribute_value(attribute) for name, attribute in node.attributes.items()}
        return Layer(entry, attributes, self.sidecar.tensors, multiplier_bits(self.sidecar, entry), plain)

    def integer(
        self, name: str, integers: dict[str, NDArray[Any]], reals: dict[str, NDArray[Any]]
    ) -> NDArray[np.int64]:
        """Return a tensor's integers: computed, stored, or quantized from what an input or a float island gave."""
        if name not in integers:
            tensor = self.sidecar.tensors[name]
            if tensor.role != "activation":
                integers[name] = self.stored[tensor.integers]
            else:
                integers[name] = quantized(tensor, reals[name])
        return integers[name].astype(np.int64)

    def real(self, name: str, integers: dict[str, NDArray[Any]], reals: dict[str, NDArray[Any]]) -> NDArray[Any]:
        """Return a value of the written model by its name there."""
        source = self.by_real.get(name)
        if source is None:
            return reals[name]
        tensor = self.sidecar.tensors[source]
        self.integer(source, integers, reals)
        return dequantize(
            integers[source], np.array(tensor.scale, dtype=np.float32), np.array(tensor.zero_point), tensor.axis
        )

    def run_island(self, node: ir.Node, integers: dict[str, NDArray[Any]], reals: dict[str, NDArray[Any]]) -> None:
        """Run an operator that stays float (or works on shapes) as it is, in ONNX Runtime."""
        values = [*node.inputs, *captured(node)]
        given = [None if v is None else self.real(str(v.name), integers, reals) for v in values]
        results = self.session(node, given)(given)
        if any(result.dtype.kind == "f" for result in results):
            self.bridged[str(node.name)] = node.op_type
        made = [value for value in node.outputs if value.name]
        reals.update({str(value.name): result for value, result in zip(made, results, strict=True)})

    def session(
        self, node: ir.Node, given: list[NDArray[Any] | None]
    ) -> Callable[[list[NDArray[Any] | None]], list[NDArray[Any]]]:
        """Return a function that runs one node by itself."""
        key = str(node.name), tuple("" if array is None else f"{array.dtype}{array.ndim}" for array in given)
        if key not in self.sessions:
            self.sessions[key] = single_node(node, given, self.model)
        found: Callable[[list[NDArray[Any] | None]], list[NDArray[Any]]] = self.sessions[key]
        return found


def is_edge(node: ir.Node) -> bool:
    """Tell whether a node keeps a tensor on a narrow grid: a Clip beside its QuantizeLinear, named after its own output."""
    if node.op_type != "Clip" or str(node.name) != str(node.outputs[0].name):
        return False
    return quantizer_before(node) is not None or {user.op_type for user in node.outputs[0].consumers()} == {
        "QuantizeLinear"
    }


def is_fence(node: ir.Node) -> bool:
    """Tell whether a node only keeps the runtime from fusing what stands before it: Max of a single operand."""
    return node.op_type == "Max" and len(node.inputs) == 1 and str(node.name) == str(node.outputs[0].name)


def quantized(tensor: TensorEntry, reals: NDArray[Any]) -> NDArray[Any]:
    """Return real values as a tensor's integers (equation 5)."""
    scale, zero_point = np.array(tensor.scale, dtype=np.float32), np.array(tensor.zero_point)
    q = quantize(reals, scale, zero_point, IntegerType(tensor.dtype), tensor.axis)
    held: NDArray[Any] = np.clip(q, tensor.qmin, tensor.qmax)
    return held


def attribute_value(attribute: ir.Attr) -> Any:
    """Return an attribute's value as plain Python."""
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value
