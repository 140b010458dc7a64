"""Twins of PyTorch's layers that quantize their input and their weight."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from quantcli.errors import ModelError
from quantcli.torch.quantizers import ActivationQuantizer, WeightQuantizer, rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Add(nn.Module):
    """A sum that can be prepared; a bare ``+`` is no module, and cannot."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b."""
        return a + b


class Quantizing(nn.Module):
    """What all twins share.

    Attributes:
        activation_quantizer: Rounds the input.
        weight_quantizer: Rounds the weight.
        frozen: Whether the bias is on its grid already, and passes through.
        folded: Whether a BatchNorm behind the layer takes its bias over, and rounds what becomes of it.
    """

    activation_quantizer: nn.Module
    weight_quantizer: nn.Module
    weight: Tensor
    bias: Any
    frozen = False
    folded = False

    def rounded_operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, weight and bias on their grids."""
        return self.activation_quantizer(x), self.weight_quantizer(self.weight), self.rounded_bias(self.bias)

    def rounded_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return a bias on the grid of its accumulator, as a plan rounds it (docs/arithmetic.md, equation 8).

        Gradients pass straight through to the bias, and none goes to the scales (Jacob et al. 2018, arXiv 1712.05877, sections 2.4
        and 3). A bias stays as it is where an operand is not rounded, and beside DoReFa's operands.

        Args:
            bias: The bias, shape (output channels,).
        """
        step = None if bias is None or self.frozen or self.folded else self.step()
        if bias is None or step is None:
            return bias
        return (rounded(bias.double() / step) * step).to(bias.dtype)

    def step(self, gain: Tensor | None = None) -> Tensor | None:
        """Return the scale of the accumulator, S_x·S_w rounded to float32, of shape (output channels,) or (1,) and dtype float64.

        None where an operand has no affine grid. Where a bias would have 2^30 steps and more, a plan takes a wider S_w
        (equation 9); this one does not, for float32 is coarser than either.

        Args:
            gain: What folding multiplies the weight's channels by, and S_w with them, shape (output channels,); None for nothing.
        """
        x, w = self.activation_quantizer, self.weight_quantizer
        if not (isinstance(x, ActivationQuantizer) and isinstance(w, WeightQuantizer)):
            return None
        scale = w.scale(self.weight)
        if gain is not None:
            stretch = torch.where((gain == 0) | (w.largest(self.weight) == 0), 1.0, gain.double().abs())
            scale = (scale.double() * stretch).float()
        return (x.scale() * scale).double()


class QuantLinear(Quantizing, nn.Linear):
    """Linear with quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x·wᵀ + b."""
        return F.linear(*self.rounded_operands(x))


class QuantConv1d(Quantizing, nn.Conv1d):
    """Conv1d with quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution."""
        found: Tensor = self._conv_forward(*self.rounded_operands(x))
        return found


class QuantConv2d(Quantizing, nn.Conv2d):
    """Conv2d with quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution."""
        found: Tensor = self._conv_forward(*self.rounded_operands(x))
        return found


class QuantConv3d(Quantizing, nn.Conv3d):
    """Conv3d with quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution."""
        found: Tensor = self._conv_forward(*self.rounded_operands(x))
        return found


class Transposed(Quantizing):
    """What the transposed convolutions share."""

    stride: Any
    padding: Any
    output_padding: Any
    kernel_size: Any
    dilation: Any
    groups: int
    bias: Tensor | None

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution."""
        x, weight, bias = self.rounded_operands(x)
        rank = len(self.kernel_size)
        extra = self._output_padding(  # type: ignore[operator]
            x, output_size, self.stride, self.padding, self.kernel_size, rank, self.dilation
        )
        function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        found: Tensor = function(x, weight, bias, self.stride, self.padding, extra, self.groups, self.dilation)
        return found


class QuantConvTranspose1d(Transposed, nn.ConvTranspose1d):
    """ConvTranspose1d with quantized operands."""


class QuantConvTranspose2d(Transposed, nn.ConvTranspose2d):
    """ConvTranspose2d with quantized operands."""


class QuantConvTranspose3d(Transposed, nn.ConvTranspose3d):
    """ConvTranspose3d with quantized operands."""


class QuantAdd(nn.Module):
    """A sum of quantized operands.

    Args:
        first: Rounds the first operand.
        second: Rounds the second.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first_quantizer, self.second_quantizer = first, second

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b."""
        found: Tensor = self.first_quantizer(a) + self.second_quantizer(b)
        return found


class Functional(nn.Module):
    """What PyTorch's FloatFunctional computes; its sum is the module's own forward."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x + y."""
        found: Tensor = self(x, y)
        return found

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the larger of x + y and zero."""
        return torch.relu(self.add(x, y))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """Return x + y."""
        return torch.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x · y, element by element."""
        return torch.mul(x, y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """Return x · y."""
        return torch.mul(x, y)

    def cat(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Return the tensors one behind the other."""
        return torch.cat(list(x), dim=dim)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the matrix product."""
        return torch.matmul(x, y)


class QuantFunctional(Functional, QuantAdd):
    """The twin of PyTorch's FloatFunctional: its sums have quantized operands, which need no range where it never adds."""


# The twin of every layer that is swapped, and the axis of its weight's output channels.
TWINS: dict[type[nn.Module], type[Quantizing]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
}
FLOATS = {twin: layer for layer, twin in TWINS.items()}
# What a subclass may define and still compute what its base computes.
MAKING = frozenset({"__init__", "reset_parameters", "extra_repr", "__repr__", "__annotate__", "__annotate_func__"})


def swapped_as(module: nn.Module) -> type[nn.Module] | None:
    """Return the kind of layer that a module is swapped as: its class, or the base that its class only makes otherwise."""
    for kind in type(module).__mro__:
        if kind is NonDynamicallyQuantizableLinear:  # MultiheadAttention reads its weight past its forward
            return None
        if kind in TWINS:
            return kind
        if any(hasattr(value, "__get__") and name not in MAKING for name, value in vars(kind).items()):
            return None
    return None


def passed_over(module: nn.Module) -> bool:
    """Tell whether a module has weights as a layer has, and computes with them in its own way."""
    if isinstance(module, (Quantizing, NonDynamicallyQuantizableLinear)) or is_parametrized(module):
        return False
    return isinstance(module, (*TWINS, nn.MultiheadAttention)) and swapped_as(module) is None


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises:
        ModelError: If it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        what = str(error).split(". ", maxsplit=1)[0]
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({what})",
            "remove weight_norm and its like from it",
        ) from error


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return the names of every module of a model: one may stand in several places."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def put(model: nn.Module, names: Sequence[str], module: nn.Module) -> None:
    """Put a module into some places of a model."""
    for name in names:
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, module)


def channel_axis(layer: nn.Module) -> int | None:
    """Return the axis of a weight's output channels; None where groups put them apart."""
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return 1 if layer.groups == 1 else None
    return 0


def twin_of(layer: nn.Module, activation: nn.Module, weight: nn.Module) -> Quantizing:
    """Return the twin of a layer, with the layer's own parameters."""
    twin = TWINS[swapped_as(layer) or type(layer)]
    made = twin.__new__(twin)
    made.__dict__ = {**layer.__dict__, "_modules": dict(layer.__dict__["_modules"])}
    made.activation_quantizer, made.weight_quantizer = activation, weight
    return made


def float_of(twin: Quantizing, weight: Tensor) -> nn.Module:
    """Return the plain layer of a twin, with another weight and its bias on its grid."""
    kind = FLOATS[type(twin)]
    made = kind.__new__(kind)
    kept = {"activation_quantizer", "weight_quantizer"}
    modules = {name: module for name, module in twin.__dict__["_modules"].items() if name not in kept}
    made.__dict__ = {**twin.__dict__, "_modules": modules, "_parameters": dict(twin.__dict__["_parameters"])}
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if (bias := twin.rounded_bias(twin.bias)) is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def addition_modules() -> tuple[type[nn.Module], ...]:
    """Return the modules that add: ours, and PyTorch's FloatFunctional where there is one."""
    try:
        from torch.ao.nn.quantized import FloatFunctional
    except ImportError:
        return (Add,)
    return Add, FloatFunctional


Bounds = tuple[float, float]


class Sum(Functional):
    """A float sum, in the place of a `QuantAdd` or `QuantFunctional`.

    Args:
        bounds: What the operands are clamped to; None to leave one as it is.
        factor: What the sum is multiplied by.
    """

    def __init__(self, bounds: tuple[Bounds | None, Bounds | None] = (None, None), factor: float = 1.0) -> None:
        super().__init__()
        self.bounds, self.factor = bounds, factor

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a + b."""
        first, second = (
            x if bounds is None else torch.clamp(x, *bounds) for x, bounds in zip((a, b), self.bounds, strict=True)
        )
        return first + second if self.factor == 1.0 else (first + second) * self.factor


class Clamped(nn.Module):
    """A float layer behind the clamp of its quantizer, without the rounding.

    Args:
        bounds: What the input is clamped to.
        layer: The layer.
    """

    def __init__(self, bounds: Bounds, layer: nn.Module) -> None:
        super().__init__()
        self.bounds, self.layer = bounds, layer

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer makes of the clamped input."""
        found: Tensor = self.layer(torch.clamp(x, *self.bounds))
        return found
