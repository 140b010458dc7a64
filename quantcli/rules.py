"""RULES: for each operator, how every operand gets its parameters, and what arithmetic its integers do.

An operand is *own* (parameters from its own statistics), *weight* (a constant, per channel, whose zero point is 0), *bias*
(derived: S_x·S_w), or plain (indices, shapes: not quantized). An output is *own*, *same* as the first operand's, or *fixed* by the
operator. Anything without a row stays float. docs/operators.md is generated from this table.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from quantcli.fold import constant

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import onnx_ir as ir


class Operand(Enum):
    """How an operand or an output gets its parameters."""

    OWN = "own"
    WEIGHT = "weight"
    BIAS = "bias"
    PLAIN = "plain"
    SAME = "same as the first operand"
    FIXED = "fixed"


class Arithmetic(Enum):
    """What a layer does with integers, and so which multipliers it needs (docs/arithmetic.md, section 5)."""

    ACCUMULATE = "accumulate"  # y = M·Σ(x−z_x)(w−z_w) + z_y, M = S_x·S_w/S_y
    PRODUCT = "product"  # y = M·(a−z_a)(b−z_b) + z_y, M = S_a·S_b/S_y
    SUM = "sum"  # y = M_a·(a−z_a) ± M_b·(b−z_b) + z_y, M_i = S_i/S_y
    MEAN = "mean"  # y = (Σ x) / count, at the input's parameters
    RESCALE = "rescale"  # y = M_i·(x−z_i) + z_y, M_i = S_i/S_y (a mean divides by its count first; PRelu has slopes below z_i)
    TABLE = "table"  # y = table[x]
    SOFTMAX = "softmax"  # y = softmax over an axis, output fixed where that is prescribed or given out
    MOVE = "move"  # y = x, elsewhere
    LOOKUP = "lookup"  # rows of a stored table, given as reals
    DYNAMIC = "dynamic"  # y = S_x·S_w·Σ(x−z_x)·w, S_x and z_x found while the model runs
    STORED = "stored"  # a float operator on weights that are stored as integers


# What leads from squares to the root of their mean.
UNDER_ROOTS = frozenset({
    "Add", "Clip", "Div", "Expand", "GlobalAveragePool", "Max", "Mul", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Squeeze",
    "Sub", "Unsqueeze",
})  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One operator's row.

    Attributes:
        arithmetic: What its integers do.
        inputs: How each operand gets its parameters, by position; the last one repeats for variadic operators.
        output: How the output gets its parameters.
        variadic: Whether the last entry of ``inputs`` repeats.
        fixed: The real range of a fixed output.
        weight_axis: The axis of a weight's output channels.
        refuses: Checks that name a reason for staying float.
    """

    arithmetic: Arithmetic
    inputs: tuple[Operand, ...]
    output: Operand = Operand.OWN
    variadic: bool = False
    fixed: tuple[float, float] | None = None
    weight_axis: Callable[[ir.Node], int | None] = field(default=lambda _: None)
    refuses: tuple[Callable[[ir.Node], str | None], ...] = ()

    def operand(self, position: int) -> Operand:
        """Return how the operand at a position gets its parameters."""
        if position < len(self.inputs):
            return self.inputs[position]
        return self.inputs[-1] if self.variadic else Operand.PLAIN

    @property
    def absorbs(self) -> bool:
        """Whether a Relu or Clip behind the operator can become its clamp."""
        return self.arithmetic not in {Arithmetic.TABLE, Arithmetic.SOFTMAX, Arithmetic.MOVE, Arithmetic.LOOKUP}


def conv_axis(node: ir.Node) -> int | None:
    """Return the axis of a convolution's output channels: weights are (M, C/group, kernel…)."""
    del node
    return 0


def conv_transpose_axis(node: ir.Node) -> int | None:
    """Return the axis of a transposed convolution's output channels (C, M/group, kernel…); none of its own in groups."""
    return 1 if node.attributes.get_int("group", 1) == 1 else None


def gemm_axis(node: ir.Node) -> int | None:
    """Return the axis of Gemm's output columns in B."""
    return 0 if node.attributes.get_int("transB", 0) else 1


def matmul_axis(node: ir.Node) -> int | None:
    """Return the axis of MatMul's output columns in a constant matrix B; none for stacks of matrices."""
    matrix = node.inputs[1]
    return 1 if matrix is not None and matrix.shape is not None and len(matrix.shape) == 2 else None


def lookup_axis(node: ir.Node) -> int | None:
    """Return the axis of a table's columns, which stand last in what is looked up; none where rows are not its first axis."""
    table = node.inputs[0]
    flat = table is None or table.shape is None or len(table.shape) < 2 or node.attributes.get_int("axis", 0) != 0
    return None if flat or table is None or table.shape is None else len(table.shape) - 1


def needs_constant_weight(node: ir.Node) -> str | None:
    """Refuse weights that are computed while the model runs."""
    return None if constant(node.inputs[1]) is not None else "its weight is not constant"


def needs_vector_bias(node: ir.Node) -> str | None:
    """Refuse a bias that is computed, or is not one value per output channel."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    bias = constant(node.inputs[2])
    if bias is None:
        return "its bias is not constant"
    return None if (bias.ndim == 1 and bias.size > 1) or bias.size == 1 else "its bias is not one value per channel"


def needs_plain_gemm(node: ir.Node) -> str | None:
    """Refuse Gemm with factors or a transposed first operand that folding could not remove."""
    if node.attributes.get_int("transA", 0):
        return "its first operand is transposed"
    factors = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    return None if factors[0] == 1.0 and (factors[1] == 1.0 or not has_bias) else "alpha or beta is not 1"


def needs_no_root(node: ir.Node) -> str | None:
    """Refuse squares of which a root is taken, as of variances: no grid holds those of small values beside those of large ones."""
    pending = [node.outputs[0]] if node.inputs[0] is node.inputs[1] else []
    seen = set(pending)
    while pending:
        for user in pending.pop().consumers():
            if user.op_type == "Sqrt":
                return "it squares what a root is taken of: no grid holds the squares of small values beside those of large ones"
            fresh = [value for value in user.outputs if user.op_type in UNDER_ROOTS and value not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return None


def needs_single_output(node: ir.Node) -> str | None:
    """Refuse MaxPool that also returns where the maxima were."""
    used = [v for v in node.outputs[1:] if v.uses() or v.is_graph_output()]
    return "its second output is used" if used else None


def needs_agreed_counts(node: ir.Node) -> str | None:
    """Refuse average pools whose windows reach beyond counted padding: ONNX Runtime's kernels divide them differently."""
    beyond = node.attributes.get_int("ceil_mode", 0) and node.attributes.get_int("count_include_pad", 0)
    return "ONNX Runtime's kernels disagree on ceil_mode with count_include_pad" if beyond else None


def needs_no_dilation(node: ir.Node) -> str | None:
    """Refuse dilated average pools, which ONNX Runtime's integer kernel does not know."""
    return "its windows are dilated" if node.attributes.get_ints("dilations", ()) else None


def needs_constant_bounds(node: ir.Node) -> str | None:
    """Refuse Clip whose bounds are computed while the model runs, or are no numbers."""
    bounds = [constant(value) for value in node.inputs[1:] if value is not None]
    if any(bound is None for bound in bounds):
        return "its bounds are not constant"
    return "a bound is not a number" if any(bound is not None and np.isnan(bound).any() for bound in bounds) else None


def needs_interpolation_within(node: ir.Node) -> str | None:
    """Refuse resizing that can leave the range of its input."""
    mode = node.attributes.get_string("mode", "nearest")
    if mode == "cubic":
        return "cubic interpolation leaves the range of its input"
    if node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "it fills what lies outside with a value of its own"
    return None


def needs_zero_padding(node: ir.Node) -> str | None:
    """Refuse constant padding with anything but zero, which every range holds exactly."""
    if node.attributes.get_string("mode", "constant") != "constant" or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    value = constant(node.inputs[2])
    return None if value is not None and not np.any(value) else "it pads with a value other than zero"


# A constant of this size beside data stands for minus infinity.
FILLING = 1e3


def needs_comparable_values(node: ir.Node) -> str | None:
    """Refuse to fill with a constant that lies far from any data, as masks do."""
    for value in node.inputs[1:]:
        held = constant(value)
        if held is not None and held.size and float(np.abs(held).max()) >= FILLING:
            return "it fills with a value far from its data"
    return None


def needs_two_operands(node: ir.Node) -> str | None:
    """Refuse Max and Min of a single operand, which is that operand."""
    return None if len(node.inputs) == 2 else "it has one operand"


def needs_channel_slopes(node: ir.Node) -> str | None:
    """Refuse PRelu whose slopes are computed while the model runs, or are not one value per channel."""
    slopes, x = constant(node.inputs[1]), node.inputs[0]
    if slopes is None:
        return "its slopes are not constant"
    rank = None if x is None or x.shape is None else len(x.shape)
    if rank is None or rank < 2 or slopes.ndim > rank:
        return "the rank of its operand is not known"
    sizes = (1,) * (rank - slopes.ndim) + slopes.shape
    return (
        None if all(size == 1 for axis, size in enumerate(sizes) if axis != 1) else "its slopes are not one per channel"
    )


OWN, WEIGHT, BIAS, SAME, PLAIN = Operand.OWN, Operand.WEIGHT, Operand.BIAS, Operand.SAME, Operand.PLAIN

TABLE_RULE = Rule(Arithmetic.TABLE, (OWN,))
MOVE_RULE = Rule(Arithmetic.MOVE, (OWN,), SAME)
MEAN_RULE = Rule(Arithmetic.RESCALE, (OWN,))

# Operators that look rows up in a stored table: their row where the table is a constant and a runtime gives reals.
LOOKUPS: dict[str, Rule] = {"Gather": Rule(Arithmetic.LOOKUP, (WEIGHT,), weight_axis=lookup_axis)}

# Operators whose weights alone are stored, where a target computes them in float: their rows there.
STORED: dict[str, Rule] = {
    "Conv": Rule(Arithmetic.STORED, (PLAIN, WEIGHT), weight_axis=conv_axis),
    "ConvTranspose": Rule(Arithmetic.STORED, (PLAIN, WEIGHT), weight_axis=conv_transpose_axis),
}

RULES: dict[str, Rule] = {
    "Conv": Rule(
        Arithmetic.ACCUMULATE,
        (OWN, WEIGHT, BIAS),
        weight_axis=conv_axis,
        refuses=(needs_constant_weight, needs_vector_bias),
    ),
    "ConvTranspose": Rule(
        Arithmetic.ACCUMULATE,
        (OWN, WEIGHT, BIAS),
        weight_axis=conv_transpose_axis,
        refuses=(needs_constant_weight, needs_vector_bias),
    ),
    "Gemm": Rule(
        Arithmetic.ACCUMULATE,
        (OWN, WEIGHT, BIAS),
        weight_axis=gemm_axis,
        refuses=(needs_constant_weight, needs_vector_bias, needs_plain_gemm),
    ),
    "MatMul": Rule(Arithmetic.ACCUMULATE, (OWN, WEIGHT), weight_axis=matmul_axis),
    "Add": Rule(Arithmetic.SUM, (OWN, OWN)),
    "Sub": Rule(Arithmetic.SUM, (OWN, OWN)),
    "Mul": Rule(Arithmetic.PRODUCT, (OWN, OWN), refuses=(needs_no_root,)),
    "Relu": TABLE_RULE,
    "Clip": Rule(Arithmetic.TABLE, (OWN,), refuses=(needs_constant_bounds,)),
    **dict.fromkeys(
        ("LeakyRelu", "Gelu", "Softplus", "Softsign", "Mish", "Elu", "Selu", "Celu", "ThresholdedRelu", "Abs"),
        TABLE_RULE,
    ),
    "Erf": Rule(Arithmetic.TABLE, (OWN,), Operand.FIXED, fixed=(-1.0, 1.0)),
    "HardSwish": TABLE_RULE,
    "HardSigmoid": TABLE_RULE,
    "Sigmoid": Rule(Arithmetic.TABLE, (OWN,), Operand.FIXED, fixed=(0.0, 1.0)),
    "Tanh": Rule(Arithmetic.TABLE, (OWN,), Operand.FIXED, fixed=(-1.0, 1.0)),
    "Softmax": Rule(Arithmetic.SOFTMAX, (OWN,), Operand.FIXED, fixed=(0.0, 1.0)),
    "AveragePool": Rule(Arithmetic.RESCALE, (OWN,), refuses=(needs_agreed_counts, needs_no_dilation)),
    "GlobalAveragePool": MEAN_RULE,
    "ReduceMean": MEAN_RULE,
    "ReduceSum": MEAN_RULE,
    "Max": Rule(Arithmetic.RESCALE, (OWN, OWN), refuses=(needs_two_operands,)),
    "Min": Rule(Arithmetic.RESCALE, (OWN, OWN), refuses=(needs_two_operands,)),
    "PRelu": Rule(Arithmetic.RESCALE, (OWN,), refuses=(needs_channel_slopes,)),
    "Where": Rule(Arithmetic.RESCALE, (PLAIN, OWN, OWN), refuses=(needs_comparable_values,)),
    "Concat": Rule(Arithmetic.RESCALE, (OWN,), variadic=True),
    "MaxPool": Rule(Arithmetic.MOVE, (OWN,), SAME, refuses=(needs_single_output,)),
    **dict.fromkeys(
        (
            "Split",
            "Reshape",
            "Flatten",
            "Transpose",
            "Squeeze",
            "Unsqueeze",
            "Slice",
            "Gather",
            "GatherElements",
            "DepthToSpace",
            "SpaceToDepth",
            "Expand",
            "Tile",
            "ReduceMax",
            "ReduceMin",
            "GlobalMaxPool",
        ),
        MOVE_RULE,
    ),
    "Pad": Rule(Arithmetic.MOVE, (OWN,), SAME, refuses=(needs_zero_padding,)),
    "Resize": Rule(Arithmetic.MOVE, (OWN,), SAME, refuses=(needs_interpolation_within,)),
}


def rule_for(node: ir.Node, same_scale: Collection[str] = ()) -> Rule:
    """Return a node's row, as a target has it whose output of some operators shares the parameters of the input.

    Args:
        node: A node of an operator of the table.
        same_scale: Those operators. A mean over windows with counted padding is no mean of its inputs, and keeps its row.
    """
    rule = RULES[node.op_type]
    if node.op_type not in same_scale or rule.arithmetic is not Arithmetic.RESCALE:
        return rule
    padded = node.attributes.get_int("count_include_pad", 0) and any(node.attributes.get_ints("pads", ()))
    return rule if padded else replace(rule, arithmetic=Arithmetic.MEAN, output=SAME)
