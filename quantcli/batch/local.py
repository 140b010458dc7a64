"""Run the entries of a zoo on this machine: each in a process of its own, within its time and memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from quantcli.batch.worker import RESULT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from quantcli.batch.entry import Entry

# Sums over threads depend on how many there are; an entry's bytes must depend neither on the machine nor on what runs beside it.
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
# How often a process is looked at, in seconds.
WATCH = 0.05
LOG = "log.txt"
# What a kill that is not ours tells of.
OUT_OF_MEMORY = (
    ", most likely since the machine's memory ran out: run fewer at once (--jobs) or set a limit (memory), then --retry"
)


@dataclass(frozen=True)
class Ended:
    """How an entry's process ended.

    Attributes:
        status: ``done``, ``failed`` (with an error that is told), ``crashed``, ``timeout`` or ``memory``.
        reason: Why, where it is not done.
        figures: What was found.
        seconds: How long it took.
        passing: Whether the failure may pass by itself (a full disk): it says nothing about the entry.
        warnings: What was warned of.
    """

    status: str
    reason: str
    figures: dict[str, Any]
    seconds: float
    passing: bool = False
    warnings: tuple[str, ...] = ()


def run_local(
    entries: Sequence[Entry], workplace: Path, jobs: int, finished: Callable[[Entry, Ended, Path], None]
) -> None:
    """Run entries, so many at once.

    Args:
        entries: The entries.
        workplace: Where each gets a folder while it is in flight.
        jobs: How many run at once.
        finished: Called in this thread as each ends, with the folder of what it has made.
    """
    waiting = list(entries)
    stopped = threading.Event()
    with ThreadPoolExecutor(jobs) as pool:
        running: dict[Future[Ended], tuple[Entry, Path]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    entry = waiting.pop(0)
                    folder = workplace / entry.name.replace("/", "@")
                    running[pool.submit(run_one, entry, folder, stopped)] = entry, folder
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    entry, folder = running.pop(future)
                    finished(entry, future.result(), folder)
        finally:
            stopped.set()


def run_one(entry: Entry, folder: Path, stopped: threading.Event | None = None) -> Ended:
    """Run one entry in a process, and end it where it takes too long or too much memory, or everything is to stop."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "entry.json").write_bytes(entry.encoded())
    place = folder.resolve()  # the process stands elsewhere
    command = [
        sys.executable,
        "-P",
        "-m",
        "quantcli.batch.worker",
        str(place / "entry.json"),
        str(place),
        str(os.getpid()),
    ]
    began = time.monotonic()
    with (folder / LOG).open("wb") as log, watched(command, log, entry.folder) as process:
        killed = watch(process, entry, began, stopped or threading.Event())
    seconds = time.monotonic() - began
    (folder / "entry.json").unlink(missing_ok=True)
    if killed is not None:
        return Ended(*killed, {}, seconds)
    with contextlib.suppress(OSError, msgspec.DecodeError):
        result = msgspec.json.decode((folder / RESULT).read_bytes())
        (folder / RESULT).unlink()
        # The folder that it writes to is not where the files will stand.
        reason, *warnings = (text.replace(f"{place}/", "") for text in (result["reason"], *result["warnings"]))
        return Ended(result["status"], reason, result["figures"], seconds, result["passing"], tuple(warnings))
    return Ended("crashed", died(process.returncode), {}, seconds)


def died(code: int) -> str:
    """Say how a process died that left no result."""
    if code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
        return f"the process was ended by {name}" + (OUT_OF_MEMORY if name == "SIGKILL" else "")
    return f"the process ended with code {code} and left no result"


@contextlib.contextmanager
def watched(command: list[str], log: Any, folder: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that ends with this one, and see to it that nothing of it is left."""
    process = subprocess.Popen(  # noqa: S603 - it is ourselves
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        cwd=folder,
        env={**os.environ, **ONE_THREAD},
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def watch(
    process: subprocess.Popen[bytes], entry: Entry, began: float, stopped: threading.Event
) -> tuple[str, str] | None:
    """Wait for a process; return why it has to be ended, or None where it ended by itself."""
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(WATCH)
            return None
        if stopped.is_set():
            return "crashed", "it was stopped"
        if entry.timeout and time.monotonic() - began > entry.timeout:
            return "timeout", f"it took more than {entry.timeout:g} seconds"
        if entry.memory and (held := resident(process.pid)) > entry.memory:
            return "memory", f"it took {held / 1e6:.0f} MB of memory, more than {entry.memory / 1e6:.0f} MB"
    return None


def resident(pid: int) -> int:
    """Return the bytes of memory that a process holds; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
