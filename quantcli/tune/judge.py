"""The judge: samples that no candidate has seen, and what each candidate leaves of the float model's outputs there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.hooks.onnxruntime import Runner
from quantcli.evaluation.metrics import Comparison
from quantcli.joined import parted, parts_of, unlike
from quantcli.plan import make_plan
from quantcli.probe import model_bytes, runnable
from quantcli.quantize import quantize
from quantcli.tune.outputs import logarithms
from quantcli.write import WRITERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.evaluation.metrics import Difference
    from quantcli.recipe import Recipe
    from quantcli.tune.candidates import Candidate


class Judge:
    """Samples, what the float model makes of them, and so what a candidate is worth.

    Args:
        model: The float model, folded.
        batches: Samples that no candidate has seen.
        recipe: What the user wants.
    """

    def __init__(self, model: ir.Model, batches: Sequence[dict[str, NDArray[Any]]], recipe: Recipe) -> None:
        self.model, self.batches, self.recipe, self.joined = model, batches, recipe, parts_of(model)
        runner = Runner(runnable(model), what="the folded model")
        self.expected = [parted(runner.run(feeds), self.joined) for feeds in batches]
        self.unlike = unlike(self.expected, self.joined)
        self.counted: frozenset[str] = frozenset()

    def sqnr(self, candidate: Candidate) -> float:
        """Return the mean SQNR of a candidate's outputs, in dB; −200 where an output is not finite.

        Outputs that are exact in the first candidate say nothing of those that are not, and count for none.
        """
        found = self.compared(candidate, self.recipe)
        if not self.counted:
            inexact = frozenset(name for name, difference in found.items() if difference.noise != 0)
            self.counted = inexact or frozenset(found)
        values = [min(difference.sqnr, 200.0) for name, difference in found.items() if name in self.counted]
        mean = float(np.mean(values)) if values else 0.0
        return mean if math.isfinite(mean) else -200.0

    def noise(self, candidate: tuple[Candidate, Recipe]) -> float:
        """Return the noise of a candidate's outputs as a part of their signal, averaged over the outputs."""
        values = [10 ** (-min(difference.sqnr, 200.0) / 10) for difference in self.compared(*candidate).values()]
        return float(np.mean(values)) if values else 0.0

    def compared(self, candidate: Candidate, recipe: Recipe) -> dict[str, Difference]:
        """Return how a candidate's outputs differ from float's, by name; of those that are joined, each part."""
        plan = make_plan(candidate.model, candidate.statistics, recipe, candidate.tuning)
        written = model_bytes(WRITERS["qdq"](quantize(candidate.model, plan)))
        runner = Runner(written, what="a candidate", exact=plan.target.weight.pair_bits is None)
        comparison = Comparison()
        steps = {name: plan.tensors[name].scale[0] for name in runner.outputs if name in plan.tensors}
        for feeds, expected in zip(self.batches, self.expected, strict=True):
            comparison.update(*logarithms(expected, parted(runner.run(feeds), self.joined), steps))
        return comparison.outputs
