"""The recipe: what the user wants. A small TOML file; every entry has a flag on the command line that goes before it."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from calibration.datasets.dataset import Selection
from calibration.datasets.preprocess import Preprocess
from calibration.ranges import parse_range
from quantcli.errors import RecipeError, check_count, check_kind
from quantcli.files import path_or_none
from quantcli.targets import (
    DEFAULT_TARGET,
    NATIVE,
    SYMMETRIC_BITS,
    ActivationFormat,
    ActivationType,
    MultiplierBits,
    PlacementFormat,
    Rounding,
    Target,
    WeightFormat,
    load_target,
    native,
)

Format = TypeVar("Format", bound=msgspec.Struct)


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which samples calibrate, in which batches, and what is counted (section ``[calibration]``)."""

    samples: Annotated[int, msgspec.Meta(ge=1)] | None = None
    batch: Annotated[int, msgspec.Meta(ge=1)] | None = None
    shuffle: bool | None = None
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    observer: Literal["minmax", "moving-average", "mean-minmax", "percentile", "mse", "entropy", "all"] | None = None
    momentum: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.99
    channels: bool = False
    allow_non_finite: bool = False

    @property
    def selection(self) -> Selection:
        """The samples as the readers want them."""
        return Selection(self.samples, self.shuffle, self.seed)


class Activation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How activations are quantized (section ``[activation]``); None leaves it to the target, or to what the observer is for."""

    range: str | None = None
    dtype: ActivationType | None = None
    bits: Annotated[int, msgspec.Meta(ge=2, le=16)] | None = None
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        """Check the range.

        Raises:
            ValueError: If there is no such range.
        """
        if self.range is not None:
            parse_range(self.range)


class Weight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are quantized (section ``[weight]``); None leaves it to the target.

    Not ``symmetric`` are grids of 6 bits and less that lie about the middle of each scale's weights, not about zero.
    ``block_size`` is for ``mode = "weights"``: so many values along a product's inputs share a scale (32 where ``bits`` is 4).
    """

    per_channel: bool | None = None
    symmetric: bool | None = None
    bits: Annotated[int, msgspec.Meta(ge=2, le=8)] | None = None
    block_size: Annotated[int, msgspec.Meta(ge=16)] | None = None


class Multiplier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How multipliers are made (section ``[multiplier]``); None leaves it to the target."""

    bits: MultiplierBits | None = None
    rounding: Rounding | None = None


class Layers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which layers are quantized (section ``[layers]``).

    Patterns are those of a shell (``*``, ``?``, ``[…]``) and are matched against the layers' names; ``op:Conv`` matches
    operators instead. A pattern that matches nothing is an error. With ``everywhere`` whatever can be an integer layer is one,
    not only what pays on the target; a layer that ``include`` names is one in any case. With ``integer_start`` so are the first
    convolutions of a network, where the target's runtime computes those faster in float.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    everywhere: bool = False
    integer_start: bool = False


class Tune(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is done to lose less (section ``[tune]``); None leaves it to the target.

    ``effort`` says how much is tried (`quantcli.tune.effort`), over ``samples`` calibration samples. Each step can be switched on
    or off by itself: ``ranges`` by the error that they leave (``outputs``: at the model's outputs, not at their readers),
    ``equalize`` channels so that rounding costs least, ``centre`` what is never negative on symmetric grids, ``align`` tensors with
    grids of powers of two, ``compensation`` of what the layers before have changed, weight ``scales`` and ``rounding`` by output
    error, ``cross_validation`` of how strongly weights should follow the samples, correction of ``bias`` and of the last
    layers' ``gain``, regard to what ``activations`` cut, and ``adaround``: rounding learned by all layers at once. ``vary`` lets
    sweeps run shifted and mirrored copies of images, too, and ``refit`` sweeps what is kept once more, over the samples that judged
    it as well.

    With ``max_drop`` widths are searched that keep ``metric`` within so many points of float's (`quantcli.tune.search`), those of
    the least ``cost``: the bytes of the weights, where it is None, or the time of a run on this machine.
    ``widen`` gives activations 16 bits that 8 hold worst, where the target has both (`quantcli.tune.wide`): None does so where
    little is left otherwise. ``mixed`` gives the smallest of weights that the recipe wants narrower 8 bits
    (`quantcli.tune.mixed`): None does so with effort best. ``optimize`` times candidate plans on this machine and keeps the
    fastest (`quantcli.tune.latency`). ``smooth`` evens the columns of what normalisations and gated units make
    (`quantcli.tune.smooth`), with
    ``smooth_alpha`` as the part of the difficulty that moves into the weights.
    """

    effort: Literal["fast", "default", "best"] = "default"
    max_drop: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    metric: Literal["top1", "top5"] = "top1"
    cost: Literal["bytes", "latency"] | None = None
    samples: Annotated[int, msgspec.Meta(ge=1)] | None = None
    ranges: bool | Literal["outputs"] | None = None
    equalize: bool | None = None
    centre: bool | None = None
    align: bool | None = None
    compensation: bool | None = None
    scales: bool | None = None
    rounding: bool | None = None
    bias: bool | None = None
    gain: bool | None = None
    cross_validation: bool | None = None
    activations: bool | None = None
    adaround: bool | None = None
    vary: bool | None = None
    refit: bool | None = None
    widen: bool | None = None
    mixed: bool | None = None
    optimize: Literal["latency"] | None = None
    smooth: bool | None = None
    smooth_alpha: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.6


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the user wants, whole."""

    target: str = DEFAULT_TARGET
    mode: Literal["static", "dynamic", "weights"] = "static"
    requantize: bool = False
    calibration: Calibration = Calibration()
    preprocess: Preprocess | None = None
    activation: Activation = Activation()
    weight: Weight = Weight()
    multiplier: Multiplier = Multiplier()
    layers: Layers = Layers()
    tune: Tune = Tune()

    @property
    def target_file(self) -> Path | None:
        """The file that describes the target, where it is the user's own."""
        return Path(self.target) if self.target.endswith(".toml") else None


def read_recipe(path: Path | str | None, overrides: dict[str, Any] | None = None, place: str | None = None) -> Recipe:
    """Return the recipe of a TOML file with the command line's entries laid over it.

    Args:
        path: The file; None for an empty recipe.
        overrides: Entries by section, as the file would spell them; None values are left out.
        place: Where those stand, for errors; None for the file, or else the command line.

    Raises:
        RecipeError: If the file cannot be read, or an entry is unknown or of the wrong kind.
    """
    document: dict[str, Any] = {}
    path = path_or_none(path, "recipe")
    if path is not None:
        try:
            document = msgspec.toml.decode(path.read_text("utf-8-sig"))
        except (msgspec.DecodeError, OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not a recipe ({error})", "it is a TOML file: docs/recipes.md") from error
    for section, value in (overrides or {}).items():
        if isinstance(value, dict):
            given = {key: entry for key, entry in value.items() if entry is not None}
            below = document.get(section, {})
            if not isinstance(below, dict):
                raise RecipeError(f"{path} has {below!r} for the section [{section}]", "it is a table: docs/recipes.md")
            if given:
                document[section] = {**below, **given}
        elif value is not None:
            document[section] = value
    try:
        return settled(msgspec.convert(document, Recipe))
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise RecipeError(
            f"{place or path or 'the command line'} asks for something unknown ({error})", "see docs/recipes.md"
        ) from error


def checked_selection(selection: Selection | None) -> Selection:
    """Return which samples are used, or all of them.

    Raises:
        UsageError: If it is no selection, or counts by what is no whole number.
    """
    check_kind(selection, Selection, "selection", "give a calibration.datasets.Selection")
    found = selection or Selection()
    check_count(found.samples, "number of samples")
    check_count(found.seed, "seed of the selection", 0)
    return found


def checked_recipe(recipe: Recipe | None) -> Recipe:
    """Return a recipe that was made in Python, or the defaults, after looking whether a file could say the same.

    Raises:
        UsageError: If it is no recipe.
        RecipeError: If an entry is of the wrong kind.
    """
    if recipe is None:
        return Recipe()
    check_kind(recipe, Recipe, "recipe", "give a quantcli.Recipe; quantcli.read_recipe reads a file")
    try:
        msgspec.convert(msgspec.to_builtins(recipe), Recipe)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise RecipeError(f"the recipe asks for something unknown ({error})", "see docs/recipes.md") from error
    return settled(recipe)


def settled(recipe: Recipe) -> Recipe:
    """Return a recipe whose target has its own name where it said ``native``: what is written says what it was made for."""
    return msgspec.structs.replace(recipe, target=native()) if recipe.target == NATIVE else recipe


def keeping(recipe: Recipe, floats: tuple[str, ...]) -> Recipe:
    """Return a recipe that keeps some layers float besides its own."""
    names = tuple(glob.escape(name) for name in floats)
    layers = msgspec.structs.replace(recipe.layers, exclude=(*recipe.layers.exclude, *names))
    return msgspec.structs.replace(recipe, layers=layers)


def with_integer_start(recipe: Recipe) -> Recipe:
    """Return a recipe by which the first convolutions are integer layers wherever they can be."""
    return msgspec.structs.replace(recipe, layers=msgspec.structs.replace(recipe.layers, integer_start=True))


def placement_of(layers: Layers, placement: PlacementFormat) -> PlacementFormat:
    """Return what a target says of where integers pay, as far as a recipe asks for that."""
    if layers.everywhere:
        return PlacementFormat()
    return placement.from_the_start() if layers.integer_start else placement


def resolve_target(recipe: Recipe) -> Target:
    """Return the recipe's target with the recipe's own wishes laid over it.

    Raises:
        RecipeError: If there is no such target, or the wishes contradict each other.
    """
    check_mode(recipe)
    target = load_target(recipe.target)
    wishes = recipe.activation
    activation = overlaid(target.activation, dtype=wishes.dtype, symmetric=wishes.symmetric, bits=wishes.bits)
    own = recipe.weight
    weight = overlaid(target.weight, per_channel=own.per_channel, symmetric=own.symmetric, bits=own.bits)
    if own.bits is not None:
        weight = msgspec.structs.replace(weight, depthwise_bits=None)
    check_wishes(recipe, activation, weight)
    return msgspec.structs.replace(
        target,
        activation=activation,
        weight=weight,
        multiplier=overlaid(target.multiplier, bits=recipe.multiplier.bits, rounding=recipe.multiplier.rounding),
        placement=placement_of(recipe.layers, target.placement),
    )


def check_wishes(recipe: Recipe, activation: ActivationFormat, weight: WeightFormat) -> None:
    """Check that a recipe's wishes go together, laid over its target.

    Raises:
        RecipeError: If not.
    """
    if activation.symmetric and activation.dtype.startswith("u"):
        raise RecipeError(
            f"symmetric activations of {activation.dtype} have no zero point 0", "use int8, or make them affine"
        )
    bits, stored = recipe.activation.bits, activation.stored
    if bits is not None and bits > stored:
        raise RecipeError(
            f"activations of {bits} bits do not fit {activation.dtype}",
            f"choose --activation-dtype int16 as well, or {stored} bits or less",
        )
    if recipe.weight.symmetric is False and weight.bits >= SYMMETRIC_BITS:
        raise RecipeError(
            f"weights of {weight.bits} bits are symmetric: with their zero points taken off they would not fit int8",
            f"choose --weight-bits {SYMMETRIC_BITS - 1} or less",
        )


# What asks for each key of a section on the command line, where only ``static`` models have it.
ACTIVATION_OPTIONS = {
    "bits": "--activation-bits",
    "dtype": "--activation-dtype",
    "range": "--range",
    "symmetric": "--symmetric/--asymmetric",
}
MULTIPLIER_OPTIONS = {"bits": "--multiplier-bits", "rounding": "--rounding"}


def check_mode(recipe: Recipe) -> None:
    """Check that a recipe wishes nothing of a mode that only ``static`` has.

    Raises:
        RecipeError: If it does.
    """
    if recipe.weight.block_size is not None and recipe.mode != "weights":
        raise RecipeError(
            f"--block-size has no meaning in --mode {recipe.mode}", "leave it out, or choose --mode weights"
        )
    if recipe.mode == "static":
        return
    for wishes, options in ((recipe.activation, ACTIVATION_OPTIONS), (recipe.multiplier, MULTIPLIER_OPTIONS)):
        for key, option in options.items():
            if getattr(wishes, key) is not None:
                raise RecipeError(
                    f"{option} has no meaning in --mode {recipe.mode}, which calibrates no activation",
                    f"leave one out (a recipe has it as {key} in its section [{type(wishes).__name__.lower()}])",
                )
    if recipe.weight.symmetric is False:
        raise RecipeError(
            f"--mode {recipe.mode} has no asymmetric weights per channel", "leave the form of weights to the mode"
        )
    if recipe.tune.optimize is not None:
        raise RecipeError(
            f"--optimize {recipe.tune.optimize} times plans of static models, not of --mode {recipe.mode}",
            "leave one out",
        )


def overlaid(base: Format, **wishes: Any) -> Format:
    """Return a copy of ``base`` with every wish that is not None."""
    return msgspec.structs.replace(base, **{key: wish for key, wish in wishes.items() if wish is not None})
