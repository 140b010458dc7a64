"""A zoo of small models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantcli.cli import run
from tests.batch.zoos import FAILING, METRICS, ZOO, results_of
from tests.graphs import normal, residual_net


def filled(folder: Path) -> Path:
    """Return a folder with models, data, metrics and manifests."""
    (folder / "nets").mkdir()
    for name in "ab":
        residual_net(folder / "nets" / f"{name}.onnx")
    (folder / "corrupt.onnx").write_text("hello")
    x = normal(16, 3, 8, 8, seed=9)
    np.savez(folder / "data.npz", x=x)
    np.savez(folder / "labelled.npz", x=x, labels=np.arange(16) % 10)
    (folder / "mine.py").write_text(METRICS)
    (folder / "fast.toml").write_text('target = "native"\n[tune]\neffort = "fast"\n')
    (folder / "zoo.toml").write_text(ZOO)
    (folder / "failing.toml").write_text(FAILING)
    (folder / "elsewhere").mkdir()
    return folder


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models, data, metrics and manifests; the present folder is another one."""
    filled(tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The results of a zoo that nothing disturbed."""
    folder = filled(tmp_path_factory.mktemp("zoo"))
    assert run(["batch", str(folder / "zoo.toml"), "-o", str(folder / "out"), "--jobs", "2", "-q"]) == 4
    return results_of(folder)
