"""Targets: what a runtime can do, as small TOML files; those in this folder are known by name."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from calibration.hooks.pairs import saturates
from quantcli.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path(__file__).parent
DEFAULT_TARGET = "ort-x86"
# What stands for the ONNX Runtime target of this machine.
NATIVE = "native"
# Grids of weights of so many bits and more are symmetric by default.
SYMMETRIC_BITS = 7

ActivationType = Literal["uint8", "int8", "int16"]
Rounding = Literal["single", "double", "half_even", "floor"]
MultiplierBits = Literal[8, 16, 32]


class ActivationFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How activations are quantized: per tensor, affine or symmetric.

    ``bits`` is the width of the grid, where that is less than the type's: a Clip stands beside its QuantizeLinear then. ``widest``
    is 16 where the runtime takes int16 activations beside those of 8 bits: tuning may raise single ones to it.
    ``same_scale`` lists the operators (of AveragePool, GlobalAveragePool, ReduceMean) whose output has the parameters of its input,
    ``fixed`` those (of Softmax) whose output has the grid of the operator's whole range everywhere, as TFLite's has 1/256: without
    it, a softmax within the graph has a range of its own.
    """

    dtype: ActivationType
    symmetric: bool
    power_of_two: bool = False
    bits: Annotated[int, msgspec.Meta(ge=2, le=16)] | None = None
    widest: Literal[8, 16] = 8
    same_scale: tuple[Literal["AveragePool", "GlobalAveragePool", "ReduceMean"], ...] = ()
    fixed: tuple[Literal["Softmax"], ...] = ()

    @property
    def grid(self) -> str:
        """The integer type of the grid: ``uint4`` of 4 bits in uint8."""
        return self.grid_of(self.width)

    def grid_of(self, bits: int) -> str:
        """Return the integer type of a grid of another width: no wider than the type, or than what the runtime takes beside it."""
        return f"{'u' if self.dtype == 'uint8' else ''}int{min(bits, max(self.stored, self.widest))}"

    @property
    def takes_both(self) -> bool:
        """Whether it takes int16 beside what most activations have, so that single ones can be wider."""
        return self.widest == 16 and self.dtype == "int8"

    @property
    def stored(self) -> int:
        """The width of the type, in bits."""
        return 16 if self.dtype == "int16" else 8

    @property
    def width(self) -> int:
        """The width of the grid, in bits."""
        return min(self.bits or self.stored, self.stored)

    @property
    def opset(self) -> int:
        """The oldest ONNX operator set whose QuantizeLinear knows the type: 13 for 8 bits, 21 for 16."""
        return 21 if self.dtype == "int16" else 13


class WeightFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How weights are quantized, stored as int8.

    ``symmetric`` grids lie about zero. Others, of 6 bits and less, lie about the middle of each scale's weights: integers are
    stored with the zero point taken off, so that they are multiplied like any others.
    ``narrow`` tells whether the lowest integer stays unused, so that grids end at ±n. By default that is so of 7 bits and more
    (−127 … 127, −63 … 63), and not of fewer (−8 … 7), to which one integer more is worth 1 dB of 2 bits and a third of 4.
    ``pair_bits`` is 16 where the runtime adds two products in 16 bits, saturating, before it widens them; ``depthwise_bits`` is the
    width of weights of which it does not, those of depthwise convolutions with one filter per channel. ``widest`` is 16 where it
    takes int16 weights as well: a search for widths may raise single layers to them.
    """

    dtype: Literal["int8"]
    symmetric: bool
    per_channel: bool
    bits: Annotated[int, msgspec.Meta(ge=2, le=8)] = 8
    narrow: bool | None = None
    power_of_two: bool = False
    pair_bits: Literal[16] | None = None
    depthwise_bits: Annotated[int, msgspec.Meta(ge=2, le=8)] | None = None
    widest: Literal[8, 16] = 8

    def bits_of(self, depthwise: bool) -> int:
        """Return the width of a layer's weights."""
        return self.depthwise_bits if depthwise and self.depthwise_bits is not None else self.bits

    def is_symmetric(self, bits: int) -> bool:
        """Tell whether a grid of so many bits lies about zero: of SYMMETRIC_BITS and more it does anyway."""
        return self.symmetric or bits >= SYMMETRIC_BITS

    def is_narrow(self, bits: int) -> bool:
        """Tell whether a grid of so many bits leaves its lowest integer unused."""
        return bits >= SYMMETRIC_BITS if self.narrow is None else self.narrow


class MultiplierFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How real multipliers become integers: the width of M0, and how the product is rounded (docs/arithmetic.md).

    ``shifts`` is the lowest and the highest n that the runtime's integer shift can do.
    """

    bits: MultiplierBits
    rounding: Rounding
    shifts: tuple[int, int] | None = None
    by_operator: dict[str, Rounding] = {}

    def rounding_of(self, operator: str) -> Rounding:
        """Return the rounding of an operator: its own, or that of all."""
        return self.by_operator.get(operator, self.rounding)

    def beyond(self, shifts: Sequence[int]) -> list[int]:
        """Return those n that the runtime's integer shift cannot do."""
        if self.shifts is None:
            return []
        low, high = self.shifts
        return [n for n in shifts if not low <= n <= high]


class PlacementFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which operators become integer layers, where a runtime has float kernels beside its integer ones.

    Attributes:
        pays: Whether operators that float runs as well, or better, stay float; otherwise whatever can be an integer layer is one.
        apart: Pairs of float operators that the runtime fuses into one that is slower than both; they are kept apart then.
        direct: Operators that only move values, written on integers, since the runtime does not find them between
            QuantizeLinear and DequantizeLinear.
        float_kernels: Operators that the runtime computes in float although they could be integer layers; they are layers only
            where an integer kernel reads what they make.
        stored: Operators without an integer kernel, or with one that is slower than float, so that their weights alone are stored
            as integers, and what they compute stays float; Conv3d is a Conv over three spatial axes, NarrowConv one in
            groups of at most 4 input channels that is not depthwise.
        steps: Operators without an integer kernel that are computed in steps that have one (`quantcli.steps`).
        real_outputs: The operators whose kernel gives reals straight from the accumulator; without an integer layer to read
            them, their outputs are not rounded to a grid.
        macs_per_value: How many multiply-accumulates a product of two activations must do per value that is quantized or
            dequantized for it, so that it runs faster in integers (48 on AVX-512 with VNNI: 64 terms a product gain, 32 lose).
        macs_before_steps: How many multiply-accumulates a convolution at a network's beginning must do per value that it reads or
            makes, to be an integer layer where what it makes is read in `steps` alone (lengths that are not known count as 1).
        first_terms: Up to how many terms a sum of a convolution over images may have for float to be faster at a network's
            beginning, where convolutions alone read it (`quantcli.beginning`); 0 for none.
        first_filters: Up to how many filters such a convolution has.
        first_filters_before_depthwise: Up to how many, where depthwise convolutions read it, which are faster in float, too.
    """

    pays: bool = False
    apart: tuple[tuple[str, str], ...] = ()
    direct: tuple[Literal["Pad"], ...] = ()
    float_kernels: tuple[str, ...] = ()
    stored: tuple[Literal["Conv3d", "ConvTranspose", "NarrowConv"], ...] = ()
    steps: tuple[Literal["HardSwish"], ...] = ()
    real_outputs: tuple[Literal["Gemm", "MatMul"], ...] = ()
    macs_per_value: Annotated[int, msgspec.Meta(ge=0)] = 0
    macs_before_steps: Annotated[int, msgspec.Meta(ge=0)] = 0
    first_terms: Annotated[int, msgspec.Meta(ge=0)] = 0
    first_filters: Annotated[int, msgspec.Meta(ge=0)] = 0
    first_filters_before_depthwise: Annotated[int, msgspec.Meta(ge=0)] = 0

    def from_the_start(self) -> PlacementFormat:
        """Return the same with integer layers at a network's beginning as elsewhere."""
        return msgspec.structs.replace(self, macs_before_steps=0, first_terms=0)


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a runtime can do.

    Attributes:
        name: What ``--target`` calls it.
        description: One line for people.
        activation: The form of activations.
        weight: The form of weights.
        multiplier: The form of multipliers.
        placement: Which operators become integer layers.
    """

    name: str
    description: str
    activation: ActivationFormat
    weight: WeightFormat
    multiplier: MultiplierFormat
    placement: PlacementFormat = PlacementFormat()

    def multiplier_bits(self, wide: bool) -> int:
        """Return the width of a layer's M0.

        Where activations of 8 and 16 bits stand side by side, it is 16 at most behind products of ``wide`` operands, of more than 8
        bits: their accumulator has 48 bits, and its product with M0 is to fit 64.
        """
        return min(self.multiplier.bits, 16) if wide and self.activation.takes_both else self.multiplier.bits

    @property
    def weights_are_coarser(self) -> bool:
        """Whether weights have fewer bits than activations: a quantized model's noise comes from them then."""
        return self.weight.bits < self.activation.width


def known() -> list[str]:
    """Return the names of the targets that come with quantcli."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def native() -> str:
    """Return the name of the target that ONNX Runtime on this machine's CPU is."""
    if platform.machine().lower() in {"arm64", "aarch64"}:
        return "ort-arm"
    return "ort-x86-avx2" if saturates() else "ort-x86"


def load_target(name: str) -> Target:
    """Return a target by its name, by ``native`` this machine's, or from a TOML file of one's own.

    Raises:
        RecipeError: If there is no such target, or the file does not describe one.
    """
    if not name.endswith(".toml"):
        return shipped(native() if name == NATIVE else name)
    if not Path(name).is_file():
        raise unknown(name)
    return read_target(Path(name))


@functools.cache
def shipped(name: str) -> Target:
    """Return a target that comes with quantcli; its file is read once, since every stage of a conversion asks for it.

    Raises:
        RecipeError: If there is none of that name.
    """
    if name not in known():
        raise unknown(name)
    return read_target(FOLDER / f"{name}.toml")


def unknown(name: str) -> RecipeError:
    """Return what is said of a target that is not there."""
    return RecipeError(f"there is no target '{name}'", f"known: {', '.join(known())}, {NATIVE}; or give a .toml file")


def read_target(file: Path) -> Target:
    """Return the target that a TOML file describes.

    Raises:
        RecipeError: If it describes none.
    """
    try:
        target = msgspec.toml.decode(file.read_bytes(), type=Target)
    except (msgspec.DecodeError, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} does not describe a target ({error})", "compare it with docs/recipes.md") from error
    low, high = target.multiplier.shifts or (0, 0)
    if low > high:
        raise RecipeError(f"{file} has shifts from {low} to {high}", "give the lowest first")
    if target.activation.widest == 16 and not target.activation.takes_both:
        raise RecipeError(
            f"{file} has activations of {target.activation.dtype} and widest = 16",
            "int8 alone has int16 beside it: leave widest out",
        )
    if target.activation.bits is not None and target.activation.bits > target.activation.stored:
        raise RecipeError(
            f"{file} has activations of {target.activation.bits} bits, which {target.activation.dtype} does not hold",
            "choose another dtype, or leave bits out",
        )
    return target
