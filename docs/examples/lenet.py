"""LeNet on MNIST in integers only: uint8, ranges averaged over 1,000 samples, accuracy kept (Jacob et al., arXiv 1712.05877).

The embedded network and images; 1,000 images calibrate, the other 4,000 evaluate. Each range is the mean of the samples' own minima
and maxima, so that a single bright sample does not stretch it.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.hooks.onnxruntime import Runner
from calibration.statistics import TensorStatistics
from quantcli import calibrate, convert
from quantcli.demo import EVALUATION, MODEL
from quantcli.fold import fold
from quantcli.integer.executor import Executor
from quantcli.load import load
from quantcli.placement import place
from quantcli.probe import with_outputs
from quantcli.recipe import Recipe

stored = np.load(EVALUATION)
images = ((stored["images"][:, None].astype(np.float32) / np.float32(255)) - np.float32(0.1307)) / np.float32(0.3081)
labels = stored["labels"].astype(int)
calibration, evaluation, expected = images[:1000], images[1000:], labels[1000:]

with tempfile.TemporaryDirectory() as folder:
    np.save(Path(folder) / "calibration.npy", calibration)
    statistics = calibrate(MODEL, Path(folder) / "calibration.npy")

    # The mean of the samples' ranges, in place of the range of all samples.
    folded = fold(load(MODEL).graph)
    names = [name for name in place(folded, Recipe()).observed() if name != "x"]
    seen = {"x": calibration, **Runner(with_outputs(folded, names)).run({"x": calibration}, names)}
    rows = {name: values.reshape(len(calibration), -1) for name, values in seen.items()}
    means = {
        name: TensorStatistics(float(values.min(axis=1).mean()), float(values.max(axis=1).mean()), values.size)
        for name, values in rows.items()
    }
    for name, mean in means.items():
        whole = statistics.tensors[name]
        print(
            f"{name}: [{whole.minimum:.2f}, {whole.maximum:.2f}] of all, [{mean.minimum:.2f}, {mean.maximum:.2f}] on average"
        )

    done = convert(MODEL, Path(folder) / "lenet.onnx", dataclasses.replace(statistics, tensors=means))
    executor = Executor(ir.load(done.model), done.sidecar)
    batches = [evaluation[start : start + 200] for start in range(0, len(evaluation), 200)]
    integer = np.concatenate([executor.run({"x": batch})["log_softmax"] for batch in batches]).argmax(axis=1)
    real = np.concatenate([Runner(MODEL).run({"x": batch})["log_softmax"] for batch in batches]).argmax(axis=1)

share = [100 * float((found == expected).mean()) for found in (real, integer)]
print(f"top-1 of {len(expected)} images: float {share[0]:.2f} %, integers {share[1]:.2f} %")
print("operators left to floats:", dict(executor.islands))
assert share[1] > 99.0
