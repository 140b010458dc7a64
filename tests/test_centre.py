"""Centring: the function stays, and what was never negative lies about zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, evaluate, verify
from quantcli.fold import constant, fold
from quantcli.load import load
from quantcli.probe import with_outputs
from quantcli.recipe import Tune
from quantcli.tune.centre import centre
from tests.graphs import data_for, node, normal, residual_net, save

TENSORS: dict[str, NDArray[np.generic]] = {
    "w1": normal(6, 3, 3, 3, seed=1, scale=0.3),
    "b1": normal(6, seed=2),
    "w2": normal(8, 6, 1, 1, seed=3, scale=0.4),
    "w3": normal(8, 4, 1, 1, seed=4, scale=0.4),
    "b3": normal(8, seed=5),
    "wide": normal(6, 6, 3, 3, seed=6, scale=0.2),
    "w5": normal(8, 10, seed=7),
    "w6": normal(4, 10, seed=8),
    "w7": normal(8, 3, 3, 3, seed=9),
    "b7": normal(8, seed=10),
    "low": np.array(0, np.float32),
    "high": np.array(2, np.float32),
}


def loaded(path: Path) -> ir.Model:
    return fold(load(path).graph)


def run(model: ir.Model, x: NDArray[np.float32], names: list[str]) -> dict[str, NDArray[np.float32]]:
    return Runner(lambda: with_outputs(model, names)).run({"x": x}, [*names, "y"])


def ranges_of(values: dict[str, NDArray[np.float32]]) -> dict[str, tuple[float, float]]:
    return {name: (float(array.min()), float(array.max())) for name, array in values.items()}


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Return a network of a Relu and a Clip before convolutions that do not pad, one grouped, and of Gemm both ways round."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["r"]),
        node("MaxPool", ["r"], ["m"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Conv", ["m", "w2"], ["c"]),
        node("Clip", ["c", "low", "high"], ["k"]),
        node("Conv", ["k", "w3", "b3"], ["d"], group=2),
        node("Relu", ["d"], ["e"]),
        node("GlobalAveragePool", ["e"], ["p"]),
        node("Flatten", ["p"], ["v"]),
        node("Gemm", ["v", "w5"], ["g"]),
        node("Relu", ["g"], ["s"]),
        node("Gemm", ["s", "w6"], ["y"], transB=1),
    ]
    return save(tmp_path / "chain.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, TENSORS)


def test_centring_keeps_the_function_and_halves_the_ranges(chain: Path) -> None:
    model, x = loaded(chain), normal(4, 3, 8, 8, seed=9)
    names = ["a", "r", "m", "c", "k", "d", "e", "p", "v", "g", "s"]
    before = run(model, x, names)
    changed, shifts = centre(model, ranges_of(before))
    after = run(changed, x, names)
    # The constants are rounded to float32 once, and sums are of at most 27 terms.
    assert np.allclose(after["y"], before["y"], rtol=1e-4, atol=1e-4)
    assert set(shifts) == {*names}
    for name, shift in shifts.items():
        assert np.allclose(after[name], before[name] - np.float32(shift), rtol=1e-4, atol=1e-4)
    for name in ("r", "k", "e", "s"):
        half = float(before[name].max()) / 2
        assert np.allclose([after[name].min(), after[name].max()], [-half, half], atol=1e-4)
        producer = next(item for item in changed.graph if item.outputs[0].name == name)
        assert producer.op_type == "Clip"
        assert float(np.asarray(constant(producer.inputs[1]))) == pytest.approx(-half)
    # The model that came in is as it was.
    assert [item.op_type for item in model.graph].count("Relu") == 3


def readers(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",)) -> dict[str, Any]:
    return {"nodes": nodes, "outputs": outputs}


@pytest.mark.parametrize(
    "case",
    [
        readers(node("Conv", ["r", "wide"], ["y"], pads=[1, 1, 1, 1])),
        readers(node("Conv", ["r", "wide"], ["y"], auto_pad="SAME_UPPER")),
        readers(node("Conv", ["r", "w2"], ["y"]), outputs=("y", "r")),
        readers(
            node("Conv", ["r", "w2"], ["c"]), node("GlobalAveragePool", ["r"], ["p"]), node("Add", ["c", "p"], ["y"])
        ),
        readers(
            node("AveragePool", ["r"], ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
            node("Conv", ["p", "w2"], ["y"]),
        ),
        readers(
            node("Conv", ["r", "w2", "b7"], ["c"]),
            node("Conv", ["x", "w7", "b7"], ["d"]),
            node("Add", ["c", "d"], ["y"]),
        ),
        readers(node("Conv", ["r", "w2"], ["c"]), node("Conv", ["a", "w2"], ["d"]), node("Add", ["c", "d"], ["y"])),
    ],
    ids=["padded", "auto-pad", "output", "sum", "average-of-padding", "bias-of-others", "relu-is-not-alone"],
)
def test_what_a_reader_cannot_take_over_stays(tmp_path: Path, case: dict[str, Any]) -> None:
    nodes = [node("Conv", ["x", "w1", "b1"], ["a"]), node("Relu", ["a"], ["r"]), *case["nodes"]]
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, dict.fromkeys(case["outputs"]), TENSORS)
    model = load(path).graph
    _, shifts = centre(model, {"r": (0.0, 4.0)})
    assert shifts == {}


def test_a_range_that_lies_about_zero_already_stays(tmp_path: Path) -> None:
    tensors = {**TENSORS, "low": np.array(-1, np.float32), "high": np.array(1, np.float32)}
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["a"]),
        node("Clip", ["a", "low", "high"], ["r"]),
        node("Conv", ["r", "w2"], ["y"]),
    ]
    model = loaded(save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, tensors))
    assert centre(model, {"r": (-1.0, 1.0)})[1] == {}
    assert centre(model, {"r": (0.0, 0.0)})[1] == {}
    assert centre(model, {})[1] == {}


def test_what_symmetric_accelerators_get_back_and_their_integers_verify(chain: Path, tmp_path: Path) -> None:
    data = tmp_path / "d.npz"
    np.savez(data, x=normal(96, 3, 8, 8, seed=4))
    done, without = (
        convert(chain, tmp_path / name, data=data, recipe=Recipe(target="npu-int8", tune=Tune(centre=wish)))
        for name, wish in (("a.onnx", True), ("b.onnx", None))
    )
    kept = next(one for one in done.tuned.tries if one.kept)
    assert kept.name.startswith("centring, ")
    assert kept.gains["centring"][0] >= 4
    assert max(one.sqnr for one in without.tuned.tries) < kept.sqnr - 1
    lows = {name: tensor.lo[0] for name, tensor in done.plan.tensors.items() if name in {"r", "k", "e", "s"}}
    assert len(lows) == 4
    assert max(lows.values()) < 0
    # Layer by layer, a tensor is compared with what the float model's has become: each has 8 bits, and loses some dB on the way.
    moved = done.sidecar.tensors["r"].moved
    assert moved is not None
    assert moved.factor == [1.0]
    assert moved.shift[0] == pytest.approx(lows["r"], rel=0.3)
    scored = evaluate(done.model, data, reference=chain, layers=True)
    assert min(layer.sqnr for layer in scored.layers) > 20
    assert verify(done.sidecar_path, data).findings == []


def test_best_tries_it_and_affine_targets_do_without(tmp_path: Path) -> None:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=24)
    best = convert(model, tmp_path / "a.onnx", data=data, recipe=Recipe(target="npu-int8", tune=Tune(effort="best")))
    assert len({"centring" in one.name for one in best.tuned.tries[1:]}) == 2
    for target in ("ort-x86", "npu-int16"):
        other = convert(model, tmp_path / "b.onnx", data=data, recipe=Recipe(target=target, tune=Tune(centre=True)))
        assert not any("centring" in one.name for one in other.tuned.tries)
