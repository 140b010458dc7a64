"""Prepared models on the images that the project carries: LeNet and Network in Network, fine-tuned and in integers.

python -m benchmarks.finetune [--epochs 1] [--float-epochs 6]

LeNet begins with the demo's weights; Network in Network (Lin et al. 2014, arXiv 1312.4400, with BatchNorm before ReLU as Micronet
has it) is trained in float first. Four in five of the images train, the others test.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812
from onnx import numpy_helper
from torch import Tensor, nn

if __package__ in {None, ""}:  # run as a file: its folder stands on the path in the project's place
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import quantcli.torch as qt
from calibration.hooks.onnxruntime import Runner

DEMO = Path(__file__).resolve().parents[1] / "quantcli" / "demo"


class LeNet(nn.Module):
    """The demo's network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))
        return logits


def stage(inputs: int, outputs: int, kernel: int, padding: int = 0) -> nn.Sequential:
    """Return a convolution, its BatchNorm and its ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.BatchNorm2d(outputs), nn.ReLU())


def network_in_network(width: int = 32) -> nn.Sequential:
    """Return Network in Network for images of 28 x 28: two blocks of one wide and two 1x1 convolutions, a third, a global mean."""
    return nn.Sequential(
        *(stage(1, width, 5, 2), stage(width, width, 1), stage(width, width // 2, 1), nn.MaxPool2d(2)),
        *(stage(width // 2, width, 5, 2), stage(width, width, 1), stage(width, width, 1), nn.MaxPool2d(2)),
        *(stage(width, width, 3, 1), stage(width, width, 1), stage(width, 10, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def images() -> tuple[Tensor, Tensor]:
    """Return the demo's images, as its network takes them, and their labels."""
    with np.load(DEMO / "evaluation.npz") as stored:
        pixels, labels = next(v for k, v in stored.items() if k != "labels"), stored["labels"]
    x = (torch.from_numpy(pixels.astype(np.float32)) / 255 - 0.1307) / 0.3081
    return x.reshape(-1, 1, 28, 28), torch.from_numpy(labels.astype(np.int64))


def demo_lenet() -> nn.Module:
    """Return the demo's network with its weights."""
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(DEMO / "lenet.onnx").graph.initializer}
    module = LeNet()
    module.load_state_dict({name: torch.from_numpy(stored[name].copy()) for name in module.state_dict()})
    return module.eval()


def epoch(model: nn.Module, x: Tensor, y: Tensor, rate: float, seed: int, size: int = 50) -> None:
    """Train for one epoch with Adam."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    model.train()
    for rows in parts(order, size):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()


def parts(x: Tensor, size: int = 200) -> list[Tensor]:
    """Return a tensor in batches."""
    return list(torch.split(x, size))


def top1(outputs: Iterator[Tensor], labels: Tensor) -> float:
    """Return how many of a hundred are right."""
    return 100.0 * float((torch.cat(list(outputs)).argmax(1) == labels).float().mean())


def main(arguments: list[str] | None = None) -> None:
    """Prepare, score, fine-tune, score again, convert, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--float-epochs", type=int, default=6)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    x, y = images()
    part = len(x) * 4 // 5
    train, test, wanted, labels = x[:part], x[part:], y[:part], y[part:]
    print(f"{part} images train, {len(test)} test; {options.epochs} epoch(s) of Adam\n")
    print(
        "| network | float | scheme | widths | prepared | fine-tuned | its integers (.onnx) | apart on the test images | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    inner = network_in_network()
    for number in range(options.float_epochs):
        epoch(inner, train, wanted, 3e-3 if number < options.float_epochs - 2 else 5e-4, number)
    for name, model in (("LeNet", demo_lenet()), ("Network in Network", inner)):
        with torch.no_grad():
            whole = top1((model(part) for part in parts(test)), labels)
        for scheme in ("affine", "dorefa"):
            for bits in (32, 8, 4):
                row(name, model, whole, scheme, bits, train, wanted, test, labels, options.epochs)


def row(
    name: str, model: nn.Module, whole: float, scheme: str, bits: int, train: Tensor, wanted: Tensor, test: Tensor, labels: Tensor,
    epochs: int,
) -> None:  # fmt: skip
    """Print one row."""
    began = time.perf_counter()
    prepared = qt.prepare(copy.deepcopy(model), weight_bits=bits, activation_bits=bits, scheme=scheme)
    qt.calibrate(prepared, parts(train[:512], 64))
    prepared.eval()
    with torch.no_grad():
        before = top1((prepared(part) for part in parts(test)), labels)
        if bits == qt.PASSES:
            equal = all(torch.equal(prepared(part), model(part)) for part in parts(test))
            print(
                f"| {name} | {whole:.2f} | {scheme} | w{bits}a{bits} | {before:.2f} | bit for bit float: {equal} | | | |"
            )
            return
    for number in range(epochs):
        epoch(prepared, train, wanted, 1e-4 if scheme == "affine" else 2e-3, number)
    with torch.no_grad():
        after = top1((prepared(part) for part in parts(test)), labels)
    with tempfile.TemporaryDirectory() as folder:
        done = qt.convert(prepared, Path(folder) / "q.onnx", parts(train[:512], 64))
        runner = Runner(done.model)
        given = runner.inputs[0].name
        outputs = [torch.from_numpy(next(iter(runner.run({given: part.numpy()}).values()))) for part in parts(test)]
    integers = top1(iter(outputs), labels)
    with torch.no_grad():
        theirs = torch.cat([prepared(part) for part in parts(test)]).argmax(1)
    apart = int((torch.cat(outputs).argmax(1) != theirs).sum())
    seconds = time.perf_counter() - began
    scores = f"{before:.2f} | {after:.2f} | {integers:.2f} | {apart}"
    print(f"| {name} | {whole:.2f} | {scheme} | w{bits}a{bits} | {scores} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
