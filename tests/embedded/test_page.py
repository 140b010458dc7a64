"""docs/embedded.md: its commands run on the demo's files, and print what stands beside them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from quantcli.cli import run
from quantcli.embedded.check import compiler

PAGE = (Path(__file__).parents[2] / "docs" / "embedded.md").read_text("utf-8")


@pytest.mark.skipif(compiler() is None, reason="there is no C compiler on the path")
def test_from_model_to_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "-q"]) == 0
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks[:2] for line in block.replace("\\\n", "").splitlines()]
    told = ""
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "quantcli":
            clang = "clang" in words
            if clang:
                words[words.index("clang")] = str(compiler())
            assert run(words[1:]) == 0, line
        else:
            subprocess.run(words, check=True)
        told += capsys.readouterr().out
    expected = re.search(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert expected is not None
    assert expected[1] in told
    assert "10,000 outputs of 1000 samples" in told
