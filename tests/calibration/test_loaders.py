"""Functions and files that give what a DataLoader yields: the inputs in order, and labels behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.datasets import open_dataset
from calibration.datasets.example import first_samples
from tests.calibration.samples import ROWS, everything, spec

SOURCE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

X, OTHER, Y = torch.arange(12.0).reshape(4, 3), torch.arange(8.0).reshape(4, 2), torch.tensor([3, 1, 2, 0])
images = lambda: DataLoader(TensorDataset(X, Y), batch_size=3)
samples = lambda: TensorDataset(X, Y)
pairs = lambda: DataLoader(TensorDataset(X, OTHER), batch_size=2)
labelled_pairs = lambda: DataLoader(TensorDataset(X, OTHER, Y), batch_size=2)
dicts = lambda: [{"x": X, "labels": Y}]
targets = lambda: DataLoader(TensorDataset(X, Y.float()), batch_size=2)
stacked = lambda: [[X[0], X[1]], [X[2], X[3]]]
"""
VALUES, OTHERS = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(8, dtype=np.float32).reshape(4, 2)
OTHER = spec(None, 2, name="other")


@pytest.mark.parametrize(
    ("name", "inputs", "expected", "labels"),
    [
        ("images", [ROWS], [VALUES], [3, 1, 2, 0]),
        ("samples", [ROWS], [VALUES], [3, 1, 2, 0]),
        ("pairs", [ROWS, OTHER], [VALUES, OTHERS], None),
        ("labelled_pairs", [ROWS, OTHER], [VALUES, OTHERS], [3, 1, 2, 0]),
        ("dicts", [ROWS], [VALUES], [3, 1, 2, 0]),
        ("targets", [ROWS], [VALUES], None),
        ("stacked", [ROWS], [VALUES], None),
    ],
)
def test_a_file_of_code_yields_what_a_loader_does(
    tmp_path: Path, name: str, inputs: list[Any], expected: list[Any], labels: list[int] | None
) -> None:
    source = tmp_path / "loaded_here.py"
    source.write_text(SOURCE)
    dataset = open_dataset(None, inputs, function=f"{source}:{name}")
    found = everything(dataset)
    assert all((found[one.name] == values).all() for one, values in zip(inputs, expected, strict=True))
    assert (dataset.labels is None) if labels is None else (np.array(dataset.labels) == labels).all()
    shown = first_samples(None, [one.name for one in inputs], function=f"{source}:{name}")
    assert set(shown) == {one.name for one in inputs}


def test_saved_samples_may_have_labels_behind_them(tmp_path: Path) -> None:
    rows = torch.from_numpy(VALUES)
    torch.save([(row, torch.tensor(number)) for number, row in enumerate(rows)], tmp_path / "samples.pt")
    dataset = open_dataset(tmp_path / "samples.pt", [ROWS])
    assert (everything(dataset)["x"] == VALUES).all()
    assert dataset.labels is not None
    assert list(dataset.labels) == [0, 1, 2, 3]
