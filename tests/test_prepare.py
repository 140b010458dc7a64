"""Live models: prepared layers are their twins, quantizers are the plan's, gradients pass; calibration and freezing."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
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
from quantcli.recipe import Calibration, Layers
from quantcli.torch.floats import floated
from tests.graphs import normal
from tests.test_torch import Residual

BATCHES = list(torch.split(torch.from_numpy(normal(32, 3, 8, 8, seed=3)), 8))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Residual().eval()


def outputs(path: Path, x: torch.Tensor) -> torch.Tensor:
    runner = Runner(path)
    return torch.from_numpy(next(iter(runner.run({runner.inputs[0].name: x.numpy()}).values())))


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


class Pair(nn.Module):
    """Two inputs, both of which are needed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(4, 32)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.a(left) - self.b(right)
        return found


def test_tuples_hold_as_many_inputs_as_forward_needs(tmp_path: Path) -> None:
    left, right, labels = torch.from_numpy(normal(16, 8)), torch.from_numpy(normal(16, 4, seed=1)), torch.zeros(16)
    loaders: list[Any] = [
        [{"left": left, "right": right}],
        [(left, right)],
        [[left, right, labels]],
        [((left, right), labels)],
        [({"left": left, "right": right}, labels)],
    ]
    torch.manual_seed(0)
    model = Pair().eval()
    found = [qt.to_sidecar(qt.calibrate(qt.prepare(model), loader), loader).tensors for loader in loaders]
    assert found[0].keys() >= {"left", "right"}
    assert all(one == found[0] for one in found)
    for loader in ([left], [(left,)], [((left,), right)]):
        with pytest.raises(
            DataError, match=r"hold no 'right' .they hold 1 tensors.; .*tuples in their order: left, right"
        ):
            qt.convert(model, tmp_path / "q.onnx", loader)


def test_what_forward_does_not_take_is_left_out(tmp_path: Path) -> None:
    x = torch.from_numpy(normal(16, 8))
    batches = [UserDict(x=x, labels=torch.ones(16)), {"x": x, "names": ["a"] * 16}]
    prepared = qt.calibrate(qt.prepare(Named()), batches)
    done = qt.convert(prepared, tmp_path / "q.onnx", batches)
    assert [spec.name for spec in Runner(done.model).inputs] == ["x"]


X = torch.ones(4, 8)
BATCHES_REFUSED: list[tuple[list[Any], str]] = [
    ([{"mask": X}], "hold no 'x' .they hold mask.; yield dicts by the arguments of forward, .*: x, mask"),
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
