"""Conversions without calibration data: dynamic products, and weights alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, convert, verify
from quantcli.arithmetic.affine import IntegerType
from quantcli.arithmetic.blocks import block_parameters, dequantize_blocks, in_blocks, quantize_blocks
from quantcli.cli import run
from quantcli.recipe import Layers, Recipe, Weight
from tests.graphs import Array, Shape, node, normal, save

K, N = 48, 40
X = normal(6, 7, K, seed=1)
W = normal(K, N, seed=2) * np.linspace(0.2, 2, N, dtype=np.float32)


def written(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Array],
    recipe: Recipe,
    shape: Sequence[int | str] = ("N", 7, K),
    kind: int = onnx.TensorProto.FLOAT,
) -> tuple[Path, Conversion]:
    path = save(folder / "m.onnx", nodes, {"x": list(shape)}, {"y": None}, constants, kinds={"x": kind})
    done = convert(path, folder / "q.onnx", recipe=recipe, verified=True)
    assert verify(done.sidecar_path).findings == []
    return path, done


def stored(done: Conversion) -> dict[str, NDArray[np.generic]]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(done.model).graph.initializer}


def as_written(path: Path, x: Array) -> Array:
    """Run a model with no fusions: those of ONNX Runtime round the activations of stored weights to 8 bits as well."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def dynamically(x: Array) -> tuple[NDArray[np.int64], np.float32, int]:
    """DynamicQuantizeLinear as ONNX defines it: integers, scale and zero point of a float32 tensor."""
    lo, hi = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = np.float32((np.float32(hi) - np.float32(lo)) / np.float32(255))
    zero_point = int(np.clip(np.rint(np.float32(0) - np.float32(lo) / scale), 0, 255))
    q = np.clip(np.rint(x / scale) + zero_point, 0, 255).astype(np.int64)
    return q, scale, zero_point


def test_a_dynamic_product_is_its_integers_times_both_scales(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Add", ["a", "b"], ["s"]),
        node("MatMul", ["x", "v"], ["c"]),
        node("Add", ["s", "c"], ["y"]),
    ]
    constants = {"w": W, "v": normal(K, N, seed=3), "b": normal(N, seed=4)}
    _, done = written(tmp_path, nodes, constants, Recipe(mode="dynamic"))
    kinds = [n.op_type for n in onnx.load(done.model).graph.node]
    assert kinds.count("DynamicQuantizeLinear") == 1  # one for both
    assert kinds.count("MatMulInteger") == 2
    q, scale, zero_point = dynamically(X)
    total = constants["b"].astype(np.float64)
    magnitude = np.abs(total)
    for name in ("w", "v"):
        entry = done.sidecar.tensors[name]
        acc = (q - zero_point) @ stored(done)[entry.integers].astype(np.int64)
        total = total + acc.astype(np.float64) * float(scale) * np.array(entry.scale)
        magnitude = magnitude + np.abs(acc) * float(scale) * np.array(entry.scale)
    found = Runner(done.model).run({"x": X})["y"]
    # A handful of float32 roundings of exact integers.
    assert (np.abs(found - total) <= 8 * 2.0**-24 * magnitude).all()
    assert done.check.sqnr["y"] > 30


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_becomes_a_dynamic_product(tmp_path: Path, transposed: bool) -> None:
    constants = {"w": W.T.copy() if transposed else W, "b": normal(N, seed=4)}
    nodes = [node("Gemm", ["x", "w", "b"], ["y"], transB=int(transposed))]
    path, done = written(tmp_path, nodes, constants, Recipe(mode="dynamic"), ("N", K))
    x = {"x": X[:, 0]}
    found, expected = Runner(done.model).run(x)["y"], Runner(path).run(x)["y"]
    entry = next(iter(done.sidecar.tensors.values()))
    # Half a step of every activation and of every weight, and both at once.
    q, scale, _ = dynamically(x["x"])
    del q
    steps = np.array(entry.scale)
    half = 0.5 * float(scale) * np.abs(W).sum(axis=0) + 0.5 * steps * np.abs(x["x"]).sum(axis=1, keepdims=True)
    assert (np.abs(found - expected) <= (half + 0.25 * K * float(scale) * steps) * (1 + 2.0**-16)).all()


def test_convolutions_are_dynamic_where_they_are_named(tmp_path: Path) -> None:
    constants = {"k": normal(8, 3, 3, 3, seed=1), "b": normal(8, seed=2), "w": normal(8, 100, seed=3)}
    nodes = [
        node("Conv", ["x", "k", "b"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("GlobalAveragePool", ["c"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "w"], ["y"]),
    ]
    path, plain = written(tmp_path, nodes, constants, Recipe(mode="dynamic"), ("N", 3, 8, 8))
    assert [layer.operator for layer in plain.plan.layers] == ["MatMul"]
    assert "slower" in {found.operator: found.reason for found in plain.plan.floats}["Conv"]
    recipe = Recipe(mode="dynamic", layers=Layers(include=("op:Conv", "op:MatMul")))
    path, done = written(tmp_path, nodes, constants, recipe, ("N", 3, 8, 8))
    assert "ConvInteger" in {n.op_type for n in onnx.load(done.model).graph.node}
    x = {"x": normal(4, 3, 8, 8, seed=9)}
    found, expected = Runner(done.model).run(x)["y"], Runner(path).run(x)["y"]
    assert 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()) > 28


RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}
HIDDEN = 12


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("more", [False, True], ids=["plain", "states and peepholes"])
def test_an_lstm_is_dynamic_in_the_runtimes_own_operator(tmp_path: Path, direction: str, more: bool) -> None:
    sides = 2 if direction == "bidirectional" else 1
    constants = {
        "w": normal(sides, 4 * HIDDEN, K, seed=1, scale=0.2),
        "r": normal(sides, 4 * HIDDEN, HIDDEN, seed=2, scale=0.2),
        "b": normal(sides, 8 * HIDDEN, seed=3, scale=0.2),
    }
    inputs = ["x", "w", "r", "b"]
    if more:
        constants["h"], constants["c"] = (normal(sides, 5, HIDDEN, seed=seed, scale=0.5) for seed in (4, 5))
        constants["p"] = normal(sides, 3 * HIDDEN, seed=6, scale=0.1)
        inputs += ["", "h", "c", "p"]
    nodes = [
        node("LSTM", inputs, ["s", "", "last"], hidden_size=HIDDEN, direction=direction),
        node("ReduceSum", ["s", "axes"], ["t"], keepdims=0),
        node("Add", ["t", "last"], ["y"]),
    ]
    constants["axes"] = np.array([0], np.int64)
    path, done = written(tmp_path, nodes, constants, Recipe(mode="dynamic"), (7, 5, K))
    made = next(n for n in onnx.load(done.model).graph.node if n.op_type == "DynamicQuantizeLSTM")
    assert made.domain == "com.microsoft"
    assert made.name == done.plan.layers[0].name
    held = stored(done)
    for name, integers in (("w", "w_quantized"), ("r", "r_quantized")):
        entry = done.sidecar.tensors[name]
        assert entry.axis == 1
        assert held[integers].dtype == np.int8
        assert held[f"{name}_scale"].tolist() == [entry.scale] * sides
        largest = np.abs(constants[name]).max(axis=(0, 2))
        assert np.array_equal(np.array(entry.scale, np.float32), (largest / np.float32(127)).astype(np.float32))
    assert not set(held) & {"w", "r"}  # no float copy stays
    x = {"x": normal(7, 5, K, seed=9)}
    found, expected = Runner(done.model).run(x)["y"], Runner(path).run(x)["y"]
    # Inputs of 8 bits and weights of 8 bits leave about 40 dB of a product; seven steps are added up.
    assert 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()) > 30


def test_dynamic_lstms_may_share_their_weights(tmp_path: Path) -> None:
    constants = {"w": normal(1, 4 * HIDDEN, HIDDEN, seed=1), "r": normal(1, 4 * HIDDEN, HIDDEN, seed=2)}
    constants["axes"] = np.array([1], np.int64)
    nodes = [
        node("LSTM", ["x", "w", "r"], ["a"], hidden_size=HIDDEN),
        node("Squeeze", ["a", "axes"], ["b"]),
        node("LSTM", ["b", "w", "r"], ["y"], hidden_size=HIDDEN),
    ]
    path, done = written(tmp_path, nodes, constants, Recipe(mode="dynamic"), (7, 5, HIDDEN))
    made = [n.op_type for n in onnx.load(done.model).graph.node]
    assert (made.count("DynamicQuantizeLSTM"), made.count("Transpose")) == (2, 2)
    x = {"x": normal(7, 5, HIDDEN, seed=9)}
    found, expected = Runner(done.model).run(x)["y"], Runner(path).run(x)["y"]
    assert 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()) > 25


def test_wrong_scales_of_a_dynamic_lstm_are_found(tmp_path: Path) -> None:
    constants = {"w": normal(1, 4 * HIDDEN, K, seed=1), "r": normal(1, 4 * HIDDEN, HIDDEN, seed=2)}
    nodes = [node("LSTM", ["x", "w", "r"], ["y"], hidden_size=HIDDEN)]
    _, done = written(tmp_path, nodes, constants, Recipe(mode="dynamic"), (7, 5, K))
    sidecar = json.loads(done.sidecar_path.read_text())
    sidecar["tensors"]["r"]["scale"][3] *= 1.5
    done.sidecar_path.write_text(json.dumps(sidecar))
    assert [str(found) for found in verify(done.sidecar_path).findings] != []
    assert "scale of 'r', index 3" in str(verify(done.sidecar_path).findings[0])


@pytest.mark.parametrize("operator", RECURRENT)
def test_recurrent_weights_are_stored_as_integers(tmp_path: Path, operator: str) -> None:
    gates = RECURRENT[operator]
    constants = {
        "w": normal(1, gates * HIDDEN, K, seed=1, scale=0.2),
        "r": normal(1, gates * HIDDEN, HIDDEN, seed=2, scale=0.2),
        "b": normal(1, 2 * gates * HIDDEN, seed=3, scale=0.2),
    }
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node(operator, ["t", "w", "r", "b"], ["y"], hidden_size=HIDDEN),
    ]
    _, done = written(tmp_path, nodes, constants, Recipe(mode="weights"))
    assert done.plan.layers[0].inputs == ("w", "r")
    held = stored(done)
    reals = {
        name: held[entry.integers].astype(np.float32) * np.array(entry.scale, np.float32).reshape(1, -1, 1)
        for name, entry in done.sidecar.tensors.items()
    }
    again = save(tmp_path / "again.onnx", nodes, {"x": ["N", 7, K]}, {"y": None}, {**constants, **reals})
    found, expected = Runner(done.model).run({"x": X})["y"], Runner(again).run({"x": X})["y"]
    assert (found == expected).all()  # the same float32 weights in the same operator


STORED: dict[str, tuple[list[onnx.NodeProto], dict[str, Array], list[int | str]]] = {
    "MatMul": ([node("MatMul", ["x", "w"], ["y"])], {"w": W}, ["N", 7, K]),
    "Gemm, transB": ([node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": W.T.copy()}, ["N", K]),
    "Conv": ([node("Conv", ["x", "w"], ["y"])], {"w": normal(16, 7, 7, seed=5)}, ["N", 7, K]),
    "ConvTranspose": ([node("ConvTranspose", ["x", "w"], ["y"])], {"w": normal(7, 16, 7, seed=5)}, ["N", 7, K]),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_weights_are_what_the_model_computes_with(tmp_path: Path, name: str) -> None:
    nodes, constants, shape = STORED[name]
    _, done = written(tmp_path, nodes, constants, Recipe(mode="weights"), shape)
    entry, weight = done.sidecar.tensors["w"], stored(done)[done.sidecar.tensors["w"].integers]
    along = [1] * weight.ndim
    along[entry.axis or 0] = -1
    scale = np.array(entry.scale, np.float32).reshape(along)
    assert weight.dtype == np.int8
    assert (weight == np.clip(np.rint(constants["w"] / scale), -127, 127)).all()
    again = save(tmp_path / "again.onnx", nodes, {"x": shape}, {"y": None}, {"w": weight.astype(np.float32) * scale})
    x = {"x": X if len(shape) == 3 else X[:, 0]}
    assert (as_written(done.model, x["x"]) == as_written(again, x["x"])).all()
    assert done.check.sqnr["y"] > 30


@pytest.mark.parametrize(("bits", "size", "transposed"), [(4, 16, False), (4, None, True), (8, 32, False)])
def test_weights_in_blocks(tmp_path: Path, bits: int, size: int | None, transposed: bool) -> None:
    weight = W.T.copy() if transposed else W
    nodes = [node("Gemm", ["x", "w"], ["y"], transB=int(transposed))]
    recipe = Recipe(mode="weights", weight=Weight(bits=bits, block_size=size))
    _, done = written(tmp_path, nodes, {"w": weight}, recipe, ("N", K))
    entry, held = done.sidecar.tensors["w"], stored(done)
    assert entry.blocks is not None
    assert (entry.blocks.size, entry.blocks.axis, entry.scale) == (size or 32, int(transposed), [])
    assert entry.dtype == ("uint4" if bits == 4 else "int8")
    blocks = -(-K // (size or 32))
    assert held[entry.blocks.scale].shape == ((N, blocks) if transposed else (blocks, N))
    along = np.repeat(held[entry.blocks.scale], size or 32, axis=entry.blocks.axis).take(
        range(K), axis=entry.blocks.axis
    )
    reals = held[entry.integers].astype(np.float32)
    if entry.blocks.zero_point is not None:
        middle = held[entry.blocks.zero_point].astype(np.float32)
        reals = reals - np.repeat(middle, size or 32, axis=entry.blocks.axis).take(range(K), axis=entry.blocks.axis)
    product = (
        X[:, 0].astype(np.float64) @ (reals * along).astype(np.float64).T if transposed else X[:, 0] @ (reals * along)
    )
    found = as_written(done.model, X[:, 0])
    assert np.abs(found - product).max() <= (K + 8) * 2.0**-24 * K * np.abs(X).max() * np.abs(W).max()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 70),
    st.integers(1, 5),
    st.sampled_from([16, 32]),
    st.sampled_from(["uint4", "int8"]),
    st.integers(0, 9),
)
def test_blocks_come_back_within_half_a_step_or_clipped_for_less_error(
    length: int, rows: int, size: int, kind: str, seed: int
) -> None:
    integer = IntegerType(kind, narrow=kind == "int8")
    values = normal(rows, length, seed=seed)
    blocks = block_parameters(values, integer, size, 1)
    back = dequantize_blocks(quantize_blocks(values, blocks, integer), blocks)
    whole = block_parameters_without_shrinking(values, integer, size)
    plain = np.abs(whole - values)
    error = in_blocks((back - values).astype(np.float64) ** 2, size, 1).sum(axis=-1)
    least = in_blocks(plain.astype(np.float64) ** 2, size, 1).sum(axis=-1)
    assert (
        error <= least * (1 + 2.0**-14) + 2.0**-40
    ).all()  # never worse than the whole range, but for float32's own noise
    assert blocks.scale.dtype == np.float32
    assert blocks.scale.shape == (rows, -(-length // size))


def block_parameters_without_shrinking(values: Array, integer: IntegerType, size: int) -> NDArray[np.float64]:
    """Weights rounded with the scale of every block's whole range."""
    parts = in_blocks(values, size, 1)
    lo, hi = np.minimum(parts.min(-1), 0), np.maximum(parts.max(-1), 0)
    levels = integer.qmax if integer.signed else integer.qmax - integer.qmin
    span = (np.maximum(-lo, hi) if integer.signed else hi - lo) / np.float64(levels)
    scale = np.where(span == 0, 1, span).astype(np.float32)[..., None]
    middle = np.zeros_like(scale) if integer.signed else np.rint(-lo[..., None] / scale)
    q = np.clip(np.rint(parts / scale) + middle, integer.qmin, integer.qmax)
    rounded: NDArray[np.float64] = np.asarray((q - middle) * scale, np.float64).reshape(len(values), -1)[
        :, : values.shape[1]
    ]
    return rounded


def test_an_embedding_is_a_table_of_integers(tmp_path: Path) -> None:
    nodes = [node("Gather", ["t", "x"], ["e"]), node("MatMul", ["e", "w"], ["y"])]
    constants = {"t": normal(4000, K, seed=1), "w": W}
    modes: list[Literal["dynamic", "weights"]] = ["dynamic", "weights"]
    for mode in modes:
        recipe = Recipe(mode=mode)
        path, done = written(tmp_path, nodes, constants, recipe, ("N", 5), onnx.TensorProto.INT64)
        assert done.plan.layers[0].arithmetic.value == "lookup"
        assert done.model.stat().st_size < 0.27 * path.stat().st_size


@pytest.mark.parametrize("mode", ["dynamic", "weights"])
def test_the_command_needs_no_data_and_gives_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    path = save(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 7, K]}, {"y": None}, {"w": W})
    command = ["convert", str(path), "--mode", mode, "--json", "-o"]
    assert run([*command, str(tmp_path / "a.onnx")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["self_check"]["sqnr_db"]["y"] > 30
    assert run([*command, str(tmp_path / "b.onnx")]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert (sidecar["mode"], sidecar["calibration"]) == (mode, None)
    assert run(["verify", str(tmp_path / "a.json")]) == 0
    sidecar["tensors"]["w"]["scale"][3] *= 1.5
    (tmp_path / "a.json").write_text(json.dumps(sidecar))
    capsys.readouterr()
    assert run(["verify", str(tmp_path / "a.json")]) == 3
    assert "scale of 'w', index 3" in capsys.readouterr().err
    assert run([*command, str(tmp_path / "c.onnx"), "--stats", str(path)]) == 2
    assert run(["convert", str(path), "-o", str(tmp_path / "c.onnx")]) == 2
    assert "--mode" in capsys.readouterr().err


def decoder() -> tuple[list[onnx.NodeProto], dict[str, Shape]]:
    """Keys of new tokens behind those of earlier ones, under a mask over both."""
    nodes = [
        node("MatMul", ["x", "w"], ["new"]),
        node("Concat", ["past", "new"], ["k"], axis=1),
        node("Cast", ["mask"], ["m"], to=onnx.TensorProto.FLOAT),
        node("MatMul", ["m", "k"], ["y"]),
    ]
    return nodes, {"x": ["N", "s", 32], "past": ["N", "p", 32], "mask": ["N", 1, "t"]}


def image() -> tuple[list[onnx.NodeProto], dict[str, Shape]]:
    """A convolution that wants images of more than one pixel."""
    nodes = [node("Conv", ["x", "v"], ["c"]), node("Flatten", ["c"], ["f"]), node("ReduceMean", ["f"], ["y"], axes=[1])]
    return nodes, {"x": ["N", 8, "h", "w"]}


@pytest.mark.parametrize("made", [decoder, image])
def test_free_axes_get_sizes_that_the_model_runs(
    tmp_path: Path, made: Callable[[], tuple[list[onnx.NodeProto], dict[str, Shape]]]
) -> None:
    nodes, inputs = made()
    constants = {"w": normal(32, 32, seed=1), "v": normal(16, 8, 5, 5, seed=2)}
    used = {name: value for name, value in constants.items() if any(name in n.input for n in nodes)}
    model = save(tmp_path / "m.onnx", nodes, inputs, {"y": None}, used, kinds={"mask": onnx.TensorProto.INT64})
    done = convert(model, tmp_path / "q.onnx", recipe=Recipe(mode="weights"))
    assert len(done.sidecar.layers) == 1


def test_a_model_that_runs_no_random_inputs_asks_for_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        node("Gather", ["w", "x"], ["g"]),
        node("Reshape", ["g", "shape"], ["r"]),
        node("MatMul", ["r", "w"], ["y"]),
    ]
    constants = {"w": normal(32, 32, seed=1), "shape": np.array([7, 32])}
    kinds = {"x": onnx.TensorProto.INT64}
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", "s"]}, {"y": None}, constants, kinds=kinds)
    assert run(["convert", str(model), "--mode", "dynamic", "-o", str(tmp_path / "q.onnx")]) == 1
    assert "does not run random inputs" in (told := capsys.readouterr().err)
    assert "--data" in told


def test_a_model_without_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": ["N", 4]}, {"y": None}, {})
    assert run(["convert", str(path), "--mode", "weights", "-o", str(tmp_path / "q.onnx")]) == 1
    assert "no weights to quantize" in capsys.readouterr().err
    assert not (tmp_path / "q.onnx").exists()


def test_a_model_whose_weights_do_not_pay_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node("Conv", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, {"w": normal(8, 3, 3, 3, seed=1)})
    command = ["convert", str(path), "--mode", "dynamic", "-o", str(tmp_path / "q.onnx")]
    assert run(command) == 1
    assert "of Conv 'y_node': convolutions run slower with dynamic integers" in capsys.readouterr().err
    assert run([*command, "--include", "y_node"]) == 0
