"""A PyTorch program's ONNX form, by torch's exporter; and what torch says where it fails, in a line."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import threading
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError
from quantcli.probe import unused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir

# The exporter writes this operator set; naming it keeps the output the same when torch changes its default.
OPSET = 20
# What tells of its own failures, which come as errors as well.
TELLING = ("torch.onnx", "torch.export", "torch._export", "torch._subclasses", "torch.fx")
# Exporting replaces parts of torch and of Python's standard streams while it lasts, for all threads.
EXPORTING = threading.RLock()


def expressed(program: Any, names: Sequence[str] | None, path: Path) -> bytes:
    """Return a program's ONNX form, as a message; operators that the exporter does not take are taken apart.

    Args:
        program: An exported program.
        names: Its inputs' names; None for its own.
        path: Where it comes from, for errors.

    Raises:
        ModelError: If it cannot be expressed in ONNX.
    """
    while True:
        try:
            program = plainly_stacked(plainly_pooled(program))
            return onnx_of(program, names)
        except Exception as error:
            simpler = without(untranslated(error, program), program)
            if simpler is None:
                raise ModelError(
                    f"{path} cannot be expressed in ONNX ({told(error, program)})",
                    "write that part of the model otherwise, or export it to .onnx by other means",
                ) from error
            program = simpler


def onnx_of(program: Any, names: Sequence[str] | None) -> bytes:
    """Return a program's ONNX form, as a message."""
    import torch

    with quiet():
        found = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
        )
        if found is None:
            raise RuntimeError("the exporter gave no model")
        name_ends(found.model.graph, names or program.graph_signature.user_inputs, output_names(program))
        data: bytes = found.model_proto.SerializeToString(deterministic=True)
        return data


def name_ends(graph: ir.Graph, inputs: Sequence[Any], outputs: Sequence[str] | None) -> None:
    """Give a graph's inputs and outputs their names; values inside that bear one of them get others.

    An output that is called like an input or a weight gets another name, too.

    Args:
        graph: The graph.
        inputs: What its inputs are to be called.
        outputs: What its outputs are to be called; None to leave them as they are.
    """
    named = list(map(str, inputs)) if len(inputs) == len(graph.inputs) else [str(value.name) for value in graph.inputs]
    taken = {*named, *graph.initializers}
    wanted = outputs if outputs and len(outputs) == len(graph.outputs) else [str(v.name) for v in graph.outputs]
    named += [unused(f"{name}_output" if name in taken else name, taken) for name in wanted]
    ends = dict(zip([*graph.inputs, *graph.outputs], named, strict=True))
    inner = [value for node in graph.all_nodes() for value in node.outputs if value not in ends]
    taken.update(str(value.name) for value in inner)
    for value in inner:
        if value.name in named:
            value.name = unused(f"{value.name}_inner", taken)
    for value, name in ends.items():
        value.name = name


def output_names(program: Any) -> list[str] | None:
    """Return the keys of a dict of outputs as their names; None for outputs that have none."""
    import torch.utils._pytree as pytree

    spec = program.call_spec.out_spec
    if spec is None or spec.type is not dict:
        return None
    leaves = pytree.tree_leaves_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    return ["_".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in keys) for keys, _ in leaves]


def plainly_pooled(program: Any) -> Any:
    """Return a program whose poolings of whole channels are means where their input lies in another order, as permuted ones do.

    torch takes those apart into a mean and a change of its strides, which ONNX can only say in arithmetic of places.
    """
    import torch

    poolings = {getattr(torch.ops.aten, f"adaptive_avg_pool{rank}d").default: rank for rank in (1, 2, 3)}

    def mean_over(rank: int) -> Any:
        def mean(x: Any, size: Sequence[int]) -> Any:
            axes = list(range(-rank, 0))
            return x.mean(axes, keepdim=True) if all(length == 1 for length in size) else NotImplemented

        return mean

    if not any(
        node.target in poolings and not node.args[0].meta["val"].is_contiguous() for node in program.graph.nodes
    ):
        return program
    with quiet():
        return program.run_decompositions({target: mean_over(rank) for target, rank in poolings.items()})


def plainly_stacked(program: Any) -> Any:
    """Return a program whose stacking (torch.hstack and its like) is taken apart.

    The exporter writes the list that those make first as a sequence, and at times with a tensor's type, which no runtime loads.
    """
    import torch

    stackings = {getattr(torch.ops.aten, f"{name}stack").default for name in ("h", "v", "d")}
    lists = {getattr(torch.ops.aten, f"atleast_{rank}d").Sequence for rank in (1, 2, 3)}
    if not any(node.target in stackings | lists for node in program.graph.nodes):
        return program
    with quiet():
        apart = dict(torch.export.default_decompositions())
        return program.run_decompositions({target: apart[target] for target in stackings | lists})


def untranslated(error: BaseException, program: Any) -> Any:
    """Return the node of a program that the exporter could not translate; None where that is not told."""
    found = re.search(r"translating node %(\w+) ", "\n".join(map(str, causes(error))))
    return next((node for node in program.graph.nodes if found is not None and node.name == found[1]), None)


def without(node: Any, program: Any) -> Any:
    """Return a program in which an operator is taken apart into simpler ones, as torch does it; None where there are none."""
    import torch

    if node is None or (apart := dict(torch.export.default_decompositions()).get(node.target)) is None:
        return None
    with quiet(), contextlib.suppress(Exception):  # what the exporter said first is what is told
        simpler = program.run_decompositions({node.target: apart})
        return simpler if all(other.target != node.target for other in simpler.graph.nodes) else None
    return None


def told(error: BaseException, program: Any) -> str:
    """Return what the exporter could not translate, why, and the line of the user's code that it stands for, as far as it tells."""
    *_, last = causes(error)
    node = untranslated(error, program)
    if node is None:
        return reason(last)
    frames = re.findall(r'File "(.+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
    place = f", at {Path(frames[-1][0]).name}, line {frames[-1][1]}, in {frames[-1][2]}" if frames else ""
    return f"{node.target}: {reason(last)}{place}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def reason(error: BaseException) -> str:
    """Return the first telling line of what torch says, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return next((line.strip() for line in plain.splitlines() if line.strip()), type(error).__name__)


def where(error: BaseException) -> str:
    """Return the last line of the user's own code that an error came through; empty where there is none."""
    import torch

    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
    standard = str(Path(contextlib.__file__).parent)
    for cause in reversed(list(causes(error))):
        frames = traceback.extract_tb(cause.__traceback__)
        for frame in reversed(frames):
            library = frame.filename.startswith(standard) and "-packages" not in frame.filename
            if not library and not frame.filename.startswith((*ours, "<")):
                return f", at {Path(frame.filename).name}, line {frame.lineno}, in {frame.name}: {frame.line}"
    return ""


def remedy_for(error: BaseException) -> str:
    """Return what to do about a module that cannot be exported."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if any(isinstance(cause, GuardOnDataDependentSymNode) for cause in causes(error)):
        return "its code branches on values: write torch.where or torch.cond there, or export it with that branch taken out"
    return "where the example is not what it takes: --layout for the data, or --input"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress prints and warnings away from the user's terminal; one thread at a time."""
    with EXPORTING, silenced():
        yield


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drop what is printed, warned of and logged by torch's exporter."""
    loggers = {name: logging.getLogger(name) for name in TELLING}
    levels = {name: found.level for name, found in loggers.items()}
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for found in loggers.values():
            found.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, found in loggers.items():
                found.setLevel(levels[name])
