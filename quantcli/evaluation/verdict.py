"""Thresholds: what an evaluation has to reach, and whether it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.errors import UsageError

if TYPE_CHECKING:
    from quantcli.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class Thresholds:
    """What has to be reached; None where nothing is asked.

    Attributes:
        max_drop: By how much the metric may lie below float's, in its points.
        min_metric: What the quantized model's metric must be at least.
        min_speedup: How many times faster than float it must run.
    """

    max_drop: float | None = None
    min_metric: float | None = None
    min_speedup: float | None = None

    @property
    def any(self) -> bool:
        """Whether anything is asked."""
        return (self.max_drop, self.min_metric, self.min_speedup) != (None, None, None)


@dataclass(frozen=True)
class Check:
    """One threshold.

    Attributes:
        name: Its name.
        value: What was found.
        limit: What was asked.
        met: Whether it was reached.
        said: The verdict in words.
    """

    name: str
    value: float
    limit: float
    met: bool
    said: str


@dataclass(frozen=True)
class Figures:
    """What thresholds are judged by.

    Attributes:
        metric: The metric's name.
        quantized: The quantized model's.
        drop: Float minus quantized; None without a float figure.
        speedup: Float latency ÷ quantized latency; None where it was not measured.
    """

    metric: str
    quantized: float
    drop: float | None
    speedup: float | None


def figures_of(found: Evaluation) -> Figures:
    """Return an evaluation's figures."""
    speedup = found.latency.ratio if found.latency is not None else None
    return Figures(found.metric, found.quantized, found.drop, speedup)


def checked(found: Figures, asked: Thresholds) -> tuple[Check, ...]:
    """Return the verdict on every threshold.

    Raises:
        UsageError: If one asks for a figure that there is not.
    """
    checks = []
    if asked.max_drop is not None:
        if found.drop is None:
            raise UsageError(
                f"--max-drop has no meaning for {found.metric}, which has no float figure",
                "use top1, top5 or a function",
            )
        # The drop is a difference of two percentages: their rounding must not decide.
        met = found.drop <= asked.max_drop + 1e-9
        how = "at most" if met else "more than the"
        said = f"{found.metric} dropped by {found.drop:.2f} points, {how} {asked.max_drop:g} allowed"
        checks.append(Check("max-drop", found.drop, asked.max_drop, met, said))
    if asked.min_metric is not None:
        met = found.quantized >= asked.min_metric - 1e-9
        said = f"{found.metric} is {found.quantized:.2f}, {'at least' if met else 'less than the'} {asked.min_metric:g} asked"
        checks.append(Check("min-metric", found.quantized, asked.min_metric, met, said))
    if asked.min_speedup is not None:
        if found.speedup is None:
            raise UsageError(
                "--min-speedup needs latencies", "add --float MODEL, leave out --no-latency, evaluate an .onnx"
            )
        ratio = found.speedup
        met = ratio >= asked.min_speedup
        said = f"it runs {ratio:.2f} times as fast as float, {'at least' if met else 'less than the'} {asked.min_speedup:g} asked"
        checks.append(Check("min-speedup", ratio, asked.min_speedup, met, said))
    return tuple(checks)
