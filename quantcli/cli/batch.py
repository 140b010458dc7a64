"""``quantcli batch``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantcli.cli.options import EXISTING_FILE
from quantcli.cli.terminal import Terminal, output_options, terminal_of

if TYPE_CHECKING:
    from quantcli.batch.run import Outcome


@click.command()
@click.argument("zoo", type=EXISTING_FILE)
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="The folder of the batch."
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Entries that run at once; with Ray, 1 means as many as the cluster takes.",
)
@click.option(
    "--resume/--fresh",
    default=True,
    show_default=True,
    help="Keep entries that are finished and whose model, data, recipe and versions are the same; or run all again.",
)
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="What runs the entries."
)
@click.option(
    "--address", help="The Ray cluster's address (auto, ray://host:10001, host:6379).  [default: one started here]"
)
@click.option(
    "--cpus", type=click.FloatRange(min=0.01), default=1.0, show_default=True, help="Processors per Ray task."
)
@click.option("--shared", is_flag=True, help="All nodes see the manifest's paths: nothing is carried to them.")
@click.option(
    "--retry", is_flag=True, help="Run again what failed, crashed, took too long or too much, or missed min_speedup."
)
@click.option("--list", "listed", is_flag=True, help="Print the entries, and run none.")
@output_options
@click.pass_context
def batch(
    context: click.Context,
    /,
    zoo: Path,
    output: Path,
    jobs: int,
    resume: bool,
    retry: bool,
    listed: bool,
    **options: Any,
) -> None:
    """Convert and judge every model of a ZOO (.toml), each in a process of its own.

    Nothing is done twice: an entry is run again only where its model, data, recipe or the versions have changed. The exit code is
    4 unless every entry met its thresholds. docs/batch.md describes the manifest and the folder.
    """
    from quantcli.batch.local import run_local
    from quantcli.batch.manifest import read_zoo
    from quantcli.batch.run import document, made_in, run_batch, write_reports
    from quantcli.errors import UsageError

    terminal = terminal_of(context)
    entries = read_zoo(zoo, made_in(output))
    if listed:
        terminal.table("Entries", ("entry", "model"), [(entry.name, entry.path) for entry in entries])
        terminal.result({"entries": [{"name": entry.name, "model": entry.path} for entry in entries]})
        return
    engine: Any = run_local
    if options["engine"] == "ray":
        from quantcli.batch.cluster import ray_engine

        engine = ray_engine(options["address"], options["cpus"], options["shared"])
    elif options["address"] or options["shared"]:
        raise UsageError("--address and --shared are for --engine ray", "leave them out, or add it")
    with terminal.progress() as progress:

        def told(outcome: Outcome, done: int, total: int) -> None:
            progress("batch", done, total)
            if not outcome.cached:
                why = f" ({outcome.reason})" if outcome.reason else ""
                terminal.tell(f"[{done}/{total}] {outcome.entry.name}: {outcome.status}{why}")

        outcomes = run_batch(entries, output, jobs, not resume, retry, engine, told)
    write_reports(outcomes, output)
    show(terminal, outcomes, output)
    terminal.result(
        {**document(outcomes), "ran": sum(not outcome.cached for outcome in outcomes), "folder": str(output)}
    )
    if any(outcome.status != "met" for outcome in outcomes):
        context.exit(4)


def show(terminal: Terminal, outcomes: list[Outcome], output: Path) -> None:
    """Print the outcomes."""
    terminal.table(
        "Zoo",
        ("entry", "verdict", "metric", ">float", ">quantized", ">drop", ">of float's bytes"),
        [cells(outcome) for outcome in outcomes],
    )
    for outcome in outcomes:
        for text in outcome.record.warnings:
            terminal.warn(f"{outcome.entry.name}: {text}")
        if outcome.status != "met":
            terminal.warn(f"{outcome.entry.name}: {outcome.status}: {outcome.reason}")
    ran = sum(not outcome.cached for outcome in outcomes)
    met = sum(outcome.status == "met" for outcome in outcomes)
    terminal.say(
        f"{met} of {len(outcomes)} entries met what was asked; {ran} were run, {len(outcomes) - ran} were there already"
    )
    terminal.say(f"{output}: results.json, junit.xml, timings.json, index.html, entries/")


def cells(outcome: Outcome) -> tuple[str, ...]:
    """Return one entry's row."""
    from quantcli.evaluation.metrics import written

    figures: dict[str, Any] = outcome.record.figures
    metric = str(figures.get("metric", ""))
    shown = [written(metric, figures.get(name)) for name in ("float", "quantized", "drop")]
    share = f"{figures['bytes'] / figures['float_bytes']:.0%}" if outcome.record.status == "done" else ""
    return outcome.entry.name, outcome.status, metric, *shown, share
