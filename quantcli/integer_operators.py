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
    """

    name: str
    domain: str = MICROSOFT
    bias: str | None = None
    output_first: bool = False
    opset: bool = False

    def arranged(self, operands: list[Value], bias: Value | None, output: list[Value]) -> list[Value | None]:
        """Return the inputs in order, of the operands (integers, scale, zero point each), the bias and the output."""
        if self.output_first:
            return [*output, *operands]
        if self.bias == "inner":
            return [*operands, bias, *output]
        return [*operands, *output, *([bias] if bias is not None else [])]

    def taken_apart(self, inputs: list[Value | None]) -> tuple[list[Value | None], Value | None, list[Value | None]]:
        """Return what `arranged` was given."""
        if self.output_first:
            return inputs[2:], None, inputs[:2]
        if self.bias == "inner":
            return inputs[:6], inputs[6], inputs[7:9]
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
# The float operator of each, by domain and name.
FLOAT_OPERATORS = {(entry.domain, entry.name): name for name, entry in INTEGER_OPERATORS.items()}
