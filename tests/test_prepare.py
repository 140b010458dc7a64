"""Live models: prepared layers are their twins, quantizers are the plan's, gradients pass, and integers keep what was learned."""

from __future__ import annotations

import copy
import sys
from collections import UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import quantcli.torch as qt
from calibration.errors import DataError
from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe
from quantcli.arithmetic.affine import IntegerType, affine_parameters, quantize, symmetric_parameters, symmetric_scales
from quantcli.errors import ModelError, PlanError, UsageError
from quantcli.load import Opening
from quantcli.pipeline import convert
from quantcli.recipe import Activation, Calibration, Layers, Tune
from quantcli.torch.floats import floated
from tests.graphs import normal
from tests.test_torch import Residual

BATCHES = list(torch.split(torch.from_numpy(normal(32, 3, 8, 8, seed=3)), 8))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Residual().eval()


class Everything(nn.Module):
    """A layer of every kind that is swapped."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.t1 = nn.Conv1d(3, 4, 3), nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1)
        self.c2, self.t2 = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.c3, self.t3 = nn.Conv3d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1)
        self.fc, self.sum = nn.Linear(9, 5), qt.Add()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.t1(self.c1(x.flatten(2)[:, :, :20]))[:, :, :9]
        b = self.t2(self.c2(x))[:, :3, 0, :]
        c = self.t3(self.c3(x[:, :2, None])).flatten(1)[:, None, :9]
        found: torch.Tensor = self.fc(self.sum(a, b) + c)
        return found


def everything() -> nn.Module:
    torch.manual_seed(2)
    return Everything().eval()


# ---- layers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["affine", "dorefa"])
@pytest.mark.parametrize("build", [network, everything])
def test_32_bits_are_float_bit_for_bit(build: Callable[[], nn.Module], scheme: str) -> None:
    model = build()
    prepared = qt.prepare(model, weight_bits=32, activation_bits=32, scheme=scheme)
    qt.calibrate(prepared, BATCHES)
    with torch.no_grad():
        assert all(torch.equal(prepared(batch), model(batch)) for batch in BATCHES)


def test_every_kind_of_layer_is_swapped_in_a_copy() -> None:
    model = everything()
    prepared = qt.prepare(model)
    kinds = {name: type(module).__name__ for name, module in prepared.named_children()}
    assert kinds == {
        "c1": "QuantConv1d", "t1": "QuantConvTranspose1d", "c2": "QuantConv2d", "t2": "QuantConvTranspose2d",
        "c3": "QuantConv3d", "t3": "QuantConvTranspose3d", "fc": "QuantLinear", "sum": "QuantAdd",
    }  # fmt: skip
    assert not any(isinstance(module, qt.QuantLinear) for module in model.modules())
    qt.calibrate(prepared, BATCHES)
    with torch.no_grad():
        exact, found = model(BATCHES[0]), prepared(BATCHES[0])
    assert 0 < float((found - exact).square().sum() / exact.square().sum()) < 10**-3  # 30 dB at 8 bits


def test_pytorchs_own_sum_is_swapped() -> None:
    quantized = pytest.importorskip("torch.ao.nn.quantized")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum, self.fc = quantized.FloatFunctional(), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.fc(self.sum.add(x, x))
            return found

    prepared = qt.prepare(Net())
    assert isinstance(prepared.sum, qt.QuantAdd)
    qt.calibrate(prepared, BATCHES)
    assert prepared(BATCHES[0]).shape == (8, 3, 8, 4)


class Functions(nn.Module):
    """Everything that PyTorch's FloatFunctional computes; one of them only multiplies."""

    def __init__(self) -> None:
        super().__init__()
        kind = pytest.importorskip("torch.ao.nn.quantized").FloatFunctional
        self.fc, self.all, self.product = nn.Linear(8, 8), kind(), kind()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        y = self.all.cat([self.all.add_relu(x, y), self.all.mul_scalar(y, 0.5), self.all.add_scalar(x, 0.5)], dim=2)
        y = self.all.matmul(y, y.transpose(2, 3))
        found: torch.Tensor = self.product.mul(y, y)
        return found


@pytest.mark.parametrize("scheme", ["affine", "dorefa"])
def test_pytorchs_other_functions_are_kept(tmp_path: Path, scheme: str) -> None:
    torch.manual_seed(0)
    model = Functions().eval()
    passing = qt.prepare(model, weight_bits=32, activation_bits=32)
    prepared = qt.freeze(qt.calibrate(qt.prepare(model, scheme=scheme), BATCHES))
    done = qt.convert(prepared, tmp_path / "q.onnx", BATCHES)
    with torch.no_grad():
        assert torch.equal(passing(BATCHES[0]), model(BATCHES[0]))
        expected, found = prepared(BATCHES[0]), outputs(done.model, BATCHES[0])
    error = (found - expected).square().sum() / expected.square().sum()
    assert error < {"affine": 1e-3, "dorefa": 0.1}[scheme]


COMPUTED: list[Callable[[nn.Module], nn.Module]] = [
    torch.nn.utils.weight_norm,
    torch.nn.utils.spectral_norm,
    torch.nn.utils.parametrizations.weight_norm,
    torch.nn.utils.parametrizations.spectral_norm,
    lambda layer: prune.identity(layer, "weight"),  # type: ignore[no-untyped-call]
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("normed", COMPUTED)
def test_layers_that_compute_their_weight_are_refused(normed: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), normed(nn.Linear(8, 8)))
    with pytest.raises(ModelError, match=r"'1' computes its parameters.*remove_parametrizations"):
        qt.prepare(model)
    prepared = qt.prepare(model, Recipe(layers=Layers(exclude=("1",))), inplace=True)
    assert [type(layer).__name__.startswith("Quant") for layer in prepared.children()] == [True, False]


def test_a_parametrized_layer_that_was_left_out_stays_float(tmp_path: Path) -> None:
    x = torch.from_numpy(normal(16, 8))
    model = nn.Sequential(nn.Linear(8, 8), torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    prepared = qt.calibrate(qt.prepare(model, Recipe(layers=Layers(exclude=("1",)))), [x])
    done = qt.convert(prepared, tmp_path / "q.onnx", [x])
    assert [layer.operator for layer in done.plan.layers] == ["Gemm"]
    assert [layer.operator for layer in done.plan.floats] == ["Gemm"]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.nn.utils.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ModelError, match=r"Sequential cannot be copied .*weight_norm"):
        qt.prepare(model, Recipe(layers=Layers(exclude=("1",))))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_layers_that_are_not_float32_are_refused(kind: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).to(kind)
    with pytest.raises(ModelError, match=rf"'0' is {str(kind).removeprefix('torch.')}, .*model\.float\(\)"):
        qt.prepare(model)


def test_models_and_data_of_other_precisions_are_refused_at_convert(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.ones(4, 8)
    with pytest.raises(ModelError, match=r"Sequential computes in float64; .*model\.float\(\)"):
        qt.convert(model.double(), tmp_path / "q.onnx", [x.double()])
    with pytest.raises(DataError, match=r"bfloat16.*model\.float\(\)"):
        qt.convert(model.bfloat16(), tmp_path / "q.onnx", [x.bfloat16()])
    with pytest.raises(DataError, match=r"the model fails on a batch .*same dtype"):
        qt.calibrate(qt.prepare(model.float()), [x.half()])


@pytest.mark.parametrize("bits", [1, 0, -1, 17, 31, 33, 8.5, "8", True])
@pytest.mark.parametrize("what", ["weight_bits", "activation_bits"])
def test_widths_that_cannot_be_made_are_refused(bits: Any, what: str) -> None:
    with pytest.raises(UsageError, match=f"{bits!r} bit"):
        qt.prepare(network(), **{what: bits})


def test_patterns_choose_layers() -> None:
    def swapped(**layers: Any) -> set[str]:
        prepared = qt.prepare(network(), Recipe(layers=Layers(**layers)))
        return {name for name, module in prepared.named_modules() if type(module).__name__.startswith("Quant")}

    assert swapped() == {"stem.0", "depthwise.0", "point", "up", "head"}
    assert swapped(exclude=("stem.*", "op:Linear")) == {"depthwise.0", "point", "up"}
    assert swapped(include=("op:Conv2d",)) == {"stem.0", "depthwise.0", "point"}
    with pytest.raises(UsageError, match="'nothing' matches no layer"):
        swapped(exclude=("nothing",))
    with pytest.raises(UsageError, match="no layer that could be prepared"):
        qt.prepare(nn.ReLU())
    with pytest.raises(UsageError, match=r"nn\.Sequential"):
        qt.prepare(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="no scheme 'binary'"):
        qt.prepare(network(), scheme="binary")


# ---- quantizers ----------------------------------------------------------------------------------------------------------------

FINITE = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@given(
    lo=FINITE,
    hi=FINITE,
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    values=st.lists(FINITE, min_size=1, max_size=8),
)
def test_an_activation_is_rounded_as_a_plan_rounds_it(
    lo: float, hi: float, bits: int, symmetric: bool, values: list[float]
) -> None:
    lo, hi = min(lo, hi), max(lo, hi)
    integer = IntegerType(f"int{bits}")
    quantizer = qt.ActivationQuantizer(integer, symmetric)
    with torch.no_grad():
        quantizer.lo.fill_(lo)
        quantizer.hi.fill_(hi)
        found = quantizer(torch.tensor(values)).numpy()
    scale, zero_point = (symmetric_parameters if symmetric else affine_parameters)(lo, hi, integer)
    q = quantize(np.array(values, dtype=np.float32), np.array(scale), np.array(zero_point), integer, None)
    assert (found == (q.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)).all()
    ends = quantizer.bounds()
    assert ends == ((integer.qmin - zero_point) * float(scale), (integer.qmax - zero_point) * float(scale))


@given(values=st.lists(FINITE, min_size=4, max_size=4), bits=st.integers(2, 16), per_channel=st.booleans())
def test_a_weight_is_rounded_as_a_plan_rounds_it(values: list[float], bits: int, per_channel: bool) -> None:
    weight = np.array(values, dtype=np.float32).reshape(2, 2)
    quantizer = qt.WeightQuantizer(bits, 0 if per_channel else None)
    integer = IntegerType(f"int{bits}", narrow=True)
    largest = np.abs(weight).max(axis=1) if per_channel else np.abs(weight).reshape(1, -1).max(axis=1)
    scales = symmetric_scales(largest, integer)
    assert (quantizer.scale(torch.from_numpy(weight)).numpy() == scales).all()
    spread = scales.reshape(-1, 1) if per_channel else scales
    expected = np.clip(np.rint(weight / spread), integer.qmin, integer.qmax).astype(np.float32) * spread
    found = quantizer(torch.from_numpy(weight))
    assert (found.numpy() == expected).all()
    assert (
        torch.equal(quantizer(found), found) or bits > 12
    )  # on the grid, it stays; the finest scales differ by an ulp


@given(values=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=8), bits=st.integers(2, 16))
def test_dorefa_gives_its_levels(values: list[float], bits: int) -> None:
    steps = 2**bits - 1
    x = torch.tensor(values)
    activation = qt.DorefaActivation(bits)(x).double().numpy() * steps
    expected = np.rint(np.clip(np.array(values, dtype=np.float32) * np.float32(0.1), 0, 1).astype(np.float32) * steps)
    assert np.abs(activation - np.rint(activation)).max() < steps * 2.0**-22
    assert np.abs(np.rint(activation) - expected).max() <= 1  # a tie of float32
    weight = qt.DorefaWeight(bits)(x).double().numpy() * steps
    odd = (np.rint(weight) % 2 == 1).all()
    assert odd or not any(values)
    assert np.abs(weight - np.rint(weight)).max() < steps * 2.0**-22
    assert np.abs(weight).max() <= steps * (1 + 2.0**-22)


def test_rounding_passes_gradients_straight_through() -> None:
    quantizer = qt.ActivationQuantizer(IntegerType("uint4"))
    with torch.no_grad():
        quantizer.lo.fill_(0.0)
        quantizer.hi.fill_(3.0)
    x = torch.tensor([-1.0, 0.55, 1.31, 2.9, 5.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    assert quantizer.hi.grad is not None
    assert float(quantizer.hi.grad) > 0  # what is cut off above pulls the range up
    weight = torch.tensor([[0.3, -0.8]], requires_grad=True)
    qt.WeightQuantizer(3, 0)(weight).sum().backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, torch.ones(1, 2))
    squashed = torch.tensor([0.3, -0.8], requires_grad=True)
    qt.DorefaWeight(3)(squashed).sum().backward()
    assert squashed.grad is not None
    slope = (1 - torch.tanh(squashed.detach()) ** 2) / torch.tanh(torch.tensor(0.8))
    assert torch.allclose(squashed.grad, slope, rtol=1e-5)


def test_weights_that_are_quantized_already_pass_through() -> None:
    model = network()
    prepared = qt.prepare(model, weight_bits=3, activation_bits=32, scheme="dorefa", quant_inference=True)
    with torch.no_grad():
        assert torch.equal(prepared(BATCHES[0]), model(BATCHES[0]))


# ---- calibrate and freeze ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mean-minmax", "mse"])
def test_ranges_come_from_observers(observer: Any) -> None:
    recipe = Recipe(calibration=Calibration(observer=observer))
    prepared = qt.calibrate(qt.prepare(network()), BATCHES, recipe)
    lo, hi = dict(named_quantizers(prepared))["stem.0.activation_quantizer"].range()
    seen = torch.cat(BATCHES)
    if observer == "minmax":
        assert (lo, hi) == (float(seen.min()), float(seen.max()))
    else:
        assert float(seen.min()) <= lo < 0 < hi <= float(seen.max())
    assert not prepared.training
    assert qt.calibrate(qt.prepare(network()).train(), BATCHES).training


def test_loaders_yield_tensors_tuples_and_dicts() -> None:
    found = []
    for loader in (
        BATCHES,
        [(b, torch.zeros(8)) for b in BATCHES],
        [{"x": b} for b in BATCHES],
        [[{"x": b}] for b in BATCHES],
    ):
        prepared = qt.calibrate(qt.prepare(network()), loader)
        found.append([quantizer.range() for _, quantizer in sorted(named_quantizers(prepared))])
    assert all(one == found[0] for one in found)
    with pytest.raises(DataError, match="yields no batch"):
        qt.calibrate(qt.prepare(network()), [])
    with pytest.raises(DataError, match="yields str"):
        qt.calibrate(qt.prepare(network()), ["text"])


class Named(nn.Module):
    """Two inputs, one of which may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.fc(x if mask is None else x * mask)
        return found


def test_what_forward_does_not_take_is_left_out(tmp_path: Path) -> None:
    x = torch.from_numpy(normal(16, 8))
    batches = [UserDict(x=x, labels=torch.ones(16)), {"x": x, "names": ["a"] * 16}]
    prepared = qt.calibrate(qt.prepare(Named()), batches)
    done = qt.convert(prepared, tmp_path / "q.onnx", batches)
    assert [spec.name for spec in Runner(done.model).inputs] == ["x"]


X = torch.ones(4, 8)
BATCHES_REFUSED: list[tuple[list[Any], str]] = [
    ([{"mask": X}], "hold no 'x' .they hold mask.; name their entries after the arguments of forward: x, mask"),
    ([{"x": X, "mask": [1]}], "'mask' of the loader's batches is of the type list"),
    ([{"x": X, "mask": X}, {"x": X}], "yields 8 of 'x', 4 of 'mask'"),
]


@pytest.mark.parametrize(("batches", "message"), BATCHES_REFUSED)
def test_batches_that_do_not_suffice_are_refused(tmp_path: Path, batches: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        qt.convert(Named(), tmp_path / "q.onnx", batches)


WRONG: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (qt.prepare, ("model.pt",), "the model is of the type str"),
    (qt.prepare, (Named(), {"target": "tflite"}), "the recipe is of the type dict; give a quantcli.Recipe"),
    (qt.calibrate, (qt.prepare(Named()), None), "the loader is None"),
    (qt.calibrate, (Named(), [X]), "the model is not prepared"),
    (qt.freeze, (Named(),), "the model is not prepared"),
    (qt.convert, ("model.pt", "q.onnx", [X]), "the model is of the type str"),
    (qt.convert, (Named(), None, [X]), "the output is None"),
    (qt.to_sidecar, (Named(), 3), "the loader is of the type int"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), WRONG)
def test_arguments_of_other_types_are_usage_errors(
    function: Callable[..., Any], arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        function(*arguments)


def named_quantizers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, qt.ActivationQuantizer)]


def test_without_ranges_nothing_runs() -> None:
    prepared = qt.prepare(network())
    with pytest.raises(PlanError, match="calibrate the prepared model first"):
        prepared(BATCHES[0])
    with pytest.raises(PlanError, match="has no range"):
        qt.freeze(prepared)
    with pytest.raises(PlanError, match="has no range"):
        floated(prepared)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.used(x)
            return found

    with pytest.raises(PlanError, match="does not reach 'idle"):
        qt.calibrate(qt.prepare(Half()), BATCHES)


@pytest.mark.parametrize("scheme", ["affine", "dorefa"])
def test_a_frozen_model_gives_what_it_gave_and_learns_no_more(scheme: str) -> None:
    prepared = qt.calibrate(qt.prepare(network(), weight_bits=4, activation_bits=5, scheme=scheme), BATCHES)
    with torch.no_grad():
        before = prepared(BATCHES[0])
        frozen = qt.freeze(prepared)
        assert torch.equal(frozen(BATCHES[0]), before)
    weight = frozen.get_parameter("head.weight").detach()
    assert len(torch.unique(weight[0])) <= 16
    assert not any(quantizer.hi.requires_grad for _, quantizer in named_quantizers(frozen))


class Tied(nn.Module):
    """An embedding and two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.wide, self.narrow = nn.Embedding(6, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.wide.weight = self.narrow.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        found: torch.Tensor = self.wide(x) + self.narrow(x)
        return found


@pytest.mark.parametrize("scheme", ["affine", "dorefa"])
def test_freezing_leaves_shared_weights_to_the_others(scheme: str) -> None:
    torch.manual_seed(0)
    tokens = torch.arange(6).reshape(2, 3)
    prepared = qt.calibrate(qt.prepare(Tied(), weight_bits=4, scheme=scheme), [tokens])
    with torch.no_grad():
        before = prepared.eval()(tokens)
        table = prepared.get_parameter("embedding.weight").clone()
        assert torch.equal(qt.freeze(prepared)(tokens), before)
    assert torch.equal(prepared.get_parameter("embedding.weight"), table)
    assert len(torch.unique(prepared.get_parameter("wide.weight")[0])) < 8


def test_training_recovers_what_narrow_grids_lose() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )
    x = torch.cat(BATCHES)
    with torch.no_grad():
        labels = teacher.eval()(x).argmax(1)
    prepared = qt.prepare(teacher, weight_bits=4, activation_bits=4, scheme="dorefa")

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(prepared(x), labels)

    before = float(loss().detach())
    optimizer = torch.optim.Adam(prepared.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(loss().detach()) < 0.5 * before
    assert (prepared(x).argmax(1) == labels).float().mean() > 0.9


# ---- to integers ---------------------------------------------------------------------------------------------------------------


def outputs(path: Path, x: torch.Tensor) -> torch.Tensor:
    runner = Runner(path)
    return torch.from_numpy(next(iter(runner.run({runner.inputs[0].name: x.numpy()}).values())))


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
    # Biases are rounded to the step of the accumulator, and a value on a tie may go the other way: that is all.
    assert float((found - expected).square().sum() / expected.square().sum()) < {8: 1e-3, 7: 1e-3}.get(bits, 0.05)


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


def test_a_saved_prepared_model_converts_through_its_factory(tmp_path: Path) -> None:
    prepared = qt.calibrate(prepared_network(), BATCHES)
    torch.save(prepared.state_dict(), tmp_path / "tuned.pt")
    np.savez(tmp_path / "d.npz", x=torch.cat(BATCHES).numpy())
    opening = Opening(factory="tests.test_prepare:prepared_network")
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
