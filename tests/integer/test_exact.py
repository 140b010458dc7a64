"""How far a float kernel may be off: a product of dequantized integers, summed in float32, lies within the bound of `exact`."""

from __future__ import annotations

from typing import Literal

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantcli.arithmetic.fixed_point import fixed_point
from quantcli.integer.exact import exact
from quantcli.integer.layer import Layer
from quantcli.sidecar import LayerEntry, MultiplierEntry, TensorEntry


def tensor(role: Literal["activation", "weight"], scale: float) -> TensorEntry:
    ends = [-128 * scale], [127 * scale]
    return TensorEntry(role, "int8", -128, 127, [scale], [0], None, *ends, 0, None, [], "q", "r", None, None)


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
