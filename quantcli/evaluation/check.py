"""The self-check: what was written is loaded, run on calibration samples, and compared with float."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.datasets import samples_in, single
from calibration.errors import RunError
from calibration.hooks.onnxruntime import Runner
from calibration.hooks.pairs import saturates
from quantcli.errors import OutputError
from quantcli.evaluation.compare import LayerSqnr, layer_sqnrs, worst
from quantcli.evaluation.metrics import Comparison
from quantcli.evaluation.unfused import unfused
from quantcli.integer.held import Held
from quantcli.joined import parts_of
from quantcli.randomness import repeatable

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir
    from numpy.typing import NDArray

    from calibration.statistics import Statistics
    from quantcli.evaluation.metrics import Difference
    from quantcli.load import LoadedModel
    from quantcli.sidecar import Sidecar

# A quantized model that does not reach this part of float's speed is slower, noise or not.
SLOW = 0.85
# What a look at the speed may take, in seconds and runs, and what a second one may that has to agree before a model is called slow.
LOOKS = ((0.25, 8), (1.0, 40))
# Of how large a model: above, two of them would need too much memory.
LARGEST = 1 << 28
ENOUGH = 3
# Threads of those runs, as `eval` has them: more wait for one another, and where something else holds a core they tell nothing.
THREADS = 1
# Below this a run is mostly the call itself.
SHORTEST = 1e-4
# Below this a self-check warns: the quantized output is then more noise than most uses bear.
LOW_SQNR = 10.0
# What this machine's kernels may lose of an output before it is told, in dB.
LOSS_HERE = 0.5


@dataclass(frozen=True)
class SelfCheck:
    """What the written model did on calibration samples.

    Attributes:
        samples: How many samples were run.
        sqnr: The SQNR of every real output against the float model, in dB, of what ONNX says that the model gives.
        suspects: Where an output lies below 10 dB, the layers that lost most.
        speed: Float time ÷ quantized time over a few runs on one thread, roughly; None where that would take long, or hardly any
            time.
        batch: How many samples each of those runs had: one, unless the model fixes another number.
        parts: The SQNR of every part of outputs that are joined from several tensors, in dB.
        here: The SQNR of outputs of which this machine's kernels, which saturate (`calibration.hooks.pairs`), give less, in dB.
        unfused: The integer layers that ONNX Runtime computes in float, of targets that it is the runtime of.
    """

    samples: int
    sqnr: dict[str, float]
    suspects: tuple[LayerSqnr, ...]
    speed: float | None = None
    batch: int = 1
    parts: dict[str, float] = field(default_factory=dict)
    here: dict[str, float] = field(default_factory=dict)
    unfused: tuple[str, ...] = ()

    @property
    def slow(self) -> bool:
        """Whether the quantized model runs slower than float here, by more than such a short look errs."""
        return self.speed is not None and self.speed < SLOW

    @property
    def low(self) -> bool:
        """Whether an output is below 10 dB."""
        return any(value < LOW_SQNR for value in self.sqnr.values())


def self_check(
    source: LoadedModel,
    written: bytes | Path,
    sidecar: Sidecar,
    statistics: Statistics,
    program: bytes | None = None,
) -> SelfCheck:
    """Load what was written, run it on calibration samples, and compare it with the float model.

    Args:
        source: The float model.
        written: The quantized model, ONNX, or its file.
        sidecar: Its sidecar.
        statistics: Where the samples stand.
        program: The exported PyTorch program that is written in its place; None where it is the ONNX model itself.

    Raises:
        OutputError: If an output that is finite in float is not finite any more.
        RunError: If the runtime refuses what was written.
    """
    feeds = statistics.check_inputs
    threads = THREADS if source.size <= LARGEST else 0
    runner = Runner(source.runnable, threads, what=source.name)
    one = single(runner.inputs, feeds)
    reference = runner.run(feeds)
    here: dict[str, float] = {}
    in_float: tuple[str, ...] = ()
    if source.size > LARGEST:
        del runner
    if program is None:
        quantized, in_float = loaded(written, threads, sidecar, source.size <= LARGEST)
        result = quantized.run(feeds)
        speed = measured(runner, quantized, one) if source.size <= LARGEST else None
        if sidecar.target.weight.pair_bits is None and saturates() and repeatable(source.graph):
            given, result = result, Runner(written, what="the quantized model", exact=True).run(feeds)
            here = loss_here(*(compared(source.graph, reference, outputs) for outputs in (result, given)))
    else:  # it is not compiled here, and its speed says nothing
        given = {str(value.name): feeds[str(value.name)] for value in source.graph.graph.inputs}
        result, speed = outputs_of_program(program, given, tuple(reference)), None
    for name, values in result.items():
        real = values.dtype.kind == "f"
        if real and np.isfinite(reference[name]).all() and not np.isfinite(values).all():
            raise OutputError(
                f"output '{name}' of the quantized model is not finite",
                "something small may be zero on its grid, and divided by: exclude what gives it, or give activations more bits",
            )
    comparison = compared(source.graph, reference, result)
    sqnr, parts = (sqnrs(found) for found in (comparison.outputs, comparison.parts))
    suspects: tuple[LayerSqnr, ...] = ()
    if any(value < LOW_SQNR for value in sqnr.values()):
        held = Held.of_bytes(written) if isinstance(written, bytes) else Held.of_file(written)
        suspects = tuple(worst(layer_sqnrs(source.graph, held.model, sidecar, [feeds])))
    count, batch = (samples_in(rows) for rows in (feeds, one))
    return SelfCheck(count, sqnr, suspects, speed, batch, parts, here, in_float)


def loaded(written: bytes | Path, threads: int, sidecar: Sidecar, small: bool) -> tuple[Runner, tuple[str, ...]]:
    """Return a quantized model, loaded, and which of its integer layers are computed in float; none are looked for in large ones.

    Args:
        written: The model, or its file.
        threads: Threads within an operator.
        sidecar: Its sidecar.
        small: Whether its optimized graph may be written to a file.
    """
    what = "the quantized model"
    if small and sidecar.mode == "static" and sidecar.target.placement.pays:
        # Where there is no room for temporary files, nothing is looked for; what is wrong with the model is told below.
        with contextlib.suppress(OSError, RunError), tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            return Runner(written, threads, what=what, optimized=optimized), unfused(optimized, sidecar)
    return Runner(written, threads, what=what), ()


def compared(model: ir.Model, reference: dict[str, NDArray[Any]], given: dict[str, NDArray[Any]]) -> Comparison:
    """Return how a quantized model's outputs differ from float's."""
    comparison = Comparison(parts_of(model))
    comparison.update(reference, given)
    return comparison


def sqnrs(found: Mapping[str, Difference]) -> dict[str, float]:
    """Return SQNRs by name, in dB."""
    return {name: difference.sqnr for name, difference in found.items()}


def loss_here(exact: Comparison, given: Comparison) -> dict[str, float]:
    """Return the SQNR that outputs have on this machine, of those whose kernels lose something of them."""
    least = sqnrs(exact.outputs)
    return {name: value for name, value in sqnrs(given.outputs).items() if value < least[name] - LOSS_HERE}


def outputs_of_program(
    program: bytes, feeds: dict[str, NDArray[Any]], outputs: tuple[str, ...]
) -> dict[str, NDArray[Any]]:
    """Return what an exported program makes of some samples, under the names of the float model's outputs."""
    import io

    import torch

    from calibration.hooks.torch import ProgramRunner
    from quantcli.load.exporter import EXPORTING

    with EXPORTING:
        loaded = torch.export.load(io.BytesIO(program))
        return ProgramRunner(loaded, "the quantized program", tuple(feeds), outputs).run(feeds)


def measured(reference: Runner, quantized: Runner, feeds: dict[str, NDArray[Any]]) -> float | None:
    """Return how many times faster the quantized model runs, by the fastest of a few runs in turn.

    What else a machine does disturbs so short a look, and can make a fast model seem slow. So where it does, a longer
    look goes on from there.

    Returns:
        None where that takes long, or hardly any time.
    """
    times: tuple[list[float], list[float]] = ([], [])
    speed = None
    for seconds, runs in LOOKS:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds and len(times[0]) < runs:
            for runner, spent in zip((reference, quantized), times, strict=True):
                start = time.perf_counter()
                runner.run(feeds)
                spent.append(time.perf_counter() - start)
        if len(times[0]) < ENOUGH or min(times[0]) < SHORTEST:
            return None
        speed = min(times[0]) / min(times[1])
        if speed >= SLOW:
            break
    return speed
