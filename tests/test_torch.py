"""A PyTorch model enters as an exported program, and gives what its ONNX export gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, evaluate
from quantcli.errors import ModelError
from quantcli.fold import fold
from quantcli.load import load
from quantcli.load.training import check_evaluating
from quantcli.recipe import Tune
from tests.graphs import data_for, normal


class Residual(nn.Module):
    """BatchNorm, depthwise convolution, a residual and a transposed convolution's worth of what real networks hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.point = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.point(self.depthwise(x)) + x)
        x = torch.relu(self.up(x))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network saved as .pt2 and as .onnx, and calibration data beside it."""
    folder = tmp_path_factory.mktemp("torch")
    torch.manual_seed(0)
    module = Residual().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = torch.randn(layer.num_features) * 0.1
            layer.running_var = torch.rand(layer.num_features) + 0.5
    example = (torch.randn(2, 3, 8, 8),)
    program = torch.export.export(module, example, dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(program, folder / "net.pt2")
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    exported.save(folder / "net.onnx")
    data_for(folder / "data.npz")
    return folder


def test_pt2_and_onnx_give_the_same_integers(saved: Path, tmp_path: Path) -> None:
    results = []
    for suffix in ("pt2", "onnx"):
        done = convert(saved / f"net.{suffix}", tmp_path / f"{suffix}.onnx", data=saved / "data.npz")
        assert {"Conv", "ConvTranspose", "Gemm", "Add"} <= {layer.operator for layer in done.plan.layers}
        assert done.check.sqnr and min(done.check.sqnr.values()) > 25  # noqa: PT018
        runner = Runner(done.model)
        results.append(next(iter(runner.run({"x": normal(8, 3, 8, 8, seed=40)}).values())))
    assert (results[0] == results[1]).all()


class Permuted(nn.Module):
    """Pooling of whole channels, or to other sizes, over a tensor whose channels lie last, as in ConvNeXt."""

    def __init__(self, rank: int, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.rank, self.sizes, self.norm, self.head = rank, sizes, nn.LayerNorm(4), nn.Linear(4, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels_first = self.norm(x).permute(0, self.rank + 1, *range(1, self.rank + 1))
        pool = getattr(nn.functional, f"adaptive_avg_pool{self.rank}d")
        logits: torch.Tensor = self.head(sum(pool(channels_first, size).flatten(1)[:, :4] for size in self.sizes))
        return logits


@pytest.mark.parametrize(
    ("rank", "sizes", "output"), [(1, (1, 2), "q.onnx"), (2, (1, 2), "q.pt2"), (3, (1,), "q.onnx")]
)
def test_pooling_of_permuted_channels_is_a_mean(tmp_path: Path, rank: int, sizes: tuple[int, ...], output: str) -> None:
    torch.manual_seed(0)
    module, x = Permuted(rank, sizes).eval(), torch.randn(8, *(rank * [4]), 4)
    program = torch.export.export(module, (x[:2],), dynamic_shapes=({0: torch.export.Dim("N")},))
    torch.export.save(program, tmp_path / "net.pt2")
    source = load(tmp_path / "net.pt2")
    assert not {"Range", "Gather"} & {node.op_type for node in fold(source.graph).graph}
    np.testing.assert_allclose(
        next(iter(Runner(source.runnable).run({"x": x.numpy()}).values())), module(x).detach().numpy(), atol=1e-5
    )
    np.savez(tmp_path / "d.npz", x=x.numpy())
    recipe = Recipe(tune=Tune(effort="fast"))
    done = convert(source, tmp_path / output, data=tmp_path / "d.npz", recipe=recipe)
    assert min(done.check.sqnr.values()) > 25


class Stacked(nn.Module):
    """torch's stackings of what a list holds."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pair = [part.reshape(len(x), -1, 1) for part in (x, 2 * x)]
        return torch.hstack(pair), torch.vstack(pair), torch.dstack(pair)


def test_stackings_are_concatenations(tmp_path: Path) -> None:
    module, x = Stacked(), torch.randn(2, 3)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "net.pt2")
    source = load(tmp_path / "net.pt2")
    assert not [node.op_type for node in source.graph.graph if "Sequence" in node.op_type]
    found = Runner(source.runnable).run({"x": x.numpy()})
    assert [values.tolist() for values in found.values()] == [values.tolist() for values in module(x)]


def test_the_exported_program_is_what_eval_compares_with(saved: Path, tmp_path: Path) -> None:
    convert(saved / "net.pt2", tmp_path / "q.onnx", data=saved / "data.npz")
    found = evaluate(tmp_path / "q.onnx", saved / "data.npz", saved / "net.pt2", latency=False)
    assert found.metric == "sqnr"
    assert found.quantized > 25
    assert found.reference_size == (saved / "net.pt2").stat().st_size


def test_the_batch_is_free_and_nothing_local_is_written(saved: Path, tmp_path: Path) -> None:
    done = convert(saved / "net.pt2", tmp_path / "q.onnx", data=saved / "data.npz")
    runner = Runner(done.model)
    assert [len(next(iter(runner.run({"x": normal(n, 3, 8, 8)}).values()))) for n in (1, 5)] == [1, 5]
    for marker in (b"test_torch.py", str(saved).encode(), b"stack_trace"):
        assert marker not in done.model.read_bytes()


def test_what_is_no_exported_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt2").write_text("hello")
    np.savez(tmp_path / "zip.npz", x=np.zeros(1))
    (tmp_path / "zip.npz").rename(tmp_path / "zip.pt2")
    for name in ("text.pt2", "zip.pt2"):
        with pytest.raises(ModelError, match="not an exported program"):
            convert(tmp_path / name, tmp_path / "q.onnx", data=data_for(tmp_path / "d.npz"))


class Attending(nn.Module):
    """Attention without an axis of heads, which torch's exporter does not take, and torch itself takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(*self.inner(x).chunk(3, -1))


class Bessel(nn.Module):
    """A function that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.special.bessel_j0(self.inner(x))
        return found


def program_of(module: nn.Module, folder: Path) -> Path:
    """Save a module as an exported program of a free batch, and data for it."""
    torch.manual_seed(0)
    dynamic = ({0: torch.export.Dim("N", min=2, max=64)},)
    torch.export.save(
        torch.export.export(module.eval(), (torch.randn(2, 5, 8),), dynamic_shapes=dynamic), folder / "m.pt2"
    )
    np.savez(folder / "d.npz", x=normal(40, 5, 8, seed=3))
    return folder / "m.pt2"


@pytest.mark.parametrize("output", ["q.onnx", "q.pt2"])
def test_what_the_exporter_does_not_take_is_taken_apart(tmp_path: Path, output: str) -> None:
    model = program_of(Attending(), tmp_path)
    done = convert(model, tmp_path / output, data=tmp_path / "d.npz", verified=output.endswith("onnx"))
    assert [layer.operator for layer in done.plan.layers[:2]] == ["Reshape", "Gemm"]
    assert min(done.check.sqnr.values()) > 30


def test_what_cannot_be_expressed_is_named_and_why(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be expressed in ONNX \(.*bessel_j0.*\)") as refused:
        convert(program_of(Bessel(), tmp_path), tmp_path / "q.onnx", data=tmp_path / "d.npz")
    assert "\x1b" not in str(refused.value)


def test_the_line_is_named_that_the_exporter_fails_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.load.exporter.without", lambda *_: None)
    line = r"scaled_dot_product_attention.*: only 4D .*, at test_torch.py, line \d+, in forward"
    with pytest.raises(ModelError, match=line):
        convert(program_of(Attending(), tmp_path), tmp_path / "q.onnx", data=tmp_path / "d.npz")


TRAINED: list[Callable[[], nn.Module]] = [
    lambda: nn.Dropout(0.5),
    nn.Dropout1d,
    nn.AlphaDropout,
    lambda: nn.BatchNorm1d(5),
    lambda: nn.InstanceNorm1d(5, track_running_stats=True),
    lambda: nn.LSTM(8, 4, 2, dropout=0.5),
    lambda: nn.TransformerEncoderLayer(8, 2, 8),
    nn.RReLU,
]
# These give the same in both modes.
STEADY: list[Callable[[], nn.Module]] = [
    lambda: nn.Dropout(0.0),
    lambda: nn.BatchNorm1d(5, track_running_stats=False),
    lambda: nn.InstanceNorm1d(5),
    lambda: nn.LSTM(8, 4),
]


@pytest.mark.parametrize("build", TRAINED)
def test_programs_in_training_mode_are_refused(build: Callable[[], nn.Module]) -> None:
    module, x = build(), torch.ones(2, 5, 8)
    with pytest.raises(ModelError, match=r"m\.pt2 is in training mode: the operator aten\..*model\.eval\(\)"):
        check_evaluating(torch.export.export(module, (x,)), Path("m.pt2"))
    check_evaluating(torch.export.export(module.eval(), (x,)), Path("m.pt2"))


@pytest.mark.parametrize("build", STEADY)
def test_what_training_does_not_change_is_taken(build: Callable[[], nn.Module]) -> None:
    check_evaluating(torch.export.export(build(), (torch.ones(2, 5, 8),)), Path("m.pt2"))


def test_a_saved_program_in_training_mode_is_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    torch.export.save(torch.export.export(module, (torch.ones(2, 8),)), tmp_path / "m.pt2")
    with pytest.raises(ModelError, match=r"aten\.dropout"):
        load(tmp_path / "m.pt2")


class Growing(nn.Module):
    """An image that is made as large as is said, of a free batch: the sizes are computed while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(nn.functional.interpolate(torch.relu(self.first(x)), size=(16, 16)))
        return found


def test_images_resized_to_computed_sizes_are_tuned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(Growing().eval(), (torch.ones(2, 3, 8, 8),), dynamic_shapes=free)
    torch.export.save(program, tmp_path / "m.pt2")
    data_for(tmp_path / "d.npz")
    done = convert(tmp_path / "m.pt2", tmp_path / "q.onnx", data=tmp_path / "d.npz")
    assert [layer.operator for layer in done.plan.layers] == ["Conv", "Resize", "Conv"]
    assert not [record for record in caplog.records if "left out" in record.getMessage()]
