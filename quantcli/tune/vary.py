"""More samples out of those there are: images shifted and mirrored, of which the float model says what it gives.

What is fitted to a few hundred samples is fitted to their chance as well. A shifted image is another one to a network, and as no
label is needed, nothing has to be true of it (Shorten and Khoshgoftaar 2019, https://doi.org/10.1186/s40537-019-0197-0, on such
variations in training).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets import samples_in

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    Feeds = dict[str, NDArray[Any]]

# By what part of an image it is shifted at most.
SHIFT = 1 / 8
# An image has at least so many rows and columns, and with the channels last at most so many of those.
SMALLEST, MOST_CHANNELS = 8, 4


def image_axes(values: NDArray[Any]) -> tuple[int, int] | None:
    """Return the axes of rows and columns of samples that can be shifted and mirrored; None where there are none."""
    if values.dtype != np.float32 or values.ndim != 4:
        return None
    axes = (1, 2) if values.shape[3] <= MOST_CHANNELS else (2, 3)
    return axes if min(values.shape[axis] for axis in axes) >= SMALLEST else None


def varied(values: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
    """Return images that are shifted by up to an eighth and mirrored, each by itself; what is no image stays."""
    axes = image_axes(values)
    if axes is None:
        return values
    found = values.copy()
    rows, columns = (axis - 1 for axis in axes)
    for number, image in enumerate(values):
        turned = np.flip(image, columns) if generator.random() < 0.5 else image
        reach = [int(image.shape[axis] * SHIFT) for axis in (rows, columns)]
        moves = [int(generator.integers(-most, most + 1)) for most in reach]
        found[number] = np.roll(turned, moves, axis=(rows, columns))
    return found


def has_images(feeds: Feeds, masks: Collection[str] = ()) -> bool:
    """Tell whether a batch holds something to shift and to mirror, which no mask is."""
    return any(image_axes(values) is not None for name, values in feeds.items() if name not in masks)


def with_copies(
    batches: Sequence[Feeds], rounds: int, most: int, seed: int, masks: Collection[str] = ()
) -> tuple[Feeds, ...]:
    """Return batches, and varied copies of them.

    Args:
        batches: The batches.
        rounds: How many copies of each.
        most: How many samples there may be; no copies of those beyond.
        seed: Of the variations.
        masks: The inputs that stay as they are, whatever their shape.
    """
    found = list(batches)
    total = sum(samples_in(feeds) for feeds in found)
    if not any(has_images(feeds, masks) for feeds in batches):
        return tuple(found)
    generator = np.random.default_rng(seed)
    for feeds in list(batches) * rounds:
        total += samples_in(feeds)
        if total > most:
            break
        found.append({n: values if n in masks else varied(values, generator) for n, values in feeds.items()})
    return tuple(found)
