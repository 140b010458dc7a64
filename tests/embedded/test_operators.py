"""C source of every operator of the rule table, under every target: compiled, run, and compared with the executor byte for byte."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantcli import Conversion, convert, verify_c
from quantcli.embedded import deliver
from quantcli.embedded.check import compiler, run_source
from quantcli.embedded.describe import read_description
from quantcli.errors import EmbeddedError
from quantcli.recipe import Layers, Multiplier, Recipe, Tune, Weight
from quantcli.targets import Rounding
from tests.fuzz.test_graphs import CHANNELS, KINDS, SIZE, graphs
from tests.graphs import Array, normal, save
from tests.operators import CASES, RANGES, data

STRICT = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror")
TARGETS = ("ort-x86", "tflite", "npu-int16", "npu-int8", "cmsis-nn", "fixed16", "npu-pow2")
# What C source has no kernel for, and how it says so.
REFUSED = {
    "Conv, 3-D": "over one or two axes",
    "AveragePool, 3-D": "over one or two axes",
    "MatMul, a stack of constants": "whose weight has 3 axes",
    "Gather, of a constant": "where it reads follows from the data",
}
LINEAR = "which interpolates; export it with mode nearest"
# Operators that stay float, and are refused for that; `QUANTCLI_FUZZ=500 pytest tests/embedded` looks longer.
FLOAT = {"Exp", "Max", "Div"}
EXAMPLES = max(int(os.environ.get("QUANTCLI_FUZZ", "36")) // 3, 1)

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler on the path")


def written(folder: Path, name: str) -> Conversion:
    """C source of one case, whose place in the list says for which target and with which data."""
    wanted, number = CASES[name], list(CASES).index(name)
    side = list(RANGES)[number % len(RANGES)]
    model = save(
        folder / "m.onnx",
        wanted.nodes,
        {given: ["N", *shape] for given, shape in zip("xy", wanted.inputs, strict=False)},
        dict.fromkeys(wanted.outputs),
        wanted.constants,
        opset=wanted.opsets[number % len(wanted.opsets)],
    )
    np.savez(folder / "d.npz", **data(wanted.inputs, RANGES[side]))  # type: ignore[arg-type]
    recipe = Recipe(target=TARGETS[number % len(TARGETS)], tune=Tune(effort="fast"), layers=Layers(everywhere=True))
    return convert(model, folder / "c", data=folder / "d.npz", recipe=recipe, form="c")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let convert's own look at what it wrote compile without optimizing: verify compiles again, and optimizes."""
    monkeypatch.setattr(deliver, "run_source", functools.partial(run_source, flags=("-std=c99", "-O0")))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", CASES)
def test_c_source_is_the_executor(tmp_path: Path, name: str) -> None:
    message = LINEAR if name.startswith("Resize, linear") else REFUSED.get(name)
    if message is not None:
        with pytest.raises(EmbeddedError, match=message):
            written(tmp_path, name)
        assert not (tmp_path / "c").exists()
        return
    done = written(tmp_path, name)
    assert done.embedded is not None
    assert done.embedded.checked == 4
    told = read_description(tmp_path / "c")
    assert {step.operator for step in told.steps} <= {*CASES[name].layers, "layout"}
    assert told.arena_bytes >= told.bound_bytes
    found = verify_c(tmp_path / "c", tmp_path / "d.npz", flags=STRICT)
    assert found.wrong == 0
    assert found.samples == 6


@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    graphs(tuple(kind for kind in KINDS if kind not in FLOAT)),
    st.sampled_from(TARGETS),
    st.sampled_from([None, 4, 3]),
    st.sampled_from([None, "single", "double", "half_even", "floor"]),
)
def test_random_graphs(
    drawn: tuple[list[onnx.NodeProto], dict[str, Array], list[str]],
    target: str,
    bits: int | None,
    rounding: Rounding | None,
) -> None:
    nodes, constants, outputs = drawn
    used = {name for n in nodes for name in n.input}
    held = {name: value for name, value in constants.items() if name in used}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path = save(folder / "m.onnx", nodes, {"x": ["N", CHANNELS, SIZE, SIZE]}, dict.fromkeys(outputs), held)
        np.savez(folder / "d.npz", x=normal(6, CHANNELS, SIZE, SIZE, seed=7))
        recipe = Recipe(
            target=target, weight=Weight(bits=bits), tune=Tune(effort="fast"), multiplier=Multiplier(rounding=rounding)
        )
        try:
            done = convert(path, folder / "c", data=folder / "d.npz", recipe=recipe, form="c")
        except EmbeddedError as error:
            assert "its data is float, and it only moves it" in str(error)  # noqa: PT017 - an output that is the input, moved
            return
        assert done.embedded is not None
        assert done.embedded.checked == 4  # compiled, run, and every byte the executor's: else VerifyError
