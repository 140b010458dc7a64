"""The job of docs/ci.md runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.graphs import normal, residual_net

PAGE = Path(__file__).parent.parent / "docs" / "ci.md"
ZOO = """
[defaults]
data = "calibration.npz"
metric = "top1"
evaluate = "labelled.npz"
max_drop = {limit}
[recipes.w8]
tune = {{effort = "fast"}}
[[models]]
path = "*.onnx"
"""


def script(number: int) -> str:
    """Return a shell block of the page."""
    blocks: list[str] = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return blocks[number]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    residual_net(tmp_path / "model.onnx")
    x = normal(16, 3, 8, 8, seed=9)
    np.savez(tmp_path / "calibration.npz", x=x)
    np.savez(tmp_path / "labelled.npz", x=x, labels=np.arange(16) % 10)
    return tmp_path


def ran(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["/bin/sh", "-c", text],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("limit", "code", "told"), [("100.0", 0, ""), ("-200.0", 4, "model/w8: missed: top1 dropped")])
def test_the_job_fails_on_a_regression_alone(folder: Path, limit: str, code: int, told: str) -> None:
    (folder / "zoo.toml").write_text(ZOO.format(limit=limit))
    done = ran(folder, script(0))
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(told)
    assert (folder / "out" / "junit.xml").is_file()
    assert (folder / "out" / "index.html").is_file()


def test_the_job_ends_with_the_batchs_own_code_where_there_are_no_entries(folder: Path) -> None:
    (folder / "zoo.toml").write_text("")
    done = ran(folder, script(0))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_the_commands_for_one_model_run(folder: Path) -> None:
    done = ran(folder, "set -e\n" + script(1).replace("--max-drop 0.5", "--max-drop 100"))
    assert done.returncode == 0, done.stderr
    assert (folder / "verdict.xml").is_file()
