"""Weights whose grids lie where the weights are: integers with the zero point taken off, which every kernel takes as they are."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.arithmetic.affine import IntegerType, asymmetric_scales, lowest_integers
from quantcli.cli import run
from quantcli.pipeline import Conversion
from quantcli.recipe import Layers, Tune, Weight
from quantcli.review import diff, lint
from quantcli.targets import WeightFormat, load_target
from tests.graphs import data_for, node, normal, residual_net, save


@given(
    ends=st.lists(st.tuples(st.floats(-8, 8, width=32), st.floats(-8, 8, width=32)), min_size=1, max_size=5),
    bits=st.integers(2, 6),
)
def test_a_grid_covers_its_weights_and_holds_zero(ends: list[tuple[float, float]], bits: int) -> None:
    lo, hi = np.sort(np.array(ends, dtype=np.float32), axis=1).T
    integer = IntegerType(f"int{bits}")
    steps = integer.qmax - integer.qmin
    scales = asymmetric_scales(lo, hi, integer)
    lowest = lowest_integers(lo, hi, scales, steps)
    assert (lowest == np.rint(lowest)).all()
    assert ((lowest <= 0) & (lowest + steps >= 0)).all()
    for end in (lo, hi, np.zeros_like(lo)):
        places = end.astype(np.float64) / scales
        # The grid begins within half a step of lo / S, so that no end is further from it; S is off by 2^-24 of itself at most.
        assert (np.abs(places - np.clip(np.rint(places), lowest, lowest + steps)) <= 0.5 + steps * 2.0**-23).all()


def test_a_channel_of_zeros_has_scale_one() -> None:
    zeros = np.zeros(1, dtype=np.float32)
    assert asymmetric_scales(zeros, zeros, IntegerType("int4")).tolist() == [1.0]


@pytest.mark.parametrize(
    ("lo", "hi", "scale", "expected"),
    [(0, 15, 1, 0), (-15, 0, 1, -15), (-7, 8, 1, -7), (-2, 13, 1, -2), (-1, 1, 1, -8)],
)
def test_where_grids_lie(lo: float, hi: float, scale: float, expected: int) -> None:
    found = lowest_integers(np.array([lo]), np.array([hi]), np.array([scale]), 15)
    assert found.tolist() == [expected]


def one_sided(path: Path) -> Path:
    """Return a small network whose weights lie mostly on one side of zero."""
    weights = {"w1": np.abs(normal(8, 3, 3, 3, seed=1)) / 4, "w2": -np.abs(normal(10, 8, seed=2)) / 4 + 0.1}
    nodes = [
        node("Conv", ["x", "w1"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w2"], ["y"], transB=1),
    ]
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    return save(path, nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 10]}, arrays)


def converted(folder: Path, name: str, **weight: Any) -> Conversion:
    tune = Tune(effort=weight.pop("effort", "fast"), equalize=False)
    recipe = Recipe(weight=Weight(**weight), tune=tune, layers=Layers(everywhere=True))
    model, data = one_sided(folder / "m.onnx"), data_for(folder / "d.npz", 64)
    return convert(model, folder / name, data=data, recipe=recipe)


def weights_of(path: Path, done: Conversion) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Return the integers of every weight, and the float model's values, as rows of outputs."""
    held = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(done.model).graph.initializer}
    real = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    names = [name for name, entry in done.sidecar.tensors.items() if entry.role == "weight"]
    found = {}
    for name in names:
        integers = held[done.sidecar.tensors[name].integers]
        found[name] = integers.reshape(integers.shape[0], -1), real[name].reshape(integers.shape[0], -1)
    return found


@pytest.mark.parametrize("effort", ["fast", "default"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_every_output_has_so_many_integers(tmp_path: Path, effort: str, per_channel: bool, bits: int) -> None:
    done = converted(tmp_path, "q.onnx", bits=bits, per_channel=per_channel, effort=effort)
    for name, (integers, _) in weights_of(tmp_path / "m.onnx", done).items():
        entry = done.sidecar.tensors[name]
        assert entry.grids is not None
        assert entry.grids.bits == bits
        assert len(entry.grids.lowest) == len(entry.scale) == (len(integers) if per_channel else 1)
        above = integers - np.array(entry.grids.lowest)[:, None]
        assert ((above >= 0) & (above < 1 << bits)).all()
        assert set(entry.zero_point) == {0}
        assert (entry.qmin, entry.qmax) == (min(entry.grids.lowest), max(entry.grids.lowest) + (1 << bits) - 1)
        if name == "w1":  # whose weights lie above zero
            assert all(lowest > -(1 << (bits - 1)) for lowest in entry.grids.lowest)
    assert verify(done.sidecar_path, data=tmp_path / "d.npz").findings == []


def test_one_sided_weights_have_half_the_step(tmp_path: Path) -> None:
    errors = {}
    for symmetric in (True, False):
        done = converted(tmp_path, "q.onnx", bits=4, symmetric=symmetric)
        integers, real = weights_of(tmp_path / "m.onnx", done)["w1"]
        scale = np.array(done.sidecar.tensors["w1"].scale, dtype=np.float32)[:, None]
        errors[symmetric] = float(np.square(integers * scale - real).sum())
        assert (done.sidecar.tensors["w1"].grids is None) == symmetric
    # 15 steps from zero to the largest in place of 7: a fourth of the squares, and somewhat more where few weights are rounded.
    assert errors[False] < errors[True] / 3


def test_the_runtime_computes_with_them(tmp_path: Path) -> None:
    """ONNX Runtime takes them for integers like any others: its outputs are those of the weights that they stand for."""
    done = converted(tmp_path, "q.onnx", bits=4, effort="default")
    x = np.load(tmp_path / "d.npz")["x"]
    real, made = (Runner(path).run({"x": x})["y"] for path in (tmp_path / "m.onnx", done.model))
    noise, signal = np.square(made - real).sum(), np.square(real).sum()
    assert 10 * np.log10(signal / noise) > 20


@pytest.mark.parametrize(
    ("target", "bits", "there"),
    [("ort-x86", 6, True), ("ort-arm", 4, True), ("ort-x86", 7, False), ("npu-int8", 4, False)],
)
def test_which_weights_have_them_by_default(tmp_path: Path, target: str, bits: int, there: bool) -> None:
    recipe = Recipe(target=target, weight=Weight(bits=bits), tune=Tune(effort="fast"))
    done = convert(
        residual_net(tmp_path / "m.onnx"), tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=recipe
    )
    entries = [entry for entry in done.sidecar.tensors.values() if entry.role == "weight"]
    assert {entry.grids is not None for entry in entries} == {there}


def test_seven_bits_and_more_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    command = ["convert", str(model), "--data", str(data), "--asymmetric-weights", "-o", str(tmp_path / "q.onnx")]
    assert run(command) == 2
    assert "weights of 8 bits are symmetric" in capsys.readouterr().err
    assert not (tmp_path / "q.onnx").exists()
    assert run([*command, "--mode", "dynamic", "--weight-bits", "4"]) == 2
    assert "--mode dynamic has no asymmetric weights" in capsys.readouterr().err
    assert run([*command, "--weight-bits", "6", "-q"]) == 0


@pytest.mark.parametrize(
    ("bits", "symmetric", "refused"),
    [
        (8, True, {}),  # as int8 they are integers like any others
        (5, True, {}),
        (4, True, {"w1": 15, "w2": -14}),
        (4, False, {}),
        (3, False, {"w1": 15, "w2": 5}),
    ],
)
def test_which_targets_take_them(tmp_path: Path, bits: int, symmetric: bool, refused: dict[str, int]) -> None:
    done = converted(tmp_path, "q.onnx", bits=4)
    entries = done.sidecar.tensors
    assert [(entries[name].qmin, entries[name].qmax) for name in ("w1", "w2")] == [(0, 15), (-14, 5)]
    weight = WeightFormat("int8", symmetric, per_channel=True, bits=bits)
    target = msgspec.structs.replace(load_target("ort-x86"), weight=weight)
    told = {one.reason for one in lint(done.sidecar, target, {})}
    assert told == {f"'{name}' reaches {end}, the target's weights have {bits} bits" for name, end in refused.items()}


def test_a_difference_of_grids_is_told(tmp_path: Path) -> None:
    first, second, third = (
        converted(tmp_path, f"{name}.onnx", bits=bits, symmetric=symmetric).sidecar
        for name, bits, symmetric in (("a", 4, True), ("b", 4, False), ("c", 3, False))
    )
    told = {(one.name, one.what): (one.before, one.after) for one in diff(first, second)}
    assert told["w1", "type"] == ("int8 -8 … 7", "int8 0 … 15, 4 bits each")
    told = {(one.name, one.what): (one.before, one.after) for one in diff(second, third)}
    assert told["w1", "type"] == ("int8 0 … 15, 4 bits each", "int8 0 … 7, 3 bits each")


def test_a_weight_that_leaves_its_grid_is_found(tmp_path: Path) -> None:
    done = converted(tmp_path, "q.onnx", bits=4)
    document = json.loads(done.sidecar_path.read_text())
    lowest = document["tensors"]["w1"]["grids"]["lowest"]
    document["tensors"]["w1"]["grids"]["lowest"] = [one + 1 for one in lowest]
    done.sidecar_path.write_text(json.dumps(document))
    found = verify(done.sidecar_path, data=tmp_path / "d.npz").findings
    assert [one.what for one in found] == ["the integers of 'w1' leave their grid"]


def test_other_formats_have_the_zero_point(tmp_path: Path) -> None:
    done = converted(tmp_path, "q.onnx", bits=4)
    integers, _ = weights_of(tmp_path / "m.onnx", done)["w2"]
    entry = done.sidecar.tensors["w2"]
    assert entry.grids is not None
    documents = {}
    for form in ("aimet-1.0.0", "aimet-2.0.0", "csv"):
        output = tmp_path / f"out.{form}"
        assert run(["export", str(done.sidecar_path), "--to", form, "-o", str(output), "-q"]) == 0
        documents[form] = output.read_text()
    first = {one["name"]: one for one in json.loads(documents["aimet-1.0.0"])["param_encodings"]}["w2"]
    assert (first["bw"], first["is_sym"]) == (4, False)
    # AIMET's integers are unsigned, and offsets are added to them.
    unsigned = integers - np.array(first["offset"])[:, None]
    assert ((unsigned >= 0) & (unsigned < 16)).all()
    second = {one["name"]: one for one in json.loads(documents["aimet-2.0.0"])["encodings"]}["w2"]
    assert second["output_dtype"] == "uint4"
    assert second["y_zero_point"] == [-offset for offset in first["offset"]]
    rows = [
        row for row in csv.DictReader(documents["csv"].splitlines()) if (row["kind"], row["name"]) == ("weight", "w2")
    ]
    assert [(int(row["qmin"]), int(row["qmax"])) for row in rows] == [(low, low + 15) for low in entry.grids.lowest]
