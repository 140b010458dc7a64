"""Thresholds: what may be asked of which metric, and what is said of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from calibration.errors import DataError
from quantcli.errors import UsageError
from quantcli.evaluation.metrics import Asked, written
from quantcli.evaluation.verdict import Figures, Thresholds, checked, told_apart


@pytest.mark.parametrize(
    ("value", "limit", "told"),
    [
        (0.999994, 1.0, ("0.99999", "1")),
        (0.9999999, 1.0, ("0.9999999", "1")),
        (94.996, 95.0, ("94.996", "95")),
        (95.0, 95.0, ("95.00", "95")),
        (95.0 - 1e-12, 95.0, ("95.00", "95")),
        (90.1234, 95.0, ("90.12", "95")),
        (0.991, 0.9909, ("0.991", "0.9909")),
        (1.00000002, 1.00000001, ("1.00000002", "1.00000001")),
        (math.inf, 20.0, ("inf", "20")),
    ],
)
def test_a_figure_and_its_limit_are_told_apart(value: float, limit: float, told: tuple[str, str]) -> None:
    assert told_apart(value, limit) == told


def test_a_near_miss_is_told_with_the_digits_that_miss() -> None:
    (check,) = checked(Figures("cosine", 0.999994, None, None), Thresholds(min_metric=1.0))
    assert (check.met, check.said) == (False, "cosine is 0.99999, less than the 1 asked")


@pytest.mark.parametrize(
    ("metric", "asked", "message"),
    [
        ("mse", Thresholds(min_metric=0.1), "mse is better the lower"),
        ("cosine", Thresholds(max_drop=0.1), "--max-drop has no meaning for cosine"),
    ],
)
def test_a_threshold_without_meaning_for_the_metric_is_refused(metric: str, asked: Thresholds, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked(Figures(metric, 0.01, None, None), asked)


@pytest.mark.parametrize("found", [math.inf, -math.inf, math.nan])
def test_a_metric_of_ones_own_is_a_finite_number(found: float) -> None:
    asked = Asked("mine:metric")
    asked.update({"y": np.zeros((2, 3))})
    with pytest.raises(DataError, match=r"returns (-?inf|nan); return a finite number"):
        asked.value(lambda _outputs, _labels: found, None)


@pytest.mark.parametrize(
    ("metric", "value", "signed", "text"),
    [
        ("top1", 98.765, False, "98.77"),
        ("top1", 0.5, True, "+0.50"),
        ("sqnr", 40.126, False, "40.13"),
        ("mse", 0.000123456, False, "0.000123456"),
        ("iou:mean", 0.81234, False, "0.81234"),
        ("iou:mean", 0.003, True, "+0.003"),
        ("top1", None, False, ""),
    ],
)
def test_figures_have_the_digits_that_their_metric_needs(
    metric: str, value: float | None, signed: bool, text: str
) -> None:
    assert written(metric, value, signed) == text
