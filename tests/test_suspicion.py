"""What can hardly be meant is said where it arises, and what the runtime does not show."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from quantcli.cli import run
from quantcli.targets import FOLDER
from quantcli.tune.trying import Trying
from tests.graphs import node, normal, residual_net, save


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    residual_net(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=normal(16, 3, 8, 8, seed=9))
    return tmp_path


def test_samples_that_are_all_alike(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(here / "same.npz", x=np.full((16, 3, 8, 8), 0.5, dtype=np.float32))
    told = "every value of every calibration sample is the same ('x' 0.5), so the ranges say nothing of real data"
    assert run(["calibrate", "m.onnx", "--data", "same.npz", "-o", "s.qstats"]) == 0
    assert capsys.readouterr().err.count(told) == 1
    for data in ("--data same.npz", "--stats s.qstats"):
        assert run(f"convert m.onnx {data} -o q.onnx".split()) == 0
        assert capsys.readouterr().err.count(told) == 1
        assert run(f"convert m.onnx {data} --strict -o strict.onnx".split()) == 5
        assert told in capsys.readouterr().err
        assert not (here / "strict.onnx").exists()
    stored = np.full((16, 3, 8, 8), 0.5, dtype=np.float32)
    stored[7, 1, 2, 3] = 0.25
    np.savez(here / "same.npz", x=stored)
    assert run(["convert", "m.onnx", "--data", "same.npz", "--strict", "-o", "strict.onnx"]) == 0
    assert "the same" not in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_weight_is_named_and_not_what_came_of_it(
    here: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    weight = normal(4, 3, 3, 3, seed=1)
    weight[1, 2, 0, 0] = value
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Relu", ["c"], ["r"]), node("Conv", ["r", "v"], ["y"])]
    constants = {"w": weight, "v": normal(2, 4, 1, 1, seed=2)}
    save(here / "bad.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, constants)
    assert run(["convert", "bad.onnx", "--data", "d.npz", "-o", "q.onnx"]) == 1
    assert capsys.readouterr().err == (
        "error: the weight 'w' holds 1 of 108 values that are not finite; export it again\n"
    )
    assert not (here / "q.onnx").exists()


def test_two_tensors_of_one_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(here / "m.onnx")
    model.graph.node[1].output[0] = model.graph.node[0].output[0]
    onnx.save(model, here / "twice.onnx")
    assert run(["convert", "twice.onnx", "--data", "d.npz", "-o", "q.onnx"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ONNX Runtime refuses twice.onnx (")
    assert f"({model.graph.node[0].output[0]})" in told


def test_tuning_that_fails_is_left_out_and_refused_where_that_is_asked(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("as it happens")

    monkeypatch.setattr(Trying, "made", broken)
    told = "failed and is left out: as it happens"
    assert run(["convert", "m.onnx", "--data", "d.npz", "-o", "q.onnx"]) == 0
    assert "warning: tuning (" in (said := capsys.readouterr().err)
    assert told in said
    assert run(["convert", "m.onnx", "--data", "d.npz", "--strict", "-o", "strict.onnx"]) == 5
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (here / "strict.onnx").exists()


def test_a_request_to_end_is_told_of(here: Path) -> None:
    np.savez(here / "many.npz", x=normal(4000, 3, 8, 8, seed=9))
    command = [sys.executable, "-m", "quantcli", "convert", "m.onnx", "--data", "many.npz", "--effort", "best"]
    process = subprocess.Popen([*command, "-v", "-o", "q.onnx"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # it is at work
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    told = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert told.splitlines()[-1] == "error: ended by SIGTERM; nothing was written"
    assert sorted(file.name for file in here.iterdir()) == ["d.npz", "m.onnx", "many.npz"]


# ---- what ONNX Runtime does not show --------------------------------------------------------------------------------------------

TARGET = (
    (FOLDER / "npu-int8.toml").read_text().partition("[multiplier]")[0]
    + """
[multiplier]
bits = 32
rounding = "{rounding}"
{shifts}
"""
)


def test_arithmetic_that_the_runtime_does_not_show_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert = "convert m.onnx --data d.npz --effort fast --target mine.toml"

    def told(rounding: str, shifts: str, more: str = "", code: int = 0) -> str:
        (here / "mine.toml").write_text(TARGET.format(rounding=rounding, shifts=shifts))
        assert run(f"{convert} {more} -o q.onnx".split()) == code
        return capsys.readouterr().err

    assert "warning" not in told("single", "shifts = [0, 62]")
    assert "layers drop bits (rounding floor) where ONNX Runtime" in told("floor", "")
    assert "need a shift outside the target's 0 … 15" in told("single", "shifts = [0, 15]")
    (here / "q.onnx").unlink()
    assert "need a shift outside the target's 0 … 15" in told("single", "shifts = [0, 15]", "--strict", 5)
    assert not (here / "q.onnx").exists()
    assert "shifts from 15 to 0; give the lowest first" in told("single", "shifts = [15, 0]", code=2)


def test_wishes_that_would_be_passed_over_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "m.onnx", "--data", "d.npz", "--block-size", "32", "-o", "q.onnx"]) == 2
    assert "--block-size has no meaning in --mode static" in capsys.readouterr().err
    (here / "wide.toml").write_text("[tune]\nwiden = true\n")
    convert = "convert m.onnx --data d.npz --target npu-int8 --recipe wide.toml"
    assert run(f"{convert} --format c -o c".split()) == 2
    assert "--format c has one width for all" in capsys.readouterr().err
