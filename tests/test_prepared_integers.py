"""Prepared models become integer ones that give what was learned."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import quantcli.torch as qt
from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe
from quantcli.errors import PlanError
from quantcli.load import Opening
from quantcli.pipeline import convert
from quantcli.recipe import Activation, Layers, Tune
from quantcli.torch.floats import floated
from tests.graphs import normal
from tests.test_prepare import BATCHES, network, outputs


@pytest.mark.parametrize(
    ("scheme", "bits"), [("affine", 8), ("affine", 4), ("affine", 3), ("dorefa", 4), ("dorefa", 7)]
)
def test_integers_keep_what_was_learned(tmp_path: Path, scheme: str, bits: int) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(8, 64),
    ).eval()
    prepared = qt.calibrate(qt.prepare(model, weight_bits=bits, activation_bits=bits, scheme=scheme), BATCHES)
    done = qt.convert(prepared, tmp_path / "q.onnx", BATCHES, verified=True)
    assert done.tuned.why_not.startswith("the model was prepared")
    tensors = done.plan.tensors
    for layer in done.plan.layers:
        if layer.operator not in {"Conv", "Gemm"}:
            continue
        weight, x = tensors[layer.inputs[1]], tensors[layer.inputs[0]]
        assert weight.integer.bits == (bits if scheme == "affine" else bits + 1)
        assert x.integer.bits == bits
        if scheme == "dorefa":
            assert (x.lo, x.hi, x.scale) == ((0.0,), (10.0,), (float(np.float32(10 / (2**bits - 1))),))
    with torch.no_grad():
        plain = floated(prepared)[0].get_submodule("0.layer" if bits < 8 or scheme == "dorefa" else "0")
        held = plain.get_parameter("weight")
        expected, found = prepared(BATCHES[0]), outputs(done.model, BATCHES[0])
    name = next(name for name in tensors if name.endswith(("0.weight", "0.layer.weight")))
    stored = next(v for k, v in initializers(done.model).items() if k == f"{name}_quantized")
    taught = torch.round(
        held / held.abs().amax(dim=(1, 2, 3), keepdim=True) * np.abs(stored).max(axis=(1, 2, 3), keepdims=True)
    )
    assert (stored == taught.numpy()).all()
    # DoReFa's biases are rounded in the integers alone, and a value on a tie may go the other way: that is all.
    most = 1e-6 if scheme == "affine" else {7: 1e-3}.get(bits, 0.05)
    assert float((found - expected).square().sum() / expected.square().sum()) < most


def initializers(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    import onnx
    from onnx import numpy_helper

    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def test_a_residual_is_not_narrowed_for_the_layer_beside_it(tmp_path: Path) -> None:
    prepared = qt.calibrate(qt.prepare(network(), weight_bits=4, activation_bits=4), BATCHES)
    done = qt.convert(prepared, tmp_path / "q.onnx", BATCHES)
    adds = [layer for layer in done.plan.layers if layer.operator == "Add"]
    assert adds
    assert all(done.plan.tensors[name].integer.bits == 8 for layer in adds for name in layer.inputs)
    convs = [layer for layer in done.plan.layers if layer.operator == "Conv"]
    assert all(done.plan.tensors[layer.inputs[0]].integer.bits == 4 for layer in convs)


class Twice(nn.Module):
    """A layer that is called twice, and one whose name is that of the function that the others call."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.linear = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(torch.relu(self.shared(x)))
        found: torch.Tensor = self.linear(torch.relu(x))
        return found


@pytest.mark.parametrize("shape", [(16, 8), (16, 3, 8)])
def test_every_call_of_a_layer_keeps_what_it_learned(tmp_path: Path, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = torch.from_numpy(normal(*shape, seed=3))
    recipe = Recipe(layers=Layers(exclude=("linear",)))
    prepared = qt.calibrate(qt.prepare(Twice().eval(), recipe, activation_bits=4), [x])
    done = qt.convert(prepared, tmp_path / "q.onnx", [x])
    products = [layer for layer in done.plan.layers if layer.operator in {"Gemm", "MatMul"}]
    assert [done.plan.tensors[layer.inputs[0]].integer.bits for layer in products] == [4, 4]
    assert [f.operator for f in done.plan.floats if f.operator in {"Gemm", "MatMul"}] == [products[0].operator]


def behind_each_other(kind: str) -> nn.Module:
    """Two layers of one weight, whose inputs differ eightfold: equal, tied, or the same layer under two names."""
    torch.manual_seed(2)
    first, last = nn.Linear(8, 8), nn.Linear(8, 4)
    second = first if kind == "same" else copy.deepcopy(first)
    if kind == "tied":
        second.weight = first.weight
    return nn.Sequential(first, nn.Sigmoid(), second, nn.Sigmoid(), last).eval()


@pytest.mark.parametrize("kind", ["equal", "tied"])
def test_layers_of_equal_weights_keep_their_own_ranges(tmp_path: Path, kind: str) -> None:
    x = torch.from_numpy(normal(32, 8, seed=3, scale=8.0))
    prepared = qt.calibrate(qt.prepare(behind_each_other(kind)), [x])
    done = qt.convert(prepared, tmp_path / "q.onnx", [x])
    spans = [
        done.plan.tensors[layer.inputs[0]].hi[0] - done.plan.tensors[layer.inputs[0]].lo[0]
        for layer in done.plan.layers
        if layer.operator == "Gemm"
    ]
    assert len(spans) == 3
    assert spans[0] > 20
    assert max(spans[1:]) <= 1


def test_a_layer_under_two_names_becomes_integers_under_both(tmp_path: Path) -> None:
    x = torch.from_numpy(normal(32, 8, seed=3))
    prepared = qt.calibrate(qt.prepare(behind_each_other("same")), [x])
    done = qt.convert(prepared, tmp_path / "q.onnx", [x])
    assert {layer.operator for layer in done.plan.floats} <= {"Sigmoid"}
    assert [layer.operator for layer in done.plan.layers].count("Gemm") == 3
    excluded = qt.prepare(behind_each_other("same"), Recipe(layers=Layers(exclude=("2",))))
    assert [name for name, module in excluded.named_modules() if isinstance(module, qt.QuantLinear)] == ["4"]


def test_an_argument_may_have_any_name(tmp_path: Path) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, file: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layer(file)
            return found

    done = qt.convert(Reader().eval(), tmp_path / "q.onnx", [torch.from_numpy(normal(16, 8))])
    assert [spec.name for spec in Runner(done.model).inputs] == ["file"]


def test_a_width_may_be_an_integer_of_numpy() -> None:
    assert isinstance(qt.prepare(network(), weight_bits=np.int64(4)).head, qt.QuantLinear)  # type: ignore[arg-type]


def test_what_was_not_prepared_stays_float(tmp_path: Path) -> None:
    recipe = Recipe(layers=Layers(exclude=("stem.*", "head")))
    prepared = qt.calibrate(qt.prepare(network(), recipe), BATCHES)
    done = qt.convert(prepared, tmp_path / "q.onnx", BATCHES)
    assert {f.operator for f in done.plan.floats} >= {"Conv", "Gemm"}
    assert sorted(layer.operator for layer in done.plan.layers if "Conv" in layer.operator) == [
        "Conv",
        "Conv",
        "ConvTranspose",
    ]


def test_attention_that_was_not_prepared_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.from_numpy(normal(16, 5, 8, seed=3))
    prepared = qt.calibrate(qt.prepare(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()), [x])
    done = qt.convert(prepared, tmp_path / "q.onnx", [x])
    products = {"Gemm", "MatMul"}
    assert [layer.operator for layer in done.plan.layers if layer.operator in products] == ["MatMul", "MatMul"]
    assert len([layer for layer in done.plan.floats if layer.operator in products]) == 4


def test_a_saved_prepared_model_converts_through_its_factory(tmp_path: Path) -> None:
    prepared = qt.calibrate(prepared_network(), BATCHES)
    torch.save(prepared.state_dict(), tmp_path / "tuned.pt")
    np.savez(tmp_path / "d.npz", x=torch.cat(BATCHES).numpy())
    opening = Opening(factory="tests.test_prepared_integers:prepared_network")
    done = convert(tmp_path / "tuned.pt", tmp_path / "a.onnx", data=tmp_path / "d.npz", opening=opening)
    live = qt.convert(prepared, tmp_path / "b.onnx", BATCHES)
    assert done.model.read_bytes() == live.model.read_bytes()


def prepared_network() -> nn.Module:
    return qt.prepare(network(), weight_bits=5, activation_bits=6)


@pytest.mark.parametrize(("prepared", "expected"), [(True, ("accumulate", 5)), (False, ("stored", 8))])
def test_a_transposed_convolution_computes_in_integers_where_that_was_learned(
    tmp_path: Path, prepared: bool, expected: tuple[str, int]
) -> None:
    model = qt.calibrate(prepared_network(), BATCHES) if prepared else network()
    plan = qt.convert(model, tmp_path / "q.onnx", BATCHES, Recipe(tune=Tune(effort="fast"))).plan
    [layer] = [layer for layer in plan.layers if layer.operator == "ConvTranspose"]
    weight = next(plan.tensors[name] for name in layer.inputs if plan.tensors[name].role == "weight")
    assert (layer.arithmetic.value, weight.integer.bits) == expected


def test_the_sidecar_alone(tmp_path: Path) -> None:
    prepared = qt.calibrate(prepared_network(), BATCHES)
    done = qt.convert(prepared, tmp_path / "Residual.onnx", BATCHES)
    assert qt.to_sidecar(prepared, BATCHES) == done.sidecar


def test_a_model_that_is_not_prepared_is_tuned_as_a_file_is(tmp_path: Path) -> None:
    done = qt.convert(network(), tmp_path / "q.pt2", BATCHES)
    assert done.model.suffix == ".pt2"
    assert min(done.check.sqnr.values()) > 25


def test_widths_that_do_not_fit_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared = qt.calibrate(qt.prepare(network(), activation_bits=12), BATCHES)
    assert "activations of 12 bits do not fit uint8" in caplog.text
    with pytest.raises(PlanError, match=r"--activation-dtype int16, in Python .*dtype=.int16"):
        qt.convert(prepared, tmp_path / "q.onnx", BATCHES)
    wide = qt.calibrate(qt.prepare(network(), weight_bits=12, activation_bits=8), BATCHES)
    qt.convert(wide, tmp_path / "q.onnx", BATCHES)
    assert "trained on 12 bits, and is rounded anew to 8" in caplog.text
    recipe = Recipe(activation=Activation(dtype="int16"))
    sixteen = qt.calibrate(qt.prepare(network(), recipe, activation_bits=12), BATCHES)
    done = qt.convert(sixteen, tmp_path / "q16.onnx", BATCHES, recipe)
    assert done.plan.tensors[done.plan.layers[0].inputs[0]].integer.name == "int12"


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 32), (32, 8), (32, 32)])
def test_layers_that_round_one_operand_alone_are_no_integer_layers(
    tmp_path: Path, weight_bits: int, activation_bits: int
) -> None:
    x = torch.ones(4, 8)
    model = qt.prepare(nn.Sequential(nn.Linear(8, 8)), weight_bits=weight_bits, activation_bits=activation_bits)
    with pytest.raises(PlanError, match="weight_bits and activation_bits of 2 to 16: 32 passes through"):
        qt.convert(qt.calibrate(model, [x]), tmp_path / "q.onnx", [x])


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_several_threads_convert_at_once(tmp_path: Path, form: str) -> None:
    x, streams = torch.from_numpy(normal(16, 8)), (sys.stdout, sys.stderr)
    models = [qt.calibrate(qt.prepare(nn.Sequential(nn.Linear(8, size))), [x]) for size in (4, 5, 6)]

    def converted(number: int) -> int:
        done = qt.convert(models[number], tmp_path / f"{number}.{form}", [x])
        return len(done.plan.layers)

    with ThreadPoolExecutor(len(models)) as pool:
        assert list(pool.map(converted, range(len(models)))) == [1, 1, 1]
    assert (sys.stdout, sys.stderr) == streams


def test_the_model_stays_as_it_was(tmp_path: Path) -> None:
    prepared = qt.calibrate(prepared_network(), BATCHES)
    before = copy.deepcopy(prepared.state_dict())
    qt.convert(prepared, tmp_path / "q.onnx", BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in prepared.state_dict().items())
    assert isinstance(prepared.get_submodule("head"), qt.QuantLinear)


def test_a_layer_under_two_names_has_one_twin() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 1)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.b(self.a(x)))

    made = qt.prepare(Shared(), weight_bits=4)
    assert made.a is made.b
    assert type(made.a).__name__ == "QuantConv2d"


def test_a_transformer_layer_does_not_pass_its_twins_by() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x = torch.randn(4, 5, 16)
    made = qt.calibrate(qt.prepare(layer, weight_bits=2, activation_bits=2), [x]).eval()
    with torch.no_grad():
        assert not torch.allclose(made(x), layer(x), atol=1e-3)
        found = made(x)
    torch.testing.assert_close(found, made(x).detach())


def test_calibration_leaves_every_module_in_its_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).train()
    model[1].eval()
    made = qt.calibrate(qt.prepare(model), [torch.randn(2, 3, 4, 4)])
    assert [module.training for module in made.children()] == [True, False, True]
