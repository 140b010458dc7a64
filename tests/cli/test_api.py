"""The Python API does what the commands do, and tells what is of another kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcli
from calibration import statistics
from calibration.datasets import Preprocess, Selection
from quantcli import Run, calibrate, convert, evaluate, read_recipe, verify, verify_c
from quantcli.errors import ModelError, PlanError, UsageError
from quantcli.recipe import Activation, Tune
from tests import graphs
from tests.cli.commands import EVAL, MODELS, done, pair

pytestmark = pytest.mark.usefixtures("here")


def test_the_api_does_what_the_commands_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = read_recipe(Path("kit/recipe.toml"))
    found = calibrate("kit/model.onnx", "kit/cal.npz", recipe=recipe)
    assert list(here.iterdir()) == [here / "kit"]  # without an output nothing is written
    assert statistics.serialized(found) == Path("kit/s.stats").read_bytes()
    for given in ("kit/s.stats", Path("kit/s.stats")):
        made = convert("kit/model.onnx", "q.onnx", given, recipe=recipe)
        assert (made.model, made.sidecar_path) == (Path("q.onnx"), Path("q.json"))
        assert pair("q.onnx") == pair("kit/q.onnx")
    heard: list[tuple[str, int, int]] = []

    def progress(*stage: Any) -> None:
        heard.append(stage)

    told = evaluate("q.onnx", "kit/eval.npz", MODELS[0], None, recipe, batch=20, latency=False, progress=progress)
    assert heard == [("evaluate", 20, 32), ("evaluate", 32, 32)]
    assert (told.quantized, told.drop) == tuple(done(capsys, *EVAL, "--no-latency")[k] for k in ("quantized", "drop"))
    assert capsys.readouterr() == ("", "")  # the API prints nothing
    part = evaluate("q.onnx", "kit/eval.npz", recipe=recipe, selection=Selection(5))
    assert (part.samples, part.reference, part.layers) == (5, None, ())


def test_the_api_reports_by_exceptions(here: Path) -> None:
    recipe = quantcli.Recipe(preprocess=Preprocess(scale=0.5, layout="NCHW"))
    with pytest.raises(UsageError, match="either"):
        convert("kit/model.onnx", "q.onnx", None, "kit/cal.npz", recipe, synthetic=3)
    with pytest.raises(ModelError, match="no model at"):
        calibrate("gone.onnx", "kit/cal.npz")
    with pytest.raises(UsageError, match="no metric 'accuracy'"):
        evaluate("kit/q.onnx", "kit/eval.npz", metric="accuracy", recipe=recipe)
    with pytest.raises(PlanError, match="nothing to quantize"):
        convert(
            graphs.save(here / "m.onnx", [graphs.node("Exp", ["x"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 3]}, {}),
            "q.onnx",
            data=graphs.data_for(here / "d.npz", x=(3,)),
        )
    assert not (here / "q.onnx").exists()


MISTAKEN: list[tuple[str, dict[str, Any]]] = [
    ("the recipe is of the type dict", {"recipe": {}}),
    ("Invalid enum value 'uint16'", {"recipe": quantcli.Recipe(activation=Activation(dtype="uint16"))}),  # type: ignore[arg-type]
    ("the output is None", {"output": None}),
    ("the model is of the type object.*quantcli.torch.convert takes modules", {"model": object()}),
    ("the data is of the type ndarray.*numpy.savez writes arrays", {"data": np.zeros((4, 3))}),
    ("the statistics file is of the type dict", {"statistics": {}}),
    ("the data function is of the type function.*module:function", {"data": None, "function": read_recipe}),
    ("the run is of the type int.*quantcli.Run", {"run": 3}),
    (r"the run asks for .*got `str` - at `\$.max_memory`", {"run": Run(max_memory="1")}),  # type: ignore[arg-type]
    ("the run asks for something unknown .*Invalid enum value 'jax'", {"run": Run(runtime="jax")}),  # type: ignore[arg-type]
    ("the run asks for something unknown .*Expected `array`", {"run": Run(shard=3)}),  # type: ignore[arg-type]
    ("there is no shard 0 of 0", {"run": Run(shard=(0, 0))}),
    ("the opening is of the type int.*quantcli.Opening", {"opening": 3}),
    ("Expected `float` <= 100", {"recipe": quantcli.Recipe(tune=Tune(max_drop=math.inf))}),
    ("the format is of the type list", {"form": ["qdq"]}),
    ("the number of random samples is of the type str, not a whole number", {"data": None, "synthetic": "8"}),
    ("the number of random samples is 0; give a number of at least 1", {"data": None, "synthetic": 0}),
    ("the operators to explain are of the type str, not texts", {"explained": "Conv"}),
    ("the operators to explain are of the type list, not texts", {"explained": [3]}),
    ("the tensors to end at are of the type int", {"until": 3}),
    ("the progress is of the type int", {"progress": 3}),
]


@pytest.mark.parametrize(("told", "change"), MISTAKEN)
def test_the_api_tells_what_is_of_another_type(here: Path, told: str, change: dict[str, Any]) -> None:
    given = {"model": "kit/model.onnx", "output": "q.onnx", "data": "kit/cal.npz", **change}
    with pytest.raises(UsageError, match=told):
        convert(**given)
    assert not (here / "q.onnx").exists()


@pytest.mark.usefixtures("here")
def test_other_functions_of_the_api_tell_it_too() -> None:
    with pytest.raises(UsageError, match="the metric is of the type type"):
        evaluate("kit/q.onnx", "kit/eval.npz", metric=float)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the opening is of the type dict"):
        evaluate("kit/q.onnx", "kit/eval.npz", "kit/model.onnx", opening={})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the opening is of the type dict"):
        calibrate("kit/model.onnx", "kit/cal.npz", opening={})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the run is of the type dict"):
        calibrate("kit/model.onnx", "kit/cal.npz", run={})  # type: ignore[arg-type]
    assert read_recipe("kit/recipe.toml") == read_recipe(Path("kit/recipe.toml"))


MISCOUNTED: list[tuple[str, dict[str, Any]]] = [
    ("the selection is of the type int; give a calibration.datasets.Selection", {"selection": 3}),
    ("the number of samples is of the type str", {"selection": Selection("3")}),  # type: ignore[arg-type]
    ("the number of samples is 0", {"selection": Selection(0)}),
    ("the seed of the selection is -1; give a number of at least 0", {"selection": Selection(seed=-1)}),
    ("the progress is of the type str", {"progress": "text"}),
]
BATCHED: list[tuple[str, dict[str, Any]]] = [
    ("the batch is of the type float, not a whole number", {"batch": 3.5}),
    ("the batch is of the type bool", {"batch": True}),
    ("the batch is -1; give a number of at least 1", {"batch": -1}),
]
SEEDED: list[tuple[str, dict[str, Any]]] = [("the seed is -1", {"seed": -1}), ("the seed is of the", {"seed": "1"})]
COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("the compiler is of the type int", {"compiler": 3}),
    ("the flags are of the type str, not texts", {"flags": "-O2"}),
]


@pytest.mark.parametrize(
    ("function", "given", "told", "change"),
    [
        *[(calibrate, "kit/model.onnx", *case) for case in MISCOUNTED[-1:]],
        *[(evaluate, "kit/q.onnx", *case) for case in (*MISCOUNTED, *BATCHED, ("threads is 0", {"threads": 0}))],
        *[(verify, "kit/q.json", *case) for case in (*MISCOUNTED, *BATCHED, *SEEDED)],
        *[(verify_c, "firmware", *case) for case in (*MISCOUNTED, *SEEDED, *COMPILED)],
    ],
)
@pytest.mark.usefixtures("here")
def test_counts_and_choices_of_another_type_are_told(
    function: Callable[..., Any], given: str, told: str, change: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=told):
        function(given, "kit/eval.npz", **change)


def test_the_package_has_no_other_names() -> None:
    assert {name for name in quantcli.__all__ if getattr(quantcli, name) is None} == set()
    with pytest.raises(AttributeError, match="nonsense"):
        quantcli.nonsense  # noqa: B018
