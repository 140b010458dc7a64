"""Options and fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from calibration.hooks import pairs
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


def pytest_configure(config: pytest.Config) -> None:
    """Give each of several workers, which inherit this, one thread of OpenMP and BLAS: there are as many workers as cores.

    Threads that wait for each other spin, and take the cores from those that compute: training took 5 times the processor time.
    """
    if getattr(config.option, "numprocesses", None):
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


@pytest.fixture(scope="session", autouse=True)
def sessions_alike() -> Iterator[None]:
    """Let sessions of ONNX Runtime give the same on every machine, in the time that is theirs.

    Those in a worker of several have one thread each, for the same reason as above, where no number is asked for. Where kernels
    saturate (`calibration.hooks.pairs`), models give what ONNX says of them all the same.
    """
    start, alone, exact = (
        onnxruntime.InferenceSession.__init__,
        "PYTEST_XDIST_WORKER" not in os.environ,
        not pairs.saturates(),
    )

    def started(session: Any, model: Any, options: Any = None, *given: Any, **named: Any) -> None:
        options = named.pop("sess_options", options) or onnxruntime.SessionOptions()
        if not alone:
            options.intra_op_num_threads = options.intra_op_num_threads or 1
        if not exact:
            model = pairs.exact(model if isinstance(model, bytes) else Path(model), options)
        start(session, model, options, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        if not (alone and exact):
            patch.setattr(onnxruntime.InferenceSession, "__init__", started)
        yield


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
