"""Outputs that are joined from several tensors: their parts are found behind moves, and compared by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from quantcli import Recipe, convert
from quantcli.cli import run
from quantcli.joined import Parts, parted, parts_of, parts_within
from quantcli.load import load
from quantcli.recipe import Tune
from tests.graphs import data_for, ints, node, normal, save

JOINED = node("Concat", ["x", "s"], ["j"], axis=1)
FLAT = {"flat": ints(0, 6, -1), "split": ints(0, 2, 3, 5, 5), "back": ints(0, -1, 6)}
CASES: dict[str, tuple[list[onnx.NodeProto], Parts | None]] = {
    "as it is": ([node("Identity", ["j"], ["o"])], Parts(1, (0, 3, 6))),
    "moved": ([node("Transpose", ["j"], ["o"], perm=[0, 2, 3, 1])], Parts(3, (0, 3, 6))),
    "in a row": ([node("Reshape", ["j", "flat"], ["o"])], Parts(1, (0, 3, 6))),
    "last, in a row": (
        [node("Transpose", ["j"], ["t"], perm=[0, 2, 3, 1]), node("Reshape", ["t", "back"], ["o"])],
        Parts(2, (0, 3, 6)),
    ),
    "taken apart": ([node("Reshape", ["j", "split"], ["o"])], None),
    "of two levels": (
        [node("Reshape", ["j", "flat"], ["r"]), node("Concat", ["r", "r"], ["o"], axis=2)],
        Parts(1, (0, 3, 6)),
    ),
    "computed with": ([node("Exp", ["j"], ["o"])], None),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_are_found_behind_moves(tmp_path: Path, name: str) -> None:
    nodes, expected = CASES[name]
    model = save(
        tmp_path / "m.onnx",
        [node("Sigmoid", ["x"], ["s"]), JOINED, *nodes],
        {"x": ["N", 3, 5, 5]},
        {"o": None},
        FLAT,
    )
    folded = load(model).graph
    found = parts_of(folded)
    assert found == ({} if expected is None else {"o": expected})


def test_parts_are_named_as_they_are_taken() -> None:
    values = normal(2, 4, 6)
    found = parted({"o": values, "p": values}, {"o": Parts(2, (0, 2, 6))})
    assert list(found) == ["o[:, :, 0:2]", "o[:, :, 2:6]", "p"]
    assert np.array_equal(found["o[:, :, 2:6]"], values[:, :, 2:6])


def test_of_many_parts_the_lowest_are_shown() -> None:
    figures = {f"o[{n}:{n + 1}]": float(n) for n in (5, 0, 3, 1, 4, 2)}
    assert list(parts_within("o", {**figures, "p[0:1]": -9.0}).values()) == [0.0, 3.0, 1.0, 2.0]


def detector(path: Path, pixels: float = 100) -> Path:
    """Write a net that gives boxes in so many pixels and scores out as one tensor."""
    constants = {"w": normal(4, 3, 1, 1, seed=1, scale=pixels), "v": normal(6, 3, 1, 1, seed=2)}
    nodes = [
        node("Conv", ["x", "w"], ["boxes"]),
        node("Conv", ["x", "v"], ["l"]),
        node("Sigmoid", ["l"], ["s"]),
        node("Concat", ["boxes", "s"], ["o"], axis=1),
    ]
    return save(path, nodes, {"x": ["N", 3, 5, 5]}, {"o": None}, constants)


def test_what_is_left_of_scores_is_told_beside_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = detector(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=normal(12, 3, 5, 5, seed=3))
    given = ["--data", str(tmp_path / "d.npz")]
    assert run(["convert", str(model), *given, "-o", str(tmp_path / "q.onnx")]) == 0
    assert ", 'o[:, 0:4]' " in (told := capsys.readouterr().out)
    assert ", 'o[:, 4:10]' " in told
    assert run(["eval", str(tmp_path / "q.onnx"), "--float", str(model), *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["parts_db"]
    assert list(found) == ["o[:, 0:4]", "o[:, 4:10]"]
    assert all(value > 20 for value in found.values())


@pytest.mark.parametrize(("wished", "pixels", "both"), [(None, 100, True), (True, 100, False), (None, 1, False)])
def test_bias_correction_is_tried_both_ways_where_scores_stand_beside_boxes(
    tmp_path: Path, wished: bool | None, pixels: float, both: bool
) -> None:
    done = convert(
        detector(tmp_path / "m.onnx", pixels),
        tmp_path / "q.onnx",
        data=data_for(tmp_path / "d.npz", 48, x=(3, 5, 5)),
        recipe=Recipe(tune=Tune(bias=wished)),
    )
    swept = {"bias" in one.name for one in done.tuned.tries[1:]}
    assert swept == ({True, False} if both else {True})
