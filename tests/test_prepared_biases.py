"""Biases of prepared models: on the grid of their accumulators, as convert rounds them, also those that BatchNorm becomes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import quantcli.torch as qt
from quantcli.arithmetic.affine import IntegerType, affine_parameters, symmetric_scales
from quantcli.torch.layers import Quantizing
from quantcli.torch.normalization import Folded
from tests.test_prepare import BATCHES, everything, outputs

UNIT = 2.0**-24  # how far rounding to float32 may go, relatively
X = torch.cat(BATCHES)


def trained(model: nn.Module, steps: int = 12) -> nn.Module:
    """Return a model after some steps towards labels that its first inputs tell, in evaluation mode."""
    labels = X.flatten(1)[:, :4].argmax(1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


def plain() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
    )


def normalizing() -> nn.Sequential:
    torch.manual_seed(4)
    first, second = nn.BatchNorm2d(6), nn.BatchNorm2d(4)
    with torch.no_grad():
        for norm in (first, second):
            norm.bias.uniform_(-1, 1)
            norm.weight.uniform_(-2, 2)
        second.weight[0] = 0  # folds to a channel of zeros
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), first, nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, bias=False), second, nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 4)),
    )


def float32_bound(prepared: Any, x: torch.Tensor) -> torch.Tensor:
    """Return how far two float32 evaluations of the last layer may lie apart.

    Either errs by (K + 3)·u·(Σ|x·w| + |b|) at most: K products and sums, and what dequantizing rounds of x, w and b (Higham 2002,
    Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    with torch.no_grad():
        x, w, b = prepared[-1].rounded_operands(prepared[:-1](x))
    found: torch.Tensor = 2 * (w.shape[1] + 3) * UNIT * (x.abs() @ w.abs().T + b.abs())
    return found


def sqnr(expected: torch.Tensor, error: torch.Tensor) -> float:
    return 10 * math.log10(float(expected.square().sum() / error.square().sum()))


@pytest.mark.parametrize("build", [plain, normalizing])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_trained_model_and_its_integers_agree(tmp_path: Path, build: Callable[[], nn.Sequential], bits: int) -> None:
    model = build()
    with torch.no_grad():
        model.get_parameter("0.weight")[0] = 0  # a dead channel
    prepared = trained(qt.calibrate(qt.prepare(model, weight_bits=bits, activation_bits=bits), BATCHES))
    done = qt.convert(prepared, tmp_path / "q.onnx", BATCHES, verified=True)
    with torch.no_grad():
        expected, found = prepared(X), outputs(done.model, X)
    bound, error = float32_bound(prepared, X), found - expected
    assert sqnr(expected, bound) > 60
    # A sum before the last layer that lies on a tie but for float noise may be rounded either way: with 8 bits, noise is some 2^-12
    # of a step, and of 15,000 sums a few lie as near to a tie as that; with fewer bits, hardly any.
    assert (error.abs() > bound).any(dim=1).sum() <= 2


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_bias_is_rounded_as_a_plan_rounds_it(per_channel: bool) -> None:
    prepared = qt.calibrate(qt.prepare(everything(), weight_bits=3, activation_bits=2), BATCHES)
    twins = [module for module in prepared.modules() if isinstance(module, Quantizing)]
    assert len(twins) == 7
    for twin in twins:
        x: Any = twin.activation_quantizer
        weight: Any = twin.weight_quantizer
        weight.axis = weight.axis if per_channel else None
        w = twin.weight.detach().numpy()
        rows = w.reshape(1, -1) if weight.axis is None else np.moveaxis(w, weight.axis, 0).reshape(len(twin.bias), -1)
        lo, hi = x.range()
        scale = affine_parameters(lo, hi, IntegerType("uint2"))[0]
        step = (scale * symmetric_scales(np.abs(rows).max(axis=1), IntegerType("int3", narrow=True))).astype(np.float64)
        expected = (np.rint(twin.bias.detach().numpy().astype(np.float64) / step) * step).astype(np.float32)
        found = twin.rounded_bias(twin.bias)
        assert found is not None
        assert (found.detach().numpy() == expected).all()
        found.sum().backward()  # type: ignore[no-untyped-call]
        assert twin.bias.grad.eq(1).all()
        assert (x.lo.grad, x.hi.grad, twin.weight.grad) == (None, None, None)


def test_dorefa_and_widths_that_pass_leave_biases_as_they_are() -> None:
    for model in (
        qt.prepare(plain(), weight_bits=2, activation_bits=2, scheme="dorefa"),
        qt.calibrate(qt.prepare(plain(), weight_bits=32, activation_bits=2), BATCHES),
        qt.prepare(plain(), weight_bits=2, activation_bits=32),
    ):
        assert all(m.rounded_bias(m.bias) is m.bias for m in model.modules() if isinstance(m, Quantizing))


@pytest.mark.parametrize("build", [plain, normalizing])
def test_nothing_is_rounded_while_ranges_are_observed(build: Callable[[], nn.Sequential]) -> None:
    model = build().eval()
    prepared = qt.prepare(model, weight_bits=2, activation_bits=2)
    with torch.no_grad():
        seen = model[:-1](X)
    for _ in range(2):
        last: Any = list(qt.calibrate(prepared, BATCHES).children())[-1]
        assert last.activation_quantizer.range() == (float(seen.min()), float(seen.max()))


def test_what_is_saved_stays_as_it_was() -> None:
    model = normalizing()
    prepared = qt.calibrate(qt.prepare(model, weight_bits=2, activation_bits=2), BATCHES)
    ranges = {f"{name}.activation_quantizer.{end}" for name in ("0", "3", "7") for end in ("lo", "hi")}
    assert prepared.state_dict().keys() == model.state_dict().keys() | ranges
    assert len(list(prepared.parameters())) == len(list(model.parameters())) + len(ranges)


def test_a_copy_rounds_by_its_own_layers() -> None:
    prepared = qt.calibrate(qt.prepare(normalizing(), weight_bits=2, activation_bits=2), BATCHES).eval()
    with torch.no_grad():
        before, other = prepared(X), copy.deepcopy(prepared)
        prepared.get_parameter("0.weight").mul_(3)
        assert torch.equal(other(X), before)
        assert not torch.equal(prepared(X), before)


def test_freezing_keeps_what_norms_became() -> None:
    prepared = trained(qt.calibrate(qt.prepare(normalizing(), weight_bits=3, activation_bits=3), BATCHES))
    with torch.no_grad():
        before, frozen = prepared(X), qt.freeze(prepared)
        assert ((frozen(X) - before).abs() <= float32_bound(prepared, X)).all()
    assert len(torch.unique(frozen.get_parameter("0.weight")[1])) <= 7


class Ways(nn.Module):
    """A BatchNorm whose layer others read as well, one whose layer is called twice, one behind a Linear, and a branch on data."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.read, self.first = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.head, self.third = nn.Linear(192, 4), nn.BatchNorm1d(4)
        self.branches = branches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.branches and float(x.sum()) > 1e9:
            return x
        x = self.read(x)
        x = x + self.first(x)
        x = self.second(self.twice(self.twice(x)))
        found: torch.Tensor = self.third(self.head(self.block(x).flatten(1)))
        return found


@pytest.mark.parametrize(("branches", "expected"), [(False, ["block.1", "third"]), (True, ["block.1"])])
def test_norms_that_convert_folds_have_twins(branches: bool, expected: list[str]) -> None:
    model = Ways(branches)
    assert twins_of(qt.prepare(model)) == expected
    assert twins_of(qt.prepare(model, scheme="dorefa")) == []
    assert twins_of(qt.prepare(model, weight_bits=32)) == []
    assert type(model.block[1]) is nn.BatchNorm2d


def twins_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Folded)]
