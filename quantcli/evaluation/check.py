"""The self-check: what was written is loaded, run on calibration samples, and compared with float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.hooks.onnxruntime import Runner
from quantcli.errors import OutputError
from quantcli.evaluation.compare import LayerSqnr, layer_sqnrs, worst
from quantcli.evaluation.metrics import Comparison

if TYPE_CHECKING:
    from calibration.statistics import Statistics
    from quantcli.load import LoadedModel
    from quantcli.sidecar import Sidecar

# Below this a self-check warns: the quantized output is then more noise than most uses bear.
LOW_SQNR = 10.0


@dataclass(frozen=True)
class SelfCheck:
    """What the written model did on calibration samples.

    Attributes:
        samples: How many samples were run.
        sqnr: The SQNR of every real output against the float model, in dB.
        suspects: Where an output lies below 10 dB, the layers that lost most.
    """

    samples: int
    sqnr: dict[str, float]
    suspects: tuple[LayerSqnr, ...]

    @property
    def low(self) -> bool:
        """Whether an output is below 10 dB."""
        return any(value < LOW_SQNR for value in self.sqnr.values())


def self_check(source: LoadedModel, written: bytes, sidecar: Sidecar, statistics: Statistics) -> SelfCheck:
    """Load what was written, run it on calibration samples, and compare it with the float model.

    Raises:
        OutputError: If an output that is finite in float is not finite any more.
        RunError: If the runtime refuses what was written.
    """
    feeds = statistics.check_inputs
    reference = Runner(source.runnable, what=source.name).run(feeds)
    result = Runner(written, what="the quantized model").run(feeds)
    for name, values in result.items():
        real = values.dtype.kind == "f"
        if real and np.isfinite(reference[name]).all() and not np.isfinite(values).all():
            raise OutputError(
                f"output '{name}' of the quantized model is not finite", "please report this, with the model"
            )
    comparison = Comparison()
    comparison.update(reference, result)
    sqnr = {name: difference.sqnr for name, difference in comparison.outputs.items()}
    suspects: tuple[LayerSqnr, ...] = ()
    if any(value < LOW_SQNR for value in sqnr.values()):
        suspects = tuple(worst(layer_sqnrs(source.graph, written, sidecar, [feeds])))
    return SelfCheck(len(next(iter(feeds.values()))), sqnr, suspects)
