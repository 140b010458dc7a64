"""Twins of BatchNorm behind prepared layers: the bias that folding makes of it is rounded while the model trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from quantcli.load.exporter import quiet
from quantcli.torch.layers import Quantizing, copied, names_of, swapped_as

if TYPE_CHECKING:
    from torch import Tensor


class Folded(nn.Module):
    """What the twins of BatchNorm share.

    Attributes:
        layers: The layer whose output is normalized, alone in a tuple, so that its parameters are not saved twice.
    """

    layers: tuple[Quantizing]
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, moved to where rounding moves the folded bias."""
        y: Tensor = super().forward(x)
        return self.moved(y)

    def moved(self, y: Tensor) -> Tensor:
        """Return an output plus round(b / S_b)·S_b − b, for each channel, without a gradient: rounding passes it straight through.

        With g = γ / √(σ² + ε), folding gives the weight g·w and the bias b = (b₀ − μ)·g + β (Jacob et al. 2018, arXiv 1712.05877,
        section 3.2), of scale S_b = float32(S_x·S_w·|g|). Running statistics tell g and μ in training, too: those of
        a batch would move b by many steps, at random.

        Args:
            y: The normalized values, shape (samples, channels, …).
        """
        layer = self.layers[0]
        if (
            isinstance(layer, nn.Linear) and y.ndim > 2
        ):  # its channels are the last axis, not the one that is normalized
            return y
        with torch.no_grad():
            gain = (self.running_var.double() + self.eps).rsqrt()
            if self.weight is not None:
                gain = gain * self.weight
            step = layer.step(gain)
            if step is None:
                return y
            mean = -self.running_mean.double() if layer.bias is None else layer.bias.double() - self.running_mean
            bias = mean * gain if self.bias is None else mean * gain + self.bias
            error: Tensor = (torch.round(bias / step) * step - bias).to(y.dtype)
        return y + error.reshape(-1, *[1] * (y.ndim - 2))


class FoldedBatchNorm1d(Folded, nn.BatchNorm1d):
    """BatchNorm1d behind a prepared layer."""


class FoldedBatchNorm2d(Folded, nn.BatchNorm2d):
    """BatchNorm2d behind a prepared layer."""


class FoldedBatchNorm3d(Folded, nn.BatchNorm3d):
    """BatchNorm3d behind a prepared layer."""


NORMS: dict[type[nn.Module], type[Folded]] = {
    nn.BatchNorm1d: FoldedBatchNorm1d,
    nn.BatchNorm2d: FoldedBatchNorm2d,
    nn.BatchNorm3d: FoldedBatchNorm3d,
}
FLOATS = {twin: norm for norm, twin in NORMS.items()}


def norm_twin(norm: nn.Module, layer: Quantizing) -> nn.Module:
    """Return the twin of a BatchNorm, with its own parameters, and tell its layer that its bias is folded."""
    made = as_kind(norm, NORMS[type(norm)])
    made.__dict__["layers"] = (layer,)
    layer.folded = True
    return made


def norm_of(twin: Folded) -> nn.Module:
    """Return the plain BatchNorm of a twin."""
    made = as_kind(twin, FLOATS[type(twin)])
    del made.__dict__["layers"]
    return made


def as_kind(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a module of another class with the same attributes."""
    made = kind.__new__(kind)
    made.__dict__ = dict(module.__dict__)
    return made


class Tracer(fx.Tracer):
    """Trace a model down to its layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is a layer."""
        return swapped_as(m) is not None or super().is_leaf_module(m, module_qualified_name)


def normalized(model: nn.Module) -> dict[str, str]:
    """Return the layers whose output a BatchNorm alone reads, and those BatchNorms, by name.

    What torch.fx cannot trace is looked at part by part: its own calls are not known then, those within its children are.
    """
    if not any(type(module) in NORMS for module in model.modules()):
        return {}
    once = {module for module, names in names_of(model).items() if len(names) == 1}
    with quiet():  # user code is run, and torch.fx replaces parts of torch while it lasts
        found = pairs(copied(model), "")
    return {layer: norm for layer, norm in found.items() if once.issuperset(map(model.get_submodule, (layer, norm)))}


def pairs(model: nn.Module, prefix: str) -> dict[str, str]:
    """Return the pairs of a model, or of its parts where it cannot be traced."""
    try:
        graph = Tracer().trace(model)
    except Exception:  # noqa: BLE001 - what a user's forward does with a proxy has no bounds
        parts = [pairs(child, f"{prefix}{name}.") for name, child in model.named_children()]
        return {layer: norm for part in parts for layer, norm in part.items()}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    found = {}
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer, norm = model.get_submodule(str(before.target)), model.get_submodule(str(node.target))
        known = type(norm) in NORMS and getattr(norm, "running_mean", None) is not None and swapped_as(layer)
        if known and targets.count(before.target) == targets.count(node.target) == 1:
            found[f"{prefix}{before.target}"] = f"{prefix}{node.target}"
    return found
