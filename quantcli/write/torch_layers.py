"""Convolutions, products, pools and recurrent layers of ONNX in PyTorch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantcli.write.torch_call import Call


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
