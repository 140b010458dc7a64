"""Float layers whose weights are stored as integers: beside integer layers, and in the form that a runtime folds at loading."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.cli import main
from quantcli.errors import PlanError
from quantcli.fold import fold
from quantcli.load import load
from quantcli.modes import float_plan, with_stored
from quantcli.probe import model_bytes
from quantcli.quantize import quantize
from quantcli.recipe import Layers, Tune, Weight
from quantcli.rules import Arithmetic
from quantcli.write.onnx_qdq import write
from quantcli.write.onnx_stored import fold_at_load
from tests.graphs import data_for, node, normal, residual_net, save


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return residual_net(tmp_path / "net.onnx")


@pytest.fixture
def labelled(tmp_path: Path, model: Path) -> Path:
    """Samples whose labels are what the float model says."""
    x = normal(300, 3, 8, 8, seed=21) + 3 * normal(300, 3, 1, 1, seed=22)
    path = tmp_path / "labelled.npz"
    np.savez(path, x=x, labels=Runner(model).run({"x": x})["y"].argmax(axis=1))
    return path


def operators(path: Path) -> Counter[str]:
    return Counter(entry.op_type for entry in onnx.load(path).graph.node)


def searching(max_drop: float, target: str = "ort-x86") -> Recipe:
    return Recipe(target=target, weight=Weight(bits=2), tune=Tune(max_drop=max_drop, effort="fast"))


def test_a_search_ends_with_stored_weights_where_nothing_less_keeps_the_metric(
    tmp_path: Path, model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "q.onnx"
    command = f"convert {model} --data {labelled} --weight-bits 2 --max-drop 0 --effort fast -o {output}"
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code == 0
    told = " ".join("".join(capsys.readouterr()).split())
    assert "the metric is kept only where every layer computes in float" in told
    assert f"{output}: float layers with integer weights 4, operators that stay float" in told
    found = Runner(output).run({"x": np.load(labelled)["x"]})["y"]
    assert (found.argmax(axis=1) == np.load(labelled)["labels"]).all()
    result = verify(output.with_suffix(".json"), labelled)
    assert result.findings == []
    assert result.layers == 4
    assert result.elements == sum(
        array.size for array in initializers(output).values() if array.dtype == np.int16 and array.size > 1
    )
    assert operators(output)["DequantizeLinear"] == 0


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def test_where_weights_have_eight_bits_some_promises_cannot_be_made(
    tmp_path: Path, model: Path, labelled: Path
) -> None:
    with pytest.raises(PlanError, match="95 % confidence"):
        convert(model, tmp_path / "q.onnx", data=labelled, recipe=searching(0.0, "npu-int8"))
    assert not (tmp_path / "q.onnx").exists()


def test_a_stored_layer_between_integer_ones_computes_in_float(tmp_path: Path, model: Path) -> None:
    data = data_for(tmp_path / "d.npz")
    done = convert(
        model,
        tmp_path / "part.onnx",
        data=data,
        recipe=Recipe(layers=Layers(exclude=("c2_node",)), tune=Tune(effort="fast")),
    )
    assert "c2_node" in [layer.name for layer in done.plan.floats]
    lifted = done.tuned.model.clone()
    lifted.opset_imports[""] = 21
    plan = with_stored(done.plan, lifted, {"c2_node"}, 16)
    assert [layer.name for layer in plan.layers if layer.arithmetic is Arithmetic.STORED] == ["c2_node"]
    assert "c2_node" not in [layer.name for layer in plan.floats]
    quantized = quantize(lifted, plan)
    written = write(quantized)
    plain = model_bytes(written)
    fold_at_load(written, quantized)
    x = {"x": np.load(data)["x"]}
    # The model in which that layer is float, with the weights that the integers stand for.
    held, entry = onnx.load(done.model), plan.tensors["w2"]
    weight = next(one for one in held.graph.initializer if one.name == "w2")
    reals = quantized.constants["w2"] * np.array(entry.scale, np.float32).reshape(-1, 1, 1, 1)
    weight.CopyFrom(onnx.numpy_helper.from_array(reals.astype(np.float32), "w2"))
    expected = Runner(held.SerializeToString(), what="the float layer's").run(x)["y"]
    folded = model_bytes(written)
    for content in (plain, folded):
        onnx.checker.check_model(onnx.load_from_string(content))
    assert (Runner(folded, what="folded").run(x)["y"] == expected).all()
    step = max(tensor.scale[0] for tensor in plan.tensors.values() if tensor.role == "activation")
    assert Runner(plain, what="plain").run(x)["y"] == pytest.approx(expected, abs=2 * step)
    names = [entry.name for entry in written.graph]
    assert any(str(name).endswith("_float") for name in names)  # the fence behind it stands


def test_a_layer_without_a_matrix_stays_as_it_is(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "v"], ["y"])]
    graph = fold(load(save(tmp_path / "m.onnx", nodes, {"x": ["n", 4]}, {"y": ["n"]}, {"v": normal(4)})).graph.clone())
    plan = float_plan(graph, Recipe(), "because")
    assert with_stored(plan, graph, {"y_node"}, 16) == plan


def test_a_float_plan_has_no_integers(model: Path) -> None:
    graph = fold(load(model).graph.clone())
    plan = float_plan(graph, Recipe(), "because")
    assert plan.layers == ()
    assert {layer.reason for layer in plan.floats} == {"because"}


STORED = {
    "Conv": ([node("Conv", ["x", "w"], ["y"])], {"w": normal(16, 8, 7, seed=5)}, [2, 8, 12]),
    "ConvTranspose": ([node("ConvTranspose", ["x", "w"], ["y"])], {"w": normal(8, 16, 7, seed=5)}, [2, 8, 12]),
    "GRU": (
        [node("GRU", ["x", "w", "r"], ["y"], hidden_size=16)],
        {"w": normal(1, 48, 12, seed=5), "r": normal(1, 48, 16, seed=6)},
        [2, 8, 12],
    ),
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("target", ["ort-x86", "npu-int8"])
def test_weights_alone_are_folded_at_loading_where_the_runtime_can(tmp_path: Path, name: str, target: str) -> None:
    nodes, constants, shape = STORED[name]
    model = save(tmp_path / "m.onnx", nodes, {"x": shape}, {"y": None}, constants)
    x = {"x": normal(*shape, seed=9)}
    done = convert(model, tmp_path / "q.onnx", recipe=Recipe(mode="weights", target=target), synthetic=2, verified=True)
    found = operators(done.model)
    weights = len(constants)
    if target == "ort-x86":
        assert (found["DequantizeLinear"], found["Cast"], found["Mul"]) == (0, weights, weights)
    else:
        assert (found["DequantizeLinear"], found["Cast"], found["Mul"]) == (weights, 0, 0)
    assert verify(done.sidecar_path).findings == []
    # The same reals, multiplied out beforehand, in the same operator.
    held = initializers(done.model)
    reals = {}
    for weight in constants:
        entry = done.sidecar.tensors[weight]
        along = [1] * held[entry.integers].ndim
        along[entry.axis or 0] = -1
        reals[weight] = held[entry.integers].astype(np.float32) * np.array(entry.scale, np.float32).reshape(along)
    again = save(tmp_path / "again.onnx", nodes, {"x": shape}, {"y": None}, reals)
    outputs = Runner(done.model).run(x)["y"], Runner(again).run(x)["y"]
    if target == "ort-x86":
        assert (outputs[0] == outputs[1]).all()
    else:  # the runtime lays constant weights out in another order, and sums in another
        assert outputs[0] == pytest.approx(outputs[1], rel=1e-4, abs=1e-4)


def test_a_changed_scale_is_found(tmp_path: Path) -> None:
    nodes, constants, shape = STORED["Conv"]
    model = save(tmp_path / "m.onnx", nodes, {"x": shape}, {"y": None}, constants)
    done = convert(model, tmp_path / "q.onnx", recipe=Recipe(mode="weights"), synthetic=2)
    held = onnx.load(done.model)
    scale = next(one for one in held.graph.initializer if one.name == "w_scale")
    values = onnx.numpy_helper.to_array(scale).copy()
    assert values.shape == (16, 1, 1)
    values[3] *= 2
    scale.CopyFrom(onnx.numpy_helper.from_array(values, "w_scale"))
    onnx.save(held, done.model)
    found = [str(finding) for finding in verify(done.sidecar_path).findings]
    assert any("scale of 'w', index 3" in finding for finding in found)


def test_what_was_stored_can_be_converted_again(tmp_path: Path) -> None:
    nodes, constants, shape = STORED["Conv"]
    model = save(tmp_path / "m.onnx", nodes, {"x": shape}, {"y": None}, constants)
    first = convert(model, tmp_path / "w.onnx", recipe=Recipe(mode="weights"), synthetic=2)
    again = convert(first.model, tmp_path / "q.onnx", synthetic=4)
    assert [layer.arithmetic for layer in again.plan.layers] == [Arithmetic.ACCUMULATE]
    assert again.check.sqnr["y"] > 30


@pytest.mark.parametrize("mode", ["weights", "dynamic", "static"])
@pytest.mark.parametrize("carried", [True, False], ids=["carried", "captured"])
def test_a_weight_that_a_loop_reads_as_well_is_stored_once(
    tmp_path: Path, mode: Literal["static", "dynamic", "weights"], carried: bool
) -> None:
    """y = x·w·w, the second product in a Loop of one turn: its body reads the integers of w, dequantized."""
    float_, boolean, number = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64
    info = onnx.helper.make_tensor_value_info
    inputs = [info("i", number, []), info("go", boolean, []), info("v", float_, None)]
    outputs = [info("on", boolean, []), info("t", float_, None)]
    body = [node("Identity", ["go"], ["on"]), node("MatMul", ["v", "u" if carried else "w"], ["t"])]
    if carried:
        inputs.append(info("u", float_, [64, 64]))
        outputs.append(info("same", float_, [64, 64]))
        body.append(node("Identity", ["u"], ["same"]))
    loop = onnx.helper.make_graph(body, "body", inputs, outputs)
    states, ends = (["a", "w"], ["y", "last"]) if carried else (["a"], ["y"])
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Loop", ["n", "", *states], ends, body=loop)]
    w, x = normal(64, 64, seed=1, scale=0.1), normal(16, 64, seed=2)
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 64]}, {"y": ["N", 64]}, {"w": w, "n": np.array(1)})
    np.savez(tmp_path / "d.npz", x=x)
    data = tmp_path / "d.npz" if mode == "static" else None
    recipe = Recipe(mode=mode, tune=Tune(effort="fast"))
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=recipe, verified=True)
    held = [t for t in onnx.load(done.model).graph.initializer if t.dims == [64, 64]]
    assert [t.data_type for t in held] == [onnx.TensorProto.INT8]
    if mode == "weights":
        grid = onnx.numpy_helper.to_array(held[0]) * np.array(done.sidecar.tensors["w"].scale)
        y = Runner(done.model).run({"x": x})["y"]
        bound = 2 * 64 * np.abs(x) @ np.abs(grid) @ np.abs(grid) * 2.0**-24  # two sums of 64 products in float32
        assert (np.abs(y - x @ grid @ grid) <= bound).all()
