"""Learned rounding: its twin of a graph computes what the runtime computes, it loses less, and its integers are integers."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.arithmetic.affine import along_axis
from quantcli.errors import PlanError
from quantcli.pipeline import Conversion
from quantcli.recipe import Tune, Weight
from quantcli.tune import adaround, trying
from quantcli.tune.adaround import Twin, affordable, drawn, together
from quantcli.tune.choices import Choice
from quantcli.tune.steps import NOTHING
from tests.graphs import node, normal, residual_net, save


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return residual_net(tmp_path / "net.onnx")


def samples(path: Path) -> Path:
    np.savez(path, x=normal(320, 3, 8, 8, seed=31) + 3 * normal(320, 3, 1, 1, seed=32))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return samples(tmp_path / "data.npz")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """The residual net with weights of 2 bits whose rounding was learned in 300 steps."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaround, "STEPS", 300)
        return converted(
            residual_net(folder / "net.onnx"), samples(folder / "data.npz"), folder / "q.onnx", adaround=True
        )


def converted(model: Path, data: Path, output: Path, target: str = "ort-x86", bits: int = 2, **tune: Any) -> Conversion:
    recipe = Recipe(target=target, weight=Weight(bits=bits), tune=Tune(**tune))
    return convert(model, output, data=data, recipe=recipe, verified=True)


def test_its_twin_computes_what_the_runtime_computes(tmp_path: Path, model: Path, data: Path) -> None:
    done = converted(model, data, tmp_path / "q.onnx", bits=8)
    x = np.load(data)["x"]
    feeds = {"x": torch.from_numpy(x)}
    in_float = Twin(done.tuned.model, None, {}, {}).run(feeds)["y"].numpy()
    planned = Twin(done.tuned.model, done.plan, {}, {}).run(feeds)["y"].numpy()
    written = Runner(done.model).run({"x": x})["y"]
    # Kernels of integers round products of scales once more than reals do, and so differ by a step here and there.
    assert np.abs(planned - written).mean() < 0.1 * np.abs(in_float - written).mean()
    assert in_float == pytest.approx(Runner(model).run({"x": x})["y"], rel=0.3, abs=0.3)


def test_it_loses_less_and_its_integers_verify(tmp_path: Path, model: Path, data: Path, learned: Conversion) -> None:
    plain, done = converted(model, data, tmp_path / "a.onnx", bits=2, adaround=False), learned
    assert all("learned" not in one.name for one in plain.tuned.tries)
    last = done.tuned.tries[-1]
    assert last.name.endswith(", learned")
    assert last.kept
    assert last.sqnr > max(one.sqnr for one in plain.tuned.tries) + 0.5
    assert verify(done.sidecar_path, data).findings == []
    held = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(done.model).graph.initializer}
    for entry in done.sidecar.tensors.values():
        if entry.role == "weight":
            assert entry.grids is not None
            assert entry.grids.bits == 2
            above = held[entry.integers] - along_axis(
                np.array(entry.grids.lowest), held[entry.integers].ndim, entry.axis
            )
            assert set(np.unique(above)) <= set(range(4))


def test_it_has_to_be_worth_more_than_a_sweep_over_all_samples(
    tmp_path: Path, model: Path, data: Path, learned: Conversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is still to come for what was swept, where it is wanted, and cannot be had for what was learned."""
    monkeypatch.setattr(adaround, "STEPS", 300)
    gained = learned.tuned.tries[-1].sqnr - max(one.sqnr for one in learned.tuned.tries[:-1])
    monkeypatch.setattr(trying, "WORTH_LEARNING", gained + 0.5)
    little = converted(model, data, tmp_path / "b.onnx", bits=2, adaround=True)
    alone = converted(model, data, tmp_path / "c.onnx", bits=2, adaround=True, refit=False)
    assert [done.tuned.tries[-1].kept for done in (learned, little, alone)] == [True, False, True]


def test_it_gives_the_same_bytes_with_any_number_of_threads(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaround, "STEPS", 60)
    before = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            monkeypatch.setattr(os, "cpu_count", lambda number=number: number)
            converted(model, data, tmp_path / f"{number}.onnx", adaround=True)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_scales_of_powers_of_two_stay_so(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaround, "STEPS", 60)
    done = converted(model, data, tmp_path / "q.onnx", target="npu-pow2", bits=3, adaround=True)
    assert done.tuned.tries[-1].name.endswith(", learned")
    for entry in done.sidecar.tensors.values():
        assert (np.frexp(entry.scale)[0] == 0.5).all()


@pytest.mark.parametrize(
    ("sweeps", "expected"),
    [
        ({False: 20.0}, True),
        ({True: 3.0}, True),
        ({False: 20.0, True: 19.5}, True),
        ({False: 20.0, True: 18.5}, False),
    ],
)
def test_images_are_varied_unless_sweeps_over_such_copies_leave_less(sweeps: dict[bool, float], expected: bool) -> None:
    choices = [Choice(False, False, False, NOTHING, vary) for vary in sweeps]
    found = [(trying.Try("", sqnr, 0.0, {}), None) for sqnr in sweeps.values()]
    tried: Any = SimpleNamespace(choices=choices, found=found)
    assert trying.Trying.varies.fget(tried) is expected  # type: ignore[attr-defined]


def test_best_effort_learns_weights_of_2_and_3_bits(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaround, "STEPS", 60)
    coarse = converted(model, data, tmp_path / "a.onnx", bits=3, effort="best")
    fine = converted(model, data, tmp_path / "b.onnx", bits=4, effort="best")
    assert [one.name for one in coarse.tuned.tries if one.name.endswith("learned")]
    assert not [one.name for one in fine.tuned.tries if one.name.endswith("learned")]


def test_what_cannot_be_learned_is_left_out(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(adaround, "WORK", 1000)
    with caplog.at_level("INFO", "quantcli"):
        done = converted(model, data, tmp_path / "a.onnx", adaround=True)
    assert "rounding is not learned: a step takes too much" in caplog.text
    assert all("learned" not in one.name for one in done.tuned.tries)
    graph = done.tuned.model
    x = np.zeros((4, 3, 8, 8), np.float32)
    with pytest.raises(PlanError, match="too much"):
        affordable(graph, {"x": x})
    with pytest.raises(PlanError, match="several shapes"):
        together(graph, [{"x": x}, {"x": x[:, :, :4]}])
    fixed = save(tmp_path / "f.onnx", [node("Relu", ["x"], ["y"])], {"x": [4, 3]}, {"y": [4, 3]}, {})
    from quantcli.load import load

    with pytest.raises(PlanError, match="one size"):
        together(load(fixed).graph, [{"x": np.zeros((4, 3), np.float32)}])


def test_batches_are_mixtures_of_samples() -> None:
    images = normal(10, 3, 16, 16, seed=1)
    tokens = np.arange(40).reshape(10, 4)
    found = drawn({"image": images, "tokens": tokens}, np.random.default_rng(0))
    assert found["image"].shape == (10, 3, 16, 16)
    assert found["image"].dtype == np.float32
    assert np.abs(found["image"]).max() <= np.abs(images).max()
    assert {tuple(row) for row in found["tokens"].tolist()} <= {tuple(row) for row in tokens.tolist()}
    again = drawn({"image": images, "tokens": tokens}, np.random.default_rng(0))
    assert (again["image"] == found["image"]).all()
    flat = {"x": normal(10, 7, seed=2)}
    pairs = drawn(flat, np.random.default_rng(3))["x"]
    exact = [any((row == one).all() for one in flat["x"]) for row in pairs]
    assert any(exact)  # half of the samples are not mixed
    assert not all(exact)


def test_masks_are_not_mixed() -> None:
    masks = np.where(np.arange(6) < np.arange(1, 7)[:, None], np.float32(0), np.float32(-np.inf))
    found = drawn({"mask": masks}, np.random.default_rng(3), {"mask"})["mask"]
    assert {tuple(row) for row in found.tolist()} <= {tuple(row) for row in masks.tolist()}
    wide = np.broadcast_to(np.maximum(masks, np.float32(-1e4))[:, None, None], (6, 1, 8, 6)).repeat(2, axis=3)
    found = drawn({"mask": wide}, np.random.default_rng(3), {"mask"})["mask"]
    assert {one.tobytes() for one in found} <= {one.tobytes() for one in wide}


def test_an_operator_without_a_counterpart_is_named(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
        node("Shrink", ["a"], ["b"]),
        node("Conv", ["b", "v"], ["y"]),
    ]
    weights = {"w": normal(8, 3, 3, 3, seed=1), "v": normal(4, 8, 1, 1, seed=2)}
    source = save(tmp_path / "s.onnx", nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 8, 8]}, weights)
    with caplog.at_level("INFO", "quantcli"):
        done = converted(source, data, tmp_path / "q.onnx", adaround=True)
    assert "rounding is not learned" in caplog.text
    assert "Shrink" in caplog.text
    assert done.model.exists()
