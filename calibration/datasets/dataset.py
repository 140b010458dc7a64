"""What every reader gives: a counted, re-readable set of samples, and the batches drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from numpy.typing import NDArray

# Large enough to keep the cores busy, small enough that the activations of one batch are no burden.
DEFAULT_BATCH = 32


@dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Attributes:
        name: Its name.
        dtype: The numpy dtype that it takes.
        shape: Its dimensions; None where a dimension is free.
        masks: Whether it only ever masks scores: −infinity stands for what is masked in it.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]
    masks: bool = False


class Dataset(Protocol):
    """Samples on disk. The first axis of every array that it gives is the sample."""

    @property
    def labels(self) -> NDArray[np.integer] | None:
        """The class of every sample; None where the data has no labels."""
        ...

    @property
    def digest(self) -> str:
        """The sha256 of what is stored."""
        ...

    @property
    def synthetic(self) -> bool:
        """Whether the samples are made up."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def shape_of(self, index: int) -> Hashable:
        """Return something that is equal for samples that can be read together."""
        ...

    def read(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Return the samples at ``indices``, preprocessed, by input name."""
        ...


@dataclass(frozen=True)
class Selection:
    """Which samples of a data set are used, in which order.

    Attributes:
        samples: How many; None for all.
        shuffle: Whether they are drawn at random (a seeded permutation) rather than from the front. None: at random where only a
            part is used, so that a folder sorted by class does not give the first class alone.
        seed: The seed of the permutation.
    """

    samples: int | None = None
    shuffle: bool | None = None
    seed: int = 0


def usable(values: NDArray[np.floating], masks: bool) -> NDArray[np.bool_]:
    """Tell of each value whether a model can be run on it: it is finite, or −infinity in what masks."""
    finite: NDArray[np.bool_] = np.isfinite(values)
    return finite | np.isneginf(values) if masks else finite


def select(count: int, selection: Selection) -> NDArray[np.intp]:
    """Return the indices of the chosen samples among ``count``.

    Raises:
        DataError: If more samples are asked for than there are.
    """
    wanted = count if selection.samples is None else selection.samples
    if wanted > count:
        raise DataError(f"{wanted} samples were asked for and the data holds {count}", "lower --samples")
    if wanted < 1:
        raise DataError("no sample was asked for", "--samples takes a number of at least 1")
    shuffle = wanted < count if selection.shuffle is None else selection.shuffle
    if not shuffle:
        return np.arange(wanted, dtype=np.intp)
    return np.random.default_rng(selection.seed).permutation(count)[:wanted].astype(np.intp)


def fixes_batch(inputs: tuple[InputSpec, ...]) -> bool:
    """Tell whether a model fixes its batch size."""
    return any(spec.shape and spec.shape[0] is not None for spec in inputs)


def single(inputs: tuple[InputSpec, ...], feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the first of some samples; all of them where the model fixes its batch."""
    return feeds if fixes_batch(inputs) else {name: values[:1] for name, values in feeds.items()}


def fitted_batch(inputs: tuple[InputSpec, ...], wanted: int | None) -> int:
    """Return the batch size to run a model with: what it fixes, else what is wanted, else the default.

    Raises:
        DataError: If the model fixes another batch size than the one wanted.
    """
    fixed = {spec.shape[0] for spec in inputs if spec.shape and spec.shape[0] is not None}
    if not fixed:
        return wanted or DEFAULT_BATCH
    size = max(size for size in fixed if size is not None)
    if wanted not in (None, size):
        raise DataError(f"the model takes batches of {size}, not of {wanted}", "leave out --batch")
    return size


def boundaries(dataset: Dataset, indices: NDArray[np.intp], size: int, fixed: bool = False) -> list[tuple[int, int]]:
    """Return the batches of some samples, as (start, stop) positions in ``indices``.

    Args:
        dataset: The samples.
        indices: The chosen ones, in order.
        size: How many a batch holds at most; one ends where the shape of the samples changes, too.
        fixed: Whether smaller batches are left out.
    """
    spans: list[tuple[int, int]] = []
    start = 0
    shape: Hashable = None
    for position, index in enumerate(indices):
        found = dataset.shape_of(int(index))
        if position > start and (position - start == size or found != shape):
            spans.append((start, position))
            start = position
        shape = found
    if start < len(indices):
        spans.append((start, len(indices)))
    return [span for span in spans if not fixed or span[1] - span[0] == size]


def batches(dataset: Dataset, indices: NDArray[np.intp], size: int) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the chosen samples in batches of ``size``; one ends where the shape of the samples changes, too."""
    for start, stop in boundaries(dataset, indices, size):
        yield dataset.read(indices[start:stop])
