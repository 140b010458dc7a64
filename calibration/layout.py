"""What runs a model for a calibration, and how a batch's tensors lie side by side in one buffer, to be looked at together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec

# Every tensor begins at a multiple of so many elements: 64 bytes.
ALIGNED = 16


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a batch lies.

    Attributes:
        shapes: By tensor name; all hold float32, and none is empty.
        starts: At which element each begins, multiples of `ALIGNED`, in the same order.
        size: How many elements the buffer has.
    """

    shapes: dict[str, tuple[int, ...]]
    starts: dict[str, int]
    size: int

    @classmethod
    def of(cls, found: Mapping[str, NDArray[np.generic]]) -> Layout | None:
        """Return the layout of a batch like this one; None where a tensor is empty or does not hold float32."""
        starts, size = {}, 0
        for name, values in found.items():
            if values.dtype != np.float32 or not values.size:
                return None
            starts[name] = size
            size += -(-values.size // ALIGNED) * ALIGNED
        return cls({name: values.shape for name, values in found.items()}, starts, size)

    def buffer(self) -> NDArray[np.float32]:
        """Return a new buffer that begins at a multiple of 64 bytes."""
        room = np.zeros(self.size + ALIGNED, dtype=np.float32)
        first = -(room.ctypes.data // room.itemsize) % ALIGNED
        return room[first : first + self.size]

    def views(self, buffer: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return a buffer's tensors by name."""
        return {
            name: buffer[start : start + math.prod(shape)].reshape(shape)
            for (name, shape), start in zip(self.shapes.items(), self.starts.values(), strict=True)
        }


class Frame(Protocol):
    """A buffer that a hook writes the asked tensors of a batch into."""

    @property
    def buffer(self) -> NDArray[np.float32]:
        """All of it."""
        ...

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch and return its tensors by name; they stay until the next one is run."""
        ...


class Hook(Protocol):
    """A float model that runs a batch and hands out the asked tensors."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The model's inputs."""
        ...

    def run(self, feeds: dict[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run one batch and return the asked tensors by name; from several threads at once where `Lanes` compute several."""
        ...

    def rest(self) -> None:
        """Let go of what can be loaded again when it is needed again."""
        ...

    def frame(self, layout: Layout) -> Frame | None:
        """Return a buffer that batches can be run into; None where the runtime hands out arrays of its own."""
        ...
