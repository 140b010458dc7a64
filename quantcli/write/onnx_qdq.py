"""Write ONNX with QuantizeLinear/DequantizeLinear: integers for the constants, a pair behind every quantized activation.

An activation that an integer layer makes is rounded for all that read it; one that comes from a model input, from an operator that
stays float or from a layer whose output stays real is rounded for the integer layers that read it, and for nobody else.

Names: inputs, outputs and every tensor that still exists keep theirs. Around a quantized tensor ``t`` stand ``t_quantized`` (the
integers) and ``t_dequantized`` (what its readers get); of a graph output ``t`` that is rounded for all, the readers' side is ``t``
itself, and what is computed before rounding is ``t_unrounded``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir

from quantcli.bodies import BODIES
from quantcli.fold import add_constant
from quantcli.integer_operators import MICROSOFT
from quantcli.placement import ACTIVATIONS
from quantcli.rules import Arithmetic
from quantcli.write.integers import move_integers, quantizer_of
from quantcli.write.onnx_dynamic import DynamicProducts

if TYPE_CHECKING:
    from quantcli.arithmetic.blocks import Blocks
    from quantcli.plan import LayerPlan, Plan, TensorPlan
    from quantcli.quantize import QuantizedModel


# What ends the name of a Max that keeps a float operator float, and of what it gives.
FENCE = "_float"
# What ends the name of the integers that a lookup gives.
LOOKED_UP = "_looked_up"
# What ends the name of a Clip that keeps reals on a narrow grid.
ON_GRID = "_on_grid"
ENDS = ("_lowest", "_highest")
# What ends the name of integers of 8 bits before a Clip keeps them within fewer.
SATURATED = "_saturated"
# What ends the name of a weight's integers as floats (`quantcli.write.onnx_stored`).
UNSCALED = "_unscaled"
# The finest steps of a softmax's output that ONNX Runtime's integer kernel can do, per value that it spreads over; below e^5.
SHARES_PER_VALUE = 128
SUFFIXES = (
    "_quantized",
    "_dequantized",
    "_unrounded",
    "_scale",
    "_zero_point",
    "_transposed",
    FENCE,
    LOOKED_UP,
    ON_GRID,
    SATURATED,
    UNSCALED,
    *ENDS,
)


def write(quantized: QuantizedModel) -> ir.Model:
    """Return the quantized model as ONNX in QDQ form."""
    model = quantized.model.clone()
    model.producer_name, model.producer_version = "quantcli", ""
    Writer(quantized, model.graph).write()
    if any(node.domain == MICROSOFT for node in model.graph):
        model.opset_imports[MICROSOFT] = 1
    return model


def tensor_names(quantized: QuantizedModel) -> dict[str, dict[str, str]]:
    """Return for every planned tensor the names of its integers and of its dequantized reals in the written model."""
    outputs = {value.name for value in quantized.model.graph.outputs} & quantized.plan.made
    mark = free_mark(quantized)
    return {
        name: {
            "integers": f"{name}_quantized{mark}",
            "reals": name if name in outputs else f"{name}_dequantized{mark}",
            "scale": f"{name}_scale{mark}",
            "zero_point": f"{name}_zero_point{mark}",
        }
        for name in quantized.plan.tensors
    }


def free_mark(quantized: QuantizedModel) -> str:
    """Return what the names that we add end with, so that none is taken: nothing, or underscores."""
    graph = quantized.model.graph
    taken = {value.name for node in graph.all_nodes() for value in node.outputs}
    taken |= {*graph.initializers, *(value.name for value in graph.inputs)}
    mark = ""
    names = {*quantized.plan.tensors, *(name for layer in quantized.plan.layers for name in layer.outputs)}
    while any(f"{name}{suffix}{mark}" in taken for name in names for suffix in SUFFIXES):
        mark += "_"
    return mark


class Writer:
    """One graph being rewritten."""

    def __init__(self, quantized: QuantizedModel, graph: ir.Graph) -> None:
        self.quantized = quantized
        self.plan = quantized.plan
        self.graph = graph
        self.names = tensor_names(quantized)
        self.mark = free_mark(quantized)
        self.nodes = {str(node.name): node for node in graph}
        stored = {layer.name for layer in self.plan.layers if layer.arithmetic is Arithmetic.STORED}
        self.floats = {layer.name for layer in self.plan.floats} | stored
        self.layers = {layer.name for layer in self.plan.layers} - stored
        self.constants: dict[str, ir.Value] = {}
        self.dynamic = DynamicProducts(graph, self.mark)
        self.stored: dict[str, ir.Value] = {}
        self.parameters: dict[str, tuple[ir.Value, ir.Value | None]] = {}
        self.within = bounds_of_integers(self.plan)

    def write(self) -> None:
        """Rewrite the graph."""
        for layer in self.plan.layers:
            self.drop_absorbed(layer)
        for layer in self.plan.layers:
            if layer.arithmetic is Arithmetic.LOOKUP:
                self.look_up(layer)
            elif layer.arithmetic is Arithmetic.DYNAMIC:
                tensors = [self.plan.tensors[name] for name in layer.inputs]
                weights = [(self.stored_constant(tensor), tensor) for tensor in tensors]
                if layer.operator == "LSTM":
                    self.dynamic.recur(self.nodes[layer.name], weights)
                else:
                    self.dynamic.rewrite(self.nodes[layer.name], *weights[0])
            else:
                self.quantize_constants(layer)
        self.share_with_bodies()
        values = {str(value.name): value for value in self.graph.inputs}
        values.update({str(value.name): value for node in self.graph for value in node.outputs})
        for name, tensor in self.plan.tensors.items():
            if tensor.role == "activation":
                self.quantize_activation(tensor, values[name])
        self.keep_apart()
        self.move_integers()
        used = {value for node in self.graph.all_nodes() for value in node.inputs if value is not None}
        for name, value in list(self.graph.initializers.items()):
            if value not in used and not value.is_graph_output():
                del self.graph.initializers[name]

    def keep_apart(self) -> None:
        """Put something between float operators that the runtime would fuse into a slower one."""
        pairs = {tuple(pair) for pair in self.plan.target.placement.apart}
        for node in list(self.graph):
            value = node.inputs[0] if node.inputs else None
            producer = value.producer() if value is not None else None
            if (
                value is not None
                and producer is not None
                and (producer.op_type, node.op_type) in pairs
                and {str(producer.name), str(node.name)} <= self.floats
            ):
                self.fence(producer, value, node)

    def move_integers(self) -> None:
        """Let operators work on integers directly that the runtime would not find between Q/DQ."""
        for layer in self.plan.layers:
            narrow = self.plan.tensors[layer.inputs[0]].integer.dtype.itemsize == 1
            if layer.operator in self.plan.target.placement.direct and layer.arithmetic is Arithmetic.MOVE and narrow:
                node = self.nodes[layer.name]
                target = quantizer_of(node.outputs[0])
                if target is not None:
                    move_integers(node, [target])

    def drop_absorbed(self, layer: LayerPlan) -> None:
        """Remove activations that saturation, or a Clip of integers, does: those behind a layer whose clamp is its whole grid."""
        if layer.clamp is None:
            return
        grid = self.plan.tensors[layer.outputs[0]].integer
        if layer.clamp != (grid.qmin, grid.qmax) and layer.outputs[0] not in self.within:
            return
        for name in layer.absorbed:
            node = self.nodes[name]
            before, after = node.inputs[0], node.outputs[0]
            assert before is not None  # noqa: S101 - a Relu or Clip without an operand has no rule
            kept, shape, dtype = after.name, after.shape, after.type
            ir.convenience.replace_all_uses_with(after, before, replace_graph_outputs=True)
            self.graph.remove(node, safe=True)
            before.name, before.shape, before.type = kept, shape, dtype

    def quantize_constants(self, layer: LayerPlan) -> None:
        """Put integers and a DequantizeLinear in place of a layer's weight, bias and constant operands."""
        node = self.nodes[layer.name]
        for position, value in enumerate(node.inputs):
            name = value.name if value is not None else None
            tensor = self.plan.tensors.get(name) if name is not None else None
            if tensor is None or tensor.role == "activation" or value is None or not value.is_initializer():
                continue
            node.replace_input_with(position, self.dequantized_constant(tensor, node))

    def look_up(self, layer: LayerPlan) -> None:
        """Let a lookup give integers of the stored table, and dequantize those."""
        node, tensor = self.nodes[layer.name], self.plan.tensors[layer.inputs[0]]
        node.replace_input_with(0, self.stored_constant(tensor))
        value = node.outputs[0]
        scale, zero_point = self.parameter_values(tensor)
        # The table's columns stand last, in the table and in what is looked up.
        rank = len(value.shape) if value.shape is not None else 0
        attributes = {"axis": rank - 1 if rank else -1} if tensor.axis is not None else {}
        to_real = ir.node(
            "DequantizeLinear", [value, scale, zero_point], attributes, name=f"{layer.name}_DequantizeLinear"
        )
        to_real.outputs[0].shape, to_real.outputs[0].type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, to_real.outputs[0], replace_graph_outputs=True)
        to_real.replace_input_with(0, value)
        to_real.outputs[0].name, value.name = value.name, f"{value.name}{LOOKED_UP}{self.mark}"
        value.type = ir.TensorType(ir.DataType.INT8)
        self.graph.insert_after(node, to_real)

    def stored_constant(self, tensor: TensorPlan) -> ir.Value:
        """Return the integers of a constant, registered once; those of 4 bits are packed in pairs."""
        if tensor.name not in self.stored:
            array = self.quantized.constants[tensor.name]
            if tensor.integer.bits == 4 and tensor.blocks is not None:
                array = array.astype(ml_dtypes.int4 if tensor.integer.signed else ml_dtypes.uint4)
            self.stored[tensor.name] = add_constant(self.graph, self.names[tensor.name]["integers"], array)
        return self.stored[tensor.name]

    def share_with_bodies(self) -> None:
        """Let If, Loop and Scan read the reals of a stored weight, where no other operator reads it in float."""
        for name in [name for name in self.stored if self.plan.tensors[name].role == "weight"]:
            value = self.graph.initializers.get(name)
            readers = value.consumers() if value is not None else ()
            if value is None or not readers or value.is_graph_output():
                continue
            if all(node.graph is not self.graph or node.op_type in BODIES for node in readers):
                reals = self.dequantized_constant(self.plan.tensors[name], self.graph[0])
                dequantizer = reals.producer()
                if dequantizer is not None and dequantizer is not self.graph[0]:
                    self.graph.remove(dequantizer)
                    self.graph.insert_before(self.graph[0], dequantizer)
                ir.convenience.replace_all_uses_with(value, reals)

    def dequantized_constant(self, tensor: TensorPlan, reader: ir.Node) -> ir.Value:
        """Return the dequantized value of a constant, made at its first reader."""
        if tensor.name in self.constants:
            return self.constants[tensor.name]
        node = self.dequantize_node(tensor, self.stored_constant(tensor), self.names[tensor.name]["reals"])
        self.graph.insert_before(reader, node)
        self.constants[tensor.name] = node.outputs[0]
        return node.outputs[0]

    def quantize_activation(self, tensor: TensorPlan, value: ir.Value) -> None:
        """Put a QuantizeLinear/DequantizeLinear pair between an activation and all its readers."""
        names = self.names[tensor.name]
        for_all = tensor.name in self.plan.made
        scale, zero_point = self.parameter_values(tensor)
        to_integer = ir.node("QuantizeLinear", [value, scale, zero_point], name=f"{tensor.name}_QuantizeLinear")
        stored, kept = to_integer.outputs[0], self.kept_within(tensor, to_integer)
        stored.name = names["integers"] if kept is None else f"{tensor.name}{SATURATED}{self.mark}"
        to_real = self.dequantize_node(tensor, stored if kept is None else kept.outputs[0], names["reals"])
        onto = self.onto_grid(tensor, value) if kept is None and is_narrow(tensor) else None
        first = to_integer if onto is None else onto
        if onto is not None:
            to_integer.replace_input_with(0, onto.outputs[0])
        if for_all:
            if value.is_graph_output():
                to_real.outputs[0].shape, to_real.outputs[0].type = value.shape, value.type
                value.name = f"{tensor.name}_unrounded{self.mark}"
            ir.convenience.replace_all_uses_with(value, to_real.outputs[0], replace_graph_outputs=True)
            first.replace_input_with(0, value)
        else:
            for node, position in list(value.uses()):
                if str(node.name) in self.layers and node is not first:
                    node.replace_input_with(position, to_real.outputs[0])
        nodes = [node for node in (onto, to_integer, kept, to_real) if node is not None]
        producer = value.producer()
        if producer is not None and (self.may_be_fused(producer) or (for_all and wraps_around(producer, tensor))):
            producer = self.fence(producer, value, first)
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)

    def kept_within(self, tensor: TensorPlan, quantizer: ir.Node) -> ir.Node | None:
        """Return the Clip that keeps a tensor's integers within fewer than their type has; None where saturation does.

        Before the QuantizeLinear, on reals, it would keep ONNX Runtime from finding an integer kernel.
        """
        if tensor.name not in self.within:
            return None
        bounds = [
            add_constant(self.graph, f"{tensor.name}{end}{self.mark}", np.array(bound, dtype=tensor.integer.dtype))
            for end, bound in zip(ENDS, self.within[tensor.name], strict=True)
        ]
        name = self.names[tensor.name]["integers"]
        node = ir.node("Clip", [quantizer.outputs[0], *bounds], name=name)
        node.outputs[0].name = name
        return node

    def onto_grid(self, tensor: TensorPlan, value: ir.Value) -> ir.Node:
        """Return the Clip that keeps reals on a grid narrower than its type, whose saturation would let more through."""
        ends = (np.array([tensor.integer.qmin, tensor.integer.qmax]) - tensor.zero_point[0]) * np.float64(
            tensor.scale[0]
        )
        bounds = [
            add_constant(self.graph, f"{tensor.name}{end}{self.mark}", np.array(bound, dtype=np.float32))
            for end, bound in zip(ENDS, ends, strict=True)
        ]
        name = f"{tensor.name}{ON_GRID}{self.mark}"
        node = ir.node("Clip", [value, *bounds], name=name)
        node.outputs[0].name = name
        return node

    def may_be_fused(self, node: ir.Node) -> bool:
        """Tell whether a float operator that a QuantizeLinear follows has dequantized operands, or stands behind one that has.

        A Relu or Clip between the two does not keep them apart: the runtime takes it away, since the grid saturates.
        """
        if str(node.name) not in self.floats:
            return False
        if any(self.will_be_dequantized(value) for value in node.inputs):
            return True
        before = node.inputs[0].producer() if node.op_type in ACTIVATIONS and node.inputs[0] is not None else None
        return before is not None and self.may_be_fused(before)

    def will_be_dequantized(self, value: ir.Value | None) -> bool:
        """Tell whether a reader gets a value from DequantizeLinear, now or once the writer has come to it."""
        if value is None:
            return False
        producer = value.producer()
        return str(value.name) in self.plan.tensors or (producer is not None and producer.op_type == "DequantizeLinear")

    def fence(self, producer: ir.Node, value: ir.Value, reader: ir.Node) -> ir.Node:
        """Keep an operator that stays float from being fused into an integer kernel, and return the node that does it.

        ONNX Runtime turns whatever stands between DequantizeLinear and QuantizeLinear into integers if it can, quantizing float
        weights by itself. Max of a single operand is the identity, exactly, and no kernel that it fuses or removes.
        """
        node = ir.node("Max", [value], name=f"{value.name}{FENCE}{self.mark}")
        node.outputs[0].name = f"{value.name}{FENCE}{self.mark}"
        self.graph.insert_after(producer, node)
        reader.replace_input_with(0, node.outputs[0])
        return node

    def dequantize_node(self, tensor: TensorPlan, stored: ir.Value, reals: str) -> ir.Node:
        """Return the DequantizeLinear that gives a tensor's reals."""
        scale, zero_point = self.parameter_values(tensor)
        inputs = [stored, scale] if zero_point is None else [stored, scale, zero_point]
        attributes = {"axis": tensor.axis} if tensor.axis is not None else {}
        if tensor.blocks is not None:
            attributes = {"axis": tensor.blocks.axis, "block_size": tensor.blocks.size}
        node = ir.node("DequantizeLinear", inputs, attributes, name=f"{tensor.name}_DequantizeLinear")
        node.outputs[0].name = reals
        return node

    def parameter_values(self, tensor: TensorPlan) -> tuple[ir.Value, ir.Value | None]:
        """Return scale and zero point as constants of the graph, shared by all tensors that share parameters."""
        owner = tensor.same_as or tensor.name
        if owner not in self.parameters and tensor.blocks is not None:
            self.parameters[owner] = self.block_parameters(tensor, tensor.blocks)
        if owner not in self.parameters:
            scale = np.array(tensor.scale, dtype=np.float32)
            zero_point = np.array(tensor.zero_point, dtype=tensor.integer.dtype)
            shape: tuple[int, ...] = () if tensor.axis is None else (-1,)
            self.parameters[owner] = (
                add_constant(self.graph, f"{owner}_scale{self.mark}", scale.reshape(shape)),
                None
                if tensor.role == "bias"
                else add_constant(self.graph, f"{owner}_zero_point{self.mark}", zero_point.reshape(shape)),
            )
        return self.parameters[owner]

    def block_parameters(self, tensor: TensorPlan, blocks: Blocks) -> tuple[ir.Value, ir.Value | None]:
        """Return scales and zero points of a weight in blocks as constants; no zero points where all are zero."""
        scale = add_constant(self.graph, f"{tensor.name}_scale{self.mark}", blocks.scale)
        if tensor.integer.signed:
            return scale, None
        array = blocks.zero_point
        if tensor.integer.bits == 4:
            array = array.astype(ml_dtypes.uint4)
        return scale, add_constant(self.graph, f"{tensor.name}_zero_point{self.mark}", array)


def bounds_of_integers(plan: Plan) -> dict[str, tuple[int, int]]:
    """Return the lowest and highest integers of activations of 8 bits whose type has more, where the runtime clips integers.

    They are those of a grid of fewer bits, or what a Relu or Clip behind a layer lets through.
    """
    found: dict[str, tuple[int, int]] = {}
    if not plan.target.placement.pays:
        return found
    for name, tensor in plan.tensors.items():
        if tensor.role == "activation" and tensor.integer.dtype.itemsize == 1 and is_narrow(tensor):
            found[name] = tensor.integer.qmin, tensor.integer.qmax
    for layer in plan.layers:
        made = plan.tensors.get(layer.outputs[0])
        if layer.clamp is None or made is None or made.same_as is not None or made.integer.dtype.itemsize > 1:
            continue
        if layer.absorbed and layer.clamp != (made.integer.qmin, made.integer.qmax):
            found[layer.outputs[0]] = layer.clamp
    return found


def wraps_around(node: ir.Node, tensor: TensorPlan) -> bool:
    """Tell whether ONNX Runtime's integer kernel of a softmax would give nonsense on a grid, so that its float one is to be kept.

    QLinearSoftmax multiplies exponentials by 1/S_y in 32 bits. Those of 8-bit integers reach 2^32 / (e^5 · length) (1.31).
    """
    if node.op_type != "Softmax" or tensor.integer.dtype.itemsize > 1:
        return False
    shape = node.outputs[0].shape
    length = shape[node.attributes.get_int("axis", -1)] if shape is not None else None
    return 1 / tensor.scale[0] > SHARES_PER_VALUE * (length if isinstance(length, int) else 1)


def is_narrow(tensor: TensorPlan) -> bool:
    """Tell whether an activation's grid is narrower than its type, and its values are not on it already."""
    return tensor.same_as is None and tensor.integer.bits < 8 * tensor.integer.dtype.itemsize
