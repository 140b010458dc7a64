"""The arena and the loops: nothing that lives at once overlaps, and loops visit what they stand for."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantcli.embedded.arena import plan, shared
from quantcli.embedded.program import Buffer, Program, Step, channels_last, loops


def program_of(steps: list[Step]) -> Program:
    return Program("uint8", (), (), steps, [], False, 32, ("single",), False, False)


@st.composite
def chains(draw: st.DrawFn) -> list[Step]:
    """Draw steps that read buffers made before and write new ones, some in place."""
    made = [Buffer("first", draw(st.integers(1, 50)))]
    steps = [Step("k", "0", "op", (), (made[0], 0))]
    for number in range(1, draw(st.integers(2, 14))):
        sources = draw(st.lists(st.sampled_from(made[-4:]), min_size=1, max_size=2))
        over = draw(st.booleans())
        buffer = Buffer(str(number), sources[0].size if over else draw(st.integers(1, 50)))
        made.append(buffer)
        reads = tuple((source, 0) for source in sources)
        steps.append(Step("k", str(number), "op", reads, (buffer, 0), in_place=(0,) if over else ()))
    return steps


@given(chains())
def test_what_lives_at_once_does_not_overlap(steps: list[Step]) -> None:
    program = program_of(steps)
    plan(program)
    assert program.arena >= program.bound
    lives = shared(steps)
    for number, step in enumerate(steps):
        written, _ = step.writes
        for read, _ in step.reads:
            ends = read.offset + read.size <= written.offset or written.offset + written.size <= read.offset
            same = read.offset == written.offset and read.size == written.size
            allowed = all(i in step.in_place for i, (other, _) in enumerate(step.reads) if other is read)
            assert ends or (same and allowed)
        live = [life for life in lives if life.begin <= number <= life.end]
        places = sorted((life.buffers[0].offset, life.size) for life in live)
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places))
        assert all(a >= 0 and a + size <= program.arena for a, size in places)
        # What is still to be read is not written over.
        later = {id(read) for other in steps[number + 1 :] for read, _ in other.reads}
        for life in lives:
            for buffer in life.buffers[:-1]:
                following = life.buffers[life.buffers.index(buffer) + 1]
                if following is written:
                    assert id(buffer) not in later


def test_a_chain_needs_its_two_largest_neighbours() -> None:
    sizes = [10, 40, 30, 5]
    buffers = [Buffer(str(i), size) for i, size in enumerate(sizes)]
    steps = [Step("k", "0", "op", (), (buffers[0], 0))]
    steps += [Step("k", str(i), "op", ((buffers[i - 1], 0),), (buffers[i], 0)) for i in (1, 2, 3)]
    program = program_of(steps)
    plan(program)
    assert (program.bound, program.arena) == (70, 70)


def test_what_is_read_in_another_order_too_is_not_written_over() -> None:
    """A sum of a tensor and its transpose reads one buffer twice, and may overwrite it for one of them alone."""
    first, second = Buffer("first", 8), Buffer("second", 8)
    steps = [
        Step("k", "0", "op", (), (first, 0)),
        Step("sum", "1", "Add", ((first, 0), (first, 0)), (second, 0), in_place=(0,)),
    ]
    program = program_of(steps)
    plan(program)
    assert program.arena == 16
    steps[1].in_place = (0, 1)
    plan(program)
    assert program.arena == 8


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.lists(st.integers(-3, 40), min_size=4, max_size=4),
    st.lists(st.integers(-3, 40), min_size=4, max_size=4),
)
def test_loops_visit_what_they_stand_for(sizes: list[int], first: list[int], second: list[int]) -> None:
    index = np.indices(sizes).reshape(len(sizes), -1)
    a = (index * np.array(first[: len(sizes)])[:, None]).sum(axis=0) + 7
    b = (index * np.array(second[: len(sizes)])[:, None]).sum(axis=0)
    found = loops(a, b)
    assert found is not None
    again = np.indices(found.size).reshape(4, -1)
    assert np.array_equal((again * np.array(found.a)[:, None]).sum(axis=0), a - a[0])
    assert np.array_equal((again * np.array(found.b)[:, None]).sum(axis=0), b - b[0])


def test_what_is_no_loop_is_none() -> None:
    places = np.array([0, 1, 4, 9, 16, 25])
    assert loops(places, np.arange(6)) is None


def test_channels_last() -> None:
    assert channels_last((1, 2, 1, 3)).tolist() == [0, 3, 1, 4, 2, 5]
