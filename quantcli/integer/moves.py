"""MOVES: what the operators that only move integers do with them (docs/arithmetic.md, equation 16)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.integer import kernels
from quantcli.integer.layer import IntegerError, Layer, plain_list
from quantcli.integer.resize import resize

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def move(layer: Layer, operands: list[NDArray[np.int64]]) -> list[NDArray[Any]]:
    """Equation 16: the same integers elsewhere."""
    operator = MOVES.get(layer.entry.operator)
    if operator is None:
        raise IntegerError(f"layer '{layer.entry.name}' moves integers, which {layer.entry.operator} does not")
    return operator(layer, operands[0])


def reshape(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q in its new shape; 0 keeps a size unless ``allowzero``."""
    shape = plain_list(layer, 1, "shape") or []
    if not layer.attributes.get("allowzero", 0):
        shape = [q.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return [q.reshape(shape)]


def flatten(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q as a matrix."""
    axis = int(layer.attributes.get("axis", 1)) % (q.ndim + 1)
    return [q.reshape(int(np.prod(q.shape[:axis])), -1)]


def squeeze(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q without axes of size 1."""
    axes = plain_list(layer, 1, "axes")
    return [np.squeeze(q, None if axes is None else tuple(axes))]


def unsqueeze(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q with new axes of size 1."""
    return [np.expand_dims(q, tuple(plain_list(layer, 1, "axes") or ()))]


def transpose(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q with its axes permuted."""
    return [np.transpose(q, layer.attributes.get("perm"))]


def cut(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return a slice of q."""
    starts, ends = plain_list(layer, 1, "starts") or [], plain_list(layer, 2, "ends") or []
    axes = plain_list(layer, 3, "axes") or list(range(len(starts)))
    steps = plain_list(layer, 4, "steps") or [1] * len(starts)
    chosen = [slice(None)] * q.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = q.shape[axis]
        if step > 0:
            chosen[axis] = slice(*slice(max(start, -size), max(end, -size), step).indices(size))
        else:
            first = min(start + size if start < 0 else start, size - 1)
            last = max(end + size if end < 0 else end, -1)
            chosen[axis] = slice(first, None if last < 0 else last, step)
    return [q[tuple(chosen)]]


def gather(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return the slices of q at the given indices."""
    indices = layer.plain[1]
    if indices is None:
        raise IntegerError("Gather without indices")
    return [np.take(q, indices.astype(np.int64), axis=int(layer.attributes.get("axis", 0)))]


def split(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q in parts, those that are used."""
    axis, sizes = int(layer.attributes.get("axis", 0)), plain_list(layer, 1, "split")
    if sizes is None:
        parts = int(layer.attributes.get("num_outputs") or len(layer.entry.outputs))
        step = -(-q.shape[axis] // parts)
        sizes = [min(step, q.shape[axis] - step * i) for i in range(parts)]
    return np.split(q, np.cumsum(sizes)[:-1].tolist(), axis=axis)


def pad(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q padded: with its zero point, or with its own values."""
    pads = plain_list(layer, 1, "pads") or []
    axes = [axis % q.ndim for axis in (plain_list(layer, 3, "axes") or range(q.ndim))]
    widths = [(0, 0)] * q.ndim
    for i, axis in enumerate(axes):
        widths[axis] = (pads[i], pads[i + len(axes)])
    mode = layer.attributes.get("mode", "constant")
    negative = tuple(
        slice(max(-before, 0), size - max(-after, 0)) for (before, after), size in zip(widths, q.shape, strict=True)
    )
    q, widths = q[negative], [(max(before, 0), max(after, 0)) for before, after in widths]
    if mode == "constant":
        return [np.pad(q, widths, constant_values=layer.zero_point(layer.entry.inputs[0]))]
    return [np.pad(q, widths, mode=mode)]


def depth_to_space(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q with blocks of channels spread over space."""
    n, c, h, w = q.shape
    block = int(layer.attributes["blocksize"])
    if layer.attributes.get("mode", "DCR") == "CRD":
        spread = q.reshape(n, c // block**2, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    else:
        spread = q.reshape(n, block, block, c // block**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    return [spread.reshape(n, c // block**2, h * block, w * block)]


def resized(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q resized; linear interpolation is the one move that rounds."""
    zero_point = layer.zero_point(layer.entry.inputs[0])
    reals = resize(q - zero_point, layer.attributes, layer.plain.get(2), layer.plain.get(3))
    return [np.rint(reals).astype(np.int64) + zero_point]


def expand(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q repeated along axes of size 1."""
    shape = plain_list(layer, 1, "shape") or []
    return [np.broadcast_to(q, np.broadcast_shapes(q.shape, tuple(shape)))]


def tile(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q repeated as a whole."""
    return [np.tile(q, plain_list(layer, 1, "repeats") or ())]


def extreme(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return the highest or lowest integers along axes: scales are positive, so they are those of the reals."""
    axes = tuple(plain_list(layer, 1, "axes") or ())
    if not axes and layer.attributes.get("noop_with_empty_axes", 0):
        return [q]
    find = np.max if layer.entry.operator == "ReduceMax" else np.min
    return [np.asarray(find(q, axis=axes or None, keepdims=bool(layer.attributes.get("keepdims", 1))))]


def global_max(_: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return the highest integer of every channel."""
    return [q.max(axis=tuple(range(2, q.ndim)), keepdims=True)]


def gather_elements(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return single integers of q, chosen along one axis."""
    indices, axis = layer.plain[1], int(layer.attributes.get("axis", 0))
    if indices is None:
        raise IntegerError("GatherElements without indices")
    axis %= q.ndim
    chosen = np.where(indices < 0, indices + q.shape[axis], indices).astype(np.int64)
    found: NDArray[Any] = np.take_along_axis(
        q[tuple(slice(None) if i == axis else slice(size) for i, size in enumerate(indices.shape))], chosen, axis
    )
    return [found]


def space_to_depth(layer: Layer, q: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return q with blocks of space gathered in channels."""
    n, c, h, w = q.shape
    block = int(layer.attributes["blocksize"])
    spread = q.reshape(n, c, h // block, block, w // block, block).transpose(0, 3, 5, 1, 2, 4)
    return [spread.reshape(n, c * block**2, h // block, w // block)]


MOVES: dict[str, Callable[[Layer, NDArray[np.int64]], list[NDArray[Any]]]] = {
    "MaxPool": lambda layer, q: [kernels.max_pool(q, layer.attributes)],
    "Split": split,
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Slice": cut,
    "Gather": gather,
    "Pad": pad,
    "DepthToSpace": depth_to_space,
    "Resize": resized,
    "Expand": expand,
    "Tile": tile,
    "ReduceMax": extreme,
    "ReduceMin": extreme,
    "GlobalMaxPool": global_max,
    "GatherElements": gather_elements,
    "SpaceToDepth": space_to_depth,
}
