"""The examples run, and those of pure arithmetic print what stands beside them, digit for digit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def printed(example: Path) -> str:
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.with_suffix(".txt").exists()], ids=lambda e: e.stem)
def test_arithmetic_is_reproduced(example: Path) -> None:
    assert printed(example) == example.with_suffix(".txt").read_text()


def test_lenet_keeps_its_accuracy_in_integers() -> None:
    text = printed(FOLDER / "lenet.py")
    found = re.search(r"float ([\d.]+) %, integers ([\d.]+) %", text)
    assert found is not None
    assert float(found[1]) - float(found[2]) <= 0.2
    assert "{'LogSoftmax': 1}" in text


def test_dorefa_trains_and_becomes_integers() -> None:
    text = printed(FOLDER / "dorefa.py")
    assert "1 bit: weights of 1 bit are binary" in text
    assert "32 bits are float bit for bit: True" in text
    found = re.search(r"after one epoch ([\d.]+) %, its integers ([\d.]+) %", text)
    assert found is not None
    assert float(found[1]) > 90
    assert text.count("int5") == 4


def test_every_example_is_told_of() -> None:
    page = (FOLDER / "README.md").read_text()
    assert {example.name for example in EXAMPLES} == set(re.findall(r"\]\((\w+\.py)\)", page))
