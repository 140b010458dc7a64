"""Standard streams that are closed, lead to a full device, or whose reader has left."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from quantcli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Guarded:
    """A standard stream that leads nowhere from its first failure on, so that nothing fails over it again.

    Args:
        stream: The stream.
        vital: Whether the failure is raised; what cannot be told on standard error ends no work.
    """

    def __init__(self, stream: TextIO, vital: bool) -> None:
        self.stream, self.vital = stream, vital

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text.

        Raises:
            OutputError: If the device refuses it.
            BrokenPipeError: If the reader has left.
        """
        if text != "":  # click tries what a stream takes with an empty text, and passes over what it raises
            with self.failing_once():
                self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Send on what is held back; raises as `write` does."""
        with self.failing_once():
            self.stream.flush()

    @contextlib.contextmanager
    def failing_once(self) -> Iterator[None]:
        """Turn what the system says into our own error, and the stream to nowhere."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if not self.vital:
                return
            if error.errno == errno.EPIPE:
                raise
            what = f"the output cannot be written ({error.strerror or error})"
            raise OutputError(what, "look at where standard output leads") from error


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Guard standard output and error; those that are closed lead nowhere, and no file that is opened takes their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - for good
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, TextIOWrapper):
            # A name that the terminal cannot show is no failure; what is ASCII, click would take for a mistake and go round.
            ascii_alone = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(errors="backslashreplace", encoding="utf-8" if ascii_alone else None)
    sys.stdout = cast("TextIO", Guarded(before[0], vital=True))
    sys.stderr = cast("TextIO", Guarded(before[1], vital=False))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
