"""The QOperator form gives, integer for integer, what the QDQ form gives, from the same plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.cli import run
from quantcli.integer_operators import INTEGER_OPERATORS, REAL_OPERATORS
from quantcli.recipe import Layers, Tune
from quantcli.rules import RULES
from quantcli.write.onnx_qoperator import MOVES
from tests.graphs import EVERYWHERE, data_for, node, normal, residual_net, save
from tests.integer.test_layers import CASES


@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "where it pays"])
@pytest.mark.parametrize("name", CASES)
def test_both_forms_give_the_same(tmp_path: Path, name: str, everywhere: bool) -> None:
    recipe = Recipe(layers=Layers(everywhere=everywhere), tune=Tune(effort="fast"))
    nodes, constants, opset = CASES[name]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"o": None}, constants, opset=opset)
    x = normal(6, 3, 8, 8, seed=5)
    np.savez(tmp_path / "d.npz", x=x)
    results, kinds = [], []
    for form in ("qdq", "qoperator"):
        done = convert(model, tmp_path / f"{form}.onnx", data=tmp_path / "d.npz", recipe=recipe, form=form)
        found = verify(done.sidecar_path, tmp_path / "d.npz")
        assert (found.findings, found.layers) == ([], len(done.sidecar.layers))
        results.append(Runner(done.model).run({"x": x})["o"])
        kinds.append({n.op_type for n in onnx.load(done.model).graph.node})
    assert (results[0] == results[1]).all()
    for layer in done.plan.layers:
        table = INTEGER_OPERATORS if layer.accumulator_scale is None else REAL_OPERATORS
        if layer.operator in table:
            assert layer.operator not in kinds[1]
            assert table[layer.operator].name in kinds[1]
    assert not everywhere or done.plan.floats == ()


def test_a_whole_net_is_integer_from_edge_to_edge(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    assert (
        run(
            [
                *("convert", str(model), "--data", str(data), "-o", str(tmp_path / "q.onnx"), "-q", "--everywhere"),
                *("--format", "qoperator"),
            ]
        )
        == 0
    )
    kinds = [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node]
    assert kinds == [
        "QuantizeLinear", "QLinearConv", "QLinearConv", "QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "Flatten",
        "QGemm", "DequantizeLinear",
    ]  # fmt: skip
    other = convert(model, tmp_path / "qdq.onnx", data=data, recipe=EVERYWHERE)
    x = normal(4, 3, 8, 8, seed=40)
    assert (Runner(tmp_path / "q.onnx").run({"x": x})["y"] == Runner(other.model).run({"x": x})["y"]).all()


@pytest.mark.parametrize("name", CASES)
def test_layers_of_16_bits_stay_between_q_and_dq(tmp_path: Path, name: str) -> None:
    """ONNX has integer operators for 8 bits alone."""
    nodes, constants, opset = CASES[name]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"o": None}, constants, opset=opset)
    np.savez(tmp_path / "d.npz", x=normal(6, 3, 8, 8, seed=5))
    recipe = Recipe(target="npu-int16", tune=Tune(effort="fast"))
    written = [
        onnx.load(
            convert(
                model, tmp_path / f"{form}.onnx", data=tmp_path / "d.npz", recipe=recipe, form=form, verified=True
            ).model
        ).graph
        for form in ("qdq", "qoperator")
    ]
    assert [n.op_type for n in written[0].node] == [n.op_type for n in written[1].node]


def test_it_is_said_where_layers_of_16_bits_have_no_integer_operator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    options = ["--target", "npu-int16", "--effort", "fast", "--format", "qoperator", "-q"]
    assert run(["convert", str(model), "--data", str(data), "-o", str(tmp_path / "q.onnx"), *options]) == 0
    assert "layers have activations of 16 bits" in capsys.readouterr().err


def test_a_clamp_that_saturation_does_not_give_keeps_its_activation(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(target="npu-int8"), form="qoperator")
    kinds = [n.op_type for n in onnx.load(done.model).graph.node]
    assert "Relu" in kinds
    assert "QLinearConv" in kinds
    assert done.check.sqnr["y"] > 15


def test_the_tables_speak_of_known_operators() -> None:
    assert set(INTEGER_OPERATORS) | set(MOVES) <= set(RULES)


PARAMETERS = {
    "scale of the input": 1,
    "scale of the weight": 4,
    "scale of the output": 6,
    "zero point of the output": 7,
}


@pytest.mark.parametrize("what", PARAMETERS)
def test_verify_reads_the_parameters_that_an_integer_operator_holds(tmp_path: Path, what: str) -> None:
    """Every operator's own parameters are compared, also where the operator before it holds the right ones."""
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    done = convert(model, tmp_path / "q.onnx", data=data, form="qoperator", verified=True)
    written = onnx.load(done.model)
    operator = [n for n in written.graph.node if n.op_type == "QLinearConv"][1]
    held = next(t for t in written.graph.initializer if t.name == operator.input[PARAMETERS[what]])
    values = onnx.numpy_helper.to_array(held)
    changed = (
        np.nextafter(values, np.inf, dtype=values.dtype) if values.dtype.kind == "f" else values + values.dtype.type(1)
    )
    copy = onnx.numpy_helper.from_array(np.asarray(changed, values.dtype), "changed")
    written.graph.initializer.append(copy)
    operator.input[PARAMETERS[what]] = "changed"
    onnx.save(written, done.model)
    found = [str(finding) for finding in verify(done.sidecar_path, data).findings]
    assert any("index 0, is" in line and operator.name in line for line in found), found


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_a_table_that_is_looked_up_is_verified(tmp_path: Path, form: str) -> None:
    """A constant that is only moved holds no parameters of its own in the QOperator form: its reader holds them."""
    nodes = [node("Gather", ["table", "x"], ["e"]), node("MatMul", ["e", "w"], ["y"])]
    constants = {"table": normal(20, 8, seed=1), "w": normal(8, 4, seed=2)}
    model = save(
        tmp_path / "m.onnx", nodes, {"x": ["N", 5]}, {"y": None}, constants, kinds={"x": onnx.TensorProto.INT64}
    )
    np.savez(tmp_path / "d.npz", x=np.arange(40).reshape(8, 5) % 20)
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=EVERYWHERE, form=form, verified=True)
    assert done.sidecar.tensors["table"].role == "constant"
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []
