"""The memory that a model takes while it runs: measured in a process of its own, since what was taken once is rarely given back."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.errors import RunError
from calibration.hooks.onnxruntime import openable

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUNS = 3
PROBE = """
import contextlib, resource, sys
import numpy as np, onnxruntime
model, inputs, threads, runs = sys.argv[1:]
feeds = dict(np.load(inputs))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = int(threads), 4

def peak():
    with contextlib.suppress(OSError, StopIteration):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

with contextlib.suppress(OSError):
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # Linux: the peak begins anew, at what is held now
before = peak()
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
for _ in range(int(runs)):
    session.run(None, feeds)
print(peak() - before)
"""


def footprint(model: Path | bytes, feeds: dict[str, NDArray[Any]], threads: int) -> int:
    """Return by how many bytes loading and running a model in ONNX Runtime raises a process's peak memory.

    Args:
        model: Its file or bytes.
        feeds: One batch.
        threads: Threads within an operator.

    Raises:
        RunError: If the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, path = Path(folder) / "feeds.npz", Path(folder) / "model.onnx"
        np.savez(inputs, **feeds)  # type: ignore[arg-type]
        given = openable(model) if isinstance(model, Path) else model
        if isinstance(given, bytes):
            path.write_bytes(given)
            given = str(path)
        command = [sys.executable, "-c", PROBE, given, str(inputs), str(threads), str(RUNS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - it is our own text
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RunError(f"the memory of a model cannot be measured ({last})", "leave out --memory")
    return int(done.stdout)
