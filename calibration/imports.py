"""Code of the user's, which is imported by name or as a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType


def imported(place: str) -> ModuleType:
    """Import a module by its name, or a ``.py`` file under its own."""
    file = Path(place)
    if file.suffix != ".py":
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018 - a .py file has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
