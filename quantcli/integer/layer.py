"""One layer of a sidecar with what its node says, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibration.errors import ReportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from quantcli.sidecar import LayerEntry, Sidecar, TensorEntry


class IntegerError(ReportedError):
    """The integers of a layer cannot be computed as the sidecar states them."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer, ready to run.

    Attributes:
        entry: Its entry in the sidecar.
        attributes: Its node's attributes.
        tensors: The entries of its operands and outputs, by name.
        bits: The width of the multipliers.
        plain: Its operands without parameters (shapes, axes, indices), by position; what is absent is None.
    """

    entry: LayerEntry
    attributes: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    bits: int
    plain: Mapping[int, NDArray[Any] | None]

    def zero_point(self, name: str) -> int:
        """Return the zero point of a tensor with a single one."""
        return self.tensors[name].zero_point[0]

    @property
    def narrow(self) -> bool:
        """Whether the first two operands have 8 bits at most: sums of products fit 32 bits then."""
        return all(self.tensors[name].qmax < 1 << 8 for name in self.entry.inputs[:2])

    @property
    def output(self) -> TensorEntry:
        """The entry of the first output."""
        return self.tensors[self.entry.outputs[0]]


def multiplier_bits(sidecar: Sidecar, entry: LayerEntry) -> int:
    """Return the width of a layer's multipliers (`quantcli.targets.Target.multiplier_bits`)."""
    multiplied = entry.arithmetic in {"accumulate", "product"}
    wide = multiplied and any(sidecar.tensors[name].qmax >= 1 << 8 for name in entry.inputs[:2])
    return sidecar.target.multiplier_bits(wide)


def plain_list(layer: Layer, position: int, attribute: str) -> list[int] | None:
    """Return integers that an operator takes as an operand or, in older operator sets, as an attribute."""
    operand = layer.plain.get(position)
    if operand is not None:
        return [int(value) for value in operand.reshape(-1)]
    found = layer.attributes.get(attribute)
    return None if found is None else [int(value) for value in found]
