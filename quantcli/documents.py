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
    """Return a document as JSON text; bytes of names that are no UTF-8 are escaped."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def encodable(text: str) -> str:
    """Return text with bytes that are no UTF-8, as names of files may hold them, written out."""
    return text.encode(errors="backslashreplace").decode()
