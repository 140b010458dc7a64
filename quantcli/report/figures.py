"""What a report shows, as numbers: everything that a chart draws stands here first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.hooks.onnxruntime import Runner
from quantcli.evaluation.compare import moved
from quantcli.fold import fold
from quantcli.probe import with_outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantcli.evaluation.evaluate import Evaluation
    from quantcli.load import LoadedModel
    from quantcli.sidecar import Sidecar

BINS = 48
# Histograms are drawn of so many tensors at most; the others are counted.
MOST = 240


@dataclass(frozen=True)
class Histogram:
    """How an activation's float values lie, and what its grid keeps of them.

    Attributes:
        name: The tensor.
        lo, hi: The lowest and highest real value that the grid represents.
        minimum, maximum: The lowest and highest value seen.
        counts: How many values lie in each of equal bins from the lowest to the highest value.
        clipped: The share of values beyond the grid.
    """

    name: str
    lo: float
    hi: float
    minimum: float
    maximum: float
    counts: tuple[int, ...]
    clipped: float


@dataclass(frozen=True)
class Channels:
    """The largest magnitude that each channel of a weight represents.

    Attributes:
        name: The weight.
        layer: The layer that reads it.
        bits: The width of its grid.
        largest: One magnitude per channel, or one.
    """

    name: str
    layer: str
    bits: int
    largest: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Figures:
    """Everything that a report shows."""

    sidecar: Sidecar
    evaluation: Evaluation
    histograms: tuple[Histogram, ...]
    left_out: int
    channels: tuple[Channels, ...]

    def document(self) -> dict[str, Any]:
        """Return the numbers for machines."""
        found, timing = self.evaluation, self.evaluation.latency
        return {
            "model": self.sidecar.model.name,
            "float_model": self.sidecar.float_model.name,
            "bytes": found.size,
            "float_bytes": found.reference_size,
            "metric": found.metric,
            "samples": found.samples,
            "quantized": found.quantized,
            "float": found.reference,
            "drop": found.drop,
            "speedup": timing.ratio if timing is not None else None,
            "sqnr_db": found.sqnr,
            **self.charts(),
            "float_layers": [
                {"name": f.name, "operator": f.operator, "reason": f.reason} for f in self.sidecar.float_layers
            ],
        }

    def charts(self) -> dict[str, Any]:
        """Return the numbers that the charts draw."""
        found = self.evaluation
        return {
            "layers": [
                {"name": layer.name, "operator": layer.operator, "sqnr_db": layer.sqnr, "lost_db": layer.lost}
                for layer in found.layers
            ],
            "activations": [
                {
                    "name": h.name,
                    "grid": [h.lo, h.hi],
                    "seen": [h.minimum, h.maximum],
                    "clipped": h.clipped,
                    "counts": list(h.counts),
                }
                for h in self.histograms
            ],
            "weights": [
                {"name": c.name, "layer": c.layer, "bits": c.bits, "largest": list(c.largest)} for c in self.channels
            ],
        }


def figures(sidecar: Sidecar, evaluation: Evaluation, source: LoadedModel, feeds: dict[str, NDArray[Any]]) -> Figures:
    """Return what a report shows.

    Args:
        sidecar: The sidecar.
        evaluation: The evaluation, with its layers.
        source: The float model.
        feeds: Samples to draw the activations of.
    """
    owners = [name for name, t in sidecar.tensors.items() if t.role == "activation" and t.same_as is None]
    return Figures(
        sidecar,
        evaluation,
        histograms(sidecar, owners[:MOST], source, feeds),
        max(len(owners) - MOST, 0),
        channels(sidecar),
    )


def histograms(
    sidecar: Sidecar, names: list[str], source: LoadedModel, feeds: dict[str, NDArray[Any]]
) -> tuple[Histogram, ...]:
    """Return how the float model's activations lie, over some samples."""
    folded = fold(source.graph, requantize=True, matrices=sidecar.mode == "static")
    held = {str(value.name) for node in folded.graph for value in node.outputs}
    wanted = [name for name in names if name in held]  # not what tuning has put there
    values = {**feeds, **Runner(with_outputs(folded, wanted), what=source.name).run(feeds, wanted)}
    found = []
    for name in names:
        if name not in values or values[name].dtype.kind != "f" or not values[name].size:
            continue
        tensor = sidecar.tensors[name]
        now = values[name] if tensor.moved is None else moved(values[name], tensor.moved)
        x = now.astype(np.float64).reshape(-1)
        lo, hi = ((q - tensor.zero_point[0]) * tensor.scale[0] for q in (tensor.qmin, tensor.qmax))
        minimum, maximum = float(x.min()), float(x.max())
        counts = np.histogram(x, BINS, (minimum, maximum if maximum > minimum else minimum + 1.0))[0]
        step = tensor.scale[0] / 2  # what lies within half a step of the ends is rounded, not clipped
        clipped = float(((x < lo - step) | (x > hi + step)).mean())
        found.append(Histogram(name, lo, hi, minimum, maximum, tuple(counts.tolist()), clipped))
    return tuple(found)


def channels(sidecar: Sidecar) -> tuple[Channels, ...]:
    """Return the magnitudes of every weight's channels."""
    found = []
    for layer in sidecar.layers:
        for name in layer.inputs:
            tensor = sidecar.tensors.get(name)
            if tensor is None or tensor.role != "weight" or tensor.blocks is not None:
                continue
            largest = tuple(scale * tensor.qmax for scale in tensor.scale)
            found.append(Channels(name, layer.name, tensor.qmax.bit_length() + 1, largest))
    return tuple(found)
