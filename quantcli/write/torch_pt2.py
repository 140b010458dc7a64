"""Write an exported PyTorch program (``.pt2``): int8 weights, and the standard decomposed quantize and dequantize operators.

The program is the QDQ form of the same plan, traced operator by operator. It runs without quantcli: `torch.export.load`, after
``import torch.ao.quantization.fx._decomposed`` has registered those operators. Weights keep the names that the sidecar gives their
integers; of other names, what is no Python name becomes an underscore.
"""

from __future__ import annotations

import inspect
import io
import json
import re
import zipfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn

from calibration.hooks.torch import register_operators
from quantcli.errors import OutputError
from quantcli.load.exporter import quiet, reason
from quantcli.load.torch import ROWS
from quantcli.scores import MASKS, inputs_of
from quantcli.write.torch_call import Stored
from quantcli.write.torch_operators import computed, operators

if TYPE_CHECKING:
    import onnx_ir as ir

# What every member of an archive is dated, and which members are packed.
EPOCH = (1980, 1, 1, 0, 0, 0)
PACKED = (".json", "sample_inputs/model.pt")


@dataclass(frozen=True)
class Calling:
    """How a program is called.

    Attributes:
        names: Its arguments, those that go by their names last.
        inputs: How they are nested: positional ones, and those that go by name (a torch pytree spec).
        outputs: How what it gives is nested, likewise; None for a tensor or a tuple.
    """

    names: tuple[str, ...]
    inputs: Any
    outputs: Any = None

    @property
    def signature(self) -> inspect.Signature:
        """The arguments, as Python describes them."""
        positional = self.inputs.child(0).num_children
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return inspect.Signature(
            [inspect.Parameter(name, kinds[number >= positional]) for number, name in enumerate(self.names)]
        )


def calling_of(graph: ir.Graph, source: Any) -> Calling:
    """Return how a graph's program is called: as the program is that it comes from, where they have the same tensors."""
    flat = tuple(python_name(str(value.name)) for value in graph.inputs)
    found = Calling(flat, pytree.tree_structure((flat, {})))
    if source is None:
        return found
    spec, signature = source.call_spec, source.module_call_graph[0].signature
    names = tuple(signature.forward_arg_names or ()) if signature is not None else ()
    nested = spec.in_spec is not None and spec.in_spec.num_leaves == len(flat)
    if nested and len(names) == sum(spec.in_spec.child(half).num_children for half in range(2)):
        found = Calling(names, spec.in_spec)
    outputs = spec.out_spec
    return replace(found, outputs=outputs if outputs is not None and outputs.num_leaves == len(graph.outputs) else None)


class Network(nn.Module):
    """An ONNX graph as a module, for tracing."""

    def __init__(self, model: ir.Model, calling: Calling | None = None) -> None:
        super().__init__()
        register_operators()
        self.graph, self.calling = model.graph, calling or calling_of(model.graph, None)
        self.rows = operators()
        self.arrays, self.places = {}, {}
        for name, value in model.graph.initializers.items():
            self.arrays[name] = np.array(value.const_value.numpy())  # type: ignore[union-attr]
            self.places[name] = self.keep(name)

        def forward(*inputs: Any, **keywords: Any) -> Any:
            return self.traced(pytree.tree_leaves((inputs, keywords)))

        forward.__signature__ = self.calling.signature  # type: ignore[attr-defined]
        self.forward = forward

    def keep(self, name: str) -> tuple[nn.Module, str]:
        """Register a constant under its own name, in modules where the name has dots; return where it stands."""
        *path, last = [re.sub(r"\W", "_", part, flags=re.ASCII) or "_" for part in name.split(".")]
        place: nn.Module = self
        for part in path:
            inner = getattr(place, part, None)
            if inner is not None and not isinstance(inner, nn.Module):
                place, last = self, python_name(name)
                break
            if inner is None:
                inner = nn.Module()
                place.add_module(part, inner)
            place = inner
        while hasattr(place, last):
            last += "_"
        place.register_buffer(last, torch.from_numpy(self.arrays[name]))
        return place, last

    def stored(self, name: str) -> Stored:
        """Return a constant."""
        place, last = self.places[name]
        return Stored(self.arrays[name], getattr(place, last))

    def traced(self, inputs: list[Any]) -> Any:
        """Compute the graph's outputs."""
        values: dict[Any, Any] = dict(zip(self.graph.inputs, inputs, strict=True))
        values.update({value: self.stored(str(value.name)) for value in self.graph.initializers.values()})
        for node in self.graph:
            made = computed(node, [values[value] if value is not None else None for value in node.inputs], self.rows)
            values.update(zip(node.outputs, made, strict=False))
        results = [values[value] for value in self.graph.outputs]
        results = [value.tensor if isinstance(value, Stored) else value for value in results]
        if self.calling.outputs is not None:
            return pytree.tree_unflatten(results, self.calling.outputs)
        return results[0] if len(results) == 1 else tuple(results)


def python_name(name: str) -> str:
    """Return a name as Python allows it."""
    name = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{name}" if not name or name[0].isdigit() else name


def write(model: ir.Model, source: Any = None) -> bytes:
    """Return the exported program of a model in QDQ form, as the bytes of a ``.pt2`` file.

    Args:
        model: The quantized model as `quantcli.write.onnx_qdq` writes it.
        source: The exported program that was quantized, which is called in the same way; None for an ONNX model.

    Raises:
        OutputError: If an operator has no counterpart in PyTorch, or the program cannot be traced.
    """
    calling = calling_of(model.graph, source)
    network = Network(model, calling).eval()
    examples, free = [], []
    for value in model.graph.inputs:
        shape = list(value.shape) if value.shape is not None else []
        sizes = [size if isinstance(size, int) else ROWS if axis == 0 else 8 for axis, size in enumerate(shape)]
        kind = str(value.dtype.numpy()) if value.dtype is not None else "float32"
        examples.append(torch.zeros(sizes, dtype=getattr(torch, kind)))
        free.append({axis: torch.export.Dim.AUTO for axis, size in enumerate(shape) if not isinstance(size, int)})
    positional, keywords = pytree.tree_unflatten(examples, calling.inputs)
    axes, named_axes = pytree.tree_unflatten(free, calling.inputs)
    shapes = {**dict(zip(calling.names, axes, strict=False)), **named_axes}
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(network, positional, keywords, dynamic_shapes=shapes, strict=False)
    except OutputError:
        raise
    except Exception as error:
        raise OutputError(
            f"the quantized model cannot be traced in PyTorch ({reason(error)})", "write .onnx instead"
        ) from error
    masks = [number for number, spec in enumerate(inputs_of(model, "the quantized model")) if spec.masks]
    return saved(program, {MASKS: json.dumps(masks)} if masks else {})


def saved(program: Any, beside: dict[str, str] | None = None) -> bytes:
    """Return a program as bytes: the same for the same program, and without what its tracing leaves of this machine."""
    for node in program.graph.nodes:
        for trace in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(trace, None)
    buffer, packed = io.BytesIO(), io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files=beside)
    # torch stores everything as it is; the graph and the tables of weights, which are text, would outweigh the int8 weights.
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(packed, "w") as new:
        for member in old.infolist():
            info = zipfile.ZipInfo(member.filename, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED if member.filename.endswith(PACKED) else zipfile.ZIP_STORED
            new.writestr(info, old.read(member))
    return packed.getvalue()
