"""What a folder of C source says of itself: ``program.json``, for whoever builds on it, and for `quantcli verify --c`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from quantcli.embedded.program import Program

FILE = "program.json"


class PortEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or an output: its name, the sidecar's tensor, its shape, and what its integers mean."""

    name: str
    tensor: str
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    qmin: int
    qmax: int

    @property
    def size(self) -> int:
        """How many values it has."""
        return int(np.prod(self.shape, dtype=np.int64))


class StepEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel call: which kernel, for which layer, and its multiply-accumulates."""

    kernel: str
    layer: str
    operator: str
    macs: int


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A folder of C source.

    Attributes:
        name: Of the model in C.
        dtype: Of the activations.
        inputs, outputs: In the order of the function's arguments, elements as the model counts them.
        arena_bytes: The static arena of activations.
        bound_bytes: The largest live set: no arena is smaller.
        scratch_bytes: The columns of convolutions.
        constant_bytes: Weights, biases, multipliers, tables.
        macs: Multiply-accumulates of a run.
        steps: The kernel calls.
    """

    format: Literal["quantcli-c"]
    version: Literal[1]
    name: str
    dtype: str
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]
    arena_bytes: int
    bound_bytes: int
    scratch_bytes: int
    constant_bytes: int
    macs: int
    steps: tuple[StepEntry, ...]


def describe(program: Program, name: str) -> Description:
    """Return what is told of a program."""

    def ports(kind: str) -> tuple[PortEntry, ...]:
        return tuple(
            PortEntry(p.name, p.tensor, p.shape, p.scale, p.zero_point, p.qmin, p.qmax) for p in getattr(program, kind)
        )

    return Description(
        "quantcli-c",
        1,
        name,
        program.dtype,
        ports("inputs"),
        ports("outputs"),
        program.arena * program.itemsize,
        program.bound * program.itemsize,
        program.scratch_bytes,
        program.flash,
        program.macs,
        tuple(StepEntry(step.kernel, step.layer, step.operator, step.macs) for step in program.steps),
    )


def read_description(folder: Path) -> Description:
    """Read what a folder says of itself.

    Raises:
        ModelError: If it is no folder of C source.
    """
    try:
        return msgspec.json.decode((Path(folder) / FILE).read_bytes(), type=Description)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{folder} holds no C source of quantcli ({error})", "convert with --format c") from error
