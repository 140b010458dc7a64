"""What the commands do where all is well: the same bytes, what is printed, the demo, and what is loaded when."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import quantcli
from calibration import statistics
from quantcli import calibrate, convert, demo, read_recipe
from quantcli.cli import run
from quantcli.cli.terminal import console
from tests import graphs
from tests.cli.commands import (
    COMMANDS,
    CONVERT,
    EVAL,
    MODELS,
    PIXELS,
    done,
    normalized,
    outputs,
    pair,
    sha256,
    sqnr,
    strict_json,
)

pytestmark = pytest.mark.usefixtures("here")


def test_converting_from_statistics_and_from_data_is_the_same(here: Path) -> None:
    for folder in ("stats", "data", "api"):
        (here / folder).mkdir()
    data = ["--data", "kit/cal.npz", *PIXELS]
    assert run(["calibrate", "kit/model.onnx", *data, "-o", "s.stats"]) == 0
    assert (
        run(["convert", "kit/model.onnx", "--stats", "s.stats", *data, "--target", "native", "-o", "stats/q.onnx"]) == 0
    )
    assert run(["convert", "kit/model.onnx", *data, "--target", "native", "-o", "data/q.onnx"]) == 0
    recipe = read_recipe(Path("kit/recipe.toml"))
    seen = calibrate("kit/model.onnx", "kit/cal.npz", recipe=recipe)
    convert("kit/model.onnx", "api/q.onnx", seen, "kit/cal.npz", recipe=recipe)
    assert pair("data/q.onnx") == pair("api/q.onnx")
    assert pair("stats/q.onnx") == pair("data/q.onnx")


def test_another_process_writes_the_same_bytes(here: Path) -> None:
    data = ["--data", "kit/cal.npz", *PIXELS, "--samples", "9"]
    command = ["convert", "kit/model.onnx", *data, "--target", "npu-int8", "-o", "q.onnx"]
    assert run(command) == 0
    first = pair("q.onnx")
    for seed in ("1", "2"):
        execute(["-c", "from quantcli.cli import main; main()", *command], here, PYTHONHASHSEED=seed)
        assert pair("q.onnx") == first


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        ("--per-tensor", "[weight]\nper_channel = false"),
        ("--activation-dtype int8", "[activation]\ndtype = 'int8'"),
        ("--activation-dtype int8 --symmetric", "[activation]\ndtype = 'int8'\nsymmetric = true"),
        ("--multiplier-bits 16 --rounding floor", "[multiplier]\nbits = 16\nrounding = 'floor'"),
        ("--exclude op:Gemm --exclude node_conv2d", "[layers]\nexclude = ['op:Gemm', 'node_conv2d']"),
        ("--include op:Conv", "[layers]\ninclude = ['op:Conv']"),
        ("--samples 5 --seed 3", "[calibration]\nsamples = 5\nseed = 3"),
        ("--samples 5 --no-shuffle", "[calibration]\nsamples = 5\nshuffle = false"),
        ("--batch 3 --shuffle", "[calibration]\nbatch = 3\nshuffle = true"),
        ("--target ort-x86", "target = 'ort-x86'"),
        ("--mean 0.5 --scale 0.5", "[preprocess]\nmean = [0.5]\nscale = 0.5"),
    ],
)
def test_flags_and_recipe_ask_for_the_same(here: Path, flags: str, recipe: str) -> None:
    command = ["convert", "kit/model.onnx", "--data", "kit/data.npz", "-o", "q.onnx", "--effort", "fast"]
    (here / "r.toml").write_text(recipe)
    assert run([*command, *flags.split()]) == 0
    by_flags = pair("q.onnx")
    assert run([*command, "--recipe", "r.toml"]) == 0
    assert pair("q.onnx") == by_flags
    assert run(command) == 0
    # The default target is named in the recipe that the sidecar repeats; every other wish differs from the default.
    assert (pair("q.onnx")[1] == by_flags[1]) == (flags == "--target ort-x86")


def test_preprocessing_by_recipe_and_by_flags_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    data, flags, recipe = ["--data", "kit/cal.npz"], PIXELS, ["--recipe", "kit/recipe.toml"]
    for how, output in ((flags, "a.stats"), (recipe, "b.stats")):
        assert run(["calibrate", "kit/model.onnx", *data, *how, "-o", output]) == 0
    assert Path("a.stats").read_bytes() == Path("b.stats").read_bytes()
    capsys.readouterr()
    command = ["eval", "kit/q.onnx", "--float", "kit/model.onnx", "--data", "kit/eval.npz", "--no-latency", "--layers"]
    assert done(capsys, *command, *flags) == done(capsys, *command, *recipe)


def test_flags_go_before_the_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "r.toml").write_text(
        "[calibration]\nsamples = 4\n[preprocess]\nscale = 1.0\nmean = [0.5]\nstd = [0.3081]\nlayout = 'NCHW'\n"
    )
    command = ["calibrate", "kit/model.onnx", "--data", "kit/cal.npz", "--recipe", "r.toml"]
    assert done(capsys, *command, "-o", "a.stats")["samples"] == 4
    flags = ["--samples", "16", "--scale", "0.00392156862745098", "--mean", "0.1307"]
    assert done(capsys, *command, *flags, "-o", "b.stats")["samples"] == 16
    assert Path("b.stats").read_bytes() == Path("kit/s.stats").read_bytes()


def placed(flag: str, command: Sequence[str], before: bool) -> list[str]:
    return [flag, *command] if before else [*command, flag]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "command", [CONVERT, EVAL, ["calibrate", "kit/model.onnx", "--data", "kit/data.npz", "-o", "s"]]
)
def test_how_much_is_said(capsys: pytest.CaptureFixture[str], command: list[str], before: bool) -> None:
    assert run(command) == 0
    usual = capsys.readouterr()
    assert not command[0].startswith("calibrate") or usual.err.startswith(
        "calibrating 4 tensors over 16 samples in batches of 16"
    )
    assert len(usual.err.splitlines()) == (command[0] == "calibrate")
    assert usual.out.strip()
    for flag in ("-q", "--quiet"):
        assert run(placed(flag, command, before)) == 0
        assert capsys.readouterr() == ("", "")
    assert run(placed("--json", command, before)) == 0
    assert isinstance(strict_json(capsys.readouterr().out), dict)
    if command is not EVAL:  # which has no more to say
        for flag in ("-v", "--verbose"):
            assert run(placed(flag, command, before)) == 0
            assert len(capsys.readouterr().out) > len(usual.out)


def test_convert_tells_what_it_wrote(capsys: pytest.CaptureFixture[str]) -> None:
    told = done(capsys, *CONVERT)
    sidecar = strict_json(Path("q.json").read_text())
    assert (told["model"], told["sidecar"]) == ("q.onnx", "q.json")
    assert told["sha256"] == sidecar["model"]["sha256"] == sha256("q.onnx")
    assert told["bytes"] == Path("q.onnx").stat().st_size
    assert told["float_bytes"] == Path("kit/model.onnx").stat().st_size
    assert told["integer_layers"] == len(sidecar["layers"]) == 7
    assert [layer["operator"] for layer in told["float_layers"]] == ["LogSoftmax"]
    assert told["dead_channels"] == {}
    check = told["self_check"]
    assert (check["samples"], check["low"], check["suspects"]) == (4, False, [])
    with np.load("kit/cal.npz") as stored:
        x = normalized(stored["images"][:4])
    assert check["sqnr_db"] == pytest.approx({"log_softmax": sqnr(*(outputs(m, x) for m in MODELS))}, rel=1e-9)


def test_calibrate_tells_what_it_saw(capsys: pytest.CaptureFixture[str]) -> None:
    told = done(capsys, "calibrate", "kit/model.onnx", "--data", "kit/data.npz", "-o", "s.stats")
    held = statistics.load(Path("s.stats"))
    seen = {name: {"minimum": seen.minimum, "maximum": seen.maximum} for name, seen in held.tensors.items()}
    assert told == {
        "statistics": "s.stats",
        "samples": 16,
        "observer": "minmax",
        "synthetic": False,
        "batch": 64,
        "parts": [[0, 16, 16]],
        "model_sha256": sha256("kit/model.onnx"),
        "data_sha256": held.data_sha256,
        "tensors": seen,
    }
    with np.load("kit/data.npz") as stored:
        assert seen["x"] == {"minimum": float(stored["x"].min()), "maximum": float(stored["x"].max())}


def test_dead_channels_are_warned_of_and_refused_by_strict(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = graphs.normal(3, 4, seed=1)
    weight[:, 2] = 0
    graphs.save(
        here / "m.onnx", [graphs.node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 4]}, {"w": weight}
    )
    graphs.data_for(here / "d.npz", x=(3,))
    command = ["convert", "m.onnx", "--data", "d.npz", "-o", "new.onnx", "-q"]
    assert run([*command, "--strict"]) == 5
    assert "dead" in capsys.readouterr().err
    assert not (here / "new.onnx").exists()
    assert run(command) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("warning: ")
    assert captured.err.count("\n") == 1


def test_the_demo_can_be_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    folder = "my demo/deep"  # which a shell wants quoted
    assert run(["demo", "-o", folder]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    made = {file.name: sha256(file) for file in Path(folder).iterdir()}
    inputs = {"lenet.onnx", "calibration.npz", "evaluation.npz", "recipe.toml"}
    assert set(made) == inputs | {"lenet.stats", "lenet.int8.onnx", "lenet.int8.json", "evaluation.json"}
    assert sha256(demo.MODEL) == made["lenet.onnx"]
    report = strict_json((Path(folder) / "evaluation.json").read_text())
    commands = [line.strip() for line in captured.out.splitlines() if line.startswith("  quantcli ")]
    assert commands == report["commands"]
    assert len(commands) == 3
    for name in set(made) - inputs - {"evaluation.json"}:
        (Path(folder) / name).unlink()
    told = {}
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "quantcli"
        told = done(capsys, *arguments)
    assert {file.name: sha256(file) for file in Path(folder).iterdir()} == made
    assert {**told, "latency": None, "commands": commands} == {**report, "latency": None}
    assert (told["metric"], told["samples"], told["verdict"]) == ("top1", 5000, "pass")
    assert told["drop"] <= 0.1


def test_the_demo_speaks_json(capsys: pytest.CaptureFixture[str]) -> None:
    told = done(capsys, "demo", "-o", "demo")
    assert told == strict_json((Path("demo") / "evaluation.json").read_text())
    assert all(command == shlex.join(shlex.split(command)) and "'" not in command for command in told["commands"])


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert quantcli.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", [["--version", "--json"], ["--json", "--version", "targets"]])
def test_the_version_is_told_to_machines(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert run(command) == 0
    assert strict_json(capsys.readouterr().out) == {"quantcli": quantcli.__version__}


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_told(capsys: pytest.CaptureFixture[str], command: list[str], flag: str) -> None:
    assert run([*command, flag]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith(" ".join(["Usage: quantcli", *command]))
    for word in ("--json", "--verbose", "--quiet", *([] if command else [*COMMANDS, "--strict found"])):
        assert word in captured.out


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    captured = capsys.readouterr()
    assert (captured.out + captured.err).startswith("Usage: quantcli")


def execute(arguments: Sequence[str], folder: Path, **environment: str) -> str:
    """Run this Python in a fresh process that is to succeed, and return what it prints."""
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        (["--help"], {"torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "rich", "PIL"}),
        (["convert", "--help"], {"torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "rich", "PIL"}),
        (["--version"], {"torch", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "rich", "PIL"}),
        ([*CONVERT, "-q"], {"torch", "PIL"}),
        ([*EVAL, "--layers", "-q"], {"torch", "PIL"}),
    ],
)
def test_only_what_is_needed_is_loaded(here: Path, command: list[str], absent: set[str]) -> None:
    script = "import sys; from quantcli.cli import run; code = run(sys.argv[1:]); print(); print(code, *sys.modules)"
    code, *modules = execute(["-c", script, *command], here).splitlines()[-1].split()
    assert code == "0"
    assert "click" in modules
    assert absent & set(modules) == set()


@pytest.mark.parametrize(("columns", "most"), [("60", 60), ("200", 200), ("0", 120), ("", 120)])
def test_tables_in_a_file_are_as_wide_as_columns_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str, most: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console.cache_clear()
    assert run(["targets"]) == 0
    console.cache_clear()
    widest = max(map(len, capsys.readouterr().out.splitlines()))
    assert widest == most if most < 200 else 120 < widest <= most


def test_progress_is_drawn_where_someone_is_watching(here: Path) -> None:
    watcher, terminal = pty.openpty()
    script = "from quantcli.cli import main; main()"
    command = [sys.executable, "-c", script, "convert", "kit/model.onnx", "--data", "kit/data.npz", "-o", "q.onnx"]
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    seen = b""
    try:
        while block := os.read(watcher, 4096):
            seen += block
    except OSError:  # how Linux says that the other side is closed
        pass
    finally:
        os.close(watcher)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert b"calibrate" in seen
    assert b"tune 1" in seen
    assert b"\x1b" not in told
    assert b"q.onnx" in told
