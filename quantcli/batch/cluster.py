"""Run the entries of a zoo on a Ray cluster: each a task, which runs the same process on its node as on one machine.

What an entry reads is put into the cluster's object store once, by content, and laid out on the node; what it makes comes back the
same way. Where all nodes see the same folders (``shared``), nothing is carried. A task whose node dies is run again on another.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from quantcli.batch.entry import Entry, files_of
from quantcli.batch.local import Ended, run_one
from quantcli.batch.worker import SHARD
from quantcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

# How often a task is run again where its node has died.
RETRIES = 5
# Tasks that are handed to the cluster beyond those that it can run at once.
AHEAD = 4


@dataclass(frozen=True)
class Place:
    """A file or folder that travels.

    Attributes:
        field: Which path of the entry it is.
        name: Its own name.
        folder: Whether it is a folder.
        files: Its files, in the order in which their contents travel; relative to it, or of a file to the folder that holds it.
    """

    field: str
    name: str
    folder: bool
    files: tuple[str, ...]


def ray_engine(address: str | None, cpus: float = 1.0, shared: bool = False) -> Any:
    """Return an engine that runs entries on a Ray cluster.

    Args:
        address: The cluster's; None starts one on this machine.
        cpus: Processors that a task takes.
        shared: Whether all nodes see the paths of the manifest.

    Raises:
        UsageError: If Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("the engine ray needs Ray, which is not installed", "pip install 'quantcli[ray]'") from error

    def engine(
        entries: Sequence[Entry], workplace: Path, jobs: int, finished: Callable[[Entry, Ended, Path], None]
    ) -> None:
        started = not ray.is_initialized()
        if started:
            connect(ray, address)
        try:
            Tasks(ray, cpus, shared, workplace, finished).run(list(entries), jobs)
        finally:
            if started:
                ray.shutdown()

    return engine


def connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one here.

    Raises:
        UsageError: If there is none at the address.
    """
    here = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except Exception as error:
        what = f"there is no Ray cluster at {address or 'this machine'} ({first_line(error)})"
        raise UsageError(what, "docs/cluster.md tells how to start one") from error


def first_line(error: Exception) -> str:
    """Return the first telling line of what Ray says."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Tasks:
    """The tasks of one batch.

    Args:
        ray: The module.
        cpus: Processors that a task takes.
        shared: Whether nothing has to travel.
        workplace: Where outputs are laid down.
        finished: Called as each ends.
    """

    def __init__(
        self, ray: Any, cpus: float, shared: bool, workplace: Path, finished: Callable[[Entry, Ended, Path], None]
    ) -> None:
        self.ray, self.cpus, self.shared, self.workplace, self.finished = ray, cpus, shared, workplace, finished
        self.task = ray.remote(on_node)
        self.stored: dict[str, Any] = {}

    def run(self, waiting: list[Entry], jobs: int) -> None:
        """Hand out entries, as many at once as the cluster runs, or as are asked for."""
        running: dict[Any, Entry] = {}
        while waiting or running:
            most = jobs if jobs > 1 else int(self.ray.cluster_resources().get("CPU", 1) / self.cpus) + AHEAD
            while waiting and len(running) < most:
                entry = waiting.pop(0)
                running[self.submitted(entry)] = entry
            ready, _ = self.ray.wait(list(running), num_returns=1)
            for one in ready:
                self.collect(one, running.pop(one))

    def submitted(self, entry: Entry) -> Any:
        """Hand an entry to the cluster."""
        places, contents = ([], []) if self.shared else self.packed(entry)
        limits: dict[str, Any] = {"memory": entry.memory} if entry.memory else {}
        task = self.task.options(max_retries=RETRIES, num_cpus=self.cpus, **limits)
        shards = entry.wishes.shards or 1
        if shards == 1 or entry.wishes.data is None or entry.recipe.mode != "static":
            return task.remote(entry.encoded(), places, 0, *contents)
        parts = [
            task.remote(msgspec.structs.replace(entry, shard=(number, shards)).encoded(), places, 0, *contents)
            for number in range(shards)
        ]
        return task.remote(entry.encoded(), places, shards, *parts, *contents)

    def packed(self, entry: Entry) -> tuple[list[Place], list[Any]]:
        """Return what an entry reads, its contents as references into the object store."""
        places, contents = [], []
        for field, path in entry.places().items():
            root = path if path.is_dir() else path.parent
            files = files_of(path)
            names = tuple(str(file.relative_to(root.resolve() if file.is_absolute() else root)) for file in files)
            places.append(Place(field, path.name, path.is_dir(), names))
            contents += [self.reference(file.read_bytes()) for file in files]
        return places, contents

    def reference(self, content: bytes) -> Any:
        """Put contents into the object store, once."""
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self.stored:
            self.stored[digest] = self.ray.put(content)
        return self.stored[digest]

    def collect(self, one: Any, entry: Entry) -> None:
        """Lay down what a task has made."""
        folder = self.workplace / entry.name.replace("/", "@")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            ended, files = self.ray.get(one)
        except Exception as error:  # noqa: BLE001 - whatever happened to the task is this entry's
            ended, files = Ended("crashed", f"the cluster lost it ({first_line(error)})", {}, 0.0, passing=True), {}
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        self.finished(entry, ended, folder)


def on_node(encoded: bytes, places: list[Place], shards: int, *given: Any) -> tuple[Ended, dict[str, bytes]]:
    """Run one entry on a node: lay out what it reads, run its process, and return what it has made.

    Args:
        encoded: The entry.
        places: What it reads.
        shards: How many parts of its calibration come first in what is given.
        given: What the tasks of those parts returned; then the contents of what it reads.
    """
    entry = Entry.decoded(encoded)
    top = Path(tempfile.mkdtemp(prefix="quantcli-"))
    try:
        laid, renamed = laid_out(entry, places, list(given[shards:]), top)
        if failed := next((ended for ended, _ in given[:shards] if ended.status != "done"), None):
            return failed, {}
        if shards:
            laid = msgspec.structs.replace(
                laid, statistics=str(merged([files[SHARD] for _, files in given[:shards]], top))
            )
        ended = run_one(laid, top / "made")
        texts = [ended.reason, *ended.warnings]
        for new, old in renamed.items():
            texts = [text.replace(new, old) for text in texts]
        warned = [text for part, _ in given[:shards] for text in part.warnings]
        made = top / "made"
        files = {str(file.relative_to(made)): file.read_bytes() for file in made.rglob("*") if file.is_file()}
        return replace(ended, reason=texts[0], warnings=tuple(dict.fromkeys([*warned, *texts[1:]]))), files
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(top)


def merged(parts: list[bytes], folder: Path) -> Path:
    """Put the parts of a calibration together, and return where the whole stands."""
    from calibration import statistics

    loaded = []
    for number, content in enumerate(parts):
        path = folder / f"{number}.stats"
        path.write_bytes(content)
        loaded.append((path.name, statistics.load(path)))
    whole = folder / "whole.stats"
    whole.write_bytes(statistics.serialized(statistics.merge(loaded)))
    return whole


def laid_out(entry: Entry, places: list[Place], contents: list[bytes], top: Path) -> tuple[Entry, dict[str, str]]:
    """Write what an entry reads into a folder; return the entry that reads it there, and which path stands for which."""
    if not places:
        return entry, {}
    old, new = entry.places(), {}
    by_module = {"metric"} if (entry.wishes.factory or "").rpartition(":")[0].endswith(".py") else {"metric", "factory"}
    code = top / "read" / "code"  # from where modules are imported by name
    for number, place in enumerate(places):
        root = code if place.field in by_module else top / "read" / str(number)
        where = root / place.name
        for name in place.files:
            file = (where if place.folder else root) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(contents.pop(0))
        root.mkdir(parents=True, exist_ok=True)
        new[place.field] = where
    wishes: dict[str, str] = {name: str(new[name]) for name in ("data", "labels", "evaluate") if name in new}
    if "factory" in new and "factory" not in by_module and entry.wishes.factory is not None:
        wishes["factory"] = f"{new['factory']}:{entry.wishes.factory.rpartition(':')[2]}"
    recipe = msgspec.structs.replace(entry.recipe, target=str(new["target"])) if "target" in new else entry.recipe
    folder = str(code if code.is_dir() else top)
    moved = msgspec.structs.replace(
        entry,
        path=str(new["path"]),
        wishes=msgspec.structs.replace(entry.wishes, **wishes),
        recipe=recipe,
        folder=folder,
    )
    return moved, {str(new[field]): str(old[field]) for field in new}
