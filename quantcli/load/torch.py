"""Load a PyTorch exported program (``.pt2``): torch.export → torch.onnx.export(dynamo=True)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING

import onnx_ir as ir

from quantcli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The exporter writes this operator set; naming it keeps the output the same when torch changes its default.
OPSET = 20


def load_pt2(path: Path) -> tuple[ir.Model, bytes]:
    """Return the model as ONNX, and its bytes.

    Raises:
        ModelError: If the file is not an exported program, or the exporter cannot express it in ONNX.
    """
    import torch

    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:
        raise ModelError(
            f"{path} is not an exported program, or is cut short", "save it with torch.export.save"
        ) from error
    try:
        with quiet():
            exported = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
            if exported is None:
                raise ModelError(f"{path} gave no ONNX model")
            data = exported.model_proto.SerializeToString(deterministic=True)
    except ModelError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{path} cannot be expressed in ONNX ({reason})", "see the exporter's report: -v") from error
    import onnx

    return ir.from_proto(onnx.load_from_string(data)), data


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress prints and warnings away from the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
