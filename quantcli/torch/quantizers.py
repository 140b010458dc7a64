"""Quantizers of weights and activations that train: rounding passes gradients straight through.

Affine quantizers compute what a plan computes (`quantcli.arithmetic.affine`): the same scale, zero point and integers. Those of
DoReFa are after Zhou et al. 2016 (arXiv 1606.06160), equations 7 to 9, as Micronet scales their activations.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcli.arithmetic.affine import SMALLEST_SCALE, IntegerType
from quantcli.errors import PlanError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

WIDEST = 16
PASSES = 32


def check_bits(bits: int, what: str) -> int:
    """Return a width that can be trained.

    Raises:
        UsageError: If it is no number of 2 to 16, nor 32, which leaves everything as it is.
    """
    if isinstance(bits, bool) or not hasattr(bits, "__index__"):
        raise UsageError(f"{what} of {bits!r} bits cannot be made", "give 2 to 16, or 32 for float")
    bits = operator.index(bits)
    if bits == 1:
        raise UsageError(
            f"{what} of 1 bit are binary, which is another arithmetic", "give 2 to 16 bits, or 32 for float"
        )
    if bits != PASSES and not 2 <= bits <= WIDEST:
        raise UsageError(f"{what} of {bits} bits cannot be made", "give 2 to 16 bits, or 32 for float")
    return bits


class StraightThrough(torch.autograd.Function):
    """Round half to even; the gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Round."""
        del ctx
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Pass the gradient on."""
        del ctx
        return gradients[0]


def rounded(x: Tensor) -> Tensor:
    """Round half to even, passing gradients straight through (Bengio et al. 2013, arXiv 1308.3432)."""
    found: Tensor = StraightThrough.apply(x)  # type: ignore[no-untyped-call]
    return found


def single(x: Tensor) -> Tensor:
    """Return values of half precision in float32, which grids need; others as they are."""
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def slowed(parameter: Tensor, factor: float) -> Tensor:
    """Return a parameter whose gradient is a part of what it would be."""
    part = parameter * factor
    return parameter.detach() + (part - part.detach())  # zero is added: the value stays, to the last bit


class ActivationQuantizer(nn.Module):
    """Round an activation to a grid over a range that is observed first, and learned then.

    Args:
        integer: The grid.
        symmetric: Whether the range is symmetric about zero.

    Attributes:
        lo: The lowest real value, float32, a parameter; NaN before calibration.
        hi: The highest.
    """

    lo: nn.Parameter
    hi: nn.Parameter

    def __init__(self, integer: IntegerType, symmetric: bool = False) -> None:
        super().__init__()
        self.integer, self.symmetric = integer, symmetric
        self.lo = nn.Parameter(torch.tensor(float("nan")))
        self.hi = nn.Parameter(torch.tensor(float("nan")))

    @property
    def bits(self) -> int:
        """The width of the grid."""
        return self.integer.bits

    @property
    def ready(self) -> bool:
        """Whether there is a range."""
        return bool(torch.isfinite(self.lo) & torch.isfinite(self.hi))

    # What the input is multiplied by before it is rounded.
    factor = 1.0

    def range(self) -> tuple[float, float]:
        """Return the real range of the input; of a symmetric quantizer, as it is before it is made symmetric."""
        return float(self.lo.detach()), float(self.hi.detach())

    def scale(self) -> Tensor:
        """Return the scale, float32, without a gradient."""
        return self.parameters_of(self.lo.detach(), self.hi.detach())[0]

    def bounds(self) -> tuple[float, float]:
        """Return the real values at the ends of the grid."""
        with torch.no_grad():
            scale, zero_point = (float(value) for value in self.parameters_of(self.lo, self.hi))
        return (self.integer.qmin - zero_point) * scale, (self.integer.qmax - zero_point) * scale

    def parameters_of(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale (float32) and zero point (float64, whole) of a range (docs/arithmetic.md, equations 2 to 4)."""
        low, high = lo.double().clamp(max=0.0), hi.double().clamp(min=0.0)
        smallest = float(SMALLEST_SCALE)
        if self.symmetric:
            largest = torch.maximum(-low, high)
            scale = (largest / self.integer.qmax).float().clamp(min=smallest)
            return torch.where(largest == 0, 1.0, scale), torch.zeros_like(largest)
        span = high - low
        scale = (span / (self.integer.qmax - self.integer.qmin)).float().clamp(min=smallest)
        scale = torch.where(span == 0, 1.0, scale)
        zero_point = torch.where(span == 0, 0.0, rounded(self.integer.qmin - low / scale.double()))
        return scale, zero_point.clamp(self.integer.qmin, self.integer.qmax)

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest values of the grid (equation 1, and its inverse).

        Raises:
            PlanError: If there is no range yet.
        """
        if not torch.compiler.is_exporting():  # which has no values to look at
            check_ready(self)
        # Esser et al. 2020 (arXiv 1902.08153, section 2.2): a step that many elements share is to learn more slowly.
        factor = float((max(x.numel(), 1) * self.integer.qmax) ** -0.5)
        scale, zero_point = self.parameters_of(slowed(self.lo, factor), slowed(self.hi, factor))
        q = torch.clamp(rounded(single(x) / scale) + zero_point.float(), self.integer.qmin, self.integer.qmax)
        return ((q - zero_point.float()) * scale).to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the grid."""
        return f"{self.integer.name}, symmetric={self.symmetric}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def check_ready(quantizer: ActivationQuantizer) -> bool:
    """Check that a quantizer has a range; torch.compile asks once, while it compiles, and passes the error on in its own.

    Raises:
        PlanError: If it has none.
    """
    if not quantizer.ready:
        raise PlanError("an activation quantizer has no range yet", "calibrate the prepared model first")
    return True


class DorefaActivation(nn.Module):
    """a = round(clamp(s · x, 0, 1) · n) / n with n = 2^k − 1 (equation 9; the scale s is Micronet's, 0.1 by default).

    Args:
        bits: k.
        scale: s.
    """

    def __init__(self, bits: int, scale: float = 0.1) -> None:
        super().__init__()
        self.bits, self.scale = bits, scale
        self.ready = True

    @property
    def factor(self) -> float:
        """What the input is multiplied by before it is rounded."""
        return self.scale

    def range(self) -> tuple[float, float]:
        """Return the real range of the input: what lies outside is clamped."""
        return 0.0, 1.0 / self.scale

    def bounds(self) -> tuple[float, float]:
        """Return the real values at the ends of the grid."""
        return self.range()

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest values of the grid."""
        steps = float(2**self.bits - 1)
        return (rounded(torch.clamp(single(x) * self.scale, 0.0, 1.0) * steps) / steps).to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the grid."""
        return f"bits={self.bits}, scale={self.scale}"


class WeightQuantizer(nn.Module):
    """Round a weight to a symmetric grid whose ends are its largest magnitude (equation 4), per output channel or as a whole.

    Args:
        bits: The width of the grid.
        axis: The channels' axis; None for one scale.
        already: Whether weights are on their grid already, and pass through.
    """

    def __init__(self, bits: int, axis: int | None, already: bool = False) -> None:
        super().__init__()
        self.bits, self.axis, self.already = bits, axis, already
        self.integer = IntegerType(f"int{bits}", narrow=True)

    @property
    def steps(self) -> int:
        """How many steps of the grid are the largest magnitude."""
        return self.integer.qmax

    def largest(self, weight: Tensor) -> Tensor:
        """Return the largest magnitude of each channel; that of all where scales are not per channel."""
        weight = weight.detach()
        values = weight.reshape(1, -1) if self.axis is None else weight.movedim(self.axis, 0).flatten(1)
        return values.abs().amax(dim=1)

    def scale(self, weight: Tensor) -> Tensor:
        """Return the scales, float32, of one axis; one where they are not per channel."""
        largest = self.largest(weight)
        scale = (largest.double() / self.steps).float().clamp(min=float(SMALLEST_SCALE))
        return torch.where(largest == 0, 1.0, scale)

    def spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Return scales in a shape that broadcasts along the weight."""
        if self.axis is None:
            return scale
        return scale.reshape([-1 if axis == self.axis else 1 for axis in range(weight.ndim)])

    def forward(self, weight: Tensor) -> Tensor:
        """Return the nearest values of the grid."""
        if self.already:
            return weight
        scale = self.spread(self.scale(weight), weight)
        return (rounded(weight / scale).clamp(self.integer.qmin, self.integer.qmax) * scale).to(weight.dtype)

    def extra_repr(self) -> str:
        """Describe the grid."""
        return f"bits={self.bits}, axis={self.axis}, already={self.already}"


class DorefaWeight(WeightQuantizer):
    """w = 2 · round((tanh w / (2 · max |tanh w|) + 1/2) · n) / n − 1 with n = 2^k − 1 (equations 7 and 8).

    Its values are odd multiples of 1/n in [−1, 1]: integers of k + 1 bits, at one scale.
    """

    def __init__(self, bits: int, axis: int | None = None, already: bool = False) -> None:
        super().__init__(bits, None, already)
        del axis
        self.integer = IntegerType(f"int{bits + 1}", narrow=True)

    def scale(self, weight: Tensor) -> Tensor:
        """Return 1/n."""
        return weight.new_full((1,), 1.0 / self.steps)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the nearest values of the grid."""
        if self.already:
            return weight
        squashed = torch.tanh(single(weight))
        largest = squashed.detach().abs().max()
        empty = largest == 0  # no branch on it: torch.compile cannot follow one
        parts = squashed / (2.0 * torch.where(empty, 1.0, largest)) + 0.5
        return torch.where(empty, squashed, 2.0 * rounded(parts * self.steps) / self.steps - 1.0).to(weight.dtype)
