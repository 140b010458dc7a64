"""Layers for which ONNX Runtime finds no integer kernel, and the Clip of integers where one of reals would keep it from one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, convert
from quantcli.cli import run
from quantcli.evaluation import check
from quantcli.evaluation.unfused import unfused
from quantcli.fold import fold
from quantcli.load import load
from quantcli.probe import model_bytes
from quantcli.recipe import Activation, Recipe, Tune
from tests.graphs import node, normal, save

FAST = Tune(effort="fast")


def clipped(folder: Path, low: float = 0.0) -> Path:
    """Two convolutions with a Clip between them, and data for it."""
    constants = {
        "w": normal(6, 3, 3, 3, seed=1, scale=0.3),
        "v": normal(4, 6, 1, 1, seed=2, scale=0.3),
        "low": np.array(low, np.float32),
        "high": np.array(1.5, np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Clip", ["a", "low", "high"], ["c"]),
        node("Conv", ["c", "v"], ["y"]),
    ]
    np.savez(folder / "d.npz", x=normal(16, 3, 9, 9, seed=3))
    return save(folder / "m.onnx", nodes, {"x": ["N", 3, 9, 9]}, {"y": None}, constants)


def clips(path: Path) -> list[onnx.NodeProto]:
    return [one for one in onnx.load(path).graph.node if one.op_type == "Clip"]


def integers_of(done: Conversion, name: str, x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> set[int]:
    """Return which integers of a tensor ONNX Runtime gives."""
    model, stored = onnx.load(done.model), done.sidecar.tensors[name].integers
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(stored))
    values = Runner(model.SerializeToString()).run({"x": x}, [stored])[stored]
    assert values.dtype == np.uint8
    return set(values.ravel().tolist())


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_activations_of_fewer_bits_are_computed_in_integers(tmp_path: Path, bits: int, form: str) -> None:
    recipe = Recipe(activation=Activation(bits=bits), tune=FAST)
    model = clipped(tmp_path)
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe, form=form, verified=True)
    assert done.check.unfused == ()
    assert {one.input[0].removesuffix("_saturated") for one in clips(done.model)} == {"x", "c", "y"}
    given = integers_of(done, "c", normal(16, 3, 9, 9, seed=4, scale=3.0))  # further than what was calibrated
    assert (min(given), max(given)) == (0, 2**bits - 1)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_what_a_clip_lets_through_within_its_grid_is_clipped_in_integers(tmp_path: Path, form: str) -> None:
    """A grid holds zero, and so reaches below a Clip from 0.5 on."""
    model, recipe = clipped(tmp_path, 0.5), Recipe(tune=FAST)
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe, form=form, verified=True)
    held = done.sidecar.tensors["c"]
    low = round(0.5 / np.float64(held.scale[0]))
    assert done.check.unfused == ()
    assert done.plan.layers[0].clamp == (low, 255)
    given = integers_of(done, "c", normal(16, 3, 9, 9, seed=4, scale=3.0))
    assert (min(given), max(given)) == (low, 255)
    assert min(done.check.sqnr.values()) > 30


def test_accelerators_keep_the_clip_on_reals(tmp_path: Path) -> None:
    """What their tools read stands between QuantizeLinear and DequantizeLinear."""
    recipe = Recipe(target="npu-int8", activation=Activation(bits=4), tune=FAST)
    done = convert(clipped(tmp_path), tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe, verified=True)
    made = {one.input[0] for one in onnx.load(done.model).graph.node if one.op_type == "QuantizeLinear"}
    assert made == {"x_on_grid", "c_on_grid", "y_on_grid"}


def test_narrow_integers_become_reals_again(tmp_path: Path) -> None:
    recipe = Recipe(activation=Activation(bits=4), tune=FAST)
    done = convert(clipped(tmp_path), tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe)
    again = fold(load(done.model).graph, requantize=True)
    assert {one.op_type for one in again.graph} == {"Conv", "Clip"}
    x = normal(16, 3, 9, 9, seed=4, scale=3.0)
    narrow = Runner(model_bytes(again)).run({"x": x})["y"]
    held = done.sidecar.tensors["y"]
    assert narrow.max() <= np.float32((15 - held.zero_point[0]) * held.scale[0])


def test_layers_in_float_are_told_by_the_optimized_graph(tmp_path: Path) -> None:
    """A graph in which nothing is fused is the float model itself."""
    model = clipped(tmp_path)
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(tune=FAST))
    assert unfused(model, done.sidecar) == ("a_node", "y_node")
    assert unfused(done.model, done.sidecar) == ("a_node", "y_node")  # before ONNX Runtime fuses anything


def test_convert_names_layers_in_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "unfused", lambda *_: ("a_node", "y_node"))
    asked = ["convert", str(clipped(tmp_path)), "--data", str(tmp_path / "d.npz"), "--effort", "fast", "-o"]
    assert run([*asked, str(tmp_path / "q.onnx")]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "computes 2 of the integer layers in float, no faster than the float model: a_node, y_node" in told
    assert run([*asked, str(tmp_path / "q.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["self_check"]["unfused"] == ["a_node", "y_node"]


def test_without_room_for_temporary_files_nothing_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    done = convert(clipped(tmp_path), tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(tune=FAST))
    assert done.check.unfused == ()
    assert min(done.check.sqnr.values()) > 30
