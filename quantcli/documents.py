"""JSON documents for machines."""

from __future__ import annotations

import json
import math
from typing import Any


def finite(value: Any) -> Any:
    """Return a JSON value whose infinities and NaN, which JSON does not know, are null."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: Any) -> bytes:
    """Return a document as JSON text."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
