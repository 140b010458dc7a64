"""Every operator of the rule table in small models: what becomes an integer layer, and how far from float it may end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from quantcli.fold import fold
from quantcli.rules import RULES
from tests.deviation import LOOSEST, SQNR_FLOOR, TIES, Deviation
from tests.integer import test_layers
from tests.operators import CASES, RANGES, converted, data, ran, session, sqnr


@pytest.mark.parametrize("side", RANGES)
@pytest.mark.parametrize("name", CASES)
def test_operator(tmp_path: Path, name: str, side: str) -> None:
    wanted = CASES[name]
    opset = wanted.opsets[list(RANGES).index(side) % len(wanted.opsets)]
    feeds = data(wanted.inputs, RANGES[side])
    model, done = converted(tmp_path, wanted, opset, feeds)
    assert tuple(layer.operator for layer in done.plan.layers) == wanted.layers
    assert [entry.operator for entry in done.plan.floats] == []

    written = done.model.read_bytes()
    given = session(written, fused=True)
    assert [v.name for v in given.get_inputs()] == list(feeds)
    assert [v.name for v in given.get_outputs()] == list(wanted.outputs)

    expected = ran(model.read_bytes(), feeds, wanted.outputs)
    fused, plain = (ran(written, feeds, wanted.outputs, fused=how) for how in (True, False))
    folded = fold(ir.load(model))
    from_float = Deviation(folded, done.plan, feeds).bounds
    between = Deviation(folded, done.plan, feeds, from_float).bounds
    for output in wanted.outputs:
        reals, allowed = expected[output].astype(np.float64), from_float[output]
        if side == "around zero" and np.ptp(reals):
            assert allowed.mean() <= LOOSEST * np.ptp(reals)
        for found in (plain[output], fused[output]):
            assert found.shape == reals.shape
            assert (np.abs(found - reals) <= allowed).all()
            assert sqnr(reals, found) >= SQNR_FLOOR
        apart = np.abs(fused[output].astype(np.float64) - plain[output])
        assert (apart <= between[output]).all()
        assert (apart > 0).sum() <= max(1, TIES * apart.size)


def test_every_operator_of_the_table_has_a_case() -> None:
    elsewhere = {n.op_type for nodes, _, _ in test_layers.CASES.values() for n in nodes}
    assert {operator for wanted in CASES.values() for operator in wanted.layers} | elsewhere >= set(RULES)


@pytest.mark.parametrize(
    ("name", "constant", "by"),
    [
        ("Relu, of the input", "x_zero_point", 1),
        ("Conv", "w_quantized", 16),
        ("Conv", "b_quantized", 2000),
        ("Pad, constant", "c_zero_point", 1),
        ("Add, two inputs", "y_zero_point", 1),
        ("GlobalAveragePool", "o_zero_point", 16),
    ],
)
def test_the_bound_catches_a_wrong_number(tmp_path: Path, name: str, constant: str, by: int) -> None:
    wanted = CASES[name]
    feeds = data(wanted.inputs, 0.0)
    model, done = converted(tmp_path, wanted, 17, feeds)
    changed = onnx.load(done.model)
    values = np.array(next(numpy_helper.to_array(t) for t in changed.graph.initializer if t.name == constant))
    first = int(values.flat[0])
    values.flat[0] = first - by if first > 0 else first + by
    changed.graph.initializer.append(numpy_helper.from_array(values, "wrong"))
    reader = next(n for n in changed.graph.node if constant in n.input)
    reader.input[list(reader.input).index(constant)] = "wrong"
    allowed = Deviation(fold(ir.load(model)), done.plan, feeds).bounds["o"]
    found = ran(changed.SerializeToString(), feeds, ["o"])["o"]
    assert (np.abs(found - ran(model.read_bytes(), feeds, ["o"])["o"]) > allowed).any()
