"""Calibration on the command line: shards, interruptions, ranges from one file, memory, made-up data, and what inspect shows."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from calibration import statistics
from quantcli import Recipe
from quantcli.cli import run
from quantcli.fold import fold
from quantcli.known import known_of, poolable
from quantcli.load import load
from quantcli.placement import place
from quantcli.recipe import with_integer_start
from tests.graphs import node, normal, residual_net, save

MAIN = [sys.executable, "-c", "from quantcli.cli import main; main()"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the residual net and 40 samples, to run in."""
    residual_net(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(6).standard_t(4, size=(40, 3, 8, 8)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], command: str) -> Any:
    """Run a command with --json and return what it printed."""
    capsys.readouterr()
    assert run([*command.split(), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


CALIBRATE = "calibrate m.onnx --data d.npz --batch 4"


@pytest.mark.parametrize("observer", ["minmax", "mean-minmax", "percentile", "mse", "entropy"])
def test_shards_merged_are_the_whole(capsys: pytest.CaptureFixture[str], observer: str) -> None:
    told(capsys, f"{CALIBRATE} --observer {observer} --channels -o whole.stats")
    for shard in (2, 0, 3, 1):
        told(capsys, f"{CALIBRATE} --observer {observer} --channels --shard {shard}/4 -o s{shard}.stats")
    merged = told(capsys, "merge s3.stats s0.stats s2.stats s1.stats -o merged.stats")
    assert merged["parts"] == [[0, 40, 40]]
    whole = Path("whole.stats").read_bytes()
    if observer == "mean-minmax":  # moving averages are sums of products: the same but for their last bits
        one, other = (statistics.load(Path(name)) for name in ("whole.stats", "merged.stats"))
        assert [t.samples.mean for t in one.tensors.values()] == [t.samples.mean for t in other.tensors.values()]  # type: ignore[union-attr]
    else:
        assert Path("merged.stats").read_bytes() == whole


def test_missing_shards_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for shard in (0, 1):
        told(capsys, f"{CALIBRATE} --shard {shard}/3 -o s{shard}.stats")
    assert run(["merge", "s0.stats", "s1.stats", "-o", "part.stats"]) == 0
    assert "samples 24 to 39 of 40 are missing" in capsys.readouterr().err
    assert run(["merge", "s0.stats", "s0.stats", "-o", "twice.stats"]) == 1
    assert "counts samples that another file counts too" in capsys.readouterr().err
    assert not Path("twice.stats").exists()


@pytest.mark.parametrize("batch", [1, 3, 8, 40])
def test_ranges_do_not_depend_on_the_batch_or_the_shortcut(capsys: pytest.CaptureFixture[str], batch: int) -> None:
    """From four batches on, what Relu made is looked at in the graph; the extremes are those of whole tensors.

    Only the dense layer's sums may be ordered differently for one row than for several.
    """
    found = told(capsys, f"calibrate m.onnx --data d.npz --batch {batch} -o a.stats")["tensors"]
    whole = told(capsys, "calibrate m.onnx --data d.npz --batch 40 --observer all -o b.stats")["tensors"]
    assert found.keys() == whole.keys()
    for name in found:
        for end in ("minimum", "maximum"):
            assert found[name][end] == pytest.approx(whole[name][end], rel=1e-5)
    held = statistics.load(Path("a.stats")).tensors
    everything = statistics.load(Path("b.stats")).tensors
    assert {n: t.elements for n, t in held.items()} == {n: t.elements for n, t in everything.items()}


def test_highest_values_of_several_ranks_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """Convolutions in one and two dimensions, in whole blocks of channels and not: their highest values leave it together."""
    constants = {
        "w": normal(16, 3, 3, 3, seed=1),
        "v": normal(5, 16, 1, 1, seed=2),
        "shape": np.array([0, 5, -1]),
        "u": normal(4, 5, 3, seed=3),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "v"], ["b"]),
        node("Relu", ["b"], ["br"]),
        node("Reshape", ["br", "shape"], ["rows"]),
        node("Conv", ["rows", "u"], ["c"]),
        node("Relu", ["c"], ["y"]),
    ]
    save(Path("m.onnx"), nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 4, None]}, constants)
    told(capsys, f"{CALIBRATE} -o a.stats")
    told(capsys, "calibrate m.onnx --data d.npz --batch 40 -o b.stats")  # one batch: no shortcut
    found, whole = (statistics.load(Path(name)).tensors for name in ("a.stats", "b.stats"))
    assert {name: (t.minimum, t.elements) for name, t in found.items()} == {
        name: (t.minimum, t.elements) for name, t in whole.items()
    }
    for name, seen in found.items():  # sums of one batch and of another may be ordered differently
        assert seen.maximum == pytest.approx(whole[name].maximum, rel=1e-5)
    assert {"ar", "br", "y"} <= found.keys()


def test_one_calibration_serves_many_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, f"{CALIBRATE} --observer all -o s.stats")
    scales = {}
    for text in ("minmax", "mean-minmax", "moving-average", "percentile:99", "percentile:99.9", "mse", "entropy"):
        told(capsys, f"convert m.onnx --stats s.stats --range {text} -o q.onnx")
        document = json.loads(Path("q.json").read_text())
        assert document["recipe"]["activation"]["range"] == text
        scales[text] = document["tensors"]["x"]["scale"][0]
        direct = told(capsys, f"convert m.onnx --data d.npz --batch 4 --range {text} --effort fast -o direct.onnx")
        assert (
            direct["sha256"]
            == told(capsys, f"convert m.onnx --stats s.stats --range {text} --effort fast -o q2.onnx")["sha256"]
        )
    assert len(set(scales.values())) == len(scales)
    assert scales["entropy"] < scales["minmax"]
    assert scales["percentile:99"] < scales["percentile:99.9"] < scales["minmax"]


def test_the_range_of_the_observer_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, f"{CALIBRATE} --observer mse -o s.stats")
    told(capsys, "convert m.onnx --stats s.stats -o a.onnx")
    told(capsys, "convert m.onnx --stats s.stats --range mse -o b.onnx")
    assert Path("a.onnx").read_bytes() == Path("b.onnx").read_bytes()
    assert run(["convert", "m.onnx", "--stats", "s.stats", "--range", "mean-minmax", "-o", "c.onnx"]) == 1
    assert "--observer mean-minmax" in capsys.readouterr().err
    assert run(["convert", "m.onnx", "--data", "d.npz", "--observer", "minmax", "--range", "mse", "-o", "c.onnx"]) == 2
    assert "the observer minmax does not count what the range mse needs" in capsys.readouterr().err
    assert run(["convert", "m.onnx", "--stats", "s.stats", "--range", "middle", "-o", "c.onnx"]) == 2
    assert "there is no range 'middle'" in capsys.readouterr().err


# ---- interruptions -------------------------------------------------------------------------------------------------------------

LONG = f"{CALIBRATE} --batch 1 --observer all --checkpoint 0 -o s.stats"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_goes_on_to_the_same_file(here: Path, number: int) -> None:
    """Stopped twice at moments drawn at random, after its first checkpoint."""
    stored = np.random.default_rng(3).normal(size=(400, 3, 8, 8)).astype(np.float32)
    np.savez(here / "d.npz", x=stored)
    assert run([*LONG.replace("s.stats", "whole.stats").split(), "-q"]) == 0
    draw, partial = random.Random(int(number)), here / "s.stats.partial"
    stopped = 0
    for _ in range(2):
        before = partial.stat().st_mtime_ns if partial.exists() else 0
        process = subprocess.Popen([*MAIN, *LONG.split(), "--resume"], stderr=subprocess.PIPE, text=True)
        while process.poll() is None and (not partial.exists() or partial.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(number)
        errors = process.communicate()[1]
        stopped += process.returncode != 0
        if process.returncode > 0:  # else it was over already, or killed, perhaps while it was leaving
            assert process.returncode == 128 + number
            assert "--resume" in errors
            assert "Traceback" not in errors
    assert stopped
    assert run([*LONG.split(), "--resume", "-q"]) == 0
    assert (here / "s.stats").read_bytes() == (here / "whole.stats").read_bytes()
    assert not partial.exists()


def test_a_checkpoint_of_something_else_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = statistics.Statistics(
        "a" * 64, "b" * 64, {}, 0, "minmax", {}, unfinished={"done": 1, "samples": 1, "finished": [], "shard": [0, 1]}
    )
    (here / "s.stats.partial").write_bytes(statistics.serialized(checkpoint))
    (here / ".s.stats.abcd.partial.older").touch()  # left by a kill while a checkpoint took its name
    assert run([*CALIBRATE.split(), "-o", "s.stats", "--resume"]) == 1
    assert "another calibration (model_sha256 differs)" in capsys.readouterr().err
    assert run([*CALIBRATE.split(), "-o", "s.stats"]) == 0  # without --resume it begins anew
    assert not [*here.glob("*.partial*"), *here.glob(".s*")]
    assert run(["convert", "m.onnx", "--stats", "s.stats", "-o", "q.onnx"]) == 0


# ---- data that is not there, or not finite -------------------------------------------------------------------------------------


def test_made_up_data_is_stamped_loud_and_refused_by_strict(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "m.onnx", "--synthetic", "8", "-o", "q.onnx"]) == 0
    assert "random data" in capsys.readouterr().err
    assert json.loads(Path("q.json").read_text())["calibration"]["synthetic"] is True
    assert run(["convert", "m.onnx", "--synthetic", "8", "--strict", "-o", "strict.onnx"]) == 5
    assert "--synthetic" in capsys.readouterr().err
    assert not (here / "strict.onnx").exists()
    for name in ("one", "two"):
        assert run(f"calibrate m.onnx --synthetic 8 --seed 3 -o {name}.stats".split()) == 0
        assert "made up" in capsys.readouterr().err
    assert Path("one.stats").read_bytes() == Path("two.stats").read_bytes()
    assert run(["convert", "m.onnx", "--stats", "one.stats", "--strict", "-o", "strict.onnx"]) == 5


def test_a_function_gives_batches(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my_data.py").write_text(
        "import numpy as np\n\ndef batches():\n    x = np.load('d.npz')['x']\n"
        "    for start in range(0, 40, 7):\n        yield {'x': x[start:start + 7]}\n"
    )
    found = told(capsys, "calibrate m.onnx --data-function my_data:batches --batch 4 -o f.stats")
    assert found["tensors"] == told(capsys, f"{CALIBRATE} -o s.stats")["tensors"]
    assert run(["calibrate", "m.onnx", "--data-function", "my_data:nothing", "-o", "g.stats"]) == 1
    assert "nothing" in capsys.readouterr().err
    assert run(["calibrate", "m.onnx", "--data-function", "my_data:batches", "--data", "d.npz", "-o", "g.stats"]) == 2


@pytest.mark.parametrize("how", ["--quiet", "--verbose", "--json"])
def test_what_numpy_warns_of_is_a_detail(
    here: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder, how: str
) -> None:
    name, before = f"zeros_{how.strip('-')}", warnings.showwarning
    (here / f"{name}.py").write_text(
        "import numpy as np\n\ndef batches():\n    np.log(np.zeros(1))\n    yield {'x': np.load('d.npz')['x']}\n"
    )
    assert run(["calibrate", "m.onnx", "--data-function", f"{name}:batches", "-o", "f.stats", how]) == 0
    assert ("RuntimeWarning: divide by zero" in capsys.readouterr().err) == (how == "--verbose")
    assert not [warned for warned in recwarn if warned.category is RuntimeWarning]
    assert warnings.showwarning is before


def test_a_conversion_opens_its_data_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For calibration, for the samples that tuning runs, and for what equalization observes."""
    (here / "told.py").write_text(
        "import numpy as np\n\ndef batches():\n    with open('calls', 'a') as file:\n        file.write('.')\n"
        "    yield {'x': np.load('d.npz')['x']}\n"
    )
    (here / "r.toml").write_text("[tune]\nequalize = true\n")
    found = told(capsys, "convert m.onnx --data-function told:batches --recipe r.toml -o q.onnx")
    assert (here / "calls").read_text() == "."
    assert found["sha256"] == told(capsys, "convert m.onnx --data d.npz --recipe r.toml -o p.onnx")["sha256"]


def test_non_finite_values_are_counted_where_allowed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Sqrt", ["c"], ["s"]), node("Conv", ["s", "v"], ["y"])]
    constants = {"w": normal(4, 3, 1, 1, seed=1), "v": normal(2, 4, 1, 1, seed=2)}
    save(here / "nan.onnx", nodes, {"x": ["N", 3, 8, 8]}, {"y": None}, constants)
    command = "calibrate nan.onnx --data d.npz -o s.stats"
    assert run(command.split()) == 1
    assert "tensor 's', samples 0 to" in capsys.readouterr().err
    assert run([*command.split(), "--allow-non-finite", "--observer", "all"]) == 0
    assert "warning: tensor 's':" in capsys.readouterr().err
    seen = statistics.load(Path("s.stats")).tensors["s"]
    assert seen.nan > 0
    assert seen.nan + seen.elements == 40 * 4 * 64
    assert seen.minimum >= 0


# ---- memory, runtimes, inspect -------------------------------------------------------------------------------------------------


def test_memory_shrinks_the_batch_or_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    held = told(capsys, "calibrate m.onnx --data d.npz -o s.stats")["batch"]
    assert held == 64
    assert told(capsys, "calibrate m.onnx --data d.npz --max-memory 16GB -o s.stats")["batch"] == 64
    assert run(["calibrate", "m.onnx", "--data", "d.npz", "--max-memory", "1MB", "-o", "t.stats"]) == 1
    assert "raise --max-memory" in capsys.readouterr().err
    assert not Path("t.stats").exists()
    assert run(["calibrate", "m.onnx", "--data", "d.npz", "--max-memory", "much", "-o", "t.stats"]) == 2


def test_a_batch_fits_between_what_is_held_and_what_is_allowed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantcli.observation.resident_bytes", lambda: 100 << 20)
    whole = told(capsys, "calibrate m.onnx --data d.npz --max-memory 110.2MB -o s.stats")
    assert 1 < whole["batch"] < 32


def test_samples_for_self_checks_are_as_many_whatever_the_batch_unless_they_are_large(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(batch: int) -> int:
        told(capsys, f"calibrate m.onnx --data d.npz --batch {batch} -o s.stats")
        return len(statistics.load(Path("s.stats")).check_inputs["x"])

    assert [kept(batch) for batch in (1, 2, 32)] == [4, 4, 4]
    monkeypatch.setattr("quantcli.observation.CHECK_BYTES", 1)
    assert [kept(batch) for batch in (1, 2, 32)] == [1, 2, 4]
    assert run(["convert", "m.onnx", "--stats", "s.stats", "-o", "q.onnx"]) == 0
    assert "over 4 samples" in capsys.readouterr().out
    told(capsys, "calibrate m.onnx --data d.npz --batch 1 -o s.stats")
    assert run(["convert", "m.onnx", "--stats", "s.stats", "-o", "q.onnx"]) == 0
    assert "over 1 sample\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", ["--shard 4/4", "--shard 1", "--shard a/b", "--shard 0/0", "--momentum 1", "--momentum -1", "--checkpoint -1",
                "--device tpu", "--runtime numpy", "--device cuda --runtime onnxruntime", "--synthetic 0", "--shard 90/99"]
)  # fmt: skip
def test_options_that_mean_nothing_are_usage_errors(capsys: pytest.CaptureFixture[str], options: str) -> None:
    assert run([*CALIBRATE.split(), "-o", "s.stats", *options.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not Path("s.stats").exists()


def test_torch_runs_pytorch_models_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*CALIBRATE.split(), "-o", "s.stats", "--runtime", "torch"]) == 1
    assert "no PyTorch model" in capsys.readouterr().err


def test_inspect_shows_ranges_clips_and_histograms(capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, f"{CALIBRATE} --observer all --channels -o s.stats")
    assert run(["inspect", "s.stats", "--range", "percentile:99"]) == 0
    shown = capsys.readouterr().out
    assert "percentile:99" in shown
    assert "█" in shown
    found = told(capsys, "inspect s.stats --range percentile:99")
    x = np.load("d.npz")["x"]
    entry = found["tensors"]["x"]
    assert (entry["minimum"], entry["maximum"]) == (float(x.min()), float(x.max()))
    assert entry["clipped"] == pytest.approx(0.01, abs=0.003)
    assert entry["outliers"] > 1
    assert entry["channel_spread"] >= 1
    none = told(capsys, "inspect s.stats --range minmax")["tensors"]["x"]
    assert none["clipped"] == 0
    assert run(["inspect", "m.onnx"]) == 1
    assert "not a statistics file" in capsys.readouterr().err


def test_inspect_shows_plain_extremes(capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, f"{CALIBRATE} -o s.stats")
    assert run(["inspect", "s.stats"]) == 0
    shown = capsys.readouterr().out
    assert "lowest" in shown
    assert "histogram" not in shown


def test_sequences_of_different_lengths_calibrate(here: Path) -> None:
    nodes = [node("Gather", ["table", "ids"], ["e"]), node("MatMul", ["e", "w"], ["y"])]
    constants = {"table": normal(20, 8, seed=1), "w": normal(8, 4, seed=2)}
    save(here / "t.onnx", nodes, {"ids": ["N", "S"]}, {"y": None}, constants, kinds={"ids": TensorProto.INT64})
    rows = [{"ids": list(range(length))} for length in (3, 3, 5, 1, 5, 5)]
    (here / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert run(["convert", "t.onnx", "--data", "d.jsonl", "--verify", "-o", "t.int8.onnx"]) == 0
    assert json.loads(Path("t.int8.json").read_text())["calibration"]["samples"] == 6


def clipping(between: str | None) -> None:
    """Write convolutions with a Relu6 each and a Softmax behind them, and perhaps an operator between."""
    constants = {
        "w": normal(16, 3, 3, 3, seed=1),
        "v": normal(5, 16, 1, 1, seed=2),
        "low": np.array(0, np.float32),
        "high": np.array(6, np.float32),
    }
    nodes = [
        node("Conv", ["x", "w"], ["a"]),
        node("Clip", ["a", "low", "high"], ["ar"]),
        *([node(between, ["ar"], ["p"])] if between else []),
        node("Conv", ["p" if between else "ar", "v"], ["b"]),
        node("Clip", ["b", "low", "high"], ["br"]),
        node("Softmax", ["br"], ["y"], axis=1),
    ]
    save(Path("m.onnx"), nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 5, 6, 6]}, constants)


def test_a_softmax_behind_everything_that_is_observed_does_not_matter() -> None:
    """It could make a NaN, but nobody would read it: extremes may leave the graph alone, and ceilings hold."""
    clipping(None)
    placement = place(fold(load(Path("m.onnx")).graph), Recipe())
    assert [layer.operator for layer in placement.floats] == ["Softmax"]
    known = known_of(placement)
    assert known.ends == {"ar": (0.0, 6.0), "br": (0.0, 6.0)}
    assert 1e9 < known.limit < 1e15
    assert poolable(placement, known) == frozenset()  # with both ends known, most are not read any more anyway


def test_behind_what_stays_float_only_as_it_is_faster_extremes_may_leave_the_graph_alone() -> None:
    constants = {"w": normal(16, 3, 3, 3, seed=1), "v": normal(5, 16, 1, 1, seed=2)}
    nodes = [
        node("Conv", ["x", "w"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "v"], ["b"]),
        node("Relu", ["b"], ["br"]),
    ]
    save(Path("m.onnx"), nodes, {"x": ["N", 3, 32, 32]}, {"br": ["N", 5, 32, 32]}, constants)
    folded = fold(load(Path("m.onnx")).graph)
    assert [layer.operator for layer in place(folded, Recipe()).floats] == ["Conv", "Relu"]
    placement = place(folded, with_integer_start(Recipe()))
    assert poolable(placement, known_of(placement)) == {"ar", "br"}


def test_behind_an_operator_that_stays_float_no_extreme_leaves_the_graph_alone() -> None:
    clipping("Exp")
    placement = place(fold(load(Path("m.onnx")).graph), Recipe())
    assert [layer.operator for layer in placement.floats] == ["Exp", "Softmax"]
    known = known_of(placement)
    assert known.limit == 0
    assert poolable(placement, known) == frozenset()


@pytest.mark.parametrize("observer", ["minmax", "percentile", "all"])
def test_statistics_do_not_depend_on_what_is_known_of_a_clip(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, observer: str
) -> None:
    clipping(None)
    np.savez("d.npz", x=np.random.default_rng(6).normal(size=(480, 3, 8, 8)).astype(np.float32))
    told(capsys, f"calibrate m.onnx --data d.npz --batch 3 --observer {observer} -o a.stats")
    monkeypatch.setattr("quantcli.known.made_by_layers", lambda _: False)
    told(capsys, f"calibrate m.onnx --data d.npz --batch 3 --observer {observer} -o b.stats")
    assert Path("a.stats").read_bytes() == Path("b.stats").read_bytes()
    seen = statistics.load(Path("a.stats")).tensors["ar"]
    assert (seen.minimum, seen.maximum) == (0.0, 6.0)
    assert seen.histogram is None or seen.histogram.stride > 1
