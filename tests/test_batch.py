"""A zoo: every entry its own verdict, nothing done twice, and a kill loses no more than what was in flight."""

from __future__ import annotations

import json
import os
import shutil
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
from quantcli.batch.cluster import Place, laid_out
from quantcli.batch.entry import Entry, files_of
from quantcli.batch.local import Ended
from quantcli.batch.manifest import FORMATS, bytes_in, read_zoo
from quantcli.batch.run import Outcome, run_batch
from quantcli.cli import run
from quantcli.errors import OutputError, RecipeError
from quantcli.evaluation.junit import Case, junit
from tests.graphs import normal, residual_net
from tests.pages import CHROMIUM, Charts, figures, looked_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

METRICS = """
import os, time

def never(outputs, labels):
    time.sleep(1000)

def hog(outputs, labels):
    held = [bytearray(20_000_000) for _ in range(200)]
    return float(sum(len(part) for part in held))

def dies(outputs, labels):
    os._exit(3)

def killed(outputs, labels):
    os.kill(os.getpid(), 11)

def raises(outputs, labels):
    raise ValueError("no such luck")
"""

ZOO = """
[defaults]
data = "data.npz"
evaluate = "labelled.npz"
metric = "top1"
max_drop = 100
timeout = 60

[recipes.w8]
tune = {effort = "fast"}
[recipes.w4]
tune = {effort = "fast"}
weight = {bits = 4}

[[models]]
path = "nets/*.onnx"

[[models]]
path = "nets/a.onnx"
name = "demanding"
min_metric = 100.5
recipes = ["w8"]

[[models]]
path = "corrupt.onnx"
recipes = ["w8"]
"""

FAILING = """
[defaults]
data = "data.npz"
recipe = "fast.toml"
timeout = 60

[[models]]
path = "nets/a.onnx"
name = "never"
metric = "mine:never"
timeout = 4

[[models]]
path = "nets/a.onnx"
name = "hog"
metric = "mine:hog"
memory = "900MB"

[[models]]
path = "nets/a.onnx"
name = "dies"
metric = "mine:dies"

[[models]]
path = "nets/a.onnx"
name = "killed"
metric = "mine:killed"

[[models]]
path = "nets/a.onnx"
name = "raises"
metric = "mine:raises"

[[models]]
path = "nets/a.onnx"
name = "unjudged"
max_drop = 1
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models, data, metrics and manifests; the present folder is another one."""
    (tmp_path / "nets").mkdir()
    for name in "ab":
        residual_net(tmp_path / "nets" / f"{name}.onnx")
    (tmp_path / "corrupt.onnx").write_text("hello")
    x = normal(16, 3, 8, 8, seed=9)
    np.savez(tmp_path / "data.npz", x=x)
    np.savez(tmp_path / "labelled.npz", x=x, labels=np.arange(16) % 10)
    (tmp_path / "mine.py").write_text(METRICS)
    (tmp_path / "fast.toml").write_text('[tune]\neffort = "fast"\n')
    (tmp_path / "zoo.toml").write_text(ZOO)
    (tmp_path / "failing.toml").write_text(FAILING)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], command: str) -> tuple[int, dict[str, Any]]:
    code = run([*command.split(), "--json"])
    return code, json.loads(capsys.readouterr().out)


def statuses(document: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in document["entries"]}


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
def test_a_kill_loses_what_was_in_flight_alone(zoo: Path, capsys: pytest.CaptureFixture[str], after: int) -> None:
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
    whole = (zoo / "out" / "results.json").read_bytes()
    assert told(capsys, f"batch {zoo / 'zoo.toml'} -o {zoo / 'anew'} --jobs 2")[0] == 4
    assert (zoo / "anew" / "results.json").read_bytes() == whole


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


def moved(entry: Entry, top: Path) -> tuple[Entry, dict[str, str]]:
    """Lay out what an entry reads, as a node of a cluster does."""
    places, contents = [], []
    for field, path in entry.places().items():
        root = path if path.is_dir() else path.parent
        files = files_of(path)
        places.append(Place(field, path.name, path.is_dir(), tuple(str(file.relative_to(root)) for file in files)))
        contents += [file.read_bytes() for file in files]
    return laid_out(entry, places, contents, top)


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


@pytest.mark.parametrize(
    ("options", "message"), [("--address auto", "for --engine ray"), ("--shared", "for --engine ray")]
)
def test_options_of_a_cluster_need_it(
    zoo: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert run(["batch", str(zoo / "zoo.toml"), "-o", "out", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_entries_can_be_listed(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["batch", str(zoo / "zoo.toml"), "-o", "out", "--list"]) == 0
    assert "demanding/w8" in capsys.readouterr().out
    assert not Path("out").exists()


BROKEN = [
    ("", "names no model|missing required field"),
    ("models = 3", "not a manifest"),
    ('[[models]]\npath = "none/*.onnx"', "finds no file"),
    ('[[models]]\npath = "nets/*.onnx"\nname = "one"', "2 files for the one name"),
    ('[[models]]\npath = "nets/a.onnx"\n[[models]]\npath = "nets/a.onnx"', "two entries 'a/default'"),
    ('[[models]]\npath = "nets/a.onnx"\nrecipes = ["w3"]', "no recipe 'w3'"),
    ('[[models]]\npath = "nets/a.onnx"\nmemory = "much"', "no size"),
    ('[[models]]\npath = "nets/a.onnx"\ncolour = "red"', "colour"),
    ('[[models]]\npath = "nets/a.onnx"\nmax_drop = nan', "max_drop is nan"),
    ('[[models]]\npath = "nets/a.onnx"\nmin_metric = -inf', "min_metric is -inf"),
    ('[recipes.x]\nweight = {bits = 99}\n[[models]]\npath = "nets/a.onnx"', "unknown"),
    ('[recipes.x]\nweight = {bits = 99}\n[[models]]\npath = "nets/a.onnx"', r"a/x: \[recipes.x\] asks"),
    (
        '[defaults]\nrecipe = "fast.toml"\n[recipes.x]\ncolour = 3\n[[models]]\npath = "nets/a.onnx"',
        r"a/x: \[recipes.x\] asks",
    ),
    ('[recipes.x]\ntarget = "moon"\n[[models]]\npath = "nets/a.onnx"', "a/x: there is no target 'moon'"),
    ('[recipes.x.activation]\nbits = 12\n[[models]]\npath = "nets/a.onnx"', "a/x: activations of 12 bits do not fit"),
    ('[[models]]\npath = "nets/a.onnx"\nmetric = "top2"', "a/default: there is no metric 'top2'"),
    ('[[models]]\npath = "nets/a.onnx"\nformat = "tflite"', "a/default: there is no format 'tflite'"),
    ('[[models]]\npath = "nets/a.onnx"\noutput = "pth"', "a/default: there is no output 'pth'"),
    ('[[models]]\npath = "nets/a.onnx"\nmetric = "mse"\nmin_metric = 1', "a/default: .*better the lower"),
    ('[[models]]\npath = "nets/a.onnx"\nmetric = "sqnr"\nmax_drop = 1', "a/default: .*no meaning for sqnr"),
    ('[[models]]\npath = "nets/a.onnx"\nname = "../up"', "no name of an entry"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_a_manifest_that_means_nothing_is_refused(zoo: Path, text: str, message: str) -> None:
    (zoo / "zoo.toml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_zoo(zoo / "zoo.toml")


def test_a_manifest_and_a_recipe_may_begin_with_a_byte_order_mark(zoo: Path) -> None:
    for name in ("zoo.toml", "fast.toml"):
        (zoo / name).write_bytes(b"\xef\xbb\xbf" + (zoo / name).read_bytes())
    (zoo / "zoo.toml").write_text((zoo / "zoo.toml").read_text().replace("max_drop", 'recipe = "fast.toml"\nmax_drop'))
    assert len(read_zoo(zoo / "zoo.toml")) == 6


def test_a_manifest_knows_the_formats_that_are_written() -> None:
    from quantcli.delivery import C_FORMS
    from quantcli.write import WRITERS

    assert (*WRITERS, *C_FORMS) == FORMATS


def test_a_key_follows_from_contents_and_not_from_places(zoo: Path) -> None:
    before = {entry.name: entry.key({}) for entry in read_zoo(zoo / "zoo.toml")}
    assert len(set(before.values())) == len(before) - 1  # "demanding" is "a" with another threshold
    moved = zoo / "elsewhere" / "moved"
    shutil.copytree(zoo / "nets", moved / "nets")
    for name in ("data.npz", "labelled.npz", "corrupt.onnx", "zoo.toml"):
        shutil.copy(zoo / name, moved / name)
    assert {entry.name: entry.key({}) for entry in read_zoo(moved / "zoo.toml")} == before
    np.savez(moved / "data.npz", x=normal(16, 3, 8, 8, seed=10))
    assert not {entry.key({}) for entry in read_zoo(moved / "zoo.toml")} & set(before.values())


def test_a_key_follows_from_code_and_from_where_files_of_a_folder_stand(zoo: Path) -> None:
    (zoo / "pkg").mkdir()
    (zoo / "pkg" / "met.py").write_text("def of(outputs, labels):\n    return 95\n")
    (zoo / "images" / "a").mkdir(parents=True)
    (zoo / "images" / "a" / "1.png").write_bytes(b"1")
    text = '[[models]]\npath = "nets/a.onnx"\ndata = "images"\nmetric = "pkg.met:of"\nfactory = "mine:build"\n'
    (zoo / "zoo.toml").write_text(text)

    def key() -> str:
        return read_zoo(zoo / "zoo.toml")[0].key({})

    keys = [key()]
    (zoo / "pkg" / "__pycache__").mkdir()
    (zoo / "pkg" / "__pycache__" / "met.pyc").write_bytes(b"compiled")
    assert key() == keys[0]
    (zoo / "pkg" / "met.py").write_text("def of(outputs, labels):\n    return 10\n")
    keys.append(key())
    (zoo / "mine.py").write_text("build = None\n")
    keys.append(key())
    (zoo / "images" / "a").rename(zoo / "images" / "b")
    keys.append(key())
    assert len(set(keys)) == 4


def test_a_key_follows_from_what_code_imports_beside_it(zoo: Path) -> None:
    (zoo / "zoo.toml").write_text(
        '[[models]]\npath = "nets/a.onnx"\nmetric = "top:of"\nfactory = "nets/build.py:net"\n'
    )
    (zoo / "parts").mkdir()
    code = {
        "top.py": "import json, helper.x\ndef of(outputs, labels):\n    from parts import one\n",
        "helper.py": "import top\nvalue = 1\n",
        "parts/__init__.py": "",
        "parts/one.py": "from . import two\n",
        "parts/two.py": "import deep\n",
        "deep.py": "value = 1\n",
        "unused.py": "value = 1\n",
        "nets/build.py": "import layers\n",
        "nets/layers.py": "value = 1\n",
    }
    for name, text in code.items():
        (zoo / name).write_text(text)
    (entry,) = read_zoo(zoo / "zoo.toml")
    before = entry.key({})
    (zoo / "elsewhere" / "node").mkdir()
    laid, _ = moved(entry, zoo / "elsewhere" / "node")
    assert (Path(laid.folder) / "parts" / "two.py").is_file()
    assert laid.key({}) == before
    for name, text in code.items():
        (zoo / name).write_text(text + "more = 2\n")
        assert (entry.key({}) != before) == (name != "unused.py"), name
        (zoo / name).write_text(text)
    (zoo / "helper.py").write_text("this is no Python")
    assert entry.key({}) != before


def test_nothing_beside_a_manifest_takes_a_modules_place(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (zoo / "calibration.py").write_text("raise RuntimeError('imported')\n")
    (zoo / "zoo.toml").write_text('[[models]]\npath = "nets/a.onnx"\ndata = "data.npz"\nrecipe = "fast.toml"\n')
    code, document = told(capsys, f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'}")
    assert (code, statuses(document)) == (0, {"a/default": "met"})


@pytest.mark.parametrize("name", ["model.onnx", "model.json"])
def test_an_entry_whose_files_are_gone_or_cut_is_made_again(
    zoo: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (zoo / "zoo.toml").write_text('[[models]]\npath = "nets/a.onnx"\ndata = "data.npz"\nrecipe = "fast.toml"\n')
    made, command = zoo / "out" / "entries" / "a" / "default" / name, f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'}"
    assert told(capsys, command)[0] == 0
    whole = made.read_bytes()
    made.write_bytes(whole[:100])
    assert told(capsys, command)[0] == 0
    assert made.read_bytes() == whole
    made.unlink()
    assert told(capsys, command)[0] == 0
    assert made.read_bytes() == whole


def test_a_worker_whose_parent_is_gone_does_nothing(zoo: Path) -> None:
    (entry, *_) = read_zoo(zoo / "zoo.toml")
    (zoo / "entry.json").write_bytes(msgspec.json.encode(entry))
    command = [sys.executable, "-m", "quantcli.batch.worker", str(zoo / "entry.json"), str(zoo / "elsewhere")]
    for parent, made in ((1, False), (os.getpid(), True)):
        ended = subprocess.run([*command, str(parent)], check=False, cwd=zoo)
        assert (ended.returncode == 0, (zoo / "elsewhere" / "result.json").is_file()) == (made, made)


def ran(zoo: Path, manifest: str, ended: Ended, seen: Callable[[list[Outcome]], None] = lambda _: None) -> list[str]:
    """Run a manifest with an engine that does nothing but end every entry so; return the names of those that were run."""
    (zoo / "zoo.toml").write_text(manifest)
    names = []

    def engine(waiting: Sequence[Entry], workplace: Path, _jobs: int, finished: Any) -> None:
        for entry in waiting:
            names.append(entry.name)
            made = workplace / entry.name.replace("/", "@")
            made.mkdir()
            (made / "model.onnx").write_bytes(b"made")
            finished(entry, ended, made)

    seen(run_batch(read_zoo(zoo / "zoo.toml"), zoo / "out", engine=engine))
    return names


ONE = '[[models]]\npath = "nets/a.onnx"\ndata = "data.npz"\n'
DONE = Ended("done", "", {"output": "model.onnx", "bytes": 1, "float_bytes": 1, "charts": {"layers": []}}, 1.0)


@pytest.mark.parametrize(
    ("ended", "before", "same", "after"),
    [
        (Ended("timeout", "", {}, 4.1), "timeout = 4", False, "timeout = 5"),
        (Ended("timeout", "", {}, 4.1), "timeout = 4", False, "timeout = 0"),
        (Ended("memory", "", {}, 4.1), 'memory = "1GB"', False, 'memory = "2GB"'),
        (Ended("failed", "no space", {}, 1.0, passing=True), "timeout = 4", True, "timeout = 4"),
    ],
)
def test_what_was_too_little_is_no_verdict_where_there_is_more(
    zoo: Path, ended: Ended, before: str, same: bool, after: str
) -> None:
    assert ran(zoo, ONE + before, ended) == ["a/default"]
    assert bool(ran(zoo, ONE + before, ended)) == same
    assert ran(zoo, ONE + before.replace("4", "3").replace("1GB", "900MB"), ended) == ["a/default"] * same
    assert ran(zoo, ONE + after, DONE) == ["a/default"]
    assert ran(zoo, ONE + before, DONE) == []


def test_a_full_disk_is_no_verdict(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (zoo / "mine.py").write_text("def full(outputs, labels):\n    raise OSError(28, 'No space left on device')\n")
    (zoo / "zoo.toml").write_text(ONE + 'recipe = "fast.toml"\nmetric = "mine:full"\n')
    for _ in range(2):
        _, document = told(capsys, f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'}")
        assert (document["ran"], statuses(document)) == (1, {"a/default": "failed"})
    log = (zoo / "out" / "entries" / "a" / "default" / "log.txt").read_text()
    assert log.startswith("failed: the metric mine:full fails")


def test_a_report_or_a_speed_that_is_there_is_not_made_again(zoo: Path) -> None:
    charts: list[bool] = []

    def seen(outcomes: list[Outcome]) -> None:
        charts.append("charts" in outcomes[0].record.figures)

    assert ran(zoo, ONE + "report = true\nmin_speedup = 0", DONE, seen) == ["a/default"]
    for wishes in ("", "report = false", "report = true", "min_speedup = 2"):
        assert ran(zoo, ONE + wishes, DONE, seen) == []
    assert charts == [True, False, False, True, False]


def test_what_fails_with_a_report_is_tried_without(zoo: Path) -> None:
    ended = Ended("failed", "as it happens", {}, 1.0)
    assert ran(zoo, ONE + "report = true", ended) == ["a/default"]
    assert ran(zoo, ONE + "report = true", ended) == []
    assert ran(zoo, ONE, ended) == ["a/default"]


def test_a_default_that_is_written_out_and_a_new_name_of_data_change_nothing(zoo: Path) -> None:
    assert ran(zoo, ONE, DONE) == ["a/default"]
    written = 'format = "qdq"\noutput = "onnx"\nreport = false\nstrict = false\nverify = false\ntrust_pickle = false'
    assert ran(zoo, ONE + written, DONE) == []
    (zoo / "data.npz").rename(zoo / "renamed.npz")
    assert ran(zoo, ONE.replace("data.npz", "renamed.npz"), DONE) == []
    assert ran(zoo, ONE.replace("data.npz", "renamed.npz") + 'format = "qoperator"', DONE) == ["a/default"]


def test_a_pattern_does_not_find_what_the_batch_has_made(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = '[[models]]\npath = "**/*.onnx"\ndata = "data.npz"\n'
    (zoo / "corrupt.onnx").unlink()
    assert ran(zoo, manifest, DONE) == ["a/default", "b/default"]
    assert (zoo / "out" / "entries" / "a" / "default" / "model.onnx").is_file()
    _, listed = told(capsys, f"batch {zoo / 'zoo.toml'} -o {zoo / 'out'} --list")
    assert [entry["name"] for entry in listed["entries"]] == ["a/default", "b/default"]


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
    assert "\\udcff" in results["entries"][1]["reason"]
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


def test_junit_holds_no_character_that_xml_has_not() -> None:
    text = "bad \x1b[31m\x00 \ufffe \U0001ffff <&>"
    found = ET.fromstring(junit("q", [Case("a", "b", failure=text)]))  # noqa: S314 - it is ours
    failure = found.find(".//failure")
    assert failure is not None
    assert failure.get("message") == "bad �[31m� � � <&>"


def test_sizes() -> None:
    assert [bytes_in(text) for text in (None, "512", "4GB", "1.5MiB", "2k", "3 gb")] == [
        0, 512, 4 * 10**9, 3 * 2**19, 2000, 3 * 10**9,
    ]  # fmt: skip
