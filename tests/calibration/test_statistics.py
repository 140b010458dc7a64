"""How statistics are kept: the file, what it refuses, and how parts are put together."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

from calibration.errors import StatisticsError
from calibration.observers import Counting, TensorStatistics
from calibration.statistics import Part, Statistics, load, load_any, merge, missing, serialized

Array = NDArray[Any]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
SEEN = st.builds(lambda a, b, n: TensorStatistics(min(a, b), max(a, b), n), FINITE, FINITE, st.integers(1, 2**53))


def statistics(tensors: dict[str, TensorStatistics] | None = None, **inputs: Array) -> Statistics:
    preprocess = {"scale": 1 / 255, "mean": [0.1307], "std": [0.3081], "layout": "NCHW"}
    return Statistics(
        "a" * 64, "b" * 64, preprocess, 12, "minmax", tensors or {"x": TensorStatistics(0.0, 1.0, 3)}, inputs
    )


def fields(held: Statistics) -> tuple[Any, ...]:
    return (held.model_sha256, held.data_sha256, held.preprocess, held.samples, held.observer, held.tensors)


@settings(deadline=None)  # the disk may be slow
@given(tensors=st.dictionaries(NAMES, SEEN, min_size=1, max_size=5))
def test_what_was_seen_is_kept_exactly(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, TensorStatistics]
) -> None:
    path = tmp_path_factory.getbasetemp() / "kept.stats"
    written = statistics(tensors)
    path.write_bytes(serialized(written))
    held = load(path)
    assert fields(held) == fields(written)
    for name, seen in tensors.items():  # == does not tell −0.0 from 0.0
        assert math.copysign(1, held.tensors[name].minimum) == math.copysign(1, seen.minimum)
    turned = dict(reversed(tensors.items()))
    assert serialized(statistics(turned)) == path.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "uint8", "int8", "bool"])
def test_the_first_samples_are_kept(tmp_path: Path, dtype: str) -> None:
    x = (np.arange(24).reshape(4, 6) % 5).astype(dtype)
    strided = np.repeat(x, 2, axis=1)[:, ::2].T
    written = statistics(None, **{"x": x, "in/put 0:": strided})
    (tmp_path / "s").write_bytes(serialized(written))
    held = load(tmp_path / "s").check_inputs
    assert set(held) == {"x", "in/put 0:"}
    np.testing.assert_array_equal(held["x"], x, strict=True)
    np.testing.assert_array_equal(held["in/put 0:"], strided, strict=True)


def test_the_same_statistics_give_the_same_bytes() -> None:
    x, z = np.ones((2, 3), dtype=np.float32), np.zeros((2, 1), dtype=np.int64)
    assert serialized(statistics(x=x, z=z)) == serialized(statistics(z=z.copy(), x=x.copy()))


def document(**changes: Any) -> dict[str, Any]:
    """Return the document of a sound statistics file, with changes."""
    data = serialized(statistics())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    sound: dict[str, Any] = json.loads(header["__metadata__"]["quantcli"])
    return {**sound, **changes}


def file_with(metadata: Any) -> bytes:
    return bytes(save({"sample/x": np.zeros(3, dtype=np.float32)}, metadata=metadata))


def file_of(content: Any) -> bytes:
    return file_with({"quantcli": json.dumps(content)})


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"minimum": 0.0, "maximum": 1.0, "elements": 3, **changes}}


def test_a_document_written_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(file_of(document()))
    assert fields(load(tmp_path / "s")) == fields(statistics())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(None, "no statistics file at", id="not there"),
        pytest.param(b"", "not a statistics file", id="empty"),
        pytest.param(b"hello\n", "not a statistics file", id="text"),
        pytest.param(serialized(statistics())[:-1], "not a statistics file", id="cut short"),
        pytest.param(serialized(statistics())[:40], "not a statistics file", id="cut in the header"),
        pytest.param(b"\xff" * 8 + b"{}", "not a statistics file", id="a header of 2^64 bytes"),
        pytest.param(file_with(None), "not a statistics file", id="no metadata"),
        pytest.param(file_with({"format": "pt"}), "not a statistics file", id="another's metadata"),
        pytest.param(file_with({"quantcli": "{"}), "not a statistics file", id="no JSON"),
        pytest.param(file_of([1]), "not a statistics file", id="a list"),
        pytest.param(file_of({}), "not a statistics file", id="an empty document"),
        pytest.param(file_of(document(format="other")), "not a statistics file", id="another format"),
        pytest.param(file_of(document(version=1)), "version 1", id="another version"),
        pytest.param(file_of(document(tensors={"x": {"minimum": 0.0}})), "not a statistics file", id="half an entry"),
        pytest.param(file_of(document(tensors=entry(mean=0.5))), "not a statistics file", id="an unknown field"),
        pytest.param(file_of(document(tensors={"x": 1})), "not a statistics file", id="a number for an entry"),
        pytest.param(file_of(document(tensors=[])), "not a statistics file", id="a list of tensors"),
        pytest.param(file_of(document(tensors=entry(minimum="0"))), "not a statistics file", id="text for a number"),
        pytest.param(file_of(document(tensors=entry(maximum=math.nan))), "not a statistics file", id="NaN"),
        pytest.param(file_of(document(tensors=entry(maximum=math.inf))), "not a statistics file", id="infinity"),
        pytest.param(file_of(document(tensors=entry(minimum=2.0))), "not a statistics file", id="the wrong way round"),
        pytest.param(file_of(document(samples="many")), "not a statistics file", id="text for the samples"),
        pytest.param(file_of(document(preprocess=3)), "not a statistics file", id="a number for the preprocessing"),
    ],
)
def test_files_that_hold_no_statistics_are_refused(tmp_path: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / "s.stats").write_bytes(content)
    with pytest.raises(StatisticsError) as caught:
        load(tmp_path / "s.stats")
    assert told in str(caught.value)
    assert "s.stats" in str(caught.value)


def test_a_folder_holds_no_statistics(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match="no statistics file"):
        load(tmp_path)


# ---- parts ---------------------------------------------------------------------------------------------------------------------

BATCH, ROWS = 4, np.random.default_rng(7).standard_t(3, size=(40, 6, 5, 5)).astype(np.float32)


def counted(observer: str, batches: range, tensor: str = "t", sha: str = "d" * 64, **wishes: Any) -> Statistics:
    """Return the statistics of some batches of ROWS."""
    counting = Counting(observer, samples=len(ROWS), **wishes)
    seen = TensorStatistics.for_counting(counting)
    seen.prepare(ROWS[:BATCH], BATCH, counting)
    for number in batches:
        seen.update(ROWS[number * BATCH : (number + 1) * BATCH], number * BATCH, BATCH, counting)
    part = Part(sha, len(ROWS), batches.start * BATCH, batches.stop * BATCH)
    kept = {"x": ROWS[batches.start * BATCH :][:2]}
    return Statistics(
        "a" * 64, sha, {}, part.stop - part.start, observer, {tensor: seen}, kept, {"batch": BATCH}, (part,)
    )


@pytest.mark.parametrize("observer", ["minmax", "mean-minmax", "percentile", "entropy", "all"])
@pytest.mark.parametrize("cuts", [[0, 10], [0, 3, 10], [0, 1, 2, 9, 10]])
def test_shards_together_are_the_whole_byte_for_byte(observer: str, cuts: list[int]) -> None:
    whole = counted(observer, range(10), channels=True)
    shards = [counted(observer, range(a, b), channels=True) for a, b in pairwise(cuts)]
    found = merge([(f"s{i}", shard) for i, shard in reversed(list(enumerate(shards)))])
    if "samples" in Counting(observer).parts:  # sums of products with a momentum are rounded
        for mine, theirs in zip(found.tensors["t"].samples.moving, whole.tensors["t"].samples.moving, strict=True):  # type: ignore[union-attr]
            assert mine == pytest.approx(theirs, rel=1e-14)
        found.tensors["t"].samples.average = whole.tensors["t"].samples.average  # type: ignore[union-attr]
    assert serialized(found) == serialized(whole)


@pytest.mark.parametrize("observer", ["minmax", "mean-minmax", "percentile", "all"])
def test_what_is_written_reads_back_and_goes_on(tmp_path: Path, observer: str) -> None:
    """A file in the middle of a calibration, read back, goes on to what an unbroken run gives."""
    counting = Counting(observer, samples=len(ROWS), channels=True)
    half = counted(observer, range(5), channels=True)
    (tmp_path / "s").write_bytes(serialized(half))
    held = load(tmp_path / "s")
    assert serialized(held) == serialized(half)
    for number in range(5, 10):
        held.tensors["t"].update(ROWS[number * BATCH : (number + 1) * BATCH], number * BATCH, BATCH, counting)
    whole = counted(observer, range(10), channels=True)
    held_whole = Statistics(**{**vars(whole), "tensors": held.tensors})
    assert serialized(held_whole) == serialized(whole)


def test_different_data_is_put_together_in_any_order() -> None:
    one, two = counted("minmax", range(10)), counted("minmax", range(4), sha="e" * 64)
    both = merge([("one", one), ("two", two)])
    assert serialized(both) == serialized(merge([("two", two), ("one", one)]))
    assert both.samples == 56
    assert [part.data_sha256[0] for part in both.parts] == ["d", "e"]
    assert both.data_sha256 not in {"d" * 64, "e" * 64}


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: counted("minmax", range(3, 6)), "counts samples that another file counts too"),
        (lambda: counted("percentile", range(5, 10)), "different observers"),
        (lambda: counted("minmax", range(5, 10), tensor="u"), "different tensors"),
        (lambda: counted("moving-average", range(5, 10)), "different observers"),
        (lambda: Statistics(**{**vars(counted("minmax", range(5, 10))), "model_sha256": "f"}), "different models"),
        (lambda: Statistics(**{**vars(counted("minmax", range(5, 10))), "preprocess": {"scale": 1}}), "preprocessed"),
        (lambda: counted("minmax", range(5, 10), channels=True), "different tensors' channels"),
        (
            lambda: Statistics(
                **{**vars(counted("minmax", range(5, 10))), "selection": {"samples": 40, "shuffle": True, "seed": 1}}
            ),
            r"another draw of the same data \(40 samples, shuffled by seed 1; ",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(other: Any, told: str) -> None:
    with pytest.raises(StatisticsError, match=told):
        merge([("a.stats", counted("minmax", range(4))), ("b.stats", other())])


def test_other_data_may_be_drawn_otherwise() -> None:
    other = counted("minmax", range(4), sha="e" * 64)
    drawn = Statistics(**{**vars(other), "selection": {"samples": 16, "shuffle": True, "seed": 3}})
    assert merge([("one", counted("minmax", range(10))), ("two", drawn)]).samples == 56


@pytest.mark.parametrize(
    ("held", "gaps"),
    [
        ([(0, 40)], []),
        ([(0, 8), (8, 40)], []),
        ([(0, 8), (20, 40)], [(8, 20)]),
        ([(4, 8)], [(0, 4), (8, 40)]),
        ([(0, 8), (12, 16), (20, 36)], [(8, 12), (16, 20), (36, 40)]),
    ],
)
def test_what_is_missing_is_found_anywhere(held: list[tuple[int, int]], gaps: list[tuple[int, int]]) -> None:
    parts = [Part("d", 40, start, stop) for start, stop in held]
    assert [(part.start, part.stop) for part in missing(parts)] == gaps
    beside = [Part("e", 8, 0, 6)]
    found = [(part.data_sha256, part.start, part.stop) for part in missing(parts + beside)]
    assert sorted(found) == [*(("d", *gap) for gap in gaps), ("e", 6, 8)]


@pytest.mark.parametrize("exponent", [-127, 118, 5000])
def test_bins_of_no_float32_are_refused(tmp_path: Path, exponent: int) -> None:
    held = counted("percentile", range(2))
    held.tensors["t"].histogram.flush()  # type: ignore[union-attr]
    held.tensors["t"].histogram.exponent = exponent  # type: ignore[union-attr]
    (tmp_path / "s").write_bytes(serialized(held))
    with pytest.raises(StatisticsError, match="not a statistics file"):
        load(tmp_path / "s")


def test_a_checkpoint_is_no_statistics_file(tmp_path: Path) -> None:
    half = Statistics(**{**vars(counted("minmax", range(5))), "unfinished": {"done": 5}})
    (tmp_path / "s").write_bytes(serialized(half))
    with pytest.raises(StatisticsError, match="--resume"):
        load(tmp_path / "s")
    assert load_any(tmp_path / "s").unfinished == {"done": 5}
