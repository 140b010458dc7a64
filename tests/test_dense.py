"""Dense layers of three and more axes: one product, one rounding, whatever the axes are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, Recipe, calibrate, convert, verify
from quantcli.cost import work_of
from quantcli.dense import ROWS
from quantcli.fold import fold
from quantcli.load import load
from quantcli.load.learned import LEARNED
from quantcli.recipe import Layers, Tune
from quantcli.tune.smooth import smooth
from tests.graphs import Array, Shape, node, normal, save

WIDTH, WIDER, LENGTH = 8, 12, 5
FAST = Tune(effort="fast")


def dense(
    path: Path,
    shape: Shape,
    *,
    between: str | None = None,
    bias: Array | None = None,
    given_out: bool = False,
    again: bool = False,
) -> Path:
    """Write a dense layer, and behind an operator another one; the bias of the first stands before or behind the product."""
    constants = {
        "w": normal(WIDTH, WIDER, seed=1, scale=0.3),
        "b": normal(WIDER, seed=2) if bias is None else bias,
        "v": normal(WIDER, WIDTH, seed=3, scale=0.3),
        "c": normal(1, 1, WIDTH, seed=4),
    }
    nodes = [node("MatMul", ["x", "w"], ["p"]), node("Add", ["b", "p"], ["y" if between is None else "a"])]
    if between is not None:
        nodes += [node(between, ["a"], ["h"]), node("MatMul", ["h", "v"], ["q"]), node("Add", ["q", "c"], ["y"])]
    if again:
        nodes.append(node("Exp", ["p"], ["z"]))
    outputs: dict[str, Shape | None] = {
        "y": None,
        **({"p": None} if given_out else {}),
        **({"z": None} if again else {}),
    }
    return save(path, nodes, {"x": shape}, outputs, constants, opset=20)


def operators(model: ir.Model) -> list[str]:
    return [found.op_type for found in model.graph]


def converted(folder: Path, model: Path, x: Array, recipe: Recipe, form: str = "qdq") -> Conversion:
    np.savez(folder / "d.npz", x=x)
    out = folder / ("c" if form == "c" else "q.onnx")
    return convert(model, out, data=folder / "d.npz", recipe=recipe, form=form, verified=True)


SHAPES: list[tuple[Shape, tuple[int, ...]]] = [
    (["N", LENGTH, WIDTH], (3, LENGTH, WIDTH)),
    ([2, "T", WIDTH], (2, 7, WIDTH)),
    (["N", "T", WIDTH], (3, 7, WIDTH)),
    (["N", 2, "T", WIDTH], (3, 2, 4, WIDTH)),
]


@pytest.mark.parametrize(("shape", "sizes"), SHAPES, ids=str)
@pytest.mark.parametrize("between", [None, "Relu", "Gelu"])
def test_a_dense_layer_is_a_product_of_matrices_of_the_same_values(
    tmp_path: Path, shape: Shape, sizes: tuple[int, ...], between: str | None
) -> None:
    path = dense(tmp_path / "m.onnx", shape, between=between)
    folded = fold(load(path).graph)
    found = [kind for kind in operators(folded) if kind not in {"Shape", "Slice", "Concat"}]
    assert found == ["Reshape", "Gemm", *([] if between is None else [between, "Gemm"]), "Reshape"]
    assert next(layer.name for layer in folded.graph if layer.op_type == "Gemm") == "p_node"
    x = normal(*sizes, seed=5)
    real, made = (Runner(data).run({"x": x}, ["y"])["y"] for data in (path, ir.to_proto(folded).SerializeToString()))
    assert made.shape == real.shape
    held = {one.name: onnx.numpy_helper.to_array(one).astype(np.float64) for one in onnx.load(path).graph.initializer}
    terms = np.abs(x.astype(np.float64)) @ np.abs(held["w"]) + np.abs(held["b"])
    if between is not None:  # |relu(x)| and |gelu(x)| are at most |x|, and their slopes at most 1.13
        terms = 1.13 * terms @ np.abs(held["v"]) + np.abs(held["c"])
    # Each sum of n terms is off by n·2^-24 of the magnitudes' at most, whatever its order; a Gelu by a few units of its own.
    assert (np.abs(made - real) <= 2 * (WIDTH + WIDER + 8) * 2.0**-24 * terms).all()


@pytest.mark.parametrize("target", ["npu-int8", "fixed16", "tflite", "npu-int16", "ort-x86"])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_it_rounds_once_and_a_relu_is_its_clamp(tmp_path: Path, target: str, form: str) -> None:
    if (target, form) == ("npu-int16", "qoperator"):
        pytest.skip("QGemm has 8 bits")
    path = dense(tmp_path / "m.onnx", ["N", "T", WIDTH], between="Relu")
    done = converted(tmp_path, path, normal(16, LENGTH, WIDTH, seed=5), Recipe(target=target, tune=FAST), form)
    layers = [layer for layer in done.plan.layers if layer.operator != "Reshape"]
    assert [(layer.name, layer.operator, len(layer.inputs), layer.absorbed) for layer in layers] == [
        ("p_node", "Gemm", 3, ("h_node",)),
        ("q_node", "Gemm", 3, ()),
    ]
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []


def test_tensors_keep_their_names(tmp_path: Path) -> None:
    path = dense(tmp_path / "m.onnx", ["N", LENGTH, WIDTH], between="Gelu")
    folded = fold(load(path).graph)
    assert [value.name for found in folded.graph for value in found.outputs] == [f"x{ROWS}", "a", "h", f"y{ROWS}", "y"]


def test_what_several_layers_read_is_put_together_once(tmp_path: Path) -> None:
    names = ["q", "k", "v"]
    constants = {
        name + end: normal(*size, seed=i)
        for i, name in enumerate(names)
        for end, size in (("w", (WIDTH, WIDTH)), ("b", (WIDTH,)))
    }
    nodes = [
        layer
        for name in names
        for layer in (node("MatMul", ["x", f"{name}w"], [f"{name}p"]), node("Add", [f"{name}p", f"{name}b"], [name]))
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", "T", WIDTH]}, dict.fromkeys(names), constants)
    found = operators(fold(load(path).graph))
    assert (found.count("Reshape"), found.count("Shape"), found.count("Gemm")) == (4, 1, 3)


def test_reshapes_that_meet_are_one(tmp_path: Path) -> None:
    nodes = [
        node("Reshape", ["x", "s"], ["t"]),
        node("MatMul", ["t", "w"], ["p"]),
        node("Add", ["p", "b"], ["a"]),
        node("Reshape", ["a", "h"], ["y"]),
    ]
    shapes = {"s": np.array([-1, LENGTH, WIDTH]), "h": np.array([-1, LENGTH, 2, WIDER // 2])}
    constants = {"w": normal(WIDTH, WIDER, seed=1), "b": normal(WIDER, seed=2), **shapes}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", LENGTH, 2, WIDTH // 2]}, {"y": None}, constants)
    assert operators(fold(load(path).graph)) == ["Reshape", "Gemm", "Reshape"]


@pytest.mark.parametrize(
    ("bias", "more"),
    [
        (normal(LENGTH, WIDER, seed=1), {}),
        (normal(LENGTH, 1, seed=1), {}),
        (normal(2, 1, LENGTH, WIDER, seed=1)[:1], {}),
        (None, {"given_out": True}),
        (None, {"again": True}),
    ],
    ids=["by row and column", "by row", "of more axes", "a product that is an output", "a product that others read"],
)
def test_other_additions_stay(tmp_path: Path, bias: Array | None, more: dict[str, Any]) -> None:
    path = dense(tmp_path / "m.onnx", ["N", LENGTH, WIDTH], bias=bias, **more)
    assert operators(fold(load(path).graph))[:2] == ["MatMul", "Add"]


def test_one_number_is_added_to_every_column(tmp_path: Path) -> None:
    path = dense(tmp_path / "m.onnx", ["N", LENGTH, WIDTH], bias=np.array(0.5, np.float32))
    folded = fold(load(path).graph)
    gemm = next(found for found in folded.graph if found.op_type == "Gemm")
    assert gemm.inputs[2].const_value.numpy().tolist() == [0.5] * WIDER  # type: ignore[union-attr]


def test_what_was_trained_stays_as_it_is(tmp_path: Path) -> None:
    model = load(dense(tmp_path / "m.onnx", ["N", LENGTH, WIDTH])).graph
    next(iter(model.graph)).meta[LEARNED] = True
    assert operators(fold(model)) == ["MatMul", "Add"]


@pytest.mark.parametrize("mode", ["weights", "dynamic"])
def test_without_calibration_it_stays_a_matmul(tmp_path: Path, mode: Literal["weights", "dynamic"]) -> None:
    path = dense(tmp_path / "m.onnx", ["N", 40, WIDTH], between="Gelu")
    done = convert(path, tmp_path / "q.onnx", recipe=Recipe(mode=mode, layers=Layers(include=("op:MatMul",))))
    assert [layer.operator for layer in done.plan.layers] == ["MatMul", "MatMul"]


def test_c_is_the_executor(tmp_path: Path) -> None:
    path = dense(tmp_path / "m.onnx", [1, LENGTH, WIDTH], between="Relu")
    done = converted(tmp_path, path, normal(16, LENGTH, WIDTH, seed=5), Recipe(target="npu-int8", tune=FAST), "c")
    assert [layer.operator for layer in done.plan.layers].count("Gemm") == 2


def test_columns_of_a_normalisation_are_evened_in_front_of_it(tmp_path: Path) -> None:
    gains = np.ones(WIDTH, np.float32)
    gains[2] = 50
    constants = {"g": gains, "z": normal(WIDTH, seed=1), "w": normal(WIDTH, WIDER, seed=2), "b": normal(WIDER, seed=3)}
    nodes = [
        node("LayerNormalization", ["x", "g", "z"], ["n"]),
        node("MatMul", ["n", "w"], ["p"]),
        node("Add", ["p", "b"], ["a"]),
        node("Erf", ["a"], ["y"]),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", "T", WIDTH]}, {"y": None}, constants)
    x = normal(8, LENGTH, WIDTH, seed=4)
    np.savez(tmp_path / "d.npz", x=x)
    folded = fold(load(path).graph)
    changed, _, done = smooth(folded, calibrate(path, tmp_path / "d.npz"), Recipe())
    assert [(one.name, one.layers, one.folded) for one in done] == [(f"n{ROWS}", ("p_node",), True)]
    assert done[0].left < done[0].spread
    assert operators(changed) == operators(folded)
    real, made = (Runner(ir.to_proto(m).SerializeToString()).run({"x": x}, ["y"])["y"] for m in (folded, changed))
    np.testing.assert_allclose(made, real, atol=2e-5)


@pytest.mark.parametrize("shape", [[-1, "?", WIDTH], ["?", "?", WIDTH], [-1, -1, WIDTH]])
def test_lengths_written_as_minus_one_or_a_question_mark_are_not_known(tmp_path: Path, shape: Shape) -> None:
    model = dense(tmp_path / "m.onnx", shape)
    x = normal(16, LENGTH, WIDTH, seed=5)
    done = converted(tmp_path, model, x, Recipe(target="npu-int8", tune=FAST))
    assert [layer.operator for layer in done.plan.layers] == ["Reshape", "Gemm", "Reshape"]
    y = Runner(model).run({"x": x})["y"]
    assert Runner(done.model).run({"x": x})["y"].shape == y.shape


@pytest.mark.parametrize("shape", [("n", LENGTH, WIDTH), ("n", 2, LENGTH, WIDTH), (3, LENGTH, WIDTH)])
def test_rows_that_were_put_together_count(tmp_path: Path, shape: Shape) -> None:
    """The products behind the Reshape are as many as they were, and so is what is made there."""
    model = fold(load(dense(tmp_path / "m.onnx", shape, between="Relu")).graph)
    rows = int(np.prod([size for size in shape[:-1] if isinstance(size, int)]))
    work = {found.op_type: work_of(found) for found in model.graph}
    assert [work_of(found).macs for found in model.graph if found.op_type == "Gemm"] == [rows * WIDTH * WIDER] * 2
    assert work["Relu"].made == work["Relu"].read == rows * WIDER
    assert work["Gemm"].made == rows * WIDTH


def test_a_row_per_sample_is_one(tmp_path: Path) -> None:
    """Flattening leaves a row of each sample."""
    nodes = [node("Flatten", ["x"], ["f"]), node("Gemm", ["f", "w"], ["y"])]
    constants = {"w": normal(LENGTH * WIDTH, WIDER, seed=1)}
    model = fold(load(save(tmp_path / "m.onnx", nodes, {"x": ("n", LENGTH, WIDTH)}, {"y": None}, constants)).graph)
    assert work_of(model.graph[-1]).macs == LENGTH * WIDTH * WIDER
