"""Models as they come: types, operator sets, bodies, functions, sparse and shared weights, quantized ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, calibrate, convert, evaluate, verify
from quantcli.cli import run
from quantcli.errors import ModelError, PlanError, StrictError
from quantcli.fold import fold
from quantcli.load import digest_of, load
from quantcli.randomness import check_repeatable
from quantcli.recipe import Layers
from tests.graphs import Array, node, normal, save

W, V = normal(4, 3, 3, 3, seed=1, scale=0.4), normal(4, 4, 1, 1, seed=2, scale=0.4)
X = normal(8, 3, 8, 8, seed=3)
PLANAR: list[str | int | None] = ["N", 3, 8, 8]
# Convolutions of 8-bit data over its whole range: 48 dB less the crest factor of normal data and a layer or three of rounding.
FLOOR = 30.0


@dataclass(frozen=True)
class Case:
    """A model, and how many operators become integer layers."""

    nodes: Sequence[onnx.NodeProto]
    constants: Mapping[str, Any]  # arrays or tensors
    layers: int
    x: Array = field(default_factory=lambda: X)
    kind: int = TensorProto.FLOAT
    opset: int = 17
    ir_version: int = 8
    functions: Sequence[onnx.FunctionProto] = ()
    domains: Sequence[str] = ()
    sparse: Sequence[onnx.SparseTensorProto] = ()
    outputs: Sequence[str] = ("y",)

    def save(self, path: Path) -> Path:
        """Write the model."""
        tensors = [
            a if isinstance(a, onnx.TensorProto) else numpy_helper.from_array(np.asarray(a), n)
            for n, a in self.constants.items()
        ]
        shape = ["N", *self.x.shape[1:]]
        inputs = [helper.make_tensor_value_info("x", self.kind, shape)]
        if self.ir_version < 4:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
        graph = helper.make_graph(
            list(self.nodes),
            "g",
            inputs,
            [helper.make_tensor_value_info(name, self.kind, None) for name in self.outputs],
            tensors,
            sparse_initializer=list(self.sparse),
        )
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(name, 1) for name in self.domains)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=self.ir_version, functions=list(self.functions)
        )
        path.write_bytes(model.SerializeToString(deterministic=True))
        return path


def body(nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, int], outputs: Mapping[str, int]) -> onnx.GraphProto:
    def infos(values: Mapping[str, int]) -> list[onnx.ValueInfoProto]:
        scalars = {TensorProto.INT64, TensorProto.BOOL}
        return [
            helper.make_tensor_value_info(name, kind, [] if kind in scalars else None) for name, kind in values.items()
        ]

    return helper.make_graph(list(nodes), "body", infos(inputs), infos(outputs))


def old(opset: int) -> Case:
    """A net as exporters wrote it for old operator sets, its initializers among the inputs."""
    clip = node("Clip", ["n"], ["r"], min=0.0, max=6.0) if opset < 11 else node("Clip", ["n", "lo", "hi"], ["r"])
    pad = node("Pad", ["r"], ["p"], pads=[0, 0, 1, 1] * 2) if opset < 11 else node("Pad", ["r", "pads"], ["p"])
    if opset < 9:
        up = node("Upsample", ["p"], ["u"], scales=[1.0, 1.0, 2.0, 2.0], mode="nearest")
    elif opset < 11:
        up = node("Upsample" if opset == 9 else "Resize", ["p", "scales"], ["u"], mode="nearest")
    else:
        up = node("Resize", ["p", "roi", "scales"], ["u"], mode="nearest")
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"]),
        node("BatchNormalization", ["c", "g", "b", "b", "var"], ["n"]),
        clip,
        pad,
        up,
        node("Dropout", ["u"], ["d"], ratio=0.5) if opset < 12 else node("Dropout", ["u"], ["d"]),
        node("GlobalAveragePool", ["d"], ["e"]),
        node("Squeeze", ["e"], ["f"], axes=[2, 3]),
        node("Gemm", ["f", "k", "z"], ["y"]),
    ]
    constants: dict[str, Array] = {
        "w": W,
        "b": normal(4, seed=4),
        "g": normal(4, seed=5) + np.float32(2),
        "var": np.abs(normal(4, seed=6)) + np.float32(1),
        "k": normal(4, 5, seed=7),
        "z": normal(5, seed=8),
        "lo": np.array(0, np.float32),
        "hi": np.array(6, np.float32),
        "pads": np.array([0, 0, 1, 1] * 2),
        "roi": np.array([], np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    used = {name for n in nodes for name in n.input}
    return Case(nodes, {n: a for n, a in constants.items() if n in used}, 6, opset=opset, ir_version=3)


def sparse(name: str) -> onnx.SparseTensorProto:
    """A sparse 4x4 matrix."""
    values = numpy_helper.from_array(np.array([1.5, -2, 3], np.float32), name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 5, 14]), f"{name}_at"), [4, 4])


CONV, TWO = node("Conv", ["x", "w"], ["c"]), np.array(2, np.float32)
FLAT = [CONV, node("GlobalAveragePool", ["c"], ["p"]), node("Flatten", ["p"], ["f"])]
RELU = [CONV, node("Relu", ["c"], ["y"])]
BLOCK = helper.make_function(
    "mine",
    "Block",
    ["a", "k"],
    ["b"],
    [node("Conv", ["a", "k"], ["t"]), node("Relu", ["t"], ["b"])],
    [helper.make_opsetid("", 17)],
)
TWICE = helper.make_function(
    "mine",
    "Twice",
    ["a", "k", "l"],
    ["b"],
    [
        helper.make_node("Block", ["a", "k"], ["t"], domain="mine"),
        helper.make_node("Block", ["t", "l"], ["b"], domain="mine"),
    ],
    [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)],
)
BRANCHES = {
    "then_branch": body([node("Mul", ["r", "two"], ["t"])], {}, {"t": TensorProto.FLOAT}),
    "else_branch": body([node("Add", ["r", "two"], ["t"])], {}, {"t": TensorProto.FLOAT}),
}
LOOP = body(
    [node("Identity", ["go"], ["on"]), node("Conv", ["v", "k"], ["t"]), node("Relu", ["t"], ["u"])],
    {"i": TensorProto.INT64, "go": TensorProto.BOOL, "v": TensorProto.FLOAT},
    {"on": TensorProto.BOOL, "u": TensorProto.FLOAT},
)
Q = {
    "s": np.array(0.03, np.float32),
    "z": np.array(128, np.uint8),
    "q": np.clip(np.rint(W / 0.03), -127, 127).astype(np.int8),
}

CASES: dict[str, Case] = {
    "float16": Case(RELU, {"w": W.astype(np.float16)}, 1, X.astype(np.float16), TensorProto.FLOAT16),
    "float16 inside": Case(
        [
            node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
            node("Conv", ["h", "w"], ["c"]),
            node("Relu", ["c"], ["r"]),
            node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
        ],
        {"w": W.astype(np.float16)},
        1,
    ),
    "bfloat16 weights": Case(
        [node("Cast", ["w"], ["k"], to=TensorProto.FLOAT), node("Conv", ["x", "k"], ["y"])],
        {"w": numpy_helper.from_array(W.astype(ml_dtypes.bfloat16), "w")},
        1,
    ),
    **{f"operator set {opset}": old(opset) for opset in range(7, 13)},
    "a new operator set": Case(RELU, {"w": W}, 1, opset=23, ir_version=11),
    "If": Case(
        [
            CONV,
            node("Relu", ["c"], ["r"]),
            node("ReduceSum", ["x"], ["s"], keepdims=0),
            node("Greater", ["s", "two"], ["k"]),
            node("If", ["k"], ["i"], **BRANCHES),
            node("Conv", ["i", "v"], ["y"]),
        ],
        {"w": W, "v": V, "two": TWO},
        2,
    ),
    "If of a constant": Case(
        [CONV, node("Relu", ["c"], ["r"]), node("If", ["k"], ["i"], **BRANCHES), node("Conv", ["i", "v"], ["y"])],
        {"w": W, "v": V, "two": TWO, "k": np.array(True)},
        2,  # the branch that is taken multiplies by a number, which goes into the convolution behind it
    ),
    "Loop": Case(
        [CONV, node("Loop", ["n", "", "c"], ["l"], body=LOOP), node("Conv", ["l", "k"], ["y"])],
        {"w": W, "k": V, "n": np.array(2)},
        2,
    ),
    "functions within functions": Case(
        [helper.make_node("Twice", ["x", "w", "v"], ["y"], domain="mine")],
        {"w": W, "v": V},
        2,
        functions=[BLOCK, TWICE],
        domains=["mine"],
    ),
    "a sparse initializer": Case([*FLAT, node("MatMul", ["f", "m"], ["y"])], {"w": W}, 4, sparse=[sparse("m")]),
    "a sparse constant": Case(
        [helper.make_node("Constant", [], ["m"], sparse_value=sparse("n")), *FLAT, node("MatMul", ["f", "m"], ["y"])],
        {"w": W},
        4,
    ),
    "a weight in three shapes": Case(
        [
            node("MatMul", ["x", "m"], ["a"]),
            node("Transpose", ["m"], ["t"], perm=[1, 0]),
            node("MatMul", ["a", "t"], ["b"]),
            node("Reshape", ["m", "n"], ["u"]),
            node("MatMul", ["b", "u"], ["y"]),
        ],
        {"m": normal(6, 6, seed=9), "n": np.array([6, 6])},
        3,
        normal(32, 6, seed=10),
    ),
    "nodes without names, inputs left out": Case(
        [
            helper.make_node("Conv", ["x", "w", ""], ["c"]),
            helper.make_node("Clip", ["c", "", "six"], ["r"]),
            helper.make_node("Conv", ["r", "v"], ["y"]),
        ],
        {"w": W, "v": V, "six": np.array(6, np.float32)},
        2,
    ),
    "a tensor of no elements": Case(
        [CONV, node("Slice", ["c", "at", "at", "one"], ["e"]), node("Concat", ["c", "e"], ["y"], axis=1)],
        {"w": W, "at": np.array([0]), "one": np.array([1])},
        1,  # joining nothing does nothing
    ),
    "outputs between layers": Case(
        [CONV, node("Relu", ["c"], ["r"]), node("Conv", ["r", "v"], ["d"]), node("Add", ["r", "d"], ["y"])],
        {"w": W, "v": V},
        3,  # what is added to its own convolution is one convolution
        outputs=("y", "c", "r"),
    ),
    "the runtime's own domain": Case(
        [CONV, helper.make_node("QuickGelu", ["c"], ["g"], domain="com.microsoft"), node("Conv", ["g", "v"], ["y"])],
        {"w": W, "v": V},
        2,
        domains=["com.microsoft"],
    ),
}
REQUANTIZED: dict[str, Case] = {
    "quantized": Case(
        [
            node("QuantizeLinear", ["x", "s", "z"], ["i"]),
            node("DequantizeLinear", ["i", "s", "z"], ["d"]),
            node("DequantizeLinear", ["q", "s"], ["w"]),
            node("Conv", ["d", "w"], ["y"]),
        ],
        Q,
        1,
    ),
    "quantized weights": Case(
        [node("DequantizeLinear", ["q", "s"], ["w"]), node("Conv", ["x", "w"], ["y"])], {"q": Q["q"], "s": Q["s"]}, 1
    ),
}


def check(folder: Path, case: Case, recipe: Recipe) -> None:
    """Convert with verification, and compare every output with float."""
    path = case.save(folder / "m.onnx")
    np.savez(folder / "d.npz", x=case.x)
    done = convert(path, folder / "q.onnx", data=folder / "d.npz", recipe=recipe, verified=True)
    assert len(done.plan.layers) == case.layers, [layer.operator for layer in done.plan.layers]
    assert verify(done.sidecar_path, folder / "d.npz").findings == []
    found, expected = Runner(done.model).run({"x": case.x}), Runner(path).run({"x": case.x})
    assert list(found) == list(expected) == list(case.outputs)
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape)
        reals = values.astype(np.float64)
        noise = ((found[name].astype(np.float64) - reals) ** 2).sum()
        assert 10 * np.log10((reals**2).sum() / noise) > FLOOR, name


@pytest.mark.parametrize("name", CASES)
def test_models_as_they_come(tmp_path: Path, name: str) -> None:
    check(tmp_path, CASES[name], Recipe())


BRAIN = {"w": numpy_helper.from_array(W.astype(ml_dtypes.bfloat16), "w")}
TO_BRAIN, TO_FLOAT = {"to": TensorProto.BFLOAT16}, {"to": TensorProto.FLOAT}
ROUNDED = {"v": W.astype(ml_dtypes.bfloat16).astype(np.float32)}


def in_bfloat16(x: str, weight: str, y: str, cast: bool) -> list[onnx.NodeProto]:
    """A convolution and its Relu in bfloat16, between casts; one of the weight as well, where that is float32."""
    nodes = [node("Cast", [weight], ["g"], **TO_BRAIN)] if cast else []
    return [
        *nodes,
        node("Cast", [x], ["h"], **TO_BRAIN),
        node("Conv", ["h", "g" if cast else weight], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("Cast", ["r"], [y], **TO_FLOAT),
    ]


def inside(cast: bool) -> onnx.FunctionProto:
    """The same as a function of the model's own."""
    return helper.make_function(
        "mine", "Inside", ["a", "k"], ["b"], in_bfloat16("a", "k", "b", cast), [helper.make_opsetid("", 17)]
    )


def calling(weight: str) -> list[onnx.NodeProto]:
    return [helper.make_node("Inside", ["x", weight], ["y"], domain="mine")]


BRAINS: dict[str, Case] = {
    "throughout": Case(RELU, BRAIN, 1, kind=TensorProto.BFLOAT16),
    "inside": Case(in_bfloat16("x", "w", "y", cast=False), BRAIN, 1),
    "in casts alone": Case(in_bfloat16("x", "v", "y", cast=True), ROUNDED, 1),
    "in a function": Case(calling("w"), BRAIN, 1, functions=[inside(cast=False)], domains=["mine"]),
    "in a function's casts": Case(calling("v"), ROUNDED, 1, functions=[inside(cast=True)], domains=["mine"]),
}


@pytest.mark.parametrize("name", BRAINS)
def test_bfloat16_becomes_float32(tmp_path: Path, name: str) -> None:
    path = BRAINS[name].save(tmp_path / "m.onnx")
    same = Case(RELU, {"w": W.astype(ml_dtypes.bfloat16).astype(np.float32)}, 1).save(tmp_path / "f.onnx")
    np.savez(tmp_path / "d.npz", x=X)
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", verified=True)
    assert len(done.plan.layers) == 1
    assert (done.sidecar.float_model.sha256, done.sidecar.float_model.bytes) == (digest_of([path]), path.stat().st_size)
    expected, found = Runner(same).run({"x": X})["y"], Runner(done.model).run({"x": X})["y"]
    assert found.dtype == np.float32
    assert 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()) > FLOOR
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []


def test_bfloat16_that_is_too_large_in_float32_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = BRAINS["throughout"].save(tmp_path / "m.onnx")
    monkeypatch.setattr("quantcli.probe.LARGEST_MODEL", W.nbytes - 1)
    with pytest.raises(ModelError, match="export it in float32"):
        load(path)


@pytest.mark.parametrize("name", REQUANTIZED)
def test_a_quantized_model_is_refused_or_quantized_anew(tmp_path: Path, name: str) -> None:
    path = REQUANTIZED[name].save(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=X)
    with pytest.raises(ModelError, match="quantized already") as refused:
        convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz")
    assert "--requantize" in str(refused.value)
    check(tmp_path, REQUANTIZED[name], Recipe(requantize=True))


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_what_we_wrote_is_quantized_anew(tmp_path: Path, form: str) -> None:
    """The second model has the first one's weights to the bit: a grid's own values lie on the grid that covers them."""
    case = Case(
        [*FLAT, node("Gemm", ["f", "k", "z"], ["g"]), node("Relu", ["g"], ["r"]), node("Gemm", ["r", "j"], ["y"])],
        {"w": W, "k": normal(4, 6, seed=1), "z": normal(6, seed=2), "j": normal(6, 3, seed=3)},
        5,
    )
    path = case.save(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=X)
    first = convert(path, tmp_path / "a.onnx", data=tmp_path / "d.npz", form=form)
    again = convert(
        first.model,
        tmp_path / "b.onnx",
        data=tmp_path / "d.npz",
        recipe=Recipe(requantize=True),
        form=form,
        verified=True,
    )
    weights = [{t.sha256 for t in done.sidecar.tensors.values() if t.role == "weight"} for done in (first, again)]
    assert weights[0] == weights[1]
    expected, found = Runner(path).run({"x": X})["y"], Runner(again.model).run({"x": X})["y"]
    assert 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()) > FLOOR


REFUSED: dict[str, tuple[Callable[[], Case], str]] = {
    "an operator that nobody knows": (
        lambda: Case([CONV, helper.make_node("Magic", ["c"], ["y"], domain="acme")], {"w": W}, 0, domains=["acme"]),
        "acme:Magic",
    ),
    "a tensor that two operators make": (
        lambda: Case([CONV, node("Relu", ["c"], ["c"]), node("Conv", ["c", "v"], ["y"])], {"w": W, "v": V}, 0),
        "m.onnx",
    ),
    "dynamically quantized, though float is asked for": (
        lambda: Case(
            [node("DynamicQuantizeLinear", ["x"], ["i", "s", "z"]), node("DequantizeLinear", ["i", "s", "z"], ["y"])],
            {},
            0,
        ),
        "not constant",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, part = REFUSED[name]
    path = make().save(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=X)
    command = ["convert", str(path), "--data", str(tmp_path / "d.npz"), "-o", str(tmp_path / "q.onnx"), "--requantize"]
    assert run(command) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert part in errors[-1]
    assert "internal error" not in errors[-1]
    assert not (tmp_path / "q.onnx").exists()


def classifier(path: Path, maps: bool) -> Path:
    """What skl2onnx writes of a classifier: the class first, then the scores, as maps from classes by default."""
    nodes = [
        node("Gemm", ["x", "w"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "v"], ["scores"]),
        node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
    ]
    given = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4])
    if maps:
        zipped = helper.make_node("ZipMap", ["scores"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=range(4))
        nodes.append(zipped)
        held = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
        kind = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, held))
        given = helper.make_value_info("maps", kind)
    label = helper.make_tensor_value_info("label", TensorProto.INT64, ["N"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])
    weights = [numpy_helper.from_array(normal(6, 16, seed=1), "w"), numpy_helper.from_array(normal(16, 4, seed=2), "v")]
    graph = helper.make_graph(nodes, "classifier", [x], [label, given], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_maps_of_scores_are_refused_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = classifier(tmp_path / "m.onnx", maps=True)
    np.savez(tmp_path / "d.npz", x=normal(8, 6, seed=3))
    assert run(["convert", str(path), "--data", str(tmp_path / "d.npz"), "-o", str(tmp_path / "q.onnx")]) == 1
    assert re.search("error: .*'maps' as maps.*zipmap", capsys.readouterr().err)


def test_scores_may_stand_behind_the_class(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx", maps=False)
    x = normal(64, 6, seed=3)
    np.savez(tmp_path / "d.npz", x=x, labels=Runner(path).run({"x": x})["label"])
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz")
    found = evaluate(done.model, tmp_path / "d.npz", path, latency=False)
    assert (found.metric, found.reference) == ("top1", 100)
    assert found.quantized > 90


def test_weights_outside_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of protocol buffers, here a small one, ONNX Runtime reads external files and memory in place."""
    case = Case(
        [*FLAT, node("Gemm", ["f", "k", "z"], ["g"]), node("Relu", ["g"], ["r"]), node("Gemm", ["r", "j"], ["y"])],
        {"w": W, "k": normal(4, 64, seed=1), "z": normal(64, seed=2), "j": normal(64, 9, seed=3)},
        5,
    )
    path = case.save(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=X)
    expected = convert(path, tmp_path / "a.onnx", data=tmp_path / "d.npz")
    proto = onnx.load(path)
    (tmp_path / "apart").mkdir()
    onnx.save(proto, tmp_path / "apart" / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    monkeypatch.setattr("quantcli.probe.LARGEST_MODEL", 3000)  # the quantized one has fewer
    monkeypatch.setattr("quantcli.probe.LARGE_WEIGHT", 100)
    large = convert(tmp_path / "apart" / "m.onnx", tmp_path / "b.onnx", data=tmp_path / "d.npz", verified=True)
    assert large.plan.tensors == expected.plan.tensors
    assert large.model.read_bytes() == expected.model.read_bytes()
    inside = convert(path, tmp_path / "c.onnx", data=tmp_path / "d.npz")
    assert inside.model.read_bytes() == expected.model.read_bytes()


def test_float_weights_of_external_files_come_along(tmp_path: Path) -> None:
    case = Case([CONV, node("Conv", ["c", "v"], ["y"])], {"w": W, "v": V}, 1)
    (tmp_path / "apart").mkdir()
    onnx.save(
        onnx.load(case.save(tmp_path / "m.onnx")),
        tmp_path / "apart" / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    np.savez(tmp_path / "d.npz", x=X)
    recipe = Recipe(layers=Layers(exclude=("c_node",)))
    done = convert(tmp_path / "apart" / "m.onnx", tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe)
    stored = {t.name: t for t in onnx.load(done.model).graph.initializer}
    assert (numpy_helper.to_array(stored["w"]) == W).all()


def test_text_beside_numbers(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [CONV, node("Identity", ["label"], ["name"]), node("Relu", ["c"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, PLANAR)],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("name", TensorProto.STRING, [2]),
        ],
        [numpy_helper.from_array(W, "w"), numpy_helper.from_array(np.array(["cat", "dog"], dtype=object), "label")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    np.savez(tmp_path / "d.npz", x=X)
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", verified=True)
    assert len(done.plan.layers) == 1
    assert Runner(done.model).run({"x": X})["name"].tolist() == ["cat", "dog"]


def test_weights_are_read_from_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Initializers and constants give the same array whenever they are looked at; packed numbers stay packed."""
    four = helper.make_tensor("four", TensorProto.INT4, [4], np.array([1, -8, 7, 0]))
    constant = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(V, "held"))
    case = Case([constant, CONV, node("Conv", ["c", "v"], ["y"])], {"w": W, "four": four}, 2)
    graph = load(case.save(tmp_path / "m.onnx")).graph.graph
    held = graph.initializers["w"].const_value
    (attribute,) = (item.attributes["value"].as_tensor() for item in graph if item.op_type == "Constant")
    assert held is not None
    for tensor, values in ((held, W), (attribute, V)):
        assert tensor.numpy() is tensor.numpy()
        assert (tensor.numpy() == values).all()
    assert (held.name, attribute.name) == ("w", "held")
    packed = graph.initializers["four"].const_value
    assert packed is not None
    assert packed.nbytes == 2
    assert packed.numpy().astype(np.int8).tolist() == [1, -8, 7, 0]
    monkeypatch.setattr("quantcli.load.onnx.LARGEST_COPIED", 100)  # there is no room for two of a large one
    left = load(tmp_path / "m.onnx").graph.graph.initializers["w"].const_value
    assert left is not None
    assert left.numpy() is not left.numpy()
    assert (left.numpy() == W).all()


def drawing(path: Path, drawn: Sequence[onnx.NodeProto], inputs: Sequence[str] = ()) -> Path:
    """Write a product and a sum of it and the tensor ``r``."""
    constants = {"w": normal(16, 16), "half": np.array(0.5, np.float32), "yes": np.array(True), "no": np.array(False)}
    nodes = [node("MatMul", ["x", "w"], ["h"]), *drawn, node("Add", ["h", "r"], ["y"])]
    kinds = dict.fromkeys(inputs, TensorProto.BOOL)
    return save(path, nodes, {"x": ["N", 16], **{name: [] for name in inputs}}, {"y": None}, constants, kinds=kinds)


RANDOM = [
    ([node("RandomNormal", [], ["r"], shape=[1, 16])], "RandomNormal 'r_node'"),
    ([node("RandomNormalLike", ["h"], ["r"])], "RandomNormalLike 'r_node'"),
    ([node("RandomUniform", [], ["r"], shape=[1, 16])], "RandomUniform 'r_node'"),
    ([node("RandomUniformLike", ["h"], ["r"])], "RandomUniformLike 'r_node'"),
    ([node("Sigmoid", ["h"], ["p"]), node("Bernoulli", ["p"], ["r"])], "Bernoulli 'r_node'"),
    ([node("Multinomial", ["h"], ["i"]), node("Cast", ["i"], ["r"], to=TensorProto.FLOAT)], "Multinomial 'i_node'"),
    ([node("Dropout", ["h", "half", "yes"], ["r"])], "Dropout 'r_node'"),
    ([node("Dropout", ["h", "half", "train"], ["r"])], "Dropout 'r_node'"),
    ([node("Dropout", ["x", "half", "no"], ["r"])], ""),
    ([node("Dropout", ["x", "half"], ["r"])], ""),
    ([node("RandomUniformLike", ["h"], ["unread"]), node("Relu", ["h"], ["r"])], ""),
]


@pytest.mark.parametrize(("drawn", "named"), RANDOM)
def test_what_draws_random_numbers_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, drawn: Sequence[onnx.NodeProto], named: str
) -> None:
    path = drawing(tmp_path / "m.onnx", drawn, ["train"] if "train" in drawn[0].input else [])
    check_repeatable(fold(load(path).graph))
    told = [record.getMessage() for record in caplog.records]
    assert told == [] if not named else f"drawn by {named}: neither" in told[0]


def nothing(outputs: dict[str, Array], _: object) -> float:
    """Return 0: a metric that needs no float model."""
    return 0.0 * len(outputs)


def test_random_numbers_are_told_of_once_and_refused_by_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, data, output = drawing(tmp_path / "m.onnx", RANDOM[3][0]), tmp_path / "d.npy", tmp_path / "q.onnx"
    np.save(data, normal(8, 16, seed=2))
    with pytest.raises(StrictError, match="random numbers are drawn by RandomUniformLike 'r_node'"):
        convert(path, output, data=data, strict=True)
    assert not output.exists()
    for conversion in (
        lambda: convert(path, output, data=data),
        lambda: calibrate(path, data),
        lambda: evaluate(output, data, path, latency=False),
        lambda: evaluate(output, data, metric="tests.test_models:nothing"),
    ):
        caplog.clear()
        conversion()
        assert caplog.text.count("the same command may not give the same bytes") == 1


@pytest.mark.parametrize("mode", ["static", "weights"])
def test_a_model_within_a_branch_is_refused_with_what_is_in_it(mode: str, tmp_path: Path) -> None:
    def branch(name: str, weight: str) -> onnx.GraphProto:
        given = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        layers = [node("Conv", ["x", weight], [f"{name}_c"]), node("Conv", [f"{name}_c", "v"], [name])]
        return helper.make_graph(layers, name, [], [given])

    branches = {"then_branch": branch("t", "w"), "else_branch": branch("e", "u")}
    constants = {"w": W, "u": W + 1, "v": V, "zero": np.array(0, dtype=np.float32)}
    nodes = [
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["k"]),
        node("If", ["k"], ["y"], **branches),
    ]
    path = save(tmp_path / "m.onnx", nodes, {"x": PLANAR}, {"y": None}, constants)
    np.savez(tmp_path / "d.npz", x=X)
    recipe = Recipe(mode=mode)  # type: ignore[arg-type]
    told = re.escape("If 'y_node': its bodies stay float, with what is in them: Conv (4); export the model for one")
    with pytest.raises(PlanError, match=told) as caught:
        convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz" if mode == "static" else None, recipe=recipe)
    assert "--include" not in str(caught.value)
