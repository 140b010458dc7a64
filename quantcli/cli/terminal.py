"""What a person or a machine sees: tables and JSON on standard output, progress and messages on standard error."""

from __future__ import annotations

import contextlib
import functools
import json as json_module
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantcli.documents import finite
from quantcli.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Terminal:
    """How much is said, and in which form.

    Attributes:
        quiet: Nothing but warnings and errors.
        verbose: Details too.
        json: One JSON document on standard output instead of tables.
    """

    quiet: bool = False
    verbose: bool = False
    json: bool = False

    def say(self, text: str) -> None:
        """Print a line of the result."""
        if not (self.quiet or self.json):
            console().print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def tell(self, text: str) -> None:
        """Print a line about what is going on, on standard error."""
        if not (self.quiet or self.json):
            console(stderr=True).print(text, style="dim", markup=False, emoji=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning; it is never silenced."""
        console(stderr=True).print(
            f"warning: {text}", style="yellow", markup=False, emoji=False, highlight=False, soft_wrap=True
        )

    def error(self, kind: str, what: str, remedy: str, code: int) -> None:
        """Print an error in one line; where JSON is asked for, as a JSON document too."""
        line = " ".join(f"error: {what}{'; ' + remedy if remedy else ''}".split())
        console(stderr=True).print(line, style="red", markup=False, emoji=False, highlight=False, soft_wrap=True)
        if self.json:
            document = {"error": {"type": kind, "message": what, "remedy": remedy, "exit_code": code}}
            with contextlib.suppress(OutputError, OSError):  # the line has told it
                click.echo(json_module.dumps(document, indent=2))

    def result(self, document: dict[str, Any]) -> None:
        """Print the result for machines; numbers that JSON does not know become null."""
        if self.json:
            click.echo(json_module.dumps(finite(document), indent=2, ensure_ascii=False))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; columns whose name begins with ``>`` are set to the right."""
        if self.quiet or self.json:
            return
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False)
        for column in columns:
            table.add_column(
                column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*(plain(cell) for cell in row))
        console().print(table)

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """Give a function (stage, done, total) that draws progress bars where someone is watching."""
        if self.quiet or self.json or not sys.stderr.isatty():
            yield lambda _stage, _done, _total: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console(stderr=True), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total, rate="")
                bars.update(tasks[stage], completed=done)
                speed = next((task.speed for task in bars.tasks if task.id == tasks[stage]), None)
                bars.update(tasks[stage], rate=f"{speed:,.1f}/s" if speed else "")

            yield show


class MessageRelay(logging.Handler):
    """Shows what the library warns of as our own warnings, and what it tells on standard error."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(logging.INFO)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        if record.levelno >= logging.WARNING:
            self.terminal.warn(record.getMessage())
        else:
            self.terminal.tell(record.getMessage())


@functools.cache
def console(stderr: bool = False) -> Console:
    """Return the console of a stream; lines are as wide as the terminal, without one as COLUMNS says, else 120 columns."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    told = os.environ.get("COLUMNS", "")
    wide = int(told) if told.isdecimal() and int(told) else 120
    return Console(stderr=stderr, width=None if stream.isatty() else wide)


def samples(count: int) -> str:
    """Write a number of samples."""
    return f"{count} sample" if count == 1 else f"{count} samples"


def plain(text: str) -> str:
    """Return text in which rich sees no markup."""
    from rich.markup import escape

    return escape(text)


def output_options(command: Command) -> Command:
    """Give a command ``-q``, ``-v`` and ``--json``; they work before and after a subcommand's name alike."""

    def remember(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and parameter.name is not None:
            terminal = context.find_root().ensure_object(dict).setdefault("terminal", Terminal())
            setattr(terminal, parameter.name, True)

    options: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": remember}
    for option in (
        click.option("--json", "json", help="Print one JSON document on standard output.", **options),
        click.option("-v", "--verbose", "verbose", help="Say more.", **options),
        click.option("-q", "--quiet", "quiet", help="Say nothing but warnings and errors.", **options),
    ):
        command = option(command)
    return command


def terminal_of(context: click.Context) -> Terminal:
    """Return the terminal that a command speaks to."""
    found = context.find_root().ensure_object(dict).setdefault("terminal", Terminal())
    assert isinstance(found, Terminal)  # noqa: S101 - only remember() puts it there
    return found
