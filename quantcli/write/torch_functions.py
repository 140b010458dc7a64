"""ONNX operators that compute element by element, or over axes, in PyTorch."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantcli.write.torch_call import Call


def arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[Call], Any]:
    """Return the row of a function of two operands, tensors or known numbers."""

    def row(call: Call) -> Any:
        if call.known:
            a, b = (call.numbers(position) or [] for position in (0, 1))
            count = max(len(a), len(b))
            spread = [part * count if len(part) == 1 else part for part in (a, b)]
            return tuple(function(x, y) for x, y in zip(*spread, strict=True))
        return function(call.tensor(0), call.tensor(1))

    return row


def divided(a: Any, b: Any) -> Any:
    """Divide; integers towards zero."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        real = a.is_floating_point() if isinstance(a, torch.Tensor) else b.is_floating_point()
        return a / b if real else torch.div(a, b, rounding_mode="trunc")
    return a // b


def clip(call: Call) -> Any:
    """Clip."""
    low, high = call.number(1), call.number(2)
    low = call.real("min", -math.inf) if low is None and "min" in call.node.attributes else low
    high = call.real("max", math.inf) if high is None and "max" in call.node.attributes else high
    return call.tensor(0) if low is None and high is None else torch.clamp(call.tensor(0), low, high)


def of_one(function: Callable[[Any], Any]) -> Callable[[Call], Any]:
    """Return the row of a function of one operand."""
    return lambda call: function(call.tensor(0))


def reduced(name: str) -> Callable[[Call], Any]:
    """Return the row of a reduction."""

    def row(call: Call) -> Any:

        functions: dict[str, Any] = {"mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin}
        x, axes = call.tensor(0), call.axes()
        if not axes and call.integer("noop_with_empty_axes"):
            return x
        keep = bool(call.integer("keepdims", 1))
        axes = axes or list(range(x.ndim))
        if name == "norm":
            return torch.linalg.vector_norm(x, dim=axes, keepdim=keep)
        return functions[name](x, dim=axes, keepdim=keep)

    return row


def layer_norm(call: Call) -> Any:
    """LayerNormalization over the last axes."""
    x = call.tensor(0)
    axis = call.integer("axis", -1) % x.ndim
    return torch.nn.functional.layer_norm(
        x, list(x.shape[axis:]), call.tensor(1), call.tensor(2), call.real("epsilon", 1e-5)
    )


def batch_norm(call: Call) -> Any:
    """BatchNormalization with the statistics that training has left."""
    x, scale, bias, mean, variance = (call.tensor(position) for position in range(5))
    return torch.nn.functional.batch_norm(x, mean, variance, scale, bias, eps=call.real("epsilon", 1e-5))


def instance_norm(call: Call) -> Any:
    """InstanceNormalization."""
    return torch.nn.functional.instance_norm(
        call.tensor(0), weight=call.tensor(1), bias=call.tensor(2), eps=call.real("epsilon", 1e-5)
    )


def group_norm(call: Call) -> Any:
    """GroupNormalization."""
    return torch.nn.functional.group_norm(
        call.tensor(0), call.integer("num_groups"), call.tensor(1), call.tensor(2), call.real("epsilon", 1e-5)
    )


def prelu(call: Call) -> Any:
    """PRelu: the slope is broadcast."""
    x = call.tensor(0)
    return torch.where(x < 0, x * call.tensor(1), x)


def extremes(highest: bool) -> Callable[[Call], Any]:
    """Return the row of Max or Min of any number of operands."""

    def row(call: Call) -> Any:

        found = call.tensor(0)
        for position in range(1, len(call)):
            found = (torch.maximum if highest else torch.minimum)(found, call.tensor(position))
        return found

    return row


def cast(call: Call) -> Any:
    """Cast; known numbers stay what they are."""
    if call.known:
        return call.inputs[0]
    names = {
        1: "float32",
        2: "uint8",
        3: "int8",
        5: "int16",
        6: "int32",
        7: "int64",
        9: "bool",
        10: "float16",
        11: "float64",
    }
    to = call.integer("to")
    if to not in names:
        raise call.unknown(f"the type {to}")
    return call.tensor(0).to(getattr(torch, names[to]))


def hard_sigmoid(call: Call) -> Any:
    """HardSigmoid: max(0, min(1, alpha·x + beta))."""
    return (call.tensor(0) * call.real("alpha", 0.2) + call.real("beta", 0.5)).clamp(0, 1)


def einsum(call: Call) -> Any:
    """Einsum."""
    return torch.einsum(call.text("equation"), *(call.tensor(position) for position in range(len(call))))


def elementwise() -> dict[str, Callable[[Call], Any]]:
    """Return the rows of functions that PyTorch has under one name."""
    return {
        "Abs": of_one(torch.abs),
        "Add": arithmetic(operator.add),
        "And": arithmetic(operator.and_),
        "Celu": lambda call: F.celu(call.tensor(0), call.real("alpha", 1.0)),
        "Clip": clip,
        "Cos": of_one(torch.cos),
        "Div": arithmetic(divided),
        "Elu": lambda call: F.elu(call.tensor(0), call.real("alpha", 1.0)),
        "Equal": arithmetic(operator.eq),
        "Erf": of_one(torch.erf),
        "Exp": of_one(torch.exp),
        "Gelu": lambda call: F.gelu(call.tensor(0), approximate=call.text("approximate", "none")),
        "Greater": arithmetic(operator.gt),
        "HardSigmoid": hard_sigmoid,
        "HardSwish": of_one(F.hardswish),
        "Identity": lambda call: call.inputs[0],
        "LeakyRelu": lambda call: F.leaky_relu(call.tensor(0), call.real("alpha", 0.01)),
        "Less": arithmetic(operator.lt),
        "Log": of_one(torch.log),
        "Max": extremes(True),
        "Min": extremes(False),
        "Mish": of_one(F.mish),
        "Mul": arithmetic(operator.mul),
        "Neg": of_one(torch.neg),
        "Not": of_one(torch.logical_not),
        "Or": arithmetic(operator.or_),
        "PRelu": prelu,
        "Pow": lambda call: torch.pow(call.tensor(0), call.tensor(1)),
        "Reciprocal": of_one(torch.reciprocal),
        "Relu": of_one(torch.relu),
        "Selu": of_one(F.selu),
        "Sigmoid": of_one(torch.sigmoid),
        "Sign": of_one(torch.sign),
        "Sin": of_one(torch.sin),
        "Softplus": of_one(F.softplus),
        "Softsign": of_one(F.softsign),
        "Sqrt": of_one(torch.sqrt),
        "Sub": arithmetic(operator.sub),
        "Tanh": of_one(torch.tanh),
        "ThresholdedRelu": lambda call: F.threshold(call.tensor(0), call.real("alpha", 1.0), 0.0),
        "Where": lambda call: torch.where(call.tensor(0), call.tensor(1), call.tensor(2)),
    }
