"""The report: one page without a network, whose charts carry the numbers that its JSON holds; looked at in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
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
from tests.pages import CHROMIUM, Charts, browser, figures, looked_at


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
    shot = looked_at(made, tmp_path, width)
    command = [*browser(tmp_path, width), "--dump-dom", made.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert dom.stdout.count("<svg") == made.read_text().count("<svg")
    from PIL import Image

    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 20  # text and bars, and not a blank page
