"""The loop that counts: batches, shards, interruptions, the shortcut to the extremes, and the hooks that run a model."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calibration.collect import CHECK_SAMPLES, Checkpoint, Known, Seen, Work, collect, pilot_of
from calibration.datasets import InputSpec
from calibration.errors import DataError, RunError
from calibration.hooks.onnxruntime import Runner
from calibration.hooks.torch import ModuleHook, ProgramHook
from calibration.lanes import WAITING, Lanes, in_line
from calibration.layout import ALIGNED, Frame, Layout
from calibration.observers import Counting, TensorStatistics
from calibration.shortcut import Shortcut

Array = NDArray[Any]
ROWS = np.random.default_rng(4).normal(size=(10, 3)).astype(np.float32)
ROWS[9] = 1000.0  # what stands last is seen only where the last batch is run
SHIFT = np.array([0.5, -3.0, 7.25], dtype=np.float32)


class Rows:
    """A data set of one array."""

    labels = None
    digest = "d" * 64
    synthetic = False

    def __init__(self, values: Array, name: str = "x") -> None:
        self.values, self.name = values, name

    def __len__(self) -> int:
        return len(self.values)

    def shape_of(self, index: int) -> tuple[int, ...]:
        return tuple(self.values[index].shape)

    def read(self, indices: NDArray[np.intp]) -> dict[str, Array]:
        return {self.name: self.values[indices]}


# One batch after the other; the last one counted beside the next; two and three computed beside one another.
LANES = [Lanes(), Lanes(1, 1, 2), Lanes(1, 2, 2), Lanes(1, 3, 3)]


def work(values: Array, batch: int, counting: Counting | None = None, lanes: Lanes = LANES[0]) -> Work:
    spans = [(start, min(start + batch, len(values))) for start in range(0, len(values), batch)]
    counting = counting or Counting(samples=len(values))
    return Work(Rows(values), np.arange(len(values), dtype=np.intp), spans, pilot_of(spans), counting, lanes=lanes)


def model(batch: int | str, *operators: str) -> Runner:
    """Return a running model x → Mul by 2 → Add SHIFT → Relu (→ Log), with every tensor among its outputs."""
    chain = ["x", "doubled", "shifted", "clipped", "logged"]
    steps = [("Mul", "two"), ("Add", "shift"), ("Relu", None), *((operator, None) for operator in operators)]
    nodes = [
        helper.make_node(operator, [before, constant] if constant else [before], [after])
        for (operator, constant), before, after in zip(steps, chain, chain[1:], strict=False)
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3]) for name in chain]
    constants = [numpy_helper.from_array(np.float32(2.0).reshape(1), "two"), numpy_helper.from_array(SHIFT, "shift")]
    graph = helper.make_graph(nodes, "test", infos[:1], infos[1 : len(steps) + 1], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Runner(proto.SerializeToString())


def of(values: Array) -> TensorStatistics:
    return TensorStatistics(float(values.min()), float(values.max()), values.size)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_the_loop_counts_what_numpy_counts(batch: int, lanes: Lanes) -> None:
    done: list[int] = []
    found = collect(model("n"), ["x", "doubled", "shifted"], work(ROWS, batch, lanes=lanes), progress=done.append)
    doubled = ROWS * np.float32(2)
    assert found.tensors == {"x": of(ROWS), "doubled": of(doubled), "shifted": of(doubled + SHIFT)}
    assert found.samples == 10
    assert done == [*range(batch, 10, batch), 10]
    np.testing.assert_array_equal(found.kept["x"], ROWS[:CHECK_SAMPLES], strict=True)


def test_a_tensor_that_is_not_finite_is_named() -> None:
    runner = model("n", "Log")  # the logarithm of what Relu made 0 is −inf
    with pytest.raises(DataError) as caught:
        collect(runner, ["x", "clipped", "logged"], work(ROWS, 4))
    assert "tensor 'logged', samples 0 to 3" in str(caught.value)
    assert collect(runner, ["x", "clipped"], work(ROWS, 4)).samples == 10  # nobody asked for it


def test_what_is_not_finite_is_counted_where_that_is_allowed() -> None:
    counting = Counting("all", allow_non_finite=True, channels=True, samples=10)
    found = collect(model("n", "Log"), ["logged"], work(ROWS, 4, counting)).tensors["logged"]
    clipped = np.maximum(ROWS * np.float32(2) + SHIFT, 0)
    finite = np.log(clipped[clipped > 0])
    assert (found.infinite, found.nan, found.elements) == (30 - finite.size, 0, finite.size)
    assert found.maximum == pytest.approx(float(finite.max()), rel=1e-6)
    assert found.histogram is not None
    assert int(found.histogram.counts.sum()) == finite.size


def test_samples_that_are_finite_are_kept_for_checks() -> None:
    rows = ROWS.copy()
    rows[[0, 2], 1] = np.nan
    counting = Counting(allow_non_finite=True, samples=10)
    for batch in (1, 5, 10):
        assert collect(model("n"), ["x"], work(rows, batch, counting)).kept["x"].tolist() == rows[[1, 3, 4, 5]].tolist()


class Around:
    """A hook around another that counts its runs."""

    def __init__(self, hook: Runner) -> None:
        self.hook, self.runs = hook, 0

    def rest(self) -> None:
        pass

    def frame(self, layout: Layout) -> Frame | None:
        del layout
        return None

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        return self.hook.inputs

    def run(self, feeds: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        self.runs += 1
        return self.hook.run(feeds, outputs)


class Uneven(Around):
    """Every other batch takes longer: batches beside one another are done out of order."""

    def run(self, feeds: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        if self.runs % 2:
            time.sleep(0.02)
        return super().run(feeds, outputs)


@pytest.mark.parametrize("lanes", LANES[1:])
def test_batches_are_counted_in_order_whatever_is_done_first(lanes: Lanes) -> None:
    """A moving average depends on the order, to the last bit."""
    counting = Counting("moving-average", momentum=0.7, samples=10)
    done: list[int] = []
    found = collect(Uneven(model("n")), ["x", "shifted"], work(ROWS, 1, counting, lanes), progress=done.append)
    assert done == list(range(1, 11))
    assert found.tensors == collect(model("n"), ["x", "shifted"], work(ROWS, 1, counting)).tensors


@pytest.mark.parametrize("lanes", LANES)
def test_the_first_batch_that_fails_is_the_one_that_is_told(lanes: Lanes) -> None:
    """Two batches hold a NaN; the later one is computed first. What came before is counted, what comes after is not."""
    rows = ROWS.copy()
    rows[[4, 5, 9], 1] = np.nan
    done: list[int] = []
    with pytest.raises(DataError, match="tensor 'x', samples 4 to 4"):
        collect(Uneven(model("n")), ["x"], work(rows, 1, lanes=lanes), progress=done.append)
    assert done == [1, 2, 3, 4]


@pytest.mark.parametrize("lanes", LANES)
def test_a_model_that_fails_ends_the_run(lanes: Lanes) -> None:
    class Failing(Uneven):
        def run(self, feeds: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
            if feeds["x"][0, 0] == ROWS[3, 0]:
                raise RunError("the model fails")
            return super().run(feeds, outputs)

    done: list[int] = []
    with pytest.raises(RunError, match="the model fails"):
        collect(Failing(model("n")), ["doubled"], work(ROWS, 1, lanes=lanes), progress=done.append)
    assert done == [1, 2, 3][: len(done)]


@pytest.mark.parametrize(
    ("threads", "cores", "beside", "wanted"),
    [
        (0, 1, True, Lanes(1, 1, 1)),
        (0, 2, True, Lanes(1, 2, 2)),
        (0, 16, True, Lanes(15, 2, 2)),
        (1, 2, True, Lanes(1, 1, 2)),
        (0, 4, False, Lanes(4, 1, 1)),
        (2, 4, False, Lanes(2, 1, 2)),
    ],
)
def test_lanes_take_the_threads_there_are(threads: int, cores: int, beside: bool, wanted: Lanes) -> None:
    assert Lanes.of(threads, cores, beside) == wanted


def test_what_is_counted_soon_is_not_handed_on() -> None:
    counted: list[tuple[int, bool]] = []
    here = threading.get_ident()

    def count(batch: int, found: int) -> None:
        assert found == 10 * batch
        counted.append((batch, threading.get_ident() == here))

    after: list[int] = []
    in_line(Lanes(1, 1, 2), iter(range(5)), lambda batch: 10 * batch, count, after.append, lambda found: found >= 30)
    assert counted == [(0, False), (1, False), (2, False), (3, True), (4, True)]
    assert after == [0, 1, 2, 3, 4]


def test_batches_that_gave_little_wait_for_a_slow_one_and_their_thread_does_not() -> None:
    room = 2 * WAITING
    others, counted = threading.Event(), []

    def compute(batch: int) -> int:
        if batch == 0:
            assert others.wait(10)
        if batch == room:
            others.set()
        return batch

    in_line(
        Lanes(1, 2, 2), iter(range(20)), compute, lambda _, found: counted.append(found), lambda _: None, lambda _: True
    )
    assert counted == list(range(20))


def test_much_waits_with_its_thread() -> None:
    begun: list[int] = []
    counted: list[int] = []

    def compute(batch: int) -> int:
        begun.append(batch)
        if batch == 0:
            time.sleep(0.2)
            assert len(begun) <= 2
        return batch

    in_line(Lanes(1, 2, 2), iter(range(20)), compute, lambda _, found: counted.append(found), lambda _: None)
    assert counted == list(range(20))


@pytest.mark.parametrize("little", [True, False])
@pytest.mark.parametrize("where", ["reading", "computing", "counting", "after"])
def test_what_goes_wrong_ends_the_run_once_all_before_it_are_counted(where: str, little: bool) -> None:
    counted: list[int] = []

    def stumble(what: str, batch: int) -> int:
        if (what, batch) == (where, 7):
            raise ArithmeticError(what)
        return batch

    def batches() -> Iterator[int]:
        for batch in range(20):
            yield stumble("reading", batch)

    def count(batch: int, _: int) -> None:
        counted.append(stumble("counting", batch))

    def after(batch: int) -> None:
        stumble("after", batch)

    with pytest.raises(ArithmeticError, match=where):
        in_line(
            Lanes(1, 3, 3),
            batches(),
            lambda batch: stumble("computing", batch),
            count,
            after,
            lambda _: little,
        )
    assert counted == list(range(8 if where == "after" else 7))


class Counted(Around):
    """Can be interrupted at one of its runs."""

    def __init__(self, hook: Runner, stop: int = -1) -> None:
        super().__init__(hook)
        self.stop = stop

    def run(self, feeds: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        if self.runs + 1 == self.stop:
            os.kill(os.getpid(), signal.SIGINT)
        return super().run(feeds, outputs)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("observer", ["minmax", "all"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interruption_keeps_whole_batches_and_the_run_goes_on(observer: str, stop: int, lanes: Lanes) -> None:
    counting = Counting(observer, samples=10)
    names = ["x", "shifted", "clipped"]
    unbroken = collect(model("n"), names, work(ROWS, 2, counting))
    saved: list[Seen] = []
    hook = Counted(model("n"), stop)
    with pytest.raises(KeyboardInterrupt):
        collect(hook, names, work(ROWS, 2, counting, lanes), checkpoint=Checkpoint(save=saved.append))
    (seen,) = saved
    # Some are counted while others are computed; and what was told to another thread is heard here a little later.
    held = lanes.workers if lanes.computing == 1 else (1 + WAITING) * lanes.workers
    assert stop - held < seen.done <= (stop if lanes.computing == 1 else 5)
    again = collect(Counted(model("n")), names, work(ROWS, 2, counting), seen)
    assert again.samples == 10
    for name in names:
        mine, theirs = again.tensors[name], unbroken.tensors[name]
        assert (mine.minimum, mine.maximum, mine.elements) == (theirs.minimum, theirs.maximum, theirs.elements)
        if observer == "all":
            assert mine.samples == theirs.samples
            assert mine.histogram is not None
            assert theirs.histogram is not None
            assert (mine.histogram.counts == theirs.histogram.counts).all()


def test_checkpoints_are_kept_as_often_as_asked() -> None:
    saved: list[int] = []
    keep = Checkpoint(0.0, lambda seen: saved.append(seen.done))
    collect(model("n"), ["x"], work(ROWS, 2), checkpoint=keep)
    assert saved == [1, 2, 3, 4, 5]


# ---- the first batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "batch", "wanted"),
    [(1, 1, 1), (15, 1, 1), (32, 1, 2), (200, 1, 8), (200, 3, 3), (200, 14, 1), (1000, 8, 1), (1000, 7, 2)],
)
def test_so_many_batches_tell_where_tails_begin(count: int, batch: int, wanted: int) -> None:
    spans = [(start, min(start + batch, count)) for start in range(0, count, batch)]
    assert pilot_of(spans) == tuple(spans[:wanted])


def test_no_single_sample_says_where_tails_begin() -> None:
    values = np.random.default_rng(8).normal(size=(256, 2100)).astype(np.float32)
    values[0] *= 20
    spans = [(start, start + 1) for start in range(256)]
    found = []
    for mine in (spans, spans[:100], spans[100:]):
        job = Work(
            Rows(values),
            np.arange(256, dtype=np.intp),
            mine,
            pilot_of(spans),
            Counting("percentile", samples=256),
        )
        histogram = collect(model("n"), ["x"], job).tensors["x"].histogram
        assert histogram is not None
        found.append(histogram)
    whole, first, second = found
    assert whole.stride > 1
    assert whole.tails == first.tails == second.tails
    assert 2 < whole.tails[1] < 4
    assert -4 < whole.tails[0] < -2
    first.merge(second)
    assert (first.counts == whole.counts).all()
    clear = math.ceil(math.ldexp(whole.tails[1], -whole.exponent))  # the first bin that holds nothing else
    beyond = int((values >= math.ldexp(clear, whole.exponent)).sum())
    assert whole.counts[len(whole.counts) // 2 + clear :].sum() == beyond > 0


# ---- all tensors of a batch together ------------------------------------------------------------------------------------------


class Framed(Around):
    """Counts how many batches went into frames."""

    framed = 0

    def frame(self, layout: Layout) -> Frame:
        frame, hook = self.hook.frame(layout), self

        class Watched:
            buffer = frame.buffer

            def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
                hook.framed += 1
                return frame.run(feeds)

        return Watched()


def counted(seen: Seen) -> dict[str, list[object]]:
    """Return all that was counted, by tensor."""
    found: dict[str, list[object]] = {}
    for name, held in seen.tensors.items():
        histogram = held.histogram
        assert histogram is not None
        found[name] = [held.minimum, held.maximum, held.elements, held.nan, held.infinite, histogram.exponent]
        found[name] += [histogram.counts.tolist(), histogram.zeros, histogram.stride, histogram.tails]
    return found


def wide_model(columns: int) -> Runner:
    """Return a running model x → Neg → Relu, and x → Clip to [−1, 0.5], and the sum of a row."""
    nodes = [
        helper.make_node("Neg", ["x"], ["turned"]),
        helper.make_node("Relu", ["turned"], ["clipped"]),
        helper.make_node("Clip", ["x", "low", "high"], ["between"]),
        helper.make_node("ReduceSum", ["x", "axis"], ["summed"]),
    ]
    shapes = {"x": columns, "turned": columns, "clipped": columns, "between": columns, "summed": 1}
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in shapes.items()]
    constants = [
        numpy_helper.from_array(np.array(-1, np.float32), "low"),
        numpy_helper.from_array(np.array(0.5, np.float32), "high"),
        numpy_helper.from_array(np.array([1]), "axis"),
    ]
    graph = helper.make_graph(nodes, "test", infos[:1], infos[1:], constants)
    return Runner(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


WIDE, KNOWN = (
    ["x", "turned", "clipped", "between", "summed"],
    Known({"clipped": (0.0, math.inf), "between": (-1.0, 0.5)}, 1e9),
)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("columns", [5, 4501])
@pytest.mark.parametrize(("observer", "spoilt"), [("percentile", False), ("entropy", False), ("percentile", True)])
def test_tensors_counted_together_are_counted_alike(observer: str, spoilt: bool, columns: int, lanes: Lanes) -> None:
    """Batches of 4 of 150 samples, the last one smaller; then what is not finite, which is counted tensor by tensor."""
    rows = np.random.default_rng(columns).normal(size=(150, columns)).astype(np.float32)
    rows[77] *= 30
    rows[100:, 3] = 0.0
    if spoilt:
        rows[40, 1], rows[41, 2], rows[90, 0] = np.nan, np.inf, -np.inf
    counting = Counting(observer, allow_non_finite=spoilt, samples=150)
    framed = Framed(wide_model(columns))
    together = collect(framed, WIDE, work(rows, 4, counting, lanes), None, KNOWN)
    alone = collect(Around(wide_model(columns)), WIDE, work(rows, 4, counting), None, KNOWN)
    # All whole batches but those that were begun before the first was counted.
    assert 37 - (1 + WAITING) * lanes.workers <= framed.framed <= 36
    assert counted(together) == counted(alone)
    assert alone.tensors["x"].histogram is not None
    assert (alone.tensors["x"].histogram.stride > 1) == (columns > 5)


@pytest.mark.parametrize("largest", [50.0, 2e9])
def test_a_clip_is_read_whole_again_once_a_value_is_too_large_to_know_what_it_gives(largest: float) -> None:
    """Where no value is that large, nothing can be NaN behind a Clip, and nobody looks for it there."""

    class Overflowing(Around):
        def run(self, feeds: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
            found = super().run(feeds, outputs)
            if feeds["x"].max() == largest:
                found["between"] = found["between"].copy()
                found["between"][0, 2] = np.nan  # of this batch the fifth is looked at, the twelfth, …
            return found

    rows = np.random.default_rng(3).normal(size=(150, 600)).astype(np.float32)
    rows[100, 0] = largest
    job = work(rows, 4, Counting("percentile", samples=150))
    if largest > KNOWN.limit:
        with pytest.raises(DataError, match=r"tensor 'between', samples 100 to 103: 1 of 2400 values are not finite"):
            collect(Overflowing(wide_model(600)), WIDE, job, None, KNOWN)
        return
    found = collect(Overflowing(wide_model(600)), WIDE, job, None, KNOWN)
    assert found.tensors["between"].histogram is not None
    assert found.tensors["between"].histogram.stride == 7
    assert counted(found) == counted(collect(wide_model(600), WIDE, job, None, KNOWN))


def test_a_checkpoint_holds_what_was_counted_together() -> None:
    rows = np.random.default_rng(5).normal(size=(40, 300)).astype(np.float32)
    job = work(rows, 4, Counting("percentile", samples=40))
    held: list[tuple[int, int]] = []

    def save(seen: Seen) -> None:
        histogram = seen.tensors["turned"].histogram
        assert histogram is not None
        held.append((seen.tensors["turned"].elements, int(histogram.counts.sum()) + histogram.waiting))

    collect(wide_model(300), WIDE, job, None, KNOWN, checkpoint=Checkpoint(0.0, save))
    assert held == [(1200 * batches, 1200 * batches) for batches in range(1, 11)]


def test_tensors_whose_shape_depends_on_values_are_counted_one_by_one() -> None:
    """The layout is the first batch's; ONNX Runtime refuses to write a larger tensor there."""
    nodes = [helper.make_node("Relu", ["x"], ["clipped"]), helper.make_node("NonZero", ["clipped"], ["places"])]
    nodes += [helper.make_node("Cast", ["places"], ["found"], to=TensorProto.FLOAT)]
    infos = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])]
    outputs = [helper.make_tensor_value_info("found", TensorProto.FLOAT, [2, "many"])]
    graph = helper.make_graph(nodes, "test", infos, outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    runner = Framed(Runner(proto.SerializeToString()))
    counting = Counting("percentile", samples=10)
    together = collect(runner, ["x", "found"], work(ROWS, 2, counting))
    assert runner.framed > 0
    assert counted(together) == counted(collect(Around(runner.hook), ["x", "found"], work(ROWS, 2, counting)))


def test_a_layout_lies_at_whole_lines_and_holds_float32_alone() -> None:
    found = {"a": np.ones((2, 3), np.float32), "b": np.ones((17,), np.float32)}
    layout = Layout.of(found)
    assert layout is not None
    assert (layout.starts, layout.size) == ({"a": 0, "b": ALIGNED}, 3 * ALIGNED)
    buffer = layout.buffer()
    assert (buffer.ctypes.data % 64, buffer.size) == (0, 48)
    views = layout.views(buffer)
    views["b"][:] = 2
    assert buffer[16:33].tolist() == [2.0] * 17
    assert views["a"].shape == (2, 3)
    assert Layout.of({**found, "c": np.ones(2, np.float16)}) is None
    assert Layout.of({**found, "c": np.ones((0, 2), np.float32)}) is None


# ---- the shortcut --------------------------------------------------------------------------------------------------------------


class Highest(Around):
    """What `quantcli.probe.with_highest` makes of a model: the highest value of "clipped", the others whole."""

    def run(self, feeds: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        assert "peaks" in (outputs or ())
        found = super().run(feeds, ["doubled", "clipped"])
        return {"doubled": found["doubled"], "peaks": found["clipped"].max(axis=0)}


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("limit", [1e9, 100.0])
def test_the_shortcut_counts_what_the_whole_tensors_hold(limit: float, lanes: Lanes) -> None:
    """A value above the limit gives it up for good: that batch, and what follows, is counted from the whole tensors."""
    light = Highest(model("n"))
    shortcut = Shortcut(frozenset({"clipped"}), limit, lambda settled: (light, dict.fromkeys(settled, ("peaks", 3))))
    names, known = ["x", "doubled", "clipped"], Known({"clipped": (0.0, math.inf)})
    found = collect(model("n"), names, work(ROWS, 2, lanes=lanes), None, known, shortcut)
    assert found.tensors == collect(model("n"), names, work(ROWS, 2)).tensors
    assert light.runs == 5


def test_a_tensor_whose_floor_was_not_seen_is_not_settled() -> None:
    shortcut = Shortcut(frozenset({"clipped"}), 1e9, lambda settled: pytest.fail(f"{settled} is not settled"))
    rows = np.abs(ROWS) + 5  # Relu has nothing to clip
    names = ["doubled", "clipped"]
    found = collect(model("n"), names, work(rows, 2), None, Known({"clipped": (0.0, math.inf)}), shortcut)
    assert found.tensors == collect(model("n"), names, work(rows, 2)).tensors
    assert found.tensors["clipped"].minimum > 0


def test_empty_tensors_have_no_shortcut() -> None:
    shortcut = Shortcut(
        frozenset({"clipped", "empty"}), 1e9, lambda settled: pytest.fail(f"there is one for {settled}")
    )

    class Empty(Around):
        def run(self, feeds: dict[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
            found = super().run(feeds, [name for name in outputs or () if name != "empty"])
            return {**found, "empty": found["clipped"][:, :0]}

    found = collect(
        Empty(model("n")), ["clipped", "empty"], work(ROWS, 2), None, Known({"clipped": (0.0, math.inf)}), shortcut
    ).tensors
    assert found["empty"] == TensorStatistics()
    assert found["clipped"].elements == ROWS.size


# ---- torch ---------------------------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """A convolution with BatchNorm, a pool, and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.act = torch.nn.ReLU()
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.dense = torch.nn.Linear(8, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_()  # type: ignore[union-attr]
            self.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.pool(self.act(self.norm(self.conv(x)))).flatten(1))  # type: ignore[no-any-return]


def mean_range(seen: TensorStatistics) -> tuple[float, float]:
    assert seen.samples is not None
    return seen.samples.mean


IMAGES = np.random.default_rng(2).normal(size=(12, 3, 8, 8)).astype(np.float32)
SUBMODULES = {"norm": "getitem", "act": "relu", "pool": "mean", "dense": "linear"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    sizes = {"x": {0: torch.export.Dim("n", min=1, max=64)}}
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=sizes), path)
    return path


def test_all_hooks_give_the_same_statistics(exported: Path) -> None:
    """Forward hooks in eager mode, an interpreted program, and ONNX Runtime on the exported graph.

    Float32 kernels of different libraries round differently: the longest sums here have 27 products, three layers deep.
    """
    from quantcli.fold import fold
    from quantcli.load import load
    from quantcli.placement import place
    from quantcli.probe import with_outputs
    from quantcli.recipe import Recipe

    folded = fold(load(exported).graph)
    names = place(folded, Recipe()).observed()
    assert {"x", "relu", "mean"} <= set(names)
    jobs = work(IMAGES, 5, Counting("mean-minmax", samples=12))
    by_runtime = collect(Runner(with_outputs(folded, names)), names, jobs).tensors
    program = load(exported).program
    by_program = collect(ProgramHook(program, names), names, jobs).tensors
    given = InputSpec("x", np.dtype("float32"), (None, 3, 8, 8))
    asked = ["x", *(module for module, name in SUBMODULES.items() if name in names)]
    by_module = collect(ModuleHook(Net(), [given]), asked, jobs).tensors
    for name in names:
        others = [by_program[name]]
        others += [by_module[m] for m in asked if SUBMODULES.get(m, m) == name]
        for other in others:
            tolerance = 2.0**-18 * max(abs(by_runtime[name].minimum), abs(by_runtime[name].maximum))
            assert other.elements == by_runtime[name].elements
            assert abs(other.minimum - by_runtime[name].minimum) <= tolerance
            assert abs(other.maximum - by_runtime[name].maximum) <= tolerance
            assert np.abs(np.subtract(mean_range(other), mean_range(by_runtime[name]))).max() <= tolerance


def test_what_torch_does_not_know_is_named(exported: Path) -> None:
    with pytest.raises(RunError, match="no value 'nothing'"):
        ProgramHook(torch.export.load(exported), ["relu", "nothing"])
    with pytest.raises(RunError, match="no submodule 'head'"):
        ModuleHook(Net(), [InputSpec("x", np.dtype("float32"), (None, 3, 8, 8))]).run({"x": IMAGES}, ["head"])
    with pytest.raises(RunError, match="no PyTorch model"):
        ProgramHook(None, [])
    brain = torch.export.export(torch.nn.Linear(2, 2).bfloat16(), (torch.ones(1, 2).bfloat16(),))
    with pytest.raises(RunError, match=r"holds bfloat16.*leave out --runtime"):
        ProgramHook(brain, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_told(exported: Path) -> None:
    with pytest.raises(RunError, match="no CUDA device"):
        ProgramHook(torch.export.load(exported), ["relu"], "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_counts_what_the_cpu_counts(exported: Path) -> None:
    names = ["x", "relu", "linear"]
    jobs = work(IMAGES, 5)
    program = torch.export.load(exported)
    cpu, cuda = (collect(ProgramHook(program, names, device), names, jobs).tensors for device in ("cpu", "cuda"))
    for name in names:
        tolerance = 2.0**-8 * max(abs(cpu[name].minimum), abs(cpu[name].maximum))  # TF32 convolutions keep 10 bits
        assert abs(cpu[name].minimum - cuda[name].minimum) <= tolerance
        assert abs(cpu[name].maximum - cuda[name].maximum) <= tolerance


def test_the_runner_tells_the_models_inputs() -> None:
    assert model("n").inputs == (InputSpec("x", np.dtype("float32"), (None, 3)),)
    assert model(4).inputs == (InputSpec("x", np.dtype("float32"), (4, 3)),)


def test_what_a_model_failed_on_is_told_without_its_runtimes_source() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    shape = numpy_helper.from_array(np.array([4, -1]), "shape")
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "t", [x], [y], [shape])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(RunError) as failed:
        Runner(proto.SerializeToString(), what="m.onnx").run({"x": np.zeros((1, 3), np.float32)})
    told = str(failed.value)
    assert told.startswith("ONNX Runtime fails while running m.onnx on x 1x3 ([ONNXRuntimeError] : 1 : FAIL : ")
    assert "Input shape:{1,3}, requested shape:{4,-1}" in told
    assert "reshape_helper" not in told
