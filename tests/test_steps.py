"""A HardSwish in steps that ONNX Runtime has integer kernels for: a sum that saturates, and a product."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.errors import ModelError
from quantcli.evaluation.kernels import kernels
from quantcli.export.formats import aimet_2
from quantcli.pipeline import Conversion
from quantcli.plan import Plan
from quantcli.quantize import quantize
from quantcli.recipe import Activation, Layers, Tune
from quantcli.targets import PlacementFormat
from tests.graphs import Array, node, normal, save

FAST = Tune(effort="fast")
ROOT = math.sqrt(6.0)
TARGETS = ["ort-x86", "ort-x86-avx2", "ort-arm"]


def constants() -> dict[str, Array]:
    return {
        "w": normal(16, 8, 3, 3, seed=1, scale=0.5),
        "b": normal(16, seed=2),
        "v": normal(16, 1, 3, 3, seed=3, scale=0.5),
        "t": normal(4, 16, 1, 1, seed=4, scale=0.3),
    }


def nodes() -> list[onnx.NodeProto]:
    """A convolution and a depthwise one, each with a HardSwish behind it, and one that reads what they make."""
    return [
        node("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        node("HardSwish", ["c"], ["s"]),
        node("Conv", ["s", "v"], ["d"], group=16),
        node("HardSwish", ["d"], ["r"]),
        node("Conv", ["r", "t"], ["y"]),
    ]


def samples(folder: Path) -> Path:
    np.savez(folder / "data.npz", x=normal(16, 8, 9, 9, seed=9))
    return folder / "data.npz"


def converted(
    folder: Path,
    recipe: Recipe | None = None,
    graph: list[onnx.NodeProto] | None = None,
    outputs: tuple[str, ...] = ("y",),
    **more: Any,
) -> Conversion:
    graph = graph or nodes()
    used = {name for one in graph for name in one.input}
    held = {name: array for name, array in constants().items() if name in used}
    model = save(folder / "m.onnx", graph, {"x": ["N", 8, 9, 9]}, dict.fromkeys(outputs), held, opset=17)
    recipe = recipe or Recipe(tune=FAST)
    return convert(model, folder / "q.onnx", data=samples(folder), recipe=recipe, verified=True, **more)


def layers_of(plan: Plan) -> list[str]:
    return [layer.operator for layer in plan.layers]


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("target", TARGETS)
def test_it_is_a_sum_and_a_product_in_integers(tmp_path: Path, target: str, form: str) -> None:
    done = converted(tmp_path, Recipe(target=target, tune=FAST), form=form)
    assert layers_of(done.plan) == ["Conv", "Add", "Mul", "Conv", "Add", "Mul", "Conv"]
    assert layers_of(done.tuned.plan) == ["Conv", "HardSwish", "Conv", "HardSwish", "Conv"]
    assert [(layer.operator, layer.arithmetic) for layer in done.sidecar.layers][1:3] == [
        ("Add", "sum"),
        ("Mul", "product"),
    ]
    assert next(layer.name for layer in done.sidecar.layers if layer.operator == "Mul") == "s_node"
    run = Counter(
        {one.operator: one.nodes for one in kernels(done.model, {"x": np.load(samples(tmp_path))["x"]}, 1, 1)}
    )
    if form == "qoperator" or not target.endswith(
        "arm"
    ):  # elsewhere than on Arm, int8 has no kernels that it is fused into
        assert (run["QLinearConv"], run["QLinearAdd"], run["QLinearMul"]) == (3, 2, 2)
        assert run["QuantizeLinear"] == run["DequantizeLinear"] == 1
    assert verify(done.sidecar_path, samples(tmp_path)).findings == []
    assert min(done.check.sqnr.values()) > 30


def test_it_is_hard_swish_to_within_two_roundings(tmp_path: Path) -> None:
    """One of the gate, to a 255th of what it can reach, and one of the product."""
    done = converted(tmp_path)
    model = onnx.load(done.model)
    asked = [done.sidecar.tensors[name].integers for name in ("c", "s")]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in asked)
    found = Runner(model.SerializeToString()).run({"x": np.load(samples(tmp_path))["x"]}, asked)
    u, y = (
        (found[tensor.integers].astype(np.float64) - tensor.zero_point[0]) * tensor.scale[0]
        for tensor in (done.sidecar.tensors["c"], done.sidecar.tensors["s"])
    )
    gate, product = done.sidecar.tensors["s_gate"], done.sidecar.tensors["s"]
    assert gate.lo == [0.0]
    assert gate.hi[0] == pytest.approx(ROOT)
    expected = u * ROOT * np.clip(u * ROOT / 6 + 0.5, 0.0, 1.0)
    within = gate.scale[0] / 2 * np.abs(u) + product.scale[0] / 2
    assert (np.abs(y - expected) <= within * (1 + 2.0**-12)).all()
    full = (u * ROOT >= 3) & (found[asked[1]] < 255)  # there the gate is 1, and nothing is rounded but the product
    assert full.sum() > 500
    assert (np.abs(y - expected)[full] <= (product.scale[0] / 2 + 2.0**-20)).all()


def test_a_gate_reaches_no_further_than_its_input_lets_it(tmp_path: Path) -> None:
    quiet = [node("Clip", ["x", "lo", "hi"], ["k"]), *nodes()]
    quiet[1].input[0] = "k"
    small = {"w": constants()["w"] * np.float32(0.02), "b": constants()["b"] * np.float32(0.02)}
    held = {**constants(), **small, "lo": np.array(-1, np.float32), "hi": np.array(1, np.float32)}
    model = save(tmp_path / "m.onnx", quiet, {"x": ["N", 8, 9, 9]}, {"y": None}, held, opset=17)
    done = convert(model, tmp_path / "q.onnx", data=samples(tmp_path), recipe=Recipe(tune=FAST), verified=True)
    u, gate = done.plan.tensors["c"], done.plan.tensors["s_gate"]
    highest = (255 - u.zero_point[0]) * u.scale[0]
    assert highest < 0.5
    assert gate.hi[0] == pytest.approx(highest + 3 / ROOT)


def test_integers_of_weights_and_biases_stay_what_they_are(tmp_path: Path) -> None:
    done = converted(tmp_path)
    plain = done.tuned.plan
    whole = Plan(
        target=type(plain.target)(
            plain.target.name,
            plain.target.description,
            plain.target.activation,
            plain.target.weight,
            plain.target.multiplier,
            PlacementFormat(pays=True),
        ),
        tensors=plain.tensors,
        layers=plain.layers,
        floats=plain.floats,
    )
    before, after = quantize(done.tuned.model, whole), quantize(done.tuned.model, plain)
    assert before.model is done.tuned.model
    assert before.constants.keys() < after.constants.keys()
    assert all((after.constants[name] == array).all() for name, array in before.constants.items())
    assert set(before.tables) == {"s_node", "r_node"}
    assert after.tables == {}
    for name in ("w", "v", "c", "d", "b"):
        assert np.allclose(
            np.array(before.plan.tensors[name].scale) / ROOT, after.plan.tensors[name].scale, rtol=2.0**-20
        )
    for one, other in zip(before.plan.layers[0].multipliers, after.plan.layers[0].multipliers, strict=True):
        assert np.allclose(one.real, other.real, rtol=2.0**-20)
    # All sums add one constant.
    assert [name for name, tensor in after.plan.tensors.items() if tensor.role == "constant"] == ["s_shift"]


def test_what_was_divided_is_said(tmp_path: Path) -> None:
    done = converted(tmp_path, explained=("op:HardSwish",))
    moved = {name: entry.moved.factor for name, entry in done.sidecar.tensors.items() if entry.moved is not None}
    assert moved == {"c": [1 / ROOT], "d": [1 / ROOT]}
    assert all("a sum and a product have integer kernels" in one.why for one in done.explained)
    with pytest.raises(ModelError, match="'c' is not the float model's"):
        aimet_2(done.sidecar)


WHOLE: dict[str, Recipe] = {
    "an accelerator": Recipe(target="npu-int8", tune=FAST),
    "TFLite": Recipe(target="tflite", tune=FAST),
    "everywhere": Recipe(layers=Layers(everywhere=True), tune=FAST),
    "16 bits": Recipe(activation=Activation(dtype="int16"), tune=FAST),
    "7 bits": Recipe(activation=Activation(bits=7), tune=FAST),
    "symmetric": Recipe(target="ort-arm", activation=Activation(symmetric=True), tune=FAST),
}


@pytest.mark.parametrize("case", WHOLE)
def test_elsewhere_it_is_one_table(tmp_path: Path, case: str) -> None:
    done = converted(tmp_path, WHOLE[case])
    assert layers_of(done.plan) == ["Conv", "HardSwish", "Conv", "HardSwish", "Conv"]


OTHERS: dict[str, tuple[list[onnx.NodeProto], tuple[str, ...]]] = {
    "x is given out": (nodes(), ("y", "c")),
    "x has another reader": ([*nodes()[:2], node("Add", ["c", "s"], ["a"]), *nodes()[2:]], ("y",)),
    "the weight makes something else": ([*nodes(), node("Conv", ["x", "w"], ["z"])], ("y", "z")),
    "no product makes x": (
        [node("Conv", ["x", "w"], ["p"], pads=[1, 1, 1, 1]), node("Mul", ["p", "p"], ["c"]), *nodes()[1:]],
        ("y",),
    ),
}
OTHERS["x has another reader"][0][3].input[0] = "a"


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_for_it_alone_is_left_as_it_is(tmp_path: Path, case: str) -> None:
    graph, outputs = OTHERS[case]
    done = converted(tmp_path, graph=graph, outputs=outputs)
    operators = layers_of(done.plan)
    assert operators.count("HardSwish") == 1
    assert done.plan.tensors["c"].moved is None
    assert done.plan.tensors["d"].moved is not None


def test_names_that_are_taken_are_left_alone(tmp_path: Path) -> None:
    graph = nodes()
    graph[2] = node("Conv", ["s", "v"], ["s_gate"], group=16)
    graph[3] = node("HardSwish", ["s_gate"], ["s_sum"])
    graph[4].input[0] = "s_sum"
    done = converted(tmp_path, graph=graph)
    assert {"s_gate", "s_gate_", "s_sum_gate"} <= done.plan.tensors.keys()
    assert layers_of(done.plan) == ["Conv", "Add", "Mul", "Conv", "Add", "Mul", "Conv"]
