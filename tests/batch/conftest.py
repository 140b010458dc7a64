"""A zoo of small models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.batch.zoos import FAILING, METRICS, ZOO
from tests.graphs import normal, residual_net


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
