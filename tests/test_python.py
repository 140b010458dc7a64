"""The Python API: what its page shows runs, and a notebook can look at what it returns."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import quantcli
from quantcli import Conversion, ReportedError, calibrate, convert
from tests.graphs import data_for, residual_net

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    residual_net(tmp_path / "model.onnx")
    shutil.copy(data_for(tmp_path / "calibration.npz"), tmp_path / "evaluation.npz")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    exec(block, {})  # noqa: S102 - it is ours
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("model.int8.onnx {'y': ")
    assert printed[-1].startswith("sqnr ")


def test_the_page_names_the_whole_api() -> None:
    named = set(re.findall(r"\w+", PAGE.read_text()))
    assert set(quantcli.__all__) - named <= {"__version__", "verify_c", "Run", "Selection"}


def test_names_are_offered_before_they_are_imported() -> None:
    look = "import quantcli, sys; print(*sorted(set(quantcli.__all__) - set(dir(quantcli))), 'quantcli.pipeline' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_what_is_returned_is_shown_without_its_arrays(residual: Conversion, tmp_path: Path) -> None:
    shown = repr(residual)
    assert shown.startswith("Conversion(model=")
    assert "SelfCheck(samples=" in shown
    assert "multipliers" not in shown
    statistics = calibrate(residual_net(tmp_path / "m.onnx"), data_for(tmp_path / "d.npz"))
    assert "samples=16" in repr(statistics)
    assert "array(" not in repr(statistics)


def test_data_in_the_place_of_statistics_is_told_where_it_goes(tmp_path: Path) -> None:
    data = data_for(tmp_path / "d.npz")
    with pytest.raises(ReportedError, match=r"d\.npz is not a statistics file; .*data="):
        convert(residual_net(tmp_path / "m.onnx"), tmp_path / "q.onnx", data)
    assert not (tmp_path / "q.onnx").exists()
