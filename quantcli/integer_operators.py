"""INTEGER_OPERATORS: ONNX's (and ONNX Runtime's) integer counterparts of float operators, and how their operands stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class IntegerOperator:
    """An operator's integer counterpart.

    Attributes:
        name: Its type.
        domain: Its domain; the empty one is ONNX's own.
        bias: Whether it takes a bias: ``last``, before the output's parameters (``inner``), or not at all (None).
        output_first: Whether the output's scale and zero point come before the operands.
        opset: Whether it has an attribute that names the operator set of its float counterpart.
        by_kind: Whether integers, scales and zero points of its operands stand together, not the three of each operand.
    """

    name: str
    domain: str = MICROSOFT
    bias: str | None = None
    output_first: bool = False
    opset: bool = False
    by_kind: bool = False

    def arranged(self, operands: list[Value], bias: Value | None, output: list[Value]) -> list[Value | None]:
        """Return the inputs in order, of the operands (integers, scale, zero point each), the bias and the output."""
        if self.by_kind:
            return [value for kind in range(3) for value in operands[kind::3]]
        if self.output_first:
            return [*output, *operands]
        if self.bias == "inner":
            return [*operands, bias, *output]
        return [*operands, *output, *([bias] if bias is not None else [])]

    def taken_apart(self, inputs: list[Value | None]) -> tuple[list[Value | None], Value | None, list[Value | None]]:
        """Return what `arranged` was given."""
        if self.by_kind:
            return [inputs[position] for position in (0, 2, 4, 1, 3, 5)], None, []
        if self.output_first:
            return inputs[2:], None, inputs[:2]
        if self.bias == "inner":
            return inputs[:6], next(iter(inputs[6:7]), None), inputs[7:9]
        operands = 6 if self.bias == "last" else len(inputs) - 2
        bias = inputs[8] if self.bias == "last" and len(inputs) > 8 else None
        return inputs[:operands], bias, inputs[operands : operands + 2]


INTEGER_OPERATORS: dict[str, IntegerOperator] = {
    "Conv": IntegerOperator("QLinearConv", "", bias="last"),
    "MatMul": IntegerOperator("QLinearMatMul", ""),
    "Gemm": IntegerOperator("QGemm", bias="inner"),
    "Add": IntegerOperator("QLinearAdd"),
    "Mul": IntegerOperator("QLinearMul"),
    "AveragePool": IntegerOperator("QLinearAveragePool"),
    "GlobalAveragePool": IntegerOperator("QLinearGlobalAveragePool"),
    "LeakyRelu": IntegerOperator("QLinearLeakyRelu"),
    "Sigmoid": IntegerOperator("QLinearSigmoid"),
    "Softmax": IntegerOperator("QLinearSoftmax", opset=True),
    "Concat": IntegerOperator("QLinearConcat", output_first=True),
}
# Those that give reals, straight from the accumulator.
REAL_OPERATORS: dict[str, IntegerOperator] = {
    "MatMul": IntegerOperator("MatMulIntegerToFloat", by_kind=True),
    "Gemm": INTEGER_OPERATORS["Gemm"],
}
# The float operator and the entry of each, by domain and name.
FLOAT_OPERATORS = {
    (entry.domain, entry.name): (name, entry)
    for table in (INTEGER_OPERATORS, REAL_OPERATORS)
    for name, entry in table.items()
}
