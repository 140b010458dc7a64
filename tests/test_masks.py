"""Attention masks: what stands for minus infinity neither ruins the scores' grid nor lets masked tokens through."""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from calibration.errors import DataError
from calibration.hooks.onnxruntime import Runner
from calibration.observers import TensorStatistics
from calibration.statistics import merge
from quantcli import Conversion, Recipe, Run, calibrate, convert, evaluate, verify
from quantcli.errors import ModelError
from quantcli.load import load
from quantcli.masks import unresolvable
from quantcli.recipe import Activation, Calibration, Layers, Tune
from quantcli.scores import MASKS as MEMBER
from quantcli.scores import scores
from tests.graphs import Array, data_for, node, normal, save

TOKENS, WIDTH, SAMPLES = 6, 16, 48
WEIGHTS: dict[str, Array] = {name: normal(WIDTH, WIDTH, seed=seed, scale=0.35) for seed, name in enumerate("qkvo", 1)}
LOWEST = float(np.finfo(np.float32).min)


def attention(path: Path, how: str) -> Path:
    """Write a block of attention; its mask is added (``add``), a constant (``causal``), or −infinity that is made or filled in."""
    constants = {**WEIGHTS, "root": np.array(0.25, np.float32)}
    nodes = [node("MatMul", ["x", name], [f"{name}x"]) for name in "qkv"]
    nodes += [
        node("Transpose", ["kx"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["qx", "kt"], ["raw"]),
        node("Mul", ["raw", "root"], ["s"]),
    ]
    inputs: dict[str, list[int | str]] = {"x": ["N", TOKENS, WIDTH]}
    kinds = {}
    if how == "causal":
        constants["mask"] = np.triu(np.full((TOKENS, TOKENS), -1e4, np.float32), 1)
    else:
        inputs["mask"] = ["N", 1, TOKENS]
    if how in {"fill", "made"}:
        kinds["mask"] = onnx.TensorProto.BOOL
        constants |= {"fill": np.array(-np.inf, np.float32), "zero": np.array(0, np.float32)}
    if how == "fill":
        nodes.append(node("Where", ["mask", "fill", "s"], ["m"]))
    elif how == "made":
        nodes += [node("Where", ["mask", "fill", "zero"], ["bias"]), node("Add", ["s", "bias"], ["m"])]
    elif how in {"moved", "taken", "kept"}:
        # 1 for hidden tokens: as large models write it, moved to where the scores stand, taken off, or kept above the lowest.
        constants |= {
            "far": np.array(1e4 if how == "taken" else -1e4, np.float32),
            "lowest": np.array(LOWEST, np.float32),
        }
        constants["axes"] = np.array([1], np.int64)
        nodes += [
            node("Squeeze", ["mask", "axes"], ["flat"]),
            node("Mul", ["flat", "far"], ["bias"]),
            node("Unsqueeze", ["bias", "axes"], ["wide"]),
            node("Sub" if how == "taken" else "Add", ["s", "wide"], ["m" if how != "kept" else "sum"]),
        ]
        nodes += [node("Max", ["sum", "lowest"], ["m"])] if how == "kept" else []
    else:
        nodes.append(node("Add", ["s", "mask"], ["m"]))
    nodes += [
        node("Softmax", ["m"], ["p"], axis=-1),
        node("MatMul", ["p", "vx"], ["c"]),
        node("MatMul", ["c", "o"], ["y"]),
    ]
    return save(path, nodes, inputs, {"y": None}, constants, kinds=kinds)


def masked_samples(folder: Path, how: str, low: float) -> tuple[dict[str, Array], Array]:
    """Write samples of which the last tokens are masked, and return them with where that is so."""
    lengths = np.random.default_rng(5).integers(3, TOKENS + 1, SAMPLES)
    hidden = np.arange(TOKENS)[None] >= lengths[:, None]
    feeds: dict[str, Array] = {"x": normal(SAMPLES, TOKENS, WIDTH, seed=9)}
    if how in {"fill", "made"}:
        feeds["mask"] = hidden[:, None]
    elif how in {"moved", "taken", "kept"}:
        feeds["mask"] = hidden[:, None].astype(np.float32)
    elif how == "add":
        feeds["mask"] = np.where(hidden, np.float32(low), np.float32(0))[:, None]
    np.savez(folder / "d.npz", **feeds)  # type: ignore[arg-type]
    return feeds, hidden


def converted(folder: Path, how: str, low: float, target: str) -> tuple[Conversion, dict[str, Array], Array]:
    feeds, hidden = masked_samples(folder, how, low)
    recipe = Recipe(target=target, tune=Tune(effort="default" if target == "ort-x86" else "fast"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        done = convert(attention(folder / "m.onnx", how), folder / "q.onnx", data=folder / "d.npz", recipe=recipe)
    return done, feeds, hidden


MASKS = [("add", -1e4), ("add", LOWEST), ("add", -np.inf), ("made", -np.inf), ("fill", -np.inf), ("causal", -1e4)]
MASKS += [("moved", -1e4), ("taken", -1e4), ("kept", -1e4)]


@pytest.mark.parametrize("target", ["tflite", "npu-int8", "npu-int16", "ort-x86"])
@pytest.mark.parametrize(("how", "low"), MASKS)
def test_scores_keep_their_grid_beside_a_mask(tmp_path: Path, how: str, low: float, target: str) -> None:
    done, feeds, _ = converted(tmp_path, how, low, target)
    assert min(done.check.sqnr.values()) > 27
    expected, found = (Runner(path).run(feeds)["y"] for path in (tmp_path / "m.onnx", done.model))
    assert 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(found - expected)) > 27
    floats = {entry.operator for entry in done.sidecar.float_layers}
    assert floats >= {{"fill": "Where", "taken": "Sub"}.get(how, "Add"), "Softmax"} or target == "npu-int16"
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []


@pytest.mark.parametrize("target", ["tflite", "npu-int8"])
@pytest.mark.parametrize("how", ["made", "fill"])
def test_what_is_masked_is_not_seen(tmp_path: Path, how: str, target: str) -> None:
    done, feeds, hidden = converted(tmp_path, how, -np.inf, target)
    other = {**feeds, "x": np.where(hidden[..., None], normal(*feeds["x"].shape, seed=77), feeds["x"])}
    assert not np.array_equal(other["x"], feeds["x"])
    one, two = (Runner(done.model).run(given)["y"][~hidden] for given in (feeds, other))
    np.testing.assert_array_equal(one, two)


def known(folder: Path, how: str, low: float, recipe: Recipe) -> tuple[ir.Model, frozenset[str]]:
    model = load(attention(folder / "m.onnx", how)).graph
    seen = {"s": TensorStatistics(minimum=-9.0, maximum=8.0), "mask": TensorStatistics(minimum=low, maximum=0.0)}
    return model, unresolvable(model, seen, recipe)


WIDE = Recipe(activation=Activation(dtype="int16", symmetric=True))


@pytest.mark.parametrize(
    ("low", "recipe", "barred"),
    [
        (-1e4, Recipe(), {"mask", "m"}),
        (-100.0, Recipe(), set()),
        (-1e4, WIDE, set()),
        (-1e9, WIDE, {"mask", "m"}),
        (LOWEST, WIDE, {"mask", "m"}),
    ],
)
def test_a_mask_is_what_reaches_far_below_the_scores(
    tmp_path: Path, low: float, recipe: Recipe, barred: set[str]
) -> None:
    model, found = known(tmp_path, "add", low, recipe)
    assert found == barred
    assert {value.name for value in scores(model)} == {"m", "s", "mask", "raw", "root"}


def test_large_scores_on_both_sides_of_zero_are_no_mask(tmp_path: Path) -> None:
    model = load(attention(tmp_path / "m.onnx", "add")).graph
    seen = {"s": TensorStatistics(minimum=-9.0, maximum=8.0), "mask": TensorStatistics(minimum=-2e3, maximum=1900.0)}
    assert unresolvable(model, seen, Recipe()) == set()


def test_statistics_serve_whatever_masks_the_data_holds(tmp_path: Path) -> None:
    """A shard without a masked sample, and grids of 16 bits, find no mask; what they hold is the same."""
    model = attention(tmp_path / "m.onnx", "add")
    feeds, _ = masked_samples(tmp_path, "add", -1e4)
    feeds["mask"][:24] = 0
    np.savez(tmp_path / "d.npz", **feeds)  # type: ignore[arg-type]
    recipe = Recipe(target="npu-int8", calibration=Calibration(batch=4))
    parts = [
        calibrate(model, tmp_path / "d.npz", tmp_path / f"{n}.stats", recipe, run=Run(shard=(n, 2))) for n in range(2)
    ]
    assert parts[0].tensors.keys() == parts[1].tensors.keys()
    whole = merge([(str(n), part) for n, part in enumerate(parts)])
    assert convert(model, tmp_path / "q.onnx", whole, recipe=recipe).check.sqnr["y"] > 27
    wide = calibrate(model, tmp_path / "d.npz", recipe=Recipe(target="npu-int16"))
    assert convert(model, tmp_path / "q.onnx", wide, recipe=recipe).check.sqnr["y"] > 27


def test_a_large_sum_that_no_softmax_reads_is_no_mask(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "q"], ["s"]), node("Add", ["s", "mask"], ["y"])]
    inputs: dict[str, list[int | str]] = {"x": ["N", TOKENS, WIDTH], "mask": ["N", TOKENS, WIDTH]}
    model = load(save(tmp_path / "m.onnx", nodes, inputs, {"y": None}, {"q": WEIGHTS["q"]})).graph
    seen = {"s": TensorStatistics(minimum=-9.0, maximum=8.0), "mask": TensorStatistics(minimum=-1e4, maximum=0.0)}
    assert unresolvable(model, seen, Recipe(tune=Tune(effort="fast"))) == set()


def test_eval_takes_a_mask_of_infinities(tmp_path: Path) -> None:
    done, _, _ = converted(tmp_path, "add", -np.inf, "tflite")
    assert evaluate(done.model, tmp_path / "d.npz", tmp_path / "m.onnx", latency=False).quantized > 27
    assert evaluate(done.model, tmp_path / "d.npz", metric="tests.test_masks:finite_part").quantized == 1


def test_eval_takes_a_mask_of_infinities_for_a_program_alone(tmp_path: Path) -> None:
    masked_samples(tmp_path, "add", -np.inf)
    model, data = attention(tmp_path / "m.onnx", "add"), tmp_path / "d.npz"
    done = convert(model, tmp_path / "q.pt2", data=data)
    assert evaluate(done.model, data, metric="tests.test_masks:finite_part").quantized == 1
    assert evaluate(done.model, data, model, latency=False).quantized > 27
    with zipfile.ZipFile(done.model) as archive:
        name = next(name for name in archive.namelist() if name.endswith(f"extra/{MEMBER}"))
        assert archive.read(name) == b"[1]"
    changed = tmp_path / "changed.pt2"
    with zipfile.ZipFile(done.model) as old, zipfile.ZipFile(changed, "w") as new:
        for info in old.infolist():
            new.writestr(info, b"[1" if info.filename == name else old.read(info))
    with pytest.raises(ModelError, match="does not tell its inputs apart"):
        evaluate(changed, data, metric="tests.test_masks:finite_part")


def test_a_mask_that_a_function_reads_is_one(tmp_path: Path) -> None:
    masked_samples(tmp_path, "add", -np.inf)
    proto = onnx.load(attention(tmp_path / "m.onnx", "add"))
    opset = [onnx.helper.make_opsetid("", 17)]
    body = [node("Add", ["scores", "hidden"], ["sum"]), node("Softmax", ["sum"], ["part"], axis=-1)]
    proto.functions.append(onnx.helper.make_function("own", "Masked", ["scores", "hidden"], ["part"], body, opset))
    kept = [one for one in proto.graph.node if one.output[0] not in {"m", "p"}]
    call = onnx.helper.make_node("Masked", ["s", "mask"], ["p"], domain="own")
    place = next(number for number, one in enumerate(kept) if "p" in one.input)
    del proto.graph.node[:]
    proto.graph.node.extend([*kept[:place], call, *kept[place:]])
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    onnx.save(proto, tmp_path / "m.onnx")
    done = convert(tmp_path / "m.onnx", tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(target="tflite"))
    assert done.check.sqnr["y"] > 27
    assert evaluate(done.model, tmp_path / "d.npz", tmp_path / "m.onnx", latency=False).quantized > 27


def finite_part(outputs: dict[str, Array], _: object) -> float:
    """Return which part of what a model gives is finite: a metric that needs no float model."""
    return float(np.isfinite(next(iter(outputs.values()))).mean())


def test_masked_samples_are_tuned_and_checked_with_where_others_are_not_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    feeds, hidden = masked_samples(tmp_path, "add", -np.inf)
    feeds["x"][0] = np.nan
    assert not hidden[1:].any(axis=1).all()
    np.savez(tmp_path / "d.npz", **feeds)  # type: ignore[arg-type]
    recipe = Recipe(target="tflite", calibration=Calibration(allow_non_finite=True))
    model = attention(tmp_path / "m.onnx", "add")
    statistics = calibrate(model, tmp_path / "d.npz", recipe=recipe)
    np.testing.assert_array_equal(statistics.check_inputs["mask"], feeds["mask"][1:5])
    convert(model, tmp_path / "q.onnx", statistics, tmp_path / "d.npz", recipe)
    assert "1 samples are not finite, and tuning goes without them" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "counts"),
    [("mask", np.nan, "1 NaN and 0 infinite"), ("mask", np.inf, "0 NaN and 1 infinite"), ("x", -np.inf, "0 NaN and 1")],
)
def test_what_masks_nothing_has_to_be_finite(tmp_path: Path, name: str, value: float, counts: str) -> None:
    feeds, _ = masked_samples(tmp_path, "add", -np.inf)
    feeds[name][2, 0, 0] = value
    np.savez(tmp_path / "d.npz", **feeds)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"{counts}.* for input '{name}'"):
        calibrate(attention(tmp_path / "m.onnx", "add"), tmp_path / "d.npz")


ADDED = [node("Add", ["s", "mask"], ["m"])]


@pytest.mark.parametrize(
    ("nodes", "masks"),
    [
        (ADDED, True),
        ([node("Identity", ["mask"], ["moved"]), node("Add", ["moved", "s"], ["m"])], True),
        ([node("Max", ["mask", "w"], ["bounded"]), node("Add", ["s", "bounded"], ["m"])], True),
        ([node("Where", ["c", "mask", "s"], ["m"])], True),
        ([node("Sub", ["mask", "s"], ["m"])], True),
        ([node("Sub", ["s", "mask"], ["m"])], False),
        ([node("Mul", ["mask", "w"], ["scaled"]), node("Add", ["s", "scaled"], ["m"])], False),
        ([node("Identity", ["mask"], ["m"])], False),
        ([*ADDED, node("Relu", ["mask"], ["also"])], False),
        ([node("Identity", ["s"], ["m"])], False),
    ],
    ids=["added", "moved", "bounded", "filled in", "less scores", "taken off", "scaled", "alone", "read too", "unread"],
)
def test_an_input_is_a_mask_where_all_that_reads_it_masks(
    tmp_path: Path, nodes: list[onnx.NodeProto], masks: bool
) -> None:
    sizes: list[int | str] = ["N", WIDTH, WIDTH]
    first, last = node("MatMul", ["x", "w"], ["s"]), node("Softmax", ["m"], ["y"])
    path = save(
        tmp_path / "m.onnx",
        [first, *nodes, last],
        {"x": sizes, "mask": sizes, "c": sizes},
        {"y": None},
        {"w": WEIGHTS["q"]},
        kinds={"c": onnx.TensorProto.BOOL},
    )
    found = load(path).inputs
    assert [replace(spec, masks=False) for spec in found] == list(Runner(path).inputs)
    assert [spec.name for spec in found if spec.masks] == (["mask"] if masks else [])


@pytest.mark.parametrize(("highest", "layers"), [(1e-18, ["d_node"]), (1e-6, ["c_node", "d_node"])])
def test_a_layer_whose_clip_leaves_next_to_nothing_stays_float(
    tmp_path: Path, highest: float, layers: list[str]
) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Clip", ["c", "lo", "hi"], ["k"]),
        node("Conv", ["k", "v"], ["d"]),
        node("Relu", ["d"], ["y"]),
    ]
    constants = {"w": normal(4, 3, 3, 3), "v": normal(4, 4, 3, 3), "lo": np.array(0, np.float32)}
    constants["hi"] = np.array(highest, np.float32)
    model = save(tmp_path / "m.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, constants)
    recipe = Recipe(tune=Tune(effort="fast"), layers=Layers(everywhere=True))
    done = convert(model, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=recipe, verified=True)
    assert [layer.name for layer in done.plan.layers] == layers
