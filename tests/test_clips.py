"""What a Clip cuts where its channels have factors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantcli.tune import clips
from quantcli.tune.clips import FACTORS, Spread


@given(
    bound=st.sampled_from([1.0, 6.0, 0.3]), size=st.integers(1, 400), seed=st.integers(0, 99), reach=st.floats(0.01, 9)
)
def test_values_are_counted_between_the_factors_of_the_bound(bound: float, size: int, seed: int, reach: float) -> None:
    values = (np.random.default_rng(seed).normal(size=(2, 3, size)) * reach * bound).astype(np.float32)
    found = Spread.of(values, bound)
    flat = np.moveaxis(values, 1, 0).reshape(3, -1)
    parts = np.maximum(flat, 0) * np.float32(1 / bound)
    expected = [np.bincount(np.searchsorted(FACTORS, row, side="right"), minlength=len(FACTORS) + 1) for row in parts]
    assert (found.counts == expected).all()
    assert (found.highest == np.maximum(flat.max(axis=1), 0)).all()


def test_factors_are_where_the_bits_of_numbers_change() -> None:
    assert FACTORS[[0, 8, 16, 24, 25, 32, -1]].tolist() == [0.125, 0.25, 0.5, 1.0, 1.125, 2.0, 3.75]
    assert len(FACTORS) == 40


@given(seed=st.integers(0, 99), reach=st.floats(0.05, 2))
def test_what_a_factor_changes_is_what_the_values_say(seed: int, reach: float) -> None:
    bound = 6.0
    values = (np.random.default_rng(seed).normal(size=(4, 2, 200)) * reach * bound).astype(np.float32)
    found = Spread.of(values, bound).changes(bound)
    flat = np.moveaxis(values, 1, 0).reshape(2, 1, -1).astype(np.float64)
    change = np.minimum(flat, FACTORS[:, None] * bound) - np.minimum(flat, bound)
    # A value is taken for another within the eighth of an octave that counts it: off by at most an eighth of itself, and of the
    # bound where it is cut in one of the two ways. Squares of differences so differ by at most 2·|d|·e + e².
    error = np.where(change != 0, np.minimum(flat, np.maximum(FACTORS[:, None], 1.0) * bound) / 8, 0.0)
    # Of those that a bound cuts hardly or not at all, as many lie beside it.
    beside = (np.abs(flat / bound - 1) < 1 / 8) | (np.abs(flat / bound / FACTORS[:, None] - 1) < 1 / 8)
    error = np.where(beside, bound * np.maximum(FACTORS[:, None], 1.0) / 8, error)
    limit = (2 * np.abs(change) * error + np.square(error)).mean(axis=2) + 1e-9
    assert (np.abs(found - np.square(change).mean(axis=2)) <= limit).all()
    assert (found[:, FACTORS == 1.0] == 0).all()


def test_batches_are_put_together_and_long_ones_looked_at_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).normal(size=(6, 3, 50)).astype(np.float32)
    whole, parts = Spread.of(values, 1.0), Spread.of(values[:2], 1.0).with_more(Spread.of(values[2:], 1.0))
    assert (whole.counts == parts.counts).all()
    assert (whole.highest == parts.highest).all()
    monkeypatch.setattr(clips, "COUNTED", 100)
    few = Spread.of(values, 1.0)
    assert few.counts.sum(axis=1).tolist() == [100] * 3
    assert (few.highest == whole.highest).all()
