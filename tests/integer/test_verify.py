"""``verify`` passes on what convert wrote, and catches a single changed bit wherever it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from quantcli import convert, verify
from quantcli.cli import run
from quantcli.recipe import Layers, Recipe
from tests.graphs import EVERYWHERE, data_for, node, normal, residual_net, save

Document = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted net with every arithmetic that has numbers in the sidecar."""
    folder = tmp_path_factory.mktemp("verify")
    constants = {
        "w1": normal(8, 3, 3, 3, seed=1, scale=0.3),
        "b1": normal(8, seed=2, scale=0.1),
        "w4": normal(10, 8, seed=6, scale=0.5),
    }
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        node("HardSwish", ["c"], ["h"]),
        node("Add", ["c", "h"], ["a"]),
        node("GlobalAveragePool", ["a"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w4"], ["l"], transB=1),
        node("Softmax", ["l"], ["y"]),
    ]
    model = save(folder / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, constants)
    convert(model, folder / "q.onnx", data=data_for(folder / "d.npz"), recipe=EVERYWHERE, verified=True)
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    for name in ("q.onnx", "q.json", "d.npz"):
        shutil.copyfile(written / name, tmp_path / name)
    return tmp_path


def test_what_convert_wrote_passes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify(copy / "q.json", copy / "d.npz")
    assert found.findings == []
    assert found.layers == 7
    assert found.elements > 16 * (3 + 8 + 8 + 8) * 64
    assert run(["verify", str(copy / "q.json"), "--data", str(copy / "d.npz"), "--batch", "4"]) == 0
    assert "7 layers" in capsys.readouterr().out  # in each of several batches


def layer(document: Document, name: str) -> Document:
    return next(entry for entry in document["layers"] if entry["name"] == name)


def bump(values: list[int], index: int = 0, by: int = 1) -> None:
    values[index] += by


def next_float(values: list[float]) -> None:
    """Move the first value to the next float32."""
    values[0] = float(np.nextafter(np.float32(values[0]), np.float32(np.inf)))


SIDECAR: dict[str, tuple[str, Callable[[Document], None]]] = {
    "multiplier": ("c_node", lambda d: bump(layer(d, "c_node")["multipliers"][0]["multiplier"], 3)),
    "multiplier of an operand": ("a_node", lambda d: bump(layer(d, "a_node")["multipliers"][1]["multiplier"])),
    "shift": ("l_node", lambda d: bump(layer(d, "l_node")["multipliers"][0]["shift"], 9)),
    "shift of a mean": ("g_node", lambda d: bump(layer(d, "g_node")["multipliers"][0]["shift"], by=-1)),
    "scale of an activation": ("c_node", lambda d: next_float(d["tensors"]["x"]["scale"])),
    "scale of a weight": ("l_node", lambda d: next_float(d["tensors"]["w4"]["scale"])),
    "scale of a bias": ("c_node", lambda d: next_float(d["tensors"]["b1"]["scale"])),
    "zero point": ("a_node", lambda d: bump(d["tensors"]["h"]["zero_point"])),
    "zero point of an output": ("y_node", lambda d: bump(d["tensors"]["y"]["zero_point"])),
    "clamp below": ("c_node", lambda d: bump(layer(d, "c_node")["clamp"])),
    "clamp above": ("l_node", lambda d: bump(layer(d, "l_node")["clamp"], 1, -1)),
    "table": ("h_node", lambda d: bump(layer(d, "h_node")["table"], 200, -1)),
    "exponentials": ("y_node", lambda d: bump(layer(d, "y_node")["table"], 0, -1)),
    "an operator": ("h_node", lambda d: layer(d, "h_node").update(operator="Sigmoid")),
    "rounding": ("c_node", lambda d: layer(d, "c_node").update(rounding="floor")),
    "axis of a weight": ("c_node", lambda d: d["tensors"]["w1"].update(axis=1)),
    "axis of a bias": ("c_node", lambda d: d["tensors"]["b1"].update(axis=3)),
    "lowest of a range": ("c_node", lambda d: d["tensors"]["x"].update(lo=[2 * d["tensors"]["x"]["lo"][0]])),
    "highest of a range": ("a_node", lambda d: next_float(d["tensors"]["h"]["hi"])),
    "type of a weight": ("l_node", lambda d: d["tensors"]["w4"].update(dtype="int16")),
    "type of an activation": ("a_node", lambda d: d["tensors"]["h"].update(dtype="int16")),
    "a dead channel that lives": ("c_node", lambda d: d["tensors"]["w1"].update(dead_channels=[3])),
    "integers that are not there": ("c_node", lambda d: d["tensors"]["x"].update(integers="other")),
    "reals that are not there": ("l_node", lambda d: d["tensors"]["w4"].update(reals="other")),
    "a tensor of no layer": ("", lambda d: d["tensors"].update(other={**d["tensors"]["x"], "integers": "other"})),
    "operator set": ("", lambda d: d.update(opset=d["opset"] + 1)),
}


@pytest.mark.parametrize("name", SIDECAR)
def test_a_change_in_the_sidecar_is_caught(copy: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    where, change = SIDECAR[name]
    document = json.loads((copy / "q.json").read_text())
    change(document)
    (copy / "q.json").write_text(json.dumps(document))
    assert run(["verify", str(copy / "q.json"), "--data", str(copy / "d.npz")]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"layer '{where}'" in lines[0] or not where
    assert "internal" not in lines[0]


def test_a_slope_that_is_not_the_models_is_caught(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("PRelu", ["c", "slopes"], ["y"])]
    constants = {"w": normal(4, 3, 1, 1, seed=1), "slopes": np.abs(normal(4, 1, 1, seed=2))}
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, constants)
    data = data_for(tmp_path / "d.npz")
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=EVERYWHERE, verified=True)
    changed = onnx.load(done.model)
    held = next(entry for entry in changed.graph.initializer if entry.name == "slopes")
    held.CopyFrom(numpy_helper.from_array(constants["slopes"] * np.float32(1.5), "slopes"))
    done.model.write_bytes(changed.SerializeToString())
    found = [finding.what for finding in verify(done.sidecar_path, data).findings if finding.layer == "y_node"]
    assert any(what.startswith("the multiplier") for what in found)


def test_an_order_that_float_operators_forbid_is_caught(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Elu", ["c"], ["f"]), node("Conv", ["f", "v"], ["y"])]
    constants = {"w": normal(8, 3, 3, 3, seed=1), "v": normal(8, 8, 3, 3, seed=2)}
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, constants)
    recipe = Recipe(layers=Layers(exclude=("f_node",), everywhere=True))
    done = convert(model, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=recipe, verified=True)
    document = json.loads(done.sidecar_path.read_text())
    assert [entry["name"] for entry in document["layers"]] == ["c_node", "y_node"]
    document["layers"].reverse()
    done.sidecar_path.write_text(json.dumps(document))
    (found,) = verify(done.sidecar_path).findings
    assert str(found) == "layer 'y_node': the sidecar has it before layer 'c_node', which has to run first"


MODEL = {
    "weight": ("w1_quantized", "c_node"),
    "bias": ("b1_quantized", "c_node"),
    "scale": ("a_scale", "g_node"),
    "scale of a weight": ("w4_scale", "l_node"),
    "zero point": ("h_zero_point", "a_node"),
}


@pytest.mark.parametrize("name", MODEL)
@pytest.mark.parametrize("bit", [0, 6])
def test_a_bit_in_the_model_is_caught(copy: Path, name: str, bit: int) -> None:
    constant, where = MODEL[name]
    model = onnx.load(copy / "q.onnx")
    tensor = next(entry for entry in model.graph.initializer if entry.name == constant)
    data = bytearray(numpy_helper.to_array(tensor).tobytes())
    data[0] ^= 1 << bit
    tensor.raw_data = bytes(data)
    (copy / "q.onnx").write_bytes(model.SerializeToString())
    found = verify(copy / "q.json", copy / "d.npz")
    assert "sha256" in found.findings[0].what
    assert where in {finding.layer for finding in found.findings}
    assert run(["verify", str(copy / "q.json"), "--data", str(copy / "d.npz")]) == 3


def test_convert_verifies_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    arguments = ["convert", str(model), "--data", str(data), "-o", str(tmp_path / "q.onnx"), "-q", "--verify"]
    monkeypatch.setattr(
        "quantcli.integer.layers.kernels.convolve", lambda x, w, _: np.zeros((len(x), len(w), 8, 8), np.int64)
    )
    assert run(arguments) == 3
    assert not (tmp_path / "q.onnx").exists()
    monkeypatch.undo()
    assert run(arguments) == 0
    assert (tmp_path / "q.onnx").exists()


def test_a_missing_model_is_told(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "q.onnx").unlink()
    assert run(["verify", str(copy / "q.json")]) == 1
    assert "not beside it" in capsys.readouterr().err


GONE: dict[str, Callable[[Document], object]] = {
    "a layer": lambda d: d["layers"].remove(layer(d, "h_node")),
    "all layers": lambda d: d["layers"].clear(),
    "the name of a layer": lambda d: layer(d, "h_node").update(name="other"),
}


@pytest.mark.parametrize("name", GONE)
def test_an_operator_that_the_sidecar_does_not_name_is_found(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    document = json.loads((copy / "q.json").read_text())
    GONE[name](document)
    (copy / "q.json").write_text(json.dumps(document))
    assert any(finding.layer == "h_node" for finding in verify(copy / "q.json", copy / "d.npz").findings)
    assert run(["verify", str(copy / "q.json"), "--data", str(copy / "d.npz")]) == 3
    assert "error: " in capsys.readouterr().err


UNCOMPUTED: dict[str, Callable[[Document], object]] = {
    "a shift far to the left": lambda d: bump(layer(d, "c_node")["multipliers"][0]["shift"], by=-80),
    "shifts of a sum too far apart": lambda d: bump(layer(d, "a_node")["multipliers"][0]["shift"], by=10**9),
    "a move of what moves nothing": lambda d: layer(d, "a_node").update(arithmetic="move"),
}


@pytest.mark.parametrize("name", UNCOMPUTED)
def test_what_cannot_be_computed_is_a_difference(copy: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    document = json.loads((copy / "q.json").read_text())
    UNCOMPUTED[name](document)
    (copy / "q.json").write_text(json.dumps(document))
    assert run(["verify", str(copy / "q.json"), "--data", str(copy / "d.npz")]) == 3
    assert "internal" not in capsys.readouterr().err


INCOHERENT: dict[str, tuple[str, Callable[[Document], object]]] = {
    "no multipliers": ("layer 'a_node' has 0 multipliers", lambda d: layer(d, "a_node")["multipliers"].clear()),
    "a multiplier short": (
        "layer 'c_node' has 7 multipliers, 8 shifts",
        lambda d: layer(d, "c_node")["multipliers"][0]["multiplier"].pop(),
    ),
    "no number": (
        "layer 'l_node' has 0 multipliers, 0 shifts",
        lambda d: layer(d, "l_node")["multipliers"][0].update(multiplier=[], shift=[], real=[]),
    ),
    "an operand that is none": (
        "a multiplier of 'other'",
        lambda d: layer(d, "a_node")["multipliers"][0].update(operand="other"),
    ),
    "an input that is no tensor": ("speaks of 'other'", lambda d: layer(d, "a_node")["inputs"].insert(0, "other")),
    "no output": ("has no inputs or no outputs", lambda d: layer(d, "a_node")["outputs"].clear()),
    "no clamp": ("has integers without a clamp", lambda d: layer(d, "a_node").update(clamp=None)),
    "a table cut short": ("has a table of 255 entries for 256", lambda d: layer(d, "h_node")["table"].pop()),
    "no table": ("layer 'h_node' has no table", lambda d: layer(d, "h_node").update(table=None)),
    "a layer twice": ("2 layers are named 'a_node'", lambda d: d["layers"].append(layer(d, "a_node"))),
    "no scale": ("tensor 'x' has 0 scales", lambda d: d["tensors"]["x"]["scale"].clear()),
    "no zero point": ("1 scales and 0 zero points", lambda d: d["tensors"]["x"]["zero_point"].clear()),
    "a grid the wrong way round": ("has a grid from 9 to 8", lambda d: d["tensors"]["x"].update(qmin=9, qmax=8)),
    "scales without an axis": ("8 scales and no axis", lambda d: d["tensors"]["w1"].update(axis=None)),
    "an axis of an activation": (
        "'x' has the axis 1, which no activation has",
        lambda d: d["tensors"]["x"].update(axis=1),
    ),
    "an axis from behind": ("'w1' has the axis -4, which none has", lambda d: d["tensors"]["w1"].update(axis=-4)),
    "a scale of zero": ("'x' has the scale 0", lambda d: d["tensors"]["x"].update(scale=[0.0])),
    "a zero point far off": ("'x' has a zero point beyond", lambda d: d["tensors"]["x"].update(zero_point=[256])),
    "a grid wider than its type": ("uint8 ends at 0 and 255", lambda d: d["tensors"]["x"].update(qmax=256)),
    "an activation's sha256": (
        "has a sha256, unlike others of role activation",
        lambda d: d["tensors"]["x"].update(sha256="0"),
    ),
    "no range": ("has 0 lo and 1 hi", lambda d: d["tensors"]["x"]["lo"].clear()),
    "a range upside down": ("lo is above its hi", lambda d: d["tensors"]["x"].update(lo=[9.0], hi=[8.0])),
    "fewer samples than none": ("seen in -1 samples", lambda d: d["tensors"]["x"].update(samples=-1)),
    "a dead channel of none": ("dead channels beyond", lambda d: d["tensors"]["w1"].update(dead_channels=[8])),
    "a dead activation": ("which no activation has", lambda d: d["tensors"]["x"].update(dead_channels=[0])),
    "grids of some channels": (
        "has 2 grids for 8",
        lambda d: d["tensors"]["w1"].update(grids={"bits": 8, "lowest": [-128] * 2}),
    ),
    "moved by too many": (
        "by 3 factors and 2 shifts",
        lambda d: d["tensors"]["x"].update(moved={"factor": [1.0] * 3, "shift": [0.0] * 2}),
    ),
    "the same as nothing": ("the same as 'other', which", lambda d: d["tensors"]["x"].update(same_as="other")),
    "the same as another": ("and has other parameters", lambda d: d["tensors"]["x"].update(same_as="h")),
    "one operand": ("has one input, of which sum", lambda d: layer(d, "a_node").update(inputs=["h"])),
    "a sum that stays real": (
        "an accumulator_scale, which rescale",
        lambda d: layer(d, "g_node").update(accumulator_scale=[1.0]),
    ),
    "a table too many": ("has a table, which accumulate", lambda d: layer(d, "c_node").update(table=[0] * 256)),
    "a weight for an output": ("makes 'w1', whose role is weight", lambda d: layer(d, "c_node").update(outputs=["w1"])),
    "a multiplier twice": (
        "2 multipliers of its acc",
        lambda d: layer(d, "c_node")["multipliers"].extend(layer(d, "c_node")["multipliers"]),
    ),
    "an output twice": (
        "which layer 'c_node' has made",
        lambda d: layer(d, "c_node")["outputs"].extend(layer(d, "c_node")["outputs"]),
    ),
    "layers the wrong way round": ("after it", lambda d: d["layers"].reverse()),
    "a layer that stays float": (
        "is said to stay float",
        lambda d: d["float_layers"].append({"name": "c_node", "operator": "Conv", "reason": ""}),
    ),
    "no calibration": ("mode static has no calibration", lambda d: d.update(calibration=None)),
    "a path for a name": ("'../q.onnx' is no file name", lambda d: d["model"].update(name="../q.onnx")),
}


@pytest.mark.parametrize("name", INCOHERENT)
def test_a_sidecar_that_contradicts_itself_is_refused(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    what, change = INCOHERENT[name]
    document = json.loads((copy / "q.json").read_text())
    change(document)
    (copy / "q.json").write_text(json.dumps(document))
    for command in (["verify", str(copy / "q.json")], ["lint", str(copy / "q.json"), "--target", "tflite"]):
        assert run(command) == 1
        error = capsys.readouterr().err
        assert "contradicts itself" in error
        assert what in error
