"""Run an ONNX model with ONNX Runtime, on the CPU."""

from __future__ import annotations

import functools
import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets.dataset import InputSpec
from calibration.errors import RunError
from calibration.hooks import pairs
from calibration.hooks.blocks import in_blocks
from calibration.memory import trim

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    from calibration.layout import Layout

EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# Models of more bytes are run without copies of their weights, if a little slower.
WORTH_SPARING = 1 << 30
# Where in ONNX Runtime's source an error arose: a file, a line, and a C++ function with its signature.
SOURCE = re.compile(
    r"\S*onnxruntime/\S+:\d+ (?:[^()]|\(anonymous namespace\))*\([^()]*\)(?: const)?(?: \[with [^\]]*\])? ?"
)
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint64)": "uint64",
    "tensor(uint32)": "uint32",
    "tensor(uint16)": "uint16",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True, eq=False)
class Bundle:
    """A model too large for one message: its bytes without its large weights, and those weights where they are.

    Attributes:
        data: The model's bytes.
        weights: Weights in memory, by name.
        folder: Where the files lie that hold the others.
    """

    data: bytes
    weights: dict[str, NDArray[Any]]
    folder: str = ""


Source = bytes | Path | Bundle


def openable(model: Path) -> str | bytes:
    """Return a model's path, or its bytes where the path is no UTF-8: ONNX Runtime takes none other."""
    try:
        str(model).encode()
    except UnicodeEncodeError:
        return model.read_bytes()
    return str(model)


class Runner:
    """A model loaded into ONNX Runtime.

    Args:
        model: A model's bytes, the path of its file, a bundle, or a function that makes bytes or a bundle, again where needed.
        threads: Threads within an operator; 0 lets ONNX Runtime choose.
        what: What to call the model in errors.
        profile: What the file of ONNX Runtime's profiler is to begin with; None for no profile.
        exact: Whether a quantized model is to give what ONNX says, where this machine's integer kernels do not
            (`calibration.hooks.pairs`).
        optimized: Where to write the graph as ONNX Runtime has optimized it; None for nowhere.
        unordered: Outputs of which the order of elements within a sample does not matter (`calibration.hooks.blocks`).

    Raises:
        RunError: If ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: Source | Callable[[], bytes | Bundle],
        threads: int = 0,
        what: str = "the model",
        profile: Path | None = None,
        exact: bool = False,
        optimized: Path | None = None,
        unordered: Collection[str] = (),
    ) -> None:
        self.what, self.threads, self.profile, self.exact, self.optimized = what, threads, profile, exact, optimized
        self.unordered = unordered
        self.again = model if callable(model) else None
        self.loaded: Any = self.load(model() if callable(model) else model)

    def load(self, model: Source) -> Any:
        """Return a session.

        Raises:
            RunError: If ONNX Runtime refuses the model.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4
        if self.profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(self.profile)
        if self.optimized is not None:
            options.optimized_model_filepath = str(self.optimized)
        if self.exact and isinstance(model, Bundle) and pairs.saturates():
            pairs.as_it_stands(options)
        elif self.exact and not isinstance(model, Bundle):
            model = pairs.exact(model, options)
        try:
            if isinstance(model, Bundle):
                values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in model.weights.values()]
                options.add_external_initializers(list(model.weights), values)
                if model.folder:
                    options.add_session_config_entry(EXTERNAL_FOLDER, model.folder)
            if isinstance(model, Bundle) or (isinstance(model, Path) and folder_size(model) > WORTH_SPARING):
                # A kernel's own copy of its weights would double what a large model takes.
                options.add_session_config_entry("session.disable_prepacking", "1")
            if isinstance(model, bytes) and (found := self.in_blocks(model, options)) is not None:
                return found
            given = model.data if isinstance(model, Bundle) else openable(model) if isinstance(model, Path) else model
            return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise RunError(f"ONNX Runtime refuses {self.what} ({first_line(error)})") from error

    def in_blocks(self, model: bytes, options: Any) -> Any:
        """Return a session that hands out tensors in ONNX Runtime's own order; None where there is none, or nothing is gained."""
        import onnxruntime

        optimized = in_blocks(model, self.unordered, functools.partial(self.optimize, model))
        if optimized is None:
            return None
        levels, level = onnxruntime.GraphOptimizationLevel, options.graph_optimization_level
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
        try:
            return onnxruntime.InferenceSession(optimized, options, providers=["CPUExecutionProvider"])
        except Exception:  # noqa: BLE001 - ONNX Runtime's own file; whatever ails it, the model itself is there
            options.graph_optimization_level = level
            return None

    def optimize(self, model: bytes, file: Path) -> None:
        """Write the graph of a model as ONNX Runtime has optimized it."""
        Runner(model, self.threads, self.what, optimized=file)
        trim()

    @property
    def session(self) -> Any:
        """The session; loaded again where it was let go."""
        if self.loaded is None and self.again is not None:
            self.loaded = self.load(self.again())
        return self.loaded

    def rest(self) -> None:
        """Let the session go, where it can be loaded again."""
        if self.again is not None:
            self.loaded = None
            trim()

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The model's inputs."""
        specs = []
        for node in self.session.get_inputs():
            if node.type not in DTYPES:
                raise RunError(
                    f"input '{node.name}' of {self.what} has the type {node.type}", "only tensors can be fed"
                )
            shape = tuple(size if isinstance(size, int) and size > 0 else None for size in node.shape)
            specs.append(InputSpec(node.name, np.dtype(DTYPES[node.type]), shape))
        return tuple(specs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the model's outputs."""
        return tuple(node.name for node in self.session.get_outputs())

    def frame(self, layout: Layout) -> Frame:
        """Return a buffer that batches can be run into."""
        return Frame(self, layout)

    def run(self, feeds: dict[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Run one batch and return the asked outputs (all of them by default) by name.

        Raises:
            RunError: If ONNX Runtime fails.
        """
        names = list(outputs) if outputs is not None else list(self.outputs)
        if not names:
            return {}  # an empty list would mean all outputs to ONNX Runtime
        try:
            return dict(zip(names, self.session.run(names, feeds), strict=True))
        except Exception as error:
            raise failure(self.what, feeds, error) from error


class Frame:
    """A buffer that ONNX Runtime writes the outputs of batches of one shape into, one batch after the other.

    Args:
        runner: The model.
        layout: Where its outputs lie, and inputs among them.

    Attributes:
        buffer: float32.
        views: Its tensors by name.
    """

    def __init__(self, runner: Runner, layout: Layout) -> None:
        self.what, self.session = runner.what, runner.session
        self.buffer = layout.buffer()
        self.views = layout.views(self.buffer)
        self.binding: Any = self.session.io_binding()
        self.fed = {spec.name: spec.dtype for spec in runner.inputs}
        for name, view in self.views.items():
            if name not in self.fed:
                self.binding.bind_output(name, "cpu", 0, np.float32, view.shape, view.ctypes.data)

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run one batch and return its tensors by name; they stay until the next one is run.

        Raises:
            RunError: If ONNX Runtime fails, or a tensor has another shape than the layout's.
        """
        held = {name: np.ascontiguousarray(values, dtype=self.fed[name]) for name, values in feeds.items()}
        try:
            for name, values in held.items():
                self.binding.bind_input(name, "cpu", 0, values.dtype.type, values.shape, values.ctypes.data)
                if name in self.views:
                    np.copyto(self.views[name], values)
            self.session.run_with_iobinding(self.binding)
        except Exception as error:
            raise failure(self.what, feeds, error) from error
        return dict(self.views)


def failure(what: str, feeds: dict[str, NDArray[Any]], error: Exception) -> RunError:
    """Return the error that says what a model was run on when the runtime failed."""
    shapes = ", ".join(f"{name} {'x'.join(map(str, values.shape))}" for name, values in feeds.items())
    return RunError(f"ONNX Runtime fails while running {what} on {shapes} ({first_line(error)})")


def folder_size(path: Path) -> int:
    """Return the bytes of a model's file and of the data beside it whose name begins with its own."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{glob.escape(path.name)}*") if file.is_file())


def first_line(error: Exception) -> str:
    """Return the telling part of a runtime's message: its last line, without the source position."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = SOURCE.sub("", lines[-1]) if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
