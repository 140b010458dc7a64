"""Every target that comes with quantcli: it plans what it says, and its integers are verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quantcli import Recipe, convert, verify
from quantcli.cli import run
from quantcli.errors import RecipeError
from quantcli.integer.executor import Executor
from quantcli.recipe import Layers, Tune
from quantcli.targets import FOLDER, known, load_target
from tests.graphs import data_for, node, normal, residual_net, save


@pytest.mark.parametrize("name", known())
def test_a_target_does_what_it_says(tmp_path: Path, name: str) -> None:
    target = load_target(name)
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(target=name))
    assert target.name == name
    assert done.sidecar.target == target
    assert done.check.sqnr["y"] > 15
    for held, tensor in done.sidecar.tensors.items():
        if tensor.role == "weight":
            largest = 2 ** (target.weight.bits_of(held == "w2") - 1) - 1
            assert (tensor.dtype, tensor.qmin, tensor.qmax) == ("int8", -largest, largest)
        elif tensor.role != "bias":
            assert tensor.dtype == target.activation.dtype
            assert not target.activation.symmetric or tensor.zero_point == [0]
        if target.activation.power_of_two and tensor.role != "bias":
            assert all(scale.hex().startswith("0x1.0000000000000p") for scale in tensor.scale)
    for layer in done.sidecar.layers:
        assert layer.rounding == target.multiplier.rounding_of(layer.operator)
        for multiplier in layer.multipliers:
            bits = target.multiplier.bits
            assert all(2 ** (bits - 2) <= m0 < 2 ** (bits - 1) for m0 in multiplier.multiplier)
            if target.activation.power_of_two and target.weight.power_of_two:
                assert set(multiplier.multiplier) == {2 ** (bits - 2)}
    found = verify(tmp_path / "q.json", data)
    assert found.findings == []
    assert found.layers == len(done.plan.layers)


@pytest.mark.parametrize("ratio", [1e-7, 1e-16])
@pytest.mark.parametrize("name", known())
def test_a_sum_of_a_branch_that_is_all_but_dead_is_verified(tmp_path: Path, name: str, ratio: float) -> None:
    """What the plan makes of scales however far apart is what the executor computes, and the tensors keep their scales."""
    constants = {"w": normal(4, 3, 3, 3, scale=0.3), "v": normal(4, 3, 3, 3, seed=1, scale=0.3) * np.float32(ratio)}
    nodes = [
        node("Conv", ["x", "w"], ["alive"], pads=[1, 1, 1, 1]),
        node("Conv", ["x", "v"], ["dead"], pads=[1, 1, 1, 1]),
        node("Add", ["alive", "dead"], ["a"]),
        node("Sub", ["dead", "alive"], ["s"]),
    ]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, dict.fromkeys(["a", "s"]), constants)
    data = data_for(tmp_path / "d.npz")
    recipe = Recipe(target=name, layers=Layers(everywhere=True), tune=Tune(effort="fast"))
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=recipe)
    assert {layer.name for layer in done.sidecar.layers if layer.arithmetic == "sum"} == {"a_node", "s_node"}
    assert done.sidecar.tensors["dead"].scale[0] < done.sidecar.tensors["alive"].scale[0] * ratio * 16
    found = verify(tmp_path / "q.json", data)
    assert found.findings == []
    assert found.layers == 4


def test_seven_bit_weights_cannot_overflow_pairs_of_products() -> None:
    """The 16-bit multiply-add of AVX2 adds two products of a uint8 and an int8: 2·255·63 fits 2^15 − 1, 2·255·127 does not."""
    largest = 2 ** (load_target("ort-x86-avx2").weight.bits - 1) - 1
    assert 2 * 255 * largest <= 2**15 - 1 < 2 * 255 * (2 * largest + 1)


def test_a_target_of_ones_own(tmp_path: Path) -> None:
    text = (FOLDER / "npu-int8.toml").read_text()
    (tmp_path / "mine.toml").write_text(
        text.replace('"npu-int8"', '"mine"').replace("per_channel = true", "per_channel = false")
    )
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(target=str(tmp_path / "mine.toml")))
    assert done.sidecar.target.name == "mine"
    assert done.sidecar.recipe.target == "mine"
    assert len(done.plan.tensors["w1"].scale) == 1


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(RecipeError, match="ort-x86"):
        load_target("nothing-like-it")


def test_the_list_names_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["targets"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in known())


def test_average_pools_share_their_scale_where_the_target_does(tmp_path: Path) -> None:
    """TFLite sums the integers and divides with ties away from zero; a pool that counts padding is rescaled as elsewhere."""
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("AveragePool", ["c"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("AveragePool", ["p"], ["q"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("AveragePool", ["q"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    ]
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, {"w": normal(8, 3, 3, 3, seed=1)})
    done = convert(model, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=Recipe(target="tflite"))
    kinds = {layer.name: layer.arithmetic for layer in done.sidecar.layers}
    assert kinds == {"c_node": "accumulate", "p_node": "mean", "q_node": "mean", "y_node": "rescale"}
    assert done.sidecar.tensors["q"].same_as == "c"
    found = verify(tmp_path / "q.json", tmp_path / "d.npz")
    assert found.findings == []
    executor = Executor(ir.from_proto(onnx.load(done.model)), done.sidecar)
    integers, _ = executor.run_all({"x": normal(4, 3, 8, 8, seed=9)})
    sums = integers["c"].astype(int).reshape(4, 8, 4, 2, 4, 2).sum(axis=(3, 5))
    away = (np.sign(sums) * ((np.abs(sums) + 2) // 4)).tolist()
    assert integers["p"].tolist() == away
    assert (np.abs(sums) % 4 == 2).any()
