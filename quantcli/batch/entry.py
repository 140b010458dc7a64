"""One entry of a zoo: a model with a recipe, what is wished for it, and the key of what comes of it."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec

from calibration.errors import ReportedError
from quantcli.documents import encodable
from quantcli.recipe import Recipe

Number = Annotated[float, msgspec.Meta(ge=0)]
# What a wish is where none is made: written out, it changes no key.
DEFAULTS = {
    "format": "qdq",
    "output": "onnx",
    "end_at": (),
    **dict.fromkeys(("trust_pickle", "strict", "verify", "report"), False),
}
# What outputs depend on besides their inputs.
PACKAGES = ("quantcli", "numpy", "onnx", "onnxruntime", "onnx-ir", "onnxscript", "torch")


class Wishes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is wished for a model; None leaves it to the defaults of the zoo.

    Attributes:
        data: Calibration data.
        labels: A CSV that names the image files.
        split: Keep only those of its rows, to calibrate.
        evaluate: Evaluation data; the calibration data where there is none.
        evaluate_split: Keep only those rows, to evaluate.
        samples: How many samples are evaluated; all by default.
        recipe: A recipe file that the recipes are laid over.
        metric: ``top1``, ``sqnr``, …, or ``module:function``.
        max_drop, min_metric, min_speedup: What has to be reached.
        timeout: Seconds that an entry may take; 0 for no limit.
        memory: Memory that it may take: ``4GB``; ``0`` for no limit.
        format: ``qdq``, ``qoperator``, ``c`` or ``c-params``.
        end_at: Integer tensors at which C source ends.
        output: ``onnx`` or ``pt2``.
        factory: What builds the module of a state dict.
        trust_pickle: Whether the file may run what code it holds.
        strict, verify: As `quantcli.convert` has them.
        report: Whether a page about each converted model is written (``report.html``), and its numbers into the results.
        shards: On a cluster, into how many tasks its calibration is cut; the bytes are the same.
    """

    data: str | None = None
    labels: str | None = None
    split: str | None = None
    evaluate: str | None = None
    evaluate_split: str | None = None
    samples: Annotated[int, msgspec.Meta(ge=1)] | None = None
    recipe: str | None = None
    metric: str | None = None
    max_drop: float | None = None
    min_metric: float | None = None
    min_speedup: Number | None = None
    timeout: Number | None = None
    memory: str | None = None
    format: str | None = None
    end_at: tuple[str, ...] | None = None
    output: str | None = None
    factory: str | None = None
    trust_pickle: bool | None = None
    strict: bool | None = None
    verify: bool | None = None
    report: bool | None = None
    shards: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Entry(msgspec.Struct, frozen=True):
    """One model with one recipe, whole.

    Attributes:
        name: ``model/recipe``.
        path: The model.
        recipe: The recipe.
        wishes: Everything else; paths are absolute.
        folder: The manifest's folder: where functions are imported from.
        timeout: Seconds; 0 for no limit.
        memory: Bytes; 0 for no limit.
        shard: Only calibrate, and only this part of the samples: (i, n).
        statistics: Where its calibration stands, if it was done already.
    """

    name: str
    path: str
    recipe: Recipe
    wishes: Wishes
    folder: str = "."
    timeout: float = 0.0
    memory: int = 0
    shard: tuple[int, int] | None = None
    statistics: str | None = None

    def encoded(self) -> bytes:
        """Return the entry as JSON, from which `decoded` makes it again; paths may hold bytes that are no UTF-8."""
        return json.dumps(msgspec.to_builtins(self)).encode()

    @staticmethod
    def decoded(data: bytes) -> Entry:
        """Return the entry that was encoded."""
        return msgspec.convert(json.loads(data), Entry)

    def places(self) -> dict[str, Path]:
        """Return the files and folders that the entry reads, by what they are to it."""
        wishes = self.wishes
        factory = (wishes.factory or "").rpartition(":")[0]
        module = (wishes.metric or "").partition(":")[0] if ":" in (wishes.metric or "") else ""
        named = {
            "path": self.path,
            "data": wishes.data,
            "labels": wishes.labels,
            "evaluate": wishes.evaluate,
            "metric": self.source_of(module),
            "factory": factory if factory.endswith(".py") else self.source_of(factory),
            "target": self.recipe.target_file,
        }
        return {field: Path(place) for field, place in named.items() if place}

    def source_of(self, module: str) -> str | None:
        """Return the file of a module beside the manifest, or the folder of its package; None where there is none."""
        found = module_in(Path(self.folder), module) if module else None
        return str(found) if found else None

    def shown(self, text: str) -> str:
        """Return a message with paths as the manifest has them, so that it is the same wherever the zoo stands."""
        folder = re.escape(encodable(os.path.join(self.folder, "")))  # noqa: PTH118 - it is to end with a separator
        return re.sub(rf"(?<![\w/.-]){folder}(?=[^/\s])", "", encodable(text))

    def key(self, digests: dict[Path, str]) -> str:
        """Return what the entry's output and figures follow from, as a digest: contents, recipe, versions.

        Neither thresholds nor limits are part of it, nor where files stand; a default that is written out is none.

        Args:
            digests: Digests of files and folders that were read already; new ones are added.
        """
        contents = {}
        for field, path in self.places().items():
            if path not in digests:
                digests[path] = digest_at(path)
            contents[field] = digests[path]
        named = {"data", "labels", "evaluate", "recipe", "factory"}
        aside = {"max_drop", "min_metric", "min_speedup", "timeout", "memory", "shards"} | named
        wishes = {
            name: DEFAULTS.get(name) if getattr(self.wishes, name) is None else getattr(self.wishes, name)
            for name in Wishes.__struct_fields__
            if name not in aside
        }
        factory = (self.wishes.factory or "").rpartition(":")
        recipe = msgspec.to_builtins(self.recipe) | {"target": Path(self.recipe.target).name}
        timed = self.wishes.min_speedup is not None
        told = [contents, Path(self.path).name, Path(factory[0]).name, factory[2], recipe, wishes, versions(), timed]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def richer(self) -> list[Entry]:
        """Return the entries whose outcome holds this one's: those with a report, with measured latencies, or both."""
        asked = self.wishes
        return [
            msgspec.structs.replace(self, wishes=msgspec.structs.replace(asked, report=report, min_speedup=speedup))
            for report in {bool(asked.report), True}
            for speedup in {asked.min_speedup, asked.min_speedup or 0.0}
        ]


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def digest_at(path: Path) -> str:
    """Return the sha256 of a file (and of a model's external data), or of a folder's files, with their names.

    A file's own name is left out, but for what tells its kind.
    """
    digest = hashlib.sha256()
    for file in files_of(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name if file != path else file.suffix
        digest.update(name.encode(errors="surrogateescape") + b"\0")
        # What cannot be read is told by the entry that reads it.
        with contextlib.suppress(OSError), file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def module_in(folder: Path, module: str) -> Path | None:
    """Return the file of a module in a folder, or the folder of the package that it is of; None where there is none."""
    package = folder / module.partition(".")[0]
    file = package.with_name(f"{package.name}.py")
    if file.is_file() and not (package / "__init__.py").is_file():  # as Python chooses between the two
        return file
    return package if package.is_dir() else None


def with_imports(file: Path) -> list[Path]:
    """Return a module's file, and those of the modules beside it that it imports, and that they import."""
    found: list[Path] = []
    waiting = [file]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.append(one)
        for name in imported_by(one):
            beside = module_in(file.parent, name)
            if beside is not None:
                waiting += beside.rglob("*.py") if beside.is_dir() else [beside]
    return [file, *sorted(found[1:])]


def imported_by(file: Path) -> set[str]:
    """Return the names of the modules that a file imports, wherever in it; none where it is no Python."""
    if file.suffix != ".py":
        return set()
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
        plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return plain | {
            node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level
        }
    return set()


def files_of(path: Path) -> list[Path]:
    """Return the files that a path stands for; none where there is nothing."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and file.parent.name != "__pycache__")
    if path.suffix == ".py" and path.is_file():
        return with_imports(path)
    if path.suffix == ".onnx":
        from quantcli.load.onnx import load_onnx

        with contextlib.suppress(ReportedError):  # what is no model is what it is
            return load_onnx(path)[1]
    return [path] if path.is_file() else []
