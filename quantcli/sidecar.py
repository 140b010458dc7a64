"""The sidecar: every integer of the quantized model as JSON, with a published, versioned schema (docs/sidecar.md)."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from quantcli.coherence import contradictions
from quantcli.errors import ModelError
from quantcli.recipe import Recipe
from quantcli.targets import Target
from quantcli.write.onnx_qdq import tensor_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from calibration.statistics import Statistics
    from quantcli.load import LoadedModel
    from quantcli.plan import LayerPlan, TensorPlan
    from quantcli.quantize import QuantizedModel

VERSION: Literal[2] = 2
SCHEMA_FILE = Path(__file__).parent / "sidecar.schema.json"


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """Anything in the sidecar: fixed once read, and nothing unknown in it."""


class FileEntry(Entry, frozen=True):
    """A model file: its name without its folder, its sha256 and its size."""

    name: str
    sha256: str
    bytes: int


class CalibrationEntry(Entry, frozen=True):
    """Where the ranges come from."""

    data_sha256: str
    samples: int
    observer: str
    synthetic: bool
    preprocess: dict[str, Any]
    selection: dict[str, Any]


class BlocksEntry(Entry, frozen=True):
    """A weight in blocks of ``size`` values along ``axis``: the model holds a scale and a zero point for each, by these names."""

    size: int
    axis: int
    scale: str
    zero_point: str | None
    sha256: str


class MovedEntry(Entry, frozen=True):
    """What a tensor is of the float model's of the same name: x · factor + shift, one of each or one per channel (axis 1)."""

    factor: list[float]
    shift: list[float]


class GridsEntry(Entry, frozen=True):
    """Grids of a weight that lie elsewhere for each scale: 2^bits integers from ``lowest``, one or one per channel."""

    bits: int
    lowest: list[int]


class TensorEntry(Entry, frozen=True):
    """One quantized tensor: real = scale · (q − zero_point), q in ``dtype`` from qmin to qmax."""

    role: Literal["activation", "constant", "weight", "bias"]
    dtype: Literal["uint4", "uint8", "int8", "int16", "int32"]
    qmin: int
    qmax: int
    scale: list[float]
    zero_point: list[int]
    axis: int | None
    lo: list[float]
    hi: list[float]
    samples: int
    same_as: str | None
    dead_channels: list[int]
    integers: str
    reals: str
    sha256: str | None
    blocks: BlocksEntry | None
    moved: MovedEntry | None = None
    grids: GridsEntry | None = None


class MultiplierEntry(Entry, frozen=True):
    """M = multiplier · 2^-shift, one or one per output channel; ``operand`` null: of the accumulator."""

    operand: str | None
    real: list[float]
    multiplier: list[int]
    shift: list[int]


class LayerEntry(Entry, frozen=True):
    """One integer layer; where its output stays real it is accumulator_scale · accumulator, and there is no clamp."""

    name: str
    operator: str
    arithmetic: Literal[
        "accumulate", "product", "sum", "mean", "rescale", "table", "softmax", "move", "lookup", "dynamic", "stored"
    ]
    inputs: list[str]
    outputs: list[str]
    absorbed: list[str]
    multipliers: list[MultiplierEntry]
    rounding: Literal["single", "double", "half_even", "floor"]
    clamp: tuple[int, int] | None
    accumulator_scale: list[float] | None
    table: list[int] | None


class FloatEntry(Entry, frozen=True):
    """One operator that stays float, and why."""

    name: str
    operator: str
    reason: str


class Sidecar(Entry, frozen=True):
    """The whole document."""

    format: Literal["quantcli-sidecar"]
    version: Literal[2]
    producer: str
    mode: Literal["static", "dynamic", "weights"]
    float_model: FileEntry
    model: FileEntry
    opset: int
    calibration: CalibrationEntry | None
    target: Target
    recipe: Recipe
    tensors: dict[str, TensorEntry]
    layers: list[LayerEntry]
    float_layers: list[FloatEntry]


def describe(
    quantized: QuantizedModel, source: LoadedModel, output: FileEntry, statistics: Statistics, recipe: Recipe
) -> Sidecar:
    """Return the sidecar of a written model."""
    from quantcli import __version__

    plan = quantized.plan
    names = tensor_names(quantized)
    return Sidecar(
        "quantcli-sidecar",
        VERSION,
        f"quantcli {__version__}",
        recipe.mode,
        FileEntry(source.name, source.sha256, source.size),
        output,
        quantized.model.opset_imports[""],
        calibration_entry(statistics) if recipe.mode == "static" else None,
        plan.target,
        msgspec.structs.replace(recipe, target=plan.target.name),
        {
            name: tensor_entry(tensor, names[name], quantized.constants.get(name))
            for name, tensor in plan.tensors.items()
        },
        [layer_entry(layer, quantized) for layer in plan.layers],
        [FloatEntry(layer.name, layer.operator, layer.reason) for layer in plan.floats],
    )


def calibration_entry(statistics: Statistics) -> CalibrationEntry:
    """Return where ranges come from."""
    return CalibrationEntry(
        statistics.data_sha256,
        statistics.samples,
        statistics.observer,
        statistics.synthetic,
        dict(sorted(statistics.preprocess.items())),
        dict(sorted(statistics.selection.items())),
    )


def blocks_entry(tensor: TensorPlan, names: dict[str, str]) -> BlocksEntry | None:
    """Return the entry of a weight in blocks; the digest is over its scales, then its zero points."""
    if tensor.blocks is None:
        return None
    parts = [tensor.blocks.scale, *([] if tensor.integer.signed else [tensor.blocks.zero_point])]
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()
    zero_point = None if tensor.integer.signed else names["zero_point"]
    return BlocksEntry(tensor.blocks.size, tensor.blocks.axis, names["scale"], zero_point, digest)


def tensor_entry(tensor: TensorPlan, names: dict[str, str], constant: NDArray[Any] | None) -> TensorEntry:
    """Return a tensor's entry."""
    return TensorEntry(
        tensor.role,  # type: ignore[arg-type]
        "uint4" if tensor.blocks is not None and tensor.integer.bits == 4 else tensor.integer.dtype.name,  # type: ignore[arg-type]
        *tensor.ends,
        list(tensor.scale),
        list(tensor.zero_point),
        tensor.axis,
        list(tensor.lo),
        list(tensor.hi),
        tensor.samples,
        tensor.same_as,
        list(tensor.dead),
        names["integers"],
        names["reals"],
        None if constant is None else hashlib.sha256(np.ascontiguousarray(constant).tobytes()).hexdigest(),
        blocks_entry(tensor, names),
        None if tensor.moved is None else MovedEntry(list(tensor.moved.factor), list(tensor.moved.shift)),
        GridsEntry(tensor.integer.bits, list(tensor.lowest)) if tensor.lowest else None,
    )


def layer_entry(layer: LayerPlan, quantized: QuantizedModel) -> LayerEntry:
    """Return a layer's entry."""
    table = quantized.tables.get(layer.name)
    return LayerEntry(
        layer.name,
        layer.operator,
        layer.arithmetic.value,
        list(layer.inputs),
        list(layer.outputs),
        list(layer.absorbed),
        [MultiplierEntry(m.operand, list(m.real), list(m.multiplier), list(m.shift)) for m in layer.multipliers],
        layer.rounding,  # type: ignore[arg-type]
        layer.clamp,
        None if layer.accumulator_scale is None else list(layer.accumulator_scale),
        table.tolist() if table is not None else None,
    )


def encode(sidecar: Sidecar) -> bytes:
    """Return the file's bytes: indented, lists of numbers on one line, floats in the shortest form that reads back exactly."""
    text = msgspec.json.format(msgspec.json.encode(sidecar), indent=2).decode()
    return re.sub(r"\[[-+.\deE,\s]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text).encode() + b"\n"


def read(path: Path) -> Sidecar:
    """Read a sidecar.

    Raises:
        ModelError: If it cannot be read, is not a sidecar of this version, or contradicts itself.
    """
    try:
        sidecar = msgspec.json.decode(path.read_bytes(), type=Sidecar)
    except (OSError, msgspec.DecodeError) as error:
        beside = path.with_suffix(".json")
        remedy = f"give its sidecar, {beside}" if beside != path and beside.is_file() else "convert the model again"
        raise ModelError(f"{path} is not a sidecar of version {VERSION} ({error})", remedy) from error
    found = next(contradictions(sidecar), None)
    if found is not None:
        raise ModelError(f"{path} contradicts itself: {found}", "convert the model again")
    return sidecar


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the document, made from the types above."""
    document = msgspec.json.schema(Sidecar)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"quantcli sidecar, version {VERSION}",
        **document,
    }


def stored_weights(sidecar: Sidecar, model: Path) -> dict[str, NDArray[Any]]:
    """Return the integers of every weight, by tensor name, from the quantized model's file.

    Raises:
        ModelError: If the file is no model, or not the one that the sidecar speaks of.
    """
    return stored_integers(sidecar, model, "weight")


def stored_integers(sidecar: Sidecar, model: Path, role: str) -> dict[str, NDArray[Any]]:
    """Return the integers of every constant of a role, by tensor name, from the quantized model's file.

    Raises:
        ModelError: If the file is no model, or not the one that the sidecar speaks of.
    """
    import onnx_ir as ir

    from quantcli.load import load

    loaded = load(model)
    if loaded.sha256 != sidecar.model.sha256:
        raise ModelError(f"{model} is not the model that its sidecar speaks of", "convert again")
    constants: dict[str, ir.Value] = dict(loaded.graph.graph.initializers)
    names = {name: tensor.integers for name, tensor in sidecar.tensors.items() if tensor.role == role}
    return {name: np.asarray(constants[stored].const_value) for name, stored in names.items() if stored in constants}
