"""What every reader gives: a counted, re-readable set of samples, and the batches drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from calibration.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping

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
    """Samples on disk. The first axis of every array that it gives is the sample, but for a model of whole runs (`whole_runs`)."""

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


# Directions or layers, batch, units: the axes of a recurrent network's state.
STATE_AXES = 3


def whole_runs(inputs: tuple[InputSpec, ...]) -> bool:
    """Tell whether a sample is a whole run of a model, since its inputs do not share a first axis that counts samples.

    One is a scalar (a sampling rate), or they have first axes of several lengths, or of a number and a free one, while the axis of
    samples stands behind the number: the state of a recurrent network, of 2 × batch × units, the batch free or 1.
    """
    fixed = {spec.shape[0] if spec.shape else 0 for spec in inputs if not spec.shape or spec.shape[0] is not None}
    if 0 in fixed or len(fixed) > 1:
        return True
    free = any(spec.shape[0] is None for spec in inputs)
    beside = [spec.shape[1:] for spec in inputs if spec.shape[0] not in {None, 1}]
    return free and any(None in rest or (len(rest) == STATE_AXES - 1 and rest[0] == 1) for rest in beside)


def fixes_batch(inputs: tuple[InputSpec, ...]) -> bool:
    """Tell whether a model fixes its batch size; a whole run is a batch of one."""
    return whole_runs(inputs) or any(spec.shape and spec.shape[0] is not None for spec in inputs)


def samples_in(feeds: Mapping[str, NDArray[Any]]) -> int:
    """Return how many samples a batch holds; 1 where its arrays do not share their first axis: it is a whole run."""
    counts = {len(values) if values.ndim else 0 for values in feeds.values()}
    return counts.pop() if len(counts) == 1 and 0 not in counts else 1


def single(inputs: tuple[InputSpec, ...], feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the first of some samples; all of them where the model fixes its batch."""
    return feeds if fixes_batch(inputs) else {name: values[:1] for name, values in feeds.items()}


def fitted_batch(inputs: tuple[InputSpec, ...], wanted: int | None) -> int:
    """Return the batch size to run a model with: what it fixes, else what is wanted, else the default.

    Raises:
        DataError: If the model fixes another batch size than the one wanted.
    """
    fixed = {1} if whole_runs(inputs) else {spec.shape[0] for spec in inputs if spec.shape[0] is not None}
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


@dataclass(frozen=True, eq=False)
class Runs:
    """Samples each of which is a whole run of a model: what it gives has no axis of samples.

    Attributes:
        stored: The runs, along a first axis of every array.
    """

    stored: Dataset

    @property
    def labels(self) -> NDArray[np.integer] | None:
        """The class of every run; None where the data has no labels."""
        return self.stored.labels

    @property
    def digest(self) -> str:
        """The sha256 of what is stored."""
        return self.stored.digest

    @property
    def synthetic(self) -> bool:
        """Whether the runs are made up."""
        return self.stored.synthetic

    def __len__(self) -> int:
        return len(self.stored)

    def shape_of(self, index: int) -> Hashable:
        """Return something that is equal for runs of the same shapes."""
        return self.stored.shape_of(index)

    def read(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        """Return the run at the only one of ``indices``, preprocessed, by input name."""
        assert len(indices) == 1  # noqa: S101 - `fitted_batch` says so
        return {name: values[0, ...] for name, values in self.stored.read(indices).items()}
