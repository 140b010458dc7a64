"""Which samples are drawn, in which batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.datasets import Preprocess, Selection, batches, fitted_batch, open_dataset, select
from calibration.errors import DataError
from tests.calibration.samples import ROWS, npy, numbers, spec


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), list(range(50))),
        (Selection(samples=50), list(range(50))),
        (Selection(samples=5, shuffle=False), list(range(5))),
        (Selection(samples=5, shuffle=False, seed=3), list(range(5))),
    ],
)
def test_samples_come_in_order_unless_a_part_is_drawn(selection: Selection, expected: list[int]) -> None:
    assert select(50, selection).tolist() == expected


def test_a_part_is_drawn_at_random_by_its_seed() -> None:
    drawn = {seed: select(50, Selection(samples=20, seed=seed)).tolist() for seed in range(3)}
    for seed, indices in drawn.items():
        assert len(set(indices)) == 20
        assert set(indices) <= set(range(50))
        assert indices != sorted(indices)
        assert max(indices) >= 20  # from everywhere, not from the front
        assert select(50, Selection(samples=20, shuffle=True, seed=seed)).tolist() == indices
    assert len({tuple(indices) for indices in drawn.values()}) == 3


def test_all_samples_are_shuffled_where_it_is_asked_for() -> None:
    indices = select(50, Selection(shuffle=True)).tolist()
    assert sorted(indices) == list(range(50))
    assert indices != list(range(50))


@pytest.mark.parametrize(
    ("samples", "told"), [(51, "51 samples were asked for and the data holds 50"), (0, "no sample")]
)
def test_more_or_fewer_samples_than_there_are_are_refused(samples: int, told: str) -> None:
    with pytest.raises(DataError, match=told):
        select(50, Selection(samples=samples))


@pytest.mark.parametrize(("size", "expected"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_batches_cover_the_samples_in_order(tmp_path: Path, size: int, expected: list[int]) -> None:
    x, order = numbers(8, 3), np.array([7, 1, 2, 0, 5])
    dataset = open_dataset(npy(tmp_path / "d.npy", x), [ROWS])
    given = [batch["x"] for batch in batches(dataset, order, size)]
    assert [len(values) for values in given] == expected
    np.testing.assert_array_equal(np.concatenate(given), x[order], strict=True)


@pytest.mark.parametrize(
    ("sizes", "wanted", "expected"),
    [
        ([None], None, 32),
        ([None], 7, 7),
        ([4], None, 4),
        ([4], 4, 4),
        ([None, 4], None, 4),
        ([4, 4], None, 4),
    ],
)
def test_the_model_fixes_its_batch(sizes: list[int | None], wanted: int | None, expected: int) -> None:
    assert fitted_batch(tuple(spec(size, 3) for size in sizes), wanted) == expected


def test_another_batch_than_the_models_is_refused() -> None:
    with pytest.raises(DataError, match="batches of 4, not of 5"):
        fitted_batch((spec(4, 3),), 5)


@pytest.mark.parametrize(
    "wishes", [{"scale": math.inf}, {"mean": (0.0, math.nan)}, {"std": (-math.inf,)}, {"std": (1.0, 0.0)}]
)
def test_what_no_pixel_can_be_multiplied_with_is_refused(wishes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"finite numbers|no std is 0"):
        Preprocess(**wishes)
