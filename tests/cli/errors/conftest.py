"""What is sound, for requests to go wrong with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quantcli import Recipe, demo, pipeline


def normalized(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return ((images.astype(np.float32) / 255 - 0.1307) / 0.3081).astype(np.float32)[:, None]


def chain(path: Path, operator: str, batch: int | str = "n", output: str = "y") -> None:
    """Write a model of one operator over rows of four."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 4]) for name in ("x", output)]
    weight = [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")] if operator == "MatMul" else []
    nodes = [helper.make_node(operator, ["x", *(["w"] if weight else [])], [output], name="only")]
    graph = helper.make_graph(nodes, "test", infos[:1], infos[1:], weight)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sound models, data, statistics and a converted model."""
    kit = tmp_path_factory.mktemp("kit")
    shutil.copyfile(demo.MODEL, kit / "model.onnx")
    with np.load(demo.EVALUATION) as stored:
        images, labels = stored["images"][:8], stored["labels"][:8]
    np.savez(kit / "pixels.npz", images=images, labels=labels)
    np.savez(kit / "data.npz", x=normalized(images))
    np.savez(kit / "labelled.npz", x=normalized(images), labels=labels)
    np.savez(kit / "rows.npz", x=np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    chain(kit / "rows.onnx", "MatMul")
    chain(kit / "other.onnx", "MatMul", output="z")
    chain(kit / "pairs.onnx", "MatMul", batch=2)
    chain(kit / "exp.onnx", "Exp")
    pipeline.calibrate(kit / "model.onnx", kit / "data.npz", kit / "s.stats")
    pipeline.convert(kit / "model.onnx", kit / "q.onnx", kit / "s.stats", recipe=Recipe(target="native"))
    pipeline.convert(kit / "rows.onnx", kit / "rows.int8.onnx", data=kit / "rows.npz")
    return kit


@pytest.fixture
def here(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kit, which the test runs in."""
    folder = tmp_path / "here"
    shutil.copytree(kit, folder)
    monkeypatch.chdir(folder)
    return folder
