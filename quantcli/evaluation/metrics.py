"""Metrics, accumulated batch by batch: those of labels (top1, top5) and those against the float model (sqnr, mse, psnr, cosine)."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import DataError
from quantcli.joined import parted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from quantcli.joined import Parts

LABEL_METRICS = {"top1": 1, "top5": 5}
FLOAT_METRICS = ("sqnr", "mse", "psnr", "cosine")
LOWER_IS_BETTER = ("mse",)
# Infinite where nothing was lost.
UNBOUNDED = ("sqnr", "psnr")
METRICS = (*LABEL_METRICS, *FLOAT_METRICS)
UNITS = {"top1": "%", "top5": "%", "sqnr": "dB", "psnr": "dB", "mse": "", "cosine": ""}


def written(metric: str, value: float | None, signed: bool = False) -> str:
    """Write a figure of a metric for people: per cent and dB with two decimals, others with six digits; nothing for None."""
    form = f"{'+' if signed else ''}{'.2f' if UNITS.get(metric) else '.6g'}"
    return "" if value is None else format(value, form)


def scores_of(outputs: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the scores among a model's outputs: the first in real numbers, since classifiers may give the class before them."""
    values = list(outputs.values())
    return next((value for value in values if value.dtype.kind == "f"), values[0])


@dataclass
class TopK:
    """The share of samples whose label is among the k highest scores, in percent.

    Attributes:
        k: How many scores count.
    """

    k: int
    hits: int = 0
    samples: int = 0

    def update(self, scores: NDArray[Any], labels: NDArray[np.integer]) -> None:
        """Count a batch: scores of shape (N, classes), labels of shape (N,).

        Equal scores rank by their position, as argmax has it.

        Raises:
            DataError: If the scores are not one row of classes per sample, or a label is no class.
        """
        if scores.ndim != 2 or len(scores) != len(labels):
            raise DataError(
                f"top{self.k} needs scores of shape [samples, classes], not {list(scores.shape)}",
                "choose --metric sqnr",
            )
        if labels.min() < 0 or labels.max() >= scores.shape[1]:
            wrong = int(labels.min() if labels.min() < 0 else labels.max())
            raise DataError(
                f"a label is {wrong}, and the model's classes are 0 … {scores.shape[1] - 1}",
                "number the classes as the model does",
            )
        best = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, : self.k]
        self.hits += int((best == labels[:, None]).any(axis=1).sum())
        self.samples += len(labels)

    @property
    def percent(self) -> float:
        """The metric so far."""
        return 100.0 * self.hits / self.samples if self.samples else math.nan


@dataclass
class Asked:
    """A metric of the user's: a function of all outputs and labels.

    Attributes:
        name: ``module:function``; it is called with the outputs by name, and the labels or None, and returns a number, which is
            better the higher.
    """

    name: str
    parts: dict[str, list[NDArray[Any]]] = field(default_factory=dict)

    def update(self, outputs: dict[str, NDArray[Any]]) -> None:
        """Keep a batch of outputs."""
        for name, values in outputs.items():
            self.parts.setdefault(name, []).append(values)

    def value(self, function: Callable[..., Any], labels: NDArray[np.integer] | None) -> float:
        """Return what the function says.

        Raises:
            DataError: If it fails, or returns no number.
        """
        try:
            outputs = {name: np.concatenate(values) for name, values in self.parts.items()}
            found = float(function(outputs, labels))
        except Exception as error:
            raise DataError(f"the metric {self.name} fails ({type(error).__name__}: {error})", "mend it") from error
        if not math.isfinite(found):
            raise DataError(f"the metric {self.name} returns {found}", "return a finite number")
        return found


def function_of(name: str) -> Callable[..., Any]:
    """Import a metric, ``module:function``, from the path or the present folder.

    Raises:
        DataError: If there is none.
    """
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:
        raise DataError(f"the metric {name} cannot be imported ({type(error).__name__}: {error})", "mend it") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
    return found


@dataclass
class Difference:
    """Sums from which every comparison of a result with its reference follows; all in float64."""

    signal: float = 0.0
    noise: float = 0.0
    product: float = 0.0
    energy: float = 0.0
    peak: float = 0.0
    elements: int = 0

    def update(self, reference: NDArray[Any], result: NDArray[Any]) -> None:
        """Count a batch; both arrays have the same shape."""
        x, y = reference.astype(np.float64), result.astype(np.float64)
        self.signal += float(np.square(x).sum())
        self.noise += float(np.square(x - y).sum())
        self.product += float((x * y).sum())
        self.energy += float(np.square(y).sum())
        self.peak = max(self.peak, float(np.abs(x).max(initial=0.0)))
        self.elements += x.size

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, 10·log10(Σx² / Σ(x−y)²), in dB; infinite where nothing differs."""
        return decibels(self.signal, self.noise)

    @property
    def mse(self) -> float:
        """The mean squared error."""
        return self.noise / self.elements if self.elements else math.nan

    @property
    def psnr(self) -> float:
        """Peak signal to noise, 10·log10(max|x|² / MSE), in dB."""
        return decibels(self.peak**2, self.mse)

    @property
    def cosine(self) -> float:
        """The cosine of the angle between reference and result."""
        scale = math.sqrt(self.signal * self.energy)
        return self.product / scale if scale else math.nan


def decibels(signal: float, noise: float) -> float:
    """Return 10·log10(signal / noise)."""
    if noise == 0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0 else -math.inf


@dataclass
class Comparison:
    """A model's outputs against the float model's, output by output.

    Attributes:
        joined: The parts of outputs that are joined from several tensors, by the outputs' names.
        outputs: What was counted of each output.
        parts: The same of each part, by its name.
    """

    joined: Mapping[str, Parts] = field(default_factory=dict)
    outputs: dict[str, Difference] = field(default_factory=dict)
    parts: dict[str, Difference] = field(default_factory=dict)

    def update(self, reference: dict[str, NDArray[Any]], result: dict[str, NDArray[Any]]) -> None:
        """Count a batch of outputs; those that are not real numbers are left out."""
        for name, values in reference.items():
            if values.dtype.kind == "f" and name in result and result[name].shape == values.shape:
                self.outputs.setdefault(name, Difference()).update(values, result[name])
                if name in self.joined:
                    ours, theirs = (parted({name: array}, self.joined) for array in (values, result[name]))
                    for part, array in ours.items():
                        self.parts.setdefault(part, Difference()).update(array, theirs[part])
