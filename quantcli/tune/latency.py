"""What runs faster on this machine: candidates are written and timed in turn.

Of layer groups that may stay in float, the fastest plan is kept (`timed`). Integer kernels gain little where a convolution has few
inputs per output: the first ones of a network (few channels at full size), and depthwise ones. Whether they gain or lose depends on
the machine and on what stands around them, so it is measured. So is how much longer a run takes where a single layer is wider
(`beside`), for searches of widths.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.datasets import single
from calibration.hooks.onnxruntime import Runner
from quantcli.placement import place
from quantcli.rules import Arithmetic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.recipe import Recipe

# A candidate must be faster than the rule's plan by more than this part, or noise decides.
MARGIN = 0.03
WARM_UPS, RUNS = 5, 25
# What a single layer changes is small: fast models are timed more often, for about so many seconds each, up to so many runs.
SPENT, FEWEST, MOST = 0.03, 9, 100
# How many convolutions, from a network's inputs on, are tried in float together.
LEADING = (2, 3, 4, 6)
RULE = "by rule"


@dataclass(frozen=True)
class Trial:
    """A plan that was timed.

    Attributes:
        name: Which layer groups it keeps in float.
        seconds: The median of its runs.
        layers: The layers that it keeps in float.
        kept: Whether it is the one that is written.
    """

    name: str
    seconds: float
    layers: tuple[str, ...]
    kept: bool = False


def candidates(model: ir.Model, recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Return the plans to time, each as the layers that it keeps in float beyond those that the rules do."""
    placement = place(model, recipe)
    moved = {
        layer.output: layer.operands()[0][1] for layer in placement.layers if layer.rule.arithmetic is Arithmetic.MOVE
    }
    made = {value for layer in placement.layers if not layer.real for value in layer.outputs} - set(moved)
    convolutions = [
        layer.node
        for layer in placement.layers
        if layer.rule.arithmetic is Arithmetic.ACCUMULATE and layer.node.op_type == "Conv"
    ]
    first = tuple(str(node.name) for node in convolutions if source_of(node.inputs[0], moved) not in made)
    depthwise = tuple(
        str(node.name)
        for node in convolutions
        if node.attributes.get_int("group", 1) > 1 and str(node.name) not in first
    )
    found: dict[str, tuple[str, ...]] = {RULE: ()}
    if first:
        found["first convolutions in float"] = first
    if depthwise:
        found["depthwise convolutions in float"] = depthwise
    if first and depthwise:
        found["first and depthwise convolutions in float"] = first + depthwise
    names = [str(node.name) for node in convolutions]
    for count in LEADING:
        leading = tuple(dict.fromkeys((*first, *names[:count])))
        if len(leading) < len(names) and leading not in found.values():
            found[f"the first {count} convolutions in float"] = leading
    rest = {str(layer.node.name) for layer in placement.layers}
    return {name: layers for name, layers in found.items() if not layers or set(layers) < rest}


def source_of(value: ir.Value | None, moved: Mapping[ir.Value, ir.Value]) -> ir.Value | None:
    """Return what a value holds the data of, before integers were only moved."""
    while value is not None and value in moved:
        value = moved[value]
    return value


def interleaved(actions: Sequence[Callable[[], object]], runs: int = RUNS) -> list[float]:
    """Return the median seconds of each action, run in turn after warm-ups, in another order each time.

    What ran before an action leaves the caches as it found use for them; so none comes always after the same one.
    """
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(WARM_UPS + runs):
        for which in random.Random(turn).sample(range(len(actions)), len(actions)):
            start = time.perf_counter()
            actions[which]()
            if turn >= WARM_UPS:
                times[which].append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def timed(
    written: Mapping[str, bytes],
    layers: Mapping[str, tuple[str, ...]],
    feeds: dict[str, NDArray[Any]],
    threads: int,
    timer: Callable[[Sequence[Callable[[], object]]], list[float]] = interleaved,
) -> tuple[Trial, ...]:
    """Time candidates on the same samples, and mark the one to keep.

    Args:
        written: The quantized models' bytes, by candidate; the rule's plan among them.
        layers: What each keeps in float.
        feeds: Samples; the first of them is run, or all where the model fixes its batch.
        threads: Threads of ONNX Runtime.
        timer: Returns the seconds of each of some actions.
    """
    seconds = dict(zip(written, timer(runs_of(list(written.values()), feeds, threads)), strict=True))
    best = min(seconds, key=lambda name: seconds[name])
    if seconds[best] > seconds[RULE] * (1 - MARGIN):
        best = RULE
    return tuple(Trial(name, seconds[name], layers[name], name == best) for name in written)


def runs_of(models: Sequence[bytes], feeds: dict[str, NDArray[Any]], threads: int) -> list[Callable[[], object]]:
    """Return what runs each of some models once, as users do who want an answer soon: one sample."""
    runners = [Runner(model, threads) for model in models]
    return [functools.partial(runner.run, single(runner.inputs, feeds)) for runner in runners]


def beside(
    base: bytes, others: Sequence[bytes], feeds: dict[str, NDArray[Any]], threads: int
) -> tuple[float, list[float]]:
    """Return the seconds that a model takes, and by how many more others take, run in turn.

    Args:
        base: The model's bytes.
        others: The others'.
        feeds: Samples; the first of them is run, or all where the model fixes its batch.
        threads: Threads of ONNX Runtime.
    """
    actions = runs_of([base, *others], feeds, threads)
    about = interleaved(actions[:1], runs=1)[0]
    spent, *more = interleaved(actions, runs=min(max(int(SPENT / max(about, 1e-9)), FEWEST), MOST))
    return spent, [seconds - spent for seconds in more]
