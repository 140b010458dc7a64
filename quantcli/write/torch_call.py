"""One operator of a folded ONNX graph that is being traced in PyTorch, and its operands.

A value is a tensor; or something stored in the model (`Stored`), which is a tensor where it is computed with and numbers where it
says how; or numbers that are known while a program is traced, such as the sizes of a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quantcli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def as_tensor(value: Any) -> Any:
    """Return a value as a tensor."""
    if isinstance(value, Stored):
        return value.tensor
    if isinstance(value, tuple):
        return torch.stack([torch.as_tensor(part, dtype=torch.int64) for part in value])
    return value
