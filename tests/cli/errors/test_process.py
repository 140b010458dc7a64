"""The process that a command is: its exit code, and streams that are full, closed or left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cli.errors.lines import CONVERT, EVAL, MAIN, the_line, without_estimate


def execute(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MAIN, *arguments], capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("convert gone.onnx --data data.npz -o new.onnx", 2),
        (CONVERT.replace("data.npz", "pixels.npz"), 1),
        (f"{CONVERT} --strict", 5),
    ],
)
def test_the_process_ends_with_the_code(here: Path, command: str, code: int) -> None:
    done = execute(command.split(), cwd=here)
    assert done.returncode == code
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_terminal_that_knows_only_ascii_is_no_failure(here: Path) -> None:
    done = execute(CONVERT.split(), cwd=here, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, without_estimate(done.stderr)) == (0, [])
    assert (here / "new.onnx").is_file()


def test_a_reader_that_leaves_gets_no_traceback(here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [*MAIN, "-v", *CONVERT.split()], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=here, check=False
        )
    finally:
        os.close(writing)
    assert without_estimate(done.stderr) == []
    assert (here / "new.onnx").is_file()


SPEAKING = [["targets"], ["targets", "--json"], ["--version"], [], [*EVAL.split(), "--json"]]


def ended(command: Sequence[str], where: Path, stdout: int) -> tuple[int, str]:
    """Run a command whose standard output leads to a descriptor, which is closed; return its exit code and what it said."""
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    try:
        done = subprocess.run(
            [*MAIN, *command], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=where, check=False, env=environment
        )
    finally:
        os.close(stdout)
    return done.returncode, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", SPEAKING)
@pytest.mark.parametrize("encoding", ["", "ascii"])
def test_a_full_device_is_one_line(
    kit: Path, command: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    code, errors = ended(command, kit, os.open("/dev/full", os.O_WRONLY))
    assert code == 1
    assert the_line(errors).startswith("error: the output cannot be written (No space left on device)")


@pytest.mark.parametrize("command", [*SPEAKING, ["targets", "--no-such", "--json"]])
def test_a_pipe_without_reader_is_quiet(kit: Path, command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code, errors = ended(command, kit, writing)
    if "--no-such" in command:
        assert (code, "No such option" in the_line(errors)) == (2, True)
    else:
        assert (code, errors) == (1, "")


@pytest.mark.parametrize(
    ("command", "streams", "code"),
    [(CONVERT, "<&- >&- 2>&-", 0), ("targets", ">&-", 0), ("targets --no-such", "2>/dev/full", 2)],
)
def test_closed_streams_end_no_work_and_stand_in_no_file(here: Path, command: str, streams: str, code: int) -> None:
    shell = ["sh", "-c", f'"$@" {streams}', "sh", *MAIN, *command.split()]
    assert subprocess.run(shell, cwd=here, check=False).returncode == code
    if command == CONVERT:
        assert (here / "new.onnx").read_bytes() == (here / "q.onnx").read_bytes()
