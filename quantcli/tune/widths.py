"""Widths of layers: what a layer may be raised to, and what raising it takes away of the noise and costs.

A step costs the bytes by which a weight grows, or the time by which a run does: that of the model with this layer at the wider
width, less that with it at the narrower one, both measured on this machine.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantcli.tune.wide import WIDE_BITS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Width:
    """What a layer may be raised to.

    Attributes:
        bits: The bits of its weight; 32 for float32.
        real: Whether it computes in float.
        around: The bits of the activations around it (`quantcli.tune.search.Search.around`), where the target has several.
    """

    bits: int
    real: bool = False
    around: int = 8


WIDE, WIDEST, STORED, FLOAT = Width(8), Width(16), Width(16, real=True), Width(32, real=True)
AROUND = Width(8, around=WIDE_BITS)


@dataclass(frozen=True)
class Step:
    """One layer made wider.

    Attributes:
        layer: Its name.
        weight: Its weight's name.
        width: Its width then.
        noise: By how much it lowers the outputs' noise, as a part of their signal.
        cost: What it costs, above zero: in bytes (`bytes_between`) or in seconds (`seconds_between`).
    """

    layer: str
    weight: str
    width: Width
    noise: float
    cost: float

    @property
    def rate(self) -> float:
        """The noise that it takes away by what it costs."""
        return self.noise / self.cost


def raised_by(steps: Sequence[Step]) -> dict[str, Step]:
    """Return the last step of every layer that steps raise, by its weight's name."""
    return {step.weight: step for step in steps}


def steps_of(
    layer: str,
    weight: str,
    cost: Callable[[Width, Width], float],
    passed: Sequence[Width],
    noises: Mapping[Width, float],
) -> list[Step]:
    """Return one layer's steps from width to width, each with the noise that it takes away and what it costs.

    Weights of 16 bits are left out where they take away less by what they cost than what comes behind them.

    Args:
        layer: Its name.
        weight: Its weight's name.
        cost: Returns what it costs to go from one width to another.
        passed: The widths.
        noises: What each leaves.
    """
    steps = [
        Step(layer, weight, after, max(noises[before] - noises[after], 0.0), cost(before, after))
        for before, after in itertools.pairwise(passed)
    ]
    for one, other in itertools.pairwise(steps):
        if one.width == WIDEST and one.rate < other.rate:
            return steps_of(layer, weight, cost, [width for width in passed if width != WIDEST], noises)
    for number in range(1, len(steps)):  # what comes second must not come first
        second = steps[number]
        steps[number] = replace(second, noise=min(second.noise, steps[number - 1].rate * second.cost * 0.999))
    return steps


def bytes_between(before: Width, after: Width, weights: int, around: int) -> float:
    """Return by how many bytes a layer's weight and the activations around it grow from one width to another, at least one.

    A layer that is to compute in float counts as if its weight became float.

    Args:
        before: The narrower width.
        after: The wider one.
        weights: How many values the weight has.
        around: How many the activations around it have for a sample.
    """
    stored = (FLOAT.bits if after.real else after.bits) - before.bits
    return max((weights * stored + around * max(after.around - before.around, 0)) / 8, 1.0)


def seconds_between(before: Width, after: Width, spent: Mapping[Width, float], least: float) -> float:
    """Return by how much longer a run takes from one width to another.

    Weights that are stored in few bits and compute in float count as float ones, and those below 8 bits, which kernels take as
    int8, as those of 8.

    Args:
        before: The narrower width.
        after: The wider one.
        spent: What a run takes, by width.
        least: What a step costs at least: less than that cannot be measured.
    """
    return max(spent[timed_as(after)] - spent[timed_as(before)], least)


def timed_as(width: Width) -> Width:
    """Return the width whose time a width takes."""
    if width.real:
        return FLOAT
    return WIDE if width.bits < WIDE.bits else width
