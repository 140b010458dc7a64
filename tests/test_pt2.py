"""The exported PyTorch program: the same plan and sidecar, and the same numbers as the ONNX output, without quantcli."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from calibration.hooks.onnxruntime import Runner
from calibration.hooks.torch import ProgramRunner
from quantcli import Recipe, convert, evaluate
from quantcli.cli import run
from quantcli.errors import OutputError, UsageError
from quantcli.fold import fold
from quantcli.load import Opening, load
from quantcli.load.torch import program_at
from quantcli.observation import Run
from quantcli.pipeline import calibrate, verify
from quantcli.recipe import Tune
from quantcli.write.torch_operators import operators
from quantcli.write.torch_pt2 import Network, write
from tests.deviation import TIES, Deviation
from tests.graphs import data_for, node, normal, save
from tests.operators import CASES, RANGES, converted, data, ran
from tests.test_torch_forms import Several, network

FAST = Recipe(tune=Tune(effort="fast"))


@pytest.mark.parametrize("name", CASES)
def test_operators_in_torch_give_what_they_give_in_onnx_runtime(tmp_path: Path, name: str) -> None:
    wanted = CASES[name]
    feeds = data(wanted.inputs, RANGES["around zero"])
    model, done = converted(tmp_path, wanted, wanted.opsets[-1], feeds, FAST)
    written = done.model.read_bytes()
    try:
        with torch.no_grad():
            found = Network(ir.load(done.model)).eval()(*map(torch.from_numpy, feeds.values()))
    except OutputError as error:
        assert name in REFUSED, error  # noqa: PT017 - it may be refused, with a reason
        return
    assert name not in REFUSED
    results = dict(zip(wanted.outputs, found if isinstance(found, tuple) else (found,), strict=True))
    expected = ran(written, feeds, wanted.outputs)
    folded = fold(ir.load(model))
    between = Deviation(folded, done.plan, feeds, Deviation(folded, done.plan, feeds).bounds).bounds
    for output in wanted.outputs:
        apart = np.abs(results[output].numpy().astype(np.float64) - expected[output])
        assert (apart <= between[output]).all()
        # Interpolation by exact fractions of integers lands on ties all the time, and every kernel leaves them in its own way.
        ties = 0.05 if name.startswith("Resize, linear") else TIES
        assert (apart > 0).sum() <= max(1, ties * apart.size)


# What PyTorch has no counterpart for; everything else of the table is written.
REFUSED = {
    "ConvTranspose, SAME_UPPER",
    "ConvTranspose, output_shape",
    *(f"Resize, linear, {how}" for how in ("antialias", "half_pixel_symmetric", "asymmetric, 0.75", "asymmetric, 2.0")),
    *(f"Resize, nearest, {how}, 0.75" for how in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")),
    "Resize, nearest, ceil",
    "Resize, nearest, sizes",
}


def test_every_operator_of_the_rules_has_a_row() -> None:
    from quantcli.rules import RULES

    assert set(RULES) <= set(operators())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network as a program, and the same as ONNX."""
    folder = tmp_path_factory.mktemp("pt2")
    example = (torch.ones(2, 3, 8, 8),)
    program = torch.export.export(network(), example, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, folder / "m.pt2")
    data_for(folder / "data.npz")
    for name in ("q.onnx", "q.int8.pt2"):
        convert(folder / "m.pt2", folder / name, data=folder / "data.npz", recipe=FAST)
    return folder


LOADED = """
import sys
import torch
import torch.ao.quantization.fx._decomposed
program = torch.export.load(sys.argv[1])
x = torch.load(sys.argv[2])
torch.save([program.module()(part) for part in x], sys.argv[3])
assert not any(name.startswith(("quantcli", "calibration", "onnx")) for name in sys.modules)
"""


def test_it_runs_without_quantcli_and_gives_what_the_onnx_output_gives(written: Path, tmp_path: Path) -> None:
    parts = [torch.from_numpy(normal(n, 3, 8, 8, seed=n)) for n in (1, 7)]
    torch.save(parts, tmp_path / "x.pt")
    files = [str(written / "q.int8.pt2"), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run([sys.executable, "-I", "-c", LOADED, *files], check=True, capture_output=True, cwd=tmp_path)
    runner = Runner(written / "q.onnx")
    sidecar = json.loads((written / "q.json").read_bytes())
    step = sidecar["tensors"][sidecar["layers"][-1]["inputs"][0]]["scale"][0]
    for x, y in zip(parts, torch.load(tmp_path / "y.pt"), strict=True):
        expected = next(iter(runner.run({"x": x.numpy()}).values()))
        # A value on a tie may round the other way: a few steps of the last layer's input, times its weights, are all it can be.
        assert np.abs(y.detach().numpy() - expected).max() <= 4 * step
        assert (y.argmax(1).numpy() == expected.argmax(1)).all()


def test_weights_are_int8_under_the_sidecars_names(written: Path) -> None:
    sidecar = json.loads((written / "q.int8.json").read_bytes())
    program = torch.export.load(written / "q.int8.pt2")
    initializers = ir.load(written / "q.onnx").graph.initializers
    held: dict[str, Any] = dict(program.state_dict)
    weights = [tensor["integers"] for tensor in sidecar["tensors"].values() if tensor["role"] == "weight"]
    assert len(weights) == 5
    for name in weights:
        assert held[name].dtype == torch.int8
        assert (held[name].numpy() == initializers[name].const_value.numpy()).all()  # type: ignore[union-attr]
    assert not any(value.dtype == torch.float32 and value.numel() > 64 for value in held.values())
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function" and "quantize" in str(n.target)}
    assert targets == {
        "quantized_decomposed.quantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_tensor.default",
        "quantized_decomposed.dequantize_per_channel.default",
    }


def test_the_sidecar_is_the_onnx_outputs_but_for_the_file(written: Path) -> None:
    one, other = (json.loads((written / name).read_bytes()) for name in ("q.json", "q.int8.json"))
    assert one.pop("model")["name"] == "q.onnx"
    assert other.pop("model")["name"] == "q.int8.pt2"
    assert one == other


def test_the_same_bytes_twice_and_nothing_local(written: Path, tmp_path: Path) -> None:
    convert(written / "m.pt2", tmp_path / "q.int8.pt2", data=written / "data.npz", recipe=FAST)
    content = (tmp_path / "q.int8.pt2").read_bytes()
    assert content == (written / "q.int8.pt2").read_bytes()
    for member in ("models/model.json", "data/weights/model_weights_config.json"):
        import zipfile

        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            text = archive.read(next(n for n in archive.namelist() if n.endswith(member)))
        assert b".py" not in text
        assert str(Path(__file__).parent).encode() not in text


def test_eval_runs_it_in_torch(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(written / "q.int8.pt2", written / "data.npz", written / "m.pt2")
    same = evaluate(written / "q.onnx", written / "data.npz", written / "m.pt2", latency=False)
    assert found.metric == "sqnr"
    assert found.quantized == pytest.approx(same.quantized, abs=1.0)  # ties, in dB, of 160 values
    assert found.latency is None
    assert found.size == (written / "q.int8.pt2").stat().st_size
    arguments = f"eval {written / 'q.int8.pt2'} --data {written / 'data.npz'} --float {written / 'm.pt2'} --layers"
    assert run(arguments.split()) == 2
    assert "leave them out" in capsys.readouterr().err


def test_outputs_are_nested_as_the_source_nests_them(tmp_path: Path) -> None:
    torch.save(Several().eval(), tmp_path / "m.pt")
    np.savez(tmp_path / "d.npz", image=normal(16, 8), rows=normal(16, 5, seed=1))
    opening = Opening(trusted=True)
    convert(tmp_path / "m.pt", tmp_path / "q.pt2", data=tmp_path / "d.npz", recipe=FAST, opening=opening)
    module = torch.export.load(tmp_path / "q.pt2").module()
    found = module(torch.ones(3, 8), rows=torch.ones(3, 5))
    assert set(found) == {"logits", "sum"}
    assert found["logits"].shape == (3, 4)


class Nested(nn.Module):
    """Inputs in a tuple and a dict and by name; one is given out, and outputs are called like an input and like what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(
        self, x: torch.Tensor, pair: tuple[torch.Tensor, dict[str, torch.Tensor]], *, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        y = torch.relu(self.first(x) + pair[0] + pair[1]["more"]) * mask
        return {"linear": self.second(y), "x": x}


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of nested inputs, and data beside it."""
    folder = tmp_path_factory.mktemp("nested")
    x, first, more, mask = (torch.from_numpy(normal(4, 8, seed=seed)) for seed in range(4))
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Nested().eval(),
        (x, (first, {"more": more})),
        {"mask": mask},
        dynamic_shapes={"x": rows, "pair": (rows, {"more": rows}), "mask": rows},
    )
    torch.export.save(program, folder / "m.pt2")
    np.savez(folder / "d.npz", **dict(zip(program.graph_signature.user_inputs, normal(4, 16, 8), strict=True)))
    return folder


def test_inputs_are_nested_as_the_source_nests_them(nested: Path, tmp_path: Path) -> None:
    convert(nested / "m.pt2", tmp_path / "q.pt2", data=nested / "d.npz", recipe=FAST)
    program = program_at(tmp_path / "q.pt2")
    assert program.graph_signature.user_inputs == ("x", "pair_0", "pair_1_more", "mask")
    x, first, more, mask = torch.from_numpy(normal(4, 3, 8, seed=5))
    arguments, keywords = (x, (first, {"more": more})), {"mask": mask}
    found = program.module()(*arguments, **keywords)
    expected = torch.export.load(nested / "m.pt2").module()(*arguments, **keywords)
    assert torch.equal(found["x"], x)
    assert (found["linear"] - expected["linear"]).square().sum() < 1e-2 * expected["linear"].square().sum()


def test_inputs_keep_their_names_whatever_outputs_are_called(nested: Path) -> None:
    runner = Runner(load(nested / "m.pt2").runnable)
    assert [spec.name for spec in runner.inputs] == ["x", "pair_0", "pair_1_more", "mask"]
    assert runner.outputs == ("linear", "x_output")
    assert "x" in calibrate(nested / "m.pt2", nested / "d.npz", run=Run(runtime="torch")).tensors


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_layers_that_stay_float_are_torchs_own(tmp_path: Path, kind: str, both: bool) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(nn, kind)(6, 5, batch_first=True, bidirectional=both)
            self.head = nn.Linear(10 if both else 5, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.head(self.rnn(x)[0][:, -1]))

    torch.manual_seed(1)
    module = Rows().eval()
    program = torch.export.export(module, (torch.ones(2, 7, 6),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "m.pt2")
    np.savez(tmp_path / "d.npz", x=normal(16, 7, 6))
    done = convert(tmp_path / "m.pt2", tmp_path / "q.pt2", data=tmp_path / "d.npz", recipe=FAST)
    assert min(done.check.sqnr.values()) > 30


def test_a_model_of_onnx_becomes_a_program_too(net: Path, tmp_path: Path) -> None:
    done = convert(net, tmp_path / "q.pt2", data=data_for(tmp_path / "d.npz"), recipe=FAST, verified=True)
    runner = ProgramRunner(torch.export.load(done.model), outputs=["y"])
    assert runner.inputs[0].name == "x"
    assert runner.run({"x": normal(3, 3, 8, 8)})["y"].shape == (3, 10)


def test_what_cannot_be_written_says_so_and_leaves_nothing(net: Path, tmp_path: Path) -> None:
    samples = data_for(tmp_path / "d.npz")
    with pytest.raises(UsageError, match="qoperator"):
        convert(net, tmp_path / "q.pt2", data=samples, recipe=FAST, form="qoperator")
    with pytest.raises(UsageError, match="dynamic"):
        convert(net, tmp_path / "q.pt2", recipe=Recipe(mode="dynamic"))
    odd = save(
        tmp_path / "odd.onnx",
        [node("Conv", ["x", "w"], ["c"]), node("Det", ["c"], ["y"])],
        {"x": ["N", 3, 8, 8]},
        {"y": None},
        {"w": normal(4, 3, 3, 3)},
    )
    with pytest.raises(OutputError, match=r"Det 'y_node' cannot be written in PyTorch.*write \.onnx"):
        convert(odd, tmp_path / "q.pt2", data=samples, recipe=Recipe(tune=Tune(effort="fast")))
    assert not list(tmp_path.glob("q.*"))


def test_verify_says_that_it_runs_onnx(written: Path) -> None:
    with pytest.raises(UsageError, match=r"convert to \.onnx"):
        verify(written / "q.int8.json")


def test_a_fixed_batch_stays_fixed() -> None:
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 3]) for name in "xy")
    graph = helper.make_graph([node("Relu", ["x"], ["y"])], "g", [given], [made])
    model = ir.from_proto(helper.make_model(graph))
    program = torch.export.load(io.BytesIO(write(model)))
    assert ProgramRunner(program).inputs[0].shape == (4, 3)
