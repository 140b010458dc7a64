"""A prepared model as the float module that it stands for, and what it has learned besides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcli.errors import PlanError
from quantcli.load.learned import WHOLE, LearnedLayer, LearnedOperand
from quantcli.torch.given import check_weight
from quantcli.torch.layers import (
    TWINS,
    Clamped,
    QuantAdd,
    QuantFunctional,
    Quantizing,
    Sum,
    channel_axis,
    copied,
    float_of,
    names_of,
    put,
)
from quantcli.torch.normalization import Folded, norm_of
from quantcli.torch.quantizers import ActivationQuantizer, DorefaActivation, WeightQuantizer

if TYPE_CHECKING:
    from torch import Tensor


def is_prepared(model: nn.Module) -> bool:
    """Tell whether a model holds layers that quantize."""
    return any(isinstance(module, (Quantizing, QuantAdd)) for module in model.modules())


def floated(model: nn.Module) -> tuple[nn.Module, tuple[LearnedLayer, ...]]:
    """Return a float module whose weights are on their grids and whose activations are not rounded, and what was learned.

    Activations are clamped as their quantizers clamp them, but for those of 8 bits and more: their range may hold more than was
    learned. What a DoReFa quantizer multiplies its input by goes into the weight.

    Args:
        model: A prepared model, frozen or not; it stays as it is.

    Raises:
        ModelError: If the model cannot be copied, or a prepared layer is not float32.
        PlanError: If a quantizer has no range.
    """
    made, learned = copied(model).eval(), []
    for layer, names in names_of(made).items():
        name = names[0]
        if isinstance(layer, Quantizing):
            check_weight(layer, name)
            quantizer: Any = layer.activation_quantizer
            operand = learned_operand(name, quantizer)
            bounds = clamp_of(quantizer)
            weight, entry = learned_weight(layer, getattr(quantizer, "factor", 1.0))
            plain = float_of(layer, weight)
            put(made, names, plain if bounds is None else Clamped(bounds, plain))
            learned.append(LearnedLayer(name if bounds is None else f"{name}.layer", (operand,), *entry))
        elif isinstance(layer, QuantAdd):
            both = layer.first_quantizer, layer.second_quantizer
            factor = float(getattr(both[0], "factor", 1.0))
            put(made, names, Sum((clamp_of(both[0]), clamp_of(both[1])), factor))
            spare = isinstance(layer, QuantFunctional)
            operands = tuple(learned_operand(name, quantizer, spare) for quantizer in both)
            learned.append(LearnedLayer(name, operands, spare=spare))
        elif isinstance(layer, Folded):
            put(made, names, norm_of(layer))
        elif isinstance(layer, (*TWINS, nn.MultiheadAttention)):
            learned.append(LearnedLayer(name, (), prepared=False))
    return made, tuple(learned)


def clamp_of(quantizer: Any) -> tuple[float, float] | None:
    """Return what a quantizer clamps to, where its clamp has to be seen; None where its grid is wide enough for every reader."""
    if isinstance(quantizer, DorefaActivation):
        return quantizer.bounds()
    if isinstance(quantizer, ActivationQuantizer) and quantizer.ready and quantizer.bits < WHOLE:
        return quantizer.bounds()
    return None


def learned_operand(name: str, quantizer: Any, spare: bool = False) -> LearnedOperand | None:
    """Return what a quantizer of activations has learned; None for one that passes them through, or may have learned nothing.

    Raises:
        PlanError: If it has no range.
    """
    if not isinstance(quantizer, (ActivationQuantizer, DorefaActivation)):
        return None
    if spare and not quantizer.ready:
        return None
    if not quantizer.ready:
        raise PlanError(f"'{name}' has no range yet", "calibrate the prepared model first")
    return LearnedOperand(quantizer.range(), quantizer.bits)


def learned_weight(layer: Quantizing, factor: float) -> tuple[Tensor, tuple[Any, ...]]:
    """Return a layer's weight on its grid, times a factor, and its scales, largest magnitudes and width, if any."""
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, WeightQuantizer):
        return layer.weight * factor, (None, None, None)
    with torch.no_grad():
        weight = quantizer(layer.weight) * factor
        axis = channel_axis(layer)
        rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
        largest = rows.abs().amax(dim=1).double().numpy()
        scale = quantizer.scale(layer.weight).double().numpy() * factor
    return weight, (scale, largest, quantizer.integer.bits)
