"""What a model or its data can hardly be meant to hold: weights that are not finite, samples that are all alike."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from calibration.errors import DataError
from quantcli.errors import ModelError
from quantcli.fold import constant

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from calibration.statistics import Statistics


def all_alike(model: ir.Model, statistics: Statistics) -> str:
    """Say that no input of real numbers held two values over all samples: data that was not read, or divided away.

    Empty where one did, and where none was observed.
    """
    observed = [(value.name, statistics.tensors.get(str(value.name))) for value in model.graph.inputs]
    seen = [(name, held) for name, held in observed if held is not None and held.elements > 1]
    if not seen or any(held.minimum != held.maximum for _, held in seen):
        return ""
    told = ", ".join(f"'{name}' {held.minimum:g}" for name, held in seen)
    return f"every value of every calibration sample is the same ({told}), so the ranges say nothing of real data"


@contextlib.contextmanager
def blamed_on_weights(model: ir.Model) -> Iterator[None]:
    """Where a tensor is not finite, look for the cause among the weights.

    Raises:
        ModelError: If a weight holds NaN or +∞ (−∞ masks), in place of the error that names what came of it.
    """
    try:
        yield
    except DataError as error:
        for name, value in model.graph.initializers.items():
            held = constant(value)
            if held is None or held.dtype.kind != "f":
                continue
            count = int(np.count_nonzero(np.isnan(held) | np.isposinf(held)))
            if count:
                raise ModelError(
                    f"the weight '{name}' holds {count} of {held.size} values that are not finite", "export it again"
                ) from error
        raise
