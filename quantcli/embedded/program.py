"""A quantized model as a straight list of kernel calls on buffers whose places are known: what the C source is written from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# What C calls the types of activations, weights, biases, multipliers and shifts.
C_TYPES = {
    "uint8": "uint8_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
}


@dataclass(frozen=True, eq=False)
class Array:
    """A constant.

    Attributes:
        name: Its name in C.
        values: One dimension.
        ctype: The type of its elements in C.
    """

    name: str
    values: NDArray[Any]
    ctype: str

    @property
    def bytes(self) -> int:
        """What it takes of the flash memory."""
        return int(self.values.nbytes)


@dataclass(eq=False)
class Buffer:
    """Where activations lie.

    Attributes:
        name: The tensor that it was made for.
        size: In values.
        kind: The caller's input or output, the arena, or a constant.
        index: Which input or output.
        array: The constant.
        offset: Where it begins in the arena, in values; set when the arena is planned.
    """

    name: str
    size: int
    kind: Literal["input", "output", "arena", "constant"] = "arena"
    index: int = -1
    array: Array | None = None
    offset: int = -1


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor in a buffer.

    Attributes:
        tensor: Its name in the sidecar, which has its parameters.
        shape: Its shape in the model.
        order: What element (counted as the model counts, last axis fastest) lies at each position of the buffer.
        buffer: The buffer.
    """

    tensor: str
    shape: tuple[int, ...]
    order: NDArray[np.int64]
    buffer: Buffer

    @cached_property
    def position(self) -> NDArray[np.int64]:
        """Where each element lies: the inverse of the order."""
        found = np.empty_like(self.order)
        found[self.order] = np.arange(self.order.size)
        return found

    @property
    def canonical(self) -> bool:
        """Whether elements lie as the model counts them."""
        return bool(np.array_equal(self.order, np.arange(self.order.size)))


@dataclass(frozen=True)
class Loops:
    """Four nested loops over two operands: sizes, and how far each moves."""

    size: tuple[int, int, int, int]
    a: tuple[int, int, int, int]
    b: tuple[int, int, int, int]


@dataclass(eq=False)
class Step:
    """One kernel call.

    Attributes:
        kernel: The kernel's name.
        layer: The layer that it computes, or part of it.
        operator: The layer's operator.
        reads: Buffers with the place in them where reading begins.
        writes: The buffer that it writes to, and where writing begins.
        parameters: The type of the kernel's parameters, and their fields in order; none for kernels with plain arguments.
        arguments: Plain arguments before the buffers.
        scratch: How many values of a column it needs.
        in_place: Which of ``reads`` may be the buffer that is written to.
        macs: Multiply-accumulates.
        live: How many values of the arena live while it runs; set when the arena is planned.
    """

    kernel: str
    layer: str
    operator: str
    reads: tuple[tuple[Buffer, int], ...]
    writes: tuple[Buffer, int]
    parameters: tuple[str, dict[str, Any]] | None = None
    arguments: tuple[Any, ...] = ()
    scratch: int = 0
    in_place: tuple[int, ...] = ()
    macs: int = 0
    live: int = 0

    @property
    def constants(self) -> int:
        """Bytes of the constants that it reads."""
        given = [*self.arguments, *(self.parameters[1].values() if self.parameters is not None else ())]
        arrays = [value for value in given if isinstance(value, Array)]
        arrays += [buffer.array for buffer, _ in self.reads if buffer.array is not None]
        return sum(array.bytes for array in arrays)


class Port(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or an output.

    Attributes:
        name: Its name in the model.
        tensor: Its name in the sidecar.
        shape: Its shape.
        scale, zero_point, qmin, qmax: Its parameters.
    """

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
        return math.prod(self.shape)


@dataclass(eq=False)
class Program:
    """A model, ready to be written as C.

    Attributes:
        dtype: The type of all activations.
        inputs, outputs: What goes in and comes out.
        steps: The kernel calls.
        arrays: The constants.
        wide: Whether accumulators need 64 bits.
        multiplier_bits: The width of M0.
        roundings: The roundings that are used.
        left: Whether some multiplier shifts to the left.
        wide_results: Whether some rescaled accumulator may leave 30 bits.
        arena: The size of the arena in values, once it is planned.
        bound: The largest live set: no plan takes less.
    """

    dtype: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: list[Step]
    arrays: list[Array]
    wide: bool
    multiplier_bits: int
    roundings: tuple[str, ...]
    left: bool
    wide_results: bool
    arena: int = 0
    bound: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return int(np.dtype(self.dtype).itemsize)

    @property
    def scratch(self) -> int:
        """Values of the columns that the largest step needs."""
        return max((step.scratch for step in self.steps), default=0)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of the columns."""
        return self.scratch * (2 if self.itemsize == 1 else 4)

    @property
    def ram(self) -> int:
        """Bytes of memory that are written to: the arena and the columns. Inputs and outputs are the caller's."""
        return self.arena * self.itemsize + self.scratch_bytes

    @property
    def flash(self) -> int:
        """Bytes of constants, without code."""
        return sum(array.bytes for array in self.arrays)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one run."""
        return sum(step.macs for step in self.steps)


def loops(first: NDArray[np.int64], second: NDArray[np.int64]) -> Loops | None:
    """Return four nested loops that visit both lists of places (less their first one) in order; None where there are none.

    Args:
        first: Places of one operand.
        second: As many places of the other.
    """
    found: list[tuple[int, int, int]] = []
    a, b = first - first[0], second - second[0]
    while a.size > 1:
        step_a, step_b = int(a[1] - a[0]), int(b[1] - b[0])
        same = (np.diff(a) == step_a) & (np.diff(b) == step_b)
        run = a.size if same.all() else int(np.argmin(same)) + 1
        length = next((size for size in divisors(int(np.gcd(run, a.size))) if runs(a, size) and runs(b, size)), 1)
        if length == 1 or len(found) == 4:
            return None
        found.append((length, step_a, step_b))
        a, b = a[::length], b[::length]
    found += [(1, 0, 0)] * (4 - len(found))
    sizes, steps_a, steps_b = zip(*reversed(found), strict=True)
    return Loops(sizes, steps_a, steps_b)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number above 1, the largest first."""
    return [size for size in range(number, 1, -1) if number % size == 0]


def runs(places: NDArray[np.int64], length: int) -> bool:
    """Tell whether places are runs of one length and step, one behind the other."""
    rows = places.reshape(-1, length)
    return bool((rows - rows[:, :1] == rows[0] - rows[0, 0]).all())


def whole(shape: Sequence[int]) -> NDArray[np.int64]:
    """Return the elements of a shape as the model counts them."""
    return np.arange(int(np.prod(shape, dtype=np.int64))).reshape(tuple(shape))


def channels_last(shape: Sequence[int]) -> NDArray[np.int64]:
    """Return the order in which channels (axis 1) lie last."""
    return np.moveaxis(whole(shape), 1, -1).reshape(-1)
