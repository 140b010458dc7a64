"""Float-preserving rewrites: constants, identities, BatchNorm. Surviving tensors keep their names.

onnx_ir's passes and onnxscript's optimizer and rules do what they know how to do; what is left for quantization's sake (a
BatchNorm that could not be folded, Gemm's factors, biases that several layers share) is done here.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quantcli.errors import ModelError
from quantcli.precision import in_float32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from onnxscript.rewriter import RewriteRule

logger = logging.getLogger(__name__)

# QuantizeLinear and DequantizeLinear know an axis from operator set 13 on; older models are lifted to 17, which every runtime
# of the last years reads.
OLDEST_OPSET, LIFTED_OPSET = 13, 17
# What a constant expression may cost to evaluate ahead, in elements: weights may be sliced and joined, nothing may explode.
FOLD_LIMIT = 1 << 27
# How often what one rewrite tells of shapes is given to the others: a network of several stages may tell one in each round.
ROUNDS = 8
# The domain of nodes that a pass is to leave alone.
KEPT = "quantcli.kept"
# Ranks of what a depthwise convolution of one weight per channel takes in BatchNorm's place: with one or two spatial axes.
DEPTHWISE_RANKS = (3, 4)
# What operators leave a tensor as it is with, as their second operand.
NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
# Operators of models that have been quantized before.
QUANTIZED = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
    "QLinearAdd", "QGemm", "MatMulNBits", "DynamicQuantizeMatMul",
})  # fmt: skip


def fold(model: ir.Model, opset: int = OLDEST_OPSET, requantize: bool = False, matrices: bool = True) -> ir.Model:
    """Return a folded copy of a float model; the model itself is left as it is.

    Args:
        model: The float model.
        opset: The oldest operator set that will do.
        requantize: Whether a model that is quantized already is made a float one first.
        matrices: Whether dense layers of three and more axes become products of matrices, which take a bias (`quantcli.dense`).

    Raises:
        ModelError: If the model is quantized already, or its operator set cannot be lifted.
    """
    quantized = next((node for node in model.graph.all_nodes() if node.op_type in QUANTIZED), None)
    if quantized is not None and requantize:
        from quantcli.requantize import float_again

        model = float_again(model)
        quantized = next((node for node in model.graph.all_nodes() if node.op_type in QUANTIZED), None)
    if quantized is not None:
        remedy = "convert the float model" if requantize else "convert the float model, or --requantize this one"
        raise ModelError(f"the model is quantized already (it holds {quantized.op_type})", remedy)
    with quiet("onnxscript", "onnx_ir"):
        return folded_copy(model, opset, matrices)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Let the named loggers speak of nothing but errors for a while."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def folded_copy(model: ir.Model, opset: int, matrices: bool) -> ir.Model:
    """Return a copy of a float model after every rewrite."""
    from quantcli.branches import add_branches
    from quantcli.canonical import canonical
    from quantcli.dense import as_matrices
    from quantcli.factors import fold_factors
    from quantcli.recurrent import plain_recurrent
    from quantcli.transposes import squeeze_later, without_transposes
    from quantcli.written_out import by_name

    folded = model.clone()
    passes.RemoveInitializersFromInputsPass()(folded)
    passes.InlinePass()(folded)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(folded)
    in_float32(folded)
    lift_opset(folded, opset)
    folded = simplify(folded)
    if (fewer := without_transposes(folded)) is not None:
        folded = simplify(fewer)
    for node in list(folded.graph):
        if node.op_type == "BatchNormalization" and node.domain == "":
            plain_batch_norm(node)
        elif node.op_type == "Gemm" and node.domain == "":
            absorb_gemm_factors(node)
            split_addend(node)
        elif node.op_type == "AveragePool" and node.domain == "":
            plain_average_pool(node)
    folded = by_name(folded)
    squeeze_later(folded)
    canonical(folded)
    plain_recurrent(folded)
    fold_factors(folded)
    while add_branches(folded):
        fold_factors(folded)
    if matrices:
        as_matrices(folded)
        join_reshapes(folded)
    own_constants(folded)
    own_biases(folded)
    passes.RemoveUnusedNodesPass()(folded)
    passes.RemoveUnusedOpsetsPass()(folded)
    passes.TopologicalSortPass()(folded)
    passes.NameFixPass()(folded)
    passes.ShapeInferencePass()(folded)
    learn_types(folded)
    passes.RemoveInitializersFromInputsPass()(folded)  # where shape inference fails it leaves them there
    passes.ClearMetadataAndDocStringPass()(folded)
    return folded


def learn_types(model: ir.Model) -> None:
    """Ask ONNX Runtime for the types of tensors that shape inference knows nothing of: behind operators of other domains."""
    unknown = [value for node in model.graph for value in node.outputs if value.dtype is None and value.name]
    if not unknown or all(node.domain in {"", "ai.onnx"} for node in model.graph):
        return
    import onnxruntime

    from quantcli.probe import with_outputs

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        data = with_outputs(model, [str(value.name) for value in unknown])
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - what the runtime does not know either stays unknown, and float
        logger.info("the types behind operators of other domains are not known: %s", error)
        return
    floats = {output.name for output in session.get_outputs() if output.type == "tensor(float)"}
    for value in unknown:
        if value.name in floats:
            value.type = ir.TensorType(ir.DataType.FLOAT)


def lift_opset(model: ir.Model, needed: int) -> None:
    """Lift a model of an operator set below the needed one to 17, or to the needed one where that is newer.

    Raises:
        ModelError: If an operator has no counterpart there.
    """
    version = model.opset_imports.get("", LIFTED_OPSET)
    if version >= needed:
        return
    from onnxscript import version_converter

    # Which of two converters does it is nothing that a user has to be warned of.
    logging.getLogger(version_converter.__name__).setLevel(logging.ERROR)
    wanted = max(needed, LIFTED_OPSET)
    try:
        version_converter.convert_version(model, wanted, fallback=True)
    except Exception as error:
        raise ModelError(f"the model's operator set {version} cannot be lifted to {wanted} ({error})") from error
    if model.opset_imports.get("") != wanted:
        raise ModelError(f"the model's operator set {version} cannot be lifted to {wanted}", "export it again, newer")


def lifted(model: ir.Model, needed: int) -> ir.Model | None:
    """Return a copy of a model in an operator set, or a newer one; None where it cannot be had under the names that there are."""
    copy = model.clone()
    try:
        lift_opset(copy, needed)
    except ModelError as error:
        logger.info("%s", error)
        return None
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)  # what were attributes
    if names_of(copy) != names_of(model):
        logger.info("its tensors have other names in operator set %d", needed)
        return None
    return copy


def names_of(model: ir.Model) -> list[tuple[str | None, ...]]:
    """Return the names of a model's nodes and of what they give, by which statistics and recipes speak of them."""
    return [(node.name, *(value.name for value in node.outputs)) for node in model.graph]


def worth_evaluating(node: ir.Node) -> bool | None:
    """Say whether a constant expression is evaluated; None leaves it to the size. Text is left alone."""
    if any(value is not None and value.dtype is ir.DataType.STRING for value in (*node.inputs, *node.outputs)):
        return False
    return True if node.op_type == "ConstantOfShape" else None


def evaluated(model: ir.Model) -> ir.Model:
    """Return a model with its constant expressions evaluated; the model itself where one of them cannot be."""
    from onnxscript import optimizer

    trial = model.clone()
    try:
        optimizer.fold_constants(
            trial,
            onnx_shape_inference=True,
            input_size_limit=FOLD_LIMIT,
            output_size_limit=FOLD_LIMIT,
            should_fold=worth_evaluating,
        )
    except Exception as error:  # noqa: BLE001 - an expression that the reference implementation cannot evaluate is no failure
        logger.info("constant expressions are left as they are: %s", error)
        return model
    return trial


def simplify(model: ir.Model) -> ir.Model:
    """Return a model with constant expressions evaluated, without what does nothing, BatchNorm and padding in convolutions."""
    from onnxscript import rewriter
    from onnxscript.rewriter.rules import common as rules

    from quantcli.shapes import settle_shapes

    chosen = [
        rules.dropout_zero_rule,
        rules.dropout_inference_rule,
        rules.no_op_cast_rule,
        rules.no_op_transpose_rule,
        rules.no_op_expand_rule,
        rules.transpose_transpose_rule,
        rules.reshape_reshape_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.collapse_slice_rule,
        rules.successive_relu_rule,
        rules.successive_clip_rule,
        rules.successive_clip_relu_rule,
        rules.successive_relu_clip_rule,
        rules.normalize_pad_format_conv_rule,
        rules.fuse_pad_into_conv_rule,
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
        gemm_rule(),
        rules.remove_optional_bias_from_conv_rule,
        rules.remove_optional_bias_from_conv_transpose_rule,
        rules.remove_optional_bias_from_gemm_rule,
    ]
    for _ in range(ROUNDS):
        before = [node.op_identifier() for node in model.graph.all_nodes()]
        model = evaluated(model)
        settle_shapes(model)
        passes.RemoveInitializersFromInputsPass()(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        empty_pads(model)
        lone_batches(model)
        neutral_constants(model)
        drop_identities(model)
        passes.RemoveUnusedNodesPass()(model)
        rewriter.rewrite(model, pattern_rewrite_rules=chosen)
        passes.RemoveUnusedNodesPass()(model)
        if before == [node.op_identifier() for node in model.graph.all_nodes()]:
            break
    return model


def join_reshapes(model: ir.Model) -> None:
    """Make one Reshape of two that follow each other."""
    from onnxscript import rewriter
    from onnxscript.rewriter.rules import common as rules

    rewriter.rewrite(model, pattern_rewrite_rules=[rules.reshape_reshape_rule])


def empty_pads(model: ir.Model) -> None:
    """Replace every Pad that adds nothing by an Identity."""
    for node in list(model.graph):
        pads = constant(node.inputs[1]) if node.op_type == "Pad" and not node.domain else None
        if pads is not None and not pads.any():
            same = ir.node("Identity", [node.inputs[0]], name=node.name)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [same], node.outputs, same.outputs)


def neutral_constants(model: ir.Model) -> None:
    """Replace every operator that adds or takes away zero, or multiplies or divides by one, by an Identity.

    The library's own rules take anything below 1e-8 for zero: what keeps a divisor, or what a logarithm is taken of, from being so.
    """
    for node in list(model.graph.all_nodes()):
        neutral = NEUTRAL.get(node.op_type) if not node.domain else None
        held, x = (constant(node.inputs[1]), node.inputs[0]) if neutral is not None else (None, None)
        if held is None or x is None or held.size != 1 or held.item() != neutral or node.graph is None:
            continue
        if held.ndim == 0 or (x.shape is not None and held.ndim <= len(x.shape)):  # else it adds axes
            same = ir.node("Identity", [x], name=node.name)
            ir.convenience.replace_nodes_and_values(node.graph, node, [node], [same], node.outputs, same.outputs)


def lone_batches(model: ir.Model) -> None:
    """Replace BatchNormalization by the statistics of a batch of one by InstanceNormalization, which has one output.

    That is how weights are standardized, as constants: the optimizer evaluates what has one output alone.
    """
    for node in list(model.graph):
        if node.op_type != "BatchNormalization" or node.domain or not node.attributes.get_int("training_mode", 0):
            continue
        x = node.inputs[0]
        alone = x is not None and x.shape is not None and len(x.shape) >= 3 and x.shape[0] == 1
        if alone and not any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
            epsilon = {"epsilon": node.attributes.get_float("epsilon", 1e-5)}
            same = ir.node("InstanceNormalization", node.inputs[:3], epsilon, name=node.name)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [same], node.outputs[:1], same.outputs)


def gemm_rule() -> RewriteRule:
    """Return a rule that makes a Gemm of a product of matrices and what is added to it.

    The library's own does so, too, where that is the product itself, and then fails.
    """
    from onnxscript.rewriter import RewriteRule

    def fits(_: Any, a: ir.Value, b: ir.Value, c: ir.Value) -> bool:
        product = c.producer()
        itself = product is not None and product.op_type == "MatMul" and tuple(product.inputs) == (a, b)
        return not itself and all(value.shape is not None and value.shape.rank() == 2 for value in (a, b))

    return RewriteRule(
        lambda op, a, b, c: op.Add(op.MatMul(a, b), c),
        lambda op, a, b, c: op.Gemm(a, b, c),
        fits,
        name="MatMulAddToGemm",
    )


def drop_identities(model: ir.Model) -> None:
    """Remove Identity nodes, but for those that give an output the values of another: either has a name of its own.

    The pass gives what an Identity reads the name of the output that it makes, which would be that of two. Nor can a branch of an
    If give out, as its own, what the graph around it makes.
    """
    taken: set[ir.Value] = set()
    kept: list[ir.Node] = []
    for node in model.graph.all_nodes():
        if node.op_type == "Identity" and not node.domain and node.outputs[0].is_graph_output():
            x = node.inputs[0]
            producer = x.producer() if x is not None else None
            around = producer is not None and producer.graph is not node.graph
            if x in taken or around or (x is not None and x.is_graph_output()):
                kept.append(node)
            elif x is not None:
                taken.add(x)  # it has the name of this one from here on
    for node in kept:
        node.domain = KEPT
    passes.IdentityEliminationPass()(model)
    for node in kept:
        node.domain = ""


def plain_batch_norm(node: ir.Node) -> None:
    """Replace a BatchNormalization that follows no layer: y = x·(γ/σ) + (β − μ·γ/σ), σ = √(var + ε).

    Left alone where its parameters are not constant, the rank of its input is unknown, or it is in training mode.
    """
    x, *parameters = node.inputs
    constants = [constant(value) for value in parameters]
    if x is None or x.shape is None or any(c is None for c in constants) or len(node.outputs) != 1:
        return
    gamma, beta, mean, variance = (np.asarray(c, dtype=np.float64) for c in constants)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    if node.attributes.get_int("training_mode", 0) or x.dtype != ir.DataType.FLOAT:
        return
    factor = gamma / np.sqrt(variance + epsilon)
    addend = beta - mean * factor
    graph, rank = node.graph, len(x.shape)
    if not isinstance(graph, ir.Graph):
        return
    replaced = depthwise if rank in DEPTHWISE_RANKS else product_and_sum
    replaced(node, graph, x, factor.astype(np.float32), addend.astype(np.float32))


def depthwise(
    node: ir.Node, graph: ir.Graph, x: ir.Value, factor: NDArray[np.float32], addend: NDArray[np.float32]
) -> None:
    """Replace a node by a convolution of one weight per channel.

    As an integer layer it has a scale per channel, which holds each factor exactly, and rounds once, where Mul and Add
    share one scale among all factors and round twice.
    """
    spatial = (1,) * (len(x.shape or ()) - 2)
    output = node.outputs[0]
    weight = add_constant(graph, f"{output.name}_factor", factor.reshape(-1, 1, *spatial))
    bias = add_constant(graph, f"{output.name}_addend", addend)
    attributes: dict[str, int | tuple[int, ...]] = {"group": factor.size, "kernel_shape": spatial}
    layer = ir.node("Conv", [x, weight, bias], attributes, name=node.name or output.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [layer], [output], [layer.outputs[0]])


def product_and_sum(
    node: ir.Node, graph: ir.Graph, x: ir.Value, factor: NDArray[np.float32], addend: NDArray[np.float32]
) -> None:
    """Replace a node by Mul and Add of one value per channel."""
    output = node.outputs[0]
    shape = (-1,) + (1,) * (len(x.shape or ()) - 2)
    factor_value = add_constant(graph, f"{output.name}_factor", factor.reshape(shape))
    addend_value = add_constant(graph, f"{output.name}_addend", addend.reshape(shape))
    product = ir.node("Mul", [x, factor_value], name=f"{node.name or output.name}_mul")
    product.outputs[0].name = f"{output.name}_scaled"
    product.outputs[0].shape, product.outputs[0].type = output.shape, output.type
    addition = ir.node("Add", [product.outputs[0], addend_value], name=f"{node.name or output.name}_add")
    ir.convenience.replace_nodes_and_values(graph, node, [node], [product, addition], [output], [addition.outputs[0]])


def plain_average_pool(node: ir.Node) -> None:
    """Drop attributes of AveragePool that say nothing: dilations of 1, and counting a padding that is not there."""
    if all(step == 1 for step in node.attributes.get_ints("dilations", ())):
        node.attributes.pop("dilations", None)
    unpadded = not any(node.attributes.get_ints("pads", ())) and node.attributes.get_string("auto_pad", "NOTSET") in {
        "NOTSET",
        "VALID",
    }
    if unpadded:
        node.attributes.pop("count_include_pad", None)


def absorb_gemm_factors(node: ir.Node) -> None:
    """Make Gemm's factors 1 by multiplying alpha into a constant B and beta into a constant C, and C a vector."""
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    graph = node.graph
    weight, bias = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if weight is None or weight.dtype != np.float32 or not isinstance(graph, ir.Graph):
        return
    if alpha != 1.0:
        node.replace_input_with(1, add_constant(graph, f"{node.inputs[1].name}_scaled", weight * np.float32(alpha)))  # type: ignore[union-attr]
        node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
    if bias is None:
        return
    columns = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
    is_row = bias.ndim < 2 or bias.shape[0] == 1
    if is_row and (beta != 1.0 or bias.shape != (columns,)):
        row = np.broadcast_to(bias.reshape(-1), (columns,)) * np.float32(beta)
        node.replace_input_with(2, add_constant(graph, f"{node.inputs[2].name}_row", row))  # type: ignore[union-attr]
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)


def split_addend(node: ir.Node) -> None:
    """Take an addend that is no constant vector out of a Gemm: x·w + c is a product and an addition, of which each has integers."""
    addend, graph, output = node.inputs[2] if len(node.inputs) > 2 else None, node.graph, node.outputs[0]
    held = constant(addend)
    if addend is None or not isinstance(graph, ir.Graph) or node.attributes.get_float("beta", 1.0) != 1.0:
        return
    if addend.dtype != ir.DataType.FLOAT or (held is not None and (held.ndim == 1 or held.size == 1)):
        return
    product = ir.Node("", "Gemm", node.inputs[:2], list(node.attributes.values()), num_outputs=1)
    product.name, product.outputs[0].name = f"{node.name or output.name}_product", f"{output.name}_product"
    product.outputs[0].shape, product.outputs[0].type = output.shape, output.type
    addition = ir.node("Add", [product.outputs[0], addend], name=node.name or output.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [product, addition], [output], [addition.outputs[0]])


def own_constants(model: ir.Model) -> None:
    """Let nodes read a copy of a constant that the model gives out: whatever becomes of theirs, what is given out stays."""
    for value in {output for output in model.graph.outputs if constant(output) is not None}:
        if value.uses():
            copy = add_constant(model.graph, f"{value.name}_inside", np.array(constant(value)))
            for node, place in list(value.uses()):
                node.replace_input_with(place, copy)


def own_biases(model: ir.Model) -> None:
    """Give every layer a bias of its own: an integer bias has the scale of its layer, so no two layers can share one."""
    taken: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type not in {"Conv", "ConvTranspose", "Gemm"} or len(node.inputs) < 3 or node.domain:
            continue
        bias = node.inputs[2]
        values = constant(bias)
        if bias is None or values is None:
            continue
        if bias in taken or len(bias.uses()) > 1:
            bias = add_constant(model.graph, f"{bias.name}_{node.name or node.outputs[0].name}", values)
            node.replace_input_with(2, bias)
        taken.add(bias)


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the array of a constant of the graph; None for anything that is computed, fed, or absent."""
    if value is None or value.const_value is None or value.is_graph_input() or value.producer() is not None:
        return None
    return value.const_value.numpy()


def unmapped(value: ir.Value) -> None:
    """Let go of the memory map of a weight in an external file; it is mapped again when it is read."""
    release(value.const_value)


def release(tensor: object) -> None:
    """Let go of a tensor's memory map, where it has one."""
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # somebody still looks at it
            tensor.release()


def add_constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Register an array under ``name``, or with a number behind it where a constant has that name, and return its value."""
    unique, number = name, 1
    while unique in graph.initializers:
        number += 1
        unique = f"{name}_{number}"
    array = np.require(array, requirements="C")
    tensor = ir.Tensor(array, name=unique)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
