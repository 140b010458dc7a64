"""The precision search: it keeps its promise, takes no more than it needs, goes on where it was, and says when it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from calibration.errors import DataError
from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, decision, fold, verify
from quantcli.cli import main
from quantcli.errors import ModelError, PlanError, UsageError
from quantcli.observation import Run
from quantcli.recipe import Tune, Weight
from quantcli.review import lint
from quantcli.targets import load_target
from quantcli.tune.latency import beside
from quantcli.tune.score import Score
from quantcli.tune.search import Search
from quantcli.tune.wide import OPSET
from quantcli.tune.widths import (
    AROUND,
    FLOAT,
    STORED,
    WIDE,
    WIDEST,
    Step,
    Width,
    bytes_between,
    seconds_between,
)
from tests.graphs import data_for, node, normal, residual_net, save


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return residual_net(tmp_path / "net.onnx")


@pytest.fixture
def labelled(tmp_path: Path, model: Path) -> Path:
    """Samples whose labels are what the float model says: every change of mind is a drop."""
    x = normal(300, 3, 8, 8, seed=21) + 3 * normal(300, 3, 1, 1, seed=22)  # so that the classes differ
    scores = Runner(model).run({"x": x})["y"]
    path = tmp_path / "labelled.npz"
    np.savez(path, x=x, labels=scores.argmax(axis=1))
    return path


def spread_data(path: Path, samples: int) -> Path:
    np.savez(path, x=normal(samples, 3, 8, 8, seed=31) + 3 * normal(samples, 3, 1, 1, seed=32))
    return path


def searching(max_drop: float, bits: int = 2) -> Recipe:
    return Recipe(weight=Weight(bits=bits), tune=Tune(max_drop=max_drop))


def test_it_raises_as_few_layers_as_the_metric_needs(tmp_path: Path, model: Path, labelled: Path) -> None:
    data = spread_data(tmp_path / "d.npz", 48)
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=searching(4.0), validate=labelled, verified=True)
    kept = next(one for one in done.attempts if one.kept)
    assert kept.score.worst <= 4.0
    assert kept.steps > 0
    # The next shorter beginning of the order was tried, and does not keep it.
    shorter = next(one for one in done.attempts if one.steps == kept.steps - 1)
    assert shorter.score.worst > 4.0
    assert kept.weight_bytes > shorter.weight_bytes
    # What was promised is what is in the file.
    arrays = dict(np.load(labelled))
    found = Runner(done.model).run({"x": arrays["x"]})["y"].argmax(axis=1)
    wrong = found != arrays["labels"]
    held = np.arange(300) % 3 == 2
    assert kept.score.drop == pytest.approx(100 * wrong[~held].mean())
    assert kept.held.drop == pytest.approx(100 * wrong[held].mean())
    assert kept.held.drop <= 4.0
    assert verify(done.sidecar_path, data).findings == []
    weights = [entry for entry in done.sidecar.tensors.values() if entry.role == "weight"]
    assert {8 if entry.grids is None else entry.grids.bits for entry in weights} == {2, 8}
    assert {entry.qmax for entry in weights if entry.grids is None} == {127}
    assert not (tmp_path / "q.onnx.search").exists()


def test_nothing_is_raised_where_nothing_needs_it(tmp_path: Path, model: Path, labelled: Path) -> None:
    done = convert(
        model, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=searching(100.0, 8), validate=labelled
    )
    assert [(one.steps, one.kept) for one in done.attempts] == [(0, True)]


def test_it_goes_on_where_it_was(
    tmp_path: Path, model: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = spread_data(tmp_path / "d.npz", 32)
    command = f"convert {model} --data {data} --weight-bits 2 --max-drop 4 --validate {labelled} --json"

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as end:
            main([*command.split(), *more])
        return int(end.value.code or 0)

    assert run("-o", str(tmp_path / "a.onnx")) == 0
    whole = json.loads(capsys.readouterr().out)
    made: list[object] = []
    tuned = Search.tuned

    def cut_off(self: Search, steps: object) -> object:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(steps)
        return tuned(self, steps)  # type: ignore[arg-type]

    monkeypatch.setattr(Search, "tuned", cut_off)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([*command.split(), "-o", str(tmp_path / "b.onnx")])
    capsys.readouterr()
    assert len((tmp_path / "b.onnx.search").read_text().splitlines()) == 2
    made.clear()

    def counted(self: Search, steps: object) -> object:
        made.append(steps)
        return tuned(self, steps)  # type: ignore[arg-type]

    monkeypatch.setattr(Search, "tuned", counted)
    assert run("-o", str(tmp_path / "b.onnx"), "--resume") == 0
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["attempts"] == whole["attempts"]
    # The two that were written down are not made again, but for the kept one.
    assert len(made) <= len(whole["attempts"]) - 1
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_bad_requests(tmp_path: Path, model: Path, labelled: Path) -> None:
    data = data_for(tmp_path / "d.npz")
    with pytest.raises(DataError, match="needs labels"):
        convert(model, tmp_path / "q.onnx", data=data, recipe=searching(1.0))
    arrays = dict(np.load(labelled))
    np.savez(tmp_path / "few.npz", x=arrays["x"][:46], labels=arrays["labels"][:46])
    with pytest.raises(DataError, match=r"46 samples are too few to judge by.*at least 32 have to be left") as few:
        convert(model, tmp_path / "q.onnx", data=data, recipe=searching(0.1), validate=tmp_path / "few.npz")
    assert few.value.remedy == "give at least 48 (--validate)"
    with pytest.raises(UsageError, match="--mode weights"):
        convert(model, tmp_path / "q.onnx", recipe=Recipe(mode="weights", tune=Tune(max_drop=1.0)))
    with pytest.raises(UsageError, match="labelled data"):
        convert(model, tmp_path / "q.onnx", synthetic=8, recipe=searching(1.0))


@pytest.mark.parametrize(("enough", "wanted"), [(2, 2), (3, 5), (5, 5), (100, None)])
def test_what_was_lucky_is_not_kept(
    tmp_path: Path, model: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, enough: int, wanted: int | None
) -> None:
    """Two steps are enough where it searches; on what was held back more are."""
    fine, lost = Score(90.0, 90.0, 200, 0), Score(80.0, 90.0, 100, 10)
    asked: list[int] = []
    tuned = Search.tuned

    def counted(self: Search, steps: Sequence[Step]) -> Any:
        asked.append(len(steps))
        return tuned(self, steps)

    def score(_: bytes) -> tuple[Score, Score]:
        return fine if asked[-1] >= 2 else lost, fine if asked[-1] >= enough else lost

    monkeypatch.setattr(Search, "tuned", counted)
    monkeypatch.setattr(decision, "scorer", lambda *_: (score, "digest"))
    recipe = Recipe(weight=Weight(bits=2), tune=Tune(effort="fast", max_drop=1.0))
    data = data_for(tmp_path / "d.npz")
    if wanted is None:
        with pytest.raises(PlanError, match="held back"):
            convert(model, tmp_path / "q.onnx", data=data, recipe=recipe, validate=labelled)
        return
    done = convert(model, tmp_path / "q.onnx", data=data, recipe=recipe, validate=labelled)
    kept = next(one for one in done.attempts if one.kept)
    assert kept.steps == wanted
    assert kept.held.drop == 0.0


def convolutions(path: Path, first: NDArray[np.float32], second: NDArray[np.float32], side: int) -> Path:
    """Write two convolutions with a Relu between them, over images of three channels."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "w2"], ["c"]),
        node("GlobalAveragePool", ["c"], ["d"]),
        node("Flatten", ["d"], ["y"]),
    ]
    weights = {"w1": first, "w2": second}
    return save(path, nodes, {"x": ["n", 3, side, side]}, {"y": ["n", len(second)]}, weights)


def test_what_begins_in_float_does_not_become_integer_where_all_else_becomes_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is all beginning would have that in integers, as far as they go: no step raises it."""
    model = convolutions(tmp_path / "m.onnx", normal(8, 3, 3, 3, seed=1), normal(4, 8, 1, 1, seed=2), 40)
    x = normal(8, 3, 40, 40, seed=3)
    np.savez(tmp_path / "d.npz", x=x, labels=np.zeros(8, np.int64))
    real = False
    tuned = Search.tuned

    def noted(self: Search, steps: Sequence[Step]) -> Any:
        nonlocal real
        real = any(step.width.real for step in steps)
        return tuned(self, steps)

    def score(_: bytes) -> tuple[Score, Score]:
        one = Score(90.0 if real else 10.0, 90.0, 200, 0 if real else 160)
        return one, one

    monkeypatch.setattr(Search, "tuned", noted)
    monkeypatch.setattr(decision, "scorer", lambda *_: (score, "digest"))
    recipe = Recipe(weight=Weight(bits=2), tune=Tune(effort="fast", max_drop=1.0))
    done = convert(model, tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=recipe, validate=tmp_path / "d.npz")
    assert [layer.name for layer in done.plan.layers if layer.operator == "Conv"] == [
        "c_node"
    ]  # its weights are stored
    assert np.abs(Runner(done.model).run({"x": x})["y"] - Runner(model).run({"x": x})["y"]).max() < 1e-2


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """A network whose first layer has much larger weights for an input channel that holds nothing."""
    rng = np.random.default_rng(7)
    first, second = rng.normal(size=(8, 3, 3, 3)) / 5, rng.normal(size=(8, 8, 1, 1)) / 3
    first[:, 0] *= 400
    return convolutions(tmp_path / "uneven.onnx", first.astype(np.float32), second.astype(np.float32), 8)


@pytest.fixture
def uneven_data(tmp_path: Path, uneven: Path) -> Path:
    x = normal(300, 3, 8, 8, seed=21) + 3 * normal(300, 3, 1, 1, seed=22)
    x[:, 0] = 0
    path = tmp_path / "uneven.npz"
    np.savez(path, x=x, labels=Runner(uneven).run({"x": x})["y"].argmax(axis=1))
    return path


def of_one_scale(target: str, bits: int = 8) -> Recipe:
    """One scale per tensor, which uneven weights need more than 8 bits for."""
    tune = Tune(effort="fast", max_drop=5.0)
    return Recipe(target=target, weight=Weight(per_channel=False, bits=bits), tune=tune)


def test_a_layer_is_raised_to_sixteen_bits(tmp_path: Path, uneven: Path, uneven_data: Path) -> None:
    done = convert(uneven, tmp_path / "q.onnx", data=uneven_data, recipe=of_one_scale("ort-x86"), verified=True)
    entry = done.sidecar.tensors["w1"]
    assert (entry.dtype, entry.qmin, entry.qmax) == ("int16", -32767, 32767)
    assert done.sidecar.tensors["w2"].dtype == "int8"
    assert next(one for one in done.attempts if one.kept).weight_bytes == 2 * 8 * 3 * 3 * 3 + 8 * 8
    written = onnx.load(done.model)
    onnx.checker.check_model(written)
    assert [one.version for one in written.opset_import if one.domain == ""] == [21]
    kinds = {one.name: one.data_type for one in written.graph.initializer}
    assert kinds[entry.integers] == onnx.TensorProto.INT16
    arrays = dict(np.load(uneven_data))
    found = Runner(done.model).run({"x": arrays["x"]})["y"].argmax(axis=1)
    assert (found != arrays["labels"]).mean() < 0.05
    assert lint(done.sidecar, load_target("ort-x86"), {}) == []
    reasons = [refusal.reason for refusal in lint(done.sidecar, load_target("npu-int8"), {})]
    assert "'w1' reaches 32767, the target's weights have 8 bits" in reasons


@pytest.mark.parametrize(("target", "form"), [("npu-int8", "qdq"), ("ort-x86", "qoperator")])
def test_where_there_are_no_such_weights_none_is_made(
    tmp_path: Path, uneven: Path, uneven_data: Path, target: str, form: str
) -> None:
    done = convert(uneven, tmp_path / "q.onnx", data=uneven_data, recipe=of_one_scale(target), form=form)
    assert {entry.dtype for entry in done.sidecar.tensors.values() if entry.role == "weight"} == {"int8"}
    assert "a_node" not in [entry.name for entry in done.sidecar.layers]  # float is what is left


def refused(_: ir.Model, __: int) -> None:
    raise ModelError("it cannot be lifted")


def renamed(model: ir.Model, needed: int) -> None:
    model.opset_imports[""] = needed
    model.graph[0].outputs[0].name = "another"


@pytest.mark.parametrize("lifted", [refused, renamed])
def test_a_model_that_cannot_have_such_weights_has_a_float_layer(
    tmp_path: Path, uneven: Path, uneven_data: Path, monkeypatch: pytest.MonkeyPatch, lifted: Callable[..., None]
) -> None:
    lift = fold.lift_opset

    def only_to_the_widest(model: ir.Model, needed: int) -> None:
        (lifted if needed == OPSET else lift)(model, needed)

    monkeypatch.setattr("quantcli.fold.lift_opset", only_to_the_widest)
    done = convert(uneven, tmp_path / "q.onnx", data=uneven_data, recipe=of_one_scale("ort-x86"), verified=True)
    assert "a_node" in [entry.name for entry in done.plan.floats]
    assert {entry.dtype for entry in done.sidecar.tensors.values() if entry.role == "weight"} == {"int8"}


def test_c_source_has_integers_alone_and_so_has_its_search(tmp_path: Path, model: Path, labelled: Path) -> None:
    data = spread_data(tmp_path / "d.npz", 48)
    recipe = Recipe(weight=Weight(bits=2), tune=Tune(max_drop=4.0))
    done = convert(model, tmp_path / "q", data=data, recipe=recipe, validate=labelled, form="c")
    kept = next(one for one in done.attempts if one.kept)
    assert kept.steps > 0
    assert not done.plan.floats
    with pytest.raises(PlanError, match="no widths keep the drop"):
        convert(model, tmp_path / "r", data=data, recipe=searching(0.83), validate=labelled, form="c")


def test_every_layer_passes_its_widths_in_order(
    tmp_path: Path, uneven: Path, uneven_data: Path, orders: list[list[Step]]
) -> None:
    convert(uneven, tmp_path / "q.onnx", data=uneven_data, recipe=of_one_scale("ort-x86", bits=4))
    passed: dict[str, list[Width]] = {}
    for step in orders[0]:
        passed.setdefault(step.layer, []).append(step.width)
    assert passed["a_node"] == [WIDE, WIDEST, STORED, FLOAT]
    assert all(widths in ([WIDE, WIDEST, STORED, FLOAT], [WIDE, STORED, FLOAT]) for widths in passed.values())
    # 4 bits to 16, as if to 32 for computing in float, and to 32.
    assert sum(step.cost for step in orders[0] if step.layer == "a_node") == 8 * 3 * 3 * 3 * (1.5 + 2 + 2)
    floats = [step.width == FLOAT for step in orders[0]]
    assert floats == sorted(floats)


def test_bytes_and_seconds_of_steps() -> None:
    around = AROUND.around
    assert (WIDE, AROUND, around) == (Width(8), Width(8, around=16), 16)
    assert bytes_between(Width(4), WIDE, 100, 10) == 50
    assert bytes_between(WIDE, AROUND, 100, 10) == 10
    assert bytes_between(WIDE, STORED, 100, 10) == bytes_between(WIDE, FLOAT, 100, 10) == 300
    assert bytes_between(WIDE, FLOAT, 0, 0) == 1
    spent = {WIDE: 1.0, WIDEST: 1.75, FLOAT: 1.25}
    assert seconds_between(Width(4), WIDE, spent, 1e-3) == 1e-3
    assert seconds_between(WIDE, WIDEST, spent, 1e-3) == 0.75
    assert seconds_between(WIDE, STORED, spent, 1e-3) == seconds_between(WIDE, FLOAT, spent, 1e-3) == 0.25
    assert seconds_between(WIDEST, FLOAT, spent, 1e-3) == 1e-3  # faster, which is no reason to be wide


def slower_by(seconds: dict[str, float]) -> Callable[..., tuple[float, list[float]]]:
    """Return what stands for timing: a run takes a second, and so much more with a layer in float."""

    def told(base: bytes, others: Sequence[bytes], *_: object) -> tuple[float, list[float]]:
        def floats(model: bytes) -> set[str]:
            nodes = onnx.load_from_string(model).graph.node
            made = {name for one in nodes if one.op_type == "DequantizeLinear" for name in one.output}
            return {one.name for one in nodes if one.name in seconds and one.input[1] not in made}

        more = [sum(seconds[name] for name in floats(other) - floats(base)) for other in others]
        return 1.0, more

    return told


def test_what_takes_least_time_is_raised_first(
    tmp_path: Path, model: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, orders: list[list[Step]]
) -> None:
    names = [one.name for one in onnx.load(model).graph.node if one.op_type == "Conv"]
    data = spread_data(tmp_path / "d.npz", 48)
    for slow in names[:2]:
        monkeypatch.setattr("quantcli.tune.search.beside", slower_by({name: 0.9 * (name == slow) for name in names}))
        recipe = Recipe(weight=Weight(bits=8), tune=Tune(effort="fast", max_drop=100.0, cost="latency"))
        done = convert(model, tmp_path / "q.onnx", data=data, recipe=recipe, validate=labelled)
        assert [one.seconds for one in done.attempts] == [1.0]
        costs = {(step.layer, step.width): step.cost for step in orders[-1]}
        assert {name: costs[name, STORED] for name in names} == {
            name: pytest.approx(0.9 if name == slow else 1e-3) for name in names
        }
        floats = [step for step in orders[-1] if step.width != FLOAT]
        rates = [step.rate for step in floats]
        assert rates == sorted(rates, reverse=True)


def test_times_are_written_down_and_not_measured_again(
    tmp_path: Path, model: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = spread_data(tmp_path / "d.npz", 32)
    command = f"convert {model} --data {data} --max-drop 4 --cost latency --effort fast --validate {labelled} --json"
    calls: list[int] = []

    def cut_off(base: bytes, others: Sequence[bytes], *rest: Any) -> tuple[float, list[float]]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(others))
        return beside(base, others, *rest)

    monkeypatch.setattr("quantcli.tune.search.beside", cut_off)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([*command.split(), "-o", str(tmp_path / "a.onnx")])
    capsys.readouterr()
    lines = [json.loads(line) for line in (tmp_path / "a.onnx.search").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"digest", "layer", "widths", "seconds"}] * 2
    # A line of something else, and one that was cut off.
    with (tmp_path / "a.onnx.search").open("a") as file:
        file.write('[1, 2]\n{"digest": "x", "attempt"')

    def counted(base: bytes, others: Sequence[bytes], *rest: Any) -> tuple[float, list[float]]:
        calls.append(len(others))
        return beside(base, others, *rest)

    monkeypatch.setattr("quantcli.tune.search.beside", counted)
    calls.clear()
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "-o", str(tmp_path / "a.onnx"), "--resume"])
    assert not end.value.code
    printed = json.loads(capsys.readouterr().out)
    layers = sum(one.op_type in {"Conv", "Gemm", "MatMul"} for one in onnx.load(model).graph.node)
    assert sum(others > 0 for others in calls) == layers - 2
    assert all(one["seconds"] > 0 for one in printed["attempts"])


def test_what_cannot_be_timed_is_refused(tmp_path: Path, model: Path, labelled: Path) -> None:
    def told(recipe: Recipe, **more: Any) -> str:
        with pytest.raises(UsageError) as error:
            convert(model, tmp_path / "q.onnx", data=labelled, recipe=recipe, **more)
        return str(error.value)

    assert "--validate judges a search, and there is none" in told(Recipe(), validate=labelled)
    assert "--resume goes on with a search, and there is none" in told(Recipe(), run=Run(resume=True))
    timed = Tune(max_drop=1.0, cost="latency")
    assert "there is no --max-drop" in told(Recipe(tune=Tune(cost="bytes")))
    assert "models for npu-int8 do not run there" in told(Recipe(target="npu-int8", tune=timed))
    with pytest.raises(UsageError, match="C source does not run there"):
        convert(model, tmp_path / "q", data=labelled, recipe=Recipe(tune=timed), form="c")
