"""``lint`` names what a target would refuse; ``diff`` what moved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantcli import Conversion, Recipe, convert, verify
from quantcli.cli import run
from quantcli.recipe import Activation, Layers, Weight
from quantcli.review import diff, lint
from quantcli.sidecar import read, stored_weights
from quantcli.targets import FOLDER, known, load_target
from tests.graphs import data_for, residual_net


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str, Recipe], Conversion]:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    return lambda name, recipe: convert(model, tmp_path / f"{name}.onnx", data=data, recipe=recipe)


@pytest.mark.parametrize("name", known())
def test_a_target_accepts_its_own(made: Callable[[str, Recipe], Conversion], name: str) -> None:
    done = made("q", Recipe(target=name))
    assert lint(done.sidecar, load_target(name), stored_weights(done.sidecar, done.model)) == []
    assert run(["lint", str(done.sidecar_path), "--target", name]) == 0


REFUSED = [
    ("npu-pow2", "has zero point"),
    ("npu-pow2", "no power of two"),
    ("npu-int8", "the target takes int8"),
    ("npu-int8", "it rounds 'single', the target 'half_even'"),
    ("fixed16", "a multiplier needs more than 16 bits"),
    ("ort-x86-avx2", "the target's weights have 7 bits"),
    ("ort-x86-avx2", "two products of 8 channels can leave 16 bits"),
]


@pytest.mark.parametrize(("target", "reason"), REFUSED)
def test_another_is_told_why_not(made: Callable[[str, Recipe], Conversion], target: str, reason: str) -> None:
    done = made("q", Recipe())
    found = lint(done.sidecar, load_target(target), stored_weights(done.sidecar, done.model))
    assert [f for f in found if f.layer == "c1_node" and reason in f.reason]


@pytest.mark.parametrize(
    ("bits", "name", "lowest"), [(4, "ort-x86", -8), (2, "npu-int8", -2), (4, "tflite", -7), (7, "ort-x86", -63)]
)
def test_coarse_grids_use_their_lowest_integer(
    made: Callable[[str, Recipe], Conversion], bits: int, name: str, lowest: int
) -> None:
    done = made("q", Recipe(target=name, weight=Weight(bits=bits, symmetric=True)))
    held = stored_weights(done.sidecar, done.model)
    weights = {tensor for tensor, entry in done.sidecar.tensors.items() if entry.role == "weight"}
    assert {done.sidecar.tensors[tensor].qmin for tensor in weights} == {lowest}
    assert min(int(held[tensor].min()) for tensor in weights) == lowest
    assert verify(done.sidecar_path, data=done.sidecar_path.parent / "d.npz").findings == []
    reasons = {f.reason for f in lint(done.sidecar, load_target("tflite"), held)}
    reaching = {f"'{tensor}' reaches {lowest}, the target's weights {lowest + 1}" for tensor in weights}
    assert reaching <= reasons if lowest in {-8, -2} else not reaching & reasons


def test_one_scale_per_tensor(made: Callable[[str, Recipe], Conversion], tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(
        'name = "t"\ndescription = "t"\n[activation]\ndtype = "uint8"\nsymmetric = false\n'
        '[weight]\ndtype = "int8"\nsymmetric = true\nper_channel = false\n'
        '[multiplier]\nbits = 32\nrounding = "single"\nshifts = [0, 30]\n'
    )
    done = made("q", Recipe())
    reasons = {f.reason for f in lint(done.sidecar, load_target(str(tmp_path / "t.toml")), {})}
    assert "'w1' has 8 scales, the target has one per tensor" in reasons
    assert any("lies outside 0 … 30" in reason for reason in reasons)


def test_what_8_bit_kernels_of_32_bit_multipliers_do_not_have(
    made: Callable[[str, Recipe], Conversion], tmp_path: Path
) -> None:
    text = (FOLDER / "tflite.toml").read_text().replace("bits = 32", "bits = 16").replace("shifts = [1, 62]\n", "")
    (tmp_path / "narrow.toml").write_text(text)
    wide = made("a", Recipe(target="tflite"))
    narrow = made("q", Recipe(target=str(tmp_path / "narrow.toml"), activation=Activation(bits=4)))
    found = {f"{f.operator}: {f.reason}" for f in lint(narrow.sidecar, load_target("tflite"), {})}
    assert "Conv: it rounds twice with multipliers of 16 bits, the target with 32" in found
    assert "Conv: 'x' lies in -8 … 7, the target's grid is -128 … 127" in found
    assert not any(reason.startswith("Gemm: it rounds") for reason in found)
    assert lint(wide.sidecar, load_target("tflite"), {}) == []


def test_the_commands(made: Callable[[str, Recipe], Conversion], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = made("a", Recipe()), made("b", Recipe(layers=Layers(exclude=("y_node",))))
    assert run(["lint", str(first.sidecar_path), "--target", "npu-int8", "--json"]) == 5
    assert {entry["layer"] for entry in json.loads(capsys.readouterr().out)["refusals"]} >= {"c1_node", "y_node"}
    assert run(["diff", str(first.sidecar_path), str(first.sidecar_path)]) == 0
    assert "0 changes" in capsys.readouterr().out
    assert run(["diff", str(first.sidecar_path), str(second.sidecar_path), "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert {"kind": "layer", "name": "y_node", "what": "integer", "before": "yes", "after": "no"} in changes
    assert [c["after"] for c in changes if c["kind"] == "float"] == ["excluded by 'y_node'"]


def test_scales_that_moved_are_told(made: Callable[[str, Recipe], Conversion]) -> None:
    done = made("a", Recipe())
    document = json.loads(done.sidecar_path.read_text())
    document["tensors"]["r1"]["scale"][0] *= 1.5
    document["tensors"]["x"]["zero_point"][0] += 2
    done.sidecar_path.write_text(json.dumps(document))
    changes = {(c.name, c.what): c.after for c in diff(done.sidecar, read(done.sidecar_path))}
    assert changes.keys() == {("r1", "scale"), ("x", "zero point")}
    assert changes["r1", "scale"].endswith("(+50.0%)")


def test_sidecars_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    monkeypatch.chdir(tmp_path)
    for folder, bits in (("a", 8), ("b", 4)):
        Path(folder).mkdir()
        convert(model, Path(folder, "q.onnx"), data=data, recipe=Recipe(weight=Weight(bits=bits)))
    assert run(["diff", "a/q.json", "b/q.json"]) == 0
    told = capsys.readouterr().out
    assert "a/q.json" in told
    assert "b/q.json" in told
