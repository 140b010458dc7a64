"""The folder that commands are tried in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantcli import calibrate, convert, demo, read_recipe
from tests.cli.commands import normalized


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's model, 16 images to calibrate with, 32 to evaluate with, and a conversion."""
    kit = tmp_path_factory.mktemp("kit")
    (kit / "model.onnx").write_bytes(demo.MODEL.read_bytes())
    (kit / "recipe.toml").write_text(demo.RECIPE)
    with np.load(demo.CALIBRATION) as stored:
        np.savez(kit / "cal.npz", images=stored["images"][:16])
        np.savez(kit / "data.npz", x=normalized(stored["images"][:16]))
    with np.load(demo.EVALUATION) as stored:
        labels = stored["labels"][:32].astype(np.int64)
        labels[2::4] = (
            labels[2::4] + 1
        ) % 10  # wrong on purpose: a share of hits that is neither nothing nor everything
        np.savez(kit / "eval.npz", images=stored["images"][:32], labels=labels)
    recipe = read_recipe(kit / "recipe.toml")
    calibrate(kit / "model.onnx", kit / "cal.npz", kit / "s.stats", recipe)
    convert(kit / "model.onnx", kit / "q.onnx", kit / "s.stats", recipe=recipe)
    return kit


@pytest.fixture
def here(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in; the kit stands beside it as ``kit``."""
    (tmp_path / "kit").symlink_to(kit)
    monkeypatch.chdir(tmp_path)
    return tmp_path
