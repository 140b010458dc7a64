"""Gain correction: what the last layers lose in proportion, their weights' scales make up for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantcli import Recipe, convert, verify
from quantcli.recipe import Activation, Tune, Weight
from quantcli.tune.gain import gain_of
from tests.graphs import data_for, node, normal, residual_net, save

if TYPE_CHECKING:
    from quantcli import Conversion
    from tests.graphs import Array


@given(st.floats(0.3, 0.95), st.integers(0, 2**32 - 1))
def test_a_smaller_copy_is_made_whole(part: float, seed: int) -> None:
    real = [normal(4, 3, 5, seed=seed), normal(2, 3, 5, seed=seed + 1)]
    shift = normal(1, 3, 1, seed=seed + 2)
    made = [values * np.float32(part) + shift for values in real]
    gain, before, after = gain_of(real, made, centred=True)
    # Values below 8 in float32, of which products are summed: 90 terms, each of which errs by 2^-23 of 64 at most.
    assert gain == pytest.approx(1 / part, rel=1e-4)
    assert after == pytest.approx(0, abs=90 * 90 * 64 * 2**-23)
    assert after <= before + 90 * 90 * 64 * 2**-23


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_no_other_factor_leaves_less(seed: int, centred: bool) -> None:
    real = [normal(4, 3, seed=seed)]
    made = [real[0] * np.float32(0.7) + normal(4, 3, seed=seed + 1, scale=0.1)]
    gain, before, after = gain_of(real, made, centred)

    def error(factor: float) -> float:
        lost = made[0].astype(np.float64) * factor - real[0]
        return float(np.square(lost - lost.mean(axis=0) * centred).sum())

    for factor, found in ((1.0, before), (float(gain), after)):
        assert found == pytest.approx(error(factor), abs=12 * 12 * 64 * 2**-23)
    assert error(float(gain)) <= min(error(float(gain) * other) for other in (0.99, 1.01)) + 1e-9


@pytest.mark.parametrize("part", [0.0, -1.0, 1.1, np.inf, np.nan])
def test_nothing_is_made_smaller_and_what_tells_nothing_changes_nothing(part: float) -> None:
    real = [normal(4, 3, seed=1)]
    with np.errstate(invalid="ignore"):
        assert gain_of(real, [real[0] * np.float32(part)], centred=False) == (np.float32(1), 0.0, 0.0)


def converted(folder: Path, model: Path, data: Path, weight: Weight, gain: bool | None) -> Conversion:
    """Convert with ranges that cut some of the values, and with nothing that makes up for it but biases and, if asked for, gain."""
    steps = Tune(ranges=False, equalize=False, compensation=False, refit=False, gain=gain)
    recipe = Recipe(weight=weight, activation=Activation(range="percentile:90"), tune=steps)
    return convert(model, folder / f"{gain}.onnx", data=data, recipe=recipe, verified=True)


def stored(done: Conversion, name: str) -> Array:
    held = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(done.model).graph.initializer}
    return held[done.sidecar.tensors[name].integers]


def two_layers(path: Path) -> Path:
    """Write a net of two dense layers with a Relu between; input x [N, 16]."""
    constants = {
        "w1": normal(32, 16, seed=1, scale=0.3),
        "w2": normal(4, 32, seed=2, scale=0.3),
        "b2": normal(4, seed=3),
    }
    nodes = [
        node("Gemm", ["x", "w1"], ["h"], transB=1),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "w2", "b2"], ["y"], transB=1),
    ]
    return save(path, nodes, {"x": ["N", 16]}, {"y": ["N", 4]}, constants)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_last_layers_scales_make_up_for_what_ranges_cut(tmp_path: Path, bits: int, per_channel: bool) -> None:
    model, data = two_layers(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=400, x=(16,))
    weight = Weight(bits=bits, per_channel=per_channel)
    without, done = (converted(tmp_path, model, data, weight, gain) for gain in (False, None))
    assert verify(done.sidecar_path, data).findings == []
    tries = {
        plain: next(one for one in found.tuned.tries if one.kept) for plain, found in ((True, without), (False, done))
    }
    assert tries[False].sqnr > tries[True].sqnr + 0.2  # of 64 samples that the sweep has not seen
    assert tries[False].gains["gain"][0] == 1
    assert (stored(done, "w2") == stored(without, "w2")).all()
    factors = np.divide(done.plan.tensors["w2"].scale, without.plan.tensors["w2"].scale)
    assert factors == pytest.approx(factors[0], rel=1e-6)
    assert factors[0] > 1.02
    assert done.plan.tensors["w1"].scale == without.plan.tensors["w1"].scale


def test_scales_of_powers_of_two_and_layers_that_are_cut_have_none(tmp_path: Path) -> None:
    data = data_for(tmp_path / "d.npz", samples=96)
    model = residual_net(tmp_path / "net.onnx")
    recipe = Recipe(target="npu-pow2", activation=Activation(range="percentile:95"), tune=Tune(ranges=False))
    done = convert(model, tmp_path / "p.onnx", data=data, recipe=recipe)
    assert all("gain" not in one.gains for one in done.tuned.tries)
    constants = {"w": normal(4, 3, 1, 1, seed=1), "b": normal(4, seed=2)}
    nodes = [node("Conv", ["x", "w", "b"], ["c"]), node("Relu", ["c"], ["y"])]
    cut = save(tmp_path / "cut.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 4, 8, 8]}, constants)
    done = converted(tmp_path, cut, data, Weight(), gain=None)
    assert all("gain" not in one.gains for one in done.tuned.tries)
