"""What a model gives out keeps its name and its ends, and exact outputs say nothing of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, calibrate, convert, verify
from quantcli.cli import run
from quantcli.embedded.check import compiler
from quantcli.fold import fold
from quantcli.load import load
from quantcli.pipeline import verify_c
from quantcli.recipe import resolve_target
from quantcli.tune.candidates import Candidate, swept
from quantcli.tune.steps import Steps
from tests.graphs import Array, Shape, node, normal, save


def alike(path: Path, operator: str) -> Path:
    """A network three of whose outputs are copies: of another output, and two of the same tensor."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w2"], ["y"], pads=[1, 1, 1, 1]),
        node(operator, ["y"], ["z"]),
        node(operator, ["b"], ["u"]),
        node(operator, ["b"], ["v"]),
    ]
    weights = {"w1": normal(6, 3, 3, 3, seed=1) / 5, "w2": normal(3, 6, 3, 3, seed=2) / 5}
    outputs: dict[str, Shape] = {name: ["n", 3, 8, 8] for name in ("y", "z")}
    outputs |= {name: ["n", 6, 8, 8] for name in ("u", "v")}
    return save(path, nodes, {"x": ["n", 3, 8, 8]}, outputs, weights)


@pytest.mark.parametrize("operator", ["Identity", "Dropout"])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_outputs_that_are_alike_keep_their_names(tmp_path: Path, operator: str, form: str) -> None:
    model, x = alike(tmp_path / "net.onnx", operator), normal(48, 3, 8, 8, seed=3)
    np.savez(tmp_path / "d.npz", x=x)
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", form=form)
    assert [one.name for one in onnx.load(done.model).graph.output] == ["y", "z", "u", "v"]
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []
    found, expected = Runner(done.model).run({"x": x}), Runner(model).run({"x": x})
    for name, other in (("y", "z"), ("u", "v")):
        np.testing.assert_array_equal(found[name], found[other])
        assert np.square(found[name] - expected[name]).sum() < 1e-3 * np.square(expected[name]).sum()


def with_middle(path: Path, given_out: bool) -> Path:
    """A network with a tensor of which a layer behind hears little more than what lies near zero, and that it may give out."""
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["middle"], pads=[1, 1, 1, 1]),
        node("Conv", ["middle", "w2"], ["y"], pads=[1, 1, 1, 1]),
    ]
    weights: dict[str, Array] = {
        "w1": normal(8, 3, 3, 3, seed=1) / 5,
        "b1": np.array([-9, *[0] * 7], dtype=np.float32),
        "w2": normal(4, 8, 3, 3, seed=2) / 5,
    }
    weights["w2"][:, 0] *= 1e-4
    outputs: dict[str, Shape] = {"y": ["n", 4, 8, 8]}
    if given_out:
        outputs["middle"] = ["n", 8, 8, 8]
    return save(path, nodes, {"x": ["n", 3, 8, 8]}, outputs, weights)


@pytest.mark.parametrize("outputs", [0, 2])
@pytest.mark.parametrize("given_out", [True, False])
def test_what_is_given_out_keeps_its_ends(tmp_path: Path, outputs: int, given_out: bool) -> None:
    """Nothing behind it hears of what lies far below zero; but who gets it does."""
    model, x = with_middle(tmp_path / "net.onnx", given_out), normal(96, 3, 8, 8, seed=3)
    np.savez(tmp_path / "d.npz", x=x)
    recipe = Recipe()
    base = Candidate(fold(load(model).graph), calibrate(model, tmp_path / "d.npz"), ())
    steps = Steps(True, outputs, False, False, False, False)
    found, _ = swept(base, recipe, resolve_target(recipe), steps, [{"x": x[:48]}, {"x": x[48:]}], lambda *_: None)
    assert ("middle" in found.tuning.ranges) == (not given_out)


def unevenly_wide(path: Path, exact: bool) -> Path:
    """Layers whose input has one channel of much larger values, and, if wanted, that input as an output, too."""
    first = normal(16, 16, seed=1) / 3
    first[0] *= 1e-3
    nodes = [
        node("Gemm", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Gemm", ["b", "w2"], ["y"]),
        *([node("Identity", ["x"], ["again"])] if exact else []),
    ]
    weights = {"w1": first, "w2": normal(16, 4, seed=2) / 3}
    outputs: dict[str, Shape] = {"y": ["n", 4]}
    if exact:
        outputs["again"] = ["n", 16]
    return save(path, nodes, {"x": ["n", 16]}, outputs, weights)


def test_an_exact_output_judges_nothing(tmp_path: Path) -> None:
    x = normal(192, 16, seed=3)
    x[:, 0] *= 300
    np.savez(tmp_path / "d.npz", x=x)
    tries = []
    for exact in (False, True):
        model = unevenly_wide(tmp_path / f"{exact}.onnx", exact)
        done = convert(model, tmp_path / f"{exact}.q.onnx", data=tmp_path / "d.npz", recipe=Recipe(target="npu-int8"))
        assert [name for name, entry in done.sidecar.tensors.items() if entry.dtype == "int16"] == ["x"]
        tries.append([(one.name, round(one.sqnr, 1)) for one in done.tuned.tries if "compensation" not in one.name])
    assert tries[0][0] == tries[1][0]
    assert max(sqnr for _, sqnr in tries[1]) < 60


@pytest.mark.parametrize("target", ["ort-x86", "npu-int8"])
def test_constants_that_are_given_out_stay_what_they_are(tmp_path: Path, target: str) -> None:
    """Tuning changes weights and biases for what reads them, not for whom they are handed."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["r"]),
        node("Conv", ["r", "w2", "b"], ["y"]),
    ]
    weights = {"w1": normal(6, 3, 3, 3, seed=1), "w2": normal(4, 6, 1, 1, seed=2), "b": normal(4, seed=4)}
    outputs: dict[str, Shape] = {"y": ["n", 4, 8, 8], "w2": [4, 6, 1, 1], "b": [4]}
    model = save(tmp_path / "net.onnx", nodes, {"x": ["n", 3, 8, 8]}, outputs, weights)
    np.savez(tmp_path / "d.npz", x=normal(48, 3, 8, 8, seed=3))
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(target=target))
    found = Runner(done.model).run({"x": normal(2, 3, 8, 8, seed=5)})
    for name in ("w2", "b"):
        np.testing.assert_array_equal(found[name], weights[name])


def test_random_inputs_come_in_the_batches_that_the_model_takes(tmp_path: Path) -> None:
    weights = {"w": normal(4, 3, 3, 3, seed=1)}
    model = save(
        tmp_path / "net.onnx", [node("Conv", ["x", "w"], ["y"])], {"x": [3, 3, 8, 8]}, {"y": [3, 4, 6, 6]}, weights
    )
    np.savez(tmp_path / "d.npz", x=normal(48, 3, 8, 8, seed=3))
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=Recipe(target="npu-int8"))
    assert verify(done.sidecar_path).findings == []


def pyramid(path: Path) -> Path:
    """Write a net that halves its input and joins it, at twice the size, with itself: sizes are even, and behind it at least 5."""
    nodes = [
        node("Conv", ["x", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Resize", ["c", "", "scales"], ["u"], mode="nearest"),
        node("Concat", ["u", "x"], ["j"], axis=1),
        node("Conv", ["j", "v"], ["y"]),
    ]
    constants = {"w": normal(4, 3, 3, 3, seed=1), "v": normal(4, 7, 5, 5, seed=2)}
    constants["scales"] = np.array([1, 1, 2, 2], np.float32)
    return save(path, nodes, {"x": ["n", 3, "height", "width"]}, {"y": None}, constants)


def test_random_inputs_have_sizes_that_the_model_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pyramid(tmp_path / "net.onnx")
    np.savez(tmp_path / "d.npz", x=normal(8, 3, 12, 10, seed=3))
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz")
    monkeypatch.setattr("quantcli.verification.FREE_SIZES", (1, 2, 11, 8))
    found = verify(done.sidecar_path)
    assert found.findings == []
    assert found.elements > 8 * 4 * 4 * 4  # what the last layer gives
    monkeypatch.setattr("quantcli.verification.FREE_SIZES", (1, 2, 11))
    assert run(["verify", str(done.sidecar_path)]) == 1
    told = capsys.readouterr().err
    assert told == (
        "error: q.onnx leaves axes of its inputs free, and does not run with sizes of 1, 2, 11; give --data\n"
    )


@pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
def test_random_inputs_have_the_sizes_that_c_source_was_made_for(tmp_path: Path) -> None:
    model = pyramid(tmp_path / "net.onnx")
    np.savez(tmp_path / "d.npz", x=normal(8, 3, 12, 10, seed=3))
    convert(model, tmp_path / "c", data=tmp_path / "d.npz", form="c")
    found = verify_c(tmp_path / "c")
    assert (found.samples, found.values, found.wrong) == (8, 8 * 4 * 8 * 6, 0)
