"""Where calibration data comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from calibration.datasets import first_samples, open_dataset

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from calibration.datasets import Dataset, Preprocess
    from calibration.datasets.dataset import InputSpec
    from quantcli.load import Example
    from quantcli.recipe import Recipe


@dataclass(frozen=True)
class Data:
    """Where calibration data comes from: exactly one of path, function and synthetic.

    Attributes:
        path: A file or folder.
        labels: A CSV that names the image files.
        split: Keep only the CSV's rows of this split.
        function: A Python callable, ``module:function``, that yields batches.
        synthetic: How many random samples are made up.
        described: Inputs as the user has described them: random samples have their sizes where the model leaves axes free.
        held: The data set that was opened last, and for what: a conversion asks for it several times.
    """

    path: Path | None = None
    labels: Path | None = None
    split: str | None = None
    function: str | None = None
    synthetic: int | None = None
    described: tuple[InputSpec, ...] = ()
    held: list[tuple[object, Dataset]] = field(default_factory=list, init=False, compare=False, repr=False)

    def opened(self, inputs: tuple[InputSpec, ...], recipe: Recipe) -> Dataset:
        """Return the data set for a model's inputs.

        Raises:
            DataError: If the data cannot be read or does not fit the model.
        """
        seed, allowed = recipe.calibration.seed, recipe.calibration.allow_non_finite
        if self.synthetic is not None:
            inputs = tuple(sized(spec, self.described) for spec in inputs)
        asked = inputs, recipe.preprocess, seed, allowed
        if not self.held or self.held[0][0] != asked:
            found = open_dataset(
                self.path,
                inputs,
                recipe.preprocess,
                self.labels,
                self.split,
                function=self.function,
                synthetic=self.synthetic,
                seed=seed,
                allow_non_finite=allowed,
            )
            self.held[:] = [(asked, found)]
        return self.held[0][1]

    def example(self, preprocess: Preprocess | None) -> Example:
        """Return what shows a model's inputs: the first samples."""
        return lambda names: first_samples(self.path, names, preprocess, self.function)

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return [path for path in (self.path, self.labels) if path is not None]


def sized(spec: InputSpec, described: Iterable[InputSpec]) -> InputSpec:
    """Return an input with the sizes that its description gives to axes that the model leaves free."""
    own = next(
        (one.shape for one in described if one.name == spec.name and len(one.shape) == len(spec.shape)), spec.shape
    )
    return replace(spec, shape=tuple(a if a is not None else b for a, b in zip(spec.shape, own, strict=True)))
