"""Softmaxes within a graph: their ranges, and that every form of the output, the executor and C compute them alike."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, convert, verify, verify_c
from quantcli.embedded.check import compiler
from quantcli.integer.executor import Executor
from quantcli.recipe import Activation, Layers, Recipe, Tune
from quantcli.tune.wide import left_of
from tests.graphs import Shape, data_for, node, normal, save

WIDTH = 8
FAST, PLAIN = Tune(effort="fast"), Activation()
# What a softmax's output p is given out as, if it is.
ENDS = {"no": [], "itself": ["p"], "in another shape": ["r"]}


def recipe_of(target: str, activation: Activation = PLAIN) -> Recipe:
    return Recipe(target=target, layers=Layers(everywhere=True), tune=FAST, activation=activation)


def attention(folder: Path, length: int, given_out: str = "no", free: bool = False) -> Path:
    """Write attention over x (N, length, WIDTH), whose probabilities differ little; and its data beside it."""
    nodes = [
        node("MatMul", ["x", "wk"], ["k"]),
        node("Transpose", ["k"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["x", "t"], ["s"]),
        node("Softmax", ["s"], ["p"], axis=-1),
        node("MatMul", ["p", "x"], ["o"]),
        node("MatMul", ["o", "wo"], ["y"]),
    ]
    if given_out == "in another shape":
        nodes.append(node("Flatten", ["p"], ["r"]))
    constants = {"wk": normal(WIDTH, WIDTH, seed=1, scale=0.02), "wo": normal(WIDTH, 4, seed=2)}
    outputs: dict[str, Shape | None] = dict.fromkeys(["y", *ENDS[given_out]])
    shape = ["N", "T" if free else length, WIDTH]
    data_for(folder / "d.npz", x=(length, WIDTH))
    return save(folder / "m.onnx", nodes, {"x": shape}, outputs, constants)


def converted(folder: Path, length: int, recipe: Recipe, form: str = "qdq", free: bool = False) -> Conversion:
    model = attention(folder, length, free=free)
    return convert(model, folder / "q.onnx", data=folder / "d.npz", recipe=recipe, form=form)


@pytest.mark.parametrize("given_out", ENDS)
@pytest.mark.parametrize("target", ["fixed16", "npu-int8", "npu-pow2", "tflite", "cmsis-nn"])
def test_the_range_is_what_calibration_saw_unless_all_of_it_may_be_read(
    tmp_path: Path, target: str, given_out: str
) -> None:
    model = attention(tmp_path, 50, given_out)
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe_of(target))
    found = done.plan.tensors["p"]
    if target in {"tflite", "cmsis-nn"}:
        assert (found.scale, found.zero_point, found.samples) == ((1 / 256,), (-128,), 0)
    elif given_out != "no":
        assert (found.scale, found.hi) == ((1 / (found.integer.qmax + 1),), (1.0,))
    else:
        assert found.samples == 16
        assert 1 / 50 < found.hi[0] < 1 / 10
        steps = found.integer.qmax / found.hi[0]
        expected = math.floor(steps) if target != "npu-pow2" else 2 ** math.floor(math.log2(steps))
        assert round(1 / found.scale[0]) == expected


FORMS = {
    "8 bits": (50, False, PLAIN),
    "8 bits, free length": (50, True, PLAIN),
    "8 bits, two tokens": (2, False, PLAIN),
    "4 bits": (50, False, Activation(bits=4)),
    "16 bits": (50, False, Activation(dtype="int16")),
}


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("case", FORMS)
@pytest.mark.parametrize("target", ["fixed16", "npu-int8"])
def test_the_runtime_computes_what_the_sidecar_says(tmp_path: Path, target: str, case: str, form: str) -> None:
    length, free, activation = FORMS[case]
    done = converted(tmp_path, length, recipe_of(target, activation), form, free)
    found = verify(done.sidecar_path, tmp_path / "d.npz")
    assert (found.findings, found.layers) == ([], len(done.plan.layers))


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize(("length", "free"), [(2, False), (50, False), (50, True)])
@pytest.mark.parametrize("target", ["fixed16", "npu-int8"])
def test_what_lies_beyond_the_range_saturates(tmp_path: Path, target: str, length: int, free: bool, form: str) -> None:
    """ONNX Runtime's QLinearSoftmax wraps around in 32 bits where steps are fine and values few: it is kept from those."""
    done = converted(tmp_path, length, recipe_of(target), form, free)
    x = normal(8, length, WIDTH, seed=3, scale=20.0)
    executor = Executor(ir.load(done.model), done.sidecar)
    integers, _ = executor.run_all({"x": x})
    p = done.sidecar.tensors["p"]
    assert integers["p"].max() == p.qmax
    result = Runner(done.model).run({"x": x})["y"]
    scale = done.sidecar.tensors["y"].scale[0]
    # A tie of one layer can move the next one's input by a step: at most one step a layer.
    assert np.abs(executor.run({"x": x})["y"] - result).max() <= (len(done.plan.layers) + 0.5) * scale
    assert verify(done.sidecar_path, data_for(tmp_path / "more.npz", x=(length, WIDTH))).findings == []


def test_fine_steps_need_the_runtimes_float_kernel(tmp_path: Path) -> None:
    kinds = {}
    for length, free in ((50, False), (50, True), (2, False)):
        done = converted(tmp_path, length, recipe_of("fixed16"), "qoperator", free)
        kinds[length, free] = {n.op_type for n in ir.load(done.model).graph} & {"QLinearSoftmax", "Softmax"}
    assert kinds == {(50, False): {"QLinearSoftmax"}, (50, True): {"Softmax"}, (2, False): {"Softmax"}}


@pytest.mark.skipif(compiler() is None, reason="there is no C compiler on the path")
@pytest.mark.parametrize("length", [2, 50])
@pytest.mark.parametrize("target", ["fixed16", "npu-int8", "npu-int16"])
def test_c_is_the_executor(tmp_path: Path, target: str, length: int) -> None:
    model = attention(tmp_path, length)
    convert(model, tmp_path / "c", data=tmp_path / "d.npz", recipe=recipe_of(target), form="c")
    sharp = tmp_path / "sharp.npz"
    np.savez(sharp, x=normal(8, length, WIDTH, seed=3, scale=20.0))
    found = verify_c(tmp_path / "c", sharp)
    assert (found.wrong, found.values) == (0, 8 * length * 4)


def test_a_softmax_is_among_the_activations_that_may_be_wide(tmp_path: Path) -> None:
    done = converted(tmp_path, 50, recipe_of("npu-int8"))
    feeds = [dict(np.load(tmp_path / "d.npz"))]
    assert "p" in left_of(ir.load(tmp_path / "m.onnx"), done.plan, feeds)
