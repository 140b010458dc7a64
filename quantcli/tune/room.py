"""How much tuning looks at: so many samples as the effort says and as there is room for, and work that is worth its time."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from quantcli.cost import larger_by, values_of, work_of
from quantcli.masks import unresolvable
from quantcli.placement import place
from quantcli.recipe import resolve_target
from quantcli.tune.outputs import TRIES

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.recipe import Recipe
    from quantcli.tune.candidates import Candidate

# How many samples a sweep runs: more where weights are coarse, which is where it has most to choose; and how many others judge.
SAMPLES, COARSE_SAMPLES = {"default": 64, "best": 256}, 256
JUDGES = 64
# What the tensors between a sweep's layers may take, in bytes; fewer samples are run where they would take more.
ROOM = 1 << 30
# The same where varied copies of samples are run: of a MobileNet they are worth 0.45 dB of 4 bits, and ROOM holds hardly any.
VARIED_ROOM = 3 << 30


def wanted_samples(model: ir.Model, recipe: Recipe) -> int:
    """Return how many samples sweeps are to run: the recipe's, or the effort's as far as there is room."""
    if recipe.tune.samples is not None:
        return recipe.tune.samples
    weight = resolve_target(recipe).weight
    wished = COARSE_SAMPLES if weight.bits < 8 or not weight.per_channel else SAMPLES[recipe.tune.effort]
    return max(4, min(wished, room_for(model)))


def room_for(model: ir.Model, room: int = ROOM) -> int:
    """Return for how many samples so many bytes hold what waits between a sweep's layers."""
    return room // max(8 * most_held(model), 1)


def most_held(model: ir.Model) -> int:
    """Return the most values that wait for readers at once while a model runs node by node, per sample."""
    last = {value: number for number, node in enumerate(model.graph) for value in node.inputs if value is not None}
    held, most = 0, 0
    ends: dict[int, int] = {}
    for number, node in enumerate(model.graph):
        for value in node.outputs:
            size = values_of(value) or 0
            held += size
            ends[last.get(value, number)] = ends.get(last.get(value, number), 0) + size
        most = max(most, held)
        held -= ends.get(number, 0)
    return most


def work_ahead(candidate: Candidate, recipe: Recipe, feeds: dict[str, NDArray[Any]]) -> int:
    """Return about how many multiply-accumulates it takes, per sample, to judge ranges by what they do to the outputs.

    Every range takes a run of what is left of the model behind its tensor, which is half of it on average.
    """
    placement = place(candidate.model, recipe, unresolvable(candidate.model, candidate.statistics.tensors, recipe))
    work = [work_of(node) for node in candidate.model.graph]
    if any(one.macs is None or one.made is None for one in work):
        return sys.maxsize
    once = sum((one.macs or 0) + (one.made or 0) for one in work) * larger_by(candidate.model, feeds)
    return len(placement.observed()) * TRIES * once // 2
