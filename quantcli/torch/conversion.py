"""From a live model to integers: through the same plan and writers as a saved one."""

from __future__ import annotations

import hashlib
import inspect
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibration.errors import DataError
from quantcli.errors import kind_of
from quantcli.files import path_of
from quantcli.load import LoadedModel, in_known_types
from quantcli.load.exporter import EXPORTING
from quantcli.load.learned import learned_of
from quantcli.load.torch import exported, opened
from quantcli.pipeline import convert as convert_file
from quantcli.torch.floats import floated
from quantcli.torch.given import checked
from quantcli.torch.prepare import taken_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from torch import nn

    from quantcli.pipeline import Conversion
    from quantcli.recipe import Recipe
    from quantcli.sidecar import Sidecar


def convert(
    model: nn.Module, output: Path | str, loader: Iterable[Any], recipe: Recipe | None = None, **options: Any
) -> Conversion:
    """Quantize a live model, prepared or not, and write the quantized model and its sidecar.

    What a prepared model has learned stands: its ranges, its widths, and its weights on their grids. Activations that no quantizer
    rounds get ranges from the data; layers that were not prepared stay float.

    Args:
        model: The module; it stays as it is.
        output: The quantized model, ``.onnx`` or ``.pt2``.
        loader: Calibration batches, as `quantcli.torch.calibrate` takes them.
        recipe: What the user wants; None for the defaults.
        options: Further options of `quantcli.convert`.

    Raises:
        ReportedError: If the model cannot be exported or converted; nothing is written then.
    """
    model = checked(model, recipe, loader)
    output = path_of(output, "output")
    samples = samples_of(model, loader)
    kind = type(model).__name__
    with EXPORTING:
        plain, layers = floated(model)
        program = exported(plain, Path(kind), tuple(samples), example=lambda _: samples)
        made = opened(Path(kind), program)
    digest = hashlib.sha256(made.exported).hexdigest()
    learned = learned_of(made.graph.graph, layers) if any(layer.prepared for layer in layers) else None
    source = in_known_types(
        LoadedModel(made.graph, made.exported, digest, len(made.exported), kind, (), program, made.aliases, learned)
    )
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "samples.npz"
        with zipfile.ZipFile(data, "w") as archive:  # numpy.savez takes no array called ``file``
            for name, values in samples.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values)
        return convert_file(source, output, data=data, recipe=recipe, **options)


def to_sidecar(model: nn.Module, loader: Iterable[Any], recipe: Recipe | None = None, **options: Any) -> Sidecar:
    """Return every integer of a live model, without writing a model.

    Args:
        model: The module, prepared or not.
        loader: Calibration batches.
        recipe: What the user wants; None for the defaults.
        options: Further options of `quantcli.convert`.

    Raises:
        ReportedError: If the model cannot be exported or converted.
    """
    model = checked(model, recipe, loader)
    with tempfile.TemporaryDirectory() as folder:
        return convert(model, Path(folder) / f"{type(model).__name__}.onnx", loader, recipe, **options).sidecar


def samples_of(model: nn.Module, loader: Iterable[Any]) -> dict[str, NDArray[Any]]:
    """Return everything that a loader yields, by the names of a module's arguments.

    Raises:
        DataError: If it yields nothing, or batches that do not fit together.
    """
    known = list(inspect.signature(model.forward).parameters) or ["x"]
    parts: dict[str, list[NDArray[Any]]] = {}
    for batch in loader:
        arguments, keywords = taken_of(batch, model)
        for name, value in {**dict(zip(known, arguments, strict=False)), **keywords}.items():
            if name in known:
                parts.setdefault(name, []).append(array_of(value, name))
    if not parts:
        raise DataError("the loader yields no batch", "give at least one")
    try:
        samples = {name: np.concatenate(values) for name, values in parts.items()}
    except ValueError as error:
        raise DataError(
            f"the loader's batches do not fit together ({error})", "give samples of one shape: pad sequences"
        ) from error
    if len({len(values) for values in samples.values()}) > 1:
        counts = ", ".join(f"{len(values)} of '{name}'" for name, values in samples.items())
        raise DataError(f"the loader yields {counts}", "give as many samples of each, in every batch")
    return samples


def array_of(value: Any, name: str) -> NDArray[Any]:
    """Return a tensor as an array.

    Raises:
        DataError: If it is none, or arrays have no such type.
    """
    if not isinstance(value, torch.Tensor):
        raise DataError(f"'{name}' of the loader's batches is {kind_of(value)}", "yield tensors")
    try:
        found: NDArray[Any] = value.detach().cpu().numpy()
    except TypeError as error:
        kind = str(value.dtype).removeprefix("torch.")
        raise DataError(
            f"the loader yields {kind}, which cannot be saved as calibration data",
            "convert model.float(), with float32",
        ) from error
    return found
