"""Mixed widths: where the recipe wants weights of less than 8 bits, the smallest get 8, and all of them hardly grow."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from quantcli import Conversion, Recipe, convert
from quantcli.cli import cli
from quantcli.recipe import Tune, Weight
from quantcli.tune import effort
from quantcli.tune.mixed import GROWTH, may_mix
from tests.graphs import node, normal, save

SIZES = {"d": 4 * 9, "w1": 4 * 64, "w2": 64 * 32, "w3": 32 * 20}


def depthwise_net(folder: Path) -> tuple[Path, Path]:
    """Write a net of a depthwise convolution of uneven channels and three dense layers, and samples of it."""
    uneven = np.array([1.0, 0.05, 4.0, 0.3], dtype=np.float32).reshape(4, 1, 1, 1)
    constants = {
        "d": normal(4, 1, 3, 3, seed=1) * uneven,
        "w1": normal(4, 64, seed=2),
        "w2": normal(64, 32, seed=3, scale=0.2),
        "w3": normal(32, 20, seed=4),
    }
    nodes = [
        node("Conv", ["x", "d"], ["c"], group=4, pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w1"], ["h1"]),
        node("Relu", ["h1"], ["r1"]),
        node("Gemm", ["r1", "w2"], ["h2"]),
        node("Relu", ["h2"], ["r2"]),
        node("Gemm", ["r2", "w3"], ["y"]),
    ]
    model = save(folder / "m.onnx", nodes, {"x": ("N", 4, 6, 6)}, {"y": ("N", 20)}, constants)
    np.savez(folder / "d.npz", x=normal(96, 4, 6, 6, seed=5) / uneven.reshape(1, 4, 1, 1))
    return model, folder / "d.npz"


def converted(folder: Path, **tune: Any) -> Conversion:
    model, data = depthwise_net(folder)
    recipe = Recipe(target="npu-int8", weight=Weight(bits=4), tune=Tune(adaround=False, **tune))
    return convert(model, folder / "q.onnx", data=data, recipe=recipe, verified=True)


def bits_of(done: Conversion) -> dict[str, int]:
    return {name: one.integer.bits for name, one in done.plan.tensors.items() if one.role == "weight"}


def test_the_smallest_weights_get_8_bits_as_far_as_all_grow_by_little(tmp_path: Path) -> None:
    done = converted(tmp_path, mixed=True)
    assert bits_of(done) == {"d": 8, "w1": 4, "w2": 4, "w3": 4}
    room = GROWTH * sum(SIZES.values()) * 4
    assert SIZES["d"] * 4 <= room < (SIZES["d"] + SIZES["w1"]) * 4
    plain, mixed = (
        one for one in done.tuned.tries if one.name.removeprefix("1 weights of 8 bits, ") != "as calibrated"
    )
    assert mixed.kept
    assert mixed.name == f"1 weights of 8 bits, {plain.name}"
    assert mixed.sqnr > plain.sqnr + 0.3


def test_best_does_so_and_default_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(bits_of(converted(tmp_path)).values()) == {4}
    monkeypatch.setattr(effort, "WORTH_MIXING", -math.inf)
    assert bits_of(converted(tmp_path, effort="best"))["d"] == 8
    assert set(bits_of(converted(tmp_path, effort="best", mixed=False)).values()) == {4}


def test_what_is_not_worth_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effort, "WORTH_MIXING", math.inf)
    done = converted(tmp_path, mixed=True)
    assert set(bits_of(done).values()) == {4}
    assert not any("weights of 8 bits" in one.name for one in done.tuned.tries)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(weight=Weight(bits=4), tune=Tune(effort="best")), True),
        (Recipe(weight=Weight(bits=4), tune=Tune(effort="best", max_drop=1.0)), False),
        (Recipe(weight=Weight(bits=8), tune=Tune(mixed=True)), False),
        (Recipe(target="ort-x86-avx2", tune=Tune(mixed=True)), False),
        (Recipe(tune=Tune(effort="best")), False),
    ],
)
def test_only_where_the_recipe_alone_says_that_weights_are_narrow(recipe: Recipe, expected: bool) -> None:
    assert may_mix(recipe) is expected


def test_convert_says_which(tmp_path: Path) -> None:
    model, data = depthwise_net(tmp_path)
    recipe = tmp_path / "r.toml"
    recipe.write_text('target = "npu-int8"\n[weight]\nbits = 4\n[tune]\nmixed = true\n')
    command = ["convert", str(model), "--data", str(data), "--recipe", str(recipe), "-o", str(tmp_path / "q.onnx")]
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 0, found.output
    assert "weights of 8 bits: the 1 smallest" in found.output
