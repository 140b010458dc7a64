"""Nothing is done twice: what an entry follows from, and what is run again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from quantcli.batch.local import Ended
from quantcli.batch.manifest import read_zoo
from quantcli.batch.run import Outcome
from tests.batch.zoos import DONE, ONE, moved, ran, statuses, told
from tests.graphs import normal


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
