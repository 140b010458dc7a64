"""LeNet on MNIST in integers only: uint8, ranges averaged over 1,000 samples, accuracy kept (Jacob et al., arXiv 1712.05877).

The embedded network and images; 1,000 images calibrate, the other 4,000 evaluate. Each range is the mean of the samples' own minima
and maxima, so that a single bright sample does not stretch it.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, calibrate, convert
from quantcli.demo import EVALUATION, MODEL
from quantcli.integer.executor import Executor
from quantcli.recipe import Activation, Calibration

stored = np.load(EVALUATION)
images = ((stored["images"][:, None].astype(np.float32) / np.float32(255)) - np.float32(0.1307)) / np.float32(0.3081)
labels = stored["labels"].astype(int)
calibration, evaluation, expected = images[:1000], images[1000:], labels[1000:]

with tempfile.TemporaryDirectory() as folder:
    np.save(Path(folder) / "calibration.npy", calibration)
    counting = Recipe(calibration=Calibration(observer="mean-minmax"))
    statistics = calibrate(MODEL, Path(folder) / "calibration.npy", recipe=counting)
    for name, seen in statistics.tensors.items():
        low, high = seen.samples.mean
        print(f"{name}: [{seen.minimum:.2f}, {seen.maximum:.2f}] of all, [{low:.2f}, {high:.2f}] on average")

    averaged = Recipe(activation=Activation(range="mean-minmax"))
    done = convert(MODEL, Path(folder) / "lenet.onnx", statistics, recipe=averaged)
    executor = Executor(ir.load(done.model), done.sidecar)
    batches = [evaluation[start : start + 200] for start in range(0, len(evaluation), 200)]
    integer = np.concatenate([executor.run({"x": batch})["log_softmax"] for batch in batches]).argmax(axis=1)
    real = np.concatenate([Runner(MODEL).run({"x": batch})["log_softmax"] for batch in batches]).argmax(axis=1)

share = [100 * float((found == expected).mean()) for found in (real, integer)]
print(f"top-1 of {len(expected)} images: float {share[0]:.2f} %, integers {share[1]:.2f} %")
print("operators left to floats:", dict(executor.islands))
assert share[1] > 99.0
