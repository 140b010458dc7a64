"""The log of a precision search: what was tried and timed, line by line, so that a search that was cut off goes on where it was."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import msgspec

from quantcli.tune.score import Score  # noqa: TC001 - msgspec reads the types of an Attempt
from quantcli.tune.widths import Width  # noqa: TC001 - as above

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

Line = TypeVar("Line", "Tried", "Timed")


@dataclass(frozen=True)
class Attempt:
    """One assignment that was tried.

    Attributes:
        steps: How many steps of the order it takes.
        weight_bytes: What its weights take, at their widths.
        score: What the metric says of it on the samples that are searched with.
        held: What it says on those that are held back.
        kept: Whether it is what is written.
        seconds: What a run of it takes, where it is time that is to be saved.
    """

    steps: int
    weight_bytes: int
    score: Score
    held: Score
    kept: bool = False
    seconds: float | None = None


class Tried(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a try."""

    digest: str
    attempt: Attempt


class Timed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of what a run takes with one layer at some widths."""

    digest: str
    layer: str
    widths: list[Width]
    seconds: list[float]


@dataclass(frozen=True)
class Log:
    """A file of JSON lines; what another search wrote is left alone, as is a line that was cut off.

    Attributes:
        path: The file; None for nowhere.
    """

    path: Path | None

    def attempts(self) -> dict[str, Attempt]:
        """Return the tries, by what names their assignments."""
        return {line.digest: line.attempt for line in self.lines(Tried)}

    def times(self, digest: str) -> dict[str, dict[Width, float]]:
        """Return the seconds of a run, by layer and its width, as a search has measured them: again they would be others.

        Args:
            digest: What names the search.
        """
        lines = [line for line in self.lines(Timed) if line.digest == digest]
        return {line.layer: dict(zip(line.widths, line.seconds, strict=False)) for line in lines}

    def add_attempt(self, digest: str, attempt: Attempt) -> None:
        """Write a try down."""
        self.add(Tried(digest, attempt))

    def add_times(self, digest: str, layer: str, times: Mapping[Width, float]) -> None:
        """Write down the seconds of a run, by a layer's width."""
        self.add(Timed(digest, layer, list(times), list(times.values())))

    def add(self, line: Tried | Timed) -> None:
        """Write a line."""
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(msgspec.json.encode(line) + b"\n")

    def lines(self, kind: type[Line]) -> Iterator[Line]:
        """Yield the lines of a kind."""
        if self.path is None or not self.path.is_file():
            return
        for line in self.path.read_bytes().splitlines():
            with contextlib.suppress(msgspec.DecodeError):  # ValidationError is one
                yield msgspec.json.decode(line, type=kind)
