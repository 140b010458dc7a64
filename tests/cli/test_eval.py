"""What eval tells: figures that numpy finds as well, verdicts, and samples of every kind."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from calibration.hooks.onnxruntime import Runner
from quantcli.cli import run
from tests import graphs
from tests.cli.commands import EVAL, FIELDS, MODELS, PIXELS, done, normalized, outputs, sqnr, strict_json

pytestmark = pytest.mark.usefixtures("here")


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
        assert run(["convert", f"{name}.onnx", "--data", "d.npz", "--target", "native", "-o", f"{name}.q.onnx"]) == 0
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


def test_samples_of_several_lengths_meet_their_labels(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        graphs.node("Conv", ["x", "w"], ["c"]),
        graphs.node("GlobalAveragePool", ["c"], ["g"]),
        graphs.node("Flatten", ["g"], ["y"]),
    ]
    graphs.save(Path("m.onnx"), nodes, {"x": ["N", 3, "L"]}, {"y": None}, {"w": graphs.normal(8, 3, 3, scale=0.5)})
    runner, lines = Runner(Path("m.onnx")), []
    for k, length in enumerate([9, 5, 5, 7, 9, 9, 5]):
        x = graphs.normal(3, length, seed=k)
        lines.append({"x": x.tolist(), "label": int(runner.run({"x": x[None]})["y"].argmax())})
    Path("d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len({line["label"] for line in lines}) > 1
    assert run(["convert", "m.onnx", "--data", "d.jsonl", "-o", "q.onnx", "-q"]) == 0
    capsys.readouterr()
    assert run(["eval", "q.onnx", "--float", "m.onnx", "--data", "d.jsonl", "--no-latency", "--json"]) == 0
    found = strict_json(capsys.readouterr().out)
    assert (found["metric"], found["samples"]) == ("top1", 7)
    assert found["float"] == 100.0


def test_a_function_gives_the_samples_and_their_labels(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "import numpy as np",
        "def batches():",
        "    d = np.load('kit/eval.npz')",
        "    x, y = d['images'], d['labels']",
    ]
    lines += ["    for k in range(0, len(x), 8):", "        yield x[k:k + 8], y[k:k + 8]", ""]
    Path("mine.py").write_text("\n".join(lines))
    command = ["eval", "kit/q.onnx", "--float", "kit/model.onnx", *PIXELS, "--no-latency"]
    from_file = done(capsys, *command, "--data", "kit/eval.npz")
    assert from_file["metric"] == "top1"
    assert done(capsys, *command, "--data-function", "mine.py:batches") == from_file
    for given in ([], ["--data", "kit/eval.npz", "--data-function", "mine.py:batches"]):
        assert run([*command, *given]) == 2
        assert "evaluation needs data from one place" in capsys.readouterr().err
