"""Random graphs of operators from the table, and random recipes: what is written loads, is finite, and is what the sidecar says."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from calibration.hooks.onnxruntime import Runner
from quantcli import convert, verify_c
from quantcli.errors import EmbeddedError, RecipeError
from quantcli.recipe import Activation, Layers, Multiplier, Recipe, Tune, Weight
from tests.graphs import Array, node, normal, save

CHANNELS, SIZE, SAMPLES = 4, 6, 6
TARGETS = ("ort-x86", "ort-x86-avx2", "ort-arm", "npu-int8", "npu-int16", "npu-pow2", "tflite", "cmsis-nn", "fixed16")
# `QUANTCLI_FUZZ=2000 pytest tests/fuzz/test_graphs.py` looks longer.
EXAMPLES = int(os.environ.get("QUANTCLI_FUZZ", "30"))

UNARY: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            "Relu",
            "Sigmoid",
            "Tanh",
            "HardSwish",
            "Erf",
            "Softplus",
            "Elu",
            "Abs",
            "LeakyRelu",
            "Exp",
            "Selu",
        )
    },
    "Softmax": {"axis": 1},
    "Transpose": {"perm": [0, 1, 3, 2]},
    "MaxPool": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
    "AveragePool": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
}
BINARY = ("Add", "Sub", "Mul", "Concat", "Max", "Min", "Div")
KINDS = (*UNARY, *BINARY, "Conv", "Conv", "Conv", "MatMul", "PRelu")
# On a grid of two bits a divisor may be zero; and C source takes none.
WITHOUT_QUOTIENTS = tuple(kind for kind in KINDS if kind != "Div")


@st.composite
def graphs(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> tuple[list[onnx.NodeProto], dict[str, Array], list[str]]:
    """Draw nodes over tensors of one shape, and which of their results the model gives."""
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Array] = {"one": np.array(1, np.float32), "tame": np.array(0.3, np.float32)}
    tensors = ["x"]
    for number in range(draw(st.integers(2, 14))):
        name, source = f"t{number}", draw(st.sampled_from(tensors[-4:]))
        kind = draw(st.sampled_from(kinds))
        if kind == "Conv":
            group, side = draw(st.sampled_from([1, 2, CHANNELS])), draw(st.sampled_from([1, 3]))
            constants[f"w{number}"] = normal(CHANNELS, CHANNELS // group, side, side, seed=number, scale=0.4)
            constants[f"b{number}"] = normal(CHANNELS, seed=number, scale=0.2)
            inputs = [source, f"w{number}", *([f"b{number}"] if draw(st.booleans()) else [])]
            nodes.append(node("Conv", inputs, [name], group=group, pads=[side // 2] * 4))
        elif kind == "MatMul":
            constants[f"w{number}"] = normal(SIZE, SIZE, seed=number, scale=0.4)
            nodes.append(node("MatMul", [source, f"w{number}"], [name]))
        elif kind == "PRelu":
            constants[f"w{number}"] = normal(CHANNELS, 1, 1, seed=number, scale=0.4)
            nodes.append(node("PRelu", [source, f"w{number}"], [name]))
        elif kind in BINARY:
            other = draw(st.sampled_from(tensors))
            if kind == "Concat":
                constants[f"w{number}"] = normal(CHANNELS, 2 * CHANNELS, 1, 1, seed=number, scale=0.4)
                nodes.append(node("Concat", [source, other], [f"{name}_both"], axis=1))
                nodes.append(node("Conv", [f"{name}_both", f"w{number}"], [name]))
            elif kind == "Div":
                nodes.append(node("Abs", [other], [f"{name}_abs"]))
                nodes.append(node("Add", [f"{name}_abs", "one"], [f"{name}_sum"]))
                nodes.append(node("Div", [source, f"{name}_sum"], [name]))
            else:
                nodes.append(node(kind, [source, other], [name]))
        elif kind == "Exp":
            nodes.append(node("Tanh", [source], [f"{name}_tame"]))
            nodes.append(node("Exp", [f"{name}_tame"], [name]))
        else:
            nodes.append(node(kind, [source], [name], **UNARY[kind]))
        tensors.append(name)
    constants["last"] = normal(3, CHANNELS, 1, 1, seed=99, scale=0.4)
    nodes.append(node("Conv", [tensors[-1], "last"], ["y"]))
    outputs = ["y", *draw(st.lists(st.sampled_from(tensors[1:]), max_size=2, unique=True))]
    return nodes, constants, outputs


Drawn = tuple[list[onnx.NodeProto], dict[str, Array], list[str]]


def written(folder: Path, drawn: Drawn) -> tuple[Path, Array]:
    """Write a model and its calibration data, d.npz, and return the model's path and the data."""
    nodes, constants, outputs = drawn
    used = {name for n in nodes for name in n.input}
    held = {name: value for name, value in constants.items() if name in used}
    x = normal(SAMPLES, CHANNELS, SIZE, SIZE, seed=7)
    np.savez(folder / "d.npz", x=x)
    return save(folder / "m.onnx", nodes, {"x": ["N", CHANNELS, SIZE, SIZE]}, dict.fromkeys(outputs), held), x


@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(graphs(), st.booleans())
def test_random_graphs(drawn: Drawn, everywhere: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path, x = written(folder, drawn)
        recipe = Recipe(layers=Layers(everywhere=everywhere))
        # The executor is run beside ONNX Runtime: a difference that rounding does not explain raises VerifyError.
        done = convert(path, folder / "q.onnx", data=folder / "d.npz", recipe=recipe, verified=True)
        assert done.tuned.why_not or len(done.tuned.tries) > 1  # no candidate fell out because of an error
        found, expected = Runner(done.model).run({"x": x}), Runner(path).run({"x": x})
        assert list(found) == list(expected)
        for name, values in expected.items():
            assert found[name].shape == values.shape
            assert np.isfinite(found[name]).all()


def maybe(*values: Any) -> st.SearchStrategy[Any]:
    """Draw one of some values, or None, which leaves it to the target: as often as all of them together."""
    return st.sampled_from([*[None] * len(values), *values])


RECIPES = st.builds(
    Recipe,
    target=st.sampled_from(TARGETS),
    weight=st.builds(
        Weight,
        bits=maybe(2, 3, 4, 6),
        per_channel=maybe(True, False),
        symmetric=st.sampled_from([None, None, True, False]),
    ),
    activation=st.builds(
        Activation,
        bits=maybe(2, 4, 7, 12),
        dtype=maybe("int8", "uint8", "int16"),
        symmetric=maybe(True, False),
        range=maybe("mse", "percentile:99.9", "entropy", "mean-minmax", "moving-average"),
    ),
    multiplier=st.builds(Multiplier, bits=maybe(8, 16, 32), rounding=maybe("single", "double", "half_even", "floor")),
    layers=st.builds(Layers, everywhere=st.booleans()),
    tune=st.builds(
        Tune,
        effort=st.sampled_from(["fast", "fast", "default"]),
        equalize=maybe(True),
        ranges=maybe(False, "outputs"),
        widen=maybe(True),
        centre=maybe(True, False),
        align=maybe(True, False),
    ),
)


@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(graphs(WITHOUT_QUOTIENTS), RECIPES, st.sampled_from(["qdq", "qoperator", "c"]))
def test_random_recipes(drawn: Drawn, recipe: Recipe, form: str) -> None:
    """What cannot be is refused as a recipe, or as C source; everything else is verified."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path, x = written(folder, drawn)
        output = folder / ("c" if form == "c" else "q.onnx")
        try:
            done = convert(path, output, data=folder / "d.npz", recipe=recipe, form=form, verified=form != "c")
        except (RecipeError, EmbeddedError):
            reject()
        if form == "c":
            verify_c(output, data=folder / "d.npz")
            return
        assert all(np.isfinite(values).all() for values in Runner(done.model).run({"x": x}).values())
