"""Softmax in fixed point as docs/arithmetic.md writes it out (equation 18), in Python's own integers, against the project's."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.arithmetic import gemmlowp
from quantcli.arithmetic.fixed_point import fixed_point

HALVINGS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)


def times(a: int, b: int) -> int:
    """a ⊗ b."""
    return (1 << 31) - 1 if a == b == -(1 << 31) else (a * b + (1 << 30)) >> 31


def over(a: int, k: int) -> int:
    """a ⊘ k."""
    magnitude = (abs(a) + (1 << k >> 1)) >> k
    return magnitude if a >= 0 else -magnitude


def sat(a: int) -> int:
    return min(max(a, -(1 << 31)), (1 << 31) - 1)


def exponential(r: int) -> int:
    if r == 0:
        return (1 << 31) - 1
    w = r % (1 << 24) - (1 << 24)
    x = 32 * w + (1 << 28)
    x2 = times(x, x)
    x3, x4 = times(x2, x), times(x2, x2)
    t = over(times(over(x4, 2) + x3, 715827883) + x2, 1)
    result = 1895147668 + times(x + t, 1895147668)
    for k, factor in enumerate(HALVINGS):
        result = times(result, factor) if (w - r) >> (24 + k) & 1 else result
    return result


def written_out(row: list[int], scale: float) -> list[int]:
    m0, n = (int(value) for value in fixed_point(np.array(min(scale * 2.0**26, float((1 << 31) - 1)))))
    shift = 31 - n
    radius = (31 << 26) >> shift
    distances = [q - max(row) for q in row]
    exponentials = [exponential(times(d << shift, m0)) if d >= -radius else None for d in distances]
    total = sum(over(e, 12) for e in exponentials if e is not None)
    zeros = 32 - total.bit_length()
    v = (total << zeros) >> 1
    y = 1515870810 + times(v, -1010580540)
    for _ in range(3):
        y = y + sat(4 * times(y, (1 << 29) - times(v, y)))
    inverse = sat(2 * y)
    return [0 if e is None else over(times(e, inverse), 35 - zeros) for e in exponentials]


@settings(max_examples=300)
@given(st.lists(st.integers(-128, 127), min_size=1, max_size=300), st.floats(2.0**-20, 4.0, width=32))
def test_the_documents_steps_give_the_same_integers(row: list[int], scale: float) -> None:
    assert gemmlowp.softmax(np.array([row], dtype=np.int64), scale, -1).tolist() == [written_out(row, scale)]
