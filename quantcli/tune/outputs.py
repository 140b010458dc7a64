"""Ranges by what they do to the model's outputs: the rest of the model is run with one tensor on the grids that come into question.

What the ends of a range cut off is rare, large, of one sign, and alike in tensors that follow each other; errors of rounding are
none of that. What either does to the outputs depends on every layer between, and is measured here rather than estimated: of the
ranges that observers would give and parts of them, the one that leaves the outputs least noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from calibration.errors import RunError
from calibration.hooks.onnxruntime import Runner
from quantcli.fold import constant
from quantcli.island import captured
from quantcli.probe import unused

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from quantcli.tune.ranges import Grid

    Arrays = dict[str, NDArray[Any]]
    Batches = list[NDArray[Any]]

# Probabilities far below this are all the same.
FAINTEST = 1e-4
PERCENTILES = (99.999, 99.99, 99.9)
# Parts of the best percentile's range that are tried next, each end by itself, as long as they get better.
SHARES = (0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Smaller parts are not tried once one leaves so many times the least noise, or so many in a row no less than it.
HOPELESS, IN_A_ROW = 1.5, 3
# A range that leaves so many times the noise of the best one over as many samples as tell something is not run over the others.
LOSING, TELLING = 1.1, 8
# About how many ranges are tried of a tensor.
TRIES = 7
# A range gives way only to one that leaves this part of its noise, or less.
ENOUGH = 0.99
# Elements that tell the mean error of a tensor's channels, and those that tell its percentiles.
ELEMENTS, RANKED = 1 << 19, 1 << 20
# From this operator set on there is all that rounding takes.
OLDEST_OPSET = 11


def logarithms(expected: Arrays, found: Arrays, steps: Mapping[str, float] | None = None) -> tuple[Arrays, Arrays]:
    """Return outputs to compare; of probabilities their logarithms about their mean.

    Probabilities hide what a model has lost where it is sure of itself, and show little else where it is not.

    Args:
        expected: What the float model gives, by output.
        found: What is compared with it.
        steps: The scales of outputs that are rounded to a grid: what is smaller than a step of it is as good as nothing.
    """
    ours, theirs = {}, {}
    for name, values in expected.items():
        pair = values, found[name]
        if is_distribution(values):
            least = max(FAINTEST, (steps or {}).get(name, 0.0))
            pair = logarithm(pair[0], least), logarithm(pair[1], least)
        ours[name], theirs[name] = pair
    return ours, theirs


def logarithm(probabilities: NDArray[Any], least: float = FAINTEST) -> NDArray[np.float64]:
    """Return the logarithms of probabilities about the mean of their row, those far below ``least`` all the same."""
    found: NDArray[np.float64] = np.log(np.maximum(probabilities, 0.0).astype(np.float64) + least)
    found -= found.mean(axis=-1, keepdims=True)
    return found


def is_distribution(values: NDArray[Any]) -> bool:
    """Tell whether every row along the last axis holds probabilities."""
    if values.dtype.kind != "f" or values.ndim < 2 or values.shape[-1] < 2 or not values.size:
        return False
    return bool(values.min() >= 0) and bool(np.abs(values.sum(axis=-1) - 1).max() < 1e-3)


@dataclass(frozen=True, eq=False)
class Expected:
    """What the float model gives out of a batch, in the form in which it is compared.

    Attributes:
        values: The outputs of real numbers; of probabilities their logarithms.
        probabilities: Which those are.
        signal: Σ of the squares of each.
    """

    values: Arrays
    probabilities: frozenset[str]
    signal: dict[str, float]

    @classmethod
    def of(cls, outputs: Arrays) -> Expected:
        """Return it for the outputs of a batch."""
        real = {name: values for name, values in outputs.items() if values.dtype.kind == "f"}
        values, _ = logarithms(real, real)
        signal = {name: float(np.square(array, dtype=np.float64).sum()) for name, array in values.items()}
        return cls(values, frozenset(name for name, array in real.items() if is_distribution(array)), signal)


class Ahead:
    """The nodes of a model that are still to come, ready to be run with one tensor on a grid.

    Args:
        model: The model; its operator set is 11 or later.
        done: The nodes that were run.
        value: The tensor.
        made: Batches of every tensor that was made and has a reader still to come.
        expected: What the float model gives out, batch by batch: as many as are to be looked at.
        protos: Nodes as they are written, which are kept there for the next tensor.

    Raises:
        RunError: If ONNX Runtime refuses the rest of the model, or that reads what is no tensor.
    """

    def __init__(
        self,
        model: ir.Model,
        done: Collection[ir.Node],
        value: ir.Value,
        made: dict[ir.Value, Batches],
        expected: Sequence[Expected],
        protos: dict[ir.Node, Any] | None = None,
    ) -> None:
        rest = [node for node in model.graph if node not in done]
        inner = {output for node in rest for output in node.outputs}
        read = dict.fromkeys(v for node in rest for v in (*node.inputs, *captured(node)) if v is not None)
        held = {str(v.name): stored for v in read if v not in inner and (stored := constant(v)) is not None}
        taken = {str(v.name) for v in (*read, *inner)}
        self.names = [unused(f"{value.name}_{part}", taken) for part in ("made", "scale", "low", "high", "mean")]
        self.between = [unused(f"{value.name}_step_{number}", taken) for number in range(5)]
        outer = [v for v in read if v not in inner and str(v.name) not in held]
        lacking = next((v for v in outer if v not in made), None)
        if lacking is not None:
            raise RunError(f"there is no '{lacking.name}'")
        given = {str(v.name): made[v] for v in outer}
        self.given = {name: batches for name, batches in given.items() if name != value.name}
        self.given[self.names[0]] = made[value]
        for name, batches in self.given.items():
            if not isinstance(batches[0], np.ndarray):
                raise RunError(f"'{name}' is no tensor")
        self.rank = made[value][0].ndim
        self.outputs = [str(v.name) for v in model.graph.outputs if v in inner and str(v.name) in expected[0].values]
        written = self.written(model, value, rest, held, {} if protos is None else protos)
        self.runner = Runner(written, what="the rest of the model")
        self.samples = [array.shape[0] if array.ndim else 1 for array in made[value]]
        self.expected = expected
        self.signal = np.sum([[batch.signal[name] for name in self.outputs] for batch in expected], axis=0)

    def written(
        self, model: ir.Model, value: ir.Value, rest: list[ir.Node], held: Arrays, protos: dict[ir.Node, Any]
    ) -> bytes:
        """Return the nodes, behind those that put the tensor on its grid, as the bytes of a model of their own."""
        import onnx

        protos.update((node, ir.to_proto(node)) for node in rest if node not in protos)
        plain, scale, low, high, mean = self.names
        steps = self.between
        rounding = [
            onnx.helper.make_node("Div", [plain, scale], [steps[0]]),
            onnx.helper.make_node("Round", [steps[0]], [steps[1]]),
            onnx.helper.make_node("Max", [steps[1], low], [steps[2]]),
            onnx.helper.make_node("Min", [steps[2], high], [steps[3]]),
            onnx.helper.make_node("Mul", [steps[3], scale], [steps[4]]),
            onnx.helper.make_node("Sub", [steps[4], mean], [str(value.name)]),
        ]
        ranks = {name: (int(ir.DataType.from_numpy(some.dtype)), some.ndim) for name, (some, *_) in self.given.items()}
        ranks |= dict.fromkeys((scale, low, high), (int(ir.DataType.FLOAT), 0))
        ranks[mean] = int(ir.DataType.FLOAT), self.rank
        graph = onnx.GraphProto(
            name="rest",
            node=[*rounding, *(protos[node] for node in rest)],
            input=[
                onnx.helper.make_tensor_value_info(name, kind, [None] * rank) for name, (kind, rank) in ranks.items()
            ],
            output=[onnx.ValueInfoProto(name=name) for name in self.outputs],
            initializer=[onnx.numpy_helper.from_array(stored, name) for name, stored in held.items()],
        )
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
        functions = [ir.to_proto(function) for function in model.functions.values()]
        proto = onnx.ModelProto(graph=graph, opset_import=opsets, ir_version=model.ir_version, functions=functions)
        return bytes(proto.SerializeToString())

    def noise(self, grid: Grid, mean: NDArray[np.float32], rival: Sequence[float] = ()) -> list[float]:
        """Return the noise of the outputs as a part of all their signal, averaged over the outputs, after each batch.

        Args:
            grid: The grid that the tensor is put on.
            mean: What is taken from its values then, of as many dimensions as it has.
            rival: The same of another grid: where that wins by far, the rest of the batches is not run.
        """
        low, high = (end - grid.zero_point for end in (grid.integer.qmin, grid.integer.qmax))
        numbers = zip(self.names[1:], (grid.scale, low, high, mean), strict=True)
        fixed = {name: np.asarray(number, dtype=np.float32) for name, number in numbers}
        heard = self.signal > 0
        errors = np.zeros(len(self.outputs))
        course: list[float] = []
        for number, expected in enumerate(self.expected):
            # `ascontiguousarray` makes a number a list of one.
            feeds = {
                n: np.ascontiguousarray(some[number]).reshape(some[number].shape) for n, some in self.given.items()
            }
            found = self.runner.run({**feeds, **fixed})
            found |= {name: logarithm(found[name]) for name in expected.probabilities.intersection(found)}
            errors += [np.square(found[n] - expected.values[n].astype(np.float64)).sum() for n in self.outputs]
            part = float((errors[heard] / self.signal[heard]).mean()) if heard.any() else 0.0
            course.append(part if math.isfinite(part) else math.inf)
            telling = sum(self.samples[: number + 1]) >= TELLING
            if course[-1] == math.inf or (rival and telling and part > LOSING * rival[number]):
                break
        return course


@dataclass(frozen=True, eq=False)
class Channels:
    """Elements of a tensor, channel by channel.

    Attributes:
        real: What the float model gives, (elements, channels).
        made: What the quantized one gives there, (elements, channels).
        shape: That of a number per channel, to be taken from the tensor.
    """

    real: NDArray[np.float32]
    made: NDArray[np.float32]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, real: Sequence[NDArray[np.float32]], made: Sequence[NDArray[np.float32]], axis: int) -> Channels | None:
        """Return elements drawn evenly from batches; None where a tensor has no channels that stay the same."""
        sizes = {array.shape[axis] for array in made} if made[0].ndim > 1 else set()
        if len(sizes) != 1:
            return None
        size = sizes.pop()
        stride = max(1, sum(array.size for array in made) // ELEMENTS)

        def rows(batches: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
            return np.concatenate([np.moveaxis(a, axis, -1).reshape(-1, size)[::stride] for a in batches])

        return cls(rows(real), rows(made), tuple(size if at == axis else 1 for at in range(made[0].ndim)))

    def error(self, grid: Grid) -> NDArray[np.float32]:
        """Return the mean error of every channel on a grid, in the shape in which it can be taken from the tensor."""
        errors: NDArray[np.float64] = (grid.round(self.made) - self.real).mean(axis=0, dtype=np.float64)
        return errors.astype(np.float32).reshape(self.shape)


def range_for_outputs(
    ahead: Ahead,
    every: NDArray[np.float32],
    channels: Channels | None,
    ends: tuple[float, float],
    symmetric: bool,
    grid_of: Callable[[float, float], Grid],
) -> tuple[tuple[float, float], float, float]:
    """Return the range within some ends that leaves the outputs least noise; and the noise of the ends, and of it.

    A tensor's mean error in each channel does not count: the biases of its readers will make up for it (`quantcli.tune.bias`).

    Args:
        ahead: The rest of the model.
        every: What the float model gives of the tensor, as many values as tell its percentiles.
        channels: Elements of it by channel; None where it has no channels.
        ends: The lowest value seen, at most 0, and the highest, at least 0.
        symmetric: Whether only ranges about zero can be had.
        grid_of: Gives the grid of a range.
    """
    nothing = np.zeros((1,) * ahead.rank, dtype=np.float32)
    best, least, leading = ends, math.inf, list[float]()
    known: dict[Grid, float] = {}

    def tried(low: float, high: float) -> float:
        nonlocal best, least, leading
        grid = grid_of(low, high)
        if grid not in known:
            course = ahead.noise(grid, nothing if channels is None else channels.error(grid), leading)
            known[grid] = course[-1]
            if leading and len(course) < len(leading):  # what it would have come to
                there = leading[len(course) - 1]
                known[grid] = least * course[-1] / there if there > 0 else math.inf
            if known[grid] < least:
                best, least, leading = (low, high), known[grid], course
        return known[grid]

    lo, hi = ends
    widest = tried(lo, hi)
    for a, b in np.percentile(every, [(100 - percentile, percentile) for percentile in PERCENTILES]).tolist():
        low, high = max(lo, min(a, 0.0)), min(hi, max(b, 0.0))
        if low < high:
            tried(low, high)
    moves: tuple[tuple[int, ...], ...] = ((0, 1),) if symmetric else tuple((end,) for end in (1, 0) if ends[end] != 0)
    for moved in moves:
        start, worse = best, 0
        for share in SHARES:
            before = least
            low, high = (bound * share if end in moved else bound for end, bound in enumerate(start))
            found = tried(low, high)
            worse = 0 if found < before else worse + 1
            if found > HOPELESS * least or worse >= IN_A_ROW:
                break
    return (best, widest, least) if least <= ENOUGH * widest else (ends, widest, widest)
