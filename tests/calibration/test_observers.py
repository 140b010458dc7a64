"""What is counted, against numpy on everything at once, and the ranges that follow from it."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from calibration import observers, ranges
from calibration.errors import DataError, StatisticsError
from calibration.histogram import BINS, SMALLEST_EXPONENT, Histogram
from calibration.observers import OBSERVERS, Counting, SampleRanges, TensorStatistics
from calibration.ranges import RANGES, Grid, RangeSpec, Shares, parse_range, range_of, softmin

Array = NDArray[Any]
Floats = NDArray[np.float64]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = arrays(np.float32, st.integers(1, 40), elements=FINITE)
ALL = Counting("all")


def counted(*batches: Array, counting: Counting = ALL) -> TensorStatistics:
    """Return what is counted of batches whose first axis is the sample."""
    seen = TensorStatistics.for_counting(counting)
    first = 0
    for batch in batches:
        if first == 0:
            seen.prepare(batch, len(batch), counting)
        seen.update(batch, first, len(batch), counting)
        first += len(batch)
    if seen.histogram is not None:
        seen.histogram.flush()
    return seen


# ---- extremes ------------------------------------------------------------------------------------------------------------------


@given(VALUES, st.lists(st.integers(0, 40)), st.randoms())
def test_extremes_are_counted_alike_however_the_values_are_split_and_ordered(
    values: Array, cuts: list[int], order: Any
) -> None:
    edges = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    batches = [values[first:last] for first, last in pairwise(edges)]
    order.shuffle(batches)
    seen = counted(*batches, counting=Counting())
    assert (seen.minimum, seen.maximum, seen.elements) == (float(values.min()), float(values.max()), values.size)


@given(st.lists(VALUES, min_size=1, max_size=5), st.randoms())
def test_merging_counts_everything_in_any_order(batches: list[Array], order: Any) -> None:
    parts = [counted(batch, counting=Counting()) for batch in batches] + [TensorStatistics()]
    order.shuffle(parts)
    merged = TensorStatistics()
    for part in parts:
        merged.merge(part)
    values = np.concatenate(batches)
    assert merged == TensorStatistics(float(values.min()), float(values.max()), values.size)


def test_empty_arrays_change_nothing() -> None:
    assert counted(np.zeros((0, 3), dtype=np.float32), counting=Counting()) == TensorStatistics(math.inf, -math.inf, 0)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("shape", "position"), [((2, 3), 0), ((2, 3), 5), ((2, 70_000), 139_999), ((2, 70_000), 77)])
def test_values_that_are_not_finite_are_refused_and_not_counted(
    observer: str, bad: float, shape: tuple[int, int], position: int
) -> None:
    counting = Counting(observer, samples=100)
    seen = counted(np.array([[0.0, 2.0]], dtype=np.float32), counting=counting)
    seen.floor = 0.0  # a settled minimum must not hide them
    values = np.full(shape, 7.0, dtype=np.float32)
    values.flat[position] = bad
    if bad == -math.inf:
        seen.floor = None  # no Relu makes it
    with pytest.raises(DataError, match=rf"1 of {values.size} values are not finite"):
        seen.update(values, 1, 2, counting)
    assert (seen.minimum, seen.maximum, seen.elements) == (0.0, 2.0, 2)


@pytest.mark.parametrize("elements", [600, 1 << 20])
def test_values_that_are_not_finite_leave_the_histogram_as_if_they_were_not_there(elements: int) -> None:
    """All values lie above 5, so that a zero in place of one that is not finite would be the lowest."""
    rows = np.random.default_rng(3).uniform(5, 10, (8, elements // 8)).astype(np.float32)
    spoiled = rows.copy()
    spoiled[:, ::10], spoiled[:, 3::50] = np.nan, np.inf
    counting = Counting("all", allow_non_finite=True, samples=8)
    seen = TensorStatistics.for_counting(counting)
    seen.prepare(spoiled[:4], 4, counting)
    for start in (0, 4):
        seen.update(spoiled[start : start + 4], start, 4, counting)
    finite = spoiled[np.isfinite(spoiled)]
    histogram = seen.histogram
    assert histogram is not None
    histogram.flush()
    assert histogram.zeros == 0
    assert (seen.elements, seen.nan + seen.infinite) == (finite.size, spoiled.size - finite.size)
    if histogram.stride == 1:
        assert histogram.counts.sum() == finite.size
    else:  # what is looked at counts for the others
        assert histogram.counts.sum() == pytest.approx(finite.size, rel=0.01)
    for percent in (90, 99.9):
        lo, hi = range_of(RangeSpec("percentile", percent), "t", seen, Grid())
        outside = (100 - percent) / 2
        expected = np.percentile(finite, (outside, 100 - outside))
        assert (lo, hi) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_settled_minimum_changes_nothing(observer: str) -> None:
    rows = np.maximum(np.random.default_rng(1).normal(size=(4, 40_000)), 0).astype(np.float32)
    counting = Counting(observer, samples=4)
    plain, settled = TensorStatistics.for_counting(counting), TensorStatistics.for_counting(counting)
    settled.floor = 0.0
    for seen in (plain, settled):
        seen.prepare(rows[:2], 2, counting)
        seen.update(rows[:2], 0, 2, counting)
        seen.update(rows[2:], 2, 2, counting)
        if seen.histogram is not None:
            seen.histogram.flush()
    assert (plain.minimum, plain.maximum, plain.samples) == (settled.minimum, settled.maximum, settled.samples)
    if plain.histogram is not None and settled.histogram is not None:
        assert (plain.histogram.counts == settled.histogram.counts).all()


def clipped(seen: TensorStatistics, high: float = 1.0) -> TensorStatistics:
    """Return statistics of what a Clip to [0, high] gives."""
    seen.floor, seen.ceiling = 0.0, high
    return seen


@pytest.mark.parametrize("high", [0.5, 1.0, 2.5])  # the tails begin there, there, and below
@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_known_ceiling_changes_nothing(observer: str, high: float) -> None:
    rows = np.random.default_rng(1).normal(size=(8, 40_000)).clip(0, high).astype(np.float32)
    counting = Counting(observer, samples=8)
    plain, known = TensorStatistics.for_counting(counting), clipped(TensorStatistics.for_counting(counting), high)
    for seen in (plain, known):
        seen.prepare(rows[:2], 2, counting)
        for start in range(0, 8, 2):
            seen.update(rows[start : start + 2], start, 2, counting)
        if seen.histogram is not None:
            seen.histogram.flush()
    assert plain.maximum == high
    assert (plain.minimum, plain.maximum, plain.samples) == (known.minimum, known.maximum, known.samples)
    if plain.histogram is not None and known.histogram is not None:
        assert (plain.histogram.counts == known.histogram.counts).all()


def test_what_lies_below_a_ceiling_and_beyond_the_tails_is_counted_to_the_last_element() -> None:
    rows = np.random.default_rng(1).normal(size=(8, 40_000)).clip(0, 3.5).astype(np.float32)
    counting = Counting("percentile", samples=8)
    seen = clipped(TensorStatistics.for_counting(counting), 3.5)
    for start in range(0, 8, 2):
        if not start:
            seen.prepare(rows[:2], 2, counting)
        seen.update(rows[start : start + 2], start, 2, counting)
    assert seen.histogram is not None
    seen.histogram.flush()
    bound = seen.histogram.tails[1]
    assert bound < seen.maximum == 3.5
    first = math.ceil(math.ldexp(bound, -seen.histogram.exponent))  # the first bin that lies beyond it whole
    assert seen.histogram.counts[BINS + first :].sum() == (rows >= math.ldexp(first, seen.histogram.exponent)).sum()


def test_what_lies_just_above_a_floor_is_counted() -> None:
    """A Relu that cuts next to nothing: its lowest values lie in the tail, and are none of its extremes."""
    rows = np.random.default_rng(2).uniform(0.001, 1, size=(64, 20_000)).astype(np.float32)
    rows[:, 7] = 0.0
    counting = Counting("percentile", samples=64)
    seen = TensorStatistics.for_counting(counting)
    seen.floor = 0.0
    seen.prepare(rows[:8], 8, counting)
    for start in range(0, 64, 8):
        seen.update(rows[start : start + 8], start, 8, counting)
    assert seen.histogram is not None
    seen.histogram.flush()
    assert seen.histogram.stride > 1
    lowest = seen.histogram.counts[BINS : BINS + 5].sum()  # bins are 1/2048 wide
    exact = int((rows < 5 / 2048).sum())
    assert lowest == pytest.approx(exact, abs=4 * math.sqrt(exact * seen.histogram.stride))


def test_channels_are_counted_along_the_second_axis() -> None:
    rows = np.random.default_rng(5).normal(size=(6, 3, 4, 4)).astype(np.float32)
    seen = counted(rows[:2], rows[2:], counting=Counting(channels=True))
    assert seen.channels is not None
    assert seen.channels.minimum.tolist() == rows.min(axis=(0, 2, 3)).tolist()
    assert seen.channels.maximum.tolist() == rows.max(axis=(0, 2, 3)).tolist()


# ---- single samples ------------------------------------------------------------------------------------------------------------


@given(arrays(np.float32, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=FINITE), st.integers(1, 12))
def test_the_mean_of_sample_ranges_is_exact(rows: Array, cut: int) -> None:
    seen = counted(*(part for part in (rows[:cut], rows[cut:]) if len(part)), counting=Counting("mean-minmax"))
    assert seen.samples is not None
    for found, ends in zip(seen.samples.mean, (rows.min(axis=1), rows.max(axis=1)), strict=True):
        exact = sum(Fraction(float(value)) for value in ends) / len(rows)
        assert found == float(exact) or math.isclose(found, float(exact), rel_tol=2**-52, abs_tol=2.0**-1074)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_moving_average_is_what_its_recurrence_gives(momentum: float, cut: int) -> None:
    rows = np.random.default_rng(9).normal(size=(8, 5)).astype(np.float32)
    average = float(rows[0].max())
    for row in rows:
        average = momentum * average + (1 - momentum) * float(row.max())
    counting = Counting("moving-average", momentum=momentum)
    one = counted(rows, counting=counting)
    first, second = (counted(part, counting=counting) for part in (rows[:cut], rows[cut:]))
    first.merge(second)
    for seen in (one, first):
        assert seen.samples is not None
        assert seen.samples.moving[1] == pytest.approx(average, rel=1e-14)


def test_sample_ranges_begin_where_the_first_samples_do() -> None:
    empty, some = SampleRanges(), SampleRanges()
    some.update(np.array([-1.0], dtype=np.float32), np.array([2.0], dtype=np.float32))
    empty.merge(some)
    assert empty == some
    some.merge(SampleRanges())
    assert empty == some


# ---- histograms ----------------------------------------------------------------------------------------------------------------


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_a_histogram_holds_every_value_in_its_bin(batches: list[Array]) -> None:
    values = np.concatenate(batches)
    found = counted(*batches).histogram
    assert found is not None
    width = Fraction(2) ** found.exponent
    places = [math.floor(Fraction(float(value)) / width) + BINS for value in values]
    assert found.counts.tolist() == np.bincount(places, minlength=2 * BINS).tolist()
    assert found.zeros == int((values == 0).sum())
    largest = max(-float(values.min()), float(values.max()))
    assert found.exponent == SMALLEST_EXPONENT or largest >= float(width) * BINS / 2  # no wider than needed


@given(st.lists(VALUES, min_size=2, max_size=5), st.randoms())
def test_histograms_are_the_same_in_any_order_and_any_parts(batches: list[Array], order: Any) -> None:
    whole = counted(*batches).histogram
    shuffled = list(batches)
    order.shuffle(shuffled)
    parts = [counted(batch).histogram for batch in shuffled]
    assert whole is not None
    merged = Histogram()
    for part in parts:
        assert part is not None
        merged.merge(part)
    assert (merged.exponent, merged.zeros) == (whole.exponent, whole.zeros)
    assert (merged.counts == whole.counts).all()


@pytest.mark.parametrize("elements", [900, 70_000, 65_536, 131_077])
@pytest.mark.parametrize("two_sided", [False, True])
def test_tails_are_counted_to_the_last_element(elements: int, two_sided: bool) -> None:
    """Beyond the tails every value is there; within them about every stride-th, counted so often."""
    rng = np.random.default_rng(elements)
    rows = rng.standard_t(3, size=(8, elements)).astype(np.float32)
    rows = rows if two_sided else np.abs(rows)
    counting = Counting("percentile", samples=8 * 200)  # as if many more were to come: the stride grows
    seen = counted(rows[:3], rows[3:], counting=counting).histogram
    assert seen is not None
    below, above = seen.tails
    stored = rows.astype(np.float64)
    exact = np.histogram(stored[(stored < below) | (stored > above)], seen.edges())[0]
    edges = seen.edges()
    outside = (edges[1:] < below) | (edges[:-1] > above)  # bins that lie beyond the tails whole
    assert (seen.counts[outside] == exact[outside]).all()
    if seen.stride > 1:
        assert 0 < exact[outside].sum() < 0.02 * rows.size
        looked = int(seen.counts.sum())
        assert abs(looked - rows.size) < 0.05 * rows.size
    else:
        assert seen.counts.sum() == rows.size


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_which_elements_are_looked_at_does_not_depend_on_the_batches(batch: int) -> None:
    rows = np.random.default_rng(3).normal(size=(8, 3, 500)).astype(np.float32)
    counting = Counting("mse", samples=1000)
    whole, parts = TensorStatistics.for_counting(counting), TensorStatistics.for_counting(counting)
    for seen, size in ((whole, 8), (parts, batch)):
        seen.prepare(rows[:2], 2, counting)
        for start in range(0, 8, size):
            seen.update(rows[start : start + size], start, len(rows[start : start + size]), counting)
        assert seen.histogram is not None
        seen.histogram.flush()
        assert seen.histogram.stride > 1
    assert (whole.histogram.counts == parts.histogram.counts).all()  # type: ignore[union-attr]


# ---- ranges --------------------------------------------------------------------------------------------------------------------

SAMPLES = {
    "normal": np.random.default_rng(0).normal(size=(50, 4000)),
    "rectified": np.maximum(np.random.default_rng(1).normal(size=(50, 4000)), 0),
    "heavy tails": np.random.default_rng(2).standard_t(2.5, size=(50, 4000)),
    "uniform": np.random.default_rng(3).uniform(-1, 3, size=(50, 4000)),
}


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request: pytest.FixtureRequest) -> tuple[Array, TensorStatistics]:
    rows = SAMPLES[request.param].astype(np.float32)
    return rows, counted(rows, counting=Counting("all", samples=50))


def test_minmax_is_what_was_seen() -> None:
    assert range_of(RangeSpec("minmax"), "t", TensorStatistics(-1.5, 2.25, 7), Grid()) == (-1.5, 2.25)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 2.0, -3.7, 1e-40])
@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "all"])
def test_a_tensor_of_one_value_has_that_as_its_range(name: str, value: float, symmetric: bool) -> None:
    """A Relu that cuts everything; and a bin of a histogram reaches further than one value."""
    rows = np.full((8, 50), value, dtype=np.float32)
    held = float(rows[0, 0])
    found = range_of(
        parse_range(name), "t", counted(rows, counting=Counting(name, samples=8)), Grid(symmetric=symmetric)
    )
    assert found == (held, held)


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99, 100.0])
def test_a_percentile_holds_its_share_up_to_a_bin(sample: tuple[Array, TensorStatistics], percent: float) -> None:
    rows, seen = sample
    assert seen.histogram is not None
    width = math.ldexp(1.0, seen.histogram.exponent)
    cut = (100 - percent) / 200
    lo, hi = range_of(RangeSpec("percentile", percent), "t", seen, Grid())
    between = 2 * width + 1e-6  # bins, and the gap between neighbours where values are rare
    assert np.quantile(rows, cut, method="lower") - between <= lo <= np.quantile(rows, cut, method="higher") + between
    assert (
        np.quantile(rows, 1 - cut, method="lower") - between
        <= hi
        <= np.quantile(rows, 1 - cut, method="higher") + between
    )
    low, high = range_of(RangeSpec("percentile", percent), "t", seen, Grid(symmetric=True))
    bound = max(-low, high)
    sizes = np.abs(rows)
    assert np.quantile(sizes, percent / 100, method="lower") - between <= bound
    assert bound <= np.quantile(sizes, percent / 100, method="higher") + between


@pytest.mark.parametrize("percent", [99.9, 99.99])
@pytest.mark.parametrize("symmetric", [False, True])
def test_far_percentiles_are_those_of_all_elements(percent: float, symmetric: bool) -> None:
    """Few of the bulk are looked at, but all of the tails, from whose ends they are counted."""
    values = np.random.default_rng(8).standard_t(3, size=(64, 6000)).astype(np.float32)
    few = counted(*np.split(values, 8), counting=Counting("percentile", samples=64))
    every = counted(values, counting=Counting("percentile", samples=1))  # as if there were no more of it
    assert few.histogram is not None
    assert every.histogram is not None
    assert every.histogram.stride == 1 < few.histogram.stride
    assert few.histogram.counts.sum() != values.size
    spec, grid = RangeSpec("percentile", percent), Grid(symmetric=symmetric)
    assert range_of(spec, "t", few, grid) == range_of(spec, "t", every, grid)


def quantization_error(rows: Array, lo: float, hi: float, steps: int) -> float:
    """Return the mean squared error of rounding to a grid over a range, with zero on the grid."""
    scale = (hi - lo) / steps
    zero = round(-lo / scale)
    q = np.clip(np.rint(rows / scale) + zero, 0, steps)
    return float((((q - zero) * scale - rows) ** 2).mean())


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_no_worse_than_other_clips(sample: tuple[Array, TensorStatistics], bits: int) -> None:
    """Against all clips of a coarse raster, measured by quantizing everything; 3 % for bins and for rounding off the grid."""
    rows, seen = sample
    wide, steps = rows.astype(np.float64), (1 << bits) - 1
    lo, hi = range_of(RangeSpec("mse"), "t", seen, Grid(steps))
    found = quantization_error(wide, min(lo, 0), hi, steps)
    shares = np.linspace(0.1, 1.0, 10)
    others = [
        quantization_error(wide, min(seen.minimum, 0) * a, seen.maximum * b, steps) for a in shares for b in shares
    ]
    assert found <= 1.03 * min(others)


def test_entropy_clips_what_is_rare_and_leaves_what_is_not() -> None:
    heavy = counted(SAMPLES["heavy tails"].astype(np.float32))
    lo, hi = range_of(RangeSpec("entropy"), "t", heavy, Grid(symmetric=True))
    assert max(-lo, hi) < 0.7 * max(-heavy.minimum, heavy.maximum)
    even = counted(SAMPLES["uniform"].astype(np.float32))
    lo, hi = range_of(RangeSpec("entropy"), "t", even, Grid())
    assert hi == pytest.approx(even.maximum, rel=0.02)


def divergence(counts: list[int], lo: float, hi: float, steps: int, weight: int) -> float:
    """Return what `entropy` says that a range costs, cell by cell and level by level; counts are of unit bins around zero."""
    half, total = len(counts) // 2, sum(counts)

    def below(value: float) -> float:
        place = min(max(value + half, 0.0), float(len(counts)))
        whole = int(place)
        return sum(counts[:whole]) + (counts[whole] * (place - whole) if whole < len(counts) else 0.0)

    def quantile(share: float) -> float:
        passed = 0.0
        for place, count in enumerate(counts):
            if count and passed + count >= share * total:
                return place - half + (share * total - passed) / count
            passed += count
        raise AssertionError

    first, last = quantile(1 / 1024), quantile(1023 / 1024)
    width = (last - first) / 12
    cells = [below(first + (i + 1) * width) - below(first + i * width) for i in range(12)]
    slopes = 0.0
    for a, b in pairwise(cells):
        if a + b > 0:
            slopes += ((b - a) ** 2 - weight * (a + b)) / ((a + b) / 2) / width**2 / total
    step = (hi - lo) / steps
    cost = math.log1p(step**2 * max(slopes, 0.0) / 12) / 2
    outside = 0.0
    ends = [i for i, count in enumerate(counts) if count]
    for sign, bound, end in ((1, hi, max(ends[-1] + 1 - half, 0)), (-1, -lo, max(half - ends[0], 0))):
        within, less = (below(x) / total if sign > 0 else 1 - below(-x) / total for x in (bound, bound - step))
        beyond = 1 - within
        held = max(within - less, beyond * step / max(end - bound + step, step))
        if beyond > 1e-12:
            cost += (held + beyond) * math.log((held + beyond) / held)
        outside += beyond
    return cost + math.log1p(-outside) if outside <= 1 / 4 else math.inf


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 500), min_size=8, max_size=24), st.sampled_from([15, 255]), st.integers(1, 9))
def test_entropy_takes_the_softmin_of_the_ranges_divergences(bins: list[int], steps: int, weight: int) -> None:
    """The mean over a raster of ten by ten ranges, by an evaluation of its own of what it says it weighs."""
    assume(sum(bins) > 0)
    half = (len(bins) + 1) // 2
    counts = [*bins, *[0] * (2 * half - len(bins))]
    full = np.zeros(2 * BINS, dtype=np.int64)
    full[BINS - half : BINS + half] = counts
    ends = [i - half for i, count in enumerate(counts) if count]
    seen = TensorStatistics(float(ends[0]), float(ends[-1] + 1), sum(counts))
    seen.histogram = Histogram(exponent=0, counts=full, stride=weight)
    with mock.patch.object(ranges, "RATIOS", 10):
        lo, hi = range_of(RangeSpec("entropy"), "t", seen, Grid(steps))
    lowest, highest = min(seen.minimum, 0.0), max(seen.maximum, 0.0)
    shares = [80 ** (-place / 9) for place in range(10)]
    costs = {
        (lowest * a, highest * b): divergence(counts, lowest * a, highest * b, steps, weight)
        for a in (shares if lowest < 0 else [0.0])
        for b in (shares if highest > 0 else [0.0])
    }
    least = min(costs.values())
    # The whole range costs nothing but its steps; where those cost nothing, either, weights hang on the last digits of sums.
    assume(least > 1e-6)
    weights = [math.exp(12 * (1 - cost / least)) for cost in costs.values()]
    mean = [sum(w * ends[side] for w, ends in zip(weights, costs, strict=True)) / sum(weights) for side in (0, 1)]
    # Costs differ by a clipped share that is lost below 10^-12 and by sums of floats: 10^-9 of one, 10^-3 of the least, or less.
    moved = math.expm1(2 * 12 * 1e-9 / least) * (highest - lowest)
    assert lo == pytest.approx(max(mean[0], seen.minimum), abs=moved)
    assert hi == pytest.approx(min(mean[1], seen.maximum), abs=moved)


@given(st.integers(0, 159), st.integers(0, 159), st.floats(-0.01, 0.01))
def test_ranges_that_cost_nearly_the_same_share_the_result(one: int, other: int, dearer: float) -> None:
    """Which of two costs less is nothing that the result leaps at: of weights 1 and exp(−12·d) follows their mean."""
    assume(one != other)
    seen = TensorStatistics(0.0, 8.0, 100)
    places = [8 * 80 ** (-place / 159) for place in (one, other)]

    def cost(lows: Floats, highs: Floats, steps: Floats) -> Floats:
        assert (steps == highs / 255).all()
        found = np.full((len(lows), highs.shape[1]), np.inf)
        found[:, one], found[:, other] = 1 + max(dearer, 0), 1 + max(-dearer, 0)
        return found

    lo, hi = softmin(seen, Grid(), cost)
    weights = [math.exp(-12 * max(dearer, 0)), math.exp(-12 * max(-dearer, 0))]
    assert lo == 0.0
    # Rounding of a few products, and of a power.
    assert hi == pytest.approx((weights[0] * places[0] + weights[1] * places[1]) / sum(weights), rel=1e-12)


@given(st.integers(-20, 20), st.sampled_from(sorted(SAMPLES)), st.booleans())
@settings(deadline=None, max_examples=20)
def test_entropy_follows_the_values_scale(exponent: int, kind: str, symmetric: bool) -> None:
    rows = SAMPLES[kind].astype(np.float32)
    lo, hi = range_of(RangeSpec("entropy"), "t", counted(rows), Grid(symmetric=symmetric))
    scaled = range_of(RangeSpec("entropy"), "t", counted(np.ldexp(rows, exponent)), Grid(symmetric=symmetric))
    assert scaled == (math.ldexp(lo, exponent), math.ldexp(hi, exponent))


def test_slopes_are_fishers_information() -> None:
    """Of a normal distribution it is 1/σ².

    What lies beyond the cells is missing: 2·(z·φ(z) + Φ(−z)) at z = 3.1, 2.2 %. Differences of cells of d = 6.2σ/12 see the slope
    of what is averaged over a cell twice, which is that of a normal of variance σ² + d²/6, and so 4.4 % less; the mean of two
    neighbours in the denominator is another d²/8 wider, 3.3 %. As much again as the last two is left to their next orders. A
    million values scatter by 0.2 %; twice that lies above.
    """
    for sigma in (0.5, 3.0):
        rows = np.random.default_rng(5).normal(scale=sigma, size=(100, 10000)).astype(np.float32)
        histogram = counted(rows).histogram
        assert histogram is not None
        found = Shares.of(histogram).slopes(1) * sigma**2
        assert 1 - 0.022 - 2 * (0.044 + 0.033) < found < 1.004


def test_few_values_have_no_slopes() -> None:
    """What differs between cells is then what counting makes of an even distribution: clipping would have no reason."""
    for seed in range(20):
        rows = np.random.default_rng(seed).uniform(-1, 1, size=(4, 50)).astype(np.float32)
        lo, hi = range_of(RangeSpec("entropy"), "t", counted(rows), Grid())
        assert lo == pytest.approx(float(rows.min()), rel=0.05)
        assert hi == pytest.approx(float(rows.max()), rel=0.05)


def test_a_spike_at_zero_and_an_outlier_do_not_confuse_entropy() -> None:
    rows = np.maximum(np.random.default_rng(8).normal(size=(200, 5000)), 0).astype(np.float32)
    rows[3, 7] = 40.0
    lo, hi = range_of(RangeSpec("entropy"), "t", counted(rows), Grid())
    assert lo == 0.0
    assert 2.0 < hi < 20.0


@settings(deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 30)), elements=FINITE),
    st.booleans(),
    st.sampled_from([15, 255]),
)
def test_every_range_lies_within_what_was_seen(rows: Array, symmetric: bool, steps: int) -> None:
    seen = counted(rows)
    for name in RANGES:
        lo, hi = range_of(parse_range(name), "t", seen, Grid(steps, symmetric))
        assert seen.minimum <= lo
        assert hi <= seen.maximum
        assert math.isfinite(lo)
        assert math.isfinite(hi)


@pytest.mark.parametrize("name", [name for name in RANGES if name != "minmax"])
def test_what_was_not_counted_is_told(name: str) -> None:
    with pytest.raises(StatisticsError, match=f"--observer {name}"):
        range_of(parse_range(name), "t", counted(np.ones((2, 2), np.float32), counting=Counting()), Grid())


@pytest.mark.parametrize(
    "text", ["", "max", "percentile:", "percentile:0", "percentile:101", "percentile:nan", "mse:3", "minmax:1"]
)
def test_ranges_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"percentile|range"):
        parse_range(text)


def test_a_percentile_is_read() -> None:
    assert parse_range("percentile:99.5") == RangeSpec("percentile", 99.5)
    assert parse_range("percentile").argument == pytest.approx(99.99)


@pytest.mark.parametrize("size", [20_000, observers.WORTH_EIGHT, observers.WORTH_EIGHT + 5])
@pytest.mark.parametrize("place", [0, 12_345, -1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_anywhere(size: int, place: int, bad: float) -> None:
    values = np.random.default_rng(1).normal(size=(1, size)).astype(np.float32)
    counting = Counting("percentile", samples=1000)
    seen = counted(values, counting=counting)
    assert seen.histogram is not None
    assert seen.minimum < seen.histogram.tails[0] < seen.histogram.tails[1] < seen.maximum
    before = seen.minimum, seen.maximum, seen.elements
    values[0, place] = bad
    with pytest.raises(DataError, match=f"1 of {size} values are not finite"):
        seen.update(values, 1, 1, counting)
    assert (seen.minimum, seen.maximum, seen.elements) == before
