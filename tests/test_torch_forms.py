"""One network in every form that PyTorch saves gives the same integers; what cannot be used says why."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from calibration.datasets import InputSpec
from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert
from quantcli.cli import main, run
from quantcli.errors import ModelError, UsageError
from quantcli.load import Opening, load
from quantcli.load.torch import load_state, state_of
from quantcli.observation import Run
from quantcli.pipeline import calibrate
from quantcli.recipe import Tune
from tests.graphs import data_for, normal
from tests.test_torch import Residual

FAST = Recipe(tune=Tune(effort="fast"))
IMAGE = Opening(inputs=(InputSpec("x", np.dtype("float32"), (1, 3, 8, 8)),))


def network() -> nn.Module:
    """Build the network with weights of a fixed seed."""
    torch.manual_seed(0)
    return Residual().eval()


def unknown() -> nn.Module:
    """Build another network."""
    return nn.Linear(3, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network in every form, and data beside it."""
    folder = tmp_path_factory.mktemp("forms")
    module, example = network(), torch.ones(2, 3, 8, 8)
    torch.export.save(
        torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), folder / "m.pt2"
    )
    torch.jit.save(torch.jit.script(module), str(folder / "script.pt"))
    torch.jit.save(torch.jit.trace(module, example), str(folder / "trace.ts"))  # type: ignore[no-untyped-call]
    state = module.state_dict()
    torch.save(state, folder / "state.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "wrapped.pth")
    torch.save({"model": {f"_orig_mod.{k}": v for k, v in state.items()}}, folder / "compiled.ckpt")
    save_file(state, folder / "state.safetensors")
    torch.save(module, folder / "module.pt")
    (folder / "code.py").write_text("from tests.test_torch_forms import network as build\n")
    data_for(folder / "data.npz")
    return folder


BUILT = Opening(factory="tests.test_torch_forms:network")


def arithmetic(document: dict[str, Any]) -> list[Any]:
    """Return what a sidecar says of its layers, names aside."""
    tensors = document["tensors"]
    keys = ("role", "dtype", "scale", "zero_point", "qmin", "qmax")
    return [
        [
            layer["operator"],
            layer["clamp"],
            [[m["multiplier"], m["shift"]] for m in layer["multipliers"]],
            [[tensors[n][key] for key in keys] for n in [*layer["inputs"], *layer["outputs"]] if n in tensors],
        ]
        for layer in document["layers"]
    ]


def test_every_form_gives_the_same_integers(saved: Path, tmp_path: Path) -> None:
    forms = {
        "m.pt2": Opening(),
        "script.pt": Opening(),
        "trace.ts": Opening(),
        "state.pt": BUILT,
        "wrapped.pth": BUILT,
        "compiled.ckpt": Opening(factory=f"{saved / 'code.py'}:build"),
        "state.safetensors": BUILT,
        "module.pt": Opening(trusted=True),
    }
    found = {}
    for number, (name, opening) in enumerate(forms.items()):
        done = convert(saved / name, tmp_path / f"{number}.onnx", data=saved / "data.npz", recipe=FAST, opening=opening)
        assert [node.name for node in Runner(done.model).session.get_inputs()] == ["x"]
        found[name] = arithmetic(json.loads(done.sidecar_path.read_bytes()))
        runner = Runner(done.model)
        assert [len(next(iter(runner.run({"x": normal(n, 3, 8, 8)}).values()))) for n in (1, 5)] == [1, 5]
    assert len(found["m.pt2"]) >= 5
    assert all(numbers == found["m.pt2"] for numbers in found.values())


@pytest.mark.parametrize("name", ["script.pt", "state.pt"])
def test_torch_counts_what_onnx_runtime_counts(saved: Path, name: str) -> None:
    opening = BUILT if name == "state.pt" else Opening()
    here, there = (
        calibrate(saved / name, saved / "data.npz", opening=opening, run=Run(runtime=runtime)).tensors
        for runtime in ("onnxruntime", "torch")
    )
    assert set(here) == set(there)
    for tensor, seen in here.items():
        # Sums of at most 72 products of float32, in another order, three layers deep.
        bound = 2.0**-16 * max(abs(seen.minimum), abs(seen.maximum))
        assert abs(seen.minimum - there[tensor].minimum) <= bound
        assert abs(seen.maximum - there[tensor].maximum) <= bound


def test_an_input_that_torch_calls_otherwise_is_counted_in_torch(tmp_path: Path) -> None:
    """A Sequential's argument is ``input``, which a module's graph has renamed."""
    program = torch.export.export(reader(), (torch.ones(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "m.pt2")
    data = data_for(tmp_path / "d.npz", input=(3, 8, 8))
    found = calibrate(tmp_path / "m.pt2", data, run=Run(runtime="torch")).tensors
    stored = np.load(data)["input"]
    assert (found["input"].minimum, found["input"].maximum) == (stored.min(), stored.max())


def test_statistics_show_the_inputs_as_well_as_data_does(saved: Path, tmp_path: Path) -> None:
    calibrate(saved / "state.pt", saved / "data.npz", tmp_path / "s.stats", opening=BUILT)
    done = convert(saved / "state.pt", tmp_path / "q.onnx", tmp_path / "s.stats", recipe=FAST, opening=BUILT)
    assert done.plan.layers


def test_the_command_line_opens_a_state_dict(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    options = f"--factory code.py:build --data data.npz --effort fast -q -o {tmp_path / 'q.onnx'}"
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "wrapped.pth", *options.split()])
    assert stopped.value.code == 0
    more = f"--float wrapped.pth --factory code.py:build --data data.npz --no-latency --json {tmp_path / 'q.onnx'}"
    with pytest.raises(SystemExit) as stopped:
        main(["eval", *more.split()])
    assert stopped.value.code == 0


class Several(nn.Module):
    """Two inputs, one of them by keyword, one left out, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.rows = nn.Linear(8, 4), nn.Linear(5, 4)

    def forward(
        self, image: torch.Tensor, scale: torch.Tensor | None = None, *, rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        found = torch.relu(self.image(image)) + torch.relu(self.rows(rows))
        return {"logits": found if scale is None else found * scale, "sum": found.sum(1)}


def test_several_inputs_keywords_and_a_dict_of_outputs(tmp_path: Path) -> None:
    torch.save(Several().eval(), tmp_path / "m.pt")
    np.savez(tmp_path / "d.npz", image=normal(16, 8), rows=normal(16, 5, seed=1))
    done = convert(
        tmp_path / "m.pt", tmp_path / "q.onnx", data=tmp_path / "d.npz", recipe=FAST, opening=Opening(trusted=True)
    )
    runner = Runner(done.model)
    assert [spec.name for spec in runner.inputs] == ["image", "rows"]
    assert runner.outputs == ("logits", "sum")
    found = runner.run({"image": normal(3, 8), "rows": normal(3, 5)})
    assert found["logits"].shape == (3, 4)


class Pair(nn.Module):
    """A tuple of outputs."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(x) + x, x.mean((2, 3))


def test_other_axes_are_free_where_asked(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.save(module, tmp_path / "m.pt")
    opening = Opening(trusted=True, inputs=(InputSpec("input", np.dtype("float32"), (1, 3, 8, 8)),))
    fixed = load(tmp_path / "m.pt", opening)
    free = load(tmp_path / "m.pt", Opening(None, True, opening.inputs, (("input", 2), ("input", 3))))
    shapes = [Runner(model.runnable).inputs[0].shape for model in (fixed, free)]
    assert shapes == [(None, 3, 8, 8), (None, 3, None, None)]
    with pytest.raises(UsageError, match="--dynamic input:7 names no axis"):
        load(tmp_path / "m.pt", Opening(None, True, opening.inputs, (("input", 7),)))


class Recurrent(nn.Module):
    """A GRU of two layers, which is given its state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(64, 64, 2)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made, last = self.gru(x, state)
        return made, last


def test_inputs_that_share_no_batch_are_as_they_are_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    torch.save(Recurrent().eval(), tmp_path / "m.pt")
    np.savez(tmp_path / "runs.npz", x=normal(12, 5, 1, 64), state=normal(12, 2, 1, 64, seed=1))
    shown = ["--trust-pickle", "--input", "x:5x1x64", "--input", "state:2x1x64"]
    command = ["convert", str(tmp_path / "m.pt"), *shown, "--data", str(tmp_path / "runs.npz"), "--mode", "weights"]
    assert run([*command, "-o", str(tmp_path / "q.onnx")]) == 0
    assert "in batches of" not in capsys.readouterr().err
    assert [spec.shape for spec in Runner(tmp_path / "q.onnx").inputs] == [(5, 1, 64), (2, 1, 64)]


def test_a_tuple_of_outputs(tmp_path: Path) -> None:
    torch.save(Pair(), tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", Opening(trusted=True, inputs=IMAGE.inputs))
    assert len(Runner(loaded.runnable).outputs) == 2


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_modules_of_half_precision_are_shown_inputs_of_theirs(tmp_path: Path, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(kind).eval()
    torch.save(module, tmp_path / "m.pt")
    traced = torch.jit.trace(module, torch.ones(2, 8, dtype=kind))  # type: ignore[no-untyped-call]
    torch.jit.save(traced, str(tmp_path / "m.ts"))
    x, shown = normal(2, 8), {"input": normal(2, 8)}
    expected = module(torch.from_numpy(x).to(kind)).float().detach().numpy()
    # Both sides round products and sums of both layers, each by at most half an eps of the magnitudes that are summed.
    reach = np.abs(x)
    for layer in (module[0], module[2]):
        weight, bias = (value.detach().float().abs().numpy() for value in layer.parameters())
        reach = reach @ weight.T + bias
    bound = 2 * 4 * torch.finfo(kind).eps / 2 * reach
    for file in ("m.pt", "m.ts"):
        loaded = load(tmp_path / file, Opening(trusted=True), lambda names: {names[0]: shown["input"]})
        runner = Runner(loaded.runnable)
        (found,) = runner.run({runner.inputs[0].name: x.astype(runner.inputs[0].dtype)}).values()
        assert (np.abs(found - expected) <= bound).all()


class Branching(nn.Module):
    """Cannot be exported: it decides by what the data holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return torch.relu(x)
        return torch.relu(-x)


def test_what_cannot_be_exported_names_the_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(Branching(), tmp_path / "m.pt")
    with pytest.raises(
        ModelError, match=r"at test_torch_forms\.py, line \d+, in forward: if x\.sum\(\) > 0:"
    ) as caught:
        load(tmp_path / "m.pt", Opening(trusted=True, inputs=IMAGE.inputs))
    assert "\n" not in str(caught.value)
    assert "write torch.where or torch.cond there" in caught.value.remedy
    told = [record.name for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [name for name in told if name.startswith("torch")]


def fails() -> nn.Module:
    """Fail."""
    raise RuntimeError("no weights today")


def gives_a_number() -> int:
    """Give no module."""
    return 3


REFUSED: list[tuple[str, Opening, type[Exception], str]] = [
    ("state.pt", Opening(), UsageError, "--factory module:callable"),
    ("state.pt", Opening(factory="tests.test_torch_forms"), UsageError, "names no factory"),
    ("state.pt", Opening(factory="nowhere.py:build"), UsageError, r"there is no nowhere\.py"),
    ("state.pt", Opening(factory="tests.nowhere:build"), ModelError, "No module named"),
    ("state.pt", Opening(factory="tests.test_torch_forms:fails"), ModelError, "RuntimeError: no weights today"),
    ("state.pt", Opening(factory="tests.test_torch_forms:gives_a_number"), ModelError, "gives int"),
    ("state.pt", Opening(factory="tests.test_torch_forms:unknown"), ModelError, "lacks 'bias', 'weight' and holds"),
    ("state.pt", BUILT, ModelError, "there is no example of it.*--input x:"),
    ("script.pt", BUILT, UsageError, "which holds its code"),
    ("module.pt", Opening(trusted=True, factory="tests.test_torch_forms:network"), UsageError, "whole module"),
    ("m.pt2", BUILT, UsageError, "says all of itself"),
    ("short.pt", Opening(), ModelError, "cut short"),
    ("text.pth", Opening(), ModelError, "not what torch saves"),
    ("numbers.pt", Opening(), ModelError, "holds list"),
    ("training.pt", BUILT, ModelError, "dict of 'epoch', 'optimizer', 'weights'.*save its 'weights' alone"),
    ("epoch.pt", BUILT, ModelError, "dict of 'epoch', .*save its state dict alone, or as one of state_dict, "),
    ("double.pt2", Opening(), ModelError, "computes in float64"),
]


@pytest.mark.parametrize(("name", "opening", "kind", "message"), REFUSED)
def test_what_cannot_be_used_says_why(
    saved: Path, name: str, opening: Opening, kind: type[Exception], message: str
) -> None:
    (saved / "short.pt").write_bytes((saved / "state.pt").read_bytes()[:2000])
    (saved / "text.pth").write_text("hello")
    torch.save([1, 2], saved / "numbers.pt")
    state = torch.load(saved / "state.pt")
    torch.save({"epoch": 3, "optimizer": {"state": {}, "lr": 0.1}, "weights": state}, saved / "training.pt")
    torch.save({"epoch": 3}, saved / "epoch.pt")
    torch.export.save(torch.export.export(unknown().double(), (torch.ones(2, 3).double(),)), saved / "double.pt2")
    with pytest.raises(kind, match=message):
        load(saved / name, opening)


class Shared(nn.Module):
    """An embedding and a layer of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 8), nn.Linear(8, 6)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.embedding(tokens))
        return found


def test_a_weight_that_safetensors_keeps_once_is_loaded_under_all_its_names(tmp_path: Path) -> None:
    model, other = Shared(), Shared()
    save_model(model, str(tmp_path / "m.safetensors"))
    state = load_file(tmp_path / "m.safetensors")
    assert len(state) == 2
    load_state(other, state, tmp_path / "m.safetensors")
    assert torch.equal(other.head.weight, model.head.weight)
    with pytest.raises(ModelError, match=r"lacks 'head\.bias'"):
        load_state(other, {"head.weight": model.head.weight}, tmp_path / "m.safetensors")


def text_lines(path: Path) -> str:
    path.write_text('{"x": [[1]]}\n')
    return "--data d.jsonl"


USAGE: list[tuple[str, Callable[[Path], str]]] = [
    ("convert state.pt -o q.onnx --input x:3x", lambda _: "--data data.npz"),
    ("convert state.pt -o q.onnx --input x:3x3:complex", lambda _: "--data data.npz"),
    ("convert state.pt -o q.onnx --dynamic x", lambda _: "--data data.npz"),
    ("convert state.pt -o q.onnx --factory code.py:build --input y:1x3", lambda _: "--data data.npz"),
    ("convert m.pt2 -o q.onnx --input x:1x3x8x8", lambda _: "--data data.npz"),
]


@pytest.mark.parametrize(("command", "more"), USAGE)
def test_options_that_mean_nothing_are_usage_errors(
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    more: Callable[[Path], str],
) -> None:
    monkeypatch.chdir(saved)
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), *more(saved / "d.jsonl").split()])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert not (saved / "q.onnx").exists()


def test_text_data_does_not_show_the_inputs(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(saved)
    options = text_lines(saved / "d.jsonl").split()
    with pytest.raises(SystemExit) as stopped:
        main(["convert", "state.pt", "-o", "q.onnx", "--factory", "code.py:build", *options])
    assert stopped.value.code == 1
    assert "--input" in capsys.readouterr().err


def reader() -> nn.Module:
    """Build a network that reads at least 7 x 7 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 7), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 512)).eval()


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_random_samples_have_the_sizes_that_were_described(tmp_path: Path, mode: str) -> None:
    torch.save(reader().state_dict(), tmp_path / "state.pt")
    (tmp_path / "code.py").write_text("from tests.test_torch_forms import reader as build\n")
    image = (InputSpec("input", np.dtype("float32"), (1, 3, 12, 10)),)
    opening = Opening(f"{tmp_path}/code.py:build", inputs=image, dynamic=(("input", 2), ("input", 3)))
    recipe = Recipe(mode=mode, tune=Tune(effort="fast"))  # type: ignore[arg-type]
    synthetic = 4 if mode == "static" else None
    done = convert(tmp_path / "state.pt", tmp_path / "q.onnx", recipe=recipe, opening=opening, synthetic=synthetic)
    assert Runner(done.model).inputs[0].shape == (None, 3, None, None)
    assert min(done.check.sqnr.values()) > 20


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "model_state", "model"])
def test_a_checkpoint_holds_its_state_under_any_usual_name(name: str) -> None:
    state = nn.Linear(2, 3).state_dict()
    found = state_of({"step": 3, name: state, "optimizer_state": {"lr": 0.1}})
    assert found is not None
    assert found.keys() == state.keys()
