"""Placement and plan: what becomes integer, which parameters it gets, and why the rest stays float."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration.statistics import Statistics
from quantcli import Conversion, Recipe, calibrate, convert, evaluate
from quantcli.arithmetic.affine import LARGEST_BIAS
from quantcli.bounds import FURTHER, felt
from quantcli.cli import run
from quantcli.cli.convert import finer_options, warn_of_dead_channels
from quantcli.cli.terminal import Terminal
from quantcli.errors import PlanError, UsageError
from quantcli.fold import fold
from quantcli.placement import place
from quantcli.plan import LayerPlan, Plan, make_plan
from quantcli.recipe import Activation, Layers, Multiplier, Tune, Weight, resolve_target
from quantcli.rules import Arithmetic
from quantcli.tune.wide import left_of
from tests.graphs import Array, data_for, node, normal, save


def layer(plan: Plan, name: str) -> LayerPlan:
    return next(found for found in plan.layers if found.name == name)


def planned(path: Path, recipe: Recipe | None = None) -> Plan:
    data = data_for(path.with_suffix(".npz"), x=(4, 6, 6))
    recipe = recipe or Recipe()
    return make_plan(fold(ir.load(path)), calibrate(path, data, recipe=recipe), recipe)


def chain(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, Array], *outputs: str) -> Path:
    """Write a model of an input x [N, 4, 6, 6] and the given nodes."""
    return save(path, nodes, {"x": ["N", 4, 6, 6]}, dict.fromkeys(outputs or ("y",)), constants)


def test_activations_are_absorbed_and_their_ranges_used(residual: Conversion) -> None:
    plan = residual.plan
    assert [found.operator for found in plan.layers] == [
        "Conv", "Conv", "Conv", "Add", "GlobalAveragePool", "Flatten", "Gemm",
    ]  # fmt: skip
    assert plan.floats == ()
    assert layer(plan, "c1_node").absorbed == ("r1_node",)
    assert layer(plan, "c1_node").outputs == ("r1",)
    assert "c1" not in plan.tensors
    assert plan.tensors["r1"].zero_point == (0,)
    assert plan.tensors["r2"].hi[0] <= 6.0
    assert layer(plan, "c1_node").clamp == (0, 255)


def test_what_moves_data_shares_parameters(residual: Conversion) -> None:
    g, f = residual.plan.tensors["g"], residual.plan.tensors["f"]
    assert f.same_as == "g"
    assert (f.scale, f.zero_point) == (g.scale, g.zero_point)


def test_multipliers_follow_the_scales(residual: Conversion) -> None:
    """M0·2^-n equals S_x·S_w/S_y (or S_i/S_y) to a relative 2^-30, exactly computed."""
    plan = residual.plan
    checked = 0
    for found in plan.layers:
        if found.accumulator_scale is not None:
            x, w = (plan.tensors[name].scale for name in found.inputs[:2])
            assert found.accumulator_scale == tuple(float(np.float32(x[0]) * np.float32(s)) for s in w)
            continue
        y = Fraction(plan.tensors[found.outputs[0]].scale[0])
        for entry in found.multipliers:
            if found.arithmetic in {Arithmetic.ACCUMULATE, Arithmetic.PRODUCT}:
                x, w = (plan.tensors[name].scale for name in found.inputs[:2])
                exact = [Fraction(x[0]) * Fraction(s) / y for s in w]
            else:
                exact = [Fraction(s) / y for s in plan.tensors[str(entry.operand)].scale]
            for m0, n, real in zip(entry.multiplier, entry.shift, exact, strict=True):
                assert 2**30 <= m0 < 2**31
                assert abs(Fraction(m0) * Fraction(2) ** -n / real - 1) <= Fraction(1, 2**30)
                checked += 1
    assert checked == 8 + 8 + 8 + 2 + 1  # the last Gemm gives reals


def test_biases_stand_at_the_product_of_the_scales(residual: Conversion) -> None:
    plan = residual.plan
    x, w, b = (plan.tensors[name] for name in layer(plan, "c1_node").inputs)
    assert b.integer.name == "int32"
    assert b.scale == tuple(float(np.float32(x.scale[0]) * np.float32(s)) for s in w.scale)


def test_dead_channels_get_scale_one_and_are_named(tmp_path: Path) -> None:
    weight = normal(3, 4, 3, 3)
    weight[1] = 0
    path = chain(tmp_path / "m.onnx", [node("Conv", ["x", "w", "b"], ["y"])], {"w": weight, "b": normal(3)})
    plan = planned(path)
    assert plan.dead_channels == {"w": (1,)}
    assert plan.tensors["w"].scale[1] == 1.0


def test_a_bias_that_would_not_fit_widens_its_channel(tmp_path: Path) -> None:
    weight = normal(3, 4, 3, 3)
    weight[1] *= 1e-9
    path = chain(
        tmp_path / "m.onnx", [node("Conv", ["x", "w", "b"], ["y"])], {"w": weight, "b": np.full(3, 50, np.float32)}
    )
    done = convert(path, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz", x=(4, 6, 6)))
    integers = onnx.numpy_helper.to_array(
        next(i for i in onnx.load(done.model).graph.initializer if i.name == "b_quantized")
    )
    assert np.abs(integers.astype(np.int64)).max() <= LARGEST_BIAS
    assert done.plan.tensors["w"].scale[1] > 1e-9 / 127 * 10
    assert done.check.sqnr["y"] > 30


def test_a_shared_weight_has_one_set_of_integers(tmp_path: Path) -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Conv", ["c", "w"], ["y"])]
    path = chain(tmp_path / "m.onnx", nodes, {"w": normal(4, 4, 1, 1)})
    done = convert(path, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz", x=(4, 6, 6)))
    names = [i.name for i in onnx.load(done.model).graph.initializer]
    assert names.count("w_quantized") == 1
    assert done.check.sqnr["y"] > 30


def test_a_relu_with_a_neighbour_is_a_layer_of_its_own(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("Add", ["c", "r"], ["y"]),
    ]
    plan = planned(chain(tmp_path / "m.onnx", nodes, {"w": normal(4, 4, 1, 1)}))
    assert [(found.operator, found.absorbed) for found in plan.layers] == [("Conv", ()), ("Relu", ()), ("Add", ())]


def test_symmetric_targets_keep_a_clamp_of_their_own(tmp_path: Path, net: Path) -> None:
    """With zero point 0 in int8, saturation does not do what Relu does: the clamp stays, as the node or as a Clip of integers."""
    recipe = Recipe(activation=Activation(dtype="int8", symmetric=True))
    done = convert(net, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=recipe)
    kept = [n for n in onnx.load(done.model).graph.node if n.op_type in {"Clip", "Relu"}]
    assert {n.input[0].removesuffix("_saturated") for n in kept} >= {"r1"}
    recipe = Recipe(target="npu-int8")
    done = convert(net, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=recipe)
    assert layer(done.plan, "c1_node").clamp == (0, 127)
    assert {tensor.zero_point for tensor in done.plan.tensors.values() if tensor.axis is None} == {(0,)}
    assert "Relu" in {n.op_type for n in onnx.load(done.model).graph.node}
    assert done.check.sqnr["y"] > 20


def test_recipes_override_the_target(tmp_path: Path, net: Path) -> None:
    recipe = Recipe(weight=Weight(per_channel=False), multiplier=Multiplier(bits=16, rounding="floor"))
    done = convert(net, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=recipe)
    assert len(done.plan.tensors["w1"].scale) == 1
    found = layer(done.plan, "c1_node")
    assert found.rounding == "floor"
    assert 2**14 <= found.multipliers[0].multiplier[0] < 2**15
    assert done.sidecar.recipe == recipe


ISLANDS = [
    ([node("Exp", ["x"], ["e"]), node("Add", ["e", "e"], ["a"]), node("Conv", ["a", "w"], ["y"])], "Add", "an island"),
    (
        [node("Exp", ["x"], ["e"]), node("Transpose", ["e"], ["t"]), node("Conv", ["t", "w"], ["y"])],
        "Transpose",
        "only moves",
    ),
    ([node("Conv", ["x", "w"], ["c"]), node("Exp", ["c"], ["y"])], "Exp", "no rule"),
    ([node("Conv", ["x", "w"], ["c"]), node("Pad", ["c", "pads", "one"], ["y"])], "Pad", "other than zero"),
    ([node("Conv", ["x", "w"], ["c"]), node("Mul", ["c", "inf"], ["y"])], "Mul", "not finite"),
]


@pytest.mark.parametrize(("nodes", "operator", "reason"), ISLANDS)
def test_what_stays_float_says_why(tmp_path: Path, nodes: list[onnx.NodeProto], operator: str, reason: str) -> None:
    constants: dict[str, Array] = {
        "w": normal(4, 4, 1, 1),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "one": np.array(1.0, dtype=np.float32),
        "inf": np.array(np.inf, dtype=np.float32),
    }
    model = fold(ir.load(chain(tmp_path / "m.onnx", nodes, constants)))
    floats = {found.operator: found.reason for found in place(model, Recipe()).floats}
    assert reason in floats[operator]
    assert "Conv" not in floats


def test_shape_arithmetic_is_not_listed(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Shape", ["c"], ["s"]),
        node("Gather", ["s", "first"], ["n"]),
        node("Concat", ["n", "rest"], ["shape"], axis=0),
        node("Reshape", ["c", "shape"], ["y"]),
    ]
    constants = {"w": normal(4, 4, 1, 1), "first": np.array([0]), "rest": np.array([-1])}
    placement = place(fold(ir.load(chain(tmp_path / "m.onnx", nodes, constants))), Recipe())
    assert placement.floats == ()
    assert [found.node.op_type for found in placement.layers] == ["Conv", "Reshape"]


def test_layers_are_chosen_by_name_or_operator(net: Path) -> None:
    model = fold(ir.load(net))

    def chosen(include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
        return [str(found.node.name) for found in place(model, Recipe(layers=Layers(include, exclude))).layers]

    assert "c2_node" not in chosen(exclude=("c2_*",))
    assert chosen(include=("op:Gemm",)) == ["y_node"]
    assert chosen(include=("op:Conv", "op:Relu"), exclude=("c2_node",)) == ["c1_node", "c3_node"]


def test_a_pattern_that_matches_nothing_is_an_error(net: Path) -> None:
    with pytest.raises(UsageError, match="nothing_like_it"):
        place(fold(ir.load(net)), Recipe(layers=Layers(exclude=("nothing_like_it",))))


def test_nothing_to_quantize_is_an_error(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", [node("Exp", ["x"], ["y"])], {})
    with pytest.raises(PlanError, match="nothing to quantize"):
        place(fold(ir.load(path)), Recipe())


def test_statistics_that_lack_a_tensor_name_it(net: Path, tmp_path: Path) -> None:
    full = calibrate(net, data_for(tmp_path / "d.npz"))
    less: Statistics = dataclasses.replace(full, tensors={k: v for k, v in full.tensors.items() if k != "r1"})
    with pytest.raises(PlanError, match="'r1'"):
        make_plan(fold(ir.load(net)), less, Recipe())


def test_names_that_a_model_already_uses_are_left_to_it(tmp_path: Path) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Conv", ["c", "v"], ["c_quantized"]),
        node("Exp", ["c_quantized"], ["y"]),
    ]
    path = chain(tmp_path / "m.onnx", nodes, {"w": normal(4, 4, 1, 1), "v": normal(4, 4, 1, 1, seed=1, scale=0.1)})
    done = convert(path, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz", x=(4, 6, 6)))
    outputs = [output for n in onnx.load(done.model).graph.node for output in n.output]
    assert len(outputs) == len(set(outputs))
    assert "c_quantized" in outputs
    assert done.sidecar.tensors["c"].integers == "c_quantized_"


def test_a_model_that_lost_its_signal_is_a_loud_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Channels 10^4 apart under one scale: the small ones, which alone reach the output, are gone."""
    weight = normal(4, 4, 1, 1)
    weight[0] *= 1e4
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Slice", ["c", "one", "four", "one"], ["y"])]
    path = chain(tmp_path / "m.onnx", nodes, {"w": weight, "one": np.array([1]), "four": np.array([4])})
    data = data_for(tmp_path / "d.npz", x=(4, 6, 6))
    assert run(["convert", str(path), "--data", str(data), "-o", str(tmp_path / "q.onnx"), "--per-tensor"]) == 0
    told = capsys.readouterr().err
    assert "warning: the quantized model is far from float" in told
    assert "Conv 'c_node' lost" in told
    assert "more is left with --per-channel or --activation-dtype int16" in told
    assert (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    ("recipe", "mode", "options"),
    [
        (Recipe(), "static", ["--activation-dtype int16"]),
        (Recipe(activation=Activation(bits=4)), "static", ["--activation-bits 8"]),
        (Recipe(target="npu-int16"), "static", []),
        (Recipe(weight=Weight(bits=4)), "weights", ["--weight-bits 8"]),
        (Recipe(weight=Weight(bits=4, per_channel=False)), "static", ["--weight-bits 8", "--activation-dtype int16"]),
    ],
)
def test_what_would_leave_more_of_a_model_is_named(recipe: Recipe, mode: str, options: list[str]) -> None:
    assert finer_options(resolve_target(recipe), mode) == options


def test_dead_channels_are_told_and_forbidden_by_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = normal(3, 4, 3, 3)
    weight[1] = 0
    path = chain(tmp_path / "m.onnx", [node("Conv", ["x", "w", "b"], ["y"])], {"w": weight, "b": normal(3)})
    arguments = [
        "convert",
        str(path),
        "--data",
        str(data_for(tmp_path / "d.npz", x=(4, 6, 6))),
        "-o",
        str(tmp_path / "q.onnx"),
    ]
    assert run([*arguments, "--strict"]) == 5
    assert "'w' has dead channels: 1" in capsys.readouterr().err
    assert not (tmp_path / "q.onnx").exists()
    assert run([*arguments, "-q"]) == 0
    assert "weight 'w' has 1 dead" in capsys.readouterr().err


def test_dead_channels_of_many_weights_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_dead_channels(Terminal(quiet=True), {f"w{n}": (0, n + 1) for n in range(5)})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("'")[1] for line in lines[:-1]] == ["w0", "w1", "w2"]
    assert "2 more weights have 4 dead channels" in lines[-1]


def test_a_mask_is_kept_out_of_the_integers(tmp_path: Path) -> None:
    """An attention mask adds the lowest float32: a grid that reached it would hold nothing else."""
    mask = np.zeros((1, 1, 6), dtype=np.float32)
    mask[..., 4:] = np.finfo(np.float32).min
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Add", ["c", "mask"], ["a"]),
        node("Softmax", ["a"], ["s"]),
        node("MatMul", ["s", "v"], ["y"]),
    ]
    path = chain(tmp_path / "m.onnx", nodes, {"w": normal(4, 4, 1, 1), "mask": mask, "v": normal(6, 5, seed=2)})
    data = data_for(tmp_path / "d.npz", x=(4, 6, 6))
    done = convert(path, tmp_path / "q.onnx", data=data, verified=True)
    assert [layer.operator for layer in done.plan.layers] == ["Conv", "MatMul"]
    assert {(entry.operator, "mask" in entry.reason) for entry in done.plan.floats} == {
        ("Add", True),
        ("Softmax", True),
    }
    assert done.plan.tensors["s"].samples == 16
    assert done.check.sqnr["y"] > 30
    calibrate(path, data, tmp_path / "s.stats")
    again = convert(path, tmp_path / "again.onnx", tmp_path / "s.stats")
    assert again.plan == done.plan


FELT: dict[str, tuple[onnx.NodeProto, tuple[float, float]]] = {
    "HardSwish": (node("HardSwish", ["c"], ["y"]), (-3.0, np.inf)),
    "HardSigmoid": (node("HardSigmoid", ["c"], ["y"], alpha=0.25, beta=0.5), (-2.0 * FURTHER, 2.0 * FURTHER)),
    "a falling HardSigmoid": (node("HardSigmoid", ["c"], ["y"], alpha=-0.25), (-np.inf, np.inf)),
    "Gelu": (node("Gelu", ["c"], ["y"]), (-5.5, np.inf)),
    "LeakyRelu": (node("LeakyRelu", ["c"], ["y"]), (-np.inf, np.inf)),
}


@pytest.mark.parametrize("target", ["ort-x86", "npu-int8"])
@pytest.mark.parametrize("name", FELT)
def test_a_range_reaches_no_further_than_its_readers_tell_apart(tmp_path: Path, name: str, target: str) -> None:
    function, (low, high) = FELT[name]
    weight = normal(4, 3, 1, 1, seed=1, scale=8.0)
    nodes = [node("Conv", ["x", "w"], ["c"]), function, node("Conv", ["y", "v"], ["z"])]
    constants = {"w": weight, "v": normal(2, 4, 1, 1, seed=2)}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"z": None}, constants, opset=20)
    x = normal(8, 3, 8, 8, seed=3)
    np.savez(tmp_path / "d.npz", x=x)
    recipe = Recipe(target=target, layers=Layers(include=("*",)), tune=Tune(effort="fast"))
    done = convert(path, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe, verified=True)
    c = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0].astype(np.float64), x.astype(np.float64))
    tensor = done.plan.tensors["c"]
    # A sum of three products in float32: 4 roundings of at most three times the largest product.
    error = 4 * 2.0**-24 * 3 * np.abs(weight).max() * np.abs(x).max()
    factor = tensor.moved.factor[0] if tensor.moved is not None else 1.0
    assert abs(tensor.lo[0] / factor - max(c.min(), low)) <= error
    assert abs(tensor.hi[0] / factor - min(c.max(), high)) <= error
    assert c.min() < -9
    assert c.max() > 9
    # Nor is that counted as lost which is cut: of values up to ±36, steps of 1/127 leave more than 30 dB.
    told = evaluate(done.model, tmp_path / "d.npz", reference=path, layers=True, latency=False).layers
    assert next(layer.sqnr for layer in told if layer.output == "c") > 30
    assert left_of(fold(ir.load(path)), done.tuned.plan, [{"x": x}])["c"] > 30


def test_who_else_reads_a_tensor_needs_all_of_it(tmp_path: Path) -> None:
    conv, swish = node("Conv", ["x", "w"], ["c"]), node("HardSwish", ["c"], ["s"])
    constants: dict[str, Array] = {"w": normal(4, 3, 1, 1, seed=1), "shape": np.array([0, -1], np.int64)}

    def ends(*others: onnx.NodeProto, outputs: tuple[str, ...] = ("y",)) -> tuple[float, float]:
        nodes = [conv, swish, *others]
        used = {name for n in nodes for name in n.input}
        held = {name: array for name, array in constants.items() if name in used}
        path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 4, 4]}, dict.fromkeys(outputs), held)
        return felt(next(v for n in ir.load(path).graph for v in n.outputs if v.name == "c"))

    last = node("Relu", ["s"], ["y"])
    assert ends(last) == (-3.0, np.inf)
    assert ends(node("Add", ["s", "c"], ["y"])) == (-np.inf, np.inf)
    assert ends(last, outputs=("y", "c")) == (-np.inf, np.inf)
    assert ends(last, node("HardSigmoid", ["c"], ["z"], alpha=0.125), outputs=("y", "z")) == (-4.0 * FURTHER, np.inf)
    moved = node("Reshape", ["c", "shape"], ["r"])
    assert ends(last, moved, node("HardSwish", ["r"], ["z"]), outputs=("y", "z")) == (-3.0, np.inf)
    assert ends(last, moved, node("Neg", ["r"], ["z"]), outputs=("y", "z")) == (-np.inf, np.inf)
