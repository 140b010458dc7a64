"""Machines whose integer kernels add products in pairs of 16 bits, where they saturate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from calibration.hooks import pairs
from calibration.hooks.onnxruntime import Runner
from quantcli import Layers, Recipe, Tune, Weight, convert, read_recipe
from quantcli.cli import run
from quantcli.evaluation import check
from quantcli.evaluation.metrics import Comparison
from quantcli.integer.executor import Executor
from quantcli.review import lint
from quantcli.sidecar import stored_weights
from quantcli.targets import load_target, native
from tests.graphs import Array, data_for, node, normal, residual_net, save

HIDDEN = 6
FAST = Tune(effort="fast")


@pytest.fixture
def saturating(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose kernels saturate."""
    for place in (
        "calibration.hooks.pairs",
        "quantcli.targets",
        "quantcli.evaluation.check",
        "quantcli.evaluation.evaluate",
    ):
        monkeypatch.setattr(f"{place}.saturates", lambda: True)


def shifted(model: Path) -> onnx.ModelProto:
    held = onnx.load(model)
    pairs.shift_weights(held)
    return held


def dense(folder: Path, *, recurrent: bool) -> tuple[Path, Array]:
    constants: dict[str, Array] = {"w": normal(8, 8, seed=1)}
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    if recurrent:
        constants = {"w": normal(1, 4 * HIDDEN, 8, seed=1), "r": normal(1, 4 * HIDDEN, HIDDEN, seed=2)}
        nodes = [node("LSTM", ["x", "w", "r"], ["y"], hidden_size=HIDDEN)]
    shape = (5, 4, 8) if recurrent else (4, 8)
    return save(folder / "m.onnx", nodes, {"x": list(shape)}, {"y": None}, constants), normal(*shape, seed=3)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_a_shifted_model_gives_what_the_integer_executor_gives(tmp_path: Path, form: str) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    recipe = Recipe(layers=Layers(everywhere=True), tune=FAST)
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=recipe, form=form)
    held = shifted(done.model)
    types = {tensor.name.removesuffix("/uint8"): tensor.data_type for tensor in held.graph.initializer if tensor.dims}
    read = {name for one in held.graph.node for name in one.input}
    weights = [entry.integers for entry in done.sidecar.tensors.values() if entry.role == "weight"]
    assert {f"{name}/uint8" for name in weights} <= read
    assert {types[name] for name in weights} == {TensorProto.UINT8}
    feeds = {"x": np.load(data)["x"]}
    found = Runner(held.SerializeToString()).run(feeds)["y"]
    expected = Executor(ir.load(done.model), done.sidecar).run(feeds)["y"]
    # A tie of one layer can move the next one's input by a step.
    assert np.abs(np.rint((found - expected) / done.sidecar.tensors["y"].scale[0])).max() <= 1
    assert (found == Runner(done.model).run(feeds)["y"]).all()


@pytest.mark.parametrize("recurrent", [False, True], ids=["product", "LSTM"])
def test_so_does_one_that_finds_its_ranges_while_it_runs(tmp_path: Path, recurrent: bool) -> None:
    model, x = dense(tmp_path, recurrent=recurrent)
    done = convert(model, tmp_path / "q.onnx", recipe=Recipe(mode="dynamic", layers=Layers(include=("y_node",))))
    held = shifted(done.model)
    read = {name for one in held.graph.node for name in one.input}
    assert {name for name in read if name.endswith("w_quantized/uint8")}
    found, expected = (Runner(data).run({"x": x})["y"] for data in (held.SerializeToString(), done.model))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_int8_beside_int8_is_left_and_its_session_makes_no_integers_of_it(tmp_path: Path, saturating: None) -> None:
    del saturating
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(target="npu-int8", tune=FAST))
    assert not [tensor for tensor in shifted(done.model).graph.initializer if tensor.data_type == TensorProto.UINT8]
    asked: list[tuple[str, str]] = []

    class Options:
        def add_session_config_entry(self, name: str, value: str) -> None:
            asked.append((name, value))

    pairs.exact(done.model, Options())
    assert asked == [("session.disable_quant_qdq", "1")]


def test_where_nothing_saturates_a_model_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "saturates", lambda: False)
    assert pairs.exact(b"not even a model", None) == b"not even a model"


@pytest.mark.parametrize(
    ("machine", "saturates", "name"),
    [
        ("x86_64", True, "ort-x86-avx2"),
        ("AMD64", False, "ort-x86"),
        ("aarch64", False, "ort-arm"),
        ("arm64", True, "ort-arm"),
    ],
)
def test_native_is_this_machines_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, saturates: bool, name: str
) -> None:
    monkeypatch.setattr("quantcli.targets.platform.machine", lambda: machine)
    monkeypatch.setattr("quantcli.targets.saturates", lambda: saturates)
    assert native() == name
    assert load_target("native").name == name
    assert read_recipe(None, {"target": "native"}).target == name
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(target="native", tune=FAST))
    assert (done.sidecar.target.name, done.sidecar.recipe.target) == (name, name)


@pytest.mark.parametrize(("bits", "ends"), [(None, (63, 127)), (7, (63, 63)), (6, (31, 31))])
def test_depthwise_weights_have_eight_bits_without_vnni(
    tmp_path: Path, bits: int | None, ends: tuple[int, int]
) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    recipe = Recipe(target="ort-x86-avx2", weight=Weight(bits=bits, symmetric=True))
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=recipe)
    held = {name: entry.qmax for name, entry in done.sidecar.tensors.items() if entry.role == "weight"}
    assert held == {name: ends[name == "w2"] for name in ("w1", "w2", "w3", "w4")}
    integers = stored_weights(done.sidecar, done.model)
    # Any two products of the others fit 16 bits, whichever the kernel adds.
    assert all(255 * 2 * int(np.abs(integers[name]).max()) < 1 << 15 for name in ("w1", "w3", "w4"))
    assert lint(done.sidecar, load_target("ort-x86-avx2"), integers) == []
    assert lint(done.sidecar, load_target("ort-x86-avx2"), {}) == []


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a net, data, and what convert made of it."""
    monkeypatch.chdir(tmp_path)
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(tune=FAST))
    return tmp_path


def test_convert_says_what_is_lost_here(
    net: Path, saturating: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del net, saturating
    command = ["convert", "m.onnx", "--data", "d.npz", "--effort", "fast", "--json", "-o", "n.onnx"]
    assert run(command) == 0
    captured = capsys.readouterr()
    assert (json.loads(captured.out)["self_check"]["here_db"], captured.err.count("--target native")) == ({}, 0)
    monkeypatch.setattr(check, "loss_here", lambda *_: {"y": 5.25})
    assert run(command) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)["self_check"]
    assert told["here_db"] == {"y": 5.25}
    warnings = [line for line in captured.err.splitlines() if "--target native" in line]
    assert [f"'y' 5.2 dB in place of {told['sqnr_db']['y']:.1f}" in line for line in warnings] == [True]
    assert run([*command, "--target", "native"]) == 0
    assert "--target native" not in capsys.readouterr().err


@pytest.mark.parametrize(("other", "lost"), [(("x", 6.0), 6.0), (("x", 0.1), 0.0)])
def test_a_loss_is_what_kernels_give_less(other: tuple[str, float], lost: float) -> None:
    name, least = other
    reals = normal(64, seed=1)

    def compared(noise: float) -> Any:
        found = Comparison()
        found.update({name: reals}, {name: reals + np.float32(noise) * np.sign(normal(64, seed=2))})
        return found

    exact, given = compared(0.01), compared(0.01 * 10 ** (least / 20))
    here = check.loss_here(exact, given)
    assert here == ({name: pytest.approx(exact.outputs[name].sqnr - least, abs=0.01)} if lost else {})


def test_eval_says_that_it_measures_another_model_than_elsewhere(
    net: Path, saturating: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del net, saturating
    command = ["eval", "q.onnx", "--float", "m.onnx", "--data", "d.npz", "--no-latency"]
    assert run(command) == 0
    assert "saturate" not in capsys.readouterr().err

    class TenTimes(Runner):
        """What gives ten times as much where it is to be exact."""

        def run(self, feeds: dict[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
            found = super().run(feeds, outputs)
            return {name: values * 10 for name, values in found.items()} if self.exact else found

    monkeypatch.setattr("quantcli.evaluation.evaluate.Runner", TenTimes)
    assert run(command) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "what q.onnx gives here is 0.9 dB from what it gives elsewhere; convert --target native" in told


def test_what_draws_random_numbers_says_nothing_of_kernels(
    tmp_path: Path, saturating: None, capsys: pytest.CaptureFixture[str]
) -> None:
    del saturating
    nodes = [node("RandomNormalLike", ["x"], ["r"]), node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "r"], ["y"])]
    save(tmp_path / "m.onnx", nodes, {"x": ["n", 8]}, {"y": ["n", 8]}, {"w": normal(8, 8)})
    np.savez(tmp_path / "d.npz", x=normal(8, 8))
    model, output, data = (str(tmp_path / name) for name in ("m.onnx", "q.onnx", "d.npz"))
    assert run(["convert", model, "--data", data, "-o", output]) == 0
    assert run(["eval", output, "--float", model, "--data", data, "--no-latency"]) == 0
    assert "saturate" not in capsys.readouterr().err
