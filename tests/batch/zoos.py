"""How tests run a zoo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantcli.batch.cluster import Place, laid_out
from quantcli.batch.entry import Entry, files_of
from quantcli.batch.local import Ended
from quantcli.batch.manifest import read_zoo
from quantcli.batch.run import Outcome, run_batch
from quantcli.cli import run

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


def told(capsys: pytest.CaptureFixture[str], command: str) -> tuple[int, dict[str, Any]]:
    code = run([*command.split(), "--json"])
    return code, json.loads(capsys.readouterr().out)


def results_of(zoo: Path) -> bytes:
    """Return what is held of a zoo's run, without the zoo's own place, which a reason for a failure names."""
    return (zoo / "out" / "results.json").read_bytes().replace(str(zoo).encode(), b"")


def statuses(document: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in document["entries"]}


def moved(entry: Entry, top: Path) -> tuple[Entry, dict[str, str]]:
    """Lay out what an entry reads, as a node of a cluster does."""
    places, contents = [], []
    for field, path in entry.places().items():
        root = path if path.is_dir() else path.parent
        files = files_of(path)
        places.append(Place(field, path.name, path.is_dir(), tuple(str(file.relative_to(root)) for file in files)))
        contents += [file.read_bytes() for file in files]
    return laid_out(entry, places, contents, top)


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
