"""Commands that work, and what is said and left where one does not."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

CALIBRATE = "calibrate model.onnx --data data.npz -o new.stats"
CONVERT = "convert model.onnx --data data.npz --target native --effort fast -o new.onnx"
EVAL = "eval q.onnx --data labelled.npz --no-latency"
MAIN = [sys.executable, "-c", "from quantcli.cli import main; main()"]


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def without_estimate(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if not line.startswith("calibrating ")]


def the_line(errors: str) -> str:
    """Return the one line of standard error, after checking that it is the only one but for what calibration expects to take."""
    lines = without_estimate(errors)
    assert len(lines) == 1, errors
    return lines[0]
