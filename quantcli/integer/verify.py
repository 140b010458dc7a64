"""Verify: does the sidecar tell the truth about the model, and do its integers compute what the runtime computes?

Four questions, each answered for every layer: do the files carry the digests that the sidecar states; are scales, zero points and
constants those of the model; are multipliers, shifts, tables and clamps what the scales make them; and does the executor give the
integers that ONNX Runtime gives, layer by layer from identical integers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.hooks.onnxruntime import Runner
from quantcli.arithmetic.affine import IntegerType, quantize
from quantcli.arithmetic.fixed_point import headroom_multipliers, headroom_of, signed_fixed_point, summed_fixed_point
from quantcli.arithmetic.tables import exponentials, table
from quantcli.integer.exact import FLOAT32_ERROR, exact, function_parameters
from quantcli.integer.executor import Executor, is_fence, quantized
from quantcli.integer.expand import quantizer_before
from quantcli.integer.layer import IntegerError, Layer, multiplier_bits
from quantcli.integer.layers import centred_magnitudes, real_output, run_layer, terms_of
from quantcli.integer.stated import (
    Finding,
    differences,
    digest_findings,
    order_findings,
    reader_of,
    tensor_findings,
    unknown_tensors,
)
from quantcli.probe import with_outputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec
    from quantcli.integer.held import Held
    from quantcli.sidecar import LayerEntry, MultiplierEntry, Sidecar, TensorEntry


@dataclass
class Verification:
    """What was compared.

    Attributes:
        findings: Everything that differs without an explanation.
        names: The layers that were run.
        elements: How many integers were compared.
        ties: How many of them differ by one where the real value lies on a rounding tie, or the recorded rounding gives the other.
        islands: How many nodes of each operator that stays float were bridged.
    """

    findings: list[Finding] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    elements: int = 0
    ties: int = 0
    islands: Counter[str] = field(default_factory=Counter)

    @property
    def layers(self) -> int:
        """How many layers were run."""
        return len(self.names)


def verify(held: Held, sidecar: Sidecar, batches: Iterable[dict[str, NDArray[Any]]]) -> Verification:
    """Verify a quantized model against its sidecar.

    Args:
        held: The quantized model.
        sidecar: Its sidecar.
        batches: Inputs by name.
    """
    result, graph = Verification(), held.model
    result.findings.extend(digest_findings(held, sidecar))
    executor = Executor(graph, sidecar)
    result.findings.extend(tensor_findings(executor))
    result.findings.extend(layer_findings(executor))
    result.findings.extend(order_findings(executor))
    if unknown_tensors(executor):
        return result
    for entry in sidecar.layers:
        if entry.arithmetic == "stored":
            result.names.add(entry.name)
            result.elements += sum(executor.stored[sidecar.tensors[name].integers].size for name in entry.inputs)
    given = {value.name for value in graph.graph.inputs}
    asked = [tensor.integers for tensor in sidecar.tensors.values() if tensor.role == "activation"]
    asked += [name for name in reals_of(sidecar) if name not in given]
    exact = sidecar.target.weight.pair_bits is None
    runner = Runner(with_outputs(graph, asked), what="the quantized model", exact=exact)
    for feeds in batches:
        compare(executor, feeds, runner.run(feeds, asked), result)
    result.islands = executor.islands
    return result


def reals_of(sidecar: Sidecar) -> list[str]:
    """Return the real tensors that are compared: what layers give as reals, and what is quantized only for some that read it."""
    made = {name for entry in sidecar.layers if entry.accumulator_scale is None for name in entry.outputs}
    rounded = [name for name, tensor in sidecar.tensors.items() if tensor.role == "activation" and name not in made]
    given = [
        name
        for entry in sidecar.layers
        if entry.accumulator_scale is not None and entry.arithmetic != "stored"
        for name in entry.outputs
    ]
    return list(dict.fromkeys([*rounded, *given]))


def layer_findings(executor: Executor) -> Iterator[Finding]:
    """Compare multipliers, shifts, clamps and tables with what the scales make them, and layers with the model's operators."""
    sidecar = executor.sidecar
    yield from unnamed_findings(executor)
    for entry in sidecar.layers:
        node = executor.nodes.get(entry.name)
        if node is None or node.op_type != entry.operator:
            yield Finding(entry.name, f"the model has no operator {entry.operator} of that name")
            continue
        if entry.arithmetic == "stored":  # its weights' integers and scales are all there is
            continue
        stated = sidecar.target.multiplier.rounding_of(entry.operator)
        if entry.rounding != stated:
            yield Finding(entry.name, f"the rounding is {entry.rounding}, its target's is {stated}")
        for multiplier in entry.multipliers:
            yield from multiplier_findings(executor, entry, multiplier, node)
        if entry.accumulator_scale is not None:
            yield from real_findings(entry, sidecar)
            continue
        lowest, highest = expected_clamp(executor, entry)
        if entry.clamp is None or tuple(entry.clamp) != (lowest, highest):
            yield Finding(
                entry.name, f"the clamp is {list(entry.clamp or ())}, its activation makes it {[lowest, highest]}"
            )
        if entry.table is not None:
            expected = expected_table(executor, entry, node)
            if expected != entry.table:
                index = next((i for i, (a, b) in enumerate(zip(expected, entry.table, strict=False)) if a != b), -1)
                yield Finding(entry.name, f"the table is not that of its function, first at index {index}")


def unnamed_findings(executor: Executor) -> Iterator[Finding]:
    """Find operators that give integers of the sidecar, or multiply them, and are neither layers nor said to stay float.

    Shape arithmetic and conditions, which are neither either, do no such thing.
    """
    sidecar = executor.sidecar
    floats = {entry.name for entry in sidecar.float_layers}
    for node in executor.order:
        name, multiplies = str(node.name), node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"}
        touched = [*node.outputs, *(node.inputs if multiplies else ())]
        named = any(value is not None and value.name in sidecar.tensors for value in touched)
        if named and name not in executor.entries and name not in floats and not is_fence(node):
            yield Finding(
                name, f"the sidecar has {node.op_type} neither among its layers nor among those that stay float"
            )


def real_findings(entry: LayerEntry, sidecar: Sidecar) -> Iterator[Finding]:
    """Compare the scale of an accumulator with the product of the operands' scales, in float32."""
    scales = [np.array(sidecar.tensors[name].scale, dtype=np.float32) for name in entry.inputs[:2]]
    expected = scales[0] if entry.arithmetic == "lookup" else scales[0] * scales[1]
    for finding in differences(entry.name, "accumulator_scale", expected, entry.accumulator_scale or []):
        yield Finding(entry.name, finding.what.replace("in the model", "from the scales"))
    if entry.clamp is not None or entry.multipliers:
        yield Finding(entry.name, "its output stays real, and it has a clamp or multipliers")


def multiplier_findings(
    executor: Executor, entry: LayerEntry, multiplier: MultiplierEntry, node: ir.Node
) -> Iterator[Finding]:
    """Compare M0 and n with the quotient of the scales, of PRelu times its slopes."""
    sidecar = executor.sidecar
    output, bits = sidecar.tensors[entry.outputs[0]].scale[0], multiplier_bits(sidecar, entry)
    operands = [sidecar.tensors[name] for name in entry.inputs]
    types = [tensor.dtype for tensor in operands]
    if entry.arithmetic == "sum" and entry.multipliers[-1].operand is None:
        a, b = (tensor.scale[0] for tensor in operands)
        real = np.array([headroom_multipliers(a, b, output, headroom_of(*types))[entry.multipliers.index(multiplier)]])
    elif entry.operator == "PRelu" and multiplier.operand is None:
        slopes = executor.stored.get(str(node.inputs[1].name)) if node.inputs[1] is not None else None
        if slopes is None:
            yield Finding(entry.name, "the model does not hold its slopes")
            return
        real = slopes.astype(np.float64).reshape(-1) * operands[0].scale[0] / output
    elif multiplier.operand is None:
        x, w = (np.array(tensor.scale, dtype=np.float64) for tensor in operands[:2])
        real = x * w / output
    else:
        real = np.array(sidecar.tensors[multiplier.operand].scale, dtype=np.float64) / output
    if entry.arithmetic == "sum" and multiplier.operand in entry.inputs and entry.multipliers[-1].operand is not None:
        reals = [np.array(tensor.scale, dtype=np.float64) / output for tensor in operands]
        m0, n = summed_fixed_point(reals, bits, *types)[entry.inputs.index(multiplier.operand)]
    else:
        m0, n = signed_fixed_point(real, bits)
    for what, held, stated in (
        ("multiplier", m0, multiplier.multiplier),
        ("shift", n, multiplier.shift),
        ("real", real, multiplier.real),
    ):
        for finding in differences(entry.name, what, held, stated):
            yield Finding(entry.name, finding.what.replace("in the model", "from the scales"))


def expected_clamp(executor: Executor, entry: LayerEntry) -> tuple[int, int]:
    """Return the grid, narrowed by the absorbed activations that are still in the model, or by the Clip of integers in their place.

    Those that are not there do nothing more than saturation does.
    """
    output = executor.sidecar.tensors[entry.outputs[0]]
    lowest, highest = output.qmin, output.qmax
    kept = executor.nodes.get(output.integers)
    if kept is not None and quantizer_before(kept) is not None:
        low, high = clip_bounds(executor, kept)
        lowest, highest = int(max(lowest, low)), int(min(highest, high))
    for name in entry.absorbed:
        node = executor.nodes.get(name)
        if node is None:
            continue
        bounds = [0.0, np.inf] if node.op_type == "Relu" else clip_bounds(executor, node)
        finite = np.clip(np.array(bounds, dtype=np.float64), -3.0e38, 3.0e38)
        low, high = quantized(output, finite).tolist()
        lowest, highest = max(lowest, low), min(highest, high)
    return lowest, highest


def clip_bounds(executor: Executor, node: ir.Node) -> list[float]:
    """Return a Clip's constant bounds."""
    bounds = [None if value is None else executor.stored[str(value.name)] for value in (*node.inputs[1:], None, None)][
        :2
    ]
    low, high = (None if bound is None else float(bound.reshape(-1)[0]) for bound in bounds)
    return [-np.inf if low is None else low, np.inf if high is None else high]


def expected_table(executor: Executor, entry: LayerEntry, node: ir.Node) -> list[int]:
    """Return the lookup table, or the exponentials, that the scales and the function make.

    Of the type's whole grid; a narrower one has a part of it.
    """
    x, y = (executor.sidecar.tensors[name] for name in (entry.inputs[0], entry.outputs[0]))
    count = x.qmax - x.qmin + 1
    if entry.arithmetic == "softmax":
        found: list[int] = exponentials((IntegerType(x.dtype), np.float32(x.scale[0])))[:count].tolist()
        return found
    layer = executor.layer(entry, node, {}, dict(executor.stored))
    parameters = function_parameters(layer)
    ends = [(IntegerType(t.dtype), np.float32(t.scale[0]), t.zero_point[0]) for t in (x, y)]
    whole = table(entry.operator, parameters, ends[0], ends[1])
    first = x.qmin - ends[0][0].qmin
    values: list[int] = np.clip(whole[first : first + count], y.qmin, y.qmax).tolist()
    return values


def compare(
    executor: Executor, feeds: dict[str, NDArray[Any]], runtime: dict[str, NDArray[Any]], result: Verification
) -> None:
    """Run every layer from the runtime's own integers and compare what it makes with what the runtime made."""
    sidecar = executor.sidecar
    try:
        _, reals = executor.run_all(feeds)
    except IntegerError as error:
        result.findings.append(Finding("", error.what))
        return
    given = {name: runtime[t.integers] for name, t in sidecar.tensors.items() if t.role == "activation"}
    seen = {**runtime, **feeds}
    for name in reals_of(sidecar):
        if name in given and name in seen:
            compare_edge(sidecar.tensors[name], reader_of(sidecar, name), name, seen[name], given[name], result)
    for entry in sidecar.layers:
        node = executor.nodes.get(entry.name)
        if entry.arithmetic == "stored" or node is None:
            continue
        integers = dict(given)
        layer = executor.layer(entry, node, integers, reals)
        operands = [executor.integer(name, integers, reals) for name in entry.inputs]
        try:
            found = run_layer(layer, operands)
        except (IntegerError, ValueError, IndexError) as error:
            result.findings.append(Finding(entry.name, f"its integers cannot be computed ({error})"))
            continue
        result.names.add(entry.name)
        for name, values in zip(entry.outputs, found, strict=False):
            if entry.accumulator_scale is not None:
                compare_reals(layer, name, operands, values, seen[name], result)
            else:
                compare_output(layer, name, operands, values, given[name], result)


def compare_edge(
    tensor: TensorEntry, layer: str, name: str, reals: NDArray[Any], runtime: NDArray[Any], result: Verification
) -> None:
    """Compare the quantization of a real tensor: equation 5 against the runtime's float32 division."""
    scale, zero_point = np.array(tensor.scale, dtype=np.float32), np.array(tensor.zero_point)
    found = quantize(reals, scale, zero_point, IntegerType(tensor.dtype), None).astype(np.int64)
    found = np.clip(found, tensor.qmin, tensor.qmax)
    steps = reals.astype(np.float64) / tensor.scale[0] + tensor.zero_point[0]
    error = (np.abs(steps) + abs(tensor.zero_point[0]) + 1) * FLOAT32_ERROR
    report(layer, f"tensor '{name}'", found, runtime.astype(np.int64), on_a_tie(steps, error), result)


def compare_output(
    layer: Layer,
    name: str,
    operands: list[NDArray[np.int64]],
    found: NDArray[Any],
    runtime: NDArray[Any],
    result: Verification,
) -> None:
    """Compare a layer's output with the runtime's: equal, or both a rounding of the same real value."""
    ours, theirs = found.astype(np.int64), runtime.astype(np.int64)
    if ours.shape != theirs.shape:
        result.findings.append(
            Finding(layer.entry.name, f"output '{name}' is {list(ours.shape)}, the runtime's {list(theirs.shape)}")
        )
        return
    explained = np.zeros(ours.shape, dtype=bool)
    if (ours != theirs).any() and (reference := exact(layer, operands)) is not None:
        low, high = layer.entry.clamp or (layer.output.qmin, layer.output.qmax)
        values = np.clip(reference.values, low, high)
        nearest = np.abs(theirs - values) <= 0.5 + reference.float_error
        # Means and what a table gives are rounded to nearest whatever is done to products.
        without_products = layer.entry.arithmetic == "mean" or layer.entry.table is not None
        rounding = "single" if without_products else layer.entry.rounding
        explained = nearest & rounding_of(rounding, ours - values, reference.integer_error)
    report(layer.entry.name, f"output '{name}'", ours, theirs, explained, result)


def compare_reals(
    layer: Layer,
    name: str,
    operands: list[NDArray[np.int64]],
    found: NDArray[Any],
    runtime: NDArray[Any],
    result: Verification,
) -> None:
    """Compare an output that stays real with the runtime's.

    Kernels that accumulate integers round twice, the accumulator and its product with the scale. Those that accumulate reals
    round every term and every sum: of K terms the sum is off by at most (K + 4)·2^-24 of the magnitudes' sum (Higham 2002, 3.1).
    """
    entry = layer.entry
    if found.shape != runtime.shape:
        what = f"output '{name}' is {list(found.shape)}, the runtime's {list(runtime.shape)}"
        result.findings.append(Finding(entry.name, what))
        return
    bound = np.abs(found.astype(np.float64)) * FLOAT32_ERROR
    if entry.arithmetic != "lookup":
        magnitudes = real_output(layer, centred_magnitudes(layer, operands)).astype(np.float64)
        depth = terms_of(layer, operands)
        bound = magnitudes * ((depth + 4) * 2.0**-24)
    wrong = ~(np.abs(found.astype(np.float64) - runtime.astype(np.float64)) <= bound)
    result.elements += found.size
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        values = f"{found[index]:.9g} by the sidecar and {runtime[index]:.9g} in the runtime"
        result.findings.append(
            Finding(
                entry.name,
                f"output '{name}', index {list(index)}: {values} ({int(wrong.sum())} of {found.size} differ)",
            )
        )


def rounding_of(rounding: str, distance: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell where an integer, at a distance from the exact value, is what the recorded rounding may make of it."""
    if rounding == "floor":
        return (distance <= error) & (distance >= -1 - error)
    # Rounding twice moves by at most half a unit of the first rounding, which is far below half a step for M < 1.
    slack = 0.5 if rounding == "double" else 0.0
    return np.abs(distance) <= 0.5 + slack + error


def on_a_tie(steps: NDArray[np.float64], error: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell where a real value lies within a distance of the middle between two integers."""
    return np.abs(np.abs(steps - np.floor(steps)) - 0.5) <= error


def report(
    layer: str,
    what: str,
    ours: NDArray[np.int64],
    theirs: NDArray[np.int64],
    explained: NDArray[np.bool_],
    result: Verification,
) -> None:
    """Count a comparison, and record its first difference that has no explanation."""
    differs = ours != theirs
    result.elements += ours.size
    result.ties += int((differs & explained).sum())
    wrong = differs & ~explained
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        values = f"{ours[index]} by the sidecar and {theirs[index]} in the runtime"
        result.findings.append(
            Finding(layer, f"{what}, index {list(index)}: {values} ({int(wrong.sum())} of {ours.size} differ)")
        )


def random_inputs(
    sidecar: Sidecar, inputs: Iterable[InputSpec], samples: int, seed: int, free: int = 1
) -> dict[str, NDArray[Any]]:
    """Return seeded random inputs over the ranges that were calibrated.

    Inputs without a range (indices) are zeros.

    Args:
        sidecar: Where the ranges stand.
        inputs: The inputs.
        samples: The size of the batch, where that is free.
        seed: Of the values.
        free: The size of free axes behind the batch.
    """
    generator = np.random.default_rng(seed)
    feeds = {}
    for spec in inputs:
        shape = [samples if i == 0 and size is None else size or free for i, size in enumerate(spec.shape)]
        tensor = sidecar.tensors.get(spec.name)
        if tensor is None or spec.dtype.kind != "f":
            feeds[spec.name] = np.zeros(shape, dtype=spec.dtype)
        else:
            feeds[spec.name] = generator.uniform(tensor.lo[0], tensor.hi[0], shape).astype(spec.dtype)
    return feeds
