"""The command line: the only place that prints, and that turns errors into exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence

import click

from calibration.errors import ReportedError
from quantcli import __version__
from quantcli.cli.batch import batch
from quantcli.cli.calibrate import calibrate, merge
from quantcli.cli.convert import convert
from quantcli.cli.demo import demo
from quantcli.cli.evaluate import evaluate
from quantcli.cli.export import export
from quantcli.cli.inspect import inspect
from quantcli.cli.report import report as report_page
from quantcli.cli.review import diff, lint
from quantcli.cli.streams import guarded_streams
from quantcli.cli.targets import targets
from quantcli.cli.terminal import MessageRelay, Terminal, output_options, terminal_of
from quantcli.cli.verify import verify

INTERRUPTED, ENDED = 128 + signal.SIGINT, 128 + signal.SIGTERM
EXIT_CODES = """\b
Exit codes:
  0  done
  1  failed: a bad model, bad data, an output that does not work
  2  usage
  3  verify found a difference between sidecar, model and runtime
  4  a threshold was missed (what was to be written is written)
  5  --strict found what it forbids, or lint what a target refuses
  130  interrupted (Ctrl-C); 143 ended (SIGTERM)
"""


HELP = """Turn a saved float PyTorch or ONNX model into an integer one.

Start with `quantcli demo`, or with your own model:

\b
  quantcli convert MODEL --data DATA -o model.int8.onnx
  quantcli eval model.int8.onnx --float MODEL --data DATA

Shell completion: eval "$(_QUANTCLI_COMPLETE=bash_source quantcli)" (zsh_source, fish_source).
"""


def print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Print the version, as JSON where that is asked for, and end."""
    if not wanted or context.resilient_parsing:
        return
    terminal = terminal_of(context)
    if terminal.json:
        terminal.result({"quantcli": __version__})
    else:
        click.echo(f"quantcli, version {__version__}")
    context.exit()


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=HELP,
    epilog=EXIT_CODES,
    no_args_is_help=True,
)
@click.option("--version", is_flag=True, expose_value=False, callback=print_version, help="Show the version and exit.")
@output_options
def cli() -> None:
    """Turn a saved float PyTorch or ONNX model into an integer one."""


for command in (
    calibrate,
    merge,
    inspect,
    convert,
    evaluate,
    verify,
    lint,
    diff,
    export,
    report_page,
    batch,
    targets,
    demo,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; every error is one line, never a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, end)
    sys.exit(run(given))


def end(number: int, _frame: object) -> None:
    """End as Ctrl-C does: what is in flight is put away, and an error says what is left."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code."""
    with relayed(arguments), guarded_streams():
        return dispatch(arguments)


@contextlib.contextmanager
def relayed(arguments: list[str]) -> Iterator[None]:
    """Show what the library tells and warns of; what Python and numpy warn of is for those who ask for details."""
    relay = MessageRelay(Terminal(quiet=bool({"-q", "--quiet"} & set(arguments)), json="--json" in arguments))
    verbose = bool({"-v", "--verbose"} & set(arguments))
    telling = verbose or bool({"calibrate", "--max-memory"} & set(arguments))
    ours = [logging.getLogger(name) for name in ("calibration", "quantcli")]
    loggers = [*ours, logging.getLogger("py.warnings")] if verbose else ours
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(relay)
        logger.setLevel(logging.INFO if telling else logging.WARNING)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(relay)
            logger.setLevel(level)


def dispatch(arguments: list[str]) -> int:
    """Run the command that is named and turn whatever it raises into an exit code."""
    try:
        code = invoke(arguments)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "quantcli"
        return report(arguments, "UsageError", error.format_message(), f"see {command} --help", 2)
    except click.ClickException as error:
        return report(arguments, type(error).__name__, error.format_message(), "", 1)
    except ReportedError as error:
        return report(arguments, type(error).__name__, error.what, error.remedy, error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        came = str(error.__cause__ or error)  # click wraps what it sees
        what, code = (f"ended by {came}", ENDED) if came else ("interrupted", INTERRUPTED)
        return report(arguments, "Interrupted", what, what_is_left(arguments), code)
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001 - the last line of defence: a defect of ours is one line too
        if {"-v", "--verbose"} & set(arguments):
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"internal error: {type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})"  # noqa: PTH119
        return report(arguments, "InternalError", what, "please report this; -v shows the whole trace", 1)
    return code if isinstance(code, int) else 0


def invoke(arguments: list[str]) -> object:
    """Run the command that is named, or print the help where there is none, and return what click does."""
    try:
        return cli.main(arguments, prog_name="quantcli", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2


def what_is_left(arguments: list[str]) -> str:
    """Say what an interrupted command has left."""
    if "calibrate" in arguments:
        return "--resume goes on from OUTPUT.partial, if there is one"
    if "batch" in arguments:
        return "what was finished is kept, and the same command goes on from there; reports are of the run before"
    if any(argument.startswith("--max-drop") for argument in arguments):
        return "--resume goes on from OUTPUT.search, if there is one"
    return "nothing was written"


def report(arguments: list[str], kind: str, what: str, remedy: str, code: int) -> int:
    """Print an error as one line (and, for machines, as JSON) and return its exit code."""
    Terminal(json="--json" in arguments).error(kind, what, remedy, code)
    return code
