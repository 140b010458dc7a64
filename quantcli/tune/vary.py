"""More samples out of those there are: images shifted and mirrored, of which the float model says what it gives.

What is fitted to a few hundred samples is fitted to their chance as well. A shifted image is another one to a network, and as no
label is needed, nothing has to be true of it (Shorten and Khoshgoftaar 2019, https://doi.org/10.1186/s40537-019-0197-0, on such
variations in training).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Feeds = dict[str, NDArray[Any]]

# By what part of an image it is shifted at most.
SHIFT = 1 / 8
# An image has at least so many rows and columns.
SMALLEST = 8


def is_image(values: NDArray[Any]) -> bool:
    """Tell whether samples are what can be shifted and mirrored: reals, (samples, channels, rows, columns)."""
    return values.dtype == np.float32 and values.ndim == 4 and min(values.shape[2:]) >= SMALLEST


def varied(values: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """Return images that are shifted by up to an eighth and mirrored, each by itself; what is no image stays."""
    if not is_image(values):
        return values
    found = values.copy()
    for number, image in enumerate(values):
        turned = image[:, :, ::-1] if generator.random() < 0.5 else image
        reach = [int(size * SHIFT) for size in image.shape[1:]]
        moves = [int(generator.integers(-most, most + 1)) for most in reach]
        found[number] = np.roll(turned, moves, axis=(1, 2))
    return found


def with_copies(batches: Sequence[Feeds], rounds: int, most: int, seed: int) -> tuple[Feeds, ...]:
    """Return batches, and varied copies of them.

    Args:
        batches: The batches.
        rounds: How many copies of each.
        most: How many samples there may be; no copies of those beyond.
        seed: Of the variations.
    """
    found = list(batches)
    total = sum(len(next(iter(feeds.values()))) for feeds in found)
    if not any(is_image(values) for feeds in batches for values in feeds.values()):
        return tuple(found)
    generator = np.random.default_rng(seed)
    for feeds in list(batches) * rounds:
        total += len(next(iter(feeds.values())))
        if total > most:
            break
        found.append({name: varied(values, generator) for name, values in feeds.items()})
    return tuple(found)
