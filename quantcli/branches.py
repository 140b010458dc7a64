"""Convolutions of one tensor that are added up become one: W1∗x + W2∗x = (W1 + W2)∗x.

Networks that are trained with branches beside each other and without an activation between (Ding et al. 2021, RepVGG, arXiv
2101.03697; Vasu et al. 2022, MobileOne, arXiv 2206.04040) are run so: small kernels lie within large ones, BatchNorm is a kernel of
one weight per channel, and x itself is one of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantcli.fold import add_constant, constant
from quantcli.load.learned import LEARNED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# 8 bits per channel: a step is the largest weight ÷ 127, and rounding errs by step²/12 in the mean square.
LARGEST = 127
# How much of a sum's mean square rounding may take: 25 dB are left. Sums of random weights, x among them, keep 27 to 47; a
# BatchNorm of hardly any variance makes weights beside which the others are lost (Chu et al. 2022, arXiv 2212.01593).
LOST = 10**-2.5


@dataclass(frozen=True, eq=False)
class Branch:
    """A convolution of a tensor, or the tensor itself.

    Attributes:
        x: What is convolved.
        node: The convolution; None of the tensor itself.
        weight: Of shape (output channels, input channels ÷ groups, *kernel), float64.
        bias: Of shape (output channels,), float64.
        groups: How many groups of channels there are.
        strides: Of each spatial axis.
        dilations: Of each spatial axis.
        begins: The padding before each spatial axis.
        spare: Padding on both sides less what the kernel needs, of each spatial axis: of equal ones the outputs are equally large.
    """

    x: ir.Value
    node: ir.Node | None
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    groups: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    spare: tuple[int, ...]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's size along each spatial axis."""
        return self.weight.shape[2:]


def add_branches(model: ir.Model) -> bool:
    """Make one convolution of those that read one tensor and are added up or taken off each other; tell whether there were any.

    Not of models that were trained prepared, which have learned grids for the branches.
    """
    if any(LEARNED in node.meta for node in model.graph):
        return False
    found = False
    for node in list(model.graph):
        if node.domain == "" and node.op_type in {"Add", "Sub"} and len(node.inputs) == 2:
            found |= add_up(node, model.graph)
    return found


def add_up(node: ir.Node, graph: ir.Graph) -> bool:
    """Replace an Add or Sub of two branches by their convolution; tell whether it was one."""
    first, second = (branch_of(value) for value in node.inputs)
    if first is None and second is not None and node.inputs[0] is second.x:
        first = itself(second)
    if second is None and first is not None and node.inputs[1] is first.x:
        second = itself(first)
    if first is None or second is None or not alike(first, second):
        return False
    summed = together(first, second, -1.0 if node.op_type == "Sub" else 1.0)
    if summed is None:
        return False
    weight, dilations, begins = summed
    if weight.size > first.weight.size + second.weight.size or not keeps(weight):
        return False
    bias = first.bias - second.bias if node.op_type == "Sub" else first.bias + second.bias
    nodes = {branch.weight.size: branch.node for branch in (second, first) if branch.node is not None}
    reach = [(size - 1) * dilation for size, dilation in zip(weight.shape[2:], dilations, strict=True)]
    ends = [spare + far - begin for spare, far, begin in zip(first.spare, reach, begins, strict=True)]
    attributes: dict[str, int | Sequence[int]] = {
        "kernel_shape": weight.shape[2:],
        "strides": first.strides,
        "dilations": dilations,
        "pads": [*begins, *ends],
        "group": gcd(first.groups, second.groups),
    }
    output = node.outputs[0]
    constants = [
        add_constant(graph, f"{output.name}_{role}", values.astype(np.float32))
        for role, values in (("weight", weight), ("bias", bias))
    ]
    layer = ir.node("Conv", [first.x, *constants], attributes, name=nodes[max(nodes)].name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [layer], [output], [layer.outputs[0]])
    graph.remove([branch.node for branch in (first, second) if branch.node is not None], safe=True)
    return True


def branch_of(value: ir.Value | None) -> Branch | None:
    """Return the convolution of constants that makes a tensor which nothing else reads; None where there is none."""
    node = value.producer() if value is not None else None
    if node is None or value is None or node.op_type != "Conv" or node.domain or value.is_graph_output():
        return None
    x, weight = node.inputs[0], constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant(given)
    padding = node.attributes.get_string("auto_pad", "NOTSET")
    if x is None or weight is None or weight.dtype != np.float32 or padding not in {"NOTSET", "VALID"}:
        return None
    if (given is not None and bias is None) or len(value.uses()) != 1 or not np.isfinite(weight).all():
        return None
    axes = weight.ndim - 2
    pads = node.attributes.get_ints("pads", (0,) * (2 * axes)) if padding == "NOTSET" else (0,) * (2 * axes)
    dilations = tuple(node.attributes.get_ints("dilations", (1,) * axes))
    spare = tuple(
        pads[axis] + pads[axis + axes] - (weight.shape[axis + 2] - 1) * dilations[axis] for axis in range(axes)
    )
    return Branch(
        x,
        node,
        weight.astype(np.float64),
        np.zeros(len(weight)) if bias is None else bias.astype(np.float64),
        node.attributes.get_int("group", 1),
        tuple(node.attributes.get_ints("strides", (1,) * axes)),
        dilations,
        tuple(pads[:axes]),
        spare,
    )


def itself(other: Branch) -> Branch:
    """Return the tensor that a branch reads as a branch beside it: one weight of 1 per channel."""
    channels = other.weight.shape[1] * other.groups
    once, none = (1,) * len(other.kernel), (0,) * len(other.kernel)
    weight, bias = np.ones((channels, 1, *once)), np.zeros(channels)
    return Branch(other.x, None, weight, bias, channels, once, once, none, none)


def alike(first: Branch, second: Branch) -> bool:
    """Tell whether one kernel can do what two branches do, whatever the size of their input."""
    dilated = all(
        one == other or 1 in sizes
        for one, other, *sizes in zip(first.dilations, second.dilations, first.kernel, second.kernel, strict=True)
    )
    return (
        first.x is second.x
        and dilated
        and first.weight.shape[0] == second.weight.shape[0]
        and first.strides == second.strides
        and first.spare == second.spare
    )


def together(
    first: Branch, second: Branch, sign: float
) -> tuple[NDArray[np.float64], tuple[int, ...], tuple[int, ...]] | None:
    """Return the sum of two kernels, the second one times a sign, with its dilations and the padding before it.

    None where taps of one lie between those of the other.
    """
    branches, groups = (first, second), gcd(first.groups, second.groups)
    dilations = tuple(
        one if size > 1 else other
        for one, other, size in zip(first.dilations, second.dilations, first.kernel, strict=True)
    )
    begins = tuple(map(max, first.begins, second.begins))
    # Where the taps of a branch begin among those of the sum.
    shifts = [[most - begin for most, begin in zip(begins, branch.begins, strict=True)] for branch in branches]
    if any(shift % dilation for one in shifts for shift, dilation in zip(one, dilations, strict=True)):
        return None
    starts = [[shift // dilation for shift, dilation in zip(one, dilations, strict=True)] for one in shifts]
    kernel = [max(a + m, b + n) for a, m, b, n in zip(starts[0], first.kernel, starts[1], second.kernel, strict=True)]
    channels = first.weight.shape[1] * first.groups
    weight = np.zeros((len(first.weight), channels // groups, *kernel))
    for branch, start, factor in zip(branches, starts, (1.0, sign), strict=True):
        taps = tuple(slice(at, at + size) for at, size in zip(start, branch.kernel, strict=True))
        made, read = len(weight) // branch.groups, channels // branch.groups
        for group in range(branch.groups):
            rows, column = slice(group * made, (group + 1) * made), group * read % (channels // groups)
            weight[(rows, slice(column, column + read), *taps)] += factor * branch.weight[rows]
    return weight, dilations, begins


def keeps(weight: NDArray[np.float64]) -> bool:
    """Tell whether rounding to 8 bits per channel leaves enough of a kernel; a large weight beside many small ones does not."""
    rows = weight.reshape(len(weight), -1)
    steps = np.abs(rows).max(axis=1, initial=0.0) / LARGEST
    return float((np.count_nonzero(rows, axis=1) * steps**2).sum()) / 12 <= LOST * float((rows**2).sum())
