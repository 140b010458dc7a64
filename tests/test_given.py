"""What is given as a live model: wrappers are taken off, what is none is refused in so many words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import quantcli.torch as qt
from quantcli.errors import ModelError
from quantcli.load import Opening, load
from quantcli.sidecar import Sidecar
from quantcli.torch.given import bare

X = torch.linspace(-1, 1, 64).reshape(8, 8)
BATCHES = [(X[:4], X[4:]), (X[4:], X[:4])]


class Pair(nn.Module):
    """A model of two arguments, which no wrapper's signature tells."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(left).relu() + right)
        return found


def compiled(model: nn.Module) -> nn.Module:
    found: Any = torch.compile(model, backend="eager")
    return cast("nn.Module", found)


WRAPPINGS: list[Callable[[nn.Module], nn.Module]] = [
    nn.DataParallel,
    AveragedModel,
    compiled,
    lambda model: nn.DataParallel(compiled(model)),
]


def numbers(sidecar: Sidecar) -> list[tuple[str, tuple[float, ...]]]:
    return [(name, tuple(tensor.scale)) for name, tensor in sidecar.tensors.items()]


@pytest.mark.parametrize("wrapped", WRAPPINGS)
def test_wrappers_are_taken_off(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    plain = qt.calibrate(qt.prepare(Pair(), weight_bits=4, activation_bits=4), BATCHES)
    prepared = qt.prepare(wrapped(Pair()), weight_bits=4, activation_bits=4)
    assert type(prepared) is Pair
    outer = wrapped(prepared)
    assert qt.calibrate(outer, BATCHES) is outer
    assert torch.equal(bare(outer)(*BATCHES[0]), plain(*BATCHES[0]))
    assert qt.freeze(outer) is outer
    assert torch.equal(bare(outer)(*BATCHES[0]), plain(*BATCHES[0]))


def test_a_wrapped_model_converts_as_what_is_inside() -> None:
    plain = qt.calibrate(qt.prepare(Pair(), weight_bits=4, activation_bits=4), BATCHES)
    assert numbers(qt.to_sidecar(nn.DataParallel(plain), BATCHES)) == numbers(qt.to_sidecar(plain, BATCHES))


def test_that_a_wrapper_was_taken_off_is_told(caplog: pytest.LogCaptureFixture) -> None:
    qt.prepare(nn.DataParallel(Pair()))
    assert caplog.messages == ["the module inside DataParallel is prepared: wrap what prepare returns"]


JIT: Any = torch.jit
SCRIPTED = JIT.script(nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SCRIPTED, r"the model is TorchScript, .*give the module that .*torch\.jit\.save"),
        (lambda: JIT.trace(Pair(), BATCHES[0]), r"the model is TorchScript, .*torch\.jit\.save"),
        (lambda: nn.Sequential(nn.Linear(8, 8), SCRIPTED), r"'1' is TorchScript, .*the module that it was made from$"),
        (
            lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8))),  # type: ignore[no-untyped-call]
            r"'0' \(Linear\) was quantized by torch; give the float model",
        ),
    ],
)
def test_what_is_no_live_float_module_is_refused(tmp_path: Path, build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        qt.prepare(build())
    with pytest.raises(ModelError, match=message):
        qt.convert(build(), tmp_path / "q.onnx", [X])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_modules_of_half_precision_convert_from_data_of_float32(tmp_path: Path, kind: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    done = qt.convert(model.to(kind), tmp_path / "q.onnx", [X.repeat(4, 1)])
    assert [layer.operator for layer in done.plan.layers] == ["Gemm", "Gemm"]
    assert np.isfinite(list(done.check.sqnr.values())).all()


def test_a_factory_may_give_a_wrapped_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    torch.save(nn.DataParallel(model).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "built.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.DataParallel(nn.Sequential(nn.Linear(8, 4)))\n"
    )
    opening = Opening(factory=f"{tmp_path / 'built.py'}:build")
    found = load(tmp_path / "weights.pt", opening, lambda names: {names[0]: X.numpy()})
    assert torch.equal(found.program.module()(X), model(X))
