"""How far a float kernel may be off: a product of dequantized integers, summed in float32, lies within the bound of `exact`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from quantcli.arithmetic.fixed_point import fixed_point, summed_fixed_point
from quantcli.integer.exact import exact
from quantcli.integer.layer import Layer
from quantcli.sidecar import LayerEntry, MultiplierEntry, TensorEntry


def tensor(
    role: Literal["activation", "weight"], scale: float, dtype: Literal["int8", "uint8"] = "int8", zero_point: int = 0
) -> TensorEntry:
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    ends = [(low - zero_point) * scale], [(high - zero_point) * scale]
    return TensorEntry(role, dtype, low, high, [scale], [zero_point], None, *ends, 0, None, [], "q", "r", None, None)


def product(scales: tuple[float, float, float]) -> Layer:
    names = ("x", "w", "y")
    tensors = {
        name: tensor("weight" if name == "w" else "activation", s) for name, s in zip(names, scales, strict=True)
    }
    real = np.array([scales[0] * scales[1] / scales[2]])
    m0, n = fixed_point(real)
    multiplier = MultiplierEntry(None, real.tolist(), m0.tolist(), n.tolist())
    entry = LayerEntry(
        "m", "MatMul", "accumulate", ["x", "w"], ["y"], [], [multiplier], "half_even", (-128, 127), None, None
    )
    return Layer(entry, {}, tensors, 32, {})


def addition(grids: Mapping[str, tuple[float, int]]) -> Layer:
    tensors = {name: tensor("activation", scale, "uint8", zero_point) for name, (scale, zero_point) in grids.items()}
    reals = [np.array([grids[name][0] / grids["y"][0]]) for name in "ab"]
    multipliers = [
        MultiplierEntry(name, real.tolist(), m0.tolist(), n.tolist())
        for name, real, (m0, n) in zip("ab", reals, summed_fixed_point(reals, 32, "uint8", "uint8"), strict=True)
    ]
    entry = LayerEntry("s", "Add", "sum", ["a", "b"], ["y"], [], multipliers, "single", (0, 255), None, None)
    return Layer(entry, {}, tensors, 32, {})


@given(st.integers(1, 600), st.integers(0, 2**32 - 1))
def test_sums_in_float32_lie_within_the_bound(terms: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scales = tuple(float(np.float32(value)) for value in generator.uniform(0.001, 0.1, 3))
    x, w = generator.integers(-128, 128, (1, terms)), generator.integers(-127, 128, (terms, 1))
    found = exact(product(scales), [x, w])  # type: ignore[arg-type]
    assert found is not None
    real_x, real_w = (q.astype(np.float32) * np.float32(scale) for q, scale in zip((x, w), scales, strict=False))
    total = np.cumsum(real_x[0] * real_w[:, 0], dtype=np.float32)[-1]
    steps = float(total / np.float32(scales[2]))
    assert abs(steps - found.values.item()) <= found.float_error.item()


def test_sums_that_take_zero_points_off_last_lie_within_the_bound() -> None:
    """ONNX Runtime's QLinearAdd of every two integers: some sums lie 3·10^-6 of a step from a tie, float32 has 3·10^-5 near 300."""
    grids = {"a": (0.16449610888957977, 154), "b": (0.0324416384100914, 6), "y": (0.08498558402061462, 0)}
    constants = {f"{name}_scale": np.float32(scale) for name, (scale, _) in grids.items()}
    zero_points = {f"{name}_zero_point": np.uint8(zero_point) for name, (_, zero_point) in grids.items()}
    inputs = ["a", "a_scale", "a_zero_point", "b", "b_scale", "b_zero_point", "y_scale", "y_zero_point"]
    graph = helper.make_graph(
        [helper.make_node("QLinearAdd", inputs, ["y"], domain="com.microsoft")],
        "sum",
        [helper.make_tensor_value_info(name, TensorProto.UINT8, [65536]) for name in "ab"],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [65536])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in {**constants, **zero_points}.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    data = helper.make_model(graph, opset_imports=domains, ir_version=8).SerializeToString()
    a, b = (q.reshape(-1).astype(np.uint8) for q in np.mgrid[:256, :256])
    (runtime,) = InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"a": a, "b": b})
    found = exact(addition(grids), [a.astype(np.int64), b.astype(np.int64)])
    assert found is not None
    assert (np.abs(runtime - np.clip(found.values, 0, 255)) <= 0.5 + found.float_error).all()
    assert found.float_error.max() < 2**-10
