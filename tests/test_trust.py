"""Nothing of a file runs while it is loaded, unless the user trusts it: pickles, wherever they stand, and code in other clothes."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from calibration.datasets import InputSpec, open_dataset
from calibration.errors import DataError, StatisticsError
from calibration.statistics import load as load_statistics
from quantcli.errors import ModelError
from quantcli.load import Opening, load
from quantcli.load.torch import program_at

SPEC = [InputSpec("x", np.dtype("float32"), (None, 4))]


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small exported program with a free batch and a view, whose sizes are expressions."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.linear(x)).reshape(x.shape[0] * 3)

    path = tmp_path_factory.mktemp("trust") / "net.pt2"
    sizes = ({0: torch.export.Dim("n", min=2)},)
    torch.export.save(torch.export.export(Net().eval(), (torch.ones(2, 4),), dynamic_shapes=sizes), path)
    return path


def tampered(source: Path, target: Path, **changes: Any) -> Path:
    """Copy an archive with other contents of some members, by the end of their names; new ones by their whole."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        top = old.namelist()[0].partition("/")[0]
        left = dict(changes)
        for info in old.infolist():
            change = next((left.pop(end) for end in list(left) if info.filename.endswith(end)), None)
            content = old.read(info)
            new.writestr(
                info.filename, change(content) if callable(change) else change if change is not None else content
            )
        for name, content in left.items():
            new.writestr(f"{top}/{name}", content)
    return target


def pickled(payload: Payload) -> bytes:
    """Return what ``torch.save`` makes of it."""
    buffer = io.BytesIO()
    torch.save((payload, {}), buffer)
    return buffer.getvalue()


def in_graph(change: Any) -> Any:
    """Return a function that changes a program's graph as JSON."""

    def changed(content: bytes) -> bytes:
        document = json.loads(content)
        change(document)
        return json.dumps(document).encode()

    return changed


def test_a_program_that_is_only_a_model_loads(program: Path) -> None:
    loaded = load(program)
    assert [node.op_type for node in loaded.graph.graph][:1] == ["Gemm"]


class Sizes(nn.Module):
    """Free axes in arithmetic of every kind: halves, rests, the larger of two, slices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embedding = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Embedding(10, 8)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        y = nn.functional.interpolate(torch.relu(self.conv(x)), scale_factor=2, mode="nearest")
        half = ids[:, : ids.shape[1] // 2]
        y = y[:, :, : x.shape[2] - 1]
        return {"y": y.flatten(1).mean(1), "z": [self.embedding(half).mean(1), y.mean((2, 3))]}


class Transformer(nn.Module):
    """Attention over a free number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x), torch.cumsum(x, 1)


FREE = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
IMAGE = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}


@pytest.mark.parametrize(
    ("module", "inputs", "axes"),
    [
        (Sizes, (torch.ones(2, 3, 16, 16), torch.zeros(2, 6, dtype=torch.int64)), (IMAGE, FREE)),
        (Transformer, (torch.ones(2, 7, 16),), (FREE,)),
    ],
)
def test_programs_with_free_axes_are_only_models(tmp_path: Path, module: Any, inputs: Any, axes: Any) -> None:
    program = torch.export.export(module().eval(), inputs, dynamic_shapes=axes, strict=False)
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = program_at(tmp_path / "m.pt2")
    assert len(list(loaded.graph.nodes)) == len(list(program.graph.nodes))


def test_pickled_sample_inputs_do_not_run(
    program: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tampered(program, tmp_path / "bad.pt2", **{"sample_inputs/model.pt": pickled(Payload(marker))})
    monkeypatch.setattr(logging, "raiseExceptions", False)  # torch's own message about it has a mistake
    with contextlib.suppress(Exception):  # the attack is real: torch runs it, if only as its second try
        torch.export.load(bad)
    assert marker.is_dir()
    marker.rmdir()
    with pytest.raises(ModelError, match="tensors and operators"):
        load(bad)
    assert not marker.exists()


def test_pickled_weights_do_not_run(program: Path, tmp_path: Path, marker: Path) -> None:
    def use_pickle(content: bytes) -> bytes:
        document = json.loads(content)
        for entry in document["config"].values():
            entry["use_pickle"] = True
        return json.dumps(document).encode()

    changes = {"model_weights_config.json": use_pickle, "weights/weight_0": pickled(Payload(marker))}
    with pytest.raises(ModelError, match=r"bad\.pt2"):
        load(tampered(program, tmp_path / "bad.pt2", **changes))
    assert not marker.exists()


def test_a_pickled_constant_is_refused_by_name(program: Path, tmp_path: Path, marker: Path) -> None:
    bad = tampered(program, tmp_path / "bad.pt2", **{"data/constants/opaque_obj_0": pickle.dumps(Payload(marker))})
    with pytest.raises(ModelError, match=r"opaque_obj_0.*--trust-pickle"):
        load(bad)
    assert not marker.exists()


def attack_size(document: Any, marker: Path) -> None:
    text = json.dumps(document)
    begin = text.index('"expr_str": "') + len('"expr_str": "')
    end = text.index('"', begin)
    expression = f"__import__('os').mkdir('{marker}')"
    document.clear()
    document.update(json.loads(text[:begin] + expression + text[end:]))


def attack_guard(document: Any, marker: Path) -> None:
    document["guards_code"] = [f"__import__('os').mkdir('{marker}') is None"]


def attack_target(document: Any, marker: Path) -> None:
    del marker
    document["graph_module"]["graph"]["nodes"][0]["target"] = "torch.serialization.os.system"


def attack_private(document: Any, marker: Path) -> None:
    del marker
    document["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.__class__.__init__"


def attack_file(document: Any, marker: Path) -> None:
    del marker
    document["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def attack_name(document: Any, marker: Path) -> None:
    document["graph_module"]["graph"]["nodes"][0]["name"] = f"x=__import__('os').mkdir('{marker}')"


def attack_structure(document: Any, marker: Path) -> None:
    del marker
    entry = next(e for e in document["graph_module"]["module_call_graph"] if e.get("signature"))
    entry["signature"]["in_spec"] = json.dumps(
        [
            1,
            {
                "type": "collections.defaultdict",
                "context": '{"default_factory_module": "antigravity"}',
                "children_spec": [],
            },
        ]
    )


@pytest.mark.parametrize(
    "attack",
    [attack_size, attack_guard, attack_target, attack_private, attack_file, attack_name, attack_structure],
)
def test_code_in_a_graph_does_not_run(program: Path, tmp_path: Path, marker: Path, attack: Any) -> None:
    bad = tampered(
        program, tmp_path / "bad.pt2", **{"models/model.json": in_graph(lambda document: attack(document, marker))}
    )
    with pytest.raises(ModelError, match="--trust-pickle"):
        load(bad)
    assert not marker.exists()


def test_compiled_code_and_double_names_are_refused(program: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="compiled code"):
        load(tampered(program, tmp_path / "a.pt2", **{"data/aotinductor/model/m.so": b"\x7fELF"}))
    double = tampered(program, tmp_path / "b.pt2")
    with zipfile.ZipFile(double, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(ModelError, match="two members of one name"):
        load(double)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".ckpt", ".bin"])
@pytest.mark.parametrize("torch_format", [True, False])
def test_a_pickle_is_refused_and_nothing_of_it_runs(
    tmp_path: Path, marker: Path, suffix: str, torch_format: bool
) -> None:
    path = tmp_path / f"m{suffix}"
    content = {"weight": torch.zeros(1), "payload": Payload(marker)}
    if torch_format:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(Payload(marker), protocol=2))
    with pytest.raises(ModelError, match="--trust-pickle") as caught:
        load(path, Opening(factory="tests.test_trust:nothing"))
    assert "mkdir" in str(caught.value)
    assert not marker.exists()


def test_trust_is_what_lets_it_run(tmp_path: Path, marker: Path) -> None:
    torch.save({"weight": torch.zeros(1), "payload": Payload(marker)}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match="neither a state dict nor a module"):
        load(tmp_path / "m.pt", Opening(trusted=True))
    assert marker.is_dir()


STRUCTURE = """
import torch.utils._pytree as pytree

class Output:
    def __init__(self, scores):
        self.scores = scores

pytree.register_pytree_node(
    Output,
    lambda output: ([output.scores], None),
    lambda values, context: Output(*values),
    serialized_type_name=f"{__name__}.Output",
)
"""


@pytest.fixture
def structured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A program whose output is an object, as Hugging Face's are, and the module of its class, not yet imported."""
    name = "structure_of_an_output"
    (tmp_path / f"{name}.py").write_text(STRUCTURE)
    monkeypatch.syspath_prepend(tmp_path)
    output = importlib.import_module(name).Output

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return output(torch.relu(x))

    torch.export.save(torch.export.export(Net().eval(), (torch.ones(2, 4),)), tmp_path / "m.pt2")
    pytree._deregister_pytree_node(output)
    del sys.modules[name]
    yield tmp_path / "m.pt2"
    if (again := sys.modules.pop(name, None)) is not None:
        pytree._deregister_pytree_node(again.Output)


def test_trust_imports_the_classes_of_outputs(structured: Path) -> None:
    with pytest.raises(ModelError, match=r"in 'structure_of_an_output\.Output'; --trust"):
        load(structured)
    assert len(load(structured, Opening(trusted=True)).graph.graph.outputs) == 1


def test_classes_of_outputs_that_cannot_be_imported_are_named(structured: Path) -> None:
    structured.with_name("structure_of_an_output.py").unlink()
    with pytest.raises(ModelError, match="class of 'structure_of_an_output', which cannot be imported"):
        load(structured, Opening(trusted=True))


def test_a_pickle_under_the_name_of_safetensors_is_none(tmp_path: Path, marker: Path) -> None:
    torch.save(Payload(marker), tmp_path / "m.safetensors")
    with pytest.raises(ModelError, match="safetensors"):
        load(tmp_path / "m.safetensors", Opening(factory="tests.test_trust:nothing"))
    assert not marker.exists()


def test_torchscript_that_writes_files_is_refused(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.save(
        torch.jit.trace(nn.Linear(4, 3), torch.ones(2, 4)),  # type: ignore[no-untyped-call]
        str(path),
    )

    def saving(content: bytes) -> bytes:
        return content.replace(b"return", f'torch.save(0, "{marker}")\n    return'.encode(), 1)

    with zipfile.ZipFile(path) as archive:
        code = next(n for n in archive.namelist() if n.endswith(".py") and b"def forward" in archive.read(n))
    bad = tampered(path, tmp_path / "bad.pt", **{code.partition("/")[2]: saving})
    with pytest.raises(ModelError, match=r"reaches outside the model \(torch\.save"):
        load(bad, None, lambda _: {"input": np.ones((2, 4), np.float32)})
    assert not marker.exists()


def test_pickles_in_data_and_statistics_do_not_run(tmp_path: Path, marker: Path) -> None:
    torch.save([Payload(marker)], tmp_path / "d.pt")
    objects = np.array([Payload(marker)], dtype=object)
    np.savez(tmp_path / "d.npz", x=objects)
    np.save(tmp_path / "d.npy", objects)
    for name in ("d.pt", "d.npz", "d.npy"):
        with pytest.raises(DataError):
            open_dataset(tmp_path / name, SPEC)
    np.savez(tmp_path / "s.npz", x=objects, header=objects)
    (tmp_path / "s.npz").rename(tmp_path / "a.stats")
    (tmp_path / "b.stats").write_bytes(pickle.dumps(Payload(marker)))
    for name in ("a.stats", "b.stats"):
        with pytest.raises(StatisticsError):
            load_statistics(tmp_path / name)
    assert not marker.exists()


def nothing() -> nn.Module:
    """Build a module without weights."""
    return nn.Identity()
