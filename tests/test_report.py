"""The report: one page without a network, whose charts carry the numbers that its JSON holds; looked at in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcli import Recipe, convert
from quantcli.cli import run
from quantcli.errors import ModelError
from quantcli.recipe import Layers, Tune
from quantcli.report.make import made as make
from tests.graphs import normal, residual_net

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Charts(HTMLParser):
    """Collects the charts of a page: their labels, and the numbers that their marks carry."""

    def __init__(self) -> None:
        super().__init__()
        self.charts: list[tuple[str, str, list[float]]] = []
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "svg":
            self.charts.append((given["class"] or "", given["aria-label"] or "", []))
        elif given.get("data-value") is not None:
            self.charts[-1][2].append(float(given["data-value"] or 0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the residual net, one operator excluded, under a name with markup in it."""
    folder = tmp_path_factory.mktemp("report")
    x = normal(32, 3, 8, 8, seed=9)
    np.savez(folder / "d.npz", x=x, labels=np.arange(32) % 10)
    recipe = Recipe(tune=Tune(effort="fast"), layers=Layers(exclude=("c3_node",)))
    model = residual_net(folder / "a<b>&.onnx")
    convert(model, folder / "q<b>&.onnx", data=folder / "d.npz", recipe=recipe)
    arguments = ["report", str(folder / "q<b>&.onnx"), "--float", str(model), "--data", str(folder / "d.npz"), "-q"]
    assert run([*arguments, "-o", str(folder / "r.html")]) == 0
    return folder / "r.html"


def figures(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(match[1])
    return found


def test_the_charts_carry_the_numbers_of_the_json(made: Path) -> None:
    page = made.read_text()
    numbers, parsed = figures(page), Charts()
    parsed.feed(page)
    layers = next(values for kind, _, values in parsed.charts if kind == "layers")
    assert layers == [layer["sqnr_db"] for layer in numbers["layers"]]
    small = [(label, values) for kind, label, values in parsed.charts if kind == "small"]
    drawn = [[c for c in one["counts"] if c] for one in numbers["activations"]] + [
        one["largest"] for one in numbers["weights"]
    ]
    assert [values for _, values in small] == drawn
    assert [label.partition(":")[0] for label, _ in small] == [
        one["name"] for one in (*numbers["activations"], *numbers["weights"])
    ]
    counted = {one["name"]: sum(one["counts"]) for one in numbers["activations"]}
    assert counted["x"] == 16 * 3 * 8 * 8  # of as many samples as are drawn
    assert numbers["samples"] == 32
    assert "c3_node" in {entry["name"] for entry in numbers["float_layers"]}
    assert all(entry["reason"] in page.replace("&#39;", "'") for entry in numbers["float_layers"])


def test_it_needs_no_network_and_no_name_becomes_markup(made: Path) -> None:
    page = made.read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "q<b>" not in page
    assert "q&lt;b&gt;&amp;.onnx" in page
    assert "@import" not in page


def test_json_says_what_the_page_says(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.parent
    arguments = [
        "report",
        str(folder / "q<b>&.onnx"),
        "--float",
        str(folder / "a<b>&.onnx"),
        "--data",
        str(folder / "d.npz"),
    ]
    assert run([*arguments, "--no-latency", "-o", str(folder / "again.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("report") == str(folder / "again.html")
    assert told == figures((folder / "again.html").read_text())


def test_what_cannot_be_reported_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made.parent
    nothing: Any = None
    with pytest.raises(ModelError, match="no ONNX model"):
        make(folder / "x.pt2", folder, folder, None, Recipe(), None, None, nothing, None, False, 1, None, nothing)
    (folder / "bare.onnx").write_bytes((folder / "q<b>&.onnx").read_bytes())
    arguments = [
        "report",
        str(folder / "bare.onnx"),
        "--float",
        str(folder / "a<b>&.onnx"),
        "--data",
        str(folder / "d.npz"),
    ]
    assert run([*arguments, "-o", str(folder / "bare.html")]) == 1
    assert "no sidecar" in capsys.readouterr().err
    assert not (folder / "bare.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_it_without_an_error(made: Path, tmp_path: Path, width: int) -> None:
    shot = tmp_path / "shot.png"
    options = (
        "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr --virtual-time-budget=2000"
    )
    given = [str(CHROMIUM), *options.split(), f"--user-data-dir={tmp_path}", f"--window-size={width},1600"]
    done = subprocess.run(
        [*given, f"--screenshot={shot}", made.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    content = shot.read_bytes()
    assert struct.unpack(">II", content[16:24]) == (width, 1600)
    dom = subprocess.run([*given, "--dump-dom", made.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert dom.stdout.count("<svg") == made.read_text().count("<svg")
    from PIL import Image

    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 20  # text and bars, and not a blank page
