"""Load a saved float model, whatever its kind, as an `onnx_ir.Model`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

PICKLES = frozenset({".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin"})


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A float model as it was saved.

    Attributes:
        graph: The model. It is not changed after loading.
        runnable: What ONNX Runtime is given to run it: its file, or the bytes of its exported form.
        sha256: The digest of the file (and of its external data).
        size: The bytes of the file (and of its external data).
        name: The file's name, without its folder.
        files: The files that it is made of.
    """

    graph: ir.Model
    runnable: Path | bytes
    sha256: str
    size: int
    name: str
    files: tuple[Path, ...]


def load(path: Path) -> LoadedModel:
    """Load an ``.onnx`` or ``.pt2`` file.

    Raises:
        ModelError: If there is no such file, it is of no known kind, or it cannot be loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"there is no model at {path}", "give a .onnx or .pt2 file")
    if path.suffix == ".onnx":
        from quantcli.load import onnx

        graph, files = onnx.load_onnx(path)
        return LoadedModel(
            graph, path, digest_of(files), sum(f.stat().st_size for f in files), shown_name(path), tuple(files)
        )
    if path.suffix == ".pt2":
        from quantcli.load import torch

        graph, exported = torch.load_pt2(path)
        return LoadedModel(graph, exported, digest_of([path]), path.stat().st_size, shown_name(path), (path,))
    if path.suffix in PICKLES:
        raise ModelError(
            f"{path} is a pickle, which runs code when it is loaded, and no consent to that can be given yet",
            "save the model with torch.export.save (.pt2) or torch.onnx.export (.onnx)",
        )
    raise ModelError(f"{path} is of no known kind of model", "give a .onnx or .pt2 file")


def shown_name(path: Path) -> str:
    """Return a file's name as text; bytes of it that are no UTF-8 become a replacement character."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def digest_of(files: list[Path]) -> str:
    """Return the sha256 over the bytes of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
