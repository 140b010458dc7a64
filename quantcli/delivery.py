"""What is written: the quantized model in the form that was asked for, checked before it gets its name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from quantcli.errors import UsageError, VerifyError
from quantcli.evaluation.check import SelfCheck, self_check
from quantcli.integer.verify import verify as compare_integers
from quantcli.integer.weights import verify_weights as compare_weights
from quantcli.probe import model_bytes
from quantcli.sidecar import FileEntry
from quantcli.write import WRITERS

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from calibration.statistics import Statistics
    from quantcli.integer.verify import Verification
    from quantcli.load import LoadedModel
    from quantcli.quantize import QuantizedModel
    from quantcli.recipe import Recipe
    from quantcli.sidecar import Sidecar


@dataclass(frozen=True, eq=False)
class Delivery:
    """A quantized model as bytes.

    Attributes:
        onnx: The ONNX model.
        program: The exported PyTorch program that is written in its place; None where it is the ONNX model itself.
    """

    onnx: bytes
    program: bytes | None = None

    @property
    def content(self) -> bytes:
        """What is written."""
        return self.onnx if self.program is None else self.program

    def entry(self, name: str) -> FileEntry:
        """Return what a sidecar says of the file."""
        return FileEntry(name, hashlib.sha256(self.content).hexdigest(), len(self.content))

    def check(self, source: LoadedModel, sidecar: Sidecar, statistics: Statistics, verified: bool) -> SelfCheck:
        """Run what is to be written on calibration samples; where asked, the integer executor against the runtime as well.

        Raises:
            ReportedError: If it does not work, or its integers are not the sidecar's.
        """
        check = self_check(source, self.onnx, sidecar, statistics, self.program)
        if verified:
            of_onnx = FileEntry(sidecar.model.name, hashlib.sha256(self.onnx).hexdigest(), len(self.onnx))
            about = msgspec.structs.replace(sidecar, model=of_onnx)
            static = sidecar.mode == "static"
            samples = [statistics.check_inputs]
            require_verified(
                compare_integers(self.onnx, about, samples) if static else compare_weights(self.onnx, about)
            )
        return check


def rendered(quantized: QuantizedModel, form: str, output: Path, source: LoadedModel) -> Delivery:
    """Return a quantized model in the form that an output's name and the format ask for."""
    model = WRITERS[form](quantized)
    return Delivery(model_bytes(model), as_program(model, source) if output.suffix == ".pt2" else None)


def check_form(output: Path, form: str, recipe: Recipe) -> None:
    """Check that an output can be written.

    Raises:
        UsageError: If its name or form is unknown, or they contradict each other or the recipe.
    """
    if output.suffix not in {".onnx", ".pt2"}:
        raise UsageError(f"the output {output} is of no known kind", "name it .onnx or .pt2")
    if form not in WRITERS:
        raise UsageError(f"there is no format '{form}'", f"known: {', '.join(WRITERS)}")
    if output.suffix == ".pt2" and (form != "qdq" or recipe.mode == "dynamic"):
        what = "--mode dynamic" if form == "qdq" else f"the format '{form}'"
        raise UsageError(f"{what} is for ONNX, and {output} is a PyTorch program", "name the output .onnx")


def as_program(model: ir.Model, source: LoadedModel) -> bytes:
    """Return a quantized model as an exported PyTorch program, whose outputs are nested as its source's are."""
    from quantcli.write import torch_pt2

    return torch_pt2.write(model, source.program.call_spec.out_spec if source.program is not None else None)


def require_verified(verification: Verification) -> None:
    """Raise VerifyError where something differs without an explanation."""
    if verification.findings:
        more = f" (and {len(verification.findings) - 1} more)" if len(verification.findings) > 1 else ""
        raise VerifyError(
            f"{verification.findings[0]}{more}", "the files do not belong together, or please report this"
        )
