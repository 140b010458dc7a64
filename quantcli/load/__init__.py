"""Load a saved float model, whatever its kind, as an `onnx_ir.Model`."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import ModelError, UsageError, check_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.datasets.dataset import InputSpec
    from quantcli.load.learned import Learned

    # Called with the names of a module's arguments; gives the first samples of the data under those that it has arrays for.
    Example = Callable[[Sequence[str]], dict[str, NDArray[Any]]]

# What torch writes: state dicts, whole modules, TorchScript.
TORCH_FILES = frozenset(
    {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".ts", ".jit", ".torchscript", ".safetensors"}
)
KINDS = ".onnx, .pt2, TorchScript (.pt, .ts), or a state dict (.pt, .pth, .safetensors) with --factory"


@dataclass(frozen=True)
class Opening:
    """How a PyTorch model is opened that does not say all of itself.

    Attributes:
        factory: What builds the module that a state dict belongs to: ``module:callable`` or ``file.py:callable``.
        trusted: Whether a file may run what code it holds.
        inputs: Example inputs, by the module's arguments; without any, the data shows what they look like.
        dynamic: Axes besides the batch that stay free: (argument, axis).
    """

    factory: str | None = None
    trusted: bool = False
    inputs: tuple[InputSpec, ...] = ()
    dynamic: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A float model as it was saved.

    Attributes:
        graph: The model, float32 where it is bfloat16. It is not changed after loading.
        runnable: What ONNX Runtime is given to run it: its file, or the bytes of its exported or float32 form.
        sha256: The digest of the file (and of its external data, and of the factory's source).
        size: The bytes of the file (and of its external data).
        name: The file's name, without its folder.
        files: The files that it is made of.
        program: The exported program of a PyTorch model; None of an ONNX one.
        aliases: The program's own names of the outputs that the graph calls otherwise, and of all inputs.
        learned: What a prepared model has learned; None of any other.
    """

    graph: ir.Model
    runnable: Path | bytes
    sha256: str
    size: int
    name: str
    files: tuple[Path, ...]
    program: Any = field(default=None, repr=False)
    aliases: dict[str, str] = field(default_factory=dict)
    learned: Learned | None = None

    @functools.cached_property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What the model is fed with, those inputs marked that only ever mask scores."""
        from quantcli.scores import inputs_of

        return inputs_of(self.graph, self.name)


def checked_opening(opening: Opening | None) -> Opening:
    """Return how a model is opened, or the defaults.

    Raises:
        UsageError: If it is no opening.
    """
    check_kind(opening, Opening, "opening", "give a quantcli.Opening")
    return opening or Opening()


def load(path: Path, opening: Opening | None = None, example: Example | None = None) -> LoadedModel:
    """Load a model.

    Args:
        path: An ``.onnx`` file, or one that torch wrote.
        opening: How it is opened; None for the defaults.
        example: Shows what the inputs look like, of a model that does not say.

    Raises:
        ModelError: If there is no such file, it is of no known kind, or it cannot be loaded.
        UsageError: If the opening asks for what has no meaning for this kind.
    """
    path, opening = Path(path), checked_opening(opening)
    if not path.is_file():
        raise ModelError(f"there is no model at {path}", f"give {KINDS}")
    if path.suffix == ".onnx":
        from quantcli.load import onnx

        if opening.factory or opening.inputs or opening.dynamic:
            raise UsageError(f"{path} is ONNX, which says all of itself", "leave out --factory, --input and --dynamic")
        graph, files = onnx.load_onnx(path)
        return in_known_types(
            LoadedModel(graph, path, digest_of(files), bytes_of(files), shown_name(path), tuple(files))
        )
    if path.suffix == ".pt2" or path.suffix in TORCH_FILES:
        from quantcli.load import torch

        opened = torch.load_torch(path, opening, example)
        files = [path, *opened.sources]
        made = LoadedModel(
            opened.graph,
            opened.exported,
            digest_of(files),
            bytes_of([path]),
            shown_name(path),
            tuple(files),
            opened.program,
            opened.aliases,
            opened.learned,
        )
        return in_known_types(made)
    raise ModelError(f"{path} is of no known kind of model", f"give {KINDS}")


def in_known_types(model: LoadedModel) -> LoadedModel:
    """Return a model without bfloat16, of which neither numpy nor most of ONNX Runtime's kernels know.

    Raises:
        ModelError: If it is too large for that.
    """
    from quantcli.precision import without_bfloat16
    from quantcli.probe import LARGEST_MODEL, model_bytes, weight_bytes

    wide = without_bfloat16(model.graph)
    if wide is None:
        return model
    if weight_bytes(wide) > LARGEST_MODEL:
        raise ModelError(
            f"{model.name} is bfloat16, and in float32 it would have more than 2 GB", "export it in float32"
        )
    return replace(model, graph=wide, runnable=model_bytes(wide))


def shown_name(path: Path) -> str:
    """Return a file's name as text; bytes of it that are no UTF-8 become a replacement character."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def bytes_of(files: list[Path]) -> int:
    """Return how many bytes files hold."""
    return sum(file.stat().st_size for file in files)


def digest_of(files: list[Path]) -> str:
    """Return the sha256 over the bytes of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
