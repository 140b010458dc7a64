"""Micronet's DoReFa path: layers become quantizing twins, 4-bit weights and activations are trained, and become integers.

32 bits pass through, bit for bit; 1 bit is refused. The plan takes over DoReFa's grids: weights as odd multiples of 1/15, which are
integers of 5 bits, and activations of 16 levels.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import quantcli.torch as qt
from calibration.hooks.onnxruntime import Runner
from quantcli.demo import EVALUATION
from quantcli.errors import UsageError

torch.manual_seed(0)
stored = np.load(EVALUATION)
images = torch.from_numpy(((stored["images"][:, None] / 255.0 - 0.1307) / 0.3081).astype(np.float32))
labels = torch.from_numpy(stored["labels"].astype(np.int64))


def train(model: nn.Module) -> None:
    """Train on the first 4,000 images, once."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for rows in torch.randperm(4000).split(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    model.eval()


def top1(run) -> float:
    """Return how many of a hundred of the other 1,000 images are told right."""
    with torch.no_grad():
        found = torch.cat([run(part) for part in images[4000:].split(200)])
    return 100 * float((found.argmax(1) == labels[4000:]).float().mean())


lenet = nn.Sequential(
    *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    *(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
)
train(lenet)
try:
    qt.prepare(lenet, weight_bits=1, scheme="dorefa")
except UsageError as error:
    print("1 bit:", error)
float32 = qt.prepare(lenet, weight_bits=32, activation_bits=32, scheme="dorefa")
print("32 bits are float bit for bit:", torch.equal(float32(images[:100]), lenet(images[:100])))

prepared = qt.prepare(lenet, weight_bits=4, activation_bits=4, scheme="dorefa").eval()
print(f"top-1: float {top1(lenet):.1f} %, DoReFa w4a4 before training {top1(prepared):.1f} %")
train(prepared)
after = top1(prepared)
with tempfile.TemporaryDirectory() as folder:
    done = qt.convert(prepared, Path(folder) / "lenet.onnx", images[:512].split(64))
    runner = Runner(done.model)
    name = runner.inputs[0].name
    integers = top1(lambda part: torch.from_numpy(next(iter(runner.run({name: part.numpy()}).values()))))
print(f"after one epoch {after:.1f} %, its integers {integers:.1f} %")
grids = {
    layer.name: done.plan.tensors[layer.inputs[1]].integer.name for layer in done.plan.layers if len(layer.inputs) > 1
}
print("weights on", grids)
assert after > 90
assert abs(after - integers) < 2
