"""What tests of the commands share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from quantcli.cli import run

PIXELS = ["--scale", "0.00392156862745098", "--mean", "0.1307", "--std", "0.3081", "--layout", "NCHW"]
COMMANDS = ["calibrate", "convert", "eval", "demo"]

# What eval prints, but for the latency, which differs from run to run.
FIELDS = [
    "metric",
    "samples",
    "quantized",
    "float",
    "drop",
    "sqnr_db",
    "parts_db",
    "bytes",
    "memory",
    "float_bytes",
    "latency",
    "kernels",
    "layers",
]


def normalized(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what PIXELS asks for, every operation in float32."""
    scaled = images.astype(np.float32)[:, None] * np.float32(0.00392156862745098)
    return np.asarray((scaled - np.float32(0.1307)) / np.float32(0.3081))


def strict_json(text: str) -> Any:
    """Read JSON that holds no NaN and no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def done(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a command that is to succeed without a word on standard error, and return its JSON."""
    assert run([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return strict_json(captured.out)


def pair(output: Path | str) -> tuple[bytes, bytes]:
    return Path(output).read_bytes(), Path(output).with_suffix(".json").read_bytes()


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


EVAL = ["eval", "kit/q.onnx", "--float", "kit/model.onnx", "--data", "kit/eval.npz", "--recipe", "kit/recipe.toml"]

CONVERT = ["convert", "kit/model.onnx", "--stats", "kit/s.stats", "--target", "native", "-o", "q.onnx"]

MODELS = ("kit/model.onnx", "kit/q.onnx")


def outputs(model: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def sqnr(reference: NDArray[Any], result: NDArray[Any]) -> float:
    a, b = reference.astype(np.float64), result.astype(np.float64)
    return float(10 * np.log10(np.square(a).sum() / np.square(a - b).sum()))
