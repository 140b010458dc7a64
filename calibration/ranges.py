"""Ranges: from the statistics of a tensor to the real range (lo, hi) that quantization is to cover."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from calibration.statistics import TensorStatistics


def minmax(statistics: TensorStatistics) -> tuple[float, float]:
    """Return the lowest and the highest value seen."""
    return statistics.minimum, statistics.maximum


RANGES: dict[str, Callable[[TensorStatistics], tuple[float, float]]] = {"minmax": minmax}
