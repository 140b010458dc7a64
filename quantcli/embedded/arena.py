"""The arena: where each buffer lies while it lives, so that memory is used again.

Placing intervals in the least memory is NP-hard (dynamic storage allocation); first fit over several orders comes close, and the
largest live set says how close.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantcli.embedded.program import Buffer, Program, Step

# Orders that are tried beyond the usual ones, where those do not reach the bound.
SHUFFLED = 200


@dataclass(eq=False)
class Life:
    """A place in the arena, which buffers share that are one behind the other.

    Attributes:
        buffers: The buffers.
        size: In values.
        begin: The first step that writes to it.
        end: The last step that reads it.
    """

    buffers: list[Buffer]
    size: int
    begin: int
    end: int


def plan(program: Program) -> None:
    """Give every buffer of the arena its place, and set the program's ``arena`` and ``bound``, in values."""
    lives = shared(program.steps)
    for number, step in enumerate(program.steps):
        step.live = sum(life.size for life in lives if life.begin <= number <= life.end)
    program.bound = max((step.live for step in program.steps), default=0)
    best: tuple[int, list[int]] | None = None
    for order in orders(lives):
        offsets = first_fit(lives, order)
        size = max((offset + life.size for offset, life in zip(offsets, lives, strict=True)), default=0)
        if best is None or size < best[0]:
            best = size, offsets
        if size == program.bound:
            break
    if best is None:
        return
    program.arena = best[0]
    for offset, life in zip(best[1], lives, strict=True):
        for buffer in life.buffers:
            buffer.offset = offset


def shared(steps: Sequence[Step]) -> list[Life]:
    """Return the lives of the arena's buffers; a step that may write over what it reads last does so."""
    lives: dict[Buffer, Life] = {}
    last: dict[Buffer, int] = {}
    for number, step in enumerate(steps):
        for buffer, _ in step.reads:
            last[buffer] = number
        last.setdefault(step.writes[0], number)
    for number, step in enumerate(steps):
        made = step.writes[0]
        if made.kind != "arena":
            continue
        if made not in lives:
            over = next((read for read in overwritable(step, number, last) if lives[read].buffers[-1] is read), None)
            if over is not None:
                life = lives[over]
                life.buffers.append(made)
                life.end = max(number, last[made])
                lives[made] = life
                continue
            lives[made] = Life([made], made.size, number, number)
        lives[made].end = max(lives[made].end, last[made])
    return list(dict.fromkeys(lives.values()))


def overwritable(step: Step, number: int, last: dict[Buffer, int]) -> list[Buffer]:
    """Return the buffers that a step may write over: it reads them last, and wherever it reads them it may."""
    made, found = step.writes[0], []
    for place in step.in_place:
        read = step.reads[place][0]
        everywhere = all(other in step.in_place for other, (buffer, _) in enumerate(step.reads) if buffer is read)
        if read.kind == "arena" and last[read] == number and read.size == made.size and everywhere:
            found.append(read)
    return found


def orders(lives: Sequence[Life]) -> list[list[int]]:
    """Return in which orders lives are placed: by size, by span, as they begin, and some at random (always the same)."""
    names = range(len(lives))
    found = [
        sorted(names, key=lambda i: (-lives[i].size, lives[i].begin)),
        sorted(names, key=lambda i: (-(lives[i].end - lives[i].begin + 1) * lives[i].size, lives[i].begin)),
        sorted(names, key=lambda i: (lives[i].begin, -lives[i].size)),
        sorted(names, key=lambda i: (-(lives[i].end - lives[i].begin), -lives[i].size)),
    ]
    random = np.random.default_rng(0)
    return found + [random.permutation(len(lives)).tolist() for _ in range(SHUFFLED)]


def first_fit(lives: Sequence[Life], order: Sequence[int]) -> list[int]:
    """Return where each life begins, each placed as low as those before it in the order leave room."""
    offsets = [-1] * len(lives)
    placed: list[int] = []
    for i in order:
        taken = sorted(
            (offsets[j], offsets[j] + lives[j].size)
            for j in placed
            if lives[j].begin <= lives[i].end and lives[i].begin <= lives[j].end
        )
        at = 0
        for begin, end in taken:
            if at + lives[i].size <= begin:
                break
            at = max(at, end)
        offsets[i] = at
        placed.append(i)
    return offsets
