"""What a sidecar states of tensors and of the layers' order, beside what the model holds: numbers are compared with ==."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.arithmetic.affine import (
    IntegerType,
    affine_parameters,
    along_axis,
    fixed_parameters,
    power_of_two_parameters,
    symmetric_parameters,
    whole_reciprocal,
)
from quantcli.integer.expand import quantizer_before

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.integer.executor import Executor
    from quantcli.integer.held import Held
    from quantcli.sidecar import Sidecar, TensorEntry


@dataclass(frozen=True)
class Finding:
    """Something that is not as the sidecar states it.

    Attributes:
        layer: The layer it belongs to; empty for the files themselves.
        what: What differs, with index and both values where there are any.
    """

    layer: str
    what: str

    def __str__(self) -> str:
        return f"layer '{self.layer}': {self.what}" if self.layer else self.what


def digest_findings(held: Held, sidecar: Sidecar) -> Iterator[Finding]:
    """Compare a model's digest and operator set with those that its sidecar states."""
    if held.sha256 != sidecar.model.sha256:
        stated = sidecar.model.sha256
        yield Finding("", f"the model's sha256 is {held.sha256[:12]}…, the sidecar states {stated[:12]}…")
    if held.model.opset_imports.get("") != sidecar.opset:
        found = held.model.opset_imports.get("")
        yield Finding("", f"the model's operator set is {found}, the sidecar states {sidecar.opset}")


def reader_of(sidecar: Sidecar, tensor: str) -> str:
    """Return the name of a layer that a tensor belongs to: one that reads it, else one that makes it."""
    readers = [layer.name for layer in sidecar.layers if tensor in layer.inputs]
    makers = [layer.name for layer in sidecar.layers if tensor in layer.outputs]
    return next(iter([*readers, *makers]), "")


def tensor_findings(executor: Executor) -> Iterator[Finding]:
    """Compare scales, zero points and constants with those that the model holds."""
    sidecar = executor.sidecar
    dequantizers: dict[tuple[str, str], list[ir.Node]] = {}
    quantizers: dict[str, list[ir.Node]] = {}
    tables = looked_up(executor)
    for node in executor.model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            names = str(node.inputs[0].name), str(node.outputs[0].name)
            dequantizers.setdefault(tables.get(names[0], names), []).append(node)
        elif node.op_type == "QuantizeLinear":
            quantizers.setdefault(str(node.outputs[0].name), []).append(node)
        elif (quantizer := quantizer_before(node)) is not None:
            quantizers.setdefault(str(node.outputs[0].name), []).append(quantizer)
    for name, tensor in sidecar.tensors.items():
        layer = reader_of(sidecar, name)
        found = dequantizers.get((tensor.integers, tensor.reals), [])
        if not found:
            yield Finding(layer, f"the model does not dequantize tensor '{name}' from '{tensor.integers}'")
        makers = [entry.name for entry in sidecar.layers if name in entry.outputs]
        for node in (*found, *quantizers.get(tensor.integers, ())):
            at = makers[0] if node.op_type == "QuantizeLinear" and makers else layer
            held = [None if value is None else executor.stored.get(str(value.name)) for value in node.inputs[1:3]]
            scales, zero_points = (*held, None, None)[:2]
            yield from differences(at, f"scale of '{name}'", scales, tensor.scale)
            yield from axis_findings(at, name, tensor, node)
            if zero_points is None:
                zero_points = np.zeros(len(tensor.zero_point), dtype=np.int32)
            elif tensor.role == "activation" and zero_points.dtype.name != tensor.dtype:
                yield Finding(
                    at, f"'{name}' is {zero_points.dtype.name} in the model and {tensor.dtype} in the sidecar"
                )
            yield from differences(at, f"zero point of '{name}'", zero_points, tensor.zero_point)
        yield from range_findings(layer, name, tensor, sidecar)
        if tensor.sha256 is not None:
            yield from constant_findings(layer, name, tensor, executor.stored.get(tensor.integers))


def constant_findings(layer: str, name: str, tensor: TensorEntry, constant: NDArray[Any] | None) -> Iterator[Finding]:
    """Compare the digest and type of a constant's integers with those stated, and a weight's with its grid and dead channels."""
    digest = "" if constant is None else hashlib.sha256(np.ascontiguousarray(constant).tobytes()).hexdigest()
    if constant is not None and constant.dtype.name != tensor.dtype:
        yield Finding(layer, f"'{name}' is {constant.dtype.name} in the model and {tensor.dtype} in the sidecar")
    if digest != tensor.sha256:
        yield Finding(layer, f"the integers of '{name}' are not those that the sidecar was written for")
    elif constant is None or (tensor.axis or 0) >= max(constant.ndim, 1):
        return  # the axis is a finding by itself
    elif tensor.role == "weight" and not lies_on_grid(tensor, constant):
        yield Finding(layer, f"the integers of '{name}' leave their grid")
    elif alive := alive_of(tensor, constant):
        yield Finding(layer, f"channel {alive[0]} of '{name}' is said to be dead, and holds integers but zero")


def lies_on_grid(tensor: TensorEntry, integers: NDArray[Any]) -> bool:
    """Tell whether a weight's integers lie on the grid that its entry gives each of them."""
    lowest: NDArray[np.int64] | int = tensor.qmin
    highest: NDArray[np.int64] | int = tensor.qmax
    if tensor.grids is not None:
        lowest = along_axis(np.array(tensor.grids.lowest), integers.ndim, tensor.axis)
        highest = lowest + (1 << tensor.grids.bits) - 1
    return bool(np.all((integers >= lowest) & (integers <= highest)))


def alive_of(tensor: TensorEntry, integers: NDArray[Any]) -> list[int]:
    """Return the channels that are said to be dead, and hold other integers than zero."""
    rows = integers[np.newaxis] if tensor.axis is None else np.moveaxis(integers, tensor.axis, 0)
    return [channel for channel in tensor.dead_channels if channel < len(rows) and np.any(rows[channel])]


def looked_up(executor: Executor) -> dict[str, tuple[str, str]]:
    """Return for what every lookup gives the names of its table's integers and reals: it is dequantized behind the lookup."""
    found = {}
    for entry in executor.sidecar.layers:
        node = executor.nodes.get(entry.name)
        if entry.arithmetic == "lookup" and node is not None:
            tensor = executor.sidecar.tensors[entry.inputs[0]]
            found[str(node.outputs[0].name)] = tensor.integers, tensor.reals
    return found


def differences(layer: str, what: str, held: NDArray[Any] | None, stated: list[float] | list[int]) -> Iterator[Finding]:
    """Compare numbers of the model with numbers of the sidecar, by ==."""
    values = [] if held is None else held.reshape(-1).tolist()
    if len(values) != len(stated):
        yield Finding(layer, f"the {what} has {len(values)} values in the model and {len(stated)} in the sidecar")
        return
    for index, (value, other) in enumerate(zip(values, stated, strict=True)):
        if value != other:
            yield Finding(layer, f"the {what}, index {index}, is {value} in the model and {other} in the sidecar")
            return


def axis_findings(layer: str, name: str, tensor: TensorEntry, node: ir.Node) -> Iterator[Finding]:
    """Compare the axis of a tensor with many scales with that of the operator that dequantizes it (ONNX's default is 1)."""
    value = node.inputs[0]
    rank = len(value.shape) if value is not None and value.shape is not None else 0
    axis = node.attributes.get_int("axis", 1)
    axis += rank if axis < 0 else 0
    behind = value is not None and value.name != tensor.integers  # what a lookup gives has other axes than its table
    if len(tensor.scale) > 1 and axis != tensor.axis and not behind:
        yield Finding(layer, f"the axis of '{name}' is {axis} in the model and {tensor.axis} in the sidecar")


def range_findings(layer: str, name: str, tensor: TensorEntry, sidecar: Sidecar) -> Iterator[Finding]:
    """Compare scale and zero point of an activation or a constant with what its range makes them (equations 2 to 4a, 7 and 7a)."""
    if tensor.role not in {"activation", "constant"} or tensor.same_as is not None or len(tensor.scale) != 1:
        return
    rules, integer, (lo,), (hi,) = sidecar.target.activation, grid_type(tensor), tensor.lo, tensor.hi
    try:
        scale, zero_point = (symmetric_parameters if rules.symmetric else affine_parameters)(lo, hi, integer)
        if rules.power_of_two:
            scale, zero_point = power_of_two_parameters(scale, lo, integer, rules.symmetric)
        softmax = any(entry.arithmetic == "softmax" and name in entry.outputs for entry in sidecar.layers)
        made = [(float(whole_reciprocal(scale) if softmax else scale), zero_point)]
        fixed, zero_point = fixed_parameters(lo, hi, integer, rules.symmetric)
        made.append((float(fixed), zero_point))
    except ValueError as error:
        yield Finding(layer, f"the range of '{name}' makes no scale ({error})")
        return
    if (tensor.scale[0], tensor.zero_point[0]) not in made:
        stated = f"{tensor.scale[0]} and {tensor.zero_point[0]}"
        yield Finding(
            layer,
            f"scale and zero point of '{name}' are {stated}, and lo and hi make them {made[0][0]} and {made[0][1]}",
        )


def grid_type(tensor: TensorEntry) -> IntegerType:
    """Return the integer type with a tensor's grid."""
    narrow = tensor.qmin == -tensor.qmax
    bits = max((tensor.qmax - tensor.qmin + narrow).bit_length(), 2)
    return IntegerType(f"{'' if tensor.qmin < 0 else 'u'}int{bits}", narrow)


def order_findings(executor: Executor) -> Iterator[Finding]:
    """Find layers that the sidecar has before one that they wait for in the model, be it through operators that stay float."""
    places = {entry.name: place for place, entry in enumerate(executor.sidecar.layers)}
    names = [entry.name for entry in executor.sidecar.layers]
    last: dict[str, int] = {}
    for node in executor.model.graph:
        before = max((last.get(str(value.name), -1) for value in node.inputs if value is not None), default=-1)
        own = places.get(str(node.name), -1)
        if -1 < own < before:
            yield Finding(names[own], f"the sidecar has it before layer '{names[before]}', which has to run first")
        for value in node.outputs:
            last[str(value.name)] = max(own, before)


def unknown_tensors(executor: Executor) -> bool:
    """Tell whether the sidecar speaks of tensors that the model does not have, so that nothing can be run."""
    graph = executor.model.graph
    known = {value.name for node in graph for value in node.outputs} | {*graph.initializers}
    known |= {value.name for value in graph.inputs}
    return any(
        tensor.integers not in known or tensor.reals not in known for tensor in executor.sidecar.tensors.values()
    )
