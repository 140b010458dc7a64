"""The QOperator form gives, integer for integer, what the QDQ form gives, from the same plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert
from quantcli.cli import run
from quantcli.rules import RULES
from quantcli.write.onnx_qoperator import MOVES, OPERATORS
from tests.graphs import data_for, normal, residual_net, save
from tests.integer.test_layers import CASES


@pytest.mark.parametrize("name", CASES)
def test_both_forms_give_the_same(tmp_path: Path, name: str) -> None:
    nodes, constants, opset = CASES[name]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"o": None}, constants, opset=opset)
    x = normal(6, 3, 8, 8, seed=5)
    np.savez(tmp_path / "d.npz", x=x)
    results, kinds = [], []
    for form in ("qdq", "qoperator"):
        done = convert(model, tmp_path / f"{form}.onnx", data=tmp_path / "d.npz", form=form)
        results.append(Runner(done.model).run({"x": x})["o"])
        kinds.append({n.op_type for n in onnx.load(done.model).graph.node})
    assert (results[0] == results[1]).all()
    for n in nodes:
        if n.op_type in OPERATORS:
            assert n.op_type not in kinds[1]
            assert OPERATORS[n.op_type].name in kinds[1]


def test_a_whole_net_is_integer_from_edge_to_edge(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    assert (
        run(["convert", str(model), "--data", str(data), "-o", str(tmp_path / "q.onnx"), "-q", "--format", "qoperator"])
        == 0
    )
    kinds = [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node]
    assert kinds == [
        "QuantizeLinear", "QLinearConv", "QLinearConv", "QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "Flatten",
        "QGemm", "DequantizeLinear",
    ]  # fmt: skip
    other = convert(model, tmp_path / "qdq.onnx", data=data)
    x = normal(4, 3, 8, 8, seed=40)
    assert (Runner(tmp_path / "q.onnx").run({"x": x})["y"] == Runner(other.model).run({"x": x})["y"]).all()


def test_a_clamp_that_saturation_does_not_give_keeps_its_activation(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(target="npu-int8"), form="qoperator")
    kinds = [n.op_type for n in onnx.load(done.model).graph.node]
    assert "Relu" in kinds
    assert "QLinearConv" in kinds
    assert done.check.sqnr["y"] > 15


def test_the_tables_speak_of_known_operators(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert set(OPERATORS) | set(MOVES) <= set(RULES)
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    arguments = ["convert", str(model), "--data", str(data), "-o", str(tmp_path / "q.onnx"), "--verify"]
    assert run([*arguments, "--format", "qoperator"]) == 2
    assert "--verify" in capsys.readouterr().err
