"""What a folder of C source says of itself: ``program.json``, for whoever builds on it, and for `quantcli verify --c`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from quantcli.embedded.program import Port
from quantcli.errors import ModelError

if TYPE_CHECKING:
    from quantcli.embedded.program import Program

FILE = "program.json"


class StepEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel call: its kernel and layer, its multiply-accumulates, bytes of activations that live then, and of its constants."""

    kernel: str
    layer: str
    operator: str
    macs: int
    live_bytes: int
    constant_bytes: int


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
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    arena_bytes: int
    bound_bytes: int
    scratch_bytes: int
    constant_bytes: int
    macs: int
    steps: tuple[StepEntry, ...]


def describe(program: Program, name: str) -> Description:
    """Return what is told of a program."""
    return Description(
        "quantcli-c",
        1,
        name,
        program.dtype,
        program.inputs,
        program.outputs,
        program.arena * program.itemsize,
        program.bound * program.itemsize,
        program.scratch_bytes,
        program.flash,
        program.macs,
        tuple(
            StepEntry(step.kernel, step.layer, step.operator, step.macs, step.live * program.itemsize, step.constants)
            for step in program.steps
        ),
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
