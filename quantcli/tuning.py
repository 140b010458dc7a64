"""Tuning: what the algorithms of `quantcli.tune` found better than the defaults. A plan takes it over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Tuning:
    """Parameters that were chosen by what they do to the model.

    Attributes:
        ranges: The real range (lo, hi) of activations, by name.
        scales: The scales of weights, float32, one or one per channel as the target has it, by name.
        bits: The widths of weights, by name; the others have the target's.
        grids: The widths of activations' grids, by name; the others have the target's.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)
    grids: Mapping[str, int] = field(default_factory=dict)


UNTUNED = Tuning()
