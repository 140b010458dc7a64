"""A batch: which entries have to be run, what became of each, and the reports.

Everything stands in one folder: ``entries/MODEL/RECIPE/`` with the converted model, its sidecar and ``record.json``;
``results.json``, ``junit.xml``, ``timings.json`` and ``index.html``. An entry's record appears whole or not at all, and says under
which key (contents, recipe, versions) it was made: it is made again only where that has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from quantcli.batch.entry import files_of
from quantcli.batch.local import LOG, Ended, run_local
from quantcli.documents import as_json
from quantcli.errors import OutputError, UsageError
from quantcli.evaluation.junit import Case, junit
from quantcli.evaluation.metrics import UNBOUNDED
from quantcli.evaluation.verdict import Check, Figures, Thresholds, checked
from quantcli.files import staged
from quantcli.load import digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from quantcli.batch.entry import Entry

    Engine = Callable[[Sequence[Entry], Path, int, Callable[[Entry, Ended, Path], None]], None]

logger = logging.getLogger(__name__)

RECORD = "record.json"
ENTRIES, WORK, LOCK = "entries", ".work", ".lock"
VERSION = 1


class Record(msgspec.Struct, frozen=True):
    """What became of an entry.

    Attributes:
        key: What it was made from.
        status: As `quantcli.batch.local.Ended` has it.
        reason: Why, where it is not done.
        figures: What was found.
        seconds: How long it took.
        files: The sha256 of what it made, by place in its folder.
        timeout: The seconds that it was allowed; 0 for no limit.
        memory: The bytes that it was allowed; 0 for no limit.
        passing: Whether the failure may pass by itself.
        warnings: What was warned of.
    """

    key: str
    status: str
    reason: str
    figures: dict[str, Any]
    seconds: float
    files: dict[str, str] = {}
    timeout: float = 0.0
    memory: int = 0
    passing: bool = False
    warnings: tuple[str, ...] = ()

    def stands(self, entry: Entry) -> bool:
        """Return whether the same entry would end the same way: not where more is allowed now than it was ended by."""
        limits = {"timeout": (entry.timeout, self.timeout), "memory": (entry.memory, self.memory)}
        if self.status in limits:
            now, then = limits[self.status]
            return 0 < now <= then
        return not self.passing


@dataclass(frozen=True)
class Outcome:
    """An entry's verdict.

    Attributes:
        entry: The entry.
        record: What became of it.
        checks: Its thresholds.
        cached: Whether it was there already.
    """

    entry: Entry
    record: Record
    checks: tuple[Check, ...]
    cached: bool

    @property
    def status(self) -> str:
        """``met``; ``missed`` a threshold; or how it failed."""
        if self.record.status != "done":
            return self.record.status
        return "met" if all(check.met for check in self.checks) else "missed"

    @property
    def reason(self) -> str:
        """Why it did not reach what was asked; empty where it did."""
        return self.record.reason or "; ".join(check.said for check in self.checks if not check.met)


def run_batch(
    entries: Sequence[Entry],
    output: Path,
    jobs: int = 1,
    fresh: bool = False,
    retry: bool = False,
    engine: Engine = run_local,
    told: Callable[[Outcome, int, int], None] = lambda *_: None,
) -> list[Outcome]:
    """Run the entries that have to be run, and return the outcomes of all, in order.

    Args:
        entries: The entries.
        output: The folder of the batch.
        jobs: How many run at once.
        fresh: Whether to run everything again.
        retry: Whether to run again what failed, or missed a speed.
        engine: What runs them.
        told: Called with every outcome as it is known, how many are known, and how many there are.

    Raises:
        OutputError: If the folder cannot be written to, or another run is at work there.
    """
    digests: dict[Path, str] = {}
    keys = {entry.name: entry.key(digests) for entry in entries}
    try:
        output.mkdir(parents=True, exist_ok=True)
        with alone(output):
            return outcomes_of(entries, keys, digests, output, jobs, fresh, retry, engine, told)
    except OSError as error:
        raise OutputError(f"{output} cannot be written ({error.strerror or error})", "choose another -o") from error


@contextlib.contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold a folder against other runs; the system lets go of it however this process ends.

    Raises:
        OutputError: If another run is at work there.
    """
    with (output / LOCK).open("wb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another run is at work in {output}", "wait until it has ended, or choose another -o"
            ) from error
        except OSError as error:
            logger.warning("%s cannot be locked (%s): start no second run there", output, error.strerror or error)
        yield


def outcomes_of(
    entries: Sequence[Entry],
    keys: dict[str, str],
    digests: dict[Path, str],
    output: Path,
    jobs: int,
    fresh: bool,
    retry: bool,
    engine: Engine,
    told: Callable[[Outcome, int, int], None],
) -> list[Outcome]:
    """Do what `run_batch` does in a folder that is there and held, with the entries' keys and the digests that they came from."""
    outcomes: dict[str, Outcome] = {}

    def note(outcome: Outcome) -> None:
        outcomes[outcome.entry.name] = outcome
        told(outcome, len(outcomes), len(entries))

    waiting = []
    for entry in entries:
        record = None if fresh else known(output, entry, keys[entry.name], digests)
        if record is None or not record.stands(entry) or (retry and may_pass(entry, record)):
            waiting.append(entry)
        else:
            note(judged(entry, record, cached=True))

    def finished(entry: Entry, ended: Ended, folder: Path) -> None:
        record = Record(
            keys[entry.name],
            ended.status,
            entry.shown(ended.reason),
            ended.figures,
            ended.seconds,
            timeout=entry.timeout,
            memory=entry.memory,
            passing=ended.passing,
            warnings=tuple(map(entry.shown, ended.warnings)),
        )
        keep(output, entry, record, folder)
        note(judged(entry, record, cached=False))

    workplace = output / WORK
    shutil.rmtree(workplace, ignore_errors=True)
    workplace.mkdir()
    try:
        engine(waiting, workplace, jobs, finished)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return [outcomes[entry.name] for entry in entries]


def may_pass(entry: Entry, record: Record) -> bool:
    """Tell whether an entry may end better another time: it failed, or it was too slow on a machine that had other work."""
    checks = judged(entry, record, cached=True).checks
    return record.status != "done" or any(check.name == "min-speedup" and not check.met for check in checks)


def place_of(output: Path, entry: Entry) -> Path:
    """Return an entry's folder."""
    return output / ENTRIES / entry.name


def made_in(output: Path) -> tuple[Path, ...]:
    """Return the folders of what a batch makes."""
    return output / ENTRIES, output / WORK


def known(output: Path, entry: Entry, key: str, digests: dict[Path, str]) -> Record | None:
    """Return the record of an entry that was made from the same; None where there is none, or its files are not what they were.

    What was done with a report or with latencies serves without them as well.
    """
    folder = place_of(output, entry)
    with contextlib.suppress(OSError, msgspec.DecodeError):
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=Record)
        same = record.key == key or (
            record.status == "done" and record.key in {richer.key(digests) for richer in entry.richer()}
        )
        if same and all(digest_of([folder / name]) == digest for name, digest in record.files.items()):
            kept = record.figures if entry.wishes.report else {k: v for k, v in record.figures.items() if k != "charts"}
            return msgspec.structs.replace(record, figures=kept)
    return None


def keep(output: Path, entry: Entry, record: Record, made: Path) -> None:
    """Give what an entry has made its place; the record comes with it, so that a cut leaves nothing half."""
    files = {
        file.relative_to(made).as_posix(): digest_of([file])
        for file in files_of(made)
        if file.name not in {RECORD, LOG}
    }
    record = msgspec.structs.replace(record, files=files if record.status == "done" else {})
    (made / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    if record.status == "done":
        (made / LOG).unlink(missing_ok=True)
    else:
        with (made / LOG).open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{record.status}: {record.reason}\n")
    place = place_of(output, entry)
    shutil.rmtree(place, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    made.rename(place)


def judged(entry: Entry, record: Record, cached: bool) -> Outcome:
    """Return an entry's verdict."""
    wishes, figures = entry.wishes, record.figures
    asked = Thresholds(wishes.max_drop, wishes.min_metric, wishes.min_speedup)
    if record.status != "done" or not asked.any:
        return Outcome(entry, record, (), cached)
    try:
        quantized = figures.get("quantized")
        if quantized is None and figures.get("metric") in UNBOUNDED:
            quantized = math.inf  # JSON has no such number
        if quantized is None:
            raise UsageError("there is no figure to judge by", "give evaluation data")
        found = Figures(figures["metric"], quantized, figures["drop"], figures["speedup"])
        return Outcome(entry, record, checked(found, asked), cached)
    except UsageError as error:
        return Outcome(entry, msgspec.structs.replace(record, status="failed", reason=str(error)), (), cached)


# ---- reports -------------------------------------------------------------------------------------------------------------------


def document(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the results for machines: the same for the same zoo, however often it was cut off; times stand elsewhere."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    return {
        "format": "quantcli-zoo",
        "version": VERSION,
        "summary": {"entries": len(outcomes), **dict(sorted(counts.items()))},
        "entries": [
            {
                "name": outcome.entry.name,
                "status": outcome.status,
                "reason": untimed(outcome),
                "warnings": list(outcome.record.warnings),
                "checks": [
                    {"name": check.name, "limit": check.limit, "met": check.met}
                    | ({} if check.name == "min-speedup" else {"value": check.value})
                    for check in outcome.checks
                ],
                **{name: value for name, value in outcome.record.figures.items() if name != "speedup"},
            }
            for outcome in outcomes
        ],
    }


def untimed(outcome: Outcome) -> str:
    """Return the reason without measured times and memory, which no two runs share."""
    timed = {"memory": "it took more memory than it may", "timeout": outcome.record.reason}
    if outcome.record.status != "done":
        return timed.get(outcome.record.status, outcome.record.reason)
    parts = [
        "it is slower than asked" if check.name == "min-speedup" else check.said
        for check in outcome.checks
        if not check.met
    ]
    return "; ".join(parts)


def timings(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return how long each entry took, and how fast what it made runs."""
    return {
        outcome.entry.name: {
            "seconds": round(outcome.record.seconds, 3),
            "speedup": outcome.record.figures.get("speedup"),
            "cached": outcome.cached,
        }
        for outcome in outcomes
    }


def cases(outcomes: Sequence[Outcome]) -> list[Case]:
    """Return the outcomes as JUnit has them: a missed threshold is a failure, everything else an error."""
    found = []
    for outcome in outcomes:
        model, _, recipe = outcome.entry.name.partition("/")
        missed = outcome.status == "missed"
        failure, error = (
            (outcome.reason, "") if missed else ("", f"{outcome.status}: {outcome.reason}" if outcome.reason else "")
        )
        found.append(Case(model, recipe, failure, error, outcome.record.seconds, outcome.record.warnings))
    return found


def write_reports(outcomes: Sequence[Outcome], output: Path) -> None:
    """Write ``results.json``, ``timings.json``, ``junit.xml`` and ``index.html``.

    Raises:
        OutputError: If the folder cannot be written to.
    """
    from quantcli.batch.index import index

    with staged() as files:
        files.write(output / "results.json", as_json(document(outcomes)))
        files.write(output / "timings.json", as_json(timings(outcomes)))
        files.write(output / "junit.xml", junit("quantcli batch", cases(outcomes)))
        files.write(output / "index.html", index(outcomes))
