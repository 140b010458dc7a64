"""Options and fixtures of the whole suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quantcli import Conversion, Recipe, convert
from quantcli.evaluation import check
from quantcli.recipe import Tune
from quantcli.tune.search import Search
from quantcli.tune.widths import Step
from tests.graphs import data_for, residual_net


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate", action="store_true", help="write the golden files anew instead of comparing with them"
    )


@pytest.fixture(scope="session")
def residual(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """The residual net of tests.graphs, converted as calibrated."""
    folder = tmp_path_factory.mktemp("residual")
    model, data = residual_net(folder / "net.onnx"), data_for(folder / "data.npz")
    return convert(model, folder / "net.int8.onnx", data=data, recipe=Recipe(tune=Tune(effort="fast")))


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[list[Step]]:
    """The orders of steps that searches find, as they find them."""
    found: list[list[Step]] = []
    ordered = Search.ordered

    def kept(self: Search) -> list[Step]:
        found.append(ordered(self))
        return found[-1]

    monkeypatch.setattr(Search, "ordered", kept)
    return found


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No conversion is told to be slow: tests run beside each other, and how fast anything runs then is chance."""
    look = check.measured

    def calmly(*given: Any) -> float | None:
        speed = look(*given)
        return None if speed is None else max(speed, 1.0)

    monkeypatch.setattr(check, "measured", calmly)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """The residual net as a float model file."""
    return residual_net(tmp_path / "net.onnx")
