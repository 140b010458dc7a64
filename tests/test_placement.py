"""What becomes an integer layer where a runtime has float kernels as well, and what its output is then."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, convert, verify
from quantcli.cli import run
from quantcli.recipe import Layers, Recipe, Tune
from tests.graphs import Array, Shape, node, normal, save, weight

LENGTH, WIDTH = 6, 16
PLAIN = Recipe(tune=Tune(smooth=False))


def converted(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Array],
    x: Array,
    shape: Shape,
    recipe: Recipe | None = None,
    form: str = "qdq",
) -> Conversion:
    kinds = {"x": onnx.TensorProto.INT64} if x.dtype == np.int64 else None
    outputs: dict[str, Shape | None] = {"y": None}
    model = save(folder / "m.onnx", nodes, {"x": shape}, outputs, constants, kinds=kinds)
    np.savez(folder / "d.npz", x=x)
    return convert(model, folder / "q.onnx", data=folder / "d.npz", recipe=recipe, form=form, verified=True)


def stored(done: Conversion) -> dict[str, Array]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(done.model).graph.initializer}


def reader(done: Conversion, name: str) -> onnx.NodeProto:
    nodes: list[onnx.NodeProto] = list(onnx.load(done.model).graph.node)
    return next(n for n in nodes if n.name == name)


def block(folder: Path, form: str = "qdq") -> Conversion:
    """The second half of a transformer block: x + W·LayerNorm(x) + c, normalised again; c is no bias: it differs by row."""
    constants = {
        "g": 1 + normal(WIDTH, seed=1, scale=0.1),
        "b": normal(WIDTH, seed=2, scale=0.1),
        "w": normal(WIDTH, WIDTH, seed=3, scale=0.3),
        "c": normal(LENGTH, WIDTH, seed=4),
    }
    nodes = [
        node("LayerNormalization", ["x", "g", "b"], ["n"]),
        node("MatMul", ["n", "w"], ["m"]),
        node("Add", ["m", "c"], ["a"]),
        node("Add", ["a", "n"], ["s"]),
        node("LayerNormalization", ["s", "g", "b"], ["y"]),
    ]
    return converted(folder, nodes, constants, normal(8, LENGTH, WIDTH, seed=5), ["N", LENGTH, WIDTH], PLAIN, form)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_a_product_that_float_operators_read_is_its_dequantized_accumulator(tmp_path: Path, form: str) -> None:
    done = block(tmp_path, form=form)
    assert [layer.operator for layer in done.plan.layers] == ["MatMul"]
    layer, n, w = done.plan.layers[0], done.sidecar.tensors["n"], done.sidecar.tensors["w"]
    assert (layer.outputs, layer.clamp, layer.multipliers) == (("m",), None, ())
    assert "m" not in done.plan.tensors
    written = onnx.load(done.model)
    written.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in (n.integers, "m"))
    q, m = Runner(written.SerializeToString()).run({"x": normal(8, LENGTH, WIDTH, seed=5)}, [n.integers, "m"]).values()
    acc = (q.astype(np.int64) - n.zero_point[0]) @ stored(done)[w.integers].astype(np.int64)
    scale = np.float32(n.scale[0]) * np.array(w.scale, np.float32)
    assert layer.accumulator_scale == tuple(scale.tolist())
    assert (m == acc.astype(np.float32) * scale).all()  # |acc| < 2^24: the product is the only rounding
    kinds = {found.op_type for found in written.graph.node}
    assert ("MatMulIntegerToFloat" in kinds) == (form == "qoperator")
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []


def test_float_operators_read_what_was_not_rounded(tmp_path: Path) -> None:
    done = block(tmp_path)
    assert next(iter(reader(done, "m_node").input)) == "n_dequantized"
    assert list(reader(done, "s_node").input) == ["a", "n"]


def test_float_operators_that_fuse_into_a_slower_one_are_kept_apart(tmp_path: Path) -> None:
    done = block(tmp_path)
    name = reader(done, "y_node").input[0]
    between = next(n for n in onnx.load(done.model).graph.node if name in n.output)
    assert (between.op_type, list(between.input)) == ("Max", ["s"])


def test_a_chain_of_products_stays_in_integers(tmp_path: Path) -> None:
    constants = {"w": normal(WIDTH, WIDTH, seed=1), "v": normal(WIDTH, WIDTH, seed=2), "u": normal(WIDTH, 4, seed=3)}
    nodes = [
        node("Gemm", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Gemm", ["b", "v"], ["c"]),
        node("Flatten", ["c"], ["d"]),
        node("Gemm", ["d", "u"], ["y"]),
    ]
    done = converted(tmp_path, nodes, constants, normal(16, WIDTH, seed=4), ["N", WIDTH])
    assert [layer.accumulator_scale is None for layer in done.plan.layers] == [True, True, True, False]
    assert done.plan.layers[0].absorbed == ("b_node",)
    assert done.plan.floats == ()


def attention(folder: Path, length: int, depth: int, recipe: Recipe | None = None, free: bool = False) -> Conversion:
    nodes = [
        node("Exp", ["x"], ["q"]),
        node("Transpose", ["q"], ["k"], perm=[0, 2, 1]),
        node("MatMul", ["q", "k"], ["s"]),
        node("Softmax", ["s"], ["p"]),
        node("MatMul", ["p", "q"], ["o"]),
        node("MatMul", ["o", "w"], ["y"]),
    ]
    x = normal(3, length, depth, seed=1)
    shape = ["N", "T" if free else length, depth]
    return converted(folder, nodes, {"w": normal(depth, 4, seed=2)}, x, shape, recipe)


def test_products_of_activations_are_integer_where_there_is_enough_to_multiply(tmp_path: Path) -> None:
    small = {found.name: found.reason for found in attention(tmp_path, 16, 16).plan.floats}
    assert "multiply-accumulates per value" in small["s_node"]
    assert "multiply-accumulates per value" in small["o_node"]
    large = attention(tmp_path, 256, 128)
    assert [layer.name for layer in large.plan.layers] == ["s_node", "o_node", "y_node"]
    # 256·256·128 products per 2·256·128 + 256² values
    assert all(layer.accumulator_scale is not None for layer in large.plan.layers if layer.name != "o_node")
    named = attention(tmp_path, 16, 16, Recipe(layers=Layers(include=("op:MatMul",))))
    assert [layer.name for layer in named.plan.layers] == ["s_node", "o_node", "y_node"]


@pytest.mark.parametrize(("depth", "integer"), [(32, False), (64, False), (256, True)])
def test_sequences_of_free_length_count_as_long_as_they_usually_are(tmp_path: Path, depth: int, integer: bool) -> None:
    names = {layer.name for layer in attention(tmp_path, 16, depth, free=True).plan.layers}
    assert names == ({"s_node", "o_node", "y_node"} if integer else {"y_node"})


def test_a_large_table_is_stored_in_integers_by_column(tmp_path: Path) -> None:
    table = normal(5000, WIDTH, seed=1) * np.linspace(0.1, 3, WIDTH, dtype=np.float32)
    nodes = [node("Gather", ["t", "x"], ["e"]), node("MatMul", ["e", "w"], ["y"])]
    x = np.arange(40).reshape(8, 5) * 31 % 5000
    done = converted(tmp_path, nodes, {"t": table, "w": normal(WIDTH, 4, seed=2)}, x, ["N", 5])
    entry = done.sidecar.tensors["t"]
    scale = np.array(entry.scale, np.float32)
    assert (entry.role, entry.axis, done.plan.layers[0].accumulator_scale) == ("weight", 1, tuple(scale.tolist()))
    written = onnx.load(done.model)
    written.graph.output.append(onnx.helper.make_empty_tensor_value_info("e"))
    found = Runner(written.SerializeToString()).run({"x": x}, ["e"])["e"]
    q = np.clip(np.rint(table / scale), -127, 127)
    assert (found == q[x].astype(np.float32) * scale).all()
    assert done.model.stat().st_size < 1.2 * table.size
    small = converted(tmp_path, nodes, {"t": table[:500], "w": normal(WIDTH, 4, seed=2)}, x % 500, ["N", 5])
    assert [found.reason for found in small.plan.floats] == ["its table is small, and looking up costs nothing"]


def gated(folder: Path, last: str) -> Conversion:
    """A squeeze-and-excitation gate, and what reads the gated map."""
    constants = {
        "w": normal(8, 3, 3, 3, seed=1),
        "d": normal(8, 8, seed=2),
        "v": normal(4, 8, 1, 1, seed=3),
        "shape": np.array([0, 8, 1, 1]),
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("GlobalAveragePool", ["c"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "d"], ["h"]),
        node("Sigmoid", ["h"], ["s"]),
        node("Reshape", ["s", "shape"], ["r"]),
        node("Mul", ["c", "r"], ["m"]),
        node("Conv", ["m", "v"], ["y"]) if last == "Conv" else node("Exp", ["m"], ["y"]),
    ]
    return converted(folder, nodes, constants, normal(4, 3, 8, 8, seed=4), ["N", 3, 8, 8])


@pytest.mark.parametrize("last", ["Conv", "Exp"])
def test_few_float_values_join_many_integers(tmp_path: Path, last: str) -> None:
    done = gated(tmp_path, last)
    names = {layer.name for layer in done.plan.layers}
    assert {"c_node", "g_node", "h_node", "m_node"} <= names
    assert {found.name for found in done.plan.floats} == {"s_node", "r_node"} | ({"y_node"} if last == "Exp" else set())


@pytest.mark.parametrize(("last", "integer"), [("Conv", True), ("Exp", False)])
def test_as_many_float_values_join_integers_only_for_a_layer_that_accumulates(
    tmp_path: Path, last: str, integer: bool
) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Exp", ["c"], ["e"]),
        node("Add", ["c", "e"], ["a"]),
        node("Conv", ["a", "w"], ["y"]) if last == "Conv" else node("Exp", ["a"], ["y"]),
    ]
    done = converted(tmp_path, nodes, {"w": normal(4, 4, 1, 1, seed=1)}, normal(4, 4, 5, 5, seed=2), ["N", 4, 5, 5])
    assert ("a_node" in {layer.name for layer in done.plan.layers}) == integer


@pytest.mark.parametrize(("last", "integer"), [("LayerNormalization", False), ("MatMul", True)])
def test_embeddings_are_joined_in_float_where_float_operators_read_them(
    tmp_path: Path, last: str, integer: bool
) -> None:
    """A vision transformer's patches, with a small row for the class before them and positions added."""
    constants = {
        "w": normal(8, 3, 4, 4, seed=1),
        "shape": np.array([0, 8, -1]),
        "class": normal(1, 1, 8, seed=2, scale=0.02),
        "positions": normal(1, 5, 8, seed=3, scale=0.02),
        "g": 1 + normal(8, seed=4, scale=0.1),
        "v": normal(8, 8, seed=5),
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"], strides=[4, 4]),
        node("Reshape", ["c", "shape"], ["r"]),
        node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        node("Concat", ["class", "t"], ["k"], axis=1),
        node("Add", ["k", "positions"], ["e"]),
        node(last, ["e", "g" if last == "LayerNormalization" else "v"], ["n"]),
        node("MatMul", ["n", "v"], ["m"]),
        node("Add", ["e", "m"], ["s"]),
        node("LayerNormalization", ["s", "g"], ["y"]),
    ]
    done = converted(tmp_path, nodes, constants, normal(1, 3, 8, 8, seed=6), [1, 3, 8, 8])
    names = {layer.name for layer in done.plan.layers}
    assert names >= {"c_node", "r_node", "t_node", "m_node"}
    assert ({"k_node", "e_node"} <= names) == integer
    if not integer:
        reasons = {found.name: found.reason for found in done.plan.floats}
        assert reasons["k_node"] == "it would round what only float operators read"
        assert reasons["e_node"].startswith("an island")


def detector(folder: Path, target: str, pixels: float, last: str = "Transpose") -> Conversion:
    """Boxes in so many pixels and scores up to 1 as one tensor, and then moved, or multiplied."""
    constants = {
        "w": normal(4, 3, 1, 1, seed=1, scale=pixels),
        "v": normal(6, 3, 1, 1, seed=2),
        "u": weight(5, 10, 1, 1),
    }
    nodes = [
        node("Conv", ["x", "w"], ["boxes"]),
        node("Conv", ["x", "v"], ["l"]),
        node("Sigmoid", ["l"], ["scores"]),
        node("Concat", ["boxes", "scores"], ["j"], axis=1),
        node("Transpose", ["j"], ["y"]) if last == "Transpose" else node("Conv", ["j", "u"], ["y"]),
    ]
    recipe = Recipe(target=target, tune=Tune(effort="fast"))
    return converted(folder, nodes, constants, normal(8, 3, 5, 5, seed=3), ["N", 3, 5, 5], recipe)


@pytest.mark.parametrize(
    ("target", "pixels", "why"),
    [
        ("ort-x86", 1, "it would round what only float operators read"),
        ("ort-x86", 100, "'j' spans a range that no grid of 8 bits resolves"),
        ("npu-int8", 100, "'j' spans a range that no grid of 8 bits resolves"),
    ],
)
def test_scores_are_not_rounded_to_the_grid_of_boxes(tmp_path: Path, target: str, pixels: float, why: str) -> None:
    done = detector(tmp_path, target, pixels)
    reasons = {found.name: found.reason for found in done.plan.floats}
    assert reasons["j_node"].startswith(why)
    x = normal(4, 3, 5, 5, seed=4)
    scores = [Runner(path).run({"x": x})["y"].T[:, 4:] for path in (tmp_path / "m.onnx", done.model)]
    # Of logits, half a step each of |x| ≤ 4 times Σ|v| ≤ 6, of |v| ≤ 2 times Σ|x| ≤ 12, and of logits within 7; slopes of 1/4 at
    # most, and half a step of scores: (4/127·6 + 2/127·12 + 7/127)/8 + 1/254. One of the boxes' steps is above 1.
    assert np.abs(scores[0] - scores[1]).max() < 0.07


@pytest.mark.parametrize("target", ["ort-x86", "npu-int8"])
def test_what_a_product_reads_is_joined_in_integers(tmp_path: Path, target: str) -> None:
    done = detector(tmp_path, target, 100, "Conv")
    assert "j_node" in {layer.name for layer in done.plan.layers}


CHANGES = {"accumulator_scale": [1.0], "clamp": [0, 255]}


@pytest.mark.parametrize("field", CHANGES)
def test_a_change_of_a_real_layer_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str) -> None:
    done = block(tmp_path)
    document = json.loads(done.sidecar_path.read_text())
    document["layers"][0][field] = CHANGES[field]
    done.sidecar_path.write_text(json.dumps(document))
    assert run(["verify", str(done.sidecar_path), "--data", str(tmp_path / "d.npz")]) == 3
    assert "layer 'm_node'" in capsys.readouterr().err


def test_a_weight_that_is_not_the_sidecars_is_caught_in_the_reals(tmp_path: Path) -> None:
    done = block(tmp_path)
    written = onnx.load(done.model)
    weight = next(t for t in written.graph.initializer if t.name == done.sidecar.tensors["w"].integers)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 1 if values[0, 0] < 100 else -1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(written, done.model)
    found = [str(finding) for finding in verify(done.sidecar_path, tmp_path / "d.npz").findings]
    assert any("integers of 'w'" in line for line in found), found


def test_how_weights_are_stored_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"])]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 64]}, {"m": ["N", 64]}, {"w": normal(64, 64)})
    np.savez(tmp_path / "d.npz", x=normal(8, 64))
    told = []
    for wishes in (
        "--mode weights",
        f"--data {tmp_path / 'd.npz'} --effort fast",
        f"--data {tmp_path / 'd.npz'} --per-tensor",
    ):
        command = (
            f"convert {model} {wishes} --weight-bits 4 --everywhere -o {tmp_path / 'q.onnx'} --json --explain m_node"
        )
        assert run(command.split()) == 0
        found = json.loads(capsys.readouterr().out)["explained"][0]["tensors"]
        told.append(dict(found)["w"])
    assert told[0] == "uint4, 128 scales, each of 32 values along axis 0"
    assert re.fullmatch(r"int4 in int8, 64 scales from \S+ to \S+", told[1])
    assert re.fullmatch(r"int4 in int8, scale \S+, zero point 0", told[2])


def test_every_decision_can_be_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block(tmp_path)
    command = ["convert", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "d.npz"), "-o", str(tmp_path / "e.onnx")]
    assert run([*command, "--explain", "m_node", "--explain", "op:Add"]) == 0
    told = capsys.readouterr().out
    assert "MatMul 'm_node': integer layer: it multiplies and accumulates" in told
    # one sample: 6 rows of 16 values in and out, 16·16 weights, 6·16·16 products
    assert "1,536 multiply-accumulates, 96 values read, 96 values made, 256 stored values read" in told
    assert "Add 's_node': stays float: an island" in told
    assert run([*command, "--explain", "m_node", "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)["explained"]
    assert [(found["name"], found["integer"], found["macs"]) for found in explained] == [("m_node", True, 1536)]
    assert run([*command, "--explain", "nothing_like_it"]) == 2
    assert "nothing is named 'nothing_like_it'" in capsys.readouterr().err


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_a_float_convolution_with_its_activation_is_float_in_onnx_runtime(tmp_path: Path, activation: str) -> None:
    """The runtime takes an activation before QuantizeLinear away, and would make integers of the convolution before it."""
    wide = normal(8, 1, 3, 3, seed=2) * np.geomspace(0.01, 10, 8, dtype=np.float32).reshape(8, 1, 1, 1)
    constants = {"w": normal(8, 3, 1, 1, seed=1), "d": wide, "v": normal(4, 8, 1, 1, seed=3)}
    bounds = {"lo": np.array(0, np.float32), "hi": np.array(60, np.float32)} if activation == "Clip" else {}
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Conv", ["c", "d"], ["e"], group=8),
        node(activation, ["e", *bounds], ["r"]),
        node("Conv", ["r", "v"], ["y"]),
    ]
    recipe = Recipe(layers=Layers(exclude=("e_node",)))
    done = converted(tmp_path, nodes, {**constants, **bounds}, normal(4, 3, 8, 8, seed=4), ["N", 3, 8, 8], recipe)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    onnxruntime.InferenceSession(str(done.model), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2
    assert {"Conv", "FusedConv"} & set(kinds)


def test_a_clip_to_what_is_no_number_stays_float(tmp_path: Path) -> None:
    constants = {
        "w": normal(8, 3, 3, 3, seed=1),
        "v": normal(4, 8, 1, 1, seed=2),
        "lo": np.array(np.nan, np.float32),
        "hi": np.array(1, np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Clip", ["c", "lo", "hi"], ["r"]),
        node("Conv", ["r", "v"], ["y"]),
    ]
    done = converted(tmp_path, nodes, constants, normal(32, 3, 8, 8, seed=4), ["N", 3, 8, 8])
    assert [(entry.name, entry.reason) for entry in done.sidecar.float_layers] == [
        ("r_node", "a bound is not a number")
    ]
    assert [layer.operator for layer in done.sidecar.layers] == ["Conv", "Conv"]
    assert min(done.check.sqnr.values()) > 25


@pytest.mark.parametrize(
    "layers", [Layers(), Layers(everywhere=True), Layers(include=("s_node", "a_node", "d_node", "e_node"))]
)
def test_what_a_float_kernel_makes_is_rounded_behind_constants(tmp_path: Path, layers: Layers) -> None:
    constants = {
        "w": normal(8, 8, 3, 3, seed=1, scale=0.3),
        "c": np.array([-0.5], np.float32),
        "v": normal(8, 1, 3, 3, seed=2, scale=0.3),
    }
    nodes = [
        node("Conv", ["x", "w"], ["d"]),
        node("HardSwish", ["d"], ["s"]),
        node("Add", ["s", "c"], ["a"]),
        node("Conv", ["a", "v"], ["e"], group=8, pads=[1, 1, 1, 1]),
        node("Relu", ["e"], ["y"]),
    ]
    recipe = Recipe(layers=layers, tune=Tune(effort="fast"))
    done = converted(tmp_path, nodes, constants, normal(16, 8, 9, 9, seed=3), ["N", 8, 9, 9], recipe)
    asked = layers != Layers()
    operators = [layer.operator for layer in done.tuned.plan.layers]
    assert operators == ["Conv", *(["HardSwish", "Add"] if asked else []), "Conv"]
    assert ("s" in done.plan.tensors) == asked
    assert "a" in done.plan.tensors


def leading() -> list[onnx.NodeProto]:
    """A convolution of images, a depthwise one, one of many channels and another depthwise one, each with a HardSwish behind it."""
    return [
        node("Conv", ["x", "w"], ["a"], strides=[2, 2]),
        node("HardSwish", ["a"], ["b"]),
        node("Conv", ["b", "v"], ["c"], group=16),
        node("HardSwish", ["c"], ["d"]),
        node("Conv", ["d", "u"], ["e"]),
        node("HardSwish", ["e"], ["f"]),
        node("Conv", ["f", "t"], ["g"], group=32),
        node("HardSwish", ["g"], ["h"]),
        node("Conv", ["h", "s"], ["y"]),
    ]


LEADING: dict[str, Array] = {
    "w": normal(16, 3, 3, 3, seed=1, scale=0.3),
    "v": normal(16, 1, 3, 3, seed=2, scale=0.3),
    "u": normal(32, 16, 3, 3, seed=3, scale=0.1),
    "t": normal(32, 1, 3, 3, seed=4, scale=0.3),
    "s": normal(4, 32, 1, 1, seed=5, scale=0.3),
}
FLOATS: dict[str, tuple[Recipe, list[str]]] = {
    "on x86": (Recipe(), ["a_node", "b_node", "c_node", "d_node"]),
    "on Arm, where it was not measured": (Recipe(target="ort-arm"), []),
    "on an accelerator": (Recipe(target="npu-int8"), []),
    "everywhere": (Recipe(layers=Layers(everywhere=True)), []),
}


@pytest.mark.parametrize("case", FLOATS)
def test_light_convolutions_at_the_beginning_stay_float_with_their_hard_swish(tmp_path: Path, case: str) -> None:
    """Of 15 and 5 multiply-accumulates per value, then one of 80; what follows integers is an integer layer however light."""
    recipe, expected = FLOATS[case]
    recipe = msgspec.structs.replace(recipe, tune=Tune(effort="fast"))
    done = converted(tmp_path, leading(), LEADING, normal(16, 3, 21, 21, seed=6), ["N", 3, 21, 21], recipe)
    assert [layer.name for layer in done.plan.floats] == expected
    reasons = [layer.reason for layer in done.plan.floats if layer.operator == "Conv"]
    assert all("HardSwish in steps" in reason for reason in reasons)
    assert min(done.check.sqnr.values()) > 25


def test_a_network_that_is_all_beginning_has_integer_layers(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], strides=[2, 2]),
        node("HardSwish", ["a"], ["b"]),
        node("GlobalAveragePool", ["b"], ["y"]),
    ]
    x, recipe = normal(16, 3, 21, 21, seed=6), Recipe(tune=Tune(effort="fast"))
    done = converted(tmp_path, nodes, {"w": LEADING["w"]}, x, ["N", 3, 21, 21], recipe)
    assert "Conv" in [layer.operator for layer in done.plan.layers]


def test_a_clamp_or_a_name_makes_them_integer_layers(tmp_path: Path) -> None:
    swish = ["HardSwish", "Relu"]
    for operator, layers in zip(swish, (Layers(include=("*",)), Layers()), strict=True):
        graph = [node(operator, ["a"], ["b"]) if one.output[0] == "b" else one for one in leading()]
        recipe = Recipe(layers=layers, tune=Tune(effort="fast"))
        done = converted(tmp_path, graph, LEADING, normal(16, 3, 21, 21, seed=6), ["N", 3, 21, 21], recipe)
        assert done.plan.floats == ()
