"""Small float models for the tests, written out as ONNX nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quantcli.recipe import Layers, Recipe

Array = NDArray[Any]
Shape = Sequence[int | str | None]

# Tests of operators want each as an integer layer, whether it pays or not.
EVERYWHERE = Recipe(layers=Layers(everywhere=True))


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """Return a node named after its first output."""
    return helper.make_node(operator, list(inputs), list(outputs), name=f"{outputs[0]}_node", **attributes)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape | None],
    constants: Mapping[str, Array],
    *,
    opset: int = 17,
    ir_version: int = 8,
    constants_as_inputs: bool = False,
    kinds: Mapping[str, int] | None = None,
) -> Path:
    """Write a model of float inputs (but for those that ``kinds`` gives a type) and outputs, and return its path."""
    types = dict(kinds or {})
    given = [
        helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), shape) for name, shape in inputs.items()
    ]
    if constants_as_inputs:
        given += [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in constants.items()
        ]
    graph = helper.make_graph(
        list(nodes),
        "test",
        given,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    """Return seeded normal float32 values."""
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def residual_net(path: Path) -> Path:
    """Write a net with a depthwise convolution, a residual Add, ReLUs, a pool and a dense layer; input x [N, 3, 8, 8]."""
    constants: dict[str, Array] = {
        "w1": normal(8, 3, 3, 3, seed=1, scale=0.3),
        "b1": normal(8, seed=2, scale=0.1),
        "w2": normal(8, 1, 3, 3, seed=3, scale=0.4),
        "b2": normal(8, seed=4, scale=0.1),
        "w3": normal(8, 8, 1, 1, seed=5, scale=0.4),
        "w4": normal(10, 8, seed=6, scale=0.5),
        "b4": normal(10, seed=7, scale=0.1),
    }
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1], group=8),
        node("Clip", ["c2", "zero", "six"], ["r2"]),
        node("Conv", ["r2", "w3"], ["c3"]),
        node("Add", ["c3", "r1"], ["a"]),
        node("Relu", ["a"], ["r3"]),
        node("GlobalAveragePool", ["r3"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w4", "b4"], ["y"], transB=1),
    ]
    constants |= {"zero": np.array(0.0, dtype=np.float32), "six": np.array(6.0, dtype=np.float32)}
    return save(path, nodes, {"x": ["N", 3, 8, 8]}, {"y": ["N", 10]}, constants)


def ints(*values: int) -> Array:
    """Return whole numbers, as shapes and axes are given."""
    return np.array(values, dtype=np.int64)


def real(value: float) -> Array:
    """Return a number as a tensor without axes."""
    return np.array(value, dtype=np.float32)


def weight(*shape: int) -> Array:
    """Return seeded weights."""
    return normal(*shape, seed=1, scale=0.3)


def data_for(path: Path, samples: int = 16, seed: int = 9, **shapes: tuple[int, ...]) -> Path:
    """Write seeded normal samples for inputs (x of [3, 8, 8] by default) as an .npz and return its path."""
    wanted = shapes or {"x": (3, 8, 8)}
    np.savez(path, **{name: normal(samples, *shape, seed=seed) for name, shape in wanted.items()})  # type: ignore[arg-type]
    return path


def rows(groups: int, count: int, inputs: int, seed: int) -> NDArray[np.float32]:
    """Return rows whose inputs depend on each other, as those of a layer do."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(groups, inputs, inputs)) * np.exp(generator.normal(size=(groups, 1, inputs)))
    return (generator.normal(size=(groups, count, inputs)) @ mixed).astype(np.float32)
