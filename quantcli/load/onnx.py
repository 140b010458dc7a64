"""Load an ONNX file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from calibration.errors import ReportedError
from calibration.hooks.onnxruntime import Runner
from quantcli.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


# A model of more bytes is not copied.
LARGEST_COPIED = 1 << 30


def load_onnx(path: Path) -> tuple[ir.Model, list[Path]]:
    """Return the model and the files that it is made of (the file itself, then its external data).

    Raises:
        ModelError: If the file is not an ONNX model, is cut short, gives out maps, or names external data outside its folder.
        RunError: If it is one, and not a valid one, with what ONNX Runtime says of it.
    """
    try:
        model = read(path)
    except ReportedError:
        raise
    except Exception as error:
        raise ModelError(f"{path} is not an ONNX model, or is cut short", "export or copy it again") from error
    if not model.opset_imports or model.graph.num_nodes() == 0:
        raise ModelError(f"{path} holds no model: it has no operators", "export it again")
    readable_names(model)
    open_axes(model)
    return model, [path, *external_files(model, path)]


def readable_names(model: ir.Model) -> None:
    """Give nodes names that are text; bytes of theirs that are no UTF-8 become replacement characters.

    Names of tensors are left to the runtime, which refuses such models: their edges would change.
    """
    for node in model.graph.all_nodes():
        if isinstance(node.name, bytes):
            node.name = node.name.decode("utf-8", "replace")


def open_axes(model: ir.Model) -> None:
    """Give axes no length that a file says is −1, or a question mark: so exporters write what they do not know.

    Two axes of one name are of one length, and a Reshape knows no second −1.
    """
    graphs = [model.graph, *model.graph.subgraphs()]
    values = {value for graph in graphs for value in (*graph.inputs, *graph.outputs)}
    values.update(value for node in model.graph.all_nodes() for value in node.outputs)
    for value in values:
        axes = [] if value.shape is None else [a if isinstance(a, int) else a.value for a in value.shape]
        known = [None if axis == "?" or (isinstance(axis, int) and axis < 0) else axis for axis in axes]
        if known != axes:
            value.shape = ir.Shape(known)


def read(path: Path) -> ir.Model:
    """Return the model of a file: sparse tensors as dense ones, and what stands in the file itself as arrays.

    Raises:
        ModelError: If an output is no tensor, but a map.
    """
    import onnx

    proto = onnx.load(path, load_external_data=False)
    if given := next((v.name for v in proto.graph.output if is_map(v.type)), None):
        what = f"{path} gives out '{given}' as maps from classes to scores (ZipMap), and only tensors can be compared"
        raise ModelError(what, "export it without (skl2onnx: options={'zipmap': False}, onnxmltools: zipmap=False)")
    if holds_sparse(proto.graph):
        model = densified(path)
    else:
        try:
            model = ir.from_proto(proto)
        except Exception:
            Runner(path, what=str(path))  # two tensors of one name, say: it tells which
            raise
        ir.external_data.set_base_dir(model.graph, path.parent)
    as_arrays(model, path.stat().st_size)
    return model


def is_map(kind: Any) -> bool:
    """Tell whether a type (a TypeProto) is a map, or a sequence of maps."""
    if kind.HasField("sequence_type"):
        return is_map(kind.sequence_type.elem_type)
    return bool(kind.HasField("map_type"))


def as_arrays(model: ir.Model, size: int) -> None:
    """Let tensors be arrays that are protocol buffers, which copy all of their bytes whenever they are looked at.

    Args:
        model: The model.
        size: How many bytes it has; of a large one all tensors stay as they are, since for a while there are both.
    """
    if size > LARGEST_COPIED:
        return
    for graph in model.graphs():
        for value in graph.initializers.values():
            value.const_value = as_array(value.const_value)
    for node in model.graph.all_nodes():
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                node.attributes[name] = ir.AttrTensor(name, as_array(attribute.as_tensor()))


def as_array(tensor: Any) -> Any:
    """Return a tensor that holds an array in place of a protocol buffer; any other, and one of packed numbers, as it is."""
    if not isinstance(tensor, ir.serde.TensorProtoTensor) or tensor.dtype.bitwidth < 8:
        return tensor
    return ir.Tensor(tensor.numpy(), tensor.dtype, name=tensor.name)


def holds_sparse(graph: Any) -> bool:
    """Tell whether a model's main graph, as a protocol buffer, holds sparse tensors."""
    return bool(graph.sparse_initializer) or any(sparse_attribute(node) is not None for node in graph.node)


def sparse_attribute(node: Any) -> Any:
    """Return the sparse tensor of a Constant; None where it has none."""
    if node.op_type != "Constant":
        return None
    return next((a.sparse_tensor for a in node.attribute if a.HasField("sparse_tensor")), None)


def densified(path: Path) -> ir.Model:
    """Return a model whose sparse tensors are dense ones."""
    import onnx

    proto = onnx.load(path)
    graph = proto.graph
    graph.initializer.extend(dense(tensor, tensor.values.name) for tensor in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    for node in graph.node:
        tensor = sparse_attribute(node)
        if tensor is not None:
            value = dense(tensor, node.output[0])
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("value", value))
    return ir.from_proto(proto)


def dense(tensor: Any, name: str) -> Any:
    """Return a sparse tensor as a dense one; its indices are flat, or one row per value (ONNX SparseTensorProto)."""
    import numpy as np
    from onnx import numpy_helper

    values, indices = numpy_helper.to_array(tensor.values), numpy_helper.to_array(tensor.indices)
    array = np.zeros(tuple(tensor.dims), dtype=values.dtype)
    if indices.ndim == 1:
        array.reshape(-1)[indices] = values
    else:
        array[tuple(indices.T)] = values
    return numpy_helper.from_array(array, name)


def external_files(model: ir.Model, path: Path) -> list[Path]:
    """Return the external data files of a model, sorted.

    Raises:
        ModelError: If one lies outside the model's folder or is missing.
    """
    folder = path.resolve().parent
    files: set[Path] = set()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                files.add((folder / str(value.const_value.location)).resolve())
    for file in sorted(files):
        if not file.is_relative_to(folder):
            raise ModelError(
                f"{path} keeps external data outside its folder ({file.name})", "move the data beside the model"
            )
        if not file.is_file():
            raise ModelError(f"{path} keeps weights in {file.name}, which is not there", "put it beside the model")
    return sorted(files)
