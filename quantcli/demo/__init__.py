"""The embedded model and data behind ``quantcli demo``: a LeNet trained on MNIST, and labelled images it was not trained on."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "lenet.onnx"
CALIBRATION = FOLDER / "calibration.npz"
EVALUATION = FOLDER / "evaluation.npz"

# What turns a stored pixel (0 … 255) into what the network was trained on: the mean and deviation of MNIST.
RECIPE = """# What the integers are for: ONNX Runtime on the machine that this runs on.
target = "native"

# How the stored images become the model's input, for calibrate, convert and eval alike.
[preprocess]
scale = 0.00392156862745098
mean = [0.1307]
std = [0.3081]
layout = "NCHW"
"""
