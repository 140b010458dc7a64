"""What a user sees when something is wrong: one line, the right exit code, and nothing left behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from PIL import Image

from quantcli import pipeline
from quantcli.cli import run
from tests.cli.errors.lines import CALIBRATE, CONVERT, EVAL, contents, the_line

Prepare = Callable[[], object]

PIXELS = "--scale 0.00392156862745098 --mean 0.1307 --std 0.3081 --layout NCHW"
TARGET = Path(pipeline.__file__).parent / "targets" / "ort-x86.toml"
TIMED = "convert rows.onnx --optimize latency -o new.onnx"
BAD = "convert model.onnx --data bad.npz -o new.onnx"


def nothing() -> None:
    """Leave the kit as it is."""


def text(name: str, content: str | bytes) -> Prepare:
    return lambda: Path(name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name: str, source: str, size: int) -> Prepare:
    return lambda: Path(name).write_bytes(Path(source).read_bytes()[:size])


def copied(name: str, source: str) -> Prepare:
    return lambda: shutil.copyfile(source, name)


def arrays(edit: Callable[[NDArray[np.float32]], dict[str, Any]], source: str = "data.npz") -> Prepare:
    """Write bad.npz with arrays made from the sound ones."""

    def prepare() -> None:
        with np.load(source) as stored:
            np.savez("bad.npz", **edit(stored["x"]))

    return prepare


def labels(values: Any) -> Prepare:
    return arrays(lambda x: {"x": x, "labels": np.asarray(values)})


def spoiled(x: NDArray[np.float32], value: float) -> NDArray[np.float32]:
    x = x.copy()
    x[3, 0, 5, 5] = value
    return x


class Canary:
    """An object that makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hatched"),)


def pickled(name: str) -> Prepare:
    return text(name, pickle.dumps(Canary()))


def pickled_arrays() -> None:
    np.savez("bad.npz", x=np.array([Canary()], dtype=object))


def as_npz(**stored: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **stored)
    return stream.getvalue()


def damaged_archive() -> None:
    content = bytearray(as_npz(x=np.random.default_rng(0).normal(size=(8, 1, 28, 28)).astype(np.float32)))
    middle = slice(len(content) // 2, len(content) // 2 + 40)
    content[middle] = bytes(byte ^ 0x5A for byte in content[middle])
    Path("bad.npz").write_bytes(content)


def npy_named_npz() -> None:
    with Path("bad.npz").open("wb") as stream, np.load("data.npz") as stored:
        np.save(stream, stored["x"])


def external(location: str | None) -> Prepare:
    """Write ext.onnx, whose weights are to lie in another file; it is not there."""

    def prepare() -> None:
        model = onnx.load("rows.onnx")
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location or "weights.bin")
        Path("ext.onnx").write_bytes(model.SerializeToString())

    return prepare


def weights() -> None:
    """Write the weights that ext.onnx asks for."""
    Path("weights.bin").write_bytes(np.eye(4, dtype=np.float32).tobytes())


def image() -> None:
    """Write a folder of one image."""
    Path("images").mkdir()
    Image.fromarray(np.zeros((28, 28), dtype=np.uint8)).save("images/0.png")


def both(*steps: Prepare) -> Prepare:
    return lambda: [step() for step in steps]


def symlink(name: str, target: str) -> Prepare:
    return lambda: Path(name).symlink_to(target)


def recipe(content: str) -> Prepare:
    return text("r.toml", content)


Row = tuple[str, str, int, str, Prepare]

MODELS: list[Row] = [
    ("missing model", "convert gone.onnx --data data.npz -o new.onnx", 2, "gone.onnx", nothing),
    ("a folder for a model", "convert . --data data.npz -o new.onnx", 2, "'.'", nothing),
    (
        "truncated model",
        "convert bad.onnx --data data.npz -o new.onnx",
        1,
        "bad.onnx",
        cut("bad.onnx", "model.onnx", 9999),
    ),
    (
        "last byte missing",
        "convert bad.onnx --data data.npz -o new.onnx",
        1,
        "bad.onnx",
        cut("bad.onnx", "model.onnx", -1),
    ),
    ("text for a model", "convert bad.onnx --data data.npz -o new.onnx", 1, "bad.onnx", text("bad.onnx", "hello\n")),
    ("empty model", "convert bad.onnx --data data.npz -o new.onnx", 1, "bad.onnx", text("bad.onnx", "")),
    ("pickled model", "convert bad.pt --data data.npz -o new.onnx", 1, "--trust-pickle", pickled("bad.pt")),
    ("pickle named .onnx", "convert bad.onnx --data data.npz -o new.onnx", 1, "bad.onnx", pickled("bad.onnx")),
    ("unknown kind", "convert bad.h5 --data data.npz -o new.onnx", 1, "bad.h5", text("bad.h5", "hello")),
    ("nothing to quantize", "convert exp.onnx --data rows.npz -o new.onnx", 1, "nothing to quantize", nothing),
    ("quantized already", "convert q.onnx --data data.npz -o new.onnx", 1, "quantized already", nothing),
    ("weights missing", "convert ext.onnx --data rows.npz -o new.onnx", 1, "weights.bin", external(None)),
    ("weights outside", "convert ext.onnx --data rows.npz -o new.onnx", 1, "ext.onnx", external("../weights.bin")),
    ("text for a quantized model", "eval bad.onnx --data labelled.npz", 1, "bad.onnx", text("bad.onnx", "hello\n")),
]

DATA: list[Row] = [
    ("missing data", "convert model.onnx --data gone.npz -o new.onnx", 2, "gone.npz", nothing),
    ("empty file", BAD, 1, "bad.npz", text("bad.npz", "")),
    ("text for data", BAD, 1, "bad.npz", text("bad.npz", "hello\n")),
    ("unknown data", CONVERT.replace("data.npz", "bad.csv"), 1, "bad.csv", text("bad.csv", "1,2\n")),
    ("truncated data", BAD, 1, "bad.npz", cut("bad.npz", "data.npz", 5000)),
    ("damaged data", BAD, 1, "bad.npz", damaged_archive),
    (".npy named .npz", BAD, 1, "bad.npz", npy_named_npz),
    (".npz named .npy", CONVERT.replace("data.npz", "bad.npy"), 1, "bad.npy", copied("bad.npy", "data.npz")),
    ("pickled data", BAD, 1, "bad.npz", pickled_arrays),
    ("folder without images", CONVERT.replace("data.npz", "folder"), 1, "folder", lambda: Path("folder").mkdir()),
    ("no sample", BAD, 1, "empty", arrays(lambda x: {"x": x[:0]})),
    ("wrong shape", BAD, 1, "[?, 1, 28, 28]", arrays(lambda x: {"x": x[..., :27]})),
    ("wrong rank", BAD, 1, "[?, 1, 28, 28]", arrays(lambda x: {"x": x[:, 0]})),
    ("wrong dtype", BAD, 1, "int64", arrays(lambda x: {"x": x.astype(np.int64)})),
    ("stored pixels", CONVERT.replace("data.npz", "pixels.npz"), 1, "--scale", nothing),
    ("missing input", BAD, 1, "input 'x'", arrays(lambda x: {"a": x, "b": x})),
    ("extra array", BAD, 1, "'b'", arrays(lambda x: {"x": x, "b": x})),
    ("NaN", BAD, 1, "1 NaN", arrays(lambda x: {"x": spoiled(x, np.nan)})),
    ("infinity", BAD, 1, "1 inf", arrays(lambda x: {"x": spoiled(x, np.inf)})),
    ("beyond float32", BAD, 1, "1 inf", arrays(lambda x: {"x": spoiled(x.astype("f8"), 1e300)})),
    ("NaN in eval", EVAL.replace("labelled", "bad"), 1, "1 NaN", arrays(lambda x: {"x": spoiled(x, np.nan), "y": [0] * 8})),
    ("text with a scale", f"{BAD} --scale 2", 1, "bad.npz", arrays(lambda x: {"x": x.astype("U3")})),
    ("means of no channel", f"{CONVERT} --mean 0.1,0.2", 1, "mean", nothing),
    ("layout of no image", "convert rows.onnx --data rows.npz -o new.onnx --layout NCHW", 1, "rows.npz", nothing),
    ("too many samples", f"{CONVERT} --samples 9", 1, "--samples", nothing),
    ("another batch than the model's", "convert pairs.onnx --data rows.npz -o new.onnx --batch 3", 1, "batches of 2", nothing),
    ("a split of arrays", f"{CONVERT} --split val", 1, "split", nothing),
    ("no labels", EVAL.replace("labelled", "data") + " --metric top1", 1, "labels", nothing),
    ("a CSV for arrays", f"{EVAL} --labels l.csv", 1, "l.csv", text("l.csv", "file,label\n")),
    ("too few labels", EVAL.replace("labelled", "bad"), 1, "7 labels", labels(range(7))),
    ("fewer labels in a file", f"{EVAL} --labels l.npy", 1, "8 samples and l.npy has 7", lambda: np.save("l.npy", range(7))),
    ("labels of floats in a file", f"{EVAL} --labels l.npy", 1, "labels of l.npy", lambda: np.save("l.npy", np.ones(8))),
    ("a label beyond the classes", EVAL.replace("labelled", "bad"), 1, "a label is 10, and", labels([10] * 8)),
    ("a negative label", EVAL.replace("labelled", "bad"), 1, "a label is -1", labels([-1] * 8)),
    ("one-hot labels", EVAL.replace("labelled", "bad"), 1, "label", labels(np.eye(8, dtype=int))),
    ("a scalar label", EVAL.replace("labelled", "bad"), 1, "label", labels(1)),
]  # fmt: skip

OUTPUTS: list[Row] = [
    ("the model", "convert model.onnx --data data.npz -o model.onnx", 2, "model.onnx", nothing),
    ("the model by another way", "convert model.onnx --data data.npz -o ../here/model.onnx", 2, "model.onnx", nothing),
    ("a link to the model", "convert model.onnx --data data.npz -o link.onnx", 2, "link.onnx", symlink("link.onnx", "model.onnx")),
    ("the data", "calibrate model.onnx --data data.npz -o data.npz", 2, "data.npz", nothing),
    ("the model of calibrate", "calibrate model.onnx --data data.npz -o model.onnx", 2, "model.onnx", nothing),
    ("the statistics", "convert model.onnx --stats new.onnx -o new.onnx", 2, "new.onnx", copied("new.onnx", "s.stats")),
    ("a sidecar like statistics", "convert model.onnx --stats new.json -o new.onnx", 2, "new.json", copied("new.json", "s.stats")),
    ("a sidecar like the recipe", f"{CONVERT} --recipe new.json", 2, "new.json", text("new.json", "")),
    ("the recipe", "calibrate model.onnx --data data.npz --recipe r.toml -o r.toml", 2, "r.toml", recipe("")),
    ("the labels", "calibrate model.onnx --data data.npz --labels l.npy -o l.npy", 2, "l.npy", lambda: np.save("l.npy", range(8))),
    ("the target", "calibrate model.onnx --data data.npz --target t.toml -o t.toml", 2, "t.toml", copied("t.toml", str(TARGET))),
    ("the model's weights", "calibrate ext.onnx --data rows.npz -o weights.bin", 2, "weights.bin", both(external(None), weights)),
    ("an image of the data", "calibrate model.onnx --data images -o images/0.png", 2, "0.png", image),
    ("no such folder", CONVERT.replace("new.onnx", "gone/new.onnx"), 1, "gone", nothing),
    ("no such folder for statistics", CALIBRATE.replace("new.stats", "gone/new.stats"), 1, "gone", nothing),
    ("a file for a folder", CONVERT.replace("new.onnx", "s.stats/new.onnx"), 1, "s.stats", nothing),
    ("a folder", CONVERT.replace("new.onnx", "new.onnx"), 2, "new.onnx", lambda: Path("new.onnx").mkdir()),
    ("a folder for the sidecar", CONVERT, 2, "new.json", lambda: Path("new.json").mkdir()),
    ("unknown kind of output", CONVERT.replace("new.onnx", "new.tflite"), 2, "new.tflite", nothing),
    ("a file for the demo", "demo -o s.stats", 2, "s.stats", nothing),
    ("a file above the demo", "demo -o s.stats/demo", 1, "s.stats", nothing),
]  # fmt: skip

REQUESTS: list[Row] = [
    ("unknown command", "frobnicate", 2, "frobnicate", nothing),
    ("unknown option", f"{CONVERT} --frobnicate", 2, "--frobnicate", nothing),
    ("no arguments", "convert", 2, "MODEL", nothing),
    ("no output", "convert model.onnx --data data.npz", 2, "--output", nothing),
    ("no data", "calibrate model.onnx -o new.stats", 2, "--data", nothing),
    ("unknown metric", f"{EVAL} --metric accuracy", 2, "accuracy", nothing),
    ("neither statistics nor data", "convert model.onnx -o new.onnx", 2, "--stats", nothing),
    ("data from two places", f"{CONVERT} --synthetic 4", 2, "--synthetic", nothing),
    ("statistics of another model", "convert rows.onnx --stats s.stats -o new.onnx", 1, "another model", nothing),
    ("text for statistics", "convert model.onnx --stats bad -o new.onnx", 1, "bad", text("bad", "hello\n")),
    ("statistics of other tensors", "convert model.onnx --stats s.stats -o new.onnx --include nothing*", 2, "nothing*", nothing),
    ("symmetric uint8", f"{CONVERT} --activation-dtype uint8 --symmetric", 2, "uint8", nothing),
    ("symmetric uint8 while calibrating", f"{CALIBRATE} --activation-dtype uint8 --symmetric", 2, "uint8", nothing),
    ("wider than its type", f"{CONVERT} --activation-bits 12", 2, "fit uint8; choose --activation-dtype int16", nothing),
    ("wider while calibrating", f"{CALIBRATE} --activation-bits 9 --target tflite", 2, "9 bits do not fit int8", nothing),
    ("wider in a recipe", f"{CONVERT} --recipe r.toml", 2, "16 bits do not fit uint8", recipe("[activation]\nbits = 16\n")),
    ("a width without calibration", f"{CONVERT} --mode dynamic --activation-bits 4", 2, "--mode dynamic", nothing),
    ("a range without calibration", f"{CONVERT} --mode dynamic --range mse", 2, "--range", nothing),
    ("a form without calibration", f"{CONVERT} --mode weights --asymmetric", 2, "--asymmetric", nothing),
    ("multipliers without calibration", f"{CONVERT} --mode dynamic --rounding floor", 2, "--rounding", nothing),
    ("a width in its recipe", f"{CONVERT} --mode weights --recipe r.toml", 2, "--mode weights", recipe("[activation]\nbits = 4")),
    ("plans of dynamic", f"{TIMED} --mode dynamic", 2, "not of --mode dynamic", nothing),
    ("plans of weights", f"{TIMED} --mode weights", 2, "not of --mode weights", nothing),
    ("a threshold without float", f"{EVAL} --max-drop 1", 2, "--float", nothing),
    ("a threshold without points", f"{EVAL} --float model.onnx --metric sqnr --max-drop 1", 2, "sqnr", nothing),
    ("a threshold that is no number", f"{EVAL} --min-metric nan", 2, "--min-metric", nothing),
    ("an infinite threshold", f"{EVAL} --float model.onnx --max-drop inf", 2, "--max-drop", nothing),
    ("a drop that is no number", f"{CONVERT} --max-drop nan", 2, "--max-drop", nothing),
    ("a floor for an error", f"{EVAL} --float model.onnx --metric mse --min-metric 1", 2, "better the lower", nothing),
    ("a comparison without float", f"{EVAL} --metric sqnr", 2, "--float", nothing),
    ("float with other outputs", "eval rows.int8.onnx --float other.onnx --data rows.npz", 1, "output", nothing),
    ("float with other inputs", f"{EVAL} --float rows.onnx", 1, "rows.onnx", nothing),
    ("layers without a sidecar", f"{EVAL} --float model.onnx --layers", 1, "q.json", lambda: Path("q.json").unlink()),
    ("layers with another's sidecar", f"{EVAL} --float model.onnx --layers", 1, "q.json", copied("q.json", "rows.int8.json")),
    ("layers with text for a sidecar", f"{EVAL} --float model.onnx --layers", 1, "q.json", text("q.json", "hello")),
    ("a pattern that matches nothing", f"{CONVERT} --exclude nothing*", 2, "nothing*", nothing),
    ("an operator that matches nothing", f"{CONVERT} --include op:Frobnicate", 2, "op:Frobnicate", nothing),
    ("everything excluded", f"{CONVERT} --exclude *", 1, "nothing to quantize", nothing),
    ("unknown target", f"{CONVERT} --target abacus", 2, "abacus", nothing),
    ("a target outside", f"{CONVERT} --target ../targets/ort-x86", 2, "../targets/ort-x86", nothing),
    ("a target file that is not there", f"{CONVERT} --target gone.toml", 2, "gone.toml", nothing),
    ("half a target", f"{CONVERT} --target t.toml", 2, "t.toml", text("t.toml", 'name = "t"\n')),
    ("no TOML for a target", f"{CONVERT} --target t.toml", 2, "t.toml", text("t.toml", "hello")),
    ("a recipe that is not there", f"{CONVERT} --recipe gone.toml", 2, "gone.toml", nothing),
    ("no TOML", f"{CONVERT} --recipe r.toml", 2, "r.toml", recipe("hello")),
    ("not UTF-8", f"{CONVERT} --recipe r.toml", 2, "r.toml", text("r.toml", b"target = '\xff'")),
    ("unknown section", f"{CONVERT} --recipe r.toml", 2, "colour", recipe("[colour]\n")),
    ("unknown key", f"{CONVERT} --recipe r.toml", 2, "colour", recipe("[weight]\ncolour = 1\n")),
    ("whose unknown key", f"{CONVERT} --recipe r.toml", 2, "r.toml asks", recipe("[weight]\ncolour = 1\n")),
    ("unknown value", f"{CONVERT} --recipe r.toml", 2, "int4", recipe("[activation]\ndtype = 'int4'\n")),
    ("wrong type", f"{CONVERT} --recipe r.toml", 2, "samples", recipe("[calibration]\nsamples = 'many'\n")),
    ("a number for a section", f"{CONVERT} --recipe r.toml", 2, "calibration", recipe("calibration = 3\n")),
    ("a number for a section with a flag", f"{CONVERT} --recipe r.toml --seed 1", 2, "r.toml", recipe("calibration = 3\n")),
    ("a deviation of 0", f"{CONVERT} --recipe r.toml", 2, "std", recipe("[preprocess]\nstd = [0.0]\n")),
    ("a deviation of 0 as a flag", f"{CONVERT} --std 0", 2, "std", nothing),
    ("a batch of 0", f"{CONVERT} --recipe r.toml", 2, "batch", recipe("[calibration]\nbatch = 0\n")),
    ("a negative batch", f"{CONVERT} --recipe r.toml", 2, "batch", recipe("[calibration]\nbatch = -1\n")),
    ("a negative seed", f"{CONVERT} --recipe r.toml", 2, "seed", recipe("[calibration]\nsamples = 2\nseed = -1\n")),
    ("a negative seed as a flag", f"{CONVERT} --samples 2 --seed -1", 2, "seed", nothing),
    ("a size of 0", f"{CONVERT} --recipe r.toml", 2, "size", recipe("[preprocess]\nsize = 0\n")),
    ("a size of no height", f"{CONVERT} --recipe r.toml", 2, "size", recipe("[preprocess]\nsize = [0, 5]\n")),
    ("a negative crop", f"{CONVERT} --recipe r.toml", 2, "crop", recipe("[preprocess]\ncrop = -1\n")),
    ("samples of 0", f"{CONVERT} --samples 0", 2, "--samples", nothing),
    ("no size", f"{CONVERT} --size 2xx", 2, "2xx", nothing),
    ("no numbers", f"{CONVERT} --mean 1,a", 2, "1,a", nothing),
    ("no threads", f"{EVAL} --threads 0", 2, "--threads", nothing),
    ("strict", f"{CONVERT} --strict", 5, "LogSoftmax", nothing),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "code", "told", "prepare"),
    [pytest.param(*row, id=name) for name, *row in (*MODELS, *DATA, *OUTPUTS, *REQUESTS)],
)
def test_a_bad_request_gives_one_line_and_leaves_nothing(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    command: str,
    code: int,
    told: str,
    prepare: Prepare,
) -> None:
    prepare()
    before = contents(here)
    assert run(command.split()) == code
    captured = capsys.readouterr()
    line = the_line(captured.err)
    assert line.startswith("error: ")
    assert told in line
    assert "internal error" not in line
    assert captured.out == ""
    assert run([*command.split(), "--json"]) == code
    captured = capsys.readouterr()
    assert the_line(captured.err) == line
    error = json.loads(captured.out)["error"]
    assert set(error) == {"type", "message", "remedy", "exit_code"}
    assert error["exit_code"] == code
    assert " ".join(error["message"].split()) in line
    assert contents(here) == before
    warned = [record.getMessage() for record in caplog.records if record.name == "py.warnings"]
    silent = (": DeprecationWarning:", ": FutureWarning:", ": ImportWarning:", ": ResourceWarning:")
    assert not [text for text in warned if not any(kind in text for kind in silent)]  # what -v would show


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_missed_threshold_is_no_malfunction(
    here: Path, capsys: pytest.CaptureFixture[str], json_wanted: bool
) -> None:
    before = contents(here)
    flags = ["--json"] if json_wanted else []
    assert run([*f"{EVAL} --float model.onnx --max-drop -200".split(), *flags]) == 4
    captured = capsys.readouterr()
    assert "more than the -200" in the_line(captured.err)
    assert the_line(captured.err).startswith(("error: ", "warning: "))
    if json_wanted:
        assert json.loads(captured.out)["verdict"] == "fail"
    assert contents(here) == before


def test_a_name_is_shown_as_it_is(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del here
    name = "[red]:bug:" + "x" * 180 + ".onnx"
    assert run(["convert", name, "--data", "data.npz", "-o", "new.onnx"]) == 2
    assert name in the_line(capsys.readouterr().err)


def test_a_name_of_two_lines_is_shown_in_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "two\nlines.onnx").write_text("hello")
    assert run(["convert", "two\nlines.onnx", "--data", "data.npz", "-o", "new.onnx"]) == 1
    assert "two lines.onnx" in the_line(capsys.readouterr().err)


def test_a_name_that_is_no_unicode_is_borne(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del here
    code = run(["convert", "model.onnx", "--data", "data.npz", "-q", "-o", os.fsdecode(b"\xff.onnx")])
    captured = capsys.readouterr()
    assert "internal error" not in captured.err
    assert code == 0 or the_line(captured.err).startswith("error: ")
