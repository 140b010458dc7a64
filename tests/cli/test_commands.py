"""What the commands do where all is well, and that the Python API does the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

import quantcli
from calibration import statistics
from calibration.datasets import Preprocess, Selection
from quantcli import Run, calibrate, convert, demo, evaluate, read_recipe, verify, verify_c
from quantcli.cli import run
from quantcli.errors import ModelError, PlanError, UsageError
from quantcli.recipe import Activation, Tune
from tests import graphs

PIXELS = ["--scale", "0.00392156862745098", "--mean", "0.1307", "--std", "0.3081", "--layout", "NCHW"]
COMMANDS = ["calibrate", "convert", "eval", "demo"]
# What eval prints, but for the latency, which differs from run to run.
FIELDS = [
    "metric",
    "samples",
    "quantized",
    "float",
    "drop",
    "sqnr_db",
    "bytes",
    "memory",
    "float_bytes",
    "latency",
    "kernels",
    "layers",
]


def normalized(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what PIXELS asks for, every operation in float32."""
    scaled = images.astype(np.float32)[:, None] * np.float32(0.00392156862745098)
    return np.asarray((scaled - np.float32(0.1307)) / np.float32(0.3081))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's model, 16 images to calibrate with, 32 to evaluate with, and a conversion."""
    kit = tmp_path_factory.mktemp("kit")
    (kit / "model.onnx").write_bytes(demo.MODEL.read_bytes())
    (kit / "recipe.toml").write_text(demo.RECIPE)
    with np.load(demo.CALIBRATION) as stored:
        np.savez(kit / "cal.npz", images=stored["images"][:16])
        np.savez(kit / "data.npz", x=normalized(stored["images"][:16]))
    with np.load(demo.EVALUATION) as stored:
        labels = stored["labels"][:32].astype(np.int64)
        labels[2::4] = (
            labels[2::4] + 1
        ) % 10  # wrong on purpose: a share of hits that is neither nothing nor everything
        np.savez(kit / "eval.npz", images=stored["images"][:32], labels=labels)
    recipe = read_recipe(kit / "recipe.toml")
    calibrate(kit / "model.onnx", kit / "cal.npz", kit / "s.stats", recipe)
    convert(kit / "model.onnx", kit / "q.onnx", kit / "s.stats", recipe=recipe)
    return kit


@pytest.fixture(autouse=True)
def here(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in; the kit stands beside it as ``kit``."""
    (tmp_path / "kit").symlink_to(kit)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def strict_json(text: str) -> Any:
    """Read JSON that holds no NaN and no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def done(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a command that is to succeed without a word on standard error, and return its JSON."""
    assert run([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return strict_json(captured.out)


def pair(output: Path | str) -> tuple[bytes, bytes]:
    return Path(output).read_bytes(), Path(output).with_suffix(".json").read_bytes()


def sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


EVAL = ["eval", "kit/q.onnx", "--float", "kit/model.onnx", "--data", "kit/eval.npz", "--recipe", "kit/recipe.toml"]


# ---- the same bytes ------------------------------------------------------------------------------------------------------------


def test_converting_from_statistics_and_from_data_is_the_same(here: Path) -> None:
    for folder in ("stats", "data", "api"):
        (here / folder).mkdir()
    data = ["--data", "kit/cal.npz", *PIXELS]
    assert run(["calibrate", "kit/model.onnx", *data, "-o", "s.stats"]) == 0
    assert run(["convert", "kit/model.onnx", "--stats", "s.stats", *data, "-o", "stats/q.onnx"]) == 0
    assert run(["convert", "kit/model.onnx", *data, "-o", "data/q.onnx"]) == 0
    recipe = read_recipe(Path("kit/recipe.toml"))
    seen = calibrate("kit/model.onnx", "kit/cal.npz", recipe=recipe)
    convert("kit/model.onnx", "api/q.onnx", seen, "kit/cal.npz", recipe=recipe)
    assert pair("data/q.onnx") == pair("api/q.onnx")
    assert pair("stats/q.onnx") == pair("data/q.onnx")


@pytest.mark.usefixtures("here")
def test_kernels_show_what_the_runtime_really_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "kit/model.onnx", "--data", "kit/cal.npz", *PIXELS, "-o", "q.onnx", "-q"]) == 0
    command = [
        "eval",
        "q.onnx",
        "--float",
        "kit/model.onnx",
        "--data",
        "kit/eval.npz",
        *PIXELS,
        "--kernels",
        "--no-latency",
    ]
    assert run([*command, "--json"]) == 0
    found = strict_json(capsys.readouterr().out)["kernels"]
    integers = {kernel["operator"]: kernel["nodes"] for kernel in found["quantized"]}
    assert integers["QLinearConv"] == 2
    assert "QLinearConv" not in {kernel["operator"] for kernel in found["float"]}
    times = [kernel["ms"] for kernel in found["quantized"]]
    assert times == sorted(times, reverse=True)
    assert run(command) == 0
    assert "Kernels of the quantized model" in capsys.readouterr().out
    assert not list(Path().glob("*profile*"))


def test_another_process_writes_the_same_bytes(here: Path) -> None:
    command = ["convert", "kit/model.onnx", "--data", "kit/cal.npz", *PIXELS, "--samples", "9", "-o", "q.onnx"]
    assert run(command) == 0
    first = pair("q.onnx")
    assert run(command) == 0
    assert pair("q.onnx") == first
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
    command = ["convert", "kit/model.onnx", "--data", "kit/data.npz", "-o", "q.onnx"]
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


# ---- what is printed -----------------------------------------------------------------------------------------------------------

CONVERT = ["convert", "kit/model.onnx", "--stats", "kit/s.stats", "-o", "q.onnx"]


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
        "calibrating 4 tensors over 16 samples in batches of 32"
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
        "batch": 32,
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


# ---- eval ----------------------------------------------------------------------------------------------------------------------

MODELS = ("kit/model.onnx", "kit/q.onnx")


def outputs(model: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def sqnr(reference: NDArray[Any], result: NDArray[Any]) -> float:
    a, b = reference.astype(np.float64), result.astype(np.float64)
    return float(10 * np.log10(np.square(a).sum() / np.square(a - b).sum()))


def evaluation() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return what float and quantized model give for the evaluation images, and their labels."""
    with np.load("kit/eval.npz") as stored:
        x, labels = normalized(stored["images"]), stored["labels"]
    return outputs(MODELS[0], x).astype(np.float64), outputs(MODELS[1], x).astype(np.float64), labels


def test_eval_tells_what_numpy_finds(capsys: pytest.CaptureFixture[str]) -> None:
    told = done(capsys, *EVAL, "--layers")
    reference, result, labels = evaluation()
    expected = [100 * int((scores.argmax(axis=1) == labels).sum()) / 32 for scores in (reference, result)]
    assert 0 < expected[0] < 100
    assert list(told) == [*FIELDS, "verdict", "checks"]
    assert (told["metric"], told["samples"], told["verdict"]) == ("top1", 32, None)
    assert [told["float"], told["quantized"]] == expected
    assert told["drop"] == expected[0] - expected[1]
    assert told["bytes"] == Path("kit/q.onnx").stat().st_size
    assert told["float_bytes"] == Path("kit/model.onnx").stat().st_size
    latency = told["latency"]
    assert set(latency) == {"float_ms", "quantized_ms", "ratio", "batch", "threads"}
    assert latency["float_ms"] > 0
    assert latency["quantized_ms"] > 0
    assert (latency["batch"], latency["threads"]) == (1, 1)
    sidecar = strict_json(Path("kit/q.json").read_text())
    assert [(layer["name"], layer["output"]) for layer in told["layers"]] == [
        (layer["name"], layer["outputs"][0]) for layer in sidecar["layers"]
    ]
    # Two sums of 320 float64 squares in any order: each is off by 320·2^-53 relatively at most.
    bound = 10 / np.log(10) * 2.1 * 320 * 2.0**-53
    assert abs(told["sqnr_db"]["log_softmax"] - sqnr(reference, result)) <= bound


@pytest.mark.parametrize("metric", ["top5", "sqnr", "mse", "psnr", "cosine"])
def test_every_metric_is_what_numpy_finds(capsys: pytest.CaptureFixture[str], metric: str) -> None:
    told = done(capsys, *EVAL, "--no-latency", "--metric", metric)
    a, b, labels = evaluation()
    mse = np.square(a - b).mean()
    expected = {
        "top5": 100 * np.mean([label in np.argsort(-scores)[:5] for scores, label in zip(b, labels, strict=True)]),
        "sqnr": sqnr(a, b),
        "mse": mse,
        "psnr": 10 * np.log10(np.abs(a).max() ** 2 / mse),
        "cosine": (a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum()),
    }[metric]
    # Sums of 320 float64 terms, at most three of them in one figure, are off by 320·2^-53 each; those of the logarithms more,
    # by at most 10/ln 10 absolutely. The products in the cosine are all positive here, so that nothing cancels.
    assert (a <= 0).all()
    assert (b <= 0).all()
    assert abs(told["quantized"] - expected) <= 3 * 320 * 2.0**-53 * (abs(expected) + 10 / np.log(10))
    assert told["latency"] is None


def test_eval_of_equal_models_is_sound_json(capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", "kit/data.npz", "--no-latency"]
    told = done(capsys, "eval", "kit/q.onnx", "--float", "kit/q.onnx", *data)
    assert told["metric"] == "sqnr"  # there are no labels
    assert told["quantized"] is None  # infinite
    assert told["sqnr_db"] == {"log_softmax": None}
    assert run(["eval", "kit/q.onnx", "--float", "kit/q.onnx", *data]) == 0
    assert "inf" in capsys.readouterr().out


def test_eval_without_a_float_model(capsys: pytest.CaptureFixture[str]) -> None:
    told = done(capsys, "eval", "kit/q.onnx", "--data", "kit/eval.npz", *PIXELS)
    assert told["quantized"] == 100 * int((evaluation()[1].argmax(axis=1) == evaluation()[2]).sum()) / 32
    for field in ("float", "drop", "latency", "float_bytes", "verdict"):
        assert told[field] is None
    assert told["sqnr_db"] == {}


@pytest.mark.parametrize(("allowed", "code", "verdict"), [("100", 0, "pass"), ("-200", 4, "fail")])
def test_a_threshold_gives_a_verdict(capsys: pytest.CaptureFixture[str], allowed: str, code: int, verdict: str) -> None:
    command = [*EVAL, "--no-latency", "--max-drop", allowed]
    assert run(command) == code
    captured = capsys.readouterr()
    assert "top1" in captured.out
    assert ("verdict" in captured.out) == (code == 0)
    assert run([*command, "--json"]) == code
    captured = capsys.readouterr()
    assert strict_json(captured.out)["verdict"] == verdict
    assert len(captured.err.splitlines()) == (code != 0)


@pytest.mark.parametrize(
    ("options", "code", "failures"),
    [
        ("--min-metric 0 --max-drop 100", 0, 0),
        ("--min-metric 100.5 --max-drop 100", 4, 1),
        ("--min-metric 100.5 --max-drop -200", 4, 2),
        ("--min-speedup 0.001", 0, 0),
        ("--min-speedup 1e6", 4, 1),
    ],
)
def test_every_threshold_is_judged_and_written_as_junit(
    capsys: pytest.CaptureFixture[str], options: str, code: int, failures: int
) -> None:
    command = [*EVAL, *options.split(), "--junit", "verdict.xml"]
    assert run(command) == code
    captured = capsys.readouterr()
    assert captured.out.count("verdict: ") == len(options.split()) // 2 - failures
    assert len(captured.err.splitlines()) == failures
    suite = ET.parse("verdict.xml").getroot().find("testsuite")  # noqa: S314 - it is ours
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == (str(len(options.split()) // 2), str(failures))
    assert len(suite.findall("testcase/failure")) == failures


def test_memory_is_measured_beside_floats(capsys: pytest.CaptureFixture[str]) -> None:
    told = done(capsys, *EVAL, "--no-latency", "--memory")
    assert 0 < told["memory"]["bytes"] < 10**9
    assert 0 < told["memory"]["float_bytes"] < 10**9
    assert run([*EVAL, "--no-latency", "--memory"]) == 0
    assert "memory (MB" in capsys.readouterr().out


def test_thresholds_need_their_figures(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ("--no-latency --min-speedup 1", "--no-latency --metric sqnr --max-drop 1"):
        assert run([*EVAL, *options.split()]) == 2
        assert capsys.readouterr().err.startswith("error: ")


METRICS_OF_A_USER = """
import numpy as np

def errors(outputs, labels):
    (scores,) = outputs.values()
    return float((scores.argmax(1) != labels).sum())

def fails(outputs, labels):
    return 1 / 0

def nothing(outputs, labels):
    return float("nan")
"""


def test_a_metric_of_the_users_own(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(METRICS_OF_A_USER)
    reference, result, labels = evaluation()
    told = done(capsys, *EVAL, "--no-latency", "--metric", "mine:errors")
    assert told["quantized"] == int((result.argmax(axis=1) != labels).sum())
    assert told["float"] == int((reference.argmax(axis=1) != labels).sum())
    for name, message in (("fails", "ZeroDivisionError"), ("nothing", "returns nan"), ("absent", "cannot be imported")):
        assert run([*EVAL, "--no-latency", "--metric", f"mine:{name}"]) == 1
        assert message in capsys.readouterr().err


def test_the_worst_layers_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*EVAL, "--no-latency", "--layers"]) == 0
    table = capsys.readouterr().out.partition("SQNR layer by layer")[2].splitlines()
    rows = [re.findall(r"-?\d+\.\d(?!\d)", line) for line in table]
    lost = [float(numbers[1]) if len(numbers) > 1 else 0.0 for numbers in rows if numbers]
    assert len(lost) >= 3
    assert lost == sorted(lost, reverse=True)


def test_a_threshold_may_be_met_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    drop = done(capsys, *EVAL, "--no-latency")["drop"]
    for allowed, code in ((drop, 0), (drop - 1e-3, 4)):
        assert run([*EVAL, "--no-latency", f"--max-drop={allowed!r}"]) == code


@pytest.mark.parametrize("batch", [1, 5, 32])
def test_the_batch_changes_no_count(capsys: pytest.CaptureFixture[str], batch: int) -> None:
    command = [*EVAL, "--no-latency", "--batch", str(batch)]
    assert done(capsys, *command)["quantized"] == done(capsys, *EVAL, "--no-latency")["quantized"]


def test_eval_takes_the_samples_that_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    told = done(capsys, *EVAL, "--no-latency", "--samples", "7", "--no-shuffle")
    _, result, labels = evaluation()
    assert told["samples"] == 7
    assert told["quantized"] == 100 * int((result[:7].argmax(axis=1) == labels[:7]).sum()) / 7


@pytest.mark.parametrize("fixed", [3, 5])
def test_a_fixed_batch_is_filled_up_and_cut_again(here: Path, capsys: pytest.CaptureFixture[str], fixed: int) -> None:
    weight = graphs.normal(4, 4, seed=1)
    for name, batch in (("fixed.onnx", fixed), ("free.onnx", "n")):
        graphs.save(
            here / name, [graphs.node("MatMul", ["x", "w"], ["y"])], {"x": [batch, 4]}, {"y": [batch, 4]}, {"w": weight}
        )
    x = graphs.normal(8, 4, seed=2)
    np.savez(here / "d.npz", x=x, labels=(x @ weight).argmax(axis=1))
    figures = []
    for name in ("fixed", "free"):
        assert (
            run(["convert", "free.onnx" if name == "free" else "fixed.onnx", "--data", "d.npz", "-o", f"{name}.q.onnx"])
            == 0
        )
        capsys.readouterr()
        told = done(
            capsys, "eval", f"{name}.q.onnx", "--float", f"{name}.onnx", "--data", "d.npz", "--layers", "--no-latency"
        )
        figures.append((told["samples"], told["float"]))
    assert figures == [(8, 100.0), (8, 100.0)]


def test_a_folder_of_images_is_the_same_as_its_arrays(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load("kit/eval.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    assert set(labels) == set(range(10))  # class folders number the classes that are there
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = here / "images" / str(label) / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    folder, arrays = ["--data", "images", *PIXELS[2:]], ["--data", "kit/eval.npz", *PIXELS]  # images have their scale
    seen = [done(capsys, "calibrate", "kit/model.onnx", *data, "-o", "s")["tensors"]["x"] for data in (folder, arrays)]
    assert seen[0] == seen[1]
    command = ["eval", "kit/q.onnx", "--float", "kit/model.onnx", "--no-latency"]
    told = [done(capsys, *command, *data) for data in (folder, arrays)]
    assert [told[0][field] for field in ("samples", "float", "quantized")] == [
        told[1][field] for field in ("samples", "float", "quantized")
    ]


# ---- demo, help, version -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["demo", "my demo/deep"])
def test_the_demo_can_be_made_again(capsys: pytest.CaptureFixture[str], folder: str) -> None:
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


# ---- the Python API ------------------------------------------------------------------------------------------------------------


def test_the_api_does_what_the_commands_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = read_recipe(Path("kit/recipe.toml"))
    found = calibrate("kit/model.onnx", "kit/cal.npz", recipe=recipe)
    assert list(here.iterdir()) == [here / "kit"]  # without an output nothing is written
    assert statistics.serialized(found) == Path("kit/s.stats").read_bytes()
    for given in ("kit/s.stats", Path("kit/s.stats")):
        made = convert("kit/model.onnx", "q.onnx", given, recipe=recipe)
        assert (made.model, made.sidecar_path) == (Path("q.onnx"), Path("q.json"))
        assert pair("q.onnx") == pair("kit/q.onnx")
    heard: list[tuple[str, int, int]] = []

    def progress(*stage: Any) -> None:
        heard.append(stage)

    told = evaluate("q.onnx", "kit/eval.npz", MODELS[0], None, recipe, batch=20, latency=False, progress=progress)
    assert heard == [("evaluate", 20, 32), ("evaluate", 32, 32)]
    assert (told.quantized, told.drop) == tuple(done(capsys, *EVAL, "--no-latency")[k] for k in ("quantized", "drop"))
    assert capsys.readouterr() == ("", "")  # the API prints nothing
    part = evaluate("q.onnx", "kit/eval.npz", recipe=recipe, selection=Selection(5))
    assert (part.samples, part.reference, part.layers) == (5, None, ())


def test_the_api_reports_by_exceptions(here: Path) -> None:
    recipe = quantcli.Recipe(preprocess=Preprocess(scale=0.5, layout="NCHW"))
    with pytest.raises(UsageError, match="either"):
        convert("kit/model.onnx", "q.onnx", None, "kit/cal.npz", recipe, synthetic=3)
    with pytest.raises(ModelError, match="no model at"):
        calibrate("gone.onnx", "kit/cal.npz")
    with pytest.raises(UsageError, match="no metric 'accuracy'"):
        evaluate("kit/q.onnx", "kit/eval.npz", metric="accuracy", recipe=recipe)
    with pytest.raises(PlanError, match="nothing to quantize"):
        convert(
            graphs.save(here / "m.onnx", [graphs.node("Exp", ["x"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 3]}, {}),
            "q.onnx",
            data=graphs.data_for(here / "d.npz", x=(3,)),
        )
    assert not (here / "q.onnx").exists()


MISTAKEN: list[tuple[str, dict[str, Any]]] = [
    ("the recipe is of the type dict", {"recipe": {}}),
    ("Invalid enum value 'uint16'", {"recipe": quantcli.Recipe(activation=Activation(dtype="uint16"))}),  # type: ignore[arg-type]
    ("the output is None", {"output": None}),
    ("the model is of the type object.*quantcli.torch.convert takes modules", {"model": object()}),
    ("the data is of the type ndarray.*numpy.savez writes arrays", {"data": np.zeros((4, 3))}),
    ("the statistics file is of the type dict", {"statistics": {}}),
    ("the data function is of the type function.*module:function", {"data": None, "function": read_recipe}),
    ("the run is of the type int.*quantcli.Run", {"run": 3}),
    (r"the run asks for .*got `str` - at `\$.max_memory`", {"run": Run(max_memory="1")}),  # type: ignore[arg-type]
    ("the run asks for something unknown .*Invalid enum value 'jax'", {"run": Run(runtime="jax")}),  # type: ignore[arg-type]
    ("the run asks for something unknown .*Expected `array`", {"run": Run(shard=3)}),  # type: ignore[arg-type]
    ("there is no shard 0 of 0", {"run": Run(shard=(0, 0))}),
    ("the opening is of the type int.*quantcli.pipeline.Opening", {"opening": 3}),
    ("Expected `float` <= 100", {"recipe": quantcli.Recipe(tune=Tune(max_drop=math.inf))}),
    ("the format is of the type list", {"form": ["qdq"]}),
    ("the number of random samples is of the type str, not a whole number", {"data": None, "synthetic": "8"}),
    ("the number of random samples is 0; give a number of at least 1", {"data": None, "synthetic": 0}),
    ("the operators to explain are of the type str, not texts", {"explained": "Conv"}),
    ("the operators to explain are of the type list, not texts", {"explained": [3]}),
    ("the tensors to end at are of the type int", {"until": 3}),
    ("the progress is of the type int", {"progress": 3}),
]


@pytest.mark.parametrize(("told", "change"), MISTAKEN)
def test_the_api_tells_what_is_of_another_type(here: Path, told: str, change: dict[str, Any]) -> None:
    given = {"model": "kit/model.onnx", "output": "q.onnx", "data": "kit/cal.npz", **change}
    with pytest.raises(UsageError, match=told):
        convert(**given)
    assert not (here / "q.onnx").exists()


@pytest.mark.usefixtures("here")
def test_other_functions_of_the_api_tell_it_too() -> None:
    with pytest.raises(UsageError, match="the metric is of the type type"):
        evaluate("kit/q.onnx", "kit/eval.npz", metric=float)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the opening is of the type dict"):
        evaluate("kit/q.onnx", "kit/eval.npz", "kit/model.onnx", opening={})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the opening is of the type dict"):
        calibrate("kit/model.onnx", "kit/cal.npz", opening={})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the run is of the type dict"):
        calibrate("kit/model.onnx", "kit/cal.npz", run={})  # type: ignore[arg-type]
    assert read_recipe("kit/recipe.toml") == read_recipe(Path("kit/recipe.toml"))


MISCOUNTED: list[tuple[str, dict[str, Any]]] = [
    ("the selection is of the type int; give a calibration.datasets.Selection", {"selection": 3}),
    ("the number of samples is of the type str", {"selection": Selection("3")}),  # type: ignore[arg-type]
    ("the number of samples is 0", {"selection": Selection(0)}),
    ("the seed of the selection is -1; give a number of at least 0", {"selection": Selection(seed=-1)}),
    ("the progress is of the type str", {"progress": "text"}),
]
BATCHED: list[tuple[str, dict[str, Any]]] = [
    ("the batch is of the type float, not a whole number", {"batch": 3.5}),
    ("the batch is of the type bool", {"batch": True}),
    ("the batch is -1; give a number of at least 1", {"batch": -1}),
]
SEEDED: list[tuple[str, dict[str, Any]]] = [("the seed is -1", {"seed": -1}), ("the seed is of the", {"seed": "1"})]
COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("the compiler is of the type int", {"compiler": 3}),
    ("the flags are of the type str, not texts", {"flags": "-O2"}),
]


@pytest.mark.parametrize(
    ("function", "given", "told", "change"),
    [
        *[(calibrate, "kit/model.onnx", *case) for case in MISCOUNTED[-1:]],
        *[(evaluate, "kit/q.onnx", *case) for case in (*MISCOUNTED, *BATCHED, ("threads is 0", {"threads": 0}))],
        *[(verify, "kit/q.json", *case) for case in (*MISCOUNTED, *BATCHED, *SEEDED)],
        *[(verify_c, "firmware", *case) for case in (*MISCOUNTED, *SEEDED, *COMPILED)],
    ],
)
@pytest.mark.usefixtures("here")
def test_counts_and_choices_of_another_type_are_told(
    function: Callable[..., Any], given: str, told: str, change: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=told):
        function(given, "kit/eval.npz", **change)


def test_the_package_has_no_other_names() -> None:
    assert {name for name in quantcli.__all__ if getattr(quantcli, name) is None} == set()
    with pytest.raises(AttributeError, match="nonsense"):
        quantcli.nonsense  # noqa: B018


# ---- what is loaded when -------------------------------------------------------------------------------------------------------


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
