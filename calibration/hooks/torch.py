"""Run a model with torch, on the CPU or a CUDA device: an exported program, or a module with forward hooks."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.dataset import InputSpec
from calibration.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import torch
    from numpy.typing import NDArray

    from calibration.layout import Layout


class TorchHook:
    """What both hooks share.

    Attributes:
        specs: The inputs, in order.
        device: ``cpu`` or ``cuda``.
    """

    specs: tuple[InputSpec, ...]
    device: str

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The model's inputs."""
        return self.specs

    def rest(self) -> None:
        """Keep everything: it is used until the end."""

    def frame(self, layout: Layout) -> None:
        """Return nothing: torch makes the tensors itself."""

    def fed(self, feeds: dict[str, NDArray[Any]]) -> list[torch.Tensor]:
        """Return a batch as tensors on the device, in the order of the inputs."""
        import torch

        return [torch.from_numpy(np.ascontiguousarray(feeds[spec.name])).to(self.device) for spec in self.specs]


class ProgramHook(TorchHook):
    """An exported program (``.pt2``), run node by node with `torch.fx.Interpreter`.

    Values are called as the program's nodes are, which is what the ONNX exporter calls them too.

    Args:
        program: The program (`torch.export.ExportedProgram`); None where there is none, which is an error.
        names: The tensors that will be asked for.
        device: ``cpu`` or ``cuda``.
        what: What to call the model in errors.
        aliases: The program's own names of values that are called otherwise here.

    Raises:
        RunError: If there is no program, it holds bfloat16, the device is not there, or a name is unknown to the program.
    """

    def __init__(
        self,
        program: Any,
        names: Sequence[str],
        device: str = "cpu",
        what: str = "the model",
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        torch_on(device, what)
        if program is None:
            raise RunError(
                f"{what} is no PyTorch model, and only those run in torch", "leave out --runtime and --device"
            )
        check_known_types(program, what)
        self.what, self.device = what, device
        given = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        self.aliases = dict(aliases or {})
        own = {node: name for name, node in self.aliases.items()}
        self.specs = tuple(spec_of(own.get(node, node), placeholders[node].meta["val"]) for node in given)
        nodes = [self.aliases.get(name, name) for name in names]
        self.module = program.module()
        if missing := unknown_to(self.module, nodes):
            # The exporter's graph is a decomposed one (a pool became a mean, say), but for what ONNX has operators for.
            self.module = decomposed(program, self.module, set(nodes))
            missing = unknown_to(self.module, nodes)
        if missing:
            raise RunError(
                f"torch's graph of {what} has no value '{missing[0]}'"
                + (f" (and {len(missing) - 1} more that the plan needs)" if len(missing) > 1 else ""),
                "calibrate in ONNX Runtime: leave out --runtime and --device",
            )
        self.module = self.module.to(device)

    def run(self, feeds: dict[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run one batch and return the asked values by name.

        Raises:
            RunError: If torch fails.
        """
        import torch

        class Recorder(torch.fx.Interpreter):
            """Keeps the asked values, as arrays, and lets the others go."""

            def __init__(self, module: Any, wanted: set[str]) -> None:
                super().__init__(module, garbage_collect_values=True)
                self.wanted = wanted
                self.found: dict[str, NDArray[Any]] = {}

            def run_node(self, n: Any) -> Any:
                value = super().run_node(n)
                if (name := called(n)) in self.wanted:
                    self.found[name] = value.detach().cpu().numpy()
                return value

        nodes = {name: self.aliases.get(name, name) for name in outputs or ()}
        recorder = Recorder(self.module, set(nodes.values()))
        try:
            with torch.no_grad():
                recorder.run(*self.fed(feeds))
        except Exception as error:
            raise RunError(f"torch fails while running {self.what} ({first_line(error)})") from error
        return {name: recorder.found[node] for name, node in nodes.items()}


class ProgramRunner(TorchHook):
    """An exported program, run for its outputs.

    Args:
        program: The program.
        what: What to call it in errors.
        inputs: What to call its inputs; None for its own names.
        outputs: What to call its outputs; None for its own names.
        device: ``cpu`` or ``cuda``.
        masks: The numbers of the inputs that only ever mask scores.

    Raises:
        RunError: If it has another number of inputs or outputs than there are names.
    """

    def __init__(
        self,
        program: Any,
        what: str = "the model",
        inputs: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
        device: str = "cpu",
        masks: Collection[int] = (),
    ) -> None:
        torch_on(device, what)
        self.what, self.device = what, device
        given, made = program.graph_signature.user_inputs, program.graph_signature.user_outputs
        placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        names, self.outputs = tuple(inputs or given), tuple(outputs or map(str, made))
        if (len(names), len(self.outputs)) != (len(given), len(made)):
            raise RunError(
                f"{what} has {len(given)} inputs and {len(made)} outputs", "give the models that belong together"
            )
        self.specs = tuple(
            replace(spec_of(name, placeholders[node].meta["val"]), masks=number in masks)
            for number, (name, node) in enumerate(zip(names, given, strict=True))
        )
        self.module, self.nesting = program.module().to(device), program.call_spec.in_spec

    def run(self, feeds: dict[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run one batch and return the asked outputs (all of them by default) by name.

        Raises:
            RunError: If torch fails.
        """
        import torch
        from torch.utils._pytree import tree_leaves, tree_unflatten

        try:
            positional, keywords = tree_unflatten(self.fed(feeds), self.nesting)
            with torch.no_grad():
                found = tree_leaves(self.module(*positional, **keywords))
        except Exception as error:
            raise RunError(f"torch fails while running {self.what} ({first_line(error)})") from error
        values = {name: value.cpu().numpy() for name, value in zip(self.outputs, found, strict=True)}
        return values if outputs is None else {name: values[name] for name in outputs}


def register_operators() -> None:
    """Register the decomposed quantize and dequantize operators, which torch knows only after their module is imported.

    Raises:
        RunError: If this torch has none.
    """
    try:
        import torch.ao.quantization.fx._decomposed  # noqa: F401
    except ImportError as error:
        raise RunError("this torch has no decomposed quantization operators", "use the .onnx output") from error


class ModuleHook(TorchHook):
    """A module in eager mode, watched by forward hooks: the value called ``a.b`` is what the submodule ``a.b`` returns.

    Args:
        module: The module. It is put into evaluation mode.
        inputs: Its inputs, in order.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, module: torch.nn.Module, inputs: Sequence[InputSpec], device: str = "cpu") -> None:
        torch_on(device, "the module")
        self.module = module.eval().to(device)
        self.specs, self.device = tuple(inputs), device

    def run(self, feeds: dict[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run one batch and return what the asked submodules returned.

        Raises:
            RunError: If there is no such submodule, one was not reached, or torch fails.
        """
        import torch

        found: dict[str, NDArray[Any]] = {}
        with self.watched(list(outputs or ()), found), torch.no_grad():
            try:
                self.module(*self.fed(feeds))
            except Exception as error:
                raise RunError(f"torch fails while running the module ({first_line(error)})") from error
        if missing := [name for name in outputs or () if name not in found]:
            raise RunError(f"the submodule '{missing[0]}' was not run", "ask for those that the forward pass calls")
        return found

    @contextlib.contextmanager
    def watched(self, names: Sequence[str], found: dict[str, NDArray[Any]]) -> Iterator[None]:
        """Keep what the named submodules return."""
        modules = dict(self.module.named_modules())
        if unknown := next((name for name in names if name not in modules), None):
            raise RunError(f"the module has no submodule '{unknown}'", "named_modules() lists them")

        def keep(name: str) -> Any:
            def hook(module: Any, arguments: Any, output: Any) -> None:
                del module, arguments
                found[name] = output.detach().cpu().numpy()

            return hook

        handles = [modules[name].register_forward_hook(keep(name)) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def decomposed(program: Any, whole: Any, names: set[str]) -> Any:
    """Return a program's module with its operators taken apart, except those whose values are asked for as they are."""
    import torch

    table: Any = torch.export.default_decompositions()
    for node in whole.graph.nodes:
        if node.name in names and node.op == "call_function":
            table.pop(node.target, None)
    with quiet():
        return program.run_decompositions(table).module()


def unknown_to(module: Any, names: Sequence[str]) -> list[str]:
    """Return the names that no value of a graph module has."""
    known = {called(node) for node in module.graph.nodes}
    return [name for name in names if name not in known]


def called(node: Any) -> str:
    """Return what a node of a program's module is called in the program: a module's graph calls an ``input`` otherwise."""
    return str(node.target if node.op == "placeholder" else node.name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's warnings about itself away from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def torch_on(device: str, what: str) -> Any:
    """Return torch, after checking that a device is there.

    Raises:
        RunError: If torch or the device is not.
    """
    try:
        import torch
    except ImportError as error:
        raise RunError(f"{what} is to be run in torch, which is not installed", "pip install torch") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise RunError("there is no CUDA device that torch can use", "leave out --device, or install torch for CUDA")
    return torch


def check_known_types(program: Any, what: str) -> None:
    """Raise RunError where a value of a program is bfloat16, of which numpy knows nothing."""
    import torch

    if any(getattr(node.meta.get("val"), "dtype", None) is torch.bfloat16 for node in program.graph.nodes):
        raise RunError(f"{what} holds bfloat16, which is not calibrated in torch", "leave out --runtime and --device")


def spec_of(name: str, value: Any) -> InputSpec:
    """Return an input's name, dtype and shape; symbolic sizes are free."""
    dtype = np.dtype(str(value.dtype).removeprefix("torch."))
    return InputSpec(name, dtype, tuple(size if isinstance(size, int) else None for size in value.shape))


def first_line(error: Exception) -> str:
    """Return the first telling line of what torch says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
