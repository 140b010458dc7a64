"""The shortcut: the extremes of tensors with a known lowest value, without handing those tensors out of the runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.dataset import samples_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from calibration.layout import Hook
    from calibration.observers import TensorStatistics

    Feeds = dict[str, NDArray[Any]]


def computed(hook: Hook, names: Sequence[str], feeds: Feeds) -> Feeds:
    """Return tensors of one batch; inputs among them are what was fed."""
    found = hook.run(feeds, [name for name in names if name not in feeds])
    return {name: found[name] if name in found else feeds[name] for name in names}


@dataclass(frozen=True, eq=False)
class Shortcut:
    """How the extremes of tensors with a known lowest value can be had without handing the tensors out.

    Attributes:
        pooled: The tensors that it can serve, once their minimum is settled: only the highest value is of interest then.
        limit: As long as no value is larger in magnitude, no operator of the model can make one that is not finite.
        build: Return, for some of the tensors, a hook that gives their highest values; and by tensor, in the order in which they
            stand there, the output that holds them along axis 1, and how many they are.
    """

    pooled: frozenset[str]
    limit: float
    build: Callable[[list[str]], tuple[Hook, dict[str, tuple[str, int]]]]


@dataclass(frozen=True, eq=False)
class Light:
    """The shortcut at work.

    Attributes:
        hook: Gives the highest values of the settled tensors, and the others whole.
        places: Where the highest values stand, by tensor.
        sizes: How many elements a sample has in each tensor.
        limit: Beyond which a value is too large for the shortcut.
        tensors: What was counted so far, by name.
    """

    hook: Hook
    places: dict[str, tuple[str, int]]
    sizes: dict[str, int]
    limit: float
    tensors: dict[str, TensorStatistics]

    @classmethod
    def of(cls, shortcut: Shortcut, whole: Hook, tensors: dict[str, TensorStatistics], feeds: Feeds) -> Light | None:
        """Return the shortcut for the tensors that hold their floor in some samples; None where there are none.

        A tensor without elements has no extremes: then there is none either.
        """
        found = computed(whole, list(tensors), feeds)
        settled = [
            name
            for name, held in tensors.items()
            if name in shortcut.pooled and found[name].size and found[name].min() == held.floor
        ]
        if not settled or not all(values.size for values in found.values()):
            return None
        rows = samples_in(feeds)
        sizes = {name: values.size // rows for name, values in found.items()}
        del found
        whole.rest()
        hook, places = shortcut.build(settled)
        return cls(hook, places, sizes, shortcut.limit, tensors)

    def run(self, feeds: Feeds) -> Feeds:
        """Run a batch and return the outputs that hold highest values, and the other tensors whole."""
        whole = [name for name in self.tensors if name not in self.places]
        together = list(dict.fromkeys(output for output, _ in self.places.values()))
        found = self.hook.run(feeds, [name for name in whole if name not in feeds] + together)
        return {name: feeds[name] if name in feeds else found[name] for name in whole + together}

    def count(self, found: Feeds, rows: int) -> bool:
        """Count a batch of some samples and return whether every value was small enough. If not, nothing is counted."""
        extremes = {
            name: (float(np.minimum.reduce(values, axis=None)), float(np.maximum.reduce(values, axis=None)))
            for name, values in found.items()
            if name in self.tensors and not self.tensors[name].sealed
        }
        for name, highest in self.highest(found).items():
            extremes[name] = self.tensors[name].floor or 0.0, highest
        if not all(highest <= self.limit and lowest >= -self.limit for lowest, highest in extremes.values()):
            return False  # so it is for NaN, too
        for name, held in self.tensors.items():
            held.count_extremes(*extremes.get(name, (held.minimum, held.maximum)), self.sizes[name] * rows)
        return True

    def highest(self, found: Feeds) -> dict[str, float]:
        """Return the highest value of every settled tensor."""
        values: dict[str, float] = {}
        for output in {output for output, _ in self.places.values()}:
            sizes = {name: size for name, (where, size) in self.places.items() if where == output}
            peaks = found[output].reshape(len(found[output]), -1).max(axis=0)
            starts = np.cumsum([0, *sizes.values()])[:-1]
            values.update(zip(sizes, np.maximum.reduceat(peaks, starts).tolist(), strict=True))
        return values
