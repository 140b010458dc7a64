"""Varied copies of samples, and sweeping what is kept over all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from calibration.hooks.onnxruntime import Runner
from quantcli import Recipe, convert, verify
from quantcli.fold import fold
from quantcli.load import load
from quantcli.recipe import Activation, Tune, Weight
from quantcli.scores import scored_alone
from quantcli.sources import Data
from quantcli.tune import candidates, room, trying
from quantcli.tune.data import tuning_samples
from quantcli.tune.judge import Judge
from quantcli.tune.vary import SHIFT, has_images, image_axes, varied, with_copies
from tests.graphs import data_for, node, normal, residual_net, save

Feeds = dict[str, Any]


@given(
    count=st.integers(1, 4),
    channels=st.integers(1, 3),
    height=st.integers(8, 20),
    width=st.integers(8, 20),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_varied_image_is_shifted_and_perhaps_mirrored(
    count: int, channels: int, height: int, width: int, last: bool, seed: int
) -> None:
    images = normal(count, channels, height, width, seed=seed)
    given = images.transpose(0, 2, 3, 1) if last else images
    found = varied(given, np.random.default_rng(seed))
    assert found is not given
    assert found.shape == given.shape
    found = found.transpose(0, 3, 1, 2) if last else found
    for image, one in zip(images, found, strict=True):
        down, right = int(height * SHIFT), int(width * SHIFT)
        moves = [(y, x) for y in range(-down, down + 1) for x in range(-right, right + 1)]
        both = (image, image[:, :, ::-1])
        assert any((np.roll(turned, move, axis=(1, 2)) == one).all() for turned in both for move in moves)


@pytest.mark.parametrize(
    "values",
    [normal(5, 3, 7, 9, seed=1), normal(5, 40, seed=2), normal(5, 8, 16, seed=3), np.zeros((5, 3, 9, 9), np.int64)],
)
def test_what_is_no_image_stays(values: NDArray[Any]) -> None:
    assert image_axes(values) is None
    assert varied(values, np.random.default_rng(0)) is values
    batches = ({"x": values},)
    assert with_copies(batches, 3, 1000, seed=0) == batches


@pytest.mark.parametrize("scaled", [False, True])
def test_a_mask_of_four_axes_is_no_image(tmp_path: Path, scaled: bool) -> None:
    sizes: list[int | str] = ["N", 1, 8, 8]
    nodes = [node("MatMul", ["x", "w"], ["s"])]
    nodes += [node("Mul", ["mask", "far"], ["bias"])] if scaled else []
    nodes += [node("Add", ["s", "bias" if scaled else "mask"], ["m"]), node("Softmax", ["m"], ["p"], axis=-1)]
    nodes += [node("MatMul", ["p", "w"], ["y"])]
    constants = {"w": normal(8, 8, seed=1), "far": np.array(-1e4, np.float32)}
    source = load(save(tmp_path / "m.onnx", nodes, {"x": sizes, "mask": sizes}, {"y": None}, constants))
    masks = scored_alone(fold(source.graph))
    assert masks == {"mask"}
    hidden = np.triu(np.ones((8, 8), np.float32), 1) * (1 if scaled else -1e4)
    feeds: Feeds = {"x": normal(4, 1, 8, 8), "mask": np.tile(hidden.astype(np.float32), (4, 1, 1, 1))}
    assert has_images(feeds, masks)
    assert not has_images({"mask": feeds["mask"]}, masks)
    _, copy = with_copies([feeds], 1, 1000, seed=0, masks=masks)
    assert (copy["mask"] == feeds["mask"]).all()
    assert (copy["x"] != feeds["x"]).any()
    np.savez(tmp_path / "d.npz", **{name: np.repeat(values, 12, axis=0) for name, values in feeds.items()})  # type: ignore[arg-type]
    samples = tuning_samples(source, fold(source.graph), Data(tmp_path / "d.npz"), Recipe())
    assert samples is not None
    assert samples.masks == {"mask"}


def test_copies_follow_the_samples_as_far_as_there_is_room() -> None:
    batches: tuple[Feeds, ...] = tuple({"x": normal(4, 3, 8, 8, seed=n), "mask": np.arange(4) + n} for n in range(3))
    sizes = [len(with_copies(batches, 3, most, seed=0)) for most in (0, 12, 15, 16, 36, 48, 1000)]
    assert sizes == [3, 3, 3, 4, 9, 12, 12]
    found = with_copies(batches, 2, 1000, seed=7)
    assert all(one is other for one, other in zip(found, batches, strict=False))
    for copy, original in zip(found[3:], batches * 2, strict=True):
        assert (copy["mask"] == original["mask"]).all()
        assert (copy["x"] != original["x"]).any()
        assert (np.sort(copy["x"], axis=None) == np.sort(original["x"], axis=None)).all()
    again = with_copies(batches, 2, 1000, seed=7)
    assert all((one["x"] == other["x"]).all() for one, other in zip(found, again, strict=True))


def converted(tmp_path: Path, name: str, **wishes: Any) -> Any:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=48)
    recipe = Recipe(weight=Weight(bits=wishes.pop("bits", 4)), tune=Tune(**{"refit": False, **wishes}))
    return convert(model, tmp_path / name, data=data, recipe=recipe, verified=True)


def swept_over(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that fills with how many samples each sweep runs."""
    counts: list[int] = []
    plain = candidates.swept

    def counting(*given: Any) -> Any:
        counts.append(sum(len(next(iter(feeds.values()))) for feeds in given[4]))
        return plain(*given)

    monkeypatch.setattr(trying, "swept", counting)
    return counts


def with_room(monkeypatch: pytest.MonkeyPatch, room_for: Callable[..., int]) -> None:
    """Let another function say for how many samples there is room."""
    for module in (room, trying):
        monkeypatch.setattr(module, "room_for", room_for)


def test_sweeps_run_copies_where_that_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = swept_over(monkeypatch)
    done = converted(tmp_path, "a.onnx", vary=True)
    assert counts == [4 * 32]  # of 48 samples, 16 judge
    assert [one.name.endswith("varied samples") for one in done.tuned.tries] == [False, True]
    plain = converted(tmp_path, "b.onnx")
    assert counts == [4 * 32, 32]
    assert done.model.read_bytes() != plain.model.read_bytes()
    with_room(monkeypatch, lambda *_: 64)
    converted(tmp_path, "c.onnx", vary=True)
    assert counts[2:] == [64]


@pytest.mark.parametrize("ranges", [None, "outputs"])
def test_best_tries_copies_with_ranges_of_the_readers_unless_the_outputs_are_asked_for(
    tmp_path: Path, ranges: Literal["outputs"] | None
) -> None:
    done = converted(tmp_path, "a.onnx", effort="best", adaround=False, refit=False, ranges=ranges)
    names = [one.name for one in done.tuned.tries]
    varied = [name for name in names if name.endswith("varied samples")]
    assert any("ranges by outputs" in name for name in names)
    assert len(varied) == 1
    assert ("by outputs" in varied[0]) == (ranges == "outputs")


def test_copies_have_more_room_than_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []
    plain = room.room_for

    def told(model: Any, size: int = room.ROOM) -> int:
        rooms.append(size)
        return plain(model, size)

    with_room(monkeypatch, told)
    converted(tmp_path, "a.onnx", vary=True)
    assert {*rooms} == {room.ROOM, room.VARIED_ROOM}
    assert room.VARIED_ROOM > room.ROOM


def test_what_is_kept_is_swept_again_over_all_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counts = swept_over(monkeypatch)
    with caplog.at_level("INFO", "quantcli"):
        done = converted(tmp_path, "a.onnx", refit=True)
    assert counts == [32, 48]
    assert "swept over all samples" in caplog.text
    plain = converted(tmp_path, "b.onnx")
    assert done.model.read_bytes() != plain.model.read_bytes()
    # What is said of it was said before it saw the samples that judge.
    assert [one.sqnr for one in done.tuned.tries] == [one.sqnr for one in plain.tuned.tries]
    assert verify(done.sidecar_path, tmp_path / "d.npz").findings == []
    again = converted(tmp_path, "c.onnx", refit=True)
    assert again.model.read_bytes() == done.model.read_bytes()


def test_nothing_is_swept_again_without_room_or_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = converted(tmp_path, "a.onnx").model.read_bytes()
    counts = swept_over(monkeypatch)
    with_room(monkeypatch, lambda *_: 40)
    assert converted(tmp_path, "b.onnx", refit=True).model.read_bytes() == plain
    assert counts == [32]
    monkeypatch.undo()
    worths: list[float] = []
    judged = Judge.sqnr

    def falling(self: Judge, candidate: Any) -> float:
        worths.append(judged(self, candidate) - 100 * (len(worths) == 2))
        return worths[-1]

    monkeypatch.setattr(Judge, "sqnr", falling)
    assert converted(tmp_path, "c.onnx", refit=True).model.read_bytes() == plain
    assert len(worths) == 3


@pytest.mark.parametrize(
    ("bits", "refit", "again"), [(4, None, True), (4, False, False), (8, None, False), (8, True, True)]
)
def test_narrow_weights_are_swept_again_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, refit: bool | None, again: bool
) -> None:
    counts = swept_over(monkeypatch)
    converted(tmp_path, "a.onnx", bits=bits, refit=refit)
    assert (48 in counts) == again


def test_tries_of_a_search_are_not_swept_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the recipe says so: the metric judges them, and each takes its time."""
    model, samples = residual_net(tmp_path / "net.onnx"), normal(96, 3, 8, 8, seed=1)
    labels = Runner(model).run({"x": samples})["y"].argmax(axis=1)
    np.savez(tmp_path / "labelled.npz", x=samples, labels=labels)
    counts = swept_over(monkeypatch)
    for refit in (None, True):
        recipe = Recipe(weight=Weight(bits=4), tune=Tune(max_drop=60.0, refit=refit))
        convert(model, tmp_path / "q.onnx", data=tmp_path / "labelled.npz", recipe=recipe)
    assert counts == [64, 64, 96]


@pytest.mark.parametrize(("bits", "wanted"), [(4, True), (8, False)])
def test_best_does_both_where_weights_are_narrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, wanted: bool
) -> None:
    counts = swept_over(monkeypatch)
    done = converted(tmp_path, "a.onnx", bits=bits, effort="best", adaround=False)
    assert any("varied samples" in one.name for one in done.tuned.tries) == wanted
    assert (max(counts) > 32) == wanted


def test_vectors_are_not_varied(tmp_path: Path) -> None:
    source = save(
        tmp_path / "m.onnx",
        [node("Gemm", ["x", "w"], ["y"])],
        {"x": ["n", 20]},
        {"y": ["n", 6]},
        {"w": normal(20, 6, seed=1)},
    )
    np.savez(tmp_path / "v.npz", x=normal(48, 20, seed=2))
    recipe = Recipe(weight=Weight(bits=4), tune=Tune(effort="best", vary=True, adaround=False))
    done = convert(source, tmp_path / "q.onnx", data=tmp_path / "v.npz", recipe=recipe)
    assert not any("varied samples" in one.name for one in done.tuned.tries)


def test_narrow_activations_are_not_swept_again_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = residual_net(tmp_path / "net.onnx"), data_for(tmp_path / "d.npz", samples=48)
    counts = swept_over(monkeypatch)
    convert(model, tmp_path / "q.onnx", data=data, recipe=Recipe(weight=Weight(bits=4), activation=Activation(bits=4)))
    assert 48 not in counts
