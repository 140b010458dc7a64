"""Wide activations: what 8 bits would leave next to nothing of gets 16, where the target has both and little is left otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from calibration.hooks.onnxruntime import Runner
from quantcli import Conversion, Recipe, calibrate, convert, verify
from quantcli.arithmetic.affine import IntegerType
from quantcli.cli import cli
from quantcli.delivery import for_form, widths_for
from quantcli.errors import RecipeError
from quantcli.evaluation.check import LOW_SQNR
from quantcli.fold import fold, lifted
from quantcli.load import load
from quantcli.plan import make_plan
from quantcli.recipe import Activation, Tune, Weight
from quantcli.review import lint
from quantcli.targets import FOLDER, ActivationFormat, load_target
from quantcli.tune.ranges import Grid
from quantcli.tune.values import values_in_parts
from quantcli.tune.wide import ENOUGH, Lost, left_of, may_widen
from quantcli.tune.widths import AROUND, FLOAT, WIDE, Step, Width
from tests.graphs import Array, node, normal, save

LOUD = 400.0
NPU = Recipe(target="npu-int8")


def outlying(path: Path) -> Path:
    """Write a net that gives the same for inputs of any loudness, but for a normalisation's ε; input x [N, 12], output y [N, 6]."""
    constants: dict[str, Array] = {
        "w1": normal(12, 16, seed=1, scale=0.3),
        "gamma": normal(16, seed=2, scale=0.2) + 1,
        "w2": normal(16, 6, seed=3, scale=0.3),
        "b2": normal(6, seed=4),
    }
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("HardSwish", ["h"], ["g"]),
        node("LayerNormalization", ["g", "gamma"], ["n"]),
        node("Gemm", ["n", "w2", "b2"], ["y"]),
    ]
    return save(path, nodes, {"x": ("N", 12)}, {"y": ("N", 6)}, constants, opset=17)


def samples(count: int, loud: float, seed: int = 9) -> Array:
    """Return samples of which every eighth is so many times as loud."""
    values = normal(count, 12, seed=seed)
    values[::8] *= loud
    return values


def converted(
    tmp_path: Path, recipe: Recipe = NPU, loud: float = LOUD, output: str = "q.onnx", **more: Any
) -> Conversion:
    model = outlying(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=samples(96, loud))
    return convert(model, tmp_path / output, data=tmp_path / "d.npz", recipe=recipe, **more)


def types_of(done: Conversion) -> dict[str, str]:
    return {name: entry.dtype for name, entry in done.sidecar.tensors.items() if entry.role == "activation"}


@pytest.mark.parametrize("target", ["npu-int8", "npu-pow2"])
def test_what_is_loud_at_times_gets_16_bits_and_the_rest_keeps_8(tmp_path: Path, target: str) -> None:
    done = converted(tmp_path, Recipe(target=target), verified=True)
    assert types_of(done) == {"x": "int16", "h": "int16", "g": "int16", "n": "int8", "y": "int8"}
    assert done.sidecar.opset == 21
    largest = {entry.name: max(entry.multipliers[0].multiplier) for entry in done.sidecar.layers if entry.multipliers}
    assert {name for name, m0 in largest.items() if m0 < 1 << 15} == {
        "h_node"
    }  # which alone multiplies integers of 16 bits
    kept = next(one for one in done.tuned.tries if one.kept)
    assert kept.name.startswith("3 activations of 16 bits")
    assert max(one.sqnr for one in done.tuned.tries if "16 bits" not in one.name) < LOW_SQNR
    assert kept.sqnr > 20
    assert verify(done.sidecar_path).findings == []
    assert lint(done.sidecar, load_target(target), {}) == []
    assert {found.layer for found in lint(done.sidecar, load_target("cmsis-nn"), {})} == {"h_node", "g_node", "y_node"}
    onnx.checker.check_model(onnx.load(done.model), full_check=True)
    fresh = {"x": samples(200, LOUD, seed=5)}
    expected, found = (Runner(path).run(fresh)["y"] for path in (tmp_path / "m.onnx", done.model))
    assert 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum()) > 20


def test_narrow_activations_stay_where_they_do(tmp_path: Path) -> None:
    done = converted(tmp_path, loud=1.0)
    assert set(types_of(done).values()) == {"int8"}
    assert not any("16 bits" in one.name for one in done.tuned.tries)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(target="npu-int8", tune=Tune(widen=False)),
        Recipe(target="npu-int8", activation=Activation(bits=8)),
        Recipe(target="npu-int8", activation=Activation(dtype="int8")),
        Recipe(target="cmsis-nn"),
        Recipe(target="npu-int8", tune=Tune(effort="fast")),
    ],
    ids=["switched off", "bits given", "type given", "a target without", "fast"],
)
def test_activations_keep_8_bits_where_the_recipe_or_the_target_says_so(tmp_path: Path, recipe: Recipe) -> None:
    assert set(types_of(converted(tmp_path, recipe)).values()) == {"int8"}


def test_forms_of_one_width_keep_8_bits(tmp_path: Path) -> None:
    done = converted(tmp_path, form="qoperator")
    assert set(types_of(done).values()) == {"int8"}


def test_weights_that_leave_little_do_not_widen_activations(tmp_path: Path) -> None:
    done = converted(tmp_path, Recipe(target="npu-int8", weight=Weight(bits=2)), loud=1.0)
    assert max(one.sqnr for one in done.tuned.tries) < LOW_SQNR
    assert set(types_of(done).values()) == {"int8"}


def test_widening_can_be_asked_for(tmp_path: Path) -> None:
    done = converted(tmp_path, Recipe(target="npu-int8", tune=Tune(widen=True)), loud=10.0)
    assert max(one.sqnr for one in done.tuned.tries if "16 bits" not in one.name) > LOW_SQNR
    assert "int16" in types_of(done).values()


def test_an_exported_program_has_both_widths(tmp_path: Path) -> None:
    done = converted(tmp_path, output="q.pt2")
    assert done.check.sqnr["y"] > 20
    assert set(types_of(done).values()) == {"int8", "int16"}


def test_the_command_says_which(tmp_path: Path) -> None:
    converted(tmp_path)
    arguments = ["convert", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "d.npz"), "--target", "npu-int8"]
    arguments += ["-o", str(tmp_path / "q.onnx")]
    ran = CliRunner().invoke(cli, arguments)
    assert ran.exit_code == 0, ran.output
    assert "activations of 16 bits: 3, of which 8 would leave too little: 'x', 'h', 'g'" in " ".join(ran.output.split())
    ran = CliRunner().invoke(cli, [*arguments, "--json", "-q"])
    assert json.loads(ran.stdout)["tuning"]["wide"] == ["x", "h", "g"]


def test_what_rounding_leaves_is_measured_tensor_by_tensor(tmp_path: Path) -> None:
    model = outlying(tmp_path / "m.onnx")
    feeds = {"x": samples(16, LOUD)}
    np.savez(tmp_path / "d.npz", x=feeds["x"])
    folded = fold(load(model).graph)
    plan = make_plan(folded, calibrate(model, tmp_path / "d.npz", recipe=NPU), NPU)
    left = left_of(folded, plan, [feeds])
    assert set(left) == {"x", "h", "g", "n", "y"}
    made = Runner(model).run(feeds)["y"].astype(np.float64)
    scale = np.float64(plan.tensors["y"].scale[0])
    noise = np.square(np.clip(np.rint(made / scale), -128, 127) * scale - made)
    parts = [(noise.sum(axis=axis) / np.square(made).sum(axis=axis)).mean() for axis in (0, 1)]
    # Dividing in float32 moves a quotient by 2^-24 of itself: an integer differs next to ties alone, and its noise hardly.
    assert left["y"] == pytest.approx(-10 * np.log10(max(parts)), abs=1e-4)
    assert max(left["x"], left["h"], left["g"]) < ENOUGH < min(left["n"], left["y"])


def test_neither_loud_channels_nor_loud_rows_drown_the_others() -> None:
    grid = Grid(np.float32(2), 0, IntegerType("int8"))
    quiet = np.full((4, 6), 0.5, dtype=np.float32)  # of which the grid leaves nothing
    for place in ((slice(None), 0), (0, slice(None))):
        values = quiet.copy()
        values[place] = 200.0  # of which it leaves everything
        lost = Lost(grid, image=False)
        lost.add(values[:2])
        lost.add(values[2:])
        share = {(4,): 5 / 6, (6,): 3 / 4}[values[place].shape]
        other = 0.25 / 200.0**2
        assert lost.decibels == pytest.approx(-10 * np.log10(share), abs=10 * other)


def test_a_row_of_an_image_is_a_sample_and_zeros_lose_nothing() -> None:
    values = np.zeros((2, 3, 4, 4), dtype=np.float32)
    values[1, 2] = 0.5
    lost = Lost(Grid(np.float32(2), 0, IntegerType("int8")), image=True)
    lost.add(values)
    assert lost.channels is not None
    assert lost.channels.shape == (2, 3)
    assert (lost.parts, lost.rows) == (1.0, 2)
    assert lost.decibels == pytest.approx(-10 * np.log10(1 / 2))


@pytest.mark.parametrize(("wanted", "rows"), [(None, [40, 30]), (45, [40, 5]), (40, [40])])
def test_parts_hold_as_many_samples_as_are_wanted(tmp_path: Path, wanted: int | None, rows: list[int]) -> None:
    model = fold(load(outlying(tmp_path / "m.onnx")).graph)
    feeds = [{"x": normal(40, 12, seed=1)}, {"x": normal(30, 12, seed=2)}]
    found = list(values_in_parts(model, feeds, ["g"], wanted))
    assert [len(part["g"]) for part in found] == rows
    assert set(found[0]) == {"x", "g"}


def test_large_tensors_are_looked_at_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.tune.values.ROOM", 4 * 16 * 7)
    model = fold(load(outlying(tmp_path / "m.onnx")).graph)
    feeds = [{"x": normal(20, 12, seed=1)}]
    parts = [part["g"] for part in values_in_parts(model, feeds, ["g"], 18)]
    assert [len(part) for part in parts] == [7, 7, 4]


def test_grids_of_other_widths() -> None:
    narrow = ActivationFormat("int8", True)
    assert [narrow.grid_of(bits) for bits in (4, 8, 16)] == ["int4", "int8", "int8"]
    assert not narrow.takes_both
    assert not ActivationFormat("int8", True, bits=4).takes_both
    both = load_target("npu-int8").activation
    assert [both.grid_of(bits) for bits in (4, 8, 16)] == ["int4", "int8", "int16"]
    assert both.takes_both
    assert may_widen(NPU)
    assert not may_widen(Recipe(target="npu-int16"))
    assert not may_widen(Recipe(target="ort-x86"))


def test_a_model_is_lifted_under_its_names(tmp_path: Path) -> None:
    model = fold(load(outlying(tmp_path / "m.onnx")).graph)
    copy = lifted(model, 21)
    assert copy is not None
    assert copy.opset_imports[""] == 21
    assert model.opset_imports[""] == 17
    assert [value.name for value in copy.graph.node(1).outputs] == ["g"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Samples whose labels are what the float model says."""
    x = samples(360, 12.0, seed=21)
    np.savez(tmp_path / "l.npz", x=x, labels=Runner(outlying(tmp_path / "m.onnx")).run({"x": x})["y"].argmax(axis=1))
    return tmp_path / "l.npz"


def searching(max_drop: float, **more: Any) -> Recipe:
    return Recipe(target="npu-int8", tune=Tune(max_drop=max_drop, **more))


def test_a_search_widens_activations_before_it_makes_layers_float(tmp_path: Path, labelled: Path) -> None:
    done = converted(tmp_path, searching(3.0), loud=12.0, validate=labelled, verified=True)
    kept = next(one for one in done.attempts if one.kept)
    assert kept.score.worst <= 3.0
    assert kept.steps > 0
    assert next(one for one in done.attempts if one.steps == kept.steps - 1).score.worst > 3.0
    assert [found.operator for found in done.plan.floats] == ["LayerNormalization"]
    assert "int16" in types_of(done).values()
    assert kept.weight_bytes == 12 * 16 + 16 * 6


def test_a_search_without_wide_activations_has_float_layers(tmp_path: Path, labelled: Path) -> None:
    done = converted(tmp_path, searching(3.0, widen=False), loud=12.0, validate=labelled)
    assert "Gemm" in [found.operator for found in done.plan.floats]
    assert set(types_of(done).values()) == {"int8"}


def test_a_layers_steps_end_in_float_and_those_come_last(
    tmp_path: Path, labelled: Path, orders: list[list[Step]]
) -> None:
    recipe = msgspec.structs.replace(searching(20.0), weight=Weight(bits=4))
    converted(tmp_path, recipe, loud=12.0, validate=labelled)
    passed = {name: [one for one in orders[0] if one.layer == name] for name in ("h_node", "y_node")}
    assert all([one.width for one in steps] == [WIDE, AROUND, FLOAT] for steps in passed.values())
    # Weights of 4 bits to 8; x, h and g, and n and y, of 8 to 16; and weights to float.
    assert [one.cost for one in passed["h_node"]] == [12 * 16 / 2, 12 + 16 + 16, 12 * 16 * 3]
    assert [one.cost for one in passed["y_node"]] == [16 * 6 / 2, 16 + 6, 16 * 6 * 3]
    assert [one.width for one in orders[0]][-2:] == [FLOAT, FLOAT]


@pytest.mark.parametrize(
    ("recipe", "form", "widths"),
    [
        (NPU, "qdq", (WIDE, AROUND, FLOAT)),
        (NPU, "c", (WIDE,)),
        (NPU, "qoperator", (WIDE, FLOAT)),
        (searching(1.0, widen=False), "qdq", (WIDE, FLOAT)),
        (Recipe(target="npu-int16"), "qdq", (WIDE, FLOAT)),
    ],
)
def test_which_widths_a_search_has(recipe: Recipe, form: str, widths: tuple[Width, ...]) -> None:
    assert widths_for(for_form(recipe, form), form, Path("q.onnx")) == widths


def test_a_target_with_a_width_that_it_cannot_have_is_refused(tmp_path: Path) -> None:
    text = (FOLDER / "ort-x86.toml").read_text().replace("symmetric = false\n", "symmetric = false\nwidest = 16\n", 1)
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(RecipeError, match="uint8 and widest = 16"):
        load_target(str(tmp_path / "own.toml"))


def test_a_target_whose_type_does_not_hold_its_bits_is_refused(tmp_path: Path) -> None:
    text = (FOLDER / "ort-x86.toml").read_text().replace("symmetric = false\n", "symmetric = false\nbits = 12\n", 1)
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(RecipeError, match="12 bits, which uint8 does not hold"):
        load_target(str(tmp_path / "t.toml"))
