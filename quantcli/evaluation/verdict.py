"""Thresholds: what an evaluation has to reach, and whether it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantcli.errors import UsageError
from quantcli.evaluation.metrics import FLOAT_METRICS, LOWER_IS_BETTER

if TYPE_CHECKING:
    from quantcli.evaluation.evaluate import Evaluation

# What rounding may make of a figure.
ROUNDING = 1e-9
# As many decimals as tell apart what differs by more than that.
DECIMALS = 12


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


def check_thresholds(metric: str, asked: Thresholds) -> None:
    """Raise where a threshold has no meaning for a metric.

    Raises:
        UsageError: If it has a direction or a float figure that the metric has not.
    """
    if asked.max_drop is not None and metric in FLOAT_METRICS:
        raise UsageError(
            f"--max-drop has no meaning for {metric}, which has no float figure", "use top1, top5 or a function"
        )
    if asked.min_metric is not None and metric in LOWER_IS_BETTER:
        raise UsageError(
            f"--min-metric asks for so much or more, and {metric} is better the lower", "use psnr or sqnr in its place"
        )


def checked(found: Figures, asked: Thresholds) -> tuple[Check, ...]:
    """Return the verdict on every threshold.

    Raises:
        UsageError: If one asks for a figure that there is not.
    """
    check_thresholds(found.metric, asked)
    checks = []
    if asked.max_drop is not None:
        if found.drop is None:
            raise UsageError(f"--max-drop needs float's {found.metric}", "add --float MODEL")
        # The drop is a difference of two percentages: their rounding must not decide.
        met = found.drop <= asked.max_drop + ROUNDING
        how = "at most" if met else "more than the"
        value, limit = told_apart(found.drop, asked.max_drop)
        said = f"{found.metric} dropped by {value} points, {how} {limit} allowed"
        checks.append(Check("max-drop", found.drop, asked.max_drop, met, said))
    if asked.min_metric is not None:
        met = found.quantized >= asked.min_metric - ROUNDING
        value, limit = told_apart(found.quantized, asked.min_metric)
        said = f"{found.metric} is {value}, {'at least' if met else 'less than the'} {limit} asked"
        checks.append(Check("min-metric", found.quantized, asked.min_metric, met, said))
    if asked.min_speedup is not None:
        if found.speedup is None:
            raise UsageError(
                "--min-speedup needs latencies", "add --float MODEL, leave out --no-latency, evaluate an .onnx"
            )
        met = found.speedup >= asked.min_speedup
        value, limit = told_apart(found.speedup, asked.min_speedup)
        said = f"it runs {value} times as fast as float, {'at least' if met else 'less than the'} {limit} asked"
        checks.append(Check("min-speedup", found.speedup, asked.min_speedup, met, said))
    return tuple(checks)


def told_apart(value: float, limit: float) -> tuple[str, str]:
    """Write a figure with two decimals, or as many as show on which side of its limit it lies; and the limit."""
    shown = next(
        (
            text
            for text in (f"{value:.{n}f}" for n in range(2, DECIMALS))
            if side(float(text), limit) == side(value, limit)
        ),
        repr(value),
    )
    return shown, f"{limit:.15g}"


def side(value: float, limit: float) -> int:
    """Return 1 above a limit, -1 below it, and 0 at it."""
    return (value > limit + ROUNDING) - (value < limit - ROUNDING)
