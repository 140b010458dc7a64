"""Observers count; they compute no range and no scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass
class MinMax:
    """The lowest and the highest value of a tensor over everything seen.

    Attributes:
        minimum: The lowest value so far; +inf before the first.
        maximum: The highest value so far; −inf before the first.
        elements: How many values were seen.
    """

    minimum: float = float("inf")
    maximum: float = float("-inf")
    elements: int = 0

    def update(self, values: NDArray[np.floating]) -> None:
        """Count one batch of values, of any shape; an empty array changes nothing.

        Raises:
            DataError: If a value is not finite.
        """
        if values.size == 0:
            return
        lowest, highest = float(values.min()), float(values.max())  # both carry a NaN through
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            bad = int(values.size - np.isfinite(values).sum())
            raise DataError(f"{bad} of {values.size} values are not finite")
        self.minimum, self.maximum = min(self.minimum, lowest), max(self.maximum, highest)
        self.elements += values.size

    def merge(self, other: MinMax) -> None:
        """Count everything that ``other`` saw as well."""
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.elements += other.elements


OBSERVERS = {"minmax": MinMax}
