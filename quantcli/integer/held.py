"""A quantized model that is to be compared with its sidecar, and the digest of what it is stored in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from quantcli.load import load

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, eq=False)
class Held:
    """A quantized model.

    Attributes:
        model: The model.
        sha256: The digest of its file, and of the file of weights beside it.
    """

    model: ir.Model
    sha256: str

    @classmethod
    def of_bytes(cls, content: bytes) -> Held:
        """Return the model of a file's bytes."""
        import onnx

        return cls(ir.from_proto(onnx.load_from_string(content)), hashlib.sha256(content).hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> Held:
        """Return the model of a file; weights beside it are mapped into memory.

        Raises:
            ModelError: If it cannot be loaded.
        """
        loaded = load(path)
        return cls(loaded.graph, loaded.sha256)
