"""What the operators of a folded ONNX graph are in PyTorch: one row per operator.

A value is a tensor; or something stored in the model (`Stored`), which is a tensor where it is computed with and numbers where it
says how; or numbers that are known while a program is traced, such as the sizes of a tensor.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from quantcli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Stored:
    """A constant of the model.

    Attributes:
        array: Its values.
        tensor: The buffer that holds them in the module.
    """

    array: NDArray[Any]
    tensor: Any


@dataclass(frozen=True, eq=False)
class Call:
    """One operator that is being traced.

    Attributes:
        node: The operator.
        inputs: Its operands; None where one is left out.
    """

    node: ir.Node
    inputs: list[Any]

    def __len__(self) -> int:
        return len(self.inputs)

    def tensor(self, position: int) -> Any:
        """Return an operand as a tensor; None where there is none."""
        value = self.inputs[position] if position < len(self.inputs) else None
        return as_tensor(value)

    def numbers(self, position: int) -> list[Any] | None:
        """Return an operand as Python numbers; None where there is none."""
        value = self.inputs[position] if position < len(self.inputs) else None
        if value is None:
            return None
        if isinstance(value, Stored):
            return list(np.atleast_1d(value.array).reshape(-1).tolist())
        if isinstance(value, (tuple, list)):
            return list(value)
        raise self.unknown("an operand that is computed while it runs")

    def number(self, position: int, default: float | None = None) -> Any:
        """Return an operand as one Python number."""
        found = self.numbers(position)
        return default if found is None else found[0]

    def integer(self, name: str, default: int = 0) -> int:
        """Return an attribute."""
        return self.node.attributes.get_int(name, default)

    def real(self, name: str, default: float = 0.0) -> float:
        """Return an attribute."""
        return self.node.attributes.get_float(name, default)

    def text(self, name: str, default: str = "") -> str:
        """Return an attribute."""
        return self.node.attributes.get_string(name, default)

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """Return an attribute."""
        return list(self.node.attributes.get_ints(name, default or ()))

    def axes(self, position: int = 1) -> list[int]:
        """Return the axes that stand in an operand, or in an attribute before operator set 13."""
        return self.numbers(position) or self.integers("axes")

    @property
    def known(self) -> bool:
        """Whether all operands are known while the program is traced, and one of them only then: sizes."""
        return all(value is None or isinstance(value, (tuple, Stored)) for value in self.inputs) and any(
            isinstance(value, tuple) for value in self.inputs
        )

    def unknown(self, what: str) -> OutputError:
        """Return the error for what has no row here."""
        return OutputError(
            f"{self.node.op_type} '{self.node.name}' cannot be written in PyTorch: {what}", "write .onnx instead"
        )


# Operators whose row gives all their outputs.
SEVERAL = frozenset({"GRU", "LSTM", "Split"})


def computed(node: ir.Node, inputs: list[Any], rows: Mapping[str, Callable[[Call], Any]]) -> Sequence[Any]:
    """Return what a node gives, output by output.

    Args:
        node: The operator.
        inputs: Its operands; None where one is left out.
        rows: What operators are in PyTorch (`operators`).

    Raises:
        OutputError: If it has no row.
    """
    call = Call(node, inputs)
    row = rows.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
    if row is None:
        raise call.unknown("it has no counterpart there")
    found = row(call)
    return found if node.op_type in SEVERAL else (found,)


def as_tensor(value: Any) -> Any:
    """Return a value as a tensor."""
    if isinstance(value, Stored):
        return value.tensor
    if isinstance(value, tuple):
        return torch.stack([torch.as_tensor(part, dtype=torch.int64) for part in value])
    return value


# ---- products ------------------------------------------------------------------------------------------------------------------


def paddings(
    call: Call, sizes: Sequence[Any], kernel: Sequence[int], strides: Sequence[int]
) -> tuple[list[Any], list[Any]]:
    """Return how much is padded before and after every spatial axis."""
    rank, how = len(kernel), call.text("auto_pad", "NOTSET")
    if how in {"NOTSET", "VALID"}:
        pads = call.integers("pads", [0] * 2 * rank)
        return pads[:rank], pads[rank:]
    dilations = call.integers("dilations", [1] * rank)
    before, after = [], []
    for size, wide, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (wide - 1) * dilation + 1 - size, 0)
        less = total // 2
        before.append(less if how == "SAME_UPPER" else total - less)
        after.append(total - less if how == "SAME_UPPER" else less)
    return before, after


def padded(x: Any, before: Sequence[Any], after: Sequence[Any], value: float = 0.0) -> Any:
    """Pad the spatial axes of a tensor."""
    if not any(before) and not any(after):
        return x
    both = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    return F.pad(x, both, value=value)


def conv(call: Call) -> Any:
    """Conv: padding that is the same on both sides is the operator's own."""
    x, weight, bias = call.tensor(0), call.tensor(1), call.tensor(2)
    rank = weight.ndim - 2
    strides = call.integers("strides", [1] * rank)
    before, after = paddings(call, x.shape[2:], list(weight.shape[2:]), strides)
    if before != after:
        x, before = padded(x, before, after), [0] * rank
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    return function(x, weight, bias, strides, before, call.integers("dilations", [1] * rank), call.integer("group", 1))


def conv_transpose(call: Call) -> Any:
    """ConvTranspose."""
    x, weight, bias = call.tensor(0), call.tensor(1), call.tensor(2)
    rank = weight.ndim - 2
    if call.text("auto_pad", "NOTSET") not in {"NOTSET", "VALID"} or call.integers("output_shape"):
        raise call.unknown("padding that follows from the output's shape")
    strides, dilations = call.integers("strides", [1] * rank), call.integers("dilations", [1] * rank)
    pads, more = call.integers("pads", [0] * 2 * rank), call.integers("output_padding", [0] * rank)
    extra = [before - after + left for before, after, left in zip(pads[:rank], pads[rank:], more, strict=True)]
    if min(extra) < 0:
        raise call.unknown("more padding at the end than before")
    function = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)[rank - 1]
    return function(x, weight, bias, strides, pads[:rank], extra, call.integer("group", 1), dilations)


def gemm(call: Call) -> Any:
    """Gemm: alpha·A·B + beta·C."""
    a, b, c = call.tensor(0), call.tensor(1), call.tensor(2)
    a = a.T if call.integer("transA") else a
    b = b if call.integer("transB") else b.T
    alpha, beta = call.real("alpha", 1.0), call.real("beta", 1.0)
    if alpha == 1.0 and (c is None or (beta == 1.0 and c.ndim == 1)):
        return torch.nn.functional.linear(a, b, c)
    y = (a @ b.T) * alpha
    return y if c is None else y + c * beta


# ---- pools ---------------------------------------------------------------------------------------------------------------------


def pool(call: Call, highest: bool) -> Any:
    """MaxPool and AveragePool."""
    x, kernel = call.tensor(0), call.integers("kernel_shape")
    rank = len(kernel)
    strides, dilations = call.integers("strides", [1] * rank), call.integers("dilations", [1] * rank)
    if len(call.node.outputs) > 1 and call.node.outputs[1].uses():
        raise call.unknown("the places of the maxima")
    before, after = paddings(call, x.shape[2:], kernel, strides)
    ceil = bool(call.integer("ceil_mode"))
    own = before == after and all(2 * size <= wide for size, wide in zip(before, kernel, strict=True))
    if highest:
        function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        if not own:
            x, before = padded(x, before, after, -math.inf), [0] * rank
        return function(x, kernel, strides, before, dilations, ceil)
    if any(size != 1 for size in dilations):
        raise call.unknown("dilation")
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    include = bool(call.integer("count_include_pad"))
    if own:
        return average(x, kernel, strides, before, ceil, include)
    ones = padded(x * 0 + 1, before, after, 1.0 if include else 0.0)
    return average(padded(x, before, after), kernel, strides, 0, ceil) / average(ones, kernel, strides, 0, ceil)


# ---- where values go -----------------------------------------------------------------------------------------------------------


def reshape(call: Call) -> Any:
    """Reshape: 0 keeps a size, −1 takes what is left; known numbers stay in their row."""
    if isinstance(call.inputs[0], tuple):
        return call.inputs[0]
    x, sizes = call.tensor(0), call.numbers(1)
    assert sizes is not None  # noqa: S101 - the operand is required
    if not call.integer("allowzero"):
        sizes = [x.shape[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(call: Call) -> Any:
    """Flatten into two axes."""
    x, axis = call.tensor(0), call.integer("axis", 1)
    axis += x.ndim if axis < 0 else 0
    if axis == 0:
        return x.reshape(1, -1)
    return x.flatten(axis).flatten(0, axis - 1) if axis < x.ndim else x.reshape(-1, 1)


def transpose(call: Call) -> Any:
    """Transpose."""
    x = call.tensor(0)
    return x.permute(call.integers("perm") or list(reversed(range(x.ndim))))


def squeeze(call: Call) -> Any:
    """Squeeze; of known numbers, nothing changes."""
    if call.known:
        return call.inputs[0]
    x, axes = call.tensor(0), call.axes()
    return x.squeeze(axes) if axes else x.squeeze()


def unsqueeze(call: Call) -> Any:
    """Unsqueeze; of known numbers, nothing changes."""
    if call.known:
        return call.inputs[0]
    x, axes = call.tensor(0), call.axes()
    for axis in sorted(axis + (x.ndim + len(axes) if axis < 0 else 0) for axis in axes):
        x = x.unsqueeze(axis)
    return x


def slices(call: Call) -> Any:
    """Slice; a negative step turns its axis round."""
    starts, ends = call.numbers(1), call.numbers(2)
    assert starts is not None and ends is not None  # noqa: S101, PT018 - the operands are required
    if call.known:
        step = (call.numbers(4) or [1])[0]
        return tuple(call.inputs[0][slice(starts[0], ends[0], step)])
    x = call.tensor(0)
    axes, steps = call.numbers(3) or list(range(len(starts))), call.numbers(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            size = x.shape[axis]
            first = min(start + size if start < 0 else start, size - 1)
            last = max(end + size if end < 0 else end, -1)
            x = x.flip(axis)
            start, end, step = size - 1 - first, size - 1 - last, -step  # noqa: PLW2901
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, None if end >= 2**31 - 1 else end, step),)]
    return x


def concat(call: Call) -> Any:
    """Concat; of known numbers, a longer tuple."""
    if call.known:
        return tuple(size for position in range(len(call)) for size in call.numbers(position) or ())
    return torch.cat([call.tensor(position) for position in range(len(call))], call.integer("axis"))


def split(call: Call) -> Any:
    """Split into parts of the given sizes, or equal ones."""
    x, axis, sizes = call.tensor(0), call.integer("axis"), call.numbers(1) or call.integers("split")
    count = len(call.node.outputs)
    return x.split(sizes or -(-x.shape[axis] // count), axis)


def pad(call: Call) -> Any:
    """Pad."""
    x, sizes = call.tensor(0), call.numbers(1)
    assert sizes is not None  # noqa: S101 - the operand is required
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        call.text("mode", "constant")
    ]
    half = len(sizes) // 2
    axes = call.numbers(3) or list(range(half))
    pairs = {axis % x.ndim: (sizes[i], sizes[half + i]) for i, axis in enumerate(axes)}
    both = [size for axis in reversed(range(x.ndim)) for size in pairs.get(axis, (0, 0))]
    while both[-2:] == [0, 0]:
        both = both[:-2]
    if not both:
        return x
    return F.pad(x, both, value=call.number(2, 0.0)) if mode == "constant" else F.pad(x, both, mode=mode)


def gather(call: Call) -> Any:
    """Gather; of known numbers, those at known places."""
    axis = call.integer("axis")
    if call.known and isinstance(call.inputs[0], tuple):
        return tuple(call.inputs[0][int(place)] for place in call.numbers(1) or ())
    x, indices = call.tensor(0), call.tensor(1).to(torch.int64)
    if isinstance(call.inputs[1], Stored) and call.inputs[1].array.ndim == 0:
        return x.select(axis, int(call.inputs[1].array))
    axis %= x.ndim
    size = x.shape[axis]
    indices = torch.where(indices < 0, indices + size, indices)
    if axis == 0 and x.ndim == 2:
        return torch.nn.functional.embedding(indices, x)
    found = x.index_select(axis, indices.reshape(-1))
    return found.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def expand(call: Call) -> Any:
    """Expand: sizes of 1 grow to the other's."""
    x, sizes = call.tensor(0), call.numbers(1)
    assert sizes is not None  # noqa: S101 - the operand is required
    missing = max(len(sizes) - x.ndim, 0)
    shape = [1] * missing + list(x.shape)
    wanted = [1] * (len(shape) - len(sizes)) + sizes
    return x.expand(
        [have if isinstance(want, int) and want == 1 else want for have, want in zip(shape, wanted, strict=True)]
    )


def resize(call: Call) -> Any:
    """Resize, as far as PyTorch interpolates in the same places."""
    x, mode, where = (
        call.tensor(0),
        call.text("mode", "nearest"),
        call.text("coordinate_transformation_mode", "half_pixel"),
    )
    rank = x.ndim - 2
    if call.integer("antialias"):
        raise call.unknown("antialiasing")
    scales, sizes = call.numbers(2), call.numbers(3)
    given = {"size": sizes[2:]} if sizes else {"scale_factor": scales[2:] if scales else None}
    if mode == "nearest" and where == "asymmetric" and call.text("nearest_mode", "round_prefer_floor") == "floor":
        return F.interpolate(x, mode="nearest", **given)
    if mode == "nearest" and scales and all(float(scale).is_integer() for scale in scales):
        return F.interpolate(x, mode="nearest", **given)
    if mode == "linear" and where in {"half_pixel", "pytorch_half_pixel", "align_corners"}:
        how = ("linear", "bilinear", "trilinear")[rank - 1]
        return F.interpolate(x, mode=how, align_corners=where == "align_corners", **given)
    raise call.unknown(f"{mode} interpolation at {where} coordinates")


def depth_to_space(call: Call) -> Any:
    """DepthToSpace."""
    x, block = call.tensor(0), call.integer("blocksize")
    n, channels, height, width = x.shape
    kept = channels // block**2
    if call.text("mode", "DCR") == "CRD":
        return (
            x.reshape(n, kept, block, block, height, width)
            .permute(0, 1, 4, 2, 5, 3)
            .reshape(n, kept, height * block, -1)
        )
    return (
        x.reshape(n, block, block, kept, height, width).permute(0, 3, 4, 1, 5, 2).reshape(n, kept, height * block, -1)
    )


def space_to_depth(call: Call) -> Any:
    """SpaceToDepth."""
    x, block = call.tensor(0), call.integer("blocksize")
    n, channels, height, width = x.shape
    x = x.reshape(n, channels, height // block, block, width // block, block)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(n, channels * block**2, height // block, width // block)


# ---- element by element --------------------------------------------------------------------------------------------------------


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


# ---- recurrent layers ----------------------------------------------------------------------------------------------------------


def recurrent(call: Call) -> Any:
    """LSTM or GRU: the gates stand in another order in PyTorch (i, f, c, o and r, z, h, for ONNX's i, o, f, c and z, r, h)."""
    long = call.node.op_type == "LSTM"
    order = (0, 2, 3, 1) if long else (1, 0, 2)
    x, w, r, b = (call.tensor(position) for position in range(4))
    named = {"activations", "clip", "activation_alpha", "activation_beta"} & set(call.node.attributes)
    named |= {name for name in ("input_forget", "layout") if call.integer(name)}
    way = call.text("direction", "forward")
    if named or way == "reverse" or call.tensor(4) is not None or call.tensor(7) is not None:
        raise call.unknown(f"{', '.join(sorted(named)) or 'a direction, lengths or peepholes'}")
    if not long and not call.integer("linear_before_reset"):
        raise call.unknown("linear_before_reset = 0")
    hidden, directions = r.shape[2], w.shape[0]
    weights = []
    for direction in range(directions):
        for part in (w[direction], r[direction], *(b[direction].split(len(order) * hidden) if b is not None else ())):
            gates = part.split(hidden)
            weights.append(torch.cat([gates[place] for place in order]))
    shape = (directions, x.shape[1], hidden)
    states = [call.tensor(position) for position in ((5, 6) if long else (5,))]
    states = [state if state is not None else x.new_zeros(shape) for state in states]
    function: Any = torch.lstm if long else torch.gru
    start = states if long else states[0]
    y, *last = function(x, start, weights, b is not None, 1, 0.0, False, directions == 2, False)
    return (y.reshape(*y.shape[:2], directions, hidden).permute(0, 2, 1, 3), *last)


# ---- integers ------------------------------------------------------------------------------------------------------------------


def parameters(call: Call) -> tuple[Any, Any, Any, int, int]:
    """Return the scale, zero point, dtype, and lowest and highest integer of what a node quantizes or dequantizes."""
    scale, zero_point = call.inputs[1], call.inputs[2] if len(call) > 2 else None
    if not isinstance(scale, Stored) or call.integer("block_size"):
        raise call.unknown("scales in blocks, or ones that are computed")
    quantizes = call.node.op_type == "QuantizeLinear"
    stored = zero_point.array.dtype if isinstance(zero_point, Stored) else None
    if stored is None:
        stored = np.dtype(np.uint8) if quantizes else np.dtype(str(call.tensor(0).dtype).removeprefix("torch."))
    bounds = np.iinfo(stored)
    return scale, zero_point, getattr(torch, stored.name), int(bounds.min), int(bounds.max)


def quantize(call: Call) -> Any:
    """QuantizeLinear: one scale."""
    scale, zero_point, dtype, lowest, highest = parameters(call)
    if scale.array.size != 1:
        raise call.unknown("one scale per channel of what is computed")
    zero = int(zero_point.array.reshape(-1)[0]) if zero_point is not None else 0
    real = float(scale.array.reshape(-1)[0])
    return torch.ops.quantized_decomposed.quantize_per_tensor(call.tensor(0), real, zero, lowest, highest, dtype)


def dequantize(call: Call) -> Any:
    """DequantizeLinear: one scale, or one per channel."""
    scale, zero_point, dtype, lowest, highest = parameters(call)
    x = call.tensor(0)
    if scale.array.ndim == 0:
        zero = int(zero_point.array) if zero_point is not None else 0
        real = float(scale.array)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(x, real, zero, lowest, highest, dtype)
    zeros = zero_point.tensor if zero_point is not None else torch.zeros(scale.array.shape, dtype=torch.int64)
    axis = call.integer("axis", 1) % max(x.ndim, 1)
    return torch.ops.quantized_decomposed.dequantize_per_channel(x, scale.tensor, zeros, axis, lowest, highest, dtype)


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


def operators() -> dict[str, Callable[[Call], Any]]:
    """Return every row, by the operator's name."""
    return {
        **elementwise(),
        "ArgMax": lambda call: torch.argmax(call.tensor(0), call.integer("axis"), bool(call.integer("keepdims", 1))),
        "AveragePool": lambda call: pool(call, highest=False),
        "BatchNormalization": batch_norm,
        "Cast": cast,
        "Concat": concat,
        "Conv": conv,
        "ConvTranspose": conv_transpose,
        "DepthToSpace": depth_to_space,
        "DequantizeLinear": dequantize,
        "Einsum": einsum,
        "Expand": expand,
        "Flatten": flatten,
        "Gather": gather,
        "GatherElements": lambda call: torch.gather(call.tensor(0), call.integer("axis"), call.tensor(1)),
        "Gemm": gemm,
        "GlobalAveragePool": lambda call: call.tensor(0).mean(list(range(2, call.tensor(0).ndim)), keepdim=True),
        "GlobalMaxPool": lambda call: call.tensor(0).amax(list(range(2, call.tensor(0).ndim)), keepdim=True),
        "GRU": recurrent,
        "GroupNormalization": group_norm,
        "InstanceNormalization": instance_norm,
        "LSTM": recurrent,
        "LayerNormalization": layer_norm,
        "LogSoftmax": lambda call: torch.log_softmax(call.tensor(0), call.integer("axis", -1)),
        "MatMul": lambda call: call.tensor(0) @ call.tensor(1),
        "MaxPool": lambda call: pool(call, highest=True),
        "Pad": pad,
        "QuantizeLinear": quantize,
        "ReduceL2": reduced("norm"),
        "ReduceMax": reduced("amax"),
        "ReduceMean": reduced("mean"),
        "ReduceMin": reduced("amin"),
        "ReduceSum": reduced("sum"),
        "Reshape": reshape,
        "Resize": resize,
        "Shape": lambda call: tuple(call.tensor(0).shape)[call.integer("start") : call.integer("end", 2**31)],
        "Slice": slices,
        "Softmax": lambda call: torch.softmax(call.tensor(0), call.integer("axis", -1)),
        "SpaceToDepth": space_to_depth,
        "Split": split,
        "Squeeze": squeeze,
        "Tile": lambda call: call.tensor(0).repeat(call.numbers(1)),
        "Transpose": transpose,
        "Unsqueeze": unsqueeze,
    }
