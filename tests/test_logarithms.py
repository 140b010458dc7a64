"""A front-end of convolutions whose spectrum a logarithm is taken of stays float; the network behind it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, Recipe, convert
from quantcli.logarithms import REASON
from quantcli.recipe import Layers, Tune
from tests.graphs import Array, node, normal, save

BINS, LENGTH = 8, 32
TARGETS = ["ort-x86", "npu-int8"]


def spectrum() -> Array:
    """Return the cosines and sines of a short-time Fourier transform, (2·bins, 1, length)."""
    angle = 2 * np.pi * np.outer(np.arange(BINS), np.arange(LENGTH)) / LENGTH
    return (np.concatenate([np.cos(angle), np.sin(angle)])[:, None] * np.hanning(LENGTH)).astype(np.float32)


def tones() -> Array:
    """Return tones of one bin each in noise that is 60 dB below them, (samples, 1, time)."""
    time = np.arange(8 * LENGTH) / LENGTH
    return np.stack([np.sin(2 * np.pi * k * time) for k in (1, 2, 3, 5)] * 4)[:, None].astype(np.float32) + normal(
        16, 1, 8 * LENGTH, seed=1, scale=1e-3
    )


def front_end(folder: Path, target: str, include: tuple[str, ...] = ()) -> tuple[Conversion, float]:
    """Convert log(S·(re² + im²) + 1e-8) and a convolution of it; return that and the SQNR in dB, of what differs between places."""
    nodes = [
        node("Conv", ["x", "stft"], ["parts"], strides=[LENGTH // 2]),
        node("Split", ["parts", "halves"], ["re", "im"], axis=1),
        node("Mul", ["re", "re"], ["rr"]),
        node("Mul", ["im", "im"], ["ii"]),
        node("Add", ["rr", "ii"], ["power"]),
        node("MatMul", ["bands", "power"], ["banded"]),
        node("Add", ["banded", "floor"], ["floored"]),
        node("Log", ["floored"], ["level"]),
        node("Conv", ["level", "w"], ["y"]),
    ]
    constants: dict[str, Array] = {
        "stft": spectrum(),
        "halves": np.array([BINS, BINS]),
        "bands": np.repeat(np.eye(BINS // 2, dtype=np.float32), 2, axis=1),
        "floor": np.array(1e-8, np.float32),
        "w": normal(4, BINS // 2, 3, seed=3),
    }
    x = tones()
    model = save(folder / "m.onnx", nodes, {"x": ["N", 1, 8 * LENGTH]}, {"y": None}, constants)
    np.savez(folder / "d.npz", x=x)
    recipe = Recipe(target=target, tune=Tune(effort="fast"), layers=Layers(include=include))
    done = convert(model, folder / "q.onnx", data=folder / "d.npz", recipe=recipe)
    y = Runner(model).run({"x": x})["y"]
    error = Runner(done.model).run({"x": x})["y"] - y
    return done, 10 * float(np.log10(y.var() / np.square(error).mean()))


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_logarithm_is_taken_of_stays_float(tmp_path: Path, target: str) -> None:
    done, sqnr = front_end(tmp_path, target)
    assert [layer.name for layer in done.plan.layers] == ["y_node"]
    reasons = {layer.name: layer.reason for layer in done.plan.floats}
    assert {name for name, reason in reasons.items() if reason == REASON} == {
        f"{name}_node" for name in ("parts", "rr", "ii", "power", "banded", "floored")
    }
    named, lower = front_end(tmp_path, target, ("parts_node", "y_node"))  # the recipe may ask for it all the same
    assert [layer.name for layer in named.plan.layers] == ["parts_node", "y_node"]
    assert sqnr > lower + 20


@pytest.mark.parametrize("target", TARGETS)
def test_of_a_learned_network_the_last_layer_alone(tmp_path: Path, target: str) -> None:
    nodes = [
        node("Conv", ["x", "v"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w"], ["c"]),
        node("Relu", ["c"], ["d"]),
        node("Add", ["d", "floor"], ["e"]),
        node("Log", ["e"], ["y"]),
    ]
    constants = {"v": normal(4, 2, 3, seed=1), "w": normal(4, 4, 3, seed=2), "floor": np.array(1e-3, np.float32)}
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 2, 16]}, {"y": None}, constants)
    np.savez(tmp_path / "d.npz", x=normal(8, 2, 16, seed=3))
    done = convert(
        model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(target=target, tune=Tune(effort="fast"))
    )
    assert [layer.name for layer in done.plan.layers] == ["a_node"]
    assert [layer.name for layer in done.plan.floats if layer.reason == REASON] == ["c_node", "d_node", "e_node"]
