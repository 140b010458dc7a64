"""From a quantized model and its sidecar to a program: what is in reach, in order, each layer as kernel calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from quantcli.embedded.arena import plan
from quantcli.embedded.program import C_TYPES, Array, Buffer, Loops, Port, Program, Step, Value, loops, whole
from quantcli.embedded.reach import Reach
from quantcli.errors import EmbeddedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from quantcli.integer.executor import Executor
    from quantcli.integer.layer import Layer
    from quantcli.sidecar import LayerEntry, Sidecar, TensorEntry

# Largest product of an accumulator and a multiplier that rounding leaves room for.
WIDEST_PRODUCT = 1 << 62
# C99 tells names apart by their first 63 characters; a prefix and a number are put around these.
NAME_LENGTH = 48
# A rescaled accumulator below this needs no saturation before its zero point is put on.
NARROW_RESULT = 1 << 29


@dataclass(eq=False)
class Lowering:
    """One model being lowered.

    Args:
        executor: The model and its sidecar.
        feeds: One sample: the shapes are its.
        until: Names of tensors that take the place of the model's outputs.

    Attributes:
        values: The tensors that are lowered, by their names in the sidecar.
        steps: The kernel calls so far.
        arrays: The constants so far.
    """

    executor: Executor
    feeds: Mapping[str, NDArray[Any]]
    until: Sequence[str] = ()
    values: dict[str, Value] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    arrays: list[Array] = field(default_factory=list)
    wide: bool = False
    roundings: set[str] = field(default_factory=set)
    left: bool = False
    wide_results: bool = False

    def __post_init__(self) -> None:
        self.sidecar: Sidecar = self.executor.sidecar
        self.integers, self.reals = self.executor.run_all(self.feeds)
        for name in self.sidecar.tensors:
            if name not in self.integers and name in self.reals and self.reals[name].dtype.kind == "f":
                self.executor.integer(name, self.integers, self.reals)
        self.dtype = self.activation_type()
        self.reach = Reach(self.executor, set(self.feeds))

    def activation_type(self) -> str:
        """Return the one type that all activations have.

        Raises:
            EmbeddedError: If there are several.
        """
        found = {tensor.dtype for tensor in self.sidecar.tensors.values() if tensor.role in {"activation", "constant"}}
        if len(found) != 1:
            kinds = ", ".join(sorted(found)) or "none"
            raise EmbeddedError(
                f"C source needs activations of one type, and these have: {kinds}", "choose one dtype for all"
            )
        return found.pop()

    # ---- the walk ----------------------------------------------------------------------------------------------------------

    def run(self, lowered: Mapping[str, Callable[[Lowering, Layer, LayerEntry], None]]) -> Program:
        """Return the program.

        Args:
            lowered: What becomes of a layer, by arithmetic.

        Raises:
            EmbeddedError: If an operator has no kernel, or nothing leads from the inputs to an output.
        """
        graph = self.executor.model.graph
        wanted = self.targets()
        self.reach.check(wanted)
        inputs = self.ports([str(value.name) for value in graph.inputs if value.name not in graph.initializers])
        for number, port in enumerate(inputs):
            buffer = Buffer(port.name, port.size, "input", number)
            self.values[port.tensor] = Value(port.tensor, port.shape, whole(port.shape).reshape(-1), buffer)
        for node in self.reach.needed(wanted):
            entry = self.executor.entries[str(node.name)]
            lowered[entry.arithmetic](self, self.layer(entry, node), entry)
        outputs = self.delivered(wanted)
        program = Program(
            self.dtype,
            inputs,
            outputs,
            self.steps,
            self.arrays,
            self.wide or self.dtype == "int16",
            self.sidecar.target.multiplier.bits,
            tuple(sorted(self.roundings)),
            self.left,
            self.wide_results,
        )
        plan(program)
        return program

    def targets(self) -> list[str]:
        """Return the tensors that come out.

        Raises:
            EmbeddedError: If one that was named is no integer tensor of the model.
        """
        if self.until:
            names = [
                name if name in self.sidecar.tensors else self.executor.by_real.get(name, "") for name in self.until
            ]
            for given, name in zip(self.until, names, strict=True):
                if not name or self.sidecar.tensors[name].role != "activation":
                    raise EmbeddedError(f"there is no integer tensor '{given}' to end at", "the sidecar names them all")
            return names
        outputs = [str(value.name) for value in self.executor.model.graph.outputs]
        return [self.executor.by_real.get(name, name) for name in outputs]

    def ports(self, names: Sequence[str]) -> tuple[Port, ...]:
        """Return the inputs that integer layers read.

        Raises:
            EmbeddedError: If there is none.
        """
        found = [self.port(name, name) for name in names if name in self.sidecar.tensors]
        if not found:
            raise EmbeddedError("no input of the model is quantized", "C source begins at a quantized input")
        return tuple(found)

    def port(self, name: str, tensor: str) -> Port:
        """Return what is told of an input or an output."""
        entry = self.sidecar.tensors[tensor]
        shape = tuple(self.integers[tensor].shape)
        return Port(name, tensor, shape, entry.scale[0], entry.zero_point[0], entry.qmin, entry.qmax)

    def delivered(self, wanted: Sequence[str]) -> tuple[Port, ...]:
        """See to it that the outputs come to the caller's buffers, as the model counts them."""
        ports, taken = [], set()
        for number, name in enumerate(wanted):
            port, value = self.port(self.sidecar.tensors[name].reals, name), self.values[name]
            if (
                value.canonical
                and value.buffer.kind == "arena"
                and value.buffer.size == port.size
                and value.buffer not in taken
            ):
                value.buffer.kind, value.buffer.index = "output", number
                taken.add(value.buffer)
            else:
                self.laid(value, whole(value.shape).reshape(-1), Buffer(name, port.size, "output", number), "output")
            ports.append(port)
        return tuple(ports)

    # ---- what layers are lowered with ---------------------------------------------------------------------------------------

    def layer(self, entry: LayerEntry, node: ir.Node) -> Layer:
        """Return a layer as the executor runs it."""
        return self.executor.layer(entry, node, self.integers, self.reals)

    def tensor(self, name: str) -> TensorEntry:
        """Return a tensor's entry."""
        return self.sidecar.tensors[name]

    def is_constant(self, name: str) -> bool:
        """Tell whether an operand is stored."""
        return self.tensor(name).role != "activation"

    def stored(self, name: str) -> NDArray[np.int64]:
        """Return a stored operand's integers."""
        return self.executor.stored[self.tensor(name).integers].astype(np.int64)

    def operand(self, name: str) -> Value:
        """Return an operand: lowered before, or a constant.

        Raises:
            EmbeddedError: If a constant is of another type than activations.
        """
        if name not in self.values:
            if self.is_constant(name):
                stored = self.stored(name)
            elif name not in self.reach.moving and name in self.integers:
                stored = self.integers[name].astype(np.int64)  # it follows from constants alone
            else:
                raise EmbeddedError(f"nothing computes '{name}' in integers", "this is an error of quantcli")
            if self.tensor(name).dtype != self.dtype:
                raise EmbeddedError(
                    f"the constant '{name}' is {self.tensor(name).dtype} among activations of {self.dtype}",
                    "choose --activation-dtype int8",
                )
            array = self.array(name, stored.reshape(-1).astype(self.dtype))
            buffer = Buffer(name, stored.size, "constant", array=array)
            self.values[name] = Value(name, tuple(stored.shape), whole(stored.shape).reshape(-1), buffer)
        return self.values[name]

    def array(self, name: str, values: NDArray[Any]) -> Array:
        """Return a constant, one for the same values of the same type."""
        for known in self.arrays:
            if known.values.dtype == values.dtype and np.array_equal(known.values, values):
                return known
        stem = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)[:NAME_LENGTH]
        taken = {known.name for known in self.arrays}
        base = f"data_{stem}"
        unique = next(n for n in (base, *(f"{base}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        made = Array(unique, values, C_TYPES[values.dtype.name])
        self.arrays.append(made)
        return made

    def made(self, name: str, order: NDArray[np.int64] | None = None, buffer: Buffer | None = None) -> Value:
        """Return the value of a tensor that a step makes, in a new buffer; as the model counts where no order is given."""
        shape = tuple(self.integers[name].shape)
        size = int(np.prod(shape, dtype=np.int64))
        value = Value(name, shape, whole(shape).reshape(-1) if order is None else order, buffer or Buffer(name, size))
        self.values[name] = value
        return value

    def emit(self, step: Step) -> None:
        """Add a step."""
        self.steps.append(step)

    def laid(self, value: Value, order: NDArray[np.int64], buffer: Buffer | None = None, layer: str = "") -> Value:
        """Return a value whose elements lie in an order, copied where they do not."""
        if buffer is None and np.array_equal(value.order, order):
            return value
        target = buffer or Buffer(value.tensor, order.size)
        self.moved(value, value.position[order], np.arange(order.size), target, layer or value.tensor, "layout")
        return Value(value.tensor, value.shape, order, target)

    def moved(
        self,
        value: Value,
        source: NDArray[np.int64],
        places: NDArray[np.int64],
        target: Buffer,
        layer: str,
        operator: str,
    ) -> None:
        """Copy integers from places of one buffer to places (in rising order) of another."""
        if not source.size:
            return
        found = loops(source, places)
        read, write = (value.buffer, int(source[0])), (target, int(places[0]))
        if found is not None:
            self.emit(Step("copy", layer, operator, (read,), write, ("loops_t", loop_fields(found))))
            return
        if not np.array_equal(places, np.arange(places[0], places[0] + places.size)):
            raise EmbeddedError(
                f"{operator} '{layer}' writes in no order that C source has", "leave it out of the model"
            )
        index = np.uint16 if value.buffer.size <= 1 << 16 else np.uint32
        array = self.array(f"{layer}_from", source.astype(index))
        self.emit(Step("gather", layer, operator, ((value.buffer, 0),), write, None, (source.size, array)))

    def rescaling(
        self, multiplier: Sequence[int], shift: Sequence[int], rounding: str, largest: int, name: str
    ) -> list[int]:
        """Return shifts as C has them, once a product of the largest accumulator is known to fit.

        Raises:
            EmbeddedError: If a product may leave 62 bits.
        """
        bits = self.sidecar.target.multiplier.bits
        point = bits - 1 if rounding == "double" else 0
        left = max(point - min(shift), 0)
        if largest * max(abs(m) for m in multiplier) << left >= WIDEST_PRODUCT:
            raise EmbeddedError(
                f"a product of the accumulator and the multiplier of '{name}' may leave 63 bits",
                "choose --multiplier-bits 16",
            )
        results = max(largest * abs(m) * 2.0**-n for m, n in zip(multiplier, shift, strict=True))
        self.wide_results = self.wide_results or results >= NARROW_RESULT
        self.roundings.add(rounding)
        self.left = self.left or (rounding != "double" and min(shift) <= 0)
        return [min(one, 63) for one in shift]

    def grid(self, name: str) -> tuple[int, int]:
        """Return the ends of a tensor's grid."""
        return self.tensor(name).qmin, self.tensor(name).qmax

    def furthest(self, name: str) -> int:
        """Return how far an integer of a tensor may lie from its zero point."""
        entry = self.tensor(name)
        return max(max(entry.qmax - z, z - entry.qmin) for z in entry.zero_point)


def loop_fields(found: Loops) -> dict[str, Any]:
    """Return loops as the fields of ``loops_t``."""
    return {"size": list(found.size), "a": list(found.a), "b": list(found.b)}
