"""What is written: the quantized model in the form that was asked for, checked before it gets its name."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from quantcli.embedded.describe import FILE
from quantcli.embedded.naming import check_name
from quantcli.errors import OutputError, RecipeError, UsageError, VerifyError
from quantcli.evaluation.check import SelfCheck, self_check
from quantcli.fold import release
from quantcli.integer.held import Held
from quantcli.integer.verify import verify as compare_integers
from quantcli.integer.weights import verify_weights as compare_weights
from quantcli.probe import LARGEST_MODEL, model_bytes, split, weight_bytes
from quantcli.recipe import resolve_target, with_integer_start
from quantcli.sidecar import FileEntry
from quantcli.tune.wide import may_widen
from quantcli.tune.widths import AROUND, FLOAT, STORED, WIDE, WIDEST, Width
from quantcli.write import WRITERS
from quantcli.write.onnx_stored import fold_at_load

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import onnx_ir as ir

    from calibration.statistics import Statistics
    from quantcli.embedded.deliver import Source
    from quantcli.files import Staged
    from quantcli.integer.verify import Verification
    from quantcli.load import LoadedModel
    from quantcli.quantize import QuantizedModel
    from quantcli.recipe import Recipe
    from quantcli.sidecar import Sidecar


# Forms that are C, beside the ONNX model that computes the same.
C_FORMS = ("c", "c-params")


@dataclass(frozen=True, eq=False)
class Delivery:
    """A quantized model as bytes.

    Attributes:
        onnx: The ONNX model.
        program: The exported PyTorch program that is written in its place; None where it is the ONNX model itself.
        weights: The parts of the file beside it that holds its large weights; empty where it is small enough to be one file.
    """

    onnx: bytes
    program: bytes | None = None
    weights: tuple[bytes | ir.TensorProtocol, ...] = ()

    @property
    def content(self) -> bytes:
        """What is written."""
        return self.onnx if self.program is None else self.program

    def entry(self, name: str) -> FileEntry:
        """Return what a sidecar says of the file, and of the weights beside it."""
        digest, size = hashlib.sha256(self.content), len(self.content)
        for part in self.chunks():
            digest.update(part)
            size += len(part)
        return FileEntry(name, digest.hexdigest(), size)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the file of weights."""
        for part in self.weights:
            yield part if isinstance(part, bytes) else part.tobytes()
            release(part)

    def laid(self, model: Path, writing: Staged) -> Path | None:
        """Write a model of two files to where it can be run, under the names that it will have; None of one file."""
        if not self.weights:
            return None
        return writing.together(model, {model.name: [self.onnx], weights_beside(model).name: self.chunks()})

    def check(
        self, source: LoadedModel, sidecar: Sidecar, statistics: Statistics, verified: bool, laid: Path | None = None
    ) -> SelfCheck:
        """Run what is to be written on calibration samples; where asked, the integer executor against the runtime as well.

        Args:
            source: The float model.
            sidecar: The sidecar.
            statistics: Where the samples stand.
            verified: Whether the integer executor is run.
            laid: Where the model stands, if it is of two files.

        Raises:
            ReportedError: If it does not work, or its integers are not the sidecar's.
        """
        check = self_check(source, laid or self.onnx, sidecar, statistics, self.program)
        if verified:
            about = sidecar
            if self.program is not None:  # the sidecar speaks of that
                about = msgspec.structs.replace(sidecar, model=Delivery(self.onnx).entry(sidecar.model.name))
            held = Held.of_bytes(self.onnx) if laid is None else Held.of_file(laid)
            static = sidecar.mode == "static"
            samples = [statistics.check_inputs]
            require_verified(compare_integers(held, about, samples) if static else compare_weights(held, about))
        return check


def rendered(quantized: QuantizedModel, form: str, output: Path, source: LoadedModel) -> Delivery:
    """Return a quantized model in the form that an output's name and the format ask for."""
    model = WRITERS["qdq" if form in C_FORMS else form](quantized)
    if form in WRITERS and output.suffix == ".onnx" and quantized.plan.target.placement.pays:
        fold_at_load(model, quantized)
    if weight_bytes(model) > LARGEST_MODEL and form in WRITERS and output.suffix == ".onnx":
        message, parts = split(model, weights_beside(output).name)
        return Delivery(message, weights=tuple(parts))
    return Delivery(model_bytes(model), as_program(model, source) if output.suffix == ".pt2" else None)


def widths_for(recipe: Recipe, form: str, output: Path) -> tuple[Width, ...]:
    """Return the widths that a search may raise layers to: 8 bits, 16 where form and target have them, and float but for C."""
    target = resolve_target(recipe)
    if form in C_FORMS:
        return (WIDE,)
    if may_widen(recipe):
        return (WIDE, AROUND, FLOAT)
    wider = target.weight.widest == WIDEST.bits and form == "qdq" and output.suffix == ".onnx"
    return (WIDE, WIDEST, STORED, FLOAT) if wider else (WIDE, FLOAT)


def weights_beside(model: Path) -> Path:
    """Return the file that holds the weights of a model that is too large for one file."""
    return model.with_name(f"{model.name}.data")


@dataclass(frozen=True)
class Places:
    """Where the outputs of a conversion stand.

    Attributes:
        model: The quantized model.
        sidecar: Its sidecar.
        folder: The folder of C source, which need not be there yet.
        header: The header of parameters.
        name: The model's name in C.
    """

    model: Path
    sidecar: Path
    folder: Path | None = None
    header: Path | None = None
    name: str = "model"

    @property
    def search(self) -> Path:
        """Where a search writes down its tries: beside what comes of it, since a folder of C source is made at the end."""
        found = self.folder or self.model
        return found.with_name(f"{found.name}.search")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files whose names are known before anything is done."""
        header = () if self.header is None else (self.header,)
        return (self.model, self.sidecar, *header)

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Make the folder, and take it away again where nothing comes into it.

        Raises:
            OutputError: If it cannot be made.
        """
        new = self.folder is not None and not self.folder.exists()
        if new and self.folder is not None:
            try:
                self.folder.mkdir()
            except OSError as error:
                what = f"{self.folder} cannot be made ({error.strerror or error})"
                raise OutputError(what, "choose another -o") from error
        try:
            yield
        finally:
            if new and self.folder is not None and not any(self.folder.iterdir()):
                self.folder.rmdir()


def places_of(output: Path, form: str, recipe: Recipe, name: str = "model", until: Sequence[str] = ()) -> Places:
    """Return where a conversion writes to.

    Raises:
        UsageError: If name or form are unknown, or they contradict each other or the recipe.
    """
    if form not in C_FORMS:
        if until:
            raise UsageError("--end-at is for C source", "leave it out, or choose --format c")
        check_form(output, form, recipe)
        return Places(output, output.with_suffix(".json"))
    if recipe.mode != "static":
        raise UsageError(f"C source is integers alone, and --mode {recipe.mode} is not", "leave out --mode")
    if recipe.tune.optimize is not None:
        raise UsageError("--optimize latency times ONNX Runtime, and C source does not run there", "leave it out")
    check_name(name)
    if form == "c":
        if output.suffix in {".onnx", ".pt2", ".json", ".h", ".c"} or output.is_file():
            raise UsageError(f"C source is a folder, and {output} is a file", "name a folder")
        if output.is_dir() and any(output.iterdir()) and not (output / FILE).is_file():
            raise UsageError(
                f"the folder {output} holds something else than C source", "name an empty one, or a new one"
            )
        return Places(output / f"{name}.onnx", output / f"{name}.json", output, None, name)
    if output.suffix != ".h":
        raise UsageError(f"parameters are a header, and {output} is none", "name it .h")
    if until:
        raise UsageError("--end-at is for C source, and parameters are those of the whole model", "leave it out")
    return Places(output.with_suffix(".onnx"), output.with_suffix(".json"), None, output, name)


def check_search(recipe: Recipe, form: str, resume: bool, validate: bool) -> None:
    """Check that what is said of a search is said of one, and that what it is to keep low can be told.

    Raises:
        UsageError: If nothing is searched, or what is written does not run where it would be timed.
    """
    wishes = recipe.tune
    if wishes.max_drop is None and (resume or validate):
        what = "--resume goes on with" if resume else "--validate judges"
        raise UsageError(f"{what} a search, and there is none", "give --max-drop, or leave it out")
    if wishes.cost is not None and wishes.max_drop is None:
        raise UsageError("--cost is what --max-drop keeps low, and there is no --max-drop", "give --max-drop")
    if wishes.cost != "latency":
        return
    what = "C source does" if form in C_FORMS else f"models for {recipe.target} do"
    if form in C_FORMS or not resolve_target(recipe).placement.pays:
        raise UsageError(f"--cost latency times ONNX Runtime, and {what} not run there", "leave it out")


def for_form(recipe: Recipe, form: str, strict: bool = False) -> Recipe:
    """Return a recipe for a form, and for a model in which nothing is to stay float.

    C has no float operators beside its integers, and quantizes whatever can be. Activations of two widths are for QDQ alone.

    Args:
        recipe: What the user wants.
        form: What is written.
        strict: Whether the first convolutions are to be integer layers, too, where float is faster.

    Raises:
        RecipeError: If it wants activations of two widths where there is one for all.
    """
    if strict:
        recipe = with_integer_start(recipe)
    if form == "qdq":
        return recipe
    if recipe.tune.widen:
        raise RecipeError(
            f"[tune] widen gives some activations 16 bits, and --format {form} has one width for all",
            "leave it out, or choose --activation-dtype int16 for all",
        )
    recipe = msgspec.structs.replace(recipe, tune=msgspec.structs.replace(recipe.tune, widen=False))
    if form not in C_FORMS:
        return recipe
    return msgspec.structs.replace(recipe, layers=msgspec.structs.replace(recipe.layers, everywhere=True))


def beside(
    places: Places,
    delivery: Delivery,
    sidecar: Sidecar,
    statistics: Statistics,
    constants: Mapping[str, Any],
    until: Sequence[str],
) -> tuple[dict[Path, bytes], Source | None]:
    """Return what is written beside the model and its sidecar: C source, or a header of parameters."""
    if places.header is not None:
        from quantcli.embedded.params import header

        biases = {name: np.asarray(constants[name]) for name, t in sidecar.tensors.items() if t.role == "bias"}
        return {places.header: header(sidecar, biases, places.name).encode()}, None
    if places.folder is None:
        return {}, None
    from quantcli.embedded.deliver import written

    found = written(delivery.onnx, sidecar, statistics.check_inputs, places.name, until)
    return {places.folder / name: content for name, content in found.files.items()}, found


def check_form(output: Path, form: str, recipe: Recipe) -> None:
    """Check that an output can be written.

    Raises:
        UsageError: If its name or form is unknown, or they contradict each other or the recipe.
    """
    if output.suffix not in {".onnx", ".pt2"}:
        raise UsageError(f"the output {output} is of no known kind", "name it .onnx or .pt2")
    if form not in WRITERS:
        raise UsageError(f"there is no format '{form}'", f"known: {', '.join((*WRITERS, *C_FORMS))}")
    if output.suffix == ".pt2" and (form != "qdq" or recipe.mode == "dynamic"):
        what = "--mode dynamic" if form == "qdq" else f"the format '{form}'"
        raise UsageError(f"{what} is for ONNX, and {output} is a PyTorch program", "name the output .onnx")


def as_program(model: ir.Model, source: LoadedModel) -> bytes:
    """Return a quantized model as an exported PyTorch program, which is called as its source is."""
    from quantcli.write import torch_pt2

    return torch_pt2.write(model, source.program)


def require_verified(verification: Verification) -> None:
    """Raise VerifyError where something differs without an explanation."""
    if verification.findings:
        more = f" (and {len(verification.findings) - 1} more)" if len(verification.findings) > 1 else ""
        raise VerifyError(
            f"{verification.findings[0]}{more}", "the files do not belong together, or please report this"
        )
