"""Mixed widths: where weights have less than 8 bits, the smallest get 8, as far as the file hardly grows.

A depthwise kernel, a first convolution or a last layer of ten classes has few weights to an output, whose rounding errors hardly
average out, and few weights at all. That first and last layers keep 8 bits is usual for that (Li et al. 2021, arXiv 2102.05426,
section 4, say); here it is the bytes that tell, of any layer. Widths that keep a metric are another matter
(`quantcli.tune.search`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from quantcli.fold import constant
from quantcli.masks import unresolvable
from quantcli.placement import place
from quantcli.recipe import Weight, resolve_target
from quantcli.rules import Arithmetic, Operand

if TYPE_CHECKING:
    from quantcli.recipe import Recipe
    from quantcli.tune.candidates import Candidate

# The width, and by what part of all weights' bytes they may grow.
MIXED_BITS, GROWTH = 8, 0.03
# By so many dB that has to be better.
WORTH_MIXING = 0.3


def may_mix(recipe: Recipe) -> bool:
    """Tell whether small weights may be wider: the recipe leaves it open, and it alone says that weights are narrow.

    Where the target says so, its hardware may have nothing else.
    """
    wished = recipe.tune.effort == "best" if recipe.tune.mixed is None else recipe.tune.mixed
    own = resolve_target(msgspec.structs.replace(recipe, weight=Weight()))
    return (
        wished and recipe.tune.max_drop is None and resolve_target(recipe).weight.bits < MIXED_BITS <= own.weight.bits
    )


def mixed(base: Candidate, recipe: Recipe) -> Candidate | None:
    """Return a candidate whose smallest weights have 8 bits; None where even the smallest would let the file grow too much.

    Args:
        base: The candidate.
        recipe: What the user wants.
    """
    narrow = resolve_target(recipe).weight.bits
    sizes: dict[str, int] = {}
    for layer in place(base.model, recipe, unresolvable(base.model, base.statistics.tensors, recipe)).layers:
        for _, value, kind in layer.operands() if layer.rule.arithmetic is Arithmetic.ACCUMULATE else ():
            held = constant(value) if kind is Operand.WEIGHT else None
            if held is not None:
                sizes[str(value.name)] = held.size
    room = GROWTH * sum(sizes.values()) * narrow
    raised: dict[str, int] = {}
    for name, size in sorted(sizes.items(), key=lambda one: one[1]):
        room -= size * (MIXED_BITS - narrow)
        if room < 0:
            break
        raised[name] = MIXED_BITS
    return replace(base, tuning=replace(base.tuning, bits={**raised, **base.tuning.bits})) if raised else None
