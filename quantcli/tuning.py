"""Tuning: what the algorithms of `quantcli.tune` found better than the defaults. A plan takes it over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Moved:
    """What a tensor is of the float model's of the same name: x · factor + shift, one of each or one per channel (axis 1)."""

    factor: tuple[float, ...] = (1.0,)
    shift: tuple[float, ...] = (0.0,)

    def then(self, factor: float, shift: float) -> Moved:
        """Return what it is after another factor and another shift."""
        factors = tuple(one * factor for one in self.factor)
        return Moved(factors, tuple(one * factor + shift for one in self.shift))


@dataclass(frozen=True, eq=False)
class Tuning:
    """Parameters that were chosen by what they do to the model.

    Attributes:
        ranges: The real range (lo, hi) of activations, by name.
        scales: The scales of weights, float32, one or one per channel as the target has it, by name.
        lowest: The lowest integer of each of those scales' grids, where they do not lie about zero, by name.
        bits: The widths of weights, by name; the others have the target's.
        grids: The widths of activations' grids, by name; the others have the target's.
        moved: The tensors that equalization, centring or alignment made something else of, by name.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    scales: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    lowest: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)
    grids: Mapping[str, int] = field(default_factory=dict)
    moved: Mapping[str, Moved] = field(default_factory=dict)


UNTUNED = Tuning()
