"""Quantization of live PyTorch models: prepare, calibrate, train, freeze, convert.

::

    import quantcli.torch as qt

    model = qt.prepare(model, weight_bits=4, activation_bits=4)
    qt.calibrate(model, loader)
    ...  # train as before: rounding passes gradients straight through
    qt.convert(model, "model.int8.onnx", loader)

`freeze` puts the weights onto their grids; `to_sidecar` gives every integer without writing a model.
"""

from quantcli.torch.conversion import convert, to_sidecar
from quantcli.torch.layers import (
    Add,
    QuantAdd,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantFunctional,
    QuantLinear,
)
from quantcli.torch.prepare import calibrate, freeze, prepare
from quantcli.torch.quantizers import PASSES, ActivationQuantizer, DorefaActivation, DorefaWeight, WeightQuantizer

__all__ = [
    "PASSES",
    "ActivationQuantizer",
    "Add",
    "DorefaActivation",
    "DorefaWeight",
    "QuantAdd",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantFunctional",
    "QuantLinear",
    "WeightQuantizer",
    "calibrate",
    "convert",
    "freeze",
    "prepare",
    "to_sidecar",
]
