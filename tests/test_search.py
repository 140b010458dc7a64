"""The precision search: it keeps its promise, takes no more than it needs, goes on where it was, and says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calibration.errors import DataError
from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.cli import main
from quantcli.errors import PlanError, UsageError
from quantcli.recipe import Tune, Weight
from quantcli.tune.search import Score, Search
from tests.graphs import data_for, normal, residual_net


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
    assert kept.score.drop == pytest.approx(100 * (found != arrays["labels"]).mean())
    assert verify(done.sidecar_path, data).findings == []
    widths = {entry.qmax for entry in done.sidecar.tensors.values() if entry.role == "weight"}
    assert widths <= {1, 127}
    assert not (tmp_path / "q.onnx.search").exists()


def test_nothing_is_raised_where_nothing_needs_it(tmp_path: Path, model: Path, labelled: Path) -> None:
    done = convert(
        model, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=searching(100.0, 8), validate=labelled
    )
    assert [(one.steps, one.kept) for one in done.attempts] == [(0, True)]


def test_a_promise_that_cannot_be_kept_is_not_made(tmp_path: Path, model: Path, labelled: Path) -> None:
    arrays = dict(np.load(labelled))
    np.savez(
        labelled, x=arrays["x"], labels=(arrays["labels"] + np.arange(300) % 2) % 10
    )  # half of them are wrong in float
    with pytest.raises(PlanError, match="standard error"):
        convert(model, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"), recipe=searching(0.0), validate=labelled)
    assert not (tmp_path / "q.onnx").exists()


def test_it_goes_on_where_it_was(
    tmp_path: Path, model: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = spread_data(tmp_path / "d.npz", 32)
    command = f"convert {model} --data {data} --weight-bits 2 --max-drop 8 --validate {labelled} --json"

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


def test_bad_requests(tmp_path: Path, model: Path) -> None:
    data = data_for(tmp_path / "d.npz")
    with pytest.raises(DataError, match="needs labels"):
        convert(model, tmp_path / "q.onnx", data=data, recipe=searching(1.0))
    with pytest.raises(UsageError, match="--mode weights"):
        convert(model, tmp_path / "q.onnx", recipe=Recipe(mode="weights", tune=Tune(max_drop=1.0)))
    with pytest.raises(UsageError, match="labelled data"):
        convert(model, tmp_path / "q.onnx", synthetic=8, recipe=searching(1.0))


def test_a_scores_uncertainty_is_that_of_paired_differences() -> None:
    score = Score(90.0, 91.0, 400, 16)
    assert score.drop == 1.0
    assert score.uncertainty == 1.0
    assert score.worst == 2.0
