"""Broken models end with one clear line: a few of the mutations that `python -m benchmarks.fuzz` tries by the thousand."""

from __future__ import annotations

from pathlib import Path

from benchmarks.fuzz import seeds, tried


def test_broken_models_are_refused_in_one_line(tmp_path: Path) -> None:
    models = seeds()
    trials = [tried(number, 1, models, tmp_path) for number in range(150)]
    assert [(trial.number, trial.how, trial.said) for trial in trials if trial.failed] == []
    codes = {trial.code for trial in trials}
    assert {0, 1} <= codes  # some work in spite of it, most do not
