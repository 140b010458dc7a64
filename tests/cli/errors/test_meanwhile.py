"""What may happen while a command works: a full disk, an interruption, a defect."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcli import pipeline
from quantcli.cli import run
from tests.cli.errors.lines import CALIBRATE, CONVERT, contents, the_line, without_estimate

ROOT = Path(__file__).parents[3]


def after_interruption(errors: str) -> str:
    """Return standard error without the line end that click writes behind the terminal's ^C."""
    return errors.removeprefix("\n")


def raising(error: BaseException, call: int = 1) -> Callable[..., Any]:
    """Return a method in place of Path.replace that fails at its n-th call."""
    calls = iter(range(1, 100))
    replace = Path.replace

    def replaced(self: Path, target: Path) -> Path:
        if next(calls) == call:
            raise error
        return replace(self, target)

    return replaced


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize(
    ("error", "code"), [(OSError(errno.ENOSPC, "No space left on device"), 1), (KeyboardInterrupt(), 130)]
)
def test_a_write_that_is_cut_off_leaves_what_was_there(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    call: int,
    existing: bool,
) -> None:
    if existing:
        for name in ("new.onnx", "new.json"):
            (here / name).write_bytes(b"older")
    before = contents(here)
    monkeypatch.setattr(Path, "replace", raising(error, call))
    assert run(f"{CONVERT} --effort fast".split()) == code
    assert the_line(after_interruption(capsys.readouterr().err)).startswith("error: ")
    assert contents(here) == before


@pytest.mark.parametrize("command", [CALIBRATE, CONVERT])
def test_a_full_disk_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device", str(len(data)))

    def opened(handle: int, mode: str) -> Full:
        os.close(handle)
        assert mode == "wb"
        return Full()

    before = contents(here)
    monkeypatch.setattr("quantcli.files.os.fdopen", opened)
    assert run(command.split()) == 1
    assert "No space left on device" in the_line(capsys.readouterr().err)
    assert contents(here) == before


def test_a_disk_too_full_for_another_copy_keeps_what_was_there(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(_: Path, target: Path) -> None:
        Path(target).write_bytes(b"half a copy")
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("new.onnx", "new.json"):
        (here / name).write_bytes(b"older")
    before = contents(here)
    for function in ("copy", "copy2", "copyfile"):
        monkeypatch.setattr(shutil, function, copy)
    code = run(CONVERT.split())
    if code == 0:  # no copy was needed
        assert set(contents(here)) == set(before)
    else:
        assert "No space left on device" in the_line(capsys.readouterr().err)
        assert contents(here) == before


@pytest.mark.parametrize(
    "failing", [f"{CONVERT} --strict", f"{CONVERT} --samples 9", "convert q.onnx --data data.npz -o new.onnx"]
)
def test_a_failing_conversion_keeps_older_files(here: Path, failing: str) -> None:
    for name in ("new.onnx", "new.json"):
        (here / name).write_bytes(b"older")
    before = contents(here)
    assert run(failing.split()) != 0
    assert contents(here) == before


@pytest.mark.parametrize(("more", "left"), [("", "nothing was written"), (" --max-drop 1", "OUTPUT.search")])
def test_an_interruption_is_told(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: str, left: str
) -> None:
    del here

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "convert", interrupted)
    assert run((CONVERT + more).split()) == 130
    line = the_line(after_interruption(capsys.readouterr().err))
    assert line.startswith("error: interrupted")
    assert left in line


@pytest.mark.parametrize("how", ["module", "command"])
def test_an_interruption_of_imports_is_quiet(tmp_path: Path, how: str) -> None:
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["quantcli"].partition(":")
    script = ["-c", f"import sys; from {module} import {function}; sys.exit({function}())"]
    started = ["-m", "quantcli"] if how == "module" else script
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    done = subprocess.run([sys.executable, *started, "targets"], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_defect_of_ours_is_one_line_too(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del here

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom\nbang")

    monkeypatch.setattr(pipeline, "convert", broken)
    assert run(CONVERT.split()) == 1
    assert the_line(capsys.readouterr().err).startswith(
        "error: internal error: RuntimeError: boom bang (test_meanwhile.py:"
    )
    assert run([*CONVERT.split(), "--verbose"]) == 1
    lines = without_estimate(capsys.readouterr().err)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: internal error: RuntimeError: boom bang")
