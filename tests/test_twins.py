"""Twins in other forms: of subclasses, in half precision, compiled."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import quantcli.torch as qt
from quantcli import Recipe
from quantcli.errors import ModelError
from quantcli.recipe import Layers

X = torch.linspace(-1, 1, 4 * 3 * 36).reshape(4, 3, 6, 6)


class Same(nn.Conv2d):
    """A subclass that is only made otherwise."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)

    def reset_parameters(self) -> None:
        super().reset_parameters()


class Standardized(nn.Conv2d):
    """A subclass that computes its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        found: torch.Tensor = self._conv_forward(x, weight, self.bias)
        return found


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(Same(3, 8), nn.ReLU(), Standardized(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def test_subclasses_are_swapped_where_they_compute_the_same(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    prepared = qt.prepare(model, weight_bits=32, activation_bits=32)
    assert [type(module) for module in prepared.children()] == [
        qt.QuantConv2d,
        nn.ReLU,
        Standardized,
        nn.ReLU,
        qt.QuantConv2d,
    ]
    assert caplog.messages == ["not prepared, for they compute in their own way: '2' (Standardized)"]
    assert torch.equal(prepared(X), model(X))


def test_an_excluded_subclass_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    prepared = qt.prepare(network(), Recipe(layers=Layers(exclude=("op:Standardized", "4"))))
    assert [name for name, module in prepared.named_children() if isinstance(module, qt.QuantConv2d)] == ["0"]
    assert not caplog.messages
    chosen = qt.prepare(network(), Recipe(layers=Layers(include=("op:Conv2d",))))
    assert [name for name, module in chosen.named_children() if isinstance(module, qt.QuantConv2d)] == ["0", "4"]


def test_a_subclass_that_was_left_out_stays_float(tmp_path: Path) -> None:
    prepared = qt.calibrate(qt.prepare(network()), [X])
    done = qt.convert(prepared, tmp_path / "q.onnx", [X])
    assert [layer.operator for layer in done.plan.layers] == ["Conv", "Conv"]
    assert [layer.operator for layer in done.plan.floats if layer.operator == "Conv"] == ["Conv"]


def test_attention_is_told_of_and_its_projection_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    prepared = qt.prepare(layer)
    assert caplog.messages == ["not prepared, for they compute in their own way: 'self_attn' (MultiheadAttention)"]
    assert {name for name, module in prepared.named_modules() if isinstance(module, qt.QuantLinear)} == {
        "linear1",
        "linear2",
    }


def test_lazy_layers_are_to_run_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(ModelError, match=r"'2' \(LazyLinear\) has no weights yet; run the model on a batch first"):
        qt.prepare(model)
    model(X)
    assert isinstance(qt.prepare(model).get_submodule("2"), qt.QuantLinear)


@pytest.mark.parametrize("scheme", ["affine", "dorefa"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_prepared_models_run_in_half_precision_and_convert_in_float32(
    tmp_path: Path, scheme: str, kind: torch.dtype
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    prepared = qt.prepare(model, weight_bits=4, activation_bits=4, scheme=scheme)
    qt.calibrate(prepared, [X])
    half = copy.deepcopy(prepared).to(kind)
    assert half(X.to(kind)).dtype == kind
    with pytest.raises(ModelError, match=r"'0' is b?float16, .*model\.float\(\)"):
        qt.convert(half, tmp_path / "q.onnx", [X])


@pytest.mark.parametrize("scheme", ["affine", "dorefa"])
def test_prepared_models_compile_as_a_whole(scheme: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    prepared = qt.prepare(model, weight_bits=4, activation_bits=4, scheme=scheme)
    qt.calibrate(prepared, [X])
    compiled = torch.compile(prepared, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), prepared(X))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiling_without_ranges_is_refused(fullgraph: bool) -> None:
    prepared = qt.prepare(nn.Sequential(nn.Conv2d(3, 4, 3)))
    compiled = torch.compile(prepared, backend="eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match="no range yet; calibrate the prepared model first"):
        compiled(X)
    qt.calibrate(prepared, [X])
    assert torch.equal(compiled(X), prepared(X))


def test_prepared_models_are_exported() -> None:
    prepared = qt.calibrate(qt.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()), [X])
    assert torch.equal(torch.export.export(prepared, (X,), strict=False).module()(X), prepared(X))


@pytest.mark.parametrize("scheme", ["affine", "dorefa"])
def test_training_goes_on_from_what_was_saved(tmp_path: Path, scheme: str) -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        made = qt.prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), weight_bits=3, activation_bits=5, scheme=scheme)
        return made, torch.optim.Adam(made.parameters(), 1e-2)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()

    first, optimizer = begun()
    qt.calibrate(first, [X])
    steps(first, optimizer)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    steps(first, optimizer)
    second, again = begun()
    stored = torch.load(tmp_path / "checkpoint.pt")
    second.load_state_dict(stored["model"])
    again.load_state_dict(stored["optimizer"])
    steps(second, again)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
