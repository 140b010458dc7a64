"""Load a PyTorch model, whatever form it was saved in: it becomes an exported program, and that becomes ONNX."""

from __future__ import annotations

import contextlib
import inspect
import logging
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from calibration.errors import ReportedError
from calibration.hooks.torch import register_operators
from calibration.imports import imported
from quantcli.errors import ModelError, UsageError
from quantcli.load import Opening, trust
from quantcli.load.exporter import causes, expressed, quiet, reason, remedy_for, where
from quantcli.load.learned import learned_of
from quantcli.load.onnx import as_arrays
from quantcli.load.training import check_evaluating

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from quantcli.load import Example
    from quantcli.load.learned import Learned, LearnedLayer

logger = logging.getLogger(__name__)

# Under what names checkpoints keep a state dict, and what wrappers put before its keys.
WRAPPINGS = ("state_dict", "model_state_dict", "model_state", "model", "net", "module")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
# Samples of an example: a batch of one would be taken for a batch that is always one.
ROWS = 2


@dataclass(frozen=True, eq=False)
class Opened:
    """A PyTorch model that was opened.

    Attributes:
        graph: The model.
        exported: Its ONNX form, as bytes.
        program: The exported program (`torch.export.ExportedProgram`).
        sources: The files besides its own that say what it is: the factory's source.
        aliases: The program's own names of the outputs that the graph calls otherwise, and of all inputs.
        learned: What a prepared model has learned; None of any other.
    """

    graph: ir.Model
    exported: bytes
    program: Any
    sources: tuple[Path, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    learned: Learned | None = None


def load_torch(path: Path, opening: Opening, example: Example | None) -> Opened:
    """Open an exported program, TorchScript, a state dict with its factory, or a pickled module.

    Raises:
        ModelError: If the file cannot be used, or the exporter cannot express the model.
        UsageError: If the opening contradicts the file.
    """
    if path.suffix == ".pt2":
        if opening.factory or opening.inputs or opening.dynamic:
            raise UsageError(
                f"{path} is an exported program, which says all of itself", "leave out --factory, --input and --dynamic"
            )
        return opened(path, program_at(path, opening.trusted))
    if trust.is_script(path):
        if opening.factory:
            raise UsageError(f"{path} is TorchScript, which holds its code", "leave out --factory")
        program, names = script_at(path, opening, example)
        return opened(path, program, names)
    module, sources = module_at(path, opening)
    from quantcli.torch.floats import floated, is_prepared

    layers: tuple[LearnedLayer, ...] = ()
    if is_prepared(module):
        module, layers = floated(module)
    names = tuple(inspect.signature(module.forward).parameters)
    made = opened(path, exported(module, path, names, opening, example), None, sources)
    return replace(made, learned=learned_of(made.graph.graph, layers)) if layers else made


def opened(path: Path, program: Any, names: Sequence[str] | None = None, sources: tuple[Path, ...] = ()) -> Opened:
    """Return a program with its ONNX form.

    Raises:
        ModelError: If it is in training mode or float64, or the exporter cannot express it in ONNX.
    """
    import onnx
    import torch

    check_evaluating(program, path)
    if {parameter.dtype for parameter in program.parameters() if parameter.is_floating_point()} == {torch.float64}:
        raise ModelError(f"{path} computes in float64", "save it as float32: call model.float() first")
    data = expressed(program, names, path)
    graph = ir.from_proto(onnx.load_from_string(data))
    as_arrays(graph, len(data))
    return Opened(graph, data, program, sources, aliases_of(program, graph))


def aliases_of(program: Any, graph: ir.Model) -> dict[str, str]:
    """Return a program's own names of the outputs that its ONNX form calls otherwise, and of all inputs."""
    signature = program.graph_signature
    outputs = zip(graph.graph.outputs, signature.user_outputs, strict=False)
    inputs = zip(graph.graph.inputs, signature.user_inputs, strict=False)
    own = {str(value.name): node for value, node in outputs if isinstance(node, str) and value.name != node}
    # Inputs come last: one that is given out as well goes by its name as an input.
    return {**own, **{str(value.name): node for value, node in inputs if isinstance(node, str)}}


# ---- exported programs and TorchScript -----------------------------------------------------------------------------------------


def program_at(path: Path, trusted: bool = False) -> Any:
    """Return an exported program; nothing of the file runs while it is read, unless it is trusted.

    Raises:
        ModelError: If the file is none, or holds more than tensors and operators.
    """
    import torch

    try:
        (trust.import_structures if trusted else trust.check_program)(path)
        with quiet(), contextlib.nullcontext() if trusted else trust.UNPICKLING.forbidden():
            register_operators()
            return torch.export.load(path)
    except ReportedError:
        raise
    except Exception as error:
        for cause in causes(error):
            told = cause.what if isinstance(cause, ModelError) else f"a pickle in it{asked_for(cause)}"
            if isinstance(cause, ModelError) or (isinstance(cause, pickle.UnpicklingError) and asked_for(cause)):
                raise trust.refused(path, f"is more than tensors and operators: {told}") from error
        raise ModelError(
            f"{path} is not an exported program, or is cut short", "save it with torch.export.save"
        ) from error


def is_quantized(program: Any) -> bool:
    """Tell whether a program holds quantized integers."""
    return any("quantized_decomposed" in str(node.target) for node in program.graph.nodes)


def script_at(path: Path, opening: Opening, example: Example | None) -> tuple[Any, tuple[str, ...]]:
    """Return TorchScript as an exported program, and the names of its inputs.

    Raises:
        ModelError: If it cannot be loaded or converted.
    """
    import torch
    from torch._export.converter import TS2EPConverter

    if not opening.trusted:
        trust.check_script(path)
    try:
        with quiet():
            script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ModelError(
            f"{path} is not TorchScript that this torch can load ({reason(error)})", "save it again"
        ) from error
    arguments = script.forward.schema.arguments[1:]  # the first one is the module, by whatever name
    names = [argument.name for argument in arguments if not argument.has_default_value()] or [
        a.name for a in arguments[:1]
    ]
    tensors = as_precise_as(script, example_inputs(path, names, names, opening, example))
    positional = tuple(tensors[name] for name in names)
    try:
        with quiet():
            converted = TS2EPConverter(script, positional).convert().module()
            return traced(converted, positional, tuple(axes_of(names, tensors, opening).values()), path), tuple(names)
    except ReportedError:
        raise
    except Exception as error:
        remedy = "save the module itself with torch.export.save (.pt2)"
        raise ModelError(f"{path} cannot be converted from TorchScript ({reason(error)})", remedy) from error


# ---- modules -------------------------------------------------------------------------------------------------------------------


def module_at(path: Path, opening: Opening) -> tuple[Any, tuple[Path, ...]]:
    """Return a module in evaluation mode, and the files besides its own that say what it is.

    Raises:
        ModelError: If the file cannot be used without consent, or cannot be loaded.
        UsageError: If a factory is missing, or given where there is a module.
    """
    import torch

    from quantcli.torch.given import bare

    found = stored_in(path, opening.trusted)
    if isinstance(found, torch.nn.Module):
        if opening.factory:
            raise UsageError(f"{path} holds a whole module", "leave out --factory")
        return bare(found).eval(), ()
    state = state_of(found)
    if state is None:
        raise without_state(found, path)
    if opening.factory is None:
        raise UsageError(
            f"{path} is a state dict: weights without the module that they belong to",
            "name what builds it: --factory module:callable, or file.py:callable",
        )
    module, source = built(opening.factory)
    module = bare(module)
    load_state(module, state, path)
    return module.eval(), source


def stored_in(path: Path, trusted: bool) -> Any:
    """Return what a file holds; of one that is not trusted, tensors and their nest of lists and dicts alone.

    Raises:
        ModelError: If the file cannot be read, or holds more and is not trusted.
    """
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            raise ModelError(f"{path} cannot be read as safetensors ({reason(error)})", "save it again") from error
    try:
        if not trusted:
            with quiet(), trust.UNPICKLING.forbidden():
                return torch.load(path, map_location="cpu", weights_only=True)
        logger.warning("%s is trusted: it may run code while it is loaded", path)
        with importing(Path.cwd()):
            return torch.load(path, map_location="cpu", weights_only=False)
    except ReportedError as error:
        raise trust.refused(path, f"is a pickle of more than tensors ({error.what})") from error
    except pickle.UnpicklingError as error:
        if trusted or "Weights only" not in str(error):
            raise ModelError(
                f"{path} is not what torch saves, or is cut short ({reason(error)})", "save it again"
            ) from error
        raise trust.refused(
            path, f"is a pickle of more than tensors{asked_for(error)}: it runs code when it is loaded"
        ) from error
    except Exception as error:
        if not trusted:
            raise ModelError(f"{path} is not what torch saves, or is cut short", "save it again") from error
        told = f"{type(error).__name__}: {reason(error)}"
        raise ModelError(f"{path} cannot be loaded ({told})", "make its module importable from here") from error


def asked_for(error: BaseException) -> str:
    """Return what a refused pickle asked for, where torch says it."""
    text = str(error)
    start = text.find("GLOBAL ")
    return f" (it asks for {text[start + 7 :].split(maxsplit=1)[0].rstrip('.,')})" if start >= 0 else ""


def state_of(found: Any) -> dict[str, Any] | None:
    """Return the state dict in what a file holds: itself, or under one of the names that checkpoints use; None for neither."""
    import torch

    if not isinstance(found, Mapping) or not found:
        return None
    if all(isinstance(value, torch.Tensor) for value in found.values()):
        return {str(name): value for name, value in found.items()}
    inner = (state_of(found[name]) for name in WRAPPINGS if name in found)
    return next((state for state in inner if state is not None), None)


def without_state(found: Any, path: Path) -> ModelError:
    """Return the error for what is neither a module nor a state dict, nor holds one under a known name."""
    if not isinstance(found, Mapping) or not found:
        return ModelError(f"{path} holds {type(found).__name__}, neither a state dict nor a module", "save one of them")
    likely = next((f"'{name}'" for name, value in found.items() if state_of(value) is not None), "state dict")
    return ModelError(
        f"{path} holds a dict of {shown(list(map(str, found)))}, neither a state dict nor a module",
        f"save its {likely} alone, or as one of {', '.join(WRAPPINGS)}",
    )


def load_state(module: Any, state: dict[str, Any], path: Path) -> None:
    """Give a module its weights; what wrappers have put before their names is left out.

    Raises:
        ModelError: If they are not the module's.
    """
    wanted = set(module.state_dict())
    while state and not wanted & set(state):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}
    state = {**state, **tied_to(module, state)}
    missing, extra = sorted(wanted - set(state) - counters), sorted(set(state) - wanted)
    if missing or extra:
        parts = [f"lacks {shown(missing)}"] * bool(missing) + [f"holds {shown(extra)}, which the module lacks"] * bool(
            extra
        )
        raise ModelError(f"{path} {' and '.join(parts)}", "give the factory that these weights were trained with")
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name, value in state.items():
        if tuple(value.shape) != shapes[name]:
            raise ModelError(
                f"{path}: '{name}' has the shape {list(value.shape)}, and {list(shapes[name])} in the module",
                "give the factory that these weights were trained with",
            )
    module.load_state_dict(state, strict=False)


def tied_to(module: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Return the weights that a state lacks, but has under another name that the module ties them to: safetensors drops those."""
    names: dict[int, list[str]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        names.setdefault(id(value), []).append(name)
    found = {}
    for tied in names.values():
        held = next((name for name in tied if name in state), None)
        found.update({name: state[held] for name in tied if held is not None and name not in state})
    return found


def shown(names: list[str]) -> str:
    """Write a list of names, cut short."""
    return ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def built(factory: str) -> tuple[Any, tuple[Path, ...]]:
    """Call a factory and return its module and its source file.

    Raises:
        UsageError: If the text names none.
        ModelError: If it cannot be called, or gives something else.
    """
    import torch

    place, colon, name = factory.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"'{factory}' names no factory", "write module:callable or file.py:callable")
    file = Path(place)
    if file.suffix == ".py" and not file.is_file():
        raise UsageError(f"there is no {file}", "write module:callable or file.py:callable")
    try:
        with importing(file.resolve().parent if file.suffix == ".py" else Path.cwd()):
            source = imported(place)
            module = getattr(source, name)()
    except (Exception, SystemExit) as error:
        raise ModelError(f"the factory {factory} fails ({type(error).__name__}: {reason(error)})", "mend it") from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"the factory {factory} gives {type(module).__name__}", "return a torch.nn.Module")
    where = getattr(source, "__file__", None)
    return module, (Path(where),) if where else ()


@contextlib.contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Let modules be imported from a folder."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


# ---- export --------------------------------------------------------------------------------------------------------------------


def exported(
    module: Any, path: Path, names: Sequence[str], opening: Opening | None = None, example: Example | None = None
) -> Any:
    """Return a module as an exported program.

    Raises:
        ModelError: If it cannot be exported.
    """
    opening = opening or Opening()
    parameters = inspect.signature(module.forward).parameters
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = [name for name in names if parameters[name].kind in kinds]
    needed = [name for name in taken if parameters[name].default is inspect.Parameter.empty]
    tensors = as_precise_as(module, example_inputs(path, taken, needed or taken[:1], opening, example))
    axes = axes_of(taken, tensors, opening)
    # An argument behind one that is left out goes by its name.
    by_name = [
        name
        for number, name in enumerate(taken)
        if name in tensors
        and (parameters[name].kind is kinds[1] or any(before not in tensors for before in taken[:number]))
    ]
    positional = tuple(tensors[name] for name in taken if name in tensors and name not in by_name)
    keywords = {name: tensors[name] for name in by_name}
    return traced(module, positional, axes, path, keywords)


def traced(
    module: Any, positional: tuple[Any, ...], axes: Any, path: Path, keywords: dict[str, Any] | None = None
) -> Any:
    """Return the exported program of a module, with the exporter's reason where there is none.

    Raises:
        ModelError: If it cannot be exported.
    """
    import torch

    try:
        with quiet():
            program = torch.export.export(module, positional, keywords or {}, dynamic_shapes=axes, strict=False)
    except Exception as error:
        raise ModelError(f"{path} cannot be exported ({reason(error)}){where(error)}", remedy_for(error)) from error
    given = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    shared = not isinstance(axes, dict) or any(axes.values())
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op == "placeholder"
            and node.name in given
            and shared
            and value is not None
            and value.ndim
            and isinstance(value.shape[0], int)
        ):
            logger.warning("%s takes input '%s' in batches of %d only", path.name, node.name, value.shape[0])
    return program


def axes_of(names: Sequence[str], tensors: Mapping[str, Any], opening: Opening) -> dict[str, dict[int, Any]]:
    """Return the free axes of every input: the batch, if they share one, and those that were asked for.

    Raises:
        UsageError: If one is asked for that no input has.
    """
    import torch

    batch = {} if apart(opening) else {0: torch.export.Dim.AUTO}
    free = {name: dict(batch) if tensors[name].ndim else {} for name in names if name in tensors}
    for name, axis in opening.dynamic:
        if name not in free or not 0 <= axis < tensors[name].ndim:
            there = ", ".join(f"{known} ({tensors[known].ndim} axes)" for known in free)
            raise UsageError(f"--dynamic {name}:{axis} names no axis", f"inputs: {there}")
        free[name][axis] = torch.export.Dim.DYNAMIC
    return free


def example_inputs(
    path: Path, names: Sequence[str], needed: Sequence[str], opening: Opening, example: Example | None
) -> dict[str, Any]:
    """Return example inputs as tensors: those that were described, or what the data holds.

    Raises:
        ModelError: If an argument that has no default has no example.
        UsageError: If one is described that the model does not take.
    """
    import torch

    arrays: dict[str, NDArray[Any]] = {}
    if opening.inputs:
        for spec in opening.inputs:
            if spec.name not in names:
                raise UsageError(f"the model takes no '{spec.name}'", f"its inputs are {', '.join(names)}")
            first = spec.shape[:1] if apart(opening) else [ROWS][: len(spec.shape)]
            arrays[spec.name] = np.ones([size or 1 for size in (*first, *spec.shape[1:])], dtype=spec.dtype)
    elif example is not None:
        arrays = example(names)
    for name in needed:
        if name not in arrays:
            raise ModelError(
                f"{path} takes '{name}', and there is no example of it",
                f"describe its inputs, as in --input {name}:1x3x224x224, or name the data's arrays after them",
            )
    if not apart(opening):
        arrays = {name: rows(array) for name, array in arrays.items()}
    return {name: torch.from_numpy(arrays[name]) for name in names if name in arrays}


def apart(opening: Opening) -> bool:
    """Tell whether inputs that were described share no axis of samples, as a state of 2 x batch x units and a sequence do not."""
    return len({spec.shape[0] for spec in opening.inputs if spec.shape}) > 1


def as_precise_as(module: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return example inputs in the precision of a module all of whose weights have the same: data is float32, whatever they are."""
    import torch

    kinds = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32
    return {name: value.to(kind) if value.dtype == torch.float32 else value for name, value in tensors.items()}


def rows(array: NDArray[Any]) -> NDArray[Any]:
    """Return two rows of an array: a batch of one would be taken for a batch that is always one."""
    return np.ascontiguousarray(np.repeat(array[:1], ROWS, axis=0)) if array.ndim else array
