"""Load an ONNX file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


def load_onnx(path: Path) -> tuple[ir.Model, list[Path]]:
    """Return the model and the files that it is made of (the file itself, then its external data).

    Raises:
        ModelError: If the file is not an ONNX model, is cut short, or names external data outside its folder.
    """
    try:
        model = ir.load(path)
    except Exception as error:
        raise ModelError(f"{path} is not an ONNX model, or is cut short", "export or copy it again") from error
    if not model.opset_imports or model.graph.num_nodes() == 0:
        raise ModelError(f"{path} holds no model: it has no operators", "export it again")
    return model, [path, *external_files(model, path)]


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
