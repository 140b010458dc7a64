"""What layers are lowered with: their ends, their multipliers, and axes that lie side by side in a buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.embedded.program import Value, whole
from quantcli.errors import EmbeddedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantcli.embedded.lowering import Lowering
    from quantcli.sidecar import LayerEntry, MultiplierEntry


def output_fields(low: Lowering, entry: LayerEntry) -> dict[str, Any]:
    """Return the fields that end every layer: zero point, clamp and rounding."""
    clamp = entry.clamp or low.grid(entry.outputs[0])
    return {
        "out_zero": low.tensor(entry.outputs[0]).zero_point[0],
        "low": clamp[0],
        "high": clamp[1],
        "rounding": f"ROUNDING_{entry.rounding.upper()}",
    }


def check_window(value: Value, entry: LayerEntry) -> None:
    """Raise EmbeddedError where a window does not slide over one or two axes of one sample."""
    if len(value.shape) in (3, 4) and value.shape[0] == 1:
        return
    several = len(value.shape) in (3, 4)
    raise EmbeddedError(
        f"C source has no kernel for {entry.operator} '{entry.name}' of shape {list(value.shape)}",
        "export the model for one sample, or any number of them"
        if several
        else "its kernels slide over one or two axes",
    )


def scalar(low: Lowering, entry: LayerEntry, multiplier: MultiplierEntry, largest: int) -> dict[str, Any]:
    """Return one multiplier and its shift as fields."""
    shift = low.rescaling(multiplier.multiplier, multiplier.shift, entry.rounding, largest, entry.name)
    return {"multiplier": multiplier.multiplier[0], "shift": shift[0]}


def grouped(low: Lowering, value: Value, axes: tuple[int, ...]) -> tuple[Value, dict[str, Any], NDArray[np.int64]]:
    """Return a value that lies [outer][length][inner], length what the axes span; those as fields; and the order of the rest.

    The order of the rest names its elements as a model counts them that has dropped the axes.
    """
    found = split_along(value, axes)
    if found is None:
        value = low.laid(value, np.moveaxis(whole(value.shape), axes, range(-len(axes), 0)).reshape(-1))
        found = split_along(value, axes)
    if found is None:
        raise EmbeddedError(f"'{value.tensor}' has no axes {axes}", "this is an error of quantcli")
    return value, *found


def split_along(value: Value, axes: tuple[int, ...]) -> tuple[dict[str, Any], NDArray[np.int64]] | None:
    """Return the sizes and the order of the rest, if a value lies [outer][length][inner] already."""
    kept = [size for axis, size in enumerate(value.shape) if axis not in axes]
    group = np.broadcast_to(np.expand_dims(whole(kept), axes), value.shape).reshape(-1)  # of the rest, by element
    length = int(np.prod([value.shape[axis] for axis in axes], dtype=np.int64))
    keys = group[value.order]
    again = np.flatnonzero(keys == keys[0])
    inner = int(again[1]) if again.size > 1 else keys.size
    if keys.size % (inner * length):
        return None
    cube = keys.reshape(-1, length, inner)
    if not (cube == cube[:, :1]).all():
        return None
    return {"outer": cube.shape[0], "length": length, "inner": inner}, cube[:, 0].reshape(-1)


def mean_multiplier(low: Lowering, entry: LayerEntry, count: int) -> dict[str, Any]:
    """Return a mean's or a sum's multiplier: it divides in the same rounding, and the shift is part of what it divides by.

    Raises:
        EmbeddedError: If numerator or denominator may leave 61 bits.
    """
    if not entry.multipliers:
        return {"multiplier": 1, "shift": 0}
    multiplier, shift = entry.multipliers[0].multiplier[0], entry.multipliers[0].shift[0]
    numerator = low.furthest(entry.inputs[0]) * count * (multiplier << max(-shift, 0))
    if numerator >= 1 << 61 or count << max(shift, 0) >= 1 << 61:
        raise EmbeddedError(f"the mean '{entry.name}' may leave 61 bits", "choose --multiplier-bits 16")
    return {"multiplier": multiplier, "shift": shift}
