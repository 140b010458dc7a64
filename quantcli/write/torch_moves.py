"""ONNX operators that move values, in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from quantcli.write.torch_call import Call, Stored


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
