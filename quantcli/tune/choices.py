"""Choices: what a candidate is made by, and which of them a recipe has tried in any case or both ways."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from quantcli.arithmetic.affine import IntegerType
from quantcli.recipe import resolve_target
from quantcli.tune.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantcli.recipe import Recipe
    from quantcli.targets import Target


# Weights of fewer bits are learned.
LEARNED = 4


@dataclass(frozen=True)
class Choice:
    """What a candidate is made by.

    Attributes:
        equalize: Whether it is the equalized model.
        centre: Whether its one-sided tensors were moved to both sides of zero.
        align: Whether its tensors were scaled to where grids of powers of two end.
        steps: The steps of the sweep.
        vary: Whether it runs varied copies of the samples, too.
    """

    equalize: bool
    centre: bool
    align: bool
    steps: Steps
    vary: bool = False

    def toggled(self, step: str) -> Choice:
        """Return the choice with one step the other way."""
        if step in {"equalize", "centre", "align", "vary"}:
            other: dict[str, Any] = {step: not getattr(self, step)}
            return replace(self, **other)
        if step == "outputs":  # of the two ways to choose ranges, the one that costs less
            return replace(self, steps=replace(self.steps, outputs=0))
        change: dict[str, Any] = {step: not getattr(self.steps, step)}
        return replace(self, steps=replace(self.steps, **change))

    @property
    def name(self) -> str:
        """What was done, in words."""
        parts = ["equalization"] if self.equalize else []
        parts += ["centring"] if self.centre else []
        parts += ["alignment"] if self.align else []
        parts += ["ranges by outputs" if self.steps.outputs else "ranges"] if self.steps.ranges else []
        parts += [step for step in ("compensation", "scales", "rounding", "bias", "gain") if getattr(self.steps, step)]
        parts += ["activations"] if self.steps.activations else []
        parts += ["varied samples"] if self.vary else []
        return ", ".join(parts) or "nothing"


def centrable(target: Target) -> bool:
    """Tell whether activations have no zero point, and too few integers to leave half of them unused."""
    return target.activation.symmetric and IntegerType(target.activation.grid).bits <= 8


def freed(target: Target, **changes: bool) -> Target:
    """Return a target whose activations can do more."""
    return msgspec.structs.replace(target, activation=msgspec.structs.replace(target.activation, **changes))


def first_choices(recipe: Recipe, equalizing: Sequence[bool], outputs: int, images: bool) -> list[Choice]:
    """Return what is tried in any case; ranges by what they do to the outputs over so many batches, to their readers if 0."""
    wishes, target = recipe.tune, resolve_target(recipe)
    steps = Steps(
        ranges=wishes.ranges is not False,
        outputs=outputs,
        compensation=is_coarse(target) if wishes.compensation is None else wishes.compensation,
        scales=wishes.scales is not False,
        rounding=wishes.rounding is not False,
        bias=wishes.bias is not False,
        gain=wishes.gain is not False,
        cross_validation=cross_validated(wishes.cross_validation, target),
        activations=wishes.activations is True,
        seed=recipe.calibration.seed,
    )
    shifting = target.activation.power_of_two
    centre = centrable(target) and (shifting if wishes.centre is None else wishes.centre)
    align = shifting and wishes.align is not False
    return [Choice(even, centre, align, steps, wishes.vary is True and images) for even in equalizing]


def learns(recipe: Recipe) -> bool:
    """Tell whether rounding is learned: where the recipe says so, or the effort is best and weights have 2 or 3 bits.

    With 4 it took two thirds of the time and was kept of none of four networks.
    """
    wished = recipe.tune.adaround
    return recipe.tune.effort == "best" and resolve_target(recipe).weight.bits < LEARNED if wished is None else wished


def is_coarse(target: Target) -> bool:
    """Tell whether weights are so coarse that they have to follow the samples: less than 8 bits, or one scale for all rows.

    Where small rows share the scale of large ones, a few of its integers are all that they have.
    """
    weight = target.weight
    return weight.bits < 8 or (weight.bits == 8 and not weight.per_channel and not weight.power_of_two)


def cross_validated(wished: bool | None, target: Target) -> range:
    """Return the widths of weights that are fitted to halves of the samples, as the recipe wishes.

    Where it says nothing, neither those that lose little anyway nor 2 and 3 bits, where some networks lost (docs/accuracy.md).
    """
    if wished is None:
        return range(4, 9 if is_coarse(target) and not target.weight.per_channel else 8)
    return range(2, 17) if wished else range(0)


def compensated_both_ways(target: Target) -> bool:
    """Tell whether compensation, which helps some models and not others, is tried both ways: with 8 bits and powers of two."""
    return target.weight.bits >= 8 and target.weight.power_of_two


def open_steps(recipe: Recipe, may_equalize: bool, images: bool) -> list[str]:
    """Return the steps that are tried both ways, as far as the recipe leaves them open."""
    names = ["compensation", "ranges", "activations", *(["equalize"] if may_equalize else [])]
    target = resolve_target(recipe)
    names += [name for name, may in (("centre", centrable(target)), ("align", target.activation.power_of_two)) if may]
    names += ["vary"] if images and target.weight.bits < 8 else []
    both = ["outputs"] if recipe.tune.ranges is None else []
    return both + [name for name in names if getattr(recipe.tune, name) is None]
