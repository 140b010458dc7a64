"""A sidecar in other tools' formats, read back: nothing is lost on the way."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from quantcli import Recipe, convert
from quantcli import sidecar as sidecar_file
from quantcli.cli import run
from quantcli.cli.export import FORMATS
from quantcli.errors import ModelError
from quantcli.export import EXPORTS
from quantcli.recipe import Layers, Tune, Weight
from quantcli.sidecar import Sidecar
from tests.graphs import data_for, node, normal, residual_net, save


@pytest.fixture(scope="module", params=["ort-x86", "npu-int16", "tflite"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    recipe = Recipe(target=request.param, tune=Tune(effort="fast"), layers=Layers(everywhere=True))
    convert(residual_net(folder / "m.onnx"), folder / "q.onnx", data=data_for(folder / "d.npz"), recipe=recipe)
    return folder / "q.json"


def exported(written: Path, form: str) -> tuple[Sidecar, Any]:
    output = written.with_name(f"out.{form}")
    assert run(["export", str(written), "--to", form, "-o", str(output), "-q"]) == 0
    content = output.read_text()
    return sidecar_file.read(written), content if form == "csv" else json.loads(content)


def test_aimet_1(written: Path) -> None:
    sidecar, document = exported(written, "aimet-1.0.0")
    found = {one["name"]: one for one in (*document["activation_encodings"], *document["param_encodings"])}
    expected = {name: tensor for name, tensor in sidecar.tensors.items() if tensor.role != "bias"}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        one = found[name]
        lowest = -(1 << (one["bw"] - 1)) if one["is_sym"] else 0
        assert [lowest - offset for offset in one["offset"]] == tensor.zero_point
        assert one["scale"] == tensor.scale
        assert (one["enc_type"] == "PER_CHANNEL") == (tensor.axis is not None)
        assert one["is_sym"] == tensor.dtype.startswith("int")
        assert (1 << one["bw"]) >= tensor.qmax - tensor.qmin + 1 > 1 << (one["bw"] - 1)
    assert {one["name"] for one in document["param_encodings"]} == {"w1", "w2", "w3", "w4"}


def test_aimet_2(written: Path) -> None:
    sidecar, document = exported(written, "aimet-2.0.0")
    assert document["version"] == "2.0.0"
    for one in document["encodings"]:
        tensor = sidecar.tensors[one["name"]]
        scale = one["y_scale"] if isinstance(one["y_scale"], list) else [one["y_scale"]]
        zero = one.get("y_zero_point", [0] * len(scale) if tensor.axis is not None else 0)
        assert scale == tensor.scale
        assert (zero if isinstance(zero, list) else [zero]) == tensor.zero_point
        assert one.get("axis") == tensor.axis
        assert one["output_dtype"] == tensor.dtype


@pytest.mark.parametrize("form", EXPORTS)
def test_what_speaks_of_the_float_model_refuses_tensors_that_are_not_its(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    document = json.loads(written.read_text())
    next(iter(document["tensors"].values()))["moved"] = {"factor": [1.25], "shift": [0.0]}
    (tmp_path / "q.json").write_text(json.dumps(document))
    of_float = form in {"aimet-1.0.0", "aimet-2.0.0", "ort-overrides"}
    assert run(["export", str(tmp_path / "q.json"), "--to", form, "-o", str(tmp_path / "out.txt"), "-q"]) == int(
        of_float
    )
    assert ("centre = false" in capsys.readouterr().err) == of_float
    assert (tmp_path / "out.txt").exists() != of_float


def test_onnx_runtime_quantizes_by_the_overrides(written: Path, tmp_path: Path) -> None:
    """ONNX Runtime's own quantizer, given nothing but the overrides, writes the sidecar's scales and zero points."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    sidecar, document = exported(written, "ort-overrides")
    if sidecar.target.activation.dtype == "int16":
        pytest.skip("ONNX Runtime's quantizer mixes no int16 activations with int8 weights by overrides alone")
    types = {"QInt8": np.int8, "QUInt8": np.uint8}
    for name, ones in document.items():
        tensor = sidecar.tensors[name]
        assert [one["scale"] for one in ones] == tensor.scale
        assert [one["zero_point"] for one in ones] == tensor.zero_point
        assert ones[0].get("axis") == tensor.axis
        for one in ones:
            kind = one["quant_type"]
            one |= {"quant_type": QuantType[kind], "scale": np.array(one["scale"], np.float32)}
            one["zero_point"] = np.array(one["zero_point"], types[kind])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([{"x": np.load(written.with_name("d.npz"))["x"][:2]}])

        def get_next(self) -> Any:
            return next(self.left, None)

    activation = QuantType.QUInt8 if sidecar.target.activation.dtype == "uint8" else QuantType.QInt8
    quantize_static(
        str(written.with_name("m.onnx")),
        str(tmp_path / "q.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=activation,
        weight_type=QuantType.QInt8,
        extra_options={"TensorQuantOverrides": document},
    )
    held = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(tmp_path / "q.onnx").graph.initializer}
    compared = 0
    for name in document:
        if f"{name}_scale" in held:
            scale = np.array(sidecar.tensors[name].scale, np.float32)
            assert np.array_equal(np.atleast_1d(held[f"{name}_scale"]), scale)
            assert set(np.atleast_1d(held[f"{name}_zero_point"]).tolist()) == set(sidecar.tensors[name].zero_point)
            compared += 1
    assert compared >= 8


def test_tflite(written: Path) -> None:
    sidecar, document = exported(written, "tflite")
    assert [one["name"] for one in document] == list(sidecar.tensors)
    for one in document:
        tensor, found = sidecar.tensors[one["name"]], one["quantization_parameters"]
        assert (found["scales"], found["zero_points"]) == (tensor.scale, tensor.zero_point)
        assert found["quantized_dimension"] == (tensor.axis or 0)


def test_csv(written: Path) -> None:
    sidecar, content = exported(written, "csv")
    rows = list(csv.DictReader(content.splitlines()))
    for name, tensor in sidecar.tensors.items():
        own = [row for row in rows if row["name"] == name and row["kind"] == tensor.role]
        assert [float(row["scale"]) for row in own] == tensor.scale
        assert {(int(row["qmin"]), int(row["qmax"]), row["dtype"]) for row in own} == {
            (tensor.qmin, tensor.qmax, tensor.dtype)
        }
    for layer in sidecar.layers:
        own = [row for row in rows if row["name"] == layer.name and row["kind"] == "layer"]
        found = [(row["operand"], int(row["multiplier"]), int(row["shift"])) for row in own if row["multiplier"]]
        assert found == [
            (one.operand or "", multiplier, shift)
            for one in layer.multipliers
            for multiplier, shift in zip(one.multiplier, one.shift, strict=True)
        ]
        assert {row["rounding"] for row in own} == {layer.rounding}


def test_formats_are_those_of_the_command_line() -> None:
    assert set(FORMATS) == {*EXPORTS, "c-params"}


def test_narrow_weights_keep_their_width(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    for symmetric, expected in ((True, "int4"), (False, "uint4")):
        weight = Weight(bits=4, symmetric=symmetric)
        recipe = Recipe(tune=Tune(effort="fast"), weight=weight, layers=Layers(everywhere=True))
        convert(model, tmp_path / "q.onnx", data=data, recipe=recipe)
        _, document = exported(tmp_path / "q.json", "aimet-2.0.0")
        assert {one["output_dtype"] for one in document["encodings"] if one["name"].startswith("w")} == {expected}


def test_what_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save(
        tmp_path / "m.onnx",
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": ["N", 64]},
        {"y": ["N", 32]},
        {"w": normal(64, 32)},
    )
    convert(model, tmp_path / "q.onnx", recipe=Recipe(mode="weights", weight=Weight(bits=4, block_size=16)))
    sidecar = sidecar_file.read(tmp_path / "q.json")
    for form in ("aimet-1.0.0", "aimet-2.0.0", "ort-overrides"):
        with pytest.raises(ModelError, match="is in blocks"):
            EXPORTS[form](sidecar)
    assert run(["export", str(model), "--to", "csv", "-o", str(tmp_path / "x.csv")]) == 1
    assert "is not a sidecar" in capsys.readouterr().err
    assert run(["export", str(tmp_path / "q.json"), "--to", "csv", "-o", str(tmp_path / "q.json")]) == 2
