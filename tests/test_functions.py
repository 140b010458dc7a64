"""Gelu, however it is written out, is one operator; squares under a root stay float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert
from quantcli.fold import fold
from quantcli.load import load
from tests.graphs import Array, node, normal, save

X = normal(64, 3, 6, 6, seed=3, scale=3)
NUMBERS: dict[str, Array] = {
    "half": np.array(0.5, dtype=np.float32),
    "one": np.array([1.0], dtype=np.float32),
    "three": np.array(3.0, dtype=np.float32),
    "root": np.array(math.sqrt(2.0), dtype=np.float32),
    "rate": np.array(math.sqrt(2.0 / math.pi), dtype=np.float32),
    "cubic": np.array(0.044715, dtype=np.float32),
    "other": np.array(0.05, dtype=np.float32),
}
# x·Φ(x) as PyTorch's exporter writes it; its approximation as JAX and as Transformers write it; and what is none.
ERF = [("Div", "c root d"), ("Erf", "d e"), ("Add", "e one p"), ("Mul", "c p m"), ("Mul", "m half g")]
HALF_FIRST = [("Mul", "c half h"), ("Div", "c root d"), ("Erf", "d e"), ("Add", "e one p"), ("Mul", "h p g")]
CUBE = [
    ("Mul", "c c s"),
    ("Mul", "s c k"),
    ("Mul", "k cubic q"),
    ("Add", "c q a"),
    ("Mul", "a rate r"),
    ("Tanh", "r t"),
]
JAX = [*CUBE, ("Add", "one t p"), ("Mul", "half p i"), ("Mul", "c i g")]
POWER = [("Pow", "c three k"), *CUBE[2:], ("Add", "t one p"), ("Mul", "c half h"), ("Mul", "h p g")]
OTHER = [(operator, names.replace("cubic", "other")) for operator, names in JAX]


def net(path: Path, written: Sequence[tuple[str, str]], opset: int = 13) -> Path:
    """Write a function of what a convolution makes, with another convolution behind it."""
    function = [node(operator, names.split()[:-1], names.split()[-1:]) for operator, names in written]
    nodes = [node("Conv", ["x", "w", "b"], ["c"]), *function, node("Conv", ["g", "v"], ["y"])]
    used = {name for item in nodes for name in item.input}
    constants = {"w": normal(8, 3, 3, 3, seed=1), "b": normal(8, seed=4), "v": normal(4, 8, 1, 1, seed=2)}
    constants |= {name: value for name, value in NUMBERS.items() if name in used}
    return save(path, nodes, {"x": ["N", 3, 6, 6]}, {"y": None}, constants, opset=opset)


@pytest.mark.parametrize(
    ("written", "form"),
    [(ERF, "none"), (HALF_FIRST, "none"), (JAX, "tanh"), (POWER, "tanh"), (OTHER, None)],
    ids=["erf", "half first", "jax", "power", "another function"],
)
def test_a_function_that_is_a_gelu_becomes_one(
    written: Sequence[tuple[str, str]], form: str | None, tmp_path: Path
) -> None:
    path = net(tmp_path / "m.onnx", written)
    folded = fold(load(path).graph)
    found = [item for item in folded.graph if item.op_type == "Gelu"]
    assert [item.attributes.get_string("approximate") for item in found] == ([] if form is None else [form])
    assert folded.opset_imports[""] == (13 if form is None else 20)
    if form is not None:
        assert [item.op_type for item in folded.graph] == ["Conv", "Gelu", "Conv"]
        assert found[0].outputs[0].name == "g"


@pytest.mark.parametrize("target", ["npu-int8", "ort-x86"])
def test_a_gelu_written_out_keeps_what_a_table_keeps(target: str, tmp_path: Path) -> None:
    path = net(tmp_path / "m.onnx", JAX)
    np.savez(tmp_path / "d.npz", x=X)
    recipe = Recipe(target=target)
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe, verified=True)
    expected = Runner(path).run({"x": X})["y"]
    error = Runner(done.model).run({"x": X})["y"] - expected
    # Three tensors and two weights of 8 bits over all of their range; written out 18.0 and 21.5 are left.
    assert 10 * np.log10(np.square(expected).sum() / np.square(error).sum()) > 25
    assert onnx.load(done.model).opset_import[0].version == 20


@pytest.mark.parametrize("root", [True, False])
def test_squares_under_a_root_stay_float(root: bool, tmp_path: Path) -> None:
    """A normalisation written out: x divided by the root of the mean of its squares."""
    mean = [
        node("Mul", ["c", "c"], ["s"]),
        node("ReduceMean", ["s"], ["m"], axes=[1]),
        node("Add", ["m", "half"], ["a"]),
        node("Sqrt" if root else "Relu", ["a"], ["r"]),
        node("Mul" if not root else "Div", ["c", "r"], ["g"]),
    ]
    nodes = [node("Conv", ["x", "w"], ["c"]), *mean, node("Conv", ["g", "v"], ["y"])]
    constants = {"w": normal(8, 3, 3, 3, seed=1), "v": normal(4, 8, 1, 1, seed=2), "half": NUMBERS["half"]}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 6, 6]}, {"y": None}, constants, opset=13)
    np.savez(tmp_path / "d.npz", x=X)
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(target="npu-int8"))
    reasons = {layer.name: layer.reason for layer in done.plan.floats}
    assert ("s_node" in reasons) == root
    assert not root or reasons["s_node"].startswith("it squares what a root is taken of")
