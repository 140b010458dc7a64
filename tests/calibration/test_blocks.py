"""Tensors handed out in ONNX Runtime's own order of their elements."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

import quantcli
from calibration import statistics
from calibration.errors import RunError
from calibration.hooks import blocks
from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe
from quantcli.recipe import Calibration
from tests.graphs import normal

Array = NDArray[Any]
ROWS = np.random.default_rng(3).normal(size=(12, 3, 9, 9)).astype(np.float32)


def network(last: int = 20) -> ModelProto:
    """Return convolutions of 32, 32 and some channels with a Relu each, of which a sum reads the first two."""
    shapes = {"u": (32, 3, 3, 3), "v": (32, 32, 3, 3), "w": (last, 32, 1, 1)}
    weights = [numpy_helper.from_array(normal(*shape, seed=n), name) for n, (name, shape) in enumerate(shapes.items())]
    nodes = []
    for before, weight, made, edge in (("x", "u", "a", 1), ("ar", "v", "b", 1), ("br", "w", "c", 0)):
        nodes.append(helper.make_node("Conv", [before, weight], [made], pads=[edge] * 4))
        nodes.append(helper.make_node("Relu", [made], [f"{made}r"]))
    nodes.append(helper.make_node("Add", ["ar", "br"], ["sum"]))
    infos = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, 9, 9])
        for name, channels in {"x": 3, "ar": 32, "br": 32, "cr": last, "sum": 32}.items()
    }
    graph = helper.make_graph(nodes, "test", [infos.pop("x")], list(infos.values()), weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def ran(model: ModelProto, unordered: Collection[str]) -> dict[str, Array]:
    return Runner(model.SerializeToString(), unordered=unordered).run({"x": ROWS})


@pytest.mark.parametrize("last", [20, 48])
def test_every_sample_keeps_its_values(last: int) -> None:
    plain = ran(network(last), ())
    found = ran(network(last), {"ar", "br", "cr", "sum", "elsewhere"})
    assert found.keys() == plain.keys()
    for name, values in plain.items():
        assert found[name].shape == values.shape
        rows, others = (one.reshape(len(ROWS), -1) for one in (found[name], values))
        assert np.array_equal(np.sort(rows), np.sort(others)), name


def test_what_has_no_whole_blocks_stays_in_order() -> None:
    """20 channels are filled up with zeros to whole blocks."""
    assert np.array_equal(ran(network(20), {"cr"})["cr"], ran(network(20), ())["cr"])


def test_only_what_was_named_is_in_another_order() -> None:
    plain = ran(network(48), ())
    assert np.array_equal(ran(network(48), {"ar"})["cr"], plain["cr"])
    moved = ran(network(48), {"cr"})["cr"]
    assert np.array_equal(moved, plain["cr"]) == (optimized_is_in_order(network(48)))


def optimized_is_in_order(model: ModelProto) -> bool:
    """Tell whether this machine's ONNX Runtime has no kernels in blocks."""
    return blocks.in_blocks(model.SerializeToString(), {"cr"}, writing(model)) is None


def writing(model: ModelProto) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        Runner(model.SerializeToString(), optimized=file)

    return write


def unwanted(file: Path) -> None:
    pytest.fail(f"{file} is written")


def test_without_room_for_a_file_tensors_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    plain = ran(network(48), ())
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    assert np.array_equal(ran(network(48), {"cr"})["cr"], plain["cr"])


def refused(*_: object) -> None:
    raise RunError("a node cannot be written")


def spoilt(*_: object) -> bytes:
    return b"no model"


@pytest.mark.parametrize(
    ("what", "instead"), [("onnxruntime.Runner.optimize", refused), ("onnxruntime.in_blocks", spoilt)]
)
def test_where_it_fails_tensors_come_in_order(monkeypatch: pytest.MonkeyPatch, what: str, instead: Any) -> None:
    plain = ran(network(48), ())
    monkeypatch.setattr(f"calibration.hooks.{what}", instead)
    found = ran(network(48), {"cr"})
    assert all(np.array_equal(found[name], values) for name, values in plain.items())


def test_large_models_and_those_without_convolutions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(48).SerializeToString()
    assert blocks.in_blocks(model.replace(b"Conv", b"Vnoc"), {"cr"}, unwanted) is None
    assert blocks.in_blocks(model, (), unwanted) is None
    monkeypatch.setattr(blocks, "LARGEST", len(model) - 1)
    assert blocks.in_blocks(model, {"cr"}, unwanted) is None


@pytest.mark.parametrize("observer", ["minmax", "mean-minmax"])
@pytest.mark.parametrize("channels", [False, True])
def test_extremes_do_not_depend_on_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observer: Any, channels: bool
) -> None:
    (tmp_path / "m.onnx").write_bytes(network(48).SerializeToString())
    recipe = Recipe(calibration=Calibration(observer=observer, channels=channels))
    np.savez(tmp_path / "d.npz", x=ROWS)
    quantcli.calibrate(tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "a.qstats", recipe)
    monkeypatch.setattr(blocks, "LARGEST", 0)
    quantcli.calibrate(tmp_path / "m.onnx", tmp_path / "d.npz", tmp_path / "b.qstats", recipe)
    assert (tmp_path / "a.qstats").read_bytes() == (tmp_path / "b.qstats").read_bytes()
    assert "cr" in statistics.load(tmp_path / "a.qstats").tensors
