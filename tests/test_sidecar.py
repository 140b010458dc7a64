"""The sidecar: its schema, its truth against the written model, its bytes, and a golden copy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, Recipe, convert, sidecar
from quantcli.arithmetic.affine import IntegerType, quantize
from quantcli.errors import ModelError
from quantcli.recipe import Layers, Tune
from tests.graphs import data_for, normal, residual_net

FAST = Recipe(tune=Tune(effort="fast"))
GOLDEN = Path(__file__).parent / "golden" / "residual.json"


@pytest.fixture
def document(residual: Conversion) -> dict[str, Any]:
    return json.loads(residual.sidecar_path.read_text())  # type: ignore[no-any-return]


def test_it_is_valid_and_the_schema_bites(document: dict[str, Any]) -> None:
    schema = json.loads(sidecar.SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    document["layers"][0]["surprise"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_it_reads_back(residual: Conversion) -> None:
    assert sidecar.read(residual.sidecar_path) == residual.sidecar
    assert sidecar.encode(residual.sidecar) == residual.sidecar_path.read_bytes()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": "something"}')
    with pytest.raises(ModelError, match="not a sidecar"):
        sidecar.read(tmp_path / "other.json")


def test_of_a_model_its_sidecar_is_named(residual: Conversion) -> None:
    with pytest.raises(ModelError) as caught:
        sidecar.read(residual.model)
    assert f"give its sidecar, {residual.sidecar_path}" in str(caught.value)


def test_it_is_bound_to_both_models(document: dict[str, Any], residual: Conversion) -> None:
    folder = residual.model.parent
    for entry, file in (("float_model", folder / "net.onnx"), ("model", residual.model)):
        assert document[entry] == {
            "name": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "bytes": file.stat().st_size,
        }


def test_it_says_what_the_model_holds(document: dict[str, Any], residual: Conversion) -> None:
    """Every scale, zero point and constant of the model is the one that the sidecar states, and none is missing."""
    graph = onnx.load(residual.model).graph
    stored = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    integers = {output: n for n in graph.node if n.op_type == "QuantizeLinear" for output in n.output}
    reals = {n.input[0]: n for n in graph.node if n.op_type == "DequantizeLinear"}
    assert len(document["tensors"]) == len(reals)
    for name, entry in document["tensors"].items():
        dequantize = reals[entry["integers"]]
        assert dequantize.output[0] == entry["reals"]
        scale = stored[dequantize.input[1]]
        assert scale.dtype == np.float32
        assert scale.reshape(-1).tolist() == entry["scale"]
        if len(dequantize.input) > 2:
            assert stored[dequantize.input[2]].reshape(-1).tolist() == entry["zero_point"]
            assert stored[dequantize.input[2]].dtype == entry["dtype"]
        if entry["role"] == "activation":
            assert integers[entry["integers"]].input[1:] == dequantize.input[1:]
        else:
            assert stored[entry["integers"]].dtype == entry["dtype"]
        assert name in ({entry["reals"]} | {entry["integers"].removesuffix("_quantized")})


def test_weights_are_quantized_by_the_stated_rule(document: dict[str, Any], residual: Conversion) -> None:
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(residual.model).graph.initializer}
    weight = normal(8, 3, 3, 3, seed=1, scale=0.3)
    entry = document["tensors"]["w1"]
    grid = IntegerType("int8", narrow=True)
    expected = quantize(
        weight, np.array(entry["scale"], np.float32), np.array(entry["zero_point"]), grid, entry["axis"]
    )
    assert (stored["w1_quantized"] == expected).all()
    assert (np.abs(expected.astype(int)).reshape(8, -1).max(axis=1) == 127).all()
    bias, scale = normal(8, seed=2, scale=0.1).astype(np.float64), np.array(document["tensors"]["b1"]["scale"])
    assert (stored["b1_quantized"] == np.rint(bias / scale)).all()


def test_same_command_same_bytes(tmp_path: Path, net: Path) -> None:
    data = data_for(tmp_path / "d.npz")
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        done = convert(net, tmp_path / name / "q.onnx", data=data)
        files.append((done.model.read_bytes(), done.sidecar_path.read_bytes()))
    assert files[0] == files[1]


def test_names_survive(tmp_path: Path, net: Path) -> None:
    done = convert(net, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=FAST)
    graph = onnx.load(done.model).graph
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output] == ["y"]
    assert {"r1", "r2", "c3", "r3", "g", "f"} <= {output for n in graph.node for output in n.output}


def test_what_stays_float_is_recorded(tmp_path: Path, net: Path) -> None:
    recipe = Recipe(layers=Layers(exclude=("c2_node",)))
    done = convert(net, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=recipe)
    assert [(f.name, f.reason) for f in done.sidecar.float_layers] == [
        ("c2_node", "excluded by 'c2_node'"),
        ("r2_node", "an island: its operands are float, and it alone is not worth quantizing them"),
    ]
    assert done.check.sqnr["y"] > 20


def test_integers_in_the_runtime_are_those_of_the_quantize_rule(residual: Conversion) -> None:
    """The input's integers, asked from ONNX Runtime, equal equation 5 with ==."""
    model = onnx.load(residual.model)
    model.graph.output.append(onnx.helper.make_tensor_value_info("x_quantized", onnx.TensorProto.UINT8, None))
    x = normal(4, 3, 8, 8, seed=30, scale=2.0)
    found = Runner(model.SerializeToString()).run({"x": x}, ["x_quantized"])["x_quantized"]
    entry = residual.sidecar.tensors["x"]
    expected = quantize(
        x, np.array(entry.scale, np.float32), np.array(entry.zero_point), IntegerType(entry.dtype), None
    )
    # ONNX Runtime divides in float32, equation 5 in float64: they may part where the quotient lies on a tie.
    quotient = x.astype(np.float64) / entry.scale[0]
    on_a_tie = np.abs(np.abs(quotient - np.floor(quotient)) - 0.5) < np.abs(quotient) * 2.0**-23
    assert (found[~on_a_tie] == expected[~on_a_tie]).all()
    assert on_a_tie.mean() < 0.01


def test_the_golden_sidecar(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A stored copy, digests aside (they depend on the versions of the libraries that write ONNX)."""
    model = residual_net(tmp_path / "net.onnx")
    done = convert(model, tmp_path / "net.int8.onnx", data=data_for(tmp_path / "d.npz", samples=4), recipe=FAST)
    found = json.loads(done.sidecar_path.read_text())
    for entry in ("float_model", "model"):
        found[entry] = {"name": found[entry]["name"]}
    text = json.dumps(found, indent=1) + "\n"
    if request.config.getoption("--regenerate"):
        GOLDEN.write_text(text)
    assert_same(found, json.loads(GOLDEN.read_text()), "sidecar")


def assert_same(found: Any, stored: Any, where: str) -> None:
    """Assert that two documents are the same, reals and M0 up to what float kernels differ by between processors.

    A range comes from sums of at most 72 float32 products; another order of summation moves one by 72·2^-24 of its terms'
    magnitudes, which 2^-14 bounds with room for the layers before it.
    """
    if isinstance(stored, dict):
        assert found.keys() == stored.keys(), where
        for key, entry in stored.items():
            assert_same(found[key], entry, f"{where}.{key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), where
        for number, (one, other) in enumerate(zip(found, stored, strict=True)):
            assert_same(one, other, f"{where}[{number}]")
    elif isinstance(stored, float) or ".multiplier[" in where:
        assert abs(found - stored) <= 2.0**-14 * abs(stored), where
    else:
        assert found == stored, where
