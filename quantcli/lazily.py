"""Imports that wait until they are needed: what a library loads at once, and a command hardly ever has a use for.

onnx_ir computes with symbolic sizes through sympy, which takes as long to import as everything else together.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

# The second one takes functions out of the first as it is loaded. Neither is missed where another version has no such module.
WAITING = frozenset({"sympy", "onnx_ir._symbolic_shapes"})


class LateFinder:
    """Finds the modules that wait as Python's own finder does, and has them loaded when they are first asked for something."""

    def find_spec(self, name: str, path: Sequence[str] | None, _target: object = None) -> ModuleSpec | None:
        """Return how a module is loaded; None where it is not one of those that wait."""
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in WAITING else None
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


def import_late() -> None:
    """Let these modules be imported late in this process: for a command, whose process is its own."""
    if not any(isinstance(finder, LateFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LateFinder())
