"""Operators that ONNX Runtime computes in float as fast as in integers, or faster: their weights alone are stored as integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, calibrate, convert, verify
from quantcli.cli import main
from quantcli.errors import StrictError
from quantcli.evaluation.kernels import kernels
from quantcli.pipeline import Conversion
from quantcli.recipe import Layers, Tune, Weight
from quantcli.review import lint
from quantcli.sidecar import stored_weights
from quantcli.targets import load_target
from tests.graphs import EVERYWHERE, Array, node, normal, save

FAST = Tune(effort="fast")
# Per operator: the shape of a sample, and of the weights of two of them.
SHAPES: dict[str, tuple[list[int], list[tuple[int, ...]]]] = {
    "ConvTranspose": ([8, 6, 6], [(8, 6, 3, 3), (6, 4, 3, 3)]),
    "Conv": ([2, 7, 7, 7], [(6, 2, 3, 3, 3), (4, 6, 3, 3, 3)]),
}


def chain(folder: Path, operator: str = "ConvTranspose", weights: dict[str, Array] | None = None) -> Path:
    """Write two operators, each with a Relu behind it, and nothing else that has weights."""
    shape, sizes = SHAPES[operator]
    held = {f"w{number}": normal(*size, seed=number, scale=0.2) for number, size in enumerate(sizes)}
    nodes = [
        node(operator, ["x", "w0"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node(operator, ["b", "w1"], ["c"]),
        node("Relu", ["c"], ["y"]),
    ]
    return save(folder / f"{operator}.onnx", nodes, {"x": ["n", *shape]}, {"y": None}, weights or held)


def samples(folder: Path, *shape: int) -> Path:
    np.savez(folder / "data.npz", x=normal(24, *shape, seed=9))
    return folder / "data.npz"


def converted(folder: Path, recipe: Recipe, operator: str = "ConvTranspose") -> Conversion:
    data = samples(folder, *SHAPES[operator][0])
    return convert(chain(folder, operator), folder / "q.onnx", data=data, recipe=recipe, verified=True)


def arithmetic(done: Conversion) -> dict[str, str]:
    return {layer.name: layer.arithmetic.value for layer in done.plan.layers}


def operators(path: Path) -> Counter[str]:
    return Counter(entry.op_type for entry in onnx.load(path).graph.node)


def run_by_the_runtime(done: Conversion, data: Path) -> dict[str, int]:
    """Return how many nodes of each operator the runtime runs, once it has optimized the model."""
    return {kernel.operator: kernel.nodes for kernel in kernels(done.model, {"x": np.load(data)["x"]}, 1, runs=1)}


def reals(done: Conversion) -> dict[str, Array]:
    """Return what the stored weights stand for."""
    found = {}
    for name, integers in stored_weights(done.sidecar, done.model).items():
        entry = done.sidecar.tensors[name]
        along = [-1 if axis == entry.axis else 1 for axis in range(integers.ndim)]
        found[name] = integers.astype(np.float32) * np.array(entry.scale, np.float32).reshape(along)
    return found


@pytest.mark.parametrize("operator", SHAPES)
@pytest.mark.parametrize("target", ["ort-x86", "ort-x86-avx2", "ort-arm"])
def test_they_compute_in_float_from_weights_of_eight_bits(tmp_path: Path, operator: str, target: str) -> None:
    done = converted(tmp_path, Recipe(target=target), operator)
    assert arithmetic(done) == {"a_node": "stored", "c_node": "stored"}
    assert [layer.operator for layer in done.plan.floats] == ["Relu", "Relu"]
    assert {entry.qmax for entry in done.sidecar.tensors.values()} == {127}
    assert operators(done.model) == {operator: 2, "Relu": 2, "Cast": 2, "Mul": 2}
    assert done.check.sqnr["y"] > 35
    assert verify(done.sidecar_path).findings == []
    assert lint(done.sidecar, load_target(target), stored_weights(done.sidecar, done.model)) == []
    told = {refusal.reason for refusal in lint(done.sidecar, load_target("tflite"), {})}
    assert told == {"its weights alone are stored as integers, and it computes in float"}
    x = {"x": normal(3, *SHAPES[operator][0], seed=4)}
    again = chain(tmp_path, operator, reals(done))
    assert (Runner(done.model).run(x)["y"] == Runner(again).run(x)["y"]).all()


@pytest.mark.parametrize(
    ("weight", "groups", "expected"),
    [
        ((16, 4, 3, 3), 4, "stored"),  # a ResNeXt's
        ((32, 1, 3, 3), 16, "stored"),  # two outputs per input, as a FastViT's
        ((16, 4, 3), 4, "stored"),
        ((16, 1, 3, 3), 16, "accumulate"),
        ((16, 8, 3, 3), 2, "accumulate"),
        ((16, 4, 3, 3), 1, "accumulate"),
    ],
)
def test_so_do_convolutions_in_narrow_groups_but_for_depthwise_ones(
    tmp_path: Path, weight: tuple[int, ...], groups: int, expected: str
) -> None:
    shape = [weight[1] * groups, *([7] * (len(weight) - 2))]
    nodes = [node("Conv", ["x", "w"], ["y"], group=groups)]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["n", *shape]}, {"y": None}, {"w": normal(*weight, seed=3)})
    done = convert(model, tmp_path / "q.onnx", data=samples(tmp_path, *shape), recipe=Recipe(tune=FAST), verified=True)
    assert arithmetic(done) == {"y_node": expected}


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_the_runtime_makes_their_weights_float_at_loading(tmp_path: Path, form: str) -> None:
    data = samples(tmp_path, *SHAPES["ConvTranspose"][0])
    done = convert(chain(tmp_path), tmp_path / "q.onnx", data=data, form=form, recipe=Recipe(tune=FAST))
    assert run_by_the_runtime(done, data) == {"ConvTranspose": 2, "Relu": 2}


@pytest.mark.parametrize("operator", SHAPES)
@pytest.mark.parametrize(
    "recipe",
    [EVERYWHERE, Recipe(target="tflite"), Recipe(target="npu-int8"), Recipe(layers=Layers(include=("?_node",)))],
    ids=["everywhere", "tflite", "npu-int8", "included"],
)
def test_they_are_integer_layers_where_that_is_asked_for(tmp_path: Path, operator: str, recipe: Recipe) -> None:
    assert arithmetic(converted(tmp_path, recipe, operator)) == {"a_node": "accumulate", "c_node": "accumulate"}


def test_convolutions_over_two_axes_stay_integer_layers(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"])]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["n", 3, 8, 8]}, {"y": None}, {"w": normal(8, 3, 3, 3, seed=1)})
    assert arithmetic(convert(model, tmp_path / "q.onnx", synthetic=4)) == {"y_node": "accumulate"}


def test_their_width_is_the_recipes_unless_widths_are_searched(tmp_path: Path) -> None:
    four = converted(tmp_path, Recipe(weight=Weight(bits=4)))
    assert {tensor.integer.bits for tensor in four.plan.tensors.values()} == {4}
    assert all(np.ptp(held, axis=(0, 2, 3)).max() <= 15 for held in stored_weights(four.sidecar, four.model).values())


def test_random_data_is_no_matter_where_no_range_comes_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(chain(tmp_path), tmp_path / "q.onnx", synthetic=4)
    assert "random data" not in caplog.text


@pytest.mark.parametrize("dense", [True, False], ids=["beside a dense layer", "alone"])
def test_a_search_leaves_them_wide(tmp_path: Path, dense: bool) -> None:
    weights = {"w": normal(3, 6, 3, 3, seed=1, scale=0.2), **({"v": normal(6, 5, seed=2)} if dense else {})}
    nodes = [node("ConvTranspose", ["x", "w"], ["a"]), node("GlobalAveragePool", ["a"], ["b"])]
    nodes += (
        [node("Flatten", ["b"], ["c"]), node("MatMul", ["c", "v"], ["y"])] if dense else [node("Flatten", ["b"], ["y"])]
    )
    model = save(tmp_path / "m.onnx", nodes, {"x": ["n", 3, 4, 4]}, {"y": None}, weights)
    x = normal(96, 3, 4, 4, seed=9)
    np.savez(tmp_path / "data.npz", x=x, labels=Runner(model).run({"x": x})["y"].argmax(axis=1))
    recipe = Recipe(weight=Weight(bits=3), tune=Tune(effort="fast", max_drop=60.0))
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "data.npz", recipe=recipe, verified=True)
    assert arithmetic(done)["a_node"] == "stored"
    assert done.plan.tensors["w"].integer.bits == 8
    assert [(one.steps, one.kept) for one in done.attempts] == [(0, True)]
    assert not dense or done.plan.tensors["v"].integer.bits == 3


def test_calibration_says_that_there_is_nothing_to_observe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = chain(tmp_path), samples(tmp_path, *SHAPES["ConvTranspose"][0])
    with pytest.raises(SystemExit) as end:
        main(f"calibrate {model} --data {data} -o {tmp_path / 's.stats'}".split())
    assert end.value.code == 0
    assert "no activation becomes integer" in "".join(capsys.readouterr())
    one = convert(model, tmp_path / "a.onnx", tmp_path / "s.stats")
    other = convert(model, tmp_path / "b.onnx", data=data)
    assert one.model.read_bytes() == other.model.read_bytes()


def test_a_large_table_alone_is_converted(tmp_path: Path) -> None:
    nodes = [node("Gather", ["table", "x"], ["y"])]
    kinds = {"x": onnx.TensorProto.INT64}
    table = {"table": normal(1 << 13, 8, seed=3)}
    model = save(tmp_path / "m.onnx", nodes, {"x": ["n", 5]}, {"y": None}, table, kinds=kinds)
    np.savez(tmp_path / "data.npz", x=np.arange(40).reshape(8, 5))
    assert calibrate(model, tmp_path / "data.npz").tensors == {}
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "data.npz", recipe=Recipe(tune=FAST), verified=True)
    assert arithmetic(done) == {"y_node": "lookup"}
    assert done.check.sqnr["y"] > 35


def test_the_fastest_plan_may_have_no_integer_layer(tmp_path: Path) -> None:
    done = converted(tmp_path, Recipe(tune=Tune(effort="fast", optimize="latency")))
    assert [(trial.name, trial.kept) for trial in done.trials] == [("by rule", True)]


def between(folder: Path, weights: dict[str, Array]) -> Path:
    """Write a transposed convolution between two convolutions, of which the last may have its weight."""
    last = "w3" if "w3" in weights else "w2"
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("ConvTranspose", ["b", "w2"], ["c"]),
        node("Relu", ["c"], ["d"]),
        node("Conv", ["d", last], ["y"]),
    ]
    return save(folder / "between.onnx", nodes, {"x": ["n", 3, 8, 8]}, {"y": None}, weights)


WEIGHTS = {name: normal(8, 8 if name != "w1" else 3, 3, 3, seed=n, scale=0.2) for n, name in enumerate(["w1", "w2"])}


def test_between_integer_layers_the_runtime_quantizes_no_weight_anew(tmp_path: Path) -> None:
    model = between(tmp_path, {**WEIGHTS, "w3": normal(4, 8, 1, 1, seed=7)})
    data = samples(tmp_path, 3, 8, 8)
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(tune=FAST), verified=True)
    assert arithmetic(done) == {"a_node": "accumulate", "c_node": "stored", "y_node": "accumulate"}
    found = run_by_the_runtime(done, data)
    assert (found["QLinearConv"], found["ConvTranspose"]) == (2, 1)
    assert found["DequantizeLinear"] == 2  # what the float operator reads, and the output


def test_a_weight_that_an_integer_layer_reads_too_is_stored_once(tmp_path: Path) -> None:
    data = samples(tmp_path, 3, 8, 8)
    done = convert(between(tmp_path, WEIGHTS), tmp_path / "q.onnx", data=data, verified=True)
    assert arithmetic(done) == {"a_node": "accumulate", "c_node": "stored", "y_node": "accumulate"}
    assert operators(done.model)["Cast"] == 0
    assert run_by_the_runtime(done, data)["QLinearConv"] == 2
    assert done.check.sqnr["y"] > 25


def test_it_is_told_that_they_stay_float(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = samples(tmp_path, *SHAPES["ConvTranspose"][0])
    command = f"convert {chain(tmp_path)} --data {data} --effort fast --explain a_node -o {tmp_path / 'q.onnx'}"
    with pytest.raises(SystemExit):
        main(command.split())
    told = " ".join("".join(capsys.readouterr()).split())
    assert "ConvTranspose 'a_node': stays float: its kernel is a float one here: its weights alone are stored" in told
    assert "float layers with integer weights 2, operators that stay float 2" in told


def test_strict_takes_them_for_float(tmp_path: Path) -> None:
    """As it does the Relu behind them, which is left out here."""
    held = {"w0": normal(8, 6, 3, 3, seed=1, scale=0.2)}
    model = save(
        tmp_path / "m.onnx", [node("ConvTranspose", ["x", "w0"], ["y"])], {"x": ["n", 8, 6, 6]}, {"y": None}, held
    )
    with pytest.raises(StrictError, match="ConvTranspose 'y_node' would stay float: its kernel is a float one here"):
        convert(model, tmp_path / "q.onnx", data=samples(tmp_path, 8, 6, 6), strict=True)
    assert not (tmp_path / "q.onnx").exists()
