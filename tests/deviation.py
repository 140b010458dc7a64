"""How far a quantized model may end from float, and two runs of it from each other, derived element by element.

Three runs of each model are compared: the float model, and the quantized one in ONNX Runtime with all its fusions and with none.
How far they may lie apart is derived, element by element, and follows the model from its input on (`Deviation`):

* from float: half a step wherever a tensor, a weight or a bias is rounded, carried through every operator that follows;
* between the two runs: nothing but rounding can differ, since integers are exact and the reals before rounding differ only in
  float32 noise: one step where a layer rounds (a tie may go either way), carried on in the same way, and nothing where integers
  only move. A tie needs an exact value within float32 noise of one, so few elements may differ at all.

The bounds are worst cases: a mean over 64 values hides a step of its own in them, which the comparison with the integer executor
(tests/integer) does not let pass. They follow from the plan's own scales, so they cannot see a scale that is too wide; a floor for
the SQNR does that: a tensor of 8 bits that is uniform over its range has 6.02·8 = 48 dB, a normal one that fills its range at 3 to
4 sigma about 10 dB less, and the roundings of up to four tensors and a weight on the way to the output cost up to 7 dB more. 25 dB
leave 6 dB for data that fills its range badly; one bit too few in any place costs 6 dB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from quantcli.plan import Plan
from quantcli.probe import with_outputs
from quantcli.rules import RULES, Arithmetic, Operand
from tests.graphs import Array
from tests.operators import Feeds, ran

SQNR_FLOOR = 25.0
# Float32 noise where a real is rounded: of up to 256 steps, after some hundred additions, each off by 2^-24 of the sum of
# magnitudes (up to eight times the result here): 2^8 · 2^7 · 2^-24 · 2^3 = 2^-6 of a step at the very worst.
NOISE = 2.0**-6
# How many elements may lie on a tie: noise is typically 2^-12 of a step (the square roots of the figures above), a tie can be
# missed from both sides, and up to four layers round: 4 · 2 · 2^-12, two in a thousand. One element may always, of small outputs.
TIES = 0.002
# The mean bound, as a part of the span of the values that it bounds: above, nothing would be tested.
LOOSEST = 0.1

# What an error in the input becomes at most: the largest slope; of softmax, half the largest error (its Jacobian diag(p) − p·pᵀ has
# row sums of magnitudes of 2p(1−p) ≤ 1/2); of x·clip(x/6 + 1/2, 0, 1), 3/2, at x = 3.
SLOPES: dict[str, Callable[[dict[str, float]], float]] = {
    "Relu": lambda _: 1.0,
    "Clip": lambda _: 1.0,
    "LeakyRelu": lambda a: max(1.0, abs(a.get("alpha", 0.01))),
    "HardSwish": lambda _: 1.5,
    "HardSigmoid": lambda a: a.get("alpha", 0.2),
    "Sigmoid": lambda _: 0.25,
    "Tanh": lambda _: 1.0,
    "Softmax": lambda _: 0.5,
}
BILINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Mul"}


class Deviation:
    """How far every tensor of a folded model can lie from what it should be, element by element.

    Args:
        folded: The float model as it was planned.
        plan: Its plan.
        feeds: The inputs.
        around: None to compare with the float model. To compare two runs of the quantized model, how far those lie from float:
            constants are the same then, and a layer's rounding may go either way, a whole step instead of half of one.
    """

    def __init__(self, folded: ir.Model, plan: Plan, feeds: Feeds, around: Feeds | None = None) -> None:
        self.plan, self.ties = plan, around is not None
        proto = ir.to_proto(folded)
        self.opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
        constants = {entry.name: np.array(numpy_helper.to_array(entry)) for entry in proto.graph.initializer}
        names = [name for n in proto.graph.node for name in n.output]
        self.values = {**feeds, **constants, **ran(only_bytes(with_outputs(folded, names)), feeds, names)}
        self.magnitudes = {n: np.asarray(np.abs(v) + (around or {}).get(n, 0), v.dtype) for n, v in self.values.items()}
        self.bounds = {
            name: self.rounding(name, np.zeros_like(values)) for name, values in (*feeds.items(), *constants.items())
        }
        operators = {name: layer for layer in plan.layers for name in layer.outputs}
        for n in proto.graph.node:
            if n.op_type not in RULES:  # indices: the same in every run
                continue
            carried = dict(zip(n.output, self.carried(n), strict=True))
            for name, bound in carried.items():
                exact = name in operators and operators[name].arithmetic is Arithmetic.MOVE and not interpolates(n)
                self.bounds[name] = bound if exact else self.rounding(name, bound, output=True)

    def rounding(self, name: str, carried: Array, *, output: bool = False) -> Array:
        """Return a bound with what rounding adds to it: half a step (a whole one at the end of a fixed range), or a tie."""
        tensor = self.plan.tensors.get(name)
        if tensor is None or carried.dtype != np.float32 or (self.ties and not output):
            return carried
        shape = [1] * carried.ndim
        if tensor.axis is not None:
            shape[tensor.axis] = -1
        step = np.array(tensor.scale, dtype=np.float64).reshape(shape)
        rule = next((RULES[layer.operator] for layer in self.plan.layers if name in layer.outputs), None)
        steps = 1.0 if self.ties or (rule is not None and rule.output is Operand.FIXED) else 0.5
        return np.asarray(carried + step * (steps + NOISE * output), dtype=np.float32)

    def carried(self, n: onnx.NodeProto) -> list[Array]:
        """Return what the deviations of an operator's operands become in its outputs."""
        exact, off, plain = ([of.get(name) for name in n.input] for of in (self.magnitudes, self.bounds, self.values))
        attributes = {a.name: helper.get_attribute_value(a) for a in n.attribute}
        if n.op_type in BILINEAR:
            rest = [np.zeros_like(v) for v in exact[2:] if v is not None]
            wider = np.asarray(exact[1] + off[1], dtype=np.float32)  # type: ignore[operator]
            return [self.run(n, [exact[0], *off[1:]])[0] + self.run(n, [off[0], wider, *rest])[0]]
        if n.op_type in {"Add", "Sub"}:
            return [np.asarray(off[0] + off[1])]  # type: ignore[operator]
        if n.op_type in SLOPES:
            bound = np.asarray(off[0])
            worst = np.full_like(bound, bound.max()) if n.op_type == "Softmax" else bound
            return [worst * np.float32(SLOPES[n.op_type](attributes))]
        if n.op_type in {"Max", "Min"}:
            return [np.maximum(off[0], off[1])]  # type: ignore[arg-type]
        if n.op_type == "PRelu":
            return [np.asarray(off[0] * np.maximum(1, np.abs(exact[1])))]  # type: ignore[arg-type,operator]
        # What is left moves values, or takes means, sums or maxima: with no weight below zero an operator bounds itself.
        data = len(n.input) if RULES[n.op_type].variadic else 1
        return self.run(n, off[:data] + plain[data:])

    def run(self, n: onnx.NodeProto, operands: Sequence[Array | None]) -> list[Array]:
        """Run one operator by itself."""
        feeds = {
            name: v for name, v in zip([f"i{k}" for k in range(len(operands))], operands, strict=True) if v is not None
        }
        copy = onnx.NodeProto()
        copy.CopyFrom(n)
        del copy.input[:]
        copy.input.extend(f"i{k}" if v is not None else "" for k, v in enumerate(operands))
        graph = helper.make_graph(
            [copy],
            "one",
            [
                helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                for k, v in feeds.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in n.output],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return list(ran(model.SerializeToString(), feeds, list(n.output)).values())


def interpolates(n: onnx.NodeProto) -> bool:
    return n.op_type == "Resize" and any(a.name == "mode" and a.s == b"linear" for a in n.attribute)


def only_bytes(model: object) -> bytes:
    """What is below 2 GB is bytes."""
    assert isinstance(model, bytes)
    return model
