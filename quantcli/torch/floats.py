"""A prepared model as the float module that it stands for, and what it has learned besides."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantcli.errors import PlanError
from quantcli.load.learned import LearnedLayer, LearnedOperand
from quantcli.torch.layers import FLOATS, TWINS, Clamped, QuantAdd, Quantizing, Sum, channel_axis, float_of
from quantcli.torch.quantizers import ActivationQuantizer, DorefaActivation, WeightQuantizer

if TYPE_CHECKING:
    from torch import Tensor


def is_prepared(model: nn.Module) -> bool:
    """Tell whether a model holds layers that quantize."""
    return any(isinstance(module, (Quantizing, QuantAdd)) for module in model.modules())


def floated(model: nn.Module) -> tuple[nn.Module, tuple[LearnedLayer, ...]]:
    """Return a float module whose weights are on their grids and whose activations are not rounded, and what was learned.

    Args:
        model: A prepared model, frozen or not; it stays as it is.

    Raises:
        PlanError: If a quantizer has no range.
    """
    made, learned = copy.deepcopy(model).eval(), []
    for name, layer in list(made.named_modules()):
        parent, last = made.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if isinstance(layer, Quantizing):
            weight, entry = learned_weight(layer)
            plain = float_of(layer, weight)
            quantizer = layer.activation_quantizer
            behind = isinstance(quantizer, DorefaActivation)
            setattr(parent, last, Clamped(quantizer, plain) if behind else plain)
            place = f"{name}.layer" if behind else name
            learned.append(LearnedLayer(place, (learned_operand(name, quantizer),), *entry))
        elif isinstance(layer, QuantAdd):
            both = layer.first_quantizer, layer.second_quantizer
            setattr(parent, last, Sum(*(q if isinstance(q, DorefaActivation) else None for q in both)))
            learned.append(LearnedLayer(name, tuple(learned_operand(name, q) for q in both)))
        elif type(layer) in TWINS and not name.endswith(".layer"):
            learned.append(LearnedLayer(name, (), prepared=False))
    return made, tuple(learned)


def learned_operand(name: str, quantizer: Any) -> LearnedOperand | None:
    """Return what a quantizer of activations has learned; None for one that passes them through.

    Raises:
        PlanError: If it has no range.
    """
    if not isinstance(quantizer, (ActivationQuantizer, DorefaActivation)):
        return None
    if not quantizer.ready:
        raise PlanError(f"'{name}' has no range yet", "calibrate the prepared model first")
    return LearnedOperand(quantizer.range(), quantizer.bits)


def learned_weight(layer: Quantizing) -> tuple[Tensor, tuple[Any, ...]]:
    """Return a layer's weight on its grid, and its scales, channels' largest magnitudes, and width, if it has any."""
    quantizer = layer.weight_quantizer
    if not isinstance(quantizer, WeightQuantizer):
        return layer.weight, (None, None, None)
    with torch.no_grad():
        weight = quantizer(layer.weight)
        axis = channel_axis(layer)
        rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
        largest = rows.abs().amax(dim=1).double().numpy()
        scale = quantizer.scale(layer.weight).double().numpy()
    return weight, (scale, largest, quantizer.integer.bits)


__all__ = ["FLOATS", "floated", "is_prepared"]
