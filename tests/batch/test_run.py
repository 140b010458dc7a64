"""A zoo: every entry its own verdict, nothing done twice, and a kill loses no more than what was in flight."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest

from quantcli.batch import local
from quantcli.batch.entry import Entry, Wishes
from quantcli.batch.local import Ended
from quantcli.batch.manifest import read_zoo
from quantcli.batch.run import run_batch
from quantcli.cli import run
from quantcli.errors import OutputError
from quantcli.recipe import Recipe
from tests.graphs import node, normal, residual_net, save
from tests.pages import CHROMIUM, Charts, figures, looked_at

if TYPE_CHECKING:
    from collections.abc import Sequence

from tests.batch.zoos import METRICS, ONE, ZOO, moved, results_of, statuses, told


def test_a_zoo_is_judged_and_nothing_is_done_twice(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'} --jobs 2"
    code, first = told(capsys, command)
    assert code == 4
    assert first["ran"] == 6
    assert statuses(first) == {
        "a/w8": "met", "a/w4": "met", "b/w8": "met", "b/w4": "met", "demanding/w8": "missed", "corrupt/w8": "failed",
    }  # fmt: skip
    reasons = {entry["name"]: entry["reason"] for entry in first["entries"]}
    assert "less than the 100.5 asked" in reasons["demanding/w8"]
    assert "is not an ONNX model" in reasons["corrupt/w8"]
    results = (zoo / "out" / "results.json").read_bytes()
    assert json.loads(results)["summary"] == {"entries": 6, "failed": 1, "met": 4, "missed": 1}

    suite = ET.parse(zoo / "out" / "junit.xml").getroot().find("testsuite")  # noqa: S314 - it is ours
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("6", "1", "1")
    page = (zoo / "out" / "index.html").read_text()
    assert "4 of 6 entries met" in page
    for link in ("entries/a/w4/model.json", "entries/corrupt/w8/log.txt"):
        assert f'href="{link}"' in page
        assert (zoo / "out" / link).is_file()
    assert "http" not in page

    code, second = told(capsys, command)
    assert (code, second["ran"]) == (4, 0)
    assert (zoo / "out" / "results.json").read_bytes() == results

    # One line of one recipe, and its entries alone; thresholds are judged anew without any run.
    changed = ZOO.replace("weight = {bits = 4}", "weight = {bits = 5}").replace("min_metric = 100.5", "min_metric = 0")
    (zoo / "zoo.toml").write_text(changed)
    code, third = told(capsys, command)
    assert (code, third["ran"]) == (4, 2)
    assert statuses(third)["demanding/w8"] == "met"
    residual_net(zoo / "corrupt.onnx")
    code, fourth = told(capsys, command)
    assert (code, fourth["ran"]) == (0, 1)
    code, fifth = told(capsys, f"{command} --fresh")
    assert (code, fifth["ran"]) == (0, 6)
    gone = zoo / "out" / "entries" / "a" / "w8" / "model.onnx"
    gone.unlink()
    assert told(capsys, command)[1]["ran"] == 1
    assert gone.is_file()


def test_a_report_of_each_entry_shows_what_the_results_hold(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (zoo / "zoo.toml").write_text(ZOO.replace("timeout = 60", "timeout = 60\nreport = true"))
    assert told(capsys, f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'} --jobs 2")[0] == 4
    results = json.loads((zoo / "out" / "results.json").read_text())
    index = (zoo / "out" / "index.html").read_text()
    shown = 0
    for entry in results["entries"]:
        page = zoo / "out" / "entries" / entry["name"] / "report.html"
        assert page.is_file() == (entry["status"] != "failed")
        if not page.is_file():
            continue
        assert f'href="entries/{entry["name"]}/report.html"' in index
        parsed, charts = Charts(), entry["charts"]
        parsed.feed(page.read_text())
        drawn = [values for _, _, values in parsed.charts]
        assert drawn == [
            [layer["sqnr_db"] for layer in charts["layers"]],
            *([count for count in one["counts"] if count] for one in charts["activations"]),
            *(one["largest"] for one in charts["weights"]),
        ]
        assert figures(page.read_text())["quantized"] == entry["quantized"]
        shown += 1
    assert shown == 5
    if CHROMIUM is not None:
        for width in (1280, 390):
            looked_at(zoo / "out" / "index.html", tmp_path, width)
            looked_at(zoo / "out" / "entries" / "a" / "w4" / "report.html", tmp_path, width)


def test_a_zoo_of_c_source(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ZOO.replace("timeout = 60", 'timeout = 60\nformat = "c"\nverify = true').partition(
        '[[models]]\npath = "nets/a.onnx"'
    )[0]
    (zoo / "zoo.toml").write_text(text)
    command = f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'} --jobs 2"
    code, first = told(capsys, command)
    assert (code, first["ran"]) == (0, 4)
    for entry in first["entries"]:
        source = zoo / "out" / "entries" / entry["name"] / "c"
        assert {"model.c", "kernels.c", "model.onnx", "model.json"} <= {file.name for file in source.iterdir()}
        assert entry["output"] == "c/model.onnx"
        assert entry["ram_bytes"] > 0
        assert f'href="entries/{entry["name"]}/c/model.json"' in (zoo / "out" / "index.html").read_text()
    assert told(capsys, command)[1]["ran"] == 0


def test_every_failure_is_its_own(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"batch {zoo / 'failing.toml'} -o {zoo / 'out'} --jobs 2"
    code, document = told(capsys, command)
    assert code == 4
    assert statuses(document) == {
        "never/default": "timeout",
        "hog/default": "memory",
        "dies/default": "crashed",
        "killed/default": "crashed",
        "raises/default": "failed",
        "unjudged/default": "failed",
    }
    reasons = {entry["name"]: entry["reason"] for entry in document["entries"]}
    assert "more than 4 seconds" in reasons["never/default"]
    assert "code 3" in reasons["dies/default"]
    assert "SIGSEGV" in reasons["killed/default"]
    assert "no such luck" in reasons["raises/default"]
    assert "--max-drop has no meaning for sqnr" in reasons["unjudged/default"]
    assert not (zoo / "out" / ".work").exists()
    assert told(capsys, command)[1]["ran"] == 0
    (zoo / "mine.py").write_text(METRICS.replace("os._exit(3)", "return 1.0"))
    assert told(capsys, f"{command} --retry")[1]["ran"] >= 5
    assert statuses(told(capsys, command)[1])["dies/default"] == "met"


@pytest.mark.parametrize(("number", "told_more"), [(signal.SIGKILL, True), (signal.SIGSEGV, False)])
def test_a_process_that_the_system_killed_tells_what_to_do(number: signal.Signals, told_more: bool) -> None:
    reason = local.died(-number)
    assert reason.startswith(f"the process was ended by {number.name}")
    assert all((word in reason) is told_more for word in ("most likely", "memory", "--jobs", "--retry"))


@pytest.mark.parametrize("after", [1, 3])
def test_a_kill_loses_what_was_in_flight_alone(
    zoo: Path, undisturbed: bytes, capsys: pytest.CaptureFixture[str], after: int
) -> None:
    command = f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'}"
    process = subprocess.Popen([sys.executable, "-m", "quantcli", *command.split(), "-q"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((zoo / "out").glob("entries/*/*/record.json"))) < after and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list((zoo / "out").glob("entries/*/*/record.json")))
    assert after <= kept < 6
    assert not (zoo / "out" / "results.json").exists()
    code, document = told(capsys, f"{command} --resume --jobs 2")
    assert (code, document["ran"]) == (4, 6 - kept)
    assert results_of(zoo) == undisturbed


def test_a_cluster_gives_the_same_bytes(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    x = normal(96, 3, 8, 8, seed=9)
    np.savez(zoo / "data.npz", x=x)  # more than one batch
    _, here = told(capsys, f"batch {zoo / 'zoo.toml'} -o {zoo / 'here'} --jobs 2")
    # There, calibrations run in two parts.
    (zoo / "zoo.toml").write_text(ZOO.replace('path = "nets/*.onnx"', 'path = "nets/*.onnx"\nshards = 2'))
    code, there = told(capsys, f"batch {zoo / 'zoo.toml'} -o {zoo / 'there'} --engine ray")
    assert code == 4
    assert {**here, "folder": ""} == {**there, "folder": ""}
    files = sorted(file.relative_to(zoo / "here") for file in (zoo / "here").rglob("model.*"))
    assert len(files) == 10
    for file in files:
        assert (zoo / "here" / file).read_bytes() == (zoo / "there" / file).read_bytes()


def test_what_an_entry_reads_is_laid_out_elsewhere(zoo: Path) -> None:
    (zoo / "images").mkdir()
    (zoo / "images" / "a.txt").write_text("a")
    text = '[[models]]\npath = "nets/a.onnx"\ndata = "images"\nlabels = "data.npz"\nmetric = "mine:never"\nfactory = "mine.py:x"\n'
    (zoo / "one.toml").write_text(text)
    (entry,) = read_zoo(zoo / "one.toml")
    laid, renamed = moved(entry, zoo / "elsewhere")
    assert Path(laid.path).read_bytes() == (zoo / "nets" / "a.onnx").read_bytes()
    assert (Path(str(laid.wishes.data)) / "a.txt").read_text() == "a"
    assert laid.wishes.factory is not None
    assert laid.wishes.factory.endswith("mine.py:x")
    assert (Path(laid.folder) / "mine.py").read_text() == METRICS
    assert renamed[laid.path] == entry.path
    assert laid.key({}) != ""
    assert all(str(zoo / "elsewhere") in str(path) for path in laid.places().values())


def test_modules_that_an_entry_imports_are_laid_out_side_by_side(zoo: Path) -> None:
    (zoo / "pkg").mkdir()
    (zoo / "pkg" / "nets.py").write_text("build = None")
    (zoo / "mine").mkdir()  # no package: the file of that name is what is imported
    text = '[[models]]\npath = "nets/a.onnx"\nmetric = "mine:never"\nfactory = "pkg.nets:build"\n'
    (zoo / "one.toml").write_text(text)
    (entry,) = read_zoo(zoo / "one.toml")
    laid, _ = moved(entry, zoo / "elsewhere")
    assert laid.wishes.factory == "pkg.nets:build"
    assert (Path(laid.folder) / "mine.py").read_text() == METRICS
    assert (Path(laid.folder) / "pkg" / "nets.py").read_text() == "build = None"
    assert laid.key({}) == entry.key({})


def test_nothing_beside_a_manifest_takes_a_modules_place(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (zoo / "calibration.py").write_text("raise RuntimeError('imported')\n")
    (zoo / "zoo.toml").write_text('[[models]]\npath = "nets/a.onnx"\ndata = "data.npz"\nrecipe = "fast.toml"\n')
    code, document = told(capsys, f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'}")
    assert (code, statuses(document)) == (0, {"a/default": "met"})


def test_a_worker_whose_parent_is_gone_does_nothing(zoo: Path) -> None:
    (entry, *_) = read_zoo(zoo / "zoo.toml")
    (zoo / "entry.json").write_bytes(msgspec.json.encode(entry))
    command = [sys.executable, "-m", "quantcli.batch.worker", str(zoo / "entry.json"), str(zoo / "elsewhere")]
    for parent, made in ((1, False), (os.getpid(), True)):
        ended = subprocess.run([*command, str(parent)], check=False, cwd=zoo)
        assert (ended.returncode == 0, (zoo / "elsewhere" / "result.json").is_file()) == (made, made)


def test_reasons_and_warnings_name_files_as_the_manifest_does(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = [node("RandomNormalLike", ["x"], ["r"]), node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "r"], ["y"])]
    save(zoo / "random.onnx", random, {"x": ["n", 8]}, {"y": ["n", 8]}, {"w": normal(8, 8)})
    np.savez(zoo / "rows.npz", x=normal(8, 8))
    (zoo / "elsewhere" / "zoo.toml").write_text(
        '[defaults]\ndata = "../rows.npz"\nrecipe = "../fast.toml"\n[[models]]\npath = "../corrupt.onnx"\n'
        '[[models]]\npath = "absent.onnx"\n[[models]]\npath = "../random.onnx"\n'
    )
    assert run(["batch", str(zoo / "elsewhere" / "zoo.toml"), "-o", "out", "-q"]) == 4
    results = (Path("out") / "results.json").read_text()
    corrupt, absent, drawing = json.loads(results)["entries"]
    assert corrupt["reason"].startswith("../corrupt.onnx is not an ONNX model")
    assert absent["reason"].startswith("there is no model at absent.onnx;")
    (warning,) = drawing["warnings"]
    assert warning.startswith("random numbers are drawn by RandomNormalLike 'r_node'")
    assert f"random/default: {warning}" in capsys.readouterr().err
    assert "random numbers are drawn by" in (Path("out") / "index.html").read_text()
    junit = ET.parse(Path("out") / "junit.xml").getroot()  # noqa: S314 - it is ours
    assert [case.findtext("system-out") for case in junit.iter("testcase")] == [None, None, f"warning: {warning}"]
    assert str(zoo) not in results


def test_a_message_is_shown_without_the_manifests_folder() -> None:
    entry = Entry("a/b", "/zoo/a.onnx", Recipe(), Wishes(), "/zoo")
    assert entry.shown("/zoo/a.onnx is wrong, '/zoo/../b' too, (/zoo/x y)") == "a.onnx is wrong, '../b' too, (x y)"
    assert entry.shown("/other/zoo/a, /zoology/a, /zoo itself") == "/other/zoo/a, /zoology/a, /zoo itself"


def test_folders_may_have_names_that_are_no_utf8(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(os.fsencode(zoo) + b"/\xff"))
    try:
        (zoo / "nets").rename(folder)
    except OSError:
        pytest.skip("the file system has no such names")
    manifest = ONE.replace("nets/", "").replace("data.npz", "../data.npz") + 'recipe = "../fast.toml"\n'
    (folder / "zoo.toml").write_text(manifest + manifest.replace("../data", "data") + 'name = "failing"\n')
    assert run(["batch", str(folder / "zoo.toml"), "-o", str(folder / "out")]) == 4
    results = json.loads((folder / "out" / "results.json").read_text())
    assert statuses(results) == {"a/default": "met", "failing/default": "failed"}
    assert results["entries"][1]["reason"].startswith("there is no data at data.npz;")
    capsys.readouterr()
    made = folder / "out" / "entries" / "a" / "default" / "model.onnx"
    command = ["eval", made, "--float", folder / "a.onnx", "--data", zoo / "labelled.npz", "--memory", "--json"]
    assert run(list(map(str, command))) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["bytes"] > 0


def test_a_second_run_in_one_folder_is_refused(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries, output = read_zoo(zoo / "zoo.toml"), zoo / "out"

    def engine(waiting: Sequence[Entry], workplace: Path, _jobs: int, finished: Any) -> None:
        (workplace / "held").write_text("of the first")
        with pytest.raises(OutputError, match="another run is at work"):
            run_batch(entries, output)
        assert run(["batch", str(zoo / "zoo.toml"), "-o", str(output)]) == 1
        assert (workplace / "held").is_file()
        for entry in waiting:
            (workplace / entry.name.replace("/", "@")).mkdir()
            finished(entry, Ended("failed", "as it happens", {}, 0.0), workplace / entry.name.replace("/", "@"))

    assert len(run_batch(entries, output, engine=engine)) == len(entries)
    assert "another run is at work" in capsys.readouterr().err
    assert len(run_batch(entries, output)) == len(entries)  # the first has let go


def test_a_speed_that_was_missed_is_measured_again_where_that_is_asked(tmp_path: Path) -> None:
    """Of another machine, or one with other work, it says nothing; a drop that was missed is the same every time."""
    residual_net(tmp_path / "net.onnx")
    wishes = Wishes(metric="top1", max_drop=1.0, min_speedup=1.2)
    entry = Entry("net/default", str(tmp_path / "net.onnx"), Recipe(), wishes, str(tmp_path))
    speeds = [1.0, 1.1, 1.5]
    figures = {"metric": "top1", "quantized": 90.0, "float": 90.5, "drop": 0.5}

    def engine(waiting: Sequence[Entry], workplace: Path, _jobs: int, finished: Any) -> None:
        for one in waiting:
            (workplace / "made").mkdir()
            finished(one, Ended("done", "", {**figures, "speedup": speeds.pop(0)}, 0.0), workplace / "made")

    def verdict(retry: bool, entry: Entry = entry) -> tuple[str, bool]:
        (outcome,) = run_batch([entry], tmp_path / "out", retry=retry, engine=engine)
        return outcome.status, outcome.cached

    assert [verdict(False), verdict(False), verdict(True)] == [("missed", False), ("missed", True), ("missed", False)]
    assert [verdict(True), verdict(True)] == [("met", False), ("met", True)]
    demanding = msgspec.structs.replace(entry, wishes=msgspec.structs.replace(wishes, max_drop=0.1))
    assert verdict(True, demanding) == ("missed", True)


def test_what_an_entry_lacks_is_said_in_the_manifests_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    residual_net(tmp_path / "net.onnx")
    models = ['path = "net.onnx"', 'path = "gone.onnx"', 'path = "net.onnx"\nname = "blind"\ndata = "gone.npz"']
    (tmp_path / "zoo.toml").write_text("".join(f"[[models]]\n{model}\n" for model in models))
    code, document = told(capsys, f"batch {tmp_path / 'zoo.toml'} -o {tmp_path / 'out'}")
    assert code == 4
    reasons = [entry["reason"] for entry in document["entries"]]
    assert reasons[0] == "the entry has no calibration data; give data, of the model or in [defaults]"
    assert [reason.partition(";")[0] for reason in reasons[1:]] == [
        "there is no model at gone.onnx",
        "there is no data at gone.npz",
    ]


def test_an_interruption_waits_for_no_worker_that_is_about_to_start(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def slow(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        time.sleep(0.3)  # the interruption comes before there is a process
        return popen(command, **options)

    popen = subprocess.Popen
    monkeypatch.setattr(local, "wait", interrupted)
    monkeypatch.setattr(subprocess, "Popen", slow)
    entries = [entry for entry in read_zoo(zoo / "failing.toml") if entry.name == "never/default"]
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_batch(entries, zoo / "out")
    assert time.monotonic() - began < 3  # it would have been ended after 4 seconds
    assert not (zoo / "out" / ".work").exists()
