"""The fastest of some plans is kept: what is timed, who wins, and what is written then."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from calibration.hooks.onnxruntime import Runner
from quantcli import convert, verify
from quantcli.cli import run
from quantcli.evaluation.check import measured
from quantcli.fold import fold
from quantcli.load import load
from quantcli.recipe import Recipe, Tune
from quantcli.tune.latency import MARGIN, RULE, candidates, runs_of
from tests.graphs import Array, data_for, node, normal, residual_net, save

FASTEST = Recipe(tune=Tune(optimize="latency"))


def clock(*seconds: float) -> Callable[[Sequence[Callable[[], object]]], list[float]]:
    """A timer that runs what it is given once, and tells made-up times."""

    def timer(actions: Sequence[Callable[[], object]]) -> list[float]:
        for action in actions:
            action()
        return list(seconds[: len(actions)])

    return timer


def test_first_and_depthwise_convolutions_are_tried(tmp_path: Path) -> None:
    found = candidates(fold(load(residual_net(tmp_path / "m.onnx")).graph), Recipe())
    assert found == {
        RULE: (),
        "first convolutions in float": ("c1_node",),
        "depthwise convolutions in float": ("c2_node",),
        "first and depthwise convolutions in float": ("c1_node", "c2_node"),
    }


def test_the_first_convolutions_are_tried_together(tmp_path: Path) -> None:
    nodes = [node("Conv", [f"t{n}", "w"], [f"t{n + 1}"]) for n in range(5)]
    path = save(tmp_path / "m.onnx", nodes, {"t0": ["N", 4, 8, 8]}, {"t5": None}, {"w": normal(4, 4, 1, 1)})
    found = candidates(fold(load(path).graph), Recipe())
    names = [f"t{n + 1}_node" for n in range(5)]
    assert found == {
        RULE: (),
        "first convolutions in float": (names[0],),
        "the first 2 convolutions in float": tuple(names[:2]),
        "the first 3 convolutions in float": tuple(names[:3]),
        "the first 4 convolutions in float": tuple(names[:4]),
    }


def test_a_convolution_behind_a_moved_input_is_a_first_one(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
        node("Conv", ["t", "w"], ["c"]),
        node("Conv", ["c", "v"], ["y"]),
    ]
    constants = {"w": normal(4, 3, 3, 3), "v": normal(2, 4, 1, 1)}
    path = save(tmp_path / "m.onnx", nodes, {"x": ["N", 8, 8, 3]}, {"y": None}, constants)
    found = candidates(fold(load(path).graph), Recipe())
    assert found["first convolutions in float"] == ("c_node",)


@pytest.mark.parametrize(
    ("seconds", "floats"),
    [
        ((0.004, 0.003, 0.005, 0.006), {"c1_node"}),
        ((0.004, 0.006, 0.005, 0.002), {"c1_node", "c2_node"}),
        ((0.004, 0.004 * (1 - MARGIN / 2), 0.006, 0.006), set()),  # within the noise: the rules stand
    ],
)
def test_the_fastest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], floats: set[str]
) -> None:
    path, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    monkeypatch.setattr("quantcli.tune.latency.timed.__defaults__", (clock(*seconds),))
    done = convert(path, tmp_path / "q.onnx", data=data, recipe=FASTEST, verified=True)
    assert [trial.seconds for trial in done.trials] == list(seconds)
    assert {name for trial in done.trials if trial.kept for name in trial.layers} == floats
    reasons = {found.name: found.reason for found in done.plan.floats}
    assert floats <= set(reasons)
    for name in floats:
        assert f"({min(seconds) * 1e3:.3f} ms for the model, {seconds[0] * 1e3:.3f} ms otherwise)" in reasons[name]
    assert verify(done.sidecar_path, data).findings == []
    assert np.isfinite(list(done.check.sqnr.values())).all()


def test_the_command_shows_every_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    command = ["convert", str(path), "--data", str(data), "-o", str(tmp_path / "q.onnx"), "--optimize", "latency"]
    assert run(command) == 0
    told = capsys.readouterr().out
    assert told.count("timed ") == 4
    assert told.count("(kept)") == 1
    assert run([*command, "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert trials[0]["name"] == RULE
    assert all(trial["seconds"] > 0 for trial in trials)


@pytest.mark.parametrize(("speed", "warned"), [(0.6, True), (1.4, False), (None, False)])
def test_a_model_that_runs_slower_than_float_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    speed: float | None,
    warned: bool,
) -> None:
    path, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    monkeypatch.setattr("quantcli.evaluation.check.measured", lambda *_: speed)
    assert run(["convert", str(path), "--data", str(data), "-o", str(tmp_path / "q.onnx")]) == 0
    told = capsys.readouterr()
    assert ("0.60 times float's speed" in told.err) == warned
    assert ("speed: about" in told.out) == (speed is not None)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--effort", "fast"], "on one thread of this machine; --optimize latency looks for a faster plan"),
        (["--effort", "fast", "--optimize", "latency"], "on one thread of this machine\n"),
        (["--mode", "dynamic", "--include", "op:Conv"], "on one thread of this machine\n"),
        (["--mode", "weights", "--include", "op:Conv"], "on one thread of this machine\n"),
    ],
)
def test_a_faster_plan_is_looked_for_where_none_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    told: str,
) -> None:
    path, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    monkeypatch.setattr("quantcli.evaluation.check.measured", lambda *_: 0.6)
    assert run(["convert", str(path), "--data", str(data), "-o", str(tmp_path / "q.onnx"), *options]) == 0
    assert f"it runs at 0.60 times float's speed {told}" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "rows"), [("N", 1), (2, 2)])
def test_the_speed_is_that_of_one_sample_or_of_the_models_batch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    batch: int | str,
    rows: int,
) -> None:
    nodes, constants = [node("Conv", ["x", "w"], ["y"])], {"w": normal(4, 3, 3, 3)}
    path = save(tmp_path / "m.onnx", nodes, {"x": [batch, 3, 8, 8]}, {"y": None}, constants)
    run_with: list[int] = []

    def measure(reference: Runner, quantized: Runner, feeds: dict[str, Array]) -> float:
        assert (reference.threads, quantized.threads) == (1, 1)
        run_with.append(len(feeds["x"]))
        return 1.5

    monkeypatch.setattr("quantcli.evaluation.check.measured", measure)
    assert run(["convert", str(path), "--data", str(data_for(tmp_path / "d.npz")), "-o", str(tmp_path / "q.onnx")]) == 0
    assert run_with == [rows]
    assert (
        f"speed: about 1.50 times float's, {rows} sample{'s' * (rows > 1)} at once on one thread"
        in capsys.readouterr().out
    )


def test_nothing_is_told_of_the_speed_of_what_is_meant_to_run_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz")
    monkeypatch.setattr("quantcli.evaluation.check.measured", lambda *_: 0.6)
    command = ["convert", str(path), "--data", str(data), "-o", str(tmp_path / "q.onnx"), "--target", "npu-int8"]
    assert run(command) == 0
    told = capsys.readouterr()
    assert "speed" not in told.out + told.err
    assert "self-check" in told.out


class Timed:
    """What takes as long as it is said to, on a clock of its own."""

    def __init__(self, clock: list[float], seconds: list[float]) -> None:
        self.clock, self.seconds, self.runs = clock, seconds, 0

    def run(self, feeds: object) -> None:
        del feeds
        self.runs += 1
        self.clock[0] += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]


@pytest.mark.parametrize(
    ("quantized", "speed", "runs"),
    [
        ([0.01], 2.0, 8),  # fast at the first look
        ([0.04] * 8 + [0.01], 2.0, 40),  # disturbed while that lasted
        ([0.04], 0.5, 8 + 17),  # slow, for longer than a second, too
    ],
)
def test_a_model_is_slow_where_a_second_look_says_so(
    monkeypatch: pytest.MonkeyPatch, quantized: list[float], speed: float, runs: int
) -> None:
    clock = [0.0]
    monkeypatch.setattr("quantcli.evaluation.check.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("quantcli.evaluation.check.LOOKS", ((1e9, 8), (1.0, 40)))
    reference, other = Timed(clock, [0.02]), Timed(clock, quantized)
    assert measured(reference, other, {}) == pytest.approx(speed)  # type: ignore[arg-type]
    assert other.runs == runs


def test_the_speed_of_what_takes_no_time_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("quantcli.evaluation.check.time.perf_counter", lambda: clock[0])
    assert measured(Timed(clock, [1e-5]), Timed(clock, [1e-5]), {}) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch", "rows"), [("N", 1), (4, 4)])
def test_plans_are_timed_on_one_sample_or_on_the_models_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int | str, rows: int
) -> None:
    model = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], {"x": [batch, 3]}, {"y": None}, {}).read_bytes()
    run_with: list[int] = []
    monkeypatch.setattr(Runner, "run", lambda _self, feeds: run_with.append(len(feeds["x"])))
    for action in runs_of([model, model], {"x": normal(4, 3)}, 1):
        action()
    assert run_with == [rows, rows]
