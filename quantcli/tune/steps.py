"""Steps: what a sweep does, and what each gained."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

# A layer of more inputs has second moments that take too long to be worth it.
MOST_INPUTS = 2304


@dataclass(frozen=True)
class Steps:
    """What a sweep does.

    Attributes:
        ranges: Choose activation ranges by what they do to the layers that read them.
        outputs: Choose them by what they do to the model's outputs instead, over so many batches; 0: not.
        scales: Choose weight scales by output error.
        rounding: Round weights by second moments, not to nearest.
        compensation: Let weights make up for what the layers before have changed.
        bias: Correct biases.
        gain: Correct the gain of the last layers.
        cross_validation: Of weights of so many bits, choose how strongly they follow the samples by fitting to one half of them
            and looking at the other.
        activations: Errors that the activation behind a layer cuts count for less, in rounding and in biases.
        inputs: A layer of more inputs to an output than this is rounded to nearest.
        seed: Of everything that is drawn.
    """

    ranges: bool = True
    outputs: int = 0
    scales: bool = True
    rounding: bool = True
    compensation: bool = True
    bias: bool = True
    gain: bool = True
    cross_validation: range = range(0)
    activations: bool = False
    inputs: int = MOST_INPUTS
    seed: int = 0


NOTHING = Steps(ranges=False, scales=False, rounding=False, compensation=False, bias=False, gain=False)


@dataclass
class Gains:
    """By how much each step lowered the error of the layers that it changed: sums of the logarithms of the ratios.

    Attributes:
        layers: How many layers or tensors a step looked at, by step.
        ratios: Σ 10·log10(error before / error after), by step.
    """

    layers: Counter[str] = field(default_factory=Counter)
    ratios: dict[str, float] = field(default_factory=dict)

    def count(self, step: str, before: float, after: float) -> None:
        """Count one layer."""
        if before <= 0 or after <= 0:
            return
        self.layers[step] += 1
        self.ratios[step] = self.ratios.get(step, 0.0) + 10 * float(np.log10(before / after))

    def mean(self, step: str) -> float:
        """Return a step's mean gain in dB; 0 where it looked at nothing."""
        return self.ratios.get(step, 0.0) / max(self.layers[step], 1)
