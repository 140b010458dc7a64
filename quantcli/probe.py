"""Probes: a model's bytes for the runtime, with inner tensors among its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from calibration.hooks.blocks import BLOCK
from calibration.hooks.onnxruntime import Bundle
from quantcli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable


# Protocol buffers hold less than 2 GiB.
LARGEST_MODEL = 2**31 - 1
# Of a model above that, weights of more bytes stay outside the message.
LARGE_WEIGHT = 1 << 20
# What is mapped into memory begins at a multiple of this.
PAGE = 4096


def weight_bytes(model: ir.Model) -> int:
    """Return how many bytes a model's constants take."""
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype is not ir.DataType.STRING
    )


def model_bytes(model: ir.Model) -> bytes:
    """Return a model as the bytes of an ONNX file; the same model gives the same bytes.

    Raises:
        ModelError: If it is too large for one file.
    """
    weights = weight_bytes(model)
    if weights > LARGEST_MODEL:
        raise ModelError(
            f"the model holds {weights >> 20} MB of weights, more than one file can",
            "--mode weights --weight-bits 4 makes them smallest",
        )
    if any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values()):
        model = model.clone()
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.const_value.name)
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def split(model: ir.Model, location: str) -> tuple[bytes, list[bytes | ir.TensorProtocol]]:
    """Return a model of more than one message's size as a message that refers to a file of weights, and that file's parts.

    Weights of a megabyte or more stand in the file, each at a page's beginning, so that it can be mapped into memory.

    Args:
        model: The model; it is not changed.
        location: The file's name; it stands beside the message's.

    Raises:
        ModelError: If the small weights alone are more than a message holds.
    """
    slim = model.clone()
    parts: list[bytes | ir.TensorProtocol] = []
    offset, inline = 0, 0
    for name, value in slim.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype is ir.DataType.STRING:
            continue
        if tensor.nbytes < LARGE_WEIGHT:
            inline += tensor.nbytes
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=name)
            continue
        gap = -offset % PAGE
        parts += [bytes(gap), tensor]
        offset += gap
        value.const_value = ir.ExternalTensor(
            location, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.numpy().shape), name=name
        )
        offset += tensor.nbytes
    if inline > LARGEST_MODEL:
        raise ModelError(
            f"the model holds {inline >> 20} MB of weights of less than a megabyte each, more than one file can",
            "--mode weights --weight-bits 4 makes them smallest",
        )
    return bytes(ir.to_proto(slim).SerializeToString(deterministic=True)), parts


def runnable(model: ir.Model) -> bytes | Bundle:
    """Return a model as ONNX Runtime takes it: its bytes or, above 2 GB, its bytes and where its weights are."""
    if weight_bytes(model) <= LARGEST_MODEL:
        return model_bytes(model)
    folder, inline = "", 0
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            folder = str(value.const_value.base_dir)
        elif value.const_value is not None:
            inline += value.const_value.nbytes
    slim, weights = model.clone(), {}
    for name, value in slim.graph.initializers.items():
        tensor = value.const_value
        if (
            inline <= LARGEST_MODEL
            or tensor is None
            or isinstance(tensor, ir.ExternalTensor)
            or tensor.nbytes < LARGE_WEIGHT
        ):
            continue
        weights[name] = np.ascontiguousarray(tensor.numpy())
        shape = ir.Shape(weights[name].shape)
        value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    return Bundle(bytes(ir.to_proto(slim).SerializeToString(deterministic=True)), weights, folder)


def with_outputs(model: ir.Model, names: Iterable[str]) -> bytes | Bundle:
    """Return the bytes of a model that also gives the named tensors; inputs among them are left to the caller."""
    probed = model.clone()
    given = {value.name for value in (*probed.graph.inputs, *probed.graph.outputs)}
    wanted = {name for name in names if name not in given}
    probed.graph.outputs.extend(v for node in probed.graph for v in node.outputs if v.name in wanted)
    return runnable(probed)


def with_highest(
    model: ir.Model, names: Iterable[str], settled: Iterable[str]
) -> tuple[bytes | Bundle, dict[str, tuple[str, int]]]:
    """Return the bytes of a model that gives the named tensors, but of the settled ones only their highest values.

    GlobalMaxPool finds them, one per sample and channel: ONNX Runtime runs it on the layout in which convolutions leave their
    results, while handing a tensor out means copying it to another one. They are put together before they are handed out,
    those that are in that layout and the others.

    Args:
        model: The folded model.
        names: All tensors that are asked for.
        settled: Those whose highest values are enough; each has three dimensions or more, and a known number of channels.

    Returns:
        The bytes; and for each settled tensor, in the order in which they stand there, the output that holds its highest values
        along axis 1, and how many they are.
    """
    probed = model.clone()
    graph = probed.graph
    values = {str(value.name): value for node in graph for value in node.outputs}
    taken = {*values, *(str(value.name) for value in graph.inputs), *graph.initializers}
    held = {str(value.name) for value in graph.outputs}
    pooled, wanted = set(settled), [name for name in names if name in values]
    graph.outputs.extend(values[name] for name in wanted if name not in pooled and name not in held)
    places: dict[str, tuple[str, int]] = {}
    alike: dict[tuple[int, bool], list[ir.Value]] = {}
    for name in wanted:
        if name in pooled:
            alike.setdefault((len(values[name].shape or ()), is_blocked(values[name])), []).append(values[name])
    for number, group in enumerate(alike.values()):
        together = unused(f"highest_{number}", taken)
        parts = [added(graph, "GlobalMaxPool", [value], unused(f"{value.name}_highest", taken)) for value in group]
        graph.outputs.append(added(graph, "Concat", parts, together, axis=1))
        places.update((str(value.name), (together, channels(value))) for value in group)
    return runnable(probed), places


def is_blocked(value: ir.Value) -> bool:
    """Tell whether ONNX Runtime leaves a tensor in blocks of channels: what a convolution gives, in whole blocks."""
    producer = value.producer()
    while producer is not None and producer.op_type in {"Relu", "Clip"} and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    return producer is not None and producer.op_type == "Conv" and channels(value) % BLOCK == 0


def added(graph: ir.Graph, operator: str, inputs: list[ir.Value], name: str, **attributes: int) -> ir.Value:
    """Add a node to a graph and return its output."""
    node = ir.node(operator, inputs, attributes=attributes or None)
    node.outputs[0].name, node.outputs[0].type = name, inputs[0].type
    graph.append(node)
    return node.outputs[0]


def unused(name: str, taken: set[str]) -> str:
    """Return a name that is not taken yet, and take it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def channels(value: ir.Value) -> int:
    """Return the size of axis 1."""
    size = value.shape[1] if value.shape is not None else None
    assert isinstance(size, int)  # noqa: S101 - a convolution's weights fix it
    return size
