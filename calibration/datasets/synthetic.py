"""Random samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec


def open_synthetic(count: int, inputs: tuple[InputSpec, ...], seed: int) -> Synthetic:
    """Return random samples.

    Raises:
        DataError: If there is none, or the seed is negative.
    """
    if count < 1:
        raise DataError(f"{count} random samples were asked for", "ask for at least one")
    if seed < 0:
        raise DataError(f"the seed of the random samples is {seed}", "give one of at least 0")
    return Synthetic(count, inputs, seed)


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Random samples, each a function of seed, input and number: normal for floats, zero for everything else.

    Attributes:
        count: How many.
        inputs: The model's inputs; free dimensions behind the batch are 1.
        seed: Of the samples.
    """

    count: int
    inputs: tuple[InputSpec, ...]
    seed: int = 0
    labels: None = None
    synthetic: bool = True

    @property
    def digest(self) -> str:
        """The sha256 of what the samples follow from."""
        described = [(spec.name, spec.dtype.str, drawn_shape(spec)) for spec in self.inputs]
        return hashlib.sha256(json.dumps(["synthetic", self.count, self.seed, described]).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def shape_of(self, index: int) -> int:
        """Return the same for every sample."""
        del index
        return 0

    def read(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Return the samples at ``indices``."""
        found = {}
        for spec in self.inputs:
            found[spec.name] = values = np.zeros((len(indices), *drawn_shape(spec)), dtype=spec.dtype)
            if spec.dtype.kind == "f":
                name = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:8], "little")
                for row, index in enumerate(indices.tolist()):
                    values[row] = np.random.default_rng([self.seed, name, index]).standard_normal(values.shape[1:])
        return found


def drawn_shape(spec: InputSpec) -> list[int]:
    """Return the shape of a random sample: free dimensions are 1."""
    return [1 if size is None else size for size in spec.shape[1:]]
