"""Models of more than one file's size: weights beside the message, mapped in and written out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.numpy_helper import to_array

from calibration.hooks.onnxruntime import Runner
from quantcli import calibrate, convert, evaluate, verify
from quantcli.cli import run
from quantcli.errors import ModelError, UsageError
from quantcli.load import load
from tests.graphs import node, normal, save


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Return a chain of products, of 256 kB each in float."""
    tensors = {f"w{number}": normal(256, 256, seed=number, scale=0.06) for number in range(4)}
    nodes, last = [], "x"
    for number in range(4):
        nodes.append(node("MatMul", [last, f"w{number}"], [f"p{number}"]))
        nodes.append(node("Relu", [f"p{number}"], [last := f"r{number}" if number < 3 else "y"]))
    np.savez(tmp_path / "d.npz", x=normal(32, 256, seed=9))
    return save(tmp_path / "wide.onnx", nodes, {"x": ["N", 256]}, {"y": None}, tensors)


def shrink_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a message hold 100 kB, and no weights of 10 kB once it would be more; nothing of that size is tuned."""
    for name in ("quantcli.probe.LARGEST_MODEL", "quantcli.delivery.LARGEST_MODEL", "quantcli.tune.effort.LARGEST"):
        monkeypatch.setattr(name, 100_000)
    monkeypatch.setattr("quantcli.probe.LARGE_WEIGHT", 10_000)


@pytest.fixture
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_messages(monkeypatch)


def converted(model: Path, output: Path) -> Path:
    return convert(model, output, data=model.with_name("d.npz"), verified=True).model


@pytest.mark.usefixtures("small_messages")
@pytest.mark.parametrize("mode", ["static", "weights", "weights, 4 bits", "dynamic", "half float", "qoperator"])
def test_a_large_output_is_two_files_that_work(wide: Path, mode: str) -> None:
    recipes = {
        "weights": ["--mode", "weights"],
        "weights, 4 bits": ["--mode", "weights", "--weight-bits", "4", "--block-size", "32"],
        "dynamic": ["--mode", "dynamic"],
        "half float": ["--exclude", "p1_node", "--exclude", "p2_node"],
        "qoperator": ["--format", "qoperator", "--target", "native"],
    }
    output = wide.with_name("q.onnx")
    more = recipes.get(mode, [])
    assert (
        run(["convert", str(wide), "--data", str(wide.with_name("d.npz")), "-o", str(output), "-q", "--verify", *more])
        == 0
    )
    data = output.with_name("q.onnx.data")
    assert output.stat().st_size < 100_000 < data.stat().st_size
    assert sorted(path.name for path in wide.parent.iterdir()) == [
        "d.npz",
        "q.json",
        "q.onnx",
        "q.onnx.data",
        "wide.onnx",
    ]
    held = {entry.name: entry for entry in onnx.load(output, load_external_data=False).graph.initializer}
    apart = [entry for entry in held.values() if entry.data_location == onnx.TensorProto.EXTERNAL]
    assert len(apart) == 4
    for entry in apart:
        assert int(next(item.value for item in entry.external_data if item.key == "offset")) % 4096 == 0
    stated = json.loads(output.with_suffix(".json").read_text())["model"]
    assert (
        stated["sha256"] == hashlib.sha256(output.read_bytes() + data.read_bytes()).hexdigest() == load(output).sha256
    )
    assert stated["bytes"] == output.stat().st_size + data.stat().st_size
    assert verify(output.with_suffix(".json"), wide.with_name("d.npz")).findings == []
    x = np.load(wide.with_name("d.npz"))["x"]
    expected, found = (Runner(path).run({"x": x})["y"] for path in (wide, output))
    assert 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()) > (12 if "4" in mode else 25)
    scored = evaluate(output, wide.with_name("d.npz"), reference=wide, layers=mode == "static")
    assert scored.size == stated["bytes"]
    assert len(scored.layers) == (4 if mode == "static" else 0)


def test_two_files_hold_what_one_does(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calibrate(wide, wide.with_name("d.npz"))
    one = convert(wide, wide.with_name("one.onnx"), seen).model
    shrink_messages(monkeypatch)
    two, again = (convert(wide, wide.with_name(name), seen).model for name in ("two.onnx", "again.onnx"))
    stored = [{entry.name: to_array(entry) for entry in onnx.load(path).graph.initializer} for path in (one, two)]
    assert stored[0].keys() == stored[1].keys()
    assert all((array == stored[1][name]).all() for name, array in stored[0].items())
    assert two.with_name("two.onnx.data").read_bytes() == again.with_name("again.onnx.data").read_bytes()
    assert not one.with_name("one.onnx.data").exists()


@pytest.mark.usefixtures("small_messages")
def test_where_weights_are_missing_or_others_verify_says_so(wide: Path) -> None:
    output = converted(wide, wide.with_name("q.onnx"))
    data = output.with_name("q.onnx.data")
    content = bytearray(data.read_bytes())
    content[5] ^= 64
    data.write_bytes(bytes(content))
    found = {finding.what.split(" ")[1] for finding in verify(output.with_suffix(".json")).findings}
    assert "model's" in found  # its sha256
    assert len(found) > 1
    data.unlink()
    with pytest.raises(ModelError, match=r"q\.onnx\.data, which is not there"):
        verify(output.with_suffix(".json"))


@pytest.mark.usefixtures("small_messages")
def test_nothing_is_left_where_it_fails_and_no_input_is_overwritten(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in wide.parent.iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(
            "quantcli.integer.layers.kernels.multiply_matrices", lambda x, w: np.zeros((len(x), w.shape[1]), np.int64)
        )
        assert (
            run(
                [
                    "convert",
                    str(wide),
                    "--data",
                    str(wide.with_name("d.npz")),
                    "-o",
                    str(wide.with_name("q.onnx")),
                    "-q",
                    "--verify",
                ]
            )
            == 3
        )
    assert sorted(path.name for path in wide.parent.iterdir()) == before
    onnx.save(onnx.load(wide), wide.with_name("apart.onnx"), save_as_external_data=True, location="q.onnx.data")
    held = wide.with_name("q.onnx.data").read_bytes()
    with pytest.raises(UsageError, match="also an input"):
        converted(wide.with_name("apart.onnx"), wide.with_name("q.onnx"))
    assert wide.with_name("q.onnx.data").read_bytes() == held
